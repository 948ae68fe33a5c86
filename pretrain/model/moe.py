"""Mixture of experts: a router sends each token to a few of many feed-forward networks. Experts have no capacity limit, so no
token is dropped.

It knows the tensors of one device and the parameter names of transformers (`Qwen3MoeForCausalLM`; with shared experts or
sigmoid scores, `Dots1ForCausalLM`). It knows nothing of ranks: routers return sums over tokens, and the step adds them up over
micro-batches and ranks.

Sources: Shazeer et al. 2017; Fedus et al. 2021 (Switch: balance loss); Zoph et al. 2022 (ST-MoE: z-loss); Dai et al. 2024
(shared experts); DeepSeek-AI 2024 (DeepSeek-V3: sigmoid scores, balance in a sequence); Wang et al. 2024 (bias in place of a
loss); Qiu et al. 2025 (balance over the global batch); Gale et al. 2022 (no dropped tokens).

Dimensions: B batch, T time, N = B * T tokens, D model, E experts, k experts per token, F feed-forward, P = N * k rows (pairs of
a token and one of its experts) sorted by expert, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pretrain import target
from pretrain.model.config import ModelConfig, MoeConfig
from pretrain.model.loss import product_dtype


class Routing(NamedTuple):
    """Routing figures of one layer over the valid tokens of a micro-batch. Sums, so that every split of a batch adds up to the
    same values."""

    aux_sum: Tensor
    """(), fp32, with gradient: balance loss times the number of tokens that it is the mean of."""
    z_sum: Tensor
    """(), fp32, with gradient: squared log-sum-exp of the logits."""
    tokens_E: Tensor
    """fp32, without gradient: number of tokens sent to each expert."""


class Router(nn.Module):
    """Chooses experts for each token, always in fp32.

    An expert's weight is the softmax or sigmoid of its logit, divided by the sum over the chosen experts (`norm_topk_prob`),
    times `routed_scaling_factor`. With sigmoid scores a bias influences the choice, but not the weights.
    """

    total: Callable[[Tensor], Tensor] = staticmethod(lambda counts: counts)
    """Sums counts of sequences over the devices that share these sequences; here, one device has them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config: MoeConfig = config.moe
        experts = self.config.num_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        if self.config.score == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))
        if self.config.balance == "global_batch":
            # Not in the state dict, because models of other programs have no shares; so nothing loads it, and it must have
            # values even if the module is on the meta device.
            share_E = torch.full((experts,), 1 / experts, dtype=torch.float32, device="cpu")
            self.register_buffer("expert_share", share_E, persistent=False)

    def forward(self, hidden_BTD: Tensor, valid_BT: Tensor | None) -> tuple[Tensor, Tensor, Routing | None]:
        """Returns chosen_Nk (int64), weights_Nk (fp32) and, with valid_BT, the figures over the positions it marks."""
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            logits_NE = _router_logits(hidden_BTD.flatten(0, 1), self.weight)
            score_NE = logits_NE.softmax(1) if self.config.score == "softmax" else logits_NE.sigmoid()
            choice_NE = score_NE.detach()
            if self.config.score == "sigmoid":
                choice_NE = choice_NE + self.e_score_correction_bias
            chosen_Nk = choice_NE.topk(self.config.num_experts_per_tok, dim=1).indices
            weights_Nk = score_NE.gather(1, chosen_Nk)
            if self.config.norm_topk_prob:
                weights_Nk = weights_Nk / (weights_Nk.sum(1, keepdim=True) + 1e-20)
            weights_Nk = weights_Nk * self.config.routed_scaling_factor
            routing = None if valid_BT is None else self._count(logits_NE, score_NE, chosen_Nk, valid_BT)
        return chosen_Nk, weights_Nk, routing

    def _count(self, logits_NE: Tensor, score_NE: Tensor, chosen_Nk: Tensor, valid_BT: Tensor) -> Routing:
        """The balance loss of a sequence is E * sum over experts of (share of the choices) * (mean share of the score): 1 if
        both are even. It is multiplied by the sequence's number of valid tokens, so that all tokens have the same weight.

        With `global_batch`, the share of the choices is that of the previous step, so that the gradient does not depend on how
        the batch is split.
        """
        batch, length = valid_BT.shape
        experts, chosen = self.config.num_experts, self.config.num_experts_per_tok
        valid_N1 = valid_BT.reshape(-1, 1).float()
        share_NE = score_NE if self.config.score == "softmax" else score_NE / score_NE.sum(1, keepdim=True)
        share_BE = (share_NE * valid_N1).view(batch, length, experts).sum(1)
        tokens_BE = share_BE.new_zeros(batch, experts)
        tokens_BE.scatter_add_(1, chosen_Nk.view(batch, -1), valid_N1.expand(-1, chosen).reshape(batch, -1))
        if self.config.balance == "global_batch":
            aux_sum = experts * (share_BE * self.expert_share).sum()
        else:
            counts = self.total(torch.cat([tokens_BE, valid_BT.sum(1, keepdim=True).float()], 1))
            aux_sum = experts / chosen * (share_BE * counts[:, :-1] / counts[:, -1:].clamp(min=1)).sum()
        z_sum = (logits_NE.logsumexp(1, keepdim=True).square() * valid_N1).sum()
        return Routing(aux_sum, z_sum, tokens_BE.sum(0))

    @torch.no_grad()
    def update(self, tokens_E: Tensor, applied: Tensor) -> None:
        """Updates bias and shares from tokens_E, each expert's tokens in the step's global batch, if the step was applied."""
        tokens_E = tokens_E.float()
        if self.config.bias_update_rate > 0:
            too_few_E = (tokens_E.mean() - tokens_E).sign()
            self.e_score_correction_bias += self.config.bias_update_rate * too_few_E * applied
        if self.config.balance == "global_batch":
            updated = applied & (tokens_E.sum() > 0)
            self.expert_share.copy_(torch.where(updated, tokens_E / tokens_E.sum().clamp(min=1), self.expert_share))


