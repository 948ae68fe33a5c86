"""The records of a run, as metrics.jsonl holds them. Knows the file, not what the numbers mean.

A record is a flat dict with an integer `step`. Its other keys say what it is:
    `loss`       a logging step
    `val_loss`   a validation; `val_loss/<source>` for each source when there are several
    `task_accuracy`  the tasks: means over them, `task/<name>/accuracy` and other figures of each (`pretrain/tasks.py`)
    `val_weights`, `task_weights`  "average": those figures are of the average of the weights; absent: of the last ones
    `generated`  texts that the model wrote: [{"prompt": ..., "text": ...}]
    otherwise    kept but not shown, such as the start record {"step": 0, "reference_lines": {"uniform": nats, ...}}

The file has one JSON object per line and every bit of a float (`float(repr(x)) == x`). JSON has no NaN, so a number that is not
finite becomes null and `nonfinite` names it: {"step": 7, "loss": null, "nonfinite": {"loss": "nan"}}.

A process that was killed, or is still writing, leaves at most one line that is not a record. Readers ignore it; the next start
of the run removes it. More such lines are damage, which readers refuse.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from pydantic_core import from_json

from pretrain import UserError, files

FILE_NAME = "metrics.jsonl"
MOST_POINTS = 2**14
REPEATED = {"validation": {"val_loss", "generated"}, "tasks": {"task_accuracy"}}
"""What a start may have to repeat at the step where it resumes, and the keys of its records."""
_BLOCK_BYTES = 1 << 20


class RecordsError(UserError):
    """The records of a run are damaged, or lack what was asked for."""


def read_records(directory: Path) -> list[dict]:
    """The records of the run in `directory`, as `iter_records` yields them."""
    return list(iter_records(directory))


def iter_records(directory: Path) -> Iterator[dict]:
    """The records of the run in `directory` as they were logged, NaN included, one at a time; none without a file.

    Raises RecordsError at the end when more than one line is not a record; OSError.
    """
    path, unreadable = directory / FILE_NAME, 0
    if not path.exists():
        return
    for _, record in files.iter_json_lines(path):
        if record is not None and _is_record(record):
            yield _with_nonfinite(record)
        else:
            unreadable += 1
    if unreadable > 1:
        raise RecordsError(f"{path}: {unreadable} lines are not records. Remove them, or resume the run, which does.")


def to_json(record: dict) -> str:
    """The line of a record, without its line feed."""
    nonfinite: dict[str, str] = {}
    finite = _without_nonfinite(record, "", nonfinite)
    return json.dumps(finite | ({"nonfinite": nonfinite} if nonfinite else {}), allow_nan=False)


def merge_equal(lines: dict[str, float]) -> dict[str, float]:
    """Reference lines with those of equal height under one name, such as "uniform = unigram" for random data."""
    names: dict[float, list[str]] = {}
    for name, nats in lines.items():
        names.setdefault(round(nats, 4), []).append(name)
    return {" = ".join(same): lines[same[0]] for same in names.values()}


class Losses:
    """The loss curve of a run, by step. A long one is thinned evenly, so that its size and the time to judge it are bounded."""

    def __init__(self) -> None:
        self.train, self.valid = Thinned(), Thinned()

    def add(self, record: dict) -> None:
        """Adds a record; others than logging steps and validations are ignored."""
        for key, points in (("loss", self.train), ("val_loss", self.valid)):
            if key in record:
                points.add(record["step"], math.nan if record[key] is None else record[key])


class Thinned:
    """Points (step, value) in order: all of them while they are few, later every 2nd, 4th, 8th, ... and the newest."""

    def __init__(self, most: int | None = None) -> None:
        """most: points that are kept; None: MOST_POINTS."""
        self._most = most or MOST_POINTS
        self._points: list[tuple[int, Any]] = []
        self._count, self._stride = 0, 1

    def add(self, step: int, value: Any) -> None:
        """Adds the newest point."""
        self._newest = (step, value)
        if self._count % self._stride == 0:
            self._points.append(self._newest)
        self._count += 1
        if len(self._points) > self._most:
            self._points, self._stride = self._points[::2], 2 * self._stride

    @property
    def points(self) -> list[tuple[int, Any]]:
        """(step, value) in order."""
        return self._points + ([self._newest] if self._points and self._points[-1] is not self._newest else [])

    @property
    def columns(self) -> tuple[np.ndarray, np.ndarray]:
        """(steps (N,), values (N,)) of numbers."""
        steps, values = zip(*points, strict=True) if (points := self.points) else ((), ())
        return np.array(steps, dtype=float), np.array(values, dtype=float)


class Tail:
    """Reads the records of a run while another process writes them: each line once, and only lines that are complete.

    A run that resumes cuts its file, and other programs may replace it; then reading begins again. The last line that was read
    tells, because a file system may give the new file the number of the old one.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME
        self._forget()

    def _forget(self) -> None:
        self._inode: int | None = None
        self._offset, self._last = 0, b""
        self.unreadable = 0
        """Complete lines that are not records."""
        self.fraction = 1.0
        """Of the file that has been read; 1: all complete lines."""

    def read(self, most_bytes: int = 1 << 24) -> tuple[bool, list[dict]]:
        """(True if all earlier records are void, the next records). Reads about `most_bytes`; nothing is left once `fraction`
        is 1. A missing file has no records. Raises OSError."""
        try:
            file = open(self._path, "rb")
        except FileNotFoundError:
            void = self._offset > 0
            self._forget()
            return void, []
        with file:
            facts, void = os.fstat(file.fileno()), False
            if self._offset and not self._continues(file, facts):
                self._forget()
                void = True
            self._inode = facts.st_ino
            file.seek(self._offset)
            lines = file.readlines(most_bytes) if facts.st_size > self._offset else []
            complete = file.tell() >= facts.st_size  # but for a last line that is still being written, or was left by a kill
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        for line in lines:
            self._offset, self._last = self._offset + len(line), line
        self.fraction = 1.0 if complete else self._offset / facts.st_size
        return void, list(self._records(lines))

    def _continues(self, file: IO[bytes], facts: os.stat_result) -> bool:
        if facts.st_ino != self._inode or facts.st_size < self._offset:
            return False
        file.seek(self._offset - len(self._last))
        return file.read(len(self._last)) == self._last

    def _records(self, lines: list[bytes]) -> Iterator[dict]:
        for line in lines:
            try:
                record = from_json(line)  # three times as fast as json, which matters for a file of a gigabyte
            except ValueError:
                record = None
            if _is_record(record):
                yield _with_nonfinite(record)
            elif line.strip():
                self.unreadable += 1


