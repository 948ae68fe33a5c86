"""Runs stop cleanly in the middle of a validation, because of a file, and after the loss of a peer."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import pretrain.run.output
from tests.ranks import run_ranks
from tests.test_batches import random_lengths
from tests.test_indexed import documents, write
from tests.test_train import curve, final_bytes, records, run_of, train_here


def state_of(run: Path) -> dict:
    return json.loads((run / "run_state.json").read_text())


def train_and(argv: list[str], rank: int, step: int, act: Callable, *arguments) -> int:
    """Trains; on `rank` a thread calls `act` as soon as metrics.jsonl holds the line of `step`."""
    metrics = run_of(argv) / "metrics.jsonl"

    def wait_and_act() -> None:
        while not (metrics.exists() and f'"step": {step}, "loss"' in metrics.read_text()):
            time.sleep(0.001)
        act(*arguments)

    if int(os.environ.get("RANK", 0)) == rank:
        threading.Thread(target=wait_and_act, daemon=True).start()
    return train_here(argv)


def signal_self(number: int) -> None:
    os.kill(os.getpid(), number)


def signal_in_validation(argv: list[str]) -> int:
    """Resumes a run whose validation is due; rank 0 gets SIGTERM in the middle of it."""
    console = run_of(argv) / "console.log"

    def wait_and_signal() -> None:
        while "resuming after step" not in console.read_text():
            time.sleep(0.001)
        time.sleep(0.05)
        signal_self(signal.SIGTERM)

    if int(os.environ["RANK"]) == 0:
        threading.Thread(target=wait_and_signal, daemon=True).start()
    return train_here(argv)


def test_sigterm_interrupts_a_validation_and_the_resumed_run_starts_with_it(tiny):
    slow = ["--evaluate.max_batches", "200", *tiny]  # about a second
    assert run_ranks(2, train_here, [*slow, "--run.name", "straight"]) == [0, 0]
    began = time.monotonic()
    assert run_ranks(2, train_and, slow, 1, 10, signal_self, signal.SIGTERM) == [75, 75]
    seconds, state = time.monotonic() - began, state_of(run_of(tiny))
    assert (state["step"], state["saved_step"]) == (10, 10) and not [r for r in records(run_of(tiny)) if "val_loss" in r]
    saved = json.loads((run_of(tiny) / "checkpoints" / "step_00000010" / "state.json").read_text())
    assert saved["progress"]["evaluation_due"] and saved["val_loss"] is None and seconds < 60
    # Again, in the middle of the repeated validation: there is nothing new to save, and no validation is recorded.
    assert run_ranks(2, signal_in_validation, slow) == [75, 75]
    assert not [record for record in records(run_of(tiny)) if "val_loss" in record]
    assert run_ranks(2, train_here, slow) == [0, 0]
    assert curve(run_of(tiny)) == curve(run_of(tiny, "straight"))
    assert final_bytes(run_of(tiny)) == final_bytes(run_of(tiny, "straight"))


def test_a_validation_that_is_due_is_dropped_if_the_validation_data_were_removed(tiny, tmp_path, monkeypatch):
    def log_and_signal(run, *figures) -> None:
        log_step(run, *figures)
        if run.progress.step == 10:
            signal_self(signal.SIGTERM)  # the validation, which comes next, receives it

    log_step = pretrain.run.output.log_step
    monkeypatch.setattr(pretrain.run.output, "log_step", log_and_signal)
    for name in ("train", "valid"):
        write(tmp_path / name, documents(random_lengths(1, 60), seed=1))
    files = [word for name in ("train", "valid") for word in (f"--data.{name}", f"[{{path: {tmp_path / name}}}]")]
    files += ["--data.synthetic", "null", "--model.vocab_size", "100", *tiny]
    assert train_here(files) == 75
    assert json.loads((run_of(tiny) / "checkpoints" / "step_00000010" / "state.json").read_text())["progress"]["evaluation_due"]
    files[3] = "[]"
    assert train_here(files) == 0
    assert records(run_of(tiny))[-1]["step"] == 20 and state_of(run_of(tiny))["status"] == "done"


@pytest.mark.slow
def test_a_validation_repeated_after_a_crash_is_recorded_once_and_enters_the_checkpoint(tiny):
    """The job that repeated it died before its next checkpoint."""
    assert run_ranks(2, train_here, [*tiny, "--run.name", "straight"]) == [0, 0]
    slow = ["--evaluate.max_batches", "400", *tiny]
    assert run_ranks(2, train_and, slow, 1, 10, signal_self, signal.SIGTERM) == [75, 75]
    kept = run_of(tiny) / "checkpoints" / "step_00000010"
    before = {file.name: file.read_bytes() for file in kept.iterdir()}
    assert run_ranks(2, train_here, tiny) == [0, 0]
    for checkpoint in (run_of(tiny) / "checkpoints").iterdir():
        checkpoint.rename(run_of(tiny) / f"gone_{checkpoint.name}")
    kept.mkdir(mode=0o700)
    for name, content in before.items():
        (kept / name).write_bytes(content)
        (kept / name).chmod(0o600)
    assert run_ranks(2, train_here, tiny) == [0, 0]
    assert curve(run_of(tiny)) == curve(run_of(tiny, "straight"))
    losses = {r["step"]: r["val_loss"] for r in records(run_of(tiny)) if "val_loss" in r}
    assert list(losses) == [10, 20]


def test_the_file_stop_ends_a_run_with_130_and_blocks_it_until_it_is_removed(tiny):
    tiny = ["--train.max_steps", "60", *tiny]
    stop = run_of(tiny) / "STOP"
    assert run_ranks(2, train_and, tiny, 1, 6, stop.touch) == [130, 130]
    state, at = state_of(run_of(tiny)), records(run_of(tiny))[-1]["step"]
    assert (state["exit_status"], state["step"], state["saved_step"]) == (130, at, at) and "the file STOP" in state["reason"]
    written = stop.stat().st_mtime
    saved = (run_of(tiny) / "checkpoints" / f"step_{at:08d}").stat().st_mtime
    assert saved - written < 20 and at < 40
    assert run_ranks(2, train_here, tiny) == [130, 130] and records(run_of(tiny))[-1]["step"] == at
    assert str(stop) in state_of(run_of(tiny))["reason"]
    stop.unlink()
    assert run_ranks(2, train_here, tiny) == [0, 0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_loses_its_peer_exits_with_75_and_keeps_the_last_checkpoint(tiny, number):
    """Killed: the collective fails at once. Stopped: it never ends, and the launcher's SIGTERM has a deadline."""
    tiny = ["--train.max_steps", "5000", "--checkpoint.deadline_seconds", "2", *tiny]
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 0 died"):
        run_ranks(2, lose_a_peer, tiny, number)
    state = state_of(run_of(tiny))
    assert state["exit_status"] == 75 and state["reason"].startswith("peer_lost") and state["saved_step"] >= 4
    struck = float((run_of(tiny).parent / "struck").read_text())
    assert state["time"] - struck < 20 and time.monotonic() - began < 90
    assert (run_of(tiny) / "checkpoints" / f"step_{state['saved_step']:08d}").is_dir()


def lose_a_peer(argv: list[str], number: int) -> int:
    """Rank 1 gets `number` after step 9; if that leaves rank 0 waiting, rank 0 gets SIGTERM, as from a launcher."""
    struck = run_of(argv).parent / "struck"

    def act() -> None:
        struck.write_text(str(time.time()))
        signal_self(number)

    def as_a_launcher() -> None:
        while not struck.exists():
            time.sleep(0.01)
        time.sleep(0.5)
        signal_self(signal.SIGTERM)

    if int(os.environ["RANK"]) == 0 and number == signal.SIGSTOP:
        threading.Thread(target=as_a_launcher, daemon=True).start()
    return train_and(argv, 1, 9, act)


@pytest.mark.parametrize(("minutes", "several"), [("0.0005", True), ("60", False), ("0", False)])
def test_checkpoints_are_saved_after_so_many_minutes(tiny, minutes, several):
    """0.0005 minutes are 30 ms; twenty steps take longer. The end of a run is always saved."""
    assert train_here(["--checkpoint.every_steps", "0", "--checkpoint.every_minutes", minutes, *tiny]) == 0
    saves = (run_of(tiny) / "console.log").read_text().count("  saved ")
    assert saves > 1 if several else saves == 1
