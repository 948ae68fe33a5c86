"""Which parameters are updated by what rule. It knows a module's parameters; it knows no schedule: the caller writes `lr` into
`param_groups` before each step."""

from __future__ import annotations

import torch
from torch import nn

from pretrain.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with two groups: matrices, decayed; embeddings and vectors, not decayed.

    A norm's weight pulled to zero would only shrink its layer. Rows of an embedding get gradients as rarely as their tokens
    occur but would be decayed at every step, and a small row meets a large gradient in the first norm (OLMo 2, Walsh et al.
    2024, section 3.3); so they are not decayed either, also when the embedding is the head too.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed, plain = [], []
    parameters = list(model.parameters())
    for parameter in parameters:
        (decayed if parameter.ndim >= 2 and id(parameter) not in embeddings else plain).append(parameter)
    assert {id(p) for p in decayed + plain} == {id(p) for p in parameters} and len(decayed + plain) == len(parameters)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    fused = all(p.device.type in ("cpu", "cuda", "xpu", "mps") for p in parameters)
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=fused)
