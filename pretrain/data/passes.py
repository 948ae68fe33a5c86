"""The passes of one source: maps the number of a sample among those that a stage reads of it to (epoch, sample), and back.

A source is cut into blocks of L tokens and each block into k samples of T = L / k tokens, so that stages with other T read the
same blocks. An epoch reads every block once, in an order keyed by (seed, source, epoch). If k > 1, groups of blocks are read
layer by layer: the first sample of each block, then the second of each, so that neighbours in the text are far apart in the
order.

Where a stage ends within a group, its blocks are read up to some token. The next stage first reads their rest, whatever its T:
each label once per epoch. A sample that was read in part has `seen` labels at its front, which must not count again.

Integers only, O(1) time and memory per sample apart from one group; nothing is stored. No files, no torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .permutation import Permutation

NEVER = -1
"""The number of a sample that a stage does not read in that epoch."""
_FEWEST_IN_GROUP, _MOST_IN_GROUP, _GROUPS = 16, 1024, 64


class Cut(NamedTuple):
    """How sources are cut into samples."""

    sequence_length: int
    """T: tokens that a sample feeds to the model."""
    block_length: int
    """L: a multiple of T."""

    @property
    def samples_per_block(self) -> int:
        """L / T."""
        return self.block_length // self.sequence_length


ONE_PER_BLOCK = Cut(1, 1)
"""Blocks are samples."""


class Cursor(NamedTuple):
    """How far a source has been read."""

    epoch: int = 0
    blocks: int = 0
    """Blocks of this epoch's order before the group that is being read; all their tokens are read."""
    seen: tuple[int, ...] = ()
    """Tokens read of each block of that group, from its front; empty: nothing of a group is read."""

    def epochs(self, num_blocks: int, block_length: int) -> float:
        """Epochs that are read of a source of so many blocks."""
        return self.epoch + (self.blocks + sum(self.seen) / block_length) / max(1, num_blocks)


class Passes:
    """Samples 0, 1, 2, ... that a stage reads of a source, from `cursor` on."""

    def __init__(self, num_blocks: int, cut: Cut, ids: tuple[int, int], cursor: Cursor):
        """ids: (seed, number of the source)."""
        self.num_blocks, self.cursor = num_blocks, cursor
        self.sequence_length, self.samples_per_block = cut.sequence_length, cut.samples_per_block
        self._group = min(_MOST_IN_GROUP, max(_FEWEST_IN_GROUP, num_blocks // _GROUPS)) if self.samples_per_block > 1 else 1
        self._rest = self._rest_of_group()
        self._first = cursor.blocks + len(cursor.seen)
        """Blocks of the first epoch's order before those that are read from their front."""
        self._permutation = lru_cache(maxsize=4)(lambda epoch: Permutation(num_blocks, (*ids, epoch)))

    def _rest_of_group(self) -> np.ndarray:
        """Samples that complete the group in which the stage begins, in order: int64 (n, 3) of block within it, layer, seen."""
        ends = np.array(self.cursor.seen, dtype=np.int64)[None, :]
        layers = np.arange(self.samples_per_block)[:, None]
        begin = layers * self.sequence_length
        layer, block = np.nonzero(ends < begin + self.sequence_length)
        return np.stack([block, layer, np.maximum(ends - begin, 0)[layer, block]], axis=1)

    def _size(self, epoch: np.ndarray) -> np.ndarray:
        """Samples of each of these epochs that are read from their front."""
        return np.where(epoch == self.cursor.epoch, self.num_blocks - self._first, self.num_blocks) * self.samples_per_block

    def _start(self, epoch: np.ndarray) -> np.ndarray:
        """Number of the first sample of each of these epochs that is read from its front."""
        later = np.maximum(epoch - self.cursor.epoch, 0)
        first = self._size(np.array(self.cursor.epoch))
        return len(self._rest) + np.where(later > 0, first + (later - 1) * self.num_blocks * self.samples_per_block, 0)

    def epoch_of(self, numbers: np.ndarray) -> np.ndarray:
        """The epoch of each of these numbers, (n,) -> (n,) int64."""
        after = numbers - len(self._rest) - self._size(np.array(self.cursor.epoch))
        return self.cursor.epoch + np.where(after < 0, 0, 1 + after // (self.num_blocks * self.samples_per_block))

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(epochs, samples, seen labels), int64 (n,) each, of these numbers (n,)."""
        numbers = np.asarray(numbers, dtype=np.int64)
        epochs = self.epoch_of(numbers)
        ranks, layers, seen = (np.zeros_like(numbers) for _ in range(3))
        early = numbers < len(self._rest)
        if early.any():
            block, layers[early], seen[early] = self._rest[numbers[early]].T
            ranks[early] = self.cursor.blocks + block
        late = ~early
        start, size, within = self._group_of(epochs[late], numbers[late] - self._start(epochs[late]))
        ranks[late], layers[late] = start + within % size, within // size
        blocks = np.empty_like(ranks)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            blocks[chosen] = self._permutation(epoch)(ranks[chosen])
        return epochs, blocks * self.samples_per_block + layers, seen

    def _group_of(self, epochs: np.ndarray, within: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rank of its first block, its blocks, number in it) of the groups of samples that are number `within` of those which
        these epochs read from their front."""
        group, within = np.divmod(within, self._group * self.samples_per_block)
        start = np.where(epochs == self.cursor.epoch, self._first, 0) + group * self._group
        return start, np.maximum(np.minimum(self._group, self.num_blocks - start), 1), within

    def numbers(self, epoch: int, samples: np.ndarray) -> np.ndarray:
        """Numbers of these samples in this epoch, (n,) -> (n,) int64; NEVER: not read in it. The inverse of `locate`."""
        blocks, layers = np.divmod(np.asarray(samples, dtype=np.int64), self.samples_per_block)
        if epoch < self.cursor.epoch:
            return np.full_like(blocks, NEVER)
        ranks, first = self._permutation(epoch).inverse(blocks), 0
        early = np.zeros_like(ranks, dtype=bool)
        if epoch == self.cursor.epoch:
            first, early = self._first, ranks < self._first
        group, block = np.divmod(ranks - first, self._group)
        size = np.minimum(self._group, self.num_blocks - first - group * self._group)
        numbers = group * self._group * self.samples_per_block + layers * size + block + self._start(np.array(epoch))
        if early.any():
            width = len(self.cursor.seen)
            table = np.full(self.samples_per_block * width + 1, NEVER)
            table[self._rest[:, 1] * width + self._rest[:, 0]] = np.arange(len(self._rest))
            block = ranks[early] - self.cursor.blocks
            numbers[early] = np.where(block < 0, NEVER, table[np.where(block < 0, -1, layers[early] * width + block)])
        return numbers

    def after(self, count: int) -> Cursor:
        """The cursor after the first `count` samples."""
        if count < len(self._rest):
            seen = np.array(self.cursor.seen, dtype=np.int64)
            block, layer, _ = self._rest[:count].T
            np.maximum.at(seen, block, (layer + 1) * self.sequence_length)
            return self.cursor._replace(seen=tuple(seen.tolist()))
        epoch = self.epoch_of(np.array([count]))
        start, size, within = (int(each[0]) for each in self._group_of(epoch, count - self._start(epoch)))
        layer, block = divmod(within, size)
        seen = tuple(self.sequence_length * (layer + (each < block)) for each in range(size)) if within else ()
        return Cursor(int(epoch[0]), start, seen)
