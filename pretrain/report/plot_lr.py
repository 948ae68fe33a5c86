"""Draws a search for a learning rate: the loss at the end of each probe, the best rate and its interval, where it diverges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .plot import ALARM, COLORS, save


def plot_lr(found: dict[str, Any], title: str, output: Path) -> None:
    """Draws the content of find_lr.json, one line per repeat, into the PNG file `output`, atomically. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    stable = [probe for probe in found["probes"] if not probe["diverged"]]
    for repeat in sorted({probe["repeat"] for probe in stable}):
        points = sorted((probe["lr"], probe["val_loss"]) for probe in stable if probe["repeat"] == repeat)
        color = COLORS[repeat % len(COLORS)]
        axes.plot(*zip(*points, strict=True), "o-", color=color, linewidth=1, markersize=4, label=f"repeat {repeat + 1}")
    if mean := [(row["lr"], row["loss"]) for row in found["rows"] if row["repeats"] > 1 and row["loss"] is not None]:
        axes.plot(*zip(*mean, strict=True), color="black", linewidth=2, label="mean")
    if found["lr"]:
        axes.axvspan(*found["interval"], color=COLORS[2], alpha=0.2, label="80 % interval of the best rate")
        axes.axvline(found["lr"], color=COLORS[2], linewidth=1.5, label=f"best of such probes: {found['lr']:g}")
    lrs = [row["lr"] for row in found["rows"]]
    left, right = min(lrs) / 1.3, 1.3 * max(lrs)
    if found["diverges_from"]:
        axes.axvspan(found["diverges_from"], right, color=ALARM, alpha=0.2, label="diverges")
    axes.set_xscale("log")
    axes.set(xlim=(left, right), title=title)
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("loss at the end of a probe, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    save(figure, output)
