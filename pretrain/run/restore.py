"""Brings a newer checkpoint of a run's mirror, and the records up to it, into the run's folder.

    checkpoints/.get-step_00001000/   the files so far; an interrupted download continues here
    checkpoints/step_00001000/        after all files have the digests of the manifest, and the records are there
    left-metrics.jsonl                records that were here before and differ, under another name

Rank 0 downloads, the others wait in short collectives, so that no time-out of theirs limits a download.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import xxhash

from pretrain import UserError
from pretrain.checkpoint.manifest import Checkpoint, checkpoints
from pretrain.data import remote
from pretrain.data.errors import DataMissing
from pretrain.engines.base import Engine
from pretrain.files import sync_folder, unused_name, write_atomically
from pretrain.run.directory import RunDirectory
from pretrain.run.mirror_store import RECORDS, Damaged, Mirrored, MirrorStore, folder_of, in_parallel

_BLOCK_BYTES, _TELL_SECONDS = 8 << 20, 10.0
_RESTORED = [name for name in RECORDS if name not in ("run_state.json", "config.yaml")]


class _Elsewhere(UserError):
    """Rank 0 has raised an error and tells it."""


class Restorer:
    """Looks for newer checkpoints in a mirror; on rank 0. `check` raises ConfigError for one that the run cannot continue."""

    def __init__(self, store: MirrorStore, directory: RunDirectory, check: Callable[[Checkpoint], None]):
        self.store, self.directory, self.check = store, directory, check
        self.tried: set[int] = set()
        """Steps that were fetched or passed over; none is tried again, so that a bad disk does not fetch forever."""

    def fetch(self) -> None:
        """Downloads the newest intact checkpoint of the mirror if it is newer than those here. Raises UserError, OSError."""
        folder = self.directory.checkpoints
        own = checkpoints(folder)
        for found in self.store.checkpoints():
            if own and found.step <= own[0].step:
                return
            if found.step in self.tried:
                continue
            self.tried.add(found.step)
            try:
                self.check(found)
                self._download(found)
                return
            except Damaged as error:
                print(f"mirror     damaged checkpoint passed over: {error}", flush=True)

    def _download(self, found: Mirrored) -> None:
        folder = self.directory.checkpoints
        unfinished = folder / f".get-step_{found.step:08d}"
        unfinished.mkdir(mode=0o700, parents=True, exist_ok=True)
        files = self._expected(found, unfinished)
        total = sum(entry["bytes"] for entry in files.values())
        here = sum(file.stat().st_size for file in unfinished.iterdir())
        free = shutil.disk_usage(folder).free
        if free < total - here:
            room = f"{found.path} needs {(total - here) / 2**30:.3f} GiB here, and the disk has {free / 2**30:.3f} GiB free"
            raise OSError(errno.ENOSPC, room, str(folder))
        print(f"mirror     {found.path}: {total / 2**20:,.1f} MiB are being copied to {folder}", flush=True)
        progress = _Progress(total)
        in_parallel(lambda name: self._copy(found, unfinished / name, files[name], progress), sorted(files))
        self._restore_records()
        sync_folder(unfinished)
        os.rename(unfinished, folder / f"step_{found.step:08d}")
        sync_folder(folder)
        for other in folder.glob(".get-step_*"):
            shutil.rmtree(other, ignore_errors=True)
        print(f"mirror     {found.path} is here, {progress.words()}", flush=True)

    def _expected(self, found: Mirrored, unfinished: Path) -> dict[str, dict]:
        """{file: its entry} of the manifest, which is here then. What another upload of this step left here is removed."""
        text, path = self.store.read(f"{folder_of(found.step)}/manifest.json"), unfinished / "manifest.json"
        if path.exists() and path.read_bytes() != text:
            shutil.rmtree(unfinished)
            unfinished.mkdir(mode=0o700)
        write_atomically(path, text)
        path.chmod(0o600)
        try:
            return Checkpoint(unfinished).manifest()["files"]
        except ValueError as error:
            raise Damaged(f"{found.path}: manifest.json is damaged ({error})") from None

    def _copy(self, found: Mirrored, target: Path, expected: dict, progress: _Progress) -> None:
        """Copies one file, from where an earlier copy ended, and compares its digest."""
        continued = target.exists()
        if not self._is_copied(found, target, expected, progress) and continued:  # what was here was at fault
            self._is_copied(found, target, expected, progress)
        if not target.exists():
            raise Damaged(f"{self.store.url}/{folder_of(found.step)}/{target.name}: its content is not that of its manifest")

    def _is_copied(self, found: Mirrored, target: Path, expected: dict, progress: _Progress) -> bool:
        """False, and the file is removed, if its content is not what is expected."""
        digest, url = xxhash.xxh3_128(), f"{self.store.url}/{folder_of(found.step)}/{target.name}"
        descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with open(descriptor, "r+b") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                progress.add(len(block))
            done = file.tell()
            try:
                with remote.open_file(url) as source:
                    source.seek(done)
                    while done < expected["bytes"] and (block := source.read(_BLOCK_BYTES)):
                        digest.update(block)
                        file.write(block)
                        done += len(block)
                        progress.add(len(block))
            except DataMissing:
                raise Damaged(f"{url}: is missing") from None
            file.flush()
            os.fsync(file.fileno())
        if done == expected["bytes"] and digest.hexdigest() == expected["xxh3"]:
            return True
        target.unlink()
        progress.add(-done)
        return False

    def _restore_records(self) -> None:
        """The records of the mirror reach at least as far as its checkpoints; the start cuts them."""
        directory = self.directory.path
        for name in _RESTORED:
            with contextlib.suppress(DataMissing):
                content, path = self.store.read(name), directory / name
                if path.exists() and path.read_bytes() != content:
                    os.rename(path, unused_name(directory / f"left-{name}"))
                write_atomically(path, content)
        with contextlib.suppress(DataMissing):
            self.directory.follow(self.store.read("run_state.json"))


class _Progress:
    """Reports how much has been copied, every few seconds."""

    def __init__(self, total: int):
        self.total, self.done, self._lock = total, 0, threading.Lock()
        self.began = self._told_at = time.monotonic()

    def add(self, count: int) -> None:
        with self._lock:
            self.done += count
            if tell := time.monotonic() - self._told_at > _TELL_SECONDS:
                self._told_at = time.monotonic()
        if tell:
            print(f"mirror     {self.done / self.total:.0%} copied, {self.words()}", flush=True)

    def words(self) -> str:
        """The time since the start and the rate."""
        seconds = time.monotonic() - self.began
        return f"{seconds:.1f} s, {self.done / 1e6 / max(seconds, 1e-9):,.0f} MB/s"


def fetch_together(engine: Engine, restorer: Restorer | None) -> None:
    """`restorer.fetch()` on rank 0, for which all ranks wait (a collective). Raises its error; elsewhere, one of its status."""
    failure: list[BaseException] = []

    def work() -> None:
        try:
            restorer.fetch()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="restore", daemon=True)
    if engine.rank == 0:
        thread.start()
        thread.join(0.2)
    while engine.broadcast(int(thread.is_alive())):
        engine.watchdog.alive("waiting for a checkpoint from the mirror")
        if engine.rank == 0:
            thread.join(0.5)
    status = engine.broadcast(getattr(failure[0], "status", 74 if isinstance(failure[0], OSError) else 1) if failure else 0)
    if failure:
        raise failure[0]
    if status:
        error = _Elsewhere("rank 0 could not fetch a checkpoint from the mirror; its own message says why")
        error.status = status
        raise error
