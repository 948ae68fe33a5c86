"""The supervisor, with the real launcher and two ranks, restarts what should be restarted and leaves no process behind."""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pretrain.run.directory import RunDirectory
from tests.ranks import run_ranks
from tests.test_docs import fences
from tests.test_train import ROOT, curve, records, run_of, train_here

LAUNCH = ["--config_file", "launch/accelerate/cpu.yaml", "--main_process_port", "0"]


def tail(path: Path) -> bytes:
    """The last lines: the file of a long run has megabytes, and waiting for it must not slow the run down."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16))
        return file.read()


class Job:
    """A supervisor under test."""

    def __init__(self, settings: list[str], flags: list[str] = LAUNCH):
        self.run, command = run_of(settings), [sys.executable, "launch/supervise.py", *flags, "--", *settings]
        self.run.parent.mkdir(exist_ok=True)
        self.output = open(self.run.parent.with_suffix(".log"), "w+")
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True)
        atexit.register(self.process.terminate)  # a failed test leaves no job running
        self.family: set[psutil.Process] = set()

    def wait_for(self, step: int, seconds: float = 90) -> None:
        """Waits until metrics.jsonl holds `step`."""
        metrics, deadline = self.run / "metrics.jsonl", time.monotonic() + seconds
        while not (metrics.exists() and f'"step": {step},'.encode() in tail(metrics)):
            assert time.monotonic() < deadline and self.process.poll() is None, self.said()
            time.sleep(0.005)
        self.family = set(psutil.Process(self.process.pid).children(recursive=True))

    def workers(self) -> list[psutil.Process]:
        """The ranks."""
        return sorted(
            (p for p in self.family if "-u" in p.cmdline() and any(w.endswith("launch/pretrain.py") for w in p.cmdline())),
            key=lambda process: int(process.environ().get("RANK", 0)),
        )

    def launcher(self) -> psutil.Process:
        return next(process for process in self.family if process.ppid() == self.process.pid)

    def end(self, timeout: float = 120) -> int:
        """Returns the exit status, and checks that no process is left."""
        status = self.process.wait(timeout)
        assert not [process for process in self.family if process.is_running()]
        return status

    def said(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def state(self) -> dict:
        return json.loads((self.run / "run_state.json").read_text())


@pytest.mark.slow
def test_a_killed_rank_and_a_killed_launcher_are_restarted_and_no_step_differs(tiny):
    tiny = ["--train.max_steps", "160", "--checkpoint.every_steps", "8", *tiny]
    job = Job(tiny)
    job.wait_for(20)
    job.workers()[1].kill()
    job.wait_for(60)
    job.launcher().kill()  # its workers notice and save; the supervisor waits for them
    assert job.end() == 0, job.said()
    assert job.said().count("restarting in 1 s") == 2 and "peer_lost" in job.said()
    assert (job.state()["status"], job.state()["attempt"], job.state()["saved_step"]) == ("done", 3, 160)
    assert run_ranks(2, train_here, [*tiny, "--run.name", "straight"]) == [0, 0]
    assert curve(job.run) == curve(run_of(tiny, "straight"))


@pytest.mark.slow
@pytest.mark.parametrize(("numbers", "status"), [([signal.SIGTERM], 75), ([signal.SIGUSR2], 75), ([signal.SIGINT] * 2, 130)])
def test_signals_reach_the_job_and_end_the_supervisor(tiny, numbers, status):
    job = Job(["--train.max_steps", "5000", *tiny])
    job.wait_for(10)
    for number in numbers:
        job.process.send_signal(number)
        time.sleep(0.05)
    assert job.end() == status, job.said()
    assert job.state()["exit_status"] == status and "restarting in" not in job.said()


@pytest.mark.slow
def test_a_killed_supervisor_leaves_no_process_and_a_checkpoint(tiny):
    job = Job(["--train.max_steps", "5000", *tiny])
    job.wait_for(10)
    job.process.kill()
    _, alive = psutil.wait_procs(job.family, timeout=30)
    assert not alive
    state = job.state()
    assert (state["exit_status"], state["step"]) == (75, state["saved_step"])


@pytest.mark.slow
def test_a_crash_loop_ends_with_70_and_stays_refused_until_forced(tiny):
    """Collectives that may take a millisecond: every attempt loses its peer before the first checkpoint."""
    never = ["--engine.timeout_seconds", "0.001", *tiny]
    job = Job(never)
    assert job.end(300) == 70, job.said()
    assert "restarting in 4 s (1 of 3" in job.said() and "restarting in 16 s (2 of 3" in job.said()
    assert job.state()["reason"].startswith("crash_loop: 3 attempts in a row ended without a new checkpoint")
    again = Job(tiny)
    assert again.end() == 70 and "start with --force" in again.said()
    forced = Job(tiny, ["--force", *LAUNCH])
    assert forced.end() == 0, forced.said()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["--optimizr.lr", "1"], "did you mean optimizer"),  # detected by the supervisor itself
        pytest.param(["--batch.global_batch_size", "2"], "the nearest is 4", marks=pytest.mark.slow),  # detected by the ranks
    ],
)
def test_refused_settings_end_with_2_without_a_retry(tiny, settings, said):
    job = Job([*settings, *tiny])
    assert job.end() == 2
    assert said in job.said() and "restarting in" not in job.said()


def test_a_folder_in_use_ends_with_73(tiny):
    held = RunDirectory(run_of(tiny))
    job = Job(tiny)
    assert job.end() == 73 and f"is in use by process {os.getpid()}" in job.said()
    del held


def test_several_machines_without_a_number_are_refused(tiny):
    for flags in (["--num_machines", "2"], ["--num_machines=2"], ["--config_file", "launch/accelerate/machines.yaml"]):
        job = Job(tiny, flags)
        assert job.end() == 2 and "--machine_rank" in job.said() and "--main_process_ip" in job.said()


def test_launcher_settings_that_cannot_be_read_and_a_folder_that_cannot_be_made_are_refused(tiny, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").touch()  # a file where the folder must be
    for text in ("", "a: [", "num_machines: [2]"):
        (tmp_path / "launcher.yaml").write_text(text)
        job = Job(tiny, ["--config_file", str(tmp_path / "launcher.yaml")])
        assert job.end() == 2 and "cannot be written" in job.said()


SCRIPTED = """
import sys; sys.path.insert(0, "launch")
import supervise
from pretrain.run.directory import RunDirectory
class Scripted(supervise.Supervisor):
    def _attempt(self, order):
        saved, status = script.pop(0)
        RunDirectory(self.folder).set_start(saved, saved)
        return status, "scripted"
