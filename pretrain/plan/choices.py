"""The ways to run a job on some GPUs, what each needs, and which to prefer: thousands per second, by the formulas of
`memory.py`, `messages.py` and `scaling.py`.

All of them train the same model on the same batches: engine, parallelism, recomputation and micro-batch change neither loss nor
curve. It knows one GPU kind and number at a time, and no prices.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pretrain.config import EngineConfig, ParallelConfig
from pretrain.engines.config import KINDS_OF, OPTIMIZERS_OF, Work, can_cut, sample_ranks
from pretrain.model.config import ModelConfig
from pretrain.plan.memory import Memory, memory, needed_gib
from pretrain.plan.messages import collectives
from pretrain.plan.scaling import Cluster, StepTime, step_time

ENGINES = tuple(KINDS_OF)
CHECKPOINTING = ("none", "selective", "full")
_MOST_SEQUENCES = 64  # of a micro-batch: larger ones are not faster
ROOM = 0.95
"""Share of a GPU's memory that a plan may need to be recommended: the formulas are estimates."""
_SAME = 0.03  # plans whose times differ by less are equally fast: the estimate is coarser


class Job(NamedTuple):
    """What is trained, on however many GPUs."""

    model: ModelConfig
    """Resolved."""
    length: int
    """Tokens per sequence."""
    sequences: int
    """Sequences per step."""
    optimizer: str = "adamw"
    memory_ratio: float = 1.0
    """Peak that a run of this kind had, over what the formula says."""
    averages: int = 0
    """`optimizer.averages`."""
    average_bytes: int = 0
    """`optimizer.average_bytes`."""


