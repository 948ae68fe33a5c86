"""Positioned reads: of ranges of bytes, and of arrays in files. A file that shrinks meanwhile is an OSError, never a SIGBUS.

`OpenFiles` limits how many files are open at a time. A reader gets the open file for each read and keeps it until the read is
done, so a file never closes under a thread that reads it.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import xxhash

SAMPLE_RUNS, SAMPLE_RUN_LENGTH = 64, 1 << 13
_SPAN_PER_ELEMENT = 64


class OpenFile:
    """A file open for reading, until nothing refers to it. Raises OSError."""

    def __init__(self, path: str):
        self.name, self._descriptor = path, -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if hasattr(os, "posix_fadvise") and path.endswith(".bin"):  # samples are random: read-ahead would multiply the traffic
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def fileno(self) -> int:
        """The descriptor; valid while the caller holds this object."""
        return self._descriptor

    def __del__(self):
        if self._descriptor >= 0:
            os.close(self._descriptor)


class OpenFiles:
    """Files open for reading. Beyond the limit, the file that was not read for the longest time closes; it opens again when it
    is read. Thread-safe."""

    def __init__(self, limit: int | None = None):
        """limit: files open at a time; None: a quarter of what the system allows this process."""
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if limit is None and allowed != resource.RLIM_INFINITY:
            limit = max(8, allowed // 4)
        self.limit = limit
        self.get: Callable[[str], OpenFile] = lru_cache(maxsize=limit)(OpenFile)
        """The open file at a path. Raises OSError."""


def advise_ranges(file: OpenFile, offsets: np.ndarray, sizes: np.ndarray) -> None:
    """Starts reading the bytes [offset, offset + size) of all ranges, and waits for none."""
    if hasattr(os, "posix_fadvise"):
        for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
            os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)


def read_ranges(file: OpenFile, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Bytes [offset, offset + size) of all ranges, back to back: uint8. Raises OSError if the file ends earlier."""
    descriptor = file.fileno()
    if len(offsets) > 1:
        advise_ranges(file, offsets, sizes)
    data = np.empty(int(sizes.sum()), dtype=np.uint8)
    buffer, filled = memoryview(data), 0
    for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
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

    def __init__(self, open_file: Callable[[], OpenFile], dtype: str, count: int, offset: int):
        """open_file: returns the open file."""
        self._open_file, self._dtype, self._count, self._offset = open_file, np.dtype(dtype), count, offset

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> int:
        if not 0 <= i < self._count:
            raise IndexError(i)
        file, width = self._open_file(), self._dtype.itemsize
        data = os.pread(file.fileno(), width, self._offset + width * i)
        if len(data) < width:
            raise _truncated(file, self._offset + width * i)
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
            span = read_ranges(
                self._open_file(), np.array([self._offset + width * first]), np.array([width * (last - first + 1)])
            )
            return span.view(self._dtype)[numbers - first]
        ranges = self._offset + width * numbers, np.full(len(numbers), width)
        return read_ranges(self._open_file(), *ranges).view(self._dtype)

    def sample(self, runs: int = SAMPLE_RUNS) -> str:
        """Hash of at most `runs` evenly spaced runs of 8192 elements, the first and the last included."""
        starts, lengths = map(np.array, spaced_runs(self._count, runs, SAMPLE_RUN_LENGTH))
        width = self._dtype.itemsize
        return xxhash.xxh3_128_hexdigest(read_ranges(self._open_file(), self._offset + width * starts, width * lengths))


def spaced_runs(num_tokens: int, count: int, length: int) -> tuple[list[int], list[int]]:
    """(starts, lengths) of `count` evenly spaced runs of tokens, the first and the last included; or all in one run."""
    if num_tokens <= count * length:
        return [0], [num_tokens]
    return [(num_tokens - length) * i // (count - 1) for i in range(count)], [length] * count
