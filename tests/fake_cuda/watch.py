"""A dispatch mode that finds what would slow down or stop a step on a GPU: waits of the host, copies from pageable memory,
tensors that are too large or on the wrong device."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.fake_cuda import fake_gpu

_PACKAGE = str(Path(__file__).resolve().parents[2] / "pretrain") + "/"
_READS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"}


class Fault(NamedTuple):
    """Something that a step on a GPU should not do."""

    name: str
    """host-read, copy-to-host, blocking-copy, pageable-copy, shape-by-value, full-logits or square-mask."""
    function: str
    """The innermost function of the package, or "library"."""
    line: str
    """Its file and line."""


class Watch(TorchDispatchMode):
    """Counts the faults of what runs inside. Enter it after the FakeTensorMode. A read by the host returns 1.0, 0 or True.

    logits: number of values of a micro-batch's logits; a tensor as large as that is a fault. length: T of the micro-batch; a
    (..., T, T) tensor is a fault. 0: not checked.
    """

    supports_higher_order_operators = True  # FlexAttention is one

    def __init__(self, logits: int = 0, length: int = 0):
        super().__init__()
        self.logits, self.length = logits, length
        self.faults: Counter[Fault] = Counter()
        self.operators: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True: lets torch.compile work inside, and watches what the compiled code runs."""
        return True

    @property
    def names(self) -> set[str]:
        """Names of the faults found."""
        return {fault.name for fault in self.faults}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name().partition(".")[0]
        self.operators[name] += 1
        on_gpu = any(isinstance(each, Tensor) and each.is_cuda for each in tree_leaves((args, kwargs)))
        if name in _READS:
            if on_gpu:
                self._found("host-read")
            if isinstance(args[0], torch._subclasses.FakeTensor):
                return 1.0 if args[0].is_floating_point() else args[0].dtype == torch.bool or 0
        if name == "aten::nonzero" or (name == "aten::index" and _mask_dimensions(args[1])):
            if on_gpu:
                self._found("shape-by-value")
            if name == "aten::index":
                return args[0].new_empty((0, *args[0].shape[_mask_dimensions(args[1]) :]))
            return args[0].new_empty((0, args[0].dim()), dtype=torch.int64)
        if name == "aten::_pin_memory":
            return fake_gpu._pin(args[0].clone())
        out = func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            fake_gpu._pin(out)
        if name == "aten::_to_copy":
            self._copied(args[0], out, kwargs.get("non_blocking", False))
        elif name == "aten::copy_":
            self._copied(args[1], args[0], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                self._check_size(tensor)
        return out

    def _copied(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        if source.device.type == target.device.type:
            return
        host = source if target.is_cuda else target
        if non_blocking and host.is_pinned():
            return
        self._found("copy-to-host" if source.is_cuda else "pageable-copy" if non_blocking else "blocking-copy")

    def _check_size(self, tensor: Tensor) -> None:
        if self.logits and tensor.numel() >= self.logits:
            self._found("full-logits")
        if self.length and tensor.dim() > 1 and tensor.shape[-2:] == (self.length, self.length):
            self._found("square-mask")

    def _found(self, name: str) -> None:
        frame = sys._getframe(1)
        while frame and not _is_function_of_ours(frame.f_code):
            frame = frame.f_back
        if frame is None:
            self.faults[Fault(name, "library", "")] += 1
        else:
            line = f"{frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_lineno}"
            self.faults[Fault(name, frame.f_code.co_name, line)] += 1


def _mask_dimensions(indices: list[Tensor | None]) -> int:
    """Dimensions that a boolean mask selects from, if that is what the indices of `aten::index` are; else 0."""
    first = indices[0]
    return first.dim() if len(indices) == 1 and first is not None and first.dtype == torch.bool else 0


def _is_function_of_ours(code) -> bool:
    return code.co_filename.startswith((_PACKAGE, "<planted>")) and not code.co_name.startswith("<")
