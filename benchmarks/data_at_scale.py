"""The order and the reads of a run of 4,096 ranks on 10^13 tokens of 300 sources, which are sparse files: `data.py --simulate`.

Checks exactly, at positions from the first step to the last and on both sides of a border between two stages:

    slices    the samples of all ranks together are the global batch, each on one rank
    once      no sample of a global batch occurs twice, and samples drawn at random have one position in each epoch: the order
              maps them there and back

and measures, for one rank, wall time and memory (of Python and NumPy) of a batch, which must not depend on the position. A
small copy of the same mixture is then read to the end of an epoch of every source, and every sample counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pretrain.config import DataConfig, SourceConfig
from pretrain.data.batches import TrainData, open_train

RANKS, TOKENS, SOURCES = 4096, 10**13, 300
LENGTHS, PER_RANK, VOCAB_SIZE, SEED = (4096, 32768), 2, 65_000, 0
_LARGEST_OVER_SMALLEST, _DRAWN, _TURNS = 1000.0, 2000, 9


def write_sparse(folder: Path, tokens: int, count: int) -> list[SourceConfig]:
    """Files of 16-bit tokens without content, whose sizes differ by a factor of 1,000; weights by their square roots."""
    shares = np.geomspace(1, _LARGEST_OVER_SMALLEST, count)
    sizes = (shares / shares.sum() * tokens).astype(np.int64)
    sources = []
    for number, size in enumerate(sizes.tolist()):
        path = folder / f"source{number:03}.bin"
        with open(path, "wb") as file:
            file.truncate(2 * size)
        sources.append(SourceConfig(path=str(path), dtype="uint16", weight=float(np.sqrt(size))))
    return sources


def open_stages(sources: list[SourceConfig], lengths: tuple[int, int], border: int) -> TrainData:
    """Two stages of these sequence lengths; the second begins at `border` and reads every second source."""
    first = DataConfig(train=sources, sequence_length=lengths[0])
    second = dataclasses.replace(first, train=sources[::2], sequence_length=lengths[1])
    model = {"vocab_size": VOCAB_SIZE, "tokenizer_fingerprint": None}
    return open_train(first, seed=SEED, stages=[(0, first), (border, second)], **model)


def check_slices(data: TrainData, position: int, ranks: int) -> None:
    """Raises AssertionError unless the slices of all ranks are the global batch at `position`, without repetition."""
    batch = data.sample_ids(position, ranks * PER_RANK)
    slices = [each for rank in range(ranks) for each in data.sample_ids(position + rank * PER_RANK, PER_RANK)]
    assert slices == batch, f"the slices at position {position} are not the global batch"
    assert len(set(batch)) == len(batch), f"a sample occurs twice in the global batch at position {position}"


def check_inverse(data: TrainData, draw: np.random.Generator, samples: int) -> None:
    """Raises AssertionError unless samples drawn at random are at the position that the order says, in the first full epoch of
    each stage."""
    for stage in data.stages:
        for source in draw.choice(list(stage.order.passes), samples).tolist():
            passes = stage.order.passes[source]
            epoch, sample = passes.cursor.epoch + 1, int(draw.integers(stage.order.num_samples[source]))
            position = int(stage.order.positions(source, epoch, np.array([sample]))[0])
            found = [int(column[0]) for column in stage.order.locate(position, 1)]
            assert found == [source, epoch, sample, 0], f"sample {sample} of source {source} is not at position {position}"


def check_every_sample(data: TrainData) -> int:
    """Reads the first stage until every source has ended an epoch. Raises AssertionError unless each of its samples came once.
    -> number of samples read."""
    order, position, chunk = data.stages[0].order, 0, 1 << 20
    seen = {source: np.zeros(order.num_samples[source], dtype=np.int64) for source in order.passes}
    while min(order.passes[source].cursor.epoch + order.counts(position)[source] // len(seen[source]) for source in seen) < 1:
        places = order.locate(position, chunk)
        for source, counts in seen.items():
            np.add.at(counts, places.samples[(places.sources == source) & (places.epochs == 0)], 1)
        position += chunk
    assert all((counts == 1).all() for counts in seen.values()), "a sample was read twice or never in the first epoch"
    return position


def simulate(
    folder: Path | None, ranks: int = RANKS, tokens: int = TOKENS, count: int = SOURCES, small_tokens: int = 640_000_000
) -> Iterator[str]:
    """Lines of the report. Raises AssertionError where the order is wrong. small_tokens: of the small copy."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        sources = write_sparse(Path(name), tokens, count)
        step, steps = ranks * PER_RANK, tokens // LENGTHS[0] // (ranks * PER_RANK)
        border = steps // 2
        began = time.perf_counter()
        data = open_stages(sources, LENGTHS, border * step)
        opened = time.perf_counter() - began
        with traced():
            data = open_stages(sources, LENGTHS, border * step)
            memory = tracemalloc.get_traced_memory()[0]
        yield f"{ranks:,} ranks, {tokens:.3g} tokens in {count} sources: opened in {opened:.2f} s, {memory / 2**20:.1f} MiB"
        yield f"{'position':>16}  {'T':>6}  {'ms per batch':>12}  {'MiB':>6}  checked"
        for number in (0, 1, steps // 8, border - 1, border, border + 1, border + steps // 16):
            position = number * step
            seconds, peak = cost_of_a_batch(data, position)
            check_slices(data, position, ranks)
            length = data.stage_at(position).cut.sequence_length
            yield f"{position:16,}  {length:6,}  {1e3 * seconds:12.2f}  {peak / 2**20:6.2f}  slices, once"
        check_inverse(data, np.random.default_rng(SEED), _DRAWN)
        yield f"{_DRAWN * len(data.stages):,} samples drawn at random are where the order says"
    with tempfile.TemporaryDirectory(dir=folder) as name:
        small = open_stages(write_sparse(Path(name), small_tokens, count), (64, 512), 1 << 40)
        read = check_every_sample(small)
        yield f"{sum(small.num_samples):,} samples of a small copy: each once in the first epoch ({read:,} positions)"


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Counts what is allocated, which slows allocation many times over: so nothing is timed meanwhile."""
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def cost_of_a_batch(data: TrainData, position: int) -> tuple[float, int]:
    """(median seconds, peak bytes beyond what was allocated before) of the batches of one rank from `position` on."""
    data.take(position, PER_RANK)  # the first one fills caches
    seconds = []
    for turn in range(_TURNS):
        began = time.perf_counter()
        data.take(position + turn * PER_RANK, PER_RANK)
        seconds.append(time.perf_counter() - began)
    with traced():
        for turn in range(_TURNS):
            data.take(position + turn * PER_RANK, PER_RANK)
        peak = tracemalloc.get_traced_memory()[1]
    return statistics.median(seconds), peak
