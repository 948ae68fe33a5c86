"""The order of samples: maps a position to a sample and back; integers only, nothing stored.

    position -> Blend -> (source, index in that source) -> epoch, rank in the epoch -> Permutation -> sample

Every arrow is a pure function of (seed, weights, sizes), in O(1) time and memory per sample, from a thousand to 10^12
samples. So a run seeks to any position without replaying, and the sequence of global batches cannot depend on ranks,
micro-batches, workers or the length of the run. It knows no files, no tokens and no torch.

All arithmetic is on integers, and golden values in the tests freeze it: changing a constant changes the order of every run.
"""

from __future__ import annotations

import heapq
import math
from functools import lru_cache

import numpy as np

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 6  # fewer show structure at stride sqrt(n); with 6, 11 statistics find no difference to a true shuffle
_SMALL = 4096  # up to here a sorted hash: a Feistel network of a few elements is visibly non-uniform


def splitmix64(x):
    """SplitMix64 (Steele, Lea, Flood 2014): adds its constant and applies its finalizer to an int or a uint64 array."""
    if isinstance(x, np.ndarray):
        x = x + np.uint64(_GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
    x = (x + _GOLDEN) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def keys(ids: tuple[int, ...], count: int) -> list[int]:
    """`count` independent 64-bit keys for a tuple of ids. Ids are hashed in turn, not added: (7, 1) differs from (8, 0)."""
    key = 0
    for value in ids:
        key = splitmix64(key ^ (value & _MASK64))
    chain = []
    for _ in range(count):
        key = splitmix64(key)
        chain.append(key)
    return chain


class Permutation:
    """A shuffle of range(n) keyed by `ids`, without a table: O(1) per element, and invertible.

    n <= 4096 sorts hashes. Larger n use a Feistel network over a grid of a * b >= n cells (Black and Rogaway 2002, generalized
    Feistel cipher); results outside range(n) follow their cycle back into it. a * b - n < a, so that is rare.
    """

    def __init__(self, n: int, ids: tuple[int, ...]):
        if not 1 <= n < 1 << 62:
            raise ValueError(f"n = {n}: a permutation needs 1 <= n < 2^62 elements")
        self.n = n
        self._table = None
        if n <= _SMALL:
            key = np.uint64(keys(ids, 1)[0])
            index = np.arange(n, dtype=np.uint64)
            self._table = np.argsort(splitmix64(splitmix64(index ^ key) + key), kind="stable")
            return
        a = math.isqrt(n - 1) + 1
        self._a, self._b = np.uint32(a), np.uint32(-(-n // a))
        self._keys = [np.uint32(key & 0xFFFFFFFF) for key in keys(ids, _ROUNDS)]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Elements (int64 array) at ranks `x` (array of integers in [0, n))."""
        x = np.asarray(x, dtype=np.int64)
        return self._table[x] if self._table is not None else self._walk(x, forward=True)

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """Ranks of the elements `y`."""
        y = np.asarray(y, dtype=np.int64)
        return np.argsort(self._table)[y] if self._table is not None else self._walk(y, forward=False)

    def _walk(self, x: np.ndarray, forward: bool) -> np.ndarray:
        flat = np.atleast_1d(x).ravel().astype(np.uint64)
        out = self._network(flat, forward)
        while (outside := np.flatnonzero(out >= np.uint64(self.n))).size:
            out[outside] = self._network(out[outside], forward)
        return out.astype(np.int64).reshape(x.shape)

    def _network(self, x: np.ndarray, forward: bool) -> np.ndarray:
        left, right = (part.astype(np.uint32) for part in np.divmod(x, np.uint64(self._b)))
        rounds = range(_ROUNDS) if forward else reversed(range(_ROUNDS))
        for i in rounds:
            if i % 2 == 0:
                left = _rotate(left, right, self._keys[i], self._a, forward)
            else:
                right = _rotate(right, left, self._keys[i], self._b, forward)
        return left.astype(np.uint64) * np.uint64(self._b) + right


def _rotate(half: np.ndarray, other: np.ndarray, key: np.uint32, size: np.uint32, forward: bool) -> np.ndarray:
    """half plus (or minus) a hash of the other half, modulo size; uint32 arrays, size < 2^31."""
    h = other ^ key  # "lowbias32" by Chris Wellons, public domain
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x7FEB352D)
    h ^= h >> np.uint32(15)
    h *= np.uint32(0x846CA68B)
    h ^= h >> np.uint32(16)
    shift = ((h.astype(np.uint64) * np.uint64(size)) >> np.uint64(32)).astype(np.uint32)
    if forward:
        moved = half + shift
        return np.minimum(moved, moved - size)  # below size the subtraction wraps to a huge number
    moved = half - shift
    return np.minimum(moved, moved + size)  # above zero the addition is the larger; below, it wraps back


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


class Order:
    """position -> (source, epoch, sample) for sources of `num_samples` samples each, blended by `weights`, keyed by `seed`.

    Each source is read epoch by epoch: every sample once per epoch, in a fresh order keyed by (seed, source, epoch).
    """

    def __init__(self, num_samples: list[int], weights: list[float], seed: int):
        self.num_samples, self.seed = num_samples, seed
        self.blend = Blend(weights)
        self._permutation = lru_cache(maxsize=4 * len(num_samples))(self._build)

    def _build(self, source: int, epoch: int) -> Permutation:
        return Permutation(self.num_samples[source], (self.seed, source, epoch))

    def locate(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(sources, epochs, samples), int64 (count,) each, of the positions [position, position + count)."""
        if position < 0 or count < 0:
            raise ValueError(f"position and count must be >= 0, got {position} and {count}")
        return self.at(np.arange(position, position + count, dtype=np.uint64))

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(sources, epochs, samples), int64 (n,) each, of sorted positions (n,)."""
        sources, samples = self.blend.locate(positions)
        epochs = np.zeros_like(samples)
        for source in np.unique(sources).tolist():
            of_source = np.flatnonzero(sources == source)
            epochs[of_source], ranks = np.divmod(samples[of_source], self.num_samples[source])
            for epoch in np.unique(epochs[of_source]).tolist():
                chosen = epochs[of_source] == epoch
                samples[of_source[chosen]] = self._permutation(source, epoch)(ranks[chosen])
        return sources, epochs, samples

    def positions(self, source: int, epoch: int, samples: np.ndarray) -> np.ndarray:
        """Positions of samples of `source` in that source's `epoch`, (n,) -> (n,) int64: the inverse of `locate`."""
        ranks = self._permutation(source, epoch).inverse(samples) + epoch * self.num_samples[source]
        return np.array([self.blend.position(source, rank) for rank in ranks.tolist()], dtype=np.int64)
