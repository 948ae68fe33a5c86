"""Assigns each parameter an update rule. It knows a module's parameters; it knows no schedule: the caller writes `lr` into
`param_groups` before each step."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from pretrain.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Builds AdamW (Loshchilov and Hutter 2019), or Muon for the matrices of the blocks and AdamW for the rest (`config.name`).

    Weight decay applies to matrices, but not to vectors and embeddings. Decaying a norm's weight would only shrink its layer.
    Rows of an embedding get gradients as rarely as their tokens occur but would decay at every step, and a small row gets a
    large gradient through the first norm (OLMo 2, Walsh et al. 2024, section 3.3); so they do not decay either, even if the
    embedding is also the head.

    The blocks are the parameters under `model.layers`. Embeddings and head are look-up tables of token ids; Muon would make
    their rows alike (Jordan et al. 2024), so they stay with AdamW.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    hidden, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in embeddings:
            plain.append(parameter)
        elif config.name == "muon" and name.startswith("model.layers."):
            hidden.append(parameter)
        else:
            decayed.append(parameter)
    rule = {"betas": tuple(config.betas), "eps": config.eps}
    groups = [{"params": decayed, "weight_decay": config.weight_decay, **rule}, {"params": plain, "weight_decay": 0.0, **rule}]
    if config.name == "muon":
        from pretrain.optim.muon import Muon  # imports torch.distributed.tensor: a second that AdamW can save

        groups.insert(0, {"params": hidden, "weight_decay": config.weight_decay, "momentum": config.momentum})
        return Muon([group for group in groups if group["params"]], lr=config.lr)
    fused = all(parameter.device.type in ("cpu", "cuda", "xpu", "mps") for parameter in decayed + plain)
    return AdamW(groups, lr=config.lr, fused=fused)


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW without its guards against being compiled, which this project never does: they import `torch._dynamo`,
    a third of the CPU time from a start to its first step."""

    def add_param_group(self, param_group: dict) -> None:
        inspect.unwrap(torch.optim.AdamW.add_param_group)(self, param_group)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        inspect.unwrap(torch.optim.AdamW.step)(self)
