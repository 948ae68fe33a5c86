"""Out of memory: where it happened, and which flags free memory, cheapest first, computed from the settings of the run.

<run>/out_of_memory/rank_N.txt       the message; rank 0 ends the job with it, instead of naming a lost peer
<run>/out_of_memory/rank_N.pickle    on GPUs: what occupied the memory, for https://pytorch.org/memory_viz
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pretrain import UserError
from pretrain.config import Config, validate, work_of
from pretrain.engines.base import Engine
from pretrain.engines.config import can_cut, sample_ranks
from pretrain.files import write_atomically

_FOLDER = "out_of_memory"
_CPU_ALLOCATOR = "DefaultCPUAllocator"  # its errors have no class of their own


class OutOfMemory(UserError):
    """The settings need more memory than there is. A restart would fail in the same step, so the status is that of settings
    that cannot work, which nothing restarts."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """True for errors of the allocators of GPUs, CPUs and Python."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error))


def explain(error: BaseException, config: Config, engine: Engine | None, folder: Path) -> OutOfMemory:
    """Returns an error that says where memory ran out and what would free some, and leaves notes in the run's `folder`."""
    where, device = "before the engine started", "cpu"
    if engine:
        step, doing, device = engine.watchdog.step, engine.watchdog.doing, engine.device.type
        where = f"in step {step}" if step else "before the first step"
        where += f" on rank {engine.rank} ({engine.device_name}, {doing})"
    cause = " ".join(str(error).split())[:240] or type(error).__name__
    choices = list(advice(config, engine.world_size if engine else 1, device))
    lines = [f"out of memory {where}: {cause}"]
    if choices:
        lines.append("Start the same command with more of these flags until it fits, the cheapest first:")
    lines += [f"  {flags}    {effect}" for flags, effect in choices]
    lines.append("Otherwise use more ranks, devices with more memory, or a smaller model.")
    reason = "\n".join(lines)
    if engine:
        with contextlib.suppress(OSError, RuntimeError, MemoryError):  # the message matters more than its copies
            note = folder / _FOLDER / f"rank_{engine.rank}.txt"
            note.parent.mkdir(exist_ok=True)
            write_atomically(note, reason + "\n")
            if device == "cuda":
                torch.cuda.memory._dump_snapshot(str(note.with_suffix(".pickle")))
    return OutOfMemory(reason)


def forget(folder: Path) -> None:
    """Removes the notes of an earlier start."""
    for note in (folder / _FOLDER).glob("rank_*"):
        note.unlink(missing_ok=True)


def reason_of_peer(folder: Path) -> tuple[int, str] | None:
    """(exit status, reason) of a rank that ran out of memory in this start; None: none did."""
    with contextlib.suppress(OSError):
        for note in sorted((folder / _FOLDER).glob("rank_*.txt")):
            return OutOfMemory.status, note.read_text(encoding="utf-8").rstrip()
    return None


def advice(config: Config, world_size: int, device: str) -> Iterator[tuple[str, str]]:
    """(flags, effect and cost) of each change that frees memory and is possible with these settings, cheapest first."""
    for changes, effect in possible_changes(config, world_size, device):
        yield flags_of(changes), effect


def flags_of(changes: dict[str, Any]) -> str:
    """The changes as flags of a command."""
    return " ".join(f"--{key} {'null' if value is None else value}" for key, value in changes.items())


def possible_changes(config: Config, world_size: int, device: str) -> Iterator[tuple[dict[str, Any], str]]:
    """(changes of settings, effect and cost) that free memory and are possible with these settings, cheapest first."""
    for changes, effect in _changes(config, world_size, device):
        if _works(changed(config, changes), world_size):
            yield changes, effect


def _works(config: Config, world_size: int) -> bool:
    return can_cut(config.engine, work_of(config, config.model), world_size) and not validate(config, world_size)


class Fit(NamedTuple):
    """Changes of settings with which a run fits."""

    changes: dict[str, Any]
    effect: str
    needed_gib: float


def fitting(config: Config, world_size: int, device: str, needed_gib: Callable[[Config], float], limit: float) -> list[Fit]:
    """Changes with which a run needs at most `limit` GiB: each that suffices by itself, in the smallest degree that does;
    if none does, the cheapest ones that do together. Empty: nothing that is known here suffices.

    needed_gib: what a configuration needs.
    """
    found = []
    for changes, effect in possible_changes(config, world_size, device):
        if "data.sequence_length" in changes:
            continue  # another run, see below
        for stronger in _degrees(config, world_size, changes):
            if (needed := needed_gib(changed(config, stronger))) <= limit:
                found.append(Fit(stronger, effect if stronger == changes else "", needed))
                break
    return found or _together(config, world_size, device, needed_gib, limit)


