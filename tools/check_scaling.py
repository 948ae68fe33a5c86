"""Checks that activations and their changes in the first steps keep their size over widths and depths (a coordinate check).

    python tools/check_scaling.py --config configs/quickstart.yaml --output scaling.png

Trains small models of the configuration's kind for a few steps, with `model.scaling` and without: of several widths at the
smallest depth, and of several depths at the smallest width. The smallest one is the base. Data and optimizer are the
configuration's, with its learning rate and without warm-up. It compares, as root mean squares on the first batch, the outputs
of the last attention and the last feed-forward network (over widths), the sum of all branches, which is the residual stream
after the last block without the embedding (over depths), the residual stream, and the logits: at the start, and the change of
each over all steps. A learning rate transfers if these do not depend on the size (Yang et al. 2022, arXiv 2203.03466, section
4; over depth, Dey et al. 2025, arXiv 2505.01618). A slope is that of the straight line through the logarithms.

Theory gives each slope for large sizes. With scaling, all are 0, except where a sum of independent random terms is averaged:
logits at the start (a head of std 1/w reads w values) and the sum of branches at the start (d branches of std 1/d) have slopes
of -1/2. What is learned is alike in all terms of such a sum, and keeps its size. So changes are measured in models whose output
projections start at zero (`model.zero_init_outputs`): then no branch has a random part that would hide the learned one. Powers
in the rules are multiples of 1/2, so a slope less than 1/4 away is nearer to the right one than to any other; --bound is
stricter. The change of the logits over widths may lie between -1/2 and 0: the head's random part, which reads the changed
stream, shrinks with the root of the width, and the learned parts stay.

Small widths deviate: an update is of as many directions as the tokens of a step allow. While these are more than the width,
part of AdamW's update acts at random (a slope below 0), and Muon's reaches a growing part of the activations (above 0).

The check needs a learning rate that is not too high for the base: the theory is of first order in it. That the best learning
rate stays the same is for benchmarks/lr_transfer.py to show.

Prints the slopes and writes a picture of them. One process; seconds for each size up to width 256, minutes for 1,024 with Muon.

Exit status: 0 every slope with scaling is within --bound of what it should be; 1 one is not; 2 the command is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from pretrain.config import Config, EngineConfig, load
from pretrain.files import write_atomically
from pretrain.model.config import ModelConfig, resolve_model, shrink
from pretrain.model.scaling import resized
from pretrain.report.units import human_seconds
from pretrain.run import command_line

if TYPE_CHECKING:
    from pretrain.data.batches import Batch
    from pretrain.engines.base import Engine

FLAT, NOT_FLAT = 0, 1
SEQUENCES, LONGEST = 4, 128  # of a batch; tokens of each
QUANTITIES = {
    "width": ("attention", "feed-forward", "residual stream", "logits"),
    "depth": ("sum of branches", "residual stream", "logits"),
}
EXPECTED = {
    ("width", "logits", "start"): (-0.5, -0.5),
    ("width", "logits", "change"): (-0.5, 0.0),
    ("depth", "sum of branches", "start"): (-0.5, -0.5),
    ("depth", "residual stream", "start"): (-0.5, 0.0),
}
"""Lowest and highest slope with scaling, where it is not 0. The residual stream at the start is the embedding, of slope 0, and
the sum of branches."""


class Row(NamedTuple):
    """One model."""

    axis: str
    """width or depth"""
    size: int
    scaled: bool
    start: dict[str, float]
    """Root mean squares by quantity before the first step, from random output projections."""
    change: dict[str, float]
    """Of the difference that all steps make, from output projections of zero."""


class Slope(NamedTuple):
    """How a quantity grows with the size."""

    axis: str
    quantity: str
    when: str
    """start or change"""
    scaled: float
    plain: float

    @property
    def expected(self) -> tuple[float, float]:
        """Lowest and highest slope with scaling."""
        return EXPECTED.get((self.axis, self.quantity, self.when), (0.0, 0.0))

    def is_as_expected(self, bound: float) -> bool:
        """Whether the slope with scaling is at most `bound` outside."""
        low, high = self.expected
        return low - bound <= self.scaled <= high + bound


def main(argv: list[str]) -> int:
    """-> exit status."""
    parser = make_parser()
    options, words = command_line.parse_with_settings(parser, argv)
    check_flags(parser, options)
    config = load(words, world_size=None, program="tools/check_scaling.py")
    if options.optimizer:
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name=options.optimizer))
    rows = measure(config, options)
    slopes = slopes_of(rows)
    for line in table(slopes, options.bound):
        print(line)
    draw(rows, options.output)
    if options.json:
        write_atomically(options.json, json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    bad = [slope for slope in slopes if not slope.is_as_expected(options.bound)]
    print(f"{len(bad)} of {len(slopes)} slopes with scaling are more than {options.bound:g} from where they should be"
          f"; picture: {options.output}")  # fmt: skip
    return NOT_FLAT if bad else FLAT


# ---------------------------------------------------------------- flags


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = command_line.make_parser(__doc__)
    command_line.add_settings(parser)
    add, whole = parser.add_argument, command_line.at_least(1)
    add("--widths", type=whole, nargs="+", default=[64, 128, 256, 512], metavar="D", help="hidden sizes, multiples of 32, "
        "smallest first (default: 64 128 256 512)")  # fmt: skip
    add("--depths", type=whole, nargs="+", default=[2, 4, 8, 16], metavar="L", help="numbers of layers, smallest first "
        "(default: 2 4 8 16)")  # fmt: skip
    add("--optimizer", choices=["adamw", "muon"], help="in place of optimizer.name")
    add("--steps", type=whole, default=8, metavar="N", help="(default: %(default)s)")
    add("--bound", type=float, default=0.2, metavar="X", help="largest deviation of a slope (default: %(default)s)")
    add("--output", type=Path, default=Path("scaling.png"), metavar="PNG", help="(default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all root mean squares there")
    return parser


def check_flags(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program with status 2 for sizes that cannot be compared."""
    for flag, sizes in (("--widths", options.widths), ("--depths", options.depths)):
        if sizes != sorted(set(sizes)):
            parser.error(f"{flag}: got {' '.join(map(str, sizes))}, each must be larger than the one before")
    if len(options.widths) + len(options.depths) < 3:
        parser.error("--widths, --depths: one of them needs two or more sizes")
    if wrong := [width for width in options.widths if width % 32]:
        parser.error(f"--widths: got {wrong[0]}, must be a multiple of 32, since heads have 16 dimensions in pairs")


