"""Compilation and activation checkpointing of a model's blocks, applied before an engine distributes the model: what to
compile, whether the compiler works, and where its results are kept."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pretrain.config import EngineConfig

WHOLE_MODEL_PARAMETERS = 1_000_000_000
"""Largest model that is compiled as a whole by default. One graph fuses across blocks, but takes longer to compile with each
block, and what it gains shrinks as products of matrices dominate."""


def choose(config: EngineConfig, device: str, ranks: int, parameters: int) -> tuple[str, str]:
    """Returns (none, blocks or model; the reason) for a model of `parameters` on `ranks` devices of type cuda or cpu."""
    if config.compile:
        return config.compile, "as engine.compile says"
    if device != "cuda":
        return "none", "the default without a GPU, where compiling takes longer than it saves in a short run"
    if config.name != "ddp" or ranks > 1:
        return "blocks", f"the default on GPUs for {config.name}{'' if ranks == 1 else ' on several'}"
    if parameters > WHOLE_MODEL_PARAMETERS:
        return "blocks", f"the default on a GPU above {WHOLE_MODEL_PARAMETERS:,} parameters"
    return "model", f"the default on one GPU up to {WHOLE_MODEL_PARAMETERS:,} parameters"


def compiler_problem(device: torch.device) -> str | None:
    """Compiles and runs one addition on the device. Returns why that failed, on one line; None: the compiler works."""
    try:
        torch.compile(_add_one, fullgraph=True, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # a missing compiler, header or library, a full disk: each has an exception of its own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"
    finally:
        torch._dynamo.utils.counters.clear()  # `compile_report` is of the model
    return None


def _add_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def keep_cache(folder: Path) -> None:
    """Makes the compiler keep its results below `folder`, for all later runs there, unless TORCHINDUCTOR_CACHE_DIR is set.

    Each kind of machine has a folder of its own, because the compiled host code uses all instructions of its CPU. The compiler
    replaces files atomically, so ranks and machines may share a folder. Where the file system has no locks, which the compiler
    needs, its own default stays: a folder in /tmp of each machine.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    with contextlib.suppress(OSError):
        mine = folder.resolve() / _machine()
        mine.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(mine / "lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(mine)


def _machine() -> str:
    """A name for machines that can run each other's compiled code, such as torch2.13.0-1a2b3c4d5e6f."""
    kind = f"{platform.python_version()} {platform.machine()} {torch.version.git_version} {torch.version.cuda}"
    with contextlib.suppress(OSError):
        kind += "".join(re.findall(r"^(?:flags|Features)\s*:.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[:1])
    return f"torch{torch.__version__.split('+')[0]}-{hashlib.blake2b(kind.encode(), digest_size=6).hexdigest()}"


def compile_model(model: nn.Module, what: str, backend: str | Callable = "inductor", sent: bool = False) -> None:
    """Compiles each block and the loss of a chunk (`blocks`), or the entire `model`, in place, so that parameter names stay.

    Only a block's `forward` is compiled: the hooks by which an engine gathers weights run around it and break no graph.
    sent: ranks send tokens to each other's experts, as many as the host reads in each layer. A block's experts then run
    uncompiled, between two graphs, except what is not a product or a message, in one graph for any number of rows.
    """
    if sent:
        for experts in (block.mlp.experts for block in model.model.layers):
            experts.gated = torch.compile(experts.gated, fullgraph=True, dynamic=True, backend=backend)
            experts.forward = torch.compiler.disable(experts.forward)
    if what == "model":
        model.compile(dynamic=False, backend=backend)
        return
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, fullgraph=not sent, dynamic=False, backend=backend)
    model.lm_head.chunk_step = torch.compile(model.lm_head.chunk_step, fullgraph=True, dynamic=False, backend=backend)


def checkpoint_activations(model: nn.Module, what: str) -> None:
    """Makes each block keep fewer activations for its backward pass and recompute the rest: `full` or `selective`.

    Source: Chen et al. 2016; selective recomputation: Korthikanti et al. 2022.
    """
    options = {"context_fn": _keep_products} if what == "selective" else {}
    for block in model.model.layers:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **options)


def _keep_products():
    """Keeps the outputs of matrix products and attention: most of the time, but only a part of the memory."""
    aten, ours = torch.ops.aten, torch.ops.pretrain
    kept = {
        aten._grouped_mm.default,
        ours.looped_product.default,
        ours.router_logits.default,
        ours.masked_attention.default,
        torch.ops.higher_order.flex_attention,
        aten.topk.default,  # a recomputed choice of experts could differ
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten._scaled_mm.default,
        aten.max.default,  # of fp8: the scales, cheap to keep and a full pass over a tensor to recompute
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    }

    def policy(context, operation, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def graphs() -> int:
    """The number of graphs compiled in this process so far, recompilations included."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compile_report() -> str:
    """The number of graphs and graph breaks in this process so far, as text."""
    count, breaks = graphs(), sum(torch._dynamo.utils.counters["graph_break"].values())
    return f"{count} graph{'' if count == 1 else 's'}, {breaks} graph break{'' if breaks == 1 else 's'}"
