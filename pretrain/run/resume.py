"""Decides where a run starts, from new weights or from a checkpoint; the run and its preflight share this decision.

`checkpoint.resume` is auto (the newest valid checkpoint of the run, if any), never, or the path of a checkpoint. Such a path
starts the run there once; after it has saved a checkpoint of its own, the same command resumes from its newest one. Checkpoints
in the run's mirror count as its own: a newer one there is fetched first.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from pretrain import UserError
from pretrain.checkpoint import storage
from pretrain.checkpoint.manifest import Checkpoint, CheckpointError, checkpoints
from pretrain.config import Config, ConfigError, EngineConfig, Problem, check_resume
from pretrain.data.batches import TrainData
from pretrain.engines.base import Engine, default_precision
from pretrain.engines.shards import Shard
from pretrain.model.config import ModelConfig
from pretrain.run.directory import RunDirectory, read_state
from pretrain.run.length import plan
from pretrain.run.mirror_store import Mirrored, open_store
from pretrain.run.parts import Parts
from pretrain.run.progress import read_saved
from pretrain.run.restore import Restorer, fetch_together
from pretrain.schema import to_dict


@dataclass(frozen=True)
class Start:
    """The starting point of a run."""

    checkpoint: Checkpoint | None = None
    """Verified. None: at step 0, with new weights."""
    changes: dict = field(default_factory=dict)
    """Fields of the checkpoint's `Progress` that a rollback replaces."""


def is_complete(start: Start, config: Config, parts: Parts) -> bool:
    """True if the checkpoint is that of the last step: nothing is left to train."""
    found = start.checkpoint
    return found is not None and plan(config, parts.data, read_saved(found)).total_steps == found.step


class _Choice(enum.IntEnum):
    REFUSED, NEW, NEWEST, NAMED = range(4)


def decide(config: Config, engine: Engine, parts: Parts, directory: RunDirectory) -> Start:
    """Chooses and verifies the checkpoint, and checks that a run with these settings and this data may resume from it.

    A collective. Raises ConfigError, CheckpointError on every rank, or what the store of a mirror raises.
    """
    folder = directory.checkpoints
    choice, refusal = _Choice.REFUSED, None
    if engine.rank == 0:
        storage.clean(folder)
        try:
            choice = _choose(config.checkpoint.resume, folder, directory.saved_step, _newest_mirrored(config))
        except UserError as error:
            refusal = error
    choice = engine.broadcast(choice)
    if choice == _Choice.REFUSED:
        raise refusal or ConfigError([Problem("checkpoint.resume", "rank 0 refuses it and says why")])
    found = None
    if choice == _Choice.NEWEST:
        found = _newest(config, engine, parts, directory)
    elif choice == _Choice.NAMED:
        found = Checkpoint(Path(config.checkpoint.resume).resolve())
        storage.check_files(found, engine)
    if found:
        check_settings(config, parts, found)
    else:
        plan(config, parts.data, None)
    return Start(found)


def _newest(config: Config, engine: Engine, parts: Parts, directory: RunDirectory) -> Checkpoint | None:
    """The newest intact checkpoint of the run, on the disk or in its mirror; it is on the disk then. A collective."""
    store = open_store(config)
    if store is None:
        return storage.newest_valid(directory.checkpoints, engine)
    restorer = Restorer(store, directory, lambda found: check_settings(config, parts, found))
    found = storage.newest_valid(directory.checkpoints, engine, fetch=lambda: fetch_together(engine, restorer))
    if found is None and engine.broadcast(len(restorer.tried)):
        raise CheckpointError(
            f"{store.url}: none of its checkpoints is valid; restore one, or start over with another run.name"
        )
    return found


def _newest_mirrored(config: Config) -> Mirrored | None:
    """The newest checkpoint in the run's mirror, not verified. Raises DataError, StoreError."""
    store = open_store(config)
    found = store.checkpoints() if store else []
    return found[0] if found else None


