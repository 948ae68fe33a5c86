"""Progress is a bar on a terminal and a few plain lines elsewhere."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import sys
import termios
import threading

from pretrain.report import progress
from pretrain.report.progress import Progress


class Terminal:
    """A terminal of 24 lines with 100 characters; `file` writes to it."""

    def __init__(self) -> None:
        self._leader, follower = os.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.file = os.fdopen(follower, "w")
        self._shown = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # Linux: no process can write any more
            while data := os.read(self._leader, 65536):
                self._shown += data

    def close(self) -> str:
        """Returns all that was written, after no process can write any more."""
        self.file.close()
        self._reader.join(120)
        os.close(self._leader)
        return self._shown.decode()


def test_a_log_gets_plain_lines_with_rate_and_time_left(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    clock = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Progress("encoding", 8_000_000) as bar:
        bar.update(2_000_000, 500_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "encoding: 2.0 MB, 2.0 MB/s, 500k tokens, 500k tokens/s, 25 %, 3s left"
    assert lines[1].startswith("encoding: 2.0 MB") and lines[1].endswith("done in 2s")
    with Progress("reading", None) as bar:
        bar.update(2_000_000)
    assert capsys.readouterr().err.splitlines()[0] == "reading: 2.0 MB, 2.0 MB/s"


def test_lines_in_a_log_are_rare(capsys):
    with Progress("encoding", 1000) as bar:
        for i in range(1000):
            bar.update(i)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_terminal_gets_a_bar_that_reaches_its_end(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal.file)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_REDRAWS", 0.0)
    with Progress("encoding", 10_000_000) as bar:
        for million in range(1, 11):
            bar.update(million * 1_000_000, million * 300_000)
    monkeypatch.undo()
    shown = terminal.close()
    assert all(part in shown for part in ("encoding: ", "100%|", "tokens/s", "10.0M/10.0M"))
