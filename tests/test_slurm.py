"""The SLURM script, with stand-ins for SLURM's own commands, starts the run and requeues itself when it should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_train import ROOT, records, run_of

SRUN = """#!/usr/bin/env bash
export SLURM_NODEID=0
"$@" &
echo $! > "$SLURM_TEST/srun.pid"
wait $!
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then seq -f 127.0.0.%.0f 1 20000; else echo "$@" >> "$SLURM_TEST/requests"; fi
"""
NODES = {"SLURM_JOB_NODELIST": "many", "SLURM_NNODES": "1"}
# In place of the launcher: notes its arguments, then ends as $SLURM_TEST/end says, if a job starts at all.
ACCELERATE = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$SLURM_TEST/arguments"
folder=$(cat "$SLURM_TEST/folder")
[ ! -f "$SLURM_TEST/end" ] || { mkdir -p "$folder" && cat "$SLURM_TEST/end" > "$folder/run_state.json"; }
exit 1
"""


def start(folder: Path, settings: list[str], variables: dict[str, str] | None = None, **programs: str) -> subprocess.Popen:
    """Starts the script on one node, with two processes unless `variables` say otherwise; `programs` replace the real ones."""
    for name, text in ({"srun": SRUN, "scontrol": SCONTROL} | programs).items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    python = Path(sys.executable).parent
    slurm = NODES | {"SLURM_JOB_ID": str(os.getpid())} | ({"SLURM_GPUS_ON_NODE": "2"} if variables is None else variables)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment = {**inherited, **slurm, "SLURM_TEST": str(folder), "PATH": f"{folder}:{python}:{os.environ['PATH']}"}
    command = ["launch/slurm.sh", *settings]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def requeued(folder: Path) -> bool:
    return (folder / "requests").exists() and "requeue" in (folder / "requests").read_text()


def state_after(folder: Path, settings: list[str], before: dict | None, after: dict | None) -> tuple[int, bool, str]:
    """(exit status, requeued?, output) of a job that finds `before` in run_state.json and leaves `after`; None: no file."""
    run = run_of(settings)
    run.mkdir(parents=True, exist_ok=True)
    (folder / "requests").unlink(missing_ok=True)
    (folder / "folder").write_text(str(run))
    for content, path in ((before, run / "run_state.json"), (after, folder / "end")):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(json.dumps(content))
    job = start(folder, settings, accelerate=ACCELERATE)
    output, _ = job.communicate(timeout=120)
    return job.returncode, requeued(folder), output


def python_on(gpus: int, cores: int) -> str:
    """In place of python: python on a node with so many GPUs, and so many cores for this job."""
    counts = f"*device_count*) echo {gpus} ;; *sched_getaffinity*) echo {cores} ;;"
    return f'#!/usr/bin/env bash\ncase "$*" in {counts} *) exec {sys.executable} "$@" ;; esac\n'


def ended(attempt: int, saved_step: int | None, exit_status: int | None, reason: str | None = None) -> dict:
    return {"attempt": attempt, "saved_step": saved_step, "exit_status": exit_status, "reason": reason}


NOTICE = "stopped by SIGTERM after step 9, which is saved"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "status", "again"),
    [
        (ended(1, 5, 75, NOTICE), None, 1, False),  # the job died before it opened the folder: an earlier job's state
        (ended(1, 5, 0), None, 1, False),
        (None, None, 1, False),
        (ended(1, 5, 75, NOTICE), ended(2, 9, 75, NOTICE), 0, True),
        (None, ended(1, 9, 75, NOTICE), 0, True),
        (ended(1, 5, 0), ended(2, 5, 0), 0, False),
        (ended(1, 5, 75), ended(2, 9, 75, "peer_lost: another rank exited"), 0, True),
        (ended(1, 5, 75), ended(2, 5, 75, "peer_lost: another rank exited"), 70, False),
        (ended(1, 5, 75), ended(2, 9, None), 0, True),  # killed, with a new checkpoint
        (ended(1, 5, 75), ended(2, 5, 1, "ValueError: two\nlines"), 70, False),
        (ended(1, 5, 75), ended(2, 5, 74, "disk full"), 74, False),
    ],
)
def test_only_the_state_of_this_job_decides(tiny, tmp_path, before, after, status, again):
    found, requeued_itself, output = state_after(tmp_path, tiny, before, after)
    assert (found, requeued_itself) == (status, again), output


