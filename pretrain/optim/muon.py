"""Muon for matrices and AdamW for the rest, in one optimizer. It knows parameters and their gradients, full or sharded over
ranks; it knows no model, no schedule and no engine.

Muon moves a matrix by the semi-orthogonal matrix nearest to its momentum, so every direction of the gradient counts equally
(Jordan et al. 2024, kellerjordan.github.io/posts/muon). With the momentum m, the gradient g and mu = `momentum`:

    m <- mu m + (1 - mu) g                             an average: only its direction matters
    o <- newton_schulz(mu m + (1 - mu) g)              Nesterov's look-ahead
    w <- w - lr * weight_decay * w - lr * 0.2 * sqrt(max(rows, columns)) * o

With `row_beta`, o is normalised before it is used, so that no output neuron (a row) moves much more than others (NorMuon: Li et
al. 2025, arXiv 2510.05491); r is one number per row:

    r <- row_beta r + (1 - row_beta) mean over columns of o^2
    o <- o / sqrt(r), times what gives it the Frobenius norm that it had

A semi-orthogonal matrix has a root mean square of 1 / sqrt(max(rows, columns)), so the factor makes it 0.2 for every shape.
AdamW's updates have that size too, so both rules share one learning rate and one weight decay (Liu et al. 2025, arXiv
2502.16982).

Newton-Schulz needs full matrices, and each costs as many FLOPs as a forward pass over 10 to 15 tokens per row of its shorter
side. So ranks share the work (`Partition`), whether they hold the same parameters or shards of them, with the same result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from pretrain import target
from pretrain.optim.averages import Averages, decay_before_adamw, decay_cautiously, local
from pretrain.optim.partition import LocalRows, OwnedMatrices, Partition

_NONE = Averages()


class _Rows(NamedTuple):
    """Adjacent rows of full matrices that this rank works on."""

    parameter: Tensor
    first: int
    """Index in the matrix, or in this rank's part of a stack."""
    start: int
    """Index in this rank's `row_square`."""
    count: int


