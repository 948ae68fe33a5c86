"""Batches for training and validation, in the order of order.py, from token files (sources.py) or synthetic.py.

    train   position -> source, epoch, sample -> window of T + 1 tokens -> Batch. The entire state is the position.
            Samples in quarantine (excluded.py) have no position.
    valid   every token of a file but the first is a label exactly once; the last partial window of each file is padded.

This module knows no ranks: a rank asks for its slice of positions. `take` is thread-safe.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from pretrain.data.config import DataConfig

from . import excluded
from .excluded import Quarantine, SampleRanges
from .indexed import DataError
from .order import Order, Places
from .passes import NEVER, Cursor, Cut
from .remote import is_url
from .sources import Opener

MASKED = -100  # the label that cross-entropy ignores
_READS_AHEAD_IN_STORE = 8
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
    sources_B: torch.Tensor | None = None
    """int64, number of each sample's source. None: there is only one, or it does not matter."""

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(tokens_BT, labels_BT, documents_BT): what a model takes."""
        return self.tokens_BT, self.labels_BT, self.documents_BT

    @property
    def document_lengths(self) -> np.ndarray:
        """Tokens of each document of each sample, (n,), in order. Requires documents_BT, on the CPU."""
        documents_BT = self.documents_BT.numpy()
        last_BT = np.ones(documents_BT.shape, dtype=bool)
        last_BT[:, :-1] = documents_BT[:, 1:] != documents_BT[:, :-1]
        return np.diff(np.flatnonzero(last_BT), prepend=-1)


class Mixture(NamedTuple):
    """What the settings say about the data of one stage."""

    position: int
    """The first position of the stage."""
    cut: Cut
    weights: list[float]
    """Of all sources of the run; 0: not in this stage."""


class DataStage:
    """The samples of one stage of a run, from `position` on. A run without stages is one stage."""

    def __init__(self, mixture: Mixture, sources: list, seed: int, cursors: list[Cursor], ranges: SampleRanges):
        """sources: of the run. cursors: of these. ranges: the quarantine, in samples of this stage."""
        self.position, self.cut, self.weights = mixture
        self.shares = [weight / math.fsum(self.weights) for weight in self.weights]
        blocks = [source.num_blocks(self.cut.block_length) for source in sources]
        self.order = Order(blocks, self.weights, seed, self.cut, cursors)
        self.quarantine = Quarantine(self.order, ranges)

    def locate(self, position: int, count: int) -> Places:
        """Places of the samples at positions [position, position + count) of the run."""
        position -= self.position
        if not self.quarantine.ranges:
            return self.order.locate(position, count)
        return self.order.at(self.quarantine.locate(position, count))

    def cursors(self, position: int) -> list[Cursor]:
        """How far each source is read when the run is at `position`."""
        return self.order.cursors(self.quarantine.start(position - self.position))


class TrainData:
    """The endless, ordered stream of training samples.

    sources          of all stages
    vocab_size       number of ids that the samples may contain
    stages           in order; the first begins at position 0
    quarantine       excluded samples, in samples of the first stage's length
    reference_lines  nats per token, of the first stage
    """

    def __init__(self, sources: list, mixtures: list[Mixture], data: DataConfig, *, seed: int, vocab_size: int):
        """mixtures: one per stage. Raises DataError for a quarantine that does not fit."""
        self.sources, self.vocab_size, self._mixtures, self._seed = sources, vocab_size, mixtures, seed
        self._document_mask = data.document_mask
        self.quarantine = self._read_quarantine(data.quarantine) if data.quarantine is not None else []
        self.stages = self._stages(self.quarantine)
        self.reference_lines = self.reference_lines_at(0)

    def _read_quarantine(self, path: str) -> SampleRanges:
        names, length = [source.name for source in self.sources], self._mixtures[0].cut.sequence_length
        return excluded.read_quarantine(path, names, self.num_samples, length)

    @property
    def num_samples(self) -> list[int]:
        """Samples of the first stage's length in each source, whether that stage reads it or not."""
        cut = self._mixtures[0].cut
        return [source.num_blocks(cut.block_length) * cut.samples_per_block for source in self.sources]

    @property
    def samples_per_epoch(self) -> int:
        """Samples of the first stage's sources, without those in quarantine. If weights are proportional to sizes, an epoch
        reads each sample once; otherwise some sources repeat while others are not finished."""
        order = self.stages[0].order
        left_out = sum(end - begin for source, begin, end in self.quarantine if source in order.passes)
        return sum(order.num_samples[source] for source in order.passes) - left_out

    def _stages(self, quarantine: SampleRanges) -> list[DataStage]:
        if quarantine and len({mixture.cut.block_length for mixture in self._mixtures}) > 1:
            text = "sample numbers hold for one length of blocks, and this run continues one with another; leave the file out"
            raise DataError(f"data.quarantine: {text}, or give the run that is continued a data.block_length")
        stages: list[DataStage] = []
        for mixture in self._mixtures:
            cursors = [Cursor()] * len(self.sources)
            if stages:
                cursors = stages[-1].cursors(mixture.position)
                if stages[-1].cut.block_length != mixture.cut.block_length:  # other blocks: passes begin again
                    cursors = [Cursor(cursor.epoch + (cursor != Cursor(cursor.epoch))) for cursor in cursors]
            ranges = excluded.recut(quarantine, self._mixtures[0].cut.sequence_length, mixture.cut.sequence_length)
            stages.append(DataStage(mixture, self.sources, self._seed, cursors, ranges))
        return stages

    def starting_at(self, begins: list[tuple[int, int]]) -> TrainData:
        """The same stages, beginning at other (position, block length). Raises DataError for a quarantine that does not fit."""
        mixtures = [
            mixture._replace(position=position, cut=mixture.cut._replace(block_length=block_length))
            for mixture, (position, block_length) in zip(self._mixtures, begins, strict=True)
        ]
        data = copy.copy(self)
        data._mixtures = mixtures
        data.stages = data._stages(self.quarantine)
        return data

    def stage_at(self, position: int) -> DataStage:
        """The stage that provides the sample at `position`."""
        return next(stage for stage in reversed(self.stages) if stage.position <= position)

    def take(self, position: int, count: int) -> Batch:
        """The samples at positions [position, position + count) of one stage. Raises DataError, OSError."""
        stage = self.stage_at(position)
        places = stage.locate(position, count)
        batch = _masked_batch(count, stage.cut.sequence_length, self._document_mask)
        for number in np.unique(places.sources).tolist():
            rows = np.flatnonzero(places.sources == number)
            _fill(batch, rows, self.sources[number], places.samples[rows], stage.cut)
        for row in np.flatnonzero(places.seen).tolist():
            batch.labels_BT[row, : places.seen[row]] = MASKED
        return batch._replace(sources_B=torch.from_numpy(places.sources)) if len(self.sources) > 1 else batch

    def sample_ids(self, position: int, count: int) -> list[tuple[int, int, int]]:
        """(source number, epoch, sample) of the positions [position, position + count) of one stage."""
        places = self.stage_at(position).locate(position, count)
        return list(zip(*(ids.tolist() for ids in places[:3]), strict=True))

    def position(self, source: int, epoch: int, sample: int, stage: DataStage | None = None) -> int | None:
        """The position of a sample of `stage` (None: the first) in an epoch of its source: the inverse of `sample_ids`.

        None: the stage does not read it in that epoch, or it is in quarantine. The stage may end before that position.
        """
        stage = stage or self.stages[0]
        full = int(stage.order.positions(source, epoch, np.array([sample]))[0])
        kept = None if full == NEVER else stage.quarantine.position(full)
        return None if kept is None else stage.position + kept

    def history_changed(self, old: SampleRanges, position: int) -> str | None:
        """A sample whose exclusion changes what a run with quarantine `old` read before `position`. None: nothing changes."""
        ends = [stage.position for stage in self.stages[1:]] + [position]
        for stage, other, end in zip(self.stages, self._stages(old), ends, strict=True):
            if stage.position < position:
                read = min(end, position) - stage.position
                if changed := stage.quarantine.changed_before(other.quarantine, read):
                    return f"sample {changed[1]} of {self.sources[changed[0]].name}, whose place in the order has passed"
        return None

    def passes(self, position: int) -> list[float]:
        """Epochs of each source in the first `position` positions."""
        stage = self.stage_at(max(position - 1, 0))
        cursors, block_length = stage.cursors(position), stage.cut.block_length
        blocks = [source.num_blocks(block_length) for source in self.sources]
        return [cursor.epochs(count, block_length) for cursor, count in zip(cursors, blocks, strict=True)]

    def tokens(self, position: int) -> int:
        """Tokens that the first `position` positions feed to the model."""
        ends = [stage.position for stage in self.stages[1:]] + [position]
        spans = (max(0, min(end, position) - stage.position) for stage, end in zip(self.stages, ends, strict=True))
        return sum(span * stage.cut.sequence_length for span, stage in zip(spans, self.stages, strict=True))

    def epochs(self, position: int) -> float:
        """Epochs of the first stage's sources together in the first `position` positions, counted in tokens."""
        return self.tokens(position) / (self.stages[0].cut.sequence_length * self.samples_per_epoch)

    @property
    def fingerprint(self) -> str:
        """Changes with content, weights, seed, lengths and stages."""
        return self.fingerprint_at(self.stages[-1].position + 1)

    def fingerprint_at(self, position: int) -> str:
        """The same for the samples before `position` only: a run resumes there only with the same history."""
        return "; ".join(self._described(stage) for stage in self.stages if stage.position < max(position, 1))

    def _described(self, stage: DataStage) -> str:
        blend = ", ".join(
            f"{share:.9g} of {source.fingerprint()}" for share, source in zip(stage.shares, self.sources, strict=True) if share
        )
        lengths = f"sequence_length {stage.cut.sequence_length}"
        if stage.cut.samples_per_block > 1:
            lengths += f" in blocks of {stage.cut.block_length}"
        begin = f"from {stage.position} on" if stage.position else f"order 1, seed {self._seed}"
        return f"{begin}, {lengths}, {blend}"

    def reference_lines_at(self, position: int) -> dict[str, float]:
        """Reference losses of the stage at `position`, nats per token."""
        return _blended_lines(self.sources, self.stage_at(position).shares, self.vocab_size)

    def description(self, position: int = 0) -> list[str]:
        """Lines for the console about the stage at `position`: tokens, samples, and the share and epochs of each source."""
        stage = self.stage_at(position)
        sources = [(source, share) for source, share in zip(self.sources, stage.shares, strict=True) if share]
        tokens = sum(source.num_tokens for source, _ in sources)
        samples = sum(stage.order.num_samples[source] for source in stage.order.passes)
        if stage is self.stages[0]:
            samples = self.samples_per_epoch
        length = f"{stage.cut.sequence_length:,} tokens"
        lines = [f"training data: {tokens:,} tokens, {samples:,} samples of {length} per epoch"]
        for source, share in sources:
            passes = share * samples / (source.num_blocks(stage.cut.block_length) * stage.cut.samples_per_block)
            files = f" in {len(source.files):,} files" if len(source.files) > 1 else ""
            line = f"  {source.name}: {source.num_tokens:,} tokens{files}, {100 * share:.4g} % of the samples"
            if len(sources) > 1:
                line += f", read {passes:.3g} times per epoch"
            if source.sidecar is None and source.files:
                flat = sorted({file.dtype.name for file in source.files if file.num_documents is None})
                if flat:
                    line += f", {'a flat file' if len(source.files) == 1 else 'flat files'} read as {' and '.join(flat)}"
                line += ", without a metadata sidecar: its tokenizer cannot be checked"
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
        self.name, self.source, self._document_mask = source.name, source, data.document_mask
        self._cut, length = Cut(data.sequence_length, data.sequence_length), data.sequence_length
        self.num_samples, self.num_labels = source.num_blocks(length), source.num_labels(length)
        self.bytes_per_token = source.sidecar.utf8_bytes / source.sidecar.num_tokens if source.sidecar else None
        self.reference_lines = _blended_lines([source], [1.0], vocab_size)

    def take(self, indices: list[int | None]) -> Batch:
        """The samples with these numbers. None, or a number past the end, gives a sample with all labels masked."""
        numbers = np.array([-1 if index is None else index for index in indices], dtype=np.int64)
        batch = _masked_batch(len(numbers), self._cut.sequence_length, self._document_mask)
        rows = np.flatnonzero((numbers >= 0) & (numbers < self.num_samples))
        if rows.size:
            _fill(batch, rows, self.source, numbers[rows], self._cut)
            padded = np.arange(self._cut.sequence_length) >= self.source.labels_of(numbers[rows], self._cut)[:, None]
            batch.labels_BT[rows] = batch.labels_BT[rows].masked_fill(torch.from_numpy(padded), MASKED)
        return batch


