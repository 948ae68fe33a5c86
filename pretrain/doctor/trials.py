"""Tries every factor that a script may have applied against the entire curve: its start, its level and its end.

A factor fits if what it leaves is the loss of a language model: it starts near ln V (somewhat above, if the initial weights
are large; well below, if they were trained), does not stay above ln V, and does not end lower than text allows. This is the
one place that accepts a factor or rules it out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from pretrain.doctor.curve import ShownCurve
from pretrain.doctor.scale import GUESS, LARGEST_LN_V, LEAST_EVER, Evidence, Factor, Setup, factors

HIGHEST_START = 1.5
"""Share of ln V: large initial weights lift the first loss, but training brings it down to ln V within some steps."""
_HIGHEST_LEVEL = 1.03  # share of ln V: no model stays above it, unless it diverges
_LARGE_WEIGHTS = 0.10  # standard deviation of the logarithm of a first loss above ln V
_TRAINED = (0.3, 0.55)  # nats, share of ln V: the first losses of models that were trained before
_FITS = 2.5  # standard deviations: factors further from the evidence do not fit
_CONTENDER = 3.0  # log-likelihood: explanations that are worse than the best by this much are not named


@dataclass(frozen=True)
class Trial:
    """One factor, tried against the entire curve."""

    factor: Factor
    objection: str = ""
    """What rules it out; empty: it fits."""
    trained: bool = False
    """It fits only if training started from trained weights."""
    cost: float = math.inf
    """Negative log-likelihood, up to a constant."""

    @property
    def fits(self) -> bool:
        """True if the factor is a possible explanation."""
        return not self.objection


def try_factors(evidence: Evidence, setup: Setup, curve: ShownCurve, ln_v: float | None) -> list[Trial]:
    """All factors of the run, those that fit first, the most likely ones first."""
    tried = [_try(factor, evidence, setup, curve, ln_v) for factor in factors(setup, curve, evidence.best)]
    return sorted(tried, key=lambda each: each.cost)


def contenders(trials: list[Trial], trained: bool = False) -> list[Factor]:
    """The factors to name, the most likely first. `trained`: those that fit only if the weights were trained before."""
    fitting = [each for each in trials if each.fits and each.trained == trained]
    return [each.factor for each in fitting if each.cost - fitting[0].cost < _CONTENDER]


def bounds(evidence: Evidence, curve: ShownCurve, ln_v: float | None) -> Evidence:
    """`evidence` from the first line of a curve that is too high, with the least factor that the entire curve allows."""
    if ln_v is None or len(curve.loss) < 8 or curve.low > 0.97 * curve.first:
        return evidence
    least = max(curve.low / _HIGHEST_LEVEL, curve.first / HIGHEST_START) / ln_v
    return replace(evidence, least=min(evidence.least, least))


def _try(factor: Factor, evidence: Evidence, setup: Setup, curve: ShownCurve, ln_v: float | None) -> Trial:
    within = evidence.least <= factor.value <= evidence.most
    deviations, above = _deviations(factor, evidence, curve, ln_v)
    unsure = factor.doubt >= GUESS and evidence.spread > 0.2
    if within and (deviations < _FITS or above) and not unsure:
        end = factor.true(curve.low) / ln_v if ln_v else 1.0
        if end >= LEAST_EVER or factor.value < 1:
            few = 8 * math.log(max(1, 0.15 / end)) ** 2  # few runs end so low
            return Trial(factor, cost=factor.doubt + deviations**2 / 2 + few)
        return Trial(factor, f"leaves {_number(factor.true(curve.low))} at the end, and no text can be predicted so well")
    if evidence.best > 1 and factor.value > evidence.most and _as_trained(factor, curve, ln_v):
        start = factor.true(curve.first)
        return Trial(factor, trained=True, cost=factor.doubt + 2 * math.log(max(1, 1.2 / start)) ** 2)
    return Trial(factor, _objection(factor, evidence, curve, setup, ln_v))


def _deviations(factor: Factor, evidence: Evidence, curve: ShownCurve, ln_v: float | None) -> tuple[float, bool]:
    """(distance between `factor` and the evidence in standard deviations, True if it leaves a start above ln V)."""
    deviations = evidence.deviations(factor)
    if ln_v is None or not 1 < factor.value < evidence.best or factor.true(curve.first) < ln_v:
        return deviations, False
    return min(deviations, math.log(factor.true(curve.first) / ln_v) / _LARGE_WEIGHTS), True


def _as_trained(factor: Factor, curve: ShownCurve, ln_v: float | None) -> bool:
    """True if a count, such as the accumulation steps, leaves the curve of a model that was trained before."""
    least, share = _TRAINED
    start = factor.true(curve.first)
    return factor.doubt < GUESS and not factor.is_unit and least < start < share * (ln_v or math.log(30_000))


def _objection(factor: Factor, evidence: Evidence, curve: ShownCurve, setup: Setup, ln_v: float | None) -> str:
    mean, first, low = (factor.true(value) for value in (float(np.mean(curve.loss)), curve.first, curve.low))
    uniform, name = (ln_v, f"ln({setup.vocab_size})") if ln_v else (LARGEST_LN_V, "ln(300,000)")
    if low > _HIGHEST_LEVEL * uniform:
        return f"leaves {_number(mean)} on average, {_number(mean / uniform, 2)} times {name}"
    if factor.value < evidence.least:
        return f"leaves {_number(first)} at first, {_number(first / uniform, 3)} times {name}"
    if factor.value > evidence.most:
        share = f", {_number(first / uniform, 2)} times {name}" if first > 1 else ""
        return f"leaves {_number(first)} at first{share}, too low for an untrained model"
    return f"leaves {_number(first)} at first, which fits worse"


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}g}"


def whole_factors(least: float, best: float, most: float) -> list[int]:
    """The whole numbers of a range that are common as accumulation steps, ranks or their product, 2^k times 1, 3, 5 or 25; at
    most the ten nearest to `best`."""
    common = {odd * 2**power for odd in (1, 3, 5, 25) for power in range(17)} - {1}
    near = sorted((number for number in common if least <= number <= most), key=lambda each: abs(math.log(each / best)))
    return sorted(near[:10])
