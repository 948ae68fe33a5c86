"""Draws the loss curves of finished, running or broken runs, from their metrics.jsonl alone.

Also draws curves from elsewhere. Knows nothing of checkpoints, models or devices; imports matplotlib only to draw.
"""

from __future__ import annotations

import io
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from pretrain import files
from pretrain.report.expected import KEYS
from pretrain.report.history import TASK_PREFIX, task_names
from pretrain.report.records import FILE_NAME, RecordsError, iter_records, merge_equal
from pretrain.report.units import SCALES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

XAxis = Literal["tokens", "step", "hours"]
AXIS_TITLES = {
    "tokens": "training tokens",
    "step": "step",
    "hours": "hours of training (without validation, saving and interruptions)",
}
REFERENCE_TITLES = {
    "uniform": "uniform: ln V",
    "unigram": "unigram entropy",
    "bigram": "bigram entropy",
    "floor": "floor: best possible",
}
# The first ones are from Okabe & Ito, whose colors the color-blind can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#5C4B3B")
ALARM = "#c00000"
LEAST_SPAN = 0.5  # nats that the vertical axis spans at least: noise must not look like a trend
BAND = KEYS[1:]
SOURCE_PREFIX = "loss/"  # of the metrics of training sources
LABEL_GAP = 0.042  # between two labels at the right edge, as a fraction of the height of the upper panel


