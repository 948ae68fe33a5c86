"""What only a GPU can show: its kernels agree with plain fp32 on the CPU, nothing waits, runs resume, saves are consistent.

Every test has a variant for the CPU, so that its code runs everywhere; `make gpu` runs those with the mark `gpu` on a card.
Bounds for bf16 are for its rounding (2^-8 per product), not for the last bits of some kernel.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from pretrain import train
from pretrain.checkpoint import storage
from pretrain.checkpoint.manifest import Checkpoint
from pretrain.checkpoint.saver import Saver
from pretrain.config import CheckpointConfig, EngineConfig, OptimizerConfig
from pretrain.data.batches import Batch
from pretrain.engines.start import start_engine
from pretrain.model.attention import attend, attention_context
from pretrain.model.config import ModelConfig, MoeConfig, resolve_model
from pretrain.model.moe import grouped_product
from pretrain.model.transformer import Transformer, build
from pretrain.optim.optimizer import build_optimizer
from pretrain.report.metrics import Meter
from pretrain.run.directory import read_state
from tests.models import train_here
from tests.ranks import run_ranks

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
ROWS, LENGTH, VOCABULARY = 4, 128, 512
DENSE = ModelConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, qk_norm=True)
MODELS = {
    "dense": DENSE,
    "window": replace(DENSE, sliding_window=48),
    "moe": replace(DENSE, moe=MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)),
}


def model_of(name: str) -> ModelConfig:
    return resolve_model(MODELS[name], vocab_size=VOCABULARY, sequence_length=LENGTH)


def batch_on(device: str, seed: int = 0, documents: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    text_BT = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    labels_BT = torch.where(torch.rand(ROWS, LENGTH, generator=generator) < 0.1, -100, text_BT[:, 1:])
    documents_BT = (torch.rand(ROWS, LENGTH, generator=generator) < 0.03).cumsum(1) if documents else None
    return Batch(*(None if x is None else x.to(device) for x in (text_BT[:, :-1].contiguous(), labels_BT, documents_BT)))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference / norm of what is expected."""
    expected = expected.double().cpu()
    return ((found.detach().double().cpu() - expected).norm() / expected.norm()).item()


@pytest.fixture
def engine(device):
    engine = start_engine(EngineConfig(precision="fp32", compile="none"))
    if engine.device.type != device:
        pytest.skip("engines run on the GPU of this machine")
    return engine


def prepare(engine, name: str = "dense") -> None:
    engine.prepare(
        lambda: Transformer(model_of(name)), lambda model: build_optimizer(model, OptimizerConfig(lr=1e-3)), 1.0, seed=0
    )


def take_steps(engine, first: int, last: int) -> list[float]:
    return [train.train_step(engine, [batch_on(str(engine.device), step)], 1e-3).loss_sum.item() for step in range(first, last)]


