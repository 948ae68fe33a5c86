"""Measures the cost of the engine interface: `train_step` under `ddp` in one process against a bare PyTorch loop; and that of
losses per source, and of comparing ranks.

    python benchmarks/seam_cost.py [--device cpu|cuda] [--steps 60] [--output FILE]

All loops train the same model from the same weights on the same tokens with the same fused AdamW, clipping, accumulation and
precision, and must reach the same loss. The bare loop is minimal: no valid-token count, no guard against steps that are not
finite, no meter. The loops alternate step by step (A B, B A, ...) in one process after a warm-up; the overhead is the median of
the ratios of adjacent steps. Losses per source cost less than two steps differ, so only the part of a step that they add to is
timed, after each step, in turns with and without sources. Comparing ranks is timed by itself too, as 8 ranks under `fsdp2` do
it: around each block of each forward pass, and at every tenth step. The targets are an overhead below 2 % for the interface,
below 1 % for the sources and below 0.5 % for the ranks; exit status 1 if one is missed.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Generator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn

from benchmarks import machine
from benchmarks.step import now
from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.data.batches import Batch
from pretrain.engines.base import Engine
from pretrain.engines.forward_time import ForwardTimer
from pretrain.engines.start import start_engine
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.model.transformer import Transformer, build
from pretrain.optim.optimizer import build_optimizer
from pretrain.report.metrics import Meter
from pretrain.report.ranks import RankProbe, SlowRankWatch, spread
from pretrain.run import command_line
from pretrain.train import _sample_losses, train_step

LENGTH, VOCABULARY, ACCUMULATION, SOURCES, LR, WARM_UP = 256, 8192, 2, 20, 3e-4, 5
RANKS, STEPS_PER_LINE = 8, 10
Loop = Generator[float | None, int | None, None]
"""Receives the number of a window and trains on it; on None, yields the mean loss."""
SIZES = {  # device: (model, micro-batch)
    "cpu": (ModelConfig(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2), 2),
    "cuda": (ModelConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=6, head_dim=128), 32),
}


def main(argv: list[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = command_line.make_parser(__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=SIZES, default=default, help="default: cuda if there is one")
    parser.add_argument("--steps", type=command_line.at_least(4), default=60, help="timed steps of each loop (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("seam_cost.json"), help="JSON file to write (%(default)s)")
    options = parser.parse_args(argv)
    sizes, micro_batch = SIZES[options.device]
    model = resolve_model(sizes, vocab_size=VOCABULARY, sequence_length=LENGTH)
    engine = start_engine(EngineConfig(precision="fp32" if options.device == "cpu" else "bf16", compile="none"))
    windows = _windows(WARM_UP + options.steps, micro_batch, engine.device)
    loops = {
        "bare": _bare(model, windows, engine.device),
        "engine": _engine(engine, model, windows),
    }
    for loop in loops.values():
        next(loop)
    meter = Meter(engine.device, engine.rank, engine.world_size, sources=[str(number) for number in range(SOURCES)])
    of_losses: dict[bool, list[float]] = {True: [], False: []}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(WARM_UP + options.steps):
        for name in sorted(loops, reverse=number % 2 == 1):
            began = now(engine.device)
            loops[name].send(number)
            seconds[name].append(now(engine.device) - began)
        named = number % 2 == 1
        of_losses[named].append(_seconds_of_losses(engine, meter, windows[number], named))
    losses = {name: loop.send(None) for name, loop in loops.items()}
    assert abs(losses["bare"] / losses["engine"] - 1) < 1e-3, losses
    seconds = {name: values[WARM_UP:] for name, values in seconds.items()}
    lost = statistics.median(a / b - 1 for a, b in zip(seconds["engine"], seconds["bare"], strict=True))
    fractions = {
        named: [each / statistics.median(seconds["engine"]) for each in values[WARM_UP // 2 :]]
        for named, values in of_losses.items()
    }
    of_sources = statistics.mean(fractions[True]) - statistics.mean(fractions[False])
    error = sum(statistics.variance(each) / len(each) for each in fractions.values()) ** 0.5
    of_ranks = _seconds_of_ranks(engine, model.num_hidden_layers) / statistics.median(seconds["engine"])
    for name, values in seconds.items():
        middle, least, most = (1000 * of(values) for of in (statistics.median, min, max))
        print(f"{name:8} {middle:8.2f} ms per step (min {least:.2f}, max {most:.2f})")
    print(f"overhead {100 * lost:8.2f} % (target: below 2), {engine.device_name}, {options.steps} steps of each")
    print(f"{SOURCES} sources {100 * of_sources:6.3f} % (target: below 1), standard error {100 * error:.3f} %")
    print(f"{RANKS} ranks    {100 * of_ranks:6.3f} % (target: below 0.5)")
    result = {"machine": machine.facts(), "device": engine.device_name, "seconds_per_step": seconds, "lost_fraction": lost}
    result |= {"sources_fraction": of_sources, "ranks_fraction": of_ranks}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if lost < 0.02 and of_sources < 0.01 and of_ranks < 0.005 else 1


def _windows(steps: int, micro_batch: int, device: torch.device) -> list[list[Batch]]:
    """Batches of random tokens (never all zeros); a label is the next token."""
    tokens = torch.randint(0, VOCABULARY, (steps, ACCUMULATION, micro_batch, LENGTH + 1)).to(device)
    return [[Batch(micro[:, :-1].contiguous(), micro[:, 1:].contiguous(), None) for micro in step] for step in tokens]


def _seconds_of_losses(engine: Engine, meter: Meter, window: list[Batch], named: bool) -> float:
    """Of what follows the passes of a step: its losses go to the meter; if `named`, those of sources, too."""
    one = torch.ones((), dtype=torch.float64, device=engine.device)
    tokens, sizes = (2 * one).long(), [len(batch.tokens_BT) for batch in window]
    losses = [torch.ones(size, device=engine.device) for size in sizes]
    if named:
        numbers = [torch.randint(0, SOURCES, (size,), device=engine.device) for size in sizes]
        window = [batch._replace(sources_B=sources_B) for batch, sources_B in zip(window, numbers, strict=True)]
    began = now(engine.device)
    meter.add(one, tokens, one, tokens > 0, samples=_sample_losses(engine, window, losses))
    return now(engine.device) - began


def _seconds_of_ranks(engine: Engine, layers: int) -> float:
    """Per step, median of some lines of the log: timing each block, and what comparing RANKS ranks adds to the line."""
    timer, probe, watch = ForwardTimer(engine.device, layers), RankProbe(engine.device), SlowRankWatch(window_seconds=0.0)
    meter = Meter(engine.device, 0, RANKS)
    lines = []
    for _ in range(20):
        began = now(engine.device)
        for _ in range(STEPS_PER_LINE * ACCUMULATION * layers):
            with timer:
                pass
        figures = probe.read(timer.read(), 0.0)
        torch.cat([meter._slot(value) for value in figures])
        spread([figures] * RANKS)
        watch.add([figures] * RANKS, 1.0, STEPS_PER_LINE, ACCUMULATION)
        lines.append(now(engine.device) - began)
    return statistics.median(lines) / STEPS_PER_LINE


def _bare(config: ModelConfig, windows: list[list[Batch]], device: torch.device) -> Loop:
    model = build(config, device, seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(lr=LR))
    tokens = ACCUMULATION * windows[0][0].labels_BT.numel()
    total, steps = torch.zeros((), device=device), 0
    while (number := (yield)) is not None:
        for batch in windows[number]:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(batch.tokens_BT, batch.labels_BT).loss_sum / tokens
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
    yield total.item() / steps


def _engine(engine, config: ModelConfig, windows: list[list[Batch]]) -> Loop:
    engine.prepare(lambda: Transformer(config), lambda model: build_optimizer(model, OptimizerConfig(lr=LR)), 1.0, seed=0)
    meter = Meter(engine.device, engine.rank, engine.world_size)
    while (number := (yield)) is not None:
        meter.add(*train_step(engine, windows[number], LR))
    yield meter.read(engine.all_reduce)["loss"]


if __name__ == "__main__":
    sys.exit(command_line.run(main))
