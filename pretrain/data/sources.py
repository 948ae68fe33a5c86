"""Sources: token files cut into windows, opened and checked.

Sample i is tokens i * T to i * T + T of its source: T inputs and their T labels; it shares one token with the next sample.
Opening checks the data and reports all problems at once. Reads are positioned reads without a shared cursor, so they are
thread-safe. No torch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pretrain.config import DataConfig

from .checks import check_fit
from .entropy import unigram_entropy
from .indexed import DataError, TokenFile


class FileSource:
    """A token file cut into windows of T + 1 tokens."""

    def __init__(self, file: TokenFile, sequence_length: int, vocab_size: int):
        self.file, self.sequence_length, self.vocab_size = file, sequence_length, vocab_size
        self.name, self.sidecar = Path(file.path).name, file.sidecar
        self.num_tokens = file.num_tokens
        file.watch()
        self.num_samples = (file.num_tokens - 1) // sequence_length
        if file.sidecar:
            self.reference_lines = {"unigram": file.sidecar.unigram_entropy_nats, "bigram": file.sidecar.bigram_entropy_nats}
        else:
            self.reference_lines = {"unigram": unigram_entropy(np.unique(file.sample(), return_counts=True)[1])}

    def fingerprint(self) -> str:
        """Hash of the content, not of the path."""
        return self.file.fingerprint()

    def read(self, samples: np.ndarray) -> np.ndarray:
        """Tokens (n, T + 1) of the samples (n,), in the file's dtype; id 0 after the end of the file.

        Raises DataError for an id outside the vocabulary (opening checks only a sample of a file without a sidecar) and for a
        file that was rewritten since it was opened.
        """
        self.file.require_unchanged()
        starts, length = samples * self.sequence_length, self.sequence_length + 1
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

    def documents(self, samples: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Document numbers (n, T) within each sample; `tokens` (n, T + 1) come from `read`.

        With a sidecar, which guarantees that the end-of-document id occurs nowhere else, they follow from the tokens; without
        one, from the index.
        """
        if self.sidecar:
            return documents_of(tokens, self.sidecar.end_of_document_id)
        starts = np.zeros((len(samples), self.sequence_length), dtype=bool)
        for row, first in enumerate((samples * self.sequence_length).tolist()):
            last = first + self.sequence_length - 1
            numbers = np.arange(self.file.document_at(first) + 1, self.file.document_at(last) + 1)
            places = self.file.document_starts(numbers) - first
            if places.size and not 0 <= places.min() <= places.max() < self.sequence_length:
                raise DataError(f"{self.file.path}.idx: contradicts itself around token {first:,}; restore it")
            starts[row, places] = True
        return np.cumsum(starts, axis=1)


def documents_of(tokens: np.ndarray, end_of_document_id: int) -> np.ndarray:
    """Document numbers (n, T) within windows (n, T + 1) in which that id ends each document and occurs nowhere else."""
    starts = np.zeros((len(tokens), tokens.shape[1] - 1), dtype=bool)
    starts[:, 1:] = tokens[:, :-2] == end_of_document_id
    return np.cumsum(starts, axis=1)


def open_sources(
    split: str, data: DataConfig, problems: list[str], seed: int, vocab_size: int, tokenizer_fingerprint: str | None
) -> list:
    """Opens and checks all sources of a split. Raises DataError with `problems` and all others that it finds."""
    if data.synthetic:
        from .synthetic import SyntheticSource

        sizes = {"vocab_size": vocab_size, "sequence_length": data.sequence_length}
        return [SyntheticSource(data.synthetic, split, seed=seed, **sizes)]
    opened = []
    for i, config in enumerate(data.train if split == "train" else data.valid):
        where = f"data.{split}[{i}].path"
        try:
            source = FileSource(TokenFile(config.path, config.dtype, vocab_size), data.sequence_length, vocab_size)
        except (DataError, OSError) as error:
            problems.append(f"{where}: {error}")
            continue
        opened.append(source)
        model = {"vocab_size": vocab_size, "tokenizer_fingerprint": tokenizer_fingerprint}
        found = check_fit(source.file, where, data, **model, least_tokens=data.sequence_length + 1 if split == "train" else 2)
        problems += [f"{finding.where}: {finding.text}" for finding in found]
    if problems:
        raise DataError("\n".join(problems))
    _make_names_unique(opened)
    return opened


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
