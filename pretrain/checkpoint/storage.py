"""Writing, reading and removing checkpoints: one format for every engine and number of ranks. `manifest.py` describes a folder.

Every tensor is flattened, and each rank writes the contiguous shards that it owns; the header of a file has their offsets. A
reader takes the ranges that it needs from these shards, so any engine on any number of ranks reads what any other wrote, and no
rank ever needs the full model. Nothing is unpickled.

A save has three parts: `begin` makes a folder `.tmp-...`, `write_part` fills it on every rank, and after all ranks agreed that
they wrote, `commit` adds a manifest and renames the folder: a checkpoint is complete or absent. Every file is synced before the
manifest, the folder before its rename, the parent folder after it. `saver.py` runs the middle part in the background.

Data moves directly between live memory and files: on a CPU without a copy, on a GPU through a pinned block of 16 MiB on the
host.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path

import torch
import xxhash
from torch import nn

from pretrain import UserError
from pretrain.checkpoint.manifest import FORMAT_VERSION, Checkpoint, CheckpointError, UnsafeCheckpoint, checkpoints, digest_json
from pretrain.checkpoint.tensors import BLOCK, StoredShard, read_values, shards_header
from pretrain.engines.base import Engine
from pretrain.engines.shards import AVERAGES, Shard
from pretrain.files import sync_folder, unused_name

MAX_FILE_BYTES = 1 << 30
_OURS = re.compile(r"\.(tmp|del|old)-(step_[0-9]{8,})(-[0-9]+)?")
"""Folders of unfinished work: a save, a removal, a checkpoint that another of the same step replaces; with a number where an
earlier one could not be removed."""


class NotFinite(UserError):
    """The training state contains NaN or infinity; it is not saved."""

    status = 70


# ---------------------------------------------------------------- saving


def state_text(state: dict, step: int, engine: Engine) -> bytes:
    """The content of state.json, as bytes, since the loop may change `state` before they are written."""
    return json.dumps({**state, "step": step, "optimizer_updates": engine.updates}, indent=1).encode()


def begin(folder: Path, step: int, engine: Engine) -> Path:
    """Makes an empty folder for the files of all ranks (a collective). Raises OSError on every rank if that fails, or if the
    disk has no room for the checkpoint."""
    temporary, failure = folder / f".tmp-step_{step:08d}", None
    needed = int(engine.all_reduce(torch.tensor(4 * engine.saved_values(), device=engine.device)))
    if engine.rank == 0:
        try:
            _make_empty(temporary, needed)
        except OSError as error:
            failure = error
    if engine.broadcast(int(failure is not None)):
        raise failure or OSError(f"{folder}: rank 0 could not make a folder for the checkpoint; see its message")
    return temporary


def _make_empty(folder: Path, needed: int) -> None:
    if folder.exists() and not _removed(folder):
        os.rename(folder, unused_name(folder))
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.mkdir(folder, 0o700)
    disk = shutil.disk_usage(folder)
    if disk.free < needed and disk.total:  # file systems of object stores may report 0
        os.rmdir(folder)
        room = f"a checkpoint needs {needed / 2**30:.3f} GiB, the disk has {disk.free / 2**30:.3f} GiB free"
        raise OSError(errno.ENOSPC, room, str(folder.parent))


def files_of(shards: Iterable[Shard]) -> Iterator[list[Shard]]:
    """Splits shards, still views of live memory, into groups of at most MAX_FILE_BYTES, one per file."""
    file: list[Shard] = []
    room = most = MAX_FILE_BYTES // 4
    for shard in shards:
        start, count = 0, shard.values.numel()
        while start < count:
            taken = min(count - start, room)
            file.append(Shard(shard.name, shard.shape, shard.offset + start, shard.values[start : start + taken]))
            start, room = start + taken, room - taken
            if not room:
                yield file
                file, room = [], most
    if file:
        yield file


def write_part(
    folder: Path, rank: int, world_size: int, files: Iterable[list[Shard]], on_progress: Callable[[], None] = lambda: None
) -> None:
    """Writes this rank's files, and a list of them for rank 0; durable when it returns. Calls `on_progress` after every write.

    It makes no collective calls and uses the device only to copy to the host, so it may run in a thread. Raises OSError,
    NotFinite.
    """
    written = {}
    for number, shards in enumerate(files):
        name = f"tensors-{rank:05d}-of-{world_size:05d}-{number:03d}.safetensors"
        written[name] = write_file(folder / name, _blocks(shards_header(shards), shards), on_progress)
    write_file(folder / f"files-{rank:05d}.json", [json.dumps(written).encode()], on_progress)
    sync_folder(folder)


def _blocks(header: bytes, shards: list[Shard]) -> Iterator[memoryview | bytes]:
    yield header
    staging = None
    for shard in shards:
        values = shard.values.detach()
        if values.dtype != torch.float32:
            raise TypeError(f"{shard.name} is {values.dtype}; checkpoints store fp32")
        for block in values.split(BLOCK):
            if block.device.type != "cpu":
                staging = torch.empty(BLOCK, pin_memory=True) if staging is None else staging
                block = staging[: len(block)].copy_(block)
            if not all(map(math.isfinite, torch.aminmax(block))):  # one pass without a copy; aminmax propagates NaN
                raise NotFinite(f"{shard.name} is not finite, so the state was not saved; no earlier checkpoint is affected")
            yield memoryview(block.numpy()).cast("B")


def commit(temporary: Path, state: bytes, world_size: int) -> Checkpoint:
    """Writes the manifest and renames the folder; durable when it returns. On rank 0, after all ranks wrote. Raises OSError."""
    files = {"state.json": write_file(temporary / "state.json", [state])}
    for rank in range(world_size):
        part = temporary / f"files-{rank:05d}.json"
        if not part.exists():
            raise OSError(f"{part}: is missing; run.directory must be on a file system that all nodes share")
        files.update(json.loads(part.read_text()))
        os.unlink(part)
    manifest = {"format_version": FORMAT_VERSION, "world_size": world_size, "files": files}
    manifest["xxh3"] = digest_json(manifest)
    write_file(temporary / "manifest.json", [json.dumps(manifest, indent=1).encode()])
    sync_folder(temporary)
    folder = temporary.parent
    final = folder / temporary.name.removeprefix(".tmp-")
    replaced = folder / f".old-{final.name}"
    if final.exists():  # this step again, after a rollback; `clean` undoes the rename if the process dies before the next one
        if replaced.exists() and not _removed(replaced):
            os.rename(replaced, unused_name(folder / f".del-{final.name}"))
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync_folder(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return Checkpoint(final)


def clean(folder: Path) -> None:
    """Removes only what killed jobs left, where it can: no training depends on it. Call it on rank 0 under the run's lock,
    before reading. Raises OSError if a checkpoint cannot get its name back."""
    for path in folder.iterdir() if folder.is_dir() else []:
        match = _OURS.fullmatch(path.name)
        if not match or path.is_symlink() or not path.is_dir():
            continue
        if match[1] == "old" and not (folder / match[2]).exists():
            os.rename(path, folder / match[2])
            sync_folder(folder)
        else:
            _removed(path)


def _removed(path: Path) -> bool:
    """Removes a folder of ours. False, after a warning, where a file in it cannot be removed: it is immutable, or open on
    another machine."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        print(f"{path}: cannot be removed ({error}); it is not needed and takes up space", file=sys.stderr, flush=True)
        return False
    return True


