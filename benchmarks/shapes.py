"""The model shapes that the benchmarks measure, so that their figures can be compared: C on CPUs, G on GPUs.

C1   8.6M on a CPU, small enough for an afternoon        C2   19.2M on a CPU
G1   124M, the size of GPT-2, with heads of 128          G2   1.1B, the shape of TinyLlama
G3   G1 with 8 experts, 2 per token: as many FLOPs per token as G1
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pretrain.model.config import ModelConfig, MoeConfig, resolve_model


@dataclass(frozen=True)
class Shape:
    """A model and the batch to measure it with."""

    model: ModelConfig
    """Resolved: no field is None."""
    sequence_length: int
    micro_batch_size: int
    """Sequences; fits on the device."""
    tokens_per_step: int


def _shape(config: ModelConfig, vocab_size: int, length: int, micro_batch_size: int, tokens_per_step: int) -> Shape:
    model = resolve_model(config, vocab_size=vocab_size, sequence_length=length)
    return Shape(model, length, micro_batch_size, tokens_per_step)


_C1 = ModelConfig(
    hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, intermediate_size=704,
    tie_word_embeddings=False,
)  # fmt: skip
_C2 = replace(_C1, hidden_size=384, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=3, intermediate_size=1024)
_G1 = ModelConfig(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=6, head_dim=128, intermediate_size=2048,
    tie_word_embeddings=True,
)  # fmt: skip
_G2 = ModelConfig(
    hidden_size=2048, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, intermediate_size=5632,
    tie_word_embeddings=False,
)  # fmt: skip
_G3 = replace(_G1, moe=MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=1024))

SHAPES = {
    "C1": _shape(_C1, 8192, 256, 8, 4_096),
    "C2": _shape(_C2, 8192, 512, 4, 4_096),
    "G1": _shape(_G1, 50304, 1024, 64, 524_288),
    "G2": _shape(_G2, 32000, 2048, 16, 524_288),
    "G3": _shape(_G3, 50304, 1024, 32, 524_288),
}
