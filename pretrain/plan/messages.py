"""What the ranks of a run send in a step, from the settings alone: kinds of collectives, groups of ranks, bytes. A test
compares the bytes with those that real ranks send.

It knows shapes, engines and kinds of parallelism. It imports no torch and runs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from pretrain.config import EngineConfig
from pretrain.model import flops
from pretrain.model.config import ModelConfig


class Collective(NamedTuple):
    """Collectives of one kind in a step."""

    kind: Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
    size: float
    """Bytes of the full tensors, of all calls of a step together; all_to_all: of what a rank has."""
    ranks: int
    """Ranks that take part in each call."""
    stride: int
    """Distance between neighbouring ranks: 1 if the ranks of a node are neighbours."""
    calls: int
    awaited: bool = False
    """True if computation waits for the result: tokens that ranks exchange. Engines hide weights and gradients behind
    computation."""

    @property
    def sent_bytes(self) -> int:
        """Bytes that each rank sends, if the library runs a ring, or sends the parts of an all_to_all directly."""
        return round(self.size * (self.ranks - 1) / self.ranks * (2 if self.kind == "all_reduce" else 1))


class Held(NamedTuple):
    """Parameters that an engine averages, and perhaps shards, over the same ranks."""

    parameters: float
    """Of a rank, after `engine.parallel` has divided them and before the engine shards them."""
    ranks: int
    stride: int
    """Distance between neighbours of these ranks."""


def held(model: ModelConfig, engine: EngineConfig, ranks: int) -> tuple[Held, Held]:
    """Returns all parameters but the experts of expert parallelism, and these. With `engine.replicas`, they are sharded over
    the ranks of one replica."""
    counts, parallel = flops.num_parameters(model), engine.parallel
    divided = (counts.total - counts.experts - counts.undivided) / parallel.tensor
    rest = _on_every_tensor_rank(model, engine)
    dense = Held(divided + rest, ranks // (engine.replicas * parallel.tensor), parallel.tensor)
    experts = counts.experts / parallel.expert if parallel.expert > 1 else 0
    return dense, Held(experts, ranks // (engine.replicas * parallel.expert), parallel.expert)


def _on_every_tensor_rank(model: ModelConfig, engine: EngineConfig) -> int:
    """Parameters that the ranks which share matrices all have."""
    counts = flops.num_parameters(model)
    return counts.undivided + (counts.experts if engine.parallel.expert == 1 else 0)


def collectives(
    model: ModelConfig, sequence_length: int, micro_batch_size: int, accumulation: int, engine: EngineConfig, ranks: int,
    *, bf16: bool = True,
) -> list[Collective]:  # fmt: skip
    """Returns what ranks send in a step: weights and tokens (2 bytes per value under bf16, else 4) and fp32 gradients, with an
    even router. Omitted: the few numbers of the token count, the gradient norm and routers that are updated, the optimizer's
    own messages (Muon), and the parameters that `engine.keep_whole_below` keeps on every rank.

    accumulation: micro-batches per step and rank.
    """
    if ranks == 1:
        return []
    width = 2 if bf16 else 4
    of_engine = {"ddp": _ddp, "fsdp2": _fsdp2}.get(engine.name, _zero)
    found = [*of_engine(model, engine, ranks, accumulation, width)]
    for each in _tokens(model, sequence_length, micro_batch_size, engine, width):
        found.append(each._replace(size=each.size * accumulation, calls=each.calls * accumulation))
    return [each for each in found if each.ranks > 1 and each.size > 0]


# ---------------------------------------------------------------- weights and gradients


def _ddp(model: ModelConfig, engine: EngineConfig, ranks: int, accumulation: int, width: int) -> Iterator[Collective]:
    dense, experts = held(model, engine, ranks)
    for each in (dense, experts):
        buckets = max(1, math.ceil(4 * each.parameters / ((engine.bucket_mib or 25) * 2**20)))
        yield Collective("all_reduce", 4 * each.parameters, each.ranks, each.stride, buckets)
    yield Collective("all_reduce", 4 * _on_every_tensor_rank(model, engine), engine.parallel.tensor, 1, 1)


def _zero(model: ModelConfig, engine: EngineConfig, ranks: int, accumulation: int, width: int) -> Iterator[Collective]:
    parameters, layers = flops.num_parameters(model).total, model.num_hidden_layers
    weights, gradients = parameters * width, parameters * 4
    if engine.name == "zero3":
        reductions = 1 if engine.reduce_gradients == "step" else accumulation
        yield Collective("all_gather", accumulation * 2 * weights, ranks, 1, 2 * (layers + 1) * accumulation)
        yield Collective("reduce_scatter", gradients * reductions, ranks, 1, (layers + 1) * reductions)
        return
    reductions = accumulation if engine.name == "zero2" and engine.reduce_gradients != "step" else 1
    buckets = max(1, math.ceil(gradients / ((engine.bucket_mib or 200) * 2**20)))
    yield Collective("all_reduce", gradients * reductions, ranks, 1, buckets * reductions)  # a rank then keeps its share
    yield Collective("all_gather", weights, ranks, 1, buckets)


def _fsdp2(model: ModelConfig, engine: EngineConfig, ranks: int, accumulation: int, width: int) -> Iterator[Collective]:
    dense, experts = held(model, engine, ranks)
    layers, reductions = model.num_hidden_layers, 1 if engine.reduce_gradients == "step" else accumulation
    # The head and the last norm stay gathered between the passes; tied, the embedding with them.
    kept = flops.vocabulary_rows(model) * model.hidden_size / engine.parallel.tensor + model.hidden_size
    for each, twice, units in ((dense, 2 * dense.parameters - kept, layers + 1), (experts, 2 * experts.parameters, layers)):
        yield Collective("all_gather", accumulation * twice * width, each.ranks, each.stride, 2 * units * accumulation)
        size = 4 * each.parameters * reductions
        yield Collective("reduce_scatter", size, each.ranks, each.stride, units * reductions)
        yield Collective("all_reduce", 4 * each.parameters / each.ranks, engine.replicas, ranks // engine.replicas, units)
    shared = 4 * _on_every_tensor_rank(model, engine) / dense.ranks
    yield Collective("all_reduce", shared, engine.parallel.tensor, 1, 1)


# ---------------------------------------------------------------- tokens


def _tokens(model: ModelConfig, length: int, micro_batch: int, engine: EngineConfig, width: int) -> Iterator[Collective]:
    """What ranks exchange in the forward and backward pass of a micro-batch."""
    parallel, layers, moe = engine.parallel, model.num_hidden_layers, model.moe
    forwards = 1 if engine.activation_checkpointing == "none" else 2
    tokens = micro_batch * length // parallel.sequence  # of the ranks that share matrices
    yield from _heads(model, tokens, engine, width, forwards)
    yield from _matrices(model, tokens, engine, width, forwards)
    if moe:
        rows = tokens // parallel.tensor * moe.num_experts_per_tok
        yield from _rows(model, rows, engine, width, forwards)
        if moe.balance != "global_batch":
            counts, calls = 4 * micro_batch * (moe.num_experts + 1) * layers * forwards, layers * forwards
            yield Collective("all_reduce", counts, parallel.sequence, parallel.tensor, calls, True)
            yield Collective("all_reduce", counts, parallel.tensor, 1, calls, True)


def _heads(model: ModelConfig, tokens: int, engine: EngineConfig, width: int, forwards: int) -> Iterator[Collective]:
    """Sequence parallelism: queries, keys and values for tokens, and results for heads; backward, their gradients. Of fewer key
    heads than ranks, each rank gets a copy of one."""
    parallel, passes = engine.parallel, model.num_hidden_layers * (forwards + 1)
    queries, keys = model.num_attention_heads / parallel.tensor, model.num_key_value_heads / parallel.tensor
    heads = 2 * queries + 2 * max(keys, parallel.sequence)
    size = heads * model.head_dim * tokens * width * passes
    yield Collective("all_to_all", size, parallel.sequence, parallel.tensor, 2 * passes, True)


def _matrices(model: ModelConfig, tokens: int, engine: EngineConfig, width: int, forwards: int) -> Iterator[Collective]:
    """Tensor parallelism: tokens are gathered before each divided module, and its results are summed and scattered; backward,
    the reverse. The embedding only scatters, the head only gathers. For the loss of a token, ranks gather two numbers."""
    layers, ranks = model.num_hidden_layers, engine.parallel.tensor
    routed_only = model.moe is not None and not model.moe.num_shared_experts
    modules = layers * (1 if routed_only else 2)
    again = modules * (forwards - 1)
    # A recomputation ends where the last module of a block has all that its backward pass needs: before the result is summed.
    last = 0 if routed_only else layers * (forwards - 1)
    size = tokens * model.hidden_size * width
    yield Collective("all_gather", 2 * 4 * tokens * ranks, ranks, 1, 1, True)
    for kind, calls in (("all_gather", 2 * modules + 2 + again), ("reduce_scatter", 2 * modules + 2 + again - last)):
        yield Collective(kind, size * calls, ranks, 1, calls, True)


def _rows(model: ModelConfig, rows: int, engine: EngineConfig, width: int, forwards: int) -> Iterator[Collective]:
    """Expert parallelism: how many rows go to each expert, the rows and their weights there, the results back; backward, all
    gradients."""
    layers, ranks, hidden_size = model.num_hidden_layers, engine.parallel.expert, model.hidden_size
    counts = 8 * model.moe.num_experts * forwards
    size = rows * (2 * hidden_size + 1) * width * (forwards + 1)
    yield Collective("all_to_all", (size + counts) * layers, ranks, 1, layers * (3 * (forwards + 1) + forwards), True)
