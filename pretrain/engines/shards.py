"""The training state of a rank as contiguous shards of full tensors, which is how checkpoints store it.

A rank may hold a part of a tensor that was cut along its first or its second dimension (`parallel.py`), and engines may shard
that part again. Parts of the first dimension are contiguous in the full tensor. Parts of the second one are not: to save, the
ranks that share the tensor exchange columns for rows; to load or draw, a rank takes full rows and keeps its columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

AVERAGES = {"average", "trail"}
"""Kinds of the optimizer's state that follow the weights (`pretrain.optim.averages`); missing ones begin there."""
_BLOCK = 1 << 24
"""Elements that are exchanged at a time."""


class Shard(NamedTuple):
    """A contiguous part of one flattened tensor of the training state, in this rank's memory."""

    name: str
    """`model/<parameter>`, `exp_avg/<parameter>`, ..."""
    shape: tuple[int, ...]
    """Shape of the full tensor."""
    offset: int
    """Index of the first value in the flattened full tensor."""
    values: Tensor
    """1-D view of live fp32 memory, or a copy of it: reading it saves; `Engine.restore` writes into it."""


class Cut(NamedTuple):
    """How a parameter is divided among consecutive ranks: evenly along one dimension."""

    dim: int
    """0 or 1."""
    part: int
    """Of this rank."""
    parts: int
    group: dist.ProcessGroup
    """The ranks that together hold the full parameter, in the order of their parts."""


class Holders(NamedTuple):
    """The ranks that hold a parameter, for optimizers that work on full matrices (`pretrain.optim.partition` says more)."""

    replicas: dist.ProcessGroup | None
    """Hold the same values as this rank."""
    shards: dist.ProcessGroup | None
    """Together hold one copy."""
    dim: int = 0
    parts: int = 1
    """As in the parameter's `Cut`."""


class LocalState(NamedTuple):
    """The part of one parameter that this rank holds: the same range of its master weight and of each of its moments."""

    name: str
    shape: tuple[int, ...]
    """Shape of the parameter on this rank, before the engine shards it: with `cut`, one part of the full one."""
    offset: int
    """Index of the first value in the flattened parameter of this shape."""
    tensors: dict[str, Tensor]
    """1-D views of live fp32 memory: `model` is the weight; the other keys are those of the optimizer's state. In
    those of `row_states`, there is only `row_square`."""
    cut: Cut | None = None

    def saved(self) -> Iterator[Shard]:
        """A shard of each full tensor. A collective of `cut.group` where columns are cut."""
        for kind, values in self.tensors.items():
            yield self._shard(kind, values) if self._contiguous else self._exchange(kind, values)

    @property
    def saved_values(self) -> int:
        """Number of values in the shards of `saved`, without making them."""
        count = self._count
        if not self._contiguous:
            first, end = self._bounds[self.cut.part : self.cut.part + 2]
            count = (end - first) * self.full_shape[1]
        return count * len(self.tensors)

    def fill(self, fill: Callable[[Shard], None], moments: bool) -> None:
        """Calls `fill` with a shard of each full tensor, with or without moments, and takes this rank's values from it."""
        for kind, values in self.tensors.items():
            if kind != "model" and not moments:
                continue
            if self._contiguous:
                fill(self._shard(kind, values))
                continue
            columns, parts = self.shape[1], self.cut.parts
            rows = values.new_empty(values.numel() * parts)
            fill(Shard(f"{kind}/{self.name}", self.full_shape, self.offset * parts, rows))
            values.view(-1, columns).copy_(rows.view(-1, parts, columns)[:, self.cut.part])

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the full parameter."""
        if self.cut is None:
            return self.shape
        return tuple(size * (self.cut.parts if dim == self.cut.dim else 1) for dim, size in enumerate(self.shape))

    @property
    def _contiguous(self) -> bool:
        return self.cut is None or self.cut.dim == 0

    def _shard(self, kind: str, values: Tensor) -> Shard:
        before = 0 if self.cut is None else self.cut.part * math.prod(self.shape)
        return Shard(f"{kind}/{self.name}", self.full_shape, before + self.offset, values)

    def _exchange(self, kind: str, values: Tensor) -> Shard:
        """All columns of some of the rows of which this rank has some columns."""
        (_, part, parts, group), columns, bounds = self.cut, self.shape[1], self._bounds
        counts = [(end - first) * columns for first, end in itertools.pairwise(bounds)]
        received = values.new_empty(counts[part] * parts)
        dist.all_to_all_single(received, values.contiguous(), [counts[part]] * parts, counts, group=group)
        full = received.view(parts, -1, columns).transpose(0, 1).reshape(-1)
        return Shard(f"{kind}/{self.name}", self.full_shape, (self.offset + bounds[part] * columns) * parts, full)

    @property
    def _bounds(self) -> list[int]:
        """Where the rows begin and end that each rank of the group gets: as many as the others, or one more."""
        rows = self._count // self.shape[1]
        return [rows * part // self.cut.parts for part in range(self.cut.parts + 1)]

    @property
    def _count(self) -> int:
        return len(next(iter(self.tensors.values())))


def row_states(
    optimizer: torch.optim.Optimizer, model: nn.Module, states: Iterable[LocalState], saves: Callable[[str], bool], saving: bool
) -> Iterator[LocalState]:
    """The numbers of rows that `Muon` keeps, each on the rank that works on the matrix, as states of their own.

    states: all of this rank, to load. saves: whether this rank saves those of a parameter, in the part `saving`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    places = {state.name: state for state in states}
    for parameter, first, values in optimizer.row_states():
        place = places[names[parameter]]
        shape, offset, cut = place.shape, place.offset, place.cut
        if len(shape) == 2:  # the rank has all rows of a matrix, however others divide it
            shape, offset, cut = place.full_shape, 0, None
        kept = values[:0] if saving and not saves(place.name) else values
        yield LocalState(place.name, shape[:-1], offset // shape[-1] + first, {"row_square": kept}, cut)


@torch.no_grad()
def start_averages(states: Iterable[LocalState]) -> None:
    """Lets the averages of weights begin at the weights, where they exist."""
    for state in states:
        for kind in AVERAGES & state.tensors.keys():
            state.tensors[kind].copy_(state.tensors["model"])


@torch.no_grad()
def exchange_averages(states: Iterable[LocalState]) -> bool:
    """Exchanges weights with their averages, block by block: no second copy of either. False: there are no averages."""
    found = False
    for state in states:
        if "average" in state.tensors:
            found = True
            for weights, average in zip(*(state.tensors[kind].split(_BLOCK) for kind in ("model", "average")), strict=True):
                kept = weights.clone()
                weights.copy_(average)
                average.copy_(kept)
    return found
