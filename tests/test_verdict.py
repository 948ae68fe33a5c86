"""Each kind of curve gets the right verdict: synthetic curves with various amounts of noise, and curves of short real runs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain import train as training
from pretrain.config import load
from pretrain.data.batches import Batch, TrainData
from pretrain.doctor.untrained import first_step
from pretrain.doctor.verdict import Curve, judge, reference_lines
from tests.test_indexed import write

RANDOM = dict.fromkeys(("uniform", "unigram", "bigram", "floor"), math.log(10000))
RANDOM_FILE = dict.fromkeys(("uniform", "unigram", "bigram"), math.log(10000))
TEXT = {"uniform": 8.3, "unigram": 6.5, "bigram": 4.2}
SHUFFLED = {"uniform": 8.3, "unigram": 6.5, "bigram": 6.48}
COPY = {"uniform": 4.16, "unigram": 4.16, "bigram": 4.16, "floor": 2.0}
MARKOV = {"uniform": 4.16, "unigram": 4.16, "bigram": 1.21, "floor": 1.21}


def test_the_first_loss_is_compared_with_ln_of_the_vocabulary():
    assert first_step(8.77, 6400).endswith("ln(6400) = 8.764; OK")
    assert first_step(4.288, 64).endswith("OK"), "for few ids chance adds a larger share of ln V"
    assert "24.39 times that" in first_step(213.776, 6400)
    assert "0.95 times that" in first_step(8.31, 6400)


def test_equal_reference_losses_are_shown_once():
    assert len(reference_lines(RANDOM)) == 2
    assert [line.split()[0] for line in reference_lines(TEXT)] == ["8.300", "6.500", "4.200"]


def test_a_curve_is_judged_even_if_only_ln_v_is_known():
    steps = 10 * np.arange(1, 61)
    for low in (3.0, 0.0, -0.1):  # loggers write 0 for NaN
        nothing = np.zeros(0)
        assert judge(Curve(steps, np.linspace(8.3, low, 60), nothing, nothing), {"uniform": 8.3}).kind == "falling"


# ---------------------------------------------------------------- synthetic curves


def curve(begin: float, end: float, *, tau: float = 0.1, noise: float = 0.01, n: int = 60, val=(), passes=0.5, seed=0) -> Curve:
    """Exponential from `begin` to `end`; tau: time constant as a share of the run."""
    step = 10 * np.arange(1, n + 1)
    loss = end + (begin - end) * np.exp(-np.arange(n) / n / tau) + np.random.default_rng(seed).normal(0, noise, n)
    val_step = np.linspace(0, step[-1], len(val) + 1)[1:]
    return Curve(step.astype(float), loss, val_step, np.array(val, dtype=float), passes)


CASES = {
    "random data": (curve(9.29, 9.21), RANDOM, "random"),
    "random data in a file": (curve(9.29, 9.21), RANDOM_FILE, "random"),
    "random data, memorised": (curve(9.29, 4.0, val=(9.3, 9.5, 9.9, 10.4), passes=20), RANDOM_FILE, "memorising"),
    "shuffled tokens": (curve(8.3, 6.5), SHUFFLED, "random"),
    "shuffled tokens, some memorised": (curve(6.6, 6.3, tau=1, val=(6.56, 6.54, 6.53, 6.53)), SHUFFLED, "random"),
    "random tokens, some memorised": (curve(9.3, 8.9, tau=1, val=(9.3, 9.25, 9.26, 9.28)), RANDOM_FILE, "random"),
    "labels of another sample": (curve(8.3, 6.5), TEXT, "unigram"),
    "labels of another sample, with validation": (curve(8.3, 6.5, noise=0.1, val=(6.62, 6.61, 6.62, 6.615)), TEXT, "unigram"),
    "random labels": (curve(8.4, 8.3), TEXT, "nothing"),
    "no learning rate": (curve(8.38, 8.38), TEXT, "nothing"),
    "diverged": (curve(8.3, 11.0), TEXT, "worse"),
    "above the frequencies": (curve(8.3, 7.2, tau=0.03), TEXT, "nothing"),
    "one token of context": (curve(8.3, 4.2, tau=0.05), TEXT, "bigram"),
    "still falling past the unigram entropy": (curve(8.3, 5.9, tau=0.6), TEXT, "falling"),
    "still falling towards it": (curve(8.3, 6.3, tau=0.4), TEXT, "falling"),
    "a good run": (curve(8.3, 3.0, tau=0.3, val=(5.0, 4.2, 3.8, 3.6)), TEXT, "falling"),
    "a good run at its end": (curve(8.3, 3.5, tau=0.05), TEXT, "level"),
    "validation somewhat higher, both falling": (curve(8.3, 3.6, tau=0.3, val=(5.6, 4.9, 4.5, 4.3)), TEXT, "falling"),
    "validation of another kind": (curve(8.3, 2.0, val=(5.0, 5.0, 5.0, 5.0, 5.1), tau=0.3), TEXT, "other-text"),
    "memorising": (curve(8.3, 1.0, tau=0.3, val=(5.0, 4.6, 4.8, 5.2, 5.8), passes=9), TEXT, "memorising"),
    "memorising, validation stays": (curve(8.3, 2.0, tau=0.3, val=(5.0, 4.6, 4.6, 4.6, 4.6), passes=9), TEXT, "memorising"),
    "memorising seen by one validation": (curve(8.3, 1.0, val=(5.8,), passes=9), TEXT, "memorising"),
    "all there is": (curve(4.2, 1.21, val=(1.3, 1.23, 1.22)), MARKOV, "learned"),
    "context from far back, not yet": (curve(4.2, 4.16), COPY, "nothing"),
    "context from far back, learned": (curve(4.2, 2.0, val=(3.0, 2.1, 2.01)), COPY, "learned"),
    "a short run": (curve(8.3, 6.5, n=5), TEXT, "short"),
    "too noisy to tell": (curve(8.3, 6.5, noise=0.6), TEXT, "level"),
    "nothing finite": (curve(math.nan, 1.0), TEXT, "short"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_curve_gets_its_verdict(name):
    made, lines, kind = CASES[name]
    found = judge(made, lines)
    assert found.kind == kind, found
    assert found.is_alarm == (kind in ("nothing", "worse", "unigram", "memorising"))


@pytest.mark.parametrize("noise", [0.001, 0.01, 0.03, 0.1, 0.3])
def test_a_falling_curve_is_never_called_stalled(noise):
    """240 curves per noise level, which pass every reference loss on their way."""
    for seed in range(40):
        generator = np.random.default_rng(seed)
        for end in np.linspace(2.5, 7.5, 6):
            made = curve(8.3, end, tau=generator.uniform(0.4, 2), noise=noise, n=int(generator.integers(10, 200)), seed=seed)
            assert judge(made, TEXT).kind in ("falling", "level", "short"), (seed, end, judge(made, TEXT))


@pytest.mark.parametrize("noise", [0.001, 0.01, 0.03])
def test_a_curve_that_stays_at_a_reference_loss_is_called_stalled(noise):
    for seed in range(40):
        for end, kind in ((8.3, "nothing"), (6.5, "unigram"), (4.2, "bigram")):
            n = int(np.random.default_rng(seed).integers(120, 400))
            assert judge(curve(8.35, end, tau=0.05, noise=noise, n=n, seed=seed), TEXT).kind == kind, (seed, end)


def test_verdicts_state_their_figures():
    text = judge(curve(8.3, 1.0, tau=0.3, val=(5.0, 4.6, 4.8, 5.2, 5.8), passes=9), TEXT).text
    assert "step 240, 4.600" in text and "(9 passes" in text
    assert "unigram entropy, 6.500" in judge(curve(8.3, 6.5), TEXT).text
    assert "bigram level 4.200" in judge(curve(8.3, 3.5), TEXT).text


# ---------------------------------------------------------------- curves of real runs

TINY = [
    *("--model.hidden_size", "64", "--model.num_hidden_layers", "2", "--model.num_attention_heads", "2"),
    *("--data.sequence_length", "32", "--batch.global_batch_size", "16", "--batch.micro_batch_size", "16"),
    *("--optimizer.name", "muon", "--optimizer.lr", "4e-3", "--schedule.name", "wsd", "--schedule.warmup_steps", "10"),
    *(
        "--log.every_steps",
        "5",
        "--log.sinks",
        "[console, jsonl]",
        "--evaluate.every_steps",
        "50",
        "--evaluate.max_batches",
        "2",
    ),
    *("--model.vocab_size", "64", "--train.max_steps", "200"),
]


def result(tmp_path: Path, capsys, *flags: str) -> tuple[str, list[str]]:
    """(the result line of a run, the alarms before it)."""
    assert training.train(load([*TINY, "--run.directory", str(tmp_path), *flags])) == 0
    lines = capsys.readouterr().out.splitlines()
    alarms = [line for line in lines if line.startswith("step ") and "nats per token" in line]
    return next(line for line in lines if line.startswith("result")), alarms


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "word", "alarm"),
    [
        ("uniform", "This data is random", None),
        ("unigram", "has learned all there is to learn", None),
        ("markov", "has learned all there is to learn", None),
        ("repeat", "it is memorising", "it is memorising"),
        ("copy", "has learned all there is to learn", None),
    ],
)
def test_each_kind_of_generated_data_gets_its_verdict(tmp_path, capsys, kind, word, alarm):
    steps = {"markov": "600", "copy": "600"}.get(kind, "200")
    text, alarms = result(tmp_path, capsys, "--data.synthetic.kind", kind, "--train.max_steps", steps)
    assert word in text, text
    assert len(alarms) == (alarm is not None) and all(alarm in each for each in alarms), alarms


def chain(count: int, seed: int) -> list[np.ndarray]:
    """Documents whose tokens have unequal frequencies and depend on the one before."""
    generator, follow = np.random.default_rng(seed), np.random.default_rng(0).zipf(1.6, (61, 4)) % 61 + 3
    made = []
    for _ in range(count):
        tokens = [3]
        for _ in range(60):
            tokens.append(int(follow[tokens[-1] - 3, generator.integers(4)]))
        made.append(np.array([*tokens, 2]))
    return made


def shuffled(batch: Batch, generator: torch.Generator) -> torch.Tensor:
    labels = batch.labels_BT.flatten()
    return labels[torch.randperm(len(labels), generator=generator)].view_as(batch.labels_BT)


def drawn(batch: Batch, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 64, batch.labels_BT.shape, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (None, "context is used"),
        (shuffled, "It stays at the unigram entropy"),
        (drawn, "It stays at ln(vocabulary): the labels carry no information"),
    ],
)
def test_real_runs_with_right_shuffled_and_random_labels_get_their_verdicts(tmp_path, capsys, monkeypatch, spoil, word):
    write(tmp_path / "text", chain(3000, 1), vocab_size=64)
    write(tmp_path / "valid", chain(60, 2), vocab_size=64)
    take = TrainData.take

    def spoiled(data: TrainData, position: int, count: int) -> Batch:
        batch = take(data, position, count)
        return batch._replace(labels_BT=spoil(batch, torch.Generator().manual_seed(position)))

    if spoil:
        monkeypatch.setattr(TrainData, "take", spoiled)
    flags = ["--data.train", f"[{{path: {tmp_path / 'text'}}}]", "--data.valid", f"[{{path: {tmp_path / 'valid'}}}]"]
    text, alarms = result(tmp_path, capsys, *flags)
    assert word in text, text
    assert (len(alarms) > 0) == (spoil is not None), alarms


@pytest.mark.slow
def test_random_tokens_and_few_texts_that_are_read_often_get_their_verdicts(tmp_path, capsys):
    generator = np.random.default_rng(0)
    write(tmp_path / "random", [np.append(generator.integers(3, 64, 200), 2) for _ in range(900)], vocab_size=64)
    text, alarms = result(tmp_path, capsys, "--data.train", f"[{{path: {tmp_path / 'random'}}}]")
    assert "The data is random" in text and not alarms, text
    write(tmp_path / "few", chain(12, 1), vocab_size=64)
    write(tmp_path / "valid", chain(60, 2), vocab_size=64)
    flags = ["--data.train", f"[{{path: {tmp_path / 'few'}}}]", "--data.valid", f"[{{path: {tmp_path / 'valid'}}}]"]
    text, alarms = result(tmp_path, capsys, *flags, "--run.name", "few")
    assert "it is memorising (" in text and len(alarms) == 1, text