# ---------------------------------------------------------------- measuring


def measure(config: Config, options: argparse.Namespace) -> list[Row]:
    """Trains every model. Raises DataError and ConfigError of the configuration's data."""
    from pretrain.engines.start import start_engine
    from pretrain.run.parts import open_parts

    length = min(config.data.sequence_length, LONGEST)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=length, block_length=None))
    parts = open_parts(config)
    batches = [parts.data.take(step * SEQUENCES, SEQUENCES) for step in range(options.steps)]
    small = resolve_model(shrink(config.model, length), vocab_size=parts.model.vocab_size, sequence_length=length)
    base = resized(small, options.widths[0], options.depths[0], scaled=False)
    sizes = [("width", width, width, base.num_hidden_layers) for width in options.widths if len(options.widths) > 1]
    sizes += [("depth", depth, base.hidden_size, depth) for depth in options.depths if len(options.depths) > 1]
    jobs = [(axis, size, resized(base, width, depth, scaled=scaled), scaled)
            for axis, size, width, depth in sizes for scaled in (True, False)]  # fmt: skip
    engine = start_engine(EngineConfig(precision="fp32", compile="none"))
    rows, work, began = [], [job[2].num_hidden_layers * job[2].hidden_size ** 2 for job in jobs], time.monotonic()
    for number, (axis, size, model, scaled) in enumerate(jobs):
        rows.append(Row(axis, size, scaled, *coordinates(engine, config, model, batches)))
        seconds, done = time.monotonic() - began, sum(work[: number + 1])
        left = human_seconds(seconds * (sum(work) - done) / done)
        print(f"{axis} {size}, {'with' if scaled else 'without'} scaling: {human_seconds(seconds)}, {left} left",
              file=sys.stderr, flush=True)  # fmt: skip
    engine.close()
    return rows


