"""Memory of a rank from the settings alone, without a dry run: to compare hundreds of plans in a second. A test compares it
with dry runs.

It knows what compiled blocks keep under bf16. It imports no torch and runs nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pretrain.config import EngineConfig
from pretrain.model import flops
from pretrain.model.config import ModelConfig

OUTSIDE_GIB = 3.0
"""Driver and error correction, CUDA context, NCCL and kernels' code: what a card's memory loses before the first tensor."""
FRAGMENTATION = 0.04
"""Share of the peak that the allocator cannot use, and the workspaces of products and attention. With expandable segments."""


def needed_gib(peak: float) -> float:
    """GiB of a GPU whose tensors take `peak` bytes."""
    return peak * (1 + FRAGMENTATION) / 2**30 + OUTSIDE_GIB


class Memory(NamedTuple):
    """Bytes of a rank in a bf16 step."""

    weights: float
    gradients: float
    moments: float
    """With master weights that are not the weights."""
    activations: float
    """What all blocks keep for the backward pass of a micro-batch."""
    logits: float
    """Of a chunk; with inputs and gradients of the loss, and the gradient of the head in fp32."""
    block: float
    """Weights gathered for blocks and head, gradients of a block before they are reduced, and what a recomputation keeps."""
    buffers: float
    """What the engine holds during the passes: buckets, bf16 gradients of the pass before, weights it will use again soon."""
    outside: float
    """What the engine needs besides the state when no activations exist: while it starts, or reduces the last gradients."""

    @property
    def peak(self) -> float:
        """At the end of a forward pass, at the beginning of a backward pass, or outside of both."""
        in_passes = self.activations + self.buffers + max(self.logits, self.block)
        return self.weights + self.gradients + self.moments + max(in_passes, self.outside)


def memory(
    model: ModelConfig, sequence_length: int, micro_batch_size: int, engine: EngineConfig, ranks: int,
    optimizer: str = "adamw", averages: int = 0,
) -> Memory:  # fmt: skip
    """Returns the estimate for a rank with the largest shards, with compiled blocks and an even router."""
    weights, gradients, moments = state(model, engine, ranks, optimizer, averages)
    if engine.reduce_gradients == "step" and engine.name in ("zero2", "zero3", "fsdp2"):
        gradients = 4 * sum(each.number * each.size for each in parts(model, engine, ranks))  # whole between micro-batches
    kept, recomputed = _activations(model, sequence_length, micro_batch_size, engine)
    found, shards = parts(model, engine, ranks), engine.name in ("fsdp2", "zero3")
    bucket = (engine.bucket_mib or 200) * 2**20 / 4  # elements
    head = max(each.size for each in found if each.embedding)
    in_blocks = sum(each.number * each.size for each in found if each.in_block)
    rows = flops.vocabulary_rows(model) / engine.parallel.tensor
    tokens = micro_batch_size * sequence_length / engine.parallel.sequence
    positions = min(tokens, max(2**28 // rows, 1024))
    # Logits in bf16 and their gradient; the gradient of the head in fp32; inputs and their gradient; the head in bf16.
    logits = 4 * rows * positions + 4 * head + 6 * model.hidden_size * tokens + 2 * head * (shards or engine.name == "ddp")
    block = recomputed
    if shards:
        block += (2 * 2 + 2 + 4) * in_blocks / model.num_hidden_layers  # this and the next one; gradients, and in fp32
    elif engine.name == "ddp" and engine.activation_checkpointing == "none":
        kept += 2 * in_blocks  # autocast's copies of matrices
    elif engine.name == "zero2":
        block += 2 * bucket  # made in the backward pass
    buffers = _buffers(sum(each.number * each.size for each in found), head, bucket, engine, ranks)
    return Memory(weights, gradients, moments, kept, logits, block, *buffers)


_COPIED = 5e8
"""Elements that DeepSpeed's zero1 copies at once to reduce them (`elements_per_buffer` of `buffered_allreduce_fallback`)."""
_LIVE = 1e9
"""Elements that its zero3 keeps gathered (`stage3_max_live_parameters` and `stage3_max_reuse_distance`)."""


def _buffers(total: int, head: int, bucket: float, engine: EngineConfig, ranks: int) -> tuple[float, float]:
    """`buffers` and `outside` of `Memory`, for `total` parameters with a head of `head`, and buckets of `bucket` elements."""
    if engine.name == "ddp":
        return 0, 4 * total * (ranks > 1)  # zero gradients, from which moments are made, beside those in buckets
    if engine.name == "zero1":
        return 2 * (total - head), 2 * total + 4 * min(total, _COPIED)
    if engine.name == "zero2":
        return 0, 2 * (bucket + head) + 4 * min(bucket, total)
    if engine.name == "zero3":
        return 4 * bucket + 2 * min(total - head, _LIVE), 0
    return 0, 0


class Part(NamedTuple):
    """Equal parameters of a rank, after `engine.parallel` has divided them and before the engine shards them."""

    number: int
    shape: tuple[int, ...]
    ranks: int
    """That share each of them, if the engine shards weights."""
    embedding: bool = False
    in_block: bool = True

    @property
    def size(self) -> int:
        """Elements of each."""
        return math.prod(self.shape)


