"""A run that hangs writes the stacks of all ranks and names the one that is behind."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import time
from pathlib import Path

import torch

from pretrain.config import EngineConfig
from pretrain.engines.start import start_engine
from pretrain.engines.watchdog import hang_line
from tests.ranks import run_ranks


def run_with_a_sleeper(folder: Path) -> tuple[str, str, float]:
    """Rank 1 sleeps in step 3 while the other waits for it. -> what was printed, the error, and the seconds until it came."""
    engine = start_engine(EngineConfig(timeout_seconds=3))
    engine.watchdog.start(folder)
    printed, error, began = io.StringIO(), "", 0.0
    with contextlib.redirect_stderr(printed):
        for step in (1, 2, 3):
            engine.watchdog.begin_step(step)
            began = time.monotonic()
            if step == 3 and engine.rank == 1:
                dozing()
            try:
                engine.all_reduce(torch.ones(1))
            except RuntimeError as caught:
                error = str(caught)
    seconds = time.monotonic() - began
    engine.watchdog.stop()
    return printed.getvalue(), error, seconds


def dozing() -> None:
    time.sleep(8)


def test_the_rank_that_is_behind_is_named_and_all_ranks_write_their_stacks(tmp_path):
    (printed, error, seconds), (printed_by_sleeper, *_) = run_ranks(2, run_with_a_sleeper, tmp_path / "stacks")
    hangs = [line for line in (printed + printed_by_sleeper).splitlines() if line.startswith("hang:")]
    assert len(hangs) == 1 and "in step 3, in all_reduce, waiting for rank 1 (step 3, in waiting for data)" in hangs[0]
    assert error and 3 < seconds < 8  # the collective gives up by itself, after the watchdog has spoken
    assert "all_reduce" in (tmp_path / "stacks" / "rank_0.txt").read_text()
    assert "dozing" in (tmp_path / "stacks" / "rank_1.txt").read_text()


def signalled(folder: Path) -> None:
    engine = start_engine(EngineConfig(timeout_seconds=10))
    engine.watchdog.start(folder)
    engine.barrier()
    if engine.rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(3)
    engine.close()


def test_a_signal_to_one_rank_makes_all_ranks_write_their_stacks_and_go_on(tmp_path):
    run_ranks(2, signalled, tmp_path / "stacks")
    for rank in (0, 1):
        assert "signalled" in (tmp_path / "stacks" / f"rank_{rank}.txt").read_text()


def test_a_run_that_moves_leaves_nothing(tmp_path):
    engine = start_engine(EngineConfig(timeout_seconds=1))
    engine.watchdog.start(tmp_path / "stacks")
    for _ in range(20):
        engine.all_reduce(torch.ones(1))
        time.sleep(0.1)
    engine.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_somebody_moved_is_no_failure_at_the_end(tmp_path):
    engine = start_engine(EngineConfig())
    engine.watchdog.start(tmp_path / "stacks")
    (tmp_path / "stacks").rename(tmp_path / "moved")
    engine.close()


def test_the_line_says_who_is_behind_who_is_silent_and_when_all_wait_alike():
    at = (20, 7, "update", 5)
    later = (20, 7, "update", 8)
    folder = Path("runs/x/stacks")
    assert "all 3 ranks at the same call" in hang_line([at] * 3, [later] * 3, 600, folder)
    assert "waiting for rank 2 (step 7, in forward);" in hang_line([at] * 3, [later, later, (18, 7, "forward", 9)], 600, folder)
    silent = hang_line([at, at, (18, 6, "forward", 4)], [later, later, (18, 6, "forward", 4)], 600, folder)
    assert "waiting for rank 2 (step 6, in forward, not responding)" in silent and "for 600 s in step 7" in silent
    many = hang_line([at] * 20, [later] + [(3, 1, "forward", 9)] * 19, 600, folder)
    assert many.count("rank ") == 8 and "and 11 more" in many