def open_train(
    data: DataConfig,
    *,
    seed: int,
    vocab_size: int,
    tokenizer_fingerprint: str | None,
    stages: list[tuple[int, DataConfig]] | None = None,
) -> TrainData:
    """The training stream of `data`. Raises DataError with every problem of every source.

    stages: (position, settings) of each stage; None: `data` is the only one.
    """
    if data.synthetic and (data.train or data.valid):
        raise DataError("data.synthetic: cannot be combined with data.train or data.valid; remove one of them")
    if not data.synthetic and not data.train:
        raise DataError("data.train: no sources; give at least one {path: PREFIX}, or data.synthetic")
    stages = stages or [(0, data)]
    block_length = block_length_of([each for _, each in stages])
    if data.synthetic:
        sources = [_synthetic(data, "train", seed, vocab_size, block_length)]
        weights = [[1.0] for _ in stages]
    else:
        opener = Opener(data, vocab_size, tokenizer_fingerprint)
        first = [next(i for i, (_, other) in enumerate(stages) if other.train == each.train) for _, each in stages]
        places = ["data.train" if i == 0 else f"train.stages[{i - 1}].sources" for i in first]
        blends = [opener.mixture(each, place, block_length) for (_, each), place in zip(stages, places, strict=True)]
        if len(stages) > 1 and opener.has_unreadable:
            text = "the files of all stages must be readable, also of those that a resumed run has passed"
            opener.problems.append(f"train.stages: {text}: what it has read of them is compared with its checkpoint")
        sources = opener.close()
        weights = [[math.fsum(weight for each, weight in blend if each is source) for source in sources] for blend in blends]
    cuts = [Cut(each.sequence_length, block_length) for _, each in stages]
    mixtures = [Mixture(position, cut, each) for (position, _), cut, each in zip(stages, cuts, weights, strict=True)]
    return TrainData(sources, mixtures, data, seed=seed, vocab_size=vocab_size)


