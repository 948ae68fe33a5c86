"""Laws through the final losses of small runs, and what they say about a large one, with intervals. Knows numbers only.

One variable, for a ladder with constant tokens per parameter: L = E + A / C^a in the FLOPs C of a run. Three runs cannot
identify three constants: the exponent has a prior from published laws, and what the runs leave open makes the interval wide.
Two variables, for runs that differ in tokens per parameter: L = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, "Training
Compute-Optimal Large Language Models", approach 3, arXiv 2203.15556), with the Huber loss on log L.

Given the exponents, both are linear in the other constants, so that the search is over one or two exponents on a grid, without
starts that end in other minima ("Problems with Chinchilla Approach 2", arXiv 2603.22339; on what went wrong in the original
optimisation see Besiroglu et al. 2024, arXiv 2404.10102). No constant is rounded on the way to a prediction.

Only final losses count: points along a run are under another schedule and share its noise.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from pretrain import UserError
from pretrain.plan.ladder import LR_SLOPE

EXPONENT, EXPONENT_SPREAD = 0.155, 0.5
"""Prior of a: median, and standard deviation of ln a. 0.154 by Hoffmann et al.'s constants, 0.178 by Besiroglu et al.'s
(alpha beta / (alpha + beta)); 80 % lie between 0.08 and 0.29."""
MISFIT = 0.005
"""Standard deviation of a tuned run's loss around its family's power law, relative, beside the noise of seeds: learning rates
and batches are never exactly the best, and shapes are rounded."""
UNTUNED = 0.01
"""Relative standard deviation that is added where a rung has a single learning rate: one that is wrong by a factor of 2 costs
1.4 and 1.0 % of the loss on the rungs of docs/recipes.md that have several (width 32 of both ladders)."""
TOO_SMALL = 4.0
"""Times as large is the misfit of a rung that cannot do what larger ones do, which fall faster from there on: its loss is above
the bigram entropy of its data, so that it knows little more than which tokens follow each other, or it has a single layer, in
which no induction heads form (Olsson et al. 2022, "In-context Learning and Induction Heads", arXiv 2209.11895)."""
GAIN_MISFIT, GAIN_DEGREES = 0.15, 2
"""Standard deviation of ln of what a rung still gains until its end, around a power law, before the rungs show it, and for how
many measured differences that counts."""
GAIN_SLOPE_SPREAD = 0.1
"""Standard deviation of the prior of that law's exponent, around -EXPONENT."""
LEAST_GAIN = 1e-3  # nats per token: ln needs one above 0
SEED_NOISE, SEED_DEGREES = 0.003, 2
"""Relative noise of seeds before any is measured, and for how many measured differences that counts."""
LR_SLOPE_SPREAD = 0.1
"""Standard deviation of the prior of the best learning rate's slope, d ln lr / d ln C."""
LR_SPREAD = 0.35
"""Standard deviation of ln of a rung's measured best learning rate, from a grid of factors 2."""
DRAWS = 2000
HUBER = 1e-3  # of residuals of ln L, as Hoffmann et al.
_EXPONENTS = np.exp(np.linspace(math.log(0.02), math.log(1.2), 160))


# ---------------------------------------------------------------- one variable


class Law(NamedTuple):
    """L = E + A (C / C0)^-a, for S laws at once."""

    e_S: np.ndarray
    a_S: np.ndarray
    exponent_S: np.ndarray
    origin: float
    """C0, in FLOPs."""

    def loss(self, flops: float) -> np.ndarray:
        """(S,) nats per token."""
        return self.e_S + self.a_S * (flops / self.origin) ** -self.exponent_S


