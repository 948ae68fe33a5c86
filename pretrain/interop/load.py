"""A trained model seen from outside: what a run's folder or a Hugging Face folder holds, read without any process group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pretrain import config as settings
from pretrain.checkpoint.manifest import Checkpoint, CheckpointError, checkpoints
from pretrain.checkpoint.storage import best_key
from pretrain.config import Config
from pretrain.data.indexed import DataError
from pretrain.data.tokenizer import Tokenizer
from pretrain.interop.weights import CheckpointWeights, FolderWeights, MeanWeights, Weights, load_transformer
from pretrain.model.config import ModelConfig
from pretrain.model.hf_mapping import UnsupportedModel
from pretrain.model.transformer import Transformer

OWN_TOKENIZER = "tokenizer"
"""In the folder of a converted model, which may be moved with it; that of a run stays where tokenizer.path says."""


class Trained(NamedTuple):
    """A trained model that is not in memory yet."""

    weights: Weights
    tokenizer: Path | None
    """Its folder."""
    tokenizer_fingerprint: str | None
    """Of the tokenizer that the model was trained with, where that is known."""
    document_mask: bool
    """Tokens saw only their own document in training."""
    config: Config | None
    """Of a run."""
    origin: dict
    """What it was made from, in words for people: {"run", "step", ...} or {"model"}."""

    @property
    def model(self) -> ModelConfig:
        """Resolved."""
        return self.weights.model

    def load_tokenizer(self) -> Tokenizer | None:
        """None where there is none. Raises DataError, also where the folder holds another one than the model was trained with:
        its ids would mean other texts."""
        if self.tokenizer is None:
            return None
        found = Tokenizer.load(self.tokenizer)
        if self.tokenizer_fingerprint not in (None, found.fingerprint):
            raise DataError(
                f"{self.tokenizer}: holds the tokenizer {found.fingerprint}, but the model was trained with the tokenizer "
                f"{self.tokenizer_fingerprint}; restore that one"
            )
        return found


def open_run(run_directory: Path, step: int | str | None = None, average: int = 1) -> Trained:
    """A checkpoint of a run, or the mean of the `average` checkpoints that end with it.

    `step`: a number; "best" for the lowest validation loss; None for the newest. Raises CheckpointError, ConfigError.
    """
    folder = Path(run_directory) / "checkpoints"
    found = checkpoints(folder)
    if not found:
        raise CheckpointError(
            f"{run_directory}: has no checkpoint of a run; give a folder runs/<name> (one of Hugging Face goes with --model)"
        )
    steps = ", ".join(str(checkpoint.step) for checkpoint in found)
    last = found[0]
    if step == "best":
        last = min(found, key=lambda checkpoint: best_key(checkpoint.state()))
    elif step is not None:
        last = next((checkpoint for checkpoint in found if checkpoint.step == int(step)), None)
    if last is None:
        raise CheckpointError(f"{folder}: has no checkpoint of step {step}; it has: {steps}")
    chosen = [checkpoint for checkpoint in found if checkpoint.step <= last.step][:average]
    if len(chosen) < average:
        raise CheckpointError(f"{folder}: has fewer than {average} checkpoints up to step {last.step}; it has: {steps}")
    config = settings.load(["--config", str(Path(run_directory) / "config.yaml")], world_size=None)
    for checkpoint in chosen:
        verify(checkpoint)
    sources = [CheckpointWeights(checkpoint) for checkpoint in chosen]
    origin = {"run": config.run.name, "step": last.step}
    if average > 1:
        origin["mean_of_steps"] = [checkpoint.step for checkpoint in reversed(chosen)]
    tokenizer = Path(run_directory) / OWN_TOKENIZER
    if not tokenizer.is_dir():
        tokenizer = None if config.tokenizer.path is None else Path(config.tokenizer.path)
    return Trained(
        MeanWeights(sources) if average > 1 else sources[0],
        tokenizer,
        last.state().get("tokenizer"),
        config.data.document_mask,
        config,
        origin,
    )


def open_folder(folder: Path) -> Trained:
    """A Hugging Face folder. Raises UnsupportedModel, DataError where its tokenizer.json cannot be used, OSError."""
    folder, tokenizer, fingerprint = Path(folder), None, None
    if (folder / "tokenizer.json").is_file():
        tokenizer, fingerprint = folder, Tokenizer.load(folder).fingerprint
    return Trained(FolderWeights(folder), tokenizer, fingerprint, False, None, {"model": folder.name})


def verify(checkpoint: Checkpoint) -> None:
    """Reads all files of a checkpoint. Raises CheckpointError unless they are what was written."""
    if damage := checkpoint.damage():
        raise CheckpointError(damage)


def open_weights(path: Path, verify: Callable[[Checkpoint], None] = verify) -> Weights:
    """The weights that `model.from_pretrained` names: of a Hugging Face folder, of a run (its newest checkpoint), or of one
    checkpoint, which `verify` has looked at. Raises UnsupportedModel, CheckpointError."""
    path = Path(path)
    if (path / "config.json").is_file():
        return FolderWeights(path)
    if (path / "manifest.json").is_file():
        found = [Checkpoint(path)]
    else:
        found = checkpoints(path / "checkpoints")
    if not found:
        raise UnsupportedModel(
            f"{path}: is no Hugging Face folder (config.json), no run (checkpoints) and no checkpoint (manifest.json)"
        )
    verify(found[0])
    return CheckpointWeights(found[0])


def tokenizer_of(path: Path) -> str | None:
    """Fingerprint of the tokenizer that the weights of `path` (as `open_weights` takes it) were trained with; None: unknown."""
    path = Path(path)
    try:
        if (path / "tokenizer.json").is_file():
            return Tokenizer.load(path).fingerprint
        found = [Checkpoint(path)] if (path / "manifest.json").is_file() else checkpoints(path / "checkpoints")
        return found[0].state().get("tokenizer") if found else None
    except (DataError, CheckpointError):
        return None


def load_model(run_directory: Path, step: int | str | None = None) -> tuple[Config, Transformer]:
    """Settings and model, on the CPU in fp32, of a checkpoint of a run. As `open_run`."""
    trained = open_run(run_directory, step)
    return trained.config, load_transformer(trained.weights)
