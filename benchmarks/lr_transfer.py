"""Measures whether the learning rate that is best for a small model is best for a larger one, with and without `model.scaling`.

    python benchmarks/lr_transfer.py --config configs/quickstart.yaml --widths 32 64 128 --depths 2 4 8 --output FOLDER

The smallest width and the smallest depth are the base: models of all widths have that depth, and models of all depths that
width. Heads keep the size that `--head-dim` gives. Each model is trained from the same data with learning rates that are powers
of two, starting at the best one of the size before, until the lowest loss has a higher one on both sides; the loss is the mean
over the last tenth of the steps and over --seeds, which change the initial weights and the part of the data that is read; the
schedule is the configuration's in proportion. The best learning rate is the lowest point of the parabola through the lowest
loss and its neighbours. Where the minimum is flat, the best rate says little; so the table also has what it costs to take the
base's best rate: how much higher the parabola is there. One process, one thread, fp32.

Written to --output: runs.jsonl (each run as soon as it ends: the same command continues), lr_transfer.json and lr_transfer.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import machine
from pretrain.config import Config, EngineConfig, load
from pretrain.engines.start import start_engine
from pretrain.files import write_atomically
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.model.scaling import resized
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer
from pretrain.optim.schedule import lr_at
from pretrain.report.units import human_seconds
from pretrain.run import command_line
from pretrain.run.parts import Parts, open_parts
from pretrain.train import train_step

MOST_RUNS = 12  # of one model: a minimum that is still at an edge after so many is reported as such


def main(argv: list[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    options, words = command_line.parse_with_settings(make_parser(), argv)
    torch.set_num_threads(1)
    config = load(words, world_size=None, program="benchmarks/lr_transfer.py")
    parts = open_parts(config)
    options.output.mkdir(parents=True, exist_ok=True)
    runs = Runs(config, parts, options)
    found = []
    for axis in ("width", "depth"):
        for optimizer in options.optimizers:
            for scaled in (True,) if options.only_scaled else (True, False):
                exponent = round(math.log2(options.lr))
                for size in getattr(options, f"{axis}s"):
                    curve = runs.curve(optimizer, axis, size, scaled, exponent)
                    best = lowest(curve)
                    exponent = min(curve, key=curve.get)
                    of_seeds = [lowest(each) for each in runs.curves_of_seeds(optimizer, axis, size, scaled, list(curve))]
                    row = {"optimizer": optimizer, "axis": axis, "size": size, "scaled": scaled, "best_log2_lr": best}
                    row["best_log2_lr_of_seeds"] = of_seeds
                    found.append(row | {"loss": min(curve.values()), "curve": {str(key): curve[key] for key in sorted(curve)}})
                    seeds = ", ".join(map(rate, of_seeds))
                    print(f"{label(row)} {size}: best lr {rate(best)} ({seeds}), loss {min(curve.values()):.4f}", flush=True)
                write_atomically(options.output / "lr_transfer.json", json.dumps(summary(found, options), indent=1) + "\n")
    for line in table(found):
        print(line)
    draw(found, options.output / "lr_transfer.png")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = command_line.make_parser(__doc__)
    command_line.add_settings(parser)
    count = command_line.at_least(1)
    add = parser.add_argument
    add("--widths", type=count, nargs="+", default=[64, 128, 256], metavar="D", help="hidden sizes (default: 64 128 256)")
    add("--depths", type=count, nargs="+", default=[2, 4, 8], metavar="L", help="numbers of layers (default: 2 4 8)")
    add("--head-dim", type=count, default=16, metavar="C", help="size of a head (default: %(default)s)")
    add("--optimizers", nargs="+", default=["adamw", "muon"], choices=["adamw", "muon"], help="(default: adamw muon)")
    add("--only-scaled", action="store_true", help="without the runs that do not use model.scaling")
    add("--steps", type=count, default=200, metavar="N", help="of a run (default: %(default)s)")
    add("--seeds", type=count, default=1, metavar="N", help="(default: %(default)s)")
    add("--lr", type=float, default=2**-7, metavar="LR", help="where the search begins (default: %(default)s)")
    add("--output", type=Path, default=Path("lr_transfer"), metavar="FOLDER", help="(default: %(default)s)")
    return parser


class Runs:
    """Trains models, and keeps what each run ended with in a file."""

    def __init__(self, config: Config, parts: Parts, options: argparse.Namespace):
        self._config, self._data, self._options = config, parts.data, options
        self._file = options.output / "runs.jsonl"
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._losses = {tuple(row["key"]): row["loss"] for row in map(json.loads, lines)}
        self._engine = start_engine(EngineConfig(precision="fp32", compile="none"))
        heads = options.widths[0] // options.head_dim
        base = ModelConfig(
            hidden_size=options.widths[0], num_hidden_layers=options.depths[0], num_attention_heads=heads,
            qk_norm=config.model.qk_norm, tie_word_embeddings=config.model.tie_word_embeddings,
            zero_init_outputs=config.model.zero_init_outputs,
        )  # fmt: skip
        self._base = resolve_model(base, vocab_size=parts.model.vocab_size, sequence_length=config.data.sequence_length)

    def curve(self, optimizer: str, axis: str, size: int, scaled: bool, exponent: int) -> dict[int, float]:
        """Losses by log2 of the learning rate, with the lowest one inside if that was found."""
        losses = {each: self.loss(optimizer, axis, size, scaled, each) for each in (exponent - 1, exponent, exponent + 1)}
        while len(losses) < MOST_RUNS:
            best = min(losses, key=losses.get)
            missing = [each for each in (best - 1, best + 1) if each not in losses]
            if not missing:
                break
            losses[missing[0]] = self.loss(optimizer, axis, size, scaled, missing[0])
        return losses

    def curves_of_seeds(
        self, optimizer: str, axis: str, size: int, scaled: bool, exponents: list[int]
    ) -> list[dict[int, float]]:
        """As `curve`, of each seed."""
        return [{each: self._loss_of_seed(optimizer, axis, size, scaled, each, seed) for each in exponents}
                for seed in range(self._options.seeds)]  # fmt: skip

    def loss(self, optimizer: str, axis: str, size: int, scaled: bool, exponent: int) -> float:
        """Nats per token, mean over the last tenth of the steps and over seeds; infinite if a step was not finite."""
        seeds = self._options.seeds
        return sum(self._loss_of_seed(optimizer, axis, size, scaled, exponent, seed) for seed in range(seeds)) / seeds

    def _loss_of_seed(self, optimizer: str, axis: str, size: int, scaled: bool, exponent: int, seed: int) -> float:
        steps, batch = self._options.steps, self._config.batch.global_batch_size
        width, depth = (size, self._base.num_hidden_layers) if axis == "width" else (self._base.hidden_size, size)
        key = (optimizer, width, depth, scaled and (width, depth) != self._size_of_base(), exponent, steps, batch, seed)
        if key not in self._losses:
            began, seconds = time.process_time(), time.monotonic()
            loss = self._train(optimizer, resized(self._base, width, depth, scaled=scaled), 2.0**exponent, steps, batch, seed)
            self._losses[key] = loss
            row = {"key": key, "loss": loss, "cpu_seconds": time.process_time() - began}
            with self._file.open("a") as file:
                file.write(json.dumps(row) + "\n")
            way = "scaled" if scaled else "plain"
            print(f"  {optimizer} width {width} depth {depth} {way} lr 2^{exponent} seed {seed}: {loss:.4f}, "
                  f"{human_seconds(time.monotonic() - seconds)}", file=sys.stderr, flush=True)  # fmt: skip
        return self._losses[key]

    def _size_of_base(self) -> tuple[int, int]:
        return self._base.hidden_size, self._base.num_hidden_layers

    def _train(self, optimizer: str, model: ModelConfig, lr: float, steps: int, batch: int, seed: int) -> float:
        engine, settings = self._engine, dataclasses.replace(self._config.optimizer, name=optimizer)
        drawn_by = self._config.run.seed + seed
        engine.prepare(lambda: Transformer(model), lambda module: build_optimizer(module, settings), 1.0, drawn_by)
        schedule = dataclasses.replace(self._config.schedule, warmup_steps=steps // 10, decay_steps=None)
        last = []
        for step in range(1, steps + 1):
            window = [self._data.take((seed * steps + step - 1) * batch, batch)]
            result = train_step(engine, window, lr_at(step, schedule, lr, steps))
            if not result.applied:
                return math.inf
            if step > steps - steps // 10:
                last.append(float(result.loss_sum / result.tokens))
        return sum(last) / len(last)


def lowest(curve: dict[int, float]) -> float | None:
    """The place of the minimum of the parabola through the lowest point and its neighbours; None: it is at an edge."""
    best = min(curve, key=curve.get)
    left, middle, right = (curve.get(best + shift, math.inf) for shift in (-1, 0, 1))
    if math.isinf(left) or best - 1 not in curve or best + 1 not in curve:
        return None
    if math.isinf(right):  # it diverged: all that is known is the grid's point
        return float(best)
    return best + 0.5 * (left - right) / (left - 2 * middle + right)


def excess(curve: dict[int, float], log2_lr: float | None) -> float:
    """How much higher than its minimum the parabola of `lowest` is at log2_lr; NaN if it does not reach there."""
    best, bottom = min(curve, key=curve.get), lowest(curve)
    if log2_lr is None or bottom is None or math.isinf(curve[best + 1]) or not best - 1 <= log2_lr <= best + 1:
        return math.nan
    return 0.5 * (curve[best - 1] - 2 * curve[best] + curve[best + 1]) * (log2_lr - bottom) ** 2


def summary(found: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """For JSON."""
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    return {"machine": machine.facts(), "flags": flags, "models": found}


def label(row: dict[str, Any]) -> str:
    """Such as `adamw, width, with scaling`."""
    return f"{row['optimizer']}, {row['axis']}, {'with' if row['scaled'] else 'without'} scaling"


def rate(log2_lr: float | None) -> str:
    """The learning rate."""
    return "at an edge" if log2_lr is None else f"{2**log2_lr:.2e}"


def table(found: list[dict[str, Any]]) -> list[str]:
    """For each optimizer and axis, with and without scaling, the best learning rates, the factor by which they differ, and
    what the best rate of the first size costs the last one."""
    lines = []
    for name in dict.fromkeys(map(label, found)):
        rows = [row for row in found if label(row) == name]
        best = [row["best_log2_lr"] for row in rows]
        spread = "unknown" if None in best else f"{2 ** (max(best) - min(best)):.2f}"
        rates = ", ".join(f"{row['size']}: {rate(row['best_log2_lr'])} (loss {row['loss']:.4f})" for row in rows)
        curve = {int(key): loss for key, loss in rows[-1]["curve"].items()}
        lines.append(f"{name}: {rates}; largest / smallest {spread}; "
                     f"at the base's best rate the last loses {excess(curve, best[0]):.4f}")  # fmt: skip
    return lines


def draw(found: list[dict[str, Any]], output: Path) -> None:
    """Draws loss over learning rate, a row per optimizer and axis, without and with scaling side by side."""
    from matplotlib.figure import Figure

    from pretrain.report.plot import COLORS, save

    kinds = list(dict.fromkeys((row["optimizer"], row["axis"]) for row in found))
    ways = sorted({row["scaled"] for row in found})
    figure = Figure(figsize=(4.5 * len(ways), 2.8 * len(kinds)), dpi=130, layout="constrained")
    for axes_of_kind, kind in zip(
        figure.subplots(len(kinds), len(ways), sharex="row", sharey="row", squeeze=False), kinds, strict=True
    ):
        for axes, scaled in zip(axes_of_kind, ways, strict=True):
            rows = [row for row in found if (row["optimizer"], row["axis"], row["scaled"]) == (*kind, scaled)]
            for row, color in zip(rows, COLORS, strict=False):
                rates, losses = zip(*((2.0 ** int(key), loss) for key, loss in row["curve"].items()), strict=True)
                axes.plot(rates, losses, "o-", color=color, markersize=3, label=f"{kind[1]} {row['size']}")
                axes.plot(rates[losses.index(min(losses))], min(losses), "*", color=color, markersize=11)
            axes.set_xscale("log", base=2)
            axes.set_title(f"{kind[0]}, {'with' if scaled else 'without'} scaling", fontsize=10)
            axes.set(xlabel="learning rate", ylabel="loss, nats per token")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8, frameon=False)
    save(figure, output)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
