"""Chooses the engine that the settings name."""

from __future__ import annotations

from pretrain.config import EngineConfig
from pretrain.engines.base import Engine
from pretrain.engines.ddp import DdpEngine


def start_engine(config: EngineConfig) -> Engine:
    """The engine of this process, which joins the others. Raises ConfigError when they are not what the settings ask for."""
    if config.name == "fsdp2":
        from pretrain.engines.fsdp2 import Fsdp2Engine

        return Fsdp2Engine(config)
    if config.name.startswith("zero"):
        from pretrain.engines.zero import ZeroEngine  # imports DeepSpeed

        return ZeroEngine(config)
    return DdpEngine(config)
