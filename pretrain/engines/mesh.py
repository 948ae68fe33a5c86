"""The ranks of a run as a grid: replicas x shards x sequence x tensor, the last one innermost, so that neighbouring ranks share
a sequence or a matrix. It knows numbers and process groups; `parallel.py` cuts models by it.

    replicas    hold the same shards of the weights (`fsdp2` with engine.replicas)
    shards      the rest: every other data-parallel rank
    sequence    share the tokens of a sequence
    tensor      share heads, feed-forward matrices and vocabulary

Experts do not follow the grid: of every `expert` consecutive ranks, each holds another part of the experts. Every rank has
tokens of its own wherever experts, norms and routers run, so all ranks take part in their gradients.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from pretrain.config import EngineConfig


class Mesh:
    """The grid, and the place of one rank in it. Process groups are made by `connect`."""

    def __init__(self, engine: EngineConfig, rank: int, ranks: int):
        parallel = engine.parallel
        self.rank, self.ranks = rank, ranks
        self.tensor, self.sequence, self.expert, self.replicas = (
            parallel.tensor, parallel.sequence, parallel.expert, engine.replicas
        )  # fmt: skip
        self.shards = ranks // (self.replicas * self.sequence * self.tensor)

    @property
    def cut(self) -> bool:
        """True if ranks share a model or a sequence, not only the batch and the state."""
        return max(self.tensor, self.sequence, self.expert) > 1

    # ---------------------------------------------------------------- numbers

    @property
    def sizes(self) -> dict[str, int]:
        """The factors of the number of ranks, by name, and over how many ranks the experts lie."""
        return {name: getattr(self, name) for name in ("replicas", "shards", "sequence", "tensor", "expert")}

    @property
    def sample_ranks(self) -> int:
        """Groups of ranks that take different samples."""
        return self.replicas * self.shards

    @property
    def sample_rank(self) -> int:
        """The number of this rank's group among them."""
        return self.rank // (self.sequence * self.tensor)

    @property
    def sequence_rank(self) -> int:
        """Which part of its sequences this rank has."""
        return self.rank // self.tensor % self.sequence

    @property
    def tensor_rank(self) -> int:
        """Which part of heads, feed-forward matrices and vocabulary this rank has."""
        return self.rank % self.tensor

    @property
    def expert_rank(self) -> int:
        """Which part of the experts this rank has."""
        return self.rank % self.expert

    @property
    def gradient_ranks(self) -> int:
        """Ranks over which an engine averages the gradient of a weight: the step multiplies by it."""
        return self.ranks // self.tensor

    def __str__(self) -> str:
        """Such as `8 ranks = 2 shards x 2 sequence x 2 tensor`."""
        names = ("replicas", "shards", "sequence", "tensor")
        factors = [f"{getattr(self, name)} {name}" for name in names if getattr(self, name) > 1]
        text = f"{self.ranks} rank{'' if self.ranks == 1 else 's'} = {' x '.join(factors) or '1'}"
        return text if self.expert == 1 else f"{text}; experts over {self.expert}"

    # ---------------------------------------------------------------- process groups

    def connect(self, device_type: str, weights: bool = False) -> None:
        """Makes the process groups that these numbers need. weights: `fsdp2` shards over them. A collective."""
        self._device_type = device_type
        if weights or self.tensor > 1:
            self.weights  # noqa: B018
        if self.sequence > 1:
            self.tokens  # noqa: B018
        if self.expert > 1:
            self.experts  # noqa: B018

    @cached_property
    def weights(self) -> DeviceMesh:
        """replica x shard x tensor: where weights lie. Ranks that share a sequence hold different shards."""
        return self._mesh((self.replicas, self.shards * self.sequence, self.tensor), ("replica", "shard", "tensor"))

    @cached_property
    def copies(self) -> DeviceMesh:
        """replica x shard: ranks that together hold one copy of every weight that is not an expert's, cut or not."""
        return self._mesh((self.replicas, self.ranks // self.replicas), ("replica", "shard"))

    @cached_property
    def tokens(self) -> DeviceMesh:
        """sample x sequence x tensor."""
        return self._mesh((self.sample_ranks, self.sequence, self.tensor), ("sample", "sequence", "tensor"))

    @cached_property
    def experts(self) -> DeviceMesh:
        """replica x shard x part: ranks with the same experts (both), and ranks that together have all of them."""
        shards = self.ranks // (self.replicas * self.expert)
        return self._mesh((self.replicas, shards, self.expert), ("replica", "shard", "part"))

    def _mesh(self, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
        """Leaves out dimensions of size 1, for which torch would make as many groups as ranks; `fsdp2` needs only `shard`."""
        kept = [(size, name) for size, name in zip(shape, names, strict=True) if size > 1 or name == "shard"]
        shape, names = zip(*kept, strict=True)
        return DeviceMesh(self._device_type, torch.arange(self.ranks).view(shape), mesh_dim_names=names)

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        """The ranks that share this rank's matrices."""
        return self.weights.get_group("tensor")

    @property
    def sequence_group(self) -> dist.ProcessGroup:
        """The ranks that share this rank's sequences and hold the same heads."""
        return self.tokens.get_group("sequence")

    @property
    def expert_group(self) -> dist.ProcessGroup:
        """The ranks that together hold all experts."""
        return self.experts.get_group("part")
