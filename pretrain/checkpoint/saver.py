"""The saves of a run: in the background, one at a time, agreed on by all ranks. Also removes old checkpoints.

    step 1000   snapshot: each rank copies its share of the state to the host     the run waits for this copy only
    step 1001   a thread on each rank writes, digests and syncs its files
    step 1002   every rank votes in the collective of the step: written, failed, or not yet
    step 1003   all have voted: rank 0 commits, reports that, and then removes older checkpoints

The snapshot takes one copy of the rank's share of the state on the host (12 bytes per parameter with AdamW, divided by the
ranks), allocated before the first step, kept until the run ends, and pinned if there is a GPU. The last save of a job, and
every save with `asynchronous: false`, take no snapshot: the run waits while the thread writes from live memory. The files are
the same to the byte.

Where ranks hold columns of a matrix (tensor parallelism; a third of the state), they exchange them for rows before the thread
starts, so no rank waits in a collective for the disk of another. The rows are copies on the device: of one file at a time for a
snapshot, of all files without one.

A failed save leaves earlier checkpoints alone, is reported, and does not stop the run; three in a row, or a failed last one,
do (OSError).
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from pretrain.checkpoint import storage
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.manifest import Checkpoint
from pretrain.checkpoint.storage import NotFinite
from pretrain.engines.base import Engine
from pretrain.engines.shards import Shard

WRITTEN, FAILED, NOT_FINITE, GIVE_UP = VOTES = range(4)
MOST_FAILURES = 3
_POLL_SECONDS, _ABANDON_SECONDS = 0.5, 10.0


class Saver:
    """Saves checkpoints; on every rank of a run. A context manager: leaving it waits for the current save, except after an
    exception.

    saved: the newest checkpoint that rank 0 committed since the start; None: none yet.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        config: CheckpointConfig,
        acknowledge: Callable[[Checkpoint], None],
        info: Callable[[str], None] = print,
        trusted: Iterable[int] = (),
        held: Callable[[], Container[int]] = tuple,
    ):
        """On rank 0, `acknowledge` is called when a checkpoint is durable, `info` with lines for the user.
        trusted: steps of checkpoints that were checked at the start. held(): steps of those that are in use, which are not
        removed."""
        self.folder, self.engine, self.config = folder, engine, config
        self.acknowledge, self.info, self.held = acknowledge, info, held
        self.saved: Checkpoint | None = None
        self.trusted = set(trusted)
        self.write_seconds = 0.0
        """Seconds that writing this rank's share took in the newest save; 0: none yet."""
        self.failures = 0
        """Number of failed saves in a row; only rank 0 counts."""
        self._began = time.monotonic()
        self._snapshot = _Snapshot(engine.device)
        if config.asynchronous and (config.every_steps or config.every_minutes):
            self._snapshot.reserve(engine.saved_values())  # pinning takes seconds: now, not in a save
        self._save: _Save | None = None  # in progress
        self._pruning: threading.Thread | None = None
        self._not_removed: OSError | None = None

    # ---------------------------------------------------------------- calls of the loop

    def save(self, step: int, state: dict, last: bool) -> None:
        """Waits for the previous save and starts to save the state of `step` (a collective). last: wait until it is durable.

        Raises on every rank: OSError if the last save failed, or too many in a row; NotFinite.
        """
        self.wait()
        self._wait_for_pruning()
        self._began = time.monotonic()
        background = self.config.asynchronous and not last
        try:
            temporary = storage.begin(self.folder, step, self.engine)
        except OSError as error:
            self._failed(step, error)
        else:
            files = storage.files_of(self.engine.shards(saving=True))  # views of live memory
            if background:
                self._snapshot.reserve(self.engine.saved_values())
                files = self._snapshot.take(files)
            else:
                files = list(files)
            self._save = _Save(temporary, step, storage.state_text(state, step, self.engine), self.engine, files)
        if not background:
            self.wait()
        if last and self.engine.broadcast(self.failures):
            raise OSError(f"{self.folder}: the checkpoint of step {step} could not be saved; no earlier one is affected")

    @property
    def seconds_since_save(self) -> float:
        """Seconds since the last save began; since the start if there was none."""
        return time.monotonic() - self._began

    def votes(self) -> list[int]:
        """This rank's vote for the next collective, one number for each of VOTES; pass their sums over ranks to `settle`."""
        vote = self._save.outcome(self.engine.config.timeout_seconds) if self._save else None
        if self.failures >= MOST_FAILURES:
            vote = GIVE_UP
        return [int(vote == each) for each in VOTES]

    def settle(self, sums: list[int]) -> None:
        """Completes the current save, the same way on every rank, once all ranks have voted. Raises as `save` does."""
        if sums[GIVE_UP]:
            raise OSError(f"{self.folder}: no checkpoint can be saved: {MOST_FAILURES} saves in a row failed, or one got stuck")
        if self._save is None or sum(sums) < self.engine.world_size:
            return
        save, self._save = self._save, None
        self.write_seconds = save.seconds
        failure = save.failure
        if not (sums[FAILED] or sums[NOT_FINITE]) and self.engine.rank == 0:
            try:
                self.saved = storage.commit(save.temporary, save.state, self.engine.world_size)
            except OSError as error:
                failure = error
        if sums[NOT_FINITE]:
            self._discard(save.temporary)
            raise NotFinite(str(failure or "the state of another rank is not finite"))
        if failure or sums[FAILED]:
            self._discard(save.temporary)
            self._failed(save.step, failure)
        elif self.engine.rank == 0:
            self._acknowledge(save.step)

    def wait(self) -> None:
        """Waits until no save is in progress (a collective). Ranks that are done do not wait inside the collective, so its
        time-out does not limit disks: a disk may be slow as long as it makes progress."""
        while self._save:
            self._save.done.wait(_POLL_SECONDS)
            self.settle(self.engine.all_reduce(torch.tensor(self.votes(), device=self.engine.device)).tolist())

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.wait()
            self._wait_for_pruning()
        elif self._save:  # no collective: a rank may have exited; the next start removes the unfinished folder
            self._save.abandon()

    # ---------------------------------------------------------------- after the votes

    def _acknowledge(self, step: int) -> None:
        self.failures = 0
        self.trusted.add(step)
        self.acknowledge(self.saved)
        if self.config.asynchronous:
            self._pruning = threading.Thread(target=self._prune, name="prune", daemon=True)
            self._pruning.start()
        else:
            self._prune()

    def _prune(self) -> None:
        try:
            storage.prune(self.folder, self.config.keep_last, self.config.keep_best, self.trusted, self.held())
        except OSError as error:
            self._not_removed = error

    def _wait_for_pruning(self) -> None:
        if self._pruning:
            self._pruning.join()
        if self._not_removed:  # reported here, not in the thread
            self.info(f"old checkpoints could not be removed: {self._not_removed}")
        self._pruning = self._not_removed = None

    def _failed(self, step: int, error: BaseException | None) -> None:
        if self.engine.rank == 0:
            self.failures += 1
            reason = error or "another rank could not write; see its message"
            self.info(f"checkpoint of step {step} failed ({self.failures} in a row; {MOST_FAILURES} stop the run): {reason}")
        elif error:
            print(f"pretrain: rank {self.engine.rank}: checkpoint of step {step}: {error}", file=sys.stderr, flush=True)

    def _discard(self, temporary: Path) -> None:
        if self.engine.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


