"""The settings of a model, the checks that concern them alone, and what is derived from them. Imports no torch.

`pretrain/config.py` explains `frozen`, `guarded` and `free`.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pretrain import schema
from pretrain.schema import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Problem, free, frozen, guarded

Several = Annotated[int, ("ge", 2)]


@dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """Slower rotary embedding, for contexts longer than those a model was first trained on."""

    kind: Literal["linear", "llama3"] = guarded()
    """linear: all frequencies divided by factor; llama3: low ones divided, high ones kept, those between blended."""
    factor: Annotated[float, ("ge", 1)] = guarded()
    """Divisor of the frequencies."""
    low_freq_factor: PositiveFloat | None = guarded(None)
    """llama3: a frequency with fewer turns than this in original_max_position_embeddings is low. Llama 3.1: 1."""
    high_freq_factor: float | None = guarded(None)
    """llama3: a frequency with more turns than this is high; greater than low_freq_factor. Llama 3.1: 4."""
    original_max_position_embeddings: PositiveInt | None = guarded(None)
    """llama3: the context before, in tokens. Llama 3.1: 8192."""


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture of experts in place of the feed-forward of every block. No token is ever dropped."""

    num_experts: Several = frozen()
    """Experts E that a router chooses from."""
    num_experts_per_tok: PositiveInt = frozen(2)
    """Experts that each token is sent to."""
    num_shared_experts: NonNegativeInt = frozen(0)
    """Experts that every token passes as well, built as one feed-forward of that many times the width. 0: off."""
    moe_intermediate_size: PositiveInt | None = frozen(None)
    """Width of the SwiGLU of one expert; null: model.intermediate_size."""
    score: Literal["softmax", "sigmoid"] = frozen("softmax")
    """Score function of the router's logits: softmax (Qwen3-MoE, Mixtral) or sigmoid (DeepSeek-V3)."""
    norm_topk_prob: bool = frozen(True)
    """Divide the weights of a token's chosen experts by their sum."""
    routed_scaling_factor: PositiveFloat = frozen(1.0)
    """Multiplies the final weights of the chosen experts. 1: off."""
    balance: Literal["sequence", "global_batch"] = frozen("sequence")
    """Scope in which the balance loss evens out the load of the experts: each sequence, or the global batch (with the loads of
    the previous step)."""
    aux_loss_weight: NonNegativeFloat = guarded(0.01)
    """Weight of the balance loss, which is 1 at an even load, mean over layers (Hugging Face's is num_experts_per_tok times as
    large). 0: off."""
    z_loss_weight: NonNegativeFloat = guarded(0.001)
    """Weight of the router's z-loss: squared log-sum-exp of its logits, mean over tokens and layers. 0: off."""
    bias_update_rate: NonNegativeFloat = guarded(0.0)
    """sigmoid: step size of an expert's bias in the choice, after each step: up if the expert had too few tokens, else down
    (DeepSeek-V3: 0.001). 0: off."""


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Initial scale and learning rate of each weight follow from the size of the model, relative to a base size at which the
    learning rate was found (`pretrain/model/scaling.py`). Models of several sizes need the same head_dim."""

    base_hidden_size: PositiveInt = frozen()
    """hidden_size of the model whose learning rate, weight decay and eps the settings of the optimizer are."""
    base_num_hidden_layers: PositiveInt = frozen()
    """num_hidden_layers of that model."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama family: dense (Llama, Mistral; with qk_norm Qwen3) or with experts (Mixtral, Qwen3-MoE). Names are
    those of Hugging Face configurations. configs/models/ has published shapes."""

    from_pretrained: str | None = free(None)
    """Folder that gives a new run its weights, and this section its defaults: a Hugging Face folder, a run, or a checkpoint.
    More ids (a larger tokenizer or vocab_size) may be added. null: initial weights from run.seed."""
    hidden_size: PositiveInt = frozen(512)
    """Width D of the residual stream."""
    num_hidden_layers: PositiveInt = frozen(8)
    """Number of decoder blocks."""
    num_attention_heads: PositiveInt = frozen(8)
    """Query heads H."""
    num_key_value_heads: PositiveInt | None = frozen(None)
    """Key and value heads K; null: as many as num_attention_heads (no grouping)."""
    head_dim: PositiveInt | None = frozen(None)
    """Size of one head; null: hidden_size / num_attention_heads. Must be even (rotary pairs)."""
    intermediate_size: PositiveInt | None = frozen(None)
    """Width of the SwiGLU feed-forward; null: 8/3 of hidden_size, rounded up to a multiple of 64. With moe: of one expert,
    if moe.moe_intermediate_size is null."""
    vocab_size: Several | None = frozen(None)
    """Number of token ids V; null: taken from the tokenizer."""
    vocab_multiple: PositiveInt = frozen(64)
    """Embedding rows are padded up to a multiple of this; padded ids never enter the loss. 1: no padding."""
    max_position_embeddings: PositiveInt | None = free(None)
    """Longest context in tokens, recorded for converters, at least data.sequence_length; null: data.sequence_length."""
    rope_theta: PositiveFloat = guarded(10000.0)
    """Base of the rotary position embedding."""
    rope_scaling: RopeScalingConfig | None = guarded(None)
    """Rotary embedding for long contexts; null: off."""
    reset_positions: bool = frozen(False)
    """Positions count from the start of each document; requires data.document_mask. Off: from the start of the sequence."""
    sliding_window: PositiveInt | None = frozen(None)
    """Tokens that a token sees, itself included, in every block; null: all before it."""
    rms_norm_eps: PositiveFloat = frozen(1e-5)
    """Epsilon of every RMSNorm."""
    qk_norm: bool = frozen(False)
    """RMSNorm on queries and keys, per head (Qwen3)."""
    zero_init_outputs: bool = frozen(False)
    """Initial o_proj and down_proj of zero, so that each block begins as the identity. Off: small random values."""
    tie_word_embeddings: bool = frozen(False)
    """One matrix for the input embedding and the head."""
    moe: MoeConfig | None = frozen(None)
    """Mixture of experts; null: dense."""
    scaling: ScalingConfig | None = frozen(None)
    """Transfer of the learning rate from a smaller model; null: off."""


# ---------------------------------------------------------------- combinations that cannot work


def _check_heads(model: ModelConfig) -> Iterator[Problem]:
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads or model.num_attention_heads
    if heads % kv_heads:
        yield Problem("model.num_key_value_heads", f"got {kv_heads}, must divide num_attention_heads = {heads}")
    if model.head_dim is None and model.hidden_size % heads:
        message = f"got {heads}, must divide hidden_size = {model.hidden_size}, or set model.head_dim"
        yield Problem("model.num_attention_heads", message)
    elif (size := model.head_dim or model.hidden_size // heads) % 2:
        yield Problem("model.head_dim", f"is {size}, must be even: rotary embedding turns pairs")


def _check_rope_scaling(model: ModelConfig) -> Iterator[Problem]:
    if (scaling := model.rope_scaling) is None:
        return
    for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        if scaling.kind == "linear" and getattr(scaling, name) is not None:
            yield Problem(f"model.rope_scaling.{name}", "has no meaning for kind linear; leave it out")
        if scaling.kind == "llama3" and getattr(scaling, name) is None:
            yield Problem(f"model.rope_scaling.{name}", "is required for kind llama3")
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if scaling.kind == "llama3" and low is not None and high is not None and low >= high:
        yield Problem("model.rope_scaling.high_freq_factor", f"got {high}, must be greater than low_freq_factor = {low}")


def _check_experts(model: ModelConfig) -> Iterator[Problem]:
    if (moe := model.moe) is None:
        return
    if (chosen := moe.num_experts_per_tok) > moe.num_experts:
        yield Problem("model.moe.num_experts_per_tok", f"got {chosen}, must be at most num_experts = {moe.num_experts}")
    if chosen == 1 and moe.norm_topk_prob:
        message = (
            "is true with one expert per token, whose weight would always be 1: the router would learn nothing from the loss; "
            "set it to false, or num_experts_per_tok to 2 or more"
        )
        yield Problem("model.moe.norm_topk_prob", message)
    if moe.bias_update_rate > 0 and moe.score != "sigmoid":
        message = f"got {moe.bias_update_rate}, which needs score sigmoid; set it to 0, or model.moe.score to sigmoid"
        yield Problem("model.moe.bias_update_rate", message)


CHECKS = (_check_heads, _check_rope_scaling, _check_experts)
"""Each yields the problems of a `ModelConfig`."""


# ---------------------------------------------------------------- derived values


def vocabulary(model: ModelConfig, tokenizer_ids: int | None) -> tuple[int, int]:
    """(ids of the model, ids that the data may hold), from the settings and the size of the tokenizer, if there is one.

    They differ only with `from_pretrained`: a published model may have more ids than its tokenizer, and a tokenizer with more
    ids than the model makes it larger.
    """
    if model.from_pretrained and tokenizer_ids:
        return max(model.vocab_size or 0, tokenizer_ids), tokenizer_ids
    ids = model.vocab_size or tokenizer_ids
    return ids, ids


def vocabulary_rows(model: ModelConfig) -> int:
    """Number of rows of embedding and head: vocab_size rounded up to a multiple of vocab_multiple."""
    return -(-model.vocab_size // model.vocab_multiple) * model.vocab_multiple


def differences(old: ModelConfig, new: ModelConfig) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of each setting that keeps `new` from taking the weights of `old`; both are resolved.

    More ids, longer contexts and settings that only training reads do not count.
    """
    before, after = (schema.flatten(schema.to_dict(model)) for model in (old, new))
    free = {"from_pretrained", "vocab_multiple", "max_position_embeddings", "zero_init_outputs"}
    free |= {"scaling", "scaling.base_hidden_size", "scaling.base_num_hidden_layers"}
    free |= {"moe.balance", "moe.aux_loss_weight", "moe.z_loss_weight", "moe.bias_update_rate"}
    if new.vocab_size >= old.vocab_size:
        free.add("vocab_size")
    if old.moe and new.moe:
        free.add("intermediate_size")  # no layer has it
    keys = (before | after).keys() - free
    return [(key, before.get(key), after.get(key)) for key in sorted(keys) if before.get(key) != after.get(key)]


def resolve_model(model: ModelConfig, *, vocab_size: int, sequence_length: int) -> ModelConfig:
    """`model` with its actual value for every None, except where None means off."""
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
    """The inverse of `dataclasses.asdict`; keys that `values` lacks, as those of older versions do, get their defaults."""
    sections = {"rope_scaling": RopeScalingConfig, "moe": MoeConfig, "scaling": ScalingConfig}
    return ModelConfig(**{
        key: sections[key](**value) if key in sections and value is not None else value for key, value in values.items()
    })  # fmt: skip


def shrink(model: ModelConfig, context: int) -> ModelConfig:
    """A model of the same kind that a CPU trains in seconds, for samples of `context` tokens; not resolved.

    Grouped queries, query norm, tied embeddings, sliding window, experts and scaling (of a size other than the base's) stay.
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
        scaling=model.scaling and ScalingConfig(base_hidden_size=32, base_num_hidden_layers=1),
    )
