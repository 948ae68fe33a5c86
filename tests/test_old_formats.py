"""What version 9db2ae1 wrote (tests/fixtures/make.py) is read to the bit: tokenizer, token files, runs, which also resume."""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.manifest import checkpoints
from pretrain.checkpoint.storage import CheckpointReader
from pretrain.config import load
from pretrain.data.indexed import TokenFile
from pretrain.engines.shards import Shard
from pretrain.model.transformer import build
from pretrain.run.parts import open_parts
from pretrain.train import train
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]
OLD = ROOT / "tests" / "fixtures" / "old_formats"
EXPECTED = json.loads((OLD / "expected.json").read_text())
RANKS = {"dense": 1, "moe": 2, "zero": 2}
KINDS = {
    "dense": ["--engine.name", "fsdp2", "--engine.parallel.tensor", "2"],
    "moe": ["--engine.name", "ddp", "--engine.parallel.expert", "2"],
    "zero": ["--engine.parallel.sequence", "2"],
}
"""Kinds of parallelism that the old version did not have."""
POSITIONS = 64
FILES = ["prose_train", "prose_valid", "lists_train", "lists_valid"]


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A copy of the fixtures, which is the working directory; checkpoints are private to their owner, as they were."""
    shutil.copytree(OLD, tmp_path / "old")
    for folder in (tmp_path / "old").glob("*/checkpoints/*"):
        for path in (folder, *folder.iterdir()):
            path.chmod(0o700 if path.is_dir() else 0o600)
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def resume(run: str, ranks: int, flags: list[str]) -> int:
    return train(load(["--config", f"{run}/config.yaml", *flags], world_size=ranks))


@pytest.mark.parametrize("prefix", FILES)
def test_token_files_open_and_fit_their_checksums(old, prefix):
    file = TokenFile(prefix)
    file.check_checksums()
    assert json.loads(file.sidecar.to_json()) == json.loads(Path(f"{prefix}.json").read_text())


@pytest.mark.parametrize("run", RANKS)
def test_a_checkpoint_is_intact_and_every_tensor_has_its_old_bits(old, run):
    (checkpoint,), tensors = checkpoints(Path(run) / "checkpoints"), {}
    assert checkpoint.damage() is None and checkpoint.step == EXPECTED[run]["step"]
    reader = CheckpointReader(checkpoint)
    for name, parts in reader.by_name.items():
        full = torch.empty(parts[0].shape)
        reader.read_into(Shard(name, parts[0].shape, 0, full.view(-1)))
        tensors[name] = digest(full)
    assert tensors == EXPECTED[run]["tensors"]


@pytest.mark.parametrize("run", RANKS)
def test_data_order_and_initial_weights_are_the_old_ones(old, run):
    """The order to the bit; weights to rounding, because torch computes normal numbers differently on different CPUs."""
    config = load(["--config", f"{run}/config.yaml"], world_size=RANKS[run])
    parts = open_parts(config)
    batch = parts.data.take(0, POSITIONS)
    assert digest(torch.stack([batch.tokens_BT, batch.labels_BT])) == EXPECTED[run]["positions"]
    weights = {name: tensor.detach() for name, tensor in build(parts.model, "cpu", config.run.seed).named_parameters()}
    assert weights.keys() == EXPECTED[run]["initial"].keys()
    for name, values in EXPECTED[run]["initial"].items():
        torch.testing.assert_close(weights[name].flatten()[:20], torch.tensor(values), rtol=1e-5, atol=1e-6)


def check_curve(old: Path, run: str, ranks: int, flags: list[str]) -> None:
    """Up to the checkpoint no byte of metrics.jsonl changes; after it, losses are within 1e-4 of those that the old version
    had when it resumed the same run."""
    before = (old / run / "metrics.jsonl").read_bytes()
    status = [resume(run, 1, flags)] if ranks == 1 else run_ranks(ranks, resume, run, ranks, flags)
    assert set(status) == {0}
    assert (old / run / "metrics.jsonl").read_bytes().startswith(before)
    records = [json.loads(line) for line in (old / run / "metrics.jsonl").read_text().splitlines()][1:]
    for record, expected in zip(records, EXPECTED[run]["records"], strict=True):
        assert {key: record.get(key) for key in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("run", RANKS)
def test_a_run_resumes_with_its_own_settings_and_follows_its_old_curve(old, run):
    check_curve(old, run, RANKS[run], [])


@pytest.mark.parametrize("run", [run if run == "dense" else pytest.param(run, marks=pytest.mark.slow) for run in KINDS])
def test_a_run_resumes_on_ranks_that_share_its_model_or_its_sequences(old, run):
    check_curve(old, run, 2, KINDS[run])


@pytest.mark.parametrize("run", RANKS)
@pytest.mark.parametrize(
    "command",
    [
        ["tools/inspect_data.py", "--run", "{run}", "--step", "3"],
        ["tools/plot_runs.py", "{run}", "--output", "loss.png"],
        ["tools/compare_runs.py", "dense", "{run}"],
        ["launch/evaluate.py", "--run", "{run}", "--max-samples", "8", "--output", "figures.json"],
    ],
    ids=lambda command: Path(command[0]).stem,
)
def test_every_tool_reads_an_old_run(old, run, command, monkeypatch, capsys):
    script, *flags = command
    monkeypatch.setattr(sys, "argv", [script, *(flag.format(run=run) for flag in flags)])
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not done.value.code, capsys.readouterr().err
    if script == "tools/inspect_data.py":
        assert "prose_train" in capsys.readouterr().out
    if script == "launch/evaluate.py":
        assert json.loads(Path("figures.json").read_text())
