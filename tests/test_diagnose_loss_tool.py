"""The commands of the loss doctor: exit statuses, and the faults that `initial` and `chain` find in a model or its data."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch

from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.data.batches import Batch, TrainData
from pretrain.doctor.untrained import initial_problem, label_problem, uneven_problems
from pretrain.engines.start import start_engine
from pretrain.model.transformer import LossOutput, Transformer
from pretrain.optim.optimizer import build_optimizer
from pretrain.run import command_line
from tests.saving import save
from tools import diagnose_loss as tool

ROOT = Path(__file__).resolve().parents[1]
STORY = "Epoch:[1/2](100/442) loss:213.776 lr:0.000500000000 epoch_Time:12.0min:\n"
TINY = """
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, vocab_size: 300}
data: {synthetic: {kind: markov}, sequence_length: 32}
batch: {global_batch_size: 8, micro_batch_size: 2}
train: {max_steps: 4}
"""


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the program as a shell would: (exit status, standard output and error with line breaks as spaces)."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["diagnose_loss.py", *map(str, arguments)])
        status = command_line.run(tool.main)
        shown = capsys.readouterr()
        return status, " ".join((shown.out + shown.err).split())

    return run


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path / "tiny.yaml"


@pytest.fixture
def parts(config):
    return tool.open_settings(["--config", str(config)])[1]


# ---------------------------------------------------------------- log


def test_a_loss_of_213_on_standard_input_is_explained_without_torch():
    code = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""
    flags = ["log", "-", "--vocab-size", "6400", "--accumulation", "25"]
    command = [sys.executable, "-c", code, str(ROOT / "tools" / "diagnose_loss.py"), *flags]
    done = subprocess.run(command, input=STORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "FOUND scale, very likely: 213.8 / 25 = 8.55, and ln(6400) = 8.76" in " ".join(done.stdout.split())


def test_a_clean_log_has_status_0_and_unusable_input_status_2(tmp_path, run):
    (tmp_path / "log").write_text("".join(f"step {i} loss {8.8 - i / 30:.3f}\n" for i in range(60)))
    status, text = run("log", tmp_path / "log", "--vocab-size", 6400)
    assert status == 0 and "FOUND" not in text and "60 losses" in text
    status, text = run("log", tmp_path / "missing")
    assert status == 2 and "missing" in text
    for wrong in (["--vocab-size", "0"], ["--vocab-size", "1"], ["--vocab-size", "6400.5"], ["--vocabulary", "6400"], []):
        with pytest.raises(SystemExit) as end:
            run("log", *([tmp_path / "log"] if wrong else []), *wrong)
        assert end.value.code == 2


def test_findings_come_before_notes_and_the_gravest_is_first(tmp_path, run):
    losses = [8 * (9.2 - i / 100) for i in range(100)]
    losses[80:] = [math.nan] * 20
    (tmp_path / "log").write_text("".join(f"step {i} loss {x:.3f}\n" for i, x in enumerate(losses)))
    status, text = run("log", tmp_path / "log", "--vocab-size", 10000, "--accumulation", 8)
    assert status == 1 and 0 < text.index("FOUND nan") < text.index("FOUND scale") < text.index("note:")
    assert "nothing" not in text.rpartition("note:")[2]


def test_what_is_merely_possible_is_shown_with_status_0(tmp_path, run):
    losses = [8.8 - i / 100 for i in range(300)]
    losses[200] += 2
    (tmp_path / "log").write_text("".join(f"step {10 * i} loss {x:.3f}\n" for i, x in enumerate(losses)))
    status, text = run("log", tmp_path / "log", "--vocab-size", 6400)
    assert status == 0 and "FOUND spike, possible" in text and "step 2000" in text and text.endswith("nothing else wrong found")


def test_a_log_that_does_not_suffice_is_not_called_right(tmp_path, run):
    (tmp_path / "log").write_text("step 1 loss 8.8\nstep 2 loss 8.7\n")
    status, text = run("log", tmp_path / "log")
    assert status == 0 and "not decided" in text and "--vocab-size" in text.rpartition("not decided")[2]
    assert "nothing wrong found" not in text


def test_the_plot_shows_the_shown_and_the_true_curve_and_lies_beside_the_log(tmp_path, run):
    lines = [f"iter {i}: loss {25 * (8.8 - i / 300):.3f}, time 9ms" for i in range(0, 900, 10)]
    lines[50] = "iter 500: loss nan, time 9ms"
    (tmp_path / "train.log").write_text("\n".join(lines))
    status, text = run("log", tmp_path / "train.log", "--vocab-size", 6400, "--accumulation", 25, "--plot")
    assert status == 1 and text.endswith("train.log.png")
    two_panels = matplotlib.image.imread(tmp_path / "train.log.png")
    run("log", tmp_path / "train.log", "--plot", tmp_path / "other.png", "--vocab-size", 10**9)
    assert two_panels.shape[0] > 1.5 * two_panels.shape[1] / 2.6
    alarm = np.array((0xC0, 0x00, 0x00)) / 255
    rows = np.flatnonzero(np.all(np.abs(two_panels[..., :3] - alarm) < 0.02, axis=2).any(axis=1))
    assert np.ptp(rows) > two_panels.shape[0] / 3, "the loss that is not finite is marked in both panels"
    assert (tmp_path / "other.png").stat().st_size > 10_000 and not list(tmp_path.glob("*.tmp"))


# ---------------------------------------------------------------- initial


def test_an_untrained_model_on_good_data_has_no_findings(config, run):
    status, text = run("initial", "--config", config, "--samples", 6)
    assert status == 0 and "FOUND" not in text
    assert "ln(300) = 5.7038" in text and "positions 28 to 31" in text and "source synthetic-markov" in text


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("initial", "--model.hiden_size", 3), ("model.hiden_size", "hidden_size")),
        (("chain", "--ranks", 3), ("batch.global_batch_size",)),
        (("initial", "--model.hidden_size", 2**20, "--model.num_attention_heads", 2**14), ("GiB", "num_hidden_layers")),
    ],
)
def test_unusable_settings_are_refused_by_name(config, run, flags, named):
    status, text = run(*flags, "--config", config)
    assert status == 2 and all(word in text for word in named)


def findings(parts, batch: Batch | None = None, model: Transformer | None = None) -> str:
    batch = parts.data.take(0, 8) if batch is None else batch
    model = tool.build_model(parts.model, 1234) if model is None else model
    _, problems = tool.initial_findings(model, parts.model, batch, ["a"] * 4 + ["b"] * 4)
    return "; ".join(problems)


def test_initial_finds_a_head_with_too_large_weights(parts):
    model = tool.build_model(parts.model, 1234)
    model.lm_head.weight.data *= 8
    assert "initial weights are too large" in findings(parts, model=model)


@pytest.mark.parametrize(("shift", "words"), [(0, "not shifted"), (2, "shifted twice"), (-1, "the token before")])
def test_initial_finds_labels_with_a_wrong_shift(parts, shift, words):
    tokens_BT = parts.data.take(0, 8).tokens_BT
    labels_BT = torch.full_like(tokens_BT, -100)
    first, last = max(0, -shift), min(32, 32 - shift)
    labels_BT[:, first:last] = tokens_BT[:, first + shift : last + shift]
    assert words in findings(parts, Batch(tokens_BT, labels_BT))


def test_initial_finds_labels_of_another_sample_and_labels_that_are_all_masked(parts):
    batch = parts.data.take(0, 8)
    assert "% of the labels" in findings(parts, batch._replace(labels_BT=batch.labels_BT.roll(1, 0)))
    assert "every label is masked" in findings(parts, batch._replace(labels_BT=torch.full_like(batch.labels_BT, -100)))


@pytest.mark.parametrize("change", ["input", "label", "negative", "masked"])
def test_data_without_a_loss_is_named_and_ends_without_a_traceback(config, run, monkeypatch, change):
    right = TrainData.take

    def take(self, position, count):
        batch = right(self, position, count)
        if change == "masked":
            batch.labels_BT[:] = -100
        else:
            column = batch.labels_BT if change == "label" else batch.tokens_BT
            column[1, 5] = -7 if change == "negative" else 300
        return batch

    monkeypatch.setattr(TrainData, "take", take)
    words = {"input": "is 300, at position 5 of sample 1", "label": "is 300", "negative": "is -7", "masked": "label"}[change]
    for command in ("initial", "chain"):
        status, text = run(command, "--config", config)
        assert status == 1 and "FOUND" in text and words in text and "the model was not run" in text


@pytest.mark.parametrize(("kind", "words"), [("uniform", "stays at ln(300) = 5.7038"), ("markov", "fall to 1.2130 nats")])
def test_generated_data_is_said_to_be_generated_with_the_loss_that_training_can_reach(config, run, kind, words):
    for command in ("initial", "chain"):
        status, text = run(command, "--config", config, "--data.synthetic.kind", kind)
        assert status == 0 and f"synthetic-{kind} is generated" in text and words in text


def test_random_ids_in_a_token_file_are_found(config, tmp_path, run):
    np.random.default_rng(1).integers(0, 300, 40_000).astype(np.uint16).tofile(tmp_path / "dummy.bin")
    text = TINY.replace("synthetic: {kind: markov}", f"train: [{{path: {tmp_path / 'dummy.bin'}}}], document_mask: false")
    config.write_text(text)
    status, shown = run("initial", "--config", config)
    assert status == 1 and "tokens-random" in shown and "cannot fall below 5.7" in shown


def test_groups_of_tokens_that_differ_beyond_chance_are_named():
    nats = {"a": 5.7, "b": 5.71, "c": 6.4}
    (problem,) = uneven_problems("source", nats, dict.fromkeys("abc", 0.02), 300)
    assert problem.startswith("source c: 6.400 nats")
    assert uneven_problems("source", nats, dict.fromkeys("abc", 0.2), 300) == []
    assert uneven_problems("source", nats | {"c": 5.75}, dict.fromkeys("abc", 0.001), 300) == []


@pytest.mark.parametrize(
    ("loss", "rows", "logit_std", "words"),
    [
        (math.log(300) * 1.02, 320, 0.3, None),
        (math.log(512), 512, 0.1, "padded ids"),
        (5.7 + 3.2, 320, 2.5, "initial weights are too large"),
        (2.0, 320, 0.4, "the model knows something"),
        (9.0, 320, 0.4, "suspect the labels"),
    ],
)
def test_the_cause_of_a_wrong_start_is_named(loss, rows, logit_std, words):
    problem = initial_problem(loss, 300, rows, logit_std)
    assert problem is None if words is None else words in problem


def test_labels_of_repeated_tokens_raise_no_alarm():
    tokens_BT = np.full((2, 9), 7)
    assert label_problem(tokens_BT, tokens_BT) is None


# ---------------------------------------------------------------- chain


def test_the_chain_checks_every_stage_and_ends_at_the_trainers_number(config, run):
    status, text = run("chain", "--config", config, "--ranks", 2)
    assert status == 0, text
    stages = ("tokenizer", "labels", "mask", "logits", "sum", "mean", "accumulation, ranks", "shown")
    assert all(f"{number}. {stage} " in text for number, stage in enumerate(stages, start=1))
    assert "256 labels" in text and "2 ranks x 2 micro-batches" in text and "scaled by 2 / 256" in text
    status, text = run("chain", "--config", config, "--micro-batches", 2)
    assert status == 0 and "2 of 4 micro-batches" in text and "accumulation, ranks" not in text


def test_the_chain_shows_ranks_that_share_sequences_as_one_and_counts_their_tokens_once(config, run):
    config.write_text(TINY + "engine: {parallel: {sequence: 2, tensor: 2}}\n")
    text = run("chain", "--config", config, "--ranks", 8)[1]
    assert "ranks 0 to 3 together:" in text and "ranks 4 to 7 together:" in text and "256 labels" in text
    assert "2 groups of 4 ranks x 2 micro-batches" in text and "scaled by 4 / 256" in text
    assert "1 group of 4 ranks x 4 micro-batches" in run("chain", "--config", config)[1]  # as few as the settings allow


def test_a_checkpoint_that_learned_nothing_is_found_and_a_folder_without_one_is_refused(config, parts, tmp_path, run):
    engine = start_engine(EngineConfig(precision="fp32"))
    engine.prepare(lambda: Transformer(parts.model), lambda model: build_optimizer(model, OptimizerConfig()), 0.0, 1)
    saved = save(tmp_path / "checkpoints", 1, engine, {"model": {}})
    engine.close()
    status, text = run("chain", "--config", config, "--checkpoint", saved.path)
    assert status == 1 and "FOUND: mean: the checkpoint's loss" in text
    status, text = run("chain", "--config", config, "--checkpoint", tmp_path)
    assert status == 2 and text.startswith("diagnose_loss: ")


def test_a_trainer_that_scales_loss_or_gradient_wrongly_is_found(config, monkeypatch, run):
    from pretrain import train

    right = train.train_step

    def multiplied(engine, window, lr):
        result = right(engine, window, lr)
        return result._replace(loss_sum=result.loss_sum * len(window))

    monkeypatch.setattr(train, "train_step", multiplied)
    status, text = run("chain", "--config", config)
    assert status == 1 and "FOUND: shown: the trainer's loss is" in text and "4 times that" in text

    def only_the_last(engine, window, lr):
        return right(engine, window, 0.0)._replace(grad_norm=right(engine, window[-1:], 0.0).grad_norm)

    monkeypatch.setattr(train, "train_step", only_the_last)
    status, text = run("chain", "--config", config)
    assert status == 1 and "FOUND: shown: the trainer's gradient norm is" in text


class Leaky(torch.nn.Module):
    """A model whose positions see the mean of all tokens, and whose loss counts padded ids."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(320, 300, _weight=torch.randn(320, 300))

    def forward(self, tokens_BT, labels_BT=None, documents_BT=None):
        hidden_BTV = self.embed(tokens_BT) + self.embed(tokens_BT).mean(1, keepdim=True)
        if labels_BT is None:
            return hidden_BTV
        padded = torch.nn.functional.pad(hidden_BTV, (0, 20))
        nats = torch.nn.functional.cross_entropy(padded.flatten(0, 1), labels_BT.flatten(), reduction="sum")
        return LossOutput(nats, nats.detach(), None)


