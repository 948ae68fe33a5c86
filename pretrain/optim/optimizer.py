"""Assigns each parameter an update rule. It knows a module's parameters; it knows no schedule: the caller writes `lr` into
`param_groups` before each step."""

from __future__ import annotations

import inspect
import itertools

import torch
from torch import Tensor, nn

from pretrain.config import OptimizerConfig
from pretrain.optim.averages import Averages, decay_before_adamw, local


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Builds AdamW (Loshchilov and Hutter 2019), or Muon for the matrices of the blocks and AdamW for the rest (`config.name`).

    Weight decay applies to matrices, but not to vectors and embeddings. Decaying a norm's weight would only shrink its layer.
    Rows of an embedding get gradients as rarely as their tokens occur but would decay at every step, and a small row gets a
    large gradient through the first norm (OLMo 2, Walsh et al. 2024, section 3.3); so they do not decay either, even if the
    embedding is also the head.

    The blocks are the parameters under `model.layers`. Embeddings and head are look-up tables of token ids; Muon would make
    their rows alike (Jordan et al. 2024), so they stay with AdamW.

    With `model.scaling` or `embedding_lr_scale`, factors divide these groups further: `lr_scale` multiplies the learning rate
    (`Engine.update`), `weight_decay` and `eps` are each group's own. Without them, all factors are 1.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    hidden, decayed, plain = {}, {}, {}  # parameters of each Scale
    for name, parameter in model.named_parameters():
        muon = config.name == "muon" and name.startswith("model.layers.") and parameter.ndim >= 2
        rule = plain if parameter.ndim < 2 or id(parameter) in embeddings else hidden if muon else decayed
        scale = model.scale(name, muon=muon)
        if id(parameter) in embeddings:
            scale = scale._replace(lr=scale.lr * config.embedding_lr_scale)
        rule.setdefault(scale, []).append(parameter)
    groups = [
        {
            "params": parameters,
            "lr_scale": scale.lr,
            "weight_decay": scale.weight_decay * (0.0 if rule is plain else config.weight_decay),
            **(
                {"momentum": config.momentum}
                if rule is hidden
                else {"betas": tuple(config.betas), "eps": scale.eps * config.eps}
            ),
        }
        for rule in (hidden, decayed, plain)
        for scale, parameters in rule.items()
    ]
    averages = Averages(config.average_decay, config.lookahead, config.lookahead_decay, config.lr)
    if config.name == "muon":
        from pretrain.optim.muon import Muon  # imports torch.distributed.tensor: a second that AdamW can save

        return Muon(groups, config.lr, config.row_beta, config.cautious_decay, averages)
    fused = all(parameter.device.type in ("cpu", "cuda", "xpu", "mps") for parameter in model.parameters())
    return AdamW(groups, config.lr, fused, config.cautious_decay, averages)


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW with cautious decay and averages (`averages.py`), whose tensors are in its state after the first step.

    Without its guards against being compiled, which this project never does: they import `torch._dynamo`, a third of the CPU
    time from a start to its first step."""

    def __init__(self, groups: list[dict], lr: float, fused: bool, cautious_decay: bool, averages: Averages):
        super().__init__(groups, lr=lr, fused=fused)
        self.cautious_decay, self.averages = cautious_decay, averages

    def add_param_group(self, param_group: dict) -> None:
        inspect.unwrap(torch.optim.AdamW.add_param_group)(self, param_group)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        found_inf = getattr(self, "found_inf", None)
        applied = 1.0 if found_inf is None else 1 - found_inf
        starts, decays = self._averages_to_start(), [group["weight_decay"] for group in self.param_groups]
        if self.cautious_decay:
            for group in self.param_groups:
                self._decay(group, applied)
        inspect.unwrap(torch.optim.AdamW.step)(self)
        for parameter, averages in starts:
            self.state[parameter].update(averages)
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
            if self.averages.kinds and group["params"]:
                self._follow(group, applied)

    def _decay(self, group: dict, applied: float | Tensor) -> None:
        """Weight decay, which the update then leaves out."""
        decay, group["weight_decay"] = group["lr"] * group["weight_decay"] * applied, 0.0
        for parameter in group["params"]:
            first = self.state[parameter].get("exp_avg")
            tensors = local([parameter, parameter.grad, parameter.grad if first is None else first])
            decay_before_adamw(*tensors, group["betas"][0], decay)

    def _averages_to_start(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Copies of weights without averages. The state gets them later: PyTorch makes its own only where it is empty."""
        kinds, found = self.averages.kinds, []
        for parameter in itertools.chain.from_iterable(group["params"] for group in self.param_groups):
            if missing := [kind for kind in kinds if kind not in self.state[parameter]]:
                found.append((parameter, {kind: parameter.detach().clone() for kind in missing}))
        return found

    def _follow(self, group: dict, applied: float | Tensor) -> None:
        parameters = group["params"]
        states = {kind: local([self.state[parameter][kind] for parameter in parameters]) for kind in self.averages.kinds}
        step, lr = self.state[parameters[0]]["step"], group["lr"] / group.get("lr_scale", 1.0)
        self.averages.update(local(parameters), states, step, lr, applied)
