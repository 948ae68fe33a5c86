"""Turns raw text into token files for training: PREFIX.bin and .idx (Megatron's format) and the metadata sidecar PREFIX.json.

    python tools/tokenize_corpus.py --input stdlib --tokenizer data/tokenizer --output data/stdlib --valid-fraction 0.02

Two passes. The first reads documents in order and encodes them on all cores into an unnamed staging file. The second copies
them, shuffled by a keyed permutation, into the training and the validation file. The result depends on the text, the tokenizer
and the seed only, not on the number of workers, and memory does not grow with the corpus. Text that the tokenizer cannot
represent is counted over everything: it is reported, and above --max-unknown-fraction an error.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import xxhash

from pretrain.data.corpus import Corpus
from pretrain.data.indexed import DataError, Sidecar, TokenWriter, read_ranges, token_dtype
from pretrain.data.permutation import Permutation, splitmix64
from pretrain.data.tokenizer import Tokenizer
from pretrain.report.progress import Progress
from pretrain.run import command_line
from tools import common

_CHUNK_CHARACTERS, _CHARACTERS_IN_FLIGHT = 1 << 18, 1 << 26
_LONG_TEXT = 1 << 20  # is encoded in parts
_COMPARED_ONE_IN = 64
_NOTED_FRACTION, _EARLY_CHARACTERS, _PIECES_KEPT = 0.001, 1 << 22, 100_000
_BLOCK_DOCUMENTS, _BLOCK_TOKENS = 256, 1 << 22


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
    parser.add_argument("--max-unknown-fraction", type=unknown_fraction, default=0.01, metavar="F",
                        help="stop if the tokenizer has no ids for more than this fraction of the text, by characters or by "
                        "tokens; 1: never (%(default)s)")  # fmt: skip
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


def unknown_fraction(text: str) -> float:
    """The type of --max-unknown-fraction."""
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"got {text}, must be from 0 to 1")
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
        description = encode_all(corpus, options, staging).description()
        distribute(staging, dict(zip(split.values(), writers.values(), strict=True)), options)
        for prefix, writer in writers.items():
            if writer.num_documents == 0:
                advice = "use another --valid-fraction or --seed; duplicates stay together"
                if staging.num_documents == 1:
                    advice = "a document is never split; say where documents end (--text-split), or use other text to validate"
                raise DataError(f"{prefix}: gets none of the {staging.num_documents:,} documents; {advice}")
        return {prefix: writer.finish(corpus.description() | description) for prefix, writer in writers.items()}, corpus


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

    def read(self, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(tokens back to back, lengths in tokens (n,), bytes of text (n,)) of the documents `numbers`, in order.

        Several documents at a time, of together about 4 million tokens, or one that is longer.
        """
        rows = read_ranges(self._ends, numbers * 24, np.full(len(numbers), 24)).view(np.int64).reshape(-1, 3)
        width = self.dtype.itemsize
        groups = (np.cumsum(rows[:, 1]) - 1) // _BLOCK_TOKENS
        for group in np.unique(groups):
            ends, lengths, utf8_bytes = rows[groups == group].T
            tokens = read_ranges(self._tokens, (ends - lengths) * width, lengths * width).view(self.dtype)
            yield tokens, lengths, utf8_bytes


def encode_all(corpus: Corpus, options: argparse.Namespace, staging: Staging) -> Losses:
    """First pass: encodes the corpus into `staging`. Raises DataError if too much of the text has no ids."""
    losses = Losses(options.tokenizer, options.max_unknown_fraction, corpus.most_characters)
    with Progress("encoding", corpus.total_bytes) as progress:
        for names, chunk in encoded(corpus, options.tokenizer, options.workers):
            staging.add(chunk.tokens, chunk.lengths, chunk.utf8_bytes)
            losses.add(names, chunk)
            progress.update(corpus.read_bytes if corpus.total_bytes else corpus.utf8_bytes, staging.num_tokens)
    staging.flush()
    if staging.num_documents == 0:
        raise DataError(
            f"{', '.join(corpus.inputs)}: no documents with text{''.join(f'; {each}' for each in corpus.problems())}"
        )
    losses.end()
    return losses


