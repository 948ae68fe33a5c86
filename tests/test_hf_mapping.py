"""config.json and tensor names mean the same to this program and to transformers; unsupported models are refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pretrain import config as settings
from pretrain.model import config as model_settings
from pretrain.model import hf_mapping
from pretrain.model.attention import frequencies
from pretrain.model.config import ModelConfig, RopeScalingConfig, model_from_dict, resolve_model
from pretrain.model.hf_mapping import UnsupportedModel
from pretrain.model.transformer import Transformer
from tests.models import FAMILIES, LLAMA3, model_of, moe

IDS = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 3}


def written(model, folder) -> dict:
    (folder / "config.json").write_text(json.dumps(hf_mapping.to_config(model, "float32", IDS)))
    return hf_mapping.read_config(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_survive_a_round_trip_through_config_json(family, tmp_path):
    model = model_of(family)
    back = model_from_dict(hf_mapping.from_config(written(model, tmp_path), tmp_path))
    assert not model_settings.differences(model, back) and not model_settings.differences(back, model)
    assert back.max_position_embeddings == model.max_position_embeddings


@pytest.mark.parametrize(("given", "recorded"), [(None, 1024), (512, 1024), (4096, 4096)])
def test_max_position_embeddings_covers_the_trained_length(given, recorded):
    """Servers truncate prompts to it."""
    model = resolve_model(ModelConfig(max_position_embeddings=given), vocab_size=100, sequence_length=1024)
    assert hf_mapping.to_config(model, "float32", IDS)["max_position_embeddings"] == recorded


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_have_the_names_and_shapes_that_transformers_saves(family, tmp_path):
    model = model_of(family)
    written(model, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    assert type(theirs).__name__ == hf_mapping.CLASSES[hf_mapping.model_type(model)] == config.architectures[0]
    theirs.save_pretrained(tmp_path)
    with transformers.modeling_utils.safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()}
    assert {tensor.name: tensor.shape for tensor in hf_mapping.tensors(model)} == saved


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_tile_our_parameters_without_padding_rows(family):
    model = model_of(family)
    with torch.device("meta"):
        ours = {
            name: tensor.shape
            for name, tensor in Transformer(dataclasses.replace(model, vocab_multiple=1)).state_dict().items()
        }
    found: dict[str, list] = {}
    for tensor in hf_mapping.tensors(model):
        if tensor.count and tensor.parameter:
            found.setdefault(tensor.parameter, []).append((tensor.offset, tensor.offset + tensor.count))
    assert found.keys() == ours.keys()
    for name, shape in ours.items():
        spans = sorted(found[name])
        assert spans[0][0] == 0 and spans[-1][1] == shape.numel()
        assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))


@pytest.mark.parametrize("kind", hf_mapping.CLASSES)
def test_a_missing_key_means_the_same_as_to_transformers(kind, tmp_path):
    """Removes each key in turn: we must read what transformers reads, or refuse the file."""
    family = {"llama": "llama3", "qwen3": "qwen3_window", "mixtral": "mixtral_window", "qwen3_moe": "qwen3_moe_window"}
    family |= {"qwen2_moe": "qwen2_moe_window"}
    full = hf_mapping.to_config(model_of(family.get(kind, kind), tie_word_embeddings=True), "float32", IDS)
    required = {"model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}
    required |= {"layer_types"} if kind == "qwen2_moe" else set()  # without it windows alternate, which is refused
    required |= {"num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"}
    for key in full.keys() - required:
        less = {name: value for name, value in full.items() if name != key}
        if key == "rope_theta":
            del less["rope_parameters"]
        (tmp_path / "config.json").write_text(json.dumps(less))
        theirs = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
        try:
            ours, same = (hf_mapping.from_config(each, key) for each in (less, theirs))
        except UnsupportedModel:
            assert key in ("partial_rotary_factor", "first_k_dense_replace", "qkv_bias", "shared_expert_intermediate_size"), key
            continue
        assert ours == same, key


UNSUPPORTED = [
    ({"model_type": "olmo2"}, "'olmo2'.* llama"),
    ({"model_type": "gpt2"}, r"'gpt2' \(.*biases.*\).* llama"),
    ({"model_type": "qwen2"}, r"'qwen2' \(.*biases.*\)"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rotary embeddings"),
    ({"rope_theta": 5e4}, "rope_theta is 50000 and.* 10000"),
    ({"hidden_act": "gelu"}, "hidden_act.* gelu.* silu"),
    ({"attention_bias": True}, "attention_bias"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'.* default, linear, llama3"),
    ({"rope_scaling": {"type": "linear"}}, "'factor'"),
    ({"hidden_size": None}, "'hidden_size'"),
    ({"num_attention_heads": "many"}, "type"),
    ({"num_attention_heads": 0, "head_dim": None}, "zero"),
    ({"rms_norm_eps": "small"}, "'small'"),
    ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor.* 0\.5"),
    ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding window"),
    ({"model_type": "glm4_moe"}, "first_k_dense_replace.* 1"),
]
"""Changes to the config.json of a Llama model, and what the message must name."""


@pytest.mark.parametrize(("changes", "named"), UNSUPPORTED)
def test_an_unsupported_setting_is_refused_by_name(changes, named):
    config = hf_mapping.to_config(model_of("llama"), "float32", IDS)
    with pytest.raises(UnsupportedModel, match=f"^here: .*{named}"):
        hf_mapping.from_config(config | changes, "here")


@pytest.mark.parametrize(
    "settings",
    [
        dict(moe=moe(num_shared_experts=1), qk_norm=True),
        dict(moe=moe(routed_scaling_factor=2.0)),
        dict(moe=moe(score="sigmoid"), sliding_window=8),
    ],
)
def test_a_model_without_a_class_in_transformers_is_refused(settings):
    with pytest.raises(UnsupportedModel, match="no class in transformers"):
        hf_mapping.model_type(model_of("llama", **settings))


def test_the_original_length_of_llama3_scaling_is_found_where_transformers_finds_it():
    config = hf_mapping.to_config(model_of("llama3"), "float32", IDS)
    for beside in ({}, {"original_max_position_embeddings": 128}):
        theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**config, **beside)).inv_freq
        scaling = RopeScalingConfig(**hf_mapping.from_config(config | beside, "here")["rope_scaling"])
        torch.testing.assert_close(frequencies(12, 5e5, scaling, torch.device("cpu")), theirs)


def test_older_files_are_read():
    """The forms in which Llama 3.1 and Llama 2 were published."""
    config = hf_mapping.to_config(model_of("llama3"), "float32", IDS)
    del config["rope_parameters"]
    model = hf_mapping.from_config(config, "here")
    assert (model["rope_theta"], model["rope_scaling"]) == (5e5, dataclasses.asdict(LLAMA3))
    del config["rope_scaling"], config["rope_theta"], config["head_dim"], config["num_key_value_heads"]
    model = hf_mapping.from_config(config, "here")
    assert (model["rope_theta"], model["rope_scaling"], model["head_dim"], model["num_key_value_heads"]) == (1e4, None, 12, 4)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, '{"model_type": 3}'])
def test_a_damaged_config_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        hf_mapping.from_config(hf_mapping.read_config(tmp_path), tmp_path / "config.json")


@pytest.mark.parametrize(
    "preset", sorted((Path(__file__).parents[1] / "configs" / "models").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_preset_has_a_class_with_as_many_parameters(preset, tmp_path):
    flags = ["--config", str(preset), "--data.synthetic.kind", "uniform", "--train.max_steps", "1"]
    model = settings.load(flags, world_size=None).model
    model = model_settings.resolve_model(model, vocab_size=model.vocab_size, sequence_length=1024)
    back = model_from_dict(hf_mapping.from_config(written(model, tmp_path), tmp_path))
    assert not model_settings.differences(model, back)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    expected = sum(tensor.count for tensor in hf_mapping.tensors(model) if not tensor.keep_fp32)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == expected
