"""Generation equals a loop without a cache and transformers, draws from the right distribution, and streams full characters."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from pretrain.generate import GenerationError, choose, generate, generate_batch, stream_text
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.model.transformer import Transformer, build
from tests.models import make_hf_folder, model_of, stir
from tests.test_transformer import reference

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def small_model(**settings) -> Transformer:
    config = ModelConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_multiple=1, **settings
    )
    model = build(resolve_model(config, vocab_size=97, sequence_length=16), "cpu", seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # far from uniform, so that a wrong position or mask changes the ids
    return model


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True, "tie_word_embeddings": True}], ids=["llama", "qwen3"])
def test_greedy_generation_equals_a_loop_without_a_cache_and_transformers(settings):
    model = small_model(**settings)
    got = list(generate(model, PROMPT, 40, temperature=0))  # three times the sequence length
    ids = list(PROMPT)
    for _ in range(40):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert got == ids[len(PROMPT) :] and len(set(got)) > 3
    theirs = reference(model.config, model).generate(
        torch.tensor([PROMPT]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert got == theirs[0, len(PROMPT) :].tolist()


PROMPTS = [PROMPT, [7], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9], [31, 41, 59]]


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen3", "qwen3_moe", "dots1"])
def test_a_batch_of_prompts_of_any_length_equals_each_alone_and_transformers(family, tmp_path):
    model = build(model_of(family), "cpu", seed=5)
    stir(model)
    steps = list(generate_batch(model, PROMPTS, 24, temperature=0))
    for prompt, got in zip(PROMPTS, zip(*steps, strict=True), strict=True):
        assert list(generate(model, prompt, 24, temperature=0)) == list(got)
    theirs = theirs_of(model, tmp_path)
    longest = max(map(len, PROMPTS))
    padded_BT = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    out_BT = theirs.generate(
        padded_BT, attention_mask=mask_BT, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert out_BT[:, longest:].tolist() == [list(got) for got in zip(*steps, strict=True)]


def theirs_of(model: Transformer, folder):
    """The model of transformers with the same weights."""

    class Source:
        def __init__(self):
            self.model = model.config

        def read(self, name, start, into):
            into.copy_(model.state_dict()[name].flatten()[start : start + len(into)])

    return AutoModelForCausalLM.from_pretrained(make_hf_folder(folder, Source()))


def test_each_text_of_a_batch_ends_and_draws_as_if_alone():
    model = small_model()
    alone = [list(generate(model, prompt, 20, temperature=2.0, seed=3 + i)) for i, prompt in enumerate(PROMPTS)]
    steps = list(generate_batch(model, PROMPTS, 20, temperature=2.0, seed=3))
    assert [list(got) for got in zip(*steps, strict=True)] == alone
    stop_id = alone[0][4]
    steps = list(generate_batch(model, PROMPTS, 20, temperature=2.0, seed=3, stop_ids={stop_id}))
    for got, full in zip(zip(*steps, strict=True), alone, strict=True):
        kept = full[: full.index(stop_id)] if stop_id in full else full
        assert list(got) == (kept + [None] * 20)[: len(steps)]


def test_the_same_seed_gives_the_same_ids_and_leaves_the_global_generator_alone():
    model = small_model()
    state = torch.get_rng_state()
    runs = [list(generate(model, PROMPT, 20, temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_generation_ends_before_the_first_stop_id():
    model = small_model()
    ids = list(generate(model, PROMPT, 20, temperature=0))
    for stop_ids in ({ids[7]}, {ids[12], ids[7]}):
        kept = list(itertools.takewhile(lambda token, stop_ids=stop_ids: token not in stop_ids, ids))
        assert list(generate(model, PROMPT, 20, temperature=0, stop_ids=stop_ids)) == kept
    assert list(generate(model, PROMPT, 0)) == []


def test_the_caller_runs_with_gradients_between_tokens():
    for _ in generate(small_model(), PROMPT, 2):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("prompt_ids", "settings"),
    [
        ([], {}),
        ([97], {}),
        ([-1], {}),
        ([1], {"temperature": -1}),
        ([1], {"top_p": 0}),
        ([1], {"top_p": 1.5}),
        ([1], {"top_k": -1}),
    ],
)
def test_bad_prompts_and_settings_are_refused_on_the_call(prompt_ids, settings):
    with pytest.raises(GenerationError):
        generate(small_model(), prompt_ids, 5, **settings)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_reported(temperature):
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.nan
    with pytest.raises(GenerationError, match="not finite"):
        list(generate(model, PROMPT, 5, temperature=temperature))


def drawn(logits: list[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, times: int = 300) -> Counter:
    generator = torch.Generator().manual_seed(0)
    return Counter(choose(torch.tensor(logits), temperature, top_k, top_p, generator) for _ in range(times))


def test_draws_follow_the_distribution():
    probabilities = [0.1, 0.5, 0.15, 0.25]
    logits = [math.log(p) for p in probabilities]
    for temperature in (1.0, 0.5):
        weights = [p ** (1 / temperature) for p in probabilities]
        counts = drawn(logits, temperature, times=4000)
        for token, weight in enumerate(weights):
            assert counts[token] / 4000 == pytest.approx(weight / sum(weights), abs=0.03)


def test_top_k_and_top_p_cut_the_tail_and_keep_the_order():
    logits = [math.log(p) for p in [0.1, 0.5, 0.15, 0.25]]
    assert set(drawn(logits, top_k=2)) == {1, 3}
    assert set(drawn(logits, top_k=99)) == {0, 1, 2, 3}
    assert set(drawn(logits, top_p=0.4)) == {1}
    assert set(drawn(logits, top_p=0.6)) == {1, 3}
    assert set(drawn(logits, top_p=0.8)) == {1, 2, 3}
    assert set(drawn(logits, top_k=3, top_p=0.5)) == {1}, "0.5 / 0.9 is above one half"
    kept = drawn(logits, top_k=2, times=4000)
    assert kept[1] / 4000 == pytest.approx(2 / 3, abs=0.03)
    assert set(drawn(logits, temperature=0)) == {1}


def decode_bytes(ids: list[int]) -> str:
    """Decodes bytes: the hardest case, because every character outside ASCII takes several ids."""
    return bytes(ids).decode("utf-8", errors="replace")


@given(prompt=st.text(max_size=8), text=st.text(max_size=30))
def test_streamed_pieces_join_to_the_text_and_are_full_characters(prompt, text):
    pieces = list(stream_text(decode_bytes, list(prompt.encode()), iter(text.encode())))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    if text.isascii():
        assert pieces == list(text)


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    assert "".join(stream_text(decode_bytes, list(b"a"), iter([0x62, 0xE2, 0x82]))) == "b" + b"\xe2\x82".decode(
        errors="replace"
    )
