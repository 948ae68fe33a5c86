"""The settings of the outputs of a run. Imports no torch.

`pretrain/config.py` explains `frozen`, `guarded` and `free`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pretrain.schema import PositiveFloat, PositiveInt, free


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases; the key comes from WANDB_API_KEY or `wandb login`, never from here."""

    project: str = free("pretrain")
    """W&B project."""
    entity: str | None = free(None)
    """W&B user or team; null: your default."""
    mode: Literal["online", "offline"] = free("online")
    """offline: files only, for `wandb sync` later."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Reports and their destinations. metrics.jsonl is the source of truth; the other sinks receive copies."""

    every_steps: PositiveInt = free(10)
    """Steps between log lines."""
    sinks: list[Literal["console", "jsonl", "wandb", "tensorboard"]] = free(lambda: ["console", "jsonl"])
    """Any of console, jsonl, wandb, tensorboard."""
    peak_tflops: PositiveFloat | None = free(None)
    """Peak of the device for MFU, in TFLOP/s; null: from a table of GPUs (unknown device: no MFU)."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = free(None)
    """First and last of up to 20 steps whose trace and costliest operators go to the run's folder profile/; null: off."""
    wandb: WandbConfig = free(WandbConfig)
    """Weights & Biases settings."""
