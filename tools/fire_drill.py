"""Fault-injection test of your configuration on a shrunken model.

Trains a small model with the configuration's engine, optimizer and data, once without faults (the baseline) and then once for
each fault: the fault is injected, the same command runs again, and the entire curve and the last checkpoint must equal the
baseline's. Checkpoints that the run reported must exist, every checkpoint must be complete, and no process may be left behind.

Exit status: 0 every fault was survived, 1 some were not, 2 the configuration or the command is wrong, or it does not train.
"""

from __future__ import annotations

import dataclasses
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil

from pretrain import UserError
from pretrain.checkpoint.manifest import checkpoints
from pretrain.config import Config, load
from pretrain.engines.config import Work, nearest
from pretrain.files import read_json_lines
from pretrain.model.config import shrink
from pretrain.run import command_line
from pretrain.run.directory import read_state
from pretrain.schema import to_yaml

ROOT = Path(__file__).resolve().parents[1]
STEPS, SAVE_EVERY, PATIENCE_SECONDS = 96, 8, 180
BEGIN = "  run        "
"""Begins the first console line of every start."""
SAME = ("step", "loss", "grad_norm", "lr", "tokens", "val_loss")
ALLOWED = {"loss": 1e-5, "grad_norm": 1e-3, "val_loss": 1e-5}
"""Relative differences that another order of summation may cause on GPUs; on CPUs there are none, and the table says so."""


class Broken(UserError):
    """A promise that did not hold; the message goes into the table."""


class Result(NamedTuple):
    """One line of the table."""

    fault: str
    survived: bool
    outcome: str
    steps_lost: int | None
    recovery_seconds: float | None


def main(argv: list[str]) -> int:
    """-> exit status."""
    parser = command_line.make_parser(__doc__)
    command_line.add_settings(parser)
    parser.add_argument(
        "--processes", type=command_line.at_least(1), default=2, metavar="N", help="ranks (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT", help="inject only "
                        "these, of " + ", ".join(FAULTS))  # fmt: skip
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the runs to this folder and keep them")
    options, settings = command_line.parse_with_settings(parser, argv)
    config = load(settings, world_size=None, program="tools/fire_drill.py")
    folder = options.keep or Path(tempfile.mkdtemp(prefix="fire_drill_"))
    drill = Drill(config, options.processes, folder)
    drill.train_baseline()
    print(f"{'fault':16}  {'':8}  {'steps lost':>10}  {'recovery':>8}  outcome")
    results = []
    for name in options.only:
        results.append(result := drill.inject(name))
        lost = "-" if result.steps_lost is None else result.steps_lost
        seconds = "-" if result.recovery_seconds is None else f"{result.recovery_seconds:.1f} s"
        verdict = "survived" if result.survived else "BROKEN"
        print(f"{name:16}  {verdict:8}  {lost:>10}  {seconds:>8}  {result.outcome}", flush=True)
    broken = sum(not result.survived for result in results)
    if broken:
        print(f"{broken} of {len(results)} faults were not survived; the runs are in {folder}")
        return 1
    if not options.keep:
        shutil.rmtree(folder)
    print(f"all {len(results)} faults were survived")
    return 0


def shrink_run(config: Config, processes: int, directory: Path) -> Config:
    """A run of a minute: a small model of the same kind, short samples, many checkpoints; engine, optimizer and data stay."""
    length = min(32, config.data.sequence_length)
    model = shrink(config.model, length)
    batch = dataclasses.replace(config.batch, global_batch_size=4 * processes, micro_batch_size=2)
    engine = dataclasses.replace(config.engine, world_size=None, timeout_seconds=60.0)
    work = Work(model, length, batch.global_batch_size, batch.micro_batch_size)
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, name="baseline", directory=str(directory)),
        model=model,
        data=dataclasses.replace(config.data, sequence_length=length, block_length=None, quarantine=None),
        batch=batch,
        schedule=dataclasses.replace(config.schedule, warmup_steps=min(8, config.schedule.warmup_steps), decay_steps=None),
        train=dataclasses.replace(config.train, max_steps=STEPS, max_tokens=None, epochs=None, stages=None),
        engine=nearest(engine, work, processes) or engine,
        evaluate=dataclasses.replace(config.evaluate, every_steps=STEPS // 4, max_batches=2),
        checkpoint=dataclasses.replace(
            config.checkpoint, every_steps=SAVE_EVERY, every_minutes=0, keep_last=2, resume="auto", allow_changes=[]
        ),
        log=dataclasses.replace(config.log, every_steps=1, sinks=["console", "jsonl"]),
    )


