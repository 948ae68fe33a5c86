"""Judges what a flat .bin holds, which nothing in it says: the type of its tokens, or that it does not hold tokens at all.

    type       little-endian uint16, uint32 or int64, by the bytes that are zero in every token
    header     llm.c and modded-nanogpt: 256 int32 (magic, version, token count, then zeros); the magic gives the type
    refused    text, archives and other formats, chunks of litdata, floats, big-endian integers, cut files, headers with an
               unknown magic

Ids below 2^20 leave at most 15 in the upper half of a 32-bit word, and more than the largest of these in the lower half of most
words; the two halves of a pair of 16-bit tokens have equal chances. So the vocabulary decides only where it can: a type whose
ids the model does not have is not the type. What no rule can tell (16-bit tokens of which every second one is 0) is settled by
the setting `dtype` of a source.
"""

from __future__ import annotations

import struct

import numpy as np

DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")
"""The types that a user may name."""
HEADER_BYTES = 1024
_HEADER_TYPES = {20240520: "<u2", 20240801: "<u4"}
_NO_TOKENS = {
    20240326: "weights",
    20240327: "activations for a test",
    20240328: "a tokenizer",
    20240522: "questions for an evaluation",
    20240527: "the state of an optimizer",
    20240803: "weights",
}
"""Other files of llm.c by their magic."""
_FORMATS = {
    b"\x93NUMPY": "was written by numpy.save, whose header is not tokens; write it with array.tofile",
    b"PK\x03\x04": "is a zip archive (of numpy.savez or torch.save)",
    b"\x1f\x8b": "is compressed by gzip",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd",
    b"\xfd7zXZ": "is compressed by xz",
    b"BZh": "is compressed by bzip2",
    b"PAR1": "is a parquet file",
    b"ARROW1": "is an Arrow file",
    b"\x89HDF": "is an HDF5 file",
    b"\x80\x04\x95": "is a pickle",
    b"MMIDIDX": "is a Megatron index (.idx), not its tokens",
    b"\xff\xfe": "is text in UTF-16",
    b"\xef\xbb\xbf": "is text in UTF-8",
}
_MOST_UPPER = 15  # of a 32-bit id below 2^20
_LEAST_WORDS, _SURE_WORDS, _LEAST_TOKENS = 32, 1024, 512
_TEXT = np.zeros(256, bool)
_TEXT[[9, 10, 12, 13, *range(32, 127), *range(128, 256)]] = True


