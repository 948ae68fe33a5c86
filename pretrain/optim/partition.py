"""Who works on which matrix, and how the matrices get there and back. It knows shapes, ranks and placements; the work itself is
a function that it is given.

Ranks that hold the same parameters (data parallelism) are replicas; ranks that hold the parts of one copy, cut along dimension
0 (FSDP2), are shards. A rank is replica r and shard s of R x S, and each matrix has one owner among them:

    1. inside each replica, every shard sends its rows of a matrix of that replica to the owner    all-to-all among shards
    2. the owner works on whole matrices, all of one shape at once
    3. the rows go back to those who sent them                                                      all-to-all among shards
    4. each rank tells its results to the ranks that hold the same rows                             all-gather among replicas

With one shard only step 4 is left, with one replica steps 1 and 3; alone, nothing is sent.
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

# What a rank works on in one pass: enough to fill a GPU, and its buffers (256 MiB each in bf16) are small beside the weights.
MAX_ELEMENTS_PER_RANK = 1 << 27

Group = dist.ProcessGroup | None
"""None: this rank alone."""


class Piece(NamedTuple):
    """What this rank holds of a stack of matrices: elements [start, start + length) of its part, flattened, of a parameter."""

    parameter: int
    start: int
    length: int
    shape: tuple[int, int]
    """Of one whole matrix."""


class _Stack(NamedTuple):
    """One or more matrices that lie together in a parameter and have one owner."""

    parameter: int
    shape: tuple[int, int, int]
    """(number, rows, columns)"""
    held: tuple[int, ...]
    """Elements held by each shard."""
    start: int
    """Where this rank's elements begin in its part of the parameter."""

    @property
    def cost(self) -> int:
        """Multiplications of one round of Newton-Schulz: two products with the matrix, one of Gram matrices."""
        number, *shape = self.shape
        small, large = sorted(shape)
        return number * small * small * (2 * large + small)


