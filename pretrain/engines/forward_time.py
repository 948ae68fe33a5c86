"""How long the forward passes of this rank take without waiting for other ranks, which tells a slow rank from those that wait
for it: in a synchronous run, the steps of all ranks take equally long.

A forward pass of `ddp`, `zero1` and `zero2` contains no collective, so it is timed as a whole. `fsdp2` and `zero3` gather
weights around each block, so the blocks are timed. Ranks that share a model or a sequence (`engine.parallel`) wait for one
another inside: such a group has one speed, that of its slowest rank. Sources: the sections of Megatron-LM's StragglerDetector
and of NVIDIA's resiliency extension, both of which time compute on each rank and compare it across ranks.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable

import torch


class ForwardTimer:
    """A context that times forward passes, or their blocks: by events on a GPU, whose host never waits for them. Passes without
    gradients (validation, generation) do not count."""

    def __init__(self, device: torch.device, parts: int = 1):
        """parts: timed contexts per forward pass."""
        self._on_gpu, self._parts = device.type == "cuda", parts
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._unused: list[torch.cuda.Event] = []
        self._clear()

    def _clear(self) -> None:
        self._count, self._seconds, self._cpu_seconds = 0, 0.0, 0.0

    def __enter__(self) -> None:
        self._counts = torch.is_grad_enabled()
        if not self._counts:
            return
        if self._on_gpu:
            self._pending.append((self._record(), None))
        else:
            self._began, self._cpu_began = time.perf_counter(), time.thread_time()

    def __exit__(self, *error: object) -> None:
        if not self._counts:
            return
        if self._on_gpu:
            self._pending[-1] = (self._pending[-1][0], self._record())
        else:
            self._count += 1
            self._seconds += time.perf_counter() - self._began
            self._cpu_seconds += time.thread_time() - self._cpu_began

    def _record(self) -> torch.cuda.Event:
        event = self._unused.pop() if self._unused else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, function: Callable) -> Callable:
        """The function, run in this context."""

        @functools.wraps(function)
        def run(*args, **kwargs):
            with self:
                return function(*args, **kwargs)

        return run

    def read(self) -> tuple[float, float]:
        """(seconds of a forward pass, fraction of them in which this thread used a CPU; 1 on a GPU), over the passes completed
        since the last call; NaN if there were none. Waits for nothing."""
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.popleft()
            self._count += 1
            self._seconds += begin.elapsed_time(end) / 1000
            self._unused += [begin, end]
        if self._on_gpu:
            self._cpu_seconds = self._seconds
        if not self._count:
            return float("nan"), float("nan")
        result = self._parts * self._seconds / self._count, self._cpu_seconds / max(self._seconds, 1e-9)
        self._clear()
        return result
