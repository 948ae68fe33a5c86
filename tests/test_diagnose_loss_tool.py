"""The loss doctor's commands: exit statuses, words, and the faults that `initial` and `chain` find in a model or its data."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch

from pretrain.checkpoint import storage
from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.data.batches import Batch
from pretrain.doctor.untrained import initial_problem, label_problem, uneven_problems
from pretrain.engines.start import start_engine
from pretrain.model.transformer import LossOutput, Transformer
from pretrain.optim.optimizer import build_optimizer

ROOT = Path(__file__).resolve().parents[1]
STORY = "Epoch:[1/2](100/442) loss:213.776 lr:0.000500000000 epoch_Time:12.0min:\n"
TINY = """
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, vocab_size: 300}
data: {synthetic: {kind: markov}, sequence_length: 32}
batch: {global_batch_size: 8, micro_batch_size: 2}
train: {max_steps: 4}
"""


def load_tool():
    spec = importlib.util.spec_from_file_location("diagnose_loss_tool", ROOT / "tools" / "diagnose_loss.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def run(capsys, *arguments) -> tuple[int, str]:
    """(exit status, standard output and error with line breaks as spaces)."""
    status = tool.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return status, " ".join((shown.out + shown.err).split())


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path / "tiny.yaml"


@pytest.fixture
def parts(config):
    return tool.open_parts(["--config", str(config)])


# ---------------------------------------------------------------- log


def test_the_first_story_as_a_user_runs_it_without_torch(tmp_path):
    (tmp_path / "train.log").write_text(STORY)
    code = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""
    command = [sys.executable, "-c", code, str(ROOT / "tools" / "diagnose_loss.py"), "log", "train.log"]
    done = subprocess.run(
        [*command, "--vocab-size", "6400", "--accumulation", "25"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    said = " ".join(done.stdout.split())
    assert (
        "213.8 / 25 = 8.55, and ln(6400) = 8.76: the shown loss is multiplied by 25, very likely the accumulation steps" in said
    )


def test_a_clean_log_is_status_0_and_what_cannot_be_read_is_status_2(tmp_path, capsys):
    (tmp_path / "log").write_text("".join(f"step {i} loss {8.8 - i / 30:.3f}\n" for i in range(60)))
    status, said = run(capsys, "log", tmp_path / "log", "--vocab-size", 6400)
    assert status == 0 and "nothing wrong found" in said and "60 losses" in said
    status, said = run(capsys, "log", tmp_path / "missing")
    assert status == 2 and "error:" in said and "missing" in said
    for wrong in (["--vocab-size", "0"], ["--vocab-size", "1"], ["--vocab-size", "6400.5"], ["--vocabulary", "6400"], []):
        with pytest.raises(SystemExit) as end:
            tool.main(["log", *([str(tmp_path / "log")] if wrong else []), *wrong])
        assert end.value.code == 2


def test_the_plot_shows_both_curves_and_stands_beside_the_log(tmp_path, capsys):
    lines = [f"iter {i}: loss {25 * (8.8 - i / 300):.3f}, time 9ms" for i in range(0, 900, 10)]
    lines[50] = "iter 500: loss nan, time 9ms"
    (tmp_path / "train.log").write_text("\n".join(lines))
    status, said = run(capsys, "log", tmp_path / "train.log", "--vocab-size", 6400, "--accumulation", 25, "--plot")
    picture = matplotlib.image.imread(tmp_path / "train.log.png")[..., :3]
    assert status == 1 and said.endswith("train.log.png")
    for color in ((0x8A, 0x8A, 0x8A), (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0xC0, 0x00, 0x00)):
        assert np.all(np.abs(picture - np.array(color) / 255) < 0.02, axis=2).any(), f"nothing is drawn in {color}"
    run(capsys, "log", tmp_path / "train.log", "--plot", tmp_path / "other.png")
    assert (tmp_path / "other.png").stat().st_size > 10_000 and not list(tmp_path.glob("*.tmp"))


# ---------------------------------------------------------------- initial


def test_an_untrained_model_on_good_data_is_in_order(config, capsys):
    status, said = run(capsys, "initial", "--config", config, "--samples", 6)
    assert status == 0 and "nothing wrong found" in said
    assert "ln(300) = 5.7038" in said and "positions 28 to 31" in said and "source synthetic-markov" in said


def test_settings_that_are_wrong_are_refused_in_words(config, capsys):
    status, said = run(capsys, "initial", "--config", config, "--model.hiden_size", 3)
    assert status == 2 and "model.hiden_size" in said and "hidden_size" in said
    status, said = run(capsys, "chain", "--config", config, "--ranks", 3)
    assert status == 2 and "batch.global_batch_size" in said
    status, said = run(
        capsys, "initial", "--config", config, "--model.hidden_size", 2**20, "--model.num_attention_heads", 2**14
    )
    assert status == 2 and "GiB in fp32" in said and "num_hidden_layers" in said


def findings(parts, batch: Batch | None = None, model: Transformer | None = None) -> str:
    batch = parts.data.take(0, 8) if batch is None else batch
    model = tool.build_model(parts) if model is None else model
    _, problems = tool.initial_findings(model, parts.model, batch, ["a"] * 4 + ["b"] * 4)
    return "; ".join(problems)


def test_initial_names_a_head_with_too_large_weights(parts):
    model = tool.build_model(parts)
    model.lm_head.weight.data *= 8
    assert "the head's initial weights are too large" in findings(parts, model=model)


@pytest.mark.parametrize(("shift", "words"), [(0, "not shifted"), (2, "shifted twice"), (-1, "the token before")])
def test_initial_names_labels_with_a_wrong_shift(parts, shift, words):
    tokens_BT = parts.data.take(0, 8).tokens_BT
    labels_BT = torch.full_like(tokens_BT, -100)
    first, last = max(0, -shift), min(32, 32 - shift)
    labels_BT[:, first:last] = tokens_BT[:, first + shift : last + shift]
    assert words in findings(parts, Batch(tokens_BT, labels_BT))


def test_initial_names_labels_of_another_sample_and_labels_that_are_all_masked(parts):
    batch = parts.data.take(0, 8)
    assert "of the labels are the token after their input" in findings(
        parts, batch._replace(labels_BT=batch.labels_BT.roll(1, 0))
    )
    assert (
        findings(parts, batch._replace(labels_BT=torch.full_like(batch.labels_BT, -100)))
        == "every label is masked: there is no loss"
    )


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
        (math.log(512), 512, 0.1, "padded ids take part"),
        (5.7 + 3.2, 320, 2.5, "initial weights are too large"),
        (2.0, 320, 0.4, "the model knows something of its labels"),
        (9.0, 320, 0.4, "suspect the labels, the mask or the vocabulary"),
    ],
)
def test_the_cause_of_a_wrong_start(loss, rows, logit_std, words):
    said = initial_problem(loss, 300, rows, logit_std)
    assert said is None if words is None else words in said


def test_labels_of_repeated_tokens_are_no_alarm():
    tokens_BT = np.full((2, 9), 7)
    assert label_problem(tokens_BT, tokens_BT) is None


# ---------------------------------------------------------------- chain


def test_the_chain_walks_every_stage_and_ends_at_the_trainers_number(config, capsys):
    status, said = run(capsys, "chain", "--config", config, "--ranks", 2)
    assert status == 0 and said.endswith("nothing wrong found"), said
    for stage in (
        "1. tokenizer",
        "2. labels",
        "3. mask",
        "4. logits",
        "5. sum",
        "6. mean",
        "7. accumulation, ranks",
        "8. shown",
    ):
        assert stage in said
    assert "256 labels" in said and "2 ranks x 2 micro-batches" in said and "scaled by 2 / 256" in said


def test_the_chain_says_when_it_runs_only_a_part(config, capsys):
    status, said = run(capsys, "chain", "--config", config, "--micro-batches", 2)
    assert status == 0 and "2 of 4 micro-batches were run" in said


def test_a_checkpoint_that_learned_nothing_is_found_and_one_that_is_none_is_refused(config, parts, tmp_path, capsys):
    engine = start_engine(EngineConfig(precision="fp32"))
    engine.prepare(lambda: Transformer(parts.model), lambda model: build_optimizer(model, OptimizerConfig()), 0.0, 1)
    saved = storage.save(tmp_path / "checkpoints", 1, engine, {"model": {}})
    engine.close()
    status, said = run(capsys, "chain", "--config", config, "--checkpoint", saved.path)
    assert status == 1 and "is not below ln(300): nothing was learned" in said
    status, said = run(capsys, "chain", "--config", config, "--checkpoint", tmp_path)
    assert status == 2 and "error:" in said


def test_a_trainer_that_scales_wrongly_is_found(config, monkeypatch, capsys):
    from pretrain import train

    right = train.train_step

    def multiplied(engine, window, lr, requests):
        result = right(engine, window, lr, requests)
        return result._replace(loss_sum=result.loss_sum * len(window))

    monkeypatch.setattr(train, "train_step", multiplied)
    status, said = run(capsys, "chain", "--config", config)
    assert status == 1 and "the trainer's loss is" in said and "4 times that" in said

    def only_the_last(engine, window, lr, requests):
        whole = right(engine, window, 0.0, requests)
        return whole._replace(grad_norm=right(engine, window[-1:], 0.0, requests).grad_norm)

    monkeypatch.setattr(train, "train_step", only_the_last)
    status, said = run(capsys, "chain", "--config", config)
    assert status == 1 and "the trainer's gradient norm is" in said


class Leaky(torch.nn.Module):
    """Every position sees the mean of all tokens; its loss counts padded ids."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(320, 300, _weight=torch.randn(320, 300))

    def forward(self, tokens_BT, labels_BT=None, documents_BT=None):
        hidden_BTV = self.embed(tokens_BT) + self.embed(tokens_BT).mean(1, keepdim=True)
        if labels_BT is None:
            return hidden_BTV
        padded = torch.nn.functional.pad(hidden_BTV, (0, 20))
        nats = torch.nn.functional.cross_entropy(padded.flatten(0, 1), labels_BT.flatten(), reduction="sum")
        return LossOutput(nats, None)


