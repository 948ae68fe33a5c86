"""Counts computed from settings equal those of the built model."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.model.config import ModelConfig, resolve_model
from pretrain.model.flops import attended, flops_per_token, num_parameters, state_bytes, vocabulary_rows
from pretrain.model.transformer import Transformer

SHAPES = [
    dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, qk_norm=True, vocab_multiple=1),
    dict(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=2, head_dim=32, tie_word_embeddings=True, intermediate_size=80
    ),
    dict(hidden_size=2048, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, intermediate_size=5632),
]


def resolved(vocab_size: int = 97, **settings) -> ModelConfig:
    return resolve_model(ModelConfig(**settings), vocab_size=vocab_size, sequence_length=32)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameter_counts_equal_the_built_model(shape):
    config = resolved(**shape)
    with torch.device("meta"):
        parameters = dict(Transformer(config).named_parameters())
    counted = num_parameters(config)
    assert counted.total == sum(p.numel() for p in parameters.values())
    assert counted.embedding == parameters["model.embed_tokens.weight"].numel()
    blocks = sum(p.numel() for name, p in parameters.items() if "_proj" in name)
    assert counted.matmul == blocks + config.vocab_size * config.hidden_size


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_equal_those_that_torch_counts_in_a_forward_pass(shape):
    config = resolved(vocab_size=128, **shape)  # without padding rows, which are executed but not counted
    length = 32
    with torch.device("meta"):
        model, tokens_BT = Transformer(config), torch.zeros(1, length, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens_BT)
    assert flops_per_token(config, length) == 3 * counter.get_total_flops() / length  # backward: twice the forward


def test_causal_flops_halve_only_attention():
    config = resolved(**SHAPES[1])
    full, causal = flops_per_token(config, 512), flops_per_token(config, 512, causal=True)
    assert full - causal == 6 * 3 * 64 * 512
    assert 2 * causal - full == 6 * num_parameters(config).matmul


@pytest.mark.parametrize("window", [1, 16, 512, 1000])
def test_with_a_sliding_window_flops_count_only_the_keys_in_the_window(window):
    config, length = resolved(**SHAPES[1], sliding_window=window), 512
    products = 6 * num_parameters(config).matmul
    keys = (flops_per_token(config, length) - products) / (12 * 3 * 64)
    seen = (flops_per_token(config, length, causal=True) - products) / (12 * 3 * 64)
    assert keys == min(window, length)
    mean = sum(min(at + 1, window) for at in range(length)) / length
    assert mean - 0.5 <= seen <= mean  # a token's own key counts by half, as without a window


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_of_documents_only_pairs_of_tokens_that_may_see_each_other_count(window):
    lengths, causal = [1, 2, 9, 4, 16], 0.0
    for length in lengths:
        mean = sum(min(at + 1, window or length) for at in range(length))
        causal += mean - min(length, window or length) / 2  # see above: half of the diagonal of the part that grows
    pairs = attended(lengths, window)
    assert pairs == (32, sum(n * min(n, window or n) for n in lengths), causal)
    config, products = resolved(**SHAPES[1]), 6 * num_parameters(resolved(**SHAPES[1])).matmul
    assert flops_per_token(config, 512, pairs=pairs) == products + 12 * 3 * 64 * pairs.full / 32
    assert flops_per_token(config, 512, causal=True, pairs=pairs) == products + 12 * 3 * 64 * pairs.causal / 32
    assert attended([512], window) == attended([512], window and min(window, 512))


def test_tinyllama_has_its_published_size():
    config = resolved(vocab_size=32000, **SHAPES[3])
    assert num_parameters(config).total == 1_100_048_384
    assert flops_per_token(config, 2048) == pytest.approx(7.31e9, rel=1e-3)
    assert state_bytes(config) == 12 * 1_100_048_384


def test_vocabulary_rows_round_up():
    assert [vocabulary_rows(resolved(vocab_size=v)) for v in (1, 64, 65, 50257)] == [64, 64, 128, 50304]
    assert vocabulary_rows(resolved(vocab_size=97, vocab_multiple=1)) == 97
