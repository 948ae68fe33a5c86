"""Checkpoints: one format for every engine and every number of ranks. `manifest.py` says what a folder holds.

Every tensor is flattened, and each rank writes the contiguous pieces that it owns; the offset of a piece stands in the header
of its file. A reader takes from the pieces whatever range it holds itself, so any engine on any number of ranks reads what
another wrote, and no rank ever needs the whole model. Nothing is unpickled.

A save has three parts: `begin` makes a folder `.tmp-...`, `write_part` fills it on every rank, and once all ranks agreed that
they wrote, `commit` gives it a manifest and renames it: a checkpoint appears whole or not at all. Every file is synced before
the manifest, the folder before its rename, the folder around it after. `saver.py` puts the middle part into the background.

Writing and reading go straight between live memory and the files: on a CPU without any copy, on a GPU through one piece on the
host, which is never larger than a file.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import xxhash
from torch import nn

from pretrain import UserError
from pretrain.checkpoint.manifest import (
    FORMAT_VERSION,
    Checkpoint,
    CheckpointError,
    UnsafeCheckpoint,
    checkpoints,
    digest_json,
)
from pretrain.checkpoint.tensors import BLOCK, StoredShard, read_values, shards_header
from pretrain.engines.base import Engine, Shard
from pretrain.files import sync_folder, unused_name

MAX_FILE_BYTES = 1 << 30
_OURS = re.compile(r"\.(tmp|del|old)-(step_[0-9]{8,})")
"""Folders of unfinished work: a save, a removal, a checkpoint that is being replaced by one of the same step."""


class NotFinite(UserError):
    """The training state holds NaN or infinity; it is not saved."""

    status = 70


# ---------------------------------------------------------------- saving


def save(folder: Path, step: int, engine: Engine, state: dict) -> Checkpoint:
    """Writes `folder`/step_<step> from all ranks (a collective) and returns it once it is durable.

    Raises OSError on every rank when any rank could not write; what was there before stays.
    """
    text = state_text(state, step, engine)
    temporary = begin(folder, step, engine)
    try:
        agree(engine, lambda: write_part(temporary, engine.rank, engine.world_size, files_of(engine.shards(saving=True))))
        agree(engine, lambda: commit(temporary, text, engine.world_size) if engine.rank == 0 else None)
    except OSError:
        if engine.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Checkpoint(_final(temporary))


def state_text(state: dict, step: int, engine: Engine) -> bytes:
    """The content of state.json, fixed now, whatever the loop does with `state` later."""
    return json.dumps({**state, "step": step, "optimizer_updates": engine.updates}, indent=1).encode()


def agree(engine: Engine, work: Callable[[], object]) -> None:
    """All ranks do their part and wait for each other; if one fails, all raise OSError: all commit or none."""
    failure = None
    try:
        work()
    except OSError as error:
        failure = error
    if engine.all_reduce(torch.tensor(int(failure is not None), device=engine.device)):
        raise failure or OSError("the checkpoint could not be written: another rank failed")


def begin(folder: Path, step: int, engine: Engine) -> Path:
    """An empty folder for the parts of all ranks (a collective). Raises OSError on every rank when it cannot be made, or when
    the disk has no room for all parts."""
    temporary = folder / f".tmp-step_{step:08d}"
    needed = torch.tensor(sum(shard.values.nbytes for shard in engine.shards(saving=True)), device=engine.device)
    needed = int(engine.all_reduce(needed))
    agree(engine, lambda: _make_empty(temporary, needed) if engine.rank == 0 else None)
    return temporary


def _make_empty(folder: Path, needed: int) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.mkdir(folder, 0o700)
    disk = shutil.disk_usage(folder)
    if disk.free < needed and disk.total:  # some file systems of object stores report nothing
        os.rmdir(folder)
        room = f"a checkpoint needs {needed / 2**30:.3f} GiB, the disk has {disk.free / 2**30:.3f} GiB free"
        raise OSError(errno.ENOSPC, room, str(folder.parent))


def files_of(shards: Iterable[Shard]) -> Iterator[list[Shard]]:
    """The pieces, still views of live memory, cut and grouped into files of at most MAX_FILE_BYTES."""
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
    """This rank's files, durable, and a list of them for rank 0. `on_progress` is called whenever some bytes went to the disk.

    No collective, no device but for copies to the host: it may run in a thread. Raises OSError, NotFinite.
    """
    written = {}
    for number, shards in enumerate(files):
        name = f"tensors-{rank:05d}-of-{world_size:05d}-{number:03d}.safetensors"
        written[name] = write_file(folder / name, _blocks(shards_header(shards), shards), on_progress)
    write_file(folder / f"files-{rank:05d}.json", [json.dumps(written).encode()], on_progress)
    sync_folder(folder)


def _blocks(header: bytes, shards: list[Shard]) -> Iterator[memoryview | bytes]:
    yield header
    for shard in shards:
        piece = shard.values.detach().cpu()
        if piece.dtype != torch.float32:
            raise TypeError(f"{shard.name} is {piece.dtype}, a checkpoint holds fp32")
        for part in piece.split(BLOCK):
            if not all(map(math.isfinite, torch.aminmax(part))):  # one pass without a copy, and NaN comes through it
                raise NotFinite(f"{shard.name} is not finite, so the state is not saved; the last checkpoint is from before")
            yield memoryview(part.numpy()).cast("B")


def commit(temporary: Path, state: bytes, world_size: int) -> Checkpoint:
    """On rank 0, after all ranks wrote: the manifest, then the name. Raises OSError; durable when it returns."""
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
    final, folder = _final(temporary), temporary.parent
    replaced = folder / f".old-{final.name}"
    if final.exists():  # the same step again, after going back; `clean` undoes this if the next line is never reached
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync_folder(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return Checkpoint(final)


def _final(temporary: Path) -> Path:
    return temporary.with_name(temporary.name.removeprefix(".tmp-"))


def clean(folder: Path) -> None:
    """On rank 0 under the run's lock, before anything is read: removes what killed jobs left, nothing else. Raises OSError."""
    for path in folder.iterdir() if folder.is_dir() else []:
        match = _OURS.fullmatch(path.name)
        if not match or path.is_symlink() or not path.is_dir():
            continue
        if match[1] == "old" and not (folder / match[2]).exists():
            os.rename(path, folder / match[2])
            sync_folder(folder)
        else:
            shutil.rmtree(path)


