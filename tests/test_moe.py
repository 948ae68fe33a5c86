"""Mixtures of experts equal those of transformers and drop no token, and their router losses do not depend on the split."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch._functorch.aot_autograd import aot_module
from torch._functorch.compilers import nop
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from transformers import (
    Dots1Config,
    Dots1ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from pretrain.checkpoint import storage
from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.data.batches import Batch
from pretrain.engines.base import Engine
from pretrain.engines.compile import checkpoint_activations
from pretrain.engines.start import start_engine
from pretrain.invariance import Case, check_invariance, small_model
from pretrain.model.attention import KeyValueCache
from pretrain.model.config import ModelConfig, MoeConfig, resolve_model
from pretrain.model.flops import num_parameters
from pretrain.model.moe import Experts, _router_logits, grouped_product
from pretrain.model.transformer import LossOutput, Transformer, build
from pretrain.optim.optimizer import build_optimizer
from pretrain.report.metrics import Meter, routing_figures
from pretrain.train import train_step
from tests.ranks import run_ranks
from tests.saving import save

V, T = 61, 16
SIGMOID = dict(score="sigmoid", num_shared_experts=2, routed_scaling_factor=1.7, bias_update_rate=0.01)


def resolved(layers: int = 2, qk_norm: bool = True, **moe) -> ModelConfig:
    defaults = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)
    shape = dict(hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, vocab_multiple=1)
    model = ModelConfig(**shape, qk_norm=qk_norm, moe=MoeConfig(**defaults | moe))
    return resolve_model(model, vocab_size=V, sequence_length=T)


def some_tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def some_labels(*shape: int) -> torch.Tensor:
    """The first sequence has few valid labels, the last one has none."""
    labels_BT = some_tokens(*shape, seed=2)
    labels_BT[0, 3:] = -100
    labels_BT[-1] = -100
    return labels_BT


def window_of(sequences: int, micro_batch: int | None = None) -> list[Batch]:
    size = micro_batch or sequences
    parts = zip(some_tokens(sequences, T).split(size), some_labels(sequences, T).split(size), strict=True)
    return [Batch(tokens_BT, labels_BT, None) for tokens_BT, labels_BT in parts]


def reference(model: Transformer) -> torch.nn.Module:
    """The model of transformers with the same weights; their names and shapes must match exactly."""
    config, moe = model.config, model.config.moe
    names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim rms_norm_eps vocab_size"
    given = {name: getattr(config, name) for name in names.split()}
    given |= dict(num_experts_per_tok=moe.num_experts_per_tok, output_router_logits=True)
    given |= dict(rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, attn_implementation="eager")
    own = dict(moe_intermediate_size=moe.moe_intermediate_size, norm_topk_prob=moe.norm_topk_prob)
    if moe.score == "sigmoid":
        shared = dict(n_shared_experts=moe.num_shared_experts, routed_scaling_factor=moe.routed_scaling_factor)
        theirs = Dots1ForCausalLM(Dots1Config(**given, **own, **shared, n_routed_experts=moe.num_experts))
    elif config.qk_norm:
        theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**given, **own, num_experts=moe.num_experts))
    else:
        size = moe.moe_intermediate_size
        theirs = MixtralForCausalLM(MixtralConfig(**given, intermediate_size=size, num_local_experts=moe.num_experts))
    theirs.load_state_dict(model.state_dict())
    return theirs.eval()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def run(model: Transformer, tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> tuple[LossOutput, dict[str, torch.Tensor]]:
    """The output, and the gradients of loss_sum."""
    out = model(tokens_BT, labels_BT)
    out.loss_sum.backward()
    return out, gradients(model)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


# ---------------------------------------------------------------- the results of transformers


@pytest.mark.parametrize(
    ("qk_norm", "moe"),
    [(True, {}), (True, {"norm_topk_prob": False}), (False, {}), (True, SIGMOID)],
    ids=["qwen3_moe", "qwen3_moe plain weights", "mixtral", "dots1"],
)
def test_logits_and_gradients_equal_transformers(qk_norm, moe):
    model = build(resolved(qk_norm=qk_norm, **moe | dict(aux_loss_weight=0, z_loss_weight=0)), "cpu", seed=0)
    for name, buffer in model.named_buffers():  # an uneven bias changes the choices of many tokens, but no weight
        assert name.endswith("e_score_correction_bias")
        buffer.copy_(torch.linspace(-0.2, 0.2, len(buffer)))
    theirs, tokens_BT, labels_BT = reference(model), some_tokens(3, T), some_labels(3, T)
    logits_BTV = theirs(tokens_BT).logits
    torch.testing.assert_close(model(tokens_BT), logits_BTV, atol=1e-5, rtol=0)
    F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten()).backward()
    (model(tokens_BT, labels_BT).loss_sum / (labels_BT != -100).sum()).backward()
    assert_equal(gradients(model), gradients(theirs))


@pytest.mark.parametrize("qk_norm", [True, False], ids=["qwen3_moe", "mixtral"])
def test_for_one_sequence_and_layer_the_balance_loss_and_its_gradient_equal_those_of_transformers(qk_norm):
    """Theirs is computed over the entire batch and all layers at once, and is k times as large."""
    weight, chosen = 0.7, 2
    config = resolved(layers=1, qk_norm=qk_norm, aux_loss_weight=weight * chosen, z_loss_weight=0)
    model, tokens_BT, labels_BT = build(config, "cpu", seed=0), some_tokens(1, T), some_tokens(1, T, seed=2)
    theirs = reference(model)
    out = theirs(tokens_BT)
    (F.cross_entropy(out.logits.flatten(0, 1), labels_BT.flatten()) + weight * out.aux_loss).backward()
    loss_sum, _, routing_LX = model(tokens_BT, labels_BT)
    (loss_sum / T).backward()
    assert routing_LX[0, 0].item() / T == pytest.approx(out.aux_loss.item() / chosen, rel=1e-6)
    assert_equal(gradients(model), gradients(theirs))


def test_router_losses_equal_their_formulas_on_the_logits_of_transformers():
    """Balance loss of each sequence over its valid tokens, z-loss over valid tokens: weighted by tokens, mean over layers."""
    config = resolved(aux_loss_weight=0.7, z_loss_weight=0.3)
    model, tokens_BT, labels_BT = build(config, "cpu", seed=0), some_tokens(4, T), some_labels(4, T)
    theirs = reference(model)
    out, valid_BT = theirs(tokens_BT), labels_BT != -100
    aux, z = [], []
    for logits_NE in out.router_logits:
        logits_BTE = logits_NE.view(4, T, -1)
        aux.append(sum(
            load_balancing_loss_func((logits_TE,), 6, 2, valid_T[None].float()) / 2 * valid_T.sum()
            for logits_TE, valid_T in zip(logits_BTE, valid_BT, strict=True) if valid_T.any()
        ))  # fmt: skip
        z.append((logits_BTE.logsumexp(-1)[valid_BT] ** 2).sum())
    nats = F.cross_entropy(out.logits.flatten(0, 1), labels_BT.flatten(), reduction="sum")
    (nats + 0.7 * (aux[0] + aux[1]) / 2 + 0.3 * (z[0] + z[1]) / 2).backward()
    (loss_sum, _, routing_LX), found = run(model, tokens_BT, labels_BT)
    assert loss_sum.item() == pytest.approx(nats.item(), rel=1e-6)
    expected_L2 = torch.tensor([[a.item(), b.item()] for a, b in zip(aux, z, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(routing_LX[:, :2], expected_L2, rtol=1e-5, atol=0)
    assert routing_LX[:, 2:].sum(1).tolist() == [2 * valid_BT.sum()] * 2
    assert_equal(found, gradients(theirs), atol=2e-4)  # sums over 35 tokens


def test_a_router_with_equal_scores_has_a_balance_loss_of_one():
    model = build(resolved(num_experts=4), "cpu", seed=0)
    for block in model.model.layers:
        block.mlp.gate.weight.data.zero_()
    labels_BT = some_tokens(2, T, seed=2)
    routing_LX = model(some_tokens(2, T), labels_BT).routing_LX
    torch.testing.assert_close(routing_LX[:, 0] / labels_BT.numel(), torch.ones(2, dtype=torch.float64))


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize("balance", ["sequence", "global_batch"])
def test_no_split_of_a_batch_changes_its_gradient_or_its_routing_figures(balance):
    moe = dict(balance=balance, aux_loss_weight=1.0, z_loss_weight=0.1)
    model, tokens_BT, labels_BT = build(resolved(**moe), "cpu", seed=0), some_tokens(4, T), some_labels(4, T)
    if balance == "global_batch":
        for block in model.model.layers:
            block.mlp.gate.expert_share.copy_(torch.linspace(0.1, 0.9, 6).softmax(0))
    found = []
    for parts in ([4], [1, 3], [1, 1, 1, 1]):
        routing_LX = torch.zeros(2, 8, dtype=torch.float64)
        for tokens, labels in zip(tokens_BT.split(parts), labels_BT.split(parts), strict=True):
            out = model(tokens, labels)
            out.loss_sum.backward()  # gradients add up
            routing_LX += out.routing_LX
        found.append((gradients(model), routing_LX))
    for gradient, routing_LX in found[1:]:
        assert_equal(gradient, found[0][0], atol=3e-5)
        torch.testing.assert_close(routing_LX, found[0][1], rtol=1e-6, atol=0)


def test_a_step_adds_up_the_routing_figures_of_its_micro_batches():
    found = [train_step(engine_of(resolved()), window_of(4, size), 1e-2).routing_LX for size in (4, 1)]
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)
    assert found[0][:, 2:].sum(1).tolist() == [2 * (some_labels(4, T) != -100).sum()] * 2


def test_router_losses_change_the_gradient_but_not_the_loss():
    models = [build(resolved(aux_loss_weight=weight, z_loss_weight=weight), "cpu", seed=0) for weight in (0.0, 10.0)]
    (without, plain), (added, changed) = (run(model, some_tokens(2, T), some_labels(2, T)) for model in models)
    assert without.loss_sum == added.loss_sum
    gate = "model.layers.0.mlp.gate.weight"
    assert (plain[gate] - changed[gate]).abs().max() > 1e-3


ENGINES = ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2", "zero3", "fsdp2"))]
KINDS, KIND_NAMES = [{}, SIGMOID | dict(balance="global_batch")], ["softmax", "sigmoid with bias, over the global batch"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_two_ranks_of_every_engine_train_like_one_process(engine, kind):
    """Compares loss, norm, weights, biases and shares after five steps."""
    model = small_model(resolved(**kind | dict(aux_loss_weight=0.1, z_loss_weight=0.01)))
    case = Case(EngineConfig(name=engine, precision="fp32", keep_whole_below=100), ranks=2, micro_batch=2, sequences=8)
    (outcome,) = check_invariance(model, [case], 1.0, 0)
    assert outcome.passed, outcome


# ---------------------------------------------------------------- experts


@pytest.mark.parametrize("ends", [[3, 3, 10, 12], [0, 0, 0, 12], [12, 12, 12, 12]], ids=str)
def test_a_grouped_product_and_its_gradient_equal_one_product_per_group(ends):
    generator = torch.Generator().manual_seed(0)
    rows_PD, weight_EFD = torch.randn(12, 8, generator=generator), torch.randn(4, 16, 8, generator=generator)
    results = []
    for ours in (True, False):
        rows, weight = rows_PD.clone().requires_grad_(), weight_EFD.clone().requires_grad_()
        if ours:
            out_PF = grouped_product(rows, weight, torch.tensor(ends, dtype=torch.int32))
        else:
            starts = [0, *ends]
            out_PF = torch.cat([rows[starts[e] : ends[e]] @ weight[e].T for e in range(4)])
        out_PF.sum().backward()  # a gradient with stride 0
        results.append((out_PF, rows.grad, weight.grad))
    torch.testing.assert_close(*results)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_the_looped_product_and_its_gradients_equal_those_of_the_kernel():
    generator = torch.Generator()
    ends_E = torch.tensor([4, 4, 32, 64], dtype=torch.int32)
    results = []
    for product in (grouped_product, lambda rows, weight, ends: F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)):
        generator.manual_seed(0)
        rows_PD = torch.randn(64, 16, generator=generator).bfloat16().requires_grad_()
        weight_EFD = torch.randn(4, 32, 16, generator=generator).bfloat16().requires_grad_()
        out_PF = product(rows_PD, weight_EFD, ends_E)
        out_PF.backward(torch.randn(64, 32, generator=generator).bfloat16())
        results.append((out_PF, rows_PD.grad, weight_EFD.grad))
    torch.testing.assert_close(*results)


def test_no_token_is_dropped_even_if_all_choose_one_expert():
    config = resolved(num_experts_per_tok=1, norm_topk_prob=False)
    experts = Experts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    hidden_ND = torch.randn(50, 32)
    out_ND = experts(hidden_ND, torch.full((50, 1), 4), torch.full((50, 1), 0.5))
    gate_NF, up_NF = (hidden_ND @ experts.gate_up_proj[4].T).chunk(2, dim=1)
    torch.testing.assert_close(out_ND, 0.5 * (F.silu(gate_NF) * up_NF) @ experts.down_proj[4].T)


@pytest.mark.parametrize("how", ["full", "selective"])
def test_recomputation_changes_no_bit_and_counts_no_token_twice(how):
    seen = []
    for what in ("none", how):
        engine = engine_of(resolved(**SIGMOID, balance="global_batch"), activation_checkpointing=what)
        result = train_step(engine, window_of(4, 2), 1e-2)
        seen.append((result.routing_LX, [tensor.clone() for tensor in engine.model.state_dict().values()]))
    assert torch.equal(seen[0][0], seen[1][0])
    assert all(torch.equal(a, b) for a, b in zip(seen[0][1], seen[1][1], strict=True))


@pytest.mark.parametrize("how", ["none", "full", "selective"])
def test_a_compiled_block_is_one_graph_with_the_same_results_even_if_it_is_recomputed(how):
    """Only traced: compiling to machine code takes minutes, which is left to the slow test below."""
    found = []
    for compiled in (False, True):
        model = build(resolved(layers=1, **KINDS[1]), "cpu", seed=0)
        if compiled and how != "none":
            checkpoint_activations(model, how)
        for block in model.model.layers if compiled else []:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend="aot_eager")
        found.append(run(model, some_tokens(2, T), some_labels(2, T)))
    (eager, expected), (graph, got) = found
    assert_equal(got, expected, atol=1e-6)
    torch.testing.assert_close(graph.routing_LX, eager.routing_LX, rtol=1e-6, atol=0)


def test_a_router_keeps_no_fp32_copy_of_its_input_compiled_or_not():
    """Compiled as Inductor would: it keeps the operands of products rather than recompute them."""
    router = build(resolved(), "cpu", seed=0).model.layers[0].mlp.gate
    hidden_BTD = torch.randn(4, T, 32, dtype=torch.bfloat16, requires_grad=True)
    valid_BT = torch.ones(4, T, dtype=torch.bool)

    def kept_bytes(function) -> int:
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x}) or x, lambda x: x):
            function(hidden_BTD, valid_BT)
        return max(x.untyped_storage().nbytes() for x in kept.values() if x.shape[-1] == 32 and x.numel() == hidden_BTD.numel())

    graph = aot_module(router, nop, partition_fn=min_cut_rematerialization_partition, decompositions=select_decomp_table())
    assert kept_bytes(router) == kept_bytes(graph) == hidden_BTD.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_router_equals_a_product_in_fp32_and_so_do_its_gradients(dtype):
    router = build(resolved(), "cpu", seed=0).model.layers[0].mlp.gate
    hidden_BTD = torch.randn(2, T, 32).to(dtype).requires_grad_()
    scale = torch.randn(2 * T, 6)
    got_NE = _router_logits(hidden_BTD.flatten(0, 1), router.weight)
    expected_NE = F.linear(hidden_BTD.flatten(0, 1).float(), router.weight)
    assert got_NE.dtype == torch.float32 and torch.equal(got_NE, expected_NE)
    leaves = hidden_BTD, router.weight
    for ours, theirs in zip(*(torch.autograd.grad((x * scale).sum(), leaves) for x in (got_NE, expected_NE)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_compiled_blocks_have_no_graph_break_and_the_same_gradients(kind):
    found = []
    for compiled in (False, True):
        model = build(resolved(layers=1, **kind), "cpu", seed=0)
        for block in model.model.layers if compiled else []:
            block.compile(fullgraph=True, dynamic=False)
        found.append(run(model, some_tokens(2, T), some_labels(2, T)))
    (eager, expected), (graph, got) = found
    assert_equal(got, expected, atol=1e-4)
    torch.testing.assert_close(graph.routing_LX, eager.routing_LX, rtol=1e-5, atol=0)


def test_bf16_keeps_the_router_in_fp32():
    model = build(resolved(), "cpu", seed=0)
    seen = {}
    gate = model.model.layers[0].mlp.gate
    gate.register_forward_hook(lambda module, arguments, out: seen.update(weights=out[1].dtype, sums=out[2].aux_sum.dtype))
    exact = model(some_tokens(1, T), some_tokens(1, T)).loss_sum
    with torch.autocast("cpu", torch.bfloat16):
        found = model(some_tokens(1, T), some_tokens(1, T)).loss_sum
    assert set(seen.values()) == {torch.float32}
    assert found.item() == pytest.approx(exact.item(), rel=2e-2) and found.item() != exact.item()


def test_a_cache_gives_the_logits_of_the_full_text():
    config = dataclasses.replace(resolved(), sliding_window=5)
    model, tokens_BT = build(config, "cpu", seed=0).eval(), some_tokens(2, 12)
    full_BTV, cache = model(tokens_BT), KeyValueCache(2, 12)
    for start, end in [(0, 4), (4, 9), (9, 10), (10, 11), (11, 12)]:
        logits_BV = model(tokens_BT[:, start:end], cache=cache)[:, -1]
        torch.testing.assert_close(logits_BV, full_BTV[:, end - 1], atol=1e-5, rtol=0)


# ---------------------------------------------------------------- balance


def engine_of(model: ModelConfig, optimizer: str = "adamw", engine: str = "ddp", **settings) -> Engine:
    engine = start_engine(EngineConfig(name=engine, **settings))
    engine.prepare(lambda: Transformer(model), lambda m: build_optimizer(m, OptimizerConfig(name=optimizer)), 1.0, 0)
    return engine


@pytest.mark.parametrize(
    ("kind", "lr"),
    [
        (SIGMOID | dict(aux_loss_weight=0, z_loss_weight=0, bias_update_rate=0.02), 0.0),
        (dict(aux_loss_weight=1.0), 3e-3),
        (dict(aux_loss_weight=1.0, balance="global_batch"), 3e-3),
    ],
    ids=["bias alone", "each sequence", "global batch"],
)
def test_every_balancing_method_evens_the_load(kind, lr):
    engine = engine_of(resolved(layers=1, **kind))
    gate = engine.model.model.layers[0].mlp.gate
    with torch.no_grad():  # give hidden states a mean that expert 0 prefers
        engine.model.model.embed_tokens.weight += 0.3
        gate.weight[0] += 0.05
    window = [Batch(some_tokens(8, T), some_tokens(8, T, seed=2), None)]
    steps = [train_step(engine, window, lr) for _ in range(60)]
    loads = [routing_figures(step.routing_LX, 1)["expert_load_max"] for step in steps]  # in multiples of an even load
    assert loads[0] > 1.5 and loads[-1] < 1.25, loads


def test_biases_move_by_their_rate_towards_experts_with_too_few_tokens_but_not_after_a_skipped_step():
    model = build(resolved(**SIGMOID, balance="global_batch"), "cpu", seed=0)
    routing_LX = torch.tensor([[0.0, 0.0, 9, 1, 5, 5, 5, 5], [0.0, 0.0, 1, 1, 1, 1, 1, 7]], dtype=torch.float64)
    gates = [block.mlp.gate for block in model.model.layers]
    model.update_routers(routing_LX, torch.tensor(False))
    assert not any(gate.e_score_correction_bias.any() for gate in gates)
    assert all((gate.expert_share == 1 / 6).all() for gate in gates)
    model.update_routers(routing_LX, torch.tensor(True))
    assert gates[0].e_score_correction_bias.tolist() == pytest.approx([-0.01, 0.01, 0, 0, 0, 0])
    assert gates[1].e_score_correction_bias.tolist() == pytest.approx([0.01] * 5 + [-0.01])
    assert gates[0].expert_share.tolist() == pytest.approx([0.3, 1 / 30, *[1 / 6] * 4])


def test_over_the_global_batch_the_shares_of_the_choices_are_those_of_the_previous_step():
    model = build(resolved(balance="global_batch"), "cpu", seed=0)
    labels_BT = some_tokens(2, T, seed=2)
    first_LX = model(some_tokens(2, T), labels_BT).routing_LX
    torch.testing.assert_close(first_LX[:, 0] / (2 * T), torch.ones(2, dtype=torch.float64))  # even shares at first
    model.update_routers(first_LX, torch.tensor(True))
    second_LX = model(some_tokens(2, T), labels_BT).routing_LX
    for block, counted_X in zip(model.model.layers, first_LX, strict=True):
        torch.testing.assert_close(block.mlp.gate.expert_share, (counted_X[2:] / counted_X[2:].sum()).float())
    assert (second_LX[:, 0] / (2 * T)).min() > 1.001  # the chosen have the larger scores


def test_load_figures_are_as_documented():
    routing_LX = torch.tensor([[20.0, 80, 10, 10, 10, 10], [30.0, 40, 40, 0, 0, 0]], dtype=torch.float64)
    figures = routing_figures(routing_LX, 20)
    assert figures == pytest.approx(
        {"aux_loss": 1.25, "z_loss": 3, "expert_load_max": 4, "expert_load_min": 0, "expert_load_entropy": 0}
    )
    assert routing_figures(routing_LX[:1], 20)["expert_load_entropy"] == pytest.approx(1)


def test_the_meter_adds_up_the_routing_of_applied_steps_and_resumes_from_a_checkpoint():
    one, yes, no = torch.tensor(1.0), torch.tensor(True), torch.tensor(False)
    routing_LX = torch.tensor([[2.0, 4, 3, 1]], dtype=torch.float64)
    meter = Meter(torch.device("cpu"), 0, 1)
    meter.add(one.double(), torch.tensor(2), one, yes, routing_LX)
    state = meter.state(lambda values: values)
    meter = Meter(torch.device("cpu"), 0, 1, state)
    meter.add(one.double(), torch.tensor(2), one, no, routing_LX * math.nan)
    meter.add(one.double(), torch.tensor(2), one, yes, routing_LX)
    figures = meter.read(lambda values: values)["routing"]
    assert (figures["aux_loss"], figures["z_loss"], figures["expert_load_max"]) == (1, 2, 1.5)
    meter.add(one.double(), torch.tensor(2), one, yes, 2 * routing_LX)
    assert meter.read(lambda values: values)["routing"]["aux_loss"] == 2  # a new interval
    dense = Meter(torch.device("cpu"), 0, 1)
    dense.add(one.double(), torch.tensor(2), one, yes)
    assert dense.read(lambda values: values)["routing"] == {}


# ---------------------------------------------------------------- the state


def test_biases_and_shares_are_saved_and_restored(tmp_path):
    config, window = resolved(**SIGMOID, balance="global_batch"), window_of(4)
    engine = engine_of(config)
    train_step(engine, window, 1e-2)
    buffers = {name: buffer.clone() for name, buffer in engine.model.named_buffers()}
    assert len(buffers) == 4 and all(buffer.any() for buffer in buffers.values())
    saved = save(tmp_path, 1, engine, {})
    after = train_step(engine, window, 1e-2)

    resumed = engine_of(config)
    storage.load(saved, resumed)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in resumed.model.named_buffers())
    again = train_step(resumed, window, 1e-2)
    assert torch.equal(again.routing_LX, after.routing_LX) and again.loss_sum == after.loss_sum

    model = Transformer(config)
    storage.load_weights(saved, model)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def steps_after_a_save(folder: str) -> dict[str, tuple]:
    """On a rank: two steps under fsdp2 and a save, which each engine loads. Returns the figures of each engine's next step."""
    config, done, saved = resolved(**SIGMOID, balance="global_batch"), {}, None
    for name in ("fsdp2", "zero3", "zero1", "ddp"):
        AcceleratorState._reset_state(reset_partial_state=True)
        engine = engine_of(config, engine=name)
        window = [window_of(4, 2)[engine.rank]]
        if saved is None:
            for _ in range(2):
                train_step(engine, window, 1e-2)
            saved = save(Path(folder), 2, engine, {})
        else:
            storage.load(saved, engine)
        result = train_step(engine, window, 1e-2)
        done[name] = result.loss_sum.item(), float(result.grad_norm), result.routing_LX.tolist()
    return done


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_engine_resumes_with_the_experts_of_another(tmp_path):
    for done in run_ranks(2, steps_after_a_save, str(tmp_path), timeout=240):
        loss_sum, norm, routing = done.pop("fsdp2")
        for name, found in done.items():
            assert found[:2] == pytest.approx((loss_sum, norm), rel=1e-5), name
            torch.testing.assert_close(torch.tensor(found[2]), torch.tensor(routing), rtol=1e-5, atol=0)


