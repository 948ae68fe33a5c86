"""The length of a run: its steps, the samples that they train on, its stages, and the curves of its learning rate.

`train.max_steps` counts steps, whatever their batch. `train.max_tokens` and `train.epochs` count what was consumed, so after a
change of the batch the remaining steps are those that the remaining tokens need. A change never makes the learning rate jump
(`schedule.continued`), unless it changes the schedule itself, which then holds as if the run had begun with it.

Where `train.stages` names a schedule or a rate, a new curve begins. Checkpoints record the stages that have begun; where the
others begin is planned from there.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from pretrain import stages
from pretrain.config import Config, ConfigError, Problem, ScheduleConfig, TrainConfig
from pretrain.data import excluded
from pretrain.data.batches import TrainData
from pretrain.optim.schedule import Course, Curve, continued, course_from, course_of
from pretrain.stages import Stage


class Length(NamedTuple):
    """What is to be done, over all starts."""

    total_steps: int
    samples: int
    """Trained on in all these steps."""
    tokens: int
    """Fed to the model in all these steps."""
    curves: list[Curve]
    """From the one that is under way on."""
    stages: list[Stage]
    """All of them."""
    block_lengths: list[int]
    """Of the data of each stage."""

    def place(self, data: TrainData) -> TrainData:
        """`data` with its stages where this says."""
        begins = [(stage.position, length) for stage, length in zip(self.stages, self.block_lengths, strict=True)]
        return data.starting_at(begins)

    def curve(self, step: int) -> Curve:
        """The curve of `step`."""
        return next(curve for curve in reversed(self.curves) if curve.step < step or curve is self.curves[0])

    def lr(self, step: int) -> float:
        """Learning rate of `step`, which must not lie before the curve that was under way."""
        return self.curve(step).lr(step)

    @property
    def position(self) -> int:
        """Position after the last step, without positions that are skipped on the way."""
        last = self.stages[-1]
        size = last.config.batch.global_batch_size
        return last.position + (self.total_steps - last.step) * size if last.number else self.samples

    def position_after(self, step: int) -> int:
        """Position after `step`, without positions that are skipped on the way."""
        ends = [(stage.step, stage.position) for stage in self.stages[1:]] + [(self.total_steps, self.position)]
        stage, (end, position) = next(each for each in zip(self.stages, ends, strict=True) if step <= each[1][0])
        return max(0, position - (end - step) * stage.config.batch.global_batch_size)

    def rows(self) -> list[list[int]]:
        """[steps, samples and tokens before it, block length] of each stage."""
        lengths = zip(self.stages, self.block_lengths, strict=True)
        return [[stage.step, stage.position, stage.tokens, length] for stage, length in lengths]

    def state(self, step: int) -> dict[str, Any]:
        """For a checkpoint after `step`."""
        curve = self.curve(step)
        begun = [row for row in self.rows() if row[0] < step or row == self.rows()[0]]
        return {
            "total_steps": self.total_steps,
            "course": curve.course and list(curve.course),
            "curve": curve.state(),
            "stages": begun,
        }


def plan(config: Config, data: TrainData, state: dict | None) -> Length:
    """The length of a run that resumes from a checkpoint with this `state`, of this or an older version; None: a new run.

    Raises ConfigError if the checkpoint is beyond it, or warm-up and decay do not fit into it.
    """
    begun = _begun(state, data)
    stages_removed = begun[0][3] != data.stages[0].cut.block_length and config.train.epochs is None
    if config.train.stages or len(begun) > 1 or stages_removed:
        return _plan_stages(config, data, state)
    batch, wanted = config.batch.global_batch_size, _wanted_samples(config.train, config.data.sequence_length, data)
    total = config.train.max_steps or math.ceil(wanted / batch)
    try:
        if state is None:
            course_of(config.schedule, total)
            return _one_stage(config, data, total, total * batch, None)
        before, step, consumed = _Before.of(state, data), state["progress"]["step"], trained_samples(state["progress"])
        one_batch = before.batch == batch and consumed == step * batch
        if wanted is not None and not one_batch:
            total = step + max(0, math.ceil((wanted - consumed) / batch))
        if total < step or (wanted is not None and consumed >= wanted + before.batch):
            if _limits(config.train) != _limits(before.train):
                raise ConfigError([_too_short(config, step, consumed * config.data.sequence_length)])
            total = step  # done: a batch of another size went further beyond the end
        samples = consumed + (total - step) * batch
        return _one_stage(config, data, total, samples, _course(config, before, one_batch, step, consumed, total, samples))
    except ValueError as error:
        raise ConfigError([Problem("schedule", str(error))]) from None


def _one_stage(config: Config, data: TrainData, total: int, samples: int, course: Course | None) -> Length:
    curve = Curve(0, total, config.schedule, config.optimizer.lr, course=course)
    tokens, lengths = samples * config.data.sequence_length, [data.stages[0].cut.block_length]
    return Length(total, samples, tokens, [curve], stages.layout(config), lengths)


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


# ---------------------------------------------------------------- runs with stages


def _begun(state: dict | None, data: TrainData) -> list[list[int]]:
    """[step, position, tokens, block length] of each stage that the checkpoint's run had begun; of a new run, the first."""
    if state is None:
        return [[0, 0, 0, data.stages[0].cut.block_length]]
    known = (state.get("length") or {}).get("stages")
    return known or [[0, 0, 0, state["settings"]["data"]["sequence_length"]]]  # of a version without stages