def cut_records(
    path: Path, resume_step: int, repeated: Collection[str] = (), losses: Losses | None = None
) -> tuple[int, dict[str, float] | None]:
    """Removes the records after `resume_step` (0: all) and unreadable lines, atomically; other lines keep every byte.

    repeated: keys of REPEATED whose records of `resume_step` will be written again, so they are removed too. `losses` gets the
    curve that is kept. Returns the number of removed lines, and the reference losses of the start record if it is still there.
    Reads one line at a time. Raises OSError.
    """
    if not path.exists():
        return 0, None
    removed, end, lines, kept = 0, 0, None, []  # kept: [first, end) in bytes
    with path.open("rb") as file:
        for line in file:
            begin, end = end, end + len(line)
            record = _kept_record(line, resume_step, repeated)
            if record is None:
                removed += 1
                continue
            if kept and kept[-1][1] == begin:
                kept[-1][1] = end
            else:
                kept.append([begin, end])
            lines = lines or record.get("reference_lines")
            if losses:
                losses.add(record)
        torn = bool(kept) and kept[-1][1] == end and not line.endswith(b"\n")
        if removed or torn:
            _copy(file, kept, path)
    return removed, lines


def _kept_record(line: bytes, resume_step: int, repeated: Collection[str]) -> dict | None:
    """The record in a line of metrics.jsonl if a start after `resume_step` keeps it."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not _is_record(record) or resume_step == 0 or record["step"] > resume_step:
        return None
    if record["step"] == resume_step and any(record.keys() & REPEATED[what] for what in repeated):
        return None
    return _with_nonfinite(record)


def _copy(source: IO[bytes], ranges: list[list[int]], path: Path) -> None:
    """Replaces `path`, atomically, by the byte ranges [first, end) of `source`, each ending with a line feed."""
    with files.open_atomically(path) as file:
        for first, end in ranges:
            source.seek(first)
            for begin in range(first, end, _BLOCK_BYTES):
                block = source.read(min(_BLOCK_BYTES, end - begin))
                file.write(block)
            if not block.endswith(b"\n"):
                file.write(b"\n")


class LineFile:
    """Appends lines to a file, each handed to the system at once, so that a killed process loses none.

    Lines that the disk refuses (full, for a while) are kept in memory and written first at the next line, from the byte where
    writing stopped. A file that another program removes or replaces is put back with all its lines, and what took its place is
    renamed to other-NAME. Lines that another program cuts off or overwrites are lost: `append` says so at the next line where
    the length shows it, `verify` at the end in any case. Raises OSError where the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _open_to_append(path)
        self._pending = b""
        self._closed = self._missing = self._damaged = False
        self._digest = self._read_digest()
        self._bytes = os.fstat(self._file).st_size

    def append(self, line: str) -> str | None:
        """Writes a line. -> a problem for people, when it is new."""
        if self._closed:
            return None
        waited = bool(self._pending)
        self._pending += line.encode() + b"\n"
        error = self._write_pending()
        if error is None:
            return self._check()
        return None if waited else f"cannot be written ({error}); its lines are kept in memory and retried"

    def sync(self) -> None:
        """Waits until all lines are durable. Raises OSError if some are not."""
        error = self._write_pending()
        if error is not None:
            raise error
        os.fsync(self._file)

    def verify(self) -> None:
        """Reads the file. Raises OSError unless it holds exactly the lines that it had at the start and those written since."""
        self._check()
        if self._damaged or self._read_digest().digest() != self._digest.digest():
            _, unreadable = files.read_json_lines(self._path)
            lines = f"; {unreadable} of its lines cannot be read" if unreadable else ""
            problem = f"another program changed it while the run wrote it{lines}; checkpoints are not affected"
            raise OSError(errno.EIO, problem, str(self._path))

    def close(self) -> None:
        """Syncs and closes the file; safe to call twice. Raises OSError as `sync` does."""
        if not self._closed:
            self._closed = True
            try:
                self.sync()
            finally:
                os.close(self._file)

    def _write_pending(self) -> OSError | None:
        try:
            while self._pending:
                count = os.write(self._file, self._pending)
                self._digest.update(self._pending[:count])
                self._bytes += count
                self._pending = self._pending[count:]
        except OSError as error:
            return error
        return None

    def _check(self) -> str | None:
        """Compares the length under the file's name with what was written, and puts the file back if it is another."""
        try:
            found = os.stat(self._path).st_size
        except OSError:
            found = None
        if found == self._bytes:
            self._missing = False
            return None
        ours = os.fstat(self._file).st_size
        if ours != self._bytes:
            before, self._bytes = self._bytes, ours
            if ours < before:
                self._damaged = True
                advice = "what it held is lost, and the run will end with status 74"
                return f"has {ours:,} instead of {before:,} bytes: another program cut it; {advice}"
            self._digest = self._read_digest()
            return f"has {ours - before:,} bytes that another program appended; they are kept"
        try:
            other = self._put_back(found is not None)
        except OSError as error:
            known, self._missing = self._missing, True
            return None if known else f"was removed or replaced, and cannot be put back yet ({error}); this is retried"
        return f"was removed or replaced by another program, and has been put back with all its lines{other}"

    def _put_back(self, replaced: bool) -> str:
        other = ""
        if replaced:
            aside = files.unused_name(self._path.with_name(f"other-{self._path.name}"))
            os.rename(self._path, aside)
            other = f"; the file in its place is now {aside.name}"
        with files.open_atomically(self._path) as copy:
            for block in self._blocks():
                copy.write(block)
        os.close(self._file)
        self._file = _open_to_append(self._path)
        return other

    def _read_digest(self) -> xxhash.xxh3_128:
        digest = xxhash.xxh3_128()
        for block in self._blocks():
            digest.update(block)
        return digest

    def _blocks(self) -> Iterator[bytes]:
        position = 0
        while block := os.pread(self._file, _BLOCK_BYTES, position):
            yield block
            position += len(block)


