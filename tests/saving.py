"""Saves a checkpoint in the way a run does, for tests of what reads it."""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoint.manifest import Checkpoint
from pretrain.checkpoint.saver import Saver
from pretrain.config import CheckpointConfig
from pretrain.engines.base import Engine


def save(folder: Path, step: int, engine: Engine, state: dict) -> Checkpoint:
    """Saves in the foreground (a collective) and keeps earlier checkpoints. Raises OSError on every rank if any rank fails."""
    config = CheckpointConfig(asynchronous=False, keep_last=1000)
    with Saver(folder, engine, config, acknowledge=lambda saved: None) as saver:
        saver.save(step, state, last=True)
    return Checkpoint(folder / f"step_{step:08d}")
