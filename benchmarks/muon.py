"""Measures the cost of Muon: Newton-Schulz on a model's matrices, batched by shape or one by one, and full optimizer steps.

    python benchmarks/muon.py [--device cpu|cuda] [--models quickstart 124M ...] [--repeats 5] [--output FILE]

Prints two tables and writes their rows as JSON. Inputs are random numbers, never zeros; variants alternate (A B, B A, ...) and
each figure is the median over the rounds. `share` is the fraction of the FLOPs of a training step with `tokens_per_step` that
Newton-Schulz takes. It measures one rank only, because several processes on one machine say nothing about a network.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from pretrain.config import OptimizerConfig
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.model.transformer import Transformer, build
from pretrain.optim.muon import newton_schulz
from pretrain.optim.optimizer import build_optimizer
from pretrain.run import command_line

MODELS = {  # name: (model, vocabulary, tokens per step)
    "quickstart": (
        ModelConfig(hidden_size=192, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, intermediate_size=512),
        4096,
        4096,
    ),
    "8.6M": (
        ModelConfig(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, intermediate_size=704),
        8192,
        4096,
    ),
    "124M": (ModelConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=6, intermediate_size=2048), 50304, 524288),
    "1.1B": (
        ModelConfig(
            hidden_size=2048, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, intermediate_size=5632
        ),
        32000,
        524288,
    ),
}


def seconds(variants: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Returns the median seconds of each variant, after a warm-up round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name in list(variants)[:: 1 if turn % 2 else -1]:
            _wait(device)
            began = time.perf_counter()
            variants[name]()
            _wait(device)
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def one_by_one(matrices: Tensor) -> list[Tensor]:
    """Newton-Schulz in a loop over parameters."""
    return [newton_schulz(matrix[None]) for matrix in matrices]


def flops_of_newton_schulz(shape: tuple[int, int]) -> int:
    """FLOPs of five rounds of two products with the matrix and one of Gram matrices."""
    small, large = sorted(shape)
    return 5 * 2 * small * small * (2 * large + small)


def shapes_of_blocks(model: nn.Module) -> Counter:
    """Counts the matrices of the blocks by (rows, columns)."""
    return Counter(tuple(p.shape) for name, p in model.named_parameters() if name.startswith("model.layers.") and p.ndim == 2)


def iteration_rows(name: str, device: torch.device, rounds: int) -> list[dict]:
    """One row per shape of matrix: all matrices at once against one by one."""
    config, vocabulary, _ = MODELS[name]
    with torch.device("meta"):
        model = Transformer(resolve_model(config, vocab_size=vocabulary, sequence_length=1024))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows = []
    for shape, count in sorted(shapes_of_blocks(model).items()):
        matrices = torch.randn(count, *shape, device=device, dtype=dtype)
        times = seconds(
            {"batched": lambda x=matrices: newton_schulz(x), "loop": lambda x=matrices: one_by_one(x)}, device, rounds
        )
        gflops = count * flops_of_newton_schulz(shape) / 1e9
        rows.append({"model": name, "shape": f"{shape[0]} x {shape[1]}", "count": count, "batched_ms": 1e3 * times["batched"],
                     "loop_ms": 1e3 * times["loop"], "speedup": times["loop"] / times["batched"],
                     "batched_gflops_per_second": gflops / times["batched"]})  # fmt: skip
    return rows


def step_row(name: str, device: torch.device, rounds: int) -> dict:
    """One full optimizer step, and Muon's fraction of the FLOPs of a training step."""
    config, vocabulary, tokens = MODELS[name]
    resolved = resolve_model(config, vocab_size=vocabulary, sequence_length=1024)
    variants, shapes = {}, Counter()
    for rule in ("adamw", "muon"):
        model = build(resolved, device, seed=0)
        shapes = shapes_of_blocks(model)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        variants[rule] = build_optimizer(model, OptimizerConfig(name=rule, lr=1e-6)).step
    times = seconds(variants, device, rounds)
    multiplied = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)
    extra = sum(count * flops_of_newton_schulz(shape) for shape, count in shapes.items())
    return {"model": name, "matrices": sum(shapes.values()), "adamw_ms": 1e3 * times["adamw"], "muon_ms": 1e3 * times["muon"],
            "muon_gflop": extra / 1e9, "tokens_per_step": tokens, "share": extra / (6 * multiplied * tokens)}  # fmt: skip


def show(rows: list[dict]) -> None:
    """Prints a table of `rows`, whose keys are the columns."""
    text = [list(rows[0])] + [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    for line in text:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(flush=True)


def main(argv: list[str]) -> None:
    """Measures, prints and writes the tables."""
    cuda = torch.cuda.is_available()
    models = ["124M", "1.1B"] if cuda else ["quickstart", "8.6M"]
    parser = command_line.make_parser(__doc__)
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda (default here: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=models, help=f"default here: {' '.join(models)}")
    parser.add_argument("--repeats", type=command_line.at_least(1), default=5, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmarks/muon.json"), help="JSON file to write (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}\n")
    result = {"device": where, "torch": torch.__version__, "load": os.getloadavg()[0]}
    result["newton_schulz"] = [row for name in arguments.models for row in iteration_rows(name, device, arguments.repeats)]
    show(result["newton_schulz"])
    result["step"] = [step_row(name, device, arguments.repeats) for name in arguments.models]
    show(result["step"])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1))
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