# Custom operators, so that the hidden states are kept in their own dtype and widened again in the backward pass. Autograd would
# keep the fp32 copy, and so would torch.compile, which never recomputes the operand of a product: twice the bytes of bf16.
@torch.library.custom_op("pretrain::router_logits", mutates_args=())
def _router_logits(hidden_ND: Tensor, weight_ED: Tensor) -> Tensor:
    return F.linear(hidden_ND.float(), weight_ED.float())


@torch.library.custom_op("pretrain::router_logits_backward", mutates_args=())
def _router_logits_backward(gradient_NE: Tensor, hidden_ND: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    hidden_gradient_ND, weight_gradient_ED = gradient_NE @ weight_ED.float(), gradient_NE.T @ hidden_ND.float()
    return hidden_gradient_ND.to(hidden_ND.dtype), weight_gradient_ED.to(weight_ED.dtype)


@_router_logits.register_fake
def _(hidden_ND: Tensor, weight_ED: Tensor) -> Tensor:
    return hidden_ND.new_empty(hidden_ND.shape[0], weight_ED.shape[0], dtype=torch.float32)


@_router_logits_backward.register_fake
def _(gradient_NE: Tensor, hidden_ND: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden_ND), torch.empty_like(weight_ED)


_router_logits.register_autograd(
    lambda ctx, gradient_NE: _router_logits_backward(gradient_NE, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _gated(gate_up_PF: Tensor, weight_P1: Tensor) -> Tensor:
    gate_PF, up_PF = gate_up_PF.chunk(2, dim=1)
    return F.silu(gate_PF) * up_PF * weight_P1


class Experts(nn.Module):
    """E feed-forward networks (SwiGLU) in two stacks of matrices, gate and up in one. Each computes only its own tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts, width = config.moe.num_experts, config.moe.moe_intermediate_size
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, config.hidden_size, width))
        self.gated = _gated

    def forward(self, hidden_ND: Tensor, chosen_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        """Returns the sum over each token's chosen experts of weight * expert(hidden), (N, D)."""
        dtype = product_dtype(hidden_ND)
        expert_P, order_P = chosen_Nk.flatten().sort(stable=True)
        all_E = torch.arange(self.num_experts, device=hidden_ND.device)
        ends_E = torch.searchsorted(expert_P, all_E, right=True, out_int32=True)
        row_Nk = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P), device=order_P.device))
        row_Nk = row_Nk.view_as(chosen_Nk)
        token_P = order_P // chosen_Nk.shape[1]

        rows_PD = MoveRows.apply(hidden_ND.to(dtype), token_P, row_Nk, True)
        weight_P1 = weights_Nk.flatten()[order_P, None].to(dtype)
        return MoveRows.apply(self.compute(rows_PD, weight_P1, ends_E), token_P, row_Nk, False)

    def compute(self, rows_PD: Tensor, weight_P1: Tensor, ends_E: Tensor) -> Tensor:
        """Returns weight * expert(row) for each row, (P, D). Expert e has the rows from ends_E[e - 1] up to ends_E[e]."""
        dtype = rows_PD.dtype
        gate_up_PF = grouped_product(rows_PD, self.gate_up_proj.to(dtype), ends_E)
        return grouped_product(self.gated(gate_up_PF, weight_P1), self.down_proj.to(dtype), ends_E)


