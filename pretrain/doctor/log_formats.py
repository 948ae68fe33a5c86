"""Training logs of any framework as rows of numbers: JSON (lines), CSV, tables, TensorBoard events and lines of text.

A row is {name as written: number}; names.py knows what a name means, training_log.py makes series of the rows. To add a text
format, add a line to TEXT_FORMATS; to add a kind of file, add a reader to `read_rows`.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from pretrain import UserError
from pretrain.doctor.names import STEP_COUNTERS, is_loss, meaning

Row = dict[str, float]


class LogError(UserError):
    """A log that cannot be read."""


# ---------------------------------------------------------------- kinds of files

_STEP_MEAN = "the mean over ranks and micro-batches"
_LAST = "the last micro-batch of rank 0"
TEXT_FORMATS = {
    "MiniMind-like text": (r"Epoch:?\s*\[\d+/\d+\]\s*\(\s*\d+/\d+\)", f"{_LAST}; its steps count micro-batches"),
    "nanochat text": (r"^step \d{5}/\d{5} \(.*loss:", f"{_LAST}, smoothed"),
    "litgpt text": (r"\biter \d+ step \d+.*\bloss train", "a mean of rank 0 alone"),
    "nanoGPT text": (r"^iter \d+: loss", _LAST),
    "Megatron text": (r"\biteration\s+\d+/\s*\d+\s*\|.*loss", _STEP_MEAN),
    "fairseq text": (r"\btrain_inner\b", "bits, not nats"),
    "torchtitan text": (r"\bstep:\s+\d+\s+loss:\s+\S+\s+grad_norm:", _STEP_MEAN),
    "Hugging Face Trainer text": (r"\{'(loss|eval_loss)':", f"{_STEP_MEAN}, since the last line"),
}
"""Format: (a pattern of its lines, the loss that the published script behind it shows)."""


def read_rows(path: Path) -> tuple[str, list[Row]]:
    """(format, rows) of a file, of the folder of a run of this project or of TensorBoard, or of standard input (`-`).

    Raises LogError, OSError.
    """
    if path.is_dir() and (path / "metrics.jsonl").is_file():
        path = path / "metrics.jsonl"
    if path.is_dir() or "tfevents" in path.name:
        return "TensorBoard events", list(_tensorboard_rows(path))
    text = _in_known_words(_decoded(path, sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()))
    if not text.strip():
        raise LogError(f"{path}: is empty; give a log that holds at least one loss")
    if rows := _json_rows(text):
        ours = any("reference_lines/uniform" in row for row in rows)
        return "metrics.jsonl of this project" if ours else "JSON", rows
    if rows := _table_rows(text):
        return "CSV", rows
    lines = [line for line in re.split(r"[\r\n]+", _ESCAPES.sub("", text)) if line.strip()]
    counts = {name: sum(bool(re.search(shape, line)) for line in lines[:2000]) for name, (shape, _) in TEXT_FORMATS.items()}
    name = max(counts, key=counts.get)
    return name if counts[name] else "text", list(_text_rows(lines))


# ---------------------------------------------------------------- bytes to text


def _decoded(path: Path, raw: bytes) -> str:
    """The text of a file in UTF-8, UTF-16 (even without a byte-order mark) or GB 18030. Raises LogError if it is not text."""
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
    chinese = raw.decode("gb18030", errors="replace") if text.count("\ufffd") > 3 else text  # up to 3: a torn character
    return min(text, chinese, key=lambda each: each.count("\ufffd"))


_CHINESE = """损失值 loss 损失 loss 训练 train_ 验证 val_ 测试 val_ 学习率 lr 困惑度 perplexity 梯度范数 grad_norm
总步数 total_steps 步数 step 步骤 step 迭代 step 轮次 epoch 轮数 epoch 当前 current_ 平均 mean_ ： : ， ,"""


def _in_known_words(text: str) -> str:
    """Translates Chinese words, and the shorthand of two C trainers (`s:10 trl:3.1`), into words that names.py knows."""
    if re.search("[\u4e00-\u9fff：]", text):
        text = re.sub(r"第\s*(\d+)\s*轮", r" epoch \1 ", text)
        text = re.sub(r"第\s*(\d+)\s*步|(?<![\w.])(\d+)\s*步(?!数|骤)", r" step \1\2 ", text)
        for word, english in zip(_CHINESE.split()[::2], _CHINESE.split()[1::2], strict=True):
            text = text.replace(word, english)
    text = re.sub(r"(?m)^s:(\d+) trl:", r"step \1 train loss:", text)
    text = re.sub(r"(?m)^s:(\d+) t[e]l:", r"step \1 val loss:", text)
    return re.sub(r"(?m)^(\d+) (train|val) (?=[\d.]+\s*$)", r"step \1 \2 loss ", text)


# ---------------------------------------------------------------- JSON


def _json_rows(text: str) -> list[Row]:
    """The rows of JSON lines, or of one document: a list of objects, an object that holds such a list (trainer_state.json), an
    object per step, or a list per name. [] if they hold no loss."""
    records = []
    if text.lstrip()[0] not in "{[":
        return []
    for line in text.splitlines():
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            continue  # a torn last line, or text between the records
    found = [records]
    if sum(isinstance(record, dict) for record in records) <= 1:
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            document = None
        found = [*_lists_in(document), records]
    for candidate in found:
        rows = [dict(_numbers(record)) for record in candidate if isinstance(record, dict)]
        if any(is_loss(name) for row in rows for name in row):
            return rows
    return []


def _lists_in(document: object) -> Iterator[list]:
    """All lists in a document that may be its records."""
    if isinstance(document, list):
        yield document
    elif isinstance(document, dict):
        yield from (value for value in document.values() if isinstance(value, list))
        if all(isinstance(value, dict) for value in document.values()):
            yield [{"step": key, **value} for key, value in document.items()]
        columns = {name: value for name, value in document.items() if isinstance(value, list)}
        yield [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=False)]
        yield from (each for value in document.values() if isinstance(value, dict) for each in _lists_in(value))


def _numbers(record: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """(path as a/b, number) for every number. Logs of this project hold null for NaN or infinity and name it in `nonfinite`."""
    for key, value in record.items():
        if key == "nonfinite" and isinstance(value, dict):
            yield from ((name, float(word)) for name, word in value.items())
        elif isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif not isinstance(value, bool) and (number := _number(value)) is not None:
            yield prefix + key, number


def _number(value: object) -> float | None:
    """A number, even in a string ("9.1", "1,000", "10/500"); None for anything else."""
    if isinstance(value, str):
        value = value.strip().partition("/")[0].replace(",", "")
    try:
        return value if isinstance(value, float) else float(str(value))  # a very long integer becomes infinity
    except ValueError:
        return None


# ---------------------------------------------------------------- tables


def _table_rows(text: str) -> list[Row]:
    """The rows below a header that names a loss, cells separated by , ; | tabs or blanks; [] without such a header."""
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
    if len(line) > 100_000:  # not a row of a log, and too long for the csv module
        return []
    line = line.strip().strip("|") if delimiter == "|" else line
    return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))]


def _is_header(names: list[str], line: str) -> bool:
    """True if these cells of `line` name columns, one of them a loss. "step: 1, loss: 9.1" is a line of text instead."""
    if not any(is_loss(name) for name in names) and [name.lower() for name in names] != ["wall time", "step", "value"]:
        return False
    named = all(re.search("[A-Za-z]", name) and len(name) < 80 and _number(name) is None for name in names if name)
    return (named or len(names) == 1) and not re.search(r"[:=]\s*[-+.\d]", line)


def _rows_under(names: list[str], lines: list[str], delimiter: str) -> list[Row]:
    """The rows of a table. CSV exports of TensorBoard name the tag only in the file name, so `value` is taken for the loss."""
    names = ["loss" if name.lower() == "value" else name for name in names]
    # A comma that does not separate cells may be a decimal point: "9,1234" cannot be thousands.
    comma = delimiter != "," and any(re.search(r"(?<![\d,])\d+,(?!\d{3}(?!\d))\d+", line) for line in lines)
    point = "." if comma else ","
    rows = []
    for line in lines:
        cells = _cells(line.replace(",", point), delimiter)
        rows.append({n: v for n, cell in zip(names, cells, strict=False) if (v := _number(cell)) is not None})
    return [row for row in rows if row]


# ---------------------------------------------------------------- TensorBoard


def _tensorboard_rows(path: Path) -> Iterator[Row]:
    """One row per step with all scalars of an event file, or of the event files in a folder."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        raise LogError(f"{path}: TensorBoard files need the package tensorboard: pip install tensorboard") from None
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


