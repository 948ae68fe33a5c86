"""The folder of a run: one job at a time, and its state on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from pretrain.run.directory import Locked, RunDirectory


def test_a_folder_serves_one_job_and_a_dead_job_frees_it(tmp_path):
    first = RunDirectory(tmp_path / "r")
    with pytest.raises(Locked, match=f"in use by process {os.getpid()} on"):
        RunDirectory(tmp_path / "r")
    del first
    code = f"""
import os, pathlib
from pretrain.run.directory import RunDirectory
RunDirectory(pathlib.Path({str(tmp_path / "r")!r}))
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    RunDirectory(tmp_path / "r")


def test_the_state_file_is_replaced_completely(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_state("running")
    directory.write_state("stopped", exit_status=75, step=7, reason="why")
    state = json.loads((tmp_path / "run_state.json").read_text())
    assert (state["status"], state["exit_status"], state["step"], state["reason"]) == ("stopped", 75, 7, "why")
    assert {path.name for path in tmp_path.iterdir()} == {"run_state.json", "run.lock"}


def test_a_start_removes_the_unfinished_writes_of_killed_jobs_and_nothing_else(tmp_path):
    for name in (".run_state.json.7.tmp", ".config.yaml.8.tmp", "notes.tmp", "metrics.jsonl"):
        (tmp_path / name).write_text("x")
    RunDirectory(tmp_path, silent=True)
    assert (tmp_path / ".config.yaml.8.tmp").exists()
    RunDirectory(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "notes.tmp", "run.lock"]