def test_attention_that_looks_ahead_and_a_loss_over_padded_ids_are_found(parts):
    batch, model = parts.data.take(0, 4), Leaky()
    _, problems = tool.logit_stage(model, parts.model, batch)
    assert problems == ["positions see the tokens after them: the attention is not causal"]
    _, problems = tool.sum_stage(model, [batch], [tool.own_sum(model, batch)])
    assert "is not that of its logits" in problems[0]


def test_ids_out_of_range_an_empty_micro_batch_and_a_lossy_tokenizer_are_found(parts):
    batch = parts.data.take(0, 4)
    tokens_BT = batch.tokens_BT.clone()
    tokens_BT[1, 5] = 300
    _, problems = tool.label_stage(parts, batch._replace(tokens_BT=tokens_BT))
    assert any("ids reach from" in problem and "to 300" in problem for problem in problems)
    labels_BT = batch.labels_BT.clone()
    labels_BT[2:] = -100
    _, problems = tool.mask_stage(tool.split(batch._replace(labels_BT=labels_BT), 2))
    assert problems == ["micro-batch 1 has no label that counts"]
    parts.tokenizer = SimpleNamespace(vocab_size=512, encode=lambda text: [1, 2], decode=lambda ids: f"{len(ids)} ids")
    _, problems = tool.tokenizer_stage(parts, batch)
    assert "does not give back what it encodes" in problems[0] and "has 512 ids, the model 300" in problems[1]