class Job:
    """One start of a run under the real launcher."""

    def __init__(self, run: Path, command: list[str], *, file_limit: int | None = None, **variables: str):
        self.run, self.began, self.starts_before = run, time.monotonic(), console(run).count(BEGIN)
        self.output = open(run.with_suffix(".log"), "a")
        environment = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **os.environ, **variables}
        limit = None if file_limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        self.launcher = subprocess.Popen(
            command,
            env=environment,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=limit,
        )

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Polls without a pause: some faults must be injected within milliseconds. Raises Broken."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if self.launcher.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise Broken(f"the run exited or hung before it {what}; see {self.output.name}")
            time.sleep(0.001)

    def family(self) -> list[psutil.Process]:
        """The launcher and its descendants, the last rank first."""
        try:
            launcher = psutil.Process(self.launcher.pid)
            return [*reversed(launcher.children(recursive=True)), launcher]
        except psutil.NoSuchProcess:
            return []

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, in order."""
        ranks = [process for process in self.family() if "RANK" in process.environ()]
        if not ranks:  # one process
            ranks = [process for process in self.family() if process.pid != self.launcher.pid]
        return sorted(ranks, key=lambda process: int(process.environ().get("RANK", 0)))

    def kill(self) -> None:
        """kill -9 of all processes at once."""
        for process in self.family():
            process.kill()
        self.launcher.wait()

    def end(self, family: list[psutil.Process]) -> None:
        """Waits for the launcher's exit. Kills what is left of its family, and then raises Broken."""
        try:
            self.launcher.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Broken(f"the job did not exit within {PATIENCE_SECONDS} s") from None
        _, left = psutil.wait_procs(family, timeout=10)
        for process in left:
            process.kill()
        if left:
            raise Broken(f"{len(left)} processes were left behind")


class Drill:
    """The configuration under test and its baseline."""

    def __init__(self, config: Config, processes: int, folder: Path):
        self.folder, self.processes = folder, processes
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = folder / "drill.yaml"
        self.settings.write_text(to_yaml(shrink_run(config, processes, folder)))
        self.engine = load(["--config", str(self.settings)], world_size=processes).engine  # it must be valid, too
        self.random = random.Random(config.run.seed)

    def start(self, name: str, *flags: str, **options) -> Job:
        """Starts or resumes the run `name`."""
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
        if self.processes > 1:
            cpus = ROOT / "launch" / "accelerate" / "cpu.yaml"
            launcher += ["--config_file", str(cpus), "--num_processes", str(self.processes)]
        settings = ["--config", str(self.settings), "--run.name", name, *flags]
        return Job(self.folder / name, [*launcher, str(ROOT / "launch" / "pretrain.py"), *settings], **options)

    def train_baseline(self) -> None:
        """Trains the run that all others are compared with. Raises Broken if it does not complete."""
        kinds = [f"{kind} {degree}" for kind, degree in dataclasses.asdict(self.engine.parallel).items() if degree > 1]
        about = [self.engine.name, *kinds, f"{self.processes} processes", f"{STEPS} steps", f"a checkpoint every {SAVE_EVERY}"]
        print(f"baseline: {', '.join(about)}", flush=True)
        job = self.start("baseline")
        job.end([])
        if exit_status(job.run) != 0:
            raise Broken(f"the configuration does not train even without faults; see {job.output.name}")
        self.baseline = records(job.run)

    def inject(self, name: str) -> Result:
        """Injects one fault. -> its line of the table."""
        run = self.folder / name
        try:
            outcome, lost, seconds = FAULTS[name](self, name)
            differences = self.compare(run)
            return Result(name, True, f"{outcome}; curve {differences}", lost, seconds)
        except Broken as error:
            return Result(name, False, str(error), None, None)

    def resume(self, run: Path, struck_at: float) -> tuple[int, float]:
        """Runs the same command again. -> (steps lost, seconds from the fault to the first new step). Raises Broken."""
        reached, reported = last_step(run), reported_step(run)
        require_complete(run)
        return self.watch(self.start(run.name), reached, reported, struck_at)

    def watch(self, job: Job, reached: int, reported: int, struck_at: float) -> tuple[int, float]:
        """Follows a run that resumes. -> as `resume`."""
        run = job.run
        job.wait_until(lambda: has_resumed(job), "resumed")
        resumed = resumed_step(run)
        if resumed < reported:
            raise Broken(f"resumed after step {resumed}, but the checkpoint of step {reported} had been reported as saved")
        seen = time.monotonic()
        family = job.family()
        job.end(family)
        if (status := exit_status(run)) != 0:
            raise Broken(f"exited with status {status} after it resumed: {read_state(run).get('reason')}")
        return reached - resumed, seen - struck_at

    def compare(self, run: Path) -> str:
        """Describes how the curve of a run differs from the baseline. Raises Broken where it must not."""
        mine = records(run)
        if [r["step"] for r in mine] != [r["step"] for r in self.baseline]:
            raise Broken("steps are missing from the curve or appear twice")
        largest = 0.0
        for record, expected in zip(mine, self.baseline, strict=True):
            for key in SAME:
                a, b = record.get(key), expected.get(key)
                if a == b:
                    continue
                difference = abs(a - b) / abs(b) if a is not None and b else float("inf")
                largest = max(largest, difference)
                if difference > ALLOWED.get(key, 0.0):
                    raise Broken(f"{key} of step {record['step']} is {a}, the baseline's is {b}")
        return f"within {largest:.0e}" if largest else "bit-identical"


