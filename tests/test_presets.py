"""Published shapes: each loads together with a run's own settings, and has the published number of parameters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pretrain.config import load
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.model.flops import num_parameters
from pretrain.model.hf_mapping import to_config
from pretrain.model.transformer import Transformer

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "models"
PUBLISHED = {  # exact: the sum over the published files (a tied matrix once); with a tolerance: rounded as by the authors
    "gpt2_small": (124_439_808, 0.01),
    "gpt2_medium": (354_823_168, 0.01),
    "gpt2_large": (774_030_080, 0.01),
    "gpt2_xl": (1_557_611_200, 0.01),
    "llama2_7b": (6_738_415_616, 0),
    "llama2_70b": (68_976_648_192, 0),
    "llama3_8b": (8_030_261_248, 0),
    "llama3_1_8b": (8_030_261_248, 0),
    "llama3_1_70b": (70_553_706_496, 0),
    "llama3_2_1b": (1_235_814_400, 0),
    "minimind2_small": (25.83e6, 1e-3),
    "minimind2": (104e6, 1e-3),
    "minimind2_moe": (145e6, 1e-3),
    "mistral_7b": (7_241_732_096, 0),
    "mixtral_8x7b": (46_702_792_704, 0),
    "qwen3_0_6b": (596_049_920, 0),
    "qwen3_1_7b": (1_720_574_976, 0),
    "qwen3_4b": (4_022_468_096, 0),
    "qwen3_8b": (8_190_735_360, 0),
    "qwen3_30b_a3b": (30_532_122_624, 0),
    "tinyllama_1b": (1_100_048_384, 0),
}
ACTIVE = {"mixtral_8x7b": 12.9e9, "qwen3_30b_a3b": 3.35e9}  # rounded as by the authors


def model_of(name: str, *flags: str) -> ModelConfig:
    own = ["--data.synthetic.kind", "uniform", "--train.max_steps", "1", *flags]
    model = load(["--config", str(FOLDER / f"{name}.yaml"), *own]).model
    return resolve_model(model, vocab_size=model.vocab_size, sequence_length=1024)


def test_a_later_file_and_flags_change_only_the_keys_they_name(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {num_hidden_layers: 4, moe: {num_experts: 16}}\n")
    model = model_of("qwen3_30b_a3b", "--config", str(tmp_path / "mine.yaml"), "--model.moe.balance", "sequence")
    original = model_of("qwen3_30b_a3b")
    moe = dataclasses.replace(original.moe, num_experts=16, balance="sequence")
    assert model == dataclasses.replace(original, num_hidden_layers=4, moe=moe)


def test_every_preset_has_a_published_number_of_parameters_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name):
    model, (published, tolerance) = model_of(name), PUBLISHED[name]
    counts = num_parameters(model)
    assert counts.total == pytest.approx(published, rel=tolerance, abs=0)
    if model.moe and name in ACTIVE:
        assert counts.active == pytest.approx(ACTIVE[name], rel=0.005)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Transformer(model).parameters()) == counts.total


@pytest.mark.parametrize(
    "name", [name for name in PUBLISHED if name != "minimind2_moe"]
)  # no class of transformers has its architecture
def test_a_preset_has_the_parameters_of_transformers(name):
    """By name and shape, except for padding rows."""
    model = model_of(name)
    settings = to_config(model, "float32", {})
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
        ours = Transformer(model)
    expected = {name: parameter.shape for name, parameter in theirs.named_parameters()}
    found = {name: parameter.shape for name, parameter in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, shape in found.items():
        assert shape[1:] == expected[name][1:]
        assert 0 <= shape[0] - expected[name][0] < 64