class Muon(torch.optim.Optimizer):
    """Groups with a key `momentum` follow Muon, groups with `betas` and `eps` follow AdamW; all have `params`, `weight_decay`.

    Muon's parameters are matrices (rows, columns) or stacks of them (number, rows, columns): plain tensors that are equal on
    all ranks of the default process group, if there is one; DTensors that are sharded on dimension 0, replicated, or both; or
    parts of matrices that ranks have cut, whose attribute `holders` says so (`partition.py`).
    The constructor creates the state: `momentum_buffer` and `step` for Muon parameters; `exp_avg`, `exp_avg_sq` and `step` for
    AdamW parameters. `step` is 0-dim; the others have the parameter's shape and placement. `averages` adds tensors like these.
    `row_beta` adds `row_square`: one number for each row of those matrices that this rank works on (`row_states`).

    As with fused AdamW, a step leaves weights and state untouched if `found_inf`, a 0-dim tensor on the device, is 1; the host
    does not wait for it. All ranks must call `step` together, with the same gradients where they hold the same parameters.

    Raises ValueError for a Muon parameter of another shape or placement.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        row_beta: float = 0.0,
        cautious_decay: bool = False,
        averages: Averages = _NONE,
    ):
        # load_state_dict moves `step` to the parameter's device only in groups with fused=True.
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "fused": True})
        self.row_beta, self.cautious_decay, self.averages = row_beta, cautious_decay, averages
        self._partitions: list[list[Partition]] = []
        for group in self.param_groups:
            names = ("momentum_buffer",) if "momentum" in group else ("exp_avg", "exp_avg_sq")
            for parameter in group["params"]:
                self.state[parameter]["step"] = torch.zeros((), device=parameter.device)
                self.state[parameter].update({name: torch.zeros_like(parameter) for name in names})
                self.state[parameter].update({kind: parameter.detach().clone() for kind in averages.kinds})
            self._partitions.append(Partition.of(group["params"]) if "momentum" in group else [])
        self._rows = [self._make_rows(*each) for each in zip(self.param_groups, self._partitions, strict=True)]

    def _make_rows(self, group: dict, partitions: list[Partition]) -> list[list[list[_Rows]]]:
        """Adds `row_square` to the state. Returns the rows of the matrices in `owned` of each partition."""
        if not self.row_beta:
            return [[] for _ in partitions]
        parameters, sizes = group["params"], [0] * len(group["params"])

        def place(matrices: OwnedMatrices) -> _Rows:
            number, count = matrices.parameter, matrices.number * matrices.rows
            sizes[number] += count
            return _Rows(parameters[number], matrices.first * matrices.rows, sizes[number] - count, count)

        rows = [[[place(matrices) for matrices in batch] for batch in partition.owned] for partition in partitions]
        for parameter, size in zip(parameters, sizes, strict=True):
            if partitions:
                self.state[parameter]["row_square"] = torch.zeros(size, device=parameter.device)
        return rows

    def row_states(self) -> Iterator[tuple[Tensor, int, Tensor]]:
        """(parameter, index of the first row, r of adjacent rows), for all full matrices that this rank works on. Row 0 is the
        first one of a matrix, or of this rank's part of a stack."""
        for partition in itertools.chain.from_iterable(self._rows):
            for rows in itertools.chain.from_iterable(partition):
                yield rows.parameter, rows.first, self._row_square(rows)

    def _row_square(self, rows: _Rows) -> Tensor:
        return self.state[rows.parameter]["row_square"][rows.start : rows.start + rows.count]

    @torch.no_grad()
    def step(self) -> None:
        """Updates every parameter from its gradient. Raises ValueError if one has none: ranks would not do the same work."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if missing := [tuple(parameter.shape) for parameter in parameters if parameter.grad is None]:
            raise ValueError(f"{len(missing)} parameters have no gradient, the first of shape {missing[0]}; all must have one")
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            found_inf = torch.zeros((), device=parameters[0].device)
        for group, partitions, rows in zip(self.param_groups, self._partitions, self._rows, strict=True):
            if "momentum" in group:
                self._muon(group, partitions, rows, found_inf)
            else:
                self._adamw(group, found_inf)
            if self.averages.kinds:
                states = {kind: self._states(group, kind) for kind in self.averages.kinds}
                step, lr = self.state[group["params"][0]]["step"], group["lr"] / group.get("lr_scale", 1.0)
                self.averages.update(local(group["params"]), states, step, lr, 1 - found_inf)

    def _muon(self, group: dict, partitions: list[Partition], rows_of: list[list[list[_Rows]]], found_inf: Tensor) -> None:
        lr, momentum = group["lr"], group["momentum"]
        skip, applied = found_inf.bool(), 1 - found_inf
        weights, averages = local(group["params"]), self._states(group, "momentum_buffer")
        gradients = [gradient.contiguous() for gradient in local([parameter.grad for parameter in group["params"]])]
        for average, gradient in zip(averages, gradients, strict=True):
            average.lerp_(gradient.masked_fill(skip, 0), (1 - momentum) * applied)
        torch._foreach_add_(self._states(group, "step"), applied, alpha=1)  # without alpha, torch reads the number on the host
        decay = lr * group["weight_decay"] * applied
        if not self.cautious_decay:
            torch._foreach_mul_(weights, 1 - decay)
        # Newton-Schulz tolerates the rounding of bf16 (Jordan et al. 2024), which halves the messages; CPUs are slow in bf16.
        dtype = torch.float32 if target.kind(found_inf.device) == "cpu" else torch.bfloat16
        for partition, of_partition in zip(partitions, rows_of, strict=True):
            ahead = (_view(gradients, rows).lerp(_view(averages, rows), momentum) for rows in partition.rows)
            values = torch.cat([found_inf.new_empty(0), *ahead]).masked_fill_(skip, 0).to(dtype)
            for rows, update in partition.map(self._direction(of_partition, applied), values):
                weight = _view(weights, rows)
                if self.cautious_decay:
                    decay_cautiously(weight, update, decay)
                weight.add_(update, alpha=-lr * 0.2 * math.sqrt(max(rows.shape)))

    def _direction(self, rows_of: list[list[_Rows]], applied: Tensor) -> Callable[[Tensor], Tensor]:
        """The function that turns momentum into updates, for the batches of a partition in their order."""
        if not self.row_beta:
            return newton_schulz
        batches = iter(rows_of)

        def direction(matrices: Tensor) -> Tensor:
            kept = [self._row_square(rows) for rows in next(batches)]
            squares = torch.cat(kept)
            share = (1 - self.row_beta) * applied
            updates = normalize_rows(newton_schulz(matrices), squares.view(matrices.shape[:2]), share)
            torch._foreach_copy_(kept, list(squares.split([len(each) for each in kept])))
            return updates

        return direction

    def _adamw(self, group: dict, found_inf: Tensor) -> None:
        """AdamW (Loshchilov and Hutter 2019) with torch's fused kernel. It is elementwise, so it works on local shards."""
        weights, gradients = local(group["params"]), local([parameter.grad for parameter in group["params"]])
        first, second, steps = (self._states(group, name) for name in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        decay = group["weight_decay"]
        if self.cautious_decay and decay:
            for each in zip(weights, gradients, first, strict=True):
                decay_before_adamw(*each, beta1, group["lr"] * decay * (1 - found_inf))
            decay = 0.0
        adamw(
            weights, gradients, first, second, [], steps, fused=True, found_inf=found_inf, amsgrad=False, maximize=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=decay, eps=group["eps"],
        )  # fmt: skip

    def _states(self, group: dict, name: str) -> list[Tensor]:
        return local([self.state[parameter][name] for parameter in group["params"]])


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


def normalize_rows(updates: Tensor, squares: Tensor, share: float | Tensor) -> Tensor:
    """Divides each row of (number, rows, columns) by the root of its entry of `squares`, (number, rows), fp32, in which the
    mean square of the row first replaces a `share`, in place. Each matrix then gets the Frobenius norm that it had."""
    means = updates.float().square().mean(-1)
    squares.lerp_(means, share)
    factors = 1 / (squares.sqrt() + 1e-10)
    norms = (means.sum(-1, keepdim=True) / (means * factors.square()).sum(-1, keepdim=True).clamp(min=1e-30)).sqrt()
    return updates * (factors * norms).unsqueeze(-1).to(updates.dtype)


def _view(tensors: list[Tensor], rows: LocalRows) -> Tensor:
    """Returns a flat view of the elements that `rows` describes."""
    return tensors[rows.parameter].view(-1)[rows.start : rows.start + rows.length]
