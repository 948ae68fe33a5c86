"""Compilation and activation checkpointing of a model's blocks, applied before an engine distributes the model. Knows nothing
of ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def compile_model(model: nn.Module, what: str, backend: str | Callable = "inductor") -> None:
    """Compiles each block and the loss of a chunk (`blocks`), or the entire `model`, in place, so that parameter names stay.

    Only a block's `forward` is compiled: the hooks by which an engine gathers weights run around it and break no graph.
    """
    if what == "model":
        model.compile(dynamic=False, backend=backend)
        return
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)
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


def compile_report() -> str:
    """The number of graphs and graph breaks in this process so far, as text."""
    counters = torch._dynamo.utils.counters
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    return f"{graphs} graph{'' if graphs == 1 else 's'}, {breaks} graph break{'' if breaks == 1 else 's'}"
