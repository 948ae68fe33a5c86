"""Training logs of any framework as rows of numbers: JSON (lines), CSV, tables, TensorBoard events and lines of text.

A row is {name as written: number}; names.py knows what a name means, log_table.py collects rows, training_log.py makes series
of them. The beginning of a file decides what it is; then it is read once, line by line. To add a text format, add a line to
TEXT_FORMATS; to add a kind of file, add a reader to `read_rows`.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pretrain.doctor.log_lines import Row, names_of_bare_columns, number_in, numbers_alone, text_rows
from pretrain.doctor.log_sources import LogError, Show, read_lines
from pretrain.doctor.names import is_judged, meaning

_STEP_MEAN = "the mean over ranks and micro-batches"
_LAST = "the last micro-batch of rank 0"
TEXT_FORMATS = {
    "MiniMind-like text": (r"Epoch:?\s*\[\d+/\d+\]\s*\(\s*\d+/\d+\)", f"{_LAST}; its steps count micro-batches"),
    "nanochat text": (r"^step \d{5}/\d{5} \(.*loss:", f"{_LAST}, smoothed"),
    "litgpt text": (r"\biter \d+ step \d+.*\bloss train", "a mean of rank 0 alone"),
    "nanoGPT text": (r"^iter \d+: loss", _LAST),
    "Megatron text": (r"\biteration\s+\d+/\s*\d+\s*\|.*loss", _STEP_MEAN),
    "fairseq text": (r"\btrain_inner\b", "bits, not nats"),
    "Marian text": (r"\bUp\. \d+ : Sen\. .* Cost \d", "the mean per target word since the last line"),
    "torchtitan text": (r"\bstep:\s+\d+\s+loss:\s+\S+\s+grad_norm:", _STEP_MEAN),
    "Hugging Face Trainer text": (r"\{'(loss|eval_loss)':", f"{_STEP_MEAN}, since the last line"),
}
"""Format: (a pattern of its lines, the loss that the published script behind it shows)."""
_HEAD_LINES, _HEAD_CHARACTERS = 5_000, 1 << 22
_LONGEST_DOCUMENT = 1 << 25
"""Characters of a JSON document that is parsed at once."""
_LONGEST_WORD = 1_000
_MLPERF = ":::MLLOG "
_NAME_KEYS = ("tag", "key", "metric", "name")
"""Keys or columns that hold the name of the figure in `value`."""


def read_rows(path: Path, show: Show | None = None) -> tuple[str, Iterator[Row]]:
    """(format, rows) of a file, of the folder of a run of this project or of TensorBoard, or of standard input (`-`).

    `show` is called with the bytes read so far. Raises LogError, OSError, now or while the rows are read.
    """
    if path.is_dir() and (path / "metrics.jsonl").is_file():
        path = path / "metrics.jsonl"
    if path.is_dir() or "tfevents" in path.name:
        return "TensorBoard events", _tensorboard_rows(path)
    lines = read_lines(path, show)
    head, characters = [], 0
    for line in lines:
        head.append(line)
        characters += len(line)
        if len(head) >= _HEAD_LINES or characters >= _HEAD_CHARACTERS:
            break
    if not head:
        raise LogError(f"{path}: is empty; give a log that holds at least one loss")
    everything = itertools.chain(head, lines)
    if head[0].startswith(_MLPERF):
        head = [line.removeprefix(_MLPERF) for line in head]
        everything = itertools.chain(head, (line.removeprefix(_MLPERF) for line in lines))
    if head[0].lstrip()[:1] in ("{", "[") and (rows := _json_rows(head, everything)):
        kind, rows = rows
        return kind, rows
    if table := _find_table(head):
        return "CSV", _table_rows(table, everything)
    if names := names_of_bare_columns(head):
        numbers = filter(None, map(numbers_alone, everything))
        return "numbers without names", (dict(zip(names, each, strict=False)) for each in numbers)
    counts = {name: sum(bool(re.search(shape, line)) for line in head[:2000]) for name, (shape, _) in TEXT_FORMATS.items()}
    name = max(counts, key=counts.get)
    return name if counts[name] else "text", text_rows(everything)


# ---------------------------------------------------------------- JSON


def _json_rows(head: list[str], everything: Iterator[str]) -> tuple[str, Iterator[Row]] | None:
    """(format, rows) of JSON lines, or of one document: a list of objects, an object that holds such a list
    (trainer_state.json), an object per step, or a list per name. None if they hold no loss."""
    records = [record for line in head if isinstance(record := _json(line), dict)]
    if len(records) <= 1:
        rows = _document_rows(head, everything)
        return None if rows is None else ("JSON", rows)
    rows = [_row_of(record) for record in records]
    if not _hold_loss(rows) and len(records) < 0.5 * len(head):
        return None
    ours = any("reference_lines/uniform" in row for row in rows)
    named = (_row_of(record) for line in everything if isinstance(record := _json(line), dict))
    return "metrics.jsonl of this project" if ours else "JSON", named


def _json(line: str) -> object:
    """What a line holds; None if it is torn, or text between the records."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _hold_loss(rows: list[Row]) -> bool:
    return any(is_judged(name) for row in rows for name in row)