class MixtureOfExperts(nn.Module):
    """Router and experts and, if there are any, the shared experts that every token passes through."""

    def __init__(self, config: ModelConfig, shared_experts: nn.Module | None):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = shared_experts

    def forward(self, hidden_BTD: Tensor, valid_BT: Tensor | None) -> tuple[Tensor, Routing | None]:
        """Returns hidden_BTD and, with valid_BT, the routing figures over the positions it marks."""
        chosen_Nk, weights_Nk, routing = self.gate(hidden_BTD, valid_BT)
        out_BTD = self.experts(hidden_BTD.flatten(0, 1), chosen_Nk, weights_Nk).view_as(hidden_BTD)
        return out_BTD if self.shared_experts is None else out_BTD + self.shared_experts(hidden_BTD), routing


# ---------------------------------------------------------------- tokens to experts and back


class MoveRows(torch.autograd.Function):
    """Copies each token's hidden state to its k rows (`to_rows`), or sums them: each is the other's backward pass.

    token_P: the token of each row. row_Nk: the rows of each token, summed in a fixed order, without atomic additions, so the
    result has the same bits every time.
    """

    @staticmethod
    def forward(ctx, values, token_P, row_Nk, to_rows):
        ctx.save_for_backward(token_P, row_Nk)
        ctx.to_rows = to_rows
        return _move(values, token_P, row_Nk, to_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _move(gradient, *ctx.saved_tensors, not ctx.to_rows), None, None, None


def _move(values: Tensor, token_P: Tensor, row_Nk: Tensor, to_rows: bool) -> Tensor:
    if to_rows:
        return values.index_select(0, token_P)
    total_ND = values.index_select(0, row_Nk[:, 0])
    for row_N in row_Nk.unbind(1)[1:]:
        total_ND += values.index_select(0, row_N)
    return total_ND


# ---------------------------------------------------------------- one matrix product per group of rows


def grouped_product(rows_PD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """Multiplies rows ends_E[e - 1] up to ends_E[e] (int32) by weight_EFD[e] transposed, for each e. Returns (P, F)."""
    aligned = rows_PD.shape[1] % 8 == 0 and weight_EFD.shape[1] % 8 == 0  # the kernel reads 16 bytes at a time
    if target.kind(rows_PD.device) == "cuda" and rows_PD.dtype == torch.bfloat16 and aligned and hasattr(F, "grouped_mm"):
        return F.grouped_mm(rows_PD, weight_EFD.transpose(1, 2), offs=ends_E)
    return _looped_product(rows_PD, weight_EFD, ends_E)


# A custom operator, because `ends_E` must be copied to the host: torch.compile then calls it as one operation instead of
# breaking the graph. On CPUs it is as fast as F.grouped_mm, which when compiled supports bf16 only.
@torch.library.custom_op("pretrain::looped_product", mutates_args=())
def _looped_product(rows_PD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    out_PF = rows_PD.new_empty(len(rows_PD), weight_EFD.shape[1])
    for expert, rows in _groups(ends_E):
        torch.mm(rows_PD[rows], weight_EFD[expert].T, out=out_PF[rows])
    return out_PF


@torch.library.custom_op("pretrain::looped_product_backward", mutates_args=())
def _looped_product_backward(gradient_PF: Tensor, rows_PD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    rows_gradient_PD, weight_gradient_EFD = torch.empty_like(rows_PD), torch.empty_like(weight_EFD)
    for expert, rows in _groups(ends_E):
        torch.mm(gradient_PF[rows], weight_EFD[expert], out=rows_gradient_PD[rows])
        torch.mm(gradient_PF[rows].T, rows_PD[rows], out=weight_gradient_EFD[expert])
    return rows_gradient_PD, weight_gradient_EFD


def _groups(ends_E: Tensor) -> list[tuple[int, slice]]:
    ends = ends_E.tolist()
    return [(expert, slice(start, end)) for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]


@_looped_product.register_fake
def _(rows_PD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    return rows_PD.new_empty(rows_PD.shape[0], weight_EFD.shape[1])


@_looped_product_backward.register_fake
def _(gradient_PF: Tensor, rows_PD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows_PD), torch.empty_like(weight_EFD)


def _save_for_backward(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient_PF: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_looped_product_backward(gradient_PF.contiguous(), *ctx.saved_tensors), None


_looped_product.register_autograd(_backward, setup_context=_save_for_backward)
