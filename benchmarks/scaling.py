"""Compares the step-time model of `pretrain/plan/scaling.py` with published runs, and shows what it expects on 8 to 1,024 GPUs.

    python benchmarks/scaling.py [--output FILE]

First table: runs of other projects whose settings are public, the tokens per second and GPU that they report, the model's
estimate and its error. The model's rates (two numbers for Ampere, two for Hopper, five for both) were fitted to these rows, so
their errors are no forecast of the error for another cluster. Second table: an estimate for configurations of this project. It
measures nothing, needs no GPU and takes a second.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain import devices
from pretrain.config import EngineConfig, load
from pretrain.devices import Device
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.plan.scaling import Cluster, StepTime, step_time
from pretrain.run import command_line

ROOT = Path(__file__).resolve().parents[1]


class Published(NamedTuple):
    """A run of another project. Where it does not state the micro-batch, ours is a guess, which matters little here."""

    name: str
    device: Device
    gpus: int
    model: ModelConfig
    length: int
    micro_batch: int
    tokens_per_second: float
    """Of one GPU, as reported."""
    compiled: bool
    checkpointing: str = "none"
    engine: str = "fsdp2"


def _model(
    width: int, layers: int, heads: int, key_heads: int, feed_forward: int, vocab: int, tied: bool = False
) -> ModelConfig:
    settings = ModelConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
        intermediate_size=feed_forward, tie_word_embeddings=tied,
    )  # fmt: skip
    return resolve_model(settings, vocab_size=vocab, sequence_length=2048)


LLAMA3_8B = _model(4096, 32, 32, 8, 14336, 128256)
LLAMA2_7B = _model(4096, 32, 32, 32, 11008, 32000)
MPT_1B, MPT_3B, MPT_7B = (
    _model(width, layers, heads, heads, 8 * width // 3 // 64 * 64, 50432, tied=True)
    for width, layers, heads in ((2048, 24, 16), (2560, 32, 20), (4096, 32, 32))
)
GPT2_124M, GPT2_1558M = _model(768, 12, 12, 12, 2048, 50304, True), _model(1600, 48, 25, 25, 4288, 50304, True)
OLMO_1B = _model(2048, 16, 16, 16, 8192, 100352)
LLAMA_1B = _model(2048, 16, 32, 8, 8192, 128256, True)
TINYLLAMA = _model(2048, 22, 32, 4, 5632, 32000)
NANOCHAT_D12 = _model(768, 12, 6, 6, 2048, 32768)

TITAN_H100 = dataclasses.replace(devices.find("h100"), name="H100 500 W", memory_gb_per_second=2400)
A100, A100_40GB, H100 = (devices.find(name) for name in ("a100", "a100-40gb", "h100"))

# Sources, in this order. torchtitan: benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3 (limited to 500 of 700 W,
# which the model does not know), and its docs/performance.md of 2024. IBM: pytorch.org/blog/maximizing-training-throughput and
# fms-fsdp issue 89. llm-foundry: scripts/train/benchmarking/README.md. OLMo-core: README. nanotron: the Smol Training Playbook.
# TinyLlama: README. llm.c: discussions 481 and 677 (its own kernels). nanochat: d12 on one H100.
PUBLISHED = [
    Published("torchtitan 8B", TITAN_H100, 8, LLAMA3_8B, 8192, 2, 5762, False, "selective"),
    Published("torchtitan 8B", TITAN_H100, 8, LLAMA3_8B, 8192, 2, 6667, True, "selective"),
    Published("torchtitan 8B", TITAN_H100, 128, LLAMA3_8B, 8192, 2, 5605, False, "selective"),
    Published("torchtitan 8B", TITAN_H100, 128, LLAMA3_8B, 8192, 2, 6514, True, "selective"),
    Published("torchtitan 8B", A100, 64, LLAMA3_8B, 8192, 1, 2973, True, "selective"),
    Published("IBM 7B", A100, 128, LLAMA2_7B, 4096, 2, 3700, False),
    Published("IBM 7B", A100, 128, LLAMA2_7B, 4096, 2, 4550, True, "selective"),
    Published("IBM 7B", H100, 96, LLAMA2_7B, 4096, 2, 9600, True, "selective"),
    Published("llm-foundry 1B", H100, 8, MPT_1B, 2048, 12, 45455, False),
    Published("llm-foundry 3B", H100, 16, MPT_3B, 2048, 5, 24142, False),
    Published("llm-foundry 7B", H100, 8, MPT_7B, 2048, 6, 10643, False),
    Published("llm-foundry 1B", A100, 8, MPT_1B, 2048, 12, 20500, False),
    Published("llm-foundry 7B", A100, 8, MPT_7B, 2048, 4, 4600, False),
    Published("OLMo-core 1B", H100, 8, OLMO_1B, 4096, 8, 55000, True),
    Published("nanotron 1.2B", H100, 8, LLAMA_1B, 4096, 4, 42000, False),
    Published("TinyLlama 1.1B", A100_40GB, 16, TINYLLAMA, 2048, 8, 24000, True),
    Published("llm.c 124M", H100, 8, GPT2_124M, 1024, 64, 475000, True, engine="ddp"),
    Published("llm.c 1.6B", H100, 8, GPT2_1558M, 1024, 16, 48600, True, engine="zero1"),
    Published("nanochat d12", H100, 1, NANOCHAT_D12, 2048, 32, 524000, True, engine="ddp"),
]


def estimate(run: Published) -> StepTime:
    """The model's estimate for a published run."""
    engine = EngineConfig(name=run.engine, activation_checkpointing=run.checkpointing)
    cluster = Cluster(run.device, run.gpus)
    return step_time(run.model, run.length, run.micro_batch, 1, engine, cluster, compiled=run.compiled)


