"""Trained models are opened by the step, kind and place that the user names, and a damaged checkpoint never is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain import config, schema
from pretrain.checkpoint.storage import CheckpointError
from pretrain.config import Config, EngineConfig, OptimizerConfig
from pretrain.data.errors import DataError
from pretrain.engines.start import start_engine
from pretrain.interop.load import find_unusable, open_hf_folder, open_run, open_weights, tensor_problem, tokenizer_of
from pretrain.interop.weights import CheckpointWeights, HFWeights, load_transformer
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.model.hf_mapping import UnsupportedModel, architecture, folder_kind
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer
from tests.models import make_hf_folder, make_run, make_tokenizer, model_of, train_here
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


def test_a_model_without_a_tokenizer_says_where_one_would_be(run, tmp_path):
    """What users have is often a folder with only a tokenizer.model, which transformers converts."""
    with pytest.raises(DataError, match=r"has no tokenizer: tokenizer\.path in its config\.yaml"):
        open_run(run).require_tokenizer()
    folder = make_hf_folder(tmp_path / "exported", open_run(run).weights)
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(DataError, match=r"exported: has no tokenizer\.json; transformers makes one .* tokenizer\.model"):
        open_hf_folder(folder).require_tokenizer()


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


def spoil(folder: Path, name: str, change: Callable[[torch.Tensor], object], dtype: torch.dtype = torch.float32) -> None:
    """Changes one tensor of a Hugging Face folder."""
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors[name].to(dtype)
    change(tensor)
    save_file(tensors | {name: tensor}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("model.layers.1.mlp.up_proj.weight", lambda tensor: tensor[3].fill_(math.nan), "NaN or infinity"),
        ("model.layers.0.self_attn.q_proj.weight", lambda tensor: tensor[0].fill_(-math.inf), "NaN or infinity"),
        ("lm_head.weight", lambda tensor: tensor[-1, -1:].fill_(math.inf), "NaN or infinity"),
        ("model.norm.weight", torch.Tensor.zero_, "all zeros"),
        ("model.layers.0.input_layernorm.weight", torch.Tensor.zero_, "all zeros"),
        ("model.embed_tokens.weight", torch.Tensor.zero_, "all zeros"),
    ],
)
def test_weights_from_which_nothing_can_be_trained_are_refused_on_every_rank_and_the_tensor_is_named(
    tmp_path, name, change, what, capsys
):
    run = make_run(tmp_path / "run", model_of("llama"), None)
    folder = make_hf_folder(tmp_path / "hf", open_run(run).weights)
    assert find_unusable(open_weights(folder)) is None
    spoil(folder, name, change)
    found = [find_unusable(open_weights(folder), rank, 3) for rank in range(3)]
    (number, problem) = next(each for each in found if each)
    assert found.count(None) == 2 and name in problem and what in problem
    assert tensor_problem(open_weights(folder), number) == problem
    flags = ["--model.from_pretrained", str(folder), "--data.synthetic.kind", "uniform", "--train.max_steps", "3"]
    flags += ["--data.sequence_length", "8", "--run.directory", str(tmp_path), "--run.name", "new"]
    assert train_here(flags) == 2
    error = capsys.readouterr().err
    assert "model.from_pretrained" in error and name in error and "checkpoint" not in error
    assert not (tmp_path / "new" / "metrics.jsonl").exists()


def test_weights_that_are_zero_where_models_start_with_zeros_are_usable(tmp_path):
    run = make_run(tmp_path / "run", model_of("llama"), None)
    folder = make_hf_folder(tmp_path / "hf", open_run(run).weights)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight", "lm_head.weight"):
        spoil(folder, name, torch.Tensor.zero_)
    assert find_unusable(open_weights(folder)) is None


def test_weights_of_other_types_or_sizes_are_refused_when_they_are_opened(tmp_path):
    run = make_run(tmp_path / "run", model_of("llama"), None)
    for number, (dtype, change) in enumerate([(torch.int8, None), (torch.float64, None), (torch.float32, (0, 48))]):
        folder = make_hf_folder(tmp_path / f"hf{number}", open_run(run).weights)
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = torch.zeros(change) if change else tensors[name].to(dtype)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UnsupportedModel, match=name):
            open_weights(folder)


def test_a_folder_of_no_kind_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        for read in (folder_kind, architecture, open_weights):
            with pytest.raises(UnsupportedModel, match=str(path)):
                read(path)
        assert tokenizer_of(path) is None
    (tmp_path / "checkpoints" / "step_unfinished").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="checkpoints"):
        open_weights(tmp_path)
