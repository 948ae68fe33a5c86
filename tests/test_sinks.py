"""Every record reaches metrics.jsonl and the console; other ranks write nothing; no failing output stops the run."""

from __future__ import annotations

import contextlib
import io
import math
import os
import random
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.config import LogConfig, WandbConfig
from pretrain.report import sinks as sinks_module
from pretrain.report import trackers
from pretrain.report.records import read_records
from pretrain.report.sinks import Sinks, open_sinks
from pretrain.report.units import human_count, human_seconds
from tests.test_progress import Terminal
from tests.test_records import ROOT, disk  # noqa: F401 (used by test_trackers; a fixture)


def outputs(directory: Path, *names: str, mode: str = "offline", **options) -> Sinks:
    """The sinks `names` of a run in `directory`."""
    config = LogConfig(sinks=list(names), wandb=WandbConfig(mode=mode))
    defaults = {"rank": 0, "name": "t", "settings": {}, "total_steps": 1000, "resume_step": 0, "wandb_id": None}
    return open_sinks(config, directory, **defaults | options)


def step_record(step: int) -> dict:
    generator = random.Random(step)
    return {"step": step, "loss": generator.uniform(2, 9), "lr": generator.random() * 1e-3, "tokens": step * 123_456_789_012}


def test_other_ranks_write_nothing(tmp_path, capsys):
    with outputs(tmp_path / "run", "console", "jsonl", "wandb", "tensorboard", rank=1) as sinks:
        sinks.log({"step": 1, "loss": 1.0, "generated": [{"prompt": "a", "text": "b"}]})
        sinks.image("loss", tmp_path / "x.png")
        sinks.info("a line")
        sinks.progress(1)
        sinks.sync()
    assert (sinks.wandb_id, sinks.lacks_start, sinks.keeps_metrics) == (None, False, False)
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_resuming_cuts_metrics_and_appends_even_if_a_start_without_jsonl_came_between(tmp_path, capsys):
    with outputs(tmp_path, "jsonl") as sinks:
        assert sinks.lacks_start
        sinks.log({"step": 0, "reference_lines": {"uniform": 8.0}})
        for step in range(10, 101, 10):
            sinks.log(step_record(step))
    with outputs(tmp_path, "console", resume_step=50) as sinks:
        assert not sinks.keeps_metrics and not sinks.lacks_start
    assert "removed 5 lines" in capsys.readouterr().out
    with outputs(tmp_path, "jsonl", resume_step=50) as sinks:
        assert sinks.keeps_metrics and not sinks.lacks_start
        sinks.log(step_record(60))
    assert [record["step"] for record in read_records(tmp_path)] == [0, 10, 20, 30, 40, 50, 60]


def test_a_full_disk_is_reported_once_and_costs_no_record(tmp_path, capsys, disk):  # noqa: F811
    with outputs(tmp_path, "jsonl", "console") as sinks:
        disk(10)
        for step in (1, 2):
            sinks.log({"step": step, "loss": 1.0})
        sinks.sync()  # reports but does not raise: the checkpoint that follows matters more
        disk(None)
        sinks.sync()
    output = capsys.readouterr().out
    assert output.count("metrics.jsonl cannot be written") == output.count("metrics.jsonl is not on the disk yet") == 1
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2]


def test_closing_with_records_that_never_reached_the_disk_is_an_error(tmp_path, disk):  # noqa: F811
    sinks = outputs(tmp_path, "jsonl")
    disk(300)  # enough for console.log, which does not show such a record
    sinks.log({"step": 1, "tokens_per_source": list(range(100))})
    with pytest.raises(OSError):
        sinks.close()


def test_the_curve_is_on_the_disk_before_the_checkpoint_that_it_led_to(tmp_path, monkeypatch):
    from pretrain.checkpoint import storage
    from pretrain.config import load
    from pretrain.train import train

    calls, sync, commit = [], Sinks.sync, storage.commit
    monkeypatch.setattr(Sinks, "sync", lambda self: (calls.append("sync"), sync(self)))
    monkeypatch.setattr(storage, "commit", lambda *given: (calls.append("commit"), commit(*given))[1])
    flags = ["--model.hidden_size", "16", "--model.num_hidden_layers", "1", "--model.num_attention_heads", "2"]
    flags += ["--model.vocab_size", "64", "--data.synthetic.kind", "markov", "--data.sequence_length", "16"]
    flags += ["--train.max_steps", "6", "--checkpoint.every_steps", "3", "--run.directory", str(tmp_path)]
    assert train(load(flags)) == 0
    assert calls == ["sync", "commit"] * 2