@dataclass
class Curves:
    """The losses of one run; NaN where they were not finite."""

    name: str
    step: np.ndarray  # (N,) logging steps
    tokens: np.ndarray  # (N,) valid tokens consumed
    hours: np.ndarray  # (N,) train_hours: spent in steps, over all starts
    loss: np.ndarray  # (N,) nats per token
    val_step: np.ndarray = field(default_factory=lambda: np.empty(0))  # (M,)
    val_loss: np.ndarray = field(default_factory=lambda: np.empty(0))  # (M,) nats per token
    val_low: np.ndarray = field(default_factory=lambda: np.empty(0))  # (M,) of the band that a ladder expects; NaN without
    val_high: np.ndarray = field(default_factory=lambda: np.empty(0))  # (M,)
    reference_lines: dict[str, float] = field(default_factory=dict)  # nats per token
    sources: dict[str, np.ndarray] = field(default_factory=dict)  # (N,) loss of each training source, NaN where it was not read
    stages: list[float] = field(default_factory=list)  # steps after which a stage began
    tasks: list[dict] = field(default_factory=list)  # records of the tasks
    smoothed: np.ndarray = field(init=False)  # (N,) the loss, smoothed over a sixtieth of the run

    def __post_init__(self) -> None:
        self.smoothed = smooth(self.loss, max(2, len(self.loss) // 120))

    def x(self, axis: XAxis) -> np.ndarray:
        """(N,) x values of the training points."""
        return {"tokens": self.tokens, "step": self.step, "hours": self.hours}[axis]

    def val_x(self, axis: XAxis) -> np.ndarray:
        """(M,) x values of the validation points, interpolated between training points; all axes start at 0."""
        return np.interp(self.val_step, np.r_[0.0, self.step], np.r_[0.0, self.x(axis)])


def read_curves(directory: Path) -> Curves:
    """The curves in <directory>/metrics.jsonl. Raises RecordsError when there is no logging step or the file is damaged."""
    train = {key: array("d") for key in ("step", "tokens", "train_hours", "loss")}
    valid = {key: array("d") for key in ("step", "val_loss", *BAND)}
    references: dict[str, float] = {}
    sources: dict[str, array] = {}
    stages, tasks = [], []
    for record in iter_records(directory):  # one at a time: a file may have millions
        references = references or record.get("reference_lines", {})
        for columns, key in ((train, "loss"), (valid, "val_loss")):
            if key in record:
                for name, column in columns.items():
                    column.append(_finite(record.get(name)))
        if "loss" in record:
            _add_sources(sources, record, len(train["loss"]))
        if "stage" in record:
            stages.append(record["step"])
        if "task_accuracy" in record:
            tasks.append(record)
    if not train["loss"] and (directory / FILE_NAME).exists():
        raise RecordsError(f"{directory / FILE_NAME}: no logging step yet (log.every_steps says when the first one comes).")
    if not train["loss"]:
        raise RecordsError(
            f"{directory}: has no {FILE_NAME}. Give the folder of a run, such as runs/NAME, whose log.sinks include jsonl."
        )
    return Curves(
        name=directory.resolve().name,
        step=np.array(train["step"]),
        tokens=np.array(train["tokens"]),
        hours=np.array(train["train_hours"]),
        loss=np.array(train["loss"]),
        val_step=np.array(valid["step"]),
        val_loss=np.array(valid["val_loss"]),
        val_low=np.array(valid[BAND[0]]),
        val_high=np.array(valid[BAND[1]]),
        reference_lines=merge_equal({name: nats for name, nats in references.items() if math.isfinite(nats)}),
        sources={name: np.array(losses) for name, losses in sources.items()},
        stages=stages,
        tasks=tasks,
    )


def _add_sources(sources: dict[str, array], record: dict, count: int) -> None:
    """Adds the losses of the sources in the logging line number `count` to their columns; NaN for those that it lacks."""
    for key, value in record.items():
        if key.startswith(SOURCE_PREFIX):
            column = sources.setdefault(key.removeprefix(SOURCE_PREFIX), array("d"))
            column.extend([math.nan] * (count - 1 - len(column)))
            column.append(_finite(value))
    for column in sources.values():
        column.extend([math.nan] * (count - len(column)))


def smooth(values: np.ndarray, radius: int) -> np.ndarray:
    """(N,) the mean of the medians around each point, which neither lags nor follows a single spike. Skips NaN.

    Windows reach `radius` to both sides, less near the start, where the loss falls too steeply to look ahead on one side only.
    In a long curve they are centered on eight points per radius, with straight lines between.
    """
    indices = np.arange(len(values))
    chosen = np.unique(np.r_[indices[: 2 * radius], indices[:: max(1, radius // 8)], indices[-1:]])
    for average in (np.median, np.mean):
        averages = np.full(len(chosen), np.nan)
        for place, index in enumerate(chosen):
            window = values[max(0, index - radius) : index + min(radius, index) + 1]
            window = window[np.isfinite(window)]
            if len(window):
                averages[place] = average(window)
        values = np.interp(indices, chosen, averages)
    return values


def plot_runs(directories: Sequence[Path], output: Path, x: XAxis = "tokens") -> None:
    """Draws runs into the PNG file `output`, atomically. Raises RecordsError for a run that cannot be drawn, OSError."""
    save(draw([read_curves(Path(directory)) for directory in directories], x), output)


def save(figure: Figure, output: Path) -> None:
    """Writes a figure as a PNG file, atomically; makes its folder. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    output.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(output, image.getvalue())


def draw(runs: Sequence[Curves], x: XAxis) -> Figure:
    """All runs in one panel; below it, the sources and the tasks of a single run. Raises RecordsError for a run without such
    an x."""
    from matplotlib.figure import Figure

    more = [_draw_sources] * (len(runs[0].sources) > 1) + [_draw_tasks] * bool(runs[0].tasks) if len(runs) == 1 else []
    figure = Figure(figsize=(11, 6.2 + 3.6 * len(more)), dpi=150, layout="constrained")
    axes, *below = figure.subplots(1 + len(more), height_ratios=[6.2, *[3.6] * len(more)], squeeze=False)[:, 0]
    draw_curves(axes, runs, x)
    [axes, *below][-1].set_xlabel(AXIS_TITLES[x])
    for draw_panel, panel in zip(more, below, strict=True):
        draw_panel(panel, runs[0], x)
    axes.set_title(runs[0].name if len(runs) == 1 else "", loc="left", fontweight="bold")
    return figure


def _draw_sources(axes: Axes, run: Curves, x: XAxis) -> None:
    """Draws the smoothed loss of each source."""
    chosen = sorted(run.sources, key=lambda name: -np.isfinite(run.sources[name]).sum())[: len(COLORS)]
    radius, labels, values = max(2, len(run.loss) // 120), [], []
    for name, color in zip(chosen, COLORS, strict=False):
        known = np.isfinite(run.sources[name])
        smoothed = smooth(run.sources[name][known], radius) if known.sum() >= 40 else run.sources[name][known]
        breaks = np.flatnonzero(np.diff(np.flatnonzero(known)) > max(5, len(known) // 20)) + 1  # stages that do not read it
        axes.plot(*(np.insert(each, breaks, math.nan) for each in (run.x(x)[known], smoothed)), color=color, linewidth=1.5)
        values += smoothed.tolist()
        if len(smoothed):
            labels.append((float(smoothed[-1]), f"{name} {smoothed[-1]:.3f}", color))
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = max(0.05 * (high - low), (LEAST_SPAN - (high - low)) / 2)
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, float(run.x(x)[-1]) * 1.005)
    _write_labels(axes, labels, low - margin, high + margin, 3.6)
    _mark_stages(axes, run, x)
    _decorate(axes, [run], x)
    few = len(chosen) < len(run.sources)
    shown = f"the {len(chosen)} of {len(run.sources)} sources with the most values" if few else "each source"
    axes.set_title(f"training loss of {shown}", loc="left", fontsize=10)


def _draw_tasks(axes: Axes, run: Curves, x: XAxis) -> None:
    """Draws the share of right answers of each task, and as a dashed line of its color that of guessing."""
    steps = np.array([record["step"] for record in run.tasks], dtype=float)
    places = np.interp(steps, np.r_[0.0, run.step], np.r_[0.0, run.x(x)])
    names, labels = task_names(run.tasks[-1]), []
    for name, color in zip(["", *names], ("#222222", *COLORS), strict=False):
        prefix = f"{TASK_PREFIX}{name}/" if name else "task_"
        values = np.array([_finite(record.get(f"{prefix}accuracy")) for record in run.tasks])
        chance = run.tasks[-1][f"{prefix}chance"]
        axes.plot(places, values, "o-", color=color, markersize=4, linewidth=1.2 if name else 2.2)
        if chance and name:
            axes.axhline(chance, color=color, linewidth=0.9, linestyle=(0, (5, 4)), zorder=1)
        shown = f"{name or 'mean'} {values[-1]:.1%}" + (f", guessing {chance:.1%}" if chance else "")
        labels.append((values[-1] if math.isfinite(values[-1]) else 0.0, shown, color))
    axes.set_ylim(0, 1)
    axes.set_xlim(0, float(run.x(x)[-1]) * 1.005)
    _write_labels(axes, labels, 0.0, 1.0, 3.6)
    _mark_stages(axes, run, x)
    _decorate(axes, [run], x)
    axes.set_ylabel("right answers")
    few = f" the first {len(COLORS)} of {len(names)}" if len(names) > len(COLORS) else ""
    axes.set_title(f"tasks:{few} right answers; dashed: guessing", loc="left", fontsize=10)


def _mark_stages(axes: Axes, run: Curves, x: XAxis) -> None:
    """Draws a line where each stage begins."""
    for place in np.interp(run.stages, np.r_[0.0, run.step], np.r_[0.0, run.x(x)]):
        axes.axvline(place, color="#bbbbbb", linewidth=0.9, linestyle=(0, (1, 3)), zorder=1)


def draw_panels(curves: Sequence[Curves], x_title: str) -> Figure:
    """One panel per curve, with its name as title, one below another over the same x axis, which shows `step`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6 * len(curves) + 0.6), dpi=150, layout="constrained")
    panels = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for axes, each in zip(panels, curves, strict=True):
        draw_curves(axes, [each], "step")
        axes.set_ylabel("loss")  # in the unit that the name says
        axes.set_title(each.name, loc="left", fontsize=10)
    first, last = min(each.step[0] for each in curves), max(each.step[-1] for each in curves)
    margin = 0.01 * (last - first) or 1.0
    panels[-1].set_xlim(first - margin, last + margin)  # a log may start at any step
    panels[-1].set_xlabel(x_title)
    return figure


def draw_curves(axes: Axes, runs: Sequence[Curves], x: XAxis) -> None:
    """Draws training loss (raw and smoothed), validation points and reference lines.

    A second axis shows steps if every step of all runs takes the same number of tokens. Raises RecordsError for a run without
    such an x.
    """
    for run in runs:
        if not np.isfinite(run.x(x)).all():
            missing = "train_hours" if x == "hours" else x
            raise RecordsError(f"{run.name}: its records have no {missing}; choose another horizontal axis.")
    low, high = _loss_range(runs)
    labels: list[tuple[float, str, str]] = []  # (y, text, color) at the right edge
    for index, run in enumerate(runs):
        _mark_stages(axes, run, x)
        labels.append(_draw_run(axes, run, COLORS[index % len(COLORS)], x, len(runs) > 1))
    for label in _reference_labels(runs):
        axes.axhline(label[0], color="#8a8a8a", linewidth=0.9, linestyle=(0, (5, 4)), zorder=1)
        labels.append(label)
    axes.set_ylim(low, high)
    axes.set_xlim(0, max(float(run.x(x)[-1]) for run in runs) * 1.005)
    _write_labels(axes, [(y if math.isfinite(y) else high, text, color) for y, text, color in labels], low, high)
    _decorate(axes, runs, x)


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan


def _draw_run(axes: Axes, run: Curves, color: str, x: XAxis, several: bool) -> tuple[float, str, str]:
    """Draws the curve and points of one run; returns the label of its end, (y, text, color)."""
    train_x = run.x(x)
    many = len(run.loss) >= 40
    smoothed = run.smoothed if many else run.loss
    if many:
        axes.plot(train_x, run.loss, color=color, alpha=0.22, linewidth=0.8, zorder=2)
    axes.plot(train_x, smoothed, color=color, linewidth=1.8, zorder=3)
    if np.isfinite(run.val_low).any():
        axes.fill_between(
            run.val_x(x), run.val_low, run.val_high, color=color, alpha=0.12, linewidth=0, zorder=1, label="expected"
        )
    bad_x = train_x[~np.isfinite(run.loss)]
    if len(bad_x):
        axes.annotate(
            "not finite",
            (bad_x[0], 0.965),
            xycoords=("data", "axes fraction"),
            color=ALARM,
            fontsize=8,
            va="top",
            ha="center",
            zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    for bad in bad_x:
        axes.axvline(bad, ymin=0.97, color=ALARM, linewidth=1.5, zorder=4)
    finite = smoothed[np.isfinite(smoothed)]
    text = f"{run.name if several else 'train'} {finite[-1]:.3f}" if len(finite) else f"{run.name}: never finite"
    if len(run.val_loss):
        axes.plot(
            run.val_x(x), run.val_loss, "o", color=color, markersize=5, markeredgecolor="white", markeredgewidth=0.8, zorder=5
        )
        text += f"{',' if several else '; validation'} • {run.val_loss[-1]:.3f}"
    return (float(finite[-1]) if len(finite) else math.nan, text, color)


def _loss_range(runs: Sequence[Curves]) -> tuple[float, float]:
    """(low, high) of the vertical axis, which shows all but the spikes of the raw losses."""
    return value_range(*(values for run in runs for values in (run.smoothed, run.val_loss, [*run.reference_lines.values()])))


def value_range(*values: Sequence[float]) -> tuple[float, float]:
    """(low, high) of a vertical axis that shows losses, with margins; those that are not finite do not count."""
    seen = np.concatenate([np.empty(0), *values])
    seen = seen[np.isfinite(seen)]
    if not len(seen):
        return 0.0, 1.0
    low, high = float(seen.min()), float(seen.max())
    margin = max(0.05 * (high - low), (LEAST_SPAN - (high - low)) / 2)
    return low - margin, high + margin


def _reference_labels(runs: Sequence[Curves]) -> list[tuple[float, str, str]]:
    """(y, text, color) of each different reference line; the text names its runs if other runs have another value."""
    users: dict[tuple[str, float], list[tuple[float, str]]] = {}
    for run in runs:
        for name, nats in run.reference_lines.items():
            users.setdefault((name, round(nats, 6)), []).append((nats, run.name))
    labels = []
    for (name, _), same in users.items():
        nats, names = same[0][0], [name for _, name in same]
        whose = "" if len(names) == len(runs) else f" ({', '.join(names)})"
        labels.append((nats, f"{REFERENCE_TITLES.get(name, name)} {nats:.3f}{whose}", "#5a5a5a"))
    return labels


def _write_labels(axes: Axes, labels: list[tuple[float, str, str]], low: float, high: float, inches: float = 6.2) -> None:
    """Writes each label at the right edge beside its line, apart where they would overlap. inches: height of the panel."""
    gap = LABEL_GAP * 6.2 / inches
    placed: list[float] = []
    for wanted, _, _ in sorted(labels):
        height = (wanted - low) / (high - low)
        placed.append(max(height, placed[-1] + gap) if placed else max(height, 0.0))
    overflow = max(0.0, placed[-1] - 1.0) if placed else 0.0
    for index in range(len(placed) - 1, -1, -1):  # pushed over the top: shift down, only as far as needed
        ceiling = placed[index + 1] - gap if index + 1 < len(placed) else 1.0
        placed[index] = min(placed[index], ceiling) if overflow else placed[index]
    for height, (wanted, text, color) in zip(placed, sorted(labels), strict=True):
        axes.annotate(
            text,
            xy=(1.0, (wanted - low) / (high - low)),
            xytext=(1.02, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            color=color,
            fontsize=9.5,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 2, "shrinkB": 0, "relpos": (0, 0.5)},
        )


def _tick(value: float, _: int) -> str:
    """A round number, as short as possible: 500, 1.5k, 10M."""
    size, letter = next(((size, letter) for size, letter in SCALES if abs(value) >= size), (1, ""))
    return f"{value / size:g}{letter}"


def _decorate(axes: Axes, runs: Sequence[Curves], x: XAxis) -> None:
    """Sets grid, formats and the title of the vertical axis; adds the axis of steps."""
    from matplotlib.ticker import FuncFormatter

    axes.set_ylabel("loss (nats per token)")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if x != "hours":
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    if x != "tokens":
        return
    tokens_per_step = np.concatenate([run.tokens / run.step for run in runs])
    if np.ptp(tokens_per_step) <= 0.01 * tokens_per_step[0]:
        ratio = float(tokens_per_step.mean())
        top = axes.secondary_xaxis("top", functions=(lambda tokens: tokens / ratio, lambda step: step * ratio))
        top.set_xlabel("step")
        top.xaxis.set_major_formatter(FuncFormatter(_tick))
        top.spines["top"].set_color("#bbbbbb")
