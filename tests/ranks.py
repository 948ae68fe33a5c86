"""Runs a function on several real gloo ranks: `run_ranks(2, function, *args)`.

The ranks come from a fork server, one per test process, that has imported tests/preloaded.py, so a start takes a fraction of
a second. `function` must be importable (a module's own function) and its result picklable.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded"])


def run_ranks(world_size: int, function: Callable, *args: Any, timeout: float = 120) -> list[Any]:
    """Runs `function(*args)` on `world_size` processes with torchrun's variables; returns the results in the order of ranks.

    Raises RuntimeError if a rank fails or dies, TimeoutError after `timeout` seconds without a result; the others are killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes, patience = [], [], 1
    for rank in range(world_size):
        receiver, sender = _CONTEXT.Pipe(duplex=False)
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        process = _CONTEXT.Process(
            target=_entry, args=(sender, variables if world_size > 1 else {}, function, args), daemon=True
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        results = [_receive(pipe, rank, timeout) for rank, pipe in enumerate(pipes)]
        patience = 10
    finally:
        for process in processes:
            process.join(patience)
            process.kill()
    return results


def _receive(pipe, rank: int, timeout: float) -> Any:
    if not pipe.poll(timeout):
        raise TimeoutError(f"rank {rank} gave no result in {timeout} s")
    try:
        failure, result = pipe.recv()
    except EOFError:
        raise RuntimeError(f"rank {rank} died") from None
    if failure:
        raise RuntimeError(f"rank {rank} failed:\n{failure}")
    return result


def _entry(sender, variables: dict, function: Callable, args: tuple) -> None:
    os.environ.update({name: str(value) for name, value in variables.items()})
    import torch

    torch.set_num_threads(1)
    try:
        result = None, function(*args)
    except BaseException:
        result = traceback.format_exc(), None
    sender.send(result)
    sender.close()
