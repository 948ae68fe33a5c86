"""Assigns matrices to ranks, and moves them there and back. It knows shapes, ranks and placements; the caller
provides the work itself as a function.

Ranks that hold the same values of a parameter are replicas; ranks that together hold one copy of it are shards. A rank is
replica r and shard s of R x S ranks, and each matrix has one owner among them:

    1. in each replica, all shards send what they hold of its matrices to the owners           all-to-all among shards
    2. owners work on full matrices, all of one shape at once
    3. the results return to the shards that sent their part                                   all-to-all among shards
    4. ranks exchange their results with the ranks that hold the same values                   all-gather among replicas

With one shard only step 4 communicates, with one replica only steps 1 and 3; a single rank does not communicate.

Who holds a parameter follows from its placement: a plain tensor is equal on all ranks of the default process group; a DTensor
is sharded along dimension 0 (FSDP2), replicated, or both. Where this is not so (a matrix that ranks have cut, experts that each
rank has of its own), the caller gives the parameter an attribute `holders` with

    replicas, shards    the two process groups; None: this rank alone
    dim, parts          the matrix is cut along `dim` (0 or 1) into `parts`, and each part is sharded along dimension 0: rank s
                        of `shards` holds shard s // parts of part s % parts. parts = 1: it is not cut

Stacks are cut between their matrices, so that each part is a stack.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

# Limit of one pass: enough to fill a GPU, and its buffers (256 MiB each in bf16) are small compared to the weights.
MAX_ELEMENTS_PER_RANK = 1 << 27

Group = dist.ProcessGroup | None
"""None: this rank alone."""


class LocalRows(NamedTuple):
    """The rows of some matrices that this rank holds: elements [start, start + length) of its flattened part of a parameter."""

    parameter: int
    start: int
    length: int
    shape: tuple[int, int]
    """Shape of one full matrix."""


class OwnedMatrices(NamedTuple):
    """Adjacent matrices of a parameter, of which this rank is the owner."""

    parameter: int
    first: int
    """Index of the first one in this rank's part of a stack; 0: of a single matrix."""
    number: int
    rows: int
    """Of one full matrix."""


