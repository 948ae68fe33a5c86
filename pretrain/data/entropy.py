"""Reference losses of a token stream, in nats per token: of models that see no context, or one token of it.

They explain a plateau of the loss: at ln V the labels carry no information, at the unigram entropy the model ignores the
context, below the bigram line it uses more than one token of context.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

_DISCOUNTS = (0.0, 0.5, 0.8)
_STRENGTHS = tuple(4.0**k for k in range(-1, 12))


def unigram_entropy(counts_V: np.ndarray) -> float:
    """Entropy of a histogram of ids (V,), in nats: the loss of a model that knows only how frequent each id is."""
    counts = counts_V[counts_V > 0].astype(np.float64)
    total = counts.sum()
    return float(math.log(total) - (counts * np.log(counts)).sum() / total)


def bigram_entropy(runs: list[np.ndarray], vocab_size: int) -> float:
    """Loss, in nats per token, of a bigram model that predicts every token from the counts of all *other* tokens of `runs`.

    The plain conditional entropy of bigram counts is far too low on small data: most pairs occur once and would "predict"
    themselves. So each occurrence is removed from the counts before it is scored, and the counts are smoothed: with c(a)
    tokens after a, of which t(a) are distinct, p(b | a) = (max(c(ab) - d, 0) + (s + d t(a)) p(b)) / (c(a) + s), the
    predictive rule of a Pitman-Yor process; p(b) falls back to 1 / V. Discount d and strength s are those of a small grid
    with the lowest loss; a large s gives the unigram model. A real model of this kind has this loss on unseen text of the
    same kind, so it is a true upper bound of the bigram entropy.

    `runs`: 1-D integer arrays of consecutive tokens. Memory grows with the distinct pairs, never with V * V.
    """
    pairs, count = _counted(runs, vocab_size)
    total = int(count.sum())
    if total < 2:
        return math.log(vocab_size)
    first, second = np.divmod(pairs, vocab_size)
    followers = np.bincount(first, weights=count, minlength=vocab_size)[first] - 1
    distinct = np.bincount(first, minlength=vocab_size)[first] - (count == 1)
    frequency = np.bincount(second, weights=count, minlength=vocab_size)
    types = np.count_nonzero(frequency) - (frequency[second] == 1)
    p_unigram = (frequency[second] - 1 + types / vocab_size) / (total - 1 + types)

    def loss(discount: float, strength: float) -> float:
        p = (np.maximum(count - 1 - discount, 0) + (strength + discount * distinct) * p_unigram) / (followers + strength)
        return float(-(count * np.log(p)).sum() / total)

    best = min(_lowest(functools.partial(loss, discount), _STRENGTHS) for discount in _DISCOUNTS)
    return min(best, math.log(vocab_size))  # very few tokens mislead the model: then guessing is better


def _lowest(loss: Callable[[float], float], strengths: tuple[float, ...]) -> float:
    """The lowest loss over `strengths`: it falls and then rises along them, so most need not be tried."""
    low, high = 0, len(strengths) - 1
    known: dict[int, float] = {}

    def at(i: int) -> float:
        if i not in known:
            known[i] = loss(strengths[i])
        return known[i]

    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle) <= at(middle + 1) else (middle + 1, high)
    return at(low)


def _counted(runs: list[np.ndarray], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(pairs, count) of the distinct pairs of neighbours, sorted, both int64; the pair (a, b) is a * vocab_size + b."""
    dtype = np.uint32 if vocab_size**2 <= 2**32 else np.int64  # half the bytes sort in 0.6 of the time
    pairs = np.concatenate([run[:-1].astype(dtype) * dtype(vocab_size) + run[1:].astype(dtype) for run in runs])
    pairs.sort()
    starts = np.flatnonzero(np.concatenate([[True], pairs[1:] != pairs[:-1]])) if len(pairs) else np.empty(0, np.int64)
    return pairs[starts].astype(np.int64), np.diff(starts, append=len(pairs))
