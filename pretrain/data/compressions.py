"""Compressed files: recognized by their names or first bytes, and decompressed as a stream.

A file that ends early is an error, never a shorter text: every reader here raises one of READ_ERRORS. Changed bytes are found
where the format has a checksum, which .lzma never has, and .zst and .lz4 need not have. (The readers of `fsspec`
for the same formats cut .snappy after a gigabyte, read one file of a .zip, and need packages that `pyarrow` replaces.)
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from pathlib import PurePosixPath
from typing import BinaryIO

from .indexed import DataError

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz", ".lzma", ".lz4", ".snappy", ".zip")
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
_SNAPPY_HEADER = b"\xff\x06\x00\x00sNaPpY"
_MAGIC = {
    ".gz": b"\x1f\x8b",
    ".zst": b"\x28\xb5\x2f\xfd",
    ".bz2": b"BZh",
    ".xz": b"\xfd7zXZ",
    ".lz4": b"\x04\x22\x4d\x18",
    ".snappy": _SNAPPY_HEADER,
    ".zip": b"PK\x03\x04",
}
"""First bytes. Those of .lzma are not distinctive."""
_ZIP_ENCRYPTED = 1


def named_compression(name: str) -> str:
    """The compression by the end of a name, one of COMPRESSIONS; empty: none."""
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def compression(name: str, file: io.BufferedReader, by_content: bool) -> str:
    """The compression of an open file, one of COMPRESSIONS; empty: none. Consumes nothing.

    `by_content`: the first bytes decide where the name says nothing. Otherwise, DataError is raised if name and content differ.
    """
    head, named = file.peek(16)[:16], named_compression(name)
    content = next((suffix for suffix, magic in _MAGIC.items() if head.startswith(magic)), "")
    if content and content != named and (named or not by_content):
        way = "rename it" if named else "rename it, or name its format with --format"
        raise DataError(f"{name}: is compressed, but its name does not end in {content}; {way}")
    if head and named in _MAGIC and not content:
        raise DataError(f"{name}: is not compressed as its name says, which ends in {named}; rename it")
    return named or content


def decompressed(name: str, file: BinaryIO, suffix: str) -> BinaryIO:
    """The content of a file with the compression `suffix`, but .zip. Raises DataError; reading it may raise READ_ERRORS."""
    if suffix in (".zst", ".lz4"):
        import pyarrow

        return pyarrow.input_stream(file, compression={".zst": "zstd", ".lz4": "lz4"}[suffix])
    if suffix == ".snappy":
        return _Snappy(name, file)
    open_as = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".lzma": lzma.open}.get(suffix)
    return open_as(file) if open_as else file


class _Snappy(io.RawIOBase):
    """Snappy's framing format. A file that is cut between two of its blocks cannot be distinguished from an intact one."""

    def __init__(self, name: str, file: BinaryIO):
        try:
            import snappy
        except ImportError:
            raise DataError(f"{name}: reading .snappy needs the package python-snappy: pip install python-snappy") from None
        self._file, self._decompressor, self._held = file, snappy.StreamDecompressor(), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._held:
            data = self._file.read(1 << 20)
            if not data:
                if self._decompressor.remains:
                    raise EOFError("the file ends inside a block")
                return 0
            self._held = memoryview(self._decompressor.decompress(data))
        size = min(len(buffer), len(self._held))
        buffer[:size], self._held = self._held[:size], self._held[size:]
        return size


def open_archive(name: str, file: BinaryIO) -> zipfile.ZipFile:
    """A .zip archive. Raises DataError if it cannot be read here."""
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise DataError(f"{name}: not a readable .zip archive ({error}); copy it again") from None
    for member in archive.infolist():
        if member.flag_bits & _ZIP_ENCRYPTED:
            raise DataError(f"{name}: {member.filename} needs a password; unpack it with `unzip {name} -d FOLDER`")
    return archive


def open_member(name: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> BinaryIO:
    """A file of an archive. Raises DataError if it cannot be read here; reading it may raise READ_ERRORS."""
    try:
        return archive.open(member)
    except NotImplementedError as error:
        way = f"unpack it with `unzip {name} -d FOLDER`, and name the folder"
        raise DataError(f"{name}: {member.filename} is packed by a method that Python cannot read ({error}); {way}") from None
