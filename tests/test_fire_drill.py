"""The fire drill passes on this version and fails on versions with a planted bug."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.config import ParallelConfig, load
from tests.test_train import ROOT, TINY

DRILL = ["tools/fire_drill.py", "--model.vocab_size", "64", "--data.synthetic.kind", "markov", "--train.max_steps", "9"]

VISIBLE_FIRST = {  # a checkpoint gets its final name before its files are complete
    "pretrain/checkpoint/storage.py": [
        (
            'temporary, failure = folder / f".tmp-step_{step:08d}", None',
            'temporary, failure = folder / f"step_{step:08d}", None',
        ),
        ("    if final.exists():", "    if False:"),
        ("    os.rename(temporary, final)\n", ""),
    ],
}
RESUMES_WRONG = {  # reads the data from their start again
    "pretrain/run/state.py": [('state["progress"] |= start.changes', 'state["progress"] |= {**start.changes, "position": 0}')],
}


def build_with(mutant: dict[str, list[tuple[str, str]]], folder: Path) -> Path:
    """Makes a copy of the project with a planted bug."""
    for part in ("pretrain", "launch", "tools"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name, changes in mutant.items():
        text = (folder / name).read_text()
        for old, new in changes:
            assert text.count(old) == 1, f"{name} no longer has {old!r}"
            text = text.replace(old, new)
        (folder / name).write_text(text)
    return folder


def inject(build: Path, fault: str, keep: Path) -> subprocess.CompletedProcess:
    """Runs the drill with one fault, in another folder than the project's, to which relative paths then refer."""
    command = [sys.executable, str(build / DRILL[0]), *DRILL[1:], "--only", fault, "--processes", "1", "--keep", keep.name]
    return subprocess.run(command, cwd=keep.parent, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("fault", "mutant", "message"),
    [
        pytest.param("kill_in_save", {}, "no incomplete checkpoint was used; curve bit-identical", id="sound"),
        pytest.param(
            "kill_in_save", VISIBLE_FIRST, "a checkpoint is not complete", marks=pytest.mark.release, id="visible_first"
        ),
        pytest.param("sigterm", RESUMES_WRONG, "the baseline's is", marks=pytest.mark.release, id="resumes_wrong"),
    ],
)
def test_the_drill_passes_without_a_bug_and_fails_with_one(fault, mutant, message, tmp_path):
    done = inject(build_with(mutant, tmp_path / "build"), fault, tmp_path / "runs")
    assert done.returncode == int(bool(mutant)), done.stdout + done.stderr
    assert message in done.stdout and ("BROKEN" in done.stdout) == bool(mutant)


def test_a_refused_configuration_ends_with_2():
    command = [sys.executable, "tools/fire_drill.py", "--optimizr.lr", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean optimizer" in done.stderr


def test_the_shrunken_run_keeps_the_settings_under_test(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("fire_drill", ROOT / "tools" / "fire_drill.py")
    fire_drill = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", ["tools", *sys.path])  # the script replaces the first entry
    spec.loader.exec_module(fire_drill)
    (tmp_path / "tiny.yaml").write_text(TINY)
    flags = ["--engine.name", "zero3", "--model.num_key_value_heads", "1", "--optimizer.weight_decay", "0.3"]
    flags += ["--data.quarantine", "of_other_samples.txt"]  # sample numbers depend on the sequence length
    small = fire_drill.shrink_run(load(["--config", str(tmp_path / "tiny.yaml"), *flags]), 2, tmp_path)
    assert (small.engine.name, small.optimizer.weight_decay) == ("zero3", 0.3)
    assert small.model.num_key_value_heads < small.model.num_attention_heads and small.data.quarantine is None
    assert small.checkpoint.every_steps < small.train.max_steps and small.log.every_steps == 1
    cut = ["--engine.parallel.tensor", "2", "--engine.parallel.sequence", "8", "--model.num_attention_heads", "16"]
    config = load(["--config", str(tmp_path / "tiny.yaml"), *cut], world_size=16)
    assert fire_drill.shrink_run(config, 4, tmp_path).engine.parallel == ParallelConfig(tensor=2, sequence=2)
