"""Robust estimates of noise ignore trends, outliers and NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pretrain.doctor.noise import LEAST_VALUES, line_noise, robust_sigma


@pytest.mark.parametrize("sigma", [0.01, 1.0])
def test_noise_around_a_trend_is_measured_in_spite_of_spikes_and_nan(sigma):
    noise = np.random.default_rng(0).normal(0, sigma, 20_000)
    assert math.isclose(robust_sigma(noise), sigma, rel_tol=0.03)
    loss = 10 * np.exp(-np.arange(20_000) / 5000) + noise
    loss[::50] += 100 * sigma
    loss[7::500] = math.nan
    assert math.isclose(line_noise(loss, math.inf), sigma, rel_tol=0.15)


def test_few_values_have_no_known_noise():
    values = np.r_[np.arange(LEAST_VALUES - 1.0), math.nan]
    assert line_noise(values, math.inf) == math.inf and line_noise(values, 0.0) == 0.0
    assert line_noise(np.arange(LEAST_VALUES, dtype=float), math.inf) == 0.0
