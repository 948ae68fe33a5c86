"""On a GPU the host never waits for the device within a step, and no tensor is larger than the step needs."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from pretrain import train
from pretrain.config import EngineConfig
from pretrain.data.batches import Batch
from pretrain.engines.update_check import UpdateCheck
from pretrain.evaluate import evaluate
from pretrain.model import transformer
from pretrain.model.masked import block_mask, first_visible
from pretrain.report.metrics import Meter
from tests.fake_cuda import steps
from tests.fake_cuda.watch import Watch

LINES = {  # what each planted line does to a step: (a line of train_step, what follows it, the fault)
    "a read of the norm": ("grad_norm, applied = engine.update(lr)", "float(grad_norm)", "host-read"),
    "a branch on the device's figures": ("grad_norm, applied = engine.update(lr)", "bool(applied)", "host-read"),
    "a copy of the loss": ("loss_sum += nats.detach()", "nats.detach().cpu()", "copy-to-host"),
    "a comparison of weights": ("loss_sum += nats.detach()", "torch.equal(nats, nats)", "host-read"),
    "a choice of valid tokens": ("loss_sum += nats.detach()", "batch.labels_BT[batch.labels_BT != -100]", "shape-by-value"),
    "a blocking copy": ("tokens = engine.count_tokens(window)", "torch.tensor([1.0]).to(engine.device)", "blocking-copy"),
    "a pageable copy": (
        "tokens = engine.count_tokens(window)",
        "torch.tensor([1.0]).to(engine.device, non_blocking=True)",
        "pageable-copy",
    ),
}


@pytest.fixture(scope="module")
def engine():
    return steps.start(EngineConfig(compile="none"))


@pytest.fixture
def fake():
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def watched_step(engine, window: list[Batch], step_function=train.train_step) -> Watch:
    """The second step, so that what only the first one allocates is not counted."""
    meter = Meter(engine.device, engine.rank, engine.world_size)
    with Watch():
        steps.step(engine, meter, window)
    with Watch(steps.LOGITS, steps.LENGTH) as watch:
        steps.step(engine, meter, window, step_function)
    return watch


@pytest.mark.parametrize(
    ("model", "optimizer", "documents"),
    [
        ("dense", "adamw", False),
        ("dense", "adamw", True),
        ("dense", "muon", False),
        ("moe", "adamw", False),
        ("window", "adamw", False),
    ],
)
def test_a_step_neither_waits_for_the_device_nor_stores_all_logits_or_a_square_mask(engine, fake, model, optimizer, documents):
    steps.prepare(engine, model, optimizer)
    watch = watched_step(engine, [steps.micro_batch(documents)] * 2)
    assert not watch.faults
    assert watch.operators["aten::mm"] > 20, "no step ran"


def test_the_tiles_of_flex_attention_are_found_without_waiting_and_without_a_square_mask(fake):
    documents_BT = torch.zeros(steps.BATCH, steps.LENGTH, dtype=torch.int64, device="cuda")
    with Watch(length=steps.LENGTH) as watch:
        mask = block_mask(first_visible(steps.LENGTH, documents_BT.device, documents_BT, 512))
    assert not watch.faults
    assert mask.kv_indices.shape == (steps.BATCH, 1, steps.LENGTH // 128, steps.LENGTH // 128)


def test_a_step_under_fsdp2_does_not_wait_either(monkeypatch):
    from accelerate.state import AcceleratorState

    place = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=4, LOCAL_WORLD_SIZE=4, MASTER_ADDR="localhost", MASTER_PORT=1)
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    AcceleratorState._reset_state(reset_partial_state=True)
    engine = steps.start(EngineConfig(name="fsdp2", compile="none"), ranks=4)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            steps.prepare(engine)
            watch = watched_step(engine, [steps.micro_batch()] * 2)
    finally:
        torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not watch.faults
    assert watch.operators["c10d::_reduce_scatter_base_"] > 0 and watch.operators["c10d::_allgather_base_"] > 0


@pytest.mark.parametrize("plant", LINES)
def test_each_planted_line_is_found(engine, fake, plant):
    line, follower, fault = LINES[plant]
    source = inspect.getsource(train.train_step)
    indent = next(each for each in source.splitlines() if each.strip() == line).removesuffix(line)
    space = dict(vars(train))
    exec(compile(source.replace(line, f"{line}\n{indent}{follower}"), "<planted>", "exec"), space)
    steps.prepare(engine)
    watch = watched_step(engine, [steps.micro_batch()], space["train_step"])
    assert {each.name for each in watch.faults if each.function == "train_step"} == {fault}


def test_a_tensor_on_the_wrong_device_stops_the_step(engine, fake):
    steps.prepare(engine)
    batch = steps.micro_batch()
    with pytest.raises(RuntimeError, match="device"):
        watched_step(engine, [batch._replace(labels_BT=torch.zeros(batch.labels_BT.shape, dtype=torch.int64))])


def all_logits(hidden_BTD, weight_VD, labels_BT, *args, **options):
    """A loss that stores all logits in fp32."""
    logits_NV = (hidden_BTD.flatten(0, 1) @ weight_VD.T.to(hidden_BTD.dtype)).float()
    loss_N = F.cross_entropy(logits_NV, labels_BT.flatten(), reduction="none")
    return loss_N.sum(), loss_N.detach().view_as(labels_BT).sum(1)


def square_scores(query_BTHC, key_BSKC, value_BSKC, context):
    """Attention that stores the scores of all pairs of tokens."""
    repeats = query_BTHC.shape[2] // key_BSKC.shape[2]
    key_BSHC, value_BSHC = (x.repeat_interleave(repeats, 2) for x in (key_BSKC, value_BSKC))
    scores_BHTS = torch.einsum("bthc,bshc->bhts", query_BTHC, key_BSHC)
    return torch.einsum("bhts,bshc->bthc", scores_BHTS.softmax(-1), value_BSHC)


@pytest.mark.parametrize(
    ("function", "planted", "fault"),
    [("cross_entropy_sums", all_logits, "full-logits"), ("attend", square_scores, "square-mask")],
)
def test_tensors_that_are_too_large_are_found(engine, fake, monkeypatch, function, planted, fault):
    steps.prepare(engine)
    monkeypatch.setattr(transformer, function, planted)
    assert fault in watched_step(engine, [steps.micro_batch()]).names


def a_run(engine, take) -> SimpleNamespace:
    """What the reader of a run's batches needs of it."""
    batch = SimpleNamespace(global_batch_size=8, micro_batch_size=2)
    progress = SimpleNamespace(skipped_positions=[], position=0)
    length = SimpleNamespace(stages=[SimpleNamespace(position=0, config=SimpleNamespace(batch=batch))])
    model, data = SimpleNamespace(sliding_window=None), SimpleNamespace(take=take, sources=[])
    return SimpleNamespace(engine=engine, length=length, data=data, progress=progress, model=model)