def block_length_of(stages: list[DataConfig]) -> int:
    """L: `data.block_length`, or the smallest that every sequence length divides."""
    return stages[0].block_length or math.lcm(*(each.sequence_length for each in stages))


def open_valid(data: DataConfig, *, seed: int, vocab_size: int, tokenizer_fingerprint: str | None) -> list[ValidData]:
    """The validation sets of `data`; may be empty. Raises DataError with every problem of every source."""
    if data.synthetic:
        sources = [_synthetic(data, "valid", seed, vocab_size, data.sequence_length)]
    else:
        opener = Opener(data, vocab_size, tokenizer_fingerprint)
        opener.files(data.valid, "data.valid", data, least_tokens=2, partial=True)
        sources = opener.close()
    return [ValidData(source, data, vocab_size=vocab_size) for source in sources]


def _synthetic(data: DataConfig, split: str, seed: int, vocab_size: int, block_length: int):
    """The source of generated samples."""
    from .synthetic import SyntheticSource  # most runs need none of this

    return SyntheticSource(data.synthetic, split, seed=seed, vocab_size=vocab_size, block_length=block_length)


def _blended_lines(sources: list, shares: list[float], vocab_size: int) -> dict[str, float]:
    """Means over the sources, weighted by their shares, in nats per token, of the lines that all sources know."""
    known = [(share, source.reference_lines) for share, source in zip(shares, sources, strict=True) if share]
    lines = {"uniform": math.log(vocab_size)}
    for name in ("unigram", "bigram", "floor"):
        if all(name in of_source for _, of_source in known):
            lines[name] = math.fsum(share * of_source[name] for share, of_source in known)
    return lines