def test_initial_weights_of_experts_and_routers_are_as_documented():
    config = resolve_model(
        ModelConfig(hidden_size=128, num_hidden_layers=3, moe=MoeConfig(num_experts=8, moe_intermediate_size=96, **SIGMOID)),
        vocab_size=V,
        sequence_length=T,
    )
    model = build(config, "cpu", seed=0)
    mlp = model.model.layers[0].mlp
    for parameter, expected in [
        (mlp.experts.gate_up_proj, 128**-0.5),
        (mlp.experts.down_proj, (96 * 2 * 3) ** -0.5),
        (mlp.shared_experts.down_proj.weight, (2 * 96 * 2 * 3) ** -0.5),
        (mlp.gate.weight, 128**-0.5),
    ]:
        assert parameter.std().item() == pytest.approx(expected, rel=0.05)
    assert not mlp.gate.e_score_correction_bias.any()


@pytest.mark.parametrize("kind", [{}, SIGMOID], ids=["softmax", "shared"])
def test_parameters_and_active_parameters_are_counted(kind):
    config = resolved(**kind)
    model, counts = build(config, "cpu", seed=0), num_parameters(config)
    expert = sum(p[0].numel() for p in model.model.layers[0].mlp.experts.parameters())
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    assert counts.active == counts.total - config.num_hidden_layers * 4 * expert
    matrices = [p.numel() for name, p in model.named_parameters() if p.ndim > 1 and "embed_tokens" not in name]
    assert counts.matmul == sum(matrices) - config.num_hidden_layers * 4 * expert


def test_muon_treats_each_expert_as_a_separate_matrix():
    engine = engine_of(resolved(layers=1), optimizer="muon")
    experts = engine.model.model.layers[0].mlp.experts
    assert any(parameter is experts.down_proj for parameter in engine.optimizer.param_groups[0]["params"])
    before_EDF = experts.down_proj.detach().clone()
    train_step(engine, [Batch(some_tokens(4, T), some_tokens(4, T, seed=2), None)], 1e-1)
    for update_DF in before_EDF * (1 - 1e-1 * 0.1) - experts.down_proj.detach():
        sizes = torch.linalg.svdvals(update_DF) / (1e-1 * 0.2 * math.sqrt(32))
        assert sizes.max() < 1.3 and sizes.median() > 0.5
