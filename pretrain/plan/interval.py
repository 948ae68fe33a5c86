"""How often to save where machines are lost: the interval that loses least time, and a simulation that checks it.

A run trains for an interval, saves, and repeats. Training waits while a save blocks it; the save is durable some time later.
An interruption takes everything since the last durable save, and a restart. Interruptions come at random, at a constant rate
(a Poisson process), also while the run restarts. Sources: Young 1974; Daly 2006, "A higher order estimate of the optimum
checkpoint interval for restart dumps", equations 13, 20 and 37.

It knows seconds. It imports no torch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

RUNS = 1000
"""Simulated runs."""
GPU_HOURS_BETWEEN_FAILURES = 54 * 24 * 16384 / 419
"""Of one GPU, where nobody takes machines away: 419 unexpected interruptions in 54 days on 16,384 H100 (Llama Team 2024, "The
Llama 3 Herd of Models", section 3.3.4)."""
_INTERRUPTIONS = 50  # of a simulated run, on average: a longer one loses the same share of its time, a shorter one by chance
_NO_END = 1000  # times as long as its training: a run that nobody waits for
_FACTORS = np.geomspace(0.25, 4, 17)  # of the interval, that the simulation tries


class Saves(NamedTuple):
    """What a save takes."""

    blocked_seconds: float
    """That training waits for it."""
    durable_seconds: float
    """From then until it would survive the loss of a machine."""


class Risk(NamedTuple):
    """What interrupts a run."""

    mean_seconds: float
    """Between two interruptions of the run, whatever machine they hit; inf: none."""
    restart_seconds: float
    """From an interruption to the first step after it: a new machine, start, reading the checkpoint."""


def first_order(saves: Saves, risk: Risk) -> float:
    """The best seconds of training between saves by Young: sqrt(2 x blocked x mean)."""
    return math.sqrt(2 * saves.blocked_seconds * risk.mean_seconds)


def best_interval(saves: Saves, risk: Risk) -> float:
    """The best seconds of training between saves by Daly's higher order estimate; inf without interruptions.

    One save at a time: never shorter than a save takes to be durable.
    """
    blocked, mean = saves.blocked_seconds, risk.mean_seconds
    if math.isinf(mean):
        return math.inf
    x = blocked / (2 * mean)
    best = first_order(saves, risk) * (1 + math.sqrt(x) / 3 + x / 9) - blocked if x < 1 else mean
    return max(best, saves.durable_seconds, 1.0)


def expected_seconds(work: float, interval: float, saves: Saves, risk: Risk) -> float:
    """Expected seconds from the first step to the end of a run that trains for `work` seconds and saves after each `interval`
    of them; inf: it does not end.

    Daly's complete model: mean x exp((restart + durable) / mean) x (exp((interval + blocked) / mean) - 1) x work / interval.
    What is not yet durable delays an interruption's return to useful work as a restart does.
    """
    interval = min(interval, work)
    cycle, mean = interval + saves.blocked_seconds, risk.mean_seconds
    if math.isinf(mean):
        return work * cycle / interval
    try:
        before = mean * math.exp((risk.restart_seconds + saves.durable_seconds) / mean)
        total = before * math.expm1(cycle / mean) * work / interval
    except OverflowError:
        return math.inf
    return total if total < _NO_END * work else math.inf


def simulated_seconds(work: float, interval: float, saves: Saves, risk: Risk, runs: int = RUNS, seed: int = 0) -> np.ndarray:
    """(runs,) seconds of simulated runs: of each, interruptions are drawn until it has trained for `work` seconds.

    The same seed draws the same interruptions for every interval, so that intervals can be compared.
    """
    draws, cycle = np.random.default_rng(seed), interval + saves.blocked_seconds
    left_N, total_N = np.full(runs, float(work)), np.zeros(runs)
    while (left_N > 0).any():
        until_N = draws.exponential(risk.mean_seconds, runs)
        rest_N = left_N + np.ceil(left_N / interval) * saves.blocked_seconds + risk.restart_seconds + saves.durable_seconds
        kept_N = np.floor((until_N - risk.restart_seconds - saves.durable_seconds) / cycle).clip(0)  # durable saves
        running_N, done_N = left_N > 0, until_N >= rest_N
        total_N += np.where(running_N, np.minimum(until_N, rest_N), 0)
        left_N = np.where(done_N, 0, np.maximum(left_N - kept_N * interval, 0))
    return total_N


class Simulated(NamedTuple):
    """What simulated runs lose, as a share of the time in which they train."""

    runs: int
    interval_seconds: float
    loss: float
    """At that interval, on average over all runs."""
    best_seconds: float
    """The interval with the smallest loss of those tried, from a quarter to four times that interval."""
    best_loss: float


def simulate(interval: float, saves: Saves, risk: Risk, runs: int = RUNS) -> Simulated:
    """Simulates runs with intervals around `interval`, each long enough to be interrupted about fifty times."""
    work = _INTERRUPTIONS * risk.mean_seconds
    tried = sorted({interval, *(max(each, saves.durable_seconds) for each in interval * _FACTORS)})
    losses = {each: float(simulated_seconds(work, each, saves, risk, runs).mean()) / work - 1 for each in tried}
    best = min(losses, key=losses.get)
    return Simulated(runs, interval, losses[interval], best, losses[best])
