"""The result of judging a training log: findings, notes, and the factor between the shown and the true loss."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pretrain.doctor.scale import Factor, Setup, ShownCurve
from pretrain.doctor.training_log import TrainingLog

FAULTS = {
    "scale": "the shown loss is the true one times a factor, or that factor changes",
    "running": "a running mean that starts at 0, or a sum that is never reset",
    "start": "the first loss is not ln V, and no factor explains it",
    "stall": "it stays at ln V, or at the unigram entropy",
    "nan": "losses that are not finite, or exactly 0",
    "negative": "losses below 0",
    "divergence": "the curve ends far above its lowest part",
    "collapse": "it falls to nearly 0",
    "memorising": "training falls and validation does not",
    "auxiliary": "the loss contains an auxiliary loss",
    "ranks": "every rank prints its own loss",
    "noise": "lines scatter more than the mean of so many sequences can",
}
"""All faults that a finding may name; docs/understanding_the_loss.md explains each."""


@dataclass(frozen=True)
class LogFinding:
    """One fault in a log."""

    fault: str
    """A key of FAULTS."""
    certainty: str
    """certain, very likely, likely or possible."""
    text: str
    advice: str
    """What to do, or how to make sure."""
    causes: tuple[str, ...] = ()
    """Of a scale, a start or a noise: the most likely first, as accumulation, both, bits, perplexity, initialisation."""

    def __post_init__(self) -> None:
        assert self.fault in FAULTS, self.fault


@dataclass
class Diagnosis:
    """All results for one log."""

    log: TrainingLog
    setup: Setup
    curve: ShownCurve | None
    """None: no loss is finite and above 0."""
    findings: list[LogFinding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Facts and limits that are not faults."""
    explanation: Factor | None = None
    """Factor between the shown and the true loss; None: they are equal, as far as the log shows."""

    @property
    def true(self) -> np.ndarray:
        """(N,) the losses of `curve` in nats per token."""
        return self.explanation.true(self.curve.loss) if self.explanation else self.curve.loss

    @property
    def start(self) -> str:
        """The place of the first line, as `step 100`."""
        return f"{self.log.unit} {self.curve.steps[0]:g}"

    @property
    def expected(self) -> str:
        """The loss of an untrained model, as `ln(6400) = 8.76`; the vocabulary is known."""
        return f"ln({self.setup.vocab_size}) = {self.setup.ln_v:.2f}"
