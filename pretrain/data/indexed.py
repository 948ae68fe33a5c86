"""Token files on disk: Megatron's .bin/.idx pair with our metadata sidecar, and flat .bin files (nanoGPT, llm.c).

    PREFIX.bin   all tokens of all documents back to back, little endian, nothing else
    PREFIX.idx   header, lengths in tokens, pointers in bytes, document numbers: byte for byte Megatron's format
    PREFIX.json  the metadata sidecar, for what Megatron's format lacks: tokenizer, vocabulary, counts, entropies, checksums

It knows bytes and counts; not what a sample is, nor how tokens are made. No torch.

A pair is complete when its .idx exists: it is renamed into place last. Opening checks sizes and headers in O(1);
`TokenFile.check_checksums` reads everything. Tokens and index are read by positioned reads, not through a memory map: when a
file is truncated or a disk fails during a run, these raise an OSError that can be reported; a memory map would kill the process
with SIGBUS. Cold random reads are as fast, because the kernel gets all ranges of a batch before the first is read. The document
of a token is found by bisection of the index.
"""

from __future__ import annotations

import bisect
import dataclasses
import fcntl
import functools
import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from pretrain.files import sync_folder

from . import flat
from .entropy import bigram_entropy, unigram_entropy
from .errors import DataError, DataMissing
from .reads import SAMPLE_RUN_LENGTH, SAMPLE_RUNS, OpenFile, OpenFiles, StoredArray, spaced_runs
from .remote import is_url
from .store import StoredObject

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, length of the document array
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # Megatron's codes of integer types
_BLOCK_BYTES, _INDEX_BLOCK = 64 << 20, 1 << 20
_BIGRAM_RUNS, _BIGRAM_RUN_TOKENS = 64, 1 << 17
_FLAT_RUNS, _FLAT_RUN_WORDS = 16, 1 << 11
_RAW = (".npy", ".ds")  # raw tokens of OLMo and of datatrove, which nanotron reads
_AT_LEAST_ONE = ("vocab_size", "num_tokens", "num_documents", "block_bytes")  # of the counts in a sidecar


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """Content of PREFIX.json: metadata of PREFIX.bin and PREFIX.idx."""

    format_version: int = 1
    tokenizer_fingerprint: str
    """Content hash of the tokenizer (`Tokenizer.fingerprint`)."""
    tokenizer_path: str
    """Path of the tokenizer when the data were made, for people."""
    vocab_size: int
    end_of_document_id: int
    """Ends every document and occurs nowhere else."""
    dtype: str
    num_tokens: int
    """End-of-document tokens included."""
    num_documents: int
    max_id: int
    utf8_bytes: int
    """Bytes of the raw text; end-of-document tokens count 0."""
    unigram_entropy_nats: float
    bigram_entropy_nats: float
    """`entropy.bigram_entropy` of all tokens, or of 64 evenly spaced runs of 131,072 tokens in larger files."""
    shuffled: bool
    """True: documents were written in random order."""
    corpus: dict
    """`inputs` (names) and `sha256` of the raw text."""
    block_bytes: int
    block_checksums: list[str]
    """xxh3-128 of each block of `block_bytes` of the .bin."""
    index_checksum: str
    """xxh3-128 of the .idx."""

    @classmethod
    def read(cls, path: Path) -> Sidecar:
        """The sidecar at `path`. Raises what `parse` raises, OSError."""
        return cls.parse(str(path), path.read_bytes())

    @classmethod
    def parse(cls, path: str, content: bytes) -> Sidecar:
        """The sidecar at `path`, which has this `content`. Raises DataError if it is damaged or of another format version."""
        try:
            values = json.loads(content.decode())
        except ValueError as error:
            raise DataError(f"{path}: not a metadata sidecar ({error}); restore the file or tokenize again") from None
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != 1:
            raise DataError(f"{path}: has format_version {version}, 1 is supported; tokenize again")
        types = {field.name: field.type.split("[")[0] for field in dataclasses.fields(cls)}
        wrong = [name for name, kind in types.items() if type(values.get(name)).__name__ != kind]
        if wrong:
            raise DataError(f"{path}: {', '.join(wrong)} missing or of wrong type; restore the file or tokenize again")
        counts = {name: values[name] for name, kind in types.items() if kind == "int"}
        wrong = [name for name, value in counts.items() if not (name in _AT_LEAST_ONE) <= value < 2**62]
        wrong += [name for name, kind in types.items() if kind == "float" and not 0 <= values[name] < math.inf]
        if wrong or not all(isinstance(each, str) for each in values["block_checksums"]):
            raise DataError(f"{path}: {', '.join(wrong) or 'block_checksums'} cannot be; restore the file or tokenize again")
        return cls(**{name: values[name] for name in types})

    def to_json(self) -> str:
        """Text of the file."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"


def token_dtype(vocab_size: int) -> np.dtype:
    """Type of the tokens, by Megatron's rule: uint16 below 65,500 ids, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class TokenFile:
    """A token file, opened by its prefix (.bin/.idx pair) or by the name of a flat .bin. Raises DataError if it is damaged.

    `path` (prefix, or flat file), `num_tokens`, `dtype`, `num_documents` (None: a flat file), `sidecar` (None: not written by
    this program). Thread-safe; keeps nothing of the file in memory.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: str | None = None,
        vocab_size: int | None = None,
        *,
        open_files: OpenFiles | None = None,
        sample_runs: int = SAMPLE_RUNS,
    ):
        """dtype: of a flat file, which else is judged by its content and by `vocab_size`, the number of ids of the model.
        open_files: shared by many files; None: this file stays open. sample_runs: default of `sample`; at least 2."""
        open_files = open_files or OpenFiles()
        self.path, self.bin_path, self._idx_path = _resolve(str(path), open_files)
        self.num_documents: int | None = None
        self.sidecar: Sidecar | None = None
        self.sample_runs, self._open_files = sample_runs, open_files
        self._bin_bytes = self._bin().size
        self._offset = 0
        if self._idx_path is None:
            self._open_flat(dtype, vocab_size)
        else:
            self._open_pair()
            if dtype and np.dtype(dtype) != self.dtype:
                raise DataError(f"{self._idx_path}: says that the tokens are {self.dtype.name}, not {dtype}; leave dtype out")
        if self.num_tokens == 0:
            raise DataError(f"{self.bin_path}: contains no tokens; remove it, or tokenize a corpus that is not empty")

    def _bin(self) -> OpenFile | StoredObject:
        return self._open_files.get(self.bin_path)

    def _open_flat(self, dtype: str | None, vocab_size: int | None) -> None:
        starts, lengths = map(np.array, spaced_runs(self._bin_bytes // 8, _FLAT_RUNS, _FLAT_RUN_WORDS))
        file = self._bin()
        sample = file.sample(8 * starts, 8 * lengths).tobytes()
        head = file.sample(np.array([0]), np.array([min(flat.HEADER_BYTES, file.size)])).tobytes()
        try:
            if dtype:
                self.dtype = np.dtype(dtype).newbyteorder("<")
            else:
                self.dtype, self._offset = flat.judge(head, sample, self._bin_bytes, vocab_size)
        except ValueError as error:
            raise DataError(f"{self.bin_path}: {error}. If it holds tokens, name their type beside its path (dtype)") from None
        expected = self._bin_bytes - self._bin_bytes % self.dtype.itemsize
        if self._bin_bytes != expected:
            raise DataError(f"{self.bin_path}: {self._bin_bytes:,} bytes found, {expected:,} expected; copy it again")
        self.num_tokens = (expected - self._offset) // self.dtype.itemsize

    def _open_pair(self) -> None:
        path = self._idx_path
        file = self._open_files.get(path)
        size = file.size
        if size < _HEADER.size:
            raise DataError(f"{path}: {size:,} bytes found, at least {_HEADER.size} expected; copy it again")
        magic, version, code, num_sequences, num_starts = _HEADER.unpack(file.read_at(0, _HEADER.size))
        if magic != _MAGIC:
            raise DataError(f"{path}: not a Megatron index (starts with {magic!r}, expected {_MAGIC!r})")
        if version != 1:
            raise DataError(f"{path}: index version {version} found, 1 expected")
        if code not in _DTYPES:
            raise DataError(f"{path}: dtype code {code} found, one of {sorted(_DTYPES)} (integers) expected")
        expected = _HEADER.size + 12 * num_sequences + 8 * num_starts
        if size != expected:
            multimodal = size == expected + num_sequences
            hint = "multimodal sets are not supported" if multimodal else "copy it again"
            raise DataError(f"{path}: {size:,} bytes found, {expected:,} expected for {num_sequences:,} sequences; {hint}")
        if num_sequences == 0 or num_starts < 2:
            raise DataError(f"{path}: contains no documents; remove it, or tokenize a corpus that is not empty")
        self.dtype = np.dtype(_DTYPES[code])
        open_index = functools.partial(self._open_files.get, path)
        lengths = StoredArray(open_index, "<i4", num_sequences, _HEADER.size)
        self._pointers = StoredArray(open_index, "<i8", num_sequences, _HEADER.size + 4 * num_sequences)
        self._documents = StoredArray(open_index, "<i8", num_starts, _HEADER.size + 12 * num_sequences)
        self.num_documents = num_starts - 1
        self.num_tokens, odd_bytes = divmod(self._pointers[num_sequences - 1], self.dtype.itemsize)
        self.num_tokens += lengths[num_sequences - 1]
        edges = self._pointers[0], self._documents[0], self._documents[num_starts - 1]
        if edges != (0, 0, num_sequences) or odd_bytes or lengths[num_sequences - 1] < 0:
            raise DataError(f"{path}: its arrays contradict its header; copy it again")
        if self._bin_bytes != self.num_tokens * self.dtype.itemsize:
            expected = self.num_tokens * self.dtype.itemsize
            raise DataError(f"{self.bin_path}: {self._bin_bytes:,} bytes found, {expected:,} expected (.idx); copy it again")
        self._read_sidecar()

    def _read_sidecar(self) -> None:
        path = self.path + ".json"
        if not self._open_files.exists(path):
            return
        file = self._open_files.get(path)
        self.sidecar = Sidecar.parse(path, file.read_at(0, file.size))
        for name in ("num_tokens", "num_documents", "dtype"):
            recorded, found = str(getattr(self.sidecar, name)), str(getattr(self, name))
            if recorded != found:
                raise DataError(
                    f"{path}: {name} is {recorded} in the sidecar and {found} in the files; it describes other files"
                )

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Tokens [start, start + length) of all ranges, back to back. Raises OSError if the file was truncated meanwhile."""
        return self._read(self._bin().read, starts, lengths)

    def _read(self, read: Callable, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        starts, lengths = np.asarray(starts, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
        if starts.size and (starts.min() < 0 or lengths.min() < 0 or (starts + lengths).max() > self.num_tokens):
            raise IndexError(f"{self.bin_path}: range outside its {self.num_tokens:,} tokens")
        return read(*self._place(starts, lengths)).view(self.dtype)

    def read_soon(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Lets the system begin to read these ranges of tokens, so that `read` finds them in memory."""
        self._bin().read_soon(*self._place(starts, lengths))

    def _place(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(offsets, sizes) of these ranges of tokens in the file, in bytes."""
        width = self.dtype.itemsize
        return starts * width + self._offset, lengths * width

    def document_starts(self, numbers: np.ndarray) -> np.ndarray:
        """Index of the first token of each of these documents, (n,) -> (n,) int64; `num_tokens` for number num_documents. Only
        for pairs."""
        try:
            sequences = self._documents.take(numbers)
            starts = np.full(len(sequences), self.num_tokens)
            inside = sequences < len(self._pointers)
            starts[inside] = self._pointers.take(sequences[inside]) // self.dtype.itemsize
        except IndexError as error:
            raise DataError(f"{self._idx_path}: {error}; damaged, copy it again") from None
        return starts

    def document_at(self, token: int) -> int:
        """Number of the document that contains the token with index `token`. Only for pairs."""
        sequence = bisect.bisect_right(self._pointers, token * self.dtype.itemsize) - 1
        return bisect.bisect_right(self._documents, sequence) - 1

    def document_range(self, i: int) -> tuple[int, int]:
        """(first, end): document `i` consists of the tokens [first, end). Only for pairs."""
        return tuple(self.document_starts(np.array([i, i + 1])).tolist())

    def document(self, i: int) -> np.ndarray:
        """Tokens of document `i`. Raises DataError for a flat file and for damage, IndexError."""
        if self.num_documents is None:
            raise DataError(f"{self.path}: a flat .bin has no document index")
        if not 0 <= i < self.num_documents:
            raise IndexError(f"{self.path}: document {i} of {self.num_documents}")
        start, end = self.document_range(i)
        if not 0 <= start <= end <= self.num_tokens:
            raise DataError(f"{self._idx_path}: document {i} would be tokens {start:,} to {end:,}; damaged, copy it again")
        return self.read([start], [end - start])

    def sample(self, runs: int | None = None) -> np.ndarray:
        """At most `runs` (default: `sample_runs`, 64) evenly spaced runs of 8192 tokens, the first and the last tokens
        included: O(1) for any file."""
        return self._read(self._bin().sample, *spaced_runs(self.num_tokens, runs or self.sample_runs, SAMPLE_RUN_LENGTH))

    def fingerprint(self, runs: int | None = None) -> str:
        """Hash of type, length, checksums in the sidecar and `sample(runs)`, but not of the path.

        O(1). Without a sidecar, a change between the sampled runs is not detected.
        """
        digest = xxhash.xxh3_128(f"{self.dtype.str} {self.num_tokens}".encode())
        if self.sidecar is not None:
            digest.update(json.dumps([self.sidecar.tokenizer_fingerprint, *self.sidecar.block_checksums]).encode())
        digest.update(self.sample(runs))
        return digest.hexdigest()

    def watch(self) -> str:
        """Remembers the content for `require_unchanged`: O(1). -> `fingerprint`."""
        self._watched = {path: (self._open_files.get(path).stamp(), sample()) for path, sample in self._samples()}
        return self._watched[self.bin_path][1]

    def require_unchanged(self) -> None:
        """Raises DataError if a file was rewritten since `watch`, as far as a sample of it shows.

        Usually this only looks at the time of the last change; where that differs, contents are compared. A file that was
        replaced or removed does not matter while the old one stays open.
        """
        for path, sample in self._samples():
            now, (before, content) = self._open_files.get(path).stamp(), self._watched[path]
            if now == before:
                continue
            if sample() != content:
                raise DataError(f"{path}: was rewritten while in use; restore it, or start another run with the new file")
            self._watched[path] = now, content

    def _samples(self) -> Iterator[tuple[str, Callable]]:
        """(path, function that hashes a sample of it) of the .bin and, if batches need it, of the .idx."""
        yield self.bin_path, self.fingerprint
        if self._idx_path and not self.sidecar:
            yield self._idx_path, lambda: [each.sample(self.sample_runs) for each in (self._pointers, self._documents)]

    @property
    def num_blocks(self) -> int:
        """Number of blocks that `check_block` can check; 0 without a sidecar."""
        return len(self.sidecar.block_checksums) if self.sidecar else 0

    def check_checksums(self, on_progress: Callable[[int], None] = lambda checked_bytes: None) -> None:
        """Reads both files and compares them with all checksums in the sidecar. Raises DataError."""
        self.check_index()
        for i in range(self.num_blocks):
            self.check_block(i)
            on_progress(min((i + 1) * self.sidecar.block_bytes, self._bin_bytes))

    def check_index(self) -> None:
        """Compares the .idx with the sidecar, which must cover all of the .bin. Raises DataError."""
        if self.sidecar is None:
            raise DataError(f"{self.path}: has no metadata sidecar ({self.path}.json), so no checksums to compare with")
        if self.num_blocks != -(-self._bin_bytes // self.sidecar.block_bytes):
            raise DataError(
                f"{self.path}.json: {self.num_blocks} checksums do not cover the .bin; restore it or tokenize again"
            )
        digest = xxhash.xxh3_128()
        file = self._open_files.get(self._idx_path)
        for start in range(0, file.size, _BLOCK_BYTES):
            digest.update(file.read_at(start, min(_BLOCK_BYTES, file.size - start)))
        if digest.hexdigest() != self.sidecar.index_checksum:
            raise DataError(f"{self._idx_path}: damaged (checksum); copy it again")

    def check_block(self, i: int) -> None:
        """Compares block `i` of the .bin with its checksum in the sidecar. Raises DataError."""
        start = i * self.sidecar.block_bytes
        size = min(self.sidecar.block_bytes, self._bin_bytes - start)
        data = self._bin().read_at(start, size)
        if xxhash.xxh3_128_hexdigest(data) != self.sidecar.block_checksums[i]:
            raise DataError(f"{self.bin_path}: damaged between bytes {start:,} and {start + size:,} (checksum); copy it again")


def is_table(path: str) -> bool:
    """True for the name of a file with rows, as `datasets` writes them."""
    return path.endswith((".parquet", ".arrow"))


def conversion(path: str) -> str:
    """What makes a pair of a file with rows of ids, as advice."""
    return f"convert it with `python tools/convert_data.py --input {path} --tokenizer FOLDER --output PREFIX`"


def _resolve(path: str, files: OpenFiles) -> tuple[str, str, str | None]:
    """(name, .bin, .idx) of a prefix, or (name, .bin, None) of a flat file."""
    if path.endswith(".bin") and files.exists(path) and not any(files.exists(path[:-4] + end) for end in (".idx", ".json")):
        return path, path, None
    prefix = path[:-4] if path.endswith((".bin", ".idx")) else path
    missing = [prefix + end for end in (".bin", ".idx") if not files.exists(prefix + end)]
    if missing:
        if path.endswith(_RAW) and files.exists(path):
            text = (
                "OLMo's .npy files are flat, those of numpy.save are not"
                if path.endswith(".npy")
                else "a .ds of datatrove is flat"
            )
            link = f"ln -s {os.path.abspath(path)} {os.path.splitext(path)[0]}.bin"
            raise DataMissing(f"{path}: flat files of tokens are read under names with .bin ({text}): {link}")
        folder = Path(prefix).parent
        near = folder.glob("*.idx") if not is_url(path) and folder.is_dir() else []
        there = sorted(str(found.with_suffix("")) for found in near)[:8]
        hint = f"; did you mean {', '.join(there)}?" if there else "; create it with tools/tokenize_corpus.py"
        if missing == [f"{prefix}.idx"] and not files.exists(f"{prefix}.json"):
            hint = f"; {prefix}.bin is there: if it is a flat file without an index, give its name with .bin{hint}"
        if is_table(path):
            raise DataMissing(f"{path}: no token file; if it holds ids, {conversion(path)}")
        raise DataMissing(f"{path}: no token file here ({' and '.join(missing)} not found){hint}")
    return prefix, f"{prefix}.bin", f"{prefix}.idx"


class TokenWriter:
    """Streams documents into PREFIX.bin/.idx/.json, in O(vocabulary) memory. No file has its final name before `finish`.

        with TokenWriter(prefix, vocab_size=..., ...) as writer:
            writer.add(tokens, lengths, utf8_bytes)     # any number of times
            sidecar = writer.finish(corpus)             # leaving the block without it discards everything

    Raises DataError for an existing output, a second writer of the same prefix, an invalid id, or no documents at all.
    """

    def __init__(
        self,
        prefix: str | Path,
        *,
        vocab_size: int,
        end_of_document_id: int,
        tokenizer_fingerprint: str,
        tokenizer_path: str,
        shuffled: bool,
        overwrite: bool = False,
    ):
        self._paths = [Path(f"{prefix}{end}") for end in (".json", ".bin", ".idx")]  # in the order of renaming
        if not overwrite and (existing := [str(path) for path in self._paths if path.exists()]):
            raise DataError(f"{', '.join(existing)}: exists already; choose another output, or overwrite it (--overwrite)")
        self._temporary = [path.with_name(path.name + ".tmp") for path in self._paths]
        self._paths[0].parent.mkdir(parents=True, exist_ok=True)
        self._bin = open(self._temporary[1], "ab")
        try:
            fcntl.flock(self._bin, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._bin.close()
            raise DataError(f"{prefix}: another process is writing this output; wait for it or choose another") from None
        self._bin.truncate(0)
        self._lengths = tempfile.TemporaryFile(dir=self._paths[0].parent)
        self._about = dict(
            vocab_size=vocab_size,
            end_of_document_id=end_of_document_id,
            tokenizer_fingerprint=tokenizer_fingerprint,
            tokenizer_path=tokenizer_path,
            shuffled=shuffled,
        )
        self._dtype = token_dtype(vocab_size)
        self._counts_V = np.zeros(vocab_size, dtype=np.int64)
        self.num_documents = self._utf8_bytes = 0
        self._blocks: list[str] = []
        self._block, self._block_filled = xxhash.xxh3_128(), 0

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *error) -> None:
        self._lengths.close()
        if not self._bin.closed:
            for path in self._temporary:
                path.unlink(missing_ok=True)
            self._bin.close()

    def add(self, tokens: np.ndarray, lengths: np.ndarray, utf8_bytes: int) -> None:
        """Appends documents. `tokens`: those of all documents, each ended by the end-of-document id; `lengths` in tokens."""
        tokens, lengths = np.asarray(tokens), np.asarray(lengths, dtype=np.int64)
        end, vocab_size = self._about["end_of_document_id"], self._about["vocab_size"]
        if len(tokens) != lengths.sum() or not np.array_equal(np.flatnonzero(tokens == end), np.cumsum(lengths) - 1):
            raise DataError(f"{self._paths[1]}: the end-of-document id {end} must end every document and occur nowhere else")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
            raise DataError(f"{self._paths[1]}: got ids {tokens.min()} to {tokens.max()}, the vocabulary has {vocab_size}")
        if lengths.size and lengths.max() >= 2**31:
            raise DataError(f"{self._paths[1]}: a document of {lengths.max():,} tokens; fewer than 2^31 are allowed, split it")
        self._counts_V += np.bincount(tokens, minlength=vocab_size)
        self.num_documents += len(lengths)
        self._utf8_bytes += utf8_bytes
        self._lengths.write(lengths.astype("<i4").tobytes())
        data = memoryview(np.ascontiguousarray(tokens, dtype=self._dtype)).cast("B")
        self._bin.write(data)
        while len(data):
            part = data[: _BLOCK_BYTES - self._block_filled]
            self._block.update(part)
            self._block_filled += len(part)
            data = data[len(part) :]
            if self._block_filled == _BLOCK_BYTES:
                self._close_block()

    def _close_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block, self._block_filled = xxhash.xxh3_128(), 0

    def finish(self, corpus: dict) -> Sidecar:
        """Syncs the files, renames them and returns their sidecar. `corpus` describes the text: inputs, sha256."""
        if not 0 < self.num_documents < 2**31:
            raise DataError(f"{self._paths[1]}: got {self.num_documents:,} documents; 1 to 2^31 - 1 are allowed")
        if self._block_filled:
            self._close_block()
        self._bin.flush()
        counts_V = self._counts_V
        num_tokens = int(counts_V.sum())
        tokens = np.asarray(np.memmap(self._temporary[1], self._dtype, "r", shape=(num_tokens,)))
        runs = zip(*spaced_runs(num_tokens, _BIGRAM_RUNS, _BIGRAM_RUN_TOKENS), strict=True)
        sidecar = Sidecar(
            **self._about,
            dtype=self._dtype.name,
            num_tokens=num_tokens,
            num_documents=self.num_documents,
            max_id=int(np.flatnonzero(counts_V)[-1]),
            utf8_bytes=self._utf8_bytes,
            unigram_entropy_nats=unigram_entropy(counts_V),
            bigram_entropy_nats=bigram_entropy([tokens[start : start + length] for start, length in runs], len(counts_V)),
            corpus=corpus,
            block_bytes=_BLOCK_BYTES,
            block_checksums=self._blocks,
            index_checksum=self._write_index(),
        )
        self._temporary[0].write_text(sidecar.to_json(), encoding="utf-8")
        self._paths[2].unlink(missing_ok=True)  # no index: the old pair is invalid before its first file is replaced
        for path in self._temporary:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        for temporary, path in zip(self._temporary, self._paths, strict=True):
            os.replace(temporary, path)
        self._bin.close()
        sync_folder(self._paths[0].parent)
        return sidecar

    def _write_index(self) -> str:
        """Writes the temporary .idx in blocks, one sequence per document, and returns its checksum."""
        digest, n = xxhash.xxh3_128(), self.num_documents
        code = {"<u2": 8, "<i4": 4}[self._dtype.str]
        with open(self._temporary[2], "wb") as file:

            def write(data: bytes) -> None:
                digest.update(data)
                file.write(data)

            write(_HEADER.pack(_MAGIC, 1, code, n, n + 1))
            for lengths in self._length_blocks():
                write(lengths.tobytes())
            pointer = 0
            for lengths in self._length_blocks():
                ends = pointer + np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
                write(np.concatenate([[pointer], ends[:-1]]).astype("<i8").tobytes())
                pointer = int(ends[-1])
            for start in range(0, n + 1, _INDEX_BLOCK):
                write(np.arange(start, min(start + _INDEX_BLOCK, n + 1), dtype="<i8").tobytes())
        return digest.hexdigest()

    def _length_blocks(self) -> Iterator[np.ndarray]:
        self._lengths.seek(0)
        while len(lengths := np.frombuffer(self._lengths.read(4 * _INDEX_BLOCK), dtype="<i4")):
            yield lengths
