"""Checkpoints: one format for every engine and every number of ranks.

    checkpoints/step_00001000/
      manifest.json                    size and xxh3-128 of every other file; without it the folder is no checkpoint
      state.json                       step, position, tokens, settings, data fingerprint: what the loop needs to go on
      tensors-00000-of-00002-000.safetensors   one rank's pieces of weights and moments, fp32, at most 1 GiB a file

Every tensor is flattened, and each rank writes the contiguous pieces that it owns; the offset of a piece stands in the header of
its file. A reader takes from the pieces whatever range it holds itself, so any engine on any number of ranks reads what another
wrote, and no rank ever needs the whole model. Nothing is unpickled.

A checkpoint is written into `.tmp-...`, synced, given its manifest, and renamed: it appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from safetensors.numpy import save as serialize
from torch import nn

from pretrain.runtime.engine import Engine, Shard

FORMAT_VERSION = 1
MAX_FILE_BYTES = 1 << 30
_NAME = re.compile(r"step_(\d{8,})")


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint folder."""

    path: Path

    @property
    def step(self) -> int:
        """The step after which it was saved."""
        return int(_NAME.fullmatch(self.path.name).group(1))

    def state(self) -> dict:
        """What the loop stored."""
        return json.loads((self.path / "state.json").read_text())

    def manifest(self) -> dict:
        """{"format_version", "world_size", "files": {name: {"bytes", "xxh3"}}}. Raises OSError or ValueError when damaged,
        CheckpointError when another version of the program must read it."""
        manifest = json.loads((self.path / "manifest.json").read_text())
        if not isinstance(manifest, dict) or manifest.pop("xxh3", None) != _digest_json(manifest):
            raise ValueError("it has changed since it was written")
        if manifest["format_version"] != FORMAT_VERSION:
            found = manifest["format_version"]
            raise CheckpointError(f"{self.path}: has format {found}, this program reads format {FORMAT_VERSION}")
        return manifest

    def damage(self, part: int = 0, parts: int = 1) -> str | None:
        """What is wrong with the files of this `part` out of `parts` (so that ranks can share the reading), or None."""
        try:
            files = sorted(self.manifest()["files"].items())
        except (OSError, ValueError) as error:
            return f"{self.path}: manifest.json is missing or damaged ({error})"
        for name, expected in files[part::parts]:
            file = self.path / name
            if file.is_symlink() or not file.is_file() or file.parent != self.path:
                return f"{file}: is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{file}: has {file.stat().st_size} bytes, the manifest says {expected['bytes']}"
            if _digest_file(file) != expected["xxh3"]:
                return f"{file}: its content has changed since it was written"
        return None


