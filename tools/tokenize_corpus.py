"""Turns raw text into token files for training: PREFIX.bin and .idx (Megatron's format) and the metadata sidecar PREFIX.json.

    python tools/tokenize_corpus.py --input stdlib --tokenizer data/tokenizer --output data/stdlib --valid-fraction 0.02

Two passes. The first reads documents in order and encodes them on all cores into an unnamed staging file. The second copies
them, shuffled by a keyed permutation, into the training and the validation file. The result depends on the text, the tokenizer
and the seed only, not on the number of workers, and memory does not grow with the corpus.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import xxhash

from pretrain.data.corpus import Corpus
from pretrain.data.indexed import DataError, Sidecar, TokenWriter, read_ranges, token_dtype
from pretrain.data.order import Permutation
from pretrain.data.tokenizer import Tokenizer
from pretrain.report.progress import Progress
from pretrain.run import command_line
from tools import common

_CHUNK_CHARACTERS = 1 << 18
_BLOCK_DOCUMENTS = 256


def main(argv: list[str]) -> None:
    """Raises UserError, OSError."""
    parser = command_line.make_parser(__doc__)
    common.add_corpus(parser)
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER",
                        help="tokenizer of tools/train_tokenizer.py or of Hugging Face")  # fmt: skip
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx and PREFIX.json")
    parser.add_argument("--valid-fraction", type=fraction, default=0.0, metavar="F",
                        help="fraction of the documents that go to PREFIX_valid, the others go to PREFIX_train; 0: all go to "
                        "PREFIX (%(default)s). Duplicates go to the same side")  # fmt: skip
    parser.add_argument("--workers", type=command_line.at_least(1), default=common.usable_cores(), metavar="N",
                        help="processes that encode (default: one per core, %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1234, metavar="S", help="seed of the shuffle and the split (%(default)s)")
    parser.add_argument("--no-shuffle", action="store_true", help="keep the documents in the order of the input")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    options = parser.parse_args(argv)
    if not os.path.basename(options.output) or options.output.endswith((".bin", ".idx", ".json")):
        parser.error(
            f"--output: got {options.output!r}, must be a prefix to which .bin, .idx and .json are added, as data/text"
        )
    with common.writing(options.output):
        sidecars, corpus = tokenize(options)
    for problem in corpus.problems():
        print(f"note: {problem}", file=sys.stderr)
    print("\n".join(summary(sidecars, corpus)))


def fraction(text: str) -> float:
    """The type of --valid-fraction."""
    if not 0 <= (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, must be at least 0 and less than 1")
    return number


def tokenize(options: argparse.Namespace) -> tuple[dict[str, Sidecar], Corpus]:
    """Both passes. Returns the sidecars of the files written, by prefix."""
    tokenizer = Tokenizer.load(options.tokenizer)
    corpus = common.open_corpus(options)
    split = {"_valid": True, "_train": False} if options.valid_fraction else {"": False}  # training data are complete last
    with ExitStack() as stack:
        writers = {
            options.output + suffix: TokenWriter(
                options.output + suffix,
                vocab_size=tokenizer.vocab_size,
                end_of_document_id=tokenizer.end_of_document_id,
                tokenizer_fingerprint=tokenizer.fingerprint,
                tokenizer_path=options.tokenizer,
                shuffled=not options.no_shuffle,
                overwrite=options.overwrite,
            )
            for suffix in split
        }
        for writer in writers.values():
            stack.enter_context(writer)
        staging = stack.enter_context(Staging(Path(options.output).parent, token_dtype(tokenizer.vocab_size)))
        encode_all(corpus, options, staging)
        distribute(staging, dict(zip(split.values(), writers.values(), strict=True)), options)
        for prefix, writer in writers.items():
            if writer.num_documents == 0:
                advice = "use another --valid-fraction or --seed; duplicates stay together"
                if staging.num_documents == 1:
                    advice = "a document is never split; say where documents end (--text-split), or use other text to validate"
                raise DataError(f"{prefix}: gets none of the {staging.num_documents:,} documents; {advice}")
        return {prefix: writer.finish(corpus.description()) for prefix, writer in writers.items()}, corpus


class Staging:
    """Encoded documents in the order of the input, in two unnamed files that disappear with the process."""

    def __init__(self, folder: Path, dtype: np.dtype):
        folder.mkdir(parents=True, exist_ok=True)
        self.dtype = dtype
        self._tokens, self._ends = tempfile.TemporaryFile(dir=folder), tempfile.TemporaryFile(dir=folder)
        self.num_documents = self.num_tokens = 0

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_) -> None:
        self._tokens.close()
        self._ends.close()

    def add(self, tokens: np.ndarray, lengths: np.ndarray, utf8_bytes: np.ndarray) -> None:
        """Appends documents: tokens back to back, lengths in tokens (n,), lengths in bytes of text (n,)."""
        ends = self.num_tokens + np.cumsum(lengths)
        self._tokens.write(tokens.astype(self.dtype).tobytes())
        self._ends.write(np.stack([ends, lengths, utf8_bytes], axis=1).astype(np.int64).tobytes())
        self.num_documents += len(lengths)
        self.num_tokens += len(tokens)

    def flush(self) -> None:
        """Must be called between the last `add` and the first `read`."""
        self._tokens.flush()
        self._ends.flush()

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens back to back, lengths in tokens (n,), bytes of text (n,)) of the documents `numbers`."""
        rows = read_ranges(self._ends, numbers * 24, np.full(len(numbers), 24)).view(np.int64).reshape(-1, 3)
        ends, lengths, utf8_bytes = rows.T
        width = self.dtype.itemsize
        tokens = read_ranges(self._tokens, (ends - lengths) * width, lengths * width).view(self.dtype)
        return tokens, lengths, utf8_bytes


