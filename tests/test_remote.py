"""Corpora are read from URLs as from files, and a transfer that ends early is never a shorter text."""

import gzip
import http.server
import json
import re
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pyarrow.parquet
import pytest

from pretrain.data import remote
from pretrain.data.corpus import Corpus
from pretrain.data.indexed import DataError

TEXTS = [f"document {i}: ü\r\n{'abcdefgh'[i % 8] * (i % 50)}" for i in range(20_000)]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def texts(*urls: str, **options) -> list[str]:
    return [text for _, text in Corpus(list(urls), **options).documents()]


@pytest.fixture
def memory() -> Iterator[str]:
    """The URL of an empty folder in memory."""
    system = fsspec.filesystem("memory")
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def write(url: str, data: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(data)


def test_files_patterns_and_folders_of_a_store_are_read_like_those_of_a_disk(memory, tmp_path):
    for name in ("b/2.jsonl", "a-b/1.txt", "a/1.txt", "c.json", "d.md", "b/3.jsonl.gz"):
        data = json.dumps({"text": name}).encode() if "json" in name else name.encode()
        data = gzip.compress(data) if name.endswith(".gz") else data
        write(f"{memory}/{name}", data)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    for inputs in (["{}"], ["{}/c.json", "{}/b"]):
        here, there = Corpus([each.format(tmp_path) for each in inputs]), Corpus([each.format(memory) for each in inputs])
        assert [text for _, text in here.documents()] == [text for _, text in there.documents()]
        assert here.other_files == there.other_files and here.total_bytes == there.total_bytes == there.read_bytes
    assert texts(f"{memory}/*.json") == ["c.json"]  # a pattern names files
    assert texts(f"{memory}/b/*") == ["b/2.jsonl", "b/3.jsonl.gz"]
    names = [name for name, _ in Corpus([f"{memory}/b/*"]).documents()]
    assert names[0] == "memory:///bucket/b/2.jsonl:1"
    assert texts(f"file://{tmp_path}/c.json") == ["c.json"]


def test_parquet_and_archives_are_read_from_a_store(memory, tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.table({"a": [{"b": text} for text in TEXTS]}), tmp_path / "a.parquet", row_group_size=999
    )
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", JSONL)
    for name in ("a.parquet", "a.zip"):
        write(f"{memory}/{name}", (tmp_path / name).read_bytes())
    assert texts(f"{memory}/a.parquet", text_key="a.b") == texts(f"{memory}/a.zip") == TEXTS


def test_the_splits_of_a_data_set_in_a_store_are_not_mixed(memory):
    for name in ("dataset_dict.json", "train/state.json", "test/state.json", "train/a.arrow", "test/a.arrow"):
        write(f"{memory}/{name}", b"{}")
    with pytest.raises(DataError, match=r"test, train.*/train"):
        Corpus([memory])
    for name in ("dataset_dict.json", "train/state.json", "train/a.arrow"):  # several data sets of one split each are mixed
        write(f"{memory}/more/one/{name}", b"{}")
        write(f"{memory}/more/two/{name}", b"{}")
    assert Corpus([f"{memory}/more"]).total_bytes == 4


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("memory://bucket/none.jsonl", "no such file"),
        ("memory://bucket/*.none", "no such file"),
        ("nothing://bucket/a.jsonl", "nothing://bucket.*allowed"),
        ("http://127.0.0.1:9/a.jsonl", "127.0.0.1:9"),
    ],
)
def test_a_url_that_cannot_be_read_is_refused_before_reading_starts(url, part):
    with pytest.raises(DataError, match=part):
        Corpus([url])


@contextmanager
def served(folder: Path, cut: int) -> Iterator[str]:
    """The URL of a server that answers requests of ranges, but sends nothing behind byte `cut` of a file."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(b"", 200, {"Content-Length": str((folder / self.path[1:]).stat().st_size), "Accept-Ranges": "bytes"})

        def do_GET(self) -> None:
            data, asked = (folder / self.path[1:]).read_bytes(), self.headers["Range"] or "bytes=0-"
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
            first, last = int(first), min(int(last or len(data)), len(data) - 1)
            body = data[first : min(last + 1, cut)]
            headers = {"Content-Length": str(len(body)), "Content-Range": f"bytes {first}-{last}/{len(data)}"}
            self.answer(body, 206 if self.headers["Range"] else 200, headers)

        def answer(self, body: bytes, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_transfer_that_ends_early_is_an_error_and_never_a_shorter_text(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 1 << 16)
    lines = JSONL.splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    (tmp_path / "a.txt").write_bytes(JSONL)
    with served(tmp_path, cut=len(JSONL)) as url:
        assert texts(f"{url}/a.jsonl") == TEXTS
    for cut in (sum(map(len, lines[:1000])), 1 << 16, 0):  # at the end of a line, and at the end of a request
        with served(tmp_path, cut) as url:
            for name in ("a.jsonl", "a.txt"):
                with pytest.raises(DataError, match=name):
                    texts(f"{url}/{name}", on_bad_line="skip")
