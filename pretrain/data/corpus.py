"""Streams documents of raw text from files, the Hugging Face hub, or the Python standard library. No torch, no tokens.

    .txt       one document per file, or split at lines, blank lines or a separator. A few bytes that are not UTF-8 become
               U+FFFD and are counted; a file with many has another encoding and counts as bad
    .jsonl     one JSON object per line, with the text under a key; .ndjson, .jsonlines and .jl are the same
    .json      an array of objects, or objects one after another, on one line each or on several
    .csv .tsv  a header, then one document per row, with the text in a column
    .parquet   one document per row, with the text in a column
    .arrow     the same; a folder written by save_to_disk of the `datasets` library consists of such files
    -          standard input: text, or JSON
    stdlib     modules and language reference of the running Python: 8 MB of real text on every machine, without a network

All but .parquet and .arrow may be compressed (.gz, .zst, .bz2, .xz). In folders, .json, .csv and .tsv often describe the data:
they are read only if they are named. Texts are not changed: no stripping, no conversion of line ends (except that the parts of
a split file lose the line ends around them).
"""

from __future__ import annotations

import bz2
import csv
import fnmatch
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from .indexed import DataError

STDLIB, STDIN = "stdlib", "-"
FORMATS = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_SYNONYMS = {".ndjson": ".jsonl", ".jsonlines": ".jsonl", ".jl": ".jsonl", ".feather": ".arrow"}
_ONLY_IF_NAMED = (".json", ".csv", ".tsv")
_DATASETS_METADATA = ("dataset_dict.json", "dataset_info.json", "state.json")
_COLUMNAR = (".parquet", ".arrow")
_UNPACK = {
    ".zip": "unzip {path} -d FOLDER",
    ".tar": "tar -xf {path} -C FOLDER",
    ".tgz": "tar -xf {path} -C FOLDER",
    ".7z": "7z x {path} -oFOLDER",
    ".rar": "unrar x {path} FOLDER/",
}
_BATCH_ROWS, _BATCH_BYTES = 1000, 16 << 20
_MAGIC = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ", ".zst": b"\x28\xb5\x2f\xfd"}
_LARGEST_DOCUMENT = 256 << 20  # bytes of a document, of which several copies are in memory
_BROKEN_CHARACTERS, _BROKEN_SHARE = 100, 0.01  # a file with more has another encoding
# Tests, generated tables and vendored copies are repetitive, and distributors remove some of them.
_STDLIB_FOLDERS_LEFT_OUT = (
    *("__pycache__", "site-packages", "dist-packages", "lib-dynload", "config-*"),
    *("test", "tests", "idle_test", "lib2to3", "idlelib", "turtledemo", "ensurepip"),
    *("encodings", "pydoc_data", "tkinter", "distutils", "msilib", "curses"),
)
_BETWEEN = (" ", "\t", "\n", "\r", ",")  # JSON values
_STDLIB_FILES_LEFT_OUT = ("_sysconfigdata*", "sitecustomize.py", "usercustomize.py")


