"""A run seen from outside, by the files in its folder alone: for a screen and a page. Writes nothing and imports no torch.

It may read while the run is started, killed, resumed or moved. A run of another machine, on a shared file system, looks the
same but for one thing: whether its process is alive is known only on the machine of rank 0.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from pathlib import Path
from typing import NamedTuple

from pretrain.checkpoint.manifest import Checkpoint, CheckpointError
from pretrain.files import read_json_object
from pretrain.report.history import History
from pretrain.report.records import Tail
from pretrain.run.directory import read_state

LEAST_QUIET_SECONDS = 300.0
_SIGNS_OF_LIFE = ("metrics.jsonl", "console.log", "run_state.json", "ledger.json")
_HOLDER = re.compile(r"process (\d+) on (\S+) since ")


class Status(NamedTuple):
    """What a run is doing."""

    kind: str
    """waiting, running, quiet, killed, done, stopped, failed."""
    text: str
    """A sentence about it; empty when the kind says all."""

    @property
    def is_alarm(self) -> bool:
        """True if a person should look at it."""
        return self.kind in ("quiet", "killed", "failed")


class Saved(NamedTuple):
    """A complete checkpoint."""

    step: int
    bytes: int
    time: float
    """When it was complete, seconds since 1970."""


class View:
    """The run in the folder `path`, which need not exist yet. `refresh` reads what is new."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.history = History()
        self.state: dict = {}
        """run_state.json."""
        self.environment: dict = {}
        """environment.json."""
        self.checkpoints: list[Saved] = []
        """In the order of their steps."""
        self.heard = 0.0
        """When the run last wrote one of its files, seconds since 1970; 0: never."""
        self._tail = Tail(path)
        self._seen: dict[str, Saved | None] = {}

    @property
    def name(self) -> str:
        """The name of the run, which is that of its folder."""
        return self.path.resolve().name

    @property
    def fraction_read(self) -> float:
        """Of metrics.jsonl, below 1 while `refresh` has more to read."""
        return self._tail.fraction

    @property
    def unreadable(self) -> int:
        """Complete lines of metrics.jsonl that are not records."""
        return self._tail.unreadable

    @property
    def total_steps(self) -> int | None:
        """The length of the run; None: not known yet."""
        return self.environment.get("total_steps")

    @property
    def starts(self) -> list[dict]:
        """One entry for each start that made steps of this run: step, time, world_size, device, versions, ..."""
        found = self.environment.get("starts")
        return found if isinstance(found, list) else []

    @property
    def settings(self) -> str:
        """config.yaml; empty if there is none."""
        return self._text("config.yaml")

    @property
    def invoice(self) -> str:
        """invoice.txt, which a start writes at its end; empty if there is none."""
        return self._text("invoice.txt")

    def _text(self, name: str) -> str:
        with contextlib.suppress(OSError):
            return (self.path / name).read_text(encoding="utf-8", errors="replace")
        return ""

    def refresh(self) -> bool:
        """Reads what is new, of a long file a part. -> whether that was a part, so that more is to be read at once."""
        void, records = self._tail.read()
        if void:
            self.history = History()
        self.history.add(records)
        self.state = read_state(self.path)
        self.environment = read_json_object(self.path / "environment.json")
        self.checkpoints = sorted(filter(None, map(self._saved, self._folders())))
        self.heard = max(_changed(self.path / each) for each in _SIGNS_OF_LIFE)
        return self._tail.fraction < 1

    def read_all(self) -> View:
        """Reads everything there is. -> itself."""
        while self.refresh():
            pass
        return self

    def _folders(self) -> list[Path]:
        with contextlib.suppress(OSError):
            return [Path(each) for each in os.scandir(self.path / "checkpoints") if each.name.startswith("step_")]
        return []

    def _saved(self, folder: Path) -> Saved | None:
        """The checkpoint in a folder; None if it is not complete, or was removed meanwhile."""
        if folder.name not in self._seen:
            try:
                checkpoint = Checkpoint(folder)
                size = sum(each.get("bytes", 0) for each in checkpoint.manifest()["files"].values())
                self._seen[folder.name] = Saved(checkpoint.step, size, _changed(folder / "manifest.json"))
            except (CheckpointError, OSError, ValueError):
                return None
        return self._seen[folder.name]

    # ------------------------------------------------------------ what it is doing

    def status(self, now: float | None = None) -> Status:
        """What the run is doing at the time `now`, seconds since 1970."""
        now = time.time() if now is None else now
        kind, reason = self.state.get("status"), self.state.get("reason") or ""
        if kind is None:
            what = "no run_state.json yet in" if self.path.is_dir() else "no such folder yet:"
            return Status("waiting", f"{what} {self.path}")
        if kind != "running":
            number = self.state.get("exit_status")
            status = f"exit status {number}" if number else ""
            broken = kind == "failed" or number in (1, 2, 70, 74, 77)
            return Status("failed" if broken else kind, ": ".join(filter(None, (status, reason))))
        if dead := self._dead_process():
            saved = self.state.get("saved_step") or 0
            return Status("killed", f"{dead}; started again, the run resumes from step {saved:,}")
        quiet, usual = now - self.heard, self.history.seconds_per_line
        if quiet > max(LEAST_QUIET_SECONDS, 10 * usual if usual == usual else 0.0):
            return Status(
                "quiet", "nothing written for a long time; SIGUSR1 to a rank writes the stacks of all ranks to stacks/"
            )
        return Status("running", "")

    def _dead_process(self) -> str:
        """A sentence if the process that holds the folder ran on this machine and has exited; else empty."""
        try:
            holder = _HOLDER.match((self.path / "run.lock").read_text(errors="replace"))
        except OSError:
            return ""
        if not holder or holder[2] != socket.gethostname():
            return ""
        try:
            os.kill(int(holder[1]), 0)
        except ProcessLookupError:
            return f"process {holder[1]} has exited and recorded no end"
        except (OSError, OverflowError):  # of another user: it is alive
            pass
        return ""


def _changed(path: Path) -> float:
    """When a file was last written, seconds since 1970; 0: there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
