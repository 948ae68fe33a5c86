"""Named findings about token files: unfit for the model, damaged, or not text that a language model should be trained on.

It knows token files and their sidecars; not batches, runs or devices. No torch. The names are stable: scripts may rely on
them. Every check takes seconds, however long the files are: it reads the sidecar, `TokenFile.sample`, or documents selected by
their length, since duplicates have equal lengths.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import xxhash

from pretrain.data.config import DataConfig

from .entropy import bigram_entropy, unigram_entropy
from .indexed import DataError, TokenFile
from .permutation import splitmix64
from .reads import SAMPLE_RUNS
from .shards import common_sidecar

_UNKNOWN_NOTED, _UNUSED_NOTED = 0.001, 0.05
_CONSTANT_RUN = 4096  # equal tokens in a row: not text but a hole in a badly copied file
_VERIFIED_BLOCKS, _VERIFIED_INDEX_BYTES = 3, 1 << 28
_LENGTHS_SAMPLED = 10_000
_LENGTHS_READ, _LENGTHS_READ_OF_ALL = 20_000_000, 64_000_000  # to find duplicates: of one file, and of all files
_HASHED_TOKENS, _HASHED_DOCUMENTS, _FLAT_TOKENS_OF_ALL = 1 << 25, 200_000, 1 << 28
_READ_TOKENS = 1 << 22
_QUANTILES = (0, 1, 10, 50, 90, 99, 100)


class Finding(NamedTuple):
    """A problem of the data or the setup."""

    name: str
    """Stable identifier, such as id-outside-vocabulary."""
    where: str
    """Setting or file."""
    text: str
    """The problem, and what to do about it."""
    stops: bool = False
    """True: a run must not start. False: a warning."""

    def __str__(self) -> str:
        return f"{self.name}: {self.where}: {self.text}"


# ---------------------------------------------------------------- fit for the model: O(1)


def check_files(
    files: list[TokenFile],
    where: str,
    data: DataConfig,
    *,
    vocab_size: int,
    tokenizer_fingerprint: str | None,
    least_tokens: int,
) -> list[Finding]:
    """Reasons why the `files` of a source cannot be trained on; all stop a run. Of many files, some may have less than
    `least_tokens`, and all must be made with one tokenizer."""
    many = len(files) > 1
    model = dict(vocab_size=vocab_size, tokenizer_fingerprint=tokenizer_fingerprint)
    found = [each for file in files for each in check_fit(file, where, data, **model, least_tokens=1 if many else least_tokens)]
    if many and all(file.num_tokens < least_tokens for file in files):
        text = f"none of the {len(files):,} files contains {least_tokens:,} tokens ({_why(least_tokens, data)})"
        found.append(Finding("too-few-tokens", where, text, stops=True))
    try:
        common_sidecar(files)
    except DataError as error:
        found.append(Finding("shards-differ", where, str(error), stops=True))
    return found


def check_fit(
    file: TokenFile, where: str, data: DataConfig, *, vocab_size: int, tokenizer_fingerprint: str | None, least_tokens: int
) -> list[Finding]:
    """Reasons why `file` cannot be trained on; all stop a run. Exact with a sidecar, from a sample without one."""
    sidecar = file.sidecar
    found: list[tuple[str, str]] = []
    if sidecar is None:
        ids = file.sample()
        if ids.dtype == np.uint32 and ids.max() >= 2**31:  # written as int32, with -100 for labels that do not count
            ids = ids.view(np.int32)
        if ids.min() < 0 or ids.max() >= vocab_size:
            text = f"contains ids {ids.min()} to {ids.max()}, the model has ids 0 to {vocab_size - 1}; wrong tokenizer?"
            found.append(("id-outside-vocabulary", text))
        if data.document_mask and file.num_documents is None:
            text = "a flat .bin has no document index; set data.document_mask to false or tokenize again"
            found.append(("no-document-index", text))
    else:
        if tokenizer_fingerprint is not None and tokenizer_fingerprint != sidecar.tokenizer_fingerprint:
            made_with = f"{sidecar.tokenizer_path} (fingerprint {sidecar.tokenizer_fingerprint})"
            text = f"was tokenized with {made_with}, but tokenizer.path has fingerprint {tokenizer_fingerprint}"
            found.append(("tokenizer-mismatch", f"{text}; set tokenizer.path to the former or tokenize again"))
        elif tokenizer_fingerprint is not None and sidecar.vocab_size != vocab_size:
            text = f"its vocabulary has {sidecar.vocab_size} ids, the model {vocab_size}; set model.vocab_size to null"
            found.append(("vocabulary-mismatch", text))
        if sidecar.max_id >= vocab_size:
            text = f"its largest id is {sidecar.max_id}, the model has ids 0 to {vocab_size - 1}; set model.vocab_size to null"
            found.append(("id-outside-vocabulary", text))
    if file.num_tokens < least_tokens:
        needed = f"{least_tokens:,} are needed ({_why(least_tokens, data)})"
        found.append(("too-few-tokens", f"contains {file.num_tokens:,} tokens, {needed}"))
    return [Finding(name, where, f"{file.path}: {text}", stops=True) for name, text in found]


def _why(least_tokens: int, data: DataConfig) -> str:
    """Why so many tokens are needed."""
    if least_tokens <= data.sequence_length + 1:
        return f"data.sequence_length {data.sequence_length:,}"
    return "a block, which every sequence length of the run divides; see data.block_length"


def check_shards(files: list[TokenFile], where: str, block_length: int) -> list[Finding]:
    """Files that are missing among many training files, by their names; and tokens that are in no sample, if they are many."""
    found, numbers = [], {}
    for file in files if len(files) > 1 else []:
        if match := re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})(\.bin)?", file.path):
            numbers.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (prefix, count), present in numbers.items():
        first = 1 if count in present else 0
        if missing := sorted(set(range(first, first + count)) - present):
            text = f"{len(missing):,} of the {count:,} files {prefix}-*-of-{count:05} are not there: "
            text += f"{', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''}; copy or write them"
            found.append(Finding("shards-missing", where, text))
    unused = sum((file.num_tokens - 1) % block_length for file in files) / sum(file.num_tokens for file in files)
    if len(files) > 1 and unused > _UNUSED_NOTED:
        text = f"{unused:.0%} of the tokens are in no sample, because samples do not cross files; write fewer, larger files"
        found.append(Finding("tokens-unused", where, text))
    return found


# ---------------------------------------------------------------- plausible text: from samples


def check_sample(
    file: TokenFile,
    where: str,
    *,
    vocab_size: int,
    end_of_document_id: int | None,
    unknown_ids: frozenset[int] = frozenset(),
) -> list[Finding]:
    """Problems visible in a sample of the tokens, and text that was lost; takes milliseconds.

    `end_of_document_id` and `unknown_ids`: the tokenizer's; None and empty: not known.
    """
    tokens, sidecar = file.sample(), file.sidecar
    found: list[tuple[str, str, bool]] = []
    largest = np.iinfo(file.dtype).max
    if largest < vocab_size - 1 and not (sidecar and sidecar.max_id < largest):
        text = f"its type, {file.dtype.name}, ends at {largest:,}, the vocabulary has {vocab_size:,} ids: larger ids wrapped"
        found.append(("dtype-too-narrow", f"{text} around when the file was written; tokenize again", True))
    if sidecar and tokens.max() > sidecar.max_id:
        text = f"contains id {tokens.max()}, but the largest in its sidecar is {sidecar.max_id}: it was changed; tokenize again"
        found.append(("seal-contradicted", text, True))
    edges = np.flatnonzero(np.diff(tokens, prepend=-1, append=-1))
    longest = int(np.diff(edges).argmax())
    run, value = int(edges[longest + 1] - edges[longest]), int(tokens[edges[longest]])
    if run >= _CONSTANT_RUN:
        text = f"contains id {value} {run:,} times in a row, as if a part of the file was never written; copy it again"
        found.append(("constant-tokens", text, value == 0))  # a hole reads as zeros
    if run < _CONSTANT_RUN and (unknown := unknown_fraction(file, unknown_ids)) > _UNKNOWN_NOTED:  # 0 is often the unknown id
        text = f"{unknown:.2%} of the text or of the tokens are unknown to its tokenizer, so the model cannot learn them"
        found.append(("text-unknown", f"{text}; tokenize again with a tokenizer with byte fallback", False))
    found += _document_ends(file, tokens, sidecar.end_of_document_id if sidecar else end_of_document_id)
    if sidecar and sidecar.vocab_size > 1000 and sidecar.utf8_bytes < 1.2 * sidecar.num_tokens:
        ratio = sidecar.utf8_bytes / sidecar.num_tokens
        text = f"{ratio:.2f} bytes of text per token: unless it is digits, the tokenizer splits it into bytes; train one on it"
        found.append(("tokens-are-bytes", text, False))
    return [Finding(name, where, f"{file.path}: {text}", stops) for name, text, stops in found]


def unknown_fraction(file: TokenFile, unknown_ids: frozenset[int]) -> float:
    """Fraction of the text without ids that tools/tokenize_corpus.py has counted; else of unknown ids in a sample."""
    recorded = file.sidecar.corpus.get("unknown_fraction") if file.sidecar else None
    if isinstance(recorded, float):
        return recorded
    return float(np.isin(file.sample(), list(unknown_ids)).mean()) if unknown_ids else 0.0


def _document_ends(file: TokenFile, tokens: np.ndarray, end: int | None) -> Iterator[tuple[str, str, bool]]:
    """(name, text, stops) for problems with document lengths and ends. A single long document need not end."""
    documents = file.num_documents
    if documents:
        if file.num_tokens < 16 * documents and documents > 100:
            text = f"{file.num_tokens / documents:.1f} tokens per document: was each line mistaken for a document?"
            yield "documents-tiny", text, False
        lengths = document_lengths([file], _LENGTHS_SAMPLED * file.sample_runs // SAMPLE_RUNS)
        empty = float(np.mean(lengths <= 1))
        if empty > 0.01:
            yield "documents-empty", f"{empty:.0%} of the documents contain no text; remove them and tokenize again", False
    if end is None or file.sidecar:  # the writer of the sidecar checked it
        return
    rate = float(np.mean(tokens == end))
    expected = documents / file.num_tokens if documents else None
    if (documents and documents > 1 and rate < 0.5 * expected) or (not documents and rate == 0 and len(tokens) > 100_000):
        text = f"the end-of-document id {end} does not occur" if rate == 0 else f"documents end without id {end}"
        advice = "append it (tools/convert_data.py --append-end), or tokenize again"
        yield "documents-not-ended", f"{text}: the model cannot learn where a text ends; {advice}", False
    elif documents and documents > 100 and rate > 2 * expected:
        text = f"the end-of-document id {end} occurs {rate / expected:.1f} times per document, so inside documents, too"
        advice = "is it the right id? If these are rows of a packed stream, tools/convert_data.py --packed divides it"
        yield "end-inside-documents", f"{text}; {advice}", False


def check_entropies(file: TokenFile, where: str, vocab_size: int) -> list[Finding]:
    """Tokens that do not predict each other, by the entropies in the sidecar or of a sample (half a second)."""
    sidecar = file.sidecar
    vocab_size = sidecar.vocab_size if sidecar else vocab_size
    if file.num_tokens < 20 * vocab_size:
        return []  # too few tokens for meaningful counts
    if sidecar:
        unigram, bigram = sidecar.unigram_entropy_nats, sidecar.bigram_entropy_nats
    else:
        tokens = file.sample()
        if len(tokens) < 20 * vocab_size or tokens.min() < 0 or tokens.max() >= vocab_size:
            return []
        unigram = unigram_entropy(np.bincount(tokens, minlength=vocab_size))
        bigram = bigram_entropy([tokens], vocab_size)
    if bigram < 0.985 * unigram:
        return []
    random = unigram > 0.985 * math.log(vocab_size)
    text = "all ids are equally frequent and" if random else "ids differ in frequency, but"
    text = f"{file.path}: {text} none predicts the next (unigram {unigram:.3f}, bigram {bigram:.3f} nats)"
    name = "tokens-random" if random else "tokens-shuffled"
    return [
        Finding(name, where, f"{text}: unless longer contexts help, the loss cannot fall below {unigram:.3f}; is this text?")
    ]


def check_checksums(files: list[TokenFile], where: str) -> list[Finding]:
    """Compares the first, middle and last block of the tokens of `files`, and the index of the files that they are in, with the
    checksums in the sidecars."""
    blocks = [(file, i) for file in files for i in range(file.num_blocks)]
    chosen = [blocks[i * (len(blocks) - 1) // (_VERIFIED_BLOCKS - 1)] for i in range(_VERIFIED_BLOCKS)] if blocks else []
    try:
        for file in dict.fromkeys(file for file, _ in chosen):
            if (file.num_documents or 0) * 20 < _VERIFIED_INDEX_BYTES:
                file.check_index()
        for file, i in dict.fromkeys(chosen):
            file.check_block(i)
    except DataError as error:
        return [Finding("checksum-wrong", where, str(error), stops=True)]
    return []


def document_lengths(files: list[TokenFile], at_most: int) -> np.ndarray:
    """Lengths in tokens of about `at_most` documents, evenly spaced; int64. All `files` have a document index."""
    at_most, lengths = max(2, at_most // len(files)), []
    for file in files:
        numbers = np.unique(np.linspace(0, file.num_documents - 1, min(at_most, file.num_documents)).astype(np.int64))
        lengths.append(file.document_starts(numbers + 1) - file.document_starts(numbers))
    return np.concatenate(lengths)


def length_quantiles(files: list[TokenFile]) -> str:
    """Quantiles of the tokens per document, for people."""
    values = np.percentile(document_lengths(files, _LENGTHS_SAMPLED), _QUANTILES)
    return ", ".join(f"{q} % {value:,.0f}" for q, value in zip(_QUANTILES, values, strict=True))


# ---------------------------------------------------------------- duplicate documents


class Duplicates(NamedTuple):
    """Fractions of the training and of the validation tokens."""

    train: float
    """Training tokens in repetitions of a training document."""
    valid: float
    """Validation tokens in documents that are also training documents."""
    documents: int
    """Number of documents compared."""
    complete: bool
    """True: all documents were compared."""


def duplicates(train: list[TokenFile], valid: list[TokenFile], end_of_document_id: int | None) -> Duplicates | None:
    """Fractions of the text that occur more than once. None: no training file has document ends.

    Documents are selected by a hash of their length until the budget is used up. Duplicates have equal lengths, so all or
    none of them are selected, and the fractions are unbiased although only a part of a large file is read.
    """
    files = [*train, *valid]
    parts = [(file, _documents(file, end_of_document_id, len(files))) for file in files]
    if not any(starts is not None for _, starts in parts[: len(train)]):
        return None
    lengths = np.concatenate([np.diff(starts) for _, starts in parts if starts is not None])
    values, counts = np.unique(lengths, return_counts=True)
    order = np.argsort(splitmix64(values.astype(np.uint64)), kind="stable")
    fits = np.cumsum(values[order] * counts[order]) <= _HASHED_TOKENS
    fits &= np.cumsum(counts[order]) <= _HASHED_DOCUMENTS
    chosen = np.sort(values[order[fits]])
    if not len(chosen):
        return None
    hashed = [_hashed(file, starts, chosen) for file, starts in parts]
    train_hash, train_tokens = (np.concatenate(column) for column in zip(*hashed[: len(train)], strict=True))
    _, first = np.unique(train_hash, return_index=True)
    total = max(1, train_tokens.sum())
    overlap, documents = 0.0, len(train_hash)
    if valid:
        valid_hash, valid_tokens = (np.concatenate(column) for column in zip(*hashed[len(train) :], strict=True))
        overlap = float(valid_tokens[np.isin(valid_hash, train_hash)].sum() / max(1, valid_tokens.sum()))
        documents += len(valid_hash)
    return Duplicates(float(1 - train_tokens[first].sum() / total), overlap, documents, bool(fits.all()))


def _documents(file: TokenFile, end: int | None, num_files: int) -> np.ndarray | None:
    """Token numbers at which documents start and, last, the end; flat files are split at `end`. None: unknown. num_files: that
    share the budget."""
    if file.num_documents:
        most = min(_LENGTHS_READ, _LENGTHS_READ_OF_ALL // num_files)
        return file.document_starts(np.arange(min(file.num_documents, most) + 1))
    if end is None or file.num_tokens > min(_HASHED_TOKENS, _FLAT_TOKENS_OF_ALL // num_files):
        return None
    ends = np.flatnonzero(file.read([0], [file.num_tokens]) == end) + 1
    return np.unique(np.concatenate([[0], ends, [file.num_tokens]]))


def _hashed(file: TokenFile, starts: np.ndarray | None, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(hash, length in tokens) of each document that has one of the `lengths`."""
    if starts is None:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    sizes = np.diff(starts)
    numbers = np.flatnonzero(np.isin(sizes, lengths) & (sizes > 0))
    starts, sizes = starts[numbers], sizes[numbers]
    hashes = np.empty(len(numbers), np.uint64)
    batch = np.cumsum(sizes) // _READ_TOKENS
    for which in np.unique(batch).tolist():
        rows = np.flatnonzero(batch == which)
        data, end = memoryview(file.read(starts[rows], sizes[rows])).cast("B"), 0
        for row, size in zip(rows.tolist(), (sizes[rows] * file.dtype.itemsize).tolist(), strict=True):
            hashes[row] = xxhash.xxh3_64_intdigest(data[end : end + size])
            end += size
    return hashes, sizes
