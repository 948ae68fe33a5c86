"""Checks of a log for places where the loss jumps: spikes, lasting jumps, and restarts that did not restore everything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pretrain.doctor.diagnosis import Diagnosis, LogFinding
from pretrain.doctor.noise import line_noise

_BEFORE, _LEAST_LINES = 8, 24
_SIGMAS, _SHARE, _NATS = 8.0, 0.10, 0.3  # how far a spike lies above the lines before it, at least
_NAMED = 8


class Jump(NamedTuple):
    """A place where the loss jumps up."""

    begin: int
    """Index of its first line."""
    end: int
    """Index of the first line after it that is back; the number of lines if none is."""
    before: float
    """Median of the lines before it."""
    peak: float


def check_spikes(result: Diagnosis) -> Iterator[LogFinding]:
    """Lines far above those before them, each with its step. Losses of small batches scatter so far often, and both ways."""
    log, true = result.log, result.true
    if len(true) < _LEAST_LINES:
        yield from _spike_in_few_lines(result)
        return
    restarted = [restart.first for restart in log.restarts]
    jumps = [jump for jump in _jumps(true) if not any(_is_near(result, jump, step) for step in restarted)]
    if any(finding.fault == "divergence" for finding in result.findings):
        jumps = [jump for jump in jumps if jump.end < len(true)]
    if not jumps or len(jumps) > max(3, 0.02 * len(true)):
        if jumps:
            result.notes.append(f"{len(jumps)} lines lie far above those before them: batches differ, or training is unstable")
        return
    grave = [each for each in jumps if each.end - each.begin > 2 and each.peak - each.before > 0.5]  # others are one batch
    grave = grave if len(jumps) <= _NAMED else []  # many: some batches have high losses, and may follow each other
    text = "; ".join(_description(result, jump) for jump in jumps[:_NAMED])
    more = len(jumps) - _NAMED
    text = f"the loss jumps {text}{f'; and {more} more times' if more > 0 else ''}"
    advice = "Look at the samples of these steps and at the gradient norm before them; lower the learning rate, or clip more."
    yield LogFinding("spike", "likely" if grave else "possible", text, advice)


def _spike_in_few_lines(result: Diagnosis) -> Iterator[LogFinding]:
    """A jump by a nat in a short excerpt, which is larger than all other changes from line to line."""
    true = result.true
    if len(true) < 3 or any(finding.fault == "divergence" for finding in result.findings):
        return
    before = np.array([np.median(true[max(0, i - 3) : i]) for i in range(1, len(true))])
    index = int((true[1:] - before).argmax()) + 1
    base, rise = float(before[index - 1]), float(true[index] - before[index - 1])
    if rise < max(1.0, 0.2 * base):
        return
    back = np.flatnonzero(true[index:] < base + 0.3 * rise)
    jump = Jump(index, index + int(back[0]) if len(back) else len(true), base, float(true[index:].max()))
    recovers = jump.end < len(true)
    early = index <= 3 and (not result.curve.has_steps or result.curve.steps[index] <= 100)
    early = early and base > 6  # the first updates of a run from scratch with a high learning rate
    if recovers and early:
        return
    other = np.abs(np.diff(np.delete(true, index)))
    clear = np.median(other) < 0.25 * rise and (rise > 1.5 or not recovers)
    certainty = "likely" if (len(true) < 5 or clear) and not early else "possible"
    text = f"the loss jumps {_description(result, jump)}"
    yield LogFinding("spike", certainty, text, "Look at the samples of that step and at the gradient norm before it.")


def _is_near(result: Diagnosis, jump: Jump, step: float) -> bool:
    steps = result.curve.steps
    return bool(steps[max(0, jump.begin - 2)] <= step <= steps[min(len(steps) - 1, jump.begin + 2)])


def _description(result: Diagnosis, jump: Jump) -> str:
    steps, lines = result.curve.steps, jump.end - jump.begin
    text = f"at {result.log.unit} {steps[jump.begin]:g} from {jump.before:.4g} to {jump.peak:.4g}"
    if jump.end >= len(steps):
        return f"{text} and has not come back at {steps[-1]:g}"
    return f"{text} for {lines} line{'s' * (lines > 1)}"


def _jumps(loss: np.ndarray) -> list[Jump]:
    """All jumps upward, in order; [] if lines lie as far below their neighbours, too, as those of small batches do."""
    if len(loss) < _LEAST_LINES:
        return []
    before = np.median(np.lib.stride_tricks.sliding_window_view(loss[:-1], _BEFORE), axis=1)
    least = np.maximum(_SIGMAS * line_noise(loss, 0.0), np.maximum(_SHARE * before, _NATS))
    rise = loss[_BEFORE:] - before
    found, free = [], 0
    for index in (np.flatnonzero(rise > least) + _BEFORE).tolist():
        if index < free:
            continue
        base, bound = before[index - _BEFORE], least[index - _BEFORE]
        back = np.flatnonzero(loss[index:] < base + bound / 2)
        free = index + int(back[0]) if len(back) else len(loss)
        found.append(Jump(index, free, float(base), float(loss[index:free].max())))
    after = np.median(np.lib.stride_tricks.sliding_window_view(loss[1:], _BEFORE), axis=1)
    inner = slice(_BEFORE, len(loss) - _BEFORE)
    below = np.minimum(before[: len(before) - _BEFORE], after[_BEFORE:]) - loss[inner] > least[: len(least) - _BEFORE]
    return found if below.sum() <= len(found) / 3 else []


def check_restarts(result: Diagnosis) -> Iterator[LogFinding]:
    """A restart after which the loss is higher than it was at the same steps: something was not restored."""
    log, curve = result.log, result.curve
    noise = line_noise(curve.loss, 0.0)
    for restart in log.restarts:
        if restart.first <= curve.steps[0] or len(restart.steps) < 3:
            continue  # another run in the same file
        usable = np.isfinite(restart.loss) & (restart.loss > 0)
        again = np.flatnonzero((curve.steps >= restart.first) & (curve.steps <= restart.last))[:10]
        if not usable.any() or not len(again):
            continue
        old = np.interp(curve.steps[again], restart.steps[usable], restart.loss[usable])
        was, now = float(np.median(old)), float(np.median(curve.loss[again]))
        if now - was > max(0.04 * was, 6 * noise / math.sqrt(len(again))):
            place = f"after the log goes back from {log.unit} {restart.last:g} to {restart.first:g}"
            text = f"{place}, the loss is {now:.4g} where it was {was:.4g} before"
            advice = "Check that weights, optimizer state, learning rate and position in the data are all restored."
            yield LogFinding("restart", "likely", text, advice)
