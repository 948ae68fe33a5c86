"""Training logs of any framework as arrays: JSON (lines), CSV, TensorBoard events, tables and lines of text.

Knows how losses, steps and their companions are spelled. Judges nothing (diagnose_log.py does), and imports no torch.

    file -> rows {name as written: number} -> each name gets a meaning -> TrainingLog, one loss per step, oldest first
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from pretrain import UserError

Row = dict[str, float]
COLUMNS = ("lr", "grad_norm", "aux_loss", "lm_loss", "perplexity")


class LogError(UserError):
    """A log that cannot be read; the message is for the user."""


@dataclass
class TrainingLog:
    """What a log says. NaN and infinities stand as they were written."""

    name: str
    format: str
    loss_name: str
    """As the log spells it."""
    unit: str
    """What `steps` counts: step, epoch (the log has no steps) or line (it has neither)."""
    steps: np.ndarray  # (N,)
    loss: np.ndarray  # (N,)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """Of COLUMNS those that the log has, (N,); NaN where a line lacks it. lm_loss: the cross-entropy beside a total."""
    val_steps: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (M,)
    val_loss: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (M,)
    evaluated_steps: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (E,)
    evaluated_loss: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (E,) of training data, beside the validation
    skipped_steps: int = 0
    lines_per_step: int = 1
    """More than 1: every rank printed a line of its own; `loss` is then their mean."""
    reference_lines: dict[str, float] = field(default_factory=dict)
    """Nats per token; only our own logs have them."""
    notes: list[str] = field(default_factory=list)


# ---------------------------------------------------------------- what a name means

_VALIDATION = {"val", "valid", "validation", "eval", "evaluation", "test", "dev", "heldout"}
_AUXILIARY = {"aux", "auxiliary", "balance", "balancing", "router", "routing", "z", "moe", "load", "lb"}
_CROSS_ENTROPY = {"lm", "ce", "nll", "xent", "cross", "entropy", "logits", "language", "model"}
_PLAIN = {"loss", "losses", "train", "training", "trn", "avg", "average", "mean", "total", "step", "steps", "batch", "epoch"}
_PLAIN |= {"running", "reduced", "inner", "iter", "current", "smooth", "smoothed", "ema", "value", "per", "token", "main"}
_PLAIN |= {"global", "stats", "metrics"}
_NO_LOSS = {"scale", "scaling", "scaler", "std", "var", "min", "max", "best", "delta", "time", "weight", "coef", "ppl"}
_NO_LOSS |= {"timestamp"}
_STEP = {"step", "steps", "updates"}
_ITERATION = {"iter", "iters", "iteration", "itr"}
_BATCH = {"batch", "batches", "update"}
_COUNTS = ("step", "iteration", "batch")  # what counts steps, the surest first
_NO_STEP = {
    "time",
    "per",
    "max",
    "total",
    "warmup",
    "every",
    "elapsed",
    "remaining",
    "skipped",
    "loss",
    "nan",
    "number",
    "size",
}


@lru_cache(maxsize=10_000)
def meaning(name: str) -> str | None:
    """The one word for what a column, key or label holds: step, iteration, batch, epoch, loss, lm_loss, other_loss, aux_loss,
    val_loss, lr, grad_norm, perplexity, skipped; None for everything else."""
    name = name.rpartition(" - ")[2].partition("/max_")[0]  # W&B exports put the run's name before it
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())
    unique = set(words)
    if not words:
        return None
    if unique & {"loss", "losses", "nll", "xent"} or {"cross", "entropy"} <= unique:
        return None if unique & _NO_LOSS else _kind_of_loss(unique)
    if words == ["val"]:
        return "val_loss"  # "loss train: 3.1, val: 3.2"
    if unique & {"ppl", "perplexity"}:
        return None if unique & _VALIDATION else "perplexity"
    if "lr" in unique or {"learning", "rate"} <= unique:
        return "lr"
    if unique & {"gnorm", "gradnorm"} or {"grad", "norm"} <= unique or {"gradient", "norm"} <= unique:
        return "grad_norm"
    if "skipped" in unique or {"nan", "iterations"} <= unique:
        return "skipped"
    if words[-1] == "epoch":
        return "epoch"
    if unique & _NO_STEP:
        return None
    return next((word for word, of in zip(_COUNTS, (_STEP, _ITERATION, _BATCH), strict=True) if words[-1] in of), None)


def _kind_of_loss(words: set[str]) -> str:
    if words & _VALIDATION:
        return "val_loss"
    if words & _AUXILIARY:
        return "aux_loss"
    if words - _PLAIN - _CROSS_ENTROPY:
        return "other_loss"
    return "lm_loss" if words & _CROSS_ENTROPY else "loss"


# ---------------------------------------------------------------- files to rows

_WHOLE_STEP = "the mean over ranks and micro-batches"
_LAST = "the last micro-batch of rank 0"
TEXT_FORMATS = {
    "MiniMind-like text": (r"Epoch:?\s*\[\d+/\d+\]\s*\(\s*\d+/\d+\)", f"{_LAST}; its steps count micro-batches"),
    "nanochat text": (r"^step \d{5}/\d{5} \(.*loss:", f"{_LAST}, smoothed"),
    "litgpt text": (r"\biter \d+ step \d+.*\bloss train", "a mean of rank 0 alone"),
    "nanoGPT text": (r"^iter \d+: loss", _LAST),
    "Megatron text": (r"\biteration\s+\d+/\s*\d+\s*\|.*loss", _WHOLE_STEP),
    "fairseq text": (r"\btrain_inner\b", "bits, not nats"),
    "torchtitan text": (r"\bstep:\s+\d+\s+loss:\s+\S+\s+grad_norm:", _WHOLE_STEP),
    "Hugging Face Trainer text": (r"\{'(loss|eval_loss)':", f"{_WHOLE_STEP}, since the last line"),
}
"""Format: (what its lines look like, what the published script behind it shows as the loss)."""

_NUMBER = r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf(?:inity)?)\b"
_WORD = r"(?!nan\b|inf\b)[A-Za-z_][\w/.\-]*"
_NAME = re.compile(rf"(?<![A-Za-z0-9_]){_WORD}(?: {_WORD})*", re.IGNORECASE)
_VALUE = re.compile(rf"[\"']?\s*[:=]?\s*(?:tensor\()?[\"'\[(]?\s*({_NUMBER})(?:([KM])(?![A-Za-z]))?", re.IGNORECASE)
_LONE_NUMBER = re.compile(rf"(?<![A-Za-z0-9_])({_NUMBER})", re.IGNORECASE)
_EPOCH_AND_BATCH = re.compile(r"epoch:?\s*\[?\s*(\d+)\s*(/\s*\d+)?\s*\]?\s*[\[(]\s*(\d+)\s*/\s*(\d+)\s*[\])(]", re.IGNORECASE)
_COUNT = r"([\d.]+)([kM]?)"
_OUT_OF = re.compile(rf"(?:^|[\[(|])\s*{_COUNT}\s*/\s*{_COUNT}\s*(?:[\])\[(━]|- )|\b{_COUNT}it/{_COUNT}it\b")
_TIMES = {"": 1.0, "k": 1e3, "m": 1e6}
_AT_STEP = re.compile(r"\bat (iteration|step)\b")  # "validation loss at iteration 100 | lm loss value: 9.1"
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def read_log(path: Path) -> TrainingLog:
    """The log in a file, or in the folder of a run of ours or of TensorBoard. Raises LogError, OSError."""
    path = Path(path)
    if path.is_dir() and (path / "metrics.jsonl").is_file():
        path = path / "metrics.jsonl"
    if path.is_dir() or "tfevents" in path.name:
        return _assemble(path, "TensorBoard events", list(_tensorboard_rows(path)))
    text = _in_our_words(_decoded(path, path.read_bytes()))
    if not text.strip():
        raise LogError(f"{path}: is empty; give a log that holds at least one loss")
    if rows := _json_rows(text):
        ours = any("reference_lines/uniform" in row for row in rows)
        return _assemble(path, "metrics.jsonl of this project" if ours else "JSON", rows)
    if rows := _table_rows(text):
        return _assemble(path, "CSV", rows)
    lines = [line for line in re.split(r"[\r\n]+", _ESCAPES.sub("", text)) if line.strip()]
    counts = {name: sum(bool(re.search(shape, line)) for line in lines[:2000]) for name, (shape, _) in TEXT_FORMATS.items()}
    name = max(counts, key=counts.get)
    return _assemble(path, name if counts[name] else "text", list(_text_rows(lines)))


def _decoded(path: Path, raw: bytes) -> str:
    """UTF-8, UTF-16, with or without the mark at its head, or GB 18030. Raises LogError for what is no text."""
    if raw[:2] == b"\x1f\x8b":
        raise LogError(f"{path}: is compressed; unpack it with gunzip first")
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return raw.decode("utf-16", errors="replace")
    if b"\0" in raw[:4096]:
        for half, encoding in ((raw[1:4096:2], "utf-16-le"), (raw[0:4096:2], "utf-16-be")):
            if half.count(0) > 0.8 * len(half):
                return raw.decode(encoding, errors="replace")
        raise LogError(f"{path}: is a binary file; give text, JSON lines, CSV, or a TensorBoard file (events.out.tfevents...)")
    text = raw.decode("utf-8-sig", errors="replace")
    chinese = raw.decode("gb18030", errors="replace") if text.count("\ufffd") > 3 else text  # fewer: a torn character
    return min(text, chinese, key=lambda each: each.count("\ufffd"))


_CHINESE = """损失值 loss 损失 loss 训练 train_ 验证 val_ 测试 val_ 学习率 lr 困惑度 perplexity 梯度范数 grad_norm
总步数 total_steps 步数 step 步骤 step 迭代 step 轮次 epoch 轮数 epoch 当前 current_ 平均 mean_ ： : ， ,"""


def _in_our_words(text: str) -> str:
    """Chinese words and the shorthand of two C trainers (`s:10 trl:3.1`, `10 train 3.1`) as words that `meaning` knows."""
    if re.search("[\u4e00-\u9fff：]", text):
        text = re.sub(r"第\s*(\d+)\s*轮", r" epoch \1 ", text)
        text = re.sub(r"第\s*(\d+)\s*步|(?<![\w.])(\d+)\s*步(?!数|骤)", r" step \1\2 ", text)
        for word, ours in zip(_CHINESE.split()[::2], _CHINESE.split()[1::2], strict=True):
            text = text.replace(word, ours)
    text = re.sub(r"(?m)^s:(\d+) trl:", r"step \1 train loss:", text)
    text = re.sub(r"(?m)^s:(\d+) t[e]l:", r"step \1 val loss:", text)
    return re.sub(r"(?m)^(\d+) (train|val) (?=[\d.]+\s*$)", r"step \1 \2 loss ", text)


def _json_rows(text: str) -> list[Row]:
    """Rows of JSON lines, or of one document: a list of objects, an object that holds one (trainer_state.json), that has an
    object for each step, or a list for each name. [] where no loss is in them."""
    records = []
    if text.lstrip()[0] not in "{[":
        return []
    for line in text.splitlines():
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            continue  # a torn last line, or words between the records
    found = [records]
    if sum(isinstance(record, dict) for record in records) <= 1:
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            document = None
        found = [*_lists_in(document), records]
    for candidate in found:
        rows = [dict(_numbers(record)) for record in candidate if isinstance(record, dict)]
        if any(_is_loss(name) for row in rows for name in row):
            return rows
    return []


def _lists_in(document: object) -> Iterator[list]:
    """The lists of records that a document may hold."""
    if isinstance(document, list):
        yield document
    elif isinstance(document, dict):
        yield from (value for value in document.values() if isinstance(value, list))
        if all(isinstance(value, dict) for value in document.values()):
            yield [{"step": key, **value} for key, value in document.items()]
        columns = {name: value for name, value in document.items() if isinstance(value, list)}
        yield [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=False)]
        yield from (each for value in document.values() if isinstance(value, dict) for each in _lists_in(value))


def _is_loss(name: str) -> bool:
    return (meaning(name) or "").endswith("loss")


def _numbers(record: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number by its path a/b. Our logs write null for what is not finite and say under `nonfinite` what it was."""
    for key, value in record.items():
        if key == "nonfinite" and isinstance(value, dict):
            yield from ((name, float(word)) for name, word in value.items())
        elif isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif not isinstance(value, bool) and (number := _number(value)) is not None:
            yield prefix + key, number


