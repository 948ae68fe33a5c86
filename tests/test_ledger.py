"""What a run costs: counted over all its starts, in every report; it stops within its budget. Its time adds up."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain.config import ConfigError, RunConfig, load
from pretrain.report.metrics import Clock
from pretrain.run import ledger
from pretrain.run.ledger import Job, Ledger, open_ledger
from pretrain.run.mirror import Mirror
from pretrain.run.progress import Progress
from tests.ranks import run_ranks
from tests.test_time_left import SAVE, STEP, Simulated
from tests.test_train import curve, records, run_of, train_here

PRICE = ["--run.dollars_per_hour", "36"]  # a cent per second


def account(run: Path) -> dict:
    return json.loads((run / "ledger.json").read_text())


def a_ledger(config: RunConfig, *jobs: Job, write=lambda name, text: None) -> Ledger:
    return Ledger(config, write, list(jobs))


def job(began: float, hours: float, ranks: int, price: float = 2.5, **named) -> Job:
    return Job(began, began + 3600 * hours, ranks, "H100", price, **named)


# ---------------------------------------------------------------- money


def test_the_cost_is_hours_times_ranks_times_price_over_all_starts(monkeypatch):
    config = RunConfig(dollars_per_hour=3.0, budget_dollars=200.0)
    jobs = [job(0, 2, 8), job(10_000, 1.5, 4, price=2.0), job(20_000, 0.5, 8, price=0.0)]
    monkeypatch.setattr(ledger, "time", SimpleNamespace(**vars(time) | {"time": lambda: jobs[-1].began + 1800}))
    texts: dict[str, str] = {}
    counted = a_ledger(config, *jobs, write=texts.__setitem__)
    assert counted.dollars == pytest.approx(2 * 8 * 2.5 + 1.5 * 4 * 2.0 + 0.5 * 8 * 3.0)  # no price: today's
    assert counted.dollars_per_hour == 24.0 and not counted.is_spent
    counted.expect(3600 * 10)
    assert counted.advice() == (
        "$64.00 spent of $200.00; finishing takes about $240.00 more: start again with --run.budget_dollars 319.20, which has "
        "5 % to spare"
    )
    counted.end(76, Progress())
    rows = [line.split() for line in texts["invoice.txt"].splitlines() if line.endswith("H100")]
    assert [row[5:7] for row in rows] == [["2.5", "$40.00"], ["2", "$12.00"], ["3", "$12.00"]]  # each at its own price
    assert [row[-2] for row in rows] == ["killed", "killed", "76"]


def test_a_budget_needs_a_price():
    flags = ["--config", "configs/dummy.yaml", "--run.budget_dollars", "5"]
    with pytest.raises(ConfigError, match=r"run\.budget_dollars: needs run\.dollars_per_hour"):
        load(flags)
    load([*flags, *PRICE])


def test_in_a_thousand_runs_the_stop_never_overshoots_the_budget_by_more_than_a_step(monkeypatch):
    """Steps, saves and validations of random lengths. A request is agreed on at the end of the step that it was made in."""
    draw, now = random.Random(0), SimpleNamespace(seconds=0.0)
    fake = SimpleNamespace(time=lambda: now.seconds, monotonic=lambda: now.seconds)
    monkeypatch.setattr(ledger, "time", fake)
    monkeypatch.setattr("pretrain.report.metrics.time", fake)
    monkeypatch.setattr(ledger, "WRITE_SECONDS", 3600.0)  # else a thread for each of 80,000 steps
    left = []
    for _ in range(1000):
        ranks, typical, save = draw.randint(1, 512), draw.uniform(0.05, 30), draw.uniform(0.1, 300)
        price, noise = draw.uniform(0.1, 10), draw.uniform(0, 0.5)
        begin, now.seconds = now.seconds, now.seconds + draw.uniform(5, 300)
        start = Job(begin, begin, ranks, "H100", price)
        rate = ranks * price / 3600
        budget = rate * (300 + save + typical * draw.uniform(10, 200))
        counted = a_ledger(RunConfig(dollars_per_hour=price, budget_dollars=budget), start)
        clock, step, longest, stop = Clock(), 0, 0.0, False
        counted.begin(clock, 0)
        while not stop:
            stop, length = counted.budget_is_reached(save), typical * draw.uniform(1 - noise, 1 + noise)
            now.seconds, step, longest = now.seconds + length, step + 1, max(longest, length)
            counted.note_step(step)
            if step % 50 == 0 and not stop:
                with clock.paused("validation"):  # its rounds ask too, and the last one is late
                    for _ in range(20):
                        if stop := counted.budget_is_reached(save):
                            break
                        now.seconds += typical / 3
        now.seconds += save
        over = counted.dollars - budget
        assert over <= longest * rate, f"{over / rate:.1f} s over with steps of {typical:.1f} s"
        left.append(-over / rate / (longest + typical))
    assert max(left) < 4  # nor does it stop early: at most a few steps of the budget are left


@pytest.mark.parametrize(("budget", "upload"), [(0.2, 0.0), (0.25, 3.0)])
def test_a_run_stops_within_its_budget_with_a_checkpoint_and_says_what_it_takes(tiny, monkeypatch, capsys, budget, upload):
    """Also where the last checkpoint is uploaded at the end, which takes `upload` seconds."""
    clock = Simulated(monkeypatch)
    monkeypatch.setattr(Mirror, "upload_seconds", property(lambda mirror: upload, lambda *_: None), raising=False)
    fake = SimpleNamespace(time=lambda: clock.now, monotonic=lambda: clock.now, strftime=time.strftime, gmtime=time.gmtime)
    monkeypatch.setattr(ledger, "time", fake)
    monkeypatch.setattr(ledger, "psutil", SimpleNamespace(Process=lambda: SimpleNamespace(create_time=lambda: 90.0)))
    flags = ["--train.max_steps", "500", "--checkpoint.every_steps", "20", "--evaluate.every_steps", "40", *PRICE]
    assert train_here([*flags, "--run.budget_dollars", str(budget), *tiny]) == 76
    run = run_of(tiny)
    state = json.loads((run / "run_state.json").read_text())
    assert state["saved_step"] == state["step"] > 10 and (run / f"checkpoints/step_{state['step']:08d}/manifest.json").exists()
    spent = 0.01 * (clock.end - 90)
    assert budget - 0.01 * (SAVE + 3 * STEP + 2.5) < spent + 0.01 * upload <= budget + 0.01 * STEP
    assert (
        f"stopped by its budget after step {state['step']}, which is saved: ${spent:.4f} spent of ${budget:.4f}"
        in state["reason"]
    )
    logged = [record for record in records(run) if "cost_dollars" in record]
    assert logged[-1]["cost_dollars"] <= spent and logged[-1]["cost_total_dollars"] > budget
    per_billion = logged[-1]["cost_dollars"] / logged[-1]["tokens"] * 1e9
    assert logged[-1]["dollars_per_billion_tokens"] == pytest.approx(per_billion)
    assert "in all" in capsys.readouterr().out
    assert (run / "report.html").stat().st_size > 10_000


def test_a_spent_budget_refuses_the_next_start_and_a_larger_one_finishes_the_same_run(tiny, capfd):
    flags = ["--run.name", "tiny", *tiny]
    assert train_here(["--run.name", "free", *tiny]) == 0
    assert train_here([*PRICE, "--run.budget_dollars", "0.001", *flags]) == 76  # spent before the first step
    assert "its budget is spent: $" in capfd.readouterr().err
    assert not list(run_of(tiny).glob("checkpoints/step_*"))
    spent = sum(each["last"] - each["began"] for each in account(run_of(tiny))["jobs"]) / 100  # also what this start costs
    assert train_here([*PRICE, "--run.budget_dollars", str(spent + 100), *flags]) == 0
    assert curve(run_of(tiny)) == curve(run_of(tiny, "free"))
    jobs = account(run_of(tiny))["jobs"]
    assert [each["exit_status"] for each in jobs] == [76, 0] and [each["last_step"] for each in jobs] == [0, 20]
    assert train_here([*PRICE, "--run.budget_dollars", "0.001", *flags]) == 0  # done: nothing is left to pay for


def test_two_ranks_cost_twice_as_much_as_one(tiny):
    assert run_ranks(2, train_here, [*PRICE, *tiny]) == [0, 0]
    run = run_of(tiny)
    [start] = account(run)["jobs"]
    last = [record for record in records(run) if "cost_dollars" in record][-1]
    assert start["ranks"] == 2 and last["cost_dollars"] < 0.02 * (start["last"] - start["began"])
    assert last["cost_dollars"] > 0.02 * (start["steps"] + start["starting"])
    assert "cost       $" in (run / "invoice.txt").read_text()


# ---------------------------------------------------------------- time


def test_the_purposes_of_time_are_counted_and_sum_to_one(tiny):
    assert train_here([*PRICE, *tiny]) == 0
    run = run_of(tiny)
    logged = [record for record in records(run) if "time/training" in record]
    for record in logged:
        shares = [value for name, value in record.items() if name.startswith("time/")]
        assert len(shares) == 8 and sum(shares) == pytest.approx(1)
    last, [start] = logged[-1], account(run)["jobs"]
    assert last["time/lost"] == pytest.approx(0, abs=1e-3) and last["time/down"] == 0
    assert start["validation"] > 0 and start["saving"] > 0 and start["starting"] > start["steps"] > 0
    assert 3600 * last["train_hours"] <= start["steps"] < 1.5 * 3600 * last["train_hours"]


def kill_itself_at(argv: list[str], step: int) -> int:
    def wait_and_kill() -> None:
        path = run_of(argv) / "metrics.jsonl"
        while not path.exists() or path.read_text().count('"grad_norm"') < step:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    ledger.WRITE_SECONDS = 0.0
    threading.Thread(target=wait_and_kill, daemon=True).start()
    return train_here(argv)


def test_steps_that_a_kill_loses_are_paid_for_and_count_as_lost(tiny):
    flags = [*PRICE, "--train.max_steps", "400", "--checkpoint.every_steps", "1000", "--evaluate.every_steps", "0", *tiny]
    process = multiprocessing.get_context("spawn").Process(target=kill_itself_at, args=(flags, 60))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    [killed] = account(run_of(tiny))["jobs"]
    assert killed["exit_status"] is None and killed["steps"] > 0
    killed |= {"began": killed["began"] - 100, "last": killed["last"] - 100}  # it was long ago
    (run_of(tiny) / "ledger.json").write_text(json.dumps({"jobs": [killed]}))
    assert run_ranks(1, train_here, [*flags, "--train.max_steps", "20"]) == [0]
    content, last = account(run_of(tiny)), [each for each in records(run_of(tiny)) if "time/lost" in each][-1]
    jobs = content["jobs"]
    wall = jobs[-1]["last"] - jobs[0]["began"]
    assert last["time/lost"] * wall == pytest.approx(killed["steps"], rel=0.2)
    down = jobs[1]["began"] - killed["last"]
    assert down > 98 and last["time/down"] * wall == pytest.approx(down, rel=0.05)
    assert last["cost_dollars"] > 0.01 * (killed["last"] - killed["began"])
    table = (run_of(tiny) / "invoice.txt").read_text()
    assert "killed" in table and "lost work" in table


def test_an_account_that_cannot_be_read_is_kept_aside_and_that_is_said(tmp_path, capsys):
    directory = SimpleNamespace(path=tmp_path, write_text=lambda name, text: None)
    engine = SimpleNamespace(rank=0, world_size=2, device_name="cpu")
    (tmp_path / "ledger.json").write_text('{"jobs": [{"began": "yesterday"}]}')
    assert len(open_ledger(RunConfig(), directory, engine).jobs) == 1
    assert (tmp_path / "unreadable-ledger.json").exists() and "the cost counts from this start" in capsys.readouterr().err


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_slow_or_full_neither_delays_nor_stops_a_step(monkeypatch):
    monkeypatch.setattr(ledger, "WRITE_SECONDS", 0.0)
    held, started, texts = threading.Event(), [], []

    def write(name: str, text: str) -> None:
        started.append(name)
        if len(started) == 1:
            held.wait(60)
        texts.append(text)  # it replaces the file
        if len(started) < 3:
            raise OSError("no space left on device")

    counted = a_ledger(RunConfig(), Job(time.time(), 0.0, 1, "cpu", 0.0), write=write)
    counted.begin(Clock(), 0)
    for step in (1, 2):
        counted.note_step(step)  # returns while the first write hangs
    assert len(started) == 1 and not texts
    threading.Timer(0.3, held.set).start()
    with pytest.raises(OSError, match="no space left"):  # at the end nothing tries again, so this one is an error
        counted.save()
    assert [json.loads(text)["jobs"][0]["last_step"] for text in texts] == [1, 2]  # the newest account is the last one written
    counted.note_step(3)
    counted.save()
    assert json.loads(texts[-1])["jobs"][0]["last_step"] == 3


def test_work_of_another_run_that_this_one_began_with_is_neither_paid_nor_lost(monkeypatch):
    monkeypatch.setattr(ledger, "time", SimpleNamespace(time=lambda: 100.0))
    counted = a_ledger(RunConfig(), Job(0.0, 100.0, 1, "cpu", 0.0, steps=50.0, starting=30.0))
    counted.inherited = 1000.0
    seconds = counted.seconds(Progress(train_seconds=1050.0))
    assert seconds["training"] == 50.0 and seconds["lost"] == 0.0 and seconds["other"] == 20.0
    seconds = counted.seconds(Progress(train_seconds=1040.0))  # after a kill
    assert seconds["training"] == 40.0 and seconds["lost"] == 10.0
