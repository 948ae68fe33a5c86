"""Trains a tokenizer, a byte-pair encoding with byte fallback, on raw text.

    python tools/train_tokenizer.py --input stdlib --output data/tokenizer --vocab-size 4096

Every text survives encoding and decoding exactly, and transformers loads the same tokenizer from the same folder.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.data.corpus import Corpus
from pretrain.data.order import splitmix64
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
                        help="train on at most this much text, sampled evenly (%(default)s)")  # fmt: skip
    options = parser.parse_args(argv)
    corpus = common.open_corpus(options)
    with common.writing(options.output):
        tokenizer = train(
            sample(corpus, int(options.max_megabytes * 1e6)),
            options.output,
            vocab_size=options.vocab_size,
            describe=corpus.description,
            num_threads=common.usable_cores(),
        )
    print(f"{options.output}: {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint}")
    print(f"trained on {corpus.utf8_bytes / 1e6:.2f} MB of text in {corpus.num_documents:,} documents, sha256 {corpus.sha256}")
    for problem in corpus.problems():
        print(f"note: {problem}", file=sys.stderr)


def megabytes(text: str) -> float:
    """The type of --max-megabytes."""
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, must be more than 0 and finite")
    return number


def sample(corpus: Corpus, limit: int) -> Iterator[str]:
    """About `limit` bytes of the corpus in pieces of a few kB: spread evenly if its size is known, else from its start."""
    fraction = min(1.0, limit / corpus.total_bytes) if corpus.total_bytes else 1.0
    threshold, number, used = int(fraction * 2**64), 0, 0
    with Progress("reading", corpus.total_bytes) as progress:
        for _, text in corpus.documents():
            for chunk in chunks(text):
                number += 1
                if splitmix64(number) < threshold and used < limit:
                    used += len(chunk.encode())
                    yield chunk
            progress.update(corpus.read_bytes if corpus.total_bytes else corpus.utf8_bytes)
            if used >= limit and fraction == 1.0:
                break
    print(f"training on {used / 1e6:.2f} MB (some seconds per 10 MB)", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
