"""Probes: short runs from one state, each with another peak learning rate, on one engine whose state is restored before each.

Knows how to start, train and validate one; `optim/lr_search.py` knows which to make, tools/find_lr.py reports. Writes no file.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pretrain import stages
from pretrain.checkpoint import storage
from pretrain.checkpoint.manifest import Checkpoint
from pretrain.config import Config, ScheduleConfig
from pretrain.data.batches import Batch, TrainData, read_ahead, reads_ahead
from pretrain.data.excluded import next_position
from pretrain.engines.base import require_device
from pretrain.engines.place import Place
from pretrain.engines.rendezvous import meet
from pretrain.engines.shards import Shard
from pretrain.engines.start import start_engine
from pretrain.evaluate import evaluate
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer
from pretrain.optim.schedule import lr_at
from pretrain.run import agreement, precision, resume
from pretrain.run.length import plan
from pretrain.run.parts import open_parts
from pretrain.run.progress import read_saved
from pretrain.run.resume import Start
from pretrain.schema import flatten, to_dict
from pretrain.train import micro_batches, train_step

CHECK_EVERY = 8  # steps after which a probe looks whether its losses are finite
DIVERGED = 1.1  # a final loss above this multiple of the loss before the probe
UNSTABLE = 0.1  # a rise of the training loss over the first step's, as a fraction of it


class Bench:
    """One engine with one model, whose state goes back to the start before each probe. Every rank has one."""

    def __init__(self, config: Config, place: Place, found: Checkpoint | None, steps: int, repeats: int):
        """Opens data, model and checkpoint, and meets the other ranks. Raises what a run raises at its start.

        found: where probes of `steps` steps start; None: from the initial weights.
        """
        self.found, self.steps, refusal, facts = found, steps, None, {}
        self.warmup_steps, self.decay_steps = round(0.2 * steps), round(0.4 * steps)  # 0.1 made AdamW prefer too low rates
        try:
            require_device(place)
            self.state = read_saved(self.found) if self.found else None
            if self.found and not config.engine.precision:
                engine = dataclasses.replace(config.engine, precision=resume.precision_of(self.state))
                config = dataclasses.replace(config, engine=engine)
            config, _ = precision.resolve(config, Path(os.devnull))
            parts = open_parts(config)
            facts = agreement.facts(config, parts, Path.cwd()) if place.world_size > 1 else {}
        except Exception as error:  # the other ranks must learn of it; `meet` raises it again
            refusal = error
        store = meet(place, config.engine.timeout_seconds, facts, None, refusal)
        self.config, self.engine = config, start_engine(config.engine, store)
        if self.found:
            storage.check_files(self.found, self.engine)
            resume.check_settings(config, parts, self.found)
        length = plan(config, parts.data, self.state)
        progress = self.state["progress"] if self.state else {"step": 0, "position": 0}
        self.start_step, self.total_steps, self.position = progress["step"], length.total_steps, progress["position"]
        self.skipped = progress.get("skipped_positions", [])
        self.start_lr = length.lr(self.start_step) if self.found else 0.0
        self.stage = stages.stage_at(length.stages, self.position)
        self.batch = self.stage.config.batch
        self.data = without_later_stages(length.place(parts.data), self.position)
        self.valid, self.held_out = parts.valid, not parts.valid
        if self.held_out:
            self.valid = [HeldOut(self.data, self.position_of(repeats), self.validation_samples)]
        self.model = parts.model
        self._prepare()

    def _prepare(self) -> None:
        optimizer, seed = self.config.optimizer, self.config.run.seed
        self.pretrained = resume.initial_weights(Start(self.found), self.config, self.engine, self.model)
        self.engine.prepare(
            lambda: Transformer(self.model),
            lambda model: build_optimizer(model, optimizer),
            optimizer.grad_clip,
            seed,
            self.pretrained,
        )

    def close(self) -> None:
        """Ends the engine."""
        self.engine.close()

    def restore(self, repeat: int) -> None:
        """Sets the state in which the probes of a repeat start: the checkpoint's, or weights of its own seed. A collective."""
        if self.found:
            storage.load(self.found, self.engine)
            return
        seed = self.config.run.seed + repeat

        def draw(shard: Shard) -> None:
            self.engine.model.fill_initial(shard.values, shard.offset, shard.name.removeprefix("model/"), shard.shape, seed)

        self.engine.restore(lambda shard: shard.values.zero_())  # moments; and then the weights, as `prepare` sets them
        self.engine.restore(self.pretrained or draw, moments=False)
        self.engine.updates = 0

    def position_of(self, repeat: int) -> int:
        """Of the first sample of a repeat: each trains on samples of its own."""
        position = self.position
        for _ in range(repeat * self.steps):
            position = next_position(position, self.skipped) + self.batch.global_batch_size
        return position

    def lr(self, step: int, peak: float) -> float:
        """Learning rate of a probe's `step`: from the checkpoint's rate, or 0, up to its peak, then down to 0."""
        schedule = ScheduleConfig(
            name="wsd", warmup_steps=self.warmup_steps, decay_steps=self.decay_steps, final_lr_fraction=0.0
        )
        return lr_at(step, schedule, peak, self.steps + 1, start_lr=self.start_lr)  # + 1: an update with rate 0 does nothing

    def probe(self, peak: float, repeat: int, on_step: Callable[[int], None]) -> dict[str, Any]:
        """Trains and validates. -> a record for probes.jsonl. A collective. on_step: called with the number of steps done."""
        began, engine, size = time.monotonic(), self.engine, self.batch.global_batch_size
        self.restore(repeat)
        before, losses = self.validate(), []
        per_rank = size // engine.mesh.sample_ranks

        def positions() -> Iterator[int]:
            position = self.position_of(repeat)
            for _ in range(self.steps):
                yield (position := next_position(position, self.skipped))
                position += size

        def read(position: int) -> list[Batch]:
            taken = self.data.take(position + engine.mesh.sample_rank * per_rank, per_rank)
            return micro_batches(engine, taken, self.batch.micro_batch_size)

        known: list[float] = []
        with contextlib.closing(read_ahead(read, positions(), reads_ahead(self.data.sources))) as windows:
            for step, window in enumerate(windows, start=1):
                result = train_step(engine, [engine.to_device(each) for each in window], self.lr(step, peak))
                losses.append(result.loss_sum / result.tokens + 0 * result.grad_norm)  # NaN if the gradient is not finite
                if step % CHECK_EVERY == 0 or step == self.steps:
                    known = engine.all_reduce(torch.stack(losses)).tolist()
                    if not all(map(math.isfinite, known)):
                        break
                on_step(step)
        loss = self.validate() if len(known) == self.steps and all(map(math.isfinite, known)) else math.nan
        diverged = not loss <= DIVERGED * before
        highest = max((each for each in known if math.isfinite(each)), default=math.nan)
        return {
            "lr": peak,
            "repeat": repeat,
            "val_loss": None if diverged else loss,
            "diverged": diverged,
            "unstable": diverged or highest > (1 + UNSTABLE) * known[0],
            "before": before,
            "losses": [each if math.isfinite(each) else None for each in known],
            "seconds": round(time.monotonic() - began, 3),
        }

    def validate(self) -> float:
        """Loss on the validation samples, of the average of the weights where there is one. A collective."""
        with self.engine.averaged_weights():
            return evaluate(self.engine, self.valid, self.batch.micro_batch_size, self.validation_samples)["val_loss"]

    @property
    def validation_samples(self) -> int:
        """Of each validation set: at most what half of the steps train on, so that a validation takes a sixth of the time."""
        batches = min(self.config.evaluate.max_batches or math.inf, max(1, self.steps // 2))
        return int(batches) * self.batch.global_batch_size

    def settings(self) -> dict[str, Any]:
        """What two searches must have in common to share their probes."""
        ours = flatten(to_dict(self.config))
        sections = ("data.", "model.", "optimizer.", "batch.global_batch_size", "engine.precision", "run.seed")
        kept = {key: value for key, value in ours.items() if key.startswith(sections) and key != "optimizer.lr"}
        end = self.position_of(1) if not self.held_out else self.valid[0].position
        return kept | {
            "--run": str(self.found.path) if self.found else None,
            "--steps": self.steps,
            "data": self.data.fingerprint_at(end),
            "stage": self.stage.number,
            "validation samples": self.validation_samples,
            "held out from": self.valid[0].position if self.held_out else None,
        }


def without_later_stages(data: TrainData, position: int) -> TrainData:
    """`data` whose stage at `position` never ends: probes and what they hold out may be longer than it is."""
    data = copy.copy(data)
    data.stages = [stage for stage in data.stages if stage.position <= position]
    return data


class HeldOut:
    """Training samples after those of all probes, in place of a validation set."""

    def __init__(self, data: TrainData, position: int, num_samples: int):
        """position: of the first of them."""
        self.name, self.data, self.position, self.bytes_per_token = "held out", data, position, None
        self.source, self.num_samples = data.sources[0], num_samples

    def take(self, indices: list[int | None]) -> Batch:
        """The samples with these numbers, as a `Batch`; None gives one whose labels are masked."""
        rows = [self.data.take(self.position + (index or 0), 1) for index in indices]
        for index, row in zip(indices, rows, strict=True):
            if index is None:
                row.labels_BT.fill_(-100)
        return Batch(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*rows, strict=True)))
