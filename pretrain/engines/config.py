"""The settings of an engine, the checks of the ways to cut a model over ranks, and what is derived from them. Imports no
torch.

`pretrain/config.py` explains `frozen`, `guarded` and `free`.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pretrain import schema
from pretrain.model.config import CHECKS as MODEL_CHECKS
from pretrain.model.config import ModelConfig, resolve_model, vocabulary_rows
from pretrain.schema import NonNegativeInt, PositiveFloat, PositiveInt, Problem, free, guarded


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Ranks that share a model or a sequence. docs/engines.md says which engine can do what, and when it pays."""

    tensor: PositiveInt = free(1)
    """ddp, fsdp2: ranks that share attention heads, feed-forward matrices and vocabulary. 1: off."""
    sequence: PositiveInt = free(1)
    """Ranks that share the tokens of a sequence, for long ones. 1: off."""
    expert: PositiveInt = free(1)
    """ddp, fsdp2: ranks that share the experts of a layer. 1: off, each rank has all of them (fsdp2: shards of all)."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Distribution of the model over processes, and options that save memory. docs/engines.md compares the engines."""

    name: Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"] = free("ddp")
    """ddp: every rank holds everything; zero1, zero2, zero3 (DeepSpeed): ranks share the optimizer state (zero1), also the
    gradients (zero2), also the weights (zero3); fsdp2 (PyTorch): as zero3."""
    precision: Literal["fp32", "bf16", "fp8"] | None = guarded(None)
    """bf16: compute in bf16; master weights, summed gradients and moments in fp32. fp8 (ddp, fsdp2): as bf16, but wide matrices
    of blocks in fp8. null: the checkpoint's if the run resumes, else bf16 on GPUs and on CPUs with AMX, fp32 on other CPUs.
    (fp16 needs loss scaling and skips steps: refused.)"""
    compile: Literal["none", "blocks", "model"] | None = free(None)
    """torch.compile: blocks compiles one block and uses it for all; model (not zero3) compiles everything. The first step takes
    longer. none: off. null: on GPUs model for ddp alone up to 1e9 parameters, else blocks; on CPUs none."""
    activation_checkpointing: Literal["none", "selective", "full"] = free("none")
    """full: keep only the inputs of blocks and run each block twice (a third more FLOPs); selective: keep the matrix products
    too. none: off."""
    offload: Literal["none", "optimizer", "all"] = free("none")
    """optimizer (zero1, zero2, zero3): optimizer state lives and is updated on the host; all (zero3): weights too. none:
    off."""
    replicas: PositiveInt = free(1)
    """fsdp2: replicas of the sharded model; one per node keeps the gathering of weights within nodes. 1: off."""
    parallel: ParallelConfig = free(ParallelConfig)
    """Ranks that share a model or a sequence; the remaining factor of the number of ranks is data parallel."""
    reduce_gradients: Literal["step", "micro_batch"] | None = free(None)
    """step: once per step, each rank holding full fp32 gradients between micro-batches; micro_batch: after each, holding only
    its share. null: micro_batch for zero2, zero3, fsdp2; step for ddp, zero1."""
    bucket_mib: PositiveInt | None = free(None)
    """ddp, zero1, zero2, zero3: MiB of gradients sent at once. null: 25 for ddp, 200 for the others."""
    keep_whole_below: NonNegativeInt = free(100_000)
    """zero3: parameters with fewer elements are not sharded."""
    world_size: PositiveInt | None = free(None)
    """Required number of processes; with another number the run refuses to start. null: any."""
    timeout_seconds: PositiveFloat = free(600.0)
    """Longest time that a collective may take."""


KINDS = ("tensor", "sequence", "expert")
"""The ways to cut a model, which are the keys of engine.parallel."""
KINDS_OF = {"ddp": KINDS, "zero1": ("sequence",), "zero2": ("sequence",), "zero3": ("sequence",), "fsdp2": KINDS}
"""Engine -> the kinds that it has, in any combination."""
OPTIMIZERS_OF = {name: ("adamw",) if name.startswith("zero") else ("adamw", "muon") for name in KINDS_OF}
"""Engine -> the optimizers that it runs. DeepSpeed would clip Muon's orthogonalized update, not the gradient."""
_ROWS = "the rows of the vocabulary"


