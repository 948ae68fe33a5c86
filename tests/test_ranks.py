"""A slow rank is named with its cause, from what each rank does alone; ranks that wait for it are not."""

from __future__ import annotations

import math
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.data.batches import Batch, TrainData
from pretrain.engines.forward_time import ForwardTimer
from pretrain.engines.start import start_engine
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.model.transformer import Block, Transformer
from pretrain.optim.optimizer import build_optimizer
from pretrain.report import ranks
from pretrain.report.ranks import WINDOW_SECONDS, WINDOWS, RankFigures, Slow, SlowRankWatch, named, spread
from pretrain.train import train_step
from tests.models import train_here
from tests.ranks import run_ranks
from tests.test_train import records

# ================================================================ judging


def figures(forward: float = 0.1, data: float = 0.0, **more: float) -> RankFigures:
    """Waits are per step."""
    more = {"forward_cpu_fraction": 1.0, "core_wait_seconds": 0.0} | more
    return RankFigures(forward_seconds=forward, data_seconds=data, **more)


def judge(of_ranks: list[RankFigures], windows: int = WINDOWS, watch: SlowRankWatch | None = None) -> list[Slow]:
    """What is found in `windows` windows of steps in which all ranks wait for the slowest one."""
    watch, passes = watch or SlowRankWatch(), 2
    step_seconds = max(3 * passes * each.forward_seconds + each.data_seconds for each in of_ranks)
    steps = math.ceil(WINDOW_SECONDS / step_seconds / 4)
    sums = [
        each._replace(data_seconds=steps * each.data_seconds, core_wait_seconds=steps * each.core_wait_seconds)
        for each in of_ranks
    ]
    found = [watch.add(sums, steps * step_seconds, steps, passes) for _ in range(4 * windows)]
    return [each for each in found if each]


def test_a_rank_whose_forward_passes_are_slow_is_named_once_after_some_windows():
    ranks = [figures(), figures(0.102), figures(0.118), figures(0.098)]
    watch = SlowRankWatch()
    assert judge(ranks, WINDOWS - 1, watch) == []
    (slow,) = judge(ranks, 5, watch)
    assert (slow.rank, slow.ranks, slow.cause) == (2, [2], "compute") and math.isclose(slow.ratio, 0.118 / 0.1)
    assert "1.18 x the median (118 of 100 ms)" in slow.text


def test_a_rank_that_is_slow_for_some_windows_and_then_not_is_not_named():
    draw, watch = random.Random(0), SlowRankWatch()

    def window(of_rank_2: float) -> Slow | None:
        of_ranks = [figures((of_rank_2 if rank == 2 else 0.1) * draw.lognormvariate(0, 0.01)) for rank in range(8)]
        return watch.add(of_ranks, WINDOW_SECONDS, 16, 2)

    late = [0.2] * (WINDOWS - 1) + [0.1]
    assert not any(map(window, late * 3))
    assert [slow.ranks for slow in map(window, [0.2] * WINDOWS) if slow] == [[2]]


def test_a_rank_that_recovers_and_becomes_slow_again_is_named_again():
    slow, equal = [figures(), figures(0.2)], [figures()] * 2
    watch = SlowRankWatch()
    assert [len(judge(ranks, 30, watch)) for ranks in (slow, equal, slow)] == [1, 0, 1]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_equal_ranks_whose_times_vary_by_a_tenth_are_hardly_ever_named(world_size):
    """In 200,000 seconds; windows in which one of them is above 1.1 are frequent then."""
    draw, watch, found = random.Random(0), SlowRankWatch(), 0
    for _ in range(10_000):
        ranks = [figures(0.1 * draw.lognormvariate(0, 0.1)) for _ in range(world_size)]
        found += watch.add(ranks, WINDOW_SECONDS, 33, 2) is not None
    assert found <= 2


def test_a_slow_rank_is_found_in_such_noise():
    draw, watch = random.Random(0), SlowRankWatch()
    found = []
    for _ in range(2 * WINDOWS):
        ranks = [figures(each * draw.lognormvariate(0, 0.05)) for each in (0.1, 0.1, 0.15, 0.1)]
        found.append(watch.add(ranks, WINDOW_SECONDS, 22, 2))
    assert [slow.ranks for slow in found if slow] == [[2]]


