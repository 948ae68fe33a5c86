"""Where the numbers of a run go: metrics.jsonl, console and console.log, Weights & Biases, TensorBoard.

Knows how records are kept and shown. Knows nothing of models, data or devices: it is handed finished numbers, on rank 0 only.

A record is a flat dict with an integer `step`; what else it holds says what it is:
    `loss`       a logging step
    `val_loss`   a validation; `val_loss/<source>` for each source when there are several
    `generated`  texts that the model wrote: [{"prompt": ..., "text": ...}]
    otherwise    kept without a console line, as the start record {"step": 0, "reference_lines": {"uniform": nats, ...}}

metrics.jsonl is the truth: one JSON object a line, floats to the last bit (`float(repr(x)) == x`). JSON has no NaN, so a
number that is not finite becomes null and `nonfinite` names it: {"step": 7, "loss": null, "nonfinite": {"loss": "nan"}}.
W&B and TensorBoard are copies (copies.py): no outage of theirs can stop or slow the run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from pretrain.config import LogConfig
from pretrain.report.trackers import CopyThread, tensorboard_copy, values_of, wandb_copy

SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
LINES_PER_HEADER = 20
COPY_CLOSE_SECONDS = 28.0


def human_count(value: float) -> str:
    """A count in at most five characters: 950, 12.3k, 4.56M, 7.00B, 1.25T."""
    for size, letter in SCALES:
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f}{letter}"
    return f"{value:.0f}"


def human_seconds(seconds: float) -> str:
    """A duration by its two largest units: 42s, 12m05s, 1h02m, 3d04h."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller:02d}{smaller_unit}"
    return f"{whole}s"


# Console columns of a logging step: key of the record, title, width, how the number is written.
_COLUMNS: tuple[tuple[str, str, int, Callable[[float], str]], ...] = (
    ("loss", "loss", 8, lambda x: f"{x:.4f}"),
    ("lr", "lr", 9, lambda x: f"{x:.2e}"),
    ("grad_norm", "grad norm", 9, lambda x: f"{x:.3f}"),
    ("tokens_per_second", "tok/s", 6, human_count),
    ("mfu", "MFU", 6, lambda x: f"{100 * x:.1f}%"),
    ("peak_memory_gib", "memory", 9, lambda x: f"{x:.2f}GiB"),
    ("eta_seconds", "time left", 9, human_seconds),
)


def open_sinks(config: LogConfig, directory: Path, *, rank: int, **options) -> Sinks:
    """The outputs of a run on rank 0, see `Sinks`; on other ranks an object that does nothing."""
    return Sinks(config, directory, **options) if rank == 0 else SilentSinks()


