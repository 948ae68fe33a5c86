"""Hang detection: every rank writes its Python stacks, and one line names the rank that is behind.

    <run>/stacks/rank_N.txt     stacks and newest collectives of rank N, written when a rank has made no progress for
                                `engine.timeout_seconds`, or on SIGUSR1 to any rank
    <run>/stacks/collectives_N  all collectives that PyTorch's flight recorder holds, for its program torchfrtrace

All ranks make the same sequence of engine calls, so the others wait for the rank with the lowest count of calls. A thread
exchanges the counts through the store at which the ranks met, which works even while a collective hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

RECORDED_COLLECTIVES = 2000
"""Enough for a few steps of the deepest models; PyTorch's newer versions have the same default."""
SHOWN_COLLECTIVES = 12
_NEVER_SEEN = (-1, 0, "starting", 0)


class Watchdog:
    """The watchdog of one rank. `mark` costs a fraction of a microsecond; a thread does the rest, every `interval` seconds."""

    def __init__(self, rank: int, world_size: int, timeout_seconds: float):
        self.rank, self.world_size, self.timeout_seconds = rank, world_size, timeout_seconds
        self.interval = interval(timeout_seconds)
        self.step, self.calls, self.doing, self.since = 0, 0, "starting", time.monotonic()
        self._thread: threading.Thread | None = None

    def mark(self, doing: str) -> None:
        """Records that this rank begins a call that all ranks make in the same order."""
        self.calls += 1
        self.alive(doing)

    def alive(self, doing: str) -> None:
        """Records progress of this rank in work that it may be doing alone."""
        self.doing, self.since = doing, time.monotonic()

    def begin_step(self, step: int) -> None:
        """Records that this rank waits for the data of `step`."""
        self.step = step
        self.mark("waiting for data")

    def start(self, folder: Path) -> None:
        """Starts the thread; stacks will be written to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank_{self.rank}.txt"
        self._file = open(self.path, "a")
        faulthandler.register(signal.SIGUSR1, file=self._file, all_threads=True)  # in C: works even while Python is blocked
        self._seen_bytes, self._seen_requests = os.fstat(self._file.fileno()).st_size, 0
        self._store = _store() if self.world_size > 1 else dist.HashStore()
        self._store.set(f"host/{self.rank}", socket.gethostname())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stops the thread; a rank that wrote no stacks leaves no file."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        faulthandler.unregister(signal.SIGUSR1)
        self._file.close()
        with contextlib.suppress(OSError):  # other ranks may have stacks there, or a user moved the folder
            if not self.path.stat().st_size:
                self.path.unlink()
                self.path.parent.rmdir()

    def hosts(self) -> list[str]:
        """The machine of each rank; empty names of ranks that have not started their watchdog, or without the store."""
        keys = [f"host/{rank}" for rank in range(self.world_size)]
        try:
            return [self._store.get(key).decode() if self._store.check([key]) else "" for key in keys]
        except RuntimeError:  # the process that holds the store exited
            return [""] * self.world_size

    # ---------------------------------------------------------------- the thread

    def _watch(self) -> None:
        ticks, hung_call, hung_tick, before = 0, -1, -1, []
        while not self._stop.wait(self.interval):
            ticks += 1
            try:
                self._exchange(ticks)
                if time.monotonic() - self.since > self.timeout_seconds and self.calls != hung_call:
                    hung_call, hung_tick, before = self.calls, ticks, self._positions()
                    self._write_stacks()
                    self._seen_requests = self._store.add("requests", 1)
                elif ticks == hung_tick + 3 and self.calls == hung_call:  # by now every live rank has published again
                    self._name_the_rank_behind(before, self._positions())
            except (RuntimeError, OSError) as error:  # the process that holds the store exited, or the disk is full
                if not self._stop.is_set():
                    print(f"watchdog: rank {self.rank} cannot reach the others: {str(error).splitlines()[0]}", file=sys.stderr)
                return

    def _exchange(self, ticks: int) -> None:
        """Publishes this rank's position; writes its stacks if another rank has requested those of all ranks."""
        self._store.set(f"at/{self.rank}", json.dumps([self.calls, self.step, self.doing, ticks]))
        if os.fstat(self._file.fileno()).st_size > self._seen_bytes:  # a signal made this rank write
            self._write_collectives()
            self._seen_requests = self._store.add("requests", 1)
        requests = self._store.add("requests", 0)
        if requests > self._seen_requests:
            self._seen_requests = requests
            self._write_stacks()

    def _name_the_rank_behind(self, before: list[tuple], now: list[tuple]) -> None:
        """Prints one line, on the lowest of the waiting ranks only."""
        furthest = max(calls for calls, *_ in now)
        if self.rank == [calls for calls, *_ in now].index(furthest):
            line = hang_line(before, now, time.monotonic() - self.since, self.path.parent, self.hosts())
            print(line, file=sys.stderr, flush=True)

    def _positions(self) -> list[tuple[int, int, str, int]]:
        """(calls, step, doing, ticks) of every rank."""
        keys = [f"at/{rank}" for rank in range(self.world_size)]
        return [tuple(json.loads(self._store.get(key))) if self._store.check([key]) else _NEVER_SEEN for key in keys]

    def _write_stacks(self) -> None:
        self._file.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self.rank}, step {self.step}, in {self.doing}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        self._write_collectives()

    def _write_collectives(self) -> None:
        try:
            if self.world_size > 1:
                self._file.write("\n".join(["", "newest collectives, the newest last:", *newest_collectives(), ""]))
                if dump := _recorder(""):
                    self.path.with_name(f"collectives_{self.rank}").write_bytes(dump())
        except Exception as error:  # internals of PyTorch: the watchdog has yet to name the rank that is behind
            self._file.write(f"\nnewest collectives: not known ({error!r})\n")
        self._file.flush()
        self._seen_bytes = os.fstat(self._file.fileno()).st_size