def judge(head: bytes, sample: bytes, size: int, vocab_size: int | None = None) -> tuple[np.dtype, int]:
    """(type of the tokens, bytes before the first) of a flat file of `size` bytes.

    head: its first bytes, HEADER_BYTES of them if there are as many. sample: parts of it that begin at multiples of 8 bytes.
    vocab_size: ids of the model, if known. Raises ValueError with what the file is instead.
    """
    for magic, what in _FORMATS.items():
        if head.startswith(magic):
            raise ValueError(what)
    if _is_litdata(head, size):
        raise ValueError(
            "is a chunk of litdata, whose index stands before its tokens; write its items to parquet as lists of ids, "
            "which tools/convert_data.py reads"
        )
    if len(head) == HEADER_BYTES and (header := _header(head, size)):
        return header
    words = np.frombuffer(sample[: len(sample) // 8 * 8], "<u8")
    words = words[words != 0]  # a hole says nothing
    if len(words) < _LEAST_WORDS:
        return np.dtype("<u2"), 0
    _refuse_floats(words)
    dtype = _integers(words, vocab_size) or _pairs(words)
    if size % dtype.itemsize:
        kind = f"holds {dtype.name} tokens by its content, but {size:,} bytes, no multiple of {dtype.itemsize}"
        raise ValueError(f"{kind}: it was cut; copy it again")
    return dtype, 0


def _is_litdata(head: bytes, size: int) -> bool:
    """True if the file begins with a number of items, their offsets and the end of the last, as uint32."""
    items, *offsets = np.frombuffer(head[: len(head) // 4 * 4], "<u4").astype(np.int64).tolist() or [0]
    offsets = offsets[: items + 1]
    if not items or not offsets or offsets[0] != 8 + 4 * items or max(offsets) > size or offsets != sorted(offsets):
        return False
    return len(offsets) <= items or offsets[-1] == size


def _header(head: bytes, size: int) -> tuple[np.dtype, int] | None:
    magic, _, count, *rest = struct.unpack("<256i", head)
    if magic in _HEADER_TYPES:
        dtype = np.dtype(_HEADER_TYPES[magic])
        if size != (expected := HEADER_BYTES + dtype.itemsize * count):
            raise ValueError(f"{size:,} bytes found, {expected:,} expected; copy it again")
        return dtype, HEADER_BYTES
    if magic in _NO_TOKENS:
        raise ValueError(f"is a file of llm.c that holds {_NO_TOKENS[magic]}, not tokens")
    if count > 0 and not any(rest) and (size - HEADER_BYTES) in (2 * count, 4 * count):
        raise ValueError(f"begins with a header of 256 integers like llm.c's, but with the unknown magic {magic}")
    return None


def _refuse_floats(words: np.ndarray) -> None:
    """Raises ValueError if all of the words (n,) uint64, none of them 0, are floats with integer values."""
    for kind in ("<f8", "<f4", "<f2"):
        values = words.view(kind)
        values = values[values != 0]
        with np.errstate(invalid="ignore"):
            whole = np.isfinite(values) & (values >= 1) & (values == np.floor(values))
        if len(values) >= _LEAST_WORDS and whole.all() and len(np.unique(values)) >= 8:
            raise ValueError(f"holds {values.dtype.name}; ids are integers, so write it with array.astype('<u2') or '<u4'")


def _integers(words: np.ndarray, vocab_size: int | None) -> np.dtype | None:
    """int64 or uint32 if the words (n,) uint64, none of them 0, look like one or two of them; None: 16 bits."""
    for order in ("<", ">"):
        halves = words.view(f"{order}u2").reshape(-1, 4)[:, :: 1 if order == "<" else -1]  # from the lowest
        if halves[:, 1].max() <= _MOST_UPPER and not halves[:, 2:].any():
            return _little("i8", order)
        pairs = words.view(f"{order}u2").reshape(-1, 2)[:, :: 1 if order == "<" else -1]
        lower, upper = pairs[pairs.any(1)].T
        if upper.max() > _MOST_UPPER or np.mean(lower > upper.max()) <= 0.5:
            continue
        if lower.max() <= 3 and len(lower) < _SURE_WORDS:
            continue  # a tiny vocabulary: too few words to tell
        largest = int(words.view(f"{order}u4").max())
        if vocab_size and largest >= vocab_size > pairs.max():
            continue  # every second of the 16-bit tokens is small
        return _little("u4", order)
    return None


def _little(dtype: str, order: str) -> np.dtype:
    if order == ">":
        raise ValueError(f"holds big-endian {np.dtype(dtype).name}; write it in little-endian order (array.astype('<{dtype}'))")
    return np.dtype(f"<{dtype}")


def _pairs(words: np.ndarray) -> np.dtype:
    """uint16, unless the words (n,) uint64, none of them 0, are text or big-endian."""
    data = words.view("u1")
    if _TEXT[data].all():
        raise ValueError("is text; turn it into tokens with tools/tokenize_corpus.py")
    low, high = (_entropy(data[place::2]) for place in (0, 1))
    if len(data) >= 2 * _LEAST_TOKENS and high > low + 1:  # the upper byte of an id is the more predictable one
        raise ValueError("holds big-endian uint16; write it in little-endian order (array.astype('<u2'))")
    return np.dtype("<u2")


def _entropy(data: np.ndarray) -> float:
    """Bits per byte."""
    shares = np.bincount(data, minlength=256) / len(data)
    return float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())
