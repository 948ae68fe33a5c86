"""Lines of text as rows of numbers: `name value` pairs, tables in text, progress bars, steps without a name.

Lines that differ only in their digits are parsed once: the places of their figures are remembered. Knows no kinds of files
(log_formats.py) and no series (training_log.py).
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pretrain.doctor.names import STEP_COUNTERS, is_judged, meaning

Row = dict[str, float]
LEADING = "number at the head of the line"
"""The name of such a number; training_log.py takes it for the step if it rises from line to line."""

_NUMBER = r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf(?:inity)?)\b"
_WORD = r"(?!nan\b|inf\b)[A-Za-z_][\w/.\-]*"
_NAME = re.compile(rf"(?<![A-Za-z0-9_]){_WORD}(?: {_WORD})*", re.IGNORECASE)
_VALUE = re.compile(  # perhaps behind a word in parentheses; not the `.4f` of "{loss:.4f}"
    rf"[\"']?(?: \([A-Za-z][\w ./-]*\))?\s*[:=]?\s*(?:tensor\()?[\"'\[(]?\s*"
    rf"(?!\.\d+[efg]\}})({_NUMBER})(?:([KM])(?![A-Za-z]))?",
    re.IGNORECASE,
)
_BEFORE = re.compile(rf"(?:^|(?<=[\s(\[|:=,;]))({_NUMBER})\s*$", re.IGNORECASE)
_NUMBERS_FIRST = re.compile(rf"\W*(?:{_NUMBER})\s+[A-Za-z].*?({_WORD})\W*$", re.IGNORECASE)
_LEADING = re.compile(r"(?:^|\] )\s*\[?(\d+)[\]:]?\s*[|,;]?\s+(?=[A-Za-z\"'{(])|- +(\d+) - ")
_EPOCH_AND_BATCH = re.compile(r"epoch:?\s*\[?\s*(\d+)\s*(/\s*\d+)?\s*\]?\s*[\[(]\s*(\d+)\s*/\s*(\d+)\s*[\])(]", re.IGNORECASE)
_COUNT = r"([\d.]+)([kM]?)"
_OUT_OF = re.compile(
    rf"(?:^|[\[(|]|\bepoch \d+:)\s*{_COUNT}\s*/\s*{_COUNT}\s*(?:[\])\[(━]|- |(?<=\d) +(?=\w*loss))|\b{_COUNT}it/{_COUNT}it\b"
)
_TIMES = {"": 1.0, "k": 1e3, "m": 1e6}
_AT_STEP = re.compile(r"\bat (iteration|step)\b")  # "validation loss at iteration 100 | lm loss value: 9.1"
_OF_VALIDATION = re.compile(r"\b(validation|valid|val|evaluation|eval|test)\b", re.IGNORECASE)
_NEXT_BAR = re.compile(r"(?<=\])(?=[^\[\]]{0,80}?\d+%\|)")  # bars that follow each other without a line break
_C_TRAINERS = (  # two programs in C write `s:10 trl:3.1`, and `10 train 3.1`
    (re.compile(r"^s:(\d+) trl:"), r"step \1 train loss:"),
    (re.compile(r"^s:(\d+) t[e]l:"), r"step \1 val loss:"),
    (re.compile(r"^(\d+) (train|val) (?=[\d.]+\s*$)"), r"step \1 \2 loss "),
)
_TELLING = re.compile(
    r"loss|step|iter|epoch|ppl|perp|nll|ent\b|entropy|cost|\bce\b|[mc]lm\b|norm|\blr\b|l\.r|rate|batch|update|\bval|\bup|\d+\.?\d*[kM]?\s*/\s*\d",
    re.IGNORECASE,
)
"""Lines without any of these hold no figure that counts."""
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
_DIGITS = str.maketrans("123456789", "000000000")
_KNOWN_LINES = 20_000
_LONGEST_KNOWN = 2_000

_CODE = re.compile(  # the beginning of a statement, which programs do not write to their logs
    r"\s*(?:(?:async )?def \w+\(|class \w+\s*[:(]|import \w|from [\w.]+ import\b|if __name__|@\w[\w.]*(?:\(.*)?$|raise \w"
    r"|return\b|(?:if|elif|for|while|with|except)\b.*:\s*(?:#.*)?$|(?:else|try|finally):|print\(|assert |pass$|#include\b"
    r"|(?:const|static|void) )"
)
_CODE_CONTINUES = re.compile(  # indented, a closing bracket, a comment, an assignment, a call
    r"[ \t]+\S|[)\]}]|#|\"\"\"|'''|\w[\w.]*(?:\[[^\]]*\])?(?:\s*,\s*\w+)*\s*(?::\s*\w+\s*)?[-+*/]?=(?!=)\s*\S"
    r"|\w[\w.]*\(.*\)?\s*$"
)


@dataclass(frozen=True)
class _Shape:
    """The places of the figures in lines that differ only in their digits."""

    pairs: tuple[tuple[str, slice, float], ...] = ()
    """(name, place, factor of a K or M after it)."""
    step: str | None = None
    """The name among `pairs` that counts steps."""
    epoch: str | None = None
    of_epochs: bool = False
    bare_step: tuple[slice, ...] = ()
    """A step without a name: (batch), or (batch, epoch, batches in an epoch)."""
    bare_times: float = 1.0
    is_judged: bool = False
    may_be_header: bool = False
    is_code: bool = False
    continues_code: bool = False


def text_rows(lines: Iterable[str]) -> Iterator[Row]:
    """The rows of tables (a header with step and loss, cells two spaces apart) and of lines with `name value` pairs.

    Some programs print one figure per line: those of one step are one row. Source code is left out.
    """
    waiting: Row = {}
    for row, begins in _rows(lines):
        if begins or waiting.get("step") != row.get("step") or (row.keys() - {"step", "epoch"}) & waiting.keys():
            if waiting:
                yield waiting
            waiting = row
        else:
            waiting |= row
    if waiting:
        yield waiting


def _rows(lines: Iterable[str]) -> Iterator[tuple[Row, bool]]:
    """(figures of a line, False if it is one figure of a step that a line above names)."""
    header: list[str] = []
    step = epoch = None
    taken = None  # the epoch of the line that took the step from a line above
    first_epoch = 1.0
    for line, shape in _without_code(_shapes(lines)):
        cells = re.split(r"\s{2,}|\t+", line.strip()) if header or shape.may_be_header else []
        if {"step", "loss"} <= {cell.lower() for cell in cells}:
            header = cells
            continue
        if header and len(cells) == len(header):
            numbers = ((name, number_in(cell)) for name, cell in zip(header, cells, strict=True))
            if row := {name: number for name, number in numbers if number is not None}:
                yield row, True
            continue
        row = {name: times * _float(line[place]) for name, place, times in shape.pairs}
        if shape.epoch:
            epoch = row[shape.epoch]
        if shape.step:
            step, taken = row[shape.step], None
        elif shape.bare_step:
            values = [_float(line[place]) for place in shape.bare_step]
            step, taken = values[0] * shape.bare_times, None
            if shape.of_epochs:  # counted from 1, unless a line says [0/2]
                first_epoch = min(first_epoch, values[1])
                step = (values[1] - first_epoch) * values[2] + values[0]
        if not row:
            continue
        begins = bool(shape.step or shape.bare_step or LEADING in row)
        if shape.bare_step:
            row["step"] = step
        elif not begins and step is not None and (not shape.epoch or taken in (None, epoch)):
            row["step"] = step
            taken = epoch if shape.is_judged else taken
        if epoch is not None and shape.is_judged and not shape.epoch:
            row["epoch"] = epoch
        yield row, begins or bool(shape.epoch) or len(shape.pairs) > 1


def _without_code(lines: Iterator[tuple[str, _Shape]]) -> Iterator[tuple[str, _Shape]]:
    """Leaves out statements and what follows them: indented lines, assignments, closing brackets."""
    in_code = False
    assigned: Counter[int] = Counter()
    for line, shape in lines:
        if in_code and shape.is_judged and not line[0].isspace():
            assigned[id(shape)] += 1  # lines such as `loss = 9.1` that come again and again are no code
        in_code = shape.is_code or (in_code and shape.continues_code and assigned[id(shape)] < 3)
        if not in_code:
            yield line, shape


def _shapes(lines: Iterable[str]) -> Iterator[tuple[str, _Shape]]:
    """(line, its shape) for every line that may matter. Shapes are remembered by the line with all its digits made 0."""
    known: dict[str, _Shape] = {}
    nothing, code = _Shape(), _Shape(continues_code=True)
    for number, each in enumerate(lines):
        each = each if each.isascii() else each.translate(_QUOTES)
        for line in _NEXT_BAR.split(each) if each.count("%|") > 1 else (each,):
            if (shape := known.get(key := line.translate(_DIGITS))) is None:
                if line[0].isascii() and line[0] in "s0123456789":
                    for pattern, words in _C_TRAINERS:
                        line = pattern.sub(words, line)
                    key = line.translate(_DIGITS)
                if number < 1000 or _TELLING.search(line) or _CODE.match(line):
                    shape = _parse(line)
                else:
                    shape = code if _CODE_CONTINUES.match(line) else nothing
                if len(line) < _LONGEST_KNOWN:
                    if len(known) >= _KNOWN_LINES:
                        known.clear()
                    known[key] = shape
            yield line, shape


def _parse(line: str) -> _Shape:
    """The shape of a line: all `name value`, `name: value`, `'name': value`, `name=value` or `value name`; of equal names the
    first counts."""
    places = _pairs(line)
    judged = any(map(is_judged, places))
    pairs = [(name, place, times) for name, (place, times) in places.items() if meaning(name) or not judged]
    meanings = {meaning(name): name for name in reversed(places)}
    step = next((meanings[counter] for counter in STEP_COUNTERS if counter in meanings), None)
    bare, times, of_epochs = ((), 1.0, False) if step else _bare_step(line)
    if not step and not bare and judged and (found := _LEADING.search(line)):
        pairs.append((LEADING, slice(*found.span(found.lastindex)), 1.0))
    return _Shape(
        pairs=tuple(pairs),
        step=step,
        epoch=meanings.get("epoch"),
        of_epochs=of_epochs,
        bare_step=bare,
        bare_times=times,
        is_judged=judged,
        may_be_header=bool(re.search("step.*loss|loss.*step", line, re.IGNORECASE)),
        is_code=bool(_CODE.match(line)),
        continues_code=bool(_CODE_CONTINUES.match(line)),
    )


def _pairs(line: str) -> dict[str, tuple[slice, float]]:
    """{name: (place of its number, factor of a K or M after it)}. Names after a word such as `valid` begin with `val`."""
    of_validation = _OF_VALIDATION.search(line)
    begins = len(line) if of_validation is None or "train" in line else of_validation.start()
    of_epoch = "epoch " if re.search(r"\|\s*train\s*\|", line) else ""  # fairseq: the mean over an epoch, beside its lines
    line, position = _AT_STEP.sub(lambda found: f",  {found[1]}", line), 0
    places: dict[str, tuple[slice, float]] = {}
    free = 0  # the end of the last value: a number after it has no name yet
    ends_with = _NUMBERS_FIRST.match(line)
    numbers_first = bool(ends_with and meaning(ends_with[1]))  # "9.21 loss 3e-4 lr"
    while found := _NAME.search(line, position):
        name, value = found[0], _VALUE.match(line, found.end())
        position = found.end()
        before = _BEFORE.search(line, free, found.start())
        if before and meaning(name) and (numbers_first or not value):
            place, times, free = slice(*before.span(1)), 1.0, found.end()
        elif value and not numbers_first:
            place, times = slice(*value.span(1)), _TIMES[(value[2] or "").lower()]
            position = free = value.end()
        else:
            continue
        if is_judged(name):
            name = f"val {name}" if found.start() > begins else of_epoch + name
        places.setdefault(name, (place, times))
    return places


def _bare_step(line: str) -> tuple[tuple[slice, ...], float, bool]:
    """(places, factor, True if the number of epochs is given) of a step in forms such as `Epoch:[1/2](100/442)` or
    `10/500 [00:10<08:00`; no places if there is none."""
    if found := _EPOCH_AND_BATCH.search(line):
        return tuple(slice(*found.span(group)) for group in (3, 1, 4)), 1.0, found[2] is not None
    if found := _OUT_OF.search(line):
        group = 1 if found[1] else 5
        if found[group].strip("."):
            return (slice(*found.span(group)),), _TIMES[found[group + 1].lower()], False
    return (), 1.0, False


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float(text.replace(",", ""))


def number_in(value: object) -> float | None:
    """A number, even in a string ("9.1", "1,000", "10/500"); None for anything else."""
    if isinstance(value, str):
        value = value.strip().partition("/")[0].replace(",", "")
    try:
        return value if isinstance(value, float) else float(str(value))  # a very long integer becomes infinity
    except ValueError:
        return None


# ---------------------------------------------------------------- numbers alone


def numbers_alone(line: str) -> list[float] | None:
    """The numbers of a line that holds nothing else, such as `10 9.21` or `tensor(9.21, device='cuda:0')`, perhaps behind a
    progress bar; None for other lines."""
    line = re.sub(r"^[^|]*%\|[^|]*\|[^\[]*\[[^\]]*\]|tensor\(([^,)]*)[^)]*\)", r"\1", line)
    numbers = [number_in(cell) for cell in re.split(r"[\s,;]+", line.strip(" \t,;"))]
    return None if None in numbers else numbers


def names_of_bare_columns(lines: list[str]) -> list[str]:
    """Names for the columns of lines that hold nothing but numbers: step and loss; [] if other lines are more than a tenth.

    The step is the first column of rising whole numbers, the loss the first other one that is no time stamp.
    """
    rows = [numbers_alone(line) for line in lines[:1000]]
    rows = [row for row in rows if row and len(row) == len(next(filter(None, rows)))]
    if len(rows) < max(2, 0.9 * len(lines[:1000]) - 1):
        return []
    names: list[str] = []
    for column in zip(*rows, strict=True):
        whole = all(math.isfinite(value) and value == int(value) for value in column)
        rises = column[0] < column[-1] and all(b >= a for a, b in itertools.pairwise(column))
        if whole and rises and column[0] < 1e9 and "step" not in names:
            names.append("step")
        else:
            names.append("other" if whole or column[0] > 1e9 or "loss" in names else "loss")
    return names if "loss" in names and (len(names) > 1 or len(rows) > 2) else []
