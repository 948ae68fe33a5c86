"""The decoder: from tokens to hidden states to logits or loss. Parameter names and results match `LlamaForCausalLM`; with
qk_norm, `Qwen3ForCausalLM`; with experts, `Qwen3MoeForCausalLM`, `MixtralForCausalLM` or `Dots1ForCausalLM`. State dicts can be
exchanged with them unchanged.

It knows the tensors of one device. It knows nothing of ranks, precision (the caller enters autocast), optimizers or files.

Dimensions: B batch, T time, D model, H query heads, K key and value heads, C size of one head, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.attention import AttentionContext, Exchange, KeyValueCache, attend, attention_context, rotate
from pretrain.model.config import ModelConfig
from pretrain.model.flops import vocabulary_rows
from pretrain.model.functions import rms_norm
from pretrain.model.loss import IGNORED, chunk_step, cross_entropy_sums, product_dtype, ranking_step
from pretrain.model.moe import MixtureOfExperts, Routing
from pretrain.model.scaling import LAST_OF_BRANCH, Scale, scale


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32. Source: Zhang and Sennrich 2019."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped key and value heads; with `qk_norm`, RMSNorm on each query and key head."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        query_size, key_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, hidden_BTD: Tensor, context: AttentionContext, cache: KeyValueCache | None = None) -> Tensor:
        heads = (*hidden_BTD.shape[:2], -1, self.head_dim)
        query_BTHC = rotate(self.q_norm(self.q_proj(hidden_BTD).view(heads)), context)
        key_BSKC = rotate(self.k_norm(self.k_proj(hidden_BTD).view(heads)), context)
        value_BSKC = self.v_proj(hidden_BTD).view(heads)
        if cache is not None:
            key_BSKC, value_BSKC = cache.append(self.layer, key_BSKC, value_BSKC)
        return self.o_proj(attend(query_BTHC, key_BSKC, value_BSKC, context).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU. Source: Shazeer 2020."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_BTD)) * self.up_proj(hidden_BTD))


class Block(nn.Module):
    """One layer: the unit that engines compile, shard and recompute."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _experts(config) if config.moe else FeedForward(config.hidden_size, config.intermediate_size)

    def forward(
        self, hidden_BTD: Tensor, context: AttentionContext, cache: KeyValueCache | None = None
    ) -> tuple[Tensor, Routing | None]:
        """Returns hidden_BTD, and the routing figures if the block has a router and there are labels."""
        hidden_BTD = hidden_BTD + self.self_attn(self.input_layernorm(hidden_BTD), context, cache)
        normed_BTD = self.post_attention_layernorm(hidden_BTD)
        if isinstance(self.mlp, MixtureOfExperts):
            out_BTD, routing = self.mlp(normed_BTD, context.valid_BT)
            return hidden_BTD + out_BTD, routing
        return hidden_BTD + self.mlp(normed_BTD), None


def _experts(config: ModelConfig) -> MixtureOfExperts:
    shared = config.moe.num_shared_experts * config.moe.moe_intermediate_size
    return MixtureOfExperts(config, FeedForward(config.hidden_size, shared) if shared else None)


class Decoder(nn.Module):
    """Embedding, blocks, final norm."""

    exchange: Exchange | None = None
    """Set where devices share the tokens of a sequence."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # from_pretrained draws no weights; on the meta device, drawing them would import the compiler.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(vocabulary_rows(config), config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        tokens_BT: Tensor,
        documents_BT: Tensor | None = None,
        cache: KeyValueCache | None = None,
        valid_BT: Tensor | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Returns hidden_BTD and, with experts and valid_BT, the routing figures of each layer over the positions it marks."""
        embedded_BTD = self.embed_tokens(tokens_BT)
        # Autocast leaves the embedding in fp32, which would keep the entire residual stream in fp32: twice the memory traffic.
        hidden_BTD = embedded_BTD.to(product_dtype(embedded_BTD))
        exchange = self.exchange if cache is None else None  # who generates has all tokens on each device
        length, device = tokens_BT.shape[1], tokens_BT.device
        context = attention_context(self.config, length, device, documents_BT, cache, valid_BT, exchange)
        routing = []
        for block in self.layers:
            hidden_BTD, figures = block(hidden_BTD, context, cache)
            if figures is not None:
                routing.append(figures)
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        return self.norm(hidden_BTD), routing


