"""Attention equals its formula with masks, groups, windows and a cache; rotation equals multiplication of complex numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pretrain.model.attention import AttentionContext, KeyValueCache, attend, attention_context, frequencies, rotate
from pretrain.model.config import ModelConfig, RopeScalingConfig

CPU = torch.device("cpu")
T, C = 9, 8


def context(length: int = T, documents: list | None = None, start: int = 0, **settings) -> AttentionContext:
    config = ModelConfig(**dict(head_dim=C, rope_theta=1e4) | settings)
    cache = KeyValueCache(layers=1, capacity=0)
    cache.length = start
    return attention_context(config, length, CPU, None if documents is None else torch.tensor(documents), cache)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heads(key_heads: int = 2, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return random(batch, T, 4, C), random(batch, T, key_heads, C, seed=1), random(batch, T, key_heads, C, seed=2)


def formula(query_BTHC, key_BSKC, value_BSKC, visible_BTS):
    """The textbook formula, one head at a time."""
    out_BTHC = torch.empty_like(query_BTHC)
    group = query_BTHC.shape[2] // key_BSKC.shape[2]
    for head in range(query_BTHC.shape[2]):
        key, value = key_BSKC[:, :, head // group], value_BSKC[:, :, head // group]
        scores = query_BTHC[:, :, head] @ key.transpose(1, 2) / query_BTHC.shape[-1] ** 0.5
        out_BTHC[:, :, head] = scores.masked_fill(~visible_BTS, -torch.inf).softmax(-1) @ value
    return out_BTHC


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_causal_attention_equals_its_formula(key_heads):
    causal = torch.ones(T, T, dtype=torch.bool).tril()[None]
    torch.testing.assert_close(attend(*heads(key_heads), context()), formula(*heads(key_heads), causal))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
def test_preferring_cudnn_changes_no_result_and_breaks_no_graph(compiled):
    function = torch.compile(attend, fullgraph=True, backend="eager") if compiled else attend
    torch.testing.assert_close(function(*heads(), replace(context(), cudnn_first=True)), attend(*heads(), context()))


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize(
    "scaling",
    [
        dict(kind="linear", factor=4.0),
        dict(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
        dict(kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512),
    ],
    ids=["linear", "llama 3.1", "short"],
)
def test_scaled_frequencies_equal_those_of_transformers(scaling, theta):
    theirs = LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=131072)
    theirs.rope_parameters = {**scaling, "rope_type": scaling["kind"], "rope_theta": theta}
    expected_C, factor = ROPE_INIT_FUNCTIONS[scaling["kind"]](theirs, CPU)
    assert factor == 1
    found_C = frequencies(128, theta, RopeScalingConfig(**scaling), CPU)
    torch.testing.assert_close(found_C, expected_C, rtol=1e-5, atol=0)
    assert (found_C != frequencies(128, theta, None, CPU)).any()


@pytest.mark.parametrize("window", [None, 3, 5], ids=["all", "window 3", "window 5"])
@pytest.mark.parametrize("split", [[9], [1] * 9, [4, 5], [3, 1, 5], [8, 1]], ids=str)
def test_attention_in_parts_through_the_cache_equals_attention_at_once(split, window):
    query, key, value = heads()
    at_once = context(sliding_window=window)
    expected = attend(rotate(query, at_once), rotate(key, at_once), value, at_once)
    cache, got = KeyValueCache(layers=1, capacity=T), []
    for length in split:
        part = slice(cache.length, cache.length + length)
        here = context(length, start=cache.length, sliding_window=window)
        keys, values = cache.append(0, rotate(key[:, part], here), value[:, part])
        got.append(attend(rotate(query[:, part], here), keys, values, here))
        cache.length += length
    torch.testing.assert_close(torch.cat(got, 1), expected)


def test_a_full_cache_refuses_more_tokens():
    cache = KeyValueCache(layers=1, capacity=3)
    with pytest.raises(ValueError, match=r"3 tokens .* 4\b"):
        cache.append(0, random(1, 4, 2, 8), random(1, 4, 2, 8))


def test_rotation_is_multiplication_by_a_unit_complex_number():
    x_BTHC = random(1, 50, 3, 8)
    got = rotate(x_BTHC, context(50, rope_theta=500.0))
    complex_BTHC = torch.complex(x_BTHC[..., :4].double(), x_BTHC[..., 4:].double())
    angle_TC = torch.arange(50)[:, None].double() * 500.0 ** (-torch.arange(4).double() / 4)
    turned = complex_BTHC * torch.polar(torch.ones_like(angle_TC), angle_TC)[:, None]
    torch.testing.assert_close(got.double(), torch.cat((turned.real, turned.imag), -1), atol=1e-5, rtol=0)


def test_scores_depend_on_the_distance_alone():
    query, key = random(1, 1, 1, C), random(1, 1, 1, C, seed=1)

    def score(query_at: int, key_at: int) -> float:
        return (rotate(query, context(1, start=query_at)) * rotate(key, context(1, start=key_at))).sum().item()

    assert score(7, 3) == pytest.approx(score(1007, 1003), abs=1e-3)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


def test_angles_stay_fp32_under_autocast_and_rotation_keeps_the_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        here = context(4)
        assert here.cos_TC.dtype == here.sin_TC.dtype == torch.float32
        assert rotate(random(1, 4, 2, 8).bfloat16(), here).dtype == torch.bfloat16
