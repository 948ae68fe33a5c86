"""The result of judging a training log: findings, notes, and the factor between the shown and the true loss."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pretrain.doctor.curve import ShownCurve
from pretrain.doctor.scale import Factor, Setup
from pretrain.doctor.training_log import TrainingLog

FAULTS = (
    *("nan", "divergence", "frozen", "scale", "running", "stall", "collapse", "start", "lr", "restart", "memorising"),
    *("negative", "spike", "auxiliary", "ranks", "noise"),
)
"""All faults that a finding may name, the gravest first; docs/understanding_the_loss.md explains each."""
CERTAINTIES = ("certain", "very likely", "likely", "possible")


@dataclass(frozen=True)
class LogFinding:
    """One fault in a log."""

    fault: str
    """One of FAULTS."""
    certainty: str
    """One of CERTAINTIES."""
    text: str
    advice: str
    """Advice: what to do, or how to make sure."""
    causes: tuple[str, ...] = ()
    """The most likely first: e.g. accumulation, both, bits, perplexity, initialisation, lr."""

    def __post_init__(self) -> None:
        assert self.fault in FAULTS and self.certainty in CERTAINTIES, self

    @property
    def order(self) -> tuple[bool, int]:
        """Key that sorts the gravest finding first; one that is merely possible comes after all others."""
        return self.certainty == "possible", FAULTS.index(self.fault)


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
    undecided: list[str] = field(default_factory=list)
    """What the log does not suffice to judge, and what is missing."""
    explanation: Factor | None = None
    """Factor between the shown and the true loss; None: they are equal, as far as the log shows."""

    @property
    def is_wrong(self) -> bool:
        """True if a finding is more than merely possible."""
        return any(finding.certainty != "possible" for finding in self.findings)

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
