"""Lines for people: console.log, standard output, and a progress bar below it on a terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from pretrain.report import expected
from pretrain.report.history import task_names
from pretrain.report.records import LineFile, merge_equal
from pretrain.report.units import human_count, human_dollars, human_seconds

LINES_PER_HEADER = 20
# Columns of a logging step: key of the record, title, width, how the number is written.
_COLUMNS: tuple[tuple[str, str, int, Callable[[float], str]], ...] = (
    ("loss", "loss", 8, lambda x: f"{x:.4f}"),
    ("lr", "lr", 9, lambda x: f"{x:.2e}"),
    ("grad_norm", "grad norm", 9, lambda x: f"{x:.3f}"),
    ("tokens_per_second", "tok/s", 6, human_count),
    ("mfu", "MFU", 6, lambda x: f"{100 * x:.1f}%"),
    ("peak_memory_gib", "memory", 9, lambda x: f"{x:.2f}GiB"),
    ("eta_seconds", "time left", 9, human_seconds),
    ("cost_dollars", "cost", 9, human_dollars),
    ("cost_total_dollars", "in all", 9, human_dollars),
)


class Console:
    """Writes lines to console.log in `directory`, with the time of day, and if `shown` to standard output."""

    def __init__(self, directory: Path, *, shown: bool, step: int, total_steps: int) -> None:
        self.total_steps = total_steps
        self._lock = threading.RLock()  # the threads of the trackers write lines, too
        self._file = LineFile(directory / "console.log")
        self._shown = shown and sys.stdout is not None  # None: closed before Python started
        self._bar: tqdm | None = None
        if self._shown and sys.stdout.isatty():
            bar_format = "{percentage:3.0f}% |{bar}| step {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(
                total=total_steps, initial=step, file=sys.stdout, leave=False, dynamic_ncols=True, bar_format=bar_format
            )
        self._eta = (0.0, math.nan)  # (when the time left was last known, seconds left at that time)
        self._header: list[str] = []
        self._lines_since_header = 0

    def info(self, text: str) -> None:
        """Writes one or more lines."""
        with self._lock:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            for line in text.splitlines() or [""]:
                self._file.append(f"{stamp}  {line}".rstrip())
            if self._shown:
                self._print(text)

    def show(self, record: dict, reference_lines: dict[str, float] | None) -> None:
        """Writes a logging step, a validation, tasks or generated texts, each in its form; other records are not shown."""
        if "loss" in record:
            self._show_step(record)
        elif "val_loss" in record:
            self.info(validation_line(record, reference_lines))
        elif "task_accuracy" in record:
            self.info("\n".join(task_lines(record)))
        for sample in record.get("generated", []):
            prompt, text = (json.dumps(sample[key], ensure_ascii=False) for key in ("prompt", "text"))  # on one line
            self.info(f"step {record['step']:,} writes: {prompt} {text}")

    def progress(self, step: int) -> None:
        """Moves the progress bar to `step`, if there is a bar."""
        if self._bar is not None:
            known_at, eta_seconds = self._eta
            if math.isfinite(eta_seconds):
                left = max(0.0, eta_seconds - (time.monotonic() - known_at))
                self._bar.set_postfix_str(f"{human_seconds(left)} left", refresh=False)
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Removes the bar and closes console.log. Raises OSError when lines of it never reached the disk."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._file.close()

    def _show_step(self, record: dict) -> None:
        """The aligned line of a logging step, below a header after every LINES_PER_HEADER lines and when the columns change."""
        columns = [column for column in _COLUMNS if column[0] in record]
        width = 2 * len(f"{self.total_steps:,}") + 1
        header = [f"{'step':>{width}}", *(f"{title:>{size}}" for _, title, size, _ in columns)]
        cells = [f"{record['step']:,}/{self.total_steps:,}".rjust(width)]
        cells += [f"{write(record[key]) if record[key] is not None else '-':>{size}}" for key, _, size, write in columns]
        notes = [f"{record['skipped_steps']} skipped"] if record.get("skipped_steps") else []
        if not math.isfinite(record["loss"]):
            notes.append("LOSS IS NOT FINITE")
        if header != self._header or self._lines_since_header >= LINES_PER_HEADER:
            self.info("  ".join(header))
            self._header, self._lines_since_header = header, 0
        self.info("  ".join(cells + notes))
        self._lines_since_header += 1
        self._eta = (time.monotonic(), record.get("eta_seconds", math.nan))

    def _print(self, text: str) -> None:
        """To standard output, above the bar. If its reader has exited, the run continues without it."""
        encoding = sys.stdout.encoding or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
        try:
            if self._bar is not None:
                self._bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)
        except OSError as error:
            self._shown, self._bar = False, None
            # Python flushes what is still buffered when it exits, and would exit with status 120 if that failed.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
            self.info(f"Standard output was closed ({error}); the run continues, and its lines are in console.log.")


def validation_line(record: dict, reference_lines: dict[str, float] | None) -> str:
    """One validation in words, with the reference losses of the data."""
    parts = [f"validation at step {record['step']:,}{_of_weights(record, 'val_weights')}: loss {record['val_loss']:.4f}"]
    if "val_perplexity" in record:
        parts.append(f"perplexity {record['val_perplexity']:.2f}")
    if record.get("val_bits_per_byte") is not None:
        parts.append(f"bits per byte {record['val_bits_per_byte']:.4f}")
    sources = [f"{key.split('/', 1)[1]} {value:.4f}" for key, value in record.items() if key.startswith("val_loss/")]
    if sources:
        parts.append("by source: " + ", ".join(sources))
    if expected.side(record):
        parts.append(expected.words(record))
    if reference_lines:
        parts.append("(" + ", ".join(f"{name} {nats:.4f}" for name, nats in merge_equal(reference_lines).items()) + ")")
    return "  ".join(parts)


def _of_weights(record: dict, key: str) -> str:
    return " of the average of the weights" if record.get(key) == "average" else ""


def task_lines(record: dict) -> list[str]:
    """A measurement of the tasks in words: the means, then each task."""
    names = task_names(record)
    width = max(map(len, names), default=0)

    def figures(prefix: str) -> str:
        accuracy, chance, bits = (record[prefix + each] for each in ("accuracy", "chance", "bits_per_byte"))
        text = "not finite" if accuracy is None or not math.isfinite(accuracy) else f"{accuracy:6.1%} right"
        return f"{text} (guessing: {chance:.1%})  {math.nan if bits is None else bits:.4f} bits per byte"

    step = f"{record['step']:,}{_of_weights(record, 'task_weights')}"
    lines = [f"tasks at step {step}: {figures('task_').strip()}, in {record['task_seconds']:.1f} s"]
    return lines + [f"  {name:{width}}  {figures(f'task/{name}/')}" for name in names]
