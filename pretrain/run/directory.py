"""The folder of a run: one job at a time, and the truth about how the job ended.

    runs/<name>/config.yaml  metrics.jsonl  console.log  run_state.json  run.lock  checkpoints/  plots/

`accelerate launch` returns 1 whatever its workers return, so the exit status also stands in run_state.json:

    status       running, done, stopped, failed; a job that is gone but `running` was killed
    exit_status  null while running; docs/running.md says what each means
    step         last step that is known to be finished
    saved_step   step of the newest durable checkpoint; null: none yet
    attempt      how often the run was started
    reason       for people; null: nothing to say
    time         when this was written, seconds since 1970
"""

from __future__ import annotations

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

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Of file systems without flock, such as Lustre as it is often mounted: no reason not to train there."""


class Locked(UserError):
    """Another job uses the run directory."""

    status = 73


class RunDirectory:
    """Rank 0's hold on `directory`, locked until the process ends. Raises Locked, or OSError when it cannot be written."""

    def __init__(self, directory: Path):
        self.path = directory
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = open(directory / "run.lock", "a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            raise Locked(
                f"{directory}: is in use by {self._lock.read().strip()}; stop that job or choose another run.name"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warning = f"{directory}: its file system has no locks ({error.strerror}): see to it that no second job uses it"
            print(warning, file=sys.stderr, flush=True)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        self._lock.flush()
        self._writing = threading.Lock()  # the thread that hears signals writes too
        before = read_state(directory)
        self._state = {"step": before.get("step"), "saved_step": before.get("saved_step")}
        self._state["attempt"] = before.get("attempt", 0) + 1

    def stand_at(self, step: int, saved_step: int | None) -> None:
        """Where this start goes on, whatever an earlier one had reached."""
        self._state |= {"step": step, "saved_step": saved_step}
        self.write_state("running")

    def write_state(
        self,
        status: str,
        *,
        exit_status: int | None = None,
        step: int | None = None,
        saved_step: int | None = None,
        reason: str | None = None,
    ) -> None:
        """run_state.json, as the module's head says; a step that is not given stays as it was."""
        known = {name: value for name, value in (("step", step), ("saved_step", saved_step)) if value is not None}
        self._state |= {"status": status, "exit_status": exit_status, "reason": reason, "time": time.time(), **known}
        self.write_text("run_state.json", json.dumps(self._state) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """A small file of the run, replaced as a whole."""
        temporary = self.path / f".{name}.tmp"
        with self._writing:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / name)


def read_state(directory: Path) -> dict:
    """run_state.json of a run; empty where there is none that can be read."""
    try:
        state = json.loads((directory / "run_state.json").read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}