class Work(NamedTuple):
    """What an engine distributes over its ranks."""

    model: ModelConfig
    """Resolved or not; if not, the rows of its vocabulary may depend on a tokenizer, and are not checked."""
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int

    def nearest_batch(self, groups: int) -> int:
        """The size nearest to the global batch's that so many groups of ranks divide into full micro-batches."""
        product = self.micro_batch_size * groups
        return max(product, round(self.global_batch_size / product) * product)


# ---------------------------------------------------------------- derived values


def sample_ranks(engine: EngineConfig, ranks: int) -> int:
    """Groups of ranks that take different samples: the ranks of one group share its sequences."""
    return ranks // (engine.parallel.sequence * engine.parallel.tensor)


def fewest_ranks(engine: EngineConfig) -> int:
    """The smallest number of ranks that these settings can run on."""
    parallel = engine.parallel
    return engine.replicas * math.lcm(parallel.sequence * parallel.tensor, parallel.expert)


# ---------------------------------------------------------------- combinations that cannot work


def check_options(engine: EngineConfig) -> Iterator[Problem]:
    """Yields a problem for each option that the chosen engine does not have: it is refused, never ignored."""
    name, replicas = engine.name, engine.replicas
    options = (
        ("offload", "optimizer", ("zero1", "zero2", "zero3")),
        ("offload", "all", ("zero3",)),
        ("reduce_gradients", "micro_batch", ("zero2", "zero3", "fsdp2")),
        ("precision", "fp8", ("ddp", "fsdp2")),
    )
    for key, value, names in options:
        if getattr(engine, key) == value and name not in names:
            yield Problem(f"engine.{key}", f"got {value}, which only {', '.join(names)} can do; engine.name is {name}")
    if name != "fsdp2" and replicas != 1:
        yield Problem("engine.replicas", f"got {replicas}, which only fsdp2 can do; engine.name is {name}")
    if name == "fsdp2" and engine.bucket_mib is not None:
        message = "has no meaning for fsdp2, which sends the gradients of a block at once; use null"
        yield Problem("engine.bucket_mib", message)
    if name == "zero3" and engine.compile == "model":
        yield Problem("engine.compile", "got model, which the hooks of zero3 would cut into many graphs; use blocks")


def check_mesh(engine: EngineConfig, work: Work, ranks: int | None) -> Iterator[Problem]:
    """Yields the reasons why work cannot be cut in this way, or so many ranks (None: any) not divided in it, each with the
    nearest way that works; else why the batch does not fit. Nothing for a model that cannot work by itself."""
    if any(any(check(work.model)) for check in MODEL_CHECKS):
        return
    problems = list(_mesh_problems(engine, work, ranks))
    advice = _advice(engine, work, ranks) if problems else ""
    for problem in problems:
        yield dataclasses.replace(problem, message=problem.message + advice)
    if not problems and ranks is not None:
        groups, size, micro = sample_ranks(engine, ranks), work.global_batch_size, work.micro_batch_size
        if size % (micro * groups):  # every rank runs the same number of full micro-batches, so that no remainder can exist
            of = "ranks" if groups == ranks else "groups of ranks"
            message = (
                f"got {size}, must be a multiple of micro_batch_size x {of} = {micro} x {groups} = {micro * groups}; the "
                f"nearest is {work.nearest_batch(groups)}"
            )
            yield Problem("batch.global_batch_size", message)


def can_cut(engine: EngineConfig, work: Work, ranks: int) -> bool:
    """Whether `check_options` and `check_mesh` have no objection; without the advice, which takes a second for many ranks."""
    groups = max(1, sample_ranks(engine, ranks))
    divided = not any(check_options(engine)) and not any(_mesh_problems(engine, work, ranks))
    return divided and work.global_batch_size % (work.micro_batch_size * groups) == 0


def slow_links(engine: EngineConfig, work: Work, ranks: int, per_node: int) -> Iterator[Problem]:
    """Yields a warning for each kind whose groups span nodes of `per_node` ranks, with the nearest way that avoids it."""
    for kind, group in _across_nodes(engine, per_node).items():
        advice = _advice(engine, work, ranks, per_node)
        message = (
            f"got {getattr(engine.parallel, kind)}: groups among {group} neighbouring ranks span nodes of {per_node}, and "
            f"every block waits for the network between them{advice}"
        )
        yield Problem(f"engine.parallel.{kind}", message)


