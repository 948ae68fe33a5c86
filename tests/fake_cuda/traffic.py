"""What Inductor makes of a function for a GPU, on fake tensors; no kernel is built: the bytes that it moves through memory, and
the kernels that it generates.

Each buffer of a kernel counts once; one that reads a buffer twice may move more, so the bytes are a lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import _recursive_post_grad_passes
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.triton_compat import GPUTarget, triton
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule

from tests.fake_cuda import fake_gpu


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
    with _lowered(*traced[0]) as graph:
        graph.init_wrapper_code()
        graph._update_scheduler()
        nodes = [node for node in graph.scheduler.nodes if not isinstance(node, ExternKernelSchedulerNode)]
        return sum(node.get_read_write_buffers_sizes() for node in nodes)


def generated(function: Callable, *inputs: Tensor) -> list[str]:
    """The programs, with their kernels, that Inductor generates for the forward and the backward pass of `function(*inputs)`.
    Call it inside a FakeTensorMode."""
    traced = []

    def keep(graph_module, example_inputs):
        traced.append((graph_module, example_inputs))
        return make_boxed_func(graph_module)

    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=keep,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*inputs).sum().backward()
    programs = []
    with mock.patch.object(triton.runtime.driver, "_active", _Driver()):
        for each in traced:
            with _lowered(*each) as graph:
                programs.append(graph.codegen()[0].value)
    return programs


class _Driver:
    """What Triton asks of the card that it generates code for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * fake_gpu.H100.major + fake_gpu.H100.minor, fake_gpu.H100.warp_size)


@contextmanager
def _lowered(graph_module: GraphModule, example_inputs: list[Tensor]) -> Iterator[GraphLowering]:
    with unset_fake_temporarily(), V.set_fake_mode(detect_fake_mode(example_inputs)), V.set_debug_handler(DebugContext()):
        _recursive_post_grad_passes(graph_module, is_inference=False)
        graph = GraphLowering(graph_module, example_inputs=example_inputs, shape_env=None)
        with V.set_graph_handler(graph):
            graph.run(*example_inputs)
            yield graph