def _document_rows(head: list[str], everything: Iterator[str]) -> Iterator[Row] | None:
    """The rows of the first list in a document that holds a loss. None, with nothing read, if there is no document or no loss.

    Of a torn document, or one that is too long to be parsed at once, the rows of its innermost objects.
    """
    text, complete = "\n".join(head), len(head) < _HEAD_LINES and sum(map(len, head)) < _HEAD_CHARACTERS
    if not any(is_judged(name) for name in re.findall(r'"([^"]{1,80})"\s*:', text)) and not text.startswith("[["):
        return None
    try:
        _, end = json.JSONDecoder(strict=False).raw_decode(text)
        if text[end:].strip():
            return None  # an object above lines of text
    except (ValueError, RecursionError) as error:
        if getattr(error, "pos", 0) < len(text) - _LONGEST_WORD:
            return None  # not JSON
    if not complete:
        parts, characters = [], 0
        for line in everything:
            parts.append(line)
            characters += len(line)
            if characters > _LONGEST_DOCUMENT:
                break
        text = "\n".join(parts)
    try:
        document = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return _innermost_objects(itertools.chain([text], everything if not complete else []))
    for candidate in [*_lists_in(document), [document]]:
        rows = [_row_of(record) for record in candidate if isinstance(record, dict)]
        if _hold_loss(rows):
            return iter(rows)
    return None


def _lists_in(document: object) -> Iterator[list]:
    """All lists in a document that may be its records."""
    if isinstance(document, list):
        yield document
        if document and all(isinstance(each, list) and len(each) == 3 for each in document):  # saved by TensorBoard's page
            yield [{"step": step, "loss": value} for _, step, value in document]
    elif isinstance(document, dict):
        yield from (value for value in document.values() if isinstance(value, list))
        if all(isinstance(value, dict) for value in document.values()):
            yield [{"step": key, **value} for key, value in document.items()]
        columns = {name: value for name, value in document.items() if isinstance(value, list)}
        yield [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=False)]
        yield from (each for value in document.values() if isinstance(value, dict) for each in _lists_in(value))