def test_a_rank_that_waits_for_data_is_named_and_ranks_that_wait_for_it_are_not():
    (slow,) = judge([figures(0.11), figures(), figures(data=0.3), figures()])
    assert (slow.rank, slow.cause) == (2, "data") and math.isclose(slow.ratio, 0.9 / 0.6)
    assert "waits 300 ms for data in each step of 900 ms, the median rank 0 ms" in slow.text
    assert judge([figures(data=1.0)] * 4) == []  # all of them: the data is slow, no rank is
    assert judge([figures(data=1.0)] * 3 + [figures()]) == []


def test_a_rank_that_waits_for_data_and_computes_fast_is_named():
    (slow,) = judge([figures(), figures(0.02, data=1.0), figures()])
    assert (slow.rank, slow.cause) == (1, "data") and slow.ratio > 1.1
    (slow,) = judge([figures(), figures(0.12, data=0.2), figures()])  # 120 ms more for its passes, 200 for data
    assert (slow.rank, slow.cause) == (1, "data")
    (slow,) = judge([figures(), figures(0.12, data=0.08), figures()])
    assert (slow.rank, slow.cause) == (1, "compute")


def test_a_slow_forward_pass_that_is_a_small_part_of_a_step_is_not_named():
    watch = SlowRankWatch()
    ranks = [figures(0.001), figures(0.003), figures(0.001)]
    assert all(watch.add(ranks, 10.0, 10, 2) is None for _ in range(20))  # of a step of a second


def test_the_cause_is_the_clock_of_the_gpu_a_busy_core_or_a_process_that_is_held():
    gpu = dict(clock_mhz=1905.0, clock_limit_mhz=1980.0, temperature_celsius=60.0, power_watts=650.0)
    hot = gpu | dict(clock_mhz=1200.0, clock_reasons=0x20 | 0x01, temperature_celsius=87.0, power_watts=400.0)
    (slow,) = judge([figures(**gpu), figures(0.15, **hot), figures(**gpu)])
    assert slow.cause == "gpu"
    assert "1,200 of 1,980 MHz (thermal; 87 °C, 400 W), the median rank's at 1,905 MHz" in slow.text
    assert judge([figures(**gpu), figures(0.15, **gpu), figures(**gpu)])[0].cause == "compute"
    held = dict(forward_cpu_fraction=0.6)
    (slow,) = judge([figures(core_wait_seconds=0.1), figures(0.15, core_wait_seconds=0.36, **held), figures()])
    assert slow.cause == "cpu" and "waits for a core 40% of the time" in slow.text
    (slow,) = judge([figures(), figures(0.15, **held), figures()])
    assert slow.cause == "stopped" and "only 60% of that time" in slow.text
    busy = [
        figures(0.2, forward_cpu_fraction=0.5),
        figures(0.4, forward_cpu_fraction=0.4),
        figures(0.2, forward_cpu_fraction=0.5),
    ]
    assert judge(busy)[0].cause == "compute"  # on a machine that is too small for all of them


def test_a_slow_machine_is_named_with_all_its_ranks():
    hosts = [f"node-{rank // 4}" for rank in range(16)]
    (slow,) = judge([figures(0.13 if hosts[rank] == "node-2" else 0.1 + rank / 10_000) for rank in range(16)])
    assert slow.ranks == [8, 9, 10, 11]
    text = named(slow, hosts)
    assert (
        text.startswith("rank 8 on node-2 makes each step about 1.29 x as long: ")
        and "All 4 ranks of node-2 are slow, and no others" in text
    )
    (slow,) = judge([figures(0.13 if rank in (3, 9) else 0.1) for rank in range(16)])
    assert "rank 3 on node-0" in named(slow, hosts) and "Also slow: 9 (node-2)" in named(slow, hosts)
    (slow,) = judge([figures(0.13 + 0.03 * (rank == 9) if rank in (3, 9) else 0.1) for rank in range(16)])
    assert slow.ranks == [3, 9] and named(slow, hosts).startswith("rank 9 on node-2 makes each step about 1.60 x")


