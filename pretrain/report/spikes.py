"""Loss spikes: steps whose loss is far above the losses before them. Knows numbers, not the run.

A loss is a spike if it is more than 8 sigma, and more than 10 %, above the median of the last 128 accepted losses. Sigma is
the standard deviation, or the robust one (from the median distance to the median) where that is larger. While the loss still
falls steeply, or after smaller jumps, sigma is wide; so a loss that is more than twice the median of the last 16, and a nat
above it, is always a spike. Spikes and losses that are not finite are not accepted, so they do not affect how later losses are
judged. Five spikes in a row are not spikes but a new level, and the window restarts from them.

Tested: every threefold spike after the first 16 steps is found, and none of 10,000 clean noisy losses is called a spike.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import NamedTuple

import numpy as np

from pretrain.doctor.noise import robust_sigma

WINDOW, ACTIVE_FROM = 128, 16
SIGMAS, LEAST_RISE = 8.0, 0.1
NEW_LEVEL = 5


class Spike(NamedTuple):
    """One spike and what it was compared with."""

    loss: float
    """Nats per token of the step."""
    median: float
    """Median of the accepted losses before it."""
    sigmas: float
    """Height above the median, in sigma."""
    stays: bool
    """True for the last of NEW_LEVEL spikes in a row: the level of the loss has changed."""


class SpikeWatch:
    """Judges the loss of every step, in order."""

    def __init__(self, state: dict | None = None):
        """`state`: from a checkpoint, as `state()` returned it."""
        state = state or {"accepted": [], "high": []}
        self.accepted = deque(state["accepted"], maxlen=WINDOW)
        self.high: list[float] = state["high"]
        """The spikes in a row up to now."""

    def state(self) -> dict:
        """The state to put into a checkpoint."""
        return {"accepted": list(self.accepted), "high": list(self.high)}

    def judge(self, loss: float) -> Spike | None:
        """The spike at this step, or None. A loss that is not finite is not a spike: such steps are skipped and counted."""
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
            return None  # nearly every step ends here
        mean = math.fsum(self.accepted) / len(self.accepted)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in self.accepted) / len(self.accepted))
        sigma = max(deviation, robust_sigma(np.array(self.accepted) - median))
        recent = statistics.median(list(self.accepted)[-ACTIVE_FROM:])
        if rise <= SIGMAS * sigma and loss <= max(2 * recent, recent + 1):
            return None
        return Spike(loss, median, rise / sigma if sigma else math.inf, stays=False)


def describe(step: int, spike: Spike) -> str:
    """One line about a spike for the user."""
    line = f"loss spike at step {step:,}: {spike.loss:.4f}, {spike.sigmas:.0f} sigma above the median of {spike.median:.4f}"
    return line + ("; it has stayed there for 5 steps and counts as the new level" if spike.stays else "")
