"""Documents to tokens, in chunks, on one or more processes. The result does not depend on their number. No torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .corpus import Corpus
from .indexed import DataError, token_dtype
from .permutation import splitmix64
from .tokenizer import Tokenizer

_CHUNK_CHARACTERS, _CHARACTERS_IN_FLIGHT = 1 << 18, 1 << 26
_LONG_TEXT = 1 << 20  # is encoded in parts
_COMPARED_ONE_IN, _COMPARED_TOKENS = 64, 1000


class Chunk(NamedTuple):
    """Consecutive documents of a corpus."""

    names: list[str]
    texts: list[str]
    first: int
    """Number of the first document in the corpus."""
    sha256: str
    """`Corpus.sha256` up to and including these documents."""

    @property
    def end(self) -> int:
        """Number of documents in the corpus up to and including these."""
        return self.first + len(self.texts)


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
    """Documents whose first tokens were decoded and compared with their text."""
    changed: list[tuple[str, str]]
    """(text, what it decodes to) at the first difference, for each document that has one."""


def chunked(corpus: Corpus) -> Iterator[Chunk]:
    """The documents of a corpus in chunks of about 256k characters, whose borders depend on the texts alone.

    That is large enough to hide the transfer, and small enough to balance the workers.
    """
    names, texts, characters, first = [], [], 0, 0
    for name, text in corpus.documents():
        names.append(name)
        texts.append(text)
        characters += len(text)
        if characters >= _CHUNK_CHARACTERS:
            yield Chunk(names, texts, first, corpus.sha256)
            names, texts, characters, first = [], [], 0, first + len(texts)
    if texts:
        yield Chunk(names, texts, first, corpus.sha256)


class Encoder:
    """Encodes chunks with the `tokenizer` in `folder`, on this process (`workers` = 1) or on that many others.

    A context manager. Enter it before the corpus is read: workers are forks of this process, which must not have threads yet.
    """

    def __init__(self, folder: str, workers: int):
        self.tokenizer = _tokenizer(folder)  # before the fork: workers share its memory, and start in milliseconds
        self._folder, self._workers, self._pool = folder, workers, None

    def __enter__(self) -> Encoder:
        if self._workers > 1:
            # Elsewhere a fork may break libraries of the system: each worker starts anew, and loads the tokenizer.
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, initializer=_start_worker)
            self._pool.submit(os.getpid)  # forks all workers at once
        return self

    def __exit__(self, *_) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, Encoded]]:
        """All chunks with their tokens, in order; a bounded amount of text is in flight. Raises DataError."""
        if self._pool is None:
            yield from ((chunk, encode_chunk(self._folder, chunk.names, chunk.texts, chunk.first)) for chunk in chunks)
            return
        pending, in_flight = deque(), 0
        try:
            for chunk in chunks:
                characters = sum(map(len, chunk.texts))
                try:
                    future = self._pool.submit(encode_chunk, self._folder, chunk.names, chunk.texts, chunk.first)
                except (OSError, ValueError) as error:  # its pipes are closed while it notices the loss of a worker
                    raise BrokenProcessPool from error
                pending.append((chunk, characters, future))
                in_flight += characters
                while len(pending) > 3 * self._workers or (in_flight > _CHARACTERS_IN_FLIGHT and len(pending) > 1):
                    yield pending[0][0], pending[0][2].result()
                    in_flight -= pending.popleft()[1]
            while pending:
                yield pending[0][0], pending[0][2].result()
                pending.popleft()
        except BrokenProcessPool:
            for process in multiprocessing.active_children():
                process.terminate()  # the pool waits forever for one that it started while it noticed the loss
            name = (pending[0][0] if pending else chunk).names[0]
            raise DataError(
                f"a worker process was killed, most likely because memory ran out, while it encoded {name} or one of the "
                f"documents after it; use fewer --workers than {self._workers} (each takes about 0.2 GB, and 10 times the size "
                "of a long document), or divide long documents (--text-split)"
            ) from None


def _start_worker() -> None:
    """Leaves interrupts to the parent, and exits with it: the pool's queues would keep an orphan waiting forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def encode_chunk(folder: str, names: list[str], texts: list[str], first: int) -> Encoded:
    """Encodes documents, and compares the start of some with their text: one of 64, and one of each chunk at a place that
    varies.

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
        arrays.append(ids.astype(token_dtype(tokenizer.vocab_size)))
        if number in compared and not lengths[number] and (difference := _difference(tokenizer, part, ids)):
            changed[number] = difference
        lengths[number] += len(ids)
        if lost_in_part:
            lost.setdefault(number, Counter()).update(lost_in_part)
            unknown_tokens += int(np.isin(arrays[-1], unknown).sum())
    tokens, ends = np.concatenate(arrays), np.cumsum(lengths)
    if (inside := np.flatnonzero(tokens == end)).size:
        name = names[int(np.searchsorted(ends, inside[0], side="right"))]
        raise DataError(f"{name}: {folder} gives unknown text the end-of-document id {end}; use another tokenizer")
    utf8_bytes = np.array([len(text) if text.isascii() else len(text.encode()) for text in texts])
    characters = np.array([len(text) for text in texts])
    tokens = np.insert(tokens, ends, end)
    return Encoded(tokens, lengths + 1, utf8_bytes, characters, lost, unknown_tokens, len(compared), list(changed.values()))


def _encoded_parts(tokenizer: Tokenizer, texts: list[str]) -> Iterator[tuple[int, str, np.ndarray, Counter[str]]]:
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


def _difference(tokenizer: Tokenizer, text: str, ids: np.ndarray) -> tuple[str, str] | None:
    """The surroundings of the first character at which `text` and its first 1000 ids, decoded, differ: (text, decoded)."""
    decoded = tokenizer.decode(ids[:_COMPARED_TOKENS].tolist())
    if len(ids) > _COMPARED_TOKENS:
        decoded = decoded.rstrip("\ufffd")  # of a character that is cut between its bytes
        text = text[: len(decoded)]
    if decoded == text:
        return None
    equal = next((i for i, (a, b) in enumerate(zip(text, decoded, strict=False)) if a != b), min(len(text), len(decoded)))
    start = max(0, equal - 10)
    return text[start : start + 30], decoded[start : start + 30]


_tokenizer = lru_cache(maxsize=1)(Tokenizer.load)
