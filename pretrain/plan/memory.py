"""Memory of a rank from the settings alone, without a dry run: to compare hundreds of plans in a second. A test compares it
with dry runs.

It knows what compiled blocks keep under bf16. It imports no torch and runs nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from pretrain.config import EngineConfig
from pretrain.model import flops
from pretrain.model.config import ModelConfig
from pretrain.plan.messages import held

OUTSIDE_GIB = 3.0
"""Driver and error correction, CUDA context, NCCL and kernels' code: what a card's memory loses before the first tensor."""
FRAGMENTATION = 0.04
"""Share of the peak that the allocator cannot use, and the workspaces of products and attention. With expandable segments."""


def needed_gib(peak: float) -> float:
    """GiB of a GPU whose tensors take `peak` bytes."""
    return peak * (1 + FRAGMENTATION) / 2**30 + OUTSIDE_GIB


class Memory(NamedTuple):
    """Bytes of a rank in a bf16 step with AdamW."""

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

    @property
    def peak(self) -> float:
        """At the end of a forward pass or at the beginning of a backward pass."""
        return sum(self[:4]) + max(self.logits, self.block)


def memory(model: ModelConfig, sequence_length: int, micro_batch_size: int, engine: EngineConfig, ranks: int) -> Memory:
    """Returns the estimate for a rank with the largest shards, with compiled blocks, an even router and no `engine.offload`."""
    weights, gradients, moments = _state(model, engine, ranks)
    kept, recomputed = _activations(model, sequence_length, micro_batch_size, engine)
    tensor, sequence = engine.parallel.tensor, engine.parallel.sequence
    head = flops.vocabulary_rows(model) * model.hidden_size / tensor
    rows = flops.vocabulary_rows(model) / tensor
    positions = min(micro_batch_size * sequence_length / sequence, max(2**28 // rows, 1024))
    logits = 4 * rows * positions + 4 * head + 6 * model.hidden_size * micro_batch_size * sequence_length / sequence
    block = recomputed
    dense, experts = held(model, engine, ranks)
    of_block = (dense.parameters - 2 * head) / model.num_hidden_layers, experts.parameters / model.num_hidden_layers
    if engine.name in ("fsdp2", "zero3"):
        logits += 2 * head
        block += sum((2 * 2 + 2 + 4) * each for each in of_block)  # this block's and the next one's; gradients, and in fp32
    elif engine.name == "ddp" and engine.activation_checkpointing == "none":
        kept += 2 * sum(of_block) * model.num_hidden_layers  # autocast's copies of matrices
    return Memory(weights, gradients, moments, kept, logits, block)


def _state(model: ModelConfig, engine: EngineConfig, ranks: int) -> tuple[float, float, float]:
    """Bytes of weights, summed gradients and moments."""
    sums = [0.0, 0.0, 0.0]
    for each in held(model, engine, ranks):
        share = 1 / each.ranks
        sharded_gradients = share if engine.reduce_gradients != "step" else 1.0
        per_parameter = {
            "ddp": (4.0, 4.0, 8.0),
            "zero1": (2.0, 4.0, 12 * share),
            "zero2": (2.0, 4 * sharded_gradients, 12 * share),
            "zero3": (2 * share, 4 * sharded_gradients, 12 * share),
            "fsdp2": (4 * share, 4 * sharded_gradients, 8 * share),
        }[engine.name]
        sums = [total + each.parameters * size for total, size in zip(sums, per_parameter, strict=True)]
    return tuple(sums)


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
