"""Causal attention: rotary position embedding, the key-value cache and the choice of a kernel.

It knows queries, keys and values. It knows no weights: those belong to the transformer.

Dimensions: B batch, T time (queries), S time (keys; more than T with a cache), H query heads, K key and value heads,
C size of one head.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pretrain import UserError, target
from pretrain.model.config import ModelConfig, RopeScalingConfig
from pretrain.model.functions import rotate_pairs
from pretrain.model.masked import block_mask, document_starts, first_visible, flex_attention, masked_attention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Exchange(Protocol):
    """Devices that share the tokens of a sequence: between attentions each has all heads of its t = T / parts tokens, in an
    attention it has some heads of all T tokens."""

    part: int
    parts: int

    def to_heads(self, query_BtHC: Tensor, key_BtKC: Tensor, value_BtKC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exchanges this device's tokens for its heads: (B, T, H / parts, C), and as many key heads as these need."""

    def to_tokens(self, out_BThC: Tensor) -> Tensor:
        """Exchanges this device's heads for its tokens: (B, t, H, C)."""


@dataclass(frozen=True)
class AttentionContext:
    """Positions and mask of one forward pass, shared by all layers.

    Engines must not cast it as they cast the arguments of modules: cosines in bf16 would blur the positions.
    """

    cos_TC: Tensor
    """fp32, (T, C / 2), or (B, T, C / 2) if rows start with padding or positions with each document."""
    sin_TC: Tensor
    """Shape and dtype of cos_TC."""
    visible_BTS: Tensor | None = None
    """With a cache: True where a query may see a key. None: every key up to the query's own position (T == S), or all keys
    (T == 1)."""
    first_RT: Tensor | None = None
    """Documents or windows without a cache: the first key that each query sees, int64 (see `pretrain.model.masked`)."""
    block_mask: BlockMask | None = None
    """In place of first_RT on a GPU."""
    cudnn_first: bool = False
    """Prefer cuDNN's kernel. Decided outside the compiled blocks: a query of the device would enter the graph."""
    valid_BT: Tensor | None = None
    """True at positions that have a label: routers count only those. None: no labels, and routers count nothing."""
    exchange: Exchange | None = None
    """Of devices that share the sequence; T is then the length of this device's part in cos_TC and that of the entire sequence
    in first_RT. None: this device has all tokens."""


def attention_context(
    config: ModelConfig,
    length: int,
    device: torch.device,
    documents_BT: Tensor | None = None,
    cache: KeyValueCache | None = None,
    valid_BT: Tensor | None = None,
    exchange: Exchange | None = None,
) -> AttentionContext:
    """Builds the context of `length` tokens that follow those in the cache, or in the parts of other devices (`exchange`).
    Source: Su et al. 2021 (RoFormer).

    Computed in fp32 on every call, so there is no table to outgrow and no buffer that an engine could cast or forget to fill.
    documents_BT: document number of each token of the entire sequence, int; tokens see only their own document, where their
    positions start again with `config.reset_positions`. With
    `config.sliding_window`, a token sees that many tokens, including itself (Beltagy et al. 2020; as in Mistral 7B). No token
    sees the padding at the start of a row (`KeyValueCache.padding_B`), and the row's positions count from the token after it.
    """
    start, padding_B = (0, None) if cache is None else (cache.length, cache.padding_B)
    entire = length
    if exchange is not None:
        start, entire = exchange.part * length, exchange.parts * length
    sliding_window = config.sliding_window
    index_T = torch.arange(start, start + length, dtype=torch.float32, device=device)
    position_T = index_T if padding_B is None else index_T - padding_B[:, None]
    if config.reset_positions and documents_BT is not None:
        position_T = index_T - document_starts(documents_BT)[:, start : start + length]
    angle_TC = position_T[..., None] * frequencies(config.head_dim, config.rope_theta, config.rope_scaling, device)
    context = AttentionContext(angle_TC.cos(), angle_TC.sin(), valid_BT=valid_BT, exchange=exchange)
    if cache is not None and documents_BT is None:
        return replace(context, visible_BTS=_visible_in_cache(index_T, start + length, padding_B, sliding_window))
    if documents_BT is not None or (sliding_window is not None and entire > sliding_window):
        first_RT = first_visible(entire, device, documents_BT, sliding_window)
        # Fake tensors have no kernel to generate; the operator stands for it and saves tensors of the same sizes.
        if device.type != "cuda" or isinstance(first_RT, FakeTensor):
            return replace(context, first_RT=first_RT)
        if config.head_dim < 16:
            raise UserError(f"model.head_dim is {config.head_dim}: documents and windows need at least 16 on a GPU")
        return replace(context, block_mask=block_mask(first_RT))
    # On Hopper 1.7 to 2.3 times as fast as the default flash kernel; slower than that on other generations. Not while
    # generating: cuDNN makes a plan for each pair of lengths, so for each token.
    cudnn_first = entire > 1 and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return replace(context, cudnn_first=cudnn_first)


