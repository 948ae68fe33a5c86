"""The mirror of a run, on the rank that writes: uploads in the background, and the end of the job waits for the last one.

    step 1000   saved on the disk: offered to the thread, which uploads it while training continues
    step 2000   saved; the thread still uploads step 1000, which therefore stays on the disk
    later       step 1000 is complete in the mirror, older ones are removed there, step 2000 is uploaded
    the end     the job waits for the newest one: as long as it moves, or after SIGTERM until the deadline

Nothing that a store does stops or slows training. What fails is reported once and tried again until it works; checkpoints that
come faster than they can be uploaded are skipped, so that the newest one is next. Only a job that takes the place ends this one
(Locked): both would write the same objects.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from pretrain.checkpoint.manifest import Checkpoint
from pretrain.config import Config
from pretrain.data import remote
from pretrain.engines.base import Engine
from pretrain.run import ledger, mirror_store
from pretrain.run.directory import Locked, RunDirectory
from pretrain.run.mirror_store import Damaged, MirrorStore, Pace, Removed

DEADLINE_MARGIN_SECONDS = 3.0  # of the time after SIGTERM: for the last records
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 8.0  # between tries
_RECORDS_SECONDS = 10.0


class Mirror:
    """A context manager around a job; without `checkpoint.mirror`, and on ranks other than 0, it does nothing.

    info: takes lines for the user, from any thread. step: of the newest complete checkpoint in the mirror, as far as known.
    """

    def __init__(self, config: Config, directory: RunDirectory, rank: int):
        self.config, self.directory = config.checkpoint, directory
        self.info: Callable[[str], None] = lambda text: print(text, flush=True)
        self.alarm: Callable[[str, str], None] = lambda kind, text: print(text, flush=True)
        self.step: int | None = None
        self.upload_seconds = 0.0
        """That the newest upload took; 0: none yet."""
        self._settings, self._is_writer = config, rank == 0
        self._uploads: MirrorStore | None = None
        self._wanted: Checkpoint | None = None  # the newest one that is not in the mirror
        self._current: Checkpoint | None = None  # that is being uploaded
        self._newest: Checkpoint | None = None  # on the disk
        self._back_to: int | None = None  # later checkpoints in the mirror must be withdrawn first
        self._changed, self._stopped = threading.Condition(), threading.Event()
        self._failing_since: float | None = None
        self._behind = self._cannot_prune = False  # reported
        self._taken, self._until = "", float("inf")
        self._beating: threading.Thread | None = None
        self._account = b""  # that the mirror has
        self._account_path: Path | None = None  # set once the run has opened it; before, the mirror's may be newer

    def open(self) -> None:
        """Makes this job the owner of its place (`MirrorStore.claim`), and starts. Raises DataError, StoreError, Locked."""
        store = mirror_store.open_store(self._settings) if self._is_writer else None
        if store is None:
            return
        store.claim(self.directory.path, self.info)
        store.request, self._uploads = remote.tried_once, store  # from now on, the threads decide what is tried again
        self._beating = threading.Thread(target=self._beat, name="mirror", daemon=True)
        self._beating.start()
        threading.Thread(target=self._run, name="mirror", daemon=True).start()

    # ---------------------------------------------------------------- calls of the job

    def begin(
        self, step: int, newest: Checkpoint | None, info: Callable[[str], None], alarm: Callable[[str, str], None]
    ) -> None:
        """The run (re)starts after `step`. newest: its own checkpoint there, if any; the mirror may lack it. alarm: takes a
        kind and a text, only in calls of the job."""
        if self._uploads is None:
            return
        self.info, self.alarm = info, alarm
        self._account_path = self.directory.path / ledger.FILE_NAME
        with self._changed:
            self._back_to, self._wanted, self._newest = step, newest, newest
            self._changed.notify_all()

    def offer(self, saved: Checkpoint) -> None:
        """Has a new checkpoint uploaded."""
        if self._uploads is None:
            return
        skipped = None
        with self._changed:
            if self._wanted and self._wanted is not self._current:
                skipped = self._wanted
            self._wanted = self._newest = saved
            self._changed.notify_all()
        if skipped and not self._behind:
            self._behind = True
            now = f"step {self._current.step} is still on its way" if self._current else "the store does not take them"
            self.alarm("mirror", f"the mirror is behind: {now}, so step {skipped.step} is skipped; it has {self._has()}")

    def held(self) -> set[int]:
        """Steps of checkpoints that must stay on the disk for now."""
        with self._changed:
            return {each.step for each in (self._current, self._wanted) if each}

    def check(self) -> None:
        """Raises Locked if another job has taken the place."""
        if self._taken:
            raise Locked(self._taken)

    def finish(self, engine: Engine, seconds_left: Callable[[], float | None]) -> None:
        """Waits until the newest checkpoint is in the mirror, and says whether it is (a collective).

        seconds_left(): until the process has to end; None: no limit. Without one, a store that fails is given a minute.
        """
        began = time.monotonic()
        while engine.broadcast(int(self._is_to_wait(began, seconds_left()))):
            time.sleep(0.1)
        if self._uploads is None:
            return
        if (left := seconds_left()) is not None:
            self._until = time.monotonic() + left - DEADLINE_MARGIN_SECONDS / 2
        if self._newest and self.step != self._newest.step:
            again = "start the same command again on this machine to upload it"
            self.info(f"mirror     {self._uploads.url} lacks step {self._newest.step}, it has {self._has()}; {again}")
        else:
            self.info(f"mirror     {self._uploads.url} has {self._has()}")

    def _is_to_wait(self, began: float, seconds_left: float | None) -> bool:
        with self._changed:
            if self._uploads is None or self._taken or self._wanted is None:
                return False
            if seconds_left is not None:
                return seconds_left > DEADLINE_MARGIN_SECONDS
            failing = self._failing_since is not None
            return not failing or time.monotonic() - max(began, self._failing_since) < remote.RETRY_SECONDS

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Stops the threads, uploads the last records, and gives up the place."""
        if self._uploads is None:
            return
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
        if self._taken:
            return
        end = min(time.monotonic() + _RECORDS_SECONDS, self._until)
        self._beating.join(max(0.0, end - time.monotonic()) / 2)  # else an older account may replace the last one
        seconds = end - time.monotonic()

        def say_goodbye(folder: Path = self.directory.path) -> None:
            if self.step is not None:
                self._uploads.write_records(folder)
            self._uploads.beat(ended=True)

        with contextlib.suppress(Exception):  # the end of the job was told; the next owner will wait for a sign of life
            remote.tried_once(self._uploads.url, say_goodbye, max(0.1, seconds))
        self.directory = None  # a request that still hangs must not hold its lock

    def _has(self) -> str:
        return "no checkpoint yet" if self.step is None else f"step {self.step}"

    # ---------------------------------------------------------------- the threads

    def _beat(self) -> None:
        while not self._stopped.wait(mirror_store.BEAT_SECONDS):
            try:
                self._uploads.beat()
                self._upload_account()
            except Locked as error:
                self._lose(error)
                return
            except Exception:  # uploads tell of stores that do not answer
                continue

    def _upload_account(self) -> None:
        """Between checkpoints, too: work that is lost with this machine was paid for."""
        if self._account_path is not None and (account := self._account_path.read_bytes()) != self._account:
            self._uploads.write(self._account_path.name, account)
            self._account = account

    def _lose(self, error: Locked) -> None:
        self._taken = str(error)
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        known: dict = {}
        pace, pause = Pace(self.config.mirror_mb_per_second), _FIRST_PAUSE_SECONDS
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped.is_set() or self._wanted or self._back_to is not None)
                if self._stopped.is_set():
                    return
                self._current = self._wanted
                back_to = self._back_to
            try:
                if back_to is not None:
                    self.step = self._uploads.withdraw_after(back_to, self._say)
                uploaded = self._current and self._upload(self._current, pace)
                with self._changed:
                    if self._back_to == back_to:
                        self._back_to = None
                    if self._wanted is self._current:
                        self._wanted = None
                    self._current = None
                self._recovered()
                if uploaded:
                    self._prune(known)
                pause = _FIRST_PAUSE_SECONDS
            except Locked as error:
                return self._lose(error)
            except Exception as error:
                self._failed(error)
                self._stopped.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _upload(self, found: Checkpoint, pace: Pace) -> bool:
        """False: this checkpoint cannot be uploaded, now or later."""
        began = time.monotonic()
        try:
            self._uploads.upload(found, pace, self._stopped)
        except (Removed, Damaged) as error:
            self._say(f"mirror     step {found.step} is not uploaded: {error}")
            return False
        self.step, self.upload_seconds = found.step, time.monotonic() - began
        if (directory := self.directory) is not None:
            directory.mirrored(found.step)
        return True

    def _prune(self, known: dict) -> None:
        try:
            self._uploads.prune(self.config.keep_last, self.config.keep_best, known)
            self._cannot_prune = False
        except Locked:
            raise
        except Exception as error:  # the next upload tries it again
            if not self._cannot_prune and not self._stopped.is_set():
                self._say(
                    f"mirror     {self._uploads.url}: older checkpoints cannot be removed ({type(error).__name__}: {error})"
                )
            self._cannot_prune = True

    def _failed(self, error: Exception) -> None:
        current, self._current = self._current, None
        if self._stopped.is_set() or self._failing_since is not None:
            return
        self._failing_since = time.monotonic()
        what = f"step {current.step} is not uploaded yet" if current else "it does not answer"
        text = f"{what} ({type(error).__name__}: {error}); it has {self._has()}. Training continues, and this is tried again"
        self._say(f"mirror     {self._uploads.url}: {text}")

    def _recovered(self) -> None:
        if (self._failing_since is not None or self._behind) and self._wanted is None and self.step is not None:
            self._failing_since, self._behind = None, False
            self._say(f"mirror     {self._uploads.url} has {self._has()} again")
        self._failing_since = None

    def _say(self, text: str) -> None:
        with contextlib.suppress(Exception):  # the outputs of a run are closed between two parts of it
            self.info(text)
