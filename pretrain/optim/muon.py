"""Muon for matrices and AdamW for the rest, in one optimizer. It knows parameters and their gradients, full or sharded over
ranks; it knows no model, no schedule and no engine.

Muon moves a matrix by the semi-orthogonal matrix nearest to its momentum, so every direction of the gradient counts equally
(Jordan et al. 2024, kellerjordan.github.io/posts/muon). With the momentum m, the gradient g and mu = `momentum`:

    m <- mu m + (1 - mu) g                             an average: only its direction matters
    o <- newton_schulz(mu m + (1 - mu) g)              Nesterov's look-ahead
    w <- w - lr * weight_decay * w - lr * 0.2 * sqrt(max(rows, columns)) * o

A semi-orthogonal matrix has a root mean square of 1 / sqrt(max(rows, columns)), so the factor makes it 0.2 for every shape.
AdamW's updates have that size too, so both rules share one learning rate and one weight decay (Liu et al. 2025, arXiv
2502.16982).

Newton-Schulz needs full matrices, and each costs as many FLOPs as a forward pass over 10 to 15 tokens per row of its shorter
side. So ranks share the work (`Partition`), whether they hold the same parameters or shards of them, with the same result.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from pretrain import target
from pretrain.optim.partition import LocalRows, Partition


class Muon(torch.optim.Optimizer):
    """Groups with a key `momentum` follow Muon, groups with `betas` and `eps` follow AdamW; all have `params`, `weight_decay`.

    Muon's parameters are matrices (rows, columns) or stacks of them (number, rows, columns): plain tensors that are equal on
    all ranks of the default process group, if there is one; DTensors that are sharded on dimension 0, replicated, or both; or
    parts of matrices that ranks have cut, whose attribute `holders` says so (`partition.py`).
    The constructor creates the state: `momentum_buffer` and `step` for Muon parameters; `exp_avg`, `exp_avg_sq` and `step` for
    AdamW parameters. `step` is 0-dim; the others have the parameter's shape and placement.

    As with fused AdamW, a step leaves weights and state untouched if `found_inf`, a 0-dim tensor on the device, is 1; the host
    does not wait for it. All ranks must call `step` together, with the same gradients where they hold the same parameters.

    Raises ValueError for a Muon parameter of another shape or placement.
    """

    def __init__(self, groups: list[dict], lr: float):
        # load_state_dict moves `step` to the parameter's device only in groups with fused=True.
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "fused": True})
        self._partitions: list[list[Partition]] = []
        for group in self.param_groups:
            names = ("momentum_buffer",) if "momentum" in group else ("exp_avg", "exp_avg_sq")
            for parameter in group["params"]:
                self.state[parameter]["step"] = torch.zeros((), device=parameter.device)
                self.state[parameter].update({name: torch.zeros_like(parameter) for name in names})
            self._partitions.append(Partition.of(group["params"]) if "momentum" in group else [])

    @torch.no_grad()
    def step(self) -> None:
        """Updates every parameter from its gradient. Raises ValueError if one has none: ranks would not do the same work."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if missing := [tuple(parameter.shape) for parameter in parameters if parameter.grad is None]:
            raise ValueError(f"{len(missing)} parameters have no gradient, the first of shape {missing[0]}; all must have one")
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            found_inf = torch.zeros((), device=parameters[0].device)
        for group, partitions in zip(self.param_groups, self._partitions, strict=True):
            if "momentum" in group:
                self._muon(group, partitions, found_inf)
            else:
                self._adamw(group, found_inf)

    def _muon(self, group: dict, partitions: list[Partition], found_inf: Tensor) -> None:
        lr, momentum = group["lr"], group["momentum"]
        skip, applied = found_inf.bool(), 1 - found_inf
        weights, averages = _local(group["params"]), self._states(group, "momentum_buffer")
        gradients = [gradient.contiguous() for gradient in _local([parameter.grad for parameter in group["params"]])]
        for average, gradient in zip(averages, gradients, strict=True):
            average.lerp_(gradient.masked_fill(skip, 0), (1 - momentum) * applied)
        torch._foreach_add_(self._states(group, "step"), applied, alpha=1)  # without alpha, torch reads the number on the host
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"] * applied)
        # Newton-Schulz tolerates the rounding of bf16 (Jordan et al. 2024), which halves the messages; CPUs are slow in bf16.
        dtype = torch.float32 if target.kind(found_inf.device) == "cpu" else torch.bfloat16
        for partition in partitions:
            ahead = (_view(gradients, rows).lerp(_view(averages, rows), momentum) for rows in partition.rows)
            values = torch.cat([found_inf.new_empty(0), *ahead]).masked_fill_(skip, 0).to(dtype)
            for rows, update in partition.map(newton_schulz, values):
                _view(weights, rows).add_(update, alpha=-lr * 0.2 * math.sqrt(max(rows.shape)))

    def _adamw(self, group: dict, found_inf: Tensor) -> None:
        """AdamW (Loshchilov and Hutter 2019) with torch's fused kernel. It is elementwise, so it works on local shards."""
        weights, gradients = _local(group["params"]), _local([parameter.grad for parameter in group["params"]])
        first, second, steps = (self._states(group, name) for name in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        adamw(
            weights, gradients, first, second, [], steps, fused=True, found_inf=found_inf, amsgrad=False, maximize=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip

    def _states(self, group: dict, name: str) -> list[Tensor]:
        return _local([self.state[parameter][name] for parameter in group["params"]])


def newton_schulz(matrices: Tensor) -> Tensor:
    """Replaces the singular values of every matrix of a batch (number, rows, columns) by values near 1, in the same dtype.

    Five steps of x <- a x + (b x x' + c (x x')^2) x on the matrix divided by its Frobenius norm. With the coefficients of
    Jordan et al. 2024 the iteration does not converge; they were chosen for a steep slope at 0, so that five steps move every
    singular value above 0.2 % of the norm into [0.68, 1.21]. Smaller ones end below. A zero matrix stays zero.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the Gram matrix is then the smaller one
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def _view(tensors: list[Tensor], rows: LocalRows) -> Tensor:
    """Returns a flat view of the elements that `rows` describes."""
    return tensors[rows.parameter].view(-1)[rows.start : rows.start + rows.length]


def _local(tensors: list[Tensor]) -> list[Tensor]:
    """Returns this rank's part of each tensor."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