def _plan_stages(config: Config, data: TrainData, state: dict | None) -> Length:
    begun, settings = _begun(state, data), stages.settings(config)
    if len(begun) > len(settings):
        problem = f"has {len(settings) - 1}, but the checkpoint is in stage {len(begun) - 1}; restore them"
        raise ConfigError([Problem("train.stages", problem)])
    step, position, tokens = begun[-1][:3]
    progress = state["progress"] if state else {"step": 0, "position": 0}
    if state:
        length = settings[len(begun) - 1].data.sequence_length
        tokens += length * (trained_samples(progress) - trained_samples(progress | {"position": position}))
        step, position = progress["step"], progress["position"]
    planned = _planned(config, step, position, tokens, len(begun) - 1, progress.get("skipped_positions", []))
    every = [Stage(number, *row[:3], settings[number]) for number, row in enumerate(begun)] + planned
    last = planned[-1] if planned else Stage(len(begun) - 1, step, position, tokens, settings[-1])
    batch, per_step = last.config.batch.global_batch_size, stages.tokens_per_step(last.config)
    total = config.train.max_steps or last.step + max(0, math.ceil((config.train.max_tokens - last.tokens) / per_step))
    if total < step:
        raise ConfigError([_too_short(config, step, tokens)])
    samples = trained_samples(progress | {"position": last.position}) + (total - last.step) * batch
    lengths = [row[3] for row in begun] + [_block_length(begun[-1][3], planned, data)] * len(planned)
    tokens = last.tokens + (total - last.step) * per_step
    return Length(total, samples, tokens, _curves(config, state, step, every, total), every, lengths)


def _block_length(now: int, planned: list[Stage], data: TrainData) -> int:
    """Of the data of the planned stages: what it is `now`, if they can read such blocks, so that passes continue. The blocks of
    these settings alone may be shorter: those of a longer stage that the checkpoint's run had planned are not among them."""
    fits = all(now % stage.config.data.sequence_length == 0 for stage in planned)
    return now if fits else data.stages[0].cut.block_length


def _planned(config: Config, step: int, position: int, tokens: int, number: int, skipped: list[list[int]]) -> list[Stage]:
    """The stages after `number`, which is under way at these counts. Raises ConfigError for one that should have begun."""
    now, *found = stages.layout(config, step, position, tokens, number)
    last_step = stages.tokens_per_step(now.config)
    for stage in found:
        begin = config.train.stages[stage.number - 1]
        if (begin.after_steps or step) < step or (begin.after_tokens or tokens) <= tokens - last_step:
            text = f"should have begun, but the checkpoint at step {step:,} ({tokens:,} tokens) is in stage {number}; "
            text += "begin it later, or resume an earlier checkpoint"
            raise ConfigError([Problem(f"train.stages[{stage.number - 1}]", text)])
    return [stage._replace(position=excluded.past_skipped(stage.position, skipped, position)) for stage in found]


def _curves(config: Config, state: dict | None, step: int, every: list[Stage], total: int) -> list[Curve]:
    """The curves from the one of `step` on. Raises ConfigError if warm-up and decay do not fit into one."""
    begins = [every[0]] + [stage for stage in every[1:] if stages.begins_schedule(config.train.stages[stage.number - 1])]
    curves: list[Curve] = []
    for stage, after in zip(begins, [*begins[1:], None], strict=True):
        end = after.step if after else total
        if (after and end < step) or end == stage.step:
            continue  # passed, or of no step
        now = Curve(stage.step, end, stage.config.schedule, stage.config.optimizer.lr)
        try:
            if state and (stage.step < step or step == 0):
                now = _resumed(now, state, step, ends_here=end == step)
            elif curves:
                now = now._replace(start_lr=curves[-1].lr(stage.step))
            if now.course is None:
                course_of(now.schedule, now.end - now.step)
        except ValueError as error:
            key = f"train.stages[{stage.number - 1}].schedule" if stage.number else "schedule"
            until = f" (train.stages[{after.number - 1}] begins another after step {after.step:,})" if after else ""
            raise ConfigError([Problem(key, f"{error}{until}")]) from None
        curves.append(now)
    return curves


def _resumed(now: Curve, state: dict, step: int, ends_here: bool) -> Curve:
    """The curve `now` when it resumes after `step`: its rate does not jump where only its end has moved."""
    length, settings = state["length"], state["settings"]
    if "curve" in length:
        before = Curve.read(length["curve"])
    else:  # of a version without stages
        schedule = _known(ScheduleConfig, settings["schedule"])
        course = length["course"] and Course(*length["course"])
        before = Curve(0, length["total_steps"], schedule, settings["optimizer"]["lr"], course=course)
    if before.step != now.step:
        problem = f"must have a schedule that begins after step {before.step:,}, as in the checkpoint; restore it"
        raise ConfigError([Problem("train.stages", problem)])
    if ends_here:  # the next one begins: this only says which rate was reached
        return before
    now = now._replace(start_lr=before.start_lr)
    if now.schedule != before.schedule:
        return now
    if now.end == before.end:
        return now._replace(course=before.course)
    course, done = before.course or course_of(now.schedule, before.end - before.step), step - now.step
    return now._replace(course=continued(course, now.schedule, done, done, 1, now.end - now.step))


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


def _too_short(config: Config, step: int, tokens: int) -> Problem:
    train = config.train
    advice = "resume an earlier one with --checkpoint.resume PATH, or train longer"
    if train.max_steps is not None:
        return Problem("train", f"asks for {train.max_steps} steps, but the checkpoint is already at step {step}; {advice}")
    asked = f"{train.max_tokens:,} tokens" if train.max_tokens else f"{train.epochs:g} epochs"
    key = "max_tokens" if train.max_tokens else "epochs"
    text = f"asks for {asked}, but the checkpoint at step {step} has consumed {tokens:,} tokens"
    return Problem(f"train.{key}", f"{text} ({tokens // config.data.sequence_length:,} samples); {advice}")