def test_figures_that_are_not_known_are_left_out():
    unknown = figures(math.nan, core_wait_seconds=math.nan)
    assert judge([figures(), unknown]) == []
    assert spread([figures(), unknown]) == {"data_seconds_max": 0.0}
    (slow,) = judge([figures(core_wait_seconds=math.nan), figures(0.2, core_wait_seconds=math.nan)])
    assert slow.cause == "compute"
    both = spread([figures(0.1, 1.0, clock_mhz=1900.0, temperature_celsius=50.0, power_watts=300.0), figures(0.3, 2.0)])
    assert both["forward_seconds"] == 0.1 and both["forward_seconds_max"] == 0.3 and both["forward_seconds_max_rank"] == 1
    assert both["data_seconds_max"] == 2.0 and both["gpu_clock_mhz_min"] == 1900.0 and both["gpu_power_watts"] == 300.0


# ================================================================ measuring

NVML = """
typedef struct { char uuid[80]; } device;
static device gpu;
int nvmlInitWithFlags(unsigned f) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, device **out) { *out = &gpu; return uuid[4] == 'a' ? 0 : 6; }
int nvmlDeviceGetClockInfo(device *d, int kind, unsigned *mhz) { *mhz = kind == 1 ? 1200 : 1; return 0; }
int nvmlDeviceGetMaxClockInfo(device *d, int kind, unsigned *mhz) { *mhz = kind == 1 ? 1980 : 1; return 0; }
int nvmlDeviceGetCurrentClocksThrottleReasons(device *d, unsigned long long *bits) { *bits = 0x21; return 0; }
int nvmlDeviceGetTemperature(device *d, int sensor, unsigned *celsius) { *celsius = 87; return 0; }
int nvmlDeviceGetPowerUsage(device *d, unsigned *milliwatts) { *milliwatts = 400500; return 0; }
"""
"""The functions of nvml.h that are called, for a GPU of our own making, behind the real Python package."""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_gpu_is_read_through_the_library_of_its_driver(tmp_path):
    (tmp_path / "nvml.c").write_text(NVML)
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "nvml.c")], check=True)
    program = (
        "import pynvml; from pretrain.report.ranks import nvml_reader; pynvml.nvmlInit(); print(*nvml_reader('GPU-a')())\n"
        "try: nvml_reader('GPU-b')\n"
        "except pynvml.NVMLError as error: print(type(error).__name__)"
    )
    variables = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1200.0", "1980.0", "33.0", "87.0", "400.5", "NVMLError_NotFound"]


def test_passes_without_gradients_do_not_count():
    timer = ForwardTimer(torch.device("cpu"), parts=2)
    assert all(map(math.isnan, timer.read()))
    for seconds in (0.02, 0.04):
        with timer:
            time.sleep(seconds)
    with torch.no_grad(), timer:
        time.sleep(0.5)
    seconds, cpu_fraction = timer.read()
    assert 0.06 <= seconds < 0.3 and cpu_fraction < 0.5
    assert all(map(math.isnan, timer.read()))  # each interval begins anew


class Event:
    """A CUDA event of a device that completes nothing by itself; stands in for torch.cuda.Event, which needs a GPU."""

    made = recorded = completed = 0

    def __init__(self, enable_timing: bool):
        assert enable_timing
        Event.made += 1

    def record(self) -> None:
        self.number = Event.recorded
        Event.recorded += 1

    def query(self) -> bool:
        return self.number < Event.completed

    def elapsed_time(self, end: Event) -> float:
        return 1000.0 * (end.number - self.number)


