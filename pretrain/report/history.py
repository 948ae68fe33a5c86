"""What the records of a run say, in bounded memory: curves, events, texts, and the newest figures. For a screen and a page.

A run of 10^6 steps has more points than any screen. Curves keep every point while they are few; later, of each of about a
thousand equal spans of steps, the lowest and the highest value at their own steps, so that no spike disappears, and the mean.
"""

from __future__ import annotations

import copy
import math
from array import array
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from pretrain.doctor import verdict
from pretrain.report.records import Losses, Thinned, merge_equal
from pretrain.report.spikes import Spike, describe

SPANS = 1024
MOST_EVENTS, MOST_TEXTS, MOST_KEYS = 300, 24, 400
SOURCE_PREFIX, VALID_PREFIX, TIME_PREFIX, TASK_PREFIX = "loss/", "val_loss/", "time/", "task/"


class Points(NamedTuple):
    """A curve as it can be drawn."""

    step: np.ndarray  # (N,) of the lowest and highest values, in order
    value: np.ndarray  # (N,)
    mean_step: np.ndarray  # (M,) of the means of spans
    mean: np.ndarray  # (M,)
    count: int
    """Values that went into it, without those that are not finite."""


class Curve:
    """One figure over the steps of a run, thinned by spans of steps. `add` in the order of steps."""

    def __init__(self) -> None:
        self.count = 0
        self._width = 0.0  # of a span, in steps; 0: every point is kept. It only doubles, so spans of different width nest
        self._extremes = np.empty((0, 2))  # (N, 2) step, value
        self._sums = np.empty((0, 3))  # (M, 3) sums of steps and values, count
        self._new = array("d")  # step, value, step, value, ...

    def add(self, step: int, value: float) -> None:
        """Adds the newest value; one that is not finite is left out."""
        if math.isfinite(value):
            self.count += 1
            self._new.extend((step, value))
            if len(self._new) >= 8 * SPANS:
                self._thin()

    def points(self, spans: int = SPANS) -> Points:
        """The curve so far, in at most about this many spans."""
        self._thin()
        shown = copy.copy(self)  # whose arrays are replaced, never changed
        while len(shown._extremes) > 2 * spans:
            shown._widen()
        sums = shown._sums
        return Points(*shown._extremes.T, sums[:, 0] / sums[:, 2], sums[:, 1] / sums[:, 2], self.count)

    def _thin(self) -> None:
        new = np.array(self._new).reshape(-1, 2)
        self._new = array("d")
        self._extremes = np.concatenate([self._extremes, new])
        self._sums = np.concatenate([self._sums, np.insert(new, 2, 1.0, axis=1)])
        if self._width:
            self._merge()
        while len(self._extremes) > 2 * SPANS:
            self._widen()

    def _widen(self) -> None:
        self._width = 2 * self._width or 1.0
        self._merge()

    def _merge(self) -> None:
        """Keeps two extremes and one mean of each span, and the first and the newest value."""
        means = self._sums[:, 0] / self._sums[:, 2]
        self._sums = np.add.reduceat(self._sums, _begins(means // self._width))
        begins = _begins(self._extremes[:, 0] // self._width)
        ends = np.append(begins[1:], len(self._extremes))
        span_of = np.repeat(np.arange(len(begins)), ends - begins)
        order = np.lexsort((self._extremes[:, 1], span_of))  # by value within each span
        self._extremes = self._extremes[np.unique(np.r_[0, order[begins], order[ends - 1], len(order) - 1])]


def task_names(record: dict) -> list[str]:
    """The tasks in a record, in order."""
    ends = TASK_PREFIX, "/accuracy"
    return [
        key.removeprefix(ends[0]).removesuffix(ends[1]) for key in record if key.startswith(ends[0]) and key.endswith(ends[1])
    ]


def _begins(spans: np.ndarray) -> np.ndarray:
    """Where each span begins in the ascending numbers of spans (N,)."""
    return np.flatnonzero(np.diff(spans, prepend=-1))


class Event(NamedTuple):
    """Something that happened to a run."""

    step: int
    kind: str
    """spike, not finite, rollback, stage, slow rank, or the kind of an alarm."""
    text: str
    alarm: bool
    """True if a person should look at it."""
    samples: list
    """Of a spike: (source number, epoch, sample) of each sample of its step."""
    texts: list
    """Of a spike: how some of them begin."""


class History:
    """Takes the records of a run, in order, and keeps what a screen or a page shows of them."""

    def __init__(self) -> None:
        self.curves: dict[str, Curve] = {}
        """By key: numbers of logging steps and validations."""
        self.events: list[Event] = []
        """The newest MOST_EVENTS."""
        self.num_events = 0
        self.reference_lines: dict[str, float] = {}
        self.start: dict = {}
        """The start record."""
        self.newest: dict = {}
        """The newest logging step."""
        self.validation: dict = {}
        """The newest validation."""
        self.tasks: dict = {}
        """The newest measurement of the tasks."""
        self.step = 0
        """The largest step of a record."""
        self.not_finite = 0
        """Logging steps without a finite loss."""
        self.losses = Losses()
        self._generated = Thinned(MOST_TEXTS)
        self._intervals: deque[int] = deque(maxlen=20)

    def add(self, records: Iterable[dict]) -> None:
        """Takes records. What a record holds that no run of this version writes is left out."""
        for record in records:
            self._add(record)

    def _add(self, record: dict) -> None:
        step = record["step"]
        self.step = max(self.step, step)
        self.losses.add(record)
        if "reference_lines" in record:
            self.reference_lines = {name: x for name, x in record["reference_lines"].items() if math.isfinite(x)}
            self.start = record
        if "loss" in record:
            if self.newest:
                self._intervals.append(step - self.newest["step"])
            self.newest = record
            self._add_numbers(record)
            if record["loss"] is None or not math.isfinite(record["loss"]):
                self.not_finite += 1
                self._happened(step, "not finite", "the loss of this logging line is not finite", alarm=True)
        elif "val_loss" in record:
            self.validation = record
            self._add_numbers(record)
        elif "task_accuracy" in record:
            self.tasks = record
            self._add_numbers(record)
        for event in _events(record):
            self._happened(*event)
        texts = record.get("generated")
        if isinstance(texts, list) and all(isinstance(each, dict) and {"prompt", "text"} <= each.keys() for each in texts):
            self._generated.add(step, texts)

    def _add_numbers(self, record: dict) -> None:
        for key, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
                if key not in self.curves and len(self.curves) < MOST_KEYS:
                    self.curves[key] = Curve()
                if key in self.curves:
                    self.curves[key].add(record["step"], value)

    def _happened(self, step: int, kind: str, text: str, alarm: bool, samples: list = [], texts: list = []) -> None:  # noqa: B006
        self.num_events += 1
        self.events.append(Event(step, kind, text, alarm, samples, texts))
        if len(self.events) > MOST_EVENTS:
            del self.events[0]

    # ------------------------------------------------------------ what it means

    def verdict(self) -> verdict.Verdict | None:
        """The verdict on the loss curve; None before the first logging step, or without reference losses."""
        if not self.newest or "uniform" not in self.reference_lines:
            return None
        sources = sum(key.startswith(SOURCE_PREFIX) for key in self.curves)
        passes = math.nan if sources > 1 else self.newest.get("epoch", math.nan)
        curve = verdict.Curve(*self.losses.train.columns, *self.losses.valid.columns, passes)
        return verdict.judge(curve, self.reference_lines)

    @property
    def generated(self) -> list[tuple[int, list[dict]]]:
        """(step, [{"prompt", "text"}]): the first, the newest, and some between them."""
        return self._generated.points

    @property
    def task_names(self) -> list[str]:
        """Of the newest measurement of the tasks."""
        return task_names(self.tasks)

    @property
    def lines(self) -> dict[str, float]:
        """The reference losses, those of equal height under one name."""
        return merge_equal(self.reference_lines)

    @property
    def seconds_per_line(self) -> float:
        """Seconds of training between logging steps, recently; NaN: unknown."""
        rate, tokens = self.newest.get("tokens_per_second"), self.start.get("tokens_per_step")
        if not (rate and tokens and self._intervals):
            return math.nan
        return max(self._intervals) * tokens / rate


def _events(record: dict) -> Iterable[tuple]:
    """What a record says about events, as the arguments of `_happened`."""
    step = record["step"]
    spike = record.get("spike")
    if isinstance(spike, dict) and all(isinstance(spike.get(key), int | float) for key in ("step", *Spike._fields)):
        text = describe(spike["step"], Spike(*(spike[key] for key in Spike._fields)))
        yield spike["step"], "spike", text, True, record.get("samples", []), record.get("texts", [])
    if "skipped_positions" in record:
        first, end = record["skipped_positions"]
        yield step, "rollback", f"rolled back; the samples at positions {first:,} to {end - 1:,} are skipped", True
    if "stage" in record:
        shares = record.get("shares", {})
        sources = ", ".join(f"{100 * share:.3g} % {name}" for name, share in shares.items())
        size = f"sequences of {record.get('sequence_length', 0):,} tokens, {record.get('global_batch_size', 0):,} per step"
        yield step, "stage", f"stage {record['stage']} begins: {sources}; {size}", False
    for key, what in (
        ("stuck_parameters", "parameters do not change"),
        ("diverged_ranks", "ranks hold other weights than rank 0"),
    ):
        if isinstance(record.get(key), int | float) and record[key] > 0:
            yield step, key.replace("_", " "), f"{record[key]:,.0f} {what}", True
    if isinstance(record.get("alarm"), str):
        yield step, record["alarm"], str(record.get("text", "")), True
    elif "slow_rank" in record:
        where = f"rank {record['slow_rank']} on {record.get('slow_host', 'an unknown host')} is slow"
        yield step, "slow rank", str(record.get("text", where)), True
