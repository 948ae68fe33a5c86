"""Files that are complete or absent, however a program ends; reading of JSON. Knows nothing of their content."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces the file `path` by one with `content` (text as UTF-8); durable when it returns. Raises OSError."""
    with open_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[IO[bytes]]:
    """A new binary file that replaces `path` when the block ends, or leaves no trace if it raises. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable, where the file system can sync folders at all. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def unused_name(path: Path) -> Path:
    """`path`, or the first of path-1, path-2, ... that does not exist."""
    number, candidate = 0, Path(path)
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def read_json_object(path: Path) -> dict:
    """The JSON object in a file; empty if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


class JsonLines(NamedTuple):
    """A file of one JSON object per line, as metrics.jsonl."""

    records: list[dict]
    unreadable: int
    """Lines that are not a JSON object. A process that was killed, or is still writing, leaves at most one, the last."""


def read_json_lines(path: Path) -> JsonLines:
    """All complete objects of `path` in order; a last line without its newline counts if it can be read. Raises OSError."""
    found = [record for _, record in iter_json_lines(path)]
    records = [record for record in found if record is not None]
    return JsonLines(records, len(found) - len(records))


def iter_json_lines(path: Path) -> Iterator[tuple[bytes, dict | None]]:
    """(line, its object; None: it is not a JSON object) of all lines of `path` that are not blank. Raises OSError."""
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line.decode())
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                yield line, record
            elif line.strip():
                yield line, None