class Corpus:
    """A source of documents, with counts of what has been read so far.

    `inputs`: files, folders (searched for known formats, in sorted order), "-" (standard input) or "stdlib".
    `text_key`: key or column of the text. `split`: "file" (a .txt is one document), "line", "blank-line", or a separator such
    as "<|endoftext|>". `on_bad_line`: "error" raises DataError at a line or row without usable text, "skip" counts it in
    `bad`. `stdin_format`: format of standard input. `text_key` can be nested: "a.b" is the key "b" of the object under "a".

    Counts: `num_documents`, `utf8_bytes`, `bad` (lines and rows that were skipped, by reason), `empty_documents` (left out),
    `replaced_bytes` (not UTF-8), `unsplit_files` (one document in spite of `split`), `json_files` (text that looks
    like JSON), `other_files` (in folders, not read, by the end of their names).
    """

    def __init__(
        self,
        inputs: list[str],
        *,
        text_key: str = "text",
        split: str = "file",
        on_bad_line: Literal["error", "skip"] = "error",
        stdin_format: Literal["txt", "jsonl"] = "txt",
    ):
        self.inputs, self.text_key, self.split, self.on_bad_line = list(inputs), text_key, split, on_bad_line
        if not split:
            raise DataError("--text-split is empty; allowed: file, line, blank-line, or the text between two documents")
        self.other_files: Counter[str] = Counter()
        self._stdin_format = stdin_format
        self._files = [file for name in inputs for file in ([name] if name in (STDLIB, STDIN) else self._find(Path(name)))]
        sized = all(isinstance(file, Path) for file in self._files)
        self.total_bytes: int | None = sum(file.stat().st_size for file in self._files) if sized else None
        self.num_documents = self.utf8_bytes = self.empty_documents = self.replaced_bytes = self.unsplit_files = 0
        self.json_files = 0
        self.bad: Counter[str] = Counter()
        self._first_bad: dict[str, str] = {}
        self._digest = hashlib.sha256()
        self._finished_bytes, self._tell = 0, lambda: 0
        self._hub: tuple[str, str | None, str] | None = None

    @classmethod
    def from_hub(cls, name: str, config: str | None = None, hub_split: str = "train", **options) -> Corpus:
        """A data set of the Hugging Face hub (or a local folder that `datasets` can load), streamed."""
        corpus = cls([], **options)
        corpus.inputs = [f"hf:{name}" + (f"/{config}" if config else "") + f":{hub_split}"]
        corpus.total_bytes, corpus._hub = None, (name, config, hub_split)
        return corpus

    def documents(self) -> Iterator[tuple[str, str]]:
        """(name, text) of every non-empty document, in a fixed order. Raises DataError."""
        for name, text in self._hub_rows(*self._hub) if self._hub else self._all_files():
            try:
                data = text.encode()
            except UnicodeEncodeError as error:
                self._bad(name, "not valid Unicode", f" ({error})")
                continue
            if not data or data.isspace():
                self.empty_documents += 1
                continue
            self._digest.update(data)
            self._digest.update(b"\0")
            self.num_documents += 1
            self.utf8_bytes += len(data)
            yield name, text

    @property
    def is_from_hub(self) -> bool:
        """True: streamed by `from_hub`."""
        return self._hub is not None

    @property
    def read_bytes(self) -> int:
        """Bytes read from the inputs so far; compressed bytes of compressed files."""
        return self._finished_bytes + self._tell()

    @property
    def most_characters(self) -> int | None:
        """No text is longer than this, over all documents. None: unknown, since files are compressed or streamed."""
        plain = self.total_bytes is not None and all(
            path.suffix.lower() not in COMPRESSIONS and _format(path) not in _COLUMNAR for path in self._files
        )
        return self.total_bytes if plain else None

    @property
    def sha256(self) -> str:
        """Hash of the texts read so far, each followed by a zero byte."""
        return self._digest.hexdigest()

    def description(self) -> dict:
        """Summary of what has been read so far, for sidecars and tokenizers."""
        return {"inputs": self.inputs, "num_documents": self.num_documents, "sha256": self.sha256}

    def problems(self) -> list[str]:
        """One sentence for each kind of text that was left out or changed."""
        found = {
            f"lines, rows or files were skipped: {reason}; the first is {self._first_bad[reason]}": count
            for reason, count in self.bad.items()
        }
        others = ", ".join(f"{count:,} {suffix}" for suffix, count in self.other_files.most_common(5))
        named = "; name files to read them" if any(_format(Path(f"x{each}")) in FORMATS for each in self.other_files) else ""
        found |= {
            "documents without any text were left out": self.empty_documents,
            "byte sequences that are not UTF-8 became U+FFFD": self.replaced_bytes,
            f"files do not contain the separator --text-split {self.split!r}: each is one document": self.unsplit_files,
            "texts look like JSON lines but were read as plain text: name files .jsonl, or use --stdin-format": self.json_files,
            f"files in the folders were left out: {others}{named}": self.other_files.total(),
        }
        return [f"{count:,} {text}" for text, count in found.items() if count]

    def _find(self, path: Path) -> list[Path]:
        """The files to read at `path`. Raises DataError."""
        if path.is_dir():
            return self._find_in_folder(path)
        if not path.is_file():
            raise DataError(f"{path}: no such file; --input accepts files, folders, {STDIN} (standard input) and {STDLIB}")
        if (form := _format(path)) not in FORMATS:
            if form in _UNPACK:
                raise DataError(f"{path}: an archive; unpack it with `{_UNPACK[form].format(path=path)}` and name the folder")
            pack = {".gz": "gzip -dc", ".zst": "zstd -dc", ".bz2": "bzip2 -dc", ".xz": "xz -dc"}.get(path.suffix.lower(), "cat")
            raise DataError(
                f"{path}: unknown format; allowed: {', '.join(FORMATS)} (also {', '.join(COMPRESSIONS)}). If it is plain text, "
                f"use `{pack} {path} |` and --input {STDIN}; else convert it to a .jsonl with one object per line: "
                f'{{"{self.text_key}": "the text of a document"}}'
            )
        return [path]

    def _find_in_folder(self, folder: Path) -> list[Path]:
        for path in sorted(folder.rglob("dataset_dict.json")):
            splits = sorted(each.parent.name for each in path.parent.glob("*/state.json"))
            if len(splits) > 1:  # reading all would train on the test set
                one = "train" if "train" in splits else splits[0]
                names = f"the splits {', '.join(splits)}; choose one: --input {path.parent / one}"
                raise DataError(f"{path.parent}: was written by save_to_disk of `datasets` and has {names}")
        files = sorted(file for file in folder.rglob("*") if file.is_symlink() or not file.is_dir())
        found = [file for file in files if file.is_file() and _is_read_in_folders(file)]
        left = [file for file in files if not file.name.startswith(".") and file.name not in _DATASETS_METADATA]
        others = Counter("".join(file.suffixes[-2:]).lower() or "without an ending" for file in set(left).difference(found))
        if not found:
            named = sorted({f"{folder}/*{suffix}" for suffix in others if _format(Path(f"x{suffix}")) in _ONLY_IF_NAMED})
            way = f"; name its files: --input {' '.join(named)}" if named else f"; it has {', '.join(others) or 'no files'}"
            raise DataError(
                f"{folder}: this folder has no {', '.join(f for f in FORMATS if f not in _ONLY_IF_NAMED)} files{way}"
            )
        self.other_files += others
        return found

    def _bad(self, place: str, reason: str, detail: str = "") -> None:
        """Counts a line, row or file without usable text under its `reason`, or raises DataError."""
        self.bad[reason] += 1
        self._first_bad.setdefault(reason, place)
        if self.on_bad_line == "error":
            raise DataError(f"{place}: {reason}{detail}; correct it, or skip such lines with --on-bad-line skip")

    def _text_of(self, record, place: str) -> str | None:
        """The text of a JSON object or a row. None: bad, and skipped."""
        keys = [self.text_key] if isinstance(record, dict) and self.text_key in record else self.text_key.split(".")
        to = f"{place.rpartition(':')[0]} > NEW.jsonl"
        for number, key in enumerate(keys):
            parent = f"{'.'.join(keys[:number])!r} is " if number else ""
            if not isinstance(record, dict):
                way = f" (`jq -c '.[] | {{{key}: .}}' {to}` makes objects of strings)" if isinstance(record, str) else ""
                return self._bad(place, f"{parent}not an object with the key {key!r}", way)
            if key not in record:
                lists = [each for each, value in record.items() if isinstance(value, list) and isinstance([*value, 0][0], dict)]
                way = f" or `jq -c '.{lists[0]}[]' {to}` to take the objects out of {lists[0]!r}" if lists else ""
                among = f" among {', '.join(map(repr, record))} (--text-key{way})"
                return self._bad(place, f"no key {self.text_key!r}", among)
            record = record[key]
        if isinstance(record, bytes):  # a column of a parquet file that was not declared as text
            try:
                return record.decode()
            except UnicodeDecodeError as error:
                return self._bad(place, f"{self.text_key!r} is not UTF-8", f" ({error})")
        if not isinstance(record, str):
            way = f" with the keys {', '.join(record)} (--text-key {self.text_key}.KEY)" if isinstance(record, dict) else ""
            way = f" (`jq -c '.{self.text_key} |= join(\"\\n\")' {to}` joins its parts)" if isinstance(record, list) else way
            return self._bad(place, f"{self.text_key!r} is {type(record).__name__}, not text", way)
        return record

    def _all_files(self) -> Iterator[tuple[str, str]]:
        for path in self._files:
            if path == STDLIB:
                yield from _standard_library()
                continue
            if path == STDIN:
                read = self._json if self._stdin_format == "jsonl" else self._text
                yield from read(Path("standard input"), io.BufferedReader(sys.stdin.buffer, 1 << 20))
                continue
            try:
                with open(path, "rb") as raw:
                    yield from self._one_file(path, raw)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise DataError(f"{path}: cannot be read to the end ({error}); copy it again") from None
            self._finished_bytes, self._tell = self._finished_bytes + path.stat().st_size, lambda: 0

    def _one_file(self, path: Path, raw: io.BufferedReader) -> Iterator[tuple[str, str]]:
        size = path.stat().st_size
        self._tell = lambda: size if raw.closed else raw.tell()  # a decompressor may close it before its last text is consumed
        if _format(path) in _COLUMNAR:
            return self._columns(path, raw)
        _check_compression(path, raw)
        file = io.BufferedReader(_decompressed(path, raw), 1 << 20)
        if _format(path) in (".csv", ".tsv"):
            return self._table(path, file, "," if _format(path) == ".csv" else "\t")
        return self._text(path, file) if _format(path) == ".txt" else self._json(path, file)

    def _json(self, path: Path, file: io.BufferedReader) -> Iterator[tuple[str, str]]:
        """Objects on a line each; or in an array or over several lines, which is found out from the start of the file."""
        start = file.peek(1 << 10).removeprefix(b"\xef\xbb\xbf").lstrip()
        first, more, _ = start.partition(b"\n")
        torn = more and start.startswith(b"{") and not first.rstrip().endswith(b"}")
        if start.startswith(b"[") or (torn and (_format(path) == ".json" or first.strip() == b"{")):
            for number, record in enumerate(_json_values(path, file), 1):
                if (text := self._text_of(record, f"{path}:{number}")) is not None:
                    yield f"{path}:{number}", text
            return
        for number, line in enumerate(iter(lambda: file.readline(_LARGEST_DOCUMENT + 1), b""), 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.isspace():
                continue
            name = f"{path}:{number}"
            if len(line) > _LARGEST_DOCUMENT:
                self._bad(name, f"a document of more than {_LARGEST_DOCUMENT >> 20} MiB, which may not fit into memory")
                while line and not line.endswith(b"\n"):
                    line = file.readline(1 << 20)
                continue
            try:
                record = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                self._bad(name, "not JSON", f" ({error})")
                continue
            if (text := self._text_of(record, name)) is not None:
                yield name, text

    def _table(self, path: Path, file: BinaryIO, delimiter: str) -> Iterator[tuple[str, str]]:
        csv.field_size_limit(_LARGEST_DOCUMENT)
        rows = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
        complete = 0
        try:
            header = next(rows, [])
            if self.text_key not in header:
                names = ", ".join(map(repr, header))
                raise DataError(f"{path}: no column {self.text_key!r} in its first line: {names}; choose one with --text-key")
            complete = rows.line_num
            for row in rows:
                complete = rows.line_num
                name = f"{path}:{rows.line_num}"
                if row and len(row) != len(header):
                    self._bad(name, f"not as many values as the header has ({len(header)})", f" but {len(row)}")
                elif row:
                    yield name, row[header.index(self.text_key)]
        except (csv.Error, UnicodeDecodeError) as error:
            way = "write it again" if isinstance(error, csv.Error) else "convert it with `iconv -f ENCODING -t UTF-8`"
            raise DataError(f"{path}: not a readable table in UTF-8 after line {complete} ({error}); {way}") from None

    def _text(self, path: Path, file: BinaryIO) -> Iterator[tuple[str, str]]:
        parts = [file.read(_LARGEST_DOCUMENT + 1)] if self.split == "file" else _parts(file, self.split)
        number = broken = characters = 0
        for number, data in enumerate(parts, 1):
            if number == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            if len(data) > _LARGEST_DOCUMENT:
                size = f"a document of more than {_LARGEST_DOCUMENT >> 20} MiB, which may not fit into memory"
                raise DataError(f"{path}: {size}; say where documents end with --text-split line, blank-line or a separator")
            name, text = (str(path) if self.split == "file" else f"{path}:{number}"), data.decode(errors="replace")
            replaced = text.count("\ufffd") - data.count("\ufffd".encode())
            broken, characters = broken + replaced + text.count("\0"), characters + len(text)
            if replaced + text.count("\0") and broken > max(_BROKEN_CHARACTERS, _BROKEN_SHARE * characters):
                problem = f": {broken:,} of the first {characters:,} characters cannot be decoded or are zero"
                self._bad(name, "not UTF-8", f"{problem}; convert it with `iconv -f ENCODING -t UTF-8`")
                continue
            self.replaced_bytes += replaced
            if number == 1 and re.match(rf'\s*\{{[^\n]*"{re.escape(self.text_key)}": *"', text[:10_000]):
                self.json_files += 1
            yield name, text
        self.unsplit_files += self.split != "file" and number == 1

    def _columns(self, path: Path, raw: BinaryIO) -> Iterator[tuple[str, str]]:
        """Rows of a parquet or an Arrow file; only the column of the text is read, a few megabytes at a time."""
        import pyarrow

        try:
            done, batches = 0, self._parquet(path, raw) if _format(path) == ".parquet" else _arrow_batches(raw)
            for batch in batches:
                names = batch.schema.names
                column = self.text_key if self.text_key in names else self.text_key.split(".")[0]
                if column not in names:
                    among = ", ".join(map(repr, names))
                    raise DataError(f"{path}: no column {self.text_key!r} among {among}; choose one with --text-key")
                for start in range(0, len(batch), _BATCH_ROWS):
                    for value in batch.column(column).slice(start, _BATCH_ROWS).to_pylist():
                        done += 1
                        if (text := self._text_of({column: value}, f"{path}:{done}")) is not None:
                            yield f"{path}:{done}", text
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable {_format(path)} file ({error}); copy it again") from None

    def _parquet(self, path: Path, raw: BinaryIO) -> Iterator:
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(raw)
        size, rows, done, about = path.stat().st_size, max(table.metadata.num_rows, 1), 0, table.metadata
        self._tell = lambda: size * done // rows
        groups = [about.row_group(i) for i in range(about.num_row_groups)]
        leaves = {each: groups[0].column(each).path_in_schema for each in range(about.num_columns)} if groups else {}
        own = [each for each, leaf in leaves.items() if leaf == self.text_key]
        column_bytes = sum(group.column(each).total_uncompressed_size for group in groups for each in own)
        at_once = max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(1, column_bytes)))
        for batch in table.iter_batches(at_once, columns=[self.text_key] if own else None):
            yield batch
            done += len(batch)

    def _hub_rows(self, name: str, config: str | None, split: str) -> Iterator[tuple[str, str]]:
        import datasets

        if any((Path(name) / each).is_file() for each in _DATASETS_METADATA):
            raise DataError(f"--hf {name}: this folder was written by save_to_disk; read it with --input {name}")
        try:
            number = 0
            for batch in datasets.load_dataset(name, config, split=split, streaming=True).iter(batch_size=_BATCH_ROWS):
                for row in zip(*batch.values(), strict=True):
                    number += 1
                    place = f"{self.inputs[0]}:{number}"
                    if (text := self._text_of(dict(zip(batch, row, strict=True)), place)) is not None:
                        yield place, text
        except (DataError, GeneratorExit):
            raise
        except Exception as error:  # the library passes on the exceptions of parsers, network and cache
            raise DataError(f"--hf {name}: {type(error).__name__}: {error}") from error


