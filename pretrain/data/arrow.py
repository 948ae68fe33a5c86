"""Arrow files with a column of ids, as the library `datasets` writes them: token files whose rows are documents.

In a file that is not compressed, the ids of a record batch lie back to back. So only the places of the batches are kept (a few
numbers for each, from the headers), and ids and row offsets are read by positioned reads, as from a pair. Tokens are those of
the rows, one after the other, as they are: nothing is put between rows. The column is `input_ids`, or the only one that holds
lists of integers. No torch.
"""

from __future__ import annotations

import bisect
import functools
import json
import os
from typing import NamedTuple

import numpy as np

from .errors import DataError, DataMissing
from .indexed import TokenFile, conversion
from .reads import SAMPLE_RUNS, OpenFiles, StoredArray
from .remote import is_url

_COLUMN = "input_ids"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


class _Batch(NamedTuple):
    """Numbers of a record batch, in the order of `ArrowFile._table_5B`."""

    rows: int
    tokens: int
    values: int
    """Byte of its first id in the file."""
    offsets: int
    """Byte of its first row offset; 0: rows of one length."""
    base: int
    """The first row offset."""


class ArrowFile(TokenFile):
    """An Arrow file or stream on a disk, opened by its name: as a pair without a metadata sidecar. Raises DataError for a file
    that cannot be read like this, OSError."""

    def __init__(
        self,
        path: str,
        dtype: str | None = None,
        *,
        open_files: OpenFiles | None = None,
        sample_runs: int = SAMPLE_RUNS,
    ):
        """dtype: must be that of the column, if given; the others as of `TokenFile`."""
        if is_url(path):
            raise DataError(
                f"{path}: Arrow files are read on a disk only: copy it there, or convert the copy and upload the pair"
            )
        if not os.path.isfile(path):
            raise DataMissing(f"{path}: no such file")
        self.path = self.bin_path = path
        self._idx_path = self.sidecar = None
        self.sample_runs, self._open_files = sample_runs, open_files or OpenFiles()
        self.dtype, self._list_size, self._offset_type, batches = _read_headers(path)
        if dtype and np.dtype(dtype) != self.dtype:
            raise DataError(f"{path}: says that the ids are {self.dtype.name}, not {dtype}; leave dtype out")
        self._table_5B = np.array(batches, dtype=np.int64).reshape(-1, 5).T
        rows, tokens = self._table_5B[:2]
        self._first_rows, self._first_tokens = np.append(0, np.cumsum(rows)), np.append(0, np.cumsum(tokens))
        self.num_documents, self.num_tokens = int(self._first_rows[-1]), int(self._first_tokens[-1])
        if self.num_tokens == 0:
            raise DataError(f"{path}: contains no tokens; remove it, or write it again")

    def _place(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        width, places, sizes = self.dtype.itemsize, [], []
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            while length > 0:
                batch = self._batch_of(self._first_tokens, start)
                count = min(length, int(self._first_tokens[batch + 1]) - start)
                places.append(int(self._table_5B[2, batch]) + (start - int(self._first_tokens[batch])) * width)
                sizes.append(count * width)
                start, length = start + count, length - count
        return np.array(places, dtype=np.int64), np.array(sizes, dtype=np.int64)

    @staticmethod
    def _batch_of(firsts: np.ndarray, number: int) -> int:
        return int(np.searchsorted(firsts, number, side="right")) - 1

    def _row_offsets(self, batch: int) -> StoredArray:
        place, rows = int(self._table_5B[3, batch]), int(self._table_5B[0, batch])
        return StoredArray(functools.partial(self._open_files.get, self.path), self._offset_type, rows + 1, place)

    def document_starts(self, numbers: np.ndarray) -> np.ndarray:
        """Index of the first token of each of these rows, (n,) -> (n,) int64; `num_tokens` for number num_documents."""
        numbers = np.asarray(numbers, dtype=np.int64)
        if self._list_size:
            return numbers * self._list_size
        starts = np.full(len(numbers), self.num_tokens)
        batches = np.searchsorted(self._first_rows, numbers, side="right") - 1
        for batch in np.unique(batches[batches < self._table_5B.shape[1]]).tolist():
            chosen = batches == batch
            offsets = self._row_offsets(batch).take(numbers[chosen] - self._first_rows[batch])
            starts[chosen] = self._first_tokens[batch] + offsets - self._table_5B[4, batch]
        return starts

    def document_at(self, token: int) -> int:
        """Number of the row that contains the token with index `token`; of one after the end, the last."""
        if self._list_size:
            return min(token // self._list_size, self.num_documents - 1)
        batch = min(self._batch_of(self._first_tokens, token), self._table_5B.shape[1] - 1)
        offset = token - int(self._first_tokens[batch]) + int(self._table_5B[4, batch])
        rows = int(self._table_5B[0, batch])
        return int(self._first_rows[batch]) + bisect.bisect_right(self._row_offsets(batch), offset, hi=rows) - 1


def files_of_dataset(folder: str) -> list[str] | None:
    """The Arrow files of a folder of `save_to_disk`, in the order of the rows; None for another folder.

    Other Arrow files beside them, which the library keeps as a cache, are not part of the data. Raises DataError, OSError.
    """
    state = os.path.join(folder, "state.json")
    if not os.path.isfile(state):
        return None
    try:
        with open(state, encoding="utf-8") as file:
            values = json.load(file)
        return [os.path.join(folder, each["filename"]) for each in values["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state}: does not list the files of a data set ({error!r}); save it again (save_to_disk)") from None


def splits_of(folder: str) -> list[str]:
    """Splits of a folder to which `save_to_disk` wrote several; none for another folder. Raises DataError, OSError."""
    about = os.path.join(folder, "dataset_dict.json")
    if not os.path.isfile(about):
        return []
    try:
        with open(about, encoding="utf-8") as file:
            return list(json.load(file)["splits"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{about}: does not list the splits ({error!r}); save the data set again (save_to_disk)") from None


def _read_headers(path: str) -> tuple[np.dtype, int, str, list[_Batch]]:
    """(type of the ids, length of all rows or 0, type of the row offsets, batches with rows) of a file: of each batch, only
    the header and two row offsets are read. Raises DataError."""
    import pyarrow

    try:
        with pyarrow.memory_map(path) as source:
            everything = source.read_buffer()
            is_file = everything[:6].to_pybytes() == b"ARROW1"
            if not is_file and everything[-8:].to_pybytes() != _END_OF_STREAM:
                raise DataError(f"{path}: not an Arrow file, or one that was cut; copy it again")
            reader = pyarrow.ipc.open_file(everything) if is_file else pyarrow.ipc.open_stream(everything)
            number, kind, offset_type = _column_of(reader.schema, path)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
            found = [_batch(batch.column(number), offset_type, everything) for batch in batches if batch.num_rows]
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise
        raise DataError(f"{path}: not a readable Arrow file ({error}); copy it again") from None
    except ValueError as error:
        raise DataError(f"{path}: {error}, or {conversion(path)}") from None
    return np.dtype(kind.value_type.to_pandas_dtype()), getattr(kind, "list_size", 0), offset_type, found


def _column_of(schema, path: str) -> tuple[int, object, str]:
    """(number, type, type of its row offsets) of the column of ids. Raises DataError."""
    import pyarrow

    types = pyarrow.types
    lists = types.is_list, types.is_large_list, types.is_fixed_size_list
    names = [
        field.name
        for field in schema
        if any(is_kind(field.type) for is_kind in lists) and types.is_integer(field.type.value_type)
    ]
    chosen = [_COLUMN] if _COLUMN in names else names
    if len(chosen) != 1:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        if names:
            text = f"several columns hold ids ({', '.join(names)}) and none is called {_COLUMN}; rename one"
            raise DataError(f"{path}: {text}, or {conversion(path)} and --column NAME")
        text = "text is turned into tokens by tools/tokenize_corpus.py"
        raise DataError(f"{path}: no column holds lists of integers; it has {columns}; {text}")
    number = schema.get_field_index(chosen[0])
    kind = schema.field(number).type
    if types.is_uint64(kind.value_type):
        raise DataError(f"{path}: column {chosen[0]} holds uint64; write it as int64, or {conversion(path)}")
    return number, kind, "<i8" if types.is_large_list(kind) else "<i4"


def _batch(column, offset_type: str, everything) -> _Batch:
    """Places of the ids and offsets of a column in the file `everything`. Raises ValueError."""
    import pyarrow

    if column.null_count or column.values.null_count:
        raise ValueError("contains null among its rows or ids; remove these")
    fixed, first, place, end = pyarrow.types.is_fixed_size_list(column.type), 0, 0, len(column.values)
    if not fixed:
        offsets = column.buffers()[1]
        place = _byte_in(offsets, everything)
        values = np.frombuffer(offsets, offset_type)
        first, end = int(values[0]), int(values[len(column)])
    width = column.type.value_type.bit_width // 8
    start = _byte_in(column.values.buffers()[1], everything) + first * width if end > first else 0
    return _Batch(len(column), end - first, start, place, first)


def _byte_in(buffer, everything) -> int:
    place = buffer.address - everything.address
    if not 0 <= place <= everything.size - buffer.size:
        raise ValueError("is compressed, so single tokens cannot be read; write it without compression")
    return place
