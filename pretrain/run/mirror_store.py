"""The mirror of a run: a place in a store for its checkpoints and records. Knows the objects and who may write, not when.

    <checkpoint.mirror>/<run.name>/
      owner.json                       the job that writes here, with a sign of life every few seconds
      config.yaml  metrics.jsonl  ...  the records; they reach at least as far as every checkpoint here
      checkpoints/step_00001000/       the files of the folder on the disk
        uploading.json                 the manifest while it is uploaded: files of these sizes are complete and belong to it
        manifest.json                  written last, removed first: without it the folder is not a checkpoint
        left-manifest.json             in its place: a checkpoint that the run has gone back behind, kept but never resumed

Stores have no locks. So a job that wants to write waits until the last owner has said that it ended, or gives no sign of life
for a while. Should that owner live after all, it finds another name in owner.json and stops.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import xxhash

from pretrain.checkpoint.manifest import Checkpoint, CheckpointError
from pretrain.checkpoint.tensors import parse_json
from pretrain.config import Config
from pretrain.data import remote
from pretrain.data.errors import DataError, DataMissing
from pretrain.run.directory import Locked

RECORDS = (
    "config.yaml",
    "environment.json",
    "ledger.json",
    "invoice.txt",
    "metrics.jsonl",
    "console.log",
    "wandb_id.json",
    "run_state.json",
)
"""The files of a run that a start without its folder needs, or that its user misses."""
BEAT_SECONDS, SILENCE_SECONDS = 5.0, 16.0
"""Time between two signs of life of an owner; time without one after which another job takes its place."""
PART_BYTES = 16 << 20  # of one request of an upload; S3 allows 10,000 for a file, and files have at most 1 GiB
_PARALLEL = 4  # files at a time
_SMALL_SECONDS, _LISTING_SECONDS, _SLOWEST_BYTES_PER_SECOND = 60.0, 600.0, 1 << 20
_BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "memory")  # their folders need not be made


class Damaged(CheckpointError):
    """Files of a checkpoint, on either side, are not those of its manifest."""


class Removed(CheckpointError):
    """A checkpoint was removed from the disk while it was uploaded."""


@dataclass(frozen=True)
class Mirrored(Checkpoint):
    """A complete checkpoint in a mirror. Its path is for messages only."""

    store: MirrorStore
    number: int

    @property
    def step(self) -> int:
        return self.number

    def state(self) -> dict:
        """The content of state.json. Raises CheckpointError if it is damaged, DataError, StoreError."""
        try:
            return parse_json(self.store.read(f"{folder_of(self.number)}/state.json"))
        except (ValueError, DataMissing) as error:
            raise Damaged(f"{self.path}: state.json cannot be read ({error})") from None


def folder_of(step: int) -> str:
    """Name of a checkpoint's folder in the mirror."""
    return f"checkpoints/step_{step:08d}"


def open_store(config: Config) -> MirrorStore | None:
    """The mirror of a run; None: it has none. Makes no request. Raises DataError for a URL that no package can open."""
    mirror = config.checkpoint.mirror
    return MirrorStore(f"{mirror.rstrip('/')}/{config.run.name}") if mirror else None


