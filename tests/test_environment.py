"""What a run was made with is kept, starts of abandoned branches go, and no secret gets in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.config import load
from pretrain.report import environment
from pretrain.train import train
from tests.ranks import run_ranks
from tests.test_preflight import World, made  # noqa: F401 (a fixture)


def test_only_variables_of_the_list_are_kept(monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "HOME"):
        monkeypatch.setenv(name, "canary-canary")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = environment.here()
    assert "canary" not in json.dumps(found) and found["variables"]["OMP_NUM_THREADS"] == "3"
    assert not [name for name in environment.VARIABLES if any(word in name for word in ("KEY", "TOKEN", "SECRET", "PASS"))]
    assert found["versions"]["torch"] and found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_the_commit_and_whether_something_is_not_committed(tmp_path):
    assert environment.git_state(tmp_path) is None
    alone = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*words: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *names, *words], cwd=tmp_path, check=True, capture_output=True, text=True, env=alone
        ).stdout

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "--no-verify", "-m", "one")
    assert environment.git_state(tmp_path) == {"commit": git("rev-parse", "HEAD").strip(), "dirty": False}
    (tmp_path / "a").write_text("2")
    assert environment.git_state(tmp_path)["dirty"] is True


def test_the_start_that_made_a_step_is_found_and_abandoned_ones_go():
    content: dict = {}
    for step, ranks in ((0, 1), (20, 2), (40, 4), (30, 8)):
        content = environment.with_start(content, {"model": {}}, {"step": step, "world_size": ranks})
    assert [start["step"] for start in content["starts"]] == [0, 20, 30]
    found = [environment.start_of_step(content, step).get("world_size") for step in (1, 20, 21, 30, 31, 99)]
    assert found == [1, 1, 2, 2, 8, 8]
    assert environment.start_of_step({}, 1) == {}
    assert [start["step"] for start in environment.with_start(content, {}, {"step": 0})["starts"]] == [0]


def train_here(flags: list[str]) -> int:
    return train(load(flags, world_size=int(os.environ.get("WORLD_SIZE", 1))))


@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero1", marks=pytest.mark.slow)])
def test_a_run_keeps_what_it_was_made_with_and_writes_at_validations(made, tmp_path, engine):  # noqa: F811
    world = World(made, tmp_path)
    world.flags |= {"train.max_steps": 4, "schedule.warmup_steps": 0, "evaluate.every_steps": 2, "engine.name": engine}
    world.flags |= {"evaluate.sample_prompts": "[the of, is that]", "evaluate.sample_tokens": 5}
    assert set(run_ranks(2, train_here, world.argv())) == {0}
    run = Path(tmp_path / "runs" / "run")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    written = [
        (record["step"], [each["prompt"] for each in record["generated"]]) for record in records if "generated" in record
    ]
    assert written == [(2, ["the of", "is that"]), (4, ["the of", "is that"])]
    assert all(len(each["text"]) <= 60 for record in records for each in record.get("generated", []))
    kept = environment.read(run)
    assert kept["starts"][0]["world_size"] == 2 and kept["starts"][0]["precision"] == "fp32"
    assert kept["data"]["seals"]["train"]["num_documents"] == 500 and "block_checksums" not in kept["data"]["seals"]["train"]
    assert kept["model"]["total"] > 0 and kept["model"]["settings"]["vocab_size"] == 320 and kept["total_steps"] == 4