def _number(value: object) -> float | None:
    """A number, also one in a string ("9.1", "1,000", "10/500"); None for everything else."""
    if isinstance(value, str):
        value = value.strip().partition("/")[0].replace(",", "")
    try:
        return value if isinstance(value, float) else float(str(value))  # of too long an integer: infinity
    except ValueError:
        return None


def _table_rows(text: str) -> list[Row]:
    """Rows under a header that names a loss, cells between commas, semicolons, tabs, bars or blanks; [] when there is none."""
    text = re.sub("[│┃]", "|", text)
    lines = [line for line in text.splitlines() if line.strip() and not re.fullmatch(r"[\s|:+─-╿-]+", line)]
    for number, header in enumerate(lines[:20]):
        for delimiter in ",;\t| ":
            names = _cells(header.lstrip("#"), delimiter)
            if _is_header(names, header) and number + 1 < len(lines):
                first = [_number(cell) for cell in _cells(lines[number + 1], delimiter)]
                wanted = len(names) if delimiter == " " else 1
                if len(first) == len(names) and len(first) - first.count(None) >= wanted:
                    rows = _rows_under(names, lines[number + 1 :], delimiter)
                    return rows if len(rows) > 0.5 * (len(lines) - number - 1) else []
    return []


def _cells(line: str, delimiter: str) -> list[str]:
    if delimiter == " ":
        return line.split()
    if len(line) > 100_000:  # no row of a log, and more than the csv module takes
        return []
    line = line.strip().strip("|") if delimiter == "|" else line
    return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))]


