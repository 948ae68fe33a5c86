"""What a run costs, and what its time is spent on, over all its starts: ledger.json in its folder.

Every start is a row: when it began and was last seen, its ranks, their price, and its seconds by purpose. The file is written
every few seconds and outlives the checkpoints: work that a kill loses was paid for, too. A start begins with its first process
and ends with it: what a machine costs before, after and between starts is not known here.

    training     steps that count, without waiting for data
    data         these steps' waiting for data
    validation   with its sample texts
    saving       what training waits for
    starting     from the start of the process to the first step, at every start
    lost         steps that no checkpoint kept: after a kill, a rollback, or a return to an earlier checkpoint
    down         between two starts, when nothing ran
    other        the rest, such as pictures and the end of a job
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
from pydantic import TypeAdapter, ValidationError

from pretrain.config import RunConfig
from pretrain.engines.base import Engine
from pretrain.files import unused_name
from pretrain.report.metrics import Clock
from pretrain.report.units import dollar_digits, human_dollars, human_seconds
from pretrain.run.directory import RunDirectory
from pretrain.run.progress import Progress

FILE_NAME, INVOICE = "ledger.json", "invoice.txt"
WRITE_SECONDS = 10.0
"""Between two notes of a running job, which are made after a step: what came since, a kill takes out of its account."""
NAMES = {
    "training": "training",
    "data": "waiting for data",
    "validation": "validation",
    "saving": "saving",
    "starting": "starting",
    "lost": "lost work",
    "down": "down between starts",
    "other": "other",
}
"""Purpose -> its name for people."""


@dataclass
class Job:
    """One start of a run."""

    began: float
    """Time when its first process began, seconds since 1970."""
    last: float
    """Time of its last sign of life."""
    ranks: int
    device: str
    dollars_per_hour: float
    """Of one rank; 0: unknown."""
    steps: float = 0.0
    """Seconds of all its steps, also those that were lost later, with their waiting for data."""
    validation: float = 0.0
    saving: float = 0.0
    starting: float = 0.0
    first_step: int = 0
    last_step: int = 0
    exit_status: int | None = None
    """None: it still runs, or was killed."""

    @property
    def rank_hours(self) -> float:
        """Hours of all its ranks together."""
        return (self.last - self.began) / 3600 * self.ranks


@dataclass
class Forecast:
    """What a run was expected to cost in all, and to take."""

    step: int
    """After which it was made; 0: it is the plan, made before the run."""
    dollars: float
    hours: float
    """Of all starts so far and to come, without the time between them."""


@dataclass
class Ledger:
    """The account of a run; only rank 0 writes it. Open it with `open_ledger`."""

    config: RunConfig
    write: Callable[[str, str], None]
    """Writes a text to a file of the run's folder."""
    jobs: list[Job]
    """In their order; the last one is this start."""
    is_kept: bool = True
    """False on the ranks that keep no account."""
    inherited: float = 0.0
    """Seconds of useful steps in the checkpoint of another run that this run began with."""
    planned: Forecast | None = None
    """What the plan expects (`reality.planned`); where it knows no speed, the first forecast of the run."""
    to_finish_dollars: float | None = None
    """What it would take to finish, as far as the newest logging line knew."""
    clock: Clock | None = None
    _before: Job | None = None  # this start up to the present clock: after a rollback there is another
    _steps: deque[float] = field(default_factory=lambda: deque(maxlen=8))  # seconds of the newest ones
    _written: float = -WRITE_SECONDS
    _writer: threading.Thread | None = None

    # ---------------------------------------------------------------- what the loop notes

    @property
    def job(self) -> Job:
        """This start."""
        return self.jobs[-1]

    def begin(self, clock: Clock, step: int) -> None:
        """Training begins after `step`, timed by `clock`."""
        self._count()
        if self.clock is None:
            self.job.starting, self.job.first_step = time.time() - self.job.began, step
        self._before, self.clock, self._seen = dataclasses.replace(self.job), clock, 0.0

    def note_step(self, step: int) -> None:
        """Notes that `step` is complete, now and then in the file."""
        total = self.clock.total_seconds
        self._steps.append(total - self._seen)
        self._seen, self.job.last_step = total, step
        if time.monotonic() - self._written > WRITE_SECONDS and not self._is_writing():
            self._writer = threading.Thread(target=self._try_to_write, args=[self._text()], name="ledger", daemon=True)
            self._writer.start()  # the next step does not wait for the disk

    def save(self) -> None:
        """Writes ledger.json. Raises OSError."""
        if self._is_writing():
            self._writer.join()  # else an older account would replace this one
        self.write(FILE_NAME, self._text())

    def _is_writing(self) -> bool:
        return self._writer is not None and self._writer.is_alive()

    def _try_to_write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk does not stop a run; the next note tries again
            self.write(FILE_NAME, text)

    def _text(self) -> str:
        self._count()
        self._written = time.monotonic()
        content = _File(self.jobs, self.inherited, self.planned, self.to_finish_dollars)
        return json.dumps(dataclasses.asdict(content), indent=1) + "\n"

    def _count(self) -> None:
        job, before, clock = self.job, self._before, self.clock
        job.last = time.time()
        if clock is not None:
            job.steps = before.steps + clock.total_seconds
            job.validation = before.validation + clock.totals["validation"] + clock.totals["tasks"]
            job.saving = before.saving + clock.totals["save"]

    # ---------------------------------------------------------------- money

    @property
    def dollars_per_hour(self) -> float:
        """Of all ranks of this start."""
        return self.config.dollars_per_hour * self.job.ranks

    @property
    def dollars(self) -> float:
        """Spent so far. A start without a price counts at today's."""
        self.job.last = time.time()
        return sum(job.rank_hours * (job.dollars_per_hour or self.config.dollars_per_hour) for job in self.jobs)

    def budget_is_reached(self, stop_seconds: float) -> bool:
        """True if the budget does not suffice for two more steps (one may be under way) and an end that takes `stop_seconds`.

        So the run stops with a checkpoint before the budget is spent; a step that takes longer than those before it may
        overdraw it by what it takes longer."""
        if self.config.budget_dollars is None or not self.is_kept:
            return False
        ahead = 2 * max(self._steps, default=0.0) + stop_seconds
        return self.dollars + ahead / 3600 * self.dollars_per_hour >= self.config.budget_dollars

    @property
    def is_spent(self) -> bool:
        """True if a start would have nothing to spend."""
        return self.is_kept and self.dollars >= (self.config.budget_dollars or math.inf)

    def expect(self, seconds: float) -> None:
        """Notes that the run will be done in `seconds`."""
        if math.isfinite(seconds):
            self.to_finish_dollars = seconds / 3600 * self.dollars_per_hour

    def advice(self) -> str:
        """What was spent, what it would take to finish, as far as that is known, and the setting."""
        if not self.is_kept:
            return "rank 0 says what it has cost"
        text = f"{self._of_budget()}; "
        if not self.to_finish_dollars:
            return text + "to continue, start again with a larger run.budget_dollars"
        more = 1.05 * (self.dollars + self.to_finish_dollars)
        text += f"finishing takes about {human_dollars(self.to_finish_dollars)} more: start again with --run.budget_dollars "
        return f"{text}{more:.{dollar_digits(more)}f}, which has 5 % to spare"

    def _of_budget(self) -> str:
        spent = f"{human_dollars(self.dollars)} spent"
        return spent if self.config.budget_dollars is None else f"{spent} of {human_dollars(self.config.budget_dollars)}"

    # ---------------------------------------------------------------- figures

    def figures(self, progress: Progress, eta_seconds: float) -> dict[str, float]:
        """Of a logging line: cost so far and to the end, dollars per billion tokens that count, and the shares of the time."""
        found = {}
        if self.config.dollars_per_hour:
            spent = self.dollars
            self.expect(eta_seconds)
            found = {"cost_dollars": spent, "cost_total_dollars": spent + self.to_finish_dollars}
            found["dollars_per_billion_tokens"] = spent / progress.tokens * 1e9 if progress.tokens else None
            if self.planned is None and len(self._steps) > 1:  # the first step includes the warm-up
                hours = sum(job.last - job.began for job in self.jobs) + eta_seconds
                self.planned = Forecast(progress.step, found["cost_total_dollars"], hours / 3600)
        return found | {f"time/{name}": share for name, share in self.shares(progress).items()}

    def shares(self, progress: Progress) -> dict[str, float]:
        """Purpose -> its share of the time since the first start; they sum to 1."""
        seconds = self.seconds(progress)
        return {name: value / max(sum(seconds.values()), 1e-9) for name, value in seconds.items()}

    def seconds(self, progress: Progress) -> dict[str, float]:
        """Purpose -> seconds over all starts and between them. At a logging line, when `progress` is complete."""
        self._count()
        jobs = self.jobs
        steps, validation, saving, starting = (
            sum(getattr(job, name) for job in jobs) for name in ("steps", "validation", "saving", "starting")
        )
        useful = progress.train_seconds + (self.clock.train_seconds if self.clock else progress.interval_seconds)
        waited = progress.data_seconds + (self.clock.data_seconds if self.clock else 0.0)
        useful = min(max(0.0, useful - self.inherited), steps)
        waited = min(waited, useful)
        running = sum(job.last - job.began for job in jobs)
        down = sum(max(0.0, job.began - before.last) for before, job in itertools.pairwise(jobs))
        other = max(0.0, running - steps - validation - saving - starting)
        return {
            "training": useful - waited, "data": waited, "validation": validation, "saving": saving, "starting": starting,
            "lost": steps - useful, "down": down, "other": other,
        }  # fmt: skip

    # ---------------------------------------------------------------- the end

    def end(self, status: int, progress: Progress) -> list[str]:
        """Notes how this start ends, and writes the invoice. -> its summary, in lines."""
        self.note_end(status)
        lines = self.summary(progress)
        self.write(INVOICE, "\n".join([*lines, "", *self._table()]) + "\n")
        return lines

    def note_end(self, status: int) -> None:
        """Notes with which status this start ends."""
        self.job.exit_status = status
        self.save()

    def summary(self, progress: Progress) -> list[str]:
        """The cost and the time, in two or three lines."""
        lines, seconds = [], sum(job.last - job.began for job in self.jobs)
        if self.config.dollars_per_hour:
            tokens = progress.tokens
            line = f"cost       {self._of_budget()}"
            line += f", {human_dollars(self.dollars / tokens * 1e9)} per billion tokens" if tokens else ""
            lines.append(line)
            if plan := self.planned:
                source = f"forecast after step {plan.step:,}" if plan.step else "by the settings, before the start"
                line = f"planned    {human_dollars(plan.dollars)} in {human_seconds(3600 * plan.hours)} ({source})"
                share = self.dollars / max(plan.dollars, 1e-9)
                lines.append(f"{line}; paid so far: {share:.0%} of it, in {human_seconds(seconds)}")
        shares = [f"{NAMES[name]} {share:.1%}" for name, share in self.shares(progress).items() if share >= 0.0005]
        total = human_seconds(sum(self.seconds(progress).values()))
        starts = f"{len(self.jobs)} start{'s' * (len(self.jobs) > 1)}"
        return [*lines, f"time       {total} since the first of {starts}: {', '.join(shares)}"]

    def _table(self) -> list[str]:
        """A row for every start."""
        titles = ("start", "began (UTC)", "hours", "ranks", "$/h each", "cost", "steps", "status", "device")
        rows = [titles]
        for number, job in enumerate(self.jobs, 1):
            price = job.dollars_per_hour or self.config.dollars_per_hour
            steps = f"{job.first_step:,} to {job.last_step:,}" if job.last_step > job.first_step else "none"
            status = "killed" if job.exit_status is None else str(job.exit_status)
            began = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(job.began))
            cost = human_dollars(job.rank_hours * price) if price else "-"
            hours = f"{(job.last - job.began) / 3600:.4f}"
            rows.append((str(number), began, hours, str(job.ranks), f"{price:g}", cost, steps, status, job.device))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


