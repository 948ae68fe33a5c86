"""Opens trained models: a run, one of its checkpoints, or a Hugging Face folder. Knows files; needs no process group.

`hf_mapping.folder_kind` tells these folders apart where only a path is given, as in `model.from_pretrained`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from pretrain import config as settings
from pretrain.checkpoint.manifest import Checkpoint, CheckpointError, checkpoints
from pretrain.checkpoint.storage import best_key
from pretrain.checkpoint.tensors import BLOCK
from pretrain.config import Config
from pretrain.data.indexed import DataError
from pretrain.data.tokenizer import Tokenizer, local_folder
from pretrain.interop.weights import CheckpointWeights, HFWeights, MeanWeights, Weights, read_tensor
from pretrain.model import hf_mapping
from pretrain.model.config import ModelConfig
from pretrain.model.hf_mapping import UnsupportedModel, folder_kind, kept_keys, read_config

OWN_TOKENIZER = "tokenizer"
"""Subfolder of a converted model, which can be moved together with it; a run's tokenizer stays at tokenizer.path."""


class TrainedModel(NamedTuple):
    """A trained model that has been opened but not loaded."""

    weights: Weights
    tokenizer: Path | None
    """Folder of the tokenizer."""
    tokenizer_fingerprint: str | None
    """Fingerprint of the tokenizer that the model was trained with, if known."""
    document_mask: bool
    """In training, tokens attended only to their own document."""
    config: Config | None
    """Settings of the run; None for a Hugging Face folder."""
    origin: dict
    """Source of the model, for reports: {"run", "step", ...} or {"model"}."""
    hugging_face: dict | None = None
    """Settings of the Hugging Face folder that the model is in, or was imported from, which no setting of ours holds:
    {"config": keys of config.json, "generation_config": the file or None}. None for a model trained here."""

    @property
    def model(self) -> ModelConfig:
        """The resolved settings of the model."""
        return self.weights.model

    def load_tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None if the model has none. Raises DataError, even when the folder now holds a different tokenizer
        from the one used in training: its ids would stand for other texts."""
        if self.tokenizer is None:
            return None
        found = Tokenizer.load(self.tokenizer)
        if self.tokenizer_fingerprint not in (None, found.fingerprint):
            raise DataError(
                f"{self.tokenizer}: holds the tokenizer {found.fingerprint}, but the model was trained with the tokenizer "
                f"{self.tokenizer_fingerprint}; restore that one"
            )
        return found

    def require_tokenizer(self) -> Tokenizer:
        """As `load_tokenizer`, for what needs text. Raises DataError, also if the model has none: what to do about it."""
        found = self.load_tokenizer()
        if found is None and self.config:
            raise DataError(
                f"the run {self.origin['run']} has no tokenizer: tokenizer.path in its config.yaml is not set; set it there"
            )
        if found is None:
            raise DataError(
                f"{self.origin['model']}: has no tokenizer.json; transformers makes one from what it can read, such as a "
                "tokenizer.model: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        return found


def open_run(run_directory: Path, step: int | str | None = None, average: int = 1, last_weights: bool = False) -> TrainedModel:
    """Opens a checkpoint of a run, or the mean of the `average` checkpoints up to that one, and reads all their files once.

    `step`: a number; "best" for the lowest validation loss; None for the newest. Where the run kept an average of its weights,
    of which its validation losses are, that is the model; last_weights: the weights of the last step instead.
    Raises CheckpointError, ConfigError.
    """
    folder = Path(run_directory) / "checkpoints"
    found = checkpoints(folder)
    if not found:
        raise CheckpointError(
            f"{run_directory}: has no checkpoints; give the folder of a run, runs/<name> (--model takes a Hugging Face folder)"
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
        require_intact(checkpoint)
    sources = [CheckpointWeights(checkpoint, last_weights) for checkpoint in chosen]
    origin = {"run": config.run.name, "step": last.step}
    if sources[0].averaged:
        origin["weights"] = "average"
    if average > 1:
        origin["mean_of_steps"] = [checkpoint.step for checkpoint in reversed(chosen)]
    tokenizer = Path(run_directory) / OWN_TOKENIZER
    if not tokenizer.is_dir():
        tokenizer = None if config.tokenizer.path is None else local_folder(config.tokenizer.path)
    return TrainedModel(
        MeanWeights(sources) if average > 1 else sources[0],
        tokenizer,
        last.state().get("tokenizer"),
        config.data.document_mask,
        config,
        origin,
        last.state().get("hugging_face"),
    )


def open_hf_folder(folder: Path) -> TrainedModel:
    """Opens a Hugging Face folder. Raises UnsupportedModel, DataError (its tokenizer.json cannot be used), OSError."""
    folder, tokenizer, fingerprint = Path(folder), None, None
    if (folder / "tokenizer.json").is_file():
        tokenizer, fingerprint = folder, Tokenizer.load(folder).fingerprint
    weights, generation = HFWeights(folder), None
    if (folder / "generation_config.json").is_file():
        generation = read_config(folder, "generation_config.json")
    kept = {"config": kept_keys(read_config(folder), weights.model), "generation_config": generation}
    return TrainedModel(weights, tokenizer, fingerprint, False, None, {"model": folder.name}, kept)


def require_intact(checkpoint: Checkpoint) -> None:
    """Reads all files of a checkpoint. Raises CheckpointError if any of them changed since it was written."""
    if damage := checkpoint.damage():
        raise CheckpointError(damage)


def open_weights(path: Path, check: Callable[[Checkpoint], None] = require_intact) -> Weights:
    """Opens the weights that `model.from_pretrained` names, of any `folder_kind`; `check` is called on a checkpoint first.

    Raises UnsupportedModel, CheckpointError."""
    if folder_kind(path) == "hugging_face":
        return HFWeights(path)
    checkpoint = _checkpoint_at(path)
    check(checkpoint)
    return CheckpointWeights(checkpoint)


def find_unusable(source: Weights, part: int = 0, parts: int = 1) -> tuple[int, str] | None:
    """(number, problem) of the first tensor from which nothing can be trained, among every `parts`-th; None: all are usable.

    Reads them all. Raises OSError.
    """
    for number, tensor in enumerate(hf_mapping.tensors(source.model)):
        if number % parts == part and tensor.parameter and (problem := _problem_of(source, tensor)):
            return number, problem
    return None


def tensor_problem(source: Weights, number: int) -> str | None:
    """Why nothing can be trained from this tensor of Hugging Face's model; None: it is usable. Reads it."""
    return _problem_of(source, next(itertools.islice(hf_mapping.tensors(source.model), number, None)))


