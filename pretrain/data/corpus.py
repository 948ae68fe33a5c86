"""Streams documents of raw text from files, the Hugging Face hub, or the Python standard library. No torch, no tokens.

    .txt       one document per file, or split at lines, blank lines or a separator. A few bytes that are not UTF-8 become
               U+FFFD and are counted; a file with many has another encoding and counts as bad
    .jsonl     one JSON object per line, with the text under a key
    .parquet   one document per row, with the text in a column
    -          standard input: text, or JSON lines
    stdlib     modules and language reference of the running Python: 8 MB of real text on every machine, without a network

.txt and .jsonl may be compressed (.gz, .zst). Texts are not changed: no stripping, no conversion of line ends (except that the
parts of a split file lose the line ends around them).
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import io
import itertools
import json
import os
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from .indexed import DataError

STDLIB, STDIN = "stdlib", "-"
FORMATS = (".txt", ".jsonl", ".parquet")
_COMPRESSIONS = (".gz", ".zst")
_BATCH_ROWS = 1000
_LARGEST_DOCUMENT = 256 << 20  # bytes of a .txt document in memory; encoding takes 25 times as much
_BROKEN_CHARACTERS, _BROKEN_SHARE = 100, 0.01  # a file with more has another encoding
# Tests, generated tables and vendored copies are repetitive, and distributors remove some of them.
_STDLIB_FOLDERS_LEFT_OUT = (
    *("__pycache__", "site-packages", "dist-packages", "lib-dynload", "config-*"),
    *("test", "tests", "idle_test", "lib2to3", "idlelib", "turtledemo", "ensurepip"),
    *("encodings", "pydoc_data", "tkinter", "distutils", "msilib", "curses"),
)
_STDLIB_FILES_LEFT_OUT = ("_sysconfigdata*", "sitecustomize.py", "usercustomize.py")


class Corpus:
    """A source of documents, with counts of what has been read so far.

    `inputs`: files, folders (searched for known formats, in sorted order), "-" (standard input) or "stdlib".
    `text_key`: key or column of the text. `split`: "file" (a .txt is one document), "line", "blank-line", or a separator such
    as "<|endoftext|>". `on_bad_line`: "error" raises DataError at a line or row without usable text, "skip" counts it in
    `bad_lines`. `stdin_format`: format of standard input.

    Counts: `num_documents`, `utf8_bytes`, `bad_lines`, `empty_documents` (left out), `replaced_bytes` (not UTF-8),
    `unsplit_files` (one document in spite of `split`), `other_files` (in folders, of formats that are not read).
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
        self.other_files, self._stdin_format = 0, stdin_format
        self._files = [file for name in inputs for file in ([name] if name in (STDLIB, STDIN) else self._find(Path(name)))]
        sized = all(isinstance(file, Path) for file in self._files)
        self.total_bytes: int | None = sum(file.stat().st_size for file in self._files) if sized else None
        self.num_documents = self.utf8_bytes = self.bad_lines = self.empty_documents = self.replaced_bytes = 0
        self.unsplit_files = 0
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
                self._bad(f"{name}: {error}")
                continue
            if not data or data.isspace():
                self.empty_documents += 1
                continue
            self._digest.update(data + b"\0")
            self.num_documents += 1
            self.utf8_bytes += len(data)
            yield name, text

    @property
    def read_bytes(self) -> int:
        """Bytes read from the inputs so far; compressed bytes of compressed files."""
        return self._finished_bytes + self._tell()

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
            "lines without usable text were skipped": self.bad_lines,
            "documents without any text were left out": self.empty_documents,
            "byte sequences that are not UTF-8 became U+FFFD": self.replaced_bytes,
            f"files do not contain the separator --text-split {self.split!r}: each is one document": self.unsplit_files,
            f"files in the folders are not {', '.join(FORMATS)} and were left out": self.other_files,
        }
        return [f"{count:,} {text}" for text, count in found.items() if count]

    def _find(self, path: Path) -> list[Path]:
        """The files to read at `path`. Raises DataError."""
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
            found = [file for file in files if file.is_file() and _format(file) in FORMATS]
            if not found:
                raise DataError(f"{path}: this folder has no {', '.join(FORMATS)} files")
            self.other_files += sum(not file.name.startswith(".") for file in files) - len(found)
            return found
        if not path.is_file():
            raise DataError(f"{path}: no such file; --input accepts files, folders, {STDIN} (standard input) and {STDLIB}")
        if _format(path) not in FORMATS:
            raise DataError(f"{path}: unknown format; allowed: {', '.join(FORMATS)}, the first two also as .gz or .zst")
        return [path]

    def _bad(self, problem: str) -> None:
        self.bad_lines += 1
        if self.on_bad_line == "error":
            raise DataError(f"{problem}; correct it, or skip such lines with --on-bad-line skip")

    def _text_of(self, record, place: str) -> str | None:
        """The text of a JSON object or a row. None: bad, and skipped."""
        if not isinstance(record, dict):
            return self._bad(f"{place}: not an object with the key {self.text_key!r}")
        if self.text_key not in record:
            return self._bad(f"{place}: no key {self.text_key!r} among {', '.join(map(repr, record))} (--text-key)")
        if not isinstance(record[self.text_key], str):
            return self._bad(f"{place}: {self.text_key!r} is {type(record[self.text_key]).__name__}, not text")
        return record[self.text_key]

    def _all_files(self) -> Iterator[tuple[str, str]]:
        for path in self._files:
            if path == STDLIB:
                yield from _standard_library()
                continue
            if path == STDIN:
                read = self._jsonl if self._stdin_format == "jsonl" else self._text
                yield from read(Path("standard input"), sys.stdin.buffer)
                continue
            try:
                with open(path, "rb") as raw:
                    yield from self._one_file(path, raw)
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{path}: cannot be read to the end ({error}); copy it again") from None
            self._finished_bytes, self._tell = self._finished_bytes + path.stat().st_size, lambda: 0

    def _one_file(self, path: Path, raw: BinaryIO) -> Iterator[tuple[str, str]]:
        size = path.stat().st_size
        self._tell = lambda: size if raw.closed else raw.tell()  # a decompressor may close it before its last text is consumed
        if _format(path) == ".parquet":
            return self._parquet(path, raw)
        file = _decompressed(path, raw)
        return self._jsonl(path, file) if _format(path) == ".jsonl" else self._text(path, file)

    def _jsonl(self, path: Path, file: BinaryIO) -> Iterator[tuple[str, str]]:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.isspace():
                continue
            name = f"{path}:{number}"
            try:
                record = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                self._bad(f"{name}: not JSON ({error})")
                continue
            if (text := self._text_of(record, name)) is not None:
                yield name, text

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
                problem = f"{broken:,} of the first {characters:,} characters cannot be decoded or are zero"
                self._bad(f"{name}: not UTF-8: {problem}; convert it with `iconv -f ENCODING -t UTF-8`")
                continue
            self.replaced_bytes += replaced
            yield name, text
        self.unsplit_files += self.split != "file" and number == 1

    def _parquet(self, path: Path, raw: BinaryIO) -> Iterator[tuple[str, str]]:
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(raw)
            if self.text_key not in table.schema_arrow.names:
                names = ", ".join(map(repr, table.schema_arrow.names))
                raise DataError(f"{path}: no column {self.text_key!r} among {names}; choose one with --text-key")
            size, rows, done = path.stat().st_size, max(table.metadata.num_rows, 1), 0
            self._tell = lambda: size * done // rows
            for batch in table.iter_batches(_BATCH_ROWS, columns=[self.text_key]):
                for value in batch.column(0).to_pylist():
                    done += 1
                    if (text := self._text_of({self.text_key: value}, f"{path}:{done}")) is not None:
                        yield f"{path}:{done}", text
        except pyarrow.ArrowException as error:
            raise DataError(f"{path}: not a readable parquet file ({error}); copy it again") from None

    def _hub_rows(self, name: str, config: str | None, split: str) -> Iterator[tuple[str, str]]:
        import datasets

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
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in _COMPRESSIONS]
    return suffixes[-1] if suffixes else ""


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(raw)
    if path.suffix.lower() == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"), 1 << 20)
    return raw


def _parts(file: BinaryIO, split: str) -> Iterator[bytes]:
    """Documents of a text file, without the line ends around them. One document at a time is in memory."""
    if split == "blank-line":
        for blank, lines in itertools.groupby(file, key=bytes.isspace):
            if not blank:
                yield b"".join(lines).strip(b"\r\n")
        return
    rest, separator = b"", b"\n" if split == "line" else split.encode()
    while data := file.read(1 << 20):
        *complete, rest = (rest + data).split(separator)
        yield from (part.strip(b"\r\n") for part in complete)
    if rest:
        yield rest.strip(b"\r\n")


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
