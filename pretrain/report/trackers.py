"""Trackers: Weights & Biases and TensorBoard, which show the records of metrics.jsonl.

Each has its own thread, so that no outage can stop or slow the run. They show one value per step and name, even after the run
resumed from an earlier step: TensorBoard hides later values by a purge mark, a W&B server rewinds its run if it can, and
offline W&B starts a new file that gets all records of metrics.jsonl again. Knows records, but not what they mean.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pretrain import files
from pretrain.report.config import WandbConfig
from pretrain.report.records import iter_records

WANDB_ID_FILE = "wandb_id.json"
WANDB_START_SECONDS = 20.0  # start + close stay under the 30 s that a preempted job typically has
SUPERSEDED = "superseded"

Values = dict[str, "int | float | Path | list[dict[str, str]]"]  # by name: numbers, PNG files, tables of texts
Write = Callable[[int, Values], None]  # (step, values)


class Tracker(threading.Thread):
    """Feeds one tracker from a queue. A daemon: a tracker that hangs forever does not keep the process alive."""

    def __init__(self, name: str, opened: AbstractContextManager[Write], info: Callable[[str], None], kept: str) -> None:
        """kept: says for people where the records still are when the tracker fails."""
        super().__init__(name=name, daemon=True)
        self._opened, self._info, self._kept = opened, info, kept
        self._jobs: queue.SimpleQueue[tuple[int, Values] | None] = queue.SimpleQueue()
        self.start()

    def log(self, record: dict, reference_lines: dict[str, float] | None) -> None:
        """Queues what trackers show of a record; never waits."""
        self.put(record["step"], values_of(record, reference_lines))

    def put(self, step: int, values: Values) -> None:
        """Queues values; never waits."""
        if self.is_alive():
            self._jobs.put((step, values))

    def alert(self, step: int, kind: str, text: str) -> None:
        """Queues an alarm."""
        self.put(step, {"alarm": [{"alarm": kind, "text": text}]})

    def end(self) -> None:
        """Lets the thread finish when the queue is empty."""
        self._jobs.put(None)

    def run(self) -> None:
        """Opens the tracker and writes what is queued; an error disables this tracker alone."""
        try:
            with self._opened as write:
                for job in iter(self._jobs.get, None):
                    write(*job)
        except BaseException as error:  # libraries raise anything, even SystemExit
            self._info(f"{self.name} disabled for the rest of this run ({one_line(error)}); {self._kept}.")


def choose_wandb_id(directory: Path, name: str, saved: str | None) -> tuple[str, bool]:
    """(id of the W&B run that a start of run `name` in `directory` feeds, whether an earlier start has fed it).

    saved: the id in the checkpoint from which the start resumes; None: there is none, or it belongs to another run. A sweep or
    launch agent sets the id, and W&B accepts no other. Otherwise the run keeps its id, which is in `directory` before W&B
    starts, so that a run that is killed before its first checkpoint does not become two. A new run takes WANDB_RUN_ID, or an
    id of its own. Raises OSError.
    """
    last = files.read_json_object(directory / WANDB_ID_FILE)
    ours = (last.get("id") if last.get("name") == name else None) or saved
    given = os.environ.get("WANDB_RUN_ID")
    by_agent = os.environ.get("WANDB_SWEEP_ID") or os.environ.get("WANDB_LAUNCH")
    chosen = (given if by_agent else None) or ours or given or secrets.token_hex(4)
    files.write_atomically(directory / WANDB_ID_FILE, json.dumps({"id": chosen, "name": name}) + "\n")
    return chosen, chosen == ours


@dataclass(frozen=True)
class WandbRun:
    """A run at W&B, whose own step is ours: all records of a step make one row."""

    config: WandbConfig
    id: str
    name: str
    settings: dict
    directory: Path
    """The run's folder; W&B writes to wandb/ in it."""
    resume_step: int
    known: bool
    """W&B may have the curve up to `resume_step`; otherwise it gets the curve from metrics.jsonl."""
    info: Callable[[str], None]

    @contextmanager
    def open(self) -> Iterator[Write]:
        """Online if W&B answers in WANDB_START_SECONDS, else offline; WANDB_MODE overrides log.wandb.mode."""
        # W&B's own telemetry delays the exit by seconds when the server hangs.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        if os.environ.pop("WANDB_DEBUG", None):
            self.info("WANDB_DEBUG is ignored: with it, W&B writes its API key to its logs.")
        import wandb  # takes half a second, so only where it is used

        quiet = wandb.Settings(silent=True, console="off", init_timeout=WANDB_START_SECONDS, finish_timeout=WANDB_START_SECONDS)
        common = {"project": self.config.project, "entity": self.config.entity, "dir": self.directory, "name": self.name}
        common |= {"config": self.settings, "settings": quiet}
        mode = os.environ.get("WANDB_MODE", self.config.mode)
        run, superseded = self._start_online(wandb, common) if mode == "online" else None, 0
        if run is None:
            superseded = self._set_aside() if self.known else 0
            run = wandb.init(mode="offline" if mode == "online" else mode, id=self.id, resume="allow", **common)
        for axis in ("step", "tokens", "train_hours"):
            run.define_metric(axis, summary="max")
        run.define_metric("*", step_metric="step")
        run.define_metric("val_loss", step_metric="step", summary="min")

        def write(step: int, values: Values) -> None:
            for each in values.get("alarm", []):
                run.alert(f"{self.name}: {each['alarm']}"[:64], each["text"], wandb.AlertLevel.WARN)
            row = {key: _for_wandb(wandb, value) for key, value in values.items() if key != "alarm"}
            if not row:
                return
            run.log({"step": step, **row}, step=step)

        try:
            if self.resume_step and (run.offline or not self.known):
                self._replay(write)
            if self.resume_step and run.offline:
                folder = self.directory / "wandb"
                moved = f", and {superseded} older files are in {folder / SUPERSEDED}" if superseded else ""
                self.info(f"W&B is offline: its new file holds the curve up to step {self.resume_step:,}{moved}.")
            yield write
        finally:
            run.finish()

    def _start_online(self, wandb, common: dict):
        """The run on the server, without rows after `resume_step` if the server can rewind; None where W&B is out of reach."""
        try:
            wandb.setup(common["settings"])
            if not wandb.login(prompt=False, verify=False):  # init alone would ask on a terminal, and wait
                raise RuntimeError("no API key: set WANDB_API_KEY or run `wandb login`")
            run = self._rewind(wandb, common) if self.known else None
            run = run or wandb.init(mode="online", id=self.id, resume="allow", **common)
        except Exception as error:
            folder = self.directory / "wandb"
            self.info(f"W&B cannot be reached ({one_line(error)}); its records go to {folder}, for `wandb sync` later.")
            wandb.teardown()  # otherwise the id stays in use
            return None
        if run.url:
            self.info(f"W&B: {run.url}")
        return run

    def _rewind(self, wandb, common: dict):
        """The run on the server, cut after `resume_step`; None where the server refuses that."""
        try:
            return wandb.init(mode="online", resume_from=f"{self.id}?_step={self.resume_step}", **common)
        except Exception as error:
            wandb.teardown()
            wandb.setup(common["settings"])
            self.info(
                f"W&B cannot rewind the run ({one_line(error)}): it keeps its old values of steps after {self.resume_step:,}."
            )
            return None

    def _set_aside(self) -> int:
        """Moves offline files of earlier starts out of the way of `wandb sync`, which the new one replaces. -> their number."""
        old = list((self.directory / "wandb").glob(f"offline-run-*-{self.id}"))
        superseded = self.directory / "wandb" / SUPERSEDED
        for path in old:
            superseded.mkdir(exist_ok=True)
            count = len(list(superseded.iterdir()))  # names hold the second of a start, which two starts may share
            os.replace(path, superseded / f"{count}-{path.name}")
        return len(old)

    def _replay(self, write: Write) -> None:
        """Writes all records of metrics.jsonl up to `resume_step`; later ones are of this start and in the queue."""
        lines = None
        for record in iter_records(self.directory):
            if record["step"] > self.resume_step:
                return
            lines = record.get("reference_lines", lines)
            write(record["step"], values_of(record, lines))