supervise.team.back_off_seconds = lambda failures: print(failures) or 0
run = Scripted(supervise.load(sys.argv[1:]), [], [])
"""


@pytest.mark.parametrize(
    ("script", "status", "failures"),
    [
        (
            "[(200, 75), (120, 75), (140, 75), (160, 75), (180, 0)]",
            0,
            "0 1 0 0",
        ),  # step 200 was lost, but each later attempt makes progress
        ("[(200, 75), (200, 1), (200, None), (200, None)]", 70, "0 1 2"),
    ],
)
def test_a_crash_loop_is_three_attempts_in_a_row_without_progress(tiny, script, status, failures):
    code = f"{SCRIPTED}\nscript = {script}\nsys.exit(run.run())"
    done = subprocess.run([sys.executable, "-c", code, *tiny], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (status, failures.split()), done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)  # a slow machine takes more than two minutes
def test_the_rehearsal_in_the_documents_survives_the_loss_of_all_processes_and_of_the_folder(tmp_path):
    name = f"rehearsal-{os.getpid()}"
    first, second = (each for each in fences(ROOT / "docs" / "running.md", "bash") if "rehearsal" in each)
    manifests = tmp_path / "mirror" / name / "checkpoints" / "step_*" / "manifest.json"
    until_saved = f"until compgen -G '{manifests}'; do sleep 0.1; done"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        here = f"127.0.0.1 --main_process_port {probe.getsockname()[1]}"
    first, second = (each.replace("rehearsal", name).replace("127.0.0.1", here) for each in (first, second))
    first = first.replace("/tmp/mirror", f"{tmp_path}/mirror").replace("--run.name", "--train.max_steps 60 --run.name")
    first = first.replace("every_steps 10", "every_steps 1")  # a fast machine is not done before it is killed
    script = f"{first}\n{until_saved}\n{second}"
    for each in ("launch", "configs", "pretrain"):
        (tmp_path / each).symlink_to(ROOT / each)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash"], input=script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.stderr.count("the run ended with status 0") == 2, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r" +\d  20", line)]
    assert [row[-2] for row in rows] == ["killed", "0"] and int(rows[1][-5]) >= 1, done.stdout
    steps = [record["step"] for record in records(tmp_path / "runs" / name) if "grad_norm" in record]
    assert steps == [1, *range(10, 61, 10)]


def test_its_last_words_say_why_the_run_ended(tiny):
    """After the traceback that launchers print for every end but a good one."""
    for status in (2, 76):
        code = f"{SCRIPTED}\nscript = [(5, {status})]\nsys.exit(run.run())"
        done = subprocess.run([sys.executable, "-c", code, *tiny], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status
        assert done.stderr.splitlines()[-2:] == ["supervise: scripted", f"supervise: the run ended with status {status}"]


REPORTING = """
import sys; sys.path.insert(0, "launch")
import supervise
reports = []
def machine_0(report):
    reports.append(report["record"]["failures"])
    run._closed = len(reports) == len(records)
    attempt, failures = records[len(reports) - 1]
    return {"do": "wait", "record": {"attempt": attempt, "failures": failures, "best": 0}}
run = supervise.Supervisor(supervise.load(sys.argv[1:]), [], [], supervise.Machines(count=2, number=1))
run._exchange, records = machine_0, [(2, 1), (2, 2), (0, 0), (3, 0), (3, 0)]
supervise.team.POLL_SECONDS = 0
run._report_and_obey(None)
print(*reports)
"""


def test_a_supervisor_remembers_for_a_new_machine_0_what_the_last_one_knew(tiny):
    done = subprocess.run([sys.executable, "-c", REPORTING, *tiny], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["0", "1", "2", "2", "0"], done.stderr


def test_without_settings_it_prints_its_help():
    done = subprocess.run([sys.executable, "launch/supervise.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "launch/supervise.py [flags] [accelerate flags] --" in done.stdout
    done = subprocess.run([sys.executable, "launch/supervise.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "crash loop" in done.stdout
