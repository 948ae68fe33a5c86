"""Finds ranks that slow all others down, and says why. Knows what each rank measured, not how it travels or is shown.

Ranks wait for each other in every step, so all step times are equal; what differs is what a rank does alone: its forward passes
(engines/forward_time.py) and its wait for data. A rank is slow when that makes steps at least `SLOW` times as long, and longer
than noise does, in `WINDOWS` consecutive windows of at least `WINDOW_SECONDS` each: on a shared machine, any rank may be late
once. In a simulation of equal ranks whose windows vary by 5 to 15 % (standard deviation), one of 4 or 8 is never named in a
week, and one of 2 ranks at most twice.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

SLOW, WINDOWS, WINDOW_SECONDS = 1.1, 4, 20.0
_REMEMBERED_WINDOWS, _SIGMAS = 20, 3
_OF_A_STEP = 3
"""A backward pass takes about twice as long as a forward pass, and is slow for the same reasons."""
_COOLED = 0.95
"""A GPU that runs below this fraction of the median rank's clock is the cause of slow forward passes."""
_REASONS = {  # bits of nvmlClocksThrottleReasons in nvml.h; the other ones are no faults
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x20: "thermal",
    0x40: "thermal, by the hardware",
    0x80: "power brake",
}


class RankFigures(NamedTuple):
    """What one rank measured in a logging interval; NaN where it is not known."""

    forward_seconds: float
    """Of one forward pass."""
    forward_cpu_fraction: float
    """Part of that in which the main thread used a CPU; 1 on GPUs."""
    data_seconds: float
    """Waiting for data, in the entire interval."""
    core_wait_seconds: float
    """The main thread could run, but other threads had the cores, or a limit on CPU time was reached; in the interval."""
    clock_mhz: float = math.nan
    """Of the GPU's multiprocessors, now."""
    clock_limit_mhz: float = math.nan
    clock_reasons: float = 0.0
    """Why the clock is below its limit: bits of `_REASONS`, and others."""
    temperature_celsius: float = math.nan
    power_watts: float = math.nan


class Slow(NamedTuple):
    """A finding of `SlowRankWatch`."""

    rank: int
    """The slowest rank."""
    ranks: list[int]
    """All slow ranks."""
    ratio: float
    """By how much longer it makes each step, estimated from what it does alone."""
    cause: str
    """data, gpu, cpu, stopped or compute."""
    text: str
    """What it does slowly and why, to be read after `rank 5 on node-3`."""


class RankProbe:
    """Reads what the system knows of this rank: its main thread and its GPU. Must be read by the main thread."""

    def __init__(self, device: torch.device):
        self._gpu = _open_gpu(device)
        self._core_wait = _core_wait_seconds()

    def read(self, forward: tuple[float, float], data_seconds: float) -> RankFigures:
        """The figures of the interval since the last call. forward: of `ForwardTimer.read`."""
        before, self._core_wait = self._core_wait, _core_wait_seconds()
        return RankFigures(*forward, data_seconds, self._core_wait - before, *self._gpu())


class SlowRankWatch:
    """Judges the figures of all ranks, interval by interval."""

    def __init__(self, window_seconds: float = WINDOW_SECONDS):
        self.window_seconds = window_seconds
        self.reported: list[int] = []
        """The slow ranks that were named and are still slow."""
        self._streaks: list[int] = []
        self._intervals: list[_Interval] = []
        self._lost: deque[list[float]] = deque(maxlen=_REMEMBERED_WINDOWS)

    def add(self, figures: Sequence[RankFigures], seconds: float, steps: int, passes: int) -> Slow | None:
        """Adds an interval of `steps` steps of `passes` forward passes. -> what is slow, when it was not named before."""
        if any(math.isnan(each.forward_seconds) for each in figures):  # a GPU has not completed a forward pass yet
            return None
        self._intervals.append(_Interval(list(figures), seconds, steps, passes))
        if sum(each.seconds for each in self._intervals) < self.window_seconds:
            return None
        window, self._intervals = _mean(self._intervals), []
        lost = [min(0.999, sum(of_rank)) for of_rank in _lost_fractions(window)]
        self._lost.append(lost)
        limit = max(1 - 1 / SLOW, _SIGMAS * self._noise())
        streaks = zip(self._streaks or [0] * len(lost), lost, strict=True)
        self._streaks = [streak + 1 if fraction > limit else 0 for streak, fraction in streaks]
        self.reported = [rank for rank in self.reported if self._streaks[rank]]
        slow = [rank for rank, streak in enumerate(self._streaks) if streak >= WINDOWS]
        if set(slow) <= set(self.reported):
            return None
        self.reported = slow
        rank = max(slow, key=lost.__getitem__)
        return Slow(rank, slow, 1 / (1 - lost[rank]), *_explain(rank, window))

    def _noise(self) -> float:
        """Standard deviation of what a rank costs from window to window, whatever its mean."""
        pairs = zip(list(self._lost)[1:], self._lost, strict=False)
        changes = [abs(new - old) for pair in pairs for new, old in zip(*pair, strict=True) if new != old]
        return statistics.median(changes) / (0.6745 * math.sqrt(2)) if changes else 0.0


