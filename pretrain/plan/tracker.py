"""A dispatch mode that watches every operator of a step: live memory, bytes moved, FLOPs, messages, and what would make a GPU
wait.

It knows tensors, real or fake, and the lines of code that made them. It knows nothing of models, engines or devices' rates.
Tensors of `device` are counted, others are on the host: on fake tensors the device is `cpu:0`, and `cpu` is the host.
"""

from __future__ import annotations

import math
import sys
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_GRANULE = 512  # bytes: the caching allocator of CUDA rounds every block up to a multiple of this
_PACKAGE = str(Path(__file__).resolve().parents[1])
_SKIPPED = (str(Path(__file__).resolve().parent), str(Path(_PACKAGE) / "dry_run.py"))
_NO_KERNEL = (
    "prim::", "profiler::", "aten::detach", "aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::lift_fresh",
)  # fmt: skip
_HOST_READS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"}
_PRODUCTS = {
    "mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "_grouped_mm", "_scaled_mm", "looped_product",
    "looped_product_backward",
}  # fmt: skip
_COLLECTIVES = {
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "allgather_coalesced_": "all-gather",
    "reduce_scatter_": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "alltoall_": "all-to-all",
    "alltoall_base_": "all-to-all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
}
_AWAITED = {
    "all_gather_into_tensor": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "all_to_all_single": "all-to-all",
}
"""Functional collectives, whose results the code that follows needs: by these ranks exchange tokens."""
_WRITE_ONLY = {"aten::copy_", "aten::fill_", "aten::zero_"}
_SHAPED_BY_VALUES = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"}


