"""Sources: token files cut into windows, opened and checked.

A file is cut into blocks of L tokens, which the sequence length T divides; without stages, L = T. Sample i is tokens i * T to
i * T + T of its file: T inputs and their T labels; it shares one token with the next sample. A source of many files (shards)
has the samples of the first file, then those of the second, and so on; none crosses files.
Opening checks the data and reports all problems at once. Reads are positioned reads without a shared cursor, so they are
thread-safe. No torch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pretrain.data.config import DataConfig, SourceConfig

from . import shards
from .checks import check_files
from .entropy import unigram_entropy
from .indexed import DataError, Sidecar, TokenFile
from .passes import Cut
from .reads import OpenFiles
from .remote import is_url
from .store import Store


class FileSource:
    """A token file.

    name             of the source, for people; this and the next two are set by `Opener`
    where            place in the settings, such as data.train[0]
    max_epochs       most epochs that a run may read; None: no limit
    partial          True: tokens after the last complete block are a block, too
    files, shards    the file, and this source itself; a `ShardedSource` has many
    first_documents  number of the first document of each shard in the source, (shards,)
    """

    name, where, max_epochs = "", "", None

    def __init__(self, file: TokenFile, vocab_size: int, *, partial: bool = False):
        self.file, self.vocab_size, self._partial = file, vocab_size, partial
        self.files, self.first_documents = [file], np.zeros(1, dtype=np.int64)
        self.sidecar, self.num_tokens = file.sidecar, file.num_tokens
        self._fingerprint = file.watch()

    @property
    def shards(self) -> list[FileSource]:
        """This source alone."""
        return [self]  # not an attribute: in a cycle of references, the file would stay open until the garbage collector runs

    @property
    def reference_lines(self) -> dict[str, float]:
        """Known losses, nats per token."""
        return reference_lines(self.files, self.sidecar)

    def fingerprint(self) -> str:
        """Hash of the content, not of the path."""
        return self._fingerprint

    def num_blocks(self, block_length: int) -> int:
        """Blocks, each with the label of its last token."""
        return (self.num_tokens - 1 + self._partial * (block_length - 1)) // block_length

    def num_labels(self, block_length: int) -> int:
        """Labels of all blocks."""
        return self.num_tokens - 1 if self._partial else self.num_blocks(block_length) * block_length

    def first_samples(self, cut: Cut) -> np.ndarray:
        """Number of the first sample of each shard in the source, (shards,)."""
        return np.zeros(1, dtype=np.int64)

    def labels_of(self, samples: np.ndarray, cut: Cut) -> np.ndarray:
        """Number of labels (n,) of the samples (n,): T but for a partial one."""
        return np.minimum(cut.sequence_length, self.num_tokens - 1 - samples * cut.sequence_length)

    def read_soon(self, samples: np.ndarray, cut: Cut) -> None:
        """Lets the system begin to read the samples (n,)."""
        starts = samples * cut.sequence_length
        self.file.read_soon(starts, np.minimum(cut.sequence_length + 1, self.num_tokens - starts))

    def read(self, samples: np.ndarray, cut: Cut, first_sample: int = 0) -> np.ndarray:
        """Tokens (n, T + 1) of the samples (n,), in the file's dtype; id 0 after the end of the file. first_sample: number of
        the file's first sample in its source, for messages.

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
            self.file.require_unchanged()  # perhaps this began since it was last asked
            row, offset = np.argwhere((tokens < 0) | (tokens >= self.vocab_size))[0].tolist()
            sample = f"sample {first_sample + samples[row]} of {self.name}"
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


