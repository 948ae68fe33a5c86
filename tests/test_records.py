"""metrics.jsonl loses no record and no bit, whatever kills the process or fills the disk."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pretrain.report import records
from pretrain.report.records import LineFile, Losses, RecordsError, cut_records, read_records, to_json

ROOT = Path(__file__).resolve().parents[1]


def write(directory: Path, *records: dict) -> Path:
    path = directory / "metrics.jsonl"
    path.write_text("".join(to_json(record) + "\n" for record in records))
    return path


def test_every_float_is_read_back_to_the_last_bit(tmp_path):
    generator = random.Random(0)
    values = [struct.unpack("<d", generator.randbytes(8))[0] for _ in range(2000)]
    values += [5e-324, 1.7976931348623157e308, 0.1 + 0.2, -0.0]
    values = [value for value in values if math.isfinite(value)]
    write(tmp_path, *({"step": step, "loss": value} for step, value in enumerate(values, start=1)))
    assert [record["loss"].hex() for record in read_records(tmp_path)] == [value.hex() for value in values]


def test_nan_and_infinity_are_valid_json_and_are_read_back_at_any_depth(tmp_path):
    record = {"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 1e-3, "val_loss/a.b": -math.inf, "by": {"c": math.nan}}
    path = write(tmp_path, record)
    written = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert written == {"step": 1, "loss": None, "grad_norm": None, "lr": 1e-3, "val_loss/a.b": None, "by": {"c": None}} | {
        "nonfinite": {"loss": "nan", "grad_norm": "inf", "val_loss/a.b": "-inf", "by.c": "nan"}
    }
    assert repr(read_records(tmp_path)) == repr([record])  # repr: NaN does not equal itself


def test_readers_ignore_one_torn_line_and_refuse_damage(tmp_path):
    assert read_records(tmp_path) == []
    path = write(tmp_path, {"step": 1, "loss": 2.0})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    assert read_records(tmp_path) == [{"step": 1, "loss": 2.0}]
    path.write_bytes(b'{"no step": 1}\n' + path.read_bytes())
    with pytest.raises(RecordsError, match=r"metrics.jsonl: 2 lines are not records"):
        read_records(tmp_path)


# ---------------------------------------------------------------- cutting


def test_cutting_keeps_earlier_records_byte_for_byte_and_removes_later_and_unreadable_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = b'{"step":0,  "reference_lines": {"uniform": 8.0}}\n{"step": 50, "loss": 1.50}\n{"step": 50, "val_loss": 3}\n'
    path.write_bytes(kept + b'{"step": null}\n[1]\n{"step": 60, "loss": 1.0}\n{"step": 110, "lo')
    assert cut_records(path, 50) == (4, {"uniform": 8.0})
    assert path.read_bytes() == kept


def test_a_validation_that_will_be_repeated_is_removed(tmp_path):
    losses = [{"step": step, "loss": 1.0} for step in (5, 10)]
    generated = {"step": 10, "generated": [{"prompt": "a", "text": "b"}]}
    path = write(tmp_path, {"step": 5, "val_loss": 2.0}, *losses, {"step": 10, "val_loss": 1.0}, generated)
    assert cut_records(path, 10, ["validation"]) == (2, None)
    assert read_records(tmp_path) == [{"step": 5, "val_loss": 2.0}, *losses]


def test_tasks_that_will_be_repeated_are_removed_without_the_validation_of_their_step(tmp_path):
    kept = [{"step": 5, "task_accuracy": 0.5}, {"step": 10, "loss": 1.0}, {"step": 10, "val_loss": 1.0}]
    path = write(tmp_path, *kept, {"step": 10, "task_accuracy": 0.75, "task/a/accuracy": 0.75})
    assert cut_records(path, 10, ["tasks"]) == (1, None)
    assert read_records(tmp_path) == kept


def test_a_last_line_torn_at_any_length_is_repaired(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step}).encode() + b"\n" for step in (1, 2)]
    for length in range(len(lines[1]) + 1):
        path.write_bytes(lines[0] + lines[1][:length])
        cut_records(path, 2)
        complete = length >= len(lines[1]) - 1  # only the line feed is missing
        assert path.read_bytes() == lines[0] + (lines[1] if complete else b"")
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_damage_in_the_middle_is_removed_and_everything_around_it_keeps_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_BLOCK_BYTES", 7)
    path = tmp_path / "metrics.jsonl"
    good = [b'{"step": %d,  "loss": 1.5}\n' % step for step in range(1, 7)]
    path.write_bytes(
        good[0] + b"\x00\x00\n" + good[1] + good[2] + b"\n\xff\n" + good[3] + b'{"step": 9, "loss": 1}\n' + good[4].strip()
    )
    assert cut_records(path, 8) == (4, None)
    assert path.read_bytes() == b"".join(good[:5])


def test_a_resume_reads_the_file_in_little_memory_and_learns_the_curve(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(1, 2001):
            file.write(json.dumps({"step": step, "loss": 1 / step, "padding": "x" * 10_000}) + "\n")
            if step % 500 == 0:
                file.write(json.dumps({"step": step, "val_loss": 2 / step}) + "\n")
    losses = Losses()
    tracemalloc.start()
    try:
        assert cut_records(path, 1500, losses=losses) == (501, None)
        assert tracemalloc.get_traced_memory()[1] < 5e6 < path.stat().st_size
    finally:
        tracemalloc.stop()
    steps, values = losses.train.columns
    assert steps.tolist() == list(range(1, 1501)) and values.tolist() == [1 / step for step in range(1, 1501)]
    assert losses.valid.columns[0].tolist() == [500, 1000, 1500]
    assert len(read_records(tmp_path)) == 1503


def test_a_long_curve_is_thinned_evenly_and_keeps_its_newest_point(monkeypatch):
    monkeypatch.setattr(records, "MOST_POINTS", 100)
    losses = Losses()
    for step in range(1, 1001):
        losses.add({"step": step, "loss": step if step % 7 else None})
    steps, values = losses.train.columns
    assert len(steps) <= 101 and set(np.diff(steps[:-1])) == {16} and steps[-1] == 1000
    assert all(value == step if step % 7 else math.isnan(value) for step, value in zip(steps, values, strict=True))


def test_a_file_with_nothing_to_cut_is_not_rewritten_and_a_fresh_start_empties_it(tmp_path):
    path = write(tmp_path, {"step": 1, "loss": 2.0})
    inode = path.stat().st_ino
    assert cut_records(path, 1) == (0, None) and path.stat().st_ino == inode
    assert cut_records(path, 0) == (1, None) and path.read_bytes() == b""


# ---------------------------------------------------------------- killed processes and full disks


def test_a_killed_process_loses_no_line(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from pretrain.report.records import LineFile
file = LineFile(Path(sys.argv[1]))
for number in range(500):
    file.append(str(number))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "lines")], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "lines").read_text().split() == [str(number) for number in range(500)]


@pytest.fixture
def disk():
    """disk(n): limits the files of this process to n bytes from now on, like a full disk; disk(None): removes the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # Python ignores the signal SIGXFSZ

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)


