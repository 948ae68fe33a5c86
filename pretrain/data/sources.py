"""Sources: token files cut into windows, opened and checked.

A source is cut into blocks of L tokens, which the sequence length T divides; without stages, L = T. Sample i is tokens i * T to
i * T + T of its source: T inputs and their T labels; it shares one token with the next sample.
Opening checks the data and reports all problems at once. Reads are positioned reads without a shared cursor, so they are
thread-safe. No torch.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from pretrain.config import DataConfig, SourceConfig

from .checks import check_fit
from .entropy import unigram_entropy
from .indexed import DataError, TokenFile
from .passes import Cut


class FileSource:
    """A token file."""

    def __init__(self, file: TokenFile, vocab_size: int):
        self.file, self.vocab_size = file, vocab_size
        self.name, self.sidecar = Path(file.path).name, file.sidecar
        self.num_tokens = file.num_tokens
        file.watch()
        if file.sidecar:
            self.reference_lines = {"unigram": file.sidecar.unigram_entropy_nats, "bigram": file.sidecar.bigram_entropy_nats}
        else:
            self.reference_lines = {"unigram": unigram_entropy(np.unique(file.sample(), return_counts=True)[1])}

    def fingerprint(self) -> str:
        """Hash of the content, not of the path."""
        return self.file.fingerprint()

    def num_blocks(self, block_length: int) -> int:
        """Complete blocks, each with the label of its last token."""
        return (self.num_tokens - 1) // block_length

    def read(self, samples: np.ndarray, cut: Cut) -> np.ndarray:
        """Tokens (n, T + 1) of the samples (n,), in the file's dtype; id 0 after the end of the file.

        Raises DataError for an id outside the vocabulary (opening checks only a sample of a file without a sidecar) and for a
        file that was rewritten since it was opened.
        """
        self.file.require_unchanged()
        starts, length = samples * cut.sequence_length, cut.sequence_length + 1
        lengths = np.minimum(length, self.num_tokens - starts)
        tokens = self.file.read(starts, lengths)
        if len(tokens) < len(samples) * length:
            tokens, found = np.zeros((len(samples), length), dtype=tokens.dtype), tokens
            tokens[np.arange(length) < lengths[:, None]] = found
        tokens = tokens.reshape(-1, length)
        if tokens.size and (tokens.max() >= self.vocab_size or tokens.min() < 0):
            row, offset = np.argwhere((tokens < 0) | (tokens >= self.vocab_size))[0].tolist()
            sample = f"sample {samples[row]} of {self.name}"
            place = f"{self.file.bin_path}: token {starts[row] + offset:,} is id {tokens[row, offset]}, in {sample}"
            advice = f"tokenize again, or exclude {sample} (data.quarantine)"
            if self.sidecar:
                advice = "the file was changed after it was written; restore it, or tokenize again"
            raise DataError(f"{place}; the model has ids 0 to {self.vocab_size - 1}; {advice}")
        return tokens

    def documents(self, samples: np.ndarray, tokens: np.ndarray, cut: Cut) -> np.ndarray:
        """Document numbers (n, T) within each sample; `tokens` (n, T + 1) come from `read`.

        With a sidecar, which guarantees that the end-of-document id occurs nowhere else, they follow from the tokens; without
        one, from the index.
        """
        if self.sidecar:
            return documents_of(tokens, self.sidecar.end_of_document_id)
        length = cut.sequence_length
        starts = np.zeros((len(samples), length), dtype=bool)
        for row, first in enumerate((samples * length).tolist()):
            last = first + length - 1
            numbers = np.arange(self.file.document_at(first) + 1, self.file.document_at(last) + 1)
            places = self.file.document_starts(numbers) - first
            if places.size and not 0 <= places.min() <= places.max() < length:
                raise DataError(f"{self.file.path}.idx: contradicts itself around token {first:,}; restore it")
            starts[row, places] = True
        return np.cumsum(starts, axis=1)


def documents_of(tokens: np.ndarray, end_of_document_id: int) -> np.ndarray:
    """Document numbers (n, T) within windows (n, T + 1) in which that id ends each document and occurs nowhere else."""
    starts = np.zeros((len(tokens), tokens.shape[1] - 1), dtype=bool)
    starts[:, 1:] = tokens[:, :-2] == end_of_document_id
    return np.cumsum(starts, axis=1)


class Opener:
    """Opens and checks the sources of settings, each file once, and collects all problems."""

    def __init__(self, vocab_size: int, tokenizer_fingerprint: str | None):
        self._model = {"vocab_size": vocab_size, "tokenizer_fingerprint": tokenizer_fingerprint}
        self.problems: list[str] = []
        self._opened: list[tuple[SourceConfig, FileSource]] = []

    def mixture(self, data: DataConfig, where: str, block_length: int) -> list[tuple[FileSource, float]]:
        """The training sources of `data`, which stand at `where` in the settings, with their weights."""
        self.problems += [
            f"{where}[{i}].weight: got {source.weight}, must be finite and more than 0"
            for i, source in enumerate(data.train)
            if not (math.isfinite(source.weight) and source.weight > 0)
        ]
        sources = self.files(data.train, where, data, least_tokens=block_length + 1)
        return [(source, config.weight) for source, config in zip(sources, data.train, strict=False)]  # fewer: a problem

    def files(self, configs: list[SourceConfig], where: str, data: DataConfig, least_tokens: int) -> list[FileSource]:
        """The sources `configs`, which stand at `where` in the settings; those with a problem are left out. A source that
        earlier settings have named is the same object."""
        sources, known = [], list(self._opened)  # the same file twice in one list is two sources
        for i, config in enumerate(configs):
            same = next((each for each in known if (each[0].path, each[0].dtype) == (config.path, config.dtype)), None)
            place = f"{where}[{i}].path"
            if same:
                known.remove(same)
                source = same[1]
            else:
                try:
                    vocab_size = self._model["vocab_size"]
                    source = FileSource(TokenFile(config.path, config.dtype, vocab_size), vocab_size)
                except (DataError, OSError) as error:
                    self.problems.append(f"{place}: {error}")
                    continue
                source.where = f"{where}[{i}]"
                self._opened.append((config, source))
            found = check_fit(source.file, place, data, **self._model, least_tokens=least_tokens)
            self.problems += [f"{finding.where}: {finding.text}" for finding in found]
            sources.append(source)
        return sources

    def close(self) -> list[FileSource]:
        """All sources in the order in which they were opened, with unique names. Raises DataError with every problem."""
        if self.problems:
            raise DataError("\n".join(dict.fromkeys(self.problems)))
        sources = [source for _, source in self._opened]
        _make_names_unique(sources)
        return sources


def _make_names_unique(sources: list[FileSource]) -> None:
    """Names are base names; equal ones get the folder's name as a prefix and, if still equal, a number as a suffix."""
    names = [source.name for source in sources]
    for source in sources:
        if names.count(source.name) > 1:
            source.name = f"{Path(source.file.path).absolute().parent.name}-{source.name}"
    taken = set()
    for source in sources:
        name, number = source.name, 1
        while source.name in taken:
            number += 1
            source.name = f"{name}-{number}"
        taken.add(source.name)
