"""Robust estimates of noise: a few outliers, such as loss spikes, hardly change them."""

from __future__ import annotations

import math

import numpy as np

_SIGMA_PER_MEDIAN = 1.4826  # standard deviation of a normal distribution over the median distance from its center
LEAST_VALUES = 5


def robust_sigma(deviations: np.ndarray) -> float:
    """Standard deviation of normally distributed `deviations` (N,) around 0, from the median of their absolute values."""
    return _SIGMA_PER_MEDIAN * float(np.median(np.abs(deviations)))


def line_noise(loss: np.ndarray, unknown: float) -> float:
    """Standard deviation of single values of a curve (N,) around its trend; `unknown` for fewer than LEAST_VALUES finite ones.

    Second differences remove a smooth trend. Those of independent values with variance 1 have variance 1 + 4 + 1.
    """
    finite = loss[np.isfinite(loss)]
    if len(finite) < LEAST_VALUES:
        return unknown
    return robust_sigma(np.diff(finite, 2)) / math.sqrt(6)
