"""Cuts a model over ranks: sequence, tensor and expert parallelism. It knows the modules of `pretrain.model` and the mesh; it
knows no engine. The engine then distributes what is left of each parameter, as if there were no cut.

    sequence    each rank has T / sequence tokens of a sequence. Around each attention, an all-to-all exchanges tokens for heads
                and back (Ulysses: Jacobs et al. 2023).
    tensor      each rank has some heads, some feed-forward columns and some rows of the vocabulary. Between them each rank has
                T / tensor tokens: they are gathered before, and summed and scattered after (Shoeybi et al. 2019; Korthikanti et
                al. 2022). The loss is computed from a part of the vocabulary on each rank, without gathering logits.
    expert      each rank has some experts of each layer, and sends every token to the ranks that have its experts, in messages
                of unequal length, so that none is dropped.

A rank's loss, routing figures and gradients are sums over its own tokens; sums over all ranks are those of one process.

Dimensions: B batch, T all tokens of a sequence, t those of this rank, D model, H heads, h those of this rank, C size of one
head, V vocabulary, v rows of it on this rank, E experts, e those of this rank, N and n tokens, P rows sent to experts, Q rows
received.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from pretrain.engines.mesh import Mesh
from pretrain.engines.shards import Cut
from pretrain.model.loss import IGNORED, product_dtype
from pretrain.model.moe import MixtureOfExperts, MoveRows
from pretrain.model.transformer import FeedForward, Transformer

# torch 2.13 renamed them and warns about the old names.
_all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
_reduce_scatter = getattr(collectives, "reduce_scatter_single", None) or collectives.reduce_scatter_tensor


def cut_model(model: Transformer, mesh: Mesh) -> dict[str, Cut]:
    """Cuts a model on the meta device, in place. Returns the cut of each parameter that is cut, by name."""
    cuts: dict[str, Cut] = {}
    blocks = model.model.layers
    routed = [block.mlp for block in blocks if isinstance(block.mlp, MixtureOfExperts)]
    if mesh.sequence > 1:
        model.model.exchange = HeadExchange(mesh)
    for layer in routed:
        layer.gate.total = partial(_total, mesh)
    if mesh.tensor > 1:
        cuts |= _cut_tensors(model, mesh)
    if mesh.expert > 1:
        cut = Cut(0, mesh.expert_rank, mesh.expert, mesh.expert_group)
        for number, block in enumerate(blocks):
            block.mlp.experts.compute = partial(_exchange_rows, block.mlp.experts.compute, cut)
            cuts |= {f"model.layers.{number}.mlp.experts.{name}": cut for name in ("gate_up_proj", "down_proj")}
    for name, cut in cuts.items():
        module, _, attribute = name.rpartition(".")
        full = model.get_parameter(name)
        shape = [size // (cut.parts if dim == cut.dim else 1) for dim, size in enumerate(full.shape)]
        setattr(model.get_submodule(module), attribute, nn.Parameter(full.new_empty(shape)))
    return cuts


def _total(mesh: Mesh, counts: Tensor) -> Tensor:
    """Sums counts over the ranks that share the sequences."""
    if mesh.sequence > 1:
        counts = _wait(collectives.all_reduce(counts, "sum", mesh.sequence_group))
    if mesh.tensor > 1:
        counts = _wait(collectives.all_reduce(counts, "sum", mesh.tensor_group))
    return counts


# ---------------------------------------------------------------- sequence: heads for tokens


class HeadExchange:
    """`pretrain.model.attention.Exchange` over the ranks that share a sequence."""

    def __init__(self, mesh: Mesh):
        self.part, self.parts, self._group = mesh.sequence_rank, mesh.sequence, mesh.sequence_group

    def to_heads(self, *tensors_BtHC: Tensor) -> tuple[Tensor, ...]:
        """All tokens of H / parts heads, for this rank's tokens of all heads, in one message. Of fewer heads than ranks, each
        rank gets the one that it needs."""
        for_ranks = [self._for_ranks(x_BtHC) for x_BtHC in tensors_BtHC]
        received = _AllToAll.apply(torch.cat(for_ranks, 3), None, None, self._group)  # (parts, B, t, h, C)
        joined_BThC = received.transpose(0, 1).flatten(1, 2)
        return joined_BThC.split([part.shape[3] for part in for_ranks], 2)

    def to_tokens(self, out_BThC: Tensor) -> Tensor:
        """The way back."""
        message = out_BThC.unflatten(1, (self.parts, -1)).transpose(0, 1)  # (parts, B, t, h, C)
        received = _AllToAll.apply(message, None, None, self._group)
        return received.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _for_ranks(self, x_BtHC: Tensor) -> Tensor:
        """(parts, B, t, h, C)."""
        heads = x_BtHC.shape[2]
        if heads < self.parts:
            x_BtHC = x_BtHC.repeat_interleave(self.parts // heads, 2)
        return x_BtHC.unflatten(2, (self.parts, -1)).permute(2, 0, 1, 3, 4)


class _AllToAll(torch.autograd.Function):
    """Sends rows to each rank, in their order, and receives rows from each; `sent` and `received` count them, None: as many to
    and from each. The backward pass sends gradients back."""

    @staticmethod
    def forward(ctx, rows, sent, received, group):
        ctx.way_back = received, sent, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _all_to_all(gradient, *ctx.way_back), None, None, None


def _all_to_all(rows: Tensor, sent: list[int] | None, received: list[int] | None, group: dist.ProcessGroup) -> Tensor:
    return _wait(collectives.all_to_all_single(rows.contiguous(), received, sent, group))


def _wait(tensor: Tensor) -> Tensor:
    return collectives.wait_tensor(tensor)


# ---------------------------------------------------------------- tensor: heads, columns and vocabulary


def _cut_tensors(model: Transformer, mesh: Mesh) -> dict[str, Cut]:
    """Installs the gathering and scattering of tokens around what is cut, and returns the cuts."""
    rows, columns = (Cut(dim, mesh.tensor_rank, mesh.tensor, mesh.tensor_group) for dim in (0, 1))
    tokens = _TokenParts(rows)
    model.register_forward_pre_hook(tokens.begin, with_kwargs=True)
    cuts = {"model.embed_tokens.weight": rows}
    model.model.embed_tokens.forward = partial(_embed, model.model.embed_tokens, tokens)
    for name, module in model.named_modules():
        if name.endswith(".self_attn"):
            cuts |= {f"{name}.{each}.weight": rows for each in ("q_proj", "k_proj", "v_proj")}
            cuts[f"{name}.o_proj.weight"] = columns
        elif isinstance(module, FeedForward):
            cuts |= {f"{name}.{each}.weight": rows for each in ("gate_proj", "up_proj")}
            cuts[f"{name}.down_proj.weight"] = columns
        elif isinstance(module, MixtureOfExperts):
            module.register_forward_pre_hook(tokens.take_valid)
            continue
        else:
            continue
        module.register_forward_pre_hook(tokens.gather)
        module.register_forward_hook(tokens.scatter)
    _cut_head(model, tokens)
    if not model.config.tie_word_embeddings:
        cuts["lm_head.weight"] = rows
    return cuts


class _TokenParts:
    """Hooks that exchange a rank's tokens for all of them and back. While text is generated every rank has all tokens: there is
    nothing to gather, and sums stay on all ranks."""

    def __init__(self, cut: Cut):
        self.cut, self.active = cut, True

    def begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.active = (kwargs.get("cache") if len(args) < 4 else args[3]) is None

    def gather(self, module: nn.Module, args: tuple) -> tuple:
        hidden_BtD, *rest = args
        return (_MoveTokens.apply(hidden_BtD, True, self.cut.group) if self.active else hidden_BtD, *rest)

    def scatter(self, module: nn.Module, args: tuple, out_BTD: Tensor) -> Tensor:
        """This rank's tokens of the sum over ranks."""
        if self.active:
            return _MoveTokens.apply(out_BTD, False, self.cut.group)
        return _wait(collectives.all_reduce(out_BTD, "sum", self.cut.group))

    def take_valid(self, module: nn.Module, args: tuple) -> tuple:
        hidden_BtD, valid_BT = args
        return hidden_BtD, None if valid_BT is None else valid_BT.chunk(self.cut.parts, 1)[self.cut.part]


