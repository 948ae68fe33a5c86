"""Starts the engine that the settings name; separate from base.py, which the engines import."""

from __future__ import annotations

import torch.distributed as dist

from pretrain.config import EngineConfig
from pretrain.engines.base import Engine
from pretrain.engines.ddp import DdpEngine


def start_engine(config: EngineConfig, store: dist.Store | None = None) -> Engine:
    """Starts this process's engine and joins the other ranks (a collective). Raises ConfigError if the libraries do not run
    what the settings request.

    store: of `rendezvous.meet`, where the ranks have met; None: they meet here.
    """
    if config.name == "fsdp2":
        from pretrain.engines.fsdp2 import Fsdp2Engine

        return Fsdp2Engine(config, store)
    if config.name.startswith("zero"):
        from pretrain.engines.zero import ZeroEngine  # imports DeepSpeed

        return ZeroEngine(config, store)
    return DdpEngine(config, store)
