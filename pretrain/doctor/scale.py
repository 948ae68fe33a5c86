"""Detects the factor between the loss that a log shows and the true mean loss in nats per token.

An untrained model's loss is ln V; a healthy one never stays above it and falls at a rate that many curves share. So the first
line of a log, at whatever step, bounds the factor between the shown and the true loss. The settings of the run suggest the
factors that scripts apply by mistake; the end of the curve, and a validation loss or perplexity in the same log, rule some
out. If several remain, all are named. Knows curves and settings, not files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pretrain.doctor.curve import ShownCurve, share_of_ln_v, usual_fall
from pretrain.doctor.training_log import TrainingLog

KNOWN_VOCABULARIES = {
    6400: "MiniMind",
    32000: "Llama 2",
    32768: "nanochat, Mistral",
    50257: "GPT-2",
    65536: "nanochat",
    100277: "cl100k",
    128256: "Llama 3",
    151936: "Qwen",
    256000: "Gemma",
}
LARGEST_LN_V = math.log(300_000)
MOST = 1.12
"""The largest healthy first loss, as a share of ln V: large initial weights of the head add a few percent."""
LEAST_EVER = 0.06
"""No language model ends below this share of ln V on real text."""

_SOON = np.log([10, 100])
_LATE = (0.12, 0.35, 0.50)
GUESS = 2.0  # log-likelihood: an explanation with such a penalty is no more likely than any other number


@dataclass(frozen=True)
class Setup:
    """Facts about a run that the user gives; None: unknown."""

    vocab_size: int | None = None
    accumulation: int | None = None
    world_size: int | None = None
    sequence_length: int | None = None
    micro_batch_size: int | None = None

    @property
    def ln_v(self) -> float | None:
        """Loss of an untrained model, nats; None if the vocabulary is unknown or has a single id."""
        return math.log(self.vocab_size) if self.vocab_size and self.vocab_size > 1 else None

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step on all ranks; unknown values count as 1."""
        return (self.accumulation or 1) * (self.world_size or 1)


# ---------------------------------------------------------------- explanations


@dataclass(frozen=True)
class Factor:
    """One explanation of the first line: shown = value * true."""

    value: float
    cause: str
    words: str
    doubt: float = 0.0
    """Prior penalty of this explanation: a negative log-likelihood."""

    def true(self, shown: np.ndarray | float) -> np.ndarray | float:
        """Nats per token. For a perplexity, `value` holds at the first line only, so this takes the logarithm."""
        return np.log(shown) if self.cause == "perplexity" else shown / self.value

    def arithmetic(self, shown: float) -> str:
        """The calculation of the true loss from the shown one, e.g. `213.8 / 25 = 8.55`."""
        number = f"{shown:,.0f}" if 1e4 < shown < 1e9 else f"{shown:.4g}"
        if self.cause == "perplexity":
            return f"ln({number}) = {math.log(shown):.3g}"
        if self.cause == "bits":
            return f"{number} x ln 2 = {shown / self.value:.3g}"
        if self.value > 1:
            return f"{number} / {self.value:,.6g} = {shown / self.value:.3g}"
        return f"{number} x {1 / self.value:,.6g} = {shown / self.value:.3g}"

    def claim(self) -> str:
        """The rest of a sentence about the shown loss, e.g. `is multiplied by 25`."""
        if self.is_unit:
            return f"is {self.words}"
        return f"is multiplied by {self.value:,.6g}" if self.value > 1 else f"is divided by {1 / self.value:,.6g}"

    @property
    def is_unit(self) -> bool:
        """True if the factor is a change of unit rather than a count."""
        return self.cause in ("bits", "perplexity")


