"""How a run begins, or goes on: its parts, the checkpoint it goes on from, what is refused, and what is said before step 1."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pretrain import config as settings
from pretrain.checkpoint import storage
from pretrain.checkpoint.manifest import Checkpoint, CheckpointError
from pretrain.checkpoint.saver import Saver
from pretrain.config import Config, ConfigError, Problem
from pretrain.data import skips
from pretrain.data.batches import TrainData, ValidData
from pretrain.engines.base import Engine, Shard
from pretrain.interop.load import open_weights
from pretrain.interop.weights import weight_loader
from pretrain.model import flops
from pretrain.model.config import ModelConfig
from pretrain.model.hf_mapping import UnsupportedModel
from pretrain.optim.schedule import lr_at
from pretrain.report import environment, verdict
from pretrain.report.metrics import Meter
from pretrain.report.sinks import Sinks
from pretrain.report.spikes import SpikeWatch
from pretrain.run.directory import RunDirectory
from pretrain.schema import to_dict


@dataclass
class Progress:
    """Where a run stands; a checkpoint keeps all of it."""

    step: int = 0
    position: int = 0
    """Samples consumed since the start."""
    tokens: int = 0
    """Valid tokens consumed since the start."""
    skipped_steps: int = 0
    train_seconds: float = 0.0
    """Spent in steps that count, over all starts, up to the newest logging line."""
    interval_seconds: float = 0.0
    """Spent in steps since then."""
    started: float = 0.0
    """When the run was first started, seconds since 1970."""
    loss: float | None = None
    """Of the newest logging line."""
    val_loss: float | None = None
    """Of the newest validation."""
    evaluation_due: bool = False
    """This step's validation was given up to save in time; it comes first when the run goes on."""
    rollbacks: int = 0
    """How often the run went back to a checkpoint because it had diverged."""
    skipped_positions: skips.Ranges = field(default_factory=list)
    """The samples that it then left out."""


@dataclass
class Run:
    """The parts of a running job."""

    config: Config
    engine: Engine
    model: ModelConfig
    """Every null resolved."""
    data: TrainData
    valid: list[ValidData]
    folder: Path
    total_steps: int
    progress: Progress
    sinks: Sinks | None
    """On rank 0."""
    directory: RunDirectory | None
    """On rank 0."""
    saver: Saver
    spikes: SpikeWatch
    tokenizer_fingerprint: str | None
    """Of the tokenizer that the settings name."""
    verdict: str = ""
    """Kind of the newest verdict on the curve: an alarm is said once, not at every validation."""

    def info(self, text: str) -> None:
        """A line for people, once."""
        if self.sinks:
            self.sinks.info(text)

    def log(self, record: dict) -> None:
        """A record for metrics.jsonl and its copies, once."""
        if self.sinks:
            self.sinks.log(record)


def begin_at(
    found: Checkpoint | None,
    config: Config,
    engine: Engine,
    model: ModelConfig,
    data: TrainData,
    valid: list[ValidData],
    directory: RunDirectory | None,
    tokenizer_fingerprint: str | None,
) -> tuple[Run, Meter]:
    """The run as it stood at a checkpoint, or at its very beginning."""
    progress, state = Progress(started=time.time()), {}
    folder, total_steps = Path(config.run.directory) / config.run.name, count_steps(config, data)
    if found:
        state = storage.load(found, engine)
        progress = Progress(**state["progress"])
    here = found is not None and found.path.parent.resolve() == (folder / "checkpoints").resolve()
    if not here or state["settings"]["run"]["name"] != config.run.name:
        state["wandb_id"] = None  # the curve at W&B is another run's
    sinks = None
    if engine.rank == 0:
        storage.put_aside_after(folder / "checkpoints", progress.step)
        directory.stand_at(progress.step, progress.step if here else None)
        made_with = {"total_steps": total_steps} | _environment(config, engine, model, data, folder, progress.step)
        directory.write_text("environment.json", json.dumps(made_with, indent=1, ensure_ascii=False) + "\n")
        sinks = Sinks(
            config.log,
            folder,
            name=config.run.name,
            settings=to_dict(config) | {"environment": made_with},
            total_steps=total_steps,
            resume_step=progress.step,
            wandb_id=state.get("wandb_id"),
            validation_due=progress.evaluation_due,
        )

    def acknowledge(saved: Checkpoint) -> None:
        sinks.info(f"saved {saved.path}")
        directory.write_state("running", step=progress.step, saved_step=saved.step)

    saver = Saver(folder / "checkpoints", engine, config.checkpoint, acknowledge, sinks.info if sinks else print,
                  [found.step] if found else [])  # fmt: skip
    spikes = SpikeWatch(state.get("spikes"))
    run = Run(
        config, engine, model, data, valid, folder, total_steps, progress, sinks, directory, saver, spikes,
        tokenizer_fingerprint,
    )  # fmt: skip
    return run, Meter(engine.device, engine.rank, engine.world_size, state.get("meter"))


