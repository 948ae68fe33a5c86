"""Runs resume after a kill: to the bit on the same engine and ranks, within rounding on any others."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from pretrain.run import parts
from tests.ranks import run_ranks
from tests.test_train import TINY, curve, final_bytes, records, train_here

STEPS, CUT, SEQUENCES = 12, 6, 12
ENGINES = {
    "ddp": ["--engine.name", "ddp"],
    "zero1": ["--engine.name", "zero1"],
    "zero2": ["--engine.name", "zero2"],
    "zero3": ["--engine.name", "zero3", "--engine.keep_whole_below", "100"],
    "fsdp2": ["--engine.name", "fsdp2"],
}
SAME_SAMPLES = ("step", "tokens", "lr", "epoch")


def flags_of(folder: Path, name: str, *more: str, saved_every: int = CUT) -> list[str]:
    """Flags of twelve steps of twelve sequences, which 1, 2, 3 or 4 ranks can share."""
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(TINY)
    flags = {"run.name": name, "train.max_steps": STEPS, "evaluate.every_steps": CUT, "checkpoint.every_steps": saved_every}
    flags |= {"batch.global_batch_size": SEQUENCES, "batch.micro_batch_size": 1, "checkpoint.keep_last": 3}
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    return ["--config", str(folder / "tiny.yaml"), "--run.directory", str(folder / "runs"), *words, *more]


def cut(folder: Path, source: str, name: str) -> Path:
    """Copies a run and removes its last checkpoint, as if it had been killed before."""
    run = Path(shutil.copytree(folder / "runs" / source, folder / "runs" / name))
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS:08d}")
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{CUT:08d}"]
    return run


def last_progress(run: Path) -> dict:
    return json.loads((run / "checkpoints" / f"step_{STEPS:08d}" / "state.json").read_text())["progress"]


def check_resume(folder: Path, writer: tuple[str, int], readers: list[tuple[str, int]]) -> None:
    """Trains with one (engine, ranks), cuts the run, and completes it with each of the others."""
    engine, ranks = writer
    assert set(run_ranks(ranks, train_here, flags_of(folder, "straight", *ENGINES[engine]))) == {0}
    expected = records(folder / "runs" / "straight")
    for engine, ranks in readers:
        name = f"{engine}-{ranks}"
        run = cut(folder, "straight", name)
        assert set(run_ranks(ranks, train_here, flags_of(folder, name, *ENGINES[engine]))) == {0}
        worst = 0.0
        for record, true in zip(records(run)[1:], expected[1:], strict=True):
            assert [record.get(key) for key in SAME_SAMPLES] == [true.get(key) for key in SAME_SAMPLES]
            for key in {"loss", "val_loss"} & true.keys():
                worst = max(worst, abs(record[key] / true[key] - 1))
        print(f"{writer[0]} on {writer[1]} -> {engine} on {ranks}: largest relative difference of a loss {worst:.1e}")
        assert worst <= 1e-5
        assert last_progress(run)["position"] == last_progress(folder / "runs" / "straight")["position"] == SEQUENCES * STEPS


@pytest.mark.faults
def test_another_engine_on_fewer_ranks_resumes_the_run(tmp_path):
    check_resume(tmp_path, ("zero2", 2), [("fsdp2", 1)])


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_sharded_and_replicated_engines_on_1_2_and_3_ranks_resume_the_run_of_zero2_on_4(tmp_path):
    check_resume(tmp_path / "a", ("zero2", 4), [("fsdp2", 1), ("ddp", 2), ("zero3", 3)])


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_zero1_and_zero2_resume_the_runs_of_fsdp2_and_zero3(tmp_path):
    check_resume(tmp_path / "a", ("fsdp2", 3), [("zero2", 2), ("zero1", 4)])
    check_resume(tmp_path / "b", ("zero3", 2), [("zero1", 3), ("fsdp2", 2)])


def train_and_die(argv: list[str], step: int) -> None:
    """Trains, and kills itself while `step` is computed, when the data of the next step is read."""
    opened = parts.open_train

    def open_deadly(*args, **options):
        data = opened(*args, **options)
        take = data.take

        def take_or_die(position: int, count: int):
            if position >= SEQUENCES * step:
                os.kill(os.getpid(), signal.SIGKILL)
            return take(position, count)

        data.take = take_or_die
        return data

    parts.open_train = open_deadly
    train_here(argv)


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_killed_three_times_equals_an_uninterrupted_one_to_the_bit(tmp_path, engine, precision):
    """It saves after every third step and is killed in steps 2 (nothing saved yet), 5 and 10 (perhaps during a save)."""
    flags = [*ENGINES[engine], "--engine.precision", precision]
    assert run_ranks(2, train_here, flags_of(tmp_path, "straight", *flags, saved_every=3)) == [0, 0]
    for step in (2, 5, 10):
        with pytest.raises(RuntimeError, match="died"):
            run_ranks(2, train_and_die, flags_of(tmp_path, "killed", *flags, saved_every=3), step)
        assert records(tmp_path / "runs" / "killed")[-1]["step"] <= step
    assert run_ranks(2, train_here, flags_of(tmp_path, "killed", *flags, saved_every=3)) == [0, 0]
    assert curve(tmp_path / "runs" / "killed") == curve(tmp_path / "runs" / "straight")
    assert final_bytes(tmp_path / "runs" / "killed") == final_bytes(tmp_path / "runs" / "straight")
