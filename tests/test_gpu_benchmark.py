"""`make gpu` is rehearsed on a CPU: its parts run, and one that fails or is late does not stop the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from benchmarks import gpu
from benchmarks.shapes import SHAPES
from pretrain.config import load
from pretrain.model.config import resolve_model

ROOT = Path(__file__).resolve().parents[1]
REHEARSED = ["card", "rates", "G1-none", "G1-documents", "G3-blocks", "G1-muon", "generation", "profile", "predictions"]


@pytest.mark.release
def test_a_rehearsal_runs_every_kind_of_part_and_writes_json_a_table_and_a_trace(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--rehearse", "--parts", *REHEARSED, "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    report = json.loads(output.read_text())
    assert {part["part"]: part["status"] for part in report["parts"]} == dict.fromkeys(REHEARSED, "done"), done.stdout
    assert done.returncode == 0 and report["rehearsal"]
    results = {part["part"]: part["result"] for part in report["parts"]}
    for name in ("G1-none", "G1-documents", "G3-blocks", "G1-muon"):
        assert results[name]["tokens_per_second"] > 0 and results[name]["last_loss"] < results[name]["first_loss"]
    assert len(results["generation"]["ms"]) == 8 and len(results["profile"]["operators"]) == 10
    assert set(results["predictions"]) == {"G1-none", "G3-blocks"} and min(results["predictions"].values()) > 0
    assert (tmp_path / "gpu_trace.json.gz").stat().st_size > 1000
    table = output.with_suffix(".md").read_text()
    assert all(f"| {name} |" in table for name in REHEARSED)


def run_part(tmp_path: Path, name: str, limit: float) -> dict:
    options = SimpleNamespace(output=tmp_path / "gpu.json", rehearse=True)
    return gpu.run_part(name, limit, options, tmp_path)


def test_a_part_that_fails_is_recorded_with_its_last_lines(tmp_path):
    row = run_part(tmp_path, "unknown", 60)
    assert row["status"] == "failed" and "invalid choice" in row["error"]


def test_a_part_that_takes_too_long_is_ended_and_recorded(tmp_path):
    row = run_part(tmp_path, "rates", 0.2)
    assert row["status"] == "late" and 0.2 <= row["seconds"] < 60


def test_the_parts_all_have_a_place_in_the_order_and_leave_time_for_each_other():
    limits = [limit for limit, _ in gpu.parts(False).values()]
    assert set(gpu.parts(False)) == {
        *gpu.cases(False),
        "card",
        "rates",
        "tests",
        "predictions",
        "generation",
        "profile",
        "seam",
        "checkpoint",
    }
    assert max(limits) <= 60 * gpu.MINUTES / 4


@pytest.mark.parametrize("name", gpu.cases(False))
def test_the_settings_that_the_dry_run_gets_are_the_case_that_is_measured(name, tmp_path):
    case = gpu.cases(False)[name]
    settings = gpu._settings(SimpleNamespace(shape=SHAPES.__getitem__), **case)
    (tmp_path / "case.yaml").write_text(yaml.safe_dump(settings))
    config, shape = load(["--config", str(tmp_path / "case.yaml")], world_size=1), SHAPES[case["shape"]]
    found = resolve_model(config.model, vocab_size=shape.model.vocab_size, sequence_length=shape.sequence_length)
    assert found == shape.model and config.batch.micro_batch_size == shape.micro_batch_size
    assert config.engine.compile == case["compile"] and config.engine.precision == case.get("precision", "bf16")
    assert config.optimizer.name == case.get("optimizer", "adamw") and config.data.document_mask == case.get("documents", False)


def test_without_a_gpu_it_names_the_rehearsal(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(gpu.NoGpu, match="--rehearse"):
        gpu.main(["--output", str(tmp_path / "gpu.json")])