def _masked_batch(count: int, sequence_length: int, document_mask: bool) -> Batch:
    """`count` samples of zeros whose labels are all masked."""
    shape, kind = (count, sequence_length), np.int64  # made by NumPy: torch's threads would spin beside those of the step
    parts = np.zeros(shape, kind), np.full(shape, MASKED, kind), np.zeros(shape, kind) if document_mask else None
    return Batch(*(None if part is None else torch.from_numpy(part) for part in parts))


def _fill(batch: Batch, rows: np.ndarray, source, samples: np.ndarray, cut: Cut) -> None:
    """Writes the `samples` (n,) of `source` into the `rows` (n,) of the batch."""
    windows = source.read(samples, cut)
    batch.tokens_BT.numpy()[rows], batch.labels_BT.numpy()[rows] = windows[:, :-1], windows[:, 1:]
    if batch.documents_BT is not None:
        batch.documents_BT.numpy()[rows] = source.documents(samples, windows, cut)


def read_ahead(read: Callable[[_Place], _Content], places: Iterable[_Place], ahead: int = 1) -> Iterator[_Content]:
    """Yields `read(place)` for each place; threads read the next `ahead` ones while the caller uses this one. Raises what
    `read` raises, at its place. Close it when it is not used up: that waits for the reads in progress."""
    remaining = iter(places)
    with ThreadPoolExecutor(ahead, "data") as pool:
        reads = deque(pool.submit(read, place) for place in itertools.islice(remaining, ahead))
        while reads:
            content = reads.popleft().result()
            reads.extend(pool.submit(read, place) for place in itertools.islice(remaining, 1))
            yield content


def reads_ahead(sources: list) -> int:
    """How many batches of these sources to read ahead: from a store, each takes a few round trips, and now and then seconds."""
    in_store = any(is_url(file.path) for source in sources for file in source.files)
    return _READS_AHEAD_IN_STORE if in_store else 1
