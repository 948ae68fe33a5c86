"""Tokens of other programs arrive document by document, and leave in the bytes that those programs write and read."""

from __future__ import annotations

import errno
import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from pretrain.data import interchange
from pretrain.data.indexed import DataError, DataMissing, TokenFile
from pretrain.data.interchange import Block, Documents, Split
from pretrain.data.shards import open_shards
from pretrain.data.tokenizer_training import train
from tests.models import train_here
from tests.test_indexed import write_megatron
from tests.test_tools_data import make_texts, tool

END = 2  # of the tokenizers that are trained here


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer, and the pair `ours` of 299 documents."""
    folder = tmp_path_factory.mktemp("interchange")
    texts = make_texts(299, 60)
    train(texts, folder / "tokenizer", vocab_size=400, describe=dict)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = ["--input", folder / "text.jsonl", "--tokenizer", folder / "tokenizer", "--output", folder / "ours"]
    tool("tokenize_corpus", *flags, "--workers", 1)
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(interchange, "_BLOCK_TOKENS", 1000)
    monkeypatch.setattr(interchange, "_BLOCK_ROWS", 70)


def convert(*arguments, **options):
    return tool("convert_data", *arguments, **options)


def rows_of(prefix) -> list[np.ndarray]:
    file = TokenFile(prefix)
    return [file.document(i) for i in range(file.num_documents)]


def require_same_pair(one: Path, other: Path) -> None:
    for end in (".bin", ".idx"):
        assert Path(f"{one}{end}").read_bytes() == Path(f"{other}{end}").read_bytes(), end


def llmc_file(tokens: np.ndarray, magic: int = 20240520, version: int = 1, dtype: str = "<u2") -> bytes:
    """What write_datafile of llm.c's data_common.py writes."""
    return struct.pack("<256i", magic, version, len(tokens), *[0] * 253) + np.asarray(tokens).astype(dtype).tobytes()


def leading(rows: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.append(END, row[:-1]) for row in rows])


@pytest.mark.parametrize("name", ["x.bin", "x.llmc.bin", "x.parquet"])
def test_there_and_back_the_pair_has_the_same_bytes_and_the_sidecar_the_same_figures(folder, tmp_path, name):
    format = {"x.bin": "nanogpt", "x.llmc.bin": "llmc", "x.parquet": "parquet"}[name]
    convert("--input", folder / "ours", "--to", format, "--output", tmp_path / name)
    back = ["--input", tmp_path / name, "--tokenizer", folder / "tokenizer", "--output", tmp_path / "back"]
    convert(*back)
    require_same_pair(tmp_path / "back", folder / "ours")
    before, after = (json.loads(Path(f"{path}.json").read_text()) for path in (folder / "ours", tmp_path / "back"))
    differing = {key for key in before if before[key] != after[key]}
    assert differing <= {"shuffled", "corpus", "tokenizer_path"}
    assert convert(*back, status=2).stderr.count("\n") < 4  # exists already
    convert(*back, "--overwrite")


def test_files_of_nanogpt_and_llmc_have_the_bytes_that_their_own_programs_write(folder, tmp_path):
    rows = rows_of(folder / "ours")
    convert("--input", folder / "ours", "--to", "nanogpt", "--output", tmp_path / "n.bin")
    assert (tmp_path / "n.bin").read_bytes() == np.concatenate(rows).astype("<u2").tobytes()
    convert("--input", folder / "ours", "--to", "llmc", "--shard-tokens", 3000, "--output", tmp_path / "l.bin")
    stream = leading(rows)
    shards = sorted(tmp_path.glob("l_*.bin"))
    assert [shard.name for shard in shards[:2]] == ["l_000000.bin", "l_000001.bin"]
    assert [shard.read_bytes() for shard in shards] == [llmc_file(stream[i : i + 3000]) for i in range(0, len(stream), 3000)]
    convert("--input", *shards, "--tokenizer", folder / "tokenizer", "--output", tmp_path / "back")
    require_same_pair(tmp_path / "back", folder / "ours")


def test_a_llama_3_file_of_llmc_is_read_and_written_again(folder, tmp_path):
    (tmp_path / "llama.bin").write_bytes(llmc_file(leading(rows_of(folder / "ours")), 20240801, 7, "<u4"))
    convert("--input", tmp_path / "llama.bin", "--tokenizer", folder / "tokenizer", "--output", tmp_path / "back")
    require_same_pair(tmp_path / "back", folder / "ours")
    convert("--input", tmp_path / "llama.bin", "--to", "llmc", "--end-of-document-id", END, "--output", tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "llama.bin").read_bytes()