def fit_compute(flops_R: np.ndarray, loss_SR: np.ndarray, noise_R: np.ndarray, prior_S: np.ndarray) -> Law:
    """The most likely law for each row of losses, with E and A not negative. noise_R: standard deviations of the losses, nats.
    prior_S: where the prior of ln a has its centre. Rungs (R,) in any order."""
    origin = float(np.exp(np.log(flops_R).mean()))
    weights_R = noise_R**-2.0
    power_GR = (flops_R / origin) ** -_EXPONENTS[:, None]
    sums = weights_R.sum()
    power_G, square_G = power_GR @ weights_R / sums, power_GR**2 @ weights_R / sums
    mean_S, product_SG = loss_SR @ weights_R / sums, loss_SR @ (weights_R * power_GR).T / sums
    a_SG = (product_SG - mean_S[:, None] * power_G) / (square_G - power_G**2)
    e_SG = mean_S[:, None] - a_SG * power_G
    a_SG = np.where(e_SG < 0, product_SG / square_G, a_SG)
    e_SG = np.maximum(e_SG, 0.0)
    flat = a_SG < 0
    a_SG, e_SG = np.where(flat, 0.0, a_SG), np.where(flat, mean_S[:, None], e_SG)
    squares_SG = sums * (  # of residuals, weighted, but for the sum of the losses' squares, which no exponent changes
        e_SG**2 + 2 * a_SG * e_SG * power_G + a_SG**2 * square_G - 2 * (e_SG * mean_S[:, None] + a_SG * product_SG)
    )
    penalty_SG = ((np.log(_EXPONENTS) - prior_S[:, None]) / EXPONENT_SPREAD) ** 2
    best_S = np.argmin(squares_SG + penalty_SG, axis=1)
    rows = np.arange(len(best_S))
    return Law(e_SG[rows, best_S], a_SG[rows, best_S], _EXPONENTS[best_S], origin)


class Predicted(NamedTuple):
    """A loss with its 80 % interval, nats per token."""

    loss: float
    low: float
    high: float


class Fitted(NamedTuple):
    """A law, and laws that the runs could as well have shown: the bootstrap."""

    best: Law
    draws: Law
    noise_S: np.ndarray
    """Standard normal: how each draw's run lies around its law."""

    def predict(self, flops: float, noise: float) -> Predicted:
        """The loss of one run. noise: relative standard deviation around the law."""
        center = float(self.best.loss(flops)[0])
        drawn = self.draws.loss(flops) + noise * center * self.noise_S
        low, high = np.quantile(drawn, (0.1, 0.9))
        return Predicted(center, float(min(low, center)), float(max(high, center)))


def bootstrap(flops_R: np.ndarray, loss_R: np.ndarray, noise_R: np.ndarray, seed: int = 0, draws: int = DRAWS) -> Fitted:
    """A law through R >= 3 rungs, and the parametric bootstrap: it is fitted again to losses, and to centres of the prior, that
    are moved by their noise (nats)."""
    generator = np.random.default_rng(seed)
    best = fit_compute(flops_R, loss_R[None], noise_R, np.array([math.log(EXPONENT)]))
    moved_SR = loss_R + noise_R * generator.standard_normal((draws, len(loss_R)))
    prior_S = math.log(EXPONENT) + EXPONENT_SPREAD * generator.standard_normal(draws)
    return Fitted(best, fit_compute(flops_R, moved_SR, noise_R, prior_S), generator.standard_normal(draws))


def lack_of_fit(law: Law, flops_R: np.ndarray, loss_R: np.ndarray, noise_R: np.ndarray) -> float:
    """By what the noise must be multiplied so that R rungs can be of one law; 1 unless the residuals are too large for it, with
    a probability under 1 %. With E, A and an exponent that a prior holds, R - 2 degrees of freedom are left."""
    squares, degrees = float(np.sum(((law.loss(flops_R) - loss_R) / noise_R) ** 2)), len(loss_R) - 2
    limit = (
        degrees * (1 - 2 / (9 * degrees) + 2.326 * math.sqrt(2 / (9 * degrees))) ** 3
    )  # 99 % of chi-squared (Wilson, Hilferty)
    return math.sqrt(squares / degrees) if squares > limit else 1.0


