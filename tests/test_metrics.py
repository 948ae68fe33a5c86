"""Figures of a logging interval, compared with arithmetic by hand."""

from __future__ import annotations

import math
import resource
import subprocess
import sys

import pytest
import torch

from pretrain.report import metrics
from pretrain.report.metrics import Meter, SampleLosses, bits_per_byte, peak_memory_gib, perplexity


def add(meter: Meter, nats: float, tokens: int, applied: bool = True, grad_norm: float = 1.0) -> None:
    values = (torch.tensor(nats, dtype=torch.float64), torch.tensor(tokens), torch.tensor(grad_norm), torch.tensor(applied))
    meter.add(*values)


def add_samples(meter: Meter, samples: list[tuple[int, float, int]], applied: bool = True) -> None:
    """Adds a step with samples of (source, nats, tokens)."""
    sources, nats, tokens = zip(*samples, strict=True)
    values = (torch.tensor(sum(nats)).double(), torch.tensor(sum(tokens)), torch.tensor(1.0), torch.tensor(applied), None)
    meter.add(*values, SampleLosses(torch.tensor(sources), torch.tensor(nats), torch.tensor(tokens)))


def alone(values: torch.Tensor) -> torch.Tensor:
    return values


def test_the_loss_is_weighted_by_tokens_over_all_steps_of_the_interval():
    meter = Meter(torch.device("cpu"), 0, 1)
    add(meter, 20.0, 10)
    add(meter, 30.0, 30, grad_norm=2.5)
    figures = meter.read(alone)
    assert figures["loss"] == 50 / 40  # the mean of the two steps' means would be 1.5
    assert (figures["steps"], figures["interval_tokens"], figures["grad_norm"]) == (2, 40, 2.5)
    add(meter, 8.0, 4)
    assert meter.read(alone)["loss"] == 2.0


def test_skipped_steps_are_counted_and_do_not_change_the_loss():
    meter = Meter(torch.device("cpu"), 0, 1)
    add(meter, 20.0, 10)
    add(meter, math.nan, 10, applied=False)
    figures = meter.read(alone)
    keys = ("loss", "interval_tokens", "skipped_steps", "skipped_in_a_row")
    assert [figures[key] for key in keys] == [2.0, 20, 1, 1]
    add(meter, math.inf, 10, applied=False)
    figures = meter.read(alone)
    assert math.isnan(figures["loss"]) and (figures["skipped_steps"], figures["skipped_in_a_row"]) == (1, 2)
    add(meter, 20.0, 10)
    assert meter.read(alone)["skipped_in_a_row"] == 0


def test_the_loss_of_a_source_is_weighted_by_its_tokens_over_all_applied_steps_of_the_interval():
    meter = Meter(torch.device("cpu"), 0, 1, sources=["web", "code", "books", "unused"])
    add_samples(meter, [(0, 20.0, 4), (1, 3.0, 2), (0, 4.0, 4), (2, 0.0, 0)])  # no label of the book counts
    add_samples(meter, [(1, math.nan, 100), (0, 1.0, 1)], applied=False)
    add_samples(meter, [(1, 6.0, 1), (0, 1.0, 2)])
    figures = meter.read(alone)
    assert figures["sources"] == {"loss/web": 25 / 10, "loss/code": 9 / 3}
    assert figures["loss"] == 34 / 13
    add_samples(meter, [(2, 5.0, 1)])
    assert meter.read(alone)["sources"] == {"loss/books": 5.0}


def test_the_losses_of_sources_resume_by_name_on_any_ranks_and_do_not_depend_on_them():
    """In numbers whose sum in fp32, or in another order, is another one."""
    names, nats = ["web", "code"], [1234.5678, 0.1, 987654.3, 1e-3, 4321.9]
    steps = [[(0, value, 10), (1, value / 3, 7)] for value in nats]
    straight = Meter(torch.device("cpu"), 0, 1, sources=names)
    for step in steps:
        add_samples(straight, step)
    expected = straight.read(alone)["sources"]
    meters = [Meter(torch.device("cpu"), rank, 2, sources=names) for rank in range(2)]
    for rank in (1, 0):
        for step in steps[:3]:
            add_samples(meters[rank], [step[rank]])
    parts: list[torch.Tensor] = []
    for meter in meters:
        meter.state(lambda part: parts.append(part) or part)
    state = meters[0].state(lambda _: sum(parts))
    names = ["new", "code", "web"]
    resumed = [Meter(torch.device("cpu"), rank, 3, state, names) for rank in range(3)]
    for rank, [(_, *web), (_, *code)] in ((1, steps[3]), (2, steps[4])):
        add_samples(resumed[rank], [(2, *web), (1, *code)])
    sums = sum(meter.source_sums_S2 for meter in resumed).tolist()
    assert {f"loss/{name}": nats / tokens for name, (nats, tokens) in zip(names, sums, strict=True) if tokens} == expected


@pytest.mark.parametrize("ranks", [2, 3])
def test_an_interval_resumes_from_its_state_on_any_number_of_ranks(ranks):
    meters = [Meter(torch.device("cpu"), rank, 2) for rank in range(2)]
    for rank, meter in enumerate(meters):
        add(meter, 10.0 + rank, 10)
    parts: list[torch.Tensor] = []
    for meter in meters:
        meter.state(lambda part: parts.append(part) or part)
    state = meters[0].state(lambda _: sum(parts))
    resumed = [Meter(torch.device("cpu"), rank, ranks, state) for rank in range(ranks)]
    assert state["last_loss"] == sum(meter.last_loss.item() for meter in resumed) == 2.1
    assert sum(meter.loss_sum.item() for meter in resumed) == 21.0
    assert all(meter.counts.tolist() == [1, 10, 10, 0, 0] for meter in resumed)