def frequencies(head_dim: int, rope_theta: float, scaling: RopeScalingConfig | None, device: torch.device) -> Tensor:
    """Rotary frequencies in radians per position, one for each pair of a head's dimensions: (C / 2,), fp32.

    Scaling: `linear`, Chen et al. 2023; `llama3`, as in Llama 3.1 (Grattafiori et al. 2024, section 3.4.2, and its code).
    """
    exponent_C = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequency_C = 1.0 / rope_theta**exponent_C
    if scaling is None:
        return frequency_C
    if scaling.kind == "linear":
        return frequency_C / scaling.factor
    turns_C = frequency_C * (scaling.original_max_position_embeddings / (2 * math.pi))
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_C = ((turns_C - low) / (high - low)).clamp(0, 1)
    return frequency_C * (kept_C + (1 - kept_C) / scaling.factor)


def _visible_in_cache(index_T: Tensor, keys: int, padding_B: Tensor | None, sliding_window: int | None) -> Tensor | None:
    """Returns visible_BTS for the positions index_T, the last of `keys` ones, or None."""
    if padding_B is None and len(index_T) in (1, keys) and (sliding_window is None or keys <= sliding_window):
        return None
    key_S = torch.arange(keys, device=index_T.device)
    distance_TS = index_T[:, None] - key_S
    visible_BTS = (distance_TS >= 0)[None]
    if sliding_window is not None:
        visible_BTS = visible_BTS & (distance_TS < sliding_window)
    if padding_B is not None:  # padding sees itself, or softmax would be NaN
        visible_BTS = visible_BTS & ((key_S >= padding_B[:, None])[:, None] | (distance_TS == 0))
    return visible_BTS


def rotate(x_BTHC: Tensor, context: AttentionContext) -> Tensor:
    """Applies the rotary embedding in Hugging Face's half-split layout; computes in fp32, returns the dtype of x_BTHC."""
    return rotate_pairs(x_BTHC, context.cos_TC.unsqueeze(-2), context.sin_TC.unsqueeze(-2))


class KeyValueCache:
    """Keys and values of the tokens seen so far, for every layer, in memory allocated once for `capacity` tokens.

    padding_B: number of padding tokens at the start of each row, int64; None: no padding.
    """

    def __init__(self, layers: int, capacity: int, padding_B: Tensor | None = None):
        self.capacity, self.length, self.padding_B = capacity, 0, padding_B
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def append(self, layer: int, key_BTKC: Tensor, value_BTKC: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's new keys and values and returns all so far, (B, S, K, C). The model advances `length` after the last
        layer. Raises ValueError if they do not fit.
        """
        batch, new, heads, head_dim = key_BTKC.shape
        end = self.length + new
        if end > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens and got {end}: create it with a larger capacity")
        if self._layers[layer] is None:
            shape = (batch, self.capacity, heads, head_dim)
            self._layers[layer] = key_BTKC.new_empty(shape), value_BTKC.new_empty(shape)
        keys_BSKC, values_BSKC = self._layers[layer]
        keys_BSKC[:, self.length : end] = key_BTKC
        values_BSKC[:, self.length : end] = value_BTKC
        return keys_BSKC[:, :end], values_BSKC[:, :end]


def attend(query_BTHC: Tensor, key_BSKC: Tensor, value_BSKC: Tensor, context: AttentionContext) -> Tensor:
    """Computes softmax(q k / sqrt(C)) v over the keys that each query may see. Query head h uses key head h // (H / K).
    Returns (B, T, H, C)."""
    if context.exchange is None:
        return _attend(query_BTHC, key_BSKC, value_BSKC, context)
    heads = context.exchange.to_heads(query_BTHC, key_BSKC, value_BSKC)
    return context.exchange.to_tokens(_attend(*heads, context))


def _attend(query_BTHC: Tensor, key_BSKC: Tensor, value_BSKC: Tensor, context: AttentionContext) -> Tensor:
    if context.block_mask is not None:
        return flex_attention(query_BTHC, key_BSKC, value_BSKC, context.block_mask)
    if context.first_RT is not None:
        return masked_attention(query_BTHC, key_BSKC, value_BSKC, context.first_RT)[0]
    if query_BTHC.shape[1] == 1:
        return _attend_one(query_BTHC, key_BSKC, value_BSKC, context.visible_BTS)
    query, key, value = (x.transpose(1, 2) for x in (query_BTHC, key_BSKC, value_BSKC))
    visible_BTS = context.visible_BTS
    grouped = key.shape[1] != query.shape[1]
    if grouped and visible_BTS is not None and target.kind(query.device) == "cuda":
        # The memory-efficient kernel accepts a mask but no groups; any other kernel would store all T x S scores.
        repeats = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), False
    causal = visible_BTS is None
    mask = None if visible_BTS is None else visible_BTS[:, None]
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True) if context.cudnn_first else nullcontext():
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def _attend_one(query_BTHC: Tensor, key_BSKC: Tensor, value_BSKC: Tensor, visible_BTS: Tensor | None) -> Tensor:
    """Attention of a single query (T == 1). The heads of a group become queries of their key head, which is read once."""
    batch, _, heads, head_dim = query_BTHC.shape
    query_BKGC = query_BTHC.reshape(batch, key_BSKC.shape[2], -1, head_dim)
    mask = None if visible_BTS is None else visible_BTS[:, None]
    out = F.scaled_dot_product_attention(query_BKGC, key_BSKC.transpose(1, 2), value_BSKC.transpose(1, 2), attn_mask=mask)
    return out.reshape(batch, 1, heads, head_dim)
