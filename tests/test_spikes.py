"""The spike detector finds every planted spike, and nothing else."""

from __future__ import annotations

import json
import math
import random

import pytest

from pretrain.report.spikes import ACTIVE_FROM, NEW_LEVEL, SpikeWatch, describe


def curve(seed: int, noise: float, steps: int = 10_000, descent: float = 300) -> list[float]:
    """A loss that falls from 10.5 to 2.5, with proportional noise in each step."""
    draw = random.Random(seed)
    return [(2.5 + 8 * math.exp(-step / descent)) * (1 + draw.gauss(0, noise)) for step in range(steps)]


@pytest.mark.parametrize("descent", [20, 300])
@pytest.mark.parametrize("noise", [0.0, 0.005, 0.03, 0.12])
def test_no_loss_of_ten_thousand_clean_noisy_steps_is_called_a_spike(noise, descent):
    watch = SpikeWatch()
    assert not [loss for loss in curve(1, noise, descent=descent) if watch.judge(loss)]


@pytest.mark.parametrize("descent", [20, 300])
@pytest.mark.parametrize("factor", [3, 10])
def test_every_spike_is_found_in_its_step_even_in_the_first_descent_and_after_smaller_jumps(factor, descent):
    seen = 0
    for seed in range(200):
        losses, watch, draw = curve(seed, 0.03, 400, descent), SpikeWatch(), random.Random(seed)
        at = draw.randrange(ACTIVE_FROM, 399)
        if at > 60:
            losses[draw.randrange(20, at - 20)] *= 1.8  # may be called a spike; if not, it widens sigma
        losses[at] *= factor
        spikes = [step for step, loss in enumerate(losses) if watch.judge(loss)]
        seen += at in spikes and len(spikes) <= 2
    assert seen == 200


def test_losses_that_are_not_finite_are_ignored_and_the_next_finite_one_is_accepted():
    watch = SpikeWatch()
    for loss in (*curve(0, 0.01, 100), math.nan, math.inf, -math.inf):
        assert watch.judge(loss) is None
    accepted = len(watch.accepted)
    assert watch.judge(curve(0, 0.01, 101)[-1]) is None and len(watch.accepted) == accepted + 1


def test_a_slow_drift_is_not_a_spike_and_a_jump_that_stays_is_reported_five_times_and_then_accepted():
    drift = SpikeWatch()
    assert not any(drift.judge(2.5 + step / 1000 + 0.02 * math.sin(step)) for step in range(3000))
    watch = SpikeWatch()
    for loss in curve(3, 0.01, 300):
        watch.judge(loss)
    spikes = [watch.judge(20.0 + step / 10) for step in range(200)]
    assert [spike is not None for spike in spikes] == [True] * NEW_LEVEL + [False] * (200 - NEW_LEVEL)
    assert spikes[NEW_LEVEL - 1].stays and "counts as the new level" in describe(7, spikes[NEW_LEVEL - 1])
    assert describe(1234, spikes[0]).startswith("loss spike at step 1,234: 20.0000, ")


def test_a_restored_watch_judges_like_one_that_never_stopped():
    losses = curve(5, 0.05, 300)
    losses[150:152] = [30.0, 31.0]
    straight, first = SpikeWatch(), SpikeWatch()
    verdicts = [straight.judge(loss) for loss in losses]
    before = [first.judge(loss) for loss in losses[:151]]
    second = SpikeWatch(json.loads(json.dumps(first.state())))
    assert before + [second.judge(loss) for loss in losses[151:]] == verdicts and sum(map(bool, verdicts)) == 2
    assert second.state() == straight.state()