# ---------------------------------------------------------------- what a run wrote


def records(run: Path) -> list[dict]:
    """The steps and validations in metrics.jsonl."""
    path = run / "metrics.jsonl"
    found = read_json_lines(path).records if path.exists() else []
    return [record for record in found if "loss" in record or "val_loss" in record]


def last_step(run: Path) -> int:
    """The newest step in metrics.jsonl; 0: none."""
    return max((record["step"] for record in records(run)), default=0)


def exit_status(run: Path) -> int | None:
    """The exit status of the newest attempt."""
    return read_state(run).get("exit_status")


def entries(folder: Path) -> set[str]:
    """Names in a folder, which need not exist."""
    return set(os.listdir(folder)) if folder.exists() else set()


def require_complete(run: Path) -> None:
    """Raises Broken if a folder has the name of a checkpoint and is not a complete one."""
    for checkpoint in checkpoints(run / "checkpoints"):
        if damage := checkpoint.damage():
            raise Broken(f"a checkpoint is not complete: {damage}")


def console(run: Path) -> str:
    """The content of console.log."""
    path = run / "console.log"
    return path.read_text() if path.exists() else ""


def reported_step(run: Path) -> int:
    """The newest checkpoint that the run reported as saved; 0: none."""
    return max((int(step) for step in re.findall(r"saved .*step_(\d+)$", console(run), re.MULTILINE)), default=0)


def resumed_step(run: Path) -> int:
    """The step after which the newest attempt resumed; 0: it started anew."""
    begins = re.findall(BEGIN + r"\S.*?(?:, resuming after step ([\d,]+))?$", console(run), re.MULTILINE)
    return int(begins[-1].replace(",", "") or 0) if begins else 0


def has_resumed(job: Job) -> bool:
    """True once the job has completed a step of its own."""
    return console(job.run).count(BEGIN) > job.starts_before and last_step(job.run) > resumed_step(job.run)


# ---------------------------------------------------------------- faults: each -> (outcome, steps lost, seconds to recovery)