class Partition:
    """The plan for some matrices. `pieces` lists what this rank must bring along to `map`."""

    def __init__(self, stacks: list[_Stack], replicas: Group, shards: Group):
        (replica, replica_count), (shard, shard_count) = _place(replicas), _place(shards)
        self._replicas, self._shards = replicas if replica_count > 1 else None, shards if shard_count > 1 else None
        owned = _owners(stacks, replica_count, shard_count)
        self._results = [  # what replica r tells this rank, in the order of its message
            [
                Piece(stack.parameter, stack.start, stack.held[shard], stack.shape[1:])
                for owner in range(shard_count)
                for stack in owned[r, owner]
                if stack.held[shard]
            ]
            for r in range(replica_count)
        ]
        self.pieces = self._results[replica]
        mine = owned[replica, shard]
        self._counts_out = [sum(stack.held[shard] for stack in owned[replica, owner]) for owner in range(shard_count)]
        self._counts_in = [sum(stack.held[sender] for stack in mine) for sender in range(shard_count)]
        # Messages come sender by sender, but a matrix is needed row by row: the same blocks, sorted otherwise.
        by_sender = [(sender, k) for sender in range(shard_count) for k, stack in enumerate(mine) if stack.held[sender]]
        by_stack = sorted(by_sender, key=lambda block: (block[1], block[0]))
        self._sizes_by_sender = [mine[k].held[sender] for sender, k in by_sender]
        self._sizes_by_stack = [mine[k].held[sender] for sender, k in by_stack]
        self._to_stacks = sorted(range(len(by_sender)), key=lambda i: (by_sender[i][1], by_sender[i][0]))
        self._to_senders = sorted(range(len(by_stack)), key=lambda i: by_stack[i])
        runs = itertools.groupby((stack.shape for stack in mine), key=lambda shape: shape[1:])
        self._batches = [(sum(shape[0] for shape in run), *matrix) for matrix, run in runs]

    @classmethod
    def of(cls, parameters: list[Tensor]) -> list[Partition]:
        """Plans that together hold every matrix of `parameters` once; all ranks map them in this order.

        Raises ValueError for a parameter that is neither a matrix nor a stack of matrices, or spread in a way not known here.
        """
        spread: dict[tuple, list[_Stack]] = {}
        for number, parameter in enumerate(parameters):
            groups = _spread(parameter)
            spread.setdefault(groups, []).extend(_stacks(number, parameter, *groups))
        plans = []
        for (replicas, shards), stacks in spread.items():
            limit = MAX_ELEMENTS_PER_RANK * _place(replicas)[1] * _place(shards)[1]
            stacks.sort(key=lambda stack: stack.shape[1:])  # one pass has many matrices of few shapes
            ends = itertools.accumulate(math.prod(stack.shape) for stack in stacks)
            passes = itertools.groupby(zip(stacks, ends, strict=True), key=lambda pair: (pair[1] - 1) // limit)
            plans += [cls([stack for stack, _ in members], replicas, shards) for _, members in passes]
        return plans

    def map(self, function: Callable[[Tensor], Tensor], sent: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        """What this rank holds of function(matrix), for all matrices, piece by piece.

        `sent`: the values of `pieces`, one after the other. `function` takes and returns batches (number, rows, columns).
        A collective: all ranks call it together and take every result.
        """
        received = self._exchange(sent, self._counts_out, self._counts_in)
        matrices = _reordered(received, self._sizes_by_sender, self._to_stacks)
        batches = matrices.split([math.prod(shape) for shape in self._batches])
        done = [function(batch.view(shape)).reshape(-1) for batch, shape in zip(batches, self._batches, strict=True)]
        returned = _reordered(torch.cat([sent[:0], *done]), self._sizes_by_stack, self._to_senders)
        told = self._tell(self._exchange(returned, self._counts_in, self._counts_out))
        for pieces, values in zip(self._results, told, strict=True):
            yield from zip(pieces, values.split([piece.length for piece in pieces]), strict=True)

    def _exchange(self, values: Tensor, counts_out: list[int], counts_in: list[int]) -> Tensor:
        if self._shards is None:
            return values
        received = values.new_empty(sum(counts_in))
        dist.all_to_all_single(received, values, counts_in, counts_out, group=self._shards)
        return received

    def _tell(self, values: Tensor) -> list[Tensor]:
        """What each replica has for this rank. All messages are as long as the longest."""
        if self._replicas is None:
            return [values]
        counts = [sum(piece.length for piece in pieces) for pieces in self._results]
        message = torch.cat([values, values.new_zeros(max(counts) - len(values))])
        messages = values.new_empty(len(counts) * len(message))
        # torch 2.13 renamed it and warns of the old name.
        gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
        gather(messages, message, group=self._replicas)
        return [row[:count] for row, count in zip(messages.view(len(counts), -1), counts, strict=True)]


def _spread(parameter: Tensor) -> tuple[Group, Group]:
    """(ranks that hold the same as this one, ranks that hold the rest)"""
    if not isinstance(parameter, DTensor):
        return (dist.group.WORLD if dist.is_available() and dist.is_initialized() else None), None
    groups = {}
    for dimension, placement in enumerate(parameter.placements):
        kind = "replicas" if placement.is_replicate() else "shards" if placement.is_shard(0) else None
        if kind is None or kind in groups:
            raise ValueError(f"Muon knows parameters sharded on dimension 0, replicated, or both; got {parameter.placements}")
        groups[kind] = parameter.device_mesh.get_group(dimension)
    return groups.get("replicas"), groups.get("shards")


def _place(group: Group) -> tuple[int, int]:
    """(this rank's number in the group, size of the group)"""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _stacks(number: int, parameter: Tensor, replicas: Group, shards: Group) -> list[_Stack]:
    """The matrices of parameter `number`. Dimension 0 is cut into chunks as torch.chunk does: so the rows of one matrix are
    spread over the shards, but of a stack of matrices each shard holds whole ones, which the replicas divide among them."""
    if parameter.ndim not in (2, 3):
        raise ValueError(f"Muon takes matrices and stacks of matrices, got a parameter of shape {tuple(parameter.shape)}")
    (_, replica_count), (shard, shard_count) = _place(replicas), _place(shards)
    *_, rows, columns = parameter.shape
    chunk = math.ceil(parameter.shape[0] / shard_count)
    chunks = [max(0, min(chunk, parameter.shape[0] - s * chunk)) for s in range(shard_count)]
    if parameter.ndim == 2:
        stacks = [_Stack(number, (1, rows, columns), tuple(part * columns for part in chunks), 0)]
    else:
        stacks = []
        for holder, count in enumerate(chunks):
            for first in range(0, count, stride := max(1, math.ceil(count / replica_count))):
                size = min(stride, count - first)
                held = tuple(size * rows * columns * (s == holder) for s in range(shard_count))
                stacks.append(_Stack(number, (size, rows, columns), held, first * rows * columns))
    here = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
    if here != (expected := sum(stack.held[shard] for stack in stacks)):
        shape = tuple(parameter.shape)
        raise ValueError(
            f"Muon knows even chunks of dimension 0; of {shape} shard {shard} holds {here} elements, not {expected}"
        )
    return stacks


def _owners(stacks: list[_Stack], replicas: int, shards: int) -> dict[tuple[int, int], list[_Stack]]:
    """Dearest first, each to the rank that has least to do; what one shard holds whole stays with that shard."""
    owned: dict[tuple[int, int], list[_Stack]] = {(r, s): [] for r in range(replicas) for s in range(shards)}
    load = dict.fromkeys(owned, 0)
    for stack in sorted(stacks, key=lambda stack: (-stack.cost // stack.shape[0], stack.shape[1:], -stack.shape[0])):
        holders = [s for s in range(shards) if stack.held[s]]
        candidates = itertools.product(range(replicas), holders if len(holders) == 1 else range(shards))
        owner = min(candidates, key=load.__getitem__)
        owned[owner].append(stack)
        load[owner] += stack.cost
    return owned


def _reordered(values: Tensor, sizes: list[int], order: list[int]) -> Tensor:
    """Blocks of `sizes` elements, taken in `order`."""
    if order == sorted(order):
        return values
    blocks = values.split(sizes)
    return torch.cat([blocks[i] for i in order])
