"""Matrix products in fp8 (`engine.precision: fp8`): torchao takes over the wide matrices of the blocks; everything else runs as
under bf16. It knows torchao and which layers gain from it; it knows nothing of ranks.

Both factors of a product are divided by their largest absolute value and rounded to 8 bits: activations and weights to e4m3,
gradients to e5m2 (Micikevicius et al. 2022). The scales are those of the tensors at hand, one per tensor (torchao's
"tensorwise" recipe). Sums are in fp32 and results in bf16. Master weights, moments, names and checkpoints are those of bf16.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from pretrain.config import ConfigError, Problem
from pretrain.target import kind

NARROWEST = 1536
"""Matrices with fewer rows or columns stay in bf16: rounding both factors then costs more than the product gains."""
MULTIPLE = 16
"""Of rows and columns of both factors; the kernels refuse others. In the gradient of a weight, tokens are the columns."""


def require_hardware() -> None:
    """Raises ConfigError if this process cannot compute products in fp8."""
    problem = ""
    if importlib.util.find_spec("torchao") is None:
        problem = "needs torchao; install it (pip install -c constraints.txt -e '.[fp8]')"
    elif lacking := _lacking():
        problem = f"needs a GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell), and {lacking}; choose such a GPU"
    if problem:
        raise ConfigError([Problem("engine.precision", f"is fp8, which {problem}, or use bf16")])


def _lacking() -> str:
    """Why the device has no products in fp8; empty: it has, or a dry run plans for another device, and judges that one."""
    if kind(torch.device("cpu")) != "cpu":
        return ""
    if not torch.cuda.is_available():
        return "there is no GPU here"
    name = torch.cuda.get_device_name()
    if torch.version.hip:
        architecture = torch.cuda.get_device_properties().gcnArchName
        return "" if architecture.startswith(("gfx94", "gfx95", "gfx12")) else f"{name} is {architecture}"
    capability = torch.cuda.get_device_capability()
    return "" if capability >= (8, 9) else f"{name} has {capability[0]}.{capability[1]}"


def is_wide(rows: int, columns: int) -> bool:
    """Whether the products of such a matrix gain from fp8."""
    return min(rows, columns) >= NARROWEST and rows % MULTIPLE == columns % MULTIPLE == 0


def convert(model: nn.Module, *, gather_fp8: bool, emulate: bool) -> None:
    """Makes the wide linear layers of the blocks compute in fp8, in place; parameters and their names stay.

    gather_fp8: FSDP2 will gather these weights in fp8 (see `store_scales`). emulate: round to fp8, but multiply in the
    original precision: for CPUs, which have no such products, and far slower than bf16.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # an optional package, slow to import

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and is_wide(module.out_features, module.in_features)

    config = Float8LinearConfig(enable_fsdp_float8_all_gather=gather_fp8, emulate=emulate)
    convert_to_float8_training(model.model.layers, module_filter_fn=chosen, config=config)


def store_scales(model: nn.Module) -> None:
    """Computes the scales of all weights that FSDP2 gathers in fp8, in one collective instead of one per weight. To be called
    whenever weights have changed: stored scales that are too large would cut the largest weights off."""
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    precompute_float8_dynamic_scale_for_fsdp(model)


def plain(local: Tensor) -> Tensor:
    """The memory of a shard; that of a weight which is gathered in fp8 is inside torchao's wrapper."""
    return getattr(local, "_tensor", local)
