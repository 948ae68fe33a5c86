"""Objects of a store, such as s3://bucket/web/part-0.bin, read by ranges of bytes that are cached on a local disk.

    DIRECTORY/blocks/3f/3f...-4096-1024   bytes 4096 to 5119 of an object, and their xxh3-128 checksum (16 bytes)
    DIRECTORY/tokenizers/3f.../           the files of a tokenizer

What is fetched, and cached, at a time:

    tokens (.bin), if those of all objects fit in the cache     the blocks of 1 MiB that contain what is read
    tokens, if they do not fit                                  what is read, and it is not cached: samples are read in random
                                                                order, so a block would be removed before its next sample
    samples of tokens that a start reads                        what is read
    everything else: the index, the sidecar                     blocks of 64 KiB

The name of a block contains a hash of the object's URL, size, and ETag or time of change: another version of an object has
other blocks. After each fetch, the object is looked at again, so that no block of a version that replaced the opened one is
used. Any number of processes may share a directory: blocks are renamed into place, and removed under a lock, the longest unused
first. It knows bytes; not what they mean. Every protocol of `fsspec` is allowed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import xxhash

from pretrain.files import write_atomically

from . import remote
from .errors import DataError, DataMissing

BLOCK_BYTES, _INDEX_BLOCK_BYTES = 1 << 20, 1 << 16
DEFAULT_CACHE_GIB = 32.0
_CHECKSUM_BYTES = 16
_REQUESTS = 64  # at a time in a process
_REQUEST_SECONDS = 30.0  # for a block: on a slower link than 35 kB/s nobody trains
_CHECKS_PER_LIMIT = 128  # how often a process looks at the size of the cache while it writes as much as that may be
# What distinguishes versions of an object, in the words of s3, gs, az, http, file and memory.
_MARKS = ("etag", "generation", "versionid", "content-md5", "last-modified", "lastmodified", "mtime", "ino", "created")
_TOKENIZER_ENDS = (".json", ".model", ".txt", ".jinja")


def room(limit_gib: float) -> int:
    """Bytes that a cache of that size keeps for good: it is shrunk to them now and then, as several processes fill it."""
    return int(limit_gib * 2**30 * 7 / 8)


class BlockCache:
    """Blocks of bytes in files of a directory that processes share, together at most about `limit_gib`. Thread-safe.

    No error of its disk is an error of the caller: what cannot be read is not there, and what cannot be written is left out,
    with one warning.
    """

    def __init__(self, directory: Path, limit_gib: float):
        self._directory, self._limit = directory / "blocks", int(limit_gib * 2**30)
        self.room = room(limit_gib)
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
            self._shrink(self.room)

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
        self._token_bytes: dict[str, int] = {}  # of the objects that were opened

    def open(self, url: str) -> StoredObject:
        """The object of that URL. Raises DataError, StoreError."""
        found = StoredObject(url, self)
        if found.has_tokens:
            self._token_bytes[url] = found.size
        return found

    @property
    def token_bytes(self) -> int:
        """Bytes of all tokens in the objects that were opened."""
        return sum(self._token_bytes.copy().values())

    def tokenizer(self, url: str) -> Path:
        """A local copy of the tokenizer's files in a folder of the store. Raises DataError, StoreError, OSError."""
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
                write_atomically(folder / name, found.sample(np.array([0]), np.array([found.size])).tobytes())
        return folder


class _Part(NamedTuple):
    """What a read needs of one block."""

    block: tuple[int, int]
    """First byte of the block in the object, bytes."""
    begin: int
    """Of the part, in the block."""
    size: int
    place: int
    """Of the part, in what is read."""


