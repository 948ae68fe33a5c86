"""The settings of small runs that predict a large one, and what their finished runs say."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain import UserError, schema, stages
from pretrain.config import Config, load
from pretrain.engines.config import ParallelConfig
from pretrain.model.config import ModelConfig
from pretrain.plan.ladder import Target
from pretrain.report.records import read_records
from pretrain.run.outcome import DIVERGED

VALIDATIONS = 16
"""Of a rung: enough for the shape of its curve."""
COMPARED = ("data.train", "data.valid", "data.synthetic.kind", "data.sequence_length", "data.document_mask", "tokenizer.path",
            "optimizer.name", "schedule.name", "schedule.final_lr_fraction", "model.tie_word_embeddings", "model.qk_norm",
            "model.head_dim")  # fmt: skip
"""Settings that the large run and its rungs must share."""
SAME_RATIO = 1.2
"""Largest ratio of the tokens per parameter of two runs that count as equal: sizes are rounded."""


def target(config: Config, model: ModelConfig, steps: int) -> Target:
    """What `config` trains. model: resolved. Raises UserError for a run that no ladder can predict."""
    if config.train.stages:
        raise UserError("train.stages: a run whose data, lengths or batches change midway has no ladder; plan its first stage")
    if not config.data.valid and not config.data.synthetic:
        raise UserError("data.valid is empty: a ladder compares validation losses; name a validation set")
    sequences = config.batch.global_batch_size
    return Target(model, config.data.sequence_length, steps * stages.tokens_per_step(config), sequences, config.optimizer.lr)


def rung_config(big: Config, steps: int, rung: Target, lr: float, seed: int, name: str, folder: Path, gpus: int) -> Config:
    """The settings of a small run. steps: of the large run."""
    share = rung.steps / steps
    limit, schedule, evaluated = big.batch.micro_batch_size, big.schedule, big.evaluate.max_batches
    each = rung.sequences // gpus
    micro = max(size for size in range(1, min(limit, each) + 1) if each % size == 0)
    warmup, decay = round(schedule.warmup_steps * share), schedule.decay_steps
    if evaluated:  # the same number of sequences, whatever the batch
        evaluated = math.ceil(evaluated * big.batch.global_batch_size / rung.sequences)
    change = dataclasses.replace
    return change(
        big,
        run=change(big.run, name=name, directory=str(folder / "runs"), seed=seed, budget_dollars=None),
        model=rung.model,
        batch=change(big.batch, global_batch_size=rung.sequences, micro_batch_size=micro),
        optimizer=change(big.optimizer, lr=lr),
        schedule=change(schedule, warmup_steps=warmup, decay_steps=decay and max(1, round(decay * share))),
        train=change(big.train, max_steps=None, epochs=None, max_tokens=rung.tokens),
        engine=change(big.engine, name="ddp", world_size=gpus, replicas=1, parallel=ParallelConfig(), offload="none"),
        evaluate=change(
            big.evaluate,
            every_steps=math.ceil(rung.steps / VALIDATIONS),
            max_batches=evaluated,
            sample_prompts=[],
            tasks=[],
            expected=None,
        ),
        checkpoint=change(big.checkpoint, mirror=None, keep_last=1),
        log=change(big.log, sinks=["console", "jsonl"]),
    )


# ---------------------------------------------------------------- finished runs


class Finished(NamedTuple):
    """A finished run."""

    path: Path
    config: Config
    what: Target
    loss: float
    """Of the last validation, nats per token."""
    bigram: float
    """Bigram entropy of its training data, nats per token; infinite if its records do not have it."""
    curve: tuple[np.ndarray, np.ndarray]
    """(fraction of the steps (V,), validation loss (V,)), with the last one."""


def find_runs(paths: list[Path]) -> list[Path]:
    """The folders of runs among `paths` and in their folder `runs`. Raises UserError where there is none."""
    found = []
    for path in paths:
        inside = sorted(each.parent for each in (path / "runs").glob("*/config.yaml"))
        if (path / "config.yaml").exists():
            found.append(path)
        elif inside:
            found += inside
        else:
            raise UserError(f"{path}: no run is here. Give the folder of a ladder whose runs have begun, or folders of runs")
    return found


def read_run(path: Path, what: Target, config: Config) -> Finished | str:
    """A run that has finished, or in words why it does not count. what: as `target` says."""
    try:
        state = json.loads((path / "run_state.json").read_text())
    except (OSError, ValueError):
        return "has no readable run_state.json: it has not begun"
    if state.get("exit_status") == DIVERGED:
        return "diverged"
    if state.get("status") != "done":
        return f"is not finished (status {state.get('status')}, step {state.get('step', 0):,} of {what.steps:,}); resume it"
    records = read_records(path)
    losses = [(each["step"], each["val_loss"]) for each in records if each.get("val_loss") is not None]
    bigram = next((each["reference_lines"].get("bigram") for each in records if "reference_lines" in each), None)
    if not losses or losses[-1][0] != state["step"] or not math.isfinite(losses[-1][1]):
        return "has no validation at its end in metrics.jsonl"
    step_V, loss_V = np.array(losses, dtype=float).T
    return Finished(path, config, what, float(loss_V[-1]), bigram or math.inf, (step_V / step_V[-1], loss_V))


def require_comparable(big: Config, run: Finished) -> None:
    """Raises UserError where a run and the planned one differ in what a ladder must hold constant."""
    known, found = (schema.flatten(schema.to_dict(each)) for each in (big, run.config))
    different = [key for key in COMPARED if known.get(key) != found.get(key) and None not in (known.get(key), found.get(key))]
    different += [] if run.what.model.vocab_size else ["model.vocab_size"]
    if different:
        changes = "; ".join(f"{key} is {found.get(key)} there and {known.get(key)} in the planned run" for key in different)
        raise UserError(f"{run.path} cannot predict the planned run: {changes}. Leave it out, or plan a ladder for that run")


def compared(config: Config) -> dict[str, Any]:
    """Settings that a prediction holds for: a run with others is another run."""
    known = schema.flatten(schema.to_dict(config))
    return {key: known.get(key) for key in COMPARED}


class Step(NamedTuple):
    """The finished runs of one model and length: a rung."""

    what: Target
    runs: list[Finished]

    @property
    def ratio(self) -> float:
        """Tokens per parameter."""
        return self.what.tokens / self.what.parameters

    @property
    def by_lr(self) -> dict[float, list[Finished]]:
        """The runs with each learning rate, which ascend."""
        rates = sorted({run.what.lr for run in self.runs})
        return {lr: [run for run in self.runs if run.what.lr == lr] for lr in rates}


def steps_of(runs: list[Finished]) -> list[Step]:
    """The rungs, by their FLOPs."""
    groups: dict[tuple[Any, ...], list[Finished]] = {}
    for run in runs:
        groups.setdefault((run.what.model, run.what.tokens, run.what.sequences), []).append(run)
    return sorted((Step(each[0].what, each) for each in groups.values()), key=lambda step: step.what.flops)


def read_config(path: Path) -> Config:
    """The settings in a YAML file. Raises ConfigError."""
    return load(["--config", str(path)], world_size=None, program="tools/plan_ladder.py")
