"""Ends of jobs: SIGTERM at any moment, launchers that are killed, interrupted starts, two jobs on one folder."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from pretrain.config import CheckpointConfig
from pretrain.run.directory import RunDirectory
from pretrain.run.stop import StopRequest
from tests.ranks import run_ranks
from tests.test_stopping import state_of
from tests.test_train import ROOT, TINY, curve, final_bytes, records, run_of, train_here

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
SIGTERMS, STEPS = 20, 400
LAUNCH = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", "launch/accelerate/cpu.yaml"]


@pytest.fixture
def tiny(tmp_path) -> list[str]:
    (tmp_path / "tiny.yaml").write_text(TINY)
    return ["--config", str(tmp_path / "tiny.yaml"), "--run.directory", str(tmp_path / "runs")]


def trained_lines(run: Path) -> int:
    """Number of training records in metrics.jsonl."""
    path = run / "metrics.jsonl"
    return path.read_text().count('"grad_norm"') if path.exists() else 0


# ---------------------------------------------------------------- signals


def train_and_signal(argv: list[str], ranks: list[int], delay_seconds: float, gap_seconds: float | None, seen: int) -> int:
    """Trains; `ranks` get SIGTERM `delay_seconds` after the first new record, and again after the gap, if any. Writes the time
    of the first signal to the file `struck`."""

    def strike() -> None:
        while trained_lines(run_of(argv)) <= seen:
            time.sleep(0.002)
        time.sleep(delay_seconds)
        (run_of(argv).parent / "struck").write_text(repr(time.time()))
        os.kill(os.getpid(), signal.SIGTERM)
        if gap_seconds is not None:
            time.sleep(gap_seconds)
            os.kill(os.getpid(), signal.SIGTERM)

    if int(os.environ["RANK"]) in ranks:
        threading.Thread(target=strike, daemon=True).start()
    return train_here(argv, StopRequest(exits=True))


def test_twenty_sigterms_at_random_moments_lose_no_step_and_change_no_number(tiny, capsys):
    """Between steps, in validations and in saves, on either rank, on both, or twice. Prints the time until the checkpoint is
    durable; on an idle machine the 95th percentile is below 5 s."""
    tiny = ["--train.max_steps", str(STEPS), "--evaluate.every_steps", "5", "--evaluate.max_batches", "20", *tiny]
    draw, waits = random.Random(0), []
    for number in range(SIGTERMS):
        seen = trained_lines(run_of(tiny))
        ranks, gap = draw.choice([[0], [1], [0, 1]]), draw.choice([None, draw.uniform(0, 0.2)])
        statuses = run_ranks(2, train_and_signal, tiny, ranks, draw.uniform(0, 0.2), gap, seen)
        assert statuses == [75, 75], f"SIGTERM {number}: {statuses}"
        state, reached = state_of(run_of(tiny)), max(record["step"] for record in records(run_of(tiny)))
        assert state["step"] == state["saved_step"] == reached, f"SIGTERM {number} lost steps: {state}"
        newest = run_of(tiny) / "checkpoints" / f"step_{reached:08d}"
        waits.append(newest.stat().st_mtime - float((run_of(tiny).parent / "struck").read_text()))
    waits.sort()
    with capsys.disabled():
        print(
            f"\nfrom SIGTERM to durable: median {waits[SIGTERMS // 2]:.2f} s, p95 {waits[-2]:.2f} s, longest {waits[-1]:.2f} s"
        )
    assert waits[-2] <= CheckpointConfig().deadline_seconds
    assert run_ranks(2, train_here, tiny, timeout=400) == [0, 0]
    assert run_ranks(2, train_here, [*tiny, "--run.name", "straight"], timeout=400) == [0, 0]
    assert curve(run_of(tiny)) == curve(run_of(tiny, "straight"))
    assert final_bytes(run_of(tiny)) == final_bytes(run_of(tiny, "straight"))


# ---------------------------------------------------------------- the real launcher


class Launched:
    """A job under `accelerate launch`."""

    def __init__(self, settings: list[str]):
        self.run = run_of(settings)
        command = [*LAUNCH, "--main_process_port", "0", "launch/pretrain.py", *settings]
        self.launcher = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def wait_for(self, condition) -> list[psutil.Process]:
        """Waits for a condition. Returns the processes of the job."""
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline and self.launcher.poll() is None, self.launcher.communicate()[0]
            time.sleep(0.005)
        launcher = psutil.Process(self.launcher.pid)
        return [launcher, *launcher.children(recursive=True)]


def test_workers_of_a_killed_launcher_save_and_release_the_folder(tiny):
    job = Launched(["--train.max_steps", "100000", *tiny])
    family = job.wait_for(lambda: trained_lines(job.run) > 10)
    job.launcher.kill()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    state = state_of(job.run)
    assert (state["exit_status"], state["step"]) == (75, state["saved_step"])
    saved = {path.name for path in (job.run / "checkpoints").iterdir()}
    RunDirectory(job.run)  # raises if the lock is still held
    time.sleep(1)
    assert {path.name for path in (job.run / "checkpoints").iterdir()} == saved
    job.launcher.communicate()


def test_sigterm_to_the_launcher_reaches_all_ranks_and_loses_no_step(tiny):
    job = Launched(["--train.max_steps", "100000", *tiny])
    family = job.wait_for(lambda: trained_lines(job.run) > 10)
    job.launcher.terminate()
    job.launcher.communicate(timeout=60)
    assert not [process for process in family if process.is_running()]
    state = state_of(job.run)
    assert (state["exit_status"], state["step"]) == (75, state["saved_step"]) and state["step"] == records(job.run)[-1]["step"]


def test_sigterm_before_the_first_step_ends_the_job(tiny):
    job = Launched(tiny)
    family = job.wait_for(lambda: (job.run / "run_state.json").exists())  # the ranks are still starting
    job.launcher.terminate()
    job.launcher.communicate(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert state_of(job.run)["exit_status"] == 75
    assert run_ranks(2, train_here, tiny) == [0, 0]


def test_a_second_job_on_a_folder_ends_with_73_and_the_first_continues(tiny):
    job = Launched(["--train.max_steps", "100000", *tiny])
    job.wait_for(lambda: trained_lines(job.run) > 5)
    assert run_ranks(2, train_here, tiny) == [73, 73]
    before = trained_lines(job.run)
    job.wait_for(lambda: trained_lines(job.run) > before)
    assert json.loads((job.run / "run_state.json").read_text())["exit_status"] is None
    job.launcher.terminate()
    job.launcher.communicate(timeout=30)
    assert state_of(job.run)["exit_status"] == 75
