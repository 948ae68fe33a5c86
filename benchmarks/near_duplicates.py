"""Measures how `--near-duplicates drop` of the tools for text finds near-duplicates: speed, memory, and what it finds.

    python benchmarks/near_duplicates.py [--documents 20000] [--words 200] [--similarity 0.8] [--permutations 128]

Documents are words of the source code of Python's standard library, drawn at random, so that none resembles another. Speed is
text per CPU second of one process; memory is the growth of the resident set per document kept. Then the last words of documents
are replaced, such that their Jaccard index with the original has a wanted value: the table shows which fraction is left out.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil

from benchmarks import machine
from pretrain.data.corpus import STDLIB, Corpus
from pretrain.data.near_duplicates import PERMUTATIONS, SIMILARITY, WORDS, NearDuplicates
from pretrain.run import command_line

_PAIRS = 500


def replaced(words: list[str], jaccard: float, number: int) -> list[str]:
    """The words with so many new ones at the end that the Jaccard index of the shingles is `jaccard`, or the next one above."""
    shingles = len(words) - WORDS + 1
    count = int(shingles * (1 - jaccard) / (1 + jaccard))  # shingles that are lost, and as many new ones
    return words[: len(words) - count] + [f"new{number}x{i}" for i in range(count)]


def found(documents: list[list[str]], jaccard: float, options: argparse.Namespace) -> float:
    """The fraction of changed documents that is left out."""
    duplicates = NearDuplicates(options.similarity, permutations=options.permutations)
    for number, words in enumerate(documents):
        duplicates.is_new(str(number), " ".join(words))
        duplicates.is_new(f"{number} changed", " ".join(replaced(words, jaccard, number)))
    return duplicates.num_dropped / len(documents)


def main(argv: list[str]) -> None:
    """Runs the benchmark."""
    parser = command_line.make_parser(__doc__)
    least = command_line.at_least
    parser.add_argument("--documents", type=least(_PAIRS), default=20_000, help="number of documents (%(default)s)")
    parser.add_argument("--words", type=least(50), default=200, help="of each document (%(default)s)")
    parser.add_argument("--similarity", type=float, default=SIMILARITY, help="as --duplicate-similarity (%(default)s)")
    parser.add_argument("--permutations", type=int, default=PERMUTATIONS, help="as --duplicate-permutations (%(default)s)")
    options = parser.parse_args(argv)
    print(machine.describe(machine.facts()))
    vocabulary = sorted({word for _, text in Corpus([STDLIB]).documents() for word in text.split() if word.isalnum()})
    rng = random.Random(0)
    documents = [rng.choices(vocabulary, k=options.words) for _ in range(options.documents)]
    duplicates = NearDuplicates(options.similarity, permutations=options.permutations)
    duplicates.is_new("first", "some text")
    seconds, size, resident = 0.0, 0, psutil.Process().memory_info().rss
    for number, words in enumerate(documents):
        text = " ".join(words)
        began = time.process_time()
        duplicates.is_new(f"file.jsonl:{number}", text)
        seconds, size = seconds + time.process_time() - began, size + len(text)
    grown = (psutil.Process().memory_info().rss - resident) / options.documents
    print(f"{options.documents:,} documents of {size / options.documents:.0f} bytes, {duplicates.num_dropped} left out")
    print(f"{size / 1e6 / seconds:.1f} MB per CPU second, {grown / 1e3:.1f} kB per document kept")
    print(f"{'Jaccard index':>14} {'left out':>9}")
    for jaccard in (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95):
        print(f"{jaccard:14.2f} {found(documents[:_PAIRS], jaccard, options):9.1%}")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
