"""The arithmetic of plans against what others have published: bytes of the state, FLOPs, peaks of memory. Speeds are compared
in test_scaling.py. docs/planning.md has the same figures as a table, with their sources."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from pretrain.config import EngineConfig, ParallelConfig, load
from pretrain.model import flops
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.plan.memory import memory, state

ROOT = Path(__file__).parents[1]
GIB = 2**30


def preset(name: str, length: int) -> ModelConfig:
    own = ["--data.synthetic.kind", "uniform", "--train.max_steps", "1"]
    model = load(["--config", str(ROOT / f"configs/models/{name}.yaml"), *own], world_size=None).model
    return resolve_model(model, vocab_size=model.vocab_size, sequence_length=length)


LLAMA_8B, LLAMA_70B = preset("llama3_1_8b", 8192), preset("llama3_1_70b", 8192)
_LLAMA_405B = ModelConfig(
    hidden_size=16384, num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8, intermediate_size=53248
)
LLAMA_405B = resolve_model(_LLAMA_405B, vocab_size=128256, sequence_length=8192)
QWEN_30B = preset("qwen3_30b_a3b", 4096)


class Row(NamedTuple):
    """A published figure, ours for the same conditions, and how far apart they may be."""

    what: str
    published: float
    ours: float
    tolerance: float

    @property
    def cells(self) -> list[str]:
        """As in the table of the page."""
        error = self.ours / self.published - 1
        exact = abs(error) < 0.0005
        return [self.what, f"{self.published:,.4g}", f"{self.ours:,.4g}", "0" if exact else f"{100 * error:+.1f} %"]


# ---------------------------------------------------------------- state


def per_parameter(name: str, ranks: int) -> tuple[float, float, float]:
    """Bytes of weights, gradients and moments per parameter."""
    sizes = state(LLAMA_8B, EngineConfig(name=name, keep_whole_below=0), ranks)
    return tuple(size / flops.num_parameters(LLAMA_8B).total for size in sizes)


def zero_paper(name: str) -> float:
    """GB of 7.5e9 parameters on 64 GPUs. The paper keeps gradients in fp16, we in fp32; ddp keeps weights once, in fp32."""
    weights, gradients, moments = per_parameter(name, 64)
    return 7.5 * (weights + (gradients if name == "ddp" else gradients / 2) + moments)


def megatron(ranks: int) -> float:
    """Bytes per parameter of bf16 weights and fp32 gradients with the distributed optimizer, which is zero1."""
    return sum(per_parameter("zero1", ranks))


# ---------------------------------------------------------------- activations and FLOPs


def korthikanti(kept: str) -> float:
    """Bytes that a layer keeps per token and unit of width. Theirs has a GELU of 4 h, ours a SwiGLU of 8/3 h: the same weights
    and, here, the same bytes. Their 34 without the masks of two dropouts, 1 byte each, which we do not have, are 32."""
    h, layers, length = 3072, 4, 2048
    model = ModelConfig(hidden_size=h, num_hidden_layers=layers, num_attention_heads=24, intermediate_size=8 * h // 3)
    shape = resolve_model(model, vocab_size=51200, sequence_length=length)
    engine = EngineConfig(name="fsdp2", activation_checkpointing=kept)
    return memory(shape, length, 1, engine, 8).activations / (layers * length * h)


def per_token(model: ModelConfig, length: int, causal: bool = False, embedding: bool = False) -> float:
    """FLOPs. embedding: some count the input embedding, which multiplies nothing."""
    counted = flops.num_parameters(model).embedding if embedding else 0
    return flops.flops_per_token(model, length, causal) + 6 * counted


# ---------------------------------------------------------------- peaks


def torchtitan(
    model: ModelConfig, length: int, micro_batch: int, ranks: int, kept: str, tensor: int = 1, sequence: int = 1
) -> float:
    """GiB of the peak, at the end of the forward pass, with what torchtitan did differently in 2024: `selective` keeps every
    second product, attention and the input of a block (parallelize_llama.py); all logits exist at once, in bf16 and three times
    in fp32, as logits, log-softmax and gradient (train.py); embedding and head stay gathered in bf16."""
    engine = EngineConfig(
        name="fsdp2", activation_checkpointing=kept, parallel=ParallelConfig(tensor=tensor, sequence=sequence)
    )
    ours = memory(model, length, micro_batch, engine, ranks)
    tokens, rows = micro_batch * length / sequence, model.vocab_size / tensor
    activations = ours.activations
    if kept == "selective":
        width, keys = model.hidden_size, model.num_key_value_heads * model.head_dim
        activations = 2 * tokens * model.num_hidden_layers * (4 * width + keys + model.intermediate_size)
    logits, gathered = 14 * tokens * rows, 4 * rows * model.hidden_size
    return (ours.weights + ours.gradients + ours.moments + activations + logits + gathered) / GIB


ROWS = [
    Row("ZeRO paper, figure 1: 7.5B on 64 GPUs, no sharding, GB", 120, zero_paper("ddp"), 0.001),
    Row("the same, optimizer state sharded", 31.4, zero_paper("zero1"), 0.001),
    Row("the same, and gradients", 16.6, zero_paper("zero2"), 0.003),
    Row("the same, and weights", 1.88, zero_paper("zero3"), 0.003),
    Row("Megatron-LM, bytes per parameter, not sharded", 18, megatron(1), 0.001),
    Row("Megatron-LM, the same over 64 ranks: 6 + 12 / 64", 6 + 12 / 64, megatron(64), 0.001),
    Row("Korthikanti et al.: bytes kept per layer, token and width", 34 - 2, korthikanti("none"), 0.001),
    Row("the same, full recomputation", 2, korthikanti("full"), 0.001),
    Row("Llama 3 405B, FLOPs of 15.6T tokens: 6 N D, 1e25", 3.8, 6 * flops.num_parameters(LLAMA_405B).total * 15.6e12 / 1e25,
        0.001),
    Row("Megatron-LM, Llama 3 8B at 13,812 tokens/s, TFLOP/s", 800, per_token(LLAMA_8B, 8192) * 13812 / 1e12, 0.001),
    Row("torchtitan, 8B on A100 at 2,973 tokens/s, MFU %", 58.2,
        per_token(LLAMA_8B, 8192, embedding=True) * 2973 / 3.12e12, 0.002),
    Row("torchtitan, 70B on A100 at 331 tokens/s, MFU %", 51.7,
        per_token(LLAMA_70B, 8192, embedding=True) * 331 / 3.12e12, 0.002),
    Row("NeMo AutoModel, Qwen3-30B-A3B at 12,040 tokens/s, TFLOP/s", 277,
        per_token(QWEN_30B, 4096, causal=True) * 12040 / 1e12, 0.005),
    Row("torchtitan, 8B on 8 H100, compiled, peak GiB", 77.0, torchtitan(LLAMA_8B, 8192, 2, 8, "selective"), 0.03),
    Row("torchtitan, 8B on 128 H100, compiled, peak GiB", 62.0, torchtitan(LLAMA_8B, 8192, 2, 128, "selective"), 0.03),
    Row("torchtitan, 8B, 32k tokens, full recomputation, float8, peak GiB", 83.9,
        torchtitan(LLAMA_8B, 32768, 1, 8, "full"), 0.06),
    Row("torchtitan, 8B, 262k tokens over 8 ranks, the same", 84.5,
        torchtitan(LLAMA_8B, 262144, 1, 8, "full", sequence=8), 0.06),
    Row("torchtitan, 70B on 256 H100, tensor 8, float8, async TP, peak GiB", 67.6,
        torchtitan(LLAMA_70B, 8192, 16, 256, "full", tensor=8), 0.25),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_a_published_figure_is_met(row):
    assert row.ours == pytest.approx(row.published, rel=row.tolerance, abs=0)


def test_the_page_shows_these_figures():
    table = (ROOT / "docs/planning.md").read_text().split("<!-- published -->\n")[1].split("<!-- end -->")[0]
    shown = [[cell.strip() for cell in line.strip("| ").split("|")][:4] for line in table.splitlines()[2:] if line]
    assert shown == [row.cells for row in ROWS], "\n".join(f"| {' | '.join(row.cells)} |" for row in ROWS)


@pytest.mark.parametrize("ranks", [8, 64])
def test_deepspeeds_own_estimates_are_ours_and_what_it_adds(ranks):
    """Its estimate for zero2 adds each rank's share of gradients in 16 bits; that for zero3 a layer, gathered."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    parameters, layer = flops.num_parameters(LLAMA_8B).total, flops.num_parameters(LLAMA_8B).embedding
    alone = {"num_gpus_per_node": ranks, "num_nodes": 1, "cpu_offload": False, "additional_buffer_factor": 1.0}
    _, theirs = estimate_zero2_model_states_mem_needs(parameters, **alone)
    engine = EngineConfig(name="zero2", keep_whole_below=0)
    assert sum(state(LLAMA_8B, engine, ranks)) + 2 * parameters / ranks == pytest.approx(theirs, rel=1e-6)
    settings = alone | {"cpu_offload_params": False, "zero_init": True}
    _, theirs, gathered = estimate_zero3_model_states_mem_needs(parameters, layer, **settings)
    engine = EngineConfig(name="zero3", keep_whole_below=0)
    assert sum(state(LLAMA_8B, engine, ranks)) + gathered == pytest.approx(theirs, rel=1e-6)


def test_the_sources_of_the_page_are_named():
    text = (ROOT / "docs/planning.md").read_text()
    assert all(re.search(name, text) for name in ("1910.02054", "2205.05198", "2407.21783", "torchtitan", "Megatron-LM"))
