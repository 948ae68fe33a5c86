"""Progress of a command that works on files, on standard error: a bar on a terminal, an occasional line in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from pretrain.report.units import human_count, human_seconds

_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_BETWEEN_REDRAWS = 0.2


class Progress:
    """Shows progress, speed and time left; a context manager.

    `total` is in bytes (None: unknown, then without time left). `done`, `tokens`: what an earlier job has done, which does not
    count as speed. `update` is cheap enough for an inner loop.
    """

    def __init__(self, label: str, total: int | None, *, done: int = 0, tokens: int = 0):
        self._label, self._total = label, total
        self._start = self._shown = time.monotonic()
        self._before = self._done, self._tokens = done, tokens
        self._bar = None
        if sys.stderr.isatty():
            form = dict(unit="B", unit_scale=True, dynamic_ncols=True, file=sys.stderr)
            self._bar = tqdm(total=total, initial=done, desc=label, **form)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind, *_) -> None:
        seconds = time.monotonic() - self._start
        if self._bar is not None:
            self._redraw(seconds)
            self._bar.close()
        elif kind is None:
            self._line(seconds, f"done in {human_seconds(seconds)}")

    def update(self, done: int, tokens: int = 0) -> None:
        """Sets the bytes done and the tokens made of them so far."""
        self._done, self._tokens = done, tokens
        now = time.monotonic()
        if now - self._shown < (_SECONDS_BETWEEN_LINES if self._bar is None else _SECONDS_BETWEEN_REDRAWS):
            return
        self._shown, seconds = now, now - self._start
        if self._bar is not None:
            self._redraw(seconds)
        elif self._total and done > self._before[0]:
            left = human_seconds(seconds * (self._total - done) / (done - self._before[0]))
            self._line(seconds, f"{100 * done / self._total:.0f} %", f"{left} left")
        else:
            self._line(seconds)

    def _redraw(self, seconds: float) -> None:
        if self._tokens:
            speed = (self._tokens - self._before[1]) / max(seconds, 1e-9)
            self._bar.set_postfix_str(f"{human_count(speed)} tokens/s", refresh=False)
        self._bar.update(self._done - self._bar.n)

    def _line(self, seconds: float, *more: str) -> None:
        seconds = max(seconds, 1e-9)
        done, tokens = self._done - self._before[0], self._tokens - self._before[1]
        parts = [f"{self._done / 1e6:.1f} MB", f"{done / 1e6 / seconds:.1f} MB/s"]
        if self._tokens:
            parts += [f"{human_count(self._tokens)} tokens", f"{human_count(tokens / seconds)} tokens/s"]
        print(f"{self._label}: {', '.join([*parts, *more])}", file=sys.stderr, flush=True)