def test_lines_that_a_full_disk_refuses_are_written_later_in_order(tmp_path, disk):
    file = LineFile(tmp_path / "lines")
    disk(777)
    errors = [file.append(f"line {number}") for number in range(100)]
    assert sum(error is not None for error in errors) == 1  # it is reported once
    assert (tmp_path / "lines").stat().st_size == 777  # within a line
    disk(None)
    assert file.append("line 100") is None
    file.close()
    assert (tmp_path / "lines").read_text().splitlines() == [f"line {number}" for number in range(101)]


def test_syncing_or_closing_with_lines_that_never_reached_the_disk_is_an_error(tmp_path, disk):
    file = LineFile(tmp_path / "lines")
    disk(3)
    file.append("four")
    for finish in (file.sync, file.close):
        with pytest.raises(OSError):
            finish()
    file.close()  # a second time: nothing


def test_syncing_waits_for_the_disk(tmp_path, monkeypatch):
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    file = LineFile(tmp_path / "lines")
    file.append("a line")
    assert not synced
    file.sync()
    assert len(synced) == 1
    file.close()


# ---------------------------------------------------------------- other programs that change the file


def lines_of(path) -> list[str]:
    return path.read_text().splitlines()


def written(path, *lines: str) -> LineFile:
    file = LineFile(path)
    assert [file.append(line) for line in lines] == [None] * len(lines)
    return file


def test_a_removed_or_replaced_file_is_put_back_with_all_its_lines_and_nothing_of_another_is_lost(tmp_path):
    path = tmp_path / "lines"
    path.write_text("from an earlier start\n")
    file = written(path, "a", "b")
    path.unlink()
    assert "put back" in file.append("c") and lines_of(path) == ["from an earlier start", "a", "b", "c"]
    (tmp_path / "edited").write_text("something else\n")
    os.replace(tmp_path / "edited", path)
    assert "other-lines" in file.append("d") and file.append("e") is None
    assert lines_of(path)[-3:] == ["c", "d", "e"] and lines_of(tmp_path / "other-lines") == ["something else"]
    path.unlink()
    file.verify()  # no later line is needed
    file.close()
    assert len(lines_of(path)) == 6


def test_a_file_that_cannot_be_put_back_yet_is_reported_once_and_put_back_later(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    file = written(folder / "lines", "a")
    folder.rename(tmp_path / "elsewhere")
    assert "retried" in file.append("b") and file.append("c") is None
    folder.mkdir()
    assert "put back" in file.append("d")
    assert lines_of(folder / "lines") == ["a", "b", "c", "d"] and lines_of(tmp_path / "elsewhere" / "lines") == lines_of(
        folder / "lines"
    )


@pytest.mark.parametrize("left", [0, 3])
def test_lines_that_another_program_cuts_off_are_reported_at_once_and_an_error_at_the_end(tmp_path, left):
    path = tmp_path / "lines"
    file = written(path, "aa", "bb")
    os.truncate(path, left)
    assert "74" in file.append("cc") and file.append("dd") is None
    with path.open("a") as other:
        other.write("ee\n")
    assert "appended" in file.append("ff")
    with pytest.raises(OSError, match="changed it") as error:
        file.verify()
    assert error.value.errno == errno.EIO and error.value.filename == str(path)
    assert lines_of(path)[-4:] == ["cc", "dd", "ee", "ff"]


def test_a_damaged_line_is_an_error_at_the_end_and_an_appended_one_is_not(tmp_path):
    path = tmp_path / "lines"
    file = written(path, '{"step": 1}', '{"step": 2}')
    with path.open("a") as other:
        other.write('{"step": 9}\n')
    assert "appended" in file.append('{"step": 3}')
    file.verify()
    for damage, what in (("7", "changed it"), ("{", "1 of its lines cannot be read")):
        with path.open("r+") as other:
            other.seek(9)
            other.write(damage)
        with pytest.raises(OSError, match=what):
            file.verify()