def test_attention_that_looks_ahead_and_a_loss_over_padded_ids_are_found(parts):
    batch, model = parts.data.take(0, 4), Leaky()
    _, problems = tool.logit_stage(model, parts.model, batch)
    assert len(problems) == 1 and "not causal" in problems[0]
    _, problems = tool.sum_stage(model, [batch], [tool.own_sum(model, batch)])
    assert "from its logits" in problems[0]


def test_ids_out_of_range_an_empty_micro_batch_and_a_lossy_tokenizer_are_found(parts):
    batch = parts.data.take(0, 4)
    tokens_BT = batch.tokens_BT.clone()
    tokens_BT[1, 5] = 300
    _, problems = tool.label_stage(parts, batch._replace(tokens_BT=tokens_BT))
    assert any("1 of 128 input ids are outside" in problem and "position 5 of sample 1" in problem for problem in problems)
    labels_BT = batch.labels_BT.clone()
    labels_BT[2:] = -100
    _, problems = tool.mask_stage(tool.split(batch._replace(labels_BT=labels_BT), 2))
    assert problems == ["micro-batch 1 has no label that counts"]
    lossy = SimpleNamespace(vocab_size=512, encode=lambda text: [1, 2], decode=lambda ids: f"{len(ids)} ids")
    _, problems = tool.tokenizer_stage("lossy", parts._replace(tokenizer=lossy), batch)
    assert "does not give back" in problems[0] and "has 512 ids, the model 300" in problems[1]