class _Save:
    """One save on this rank, from its first byte to its vote. A thread writes; `outcome` reports its errors."""

    def __init__(self, temporary: Path, step: int, state: bytes, engine: Engine, files: list[list[Shard]]):
        self.temporary, self.step, self.state = temporary, step, state
        self.failure: Exception | None = None
        self.seconds = 0.0
        """That writing took, once it is done."""
        self._place = engine.rank, engine.world_size
        self.done = threading.Event()
        self._moved = time.monotonic()
        self._abandoned = False
        threading.Thread(target=self._write, args=(files,), name="checkpoint", daemon=True).start()

    def abandon(self) -> None:
        """Ends the thread at its next block. Exiting while a thread is inside PyTorch aborts the process (seen: status 134)."""
        self._abandoned = True
        self.done.wait(_ABANDON_SECONDS)

    def _write(self, files: list[list[Shard]]) -> None:
        began = time.monotonic()
        try:
            storage.write_part(self.temporary, *self._place, files, self._on_progress)
        except Exception as error:
            self.failure = error
        self.seconds = time.monotonic() - began
        self.done.set()

    def _on_progress(self) -> None:
        self._moved = time.monotonic()
        if self._abandoned:
            raise InterruptedError("the process is exiting")

    def outcome(self, patience_seconds: float) -> int | None:
        """This rank's vote; None: not yet. Re-raises an error that is neither the storage's nor the state's."""
        if not self.done.is_set():
            return GIVE_UP if time.monotonic() - self._moved > patience_seconds else None
        if self.failure is None:
            return WRITTEN
        if isinstance(self.failure, NotFinite):
            return NOT_FINITE
        if isinstance(self.failure, OSError):
            return FAILED
        raise self.failure


class _Snapshot:
    """Host memory for one copy of this rank's share of the state, one buffer per file."""

    def __init__(self, device: torch.device):
        self.device = device
        self.buffers: list[Tensor] = []

    def reserve(self, count: int) -> None:
        """Allocates the memory for the files of `count` values, if it is not there yet."""
        most = storage.MAX_FILE_BYTES // 4
        for first in range(sum(map(len, self.buffers)), count, most):
            self.buffers.append(torch.empty(min(most, count - first), pin_memory=self.device.type == "cuda"))

    def take(self, files: Iterable[list[Shard]]) -> list[list[Shard]]:
        """Copies the shards, file by file; the copies are valid until the next call."""
        copied = []
        for file, buffer in zip(files, self.buffers, strict=True):
            begin, copies = 0, []
            for shard in file:
                end = begin + shard.values.numel()
                copies.append(shard._replace(values=buffer[begin:end].copy_(shard.values.detach(), non_blocking=True)))
                begin = end
            copied.append(copies)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return copied
