"""How well a tokenizer fits texts: compression, fertility, fallback to bytes, unused ids. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from .encoding import Chunk, Encoded
from .tokenizer import Tokenizer


@dataclass
class Usage:
    """What a tokenizer makes of one source, or of several. End-of-document ids are not counted."""

    counts_V: np.ndarray
    """How often each id occurs."""
    documents: int = 0
    utf8_bytes: int = 0
    characters: int = 0
    words: int = 0
    """Parts between white space."""
    unknown_tokens: int = 0
    lost_characters: int = 0
    """That no id represents."""
    compared: int = 0
    """Documents whose first tokens were decoded and compared with their text."""
    changed: list[tuple[str, str]] = field(default_factory=list)
    """(text, what it decodes to) for each of these that differs."""

    @classmethod
    def empty(cls, tokenizer: Tokenizer) -> Usage:
        """The usage of no text."""
        return cls(np.zeros(tokenizer.vocab_size, np.int64))

    def add(self, chunk: Chunk, encoded: Encoded, end_of_document_id: int) -> None:
        """Counts a chunk of documents."""
        counts_V = np.bincount(encoded.tokens, minlength=len(self.counts_V))
        counts_V[end_of_document_id] -= len(encoded.lengths)
        self.counts_V += counts_V
        self.documents += len(chunk.texts)
        self.utf8_bytes += int(encoded.utf8_bytes.sum())
        self.characters += int(encoded.characters.sum())
        self.words += sum(len(text.split()) for text in chunk.texts)
        self.unknown_tokens += encoded.unknown_tokens
        self.lost_characters += sum(len(piece) * n for lost in encoded.lost.values() for piece, n in lost.items())
        self.compared += encoded.compared
        self.changed += encoded.changed

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.counts_V.sum())

    def rates(self, byte_ids: list[int]) -> dict[str, float]:
        """Figures per token, per word and as fractions; `byte_ids` are those of `Tokenizer.byte_ids`."""
        tokens, characters = max(1, self.tokens), max(1, self.characters)
        return {
            "bytes_per_token": self.utf8_bytes / tokens,
            "characters_per_token": self.characters / tokens,
            "tokens_per_word": self.tokens / max(1, self.words),
            "byte_fraction": int(self.counts_V[byte_ids].sum()) / tokens,
            "unknown_fraction": max(self.unknown_tokens / tokens, self.lost_characters / characters),
            "changed_fraction": len(self.changed) / max(1, self.compared),
        }

    def figures(self, byte_ids: list[int]) -> dict[str, float]:
        """The counts, and `rates`."""
        names = ("documents", "tokens", "utf8_bytes", "characters", "words")
        return {name: getattr(self, name) for name in names} | self.rates(byte_ids)


def ranges(ids: Iterable[int]) -> list[tuple[int, int]]:
    """(first, last) of each run of consecutive ids; `ids` are sorted."""
    groups = itertools.groupby(enumerate(ids), lambda pair: pair[1] - pair[0])
    runs = [[id for _, id in group] for _, group in groups]
    return [(run[0], run[-1]) for run in runs]


def piece_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Characters that each id decodes to alone, (V,); 0 for special ids and parts of characters."""
    texts = (tokenizer.decode([id]) for id in range(tokenizer.vocab_size))
    return np.array([0 if "\ufffd" in text else len(text) for text in texts])
