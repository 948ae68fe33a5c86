"""The SLURM script, with stand-ins for SLURM's own commands, starts the run and requeues itself when it should."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_train import ROOT, records, run_of

# One task per node, all of them here; srun's status is the highest of its tasks.
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do echo "$1" >> "$SLURM_TEST/srun_flags"; shift; done
export SLURM_STEP_NUM_NODES="$SLURM_NNODES" SLURM_STEP_NODELIST="$SLURM_JOB_NODELIST" SLURM_LOCALID=0
for ((node = 0; node < ${SLURM_TEST_TASKS:-1}; node++)); do
  SLURM_NODEID=$node SLURM_PROCID=$node "$@" &
  echo $! >> "$SLURM_TEST/tasks"
done
highest=0
while read -r task; do
  wait "$task" || { status=$?; highest=$((status > highest ? status : highest)); }
done < "$SLURM_TEST/tasks"
exit "$highest"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$SLURM_TEST/requests"
"""
NODES = {"SLURM_JOB_NODELIST": "node1", "SLURM_NNODES": "1"}
# In place of the supervisor: notes its arguments, then ends as $SLURM_TEST/status and $SLURM_TEST/end say.
SUPERVISOR = f"""#!/usr/bin/env bash
[[ $1 == launch/supervise.py ]] || exec {sys.executable} "$@"
printf '%s\\n' "$@" > "$SLURM_TEST/arguments"
[ ! -f "$SLURM_TEST/end" ] || cp "$SLURM_TEST/end" "$(cat "$SLURM_TEST/folder")/run_state.json"
exit "$(cat "$SLURM_TEST/status" 2> /dev/null || echo 1)"
"""


def start(folder: Path, settings: list[str], variables: dict[str, str] | None = None, **programs: str) -> subprocess.Popen:
    """Starts the script on one node, with two processes unless `variables` say otherwise; `programs` replace the real ones."""
    (folder / "tasks").unlink(missing_ok=True)
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


def job_after(folder: Path, settings: list[str], before: int | None, after: int | None, status: int) -> tuple[int, bool, str]:
    """(exit status, requeued?, output) of a job that finds a checkpoint of step `before` and leaves one of step `after`, and
    whose supervisors end with `status`. None: no run_state.json."""
    run = run_of(settings)
    run.mkdir(parents=True, exist_ok=True)
    (folder / "requests").unlink(missing_ok=True)
    (folder / "folder").write_text(str(run))
    (folder / "status").write_text(str(status))
    for step, path in ((before, run / "run_state.json"), (after, folder / "end")):
        path.unlink(missing_ok=True)
        if step is not None:
            path.write_text(json.dumps({"saved_step": step, "exit_status": 75}))
    job = start(folder, settings, python=SUPERVISOR)
    output, _ = job.communicate(timeout=120)
    return job.returncode, requeued(folder), output


def python_on(gpus: int, cores: int) -> str:
    """In place of python: python on a node with so many GPUs, and so many cores for this job."""
    counts = f"*device_count*) echo {gpus}; exit ;; *sched_getaffinity*) echo {cores}; exit ;;"
    return SUPERVISOR.replace("[[", f'case "$*" in {counts} esac\n[[', 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "supervisors", "status", "again"),
    [
        (5, None, 1, 1, False),  # the job died before it opened the folder, in which an earlier job left status 75
        (None, None, 127, 127, False),
        (5, None, 75, 0, True),  # a node did not come in time
        (5, 9, 75, 0, True),
        (None, 9, 75, 0, True),
        (5, 5, 0, 0, False),
        (5, 9, 137, 0, True),  # a supervisor was killed, with a new checkpoint
        (5, 5, 137, 137, False),
        (5, 9, 70, 70, False),
        (5, 9, 74, 74, False),
        (5, 9, 76, 76, False),  # the budget is spent
        (5, 9, 2, 2, False),
    ],
)
def test_the_status_of_the_supervisors_decides(tiny, tmp_path, before, after, supervisors, status, again):
    found, requeued_itself, output = job_after(tmp_path, tiny, before, after, supervisors)
    assert (found, requeued_itself) == (status, again), output


@pytest.mark.slow
def test_notices_before_the_first_checkpoint_requeue_a_job_twice_in_a_row_at_most(tiny, tmp_path):
    assert [job_after(tmp_path, tiny, None, None, 75)[:2] for _ in range(3)] == [(0, True), (0, True), (70, False)]
    assert job_after(tmp_path, tiny, None, 7, 75)[:2] == (0, True)  # a checkpoint: counts anew
    assert [job_after(tmp_path, tiny, 7, 7, 75)[:2] for _ in range(3)] == [(0, True), (0, True), (70, False)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "accepted"),
    [
        ({"SLURM_GPUS_ON_NODE": "4"}, True),
        ({}, True),  # SLURM does not say: torch does
        ({"SLURM_GPUS_ON_NODE": "", "SLURM_GPUS_PER_NODE": "a100:4"}, True),
        ({"SLURM_GPUS_ON_NODE": "(null)"}, True),
        ({"SLURM_GPUS_ON_NODE": "8"}, False),  # more than the job has cores
    ],
)
def test_gpus_are_those_that_slurm_or_torch_counts(tiny, tmp_path, variables, accepted):
    job = start(tmp_path, tiny, variables, python=python_on(gpus=3, cores=6))
    output, _ = job.communicate(timeout=120)
    assert (tmp_path / "arguments").exists() == accepted, output
    assert accepted or (job.returncode == 2 and "6 cores for 8 GPUs" in output and not requeued(tmp_path)), output


