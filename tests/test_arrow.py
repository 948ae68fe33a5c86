"""Arrow files of ids are read where they lie: the tokens and documents of a pair made of the same rows, or an error."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pytest

from pretrain.data.arrow import ArrowFile
from pretrain.data.errors import DataError, DataMissing
from pretrain.data.indexed import TokenFile
from pretrain.data.reads import OpenFiles
from pretrain.data.shards import open_shards

from .test_indexed import write_megatron

KINDS = {
    "int64": pyarrow.list_(pyarrow.int64()),
    "int32": pyarrow.list_(pyarrow.int32()),
    "uint16": pyarrow.list_(pyarrow.uint16()),
    "large": pyarrow.large_list(pyarrow.int32()),
    "fixed": pyarrow.list_(pyarrow.int32(), 8),
}


def make_rows(kind: str = "int32", count: int = 300) -> list[list[int]]:
    """Rows of 0 to 11 ids, or of 8."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 100, 8 if kind == "fixed" else rng.integers(0, 12)).tolist() for _ in range(count)]


def save(path: Path, rows, kind=KINDS["int32"], batches=(0, 100, 7, 1, 192), as_file=False, compression=None) -> Path:
    """A file with a column of text before that of the ids."""
    ids = pyarrow.array(rows, kind)
    table = pyarrow.table({"text": ["some text"] * len(rows), "input_ids": ids})
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    make = pyarrow.ipc.new_file if as_file else pyarrow.ipc.new_stream
    with make(str(path), table.schema, options=options) as writer:
        first = 0
        for count in batches:
            empty = pyarrow.RecordBatch.from_pylist([], table.schema)
            writer.write_batch(table.slice(first, count).to_batches()[0] if count else empty)
            first += count
    return path


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_documents_are_those_of_a_pair_made_of_the_rows(kind, as_file, tmp_path):
    rows = make_rows(kind)
    file = open_shards(str(save(tmp_path / "x.arrow", rows, KINDS[kind], as_file=as_file)), open_files=OpenFiles(1))[0]
    write_megatron(tmp_path / "pair", rows, dtype="<i4", code=4)
    pair = TokenFile(tmp_path / "pair")
    tokens = np.concatenate([np.array(row, int) for row in rows])
    assert (file.num_tokens, file.num_documents, file.sidecar) == (len(tokens), len(rows), None)
    assert file.dtype == np.dtype({"int64": "i8", "uint16": "u2"}.get(kind, "i4"))
    assert [file.document(i).tolist() for i in range(len(rows))] == rows
    numbers = np.random.default_rng(1).permutation(len(rows) + 1)
    for some in (numbers, numbers[:3], numbers[:0]):
        assert file.document_starts(some).tolist() == pair.document_starts(some).tolist()
    places = range(len(tokens) + 20)  # the last sample of a validation set may end after the file
    assert [file.document_at(i) for i in places] == [pair.document_at(i) for i in places]
    starts = np.arange(0, len(tokens) - 40, 11)
    lengths = starts % 40
    expected = np.concatenate([tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)])
    file.read_soon(starts, lengths)
    assert file.read(starts, lengths).tolist() == expected.tolist() and file.sample().tolist() == tokens.tolist()
    with pytest.raises(IndexError):
        file.read([len(tokens) - 1], [2])


def test_a_data_set_has_the_files_that_it_lists_in_their_order(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows, folder = make_rows(), tmp_path / "ids"
    datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}).save_to_disk(folder, num_shards=12)
    save(folder / "cache-0123.arrow", rows)  # what `map` leaves there
    for path in (folder, folder / "*", tmp_path / "**", [f"{folder}/*.arrow"]):
        files = open_shards(path if isinstance(path, list) else str(path))
        assert len(files) == 12 and [file.document(i).tolist() for file in files for i in range(25)] == rows
    state = json.loads((folder / "state.json").read_text())
    (folder / "data-00003-of-00012.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00003-of-00012\.arrow: no such file"):
        open_shards(str(folder))
    (folder / "state.json").write_text(json.dumps(state | {"_data_files": state["_data_files"][5:7][::-1]}))
    assert [Path(file.path).name[:10] for file in open_shards(str(folder))] == ["data-00006", "data-00005"]
    (folder / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state\.json: does not list"):
        open_shards(str(folder))


def test_one_of_several_splits_has_to_be_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"input_ids": make_rows()})
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "ids")
    with pytest.raises(DataMissing, match=f"the splits train, test; name one: {tmp_path}/ids/train"):
        open_shards(str(tmp_path / "ids"))
    assert open_shards(str(tmp_path / "ids" / "test"))[0].num_documents == 300


