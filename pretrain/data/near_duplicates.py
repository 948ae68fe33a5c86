"""Near-duplicates: documents that share most of their runs of words with an earlier one. MinHash and LSH of `datasketch`.

Two documents are as similar as the Jaccard index of their sets of shingles, which are runs of `words` words without regard to
case, punctuation and space. In scripts that do not separate words, each character is one. A document is compared with those
kept before it, never with one that was left out, so that chains of small changes do not remove what is unlike all that is kept.
The result depends on the texts, their order and the three numbers only.

The index is in memory and grows with the documents kept. `benchmarks/near_duplicates.py` measures speed and memory.

Source: A. Broder, "On the resemblance and containment of documents", 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive
Datasets", chapter 3.
"""

from __future__ import annotations

import re

import numpy as np
import xxhash

from .indexed import DataError

SIMILARITY, WORDS, PERMUTATIONS = 0.8, 5, 128
_SEED = 1
_UNSEPARATED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Thai, Lao, Burmese, Khmer, Kana, Han."""
_WORD = re.compile(rf"[{_UNSEPARATED}]|[^\W{_UNSEPARATED}]+")
_SHINGLES_AT_ONCE = 1024  # so that their permutations stay in a core's cache
_WEIGHTS = (0.1, 0.9)  # of wrong and of missed candidates: wrong ones cost only a comparison


class NearDuplicates:
    """Tells new documents from near-duplicates of earlier ones. `num_dropped`: near-duplicates so far.

    `similarity`: the least that makes a near-duplicate, from 0.3 to 0.98. `words`: words per shingle. `permutations`: numbers
    per document, from which the similarity is estimated with a standard error of at most 0.5 / sqrt(permutations).
    """

    def __init__(self, similarity: float = SIMILARITY, words: int = WORDS, permutations: int = PERMUTATIONS):
        """Raises DataError."""
        try:
            import datasketch
        except ImportError:
            raise DataError("near-duplicates are found by the package datasketch: pip install datasketch") from None
        for flag, value, least, most in (
            ("similarity", similarity, 0.3, 0.98),
            ("words", words, 1, 100),
            ("permutations", permutations, 64, 4096),
        ):
            if not least <= value <= most:
                raise DataError(f"--duplicate-{flag}: got {value}, must be from {least} to {most}")
        self._similarity, self._words = similarity, words
        self._empty = datasketch.MinHash(permutations, _SEED, hashfunc=xxhash.xxh32_intdigest, scheme="affine32")
        self._index = datasketch.MinHashLSH(similarity, permutations, weights=_WEIGHTS, hashfunc=xxhash.xxh3_64_intdigest)
        self._kept: list[tuple[str, np.ndarray]] = []  # (name, its numbers) of documents, by their keys in the index
        self._version, self.num_dropped, self._first = datasketch.__version__, 0, ("", "")

    def is_new(self, name: str, text: str) -> bool:
        """False: the document `name` is a near-duplicate of one for which this was True."""
        sketch = self._empty.copy()
        shingles = self._shingles(text)
        for start in range(0, len(shingles), _SHINGLES_AT_ONCE):
            sketch.update_batch(shingles[start : start + _SHINGLES_AT_ONCE])
        for key in sorted(self._index.query(sketch)):
            kept, numbers = self._kept[key]
            if np.mean(numbers == sketch.hashvalues) >= self._similarity:
                self._first = self._first if self.num_dropped else (name, kept)
                self.num_dropped += 1
                return False
        self._index.insert(len(self._kept), sketch, check_duplication=False)
        self._kept.append((name, sketch.hashvalues))
        return True

    def description(self) -> dict:
        """For metadata sidecars and tokenizers."""
        return {
            "dropped": self.num_dropped,
            "similarity": self._similarity,
            "words": self._words,
            "permutations": len(self._empty),
            "datasketch": self._version,
        }

    def problems(self) -> list[str]:
        """A sentence that counts what was dropped, if anything was."""
        if not self.num_dropped:
            return []
        document, kept = self._first
        return [f"{self.num_dropped:,} near-duplicates were left out; the first, {document}, is like {kept}"]

    def _shingles(self, text: str) -> list[bytes]:
        """The different runs of words, in any order; of a text without words, the text itself."""
        words = " ".join(_WORD.findall(text.casefold())).encode().split(b" ")
        if words == [b""]:
            return [text.strip().encode()]
        return list({b" ".join(words[i : i + self._words]) for i in range(max(1, len(words) - self._words + 1))})
