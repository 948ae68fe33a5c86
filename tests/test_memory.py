"""A job that runs out of memory says where, ends with a status that nothing restarts, and gives advice that works."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from pretrain.config import BatchConfig, EngineConfig, ParallelConfig, load
from pretrain.plan.tracker import Tracker
from pretrain.run import memory
from pretrain.run.directory import read_state
from tests.models import train_here
from tests.ranks import run_ranks
from tests.test_train import records

ROOT = Path(__file__).parents[1]
SETTINGS = """
run: {name: tiny}
model: {hidden_size: 128, num_hidden_layers: 8, num_attention_heads: 2, vocab_size: 64}
data: {synthetic: {kind: markov}, sequence_length: 256}
batch: {global_batch_size: 8, micro_batch_size: 2}
train: {max_steps: 2}
evaluate: {max_batches: 1}
log: {every_steps: 1, sinks: [console, jsonl]}
"""


class Budget(Tracker):
    """An allocator with `limit` bytes for all tensors that operators make: the test's device. Remembers the peak."""

    def __init__(self, limit: float):
        super().__init__(torch.device("cpu"))
        self.limit, self.peak = limit, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.peak = max(self.peak, self.now)
        if self.now > self.limit:
            raise torch.OutOfMemoryError(f"the test's device is out of memory: {self.now} bytes, {self.limit:.0f} allowed")
        return out


def train_within(limits: list[float], argv: list[str]) -> tuple[int, int]:
    """(exit status, peak in bytes) of a run on a device with so many bytes: `limits` has one number for each rank.

    Without the mask certificate, whose probe is larger than this model."""
    certify = mock.patch("pretrain.run.mask_certificate.certify", lambda *_: "not checked")
    with certify, Budget(limits[int(os.environ.get("RANK", 0))]) as budget:
        return train_here(argv), budget.peak


def advised(reason: str) -> list[list[str]]:
    """The flags of each line of advice in a message."""
    return [line.split("    ")[0].split() for line in reason.splitlines() if line.startswith("  --")]


@pytest.fixture
def settings(tmp_path) -> list[str]:
    (tmp_path / "tiny.yaml").write_text(SETTINGS)
    return ["--config", str(tmp_path / "tiny.yaml"), "--run.directory", str(tmp_path), "--engine.precision", "fp32"]


BASES = {
    "alone": (1, ["--model.num_hidden_layers", "2"]),
    "ddp": (2, []),
    "fsdp2 that reduces once a step": (2, ["--engine.name", "fsdp2", "--engine.reduce_gradients", "step"]),
}
EXPECTED = {
    "alone": {"batch.micro_batch_size", "engine.activation_checkpointing", "data.sequence_length"},
    "ddp": {
        "batch.micro_batch_size", "engine.name", "engine.activation_checkpointing", "engine.parallel.sequence",
        "data.sequence_length",
    },
    "fsdp2 that reduces once a step": {
        "batch.micro_batch_size", "engine.reduce_gradients", "engine.activation_checkpointing", "engine.parallel.sequence",
        "data.sequence_length",
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "base", [pytest.param(name, marks=pytest.mark.release) if name.startswith("fsdp2") else name for name in BASES]
)
def test_each_advised_flag_makes_the_run_fit(settings, tmp_path, subtests, base):
    ranks, flags = BASES[base]
    argv, free = [*settings, *flags], [float("inf")] * 2
    peaks = [peak for status, peak in run_ranks(ranks, train_within, free, [*argv, "--run.name", "free"]) if status == 0]
    limits = [0.99 * min(peaks)] * 2
    assert {status for status, _ in run_ranks(ranks, train_within, limits, argv)} == {2}
    state = read_state(tmp_path / "tiny")
    assert state["exit_status"] == 2 and state["status"] == "stopped" and " on rank 0 (cpu, " in state["reason"]
    lines = advised(state["reason"])
    assert {line[0].removeprefix("--") for line in lines} == EXPECTED[base]
    for number, flags in enumerate(lines):
        with subtests.test(" ".join(flags)):
            results = run_ranks(ranks, train_within, limits, [*argv, "--run.name", f"try{number}", *flags])
            print(flags, results, limits)
            assert {status for status, _ in results} == {0}
    shown = [record["loss"] for record in records(tmp_path / "free") if "loss" in record]
    smaller = [record["loss"] for record in records(tmp_path / "try0") if "loss" in record]
    assert smaller == pytest.approx(shown, rel=1e-6)  # `the same result`


@pytest.mark.slow
def test_a_rank_that_alone_runs_out_is_named_and_the_others_end_with_its_reason(settings, tmp_path):
    """Rank 1 fails after a step; rank 0 sees a lost peer, which a supervisor would restart."""
    script = (
        "import os, sys; from tests.test_memory import train_within\n"
        "sys.exit(train_within([float('inf'), 60e6], sys.argv[1:])[0])"
    )
    (tmp_path / "script.py").write_text(script)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(tmp_path / "script.py"),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command, *settings], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 1
    state = read_state(tmp_path / "tiny")
    assert state["exit_status"] == 2 and "on rank 1" in state["reason"], state
    assert advised(state["reason"]) and re.search(r"out of memory in step \d+ on rank 1", done.stderr)
    assert (tmp_path / "tiny" / "out_of_memory" / "rank_1.txt").read_text().strip() == state["reason"]
    free = [*settings, "--engine.activation_checkpointing", "full"]
    assert train_here(free) == 0 and not list((tmp_path / "tiny" / "out_of_memory").glob("*"))