def test_datasets_are_read_as_rows_as_rows_without_ends_and_as_a_packed_stream(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [row.tolist() for row in rows_of(folder / "ours")]
    stream = np.concatenate(rows).tolist()
    packed = [stream[i : i + 128] for i in range(0, len(stream), 128)]
    for name, of_name in (("rows", rows), ("bare", [row[:-1] for row in rows]), ("packed", packed)):
        data = datasets.Dataset.from_dict({"ids": of_name})
        datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / name)
    for name, flags in (("rows", []), ("bare", ["--append-end"]), ("packed", ["--packed"])):
        flags = [*flags, "--column", "ids", "--tokenizer", folder / "tokenizer", "--output", tmp_path / f"from_{name}"]
        convert("--input", tmp_path / name, *flags, status=2)  # which split?
        convert("--input", tmp_path / name, "--split", "train", *flags)
        require_same_pair(tmp_path / f"from_{name}", folder / "ours")


def test_training_names_the_command_that_converts_a_table(folder, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": rows_of(folder / "ours")}), tmp_path / "ids.parquet")
    for name in ("ids.parquet", "*.parquet", ""):
        with pytest.raises(DataMissing) as refusal:
            open_shards(str(tmp_path / name))
        command = f"python tools/convert_data.py --input {tmp_path / name} --tokenizer FOLDER --output PREFIX"
        assert command in str(refusal.value)
    convert("--input", tmp_path / "ids.parquet", "--tokenizer", folder / "tokenizer", "--output", tmp_path / "back")
    require_same_pair(tmp_path / "back", folder / "ours")


def test_a_run_on_a_data_set_of_ids_has_the_losses_of_one_on_the_converted_pair(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"input_ids": [row.tolist() for row in rows_of(folder / "ours")]})
    data.save_to_disk(tmp_path / "ids")
    convert("--input", tmp_path / "ids", "--tokenizer", folder / "tokenizer", "--output", tmp_path / "pair")
    require_same_pair(tmp_path / "pair", folder / "ours")
    flags = ["--model.hidden_size", "32", "--model.num_hidden_layers", "1", "--model.num_attention_heads", "2"]
    flags += ["--model.vocab_size", "400", "--data.sequence_length", "32", "--data.document_mask", "true"]
    flags += ["--batch.global_batch_size", "8", "--batch.micro_batch_size", "8", "--train.max_steps", "4"]
    flags += ["--log.every_steps", "1", "--log.sinks", "[jsonl]", "--tokenizer.path", str(folder / "tokenizer")]
    losses = {}
    for name in ("ids", "pair"):
        sources = f"[{{path: {tmp_path / name}}}]"
        own = ["--run.directory", str(tmp_path / "runs"), "--run.name", name, "--data.train", sources, "--data.valid", sources]
        assert train_here([*flags, *own]) == 0
        rows = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [(row.get("loss"), row.get("val_loss")) for row in map(json.loads, rows)]
    assert losses["ids"] == losses["pair"] and len([loss for loss, _ in losses["ids"] if loss]) == 4


