"""Maps our models to Hugging Face's formats: settings to `config.json`, parameters to the tensors in safetensors files.

It knows names, shapes and settings as plain values: no tensors, no torch, no transformers. interop/weights.py moves the values,
interop/verify.py checks that transformers computes the same from them.

    model                                       class in transformers
    dense                                       LlamaForCausalLM
    dense, sliding window or odd head size      MistralForCausalLM
    dense, qk_norm                              Qwen3ForCausalLM
    softmax experts                             MixtralForCausalLM
    softmax experts, qk_norm                    Qwen3MoeForCausalLM
    softmax experts, shared experts             Qwen2MoeForCausalLM
    sigmoid experts                             Glm4MoeForCausalLM
    sigmoid experts, qk_norm, sliding window    Dots1ForCausalLM
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pretrain import UserError
from pretrain.model.config import ModelConfig

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "dots1": "Dots1ForCausalLM",
}
"""model_type -> class in transformers."""

_QK_NORM = ("qwen3", "qwen3_moe", "dots1")
_SIGMOID = ("glm4_moe", "dots1")
KEPT_FP32 = "e_score_correction_bias"
"""Suffix of the tensors that stay fp32 in a folder of any dtype, as transformers requires."""
_MAX_CONFIG_BYTES = 1 << 20


class UnsupportedModel(UserError):
    """This program has no such model, or cannot read its folder; the message says which and why."""


# ---------------------------------------------------------------- settings


def model_type(model: ModelConfig) -> str:
    """The model_type in transformers that computes exactly what `model` computes. Raises UnsupportedModel if there is none."""
    moe, odd = model.moe, model.hidden_size % model.num_attention_heads != 0
    if moe is None:
        return "qwen3" if model.qk_norm else "mistral" if model.sliding_window or odd else "llama"
    if moe.score == "sigmoid":
        if not model.sliding_window:
            return "glm4_moe"
        if model.qk_norm:
            return "dots1"
        raise UnsupportedModel("no class in transformers has sigmoid experts and a sliding window without model.qk_norm")
    if moe.routed_scaling_factor != 1:
        raise UnsupportedModel(
            "no class in transformers scales softmax experts (model.moe.routed_scaling_factor); with score sigmoid one does"
        )
    if model.qk_norm and moe.num_shared_experts:
        raise UnsupportedModel(
            "no class in transformers has softmax experts, shared experts and model.qk_norm; with score sigmoid one does"
        )
    if model.qk_norm:
        return "qwen3_moe"
    return "qwen2_moe" if moe.num_shared_experts or not moe.norm_topk_prob else "mixtral"


def to_config(model: ModelConfig, dtype: str, special_ids: dict[str, int | None]) -> dict[str, Any]:
    """The contents of config.json for a resolved model.

    dtype: float32, bfloat16 or float16. special_ids: bos_token_id, eos_token_id, pad_token_id. Raises UnsupportedModel.
    """
    kind = model_type(model)
    names = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
        max_position_embeddings rms_norm_eps tie_word_embeddings"""
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling := model.rope_scaling:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            keys = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            rope |= {key: getattr(scaling, key) for key in keys}
    config = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "dtype": dtype,
        "torch_dtype": dtype,  # the older name; without it transformers 4.50 to 4.55 and servers choose a dtype themselves
        **{name: getattr(model, name) for name in names.split()},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        # Earlier versions of transformers, and other servers, read the two older keys; without them they would fall back to
        # their default base and compute a different model.
        "rope_theta": model.rope_theta,
        "rope_scaling": rope if scaling else None,
        "rope_parameters": {**rope, "rope_theta": model.rope_theta},
        "sliding_window": model.sliding_window,
        **special_ids,
        "use_cache": True,
    }
    return config | _extra_keys(kind, model)


