"""Generated tokens whose best possible loss is known: for tests, dry runs and demonstrations.

Every sample is a pure function of (seed, split, index), in integers: the same on every machine, without state. The two splits
draw disjoint streams. No files, no torch.

    kind      properties                                              floor, nats per token
    uniform   labels carry no information; nothing to learn           ln V
    unigram   Zipf frequencies without context                        entropy of the frequencies
    markov    the next token depends on the previous one only         entropy of the steps (1/2, 1/4, 1/8, 1/8): 1.75 ln 2
    repeat    eight fixed texts to memorize; validation has others    0; validation: ln V
    copy      the second half repeats the first; needs long context   about half of ln V
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from pretrain.data.config import SyntheticConfig

from .passes import Cut
from .permutation import Permutation, keys, splitmix64

_SPLITS = {"train": 0, "valid": 1}
_TEXTS = 8
_VALID_SAMPLES = 256


class SyntheticSource:
    """Texts of L + 1 tokens with ids below `vocab_size`, from which samples are cut. `reference_lines`: known losses, nats per
    token."""

    sidecar, files, where, max_epochs = None, (), "data.synthetic", None

    def __init__(
        self, config: SyntheticConfig, split: Literal["train", "valid"], *, seed: int, vocab_size: int, block_length: int
    ):
        self.kind, self.vocab_size, self.length = config.kind, vocab_size, block_length + 1
        self.name = f"synthetic-{config.kind}"
        self._texts = config.num_samples if split == "train" else min(config.num_samples, _VALID_SAMPLES)
        self.num_tokens = self._texts * block_length
        self._ids = (seed, _SPLITS[split])
        self._alphabet = Permutation(vocab_size, (seed, vocab_size))  # same for both splits: a model of markov must learn it
        weights = 1 / np.arange(1, vocab_size + 1)
        self._zipf = weights / math.fsum(weights)  # exact on every machine, like everything here
        steps = min(vocab_size, 4)
        self._steps = np.array([2.0 ** -min(i + 1, steps - 1) for i in range(steps)])
        self.reference_lines = self._reference_lines(split)

    def fingerprint(self) -> str:
        """Names everything that determines the samples, except the seed."""
        return f"{self.name} of {self._texts} samples of {self.vocab_size} ids"

    def num_blocks(self, block_length: int) -> int:
        """Texts; block_length is that of the source."""
        return self._texts

    def num_labels(self, block_length: int) -> int:
        """Labels of all texts."""
        return self._texts * block_length

    def labels_of(self, samples: np.ndarray, cut: Cut) -> np.ndarray:
        """Number of labels (n,) of the samples (n,): T."""
        return np.full(len(samples), cut.sequence_length)

    def read(self, samples: np.ndarray, cut: Cut) -> np.ndarray:
        """Tokens (n, T + 1) int64 of the samples (n,)."""
        blocks, parts = np.divmod(samples, cut.samples_per_block)
        places = parts[:, None] * cut.sequence_length + np.arange(cut.sequence_length + 1)
        return np.take_along_axis(self._read(blocks), places, axis=1)

    def _read(self, samples: np.ndarray) -> np.ndarray:
        if self.kind == "repeat":  # a text is the uniform sample of a small index
            texts = splitmix64(samples.astype(np.uint64)) % np.uint64(_TEXTS)
            tokens = _below(self._bits(texts), self.vocab_size)
            if self.vocab_size >= _TEXTS:  # the first token identifies the text, so all labels are predictable
                groups = self.vocab_size // _TEXTS
                tokens[:, 0] = tokens[:, 0] // _TEXTS % groups * _TEXTS + texts.astype(np.int64)
            return tokens
        bits = self._bits(samples.astype(np.uint64))
        if self.kind == "unigram":
            return _choose(bits, self._zipf)
        if self.kind == "markov":  # a walk on a ring of shuffled ids, so every id is equally frequent
            places = _choose(bits, self._steps) + 1
            places[:, 0] = _below(bits[:, 0], self.vocab_size)
            return self._alphabet(np.cumsum(places, axis=1) % self.vocab_size)
        tokens = _below(bits, self.vocab_size)
        if self.kind == "copy":
            half = self.length // 2
            tokens = tokens[:, np.arange(self.length) % half]
        return tokens

    def documents(self, samples: np.ndarray, tokens: np.ndarray, cut: Cut) -> np.ndarray:
        """Document numbers (n, T): zeros, each sample is one document."""
        return np.zeros((len(samples), cut.sequence_length), dtype=np.int64)

    def _bits(self, samples: np.ndarray) -> np.ndarray:
        """64 random bits per token, uint64 (n, T + 1): the SplitMix64 sequence of the sample's key."""
        key = np.uint64(keys(self._ids, 1)[0])
        start = splitmix64(splitmix64(samples ^ key) + key)
        return splitmix64(start[:, None] + np.arange(self.length, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))

    def _reference_lines(self, split: str) -> dict[str, float]:
        uniform = math.log(self.vocab_size)
        lines = dict.fromkeys(("uniform", "unigram", "bigram", "floor"), uniform)
        if self.kind == "unigram":
            lines |= dict.fromkeys(("unigram", "bigram", "floor"), _entropy(self._zipf))
        elif self.kind == "markov":
            lines |= dict.fromkeys(("bigram", "floor"), _entropy(self._steps))
        elif self.kind == "repeat":
            lines = {"uniform": uniform, "floor": 0.0 if split == "train" else uniform}
            if self.vocab_size < _TEXTS:
                del lines["floor"]
        elif self.kind == "copy":
            lines["floor"] = (self.length // 2 - 1) / (self.length - 1) * uniform
        return lines


def _below(bits: np.ndarray, n: int) -> np.ndarray:
    """Uniform integers in [0, n), int64."""
    return ((bits >> np.uint64(32)) * np.uint64(n) >> np.uint64(32)).astype(np.int64)


def _choose(bits: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Indices drawn with the given probabilities, int64."""
    thresholds = np.floor(np.cumsum(probabilities[:-1]) * 2.0**32).astype(np.uint64)
    return np.searchsorted(thresholds, bits >> np.uint64(32), side="right")


def _entropy(probabilities: np.ndarray) -> float:
    return float(-(probabilities * np.log(probabilities)).sum())