def preview(config: Config, folder: Path) -> tuple[Checkpoint | None, bool]:
    """(the checkpoint from which the run would start, not verified; whether checkpoint.resume names it). Raises ConfigError; if
    there is a mirror, DataError and StoreError."""
    mirrored = _newest_mirrored(config)
    choice = _choose(config.checkpoint.resume, folder, read_state(folder.parent).get("saved_step"), mirrored)
    if choice == _Choice.NAMED:
        return Checkpoint(Path(config.checkpoint.resume).resolve()), True
    return (_newer(folder, mirrored) if choice == _Choice.NEWEST else None), False


def _newer(folder: Path, mirrored: Mirrored | None) -> Checkpoint | None:
    """The newest checkpoint on the disk, or the one of the mirror if that is newer."""
    own = checkpoints(folder)
    return max([*own[:1], *([mirrored] if mirrored else [])], key=lambda each: each.step, default=None)


def _choose(resume: str, folder: Path, saved_step: int | None, mirrored: Mirrored | None) -> _Choice:
    """`checkpoint.resume` for a run whose checkpoints are in `folder`, the newest at `saved_step` by its run_state.json.
    mirrored: the newest one in its mirror.

    Raises ConfigError.
    """
    own = _newer(folder, mirrored)
    if own and mirrored and own is not mirrored and _first_start(own) != _first_start(mirrored):
        problem = f"{mirrored.store.url} has checkpoints of another run; choose another run.name or checkpoint.mirror"
        raise ConfigError([Problem("checkpoint.mirror", problem)])
    if own and (resume == "auto" or _started_from(own, resume)):
        return _Choice.NEWEST
    problem, there = None, own and (mirrored.store.url if own is mirrored else folder)
    if resume == "auto":
        if not saved_step:
            return _Choice.NEWEST
        problem = f"auto finds nothing in {folder}, but run_state.json says that step {saved_step} was saved there; restore a "
        problem += "checkpoint, choose another run.name, or give never to train from step 0 and replace the records of the run"
    elif resume == "never":
        if not own:
            return _Choice.NEW
        problem = f"is never, but {there} has checkpoints; use auto, or another run.name"
    else:
        path = Path(resume).resolve()
        if own and path.parent != folder.resolve():
            problem = f"belongs to another run, but {there} has checkpoints of its own; use auto, or another run.name"
        elif not (path / "manifest.json").exists():
            problem = f"{path} is not the folder of a complete checkpoint, such as {folder / 'step_00001000'}"
    if problem:
        raise ConfigError([Problem("checkpoint.resume", problem)])
    return _Choice.NAMED


def _first_start(checkpoint: Checkpoint) -> float | None:
    """When the run of a checkpoint was first started, which tells runs apart; None: it cannot be read."""
    with contextlib.suppress(CheckpointError, KeyError, TypeError):
        return checkpoint.state()["progress"]["started"]
    return None


def _started_from(checkpoint: Checkpoint, resume: str) -> bool:
    """True if a start with this `checkpoint.resume` wrote the checkpoint."""
    with contextlib.suppress(CheckpointError, KeyError, TypeError):
        return Path(checkpoint.state()["settings"]["checkpoint"]["resume"]).resolve() == Path(resume).resolve()
    return False


# ---------------------------------------------------------------- may these settings continue that checkpoint?


def check_settings(config: Config, parts: Parts, found: Checkpoint) -> None:
    """Raises ConfigError with everything in these settings and this data that does not fit the checkpoint."""
    state, origin = read_saved(found), str(found.path)
    before, now = state["settings"] | {"model": state["model"]}, to_dict(config) | {"model": asdict(parts.model)}
    if isinstance(before.get("engine"), dict):
        before["engine"] = before["engine"] | {"precision": precision_of(state)}
        now["engine"]["precision"] = config.engine.precision or precision_of(state)
    problems = check_resume(before, now, config.checkpoint.allow_changes, origin)
    if not problems:  # else its settings may be of another shape
        try:
            data = plan(config, parts.data, state).place(parts.data)
            problems += [replace(each, origin=origin) for each in _data_problems(config, data, state)]
        except ConfigError as error:
            problems += [replace(each, origin=origin) for each in error.problems]
    if problems:
        raise ConfigError(problems)


