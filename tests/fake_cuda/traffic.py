"""Bytes that a compiled function moves through memory: Inductor's schedule of its kernels, on fake tensors; none is built.

It counts each buffer of a kernel once; one that reads a buffer twice may move more, so this is a lower bound.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

from torch import Tensor
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import _recursive_post_grad_passes
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch._inductor.virtualized import V


def fused_bytes(function: Callable, *inputs: Tensor) -> int:
    """Bytes of all fused kernels of `function(*inputs)`, forward only; matrix products and other library calls are left out.
    Call it inside a FakeTensorMode."""
    traced = []

    def keep(graph_module, example_inputs):
        traced.append((graph_module, example_inputs))
        return graph_module

    traced_function = aot_function(
        function,
        fw_compiler=keep,
        bw_compiler=keep,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    with mock.patch("torch.compiler.is_compiling", return_value=True):  # as torch.compile traces it
        traced_function(*inputs)
    graph_module, example_inputs = traced[0]
    with V.set_fake_mode(detect_fake_mode(inputs)), V.set_debug_handler(DebugContext()):
        _recursive_post_grad_passes(graph_module, is_inference=False)
        graph = GraphLowering(graph_module, example_inputs=example_inputs, shape_env=None)
        with V.set_graph_handler(graph):
            graph.run(*example_inputs)
            graph.init_wrapper_code()
            graph._update_scheduler()
            nodes = [node for node in graph.scheduler.nodes if not isinstance(node, ExternKernelSchedulerNode)]
            return sum(node.get_read_write_buffers_sizes() for node in nodes)
