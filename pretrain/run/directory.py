"""The directory of a run: one job at a time, and a record of how the job ended.

    runs/<name>/config.yaml  metrics.jsonl  console.log  run_state.json  run.lock  checkpoints/  plots/

`accelerate launch` returns 1 whatever its workers return, so the exit status is also in run_state.json:

    status       running, done, stopped, failed; a job that is `running` without a process was killed
    exit_status  null while running; docs/running.md lists them
    step         last step that is known to be complete
    saved_step   step of the newest durable checkpoint; null: none yet
    attempt      number of starts of the run so far
    reason       for people; null: nothing to report
    time         when this was written, seconds since 1970
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

from pretrain import UserError
from pretrain.files import read_json_object, write_atomically
from pretrain.schema import ConfigError, Problem

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of file systems without flock, such as many Lustre mounts. A run can train there, after a warning."""


class Locked(UserError):
    """Another job uses the run directory."""

    status = 73


class RunDirectory:
    """Holds `path` for this job: locked until the process ends. Raises Locked, or OSError when it cannot be written.

    silent: for ranks other than 0. It has the path and writes nothing.
    """

    def __init__(self, path: Path, *, silent: bool = False):
        self.path, self._silent = path, silent
        if silent:
            return
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock()
        for unfinished in path.glob(".*.tmp"):  # atomic writes that a kill interrupted
            with contextlib.suppress(OSError):  # NFS keeps the name of a file that another machine has open
                unfinished.unlink(missing_ok=True)
        self._writing = threading.Lock()  # the thread that receives signals writes too
        before = read_state(path)
        self._state = {"step": before.get("step"), "saved_step": before.get("saved_step")}
        self._state["attempt"] = before.get("attempt", 0) + 1

    def _lock(self) -> None:
        self._lock_file = open(self.path / "run.lock", "a+")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.seek(0)
            holder = self._lock_file.read().strip()
            raise Locked(f"{self.path}: is in use by {holder}; stop that job or choose another run.name") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warning = f"its file system has no locks ({error.strerror}): make sure that no second job uses it"
            print(f"{self.path}: {warning}", file=sys.stderr, flush=True)
        self._lock_file.truncate(0)
        self._lock_file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        self._lock_file.flush()

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.path / "checkpoints"

    @property
    def stop_file(self) -> Path:
        """A file that users create to stop the run; while it exists, the run does not start."""
        return self.path / "STOP"

    def set_start(self, step: int, saved_step: int | None) -> None:
        """Records where this start resumes, whatever an earlier one had reached."""
        if not self._silent:
            self._state |= {"step": step, "saved_step": saved_step}
            self.write_state("running")

    def write_end(self, status: int, reason: str, step: int | None = None) -> None:
        """Records how the job ends: its exit status, and the reason for people."""
        self.write_state("done" if status == 0 else "stopped", exit_status=status, step=step, reason=reason or None)

    def write_state(
        self,
        status: str,
        *,
        exit_status: int | None = None,
        step: int | None = None,
        saved_step: int | None = None,
        reason: str | None = None,
    ) -> None:
        """Writes run_state.json; a step that is None keeps its value."""
        if self._silent:
            return
        known = {name: value for name, value in (("step", step), ("saved_step", saved_step)) if value is not None}
        self._state |= {"status": status, "exit_status": exit_status, "reason": reason, "time": time.time(), **known}
        self.write_text("run_state.json", json.dumps(self._state) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file of the run, atomically."""
        if not self._silent:
            with self._writing:
                write_atomically(self.path / name, text)


def take_directory(path: Path, rank: int) -> tuple[RunDirectory, UserError | None]:
    """(this rank's directory, why rank 0 could not lock it). The others learn of a refusal once they have joined rank 0."""
    refusal = None
    if rank == 0:
        try:
            directory = RunDirectory(path)
            directory.write_state("running")
            return directory, None
        except Locked as error:
            refusal = error
        except OSError as error:
            refusal = ConfigError([Problem("run.directory", f"{path} cannot be written: {error}; choose another")])
    return RunDirectory(path, silent=True), refusal


def read_state(path: Path) -> dict:
    """run_state.json of a run; empty if there is none that can be read."""
    return read_json_object(path / "run_state.json")
