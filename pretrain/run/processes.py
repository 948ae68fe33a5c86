"""Runs a function as the ranks of a job on this machine, for checks and tests that need real ranks. Imports no torch."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

from pretrain.engines.place import LAUNCHER


def run_processes(world_size: int, function: Callable, *args: Any, timeout_seconds: float | None = None) -> list[Any]:
    """Calls `function(*args)` on `world_size` processes with the variables that torchrun sets. -> results in order of ranks.

    The processes come from multiprocessing's fork server, so `function` must be importable and its result picklable. Raises
    RuntimeError if a rank fails (with its traceback) or dies, TimeoutError if one is too slow; the others are killed.
    """
    context = multiprocessing.get_context("forkserver")
    port, pipes, processes, patience_seconds = free_port(), [], [], 1
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        arguments = (sender, variables if world_size > 1 else {}, function, args)
        processes.append(context.Process(target=_entry, args=arguments, daemon=True))
        processes[-1].start()
        sender.close()
        pipes.append(receiver)
    try:
        results = [_receive(pipe, rank, timeout_seconds) for rank, pipe in enumerate(pipes)]
        patience_seconds = 10
    finally:
        for process in processes:
            process.join(patience_seconds)
            process.kill()
    return results


def free_port() -> int:
    """A TCP port of this machine that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _receive(pipe: Any, rank: int, timeout_seconds: float | None) -> Any:
    if not pipe.poll(timeout_seconds):
        raise TimeoutError(f"rank {rank} gave no result in {timeout_seconds} s")
    try:
        failure, result = pipe.recv()
    except EOFError:
        raise RuntimeError(f"rank {rank} died without an error message (out of memory?)") from None
    if failure:
        raise RuntimeError(f"rank {rank} failed:\n{failure}")
    return result


def _entry(sender: Any, variables: dict, function: Callable, args: tuple) -> None:
    for name in LAUNCHER:  # of the shell, or of a launcher above this process
        os.environ.pop(name, None)
    os.environ.update({name: str(value) for name, value in variables.items()})
    import torch

    torch.set_num_threads(1)
    try:
        result = None, function(*args)
    except BaseException:
        result = traceback.format_exc(), None
    sender.send(result)
    sender.close()
    sys.stdout.flush()
