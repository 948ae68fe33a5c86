"""The outputs of a run: metrics.jsonl, console and console.log, Weights & Biases, TensorBoard.

metrics.jsonl is the source of truth. W&B and TensorBoard are trackers: no outage of theirs can stop or slow the run. Knows
nothing of models, data or devices: it receives finished numbers as records (see records.py).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.report.alarms import Alarms, kind_of
from pretrain.report.config import LogConfig
from pretrain.report.console import Console
from pretrain.report.records import FILE_NAME, LineFile, Losses, cut_records, to_json
from pretrain.schema import flatten

if TYPE_CHECKING:
    from pretrain.report.trackers import Tracker

TRACKER_CLOSE_SECONDS = 28.0


@dataclass
class Sinks:
    """All outputs of one run; a context manager. Without outputs, as on every rank but the first, it does nothing."""

    console: Console | None = None
    metrics: LineFile | None = None
    trackers: list[Tracker] = field(default_factory=list)
    step: int = 0
    """Step of the newest record."""
    reference_lines: dict[str, float] | None = None
    """Reference losses of the data, nats per token by name; None before the start record."""
    wandb_id: str | None = None
    """The W&B run, for a later start that continues it."""
    losses: Losses = field(default_factory=Losses)
    """The loss curve that metrics.jsonl holds."""
    alarms: Alarms | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    """Of `metrics`: the thread of the alarms logs, too."""

    @property
    def keeps_metrics(self) -> bool:
        """metrics.jsonl is among the outputs."""
        return self.metrics is not None

    @property
    def kept(self) -> str:
        """What is left of the records when a tracker fails, in words."""
        return f"{FILE_NAME} is complete" if self.keeps_metrics else f"log.sinks has no jsonl, so {FILE_NAME} lacks its records"

    @property
    def lacks_start(self) -> bool:
        """metrics.jsonl has no start record yet: a fresh start, one from another run's checkpoint, or the file was removed."""
        return self.keeps_metrics and self.reference_lines is None

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            self.close()
            return
        self.ended(getattr(error, "status", 1), f"{kind.__name__}: {error}".splitlines()[0])
        with contextlib.suppress(OSError):  # the error that ends the run says more
            self.close()

    def log(self, record: dict) -> None:
        """Writes one record to all outputs. Errors are reported once and never raised."""
        if self.metrics is not None:
            with self._lock:
                problem = self.metrics.append(to_json(record))
            if problem is not None:
                self.info(f"{FILE_NAME} {problem}.")
        self.reference_lines = record.get("reference_lines", self.reference_lines)
        self.step = record["step"]
        self.losses.add(record)
        for tracker in self.trackers:
            tracker.log(record, self.reference_lines)
        if self.console is not None:
            self.console.show(record, self.reference_lines)
        if self.alarms is not None:
            self._watch(record)

    def alarm(self, kind: str, text: str) -> None:
        """Logs an alarm, which `log` sends to people."""
        self.info(f"alarm      step {self.step:,}: {text}")
        self.log({"step": self.step, "alarm": kind, "text": text})

    def ended(self, status: int, reason: str) -> None:
        """Tells people how the run ended. No record: a later start continues metrics.jsonl, and run_state.json has it."""
        if self.alarms is not None:
            self._send(
                {
                    "step": self.step,
                    "alarm": kind_of(status),
                    "text": reason or ("all steps are done" if status == 0 else f"status {status}"),
                }
            )

    def _watch(self, record: dict) -> None:
        """Sends a record that is an alarm, and raises the one that follows from a record, if any."""
        self._send(record)
        if "alarm" not in record:
            self.alarms.reached(record["step"])
            if text := self.alarms.skipped(record):  # the console marks such lines
                self.log({"step": record["step"], "alarm": "skipped_steps", "text": text})

    def _send(self, record: dict) -> None:
        if found := self.alarms.of(record):
            for tracker in self.trackers:
                tracker.alert(record["step"], *found)

    def image(self, name: str, path: Path) -> None:
        """Sends a PNG file to the trackers under `name`, for the newest step."""
        for tracker in self.trackers:
            tracker.put(self.step, {name: path})

    def info(self, text: str) -> None:
        """Writes lines for people: to the console and, with the time of day, to console.log."""
        if self.console is not None:
            self.console.info(text)

    def progress(self, step: int) -> None:
        """Notes that `step` is done, and moves the progress bar, if there is one."""
        if self.alarms is not None:
            self.alarms.reached(step)
        if self.console is not None:
            self.console.progress(step)

    def sync(self) -> None:
        """Makes all records durable, so that no power cut leaves a checkpoint without the curve that led to it.

        An error of the disk is reported, not raised: the checkpoint that follows matters more.
        """
        try:
            if self.metrics is not None:
                self.metrics.sync()
        except OSError as error:
            self.info(f"{FILE_NAME} is not on the disk yet ({error}); its lines are kept in memory.")

    def close(self) -> None:
        """Closes all outputs; safe to call twice. Waits for the trackers, at most TRACKER_CLOSE_SECONDS for all of them.

        Raises OSError when lines of metrics.jsonl are still not on the disk (full or failing), or no longer.
        """
        deadline = time.monotonic() + TRACKER_CLOSE_SECONDS
        if self.alarms is not None:
            self.alarms.end()
        for tracker in self.trackers:
            tracker.end()
        for tracker in self.trackers:
            tracker.join(max(0.0, deadline - time.monotonic()))
            if tracker.is_alive():
                waited = f"{TRACKER_CLOSE_SECONDS:.0f} s"
                self.info(f"{tracker.name} did not finish in {waited} and was abandoned; {self.kept}.")
        self.trackers.clear()
        if self.alarms is not None:
            self.alarms.close()
            self.alarms = None
        try:
            if self.console is not None:
                self.console.close()
        finally:
            if self.metrics is not None:
                metrics, self.metrics = self.metrics, None
                try:
                    metrics.verify()
                finally:
                    metrics.close()


