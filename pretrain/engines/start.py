"""Starts the engine that the settings name; separate from base.py, which the engines import."""

from __future__ import annotations

from pretrain.config import EngineConfig
from pretrain.engines.base import Engine
from pretrain.engines.ddp import DdpEngine


def start_engine(config: EngineConfig) -> Engine:
    """Starts this process's engine and joins the other ranks (a collective). Raises ConfigError if the libraries do not run
    what the settings request."""
    if config.name == "fsdp2":
        from pretrain.engines.fsdp2 import Fsdp2Engine

        return Fsdp2Engine(config)
    if config.name.startswith("zero"):
        from pretrain.engines.zero import ZeroEngine  # imports DeepSpeed

        return ZeroEngine(config)
    return DdpEngine(config)
