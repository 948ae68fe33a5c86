"""The folder of a run: one job at a time, and the truth about how the job ended.

    runs/<name>/config.yaml  metrics.jsonl  console.log  run_state.json  run.lock  checkpoints/  plots/

`accelerate launch` returns 1 whatever its workers return, so the exit status also stands in run_state.json.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path


class Locked(Exception):
    """Another job uses the run directory."""


class RunDirectory:
    """Rank 0's hold on `directory`, locked until the process ends. Raises Locked, or OSError when it cannot be written."""

    def __init__(self, directory: Path):
        self.path = directory
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = open(directory / "run.lock", "a+")  # noqa: SIM115 -- held for life
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            raise Locked(
                f"{directory}: is in use by {self._lock.read().strip()}; stop that job or choose another run.name"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        self._lock.flush()

    def write_state(self, status: str, *, exit_status: int | None = None, step: int | None = None, reason: str = "") -> None:
        """run_state.json: status is running, done, stopped, diverged or failed; exit_status as documented in the README."""
        state = {"status": status, "exit_status": exit_status, "step": step, "reason": reason, "time": time.time()}
        self.write_text("run_state.json", json.dumps(state) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """A small file of the run, replaced as a whole."""
        temporary = self.path / f".{name}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path / name)