def coordinates(
    engine: Engine, config: Config, model: ModelConfig, batches: list[Batch]
) -> tuple[dict[str, float], dict[str, float]]:
    """Root mean squares at the start, and of the change over one step for each batch, on the first batch."""
    from pretrain.model.transformer import Transformer
    from pretrain.optim.optimizer import build_optimizer
    from pretrain.train import train_step

    optimizer = config.optimizer

    def begin(*, zero: bool) -> dict[str, Any]:
        drawn = dataclasses.replace(model, zero_init_outputs=zero)
        engine.prepare(
            lambda: Transformer(drawn), lambda built: build_optimizer(built, optimizer), optimizer.grad_clip, config.run.seed
        )
        return activations(engine, batches[0])

    start, before = begin(zero=False), begin(zero=True)
    for batch in batches:
        train_step(engine, [engine.to_device(batch)], optimizer.lr)
    after = activations(engine, batches[0])
    return root_mean_squares(start), root_mean_squares({name: after[name] - before[name] for name in before})


def root_mean_squares(values: dict[str, Any]) -> dict[str, float]:
    """Of each tensor."""
    return {name: float(value.square().mean().sqrt()) for name, value in values.items()}


def activations(engine: Engine, batch: Batch) -> dict[str, Any]:
    """By quantity, (B, T, ...) in fp32."""
    import torch

    found, last = {}, engine.model.model.layers[-1]
    modules = {"attention": last.self_attn, "feed-forward": last.mlp, "residual stream": last}
    modules["embedding"] = engine.model.model.embed_tokens

    def keep(name: str):
        return lambda _, __, out: found.__setitem__(name, (out[0] if isinstance(out, tuple) else out).float().clone())

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    with torch.no_grad():
        tokens_BT, _, documents_BT = engine.to_device(batch).inputs
        found["logits"] = engine.model(tokens_BT, documents_BT=documents_BT).float()
    for hook in hooks:
        hook.remove()
    found["sum of branches"] = found["residual stream"] - found.pop("embedding")
    return found


# ---------------------------------------------------------------- judging


def slopes_of(rows: list[Row]) -> list[Slope]:
    """One for each axis, quantity, and start or change."""
    found = []
    for axis, quantities in QUANTITIES.items():
        of_axis = [row for row in rows if row.axis == axis]
        for quantity in quantities if of_axis else ():
            for when in ("start", "change"):
                scaled, plain = (
                    slope([(row.size, getattr(row, when)[quantity]) for row in of_axis if row.scaled == way])
                    for way in (True, False)
                )
                found.append(Slope(axis, quantity, when, scaled, plain))
    return found


def slope(points: list[tuple[int, float]]) -> float:
    """Of the straight line through the logarithms; NaN if a value is not finite."""
    sizes, values = np.array(points, dtype=float).T
    if not (np.isfinite(values) & (values > 0)).all():
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def table(slopes: list[Slope], bound: float) -> list[str]:
    """Lines of a table."""
    lines = [f"{'over':7}{'quantity':17}{'when':8}{'without':>9}{'with scaling':>14}{'should be':>14}"]
    for each in slopes:
        low, high = each.expected
        expected = f"{low:.1f}" if low == high else f"{low:.1f} to {high:.1f}"
        lines.append(
            f"{each.axis:7}{each.quantity:17}{each.when:8}{each.plain:9.2f}{each.scaled:14.2f}{expected:>14}"
            f"{'' if each.is_as_expected(bound) else '  no'}"
        )
    return lines


def draw(rows: list[Row], output: Path) -> None:
    """Draws root mean squares over sizes: a row per axis; start and change, without and with scaling."""
    from matplotlib.figure import Figure

    from pretrain.report.plot import COLORS, save

    axes_used = [axis for axis in QUANTITIES if any(row.axis == axis for row in rows)]
    figure = Figure(figsize=(12, 3 * len(axes_used)), dpi=130, layout="constrained")
    panels = [(when, scaled) for when in ("start", "change") for scaled in (False, True)]
    for line, axis in zip(figure.subplots(len(axes_used), 4, sharey="row", squeeze=False), axes_used, strict=True):
        for panel, (when, scaled) in zip(line, panels, strict=True):
            shown = [row for row in rows if row.axis == axis and row.scaled == scaled]
            for quantity, color in zip(QUANTITIES[axis], COLORS, strict=False):
                values = [getattr(row, when)[quantity] for row in shown]
                panel.plot([row.size for row in shown], values, "o-", color=color, markersize=3, label=quantity)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_title(f"{when}, {'with' if scaled else 'without'} scaling", fontsize=9)
            panel.set_xlabel(axis)
            panel.grid(alpha=0.3)
        line[0].set_ylabel("root mean square")
        line[0].legend(fontsize=7, frameon=False)
    save(figure, output)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
