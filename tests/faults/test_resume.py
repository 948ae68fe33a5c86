"""Whole runs go on where they were cut: to the bit on the same engine and ranks, within rounding on any others."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

import pretrain.train
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
    """Twelve steps of twelve sequences, which 1, 2, 3 and 4 ranks can share."""
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(TINY)
    flags = {"run.name": name, "train.max_steps": STEPS, "evaluate.every_steps": CUT, "checkpoint.every_steps": saved_every}
    flags |= {"batch.global_batch_size": SEQUENCES, "batch.micro_batch_size": 1, "checkpoint.keep_last": 3}
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    return ["--config", str(folder / "tiny.yaml"), "--run.directory", str(folder / "runs"), *words, *more]


def cut(folder: Path, source: str, name: str) -> Path:
    """A copy of a run as if it had been killed in its last steps."""
    run = Path(shutil.copytree(folder / "runs" / source, folder / "runs" / name))
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS:08d}")
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{CUT:08d}"]
    return run


def last_progress(run: Path) -> dict:
    return json.loads((run / "checkpoints" / f"step_{STEPS:08d}" / "state.json").read_text())["progress"]


def goes_on_elsewhere(folder: Path, writer: tuple[str, int], readers: list[tuple[str, int]]) -> None:
    """A run of one engine and number of ranks, cut, and finished by each of the others."""
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


def test_another_engine_on_fewer_ranks_goes_on_with_the_run(tmp_path):
    goes_on_elsewhere(tmp_path, ("zero2", 2), [("fsdp2", 1)])


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_every_engine_on_any_ranks_goes_on_with_the_run_of_any_other(tmp_path):
    goes_on_elsewhere(tmp_path / "a", ("zero2", 4), [("fsdp2", 1), ("ddp", 2), ("zero3", 3)])


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_what_sharded_engines_save_goes_on_under_zero_1_and_2(tmp_path):
    goes_on_elsewhere(tmp_path / "a", ("fsdp2", 3), [("zero2", 2), ("zero1", 4)])
    goes_on_elsewhere(tmp_path / "b", ("zero3", 2), [("zero1", 3), ("fsdp2", 2)])


def train_and_die(argv: list[str], step: int) -> None:
    """Trains; kill -9 while `step` is computed, when the data of the next one are read."""
    opened = pretrain.train.open_train

    def open_deadly(*args, **options):
        data = opened(*args, **options)
        take = data.take

        def take_or_die(position: int, count: int):
            if position >= SEQUENCES * step:
                os.kill(os.getpid(), signal.SIGKILL)
            return take(position, count)

        data.take = take_or_die
        return data

    pretrain.train.open_train = open_deadly
    train_here(argv)


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_killed_three_times_the_same_engine_goes_on_to_the_bit(tmp_path, engine, precision):
    """Saved after every third step, killed in steps 2 (nothing is saved yet), 5 and 10 (the save may be under way)."""
    flags = [*ENGINES[engine], "--engine.precision", precision]
    assert run_ranks(2, train_here, flags_of(tmp_path, "straight", *flags, saved_every=3)) == [0, 0]
    for step in (2, 5, 10):
        with pytest.raises(RuntimeError, match="died"):
            run_ranks(2, train_and_die, flags_of(tmp_path, "killed", *flags, saved_every=3), step)
        assert records(tmp_path / "runs" / "killed")[-1]["step"] <= step
    assert run_ranks(2, train_here, flags_of(tmp_path, "killed", *flags, saved_every=3)) == [0, 0]
    assert curve(tmp_path / "runs" / "killed") == curve(tmp_path / "runs" / "straight")
    assert final_bytes(tmp_path / "runs" / "killed") == final_bytes(tmp_path / "runs" / "straight")
