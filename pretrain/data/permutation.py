"""Shuffles without a table: keys from ids, and a keyed permutation that maps any element in O(1) time and memory.

Integers only. Golden values in the tests freeze the constants: changing one changes the order of every run.
"""

from __future__ import annotations

import math

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