class ShardedSource:
    """Many token files as one source: like a `FileSource`, with the same arguments and attributes. Raises DataError for files
    that contradict each other."""

    name, where, max_epochs = "", "", None

    def __init__(self, files: list[TokenFile], vocab_size: int, *, partial: bool = False):
        open_shard = functools.partial(FileSource, vocab_size=vocab_size, partial=partial)
        self.files, self.shards = files, shards.side_by_side(open_shard, files, shards.IN_STORE if is_url(files[0].path) else 1)
        self.sidecar, self._dtype = shards.common_sidecar(files), shards.common_dtype(files)
        self.num_tokens = sum(file.num_tokens for file in files)
        self.first_documents = np.cumsum([0, *(file.num_documents or 0 for file in files[:-1])])
        self._first_blocks: dict[int, np.ndarray] = {}  # by block length

    @property
    def reference_lines(self) -> dict[str, float]:
        """Known losses, nats per token."""
        return reference_lines(self.files, self.sidecar)

    def fingerprint(self) -> str:
        """Hash of the content and order of the files, not of their paths."""
        return shards.common_fingerprint([shard.fingerprint() for shard in self.shards])

    def num_blocks(self, block_length: int) -> int:
        """Blocks of all files, each with the label of its last token."""
        return sum(shard.num_blocks(block_length) for shard in self.shards)

    def num_labels(self, block_length: int) -> int:
        """Labels of all blocks."""
        return sum(shard.num_labels(block_length) for shard in self.shards)

    def first_samples(self, cut: Cut) -> np.ndarray:
        """Number of the first sample of each shard in the source, (shards,)."""
        length = cut.block_length
        if length not in self._first_blocks:
            self._first_blocks[length] = np.cumsum([0, *(shard.num_blocks(length) for shard in self.shards[:-1])])
        return self._first_blocks[length] * cut.samples_per_block

    def labels_of(self, samples: np.ndarray, cut: Cut) -> np.ndarray:
        """Number of labels (n,) of the samples (n,): T but for the partial one of a file."""
        labels = np.empty(len(samples), dtype=np.int64)
        for shard, rows, first in self._by_shard(samples, cut):
            labels[rows] = shard.labels_of(samples[rows] - first, cut)
        return labels

    def read(self, samples: np.ndarray, cut: Cut) -> np.ndarray:
        """Tokens (n, T + 1) of the samples (n,), in a type that holds those of all files; id 0 after the end of a file. Raises
        what `FileSource.read` raises."""
        tokens = np.empty((len(samples), cut.sequence_length + 1), dtype=self._dtype)
        parts = list(self._by_shard(samples, cut))
        for shard, rows, first in parts:  # start all reads before waiting for the first
            shard.read_soon(samples[rows] - first, cut)
        for shard, rows, first in parts:
            tokens[rows] = shard.read(samples[rows] - first, cut, first)
        return tokens

    def documents(self, samples: np.ndarray, tokens: np.ndarray, cut: Cut) -> np.ndarray:
        """Document numbers (n, T) within each sample; `tokens` (n, T + 1) come from `read`."""
        documents = np.empty((len(samples), cut.sequence_length), dtype=np.int64)
        for shard, rows, first in self._by_shard(samples, cut):
            documents[rows] = shard.documents(samples[rows] - first, tokens[rows], cut)
        return documents

    def _by_shard(self, samples: np.ndarray, cut: Cut) -> Iterator[tuple[FileSource, np.ndarray, int]]:
        """(shard, rows of its samples in `samples`, number of its first sample) for each shard that has some of them."""
        first_samples = self.first_samples(cut)
        numbers = np.searchsorted(first_samples, samples, side="right") - 1
        for number in np.unique(numbers).tolist():
            yield self.shards[number], np.flatnonzero(numbers == number), int(first_samples[number])


def reference_lines(files: list[TokenFile], sidecar: Sidecar | None) -> dict[str, float]:
    """Known losses of the tokens of `files`, in nats per token: from their common sidecar, else from a sample."""
    if sidecar:
        return {"unigram": sidecar.unigram_entropy_nats, "bigram": sidecar.bigram_entropy_nats}
    return {"unigram": unigram_entropy(np.unique(shards.common_sample(files), return_counts=True)[1])}


def documents_of(tokens: np.ndarray, end_of_document_id: int) -> np.ndarray:
    """Document numbers (n, T) within windows (n, T + 1) in which that id ends each document and occurs nowhere else."""
    starts = np.zeros((len(tokens), tokens.shape[1] - 1), dtype=bool)
    starts[:, 1:] = tokens[:, :-2] == end_of_document_id
    return np.cumsum(starts, axis=1)


