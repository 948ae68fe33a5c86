"""A training log as arrays: one loss per step, oldest first, and other columns. Judges nothing (findings.py does).

file -> rows {name as written: number} (log_formats.py) -> a meaning for each name (names.py) -> TrainingLog
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pretrain.doctor.log_formats import LogError, Row, read_rows
from pretrain.doctor.names import meaning

COLUMNS = ("lr", "grad_norm", "aux_loss", "lm_loss", "perplexity", "epoch")


def _empty() -> np.ndarray:
    return np.zeros(0)


@dataclass(frozen=True)
class Restart:
    """A place where the log goes back."""

    last: float
    first: float
    steps: np.ndarray  # (K,) of the older lines
    loss: np.ndarray  # (K,)


@dataclass
class TrainingLog:
    """The content of a log. NaN and infinities are as they were written."""

    name: str
    format: str
    loss_name: str
    """The name of the loss as the log writes it."""
    unit: str
    """The unit of `steps`: step, epoch (the log has no steps) or line (it has neither)."""
    steps: np.ndarray  # (N,)
    loss: np.ndarray  # (N,)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """Those of COLUMNS that the log has, (N,); NaN on lines without it. lm_loss: the cross-entropy beside a total loss."""
    val_steps: np.ndarray = field(default_factory=_empty)  # (M,)
    val_loss: np.ndarray = field(default_factory=_empty)  # (M,)
    evaluated_steps: np.ndarray = field(default_factory=_empty)  # (E,)
    evaluated_loss: np.ndarray = field(default_factory=_empty)  # (E,) of training data, measured with the validation
    skipped_steps: int = 0
    lines_per_step: int = 1
    """More than 1: every rank printed its own line; `loss` is then their mean."""
    reference_lines: dict[str, float] = field(default_factory=dict)
    """Nats per token by name; only logs of this project have them."""
    notes: list[str] = field(default_factory=list)
    missing_steps: np.ndarray = field(default_factory=_empty)  # (K,)
    nonfinite_norm_steps: np.ndarray = field(default_factory=_empty)  # (K,)
    restarts: list[Restart] = field(default_factory=list)
    judged: str = "training loss"
    val_perplexity: np.ndarray = field(default_factory=_empty)  # (M,)


def read_log(path: Path) -> TrainingLog:
    """The log in a file, in the folder of a run, or on standard input (`-`). Raises LogError, OSError."""
    kind, rows = read_rows(path)
    counts = Counter(key for row in rows for key in row)
    names: dict[str | None, list[str]] = {}
    """The names of each meaning, the most frequent first."""
    for key, _ in counts.most_common():
        names.setdefault(meaning(key), []).append(key)
    loss_name = _name_of_loss(path, counts, names)
    train = [row for row in rows if loss_name in row]
    step_names = sorted(names.get("step", []), key=lambda key: "global" not in key)
    step_names += names.get("iteration", []) + names.get("batch", [])
    _continue_steps_over_epochs(rows, step_names, names.get("epoch", []))
    unit, x_of = _x_axis(rows, train, step_names, names.get("epoch", []))
    columns = {column: [key for key in names.get(column, []) if key != loss_name][:1] for column in COLUMNS}
    log = TrainingLog(
        name="standard input" if str(path) == "-" else path.name,
        format=kind,
        loss_name=loss_name,
        unit=unit,
        steps=np.array([x_of(row) for row in train], dtype=float),
        loss=np.array([row[loss_name] for row in train]),
        columns={
            column: np.array([row.get(key, math.nan) for row in train]) for column, keys in columns.items() for key in keys
        },
        skipped_steps=_skipped(rows, names.get("skipped", []), kind),
        reference_lines={key.partition("/")[2]: row[key] for row in rows for key in row if key.startswith("reference_lines/")},
    )
    if val_name := next(iter(names.get("val_loss", [])), None):
        log.val_steps, log.val_loss = _series(rows, val_name, x_of)
        beside = [key for key in names.get("loss", [])[1:] if all(val_name in row for row in rows if key in row)]
        if beside:
            log.evaluated_steps, log.evaluated_loss = _series(rows, beside[0], x_of)
    twins = [key for key in names.get("loss", []) if counts[key] == counts[loss_name] and kind in ("CSV", "JSON")]
    if len(twins) > 1:
        log.notes.append(f"{len(twins)} columns hold losses, {', '.join(map(repr, twins[:5]))}; this judges {loss_name!r}")
    by_micro_batch = all({"step", "iteration"} <= {meaning(key) for key in row} for row in train[:100])
    _average_lines_of_one_step(log, by_micro_batch)
    _drop_lines_before_restarts(log)
    return log


def _name_of_loss(path: Path, counts: Counter, names: dict[str | None, list[str]]) -> str:
    """The name that is the training loss. Raises LogError if there is none, or only a single number of an unknown loss."""
    hint = "Give a log with lines such as 'step 10 loss 9.2'"
    losses = [name for kind in ("loss", "lm_loss", "other_loss") for name in names.get(kind, [])]
    if not losses:
        seen = ", ".join(repr(name) for name, _ in counts.most_common(8)) or "no numbers"
        raise LogError(f"{path}: no training loss in it (found: {seen}). {hint}")
    if losses[0] in names.get("other_loss", []) and counts[losses[0]] == 1:
        raise LogError(f"{path}: no training loss in it, only {losses[0]!r}. {hint}")
    return losses[0]


def _continue_steps_over_epochs(rows: list[Row], step_names: list[str], epoch_names: list[str]) -> None:
    """Adds an offset, in place, to steps that restart with each epoch, so that they continue."""
    offset, last_step, last_epoch = 0.0, -math.inf, math.inf
    for row in rows:
        name = next((name for name in step_names if name in row), None)
        epoch = next((row[each] for each in epoch_names if each in row), last_epoch)
        if name is not None:
            if row[name] < last_step and epoch > last_epoch:
                offset += last_step
            if row[name] != last_step:  # a line that says "Epoch 2/3" may repeat the step of the line above
                last_step, last_epoch = row[name], epoch
            row[name] += offset


def _x_axis(
    rows: list[Row], train: list[Row], step_names: list[str], epoch_names: list[str]
) -> tuple[str, Callable[[Row], float]]:
    """(unit, function from a row to x) of the first unit that nearly all rows have and that distinguishes them."""
    for unit, names in (("step", step_names), ("epoch", epoch_names)):
        known = [next((row[name] for name in names if name in row), math.nan) for row in train]
        distinct = len(set(known)) > 1 if unit == "step" else not np.any(np.diff(known) == 0)  # 50 lines may share epoch 0.01
        if np.mean(np.isfinite(known)) >= 0.9 and (distinct or len(train) == 1):
            return unit, lambda row, names=names: next((row[name] for name in names if name in row), math.nan)
    lines, of_train = 0.0, {id(row) for row in train}
    for row in rows:
        lines += id(row) in of_train
        row["line"] = lines
    return "line", lambda row: row["line"]


def _series(rows: list[Row], name: str, x_of: Callable[[Row], float]) -> tuple[np.ndarray, np.ndarray]:
    """(x, values) of one name, restricted to rows where both are finite."""
    pairs = [(x_of(row), row[name]) for row in rows if name in row]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    return np.array([x for x, _ in pairs], dtype=float), np.array([value for _, value in pairs], dtype=float)


def _skipped(rows: list[Row], names: list[str], kind: str) -> int:
    """Total of skipped steps: Megatron counts them since the last line, this project and most others since the start."""
    values = [row[name] for row in rows for name in names if name in row and math.isfinite(row[name])]
    return int(sum(values) if kind.startswith("Megatron") else max(values, default=0))


def _average_lines_of_one_step(log: TrainingLog, by_micro_batch: bool) -> None:
    """Replaces the lines of each step by their mean, if nearly all steps have the same number of lines. Adds notes."""
    _keep(log, np.flatnonzero(np.isfinite(log.steps)))
    in_order = np.argsort(log.steps, kind="stable")
    starts, lengths, lines = _groups(log.steps)
    if np.sum(np.diff(log.steps) < 0) > max(3, 0.05 * len(log.steps)) and _groups(log.steps[in_order])[2] >= 2:
        _keep(log, in_order)  # ranks whose lines are not in order
        starts, lengths, lines = _groups(log.steps)
    if lines < 2:
        return
    with np.errstate(invalid="ignore"):
        differ = np.maximum.reduceat(log.loss, starts) - np.minimum.reduceat(log.loss, starts) > 0
    mean = np.add.reduceat(log.loss, starts) / lengths
    _keep(log, starts)
    log.loss = mean
    if by_micro_batch:
        log.notes.append(f"each step has {lines} lines, one per micro-batch; this judges their mean")
    elif np.mean(differ) > 0.5:
        log.lines_per_step = lines


def _drop_lines_before_restarts(log: TrainingLog) -> None:
    """Keeps the newest line of each step, and drops lines of steps that a restart repeated. Adds a note."""
    kept: list[int] = []
    back = []
    for i, step in enumerate(log.steps):
        if kept and step < log.steps[kept[-1]]:
            back.append(f"from {log.unit} {log.steps[kept[-1]]:g} to {step:g}")
        while kept and log.steps[kept[-1]] >= step:
            kept.pop()
        kept.append(i)
    if back:
        often = f", {len(back)} times in all" if len(back) > 1 else ""
        log.notes.append(f"the log goes back {back[0]}{often}: a restart; of lines for the same step the newest counts")
    _keep(log, np.array(kept, dtype=int))


def _groups(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(start of each group of neighbours with equal steps, its length, the length that nearly all groups share or 0)."""
    starts = np.flatnonzero(np.r_[True, np.diff(steps) != 0])
    lengths = np.diff(np.r_[starts, len(steps)])
    lines = int(np.median(lengths)) if len(steps) else 0
    return starts, lengths, lines if len(starts) >= 2 and np.mean(lengths == lines) > 0.8 else 0


def _keep(log: TrainingLog, lines: np.ndarray) -> None:
    log.steps, log.loss = log.steps[lines], log.loss[lines]
    log.columns = {name: values[lines] for name, values in log.columns.items()}
