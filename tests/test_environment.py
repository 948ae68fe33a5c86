"""environment.json holds the environment of every start that made steps of the run, and no secrets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types

import pytest
import torch

from pretrain.data.tokenizer import Tokenizer
from pretrain.generate import generate, stream_text
from pretrain.interop.load import open_run
from pretrain.interop.weights import load_transformer
from pretrain.report import environment
from pretrain.report.records import read_records
from tests.models import train_here
from tests.ranks import run_ranks
from tests.test_preflight import World, made  # noqa: F401 (a fixture)


def test_only_allowed_variables_are_kept(monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "HOME"):
        monkeypatch.setenv(name, "canary-canary")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = environment.here()
    assert "canary" not in json.dumps(found) and found["variables"]["OMP_NUM_THREADS"] == "3"
    assert not [name for name in environment.VARIABLES if any(word in name for word in ("KEY", "TOKEN", "SECRET", "PASS"))]
    assert found["versions"]["torch"] and found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_the_git_state_is_the_commit_and_whether_files_changed_since(tmp_path):
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


def test_the_start_that_made_a_step_is_found_and_abandoned_starts_are_dropped():
    content: dict = {}
    for step, ranks in ((0, 1), (20, 2), (40, 4), (30, 8)):
        content = environment.with_start(content, {"model": {}}, {"step": step, "world_size": ranks})
    assert [start["step"] for start in content["starts"]] == [0, 20, 30]
    found = [environment.start_of_step(content, step).get("world_size") for step in (1, 20, 21, 30, 31, 99)]
    assert found == [1, 1, 2, 2, 8, 8]
    assert environment.start_of_step({}, 1) == {}
    assert [start["step"] for start in environment.with_start(content, {}, {"step": 0})["starts"]] == [0]


def test_a_run_writes_its_environment(made, tmp_path):  # noqa: F811
    world = World(made, tmp_path)
    world.flags |= {"train.max_steps": 4, "schedule.warmup_steps": 0, "engine.precision": "fp32"}
    assert train_here(world.argv()) == 0
    kept = environment.read(tmp_path / "runs" / "run")
    assert kept["starts"][0]["world_size"] == 1 and kept["starts"][0]["precision"] == "fp32"
    assert kept["data"]["seals"]["train"]["num_documents"] == 500 and "block_checksums" not in kept["data"]["seals"]["train"]
    assert kept["model"]["total"] > 0 and kept["model"]["settings"]["vocab_size"] == 320 and kept["total_steps"] == 4


WRITERS = [("fsdp2", False), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("ddp", False), ("zero1", False),
           ("zero3", False), ("zero3", True), ("fsdp2", True)))]  # fmt: skip


@pytest.mark.parametrize("engine,tied", WRITERS)
def test_samples_at_validations_equal_those_of_the_checkpoint_and_change_no_weight(made, tmp_path, engine, tied):  # noqa: F811
    world, prompts = World(made, tmp_path), ["the of", "is"]
    world.flags |= {"train.max_steps": 6, "schedule.warmup_steps": 0, "optimizer.lr": 0.01, "engine.name": engine}
    world.flags |= {"evaluate.every_steps": 3, "checkpoint.every_steps": 3, "model.tie_word_embeddings": tied}
    silent = world.argv()
    world.flags |= {"evaluate.sample_prompts": json.dumps(prompts), "evaluate.sample_tokens": 12}
    assert set(run_ranks(2, train_here, world.argv())) == {0}
    assert set(run_ranks(2, train_here, [*silent, "--run.name", "silent"])) == {0}
    runs = tmp_path / "runs"
    assert environment.read(runs / "run")["starts"][0]["world_size"] == 2
    written = {record["step"]: record["generated"] for record in read_records(runs / "run") if "generated" in record}
    assert list(written) == [3, 6] and all(each["text"] for each in written[6])
    tokenizer = Tokenizer.load(world.tokenizer)
    for step, samples in written.items():
        model = load_transformer(open_run(runs / "run", step).weights)
        for prompt, each in zip(prompts, samples, strict=True):
            ids = [tokenizer.end_of_document_id, *tokenizer.encode(prompt)]
            new = generate(model, ids, 12, temperature=0, stop_ids={tokenizer.end_of_document_id})
            assert each == {"prompt": prompt, "text": "".join(stream_text(tokenizer.decode, ids, new))}
    loud, silent = (load_transformer(open_run(runs / name, 6).weights).state_dict() for name in ("run", "silent"))
    assert all(torch.equal(loud[name], silent[name]) for name in silent)


SMI = """#!/bin/sh
echo "$@" > "$SMI_ARGUMENTS"
%s
"""


@pytest.mark.parametrize(
    ("answer", "known"),
    [
        ("echo '570.86.10, 650.00'", {"driver": "570.86.10", "power_limit_watts": 650.0}),
        ("echo '570.86.10, [N/A]'", {"driver": "570.86.10"}),
        ("echo 'No devices were found'", {}),
        ("exit 9", {}),
        ("exec sleep 60", {}),
        (None, {}),
    ],
)
def test_driver_and_power_limit_are_those_that_nvidia_smi_knows(monkeypatch, tmp_path, answer, known):
    """It may be missing, fail, or hang on a machine with a broken driver."""
    monkeypatch.setattr(environment, "_SMI_SECONDS", 1.0 if answer == "exec sleep 60" else 30.0)
    monkeypatch.setenv("SMI_ARGUMENTS", str(tmp_path / "arguments"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if answer else str(tmp_path))
    if answer:
        (tmp_path / "nvidia-smi").write_text(SMI % answer)
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert environment._smi("3f2a-77") == known
    assert answer is None or "--id=GPU-3f2a-77" in (tmp_path / "arguments").read_text()


def test_what_figures_of_a_gpu_depend_on_is_kept(monkeypatch):
    gpu = types.SimpleNamespace(uuid="3f2a-77")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "nccl", types.SimpleNamespace(version=lambda: (2, 29, 3)))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    monkeypatch.setattr(environment, "_smi", lambda uuid: {"driver": uuid})
    assert environment.of_gpu(0) == {"cuda": "13.0", "cudnn": 92000, "nccl": "2.29.3", "driver": "3f2a-77"}