def _mesh_problems(engine: EngineConfig, work: Work, ranks: int | None) -> Iterator[Problem]:
    impossible = list(_check_kinds(engine, work.model))
    yield from impossible
    off = dict.fromkeys((problem.key.rpartition(".")[2] for problem in impossible), 1)  # what merely follows is not reported
    engine = dataclasses.replace(engine, parallel=dataclasses.replace(engine.parallel, **off))
    yield from _check_division(engine, work)
    if ranks is not None:
        yield from _check_ranks(engine, work.model, ranks)


def _check_kinds(engine: EngineConfig, model: ModelConfig) -> Iterator[Problem]:
    for kind in KINDS:
        degree, key = getattr(engine.parallel, kind), f"engine.parallel.{kind}"
        if degree == 1:
            continue
        if kind not in KINDS_OF[engine.name]:
            able = ", ".join(name for name, kinds in KINDS_OF.items() if kind in kinds)
            yield Problem(key, f"got {degree}, which only {able} can do; engine.name is {engine.name}")
        elif kind == "expert" and model.moe is None:
            yield Problem(key, f"got {degree}, but the model has no experts (model.moe is null)")
        elif kind == "tensor" and engine.precision == "fp8":
            yield Problem(key, f"got {degree}, which precision fp8 cannot do")


def _check_division(engine: EngineConfig, work: Work) -> Iterator[Problem]:
    """Every rank of a group has an equal part."""
    tensor, sequence, expert = engine.parallel.tensor, engine.parallel.sequence, engine.parallel.expert
    model, length = work.model, work.sequence_length
    known = not model.from_pretrained and model.vocab_size  # else its rows depend on the tokenizer, too
    model = resolve_model(model, vocab_size=model.vocab_size, sequence_length=length)
    key_heads, moe = model.num_key_value_heads, model.moe
    shared = {"model.num_attention_heads": model.num_attention_heads, "data.sequence_length": length}
    of_tensor = {**shared, "model.num_key_value_heads": key_heads}
    if moe is None:
        of_tensor["model.intermediate_size"] = model.intermediate_size
    else:
        of_tensor["the width of the shared experts"] = moe.num_shared_experts * moe.moe_intermediate_size
    if known:
        of_tensor[_ROWS] = vocabulary_rows(model)
    if uneven := _uneven(tensor, of_tensor):
        hint = ""
        if uneven == _uneven(tensor, {_ROWS: of_tensor.get(_ROWS, 0)}):
            hint = f", which a new run can pad by --model.vocab_multiple {math.lcm(model.vocab_multiple, tensor)}"
        yield Problem("engine.parallel.tensor", f"got {tensor}, must divide {uneven}{hint}")
    elif uneven := _uneven(sequence * tensor, shared):
        times = f"; times tensor = {sequence * tensor}, it" if tensor > 1 else ","
        yield Problem("engine.parallel.sequence", f"got {sequence}{times} must divide {uneven}")
    elif key_heads // tensor % sequence and sequence % (key_heads // tensor):
        share = f"model.num_key_value_heads{' / tensor' if tensor > 1 else ''} = {key_heads // tensor}"
        yield Problem("engine.parallel.sequence", f"got {sequence}, must divide {share} or be a multiple of it")
    if moe and (uneven := _uneven(expert, {"model.moe.num_experts": moe.num_experts})):
        yield Problem("engine.parallel.expert", f"got {expert}, must divide {uneven}")


def _uneven(parts: int, sizes: dict[str, int]) -> str:
    """The sizes that so many parts do not divide, in words; empty: they divide all."""
    return ", ".join(f"{name} = {size:,}" for name, size in sizes.items() if size % parts)