def factors(setup: Setup, curve: ShownCurve, near: float) -> Iterator[Factor]:
    """Yields the factors that scripts apply by mistake in such a run; `near`: the approximate size of the factor."""
    a, w, t, b = (n or 1 for n in (setup.accumulation, setup.world_size, setup.sequence_length, setup.micro_batch_size))
    counts = [
        (a, "accumulation", "the accumulation steps"),
        (w, "world size", "the number of ranks"),
        (a * w if a > 1 and w > 1 else 1, "both", "the accumulation steps times the number of ranks"),
        (t, "sequence length", "the sequence length"),
    ]
    for value, cause, words in counts:
        if value > 1:
            yield Factor(value, cause, words)
            yield Factor(1 / value, f"divided by {cause}", words)
    if t > 1:
        sums = {t * b: "a micro-batch", t * b * a: f"{a} micro-batches", t * b * a * w: "a step"}
        for value, owner in sums.items():
            if value > t:
                yield Factor(value, "sum", f"the tokens of {owner}, a sum instead of a mean", 0.7)
        sequences = round(near / t)
        if b == 1 and 1 < sequences <= 16384 and t * sequences not in sums:
            yield Factor(t * sequences, "sum", f"the tokens of {sequences} sequences, a sum instead of a mean", GUESS)
    sequences_of = {b: "a micro-batch", b * a: f"{a} micro-batches", b * a * w: "a step"}
    for value, owner in sequences_of.items():
        if b > 1:
            words = f"the sequences of {owner}"
            yield Factor(value, "batch size", words, 0.7)
            yield Factor(1 / value, "divided by batch size", words, 0.7)
    yield Factor(2.0**16, "loss scale", "the loss scale of fp16", GUESS)
    yield Factor(1 / math.log(2), "bits", "in bits instead of nats", 0.3)
    # Few scripts print a perplexity as the loss. Support for it: a start near V with a logarithm that falls like a loss, or a
    # fall that is too deep for any multiple of a loss.
    if curve.first > 20:
        falls = math.log(max(1, curve.last)) / math.log(curve.first) <= usual_fall(curve) ** 0.3
        supported = (curve.age <= 1 and falls) or curve.low < 0.15 * curve.first
        value = curve.first / math.log(curve.first)
        yield Factor(value, "perplexity", "the perplexity, exp(loss)", 1.0 if supported else 2 * GUESS)


# ---------------------------------------------------------------- evidence


@dataclass(frozen=True)
class Evidence:
    """Bounds of the factor: it is in [least, most], probably near `best`; `spread`: standard deviation of its logarithm."""

    least: float
    most: float
    best: float
    spread: float

    def deviations(self, factor: Factor) -> float:
        """Distance between `factor` and `best`, in standard deviations."""
        return abs(math.log(factor.value / self.best)) / self.spread


def from_start(curve: ShownCurve, ln_v: float) -> Evidence:
    """The first line compared with ln V. For a log that begins late (a resumed run), only an upper bound is known."""
    least, usual, spread = share_of_ln_v(curve.age) if curve.from_start else _LATE
    if curve.from_start:  # a loss that falls fast after the first line fell at least as fast before it
        least, usual = least / (1 + 1.5 * curve.early_fall), min(usual, 1 / (1 + curve.early_fall))
        spread = math.hypot(spread, curve.early_fall / 2)
        # A loss that hardly falls for long had not fallen far before either. At later steps a plateau looks the same.
        slow = curve.slowness * float(np.interp(math.log(max(curve.age, 1)), _SOON, [1, 0]))
        least, usual, spread = least + slow * (1 - least) * 0.8, usual + slow * max(0, 1 - usual) * 0.8, spread * (1 - slow / 2)
    ratio, noise = curve.first / ln_v, min(0.2, curve.noise / curve.first)
    return Evidence(ratio / MOST * (1 - 3 * noise), ratio / least * (1 + 3 * noise), ratio / usual, math.hypot(spread, noise))


def from_some_vocabulary(curve: ShownCurve) -> Evidence:
    """The first line compared with ln V of all vocabularies from 256 to 300,000 ids, most likely 30,000."""
    evidence, ratio = from_start(curve, math.log(30_000)), math.log(30_000)
    least, most = evidence.least * ratio / LARGEST_LN_V, evidence.most * ratio / math.log(256)
    return Evidence(least, most, evidence.best, math.hypot(evidence.spread, 0.15))


def from_perplexity(log: TrainingLog) -> tuple[Evidence, str] | None:
    """(the factor between a loss and the logarithm of the perplexity beside it; which loss: lm_loss, loss or val_loss); None
    without a constant factor. A factor of 1 shows that the loss is in nats, one of 1 / ln 2 that it is in bits."""
    beside = log.columns.get("perplexity", np.zeros(0))
    pairs = {"lm_loss": (log.columns.get("lm_loss"), beside), "loss": (log.loss, beside)}
    pairs["val_loss"] = (log.val_loss, log.val_perplexity)
    for name, (losses, perplexity) in pairs.items():
        if losses is not None and len(losses) == len(perplexity) and (evidence := _constant_factor(losses, perplexity)):
            return evidence, name
    return None


def _constant_factor(losses: np.ndarray, perplexity: np.ndarray) -> Evidence | None:
    """The factor losses / ln(perplexity) if it is the same everywhere; few values must agree with a unit."""
    with np.errstate(divide="ignore", invalid="ignore"):
        nats = np.log(perplexity)
        ratio = losses / nats
    ratio = ratio[np.isfinite(ratio) & (ratio > 0) & (nats > 0.1) & (np.abs(nats - 20) > 1e-3)]  # some cap it at e^20
    if not len(ratio) or np.std(ratio) > 0.03 * np.mean(ratio):
        return None
    mean = float(np.mean(ratio))
    if len(ratio) < 3 and min(abs(math.log(mean)), abs(math.log(mean * math.log(2)))) > 0.01:
        return None
    return Evidence(0.97 * mean, 1.03 * mean, mean, 0.01)