def test_on_a_gpu_only_completed_passes_are_read_and_events_are_used_again(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.made = Event.completed = Event.recorded = 0
    timer = ForwardTimer(torch.device("cuda"), parts=4)
    for _ in range(3):
        with timer:
            pass
    assert all(map(math.isnan, timer.read()))
    Event.completed = 5  # the third pass has begun
    assert timer.read() == (4.0, 1.0) and all(map(math.isnan, timer.read()))
    Event.completed = 6
    assert timer.read() == (4.0, 1.0)
    for _ in range(3):
        with timer:
            pass
    assert Event.made == 6


SLEEP_SECONDS, LAYERS = 0.1, 2
TINY = ModelConfig(hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, vocab_size=64)


def measured(name: str) -> tuple[float, float]:
    """(seconds of a forward pass, of a step) of this rank; the blocks of rank 1 sleep."""
    engine = start_engine(EngineConfig(name=name, precision="fp32"))
    if engine.rank == 1:
        sleep_in_blocks()
    model = resolve_model(TINY, vocab_size=64, sequence_length=8)
    engine.prepare(lambda: Transformer(model), lambda built: build_optimizer(built, OptimizerConfig()), 1.0, seed=0)
    engine.time_forward()
    tokens_BT = torch.arange(16).view(2, 8)
    window = [Batch(tokens_BT, tokens_BT, None)] * 2
    train_step(engine, window, 1e-3)
    engine.forward_timer.read()
    began = time.perf_counter()
    for _ in range(2):
        train_step(engine, window, 1e-3)
    step_seconds = (time.perf_counter() - began) / 2
    seconds, _ = engine.forward_timer.read()
    engine.close()
    return seconds, step_seconds


def sleep_in_blocks() -> None:
    real = Block.forward

    def forward(self, *args):
        time.sleep(SLEEP_SECONDS)
        return real(self, *args)

    Block.forward = forward


@pytest.mark.parametrize("name", ["ddp", "fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_the_forward_passes_of_a_slow_rank_take_longer_than_those_of_ranks_that_wait_for_it(name):
    """Under fsdp2 and zero3, the others wait for it in each of their forward passes, too, before each block."""
    (fast, step_seconds), (slow, _) = run_ranks(2, measured, name)
    assert slow > LAYERS * SLEEP_SECONDS and slow > 3 * fast
    assert step_seconds > 2 * LAYERS * SLEEP_SECONDS


# ================================================================ in a run

FLAGS = [
    *("--model.hidden_size", "16", "--model.num_hidden_layers", "2", "--model.num_attention_heads", "2"),
    *("--model.vocab_size", "64", "--data.synthetic.kind", "uniform", "--data.sequence_length", "16"),
    *("--batch.global_batch_size", "6", "--batch.micro_batch_size", "2", "--engine.precision", "fp32"),
    *("--evaluate.every_steps", "0", "--evaluate.max_batches", "1", "--checkpoint.every_steps", "0", "--log.every_steps", "2"),
]


def train_with_a_slow_rank(folder: Path, steps: int, what: str | None) -> int:
    """Rank 1 of a run is slow; each interval is a window."""
    SlowRankWatch.__init__.__defaults__ = (0.0,)
    ranks._SIGMAS = 0  # so short, the windows of a busy machine are noise
    if os.environ["RANK"] == "1" and what == "forward":
        sleep_in_blocks()
    if os.environ["RANK"] == "1" and what == "data":
        real = TrainData.take
        TrainData.take = lambda *args: (time.sleep(3 * SLEEP_SECONDS), real(*args))[1]
    return train_here([*FLAGS, "--run.directory", str(folder), "--run.name", "tiny", "--train.max_steps", str(steps)])


@pytest.mark.parametrize("what", ["forward", "data"])
def test_a_run_names_its_slow_rank_and_the_host(tmp_path, what):
    run_ranks(3, train_with_a_slow_rank, tmp_path, 12, what)
    logged = records(tmp_path / "tiny")
    slow = next(record for record in logged if "slow_rank" in record)
    assert (slow["slow_rank"], slow["slow_host"]) == (1, socket.gethostname()) and 1 in slow["slow_ranks"]
    assert slow["slow_cause"] in ({"forward": ("stopped", "cpu"), "data": ("data",)}[what]) and slow["slow_ratio"] > 1.1
    assert slow["text"] in (tmp_path / "tiny" / "console.log").read_text()
    steps = [record for record in logged if "loss" in record and record["step"] > 2]
    if what == "forward":
        assert all(record["forward_seconds_max_rank"] == 1 for record in steps)
        assert all(record["forward_seconds_max"] > LAYERS * SLEEP_SECONDS > record["forward_seconds"] for record in steps)
    else:
        assert all(record["data_seconds_max"] > SLEEP_SECONDS for record in steps)


def test_a_run_of_one_process_compares_no_ranks(tmp_path):
    run_ranks(1, train_alone, tmp_path)
    assert not any(key.startswith(("forward_", "slow_")) for record in records(tmp_path / "tiny") for key in record)


def train_alone(folder: Path) -> int:
    return train_here([*FLAGS, "--run.directory", str(folder), "--run.name", "tiny", "--train.max_steps", "3"])
