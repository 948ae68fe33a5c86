"""The learning rate as a pure function of the step: there is no scheduler state to save or to get out of step.

Where a run changes its length, batch or schedule midway, it gets a `Course`, and from there on its learning rate is a pure
function of step and course.
"""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from fractions import Fraction
from typing import Any, NamedTuple

from pretrain.config import ScheduleConfig


class Course(NamedTuple):
    """A schedule from a step on, laid out on an axis of steps or of samples: a run's samples, if its length is in tokens."""

    step: int
    """The newest step before it; 0: it is that of an entire run."""
    place: int
    """Place on the axis after that step."""
    per_step: int
    """How far each later step moves on the axis: 1, or the samples per step."""
    warmup_end: int
    decay_start: int
    decay_end: int
    decayed: float = 0.0
    """Part of the decay that was done at `decay_start`, 0 to 1."""

    def place_of(self, step: int) -> int:
        """Place on the axis after `step`."""
        return self.place + (step - self.step) * self.per_step

    def decay_at(self, step: int) -> float:
        """Part of the decay that is done at `step`, 0 to 1."""
        if self.decay_end <= self.decay_start:
            return max(self.decayed, float(self.place_of(step) > self.decay_start))
        part = (self.place_of(step) - self.decay_start) / (self.decay_end - self.decay_start)
        return self.decayed + (1.0 - self.decayed) * min(max(part, 0.0), 1.0)


def lr_at(
    step: int,
    config: ScheduleConfig,
    peak_lr: float,
    total_steps: int,
    course: Course | None = None,
    start_lr: float = 0.0,
) -> float:
    """Returns the learning rate of update `step`; the first update is step 1, the last is step total_steps.

    Warm-up goes linearly from start_lr and reaches peak_lr exactly at step warmup_steps. The decay ends exactly at
    final_lr_fraction * peak_lr: wsd stays at the peak and decays linearly over the last decay_steps (None: 40 % of all steps,
    or those that follow warm-up if fewer); cosine and linear decay right after warm-up over decay_steps (None: all the rest),
    then stay at the final value. constant does not decay. Sources: Loshchilov and Hutter 2017 (cosine); Hu et al. 2024 (wsd).

    course: since the run changed midway; None: it did not. Raises ValueError if warm-up and decay together are longer than
    total_steps.
    """
    course = course or course_of(config, total_steps)
    place = course.place_of(step)
    if place <= course.warmup_end:
        return start_lr + (peak_lr - start_lr) * (place / course.warmup_end)
    if config.name == "constant":
        return peak_lr
    progress = course.decay_at(step)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.name == "cosine" else 1.0 - progress
    return peak_lr * (config.final_lr_fraction + (1.0 - config.final_lr_fraction) * remaining)


class Curve(NamedTuple):
    """The learning rate from one step to another."""

    step: int
    """Steps before it."""
    end: int
    """Its last step."""
    schedule: ScheduleConfig
    peak_lr: float
    start_lr: float = 0.0
    """From which its warm-up rises or falls."""
    course: Course | None = None
    """None: that of a run that never changed. Its steps count from the start of the curve."""

    def state(self) -> dict[str, Any]:
        """For JSON."""
        return self._asdict() | {"schedule": asdict(self.schedule), "course": self.course and list(self.course)}

    @classmethod
    def read(cls, state: dict[str, Any]) -> Curve:
        """The curve that `state` returned."""
        course = state["course"] and Course(*state["course"])
        known = {field.name for field in fields(ScheduleConfig)}
        schedule = ScheduleConfig(**{key: value for key, value in state["schedule"].items() if key in known})
        return cls(**state | {"schedule": schedule, "course": course})

    def lr(self, step: int) -> float:
        """Learning rate of `step`, counted from the start of the run."""
        return lr_at(step - self.step, self.schedule, self.peak_lr, self.end - self.step, self.course, self.start_lr)


def course_of(config: ScheduleConfig, total_steps: int) -> Course:
    """The course of an entire run, in steps. Raises ValueError if warm-up and decay together are longer than total_steps."""
    left = total_steps - config.warmup_steps
    if left < (config.decay_steps or 0):
        raise ValueError(
            f"warmup_steps + decay_steps = {config.warmup_steps + (config.decay_steps or 0)}, but there are only "
            f"{total_steps} steps; shorten them or train longer"
        )
    if config.name == "wsd":
        decay_steps = config.decay_steps or min(max(1, round(0.4 * total_steps)), left)
        start = total_steps - decay_steps
    else:
        decay_steps, start = config.decay_steps or left, config.warmup_steps
    return Course(0, 0, 1, config.warmup_steps, start, start + decay_steps)


def course_from(config: ScheduleConfig, step: int, place: int, per_step: int, end: int) -> Course:
    """The course from `step` on as if the run had always had this schedule and this batch; the axis as in `continued`.

    Raises ValueError as `course_of`.
    """
    *_, warmup, start, stop, _ = course_of(config, -(-end // per_step))
    surplus = max(0, stop * per_step - end)  # of the last step
    start = max(0, start * per_step - (surplus if config.name == "wsd" else 0))
    return Course(step, place, per_step, warmup * per_step, start, stop * per_step - surplus)


def rescaled(course: Course, step: int, place: int, per_step: int) -> Course:
    """The same course on another axis, on which `step` is at `place`."""
    scale = Fraction(place, course.place_of(step))
    ends = (round(each * scale) for each in (course.warmup_end, course.decay_start, course.decay_end))
    return Course(step, place, per_step, *ends, course.decayed)


def continued(course: Course, config: ScheduleConfig, step: int, place: int, per_step: int, end: int) -> Course:
    """`course` from `step` on, when the length or the batch changes: the learning rate does not jump.

    `step` is at `place` of the new axis, on which each later step moves by `per_step` and the run ends at `end`. Warm-up and
    decay keep their lengths on the axis, and the default decay and that of wsd end with the run; what is left of a decay that
    has begun is spread over what is left until then. Raises ValueError if they are longer than the run.
    """
    old, done = rescaled(course, step, place, per_step), course.decay_at(step)
    length, decay_end = old.decay_end - old.decay_start, end
    if config.name == "wsd":
        if config.decay_steps is None:
            length = min(max(per_step, round(0.4 * end)), end - old.warmup_end)
        start = max(place, old.warmup_end, end - length)
        needed = old.warmup_end + (length if config.decay_steps and not done else 0)
    else:
        start, decay_end = old.decay_start, old.decay_end if config.decay_steps else end
        needed = max(old.warmup_end, decay_end)
    old_step = course.per_step * Fraction(place, course.place_of(step))
    if needed >= end + max(per_step, old_step):  # the end is rounded up to full steps, which may have become smaller
        raise ValueError(
            f"warm-up and decay take {math.ceil(needed / per_step)} steps of this batch, but the run has only "
            f"{math.ceil(end / per_step)}; shorten them or train longer"
        )
    if done:
        start = place
    return old._replace(decay_start=start, decay_end=min(decay_end, end), decayed=done)