class Head(nn.Module):
    """The output matrix, and logits and loss from it in one module, because engines that gather parameters around a module's
    forward pass (FSDP2, ZeRO-3) must do so for both. If tied, it has no matrix: the caller passes the embedding's."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.vocab_size = config.vocab_size
        rows = vocabulary_rows(config)
        weight = None if config.tie_word_embeddings else nn.Parameter(torch.empty(rows, config.hidden_size))
        self.register_parameter("weight", weight)
        self.chunk_step, self.ranking_step = chunk_step, ranking_step
        self.hits: list[Tensor] | None = None
        """A list that receives, for each chunk of labels, whether they are the likeliest ids, from a pass without gradients.
        None: not wanted, as in training."""

    def forward(self, hidden_BTD: Tensor, labels_BT: Tensor | None, tied_weight_VD: Tensor | None):
        """Returns logits, or with labels_BT the result of `cross_entropy_sums`."""
        weight_VD = self.weight if tied_weight_VD is None else tied_weight_VD
        if labels_BT is not None:
            step = self.chunk_step if self.hits is None else partial(self.ranking_step, self.hits)
            return cross_entropy_sums(hidden_BTD, weight_VD, labels_BT, self.vocab_size, step=step)
        return F.linear(hidden_BTD, weight_VD)[..., : self.vocab_size]


class LossOutput(NamedTuple):
    """The result of a forward pass with labels."""

    loss_sum: Tensor
    """(), fp32: cross-entropy in nats, summed over the labels that are not -100."""
    loss_B: Tensor
    """(B,), fp32, without gradient: the same of each sequence."""
    routing_LX: Tensor | None
    """(L, 2 + E), float64, without gradient: for each layer, sums over the valid tokens of balance loss and z-loss, then the
    number of tokens sent to each expert. None in a dense model."""


class Transformer(nn.Module):
    """A decoder language model from a resolved `ModelConfig` (no field is None). Create it with `build`, or on the meta device
    followed by `load_state_dict(..., assign=True)`: the constructor leaves the weights uninitialized.

    With tied embeddings there is no `lm_head.weight`, neither as a parameter nor in the state dict.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Head(config)

    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor | LossOutput:
        """Returns a `LossOutput` if there are labels_BT, else logits_BTV over the true vocabulary, without padding rows.

        tokens_BT, labels_BT: int64 ids; labels are already shifted (the label of a position is the next token).
        documents_BT: document number of each token, int; a token sees only its own document. None: one document.
        cache: holds the tokens before tokens_BT and adds these; the logits are then (B, 1, V), for the token after the last.

        With experts, the gradient of loss_sum includes the routers' losses, each times its weight, averaged over layers and
        summed over valid tokens as loss_sum is. The value of loss_sum is the cross-entropy alone.
        """
        moe = self.config.moe
        valid_BT = None if labels_BT is None or moe is None else labels_BT != IGNORED
        hidden_BTD, routing = self.model(tokens_BT, documents_BT, cache, valid_BT)
        tied_weight_VD = self.model.embed_tokens.weight if self.config.tie_word_embeddings else None
        out = self.lm_head(hidden_BTD if cache is None else hidden_BTD[:, -1:], labels_BT, tied_weight_VD)
        if labels_BT is None:
            return out
        if not routing:
            return LossOutput(*out, None)
        penalties = (moe.aux_loss_weight * layer.aux_sum + moe.z_loss_weight * layer.z_sum for layer in routing)
        penalty = sum(penalties) / len(routing)
        rows = [torch.cat([layer.aux_sum[None], layer.z_sum[None], layer.tokens_E]) for layer in routing]
        loss_sum, loss_B = out
        return LossOutput(loss_sum + (penalty - penalty.detach()), loss_B, torch.stack(rows).detach().double())

    def update_routers(self, routing_LX: Tensor, applied: Tensor) -> None:
        """Updates the routers' biases and expert shares after a step. Only for models with `needs_router_updates`.

        routing_LX: `LossOutput.routing_LX`, summed over all micro-batches and ranks of the step. applied: (), bool; where it is
        False, nothing changes.
        """
        for block, routing_X in zip(self.model.layers, routing_LX, strict=True):
            block.mlp.gate.update(routing_X[2:], applied)

    @property
    def needs_router_updates(self) -> bool:
        """True if the routers have state that is updated from the routing of the global batch, besides their gradients."""
        moe = self.config.moe
        return moe is not None and (moe.bias_update_rate > 0 or moe.balance == "global_batch")

    @torch.no_grad()
    def fill_initial(self, values: Tensor, offset: int, name: str, shape: tuple[int, ...], seed: int) -> None:
        """Writes a part of the initial value of the parameter or buffer `name`, whose full shape is `shape`, into values (1-D,
        fp32, on any device): those from `offset` on, in the flattened parameter.

        Its generator is keyed by seed and name, so the value is the same on every rank, device and dtype, whatever was drawn
        before, and several parameters can be drawn at once, in threads. It takes a few megabytes besides `values`.
        Values are normal with mean 0, except in norms. A router's bias is 0, the shares of its experts are even.

        parameter                        standard deviation                  source
        norm weights                     1 (constant)                        Zhang and Sennrich 2019
        q, k, v, gate, up                1 / sqrt(fan_in)                    unit variance: LeCun et al. 1998
        o, down                          1 / sqrt(fan_in * 2 * layers)       residual sum of order one: GPT-2
        experts, shared experts          as gate, up and down                each is a feed-forward network
        router (mlp.gate)                1 / sqrt(fan_in)                    logits of unit variance, so a soft choice
        embed_tokens                     0.3                                 as large as the sum of the branches: see below
        lm_head, or tied embed_tokens    0.4 / sqrt(D)                       first loss ln V: see below

        With the usual 0.02 the embedding is negligible beside the first block's output. Measured on Python source, 4 layers,
        D 128, 300 steps of 2048 tokens: training loss 4.27 with 0.3 and 4.53 with 0.02 (V 4096, lr 2e-3), 1.76 and 1.89 (bytes,
        lr 5e-4).

        The head reads a vector of length sqrt(D), so its logits have variance D * std^2 = 0.16, and the first loss exceeds
        ln V by half of that: under 2 % for any V >= 64. Tied, the input token's own logit is D * std^2 / rms, where rms is the
        size of the residual stream after the last block, which the scaled branches keep near 0.5: again less than one.

        With `zero_init_outputs`, o and down are 0, so that each block begins as the identity (Goyal et al. 2017, arXiv
        1706.02677, zeroed the last scale of each residual block).

        With `model.scaling`, `scaling.py` changes these standard deviations, and may change the weight of the last norm.
        """
        if name.endswith("norm.weight"):
            values.fill_(scale(self.config, name).std)
        elif name.endswith((".e_score_correction_bias", ".expert_share")):
            values.fill_(0.0 if name.endswith("bias") else 1 / shape[0])
        elif self.config.zero_init_outputs and name.endswith(LAST_OF_BRANCH):
            values.zero_()
        else:
            key = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
            _draw_normal(values, offset, math.prod(shape), self._initial_std(name, shape[-1]), generator)

    def scale(self, name: str, *, muon: bool) -> Scale:
        """How `model.scaling` changes the update of the parameter `name`, for the optimizer."""
        return scale(self.config, name, muon=muon)

    def _initial_std(self, name: str, fan_in: int) -> float:
        return self._plain_std(name, fan_in) * scale(self.config, name).std

    def _plain_std(self, name: str, fan_in: int) -> float:
        config = self.config
        if name == "lm_head.weight" or (name == "model.embed_tokens.weight" and config.tie_word_embeddings):
            return 0.4 * config.hidden_size**-0.5
        if name == "model.embed_tokens.weight":
            return 0.3
        if name.endswith(LAST_OF_BRANCH):
            return (fan_in * 2 * config.num_hidden_layers) ** -0.5
        return fan_in**-0.5