class Sinks:
    """All outputs of one run; a context manager, on rank 0 only.

    `directory` is the run's folder, `settings` the resolved configuration as plain data (W&B keeps a copy). Records after
    `resume_step` are cut from metrics.jsonl, and with `validation_due` its validation, which is still to come; 0 is a fresh
    start and empties it. `wandb_id` continues that W&B run; null: a
    new one, whose id is then in `.wandb_id` (null without W&B). Errors of the copies are said once and never raised;
    OSError is raised where metrics.jsonl cannot be opened, or at `close` when records never reached the disk.
    """

    def __init__(
        self,
        config: LogConfig,
        directory: Path,
        *,
        name: str,
        settings: dict,
        total_steps: int,
        resume_step: int,
        wandb_id: str | None,
        validation_due: bool = False,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.total_steps = directory, total_steps
        self._lock = threading.RLock()  # the copies' threads speak too
        self._to_stdout = "console" in config.sinks and sys.stdout is not None  # None: it was closed before the start
        self._bar: tqdm | None = None
        self._last_bar_note = (0.0, math.nan)  # when the time left was last known, and what it was
        self._header: list[str] = []
        self._lines_since_header = 0
        self._console_log = _Appender(directory / "console.log")
        # Cut also when jsonl is off now: a later resume must not find records of an abandoned branch.
        path = directory / "metrics.jsonl"
        dropped, unreadable, self._reference_lines = cut_metrics(path, resume_step, validation_due)
        self._metrics = _Appender(path) if "jsonl" in config.sinks else None
        self.keeps_metrics = self._metrics is not None
        """metrics.jsonl is among the outputs, so the run's curve can be drawn and judged."""
        self.lacks_start = self.keeps_metrics and self._reference_lines is None
        """metrics.jsonl has no start record: a fresh start, one from a checkpoint of another run, or the file was removed."""
        self._step = resume_step
        if self._to_stdout and sys.stdout.isatty():
            bar_format = "{percentage:3.0f}% |{bar}| step {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(
                total=total_steps, initial=resume_step, file=sys.stdout, leave=False, dynamic_ncols=True, bar_format=bar_format
            )
        if dropped or unreadable:
            self.info(f"metrics.jsonl: cut {dropped} records after step {resume_step} and {unreadable} unreadable lines.")

        self.wandb_id = wandb_id
        self._copies: list[CopyThread] = []
        if "wandb" in config.sinks:
            self.wandb_id = wandb_id or secrets.token_hex(4)
            opened = wandb_copy(config, directory, name, settings, self.wandb_id, wandb_id is not None, resume_step, self.info)
            self._copies.append(CopyThread("W&B", opened, self.info))
        if "tensorboard" in config.sinks:
            opened = tensorboard_copy(directory / "tensorboard", resume_step)
            self._copies.append(CopyThread("TensorBoard", opened, self.info))

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, record: dict) -> None:
        """Keep one record everywhere and show it; see the module's head for the kinds of records."""
        nonfinite: dict[str, str] = {}
        clean = _without_nonfinite(record, "", nonfinite)
        if nonfinite:
            clean["nonfinite"] = nonfinite
        if self._metrics is not None:
            error = self._metrics.append(json.dumps(clean, allow_nan=False))
            if error is not None:
                self.info(f"metrics.jsonl cannot be written ({error}); its lines wait in memory and are tried again.")
        self._reference_lines = record.get("reference_lines", self._reference_lines)
        self._step = record["step"]
        for copy in self._copies:
            copy.put(self._step, values_of(record, self._reference_lines))
        if "loss" in record:
            self._show_step(record)
        elif "val_loss" in record:
            self.info(validation_line(record, self._reference_lines))
        for made in record.get("generated", []):
            prompt, text = (json.dumps(made[key], ensure_ascii=False) for key in ("prompt", "text"))
            self.info(f"step {self._step:,} writes: {prompt} {text}")

    def image(self, name: str, path: Path) -> None:
        """Send a PNG file to W&B and TensorBoard under `name`; the newest one stands."""
        for copy in self._copies:
            copy.put(self._step, {name: path})

    def info(self, text: str) -> None:
        """A line for people: console and console.log (there with the time of day)."""
        with self._lock:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            for line in text.splitlines() or [""]:
                self._console_log.append(f"{stamp}  {line}".rstrip())
            if self._to_stdout:
                self._print(text)

    def progress(self, step: int) -> None:
        """Move the progress bar to `step`; nothing where the output is no terminal."""
        if self._bar is not None:
            known_at, eta_seconds = self._last_bar_note
            if math.isfinite(eta_seconds):
                left = max(0.0, eta_seconds - (time.monotonic() - known_at))
                self._bar.set_postfix_str(f"{human_seconds(left)} left", refresh=False)
            self._bar.update(step - self._bar.n)

    def sync(self) -> None:
        """Put all records on the disk itself, so that no power cut leaves a checkpoint without the curve that led to it. What
        the disk refuses is said, not raised: a checkpoint is worth more."""
        try:
            if self._metrics is not None:
                self._metrics.sync()
        except OSError as error:
            self.info(f"metrics.jsonl is not on the disk yet ({error}); its lines wait in memory.")

    def close(self) -> None:
        """End all outputs; waits for the copies, at most COPY_CLOSE_SECONDS together. Safe to call twice.

        Raises OSError when records are still not on the disk (full or failing).
        """
        deadline = time.monotonic() + COPY_CLOSE_SECONDS
        for copy in self._copies:
            copy.end()
        for copy in self._copies:
            copy.join(max(0.0, deadline - time.monotonic()))
            if copy.is_alive():
                self.info(
                    f"{copy.name} did not finish in {COPY_CLOSE_SECONDS:.0f} s and is left behind; metrics.jsonl is whole."
                )
        self._copies = []
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._console_log.close()
        if self._metrics is not None:
            self._metrics.close()

    def _show_step(self, record: dict) -> None:
        """The aligned line of a logging step, under a header now and then or when the columns change."""
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
        self._last_bar_note = (time.monotonic(), record.get("eta_seconds", math.nan))

    def _print(self, text: str) -> None:
        """To standard output, above the bar; a reader that went away ends the printing, not the run."""
        encoding = sys.stdout.encoding or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
        try:
            if self._bar is not None:
                self._bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)
        except OSError as error:
            self._to_stdout, self._bar = False, None
            # What is still buffered must go somewhere, or the interpreter ends with status 120 when it flushes.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
            self.info(f"Standard output is gone ({error}); the run goes on, its lines are in console.log.")


