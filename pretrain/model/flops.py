"""Numbers of parameters, floating-point operations and bytes of a model, from its settings alone, before any tensor exists.

It knows the architecture of transformer.py (a test compares the two). It does not import torch.
All functions take a resolved `ModelConfig` (no field is None).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pretrain.model.config import ModelConfig, vocabulary_rows


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of scalar parameters."""

    total: int
    """All parameters as built, including padding rows of the vocabulary; a tied matrix counts once."""
    active: int
    """All without the experts that a token is not sent to; in a dense model, all."""
    matmul: int
    """Those that multiply every token: matrices of the blocks, with the chosen experts only, and the head without padding."""
    embedding: int
    """The input embedding as built, including padding rows, even if it is also the head."""
    experts: int
    """Routed experts: expert parallelism divides them among ranks."""
    undivided: int
    """Norms and routers: no kind of parallelism divides them. Tensor parallelism divides all but these and routed experts."""


def num_parameters(config: ModelConfig) -> ParameterCount:
    """Counts the parameters of the model."""
    width, head_dim = config.hidden_size, config.head_dim
    layers, moe = config.num_hidden_layers, config.moe
    attention = 2 * width * head_dim * (config.num_attention_heads + config.num_key_value_heads)
    feed_forward, experts, routers, idle = 3 * width * config.intermediate_size, 0, 0, 0
    if moe:
        expert, routers = 3 * width * moe.moe_intermediate_size, layers * width * moe.num_experts
        feed_forward = width * moe.num_experts + expert * (moe.num_experts + moe.num_shared_experts)
        experts = layers * expert * moe.num_experts
        idle = layers * expert * (moe.num_experts - moe.num_experts_per_tok)
    matrices = layers * (attention + feed_forward)
    norms = layers * (2 * width + 2 * head_dim * config.qk_norm) + width
    embedding = vocabulary_rows(config) * width
    total = matrices + norms + embedding * (1 if config.tie_word_embeddings else 2)
    matmul = matrices - idle + config.vocab_size * width
    return ParameterCount(
        total=total, active=total - idle, matmul=matmul, embedding=embedding, experts=experts, undivided=norms + routers
    )


class Attended(NamedTuple):
    """Pairs of a query and a key in the two products of attention."""

    tokens: float
    """Queries."""
    full: float
    """Pairs by the convention of `mfu`: each token has all keys of its document, before and after it."""
    causal: float
    """By that of `mfu_causal`: half of them, which a causal kernel cannot avoid."""


def attended(lengths: np.ndarray | list[int], window: int | None) -> Attended:
    """Counts the pairs of documents of `lengths` tokens that see nothing of each other: n^2 in one of n tokens, causal n^2 / 2.

    With a sliding window W < n, a token has W keys instead of n; causal: on average W - W^2 / 2n.
    """
    length_N = np.asarray(lengths, dtype=np.int64)
    keys_N = length_N if window is None else np.minimum(length_N, window)
    causal = int((keys_N * (2 * length_N - keys_N)).sum()) / 2
    return Attended(int(length_N.sum()), int((length_N * keys_N).sum()), causal)


def flops_per_token(config: ModelConfig, sequence_length: int, causal: bool = False, pairs: Attended | None = None) -> int:
    """FLOPs of forward and backward pass for one token of a sequence of sequence_length (T) tokens.

    6 per matmul parameter, plus 12 * layers * d_attn per key of a token for the two products of attention. Without documents
    and windows a token has T keys; causal: T / 2. pairs: those of the data, if tokens see only their own document; None: each
    sequence is one document. Recomputation never counts. Source: PaLM (Chowdhery et al. 2022), appendix B.
    """
    pairs = pairs or attended([sequence_length], config.sliding_window)
    per_key = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    attention = per_key * (pairs.causal if causal else pairs.full) / pairs.tokens
    return 6 * num_parameters(config).matmul + round(attention)


def state_bytes(config: ModelConfig) -> int:
    """Bytes of the training state in fp32, weights and AdamW's two moments: 12 per parameter."""
    return 12 * num_parameters(config).total