def _innermost_objects(parts: Iterable[str]) -> Iterator[Row]:
    """The rows of all objects that hold no other objects, in a document of any length or a torn one."""
    waiting, characters = [], 0
    for part in itertools.chain(parts, [None]):
        if part is not None:
            waiting.append(part)
            characters += len(part)
            if characters < _HEAD_CHARACTERS:
                continue
        text, end = "\n".join(waiting), 0
        for found in re.finditer(r"\{[^{}]*\}", text):
            end = found.end()
            if isinstance(record := _json(found[0]), dict):
                yield _row_of(record)
        waiting, characters = [text[end:][-_HEAD_CHARACTERS // 4 :]], 0


def _row_of(record: dict) -> Row:
    """The numbers of a record. One with a name and a `value` holds that figure."""
    row = dict(_numbers(record))
    if "value" in row and (name := next((record[key] for key in _NAME_KEYS if isinstance(record.get(key), str)), None)):
        row[name] = row.pop("value")
    return row


def _numbers(record: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """(path as a/b, number) for every number. Logs of this project hold null for NaN or infinity and name it in `nonfinite`."""
    for key, value in record.items():
        if type(value) is float:
            yield prefix + key, value
        elif key == "nonfinite" and isinstance(value, dict):
            yield from ((name, float(word)) for name, word in value.items())
        elif isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif not isinstance(value, bool) and (number := number_in(value)) is not None:
            yield prefix + key, number


# ---------------------------------------------------------------- tables

_RULE = re.compile(r"[\s|:+─-╿-]+")
_RUN_COLUMNS = {"run", "run_id", "run_name", "run id", "run name", "experiment", "exp"}
_SPLIT_COLUMNS = {"split", "phase", "stage", "subset", "mode"}

Table = tuple[list[str], str, bool]
"""(names of the columns, delimiter, True if a comma is the decimal point)."""


def _find_table(head: list[str]) -> Table | None:
    """The table below a header that names a loss, cells separated by , ; | tabs or blanks; None without such a header."""
    lines = [line for line in map(_with_bars, head) if not _RULE.fullmatch(line)]
    for number, header in enumerate(lines[:20]):
        for delimiter in ",;\t| ":
            names = _cells(header.lstrip("#"), delimiter)
            if _is_header(names, header) and number + 1 < len(lines):
                first = [number_in(cell) for cell in _cells(lines[number + 1], delimiter)]
                wanted = len(names) if delimiter == " " else 1
                if len(first) == len(names) and len(first) - first.count(None) >= wanted:
                    below = lines[number + 1 :]
                    # A comma that does not separate cells may be a decimal point: "9,1234" cannot be thousands.
                    comma = delimiter != "," and any(re.search(r"(?<![\d,])\d+,(?!\d{3}(?!\d))\d+", line) for line in below)
                    rows = sum(1 for _ in _rows_under(names, delimiter, comma, below))
                    return (names, delimiter, comma) if rows > 0.5 * len(below) else None
    return None


def _table_rows(table: Table, everything: Iterator[str]) -> Iterator[Row]:
    names, delimiter, comma = table
    lines = map(_with_bars, everything)
    below = itertools.dropwhile(lambda line: _cells(line.lstrip("#"), delimiter) != names, lines)
    next(below)
    return _rows_under(names, delimiter, comma, below)


def _with_bars(line: str) -> str:
    return line if line.isascii() else re.sub("[│┃]", "|", line)


def _cells(line: str, delimiter: str) -> list[str]:
    if delimiter == " ":
        return line.split()
    if len(line) > 100_000:  # not a row of a log, and too long for the csv module
        return []
    line = line.strip().strip("|") if delimiter == "|" else line
    if '"' not in line:
        return line.split(delimiter) if " " not in line else [cell.strip() for cell in line.split(delimiter)]
    return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))]


def _is_header(names: list[str], line: str) -> bool:
    """True if these cells of `line` name columns, one of them a loss. "step: 1, loss: 9.1" is a line of text instead."""
    lower = [name.lower() for name in names]
    if not any(map(is_judged, names)) and not {"step", "value"} <= set(lower):
        return False
    named = all(re.search("[A-Za-z]", name) and len(name) < 80 and number_in(name) is None for name in names if name)
    return (named or len(names) == 1) and not re.search(r"[:=]\s*[-+.\d]", line)


def _rows_under(names: list[str], delimiter: str, comma: bool, lines: Iterable[str]) -> Iterator[Row]:
    """The rows of a table. CSV exports of TensorBoard name the tag only in the file name, so `value` is taken for the loss.

    In a table with a column of runs, or of training and validation, the names of the losses begin with its cell.
    """
    lower = [name.lower() for name in names]
    run, split, tag = (
        next((place for place, name in enumerate(lower) if name in columns), None)
        for columns in (_RUN_COLUMNS, _SPLIT_COLUMNS, _NAME_KEYS if "value" in lower else ())
    )
    names = ["loss" if name.lower() == "value" else name for name in names]
    wanted = [(place, name) for place, name in enumerate(names) if meaning(name)]
    for line in lines:
        cells = _cells(line.replace(",", ".") if comma else line, delimiter)
        row = {}
        for place, name in wanted:
            if place < len(cells) and (cell := cells[place]):
                try:
                    row[name] = float(cell)
                except ValueError:
                    if (value := number_in(cell)) is not None:
                        row[name] = value
        if tag is not None and tag < len(cells) and "loss" in row:
            row[cells[tag]] = row.pop("loss")
        if split is not None and split < len(cells) and cells[split]:
            row = {f"{cells[split]} {name}" if is_judged(name) else name: value for name, value in row.items()}
        if run is not None and run < len(cells) and cells[run]:
            row = {f"{cells[run]} - {name}" if is_judged(name) else name: value for name, value in row.items()}
        if row:
            yield row


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
    for tag in filter(meaning, events.Tags()["scalars"]):
        for event in events.Scalars(tag):
            by_step.setdefault(event.step, {"step": float(event.step)})[tag] = event.value
    for tag in filter(meaning, events.Tags()["tensors"]):
        if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars":
            for event in events.Tensors(tag):
                by_step.setdefault(event.step, {"step": float(event.step)})[tag] = float(make_ndarray(event.tensor_proto))
    yield from (by_step[step] for step in sorted(by_step))
