"""Hyperparameter transfer: how the size of a model changes each weight's initial scale and update, so that the learning rate
found at a small base size stays best at larger ones (`model.scaling`). It knows the names of weights, and no tensors.

With the width ratio w = hidden_size / base_hidden_size and the depth ratio d = num_hidden_layers / base_num_hidden_layers, a
weight has, relative to the base model:

weights                          initial std    lr, AdamW    lr, Muon       eps          lr x decay
q, k, v, gate, up                w^-1/2         1/w          w^-1/2         1/(w d)      1/w
o, down                          w^-1/2 / d     1/(w d)      w^-1/2 / d     1/w          1/w
router                           1/w            1/w          1/w            1/d          1/w
lm_head                          1/w            1/w                         1            1/w
embed_tokens                     1              1                           1/w          does not decay
norms of the blocks              1              1                           1/(w d)      does not decay
q_norm, k_norm                   1              1                           1/d          does not decay
last norm                        1              1                           1/w          does not decay
last norm, tied embeddings       1/w            1/w                         1            does not decay

Experts and shared experts are as gate, up and down; grouped keys and values as k and v. Everything is a change of initial
weights and of updates, and none of the forward pass: a multiplier of a matrix's output equals another initial scale, learning
rate and eps of the matrix (Yang and Hu 2021, arXiv 2011.14522, symmetry of abc-parametrizations). So weights mean the same with
scaling and without, and an exported model is exact by construction.

Width: maximal update parametrization (Yang et al. 2022, arXiv 2203.03466), in terms of spectral norms: weights and updates of a
matrix need a spectral norm of order sqrt(fan_out / fan_in) (Yang, Simon and Bernstein 2023, arXiv 2310.17813). AdamW's update
has entries of order lr and is nearly of low rank, so its norm is lr * sqrt(fan_out * fan_in). Muon's update has the norm
lr * 0.2 * sqrt(max(fan_out, fan_in)) (`optim/muon.py`), which grows as sqrt(w) and so needs w^-1/2. The number of
outputs of a router and of a head does not grow. If the embedding is the head as well, the weight of the last norm scales the
logits instead.

Depth: each branch is scaled by 1/d (CompleteP, alpha = 1: Dey et al. 2025, arXiv 2505.01618), which is folded into its last
matrix; eps follows the gradients, as theirs does. Qiu et al. 2025 (arXiv 2512.05620) find the same rules good for Muon, and
lr x decay of 1/w where tokens grow with parameters. Weights of q_norm and k_norm are shared by heads, so that their gradients
sum over w times as many.

The rules assume what makes models of several sizes alike: head_dim, the number of experts and the experts per token are the
base's; the number of heads and the widths of feed-forward networks are in proportion to hidden_size.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from pretrain.model.config import ModelConfig, ScalingConfig


class Scale(NamedTuple):
    """Factors relative to a model without `model.scaling`. All are 1 at the base size."""

    std: float = 1.0
    """Of the initial standard deviation; of the initial value of a norm."""
    lr: float = 1.0
    """Of the learning rate."""
    weight_decay: float = 1.0
    """Of the weight decay, which the learning rate multiplies."""
    eps: float = 1.0
    """Of AdamW's eps."""


def scale(model: ModelConfig, name: str, *, muon: bool = False) -> Scale:
    """The factors of the parameter `name`, whose update is Muon's or AdamW's, from a resolved `ModelConfig`.

    `_initial_std` of `transformer.py` depends on this model's sizes already: std is the rest.
    """
    if model.scaling is None:
        return Scale()
    wide = model.hidden_size / model.scaling.base_hidden_size
    deep = model.num_hidden_layers / model.scaling.base_num_hidden_layers
    tied = model.tie_word_embeddings
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return Scale(eps=1 / deep)
    if name == "model.norm.weight":
        return Scale(std=1 / wide, lr=1 / wide) if tied else Scale(eps=1 / wide)
    if name.endswith("norm.weight"):
        return Scale(eps=1 / (wide * deep))
    if name == "model.embed_tokens.weight":
        return Scale(std=wide**0.5 if tied else 1.0, eps=1 / wide)
    if name == "lm_head.weight":
        std, lr, eps = wide**-0.5, 1 / wide, 1.0
    elif name.endswith("mlp.gate.weight"):
        std, lr, eps = wide**-0.5, 1 / wide, 1 / deep
    elif name.endswith(LAST_OF_BRANCH):
        std, lr, eps = deep**-0.5, (wide**-0.5 if muon else 1 / wide) / deep, 1 / wide
    else:
        std, lr, eps = 1.0, wide**-0.5 if muon else 1 / wide, 1 / (wide * deep)
    return Scale(std, lr, 1 / wide / lr, eps)


LAST_OF_BRANCH = ("o_proj.weight", "down_proj.weight", "experts.down_proj")
"""Ends of the names of the matrices that write to the residual stream."""


def resized(model: ModelConfig, hidden_size: int, num_hidden_layers: int, *, scaled: bool) -> ModelConfig:
    """A resolved `model` with another width and depth: head_dim, experts and vocabulary are the same, the numbers of heads and
    the widths of feed-forward networks in proportion. scaled: with `model.scaling`, relative to `model`.

    Raises ValueError if a number of heads would not be whole.
    """

    def in_proportion(size: int) -> int:
        return max(1, round(size * hidden_size / model.hidden_size))

    for heads in (model.num_attention_heads, model.num_key_value_heads):
        if heads * hidden_size % model.hidden_size:
            raise ValueError(
                f"width {hidden_size} would have {heads * hidden_size / model.hidden_size:g} heads in place of the {heads} of "
                f"width {model.hidden_size}; it must be a multiple of {model.hidden_size} / {heads}"
            )
    moe = model.moe
    return dataclasses.replace(
        model,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=in_proportion(model.num_attention_heads),
        num_key_value_heads=in_proportion(model.num_key_value_heads),
        intermediate_size=in_proportion(model.intermediate_size),
        moe=moe and dataclasses.replace(moe, moe_intermediate_size=in_proportion(moe.moe_intermediate_size)),
        scaling=ScalingConfig(base_hidden_size=model.hidden_size, base_num_hidden_layers=model.num_hidden_layers)
        if scaled
        else None,
    )