def precision_of(state: dict) -> str:
    """The precision with which the run of a checkpoint's `state` was trained. Where its settings have null, of a version that
    did not write what null came to, that was bf16 on GPUs and fp32 on CPUs."""
    engine = state["settings"].get("engine")
    written = engine.get("precision") if isinstance(engine, dict) else None
    return written if written in ("fp32", "bf16", "fp8") else default_precision(EngineConfig())


def _data_problems(config: Config, data: TrainData, state: dict) -> list[Problem]:
    """What the run has read must be what these settings say; what is ahead of it may differ."""
    if state["data"] != data.fingerprint_at(state["progress"]["position"]):
        text = "the training data, its order or its weights differ from the checkpoint's; restore the files and the settings; "
        text += f"other data from here on are a stage: train.stages: [{{after_steps: {state['step']}, sources: [...]}}]"
        return [Problem("data", text)]
    problem = _quarantine_problem(config, data, state)
    return [Problem("data.quarantine", problem)] if problem else []


def _quarantine_problem(config: Config, data: TrainData, state: dict) -> str | None:
    """A quarantine may change only for samples that are still ahead of the run, and only if the user confirms it."""
    excluded, position = state.get("quarantine", []), state["progress"]["position"]
    if excluded == data.quarantine:
        return None
    sizes = data.num_samples
    if any(source >= len(sizes) or not first < end <= sizes[source] for source, first, end in excluded):
        return "differs from the checkpoint's, which names samples that the data do not have; resume from another checkpoint"
    if changed := data.history_changed(excluded, position):
        return f"differs from the checkpoint's in {changed}; resume from an earlier checkpoint, or restore the file"
    if any(end > position for _, end in state["progress"].get("skipped_positions", [])):
        return "has changed while the run skips samples after a rollback; let it pass them first, or restore the file"
    if "data.quarantine" not in config.checkpoint.allow_changes:
        return (
            "excludes other samples than the checkpoint's, all still ahead of the run; confirm with "
            "--checkpoint.allow_changes [data.quarantine], or restore the file"
        )
    return None


# ---------------------------------------------------------------- the first weights


def initial_weights(start: Start, config: Config, engine: Engine, model: ModelConfig) -> Callable[[Shard], None] | None:
    """A function that fills a new engine's shards with the weights of `model.from_pretrained`; it fills in nothing where a
    checkpoint follows. None: the engine draws the weights from the seed. A collective. Raises ConfigError, CheckpointError."""
    if start.checkpoint:
        return lambda shard: None
    if not config.model.from_pretrained:
        return None
    from pretrain.interop.load import find_unusable, open_weights, tensor_problem  # most runs need none of this
    from pretrain.interop.weights import weight_loader
    from pretrain.model.hf_mapping import UnsupportedModel

    try:
        source = open_weights(Path(config.model.from_pretrained), lambda checkpoint: storage.check_files(checkpoint, engine))
        loader = weight_loader(source, model)
    except UnsupportedModel as error:
        raise ConfigError([Problem("model.from_pretrained", str(error))]) from None
    found = find_unusable(source, engine.rank, engine.world_size)
    numbers = torch.zeros(engine.world_size, dtype=torch.int64, device=engine.device)
    numbers[engine.rank] = found[0] + 1 if found else 0
    if unusable := [number for number in engine.all_reduce(numbers).tolist() if number]:
        problem = f"{config.model.from_pretrained}: {tensor_problem(source, min(unusable) - 1)}; use another model"
        raise ConfigError([Problem("model.from_pretrained", problem)])
    return loader