class _MoveTokens(torch.autograd.Function):
    """Gathers the tokens of all ranks (`gather`), or scatters the sum over ranks: each is the other's backward pass."""

    @staticmethod
    def forward(ctx, hidden, gather, group):
        ctx.way = gather, group
        return _move_tokens(hidden, gather, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gather, group = ctx.way
        return _move_tokens(gradient, not gather, group), None, None


def _move_tokens(hidden: Tensor, gather: bool, group: dist.ProcessGroup) -> Tensor:
    hidden = hidden.contiguous()
    return _wait(_all_gather(hidden, 1, group) if gather else _reduce_scatter(hidden, "sum", 1, group))


def _embed(embedding: nn.Embedding, tokens: _TokenParts, tokens_BT: Tensor) -> Tensor:
    """Each rank looks up the ids whose rows it has; the others add zeros, so that the sum is exact in any dtype."""
    weight_vD, cut = embedding.weight, tokens.cut
    row_BT = tokens_BT - cut.part * len(weight_vD)
    mine_BT = (row_BT >= 0) & (row_BT < len(weight_vD))
    found_BTD = F.embedding(torch.where(mine_BT, row_BT, 0), weight_vD)
    found_BTD = torch.where(mine_BT[..., None], found_BTD, 0).to(product_dtype(found_BTD))
    return tokens.scatter(embedding, (), found_BTD)


def _cut_head(model: Transformer, tokens: _TokenParts) -> None:
    head, cut, vocab_size = model.lm_head, tokens.cut, model.config.vocab_size
    rows = len(model.model.embed_tokens.weight) // cut.parts
    head.vocab_size = rows
    true_rows = min(max(vocab_size - cut.part * rows, 0), rows)
    head.chunk_step, head.ranking_step = partial(_chunk_step, cut, true_rows), partial(_ranking_step, cut, true_rows)

    def gather_logits(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        if args[1] is not None:  # labels: `out` has the losses
            return out
        return _wait(_all_gather(out.contiguous(), out.dim() - 1, cut.group))[..., :vocab_size]

    head.register_forward_pre_hook(tokens.gather)
    head.register_forward_hook(gather_logits)


def _chunk_step(
    cut: Cut, true_rows: int, hidden_nD: Tensor, weight_vD: Tensor, labels_n: Tensor, vocab_size: int, with_gradient: bool,
    out_nv: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`pretrain.model.loss.chunk_step` on this rank's rows of the vocabulary, of which true_rows are not padding. The losses
    are returned by the first rank, 0 by the others: they share the tokens, which must count once."""
    logits_nv = torch.mm(hidden_nD, weight_vD.T).float()
    rows = len(weight_vD)
    if true_rows < rows:
        logits_nv[:, true_rows:] = -torch.inf
    row_n1 = (labels_n - cut.part * rows)[:, None]
    mine_n1 = (row_n1 >= 0) & (row_n1 < rows)  # never where the label is ignored, a negative number
    label_logit_n1 = torch.where(mine_n1, logits_nv.gather(1, torch.where(mine_n1, row_n1, 0)), 0)
    sums_2n = torch.stack([logits_nv.logsumexp(1), label_logit_n1[:, 0]])
    sums_R2n = _wait(_all_gather(sums_2n[None], 0, cut.group))  # R: rank
    log_sum_n = sums_R2n[:, 0].logsumexp(0)  # a rank whose rows are all padding has -inf
    loss_n = torch.where(labels_n != IGNORED, log_sum_n - sums_R2n[:, 1].sum(0), 0) * (cut.part == 0)
    if not with_gradient:
        return loss_n, None
    softmax_nv = logits_nv.sub_(log_sum_n[:, None]).exp_()
    is_label_nv = torch.arange(rows, device=labels_n.device) == row_n1  # fuses; see `pretrain.model.loss.chunk_step`
    return loss_n, (softmax_nv - is_label_nv.float()).to(hidden_nD.dtype)


def _ranking_step(
    cut: Cut, true_rows: int, hits: list[Tensor], hidden_nD: Tensor, weight_vD: Tensor, labels_n: Tensor, *rest: object
) -> tuple[Tensor, None]:
    """`pretrain.model.loss.ranking_step` on this rank's rows of the vocabulary. The first rank alone has hits and losses: the
    others share its tokens, which must count once."""
    logits_nv = (hidden_nD @ weight_vD.T).float()
    best_n, id_n = logits_nv.new_full((len(logits_nv),), -torch.inf), torch.zeros_like(labels_n)
    if true_rows:
        best_n, id_n = logits_nv[:, :true_rows].max(1)
    loss_n, _ = _chunk_step(cut, true_rows, hidden_nD, weight_vD, labels_n, 0, False)
    # An id of less than 2^24 is exact in fp32. The first of the ranks with the largest logit has the first id.
    ids_2n = torch.stack([best_n, (id_n + cut.part * len(weight_vD)).float()])
    best_Rn, id_Rn = _wait(_all_gather(ids_2n[None], 0, cut.group)).unbind(1)  # R: rank
    likeliest_n = id_Rn.gather(0, best_Rn.argmax(0)[None])[0].long()
    hits.append((likeliest_n == labels_n) & (cut.part == 0))
    return loss_n, None


# ---------------------------------------------------------------- expert: rows to the ranks of their experts


def _exchange_rows(compute: Callable, cut: Cut, rows_PD: Tensor, weight_P1: Tensor, ends_E: Tensor) -> Tensor:
    """`Experts.compute` of all ranks' experts: sends each row, sorted by expert, to the rank of its expert, and takes the
    result back."""
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1)).long()
    counts_Re = _all_to_all(counts_E, None, None, cut.group).view(cut.parts, -1)  # R: rank of origin
    sent, received = _sizes(counts_E.view(cut.parts, -1), counts_Re, len(rows_PD))
    rows_QD = _AllToAll.apply(rows_PD, sent, received, cut.group)
    weight_Q1 = _AllToAll.apply(weight_P1, sent, received, cut.group)
    # They arrive sorted by rank, then by expert.
    experts_e = torch.arange(counts_Re.shape[1], device=counts_Re.device)
    expert_Q = experts_e.repeat(cut.parts).repeat_interleave(counts_Re.flatten(), output_size=len(rows_QD))
    order_Q = expert_Q.argsort(stable=True)
    back_Q1 = torch.empty_like(order_Q).scatter_(0, order_Q, torch.arange(len(order_Q), device=order_Q.device))[:, None]
    ends_e = counts_Re.sum(0).cumsum(0).int()
    sorted_QD, sorted_Q1 = (MoveRows.apply(values, order_Q, back_Q1, True) for values in (rows_QD, weight_Q1))
    out_QD = MoveRows.apply(compute(sorted_QD, sorted_Q1, ends_e), order_Q, back_Q1, False)
    return _AllToAll.apply(out_QD, received, sent, cut.group)


def _sizes(counts_Re: Tensor, received_Re: Tensor, rows: int) -> tuple[list[int], list[int]]:
    """Rows that this rank sends to each rank, and receives from each. The host waits for the device here. Fake tensors have no
    counts; those of an even router stand for them."""
    if isinstance(counts_Re, FakeTensor):
        parts = len(counts_Re)
        even = [rows * (i + 1) // parts - rows * i // parts for i in range(parts)]
        return even, even
    return tuple(torch.stack([counts_Re.sum(1), received_Re.sum(1)]).tolist())


# ---------------------------------------------------------------- gradients

_BUCKET = 1 << 22
"""Elements of gradients that are summed at once; a larger one is summed in place."""


def all_reduce_gradients(gradients: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Sums gradients over a group, in place; small ones together."""
    small = []
    for gradient in gradients:
        if gradient.numel() < _BUCKET:
            small.append(gradient)
        else:
            dist.all_reduce(gradient, group=group)
    if small:
        joined = torch.cat([gradient.reshape(-1) for gradient in small])
        dist.all_reduce(joined, group=group)
        torch._foreach_copy_(
            small, [part.view_as(g) for g, part in zip(small, joined.split([g.numel() for g in small]), strict=True)]
        )


def clip_gradients(gradients: list[tuple[Tensor, int]], grad_clip: float) -> Tensor:
    """Clips by the norm of the full gradient, and returns that norm before clipping, ().

    gradients: each of this rank, and the number of ranks that hold the same values.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for gradient, copies in gradients:
        by_copies.setdefault(copies, []).append(gradient)
    squares = [nn.utils.get_total_norm(same).square() / copies for copies, same in by_copies.items()]
    square = torch.stack(squares).sum()
    dist.all_reduce(square)
    norm = square.sqrt()
    if grad_clip:
        torch._foreach_mul_([gradient for gradient, _ in gradients], torch.clamp(grad_clip / (norm + 1e-6), max=1.0))
    return norm
