"""Synthetic tokens are pure functions of the sample number, and `reference_lines` gives their losses."""

import math

import numpy as np
import pytest

from pretrain.config import SyntheticConfig
from pretrain.data.entropy import bigram_entropy, unigram_entropy
from pretrain.data.passes import Cut
from pretrain.data.synthetic import SyntheticSource

KINDS = ["uniform", "unigram", "markov", "repeat", "copy"]


def source(kind: str, split: str = "train", *, seed: int = 1, vocab_size: int = 97, sequence_length: int = 64, samples=1000):
    config = SyntheticConfig(kind=kind, num_samples=samples)
    return SyntheticSource(config, split, seed=seed, vocab_size=vocab_size, block_length=sequence_length)


def read(data: SyntheticSource, samples: np.ndarray) -> np.ndarray:
    return data.read(samples, Cut(data.length - 1, data.length - 1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_depends_on_seed_split_and_number_only(kind):
    expected = read(source(kind), np.arange(100))
    assert np.array_equal(read(source(kind), np.array([70, 3]))[1], expected[3])
    assert expected.shape == (100, 65) and expected.dtype == np.int64
    for other in (source(kind, seed=2), source(kind, "valid")):
        assert not (read(other, np.arange(100)) == expected).all(axis=1).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [1, 2, 3, 5, 4096])
@pytest.mark.parametrize("sequence_length", [1, 2, 31])
def test_ids_are_in_the_vocabulary(kind, vocab_size, sequence_length):
    tokens = read(source(kind, vocab_size=vocab_size, sequence_length=sequence_length), np.arange(50))
    assert tokens.min() >= 0 and tokens.max() < vocab_size


@pytest.mark.parametrize("kind", ["uniform", "unigram", "markov"])
def test_measured_entropies_equal_the_reference_lines(kind):
    data = source(kind, sequence_length=499)
    tokens = read(data, np.arange(2000))
    lines = data.reference_lines
    assert unigram_entropy(np.bincount(tokens.ravel(), minlength=97)) == pytest.approx(lines["unigram"], rel=2e-3)
    assert bigram_entropy(list(tokens), 97) == pytest.approx(lines["bigram"], rel=1e-2)
    assert lines["floor"] == lines["bigram"] and lines["uniform"] == math.log(97)


@pytest.mark.parametrize("sequence_length", [1, 2, 63, 64])
def test_copy_repeats_its_first_half_and_its_floor_counts_only_new_tokens(sequence_length):
    data = source("copy", sequence_length=sequence_length)
    tokens, half = read(data, np.arange(20)), (sequence_length + 1) // 2
    assert np.array_equal(tokens[:, half:], tokens[:, : sequence_length + 1 - half])
    assert data.reference_lines["floor"] == pytest.approx((half - 1) / sequence_length * math.log(97))


def test_repeat_has_eight_texts_with_distinct_first_tokens_and_others_for_validation():
    texts = {tuple(text) for text in read(source("repeat"), np.arange(1000)).tolist()}
    assert len(texts) == 8 == len({text[0] for text in texts})
    assert not texts & {tuple(text) for text in read(source("repeat", "valid"), np.arange(200)).tolist()}
    assert source("repeat").reference_lines["floor"] == 0
    assert source("repeat", "valid").reference_lines["floor"] == math.log(97)


def test_validation_is_small_and_no_larger_than_training():
    assert source("uniform", "valid", samples=10**6).num_blocks(16) == 256
    assert source("uniform", "valid", samples=9).num_blocks(16) == 9


def test_golden_tokens():
    """Runs on other machines and numpy versions must see the same tokens."""
    golden = {
        "uniform": [27, 77, 71, 24, 33, 49, 53, 26],
        "unigram": [1, 33, 25, 1, 2, 7, 8, 1],
        "markov": [91, 55, 66, 45, 73, 11, 59, 58],
        "repeat": [66, 66, 88, 39, 0, 56, 14, 75],
        "copy": [27, 77, 71, 24, 27, 77, 71, 24],
    }
    assert {kind: read(source(kind, sequence_length=7), np.array([5]))[0].tolist() for kind in KINDS} == golden


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_cut_into_shorter_samples_that_share_one_token(kind):
    data = source(kind)
    parts = data.read(np.arange(8, 12), Cut(16, 64))
    assert np.array_equal(np.concatenate([parts[0], *parts[1:, 1:]]), read(data, np.array([2]))[0])