_DRAWN = 1 << 20
"""Values drawn at a time, 4 MiB; a multiple of 16."""


def _draw_normal(values: Tensor, offset: int, count: int, std: float, generator: torch.Generator) -> None:
    """Writes elements [offset, offset + len(values)) of `torch.empty(count).normal_(0, std, generator=generator)` into values.

    `normal_` takes one number of the generator for each value, makes 16 values of 16 numbers, and draws the last 16 anew if
    `count` is not a multiple of 16. So blocks of a multiple of 16 give the same values, if the last one has 16 or more; and a
    block before `offset` only has to take its numbers.
    """
    end = offset + values.numel()
    drawn = torch.empty(min(count, _DRAWN + 15), dtype=torch.float32, device="cpu")
    starts = range(0, max(count - 15, 1), _DRAWN)
    for start, stop in itertools.zip_longest(starts, starts[1:], fillvalue=count):
        block = drawn[: stop - start]
        if start >= end:
            return
        if stop <= offset:
            block.view(torch.int32).random_(generator=generator)  # takes as many numbers in 0.7 of the time
            continue
        block.normal_(0.0, std, generator=generator)
        first, last = max(start, offset), min(stop, end)
        values[first - offset : last - offset].copy_(block[first - start : last - start])


def build(config: ModelConfig, device: torch.device | str, seed: int) -> Transformer:
    """Returns the model on `device` with its initial weights in fp32, the same on every rank. Built on the meta device first,
    so that memory is allocated only once."""
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            model.fill_initial(tensor.view(-1), 0, name, tuple(tensor.shape), seed)
    return model
