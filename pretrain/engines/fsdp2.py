"""The engine `fsdp2` (PyTorch's `fully_shard`): weights, gradients and optimizer state are sharded along their first
dimension; a block's weights are gathered only for its forward and backward pass.

With `engine.replicas` the ranks form a grid: weights are sharded over the ranks of a row and equal within a column, so that
gathering stays inside a row (usually one node) and only summed gradients cross rows (hybrid sharding).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.tensor import DTensor

from pretrain.config import ConfigError, Problem
from pretrain.engines import fp8, parallel
from pretrain.engines.base import Engine, moments_of, require
from pretrain.engines.shards import Holders, LocalState


class Fsdp2Engine(Engine):
    """One process of an `fsdp2` run."""

    def _distribute(self, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        mesh = _over(self.mesh.weights)
        mixed = {} if self.precision == "fp32" else {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        # Hidden states have the dtype of the weights already, and cosines and sines must stay in fp32: it casts the fields of
        # dataclasses, too (torch/distributed/utils.py, `_apply_to_tensors`).
        policy = MixedPrecisionPolicy(**mixed, cast_forward_inputs=False)
        decoder = self.model.model
        for block in decoder.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy, **self._place_experts(block, policy))
        for block, following in itertools.pairwise(decoder.layers):
            # The gather of the next block's weights is queued before this block's kernels instead of after them, so that a host
            # which is late with those does not delay it. As many blocks are gathered at a time; backward passes do it anyway.
            block.set_modules_to_forward_prefetch([following])
        if not self.model.config.tie_word_embeddings:  # tied, both belong to the root, which stays gathered for the full pass
            fully_shard(decoder.embed_tokens, mesh=mesh, mp_policy=policy)
            # Used last in the forward pass and first in the backward pass: freeing it in between would gather it twice.
            fully_shard([decoder.norm, self.model.lm_head], mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        self._wrapped = fully_shard(self.model, mesh=mesh, mp_policy=policy)
        self.model.to_empty(device=self.device)  # allocates only this rank's shards
        self.optimizer = make_optimizer(self.model)
        parameters = list(self.model.parameters())
        require(
            sharded_parameters=(len(parameters), sum(isinstance(parameter, DTensor) for parameter in parameters)),
            mesh=(tuple(mesh.shape), tuple(parameters[0].device_mesh.shape)),
            master_weights=({torch.float32}, {parameter.dtype for parameter in parameters}),
        )

    def _holders(self, name: str) -> Holders | None:
        if self.mesh.tensor == 1 or self._is_expert(name):
            return None
        if cut := self.cuts.get(name):
            replicas = self.mesh.weights.get_group("replica") if self.mesh.replicas > 1 else None
            return Holders(replicas, self.mesh.copies.get_group("shard"), cut.dim, cut.parts)
        return Holders(self.mesh.tensor_group, self.mesh.weights.get_group("shard"))

    def _place_experts(self, block: nn.Module, policy: MixedPrecisionPolicy) -> dict[str, Callable]:
        """Options of `fully_shard` that shard a block's experts over the ranks with the same ones. A torch without such options
        gathers them by hooks of their own, inside the block."""
        if self.mesh.expert == 1:
            return {}
        mesh = _over(self.mesh.experts)
        if not hasattr(_fsdp_common, "ShardPlacementResult"):
            if self.config.activation_checkpointing == "selective":  # it counts operations, and would count those of the hooks
                problem = "is selective, which with experts over several ranks needs torch 2.13: choose full, or install it"
                raise ConfigError([Problem("engine.activation_checkpointing", problem)])
            fully_shard(block.mlp.experts, mesh=mesh, mp_policy=policy)
            return {}
        experts = set(block.mlp.experts.parameters())
        if self.mesh.replicas == 1:
            info = _fsdp_common.FSDPMeshInfo(mesh, shard_mesh_dim=0)
        else:
            info = _fsdp_common.HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)
        placed = _fsdp_common.ShardPlacementResult(None, info)
        return {"shard_placement_fn": lambda parameter: placed if parameter in experts else None}

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        if self.config.reduce_gradients == "step":
            self.model.set_requires_gradient_sync(last)
        elif self.config.replicas > 1:
            self.model.set_requires_all_reduce(last)  # each micro-batch sums within a row, only the last one across rows
        yield

    def _update(self) -> tuple[Tensor, Tensor]:
        result = super()._update()
        self._refresh()
        return result

    def _refresh(self) -> None:
        if self.precision == "fp8":
            fp8.store_scales(self.model)

    def _sum_gradients(self) -> None:
        if self.mesh.expert == self.mesh.tensor == 1:
            return
        gradients = {name: parameter.grad.to_local() for name, parameter in self.model.named_parameters()}
        if self.mesh.expert > 1:  # averaged over the ranks with the same experts, not over those that average the rest
            experts = [gradient for name, gradient in gradients.items() if self._is_expert(name)]
            torch._foreach_mul_(experts, self.mesh.tensor / self.mesh.expert)
        if self.mesh.tensor > 1:  # each rank of a tensor group has the gradient of its own tokens
            uncut = [gradient for name, gradient in gradients.items() if name not in self.cuts]
            parallel.all_reduce_gradients(uncut, self.mesh.tensor_group)

    def _clip(self) -> Tensor:
        gradients = [(p.grad.to_local(), self._copies(name)) for name, p in self.model.named_parameters() if p.grad is not None]
        return parallel.clip_gradients(gradients, self.grad_clip)

    def _copies(self, name: str) -> int:
        """Ranks that hold the same shard of a parameter."""
        return self.mesh.replicas * (1 if name in self.cuts else self.mesh.tensor)

    def _reshard(self) -> None:
        """Undoes what a forward pass without a backward pass (validation) leaves: the head is gathered."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def local_states(self, saving: bool) -> Iterator[LocalState]:
        self._reshard()
        for name, parameter in self.model.named_parameters():
            # fully_shard splits as torch.chunk does: the first ranks have full chunks of rows, the last ones fewer or none.
            mesh = parameter.device_mesh
            shards, shard = mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1)
            rows = math.ceil(parameter.shape[0] / shards)
            offset = min(shard * rows, parameter.shape[0]) * math.prod(parameter.shape[1:])
            tensors = {"model": parameter.detach(), **moments_of(self.optimizer, parameter)}
            values = {kind: fp8.plain(t.to_local()).view(-1) for kind, t in tensors.items()}
            if saving and not self._saves(name):
                values = {kind: tensor[:0] for kind, tensor in values.items()}
            yield LocalState(name, tuple(parameter.shape), offset, values, self.cuts.get(name))

    def _saves(self, name: str) -> bool:
        """Whether this rank saves its shard, as the first of those that have it."""
        return self.mesh.rank < self.mesh.ranks // self.mesh.replicas and (name in self.cuts or self.mesh.tensor_rank == 0)

    def _saves_rows(self, name: str) -> bool:
        # What ranks have not cut, each replica works on for itself if it is divided (`_holders`).
        return name in self.cuts or self.mesh.tensor == 1 or self.mesh.rank < self.mesh.ranks // self.mesh.replicas

    def replicated_weights(self) -> Iterator[tuple[list[Tensor], dist.ProcessGroup | None]]:
        self._reshard()
        local = {name: fp8.plain(parameter.to_local()) for name, parameter in self.model.named_parameters()}
        if self.mesh.replicas > 1:
            yield list(local.values()), self.mesh.weights.get_group("replica")
        if self.mesh.tensor > 1:
            yield [tensor for name, tensor in local.items() if name not in self.cuts], self.mesh.tensor_group


def _over(mesh: DeviceMesh) -> DeviceMesh:
    """The dimensions over which weights are averaged: shards, and replicas if there are several."""
    return mesh["replica", "shard"] if "replica" in mesh.mesh_dim_names else mesh["shard"]
