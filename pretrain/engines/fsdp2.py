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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pretrain.engines import fp8
from pretrain.engines.base import Engine, LocalState, moments_of, require


class Fsdp2Engine(Engine):
    """One process of an `fsdp2` run."""

    def _distribute(self, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        replicas = self.config.replicas
        shape = (self.world_size,) if replicas == 1 else (replicas, self.world_size // replicas)
        self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replica", "shard")[-len(shape) :])
        mixed = {} if self.precision == "fp32" else {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        policy = MixedPrecisionPolicy(**mixed)
        decoder = self.model.model
        for block in decoder.layers:
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        for block, following in itertools.pairwise(decoder.layers):
            # The gather of the next block's weights is queued before this block's kernels instead of after them, so that a host
            # which is late with those does not delay it. As many blocks are gathered at a time; backward passes do it anyway.
            block.set_modules_to_forward_prefetch([following])
        if not self.model.config.tie_word_embeddings:  # tied, both belong to the root, which stays gathered for the full pass
            fully_shard(decoder.embed_tokens, mesh=self.mesh, mp_policy=policy)
            # Used last in the forward pass and first in the backward pass: freeing it in between would gather it twice.
            fully_shard([decoder.norm, self.model.lm_head], mesh=self.mesh, mp_policy=policy, reshard_after_forward=False)
        self._wrapped = fully_shard(self.model, mesh=self.mesh, mp_policy=policy)
        self.model.to_empty(device=self.device)  # allocates only this rank's shards
        self.optimizer = make_optimizer(self.model)
        parameters = list(self.model.parameters())
        require(
            sharded_parameters=(len(parameters), sum(isinstance(parameter, DTensor) for parameter in parameters)),
            mesh=(shape, tuple(parameters[0].device_mesh.shape)),
            master_weights=({torch.float32}, {parameter.dtype for parameter in parameters}),
        )

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

    def _clip(self) -> Tensor:
        gradients = [p.grad.to_local() for p in self.model.parameters() if p.grad is not None]
        square = torch.nn.utils.get_total_norm(gradients).to(self.device).square()
        dist.all_reduce(square, group=self.mesh.get_group("shard"))
        norm = square.sqrt()
        if self.grad_clip:
            torch._foreach_mul_(gradients, torch.clamp(self.grad_clip / (norm + 1e-6), max=1.0))
        return norm

    def _reshard(self) -> None:
        """Undoes what a forward pass without a backward pass (validation) leaves: the head is gathered."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def local_states(self, saving: bool) -> Iterator[LocalState]:
        self._reshard()
        if saving and self.config.replicas > 1 and self.mesh.get_local_rank("replica") > 0:
            return  # the first replica saves
        shards, shard = self.mesh["shard"].size(), self.mesh.get_local_rank("shard")
        for name, parameter in self.model.named_parameters():
            # fully_shard splits as torch.chunk does: the first ranks have full chunks of rows, the last ones fewer or none.
            rows = math.ceil(parameter.shape[0] / shards)
            offset = min(shard * rows, parameter.shape[0]) * math.prod(parameter.shape[1:])
            tensors = {"model": parameter.detach(), **moments_of(self.optimizer, parameter)}
            yield LocalState(
                name, tuple(parameter.shape), offset, {kind: fp8.plain(t.to_local()).view(-1) for kind, t in tensors.items()}
            )

    def replicated_weights(self) -> tuple[list[Tensor], dist.ProcessGroup | None]:
        if self.config.replicas == 1:
            return [], None
        self._reshard()
        return [fp8.plain(parameter.to_local()) for parameter in self.model.parameters()], self.mesh.get_group("replica")
