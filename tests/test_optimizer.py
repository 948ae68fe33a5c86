"""Each parameter is updated once and by the right rule, and AdamW's update equals its formula."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.config import OptimizerConfig
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.model.transformer import build
from pretrain.optim.optimizer import build_optimizer


def small_model(**settings):
    config = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, qk_norm=True, **settings)
    return build(resolve_model(config, vocab_size=97, sequence_length=16), "cpu", seed=0)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_matrices_decay_but_norms_and_embeddings_do_not(tied):
    model = small_model(tie_word_embeddings=tied)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name or "embed" in name else 0.3), name


def test_settings_reach_the_optimizer():
    config = OptimizerConfig(lr=1e-3, betas=(0.8, 0.9), eps=1e-6)
    optimizer = build_optimizer(small_model(), config)
    for group in optimizer.param_groups:
        assert (group["lr"], tuple(group["betas"]), group["eps"], group["fused"]) == (1e-3, (0.8, 0.9), 1e-6, True)


@pytest.mark.parametrize("rule", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_embedding_alone_has_its_multiple_of_the_learning_rate(rule, tied):
    model = small_model(tie_word_embeddings=tied)
    optimizer = build_optimizer(model, OptimizerConfig(name=rule, embedding_lr_scale=4.0))
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert scale[id(parameter)] == (4.0 if name == "model.embed_tokens.weight" else 1.0), name


def test_updates_equal_the_formula_of_adamw():
    model, config = small_model(), OptimizerConfig(lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.5)
    optimizer = build_optimizer(model, config)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    draw = torch.Generator().manual_seed(0)
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    moments = {name: (torch.zeros_like(x), torch.zeros_like(x)) for name, x in expected.items()}
    for step, lr in enumerate([1e-2, 3e-3, 5e-4], start=1):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
            gradient, (first, second), x = parameter.grad.double(), moments[name], expected[name]
            first.mul_(0.8).add_(0.2 * gradient)
            second.mul_(0.9).add_(0.1 * gradient**2)
            x.mul_(1 - lr * decay[id(parameter)])
            x.sub_(lr * (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-6))
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], atol=1e-6, rtol=1e-5)


def test_cautious_decay_and_averages_of_adamw_follow_their_papers():
    """In float64, lookahead with the mean step and the weights before it, which the optimizer does not keep."""
    model, rates = small_model(), [2e-3, 1e-2, 8e-3, 2e-3]
    config = OptimizerConfig(
        lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=5.0, cautious_decay=True, lookahead=0.6, lookahead_decay=0.7,
        average_decay=0.15,
    )  # fmt: skip
    optimizer = build_optimizer(model, config)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    draw = torch.Generator().manual_seed(0)
    states = {}
    for name, parameter in model.named_parameters():
        w = parameter.detach().double().clone()
        states[name] = {"w": w, "before": w, "average": w, "m": 0 * w, "v": 0 * w, "mean": 0 * w, "doubtful": w != w}
    for step, lr in enumerate(rates, start=1):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
            gradient, s = parameter.grad.double(), states[name]
            s["m"], s["v"] = 0.8 * s["m"] + 0.2 * gradient, 0.9 * s["v"] + 0.1 * gradient**2
            update = (s["m"] / (1 - 0.8**step)) / ((s["v"] / (1 - 0.9**step)).sqrt() + 1e-6)
            s["doubtful"] |= update.abs() < 1e-5
            decayed = lr * decay[id(parameter)] * s["w"] * (update * s["w"] >= 0)
            w = s["w"] - decayed - lr * update
            s["average"] = s["average"] + (1 - min(0.15, (step - 1) / (step + 9))) * (w - s["average"])
            s["mean"], s["before"] = 0.7 * s["mean"] + 0.3 * (w - s["before"]), w
            s["w"] = w + (0.6 * lr / 1e-2 if lr > 1e-2 / 3 else 0) * s["mean"]
        if step == 3:  # a step that is not finite comes in between
            kept = [tensor.clone() for p in model.parameters() for tensor in (p, *optimizer.state[p].values())]
            gradients = [p.grad for p in model.parameters()]
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, math.nan)
            optimizer.found_inf = torch.ones(())
            optimizer.step()
            now = [tensor for p in model.parameters() for tensor in (p, *optimizer.state[p].values())]
            assert all(map(torch.equal, kept, now))
            optimizer.found_inf = torch.zeros(())
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
        optimizer.step()
        assert {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]} == decay
    for name, parameter in model.named_parameters():
        known, s = ~states[name]["doubtful"], states[name]
        assert known.float().mean() > 0.99
        for found, expected in ((parameter.detach(), s["w"]), (optimizer.state[parameter]["average"], s["average"])):
            torch.testing.assert_close(found.double()[known], expected[known], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_small_model_memorizes_a_text(tied, name):
    model = small_model(tie_word_embeddings=tied)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=1e-2, weight_decay=0.0))
    tokens_BT = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(0))
    for _ in range(60):
        loss = model(tokens_BT[:, :-1], tokens_BT[:, 1:]).loss_sum / 32
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_muon_updates_the_matrices_of_the_blocks_and_nothing_else(tied):
    model = small_model(tie_word_embeddings=tied)
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", weight_decay=0.3, momentum=0.9, betas=(0.8, 0.9), eps=1e-6))
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(group_of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = group_of[id(parameter)]
        assert ("momentum" in group) == ("_proj" in name), name
        assert group["weight_decay"] == (0.0 if "norm" in name or "embed" in name else 0.3), name
        if "momentum" in group:
            assert group["momentum"] == 0.9
        else:
            assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6)
