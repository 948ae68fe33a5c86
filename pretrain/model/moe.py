"""Mixture of experts: a router sends each token to a few of many feed-forwards. No token is dropped, no expert has a capacity.

It knows one device's tensors and parameter names of transformers (`Qwen3MoeForCausalLM`, with shared experts or sigmoid scores
`Dots1ForCausalLM`). It knows nothing of ranks: what a router counts are sums over tokens, which the step adds up over
micro-batches and ranks.

Sources: Shazeer et al. 2017; Fedus et al. 2021 (Switch: balance loss); Zoph et al. 2022 (ST-MoE: z-loss); Dai et al. 2024
(shared experts); DeepSeek-AI 2024 (DeepSeek-V3: sigmoid scores, balance in a sequence); Wang et al. 2024 (bias in place of a
loss); Qiu et al. 2025 (balance over the global batch); Gale et al. 2022 (no dropped tokens).

Dimensions: B batch, T time, N = B * T tokens, D model, E experts, k experts per token, F feed-forward, P = N * k pairs of a
token and one of its experts, sorted by expert, L layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pretrain.model.config import ModelConfig, MoeConfig
from pretrain.model.loss import product_dtype


class Routed(NamedTuple):
    """What a router did with the valid tokens of a micro-batch. Sums, so that any split of a batch adds up to the same."""

    aux_sum: Tensor
    """(), fp32, with gradient: balance loss, times the tokens it is a mean of."""
    z_sum: Tensor
    """(), fp32, with gradient: squared log-sum-exp of the logits."""
    tokens_E: Tensor
    """fp32, without gradient: tokens sent to each expert."""


class Router(nn.Module):
    """Chooses experts for each token, in fp32 under any precision.

    weights: softmax or sigmoid of the logits at the chosen experts, divided by their sum (`norm_topk_prob`), times
    `routed_scaling_factor`. With sigmoid scores a bias takes part in the choice, not in the weights.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config: MoeConfig = config.moe
        experts = self.config.num_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        if self.config.score == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))
        if self.config.balance == "global_batch":
            # Not in a state dict: other programs' models have none. Real also where the rest is meta, and so loaded by nothing.
            share_E = torch.full((experts,), 1 / experts, dtype=torch.float32, device="cpu")
            self.register_buffer("expert_share", share_E, persistent=False)

    def forward(self, hidden_BTD: Tensor, valid_BT: Tensor | None) -> tuple[Tensor, Tensor, Routed | None]:
        """-> chosen_Nk (int64), weights_Nk (fp32), what is counted over the positions where valid_BT, if given."""
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            logits_NE = F.linear(hidden_BTD.flatten(0, 1).float(), self.weight.float())
            score_NE = logits_NE.softmax(1) if self.config.score == "softmax" else logits_NE.sigmoid()
            choice_NE = score_NE.detach()
            if self.config.score == "sigmoid":
                choice_NE = choice_NE + self.e_score_correction_bias
            chosen_Nk = choice_NE.topk(self.config.num_experts_per_tok, dim=1).indices
            weights_Nk = score_NE.gather(1, chosen_Nk)
            if self.config.norm_topk_prob:
                weights_Nk = weights_Nk / (weights_Nk.sum(1, keepdim=True) + 1e-20)
            weights_Nk = weights_Nk * self.config.routed_scaling_factor
            routed = None if valid_BT is None else self._count(logits_NE, score_NE, chosen_Nk, valid_BT)
        return chosen_Nk, weights_Nk, routed

    def _count(self, logits_NE: Tensor, score_NE: Tensor, chosen_Nk: Tensor, valid_BT: Tensor) -> Routed:
        """The balance loss of a sequence is E * sum over experts of (share of the choices) * (mean share of the score): 1 when
        both are even. It is multiplied by the sequence's valid tokens, so that each of them weighs the same in the sum.

        Over the global batch, the share of the choices is that of the step before: any split of the batch gives one gradient.
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
            tokens_B1 = valid_BT.sum(1, keepdim=True).clamp(min=1)
            aux_sum = experts / chosen * (share_BE * tokens_BE / tokens_B1).sum()
        z_sum = (logits_NE.logsumexp(1, keepdim=True).square() * valid_N1).sum()
        return Routed(aux_sum, z_sum, tokens_BE.sum(0))

    @torch.no_grad()
    def update(self, tokens_E: Tensor, applied: Tensor) -> None:
        """After a step: what follows from the tokens that each expert had in its global batch, if the step was applied."""
        tokens_E = tokens_E.float()
        if self.config.bias_update_rate > 0:
            too_few_E = (tokens_E.mean() - tokens_E).sign()
            self.e_score_correction_bias += self.config.bias_update_rate * too_few_E * applied
        if self.config.balance == "global_batch":
            happened = applied & (tokens_E.sum() > 0)
            self.expert_share.copy_(torch.where(happened, tokens_E / tokens_E.sum().clamp(min=1), self.expert_share))


class Experts(nn.Module):
    """E feed-forwards (SwiGLU) in two stacked matrices; gate and up lie in one. Computes only what was chosen."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts, width = config.moe.num_experts, config.moe.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, config.hidden_size, width))

    def forward(self, hidden_ND: Tensor, chosen_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        """Sum over a token's chosen experts of weight * expert(hidden), (N, D)."""
        dtype = product_dtype(hidden_ND)
        expert_P, order_P = chosen_Nk.flatten().sort(stable=True)
        all_E = torch.arange(len(self.gate_up_proj), device=hidden_ND.device)
        ends_E = torch.searchsorted(expert_P, all_E, right=True, out_int32=True)
        place_Nk = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P), device=order_P.device))
        place_Nk = place_Nk.view_as(chosen_Nk)
        token_P = order_P // chosen_Nk.shape[1]

        rows_PD = _Spread.apply(hidden_ND.to(dtype), token_P, place_Nk)
        gate_PF, up_PF = grouped_product(rows_PD, self.gate_up_proj.to(dtype), ends_E).chunk(2, dim=1)
        weight_P1 = weights_Nk.flatten()[order_P, None].to(dtype)
        out_PD = grouped_product(F.silu(gate_PF) * up_PF * weight_P1, self.down_proj.to(dtype), ends_E)
        return _Gather.apply(out_PD, token_P, place_Nk)