def spread(figures: Sequence[RankFigures]) -> dict[str, Any]:
    """The entries of a logging record that compare ranks."""
    found: dict[str, Any] = {}
    forward = [each.forward_seconds for each in figures]
    if not any(map(math.isnan, forward)):
        found["forward_seconds"] = statistics.median_low(forward)
        found["forward_seconds_max"] = max(forward)
        found["forward_seconds_max_rank"] = forward.index(max(forward))
    found["data_seconds_max"] = max(each.data_seconds for each in figures)
    gpus = [each for each in figures if not math.isnan(each.clock_mhz)]
    if gpus:
        found["gpu_clock_mhz_min"] = min(each.clock_mhz for each in gpus)
        found["gpu_temperature_max"] = max(each.temperature_celsius for each in gpus)
        found["gpu_power_watts"] = statistics.fmean(each.power_watts for each in gpus)
    return found


def named(slow: Slow, hosts: Sequence[str]) -> str:
    """The finding in words. hosts: of all ranks."""
    host = hosts[slow.rank]
    text = f"rank {slow.rank} on {host} makes each step about {slow.ratio:.2f} x as long: {slow.text}"
    others = [rank for rank in slow.ranks if rank != slow.rank]
    of_host = [rank for rank, each in enumerate(hosts) if each == host]
    if len(of_host) > 1 and set(of_host) == set(slow.ranks):
        return f"{text}. All {len(of_host)} ranks of {host} are slow, and no others"
    if others:
        shown = ", ".join(f"{rank} ({hosts[rank]})" for rank in others[:8]) + (" ..." if len(others) > 8 else "")
        return f"{text}. Also slow: {shown}"
    return text


# ---------------------------------------------------------------- judging


class _Interval(NamedTuple):
    """Some steps. A window is the mean of its intervals, with waits per step and steps = 1."""

    ranks: list[RankFigures]
    seconds: float
    steps: int
    passes: int
    """Forward passes of each rank per step."""


def _mean(intervals: list[_Interval]) -> _Interval:
    steps = sum(each.steps for each in intervals)

    def mean(rank: int, name: str) -> float:
        return sum(getattr(each.ranks[rank], name) * each.steps for each in intervals) / steps

    def per_step(rank: int, name: str) -> float:
        return sum(getattr(each.ranks[rank], name) for each in intervals) / steps

    means = [
        last._replace(
            **{name: mean(rank, name) for name in ("forward_seconds", "forward_cpu_fraction", "clock_mhz")},
            **{name: per_step(rank, name) for name in ("data_seconds", "core_wait_seconds")},
        )
        for rank, last in enumerate(intervals[-1].ranks)
    ]
    return _Interval(means, sum(each.seconds for each in intervals) / steps, 1, intervals[-1].passes)


