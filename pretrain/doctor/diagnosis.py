"""The result of judging a training log: findings, notes, and the factor between the shown and the true loss."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pretrain.doctor.curve import ShownCurve
from pretrain.doctor.scale import Factor, Setup
from pretrain.doctor.training_log import TrainingLog

FAULTS = ("scale", "running", "start", "stall", "nan", "negative", "divergence", "collapse", "memorising", "auxiliary", "ranks",
          "noise")  # fmt: skip
"""All faults that a finding may name; docs/understanding_the_loss.md explains each."""


@dataclass(frozen=True)
class LogFinding:
    """One fault in a log."""

    fault: str
    """One of FAULTS."""
    certainty: str
    """certain, very likely, likely or possible."""
    text: str
    advice: str
    """Advice: what to do, or how to make sure."""
    causes: tuple[str, ...] = ()
    """For scale, start and noise, the most likely first: e.g. accumulation, both, bits, perplexity, initialisation."""

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
    """Observations that are not faults, and what the log leaves open."""
    explanation: Factor | None = None
    """Factor between the shown and the true loss; None: they are equal, as far as the log shows."""

    @property
    def true(self) -> np.ndarray:
        """(N,) the losses of `curve` in nats per token."""
        return self.explanation.true(self.curve.loss) if self.explanation else self.curve.loss

    @property
    def start(self) -> str:
        """The place of the first line, e.g. `step 100`."""
        return f"{self.log.unit} {self.curve.steps[0]:g}"

    @property
    def expected(self) -> str:
        """The loss of an untrained model, e.g. `ln(6400) = 8.76`. Requires a known vocabulary."""
        return f"ln({self.setup.vocab_size}) = {self.setup.ln_v:.2f}"
