"""tools/check_run.py --invariance accepts equal results, fails on any difference, and refuses wrong settings."""

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
from pretrain.model.config import ModelConfig, MoeConfig, resolve_model, shrink
from pretrain.model.flops import num_parameters

ROOT = Path(__file__).parents[1]
RIGHT = invariance.Outcome(invariance.Case(EngineConfig(precision="fp32"), 2, 1, 8), [4.0], [1.0], 1e-7, 1e-7, 1e-8, {})


def check(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/check_run.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)


def test_a_correct_configuration_passes_and_the_table_is_written(tmp_path):
    done = check(
        "--config", "configs/dummy.yaml", "--invariance", "--engine.precision", "fp32", "--json", str(tmp_path / "t.json")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed: no number depends on the split" in done.stdout
    rows = json.loads((tmp_path / "t.json").read_text())
    assert {row["case"]["ranks"] for row in rows} == {1, 2} and all(row["loss_difference"] < 1e-6 for row in rows)


def test_a_wrong_configuration_and_a_wrong_command_end_with_2():
    done = check("--config", "configs/dummy.yaml", "--invariance", "--engine.nme", "ddp")
    assert done.returncode == 2 and "engine.name" in done.stderr
    assert check("--config", "configs/dummy.yaml", "--invariance", "--processes", "0").returncode == 2


@pytest.mark.parametrize("field", ["loss_difference", "norm_difference", "weight_difference"])
@pytest.mark.parametrize("value", [2e-6, math.nan, math.inf])
def test_any_difference_and_nan_fail(field, value):
    assert RIGHT.passed and not dataclasses.replace(RIGHT, **{field: value}).passed


def test_cases_keep_the_engine_and_cover_ranks_splits_and_precisions():
    config = dataclasses.replace(Config(), engine=EngineConfig(name="fsdp2", replicas=2, activation_checkpointing="full"))
    found = invariance.cases(config, most_ranks=4)
    assert {case.ranks for case in found} == {2, 4} and {case.engine.precision for case in found} == {"fp32", "bf16"}
    assert all(case.engine.replicas == 2 and case.engine.activation_checkpointing == "full" for case in found)
    assert {case.accumulation for case in found if case.ranks == 2} == {8, 2}


def test_the_shrunken_model_is_of_the_same_kind_and_small():
    given = ModelConfig(num_attention_heads=32, num_key_value_heads=4, qk_norm=True, tie_word_embeddings=True)
    small = shrink(given, 32)
    assert small.num_key_value_heads < small.num_attention_heads and small.qk_norm and small.tie_word_embeddings
    assert shrink(ModelConfig(num_attention_heads=16), 32).num_key_value_heads == 4
    experts = MoeConfig(num_experts=64, moe_intermediate_size=1024)
    moe = shrink(ModelConfig(hidden_size=2048, sliding_window=4096, moe=experts), 32)
    counts = num_parameters(resolve_model(moe, vocab_size=64, sequence_length=32))
    assert moe.sliding_window == 16 and counts.total < 200_000
