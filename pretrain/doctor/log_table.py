"""The rows of a log by column, in bounded memory: a long log is thinned to about 200,000 rows, and what stands out is kept.

Knows names and their meaning, not what a curve should look like.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Iterable

import numpy as np

from pretrain.doctor.log_lines import LEADING, Row
from pretrain.doctor.names import STEP_COUNTERS, is_judged, meaning

MOST_ROWS = 200_000
"""Logs with at most so many rows are kept completely."""
_MOST_CELLS = 16_000_000
_MOST_NAMES = 10_000
_MOST_NAMES_OF_A_MEANING = 64
_MOST_SPECIAL = 10_000  # rows of one kind that are kept beside the regular ones
_EDGE = 100  # rows at either end that are kept
_BATCH = 4_096  # rows that are added at once
_BLOCK = 2_048  # rows of the file in which the highest and the lowest loss are kept, while every row is kept
OTHER_KEPT = ("reference_lines/", LEADING)
"""Names without a meaning whose values are kept too."""


class Table:
    """Columns of numbers. Once it is filled, entry r of every column belongs to the same row of the log.

    Of a log with more than 2 * MOST_ROWS rows, it keeps the rows of every 2nd, 4th, ... step, and besides: the rows at both
    ends, non-finite values, names that are rare (validations), places where the steps go back or the count of skipped steps
    changes, and the highest and lowest loss of each block. A step is kept with all its rows, or not at all.
    """

    def __init__(self, rows: Iterable[Row]):
        self.counts: Counter[str] = Counter()
        """How many rows of the file have each name."""
        self._cells: dict[str, tuple[array, array]] = {}  # name: (row numbers, values)
        self._stored: Counter[str | None] = Counter()  # names of each meaning
        self._read = self._level = 0
        self._unit = 1.0
        rows, kept = iter(rows), 0
        while batch := list(itertools.islice(rows, _BATCH)):
            self._add(batch)
            kept += len(batch)
            if kept >= 2 * MOST_ROWS or self._number_of_cells() > _MOST_CELLS:
                kept = self._thin()
        if self._level:
            self._keep(self._wanted())
        self.names: dict[str | None, list[str]] = {}
        """The names of each meaning, the most frequent first."""
        for name, _ in self.counts.most_common():
            self.names.setdefault(meaning(name), []).append(name)
        numbers = self._numbers()
        self.rows = len(numbers)
        self.thinned = self._level > 0
        for name, (rows_of, values) in self._cells.items():
            self._cells[name] = np.searchsorted(numbers, rows_of), np.frombuffer(values)

    def has(self, *names: str) -> np.ndarray:
        """(R,) True for rows with any of the names."""
        there = np.zeros(self.rows, bool)
        for name in names:
            if name in self._cells:
                there[self._cells[name][0]] = True
        return there

    def column(self, *names: str) -> np.ndarray:
        """(R,) the value of the first of these names that a row has; NaN for rows without any."""
        values = np.full(self.rows, np.nan)
        for name in reversed(names):
            if name in self._cells:
                values[self._cells[name][0]] = self._cells[name][1]
        return values

    # ---------------------------------------------------------------- filling

    def _add(self, batch: list[Row]) -> None:
        for name in dict.fromkeys(itertools.chain.from_iterable(batch)):
            values = [row[name] for row in batch if name in row]
            is_new = name not in self.counts
            self.counts[name] += len(values)
            if is_new and self._make_room_for(name):
                self._cells[name] = array("q"), array("d")
            if name in self._cells:
                everywhere = len(values) == len(batch)
                rows = range(len(batch)) if everywhere else (i for i, row in enumerate(batch) if name in row)
                self._cells[name][0].extend([self._read + i for i in rows])
                self._cells[name][1].extend(values)
        self._read += len(batch)

    def _make_room_for(self, name: str) -> bool:
        """True if the values of this new name are to be kept."""
        if len(self.counts) > _MOST_NAMES:
            del self.counts[name]
            return False
        kind = meaning(name)
        self._stored[kind] += kind is not None
        return self._stored[kind] <= _MOST_NAMES_OF_A_MEANING if kind else name.startswith(OTHER_KEPT)

    def _number_of_cells(self) -> int:
        return sum(len(values) for _, values in self._cells.values())

    # ---------------------------------------------------------------- thinning

    def _thin(self) -> int:
        """Drops rows until there is room again; returns the number of those that are left."""
        if not self._level:
            steps = self._step_of(self._numbers())
            changes = np.abs(np.diff(steps))
            self._unit = float(np.median(changes[changes > 0])) if (changes > 0).any() else 1.0
            self._level = 1
        while True:
            self._keep(self._wanted())
            left = len(self._numbers())
            if (left <= 1.25 * MOST_ROWS and self._number_of_cells() < _MOST_CELLS / 1.5) or self._level > 40:
                return left
            self._level += 1

    def _numbers(self) -> np.ndarray:
        """The row numbers, in the file, of all rows that are kept."""
        there = np.zeros(self._read, bool)
        for rows, _ in self._cells.values():
            there[np.frombuffer(rows, np.int64)] = True
        return np.flatnonzero(there)

    def _keep(self, numbers: np.ndarray) -> None:
        there = np.zeros(self._read, bool)
        there[numbers] = True
        for name, (rows, values) in self._cells.items():
            kept = there[np.frombuffer(rows, np.int64)]
            new = array("q"), array("d")
            new[0].frombytes(np.frombuffer(rows, np.int64)[kept].tobytes())
            new[1].frombytes(np.frombuffer(values)[kept].tobytes())
            self._cells[name] = new

    def _step_of(self, numbers: np.ndarray) -> np.ndarray:
        """The step of each row; its number in the file, if it has none."""
        steps = numbers.astype(float)
        for counter in reversed(STEP_COUNTERS):
            for name in self._cells:
                if meaning(name) == counter:
                    rows, values = self._arrays(name)
                    steps[np.searchsorted(numbers, rows)] = values
        return np.where(np.isfinite(steps), steps, 0.0)

    def _arrays(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        rows, values = self._cells[name]
        return np.frombuffer(rows, np.int64), np.frombuffer(values)

    def _wanted(self) -> np.ndarray:
        """The row numbers to keep at this level."""
        numbers = self._numbers()
        steps = self._step_of(numbers)
        special = np.zeros(len(numbers), bool)
        special[:_EDGE] = special[-_EDGE:] = True
        for name in self._cells:
            rows, values = self._arrays(name)
            for of_one_kind in self._special_rows(name, rows, values):
                special[np.searchsorted(numbers, of_one_kind)] = True
        regular = np.floor(steps / self._unit) % 2**self._level == 0
        return numbers[regular | np.isin(steps, np.unique(steps[special]))]

    def _special_rows(self, name: str, rows: np.ndarray, values: np.ndarray) -> Iterable[np.ndarray]:
        """The rows that stand out in one column, by kind."""
        yield rows[~np.isfinite(values)][:_MOST_SPECIAL]
        if self.counts[name] < min(0.05 * self._read, 2 * _MOST_SPECIAL):
            yield rows
        kind, changes = meaning(name), np.diff(values)
        if kind in STEP_COUNTERS or kind == "skipped":
            found = np.flatnonzero(changes < 0 if kind in STEP_COUNTERS else changes != 0)
            if len(found) <= _MOST_SPECIAL:
                yield rows[np.unique([found, found + 1])]
        if is_judged(name) and len(rows):
            finite = np.isfinite(values)
            rows, values = rows[finite], values[finite]
            blocks = rows // (_BLOCK << self._level)
            order = np.lexsort((values, blocks))
            ends = np.flatnonzero(np.r_[np.diff(blocks[order]) != 0, True]) if len(order) else order
            begins = np.r_[0, ends[:-1] + 1] if len(order) else order
            yield rows[order[np.r_[begins, ends]]]