def remove(checkpoint: Checkpoint) -> None:
    """Renames a checkpoint, then removes it, so that a killed process leaves no partial one. Raises OSError."""
    doomed = checkpoint.path.with_name(f".del-{checkpoint.path.name}")
    if doomed.exists() and not _removed(doomed):
        doomed = unused_name(doomed)
    os.rename(checkpoint.path, doomed)
    sync_folder(doomed.parent)
    shutil.rmtree(doomed)


def put_aside_after(folder: Path, step: int) -> None:
    """Renames checkpoints later than `step`, where the run resumes, to left-step_N, so that they are not mistaken for those of
    the resumed run. Call it on rank 0. Raises OSError."""
    for checkpoint in checkpoints(folder):
        if checkpoint.step > step:
            os.rename(checkpoint.path, left := unused_name(folder / f"left-{checkpoint.path.name}"))
            print(f"{checkpoint.path}: is later than step {step}, where the run resumes; put aside as {left.name}", flush=True)
            sync_folder(folder)


def prune(folder: Path, keep_last: int, keep_best: int, trusted: set[int], held: Container[int] = ()) -> None:
    """Removes checkpoints except the newest `keep_last` and the `keep_best` with the lowest validation loss. Raises OSError.

    Only intact checkpoints count as kept, so damage never leaves fewer; those that are damaged or have no valid manifest are
    left alone. trusted: steps known to be intact; steps found intact here are added, so that each checkpoint is read once.
    held: steps that something else reads; they are left alone until the next call.
    """
    damaged: set[Checkpoint] = set()

    def intact(checkpoint: Checkpoint) -> bool:
        if checkpoint.step not in trusted and checkpoint not in damaged:
            if _is_intact(checkpoint):
                trusted.add(checkpoint.step)
            else:
                damaged.add(checkpoint)
        return checkpoint.step in trusted

    newest_first, keys = checkpoints(folder), {}
    for checkpoint in newest_first:
        with contextlib.suppress(CheckpointError):
            if isinstance((state := checkpoint.state()).get("val_loss"), int | float):
                keys[checkpoint] = best_key(state)
    best_first = sorted(keys, key=keys.__getitem__)
    keep = {
        *itertools.islice(filter(intact, newest_first), keep_last),
        *itertools.islice(filter(intact, best_first), keep_best),
    }
    failure = None
    for checkpoint in newest_first:
        removable = checkpoint not in keep and checkpoint not in damaged and checkpoint.step not in held
        if removable and _has_manifest(checkpoint):
            try:
                remove(checkpoint)
            except OSError as error:  # the others can still make room
                failure = failure or error
            trusted.discard(checkpoint.step)
    if failure:
        raise failure


