"""Progress is a bar on a terminal and plain lines elsewhere."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

from pretrain.report import progress
from pretrain.report.progress import Progress

SCRIPT = """
import time
from pretrain.report.progress import Progress
with Progress("encoding", 10_000_000) as progress:
    for i in range(1, 11):
        time.sleep(0.06)
        progress.update(i * 1_000_000, i * 300_000)
"""


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


def test_a_terminal_gets_a_bar_that_reaches_its_end():
    terminal, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=slave, close_fds=True)
    os.close(slave)
    shown = b""
    while True:
        try:
            data = os.read(terminal, 4096)
        except OSError:  # Linux says so at the end
            break
        if not data:
            break
        shown += data
    os.close(terminal)
    assert process.wait() == 0
    assert b"encoding: " in shown and b"100%|" in shown and b"tokens/s" in shown and b"10.0M/10.0M" in shown
