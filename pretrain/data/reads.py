"""Positioned reads: of ranges of bytes, and of arrays in files. A file that shrinks meanwhile is an OSError, never a SIGBUS.

Files may lie in a store: then they are `store.StoredObject`s, which have the methods of an `OpenFile`.

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

from .errors import DataMissing
from .remote import is_url
from .store import Store, StoredObject

SAMPLE_RUNS, SAMPLE_RUN_LENGTH = 64, 1 << 13
_SPAN_PER_ELEMENT = 64


class OpenFile:
    """A file open for reading, until nothing refers to it. Raises OSError."""

    def __init__(self, path: str):
        self.name, self._descriptor = path, -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if hasattr(os, "posix_fadvise") and path.endswith((".bin", ".arrow")):  # random reads: no read-ahead
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def fileno(self) -> int:
        """The descriptor; valid while the caller holds this object."""
        return self._descriptor

    @property
    def size(self) -> int:
        """Bytes now."""
        return os.fstat(self._descriptor).st_size

    def stamp(self) -> tuple[int, int, int]:
        """Differs if the file was written to, or another one has its name."""
        found = os.fstat(self._descriptor)
        return found.st_mtime_ns, found.st_ino, found.st_size

    def read_at(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size). Raises OSError if the file ends earlier."""
        data = os.pread(self._descriptor, size, offset)
        if len(data) < size:  # also a read of more than 2 GiB
            return read_ranges(self, np.array([offset]), np.array([size])).tobytes()
        return data

    def read(self, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Bytes [offset, offset + size) of all ranges, back to back: uint8. Raises OSError if the file ends earlier."""
        if len(offsets) > 1:
            self.read_soon(offsets, sizes)
        return read_ranges(self, offsets, sizes)

    sample = read  # which matters for stores only

    def read_soon(self, offsets: np.ndarray, sizes: np.ndarray) -> None:
        """Starts reading the bytes [offset, offset + size) of all ranges, and waits for none."""
        if hasattr(os, "posix_fadvise"):
            for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
                os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def __del__(self):
        if self._descriptor >= 0:
            os.close(self._descriptor)


class OpenFiles:
    """Files open for reading. Beyond the limit, the file that was not read for the longest time closes; it opens again when it
    is read. Thread-safe."""

    def __init__(self, limit: int | None = None, *, store: Store | None = None):
        """limit: files open at a time; None: a quarter of what the system allows this process. store: for URLs; None: with a
        cache of the usual size at the usual place."""
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if limit is None and allowed != resource.RLIM_INFINITY:
            limit = max(8, allowed // 4)
        self.limit = limit
        self._on_disk = lru_cache(maxsize=limit)(OpenFile)
        self._in_store = lru_cache(maxsize=None)((store or Store()).open)  # holds no file, and must stay the version it is

    def get(self, path: str) -> OpenFile | StoredObject:
        """The open file at a path or URL. Raises OSError; for a URL, DataError and StoreError."""
        return self._in_store(path) if is_url(path) else self._on_disk(path)

    def exists(self, path: str) -> bool:
        """True if there is such a file. For a URL, it is opened. Raises DataError, StoreError, OSError."""
        if not is_url(path):
            return os.path.isfile(path)
        try:
            self.get(path)
        except DataMissing:
            return False
        return True


def read_ranges(file, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Bytes [offset, offset + size) of all ranges, back to back: uint8. Raises OSError if the file ends earlier."""
    descriptor = file.fileno()
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

    def __init__(self, open_file: Callable[[], OpenFile | StoredObject], dtype: str, count: int, offset: int):
        """open_file: returns the open file."""
        self._open_file, self._dtype, self._count, self._offset = open_file, np.dtype(dtype), count, offset

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> int:
        if not 0 <= i < self._count:
            raise IndexError(i)
        width = self._dtype.itemsize
        return int.from_bytes(self._open_file().read_at(self._offset + width * i, width), "little", signed=True)

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """Elements with these numbers, (n,) -> (n,). Raises IndexError for a number that the array does not have."""
        numbers = np.asarray(numbers, dtype=np.int64)
        if not len(numbers):
            return np.empty(0, self._dtype)
        first, last, width = int(numbers.min()), int(numbers.max()), self._dtype.itemsize
        if first < 0 or last >= self._count:
            raise IndexError(f"refers to entry {first if first < 0 else last:,} of {self._count:,}")
        if last - first < _SPAN_PER_ELEMENT * len(numbers):  # one read of everything between them is faster than one for each
            span = self._open_file().read(np.array([self._offset + width * first]), np.array([width * (last - first + 1)]))
            return span.view(self._dtype)[numbers - first]
        ranges = self._offset + width * numbers, np.full(len(numbers), width)
        return self._open_file().read(*ranges).view(self._dtype)

    def sample(self, runs: int = SAMPLE_RUNS) -> str:
        """Hash of at most `runs` evenly spaced runs of 8192 elements, the first and the last included."""
        starts, lengths = map(np.array, spaced_runs(self._count, runs, SAMPLE_RUN_LENGTH))
        width = self._dtype.itemsize
        return xxhash.xxh3_128_hexdigest(self._open_file().sample(self._offset + width * starts, width * lengths))


def spaced_runs(num_tokens: int, count: int, length: int) -> tuple[list[int], list[int]]:
    """(starts, lengths) of `count` evenly spaced runs of tokens, the first and the last included; or all in one run."""
    if num_tokens <= count * length:
        return [0], [num_tokens]
    return [(num_tokens - length) * i // (count - 1) for i in range(count)], [length] * count