def _is_intact(checkpoint: Checkpoint) -> bool:
    try:
        return checkpoint.damage() is None
    except CheckpointError:
        return False


def _has_manifest(checkpoint: Checkpoint) -> bool:
    try:
        return bool(checkpoint.manifest())
    except (CheckpointError, OSError, ValueError):
        return False


def best_key(state: dict) -> float:
    """Sort key of states: their validation loss; states without one, and NaN, come last. Equal keys: newest first, if sorted
    from the newest to the oldest."""
    loss = state.get("val_loss")
    return math.inf if loss is None or loss != loss else loss


# ---------------------------------------------------------------- loading


def newest_valid(
    folder: Path, engine: Engine, info: Callable[[str], None] = print, fetch: Callable[[], None] = lambda: None
) -> Checkpoint | None:
    """Finds the newest intact checkpoint (a collective). Damaged ones are put aside as `damaged-...` and reported to `info`.

    fetch(): a collective that brings a newer one here, if there is one elsewhere; called before each look at the folder.

    Raises UnsafeCheckpoint if the newest one is unsafe, and CheckpointError if there are checkpoints but none is valid, since a
    silent fresh start would lose the run.
    """
    tried = 0
    while True:
        fetch()
        newest = checkpoints(folder)[0].step if engine.rank == 0 and checkpoints(folder) else -1
        step = engine.broadcast(newest)
        if step < 0:
            break
        checkpoint = Checkpoint(folder / f"step_{step:08d}")
        try:
            check_files(checkpoint, engine)
            return checkpoint
        except UnsafeCheckpoint:
            raise
        except _Damaged as error:
            tried += 1
            if str(error):
                info(f"damaged checkpoint put aside: {error}")
        engine.barrier()
        if engine.rank == 0:
            os.rename(checkpoint.path, unused_name(folder / f"damaged-{checkpoint.path.name}"))
    if tried or engine.broadcast(int(engine.rank == 0 and any(folder.glob("damaged-step_*")))):
        raise CheckpointError(
            f"{folder}: none of its checkpoints is valid; restore one of damaged-step_*, or start over with another run.name"
        )
    if engine.rank == 0:
        for link in folder.glob("step_*"):
            info(f"{link}: ignored, since it is not a folder")
    return None


class _Damaged(CheckpointError):
    """A damaged checkpoint. The message is empty on ranks that did not see the damage."""


