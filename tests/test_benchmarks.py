"""The benchmarks compare like with like: what they assert is refused when wrong, and what they claim of memory is true."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import checkpoint, data_at_scale, ladder, lr_transfer, peers
from benchmarks.shapes import SHAPES, Shape
from pretrain.data.passes import Passes
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.model.flops import num_parameters

TINY = ModelConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False
)  # fmt: skip


def reports(parameters: int, losses: list[float], version: str = torch.__version__) -> tuple[dict, dict]:
    ours = num_parameters(SHAPES["C1"].model).total
    programs = {"ours": SimpleNamespace(parameters=ours), "transformers": SimpleNamespace(parameters=parameters or ours)}
    found = {
        "ours": {"torch": torch.__version__, "losses": [9.0, 8.0, 7.0]},
        "transformers": {"torch": version, "losses": losses},
    }
    return programs, found


def test_programs_with_equal_parameters_and_losses_are_compared():
    peers.check(SHAPES["C1"], *reports(0, [9.00005, 8.02, 7.01]))


@pytest.mark.parametrize(
    ("parameters", "losses", "version", "named"),
    [
        (8_621_311, [9.0, 8.0, 7.0], torch.__version__, "parameters"),
        (0, [9.001, 8.0, 7.0], torch.__version__, "first loss"),
        (0, [9.0, 8.0, 7.06], torch.__version__, "mean of the others"),
        (0, [9.0, float("nan"), 7.0], torch.__version__, "not finite"),
        (0, [9.0, 8.0, 7.0], "2.4.0", "torch 2.4.0"),
    ],
)
def test_a_peer_that_trains_another_model_or_to_another_loss_is_refused(parameters, losses, version, named):
    with pytest.raises(peers.PeerError, match=named):
        peers.check(SHAPES["C1"], *reports(parameters, losses, version))


def test_the_flops_of_nanogpt_are_those_of_its_matrices():
    """Counted by hand for C1: 6 layers of 12 x 256^2, a head of 8192 x 256, attention 12 x 6 x 256 x 256."""
    theirs = 6 * (6 * 12 * 256**2 + 8192 * 256) + 12 * 6 * 256 * 256
    ours = 6 * (6 * (2 * 256**2 + 2 * 256 * 128 + 3 * 256 * 704) + 8192 * 256) + 12 * 6 * 256 * 256
    assert peers.flops_ratio(SHAPES["C1"]) == pytest.approx(theirs / ours, rel=1e-12)
    assert 1.03 < theirs / ours < 1.05


def test_a_program_that_ends_early_is_reported_with_the_end_of_its_output(tmp_path):
    task = tmp_path / "task.json"
    task.write_text('{"compile": false}')
    with pytest.raises(peers.PeerError, match=r"ours has exited(.|\n)*KeyError"):
        peers.Program("ours", sys.executable, task, ranks=1, threads=1)


@pytest.mark.release
@pytest.mark.parametrize("case", ["eager", "small", "ranks"])
def test_trainer_and_ours_take_turns_and_reach_the_same_losses(case):
    """Through both real training loops; `measure` refuses unequal parameters and losses itself."""
    if torch.cuda.is_available():
        pytest.skip("compares in fp32 on CPUs")
    model = resolve_model(TINY, vocab_size=512, sequence_length=32)
    options = SimpleNamespace(threads=2, rounds=2, steps=2, nanogpt=None)
    python = {"ours": sys.executable, "transformers": sys.executable}
    rows = peers.measure(case, Shape(model, 32, 4, 512), python, options)
    ours, theirs = rows
    assert (ours["program"], theirs["program"]) == ("ours", "transformers")
    assert theirs["first_loss"] == pytest.approx(ours["first_loss"], abs=1e-4)
    assert theirs["mean_loss"] == pytest.approx(ours["mean_loss"], abs=1e-3)
    assert len(theirs["turns"]) == 2 and min(turn["cpu"] for turn in theirs["turns"]) > 0


@pytest.mark.release
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is in /proc")
def test_the_first_save_in_the_background_takes_a_copy_of_the_state_and_the_others_stream(tmp_path):
    rows = {row["what"]: row["grown_bytes"] / row["state_bytes"] for row in checkpoint.memory(tmp_path / "memory", 256, 2)}
    assert 0.95 < rows["first save in the background"] < 1.2
    assert max(rows[what] for what in ("save in the foreground", "second save in the background", "load")) < 0.2


def test_every_shape_is_resolved_and_divides_its_batch():
    for name, shape in SHAPES.items():
        assert shape.tokens_per_step % (shape.sequence_length * shape.micro_batch_size) == 0, name
        assert None not in (shape.model.head_dim, shape.model.intermediate_size, shape.model.vocab_size), name


def test_every_rung_of_the_ladder_trains_to_the_same_loss():
    shape = Shape(resolve_model(TINY, vocab_size=64, sequence_length=16), 16, 2, 64)
    window, device = ladder.make_window(shape, 2, torch.device("cpu")), torch.device("cpu")
    trainers = [ladder.Trainer(rung, shape, device) for rung in ladder.RUNGS if not rung.compiled]
    losses = [[trainer.step(window) for _ in range(3)] for trainer in trainers]
    for others in losses[1:]:
        assert others == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
def test_the_order_of_a_large_run_is_checked_on_sparse_files(tmp_path):
    *_, drawn, small = data_at_scale.simulate(tmp_path, ranks=8, tokens=10**11, count=7, small_tokens=10**6)
    assert drawn.startswith("4,000 samples drawn at random are where") and " samples of a small copy: each once" in small
    assert not list(tmp_path.iterdir())


def repeats(locate):
    """Each sample is read in place of the one before it, too."""
    return lambda passes, numbers: locate(passes, np.asarray(numbers) // 2 * 2)


def shifted(inverse):
    return lambda passes, epoch, samples: inverse(passes, epoch, samples) + 1


@pytest.mark.parametrize(
    ("method", "bug", "named"), [("locate", repeats, "occurs twice in"), ("numbers", shifted, "is not at position")]
)
def test_a_wrong_order_of_a_large_run_is_found(tmp_path, monkeypatch, method, bug, named):
    monkeypatch.setattr(Passes, method, bug(getattr(Passes, method)))
    with pytest.raises(AssertionError, match=named):
        list(data_at_scale.simulate(tmp_path, ranks=8, tokens=10**11, count=3, small_tokens=10**6))


def test_the_best_rate_and_what_another_rate_costs_are_those_of_a_parabola():
    curve = {place: 4.0 + 0.3 * (place + 6.8) ** 2 for place in range(-10, -3)}
    assert lr_transfer.lowest(curve) == pytest.approx(-6.8)
    assert lr_transfer.excess(curve, -6.2) == pytest.approx(0.3 * 0.6**2)
    assert math.isnan(lr_transfer.excess(curve, -9.0)), "too far from the points of the parabola"
    diverged = {-8: 4.5, -7: 4.0, -6: math.inf}
    assert lr_transfer.lowest(diverged) == -7.0 and math.isnan(lr_transfer.excess(diverged, -7.0))
    edge = {-8: 4.5, -7: 4.0}
    assert lr_transfer.lowest(edge) is None and math.isnan(lr_transfer.excess(edge, -7.0))
