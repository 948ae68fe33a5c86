"""The lines of a log: opens a file or standard input, decompresses, decodes and splits it, in one pass and bounded memory.

Knows bytes and encodings, not what the lines mean (log_formats.py).
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import lzma
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pretrain import UserError

_CHUNK_BYTES = 1 << 20
LONGEST_LINE = 1 << 24
"""Characters. Longer lines are cut at a bracket or blank: bars without line breaks, or a JSON document in one line."""
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|[()][A-B0-2])")
_CHINESE_CHARACTER = re.compile("[\u4e00-\u9fff：，]")
_CHINESE = """损失值 loss 损失 loss 训练 train_ 验证 val_ 测试 val_ 学习率 lr 困惑度 perplexity 梯度范数 grad_norm
总步数 total_steps 步数 step 步骤 step 迭代 step 轮次 epoch 轮数 epoch 当前 current_ 平均 mean_ ： : ， ,"""
_WORDS = tuple(zip(_CHINESE.split()[::2], _CHINESE.split()[1::2], strict=True))

Show = Callable[[int], None]
"""Called with the bytes of the file that were read so far."""


class LogError(UserError):
    """A log that cannot be read."""


def read_lines(path: Path, show: Show | None = None) -> Iterator[str]:
    """The lines of a file or of standard input (`-`) that are not blank, with escape sequences removed and Chinese words that
    name figures translated. Reads gzip, bzip2, xz and zstd. Raises LogError, OSError."""
    if str(path) == "-":
        yield from _lines(path, sys.stdin.buffer, show)
        return
    with path.open("rb") as file:
        yield from _lines(path, file, show)


def _lines(path: Path, file: BinaryIO, show: Show | None) -> Iterator[str]:
    chunks = _chunks(path, file, show)
    first = next(chunks, b"")
    decoder = codecs.getincrementaldecoder(_encoding(path, first))(errors="replace")
    rest, waiting = [decoder.decode(first)], len(first)
    for chunk in chunks:
        text = decoder.decode(chunk)
        rest.append(text)
        waiting += len(text)
        if "\n" in text or "\r" in text or waiting > LONGEST_LINE:
            *lines, last = "".join(rest).replace("\r", "\n").split("\n")
            if len(last) > LONGEST_LINE:
                cut = last.rfind("]") + 1 or last.rfind(" ") + 1 or len(last)
                lines, last = [*lines, last[:cut]], last[cut:]
            yield from _clean(lines)
            rest, waiting = [last], len(last)
    yield from _clean(("".join(rest) + decoder.decode(b"", final=True)).replace("\r", "\n").split("\n"))


def _clean(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if not line or line.isspace():
            continue
        if "\x1b" in line:
            line = _ESCAPES.sub("", line)
        yield line if line.isascii() or not _CHINESE_CHARACTER.search(line) else _in_english(line)


def _in_english(line: str) -> str:
    """Translates the Chinese words that name figures into words that names.py knows."""
    line = re.sub(r"第\s*(\d+)\s*轮", r" epoch \1 ", line)
    line = re.sub(r"第\s*(\d+)\s*步|(?<![\w.])(\d+)\s*步(?!数|骤)", r" step \1\2 ", line)
    for word, english in _WORDS:
        line = line.replace(word, english)
    return line


# ---------------------------------------------------------------- bytes


def _chunks(path: Path, file: BinaryIO, show: Show | None) -> Iterator[bytes]:
    """The decompressed bytes. A compressed file that is cut off ends where it does, as a torn text does."""
    plain, read_any = _decompressed(path, file), False
    while True:
        try:
            chunk = plain.read1(_CHUNK_BYTES)  # all that there is before an error
        except Exception as error:  # every library has its own
            if plain is file:
                raise
            if not read_any:
                raise LogError(f"{path}: cannot be decompressed ({error}); unpack it first") from None
            return
        if not chunk:
            return
        read_any = True
        if show is not None and str(path) != "-":
            show(file.tell())
        yield chunk


def _decompressed(path: Path, file: BinaryIO) -> BinaryIO:
    head = file.peek(8)[:8]
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(file)
    if head.startswith(b"BZh"):
        return bz2.open(file)
    if head.startswith(b"\xfd7zXZ\0"):
        return lzma.open(file)
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return _zstd(path, file)
    if head.startswith(b"PK\x03\x04"):
        raise LogError(f"{path}: is a ZIP archive or an Excel workbook; unpack it, or save the sheet as CSV")
    return file


def _zstd(path: Path, file: BinaryIO) -> BinaryIO:
    for module in ("compression.zstd", "zstandard"):  # the first is in Python 3.14 and later
        try:
            return importlib.import_module(module).open(file)
        except ImportError:
            continue
    raise LogError(f"{path}: is compressed with zstd; unpack it with unzstd, or pip install zstandard")


def _encoding(path: Path, head: bytes) -> str:
    """UTF-8, UTF-16 (even without a byte-order mark) or GB 18030, by the beginning. Raises LogError if it is not text."""
    if head[257:262] == b"ustar":
        raise LogError(f"{path}: is a tar archive; unpack it first")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    if b"\0" in head[:4096]:
        for half, encoding in ((head[1:4096:2], "utf-16-le"), (head[0:4096:2], "utf-16-be")):
            if half.count(0) > 0.8 * len(half):
                return encoding
        raise LogError(f"{path}: is a binary file; give text, JSON lines, CSV, or a TensorBoard file (events.out.tfevents...)")
    unknown = head.decode("utf-8", errors="replace").count("\ufffd")
    chinese = head.decode("gb18030", errors="replace").count("\ufffd") if unknown > 3 else unknown  # up to 3: a torn character
    return "gb18030" if chinese < unknown else "utf-8-sig"