def test_flat_files_of_other_libraries_are_refused_by_name(tmp_path):
    rng = np.random.default_rng(0)
    for count in (5, 700):  # the index ends within the first bytes that are looked at, or not
        ends = 8 + 4 * count + np.cumsum([0, *rng.integers(0, 99, count) * 4])
        chunk = np.array([count, *ends], "<u4").tobytes() + rng.integers(0, 50000, (ends[-1] - ends[0]) // 4, "u4").tobytes()
        (tmp_path / "chunk-0-0.bin").write_bytes(chunk)
        with pytest.raises(DataError, match="chunk of litdata"):
            open_shards(str(tmp_path))
    flat = np.array([5, 28, *range(99, 999, 100), *rng.integers(0, 50000, 989)], "<u4")  # begins like a chunk of 5 items
    flat.tofile(tmp_path / "chunk-0-0.bin")
    assert open_shards(str(tmp_path), vocab_size=50000)[0].read([0], [1000]).tolist() == flat.tolist()
    for name in ("part-0.npy", "text.ds"):
        flat.tofile(tmp_path / name)
        with pytest.raises(DataMissing, match=rf"under names with \.bin .*: ln -s {tmp_path}/{name} {tmp_path}/.*\.bin"):
            open_shards(str(tmp_path / name))


def test_a_document_of_several_sequences_and_wide_ids_of_megatron_becomes_one(folder, tmp_path):
    rows = rows_of(folder / "ours")
    halves = [part for row in rows for part in (row[: len(row) // 2], row[len(row) // 2 :])]
    write_megatron(tmp_path / "theirs", halves, range(0, len(halves) + 1, 2), dtype="<i4", code=4)
    convert("--input", tmp_path / "theirs", "--tokenizer", folder / "tokenizer", "--output", tmp_path / "back")
    require_same_pair(tmp_path / "back", folder / "ours")


def test_a_shard_that_begins_inside_a_document_loses_nothing_and_says_so(folder, tmp_path):
    stream = leading(rows_of(folder / "ours"))[5:700]
    (tmp_path / "part.bin").write_bytes(llmc_file(stream))
    report = convert("--input", tmp_path / "part.bin", "--tokenizer", folder / "tokenizer", "--output", tmp_path / "back")
    tokens = np.concatenate(rows_of(tmp_path / "back"))
    assert np.array_equal(tokens, np.append(stream, END)) and "inside a document" in report.stdout


@pytest.mark.parametrize("block", [1, 2, 3, 100])
@pytest.mark.parametrize("leads", [False, True])
def test_a_stream_is_divided_at_the_same_places_whatever_the_blocks(block, leads):
    documents = [[END], [5, END], [END], [6, 7, 8, 9, END], [END]]  # empty ones at both sides and in the middle
    stream = np.concatenate([[END, *each[:-1]] if leads else each for each in documents])
    parts = [Block(stream[i : i + block], np.array([])) for i in range(0, len(stream), block)]
    split = Split(parts, "stream", END, leads)
    blocks = list(split)
    found = [part.tolist() for tokens, lengths in blocks for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    assert found == documents and not split.incomplete
    assert not leads or np.concatenate(list(interchange.leading(blocks, END))).tolist() == stream.tolist()


@pytest.mark.parametrize(
    ("rows", "append", "about"),
    [
        ([[5, END], [6]], False, "document 1"),
        ([[5, END], []], False, "document 1"),
        ([[5, END], [6, END, 7, END]], False, "inside document 1"),
        ([[5, END], [6, END, 7]], True, "inside document 1"),
        ([[5, END], [10, END]], False, "the id 10"),
        ([[5, END], [-1, END]], False, "the id -1"),
    ],
)
def test_rows_that_are_not_documents_are_refused_with_their_number(rows, append, about):
    blocks = [Block(np.array(row, dtype=np.int64), np.array([len(row)])) for row in rows]
    with pytest.raises(DataError, match=about):
        list(Documents(blocks, "x", END, 10, append))


def test_ids_beyond_16_bits_are_refused_by_nanogpts_format_and_leave_no_file(tmp_path):
    table = pyarrow.table({"input_ids": [[65535, END], [65536, END]]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    flags = ["--input", tmp_path / "x.parquet", "--end-of-document-id", END]
    assert "65536" in convert(*flags, "--to", "nanogpt", "--output", tmp_path / "x.bin", status=2).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]
    convert(*flags, "--to", "llmc", "--output", tmp_path / "x.bin")
    assert (tmp_path / "x.bin").read_bytes() == llmc_file(np.array([END, 65535, END, 65536]), 20240801, 7, "<u4")


@pytest.mark.parametrize("to", ["nanogpt", "llmc", "parquet", "megatron"])
def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch, to):
    monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    output = tmp_path / {"parquet": "x.parquet", "megatron": "x"}.get(to, "x.bin")
    flags = ["--input", folder / "ours", "--tokenizer", folder / "tokenizer", "--to", to, "--output", output]
    assert str(output) in convert(*flags, status=2).stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "about"),
    [(["text"], "string"), ([[1.5]], "double"), ([None], "row 75 is null"), ([[1, None, END]], "row 75 contains null")],
)
def test_a_column_that_does_not_hold_ids_is_refused_with_the_row(tmp_path, rows, about):
    good = [] if isinstance(rows[0], str) or rows == [[1.5]] else [[5, END]] * 75
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": good + rows}), tmp_path / "x.parquet")
    flags = ["--input", tmp_path / "x.parquet", "--end-of-document-id", END, "--to", "nanogpt", "--output", tmp_path / "x.bin"]
    error = convert(*flags, status=2).stderr
    assert str(tmp_path / "x.parquet") in error and "input_ids" in error and about in error


def test_contradictions_are_refused_before_anything_is_read(folder, tmp_path):
    make = ["--input", folder / "ours", "--output", tmp_path / "x"]
    for flags in (
        make,  # no tokenizer
        [*make, "--tokenizer", folder / "tokenizer", "--from", "nanogpt"],
        [*make, "--to", "llmc"],  # not the name of a .bin
        ["--input", folder / "ours", folder / "text.parquet", "--to", "nanogpt", "--output", tmp_path / "x.bin"],
        ["--input", folder / "ours", "--to", "parquet", "--shard-tokens", 5, "--output", tmp_path / "x.parquet"],
    ):
        convert(*flags, status=2)
    train(make_texts(99, 50, seed=1), tmp_path / "another", vocab_size=400, describe=dict)
    assert "another tokenizer" in convert(*make, "--tokenizer", tmp_path / "another", status=2).stderr


def test_an_id_that_never_occurs_is_refused_as_the_end_of_documents(folder, tmp_path):
    np.full(500, 7, "<u2").tofile(tmp_path / "x.bin")
    flags = ["--input", tmp_path / "x.bin", "--dtype", "uint16", "--tokenizer", folder / "tokenizer"]
    assert "does not occur" in convert(*flags, "--output", tmp_path / "y", status=2).stderr


def test_an_end_of_document_id_that_the_output_cannot_hold_is_refused_and_not_cut_off(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": [[5, 6], [7]]}), tmp_path / "x.parquet")
    flags = ["--input", tmp_path / "x.parquet", "--append-end", "--end-of-document-id", 70000]
    assert "70000" in convert(*flags, "--to", "nanogpt", "--output", tmp_path / "x.bin", status=2).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]
    convert(*flags, "--to", "llmc", "--output", tmp_path / "x.bin")
    assert (tmp_path / "x.bin").read_bytes() == llmc_file(np.array([70000, 5, 6, 70000, 7]), 20240801, 7, "<u4")


def test_a_folder_and_a_pattern_of_many_files_are_read_in_the_order_of_names_with_few_open(folder, tmp_path):
    convert("--input", folder / "ours", "--to", "llmc", "--shard-tokens", 200, "--output", tmp_path / "l[1].bin")
    assert len(list(tmp_path.iterdir())) > 40
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    for number, path in enumerate((tmp_path, f"{tmp_path}/l[[]1]_*")):
        flags = ["--tokenizer", folder / "tokenizer", "--output", folder / f"many_{number}"]
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, most))
        try:
            convert("--input", path, *flags)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        require_same_pair(folder / f"many_{number}", folder / "ours")
    again = ["--input", folder / "ours", "--to", "llmc", "--shard-tokens", 200, "--output", tmp_path / "l[1].bin"]
    assert "exists already" in convert(*again, status=2).stderr
    assert "2,147,483,647" in convert(*again[:4], "--shard-tokens", 2**31, *again[6:], status=2).stderr


def test_parquet_files_in_folders_below_are_read_too(folder, tmp_path):
    (tmp_path / "ids" / "part=1").mkdir(parents=True)
    convert("--input", folder / "ours", "--to", "parquet", "--output", tmp_path / "ids" / "part=1" / "x.parquet")
    convert("--input", tmp_path / "ids", "--tokenizer", folder / "tokenizer", "--output", tmp_path / "back")
    require_same_pair(tmp_path / "back", folder / "ours")


@pytest.mark.parametrize("name", ["x.parquet", "n.bin", "l.bin", "ours", "", "x.par*", "l*"])
def test_urls_are_read_like_files(folder, tmp_path, name):
    system = fsspec.filesystem("memory")
    convert("--input", folder / "ours", "--to", "parquet", "--output", tmp_path / "x.parquet")
    convert("--input", folder / "ours", "--to", "nanogpt", "--output", tmp_path / "n.bin")
    convert("--input", folder / "ours", "--to", "llmc", "--output", tmp_path / "l.bin")
    for path in (*tmp_path.iterdir(), *(Path(f"{folder}/ours{end}") for end in (".bin", ".idx", ".json"))):
        if name or path.suffix == ".parquet":
            system.pipe_file(f"/ids/{path.name}", path.read_bytes())
    try:
        convert("--input", f"memory://ids/{name}", "--tokenizer", folder / "tokenizer", "--output", tmp_path / "back")
    finally:
        system.rm("/ids", recursive=True)
    require_same_pair(tmp_path / "back", folder / "ours")
    missing = ["--input", "memory://ids/x.parquet", "--tokenizer", folder / "tokenizer", "--output", tmp_path / "none"]
    assert "memory://ids/x.parquet: no such file" in convert(*missing, status=2).stderr


@pytest.mark.parametrize("name", ["one", "two"])
def test_patterns_of_parquet_files_are_read_in_the_order_of_names(folder, tmp_path, name):
    rows = [row.tolist() for row in rows_of(folder / "ours")]
    for number in (5, 0, 9, 2, 7, 1, 8, 3, 6, 4):
        part = pyarrow.table({"input_ids": rows[30 * number : 30 * number + 30]})
        pyarrow.parquet.write_table(part, tmp_path / f"x-{number}.parquet")
    pattern = {"one": "*.parquet", "two": "x-[0-9].par*"}[name]
    convert("--input", tmp_path / pattern, "--tokenizer", folder / "tokenizer", "--output", tmp_path / "back")
    require_same_pair(tmp_path / "back", folder / "ours")


@pytest.mark.parametrize("kind", ["int32", "int64", "uint16", "large", "packed", "leading"])
def test_tables_as_libraries_write_them_become_the_same_documents(folder, tmp_path, kind, monkeypatch):
    """A data set of the hub, streamed, and a parquet file: lists of any kind, beside other columns; packed to one length."""
    datasets = pytest.importorskip("datasets")
    rows, flags = [row.tolist() for row in rows_of(folder / "ours")], []
    if kind in ("packed", "leading"):
        stream = leading(list(map(np.array, rows))) if kind == "leading" else np.concatenate(rows)
        rows, flags = [stream[i : i + 64].tolist() for i in range(0, len(stream) - 63, 64)], ["--packed"]
        flags += ["--leading"] if kind == "leading" else []
        list_type = pyarrow.list_(pyarrow.int32(), 64)
        stream = stream[: len(rows) * 64]
    else:
        value = pyarrow.int32() if kind == "large" else getattr(pyarrow, kind)()
        list_type = pyarrow.large_list(value) if kind == "large" else pyarrow.list_(value)
    ids = pyarrow.array(rows, list_type)
    table = pyarrow.table(
        {"attention_mask": [[1] * len(row) for row in rows], "input_ids": ids, "labels": ids, "n": range(len(rows))}
    )
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    data = datasets.Dataset(table).to_iterable_dataset(num_shards=3)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or data)
    flags += ["--tokenizer", folder / "tokenizer"]
    convert("--input", "some/name", "--from", "datasets", "--config", "en", *flags, "--output", tmp_path / "streamed")
    assert asked == [(("some/name", "en"), {"split": "train", "streaming": True})]
    convert("--input", tmp_path / "x.parquet", *flags, "--output", tmp_path / "from_parquet")
    require_same_pair(tmp_path / "streamed", tmp_path / "from_parquet")
    if not flags[0].startswith("--packed"):
        return require_same_pair(tmp_path / "streamed", folder / "ours")
    ours, theirs = rows_of(folder / "ours"), rows_of(tmp_path / "streamed")
    count = len(theirs) - 1  # the last one may be incomplete
    assert [row.tolist() for row in theirs[:count]] == [row.tolist() for row in ours[:count]]
    assert (
        theirs[-1][:-1].tolist() == ours[count][: len(theirs[-1]) - 1].tolist()
        and abs(sum(map(len, theirs)) - len(stream)) <= 1
    )


