"""Samples that a run leaves out for good, and the stream of positions without them. Integers and one small text file.

    position -> position in the whole stream (order.py) -> source, epoch, sample

The stream that a run reads is the whole one minus the samples in quarantine, in every epoch, and nothing else moves: it is
still a pure function of the position, the same for any number of ranks, and takes no memory but the list. So samples that are
put into quarantine while a run goes on change nothing of what it has read, as long as their first place lies ahead.

The file, written by hand or by tools/inspect_data.py:

    sequence_length 1024             # what a sample's number means depends on it
    web_train 17                     # source, as inspect_data names it, and sample
    web_train 20-23                  # both ends are left out
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np

from .indexed import DataError
from .order import Order

Ranges = list[list[int]]
"""[source number, first, end): rising, none touching another."""


def read(path: str | Path, names: list[str], num_samples: list[int], sequence_length: int) -> Ranges:
    """What the file leaves out of sources with these names and numbers of samples. Raises DataError with every problem."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.quarantine: {path}: cannot be read ({error})") from None
    problems, found, length = [], [], None
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, span = " ".join(words[:-1]), words[-1]
        first, _, last = span.partition("-")
        last = last or first
        if not (first.isdecimal() and last.isdecimal()):
            problem = f"{span!r} is no number of a sample; write SOURCE FIRST or SOURCE FIRST-LAST"
        elif name == "sequence_length":
            length = int(first)
            continue
        elif name not in names:
            problem = f"no source is called {name!r}; there is {', '.join(names)}"
        elif not int(first) <= int(last) < num_samples[names.index(name)]:
            problem = f"{span} is not allowed, {name} has samples 0 to {num_samples[names.index(name)] - 1}"
        else:
            found.append((names.index(name), int(first), int(last) + 1))
            continue
        problems.append(f"data.quarantine: {path}:{number}: {problem}")
    if length != sequence_length:
        is_for = "does not say sequence_length" if length is None else f"is for sequence_length {length}"
        problems.insert(0, f"data.quarantine: {path}: {is_for}, this run has {sequence_length}: its samples are others")
    ranges = merged(found)
    for source, name in enumerate(names):
        if sum(end - first for each, first, end in ranges if each == source) == num_samples[source]:
            problems.append(f"data.quarantine: {path}: leaves nothing of {name}; remove the source from data.train instead")
    if problems:
        raise DataError("\n".join(problems))
    return ranges


def append(path: str | Path, sequence_length: int, samples: Iterable[tuple[str, int, str]]) -> None:
    """Adds (source, sample, comment) to the file, which is made when there is none. Raises DataError: another length."""
    path = Path(path)
    text = path.read_text(encoding="utf-8") if path.exists() else f"sequence_length {sequence_length}\n"
    if ["sequence_length", str(sequence_length)] not in [line.partition("#")[0].split() for line in text.splitlines()]:
        raise DataError(f"{path}: is not for sequence_length {sequence_length}; choose another file")
    text += "" if text.endswith("\n") else "\n"
    text += "".join(f"{source} {sample}  # {' '.join(comment.split())}\n" for source, sample, comment in samples)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def merged(found: Iterable[tuple[int, int, int]]) -> Ranges:
    """Ranges in any order, as `Ranges`."""
    ranges: Ranges = []
    for source, first, end in sorted(found):
        if ranges and ranges[-1][0] == source and first <= ranges[-1][2]:
            ranges[-1][2] = max(ranges[-1][2], end)
        else:
            ranges.append([source, first, end])
    return ranges


class Quarantine:
    """Positions of the whole stream <-> positions without the samples in `ranges`."""

    def __init__(self, order: Order, ranges: Ranges):
        self._order, self.ranges = order, ranges
        self._samples = [
            np.concatenate([np.arange(first, end) for each, first, end in ranges if each == source] or [np.empty(0, np.int64)])
            for source in range(len(order.num_samples))
        ]
        self.sizes = [len(samples) for samples in self._samples]
        """Samples left out of each source."""
        self._places = lru_cache(maxsize=4 * len(order.num_samples))(self._find_places)

    def _find_places(self, source: int, epoch: int) -> np.ndarray:
        """Positions of the whole stream where the samples in quarantine stand in an epoch of their source, rising."""
        return np.sort(self._order.positions(source, epoch, self._samples[source]))

    def count(self, end: int) -> int:
        """How many of the first `end` positions of the whole stream are left out."""
        total = 0
        for source, provided in enumerate(self._order.blend.counts(end)):
            if self.sizes[source]:
                epoch = provided // self._order.num_samples[source]
                total += epoch * self.sizes[source] + int(np.searchsorted(self._places(source, epoch), end))
        return total

    def begin(self, position: int) -> int:
        """The least position of the whole stream before which `position` samples are kept."""
        whole = position
        while (moved := position + self.count(whole)) > whole:
            whole = moved
        return whole

    def locate(self, position: int, count: int) -> np.ndarray:
        """Positions in the whole stream (count,) of the positions [position, position + count)."""
        first, end = self.begin(position), self.begin(position + count)
        kept = np.ones(end - first, dtype=bool)
        before, after = self._order.blend.counts(first), self._order.blend.counts(end)
        for source, size in enumerate(self._order.num_samples):
            if self.sizes[source]:
                for epoch in range(before[source] // size, after[source] // size + 1):
                    places = self._places(source, epoch)
                    kept[places[(places >= first) & (places < end)] - first] = False
        return first + np.flatnonzero(kept)

    def position(self, whole: int) -> int | None:
        """The position of one of the whole stream; null: it is left out."""
        before = self.count(whole)
        return whole - before if self.count(whole + 1) == before else None

    def changed_before(self, other: Quarantine, position: int) -> tuple[int, int] | None:
        """A (source, sample) that only one of the two leaves out, although a run with `other` has been at its first place
        before `position`; null: what such a run has read does not change."""
        read_up_to = other.begin(position)
        for source, (mine, theirs) in enumerate(zip(self._samples, other._samples, strict=True)):
            different = np.setxor1d(mine, theirs)
            early = self._order.positions(source, 0, different) < read_up_to
            if early.any():
                return source, int(different[early][0])
        return None