def _check_ranks(engine: EngineConfig, model: ModelConfig, ranks: int) -> Iterator[Problem]:
    parallel = engine.parallel
    factors = {"engine.replicas": engine.replicas}
    factors |= {f"engine.parallel.{kind}": getattr(parallel, kind) for kind in ("sequence", "tensor")}
    factors = {key: factor for key, factor in factors.items() if factor > 1}
    if ranks % (product := math.prod(factors.values())):
        names = " x ".join(key.rpartition(".")[2] for key in factors)
        got = f"got {product}," if len(factors) == 1 else f"{names} = {product}"
        yield Problem(next(iter(factors)), f"{got} must divide the number of processes, {ranks}")
    if (per_replica := ranks // engine.replicas) % parallel.expert:
        of_replica = "" if engine.replicas == 1 else " of a replica"
        message = f"got {parallel.expert}, must divide the number of processes{of_replica}, {per_replica}"
        yield Problem("engine.parallel.expert", message)
    if model.moe and engine.name == "fsdp2":
        shards = ranks // (engine.replicas * (parallel.tensor if parallel.expert == 1 else parallel.expert))
        if shards > (experts := model.moe.num_experts // parallel.expert):
            message = f"is fsdp2, which does not split an expert: {shards} ranks share {experts}, so that some have none"
            yield Problem("engine.name", message)


def nearest(engine: EngineConfig, work: Work, ranks: int | None, per_node: int | None = None) -> EngineConfig | None:
    """The way to cut that works and is nearest to that of `engine`; None: none works. per_node: its groups must lie within
    nodes of so many ranks."""
    for other in _alternatives(engine, work.model, ranks):
        if per_node and _across_nodes(other, per_node):
            continue
        if not any(check_options(other)) and not any(_mesh_problems(other, work, ranks)):
            return other
    return None


def _advice(engine: EngineConfig, work: Work, ranks: int | None, per_node: int | None = None) -> str:
    """The end of a message: the flags of the nearest way that works, with a batch that fits."""
    if (other := nearest(engine, work, ranks, per_node)) is None:
        return ""
    before, after = (schema.flatten(schema.to_dict(each)) for each in (engine, other))
    changes = {f"engine.{key}": value for key, value in after.items() if value != before[key]}
    size = work.nearest_batch(sample_ranks(other, ranks or fewest_ranks(other)))
    if size != work.global_batch_size:
        changes["batch.global_batch_size"] = size
    what = "within a node" if per_node else "that works"
    return f"; the nearest {what}: " + " ".join(f"--{key} {value}" for key, value in changes.items())


def _alternatives(engine: EngineConfig, model: ModelConfig, ranks: int | None) -> list[EngineConfig]:
    """Other ways to cut, the nearest ones first: with other degrees of the kinds that are on, other replicas, or another
    engine. Not all of them can work."""
    heads = model.num_attention_heads
    most = {"tensor": heads, "sequence": heads, "expert": model.moe.num_experts if model.moe else 1}
    degrees = [_divisors(most[kind]) if getattr(engine.parallel, kind) > 1 else [1] for kind in KINDS]
    names = {"ddp": 10.0, "fsdp2": 0.1, engine.name: 0.0}  # ddp may need more memory than there is
    found: list[tuple[float, EngineConfig]] = []
    for name, distance in names.items():
        for replicas in _divisors(ranks or engine.replicas) if name == "fsdp2" else [1]:
            for each in itertools.product(*degrees):
                parallel = ParallelConfig(**dict(zip(KINDS, each, strict=True)))
                other = dataclasses.replace(engine, name=name, replicas=replicas, parallel=parallel)
                found.append((distance + _distance(engine, other), other))
    return [other for _, other in sorted(found, key=lambda pair: pair[0])]


def _across_nodes(engine: EngineConfig, per_node: int) -> dict[str, int]:
    """Kind -> number of neighbouring ranks among which its groups lie, where those do not all share a node."""
    parallel = engine.parallel
    groups = {"tensor": parallel.tensor, "sequence": parallel.sequence * parallel.tensor, "expert": parallel.expert}
    return {kind: ranks for kind, ranks in groups.items() if getattr(parallel, kind) > 1 and per_node % ranks}


def _distance(engine: EngineConfig, other: EngineConfig) -> float:
    """Factors between the degrees, in total; at equal ones, a way that keeps more of the kinds is nearer."""
    pairs = [(engine.replicas, other.replicas)]
    pairs += [(getattr(engine.parallel, kind), getattr(other.parallel, kind)) for kind in KINDS]
    return sum(abs(math.log(a / b)) + 0.01 * (a > b == 1) for a, b in pairs)


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
