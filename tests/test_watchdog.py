"""A run that hangs writes the stacks of all ranks and names the rank that is behind."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from pretrain.config import EngineConfig
from pretrain.engines import watchdog
from pretrain.engines.start import start_engine
from pretrain.engines.watchdog import hang_line
from tests.ranks import run_ranks


def wait_until(condition) -> None:
    """Returns as soon as the condition holds, however slow the machine is."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run_with_a_hang(folder: Path) -> tuple[str, str]:
    """In step 3, rank 1 does not join the collective until rank 0 has failed. Returns what the rank printed, and its error."""
    engine = start_engine(EngineConfig(timeout_seconds=2))
    engine.watchdog.start(folder / "stacks")
    printed, error = io.StringIO(), ""
    with contextlib.redirect_stderr(printed):
        for step in (1, 2, 3):
            engine.watchdog.begin_step(step)
            if step == 3 and engine.rank == 1:
                hanging(folder / "failed")
                break
            try:
                engine.all_reduce(torch.ones(1))
            except RuntimeError as caught:
                error = str(caught)
                (folder / "failed").touch()
    engine.watchdog.stop()
    return printed.getvalue(), error


def hanging(failed: Path) -> None:
    wait_until(failed.exists)


def test_the_rank_that_is_behind_is_named_and_all_ranks_write_their_stacks(tmp_path):
    (printed, error), (printed_by_1, _) = run_ranks(2, run_with_a_hang, tmp_path)
    hangs = [line for line in (printed + printed_by_1).splitlines() if line.startswith("hang:")]
    assert len(hangs) == 1 and "in step 3, in all_reduce, waiting for rank 1 (step 3, in waiting for data)" in hangs[0]
    assert error  # the collective times out by itself, after the watchdog has reported
    assert "all_reduce" in (tmp_path / "stacks" / "rank_0.txt").read_text()
    assert "hanging" in (tmp_path / "stacks" / "rank_1.txt").read_text()


def test_a_hang_leaves_the_newest_collectives_of_all_ranks(tmp_path):
    """Of the three in `run_with_a_hang`, rank 1 has not begun the last one."""
    run_ranks(2, run_with_a_hang, tmp_path)
    for rank, last in ((0, 3), (1, 2)):
        text = (tmp_path / "stacks" / f"rank_{rank}.txt").read_text()
        assert f"collective {last} of group 0 default_pg: gloo:all_reduce of [[1]]" in text
        assert f"collective {last + 1} of" not in text
        assert b"all_reduce" in (tmp_path / "stacks" / f"collectives_{rank}").read_bytes()


def test_a_torch_without_a_flight_recorder_leaves_stacks_alone(tmp_path, monkeypatch):
    for name in [name for name in dir(watchdog.c10d) if name.startswith("_dump_")]:
        monkeypatch.delattr(watchdog.c10d, name)
    assert watchdog.newest_collectives() == []


def test_a_recorder_that_fails_is_reported_and_stacks_are_complete(tmp_path, monkeypatch):
    def fail() -> bytes:
        raise KeyError("entries")

    monkeypatch.setattr(watchdog, "_recorder", lambda kind: fail)
    dog = watchdog.Watchdog(0, 2, 60)
    dog.path, dog._file = tmp_path / "rank_0.txt", open(tmp_path / "rank_0.txt", "a")
    dog._write_stacks()
    dog._file.close()
    text = dog.path.read_text()
    assert "test_watchdog" in text and "not known (KeyError('entries'))" in text


def signalled(folder: Path) -> None:
    engine = start_engine(EngineConfig(timeout_seconds=2))
    engine.watchdog.start(folder)
    engine.barrier()
    if engine.rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    wait_until(lambda: "signalled" in (folder / f"rank_{engine.rank}.txt").read_text())
    engine.close()


def test_a_signal_to_one_rank_makes_all_ranks_write_their_stacks_and_continue(tmp_path):
    run_ranks(2, signalled, tmp_path / "stacks")


def test_a_run_that_makes_progress_leaves_no_files(tmp_path, monkeypatch):
    """8 seconds of a clock that only this test advances, so a busy machine changes nothing; a hang is 1 second."""
    clock = [0.0]
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: clock[0], strftime=time.strftime))
    engine = start_engine(EngineConfig(timeout_seconds=1))
    engine.watchdog.start(tmp_path / "stacks")
    for _ in range(10):
        clock[0] += 0.8
        engine.all_reduce(torch.ones(1))
        time.sleep(2 * engine.watchdog.interval)
    engine.close()
    assert list(tmp_path.iterdir()) == []


def test_closing_does_not_fail_after_the_folder_was_moved(tmp_path):
    engine = start_engine(EngineConfig())
    engine.watchdog.start(tmp_path / "stacks")
    (tmp_path / "stacks").rename(tmp_path / "moved")
    engine.close()


def test_the_line_names_ranks_that_are_behind_or_not_responding_and_says_if_none_is():
    at = (20, 7, "update", 5)
    later = (20, 7, "update", 8)
    folder = Path("runs/x/stacks")
    assert "all 3 ranks at the same call" in hang_line([at] * 3, [later] * 3, 600, folder)
    assert "waiting for rank 2 (step 7, in forward);" in hang_line([at] * 3, [later, later, (18, 7, "forward", 9)], 600, folder)
    silent = hang_line([at, at, (18, 6, "forward", 4)], [later, later, (18, 6, "forward", 4)], 600, folder)
    assert "waiting for rank 2 (step 6, in forward, not responding)" in silent and "for 600 s in step 7" in silent
    hosts = ["node-0", "node-0", "node-1"]
    assert "waiting for rank 2 on node-1 (step 7, in" in hang_line(
        [at] * 3, [later, later, (18, 7, "forward", 9)], 600, folder, hosts
    )
    many = hang_line([at] * 20, [later] + [(3, 1, "forward", 9)] * 19, 600, folder)
    assert many.count("rank ") == 8 and "and 11 more" in many