def seed_noise(groups: list[np.ndarray]) -> float:
    """Relative standard deviation between seeds, from the losses of runs that differ in nothing else; shrunk towards
    SEED_NOISE where few are known."""
    squares = sum(float((((each - each.mean()) / each.mean()) ** 2).sum()) for each in groups)
    degrees = sum(len(each) - 1 for each in groups)
    return math.sqrt((squares + SEED_DEGREES * SEED_NOISE**2) / (degrees + SEED_DEGREES))


# ---------------------------------------------------------------- the curve of the large run

FIRST = 0.1
"""Of the steps: earlier, warm-up decides."""
PLACES = 19
"""Of the band, evenly from FIRST to the end."""


class Band(NamedTuple):
    """The validation loss expected along the run, with 80 % intervals, nats per token."""

    fraction: list[float]
    """Of the steps, ascending to 1."""
    loss: list[float]
    low: list[float]
    high: list[float]


def band(
    flops_R: np.ndarray,
    curves: list[tuple[np.ndarray, np.ndarray]],
    misfit_R: np.ndarray,
    fitted: Fitted,
    flops: float,
    noise: float,
) -> Band:
    """The curve of the large run, from those of R rungs: (fraction of the steps (V,), loss (V,)), ends included.

    What a run still gains from a share x of its steps to its end, L(x) - L(1), is for each x a power law in the FLOPs. Its
    prior: at constant tokens per parameter and schedule, the loss at x and the final loss have the same irreducible part, and
    the rest of both falls with the same exponent (Qiu et al. 2025, "Scaling Collapse Reveals Universal Dynamics in Compute-
    Optimally Trained Neural Networks", arXiv 2507.02119). Small rungs depart from that, and the law follows them. At the end
    the band is the interval of the final loss. misfit_R: times as large is the misfit of each rung. noise: relative standard
    deviation of a run around its law.
    """
    place_X = np.linspace(FIRST, 1.0, PLACES)
    loss_RX = np.stack([np.interp(place_X, *curve) for curve in curves])
    gain_RX = np.log(np.maximum(loss_RX - loss_RX[:, -1:], LEAST_GAIN))
    mean_X, spread_X = _gain(np.log(flops_R), gain_RX, misfit_R, math.log(flops))
    final = float(fitted.best.loss(flops)[0])
    moved_S = np.random.default_rng(1).standard_normal(len(fitted.noise_S))
    gained_SX = np.exp(mean_X + spread_X * moved_S[:, None])
    gained_SX[:, -1] = 0.0
    drawn_SX = (fitted.draws.loss(flops) + noise * final * fitted.noise_S)[:, None] + gained_SX
    center_X = final + np.append(np.exp(mean_X[:-1]), 0.0)
    low_X, high_X = np.quantile(drawn_SX, (0.1, 0.9), axis=0)
    return Band(*(each.tolist() for each in (place_X, center_X, np.minimum(low_X, center_X), np.maximum(high_X, center_X))))


def _gain(x_R: np.ndarray, gain_RX: np.ndarray, misfit_R: np.ndarray, x: float) -> tuple[np.ndarray, np.ndarray]:
    """((X,) mean, (X,) standard deviation) of ln of the gain of a run with ln FLOPs x: a line through those of R rungs."""
    weight_R = misfit_R**-2.0
    from_mean_R = x_R - np.average(x_R, weights=weight_R)
    mean_X = np.average(gain_RX, axis=0, weights=weight_R)
    squares, products_X = weight_R @ from_mean_R**2, (weight_R * from_mean_R) @ (gain_RX - mean_X)
    prior, variance_X = GAIN_SLOPE_SPREAD**-2, np.full(gain_RX.shape[1], GAIN_MISFIT**2)
    for _ in range(2):  # the spread of the rungs around the line of the first round is that of the second
        precision_X = squares / variance_X + prior
        slope_X = (products_X / variance_X - EXPONENT * prior) / precision_X
        residual_RX = gain_RX - mean_X - from_mean_R[:, None] * slope_X
        measured_X = weight_R @ residual_RX**2 / weight_R.max() + GAIN_DEGREES * GAIN_MISFIT**2
        variance_X = measured_X / (len(x_R) - 1 + GAIN_DEGREES)
    distance = x - np.average(x_R, weights=weight_R)
    spread_X = np.sqrt(variance_X * (1 + 1 / weight_R.sum()) + distance**2 / (squares / variance_X + prior))
    return mean_X + slope_X * distance, spread_X


