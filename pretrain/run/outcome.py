"""The end of a job: an exit status and a reason, in run_state.json and on standard error, whatever ended it."""

from __future__ import annotations

import os
import sys
from types import TracebackType

from pretrain import UserError
from pretrain.config import Config
from pretrain.engines.base import Engine
from pretrain.report import alarms
from pretrain.run import command_line, memory
from pretrain.run.directory import RunDirectory
from pretrain.run.ledger import Ledger
from pretrain.run.stop import PEER_LOST, StopRequest, is_peer_lost

DONE, FAILED, DIVERGED, STORAGE_FAILED = 0, 1, 70, 74
"""Exit statuses; those of errors that a user can fix are the errors' own (`UserError.status`)."""


class Outcome:
    """A context manager around a job: an error that a user can fix becomes a status and a reason, a bug is recorded and raised.

    engine: set once it has started; it is closed at the end, unless the other ranks may never join.
    ledger: set once it is open.
    has_outputs: set once the run has outputs, which send the alarm of its end; before that, this does.
    """

    def __init__(self, directory: RunDirectory, stop: StopRequest, config: Config):
        self.status, self.reason = FAILED, ""
        self.engine: Engine | None = None
        self.ledger: Ledger | None = None
        self.has_outputs = False
        self._directory, self._stop, self._config, self._agreed = directory, stop, config, False
        self._stop.last_words = self.write_end
        self._stop.reason_of_peer = lambda: memory.reason_of_peer(directory.path)

    def end(self, status: int, reason: str) -> int:
        """Notes the end on which all ranks agree. -> status."""
        self.status, self.reason, self._agreed = status, reason, True
        return status

    def write_end(self, status: int, reason: str) -> None:
        """Records the end in the run's folder. Raises OSError."""
        self._directory.write_end(status, reason)
        self._note_end(status)

    def _note_end(self, status: int) -> None:
        if self.ledger:
            self.ledger.note_end(status)

    def __enter__(self) -> Outcome:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if memory.is_out_of_memory(error):
            error = memory.explain(error, self._config, self.engine, self._directory.path)
        if isinstance(error, UserError | OSError):
            self.status, self.reason = getattr(error, "status", STORAGE_FAILED), str(error)
            self._record("stopped", self.status, self.reason)
        elif error is not None:
            cause = f"{type(error).__name__}: {error}"
            if is_peer_lost(error):
                self._stop.leave(PEER_LOST, f"peer_lost: another rank exited ({cause.splitlines()[0]})")
            self._record("failed", FAILED, cause)
            self._alarm(cause.splitlines()[0])
            self._stop.close()
            return False
        if self.reason and self._is_to_report(error):
            print(f"pretrain: {self.reason}", file=sys.stderr, flush=True)
        self._alarm(self.reason)
        if self.engine and (self._agreed or self.engine.world_size == 1):  # after an error of one rank, the others may not join
            self.engine.close()
        self._stop.close()
        return True

    def _alarm(self, reason: str) -> None:
        """Sends the alarm of an end before there were outputs: nobody may be watching a restart that is refused."""
        if self.has_outputs or int(os.environ.get("RANK") or 0) > 0:
            return
        kind = alarms.kind_of(self.status)
        if problem := alarms.notify(self._config.log.alarms, self._config.run.name, kind, reason):
            print(f"pretrain: the alarm was not delivered: {problem}", file=sys.stderr, flush=True)

    def _is_to_report(self, error: BaseException | None) -> bool:
        if isinstance(error, memory.OutOfMemory):
            return True
        if error and not self._stop.is_training:
            return command_line.is_to_report()
        return int(os.environ.get("LOCAL_RANK") or 0) == 0

    def _record(self, how: str, status: int, reason: str) -> None:
        """Writes run_state.json; where the storage refuses that, the status of the process still tells."""
        try:
            self._directory.write_state(how, exit_status=status, reason=reason)
            self._note_end(status)
        except OSError as error:
            print(f"pretrain: run_state.json cannot be written: {error}", file=sys.stderr, flush=True)