@pytest.mark.parametrize(
    ("columns", "about"),
    [
        ({"input_ids": [[1, 2], None]}, "null among its rows.*tools/convert_data.py --input"),
        ({"input_ids": [[1, 2], [3, None]]}, "null among its rows or ids"),
        ({"a": [[1]], "b": [[2]]}, r"several columns hold ids \(a, b\).*--column NAME"),
        ({"text": ["x"]}, r"it has text \(string\); text is turned into tokens by tools/tokenize_corpus.py"),
        ({"input_ids": [[1.5]]}, "no column holds lists of integers"),
        ({"input_ids": pyarrow.array([[1]], pyarrow.list_(pyarrow.uint64()))}, "holds uint64"),
        ({"input_ids": pyarrow.array([[]], pyarrow.list_(pyarrow.int32()))}, "contains no tokens"),
    ],
)
def test_columns_that_are_no_ids_are_refused_by_name(columns, about, tmp_path):
    table = pyarrow.table(columns)
    with pyarrow.ipc.new_stream(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=f"x.arrow: .*{about}"):
        ArrowFile(str(tmp_path / "x.arrow"))


def test_the_only_column_of_ids_may_have_any_name(tmp_path):
    table = pyarrow.table({"text": ["a"], "tokens": [[1, 2]]})
    with pyarrow.ipc.new_stream(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert ArrowFile(str(tmp_path / "x.arrow")).document(0).tolist() == [1, 2]


def test_files_that_cannot_be_read_at_random_places_are_refused(tmp_path):
    path = save(tmp_path / "x.arrow", make_rows(), compression="zstd")
    with pytest.raises(DataError, match=r"is compressed.*tools/convert_data.py --input .*x\.arrow"):
        ArrowFile(str(path))
    content = save(tmp_path / "y.arrow", make_rows()).read_bytes()
    for damaged in (content[:-3000], content[:-8], b"", b"some text", content[:4000] + content[-8:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="copy it again"):
            ArrowFile(str(path))
    with pytest.raises(DataError, match="are int32, not uint16"):
        ArrowFile(str(tmp_path / "y.arrow"), "uint16")
    with pytest.raises(DataMissing, match="no such file"):
        open_shards(str(tmp_path / "z.arrow"))
    with pytest.raises(DataError, match="on a disk only"):
        open_shards("memory://bucket/x.arrow")
    fsspec.filesystem("memory").pipe_file("/ids/x.arrow", b"")
    with pytest.raises(DataMissing, match=r"memory://ids/: .*on a disk only"):
        open_shards("memory://ids/")
    fsspec.filesystem("memory").rm("/ids", recursive=True)


def test_a_file_that_is_rewritten_or_cut_in_use_is_an_error(tmp_path):
    path = save(tmp_path / "x.arrow", make_rows())
    file = ArrowFile(str(path))
    file.watch()
    file.require_unchanged()
    content = path.read_bytes()
    with open(path, "r+b") as changed:
        changed.seek(int(file._table_5B[2, 0]))
        changed.write(b"\x07\x00\x00\x00" * 9)
    with pytest.raises(DataError, match="was rewritten while in use"):
        file.require_unchanged()
    with open(path, "r+b") as changed:
        changed.truncate(len(content) // 2)
    with pytest.raises(OSError, match="truncated while in use"):
        file.read([file.num_tokens - 5], [5])


def test_row_offsets_of_a_batch_need_not_begin_with_0(tmp_path):
    path = save(tmp_path / "x.arrow", [[1, 2], [3], [4, 5], [6], [7, 8, 9]], batches=(3, 2))
    places = ArrowFile(str(path))._table_5B[3].tolist()
    with open(path, "r+b") as file:
        for place, first in zip(places, (1, 0), strict=True):
            file.seek(place)
            file.write(first.to_bytes(4, "little"))
    expected = pyarrow.ipc.open_stream(path.read_bytes()).read_all().column("input_ids").to_pylist()
    file = ArrowFile(str(path))
    assert [file.document(i).tolist() for i in range(5)] == expected == [[2], [3], [4, 5], [6], [7, 8, 9]]
    assert [file.document_at(i) for i in range(file.num_tokens)] == [0, 1, 2, 2, 3, 4, 4, 4]
