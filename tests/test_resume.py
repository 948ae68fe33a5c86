"""A run starts at the right step: from its own or another run's checkpoint, with fewer steps, or with files missing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import shutil
import stat
import time
from pathlib import Path

from pretrain.config import load
from pretrain.run.directory import read_state
from pretrain.run.parts import open_parts
from pretrain.run.preflight import resume_findings
from pretrain.run.progress import read_saved
from tests.test_train import curve, records, run_of, train_here

FEWER = "[train.max_steps]"


def steps_saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def begins(run: Path) -> list[str]:
    """The first console line of every start, after the name of the run."""
    return [line.partition("/tiny")[2] for line in (run / "console.log").read_text().splitlines() if "  run        " in line]


def test_resuming_from_an_earlier_checkpoint_puts_later_ones_aside_and_the_same_command_resumes(tiny):
    run = run_of(tiny)
    assert train_here(["--checkpoint.keep_last", "3", *tiny]) == 0
    straight = curve(run)
    assert steps_saved(run) == ["step_00000012", "step_00000016", "step_00000020"]
    back = ["--checkpoint.resume", str(run / "checkpoints" / "step_00000012"), *tiny]
    (run / "STOP").touch()
    assert train_here(back) == 130 and len(steps_saved(run)) == 3  # nothing is done before it trains
    (run / "STOP").unlink()
    assert train_here(back) == 0
    assert curve(run) == straight and read_state(run)["saved_step"] == 20
    assert steps_saved(run) == ["left-step_00000016", "left-step_00000020", "step_00000016", "step_00000020"]
    assert train_here(back) == 0
    assert begins(run) == ["", ", resuming after step 12", ", resuming after step 20"]


def test_a_run_may_start_from_a_checkpoint_of_another_and_the_same_command_resumes(tiny, capsys):
    assert train_here(tiny) == 0
    parent, child = run_of(tiny), run_of(tiny, "tiny_child")
    there = ["--checkpoint.resume", str(parent / "checkpoints" / "step_00000016"), "--run.name", "tiny_child", *tiny]
    assert train_here(there) == 0 and train_here(there) == 0
    assert begins(child) == ["_child, resuming after step 16", "_child, resuming after step 20"]
    assert records(child)[0]["reference_lines"] == records(parent)[0]["reference_lines"]  # validation lines show them
    assert curve(child) == [record for record in curve(parent) if record["step"] > 16]
    capsys.readouterr()
    other = ["--checkpoint.resume", str(parent / "checkpoints" / "step_00000020"), "--run.name", "tiny_child", *tiny]
    assert train_here(other) == 2 and "has checkpoints of its own" in capsys.readouterr().err


def test_a_run_that_starts_from_the_checkpoint_of_another_is_a_new_run_at_wandb(tiny, monkeypatch):
    known = []

    def no_wandb(run):
        known.append(run.id)
        return contextlib.nullcontext(lambda step, values: None)

    monkeypatch.setattr("pretrain.report.trackers.WandbRun.open", no_wandb)
    tiny = ["--log.sinks", "[console, jsonl, wandb]", *tiny]
    saved = run_of(tiny) / "checkpoints" / "step_00000016"
    assert train_here(tiny) == train_here(tiny) == train_here(["--checkpoint.resume", str(saved), *tiny]) == 0
    assert train_here(["--checkpoint.resume", str(saved), "--run.name", "tiny_child", *tiny]) == 0
    assert known[0] == known[1] == known[2] != known[3]


def test_time_between_starts_lowers_the_goodput_of_the_same_run_alone(tiny, monkeypatch):
    assert train_here(["--train.max_steps", "16", *tiny]) == 0
    there = ["--checkpoint.resume", str(run_of(tiny) / "checkpoints" / "step_00000016"), "--run.name", "tiny_child", *tiny]

    def a_million_seconds_earlier(found):
        state = read_saved(found)
        state["progress"]["started"] -= 1e6
        return state

    monkeypatch.setattr("pretrain.run.state.read_saved", a_million_seconds_earlier)
    longer = ["--checkpoint.allow_changes", FEWER]
    assert train_here([*longer, *there]) == 0 and train_here([*longer, *tiny]) == 0
    goodput = {run: records(run)[-2]["goodput"] for run in (run_of(tiny), run_of(tiny, "tiny_child"))}
    assert goodput[run_of(tiny)] < 1e-3 < goodput[run_of(tiny, "tiny_child")]


def test_a_validation_between_two_logging_lines_has_the_tokens_of_its_own_step(tiny):
    assert train_here(["--log.every_steps", "10", "--evaluate.every_steps", "4", *tiny]) == 0
    found = [record for record in records(run_of(tiny)) if "val_loss" in record]
    batch = load(tiny).batch.global_batch_size * load(tiny).data.sequence_length
    assert [record["step"] for record in found] == [4, 8, 12, 16, 20]
    assert [record["tokens"] for record in found] == [batch * record["step"] for record in found]


def test_fewer_steps_than_the_checkpoint_has_are_refused(tiny, capsys):
    assert train_here(tiny) == 0
    assert train_here(["--train.max_steps", "8", "--checkpoint.allow_changes", FEWER, *tiny]) == 2
    assert "asks for 8 steps, but the checkpoint is already at step 20" in capsys.readouterr().err


def test_a_finished_run_whose_metrics_were_removed_is_still_done(tiny):
    assert train_here(tiny) == 0
    (run_of(tiny) / "metrics.jsonl").unlink()
    assert train_here(tiny) == 0
    assert read_state(run_of(tiny))["status"] == "done" and records(run_of(tiny))[0]["reference_lines"]


def test_a_run_whose_checkpoints_were_removed_is_refused_and_keeps_its_records(tiny, capsys):
    assert train_here(tiny) == 0
    run, before = run_of(tiny), curve(run_of(tiny))
    shutil.rmtree(run / "checkpoints")
    config = load(tiny)
    assert [each.name for each in resume_findings(config, open_parts(config), run / "checkpoints")] == ["resume-refused"]
    assert train_here(tiny) == 2 and "step 20 was saved" in capsys.readouterr().err
    assert curve(run) == before and read_state(run)["saved_step"] == 20
    gc.collect()  # else the error still holds the lock of the folder
    assert train_here(["--checkpoint.resume", "never", *tiny]) == 0 and curve(run) == before


def test_the_state_is_that_of_this_start_and_not_of_an_earlier_one(tiny, monkeypatch):
    assert train_here(tiny) == 0
    for path in (run_of(tiny) / "checkpoints").iterdir():
        path.rename(run_of(tiny) / path.name)
    seen = []
    monkeypatch.setattr("pretrain.run.output.announce", lambda run, *_: seen.append(read_state(run.directory.path)))
    assert train_here(["--checkpoint.resume", "never", *tiny]) == 0
    assert (seen[0]["status"], seen[0]["step"], seen[0]["saved_step"]) == ("running", 0, None)


def test_tokens_per_second_of_an_interval_with_a_stop_count_the_time_before_it(tiny, monkeypatch):
    """A step takes at least 20 ms here, whatever the machine: 128 tokens per step are at most 6,400 per second."""
    from pretrain import train

    step = train.train_step

    def slow_step(*given):
        time.sleep(0.02)
        return step(*given)

    monkeypatch.setattr(train, "train_step", slow_step)
    tiny = ["--log.every_steps", "20", "--checkpoint.every_steps", "19", "--evaluate.every_steps", "0", *tiny]
    assert train_here(tiny) == 0
    last = run_of(tiny) / "checkpoints" / "step_00000020"
    last.rename(run_of(tiny) / "gone")
    assert train_here(tiny) == 0
    line = next(record for record in records(run_of(tiny)) if record["step"] == 20 and "loss" in record)
    assert line["tokens_per_second"] < 6400 and line["train_hours"] * 3600 > 0.4


def test_a_run_trains_with_a_warning_on_a_file_system_without_locks_and_folder_syncs(tiny, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    def files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(os, "fsync", files_only)
    (run_of(tiny)).mkdir(parents=True)
    (run_of(tiny) / "metrics.jsonl").write_text("{}\n")  # must be removed
    assert train_here(tiny) == 0 and (run_of(tiny) / "checkpoints" / "step_00000020").is_dir()
    assert "has no locks (Function not implemented)" in capsys.readouterr().err


def test_the_preflight_checks_the_checkpoint_that_the_run_would_resume(tiny):
    assert train_here(tiny) == 0
    saved = run_of(tiny) / "checkpoints"

    def found(*flags: str) -> list[str]:
        config = load(["--train.max_steps", "18", "--checkpoint.allow_changes", FEWER, *flags, *tiny])
        return [each.text for each in resume_findings(config, open_parts(config), saved)]

    assert len(found()) == 1 and "already at step 20" in found()[0]
    assert found("--checkpoint.resume", str(saved / "step_00000016")) == []
    assert "is not the folder of a complete checkpoint" in found("--checkpoint.resume", str(saved / "step_00000001"))[0]