def _for_wandb(wandb, value: object) -> object:
    """`value` as W&B wants it."""
    if isinstance(value, Path):
        return wandb.Image(str(value))
    if isinstance(value, list):
        return wandb.Table(columns=list(value[0]), data=[list(row.values()) for row in value])
    return value


@contextmanager
def open_tensorboard(directory: Path, resume_step: int) -> Iterator[Write]:
    """TensorBoard event files, with a purge mark that hides what an earlier start wrote after `resume_step`."""
    import matplotlib.image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step else 0) as writer:

        def write(step: int, values: Values) -> None:
            for key, value in values.items():
                if isinstance(value, Path):
                    writer.add_image(key, matplotlib.image.imread(value)[..., :3], step, dataformats="HWC")
                elif isinstance(value, list):
                    writer.add_text(key, "\n\n".join(" | ".join(row.values()) for row in value), step)
                else:  # float32, the default, would round token counts
                    writer.add_scalar(key, value, step, new_style=True, double_precision=True)
            writer.flush()

        yield write


def values_of(record: dict, reference_lines: dict[str, float] | None) -> Values:
    """The values that trackers show of a record. Each validation brings the reference losses, to draw them as lines."""
    lines = {"reference_lines": reference_lines} if reference_lines and "val_loss" in record else {}
    values: Values = dict(_numbers({**record, **lines}))
    if "generated" in record:
        values["generated"] = record["generated"]
    return values


def _numbers(record: dict, prefix: str = "") -> Iterator[tuple[str, int | float]]:
    """(name, number) of all numbers of a record but its step; those of nested dicts are "outer/inner"."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and prefix + key != "step":
            yield prefix + key, value


def one_line(error: BaseException) -> str:
    """The first line of an error, or its type when it has no text."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