# ---------------------------------------------------------------- lines of text

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


def _text_rows(lines: Iterable[str]) -> Iterator[Row]:
    """The rows of tables (a header with step and loss, cells two spaces apart) and of lines with `name value` pairs.

    A step or an epoch may be on a line of its own, above the figures that it belongs to.
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
        elif row := pairs(line):
            meanings = {meaning(name): name for name in reversed(row)}
            own_step = next((row[meanings[counter]] for counter in STEP_COUNTERS if counter in meanings), None)
            found = own_step if own_step is not None else _step_without_name(line)
            step = found if found is not None else step
            epoch = row[meanings["epoch"]] if "epoch" in meanings else epoch
            if own_step is None and step is not None:
                row["step"] = step  # its own, or that of a line above: some programs print one figure per line
            if epoch is not None and "epoch" not in meanings and any(map(is_loss, row)):
                row["epoch"] = epoch
            yield row
        elif (found := _step_without_name(line)) is not None:
            step = found


class _Pairs:
    """Finds all `name value`, `name: value`, `'name': value` and `name=value` of a line; of equal names the first counts.

    Lines that differ only in their numbers are parsed once.
    """

    def __init__(self) -> None:
        self.known: dict[str, list[tuple[str, int, float]]] = {}
        """Words of a line: (name, index of its value among the numbers of the line, factor of a K or M after it) per pair."""

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
                name = f"val {found[0]}" if found.start() > begins and is_loss(found[0]) else found[0]
                places.setdefault(name, (name, index_of[value.start(1)], _TIMES[(value[2] or "").lower()]))
        has_loss = any(map(is_loss, places))  # other names matter only to the error about a log without a loss
        return [place for name, place in places.items() if meaning(name) or not has_loss]


def _step_without_name(line: str) -> float | None:
    """The step in forms such as `Epoch:[1/2](100/442)` or `10/500 [00:10<08:00`; None if there is none."""
    if found := _EPOCH_AND_BATCH.search(line):
        epoch, of_epochs, batch, batches = found.groups()
        earlier = int(epoch) - 1 if of_epochs else 0  # [1/2] counts from 1; a lone number may count from 0
        return earlier * int(batches) + int(batch)
    if not (found := _OUT_OF.search(line)):
        return None
    number, times = found.group(1, 2) if found[1] else found.group(5, 6)
    return _TIMES[times.lower()] * float(number) if number.strip(".") else None
