"""Files that a URL names, such as s3://bucket/folder/*.jsonl.zst, listed and read as streams through `fsspec`.

Every protocol of `fsspec` is allowed; most need a package of their own, which the error names. Credentials, time limits and
retries are those of the packages. A file whose transfer ends early is an error, never a shorter file.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import BinaryIO, TypeVar

from .indexed import DataError

_BLOCK_BYTES = 8 << 20  # of one request; files are read from front to back
T = TypeVar("T")


def is_url(name: str) -> bool:
    """True for a name with a protocol."""
    return "://" in name


def find(url: str) -> tuple[list[str], bool]:
    """(URLs of the files that a URL or a pattern names, or of all files in a folder; whether it is a folder).

    In the order of `Path`: by the names of folders, then of files. Raises DataError.
    """
    system, path = _open_system(url)

    def search() -> tuple[list[str], bool]:
        if any(each in path for each in "*?[") and not path.startswith("http"):
            return [each for each in system.glob(path) if system.isfile(each)], False
        return ([path], False) if system.isfile(path) else (system.find(path), True)

    found, is_folder = _tried(url, search)
    if not found:
        raise DataError(f"{url}: no such file or folder, or it is empty; check the URL and what the credentials may list")
    return sorted((system.unstrip_protocol(each) for each in found), key=PurePosixPath), is_folder


def size(url: str) -> int:
    """Bytes of a file. Raises DataError."""
    system, path = _open_system(url)
    found = _tried(url, lambda: system.size(path))
    if found is None:
        raise DataError(f"{url}: the server does not tell its size, so that a cut transfer would not be noticed; download it")
    return found


def open_url(url: str) -> io.BufferedReader:
    """A file, to be read from front to back; it can seek. Raises DataError; reading it may raise OSError."""
    system, path = _open_system(url)
    file = _tried(url, lambda: system.open(path, "rb", block_size=_BLOCK_BYTES, cache_type="readahead"))
    return io.BufferedReader(_Complete(url, file, size(url)), 1 << 20)


class _Complete(io.RawIOBase):
    """A file of `size` bytes whose end is an OSError if it comes earlier."""

    def __init__(self, url: str, file: BinaryIO, size: int):
        self._url, self._file, self._size = url, file, size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer) -> int:
        data = _tried(self._url, lambda: self._file.read(len(buffer)))
        if not data and len(buffer) and self._file.tell() < self._size:
            raise OSError(f"the transfer ended after {self._file.tell():,} of {self._size:,} bytes")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _open_system(url: str) -> tuple:
    """(file system of `fsspec`, path in it). Raises DataError."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:  # its message names the package
        raise DataError(f"{url}: {error}") from None
    except ValueError as error:
        known = ", ".join(("s3", "gs", "az", "hf", "https", "file", "memory"))
        raise DataError(f"{url}: {error}; allowed: those of fsspec, such as {known}") from None


def _tried(url: str, action: Callable[[], T]) -> T:
    """What `action` returns. Raises DataError in place of whatever the package for the protocol raises."""
    try:
        return action()
    except FileNotFoundError:
        raise DataError(f"{url}: no such file or folder") from None
    except Exception as error:  # packages pass on the exceptions of their clients, and of the network
        raise DataError(f"{url}: {type(error).__name__}: {error}") from error