# ---------------------------------------------------------------- learning rates


class Tuned(NamedTuple):
    """The best learning rate of a rung."""

    loss: float
    """At its best, nats per token."""
    lr: float | None
    """None: one rate alone was tried, or no bend is known."""
    at_edge: bool
    """The best of those tried is the smallest or the largest."""


def tune(rates: list[tuple[np.ndarray, np.ndarray]]) -> list[Tuned]:
    """The minimum of each rung's losses (K,) over its learning rates (K,), which ascend: of the parabola in ln lr through the
    best one and its neighbours. A rung with two rates takes its bend, relative to its loss, from those with three or more."""
    bends = []
    for lr_K, loss_K in rates:
        best = int(np.argmin(loss_K))
        if 0 < best < len(lr_K) - 1:
            near = slice(best - 1, best + 2)
            bends.append(float(np.polyfit(np.log(lr_K[near]), loss_K[near], 2)[0] / loss_K[best]))
    bend = float(np.median(bends)) if bends else math.nan
    return [_tune(lr_K, loss_K, bend) for lr_K, loss_K in rates]


def _tune(lr_K: np.ndarray, loss_K: np.ndarray, bend: float) -> Tuned:
    best = int(np.argmin(loss_K))
    edge = len(lr_K) > 1 and best in (0, len(lr_K) - 1)
    x_K = np.log(lr_K)
    if not edge and len(lr_K) > 2:
        near = slice(best - 1, best + 2)
        two, one, zero = np.polyfit(x_K[near], loss_K[near], 2)
        if two > 0:
            return Tuned(float(zero - one**2 / (4 * two)), math.exp(-one / (2 * two)), False)
    if len(lr_K) < 2 or not bend > 0:
        return Tuned(float(loss_K[best]), None if len(lr_K) < 2 else float(lr_K[best]), edge)
    other = min((k for k in range(len(lr_K)) if k != best), key=lambda k: abs(x_K[k] - x_K[best]))
    two = bend * loss_K[best]
    span = x_K[other] - x_K[best]
    shift = (two * span**2 - (loss_K[other] - loss_K[best])) / (2 * two * span)  # of the minimum from the best rate
    shift = float(np.clip(shift, -abs(span), abs(span)))
    return Tuned(float(loss_K[best] - two * shift**2), math.exp(x_K[best] + shift), edge)


def predict_lr(flops_R: np.ndarray, lr_R: np.ndarray, flops: float, prior: float = LR_SLOPE) -> Predicted:
    """The best learning rate of the large run: a power law in the FLOPs through those of R >= 1 rungs, with a prior for its
    slope, around `prior`; `loss` is the rate. 80 % interval."""
    x_R, y_R = np.log(flops_R), np.log(lr_R)
    spread_R = np.sum((x_R - x_R.mean()) ** 2) / LR_SPREAD**2
    precision = spread_R + LR_SLOPE_SPREAD**-2
    slope = (np.sum((x_R - x_R.mean()) * y_R) / LR_SPREAD**2 + prior * LR_SLOPE_SPREAD**-2) / precision
    distance = math.log(flops) - x_R.mean()
    center = y_R.mean() + slope * distance
    sigma = math.sqrt(LR_SPREAD**2 / len(x_R) + distance**2 / precision)
    return Predicted(*(float(math.exp(center + z * sigma)) for z in (0.0, -1.2816, 1.2816)))


# ---------------------------------------------------------------- two variables


