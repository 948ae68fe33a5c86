"""A run compares what it takes with its plan, says so, and keeps the ratios."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from pretrain import devices
from pretrain.config import OptimizerConfig, RunConfig
from pretrain.plan.memory import memory
from pretrain.report.units import human_dollars, human_seconds
from pretrain.run import output, reality
from pretrain.run.ledger import Forecast
from pretrain.run.progress import Progress
from tests.models import train_here
from tests.ranks import run_ranks
from tests.test_plan_memory import ODD, ODD_MOE
from tests.test_train import records
from tools import plan_run

SETTINGS = """
run: {name: tiny}
model: {hidden_size: 72, num_hidden_layers: 2, num_attention_heads: 6, num_key_value_heads: 2, head_dim: 14, vocab_size: 301}
data: {synthetic: {kind: uniform}, sequence_length: 32}
batch: {global_batch_size: 12, micro_batch_size: 2}
train: {max_steps: 3}
evaluate: {every_steps: 0, max_batches: 1}
log: {every_steps: 1, sinks: [console, jsonl]}
"""


def train(folder, ranks: int, *flags: str) -> dict:
    """Trains on real ranks. -> the record of the comparison."""
    (folder / "tiny.yaml").write_text(SETTINGS)
    argv = ["--config", str(folder / "tiny.yaml"), "--run.directory", str(folder), *flags]
    statuses = [train_here(argv)] if ranks == 1 else run_ranks(ranks, train_here, argv)
    assert set(statuses) == {0}
    (record,) = [each for each in records(folder / "tiny") if "planned_state_gib" in each]
    return record


def test_the_state_of_a_run_is_as_planned_to_the_byte_and_kept_with_its_settings(tmp_path, capfd):
    record = train(tmp_path, 1, "--engine.precision", "fp32")
    assert record["step"] == reality.SETTLED and record["plan_ratio_state"] == 1
    assert record["measured_state_gib"] == record["planned_state_gib"] > 0
    assert "plan       state 0.0" in capfd.readouterr().out
    kept = json.loads((tmp_path / "tiny" / "plan.json").read_text())
    assert kept["planned_state_gib"] == record["planned_state_gib"] and kept["step"] == record["step"]
    assert kept["settings"]["batch"]["micro_batch_size"] == 2 and kept["settings"]["engine"]["name"] == "ddp"
    assert "measured_tokens_per_second" not in kept and "measured_peak_memory_gib" not in kept  # this is a CPU


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "fsdp2", "ddp"])
def test_three_ranks_of_every_engine_have_the_state_that_was_planned(tmp_path, name):
    assert train(tmp_path, 3, "--engine.name", name, "--engine.precision", "bf16")["plan_ratio_state"] == 1


def test_the_invoice_compares_what_was_paid_with_what_plan_run_says(tmp_path, monkeypatch, capfd):
    h100 = devices.find("h100")
    monkeypatch.setattr(devices, "find", lambda name: h100)
    flags = ["--run.dollars_per_hour", "36", "--run.budget_dollars", "1000", "--engine.compile", "none"]
    flags += ["--engine.precision", "bf16", "--evaluate.max_batches", "2"]
    (tmp_path / "tiny.yaml").write_text(SETTINGS)
    plan_run.main(
        ["--config", str(tmp_path / "tiny.yaml"), *flags, "--gpus", "1", "--quick", "--json", str(tmp_path / "plan.json")]
    )
    plan = json.loads((tmp_path / "plan.json").read_text())["configuration"]
    capfd.readouterr()
    train(tmp_path, 1, *flags)
    planned = json.loads((tmp_path / "tiny" / "ledger.json").read_text())["planned"]
    assert planned == {"step": 0, "dollars": pytest.approx(plan["dollars"]), "hours": pytest.approx(plan["hours"]["total"])}
    said = f"{human_dollars(plan['dollars'])} in {human_seconds(3600 * plan['hours']['total'])}"
    assert f"plan       {said}, by the settings and the data sheet\n" in capfd.readouterr().out
    assert f"planned    {said} (by the settings, before the start); paid so far: " in (
        (tmp_path / "tiny" / "invoice.txt").read_text()
    )
    run = SimpleNamespace(ledger=SimpleNamespace(planned=None, is_kept=True), progress=Progress(started=0.0))
    run.config = SimpleNamespace(run=RunConfig(dollars_per_hour=36.0, budget_dollars=planned["dollars"] / 4))
    monkeypatch.setattr(reality, "planned", lambda run: Forecast(**planned))
    (line,) = output._cost_lines(run)
    assert line.endswith(f"; run.budget_dollars ({human_dollars(planned['dollars'] / 4)}) ends it after about 25% of that")


def run_on_h100(model, **engine) -> SimpleNamespace:
    """A run of 8 H100s, as far as the comparison looks at it."""
    from pretrain.config import BatchConfig, EngineConfig
    from pretrain.model.config import resolve_model

    shape = resolve_model(model, vocab_size=301, sequence_length=2048)
    settings = SimpleNamespace(
        engine=EngineConfig(name="fsdp2"), batch=BatchConfig(global_batch_size=64, micro_batch_size=4),
        data=SimpleNamespace(sequence_length=2048, document_mask=False), optimizer=OptimizerConfig(),
    )  # fmt: skip
    facts = {"device": torch.device("cuda", 0), "device_name": "NVIDIA H100 80GB HBM3", "world_size": 8, "rank": 0}
    facts |= {"precision": "bf16", "compiled": "blocks", "place": SimpleNamespace(local_world_size=8), **engine}
    peak = memory(shape, 2048, 4, settings.engine, 8).peak / 2**30
    meter = SimpleNamespace(figures={"memory": {"peak_memory_gib": peak * 1.2}})
    return SimpleNamespace(model=shape, engine=SimpleNamespace(**facts), stage=SimpleNamespace(config=settings), meter=meter,
                           config=settings)  # fmt: skip


def test_on_a_gpu_peak_and_speed_are_compared_and_what_the_plan_does_not_know_is_named(monkeypatch):
    monkeypatch.setattr(reality, "state_bytes", lambda engine: 1)
    found = {each.name: each for each in reality.compare(run_on_h100(ODD), tokens_per_second=1000.0)}
    assert found["peak_memory_gib"].ratio == pytest.approx(1.2) and "(x 1.20)" in str(found["peak_memory_gib"])
    assert found["tokens_per_second"].planned > 1000
    eager = run_on_h100(dataclasses.replace(ODD_MOE), compiled="none")
    said = reality._why(eager, list(found.values()))
    assert "blocks are not compiled" in said and "routers are not even" in said and "fp8" not in said
    as_planned = [each._replace(measured=each.planned) for each in found.values()]
    assert reality._why(eager, as_planned) == ""
