"""The settings of a model, and what is derived from them: sizes with every default resolved, and the vocabulary. No torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from pretrain import schema


@dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """Slower rotary embedding, for contexts longer than those a model was first trained on."""

    kind: Literal["linear", "llama3"]
    """linear: all frequencies divided by factor; llama3: low ones divided, high ones kept, those between blended."""
    factor: float
    """What frequencies are divided by; at least 1."""
    low_freq_factor: float | None = None
    """llama3: a frequency with fewer turns than this in original_max_position_embeddings is low. Llama 3.1: 1."""
    high_freq_factor: float | None = None
    """llama3: one with more turns than this is high. Llama 3.1: 4."""
    original_max_position_embeddings: int | None = None
    """llama3: the context before. Llama 3.1: 8192."""


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture of experts in place of every block's feed-forward. No token is ever dropped."""

    num_experts: int
    """Experts E that a router chooses from."""
    num_experts_per_tok: int = 2
    """Experts that each token is sent to."""
    num_shared_experts: int = 0
    """Experts that every token passes as well, built as one feed-forward of that many times the width. 0: off."""
    moe_intermediate_size: int | None = None
    """Width of one expert's SwiGLU; null: model.intermediate_size."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """What the router makes of its logits: softmax (Qwen3-MoE, Mixtral) or sigmoid (DeepSeek-V3)."""
    norm_topk_prob: bool = True
    """The weights of a token's chosen experts are divided by their sum."""
    routed_scaling_factor: float = 1.0
    """Multiplies the weights at last. 1: off."""
    balance: Literal["sequence", "global_batch"] = "sequence"
    """Where the experts' load is evened out by the balance loss: in each sequence, or over the global batch (whose loads are
    those of the step before)."""
    aux_loss_weight: float = 0.01
    """Weight of the balance loss, which is 1 at an even load, mean over layers (Hugging Face's is num_experts_per_tok times as
    large). 0: off."""
    z_loss_weight: float = 0.001
    """Weight of the router's z-loss: squared log-sum-exp of its logits, mean over tokens and layers. 0: off."""
    bias_update_rate: float = 0.0
    """sigmoid: after each step an expert's bias in the choice moves by this, up if the expert had too few tokens, else down
    (DeepSeek-V3: 0.001). 0: off."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama family: dense (Llama, Mistral; with qk_norm Qwen3) or with experts (Mixtral, Qwen3-MoE). Names are
    those of Hugging Face configurations. configs/models/ has published shapes."""

    from_pretrained: str | None = None
    """Folder whose weights a new run begins with, and whose shapes this section then has by default: one of Hugging Face, of a
    run, or a checkpoint. More ids (a larger tokenizer or vocab_size) may be added. null: initial weights from run.seed."""
    hidden_size: int = 512
    """Width D of the residual stream."""
    num_hidden_layers: int = 8
    """Number of decoder blocks."""
    num_attention_heads: int = 8
    """Query heads H."""
    num_key_value_heads: int | None = None
    """Key and value heads K; null: as many as num_attention_heads (no grouping)."""
    head_dim: int | None = None
    """Size of one head; null: hidden_size / num_attention_heads. Must be even (rotary pairs)."""
    intermediate_size: int | None = None
    """Width of the SwiGLU feed-forward; null: 8/3 of hidden_size, rounded up to a multiple of 64. With moe: of one expert,
    where moe.moe_intermediate_size is null."""
    vocab_size: int | None = None
    """Number of token ids V; null: taken from the tokenizer."""
    vocab_multiple: int = 64
    """Embedding rows are padded up to a multiple of this; padded ids never enter the loss. 1: no padding."""
    max_position_embeddings: int | None = None
    """Longest context, recorded for converters: this, and at least data.sequence_length; null: that."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling: RopeScalingConfig | None = None
    """Rotary embedding for long contexts; null: off."""
    sliding_window: int | None = None
    """Tokens that a token sees, itself included, in every block; null: all before it."""
    rms_norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, per head (Qwen3)."""
    tie_word_embeddings: bool = False
    """One matrix for the input embedding and the head."""
    moe: MoeConfig | None = None
    """Mixture of experts; null: dense."""


def vocabulary(model: ModelConfig, tokenizer_ids: int | None) -> tuple[int, int]:
    """(ids of the model, ids that the data may hold), from the settings and the size of the tokenizer, where there is one.

    They differ only with `from_pretrained`: a published model may have more ids than its tokenizer, and a tokenizer with more
    ids than the model makes it larger.
    """
    if model.from_pretrained and tokenizer_ids:
        return max(model.vocab_size or 0, tokenizer_ids), tokenizer_ids
    ids = model.vocab_size or tokenizer_ids
    return ids, ids


def differences(old: ModelConfig, new: ModelConfig) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of what keeps `new` from taking the weights of `old`; both resolved.

    More ids and longer contexts are no difference, nor is what only training reads.
    """
    before, after = (schema.flatten(schema.to_dict(model)) for model in (old, new))
    free = {"from_pretrained", "vocab_multiple", "max_position_embeddings"}
    free |= {"moe.balance", "moe.aux_loss_weight", "moe.z_loss_weight", "moe.bias_update_rate"}
    if new.vocab_size >= old.vocab_size:
        free.add("vocab_size")
    if old.moe and new.moe:
        free.add("intermediate_size")  # no layer has it
    keys = (before | after).keys() - free
    return [(key, before.get(key), after.get(key)) for key in sorted(keys) if before.get(key) != after.get(key)]


def resolve_model(model: ModelConfig, *, vocab_size: int, sequence_length: int) -> ModelConfig:
    """`model` with every null replaced by its value, but for what null turns off."""
    heads = model.num_attention_heads
    intermediate_size = model.intermediate_size or 64 * math.ceil(model.hidden_size * 8 / 3 / 64)
    moe = model.moe
    return dataclasses.replace(
        model,
        from_pretrained=None,
        num_key_value_heads=model.num_key_value_heads or heads,
        head_dim=model.head_dim or model.hidden_size // heads,
        intermediate_size=intermediate_size,
        moe=moe and dataclasses.replace(moe, moe_intermediate_size=moe.moe_intermediate_size or intermediate_size),
        vocab_size=vocab_size,
        max_position_embeddings=max(model.max_position_embeddings or 0, sequence_length),
    )


def model_from_dict(values: dict[str, Any]) -> ModelConfig:
    """The `ModelConfig` of which `dataclasses.asdict` made `values`, or that they made when it had fewer keys."""
    sections = {"rope_scaling": RopeScalingConfig, "moe": MoeConfig}
    return ModelConfig(**{
        key: sections[key](**value) if key in sections and value is not None else value for key, value in values.items()
    })  # fmt: skip


def shrink(model: ModelConfig, context: int) -> ModelConfig:
    """A model of the same kind that a CPU trains in seconds, for samples of `context` tokens; not resolved.

    Grouped queries, query norm, tied embeddings, sliding window and experts stay.
    """
    heads, moe = 4, model.moe
    grouped = (model.num_key_value_heads or model.num_attention_heads) < model.num_attention_heads
    if moe:
        chosen = min(moe.num_experts_per_tok, 2)
        moe = dataclasses.replace(moe, num_experts=8, num_experts_per_tok=chosen, moe_intermediate_size=32)
    return dataclasses.replace(
        model,
        from_pretrained=None,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=2 if grouped else heads,
        head_dim=None,
        intermediate_size=128,
        sliding_window=model.sliding_window and context // 2,
        moe=moe,
    )
