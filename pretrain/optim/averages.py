"""Averages of the weights, which follow them step by step: one to read out, one that says where the weights are going. It knows
tensors and their state, full or sharded; it knows no optimizer.

With the weights w after an update, and n updates before it:

    average <- d average + (1 - d) w          d = min(average_decay, n / (n + 10))
    trail   <- g trail + (1 - g) w            g = lookahead_decay
    w       <- w + b (1 - g) / g (w - trail)  b = lookahead * lr / peak_lr; 0 below a third of the peak

The average has less of the noise that a learning rate leaves in the weights (Polyak and Juditsky 1992; Izmailov et al. 2018).
Its decay rises, so that it forgets the beginning of a run, as in TensorFlow's ExponentialMovingAverage; the first one is w.

The last line is EMA-Nesterov (arXiv 2605.25395): the next gradient is that of a point ahead, b times the mean
step away, and the optimizer steps from there. The paper keeps the mean step m <- g m + (1 - g) (step) and the weights before
it; (1 - g) / g (w - trail) is the same m, so one tensor suffices. Weights stay ahead between steps, so that an update which is
skipped changes nothing; validation and checkpoints have them there. The paper turns it off during warm-up and towards the end;
its record (track 3 of modded-nanogpt, result 39) does so at about a third of the peak.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

_BLOCK = 1 << 24
"""Elements that a pass over all weights of a rank handles at a time."""


class Averages(NamedTuple):
    """Which averages a run keeps; the names are those of the settings."""

    average_decay: float = 0.0
    lookahead: float = 0.0
    lookahead_decay: float = 0.99
    peak_lr: float = 1.0

    @property
    def kinds(self) -> tuple[str, ...]:
        """Keys of the state that `update` needs for each parameter."""
        return ("average",) * (self.average_decay > 0) + ("trail",) * (self.lookahead > 0)

    def update(self, weights: list[Tensor], states: dict[str, list[Tensor]], step: Tensor, lr: float, applied: Tensor) -> None:
        """Follows an update of `weights`, in place. states: tensors of the same shapes, for each of `kinds`.

        step: number of updates so far, with this one, (). lr: of this update, as a multiple of which `peak_lr` is the peak.
        applied: (), 0 if it was skipped; nothing changes then."""
        if self.average_decay:
            before = step - 1
            share = (1 - (before / (before + 10)).clamp(max=self.average_decay)) * applied
            for weight, average in zip(weights, states["average"], strict=True):
                average.lerp_(weight, share)
        if self.lookahead:
            ahead = self.lookahead * lr / self.peak_lr if 3 * lr > self.peak_lr else 0.0
            ahead *= (1 - self.lookahead_decay) / self.lookahead_decay
            for weight, trail in zip(weights, states["trail"], strict=True):
                trail.lerp_(weight, (1 - self.lookahead_decay) * applied)
                if ahead:
                    weight.lerp_(trail, -ahead * applied)


def decay_cautiously(weight: Tensor, update: Tensor, decay: float | Tensor) -> None:
    """Multiplies by 1 - decay, in place, those weights that the update (subtracted from them) moves towards zero or not at all
    (Chen et al. 2025, arXiv 2510.12402)."""
    weight.mul_(1 - decay * (update * weight >= 0))


def decay_before_adamw(weight: Tensor, gradient: Tensor, first: Tensor, beta1: float, decay: float | Tensor) -> None:
    """`decay_cautiously` before AdamW's update, whose sign is that of the first moment after it; first: the one before it.
    Block by block, since the weights may be all of a rank."""
    tensors = [tensor.reshape(-1).split(_BLOCK) for tensor in (weight, gradient, first)]
    for weights, gradients, moments in zip(*tensors, strict=True):
        decay_cautiously(weights, moments.lerp(gradients, 1 - beta1), decay)


def local(tensors: list[Tensor]) -> list[Tensor]:
    """Returns this rank's part of each tensor, without history."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach() for tensor in tensors]