@dataclass(eq=False)
class Allocation:
    """One block of memory. `died` is None while it lives."""

    bytes: int
    born: int
    """Number of the event that allocated it."""
    phase: str
    operator: str
    where: str
    """`file:line` of the innermost line of this project; in a backward pass, of the forward operation."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str = ""
    """weights, gradients, moments, buffers, gathered weights, messages, ...; empty: decided by phase."""
    died: int | None = None


@dataclass
class Phase:
    """A part of a step, with its peak."""

    name: str
    start_bytes: int
    peak_bytes: int
    peak_event: int
    end_bytes: int = 0
    end_event: int = 0


@dataclass
class Message:
    """Collectives of one kind in one group of ranks, in one phase."""

    collective: str
    ranks: tuple[int, ...]
    """Of the group."""
    awaited: bool = False
    """True if computation waits for the result; otherwise the engine may hide it behind computation."""
    calls: int = 0
    payload_bytes: float = 0
    """Of the larger of input and output. An all-to-all of unequal parts: of one that sends as much in equal parts."""

    @property
    def wire_bytes(self) -> float:
        """Bytes that each rank sends in a ring: (N - 1) / N of the payload, twice for an all-reduce. Source: Patarasuk and Yuan
        2009."""
        others = (len(self.ranks) - 1) / len(self.ranks)
        return self.payload_bytes * {"all-reduce": 2 * others, "broadcast": 1, "reduce": 1}.get(self.collective, others)


@dataclass
class Work:
    """Operators of one kind."""

    calls: int = 0
    flops: float = 0
    bytes: float = 0
    """Read and written."""


@dataclass(frozen=True)
class Fault:
    """Something in a step that would make a GPU wait for the host, or would not run there."""

    name: str
    """host-read, host-tensor, shape-by-value, copy-to-host."""
    where: str
    operator: str


@dataclass
class Trace:
    """All that a `Tracker` has seen."""

    allocations: list[Allocation] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    messages: dict[tuple[str, str, tuple[int, ...], bool], Message] = field(default_factory=dict)
    """(phase, collective, ranks, awaited) -> message."""
    work: dict[tuple[str, str], Work] = field(default_factory=dict)
    """(phase, kind of operator) -> work."""
    faults: dict[Fault, int] = field(default_factory=dict)
    """-> number of times."""

    def live(self, event: int) -> list[Allocation]:
        """What was allocated just after event number `event`, largest first."""
        held = (each for each in self.allocations if each.born <= event and (each.died is None or each.died > event))
        return sorted(held, key=lambda each: -each.bytes)


class Tracker(TorchDispatchMode):
    """Fills `trace` with what runs inside. Enter it after a FakeTensorMode, if there is one.

    device: counts its tensors. Faults are recorded while `in_step` is True. A fake tensor has no value, so a read by the host
    returns 1.0, 1 in a step, and 0 for flags and while an engine starts, where ranks agree on what is wrong: nothing.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.trace, self.now, self.in_step = device, Trace(), 0, False
        self._events, self._live, self._forward_lines = 0, {}, {}
        self._phase = Phase("start", 0, 0, 0)
        self._virtual = False
        self.compiled_where = ""
        """Replaces the line of code while a compiled graph runs."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True: compilation itself is not watched, only what the compiled code runs."""
        return True

    # ---------------------------------------------------------------- phases and kinds

    def begin(self, name: str) -> None:
        """Ends the current phase and starts another."""
        self.end()
        self._phase = Phase(name, self.now, self.now, self._events)
        self.trace.phases.append(self._phase)

    def end(self) -> None:
        """Ends the current phase."""
        self._phase.end_bytes, self._phase.end_event = self.now, self._events

    def label(self, tensors, kind: str) -> int:
        """Names what the memory of some tensors is for. Returns its bytes, each storage once and without rounding."""
        storages = {}
        for tensor in tensors:
            storage = _plain(tensor).untyped_storage()
            storages[storage._cdata] = storage.nbytes()
            if storage._cdata in self._live:
                self._live[storage._cdata].kind = kind
        return sum(storages.values())

    # ---------------------------------------------------------------- memory

    def watch(self, tensor: Tensor, operator: str) -> None:
        """Counts the storage of a tensor from now on."""
        tensor = _plain(tensor)
        if tensor.device != self.device or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._live:
            weakref.finalize(storage, self._free, storage._cdata)
            self._allocate(storage._cdata, storage.nbytes(), operator, tensor)

    def _allocate(self, key: int, size: int, operator: str, tensor: Tensor | Allocation) -> None:
        size = -(-size // _GRANULE) * _GRANULE
        self._events += 1
        where = self.where()
        block = Allocation(size, self._events, self._phase.name, operator, where, tuple(tensor.shape), tensor.dtype)
        if isinstance(tensor, Allocation):
            block.kind = tensor.kind
        self._live[key] = block
        self.trace.allocations.append(block)
        self.now += size
        if self.now > self._phase.peak_bytes:
            self._phase.peak_bytes, self._phase.peak_event = self.now, self._events

    def _free(self, key: int) -> None:
        if block := self._live.pop(key, None):
            self._events += 1
            block.died = self._events
            self.now -= block.bytes

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP2 and DeepSpeed free and take memory by resizing storages, which is no operator."""
        if block := self._live.get(storage._cdata):
            self._free(storage._cdata)
            self._allocate(storage._cdata, storage.nbytes(), block.operator, block)

    def __enter__(self):
        original = self._resize = torch.UntypedStorage.resize_

        def resize(storage, size):
            original(storage, size)
            self._resized(storage)

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*error)

    # ---------------------------------------------------------------- operators

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            return self._higher_order(func, args, kwargs)
        name = func.name().partition(".")[0]
        if name == "prim::device":
            return func(*args, **kwargs)
        if name == "_c10d_functional::wait_tensor" and isinstance(args[0], FakeTensor):
            return args[0]  # as it is with real tensors; PyTorch's fake one would be another tensor
        if name in _HOST_READS and self._on_device(args):
            self._fault("host-read", name)
        if name == "aten::_local_scalar_dense" and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else int(self.in_step and args[0].dtype == torch.int64)
        if name in _SHAPED_BY_VALUES and self._on_device(args):
            self._fault("shape-by-value", name)
        out = func(*args, **kwargs)
        if name.startswith(("c10d::", "_c10d_functional::")):
            self._message(name.partition("::")[2], args, kwargs, out)
        elif name == "aten::lift_fresh" and self.in_step:
            self._fault("host-tensor", name)
            out = torch.empty(out.shape, dtype=out.dtype, device=self.device) if isinstance(out, FakeTensor) else out
        elif name in ("aten::_to_copy", "aten::copy_"):
            self._copy(name, args, kwargs, out)
        if self._forward():
            self._forward_lines[torch.autograd._get_sequence_nr() - 1] = self.where()
        if not func.is_view and not name.startswith(_NO_KERNEL):
            self._work(func, name, args, kwargs, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.watch(tensor, name)
        return out

    def _higher_order(self, func, args: tuple, kwargs: dict) -> Any:
        """FlexAttention, and what libraries wrap around operators."""
        out = func(*args, **kwargs)
        tensors = [each for each in tree_leaves((args, out)) if isinstance(each, Tensor)]
        if "flex_attention" in (name := func.name()):
            self.add_work("attention", flops_of(func, name, args, kwargs, out), sum(map(_bytes, tensors)))
        for tensor in tensors:
            self.watch(tensor, name)
        return out

    def _forward(self) -> bool:
        return torch._C._current_autograd_node() is None

    def _on_device(self, values: Any) -> bool:
        tensors = (_plain(each) for each in tree_leaves(values) if isinstance(each, Tensor))
        return self.in_step and any(tensor.device == self.device for tensor in tensors)

    def _copy(self, name: str, args: tuple, kwargs: dict, out: Tensor) -> None:
        source, result = (args[0], out) if name == "aten::_to_copy" else (args[1], args[0])
        if not self.in_step or not isinstance(source, Tensor) or source.device == result.device:
            return
        self._fault("host-tensor" if source.device != self.device else "copy-to-host", name)

    def _fault(self, name: str, operator: str) -> None:
        if self.in_step:
            fault = Fault(name, self.where(), operator)
            self.trace.faults[fault] = self.trace.faults.get(fault, 0) + 1

    def _work(self, func, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        tensors = {id(each): each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)}
        size = sum(_bytes(_plain(each)) for each in tensors.values())
        if name not in _WRITE_ONLY:  # what is updated in place is read and written
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info and argument.alias_info.is_write:
                    size += sum(_bytes(_plain(each)) for each in tree_leaves(value) if isinstance(each, Tensor))
        self.add_work(kind_of_operator(name), flops_of(func, name, args, kwargs, out), size)

    def add_work(self, kind: str, flops: float, size: float) -> None:
        """Counts one operator of this phase."""
        work = self.trace.work.setdefault((self._phase.name, kind), Work())
        work.calls, work.flops, work.bytes = work.calls + 1, work.flops + flops, work.bytes + size

    def _message(self, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        if name in _AWAITED:  # (input, ..., the group or its name)
            group = args[-1] if isinstance(args[-1], dist.ProcessGroup) else _resolve_process_group(args[-1])
            collective, sides = _AWAITED[name], (args[0], out)
        elif name in _COLLECTIVES:
            values = (*args, *kwargs.values())
            group = dist.ProcessGroup.unbox(next(each for each in values if isinstance(each, torch.ScriptObject)))
            collective, sides = _COLLECTIVES[name], args[:2]
        else:
            return
        ranks = tuple(dist.get_process_group_ranks(group))
        payload = max(sum(_bytes(_plain(each)) for each in tree_leaves(side) if isinstance(each, Tensor)) for side in sides)
        if name == "all_to_all_single" and len(ranks) > 1:
            payload = _sent_to_others(args[0], args[2], ranks.index(dist.get_rank())) * len(ranks) / (len(ranks) - 1)
        key = collective, ranks, name in _AWAITED
        message = self.trace.messages.setdefault((self._phase.name, *key), Message(*key))
        message.calls, message.payload_bytes = message.calls + 1, message.payload_bytes + payload

    # ---------------------------------------------------------------- lines of code

    def where(self) -> str:
        """`file:line` of the innermost line of this project; in a backward pass, of the forward operation."""
        if self.compiled_where:
            return self.compiled_where
        frame = sys._getframe(1)
        outermost = ""
        while frame:
            path = frame.f_code.co_filename
            if path.startswith(_PACKAGE) and not path.startswith(_SKIPPED):
                here = f"{path[len(_PACKAGE) - len('pretrain') :]}:{frame.f_lineno}"
                if not (path.endswith("engines/base.py") and frame.f_code.co_name == "_backward"):
                    return here
                outermost = here
                break
            frame = frame.f_back
        node = torch._C._current_autograd_node()
        return self._forward_lines.get(node._sequence_nr(), outermost or "library") if node else outermost or "library"


def flops_of(func, name: str, args: tuple, kwargs: dict, out: Any) -> float:
    """FLOPs of an operator as torch.utils.flop_counter counts them: attention without regard to its mask, and its backward
    kernel with the product that it repeats."""
    short = name.rpartition("::")[2]
    if "scaled_dot_product" in name or "flex_attention" in name:
        query, key = (args[1], args[2]) if "scaled" in name and "backward" in name else (args[0], args[1])
        batch, heads, queries, size = query.shape
        return (10 if "backward" in name else 4) * batch * heads * queries * key.shape[2] * size
    if short in ("mm", "bmm", "_scaled_mm", "_grouped_mm"):
        return 2 * args[0].numel() * args[1].shape[-1]
    if short in ("addmm", "addmm_", "baddbmm", "baddbmm_"):
        return 2 * args[1].numel() * args[2].shape[-1]
    if short.startswith("looped_product"):
        return (4 if "backward" in short else 2) * args[0].numel() * args[1].shape[1]
    packet = getattr(func, "_overloadpacket", None)
    return flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0


def kind_of_operator(name: str) -> str:
    """products, attention or other: which limit of a device bounds an operator."""
    if "attention" in name or "flex" in name:
        return "attention"
    return "products" if name.partition("::")[2] in _PRODUCTS else "other"


def _bytes(tensor: Tensor) -> int:
    """Bytes that a kernel reads or writes; dimensions that a view repeats are read once."""
    values = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0)
    return values * tensor.element_size()


def _sent_to_others(tensor: Tensor, rows: list[int], mine: int) -> float:
    """Bytes of an all-to-all that leave this rank, number `mine` of the group. rows: for each rank."""
    return _bytes(tensor) * (1 - rows[mine] / max(1, sum(rows)))


def _plain(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, whose wrapper claims the bytes of the full tensor."""
    return tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor
