"""Which learning rate to probe next, and what the probes say: the best rate, how sure that is, and where training diverges.

Knows losses at the ends of probes and no model. A probe is a short run with its own peak learning rate; those of one repeat
share initial weights and data, so that their differences have little noise; repeats differ in the data, or in the weights too.

The first repeat visits the whole grid and extends it where its best rate lies at an edge; the others visit the best rate and
two neighbours on each side. There a cubic of the mean loss against the logarithm of the rate has its minimum. Its interval is
that of curves drawn around the mean curve with the covariance that the repeats show and the tails of Student's t, whose degrees
of freedom are the repeats less one: a few repeats know their own spread poorly, and the interval says so. It covers noise and
the form of the fit. A best rate for short runs need not be the best for long ones: docs/running.md has what was measured.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

NEIGHBOURS = 2  # tested on each side of the best rate in every repeat
MOST_ADDED = 8  # rates beyond each end of the grid
COVERAGE = 0.8
FORM = 0.2  # steps of the grid by which the fit misses the minimum of curves that are no cubics: measured, at most 0.17
_CURVES = 2000
_SEED = 1

Losses = dict[tuple[float, int], float]
"""(learning rate, repeat) -> nats per token at the end of the probe; inf: it diverged."""


class Grid(NamedTuple):
    """The rates to begin with, in order, each `ratio` times the one before."""

    lrs: tuple[float, ...]
    ratio: float
    extends: bool
    """False: the user has set its ends."""


def grid_around(lr: float, points: int) -> Grid:
    """`points` rates, each twice the one before, with `lr` in the middle."""
    return Grid(tuple(_rounded(lr * 2.0 ** (i - points // 2)) for i in range(points)), 2.0, True)


def grid_between(low: float, high: float, points: int) -> Grid:
    """`points` rates from `low` to `high`."""
    ratio = (high / low) ** (1 / (points - 1))
    return Grid(tuple(_rounded(low * ratio**i) for i in range(points)), ratio, False)


def _rounded(lr: float) -> float:
    """To three digits: a rate that people can type."""
    return float(f"{lr:.3g}")


# ---------------------------------------------------------------- what to probe next


def next_probe(losses: Losses, grid: Grid, repeats: int) -> tuple[float, int] | None:
    """(learning rate, repeat) of the next probe; None: there are enough. It depends on nothing else, so that an interrupted
    search continues."""
    lrs, losses = _visited(losses, grid), _capped(losses)
    if missing := [lr for lr in lrs if (lr, 0) not in losses]:
        return min(missing, key=lambda lr: (abs(lrs.index(lr) - len(lrs) // 2), lr)), 0  # from the middle to the edges
    best = int(np.argmin([losses[lr, 0] for lr in lrs]))  # the lowest rate where all diverge
    while True:
        if added := _beyond(best, lrs, losses, grid):
            return added, 0
        around = lrs[max(0, best - NEIGHBOURS) : best + NEIGHBOURS + 1]
        for repeat in range(1, repeats):
            for lr in around:
                if (lr, repeat) not in losses:
                    return lr, repeat
        known, curves = complete(losses, repeats)
        before, best = best, lrs.index(known[int(np.argmin(curves.mean(0)))])
        if best == before:
            return None


def _visited(losses: Losses, grid: Grid) -> list[float]:
    """The rates of the grid, and those that were added to it, in order."""
    return sorted({*grid.lrs, *(lr for lr, _ in losses)})


def _capped(losses: Losses) -> Losses:
    """As if every probe had diverged from the lowest rate on at which one did: a rate above it only had luck."""
    lowest = min((lr for (lr, _), loss in losses.items() if math.isinf(loss)), default=math.inf)
    return {(lr, repeat): loss if lr < lowest else math.inf for (lr, repeat), loss in losses.items()}


def _beyond(best: int, lrs: list[float], losses: Losses, grid: Grid) -> float | None:
    """The rate by which the grid must grow so that the best one has neighbours on both sides: two, or one that diverged."""
    if not grid.extends:
        return None
    if best < NEIGHBOURS and sum(lr < grid.lrs[0] for lr in lrs) < MOST_ADDED:
        return _rounded(lrs[0] / grid.ratio)
    above = [losses[lr, 0] for lr in lrs[best + 1 :]]
    wanted = len(above) < NEIGHBOURS and all(map(math.isfinite, [losses[lrs[best], 0], *above]))
    if wanted and sum(lr > grid.lrs[-1] for lr in lrs) < MOST_ADDED:
        return _rounded(lrs[-1] * grid.ratio)
    return None


def complete(losses: Losses, repeats: int) -> tuple[list[float], np.ndarray]:
    """(rates that every repeat has probed, in order; their losses (repeats, rates))."""
    lrs = [lr for lr in sorted({lr for lr, _ in losses}) if all((lr, repeat) in losses for repeat in range(repeats))]
    return lrs, np.array([[losses[lr, repeat] for lr in lrs] for repeat in range(repeats)])


# ---------------------------------------------------------------- what the probes say


class Row(NamedTuple):
    """One learning rate."""

    lr: float
    loss: float
    """Mean over its repeats, nats per token; inf if it diverged in any of them."""
    worse: float
    """Mean of the differences to the best rate over the repeats of both."""
    noise: float | None
    """Half of the interval of that difference; None: unknown."""
    repeats: int
    diverged: int
    """Repeats in which it diverged."""
    as_good: bool
    """The difference to the best rate is not larger than the noise."""


class Answer(NamedTuple):
    """What the probes say."""

    lr: float | None
    """The recommended rate; None: `why` says why there is none."""
    interval: tuple[float, float] | None
    """It contains the best rate of such probes with a probability of at least COVERAGE."""
    why: str
    rows: list[Row]
    diverges_from: float | None
    """The lowest rate from which on every probe diverged; None: none did."""


def answer(losses: Losses, grid: Grid, repeats: int) -> Answer:
    """Reads the probes of a search that is complete (`next_probe` is None)."""
    lrs, curves = complete(_capped(losses), repeats)
    finite = np.isfinite(curves).all(0)
    every = _visited(losses, grid)
    threshold = _divergence(every, losses)
    if not finite.any():
        why = f"no rate was stable in all repeats, down to {every[0]:g}"
        return Answer(None, None, why, _rows(losses, every, lrs, curves, None, 0.0), threshold)
    x, curves = np.log(np.array(lrs)[finite]), curves[:, finite]
    stable = [lr for lr, kept in zip(lrs, finite, strict=True) if kept]
    best = int(np.argmin(curves.mean(0)))
    noise, largest = _noise(curves)
    rows = _rows(losses, every, stable, curves, best, noise)
    if np.ptp(curves.mean(0)) <= largest:
        why = f"between {stable[0]:g} and {stable[-1]:g} no difference is larger than the noise ({largest:.2g} nats)"
        return Answer(None, None, f"{why}; use more --steps or --repeats", rows, threshold)
    if stable[best] in (every[0], every[-1]):  # a higher one that diverged would be a side of the valley
        side = "lowest" if stable[best] == every[0] else "highest"
        why = f"the best rate, {stable[best]:g}, is the {side} that was tried; extend --lrs"
        return Answer(None, None, why, rows, threshold)
    minimum = float(_minima(x, curves.mean(0)[None])[0])
    low, high = np.quantile(_minima(x, _draw(curves)), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]).tolist()
    form = FORM * math.log(grid.ratio)
    interval = math.exp(min(low, minimum) - form), math.exp(max(high, minimum) + form)
    return Answer(_rounded(math.exp(minimum)), interval, "", rows, threshold)


def _minima(x: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """Places of the minima (n,) of `curves` (n, rates), at most one step from their lowest points: of a cubic of least squares
    through that point and two on each side, which may be unlike each other; where it has no minimum, or there are fewer than
    five points, of the parabola through the lowest point and its neighbours."""
    places, lowest = np.empty(len(curves)), curves.argmin(1)
    for best in np.unique(lowest).tolist():
        rows = lowest == best
        found = _stationary(x, curves[rows], best, reach=2, degree=3)
        parabola = _stationary(x, curves[rows], best, reach=1, degree=2)
        found = np.where(np.isfinite(found), found, np.where(np.isfinite(parabola), parabola, x[best]))
        places[rows] = np.clip(found, x[max(0, best - 1)], x[min(len(x) - 1, best + 1)])
    return places


def _stationary(x: np.ndarray, curves: np.ndarray, best: int, reach: int, degree: int) -> np.ndarray:
    """Places (n,) where the polynomials through the points up to `reach` from `best` have their minima; NaN: nowhere."""
    near = slice(max(0, best - reach), best + reach + 1)
    offsets = x[near] - x[best]
    if len(offsets) < 2 * reach + 1:
        return np.full(len(curves), math.nan)
    coefficients = np.linalg.pinv(np.vander(offsets, degree + 1)) @ curves[:, near].T
    a, b, c = (np.zeros(len(curves)), *coefficients[:2]) if degree == 2 else coefficients[:3]
    with np.errstate(invalid="ignore", divide="ignore"):
        root = b + np.sqrt(b * b - 3 * a * c)
        return np.where(root > 0, x[best] - c / root, math.nan)  # where the slope, 3 a t^2 + 2 b t + c, is 0 and rises


def _draw(curves: np.ndarray) -> np.ndarray:
    """Curves (n, rates) around the mean of `curves` (repeats, rates) as that mean is around the true one: normal, with the
    covariance of the repeats, divided by the root of chi squared over its degrees of freedom, as Student's t."""
    repeats, random = len(curves), np.random.default_rng(_SEED)
    deviations = (curves - curves.mean(0)) / math.sqrt(repeats * (repeats - 1))
    scale = np.sqrt(random.chisquare(repeats - 1, (_CURVES, 1)) / (repeats - 1))
    return curves.mean(0) + random.standard_normal((_CURVES, repeats)) @ deviations / scale


def _noise(curves: np.ndarray) -> tuple[float, float]:
    """What noise alone makes of the means over `curves` (repeats, rates), in nats: (half the interval of the difference between
    two rates; the difference between the best and the worst, exceeded once in twenty times). Pooled over rates; Student's t."""
    (repeats, rates), random = curves.shape, np.random.default_rng(_SEED)
    centred = curves - curves.mean(1, keepdims=True)
    freedom = (repeats - 1) * max(1, rates - 1)
    deviation = math.sqrt(((centred - centred.mean(0)) ** 2).sum() / freedom / repeats)
    scale = np.sqrt(random.chisquare(freedom, (10 * _CURVES, 1)) / freedom)
    means = random.standard_normal((10 * _CURVES, max(2, rates))) / scale
    pair = np.quantile(np.abs(means[:, 0] - means[:, 1]), COVERAGE)
    return float(pair) * deviation, float(np.quantile(np.ptp(means, axis=1), 0.95)) * deviation


def _divergence(lrs: list[float], losses: Losses) -> float | None:
    found = None
    for lr in reversed(lrs):
        if not all(math.isinf(loss) for (each, _), loss in losses.items() if each == lr):
            break
        found = lr
    return found


def _rows(
    losses: Losses, every: list[float], stable: list[float], curves: np.ndarray, best: int | None, noise: float
) -> list[Row]:
    """One row per rate. stable: the rates of the columns of `curves` (repeats, rates), of which `best` is the lowest."""
    rows = []
    for lr in every:
        of = {repeat: loss for (each, repeat), loss in losses.items() if each == lr}
        diverged = sum(math.isinf(loss) for loss in of.values())
        worse = math.inf
        if best is not None and not diverged:
            worse = float(np.mean([loss - curves[repeat, best] for repeat, loss in of.items()]))
        known = best is not None and lr in stable
        rows.append(Row(lr, float(np.mean(list(of.values()))), worse, noise if known else None, len(of), diverged,
                        known and worse <= noise))  # fmt: skip
    return rows