class Encoded(NamedTuple):
    """A chunk of documents, encoded."""

    tokens: np.ndarray
    """Of all documents, back to back, each ended by the end-of-document id."""
    lengths: np.ndarray
    """Tokens of each document."""
    utf8_bytes: np.ndarray
    """Bytes of text of each document."""
    characters: np.ndarray
    """Of each document."""
    lost: dict[int, Counter[str]]
    """Characters or words that no id represents, with their counts, by the number of the document in the chunk."""
    unknown_tokens: int
    """Unknown ids in these documents; in other documents they stand for a text such as "<unk>"."""
    compared: int
    """Documents that were decoded and compared with their text."""
    changed: list[tuple[str, str]]
    """(text, what it decodes to) at the first difference, for each document that has one."""


class Losses:
    """Text that the tokenizer does not represent: how much of all documents, which text, and where.

    `limit`: the fraction of the characters or of the tokens that is an error. `most_characters`: an upper bound of the
    characters of the corpus (None: unknown), with which the error is certain before the end.
    """

    def __init__(self, tokenizer: str, limit: float, most_characters: int | None):
        self._tokenizer, self._limit, self._most_characters = tokenizer, limit, most_characters
        self.characters = self._of_characters = self.tokens = self._of_tokens = 0
        self._pieces: Counter[str] = Counter()
        self._files: list[tuple[int, int, str]] = []  # (lost characters, all characters, name) of the worst files
        self._file, self._warned = (0, 0, ""), False
        self._compared, self._changed = 0, []

    def add(self, names: list[str], chunk: Encoded) -> None:
        """Counts a chunk of the documents `names`. Raises DataError as soon as the end cannot be within the limit."""
        for number, (name, characters) in enumerate(zip(names, chunk.characters.tolist(), strict=True)):
            lost = sum(len(piece) * count for piece, count in chunk.lost[number].items()) if number in chunk.lost else 0
            file = re.sub(r":\d+$", "", name)
            if file != self._file[2]:
                self._files, self._file = self._worst_files(), (0, 0, file)
            self._file = (self._file[0] + lost, self._file[1] + characters, file)
            self.characters += lost
        self._of_characters += int(chunk.characters.sum())
        self.tokens, self._of_tokens = self.tokens + chunk.unknown_tokens, self._of_tokens + len(chunk.tokens)
        for pieces in chunk.lost.values():
            self._pieces.update(pieces)
        if len(self._pieces) > _PIECES_KEPT:
            self._pieces = Counter(dict(self._pieces.most_common(_PIECES_KEPT // 2)))
        self._compared, self._changed = self._compared + chunk.compared, self._changed + chunk.changed
        if self._most_characters and self.characters > self._limit * self._most_characters:
            raise self._error()
        if not self._warned and self._of_characters >= _EARLY_CHARACTERS and self.fraction > self._limit:
            self._warned = True
            print(f"note: {self._text()}; if this continues, it is an error at the end", file=sys.stderr, flush=True)

    def _worst_files(self) -> list[tuple[int, int, str]]:
        return sorted([*self._files, self._file], reverse=True)[:3] if self._file[0] else self._files

    @property
    def fraction(self) -> float:
        """The larger of two fractions: of the characters that were lost, of the tokens that are unknown ids."""
        return max(self.characters / max(1, self._of_characters), self.tokens / max(1, self._of_tokens))

    def end(self) -> None:
        """Prints notes. Raises DataError if more was lost than the limit allows."""
        if self.fraction > self._limit:
            raise self._error()
        if self.fraction > _NOTED_FRACTION:
            print(f"note: {self._text()}", file=sys.stderr)
        if self._changed:
            written, decoded = self._changed[0]
            print(
                f"note: {len(self._changed):,} of {self._compared:,} compared documents decode to another text, as {written!r}"
                f" to {decoded!r}: this tokenizer is lossy, bits per byte are not exact",
                file=sys.stderr,
            )

    def description(self) -> dict:
        """For the sidecar; empty if nothing was lost."""
        counts = {"unknown_characters": self.characters, "unknown_tokens": self.tokens, "unknown_fraction": self.fraction}
        return counts if self.characters else {}

    def _error(self) -> DataError:
        return DataError(
            f"{self._text()}. A model would never see this text, and nothing was written. Use a tokenizer with byte fallback, "
            f"as tools/train_tokenizer.py makes, or accept it with --max-unknown-fraction (now {self._limit:g})"
        )

    def _text(self) -> str:
        lost = f"{self.characters:,} of {self._of_characters:,} characters ({self.characters / self._of_characters:.2%})"
        became = (
            f"{self.tokens:,} unknown ids ({self.tokens / self._of_tokens:.2%} of the tokens)" if self.tokens else "nothing"
        )
        often = ", ".join(f"{piece[:20]!r} {count:,} times" for piece, count in self._pieces.most_common(5))
        files = ", ".join(f"{name} ({lost / characters:.2%})" for lost, characters, name in self._worst_files())
        return f"{self._tokenizer}: {lost} have no ids in this tokenizer and became {became}: {often}; most in {files}"


def encoded(corpus: Corpus, folder: str, workers: int) -> Iterator[tuple[list[str], Encoded]]:
    """(names, result of `encode_chunk`) of all chunks of the corpus, in order; a bounded amount of text is in flight."""
    if workers == 1:
        yield from ((names, encode_chunk(folder, names, texts, first)) for names, texts, first in chunked(corpus))
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker) as pool:
        pending, in_flight = deque(), 0
        try:
            for names, texts, first in chunked(corpus):
                characters = sum(map(len, texts))
                try:
                    future = pool.submit(encode_chunk, folder, names, texts, first)
                except (OSError, ValueError) as error:  # its pipes are closed while it notices the loss of a worker
                    raise BrokenProcessPool from error
                pending.append((names, characters, future))
                in_flight += characters
                while len(pending) > 3 * workers or (in_flight > _CHARACTERS_IN_FLIGHT and len(pending) > 1):
                    yield pending[0][0], pending[0][2].result()
                    in_flight -= pending.popleft()[1]
            while pending:
                yield pending[0][0], pending[0][2].result()
                pending.popleft()
        except BrokenProcessPool:
            for process in multiprocessing.active_children():
                process.terminate()  # the pool waits forever for one that it started while it noticed the loss
            names = pending[0][0] if pending else names
            raise DataError(
                f"a worker process was killed, most likely because memory ran out, while it encoded {names[0]} or one of the "
                f"documents after it; use fewer --workers than {workers} (each takes about 0.2 GB, and 10 times the size of a "
                "long document), or divide long documents (--text-split)"
            ) from None


def _start_worker() -> None:
    """Leaves interrupts to the parent, and exits with it: the pool's queues would keep an orphan waiting forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def chunked(corpus: Corpus) -> Iterator[tuple[list[str], list[str], int]]:
    """(names, texts, number of the first document) in chunks of about 256k characters.

    That is large enough to hide the transfer, and small enough to balance the workers.
    """
    names, texts, characters, first = [], [], 0, 0
    for name, text in corpus.documents():
        names.append(name)
        texts.append(text)
        characters += len(text)
        if characters >= _CHUNK_CHARACTERS:
            yield names, texts, first
            names, texts, characters, first = [], [], 0, first + len(texts)
    if texts:
        yield names, texts, first


def encode_chunk(folder: str, names: list[str], texts: list[str], first: int) -> Encoded:
    """Encodes documents, and compares some with their text: one of 64, and one of each chunk at a place that varies.

    `first`: number of the first document in the corpus, from which the choice is made. Raises DataError.
    """
    tokenizer = _tokenizer(folder)
    end, unknown = tokenizer.end_of_document_id, list(tokenizer.unknown_ids)
    compared = {splitmix64(first) % len(texts)}
    compared |= {number for number in range(len(texts)) if splitmix64(first + number) % _COMPARED_ONE_IN == 0}
    lengths, arrays, unknown_tokens = np.zeros(len(texts), dtype=np.int64), [], 0
    lost: dict[int, Counter[str]] = {}
    changed: dict[int, tuple[str, str]] = {}
    for number, part, ids, lost_in_part in _encoded_parts(tokenizer, texts):
        arrays.append(np.array(ids, dtype=token_dtype(tokenizer.vocab_size)))
        lengths[number] += len(ids)
        if lost_in_part:
            lost.setdefault(number, Counter()).update(lost_in_part)
            unknown_tokens += int(np.isin(arrays[-1], unknown).sum())
        if number in compared and number not in changed and (decoded := tokenizer.decode(ids)) != part:
            changed[number] = _first_difference(part, decoded)
    tokens, ends = np.concatenate(arrays), np.cumsum(lengths)
    if (inside := np.flatnonzero(tokens == end)).size:
        name = names[int(np.searchsorted(ends, inside[0], side="right"))]
        raise DataError(f"{name}: {folder} gives unknown text the end-of-document id {end}; use another tokenizer")
    utf8_bytes = np.array([len(text) if text.isascii() else len(text.encode()) for text in texts])
    characters = np.array([len(text) for text in texts])
    tokens = np.insert(tokens, ends, end)
    return Encoded(tokens, lengths + 1, utf8_bytes, characters, lost, unknown_tokens, len(compared), list(changed.values()))


def _encoded_parts(tokenizer: Tokenizer, texts: list[str]) -> Iterator[tuple[int, str, list[int], Counter[str]]]:
    """(number of the text, a part of it, its ids, what they do not represent), all in order; short texts are one part."""
    short = [text for text in texts if len(text) < _LONG_TEXT]
    ids = tokenizer.encode_batch(short)
    lost, done = dict(tokenizer.lost(short, ids)), 0
    for number, text in enumerate(texts):
        if len(text) < _LONG_TEXT:
            yield number, text, ids[done], lost.get(done, Counter())
            done += 1
        else:
            for part, part_ids in tokenizer.encode_parts(text):
                yield number, part, part_ids, dict(tokenizer.lost([part], [part_ids])).get(0, Counter())


def _first_difference(text: str, decoded: str) -> tuple[str, str]:
    """The surroundings of the first character that differs."""
    equal = next((i for i, (a, b) in enumerate(zip(text, decoded, strict=False)) if a != b), min(len(text), len(decoded)))
    start = max(0, equal - 10)
    return text[start : start + 30], decoded[start : start + 30]


_tokenizer = lru_cache(maxsize=1)(Tokenizer.load)


def distribute(staging: Staging, writers: dict[bool, TokenWriter], options: argparse.Namespace) -> None:
    """Second pass: copies the documents, shuffled, to the writers for training (False) and validation (True)."""
    order, threshold = Permutation(staging.num_documents, (options.seed,)), int(options.valid_fraction * 2**64)
    with Progress("writing", staging.num_tokens * staging.dtype.itemsize) as progress:
        written = 0
        for start in range(0, staging.num_documents, _BLOCK_DOCUMENTS):
            numbers = np.arange(start, min(start + _BLOCK_DOCUMENTS, staging.num_documents))
            for tokens, lengths, utf8_bytes in staging.read(numbers if options.no_shuffle else order(numbers)):
                documents = np.split(tokens, np.cumsum(lengths)[:-1])
                # By content: duplicates go to the same side, and validation text never moves to the training data.
                valid = np.array([xxhash.xxh3_64_intdigest(document, options.seed) < threshold for document in documents])
                for part, writer in writers.items():
                    chosen = np.flatnonzero(valid == part)
                    if chosen.size:
                        writer.add(
                            np.concatenate([documents[i] for i in chosen]), lengths[chosen], int(utf8_bytes[chosen].sum())
                        )
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