class MixtureOfExperts(nn.Module):
    """The routed experts and, if there are any, the shared ones that every token passes."""

    def __init__(self, config: ModelConfig, shared_experts: nn.Module | None):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = shared_experts

    def forward(self, hidden_BTD: Tensor, valid_BT: Tensor | None) -> tuple[Tensor, Routed | None]:
        """-> hidden_BTD, and what the router counted over the positions where valid_BT, if given."""
        chosen_Nk, weights_Nk, routed = self.gate(hidden_BTD, valid_BT)
        out_BTD = self.experts(hidden_BTD.flatten(0, 1), chosen_Nk, weights_Nk).view_as(hidden_BTD)
        return out_BTD if self.shared_experts is None else out_BTD + self.shared_experts(hidden_BTD), routed


# ---------------------------------------------------------------- tokens to experts and back
#
# A token's k copies are written and summed in a fixed order, without atomic additions: the same bits every time.


def _spread(hidden_ND: Tensor, token_P: Tensor, place_Nk: Tensor) -> Tensor:
    return hidden_ND.index_select(0, token_P)


def _gather(out_PD: Tensor, token_P: Tensor, place_Nk: Tensor) -> Tensor:
    total_ND = out_PD.index_select(0, place_Nk[:, 0])
    for place_N in place_Nk.unbind(1)[1:]:
        total_ND += out_PD.index_select(0, place_N)
    return total_ND


class _Spread(torch.autograd.Function):
    """Rows of the tokens, one for each of their experts, in the order of the experts. The reverse of `_Gather`."""

    @staticmethod
    def forward(ctx, hidden_ND, token_P, place_Nk):
        ctx.save_for_backward(token_P, place_Nk)
        return _spread(hidden_ND, token_P, place_Nk)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_PD):
        return _gather(gradient_PD, *ctx.saved_tensors), None, None


class _Gather(torch.autograd.Function):
    """Sum of each token's rows."""

    @staticmethod
    def forward(ctx, out_PD, token_P, place_Nk):
        ctx.save_for_backward(token_P, place_Nk)
        return _gather(out_PD, token_P, place_Nk)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_ND):
        return _spread(gradient_ND, *ctx.saved_tensors), None, None


# ---------------------------------------------------------------- one matrix for each group of rows


def grouped_product(rows_PD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """Rows ends_E[e - 1] up to ends_E[e] (int32) times weight_EFD[e] transposed, (P, F)."""
    aligned = rows_PD.shape[1] % 8 == 0 and weight_EFD.shape[1] % 8 == 0  # the kernel reads 16 bytes at a time
    if rows_PD.is_cuda and rows_PD.dtype == torch.bfloat16 and aligned and hasattr(F, "grouped_mm"):
        return F.grouped_mm(rows_PD, weight_EFD.transpose(1, 2), offs=ends_E)
    return _looped_product(rows_PD, weight_EFD, ends_E)


# A custom operator, since `ends_E` must come to the host: torch.compile takes it as it is instead of breaking the graph. On
# CPUs it is as fast as F.grouped_mm, whose compiled form knows bf16 only.
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