def checkpoints(folder: Path) -> list[Checkpoint]:
    """All checkpoints in `folder`, newest first. Unfinished ones have other names; their content is not verified here."""
    if not folder.is_dir():
        return []
    found = [
        Checkpoint(path) for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


# ---------------------------------------------------------------- saving


def save(folder: Path, step: int, engine: Engine, state: dict) -> Checkpoint:
    """Writes `folder`/step_<step> from all ranks (a collective) and returns it once it is durable.

    Raises OSError on every rank when any rank could not write; what was there before stays.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".tmp-{final.name}"
    state = {**state, "step": step, "optimizer_updates": engine.updates}
    try:
        _agree(engine, lambda: _make_empty(temporary) if engine.rank == 0 else None)
        _agree(engine, lambda: _write_part(temporary, engine))
        _agree(engine, lambda: _commit(temporary, final, state, engine.world_size) if engine.rank == 0 else None)
    except OSError:
        if engine.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Checkpoint(final)


def _agree(engine: Engine, work: Callable[[], None]) -> None:
    """All ranks do their part and wait for each other; if one fails, all raise OSError: all commit or none."""
    failure = None
    try:
        work()
    except OSError as error:
        failure = error
    if engine.all_reduce(torch.tensor(int(failure is not None), device=engine.device)):
        raise failure or OSError("the checkpoint could not be written: another rank failed")


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _write_part(folder: Path, engine: Engine) -> None:
    files = _write_shards(folder, engine)
    _write_file(folder / f"files-{engine.rank:05d}.json", json.dumps(files).encode())


def _write_shards(folder: Path, engine: Engine) -> dict[str, dict]:
    """This rank's pieces in files of bounded size, so that the host never holds more than one of them."""
    files: dict[str, dict] = {}
    for number, shards in enumerate(_batches(engine.shards(saving=True))):
        name = f"tensors-{engine.rank:05d}-of-{engine.world_size:05d}-{number:03d}.safetensors"
        arrays = {shard.name: shard.piece.cpu().numpy() for shard in shards}
        pieces = {shard.name: {"offset": shard.offset, "shape": shard.shape} for shard in shards}
        files[name] = _write_file(folder / name, serialize(arrays, metadata={"pieces": json.dumps(pieces)}))
    return files


def _batches(shards: Iterable[Shard]) -> Iterator[list[Shard]]:
    batch: list[Shard] = []
    size = 0
    for shard in shards:
        if not shard.piece.numel():
            continue
        if batch and size + shard.piece.nbytes > MAX_FILE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(shard)
        size += shard.piece.nbytes
    if batch:
        yield batch


def _commit(temporary: Path, final: Path, state: dict, world_size: int) -> None:
    files = {"state.json": _write_file(temporary / "state.json", json.dumps(state, indent=1).encode())}
    for rank in range(world_size):
        part = temporary / f"files-{rank:05d}.json"
        if not part.exists():
            raise OSError(f"{part}: is missing; run.directory must be on a file system that all nodes share")
        files.update(json.loads(part.read_text()))
        part.unlink()
    manifest = {"format_version": FORMAT_VERSION, "world_size": world_size, "files": files}
    manifest["xxh3"] = _digest_json(manifest)
    _write_file(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
    _sync_folder(temporary)
    if final.exists():  # the same step again, after a fallback past it
        shutil.rmtree(final)
    os.rename(temporary, final)
    _sync_folder(final.parent)


def prune(folder: Path, keep: set[int]) -> None:
    """Removes checkpoints whose step is not in `keep`, and what unfinished saves left; renamed first, so that a kill leaves no half one."""
    for checkpoint in checkpoints(folder):
        if checkpoint.step not in keep:
            os.rename(checkpoint.path, folder / f".del-{checkpoint.path.name}")
    for leftover in (*folder.glob(".del-step_*"), *folder.glob(".tmp-step_*")):
        if not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)


# ---------------------------------------------------------------- loading


def newest_valid(folder: Path, engine: Engine, say=print) -> Checkpoint | None:
    """The newest undamaged checkpoint, agreed on by all ranks; damaged ones are put aside as `damaged-...`, which is said.

    Raises CheckpointError when there are checkpoints but none is valid: a silent fresh start would lose the run.
    """
    tried = 0
    while True:
        newest = checkpoints(folder)[0].step if engine.rank == 0 and checkpoints(folder) else -1
        step = engine.broadcast(newest)
        if step < 0:
            break
        checkpoint = Checkpoint(folder / f"step_{step:08d}")
        damage = checkpoint.damage(engine.rank, engine.world_size)
        if not engine.all_reduce(torch.tensor(int(damage is not None), device=engine.device)):
            return checkpoint
        tried += 1
        if damage:
            say(f"damaged checkpoint put aside: {damage}")
        engine.barrier()
        if engine.rank == 0:
            os.rename(checkpoint.path, _unused(folder / f"damaged-{checkpoint.path.name}"))
    if tried or engine.broadcast(int(engine.rank == 0 and any(folder.glob("damaged-step_*")))):
        raise CheckpointError(
            f"{folder}: none of its checkpoints is valid; restore one of damaged-step_*, or use another run.name to start afresh"
        )
    return None


def load(checkpoint: Checkpoint, engine: Engine) -> dict:
    """Restores weights and optimizer on this rank and returns the state. Raises CheckpointError when shapes do not match."""
    state, pieces = checkpoint.state(), _Pieces(checkpoint)
    engine.restore(pieces.read_into)
    engine.updates = state["optimizer_updates"]
    return state


class _Pieces:
    """The pieces of a checkpoint, by tensor."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.by_name: dict[str, list[tuple[int, safe_open]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in checkpoint.manifest()["files"]:
            if name.endswith(".safetensors"):
                file = safe_open(checkpoint.path / name, framework="pt")
                for key, piece in json.loads(file.metadata()["pieces"]).items():
                    self.by_name.setdefault(key, []).append((piece["offset"], file))
                    self.shapes[key] = tuple(piece["shape"])

    def read_into(self, shard: Shard) -> None:
        if self.shapes.get(shard.name) != shard.shape:
            found = self.shapes.get(shard.name, "no such tensor")
            raise CheckpointError(f"{self.checkpoint.path}: {shard.name} must be {shard.shape}, the checkpoint has {found}")
        begin, end, filled = shard.offset, shard.offset + shard.piece.numel(), 0
        for offset, file in self.by_name[shard.name]:
            stored = file.get_slice(shard.name)
            low, high = max(begin, offset), min(end, offset + stored.get_shape()[0])
            if low < high:
                shard.piece[low - begin : high - begin] = stored[low - offset : high - offset].to(shard.piece.device)
                filled += high - low
        if filled != shard.piece.numel():
            raise CheckpointError(
                f"{self.checkpoint.path}: {shard.name} is incomplete, {filled} of {shard.piece.numel()} values"
            )


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Fills the parameters of a model that is spread over nothing, without an engine. Raises CheckpointError."""
    if damage := checkpoint.damage():
        raise CheckpointError(damage)
    pieces = _Pieces(checkpoint)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            pieces.read_into(Shard(f"model/{name}", tuple(parameter.shape), 0, parameter.view(-1)))


def best_key(state: dict) -> tuple[float, int]:
    """Sorts states by validation loss, lowest first; among equals the newest; those without one last."""
    loss = state.get("val_loss")
    return (float("inf") if loss is None or loss != loss else loss, -state["step"])


# ---------------------------------------------------------------- files


def _write_file(path: Path, data: bytes) -> dict:
    """Writes and syncs; returns what the manifest says of the file."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}


def _digest_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _digest_json(content: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unused(path: Path) -> Path:
    number = 0
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
