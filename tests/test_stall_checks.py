"""A loss that does not move is named with its cause, and losses that move are not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pretrain.doctor.diagnosis import Diagnosis
from pretrain.doctor.findings import diagnose
from pretrain.doctor.scale import Setup
from tests.test_findings import log_of


def judged(steps, loss, setup: Setup | None = None, **other) -> Diagnosis:
    return diagnose(log_of(steps, loss, **other), setup or Setup())


def faults(result: Diagnosis) -> list[str]:
    return [finding.fault for finding in result.findings]


def healthy(steps: np.ndarray, noise: float = 0.03) -> np.ndarray:
    blur = np.random.default_rng(0).normal(size=len(steps)) * noise
    return np.round(4 + 6.8 * (1 + steps / 150) ** -0.6 + blur, 4)


# ---------------------------------------------------------------- frozen


@pytest.mark.parametrize("setup", [Setup(50304), Setup()])
@pytest.mark.parametrize(("lines", "value"), [(50, 10.8259), (7, 10.4), (12, 2.3147)])
def test_a_loss_that_is_the_same_to_the_last_digit_is_frozen(lines, value, setup):
    result = judged(np.arange(60, 60 + lines), np.full(lines, value), setup)
    assert faults(result) == ["frozen"] and result.is_wrong and f"{value:g}" in result.findings[0].text


def test_the_gravest_finding_is_first():
    assert faults(judged(np.arange(0, 500, 10), np.full(50, 73.6832), Setup(10000, accumulation=8))) == ["frozen", "scale"]


def test_a_loss_that_freezes_midway_is_found_with_its_step():
    loss = healthy(np.arange(0, 2000, 10))
    loss[120:] = loss[120]
    result = judged(np.arange(0, 2000, 10), loss, Setup(50304))
    assert "frozen" in faults(result) and "step 1200 to 1990" in result.findings[0].text


@pytest.mark.parametrize(("period", "epochs"), [(8, 6), (7, 2), (30, 3)])
def test_epochs_that_repeat_to_the_last_digit_are_frozen(period, epochs):
    epoch = np.round(1.1 + 0.2 * np.random.default_rng(1).normal(size=period), 4)
    loss = np.tile(epoch, epochs)
    assert faults(judged(np.arange(len(loss)), loss, Setup(128256))) == ["frozen"]
    assert "frozen" not in faults(judged(np.arange(len(loss)), loss + 1e-3 * np.arange(len(loss)), Setup(128256)))


def test_few_digits_that_agree_are_not_frozen():
    for loss in (np.round(np.linspace(0.0030, 0.0001, 60), 4), np.repeat([2.4, 2.3, 2.3, 2.2], 12), [2.36, 2.36, 2.36]):
        assert "frozen" not in faults(judged(np.arange(len(loss)) * 10, loss, Setup(32000)))


# ---------------------------------------------------------------- the learning rate on the lines


@pytest.mark.parametrize("setup", [Setup(50304), Setup()])
@pytest.mark.parametrize("lr", [0.0, 3e-9, 5e-10])
def test_a_learning_rate_that_cannot_train_is_named_as_the_cause(lr, setup):
    steps = np.arange(0, 2000, 10)
    loss = 10.82 + 0.005 * np.random.default_rng(0).normal(size=200)
    result = judged(steps, loss, setup, columns={"lr": np.full(200, lr)})
    (finding,) = result.findings
    assert finding.fault == "stall" and finding.causes == ("lr",) and f"{lr:g}" in finding.text and result.is_wrong


@pytest.mark.parametrize("setup", [Setup(50304), Setup()])
def test_a_learning_rate_far_too_high_is_named_where_the_loss_stays_high(setup):
    steps, lr = np.arange(0, 2000, 10), np.full(200, 0.3)
    loss = 7.6 + 3 * np.exp(-steps / 80) + 0.05 * np.random.default_rng(0).normal(size=200)
    (finding,) = judged(steps, loss, setup, columns={"lr": lr}).findings
    assert finding.causes == ("lr",) and finding.certainty == "likely" and "0.3" in finding.text
    assert judged(steps, healthy(steps), setup, columns={"lr": lr}).findings == []


@pytest.mark.parametrize("from_line", [80, 150])
def test_a_learning_rate_of_0_from_some_step_on_is_found_with_its_step(from_line):
    steps, lr = np.arange(0, 2000, 10), np.full(200, 3e-4)
    loss = healthy(steps)
    lr[from_line:], loss[from_line:] = 0, loss[from_line] + 0.03 * np.random.default_rng(1).normal(size=200 - from_line)
    (finding,) = judged(steps, loss, Setup(50304), columns={"lr": lr}).findings
    assert finding.fault == "lr" and f"from step {from_line * 10} to 1990" in finding.text


def test_schedules_that_end_at_0_or_are_printed_with_few_decimals_raise_no_alarm():
    steps = np.arange(0, 2000, 10)
    cosine = 3e-4 * (1 + np.cos(np.pi * np.arange(200) / 199)) / 2
    warm_up = np.r_[np.zeros(6), np.full(194, 3e-4)]
    for lr in (cosine, np.round(cosine, 4), np.round(cosine / 3, 4), np.r_[cosine[:-1], 0], warm_up):
        loss = healthy(steps, 0.01)
        loss[130:] = loss[130] - np.linspace(0, 0.02, 70)
        assert not judged(steps, loss, Setup(50304), columns={"lr": lr}).is_wrong


def test_a_short_log_whose_learning_rate_is_mostly_0_is_not_called_right():
    loss = [0.479, 0.5176, 0.3423, 0.5136, 0.5388, 0.5249, 0.49, 0.47, 0.48, 0.46]
    lr = np.r_[np.zeros(6), 1e-5, 1e-5, 5e-6, 0]
    assert "lr" in faults(judged(np.arange(10), loss, columns={"lr": lr}))
    warming = np.array([2.71, 2.7, 2.72, 2.71, 2.7, 2.69, 2.69, 2.68, 2.68, 2.67, 2.67, 2.67])
    assert judged(np.arange(12), warming, columns={"lr": np.r_[np.zeros(4), np.full(8, 1e-5)]}).findings == []


# ---------------------------------------------------------------- levels


@pytest.mark.parametrize("unit", ["step", "epoch", "line"])
@pytest.mark.parametrize(("vocab_size", "number"), [(10000, "10000"), (32000, "32000"), (50304, "50304"), (20000, "20000")])
def test_a_loss_that_stays_at_ln_of_a_round_number_is_named_without_the_vocabulary(vocab_size, number, unit):
    rng = np.random.default_rng(0)
    loss = math.log(vocab_size) + 0.06 * np.exp(-np.arange(100) / 12) + 0.004 * rng.normal(size=100)
    log = log_of(np.arange(1, 101) * (10 if unit == "step" else 0.01), loss)
    log.unit = unit
    result = diagnose(log, Setup())
    assert faults(result) == ["stall"] and f"= ln {number}?" in result.findings[0].text and result.is_wrong
    assert faults(diagnose(log, Setup(vocab_size))) == ["stall"]


def test_a_hundred_steps_at_ln_v_are_a_stall_and_sixty_are_undecided():
    loss = 9.21 + 0.06 * np.exp(-np.arange(100) / 12) + 0.004 * np.random.default_rng(0).normal(size=100)
    assert judged(np.arange(1, 101), loss).is_wrong and judged(np.arange(1, 101), loss, Setup(10000)).is_wrong
    for setup in (Setup(10000), Setup()):
        result = judged(np.arange(1, 51), loss[:50], setup)
        assert result.findings == [] and any("whether it learns" in each for each in result.undecided)


def test_a_few_lines_late_in_a_run_that_is_still_at_ln_v_are_a_stall():
    loss = 10.48 + 0.002 * np.sin(np.arange(8))
    assert faults(judged(np.arange(1040, 1120, 10), loss, Setup(30522))) == ["stall"]


def test_a_late_plateau_at_the_level_of_token_frequencies_is_a_stall_unless_the_vocabulary_is_small():
    loss = 7.34 + 0.01 * np.sin(np.arange(12))
    steps = np.arange(16800, 19200, 200)
    assert faults(judged(steps, loss, Setup(267735))) == ["stall"]
    assert judged(steps, loss / 2, Setup(267735)).findings == []
    assert judged(steps, 2.4 + loss / 1000, Setup(33)).findings == [], "proteins stay at 0.7 ln 33"


def test_a_factor_that_is_only_guessed_leads_to_no_stall_but_a_flat_line_does():
    rng = np.random.default_rng(0)
    flat = 73.7 + 0.1 * rng.normal(size=200)
    result = judged(np.arange(0, 2000, 10), flat, Setup(10000))
    assert set(faults(result)) == {"scale", "stall"}


def test_what_a_log_does_not_suffice_to_judge_is_named():
    steps = np.arange(0, 2000, 10)
    assert any("--vocab-size" in each for each in judged(steps, healthy(steps)).undecided)
    assert judged(steps, healthy(steps), Setup(50304)).undecided == []
    assert any("lines" in each for each in judged([0, 1], [10.8, 10.7], Setup(50304)).undecided)