def test_a_tracker_that_fails_is_reported_once_and_the_run_continues(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with outputs(tmp_path, "jsonl", "tensorboard", "console") as sinks:
        for step in range(1, 6):
            sinks.log(step_record(step))
            time.sleep(0.01)
    assert len(read_records(tmp_path)) == 5
    assert capsys.readouterr().out.count("TensorBoard disabled for the rest of this run") == 1


def test_a_tracker_that_hangs_is_abandoned(tmp_path, capsys, monkeypatch):
    hang = threading.Event()

    @contextlib.contextmanager
    def hanging(*_) -> Iterator:
        yield lambda step, values: hang.wait(60)

    monkeypatch.setattr(trackers, "open_tensorboard", hanging)
    monkeypatch.setattr(sinks_module, "TRACKER_CLOSE_SECONDS", 0.1)
    with outputs(tmp_path, "tensorboard", "console") as sinks:
        sinks.log(step_record(1))
    hang.set()
    assert "TensorBoard did not finish" in capsys.readouterr().out


# ---------------------------------------------------------------- the console


def test_console_lines_are_aligned_below_their_header(tmp_path, capsys):
    keys = {"grad_norm": 1.5, "tokens_per_second": 12_345.6, "peak_memory_gib": 71.25, "eta_seconds": 3725.0}
    with outputs(tmp_path, "console", total_steps=100_000) as sinks:
        for step in (1, 999, 100_000):
            sinks.log({"step": step, "loss": 9.2 / step, "lr": 3e-4, "mfu": 0.4321, **keys})
        sinks.log({"step": 2, "loss": 1.0, "lr": 1e-4})  # other columns: another header
    lines = capsys.readouterr().out.splitlines()
    assert {len(line) for line in lines[:4]} == {len(lines[0])}
    assert lines[1].split() == ["1/100,000", "9.2000", "3.00e-04", "1.500", "12.3k", "43.2%", "71.25GiB", "1h02m"]
    assert lines[4].split() == ["step", "loss", "lr"] and len(lines) == 6


def test_the_header_is_repeated_every_twenty_lines(tmp_path, capsys):
    with outputs(tmp_path, "console") as sinks:
        for step in range(1, 42):
            sinks.log(step_record(step))
    lines = capsys.readouterr().out.splitlines()
    assert [index for index, line in enumerate(lines) if "loss" in line] == [0, 21, 42]


def test_a_loss_that_is_not_finite_stands_out(tmp_path, capsys):
    with outputs(tmp_path, "console") as sinks:
        sinks.log({"step": 1, "loss": math.nan, "grad_norm": math.inf, "skipped_steps": 2})
    assert capsys.readouterr().out.splitlines()[-1].split()[1:] == ["nan", "inf", "2", "skipped", "LOSS", "IS", "NOT", "FINITE"]


def test_a_validation_line_has_the_reference_losses_even_after_a_resume(tmp_path, capsys):
    with outputs(tmp_path, "jsonl") as sinks:
        sinks.log({"step": 0, "reference_lines": {"uniform": math.log(4096), "unigram": 6.25}})
        sinks.log(step_record(5))
    with outputs(tmp_path, "console", "jsonl", resume_step=5) as sinks:
        sinks.log({"step": 1000, "val_loss": 3.0, "val_perplexity": 20.0855, "val_bits_per_byte": 1.25, "val_loss/code": 2.5})
    assert capsys.readouterr().out.strip() == (
        "validation at step 1,000: loss 3.0000  perplexity 20.09  bits per byte 1.2500  by source: code 2.5000"
        "  (uniform 8.3178, unigram 6.2500)"
    )


def test_console_log_is_kept_over_resumes_and_without_the_console_sink(tmp_path, capsys):
    for step in (0, 1):
        with outputs(tmp_path, "jsonl", resume_step=step) as sinks:
            sinks.info(f"start {step}\nsecond line")
    assert capsys.readouterr().out == ""
    lines = (tmp_path / "console.log").read_text().splitlines()
    assert [line.split("  ", 1)[1] for line in lines] == ["start 0", "second line", "start 1", "second line"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  start 0", lines[0])


def test_a_reader_of_standard_output_that_exits_does_not_end_the_run(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with outputs(tmp_path, "jsonl", "console") as sinks:
            for step in range(1, 21):
                sinks.log(step_record(step))
        print("what is printed later does not fail, either", flush=True)
        monkeypatch.undo()
    assert len(read_records(tmp_path)) == 20
    assert (tmp_path / "console.log").read_text().count("Standard output was closed") == 1


def test_without_a_standard_output_the_lines_are_in_console_log(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python does if it was closed before the start
    with outputs(tmp_path, "console", "jsonl") as sinks:
        sinks.info("a line")
    assert "a line" in (tmp_path / "console.log").read_text()


def test_an_ascii_terminal_shows_question_marks_for_other_characters(tmp_path, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    with outputs(tmp_path, "console") as sinks:
        sinks.info("模型 é")
    assert stdout.buffer.getvalue() == b"?? ?\n"


def test_on_a_terminal_the_bar_is_below_complete_lines(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal.file)
    with outputs(tmp_path, "console") as sinks:
        for step in range(1, 501):
            sinks.progress(step)
            if step % 100 == 0:
                sinks.log({"step": step, "loss": 1.0, "lr": 1e-3, "eta_seconds": 3725.0})
                time.sleep(0.15)  # the bar is redrawn every 0.1 s at most
    print("end")
    monkeypatch.undo()
    output = terminal.close()
    assert re.search(r"% \|.*\| step \d+/1000, 1h0[12]m left", output)
    screen = [line.split("\r")[-1] for line in output.replace("\r\n", "\n").splitlines()]  # what remains of each line
    lines = [line for line in screen if "/1,000" in line]
    assert len(lines) == 5 and all(re.fullmatch(r" *[\d,]+/1,000 +1\.0000 +1\.00e-03 +1h02m", line) for line in lines)
    assert screen[-1] == "end"


COUNTS = {
    0: "0",
    999.4: "999",
    999.6: "1.00k",
    12_345: "12.3k",
    99_960: "100k",
    999_600: "1.00M",
    7e9: "7.00B",
    1.25e12: "1.25T",
}
SECONDS = {
    0.4: "0s",
    59.6: "1m00s",
    725: "12m05s",
    3599.7: "1h00m",
    3725: "1h02m",
    273_700: "3d04h",
    math.inf: "?",
    math.nan: "?",
}


def test_counts_and_durations_are_short():
    assert {value: human_count(value) for value in COUNTS} == COUNTS
    assert {value: human_seconds(value) for value in SECONDS} == SECONDS
