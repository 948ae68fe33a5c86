"""Attention within documents and windows equals the textbook formula, and costs what is visible: no T x T tensor, no work on
other documents, no recompilation for new ones."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pretrain.engines.compile import checkpoint_activations
from pretrain.generate import generate
from pretrain.model import masked
from pretrain.model.attention import AttentionContext, attend, attention_context
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.model.masked import block_mask, first_visible, flex_attention, masked_attention
from pretrain.model.transformer import build
from tests.models import LINEAR, LLAMA3, stir
from tests.test_attention import formula
from tests.test_transformer import reference

CPU = torch.device("cpu")
T = 300  # three tiles of the block mask and three blocks of queries, the last ones incomplete
LENGTHS = {  # of the documents in each of two rows
    "two rows": ([1, 1, 130, 1, 20, 30, 40, 77], [299, 1]),
    "one document": ([T], [T]),
    "single tokens": ([1] * T, [1] * T),
    "ends at tiles": ([128, 128, 44], [64, 64, 128, 44]),
}
WINDOWS = [None, 1, 5, 100, 150, T]


def documents(lengths: tuple[list[int], ...]) -> torch.Tensor:
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])


def visible(documents_BT: torch.Tensor | None, window: int | None, length: int = T) -> torch.Tensor:
    """The T x T mask, from its definition."""
    distance_TS = torch.arange(length)[:, None] - torch.arange(length)
    visible_BTS = ((distance_TS >= 0) & (distance_TS < (window or length)))[None]
    return visible_BTS if documents_BT is None else visible_BTS & (documents_BT[:, :, None] == documents_BT[:, None, :])


def heads(key_heads: int = 2, length: int = T, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, length, count, 16) for count in (4, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def tiny(**settings) -> ModelConfig:
    config = ModelConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, **settings)
    return resolve_model(config, vocab_size=97, sequence_length=T)


def results(function, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and the gradients of its sum with fixed random weights."""
    out_BTHC = function(*tensors)
    weights = torch.randn(out_BTHC.shape, generator=torch.Generator().manual_seed(1))
    return [out_BTHC, *torch.autograd.grad((out_BTHC * weights).sum(), tensors)]


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", [None, *LENGTHS])
def test_output_and_gradients_equal_the_formula(lengths, window, key_heads):
    documents_BT = None if lengths is None else documents(LENGTHS[lengths])
    context = attention_context(ModelConfig(head_dim=16, rope_theta=1e4, sliding_window=window), T, CPU, documents_BT)
    visible_BTS = visible(documents_BT, window)
    for got, expected in zip(
        results(functools.partial(attend, context=context), heads(key_heads)),
        results(functools.partial(formula, visible_BTS=visible_BTS), heads(key_heads)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_in_bf16_the_gradient_of_a_key_is_rounded_once():
    """Its shares from the blocks of queries add up in fp32, so the error is that of attention without a window."""
    length, gradients = 2048, {}
    first_RT = first_visible(length, CPU, None, length - 1)
    assert len(masked._blocks(first_RT[0])) == 16
    for name, dtype in (("exact", torch.float32), ("windowed", torch.bfloat16), ("causal", torch.bfloat16)):
        query, key, value = (x[:, :, :2].detach().requires_grad_() for x in heads(length=length, dtype=dtype))
        first = torch.zeros_like(first_RT) if name == "causal" else first_RT
        masked_attention(query, key, value, first)[0].sum().backward()
        gradients[name] = value.grad[:, :64].float()  # of the keys that all blocks see
        assert value.grad.dtype == dtype
    error = {name: (gradient - gradients["exact"]).norm().item() for name, gradient in gradients.items()}
    assert error["windowed"] < 1.1 * error["causal"], error


@pytest.mark.parametrize("window", [None, 5, 150])
@pytest.mark.parametrize(
    "settings",
    [dict(num_key_value_heads=2), dict(qk_norm=True), dict(reset_positions=True)],
    ids=["groups", "qk_norm", "reset_positions"],
)
def test_packed_documents_give_the_logits_and_gradients_of_each_alone(settings, window):
    config = ModelConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, sliding_window=window
    )
    model = build(resolve_model(ModelConfig(**{**vars(config), **settings}), vocab_size=97, sequence_length=T), "cpu", seed=0)
    tokens_BT = torch.randint(0, 97, (2, T), generator=torch.Generator().manual_seed(0))
    weights_BTV = torch.randn(2, T, 97, generator=torch.Generator().manual_seed(1)) / T
    logits_BTV = model(tokens_BT, documents_BT=documents(LENGTHS["two rows"]))
    packed = torch.autograd.grad((logits_BTV * weights_BTV).sum(), list(model.parameters()))
    total = 0.0
    for row, lengths in enumerate(LENGTHS["two rows"]):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            alone_TV = model(tokens_BT[row : row + 1, start:end])[0]
            torch.testing.assert_close(logits_BTV[row, start:end], alone_TV, atol=1e-5, rtol=0)
            total = total + (alone_TV * weights_BTV[row, start:end]).sum()
    for got, expected in zip(packed, torch.autograd.grad(total, list(model.parameters())), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def positions_of(lengths: tuple[list[int], ...]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])


@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3], ids=["unscaled", "linear", "llama3"])
@pytest.mark.parametrize("part, parts", [(0, 1), (0, 3), (1, 3), (2, 3)])
def test_reset_positions_are_those_of_each_document_alone(part, parts, scaling):
    """Bit for bit, which the logits cannot show: scores depend only on differences of positions."""
    exchange = None if parts == 1 else SimpleNamespace(part=part, parts=parts)
    documents_BT = documents(LENGTHS["two rows"])
    config = tiny(reset_positions=True, rope_scaling=scaling)
    context = attention_context(config, T // parts, CPU, documents_BT, exchange=exchange)
    alone = attention_context(tiny(rope_scaling=scaling), T, CPU)
    positions = positions_of(LENGTHS["two rows"]).chunk(parts, 1)[part]
    assert torch.equal(context.cos_TC, alone.cos_TC[positions]) and torch.equal(context.sin_TC, alone.sin_TC[positions])
    off = attention_context(tiny(rope_scaling=scaling), T // parts, CPU, documents_BT, exchange=exchange)
    assert torch.equal(off.cos_TC, alone.cos_TC.chunk(parts)[part])


@pytest.mark.parametrize("window", [None, 5, 150])
@pytest.mark.parametrize("settings", [{}, dict(rope_scaling=LINEAR), dict(rope_scaling=LLAMA3), dict(qk_norm=True)])
def test_packed_documents_give_the_logits_of_transformers_with_position_ids(settings, window):
    """With positions that start again, transformers 5 lets tokens see their own document only."""
    config = tiny(reset_positions=True, sliding_window=window, **settings)
    model = build(config, "cpu", seed=0)
    stir(model)
    tokens_BT = torch.randint(0, 97, (2, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits_BTV = model(tokens_BT, documents_BT=documents(LENGTHS["two rows"]))
        theirs = reference(config, model)(tokens_BT, position_ids=positions_of(LENGTHS["two rows"]), use_cache=False)
    torch.testing.assert_close(logits_BTV, theirs.logits[..., :97], atol=1e-4, rtol=0)  # `stir` enlarges rounding


@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["unscaled", "llama3"])
def test_reset_positions_leave_generation_as_it_is(scaling):
    """A text that is generated is one document."""
    texts = []
    for reset in (False, True):
        model = build(tiny(reset_positions=reset, rope_scaling=scaling), "cpu", seed=0)
        stir(model)
        texts.append(list(generate(model, [3, 1, 4, 1, 5], 24, temperature=0)))
    assert texts[0] == texts[1] and len(set(texts[0])) > 3


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_memory_does_not_grow_with_the_square_of_the_length(packed, window):
    largest = {}
    for length in (1024, 4096):
        documents_BT = (torch.arange(length) // 100).expand(2, length) if packed else torch.zeros(2, length)
        first_RT = first_visible(length, CPU, documents_BT, window)
        query, key, value = heads(length=length)
        with torch.profiler.profile(profile_memory=True) as profile:
            masked_attention(query, key, value, first_RT)[0].sum().backward()
        largest[length] = max(event.cpu_memory_usage for event in profile.events())
    assert largest[4096] <= 4.2 * largest[1024]
    assert largest[4096] < 4096 * 4096


def test_only_what_is_visible_is_computed():
    """Pairs of query and key in the kernel's calls, against all T x T of them."""

    def pairs(documents_BT, window, length=4096):
        first_T = first_visible(length, CPU, documents_BT, window)[0]
        return sum((end - start) * (end - key) for start, end, key, _ in masked._blocks(first_T)) / length

    assert pairs((torch.arange(4096) // 512)[None], None) == 512
    assert pairs(torch.arange(4096)[None], None) == masked._SHORT
    assert pairs(None, 256) < 256 + masked._BLOCK
    assert pairs((torch.arange(4096) // 1024)[None], 256) < 256 + masked._BLOCK


def test_every_query_is_computed_once():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        documents_BT = (torch.rand(1, 500, generator=generator) < 0.03).cumsum(1)
        window = int(torch.randint(1, 500, (), generator=generator))
        first_T = first_visible(500, CPU, documents_BT, window)[0]
        blocks = masked._blocks(first_T)
        assert [start for start, *_ in blocks] == [0, *(end for _, end, *_ in blocks)][:-1] and blocks[-1][1] == 500
        for start, end, key, causal in blocks:
            assert key <= first_T[start] <= start
            assert not causal or (key == start and (first_T[start:end] == start).all())


def test_the_operator_holds_the_contract_of_custom_operators():
    """Fake results like the real ones, no aliases, gradients that are registered: what compilers and dry runs rely on."""
    first_RT = first_visible(T, CPU, documents(LENGTHS["two rows"]), 100)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(masked_attention, (*heads(dtype=dtype), first_RT), atol=1e-2, rtol=1e-2)


def test_new_documents_compile_nothing():
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=False)
    config = ModelConfig(head_dim=16, rope_theta=1e4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in LENGTHS.values():
            context = attention_context(config, T, CPU, documents(lengths))
            eager = results(functools.partial(attend, context=context), heads())
            for got, expected in zip(results(functools.partial(compiled, context=context), heads()), eager, strict=True):
                torch.testing.assert_close(got, expected)


class _Count(TorchDispatchMode):
    def __init__(self, operation):
        super().__init__()
        self.operation, self.calls = operation, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function is self.operation
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("how", "calls"), [("full", 4), ("selective", 2)])
def test_selective_checkpointing_computes_attention_once(how, calls):
    model = build(tiny(), "cpu", seed=0)
    checkpoint_activations(model, how)
    tokens_BT = torch.zeros(2, T, dtype=torch.int64)
    with _Count(torch.ops.pretrain.masked_attention.default) as counted:
        model(tokens_BT, tokens_BT, documents(LENGTHS["two rows"])).loss_sum.backward()
    assert counted.calls == calls


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_flops_are_counted_as_those_of_attention_without_a_mask(fake):
    documents_BT = documents(LENGTHS["two rows"])
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext(), FlopCounterMode(display=False) as counter:
        masked_attention(*heads(4), first_visible(T, CPU, documents_BT, None))[0].sum().backward()
    product = 2 * 2 * 4 * T * T * 16  # batch 2, 4 heads of 16
    assert counter.get_total_flops() == 7 * product  # 2 forward, 5 backward


# ---------------------------------------------------------------- the kernel of GPUs


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", [None, *LENGTHS])
def test_the_tiles_of_the_block_mask_are_those_that_all_pairs_give(lengths, window):
    documents_BT = None if lengths is None else documents(LENGTHS[lengths])
    visible_BTS = visible(documents_BT, window)
    found = block_mask(first_visible(T, CPU, documents_BT, window))
    expected = create_block_mask(
        lambda row, head, query, key: visible_BTS[row, query, key], len(visible_BTS), None, T, T, device="cpu"
    )
    assert found.shape[-2:] == (T, T)
    for name in ("kv", "full_kv", "q", "full_q"):
        count = getattr(found, f"{name}_num_blocks")
        assert torch.equal(count, getattr(expected, f"{name}_num_blocks")), name
        used = torch.arange(3) < count[..., None]
        indices, wanted = (getattr(mask, f"{name}_indices") for mask in (found, expected))
        assert torch.equal(indices[used], wanted[used]) and indices.dtype == torch.int32, name


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("lengths", [None, "two rows"])
def test_flex_attention_equals_the_formula(lengths, window, key_heads, monkeypatch):
    from torch.nn.attention import flex_attention as flex

    monkeypatch.setattr(masked, "_compiled_kernel", lambda: flex.flex_attention)  # a C++ compiler takes half a minute
    documents_BT = None if lengths is None else documents(LENGTHS[lengths])
    mask = block_mask(first_visible(T, CPU, documents_BT, window))
    found = flex_attention(*(tensor.detach() for tensor in heads(key_heads)), mask)  # no backward pass on CPUs
    torch.testing.assert_close(found, formula(*heads(key_heads), visible(documents_BT, window)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inside", [False, True], ids=["mask outside", "mask inside"])
def test_flex_attention_breaks_no_graph_and_new_documents_compile_nothing(inside):
    """With `engine.compile: blocks` the mask is made outside of the compiled graph, with `model` inside."""

    torch.compiler.reset()  # `run` of the other case

    def run(qkv, first_RT, mask):
        mask = block_mask(first_RT) if inside else mask
        return attend(*qkv, AttentionContext(None, None, block_mask=mask))

    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in LENGTHS.values():
            first_RT = first_visible(T, CPU, documents(lengths), None)
            qkv = [tensor.detach() for tensor in heads()]  # no backward pass on CPUs
            found = compiled(qkv, first_RT, None if inside else block_mask(first_RT))
            torch.testing.assert_close(found, formula(*heads(), visible(documents(lengths), None)), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("lengths", [None, "two rows"])
def test_on_a_gpu_output_and_gradients_equal_those_of_the_cpu(lengths, window, compiled):
    documents_BT = None if lengths is None else documents(LENGTHS[lengths])
    config = ModelConfig(head_dim=16, rope_theta=1e4, sliding_window=window)
    function = torch.compile(attend, fullgraph=True, dynamic=False) if compiled else attend
    expected = results(functools.partial(attend, context=attention_context(config, T, CPU, documents_BT)), heads())
    cuda = torch.device("cuda")
    context = attention_context(config, T, cuda, None if documents_BT is None else documents_BT.to(cuda))
    tensors = [tensor.detach().to(cuda, torch.bfloat16).requires_grad_() for tensor in heads()]
    out_BTHC = function(*tensors, context)
    weights = torch.randn(out_BTHC.shape, generator=torch.Generator().manual_seed(1)).to(cuda)
    found = [out_BTHC, *torch.autograd.grad((out_BTHC * weights).sum(), tensors)]
    for got, wanted in zip(found, expected, strict=True):
        assert (got.cpu().float() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_mask_is_made_without_waiting_for_the_device():
    documents_BT = documents(LENGTHS["two rows"]).cuda()
    config = ModelConfig(head_dim=16, rope_theta=1e4, sliding_window=100)
    attention_context(config, T, documents_BT.device, documents_BT)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_context(config, T, documents_BT.device, documents_BT)
    finally:
        torch.cuda.set_sync_debug_mode("default")