class Surface(NamedTuple):
    """L = E + A / N^alpha + B / D^beta."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token."""
        return self.e + self.a * parameters**-self.alpha + self.b * tokens**-self.beta

    def best(self, flops: float) -> tuple[float, float]:
        """(N, D) with the smallest loss for this budget, with C = 6 N D (Hoffmann et al. 2022, equation 4)."""
        total = self.alpha + self.beta
        scale = (self.alpha * self.a / (self.beta * self.b)) ** (1 / total)
        parameters = scale * (flops / 6) ** (self.beta / total)
        return parameters, flops / 6 / parameters


def fit_surface(parameters_R: np.ndarray, tokens_R: np.ndarray, loss_R: np.ndarray) -> Surface:
    """Approach 3 through the final losses of R runs. Raises UserError where they cannot tell its constants apart."""
    ratios = np.log(tokens_R / parameters_R)
    if len(loss_R) < 6 or np.ptp(ratios) < math.log(2) or len(np.unique(np.round(np.log(parameters_R), 2))) < 3:
        raise UserError(
            "the best number of parameters for a budget needs at least 6 finished runs of 3 sizes whose tokens per parameter "
            "differ by a factor of 2 or more; write such a ladder with --tokens-factors 0.5 2"
        )
    low, high = (0.05, 0.05), (1.2, 1.2)
    for _ in range(5):  # each time around the best one, four times as fine
        grid = [np.linspace(low[k], high[k], 41) for k in range(2)]
        alpha_G, beta_G = (each.ravel() for each in np.meshgrid(*grid))
        found_G5, cost_G = _surfaces(parameters_R, tokens_R, loss_R, alpha_G, beta_G)
        best = int(np.argmin(cost_G))
        step = [(high[k] - low[k]) / 8 for k in range(2)]
        low = tuple(max(0.02, value - step[k]) for k, value in enumerate((alpha_G[best], beta_G[best])))
        high = tuple(value + step[k] for k, value in enumerate((alpha_G[best], beta_G[best])))
    surface = Surface(*found_G5[best], float(alpha_G[best]), float(beta_G[best]))
    if not (surface.a > 0 and surface.b > 0):
        raise UserError("the runs do not show that the loss falls with both parameters and tokens: no best number follows")
    return surface


def _surfaces(parameters_R, tokens_R, loss_R, alpha_G, beta_G) -> tuple[np.ndarray, np.ndarray]:
    """((G, 3) E, A, B; (G,) Huber losses of ln L) for each pair of exponents, by reweighted least squares."""
    n0, d0 = np.exp(np.log(parameters_R).mean()), np.exp(np.log(tokens_R).mean())
    columns_GR3 = np.stack(
        [
            np.ones((len(alpha_G), len(loss_R))),
            (parameters_R / n0) ** -alpha_G[:, None],
            (tokens_R / d0) ** -beta_G[:, None],
        ],
        axis=2,
    )
    weights_GR = np.ones((len(alpha_G), len(loss_R)))
    for _ in range(12):
        scaled_GR3 = columns_GR3 * (weights_GR / loss_R**2)[:, :, None]
        normal_G33 = np.einsum("gri,grj->gij", scaled_GR3, columns_GR3)
        normal_G33 += 1e-12 * np.einsum("gii->g", normal_G33)[:, None, None] * np.eye(3)
        found_G3 = np.linalg.solve(normal_G33, np.einsum("gri,r->gi", scaled_GR3, loss_R)[:, :, None])[:, :, 0]
        value_GR = np.maximum(np.einsum("gri,gi->gr", columns_GR3, found_G3), 1e-3)
        residual_GR = np.abs(np.log(value_GR / loss_R))
        weights_GR = np.minimum(1.0, HUBER / np.maximum(residual_GR, 1e-12))
    huber_GR = np.where(residual_GR < HUBER, residual_GR**2 / 2, HUBER * (residual_GR - HUBER / 2))
    cost_G = np.where((found_G3 < 0).any(axis=1), np.inf, huber_GR.sum(axis=1))
    if not np.isfinite(cost_G).any():
        cost_G = huber_GR.sum(axis=1)
    found_G3[:, 1] *= n0**alpha_G
    found_G3[:, 2] *= d0**beta_G
    return found_G3, cost_G
