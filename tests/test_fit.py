"""A run that cannot fit is refused before it starts, with flags with which it does; one that may not is warned of."""

from __future__ import annotations

import re
from pathlib import Path
from unittest import mock

import pytest

from pretrain import devices, dry_run
from pretrain.config import Config, load, validate
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.plan.memory import needed_gib
from pretrain.plan.scaling import Cluster
from pretrain.run import fit
from pretrain.run.directory import read_state
from tests.ranks import run_ranks
from tests.test_memory import train_within

ROOT = Path(__file__).parents[1]
LLAMA = ("--config", str(ROOT / "configs/models/llama3_1_8b.yaml"))
ZERO1 = ("--engine.name", "zero1", "--engine.bucket_mib", "100")


def plan(name: str, flags: tuple[str, ...]) -> tuple[Config, ModelConfig]:
    config = load(["--config", str(ROOT / f"configs/{name}.yaml"), *flags], world_size=None)
    ids = config.model.vocab_size or 32000
    return config, resolve_model(config.model, vocab_size=ids, sequence_length=config.data.sequence_length)


def advised(text: str) -> list[tuple[str, ...]]:
    """The flags of each way that a finding proposes."""
    return [tuple(way.split()) for way in re.findall(r"(--[^()]*) \([\d.]+ GiB\)", text.partition("these fit: ")[2])]


CASES = {
    "other engine": ("cloud", 8, 16.0, (), True),
    "smaller batch or recomputation": ("cloud", 8, 40.0, (), False),
    "one GPU": ("cloud", 1, 24.0, (), False),
    "offload": ("cloud_zero3", 8, 40.0, (), False),
    "buckets": ("cloud", 8, 6.0, ZERO1, True),
    "8B, ddp": ("cloud", 8, 79.2, LLAMA, True),
    "8B, fsdp2": ("cloud", 8, 79.2, (*LLAMA, "--engine.name", "fsdp2"), False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_way_that_is_proposed_is_valid_and_fits_by_the_plan(case):
    name, ranks, gib, flags, stops = case
    config, model = plan(name, flags)
    (finding,) = fit.memory_findings(config, model, ranks, gib, "H100")
    assert finding.name == "does-not-fit" and finding.stops == stops
    ways = advised(finding.text)
    assert ways, finding.text
    for way in ways:
        changed, model = plan(name, (*flags, *way))
        assert not validate(changed, ranks) and needed_gib(fit.planned_memory(changed, model, ranks).peak) <= gib
        assert fit.memory_findings(changed, model, ranks, gib, "H100") == []


def test_where_no_setting_helps_the_number_of_ranks_that_does_is_named():
    config, model = plan("cloud", (*LLAMA, "--data.sequence_length", "128"))
    (finding,) = fit.memory_findings(config, model, 1, 79.2, "H100")
    ranks, flags = re.search(r"by the plan, (\d+) ranks do with (.*)$", finding.text).groups()
    changed, model = plan("cloud", (*LLAMA, "--data.sequence_length", "128", *flags.split()))
    assert int(ranks) == 2 and fit.memory_findings(changed, model, 2, 79.2, "H100") == []


def test_what_fits_or_runs_on_a_cpu_has_no_finding():
    config, model = plan("cloud", ())
    assert fit.memory_findings(config, model, 8, 79.2, "H100") == fit.memory_findings(config, model, 8, None, "cpu") == []


@pytest.mark.release
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["smaller batch or recomputation", "one GPU"])
def test_dry_runs_of_every_proposed_way_fit(name, subtests):
    name, ranks, gib, flags, _ = CASES[name]
    config, model = plan(name, flags)
    (finding,) = fit.memory_findings(config, model, ranks, gib, "H100")
    for way in advised(finding.text):
        with subtests.test(" ".join(way)):
            run = dry_run.dry_run(*plan(name, (*flags, *way)), Cluster(devices.find("h100"), ranks))
            assert run.needed_gib <= 1.1 * gib


SETTINGS = """
run: {name: tiny}
model: {hidden_size: 256, num_hidden_layers: 4, num_attention_heads: 2, vocab_size: 2048}
data: {synthetic: {kind: uniform}, sequence_length: 32}
batch: {global_batch_size: 2, micro_batch_size: 1}
engine: {precision: fp32}
train: {max_steps: 1}
evaluate: {max_batches: 1}
log: {every_steps: 1, sinks: [console, jsonl]}
"""


def train_on_device(size: float, argv: list[str]) -> int:
    """Exit status of a run on a device with so many bytes, all of them for tensors."""
    nothing_else = mock.patch("pretrain.plan.memory.OUTSIDE_GIB", 0.0)
    with nothing_else, mock.patch.object(fit, "device_gib", lambda engine: size / 2**30):
        return train_within([size, size], argv)[0]


@pytest.mark.slow
def test_two_real_ranks_are_refused_before_the_first_step_and_following_the_advice_trains(tmp_path):
    (tmp_path / "tiny.yaml").write_text(SETTINGS)
    argv = ["--config", str(tmp_path / "tiny.yaml"), "--run.directory", str(tmp_path)]
    assert run_ranks(2, train_on_device, 60e6, argv) == [2, 2]
    state = read_state(tmp_path / "tiny")
    assert state["exit_status"] == 2 and "out of memory" not in state["reason"] and not list(tmp_path.glob("tiny/metrics*"))
    (way, *_) = advised(state["reason"])
    assert "fsdp2" in way
    assert run_ranks(2, train_on_device, 60e6, [*argv, *way]) == [0, 0]