class StoredObject:
    """An object of a store, with the methods of `reads.OpenFile`: the version that was there when it was opened."""

    def __init__(self, url: str, store: Store):
        self.name, self.has_tokens, self._store = url, url.endswith(".bin"), store
        self._system, self._path = remote.open_system(url)
        self.size, self._marks = self._look()
        self.key = xxhash.xxh3_128_hexdigest(f"{url}\n{self.size}\n{self._marks}".encode())
        self._fetching: dict[tuple, Future[bytes]] = {}  # by block and keep; what is not kept stays here until it is read
        self._lock = threading.Lock()

    def stamp(self) -> str:
        """Differs if another version has its name."""
        return self.key

    def read_at(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size). Raises DataError, StoreError."""
        return self.read(np.array([offset]), np.array([size])).tobytes()

    def read_soon(self, offsets: np.ndarray, sizes: np.ndarray) -> None:
        """Starts fetching what is not in the cache of the bytes [offset, offset + size) of all ranges, and waits for none."""
        keep = self._block_bytes() is not None
        for block in {part.block for part in self._parts(offsets, sizes, self._block_bytes())}:
            if not (keep and self._store.cache.has(self._name(block))):
                self._fetch_soon(block, keep)

    def read(self, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Bytes [offset, offset + size) of all ranges, back to back: uint8.

        Raises DataError if the object was replaced or removed since it was opened, StoreError if the store does not answer.
        """
        block_bytes = self._block_bytes()
        return self._read(offsets, sizes, block_bytes, keep=block_bytes is not None)

    def sample(self, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """The same, for ranges that every start of a run reads."""
        return self._read(offsets, sizes, None, keep=True)

    def _block_bytes(self) -> int | None:
        """Bytes that are fetched and kept together; None: what is read is fetched, and not kept."""
        if not self.has_tokens:
            return _INDEX_BLOCK_BYTES
        return BLOCK_BYTES if self._store.token_bytes <= self._store.cache.room else None

    def _read(self, offsets: np.ndarray, sizes: np.ndarray, block_bytes: int | None, *, keep: bool) -> np.ndarray:
        data, missing = np.empty(int(sizes.sum()), dtype=np.uint8), []
        buffer = memoryview(data)
        for part in self._parts(offsets, sizes, block_bytes):
            block, begin, size, place = part
            found = self._store.cache.read(self._name(block), block[1], begin, begin + size) if keep else None
            if found is None:
                missing.append((part, self._fetch_soon(block, keep)))
            else:
                buffer[place : place + size] = found
        for (block, begin, size, place), fetched in missing:
            buffer[place : place + size] = memoryview(fetched.result())[begin : begin + size]
            if not keep:
                self._fetching.pop((block, keep), None)
        return data

    def _parts(self, offsets: np.ndarray, sizes: np.ndarray, block_bytes: int | None) -> Iterator[_Part]:
        """The parts of all ranges; None: each is a block, of at most BLOCK_BYTES. Raises OSError past the end."""
        place = 0
        for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
            if offset + size > self.size:
                raise OSError(f"{self.name}: ends at byte {self.size:,}, {offset + size:,} expected; copy it again")
            while size:
                begin = offset % block_bytes if block_bytes else 0
                length = min(size, (block_bytes or BLOCK_BYTES) - begin)
                block = (offset - begin, min(block_bytes, self.size - offset + begin) if block_bytes else length)
                yield _Part(block, begin, length, place)
                offset, size, place = offset + length, size - length, place + length

    def _name(self, block: tuple[int, int]) -> str:
        return f"{self.key}-{block[0]}-{block[1]}"

    def _fetch_soon(self, block: tuple[int, int], keep: bool) -> Future[bytes]:
        """The block, once it is fetched; a block is fetched once at a time."""
        with self._lock:
            if (block, keep) not in self._fetching:
                self._fetching[block, keep] = self._store.requests.submit(self._fetch, block, keep)
            return self._fetching[block, keep]

    def _fetch(self, block: tuple[int, int], keep: bool) -> bytes:
        begin, size = block

        def request() -> bytes:
            data = self._system.cat_file(self._path, start=begin, end=begin + size)
            if len(data) != size:
                self._require_same()
                if len(data) == self.size:
                    raise DataError(f"{self.name}: the server cannot send parts of a file; use another server, or download it")
                raise OSError(f"{len(data):,} of {size:,} bytes arrived")
            return data

        try:
            data = remote.retried(self.name, request, _REQUEST_SECONDS)
            self._require_same()
            if keep:
                self._store.cache.write(self._name(block), data)
        except BaseException:
            self._fetching.pop((block, keep), None)  # the next read tries again
            raise
        if keep:
            self._fetching.pop((block, keep), None)
        return data

    def _require_same(self) -> None:
        if self._look() != (self.size, self._marks):
            raise DataError(f"{self.name}: was replaced while in use; restore it, or start another run with the new object")

    def _look(self) -> tuple[int, str]:
        """(bytes, what distinguishes its versions) of the object now."""

        def request() -> dict:
            self._system.invalidate_cache()  # of listings
            return self._system.info(self._path)

        about = remote.retried(self.name, request, _REQUEST_SECONDS)
        if about.get("type") == "directory":
            raise DataMissing(f"{self.name}: is a folder, not an object")
        if about.get("size") is None:
            raise DataError(f"{self.name}: the server does not tell its size; use another server, or download it")
        marks = {key.lower(): str(value) for key, value in about.items()}
        return about["size"], " ".join(f"{mark}={marks[mark]}" for mark in _MARKS if marks.get(mark))
