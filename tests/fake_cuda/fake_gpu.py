"""A GPU that is not there: enough of `torch.cuda` that engines, FakeTensorMode, Dynamo and Inductor take this machine for one
with H100s. Tensors on it have shapes, dtypes and devices, but no values: a step of any size takes no memory and little time.

It needs the CUDA build of torch and, preloaded, the library that shim.cpp becomes (`make test-fake-cuda` sees to both).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import types
import weakref

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=85_017_755_648, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, L2_cache_size=52_428_800,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    clock_rate=1_980_000, memory_clock_rate=2_619_000, memory_bus_width=5120, is_integrated=False, gcnArchName="", uuid="0",
)  # fmt: skip
"""What the CUDA runtime reports of the card."""

_DEVICES = 64  # autograd starts a thread for each; with fewer than 8 it asks the driver, which does not exist
_pinned: set[int] = set()


def install(device_count: int = 8) -> None:
    """Pretends, for the rest of this process, that there are `device_count` H100s; this process uses the first."""
    if torch.version.cuda is None:
        raise RuntimeError("fake CUDA tensors need the CUDA build of torch: run `make test-fake-cuda`")
    try:
        ctypes.CDLL(None).pretend_devices(_DEVICES)
    except AttributeError:
        raise RuntimeError("the library of shim.cpp is not preloaded: run `make test-fake-cuda`") from None
    answers = dict(
        is_available=True, is_initialized=True, _is_in_bad_fork=False, _lazy_init=None, synchronize=None, set_device=None,
        device_count=device_count, current_device=0, max_memory_allocated=0, max_memory_reserved=0, is_bf16_supported=True,
        get_device_properties=H100, get_device_name=H100.name, get_device_capability=(H100.major, H100.minor),
    )  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, _answer=answer, **options: _answer)
    torch.cuda.Event, torch.cuda.Stream = _Event, _Stream
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: _Stream()
    torch.cuda.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda state, device=None: None
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    Tensor.record_stream = lambda self, stream: None
    Tensor.pin_memory = lambda self, device=None: _pin(self.clone())
    torch.tensor = functools.partial(_tensor, torch.tensor)
    Tensor.is_pinned = lambda self, device=None: self.untyped_storage()._cdata in _pinned
    torch.nn.functional.scaled_dot_product_attention = _attention
    FakeTensorMode.avoid_device_init = property(lambda self: True)


def _pin(tensor: Tensor) -> Tensor:
    """Marks the memory of a CPU tensor as page-locked."""
    storage = tensor.untyped_storage()
    _pinned.add(storage._cdata)
    weakref.finalize(storage, _pinned.discard, storage._cdata)
    return tensor


def _tensor(real, data, *, pin_memory: bool = False, **options) -> Tensor:
    """`torch.tensor`, which asks the driver for page-locked memory."""
    return _pin(real(data, **options)) if pin_memory else real(data, **options)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """`F.scaled_dot_product_attention` as torch 2.13 with cuDNN 9.20 chooses on Hopper: cuDNN's kernel, with or without a mask.
    Torch's own choice asks the driver."""
    bias = None
    if attn_mask is not None:
        bias = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, bias, True, dropout_p, is_causal, False)[0]


class _Event:
    """Records nothing."""

    def __init__(self, *args, **options): ...
    def record(self, stream=None): ...
    def wait(self, stream=None): ...
    def synchronize(self): ...
    def query(self):
        return True

    def elapsed_time(self, end):
        return 0.0


class _Stream:
    """The only stream."""

    device, device_index, device_type, stream_id, cuda_stream = torch.device("cuda", 0), 0, 1, 0, 0

    def __init__(self, *args, **options): ...
    def wait_stream(self, stream): ...
    def wait_event(self, event): ...
    def synchronize(self): ...
    def record_event(self, event=None):
        return _Event()
