"""A config.json and tensor names say of a model what transformers reads from them, and what is not ours is refused."""

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
def test_settings_come_back_from_the_file(family, tmp_path):
    model = model_of(family)
    back = model_from_dict(hf_mapping.from_config(written(model, tmp_path), tmp_path))
    assert not model_settings.differences(model, back) and not model_settings.differences(back, model)
    assert back.max_position_embeddings == model.max_position_embeddings


@pytest.mark.parametrize(("given", "recorded"), [(None, 1024), (512, 1024), (4096, 4096)])
def test_the_recorded_context_is_no_shorter_than_what_was_trained(given, recorded):
    """Servers cut prompts there."""
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
    assert {part.name: part.shape for part in hf_mapping.tensors(model)} == saved


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_tile_our_parameters_without_padding_rows(family):
    model = model_of(family)
    with torch.device("meta"):
        ours = {
            name: tensor.shape
            for name, tensor in Transformer(dataclasses.replace(model, vocab_multiple=1)).state_dict().items()
        }
    found: dict[str, list] = {}
    for part in hf_mapping.tensors(model):
        if part.count and part.parameter:
            found.setdefault(part.parameter, []).append((part.offset, part.offset + part.count))
    assert found.keys() == ours.keys()
    for name, shape in ours.items():
        spans = sorted(found[name])
        assert spans[0][0] == 0 and spans[-1][1] == shape.numel()
        assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))


@pytest.mark.parametrize("kind", hf_mapping.CLASSES)
def test_a_key_that_is_missing_means_what_it_means_to_transformers(kind, tmp_path):
    """Each key of a full file is left out in turn: we must read what transformers reads, or refuse."""
    family = {"llama": "llama3", "qwen3": "qwen3_window", "mixtral": "mixtral_window", "qwen3_moe": "qwen3_moe_window"}
    family |= {"qwen2_moe": "qwen2_moe_window"}
    full = hf_mapping.to_config(model_of(family.get(kind, kind), tie_word_embeddings=True), "float32", IDS)
    required = {"model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}
    required |= {"layer_types"} if kind == "qwen2_moe" else set()  # without them windows alternate: refused
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "olmo2"}, "model_type is 'olmo2'; this program has llama"),
        ({"model_type": "gpt2"}, r"model_type is 'gpt2' \(its norms and linear layers have biases.*\); this program has llama"),
        ({"model_type": "qwen2"}, r"model_type is 'qwen2' \(its queries, keys and values have biases\)"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rotary embeddings of several kinds"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, this program's models have silu"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "of type 'yarn', this program has default, linear and llama3"),
        ({"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"num_attention_heads": "many"}, "of another type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "some of its layers have a sliding window, some none",
        ),
        ({"model_type": "glm4_moe"}, "first_k_dense_replace is 1"),
    ],
)
def test_what_is_not_ours_is_refused_by_name(changes, message):
    config = hf_mapping.to_config(model_of("llama"), "float32", IDS)
    with pytest.raises(UnsupportedModel, match=f"here: .*{message}"):
        hf_mapping.from_config(config | changes, "here")


@pytest.mark.parametrize(
    "settings",
    [
        dict(moe=moe(num_shared_experts=1), qk_norm=True),
        dict(moe=moe(routed_scaling_factor=2.0)),
        dict(moe=moe(score="sigmoid"), sliding_window=8),
    ],
)
def test_a_model_that_no_class_computes_is_refused(settings):
    with pytest.raises(UnsupportedModel, match="no class of transformers"):
        hf_mapping.model_type(model_of("llama", **settings))


def test_the_length_before_scaling_is_read_where_transformers_reads_it():
    config = hf_mapping.to_config(model_of("llama3"), "float32", IDS)
    for beside in ({}, {"original_max_position_embeddings": 128}):
        theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**config, **beside)).inv_freq
        scaling = RopeScalingConfig(**hf_mapping.from_config(config | beside, "here")["rope_scaling"])
        torch.testing.assert_close(frequencies(12, 5e5, scaling, torch.device("cpu")), theirs)


def test_older_files_are_read():
    """As Llama 3.1 and Llama 2 were published."""
    config = hf_mapping.to_config(model_of("llama3"), "float32", IDS)
    del config["rope_parameters"]
    model = hf_mapping.from_config(config, "here")
    assert (model["rope_theta"], model["rope_scaling"]) == (5e5, dataclasses.asdict(LLAMA3))
    del config["rope_scaling"], config["rope_theta"], config["head_dim"], config["num_key_value_heads"]
    model = hf_mapping.from_config(config, "here")
    assert (model["rope_theta"], model["rope_scaling"], model["head_dim"], model["num_key_value_heads"]) == (1e4, None, 12, 4)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, '{"model_type": 3}'])
def test_a_damaged_config_is_refused_in_words(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        hf_mapping.from_config(hf_mapping.read_config(tmp_path), tmp_path / "config.json")


@pytest.mark.parametrize(
    "preset", sorted((Path(__file__).parents[1] / "configs" / "models").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_published_shape_has_a_class_of_its_size(preset, tmp_path):
    flags = ["--config", str(preset), "--data.synthetic.kind", "uniform", "--train.max_steps", "1"]
    model = settings.load(flags, world_size=None).model
    model = model_settings.resolve_model(model, vocab_size=model.vocab_size, sequence_length=1024)
    back = model_from_dict(hf_mapping.from_config(written(model, tmp_path), tmp_path))
    assert not model_settings.differences(model, back)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    expected = sum(part.count for part in hf_mapping.tensors(model) if not part.keep_fp32)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == expected