class Plan(NamedTuple):
    """A way to run a job on a cluster."""

    engine: EngineConfig
    micro_batch: int
    accumulation: int
    cluster: Cluster
    memory: Memory
    time: StepTime
    memory_ratio: float
    """That of the job."""
    sent: tuple[float, float]
    """Bytes that a rank sends in a step: weights and gradients, which computation hides; tokens, which it waits for."""

    @property
    def needed_gib(self) -> float:
        """With what a process needs besides its tensors."""
        return needed_gib(self.memory.peak * self.memory_ratio)

    @property
    def fits(self) -> bool:
        """Whether a GPU has that much."""
        return self.needed_gib <= self.cluster.device.memory_gib

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds of parallelism that are on."""
        return tuple(name for name, size in dataclasses.asdict(self.engine.parallel).items() if size > 1)

    def __str__(self) -> str:
        """Such as `fsdp2, sequence 2`."""
        return name_of(self.engine)


def name_of(engine: EngineConfig) -> str:
    """Engine, replicas and kinds of parallelism, such as `fsdp2, sequence 2`."""
    sizes = {"replicas": engine.replicas, **dataclasses.asdict(engine.parallel)}
    return ", ".join([engine.name, *(f"{name} {size}" for name, size in sizes.items() if size > 1)])


def plan(job: Job, engine: EngineConfig, micro_batch: int, cluster: Cluster, compiled: bool = True) -> Plan:
    """What a way to run the job needs. The batch must divide (`micro_batches`)."""
    accumulation = job.sequences // (micro_batch * sample_ranks(engine, cluster.gpus))
    batch = job.length, micro_batch, accumulation, engine
    messages = collectives(job.model, *batch, cluster.gpus)
    sent = tuple(float(sum(each.sent_bytes for each in messages if each.awaited == waits)) for waits in (False, True))
    needed = memory(job.model, job.length, micro_batch, engine, cluster.gpus, job.optimizer, job.averages)
    time = step_time(job.model, *batch, cluster, compiled=compiled, average_bytes=job.average_bytes)
    return Plan(engine, micro_batch, accumulation, cluster, needed, time, job.memory_ratio, sent)


def micro_batches(job: Job, engine: EngineConfig, gpus: int) -> list[int]:
    """The micro-batches that divide the batch over so many GPUs, smallest first; empty: their groups do not divide it."""
    each, rest = divmod(job.sequences, sample_ranks(engine, gpus))
    return [] if rest else [size for size in range(1, min(each, _MOST_SEQUENCES) + 1) if each % size == 0]


def largest(job: Job, engine: EngineConfig, cluster: Cluster, room: float = 1.0) -> Plan | None:
    """The plan with the largest micro-batch that fits into this share of the memory, with the smallest if none does; None: the
    batch does not divide."""
    sizes = micro_batches(job, engine, cluster.gpus)
    found = sizes[:1]
    for size in sizes[1:]:
        peak = memory(job.model, job.length, size, engine, cluster.gpus, job.optimizer, job.averages).peak
        if needed_gib(peak * job.memory_ratio) > room * cluster.device.memory_gib:
            break
        found = [size]
    return plan(job, engine, found[0], cluster) if found else None


# ---------------------------------------------------------------- all ways


def engines(job: Job, like: EngineConfig, cluster: Cluster) -> Iterator[EngineConfig]:
    """Every engine with every product of kinds of parallelism and every activation checkpointing that can run the job. Ranks
    that share a matrix or a sequence are in one node. like: has the other settings, as far as they apply to any engine."""
    gpus, per_node = cluster.gpus, min(cluster.gpus_per_node, cluster.gpus)
    nodes = max(1, gpus // cluster.gpus_per_node)
    world_size = like.world_size and gpus
    like = dataclasses.replace(like, offload="none", reduce_gradients=None, bucket_mib=None, world_size=world_size)
    work = Work(job.model, job.length, job.sequences, 1)
    able = [name for name in ENGINES if job.optimizer in OPTIMIZERS_OF[name]]
    for name in able:
        for parallel in _kinds(name, job.model, gpus, per_node):
            for replicas in {1, nodes} if name == "fsdp2" else {1}:
                compile_ = "blocks" if name == "zero3" and like.compile == "model" else like.compile
                engine = dataclasses.replace(like, name=name, parallel=parallel, replicas=replicas, compile=compile_)
                if can_cut(engine, work, gpus):
                    for kept in CHECKPOINTING:
                        yield dataclasses.replace(engine, activation_checkpointing=kept)


def _kinds(name: str, model: ModelConfig, gpus: int, per_node: int) -> Iterator[ParallelConfig]:
    """Products of degrees, each of which divides the GPUs."""
    of_node, of_all = ([each for each in range(1, most + 1) if gpus % each == 0] for most in (per_node, min(gpus, 64)))
    sizes = {"tensor": of_node, "sequence": of_node, "expert": of_all if model.moe else [1]}
    able = [sizes[kind] if kind in KINDS_OF[name] else [1] for kind in sizes]
    for tensor, sequence, expert in itertools.product(*able):
        if tensor * sequence <= per_node and per_node % (tensor * sequence) == 0:
            yield ParallelConfig(tensor=tensor, sequence=sequence, expert=expert)


def every(job: Job, like: EngineConfig, cluster: Cluster, room: float = 1.0) -> list[Plan]:
    """Each of `engines` with its largest micro-batch that fits into this share of the memory, or with the smallest."""
    tried = (largest(job, engine, cluster, room) for engine in engines(job, like, cluster))
    return [each for each in tried if each]


def recommended(job: Job, like: EngineConfig, cluster: Cluster) -> list[Plan]:
    """The plans that surely fit, the best first."""
    tried = every(job, like, cluster, ROOM)
    return ranked((each for each in tried if each.needed_gib <= ROOM * cluster.device.memory_gib), like)


def ranked(plans: Iterable[Plan], like: EngineConfig) -> list[Plan]:
    """The plans that fit, the best first: by time; of equally fast ones, those with fewer kinds of parallelism, those that
    change less of `like`, and those with the larger micro-batch."""
    found = sorted((each for each in plans if each.fits), key=lambda each: each.time.total)
    best = []
    while found:
        equal = [each for each in found if each.time.total <= found[0].time.total * (1 + _SAME)]
        best += sorted(equal, key=lambda each: (len(each.kinds), _changes(like, each.engine), -each.micro_batch))
        found = found[len(equal) :]
    return best


def _changes(before: EngineConfig, after: EngineConfig) -> int:
    return sum(
        getattr(before, key) != getattr(after, key) for key in ("name", "activation_checkpointing", "replicas", "parallel")
    )
