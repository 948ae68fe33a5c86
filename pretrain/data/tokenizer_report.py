"""How well a tokenizer fits texts: compression, fertility, fallback to bytes, unused ids. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .encoding import Chunk, Encoded
from .errors import DataError
from .indexed import TokenFile
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


class DecodedTexts:
    """Documents of token files, decoded: evenly spaced ones, about `most_tokens` together, from each file as many as its share.

    With the attributes of a `Corpus` that a report needs. Raises DataError for files without a document index.
    """

    sha256 = ""

    def __init__(self, files: list[TokenFile], tokenizer: Tokenizer, most_tokens: int):
        self._files, self._tokenizer, self.read_bytes = files, tokenizer, 0
        for file in files:
            if file.num_documents is None:
                raise DataError(f"{file.path}: a flat .bin has no documents to decode; convert it with tools/convert_data.py")
        fraction = min(1.0, most_tokens / sum(file.num_tokens for file in files))
        self._counts = [max(1, round(fraction * file.num_documents)) for file in files]
        self.total_bytes = round(fraction * sum(file.num_tokens * file.dtype.itemsize for file in files))

    def documents(self) -> Iterator[tuple[str, str]]:
        """(name, text) of each document with text."""
        for file, count in zip(self._files, self._counts, strict=True):
            for i in np.unique(np.linspace(0, file.num_documents - 1, count).astype(np.int64)).tolist():
                tokens = file.document(i)
                self.read_bytes += tokens.nbytes
                text = self._tokenizer.decode(tokens.tolist())  # the end-of-document id decodes to nothing
                if text:
                    yield f"{file.path}:{i}", text

    def problems(self) -> list[str]:
        """None that are worth a line."""
        return []


def tokenizer_of(file: TokenFile, folder: str | None) -> Tokenizer | None:
    """The tokenizer in `folder`, else the one that the sidecar names if it is still there, else None. Raises DataError."""
    if folder:
        return Tokenizer.load(folder)
    if file.sidecar and Path(file.sidecar.tokenizer_path).is_dir():
        tokenizer = Tokenizer.load(file.sidecar.tokenizer_path)
        return tokenizer if tokenizer.fingerprint == file.sidecar.tokenizer_fingerprint else None
    return None


def folder_of_tokenizer(file: TokenFile) -> str:
    """The tokenizer with which a token file was made. Raises DataError if it is not where it was."""
    if tokenizer_of(file, None) is None:
        raise DataError(f"{file.path}: its tokenizer is unknown or no longer where it was; name it (--tokenizer)")
    return file.sidecar.tokenizer_path


def own_tokenizer(file: TokenFile, folder: str | None) -> Tokenizer:
    """The tokenizer that decodes a token file: of its sidecar, else that in `folder`. Raises DataError."""
    if folder:
        given = Tokenizer.load(folder)
        if file.sidecar is None or file.sidecar.tokenizer_fingerprint == given.fingerprint:
            return given
    return Tokenizer.load(folder_of_tokenizer(file))


def ranges(ids: Iterable[int]) -> list[tuple[int, int]]:
    """(first, last) of each run of consecutive ids; `ids` are sorted."""
    groups = itertools.groupby(enumerate(ids), lambda pair: pair[1] - pair[0])
    runs = [[id for _, id in group] for _, group in groups]
    return [(run[0], run[-1]) for run in runs]


def piece_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Characters that each id decodes to alone, (V,); 0 for special ids and parts of characters."""
    texts = (tokenizer.decode([id]) for id in range(tokenizer.vocab_size))
    return np.array([0 if "\ufffd" in text else len(text) for text in texts])
