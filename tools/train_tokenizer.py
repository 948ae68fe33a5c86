"""Train a tokenizer on raw text and write its folder."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.data import corpus as corpora
from pretrain.data.corpus import Corpus
from pretrain.data.indexed import DataError
from pretrain.data.order import splitmix64
from pretrain.data.tokenizer import chunks, train
from pretrain.report.progress import Progress


def main() -> int:
    """Returns the exit status: 0, or 2 when the text or the arguments cannot be used."""
    parser = argparse.ArgumentParser(
        description="Train a byte-pair encoding on raw text. Every text survives it exactly; transformers loads it too.",
        epilog="example: python tools/train_tokenizer.py --input stdlib --output data/tokenizer --vocab-size 4096",
    )
    corpora.add_arguments(parser)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder of the tokenizer")
    parser.add_argument("--vocab-size", required=True, type=int, metavar="N", help="number of ids, special ids included")
    parser.add_argument(
        "--model-type", choices=("bpe",), default="bpe", help="bpe: byte-pair encoding with byte fallback (bpe)"
    )
    parser.add_argument(
        "--max-megabytes",
        type=float,
        default=100,
        metavar="MB",
        help="train on at most this much of the text, spread evenly (100)",
    )
    arguments = parser.parse_args()
    try:
        if not 0 < arguments.max_megabytes < math.inf:
            raise DataError(f"--max-megabytes {arguments.max_megabytes}: must be more than 0 and finite")
        if arguments.vocab_size < 1:
            raise DataError(f"--vocab-size {arguments.vocab_size}: must be at least 1")
        corpus = corpora.from_arguments(arguments)
        texts = sample(corpus, int(arguments.max_megabytes * 1e6))
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        tokenizer = train(
            texts, arguments.output, vocab_size=arguments.vocab_size, describe=corpus.description, num_threads=threads
        )
    except (DataError, OSError) as error:
        unnamed = isinstance(error, OSError) and error.filename is None  # a write: the disk is full
        print(f"error: {arguments.output}: {error.strerror}" if unnamed else f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(f"{arguments.output}: {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint}")
    print(f"trained on {corpus.utf8_bytes / 1e6:.2f} MB of text in {corpus.num_documents:,} documents, sha256 {corpus.sha256}")
    for problem in corpus.problems():
        print(f"note: {problem}", file=sys.stderr)
    return 0


def sample(corpus: Corpus, limit: int) -> Iterator[str]:
    """About `limit` bytes of the corpus in pieces of a few kB, spread evenly over it where its size is known beforehand."""
    share = min(1.0, limit / corpus.total_bytes) if corpus.total_bytes else 1.0
    threshold, number, used = int(share * 2**64), 0, 0
    with Progress("reading", corpus.total_bytes) as progress:
        for _, text in corpus.documents():
            for chunk in chunks(text):
                number += 1
                if splitmix64(number) < threshold and used < limit:
                    used += len(chunk.encode())
                    yield chunk
            progress.update(corpus.read_bytes if corpus.total_bytes else corpus.utf8_bytes)
            if used >= limit and share == 1.0:
                break
    print(f"training on {used / 1e6:.2f} MB (some seconds for every 10 MB)", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
