"""Requests to stop: received at any moment on any rank, agreed on by all ranks in a collective that runs anyway.

    SIGTERM         save, status 75: a spot notice, a scheduler, or a launcher whose worker died or that was killed itself.
                    SIGUSR2, SIGXCPU, SIGPWR (notices of schedulers) and SIGHUP (the terminal closed) do the same, unless
                    the process was started with them ignored, as nohup does. SIGUSR1 writes stacks (watchdog.py)
    SIGINT          save, status 130: Ctrl-C. A second one exits at once
    the file STOP   in the run's directory, seen by rank 0: save, status 130. The run does not start while the file exists
    a lost folder   the run's directory was removed or renamed, seen by rank 0: save at its old path, status 74
    the budget      another step and a save would exceed run.budget_dollars, seen by rank 0: save, status 76

Before the first step there is nothing to save, and a signal ends the process at once. Later, SIGTERM starts a deadline: a rank
that has no durable checkpoint by then, because a peer exited and the collective will never end, exits without one.

A thread receives the signals: Python's own handlers run in the main thread, which may hang in a collective forever.
This module knows processes and signals, not what is saved.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import psutil

STOPPED = (("SIGTERM", 75), ("SIGINT", 130), ("the file STOP", 130), ("the loss of its folder", 74), ("its budget", 76))
"""Sources of requests, in the order of flags, each with the exit status of the run. Nothing restarts what a person stopped."""
PEER_LOST, BUDGET_SPENT, STOPPED_BY_PERSON = 75, 76, 130
NOTICES = [getattr(signal, name) for name in ("SIGHUP", "SIGUSR2", "SIGXCPU", "SIGPWR") if hasattr(signal, name)]
"""Signals that have the effect of SIGTERM."""
_FLAG = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "SIGINT"} | dict.fromkeys(NOTICES, "SIGTERM")
_ACCELERATE = ("accelerate", "accelerate-launch", "accelerate_cli.py")
_PARENT_POLL_SECONDS, _LAST_WORDS_SECONDS = 1.0, 5.0


class StopRequest:
    """Turns signals into requests until `close`. Create it in the main thread, before slow imports.

    exits: whether the process exits after the run. Once the job ends because of SIGTERM, further ones then change nothing until
        that exit: schedulers and launchers repeat the signal, which would replace the status of a run that has saved.
    deadline_seconds: from SIGTERM to a durable checkpoint, `checkpoint.deadline_seconds`.
    stop_file: the path of the file STOP, on the rank that watches it.
    folder_lost(): why the run's directory cannot be used any longer, on the rank that watches it; empty: it can.
    budget_is_reached(): whether the run must stop to stay within its budget, on the rank that counts.
    reason_of_peer(): status and reason of another rank that ended this job, where it has left word; None: it has not.
    is_training: whether the first step may have begun.
    last_words(status, reason): called before the process exits at once; on rank 0 it writes run_state.json.
    """

    def __init__(self, exits: bool = False) -> None:
        self._exits = exits
        self.deadline_seconds: float | None = None
        self.stop_file: Path | None = None
        self._know_no_job()
        self.received: str | None = None
        self.is_training, self._deadline, self._saved_status = False, None, None
        # A launcher that is killed cannot tell its workers; a shell that ends must not end a job started by hand.
        self._parent = os.getppid() if _is_launched() else None
        self._notices, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        self._wakeup, self._previous_wakeup = wakeup, signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        heard = [each for each in _FLAG if each not in NOTICES or signal.getsignal(each) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, _do_nothing) for number in heard}
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()

    def _know_no_job(self) -> None:
        self.folder_lost: Callable[[], str] = lambda: ""
        self.budget_is_reached: Callable[[], bool] = lambda: False
        self.reason_of_peer: Callable[[], tuple[int, str] | None] = lambda: None
        self.last_words: Callable[[int, str], None] = lambda status, reason: None

    def close(self) -> None:
        """Restores the previous signal handlers, and lets go of the job, whose folder stays locked while anything holds it."""
        self._know_no_job()
        if self._previous:
            is_over = self._exits and self._deadline is not None
            for number, handler in self._previous.items():
                signal.signal(number, signal.SIG_IGN if is_over and _FLAG[number] == "SIGTERM" else handler)
            signal.set_wakeup_fd(self._previous_wakeup)
            self._previous = {}
            self._wake()
            self._thread.join()
            os.close(self._wakeup)
            os.close(self._notices)

    # ---------------------------------------------------------------- for the loop

    def training(self) -> None:
        """Leaves requests to the loop from now on: there is something to save."""
        self.is_training = True

    def flags(self) -> list[int]:
        """This rank's requests in the order of STOPPED: 1 where there is one, else 0."""
        signals = [int(self.received == name) for name, _ in STOPPED[:2]]
        stop_file = self.stop_file is not None and self.stop_file.exists()
        return [*signals, int(stop_file), int(bool(self.folder_lost())), int(self.budget_is_reached())]

    def agreed(self, status: int) -> None:
        """Notes that all ranks will save and exit with `status`: the deadline also holds on ranks without a signal."""
        if status == 75:
            self._start_deadline()

    def seconds_left(self) -> float | None:
        """Seconds until the deadline; None: there is none."""
        return None if self._deadline is None else self._deadline - time.monotonic()

    def saved(self, status: int) -> None:
        """Notes that the checkpoint is durable and run_state.json written: the deadline may cut the rest short."""
        self._saved_status = status

    def leave(self, status: int, reason: str) -> None:
        """Exits now, without cleaning up, which could wait for a peer that has exited."""
        end = threading.Timer(_LAST_WORDS_SECONDS, os._exit, [status])  # the storage may hang
        end.daemon = True
        end.start()
        with contextlib.suppress(Exception):
            if status == PEER_LOST and self._saved_status is None:
                status, reason = self.reason_of_peer() or (status, reason)
            if self._saved_status is None:
                self.last_words(status, reason)
            print(f"pretrain: process {os.getpid()}: {reason}", file=sys.stderr, flush=True)
        os._exit(status)

    # ---------------------------------------------------------------- the thread

    def _watch(self) -> None:
        while self._previous:
            ready, _, _ = select.select([self._notices], [], [], self._wait_seconds())
            if ready:
                self._receive(os.read(self._notices, 1)[0])
            elif self._deadline is not None and time.monotonic() >= self._deadline:
                self._pass_deadline()
            elif self._parent is not None and os.getppid() != self._parent:
                self._parent = None
                self._receive(signal.SIGTERM, "the launcher's exit")

    def _wait_seconds(self) -> float | None:
        waits = [] if self._parent is None else [_PARENT_POLL_SECONDS]
        if self._deadline is not None:
            waits.append(max(0.0, self._deadline - time.monotonic()))
        return min(waits, default=None)

    def _receive(self, number: int, who: str | None = None) -> None:
        if number not in _FLAG:
            return  # only a wake-up, or another signal that has a handler in Python
        name = _FLAG[number]
        if not self.is_training:
            who = who or signal.Signals(number).name
            self.leave(dict(STOPPED)[name], f"stopped by {who} before the first step: nothing to save")
        if name == self.received == "SIGINT":
            self.leave(STOPPED_BY_PERSON, "exited at the second SIGINT; steps after the last checkpoint are lost")
        if who is None and number in NOTICES and self.received is None:
            text = f"process {os.getpid()} received {signal.Signals(number).name}, which has the effect of SIGTERM"
            print(f"pretrain: {text}", file=sys.stderr, flush=True)
        self.received = self.received or name
        if name == "SIGTERM":
            self._start_deadline()

    def _start_deadline(self) -> None:
        if self._deadline is None and self.deadline_seconds is not None:
            self._deadline = time.monotonic() + self.deadline_seconds
            self._wake()

    def _wake(self) -> None:
        os.write(self._wakeup, b"\0")

    def _pass_deadline(self) -> None:
        limit = f"{self.deadline_seconds:g} s (checkpoint.deadline_seconds)"
        if self._saved_status is not None:
            self.leave(self._saved_status, f"checkpoint saved, but shutdown took over {limit}; exiting now")
        cause = "another rank exited or hangs, or a step and a save take longer"
        self.leave(PEER_LOST, f"peer_lost: no durable checkpoint {limit} after SIGTERM: {cause}")


def _is_launched() -> bool:
    """True under torchrun or accelerate. For one process accelerate only sets variables, which a shell may export, too."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    with contextlib.suppress(psutil.Error):
        words = psutil.Process(os.getppid()).cmdline()
        return any(Path(word).name in _ACCELERATE or word.startswith("accelerate.commands.") for word in words)
    return False


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Keeps the signal from ending the process; the thread receives it on its own."""


def exit_status(flags: list[int]) -> int:
    """Exit status for the flags of all ranks, summed; 0: no request. A person's request wins over SIGTERM."""
    return max((status for (_, status), count in zip(STOPPED, flags, strict=True) if count), default=0)


def who_asked(flags: list[int]) -> str:
    """The sources of the requests, for people."""
    return " and ".join(name for (name, _), count in zip(STOPPED, flags, strict=True) if count)


def is_peer_lost(error: BaseException) -> bool:
    """True if a collective failed because of another process. Gloo has no errors of its own: its messages name its files."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"DistBackendError", "DistNetworkError", "DistStoreError"}) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )
