"""Does a step train? Weights move, all of them, and copies of the same weight stay equal.

A learning rate of 0, a parameter that the optimizer was not given, and a rank whose copy of the model has drifted all leave a
run that looks healthy: the loss is finite and may even fall. The canary looks at one step now and then.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.engines.base import Engine

_SAMPLE = 1024


class UpdateCheck:
    """Made just before a step; `figures` after it. Reads every weight once, and copies a sample of them."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.before = {state.name: _look(state.tensors["model"]) for state in engine.local_states(saving=True)}

    @torch.no_grad()
    def figures(self, lr: float) -> tuple[dict[str, float], list[str]]:
        """What the step did, and sentences about what is wrong. A collective.

        update_fraction: norm of the update / norm of the weights, over a sample. stuck_parameters: how many did not move, of
        those that `lr` is large enough to move (fp32 forgets an update below 1e-7 of a weight). diverged_ranks: how many hold
        another copy of a weight than the first rank that has one.
        """
        names = [name for name, _ in self.engine.model.named_parameters()]
        place = {name: number for number, name in enumerate(names)}
        options = {"dtype": torch.float64, "device": self.engine.device}
        sums = torch.zeros(4, len(names), **options)  # moved, squares of update and of weight, values in the sample
        for state in self.engine.local_states(saving=True):
            (old_sum, old), (new_sum, new) = self.before[state.name], _look(state.tensors["model"])
            count = torch.tensor(new.numel(), device=new.device)
            column = [new_sum != old_sum, (new - old).double().square().sum(), new.double().square().sum(), count]
            sums[:, place[state.name]] = torch.stack([value.double() for value in column]).to(self.engine.device)
        by_rank = torch.zeros(self.engine.world_size, **options)
        by_rank[self.engine.rank] = self._differing()
        total = self.engine.all_reduce(torch.cat([sums.flatten(), by_rank])).cpu()
        moved, update, weight, count = total[: sums.numel()].view_as(sums)
        by_rank = total[sums.numel() :]
        noticeable = (lr == 0) | (lr > 1e-6 * (weight / count.clamp(min=1)).sqrt())
        stuck = [name for name, is_stuck in zip(names, (moved == 0) & noticeable, strict=True) if is_stuck]
        figures = {
            "update_fraction": float((update.sum() / weight.sum()).sqrt()),
            "stuck_parameters": len(stuck),
            "diverged_ranks": int((by_rank > 0).sum()),
        }
        return figures, [*_about_stuck(stuck, names, lr), *_about_diverged(by_rank)]

    def _differing(self) -> int:
        """How many of the weights of which other ranks have copies differ from those of the first of these ranks."""
        copies, group = self.engine.replicated_weights()
        if not copies or self.engine.world_size == 1:
            return 0
        mine = torch.stack([_checksum(tensor) for tensor in copies])
        reference = mine.clone()
        dist.broadcast(reference, dist.get_global_rank(group or dist.group.WORLD, 0), group=group)
        return int((mine != reference).sum())


def _look(piece: Tensor) -> tuple[Tensor, Tensor]:
    """(checksum of the whole piece, a sample of it)."""
    return _checksum(piece), piece[:: max(1, piece.numel() // _SAMPLE)].clone()


def _checksum(tensor: Tensor) -> Tensor:
    """Sum of the bit patterns: a changed weight changes it, whatever its size. (), int64."""
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
        f"the weights of rank {some} are not those of the first rank ({int(by_rank.max())} parameters differ): every number "
        "since then is doubtful; stop, and go on from a checkpoint before it"
    ]
