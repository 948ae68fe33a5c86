"""Compressed files and archives are read as the usual programs write them, and damage is never a shorter text."""

import bz2
import gzip
import io
import json
import lzma
import shutil
import subprocess
import sys
import zipfile

import pandas
import pyarrow
import pytest
import snappy

from pretrain.data.compressions import COMPRESSIONS
from pretrain.data.corpus import Corpus
from pretrain.data.indexed import DataError

TEXTS = [f"document {i}: ü\r\n{'abcdefgh'[i % 8] * (i % 50)}" for i in range(3000)]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def zipped(data: bytes, name: str = "part-0") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return out.getvalue()


PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    ".zst": lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True),
    ".lz4": lambda data: pyarrow.Codec("lz4").compress(data, asbytes=True),
    ".snappy": lambda data: snappy.StreamCompressor().compress(data),
    ".zip": zipped,
}
PROGRAMS = {
    ".gz": "gzip -k {}",
    ".bz2": "bzip2 -k {}",
    ".xz": "xz -k {}",
    ".lzma": "xz -k --format=lzma {}",
    ".zst": "zstd -q {}",
    ".lz4": "lz4 -z {} {}.lz4",
    ".zip": "zip -q {}.zip {}",
}


def texts(path, **options) -> list[str]:
    return [text for _, text in Corpus([str(path)], **options).documents()]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_every_compression_is_read_exactly_and_progress_ends_at_the_size_of_the_file(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix](JSONL))
    corpus = Corpus([str(path)])
    assert [text for _, text in corpus.documents()] == TEXTS
    assert corpus.read_bytes == corpus.total_bytes == path.stat().st_size and corpus.most_characters is None
    (tmp_path / f"a.txt{suffix.upper()}").write_bytes(PACK[suffix](TEXTS[7].encode()))
    assert texts(tmp_path / f"a.txt{suffix.upper()}") == [TEXTS[7]]


@pytest.mark.parametrize("suffix", PROGRAMS)
def test_what_the_usual_program_writes_is_read_exactly(tmp_path, suffix):
    command = PROGRAMS[suffix].format("a.jsonl", "a.jsonl").split()
    if not shutil.which(command[0]):
        pytest.skip(f"needs {command[0]}")
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert texts(tmp_path / f"a.jsonl{suffix}") == TEXTS


@pytest.mark.parametrize("suffix", [each for each in COMPRESSIONS if each != ".zip"])
def test_files_joined_with_cat_are_read_to_the_end(tmp_path, suffix):
    lines = JSONL.splitlines(keepends=True)
    parts = [b"".join(lines[:1000]), b"".join(lines[1000:1001]), b"".join(lines[1001:])]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(b"".join(PACK[suffix](part) for part in parts))
    assert texts(tmp_path / f"a.jsonl{suffix}") == TEXTS


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_cut_or_changed_file_is_never_read_as_a_shorter_or_another_text(tmp_path, suffix):
    data, path = PACK[suffix](JSONL), tmp_path / f"a.jsonl{suffix}"
    cuts = [data[:size] for size in (len(data) - 1, len(data) - 5, len(data) // 2, 100, 20)]
    if suffix not in (".lz4", ".zst", ".lzma"):  # pyarrow writes no checksum of the content, and .lzma has none
        middle = len(data) // 2
        cuts.append(data[:middle] + bytes([data[middle] ^ 0x55]) + data[middle + 1 :])
    for cut in cuts:
        path.write_bytes(cut)
        with pytest.raises(DataError, match=rf"a\.jsonl{suffix}"):
            assert texts(path, on_bad_line="skip") == TEXTS


@pytest.mark.parametrize("suffix", [".lzma", ".snappy"])
def test_a_file_that_ends_within_a_block_is_damaged_wherever_it_ends(tmp_path, suffix):
    data, path = PACK[suffix](JSONL[:500]), tmp_path / f"a.txt{suffix}"
    for size in range(14, len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=rf"a\.txt{suffix}"):
            texts(path)


def test_with_a_given_format_the_first_bytes_tell_the_compression(tmp_path):
    for suffix, pack in PACK.items():
        if suffix != ".lzma":
            (tmp_path / "part-00000").write_bytes(pack(JSONL))
            assert texts(tmp_path / "part-00000", format="jsonl") == TEXTS, suffix
            (tmp_path / "part.jsonl").write_bytes(pack(JSONL))
            with pytest.raises(DataError, match=rf"does not end in \{suffix}; .*--format"):
                texts(tmp_path / "part.jsonl")
    (tmp_path / "part.data.gz").write_bytes(gzip.compress(JSONL))
    assert texts(tmp_path / "part.data.gz", format="jsonl") == TEXTS
    (tmp_path / "part.data.gz").write_bytes(lzma.compress(JSONL))
    with pytest.raises(DataError, match="rename it"):
        texts(tmp_path / "part.data.gz", format="jsonl")


def test_a_compressed_stream_is_read_from_standard_input(monkeypatch):
    for suffix in (".gz", ".zst", ".lz4", ".snappy", ".xz"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PACK[suffix](JSONL))))
        assert texts("-", format="jsonl") == TEXTS