def open_sinks(
    config: LogConfig,
    directory: Path,
    *,
    rank: int,
    name: str,
    settings: dict,
    total_steps: int,
    resume_step: int,
    wandb_id: str | None,
    repeated: Collection[str] = (),
) -> Sinks:
    """The outputs of the run in `directory`, for a start after `resume_step`; on ranks other than 0, outputs that do nothing.

    Cuts metrics.jsonl at `resume_step` (see `cut_records`). `settings` is the resolved configuration as plain data, for W&B.
    `wandb_id` continues that W&B run; None makes a new one. Raises OSError where a file cannot be opened.
    """
    if rank != 0:
        return Sinks()
    directory.mkdir(parents=True, exist_ok=True)
    console = Console(directory, shown="console" in config.sinks, step=resume_step, total_steps=total_steps)
    # Even without the jsonl sink: a later resume must not find records of an abandoned branch.
    losses = Losses()
    removed, reference_lines = cut_records(directory / FILE_NAME, resume_step, repeated, losses)
    if removed:
        console.info(f"{FILE_NAME}: removed {removed} lines that are unreadable or after step {resume_step}.")
    metrics = LineFile(directory / FILE_NAME) if "jsonl" in config.sinks else None
    outputs = Sinks(console, metrics, step=resume_step, reference_lines=reference_lines, losses=losses)
    if {"wandb", "tensorboard", "mlflow", "trackio"} & set(config.sinks):
        from pretrain.report.trackers import Tracker, WandbRun, choose_wandb_id, open_tensorboard
    skipped = None if resume_step else 0
    outputs.alarms = Alarms(config.alarms, name, skipped, outputs.alarm, console.info)
    known = False
    if {"wandb", "mlflow", "trackio"} & set(config.sinks):
        outputs.wandb_id, known = choose_wandb_id(directory, name, wandb_id)
    if "wandb" in config.sinks:
        run = WandbRun(config.wandb, outputs.wandb_id, name, settings, directory, resume_step, known, console.info)
        outputs.trackers.append(Tracker("W&B", run.open(), console.info, outputs.kept))
    if "tensorboard" in config.sinks:
        opened = open_tensorboard(directory / "tensorboard", resume_step)
        outputs.trackers.append(Tracker("TensorBoard", opened, console.info, outputs.kept))
    if {"mlflow", "trackio"} & set(config.sinks):
        from pretrain.report.self_hosted import Continued, open_mlflow, open_trackio

        continued = Continued(
            id=outputs.wandb_id,
            name=name,
            settings=flatten(settings),
            directory=directory,
            resume_step=resume_step,
            total_steps=total_steps,
            can_replay=outputs.keeps_metrics,
            info=console.info,
        )
        if "mlflow" in config.sinks:
            opened = open_mlflow(config.mlflow, continued)
            outputs.trackers.append(Tracker("MLflow", opened, console.info, outputs.kept))
        if "trackio" in config.sinks:
            opened = open_trackio(config.trackio, continued)
            outputs.trackers.append(Tracker("trackio", opened, console.info, outputs.kept))
    return outputs
