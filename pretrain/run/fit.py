"""Whether a run fits into the memory of its GPUs, before it starts, by the plan alone: no tensor is made.

Weights, gradients and moments are counted to the byte, so a run whose state exceeds the memory is refused. What blocks keep,
and what a process needs besides its tensors, is an estimate: a run that needs more by that is only warned of.
"""

from __future__ import annotations

import dataclasses

import torch

from pretrain import stages
from pretrain.config import Config, validate
from pretrain.data.checks import Finding
from pretrain.engines.base import Engine
from pretrain.model.config import ModelConfig
from pretrain.plan.memory import FRAGMENTATION, OUTSIDE_GIB, Memory, memory, needed_gib
from pretrain.run.memory import changed, fitting, flags_of

_MOST_RANKS = 1024


def planned_memory(config: Config, model: ModelConfig, ranks: int) -> Memory:
    """The plan for a rank, in the stage of the run that needs most."""
    config = stages.largest(config)
    length, size = config.data.sequence_length, config.batch.micro_batch_size
    return memory(model, length, size, config.engine, ranks, config.optimizer.name, config.optimizer.averages)


def device_gib(engine: Engine) -> float | None:
    """Memory of this rank's GPU as its driver reports it; None on a CPU."""
    if engine.device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(engine.device).total_memory / 2**30


def memory_findings(config: Config, model: ModelConfig, ranks: int, gib: float | None, where: str) -> list[Finding]:
    """does-not-fit: stops a run whose state exceeds `gib`, and warns of one that needs more by estimate; with flags with which
    it fits by the plan. gib: None: unknown, nothing is checked. where: name of the device."""
    if gib is None:
        return []
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision=config.engine.precision or "bf16"))
    plan = planned_memory(config, model, ranks)
    state, needed = sum(plan[:3]) / 2**30, needed_gib(plan.peak)
    if needed <= gib:
        return []
    if stops := state > gib:
        text = f"weights, gradients and moments of a rank take {state:.1f} GiB, and the device has {gib:.1f} GiB"
    else:
        text = (
            f"a rank needs about {needed:.1f} GiB of {gib:.1f} GiB: state {state:.1f}, activations and loss "
            f"{(plan.peak - sum(plan[:3])) / 2**30:.1f}, {FRAGMENTATION:.0%} for fragmentation, {OUTSIDE_GIB:g} outside of "
            "torch; it may run out of memory"
        )
    return [Finding("does-not-fit", where, f"{text}; {_advice(config, model, ranks, gib)}", stops)]


def _advice(config: Config, model: ModelConfig, ranks: int, gib: float) -> str:
    def needed(tried: Config, ranks: int = ranks) -> float:
        return needed_gib(planned_memory(tried, model, ranks).peak)

    fits = fitting(config, ranks, "cuda", needed, gib)
    if fits:
        return "by the plan, these fit: " + "; ".join(f"{flags_of(each.changes)} ({each.needed_gib:.1f} GiB)" for each in fits)
    changes = {"engine.name": "fsdp2", "engine.activation_checkpointing": "full", "batch.micro_batch_size": 1}
    if config.engine.bucket_mib:
        changes["engine.bucket_mib"] = None
    tried, more = changed(config, changes), 2 * ranks
    while more <= _MOST_RANKS:
        if not validate(tried, more) and needed(tried, more) <= gib:
            return f"no setting makes it fit on {ranks} ranks; by the plan, {more} ranks do with {flags_of(changes)}"
        more *= 2
    return f"no setting makes it fit on {ranks} ranks: use devices with more memory, or a smaller model"