@dataclass
class _File:
    """The content of ledger.json."""

    jobs: list[Job]
    inherited: float = 0.0
    planned: Forecast | None = None
    to_finish_dollars: float | None = None


_READER = TypeAdapter(_File)


def open_ledger(config: RunConfig, directory: RunDirectory, engine: Engine) -> Ledger:
    """The account of a run with a row for this start; ranks other than 0 have one of their own, which nobody reads. Raises
    OSError."""
    found, path = _File([]), directory.path / FILE_NAME
    if engine.rank == 0 and path.exists():
        try:
            found = _READER.validate_json(path.read_bytes())
        except ValidationError as error:
            aside = unused_name(path.with_name(f"unreadable-{FILE_NAME}"))
            path.rename(aside)
            problem = error.errors(include_url=False)[0]["msg"]
            text = f"{path} cannot be read ({problem}) and is now {aside.name}: the cost counts from this start"
            print(f"pretrain: {text}", file=sys.stderr, flush=True)
    before = found.jobs[-1].last if found.jobs else 0.0
    began = max(before, psutil.Process().create_time())  # which is right to a second
    job = Job(began, time.time(), engine.world_size, engine.device_name, config.dollars_per_hour)
    jobs = [*found.jobs, job]
    return Ledger(config, directory.write_text, jobs, engine.rank == 0, found.inherited, found.planned, found.to_finish_dollars)
