"""Streams documents of raw text from files, the Hugging Face hub, or the Python standard library. No torch, no tokens.

    .txt       one document per file, or split at lines, blank lines or a separator. A few bytes that are not UTF-8 become
               U+FFFD and are counted; a file with many has another encoding and counts as bad
    .jsonl     one JSON object per line, with the text under a key; .ndjson, .jsonlines and .jl are the same
    .json      an array of objects, or objects one after another, on one line each or on several
    .csv .tsv  a header, then one document per row, with the text in a column
    .parquet   one document per row, with the text in a column
    .arrow     the same; a folder written by save_to_disk of the `datasets` library consists of such files
    .zip       an archive of any of the others but the last two
    -          standard input: any of the above but the last three
    stdlib     modules and language reference of the running Python: 8 MB of real text on every machine, without a network

Files and folders may be URLs. All but .parquet and .arrow may be compressed, in the ways of `compressions.py`. A format that is
given overrides all names. In folders, .json, .csv and .tsv often describe the data: they are read only if they are named, as
are archives. Texts are not changed: no stripping, no conversion of line ends (except that the parts of a split file lose the
line ends around them).
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from . import readers, remote
from .compressions import COMPRESSIONS, READ_ERRORS, compression, decompressed, named_compression, open_archive, open_member
from .division import Lines, Part, Shard, divide, files_fingerprint
from .fields import Bad, Key, Template
from .indexed import DataError
from .near_duplicates import NearDuplicates
from .readers import COLUMNAR, Opened

STDLIB, STDIN = "stdlib", "-"
FORMATS = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
FORMAT_NAMES = tuple(each[1:] for each in FORMATS if each != ".ndjson")
"""What `format` of `Corpus` may be."""
_SYNONYMS = {".ndjson": ".jsonl", ".jsonlines": ".jsonl", ".jl": ".jsonl", ".feather": ".arrow"}
_ONLY_IF_NAMED = (".json", ".csv", ".tsv")
_DATASETS_METADATA = ("dataset_dict.json", "dataset_info.json", "state.json")
_UNPACK = {
    ".tar": "tar -xf {path} -C FOLDER",
    ".tgz": "tar -xf {path} -C FOLDER",
    ".7z": "7z x {path} -oFOLDER",
    ".rar": "unrar x {path} FOLDER/",
}


class Corpus:
    """A source of documents, with counts of what has been read so far.

    `inputs`: files and folders, or URLs of them (folders are searched for known formats, in sorted order), "-" (standard input)
    or "stdlib". `format`: one of FORMAT_NAMES, which overrides the names of all files; the compression is then that of
    their names, else of their first bytes. Without it, standard input is text. `text_key`: key or column of the text, "a.b" if
    it is nested. `template`: instead of a key, as in `fields.Template`. `split`: "file" (a .txt is one document), "line",
    "blank-line", or a separator such as "<|endoftext|>". `on_bad_line`: "error" raises DataError at a line or row without
    usable text, "skip" counts it in `bad`. `near_duplicates`: leaves out documents that resemble an earlier one. `shard`: only
    this part of the files; all shards in order are the input in order.

    Counts: `num_documents`, `utf8_bytes`, `bad` (lines and rows that were skipped, by reason), `empty_documents` (left out),
    `text_counts` (of plain text), `other_files` (in folders and archives, not read, by the end of their names).
    """

    def __init__(
        self,
        inputs: list[str],
        *,
        text_key: str = "text",
        template: str | None = None,
        split: str = "file",
        on_bad_line: Literal["error", "skip"] = "error",
        format: str | None = None,
        near_duplicates: NearDuplicates | None = None,
        shard: Shard | None = None,
    ):
        """Raises DataError."""
        self.inputs, self.split, self.on_bad_line, self._near_duplicates = list(inputs), split, on_bad_line, near_duplicates
        self._template = template
        self._fields = Key(text_key) if template is None else Template(template)
        self._given_format = f".{format}" if format else None
        if not split:
            raise DataError("--text-split is empty; allowed: file, line, blank-line, or the text between two documents")
        if STDIN in self.inputs and self._given_format in COLUMNAR:
            raise DataError(f"--format {format}: cannot be read from standard input; name the files")
        self.other_files: Counter[str] = Counter()
        files = [file for name in inputs for file in ([name] if name in (STDLIB, STDIN) else self._find(name))]
        self._sizes = [(file, 0 if file in (STDLIB, STDIN) else remote.size(file)) for file in files]
        sized = not {STDLIB, STDIN}.intersection(files)
        if shard and not sized:
            raise DataError(f"--shard: {STDIN} and {STDLIB} cannot be divided; write the text to files, and name these")
        whole = [Part(name, 0, size, size) for name, size in self._sizes]
        self._parts = divide(self._sizes, shard, self._is_divisible) if shard else whole
        self.total_bytes: int | None = sum(part.end - part.begin for part in self._parts) if sized else None
        self.num_documents = self.utf8_bytes = self.empty_documents = 0
        self.text_counts = readers.TextCounts()
        self.bad: Counter[str] = Counter()
        self._first_bad: dict[str, str] = {}
        self._digest = hashlib.sha256()
        self._finished_bytes, self._opened = 0, None
        self._hub: tuple | None = None  # arguments of `hub_records`

    @classmethod
    def from_hub(
        cls, name: str, config: str | None = None, hub_split: str = "train", shard: Shard | None = None, **options
    ) -> Corpus:
        """A data set of the Hugging Face hub (or a local folder that `datasets` can load), streamed. Raises DataError."""
        if any((Path(name) / each).is_file() for each in _DATASETS_METADATA):
            raise DataError(f"--hf {name}: this folder was written by save_to_disk; read it with --input {name}")
        corpus = cls([], **options)
        corpus.inputs = [f"hf:{name}" + (f"/{config}" if config else "") + f":{hub_split}"]
        corpus.total_bytes, corpus._hub = None, (name, config, hub_split, shard)
        return corpus

    def documents(self) -> Iterator[tuple[str, str]]:
        """(name, text) of every non-empty document, in a fixed order. Raises DataError."""
        texts = self._with_text(readers.hub_records(*self._hub, self.inputs[0])) if self._hub else self._all_files()
        for name, text in texts:
            data = self._usable(name, text)
            if data is None or (self._near_duplicates and not self._near_duplicates.is_new(name, text)):
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
        return self._finished_bytes + (self._opened.tell() if self._opened else 0)

    @property
    def most_characters(self) -> int | None:
        """No text is longer than this, over all documents. None: unknown, as files are compressed or streamed, or texts are
        made by a template."""
        plain = self.total_bytes is not None and self._template is None and self._given_format is None
        plain = plain and not any(named_compression(part.name) or _format(part.name) in COLUMNAR for part in self._parts)
        return sum(part.size for part in self._parts) if plain else None

    def files_fingerprint(self) -> str:
        """Hash of names and sizes of all files, those of other shards included."""
        return files_fingerprint(self._sizes)

    @property
    def sha256(self) -> str:
        """Hash of the texts read so far, each followed by a zero byte."""
        return self._digest.hexdigest()

    def description(self) -> dict:
        """Summary of what has been read so far, for sidecars and tokenizers."""
        description = {"inputs": self.inputs, "num_documents": self.num_documents, "sha256": self.sha256}
        if self._template is not None:
            description["template"] = self._template
        if self._near_duplicates:
            description["near_duplicates"] = self._near_duplicates.description()
        return description

    def problems(self) -> list[str]:
        """One sentence for each kind of text that was left out or changed."""
        found = {
            f"lines, rows or files were skipped: {reason}; the first is {self._first_bad[reason]}": count
            for reason, count in self.bad.items()
        }
        others = ", ".join(f"{count:,} {suffix}" for suffix, count in self.other_files.most_common(5))
        named = "; name files to read them" if any(_is_readable(f"x{each}") for each in self.other_files) else ""
        counts = self.text_counts
        found |= {
            "documents without any text were left out": self.empty_documents,
            "byte sequences that are not UTF-8 became U+FFFD": counts.replaced_bytes,
            f"files do not contain the separator --text-split {self.split!r}: each is one document": counts.unsplit_files,
            "texts look like JSON lines but were read as plain text; read them with --format jsonl": counts.json_files,
            f"files in the folders and archives were left out: {others}{named}": self.other_files.total(),
        }
        sentences = [f"{count:,} {text}" for text, count in found.items() if count]
        return sentences + (self._near_duplicates.problems() if self._near_duplicates else [])

    def _find(self, given: str) -> list[str]:
        """The files to read at a path or a URL. Raises DataError."""
        if remote.is_url(given):
            files, is_folder = remote.find(given)
            return self._chosen(given, files) if is_folder else [self._named(each) for each in files]
        path = Path(given)
        if path.is_dir():
            files = sorted(each for each in path.rglob("*") if each.is_symlink() or not each.is_dir())
            return self._chosen(str(path), list(map(str, files)))
        if not path.is_file():
            allowed = f"files, folders, URLs, {STDIN} (standard input) and {STDLIB}"
            raise DataError(f"{path}: no such file; --input accepts {allowed}")
        return [self._named(str(path))]

    def _named(self, name: str) -> str:
        """`name`, if it can be read as a single file. Raises DataError."""
        form = self._given_format or _format(name)
        if form in COLUMNAR and (suffix := named_compression(name)):
            raise DataError(f"{name}: a {form} file cannot be read compressed ({suffix}); unpack it, and name the result")
        if self._given_format or _is_readable(name):
            return name
        if form in _UNPACK:
            raise DataError(f"{name}: an archive; unpack it with `{_UNPACK[form].format(path=name)}` and name the folder")
        raise DataError(
            f"{name}: unknown format; allowed: {', '.join(FORMATS)} (also {', '.join(COMPRESSIONS)}). If its content is one of "
            f"them, name it with --format {'|'.join(FORMAT_NAMES)}; else convert it to a .jsonl with one object per line: "
            f'{{"{self._fields.keys[0]}": "the text of a document"}}'
        )

    def _chosen(self, folder: str, files: list[str]) -> list[str]:
        """Those of the `files` in a folder that are read without being named, and counts of the others. Raises DataError."""
        states = [PurePosixPath(each).parent for each in files if each.endswith("/state.json")]
        for parent in (PurePosixPath(each).parent for each in files if each.endswith("/dataset_dict.json")):
            splits = [state.name for state in states if state.parent == parent]
            if len(splits) > 1:  # reading all would train on the test set
                one = "train" if "train" in splits else splits[0]
                names = f"the splits {', '.join(splits)}; choose one: --input {parent}/{one}"
                raise DataError(f"{parent}: was written by save_to_disk of `datasets` and has {names}")
        found = [each for each in files if self._is_read_in_folders(each)]
        paths = [PurePosixPath(each) for each in sorted(set(files).difference(found))]
        others = Counter(
            "".join(path.suffixes[-2:]).lower() or "without an ending"
            for path in paths
            if not path.name.startswith(".") and path.name not in _DATASETS_METADATA
        )
        if not found:
            named = sorted({f"{folder}/*{suffix}" for suffix in others if _is_readable(f"x{suffix}")})
            way = f"; name its files: --input {' '.join(named)}" if named else f"; it has {', '.join(others) or 'no files'}"
            way += "" if named or not others else "; if these have a known format, name it with --format"
            raise DataError(
                f"{folder}: this folder has no {', '.join(f for f in FORMATS if f not in _ONLY_IF_NAMED)} files{way}"
            )
        self.other_files += others
        return found

    def _is_read_in_folders(self, name: str) -> bool:
        file = PurePosixPath(name)
        form = self._given_format or _format(file.name)
        if (form in COLUMNAR and named_compression(name)) or not (remote.is_url(name) or os.path.isfile(name)):
            return False
        if self._given_format:  # hidden files, and those of programs such as _SUCCESS of Spark, are not data
            return not file.name.startswith((".", "_")) and file.name not in _DATASETS_METADATA
        computed = file.name.startswith("cache-") and file.suffix == ".arrow"  # by `datasets`, from the files beside it
        return form in FORMATS and form not in _ONLY_IF_NAMED and not computed

    def _usable(self, name: str, text: str | Bad) -> bytes | None:
        """The text in UTF-8. None: none, which is counted here, or raises DataError."""
        if not isinstance(text, Bad):
            try:
                data = text.encode()
            except UnicodeEncodeError as error:
                text = Bad("not valid Unicode", f" ({error})")
        if isinstance(text, Bad):
            self.bad[text.reason] += 1
            self._first_bad.setdefault(text.reason, name)
            if self.on_bad_line == "error":
                raise DataError(f"{name}: {text.reason}{text.detail}; correct it, or leave it out with --on-bad-line skip")
            return None
        if not data or data.isspace():
            self.empty_documents += 1
            return None
        return data

    def _is_divisible(self, name: str) -> bool:
        """Whether every line of a file is a document. Raises DataError, OSError."""
        form = self._given_format or _format(name)
        if named_compression(name) or form not in (".txt", ".jsonl", ".json") or (form == ".txt" and self.split != "line"):
            return False
        with remote.open_file(name) as file:
            if compression(name, file, by_content=self._given_format is not None):
                return False
            return form == ".txt" or readers.has_json_lines(Opened(name, form, file))

    def _all_files(self) -> Iterator[tuple[str, str | Bad]]:
        for part in self._parts:
            if part.name == STDLIB:
                yield from readers.standard_library()
            elif part.name == STDIN:
                file = io.BufferedReader(sys.stdin.buffer, 1 << 20)
                yield from self._one_file(Opened("standard input", self._given_format or ".txt", file))
            else:
                with remote.open_file(part.name) as file:
                    yield from self._one_file(self._opened_part(part, file))
                self._finished_bytes += part.end - part.begin
            self._opened = None

    def _opened_part(self, part: Part, file: BinaryIO) -> Opened:
        form = self._given_format or _format(part.name)
        if part.is_whole:
            return Opened(part.name, form, file, part.size)
        lines = Lines(file, part)
        name = f"{part.name} from byte {lines.begin:,}" if lines.begin else part.name
        return Opened(name, form, io.BufferedReader(lines, 1 << 20), part.end - part.begin, begin=lines.begin)

    def _one_file(self, opened: Opened) -> Iterator[tuple[str, str | Bad]]:
        self._opened = opened
        try:
            if opened.format in COLUMNAR:
                yield from self._texts(opened)
                return
            by_content = self._given_format is not None
            suffix = "" if opened.begin else compression(opened.name, opened.file, by_content)
            if suffix == ".zip":
                yield from self._archive(opened)
            else:
                yield from self._texts(opened, suffix)
        except READ_ERRORS as error:
            raise DataError(f"{opened.name}: cannot be read to the end ({error}); copy it again") from None

    def _archive(self, opened: Opened) -> Iterator[tuple[str, str | Bad]]:
        """The files of a .zip in sorted order. That of a lone file may follow from the archive's name, as in text.jsonl.zip."""
        with open_archive(opened.name, opened.file) as archive:
            members = [each for each in archive.infolist() if not each.is_dir() and not _is_hidden(each.filename)]
            alone, found = _format(opened.name) if len(members) == 1 else "", 0
            for member in sorted(members, key=lambda each: each.filename):
                name, form = f"{opened.name}/{member.filename}", self._given_format or _format(member.filename)
                form = form if form in FORMATS else alone
                with open_member(opened.name, archive, member) as file:
                    file = io.BufferedReader(file, 1 << 20)
                    suffix = compression(name, file, by_content=self._given_format is not None)
                    if form not in FORMATS or form in COLUMNAR or suffix == ".zip":
                        self.other_files["".join(PurePosixPath(name).suffixes[-2:]).lower() or "without an ending"] += 1
                        continue
                    found += 1
                    yield from self._texts(Opened(name, form, file, opened.size, opened.tell), suffix)
            if not found:
                names = ", ".join(each.filename for each in members[:5]) or "no files"
                allowed = ", ".join(each for each in FORMATS if each not in COLUMNAR)
                way = f"unpack it with `unzip {opened.name} -d FOLDER`, or name the format of its files with --format"
                raise DataError(f"{opened.name}: this archive has {names}; allowed: {allowed}. Else {way}")

    def _texts(self, opened: Opened, suffix: str = "") -> Iterator[tuple[str, str | Bad]]:
        """The documents of one file with the compression `suffix`."""
        if opened.format not in COLUMNAR:
            opened.file = io.BufferedReader(decompressed(opened.name, opened.file, suffix), 1 << 20)
        if opened.format == ".txt":
            return readers.plain_texts(opened, self.split, self.text_counts, self._fields.keys[0])
        return self._with_text(readers.records(opened, self._fields))

    def _with_text(self, records: Iterator[tuple[str, object]]) -> Iterator[tuple[str, str | Bad]]:
        return ((place, record if isinstance(record, Bad) else self._fields.text(record, place)) for place, record in records)


def _format(name: str) -> str:
    """The format of a file by its name, one of FORMATS; another ending if it is not known."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes if suffix.lower() not in COMPRESSIONS]
    suffix = suffixes[-1] if suffixes else ""
    return _SYNONYMS.get(suffix, suffix)


def _is_readable(name: str) -> bool:
    return _format(name) in FORMATS or named_compression(name) == ".zip"


def _is_hidden(member: str) -> bool:
    """True for files that archivers add: those with a dot first, and the resource forks of macOS."""
    return PurePosixPath(member).name.startswith(".") or member.startswith("__MACOSX/")
