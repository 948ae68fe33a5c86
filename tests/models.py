"""Models for tests of conversion: one per family, with weights unlike initial ones; runs and Hugging Face folders."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain import config as settings
from pretrain import schema
from pretrain.config import DataConfig, EngineConfig, OptimizerConfig, SourceConfig
from pretrain.data import tokenizer_training
from pretrain.data.indexed import TokenWriter
from pretrain.data.tokenizer import Tokenizer
from pretrain.engines.start import start_engine
from pretrain.evaluate import score
from pretrain.interop.load import open_hf_folder, open_run, open_weights
from pretrain.interop.weights import DTYPES, Weights, weight_loader, write_hf_folder
from pretrain.model import hf_mapping
from pretrain.model.config import ModelConfig, MoeConfig, RopeScalingConfig, resolve_model
from pretrain.model.hf_mapping import folder_kind
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer
from pretrain.report import plot
from pretrain.report.records import RecordsError
from pretrain.run.stop import StopRequest
from pretrain.train import train
from tests.saving import save

V = 320  # ids of the tokenizer below; not a multiple of 128, so there are padding rows
LLAMA3 = RopeScalingConfig(
    kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
LINEAR = RopeScalingConfig(kind="linear", factor=2.0)


def moe(**changes) -> MoeConfig:
    return MoeConfig(**dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32) | changes)


FAMILIES = {
    "llama": {},
    "llama3": dict(rope_scaling=LLAMA3, rope_theta=5e5, tie_word_embeddings=True, max_position_embeddings=256),
    "linear": dict(rope_scaling=LINEAR),
    "mistral": dict(sliding_window=8),
    "odd": dict(hidden_size=52, num_attention_heads=3, num_key_value_heads=1, head_dim=16),
    "qwen3": dict(qk_norm=True, head_dim=24, tie_word_embeddings=True),
    "qwen3_window": dict(qk_norm=True, sliding_window=8),
    "mixtral": dict(moe=moe()),
    "mixtral_window": dict(moe=moe(), sliding_window=8),
    "qwen3_moe": dict(qk_norm=True, moe=moe(norm_topk_prob=False)),
    "qwen3_moe_window": dict(qk_norm=True, moe=moe(), sliding_window=8),
    "qwen2_moe": dict(moe=moe(num_shared_experts=2)),
    "qwen2_moe_window": dict(moe=moe(norm_topk_prob=False), sliding_window=8),
    "glm4_moe": dict(moe=moe(score="sigmoid", num_shared_experts=2, routed_scaling_factor=2.5)),
    "glm4_moe_qk": dict(qk_norm=True, moe=moe(score="sigmoid")),
    "dots1": dict(qk_norm=True, sliding_window=8, moe=moe(score="sigmoid", num_shared_experts=1)),
}
"""Family -> settings that differ from those in `model_of`."""


def model_of(family: str, **changes) -> ModelConfig:
    base = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_multiple=128)
    return resolve_model(ModelConfig(**base | FAMILIES[family] | changes), vocab_size=V, sequence_length=64)


def stir(model: Transformer, seed: int = 0) -> None:
    """Moves norms and correction biases away from their constants, so that swapping two of them changes the results."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1:
                tensor += 0.3 * torch.rand(tensor.shape, generator=generator)
            elif "q_proj" in name or "k_proj" in name or "gate.weight" in name:
                tensor *= 3.0  # attention and routing far from uniform


def make_tokenizer(folder: Path) -> Path:
    texts = ["def area(radius):\n    return 3.14159 * radius ** 2\n" * 3, "the quick brown fox jumps over the lazy dog " * 20]
    tokenizer_training.train(texts, folder, vocab_size=V, describe=dict)
    return folder