def start_until_random_step(drill: Drill, name: str) -> tuple[Job, list[psutil.Process]]:
    """A run that has reached a random step."""
    job, step = drill.start(name), drill.random.randrange(SAVE_EVERY + 2, STEPS // 2)
    job.wait_until(lambda: last_step(job.run) >= step, f"reached step {step}")
    return job, job.family()


def kill_rank(drill: Drill, name: str) -> tuple[str, int, float]:
    """kill -9 of the last rank."""
    job, family = start_until_random_step(drill, name)
    struck = time.monotonic()
    job.ranks()[-1].kill()
    job.end(family)
    ended = time.monotonic() - struck
    return (f"the job exited {ended:.1f} s later", *drill.resume(job.run, struck))


def kill_all(drill: Drill, name: str) -> tuple[str, int, float]:
    """kill -9 of every process, as when a machine fails."""
    job, _ = start_until_random_step(drill, name)
    struck = time.monotonic()
    job.kill()
    return ("nothing could be saved", *drill.resume(job.run, struck))


def sigterm(drill: Drill, name: str) -> tuple[str, int, float]:
    """SIGTERM to the last rank alone: a spot notice."""
    job, family = start_until_random_step(drill, name)
    struck = time.monotonic()
    job.ranks()[-1].send_signal(signal.SIGTERM)
    job.end(family)
    ended = time.monotonic() - struck
    if exit_status(job.run) != 75:
        raise Broken(f"status {exit_status(job.run)} after SIGTERM, not 75")
    lost, seconds = drill.resume(job.run, struck)
    if lost:
        raise Broken(f"{lost} steps were lost although there was time to save")
    return f"saved by all ranks, exited {ended:.1f} s later", lost, seconds


def kill_in_save(drill: Drill, name: str) -> tuple[str, int, float]:
    """kill -9 of every process while a checkpoint is being written, three times, each a little later."""
    for delay_seconds in (0.0, 0.003, 0.01):
        job = drill.start(name)
        struck = kill_at_next_save(job, delay_seconds)
        require_complete(job.run)
    return ("no incomplete checkpoint was used", *drill.resume(job.run, struck))


def kill_at_next_save(job: Job, delay_seconds: float) -> float:
    """Kills as soon as a new name appears beside the checkpoints, or a little later. -> when, by time.monotonic."""
    folder = job.run / "checkpoints"
    job.wait_until(lambda: has_resumed(job), "resumed")
    known, family = entries(folder), job.family()
    job.wait_until(lambda: not entries(folder) <= known, "saved")
    time.sleep(delay_seconds)
    struck = time.monotonic()
    for process in family:
        process.kill()
    job.launcher.wait()
    return struck


def truncate_newest(drill: Drill, name: str) -> tuple[str, int, float]:
    """The largest file of the newest checkpoint loses its second half."""
    job, _ = start_until_random_step(drill, name)
    job.wait_until(lambda: len(checkpoints(job.run / "checkpoints")) > 1, "had two checkpoints")
    job.kill()
    newest, older = checkpoints(job.run / "checkpoints")[:2]
    file = max(newest.path.iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    struck, reached = time.monotonic(), last_step(job.run)
    lost, seconds = drill.watch(drill.start(name), reached, older.step, struck)
    if reached - lost != older.step:
        raise Broken(f"resumed after step {reached - lost}, not from the older checkpoint of step {older.step}")
    return f"fell back from step {newest.step} to step {older.step}", lost, seconds


def full_disk(drill: Drill, name: str) -> tuple[str, int, float]:
    """No file can grow beyond half a tensor file: every save fails."""
    job, family = start_until_random_step(drill, name)
    job.ranks()[0].send_signal(signal.SIGTERM)
    job.end(family)
    good = checkpoints(job.run / "checkpoints")[0]
    limit = max(path.stat().st_size for path in good.path.iterdir()) // 2
    job = drill.start(name, file_limit=max(limit, 64 * 1024))
    job.end([])
    struck = time.monotonic()
    if exit_status(job.run) != 74:
        raise Broken(f"status {exit_status(job.run)} on a full disk, not 74")
    if good.damage():
        raise Broken("the checkpoint from before the disk was full is damaged")
    return ("exited with 74, the older checkpoint is intact", *drill.resume(job.run, struck))


def wandb_outage(drill: Drill, name: str) -> tuple[str, None, None]:
    """A W&B server that refuses every connection."""
    dead = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    job = drill.start(name, "--log.sinks", "[console, jsonl, wandb]", **dead)
    job.end([])
    if exit_status(job.run) != 0:
        raise Broken(f"status {exit_status(job.run)}; see {job.output.name}")
    if not list((job.run / "wandb").glob("offline-run-*")):
        raise Broken("no offline records were kept for wandb sync")
    return f"not stopped, records kept for `wandb sync`; {time.monotonic() - job.began:.0f} s in total", None, None


_FAULTS = (kill_rank, kill_all, sigterm, kill_in_save, truncate_newest, full_disk, wandb_outage)
FAULTS = {fault.__name__: fault for fault in _FAULTS}


if __name__ == "__main__":
    sys.exit(command_line.run(main))
