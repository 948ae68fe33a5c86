"""A training log as arrays: one loss per step, oldest first, and other columns. Judges nothing (findings.py does).

file -> rows {name as written: number} (log_formats.py) -> columns (log_table.py) -> TrainingLog
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pretrain.doctor.log_formats import read_rows
from pretrain.doctor.log_lines import LEADING
from pretrain.doctor.log_sources import LogError, Show
from pretrain.doctor.log_table import Table
from pretrain.doctor.names import is_judged, run_and_name

COLUMNS = ("lr", "grad_norm", "aux_loss", "lm_loss", "perplexity", "epoch")


def _empty() -> np.ndarray:
    return np.zeros(0)


@dataclass(frozen=True)
class Restart:
    """A place where the log goes back, and the lines that it repeats."""

    last: float
    """The step of the last line before it."""
    first: float
    """The step of the first line after it."""
    steps: np.ndarray  # (K,) of the older lines, from `first` to `last`
    loss: np.ndarray  # (K,) of these lines; the newer ones are in the log


@dataclass
class TrainingLog:
    """The content of a log. NaN and infinities are as they were written; a line without a loss is not in `loss`."""

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
    val_perplexity: np.ndarray = field(default_factory=_empty)  # (M,) printed beside val_loss; NaN where it is not
    evaluated_steps: np.ndarray = field(default_factory=_empty)  # (E,)
    evaluated_loss: np.ndarray = field(default_factory=_empty)  # (E,) of training data, measured with the validation
    missing_steps: np.ndarray = field(default_factory=_empty)
    """(K,) steps of lines with a learning rate or gradient norm but no loss, where such lines otherwise have one."""
    nonfinite_norm_steps: np.ndarray = field(default_factory=_empty)
    """(K,) steps at which a gradient norm was written as NaN or infinity, on a line with or without a loss."""
    restarts: list[Restart] = field(default_factory=list)
    judged: str = "training loss"
    """What `loss` is: training loss, validation loss or perplexity (then `loss` is its logarithm)."""
    skipped_steps: int = 0
    lines_per_step: int = 1
    """More than 1: every rank printed its own line; `loss` is then their mean."""
    lines: int = 0
    """Losses in the file, if it is so long that only a part of them is in `loss`; 0: all are."""
    other_losses: tuple[str, ...] = ()
    """Names of other losses that may be judged instead: of other runs in the file, or other columns."""
    reference_lines: dict[str, float] = field(default_factory=dict)
    """Nats per token by name; only logs of this project have them."""
    notes: list[str] = field(default_factory=list)


def read_log(path: Path, loss_name: str | None = None, show: Show | None = None) -> TrainingLog:
    """The log in a file, in the folder of a run, or on standard input (`-`).

    `loss_name`: the loss to judge, as the file writes it; None: the most frequent training loss. `show` is called with the
    bytes read so far. Raises LogError, OSError.
    """
    kind, rows = read_rows(path, show)
    table = Table(rows)
    if loss_name is None and (log := _without_any_loss(path, kind, table)):
        return log
    judged, chosen = _choose_loss(path, table, loss_name)
    train = table.has(chosen)
    loss = table.column(chosen)
    notes = []
    if kind in ("CSV", "JSON", "numbers without names"):
        train &= ~_empty_cells(table, loss)
    if judged == "perplexity":
        with np.errstate(invalid="ignore", divide="ignore"):
            loss = np.log(loss)
        notes.append(
            f"the log has no loss, only the perplexity {chosen!r}: this judges its natural logarithm, in nats per token"
        )
    if judged == "validation loss":
        notes.append(f"the log has no training loss: this judges the validation loss {chosen!r}")
    unit, x = _x_axis(table, train)
    log = TrainingLog(
        name=_name_of(path),
        format=kind,
        loss_name=chosen,
        unit=unit,
        steps=x[train],
        loss=loss[train],
        columns=_columns(table, train, chosen),
        judged=judged,
        skipped_steps=_skipped(table, kind),
        lines=table.counts[chosen] if table.thinned else 0,
        reference_lines={
            name.partition("/")[2]: float(table.column(name)[table.has(name)][-1])
            for name in table.counts
            if name.startswith("reference_lines/")
        },
        notes=notes,
    )
    norm = table.column(*table.names.get("grad_norm", [])[:1])
    log.nonfinite_norm_steps = _finite(x[table.has(*table.names.get("grad_norm", [])[:1]) & ~np.isfinite(norm)])
    log.missing_steps = _finite(x[_without_loss(table, train)])
    _add_evaluations(log, table, x, chosen)
    _add_other_losses(log, table, chosen)
    _average_lines_of_one_step(log, _is_by_micro_batch(table, train))
    _drop_lines_before_restarts(log)
    return log


def _without_any_loss(path: Path, kind: str, table: Table) -> TrainingLog | None:
    """A log without a loss whose gradient norms are not finite: Megatron leaves such losses out. None for others."""
    norms = table.names.get("grad_norm", [])[:1]
    known, norm = table.has(*norms), table.column(*norms)
    if np.isfinite(norm[known]).all() or any(map(is_judged, table.counts)):
        return None
    unit, x = _x_axis(table, known)
    log = TrainingLog(_name_of(path), kind, "none", unit, np.zeros(0), np.zeros(0), skipped_steps=_skipped(table, kind))
    log.missing_steps, log.nonfinite_norm_steps = _finite(x[known]), _finite(x[known & ~np.isfinite(norm)])
    return log


def _name_of(path: Path) -> str:
    return "standard input" if str(path) == "-" else path.name


# ---------------------------------------------------------------- what is judged


def _choose_loss(path: Path, table: Table, wanted: str | None) -> tuple[str, str]:
    """(kind, name) of the figure to judge. Raises LogError if there is none, or only a single number of an unknown loss."""
    names = {
        "training loss": [name for kind in ("loss", "lm_loss", "other_loss") for name in table.names.get(kind, [])],
        "perplexity": [name for kind in ("perplexity", "val_perplexity") for name in table.names.get(kind, [])],
        "validation loss": table.names.get("val_loss", []),
    }
    if wanted is not None:
        for kind, known in names.items():
            if wanted in known:
                return kind, wanted
        known = ", ".join(repr(name) for each in names.values() for name in each[:10]) or "none"
        raise LogError(f"{path}: has no loss {wanted!r}; it has {known}")
    hint = "Give a log with lines such as 'step 10 loss 9.2'"
    counts, (first, *_) = table.counts, (*names["training loss"], None)
    is_one_figure = first in counts and counts[first] == 1  # the mean at the end of a run, or a setting
    unknown = first in table.names.get("other_loss", [])
    others = any(counts[name] > 3 for kind in ("perplexity", "validation loss") for name in names[kind])
    if first and not (is_one_figure and (unknown or others)):
        return "training loss", next((name for name in names["training loss"][1:4] if _ends_before(table, name, first)), first)
    found = [(kind, names[kind][0]) for kind in ("perplexity", "validation loss") if names[kind]]
    if found:
        return max(found, key=lambda each: counts[each[1]])
    if first:
        raise LogError(f"{path}: no training loss in it, only {first!r}. {hint}")
    seen = ", ".join(repr(name) for name, _ in counts.most_common(8)) or "no numbers"
    raise LogError(f"{path}: no training loss in it (found: {seen}). {hint}")


def _ends_before(table: Table, name: str, other: str) -> bool:
    """True if `name` has several rows, all of them above those of `other`: what follows the training, on other data."""
    rows = np.flatnonzero(table.has(name))
    return len(rows) >= 5 and rows[-1] < np.argmax(table.has(other))


def _empty_cells(table: Table, loss: np.ndarray) -> np.ndarray:
    """(R,) True where the NaN of a table stands for an empty cell: pandas, and exports of several runs, write it so."""
    nan = np.isnan(loss)
    losses = [name for kind in ("loss", "lm_loss", "other_loss", "val_loss") for name in table.names.get(kind, [])]
    others = [table.column(name) for name in losses]
    empty = np.zeros(table.rows, bool)
    if nan.any() and np.isfinite(loss).any():
        for other in others:
            empty |= nan & np.isfinite(other)
        is_custom = any(np.any(table.has(name) & np.isnan(other) & ~nan) for name, other in zip(losses, others, strict=True))
        if is_custom or empty.any():  # a loss that stays NaN to the end was written as such
            empty[: np.flatnonzero(np.isfinite(loss))[-1]] |= nan[: np.flatnonzero(np.isfinite(loss))[-1]]
    return empty


def _without_loss(table: Table, train: np.ndarray) -> np.ndarray:
    """(R,) True for rows without a loss, but with a learning rate or gradient norm, as the first rows with a loss have."""
    beside = table.has(*table.names.get("lr", [])[:1], *table.names.get("grad_norm", [])[:1])
    first = np.flatnonzero(beside)[: max(3, min(10, beside.sum() // 2))]
    if len(first) < 3 or not train[first].all():
        return np.zeros(table.rows, bool)
    skipped = np.nan_to_num(table.column(*table.names.get("skipped", []))) > 0
    return beside & ~train & ~skipped & ~table.has(*table.names.get("val_loss", []))


def _columns(table: Table, train: np.ndarray, chosen: str) -> dict[str, np.ndarray]:
    """COLUMNS of the run that is judged, at its losses."""
    columns, run = {}, run_and_name(chosen)[0]
    for kind in COLUMNS:
        names = [name for name in table.names.get(kind, []) if name != chosen and run_and_name(name)[0] in ("", run)]
        if names:
            columns[kind] = table.column(names[0])[train]
    return columns


def _add_other_losses(log: TrainingLog, table: Table, chosen: str) -> None:
    """Names the losses of other runs, and other columns of a table that hold losses, in the log and in a note."""
    run, name = run_and_name(chosen)
    losses = [each for each in table.names.get("loss", []) if each != chosen]
    runs = [each for each in losses if run and run_and_name(each)[0] != run and run_and_name(each)[1] == name]
    twins = [each for each in losses if log.format in ("CSV", "JSON") and table.counts[each] == table.counts[chosen]]
    log.other_losses = tuple(runs or twins)
    if log.other_losses:
        shown = ", ".join(map(repr, (chosen, *log.other_losses)[:5])) + (", ..." if len(log.other_losses) > 4 else "")
        kind = "runs" if runs else "columns with a loss"
        count = len(log.other_losses) + 1
        log.notes.append(f"the file holds {count} {kind}, {shown}; this judges {chosen!r}, --loss NAME another")


# ---------------------------------------------------------------- steps


def _x_axis(table: Table, train: np.ndarray) -> tuple[str, np.ndarray]:
    """(unit, (R,) x) of the first unit that nearly all rows with a loss have and that distinguishes them; NaN elsewhere."""
    names = sorted(table.names.get("step", []), key=lambda name: "global" not in name)
    names += table.names.get("iteration", []) + table.names.get("batch", [])
    if LEADING in table.counts and _rises(table.column(LEADING)[train]):
        names.append(LEADING)
    most = [name for name in names if np.mean(table.has(name)[train]) >= 0.9]  # one counter, rather than now this, now that
    names = [*most[:1], *names]
    epoch = table.column(*table.names.get("epoch", []))
    for unit in ("step", "epoch"):
        x = _continued(table.column(*names), epoch) if unit == "step" else epoch
        known = x[train]
        distinct = len(np.unique(known)) > 1 if unit == "step" else not np.any(np.diff(known) == 0)  # 50 lines may share 0.01
        if np.mean(np.isfinite(known)) >= 0.9 and (distinct or len(known) == 1):
            return unit, x
    return "line", np.cumsum(train).astype(float)


def _rises(numbers: np.ndarray) -> bool:
    """True if the numbers hardly ever fall; the numbers of ranks do."""
    changes = np.diff(numbers[np.isfinite(numbers)])
    return len(changes) == 0 or (np.any(changes > 0) and np.sum(changes < 0) <= max(2, len(changes) // 500))


def _continued(steps: np.ndarray, epoch: np.ndarray) -> np.ndarray:
    """(R,) steps that restart with each epoch, with an offset so that they continue; others as they are."""
    rows = np.flatnonzero(np.isfinite(steps))
    if not len(rows):
        return steps
    filled = np.maximum.accumulate(np.where(np.isfinite(epoch), np.arange(len(epoch)), 0))  # the last row with an epoch
    # A line that says "Epoch 2/3" may repeat the step of the line above: only the first of equal steps counts.
    firsts = rows[np.r_[True, np.diff(steps[rows]) != 0]]
    step, of_epoch = steps[firsts], epoch[filled[firsts]]
    changes = np.diff(step)
    next_epoch = (changes < 0) & (np.diff(of_epoch) > 0)
    between = np.median(changes[changes > 0]) if (changes > 0).any() else 1.0
    length = step[:-1] + np.where(step[1:] > 0, 0.0, between)  # of an epoch; one that begins with step 0 has one line more
    offset = np.r_[0.0, np.cumsum(np.where(next_epoch, length, 0.0))]
    continued = steps.copy()
    continued[rows] += offset[np.searchsorted(firsts, rows, side="right") - 1]
    return continued


# ---------------------------------------------------------------- other series


def _add_evaluations(log: TrainingLog, table: Table, x: np.ndarray, chosen: str) -> None:
    """Adds validations, and training losses that are printed with them."""
    run = run_and_name(chosen)[0]
    losses, perplexities = (
        [name for name in table.names.get(kind, []) if name != chosen and run_and_name(name)[0] in ("", run)]
        for kind in ("val_loss", "val_perplexity")
    )
    if log.judged == "validation loss" or not (losses or perplexities):
        return
    # Marian's cross-entropy is a sum over a sentence; longer names are those of special evaluations at the end.
    perplexity = table.column(*perplexities[:1])
    beside = {name: bool(np.any(np.isfinite(table.column(name)) & np.isfinite(perplexity))) for name in losses}
    losses.sort(key=lambda name: ("mean-words" not in name, -table.counts[name], not beside[name], len(name)))
    if losses:
        value = table.column(losses[0])
    else:
        with np.errstate(invalid="ignore", divide="ignore"):
            value = np.log(perplexity)
        log.notes.append(f"of {perplexities[0]!r}, this uses the natural logarithm as the validation loss")
    if log.unit == "step" and len(log.steps):  # an evaluation before the first step
        first = int(np.flatnonzero(np.isfinite(x))[0])
        x[:first] = x[first]
    known = np.isfinite(x) & np.isfinite(value)
    log.val_steps, log.val_loss = x[known], value[known]
    at_step = dict(zip(x[np.isfinite(perplexity)], perplexity[np.isfinite(perplexity)], strict=True))
    log.val_perplexity = np.array([at_step.get(step, math.nan) for step in log.val_steps])
    validated = table.has(*(losses or perplexities)[:1])
    for name in table.names.get("loss", []):
        if name != chosen and run_and_name(name)[0] == run and not np.any(table.has(name) & ~validated):
            value = table.column(name)
            known = np.isfinite(x) & np.isfinite(value)
            log.evaluated_steps, log.evaluated_loss = x[known], value[known]
            return


def _finite(steps: np.ndarray) -> np.ndarray:
    return np.unique(steps[np.isfinite(steps)])


def _skipped(table: Table, kind: str) -> int:
    """Total of skipped steps: Megatron counts them since the last line, this project and most others since the start."""
    values = [value for name in table.names.get("skipped", []) for value in table.column(name) if math.isfinite(value)]
    return int(sum(values) if kind.startswith("Megatron") else max(values, default=0))


def _is_by_micro_batch(table: Table, train: np.ndarray) -> bool:
    """True if the lines count both steps and the iterations within them."""
    first = np.flatnonzero(train)[:100]
    return all(table.has(*table.names.get(kind, []))[first].all() for kind in ("step", "iteration"))


# ---------------------------------------------------------------- one line per step


def _average_lines_of_one_step(log: TrainingLog, by_micro_batch: bool) -> None:
    """Replaces the lines of each step by their mean, if nearly all steps have the same number of lines. Adds notes."""
    _keep(log, np.flatnonzero(np.isfinite(log.steps)))
    in_order = np.argsort(log.steps, kind="stable")
    starts, lengths, lines = _groups(log.steps)
    back = -np.diff(log.steps)
    mixed = np.sum(back > 0) > max(3, 0.05 * len(log.steps)) and back.max() < 0.5 * np.ptp(log.steps)
    if mixed and _groups(log.steps[in_order])[2] >= 2:
        _keep(log, in_order)  # ranks whose lines are not in order
        starts, lengths, lines = _groups(log.steps)
    if lines < 2:
        return
    firsts, lasts = log.loss[starts], log.loss[starts + lengths - 1]
    if np.mean(firsts[1:] == lasts[:-1]) > 0.8:  # a bar that counts first and shows the new loss later
        _keep(log, starts + lengths - 1)
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
    """Keeps the newest line of each step, and drops lines of steps that a restart repeated. Adds restarts and a note."""
    kept: list[int] = []
    begin = log.steps[0] if len(log.steps) else math.nan
    for i, step in enumerate(log.steps):
        goes_back, last, repeated = kept and step < log.steps[kept[-1]], kept[-1] if kept else 0, []
        while kept and log.steps[kept[-1]] >= step:
            repeated.append(kept.pop())
        if goes_back:
            older = np.array(repeated[::-1])
            log.restarts.append(Restart(float(log.steps[last]), float(step), log.steps[older], log.loss[older]))
        kept.append(i)
    if log.restarts:
        first = log.restarts[0]
        back = f"from {log.unit} {first.last:g} to {first.first:g}"
        often = f", {len(log.restarts)} times in all" if len(log.restarts) > 1 else ""
        what = "a restart; of lines for the same step the newest counts"
        if all(each.first <= begin for each in log.restarts):
            what = f"{len(log.restarts) + 1} runs one after another; this judges the last"
        log.notes.append(f"the log goes back {back}{often}: {what}")
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