def _is_header(names: list[str], line: str) -> bool:
    """Whether these cells name columns, one of them a loss. "step: 1, loss: 9.1" is a line of text."""
    if not any(_is_loss(name) for name in names) and [name.lower() for name in names] != ["wall time", "step", "value"]:
        return False
    named = all(re.search("[A-Za-z]", name) and len(name) < 80 and _number(name) is None for name in names if name)
    return (named or len(names) == 1) and not re.search(r"[:=]\s*[-+.\d]", line)


def _rows_under(names: list[str], lines: list[str], delimiter: str) -> list[Row]:
    """`names` as TensorBoard exports them have the tag in the name of the file alone: the value is taken for the loss."""
    names = ["loss" if name.lower() == "value" else name for name in names]
    # Where the comma does not part cells it may stand for the point: "9,1234" can be no thousands.
    comma = delimiter != "," and any(re.search(r"(?<![\d,])\d+,(?!\d{3}(?!\d))\d+", line) for line in lines)
    point = "." if comma else ","
    rows = []
    for line in lines:
        cells = _cells(line.replace(",", point), delimiter)
        rows.append({n: v for n, cell in zip(names, cells, strict=False) if (v := _number(cell)) is not None})
    return [row for row in rows if row]


def _tensorboard_rows(path: Path) -> Iterator[Row]:
    """One row a step, of all scalars in an event file or in the files of a folder."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        raise LogError(f"{path}: reading TensorBoard files needs the package tensorboard; pip install tensorboard") from None
    if path.is_dir() and not any("tfevents" in file.name for file in path.iterdir()):
        raise LogError(f"{path}: holds neither metrics.jsonl nor TensorBoard files (events.out.tfevents...); give a log file")
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    by_step: dict[int, Row] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            by_step.setdefault(event.step, {"step": float(event.step)})[tag] = event.value
    for tag in events.Tags()["tensors"]:
        if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars":
            for event in events.Tensors(tag):
                by_step.setdefault(event.step, {"step": float(event.step)})[tag] = float(make_ndarray(event.tensor_proto))
    yield from (by_step[step] for step in sorted(by_step))


def _text_rows(lines: Iterable[str]) -> Iterator[Row]:
    """Rows of tables (a header with step and loss, cells two spaces apart) and of lines with `name value` pairs.

    A step or an epoch may stand on a line of its own, above the figures.
    """
    header: list[str] = []
    step: float | None = None
    epoch: float | None = None
    pairs = _Pairs()
    for line in lines:
        cells = re.split(r"\s{2,}|\t+", line.strip()) if header or re.search("step.*loss|loss.*step", line, re.I) else []
        if {"step", "loss"} <= {cell.lower() for cell in cells}:
            header = cells
        elif header and len(cells) == len(header):
            numbers = ((name, _number(cell)) for name, cell in zip(header, cells, strict=True))
            if row := {name: number for name, number in numbers if number is not None}:
                yield row
        else:
            row = pairs(line)
            meanings = {meaning(name): name for name in reversed(row)}
            own = next((row[meanings[count]] for count in _COUNTS if count in meanings), None)
            found = own if own is not None else _step_without_name(line)
            step = found if found is not None else step
            epoch = row[meanings["epoch"]] if "epoch" in meanings else epoch
            losses = any(name and name.endswith("loss") for name in meanings)
            if own is None and step is not None and row:
                row["step"] = step  # its own, or that of the lines above: some print one figure a line
            if losses and epoch is not None and "epoch" not in meanings:
                row["epoch"] = epoch
            if row:
                yield row


class _Pairs:
    """All `name value`, `name: value`, `'name': value` and `name=value` of a line; the first of a name counts.

    Lines that differ in their numbers alone are parsed once.
    """

    def __init__(self) -> None:
        self.known: dict[str, list[tuple[str, int, float]]] = {}
        """Shape of a line: (name, index of its value among the numbers of the line, what a K or M after it multiplies by)."""

    def __call__(self, line: str) -> Row:
        parts = _LONE_NUMBER.split(line)  # words and numbers in turn
        shape = "#".join(parts[::2])
        if (places := self.known.get(shape)) is None:
            places = self._parse(line)
            if len(self.known) < 10_000:
                self.known[shape] = places
        return {name: times * float(parts[2 * index + 1].replace(",", "")) for name, index, times in places}

    def _parse(self, line: str) -> list[tuple[str, int, float]]:
        of_validation = re.search(r"\b(validation|valid|val|evaluation|eval|test)\b", line, re.IGNORECASE)
        begins = len(line) if of_validation is None or "train" in line else of_validation.start()
        line, position = _AT_STEP.sub(r", \1", line), 0
        index_of = {found.start(): index for index, found in enumerate(_LONE_NUMBER.finditer(line))}
        places: dict[str, tuple[str, int, float]] = {}
        while found := _NAME.search(line, position):
            value = _VALUE.match(line, found.end())
            position = value.end() if value else found.end()
            if value and value.start(1) in index_of:
                name = f"val {found[0]}" if found.start() > begins and _is_loss(found[0]) else found[0]
                places.setdefault(name, (name, index_of[value.start(1)], _TIMES[(value[2] or "").lower()]))
        has_loss = any(map(_is_loss, places))  # the other names are only told where no line has a loss
        return [place for name, place in places.items() if meaning(name) or not has_loss]


def _step_without_name(line: str) -> float | None:
    if found := _EPOCH_AND_BATCH.search(line):
        epoch, of_epochs, batch, batches = found.groups()
        return (int(epoch) - 1) * int(batches) * bool(of_epochs) + int(batch)  # [1/2] counts from 1; others may from 0
    if not (found := _OUT_OF.search(line)):
        return None
    number, times = found.group(1, 2) if found[1] else found.group(5, 6)
    return _TIMES[times.lower()] * float(number) if number.strip(".") else None


# ---------------------------------------------------------------- rows to a log


def _assemble(path: Path, kind: str, rows: list[Row]) -> TrainingLog:
    """Rows to series. Raises LogError when there is no loss in them."""
    counts = Counter(name for row in rows for name in row)
    names: dict[str | None, list[str]] = {}  # of each meaning, the most frequent first
    for name, _ in counts.most_common():
        names.setdefault(meaning(name), []).append(name)
    losses = [name for kind_of_loss in ("loss", "lm_loss", "other_loss") for name in names.get(kind_of_loss, [])]
    if not losses:
        seen = ", ".join(repr(name) for name, _ in counts.most_common(8)) or "no numbers"
        raise LogError(f"{path}: no training loss in it (found: {seen}). Give a log with lines such as 'step 10 loss 9.2'")
    loss_name = losses[0]
    train = [row for row in rows if loss_name in row]
    if loss_name in names.get("other_loss", []) and len(train) == 1:
        raise LogError(f"{path}: no training loss in it, only {loss_name!r}. Give a log with lines such as 'step 10 loss 9.2'")
    step_names = sorted(names.get("step", []), key=lambda name: "global" not in name)
    step_names += names.get("iteration", []) + names.get("batch", [])
    _count_on_over_epochs(rows, step_names, names.get("epoch", []))
    unit, x_of = _x_axis(rows, train, step_names, names.get("epoch", []))
    columns = {word: [name for name in names.get(word, []) if name != loss_name][:1] for word in COLUMNS}
    log = TrainingLog(
        name=path.name,
        format=kind,
        loss_name=loss_name,
        unit=unit,
        steps=np.array([x_of(row) for row in train], dtype=float),
        loss=np.array([row[loss_name] for row in train]),
        columns={
            word: np.array([row.get(name, math.nan) for row in train]) for word, found in columns.items() for name in found
        },
        skipped_steps=_skipped(rows, names.get("skipped", []), kind),
        reference_lines={
            name.partition("/")[2]: row[name] for row in rows for name in row if name.startswith("reference_lines/")
        },
    )
    if val_name := next(iter(names.get("val_loss", [])), None):
        log.val_steps, log.val_loss = _series(rows, val_name, x_of)
        beside = [name for name in names.get("loss", [])[1:] if all(val_name in row for row in rows if name in row)]
        if beside:
            log.evaluated_steps, log.evaluated_loss = _series(rows, beside[0], x_of)
    by_micro_batch = all({"step", "iteration"} <= {meaning(name) for name in row} for row in train[:100])
    twins = [name for name in names.get("loss", []) if counts[name] == counts[loss_name] and kind in ("CSV", "JSON")]
    if len(twins) > 1:
        log.notes.append(f"{len(twins)} columns hold losses, {', '.join(map(repr, twins[:5]))}; judged is {loss_name!r}")
    _one_loss_per_step(log, by_micro_batch)
    return log


def _count_on_over_epochs(rows: list[Row], step_names: list[str], epoch_names: list[str]) -> None:
    """Steps that begin again with each epoch go on counting instead, in place."""
    offset, last_step, last_epoch = 0.0, -math.inf, math.inf
    for row in rows:
        name = next((name for name in step_names if name in row), None)
        epoch = next((row[each] for each in epoch_names if each in row), last_epoch)
        if name is not None:
            if row[name] < last_step and epoch > last_epoch:
                offset += last_step
            if row[name] != last_step:  # the step of the line above may stand on a line that says "Epoch 2/3"
                last_step, last_epoch = row[name], epoch
            row[name] += offset


def _x_axis(
    rows: list[Row], train: list[Row], step_names: list[str], epoch_names: list[str]
) -> tuple[str, Callable[[Row], float]]:
    """-> (unit, function of a row -> x): the first that nearly all rows have and that tells them apart."""
    for unit, names in (("step", step_names), ("epoch", epoch_names)):
        known = [next((row[name] for name in names if name in row), math.nan) for row in train]
        told_apart = len(set(known)) > 1 if unit == "step" else not np.any(np.diff(known) == 0)  # 0.01 may stand for 50 lines
        if np.mean(np.isfinite(known)) >= 0.9 and (told_apart or len(train) == 1):
            return unit, lambda row, names=names: next((row[name] for name in names if name in row), math.nan)
    lines, of_train = 0.0, {id(row) for row in train}
    for row in rows:
        lines += id(row) in of_train
        row["line"] = lines
    return "line", lambda row: row["line"]


def _series(rows: list[Row], name: str, x_of) -> tuple[np.ndarray, np.ndarray]:
    """(x, values) of one name, where both are finite."""
    pairs = [(x_of(row), row[name]) for row in rows if name in row]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    return np.array([x for x, _ in pairs], dtype=float), np.array([value for _, value in pairs], dtype=float)


def _skipped(rows: list[Row], names: list[str], kind: str) -> int:
    """Ours and most count from the start; Megatron counts since the last line."""
    values = [row[name] for row in rows for name in names if name in row and math.isfinite(row[name])]
    return int(sum(values) if kind.startswith("Megatron") else max(values, default=0))


def _one_loss_per_step(log: TrainingLog, by_micro_batch: bool) -> None:
    """Several lines of one step become their mean; after a restart the newer line of a step stands. Writes notes."""
    _keep(log, np.flatnonzero(np.isfinite(log.steps)))
    in_order = np.argsort(log.steps, kind="stable")
    starts, lengths, lines = _groups(log.steps)
    if np.sum(np.diff(log.steps) < 0) > max(3, 0.05 * len(log.steps)) and _groups(log.steps[in_order])[2] >= 2:
        _keep(log, in_order)  # ranks that write when they like
        starts, lengths, lines = _groups(log.steps)
    if lines >= 2:
        with np.errstate(invalid="ignore"):
            differ = np.maximum.reduceat(log.loss, starts) - np.minimum.reduceat(log.loss, starts) > 0
        mean = np.add.reduceat(log.loss, starts) / lengths
        _keep(log, starts)
        log.loss = mean
        if by_micro_batch:
            log.notes.append(f"each step has {lines} lines, one for each micro-batch; their mean is judged")
        elif np.mean(differ) > 0.5:
            log.lines_per_step = lines
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
        log.notes.append(f"the log goes back {back[0]}{often}: a restart; where steps stand twice the newer line is judged")
    _keep(log, np.array(kept, dtype=int))


def _groups(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(where neighbours of one step begin, how many they are, how many nearly all are, or 0)."""
    starts = np.flatnonzero(np.r_[True, np.diff(steps) != 0])
    lengths = np.diff(np.r_[starts, len(steps)])
    lines = int(np.median(lengths)) if len(steps) else 0
    return starts, lengths, lines if len(starts) >= 2 and np.mean(lengths == lines) > 0.8 else 0


def _keep(log: TrainingLog, lines: np.ndarray) -> None:
    log.steps, log.loss = log.steps[lines], log.loss[lines]
    log.columns = {name: values[lines] for name, values in log.columns.items()}