@pytest.mark.slow
def test_notices_before_the_first_checkpoint_requeue_a_job_twice_in_a_row_at_most(tiny, tmp_path):
    ends = [ended(attempt, None, 75, "stopped by SIGTERM before the first step") for attempt in range(6)]
    outcomes = [state_after(tmp_path, tiny, ends[n], ends[n + 1])[:2] for n in range(3)]
    assert outcomes == [(0, True), (0, True), (70, False)]
    assert state_after(tmp_path, tiny, ends[3], ended(4, 7, 75, NOTICE))[:2] == (0, True)  # a checkpoint: counts anew
    assert state_after(tmp_path, tiny, ended(4, 7, 75), ended(5, 7, 75, NOTICE))[:2] == (0, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "processes"),
    [({"SLURM_GPUS_ON_NODE": "4"}, "12"), ({}, "9"), ({"SLURM_GPUS_ON_NODE": "", "SLURM_GPUS_PER_NODE": "a100:4"}, "9")],
)
def test_processes_are_the_nodes_times_the_gpus_that_slurm_or_torch_counts(tiny, tmp_path, variables, processes):
    """And words with spaces arrive as they are."""
    (tmp_path / "folder").write_text(str(run_of(tiny)))
    settings = ["--run.name", "two words", "--batch.global_batch_size", "72", *tiny]
    job = start(tmp_path, settings, variables | {"SLURM_NNODES": "3"}, accelerate=ACCELERATE, python=python_on(gpus=3, cores=9))
    output, _ = job.communicate(timeout=120)
    words = (tmp_path / "arguments").read_text().splitlines()
    assert words[words.index("--num_processes") + 1] == processes and "two words" in words, output
    assert words[words.index("--main_process_ip") + 1] == "127.0.0.1"


def test_a_node_without_gpus_is_refused_before_the_launch(tiny, tmp_path):
    job = start(tmp_path, tiny, {}, accelerate=ACCELERATE, python=python_on(gpus=0, cores=9))
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 2 and "no GPU" in output and not (tmp_path / "arguments").exists(), output


def test_a_node_with_fewer_cores_than_gpus_is_refused_before_the_launch(tiny, tmp_path):
    """On many clusters a job gets one core unless it asks for more, and all ranks of a node would share it."""
    (tmp_path / "folder").write_text(str(run_of(tiny)))
    job = start(tmp_path, tiny, {"SLURM_GPUS_ON_NODE": "4"}, accelerate=ACCELERATE, python=python_on(gpus=4, cores=3))
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 2 and "--cpus-per-task" in output and not (tmp_path / "arguments").exists(), output
    assert not requeued(tmp_path)


def test_the_cores_of_the_job_are_requested_again_for_its_tasks(tiny, tmp_path):
    (tmp_path / "folder").write_text(str(run_of(tiny)))
    noting = SRUN.replace(
        "export SLURM_NODEID=0", 'export SLURM_NODEID=0\necho "${SRUN_CPUS_PER_TASK:-none}" > "$SLURM_TEST/cores"'
    )
    for given, passed_on in (({"SLURM_CPUS_PER_TASK": "48"}, "48"), ({}, "none")):
        job = start(tmp_path, tiny, {"SLURM_GPUS_ON_NODE": "2", **given}, accelerate=ACCELERATE, srun=noting)
        job.communicate(timeout=120)
        assert (tmp_path / "cores").read_text().strip() == passed_on


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_finished_run_is_not_requeued(tiny, tmp_path):
    job = start(tmp_path, tiny)
    output, _ = job.communicate(timeout=180)
    assert job.returncode == 0 and not requeued(tmp_path), output
    assert "ranks 2 x" in output and records(run_of(tiny))[-1]["step"] == 20


@pytest.mark.slow
@pytest.mark.timeout(400)
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


@pytest.mark.slow
def test_wrong_settings_are_refused_before_srun_starts(tiny, tmp_path):
    job = start(tmp_path, ["--optimizr.lr", "1", *tiny])
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2 and "did you mean optimizer" in output and not (tmp_path / "srun.pid").exists()
