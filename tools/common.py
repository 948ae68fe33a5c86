"""Flags and helpers that the tools for text share. Not a program."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator

from pretrain.data.compressions import COMPRESSIONS
from pretrain.data.corpus import FORMAT_NAMES, FORMATS, STDIN, STDLIB, Corpus
from pretrain.data.indexed import DataError
from pretrain.data.near_duplicates import PERMUTATIONS, SIMILARITY, WORDS, NearDuplicates


def add_corpus(parser: argparse.ArgumentParser) -> None:
    """The flags that choose raw text; `open_corpus` opens it."""
    group = parser.add_argument_group("text")
    files = f"{', '.join(FORMATS)} files ({', '.join(COMPRESSIONS)} too), folders of them (of which .json, .csv, .tsv and .zip "
    files += f"files are read only if they are named), URLs (s3://bucket/folder), {STDIN} (standard input) or {STDLIB}"
    group.add_argument("--input", nargs="+", metavar="FILE", help=files)
    group.add_argument("--format", "--stdin-format", choices=FORMAT_NAMES, help="format of all of --input, whatever the names "
                       f"(default: as the names tell; of {STDIN}, txt)")  # fmt: skip
    group.add_argument("--hf", metavar="NAME", help="instead of --input: a data set of the Hugging Face hub, streamed")
    group.add_argument("--hf-config", metavar="CONFIG", help="with --hf: its configuration (default: the data set's default)")
    group.add_argument("--hf-split", "--split", metavar="SPLIT", default="train", help="with --hf: its split (%(default)s)")
    group.add_argument("--text-key", metavar="KEY",
                       help="key or column that contains the text, a.b if it is nested (default: text)")  # fmt: skip
    group.add_argument("--template", metavar="TEXT", help="instead of --text-key: text made of several keys or columns, as in "
                       r"'{title}\n\n{text}'; {key?} may be missing or null, {{ and }} are braces")  # fmt: skip
    group.add_argument("--text-split", metavar="HOW", default="file", help="where documents of a .txt end: file, line, "
                       "blank-line, or a separator such as '<|endoftext|>' (%(default)s)")  # fmt: skip
    group.add_argument("--on-bad-line", choices=("error", "skip"), default="error", help="unusable lines: stop, or skip and "
                       "count them (%(default)s)")  # fmt: skip
    group.add_argument("--near-duplicates", choices=("keep", "drop"), default="keep", help="documents that resemble an earlier "
                       "one: keep, or leave out and count them, which needs the package datasketch (%(default)s)")  # fmt: skip
    group.add_argument("--duplicate-similarity", type=float, default=SIMILARITY, metavar="F", help="with --near-duplicates "
                       "drop: fraction of the runs of words that two documents share (%(default)s)")  # fmt: skip
    group.add_argument("--duplicate-words", type=int, default=WORDS, metavar="N", help="with --near-duplicates drop: words per "
                       "run (%(default)s)")  # fmt: skip
    group.add_argument("--duplicate-permutations", type=int, default=PERMUTATIONS, metavar="N", help="with "
                       "--near-duplicates drop: numbers per document; more estimate the similarity better "
                       "(%(default)s)")  # fmt: skip


def open_corpus(options: argparse.Namespace) -> Corpus:
    """The corpus that the flags of `add_corpus` choose. Raises DataError."""
    if bool(options.input) == bool(options.hf):
        raise DataError("give either --input FILES or --hf NAME")
    if options.template is not None and options.text_key is not None:
        raise DataError("give either --text-key or --template")
    near_duplicates = None
    if options.near_duplicates == "drop":
        near_duplicates = NearDuplicates(options.duplicate_similarity, options.duplicate_words, options.duplicate_permutations)
    common = dict(
        text_key=options.text_key or "text",
        template=options.template,
        split=options.text_split,
        on_bad_line=options.on_bad_line,
        near_duplicates=near_duplicates,
        shard=getattr(options, "shard", None),
    )
    if options.hf:
        if options.format:
            raise DataError("--format is for --input; the `datasets` library knows the formats of --hf")
        return Corpus.from_hub(options.hf, options.hf_config, options.hf_split, **common)
    return Corpus(options.input, format=options.format, **common)


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
