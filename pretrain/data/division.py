"""Divides the files of a corpus into shards of about the same size, for jobs that know nothing of each other. No torch.

Every job computes the same division from names, sizes and the number of shards. A shard is a contiguous part of the input, so
that all shards in order are the input in order. Files whose lines are documents are divided between two lines, at no cost but
one look for the end of a line; all others stay whole.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

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
    """The documents that begin at the bytes [begin, end) of a file of `size` bytes."""

    name: str
    begin: int
    end: int
    size: int

    @property
    def is_whole(self) -> bool:
        """True: all documents of the file."""
        return self.end - self.begin == self.size


class Lines(io.RawIOBase):
    """The lines of an open file that begin at the bytes of `part`, as a file."""

    def __init__(self, file: BinaryIO, part: Part):
        end, self.begin = _line_start(file, part.end), _line_start(file, part.begin)
        self._file, self._left, self._done = file, end - self.begin, 0
        file.seek(self.begin)

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer) -> int:
        """Fills the buffer as far as it can at once. Returns the number of bytes, 0 at the end."""
        count = self._file.readinto(memoryview(buffer)[: self._left])
        self._left, self._done = self._left - count, self._done + count
        return count

    def tell(self) -> int:
        """Number of bytes that have been read."""
        return self._done


def _line_start(file: BinaryIO, offset: int) -> int:
    """Where the first line begins that does not begin before `offset`."""
    file.seek(max(0, offset - 1))
    while offset and (data := file.readline(1 << 20)) and not data.endswith(b"\n"):
        pass
    return file.tell()


def files_fingerprint(files: list[tuple[str, int]]) -> str:
    """Hash of the names and sizes that a division depends on."""
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


def divide(files: list[tuple[str, int]], shard: Shard, is_divisible: Callable[[str], bool]) -> list[Part]:
    """The parts of the files (name, bytes) that belong to a shard, in order. Raises DataError if some shard would get none.

    `is_divisible`: whether the documents of a file are its lines; asked only of files that are larger than a piece.
    """
    piece = max(1, sum(size for _, size in files) // (shard.count * _PIECES_PER_SHARD))
    pieces = []
    for name, size in files:
        step = piece if size > piece and is_divisible(name) else max(1, size)
        pieces += [Part(name, begin, min(begin + step, size), size) for begin in range(0, max(1, size), step)]
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
            piece = piece._replace(begin=parts.pop().begin)
        parts.append(piece)
    return parts