def test_a_stream_without_the_id_is_refused_before_it_fills_the_memory(monkeypatch):
    monkeypatch.setattr(interchange, "_LONGEST_DOCUMENT", 1000)
    read = []
    parts = (read.append(i) or Block(np.full(300, 7), np.array([300])) for i in range(100))
    with pytest.raises(DataError, match="1,200 tokens in a row without the id 2"):
        list(Split(parts, "stream", END, False))
    assert len(read) == 4


@pytest.mark.parametrize("to", ["nanogpt", "parquet", "megatron"])
def test_no_documents_are_refused_and_leave_nothing(folder, tmp_path, to):
    rows = pyarrow.array([], pyarrow.list_(pyarrow.int32()))
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": rows}), tmp_path / "none.parquet")
    output = tmp_path / {"nanogpt": "x.bin", "parquet": "x.parquet"}.get(to, "x")
    flags = ["--input", tmp_path / "none.parquet", "--tokenizer", folder / "tokenizer", "--to", to, "--output", output]
    assert "no documents" in convert(*flags, status=2).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["none.parquet"]


def test_a_converted_pair_passes_the_checks_of_inspect_data(folder, tmp_path):
    convert("--input", folder / "ours", "--to", "parquet", "--output", tmp_path / "x.parquet")
    convert("--input", tmp_path / "x.parquet", "--tokenizer", folder / "tokenizer", "--output", tmp_path / "x")
    report = tool("inspect_data", "--data", tmp_path / "x", "--verify").stdout
    assert "verified" in report and "None" not in report


