"""One rank of many on fake tensors: a world in which the real engines start and train, without a GPU, other ranks or memory.

Everything that torch, Accelerate and DeepSpeed do with the values of tensors while they start is replaced here, and nowhere
else; what they do with memory and messages is theirs. On leaving the context all of it is undone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretrain import target
from pretrain.engines.mesh import Mesh

DEVICE = torch.device("cpu", 0)
"""Stands for the GPU. Tensors of `cpu`, without a number, are on the host; mixing the two raises torch's own error."""


@contextlib.contextmanager
def fake_rank(rank: int, ranks: int, ranks_per_node: int, engine: str, kind: str = "cuda") -> Iterator[FakeTensorMode]:
    """Makes this process rank `rank` of `ranks` for an engine (`engine.name`) that is built inside. kind: of device, whose
    kernels, dtypes and chunks the code chooses.

    Raises RuntimeError if this process is already part of a process group.
    """
    if dist.is_initialized():
        raise RuntimeError("a fake rank needs a process that belongs to no process group")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ))
        if ranks > 1 or engine != "ddp":
            local = {"LOCAL_RANK": rank % ranks_per_node, "LOCAL_WORLD_SIZE": min(ranks, ranks_per_node)}
            place = {"RANK": rank, "WORLD_SIZE": ranks, **local, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
            os.environ.update({name: str(value) for name, value in place.items()})
            dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
            stack.callback(dist.destroy_process_group)
        _forget_accelerate()  # an engine of this process may have left its own
        stack.callback(_forget_accelerate)
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        stack.enter_context(mock.patch.object(Mesh, "_mesh", _real(Mesh._mesh)))
        if engine == "ddp":
            stack.enter_context(mock.patch("torch.nn.parallel.distributed._verify_param_shape_across_processes"))
            stack.enter_context(mock.patch.object(nn.parallel.DistributedDataParallel, "__init__", _start_ddp))
            stack.enter_context(torch._dynamo.config.patch(optimize_ddp=False))  # it would split what spans several buckets
        elif engine == "fsdp2":
            at = "torch.distributed.fsdp._fully_shard._fully_shard._get_device_from_mesh"
            stack.enter_context(mock.patch(at, lambda mesh: DEVICE))
        else:
            _enter_deepspeed(stack)
        stack.enter_context(target.planned(kind))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def _real(function):
    """The same function on real tensors, for values that ranks and shapes follow from."""

    def run(*args, **kwargs):
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return run


def _forget_accelerate() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


_module_apply, _ddp_init = nn.Module._apply, nn.parallel.DistributedDataParallel.__init__


def _apply(self: nn.Module, function, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which cannot exchange a fake parameter for another: makes new parameters, where anything changes."""
    for module in self.children() if recurse else ():
        module._apply(function)
    if any(isinstance(parameter, DTensor) for parameter in self._parameters.values()):
        return _module_apply(self, function, recurse=False)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                applied = function(parameter)
            if (applied.device, applied.dtype) != (parameter.device, parameter.dtype):
                self._parameters[name] = nn.Parameter(applied, parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self


def _start_ddp(self, *args, **kwargs) -> None:
    """DDP with a hook in place of its own reduction, which reads the result of a message, and without rebuilding its buckets,
    which changes their order and not their memory."""
    _ddp_init(self, *args, **kwargs)
    group = self.process_group
    ranks = dist.get_world_size(group)

    def reduce(state, bucket):  # DDP accepts no annotation in the form of a string
        buffer, future = bucket.buffer().div_(ranks), torch.futures.Future()
        dist.all_reduce(buffer, group=group)
        future.set_result(buffer)
        return future

    self.register_comm_hook(None, reduce)
    self.reducer = _Reducer(self.reducer)


class _Reducer:
    def __init__(self, reducer):
        self._reducer = reducer

    def __getattr__(self, name: str):
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def _enter_deepspeed(stack: contextlib.ExitStack) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import get_accelerator

    accelerator = type(get_accelerator())
    for name in ("device_name", "current_device_name"):
        stack.enter_context(mock.patch.object(accelerator, name, lambda self, index=None: str(DEVICE)))
    import deepspeed.comm.comm
    import deepspeed.utils.groups

    for module in (deepspeed.comm.comm, deepspeed.utils.groups):  # they keep process groups, and the next run has others
        stack.enter_context(mock.patch.dict(vars(module)))
    equal = "deepspeed.runtime.zero.partitioned_param_coordinator.assert_ints_same_as_other_ranks"
    stack.enter_context(mock.patch(equal))