def _environment(config: Config, engine: Engine, model: ModelConfig, data: TrainData, folder: Path, step: int) -> dict:
    """environment.json, once more after a start that goes on after `step`."""
    per_token = flops.flops_per_token(model, config.data.sequence_length)
    seals = {
        source.name: {"fingerprint": source.fingerprint()}
        | {key: value for key, value in (asdict(source.seal) if source.seal else {}).items() if key != "block_checksums"}
        for source in data.sources
    }
    facts = {
        "model": asdict(flops.num_parameters(model)) | {"flops_per_token": per_token, "settings": asdict(model)},
        "data": {"order": data.fingerprint, "quarantine": data.quarantine.ranges, "seals": seals},
    }
    start = {"step": step, "time": time.time(), "world_size": engine.world_size, "device": engine.device_name}
    start |= {"precision": engine.precision, **environment.here()}
    return environment.with_start(environment.read(folder), facts, start)


def first_weights(
    found: Checkpoint | None, config: Config, engine: Engine, model: ModelConfig
) -> Callable[[Shard], None] | None:
    """What fills a rank's pieces of the weights of a new engine: the folder that `model.from_pretrained` names; nothing where a
    checkpoint comes next; None: they are drawn. A collective. Raises ConfigError, CheckpointError."""
    if found:
        return lambda shard: None
    if not config.model.from_pretrained:
        return None
    try:
        source = open_weights(Path(config.model.from_pretrained), lambda checkpoint: storage.verify(checkpoint, engine))
        return weight_loader(source, model)
    except UnsupportedModel as error:
        raise ConfigError([Problem("model.from_pretrained", str(error))]) from None


def count_steps(config: Config, data: TrainData) -> int:
    """Of the whole run. Raises ConfigError when its schedule does not fit into them."""
    batch, train, schedule = config.batch.global_batch_size, config.train, config.schedule
    steps = train.max_steps
    if steps is None:
        samples = train.epochs * data.samples_per_epoch if train.epochs else train.max_tokens / config.data.sequence_length
        steps = math.ceil(samples / batch)
    if (least := schedule.warmup_steps + (schedule.decay_steps or 0)) > steps:
        problem = f"warmup_steps + decay_steps = {least}, but the run has only {steps} steps; shorten them or train longer"
        raise ConfigError([Problem("schedule", problem)])
    return steps


def checkpoint_to_resume(config: Config, engine: Engine, folder: Path) -> Checkpoint | None:
    """What `checkpoint.resume` means here. Raises ConfigError, CheckpointError.

    The path of a checkpoint is where a run begins, or goes back to. Once it has saved since then, the same command goes on.
    """
    wish, saved = config.checkpoint.resume, folder / "checkpoints"
    if engine.rank == 0:
        storage.clean(saved)
    if wish == "auto" or engine.broadcast(int(engine.rank == 0 and began_at(saved, wish))):
        return storage.newest_valid(saved, engine)
    if wish == "never":
        if storage.checkpoints(saved):
            raise ConfigError(
                [Problem("checkpoint.resume", f"is never, but {saved} has checkpoints; use auto, or another run.name")]
            )
        return None
    chosen = Checkpoint(Path(wish).resolve())
    if chosen.path.parent != saved.resolve() and engine.broadcast(len(storage.checkpoints(saved))):
        problem = f"is of another run, but {saved} has checkpoints that did not begin there; use auto, or another run.name"
        raise ConfigError([Problem("checkpoint.resume", problem)])
    if engine.broadcast(int(not (chosen.path / "manifest.json").exists())):
        problem = f"{chosen.path} is not the folder of a whole checkpoint, such as {saved / 'step_00001000'}"
        raise ConfigError([Problem("checkpoint.resume", problem)])
    storage.verify(chosen, engine)
    return chosen


def began_at(saved: Path, wish: str) -> bool:
    """Whether the newest checkpoint of a run comes from a start with checkpoint.resume `wish`."""
    for newest in storage.checkpoints(saved)[:1]:
        with contextlib.suppress(CheckpointError, KeyError):
            return Path(newest.state()["settings"]["checkpoint"]["resume"]).resolve() == Path(wish).resolve()
    return False


