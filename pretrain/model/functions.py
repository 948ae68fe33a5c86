"""RMSNorm and the rotary embedding with derivatives written by hand, for training in eager mode: autograd would keep and move
more bytes. Compiled code uses the plain formulas, which a compiler fuses. So does what needs no gradient: rounded as other
programs round, a model that is exported gives their logits.

Both compute in fp32, or in fp64 if their input has it, and return the dtype of the input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain import target


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension. Source: Zhang and Sennrich 2019."""
    if target.kind(x.device) == "cpu" and _trains_eagerly():
        return _RMSNorm.apply(x, weight_D, eps)
    wide = x.to(_wide(x))
    return F.rms_norm(wide, weight_D.shape, weight_D.to(wide.dtype), eps).to(x.dtype)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[..., i], x[..., i + C / 2]) by angles whose cosines and sines, (..., C / 2), broadcast to them.
    Source: Su et al. 2021 (RoFormer), in Hugging Face's half-split layout."""
    if _trains_eagerly():
        return _RotatePairs.apply(x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _trains_eagerly() -> bool:
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / rms(x), g the output's gradient and w the weight: x gets r (w g - x r^2 mean(w g x)), w the sum of r g x."""

    @staticmethod
    def forward(ctx, x, weight_D, eps):
        wide = x.to(_wide(x))
        mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, inverse)
        return (wide * inverse).mul_(weight_D).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight_D, inverse = ctx.saved_tensors
        size = x.shape[-1]
        x_ND, gradient_ND = (tensor.reshape(-1, size).to(inverse.dtype) for tensor in (x, gradient))
        wide_D, inverse_N = weight_D.to(inverse.dtype), inverse.reshape(-1)
        product_ND = gradient_ND * x_ND
        weight_gradient_D = inverse_N @ product_ND
        correction_N = (product_ND @ wide_D).mul_(inverse_N.pow(3)).div_(size)
        x_gradient_ND = torch.mul(gradient_ND, wide_D, out=product_ND).mul_(inverse_N[:, None])
        x_gradient_ND.addcmul_(x_ND, correction_N[:, None], value=-1)
        return x_gradient_ND.view(x.shape).to(x.dtype), weight_gradient_D.to(weight_D.dtype), None


class _RotatePairs(torch.autograd.Function):
    """Its derivative is the rotation by the opposite angle. Keeps neither its input nor its output."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _rotated(gradient, *ctx.saved_tensors, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    # Always contiguous: attention's gradient is transposed, and the projection's backward pass would have to copy it.
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype), device=x.device)
    (first, second), (out_first, out_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=sign)
    return out.to(x.dtype)
