"""Progress of a command that works on files: a bar on a terminal, a plain line now and then in a log. Writes to stderr."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from .sinks import human_count, human_seconds

_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_BETWEEN_REDRAWS = 0.2


class Progress:
    """How far a command is, how fast, and how long it still takes; a context manager.

    `total` in bytes (None: unknown, no time left is shown). `update(done, tokens)` may be called as often as one likes.
    """

    def __init__(self, label: str, total: int | None):
        self._label, self._total = label, total
        self._start = self._shown = time.monotonic()
        self._done = self._tokens = 0
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=label, unit="B", unit_scale=True, file=sys.stderr) if terminal else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind, *_) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._line(f"done in {human_seconds(time.monotonic() - self._start)}")

    def update(self, done: int, tokens: int = 0) -> None:
        """`done` bytes of the total are behind us, `tokens` made of them."""
        self._done, self._tokens = done, tokens
        now = time.monotonic()
        if now - self._shown < (_SECONDS_BETWEEN_REDRAWS if self._bar is not None else _SECONDS_BETWEEN_LINES):
            return
        self._shown, seconds = now, max(now - self._start, 1e-9)
        if self._bar is not None:
            if tokens:
                self._bar.set_postfix_str(f"{human_count(tokens / seconds)} tokens/s", refresh=False)
            self._bar.update(done - self._bar.n)
            return
        left = ""
        if self._total and done:
            left = f", {human_seconds(seconds * (self._total - done) / done)} left"
        self._line((f"{100 * done / self._total:.0f} % " if self._total else "") + left.removeprefix(", "))

    def _line(self, end: str) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        rates = f"{self._done / 1e6 / seconds:.1f} MB/s"
        if self._tokens:
            rates += f", {human_count(self._tokens)} tokens, {human_count(self._tokens / seconds)} tokens/s"
        print(f"{self._label}: {self._done / 1e6:.1f} MB, {rates}, {end}", file=sys.stderr, flush=True)
