"""Encoded documents of a corpus in the order of the input, kept on disk so that a killed job resumes. No torch.

    PREFIX.tokens.tmp     tokens of all documents, back to back
    PREFIX.documents.tmp  for each document three int64: where its tokens end, their number, and the bytes of its text
    PREFIX.progress.tmp   JSON: how much of the two is complete, and which settings made it

The third is replaced atomically, after the others are on the disk: what lies behind the lengths that it records is cut off at
the next start. All three disappear when the job is done.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pretrain.files import read_json_object, write_atomically

from .indexed import DataError
from .reads import read_ranges

SECONDS_BETWEEN_COMMITS = 10.0  # of work that a kill costs at most
_ROW = np.dtype(("<i8", 3))
_BLOCK_TOKENS = 1 << 22


class Staging:
    """Documents that are encoded, of this job and of earlier ones with the same `settings` (a JSON object); a context manager.

    `prefix`; `num_documents`, `num_tokens`; `committed_documents` and `progress`: the state at the last `commit`, perhaps of an
    earlier job; 0 and empty at first.
    Leaving the block removes the files, unless an exception leaves it after a commit. `is_kept`: True if they remained.
    Raises DataError if another process uses them, if an earlier job had other settings (`discard`: its work is removed), or if
    they are damaged.
    """

    def __init__(self, prefix: str, dtype: np.dtype, settings: dict, *, discard: bool = False):
        self.prefix, self.dtype, self._settings = prefix, dtype, settings
        self._paths = [Path(f"{prefix}.{name}.tmp") for name in ("progress", "tokens", "documents")]
        self._paths[0].parent.mkdir(parents=True, exist_ok=True)
        self._documents = open(self._paths[2], "ab+")
        self._lock()
        self._tokens = open(self._paths[1], "ab+")
        self.num_documents = self.num_tokens = self.committed_documents = 0
        self.progress: dict = {}
        self.is_kept, self._committed_at = False, time.monotonic()
        try:
            self._resume(discard)
        except DataError:
            self._close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._documents, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.stat(self._paths[2]), os.fstat(self._documents.fileno()))
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:  # it is locked, or its owner removed it after it was opened here
            self._documents.close()
            raise DataError(f"{self.prefix}: another process is writing this output; wait for it or choose another")

    def _resume(self, discard: bool) -> None:
        found = read_json_object(self._paths[0])
        before = found.get("settings", {})
        differ = [f"{key} was {before.get(key)!r} and is {value!r}" for key, value in self._settings.items()
                  if before.get(key) != value]  # fmt: skip
        if found and not differ:
            self.num_documents, self.num_tokens, self.progress = (found[key] for key in ("documents", "tokens", "progress"))
        elif found and not discard:
            raise DataError(
                f"{self.prefix}: an unfinished job with other settings has left its work here: {'; '.join(differ)}. Repeat its "
                "settings to complete it, choose another output, or remove its work (--overwrite)"
            )
        sizes = self.num_tokens * self.dtype.itemsize, self.num_documents * _ROW.itemsize
        for file, path, size in zip((self._tokens, self._documents), self._paths[1:], sizes, strict=True):
            if os.fstat(file.fileno()).st_size < size:
                raise DataError(f"{path}: shorter than the {size:,} bytes that {self._paths[0]} records; remove both")
            file.truncate(size)
        self.committed_documents = self.num_documents
        if not self.num_documents:
            self._paths[0].unlink(missing_ok=True)

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind, *_) -> None:
        self.is_kept = kind is not None and bool(self.progress)
        if not self.is_kept:
            for path in (*self._paths, *map(Path, glob.glob(f"{glob.escape(str(self._hidden()))}.*.tmp"))):
                path.unlink(missing_ok=True)
        self._close()

    def _hidden(self) -> Path:
        """The start of the names of temporary files that `write_atomically` leaves when it is killed."""
        return self._paths[0].with_name(f".{self._paths[0].name}")

    def _close(self) -> None:
        self._tokens.close()
        self._documents.close()

    def add(self, tokens: np.ndarray, lengths: np.ndarray, utf8_bytes: np.ndarray) -> None:
        """Appends documents: tokens back to back, lengths in tokens (n,), lengths in bytes of text (n,)."""
        ends = self.num_tokens + np.cumsum(lengths)
        self._tokens.write(tokens.astype(self.dtype, copy=False).data)
        self._documents.write(np.stack([ends, lengths, utf8_bytes], axis=1).astype("<i8").tobytes())
        self.num_documents += len(lengths)
        self.num_tokens += len(tokens)

    @property
    def is_commit_due(self) -> bool:
        """Whether a kill would cost more than ten seconds of work."""
        return time.monotonic() - self._committed_at >= SECONDS_BETWEEN_COMMITS

    def commit(self, progress: dict) -> None:
        """Makes all documents so far durable, and `progress`, a JSON object that is not empty, with them. Raises OSError."""
        for file in (self._tokens, self._documents):
            file.flush()
            os.fsync(file.fileno())
        state = {"settings": self._settings, "documents": self.num_documents, "tokens": self.num_tokens, "progress": progress}
        write_atomically(self._paths[0], json.dumps(state))
        self.progress, self.committed_documents, self._committed_at = progress, self.num_documents, time.monotonic()

    def flush(self) -> None:
        """Must be called between the last `add` and the first `read`."""
        self._tokens.flush()
        self._documents.flush()

    def read(self, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(tokens back to back, lengths in tokens (n,), bytes of text (n,)) of the documents `numbers`, in order.

        Several documents at a time, of together about 4 million tokens, or one that is longer.
        """
        rows = read_ranges(self._documents, numbers * _ROW.itemsize, np.full(len(numbers), _ROW.itemsize))
        rows, width = rows.view("<i8").reshape(-1, 3), self.dtype.itemsize
        groups = (np.cumsum(rows[:, 1]) - 1) // _BLOCK_TOKENS
        for group in np.unique(groups):
            ends, lengths, utf8_bytes = rows[groups == group].T
            tokens = read_ranges(self._tokens, (ends - lengths) * width, lengths * width).view(self.dtype)
            yield tokens, lengths, utf8_bytes