def _problem_of(source: Weights, tensor: hf_mapping.HFTensor) -> str | None:
    zero = True
    for first in range(0, tensor.count, BLOCK):
        block = torch.empty(min(BLOCK, tensor.count - first))
        read_tensor(source, tensor, first, block)
        if not all(map(math.isfinite, torch.aminmax(block))):
            return f"{tensor.name} contains NaN or infinity: the model had diverged, or the file is damaged"
        zero = zero and not block.any()
    if zero and (len(tensor.shape) == 1 or tensor.parameter == "model.embed_tokens.weight") and "bias" not in tensor.name:
        return f"{tensor.name} is all zeros, so every output would be zero: the file was never filled"
    return None


def tokenizer_of(path: Path) -> str | None:
    """Fingerprint of the tokenizer that the weights at `path` (any `folder_kind`) were trained with, or None if unknown."""
    try:
        if folder_kind(path) != "hugging_face":
            return _checkpoint_at(path).state().get("tokenizer")
        return Tokenizer.load(path).fingerprint if (Path(path) / "tokenizer.json").is_file() else None
    except (DataError, CheckpointError, UnsupportedModel):
        return None


def _checkpoint_at(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest one of the run there. Raises CheckpointError, UnsupportedModel."""
    path = Path(path)
    found = [Checkpoint(path)] if folder_kind(path) == "checkpoint" else checkpoints(path / "checkpoints")
    if not found:
        raise CheckpointError(f"{path / 'checkpoints'}: holds no complete checkpoint (step_00001000, for example)")
    return found[0]
