"""Copies of metrics.jsonl for people who look elsewhere: Weights & Biases and TensorBoard.

Each is fed by a thread of its own, so that no outage of theirs can stop or slow the run. They hold one value for each step and
name, also after a run went on from an earlier step: TensorBoard by a purge mark, W&B by rewinding where its server can, and
offline by a new file that metrics.jsonl is replayed into. Knows records, not what they mean; sinks.py says what they are.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from pretrain.config import LogConfig

WANDB_START_SECONDS = 20.0  # start + close stay under the 30 s that a preempted job typically has
SUPERSEDED = "superseded"

Values = dict[str, "int | float | Path | list[dict[str, str]]"]  # by name: numbers, pictures, texts
Copy = Callable[[int, Values], None]  # (step, values)


class CopyThread(threading.Thread):
    """Feeds one copy from a queue. A daemon: a copy that hangs for ever does not keep the process alive."""

    def __init__(self, name: str, opened: AbstractContextManager[Copy], say: Callable[[str], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._opened, self._say = opened, say
        self._jobs: queue.SimpleQueue[tuple[int, Values] | None] = queue.SimpleQueue()
        self.start()

    def put(self, step: int, values: Values) -> None:
        if self.is_alive():
            self._jobs.put((step, values))

    def end(self) -> None:
        self._jobs.put(None)

    def run(self) -> None:
        try:
            with self._opened as write:
                for job in iter(self._jobs.get, None):
                    write(*job)
        except BaseException as error:  # whatever a foreign library raises, SystemExit too, ends the copy alone
            self._say(f"{self.name} is off for the rest of this run ({one_line(error)}); metrics.jsonl is whole.")


@contextmanager
def wandb_copy(
    config: LogConfig,
    directory: Path,
    name: str,
    settings: dict,
    run_id: str,
    known: bool,
    resume_step: int,
    say: Callable[[str], None],
) -> Iterator[Copy]:
    """A W&B run, online if it answers in WANDB_START_SECONDS, else offline in <directory>/wandb; WANDB_MODE overrules the mode.
    known: W&B may have its curve up to `resume_step`; else it is given that.

    W&B's own step is ours, so all records of a step make one row, and tokens or hours can be the x axis of each.
    """
    # W&B's own telemetry blocks the exit for 12 s when the server hangs.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    if os.environ.pop("WANDB_DEBUG", None):
        say("WANDB_DEBUG is not obeyed: with it W&B writes its key in clear into its logs.")
    import wandb  # half a second, only for those who want it

    quiet = wandb.Settings(silent=True, console="off", init_timeout=WANDB_START_SECONDS, finish_timeout=WANDB_START_SECONDS)
    common = {"project": config.wandb.project, "entity": config.wandb.entity, "dir": directory, "name": name}
    common |= {"config": settings, "settings": quiet}
    mode = os.environ.get("WANDB_MODE", config.wandb.mode)
    run = None
    if mode == "online":
        try:
            run = _wandb_online(wandb, run_id, resume_step if known else 0, common, say)
        except Exception as error:
            say(f"W&B cannot be reached ({one_line(error)}); its records go to {directory / 'wandb'}, for `wandb sync` later.")
            wandb.teardown()  # or the id of the failed try stays in use
            mode = "offline"
    if run is None:
        superseded = _put_aside(directory / "wandb", run_id) if resume_step else 0
        run = wandb.init(mode=mode, id=run_id, resume="allow", **common)
    for axis in ("step", "tokens", "train_hours"):
        run.define_metric(axis, summary="max")
    run.define_metric("*", step_metric="step")
    run.define_metric("val_loss", step_metric="step", summary="min")

    def write(step: int, values: Values) -> None:
        row = {key: _for_wandb(wandb, value) for key, value in values.items()}
        run.log({"step": step, **row}, step=step)

    if resume_step and (run.offline or not known):
        _replay(directory / "metrics.jsonl", resume_step, write)
    if resume_step and run.offline:
        where = f", and {superseded} older files are in {directory / 'wandb' / SUPERSEDED}" if superseded else ""
        say(f"W&B is offline: its new file holds the curve up to step {resume_step:,} from metrics.jsonl{where}.")
    try:
        yield write
    finally:
        run.finish()


def _wandb_online(wandb, run_id: str, resume_step: int, common: dict, say: Callable[[str], None]):
    """The run on the server, cut after `resume_step`. Raises what W&B raises where there is no server, or no key."""
    wandb.setup(common["settings"])
    if not wandb.login(prompt=False, verify=False):  # init alone would ask on a terminal, and wait
        raise RuntimeError("no API key: set WANDB_API_KEY or run `wandb login`")
    run = None
    if resume_step:
        try:
            run = wandb.init(mode="online", resume_from=f"{run_id}?_step={resume_step}", **common)
        except Exception as error:
            wandb.teardown()
            wandb.setup(common["settings"])
            say(
                f"W&B cannot rewind the run ({one_line(error)}): what it has of steps after {resume_step:,} stays as it was; "
                "metrics.jsonl has the newer values."
            )
    if run is None:
        run = wandb.init(mode="online", id=run_id, resume="allow", **common)
    if run.url:
        say(f"W&B: {run.url}")
    return run


def _put_aside(folder: Path, run_id: str) -> int:
    """Offline files of earlier starts of this run, out of the way of `wandb sync`: the new one holds all. -> how many."""
    old = list(folder.glob(f"offline-run-*-{run_id}"))
    for path in old:
        (folder / SUPERSEDED).mkdir(exist_ok=True)
        taken = len(list((folder / SUPERSEDED).iterdir()))  # W&B's names hold the second, and two starts may share one
        os.replace(path, folder / SUPERSEDED / f"{taken}-{path.name}")
    return len(old)


def _replay(metrics: Path, resume_step: int, write: Copy) -> None:
    """All records of metrics.jsonl up to a step."""
    lines = None
    whole = metrics.read_bytes().rpartition(b"\n")[0] if metrics.exists() else b""  # the run is writing it already
    for line in whole.splitlines():
        record = json.loads(line)
        if record["step"] > resume_step:
            return  # of this start: they come by themselves
        lines = record.get("reference_lines", lines)
        write(record["step"], values_of(_with_nonfinite(record), lines))


def _for_wandb(wandb, value: object) -> object:
    if isinstance(value, Path):
        return wandb.Image(str(value))
    if isinstance(value, list):
        return wandb.Table(columns=list(value[0]), data=[list(row.values()) for row in value])
    return value


@contextmanager
def tensorboard_copy(directory: Path, resume_step: int) -> Iterator[Copy]:
    """TensorBoard event files; what an earlier life of the run wrote after `resume_step` is hidden by a purge mark."""
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


def _with_nonfinite(record: dict) -> dict:
    """A record of metrics.jsonl with its top-level numbers as they were logged."""
    named = {key: float(name) for key, name in record.get("nonfinite", {}).items() if key in record}
    return {key: value for key, value in (record | named).items() if key != "nonfinite"}


def values_of(record: dict, reference_lines: dict[str, float] | None) -> Values:
    """What the copies show of a record. Each validation carries the levels of the data, so that they are lines there, too."""
    lines = {"reference_lines": reference_lines} if reference_lines and "val_loss" in record else {}
    values: Values = dict(_numbers({**record, **lines}))
    if "generated" in record:
        values["generated"] = record["generated"]
    return values


def _numbers(record: dict, prefix: str = "") -> Iterator[tuple[str, int | float]]:
    """All numbers of a record but its step by name, those of nested dicts as "outer/inner"."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and prefix + key != "step":
            yield prefix + key, value


def one_line(error: BaseException) -> str:
    """The first line of an error with its type when it has no text."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
