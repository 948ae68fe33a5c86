"""Objects of a store, such as s3://bucket/web/part-0.bin, read by ranges of bytes through blocks cached on a local disk.

    DIRECTORY/blocks/3f/3f...-17       block 17 of an object, at most 1 MiB, and its xxh3-128 checksum (16 bytes)
    DIRECTORY/tokenizers/3f.../        the files of a tokenizer

The name of a block contains a hash of the object's URL, size, and ETag or time of change: another version of an object has
other blocks. After each fetch, the object is looked at again, so that no block of a version that replaced the opened one is
used. Any number of processes may share a directory: blocks are renamed into place, and removed under a lock, the longest unused
first. It knows bytes; not what they mean. Every protocol of `fsspec` is allowed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
import xxhash

from pretrain.files import write_atomically

from . import remote
from .errors import DataError, DataMissing

BLOCK_BYTES = 1 << 20
DEFAULT_CACHE_GIB = 32.0
_CHECKSUM_BYTES = 16
_REQUESTS = 32  # at a time in a process
_RETRY_SECONDS, _LONGEST_PAUSE_SECONDS, _TELL_SECONDS = 60.0, 8.0, 10.0
_CHECKS_PER_LIMIT = 128  # how often a process looks at the size of the cache while it writes as much as that may be
# What distinguishes versions of an object, in the words of s3, gs, az, http, file and memory.
_MARKS = ("etag", "generation", "versionid", "content-md5", "last-modified", "lastmodified", "mtime", "ino", "created")
_TOKENIZER_ENDS = (".json", ".model", ".txt", ".jinja")
T = TypeVar("T")


class BlockCache:
    """Blocks of bytes in files of a directory that processes share, together at most about `limit_gib`. Thread-safe.

    No error of its disk is an error of the caller: what cannot be read is not there, and what cannot be written is left out,
    with one warning.
    """

    def __init__(self, directory: Path, limit_gib: float):
        self._directory, self._limit = directory / "blocks", int(limit_gib * 2**30)
        self._verified: dict[str, int] = {}  # inodes of the files whose checksums were compared, by name
        self._unchecked_bytes, self._told = self._limit, False

    def read(self, name: str, size: int, begin: int, end: int) -> bytes | None:
        """Bytes [begin, end) of a block of `size` bytes. None: it is not in the cache. A damaged block is removed."""
        path = self._path(name)
        try:
            with open(path, "rb", buffering=0) as file:
                inode = os.fstat(file.fileno()).st_ino
                if self._verified.get(name) != inode:
                    content = os.pread(file.fileno(), size + _CHECKSUM_BYTES + 1, 0)
                    if content[size:] != xxhash.xxh3_128_digest(content[:size]):
                        path.unlink(missing_ok=True)
                        return None
                    self._verified[name] = inode
                data = os.pread(file.fileno(), end - begin, begin)
                os.utime(file.fileno())  # when it was last used
        except OSError:
            return None
        return data if len(data) == end - begin else None

    def has(self, name: str) -> bool:
        """True if there is a file of that block; it may be damaged."""
        return self._path(name).exists()

    def write(self, name: str, data: bytes) -> None:
        """Keeps a block, if the disk can."""
        if len(data) > self._limit:
            return
        content = data + xxhash.xxh3_128_digest(data)
        try:
            try:
                self._make_room(len(content))
                self._write(self._path(name), content)
            except OSError:  # the disk is full: others may have filled it
                self._shrink(self._total() // 2)
                self._write(self._path(name), content)
        except OSError as error:
            if not self._told:
                self._told = True
                text = f"blocks cannot be cached ({error.strerror}) and are fetched whenever they are needed; free space there"
                print(f"pretrain: {self._directory}: {text}, or set data.cache_directory", file=sys.stderr, flush=True)

    def _path(self, name: str) -> Path:
        return self._directory / name[:2] / name

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _make_room(self, size: int) -> None:
        """Removes blocks now and then, so that other processes may write some, too."""
        self._unchecked_bytes += size
        if self._unchecked_bytes > self._limit // _CHECKS_PER_LIMIT:
            self._unchecked_bytes = 0
            self._shrink(self._limit - self._limit // 8)

    def _files(self) -> Iterator[os.DirEntry]:
        for folder in os.scandir(self._directory):
            if folder.is_dir():
                yield from os.scandir(folder)

    def _total(self) -> int:
        return sum(size for _, size, _ in self._by_use())

    def _by_use(self) -> list[tuple[float, int, str]]:
        """(time of last use, bytes, path) of all files, the longest unused first."""
        found = []
        for entry in self._files():
            with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
                about = entry.stat()
                found.append((about.st_mtime, about.st_size, entry.path))
        return sorted(found)

    def _shrink(self, limit: int) -> None:
        """Removes the longest unused files until the rest has at most `limit` bytes. Raises OSError."""
        self._directory.mkdir(parents=True, exist_ok=True)
        with open(self._directory / "lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            files = self._by_use()
            total = sum(size for _, size, _ in files)
            for _, size, path in files:
                if total <= limit:
                    return
                Path(path).unlink(missing_ok=True)
                total -= size


class Store:
    """Opens objects by their URLs, with one cache and one pool of requests for all. Thread-safe."""

    def __init__(self, directory: str | Path | None = None, cache_gib: float = DEFAULT_CACHE_GIB):
        """directory: of the cache; None: `pretrain` in the user's folder of caches."""
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.directory = Path(directory or os.path.join(home, "pretrain"))
        self.cache = BlockCache(self.directory, cache_gib)
        self.requests = ThreadPoolExecutor(_REQUESTS, "store")
        self._told_at = -_TELL_SECONDS
        self._failing_since: float | None = None  # no request has succeeded since then

    def open(self, url: str) -> StoredObject:
        """The object of that URL. Raises DataMissing, DataError, OSError."""
        return StoredObject(url, self)

    def tokenizer(self, url: str) -> Path:
        """A local copy of the tokenizer's files in a folder of the store. Raises DataError, OSError."""
        names, is_folder = remote.find(url)
        names = [each for each in names if PurePosixPath(each).name.endswith(_TOKENIZER_ENDS)] if is_folder else []
        objects = {PurePosixPath(each).name: self.open(each) for each in names}
        if not objects:
            raise DataError(f"{url}: no tokenizer here; name the folder that contains its tokenizer.json")
        key = xxhash.xxh3_128_hexdigest("\n".join(sorted(each.key for each in objects.values())).encode())
        folder = self.directory / "tokenizers" / key
        folder.mkdir(parents=True, exist_ok=True)
        for name, found in objects.items():
            if not (folder / name).exists():
                write_atomically(folder / name, found.read(np.array([0]), np.array([found.size])).tobytes())
        return folder

    def retried(self, url: str, attempt: Callable[[], T]) -> T:
        """What `attempt` returns, which is tried again for a minute after time-outs, errors of the server and cut transfers.

        The minute begins when the store stops answering: requests that wait behind those that gave up do not hold up the end of
        the process. Raises DataError for what trying again cannot change, OSError.
        """
        begin, tries = time.monotonic(), 0
        while True:
            tries += 1
            try:
                result = attempt()
                self._failing_since = None
                return result
            except DataError:
                raise
            except Exception as error:  # packages pass on the exceptions of their clients, and of the network
                text = f"{type(error).__name__}: {error}"
                if isinstance(error, FileNotFoundError):
                    raise DataMissing(f"{url}: not in the store; check the URL") from None
                if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
                    raise DataError(f"{url}: the store refuses access ({text}); check the credentials") from None
                pause = min(_LONGEST_PAUSE_SECONDS, 0.1 * 2**tries) * random.uniform(0.5, 1)
                now = time.monotonic()
                self._failing_since = self._failing_since or now
                if now - min(begin, self._failing_since) + pause > _RETRY_SECONDS:
                    seconds = f"{tries} tries in {now - begin:.0f} s"
                    raise OSError(f"{url}: the store does not answer ({seconds}; {text}); start again to resume") from error
            self._tell(f"{url}: {text}; is tried again for up to {_RETRY_SECONDS:.0f} s", tries)
            time.sleep(pause)

    def _tell(self, text: str, tries: int) -> None:
        now = time.monotonic()
        if tries > 2 and now - self._told_at >= _TELL_SECONDS:  # a single failure is usual
            self._told_at = now
            print(f"pretrain: {text}", file=sys.stderr, flush=True)