def _extra_keys(kind: str, model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that only some model types have."""
    moe, extra = model.moe, {}
    if kind == "llama":
        extra |= {"mlp_bias": False}
    if kind in ("qwen3", "qwen3_moe", "qwen2_moe", "dots1"):
        kinds = ["sliding_attention" if model.sliding_window else "full_attention"] * model.num_hidden_layers
        first = 0 if model.sliding_window else model.num_hidden_layers  # the first layer with a window
        extra |= {"use_sliding_window": bool(model.sliding_window), "max_window_layers": first, "layer_types": kinds}
    if moe is None:
        return extra
    extra |= {
        "num_experts_per_tok": moe.num_experts_per_tok,
        "norm_topk_prob": moe.norm_topk_prob,
        "router_aux_loss_coef": _rounded(moe.aux_loss_weight / moe.num_experts_per_tok),  # see _aux_loss_weight
        "output_router_logits": False,
    }
    if kind == "mixtral":
        return extra | {"num_local_experts": moe.num_experts, "intermediate_size": moe.moe_intermediate_size}
    extra |= {"moe_intermediate_size": moe.moe_intermediate_size}
    if kind == "qwen3_moe":
        return extra | {"num_experts": moe.num_experts, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if kind == "qwen2_moe":
        shared = moe.num_shared_experts * moe.moe_intermediate_size
        extra |= {"num_experts": moe.num_experts, "shared_expert_intermediate_size": shared, "qkv_bias": False}
        return extra | {"decoder_sparse_step": 1, "mlp_only_layers": []}
    extra |= {
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
    }
    if kind == "glm4_moe":
        extra |= {"use_qk_norm": model.qk_norm, "partial_rotary_factor": 1.0, "num_nextn_predict_layers": 0}
    return extra


def _rounded(value: float) -> float:
    """`value` with 15 digits, so that 0.05 * 3 / 3 is 0.05, not 0.05000000000000001."""
    return float(f"{value:.15g}")


def _aux_loss_weight(config: dict[str, Any]) -> dict[str, float]:
    """`moe.aux_loss_weight`, if config.json has a coefficient: their loss is num_experts_per_tok times as large as ours."""
    coefficient = config.get("router_aux_loss_coef")
    if coefficient is None:
        return {}
    if not 0 <= (weight := float(coefficient) * config["num_experts_per_tok"]) < math.inf:
        raise UnsupportedModel(f"router_aux_loss_coef is {coefficient}; allowed: 0 or more")
    return {"aux_loss_weight": weight}


_READ_IN_TRAINING = ("attention_dropout", "output_router_logits", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id")
"""Keys that `to_config` writes and that do not change what the model computes."""
_NOT_KEPT = ("auto_map", "_name_or_path", "transformers_version", "quantization_config")


def kept_keys(config: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """The keys of a config.json that no setting of `model` holds, such as initializer_range: an export after an import writes
    them again. Keys that name code are left out."""
    ours = to_config(model, "float32", {}).keys() - set(_READ_IN_TRAINING)
    return {key: value for key, value in config.items() if key not in ours and key not in _NOT_KEPT}


_QWEN_DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "sliding_window": 4096}
_AUX_LOSS = {"router_aux_loss_coef": 0.001}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
    "qwen3": _QWEN_DEFAULTS | {"head_dim": 128, "max_window_layers": 28, "num_key_value_heads": 32},
    "mixtral": _AUX_LOSS
    | {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 1e6, "num_key_value_heads": 8},
    "qwen3_moe": _QWEN_DEFAULTS | _AUX_LOSS | {"norm_topk_prob": False, "num_key_value_heads": 4},
    "qwen2_moe": _QWEN_DEFAULTS
    | _AUX_LOSS
    | {"norm_topk_prob": False, "num_key_value_heads": 16, "qkv_bias": True, "shared_expert_intermediate_size": 5632},
    "glm4_moe": {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "norm_topk_prob": True,
        "partial_rotary_factor": 0.5,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "num_key_value_heads": 8,
    },
    "dots1": _QWEN_DEFAULTS
    | {"max_position_embeddings": 2048, "norm_topk_prob": False, "max_window_layers": 62, "num_key_value_heads": 32},
}
"""Defaults of transformers for keys missing from config.json, where model types differ."""

_OTHER_KINDS = {
    "qwen2": "its queries, keys and values have biases",
    "gpt2": "its norms and linear layers have biases, its feed-forward no gate",
    "gemma": "it has another kind of norm and of feed-forward",
    "phi": "its layers have biases or are merged",
}
"""Prefixes of well-known model types that this program lacks -> the reason."""

_MUST_BE = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "qkv_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "quantization_config": None,
}
"""Keys for which this program supports only one value."""


def folder_kind(path: Path) -> Literal["hugging_face", "checkpoint", "run"]:
    """The kind of folder that holds a model: config.json makes it one of Hugging Face, state.json a checkpoint, and checkpoints
    in it a run. Raises UnsupportedModel for any other path."""
    if (Path(path) / "config.json").is_file():
        return "hugging_face"
    if (Path(path) / "state.json").is_file():
        return "checkpoint"
    if any(Path(path).glob("checkpoints/step_*")):
        return "run"
    raise UnsupportedModel(
        f"{path}: is not a Hugging Face folder (config.json), a run (checkpoints) or a checkpoint (state.json); a model known "
        "only by its name must be downloaded first (hf download NAME --local-dir FOLDER)"
    )


def architecture(path: Path) -> dict[str, Any]:
    """Keys of `ModelConfig` for the model in any kind of folder (for a run: its newest checkpoint). Raises UnsupportedModel."""
    path, kind = Path(path), folder_kind(path)
    if kind == "hugging_face":
        return from_config(read_config(path), path / "config.json")
    found = [path] if kind == "checkpoint" else path.glob("checkpoints/step_*")
    newest = max(found, key=lambda folder: (len(folder.name), folder.name)) / "state.json"
    try:
        return json.loads(newest.read_bytes())["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedModel(f"{newest}: cannot be read ({error})") from None


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """The config.json, or another JSON file, of a Hugging Face folder. Raises UnsupportedModel."""
    path = Path(folder) / name
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
        config = json.loads(text) if len(text) <= _MAX_CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModel(
            f"{path}: cannot be read ({error}); give a folder written by save_pretrained or by this program"
        ) from None
    if not isinstance(config, dict):
        raise UnsupportedModel(f"{path}: is not a JSON object of at most {_MAX_CONFIG_BYTES} bytes")
    return config


def from_config(config: dict[str, Any], path: Path | str) -> dict[str, Any]:
    """Keys of `ModelConfig` that define the architecture, read from the contents of a config.json; sections are dicts.

    The only one of them that matters in training alone is `moe.aux_loss_weight`. Raises UnsupportedModel, which names `path`.
    """
    try:
        return _from_config(config)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{path}: {error}") from None
    except KeyError as error:
        raise UnsupportedModel(f"{path}: {error} is missing") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UnsupportedModel(f"{path}: has a value of a type that transformers does not write ({error})") from None


def _from_config(config: dict[str, Any]) -> dict[str, Any]:
    kind = config.get("model_type")
    if kind not in CLASSES:
        why = next((f" ({why})" for name, why in _OTHER_KINDS.items() if str(kind).startswith(name)), "")
        raise UnsupportedModel(f"model_type is {kind!r}{why}; allowed: {', '.join(CLASSES)}")
    given = _DEFAULTS[kind] | {key: value for key, value in config.items() if value is not None or key == "sliding_window"}
    for key, wanted in _MUST_BE.items():
        if given.get(key, wanted) != wanted:
            raise UnsupportedModel(f"{key} is {given[key]}; this program supports only {wanted}")
    heads = given["num_attention_heads"]
    old, new = config.get("rope_theta"), (config.get("rope_parameters") or {}).get("rope_theta")
    if old is not None and new is not None and old != new:  # transformers 4 reads the one, version 5 the other
        raise UnsupportedModel(f"rope_theta is {old:g} and, in rope_parameters, {new:g}; make them equal")
    theta, scaling = _rope(given)
    model = {
        **{key: given[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")},
        "num_attention_heads": heads,
        "num_key_value_heads": given.get("num_key_value_heads", heads),
        "head_dim": given.get("head_dim", given["hidden_size"] // heads),
        "intermediate_size": given["intermediate_size"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rms_norm_eps": float(given["rms_norm_eps"]),
        "sliding_window": _sliding_window(kind, given),
        "qk_norm": kind in _QK_NORM or bool(kind == "glm4_moe" and given.get("use_qk_norm", False)),
        "tie_word_embeddings": given.get("tie_word_embeddings", False),
        "moe": None,
    }
    if kind not in ("llama", "mistral", "qwen3"):
        model["moe"] = _moe(kind, given)
    return model


def _moe(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    experts = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts", "qwen2_moe": "num_experts"}
    experts = experts.get(kind, "n_routed_experts")
    shared = given.get("n_shared_experts", 0)
    if kind == "qwen2_moe":
        shared, rest = divmod(given["shared_expert_intermediate_size"], given["moe_intermediate_size"])
        if rest:
            raise UnsupportedModel("shared_expert_intermediate_size is not a multiple of moe_intermediate_size")
    return {
        "num_experts": given[experts] if experts in given else given["num_local_experts"],
        "num_experts_per_tok": given["num_experts_per_tok"],
        "num_shared_experts": shared,
        "moe_intermediate_size": given["intermediate_size" if kind == "mixtral" else "moe_intermediate_size"],
        "score": "sigmoid" if kind in _SIGMOID else "softmax",
        "norm_topk_prob": True if kind == "mixtral" else given["norm_topk_prob"],
        "routed_scaling_factor": float(given.get("routed_scaling_factor", 1.0)),
        **_aux_loss_weight(given),
    }


def _rope(given: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(rope_theta, rope_scaling)."""
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    theta = float(rope.get("rope_theta", given.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, dict) for value in rope.values()):
        raise UnsupportedModel("its layers have different rotary embeddings; this program supports one for all layers")
    rotated = rope.get("partial_rotary_factor", given.get("partial_rotary_factor", 1.0))
    if rotated != 1.0:
        raise UnsupportedModel(f"partial_rotary_factor is {rotated}; this program supports only 1.0")
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise UnsupportedModel(f"rope_type is {kind!r}; allowed: default, linear, llama3")
    scaling = {"kind": kind, "factor": float(rope["factor"])}
    if kind == "llama3":
        scaling |= {key: float(rope[key]) for key in ("low_freq_factor", "high_freq_factor")}
        key = "original_max_position_embeddings"  # given at the top level it wins, as in transformers
        scaling[key] = given.get(key) or rope.get(key) or given["max_position_embeddings"]
    return theta, scaling


def _sliding_window(kind: str, given: dict[str, Any]) -> int | None:
    window = given.get("sliding_window") or None
    if kind in ("qwen3", "qwen3_moe", "qwen2_moe") and not given.get("use_sliding_window", False):
        window = None
    if window is None or kind in ("llama", "glm4_moe"):
        return None
    if kind in ("qwen3", "qwen2_moe", "dots1"):
        layers = given["num_hidden_layers"]
        first = 1 if kind == "qwen2_moe" else min(max(0, given["max_window_layers"]), layers)  # in transformers they alternate
        default = ["full_attention"] * first + ["sliding_attention"] * (layers - first)
        kinds = set(given.get("layer_types", default))
        if len(kinds) > 1:
            raise UnsupportedModel("only some of its layers have a sliding window; this program supports all or none")
        return window if kinds == {"sliding_attention"} else None
    return window


# ---------------------------------------------------------------- weights


class HFTensor(NamedTuple):
    """A tensor in Hugging Face's files: a contiguous range of one of our flattened parameters (or buffers), times a factor."""

    name: str
    """Its name in the files."""
    shape: tuple[int, ...]
    parameter: str | None
    """Our parameter. None: we have no such parameter, and all values must be 0."""
    offset: int
    """Start of the range in our flattened parameter."""
    factor: float = 1.0
    """A power of two, so that it rounds no value."""

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def keep_fp32(self) -> bool:
        """The tensor is fp32 in a folder of any dtype."""
        return self.name.endswith(KEPT_FP32)


def tensors(model: ModelConfig) -> Iterator[HFTensor]:
    """Every tensor of the model's files, layer by layer. None of them includes the padding rows of the vocabulary."""
    kind, width, head_dim = model_type(model), model.hidden_size, model.head_dim
    query, key = model.num_attention_heads * head_dim, model.num_key_value_heads * head_dim
    attention = {"q_proj": (query, width), "k_proj": (key, width), "v_proj": (key, width), "o_proj": (width, query)}
    if model.qk_norm:
        attention |= {"q_norm": (head_dim,), "k_norm": (head_dim,)}

    def same(name: str, shape: tuple[int, ...]) -> HFTensor:
        return HFTensor(name, shape, name, 0)

    yield same("model.embed_tokens.weight", (model.vocab_size, width))
    for number in range(model.num_hidden_layers):
        layer = f"model.layers.{number}"
        yield same(f"{layer}.input_layernorm.weight", (width,))
        for name, shape in attention.items():
            yield same(f"{layer}.self_attn.{name}.weight", shape)
        yield same(f"{layer}.post_attention_layernorm.weight", (width,))
        if model.moe is None:
            yield from (same(*pair) for pair in _feed_forward(f"{layer}.mlp", width, model.intermediate_size))
            continue
        yield from _experts(kind, model, f"{layer}.mlp")
        if kind in _SIGMOID:
            yield same(f"{layer}.mlp.gate.{KEPT_FP32}", (model.moe.num_experts,))
            shared = model.moe.num_shared_experts * model.moe.moe_intermediate_size
            yield from (same(*pair) for pair in _feed_forward(f"{layer}.mlp.shared_experts", width, shared))
        if kind == "qwen2_moe":
            yield from _gated_shared_experts(model, f"{layer}.mlp")
    yield same("model.norm.weight", (width,))
    if not model.tie_word_embeddings:
        yield same("lm_head.weight", (model.vocab_size, width))


def _feed_forward(prefix: str, width: int, inner: int) -> Iterator[tuple[str, tuple[int, int]]]:
    yield f"{prefix}.gate_proj.weight", (inner, width)
    yield f"{prefix}.up_proj.weight", (inner, width)
    yield f"{prefix}.down_proj.weight", (width, inner)


def _experts(kind: str, model: ModelConfig, prefix: str) -> Iterator[HFTensor]:
    """Router and experts. The files hold one tensor per matrix of each expert; we hold all experts in one, gate above up."""
    moe, width, inner = model.moe, model.hidden_size, model.moe.moe_intermediate_size
    theirs = prefix.replace(".mlp", ".block_sparse_moe") if kind == "mixtral" else prefix
    gate, up, down = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    yield HFTensor(f"{theirs}.gate.weight", (moe.num_experts, width), f"{prefix}.gate.weight", 0)
    for expert in range(moe.num_experts):
        size, both = inner * width, f"{prefix}.experts.gate_up_proj"
        yield HFTensor(f"{theirs}.experts.{expert}.{gate}.weight", (inner, width), both, 2 * expert * size)
        yield HFTensor(f"{theirs}.experts.{expert}.{up}.weight", (inner, width), both, (2 * expert + 1) * size)
        yield HFTensor(f"{theirs}.experts.{expert}.{down}.weight", (width, inner), f"{prefix}.experts.down_proj", expert * size)


def _gated_shared_experts(model: ModelConfig, prefix: str) -> Iterator[HFTensor]:
    """In transformers a gate multiplies the shared experts: weights of 0 make it sigmoid(0) = 1/2, undone by a factor 2."""
    width, inner = model.hidden_size, model.moe.num_shared_experts * model.moe.moe_intermediate_size
    for name, shape in _feed_forward(f"{prefix}.shared_experts", width, inner):
        factor = 2.0 if name.endswith("down_proj.weight") else 1.0
        yield HFTensor(name.replace("shared_experts", "shared_expert"), shape, name, 0, factor)
    yield HFTensor(f"{prefix}.shared_expert_gate.weight", (1, width), None, 0)
