"""A profile of a few steps (`log.profile_steps`): a trace, the costliest operators, and on GPUs a history of the memory.

    <run>/profile/steps_A_B.json       Chrome trace of rank 0, for https://ui.perfetto.dev or chrome://tracing
    <run>/profile/steps_A_B.txt        the summary that is also printed
    <run>/profile/memory_A_B.pickle    on GPUs: for https://pytorch.org/memory_viz

It watches and changes nothing: the profiled steps compute the same numbers, only slower.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import DeviceType

KINDS = {
    "collectives": re.compile(r"nccl|gloo|c10d::|_c10d_functional|record_param_comms", re.IGNORECASE),
    "attention": re.compile(r"attention|flash|fmha|sdpa", re.IGNORECASE),
    "products": re.compile(r"aten::\w*mm$|::linear|looped_product|gemm|nvjet|cutlass|xmma|_mm_", re.IGNORECASE),
}
"""What an operator or a kernel is, by its name; the first match counts."""
SHOWN = 10
MEMORY_EVENTS = 200_000  # allocations and frees to keep, the newest


class StepProfile:
    """The profile of steps `first` to `last` on rank 0; on other ranks, and where `steps` is None, all calls do nothing."""

    def __init__(
        self, folder: Path, steps: tuple[int, int] | None, device: torch.device, rank: int, say: Callable[[str], None]
    ):
        self._folder, self._device, self._say = folder, device, say
        self._first, self._last = steps if steps and rank == 0 else (0, 0)
        self._profiler: torch.profiler.profile | None = None

    def begin(self, step: int) -> None:
        """To be called before `step`."""
        if self._profiler is None and self._first <= step <= self._last:
            self._began = self._at = step
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
                torch.cuda.synchronize(self._device)  # the steps before are not part of it
                torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
            self._profiler = torch.profiler.profile(activities=activities, acc_events=True)
            self._profiler.start()

    def end(self, step: int) -> None:
        """To be called after `step`."""
        self._at = step
        if step >= self._last:
            self.close()

    def close(self) -> None:
        """Writes what there is: also of a run that ends before `last`."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        steps = f"{self._began}_{self._at}"
        try:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            profiler.stop()
            self._folder.mkdir(exist_ok=True)
            trace = self._folder / f"steps_{steps}.json"
            profiler.export_chrome_trace(str(trace))
            lines = [str(trace), *summary(profiler.key_averages(), self._at - self._began + 1)]
            (self._folder / f"steps_{steps}.txt").write_text("\n".join(lines[1:]) + "\n", encoding="utf-8")
            if self._device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(self._folder / f"memory_{steps}.pickle"))
        # A full disk must not end a run; after an error of the device, that one counts.
        except (OSError, RuntimeError) as error:
            lines = [f"of steps {self._began} to {self._at}: none, {error}"]
        finally:
            if self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)
        for line in lines:
            self._say(f"profile    {line}")


def summary(events: list, steps: int) -> list[str]:
    """Lines: the time of each kind, then the operators that cost most, each without what it calls. events: `key_averages()`.

    On a GPU its kernels count, by device time; otherwise operators, by CPU time, summed over threads.
    """
    on_device = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    if on_device:
        what, cost = "kernel", {event.key: (event.self_device_time_total, event.count) for event in on_device}
    else:
        what, cost = "operator", {event.key: (event.self_cpu_time_total, event.count) for event in events}
    total = sum(microseconds for microseconds, _ in cost.values()) or 1.0
    shares = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, (microseconds, _) in cost.items():
        shares[kind_of(name)] += microseconds / total
    lines = [f"{total / steps / 1000:.2f} ms per step: " + ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items())]
    lines.append(f"   share   ms/step  calls/step  {what}")
    for name, (microseconds, count) in sorted(cost.items(), key=lambda item: -item[1][0])[:SHOWN]:
        lines.append(f"{microseconds / total:8.1%}{microseconds / steps / 1000:10.3f}{count / steps:12.1f}  {name[:90]}")
    return lines


def kind_of(name: str) -> str:
    """A key of `KINDS`, or `other`."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), "other")
