"""Attention within documents and sliding windows. Neither memory nor work grows with T x T: what no query sees is not computed.

A mask is one number per query, the first key that it sees: query t sees the keys first_RT[r, t] to t. Rows of a batch that have
the same mask share one row (R == 1), else R == B.

Dimensions: B batch, T time, H query heads, K key and value heads, C size of one head.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def first_visible(length: int, device: torch.device, documents_BT: Tensor | None, window: int | None) -> Tensor:
    """Returns the first key that each query sees, (R, T), int64: the first token of its document, or the first of the last
    `window` tokens. A document is a run of equal numbers in documents_BT."""
    at_T = torch.arange(length, device=device)
    first_RT = at_T.new_zeros(1, length) if window is None else (at_T - (window - 1)).clamp(min=0)[None]
    return first_RT if documents_BT is None else torch.maximum(document_starts(documents_BT), first_RT)


def document_starts(documents_BT: Tensor) -> Tensor:
    """Returns the first token of each token's document, (B, T), int64."""
    at_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    starts_BT = torch.zeros_like(documents_BT, dtype=torch.int64)
    starts_BT[:, 1:] = torch.where(documents_BT[:, 1:] != documents_BT[:, :-1], at_T[1:], 0)
    return starts_BT.cummax(1).values


# ---------------------------------------------------------------- CPU: one call of the flash kernel per document or block

_BLOCK = 128
"""Queries per call of the kernel in documents longer than the window. Smaller blocks compute less in vain, in more calls."""
_SHORT = 64
"""Consecutive documents of at most this many tokens in total share a call. Calls of their own cost as much below that size."""


# A custom operator, because the sizes of documents must be read on the host: torch.compile then calls it as one operation, and
# new documents compile nothing. FlexAttention has no backward pass on CPUs (torch 2.13).
@torch.library.custom_op("pretrain::masked_attention", mutates_args=())
def masked_attention(query_BTHC: Tensor, key_BTKC: Tensor, value_BTKC: Tensor, first_RT: Tensor) -> tuple[Tensor, Tensor]:
    """Returns softmax(q k / sqrt(C)) v over the visible keys, (B, T, H, C), and log-sum-exp of the scores, (B, H, T), fp32."""
    out_BTHC = torch.empty_like(query_BTHC, memory_format=torch.contiguous_format)
    lse_BHT = _empty_lse(query_BTHC)
    for rows, queries, keys, mask in _calls(first_RT, query_BTHC.dtype):
        q, k, v = query_BTHC[rows, queries], key_BTKC[rows, keys], value_BTKC[rows, keys]
        out, lse_BHT[rows, :, queries] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=mask is None, attn_mask=mask
        )
        out_BTHC[rows, queries] = out.transpose(1, 2)
    return out_BTHC, lse_BHT


@torch.library.custom_op("pretrain::masked_attention_backward", mutates_args=())
def _masked_attention_backward(
    gradient_BTHC: Tensor,
    query_BTHC: Tensor,
    key_BTKC: Tensor,
    value_BTKC: Tensor,
    first_RT: Tensor,
    out_BTHC: Tensor,
    lse_BHT: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    query_gradient = torch.empty_like(query_BTHC, memory_format=torch.contiguous_format)
    sum_dtype = torch.promote_types(key_BTKC.dtype, torch.float32)  # keys of a window get a share from several blocks
    key_gradient, value_gradient = (torch.zeros(key_BTKC.shape, dtype=sum_dtype) for _ in range(2))
    for rows, queries, keys, mask in _calls(first_RT, query_BTHC.dtype):
        q, k, v = query_BTHC[rows, queries], key_BTKC[rows, keys], value_BTKC[rows, keys]
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x.transpose(1, 2) for x in (gradient_BTHC[rows, queries], q, k, v, out_BTHC[rows, queries])),
            lse_BHT[rows, :, queries],
            0.0,  # dropout
            mask is None,
            attn_mask=mask,
        )
        query_gradient[rows, queries] = gradients[0].transpose(1, 2)
        key_gradient[rows, keys] += gradients[1].transpose(1, 2)
        value_gradient[rows, keys] += gradients[2].transpose(1, 2)
    return query_gradient, key_gradient.to(key_BTKC.dtype), value_gradient.to(value_BTKC.dtype)


def _calls(first_RT: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, slice, slice, Tensor | None]]:
    """Yields the rows, queries and keys of each call of the kernel and its mask: what to add to scores, or None if causal."""
    if (first_RT == first_RT[0]).all():  # one call for all rows
        first_RT = first_RT[:1]
    for row, first_T in enumerate(first_RT):
        rows = slice(None) if len(first_RT) == 1 else slice(row, row + 1)
        for start, end, key, causal in _blocks(first_T):
            mask = None
            if not causal:
                at_S = torch.arange(key, end)
                hidden_TS = (at_S > at_S[start - key :, None]) | (at_S < first_T[start:end, None])
                mask = torch.zeros(hidden_TS.shape, dtype=dtype).masked_fill_(hidden_TS, -torch.inf)[None, None]
            yield rows, slice(start, end), slice(key, end), mask


