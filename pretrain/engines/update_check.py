"""Checks that a step trains: every weight changes, and replicas of a weight stay equal.

A learning rate of 0, a parameter that is missing from the optimizer, or a rank whose replica of the model has drifted leave a
run that looks healthy: the loss is finite and may even fall. So the run checks one step from time to time.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain import UserError
from pretrain.engines.base import Engine

_SAMPLE = 1024


class UpdateCheck:
    """Create it before a step; call `figures` after it. Each reads every weight once; a sample of the weights is copied."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.before = {state.name: _look(state.tensors["model"]) for state in engine.local_states(saving=True)}

    @torch.no_grad()
    def figures(self, lr: float) -> tuple[dict[str, float], list[str]]:
        """Returns metrics of the step, and a warning for each problem. A collective; the host waits for the device once.

        update_fraction: norm of the update / norm of the weights, over a sample. stuck_parameters: number of parameters that
        did not move although `lr` is large enough (fp32 loses an update below 1e-7 of a weight). diverged_ranks: number of
        ranks whose replica of some weight differs from that of the first rank.
        """
        names = [name for name, _ in self.engine.model.named_parameters()]
        rows, sizes = {}, {}
        for state in self.engine.local_states(saving=True):
            (old_sum, old), (new_sum, new) = self.before[state.name], _look(state.tensors["model"])
            sums = [new_sum != old_sum, (new - old).double().square().sum(), new.double().square().sum()]
            rows[state.name], sizes[state.name] = torch.stack([value.double() for value in sums]), new.numel()
        none = next(iter(rows.values())).new_zeros(3) if rows else torch.zeros(3, dtype=torch.float64)
        sums_P3 = torch.stack([rows.get(name, none) for name in names]).to(self.engine.device)  # P: parameters
        counts = self.engine.upload([sizes.get(name, 0) for name in names], torch.float64)
        total = self.engine.all_reduce(torch.cat([sums_P3.T.flatten(), counts, _differing(self.engine)])).cpu()
        moved, update, weight, count = total[: 4 * len(names)].view(4, -1)
        by_rank = total[4 * len(names) :]
        noticeable = (lr == 0) | (lr > 1e-6 * (weight / count.clamp(min=1)).sqrt())
        stuck = [name for name, is_stuck in zip(names, (moved == 0) & noticeable, strict=True) if is_stuck]
        figures = {
            "update_fraction": float((update.sum() / weight.sum()).sqrt()),
            "stuck_parameters": len(stuck),
            "diverged_ranks": int((by_rank > 0).sum()),
        }
        return figures, [*_about_stuck(stuck, names, lr), *_about_diverged(by_rank)]


class Diverged(UserError):
    """Replicas of a weight are no longer equal."""

    status = 70


@torch.no_grad()
def require_equal_replicas(engine: Engine) -> None:
    """Raises Diverged, on all ranks, if a replica of a weight or buffer differs. Reads every weight once. A collective."""
    by_rank = engine.all_reduce(_differing(engine)).cpu()
    if problems := _about_diverged(by_rank):
        raise Diverged(f"nothing was saved: {problems[0]}")


def _differing(engine: Engine) -> Tensor:
    """(world_size,), float64: at this rank, number of its replicated weights and buffers that differ from the first rank's."""
    by_rank = torch.zeros(engine.world_size, dtype=torch.float64, device=engine.device)
    for tensors, group in (*engine.replicated_weights(), (list(engine.model.buffers()), None)):
        if tensors and engine.world_size > 1:
            mine = torch.stack([_checksum(tensor) for tensor in tensors])
            reference = mine.clone()
            dist.broadcast(reference, dist.get_global_rank(group or dist.group.WORLD, 0), group=group)
            by_rank[engine.rank] += (mine != reference).sum()
    return by_rank


def _look(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(checksum of all weights, a sample of them)."""
    return _checksum(weights), weights[:: max(1, weights.numel() // _SAMPLE)].clone()


def _checksum(tensor: Tensor) -> Tensor:
    """Sum of the bit patterns, (), int64: any change of a weight changes it."""
    return tensor.detach().view(torch.int32 if tensor.element_size() == 4 else torch.int16).sum(dtype=torch.int64)


def _about_stuck(stuck: list[str], names: list[str], lr: float) -> list[str]:
    if not stuck:
        return []
    if lr == 0:
        return ["no weight moved in this step: its learning rate is 0"]
    some = ", ".join(stuck[:3]) + (", ..." if len(stuck) > 3 else "")
    return [f"{len(stuck)} of {len(names)} parameters did not move in this step ({some}): does the optimizer have them?"]


def _about_diverged(by_rank: Tensor) -> list[str]:
    ranks = by_rank.nonzero().flatten().tolist()
    if not ranks:
        return []
    some = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return [
        f"the weights of rank {some} differ from those of the first rank (in {int(by_rank.max())} parameters): no result since "
        "then can be trusted; stop, and resume from an earlier checkpoint"
    ]