def refuse_another_run(config: Config, model: ModelConfig, data: TrainData, state: dict, found: Checkpoint) -> None:
    """Raises ConfigError when these settings or this data are not those of the checkpoint."""
    old, new = state["settings"] | {"model": state["model"]}, to_dict(config) | {"model": asdict(model)}
    problems = settings.check_resume(old, new, config.checkpoint.allow_changes, str(found.path))
    if (total := count_steps(config, data)) < found.step:
        problems.append(Problem("train", f"asks for {total} steps, but the checkpoint stands after step {found.step} already; "
                                "go back with --checkpoint.resume PATH, or train longer", str(found.path)))  # fmt: skip
    if state["data"] != data.fingerprint:
        problems.append(Problem("data", "the training data, its order or its weights are not those of the checkpoint; "
                                "restore the files, or start another run with another run.name", str(found.path)))  # fmt: skip
    elif (left_out := state.get("quarantine", [])) != data.quarantine.ranges:
        problems += _quarantine_problems(config, data, left_out, Progress(**state["progress"]), str(found.path))
    if problems:
        raise ConfigError(problems)


def _active(counts: flops.ParameterCount) -> str:
    return f", of which {counts.active:,} for each token" if counts.active < counts.total else ""


def _quarantine_problems(
    config: Config, data: TrainData, left_out: list[list[int]], progress: Progress, origin: str
) -> list[Problem]:
    """Why a run cannot go on with another quarantine: only what is still ahead of it may change, and only if that is meant."""
    if changed := data.history_changed(left_out, progress.position):
        problem = f"differs from the checkpoint's in {changed}; go back to an earlier checkpoint, or restore the file"
    elif any(end > progress.position for _, end in progress.skipped_positions):
        problem = "has changed while the run leaves out samples after a rollback; go on first, or restore the file"
    elif "data.quarantine" not in config.checkpoint.allow_changes:
        problem = (
            "leaves out other samples than the checkpoint's; restore the file, or confirm with "
            "--checkpoint.allow_changes [data.quarantine]: all of them are still ahead"
        )
    else:
        return []
    return [Problem("data.quarantine", problem, origin)]


def announce(run: Run, found: Checkpoint | None, warnings: Sequence[object]) -> None:
    """What will be done, in arithmetic that a reader can check, and what the numbers will mean."""
    config, engine, batch = run.config, run.engine, run.config.batch
    length, ranks = config.data.sequence_length, engine.world_size
    accumulation = settings.accumulation(batch, ranks)
    counts = flops.num_parameters(run.model)
    tokens_per_step = batch.global_batch_size * length
    schedule, peak = config.schedule, config.optimizer.lr
    lines = [
        f"run        {run.folder}" + (f", going on after step {run.progress.step:,}" if found else ""),
        f"model      {counts.total:,} parameters{_active(counts)}, vocabulary {run.model.vocab_size:,}, "
        f"weights from {config.model.from_pretrained or f'seed {config.run.seed}'}",
        f"engine     {config.engine.name}, {ranks} process{'es' * (ranks > 1)} on {engine.device_name}, {engine.precision}",
        f"batch      {batch.global_batch_size} sequences a step = ranks {ranks} x micro-batch {batch.micro_batch_size} x "
        f"accumulation {accumulation}; times {length} tokens = {tokens_per_step:,} tokens a step",
        f"length     {run.total_steps:,} steps = {run.total_steps * tokens_per_step:,} tokens = "
        f"{run.total_steps * batch.global_batch_size / run.data.samples_per_epoch:.2f} epochs, "
        f"{run.total_steps * tokens_per_step / counts.total:.1f} tokens per parameter",
        f"lr         {schedule.name}: step 1 {lr_at(1, schedule, peak, run.total_steps):.2e}, peak {peak:.2e} at step "
        f"{max(1, schedule.warmup_steps)}, last step {lr_at(run.total_steps, schedule, peak, run.total_steps):.2e}",
        *(f"data       {line}" for line in run.data.description()),
        "levels of the loss, in nats per token, that this data has:",
        *verdict.reference_lines(run.data.reference_lines),
        verdict.LEGEND,
        *(f"warning    {warning}" for warning in warnings),
    ]
    for line in lines:
        run.info(line)
    if engine.precision == "bf16" and engine.device.type == "cpu":
        run.info(
            "bf16 on a CPU is emulated, about 25 times slower than fp32; set engine.precision to fp32 unless you test just that"
        )
    if not found or (run.sinks and run.sinks.lacks_start):
        start = {"step": 0, "reference_lines": run.data.reference_lines, "parameters": counts.total, "world_size": ranks}
        run.log(start | {"tokens_per_step": tokens_per_step, "data": run.data.fingerprint})
