"""Measures the time of one training step: forward pass with the loss, backward pass, update, and the loss alone.

    python benchmarks/step.py [--shape C1] [--length T] [--micro-batch N] [--rounds 5] [--variants adamw muon ...]
                              [--output FILE]

A variant is an optimizer, or an optimizer and what is compiled: `adamw`, `muon`, `adamw-blocks`, `adamw-model`. With
`+documents`, such as `adamw+documents`, tokens see only their own document, of 512 tokens on average. All train in one process
and take turns, in the opposite order every other round, after two steps that do not count. Times are medians over the rounds:
CPU seconds on CPUs, which other programs share, and wall seconds on GPUs. `ratio` is the median over the rounds of a variant's
step to that of the first one in the same round. `loss`, head and cross-entropy, is a part of forward and computes its own
gradient; a model compiled as a whole shows none. `peak` is the most memory that tensors took on a GPU; on CPUs
`benchmarks/ladder.py` shows it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.machine import describe, facts
from benchmarks.shapes import SHAPES, Shape
from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.data.batches import Batch
from pretrain.engines.base import Engine
from pretrain.engines.start import start_engine
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer
from pretrain.run import command_line
from pretrain.train import train_step

LR, WARM_UP = 3e-4, 2
PARTS = ("forward", "backward", "update", "loss")
VARIANTS = ("adamw", "muon", *(f"{name}-{what}" for name in ("adamw", "muon") for what in ("blocks", "model")))
DOCUMENTS, MEAN_DOCUMENT = "+documents", 512


def make_window(shape: Shape, micro_batch: int, device: torch.device, documents: bool = False) -> list[Batch]:
    """The micro-batches of one step: random tokens, never zeros; a label is the next token. Documents: of geometric lengths."""
    length, generator = shape.sequence_length, torch.Generator().manual_seed(0)
    size = (max(1, shape.tokens_per_step // (micro_batch * length)), micro_batch, length + 1)
    tokens = torch.randint(0, shape.model.vocab_size, size, generator=generator).to(device)
    starts = torch.rand((*size[:2], length), generator=generator) < 1 / MEAN_DOCUMENT
    numbers = starts.cumsum(-1).to(device) if documents else [None] * size[0]
    return [Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), of) for rows, of in zip(tokens, numbers, strict=True)]


def make_engine(shape: Shape, variant: str) -> Engine:
    """An engine of one process, in fp32 on a CPU and in bf16 on a GPU."""
    optimizer, _, compiled = variant.removesuffix(DOCUMENTS).partition("-")
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    engine = start_engine(EngineConfig(name="ddp", precision=precision, compile=compiled or "none"))
    settings = OptimizerConfig(name=optimizer, lr=LR)
    engine.prepare(lambda: Transformer(shape.model), lambda model: build_optimizer(model, settings), 1.0, seed=0)
    return engine


def parts_of_a_step(engine: Engine, window: list[Batch]) -> dict[str, float]:
    """Takes one step and returns its seconds, in all (`step`) and by part."""
    seconds = dict.fromkeys(PARTS, 0.0)
    replaced = [(engine, part, part) for part in ("forward", "backward", "update")]
    if engine.config.compile != "model":  # a clock in a graph would break it
        replaced.append((engine.model.lm_head, "forward", "loss"))
    kept = [getattr(owner, name) for owner, name, _ in replaced]

    def timed(function: Callable, part: str) -> Callable:
        def call(*arguments, **keywords):
            began = now(engine.device)
            result = function(*arguments, **keywords)
            seconds[part] += now(engine.device) - began
            return result

        return call

    for (owner, name, part), function in zip(replaced, kept, strict=True):
        setattr(owner, name, timed(function, part))
    began = now(engine.device)
    train_step(engine, window, LR)
    seconds["step"] = now(engine.device) - began
    for (owner, name, _), function in zip(replaced, kept, strict=True):
        setattr(owner, name, function)
    return seconds


def now(device: torch.device) -> float:
    """CPU seconds of this process; on a GPU, wall seconds after the work so far."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(shape: Shape, variants: list[str], micro_batch: int, rounds: int) -> list[dict]:
    """One row per variant."""
    engines = {variant: make_engine(shape, variant) for variant in variants}
    device = next(iter(engines.values())).device
    windows = {variant: make_window(shape, micro_batch, device, variant.endswith(DOCUMENTS)) for variant in variants}
    tokens = sum(batch.labels_BT.numel() for batch in windows[variants[0]])
    found: dict[str, list[dict]] = {variant: [] for variant in variants}
    peaks = {}
    for turn in range(WARM_UP + rounds):
        for variant in variants[:: 1 if turn % 2 else -1]:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            parts = parts_of_a_step(engines[variant], windows[variant])
            if turn >= WARM_UP:
                found[variant].append(parts)
            if device.type == "cuda":
                peaks[variant] = torch.cuda.max_memory_allocated(device)
        print(f"round {turn + 1} of {WARM_UP + rounds}", file=sys.stderr)
    rows = []
    for variant in variants:
        medians = {part: statistics.median(parts[part] for parts in found[variant]) for part in ("step", *PARTS)}
        ratios = [mine["step"] / first["step"] for mine, first in zip(found[variant], found[variants[0]], strict=True)]
        rows.append({"variant": variant, **medians, "ratio": statistics.median(ratios),
                     "tokens_per_second": tokens / medians["step"], "peak_bytes": peaks.get(variant)})  # fmt: skip
    return rows


def main(argv: list[str]) -> None:
    """Measures, prints and writes the table."""
    cuda = torch.cuda.is_available()
    parser = command_line.make_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="G1" if cuda else "C1", help="default here: %(default)s")
    parser.add_argument("--length", type=command_line.at_least(1), help="T (default: that of the shape)")
    parser.add_argument("--micro-batch", type=command_line.at_least(1), help="sequences (default: that of the shape)")
    parser.add_argument("--rounds", type=command_line.at_least(1), default=5, help="steps that count (default: %(default)s)")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=[*VARIANTS, *(f"{each}{DOCUMENTS}" for each in VARIANTS)],
        default=["adamw", "muon"],
        help="default: adamw muon",
    )
    parser.add_argument("--output", type=Path, help="JSON file to write (default: none)")
    options = parser.parse_args(argv)
    shape = SHAPES[options.shape]
    if options.length:
        size = max(1, shape.micro_batch_size * shape.sequence_length // options.length)
        shape = replace(shape, sequence_length=options.length, micro_batch_size=size)
    micro_batch = options.micro_batch or shape.micro_batch_size
    rows = measure(shape, options.variants, micro_batch, options.rounds)
    machine = facts()
    print(
        f"{describe(machine)}\n{options.shape}, micro-batches of {micro_batch} x {shape.sequence_length} tokens, "
        f"{'wall' if cuda else 'CPU'} seconds"
    )
    width, columns = max(14, *map(len, options.variants)), " ".join(f"{part:>8}" for part in PARTS)
    print(f"{'variant':{width}} {'step':>8} {'ratio':>6} {columns} {'tokens/s':>10} {'peak GiB':>8}")
    for row in rows:
        times = " ".join(f"{row[part]:8.4f}" for part in PARTS)
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:8.2f}"
        shown = f"{row['step']:8.4f} {row['ratio']:6.3f} {times} {row['tokens_per_second']:10,.0f} {peak:>8}"
        print(f"{row['variant']:{width}} {shown}")
    if options.output:
        report = {
            "shape": options.shape,
            "sequence_length": shape.sequence_length,
            "micro_batch_size": micro_batch,
            "machine": machine,
            "rows": rows,
        }
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
