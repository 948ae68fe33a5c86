"""Token files of other programs, as a stream of documents, and back: nanoGPT, llm.c, parquet and `datasets` of ids, Megatron.

Readers yield blocks of complete documents: `(tokens, lengths)`, tokens back to back and lengths in tokens, (n,) and (k,). In
between every document ends with the end-of-document id, which occurs nowhere else; formats that put it in front of each
document (llm.c) are turned around on reading and on writing, which loses nothing. Memory is bounded by a block, or by the
longest document. Knows no tokenizer.
"""

from __future__ import annotations

import glob
import itertools
import operator
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pretrain.files import open_atomically, sync_folder

from . import remote, shards
from .flat import HEADER_BYTES
from .indexed import DataError, DataMissing, TokenFile
from .remote import is_url

FORMATS = ("megatron", "nanogpt", "llmc", "parquet")
"""What can be written. "datasets" can be read, too."""
FLAT = ("nanogpt", "llmc")
"""Formats without a document index."""
LLMC_MOST_TOKENS = 2**31 - 1
"""Tokens in a file of llm.c, which counts in an int32."""
COLUMN = "input_ids"
_BLOCK_TOKENS, _BLOCK_ROWS = 1 << 22, 1 << 10
_LLMC = {"<u2": (20240520, 1), "<u4": (20240801, 7)}  # type -> magic, version
_NO_LIMIT = 2**62
_LONGEST_DOCUMENT = 1 << 28  # of a stream, in tokens: with a wrong id, all of it would be one document in memory


class Block(NamedTuple):
    """Complete documents, or of a stream a part that may begin and end anywhere (then one length)."""

    tokens: np.ndarray
    lengths: np.ndarray


Advance = Callable[[int], None]
"""Is called with the bytes of input read since the last call."""


def format_of(path: str) -> str:
    """The format of an input by its name and its first bytes; of a folder or a pattern, that of the first file."""
    place = Path(path)
    if path.endswith(".parquet"):
        return "parquet"
    if not is_url(path) and place.is_dir() and not shards.is_one_file(path):
        if any(place.rglob("*.parquet")):
            return "parquet"
        if not any(place.glob("*.bin")):
            return "datasets"
    try:
        first = shards.find_files(path)[0]
    except DataMissing:
        if parquet_files(path):
            return "parquet"
        raise
    if first.endswith(".bin") and _exists(first) and not _exists(f"{first[:-4]}.idx"):
        with remote.open_file(first) as file:
            head = file.read(4)
        return "llmc" if head in [struct.pack("<i", magic) for magic, _ in _LLMC.values()] else "nanogpt"
    return "megatron"


def parquet_files(path: str) -> list[str]:
    """The .parquet files that a name, a folder (with the folders in it) or a pattern means, which may be URLs; perhaps none.
    Raises DataError, StoreError."""
    if is_url(path):
        return [each for each in remote.find(path)[0] if each.endswith(".parquet")]
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        return sorted(map(str, Path(path).rglob("*.parquet")))
    return sorted(each for each in glob.glob(path, recursive=True) if each.endswith(".parquet"))


def _exists(path: str) -> bool:
    return remote.exists(path) if is_url(path) else os.path.isfile(path)


# ---------------------------------------------------------------- reading


def read_token_file(file: TokenFile, advance: Advance) -> Iterator[Block]:
    """Documents of a pair, or parts of a flat file."""
    width = file.dtype.itemsize
    for starts in _document_starts(file) if file.num_documents else _even_starts(file.num_tokens):
        tokens = file.read([starts[0]], [starts[-1] - starts[0]])
        advance(len(tokens) * width)
        yield Block(tokens, np.diff(starts))


def _document_starts(file: TokenFile) -> Iterator[np.ndarray]:
    """Starts of neighbouring documents and the end of the last one, block by block."""
    for first in range(0, file.num_documents, _BLOCK_ROWS):
        starts = file.document_starts(np.arange(first, min(first + _BLOCK_ROWS, file.num_documents) + 1))
        if (bad := np.flatnonzero(np.diff(starts) < 0)).size:
            raise DataError(f"{file.path}: document {first + bad[0]} ends before it begins; damaged, copy it again")
        yield from (starts[first : end + 1] for first, end in _groups(starts))


