"""fp8 changes the products of wide matrices and nothing else; on CPUs, which have no such products, by torchao's emulation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from pretrain import train
from pretrain.config import (
    BatchConfig,
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    OptimizerConfig,
    ParallelConfig,
    load,
    validate,
)
from pretrain.engines import fp8
from pretrain.engines.base import Engine
from pretrain.engines.start import start_engine
from pretrain.engines.update_check import UpdateCheck, require_equal_replicas
from pretrain.generate import generate
from pretrain.interop.convert import export_model
from pretrain.interop.load import open_run
from pretrain.model.config import ModelConfig, MoeConfig, resolve_model
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer
from pretrain.run.preflight import precision_findings
from tests.distributed.test_engines import (
    check_dtypes,
    engine_of,
    load_with,
    look_at_dtypes,
    make_model,
    poisoned,
    save_with,
    train_with,
)
from tests.ranks import run_ranks
from tests.test_step import LR, assemble, differences, make_optimizer, pieces_of, plain_run, prepare, window_of
from tests.test_train import TINY, curve, final_bytes

pytestmark = pytest.mark.timeout(600)
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is an extra")

ENGINES = {
    "ddp": EngineConfig(name="ddp", precision="fp8"),
    "fsdp2": EngineConfig(name="fsdp2", precision="fp8"),
    "fsdp2 step": EngineConfig(name="fsdp2", precision="fp8", reduce_gradients="step"),
    "fsdp2 hybrid": EngineConfig(name="fsdp2", precision="fp8", replicas=2),
    "ddp selective": EngineConfig(name="ddp", precision="fp8", activation_checkpointing="selective"),
    "fsdp2 full": EngineConfig(name="fsdp2", precision="fp8", activation_checkpointing="full"),
}
TWO = {name: ENGINES[name] for name in ("ddp", "fsdp2")}
IN_FP8 = {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
"""k_proj and v_proj of the test model have 16 rows: too narrow."""


def emulated(function: Callable, *args: Any) -> Any:
    """`function(*args)` where the device is accepted, and 32 rows and columns are enough."""
    fp8.require_hardware, fp8.NARROWEST = lambda: None, 32
    return function(*args)


# ---------------------------------------------------------------- what runs in fp8


def converted(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}


@needs_torchao
def test_wide_matrices_of_blocks_run_in_fp8_and_head_experts_and_narrow_ones_do_not():
    shape = ModelConfig(hidden_size=1536, num_hidden_layers=1, num_attention_heads=12, num_key_value_heads=2)
    experts = MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=1536, num_shared_experts=1)
    for moe, expected in ((None, IN_FP8), (experts, {"self_attn.q_proj", "self_attn.o_proj"} | SHARED)):
        with torch.device("meta"):
            model = Transformer(resolve_model(replace(shape, moe=moe), vocab_size=1600, sequence_length=16))
        names = [name for name, _ in model.named_parameters()]
        fp8.convert(model, gather_fp8=False, emulate=True)
        assert converted(model) == {f"model.layers.0.{name}" for name in expected}
        assert [name for name, _ in model.named_parameters()] == names


SHARED = {f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("rows", "columns", "wide"), [(1536, 1536, True), (1535, 4096, False), (4096, 1528, False), (2056, 2048, False)]
)
def test_narrow_matrices_and_those_that_the_kernels_refuse_stay_in_bf16(rows, columns, wide):
    assert fp8.is_wide(rows, columns) is wide


# ---------------------------------------------------------------- training


@needs_torchao
@pytest.mark.slow
def test_training_follows_fp32_by_less_than_a_bit_of_fp8_and_all_engines_agree(subtests):
    """The same rounding everywhere: activations per micro-batch, weights by the scale of the full matrix on any ranks."""
    bf16 = {"bf16": EngineConfig(precision="bf16")}
    results, expected = run_ranks(2, emulated, train_with, ENGINES | bf16, 2, "sgd", []), plain_run("sgd")
    of_ddp, of_bf16 = results[0]["ddp"][1][None][0], results[0]["bf16"][1][None][0]
    for name in ENGINES:
        with subtests.test(name):
            runs = [rank[name][1] for rank in results]
            loss, norm, weight = differences(runs, expected)
            print(f"{name}: loss {loss:.1e}, norm {norm:.1e}, weights {weight:.1e}")
            assert loss < 5e-3 and norm < 5e-2 and weight < 3e-3
            assert all(losses != others for (losses, _), (others, _) in zip(runs[0][None][0], of_bf16, strict=True))
            for (losses, norm), (first_losses, first_norm) in zip(runs[0][None][0], of_ddp, strict=True):
                assert [*losses, norm] == pytest.approx([*first_losses, first_norm], rel=2e-2)
    for name, same in (("ddp selective", "ddp"), ("fsdp2 full", "fsdp2")):
        assert results[0][name][1][None][0] == results[0][same][1][None][0], name  # recomputed to the bit


@needs_torchao
def test_the_documented_dtypes_are_used_and_gradients_are_summed_in_fp32(subtests):
    check_dtypes(subtests, run_ranks(2, emulated, look_at_dtypes, TWO)[0], "fp8")


@needs_torchao
@pytest.mark.slow
def test_a_step_that_is_not_finite_leaves_weights_and_moments_untouched(subtests):
    for results in run_ranks(2, emulated, poisoned, TWO):
        for name, (first, second, third) in results.items():
            with subtests.test(name):
                assert (first[0] == second[0]).all() and (second[0] != third[0]).any()
                assert second[3]["skipped_steps"] == 1 and third[3]["skipped_in_a_row"] == 0


def scales_of(config: EngineConfig) -> list[tuple[float, float]]:
    """Smallest and largest product of a stored scale and its largest weight: at the start, after a step, after a restore."""
    engine = start_engine(config)
    prepare(engine, "adamw")
    found = []

    def look() -> None:
        products = []
        for _, module in engine.model.named_modules():
            if type(module).__name__ == "Float8Linear":
                largest = module.weight.full_tensor().abs().max()
                products.append(float(module.weight._local_tensor._precomputed_scale * largest))
        found.append((min(products), max(products)))

    look()
    train.train_step(engine, window_of(engine, 0, 2), 0.1)  # a rate that moves the largest weights by much
    look()
    engine.restore(lambda shard: shard.values.mul_(3) if shard.name.startswith("model/") else None)
    look()
    return found


@needs_torchao
def test_stored_scales_follow_the_weights_through_steps_and_restores():
    for found in run_ranks(2, emulated, scales_of, ENGINES["fsdp2"]):
        assert len(found) == 3
        for pair in found:
            assert pair == pytest.approx((448, 448), rel=1e-6)  # the largest weight becomes the largest number of e4m3


def muon_and_services(configs: dict[str, EngineConfig]) -> dict[str, tuple]:
    """For each engine: three steps of Muon, an update check, a comparison of replicas, a text by the model in training."""
    return {name: _muon_and_services(engine_of(config)) for name, config in configs.items()}


def _muon_and_services(engine: Engine) -> tuple:
    muon = OptimizerConfig(name="muon", lr=LR)
    engine.prepare(make_model, lambda model: build_optimizer(model, muon), 1.0, seed=0)
    results = []
    for step in range(3):
        check = UpdateCheck(engine)
        result = train.train_step(engine, window_of(engine, step, 2), LR)
        results.append(float(engine.all_reduce(result.loss_sum / result.tokens)))
    figures, warnings = check.figures(LR)
    require_equal_replicas(engine)
    engine.model.eval()
    with engine.autocast():
        return results, figures, warnings, list(generate(engine.model, [1, 2, 3], 5, temperature=0))


@needs_torchao
@pytest.mark.slow
def test_muon_update_check_and_generation_work_as_under_bf16(subtests):
    configs = {name: ENGINES[name] for name in ("ddp", "fsdp2", "fsdp2 hybrid")}
    in_fp8 = run_ranks(2, emulated, muon_and_services, configs)
    in_bf16 = run_ranks(2, muon_and_services, {name: replace(each, precision="bf16") for name, each in configs.items()})
    for name in configs:
        with subtests.test(name):
            assert in_fp8[0][name] == in_fp8[1][name]
            (losses, figures, warnings, text), (expected, others, *_) = in_fp8[0][name], in_bf16[0][name]
            assert losses == pytest.approx(expected, rel=5e-3) and losses != expected
            assert figures["stuck_parameters"] == figures["diverged_ranks"] == 0 and warnings == [] and len(text) == 5
            assert figures["update_fraction"] == pytest.approx(others["update_fraction"], rel=0.05)


# ---------------------------------------------------------------- checkpoints


def layouts(configs: dict[str, EngineConfig]) -> dict[str, list[tuple]]:
    """For each engine and precision: name, shape, offset, length and dtype of each piece that this rank would save."""
    found = {}
    for name, config in configs.items():
        engine = engine_of(config)
        prepare(engine, "adamw")
        found[name] = [(name, shape, at, len(values), str(values.dtype)) for name, shape, at, values in pieces_of(engine)]
    return found


@needs_torchao
@pytest.mark.slow
def test_checkpoints_are_those_of_bf16_and_continue_to_the_bit(subtests, tmp_path):
    written = run_ranks(2, emulated, save_with, TWO, tmp_path)
    readers = TWO | {"fsdp2 fp32": EngineConfig(name="fsdp2", precision="fp32")}
    saved = {name: list(TWO) for name in readers}
    read = run_ranks(2, emulated, load_with, readers, tmp_path, saved)
    for name, other in read[0]:
        with subtests.test(f"{other} -> {name}"):
            truth = assemble([piece for rank in written for piece in rank[other][0]])
            found = assemble([piece for rank in read for piece in rank[name, other][0]])
            assert truth.keys() == found.keys() and all(torch.equal(found[key], truth[key]) for key in truth)
            if name == other:
                assert read[0][name, other][2] == written[0][other][1]  # to the bit
    plain = {f"{name} bf16": replace(config, precision="bf16") for name, config in TWO.items()}
    for found in run_ranks(2, emulated, layouts, TWO | plain):
        assert all(found[name] == found[f"{name} bf16"] for name in TWO)


WIDE = ["--model.hidden_size", "64", "--model.vocab_size", "256", "--run.directory"]


def train_and_resume(folder: str, config_file: str) -> list[int]:
    """Exit statuses of a run, of its first half, and of the rest of that, which resumes; rank 0 then exports it."""
    flags = ["--config", config_file, *WIDE, folder, "--checkpoint.every_steps", "3"]
    statuses = []
    for name, steps in (("straight", 6), ("halves", 3), ("halves", 6)):
        allow = ["--checkpoint.allow_changes", "[train.max_steps]"]
        config = load([*flags, "--run.name", name, "--train.max_steps", str(steps), *allow], world_size=2)
        engine = EngineConfig(name="fsdp2", precision="fp8", compile="none")
        statuses.append(train.train(replace(config, engine=engine)))
    return statuses


@needs_torchao
@pytest.mark.slow
def test_a_run_resumes_validates_and_exports_as_under_bf16(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY.replace("name: wsd", "name: constant"))
    assert run_ranks(2, emulated, train_and_resume, str(tmp_path), str(tmp_path / "tiny.yaml")) == 2 * [[0, 0, 0]]
    straight, halves = curve(tmp_path / "straight"), curve(tmp_path / "halves")
    assert final_bytes(tmp_path / "straight") == final_bytes(tmp_path / "halves")
    assert [record for record in straight if "loss" in record] == [record for record in halves if "loss" in record]
    assert "val_loss" in straight[-1] and straight[-1] == halves[-1]
    export_model(open_run(tmp_path / "halves"), tmp_path / "exported")  # raises if transformers does not compute the same
    assert (tmp_path / "exported" / "model.safetensors").exists()


# ---------------------------------------------------------------- compilation


def compiled_losses(configs: dict[str, EngineConfig]) -> dict:
    results = {}
    for name, config in configs.items():
        torch.compiler.reset()
        engine = engine_of(config)
        engine.prepare(make_model, lambda model: make_optimizer(model, "adamw"), 1.0, seed=0)
        steps = [train.train_step(engine, window_of(engine, step, 2), LR) for step in range(2)]
        results[name] = [float(engine.all_reduce(step.loss_sum / step.tokens)) for step in steps]
    breaks = torch._dynamo.utils.counters["graph_break"]
    return results | {"breaks": sum(breaks.values())}


@needs_torchao
@pytest.mark.slow
def test_blocks_compile_without_a_graph_break():
    plain = run_ranks(2, emulated, compiled_losses, TWO)[0]
    compiled = {name: replace(config, compile="blocks") for name, config in TWO.items()}
    results = run_ranks(2, emulated, compiled_losses, compiled, timeout=500)[0]
    assert results.pop("breaks") == 0
    for name, losses in results.items():
        assert losses == pytest.approx(plain[name], rel=2e-3), name


# ---------------------------------------------------------------- refusals


def refusal() -> str:
    with pytest.raises(ConfigError) as error:
        fp8.require_hardware()
    assert error.value.status == 2 and [problem.key for problem in error.value.problems] == ["engine.precision"]
    return str(error.value)


def test_a_device_without_fp8_products_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in refusal()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "A100" in refusal() and "8.0" in refusal()
    for capability in ((8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        fp8.require_hardware()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "torchao" in refusal()


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_deepspeed_engines_refuse_fp8(name):
    config = replace(Config(), engine=EngineConfig(name=name, precision="fp8"))
    assert "engine.precision" in [problem.key for problem in validate(config, 2)]


def test_the_tokens_of_a_rank_must_be_a_multiple_of_16_not_those_of_the_sequences_that_it_shares():
    def names(sequence: int) -> list[str]:
        engine = EngineConfig(precision="fp8", parallel=ParallelConfig(sequence=sequence))
        config = replace(Config(), engine=engine, data=DataConfig(sequence_length=48), batch=BatchConfig(micro_batch_size=1))
        model = ModelConfig(hidden_size=2048, num_attention_heads=16)
        return [each.name for each in precision_findings(config, resolve_model(model, vocab_size=64, sequence_length=48))]

    assert (names(1), names(2)) == ([], ["fp8-tokens"])


def test_an_engine_refuses_fp8_on_a_cpu_before_anything_starts():
    with pytest.raises(ConfigError):
        start_engine(EngineConfig(precision="fp8"))
    assert not torch.distributed.is_initialized()