@dataclass(eq=False)
class MirrorStore:
    """The folder of a run in its mirror. Every method raises DataError for what trying again cannot change.

    request: makes the requests: `remote.retried`, which raises StoreError after a minute, or `remote.tried_once`, which raises
    any exception.
    """

    url: str
    request: Callable[[str, Callable[[], Any], float], Any] = remote.retried
    job: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        protocol = self.url.partition("://")[0] if remote.is_url(self.url) else "file"
        options = {"auto_mkdir": True} if protocol in ("file", "local") else {}
        self._system, self._path = remote.open_system(self.url, use_listings_cache=False, **options)
        self._has_folders = protocol not in _BUCKETS
        self._makes_folders = self._has_folders and not options
        self._owner: dict = {}

    # ---------------------------------------------------------------- objects

    def read(self, name: str) -> bytes:
        """The content of a small object. Raises DataMissing."""
        return self.request(f"{self.url}/{name}", lambda: self._system.cat_file(f"{self._path}/{name}"), _SMALL_SECONDS)

    def write(self, name: str, content: bytes) -> None:
        """Writes a small object. Raises DataError if there is no such bucket or folder."""

        def put() -> None:
            if self._makes_folders:
                self._system.makedirs(os.path.dirname(f"{self._path}/{name}"), exist_ok=True)
            self._system.pipe_file(f"{self._path}/{name}", content)

        try:
            self.request(f"{self.url}/{name}", put, _SMALL_SECONDS + len(content) / _SLOWEST_BYTES_PER_SECOND)
        except DataMissing:
            text = "cannot be written: there is no such bucket or folder; create it, or correct checkpoint.mirror"
            raise DataError(f"{self.url}: {text}") from None

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects; those that are not there any more are removed, too."""
        paths = [f"{self._path}/{name}" for name in names]

        def rm() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._system.rm(paths)

        if paths:
            self.request(self.url, rm, _LISTING_SECONDS)

    def _remove_folder(self, step: int) -> None:
        """Removes an empty folder, where a store has such a thing."""
        if self._has_folders:
            with contextlib.suppress(OSError):
                self._system.rmdir(f"{self._path}/{folder_of(step)}")

    def listing(self) -> dict[int, dict[str, int]]:
        """{step: {file: bytes}} of all folders of checkpoints, complete or not."""
        root = f"{self._path}/checkpoints/"
        found = self.request(self.url, lambda: self._system.find(root, detail=True), _LISTING_SECONDS)
        steps: dict[int, dict[str, int]] = {}
        for path, about in found.items():
            folder, _, name = path.partition("/checkpoints/step_")[2].partition("/")
            if folder.isdecimal() and name:
                steps.setdefault(int(folder), {})[name] = about["size"] or 0
        return steps

    def checkpoints(self) -> list[Mirrored]:
        """The complete checkpoints, newest first; their content is not checked."""
        steps = [step for step, files in self.listing().items() if "manifest.json" in files]
        return [self.checkpoint(step) for step in sorted(steps, reverse=True)]

    def checkpoint(self, step: int) -> Mirrored:
        """The checkpoint of a step."""
        return Mirrored(f"{self.url}/{folder_of(step)}", self, step)

    # ---------------------------------------------------------------- the owner

    def claim(self, folder: Path, info: Callable[[str], None]) -> None:
        """Makes this job, which holds the lock of the run's `folder`, the owner. That writes and reads an object, so it also
        shows that the mirror can be used. Raises Locked while another job gives signs of life, StoreError."""
        before = self._read_owner()
        here = {"host": socket.gethostname(), "machine": _machine(), "folder": str(folder.resolve())}
        holds_lock = here.items() <= before.items()  # that job was in the same folder, which this one has locked
        if before and not before.get("ended") and not holds_lock:
            info(f"mirror     {self.url} was in use by {_holder(before)}; waiting {SILENCE_SECONDS:.0f} s for a sign of life")
            end = time.monotonic() + SILENCE_SECONDS
            while time.monotonic() < end and not before.get("ended"):
                time.sleep(min(1.0, SILENCE_SECONDS / 8))
                if (now := self._read_owner()) != before:
                    if not now.get("ended"):
                        raise self._locked(now)
                    before = now
        started = datetime.now().isoformat(" ", "seconds")
        self._owner = {"job": self.job, **here, "pid": os.getpid(), "started": started, "beat": 0, "ended": False}
        self.write("owner.json", json.dumps(self._owner).encode())
        if (found := self._read_owner()) != self._owner:
            if found.get("job") not in (None, self.job):
                raise self._locked(found)
            raise DataError(f"{self.url}/owner.json: was written and reads differently; use another checkpoint.mirror")

    def beat(self, ended: bool = False) -> None:
        """Gives a sign of life, the last one if `ended`. Raises Locked if another job has become the owner."""
        self.require_owner()
        self._owner = self._owner | {"beat": self._owner["beat"] + 1, "ended": ended}
        self.write("owner.json", json.dumps(self._owner).encode())

    def require_owner(self) -> None:
        """Raises Locked if another job has become the owner."""
        if (now := self._read_owner()).get("job") not in (None, self.job):
            raise self._locked(now)

    def _read_owner(self) -> dict:
        try:
            return parse_json(self.read("owner.json"))
        except (DataMissing, ValueError):
            return {}

    def _locked(self, owner: dict) -> Locked:
        return Locked(f"{self.url}: is in use by {_holder(owner)}; stop that job or choose another run.name")

    # ---------------------------------------------------------------- whole checkpoints

    def upload(self, found: Checkpoint, pace: Pace, stopped: threading.Event) -> None:
        """Copies a checkpoint from the disk; files that an interrupted upload has completed are not copied again.

        Raises Removed, Damaged, Locked, InterruptedError once `stopped`, and whatever requests raise.
        """
        folder, there = folder_of(found.step), self.listing().get(found.step, {})
        try:
            text, files = (found.path / "manifest.json").read_bytes(), found.manifest()["files"]
        except FileNotFoundError:
            raise Removed(f"{found.path}: was removed before it was uploaded") from None
        sizes = {name: entry["bytes"] for name, entry in files.items()}
        if "manifest.json" in there:
            if self.read(f"{folder}/manifest.json") == text and sizes.items() <= there.items():
                return
            self.remove([f"{folder}/manifest.json"])
        if "uploading.json" not in there or self.read(f"{folder}/uploading.json") != text:
            self.write(f"{folder}/uploading.json", text)
            there = {}
        missing = [name for name, size in sizes.items() if there.get(name) != size]

        def copy(name: str) -> None:
            self._upload_file(found.path / name, f"{folder}/{name}", files[name], pace, stopped)

        in_parallel(copy, missing)
        self.write_records(found.path.parents[1])
        there = self.listing().get(found.step, {})
        if wrong := [name for name, size in sizes.items() if there.get(name) != size]:
            raise Damaged(f"{self.url}/{folder}/{wrong[0]}: has {there.get(wrong[0])} bytes after its upload")
        self.require_owner()
        if stopped.is_set():
            raise InterruptedError("the upload was stopped")
        self.write(f"{folder}/manifest.json", text)
        self.remove([f"{folder}/{name}" for name in ("uploading.json", "left-manifest.json") if name in there])

    def write_records(self, directory: Path) -> None:
        """Copies the records of the run in `directory`."""
        for name in RECORDS:
            with contextlib.suppress(FileNotFoundError):
                self.write(name, (directory / name).read_bytes())

    def _upload_file(self, source: Path, name: str, expected: dict, pace: Pace, stopped: threading.Event) -> None:
        seconds = _SMALL_SECONDS + pace.seconds(expected["bytes"]) + expected["bytes"] / _SLOWEST_BYTES_PER_SECOND
        end = time.monotonic() + seconds

        def put() -> None:
            digest, target = xxhash.xxh3_128(), None
            try:
                with open(source, "rb", buffering=0) as file:
                    if self._makes_folders:
                        self._system.makedirs(os.path.dirname(f"{self._path}/{name}"), exist_ok=True)
                    target = self._system.open(f"{self._path}/{name}", "wb", block_size=PART_BYTES)
                    while block := file.read(1 << 20):
                        pace.wait(len(block), stopped)
                        if stopped.is_set() or time.monotonic() > end:
                            raise InterruptedError("the upload was stopped")
                        digest.update(block)
                        target.write(block)
                if digest.hexdigest() != expected["xxh3"]:
                    raise Damaged(f"{source}: its content has changed since it was written")
                target.close()
            except BaseException:
                _abandon(target)
                raise

        if not source.exists():
            raise Removed(f"{source}: was removed before it was uploaded")
        self.request(f"{self.url}/{name}", put, seconds)

    def withdraw_after(self, step: int, info: Callable[[str], None]) -> int | None:
        """Keeps checkpoints later than `step` from being resumed, since the run goes back behind them. -> the newest left."""
        complete = [number for number, files in self.listing().items() if "manifest.json" in files]
        for later in complete:
            folder = folder_of(later)
            if later > step:
                self.require_owner()
                self.write(f"{folder}/left-manifest.json", self.read(f"{folder}/manifest.json"))
                self.remove([f"{folder}/manifest.json"])
                text = "is later than the step where the run resumed; kept with its manifest as left-manifest.json"
                info(f"mirror     {self.url}/{folder} {text}")
        return max((each for each in complete if each <= step), default=None)

    def prune(self, keep_last: int, keep_best: int, known: dict[int, tuple[dict[str, int], float]]) -> None:
        """Removes checkpoints except the newest `keep_last` and the `keep_best` with the lowest validation loss, and what
        interrupted uploads left. Only those whose files all have their sizes count as kept; others are left alone.

        known: {step: (sizes of its files, validation loss)} of those that were looked at before; more are added.
        """
        self.require_owner()
        listing, intact = self.listing(), []
        for step, files in sorted(listing.items(), reverse=True):
            if "manifest.json" in files:
                if step not in known:
                    known[step] = self._about(step)
                if known[step][0].items() <= files.items():
                    intact.append(step)
            elif "left-manifest.json" not in files:
                self.remove([f"{folder_of(step)}/{name}" for name in files])
                self._remove_folder(step)
        best = sorted((step for step in intact if known[step][1] < math.inf), key=lambda step: known[step][1])
        for step in {*intact} - {*intact[:keep_last], *best[:keep_best]}:
            self.remove([f"{folder_of(step)}/manifest.json"])
            self.remove([f"{folder_of(step)}/{name}" for name in listing[step] if name != "manifest.json"])
            self._remove_folder(step)
            del known[step]

    def _about(self, step: int) -> tuple[dict[str, int], float]:
        try:
            manifest = parse_json(self.read(f"{folder_of(step)}/manifest.json"))
            sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
            loss = self.checkpoint(step).state().get("val_loss")
        except (ValueError, KeyError, TypeError, AttributeError, CheckpointError):
            return {"": -1}, math.inf  # no folder has that file
        return sizes, loss if isinstance(loss, float) and loss == loss else math.inf


class Pace:
    """Limits bytes per second over all threads. megabytes_per_second: 0: no limit."""

    def __init__(self, megabytes_per_second: float):
        self._rate, self._free_at, self._lock = megabytes_per_second * 1e6, 0.0, threading.Lock()

    def seconds(self, count: int) -> float:
        """The least time that `count` bytes take, if others share the limit."""
        return _PARALLEL * count / self._rate if self._rate else 0.0

    def wait(self, count: int, stopped: threading.Event) -> None:
        """Waits until `count` bytes may be sent, or `stopped`."""
        if self._rate:
            with self._lock:
                begin = max(self._free_at, time.monotonic())
                self._free_at = begin + count / self._rate
            stopped.wait(max(0.0, begin - time.monotonic()))


def in_parallel(work: Callable[[str], None], names: list[str]) -> None:
    """Calls `work` for each name, a few at a time, in threads that do not keep the process alive. Raises the first error."""
    left, errors = iter(names), []
    lock = threading.Lock()

    def run() -> None:
        while not errors:
            with lock:
                name = next(left, None)
            if name is None:
                return
            try:
                work(name)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=run, name="mirror", daemon=True) for _ in range(min(_PARALLEL, len(names)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _abandon(target) -> None:
    """Drops a file that is being written to a store. Closing it, as Python does when it collects it, would make it appear."""
    with contextlib.suppress(Exception):
        if hasattr(target, "discard") and hasattr(target, "_upload_chunk"):
            target.closed = True
            target.discard()
        elif target is not None:
            target.close()


def _machine() -> str:
    """Tells machines of the same host name apart."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _holder(owner: dict) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('started')}"
