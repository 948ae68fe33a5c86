"""The folder of a run: one job at a time, its state on disk, and its model read back without a process group."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from pretrain import config, schema
from pretrain.checkpoint import storage
from pretrain.checkpoint.storage import CheckpointError
from pretrain.config import Config, EngineConfig, OptimizerConfig
from pretrain.engines.start import start_engine
from pretrain.interop.load import open_run
from pretrain.interop.weights import load_transformer
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer
from pretrain.run.directory import Locked, RunDirectory

MODEL = resolve_model(ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2), vocab_size=50, sequence_length=8)


@pytest.fixture
def run(tmp_path):
    """Checkpoints of steps 1, 2 and 3 with validation losses 3, 1 and 2; the model of step s has every weight equal to s."""
    flags = ["--model.vocab_size", "50", "--data.synthetic.kind", "uniform", "--train.max_steps", "3"]
    (tmp_path / "config.yaml").write_text(schema.to_yaml(config.load(flags)))
    engine = start_engine(EngineConfig(name="ddp"))
    engine.prepare(lambda: Transformer(MODEL), lambda model: build_optimizer(model, OptimizerConfig()), 1.0, seed=0)
    for step, val_loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        for parameter in engine.model.parameters():
            parameter.data.fill_(step)
        state = {"model": vars(MODEL), "val_loss": val_loss}
        storage.save(tmp_path / "checkpoints", step, engine, state)
    return tmp_path


@pytest.mark.parametrize(("wish", "step"), [(None, 3), ("best", 2), (1, 1), ("3", 3)])
def test_the_wished_checkpoint_is_read(run, wish, step):
    trained = open_run(run, wish)
    model = load_transformer(trained.weights)
    assert isinstance(trained.config, Config) and trained.origin["step"] == step
    assert all(bool((parameter[: MODEL.vocab_size] == step).all()) for parameter in model.parameters())
    assert model(torch.tensor([[1, 2]])).isfinite().all()


def test_a_missing_step_names_those_that_exist(run):
    with pytest.raises(CheckpointError, match="has no checkpoint of step 7; it has: 3, 2, 1"):
        open_run(run, 7)


def test_a_damaged_checkpoint_is_not_read(run):
    file = next((run / "checkpoints" / "step_00000003").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="its content has changed"):
        open_run(run)


def test_one_folder_one_job_and_a_dead_job_holds_nothing(tmp_path):
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


def test_the_state_is_replaced_as_a_whole(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_state("running")
    directory.write_state("stopped", exit_status=75, step=7, reason="why")
    state = json.loads((tmp_path / "run_state.json").read_text())
    assert (state["status"], state["exit_status"], state["step"], state["reason"]) == ("stopped", 75, 7, "why")
    assert {path.name for path in tmp_path.iterdir()} == {"run_state.json", "run.lock"}
