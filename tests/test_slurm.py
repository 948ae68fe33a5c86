"""The SLURM script, with stand-ins for SLURM's own commands, starts the run and requeues itself when it should."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_train import ROOT, records, run_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
SRUN = """#!/usr/bin/env bash
export SLURM_NODEID=0
"$@" &
echo $! > "$SLURM_TEST/srun.pid"
wait $!
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$SLURM_TEST/requests"; fi
"""


def start(folder: Path, settings: list[str]) -> subprocess.Popen:
    """Starts the script on one node with two processes."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    python = Path(sys.executable).parent
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "here", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    environment = {**os.environ, **slurm, "SLURM_TEST": str(folder), "PATH": f"{folder}:{python}:{os.environ['PATH']}"}
    command = ["launch/slurm.sh", *settings]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def requeued(folder: Path) -> bool:
    return (folder / "requests").exists() and "requeue" in (folder / "requests").read_text()


def test_a_finished_run_is_not_requeued(tiny, tmp_path):
    job = start(tmp_path, tiny)
    output, _ = job.communicate(timeout=180)
    assert job.returncode == 0 and not requeued(tmp_path), output
    assert "ranks 2 x" in output and records(run_of(tiny))[-1]["step"] == 20


def test_a_run_saves_and_requeues_itself_after_a_notice(tiny, tmp_path):
    job = start(tmp_path, ["--train.max_steps", "100000", *tiny])
    metrics, deadline = run_of(tiny) / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and '"step": 9,' in metrics.read_text()):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.01)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0 and requeued(tmp_path), output
    assert "the run ended with status 75" in output


def test_wrong_settings_are_refused_before_srun_starts(tiny, tmp_path):
    job = start(tmp_path, ["--optimizr.lr", "1", *tiny])
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2 and "did you mean optimizer" in output and not (tmp_path / "srun.pid").exists()