def test_pairs_of_an_interval_add_up_over_steps_and_a_resume():
    meters = [Meter(torch.device("cpu"), rank, 2) for rank in range(2)]
    for rank, meter in enumerate(meters):
        add(meter, 10.0, 10)
        meter.add_attended((10, 40 + rank, 20.5))
    parts: list[torch.Tensor] = []
    for meter in meters:
        meter.state(lambda part: parts.append(part) or part)
    state = meters[0].state(lambda _: sum(parts))
    resumed = [Meter(torch.device("cpu"), rank, 3, state) for rank in range(3)]
    totals: list[torch.Tensor] = []
    for meter in resumed:
        add(meter, 10.0, 10)
        meter.add_attended((10, 100, 50))
        meter.read(lambda part: totals.append(part) or part)
    meter = resumed[0]
    assert meter.read(lambda _: sum(totals))["attended"] == [20 + 30, 81 + 300, 41 + 150]
    assert meter.read(alone)["attended"] == [0, 0, 0]


def test_perplexity_and_bits_per_byte():
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e4) == math.inf
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8)  # a byte that cannot be predicted costs 8 bits
    assert bits_per_byte(math.log(256), 4.0) == pytest.approx(2)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process without its launcher's is in /proc")
def test_the_peak_memory_of_a_process_is_its_own_and_not_that_of_the_program_that_started_it():
    """ru_maxrss survives fork and exec: a small worker would show the size of a large launcher."""
    code = "import resource, torch; from pretrain.report.metrics import peak_memory_gib as peak\n"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, peak(torch.device('cpu')))\n"
    code += "filled = torch.ones(2**27); print(peak(torch.device('cpu')))"
    launcher = (
        "import os, sys; filled = b'1' * (7 * 2**27); del filled; os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])"
    )
    done = subprocess.run([sys.executable, "-c", launcher, code], capture_output=True, text=True, check=True)
    inherited, own, later = map(float, done.stdout.split())
    assert own < 0.8 < 0.87 < inherited and own + 0.45 < later < own + 0.7


def test_without_proc_the_peak_memory_is_that_of_the_system(monkeypatch):
    monkeypatch.setattr(metrics, "Path", lambda path: (_ for _ in ()).throw(FileNotFoundError(path)))
    assert peak_memory_gib(torch.device("cpu")) == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@pytest.mark.parametrize("routed", [False, True])
def test_reading_an_interval_waits_for_the_device_once(monkeypatch, routed):
    """On the meta device, where any other read of a tensor raises."""
    meter, reads = Meter(torch.device("meta"), 0, 1), []
    values = [torch.empty((), dtype=dtype, device="meta") for dtype in (torch.float64, torch.int64, torch.float32, torch.bool)]
    meter.add(*values, torch.empty(2, 6, dtype=torch.float64, device="meta") if routed else None)
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda tensor: reads.append(tensor) or torch.ones(tensor.shape, dtype=tensor.dtype)
    )
    figures = meter.read(alone, of_rank=(1.0, 2.0))
    assert figures["ranks"] == [[1.0, 1.0]]  # as `cpu` says
    assert len(reads) == 1 and figures["loss"] == figures["grad_norm"] == figures["loss_tokens"] == 1
    assert figures["memory"] == {"peak_memory_gib": 1.0} and ("aux_loss" in figures["routing"]) == routed


def test_on_gpus_the_peak_that_the_allocator_reserved_is_reported_beside_that_of_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5 * 2**30)
    assert metrics._peaks(torch.device("cuda")) == {"peak_memory_gib": 3.0, "peak_reserved_gib": 5.0}
    assert list(metrics._peaks(torch.device("cpu"))) == ["peak_memory_gib"]


def test_the_largest_peak_of_all_ranks_is_reported():
    meters = [Meter(torch.device("cpu"), rank, 2) for rank in range(2)]
    parts: list[torch.Tensor] = []
    for meter in meters:
        add(meter, 10.0, 10)
        meter.read(lambda part: parts.append(part.clone()) or part)
    add(meters[0], 10.0, 10)
    parts[1][2] = 77.0  # the slot of rank 1
    assert meters[0].read(lambda _: sum(parts))["memory"]["peak_memory_gib"] == 77.0


def test_figures_of_each_rank_reach_all_ranks_in_order():
    meters = [Meter(torch.device("cpu"), rank, 3) for rank in range(3)]
    parts: list[torch.Tensor] = []
    for rank, meter in enumerate(meters):
        add(meter, 10.0, 10)
        meter.read(lambda part: parts.append(part.clone()) or part, of_rank=(rank + 0.5, math.nan if rank == 1 else 7.0))
    add(meters[0], 10.0, 10)
    found = meters[0].read(lambda _: sum(parts), of_rank=(0.0, 0.0))
    assert found["ranks"][0] == [0.5, 7.0] and found["ranks"][2] == [2.5, 7.0]
    assert found["ranks"][1][0] == 1.5 and math.isnan(found["ranks"][1][1])
    assert found["loss"] == 3.0