def check_files(checkpoint: Checkpoint, engine: Engine) -> None:
    """Reads and checks all files, divided among the ranks (a collective). Raises UnsafeCheckpoint or CheckpointError on every
    rank."""
    failure: CheckpointError | None = None
    try:
        if damage := checkpoint.damage(engine.rank, engine.world_size):
            failure = _Damaged(damage)
    except CheckpointError as error:
        failure = error
    kinds = (_Damaged, UnsafeCheckpoint, CheckpointError)
    mine = next((kind for kind in kinds if isinstance(failure, kind)), None)
    found = engine.all_reduce(torch.tensor([int(kind is mine) for kind in kinds], device=engine.device)).tolist()
    for kind, ranks in reversed(list(zip(kinds, found, strict=True))):
        if ranks:
            elsewhere = "" if kind is _Damaged else f"{checkpoint.path}: another rank refuses it; see its message"
            raise failure if mine is kind else kind(elsewhere)


def load(checkpoint: Checkpoint, engine: Engine) -> dict:
    """Restores weights and optimizer of this rank and returns the state. Raises CheckpointError if it does not fit."""
    state, reader = checkpoint.state(), CheckpointReader(checkpoint)
    if state.get("step") != checkpoint.step or type(state.get("optimizer_updates")) is not int:
        raise CheckpointError(f"{checkpoint.path}: state.json is from step {state.get('step')}; was the folder renamed?")
    kinds = {name.partition("/")[0] for name in reader.by_name}

    def fill(shard: Shard) -> None:
        kind, _, name = shard.name.partition("/")
        if kind in AVERAGES - kinds:  # it was not kept when the checkpoint was saved, so it begins now
            shard = shard._replace(name=f"model/{name}")
        if kind == "row_square" and kind not in kinds:
            shard.values.zero_()
        else:
            reader.read_into(shard)

    engine.restore(fill)
    engine.updates = state["optimizer_updates"]
    return state


class CheckpointReader:
    """Reads ranges of a checkpoint's tensors straight into live memory; the host needs one block in addition.

    Raises UnsafeCheckpoint unless the shards of every tensor cover it exactly once."""

    def __init__(self, checkpoint: Checkpoint):
        self.path = checkpoint.path
        self.by_name: dict[str, list[StoredShard]] = {}
        for stored in checkpoint.shards():
            self.by_name.setdefault(stored.name, []).append(stored)
        for name, parts in self.by_name.items():
            parts.sort(key=lambda part: part.offset)
            self._require_tiling(name, parts)

    def _require_tiling(self, name: str, parts: list[StoredShard]) -> None:
        end = 0
        for part in parts:
            if part.shape != parts[0].shape or part.offset != end:
                raise UnsafeCheckpoint(f"{self.path}: the shards of {name} overlap, leave a gap, or differ in shape")
            end += part.count
        if end != math.prod(parts[0].shape):
            raise UnsafeCheckpoint(f"{self.path}: {name} has {end} values, which does not match its shape {parts[0].shape}")

    def read_into(self, shard: Shard) -> None:
        """Fills `shard.values` with its range of the tensor. Raises CheckpointError, OSError."""
        parts = self.by_name.get(shard.name, [])
        if not parts or parts[0].shape != shard.shape:
            found = parts[0].shape if parts else "no such tensor"
            raise CheckpointError(f"{self.path}: {shard.name} must be {shard.shape}, the checkpoint has {found}")
        start, stop = shard.offset, shard.offset + shard.values.numel()
        for part in parts:
            low, high = max(start, part.offset), min(stop, part.offset + part.count)
            if low < high:
                read_values(part.values, low - part.offset, shard.values[low - start : high - start])


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Fills the parameters and buffers of a model that no engine distributes. Raises CheckpointError."""
    if damage := checkpoint.damage():
        raise CheckpointError(damage)
    reader = CheckpointReader(checkpoint)
    with torch.no_grad():
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            reader.read_into(Shard(f"model/{name}", tuple(tensor.shape), 0, tensor.detach().view(-1)))


# ---------------------------------------------------------------- files


def write_file(path: Path, blocks: Iterable[bytes | memoryview], on_progress: Callable[[], None] = lambda: None) -> dict:
    """Writes and syncs a new file that only its owner may read; returns its entry for the manifest. Raises OSError."""
    digest, size = xxhash.xxh3_128(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for block in blocks:
            rest = memoryview(block)
            while rest:
                part = rest[: 4 * BLOCK]
                part = part[: os.write(descriptor, part)]
                digest.update(part)
                size, rest = size + len(part), rest[len(part) :]
                on_progress()
        os.fsync(descriptor)
        on_progress()
    finally:
        os.close(descriptor)
    return {"bytes": size, "xxh3": digest.hexdigest()}
