"""Flags and helpers that the tools for text share. Not a program."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator

from pretrain.data.corpus import COMPRESSIONS, FORMATS, STDIN, STDLIB, Corpus
from pretrain.data.indexed import DataError


def add_corpus(parser: argparse.ArgumentParser) -> None:
    """The flags that choose raw text; `open_corpus` opens it."""
    group = parser.add_argument_group("text")
    files = (
        f"{', '.join(FORMATS)} files ({', '.join(COMPRESSIONS)} too), folders of them (of which .json, .csv and .tsv files are "
    )
    files += f"read only if they are named), {STDIN} (standard input) or {STDLIB}"
    group.add_argument("--input", nargs="+", metavar="FILE", help=files)
    group.add_argument(
        "--stdin-format", choices=("txt", "jsonl"), default="txt", help=f"format of --input {STDIN} (%(default)s)"
    )
    group.add_argument("--hf", metavar="NAME", help="instead of --input: a data set of the Hugging Face hub, streamed")
    group.add_argument("--hf-config", metavar="CONFIG", help="with --hf: its configuration (default: the data set's default)")
    group.add_argument("--hf-split", "--split", metavar="SPLIT", default="train", help="with --hf: its split (%(default)s)")
    group.add_argument("--text-key", metavar="KEY", default="text",
                       help="key or column that contains the text, a.b if it is nested (%(default)s)")  # fmt: skip
    group.add_argument("--text-split", metavar="HOW", default="file", help="where documents of a .txt end: file, line, "
                       "blank-line, or a separator such as '<|endoftext|>' (%(default)s)")  # fmt: skip
    group.add_argument("--on-bad-line", choices=("error", "skip"), default="error", help="unusable lines: stop, or skip and "
                       "count them (%(default)s)")  # fmt: skip


def open_corpus(options: argparse.Namespace) -> Corpus:
    """The corpus that the flags of `add_corpus` choose. Raises DataError."""
    if bool(options.input) == bool(options.hf):
        raise DataError("give either --input FILES or --hf NAME")
    common = dict(text_key=options.text_key, split=options.text_split, on_bad_line=options.on_bad_line)
    if options.hf:
        return Corpus.from_hub(options.hf, options.hf_config, options.hf_split, **common)
    return Corpus(options.input, stdin_format=options.stdin_format, **common)


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def writing(output: str) -> Iterator[None]:
    """Names `output` in an OSError that names no file, as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, output) from None
