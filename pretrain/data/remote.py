"""Files that a URL names, such as s3://bucket/folder/*.jsonl.zst, listed and read as streams through `fsspec`.

Every protocol of `fsspec` is allowed; most need a package of their own, which the error names and which finds the credentials.
`retried` makes every request: packages differ in what they try again, and many wait for an answer without a limit. A file whose
transfer ends early is an error, never a shorter file.
"""

from __future__ import annotations

import io
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import PurePosixPath
from typing import BinaryIO, TypeVar

from .errors import DataError, DataMissing, StoreError

RETRY_SECONDS = 60.0
"""How long a request is tried again."""
_READ_SECONDS, _LISTING_SECONDS = 60.0, 600.0  # the longest answers: a block; the names of a million files
_LONGEST_PAUSE_SECONDS, _TELL_SECONDS = 8.0, 10.0
_BLOCK_BYTES = 8 << 20  # of one request; files are read from front to back
T = TypeVar("T")


def is_url(name: str) -> bool:
    """True for a name with a protocol."""
    return "://" in name


def find(url: str) -> tuple[list[str], bool]:
    """(URLs of the files that a URL or a pattern names, or of all files in a folder; whether it is a folder).

    In the order of `Path`: by the names of folders, then of files. Raises DataError, StoreError.
    """
    system, path = open_system(url)

    def search() -> tuple[list[str], bool]:
        if any(each in path for each in "*?[") and not path.startswith("http"):
            return [name for name, about in system.glob(path, detail=True).items() if about["type"] == "file"], False
        about = _about(system, path)
        return ([path], False) if about and about["type"] == "file" else (system.find(path), True)

    found, is_folder = retried(url, search, _LISTING_SECONDS)
    if not found:
        raise DataError(f"{url}: no such file or folder, or it is empty; check the URL and what the credentials may list")
    return sorted((_url_of(each, system, url) for each in found), key=PurePosixPath), is_folder


def matching(pattern: str) -> list[str]:
    """URLs of the files that match a pattern, sorted; there may be none. Raises DataError, StoreError."""
    system, path = open_system(pattern)
    return retried(pattern, lambda: sorted(_url_of(each, system, pattern) for each in system.glob(path)), _LISTING_SECONDS)


def _url_of(path: str, system, url: str) -> str:
    """The URL of a path in a file system, with the protocol of `url`, which may be one of several (az, abfs)."""
    return url.partition("://")[0] + "://" + system.unstrip_protocol(path).partition("://")[2]


def exists(url: str) -> bool:
    """True if there is a file or folder of that name. Raises DataError, StoreError."""
    system, path = open_system(url)
    return retried(url, lambda: _about(system, path) is not None, _LISTING_SECONDS)


def _about(system, path: str) -> dict | None:
    """Size, type and more of a file or folder; None: there is none. (`exists` and `isfile` of `fsspec` also say no after an
    error of the server, and so would leave out files.)"""
    try:
        return system.info(path)
    except FileNotFoundError:
        return None


def size(name: str) -> int:
    """Bytes of a file on a disk or under a URL. Raises OSError, DataError, StoreError."""
    if not is_url(name):
        return os.path.getsize(name)
    system, path = open_system(name)
    found = retried(name, lambda: system.size(path), _READ_SECONDS)
    if found is None:
        raise DataError(f"{name}: the server does not tell its size, so that a cut transfer would not be noticed; download it")
    return found


def open_file(name: str) -> io.BufferedReader:
    """A file on a disk or under a URL, to be read from front to back; it can seek. Opening and reading raise OSError; of a URL,
    DataError and StoreError, too."""
    return io.BufferedReader(_Complete(name), 1 << 20) if is_url(name) else open(name, "rb")


class _Complete(io.RawIOBase):
    """A file whose end is an OSError if it comes before its size says."""

    def __init__(self, url: str):
        self._url, self._position, self._size = url, 0, size(url)
        self._file: BinaryIO | None = None  # where the last read has ended; None: it has to be opened

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        def read() -> tuple[BinaryIO, bytes]:
            file, self._file = self._file, None  # one that fails, or that nobody waits for, is not read again
            if file is None:
                system, path = open_system(self._url)
                file = system.open(path, "rb", block_size=_BLOCK_BYTES, cache_type="readahead")
                if getattr(file, "size", self._size) != self._size:
                    raise DataError(f"{self._url}: was replaced while in use; restore it, and start again")
            file.seek(self._position)
            return file, file.read(len(buffer))

        self._file, data = retried(self._url, read, _READ_SECONDS)
        if not data and len(buffer) and self._position < self._size:
            raise OSError(f"the transfer ended after {self._position:,} of {self._size:,} bytes")
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None
        super().close()


def open_system(url: str, **options) -> tuple:
    """(file system of `fsspec`, path in it). options: of the file system. Raises DataError."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:  # its message names the package
        raise DataError(f"{url}: {error}") from None
    except ValueError as error:
        known = ", ".join(("s3", "gs", "az", "hf", "https", "file", "memory"))
        raise DataError(f"{url}: {error}; allowed: those of fsspec, such as {known}") from None


class _Silence:
    """Since when no request of this process has succeeded, and when that was last reported."""

    since: float | None = None
    told_at = -_TELL_SECONDS


def retried(url: str, request: Callable[[], T], seconds: float) -> T:
    """What `request` returns, which is tried again for a minute after time-outs, errors of the server and cut transfers.

    seconds: how long an answer may take, with its content; a request that took longer may still be running beside the next. The
    minute begins when stores stop answering: requests that wait behind those that gave up do not hold up the end of the
    process. Raises DataError for what trying again cannot change, StoreError.
    """
    begin, tries = time.monotonic(), 0
    while True:
        tries += 1
        try:
            result = tried_once(url, request, seconds)
            _Silence.since = None
            return result
        except (DataError, StoreError):
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            pause = min(_LONGEST_PAUSE_SECONDS, 0.1 * 2**tries) * random.uniform(0.5, 1)
            now = time.monotonic()
            _Silence.since = _Silence.since or now
            if now - min(begin, _Silence.since) + pause > RETRY_SECONDS:
                tried = f"{tries} tries in {now - begin:.0f} s"
                raise StoreError(f"{url}: the store does not answer ({tried}; {text}); start again to resume") from error
        _tell(f"{url}: {text}; is tried again for up to {RETRY_SECONDS:.0f} s", tries)
        time.sleep(pause)


def tried_once(url: str, request: Callable[[], T], seconds: float) -> T:
    """What `request` returns within `seconds`. Raises DataError for what trying again cannot change, else what went wrong."""
    try:
        return _limited(request, seconds)
    except (DataError, StoreError):
        raise
    except Exception as error:  # packages pass on the exceptions of their clients, and of the network
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, FileNotFoundError):
            raise DataMissing(f"{url}: not in the store; check the URL") from None
        if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            raise DataError(f"{url}: the store refuses access ({text}); check the credentials") from None
        raise


def _limited(request: Callable[[], T], seconds: float) -> T:
    """What `request` returns or raises; a TimeoutError if that takes longer, and nobody waits for it any more."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(request())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="request", daemon=True).start()  # a thread of a pool would keep the process alive
    wait([answer], seconds)
    if not answer.done():
        raise TimeoutError(f"no complete answer in {seconds:.0f} s")
    return answer.result()


def _tell(text: str, tries: int) -> None:
    now = time.monotonic()
    if tries > 2 and now - _Silence.told_at >= _TELL_SECONDS:  # a single failure is usual
        _Silence.told_at = now
        print(f"pretrain: {text}", file=sys.stderr, flush=True)
