"""Draws a ladder: final losses against FLOPs, the law with its band, the predicted run, and the losses over learning rates."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.report.plot import ALARM, COLORS, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_ladder(said: dict[str, Any], output: Path) -> None:
    """Draws what `tools/plan_ladder.py --fit` says into the PNG file `output`, atomically. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.2), dpi=150, layout="constrained")
    law, rates = figure.subplots(1, 2, width_ratios=[3, 2])
    _draw_law(law, said)
    _draw_rates(rates, said)
    save(figure, output)


def _draw_law(axes: Axes, said: dict[str, Any]) -> None:
    flops, loss, low, high = ([each[key] for each in said["curve"]] for key in ("flops", "loss", "low", "high"))
    axes.fill_between(flops, low, high, color=COLORS[0], alpha=0.15, label="80 % of runs at the best lr")
    axes.plot(flops, loss, color=COLORS[0], label="L = E + A / C^a")
    for number, rung in enumerate(said["rungs"]):
        points = [value for each in rung["runs"] for value in each["losses"]]
        axes.plot([rung["flops"]] * len(points), points, ".", color="#999999", label=None if number else "runs, at all lr")
    for used, marker, title in ((True, "o", "rungs, tuned"), (False, "s", "other tokens per parameter, tuned")):
        chosen = [rung for rung in said["rungs"] if rung["used"] is used]
        if chosen:
            axes.plot(
                [each["flops"] for each in chosen], [each["loss"] for each in chosen], marker, color=COLORS[0], label=title
            )
    predicted = said["loss"]
    reach = [[predicted["loss"] - predicted["low"]], [predicted["high"] - predicted["loss"]]]
    axes.errorbar([said["planned"]["flops"]], [predicted["loss"]], reach, fmt="D", color=ALARM, capsize=4, label=(
        f"planned run: {predicted['loss']:.3f} ({predicted['low']:.3f} to {predicted['high']:.3f})"))  # fmt: skip
    bottom = min(low)
    top = max(rung["loss"] for rung in said["rungs"])
    axes.set(xscale="log", ylim=(bottom - 0.1 * (top - bottom), top + 0.2 * (top - bottom)))
    axes.set_xlabel("FLOPs of a run")
    axes.set_ylabel("final validation loss, nats per token")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)


def _draw_rates(axes: Axes, said: dict[str, Any]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for rung, color in zip(said["rungs"], COLORS * 4, strict=False):
        rates = [each["lr"] for each in rung["runs"]]
        means = [sum(each["losses"]) / len(each["losses"]) - rung["loss"] for each in rung["runs"]]
        axes.plot(rates, means, "o-", color=color, label=f"width {rung['width']}, {rung['tokens']:.2g} tokens")
        if rung["best_lr"]:
            axes.axvline(rung["best_lr"], color=color, linestyle=":", linewidth=1)
    if (lr := said["lr"]) is not None and math.isfinite(lr["loss"]):
        axes.axvspan(lr["low"], lr["high"], color=ALARM, alpha=0.08)
        axes.axvline(lr["loss"], color=ALARM, label=f"planned run: {lr['loss']:.2e}")
    axes.set(xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss above the rung's best, nats per token")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
