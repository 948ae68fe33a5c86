"""The kind of device that the code computes for. Imports no torch.

Code that chooses a kernel, a dtype or a chunk by the kind of device asks `kind`, not `tensor.is_cuda`: a dry run computes on
fake tensors of the CPU and must make the choices that the GPU would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_planned: str | None = None


def kind(device) -> str:
    """`device.type` of a torch.device, such as `cpu` or `cuda`; inside `planned`, the kind that is planned for."""
    return _planned or device.type


@contextlib.contextmanager
def planned(kind_of_device: str) -> Iterator[None]:
    """In this context every device counts as one of `kind_of_device`, such as `cuda`. For fake tensors only: real ones would
    meet kernels that their device lacks."""
    global _planned
    before, _planned = _planned, kind_of_device
    try:
        yield
    finally:
        _planned = before