def errors() -> dict[Published, float]:
    """The relative error of the estimate for each published run."""
    return {run: estimate(run).tokens_per_second / run.tokens_per_second - 1 for run in PUBLISHED}


def projections(gpus: list[int]) -> list[dict]:
    """The model's estimate for this project's cloud configurations, whose global batch stays as it is."""
    rows = []
    for name in ("cloud", "cloud_zero3", "cloud_moe"):
        config = load(["--config", str(ROOT / f"configs/{name}.yaml")], world_size=None)
        model = resolve_model(config.model, vocab_size=32000, sequence_length=config.data.sequence_length)
        for ranks in gpus:
            accumulation, rest = divmod(config.batch.global_batch_size, config.batch.micro_batch_size * ranks)
            if rest or not accumulation:
                continue
            cluster = Cluster(H100, ranks)
            batch = config.data.sequence_length, config.batch.micro_batch_size, accumulation
            time = step_time(model, *batch, config.engine, cluster)
            rows.append({"config": name, "engine": config.engine.name, "gpus": ranks} | time._asdict())
    return rows


def main(argv: list[str]) -> None:
    """Prints the tables."""
    parser = command_line.make_parser(__doc__)
    parser.add_argument("--output", type=Path, help="JSON file to write (default: none)")
    options = parser.parse_args(argv)
    print("run             device     GPUs  mode      published  estimate   error")
    found = errors()
    for run, error in found.items():
        mode = "compiled" if run.compiled else "eager"
        expected = (1 + error) * run.tokens_per_second
        where = f"{run.name:15} {run.device.name:10} {run.gpus:4}  {mode:8}"
        print(f"{where} {run.tokens_per_second:10,.0f} {expected:9,.0f} {error:7.1%}")
    sizes = [abs(error) for error in found.values()]
    print(f"median error {statistics.median(sizes):.1%}, largest {max(sizes):.1%}")
    for few, many in zip(PUBLISHED[0:2], PUBLISHED[2:4], strict=True):
        kept, expected = (
            many.tokens_per_second * b / (few.tokens_per_second * a) for a, b in ((1, 1), (1 + found[few], 1 + found[many]))
        )
        print(f"torchtitan 8B, 128 GPUs over 8: {kept:.1%} of the rate per GPU, estimate {expected:.1%}")
    print()
    print("config       engine   GPUs   tok/s/GPU    MFU  step     products  attention  other  exposed  communication")
    rows = projections([8, 16, 32, 64, 128, 256, 512, 1024])
    for row in rows:
        shares = "".join(f"{row[name] / row['total']:9.0%}" for name in ("products", "attention", "other", "exposed"))
        print(
            f"{row['config']:12} {row['engine']:7} {row['gpus']:5} {row['tokens_per_second']:11,.0f} {row['mfu']:6.1%} "
            f"{row['total']:6.2f} s{shares}{row['communication'] / row['total']:13.0%}"
        )
    if options.output:
        runs = [
            run._asdict() | {"device": run.device.name, "model": dataclasses.asdict(run.model), "error": error}
            for run, error in found.items()
        ]
        options.output.write_text(json.dumps({"published": runs, "projections": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