def remove(checkpoint: Checkpoint) -> None:
    """Removes a checkpoint; renamed first, so that a kill leaves no half one. Raises OSError."""
    doomed = checkpoint.path.with_name(f".del-{checkpoint.path.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(checkpoint.path, doomed)
    sync_folder(doomed.parent)
    shutil.rmtree(doomed)


def put_aside_after(folder: Path, step: int) -> None:
    """On rank 0, when a run goes on after `step`: later checkpoints, of a branch that it leaves, must not be taken for its own.
    Nothing is removed: step_N becomes left-step_N. Raises OSError."""
    for checkpoint in checkpoints(folder):
        if checkpoint.step > step:
            os.rename(checkpoint.path, left := unused_name(folder / f"left-{checkpoint.path.name}"))
            print(f"{checkpoint.path}: is later than step {step}, where the run goes on; put aside as {left.name}", flush=True)
            sync_folder(folder)


def prune(folder: Path, keep_last: int, keep_best: int, trusted: set[int]) -> None:
    """Removes checkpoints beyond the newest `keep_last` and the `keep_best` of lowest validation loss. Raises OSError.

    Only checkpoints that verify count as kept, so damage never leaves fewer; what is found damaged, or has no valid manifest,
    is left alone. trusted: steps known to be whole; what is verified here joins them, so that each checkpoint is read once.
    """
    damaged: set[Checkpoint] = set()

    def whole(checkpoint: Checkpoint) -> bool:
        if checkpoint.step not in trusted and checkpoint not in damaged:
            if _is_whole(checkpoint):
                trusted.add(checkpoint.step)
            else:
                damaged.add(checkpoint)
        return checkpoint.step in trusted

    newest_first = checkpoints(folder)
    with_loss = [each for each in newest_first if _has_val_loss(each)]
    best_first = sorted(with_loss, key=lambda each: best_key(each.state()))
    keep = {*_first(keep_last, newest_first, whole), *_first(keep_best, best_first, whole)}
    for checkpoint in newest_first:
        if checkpoint not in keep and checkpoint not in damaged and _has_manifest(checkpoint):
            remove(checkpoint)
            trusted.discard(checkpoint.step)


def _is_whole(checkpoint: Checkpoint) -> bool:
    try:
        return checkpoint.damage() is None
    except CheckpointError:
        return False


def _has_manifest(checkpoint: Checkpoint) -> bool:
    try:
        return bool(checkpoint.manifest())
    except (CheckpointError, OSError, ValueError):
        return False


def _first(count: int, candidates: list[Checkpoint], whole: Callable[[Checkpoint], bool]) -> list[Checkpoint]:
    chosen: list[Checkpoint] = []
    for candidate in candidates:
        if len(chosen) < count and whole(candidate):
            chosen.append(candidate)
    return chosen


def _has_val_loss(checkpoint: Checkpoint) -> bool:
    try:
        return isinstance(checkpoint.state().get("val_loss"), int | float)
    except CheckpointError:
        return False


def best_key(state: dict) -> tuple[float, int]:
    """Sorts states by validation loss, lowest first; among equals the newest; those without one last."""
    loss = state.get("val_loss")
    return (math.inf if loss is None or loss != loss else loss, -state["step"])


# ---------------------------------------------------------------- loading


def newest_valid(folder: Path, engine: Engine, say: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest undamaged checkpoint, agreed on by all ranks; damaged ones are put aside as `damaged-...`, which is said.

    Raises UnsafeCheckpoint when the newest one is unsafe, and CheckpointError when there are checkpoints but none is valid:
    a silent fresh start would lose the run.
    """
    tried = 0
    while True:
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
                say(f"damaged checkpoint put aside: {error}")
        engine.barrier()
        if engine.rank == 0:
            os.rename(checkpoint.path, unused_name(folder / f"damaged-{checkpoint.path.name}"))
    if tried or engine.broadcast(int(engine.rank == 0 and any(folder.glob("damaged-step_*")))):
        raise CheckpointError(
            f"{folder}: none of its checkpoints is valid; restore one of damaged-step_*, or use another run.name to begin anew"
        )
    if engine.rank == 0:
        for link in folder.glob("step_*"):
            say(f"{link}: is not a folder, so it is no checkpoint and is not used")
    return None


class _Damaged(CheckpointError):
    """Says what, on the ranks that saw it."""


def check_files(checkpoint: Checkpoint, engine: Engine) -> None:
    """Reads and checks the files, shared among the ranks (a collective). All ranks raise UnsafeCheckpoint, CheckpointError."""
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
            others = "" if kind is _Damaged else f"{checkpoint.path}: is refused by another rank, which says why"
            raise failure if mine is kind else kind(others)


def load(checkpoint: Checkpoint, engine: Engine) -> dict:
    """Restores weights and optimizer on this rank and returns the state. Raises CheckpointError when it does not fit."""
    state, pieces = checkpoint.state(), CheckpointReader(checkpoint)
    if state.get("step") != checkpoint.step or type(state.get("optimizer_updates")) is not int:
        raise CheckpointError(f"{checkpoint.path}: state.json is of step {state.get('step')}; was the folder renamed?")
    engine.restore(pieces.read_into)
    engine.updates = state["optimizer_updates"]
    return state


class CheckpointReader:
    """The pieces of a checkpoint, by tensor. Reads straight into live memory: the host holds one block beside it."""

    def __init__(self, checkpoint: Checkpoint):
        self.path = checkpoint.path
        self.by_name: dict[str, list[StoredShard]] = {}
        for piece in checkpoint.shards():
            self.by_name.setdefault(piece.name, []).append(piece)
        for name, pieces in self.by_name.items():
            pieces.sort(key=lambda piece: piece.offset)
            self._require_tiling(name, pieces)

    def _require_tiling(self, name: str, pieces: list[StoredShard]) -> None:
        end = 0
        for piece in pieces:
            if piece.shape != pieces[0].shape or piece.offset != end:
                raise UnsafeCheckpoint(f"{self.path}: the pieces of {name} overlap, leave a gap, or differ in shape")
            end += piece.count
        if end != math.prod(pieces[0].shape):
            raise UnsafeCheckpoint(f"{self.path}: {name} has {end} values, its shape {pieces[0].shape} has others")

    def read_into(self, shard: Shard) -> None:
        """Fills the piece of memory that `shard` names. Raises CheckpointError, OSError."""
        pieces = self.by_name.get(shard.name, [])
        if not pieces or pieces[0].shape != shard.shape:
            found = pieces[0].shape if pieces else "no such tensor"
            raise CheckpointError(f"{self.path}: {shard.name} must be {shard.shape}, the checkpoint has {found}")
        start, stop = shard.offset, shard.offset + shard.values.numel()
        for piece in pieces:
            low, high = max(start, piece.offset), min(stop, piece.offset + piece.count)
            if low < high:
                read_values(piece.values, low - piece.offset, shard.values[low - start : high - start])


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Fills the parameters and buffers of a model that is spread over nothing, without an engine. Raises CheckpointError."""
    if damage := checkpoint.damage():
        raise CheckpointError(damage)
    pieces = CheckpointReader(checkpoint)
    with torch.no_grad():
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            pieces.read_into(Shard(f"model/{name}", tuple(tensor.shape), 0, tensor.detach().view(-1)))


# ---------------------------------------------------------------- files


def write_file(path: Path, blocks: Iterable[bytes | memoryview], on_progress: Callable[[], None] = lambda: None) -> dict:
    """Writes and syncs a new file that only its owner may read; returns what the manifest says of it. Raises OSError."""
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