def _degrees(config: Config, world_size: int, changes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same change from its smallest degree to its largest, as far as these settings allow."""
    (key, value), *others = changes.items()
    if others or not isinstance(value, int) or key == "engine.replicas":
        yield changes
        return
    smaller = key == "batch.micro_batch_size"
    for size in range(config.batch.micro_batch_size - 1, 0, -1) if smaller else range(value, world_size + 1):
        if _works(changed(config, {key: size}), world_size):
            yield {key: size}


def _together(
    config: Config, world_size: int, device: str, needed_gib: Callable[[Config], float], limit: float
) -> list[Fit]:  # fmt: skip
    """The cheapest changes that suffice together, none of which could be left out; a shorter sequence is the last of them."""
    total: dict[str, Any] = {}
    while needed_gib(changed(config, total)) > limit:
        following = next(possible_changes(changed(config, total), world_size, device), None)
        if following is None:
            return []
        total |= following[0]
    for key in [key for key in total if key not in ("run.name", "engine.bucket_mib")]:
        fewer = {each: value for each, value in total.items() if each != key}
        tried = changed(config, fewer)
        if key != "data.sequence_length" and _works(tried, world_size) and needed_gib(tried) <= limit:
            total = fewer
    return [Fit(total, "", needed_gib(changed(config, total)))]


def _changes(config: Config, world_size: int, device: str) -> Iterator[tuple[dict[str, Any], str]]:
    engine, batch = config.engine, config.batch
    if engine.compile == "none" and device == "cuda":
        yield {"engine.compile": "blocks"}, "fewer activations within blocks, and faster; the first step takes longer"
    per_rank = batch.global_batch_size // sample_ranks(engine, world_size)
    smaller = [size for size in range(1, batch.micro_batch_size // 2 + 1) if per_rank % size == 0]
    if smaller:
        share = f"{smaller[-1]}/{batch.micro_batch_size}"
        yield {"batch.micro_batch_size": smaller[-1]}, f"{share} of the activations; the same result, in smaller products"
    if engine.reduce_gradients == "step":
        yield {"engine.reduce_gradients": "micro_batch"}, "no full gradients between micro-batches; more traffic"
    if engine.name != "fsdp2" and engine.offload == "none" and world_size > 1:
        name = {"engine.name": "fsdp2"} | ({"engine.bucket_mib": None} if engine.bucket_mib else {})
        yield name, f"1/{world_size} of weights, gradients and moments on each rank; more traffic"
    if engine.replicas > 1:
        yield {"engine.replicas": 1}, f"1/{world_size} of the state on each rank; more traffic between nodes"
    if engine.activation_checkpointing == "none":
        yield {"engine.activation_checkpointing": "selective"}, "only the products of blocks are kept; a few percent slower"
    yield from _cuts(config, world_size)
    if engine.activation_checkpointing != "full":
        yield {"engine.activation_checkpointing": "full"}, "only the inputs of blocks are kept; a third more FLOPs"
    if engine.offload == "none" and device == "cuda":
        yield {"engine.offload": "optimizer"}, "the optimizer's state moves to the host; transfers in each step"
    if engine.offload != "all" and device == "cuda":
        yield {"engine.offload": "all"}, "weights move to the host, too; transfers in each pass"
    if (half := config.data.sequence_length // 2) >= 128:
        changes = {"data.sequence_length": half, "run.name": f"{config.run.name}_{half}"}
        yield changes, "half of the activations or less; another run, which sees shorter texts"


def _cuts(config: Config, world_size: int) -> Iterator[tuple[dict[str, Any], str]]:
    """The next degree of each way to cut the model that is possible together with those before it."""
    experts = "gathered experts of a block" if config.engine.name == "fsdp2" else "experts"
    effects = {
        "expert": f"{{}} of the {experts} on each rank; tokens travel to their experts",
        "sequence": "{} of the activations; tokens and heads change places around each attention",
        "tensor": "{} of the activations, and of the matrices of a block, but not of experts; more traffic in each block",
    }
    for kind, effect in effects.items():
        degree = getattr(config.engine.parallel, kind)
        for more in range(2 * degree, world_size + 1, degree):
            changes = {f"engine.parallel.{kind}": more}
            if _works(changed(config, changes), world_size):
                config = changed(config, changes)
                yield changes, effect.format(f"{degree}/{more}")
                break


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """The configuration with other values of some keys."""
    for key, value in changes.items():
        config = _replaced(config, key.split("."), value)
    return config


def _replaced(settings: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return dataclasses.replace(settings, **{name: _replaced(getattr(settings, name), rest, value) if rest else value})