def test_the_cpu_allocators_refusal_is_out_of_memory(settings, tmp_path):
    """A real one: the address space of a process of its own is limited once it has started to train."""
    script = (
        "import resource, sys; from pretrain import train; from tests.models import train_here\n"
        "def step(*args):\n"
        "    pages = int(open('/proc/self/statm').read().split()[0])\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (64 << 20), -1))\n"
        "    args[0].model.keep = __import__('torch').empty(1 << 28)\n"
        "train.train_step = step\n"
        "sys.exit(train_here(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *settings], cwd=ROOT, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "out of memory in step 1 on rank 0" in done.stderr and "Traceback" not in done.stderr
    assert read_state(tmp_path / "tiny")["exit_status"] == 2


def test_other_errors_are_not_out_of_memory():
    assert memory.is_out_of_memory(MemoryError()) and memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert memory.is_out_of_memory(error.value)
    for other in (None, RuntimeError("shapes differ"), OSError(12, "Cannot allocate memory"), KeyboardInterrupt()):
        assert not memory.is_out_of_memory(other)


# ---------------------------------------------------------------- advice for settings that a CPU cannot run


def flags_for(engine: EngineConfig, ranks: int, micro_batch: int = 4, heads: int = 8) -> list[str]:
    flags = ["--train.max_steps", "1", "--data.synthetic.kind", "uniform", "--model.vocab_size", "64"]
    config = load([*flags, "--model.num_attention_heads", str(heads), "--model.hidden_size", "512"], world_size=None)
    batch = BatchConfig(global_batch_size=32, micro_batch_size=micro_batch)
    config = dataclasses.replace(config, engine=engine, batch=batch)
    return [flags for flags, _ in memory.advice(config, ranks, "cuda")]


def test_advice_is_only_what_the_settings_leave_open():
    rest = "--data.sequence_length 512 --run.name run_512"
    cuts = ["--engine.parallel.sequence 2", "--engine.parallel.tensor 2"]
    one = EngineConfig(compile="none")
    recompute = [f"--engine.activation_checkpointing {how}" for how in ("selective", "full")]
    assert flags_for(one, 1) == ["--engine.compile blocks", "--batch.micro_batch_size 2", *recompute, rest]
    exhausted = EngineConfig(name="fsdp2", compile="blocks", activation_checkpointing="full")
    assert flags_for(exhausted, 8, micro_batch=1) == [*cuts, rest]
    assert flags_for(exhausted, 8, micro_batch=1, heads=1) == [rest]
    hybrid = dataclasses.replace(exhausted, replicas=2, reduce_gradients="step")
    expected = ["--engine.reduce_gradients micro_batch", "--engine.replicas 1", *cuts, rest]
    assert flags_for(hybrid, 8, micro_batch=1) == expected
    buckets = EngineConfig(name="zero2", compile="blocks", bucket_mib=100, activation_checkpointing="full")
    expected = ["--engine.name fsdp2 --engine.bucket_mib null", cuts[0], "--engine.offload optimizer", rest]
    assert flags_for(buckets, 8, micro_batch=1) == expected
    offloading = EngineConfig(name="zero3", compile="blocks", offload="optimizer", activation_checkpointing="selective")
    expected = [cuts[0], "--engine.activation_checkpointing full", "--engine.offload all", rest]
    assert flags_for(offloading, 8, micro_batch=1) == expected


def test_ways_to_cut_are_advised_so_that_they_work_together():
    config = load(["--train.max_steps", "1", "--data.synthetic.kind", "uniform", "--model.vocab_size", "64",
                   "--model.moe.num_experts", "6", "--batch.micro_batch_size", "1", "--batch.global_batch_size", "6"],
                  world_size=6)  # fmt: skip
    cuts = [flags for flags, _ in memory.advice(config, 6, "cpu") if ".parallel." in flags]
    assert cuts == ["--engine.parallel.expert 2", "--engine.parallel.sequence 2"]  # 8 heads: no third of them, nor a sixth


def test_a_smaller_micro_batch_divides_the_share_of_a_rank():
    config = EngineConfig(name="fsdp2", compile="blocks", activation_checkpointing="full")
    assert flags_for(config, 2, micro_batch=16)[0] == "--batch.micro_batch_size 8"
    assert flags_for(config, 8, micro_batch=4)[0] == "--batch.micro_batch_size 2"
    shared = EngineConfig(activation_checkpointing="full", compile="blocks", parallel=ParallelConfig(sequence=4))
    assert flags_for(shared, 4, micro_batch=32)[0] == "--batch.micro_batch_size 16"  # four ranks have the same samples
