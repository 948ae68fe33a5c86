"""The stages of a run: what each trains on, and where each begins.

`train.stages` lists what changes. `settings` gives the settings of each stage as if it were a run of its own; `layout` says at
which step, position and token each begins, from the start of the run or from where it is now. No files, no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from pretrain.schema import Problem

Config = StageConfig = SourceConfig = Any
"""Those of pretrain.config, which imports this module."""


class Stage(NamedTuple):
    """A stage and where it begins."""

    number: int
    """0: the run as it starts; n: train.stages[n - 1]."""
    step: int
    """Steps before it."""
    position: int
    """Samples before it."""
    tokens: int
    """Tokens fed to the model before it."""
    config: Config
    """Settings of the run in this stage."""


def settings(config: Config) -> list[Config]:
    """The settings of each stage; without `train.stages`, those of the run alone."""
    found = [config]
    for stage in config.train.stages or []:
        found.append(_changed(found[-1], stage))
    return found


def _changed(config: Config, stage: StageConfig) -> Config:
    """`config` with the keys of `stage` that are not null."""

    def section(name: str, **changes):
        given = {key: value for key, value in changes.items() if value is not None}
        return dataclasses.replace(getattr(config, name), **given)

    return dataclasses.replace(
        config,
        data=section("data", train=stage.sources, sequence_length=stage.sequence_length),
        batch=section("batch", global_batch_size=stage.global_batch_size, micro_batch_size=stage.micro_batch_size),
        optimizer=section("optimizer", lr=stage.lr),
        schedule=stage.schedule or config.schedule,
    )


def begins_schedule(stage: StageConfig) -> bool:
    """True if a new schedule of the learning rate begins with the stage."""
    return stage.schedule is not None or stage.lr is not None


def layout(config: Config, step: int = 0, position: int = 0, tokens: int = 0, number: int = 0) -> list[Stage]:
    """The stages from `number` on; that one is under way at these counts. One that should have begun begins at once."""
    every = settings(config)
    stages = [Stage(number, step, position, tokens, every[number])]
    for later in range(number + 1, len(every)):
        before, stage = stages[-1], config.train.stages[later - 1]
        per_step, size = tokens_per_step(before.config), before.config.batch.global_batch_size
        if stage.after_steps is not None:
            steps = max(0, stage.after_steps - before.step)
        else:
            steps = max(0, math.ceil((stage.after_tokens - before.tokens) / per_step))
        counts = before.step + steps, before.position + steps * size, before.tokens + steps * per_step
        stages.append(Stage(later, *counts, every[later]))
    return stages


def tokens_per_step(config: Config) -> int:
    """Tokens that a step of a stage with these settings feeds to the model."""
    return config.batch.global_batch_size * config.data.sequence_length


def stage_at(stages: list[Stage], position: int) -> Stage:
    """The stage that trains on the sample at `position`."""
    return next(stage for stage in reversed(stages) if stage.position <= position)


def sources(config: Config) -> list[tuple[str, SourceConfig]]:
    """(place in the settings, source) of the training sources of all stages; each once, in the order of their first stages."""
    listed = [(f"data.train[{i}]", source) for i, source in enumerate(config.data.train)]
    for number, stage in enumerate(config.train.stages or []):
        known = [(source.path, source.dtype) for _, source in listed]
        for i, source in enumerate(stage.sources or []):
            if (source.path, source.dtype) in known:
                known.remove((source.path, source.dtype))
            else:
                listed.append((f"train.stages[{number}].sources[{i}]", source))
    return listed


def longest(config: Config) -> int:
    """The largest sequence length of the run."""
    return max(each.data.sequence_length for each in settings(config))


def largest(config: Config) -> Config:
    """The stage with the most tokens per forward pass, which needs the most memory, as a run of this stage alone."""
    found = max(settings(config), key=lambda each: each.batch.micro_batch_size * each.data.sequence_length)
    return dataclasses.replace(found, train=dataclasses.replace(found.train, stages=None))


# ---------------------------------------------------------------- stages that cannot work


def check(config: Config, validate: Callable[[Config], list[Problem]]) -> Iterator[Problem]:
    """Yields the problems of `train.stages`. validate: finds those of a run of one stage."""
    stages = config.train.stages or []
    if config.data.block_length is not None:
        for key, length in _lengths(config):
            if config.data.block_length % length:
                yield Problem(key, f"got {length}, must divide data.block_length = {config.data.block_length}")
    if not stages:
        return
    if config.train.epochs is not None:
        yield Problem("train.epochs", "cannot be combined with train.stages; give max_steps or max_tokens")
    if (first := next((each for each in stages if each.sources), None)) and config.data.synthetic is not None:
        yield Problem(f"train.stages[{stages.index(first)}].sources", "cannot be combined with data.synthetic")
    yield from _check_order(config, stages)
    # The length of each schedule is checked when the run is planned.
    alone = dataclasses.replace(config.train, stages=None, max_steps=None, epochs=None, max_tokens=1)
    first, *later = (validate(dataclasses.replace(each, train=alone)) for each in settings(config))
    for i, problems in enumerate(later):
        for problem in problems:
            if problem not in first:  # else it is a problem of the run, not of the stage
                yield Problem(f"train.stages[{i}]", f"{problem.key} {problem.message}")


def _lengths(config: Config) -> Iterator[tuple[str, int]]:
    yield "data.sequence_length", config.data.sequence_length
    for i, stage in enumerate(config.train.stages or []):
        if stage.sequence_length is not None:
            yield f"train.stages[{i}].sequence_length", stage.sequence_length


def _check_order(config: Config, stages: list[StageConfig]) -> Iterator[Problem]:
    for i, stage in enumerate(stages):
        key = f"train.stages[{i}]"
        if (stage.after_steps is None) == (stage.after_tokens is None):
            yield Problem(key, "set exactly one of after_steps and after_tokens")
            return
        if stage.sources == []:
            yield Problem(f"{key}.sources", "is empty; leave it out to keep the sources, or give [{path: PREFIX}]")
        changes = {key for key, value in vars(stage).items() if value is not None}
        if changes <= {"after_steps", "after_tokens"}:
            yield Problem(key, "changes nothing; give sources, sequence_length, a batch size, lr or schedule, or remove it")
    for i, (before, stage) in enumerate(pairwise(layout(config))):
        if stage.step <= before.step:
            text = f"begins after step {stage.step:,}, and the stage before it after step {before.step:,}"
            yield Problem(f"train.stages[{i}]", f"{text}; each must begin later than the one before")
    last = layout(config)[-1]
    if config.train.max_steps is not None and last.step >= config.train.max_steps:
        text = f"begins after step {last.step:,}, must be below train.max_steps = {config.train.max_steps:,}"
        yield Problem(f"train.stages[{last.number - 1}]", text)
    if config.train.max_tokens is not None and last.tokens >= config.train.max_tokens:
        text = f"begins after {last.tokens:,} tokens, must be below train.max_tokens = {config.train.max_tokens:,}"
        yield Problem(f"train.stages[{last.number - 1}]", text)
