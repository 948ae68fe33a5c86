"""The search for a learning rate finds the best one of noisy curves, extends its grid, and says how sure it is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from pretrain.optim import lr_search
from pretrain.optim.lr_search import Answer, Grid, Losses, answer, grid_around, grid_between, next_probe

AROUND = grid_around(4e-3, 7)  # 5e-4 to 3.2e-2


def valley(octaves: float) -> float:
    return 0.05 * octaves**2


def kinked(octaves: float) -> float:
    return octaves**2 * (0.08 if octaves < 0 else 0.03)


def steep(octaves: float) -> float:
    return 0.04 * (math.exp(-octaves) - 1 + octaves) + 0.005 * octaves**2


def search(
    curve: Callable[[float], float],
    best: float,
    *,
    noise: float = 0.0,
    shift: float = 0.0,
    grid: Grid = AROUND,
    repeats: int = 3,
    seed: int = 0,
    known: Losses | None = None,
) -> tuple[Answer, Losses]:
    """Probes `curve` of the octaves from the best rate. noise: nats of each probe; shift: octaves by which that of each repeat
    moves; and every repeat has its own level, which says nothing about rates."""
    random, losses = np.random.default_rng(seed), dict(known or {})
    shifts, levels = random.normal(0, shift, repeats), random.normal(0, 0.1, repeats)
    while chosen := next_probe(losses, grid, repeats):
        lr, repeat = chosen
        assert chosen not in losses, "probed twice"
        losses[chosen] = 3 + levels[repeat] + curve(math.log2(lr / best) - shifts[repeat]) + random.normal(0, noise)
    return answer(losses, grid, repeats), losses


def covered(curve: Callable[[float], float], trials: int, **spread: float) -> float:
    """Share of searches whose interval contains the best rate, which lies anywhere between two rates of the grid."""
    inside = 0
    for seed in range(trials):
        best = 4e-3 * 2 ** np.random.default_rng(seed + 1000).uniform(-1.5, 1.5)
        found, _ = search(curve, best, seed=seed, **spread)
        inside += found.interval is not None and found.interval[0] <= best <= found.interval[1]
    return inside / trials


@pytest.mark.parametrize("spread", [{"noise": 0.005}, {"shift": 0.2}, {"noise": 0.003, "shift": 0.1}], ids=str)
def test_the_interval_of_the_noise_alone_covers_the_best_rate_as_often_as_it_says(spread, monkeypatch):
    """Of 80 trials, 64 are expected and 3.6 is the standard deviation."""
    monkeypatch.setattr(lr_search, "FORM", 0.0)
    assert 0.68 <= covered(valley, 80, **spread) <= 0.92


@pytest.mark.parametrize("curve", [valley, kinked, steep])
@pytest.mark.parametrize("spread", [{"noise": 0.002}, {"shift": 0.2}], ids=str)
def test_the_interval_covers_the_best_rate_of_curves_that_no_polynomial_fits(curve, spread):
    assert covered(curve, 40, **spread) >= 0.8


@pytest.mark.parametrize("best", [2e-5, 1e-4, 3e-4, 5e-3, 3e-2, 0.2])
def test_a_best_rate_outside_the_grid_is_found_between_neighbours_and_no_edge_is_recommended(best):
    found, losses = search(steep, best, noise=0.001)
    lrs = sorted({lr for lr, _ in losses})
    assert 1 / 1.15 < found.lr / best < 1.15
    for beyond in (found.lr / 2.2, found.lr * 2.2):
        assert lrs[0] < beyond < lrs[-1]
    assert all(math.isclose(high / low, 2, rel_tol=0.01) for low, high in itertools.pairwise(lrs))


def test_ends_that_the_user_has_set_are_kept_and_a_best_rate_there_is_not_recommended():
    for best, side in ((1e-5, "lowest"), (1.0, "highest")):
        found, losses = search(valley, best, noise=0.001, grid=grid_between(1e-3, 8e-3, 4))
        assert {lr for lr, _ in losses} == {1e-3, 2e-3, 4e-3, 8e-3}
        assert found.lr is None and found.interval is None and side in found.why


def test_a_flat_curve_has_no_best_rate():
    """One search in twenty may be wrong: of 40, 2 are expected, and 1.4 is the standard deviation."""
    grid = grid_between(1e-3, 1.6e-2, 5)
    found = [search(lambda octaves: 0.0, 4e-3, noise=0.01, grid=grid, seed=seed)[0] for seed in range(40)]
    undecided = [each for each in found if each.lr is None and "noise" in each.why]
    assert len(undecided) >= 34
    assert all(each.interval is None for each in undecided)
    assert search(valley, 4e-3, noise=0.01, grid=grid)[0].lr is not None


def test_where_everything_diverges_the_search_goes_down_and_says_so():
    found, losses = search(lambda octaves: math.inf, 4e-3)
    assert found.lr is None and found.interval is None and all(row.diverged for row in found.rows)
    assert min(lr for lr, _ in losses) == pytest.approx(5e-4 / 2**lr_search.MOST_ADDED, rel=0.01)
    assert found.diverges_from == min(lr for lr, _ in losses)


@pytest.mark.parametrize("cliff", [3e-3, 3e-2, 0.3])
def test_a_rate_at_which_any_probe_diverged_is_never_recommended(cliff):
    """The loss falls up to the cliff: the best stable rate is its neighbour."""
    found, _ = search(lambda octaves: math.inf if octaves > 0 else 0.05 * -octaves, cliff, noise=0.002)
    assert cliff / 2.1 < found.lr <= cliff and cliff < found.diverges_from < 2.1 * cliff


def test_a_rate_at_which_one_of_the_probes_diverged_bounds_the_recommendation():
    losses = {(lr, repeat): (0.1 * math.log2(lr / 8e-3)) ** 2 for lr in AROUND.lrs for repeat in range(3)} | {
        (8e-3, 2): math.inf
    }
    found = answer(losses, AROUND, 3)
    assert found.lr < 8e-3 and next(row for row in found.rows if row.lr == 8e-3).diverged == 1
    assert found.diverges_from is None


def test_an_interrupted_search_makes_the_probes_that_are_missing():
    whole, losses = search(steep, 2e-2, noise=0.0)
    for done in range(len(losses)):
        known = dict(list(losses.items())[:done])
        again, all_losses = search(steep, 2e-2, noise=0.0, known=known)
        assert list(all_losses) == list(losses) and again.lr == pytest.approx(whole.lr)


def test_more_repeats_narrow_the_interval():
    widths = []
    for repeats in (2, 3, 8):
        found = [search(valley, 5e-3, shift=0.2, repeats=repeats, seed=seed)[0].interval for seed in range(15)]
        widths.append(np.median([each[1] / each[0] if each else math.inf for each in found]))
    assert widths[0] > widths[1] > widths[2] > 1
