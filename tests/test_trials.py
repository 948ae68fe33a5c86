"""Every factor is tried against the entire curve; other figures on the lines settle it where there are any."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pretrain.doctor.diagnosis import Diagnosis
from pretrain.doctor.findings import diagnose
from pretrain.doctor.scale import Setup
from tests.test_findings import log_of


def judged(steps, loss, setup: Setup, **other) -> Diagnosis:
    return diagnose(log_of(steps, loss, **other), setup)


def story(vocab_size: int = 6400, factor: float = 25, lines: int = 440) -> np.ndarray:
    """The shown losses of a run with large initial weights: it starts at 1.27 ln V, falls by 24 % and stays below ln V."""
    ln_v, rng = math.log(vocab_size), np.random.default_rng(0)
    true = ln_v * (0.958 + 0.31 * np.exp(-np.arange(lines) / 25))
    return factor * (true + 0.04 * rng.normal(size=lines))


@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize(("vocab_size", "factor"), [(6400, 25), (32000, 12), (50304, 40)])
def test_a_factor_that_fits_the_entire_curve_is_accepted_though_the_first_line_alone_denies_it(every, vocab_size, factor):
    loss = story(vocab_size, factor)
    steps = every * np.arange(1, len(loss) + 1)
    result = judged(steps, loss, Setup(vocab_size, accumulation=factor))
    (finding,) = result.findings
    assert finding.causes == ("accumulation",) and finding.certainty == "likely" and result.explanation.value == factor
    assert (
        f"{loss.mean() / factor:.3g} on average" in finding.text
        and f"{np.median(loss[-44:]) / factor:.3g} at the end" in finding.text
    )
    assert any("training works" in note and "24%" in note for note in result.notes)


def test_each_setting_that_does_not_fit_is_ruled_out_with_its_reason():
    loss = story()
    (finding,) = judged(np.arange(1, 441), loss, Setup(6400, accumulation=8)).findings
    assert f"Ruled out: 8 (the accumulation steps) leaves {loss.mean() / 8:.3g} on average, 3 times ln(6400)" in finding.text
    assert "accumulation" not in finding.causes and "24, 25, 32" in finding.text
    (finding,) = judged(np.arange(1, 441), loss, Setup(6400, accumulation=25, world_size=2, micro_batch_size=4)).findings
    assert finding.causes == ("accumulation",) and "2 (the number of ranks)" in finding.text.partition("Ruled out")[2]
    assert "100 (" in finding.text.partition("Only if")[2]


def test_a_product_of_settings_is_tried_too():
    (finding,) = judged(np.arange(1, 441), story(), Setup(6400, accumulation=5, world_size=5)).findings
    assert finding.causes == ("both",)


def test_without_flags_the_usual_whole_factors_are_listed_and_no_stall_is_claimed():
    result = judged(np.arange(1, 441), story(), Setup(6400))
    assert [finding.fault for finding in result.findings] == ["scale"] and "24, 25, 32" in result.findings[0].text


def fine_tuning(lines: int = 200) -> np.ndarray:
    return 1.0 + 2.8 * (1 + np.arange(lines) / 8) ** -1.2


@pytest.mark.parametrize("factor", [16, 32])
def test_the_factor_of_a_fine_tuning_is_settled_by_the_flag_and_otherwise_only_bounded_from_below(factor):
    steps, loss = np.arange(1, 201), factor * fine_tuning()
    (finding,) = judged(steps, loss, Setup(32000, accumulation=factor)).findings
    assert finding.causes[0] == "accumulation" and f"/ {factor} = 3.8 at first" in finding.text
    bound = f"at least {loss[0] / math.log(32000):.3g}"
    assert bound in finding.text
    (finding,) = judged(steps, loss, Setup(32000)).findings
    assert finding.causes[0] == "multiplied" and bound in finding.text


def test_evaluations_settle_the_factor_of_a_fine_tuning_before_anything_else():
    steps, at = np.arange(1, 201), np.array([50.0, 100.0, 150.0, 200.0])
    val_loss = np.interp(at, steps, fine_tuning()) + 0.03
    (finding,) = judged(steps, 32 * fine_tuning(), Setup(32000, 32), val_steps=at, val_loss=val_loss).findings
    assert finding.causes == ("accumulation",) and finding.certainty == "very likely"
    (finding,) = judged(steps, 32 * fine_tuning(), Setup(None), val_steps=at, val_loss=val_loss).findings
    assert "range: 32, 40" in finding.text


def test_a_mean_since_the_last_line_does_not_hide_the_factor_between_training_and_evaluation():
    """Where the loss falls fast, the mean of a hundred steps lies far above the evaluation at their end."""
    steps, loss = np.arange(100.0, 700, 100), np.array([290, 150, 9.8, 5.5, 5.2, 5.1])
    val_loss = np.array([15, 2.3, 0.35, 0.335, 0.32, 0.31])
    (finding,) = judged(steps, loss, Setup(None), val_steps=steps, val_loss=val_loss).findings
    assert finding.fault == "scale" and "range: 16, " in finding.text


@pytest.mark.parametrize("smoothing", [0.0, 0.9])
def test_a_perplexity_on_the_lines_proves_the_unit(smoothing):
    steps = np.arange(50, 1050, 50)
    bits = 6.5 + 5.4 * (1 + steps / 500) ** -2.0
    columns = {"perplexity": 2**bits} | ({"lm_loss": bits} if smoothing else {})
    (finding,) = judged(steps, bits + smoothing, Setup(32000), columns=columns).findings
    assert finding.causes == (("bits", "label smoothing") if smoothing else ("bits",)) and finding.certainty == "very likely"
    nats = bits * math.log(2)
    columns = {"perplexity": np.exp(nats)} | ({"lm_loss": nats} if smoothing else {})
    assert judged(steps, nats + smoothing, Setup(32000), columns=columns).findings == []


def test_the_perplexity_of_evaluations_proves_the_unit_too():
    steps, val_loss = np.arange(100, 1100, 100), np.array([3.7, 3.1])
    val = {"val_steps": np.array([500.0, 1000.0]), "val_loss": val_loss, "val_perplexity": 2**val_loss}
    (finding,) = judged(steps, 3 + np.exp(-steps / 500), Setup(), **val).findings
    assert finding.causes == ("bits",)


@pytest.mark.parametrize("every", [1, 10, 100])
@pytest.mark.parametrize(("start", "end"), [(1.5, 0.6), (2.5, 0.17), (3.9, 1.9), (1.0, 0.55), (0.4, 0.2)])
def test_healthy_fine_tunings_raise_no_alarm_whatever_settings_are_given(start, end, every):
    steps = every * np.arange(1, 201)
    loss = end + (start - end) * np.exp(-np.arange(200) / 40)
    for setup in (Setup(50257), Setup(32000, 4, 2, 1024, 4), Setup(151936, 8, 8), Setup()):
        assert not judged(steps, loss, setup).is_wrong, setup


def test_a_start_far_above_ln_v_that_training_removes_is_not_called_a_factor():
    """Weights that were trained for another objective start at 25 nats and fall to 2."""
    steps = np.arange(10, 5000, 10)
    result = judged(steps, 2.3 + 23 * np.exp(-steps / 60) + 0.01 * np.sin(steps), Setup())
    assert not result.is_wrong and [finding.fault for finding in result.findings] == ["start"]


def test_a_first_line_far_above_all_others_is_the_start_and_no_perplexity():
    (finding,) = judged([1, 2, 3, 4], [740.6, 6.08, 5.34, 5.0], Setup()).findings
    assert finding.fault == "start"
