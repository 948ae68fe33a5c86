"""Attention against its formula, with masks, groups and a cache; rotary places against complex numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pretrain.model.attention import KeyValueCache, attend, attention_context, frequencies, rotate
from pretrain.model.config import RopeScalingConfig

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def formula(query_BTHC, key_BSKC, value_BSKC, visible_BTS):
    """One head at a time, by the book."""
    out_BTHC = torch.empty_like(query_BTHC)
    group = query_BTHC.shape[2] // key_BSKC.shape[2]
    for head in range(query_BTHC.shape[2]):
        key, value = key_BSKC[:, :, head // group], value_BSKC[:, :, head // group]
        scores = query_BTHC[:, :, head] @ key.transpose(1, 2) / query_BTHC.shape[-1] ** 0.5
        out_BTHC[:, :, head] = scores.masked_fill(~visible_BTS, -torch.inf).softmax(-1) @ value
    return out_BTHC


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_causal_attention_equals_its_formula(key_heads):
    query, key, value = random(2, 9, 4, 8), random(2, 9, key_heads, 8, seed=1), random(2, 9, key_heads, 8, seed=2)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None]
    torch.testing.assert_close(attend(query, key, value, attention_context(9, 8, 1e4, CPU)), formula(query, key, value, causal))


@pytest.mark.parametrize("key_heads", [4, 2])
def test_masked_attention_equals_its_formula(key_heads):
    query, key, value = random(2, 9, 4, 8), random(2, 9, key_heads, 8, seed=1), random(2, 9, key_heads, 8, seed=2)
    documents_BT = torch.tensor([[0] * 4 + [1] * 5, [0] * 8 + [1]])
    context = attention_context(9, 8, 1e4, CPU, documents_BT)
    torch.testing.assert_close(attend(query, key, value, context), formula(query, key, value, context.visible_BTS))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
def test_preferring_cudnn_changes_no_result_and_breaks_no_graph(compiled):
    query, key, value = random(2, 9, 4, 8), random(2, 9, 2, 8, seed=1), random(2, 9, 2, 8, seed=2)
    context = attention_context(9, 8, 1e4, CPU)
    function = torch.compile(attend, fullgraph=True, backend="eager") if compiled else attend
    got = function(query, key, value, replace(context, cudnn_first=True))
    torch.testing.assert_close(got, attend(query, key, value, context))


def test_mask_is_same_document_and_not_later():
    documents_BT = torch.tensor([[5, 5, 2, 2]])
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert attention_context(4, 8, 1e4, CPU, documents_BT).visible_BTS.int().tolist() == [expected]


@pytest.mark.parametrize("documents", [None, [0, 0, 0, 0, 0, 0, 1, 1, 1]], ids=["one document", "documents"])
@pytest.mark.parametrize("window", [1, 4, 9, 20])
def test_a_sliding_window_shows_as_many_tokens_as_it_says_itself_included(window, documents):
    documents_BT = None if documents is None else torch.tensor([documents])
    query, key, value = random(1, 9, 4, 8), random(1, 9, 2, 8, seed=1), random(1, 9, 2, 8, seed=2)
    seen_BTS = torch.zeros(1, 9, 9, dtype=torch.bool)
    for at in range(9):
        for key_at in range(max(0, at - window + 1), at + 1):
            seen_BTS[0, at, key_at] = documents is None or documents[at] == documents[key_at]
    context = attention_context(9, 8, 1e4, CPU, documents_BT, sliding_window=window)
    assert context.visible_BTS is not None or window >= 9  # else the fast causal kernel
    torch.testing.assert_close(attend(query, key, value, context), formula(query, key, value, seen_BTS))


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
def test_scaled_frequencies_are_those_of_transformers(scaling, theta):
    theirs = LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=131072)
    theirs.rope_parameters = {**scaling, "rope_type": scaling["kind"], "rope_theta": theta}
    expected_C, factor = ROPE_INIT_FUNCTIONS[scaling["kind"]](theirs, CPU)
    assert factor == 1
    found_C = frequencies(128, theta, RopeScalingConfig(**scaling), CPU)
    torch.testing.assert_close(found_C, expected_C, rtol=1e-5, atol=0)
    assert (found_C != frequencies(128, theta, None, CPU)).any()


@pytest.mark.parametrize("window", [None, 3, 5], ids=["all", "window 3", "window 5"])
@pytest.mark.parametrize("split", [[9], [1] * 9, [4, 5], [3, 1, 5], [8, 1]], ids=str)
def test_attention_in_pieces_through_the_cache_equals_attention_at_once(split, window):
    query, key, value = random(2, 9, 4, 8), random(2, 9, 2, 8, seed=1), random(2, 9, 2, 8, seed=2)
    whole = attention_context(9, 8, 1e4, CPU, sliding_window=window)
    expected = attend(rotate(query, whole), rotate(key, whole), value, whole)
    cache, got = KeyValueCache(layers=1, capacity=9), []
    for length in split:
        part = slice(cache.length, cache.length + length)
        context = attention_context(length, 8, 1e4, CPU, start=cache.length, sliding_window=window)
        keys, values = cache.append(0, rotate(key[:, part], context), value[:, part])
        got.append(attend(rotate(query[:, part], context), keys, values, context))
        cache.length += length
    torch.testing.assert_close(torch.cat(got, 1), expected)


def test_full_cache_refuses_more():
    cache = KeyValueCache(layers=1, capacity=3)
    with pytest.raises(ValueError, match="holds 3 tokens and 4 were given"):
        cache.append(0, random(1, 4, 2, 8), random(1, 4, 2, 8))


def test_rotation_is_multiplication_by_a_unit_complex_number():
    x_BTHC = random(1, 50, 3, 8)
    got = rotate(x_BTHC, attention_context(50, 8, 500.0, CPU))
    complex_BTHC = torch.complex(x_BTHC[..., :4].double(), x_BTHC[..., 4:].double())
    angle_TC = torch.arange(50)[:, None].double() * 500.0 ** (-torch.arange(4).double() / 4)
    turned = complex_BTHC * torch.polar(torch.ones_like(angle_TC), angle_TC)[:, None]
    torch.testing.assert_close(got.double(), torch.cat((turned.real, turned.imag), -1), atol=1e-5, rtol=0)


def test_scores_depend_on_the_distance_alone():
    query, key = random(1, 1, 1, 16), random(1, 1, 1, 16, seed=1)

    def score(at: int, other: int) -> float:
        context = attention_context(1, 16, 1e4, CPU, start=at), attention_context(1, 16, 1e4, CPU, start=other)
        return (rotate(query, context[0]) * rotate(key, context[1])).sum().item()

    assert score(7, 3) == pytest.approx(score(1007, 1003), abs=1e-3)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


def test_places_stay_fp32_under_autocast_and_rotation_keeps_the_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        context = attention_context(4, 8, 1e4, CPU)
        assert context.cos_TC.dtype == context.sin_TC.dtype == torch.float32
        assert rotate(random(1, 4, 2, 8).bfloat16(), context).dtype == torch.bfloat16
