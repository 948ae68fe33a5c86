"""Draws a search for a learning rate: the loss at the end of each probe, the best rate and its interval, where it diverges."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from .plot import ALARM, COLORS, save

if TYPE_CHECKING:
    from pretrain.optim.lr_search import Answer, Losses


def plot_lr(losses: Losses, answer: Answer, title: str, output: Path) -> None:
    """Draws the probes, one line per repeat, and what they say into the PNG file `output`, atomically. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    lrs = [row.lr for row in answer.rows]
    for repeat in sorted({repeat for _, repeat in losses}):
        points = sorted((lr, loss) for (lr, each), loss in losses.items() if each == repeat and math.isfinite(loss))
        color = COLORS[repeat % len(COLORS)]
        axes.plot(*zip(*points, strict=True) if points else ([], []), "o-", color=color, linewidth=1, markersize=4, alpha=0.8,
                  label=f"repeat {repeat + 1}")  # fmt: skip
    mean = [(row.lr, row.loss) for row in answer.rows if row.repeats > 1 and math.isfinite(row.loss)]
    if mean:
        axes.plot(*zip(*mean, strict=True), color="black", linewidth=2, label="mean")
    if answer.lr:
        axes.axvspan(*answer.interval, color=COLORS[2], alpha=0.2, label="80 % interval of the best rate")
        axes.axvline(answer.lr, color=COLORS[2], linewidth=1.5, label=f"best of such probes: {answer.lr:g}")
    if answer.diverges_from:
        axes.axvspan(answer.diverges_from, 1.3 * max(lrs), color=ALARM, alpha=0.2, label="diverges")
    axes.set_xscale("log")
    axes.set(xlim=(min(lrs) / 1.3, 1.3 * max(lrs)), title=title)
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("loss at the end of a probe, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    save(figure, output)
