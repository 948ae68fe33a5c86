"""A supervised run with random faults for `SOAK_MINUTES` (30): signals that kill, stop or end ranks and launchers.

make test-soak [SOAK_MINUTES=5]
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time

import pytest

from tests.ranks import run_ranks
from tests.test_supervise import Job, tail
from tests.test_train import TINY, curve, final_bytes, run_of, train_here

SECONDS, MEAN_SECONDS_TO_FAULT = 60 * float(os.environ.get("SOAK_MINUTES", 30)), 15
FAULTS = {
    "a rank is killed": ("rank", signal.SIGKILL),
    "a rank is stopped": ("rank", signal.SIGSTOP),
    "a rank gets SIGTERM": ("rank", signal.SIGTERM),
    "the launcher is killed": ("launcher", signal.SIGKILL),
    "the launcher gets SIGTERM": ("launcher", signal.SIGTERM),
}
STEP_LINE = re.compile(r"^[-\d]+ [:\d]+ +([\d,]+)/[\d,]+ ", re.MULTILINE)


def last_step(job: Job) -> int:
    return json.loads(tail(job.run / "metrics.jsonl").splitlines()[-1])["step"]


@pytest.mark.soak
@pytest.mark.timeout(4 * SECONDS + 600)
def test_a_run_with_faults_equals_a_run_without_faults(tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(TINY)
    tiny = ["--train.max_steps", "1000000", "--schedule.name", "constant"]
    tiny += ["--checkpoint.every_steps", "50", "--evaluate.every_steps", "100"]
    tiny += ["--engine.timeout_seconds", "10", "--checkpoint.deadline_seconds", "5"]
    tiny += ["--config", str(tmp_path / "tiny.yaml"), "--run.directory", str(tmp_path / "runs")]
    draw, counts, end = random.Random(0), dict.fromkeys(FAULTS, 0), time.monotonic() + SECONDS
    job, reached = Job(tiny), 0
    while time.monotonic() < end:
        job.wait_for(reached + 60, 600)  # beyond the next checkpoint, so that every attempt makes progress
        time.sleep(min(draw.expovariate(1 / MEAN_SECONDS_TO_FAULT), 60))
        fault, reached = draw.choice(list(FAULTS)), last_step(job)
        who, number = FAULTS[fault]
        (draw.choice(job.workers()) if who == "rank" else job.launcher()).send_signal(number)
        counts[fault] += 1
    job.wait_for(reached + 60, 600)
    (job.run / "STOP").touch()  # it saves at its current step
    assert job.end() == 130, job.said()
    (job.run / "STOP").unlink()
    steps = job.state()["saved_step"]

    straight = [*tiny[:-4], "--train.max_steps", str(steps), "--run.name", "straight", *tiny[-4:]]
    assert run_ranks(2, train_here, straight, timeout=2 * SECONDS + 120) == [0, 0]
    expected = [record for record in curve(run_of(tiny, "straight")) if record["step"] < steps or "val_loss" not in record]
    assert [record for record in curve(job.run) if record["step"] < steps or "val_loss" not in record] == expected
    assert final_bytes(job.run) == final_bytes(run_of(tiny, "straight"))
    made = STEP_LINE.findall((job.run / "console.log").read_text())
    unique = len(set(made)) / len(made)
    with capsys.disabled():
        print(f"\n{SECONDS / 60:.0f} minutes, {steps} steps, {unique:.3f} of them taken once; {counts}")
    assert unique >= 0.9
