"""Samples that a run leaves out: those in quarantine permanently, and those of steps that a rollback skips. No torch.

    position -> position in the full stream (order.py) -> source, epoch, sample

*Quarantine.* The stream that a run reads is the full stream minus the samples in quarantine, in every epoch; nothing else
moves. It stays a pure function of the position, the same for any number of ranks, and needs no memory but the list. A run
may be resumed with a larger quarantine as long as the added samples lie ahead of it. The file (data.quarantine) is written
by hand or by tools/inspect_data.py:

    sequence_length 1024             # sample numbers depend on it; that of data.sequence_length, in every stage
    web_train 17                     # name of the source, as inspect_data prints it, and sample
    web_train 20-23                  # both ends are excluded

*Skipped positions.* After a rollback the run jumps over the positions of the steps on which it diverged. A skipped range lies
ahead of the run or behind it; a step never straddles one, because it starts where the previous step or a range ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np

from pretrain.files import write_atomically

from .indexed import DataError
from .order import Order
from .passes import NEVER

SampleRanges = list[list[int]]
"""[source number, first, end): sorted, disjoint and not adjacent."""
PositionRanges = list[list[int]]
"""[first, end): sorted, disjoint and not adjacent."""


def merge(ranges: Iterable[tuple[int, int, int]]) -> SampleRanges:
    """(source number, first, end) in any order, overlapping or not, as `SampleRanges`."""
    merged: SampleRanges = []
    for source, first, end in sorted(ranges):
        if merged and merged[-1][0] == source and first <= merged[-1][2]:
            merged[-1][2] = max(merged[-1][2], end)
        else:
            merged.append([source, first, end])
    return merged


# ---------------------------------------------------------------- the quarantine


def read_quarantine(path: str | Path, names: list[str], num_samples: list[int], sequence_length: int) -> SampleRanges:
    """Samples in the file, for sources of these names and sizes. Raises DataError with every problem."""
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
            problem = f"{span!r} is not a sample number; write SOURCE FIRST or SOURCE FIRST-LAST"
        elif name == "sequence_length":
            length = int(first)
            continue
        elif name not in names:
            problem = f"no source is named {name!r}; the names are {', '.join(names)}"
        elif not int(first) <= int(last) < num_samples[names.index(name)]:
            problem = f"{span} is not allowed; {name} has samples 0 to {num_samples[names.index(name)] - 1}"
        else:
            found.append((names.index(name), int(first), int(last) + 1))
            continue
        problems.append(f"data.quarantine: {path}:{number}: {problem}")
    if length != sequence_length:
        found_length = "has no sequence_length line" if length is None else f"is for sequence_length {length}"
        problems.insert(0, f"data.quarantine: {path}: {found_length}; sample numbers of this run are for {sequence_length}")
    ranges = merge(found)
    for source, name in enumerate(names):
        if sum(end - first for each, first, end in ranges if each == source) == num_samples[source]:
            problems.append(f"data.quarantine: {path}: excludes all of {name}; remove the source from data.train instead")
    if problems:
        raise DataError("\n".join(problems))
    return ranges


def append_to_quarantine(path: str | Path, sequence_length: int, samples: Iterable[tuple[str, int, str]]) -> None:
    """Adds (source name, sample, comment) to the file, or creates it. Raises DataError if it has another sequence_length."""
    path = Path(path)
    text = path.read_text(encoding="utf-8") if path.exists() else f"sequence_length {sequence_length}\n"
    if ["sequence_length", str(sequence_length)] not in [line.partition("#")[0].split() for line in text.splitlines()]:
        raise DataError(f"{path}: is not for sequence_length {sequence_length}; choose another file")
    text += "" if text.endswith("\n") else "\n"
    text += "".join(f"{source} {sample}  # {' '.join(comment.split())}\n" for source, sample, comment in samples)
    write_atomically(path, text)


def recut(ranges: SampleRanges, sequence_length: int, other_length: int) -> SampleRanges:
    """The samples of `other_length` tokens that contain a label of these samples of `sequence_length` tokens."""
    return merge(
        (source, first * sequence_length // other_length, -(-end * sequence_length // other_length))
        for source, first, end in ranges
    )


class Quarantine:
    """Maps between positions of the full stream of a stage and positions of the stream without the samples in `ranges`."""

    def __init__(self, order: Order, ranges: SampleRanges):
        self._order, self.ranges = order, ranges
        self._samples = {
            source: np.concatenate([np.arange(first, end) for each, first, end in ranges if each == source])
            for source in sorted({source for source, _, _ in ranges} & order.passes.keys())
        }
        """Of each source of the stage that has any."""
        self._positions = lru_cache(maxsize=4 * len(order.num_samples))(self._find_positions)

    def _find_positions(self, source: int, epoch: int) -> np.ndarray:
        """Sorted positions in the full stream of the samples in quarantine, in one epoch of their source."""
        positions = self._order.positions(source, epoch, self._samples[source])
        return np.sort(positions[positions != NEVER])

    def _epoch(self, source: int, count: int) -> int:
        return int(self._order.passes[source].epoch_of(np.array([count]))[0])

    def count(self, end: int) -> int:
        """Number of the first `end` positions of the full stream that are excluded."""
        total, counts = 0, self._order.counts(end)
        for source, samples in self._samples.items():
            first, epoch = self._order.passes[source].cursor.epoch, self._epoch(source, counts[source])
            if epoch > first:  # an earlier stage has read a part of the first epoch
                total += len(self._positions(source, first)) + (epoch - first - 1) * len(samples)
            total += int(np.searchsorted(self._positions(source, epoch), end))
        return total

    def start(self, position: int) -> int:
        """The smallest position of the full stream with `position` kept samples before it."""
        full = position
        while (moved := position + self.count(full)) > full:
            full = moved
        return full

    def locate(self, position: int, count: int) -> np.ndarray:
        """Positions in the full stream (count,) of the positions [position, position + count)."""
        first, end = self.start(position), self.start(position + count)
        kept = np.ones(end - first, dtype=bool)
        before, after = self._order.counts(first), self._order.counts(end)
        for source in self._samples:
            for epoch in range(self._epoch(source, before[source]), self._epoch(source, after[source]) + 1):
                excluded = self._positions(source, epoch)
                kept[excluded[(excluded >= first) & (excluded < end)] - first] = False
        return first + np.flatnonzero(kept)

    def position(self, full: int) -> int | None:
        """The position of the sample at position `full` of the full stream. None: the sample is excluded."""
        before = self.count(full)
        return full - before if self.count(full + 1) == before else None

    def changed_before(self, other: Quarantine, position: int) -> tuple[int, int] | None:
        """A (source, sample) that only one of the two excludes, and whose first place a run with `other` has passed at
        `position`. None: both give such a run the same samples up to there."""
        read_up_to, none = other.start(position), np.empty(0, np.int64)
        for source in sorted(self._samples.keys() | other._samples.keys()):
            different = np.setxor1d(self._samples.get(source, none), other._samples.get(source, none))
            first = self._order.passes[source].cursor.epoch
            for epoch in (first, first + 1):  # an earlier stage may have read it in the first
                places = self._order.positions(source, epoch, different)
                early = (places != NEVER) & (places < read_up_to)
                if early.any():
                    return source, int(different[early][0])
        return None


# ---------------------------------------------------------------- positions that a rollback skips


def add_range(skipped: PositionRanges, first: int, end: int) -> PositionRanges:
    """`skipped` and [first, end) together."""
    return [each for _, *each in merge([(0, first, end), *((0, *each) for each in skipped)])]


def next_position(position: int, skipped: PositionRanges) -> int:
    """Start of the next step after one that ended at `position`."""
    return next((end for first, end in skipped if first <= position < end), position)


def start_of_last_step(position: int, global_batch_size: int, skipped: PositionRanges) -> int:
    """Start of the last step before `position`."""
    return next((first for first, end in skipped if end == position), position) - global_batch_size


def position_of_step(step: int, global_batch_size: int, skipped: PositionRanges, since: tuple[int, int] = (0, 0)) -> int:
    """Start of `step`, counted from 1. since: a (step, position after it) before it, from which on the batch size is this."""
    return past_skipped(since[1] + (step - 1 - since[0]) * global_batch_size, skipped, since[1])


def past_skipped(position: int, skipped: PositionRanges, since: int) -> int:
    """A position counted from `since` without skipped ones, with those that lie between."""
    for first, end in skipped:
        if since < end and position >= first:
            position += end - first
    return position


def step_of_position(
    position: int, global_batch_size: int, skipped: PositionRanges, since: tuple[int, int] = (0, 0)
) -> int | None:
    """The step, counted from 1, that takes the sample at `position`. None: it is skipped. since: as in `position_of_step`."""
    if any(first <= position < end for first, end in skipped):
        return None
    passed = sum(end - first for first, end in skipped if since[1] < end <= position)
    return since[0] + (position - since[1] - passed) // global_batch_size + 1
