"""A set has one validation loss, for any number of ranks, kind of parallelism and micro-batch size; partial batches count."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain.config import DataConfig, EngineConfig, OptimizerConfig, ParallelConfig, SourceConfig
from pretrain.data.batches import open_valid
from pretrain.engines.start import start_engine
from pretrain.evaluate import evaluate, score
from pretrain.interop.load import open_run
from pretrain.interop.weights import load_transformer
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.model.transformer import Transformer, build
from pretrain.optim.optimizer import build_optimizer
from tests.models import train_here
from tests.ranks import run_ranks

LENGTH, VOCAB = 8, 40
SIZES = {"a": 8 * 11 + 4, "b": 8 * 3 + 1}  # tokens: `a` ends in a window of 3 labels, `b` in a full one
MODEL = resolve_model(
    ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=4), vocab_size=VOCAB, sequence_length=LENGTH
)

ALONE = EngineConfig(name="ddp")
SEQUENCE = EngineConfig(name="ddp", parallel=ParallelConfig(sequence=2))
TENSOR = EngineConfig(name="fsdp2", parallel=ParallelConfig(tensor=2))
BOTH = EngineConfig(name="ddp", parallel=ParallelConfig(sequence=2, tensor=2))


@pytest.fixture
def folder(tmp_path) -> Path:
    for seed, (name, size) in enumerate(SIZES.items()):
        np.random.default_rng(seed).integers(0, VOCAB, size).astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    return tmp_path


def sets_of(folder: Path):
    data = DataConfig(valid=[SourceConfig(path=str(folder / f"{name}.bin")) for name in SIZES], sequence_length=LENGTH)
    return open_valid(data, seed=0, vocab_size=VOCAB, tokenizer_fingerprint=None)


def evaluate_here(
    folder: Path, micro_batch_size: int, max_samples: int | None, config: EngineConfig = ALONE
) -> dict[str, float]:
    engine = start_engine(config)
    engine.prepare(lambda: Transformer(MODEL), lambda model: build_optimizer(model, OptimizerConfig()), 1.0, seed=0)
    figures = evaluate(engine, sets_of(folder), micro_batch_size, max_samples)
    assert engine.model.training
    engine.close()
    return figures


def plain_losses(folder: Path) -> dict[str, tuple[float, int]]:
    """(nats, labels) per set, window by window, without batches, masks or an engine."""
    model, sums = build(MODEL, "cpu", seed=0), {}
    for name in SIZES:
        tokens = torch.from_numpy(np.fromfile(folder / f"{name}.bin", np.uint16).astype(np.int64))
        nats, labels = 0.0, 0
        for start in range(0, len(tokens) - 1, LENGTH):
            window = tokens[start : start + LENGTH + 1]
            nats += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
            labels += len(window) - 1
        sums[name] = nats, labels
    return sums


@pytest.mark.parametrize(
    ("ranks", "micro_batch_size", "config"),
    [
        (1, 1, ALONE),
        (1, 5, ALONE),
        (1, 64, ALONE),
        (2, 3, ALONE),
        (4, 2, ALONE),
        (2, 3, SEQUENCE),
        (2, 3, TENSOR),
        pytest.param(4, 5, BOTH, marks=pytest.mark.slow),
        pytest.param(4, 2, SEQUENCE, marks=pytest.mark.slow),
    ],
)
def test_every_label_of_every_set_counts_once(folder, ranks, micro_batch_size, config):
    plain = plain_losses(folder)
    assert {name: labels for name, (_, labels) in plain.items()} == {name: size - 1 for name, size in SIZES.items()}
    total = sum(nats for nats, _ in plain.values()) / sum(labels for _, labels in plain.values())
    for figures in run_ranks(ranks, evaluate_here, folder, micro_batch_size, None, config):
        assert figures["val_loss"] == pytest.approx(total, rel=1e-6)
        assert figures["val_perplexity"] == pytest.approx(math.exp(total), rel=1e-5)
        for name, (nats, labels) in plain.items():
            assert figures[f"val_loss/{name}.bin"] == pytest.approx(nats / labels, rel=1e-6)
        assert "val_bits_per_byte" not in figures  # flat .bin files do not say how long the text was


def test_a_limit_selects_the_same_samples_for_any_micro_batch(folder):
    few = {size: evaluate_here(folder, size, 4)["val_loss"] for size in (1, 2, 4, 7)}
    assert max(few.values()) == pytest.approx(min(few.values()), rel=1e-6)
    assert few[1] != pytest.approx(evaluate_here(folder, 4, None)["val_loss"], rel=1e-6)


def test_a_validation_waits_for_the_device_for_the_flags_and_once_at_its_end(folder, monkeypatch):
    """On the meta device, where a read of a tensor raises. What goes there does so by `upload` and `to_device`."""
    engine = start_engine(EngineConfig(name="ddp"))
    engine.prepare(lambda: Transformer(MODEL), lambda model: build_optimizer(model, OptimizerConfig()), 1.0, seed=0)
    engine.device = torch.device("meta")
    engine.model.to("meta")
    engine.autocast = contextlib.nullcontext  # knows no meta device
    flags, sums, make = [], [], torch.tensor
    engine.copy_to_host = lambda values: flags.append(values) or (lambda: [0])
    engine.all_reduce = lambda values: (
        values if values.dtype == torch.int64 else sums.append(values) or torch.ones(values.shape)
    )

    def make_on_the_host(*args, device="cpu", **options):
        assert device == "cpu", "copies from pageable memory, and waits"
        return make(*args, **options)

    monkeypatch.setattr(torch, "tensor", make_on_the_host)
    evaluate(engine, sets_of(folder), 2, None, lambda: [0])
    assert len(sums) == 1 and len(flags) == 6 + 2  # 12 and 4 samples; in rounds of 2


# ---------------------------------------------------------------- which weights


def weights_of(run: Path, step: int, last: bool) -> torch.Tensor:
    """All weights, (N,) float64."""
    model = load_transformer(open_run(run, step, last_weights=last).weights)
    return torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()])


def test_validation_and_tools_read_the_average_of_the_weights_which_begins_at_those_of_an_older_checkpoint(tiny):
    run = Path(tiny[-1]) / "tiny"
    every = ["--checkpoint.every_steps", "1", "--checkpoint.keep_last", "9", "--evaluate.every_steps", "1"]
    flags = [
        "--optimizer.name",
        "muon",
        "--schedule.name",
        "constant",
        "--schedule.warmup_steps",
        "1",
        "--run.seed",
        "0",
        *every,
        *tiny,
    ]
    assert train_here(["--train.max_steps", "2", *flags]) == 0
    added = ["--optimizer.average_decay", "0.9", "--optimizer.row_beta", "0.95"]
    changes = "[train.max_steps, optimizer.average_decay, optimizer.row_beta]"
    assert train_here(["--train.max_steps", "4", "--checkpoint.allow_changes", changes, *added, *flags]) == 0
    w2, w3, w4 = (weights_of(run, step, last=True) for step in (2, 3, 4))
    after_3 = w2 + 10 / 12 * (w3 - w2)  # after n updates, the next one has a share of 10 / (n + 10)
    after_4 = after_3 + 10 / 13 * (w4 - after_3)
    for step, expected in ((3, after_3), (4, after_4)):
        torch.testing.assert_close(weights_of(run, step, last=False), expected, atol=1e-6, rtol=0)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validations = {record["step"]: record for record in records if "val_loss" in record}
    assert [validations[step].get("val_weights") for step in (1, 2, 3, 4)] == [None, None, "average", "average"]
    found = []
    for last in (False, True):
        trained, engine = open_run(run, last_weights=last), start_engine(EngineConfig(name="ddp", precision="fp32"))
        found.append(score(engine, trained, trained.config.data, 2, max_samples=16)[0]["loss"])
        engine.close()
        assert trained.origin.get("weights") == (None if last else "average")
    assert found[0] == pytest.approx(validations[4]["val_loss"], rel=1e-6) and abs(found[1] / found[0] - 1) > 1e-6