class _WorkUnit(NamedTuple):
    """One or more adjacent matrices of a parameter that have the same owner."""

    parameter: int
    shape: tuple[int, int, int]
    """(number, rows, columns)"""
    held: tuple[int, ...]
    """Number of elements that each shard holds."""
    start: int
    """Index of this rank's first element in its part of the parameter."""
    parts: int = 1
    """Into how many parts the matrix is cut, along either dimension."""
    column_parts: int = 1
    """`parts` if it is cut between columns, else 1."""

    @property
    def layout(self) -> tuple[int, int, int]:
        """Units that one call of the function can take together have the same."""
        return *self.shape[1:], self.column_parts

    def order(self, shard: int) -> tuple[int, int]:
        """Sort key of the shards' elements in the full matrix: parts, then shards of a part."""
        return shard % self.parts, shard // self.parts

    @property
    def owned(self) -> OwnedMatrices:
        """Its matrices, as their owner sees them."""
        number, rows, columns = self.shape
        return OwnedMatrices(self.parameter, self.start // (rows * columns), number, rows)

    @property
    def cost(self) -> int:
        """Multiplications of one round of Newton-Schulz: two products with the matrix, one of Gram matrices."""
        number, *shape = self.shape
        small, large = sorted(shape)
        return number * small * small * (2 * large + small)


class _Batch(NamedTuple):
    """Matrices of one shape, as they lie in memory: one after the other, each of its column parts after the other."""

    number: int
    rows: int
    columns: int
    column_parts: int

    def matrices(self, values: Tensor) -> Tensor:
        """(number, rows, columns) from flat values."""
        parts = values.view(self.number, self.column_parts, self.rows, -1)
        return parts.transpose(1, 2).reshape(self.number, self.rows, self.columns)

    def flat(self, matrices: Tensor) -> Tensor:
        """The way back."""
        return matrices.reshape(self.number, self.rows, self.column_parts, -1).transpose(1, 2).reshape(-1)


class Partition:
    """The plan for some matrices. `rows` lists the elements that this rank must pass to `map`, `owned` the matrices that `map`
    passes to its function here: a list for each call."""

    def __init__(self, units: list[_WorkUnit], replicas: Group, shards: Group):
        (replica, replica_count), (shard, shard_count) = _rank_and_size(replicas), _rank_and_size(shards)
        self._replicas, self._shards = replicas if replica_count > 1 else None, shards if shard_count > 1 else None
        owned = _assign_owners(units, replica_count, shard_count)
        self._results = [  # the results that this rank gets from replica r, in the order of its message
            [
                LocalRows(unit.parameter, unit.start, unit.held[shard], unit.shape[1:])
                for owner in range(shard_count)
                for unit in owned[r, owner]
                if unit.held[shard]
            ]
            for r in range(replica_count)
        ]
        self.rows = self._results[replica]
        mine = owned[replica, shard]
        self._counts_out = [sum(unit.held[shard] for unit in owned[replica, owner]) for owner in range(shard_count)]
        self._counts_in = [sum(unit.held[sender] for unit in mine) for sender in range(shard_count)]
        # Messages arrive sender by sender, but a matrix needs its parts in order: the same blocks, sorted in another way.
        by_sender = [(sender, k) for sender in range(shard_count) for k, unit in enumerate(mine) if unit.held[sender]]
        to_units = sorted((k, *mine[k].order(sender), i) for i, (sender, k) in enumerate(by_sender))
        self._to_units = [i for *_, i in to_units]
        by_unit = [by_sender[i] for i in self._to_units]
        self._sizes_by_sender = [mine[k].held[sender] for sender, k in by_sender]
        self._sizes_by_unit = [mine[k].held[sender] for sender, k in by_unit]
        self._to_senders = sorted(range(len(by_unit)), key=by_unit.__getitem__)
        self._batches, self.owned = [], []
        for layout, members in itertools.groupby(mine, key=lambda unit: unit.layout):
            units = list(members)
            self._batches.append(_Batch(sum(unit.shape[0] for unit in units), *layout))
            self.owned.append([unit.owned for unit in units])

    @classmethod
    def of(cls, parameters: list[Tensor]) -> list[Partition]:
        """Returns plans that together cover every matrix of `parameters` once; all ranks must map them in this order.

        Raises ValueError for a parameter that is neither a matrix nor a stack of matrices, or has an unsupported placement.
        """
        units_of: dict[tuple, list[_WorkUnit]] = {}
        for number, parameter in enumerate(parameters):
            replicas, shards, dim, parts = _holders(parameter)
            units = _work_units(number, parameter, replicas, shards, dim, parts)
            units_of.setdefault((replicas, shards), []).extend(units)
        plans = []
        for (replicas, shards), units in units_of.items():
            limit = MAX_ELEMENTS_PER_RANK * _rank_and_size(replicas)[1] * _rank_and_size(shards)[1]
            units.sort(key=lambda unit: unit.layout)  # so that one pass has many matrices of few shapes
            ends = itertools.accumulate(math.prod(unit.shape) for unit in units)
            passes = itertools.groupby(zip(units, ends, strict=True), key=lambda pair: (pair[1] - 1) // limit)
            plans += [cls([unit for unit, _ in members], replicas, shards) for _, members in passes]
        return plans

    def map(self, function: Callable[[Tensor], Tensor], values: Tensor) -> Iterator[tuple[LocalRows, Tensor]]:
        """Applies `function` to all matrices and yields this rank's part of the results, with its place.

        values: the elements of `rows`, concatenated. function: takes and returns batches (number, rows, columns).
        A collective operation: all ranks must call it together and consume all results.
        """
        received = self._exchange(values, self._counts_out, self._counts_in)
        matrices = _reorder(received, self._sizes_by_sender, self._to_units)
        values_of = matrices.split([batch.number * batch.rows * batch.columns for batch in self._batches])
        done = [batch.flat(function(batch.matrices(each))) for batch, each in zip(self._batches, values_of, strict=True)]
        returned = _reorder(torch.cat([values[:0], *done]), self._sizes_by_unit, self._to_senders)
        gathered = self._gather(self._exchange(returned, self._counts_in, self._counts_out))
        for rows, results in zip(self._results, gathered, strict=True):
            yield from zip(rows, results.split([each.length for each in rows]), strict=True)

    def _exchange(self, values: Tensor, counts_out: list[int], counts_in: list[int]) -> Tensor:
        if self._shards is None:
            return values
        received = values.new_empty(sum(counts_in))
        dist.all_to_all_single(received, values, counts_in, counts_out, group=self._shards)
        return received

    def _gather(self, values: Tensor) -> list[Tensor]:
        """Returns each replica's results for this rank. All messages are padded to the length of the longest."""
        if self._replicas is None:
            return [values]
        counts = [sum(each.length for each in rows) for rows in self._results]
        message = torch.cat([values, values.new_zeros(max(counts) - len(values))])
        messages = values.new_empty(len(counts) * len(message))
        # torch 2.13 renamed it and warns about the old name.
        gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
        gather(messages, message, group=self._replicas)
        return [row[:count] for row, count in zip(messages.view(len(counts), -1), counts, strict=True)]


def _holders(parameter: Tensor) -> tuple[Group, Group, int, int]:
    """Returns (replicas, shards, dim, parts): the head of this file says what they are."""
    if holders := getattr(parameter, "holders", None):
        return holders.replicas, holders.shards, holders.dim, holders.parts
    if not isinstance(parameter, DTensor):
        return (dist.group.WORLD if dist.is_available() and dist.is_initialized() else None), None, 0, 1
    groups = {}
    for dimension, placement in enumerate(parameter.placements):
        kind = "replicas" if placement.is_replicate() else "shards" if placement.is_shard(0) else None
        if kind is None or kind in groups:
            raise ValueError(
                f"Muon supports parameters sharded on dimension 0, replicated, or both; got {parameter.placements}"
            )
        groups[kind] = parameter.device_mesh.get_group(dimension)
    return groups.get("replicas"), groups.get("shards"), 0, 1


def _rank_and_size(group: Group) -> tuple[int, int]:
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _work_units(number: int, parameter: Tensor, replicas: Group, shards: Group, dim: int, parts: int) -> list[_WorkUnit]:
    """Divides parameter `number` into units. Dimension 0 is cut as by torch.chunk: the rows of a single matrix are spread over
    the shards, but each shard holds full matrices of a stack, which its replicas divide among themselves."""
    if parameter.ndim not in (2, 3):
        raise ValueError(f"Muon supports matrices and stacks of matrices, got a parameter of shape {tuple(parameter.shape)}")
    (_, replica_count), (shard, shard_count) = _rank_and_size(replicas), _rank_and_size(shards)
    *_, rows, columns = parameter.shape
    chunk = math.ceil(parameter.shape[0] / (shard_count // parts))
    chunks = [max(0, min(chunk, parameter.shape[0] - s // parts * chunk)) for s in range(shard_count)]
    if parameter.ndim == 2:
        full = (1, rows * parts, columns) if dim == 0 else (1, rows, columns * parts)
        units = [_WorkUnit(number, full, tuple(part * columns for part in chunks), 0, parts, parts if dim == 1 else 1)]
    else:
        units = []
        for holder, count in enumerate(chunks):
            for first in range(0, count, stride := max(1, math.ceil(count / replica_count))):
                size = min(stride, count - first)
                held = tuple(size * rows * columns * (s == holder) for s in range(shard_count))
                units.append(_WorkUnit(number, (size, rows, columns), held, first * rows * columns))
    here = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
    if here != (expected := sum(unit.held[shard] for unit in units)):
        raise ValueError(
            f"Muon supports even chunks of dimension 0: shard {shard} of a parameter of shape {tuple(parameter.shape)} holds "
            f"{here} elements, not {expected}"
        )
    return units


def _assign_owners(units: list[_WorkUnit], replicas: int, shards: int) -> dict[tuple[int, int], list[_WorkUnit]]:
    """Assigns the most expensive units first, each to the least loaded rank; a unit that one shard holds alone stays there."""
    owned: dict[tuple[int, int], list[_WorkUnit]] = {(r, s): [] for r in range(replicas) for s in range(shards)}
    load = dict.fromkeys(owned, 0)
    for unit in sorted(units, key=lambda unit: (-unit.cost // unit.shape[0], unit.layout, -unit.shape[0])):
        holders = [s for s in range(shards) if unit.held[s]]
        candidates = itertools.product(range(replicas), holders if len(holders) == 1 else range(shards))
        owner = min(candidates, key=load.__getitem__)
        owned[owner].append(unit)
        load[owner] += unit.cost
    return owned


def _reorder(values: Tensor, sizes: list[int], order: list[int]) -> Tensor:
    """Returns the blocks of `sizes` elements in `order`."""
    if order == sorted(order):
        return values
    blocks = values.split(sizes)
    return torch.cat([blocks[i] for i in order])
