"""Reads records and texts out of one open file: one function for each format. Knows no counts and no names of files.

A record is a JSON object, a row of a table or a row of a column file, with its place "FILE:NUMBER"; `fields.Bad` takes its
place if it cannot be used. Whatever makes the rest of a file unreadable is a DataError, or one of `compressions.READ_ERRORS`.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import itertools
import json
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .division import Shard
from .fields import Bad, Key, Template
from .indexed import DataError

COLUMNAR = (".parquet", ".arrow")
_BATCH_ROWS, _BATCH_BYTES = 1000, 16 << 20
_LARGEST_DOCUMENT = 256 << 20  # bytes of a document, of which several copies are in memory
_BROKEN_CHARACTERS, _BROKEN_SHARE = 100, 0.01  # a file with more has another encoding
# Tests, generated tables and vendored copies are repetitive, and distributors remove some of them.
_STDLIB_FOLDERS_LEFT_OUT = (
    *("__pycache__", "site-packages", "dist-packages", "lib-dynload", "config-*"),
    *("test", "tests", "idle_test", "lib2to3", "idlelib", "turtledemo", "ensurepip"),
    *("encodings", "pydoc_data", "tkinter", "distutils", "msilib", "curses"),
)
_STDLIB_FILES_LEFT_OUT = ("_sysconfigdata*", "sitecustomize.py", "usercustomize.py")
_BETWEEN = (" ", "\t", "\n", "\r", ",")  # JSON values


@dataclass
class Opened:
    """A file that is being read."""

    name: str
    """For messages and places."""
    format: str
    """One of `corpus.FORMATS`."""
    file: io.BufferedReader | BinaryIO
    """Its content, decompressed."""
    size: int = 0
    """Bytes on disk; 0 for standard input."""
    tell: Callable[[], int] | None = None
    """Bytes on disk that have been read."""
    begin: int = 0
    """Where in a file of one document per line the content begins."""

    def __post_init__(self):
        if self.tell is None:
            on_disk = self.file  # a decompressor may close it before its last text is consumed
            self.tell = lambda: on_disk.tell() if self.size and not on_disk.closed else self.size


@dataclass
class TextCounts:
    """What `plain_texts` has noticed so far."""

    replaced_bytes: int = 0
    """Byte sequences that are not UTF-8."""
    unsplit_files: int = 0
    """Files of one document in spite of `split`."""
    json_files: int = 0
    """Texts that look like JSON lines."""


def records(opened: Opened, fields: Key | Template) -> Iterator[tuple[str, object]]:
    """(place, record or Bad) of everything in a file that is not plain text; records have at least the `fields`."""
    if opened.format in COLUMNAR:
        return _columns(opened, fields)
    if opened.format in (".csv", ".tsv"):
        return _table(opened, fields, "," if opened.format == ".csv" else "\t")
    return _json(opened)


def has_json_lines(opened: Opened) -> bool:
    """Whether a file of JSON has one value per line, as far as its start tells; not an array or values over several lines."""
    start = opened.file.peek(1 << 10).removeprefix(b"\xef\xbb\xbf").lstrip()
    first, more, _ = start.partition(b"\n")
    torn = more and start.startswith(b"{") and not first.rstrip().endswith(b"}")
    return not start.startswith(b"[") and not (torn and (opened.format == ".json" or first.strip() == b"{"))


def _json(opened: Opened) -> Iterator[tuple[str, object]]:
    if opened.begin or has_json_lines(opened):
        yield from _json_lines(opened)
    else:
        yield from ((f"{opened.name}:{number}", value) for number, value in enumerate(_json_values(opened), 1))


def _json_lines(opened: Opened) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(iter(lambda: opened.file.readline(_LARGEST_DOCUMENT + 1), b""), 1):
        if number == 1 and not opened.begin:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.isspace():
            continue
        place = f"{opened.name}:{number}"
        if len(line) > _LARGEST_DOCUMENT:
            yield place, Bad(f"a document of more than {_LARGEST_DOCUMENT >> 20} MiB, which may not fit into memory")
            while line and not line.endswith(b"\n"):
                line = opened.file.readline(1 << 20)
            continue
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            record = Bad("not JSON", f" ({error})")
        yield place, record


def _json_values(opened: Opened) -> Iterator:
    """The elements of a JSON array, or JSON values one after another. One at a time is in memory. Raises DataError."""
    text, decoder, number = io.TextIOWrapper(opened.file, encoding="utf-8-sig", newline=""), json.JSONDecoder(), 0
    try:
        held = text.read(1 << 20).lstrip()
        array, complete = held.startswith("["), False
        held = held[1:] if array else held
        while True:
            at = 0
            while True:
                while held[at : at + 1] in _BETWEEN:
                    at += 1
                if array and held.startswith("]", at):
                    complete, at = True, at + 1
                    break
                try:
                    value, at = decoder.raw_decode(held, at)
                except ValueError as error:
                    problem = error
                    break
                number += 1
                yield value
            held = held[at:].lstrip()
            if complete and held:
                raise DataError(f"{opened.name}: has text behind the end of the array; correct it")
            if len(held) > _LARGEST_DOCUMENT:
                raise DataError(
                    f"{opened.name}:{number + 1}: not JSON, or a document of more than {_LARGEST_DOCUMENT >> 20} MiB"
                )
            more = text.read(max(1 << 20, len(held)))
            if not more:
                if held or (array and not complete):
                    where = f"{opened.name}: is not JSON after its element {number:,}"
                    raise DataError(f"{where} ({problem}); correct it, or copy it again if it is not complete")
                return
            held += more
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{opened.name}: is not JSON in UTF-8 after its element {number:,} ({error}); correct it") from None


def _table(opened: Opened, fields: Key | Template, delimiter: str) -> Iterator[tuple[str, object]]:
    csv.field_size_limit(_LARGEST_DOCUMENT)
    text = io.TextIOWrapper(opened.file, encoding="utf-8-sig", newline="")
    rows, complete = csv.reader(text, delimiter=delimiter, strict=True), 0
    try:
        header = next(rows, [])
        columns = {key: header.index(key) for key in _chosen(fields, header, f"{opened.name}: its first line")}
        complete = rows.line_num
        for row in rows:
            complete = rows.line_num
            place = f"{opened.name}:{rows.line_num}"
            if row and len(row) != len(header):
                yield place, Bad(f"not as many values as the header has ({len(header)})", f" but {len(row)}")
            elif row:
                yield place, {key: row[column] for key, column in columns.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        way = "write it again" if isinstance(error, csv.Error) else "convert it with `iconv -f ENCODING -t UTF-8`"
        raise DataError(f"{opened.name}: not a readable table in UTF-8 after line {complete} ({error}); {way}") from None


def _chosen(fields: Key | Template, columns: list[str], where: str) -> list[str]:
    """The columns that `fields` takes values from. Raises DataError if a needed one is missing, or a name is not unique."""
    chosen = {}
    for key in fields.keys:
        column = next((each for each in (key, key.split(".")[0]) if each in columns), None)
        if column is None and key in fields.needed:
            among = ", ".join(map(repr, columns))
            raise DataError(f"{where} has no column {key!r} but {among}; choose with --text-key or --template")
        if columns.count(column) > 1:
            raise DataError(f"{where} has {columns.count(column)} columns {column!r}; rename all but one of them")
        chosen[column] = None
    chosen.pop(None, None)
    if not chosen:
        raise DataError(f"{where} has none of the columns {', '.join(map(repr, fields.keys))}; choose others with --template")
    return list(chosen)


def _columns(opened: Opened, fields: Key | Template) -> Iterator[tuple[str, object]]:
    """Rows of a parquet or an Arrow file; only the columns that `fields` needs are read, a few megabytes at a time."""
    import pyarrow

    try:
        number = 0
        for batch in _parquet_batches(opened, fields) if opened.format == ".parquet" else _arrow_batches(opened.file):
            batch = batch.select(_chosen(fields, batch.schema.names, f"{opened.name}: it"))
            for start in range(0, len(batch), _BATCH_ROWS):
                for record in batch.slice(start, _BATCH_ROWS).to_pylist():
                    number += 1
                    yield f"{opened.name}:{number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{opened.name}: not a readable {opened.format} file ({error}); copy it again") from None


def _parquet_batches(opened: Opened, fields: Key | Template) -> Iterator:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(opened.file)
    about, done = table.metadata, 0
    rows = max(about.num_rows, 1)
    opened.tell = lambda: opened.size * done // rows
    _chosen(fields, table.schema_arrow.names, f"{opened.name}: it")
    leaves = [about.schema.column(i).path for i in range(about.num_columns)]
    wanted = [key if any(_is_below(leaf, key) for leaf in leaves) else key.split(".")[0] for key in fields.keys]
    numbers = [i for i, leaf in enumerate(leaves) if any(_is_below(leaf, key) for key in wanted)]
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    size = sum(group.column(i).total_uncompressed_size for group in groups for i in numbers)
    at_once = max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(1, size)))
    for batch in table.iter_batches(at_once, columns=wanted):
        yield batch
        done += len(batch)


def _is_below(leaf: str, key: str) -> bool:
    return f"{leaf}.".startswith(f"{key}.")


def _arrow_batches(raw: BinaryIO) -> Iterator:
    """Record batches of an Arrow stream, which `datasets` writes, or of an Arrow file."""
    import pyarrow

    head = raw.read(6)
    raw.seek(0)
    if head == b"ARROW1":
        reader = pyarrow.ipc.open_file(raw)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from pyarrow.ipc.open_stream(raw)


def plain_texts(opened: Opened, split: str, counts: TextCounts, key: str) -> Iterator[tuple[str, str | Bad]]:
    """(place, text or Bad) of the documents of a text file, which `split` divides as in `Corpus`. Raises DataError.

    `key`: that of the texts, if the file were JSON lines.
    """
    parts = [opened.file.read(_LARGEST_DOCUMENT + 1)] if split == "file" else _parts(opened.file, split)
    number = broken = characters = 0
    for number, data in enumerate(parts, 1):
        if number == 1 and not opened.begin:
            data = data.removeprefix(b"\xef\xbb\xbf")
        if len(data) > _LARGEST_DOCUMENT:
            size = f"a document of more than {_LARGEST_DOCUMENT >> 20} MiB, which may not fit into memory"
            raise DataError(f"{opened.name}: {size}; say where documents end with --text-split line, blank-line or a separator")
        place, text = (opened.name if split == "file" else f"{opened.name}:{number}"), data.decode(errors="replace")
        replaced = text.count("\ufffd") - data.count("\ufffd".encode())
        broken, characters = broken + replaced + text.count("\0"), characters + len(text)
        if replaced + text.count("\0") and broken > max(_BROKEN_CHARACTERS, _BROKEN_SHARE * characters):
            problem = f": {broken:,} of the first {characters:,} characters cannot be decoded or are zero"
            yield place, Bad("not UTF-8", f"{problem}; convert it with `iconv -f ENCODING -t UTF-8`")
            continue
        counts.replaced_bytes += replaced
        if number == 1 and re.match(rf'\s*\{{[^\n]*"{re.escape(key)}": *"', text[:10_000]):
            counts.json_files += 1
        yield place, text
    counts.unsplit_files += split != "file" and number == 1


def _parts(file: BinaryIO, split: str) -> Iterator[bytes]:
    """Documents of a text file, without the line ends around them. One document at a time is in memory.

    A document that is too large is cut after _LARGEST_DOCUMENT bytes or little more, for the caller to refuse.
    """
    if split == "blank-line":
        for blank, lines in itertools.groupby(iter(lambda: file.readline(_LARGEST_DOCUMENT + 1), b""), key=bytes.isspace):
            if not blank:
                yield _joined(lines).strip(b"\r\n")
        return
    separator = b"\n" if split == "line" else split.encode()
    held, end, size = [], b"", 0  # blocks without a separator, and the end of the last one
    while data := file.read(1 << 20):
        held.append(data)
        size += len(data)
        if separator in end + data:
            *complete, rest = b"".join(held).split(separator)
            yield from (part.strip(b"\r\n") for part in complete)
            held, size, data = [rest], len(rest), rest
        elif size > _LARGEST_DOCUMENT:
            break
        end = (end + data)[-len(separator) + 1 :] if len(separator) > 1 else b""
    if any(held):
        yield b"".join(held).strip(b"\r\n")


def _joined(lines: Iterable[bytes]) -> bytes:
    """The lines up to _LARGEST_DOCUMENT, and the line that goes beyond it."""
    held, size = [], 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size > _LARGEST_DOCUMENT:
            break
    return b"".join(held)


def hub_records(name: str, config: str | None, split: str, shard: Shard | None, shown: str) -> Iterator[tuple[str, object]]:
    """(place, row) of a data set that the `datasets` library streams, or of some of its files. Raises DataError.

    `shown` stands for the data set in places.
    """
    import datasets

    try:
        number, rows = 0, datasets.load_dataset(name, config, split=split, streaming=True)
        if shard and rows.num_shards < shard.count:
            raise DataError(f"--shard: {shown} has {rows.num_shards:,} files; use at most as many shards")
        for batch in (rows.shard(shard.count, shard.index) if shard else rows).iter(batch_size=_BATCH_ROWS):
            for row in zip(*batch.values(), strict=True):
                number += 1
                yield f"{shown}:{number}", dict(zip(batch, row, strict=True))
    except DataError:
        raise
    except Exception as error:  # the library passes on the exceptions of parsers, network and cache
        raise DataError(f"--hf {name}: {type(error).__name__}: {error}") from error


def standard_library() -> Iterator[tuple[str, str]]:
    """Language reference, then modules, of the running Python. Differs between releases, not between machines."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    for name in sorted(topics):
        yield f"topics/{name}", topics[name]
    root = Path(sysconfig.get_paths()["stdlib"])
    found = False
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not _matches(name, _STDLIB_FOLDERS_LEFT_OUT))
        for name in sorted(files):
            if name.endswith(".py") and not _matches(name, _STDLIB_FILES_LEFT_OUT):
                path = Path(folder, name)
                try:
                    yield str(Path("stdlib", path.relative_to(root))), path.read_bytes().decode()
                except UnicodeDecodeError:
                    continue
                found = True
    if not found:
        raise DataError(f"stdlib: Python {sys.version.split()[0]} has no source files in {root}; pass text with --input FILES")


def _matches(name: str, patterns) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
