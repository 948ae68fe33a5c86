"""The model equals Llama, Mistral and Qwen3 of transformers up to rounding, starts at a loss of ln V, and depends on its
settings and seed alone."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pretrain.engines.compile import compile_model
from pretrain.model import transformer
from pretrain.model.config import ModelConfig, MoeConfig, RopeScalingConfig, resolve_model
from pretrain.model.transformer import Transformer, build

V = 97  # not a multiple of 64: 31 padding rows


def resolved(vocab_size: int = V, **settings) -> ModelConfig:
    defaults = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return resolve_model(ModelConfig(**defaults | settings), vocab_size=vocab_size, sequence_length=32)


def some_tokens(*shape: int, vocab_size: int = V) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(1))


def reference(config: ModelConfig, model: Transformer) -> torch.nn.Module:
    """The model of transformers with the same weights."""
    kind, settings = (Qwen3ForCausalLM, Qwen3Config) if config.qk_norm else (LlamaForCausalLM, LlamaConfig)
    rope, extra = {"rope_type": "default", "rope_theta": config.rope_theta}, {}
    if config.rope_scaling:
        rope |= {"rope_type": config.rope_scaling.kind, **vars(config.rope_scaling)}
    if config.sliding_window:
        kind, settings = (kind, settings) if config.qk_norm else (MistralForCausalLM, MistralConfig)
        extra = {"sliding_window": config.sliding_window}
        extra |= {"use_sliding_window": True, "max_window_layers": 0} if config.qk_norm else {}
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    names += " rms_norm_eps tie_word_embeddings max_position_embeddings"
    shapes = {name: getattr(config, name) for name in names.split()}
    theirs = kind(settings(vocab_size=model.model.embed_tokens.weight.shape[0], rope_parameters=rope, **shapes, **extra))
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    return theirs.eval()


@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shape", [{}, {"head_dim": 24, "num_key_value_heads": 4, "rope_theta": 5e5}], ids=["grouped", "wide"])
def test_logits_and_gradients_equal_transformers(qk_norm, tied, shape):
    config = resolved(qk_norm=qk_norm, tie_word_embeddings=tied, **shape)
    model = build(config, "cpu", seed=0)
    with torch.no_grad():  # norm weights other than one, so that a misplaced norm or a wrong axis is noticed
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.mul_(torch.linspace(0.5, 1.5, parameter.numel()))
    theirs = reference(config, model)
    tokens_BT, labels_BT = some_tokens(3, 32), some_tokens(3, 32).flip(1)
    labels_BT[0, :5] = -100

    logits_BTV = theirs(tokens_BT).logits[..., :V]
    torch.testing.assert_close(model(tokens_BT), logits_BTV, atol=1e-5, rtol=0)

    count = (labels_BT != -100).sum()
    (F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="sum") / count).backward()
    (model(tokens_BT, labels_BT).loss_sum / count).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


LLAMA_3_1 = dict(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)


@pytest.mark.parametrize(
    "settings",
    [
        dict(sliding_window=7),
        dict(sliding_window=7, qk_norm=True),
        dict(rope_scaling=RopeScalingConfig(**LLAMA_3_1), rope_theta=100.0),
        dict(rope_scaling=RopeScalingConfig(kind="linear", factor=3.0)),
    ],
    ids=["mistral", "qwen3 with a window", "llama 3.1", "linear"],
)
def test_sliding_windows_and_rope_scaling_give_the_logits_and_gradients_of_transformers(settings):
    config, plain = resolved(**settings), resolved(qk_norm=settings.get("qk_norm", False))
    model, tokens_BT = build(config, "cpu", seed=0), some_tokens(2, 32)
    theirs = reference(config, model)
    logits_BTV = theirs(tokens_BT).logits[..., :V]
    torch.testing.assert_close(model(tokens_BT), logits_BTV, atol=1e-5, rtol=0)
    assert (build(plain, "cpu", seed=0)(tokens_BT) - logits_BTV).abs().max() > 1e-2  # the setting has an effect
    logits_BTV.logsumexp(-1).mean().backward()
    model(tokens_BT).logsumexp(-1).mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        rows = parameter.grad[:V] if name in ("lm_head.weight",) else parameter.grad
        torch.testing.assert_close(rows, expected[name].grad[: len(rows)], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_only_an_untied_model_has_its_own_head(tied):
    model = build(resolved(tie_word_embeddings=tied), "cpu", seed=0)
    assert ("lm_head.weight" in model.state_dict()) is not tied
    assert ("lm_head.weight" in dict(model.named_parameters())) is not tied


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_padding_rows_affect_neither_logits_nor_loss_nor_gradients(tied):
    model, tokens_BT = build(resolved(tie_word_embeddings=tied), "cpu", seed=0), some_tokens(2, 16)
    before = model(tokens_BT, tokens_BT).loss_sum.item()
    head = (model.model.embed_tokens if tied else model.lm_head).weight
    assert head.shape[0] == 128 and model(tokens_BT).shape == (2, 16, V)
    with torch.no_grad():
        head[V:] = 100.0
    loss_sum = model(tokens_BT, tokens_BT).loss_sum
    loss_sum.backward()
    assert loss_sum.item() == before
    assert not head.grad[V:].any() and head.grad[:V].any()


@pytest.mark.parametrize("vocab_size", [97, 1000, 50304])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("hidden_size", "layers"), [(64, 1), (64, 12), (256, 2), (512, 1), (1024, 2)])
def test_first_loss_is_ln_of_the_vocabulary(vocab_size, tied, hidden_size, layers):
    settings = dict(hidden_size=hidden_size, num_hidden_layers=layers, tie_word_embeddings=tied)
    config = resolved(vocab_size, **settings, intermediate_size=hidden_size)
    tokens_BT = some_tokens(2, 65, vocab_size=vocab_size)
    with torch.no_grad():
        loss = build(config, "cpu", seed=3)(tokens_BT[:, :-1], tokens_BT[:, 1:]).loss_sum.item() / 128
    assert abs(loss / math.log(vocab_size) - 1) < 0.03


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(0)
    first = build(resolved(), "cpu", seed=7).state_dict()
    torch.rand(13)
    torch.set_default_dtype(torch.float64)
    try:
        second = build(resolved(num_hidden_layers=3), "cpu", seed=7).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    other = build(resolved(), "cpu", seed=8).state_dict()
    for name, weight in first.items():
        assert weight.dtype == torch.float32
        if not name.endswith(("norm.weight", "o_proj.weight", "down_proj.weight")):  # the projections scale with the depth
            torch.testing.assert_close(second[name].float(), weight, atol=0, rtol=0)
            assert (other[name] != weight).float().mean() > 0.99
    names = [name for name in first if "q_proj" in name]
    assert (first[names[0]] != first[names[1]]).any(), "layers must not start equal"


@pytest.mark.parametrize("count", [1, 15, 16, 17, 63, 64, 65, 79, 80, 81, 200, 320])
def test_any_part_of_an_initial_weight_equals_that_part_of_one_draw(count, monkeypatch):
    """In blocks of 64 values; parts begin and end before, in and after the last 16 values, which may be drawn anew."""
    monkeypatch.setattr(transformer, "_DRAWN", 64)
    full = torch.empty(count).normal_(0.0, 0.3, generator=torch.Generator().manual_seed(5))
    for offset in range(0, count, 7):
        for end in {offset, offset + 1, (offset + count) // 2, count - 1, count}:
            part = torch.full((max(0, end - offset),), math.nan)
            transformer._draw_normal(part, offset, count, 0.3, torch.Generator().manual_seed(5))
            assert torch.equal(part, full[offset:end] if end > offset else full[:0]), (offset, end)


def test_a_weight_larger_than_a_block_is_drawn_as_ever():
    shape = (1031, 1031)  # a block of 2^20 values and a rest
    name, size = "model.embed_tokens.weight", math.prod(shape)
    model = build(resolved(), "cpu", seed=0)
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.blake2b(f"7:{name}".encode(), digest_size=8).digest(), "little")
    )
    expected = torch.empty(shape).normal_(0.0, model._initial_std(name, shape[-1]), generator=generator).view(-1)
    for offset, end in ((0, size), (size - 20_000, size), (1_000_000, 1_050_000)):
        part = torch.empty(end - offset)
        model.fill_initial(part, offset, name, shape, seed=7)
        assert torch.equal(part, expected[offset:end])


@pytest.mark.parametrize("moe", [None, MoeConfig(num_experts=4, num_shared_experts=1)], ids=["dense", "experts"])
def test_with_outputs_of_zero_each_block_begins_as_the_identity(moe):
    model, plain = (build(resolved(moe=moe, zero_init_outputs=zero), "cpu", seed=7) for zero in (True, False))
    for name, parameter in model.named_parameters():
        outputs = "o_proj" in name or "down_proj" in name
        expected = torch.zeros_like(parameter) if outputs else plain.get_parameter(name)
        assert torch.equal(parameter, expected) and not torch.signbit(parameter[parameter == 0]).any(), name
    tokens_BT = torch.arange(12).view(2, 6)
    with torch.no_grad():
        hidden_BTD = model.model.norm(model.model.embed_tokens(tokens_BT))
        assert torch.equal(model(tokens_BT), model.lm_head(hidden_BTD, None, None))


def test_building_fills_every_parameter_and_there_are_no_buffers(monkeypatch):
    expected, allocate = build(resolved(qk_norm=True), "cpu", seed=7).state_dict(), Transformer.to_empty

    def allocate_nan(model: Transformer, **options) -> None:
        allocate(model, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(math.nan)

    monkeypatch.setattr(Transformer, "to_empty", allocate_nan)
    model = build(resolved(qk_norm=True), "cpu", seed=7)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], atol=0, rtol=0)
    assert not list(model.buffers()), "a buffer would have to be filled too, and engines would cast it"


def test_building_and_training_draw_no_global_random_numbers():
    state = torch.get_rng_state()
    model = build(resolved(), "cpu", seed=0)
    model(some_tokens(2, 8), some_tokens(2, 8)).loss_sum.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_documents_do_not_see_each_other():
    model = build(resolved(), "cpu", seed=0)
    tokens_BT = some_tokens(2, 24)
    documents_BT = torch.tensor([[0] * 9 + [1] * 15, [3] * 1 + [4] * 20 + [5] * 3])
    logits_BTV = model(tokens_BT, documents_BT=documents_BT)
    changed_BT = tokens_BT.clone()
    changed_BT[0, 4] = (changed_BT[0, 4] + 1) % V
    difference_BT = (model(changed_BT, documents_BT=documents_BT) - logits_BTV).abs().amax(-1)
    assert difference_BT[0, 4:9].min() > 1e-6 and not difference_BT[0, 9:].any()
    for row, start, end in [(0, 0, 9), (0, 9, 24), (1, 0, 1), (1, 1, 21), (1, 21, 24)]:
        alone = model(tokens_BT[row : row + 1, start:end])[0]
        torch.testing.assert_close(logits_BTV[row, start:end], alone, atol=1e-5, rtol=0)


def test_one_document_equals_no_documents():
    model = build(resolved(), "cpu", seed=0)
    tokens_BT = some_tokens(2, 24)
    torch.testing.assert_close(model(tokens_BT, documents_BT=torch.zeros_like(tokens_BT)), model(tokens_BT), atol=1e-5, rtol=0)


def test_positions_never_see_later_tokens():
    model = build(resolved(), "cpu", seed=0)
    tokens_BT = some_tokens(1, 24)
    changed_BT = tokens_BT.clone()
    changed_BT[0, 11] = (changed_BT[0, 11] + 1) % V
    difference_T = (model(changed_BT) - model(tokens_BT)).abs().amax(-1)[0]
    assert not difference_T[:11].any() and difference_T[11:].min() > 1e-6


def test_bf16_autocast_stays_close_with_fp32_weights_and_gradients():
    tokens_BT, labels_BT = some_tokens(2, 32), some_tokens(2, 32).flip(1)
    losses, gradients = [], []
    for enabled in (False, True):
        model = build(resolved(qk_norm=True), "cpu", seed=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss_sum = model(tokens_BT, labels_BT).loss_sum
        loss_sum.backward()
        assert loss_sum.dtype == torch.float32
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        losses.append(loss_sum.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[0] != losses[1], "autocast had no effect"
    assert abs(losses[1] / losses[0] - 1) < 2e-3
    assert F.cosine_similarity(*gradients, dim=0) > 0.998


def test_the_residual_stream_is_bf16_under_autocast():
    model = build(resolved(), "cpu", seed=0)
    seen = []
    model.model.layers[1].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(some_tokens(1, 8))
    assert seen == [torch.bfloat16]


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_compiled_parts_give_the_same_loss_and_gradients(documents):
    tokens_BT, labels_BT = some_tokens(2, 32), some_tokens(2, 32).flip(1)
    documents_BT = torch.arange(32).div(10, rounding_mode="floor").expand(2, 32) if documents else None
    results = []
    for compiled in (False, True):
        model = build(resolved(), "cpu", seed=0)
        names = list(model.state_dict())
        if compiled:
            compile_model(model, "blocks")
        assert list(model.state_dict()) == names
        loss_sum = model(tokens_BT, labels_BT, documents_BT).loss_sum
        loss_sum.backward()
        results.append((loss_sum.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-3, rtol=1e-3)
