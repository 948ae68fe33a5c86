"""Headers of safetensors files keep their bytes in every version, and malformed files are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.checkpoint.tensors import (
    BLOCK,
    HeaderError,
    StoredTensor,
    make_header,
    read_header,
    read_shards,
    read_values,
    shards_header,
)
from pretrain.engines.shards import Shard


def write_shards(path: Path, change: Callable[[dict, dict], None] = lambda entries, pieces: None, rest: bytes = b"") -> Path:
    """A checkpoint's file of two shards, its header changed. rest: bytes after the values."""
    shards = [Shard("model/a", (3, 5), 4, torch.arange(7.0)), Shard("model/b", (2,), 0, torch.ones(2))]
    entries = json.loads(shards_header(shards)[8:])
    pieces = json.loads(entries["__metadata__"]["pieces"])
    change(entries, pieces)
    if "__metadata__" in entries:
        entries["__metadata__"]["pieces"] = json.dumps(pieces)
    text = json.dumps(entries).encode()
    values = b"".join(shard.values.numpy().tobytes() for shard in shards)
    path.write_bytes(len(text).to_bytes(8, "little") + text + values + rest)
    return path


def test_headers_never_change_their_bytes():
    """Golden: what the first release wrote, for checkpoints and for folders of transformers."""
    shards = [Shard("model/a", (3, 5), 4, torch.empty(7)), Shard("exp_avg/é", (2,), 0, torch.empty(2))]
    assert shards_header(shards) == (
        b'\x18\x01\x00\x00\x00\x00\x00\x00{"__metadata__": {"pieces": "{\\"model/a\\": {\\"offset\\": 4, \\"shape\\": [3, 5]}, '
        b'\\"exp_avg/\\\\u00e9\\": {\\"offset\\": 0, \\"shape\\": [2]}}"}, "model/a": {"dtype": "F32", "shape": [7], '
        b'"data_offsets": [0, 28]}, "exp_avg/\\u00e9": {"dtype": "F32", "shape": [2], "data_offsets": [28, 36]}} '
    )
    assert make_header([("a", "F32", (2,)), ("b", "BF16", (2, 3))], {"format": "pt"}) == (
        b'\xa8\x00\x00\x00\x00\x00\x00\x00{"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2], '
        b'"data_offsets": [0, 8]}, "b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [8, 20]}}       '
    )


def test_the_library_reads_what_is_written(tmp_path):
    tensors = load_file(write_shards(tmp_path / "file"))
    assert tensors["model/a"].tolist() == list(range(7)) and tensors["model/b"].tolist() == [1, 1]


def test_shards_are_read_back(tmp_path):
    a, b = read_shards(write_shards(tmp_path / "file"))
    assert (a.name, a.shape, a.offset, a.count) == ("model/a", (3, 5), 4, 7)
    assert (b.name, b.shape, b.offset, b.count) == ("model/b", (2,), 0, 2)
    into = torch.empty(2)
    read_values(a.values, 5, into)
    assert into.tolist() == [5, 6]


STRICT = {
    "no metadata": lambda entries, pieces: entries.pop("__metadata__"),
    "one piece too few": lambda entries, pieces: pieces.pop("model/b"),
    "pieces of other tensors": lambda entries, pieces: pieces.update({"model/c": pieces.pop("model/b")}),
    "two dimensions": lambda entries, pieces: entries["model/a"].update(shape=[7, 1]),
    "offset -1": lambda entries, pieces: pieces["model/a"].update(offset=-1),
    "offset as a float": lambda entries, pieces: pieces["model/a"].update(offset=4.0),
    "offset as a boolean": lambda entries, pieces: pieces["model/b"].update(offset=False),
    "shape with a string": lambda entries, pieces: pieces["model/a"].update(shape=["3", 5]),
    "half the bytes": lambda entries, pieces: entries["model/a"].update(dtype="BF16", data_offsets=[0, 14]),
    "overlap": lambda entries, pieces: entries["model/b"].update(data_offsets=[24, 32]),
    "wrong order": lambda entries, pieces: entries.update({"model/a": entries.pop("model/a")}),
    "values left over": lambda entries, pieces: (entries.pop("model/b"), pieces.pop("model/b")),
}  # fmt: skip


@pytest.mark.parametrize("change", STRICT)
def test_a_file_of_shards_that_this_program_would_not_write_is_refused(tmp_path, change):
    with pytest.raises(HeaderError):
        read_shards(write_shards(tmp_path / "file", STRICT[change]))


def test_bytes_after_the_last_shard_are_refused(tmp_path):
    with pytest.raises(HeaderError):
        read_shards(write_shards(tmp_path / "file", rest=b"more"))


MALFORMED = {
    "length beyond the file": lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
    "nothing": lambda data: b"",
    "cut": lambda data: data[:-1],
    "not JSON": lambda data: data[:8] + b"[" + data[9:],
    "a list": lambda data: (2).to_bytes(8, "little") + b"[]",
    "deeply nested": lambda data: (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "negative": lambda data: data.replace(b"[0,16]", b"[-1,15]"[:7]),
    "Git LFS": lambda data: b"version https://git-lfs.github.com/spec/v1\n",
}  # fmt: skip


@pytest.mark.parametrize("damage", MALFORMED)
def test_a_malformed_file_of_any_program_is_refused(tmp_path, damage):
    path = tmp_path / "file"
    save_file({"a": torch.arange(4.0)}, path)
    data = path.read_bytes()
    assert read_header(path).tensors["a"] == StoredTensor(path, "F32", (4,), len(data) - 16)
    path.write_bytes(MALFORMED[damage](data))
    with pytest.raises(HeaderError):
        read_header(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_range_of_any_dtype_is_read_as_fp32(tmp_path, dtype):
    """Even across the border of two blocks."""
    tensor = (torch.arange(BLOCK + 10) % 251).to(dtype)
    save_file({"a": tensor.view(2, -1)}, tmp_path / "file")
    into = torch.empty(BLOCK + 2)
    read_values(read_header(tmp_path / "file").tensors["a"], 7, into)
    assert torch.equal(into, tensor[7 : BLOCK + 9].float())


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = write_shards(tmp_path / "file")
    shard = read_shards(path)[1]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(OSError):
        read_values(shard.values, 0, torch.empty(2))