class StoredObject:
    """An object of a store, with the methods of `reads.OpenFile`: the version that was there when it was opened."""

    def __init__(self, url: str, store: Store):
        self.name, self._store = url, store
        self._system, self._path = remote.open_system(url)
        self.size, self._marks = self._look()
        self.key = xxhash.xxh3_128_hexdigest(f"{url}\n{self.size}\n{self._marks}".encode())
        self._fetching: dict[int, Future[bytes]] = {}
        self._lock = threading.Lock()

    def stamp(self) -> str:
        """Differs if another version has its name."""
        return self.key

    def read_at(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size). Raises DataError, OSError."""
        return self.read(np.array([offset]), np.array([size])).tobytes()

    def read_soon(self, offsets: np.ndarray, sizes: np.ndarray) -> None:
        """Starts fetching what is not in the cache of the bytes [offset, offset + size) of all ranges, and waits for none."""
        for block in {block for block, *_ in self._pieces(offsets, sizes)}:
            if not self._store.cache.has(self._block_name(block)):
                self._fetch_soon(block)

    def read(self, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Bytes [offset, offset + size) of all ranges, back to back: uint8.

        Raises DataError if the object was replaced or removed since it was opened, OSError if the store does not answer.
        """
        data, missing = np.empty(int(sizes.sum()), dtype=np.uint8), []
        buffer = memoryview(data)
        for piece in self._pieces(offsets, sizes):
            block, begin, end, place = piece
            found = self._store.cache.read(self._block_name(block), self._block_size(block), begin, end)
            if found is None:
                missing.append((piece, self._fetch_soon(block)))
            else:
                buffer[place : place + end - begin] = found
        for (_, begin, end, place), fetched in missing:
            buffer[place : place + end - begin] = memoryview(fetched.result())[begin:end]
        return data

    def _pieces(self, offsets: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
        """(block, begin and end within it, place in the result) of the parts of all ranges. Raises OSError past the end."""
        place = 0
        for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
            if offset + size > self.size:
                raise OSError(f"{self.name}: ends at byte {self.size:,}, {offset + size:,} expected; copy it again")
            while size:
                block, begin = divmod(offset, BLOCK_BYTES)
                length = min(size, BLOCK_BYTES - begin)
                yield block, begin, begin + length, place
                offset, size, place = offset + length, size - length, place + length

    def _block_name(self, block: int) -> str:
        return f"{self.key}-{block}"

    def _block_size(self, block: int) -> int:
        return min(BLOCK_BYTES, self.size - block * BLOCK_BYTES)

    def _fetch_soon(self, block: int) -> Future[bytes]:
        """The block, once it is fetched; a block is fetched once at a time."""
        with self._lock:
            if block not in self._fetching:
                self._fetching[block] = self._store.requests.submit(self._fetch, block)
            return self._fetching[block]

    def _fetch(self, block: int) -> bytes:
        begin, size = block * BLOCK_BYTES, self._block_size(block)

        def attempt() -> bytes:
            data = self._system.cat_file(self._path, start=begin, end=begin + size)
            if len(data) != size:
                self._require_same()
                raise OSError(f"{len(data):,} of {size:,} bytes arrived")
            return data

        try:
            data = self._store.retried(self.name, attempt)
            self._require_same()
            self._store.cache.write(self._block_name(block), data)
            return data
        finally:
            with self._lock:
                del self._fetching[block]

    def _require_same(self) -> None:
        if self._look() != (self.size, self._marks):
            raise DataError(f"{self.name}: was replaced while in use; restore it, or start another run with the new object")

    def _look(self) -> tuple[int, str]:
        """(bytes, what distinguishes its versions) of the object now."""

        def attempt() -> dict:
            self._system.invalidate_cache()  # of listings
            return self._system.info(self._path)

        about = self._store.retried(self.name, attempt)
        if about.get("type") == "directory":
            raise DataMissing(f"{self.name}: is a folder, not an object")
        if about.get("size") is None:
            raise DataError(f"{self.name}: the server does not tell its size; use another server, or download it")
        marks = {key.lower(): str(value) for key, value in about.items()}
        return about["size"], " ".join(f"{mark}={marks[mark]}" for mark in _MARKS if marks.get(mark))
