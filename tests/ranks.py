"""Runs a function on several real gloo ranks: `run_ranks(2, function, *args)`.

The ranks come from a fork server, one per test process, that has imported tests/preloaded.py, so a start takes a fraction of
a second.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from pretrain.run.processes import run_processes

multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.preloaded"])


def run_ranks(world_size: int, function: Callable, *args: Any, timeout: float = 120) -> list[Any]:
    """`run_processes`, with a limit on the seconds that a test may take."""
    return run_processes(world_size, function, *args, timeout_seconds=timeout)