def parts(model: ModelConfig, engine: EngineConfig, ranks: int) -> list[Part]:
    """Returns all parameters of a rank, as `Transformer` makes them and `engine.parallel` divides them."""
    width, head, layers, moe = model.hidden_size, model.head_dim, model.num_hidden_layers, model.moe
    tensor, expert, per_replica = engine.parallel.tensor, engine.parallel.expert, ranks // engine.replicas
    ranks = per_replica // tensor
    queries, keys = model.num_attention_heads * head // tensor, model.num_key_value_heads * head // tensor
    rows = flops.vocabulary_rows(model) // tensor
    found = [Part(1, (rows, width), ranks, embedding=True, in_block=False), Part(1, (width,), ranks, in_block=False)]
    if not model.tie_word_embeddings:
        found.append(Part(1, (rows, width), ranks, in_block=False))
    shapes = [(2, (width,)), (1, (queries, width)), (2, (keys, width)), (1, (width, queries))]
    shapes += [(2, (head,))] * model.qk_norm
    dense = model.intermediate_size if moe is None else moe.num_shared_experts * moe.moe_intermediate_size
    if dense:
        shapes += [(2, (dense // tensor, width)), (1, (width, dense // tensor))]
    if moe:
        shapes.append((1, (moe.num_experts, width)))
        for stack in ((2 * moe.moe_intermediate_size, width), (width, moe.moe_intermediate_size)):
            sharing = per_replica // expert if expert > 1 else ranks
            found.append(Part(layers, (moe.num_experts // expert, *stack), sharing))
    return found + [Part(layers * number, shape, ranks) for number, shape in shapes]


def state(
    model: ModelConfig, engine: EngineConfig, ranks: int, optimizer: str = "adamw", averages: int = 0
) -> tuple[int, int, int]:
    """Returns the bytes of weights, gradients that the optimizer takes, and moments with master weights, on rank 0, which has
    the largest shards: those that the engines allocate, to the byte. Offloaded tensors are not on the device.

    optimizer: `optimizer.name`; what its `row_beta` keeps, a number per row, is left out. averages: `optimizer.averages`, which
    count as moments. Gradients of zero1 and zero2 in fp32 are about right: DeepSpeed's then lie in larger buffers.
    """
    found = parts(model, engine, ranks)
    width = 4 if engine.precision == "fp32" else 2
    if engine.name in ("zero1", "zero2"):
        embeds = sum(each.number * each.size for each in found if each.embedding or len(each.shape) == 1)
        groups = (embeds, sum(each.number * each.size for each in found) - embeds)  # the optimizer's, flat
        flat = sum(-(-size // (2 * ranks)) * 2 * ranks for size in groups)  # padded for aligned messages
        sizes = width * flat, 4 * flat // (1 if engine.name == "zero1" else ranks), (12 + 4 * averages) * flat // ranks
    elif engine.name == "zero3":
        shares = [(each.number * -(-each.size // ranks), each.size <= engine.keep_whole_below) for each in found]
        share, whole = sum(size for size, _ in shares), ranks * sum(size for size, kept in shares if kept) * (ranks > 1)
        sizes = width * (share + whole), 4 * share, (12 + 4 * averages) * share
    else:
        shards = engine.name == "fsdp2"
        local = [(each, each.number * (_shard(each) if shards else each.size)) for each in found]
        mine, one = sum(size for _, size in local), 0
        if optimizer == "muon":  # one moment of the matrices of blocks
            one = sum(size for each, size in local if each.in_block and len(each.shape) > 1)
        sizes = 4 * mine, 4 * mine, (8 + 4 * averages) * mine - 4 * one
    weights, gradients, moments = sizes
    return (0 if engine.offload == "all" else weights), gradients, (0 if engine.offload != "none" else moments)


def _shard(part: Part) -> int:
    """Elements of the largest shard of one parameter: FSDP2 gives the first ranks full chunks of rows."""
    return -(-part.shape[0] // part.ranks) * math.prod(part.shape[1:])


def _activations(model: ModelConfig, length: int, micro_batch: int, engine: EngineConfig) -> tuple[float, float]:
    """Bytes that all blocks keep, and that a block keeps in addition while it is recomputed."""
    parallel, moe, width = engine.parallel, model.moe, model.hidden_size
    shared = micro_batch * length / parallel.sequence  # tokens of the ranks that share matrices
    mine = shared / parallel.tensor
    queries = model.num_attention_heads / parallel.tensor * model.head_dim
    keys = max(model.num_key_value_heads / parallel.tensor, parallel.sequence) * model.head_dim
    dense = model.intermediate_size if moe is None else moe.num_shared_experts * moe.moe_intermediate_size
    dense /= parallel.tensor
    # Inputs of attention and feed-forward (of all tokens, if their matrices are divided); the residual stream between and after
    # them; queries, keys, values and the result, which the exchange of heads copies; gate, up and their product; of experts,
    # the same for each row.
    copies = 3 if parallel.sequence > 1 else 2
    none = shared * (2 * width + copies * queries + 2 * keys + 3 * dense) + mine * 2 * width
    if moe:
        none += mine * moe.num_experts_per_tok * (width + 3 * moe.moe_intermediate_size)
    # Recomputed: inputs, and the product of gate and up. Results of products are kept before tensor parallelism sums them.
    results = 2 if parallel.tensor > 1 else 1
    selective = shared * (results * width + copies * queries + 2 * keys + 2 * dense) + mine * width
    if moe:
        selective += mine * moe.num_experts_per_tok * (width + 2 * moe.moe_intermediate_size)
    kept = {"none": none, "selective": selective, "full": mine * width}[engine.activation_checkpointing]
    return 2 * kept * model.num_hidden_layers, 2 * (none - kept)
