"""The state of a run: its parts, its progress, and the part of them that a checkpoint holds."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field

from pretrain import stages
from pretrain.checkpoint import storage
from pretrain.checkpoint.manifest import Checkpoint
from pretrain.checkpoint.saver import Saver
from pretrain.config import Config
from pretrain.data.batches import TrainData, ValidData
from pretrain.data.tasks import Task
from pretrain.data.tokenizer import Tokenizer
from pretrain.engines.base import Engine
from pretrain.engines.update_check import require_equal_replicas
from pretrain.model import flops
from pretrain.model.config import ModelConfig
from pretrain.report import environment
from pretrain.report.expected import Expected
from pretrain.report.metrics import Meter
from pretrain.report.ranks import RankProbe, SlowRankWatch
from pretrain.report.sinks import Sinks, open_sinks
from pretrain.report.spikes import SpikeWatch
from pretrain.run import band
from pretrain.run.directory import RunDirectory
from pretrain.run.ledger import Ledger
from pretrain.run.length import Length, plan
from pretrain.run.mirror import Mirror
from pretrain.run.parts import Parts
from pretrain.run.progress import Progress, read_saved
from pretrain.run.resume import Start
from pretrain.schema import to_dict
from pretrain.stages import Stage


@dataclass
class Run:
    """A running job. Every rank has all of it; sinks and directory do nothing on ranks other than 0."""

    config: Config
    engine: Engine
    tokenizer: Tokenizer | None
    data: TrainData
    valid: list[ValidData]
    model: ModelConfig
    """Resolved."""
    tasks: list[Task]
    expected: Expected | None
    """The band of the validation loss; None: the settings name none."""
    directory: RunDirectory
    length: Length
    progress: Progress
    meter: Meter
    sinks: Sinks
    saver: Saver
    mirror: Mirror
    spikes: SpikeWatch
    ledger: Ledger
    probe: RankProbe
    slow_ranks: SlowRankWatch = field(default_factory=SlowRankWatch)
    intervals: int = 0
    """Logging lines of this start."""
    side: str = "in"
    """Where the newest validation lay (`expected.side`): leaving the band is reported once, not at every validation."""
    verdict: str = ""
    """Kind of the newest verdict on the loss curve: an alarm is reported once, not at every validation."""
    graphs: dict[str, int] = field(default_factory=dict)
    """Compiled graphs of this process when it last reported them: after steps, after a validation, and at the later of both
    (`all`)."""

    @property
    def stage(self) -> Stage:
        """The stage of the next step, as far as its position is known; after the last step, that of the last."""
        return stages.stage_at(self.length.stages, self.progress.position)

    @property
    def total_steps(self) -> int:
        """Steps over all starts."""
        return self.length.total_steps

    def save(self, val_loss: float | None, last: bool) -> None:
        """Starts to save a checkpoint; the last one of a job is durable when this returns. A collective. Raises Diverged.

        val_loss: of this step's validation, if there was one; the best checkpoints are chosen by it.
        """
        self.saver.wait()  # what was saved while replicas were equal is kept, however slow the disk
        require_equal_replicas(self.engine)  # else the checkpoint would be made of parts of different models
        self.sinks.sync()
        state = {
            "progress": asdict(self.progress),
            "meter": self.meter.state(self.engine.all_reduce),
            "spikes": self.spikes.state(),
            "model": asdict(self.model),
            "settings": to_dict(self.config),
            "data": self.data.fingerprint_at(self.progress.position),
            "quarantine": self.data.quarantine,
            "tokenizer": self.tokenizer and self.tokenizer.fingerprint,
            "length": self.length.state(self.progress.step),
            "val_loss": val_loss,
            "wandb_id": self.sinks.wandb_id,
        }
        self.saver.save(self.progress.step, state, last)


def open_run(
    config: Config, engine: Engine, parts: Parts, directory: RunDirectory, start: Start, ledger: Ledger, mirror: Mirror
) -> Run:
    """The run at `start`: weights and moments in the engine, and everything else as it was at that step. A collective."""
    found = start.checkpoint
    state = read_saved(found) if found else {}
    if found:
        storage.load(found, engine)
    if found:
        state["progress"] |= start.changes
    progress = Progress(**state["progress"]) if found else Progress(started=time.time())
    length = plan(config, parts.data, state or None)
    band.require_length(parts.expected, length.tokens)
    parts = parts._replace(data=length.place(parts.data))
    own = found is not None and found.path.parent.resolve() == directory.checkpoints.resolve()
    if not own:  # the time between another run's checkpoint and this start is no loss of this run
        progress.started = time.time() - progress.train_seconds
        ledger.inherited = progress.train_seconds + progress.interval_seconds
    same_curve = own and state["settings"]["run"]["name"] == config.run.name
    made_with = None
    if engine.rank == 0:
        storage.put_aside_after(directory.checkpoints, progress.step)
        directory.set_start(progress.step, progress.step if own else None)
        made_with = {"total_steps": length.total_steps} | _environment(config, engine, parts, directory, progress, length)
        directory.write_text("environment.json", json.dumps(made_with, indent=1, ensure_ascii=False) + "\n")
    sinks = open_sinks(
        config.log,
        directory.path,
        rank=engine.rank,
        name=config.run.name,
        settings=to_dict(config) | {"environment": made_with},
        total_steps=length.total_steps,
        resume_step=progress.step,
        wandb_id=state.get("wandb_id") if same_curve else None,
        repeated=[kind for kind, due in (("validation", progress.evaluation_due), ("tasks", progress.tasks_due)) if due],
    )

    mirror.begin(progress.step, found if own else None, sinks.info, sinks.alarm)
    engine.time_forward()

    def acknowledge(saved: Checkpoint) -> None:
        sinks.info(f"saved {saved.path}")
        directory.write_state("running", step=progress.step, saved_step=saved.step)
        ledger.save()
        mirror.offer(saved)

    return Run(
        config=config,
        engine=engine,
        **parts._asdict(),
        directory=directory,
        length=length,
        progress=progress,
        meter=Meter(
            engine.device, engine.rank, engine.world_size, state.get("meter"), [each.name for each in parts.data.sources]
        ),
        sinks=sinks,
        saver=Saver(
            directory.checkpoints,
            engine,
            config.checkpoint,
            acknowledge,
            sinks.info,
            trusted=[found.step] if found else [],
            held=mirror.held,
        ),
        mirror=mirror,
        spikes=SpikeWatch(state.get("spikes")),
        ledger=ledger,
        probe=RankProbe(engine.device),
    )


def _environment(
    config: Config, engine: Engine, parts: Parts, directory: RunDirectory, progress: Progress, length: Length
) -> dict:
    """The content of environment.json, with an entry for this start, which resumes at `progress`."""
    data, model = parts.data, parts.model
    seals = {
        source.name: {"fingerprint": source.fingerprint()}
        | {key: value for key, value in (asdict(source.sidecar) if source.sidecar else {}).items() if key != "block_checksums"}
        for source in data.sources
    }
    stage = stages.stage_at(length.stages, progress.position)
    per_token = flops.flops_per_token(model, stage.config.data.sequence_length)
    facts = {
        "model": asdict(flops.num_parameters(model)) | {"flops_per_token": per_token, "settings": asdict(model)},
        "data": {"order": data.fingerprint, "quarantine": data.quarantine, "seals": seals},
    }
    start = {"step": progress.step, "position": progress.position}
    start |= {"global_batch_size": stage.config.batch.global_batch_size, "stages": length.rows()}
    start |= {
        "length": length.state(progress.step) | {"curves": [curve.state() for curve in length.curves]},
        "time": time.time(),
        "world_size": engine.world_size,
        "device": engine.device_name,
    }
    start |= {"mesh": engine.mesh.sizes, "precision": engine.precision, **environment.here()}
    if engine.device.type == "cuda":
        start["gpu"] = environment.of_gpu(engine.device.index)
    return environment.with_start(environment.read(directory.path), facts, start)