# ---------------------------------------------------------------- kernels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.06)], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "documents"), [("dense", False), ("dense", True), ("window", False), ("moe", False)])
def test_loss_and_gradients_equal_those_of_plain_fp32_on_the_cpu(device, dtype, bound, name, documents):
    if name == "moe" and dtype == torch.bfloat16:
        bound = 0.2  # rounding sends some tokens to other experts
    results = {}
    for where, precision in (("cpu", torch.float32), (device, dtype)):
        model, batch = build(model_of(name), where, seed=0), batch_on(where, documents=documents)
        with torch.autocast(torch.device(where).type, torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = model(*batch.inputs).loss_sum
        loss.backward()
        results[where, precision] = loss.item(), torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
    (expected, gradient), (loss, found) = results["cpu", torch.float32], results[device, dtype]
    assert abs(loss / expected - 1) < bound / 10
    assert difference(found, gradient) < bound


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [1024, 2048])
@pytest.mark.parametrize("key_heads", [1, 4])
@pytest.mark.parametrize("kind", ["causal", "documents", "window"])
def test_attention_and_its_gradients_equal_the_formula(device, length, key_heads, kind):
    if device == "cpu":
        length //= 16
    heads, size, dtype = 4, 64, torch.bfloat16 if device == "cuda" else torch.float32
    config = ModelConfig(hidden_size=256, num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=size)
    window = length // 4 if kind == "window" else None
    config = resolve_model(replace(config, sliding_window=window), vocab_size=64, sequence_length=length)
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        return torch.randn(2, length, count, size, generator=generator).to(dtype)

    documents_BT = (torch.rand(2, length, generator=generator) < 4 / length).cumsum(1) if kind == "documents" else None
    inputs, upstream = [draw(heads), draw(key_heads), draw(key_heads)], draw(heads)

    distance_TS = torch.arange(length)[:, None] - torch.arange(length)
    visible_BTS = ((distance_TS >= 0) & (distance_TS < (window or length)))[None].expand(2, -1, -1)
    if documents_BT is not None:
        visible_BTS = visible_BTS & (documents_BT[:, :, None] == documents_BT[:, None])
    query, key, value = expected_inputs = [x.double().requires_grad_() for x in inputs]
    key, value = (x.repeat_interleave(heads // key_heads, 2) for x in (key, value))
    scores_BHTS = torch.einsum("bthc,bshc->bhts", query, key) / size**0.5
    weights_BHTS = scores_BHTS.masked_fill(~visible_BTS[:, None], -torch.inf).softmax(-1)
    expected = torch.einsum("bhts,bshc->bthc", weights_BHTS, value)
    expected.backward(upstream.double())

    found_inputs = [x.to(device).requires_grad_() for x in inputs]
    documents_BT = None if documents_BT is None else documents_BT.to(device)
    context = attention_context(config, length, torch.device(device), documents_BT)
    found = attend(*found_inputs, context)
    found.backward(upstream.to(device))
    bound = 1e-5 if dtype == torch.float32 else 0.02
    assert difference(found, expected) < bound
    for mine, theirs in zip(found_inputs, expected_inputs, strict=True):
        assert difference(mine.grad, theirs.grad) < bound


@pytest.mark.parametrize("device", DEVICES)
def test_the_product_per_expert_equals_one_product_for_each_even_where_an_expert_has_no_token(device):
    ends, dtype = [40, 40, 41, 128], torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    rows_PD = torch.randn(128, 64, generator=generator).to(device, dtype).requires_grad_()
    weight_EFD = torch.randn(4, 32, 64, generator=generator).to(device, dtype).requires_grad_()
    out_PF = grouped_product(rows_PD, weight_EFD, torch.tensor(ends, dtype=torch.int32, device=device))
    out_PF.float().square().sum().backward()
    rows, weight = (x.detach().double().cpu().requires_grad_() for x in (rows_PD, weight_EFD))
    parts = [rows[start:end] @ weight[e].T for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    torch.cat(parts).square().sum().backward()
    bound = 1e-5 if dtype == torch.float32 else 0.02
    assert difference(out_PF, torch.cat(parts).detach()) < bound
    assert difference(rows_PD.grad, rows.grad) < bound and difference(weight_EFD.grad, weight.grad) < bound


# ---------------------------------------------------------------- steps, resuming, saving


@contextlib.contextmanager
def no_waiting(device: str):
    """An error for every wait of the host for the device. On the CPU there is none."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_the_host_does_not_wait_for_the_device_within_a_step(device, engine, name):
    prepare(engine, name)
    meter = Meter(engine.device, 0, 1)
    window = [batch_on(device, number) for number in range(2)]
    for step in range(3):
        with no_waiting(device) if step == 2 else contextlib.nullcontext():
            engine.attach([0, 0], meter.last_loss)
            meter.add(*train.train_step(engine, window, 1e-3))
        assert engine.attached_sums()[:2] == [0, 0]
    assert meter.read(engine.all_reduce)["loss"] < 7


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_resumed_twice_takes_the_same_steps(device, engine, record_property):
    prepare(engine)
    take_steps(engine, 0, 2)
    kept = {shard.name: shard.values.clone() for shard in engine.shards(saving=False)}
    updates, losses, weights = engine.updates, [take_steps(engine, 2, 5)], []
    for _ in range(2):
        prepare(engine)
        engine.restore(lambda shard: shard.values.copy_(kept[shard.name]))
        engine.updates = updates
        losses.append(take_steps(engine, 2, 5))
        weights.append(torch.cat([shard.values.clone() for shard in engine.shards(saving=False)]))
    largest = difference(weights[0], weights[1])
    record_property("difference between the weights of two resumed runs", largest)
    if device == "cpu":
        assert largest == 0 and losses[0] == losses[1] == losses[2]
    assert largest < 1e-4  # kernels that add in no fixed order differ by rounding
    for resumed in losses[1:]:
        assert resumed == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_background_save_holds_the_weights_of_its_step_while_training_goes_on(device, engine, tmp_path):
    prepare(engine)
    take_steps(engine, 0, 1)
    expected = {shard.name: shard.values.cpu().clone() for shard in engine.shards(saving=True)}
    with Saver(tmp_path, engine, CheckpointConfig(asynchronous=True), acknowledge=lambda saved: None) as saver:
        saver.save(1, {"val_loss": None}, last=False)
        take_steps(engine, 1, 4)
        saver.wait()
    storage.load(Checkpoint(tmp_path / "step_00000001"), engine)
    restored = {shard.name: shard.values.cpu() for shard in engine.shards(saving=True)}
    assert restored.keys() == expected.keys() and all(torch.equal(restored[name], expected[name]) for name in expected)


@pytest.mark.gpu
@NO_GPU
def test_products_of_fp8_train_like_those_of_bf16():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device has no fp8 products")
    wide = ModelConfig(hidden_size=1536, num_hidden_layers=2, num_attention_heads=12, num_key_value_heads=12)
    model, losses = resolve_model(wide, vocab_size=VOCABULARY, sequence_length=LENGTH), {}
    for precision in ("bf16", "fp8"):
        engine = start_engine(EngineConfig(precision=precision, compile="blocks"))
        engine.prepare(lambda: Transformer(model), lambda built: build_optimizer(built, OptimizerConfig()), 1.0, seed=0)
        losses[precision] = take_steps(engine, 0, 10)
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.01)


def train_in_little_memory(argv: list[str]) -> int:
    """Trains with 1 % of the card's memory, in a process of its own."""
    torch.cuda.set_per_process_memory_fraction(0.01)
    return train_here(argv)


@pytest.mark.gpu
@NO_GPU
def test_a_run_without_enough_memory_ends_with_advice_in_flags_that_make_it_fit(tmp_path):
    flags = ["--run.directory", str(tmp_path), "--model.hidden_size", "256", "--model.vocab_size", "512"]
    flags += ["--data.synthetic.kind", "uniform", "--data.sequence_length", "1024", "--train.max_steps", "2"]
    flags += ["--batch.global_batch_size", "256", "--batch.micro_batch_size", "256", "--engine.compile", "none"]
    assert run_ranks(1, train_in_little_memory, [*flags, "--run.name", "full"]) == [2]
    reason = read_state(tmp_path / "full")["reason"]
    assert "--batch.micro_batch_size" in reason and "--engine.activation_checkpointing" in reason
    fitting = [*flags, "--run.name", "fits", "--batch.micro_batch_size", "4"]
    assert run_ranks(1, train_in_little_memory, fitting) == [0]