def _blocks(first_T: Tensor) -> list[tuple[int, int, int, bool]]:
    """Splits the queries of a row -> [(first query, end, first key, whether every query sees all keys up to itself)]."""
    start_D = (first_T == torch.arange(len(first_T))).nonzero().flatten()  # where a query sees itself only, a document begins
    end_D = torch.cat((start_D[1:], torch.tensor([len(first_T)])))
    blocks = []
    for start, end, key in zip(start_D.tolist(), end_D.tolist(), first_T[end_D - 1].tolist(), strict=True):
        if blocks and blocks[-1][0] == blocks[-1][2] and end - blocks[-1][0] <= _SHORT:
            blocks[-1] = (blocks[-1][0], end, blocks[-1][0], False)
        elif key == start or end - start <= _BLOCK:
            blocks.append((start, end, start, key == start))
        else:
            firsts = zip(range(start, end, _BLOCK), first_T[start:end:_BLOCK].tolist(), strict=True)
            blocks += [(at, min(at + _BLOCK, end), first, False) for at, first in firsts]
    return blocks


def _empty_lse(query_BTHC: Tensor) -> Tensor:
    batch, length, heads, _ = query_BTHC.shape
    return query_BTHC.new_empty((batch, heads, length), dtype=torch.promote_types(query_BTHC.dtype, torch.float32))


@masked_attention.register_fake
def _(query_BTHC: Tensor, key_BTKC: Tensor, value_BTKC: Tensor, first_RT: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query_BTHC, memory_format=torch.contiguous_format), _empty_lse(query_BTHC)


@_masked_attention_backward.register_fake
def _(gradient_BTHC, query_BTHC, key_BTKC, value_BTKC, *rest) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query_BTHC, key_BTKC, value_BTKC))


def _save_for_backward(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, gradient_BTHC: Tensor, _) -> tuple[Tensor | None, ...]:
    return *_masked_attention_backward(gradient_BTHC, *ctx.saved_tensors), None


masked_attention.register_autograd(_backward, setup_context=_save_for_backward)


# Shapes alone do not say how long documents are, so the counts are those of attention without a mask.
@register_flop_formula(torch.ops.pretrain.masked_attention)
def _flops(query, key, value, *rest, out_shape=None, **options) -> int:
    return sdpa_flop_count(*map(_heads_first, (query, key, value)))


@register_flop_formula(torch.ops.pretrain.masked_attention_backward)
def _backward_flops(gradient, query, key, value, *rest, out_shape=None, **options) -> int:
    return sdpa_backward_flop_count(*map(_heads_first, (gradient, query, key, value)))


def _heads_first(shape) -> tuple[int, ...]:
    return shape[0], shape[2], shape[1], shape[3]


# ---------------------------------------------------------------- GPU: FlexAttention

_TILE = 128
"""Queries and keys in a tile of the block mask: FlexAttention's own default."""


def block_mask(first_RT: Tensor) -> BlockMask:
    """Builds FlexAttention's mask from first_RT: which tiles of 128 queries by 128 keys are visible, entirely or in part.

    Its shapes depend on T alone, and no value is read on the host. So documents have no maximum number, nothing waits for the
    GPU, and new documents compile nothing. `create_block_mask` would evaluate all T x T pairs.
    """
    from torch.nn.attention.flex_attention import BlockMask  # imports the compiler

    length = first_RT.shape[1]
    start_N = torch.arange(0, length, _TILE, device=first_RT.device)
    last_N = (start_N + (_TILE - 1)).clamp(max=length - 1)
    lowest_RN, highest_RN = first_RT[:, start_N], first_RT[:, last_N]  # a later query never sees an earlier key
    visible_RNN = (start_N <= start_N[:, None]) & (last_N >= lowest_RN[..., None])
    whole_RNN = (start_N < start_N[:, None]) & (start_N >= highest_RN[..., None])
    whole_RNN &= (start_N + _TILE <= length)[:, None]  # as `create_block_mask`: a tile with fewer queries needs the mask
    partly = _ordered((visible_RNN & ~whole_RNN)[:, None])
    first_of = first_RT[0] if len(first_RT) == 1 else first_RT

    def visible(row, head, query, key):
        first = first_of[query] if first_of.dim() == 1 else first_of[row, query]
        return (key <= query) & (key >= first)

    return BlockMask.from_kv_blocks(
        *partly, *_ordered(whole_RNN[:, None]), BLOCK_SIZE=_TILE, mask_mod=visible, seq_lengths=(length, length)
    )


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the number of True in each last dimension, and their indices followed by all others; int32."""
    indices = chosen.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), indices.to(torch.int32)


def flex_attention(query_BTHC: Tensor, key_BTKC: Tensor, value_BTKC: Tensor, mask: BlockMask) -> Tensor:
    """Computes the same as `masked_attention` with a kernel that the compiler generates. Its backward adds in a fixed order.

    Source: Dong et al. 2024. Chosen over `torch.nn.attention.varlen`, whose list of documents needs a fixed length on the GPU,
    so a maximum number, and which was slower in torchtitan (its pull request 2000, Llama 3 8B).
    """
    heads_first = (x.transpose(1, 2) for x in (query_BTHC, key_BTKC, value_BTKC))
    grouped = query_BTHC.shape[2] != key_BTKC.shape[2]
    return _kernel()(*heads_first, block_mask=mask, enable_gqa=grouped).transpose(1, 2)


def _kernel():
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else _compiled_kernel()


@functools.cache
def _compiled_kernel():
    """Compiled on its own where the caller is not: uncompiled, it stores all T x T scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)
