"""RMSNorm and the rotary embedding: derivatives by hand equal those of autograd, keep less, and give way to a compiler."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pretrain.model.functions import rms_norm, rotate_pairs


def plain_norm(x, weight_D, eps=1e-5):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_D


def plain_rotation(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def norm_inputs(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(3, 5, 8, dtype=dtype).requires_grad_(), (torch.rand(8, dtype=dtype) + 0.5).requires_grad_()


def rotation_inputs(dtype=torch.float32, rows: bool = False):
    """rows: each sequence has positions of its own, as with padded prompts."""
    torch.manual_seed(0)
    angle = torch.randn(2, 5, 1, 3, dtype=torch.promote_types(dtype, torch.float32)) if rows else torch.randn(5, 1, 3)
    return torch.randn(2, 5, 4, 6, dtype=dtype).requires_grad_(), angle.cos().to(angle.dtype), angle.sin()


def test_derivatives_equal_finite_differences_in_float64():
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), norm_inputs(torch.float64))
    for rows in (False, True):
        x, cos, sin = rotation_inputs(torch.float64, rows)
        assert torch.autograd.gradcheck(lambda x, c=cos, s=sin: rotate_pairs(x, c, s), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_values_and_gradients_equal_the_formula_in_float64(dtype):
    bound = 2e-6 if dtype == torch.float32 else 1e-2
    x, weight_D = norm_inputs(dtype)
    rotated, cos, sin = rotation_inputs(dtype)
    for got, expected, leaves in (
        (rms_norm(x, weight_D, 1e-5), plain_norm(x.double(), weight_D.double()), (x, weight_D)),
        (rotate_pairs(rotated, cos, sin), plain_rotation(rotated.double(), cos.double(), sin.double()), (rotated,)),
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=bound, atol=bound)
        scale = torch.randn(got.shape)
        ours = torch.autograd.grad((got.float() * scale).sum(), leaves)
        for gradient, reference in zip(ours, torch.autograd.grad((expected * scale).sum(), leaves), strict=True):
            assert gradient.dtype == dtype
            torch.testing.assert_close(gradient, reference, rtol=10 * bound, atol=10 * bound)


def test_inputs_and_gradients_need_not_be_contiguous():
    x, weight_D = norm_inputs()
    rotated, cos, sin = rotation_inputs()
    turned = rotated.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    for function, straight, strided, scale in (
        (lambda x: rms_norm(x, weight_D, 1e-5), x, x.detach().mT.contiguous().mT.requires_grad_(), torch.randn(3, 8, 5).mT),
        (lambda x: rotate_pairs(x, cos, sin), rotated, turned, torch.randn(2, 4, 5, 6).transpose(1, 2)),
    ):
        gradients = [torch.autograd.grad((function(x) * scale).sum(), x)[0] for x in (straight, strided)]
        torch.testing.assert_close(*gradients)


def test_a_rotation_keeps_nothing_of_its_input_and_a_norm_one_number_per_row_beside_it():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        rotate_pairs(*(inputs := rotation_inputs()))
        assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in inputs[1:]}
        kept.clear()
        x, weight_D = norm_inputs(torch.bfloat16)
        rms_norm(x, weight_D, 1e-5)
    assert sorted(x.nbytes for x in kept) == sorted([x.nbytes, weight_D.nbytes, 4 * 15])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_traced_for_a_compiler_they_are_one_graph_with_the_same_values(dtype):
    def both(x, weight_D, cos, sin):
        return rotate_pairs(rms_norm(x, weight_D, 1e-5), cos, sin)

    x, cos, sin = rotation_inputs(dtype)
    leaves = x, torch.ones(6, dtype=dtype).requires_grad_()
    traced = torch.compile(both, backend="aot_eager", fullgraph=True)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    results = [(out := function(*leaves, cos, sin), *torch.autograd.grad(out.sum(), leaves)) for function in (both, traced)]
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=bound, atol=bound)


def test_recomputation_changes_no_bit():
    x, weight_D = norm_inputs()
    kept, recomputed = (
        torch.autograd.grad(run(lambda x: rms_norm(x, weight_D, 1e-5).square().sum(), x), (x, weight_D))
        for run in (lambda function, x: function(x), lambda function, x: checkpoint(function, x, use_reentrant=False))
    )
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
