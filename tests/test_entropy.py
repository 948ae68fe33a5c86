"""Reference losses are what real models without context, or with one token of it, can reach."""

import math

import numpy as np
import pytest

from pretrain.data import entropy
from pretrain.data.entropy import bigram_entropy, unigram_entropy


def markov_tokens(count: int, vocab_size: int, seed: int = 0) -> tuple[np.ndarray, float]:
    """Tokens with three equally likely followers each, and their entropy rate ln 3."""
    rng = np.random.default_rng(seed)
    tokens, token = np.empty(count, dtype=np.uint16), 0
    for i, step in enumerate(rng.integers(1, 4, count)):
        token = (7 * token + int(step)) % vocab_size
        tokens[i] = token
    return tokens, math.log(3)


def test_unigram_entropy_of_known_histograms():
    assert unigram_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4))
    assert unigram_entropy(np.array([0, 9])) == 0
    p = np.array([1, 2, 5]) / 8
    assert unigram_entropy(np.array([100, 200, 500])) == pytest.approx(-(p * np.log(p)).sum())


def test_bigram_entropy_of_a_chain_approaches_its_entropy_rate_from_above():
    tokens, rate = markov_tokens(200_000, 97)
    losses = [bigram_entropy([tokens[:count]], 97) for count in (2_000, 20_000, 200_000)]
    assert losses[0] > losses[1] > losses[2] > rate
    assert losses[2] == pytest.approx(rate, rel=0.005)


@pytest.mark.parametrize("count", [500, 5_000, 50_000])
def test_bigram_entropy_of_random_tokens_is_not_below_the_uniform_loss(count):
    tokens = np.random.default_rng(1).integers(0, 512, count)
    loss = bigram_entropy([tokens], 512)
    assert math.log(512) * 0.995 < loss < math.log(512) * 1.05  # the plug-in entropy of 500 such tokens is below 0.01


def test_bigram_entropy_is_the_loss_of_a_model_that_has_not_seen_the_token():
    """Brute force: remove each token, count again, smooth, score; the best of the same grid."""
    tokens = np.random.default_rng(2).integers(0, 6, 60)
    vocab_size, pairs = 7, list(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))

    def loss(discount: float, strength: float) -> float:
        nats = 0.0
        for i, (a, b) in enumerate(pairs):
            others = pairs[:i] + pairs[i + 1 :]
            frequency = sum(second == b for _, second in others)
            types = len({second for _, second in others})
            p = (frequency + types / vocab_size) / (len(others) + types)
            after = [second for first, second in others if first == a]
            p = (max(after.count(b) - discount, 0) + (strength + discount * len(set(after))) * p) / (len(after) + strength)
            nats -= math.log(p)
        return nats / len(pairs)

    grid = [loss(d, 4.0**k) for d in (0.0, 0.5, 0.8) for k in range(-1, 12)]
    assert bigram_entropy([tokens], vocab_size) == pytest.approx(min(grid), rel=1e-12)


def test_the_strength_with_the_lowest_loss_is_found_without_trying_all(monkeypatch):
    """The loss falls and then rises along the strengths, for tokens of many kinds."""
    rng, found = np.random.default_rng(0), []
    for vocab_size in (3, 50, 1000, 50_000):
        for size in (2, 5, 30, 1000, 30_000):
            skewed = np.minimum(rng.zipf(1.3, size), vocab_size) - 1
            doubled = np.repeat(rng.integers(0, vocab_size, size // 2 + 1), 2)[:size]
            found += [([tokens], vocab_size) for tokens in (rng.integers(0, vocab_size, size), skewed, doubled)]
        found.append(([markov_tokens(30_000, vocab_size)[0]], vocab_size))
    quick = [bigram_entropy(*each) for each in found]
    monkeypatch.setattr(entropy, "_lowest", lambda loss, strengths: min(map(loss, strengths)))
    assert quick == [bigram_entropy(*each) for each in found]


def test_runs_are_not_joined():
    tokens = markov_tokens(4_000, 97)[0]
    runs = np.split(tokens, 40)
    assert bigram_entropy(runs, 97) < bigram_entropy([np.concatenate(runs[::-1])], 97)


@pytest.mark.parametrize("tokens", [[], [3], [3, 3], [3, 4, 5, 6, 7, 2]])
def test_too_few_tokens_give_the_uniform_loss(tokens):
    assert bigram_entropy([np.array(tokens, dtype=np.uint16)], 10) == math.log(10)


def test_memory_grows_with_the_pairs_and_not_with_the_square_of_the_vocabulary():
    tokens = np.random.default_rng(0).integers(0, 128_000, 10_000)
    assert bigram_entropy([tokens], 128_000) > 11  # a dense table would have 1.6e10 cells