def _lost_fractions(window: _Interval) -> list[tuple[float, float]]:
    """The part of a step that each rank costs all ranks, (by its forward and backward passes, by its wait for data), compared
    with the median rank. The lower median: of two ranks, one can be slow."""
    forward = statistics.median_low(each.forward_seconds for each in window.ranks)
    data = statistics.median_low(each.data_seconds for each in window.ranks)
    fractions = []
    for each in window.ranks:
        slower = 1 - forward / max(each.forward_seconds, 1e-9)  # of its passes, and so at most of the step
        of_forward = _OF_A_STEP * window.passes * (each.forward_seconds - forward) / window.seconds
        of_data = (each.data_seconds - data) / window.seconds
        fractions.append((min(slower, of_forward, key=abs), of_data))
    return fractions


def _explain(rank: int, window: _Interval) -> tuple[str, str]:
    """(cause, text) of a slow rank."""
    mine, (of_forward, of_data) = window.ranks[rank], _lost_fractions(window)[rank]

    def median(figure: Callable[[RankFigures], float]) -> float:
        return statistics.median_low(map(figure, window.ranks))

    if of_data > of_forward:
        others = 1000 * median(lambda each: each.data_seconds)
        waits = f"it waits {1000 * mine.data_seconds:.0f} ms for data in each step of {1000 * window.seconds:.0f} ms"
        return "data", f"{waits}, the median rank {others:.0f} ms"
    forward = median(lambda each: each.forward_seconds)
    longer = mine.forward_seconds / forward
    text = f"its forward passes take {longer:.2f} x the median ({1000 * mine.forward_seconds:.3g} of {1000 * forward:.3g} ms)"
    clock = statistics.median_low([each.clock_mhz for each in window.ranks if not math.isnan(each.clock_mhz)] or [math.nan])
    if mine.clock_mhz < _COOLED * clock:
        why = [name for bit, name in _REASONS.items() if int(mine.clock_reasons) & bit] or ["no reason given"]
        now = f"{mine.temperature_celsius:.0f} °C, {mine.power_watts:.0f} W"
        runs = f"its GPU runs at {mine.clock_mhz:,.0f} of {mine.clock_limit_mhz:,.0f} MHz ({', '.join(why)}; {now})"
        return "gpu", f"{text}: {runs}, the median rank's at {clock:,.0f} MHz"
    cpu = (
        mine.forward_seconds * mine.forward_cpu_fraction / median(lambda each: each.forward_seconds * each.forward_cpu_fraction)
    )
    if cpu > math.sqrt(longer):  # it computes for longer, which is more of the delay than that it is held up
        return "compute", f"{text}, in which it computes all the time; no clock explains it"
    fraction = mine.core_wait_seconds / window.seconds
    if fraction > max(0.05, 1.2 * median(lambda each: each.core_wait_seconds) / window.seconds):
        waits = f"its main thread waits for a core {fraction:.0%} of the time"
        return "cpu", f"{text}: {waits} (other programs there, or a limit on CPU time)"
    held = f"its main thread runs in only {mine.forward_cpu_fraction:.0%} of that time"
    return "stopped", f"{text}: {held} (a signal or a limit on CPU time stops it, or it waits for memory or a file)"


# ---------------------------------------------------------------- reading


def _core_wait_seconds() -> float:
    """How long the main thread of this process has waited for a core since its start; NaN where the system does not say."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    return math.nan


def _open_gpu(device: torch.device) -> Callable[[], tuple[float, ...]]:
    """A function that reads the fields of `RankFigures` from `clock_mhz` on; none of them where there is no GPU."""
    if device.type != "cuda":
        return tuple
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = (
            f"GPU-{str(torch.cuda.get_device_properties(device).uuid).removeprefix('GPU-')}"  # CUDA_VISIBLE_DEVICES renumbers
        )
        return nvml_reader(uuid)
    except Exception:  # no package, no library, a part of a GPU (MIG), a driver that refuses: clocks are then not known
        return tuple


def nvml_reader(uuid: str) -> Callable[[], tuple[float, ...]]:
    """A function that reads the GPU with this UUID. Raises pynvml.NVMLError."""
    import pynvml as nvml

    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)

    def read() -> tuple[float, ...]:
        try:
            return (
                float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
                float(nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
                float(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),  # an older name, which all drivers know
                float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
                nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            )
        except nvml.NVMLError:  # the GPU fell off the bus, which the step will notice
            return ()

    read()
    return read
