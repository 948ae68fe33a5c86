"""The precision of a run whose settings leave it open (`engine.precision: null`)."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import torch

from pretrain.checkpoint.manifest import CheckpointError
from pretrain.config import Config, ConfigError
from pretrain.engines.base import default_precision
from pretrain.run import resume
from pretrain.run.progress import read_saved


def resolve(config: Config, folder: Path) -> tuple[Config, str]:
    """Returns (the settings with a precision, the reason for it). folder: of the run's checkpoints.

    A run that resumes keeps the precision of its checkpoint, on whatever machine. A new one takes the faster one of this
    machine. Ranks on machines that differ in it refuse to start, as for any setting that differs.
    """
    if config.engine.precision:
        return config, "as engine.precision says"
    if precision := _saved(config, folder):
        return _with(config, precision), "that of the checkpoint"
    if torch.cuda.is_available():
        return _with(config, default_precision(config.engine)), "the default on GPUs"
    if cpu_multiplies_bf16():
        return _with(config, "bf16"), "the default on CPUs that multiply bf16 in hardware (AMX)"
    return _with(config, "fp32"), "the default on CPUs without hardware for bf16 (AMX)"


def cpu_multiplies_bf16() -> bool:
    """True if this CPU has tiles that multiply bf16 (AMX) and PyTorch's library uses them."""
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    usable = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(tiles and usable and torch.backends.mkldnn.enabled and tiles() and usable())


def _saved(config: Config, folder: Path) -> str | None:
    """The precision of the checkpoint from which the run would start; None: there is none, or it cannot be read."""
    with contextlib.suppress(ConfigError, CheckpointError):  # of which `resume.decide` tells
        found, _ = resume.preview(config, folder)
        if found:
            return resume.precision_of(read_saved(found))
    return None


def _with(config: Config, precision: str) -> Config:
    return replace(config, engine=replace(config.engine, precision=precision))