def test_words_and_flags_reach_the_supervisor_as_they_are_under_a_long_list_of_nodes(tiny, tmp_path):
    """1,024 names without a common part: 90 kB, of 128 that a variable may have."""
    names = ",".join(f"{number:x}-{'host' * 20}" for number in range(1024))
    settings = ["--force", "--", "--run.name", "two words", *tiny]
    job = start(tmp_path, settings, {"SLURM_JOB_NODELIST": names, "SLURM_NNODES": "1024", "SLURM_GPUS_ON_NODE": "1"},
                python=SUPERVISOR)  # fmt: skip
    output, _ = job.communicate(timeout=120)
    arguments = (tmp_path / "arguments").read_text().splitlines()
    split = arguments.index("--")
    assert "--force" in arguments[:split] and "--wait-seconds" in arguments[:split], output
    assert "--kill-on-bad-exit=0" in (tmp_path / "srun_flags").read_text()  # the others would be killed while they save
    assert arguments[split + 1 :] == ["--checkpoint.deadline_seconds", "110", "--run.name", "two words", *tiny]


def test_a_job_that_cannot_be_requeued_says_so_and_ends_with_75(tiny, tmp_path):
    (tmp_path / "status").write_text("75")
    job = start(tmp_path, tiny, python=SUPERVISOR, scontrol="#!/bin/sh\nexit 1\n")
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 75 and "submit the same command again" in output, output


def test_the_notice_is_long_enough_to_save():
    text = (ROOT / "launch/slurm.sh").read_text()
    notice, deadline = (int(re.search(found, text)[1]) for found in (r"--signal=TERM@(\d+)", r"deadline_seconds (\d+)"))
    assert notice >= deadline + 10


def test_a_node_without_gpus_is_refused_before_the_launch(tiny, tmp_path):
    job = start(tmp_path, tiny, {}, python=python_on(gpus=0, cores=9))
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 2 and "no GPU" in output and not (tmp_path / "arguments").exists(), output


def test_a_node_with_fewer_cores_than_gpus_is_refused_before_the_launch(tiny, tmp_path):
    """On many clusters a job gets one core unless it asks for more, and all ranks of a node would share it."""
    job = start(tmp_path, tiny, {"SLURM_GPUS_ON_NODE": "4"}, python=python_on(gpus=4, cores=3))
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 2 and "--cpus-per-task" in output and not (tmp_path / "arguments").exists(), output
    assert not requeued(tmp_path)


def test_the_cores_of_the_job_are_requested_again_for_its_tasks(tiny, tmp_path):
    noting = SRUN.replace("highest=0", 'echo "${SRUN_CPUS_PER_TASK:-none}" > "$SLURM_TEST/cores"\nhighest=0')
    for given, passed_on in (({"SLURM_CPUS_PER_TASK": "48"}, "48"), ({}, "none")):
        job = start(tmp_path, tiny, {"SLURM_GPUS_ON_NODE": "2", **given}, python=SUPERVISOR, srun=noting)
        job.communicate(timeout=120)
        assert (tmp_path / "cores").read_text().strip() == passed_on


TWO_NODES = {"SLURM_JOB_NODELIST": "127.0.0.[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_TEST_TASKS": "2"}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_finished_run_is_not_requeued(tiny, tmp_path):
    job = start(tmp_path, tiny, TWO_NODES)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0 and not requeued(tmp_path), output
    assert "ranks 2 x" in output and records(run_of(tiny))[-1]["step"] == 20


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_saves_and_requeues_itself_after_a_notice(tiny, tmp_path):
    job = start(tmp_path, ["--train.max_steps", "100000", *tiny], TWO_NODES)
    metrics, deadline = run_of(tiny) / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and '"step": 9,' in metrics.read_text()):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    for task in (tmp_path / "tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 0 and requeued(tmp_path), output
    assert "the job ended with status 75" in output


@pytest.mark.slow
def test_wrong_settings_are_refused_before_srun_starts(tiny, tmp_path):
    job = start(tmp_path, ["--optimizr.lr", "1", *tiny])
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2 and "did you mean optimizer" in output and not (tmp_path / "tasks").exists()
