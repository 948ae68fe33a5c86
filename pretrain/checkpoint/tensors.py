"""safetensors files: their headers, and ranges of their values. Imports torch only to read values.

`read_header` accepts any well-formed file; `read_shards` only the files that checkpoints consist of. Their tensors are 1-D
fp32 shards of larger tensors, stored without gaps; the entry "pieces" of the metadata gives each its offset and full shape.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.engines.shards import Shard

MAX_JSON_BYTES = 64 << 20
"""Limit for a header, as for the JSON files of a checkpoint; a manifest of ten thousand ranks has 2 MB."""
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
"""The dtypes that are read and written, by their names in headers."""
BLOCK = 1 << 22
"""Elements that are read, converted and written at a time: 16 MiB of fp32."""
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError)


class HeaderError(ValueError):
    """A header that is malformed, or not of the expected kind."""


class StoredTensor(NamedTuple):
    """A tensor in a file."""

    path: Path
    dtype: str
    """A key of ITEM_BYTES."""
    shape: tuple[int, ...]
    position: int
    """Byte in the file at which its values begin."""


class StoredShard(NamedTuple):
    """A contiguous part of one flattened fp32 tensor, in a file."""

    name: str
    shape: tuple[int, ...]
    """Shape of the full tensor."""
    offset: int
    """Index of the first value in the flattened full tensor."""
    values: StoredTensor
    """1-D."""

    @property
    def count(self) -> int:
        """Number of values."""
        return self.values.shape[0]


class Header(NamedTuple):
    """The header of one file."""

    metadata: dict
    tensors: dict[str, StoredTensor]
    """In the order of the header."""
    begin: int
    """Byte at which the values of all tensors begin."""
    file_bytes: int


# ---------------------------------------------------------------- writing


def make_header(tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: dict[str, str]) -> bytes:
    """The beginning of a file that then holds the values of `tensors` (name, dtype, shape) in this order, without gaps."""
    header: dict = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shards_header(shards: Sequence[Shard]) -> bytes:
    """The beginning of a checkpoint's file that then holds the fp32 values of `shards` in this order."""
    pieces = {shard.name: {"offset": shard.offset, "shape": shard.shape} for shard in shards}
    return make_header([(shard.name, "F32", [shard.values.numel()]) for shard in shards], {"pieces": json.dumps(pieces)})


# ---------------------------------------------------------------- reading


def read_header(path: Path) -> Header:
    """Raises HeaderError unless every tensor has a known dtype and lies within the file, and OSError."""
    with open(path, "rb") as file:
        file_bytes, head = os.fstat(file.fileno()).st_size, file.read(8)
        if head == b"version ":
            raise HeaderError("it is a Git LFS pointer instead of the file; run git lfs pull")
        length = int.from_bytes(head, "little")
        if length > min(MAX_JSON_BYTES, file_bytes - 8):
            raise HeaderError(f"its header claims {length} bytes, the file has {file_bytes}")
        text = file.read(length)
    begin = 8 + length
    try:
        entries = parse_json(text)
        metadata = entries.pop("__metadata__", {})
        tensors = {name: _stored_tensor(path, name, entry, begin, file_bytes) for name, entry in entries.items()}
    except _MALFORMED as error:
        raise HeaderError(str(error)) from None
    return Header(metadata, tensors, begin, file_bytes)


def _stored_tensor(path: Path, name: str, entry: dict, begin: int, file_bytes: int) -> StoredTensor:
    dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in ITEM_BYTES:
        raise HeaderError(f"{name} has dtype {dtype}; allowed: {', '.join(ITEM_BYTES)}")
    if not all(_is_count(number) for number in (start, stop, *shape)):
        raise HeaderError(f"the shape or the offsets of {name} are not integers >= 0")
    if stop - start != math.prod(shape) * ITEM_BYTES[dtype] or begin + stop > file_bytes:
        raise HeaderError(f"the values of {name} have the wrong size or end outside the file; is it truncated?")
    return StoredTensor(path, dtype, shape, begin + start)


def read_shards(path: Path) -> list[StoredShard]:
    """The shards in one file of a checkpoint. Raises OSError, and HeaderError unless this program writes such headers."""
    header = read_header(path)
    try:
        pieces = parse_json(header.metadata["pieces"].encode())
        if pieces.keys() != header.tensors.keys():
            raise HeaderError("its pieces and its tensors have different names")
        shards = [
            StoredShard(name, tuple(pieces[name]["shape"]), pieces[name]["offset"], tensor)
            for name, tensor in header.tensors.items()
        ]
    except _MALFORMED as error:
        raise HeaderError(str(error)) from None
    end = header.begin
    for name, shape, offset, values in shards:
        if values.dtype != "F32" or len(values.shape) != 1 or not all(_is_count(number) for number in (offset, *shape)):
            raise HeaderError(f"{name} is not a shard of fp32 values")
        if values.position != end:
            raise HeaderError(f"{name} does not begin where the previous tensor ends")
        end += 4 * values.shape[0]
    if end != header.file_bytes:
        raise HeaderError(f"its tensors end at byte {end}, the file at {header.file_bytes}")
    return shards


def read_values(tensor: StoredTensor, first: int, into: Tensor) -> None:
    """Fills `into`, 1-D and fp32, with the elements from `first` on of the flattened `tensor`. Raises OSError.

    fp32 values go straight into memory of the host; those of other dtypes, or for a device, pass through one block."""
    import torch

    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[tensor.dtype]
    with open(tensor.path, "rb", buffering=0) as file:
        file.seek(tensor.position + first * ITEM_BYTES[tensor.dtype])
        for block in into.split(BLOCK):
            direct = dtype == torch.float32 and block.device.type == "cpu"
            host = block if direct else torch.empty(block.numel(), dtype=dtype)
            target = memoryview(host.view(torch.uint8).numpy())
            while target:
                if not (count := file.readinto(target)):
                    raise OSError(errno.EIO, "the file ends too early", str(tensor.path))
                target = target[count:]
            if not direct:
                block.copy_(host)


def parse_json(text: bytes) -> dict:
    """Raises ValueError unless `text` is a JSON object."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def _is_count(number: object) -> bool:
    return type(number) is int and number >= 0
