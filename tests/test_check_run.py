"""The proof that a user runs: green for what is right, red for anything else, refused in words."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import invariance
from pretrain.config import Config, EngineConfig
from pretrain.model.config import ModelConfig

ROOT = Path(__file__).parents[1]
RIGHT = invariance.Outcome(invariance.Case(EngineConfig(precision="fp32"), 2, 1, 8), [4.0], [1.0], 1e-7, 1e-7, 1e-8, {})


def check(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/check_run.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)


def test_a_configuration_is_proved_and_the_table_written(tmp_path):
    done = check(
        "--config", "configs/dummy.yaml", "--invariance", "--engine.precision", "fp32", "--json", str(tmp_path / "t.json")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "proved: no number depends on the split" in done.stdout
    rows = json.loads((tmp_path / "t.json").read_text())
    assert {row["case"]["ranks"] for row in rows} == {1, 2} and all(row["loss_difference"] < 1e-6 for row in rows)


def test_a_wrong_configuration_and_a_wrong_command_end_with_2():
    done = check("--config", "configs/dummy.yaml", "--invariance", "--engine.nme", "ddp")
    assert done.returncode == 2 and "engine.name" in done.stderr
    assert check("--config", "configs/dummy.yaml", "--invariance", "--processes", "0").returncode == 2


@pytest.mark.parametrize("field", ["loss_difference", "norm_difference", "weight_difference"])
@pytest.mark.parametrize("value", [2e-6, math.nan, math.inf])
def test_any_difference_and_anything_that_is_not_a_number_is_no_proof(field, value):
    assert RIGHT.proved and not dataclasses.replace(RIGHT, **{field: value}).proved


def test_cases_keep_the_engine_and_cover_ranks_splits_and_precisions():
    config = dataclasses.replace(Config(), engine=EngineConfig(name="fsdp2", replicas=2, activation_checkpointing="full"))
    found = invariance.cases(config, most_ranks=4)
    assert {case.ranks for case in found} == {2, 4} and {case.engine.precision for case in found} == {"fp32", "bf16"}
    assert all(case.engine.replicas == 2 and case.engine.activation_checkpointing == "full" for case in found)
    assert {case.accumulation for case in found if case.ranks == 2} == {8, 2}


def test_the_shrunk_model_is_of_the_same_kind():
    small = invariance.shrink(
        ModelConfig(num_attention_heads=32, num_key_value_heads=4, qk_norm=True, tie_word_embeddings=True)
    )
    assert small.num_key_value_heads < small.num_attention_heads and small.qk_norm and small.tie_word_embeddings
    assert invariance.shrink(ModelConfig(num_attention_heads=16)).num_key_value_heads == 4
