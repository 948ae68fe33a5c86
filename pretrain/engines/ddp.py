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
from pretrain.engines import fp8
from pretrain.engines.base import Engine, LocalState, moments_of


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
        if self.world_size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            ddp = nn.parallel.DistributedDataParallel
            newer = "forward_sync_buffers" in inspect.signature(ddp.__init__).parameters  # the older name warns from 2.13 on
            self._wrapped = ddp(
                self.model,
                device_ids=ids,
                gradient_as_bucket_view=True,
                bucket_cap_mb=self.config.bucket_mib or 25,
                **{"forward_sync_buffers" if newer else "broadcast_buffers": False},  # they are already equal
            )
        self.optimizer = make_optimizer(self.model)

    def _warm_up(self) -> None:
        """DDP rebuilds its buckets after the first backward pass; from then on, sums over ranks round differently. Doing that
        pass here, on a few tokens, makes a resumed run compute its first step as an uninterrupted run does."""
        if self.world_size == 1:
            return
        tokens_BT = torch.zeros(1, fp8.MULTIPLE, dtype=torch.int64, device=self.device)
        with self.autocast(), torch.compiler.set_stance("force_eager"):
            for _ in range(2):  # it rebuilds in the second forward pass, which needs a backward pass, or step 1 would sum early
                self._wrapped(tokens_BT, tokens_BT).loss_sum.backward()
        # Of all parameters: the optimizer may lack one (see update_check.py).
        self._views = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad(set_to_none=True)

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager:
        if self.world_size == 1 or last:
            return contextlib.nullcontext()
        if self._views[0][0].grad is None:  # the first of several micro-batches
            # Summed into the memory of DDP's buckets. Otherwise the sum would be a second copy of the gradient, 4 bytes per
            # parameter, until the last micro-batch copies it there.
            torch._foreach_zero_([view for _, view in self._views])
            for parameter, view in self._views:
                parameter.grad = view
        return self._wrapped.no_sync()

    def local_states(self, saving: bool) -> Iterator[LocalState]:
        for name, parameter in self.model.named_parameters():
            count = parameter.numel()
            share = math.ceil(count / self.world_size)
            start, stop = (min(r * share, count) for r in (self.rank, self.rank + 1)) if saving else (0, count)
            tensors = {"model": parameter.detach(), **moments_of(self.optimizer, parameter)}
            yield LocalState(name, tuple(parameter.shape), start, {kind: t.view(-1)[start:stop] for kind, t in tensors.items()})

    def replicated_weights(self) -> tuple[list[Tensor], dist.ProcessGroup | None]:
        return list(self.model.parameters()), None
