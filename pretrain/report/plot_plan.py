"""Draws a plan: the memory of a rank for each way to run it, as stacked bars, with what the device has as a line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plot import ALARM, COLORS, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "moments": "moments and master weights",
    "activations": "activations",
    "working": "logits or a block at work, buffers of the engine",
    "margins": "fragmentation; driver, CUDA context, NCCL",
}


def plot_plan(plan: dict[str, Any], rows: list[tuple[str, dict[str, Any]]], output: Path) -> None:
    """Draws (name, way) in `rows` of a plan into the PNG file `output`, atomically. Raises OSError."""
    from matplotlib.figure import Figure

    limit, gpus = plan["cluster"]["memory_gib"], plan["cluster"]["gpus"]
    bars = [_gib(row["memory"]) for _, row in rows]
    figure = Figure(figsize=(11, 1.9 + 0.3 * len(rows)), dpi=150, layout="constrained")
    axes = figure.subplots()
    right = min(2 * limit, 1.2 * max(limit, *(sum(parts.values()) for parts in bars)))
    for number, parts in enumerate(bars):
        left = 0.0
        for (part, title), color in zip(_PARTS.items(), (*COLORS[:5], "#c8c8c8"), strict=True):
            axes.barh(number, parts[part], left=left, height=0.78, color=color, label=None if number else title)
            left += parts[part]
        _write_total(axes, number, left, right, limit)
    axes.axvline(limit, color=ALARM, linewidth=1.5, label=f"{plan['cluster']['gpu']}: {limit:g} GiB")
    names = [_title(name, row) for name, row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.set(xlim=(0, right), ylim=(len(rows) - 0.4, -0.6))
    axes.set_xlabel(f"GiB of one of {gpus} ranks at the peak, with the largest micro-batch that fits (estimates)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    save(figure, output)


def _title(name: str, row: dict[str, Any]) -> str:
    kept = row["activation_checkpointing"]
    way = row["plan"] + ("" if kept == "none" else f", {kept}")
    return f"{name if name == 'as configured' else way}: {row['micro_batch']} x {row['accumulation']}"


def _write_total(axes: Axes, number: int, total: float, right: float, limit: float) -> None:
    """The sum, behind its bar, or at the right edge of one that is longer than the picture."""
    over = total > limit
    beyond = total > 0.87 * right
    x, align = (0.995 * right, "right") if beyond else (total + 0.008 * right, "left")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.9}
    text, color = f"{total:,.0f}{': does not fit' if over else ''}", ALARM if over else "black"
    axes.text(x, number, text, va="center", ha=align, fontsize=8, color=color, bbox=box, zorder=4)


def _gib(memory: dict[str, float]) -> dict[str, float]:
    parts = {key: memory[key] / 2**30 for key in ("weights", "gradients", "moments", "activations")}
    parts["working"] = memory["peak"] / 2**30 - sum(parts.values())
    return {**parts, "margins": memory["needed_gib"] - memory["peak"] / 2**30}
