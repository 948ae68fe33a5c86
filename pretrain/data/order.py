"""The order of samples: maps a position to a sample and back; integers only, nothing stored.

    position -> Blend -> (source, index in that source) -> Passes -> epoch, sample

Every arrow is a pure function of (seed, weights, sizes), in O(1) time and memory per sample, from a thousand to 10^12
samples. So a run seeks to any position without replaying, and the sequence of global batches cannot depend on ranks,
micro-batches, workers or the length of the run. It knows no files, no tokens and no torch.

All arithmetic is on integers, and golden values in the tests freeze it: changing a constant changes the order of every run.
"""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import numpy as np

from .passes import NEVER, ONE_PER_BLOCK, Cursor, Cut, Passes


class Blend:
    """Assigns a source to each position, so that every prefix has the sources in the ratio of their weights.

    A Huffman tree of two-way splits: of the first x positions that reach a node, c(x) = round(x * P / 2^32) go left, where
    P is the left share of the weight. The prefix error stays near one sample and counts have a closed form.
    """

    def __init__(self, weights: list[float]):
        if not weights or not all(weight > 0 and math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights must be finite and > 0, got {weights}")
        self.num_sources = len(weights)
        self.nodes: list[tuple[int, int, int]] = []  # inner node k + i: (left child, right child, P); the last is the root
        heap = [(float(weight), number) for number, weight in enumerate(weights)]
        heapq.heapify(heap)
        while len(heap) > 1:
            (left_weight, left), (right_weight, right) = heapq.heappop(heap), heapq.heappop(heap)
            share = round(2**32 * left_weight / (left_weight + right_weight))
            self.nodes.append((left, right, min(max(share, 1), 2**32 - 1)))
            heapq.heappush(heap, (left_weight + right_weight, self.num_sources + len(self.nodes) - 1))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, index) of each position, int64; index counts 0, 1, 2, ... within its source. Positions in [0, 2^63)."""
        x = np.array(positions, dtype=np.uint64)
        sources = np.zeros(len(x), dtype=np.int64)
        pending = [(self.num_sources + len(self.nodes) - 1, np.arange(len(x)))]
        while pending:
            node, rows = pending.pop()
            if node < self.num_sources:
                sources[rows] = node
            elif rows.size:
                left, right, share = self.nodes[node - self.num_sources]
                before = _left_count(x[rows], np.uint64(share))
                goes_left = _left_count(x[rows] + np.uint64(1), np.uint64(share)) > before
                x[rows] = np.where(goes_left, before, x[rows] - before)
                pending += [(left, rows[goes_left]), (right, rows[~goes_left])]
        return sources, x.astype(np.int64)

    def counts(self, position: int) -> list[int]:
        """Number of the first `position` positions that each source provides."""
        counts = [0] * self.num_sources
        pending = [(self.num_sources + len(self.nodes) - 1, position)]
        while pending:
            node, x = pending.pop()
            if node < self.num_sources:
                counts[node] = x
            else:
                left, right, share = self.nodes[node - self.num_sources]
                goes_left = (x * share + 2**31) >> 32
                pending += [(left, goes_left), (right, x - goes_left)]
        return counts

    def position(self, source: int, index: int) -> int:
        """The position at which `source` provides its sample number `index`: the inverse of `locate`."""
        node = source
        for number, (left, right, share) in enumerate(self.nodes):  # children come before their parents
            if node == left:  # the least x with round((x + 1) * share / 2^32) > index
                index = -(-((index << 32) + 2**31) // share) - 1
            elif node == right:  # the least x with x + 1 - round((x + 1) * share / 2^32) > index
                index = ((index << 32) + 2**31) // (2**32 - share)
            else:
                continue
            node = self.num_sources + number
        return index


def _left_count(x: np.ndarray, share: np.uint64) -> np.ndarray:
    """round(x * share / 2^32) for uint64 x < 2^63, without overflow."""
    high, low = x >> np.uint64(32), x & np.uint64(0xFFFFFFFF)
    return high * share + ((low * share + np.uint64(2**31)) >> np.uint64(32))


class Places(NamedTuple):
    """Where samples are; int64 (n,) each."""

    sources: np.ndarray
    epochs: np.ndarray
    samples: np.ndarray
    seen: np.ndarray
    """Labels at the front of the sample that an earlier stage read in this epoch; 0 in runs without stages."""


class Order:
    """position -> source, epoch, sample, for one stage of a run; its positions count from 0.

    num_blocks  of each source
    weights     of each source; 0: this stage does not read it
    seed
    cut         of the sources into samples
    cursors     how far each source was read before the stage; None: not at all

    Each source is read epoch by epoch, every sample once per epoch, as in passes.py.
    """

    def __init__(
        self,
        num_blocks: list[int],
        weights: list[float],
        seed: int,
        cut: Cut = ONE_PER_BLOCK,
        cursors: list[Cursor] | None = None,
    ):
        if any(weight < 0 for weight in weights):
            raise ValueError(f"weights must be finite and > 0, got {weights}")
        self.num_samples = [cut.samples_per_block * blocks for blocks in num_blocks]
        self._read = np.flatnonzero(weights)  # sources of this stage
        self._number = {source: number for number, source in enumerate(self._read.tolist())}
        self._blend = Blend([weights[source] for source in self._number])
        self._cursors = cursors or [Cursor()] * len(num_blocks)
        of_source = zip(num_blocks, self._cursors, strict=True)
        self.passes = {
            source: Passes(blocks, cut, (seed, source), cursor)
            for source, (blocks, cursor) in enumerate(of_source)
            if weights[source]
        }
        """Of each source that this stage reads."""

    def locate(self, position: int, count: int) -> Places:
        """The places of the positions [position, position + count)."""
        if position < 0 or count < 0:
            raise ValueError(f"position and count must be >= 0, got {position} and {count}")
        return self.at(np.arange(position, position + count, dtype=np.uint64))

    def at(self, positions: np.ndarray) -> Places:
        """The places of sorted positions (n,)."""
        numbers, indices = self._blend.locate(positions)
        places = Places(self._read[numbers], *(np.zeros_like(indices) for _ in range(3)))
        for source in np.unique(places.sources).tolist():
            of_source = np.flatnonzero(places.sources == source)
            found = self.passes[source].locate(indices[of_source])
            places.epochs[of_source], places.samples[of_source], places.seen[of_source] = found
        return places

    def counts(self, position: int) -> list[int]:
        """Samples that each source provides for the first `position` positions."""
        counts = [0] * len(self.num_samples)
        for source, count in zip(self._number, self._blend.counts(position), strict=True):
            counts[source] = count
        return counts

    def positions(self, source: int, epoch: int, samples: np.ndarray) -> np.ndarray:
        """Positions of samples of `source` in that source's `epoch`, (n,) -> (n,) int64: the inverse of `locate`. NEVER: the
        stage does not read the sample in it."""
        if source not in self._number:
            return np.full(len(samples), NEVER)
        numbers = self.passes[source].numbers(epoch, samples).tolist()
        blend, number = self._blend, self._number[source]
        return np.array([NEVER if each == NEVER else blend.position(number, each) for each in numbers], dtype=np.int64)

    def cursors(self, position: int) -> list[Cursor]:
        """How far each source is read after the first `position` positions."""
        counts = self.counts(position)
        return [
            self.passes[source].after(counts[source]) if source in self.passes else cursor
            for source, cursor in enumerate(self._cursors)
        ]
