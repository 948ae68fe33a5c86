"""A backend of torch.compile that runs a compiled graph on fake tensors as a fusing compiler would: with AOTAutograd's min-cut
partition of what is saved for the backward pass, and without memory for what stays inside a fused kernel.

Inductor is not called. A pointwise operation or reduction gets memory only if a product, an attention kernel or another
operation that cannot be fused reads it, or if the graph returns it; what a fused kernel reads is what it was made from.
Inductor may fuse less, so the bytes moved by these operations are a lower bound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from pretrain.plan.tracker import Tracker

_FUSED = {
    "convert_element_type", "_to_copy", "clone", "copy", "cat", "iota", "full", "full_like", "arange", "scalar_tensor",
    "zeros", "zeros_like", "ones", "ones_like", "empty", "lift_fresh_copy", "where", "constant_pad_nd", "gather", "index",
    "embedding", "index_select", "sum", "amax", "amin", "mean", "max", "min", "any", "all", "argmax", "prod", "flip", "repeat",
    "bucketize", "fma", "slice_scatter", "select_scatter",
}  # fmt: skip
_INDEXING = {"gather", "index", "embedding", "index_select"}
_LINE = re.compile(r'File "[^"]*/(pretrain/[^"]+)", line (\d+)')


def backend(tracker: Tracker) -> Callable:
    """A value for `backend` of torch.compile; what its graphs do is counted by `tracker`."""

    def compile_graph(graph: fx.GraphModule, inputs: list) -> Callable:
        return _Graph(graph, tracker)

    return aot_autograd(
        fw_compiler=compile_graph,
        bw_compiler=compile_graph,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )


class _Graph:
    """A compiled graph. Calling it with a list of arguments empties the list and returns the outputs."""

    def __init__(self, module: fx.GraphModule, tracker: Tracker):
        self.module, self.tracker, self.nodes = module, tracker, list(module.graph.nodes)
        self.fused = {node for node in self.nodes if _is_fused(node)}
        self.views = {node for node in self.nodes if _is_view(node)}
        self.held = {node for node in self.nodes if node not in self.views and (node not in self.fused or _escapes(node, self))}
        self.sources: dict[fx.Node, dict[fx.Node, int]] = {}
        last_use: dict[fx.Node, int] = {}
        for number, node in enumerate(self.nodes):
            self.sources[node] = self._sources(node)
            for read in node.all_input_nodes:
                for source in (*self.sources[read], *([read] if read in self.held else [])):
                    last_use[source] = number
                last_use[read] = number
        self.dead: list[list[fx.Node]] = [[] for _ in self.nodes]
        for node, number in last_use.items():
            self.dead[number].append(node)
        self.lines = {node: _line(node) for node in self.nodes}
        self._boxed_call = True  # AOTAutograd then hands over the only references, so that memory is freed after its last use

    def _sources(self, node: fx.Node) -> dict[fx.Node, int]:
        """The tensors in memory that `node` is made from, through views and what is fused -> bytes read of each."""
        if node not in self.views and node not in self.fused:
            return {}
        found: dict[fx.Node, int] = {}
        for read in node.all_input_nodes:
            of_read = {read: _size(read)} if read in self.held else self.sources[read]
            for source, size in of_read.items():
                found[source] = max(found.get(source, 0), size)
        name = _name(node)
        if node in self.views or name in _INDEXING:
            found = {source: min(size, _size(node)) for source, size in found.items()}
        return found

    def __call__(self, arguments: list) -> Any:
        values = dict(zip((node for node in self.nodes if node.op == "placeholder"), arguments, strict=True))
        arguments.clear()
        for number, node in enumerate(self.nodes):
            self.tracker.compiled_where = self.lines[node]
            if node.op == "output":
                out = fx.map_arg(node.args[0], lambda read: values[read])
            elif node.op != "placeholder":
                self._run(node, values)
            for dead in self.dead[number]:
                values.pop(dead, None)
        self.tracker.compiled_where = ""
        return out

    def _run(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        if node.op == "get_attr":
            values[node] = getattr(self.module, node.target)
        elif node in self.fused and node in self.held:
            shape, stride = _shape(node.meta["val"])
            tensor = torch.empty_strided(shape, stride, dtype=node.meta["val"].dtype, device=self.tracker.device)
            self.tracker.add_work("other", 0, _size(node) + sum(self.sources[node].values()))
            values[node] = tensor
        elif node in self.held or (node in self.views and all(read in values for read in node.all_input_nodes)):
            args, kwargs = (fx.map_arg(each, lambda read: values[read]) for each in (node.args, node.kwargs))
            values[node] = node.target(*args, **kwargs)


def _name(node: fx.Node) -> str:
    return node.target._schema.name.partition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else ""


def _is_fused(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or _is_view(node):
        return False
    single = isinstance(node.meta.get("val"), Tensor)
    return single and (torch.Tag.pointwise in node.target.tags or _name(node) in _FUSED)


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _escapes(node: fx.Node, graph: _Graph) -> bool:
    """Whether what a fused operation computes is read, perhaps through views, by anything that is not fused."""
    return any(_escapes(user, graph) if user in graph.views else user not in graph.fused for user in node.users)


def _size(node: fx.Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    values = math.prod(size for size, stride in zip(*_shape(value), strict=True) if stride or size == 0)
    return values * value.element_size()


def _shape(tensor: Tensor) -> tuple[list[int], list[int]]:
    """(shape, strides). In a graph for any number of rows they are symbols; a dry run has no other sizes than their hints."""

    def number(size: int | torch.SymInt) -> int:
        return size.node.hint if isinstance(size, torch.SymInt) else size

    return [number(size) for size in tensor.shape], [number(step) for step in tensor.stride()]


def _line(node: fx.Node) -> str:
    lines = _LINE.findall(node.meta.get("stack_trace") or "")
    return f"{lines[-1][0]}:{lines[-1][1]}" if lines else "compiled code"
