"""Trains a tokenizer, a byte-pair encoding with byte fallback, on raw text.

    python tools/train_tokenizer.py --input stdlib --output data/tokenizer --vocab-size 4096

Every text survives encoding and decoding exactly, and transformers loads the same tokenizer from the same folder.
"""

from __future__ import annotations

import argparse
import heapq
import math
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.data.corpus import Corpus
from pretrain.data.permutation import splitmix64
from pretrain.data.tokenizer_training import chunks, train
from pretrain.report.progress import Progress
from pretrain.run import command_line
from tools import common


def main(argv: list[str]) -> None:
    """Raises UserError, OSError."""
    parser = command_line.make_parser(__doc__)
    common.add_corpus(parser)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder for the tokenizer")
    parser.add_argument("--vocab-size", required=True, type=command_line.at_least(1), metavar="N",
                        help="number of ids, special ids included")  # fmt: skip
    parser.add_argument("--model-type", choices=("bpe",), default="bpe", help="the only one (%(default)s)")
    parser.add_argument("--max-megabytes", type=megabytes, default=100, metavar="MB",
                        help="train on at most this much text, sampled evenly from all of it; with --hf, the first "
                        "(%(default)s)")  # fmt: skip
    options = parser.parse_args(argv)
    corpus = common.open_corpus(options)
    used = Used()
    with common.writing(options.output):
        tokenizer = train(
            sample(corpus, int(options.max_megabytes * 1e6), used),
            options.output,
            vocab_size=options.vocab_size,
            describe=lambda: corpus.description() | ({"used_utf8_bytes": used.utf8_bytes} if used.sampled else {}),
            num_threads=common.usable_cores(),
        )
    print(f"{options.output}: {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint}")
    read = f"{corpus.utf8_bytes / 1e6:.2f} MB of text in {corpus.num_documents:,} documents, sha256 {corpus.sha256}"
    print(f"trained on {f'{used.utf8_bytes / 1e6:.2f} MB, sampled evenly from ' if used.sampled else ''}{read}")
    for problem in corpus.problems():
        print(f"note: {problem}", file=sys.stderr)


def megabytes(text: str) -> float:
    """The type of --max-megabytes."""
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, must be more than 0 and finite")
    return number


class Used:
    """What `sample` has chosen."""

    utf8_bytes = 0
    sampled = False
    """True: only a part of the text that was read."""


def sample(corpus: Corpus, limit: int, used: Used) -> Iterator[str]:
    """At most about `limit` bytes of the corpus in pieces of a few kB, spread evenly over its text, in its order.

    Pieces are ranked by a hash of their number, and those of the lowest rank are kept: how much text a compressed file or a
    stream holds is not known before its end. Of a stream from the hub, which can be terabytes, only the start is read.
    """
    held: list[tuple[int, int, str]] = []  # a heap with the highest rank first
    number = 0
    with Progress("reading", corpus.total_bytes) as progress:
        for _, text in corpus.documents():
            for chunk in chunks(text):
                number += 1
                rank = -splitmix64(number)
                if used.sampled and rank < held[0][0]:
                    continue
                heapq.heappush(held, (rank, number, chunk))
                used.utf8_bytes += len(chunk.encode())
                while used.utf8_bytes > limit and len(held) > 1:
                    used.utf8_bytes -= len(heapq.heappop(held)[2].encode())
                    used.sampled = True
            progress.update(corpus.read_bytes if corpus.total_bytes else corpus.utf8_bytes)
            if corpus.is_from_hub and corpus.utf8_bytes >= limit:
                print(f"note: only the first {corpus.utf8_bytes / 1e6:.2f} MB of the stream were read", file=sys.stderr)
                break
    part = f" of {corpus.utf8_bytes / 1e6:.2f} MB" if used.sampled else ""
    print(f"training on {used.utf8_bytes / 1e6:.2f} MB{part} (some seconds per 10 MB)", file=sys.stderr, flush=True)
    yield from (chunk for _, _, chunk in sorted(held, key=lambda each: each[1]))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
