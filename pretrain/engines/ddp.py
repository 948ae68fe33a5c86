"""The engine `ddp` (PyTorch DDP): every rank holds the full model; gradients are averaged once per step."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.config import EngineConfig
from pretrain.engines import fp8, parallel
from pretrain.engines.base import Engine, moments_of
from pretrain.engines.shards import Holders, LocalState


class DdpEngine(Engine):
    """One process of a `ddp` run. The last backward pass of a step averages gradients; a single process has no wrapper."""

    def __init__(self, config: EngineConfig, store: dist.Store | None = None):
        super().__init__(config, store)
        self.autocast_dtype = None if self.precision == "fp32" else torch.bfloat16

    def _distribute(self, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        # As to_empty does, whose empty_like of a meta tensor imports sympy: a tenth of the CPU time from a start to step 1.
        self.model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device))
        self._wrapped = self.model
        self._views: list[tuple[Tensor, Tensor]] = []  # (parameter, its part of a bucket), from `_warm_up`
        if self.mesh.gradient_ranks > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            ddp = nn.parallel.DistributedDataParallel
            # Every rank has other experts, and other tokens reach them: `_sum_gradients` sums theirs.
            experts = [name for name in self.cuts if self._is_expert(name)]
            ddp._set_params_and_buffers_to_ignore_for_model(self.model, experts)
            newer = "forward_sync_buffers" in inspect.signature(ddp.__init__).parameters  # the older name warns from 2.13 on
            self._wrapped = ddp(
                self.model,
                device_ids=ids,
                process_group=self.mesh.weights.get_group("shard") if self.mesh.tensor > 1 else None,
                gradient_as_bucket_view=True,
                bucket_cap_mb=self.config.bucket_mib or 25,
                **{"forward_sync_buffers" if newer else "broadcast_buffers": False},  # they are already equal
            )
        self.optimizer = make_optimizer(self.model)

    def _warm_up(self) -> None:
        """DDP rebuilds its buckets after the first backward pass; from then on, sums over ranks round differently. Doing that
        pass here, on a few tokens, makes a resumed run compute its first step as an uninterrupted run does."""
        if self.mesh.gradient_ranks == 1:
            return
        tokens_BT = torch.zeros(1, math.lcm(fp8.MULTIPLE, self.mesh.tensor), dtype=torch.int64, device=self.device)
        with self.autocast(), torch.compiler.set_stance("force_eager"):
            for _ in range(2):  # it rebuilds in the second forward pass, which needs a backward pass, or step 1 would sum early
                self._wrapped(tokens_BT, tokens_BT).loss_sum.backward()
        # Of all parameters: the optimizer may lack one (see update_check.py).
        self._views = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad(set_to_none=True)

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager:
        if self.mesh.gradient_ranks == 1 or last:
            return contextlib.nullcontext()
        if self._views[0][0].grad is None:  # the first of several micro-batches
            # Summed into the memory of DDP's buckets. Otherwise the sum would be a second copy of the gradient, 4 bytes per
            # parameter, until the last micro-batch copies it there.
            torch._foreach_zero_([view for _, view in self._views])
            for parameter, view in self._views:
                parameter.grad = view
        return self._wrapped.no_sync()

    def _holders(self, name: str) -> Holders | None:
        if name not in self.cuts:
            return None
        if self._is_expert(name):
            return Holders(self.mesh.experts.get_group("shard"), None)
        cut = self.cuts[name]
        return Holders(self.mesh.weights.get_group("shard"), cut.group, cut.dim, cut.parts)

    def _sum_gradients(self) -> None:
        if not self.cuts:
            return
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        if experts := [gradient for name, gradient in gradients.items() if self._is_expert(name)]:
            parallel.all_reduce_gradients(experts, self.mesh.experts.get_group("shard"))
            torch._foreach_div_(experts, self.mesh.gradient_ranks)
        if self.mesh.tensor > 1:  # each rank of a tensor group has the gradient of its own tokens
            uncut = [gradient for name, gradient in gradients.items() if name not in self.cuts]
            parallel.all_reduce_gradients(uncut, self.mesh.tensor_group)

    def _clip(self) -> Tensor:
        if not self.cuts:
            return super()._clip()
        gradients = [(p.grad, self.world_size // self._parts(name)) for name, p in self.model.named_parameters()]
        return parallel.clip_gradients(gradients, self.grad_clip)

    def _parts(self, name: str) -> int:
        """Into how many parts ranks have cut a parameter."""
        return self.cuts[name].parts if name in self.cuts else 1

    def local_states(self, saving: bool) -> Iterator[LocalState]:
        for name, parameter in self.model.named_parameters():
            cut, parts, start, stop = self.cuts.get(name), self._parts(name), 0, parameter.numel()
            if saving:  # the ranks with the same part share it: full rows each, so that those that have its columns agree
                rows, row = len(parameter), parameter.numel() // len(parameter)
                copies, copy = self.world_size // parts, self.rank // parts
                if cut is None or cut.dim == 0:
                    rows, row = rows * row, 1
                share = math.ceil(rows / copies)
                start, stop = (min(each * share, rows) * row for each in (copy, copy + 1))
            tensors = {"model": parameter.detach(), **moments_of(self.optimizer, parameter)}
            shards = {kind: tensor.view(-1)[start:stop] for kind, tensor in tensors.items()}
            yield LocalState(name, tuple(parameter.shape), start, shards, cut)

    def replicated_weights(self) -> Iterator[tuple[list[Tensor], dist.ProcessGroup | None]]:
        parameters = dict(self.model.named_parameters())
        yield [parameter for name, parameter in parameters.items() if name not in self.cuts], None
        if self.mesh.expert > 1:
            yield [parameters[name] for name in self.cuts if self._is_expert(name)], self.mesh.experts.get_group("shard")
        if self.mesh.tensor > 1:
            yield [parameters[name] for name in self.cuts if not self._is_expert(name)], self.mesh.weights.get_group("shard")
