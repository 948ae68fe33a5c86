"""A run seen from outside: its settings and its trained model, read from its folder without any process group."""

from __future__ import annotations

from pathlib import Path

import torch

from pretrain.config import Config, load, model_from_dict
from pretrain.model.transformer import Transformer
from pretrain.runtime.checkpoint import best_key, load_weights
from pretrain.runtime.manifest import CheckpointError, checkpoints


def load_model(run_directory: Path, step: int | str | None = None) -> tuple[Config, Transformer]:
    """Settings and model, on the CPU in fp32, of a checkpoint of a run.

    `step`: a number; "best" for the lowest validation loss; None for the newest. Raises CheckpointError, ConfigError.
    """
    folder = Path(run_directory) / "checkpoints"
    found = checkpoints(folder)
    steps = ", ".join(str(checkpoint.step) for checkpoint in found) or "none"
    if step == "best":
        found = sorted(found, key=lambda checkpoint: best_key(checkpoint.state()))
    elif step is not None:
        found = [checkpoint for checkpoint in found if checkpoint.step == int(step)]
    if not found:
        raise CheckpointError(f"{folder}: has no checkpoint{'' if step is None else f' of step {step}'}; it has: {steps}")
    config = load(["--config", str(Path(run_directory) / "config.yaml")], world_size=None)
    with torch.device("meta"):
        model = Transformer(model_from_dict(found[0].state()["model"]))
    model.to_empty(device="cpu")
    load_weights(found[0], model)
    return config, model.eval()