def host_batch(position: int, count: int) -> Batch:
    tokens_BT = torch.arange(count * 16).view(count, 16)
    return Batch(tokens_BT, tokens_BT + position, torch.zeros_like(tokens_BT))


def test_the_batches_of_a_run_come_from_page_locked_memory(engine, fake):
    windows = train._windows(a_run(engine, host_batch))
    with Watch() as watch:
        window, _ = next(windows)
    windows.close()
    assert not watch.faults
    assert len(window) == 4 and all(each.is_cuda and each.shape == (2, 16) for batch in window for each in batch.inputs)


def test_batches_from_pageable_memory_are_found(engine, fake, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: self)
    windows = train._windows(a_run(engine, host_batch))
    with Watch() as watch:
        next(windows)
    windows.close()
    assert watch.names == {"pageable-copy"}


def test_a_validation_waits_once_at_its_end(engine, fake):
    steps.prepare(engine)
    source = SimpleNamespace(files=[])
    data = SimpleNamespace(
        name="all", num_samples=12, bytes_per_token=4.0, source=source, take=lambda chosen: host_batch(0, len(chosen))
    )
    with Watch() as watch:
        evaluate(engine, [data], 2, requests=lambda: [0])
    assert watch.operators["aten::embedding"] == 6
    assert {each.function for each in watch.faults} <= {"evaluate"}


def test_the_update_check_waits_once(engine, fake):
    steps.prepare(engine)
    with Watch() as watch:
        UpdateCheck(engine).figures(1e-3)
    assert {each.name for each in watch.faults} == {"copy-to-host"} and watch.faults.total() == 1