def _groups(starts: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, end) of neighbouring documents of together about a block, or of one that is longer; starts (k + 1,)."""
    groups = (starts[1:] - starts[0] - 1) // _BLOCK_TOKENS
    return itertools.pairwise([0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)])


def _even_starts(num_tokens: int) -> Iterator[np.ndarray]:
    for start in range(0, num_tokens, _BLOCK_TOKENS):
        yield np.array([start, min(start + _BLOCK_TOKENS, num_tokens)])


def read_parquet(path: str, column: str, advance: Advance) -> Iterator[Block]:
    """Rows of a column of lists of integers, in a file or under a URL. Raises DataError, StoreError, OSError."""
    import pyarrow.parquet

    try:
        with remote.open_file(path) as opened, pyarrow.parquet.ParquetFile(opened) as file:
            _require_column(file.schema_arrow.names, column, path)
            leaves = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
            place = next(i for i, leaf in enumerate(leaves) if leaf.split(".")[0] == column)
            size, rows, number = remote.size(path), max(1, file.metadata.num_rows), 0
            chunks = [file.metadata.row_group(i).column(place) for i in range(file.num_row_groups)]
            values = max(1, sum(chunk.num_values for chunk in chunks))
            for batch in file.iter_batches(max(1, min(_BLOCK_ROWS, _BLOCK_TOKENS * rows // values)), columns=[column]):
                yield from rows_of(batch.column(0), f"{path}, column {column}", number)
                advance(size * (number + len(batch)) // rows - size * number // rows)
                number += len(batch)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); copy it again") from None


def read_dataset(name: str, config: str | None, split: str | None, column: str, advance: Advance) -> Iterator[Block]:
    """Rows of a data set of ids: a folder of `save_to_disk`, mapped into memory, or a name on the hub, streamed."""
    import datasets
    import pyarrow

    if Path(name).is_dir():
        try:
            data = datasets.load_from_disk(name)
        except FileNotFoundError as error:
            raise DataError(f"{name}: not a folder of save_to_disk ({error})") from None
        if isinstance(data, dict):
            if split not in data:
                raise DataError(f"{name}: has the splits {', '.join(data)}; choose one with --split")
            data = data[split]
    else:
        try:
            data = datasets.load_dataset(name, config, split=split or "train", streaming=True)
        except (OSError, ValueError) as error:  # its DatasetNotFoundError is an OSError
            raise DataError(f"{name}: no such file or folder, nor a data set that the hub gives ({error})") from None
    if data.column_names is not None:
        _require_column(data.column_names, column, name)
    number = 0
    for table in data.select_columns([column]).with_format("arrow").iter(_BLOCK_ROWS):
        for chunk in table.column(column).chunks if isinstance(table, pyarrow.Table) else [table.column(column)]:
            yield from rows_of(chunk, f"{name}, column {column}", number)
            advance(chunk.nbytes)
            number += len(chunk)


def _require_column(names: list[str], column: str, where: str) -> None:
    if column not in names:
        raise DataError(f"{where}: has no column {column!r}; it has {', '.join(names)}, choose one with --column")


def rows_of(column, where: str, number: int) -> Iterator[Block]:
    """Rows of an Arrow array of lists of integers; `number` is that of its first row. Raises DataError."""
    import pyarrow
    import pyarrow.compute

    lists = pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list
    if not any(is_kind(column.type) for is_kind in lists) or not pyarrow.types.is_integer(column.type.value_type):
        hint = "; text is turned into tokens by tools/tokenize_corpus.py" if "string" in str(column.type) else ""
        raise DataError(f"{where}: holds {column.type}, lists of integers are expected{hint}")
    lengths = pyarrow.compute.list_value_length(column)
    if lengths.null_count:
        row = number + lengths.is_null().to_numpy(zero_copy_only=False).argmax()
        raise DataError(f"{where}: row {row} is null; remove it or give it ids")
    values = column.flatten()
    if values.null_count:
        place = values.is_null().to_numpy(zero_copy_only=False).argmax()
        row = number + np.searchsorted(np.cumsum(lengths.to_numpy()), place, side="right")
        raise DataError(f"{where}: row {row} contains null; ids are integers")
    tokens, starts = values.to_numpy(), np.append(0, np.cumsum(lengths.to_numpy().astype(np.int64)))
    for first, end in _groups(starts):
        yield Block(tokens[starts[first] : starts[end]], np.diff(starts[first : end + 1]))


# ---------------------------------------------------------------- documents


class Documents:
    """Blocks of a reader, checked: every document ends with `end`, which occurs nowhere else. Iterate once.

    append: documents that do not end with `end` get it. After the iteration `num_documents`, `num_tokens` and `appended` (how
    often that was needed) are those of all. Raises DataError.
    """

    def __init__(self, blocks: Iterable[Block], where: str, end: int, num_ids: int, append: bool):
        self._blocks, self._where, self._end, self._num_ids, self._append = blocks, where, end, num_ids, append
        self.num_documents = self.num_tokens = self.appended = 0

    def __iter__(self) -> Iterator[Block]:
        for tokens, lengths in self._blocks:
            self._require_ids(tokens, lengths)
            ends = np.cumsum(lengths)
            open_ended = lengths == 0
            open_ended[lengths > 0] = tokens[ends[lengths > 0] - 1] != self._end
            if open_ended.any() and not self._append:
                number = self.num_documents + int(open_ended.argmax())
                raise DataError(
                    f"{self._where}: document {number} does not end with the end-of-document id {self._end}; give the right "
                    "id (--end-of-document-id), append it (--append-end), or say that rows are parts of one stream (--packed)"
                )
            if open_ended.any():
                tokens = np.insert(tokens.astype(np.int64), ends[open_ended], self._end)
                lengths = lengths + open_ended
                ends = np.cumsum(lengths)
            inside = np.ones(len(tokens), bool)
            inside[ends - 1] = False
            if (places := np.flatnonzero(inside & (tokens == self._end))).size:
                number = self.num_documents + int(np.searchsorted(ends, places[0], side="right"))
                raise DataError(
                    f"{self._where}: the end-of-document id {self._end} occurs inside document {number}; give the right id "
                    "(--end-of-document-id), or split there: say that rows are parts of one stream (--packed)"
                )
            self.num_documents += len(lengths)
            self.num_tokens += len(tokens)
            self.appended += int(open_ended.sum())
            yield Block(tokens, lengths)
        if not self.num_documents:
            raise DataError(f"{self._where}: contains no documents")

    def _require_ids(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        wrong = (tokens < 0) | (tokens >= self._num_ids)
        if wrong.any():
            place = int(wrong.argmax())
            number = self.num_documents + int(np.searchsorted(np.cumsum(lengths), place, side="right"))
            raise DataError(
                f"{self._where}: document {number} contains the id {tokens[place]}; 0 to {self._num_ids - 1:,} are allowed by "
                "the tokenizer and the output format. Give another tokenizer or format; for a flat .bin, check --dtype"
            )


class Split:
    """Divides a stream into documents at the id `end`. Iterate once.

    leads: the id precedes each document, as in llm.c's files; else it follows each, as in nanoGPT's. After the iteration
    `incomplete` tells whether the stream began (leads) or ended (else) inside a document, which is kept as a document. Raises
    DataError if the id does not occur, or not within 2^28 tokens.
    """

    def __init__(self, blocks: Iterable[Block], where: str, end: int, leads: bool):
        self._blocks, self._where, self._end, self._leads = blocks, where, end, leads
        self.incomplete = False

    def __iter__(self) -> Iterator[Block]:
        rest: list[np.ndarray] = []
        first, found = self._leads, False
        for tokens, _ in self._blocks:
            found = found or bool((tokens == self._end).any())
            if first and len(tokens):
                first, self.incomplete = False, tokens[0] != self._end
                tokens = tokens[0 if self.incomplete else 1 :]
            ends = np.flatnonzero(tokens == self._end) + 1
            before = sum(map(len, rest))
            if not ends.size:
                rest.append(tokens)
                if before + len(tokens) > _LONGEST_DOCUMENT:
                    raise DataError(
                        f"{self._where}: {before + len(tokens):,} tokens in a row without the id {self._end}, which would be "
                        "one document; give the right id (--end-of-document-id)"
                    )
                continue
            complete = np.concatenate([*rest, tokens[: ends[-1]]])
            rest = [tokens[ends[-1] :]]
            yield Block(complete, np.diff(ends + before, prepend=0))
        if not found:
            raise DataError(
                f"{self._where}: the id {self._end} does not occur, so nothing says where documents end; give the right id "
                "(--end-of-document-id)"
            )
        last = np.concatenate(rest) if rest else np.empty(0, np.int64)
        if self._leads or len(last):
            self.incomplete |= not self._leads
            yield Block(np.append(last, last.dtype.type(self._end)), np.array([len(last) + 1]))


def leading(blocks: Iterable[Block], end: int) -> Iterator[np.ndarray]:
    """The reverse of `Split(leads=True)`: parts of a stream in which `end` precedes each document."""
    held = np.array([end])
    for tokens, _ in blocks:
        if len(tokens):
            yield np.concatenate([held, tokens[:-1]])
            held = tokens[-1:]


# ---------------------------------------------------------------- writing


def largest_id(format: str) -> int:
    """The largest id that a format can hold."""
    return {"megatron": 2**31, "nanogpt": 2**16, "llmc": 2**32, "parquet": 2**31}[format] - 1


def write_flat(parts: Iterable[np.ndarray], output: Path, format: str, num_ids: int, shard_tokens: int | None) -> list[Path]:
    """Writes a stream in nanoGPT's or llm.c's format: one file, or with shard_tokens files of that many tokens each.

    Shards are called as llm.c calls them, NAME_000000.bin; no file has its final name before the last one is complete. num_ids
    chooses between uint16 and uint32. Raises DataError for too many tokens, OSError.
    """
    dtype = np.dtype("<u2" if num_ids <= 2**16 else "<u4")
    limit = shard_tokens or (LLMC_MOST_TOKENS if format == "llmc" else _NO_LIMIT)
    temporary: dict[Path, Path] = {}
    try:
        for number, pieces in itertools.groupby(_pieces(parts, limit), operator.itemgetter(0)):
            if number and not shard_tokens:
                raise DataError(f"{output}: llm.c's files hold at most {limit:,} tokens; divide them (--shard-tokens)")
            path = output.with_name(f"{output.stem}_{number:06d}.bin") if shard_tokens else output
            temporary[path] = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            _write_flat_file(temporary[path], (piece for _, piece in pieces), dtype, format)
        for path, written in temporary.items():
            os.replace(written, path)
    except BaseException:
        for written in temporary.values():
            written.unlink(missing_ok=True)
        raise
    sync_folder(output.parent)
    return list(temporary)


def _pieces(parts: Iterable[np.ndarray], limit: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the file, tokens) when each file gets `limit` tokens."""
    done = 0
    for part in parts:
        while len(part):
            piece = part[: limit - done % limit]
            yield done // limit, piece
            done += len(piece)
            part = part[len(piece) :]


def _write_flat_file(path: Path, pieces: Iterable[np.ndarray], dtype: np.dtype, format: str) -> None:
    with open(path, "wb") as file:
        count = 0
        file.write(bytes(HEADER_BYTES) if format == "llmc" else b"")
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype).data)
            count += len(piece)
        if format == "llmc":
            file.seek(0)
            file.write(struct.pack("<3i", *_LLMC[dtype.str], count))
        file.flush()
        os.fsync(file.fileno())


def write_parquet(blocks: Iterable[Block], output: Path, column: str) -> None:
    """Writes one document per row, as a list of int32, compressed by zstd. Raises OSError."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([(column, pyarrow.list_(pyarrow.int32()))])
    with open_atomically(output) as file, pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for tokens, lengths in blocks:
            offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
            rows = pyarrow.ListArray.from_arrays(offsets, pyarrow.array(tokens.astype(np.int32)))
            writer.write_table(pyarrow.table([rows], schema=schema))
