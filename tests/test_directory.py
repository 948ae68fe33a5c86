"""The folder of a run: one job at a time, and its state on disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import train
from pretrain.run.directory import Locked, RunDirectory, read_state
from tests.ranks import run_ranks
from tests.test_indexed import documents, write
from tests.test_train import curve, records, run_of, train_here


def test_a_folder_serves_one_job_and_a_dead_job_frees_it(tmp_path):
    first = RunDirectory(tmp_path / "r")
    with pytest.raises(Locked, match=f"in use by process {os.getpid()} on"):
        RunDirectory(tmp_path / "r")
    del first
    code = f"""
import os, pathlib
from pretrain.run.directory import RunDirectory
RunDirectory(pathlib.Path({str(tmp_path / "r")!r}))
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    RunDirectory(tmp_path / "r")


def test_the_state_file_is_replaced_completely(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_state("running")
    directory.write_state("stopped", exit_status=75, step=7, reason="why")
    state = json.loads((tmp_path / "run_state.json").read_text())
    assert (state["status"], state["exit_status"], state["step"], state["reason"]) == ("stopped", 75, 7, "why")
    assert {path.name for path in tmp_path.iterdir()} == {"run_state.json", "run.lock"}


def test_a_start_removes_the_unfinished_writes_of_killed_jobs_and_nothing_else(tmp_path):
    for name in (".run_state.json.7.tmp", ".config.yaml.8.tmp", "notes.tmp", "metrics.jsonl"):
        (tmp_path / name).write_text("x")
    RunDirectory(tmp_path, silent=True)
    assert (tmp_path / ".config.yaml.8.tmp").exists()
    RunDirectory(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "notes.tmp", "run.lock"]


# ---------------------------------------------------------------- what other programs do to a folder in use


def without_locks_of_folders(monkeypatch) -> None:
    """As on NFS, where flock needs a file that is open for writing."""
    flock = fcntl.flock

    def files_only(file, operation):
        if stat.S_ISDIR(os.fstat(file if isinstance(file, int) else file.fileno()).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", files_only)


def test_removing_the_lock_file_lets_no_second_job_in(tmp_path):
    first = RunDirectory(tmp_path / "r")
    (tmp_path / "r" / "run.lock").unlink()
    with pytest.raises(Locked, match="in use by another job"):
        RunDirectory(tmp_path / "r")
    assert first.check() == "" and (tmp_path / "r" / "run.lock").exists()
    with pytest.raises(Locked, match=f"in use by process {os.getpid()} on"):
        RunDirectory(tmp_path / "r")


def test_without_locks_of_folders_a_removed_lock_is_taken_again_or_the_first_job_gives_way(tmp_path, monkeypatch):
    without_locks_of_folders(monkeypatch)
    first = RunDirectory(tmp_path / "r")
    (tmp_path / "r" / "run.lock").unlink()
    assert first.check() == ""
    with pytest.raises(Locked, match=f"in use by process {os.getpid()} on"):
        RunDirectory(tmp_path / "r")
    (tmp_path / "r" / "run.lock").unlink()
    second = RunDirectory(tmp_path / "r")
    second.write_state("running")
    with pytest.raises(Locked):
        first.check()
    first.write_end(73, "must not be written")
    assert read_state(tmp_path / "r")["status"] == "running" and second.check() == first.check() == ""


def test_a_file_system_that_numbers_files_anew_is_no_loss(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path / "r")
    monkeypatch.setattr(os.path, "samestat", lambda one, other: False)
    assert directory.check() == "" and directory.lost == ""


def test_a_folder_that_was_renamed_and_taken_by_another_job_is_left_to_it(tmp_path):
    first = RunDirectory(tmp_path / "r")
    (tmp_path / "r").rename(tmp_path / "old")
    second = RunDirectory(tmp_path / "r")
    second.write_state("running")
    with pytest.raises(Locked):
        first.check()
    first.write_end(73, "must not be written")
    assert read_state(tmp_path / "r")["status"] == "running"


def at_step(monkeypatch, number: int, act) -> None:
    """Calls `act` in the midst of step `number` of the run."""
    step, count = train.train_step, iter(range(1, 1000))

    def with_act(*given):
        if next(count) == number:
            act()
        return step(*given)

    monkeypatch.setattr(train, "train_step", with_act)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[dict]:
    """The curve of an undisturbed run."""
    from tests.test_train import TINY

    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "tiny.yaml").write_text(TINY)
    tiny = ["--config", str(folder / "tiny.yaml"), "--run.directory", str(folder)]
    assert train_here(tiny) == 0
    return curve(run_of(tiny))


@pytest.mark.parametrize("act", [Path.unlink, lambda path: shutil.copyfile("README.md", path.with_name("x")).replace(path)])
def test_a_run_whose_metrics_are_removed_or_replaced_loses_no_record(tiny, monkeypatch, expected, act):
    at_step(monkeypatch, 9, lambda: act(run_of(tiny) / "metrics.jsonl"))
    assert train_here(tiny) == 0
    assert curve(run_of(tiny)) == expected and "put back" in (run_of(tiny) / "console.log").read_text()


def overwritten(path: Path) -> None:
    with path.open("r+") as file:
        file.seek(400)
        file.write("#")


@pytest.mark.parametrize(("act", "lost"), [(lambda path: os.truncate(path, 0), 9), (overwritten, 1)])
def test_a_run_whose_metrics_are_emptied_or_damaged_ends_with_74_and_its_last_checkpoint(
    tiny, monkeypatch, expected, act, lost
):
    at_step(monkeypatch, 9, lambda: act(run_of(tiny) / "metrics.jsonl"))
    assert train_here(tiny) == 74
    state = read_state(run_of(tiny))
    assert (state["exit_status"], state["step"], state["saved_step"]) == (74, 20, 20) and "metrics.jsonl" in state["reason"]
    assert (run_of(tiny) / "checkpoints" / "step_00000020").is_dir()
    lines = (run_of(tiny) / "metrics.jsonl").read_text().splitlines()
    assert len(lines) >= len(expected) + 1 - lost and json.loads(lines[-1])["step"] == 20


@pytest.mark.parametrize("act", [lambda path: path.rename(path.with_name("moved")), shutil.rmtree])
def test_a_run_whose_folder_is_renamed_or_removed_saves_in_a_new_one_and_the_same_command_resumes(
    tiny, monkeypatch, capsys, expected, act
):
    with monkeypatch.context() as patch:
        at_step(patch, 9, lambda: act(run_of(tiny)))
        assert train_here(tiny) == 74
    state, error = read_state(run_of(tiny)), capsys.readouterr().err
    assert (state["exit_status"], state["step"], state["saved_step"]) == (74, 10, 10)
    assert f"{run_of(tiny)} was removed or renamed" in error and ("(now " in error) == (act is not shutil.rmtree)
    assert {"config.yaml", "environment.json", "metrics.jsonl"} <= set(os.listdir(run_of(tiny)))
    assert train_here(tiny) == 0 and curve(run_of(tiny)) == expected
    if act is not shutil.rmtree:
        assert (run_of(tiny).with_name("moved") / "checkpoints" / "step_00000004").is_dir()


def test_a_run_under_a_file_system_that_becomes_read_only_ends_with_74_and_a_reason(tiny, monkeypatch, capsys):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    at_step(monkeypatch, 9, lambda: [monkeypatch.setattr(os, name, read_only) for name in ("mkdir", "replace", "rename")])
    assert train_here(["--checkpoint.asynchronous", "false", *tiny]) == 74
    error = capsys.readouterr().err
    assert "could not be saved" in error or "no checkpoint can be saved" in error
    assert "run_state.json cannot be written" in error and "Traceback" not in error
    assert len(records(run_of(tiny))) > 9


@pytest.mark.parametrize("act", [Path.unlink, lambda path: path.write_text("")])
def test_a_lock_file_that_is_removed_or_emptied_does_not_disturb_the_run(tiny, monkeypatch, expected, act):
    at_step(monkeypatch, 9, lambda: act(run_of(tiny) / "run.lock"))
    assert train_here(tiny) == 0 and curve(run_of(tiny)) == expected


def test_a_run_whose_place_another_job_takes_ends_with_73_and_writes_nothing_more(tiny, monkeypatch):
    without_locks_of_folders(monkeypatch)
    taken = []

    def take():
        (run_of(tiny) / "run.lock").unlink()
        taken.append(RunDirectory(run_of(tiny)))
        taken[0].write_state("running")

    at_step(monkeypatch, 9, take)
    assert train_here(tiny) == 73
    assert read_state(run_of(tiny))["status"] == "running" and read_state(run_of(tiny))["attempt"] == 2


def test_what_a_save_records_after_another_job_has_taken_the_place_is_not_written(tmp_path, monkeypatch):
    """Before the next step has found out."""
    without_locks_of_folders(monkeypatch)
    first = RunDirectory(tmp_path)
    first.write_state("running", step=8)
    (tmp_path / "run.lock").unlink()
    first.write_state("running", step=8, saved_step=4)
    assert read_state(tmp_path)["saved_step"] == 4, "nobody has the place"
    second = RunDirectory(tmp_path)
    second.write_state("running", step=5)
    first.write_state("running", step=8, saved_step=8)
    first.mirrored(8)
    first.write_text("plan.json", "of the first")
    assert (read_state(tmp_path)["attempt"], read_state(tmp_path)["step"]) == (2, 5)
    assert not (tmp_path / "plan.json").exists()
    with pytest.raises(Locked):
        first.check()


def truncated(path: Path) -> None:
    os.truncate(path, 40)


def with_a_large_id(path: Path) -> None:
    """Everywhere, and in place."""
    with path.open("r+b") as file:
        file.write(b"\xfe\xff" * (path.stat().st_size // 2))


@pytest.mark.parametrize(
    ("act", "end", "status", "words"),
    [
        (truncated, ".idx", 74, ["text.idx", "truncated while in use"]),
        (truncated, ".bin", 74, ["text.bin", "truncated while in use"]),
        (with_a_large_id, ".bin", 2, ["text.bin", "rewritten while in use"]),
    ],
)
def test_token_files_that_are_damaged_under_a_run_end_it_with_a_status_and_a_reason(
    tiny, tmp_path, monkeypatch, act, end, status, words
):
    write(tmp_path / "text", documents([30] * 200), vocab_size=100)
    (tmp_path / "text.json").unlink()
    data = ["--data.synthetic", "null", "--data.document_mask", "true", "--model.vocab_size", "100"]
    at_step(monkeypatch, 9, lambda: act(tmp_path / f"text{end}"))
    assert train_here([*data, "--data.train", f"[{{path: {tmp_path / 'text'}}}]", *tiny]) == status
    state = read_state(run_of(tiny))
    assert state["exit_status"] == status and 9 <= state["step"] <= 11 and state["saved_step"] in (4, 8)
    assert all(word in state["reason"] for word in words)


def lose_the_folder_at_step_9(argv: list[str]) -> int:
    """Trains; rank 0 renames the run's folder in the midst of step 9."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "0":
            at_step(patch, 9, lambda: run_of(argv).rename(run_of(argv, "moved")))
        return train_here(argv)


def test_all_ranks_stop_and_save_when_rank_0_finds_its_folder_lost(tiny):
    assert run_ranks(2, lose_the_folder_at_step_9, tiny) == [74, 74]
    assert (run_of(tiny) / "checkpoints" / "step_00000010" / "manifest.json").exists()
    assert read_state(run_of(tiny))["saved_step"] == 10


def test_the_state_names_the_last_step_that_was_made_whatever_ends_the_run(tiny, monkeypatch):
    """With checkpoints of every 4th step: 11 and not 8."""
    for kind, status in ((OSError, 74), (ValueError, None)):

        def fail(kind=kind):
            raise kind(errno.EIO, "planted")

        with monkeypatch.context() as patch, contextlib.suppress(ValueError):
            at_step(patch, 12 if status else 4, fail)  # the second start resumes after step 8
            assert train_here(tiny) == status
        state = read_state(run_of(tiny))
        assert (state["exit_status"], state["step"], state["saved_step"]) == (status or 1, 11, 8)