def interval(timeout_seconds: float) -> float:
    """Seconds between two checks of the watchdog."""
    return min(10.0, timeout_seconds / 20)


def record_collectives() -> None:
    """Turns PyTorch's flight recorder on, unless the environment configures it. Call it before the process group is made."""
    if not {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"} & os.environ.keys():
        os.environ["TORCH_FR_BUFFER_SIZE"] = str(RECORDED_COLLECTIVES)


def _recorder(kind: str) -> Callable[[], bytes] | None:
    """The function of the flight recorder that dumps what it holds; None: this build of PyTorch has none. kind: `_json`, or
    empty for the format of torchfrtrace, a pickle that nothing here reads."""
    names = [f"_dump_nccl_trace{kind}"] * torch.cuda.is_available() + [f"_dump_fr_trace{kind}"]
    return next((getattr(c10d, name) for name in names if hasattr(c10d, name)), None)


def newest_collectives() -> list[str]:
    """A line for each of this process's newest collectives, the newest last; numbers are those of a group of ranks."""
    dump = _recorder("_json")
    entries = json.loads(dump()).get("entries", []) if dump else []
    return [
        f"  collective {entry['collective_seq_id']} of group {' '.join(entry['process_group'])}: {entry['profiling_name']} of "
        f"{entry['input_sizes']}, {'retired' if entry['retired'] else entry['state']}, "
        f"{time.time() - entry['time_created_ns'] / 1e9:.1f} s ago"
        for entry in entries[-SHOWN_COLLECTIVES:]
    ]


def hang_line(before: list[tuple], now: list[tuple], seconds: float, folder: Path, hosts: list[str] | None = None) -> str:
    """Describes a hang in one line, from the (calls, step, doing, ticks) of every rank at two times. hosts: of the ranks; they
    are named if there are several."""
    places = [f" on {host}" if len(set(hosts)) > 1 else "" for host in hosts] if hosts else [""] * len(now)
    furthest = max(calls for calls, *_ in now)
    _, step, doing, _ = max(now)
    behind = [
        f"rank {rank}{places[rank]} (step {rank_step}, in {rank_doing}{'' if ticks > old[3] else ', not responding'})"
        for rank, (old, (calls, rank_step, rank_doing, ticks)) in enumerate(zip(before, now, strict=True))
        if calls < furthest or ticks == old[3]
    ]
    named = ", ".join(behind[:8]) + (f" and {len(behind) - 8} more" if len(behind) > 8 else "")
    blame = f"waiting for {named}" if behind else f"all {len(now)} ranks at the same call" if len(now) > 1 else "alone"
    return f"hang: no progress for {seconds:.0f} s in step {step}, in {doing}, {blame}; stacks: {folder}"


def _store() -> dist.Store:
    """A separate connection to the store at which the ranks met; the main thread may be blocked on its own."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"watchdog/{attempt}", dist.TCPStore(host, port, is_master=False))
