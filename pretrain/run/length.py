"""The length of a run: its steps, the samples that they train on, and the course of its learning rate.

`train.max_steps` counts steps, whatever their batch. `train.max_tokens` and `train.epochs` count what was consumed, so after a
change of the batch the remaining steps are those that the remaining tokens need. A change never makes the learning rate jump
(`schedule.continued`), unless it changes the schedule itself, which then holds as if the run had begun with it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from pretrain.config import Config, ConfigError, Problem, ScheduleConfig, TrainConfig
from pretrain.data.batches import TrainData
from pretrain.optim.schedule import Course, continued, course_from, course_of


class Length(NamedTuple):
    """What is to be done, over all starts."""

    total_steps: int
    samples: int
    """Trained on in all these steps."""
    course: Course | None
    """Of the learning rate; None: that of a run that never changed."""

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"total_steps": self.total_steps, "course": self.course and list(self.course)}


def plan(config: Config, data: TrainData, state: dict | None) -> Length:
    """The length of a run that resumes from a checkpoint with this `state`, of this or an older version; None: a new run.

    Raises ConfigError if the checkpoint is beyond it, or warm-up and decay do not fit into it.
    """
    batch, wanted = config.batch.global_batch_size, _wanted_samples(config.train, config.data.sequence_length, data)
    total = config.train.max_steps or math.ceil(wanted / batch)
    try:
        if state is None:
            course_of(config.schedule, total)
            return Length(total, total * batch, None)
        before, step, consumed = _Before.of(state, data), state["progress"]["step"], trained_samples(state["progress"])
        one_batch = before.batch == batch and consumed == step * batch
        if wanted is not None and not one_batch:
            total = step + max(0, math.ceil((wanted - consumed) / batch))
        if total < step or (wanted is not None and consumed >= wanted + before.batch):
            if _limits(config.train) != _limits(before.train):
                raise ConfigError([_too_short(config, step, consumed)])
            total = step  # done: a batch of another size went further beyond the end
        samples = consumed + (total - step) * batch
        return Length(total, samples, _course(config, before, one_batch, step, consumed, total, samples))
    except ValueError as error:
        raise ConfigError([Problem("schedule", str(error))]) from None


def _course(
    config: Config, before: _Before, one_batch: bool, step: int, consumed: int, total: int, samples: int
) -> Course | None:
    """The course from `step` on. Raises ValueError."""
    in_steps, batch = config.train.max_steps is not None, config.batch.global_batch_size
    same_axis = before.batch == batch or (in_steps and (before.course is None or before.course.per_step == 1))
    if config.schedule == before.schedule:
        if total == before.total_steps and same_axis:
            return before.course
        old = before.course or course_of(before.schedule, before.total_steps)
        axis = (step, 1, total) if in_steps else (consumed, batch, samples)
        return continued(old, config.schedule, step, *axis)
    if in_steps or one_batch:
        course_of(config.schedule, total)
        return None
    return course_from(config.schedule, step, consumed, batch, samples)


def trained_samples(progress: dict) -> int:
    """Samples that the steps of a run have trained on: its position, without those that it skipped after rollbacks."""
    position = progress["position"]
    return position - sum(max(0, min(end, position) - first) for first, end in progress.get("skipped_positions", []))


class _Before(NamedTuple):
    """What a checkpoint says about the length of its run."""

    batch: int
    train: TrainConfig
    schedule: ScheduleConfig
    total_steps: int
    course: Course | None

    @classmethod
    def of(cls, state: dict, data: TrainData) -> _Before:
        settings, length = state["settings"], state.get("length")
        batch = settings["batch"]["global_batch_size"]
        schedule, train = (_known(kind, settings[key]) for kind, key in ((ScheduleConfig, "schedule"), (TrainConfig, "train")))
        if length:
            return cls(batch, train, schedule, length["total_steps"], length["course"] and Course(*length["course"]))
        wanted = _wanted_samples(train, settings["data"]["sequence_length"], data)  # older versions only knew today's batch
        return cls(batch, train, schedule, train.max_steps or math.ceil(wanted / batch), None)


def _known(kind: type, settings: dict) -> Any:
    """A section of settings without the keys that this version does not know."""
    return kind(**{field.name: settings[field.name] for field in dataclasses.fields(kind) if field.name in settings})


def _limits(train: TrainConfig) -> tuple:
    return train.max_steps, train.max_tokens, train.epochs


def _wanted_samples(train: TrainConfig, sequence_length: int, data: TrainData) -> float | None:
    """Samples that the run shall train on; None: max_steps counts steps instead."""
    if train.max_steps is not None:
        return None
    return train.epochs * data.samples_per_epoch if train.epochs else train.max_tokens / sequence_length


def _too_short(config: Config, step: int, consumed: int) -> Problem:
    train, length = config.train, config.data.sequence_length
    advice = "resume an earlier one with --checkpoint.resume PATH, or train longer"
    if train.max_steps is not None:
        return Problem("train", f"asks for {train.max_steps} steps, but the checkpoint is already at step {step}; {advice}")
    asked = f"{train.max_tokens:,} tokens" if train.max_tokens else f"{train.epochs:g} epochs"
    key = "max_tokens" if train.max_tokens else "epochs"
    text = (
        f"asks for {asked}, but the checkpoint at step {step} has consumed {consumed * length:,} tokens ({consumed:,} samples)"
    )
    return Problem(f"train.{key}", f"{text}; {advice}")
