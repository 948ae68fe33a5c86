"""Documents are read exactly as they were written, and every bad line is reported."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest

from pretrain.data.corpus import Corpus
from pretrain.data.division import Shard
from pretrain.data.indexed import DataError

TEXTS = ["First line\nsecond\r\nthird\t\x00 end ", "  spaces  ", "ünïcode \u2581 中文 🏳️‍🌈\n\n\n", "x"]


def texts(corpus: Corpus) -> list[str]:
    return [text for _, text in corpus.documents()]


def jsonl(records) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def written_table(delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows([["id", "text"], *enumerate(TEXTS)])
    return out.getvalue().encode()


def zstd(data: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


PACKED = [("", bytes), (".gz", gzip.compress), (".zst", zstd), (".bz2", bz2.compress), (".xz", lzma.compress)]


@pytest.mark.parametrize(("suffix", "pack"), PACKED)
def test_texts_are_read_from_every_format_exactly_as_written(tmp_path, suffix, pack):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(jsonl({"id": i, "text": text} for i, text in enumerate(TEXTS))))
    corpus = Corpus([str(tmp_path / f"a.jsonl{suffix}")])
    assert list(corpus.documents()) == [(f"{tmp_path}/a.jsonl{suffix}:{i + 1}", text) for i, text in enumerate(TEXTS)]
    assert corpus.read_bytes == corpus.total_bytes == (tmp_path / f"a.jsonl{suffix}").stat().st_size
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt{suffix}").write_bytes(pack(text.encode()))
    assert texts(Corpus([str(tmp_path / f"{i}.txt{suffix}") for i in range(4)])) == TEXTS


def test_parquet_rows_are_documents(tmp_path):
    table = pyarrow.table({"id": range(4), "content": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    corpus = Corpus([str(tmp_path / "a.parquet")], text_key="content")
    assert texts(corpus) == TEXTS
    assert corpus.read_bytes == corpus.total_bytes
    with pytest.raises(DataError, match=r"a\.parquet.* 'id', 'content'.*--text-key"):
        texts(Corpus([str(tmp_path / "a.parquet")]))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"b\.parquet"):
        texts(Corpus([str(tmp_path / "b.parquet")]))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("array.json", json.dumps([{"text": text} for text in TEXTS]).encode()),
        ("indented.json", b"\xef\xbb\xbf" + json.dumps([{"text": text} for text in TEXTS], indent=2).encode()),
        ("objects.json", "\n".join(json.dumps({"text": text}, indent=1) for text in TEXTS).encode()),
        ("lines.json", jsonl({"text": text} for text in TEXTS)),
        ("array.jsonl", json.dumps([{"text": text} for text in TEXTS]).encode()),
        *((f"a{suffix}", jsonl({"text": text} for text in TEXTS)) for suffix in (".ndjson", ".jsonlines", ".JL")),
        ("packed.json.gz", gzip.compress(json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False).encode())),
        ("a.csv", written_table(",")),
        ("a.tsv.xz", lzma.compress(written_table("\t"))),
    ],
)
def test_every_form_of_json_and_table_is_read_exactly(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert texts(Corpus([str(tmp_path / name)])) == TEXTS


def test_a_json_array_larger_than_the_buffer_is_read_and_its_damage_reported(tmp_path):
    long = [{"text": "ü" * 300_000 + str(i)} for i in range(9)] + [{"text": "x" * 3_000_000}, {"text": "last"}]
    data = json.dumps(long, ensure_ascii=False)
    (tmp_path / "a.json").write_text(data)
    assert texts(Corpus([str(tmp_path / "a.json")])) == [each["text"] for each in long]
    for bad in (data[:-1], data[:-10], data + "{}", data.replace("last", "la\nst"), data.replace(", {", ", ,{", 1)[:700_000]):
        (tmp_path / "a.json").write_text(bad)
        with pytest.raises(DataError, match=r"a\.json"):
            texts(Corpus([str(tmp_path / "a.json")], on_bad_line="skip"))


def test_nested_keys_and_columns_are_read(tmp_path):
    records = [{"meta": {"id": i, "body": {"text": text}}, "a.b": text} for i, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        for key in ("meta.body.text", "a.b"):
            assert texts(Corpus([str(tmp_path / name)], text_key=key)) == TEXTS
        with pytest.raises(DataError, match=r"'meta.body' is dict.*--text-key meta.body.KEY"):
            texts(Corpus([str(tmp_path / name)], text_key="meta.body"))
        with pytest.raises(DataError, match="'id', 'body'"):
            texts(Corpus([str(tmp_path / name)], text_key="meta.txt"))
    table = pyarrow.table({"text": [text.encode() for text in TEXTS], "pages": [["a", "b"]] * 4})
    pyarrow.parquet.write_table(table, tmp_path / "bytes.parquet")
    assert texts(Corpus([str(tmp_path / "bytes.parquet")])) == TEXTS
    with pytest.raises(DataError, match=r"'pages' is list.*join"):
        texts(Corpus([str(tmp_path / "bytes.parquet")], text_key="pages"))


def test_folders_of_save_to_disk_are_read_and_their_splits_are_not_mixed(tmp_path):
    import datasets

    data = datasets.Dataset.from_dict({"text": TEXTS})
    data.save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "cache-1.arrow").write_bytes((tmp_path / "one" / "data-00000-of-00002.arrow").read_bytes())
    corpus = Corpus([str(tmp_path / "one")])
    assert texts(corpus) == TEXTS and [problem[0] for problem in corpus.problems()] == ["1"]  # the cache
    with pytest.raises(DataError, match=f"--input {tmp_path}/one"):
        texts(Corpus.from_hub(str(tmp_path / "one")))
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match=f"test, train.*--input {tmp_path}/two/train"):
        Corpus([str(tmp_path / "two")])
    assert texts(Corpus([str(tmp_path / "two" / "train")])) == TEXTS


def test_hub_data_are_streamed(tmp_path):
    """From a local folder, which the `datasets` library reads in the same way."""
    (tmp_path / "train.jsonl").write_bytes(jsonl({"text": text} for text in TEXTS))
    corpus = Corpus.from_hub(str(tmp_path))
    assert texts(corpus) == TEXTS
    assert corpus.description()["inputs"] == [f"hf:{tmp_path}:train"]
    with pytest.raises(DataError, match=r"hf:.*:train:1: "):
        texts(Corpus.from_hub(str(tmp_path), text_key="body"))
    with pytest.raises(DataError, match="--hf "):
        texts(Corpus.from_hub(str(tmp_path / "nowhere")))


def test_shards_of_hub_data_are_their_files(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.jsonl").write_bytes(jsonl({"text": f"file {i}, line {j}"} for j in range(3)))
    shards = [texts(Corpus.from_hub(str(tmp_path), shard=Shard(i, 3))) for i in range(3)]
    assert all(shards) and [text for shard in shards for text in shard] == texts(Corpus.from_hub(str(tmp_path)))
    with pytest.raises(DataError, match="4 files"):
        texts(Corpus.from_hub(str(tmp_path), shard=Shard(0, 5)))


def test_counts_and_checksum_describe_the_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": text} for text in [*TEXTS, "", "\n \t"]))
    corpus = Corpus([str(tmp_path / "a.jsonl")])
    assert texts(corpus) == TEXTS
    assert (corpus.num_documents, corpus.empty_documents, corpus.bad.total()) == (4, 2, 0)
    assert corpus.utf8_bytes == sum(len(text.encode()) for text in TEXTS)
    assert corpus.sha256 == hashlib.sha256(b"".join(text.encode() + b"\0" for text in TEXTS)).hexdigest()
    assert len(corpus.problems()) == 1 and "2 documents" in corpus.problems()[0]


def test_folders_are_read_in_sorted_order(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "c.jsonl", "ignored.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    assert texts(Corpus([str(tmp_path)])) == ["a/1.txt", "b/2.txt", "c.jsonl"]


@pytest.mark.parametrize(("stdin_format", "data"), [("jsonl", jsonl({"text": text} for text in TEXTS)), ("txt", b"a\nb\n")])
def test_standard_input_is_read_in_its_format(monkeypatch, stdin_format, data):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    corpus = Corpus(["-"], split="line", format=stdin_format)
    assert texts(corpus) == (TEXTS if stdin_format == "jsonl" else ["a", "b"]) and corpus.total_bytes is None


@pytest.mark.parametrize(
    ("split", "data", "expected"),
    [
        ("file", "one\n\ntwo\n", ["one\n\ntwo\n"]),
        ("line", "one\r\ntwo words\nthree", ["one", "two words", "three"]),
        ("blank-line", "one\nmore\n\ntwo\r\n\r\n \n\nthree", ["one\nmore", "two", "three"]),
        (
            "<|endoftext|>",
            "one\n\nmore\n<|endoftext|>\ntwo<|endoftext|>  three\n<|endoftext|>\n",
            ["one\n\nmore", "two", "  three"],
        ),
    ],
)
def test_text_files_are_split_into_documents(tmp_path, split, data, expected):
    (tmp_path / "a.txt").write_bytes(data.encode())
    assert texts(Corpus([str(tmp_path / "a.txt")], split=split)) == expected


def test_separators_across_read_blocks_are_found(tmp_path):
    parts = ["a" * ((1 << 20) - 3), "b" * 100, "c" * (3 << 20), "d"]
    (tmp_path / "a.txt").write_text("<SEP>".join(parts))
    assert texts(Corpus([str(tmp_path / "a.txt")], split="<SEP>")) == parts


def test_invalid_bytes_are_replaced_and_counted_and_byte_order_marks_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab\xe9 \xff\xef\xbf\xbd")
    corpus = Corpus([str(tmp_path / "a.txt")])
    assert texts(corpus) == ["ab\ufffd \ufffd\ufffd"]
    assert corpus.text_counts.replaced_bytes == 2
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl([{"text": "x"}]) + b"\r\n\n" + b'{"text": "no line end"}')
    assert texts(Corpus([str(tmp_path / "a.jsonl")])) == ["x", "no line end"]


@pytest.mark.parametrize("encoding", ["latin-1", "gbk", "utf-16", "utf-16-le", "shift_jis"])
def test_a_file_in_another_encoding_is_bad(tmp_path, encoding):
    text = "ein schöner Käse für früh und spät\n\n" if encoding.startswith(("l", "utf")) else "公園里有一只小猫\n\n"
    (tmp_path / "a.txt").write_bytes((text * 200).encode(encoding))
    for split in ("file", "blank-line"):
        with pytest.raises(DataError, match=r"a\.txt.*UTF-8.*--on-bad-line skip"):
            texts(Corpus([str(tmp_path / "a.txt")], split=split))
    corpus = Corpus([str(tmp_path / "a.txt")], on_bad_line="skip")
    assert texts(corpus) == [] and corpus.bad.total() == 1 and corpus.text_counts.replaced_bytes == 0
    (tmp_path / "a.txt").write_bytes(b"plain text " * 10_000 + b"\xfcber " * 100)
    corpus = Corpus([str(tmp_path / "a.txt")])
    assert len(texts(corpus)) == 1 and corpus.text_counts.replaced_bytes == 100


def test_files_that_were_not_read_or_not_split_are_reported(tmp_path):
    for name in ("a.txt", "b.TXT", "c.json", "d.md", ".hidden"):
        (tmp_path / name).write_text("some\n<SEP>\ntext" if name == "a.txt" else "some text")
    (tmp_path / "linked").symlink_to(tmp_path)
    corpus = Corpus([str(tmp_path)], split="<SEP>")
    assert texts(corpus) == ["some", "text", "some text"]
    assert (corpus.text_counts.unsplit_files, corpus.other_files.total()) == (1, 3)
    assert [problem.partition(" ")[0] for problem in corpus.problems()] == ["1", "3"]
    with pytest.raises(DataError, match="--text-split"):
        Corpus([str(tmp_path)], split="")


def test_a_document_too_large_for_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.data.readers._LARGEST_DOCUMENT", 1000)
    (tmp_path / "a.txt").write_text("one story\n" * 100)
    assert len(texts(Corpus([str(tmp_path / "a.txt")]))) == 1
    (tmp_path / "a.txt").write_text("one story\n" * 101)
    for split in ("file", "<SEP>"):
        with pytest.raises(DataError, match=r"a\.txt.*--text-split"):
            texts(Corpus([str(tmp_path / "a.txt")], split=split))
    assert len(texts(Corpus([str(tmp_path / "a.txt")], split="line"))) == 101


BAD_LINES = {
    "cut": b'{"text": "cut',
    "not an object": b"[1, 2]",
    "other key": b'{"body": "x", "id": 1}',
    "null": b'{"text": null}',
    "number": b'{"text": 3}',
    "not UTF-8": b'{"text": "ab\xe9"}',
    "surrogate": b'{"text": "\\ud800"}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_reported_with_its_place_or_skipped_and_counted(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([{"text": "good"}]) + line + b"\n" + jsonl([{"text": "also good"}]))
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*--on-bad-line skip"):
        texts(Corpus([str(path)]))
    corpus = Corpus([str(path)], on_bad_line="skip")
    assert texts(corpus) == ["good", "also good"]
    assert corpus.bad.total() == 1 and len(corpus.problems()) == 1


def test_json_lines_read_as_plain_text_are_noted(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(jsonl([{"id": 1, "text": "a"}]))))
    (tmp_path / "a.txt").write_text('{"a": 1} "text": is no JSON line with a text')
    corpus = Corpus(["-", str(tmp_path / "a.txt")])
    assert len(texts(corpus)) == 2
    assert [each for each in corpus.problems() if each.startswith("1") and "--format jsonl" in each]


def test_each_reason_for_leaving_text_out_has_its_own_count(tmp_path):
    lines = [*BAD_LINES.values(), b'{"text": 4}', b'{"text": ""}', b'{"text": "good"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "table.csv").write_text("id,text\n1,good\n2\n3,a,b\n")
    corpus = Corpus([str(tmp_path / "a.jsonl"), str(tmp_path / "table.csv")], on_bad_line="skip")
    assert texts(corpus) == ["good", "good"] and corpus.empty_documents == 1
    assert sorted(corpus.bad.values()) == [1, 1, 1, 1, 2, 2, 3]  # another type: number twice; not JSON: three times
    problems = "\n".join(corpus.problems())
    for count, reason, place in (("3", "not JSON", 1), ("1", "no key 'text'", 3), ("2", "'text' is int", 5)):
        assert any(each.startswith(count) and reason in each and f"a.jsonl:{place}" in each for each in corpus.problems()), (
            problems
        )


def test_a_line_too_large_for_memory_is_refused_with_its_place_or_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.data.readers._LARGEST_DOCUMENT", 1000)
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": text} for text in ("one", "x" * 5000, "two")))
    with pytest.raises(DataError, match=r"a\.jsonl:2: "):
        texts(Corpus([str(tmp_path / "a.jsonl")]))
    assert texts(Corpus([str(tmp_path / "a.jsonl")], on_bad_line="skip")) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("a.rar", "unrar x"),
        ("a.tar.gz", "tar -xf"),
        ("a.log.gz", r"--format .*jsonl"),
        ("a.md", r"--format txt\|"),
        ("a.parquet.gz", r"\.gz.*unpack"),
    ],
)
def test_other_formats_are_refused_with_the_command_that_helps(tmp_path, name, way):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=way):
        Corpus([str(tmp_path / name)])


def test_a_given_format_reads_every_file_of_a_folder_but_those_of_programs(tmp_path):
    """As Spark and Hadoop write them."""
    for name in ("part-00000", "part-00001.gz", "z.data"):
        data = jsonl([{"text": name}])
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    for name in ("_SUCCESS", ".part-00000.crc", "dataset_info.json"):
        (tmp_path / name).write_bytes(b"not JSON")
    corpus = Corpus([str(tmp_path)], format="jsonl")
    assert texts(corpus) == ["part-00000", "part-00001.gz", "z.data"] and corpus.other_files.total() == 1  # _SUCCESS
    with pytest.raises(DataError, match="--format"):
        Corpus([str(tmp_path)])
    with pytest.raises(DataError, match=r"part-00000:1: .*'body'"):
        texts(Corpus([str(tmp_path)], format="jsonl", text_key="body"))


def test_column_files_that_are_compressed_or_come_from_standard_input_are_not_read(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    corpus = Corpus([str(tmp_path)])
    assert texts(corpus) == ["text"] and corpus.other_files == {".parquet.gz": 1}
    for form in ("parquet", "arrow"):
        with pytest.raises(DataError, match="standard input"):
            Corpus(["-"], format=form)


def test_a_folder_of_json_files_is_refused_with_the_way_to_read_them(tmp_path):
    (tmp_path / "part-1.json.gz").write_bytes(gzip.compress(b"[]"))
    with pytest.raises(DataError, match=r"--input .*/\*\.json\.gz"):
        Corpus([str(tmp_path)])


def test_unusable_inputs_are_refused_before_reading_starts(tmp_path):
    (tmp_path / "a.md").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, what in (("a.md", r"a\.md.*format"), ("none.txt", r"none\.txt"), ("empty", "empty.*folder")):
        with pytest.raises(DataError, match=what):
            Corpus([str(tmp_path / name)])


@pytest.mark.parametrize(("suffix", "pack"), PACKED[1:])
def test_a_truncated_compressed_file_is_refused(tmp_path, suffix, pack):
    packed = pack(jsonl({"text": f"document number {i}"} for i in range(1000)))
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=rf"a\.jsonl{suffix}"):
        texts(Corpus([str(tmp_path / f"a.jsonl{suffix}")], on_bad_line="skip"))  # not a bad line but a damaged file


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl", gzip.compress), ("a.txt", bz2.compress), ("a.jsonl.gz", bytes)])
def test_a_file_that_is_not_compressed_as_its_name_says_is_refused(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(jsonl([{"text": "a"}])))
    with pytest.raises(DataError, match="rename it"):
        texts(Corpus([str(tmp_path / name)], on_bad_line="skip"))


def test_the_standard_library_is_real_text_and_the_same_each_time():
    corpus, again = Corpus(["stdlib"]), Corpus(["stdlib"])
    documents = list(corpus.documents())
    assert documents == list(again.documents()) and corpus.sha256 == again.sha256
    assert 6e6 < corpus.utf8_bytes < 10e6 and 400 < len(documents) < 600
    names = [name for name, _ in documents]
    assert "stdlib/argparse.py" in names and "topics/assert" in names
    assert not [name for name in names if "/test/" in name or "site-packages" in name]