def _format(path: Path) -> str:
    """The format of a file by its name, one of FORMATS; another ending if it is not known."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSIONS]
    suffix = suffixes[-1] if suffixes else ""
    return _SYNONYMS.get(suffix, suffix)


def _is_read_in_folders(path: Path) -> bool:
    computed = path.name.startswith("cache-") and path.suffix == ".arrow"  # by `datasets`, from the files beside it
    return _format(path) in FORMATS and _format(path) not in _ONLY_IF_NAMED and not computed


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        return pyarrow.input_stream(raw, compression="zstd")
    open_as = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix)
    return open_as(raw) if open_as else raw


def _json_values(path: Path, file: BinaryIO) -> Iterator:
    """The elements of a JSON array, or JSON values one after another. One at a time is in memory. Raises DataError."""
    text, decoder, number = io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), json.JSONDecoder(), 0
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
                raise DataError(f"{path}: has text behind the end of the array; correct it")
            if len(held) > _LARGEST_DOCUMENT:
                raise DataError(f"{path}:{number + 1}: not JSON, or a document of more than {_LARGEST_DOCUMENT >> 20} MiB")
            more = text.read(max(1 << 20, len(held)))
            if not more:
                if held or (array and not complete):
                    where = f"{path}: is not JSON after its element {number:,}"
                    raise DataError(f"{where} ({problem}); correct it, or copy it again if it is not complete")
                return
            held += more
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON in UTF-8 after its element {number:,} ({error}); correct it") from None


def _check_compression(path: Path, raw: io.BufferedReader) -> None:
    """Raises DataError if a file's content is not compressed as its name says. Consumes nothing."""
    head, named = raw.peek(6)[:6], path.suffix.lower()
    content = next((suffix for suffix, magic in _MAGIC.items() if head.startswith(magic)), None)
    if content and content != named:
        raise DataError(f"{path}: is compressed, but its name does not end in {content}; rename it")
    if head and named in _MAGIC and content != named:
        raise DataError(f"{path}: is not compressed, although its name ends in {named}; rename it")


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


def _standard_library() -> Iterator[tuple[str, str]]:
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
                    yield str(Path(STDLIB, path.relative_to(root))), path.read_bytes().decode()
                except UnicodeDecodeError:
                    continue
                found = True
    if not found:
        raise DataError(
            f"{STDLIB}: Python {sys.version.split()[0]} has no source files in {root}; pass text with --input FILES"
        )


def _matches(name: str, patterns) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
