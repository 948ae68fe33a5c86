"""Cross-entropy of hidden states against labels: sums in nats, never a mean, and without all logits in memory at once.

It knows the head's matrix and the labels. It knows nothing of ranks, accumulation or averages: the caller divides by the
number of valid labels in the entire step.

At training sizes the logits are the largest tensor of the step (64 x 1024 tokens x 50304 ids in fp32: 13 GB). Here they exist
for one chunk of positions at a time, and the chunk's contribution to both gradients is computed along with its loss, so that
the backward pass neither repeats the head's matrix product nor needs any logits.

Dimensions: B batch, T time, N = B * T positions, n positions of one chunk, D model, V vocabulary rows (padding included).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain import target

IGNORED = -100
"""Label of a position that has no loss."""


def cross_entropy_sums(
    hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, vocab_size: int, chunk: int | None = None, step=None
) -> tuple[Tensor, Tensor]:
    """Returns (loss_sum, loss_B): the sum of -log p(label) over the labels that are not -100, (), and over those of each
    sequence, without gradient; fp32, in nats.

    hidden_BTD: any leading shape that equals that of labels_BT (int64), whose last dimension is that of a sequence. weight_VD:
    the head; rows from vocab_size on are padding: they get no probability and a zero gradient. chunk: positions per chunk,
    None: `chunk_positions`. step: `chunk_step` or a compiled version of it. Under autocast the products run in its dtype; the
    softmax and all sums are fp32. The forward pass computes the gradients and the first backward pass frees them, so there can
    be no second one.
    """
    hidden_ND, labels_N = hidden_BTD.flatten(0, -2), labels_BT.flatten()
    needs_gradient = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    chunk = chunk or chunk_positions(target.kind(hidden_ND.device), weight_VD.shape[0], len(labels_N))
    loss_sum, loss_N = _ChunkedCrossEntropy.apply(
        hidden_ND, weight_VD, labels_N, vocab_size, chunk, product_dtype(hidden_ND), needs_gradient, step or chunk_step
    )
    return loss_sum, loss_N.view(labels_BT.shape).sum(-1)


def product_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype in which a matrix product of x runs here: autocast's, else that of x."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def chunk_positions(device: str, rows: int, positions: int = 0) -> int:
    """Positions per chunk, if there are `positions` in all; 0: an unknown number of them.

    At most about 16 MiB of fp32 logits on a CPU (its cache), 1 GiB elsewhere, but never so few that adding to the weight's
    gradient, once per chunk, costs more than the products. Measured on a CPU with 8192 rows: chunks of 512 positions take 0.65
    of the time of a single chunk. Within that limit all chunks are equal and multiples of 128 where `positions` allows it: a
    smaller last chunk would be a second graph to compile, and products on GPUs are tiled by 128.
    """
    limit = max(4 * 2**20 // rows, 256) if device == "cpu" else max(2**28 // rows, 1024)
    fewest = math.ceil(positions / limit)
    for chunks in range(fewest, 2 * fewest):
        if positions % (128 * chunks) == 0:
            return positions // chunks
    return 128 * math.ceil(positions / (128 * fewest)) if positions else limit


def chunk_step(
    hidden_nD: Tensor, weight_VD: Tensor, labels_n: Tensor, vocab_size: int, with_gradient: bool, out_nV: Tensor | None = None
):
    """Returns (loss_n, gradient_nV) of one chunk: nats, fp32, 0 where the label is ignored; and the derivative of their sum
    with respect to the logits, softmax minus one-hot, in the dtype of hidden_nD, or None without with_gradient. Its rows of
    ignored labels hold finite but meaningless values, which the caller must mask. out_nV: memory for the logits; None: newly
    allocated.
    """
    product_nV = torch.mm(hidden_nD, weight_VD.T, out=out_nV)
    logits_nV = product_nV.float()
    if vocab_size < weight_VD.shape[0]:
        logits_nV[:, vocab_size:] = -torch.inf
    valid_n = labels_n != IGNORED
    target_n1 = torch.where(valid_n, labels_n, 0)[:, None]
    label_logit_n = logits_nV.gather(1, target_n1)[:, 0]
    if torch.compiler.is_compiling() or not with_gradient:
        sum_n1 = logits_nV.logsumexp(1, keepdim=True)
        loss_n = torch.where(valid_n, sum_n1[:, 0] - label_logit_n, 0)
        if not with_gradient:
            return loss_n, None
        # A comparison fuses with the rest into one pass over the logits. Scattering -1 would make the compiler write the fp32
        # softmax to memory, copy it and read it again: 22 bytes per bf16 logit instead of 4 to 8. Loops over int32 vectorize.
        is_label_nV = torch.arange(weight_VD.shape[0], dtype=torch.int32, device=labels_n.device) == target_n1.int()
        return loss_n, (torch.exp(logits_nV - sum_n1) - is_label_nV.float()).to(hidden_nD.dtype)
    # Everything in the logits' memory. The softmax's largest entry is exp(largest - logsumexp), so one pass of exp suffices.
    largest_n = logits_nV.amax(1)
    softmax_nV = torch.softmax(logits_nV, 1, out=logits_nV)
    loss_n = largest_n - softmax_nV.amax(1).log() - label_logit_n
    softmax_nV.scatter_add_(1, target_n1, torch.full_like(target_n1, -1, dtype=softmax_nV.dtype))
    return torch.where(valid_n, loss_n, 0), product_nV.copy_(softmax_nV)


def ranking_step(
    hits: list[Tensor], hidden_nD: Tensor, weight_VD: Tensor, labels_n: Tensor, vocab_size: int, with_gradient: bool,
    out_nV: Tensor | None = None,
) -> tuple[Tensor, None]:  # fmt: skip
    """`chunk_step` without gradients that also appends to `hits` whether each label is the likeliest id (n,), bool; of equal
    logits, the first is. False where the label is ignored. For measuring tasks, not for training."""
    logits_nV = (hidden_nD @ weight_VD.T).float()[:, :vocab_size]
    valid_n = labels_n != IGNORED
    label_logit_n = logits_nV.gather(1, torch.where(valid_n, labels_n, 0)[:, None])[:, 0]
    hits.append(logits_nV.argmax(1) == labels_n)
    return torch.where(valid_n, logits_nV.logsumexp(1) - label_logit_n, 0), None


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes loss and both gradients in one loop over the chunks; the backward pass only scales the gradients."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, labels_N, vocab_size, chunk, dtype, needs_gradient, step):
        inputs_ND, matrix_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        loss_N = torch.empty(len(labels_N), dtype=torch.float32, device=hidden_ND.device)
        if needs_gradient:
            hidden_gradient_ND = torch.empty_like(hidden_ND)
            weight_gradient_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        # Eager chunks share the memory of their logits; a CPU's products are slower into memory that is new to its cache.
        eager = step is chunk_step and not torch.compiler.is_compiling()
        memory_nV = inputs_ND.new_empty(min(chunk, len(labels_N)), len(matrix_VD)) if eager else None
        for start in range(0, len(labels_N), chunk):
            rows = slice(start, start + chunk)
            inputs_nD, labels_n = inputs_ND[rows], labels_N[rows]
            out_nV = None if memory_nV is None else memory_nV[: len(labels_n)]
            loss_N[rows], gradient_nV = step(inputs_nD, matrix_VD, labels_n, vocab_size, needs_gradient, out_nV)
            if needs_gradient:
                valid_n1 = (labels_n != IGNORED)[:, None]
                hidden_gradient_ND[rows] = torch.where(valid_n1, gradient_nV @ matrix_VD, 0)
                _add_product(weight_gradient_VD, gradient_nV.T, torch.where(valid_n1, inputs_nD, 0))
            del gradient_nV  # or the next chunk's logits would be made beside it
        if needs_gradient:
            ctx.save_for_backward(hidden_gradient_ND, weight_gradient_VD)
            ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(loss_N)
        return loss_N.sum(), loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, _):
        hidden_gradient_ND, weight_gradient_VD = ctx.saved_tensors
        # In place, because a second copy of the weight's gradient would cost as much memory as the head. Autograd notices the
        # change, so a second backward pass through the same graph raises an error instead of scaling twice.
        hidden_gradient_ND.mul_(scale)
        weight_gradient_VD.mul_(scale)
        return hidden_gradient_ND, weight_gradient_VD.to(ctx.weight_dtype), None, None, None, None, None, None


def _add_product(sum_VD: Tensor, left_Vn: Tensor, right_nD: Tensor) -> None:
    """Adds left_Vn @ right_nD to sum_VD (fp32). Products of bf16 factors are added in fp32 on GPUs; CPUs, and a torch without
    `out_dtype`, round them to bf16 first."""
    if left_Vn.dtype == sum_VD.dtype:
        sum_VD.addmm_(left_Vn, right_nD)
    elif not (target.kind(left_Vn.device) == "cuda" and hasattr(torch.ops.aten.addmm, "dtype")):
        sum_VD += left_Vn @ right_nD
    elif torch.compiler.is_compiling():  # Inductor has no addmm with out_dtype: pytorch issue 163880
        sum_VD += torch.mm(left_Vn, right_nD, out_dtype=sum_VD.dtype)
    else:
        torch.addmm(sum_VD, left_Vn, right_nD, out_dtype=sum_VD.dtype, out=sum_VD)
