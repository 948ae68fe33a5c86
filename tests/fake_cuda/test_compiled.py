"""What Inductor makes of the step for a GPU: bytes that the loss moves, and blocks without graph breaks."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.shapes import SHAPES
from pretrain.config import EngineConfig
from pretrain.engines.base import Engine
from pretrain.model.attention import AttentionContext, attend
from pretrain.model.flops import vocabulary_rows
from pretrain.model.loss import IGNORED, chunk_step
from pretrain.model.masked import block_mask, first_visible
from tests.fake_cuda import steps
from tests.fake_cuda.traffic import fused_bytes, generated
from tests.fake_cuda.watch import Watch


@pytest.fixture(autouse=True)
def fake():
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def matrix(rows: int, columns: int, dtype=torch.bfloat16):
    return torch.empty(rows, columns, dtype=dtype, device="cuda")


@pytest.mark.parametrize(
    ("function", "bytes_per_value"),
    [
        (lambda x: torch.relu(x) * 2, 4),  # one kernel: reads 2 bytes, writes 2
        (lambda x: torch.softmax(x.float(), 1), 6),  # one kernel: reads 2 bytes, writes 4
    ],
)
def test_counted_bytes_are_those_counted_by_hand(function, bytes_per_value):
    x = matrix(1024, 1024)
    assert fused_bytes(function, x) == pytest.approx(bytes_per_value * x.numel(), rel=0.01)


@pytest.mark.parametrize("shape", ["G1", "G2"])
def test_the_compiled_loss_moves_at_most_8_bytes_per_logit_beside_its_product(shape):
    model = SHAPES[shape].model
    rows, vocabulary = 4096, vocabulary_rows(model)
    inputs = matrix(rows, model.hidden_size), matrix(vocabulary, model.hidden_size)
    labels_n = torch.zeros(rows, dtype=torch.int64, device="cuda")
    moved = fused_bytes(lambda *args: chunk_step(*args, model.vocab_size, True), *inputs, labels_n)
    assert moved <= 8 * rows * vocabulary


def scattered(hidden_nD, weight_VD, labels_n):
    """A loss that scatters the labels, which forces the fp32 softmax through memory twice."""
    logits_nV = (hidden_nD @ weight_VD.T).float()
    target_n1 = torch.where(labels_n != IGNORED, labels_n, 0)[:, None]
    gradient_nV = torch.softmax(logits_nV, 1).scatter_add(1, target_n1, torch.full_like(target_n1, -1, dtype=torch.float32))
    return F.cross_entropy(logits_nV, labels_n, reduction="sum"), gradient_nV.to(hidden_nD.dtype)


def test_a_loss_that_scatters_the_labels_is_found():
    labels_n = torch.zeros(1024, dtype=torch.int64, device="cuda")
    assert fused_bytes(scattered, matrix(1024, 768), matrix(32000, 768), labels_n) > 12 * 1024 * 32000


@pytest.mark.parametrize("window", [None, 512])
@pytest.mark.parametrize("key_heads", [6, 2])
def test_documents_become_one_kernel_per_pass_and_no_square_of_scores(key_heads, window):
    """FlexAttention, which the other tests here replace: a fake tensor has no kernel to run."""
    torch._dynamo.reset()
    length, device = steps.LENGTH, torch.device("cuda")
    documents_BT = torch.zeros(4, length, dtype=torch.int64, device=device)
    mask = block_mask(first_visible(length, device, documents_BT, window))
    context = AttentionContext(None, None, block_mask=mask)
    shapes = [(4, length, heads, 128) for heads in (6, key_heads, key_heads)]
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device=device, requires_grad=True) for shape in shapes]
    programs = generated(lambda *qkv: attend(*qkv, context), *tensors)
    kernels = [re.findall(r"def triton_tem\w*flex_attention(_backward)?", program) for program in programs]
    assert kernels == [[""], ["_backward"]]
    for program in programs:
        assert "extern_kernels." not in program and f"{length}, {length})" not in program


@pytest.mark.parametrize(("model", "documents"), [("dense", False), ("dense", True), ("moe", False), ("window", False)])
@pytest.mark.parametrize("what", ["blocks", "model"])
def test_a_compiled_step_has_no_graph_break_and_one_attention_kernel_per_block(monkeypatch, what, model, documents):
    monkeypatch.setattr(Engine, "compile_backend", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    engine = steps.start(EngineConfig(compile=what))
    steps.prepare(engine, model)
    with Watch(steps.LOGITS, steps.LENGTH) as watch:
        engine.backward(engine.forward(*steps.micro_batch(documents).inputs).loss_sum)
    assert not counters["graph_break"] and not watch.faults
    assert counters["stats"]["unique_graphs"] >= (2 if what == "blocks" else 1)
    kernels = {name: count for name, count in watch.operators.items() if "attention" in name or "flex" in name}
    assert kernels and set(kernels.values()) == {2}, kernels