class SilentSinks(Sinks):
    """The outputs of every rank but the first: none."""

    def __init__(self) -> None:
        self.wandb_id, self.lacks_start, self.keeps_metrics = None, False, False

    def log(self, record: dict) -> None:
        """Does nothing."""

    def image(self, name: str, path: Path) -> None:
        """Does nothing."""

    def info(self, text: str) -> None:
        """Does nothing."""

    def progress(self, step: int) -> None:
        """Does nothing."""

    def sync(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def validation_line(record: dict, reference_lines: dict[str, float] | None) -> str:
    """One validation in words, with the loss that knows nothing (uniform) or only frequencies (unigram) beside it."""
    parts = [f"validation at step {record['step']:,}: loss {record['val_loss']:.4f}"]
    if "val_perplexity" in record:
        parts.append(f"perplexity {record['val_perplexity']:.2f}")
    if record.get("val_bits_per_byte") is not None:
        parts.append(f"bits per byte {record['val_bits_per_byte']:.4f}")
    sources = [f"{key.split('/', 1)[1]} {value:.4f}" for key, value in record.items() if key.startswith("val_loss/")]
    if sources:
        parts.append("by source: " + ", ".join(sources))
    if reference_lines:
        parts.append("(" + ", ".join(f"{name} {nats:.4f}" for name, nats in merge_equal(reference_lines).items()) + ")")
    return "  ".join(parts)


def merge_equal(lines: dict[str, float]) -> dict[str, float]:
    """Reference lines, those of one height under one name, as "uniform = unigram" for random data."""
    names: dict[float, list[str]] = {}
    for name, nats in lines.items():
        names.setdefault(round(nats, 4), []).append(name)
    return {" = ".join(same): lines[same[0]] for same in names.values()}


def cut_metrics(path: Path, resume_step: int, validation_due: bool = False) -> tuple[int, int, dict[str, float] | None]:
    """Drop the records after `resume_step` (0: all) and unreadable lines, as the torn last one of a killed run, atomically.
    validation_due: the step's own validation is still to come, so a record of it is of a job that ended after it, and goes too.

    Returns how many records and how many unreadable lines went, and the reference lines of the start record, if it stays.
    """
    if not path.exists():
        return 0, 0, None
    dropped = unreadable = 0
    reference_lines, changed = None, False
    temporary = path.with_name(path.name + ".tmp")
    with path.open("rb") as old, temporary.open("wb") as new:
        for line in old:
            try:
                record = json.loads(line)
                step = record["step"]
                later = step > resume_step
            except (ValueError, KeyError, TypeError):
                unreadable += 1
                continue
            if (
                resume_step == 0
                or later
                or (validation_due and step == resume_step and record.keys() & {"val_loss", "generated"})
            ):
                dropped += 1
                continue
            reference_lines = record.get("reference_lines", reference_lines)
            changed |= not line.endswith(b"\n")
            new.write(line.rstrip(b"\n") + b"\n")
        new.flush()
        os.fsync(new.fileno())
    if dropped or unreadable or changed:
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some file systems cannot sync folders
            os.fsync(folder)
        os.close(folder)
    else:
        temporary.unlink()
    return dropped, unreadable, reference_lines


class _Appender:
    """Lines to the end of a file, handed to the system at once: a killed process loses none.

    What the disk refuses (full, for a while) is kept in memory and goes first at the next line, from the byte where it stopped.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._pending = b""
        self._closed = False

    def append(self, line: str) -> OSError | None:
        """Write a line; returns the error when this is the first line that has to wait."""
        if self._closed:
            return None
        waited = bool(self._pending)
        self._pending += line.encode() + b"\n"
        error = self._write_pending()
        return None if waited else error

    def sync(self) -> None:
        """Wait for the disk. Raises OSError when lines are left over."""
        error = self._write_pending()
        if error is not None:
            raise error
        os.fsync(self._file)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            try:
                self.sync()
            finally:
                os.close(self._file)

    def _write_pending(self) -> OSError | None:
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._file, self._pending) :]
        except OSError as error:
            return error
        return None


def _without_nonfinite(value: object, path: str, nonfinite: dict[str, str]) -> object:
    """The value with None for each number that JSON cannot write; their dotted paths and names go to `nonfinite`."""
    if isinstance(value, dict):
        return {key: _without_nonfinite(item, f"{path}.{key}".lstrip("."), nonfinite) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[path] = repr(float(value))
        return None
    return value
