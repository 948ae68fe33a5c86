"""The learning rate reaches its peak and its final value exactly, and phases that do not fit into the run are refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pretrain.config import ScheduleConfig
from pretrain.optim.schedule import lr_at

PEAK = 3e-4
DECAYING = ["cosine", "wsd", "linear"]


def curve(total_steps: int, **settings) -> list[float]:
    """Learning rates of steps 1 to total_steps."""
    return [lr_at(step, ScheduleConfig(**settings), PEAK, total_steps) for step in range(1, total_steps + 1)]


@given(
    name=st.sampled_from([*DECAYING, "constant"]),
    warmup_steps=st.integers(0, 40),
    decay_steps=st.none() | st.integers(1, 60),
    fraction=st.sampled_from([0.0, 0.05, 0.1, 1.0]),
    total_steps=st.integers(1, 100),
)
def test_every_schedule_rises_to_the_peak_then_falls_to_its_final_value(name, warmup_steps, decay_steps, fraction, total_steps):
    assume(warmup_steps + (decay_steps or 0) <= total_steps)
    lrs = curve(total_steps, name=name, warmup_steps=warmup_steps, decay_steps=decay_steps, final_lr_fraction=fraction)
    assert all(0 <= lr <= PEAK for lr in lrs)
    warm, rest = lrs[:warmup_steps], lrs[warmup_steps:]
    assert warm == [PEAK * (step / warmup_steps) for step in range(1, warmup_steps + 1)]
    assert all(earlier >= later for earlier, later in pairwise(rest))
    if rest:
        assert rest[-1] == (PEAK if name == "constant" else fraction * PEAK)
    if warm:
        assert warm[-1] == PEAK


def test_wsd_stays_at_the_peak_then_decays_linearly_over_the_last_forty_percent():
    lrs = curve(100, name="wsd", warmup_steps=10, final_lr_fraction=0.0)
    assert lrs[9:60] == [PEAK] * 51 and lrs[60] < PEAK
    assert lrs[59:] == pytest.approx([PEAK * (40 - i) / 40 for i in range(41)], abs=1e-12)
    assert curve(100, name="wsd", decay_steps=5)[94:96] == [PEAK, pytest.approx(PEAK * 0.82)]


def test_cosine_and_linear_are_halfway_in_the_middle():
    for name in ("cosine", "linear"):
        assert curve(110, name=name, warmup_steps=10, final_lr_fraction=0.1)[59] == pytest.approx(0.55 * PEAK)
    quarter = curve(110, name="cosine", warmup_steps=10, final_lr_fraction=0.0)[34]
    assert quarter == pytest.approx(PEAK * (1 + 0.5**0.5) / 2)


def test_after_a_short_decay_cosine_and_linear_stay_at_the_final_value():
    for name in ("cosine", "linear"):
        lrs = curve(100, name=name, warmup_steps=10, decay_steps=20)
        assert lrs[29:] == [0.1 * PEAK] * 71 and lrs[28] > 0.1 * PEAK


def test_the_default_decay_of_wsd_shrinks_to_the_steps_after_warm_up():
    lrs = curve(10, name="wsd", warmup_steps=8, final_lr_fraction=0.0)
    assert lrs[7:] == pytest.approx([PEAK, PEAK / 2, 0.0])


def test_steps_after_the_last_keep_the_final_value():
    for name in DECAYING:
        assert lr_at(150, ScheduleConfig(name=name, warmup_steps=10), PEAK, 100) == 0.1 * PEAK


@pytest.mark.parametrize("settings", [dict(warmup_steps=11), dict(warmup_steps=5, decay_steps=6), dict(decay_steps=11)])
def test_warm_up_and_decay_longer_than_the_run_are_refused(settings):
    with pytest.raises(ValueError, match="10 steps"):
        lr_at(1, ScheduleConfig(**settings), PEAK, 10)