def test_all_files_of_an_archive_are_read_in_order_and_others_are_counted(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_BZIP2) as archive:
        for name, data in (
            ("z/b.txt", b"plain"),
            ("a.jsonl", b'{"text": "one"}\n{"text": "two"}\n'),
            ("c.csv.gz", gzip.compress(b"id,text\n1,three\n")),
            ("z/", b""),
            ("__MACOSX/a.jsonl", b"\0"),
            ("z/.DS_Store", b"\0"),
            ("README.md", b"# Read me"),
            ("d.parquet", b"PAR1"),
            ("inner.zip", zipped(b"x")),
        ):
            archive.writestr(name, data)
    corpus = Corpus([str(tmp_path / "a.zip")])
    assert list(corpus.documents()) == [
        (f"{tmp_path}/a.zip/a.jsonl:1", "one"),
        (f"{tmp_path}/a.zip/a.jsonl:2", "two"),
        (f"{tmp_path}/a.zip/c.csv.gz:2", "three"),
        (f"{tmp_path}/a.zip/z/b.txt", "plain"),
    ]
    assert corpus.other_files == {".md": 1, ".parquet": 1, ".zip": 1} and corpus.problems()[0].startswith("3 files")


def test_a_lone_file_of_an_archive_has_the_format_of_the_archives_name(tmp_path):
    for name, member in (("a.jsonl.zip", "part-0"), ("a.zip", "part.jsonl"), ("a.txt.zip", "a.jsonl")):
        (tmp_path / name).write_bytes(zipped(JSONL, member))
        assert texts(tmp_path / name) == TEXTS
    (tmp_path / "a.zip").write_bytes(zipped(JSONL))
    with pytest.raises(DataError, match=r"a\.zip: this archive has part-0.*--format"):
        texts(tmp_path / "a.zip")
    assert texts(tmp_path / "a.zip", format="jsonl") == TEXTS
    (tmp_path / "more").mkdir()
    (tmp_path / "a.jsonl.zip").rename(tmp_path / "more" / "a.jsonl.zip")
    (tmp_path / "a.zip").rename(tmp_path / "more" / "b.zip")
    corpus = Corpus([str(tmp_path / "more")])  # what b.zip has is not known before it is named
    assert len(list(corpus.documents())) == len(TEXTS) and "name files to read them" in corpus.problems()[0]


def test_the_archives_name_tells_no_format_if_it_has_several_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w") as archive:
        archive.writestr("a.jsonl", JSONL)
        archive.writestr("LICENSE", "all rights reserved")
    corpus = Corpus([str(tmp_path / "a.jsonl.zip")])
    assert [text for _, text in corpus.documents()] == TEXTS and corpus.other_files == {"without an ending": 1}


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zip"])
def test_what_pandas_compresses_is_read_exactly(tmp_path, suffix):
    frame = pandas.DataFrame({"id": range(len(TEXTS)), "text": TEXTS})
    frame.to_json(tmp_path / f"a.jsonl{suffix}", orient="records", lines=True)
    frame.to_csv(tmp_path / f"a.csv{suffix}", index=False)
    assert texts(tmp_path / f"a.jsonl{suffix}") == texts(tmp_path / f"a.csv{suffix}") == TEXTS


def test_an_archive_that_python_cannot_read_is_refused_with_the_command_that_unpacks_it(tmp_path):
    data = bytearray(zipped(JSONL, "a.jsonl"))
    central = data.index(b"PK\x01\x02")
    for offset, value in ((central + 8, 1), (central + 10, 14 + 85)):  # a password; a method that no version of Python knows
        changed = bytearray(data)
        changed[offset] = value
        (tmp_path / "a.zip").write_bytes(changed)
        with pytest.raises(DataError, match=r"a\.zip: a\.jsonl .*unzip .*a\.zip"):
            texts(tmp_path / "a.zip")
    (tmp_path / "a.zip").write_bytes(b"PK\x05\x06" + bytes(18))  # of no files
    with pytest.raises(DataError, match=r"a\.zip"):
        texts(tmp_path / "a.zip")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "snappy", None)
    (tmp_path / "a.jsonl.snappy").write_bytes(PACK[".snappy"](JSONL))
    with pytest.raises(DataError, match="pip install python-snappy"):
        texts(tmp_path / "a.jsonl.snappy")