def _open_to_append(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)


_NUMBERS = ("loss", "val_loss", "tokens", "train_hours")


def _is_record(value: object) -> bool:
    """True unless a value that readers use is of a kind that no run writes."""
    if not isinstance(value, dict) or type(value.get("step")) is not int:
        return False
    lines, nonfinite, skipped = (
        value.get("reference_lines", {}),
        value.get("nonfinite", {}),
        value.get("skipped_positions", [0, 0]),
    )
    return (
        all(_is_number(value.get(key, 0)) or value[key] is None for key in _NUMBERS)
        and isinstance(lines, dict)
        and all(map(_is_number, lines.values()))
        and isinstance(nonfinite, dict)
        and all(name in ("nan", "inf", "-inf") for name in nonfinite.values())
        and isinstance(skipped, list)
        and [type(each) for each in skipped] == [int, int]
    )


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _without_nonfinite(value: object, path: str, nonfinite: dict[str, str]) -> object:
    """The value with None for each number that JSON cannot write; `nonfinite` receives their dotted paths and names."""
    if isinstance(value, dict):
        return {key: _without_nonfinite(item, f"{path}.{key}".lstrip("."), nonfinite) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[path] = repr(float(value))
        return None
    return value


def _with_nonfinite(record: dict) -> dict:
    """The record as it was logged: the inverse of `_without_nonfinite`."""
    nonfinite = record.get("nonfinite", {})

    def restore(value: object, path: str) -> object:
        if isinstance(value, dict):
            return {key: restore(item, f"{path}.{key}".lstrip(".")) for key, item in value.items()}
        return float(nonfinite[path]) if value is None and path in nonfinite else value

    return restore({key: value for key, value in record.items() if key != "nonfinite"}, "") if nonfinite else record
