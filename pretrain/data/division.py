"""Divides the files of a corpus into shards of about the same size, for jobs that know nothing of each other. No torch.

Every job computes the same division from names, sizes and the number of shards. A shard is a contiguous part of the input, so
that all shards in order are the input in order. Files whose lines are documents are divided between two lines, at no cost but
one look for the end of a line; all others stay whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .indexed import DataError

_PIECES_PER_SHARD = 64  # so that no shard is larger than another by more than 1/64, as far as files can be divided


class Shard(NamedTuple):
    """Part `index` of `count`, counted from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The type of a flag: I/N. Raises ArgumentTypeError."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count) < 100_000):
            raise argparse.ArgumentTypeError(f"got {text!r}, must be I/N with 0 <= I < N < 100,000, as 0/64 to 63/64")
        return cls(int(index), int(count))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def ending(self) -> str:
        """What is added to the prefix of the output."""
        return f"-{self.index:05d}-of-{self.count:05d}"


class Part(NamedTuple):
    """The documents that begin at the bytes [begin, end) of a file."""

    name: str
    begin: int
    end: int


def divide(files: list[tuple[str, int]], shard: Shard, is_divisible: Callable[[str], bool]) -> list[Part]:
    """The parts of the files (name, bytes) that belong to a shard, in order. Raises DataError if there are too few for all.

    `is_divisible`: whether the documents of a file are its lines; asked only of files that are larger than a piece.
    """
    piece = max(1, sum(size for _, size in files) // (shard.count * _PIECES_PER_SHARD))
    pieces = []
    for name, size in files:
        step = piece if size > piece and is_divisible(name) else max(1, size)
        pieces += [Part(name, begin, min(begin + step, size)) for begin in range(0, max(1, size), step)]
    if len(pieces) < shard.count:
        raise DataError(
            f"--shard: {shard.count:,} shards, but the input has {len(files):,} files, of which only .jsonl files that are not "
            "compressed and, with --text-split line, such .txt files can be divided; use at most as many shards as files"
        )
    borders = _borders(np.array([part.end - part.begin for part in pieces], dtype=np.int64), shard.count)
    return _joined(pieces[borders[shard.index] : borders[shard.index + 1]])


def _borders(sizes: np.ndarray, count: int) -> list[int]:
    """Borders of `count` ranges of pieces (count + 1,): each as near as can be to its share of the bytes, and none empty."""
    ends = np.concatenate([[0], np.cumsum(sizes)])
    targets = np.array([int(ends[-1]) * i // count for i in range(count + 1)])
    after = np.searchsorted(ends, targets).clip(1, len(sizes))
    nearest = np.where(targets - ends[after - 1] < ends[after] - targets, after - 1, after)
    nearest[0], nearest[-1], numbers = 0, len(sizes), np.arange(count + 1)
    rising = np.maximum.accumulate(nearest - numbers) + numbers
    latest = len(sizes) - numbers[::-1]  # leaves a piece for each of the shards behind
    return np.minimum(rising, latest).tolist()


def _joined(pieces: list[Part]) -> list[Part]:
    """Neighbours of the same file as one part."""
    parts: list[Part] = []
    for piece in pieces:
        if parts and parts[-1].name == piece.name and parts[-1].end == piece.begin:
            piece = Part(piece.name, parts.pop().begin, piece.end)
        parts.append(piece)
    return parts