def encode_all(corpus: Corpus, options: argparse.Namespace, staging: Staging) -> None:
    """First pass: encodes the corpus into `staging`."""
    checked = unequal = 0
    with Progress("encoding", corpus.total_bytes) as progress:
        for tokens, lengths, utf8_bytes, equal in encoded(corpus, options.tokenizer, options.workers):
            staging.add(tokens, lengths, utf8_bytes)
            checked, unequal = checked + 1, unequal + (not equal)
            progress.update(corpus.read_bytes if corpus.total_bytes else corpus.utf8_bytes, staging.num_tokens)
    staging.flush()
    if staging.num_documents == 0:
        raise DataError(f"{', '.join(corpus.inputs)}: no documents with text")
    if unequal:
        print(
            f"note: {unequal:,} of {checked:,} sampled documents decode to another text: this tokenizer is lossy, bits per byte"
            " are not exact",
            file=sys.stderr,
        )


def encoded(corpus: Corpus, folder: str, workers: int) -> Iterator[tuple]:
    """Results of `encode_chunk` for all chunks of the corpus, in order, with a bounded number of chunks in flight."""
    if workers == 1:
        yield from (encode_chunk(folder, texts) for texts in chunked(corpus))
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker) as pool:
        pending = deque()
        try:
            for texts in chunked(corpus):
                pending.append(pool.submit(encode_chunk, folder, texts))
                if len(pending) > 3 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise DataError("a worker process was killed (out of memory?); try fewer --workers") from None


def _start_worker() -> None:
    """Leaves interrupts to the parent, and exits with it: the pool's queues would keep an orphan waiting forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def chunked(corpus: Corpus) -> Iterator[list[str]]:
    """Lists of texts of about 256k characters: large enough to hide the transfer, small enough to balance the workers."""
    texts, characters = [], 0
    for _, text in corpus.documents():
        texts.append(text)
        characters += len(text)
        if characters >= _CHUNK_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


def encode_chunk(folder: str, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """(tokens back to back with end-of-document ids, lengths, bytes of text, True if the first text decodes to itself)."""
    tokenizer = _tokenizer(folder)
    ids = tokenizer.encode_batch(texts)
    equal = tokenizer.decode(ids[0]) == texts[0]
    for document in ids:
        document.append(tokenizer.end_of_document_id)
    lengths = np.array([len(document) for document in ids])
    tokens = np.concatenate([np.array(document, dtype=token_dtype(tokenizer.vocab_size)) for document in ids])
    return tokens, lengths, np.array([len(text.encode()) for text in texts]), equal


_tokenizer = lru_cache(maxsize=1)(Tokenizer.load)


def distribute(staging: Staging, writers: dict[bool, TokenWriter], options: argparse.Namespace) -> None:
    """Second pass: copies the documents, shuffled, to the writers for training (False) and validation (True)."""
    order, threshold = Permutation(staging.num_documents, (options.seed,)), int(options.valid_fraction * 2**64)
    with Progress("writing", staging.num_tokens * staging.dtype.itemsize) as progress:
        written = 0
        for start in range(0, staging.num_documents, _BLOCK_DOCUMENTS):
            numbers = np.arange(start, min(start + _BLOCK_DOCUMENTS, staging.num_documents))
            tokens, lengths, utf8_bytes = staging.read(numbers if options.no_shuffle else order(numbers))
            documents = np.split(tokens, np.cumsum(lengths)[:-1])
            # By content: duplicates go to the same side, and validation text never moves to the training data.
            valid = np.array([xxhash.xxh3_64_intdigest(document, options.seed) < threshold for document in documents])
            for part, writer in writers.items():
                chosen = np.flatnonzero(valid == part)
                if chosen.size:
                    writer.add(np.concatenate([documents[i] for i in chosen]), lengths[chosen], int(utf8_bytes[chosen].sum()))
            written += tokens.nbytes
            progress.update(written, written // staging.dtype.itemsize)


def summary(sidecars: dict[str, Sidecar], corpus: Corpus) -> list[str]:
    """Lines that describe the result."""
    lines = [f"read {corpus.num_documents:,} documents, {corpus.utf8_bytes / 1e6:.2f} MB of text, sha256 {corpus.sha256}"]
    for prefix, sidecar in sorted(sidecars.items()):
        lines.append(
            f"{prefix}: {sidecar.num_tokens:,} tokens in {sidecar.num_documents:,} documents,"
            f" {sidecar.utf8_bytes / sidecar.num_tokens:.2f} bytes of text per token"
        )
    sidecar = max(sidecars.values(), key=lambda sidecar: sidecar.num_tokens)
    lines += [
        "losses to compare with, in nats per token:",
        f"  {math.log(sidecar.vocab_size):6.3f}  guessing: ln {sidecar.vocab_size}, where an untrained model starts",
        f"  {sidecar.unigram_entropy_nats:6.3f}  unigram: knows only how frequent each token is",
        f"  {sidecar.bigram_entropy_nats:6.3f}  bigram: also knows the previous token; a model that has learned is below",
    ]
    return lines


if __name__ == "__main__":
    sys.exit(command_line.run(main))
