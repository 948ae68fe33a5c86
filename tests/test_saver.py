"""Saves in the background equal those in the foreground, run one at a time, and report failures without stopping the run."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import storage
from pretrain.checkpoint.manifest import checkpoints
from pretrain.checkpoint.saver import FAILED, GIVE_UP, WRITTEN, Saver
from pretrain.checkpoint.storage import NotFinite
from pretrain.config import CheckpointConfig, EngineConfig
from pretrain.engines.base import Engine
from pretrain.engines.shards import Shard
from tests.ranks import run_ranks
from tests.saving import save
from tests.test_checkpoint import make_engine, take_steps


def make_saver(folder: Path, engine: Engine, messages: list[str] | None = None, **settings) -> Saver:
    messages = [] if messages is None else messages
    config = CheckpointConfig(**settings)
    return Saver(folder, engine, config, lambda saved: messages.append(f"saved {saved.step}"), messages.append)


def step_boundary(saver: Saver) -> None:
    """Does what the loop does at the end of a step, on one process."""
    saver.settle(saver.votes())


class Gate:
    """Blocks the writing thread until it is opened."""

    def __init__(self, monkeypatch):
        self.opened, self.entered, write = threading.Event(), threading.Event(), storage.write_part

        def wait_and_write(*args) -> None:
            self.entered.set()
            assert self.opened.wait(30)
            write(*args)

        monkeypatch.setattr(storage, "write_part", wait_and_write)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_background_save_equals_a_foreground_save_to_the_byte_even_if_training_continues_meanwhile(tmp_path, monkeypatch):
    engine = make_engine()
    take_steps(engine, 2)
    state = {"val_loss": None, "progress": {"step": 2}}
    with make_saver(tmp_path / "foreground", engine, asynchronous=False) as saver:
        saver.save(2, state, last=False)
    monkeypatch.setattr(storage, "MAX_FILE_BYTES", 2048)
    save(tmp_path / "small files", 2, engine, state)
    gate = Gate(monkeypatch)
    for name, size in (("small files", 2048), ("foreground", 1 << 30)):
        monkeypatch.setattr(storage, "MAX_FILE_BYTES", size)
        gate.opened.clear()
        twin = make_engine()
        take_steps(twin, 2)
        with make_saver(tmp_path / "background" / name, twin) as saver:
            saver.save(2, state, last=False)
            state["progress"]["step"] = 3
            take_steps(twin, 1)  # the thread has not written a byte, and the weights change
            gate.opened.set()
        state["progress"]["step"] = 2
        assert content(tmp_path / "background" / name) == content(tmp_path / name)


def test_nothing_is_acknowledged_before_it_is_durable_and_agreed(tmp_path, monkeypatch):
    gate, messages, engine = Gate(monkeypatch), [], make_engine()
    with make_saver(tmp_path, engine, messages) as saver:
        saver.save(1, {}, last=False)
        assert gate.entered.wait(30)
        step_boundary(saver)
        assert saver.votes() == [0, 0, 0, 0] and not messages and not checkpoints(tmp_path)
        gate.opened.set()
        saver._save.done.wait(30)
        assert not messages and not checkpoints(tmp_path)  # written, but not agreed on
        step_boundary(saver)
        assert messages == ["saved 1"] and saver.saved.step == 1 and saver.saved.damage() is None


def test_saves_run_one_at_a_time_and_equal_those_without_a_thread(tmp_path):
    engine = make_engine()
    for name, asynchronous in (("background", True), ("foreground", False)):
        messages: list[str] = []
        with make_saver(tmp_path / name, engine, messages, asynchronous=asynchronous, keep_last=3) as saver:
            for step in range(1, 8):
                saver.save(step, {"val_loss": None}, last=step == 7)
                assert [path.name for path in (tmp_path / name).glob(".tmp-*")] in ([], [f".tmp-step_{step:08d}"])
        assert messages == [f"saved {step}" for step in range(1, 8)]
    assert content(tmp_path / "background") == content(tmp_path / "foreground")
    assert [found.step for found in checkpoints(tmp_path / "background")] == [7, 6, 5]


def full_disk(times: int) -> Callable:
    """A write_part that fails `times` times."""
    write, left = storage.write_part, [times]

    def fail(*args) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    return fail


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_is_reported_and_three_in_a_row_stop_the_run(tmp_path, monkeypatch, asynchronous):
    messages: list[str] = []
    saver = make_saver(tmp_path, make_engine(), messages, asynchronous=asynchronous)
    saver.save(1, {}, last=True)
    for rounds in range(2):  # two failures, then a success, which resets the count
        monkeypatch.setattr(storage, "write_part", full_disk(2))
        for step in range(3):
            saver.save(10 * rounds + step + 2, {}, last=False)
            saver.wait()
            step_boundary(saver)
        monkeypatch.undo()
    failures = [line.split(" (")[0] for line in messages if "saved" not in line]
    assert failures == [f"checkpoint of step {step} failed" for step in (2, 3, 12, 13)]
    assert "No space left" in messages[1] and "1 in a row; 3 stop the run" in messages[1]
    saver._wait_for_pruning()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000004", "step_00000014"]
    monkeypatch.setattr(storage, "write_part", full_disk(3))
    for step in (21, 22, 23):
        saver.save(step, {}, last=False)
        saver.wait()
    with pytest.raises(OSError):
        step_boundary(saver)
    assert [found.step for found in checkpoints(tmp_path)] == [14, 4]


def test_the_last_save_must_succeed(tmp_path, monkeypatch):
    saver = make_saver(tmp_path, make_engine())
    monkeypatch.setattr(storage, "write_part", full_disk(1))
    with pytest.raises(OSError, match="step 1"):
        saver.save(1, {}, last=True)
    saver.save(1, {}, last=True)
    assert saver.saved.step == 1


def test_a_disk_without_room_is_found_before_a_byte_is_written(tmp_path, monkeypatch):
    messages: list[str] = []
    saver = make_saver(tmp_path, make_engine(), messages)
    usage = type("Usage", (), {"total": 10**9, "free": 1000})
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage)
    saver.save(1, {}, last=False)
    assert len(messages) == 1 and "0.000 GiB free" in messages[0] and not list(tmp_path.iterdir())


def test_a_disk_that_makes_no_progress_ends_the_run(tmp_path, monkeypatch):
    gate, engine = Gate(monkeypatch), make_engine()
    saver = make_saver(tmp_path, engine)
    saver.save(1, {}, last=False)
    assert saver.votes() == [0, 0, 0, 0]
    saver._save._moved -= EngineConfig().timeout_seconds + 1
    assert saver.votes().index(1) == GIVE_UP
    with pytest.raises(OSError):
        step_boundary(saver)
    gate.opened.set()


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    for asynchronous in (True, False):
        engine = make_engine()
        saver = make_saver(tmp_path, engine, asynchronous=asynchronous)
        saver.save(1, {}, last=True)
        with torch.no_grad():
            next(engine.model.parameters()).view(-1)[-1] = float("nan")
        with pytest.raises(NotFinite, match=r"model/model\.embed_tokens\.weight"):
            saver.save(2, {}, last=True)
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_bug_in_the_thread_is_not_mistaken_for_a_full_disk(tmp_path, monkeypatch):
    saver = make_saver(tmp_path, make_engine())
    monkeypatch.setattr(storage, "write_part", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saver.save(1, {}, last=True)


def test_a_run_that_ends_in_an_error_leaves_no_thread_behind(tmp_path, monkeypatch):
    """A thread inside PyTorch when the interpreter exits aborts the process, and the exit status is lost."""
    monkeypatch.setattr(storage, "BLOCK", 2)  # thousands of writes
    with pytest.raises(KeyError), make_saver(tmp_path, make_engine()) as saver:
        saver.save(1, {}, last=False)
        raise KeyError
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint" and thread.is_alive()]
    assert not checkpoints(tmp_path)


def some_rank_fails(folder: Path) -> tuple[list[str], list[int], list[int]]:
    """On each rank: saves steps 1 to 3, where rank 1 fails in step 2. Returns messages, steps found, and the votes."""
    engine, messages = make_engine(), []
    write = storage.write_part
    seen = []
    with make_saver(folder, engine, messages) as saver:
        for step in (1, 2, 3):
            storage.write_part = full_disk(1) if step == 2 and engine.rank == 1 else write
            saver.save(step, {"val_loss": None}, last=False)
            while saver._save:
                sums = engine.all_reduce(torch.tensor(saver.votes())).tolist()
                saver.settle(sums)
            seen.append(sums)
    engine.barrier()
    found = [each.step for each in checkpoints(folder)]
    engine.close()
    return messages, found, [sums.index(max(sums)) if max(sums) == 2 else sums[FAILED] for sums in seen]


def test_all_ranks_commit_or_none_and_the_run_continues(tmp_path):
    (messages, found, seen), (messages_1, found_1, seen_1) = run_ranks(2, some_rank_fails, tmp_path)
    assert found == found_1 == [3, 1] and seen == seen_1 == [WRITTEN, 1, WRITTEN]
    assert messages[0] == "saved 1" and messages[2] == "saved 3" and not messages_1
    assert "checkpoint of step 2 failed" in messages[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def test_the_copy_of_the_state_is_allocated_before_the_first_save_and_only_for_saves_in_the_background(tmp_path):
    engine = make_engine()
    for settings in (dict(every_steps=0), dict(every_steps=1, asynchronous=False)):
        assert make_saver(tmp_path, engine, **settings)._snapshot.buffers == []
    with make_saver(tmp_path, engine, every_steps=1) as saver:
        buffers = [buffer.data_ptr() for buffer in saver._snapshot.buffers]
        assert sum(map(len, saver._snapshot.buffers)) == sum(shard.values.numel() for shard in engine.shards(saving=True))
        saver.save(1, {}, last=False)
        assert [buffer.data_ptr() for buffer in saver._snapshot.buffers] == buffers


def test_the_state_of_a_device_is_written_through_one_pinned_block(tmp_path, monkeypatch):
    """A file of live memory that is not on the host: here values that only say so."""

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda", 0)

    asked, allocate = [], torch.empty
    monkeypatch.setattr(storage, "BLOCK", 64)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory: (asked.append((size, pin_memory)), allocate(*size))[1])
    values = torch.arange(200.0)
    shards = [Shard(f"model/{name}", (200,), 0, values.as_subclass(Elsewhere)) for name in "ab"]
    content = b"".join(bytes(block) for block in storage._blocks(b"", shards))
    assert content == 2 * values.numpy().tobytes() and asked == [((64,), True)]
