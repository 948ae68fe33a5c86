"""The update check is silent in a healthy run under every engine, and warns if a step does not train all weights."""

from __future__ import annotations

from pathlib import Path

import torch

from pretrain import train
from pretrain.config import EngineConfig
from pretrain.engines.base import Engine
from pretrain.engines.update_check import Diverged, UpdateCheck, require_equal_replicas
from pretrain.model.transformer import Transformer
from pretrain.run.directory import read_state
from tests.distributed.test_engines import ENGINES, engine_of
from tests.models import train_here
from tests.ranks import run_ranks
from tests.test_step import CLIP, LR, MODEL, make_optimizer, prepare, window_of

CONFIGS = ENGINES | {
    "zero1 bf16": EngineConfig(name="zero1", precision="bf16"),
    "fsdp2 hybrid": EngineConfig(name="fsdp2", replicas=2),
}
HAVE_REPLICAS = ("ddp", "zero1", "zero2", "zero3", "zero1 bf16", "fsdp2 hybrid")


def watched_step(engine: Engine, step: int, lr: float) -> tuple[dict, list[str]]:
    update_check = UpdateCheck(engine)
    train.train_step(engine, window_of(engine, step, 2), lr)
    return update_check.figures(lr)


def check_steps(configs: dict[str, EngineConfig]) -> dict:
    """For each engine: a healthy step, a step with learning rate 0, and a check after a replica on the last rank drifted."""
    results = {}
    for name, config in configs.items():
        engine = engine_of(config)
        prepare(engine, "adamw")
        healthy, still = watched_step(engine, 0, LR), watched_step(engine, 1, 0.0)
        require_equal_replicas(engine)
        replicated = [tensor for tensors, _ in engine.replicated_weights() for tensor in tensors]
        if engine.rank == engine.world_size - 1 and replicated:
            with torch.no_grad():
                replicated[-1].view(-1)[0] += 0.01
        update_check = UpdateCheck(engine)
        results[name] = healthy, still, update_check.figures(LR), status_of_a_save(engine)
    return results


def status_of_a_save(engine: Engine) -> int:
    try:
        require_equal_replicas(engine)
    except Diverged as error:
        return error.status
    return 0


def test_every_engine_reports_a_zero_rate_and_a_drifted_replica_but_not_a_healthy_step(subtests):
    for results in run_ranks(2, check_steps, CONFIGS, timeout=300):
        for name, ((figures, warnings), (still, still_warnings), (drifted, drift_warnings), status) in results.items():
            with subtests.test(name):
                assert not warnings and figures["stuck_parameters"] == figures["diverged_ranks"] == 0
                assert 1e-4 < figures["update_fraction"] < 0.1  # AdamW's first step: each weight moves by about the rate
                assert still["update_fraction"] == 0 and len(still_warnings) == 1
                if name in HAVE_REPLICAS:
                    assert drifted["diverged_ranks"] == 1 and "rank 1" in drift_warnings[-1] and status == 70
                else:
                    assert drifted["diverged_ranks"] == status == 0


def forgetful(config: EngineConfig) -> tuple[dict, list[str]]:
    def optimizer_of_most(model):
        model.model.norm.requires_grad_(False)  # so the optimizer does not get this parameter
        optimizer = make_optimizer(model, "adamw")
        model.model.norm.requires_grad_(True)
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter is not model.model.norm.weight]
        return optimizer

    engine = engine_of(config)
    engine.prepare(lambda: Transformer(MODEL), optimizer_of_most, CLIP, seed=0)
    return watched_step(engine, 0, LR)


def test_a_parameter_that_is_missing_from_the_optimizer_is_named():
    for figures, warnings in run_ranks(2, forgetful, EngineConfig()):
        assert figures["stuck_parameters"] == 1 and "model.norm.weight" in warnings[0]


def test_a_rate_that_is_too_small_for_fp32_gives_no_warning():
    [(figures, warnings)] = run_ranks(1, tiny_rate)
    assert figures["stuck_parameters"] == 0 and not warnings


def tiny_rate() -> tuple[dict, list[str]]:
    engine = engine_of(EngineConfig())
    prepare(engine, "adamw")
    return watched_step(engine, 0, 1e-9)


def train_with_a_drift(argv: list[str]) -> int:
    """Trains; after step 5, a weight of rank 1 changes."""
    take_step = train._take_step

    def drifting(run, *rest):
        result = take_step(run, *rest)
        if run.progress.step == 5 and run.engine.rank == 1:
            with torch.no_grad():
                next(run.engine.model.parameters()).view(-1)[0] += 0.01
        return result

    train._take_step = drifting
    return train_here(argv)


def test_a_run_whose_replicas_diverged_never_ends_with_0_and_saves_nothing_since(tiny):
    """Not even if it saves only at its end."""
    for every, saved in (("4", 4), ("0", None)):
        settings = ["--checkpoint.every_steps", every, "--run.name", f"every{every}", *tiny]
        assert run_ranks(2, train_with_a_drift, settings) == [70, 70]
        state = read_state(Path(tiny[-1]) / f"every{every}")
        assert (state["exit_status"], state["saved_step"]) == (70, saved) and "rank 1" in state["reason"]


def test_the_check_waits_for_the_device_once_for_all_parameters(monkeypatch):
    """On the meta device, where a read of a tensor raises."""
    engine = engine_of(EngineConfig())
    prepare(engine, "adamw")
    engine.device = torch.device("meta")
    engine.model.to("meta")
    update_check, make, reads = UpdateCheck(engine), torch.tensor, []

    def make_on_the_host(*args, device="cpu", **options):
        assert device == "cpu", "copies from pageable memory, and waits"
        return make(*args, **options)

    monkeypatch.setattr(torch, "tensor", make_on_the_host)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda values: reads.append(values) or torch.ones(values.shape))
    figures, _ = update_check.figures(LR)
    assert len(reads) == 1 and figures["update_fraction"] == 1
