"""Trained models are opened by the step, kind and place that the user names, and a damaged checkpoint never is."""

from __future__ import annotations

import pytest
import torch

from pretrain import config, schema
from pretrain.checkpoint.storage import CheckpointError
from pretrain.config import Config, EngineConfig, OptimizerConfig
from pretrain.engines.start import start_engine
from pretrain.interop.load import open_run, open_weights, tokenizer_of
from pretrain.interop.weights import CheckpointWeights, HFWeights, load_transformer
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.model.hf_mapping import UnsupportedModel, architecture, folder_kind
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer
from tests.models import make_hf_folder, make_run, make_tokenizer, model_of
from tests.saving import save

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
        save(tmp_path / "checkpoints", step, engine, state)
    return tmp_path


@pytest.mark.parametrize(("wanted", "step"), [(None, 3), ("best", 2), (1, 1), ("3", 3)])
def test_the_requested_checkpoint_is_read(run, wanted, step):
    trained = open_run(run, wanted)
    assert isinstance(trained.config, Config) and trained.origin["step"] == step
    model = load_transformer(trained.weights)
    assert all(bool((parameter[: MODEL.vocab_size] == step).all()) for parameter in model.parameters())
    assert model(torch.tensor([[1, 2]])).isfinite().all()


def test_a_missing_step_is_reported_with_the_steps_that_exist(run):
    with pytest.raises(CheckpointError, match="step 7; it has: 3, 2, 1"):
        open_run(run, 7)


def test_a_damaged_checkpoint_is_not_read(run):
    file = next((run / "checkpoints" / "step_00000003").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    for read in (open_run, open_weights):
        with pytest.raises(CheckpointError, match=file.name):
            read(run)


def test_every_kind_of_folder_gives_the_same_model_and_tokenizer(tmp_path):
    model, tokenizer = model_of("llama"), make_tokenizer(tmp_path / "tokenizer")
    run = make_run(tmp_path / "run", model, tokenizer)
    folders = {"run": run, "checkpoint": run / "checkpoints" / "step_00000001", "hugging_face": tmp_path / "hf"}
    make_hf_folder(folders["hugging_face"], open_run(run).weights, tokenizer_folder=tokenizer)
    fingerprint = open_run(run).load_tokenizer().fingerprint
    expected = load_transformer(open_run(run).weights)(torch.arange(8)[None])
    for kind, path in folders.items():
        assert (folder_kind(path), tokenizer_of(path)) == (kind, fingerprint)
        weights = open_weights(path)
        assert isinstance(weights, HFWeights if kind == "hugging_face" else CheckpointWeights)
        assert architecture(path)["hidden_size"] == weights.model.hidden_size == model.hidden_size
        torch.testing.assert_close(load_transformer(weights)(torch.arange(8)[None]), expected, rtol=0, atol=1e-6)


def test_a_folder_of_no_kind_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        for read in (folder_kind, architecture, open_weights):
            with pytest.raises(UnsupportedModel, match=str(path)):
                read(path)
        assert tokenizer_of(path) is None
    (tmp_path / "checkpoints" / "step_unfinished").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="checkpoints"):
        open_weights(tmp_path)