def write_token_file(tokenizer_folder: Path, texts: list[str], prefix: Path) -> None:
    """Writes documents as a token file with its sidecar."""
    tool = Tokenizer.load(tokenizer_folder)
    about = dict(vocab_size=tool.vocab_size, end_of_document_id=tool.end_of_document_id, shuffled=True, overwrite=True)
    about |= dict(tokenizer_fingerprint=tool.fingerprint, tokenizer_path=str(tokenizer_folder))
    with TokenWriter(prefix, **about) as writer:
        for text in texts:
            ids = [*tool.encode(text), tool.end_of_document_id]
            writer.add(np.array(ids), np.array([len(ids)]), len(text.encode()))
        writer.finish({"inputs": ["test"], "sha256": "0"})


def make_run(folder: Path, model: ModelConfig, tokenizer_folder: Path | None, steps: tuple[int, ...] = (1,)) -> Path:
    """A run with a checkpoint per step, all with different weights."""
    flags = ["--run.name", folder.name, "--run.directory", str(folder.parent), "--model.vocab_size", str(V)]
    flags += ["--data.synthetic.kind", "uniform", "--train.max_steps", str(max(steps))]
    flags += ["--tokenizer.path", str(tokenizer_folder) if tokenizer_folder else "null"]
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(schema.to_yaml(settings.load(flags)))
    fingerprint = tokenizer_folder and Tokenizer.load(tokenizer_folder).fingerprint
    engine = start_engine(EngineConfig(name="ddp"))
    for step in steps:
        engine.prepare(lambda: Transformer(model), lambda built: build_optimizer(built, OptimizerConfig()), 1.0, seed=step)
        stir(engine.model, step)
        save(folder / "checkpoints", step, engine, {"model": asdict(model), "val_loss": 1.0 / step, "tokenizer": fingerprint})
    return folder


def make_hf_folder(folder: Path, weights: Weights, dtype: str = "fp32", tokenizer_folder: Path | None = None) -> Path:
    """A Hugging Face folder written without any verification."""
    if tokenizer_folder:
        shutil.copytree(tokenizer_folder, folder)
    folder.mkdir(exist_ok=True)
    write_hf_folder(folder, weights, dtype, 10**9)
    config = hf_mapping.to_config(weights.model, str(DTYPES[dtype]).removeprefix("torch."), {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ---------------------------------------------------------------- for ranks: importing this file does not import transformers


def train_here(argv: list[str], stop: StopRequest | None = None, picture: bool = False) -> int:
    """Trains. The picture of the curve, a quarter of the work of a tiny run, is drawn for trackers and for tests that look at
    it (`picture`); else the run says that it has none, as it does when its records cannot be read."""
    config = settings.load(argv, world_size=int(os.environ.get("WORLD_SIZE", 1)))
    with pytest.MonkeyPatch.context() as patch:
        if not picture and set(config.log.sinks) <= {"console", "jsonl"}:
            patch.setattr(plot, "plot_runs", _no_picture)
        return train(config, stop)


def _no_picture(*_) -> None:
    raise RecordsError("this test looks at no picture")


def score_here(folder: Path, token_files: list[str], sequence_length: int, engine_name: str) -> list[dict]:
    """The rows of `score` for a run or a Hugging Face folder."""
    trained = open_run(folder) if folder_kind(folder) == "run" else open_hf_folder(folder)
    data = DataConfig(valid=[SourceConfig(path=path) for path in token_files], sequence_length=sequence_length)
    engine = start_engine(EngineConfig(name=engine_name))
    rows = score(engine, trained, data, 8)
    engine.close()
    return rows


def loaded_by(paths: list[Path], engine_name: str, target) -> list[tuple[str, int, np.ndarray]]:
    engine = start_engine(EngineConfig(name=engine_name))
    engine.prepare(lambda: Transformer(target), lambda model: build_optimizer(model, OptimizerConfig()), 1.0, seed=0)
    tokens_BT, found = torch.arange(16).view(1, 16) % V, []
    for path in paths:
        engine.restore(weight_loader(open_weights(path), target), moments=False)
        for state in engine.local_states(saving=False):
            found.append((state.name, state.offset, state.tensors["model"].numpy().copy()))
        found.append(("loss", 0, engine.forward(tokens_BT, tokens_BT, None).loss_sum.detach().view(1).numpy()))
    engine.close()
    return found