# ---------------------------------------------------------------- Megatron-LM's own reader and builder

MEGATRON = """
import sys, torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
kind, source, target = sys.argv[1:]
read = IndexedDataset(source, mmap=kind != "file")
builder = IndexedDatasetBuilder(f"{target}.bin", dtype=read.index.dtype)
starts = read.document_indices
for first, end in zip(starts[:-1], starts[1:]):
    rows = [torch.from_numpy(read[i].astype("int64")) for i in range(first, end)]
    if kind == "halves":
        rows = [part for row in rows for part in (row[: len(row) // 2], row[len(row) // 2 :])]
    builder.add_document(torch.cat(rows), [len(row) for row in rows])
builder.finalize(f"{target}.idx")
"""


@pytest.fixture(scope="module")
def megatron(tmp_path_factory) -> Path:
    """A folder with the package megatron-core."""
    folder = tmp_path_factory.mktemp("megatron")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, "megatron-core==0.16.1"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"megatron-core cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.release
@pytest.mark.parametrize("kind", ["mmap", "file", "halves"])
def test_megatron_reads_our_pairs_and_writes_what_we_read(kind, megatron, folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MEGATRON, kind, folder / "ours", tmp_path / "theirs"],
        env={**os.environ, "PYTHONPATH": str(megatron)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    if kind != "halves":
        require_same_pair(tmp_path / "theirs", folder / "ours")
    assert [row.tolist() for row in rows_of(tmp_path / "theirs")] == [row.tolist() for row in rows_of(folder / "ours")]
    convert("--input", tmp_path / "theirs", "--tokenizer", folder / "tokenizer", "--output", tmp_path / "back")
    require_same_pair(tmp_path / "back", folder / "ours")


BUILD = """
import sys, json, numpy, torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
folder, written = sys.argv[1], {}
for name in ("uint8", "int8", "int16", "int32", "int64", "uint16", "float32", "modes"):
    dtype = getattr(numpy, "int32" if name == "modes" else name)
    builder = IndexedDatasetBuilder(f"{folder}/{name}.bin", dtype=dtype, multimodal=name == "modes")
    rng, rows = numpy.random.default_rng(0), []
    for count in (1, 3, 2, 1, 4):  # sequences of a document, some of them empty
        lengths = rng.integers(0, 9, count)
        row = rng.integers(3, 100, lengths.sum())
        rows.append(row.tolist())
        modes = [0] * count if name == "modes" else None
        builder.add_document(torch.from_numpy(row), lengths.tolist(), modes)
    builder.finalize(f"{folder}/{name}.idx")
    written[name] = rows
merged = IndexedDatasetBuilder(f"{folder}/merged.bin", dtype=numpy.int32)
for name in ("int32", "int32"):
    merged.add_index(f"{folder}/{name}")
merged.finalize(f"{folder}/merged.idx")
written["merged"] = 2 * written["int32"]
print(json.dumps(written))
"""


@pytest.mark.release
def test_all_types_of_megatrons_builder_are_read_and_what_is_no_token_is_refused(megatron, folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BUILD, tmp_path],
        env={**os.environ, "PYTHONPATH": str(megatron)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, rows in json.loads(done.stdout.splitlines()[-1]).items():
        if name in ("float32", "modes"):
            with pytest.raises(DataError, match={"float32": "integers", "modes": "multimodal"}[name]):
                TokenFile(tmp_path / name)
            continue
        assert [row.tolist() for row in rows_of(tmp_path / name)] == rows, name
        flags = ["--append-end", "--tokenizer", folder / "tokenizer", "--output", tmp_path / f"{name}-back"]
        convert("--input", tmp_path / name, *flags)
        assert [row.tolist() for row in rows_of(tmp_path / f"{name}-back")] == [[*row, END] for row in rows], name
