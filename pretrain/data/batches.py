"""Batches for training and validation, in the order of order.py, from token files (sources.py) or synthetic.py.

    train   position -> source, epoch, sample -> window of T + 1 tokens -> Batch. The entire state is the position.
            Samples in quarantine (excluded.py) have no position.
    valid   every token of the file but the first is a label exactly once; the last partial window is padded.

This module knows no ranks: a rank asks for its slice of positions. `take` is thread-safe.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from pretrain.config import DataConfig

from . import excluded
from .excluded import Quarantine
from .indexed import DataError
from .order import Order
from .sources import FileSource, open_sources

MASKED = -100  # the label that cross-entropy ignores
_Place = TypeVar("_Place")
_Content = TypeVar("_Content")


class Batch(NamedTuple):
    """Samples ready for the model; CPU tensors."""

    tokens_BT: torch.Tensor
    """int64, inputs."""
    labels_BT: torch.Tensor
    """int64, the token after each input; -100: does not count in the loss."""
    documents_BT: torch.Tensor | None = None
    """int64, number of the document within the sample, from 0. None: data.document_mask is off.

    An end-of-document token belongs to the document that it ends. Its label, the first token of the next document, counts in
    the loss, with and without the mask: a model should learn how documents start."""


class TrainData:
    """The endless, ordered stream of training samples.

    sources
    vocab_size         number of ids that the samples may contain
    samples_per_epoch  samples of all sources, without those in quarantine. If weights are proportional to sizes, an epoch
                       reads each sample once; otherwise some sources repeat while others are not finished
    fingerprint        changes with content, weights, seed and sequence length: a run resumes only with the same data
    quarantine         excluded samples
    reference_lines    nats per token
    """

    def __init__(self, sources: list, weights: list[float], data: DataConfig, *, seed: int, vocab_size: int):
        self.sources, self.vocab_size, self._data = sources, vocab_size, data
        self._shares = [weight / math.fsum(weights) for weight in weights]
        self._order = Order([source.num_samples for source in sources], weights, seed)
        ranges: excluded.SampleRanges = []
        if data.quarantine is not None:
            sizes = [source.num_samples for source in sources]
            ranges = excluded.read_quarantine(data.quarantine, [source.name for source in sources], sizes, data.sequence_length)
        self.quarantine = Quarantine(self._order, ranges)
        self.samples_per_epoch = sum(source.num_samples for source in sources) - sum(self.quarantine.sizes)
        self.reference_lines = _blended_lines(sources, self._shares, vocab_size)
        blend = ", ".join(f"{share:.9g} of {s.fingerprint()}" for share, s in zip(self._shares, sources, strict=True))
        self.fingerprint = f"order 1, seed {seed}, sequence_length {data.sequence_length}, {blend}"

    def take(self, position: int, count: int) -> Batch:
        """The samples at positions [position, position + count). Raises DataError, OSError."""
        numbers, _, samples = self._locate(position, count)
        batch = _masked_batch(count, self._data)
        for number in np.unique(numbers).tolist():
            rows = np.flatnonzero(numbers == number)
            _fill(batch, rows, self.sources[number], samples[rows])
        return batch

    def sample_ids(self, position: int, count: int) -> list[tuple[int, int, int]]:
        """(source number, epoch, sample) of the positions [position, position + count)."""
        return list(zip(*(ids.tolist() for ids in self._locate(position, count)), strict=True))

    def _locate(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not self.quarantine.ranges:
            return self._order.locate(position, count)
        return self._order.at(self.quarantine.locate(position, count))

    def position(self, source: int, epoch: int, sample: int) -> int | None:
        """The position of a sample in an epoch of its source: the inverse of `sample_ids`. None: it is in quarantine."""
        return self.quarantine.position(int(self._order.positions(source, epoch, np.array([sample]))[0]))

    def history_changed(self, old: excluded.SampleRanges, position: int) -> str | None:
        """A sample whose exclusion changes what a run with quarantine `old` read before `position`. None: nothing changes."""
        changed = self.quarantine.changed_before(Quarantine(self._order, old), position)
        return changed and f"sample {changed[1]} of {self.sources[changed[0]].name}, whose place in the order has passed"

    def passes(self, samples: int) -> list[float]:
        """Epochs of each source in the first `samples` positions."""
        counts = self._order.blend.counts(self.quarantine.start(samples))
        return [count / source.num_samples for count, source in zip(counts, self.sources, strict=True)]

    def description(self) -> list[str]:
        """Lines for the console: tokens, samples, and the share and epochs of each source."""
        tokens = sum(source.num_tokens for source in self.sources)
        length = f"{self._data.sequence_length:,} tokens"
        lines = [f"training data: {tokens:,} tokens, {self.samples_per_epoch:,} samples of {length} per epoch"]
        for source, share in zip(self.sources, self._shares, strict=True):
            passes = share * self.samples_per_epoch / source.num_samples
            line = f"  {source.name}: {source.num_tokens:,} tokens, {100 * share:.4g} % of the samples"
            if len(self.sources) > 1:
                line += f", read {passes:.3g} times per epoch"
            if source.sidecar is None and isinstance(source, FileSource):
                read_as = "" if source.file.num_documents else f", a flat file read as {source.file.dtype.name}"
                line += f"{read_as}, without a metadata sidecar: its tokenizer cannot be checked"
            lines.append(line)
        return lines


class ValidData:
    """A fixed set of numbered validation samples.

    name             unique
    source
    num_samples
    num_labels       labels of all samples that count in the loss
    bytes_per_token  UTF-8 bytes of text per token. None: unknown
    reference_lines  nats per token
    """

    def __init__(self, source, data: DataConfig, *, vocab_size: int):
        self.name, self.source, self._data = source.name, source, data
        self.num_labels = source.num_samples * data.sequence_length
        self.bytes_per_token = source.sidecar.utf8_bytes / source.sidecar.num_tokens if source.sidecar else None
        self.reference_lines = _blended_lines([source], [1.0], vocab_size)
        if isinstance(source, FileSource):
            self.num_labels = source.num_tokens - 1
        self.num_samples = -(-self.num_labels // data.sequence_length)

    def take(self, indices: list[int | None]) -> Batch:
        """The samples with these numbers. None, or a number past the end, gives a sample with all labels masked."""
        numbers = np.array([-1 if index is None else index for index in indices], dtype=np.int64)
        batch = _masked_batch(len(numbers), self._data)
        rows = np.flatnonzero((numbers >= 0) & (numbers < self.num_samples))
        if rows.size:
            _fill(batch, rows, self.source, numbers[rows])
        last = self.num_labels - (self.num_samples - 1) * self._data.sequence_length
        batch.labels_BT[numbers == self.num_samples - 1, last:] = MASKED
        return batch


def open_train(data: DataConfig, *, seed: int, vocab_size: int, tokenizer_fingerprint: str | None) -> TrainData:
    """The training stream of `data`. Raises DataError with every problem of every source."""
    if data.synthetic and (data.train or data.valid):
        raise DataError("data.synthetic: cannot be combined with data.train or data.valid; remove one of them")
    if not data.synthetic and not data.train:
        raise DataError("data.train: no sources; give at least one {path: PREFIX}, or data.synthetic")
    problems = [
        f"data.train[{i}].weight: got {source.weight}, must be finite and more than 0"
        for i, source in enumerate(data.train)
        if not (math.isfinite(source.weight) and source.weight > 0)
    ]
    sources = open_sources("train", data, problems, seed, vocab_size, tokenizer_fingerprint)
    weights = [1.0] if data.synthetic else [source.weight for source in data.train]
    return TrainData(sources, weights, data, seed=seed, vocab_size=vocab_size)


def open_valid(data: DataConfig, *, seed: int, vocab_size: int, tokenizer_fingerprint: str | None) -> list[ValidData]:
    """The validation sets of `data`; may be empty. Raises DataError with every problem of every source."""
    sources = open_sources("valid", data, [], seed, vocab_size, tokenizer_fingerprint)
    return [ValidData(source, data, vocab_size=vocab_size) for source in sources]


def _blended_lines(sources: list, shares: list[float], vocab_size: int) -> dict[str, float]:
    """Means over the sources, weighted by their shares, in nats per token, of the lines that all sources know."""
    lines = {"uniform": math.log(vocab_size)}
    for name in ("unigram", "bigram", "floor"):
        if all(name in source.reference_lines for source in sources):
            lines[name] = math.fsum(share * source.reference_lines[name] for share, source in zip(shares, sources, strict=True))
    return lines


def _masked_batch(count: int, data: DataConfig) -> Batch:
    """`count` samples of zeros whose labels are all masked."""
    tokens_BT = torch.zeros(count, data.sequence_length, dtype=torch.int64)
    return Batch(tokens_BT, torch.full_like(tokens_BT, MASKED), torch.zeros_like(tokens_BT) if data.document_mask else None)


def _fill(batch: Batch, rows: np.ndarray, source, samples: np.ndarray) -> None:
    """Writes the `samples` (n,) of `source` into the `rows` (n,) of the batch."""
    windows = source.read(samples)
    batch.tokens_BT.numpy()[rows], batch.labels_BT.numpy()[rows] = windows[:, :-1], windows[:, 1:]
    if batch.documents_BT is not None:
        batch.documents_BT.numpy()[rows] = source.documents(samples, windows)


def read_ahead(read: Callable[[_Place], _Content], places: Iterable[_Place]) -> Iterator[_Content]:
    """Yields `read(place)` for each place; a thread reads the next one while the caller uses this one. Raises what `read`
    raises, at its place. Close it when it is not used up: that waits for the read in progress."""
    remaining = iter(places)
    with ThreadPoolExecutor(1, "data") as pool:
        ahead = [pool.submit(read, place) for place in itertools.islice(remaining, 1)]
        while ahead:
            content = ahead.pop().result()
            ahead = [pool.submit(read, place) for place in itertools.islice(remaining, 1)]
            yield content
