"""Spikes, lasting jumps and failed restarts are found with their steps; noise, warm-ups and single batches raise no alarm."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pretrain.doctor.diagnosis import Diagnosis
from pretrain.doctor.findings import diagnose
from pretrain.doctor.scale import Setup
from pretrain.doctor.training_log import Restart
from tests.test_findings import log_of


def judged(steps, loss, setup: Setup | None = None, **other) -> Diagnosis:
    return diagnose(log_of(steps, loss, **other), setup or Setup(50304))


def faults(result: Diagnosis) -> list[str]:
    return [finding.fault for finding in result.findings]


STEPS = np.arange(0, 3000, 10)


def healthy(noise: float = 0.03, seed: int = 0) -> np.ndarray:
    return 3.9 + 6.9 * (1 + STEPS / 200) ** -1.0 + noise * np.random.default_rng(seed).normal(size=300)


# ---------------------------------------------------------------- spikes


def test_spikes_are_named_each_with_its_step():
    loss = healthy()
    loss[150] += 2.5
    loss[200:206] += 1.2
    (finding,) = judged(STEPS, loss).findings
    assert finding.fault == "spike" and finding.certainty == "likely"
    assert "step 1500" in finding.text and "step 2000" in finding.text and "for 6 lines" in finding.text


def test_one_batch_with_a_high_loss_is_merely_possible():
    loss = healthy()
    loss[[90, 170, 240]] += 1.3
    result = judged(STEPS, loss)
    assert faults(result) == ["spike"] and not result.is_wrong


def test_a_jump_that_lasts_is_found():
    loss = healthy()
    loss[200:] += 1.5
    result = judged(STEPS, loss)
    assert result.is_wrong and set(faults(result)) <= {"divergence", "spike"}


@pytest.mark.parametrize("noise", [0.03, 0.2, 0.5])
def test_noise_of_small_batches_is_no_spike(noise):
    for seed in range(20):
        assert "spike" not in faults(judged(STEPS, healthy(noise, seed))), seed


def test_losses_of_single_sequences_with_long_tails_raise_no_alarm():
    named = 0
    for seed in range(40):
        loss = healthy() + 0.25 * np.random.default_rng(seed).standard_t(3, size=300)
        result = judged(STEPS, loss, Setup())
        assert not result.is_wrong, seed
        named += "spike" in faults(result)
    assert named <= 12, "as many lines lie far below"


def test_batches_with_high_losses_that_come_again_and_again_are_merely_possible():
    steps = np.arange(1000)
    loss = 2 + 0.03 * np.random.default_rng(0).normal(size=1000)
    for place in range(100, 1000, 75):
        loss[place : place + 3] += 1.5
    assert not judged(steps, loss, Setup()).is_wrong


EXCERPTS = {
    "rises": [6.37, 6.6, 7.31, 9.12, 10.24],
    "jumps and stays": [2.67, 2.67, 4.37, 4.37, 4.39, 4.40, 4.1, 4.14],
    "two lines and a jump": [3.06, 3.11, 7.71],
    "back after some lines": [2.2, 2.22, 2.6, 2.24, 2.35, 5.1, 3.49, 3.21, 2.8, 2.22, 2.24],
    "one line": [0.66, 0.80, 4.27, 0.77, 0.56, 0.82],
    "falls, then jumps": [1.61, 1.42, 3.3, 6.4, 5.5, 4.9, 4.8, 4.6],
}


@pytest.mark.parametrize("name", EXCERPTS)
def test_a_jump_in_a_short_excerpt_is_found(name):
    loss = EXCERPTS[name]
    result = judged(7000 + 10 * np.arange(len(loss)), loss, Setup())
    assert result.is_wrong and set(faults(result)) <= {"spike", "divergence"}


def test_short_excerpts_of_healthy_runs_raise_no_alarm():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        lines, start = int(rng.integers(3, 20)), rng.uniform(0.8, 3)
        loss = start * (1 - 0.2 * np.arange(lines) / 20) + rng.uniform(0.02, 0.3) * rng.normal(size=lines)
        result = judged(10 * np.arange(1, lines + 1), np.maximum(0.1, loss), Setup())
        assert not result.is_wrong, (seed, result.findings)


def test_the_first_updates_of_a_run_with_a_high_learning_rate_are_no_spike():
    assert judged(np.arange(1, 13), [8.32, 12.2, 10.1, 8.9, 8.1, 7.4, 7.0, 6.6, 6.3, 6.1, 5.9, 5.8], Setup(4096)).findings == []


def test_a_slow_rise_by_a_tenth_is_at_least_possible():
    result = judged(
        np.arange(12) / 5, [1.453, 1.406, 1.415, 1.426, 1.459, 1.436, 1.468, 1.503, 1.513, 1.565, 1.562, 1.614], Setup()
    )
    assert faults(result) == ["divergence"]


# ---------------------------------------------------------------- restarts


@pytest.mark.parametrize("lost", [0.0, 1.4])
def test_a_restart_that_restored_everything_is_right_and_one_that_did_not_is_named(lost):
    first, last = 150, 199
    old = Restart(STEPS[last], STEPS[first], STEPS[first : last + 1].astype(float), healthy()[first : last + 1])
    loss = healthy(seed=1)
    loss[first:] += lost * np.exp(-np.arange(150) / 30)
    result = judged(STEPS, loss, restarts=[old])
    if lost:
        (finding,) = result.findings
        assert finding.fault == "restart" and "step 1990 to 1500" in finding.text and result.is_wrong
    else:
        assert result.findings == []


# ---------------------------------------------------------------- missing losses


def test_lines_without_a_loss_and_a_norm_of_nan_are_a_divergence_at_the_first_of_them():
    steps, gone = np.arange(1, 40), np.arange(40.0, 61)
    loss = 10.75 * np.exp(-steps / 300)
    (finding,) = judged(steps, loss, Setup(32000), missing_steps=gone, nonfinite_norm_steps=gone).findings
    assert finding.fault == "nan" and "step 40" in finding.text
    (finding,) = judged([], [], Setup(32000), missing_steps=gone, nonfinite_norm_steps=gone).findings
    assert finding.fault == "nan"


def test_a_norm_of_nan_is_a_fault_if_it_stays_and_a_note_where_fp16_skips_a_step():
    loss = healthy()
    assert judged(STEPS, loss, nonfinite_norm_steps=STEPS[[1, 60]].astype(float)).findings == []
    assert faults(judged(STEPS, loss, nonfinite_norm_steps=STEPS[-2:].astype(float))) == ["nan"]


@pytest.mark.parametrize(("norm", "fault"), [(7e-8, "collapse"), (math.nan, "nan")])
def test_a_loss_of_0_means_known_labels_where_the_gradient_vanishes_and_nan_where_it_is_nan(norm, fault):
    norms, steps = np.r_[200, 2e-4, np.full(6, norm)], np.arange(1, 9)
    bad = steps[~np.isfinite(norms)].astype(float)
    loss = [12.1, 11.5, *np.zeros(6)]
    result = judged(steps, loss, Setup(50280), columns={"grad_norm": norms}, nonfinite_norm_steps=bad)
    assert result.findings[0].fault == fault


def test_a_single_0_before_the_first_loss_raises_no_alarm():
    assert judged(STEPS, np.r_[0, healthy()[1:]]).findings == []
