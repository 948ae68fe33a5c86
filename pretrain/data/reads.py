"""Positioned reads: of ranges of bytes, and of arrays in files. A file that shrinks meanwhile is an OSError, never a SIGBUS."""

from __future__ import annotations

import errno
import os

import numpy as np
import xxhash

SAMPLE_RUNS, SAMPLE_RUN_LENGTH = 64, 1 << 13
_SPAN_PER_ELEMENT = 64


def read_ranges(file, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Bytes [offset, offset + size) of all ranges, back to back: uint8. Raises OSError if the file ends earlier."""
    descriptor = file.fileno()
    ranges = list(zip(offsets.tolist(), sizes.tolist(), strict=True))
    if hasattr(os, "posix_fadvise") and len(ranges) > 1:  # start all reads before waiting for the first
        for offset, size in ranges:
            os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)
    data = np.empty(int(sizes.sum()), dtype=np.uint8)
    buffer, filled = memoryview(data), 0
    for offset, size in ranges:
        end = filled + size
        while filled < end:
            got = os.preadv(descriptor, [buffer[filled:end]], offset)
            if got == 0:
                raise _truncated(file, offset)
            filled, offset = filled + got, offset + got
    return data


def _truncated(file, offset: int) -> OSError:
    return OSError(errno.EIO, f"ends at byte {offset:,}: truncated while in use", str(file.name))


class StoredArray:
    """A 1-D array of signed integers in a file, read element by element. Raises OSError if the file was truncated meanwhile."""

    def __init__(self, file, dtype: str, count: int, offset: int):
        self._file, self._dtype, self._count, self._offset = file, np.dtype(dtype), count, offset

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> int:
        if not 0 <= i < self._count:
            raise IndexError(i)
        width = self._dtype.itemsize
        data = os.pread(self._file.fileno(), width, self._offset + width * i)
        if len(data) < width:
            raise _truncated(self._file, self._offset + width * i)
        return int.from_bytes(data, "little", signed=True)

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """Elements with these numbers, (n,) -> (n,). Raises IndexError for a number that the array does not have."""
        numbers = np.asarray(numbers, dtype=np.int64)
        if not len(numbers):
            return np.empty(0, self._dtype)
        first, last, width = int(numbers.min()), int(numbers.max()), self._dtype.itemsize
        if first < 0 or last >= self._count:
            raise IndexError(f"refers to entry {first if first < 0 else last:,} of {self._count:,}")
        if last - first < _SPAN_PER_ELEMENT * len(numbers):  # one read of everything between them is faster than one for each
            span = read_ranges(self._file, np.array([self._offset + width * first]), np.array([width * (last - first + 1)]))
            return span.view(self._dtype)[numbers - first]
        return read_ranges(self._file, self._offset + width * numbers, np.full(len(numbers), width)).view(self._dtype)

    def sample(self) -> str:
        """Hash of at most 64 evenly spaced runs of 8192 elements, the first and the last included."""
        starts, lengths = map(np.array, spaced_runs(self._count, SAMPLE_RUNS, SAMPLE_RUN_LENGTH))
        width = self._dtype.itemsize
        return xxhash.xxh3_128_hexdigest(read_ranges(self._file, self._offset + width * starts, width * lengths))


def spaced_runs(num_tokens: int, count: int, length: int) -> tuple[list[int], list[int]]:
    """(starts, lengths) of `count` evenly spaced runs of tokens, the first and the last included; or all in one run."""
    if num_tokens <= count * length:
        return [0], [num_tokens]
    return [(num_tokens - length) * i // (count - 1) for i in range(count)], [length] * count
