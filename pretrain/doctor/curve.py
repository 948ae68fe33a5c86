"""The curve that a log shows, and how the loss of a healthy run from scratch falls, as a share of ln V."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pretrain.doctor.noise import line_noise
from pretrain.doctor.training_log import TrainingLog

# loss / ln V of a healthy run from scratch, by the step of its first line: the lowest that fast recipes reach, the usual one,
# and the standard deviation of its logarithm. From public logs with vocabularies of 65 to 152,000 ids.
_LOG_STEP = np.log([1, 10, 100, 1000, 10_000])
_LEAST = [0.90, 0.60, 0.33, 0.20, 0.12]
_USUAL = [1.01, 0.93, 0.75, 0.50, 0.38]
_SPREAD = [0.05, 0.10, 0.30, 0.40, 0.45]


@dataclass(frozen=True)
class ShownCurve:
    """The finite losses above 0 of a log as it shows them (they may be off by a factor), and statistics of their shape."""

    steps: np.ndarray  # (N,)
    loss: np.ndarray  # (N,)
    first: float
    last: float  # median of the last tenth
    low: float  # the lowest median of a tenth
    noise: float  # standard deviation of a line around the trend; 0 for too few lines
    has_steps: bool  # the unit of `steps` is the step
    from_start: bool  # the log begins with the first line of its run, judging by its steps
    age: float  # updates before the first line, at most
    early_fall: float  # fall of the loss, as a share of the first line, over as many steps as lie before that line
    slowness: float  # 0 to 1: how far the fall up to ten times the step of the first line lags behind the usual one

    @staticmethod
    def of(log: TrainingLog) -> ShownCurve | None:
        """The curve of `log`; None if no loss is finite and above 0."""
        usable = np.isfinite(log.loss) & (log.loss > 0)
        steps, loss = log.steps[usable], log.loss[usable]
        if not len(loss):
            return None
        tenth = max(min(3, len(loss)), len(loss) // 10)
        medians = [np.median(loss[i : i + tenth]) for i in range(0, len(loss) - tenth + 1, tenth)]
        has_steps, noise = log.unit == "step", line_noise(loss, 0.0)
        from_start, age = log.steps[0] <= 1000, float(steps[0]) if has_steps else 300.0
        if len(log.steps) > 1:
            from_start = log.steps[0] <= max(1, 2 * np.median(np.diff(log.steps)))
        early_fall, slowness = _early_shape(steps, loss, age, noise) if has_steps and len(steps) > 1 and age > 0 else (0.0, 0.0)
        first, last, low = float(loss[0]), float(np.median(loss[-tenth:])), float(min(medians))
        return ShownCurve(steps, loss, first, last, low, noise, has_steps, bool(from_start), age, early_fall, slowness)


def _early_shape(steps: np.ndarray, loss: np.ndarray, age: float, noise: float) -> tuple[float, float]:
    """(early_fall, slowness) of a ShownCurve; `steps` begin at `age`."""
    later = min(int(np.searchsorted(steps, 2 * age)), len(steps) - 1)
    fall = (loss[0] - loss[later] - 2 * noise) / loss[0] * age / (steps[later] - steps[0])
    tenfold, slowness = int(np.searchsorted(steps, 10 * age)), 0.0
    if tenfold < len(steps) and 1 <= age <= 100:
        usual = 1 - share_of_ln_v(10 * age)[1] / share_of_ln_v(age)[1]
        slowness = float(np.clip(1 - (1 - np.median(loss[tenfold : tenfold + 3]) / loss[0]) / usual, 0, 1))
    return float(np.clip(fall, 0, 1)), slowness


def share_of_ln_v(age: float) -> tuple[float, float, float]:
    """(least, usual, spread of the logarithm) of loss / ln V in a healthy run whose first line is at update `age`."""
    x = math.log(max(age, 1.0))
    return tuple(float(np.interp(x, _LOG_STEP, row)) for row in (_LEAST, _USUAL, _SPREAD))


def usual_fall(curve: ShownCurve) -> float:
    """Usual ratio of the last to the first loss of a run from scratch over these steps; a log without steps counts as 1,000."""
    if not curve.has_steps:
        return 0.45
    return share_of_ln_v(curve.age + curve.steps[-1] - curve.steps[0])[1] / share_of_ln_v(curve.age)[1]


def falls_as_untrained(curve: ShownCurve) -> bool | None:
    """True if the logarithm of the loss falls at least half as far as in runs from scratch; trained models fall less. None: too
    few lines or steps to tell."""
    usual = usual_fall(curve)
    if not curve.from_start or len(curve.loss) < 5 or usual > 0.86:
        return None
    return curve.last <= math.sqrt(usual) * curve.first