class Opener:
    """Opens and checks the sources of settings, each file once, and collects all problems."""

    def __init__(self, data: DataConfig, vocab_size: int, tokenizer_fingerprint: str | None):
        """data: where blocks of stores are cached."""
        self._model = {"vocab_size": vocab_size, "tokenizer_fingerprint": tokenizer_fingerprint}
        self.problems: list[str] = []
        self.has_unreadable = False  # a path whose files are missing or damaged
        self._opened: list[tuple[SourceConfig, FileSource | ShardedSource]] = []
        self._open_files = OpenFiles(store=Store(data.cache_directory, data.cache_gib))

    def mixture(self, data: DataConfig, where: str, block_length: int) -> list[tuple[FileSource | ShardedSource, float]]:
        """The training sources of `data`, whose place in the settings is `where`, with their weights."""
        self.problems += _weight_problems(data, where)
        sources = self.files(data.train, where, data, least_tokens=block_length + 1)
        return [
            (source, source.num_blocks(block_length) * block_length if config.weight is None else config.weight)
            for source, config in zip(sources, data.train, strict=False)  # fewer: a problem
        ]

    def files(
        self, configs: list[SourceConfig], where: str, data: DataConfig, least_tokens: int, *, partial: bool = False
    ) -> list[FileSource | ShardedSource]:
        """The sources `configs`, whose place in the settings is `where`; those with a problem are left out. A source that
        earlier settings have named is the same object. partial: of the sources."""
        sources, known = [], list(self._opened)  # the same file twice in one list is two sources
        for i, config in enumerate(configs):
            same = next((each for each in known if (each[0].path, each[0].dtype) == (config.path, config.dtype)), None)
            place = f"{where}[{i}]"
            if same:
                known.remove(same)
                files, source = same[1].files, same[1]
            else:
                try:
                    files = shards.open_shards(
                        config.path, config.dtype, self._model["vocab_size"], open_files=self._open_files
                    )
                except (DataError, OSError) as error:
                    self.problems.append(f"{place}.path: {error}")
                    self.has_unreadable = True
                    continue
                source = None
            found = check_files(files, f"{place}.path", data, **self._model, least_tokens=least_tokens)
            self.problems += shards.shortened([f"{finding.where}: {finding.text}" for finding in found])
            if found:
                continue
            source = source or self._source(files, config, place, partial)
            source.max_epochs = min(filter(None, (source.max_epochs, config.max_epochs)), default=None)
            sources.append(source)
        if len(sources) == len(configs):
            self.problems += _read_twice(configs, sources, where)
        return sources

    def _source(self, files: list[TokenFile], config: SourceConfig, place: str, partial: bool) -> FileSource | ShardedSource:
        if len(files) == 1:
            source = FileSource(*files, self._model["vocab_size"], partial=partial)
        else:
            source = ShardedSource(files, self._model["vocab_size"], partial=partial)
        source.where = place
        self._opened.append((config, source))
        return source

    def close(self) -> list[FileSource | ShardedSource]:
        """All sources in the order in which they were opened, with unique names. Raises DataError with every problem."""
        if self.problems:
            raise DataError("\n".join(dict.fromkeys(self.problems)))
        names = _unique_names([shards.place_of(config.path, source.files) for config, source in self._opened])
        for (_, source), name in zip(self._opened, names, strict=True):
            for each in (source, *source.shards):
                each.name = name
        return [source for _, source in self._opened]


def _weight_problems(data: DataConfig, where: str) -> list[str]:
    """Weights that are no shares; or that are no numbers of tokens, beside a null, which stands for the source's own."""
    problems = []
    beside_null = any(source.weight is None for source in data.train)
    for i, source in enumerate(data.train):
        if source.weight is None:
            continue
        if not (math.isfinite(source.weight) and source.weight > 0):
            problems.append(f"{where}[{i}].weight: got {source.weight}, must be finite and more than 0")
        elif beside_null and source.weight < data.sequence_length:
            text = "another weight is null, which is a number of tokens; give tokens here, too (at least one sample), or null"
            problems.append(f"{where}[{i}].weight: got {source.weight:g}, but {text}")
    return problems


def _unique_names(places: list[Path]) -> list[str]:
    """Names are those of files and folders; equal ones get the folder's name as a prefix and, if still equal, a number as a
    suffix."""
    names = [place.name for place in places]
    names = [f"{place.parent.name}-{place.name}" if names.count(place.name) > 1 else place.name for place in places]
    unique: list[str] = []
    for name in names:
        numbered = (f"{name}-{number}" if number > 1 else name for number in itertools.count(1))
        unique.append(next(each for each in numbered if each not in unique))
    return unique


def _read_twice(configs: list[SourceConfig], sources: list[FileSource | ShardedSource], where: str) -> list[str]:
    """Problems of files that two sources share, of which at least one names a folder or a pattern, and so hides it."""
    owners: dict[str, int] = {}
    problems = []
    for i, (config, source) in enumerate(zip(configs, sources, strict=True)):
        for file in source.files:
            other = owners.setdefault(shards.identity(file.bin_path), i)
            if other != i and not (shards.is_one_file(config.path) and shards.is_one_file(configs[other].path)):
                text = f"names {file.path}, as {where}[{other}].path does; name each file in one source only"
                problems.append(f"{where}[{i}].path: {text}")
    return shards.shortened(problems)