def over_validation(log: TrainingLog, curve: ShownCurve) -> tuple[np.ndarray, np.ndarray]:
    """((M,) shown loss / evaluated loss, (M,) evaluated loss) of every evaluation between the lines; evaluations of training
    data if the log has them, else validations."""
    evaluated = len(log.evaluated_loss) > 0
    steps, losses = (log.evaluated_steps, log.evaluated_loss) if evaluated else (log.val_steps, log.val_loss)
    inside = (steps >= curve.steps[0]) & (steps <= curve.steps[-1]) & (losses > 0)
    width = max(1, len(curve.loss) // 50)
    nearest = [np.abs(curve.steps - step).argsort(kind="stable")[:width] for step in steps[inside]]
    return np.array([np.median(curve.loss[lines]) for lines in nearest]) / losses[inside], losses[inside]


def from_validation(log: TrainingLog, curve: ShownCurve, ln_v: float | None) -> Evidence | None:
    """The factor between training and evaluated losses of one log; None if there is none. A constant ratio is a factor, a
    drifting one is learning: memorising makes it small, late in the run, and ever smaller."""
    evaluated = len(log.evaluated_loss) > 0
    ratio, losses = over_validation(log, curve)
    if not len(ratio):
        return None
    middle = float(np.median(ratio))
    if middle > 1.8 and len(ratio) >= 5 and np.ptp(ratio) > 0.3 * middle:
        ratio = ratio[len(ratio) // 2 :]  # where the loss still falls fast, a mean since the last line is far above it
        middle = float(np.median(ratio))
    if np.ptp(ratio) > (0.3 if middle < 1 else 0.6) * middle or 0.55 < middle < 1.8:
        return None
    if np.ptp(ratio) > 0.3 * middle:  # training falls further than validation: the first ratio shows the factor best
        return Evidence(0.85 * float(ratio.min()), 1.2 * float(ratio.max()), float(ratio[0]), 0.15)
    early = ln_v is not None and losses[0] > 0.6 * ln_v
    if middle < 1 and not early and len(ratio) < 3:
        return None
    if evaluated:
        return Evidence(0.87 * middle, 1.15 * middle, middle, 0.04)
    # Unseen text has a higher loss, or is of a different kind.
    return Evidence(0.85 * middle, 1.5 * middle, 1.06 * middle, 0.12)


def vocabularies_of(loss: float, age: float) -> str:
    """The known vocabularies that fit a healthy run with this loss at that update, as text; the nearest ln V first."""
    least, _, _ = share_of_ln_v(age)
    fits = [size for size in KNOWN_VOCABULARIES if least * math.log(size) <= loss <= 1.05 * math.log(size)]
    fits.sort(key=lambda size: abs(loss - math.log(size)))
    return " or ".join(f"{size} ({KNOWN_VOCABULARIES[size]}, ln = {math.log(size):.2f})" for size in fits[:3])


def running(log: TrainingLog, curve: ShownCurve) -> tuple[float, float] | None:
    """(b, L) if the first lines rise from 0 like L (1 - b^n) after n updates or lines, as a running mean that starts at 0 does;
    (1, L) if all lines rise by at most the first, L, as a sum that is never reset does. Else None."""
    count = min(len(curve.loss), 6)
    shown, lines, rises = curve.loss[:count], np.arange(1.0, count + 1), np.diff(curve.loss)
    if count < 4 or not curve.from_start or np.any(rises[: count - 1] <= 0) or shown[0] <= 0 or shown[-1] < 1.5 * shown[0]:
        return None
    if np.mean(rises > 0) > 0.95 and 0.08 < np.median(rises) / shown[0] < 1.1 and 0.5 < rises[0] / shown[0] < 1.1:
        return 1.0, float(shown[0])
    updates = curve.steps[:count] + (curve.steps[0] == 0) if log.unit == "step" else lines
    fits = []
    for n in (lines, updates):
        for b in 1 - np.geomspace(0.5, 0.001, 60):
            shape = 1 - b**n
            level = float(shown @ shape / (shape @ shape))
            fits.append((float(np.max(np.abs(shown - level * shape))) / shown[-1], float(b), level))
    error, b, level = min(fits)
    return (b, level) if error < 0.06 and 2 < level < MOST * LARGEST_LN_V else None
