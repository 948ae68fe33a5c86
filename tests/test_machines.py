"""Two machines, each with a launcher of its own: they train together, or all refuse with the same reason. Both are this one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import load
from pretrain.engines.place import LAUNCHER
from pretrain.run.agreement import facts
from pretrain.run.parts import open_parts
from pretrain.run.processes import free_port
from tests.test_train import ROOT, curve, run_of


def facts_of(argv: list[str]) -> dict[str, str]:
    config = load(argv)
    return facts(config, open_parts(config), run_of(argv))


def differing(a: list[str], b: list[str]) -> set[str]:
    one, other = facts_of(a), facts_of(b)
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def token_files(folder: Path, seed: int, length: int = 4000) -> list[str]:
    """Settings for a flat token file in `folder`."""
    folder.mkdir()
    np.random.default_rng(seed).integers(0, 64, length, dtype=np.uint16).tofile(folder / "flat.bin")
    return ["--data.synthetic", "null", "--data.train", f"[{{path: {folder / 'flat.bin'}}}]"]


# ---------------------------------------------------------------- what must be equal


def test_settings_that_change_a_run_must_be_equal_and_paths_need_not(tiny, tmp_path):
    for key, value in (("optimizer.lr", "3e-4"), ("run.seed", "5"), ("engine.name", "fsdp2"), ("batch.micro_batch_size", "1"),
                       ("schedule.warmup_steps", "1"), ("log.every_steps", "2"), ("run.name", "other"),
                       ("evaluate.every_steps", "0"), ("checkpoint.every_steps", "3"), ("model.num_hidden_layers", "1"),
                       ("engine.precision", "bf16"), ("train.max_steps", "21")):  # fmt: skip
        assert differing(tiny, [f"--{key}", value, *tiny]) == {key}
    assert differing(tiny, [*tiny[:-1], str(tmp_path / "another mount")]) == set()
    assert differing(tiny, ["--engine.precision", "fp32", *tiny]) == set()  # what null means here


def test_data_are_compared_by_content(tiny, tmp_path):
    first, other = (token_files(tmp_path / name, seed) for name, seed in (("first", 0), ("other", 1)))
    shorter = token_files(tmp_path / "shorter", 0, 3000)
    copy = token_files(tmp_path / "copy", 0)
    assert differing([*first, *tiny], [*copy, *tiny]) == set()
    for another in (other, shorter):
        assert differing([*first, *tiny], [*another, *tiny]) == {"data.train[0]"}
    twice = [*first[:3], first[3].replace("[", "[{path: " + str(tmp_path / "copy" / "flat.bin") + "}, ")]
    assert differing([*first, *tiny], [*twice, *tiny]) == {"data.train[1]"}


def test_pretrained_weights_are_compared_by_content(tmp_path):
    from pretrain.run.agreement import weights_digest

    for name, value in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        content = bytes(10**6) + bytes([value]) * 10**6
        (tmp_path / name / "model.safetensors").write_bytes(content)
    digests = [weights_digest(tmp_path / name) for name in ("a", "b", "c", "missing")]
    assert digests[0] == digests[1] != digests[2] and digests[3] == "not there"


def test_code_and_libraries_are_compared(tiny, monkeypatch):
    before = facts_of(tiny)
    assert "version of torch" in before and "code pretrain/train.py" in before
    monkeypatch.setattr("pretrain.run.agreement.metadata.version", lambda name: "0.1")
    changed = {key for key, value in facts_of(tiny).items() if before[key] != value}
    assert "version of torch" in changed and all(key.startswith("version of ") for key in changed)


# ---------------------------------------------------------------- two launchers


class Machines:
    """Launches of the same command on machines that differ in some flags, folders or variables."""

    def __init__(self, folder: Path):
        self.folder, self.jobs, self.port = folder, [], free_port()

    def start(self, settings: list[str], *, rank: int, processes: int = 2, cwd: Path = ROOT, **variables: str) -> None:
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        launch += ["--config_file", str(ROOT / "launch/accelerate/machines.yaml"), "--num_machines", "2"]
        launch += ["--num_processes", str(processes), "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
        launch += ["--main_process_port", str(self.port), "launch/pretrain.py", *settings]
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER} | variables
        output = open(self.folder / f"output_{len(self.jobs)}", "w+")
        self.jobs.append((subprocess.Popen(launch, cwd=cwd, env=environment, stdout=output, stderr=output), output))

    def end(self, timeout: float = 200) -> list[str]:
        """What each machine printed."""
        said, deadline = [], time.monotonic() + timeout
        for job, output in self.jobs:
            try:
                job.wait(max(1, deadline - time.monotonic()))
            finally:
                job.terminate()
            output.seek(0)
            said.append(output.read())
        return said


def state_of(settings: list[str]) -> dict:
    return json.loads((run_of(settings) / "run_state.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_machines_with_different_numbers_of_processes_train_as_one(tiny, tmp_path):
    """Three processes in all: accelerate wants the number of machines times the processes of this one."""
    tiny = ["--batch.global_batch_size", "6", *tiny]
    machines = Machines(tmp_path)
    machines.start(tiny, rank=0, processes=4)
    machines.start([*tiny[:-1], os.path.relpath(tiny[-1], ROOT)], rank=1, processes=2)  # another path to the same folder
    said = machines.end()
    assert state_of(tiny)["status"] == "done", said
    assert "ranks 3 x" in said[0]
    assert len(curve(run_of(tiny))) > 20


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--optimizer.lr", "0.5"], ["optimizer.lr", "0.01", "0.5"]),
        (["--engine.name", "zero1"], ["engine.name", "fsdp2", "zero1"]),
        (["--model.num_hidden_layers", "3"], ["model.num_hidden_layers"]),
        (["--optimizr.lr", "0.5"], ["optimizr"]),
        (["--data.synthetic", "null", "--data.train", "[{path: nowhere}]"], ["nowhere"]),
        (["--run.directory", "{tmp}/own disk"], ["run.directory", "own disk"]),
    ],
)
def test_what_differs_on_the_second_machine_ends_both_with_2(tiny, tmp_path, flags, named):
    tiny = ["--engine.name", "fsdp2", *tiny]
    machines, began = Machines(tmp_path), time.monotonic()
    machines.start(tiny, rank=0)
    machines.start([*tiny, *(flag.replace("{tmp}", str(tmp_path)) for flag in flags)], rank=1)
    said = machines.end()
    assert time.monotonic() - began < 120
    assert state_of(tiny)["exit_status"] == 2 and state_of(tiny)["saved_step"] is None
    for output in [*said, state_of(tiny)["reason"]]:
        assert all(word in output for word in [*named, "rank 1"] if output is not said[1] or word != "rank 1"), output


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_other_code_on_the_second_machine_is_named(tiny, tmp_path):
    other = tmp_path / "checkout"
    for name in ("pretrain", "launch"):
        shutil.copytree(ROOT / name, other / name, ignore=shutil.ignore_patterns("__pycache__"))
    with open(other / "pretrain" / "optim" / "schedule.py", "a") as file:
        file.write("# an edit that was not committed\n")
    machines = Machines(tmp_path)
    machines.start(tiny, rank=0)
    machines.start(tiny, rank=1, cwd=other)
    said = machines.end()
    assert state_of(tiny)["exit_status"] == 2, said
    assert all("pretrain/optim/schedule.py" in output and "optimizer.lr" not in output for output in said)
