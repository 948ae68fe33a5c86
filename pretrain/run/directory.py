"""The directory of a run: one job at a time, and a record of how the job ended.

    runs/<name>/config.yaml  metrics.jsonl  console.log  run_state.json  run.lock  checkpoints/  plots/

`accelerate launch` returns 1 whatever its workers return, so the exit status is also in run_state.json:

    status       running, done, stopped, failed; a job that is `running` without a process was killed
    exit_status  null while running; docs/running.md lists them
    step         last step that is known to be complete
    saved_step   step of the newest durable checkpoint; null: none yet
    mirrored_step  step of the newest checkpoint in checkpoint.mirror; null: none, or no mirror
    attempt      number of starts of the run so far
    reason       for people; null: nothing to report
    time         when this was written, seconds since 1970

The lock is held on the folder itself and on run.lock, so that a run.lock that someone removes does not let a second job in. NFS
has no locks of folders; there `check`, between any two steps, takes a removed run.lock again or notices that another job has.
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
import weakref
from datetime import datetime
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
        self.lost = ""
        """Why the job must stop: its folder was removed or renamed. Empty: it was not."""
        if silent:
            return
        self._texts: dict[str, str] = {}  # what `write_text` wrote, for a folder that is lost
        self._open_folder()
        self._lock()
        self._checked = self._is_ours()  # else the file system cannot tell
        for unfinished in path.glob(".*.tmp"):  # atomic writes that a kill interrupted
            with contextlib.suppress(OSError):  # NFS keeps the name of a file that another machine has open
                unfinished.unlink(missing_ok=True)
        self._writing = threading.Lock()  # the thread that receives signals writes too
        before = read_state(path)
        self._state = {name: before.get(name) for name in ("step", "saved_step", "mirrored_step")}
        self._state["attempt"] = (before.get("attempt") or 0) + 1

    def _open_folder(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._folder)
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._locked() from None
        except OSError:  # NFS locks only files that are open for writing: run.lock is
            pass

    def _lock(self) -> None:
        self._lock_file = open(self.path / "run.lock", "a+")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._locked() from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warning = f"its file system has no locks ({error.strerror}): make sure that no second job uses it"
            print(f"{self.path}: {warning}", file=sys.stderr, flush=True)
        self._holder = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now().isoformat(' ')}"
        self._lock_file.truncate(0)
        self._lock_file.write(self._holder)
        self._lock_file.flush()

    def _locked(self) -> Locked:
        try:
            holder = (self.path / "run.lock").read_text(errors="replace").strip()
        except OSError:
            holder = ""
        return Locked(f"{self.path}: is in use by {holder or 'another job'}; stop that job or choose another run.name")

    def check(self) -> str:
        """A quick look between steps at whether the folder is still this job's. -> `lost`.

        A run.lock that was removed is taken again. In place of a folder that was removed or renamed a new one is made, for a
        last checkpoint. Raises Locked if another job has taken the place; nothing more is written then.
        """
        if self._silent or self.lost or not self._checked or self._is_ours():
            return "" if self._silent else self.lost
        before, what = self._folder, f"{self.path} was removed or renamed{_name_of(self._folder)}"
        try:
            if not self._is_folder(before):
                self._open_folder()
            self._lock()
        except Locked:
            self._silent = True
            raise
        except OSError as error:
            raise OSError(error.errno, f"{what}, and cannot be made again: {error.strerror}") from None
        if self._folder != before:
            self.lost = what
            for name, text in list(self._texts.items()):
                self.write_text(name, text)
        return self.lost

    def _is_ours(self) -> bool:
        """True if run.lock is the file that this job has locked, or says so: some file systems number files anew."""
        lock = self.path / "run.lock"
        try:
            return os.path.samestat(os.stat(lock), os.fstat(self._lock_file.fileno())) or lock.read_text() == self._holder
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, UnicodeDecodeError) as error:
            return isinstance(error, OSError)  # a failing disk is found out by what must be written

    def _is_taken(self) -> bool:
        """True if run.lock is that of another job."""
        return self._checked and not self._is_ours() and (self.path / "run.lock").exists()

    def _is_folder(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(descriptor))
        except OSError:
            return False

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.path / "checkpoints"

    @property
    def saved_step(self) -> int | None:
        """Step of the newest checkpoint that this start or an earlier one saved; None: none, or a rank other than 0."""
        return None if self._silent else self._state["saved_step"]

    @property
    def stop_file(self) -> Path:
        """A file that users create to stop the run; while it exists, the run does not start."""
        return self.path / "STOP"

    def reached(self, step: int) -> None:
        """Notes the last complete step; every later record of the state has it."""
        if not self._silent:
            self._state["step"] = step

    def set_start(self, step: int, saved_step: int | None) -> None:
        """Records where this start resumes, whatever an earlier one had reached."""
        if not self._silent:
            self._state |= {"step": step, "saved_step": saved_step}
            self.write_state("running")

    def mirrored(self, step: int) -> None:
        """Records the newest checkpoint in the mirror; callable from any thread."""
        if not self._silent:
            self._write_state({"mirrored_step": step})

    def follow(self, text: bytes) -> None:
        """Continues the count of starts of a run_state.json that another folder of this run had."""
        with contextlib.suppress(ValueError, AttributeError):
            before = json.loads(text).get("attempt")
            self._state["attempt"] = max(self._state["attempt"], 1 + (before if type(before) is int else 0))

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
        self._write_state({"status": status, "exit_status": exit_status, "reason": reason, "time": time.time(), **known})

    def _write_state(self, changes: dict) -> None:
        with self._writing:
            self._state |= changes
            self._write("run_state.json", json.dumps(self._state) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file of the run, atomically."""
        if not self._silent:
            with self._writing:
                self._write(name, text)

    def _write(self, name: str, text: str) -> None:
        self._texts[name] = text
        if not self._is_taken():  # a save may end between the loss of the place and the next `check`
            write_atomically(self.path / name, text)


def _name_of(descriptor: int) -> str:
    """ " (now NAME)" for an open folder that was renamed, where the system can tell (Linux); else empty."""
    try:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""
    return "" if name.endswith(" (deleted)") else f" (now {name})"


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
    """run_state.json of a run, without values of a wrong kind; empty if there is none that can be read."""
    read = read_json_object(path / "run_state.json")
    numbers = ("exit_status", "step", "saved_step", "mirrored_step", "attempt")
    kinds = dict.fromkeys(("status", "reason"), str) | dict.fromkeys(numbers, int)
    return {name: value for name, value in read.items() if value is None or type(value) is kinds.get(name, type(value))}
