"""metrics.jsonl loses nothing and lies never; the copies equal it; no outage of a copy reaches the run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pretrain.config import LogConfig, WandbConfig
from pretrain.report.sinks import SilentSinks, Sinks, cut_metrics, human_count, human_seconds
from pretrain.report.sinks import open_sinks as sinks_of_any_rank

ROOT = Path(__file__).resolve().parents[1]
PRELUDE = """
import json, math, os, resource, signal, sys, time
from pathlib import Path
from pretrain.config import LogConfig, WandbConfig
from pretrain.report import trackers
from pretrain.report.sinks import Sinks

def open_sinks(*names, resume_step=0, mode="offline", wandb_id=None):
    config = LogConfig(sinks=list(names), wandb=WandbConfig(mode=mode))
    return Sinks(config, Path(sys.argv[1]), name="t", settings={"optimizer": {"lr": 3e-4}}, total_steps=1000,
                 resume_step=resume_step, wandb_id=wandb_id)
"""


def open_sinks(
    directory: Path, *names: str, resume_step: int = 0, total_steps: int = 1000, wandb_id: str | None = None
) -> Sinks:
    config = LogConfig(sinks=list(names), wandb=WandbConfig(mode="offline"))
    return Sinks(config, directory, name="t", settings={}, total_steps=total_steps, resume_step=resume_step, wandb_id=wandb_id)


def python(code: str, directory: Path, **options) -> subprocess.Popen:
    """A process of its own that runs PRELUDE and `code`, sys.argv[1] = directory."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("variables", {})
    arguments = [sys.executable, "-c", PRELUDE + code, str(directory)]
    return subprocess.Popen(arguments, env=environment, text=True, **options)


def on_terminal(code: str, directory: Path, **variables: str) -> str:
    """All that a process writes to its terminal of 24 lines of 100 characters; it has 60 s and must end with status 0."""
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = python(code, directory, stdin=follower, stdout=follower, stderr=follower, variables=variables)
    os.close(follower)
    killer = threading.Timer(60, process.kill)
    killer.start()
    output = b""
    with contextlib.suppress(OSError):  # Linux: the other end is closed
        while data := os.read(leader, 65536):
            output += data
    killer.cancel()
    os.close(leader)
    assert process.wait(10) == 0
    return output.decode()


def records(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def step_record(step: int) -> dict:
    generator = random.Random(step)
    return {"step": step, "loss": generator.uniform(2, 9), "lr": generator.random() * 1e-3, "tokens": step * 123_456_789_012}


# ---------------------------------------------------------------- metrics.jsonl


def test_every_float_comes_back_to_the_last_bit(tmp_path):
    generator = random.Random(0)
    values = [struct.unpack("<d", generator.randbytes(8))[0] for _ in range(2000)] + [
        5e-324,
        1.7976931348623157e308,
        0.1 + 0.2,
        -0.0,
    ]
    values = [value for value in values if math.isfinite(value)]
    with open_sinks(tmp_path, "jsonl") as sinks:
        for step, value in enumerate(values, start=1):
            sinks.log({"step": step, "loss": value})
    assert [record["loss"].hex() for record in records(tmp_path)] == [value.hex() for value in values]


def test_numbers_that_are_not_finite_are_seen_and_the_file_stays_json(tmp_path, capsys):
    with open_sinks(tmp_path, "jsonl", "console") as sinks:
        sinks.log({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 1e-3, "by": {"source": -math.inf}})
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["loss"] is None and record["grad_norm"] is None and record["by"] == {"source": None} and record["lr"] == 1e-3
    assert record["nonfinite"] == {"loss": "nan", "grad_norm": "inf", "by.source": "-inf"}
    line = capsys.readouterr().out.splitlines()[-1]
    assert "nan" in line and "inf" in line and "LOSS IS NOT FINITE" in line


def test_a_killed_process_loses_no_record_that_was_logged(tmp_path):
    code = """
sinks = open_sinks("jsonl")
for step in range(1, 501):
    sinks.log({"step": step, "loss": 1.0})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert python(code, tmp_path).wait(60) == -signal.SIGKILL
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 501))


def test_resuming_cuts_later_records_and_the_torn_line_and_keeps_the_rest_byte_for_byte(tmp_path, capsys):
    with open_sinks(tmp_path, "jsonl") as sinks:
        sinks.log({"step": 0, "reference_lines": {"uniform": 8.0}})
        for step in range(10, 101, 10):
            sinks.log(step_record(step))
            sinks.log({"step": step, "val_loss": 3.0})
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    with path.open("ab") as file:
        file.write(b'{"step": null}\n{"step": 110, "lo')
    with open_sinks(tmp_path, "jsonl", "console", resume_step=50) as sinks:
        sinks.log(step_record(60))
    assert path.read_bytes().splitlines(keepends=True)[:-1] == before[:11]
    assert [record["step"] for record in records(tmp_path)] == [0, *[step for step in range(10, 51, 10) for _ in "tv"], 60]
    assert "cut 10 records after step 50 and 2 unreadable lines" in capsys.readouterr().out


def test_every_torn_length_of_the_last_line_is_mended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step}).encode() + b"\n" for step in (1, 2)]
    for length in range(len(lines[1]) + 1):
        path.write_bytes(lines[0] + lines[1][:length])
        cut_metrics(path, 2)
        whole = length >= len(lines[1]) - 1  # all but the line feed is the whole record
        assert path.read_bytes() == lines[0] + (lines[1] if whole else b"")
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_nothing_to_cut_leaves_the_file_alone_and_a_fresh_start_empties_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n')
    inode = path.stat().st_ino
    assert cut_metrics(path, 1) == (0, 0, None) and path.stat().st_ino == inode
    assert cut_metrics(path, 0) == (1, 0, None) and path.read_bytes() == b""


def test_lines_that_a_full_disk_refuses_wait_and_come_in_order(tmp_path):
    code = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
with open_sinks("jsonl", "console") as sinks:
    resource.setrlimit(resource.RLIMIT_FSIZE, (777, hard))  # as a disk that is full after 777 bytes of a file
    for step in range(1, 101):
        sinks.log({"step": step, "loss": 1.0})
    torn = Path(sys.argv[1], "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sinks.log({"step": 101, "loss": 1.0})
print("torn at", torn)
"""
    process = python(code, tmp_path, stdout=subprocess.PIPE)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "torn at 777" in output
    assert output.count("metrics.jsonl cannot be written") == 1
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 102))


def test_closing_with_records_that_never_reached_the_disk_is_an_error(tmp_path):
    code = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sinks = open_sinks("jsonl")
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
sinks.log({"step": 1, "loss": 1.0})
try:
    sinks.close()
except OSError:
    sys.exit(74)
"""
    assert python(code, tmp_path).wait(60) == 74


def test_other_ranks_write_nothing_whatever_is_called(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = {"log": ({"step": 1, "loss": 1.0},), "image": ("loss", tmp_path / "x.png"), "info": ("a line",), "progress": (1,)}
    public = [name for name, value in vars(Sinks).items() if callable(value) and not name.startswith("_")]
    with sinks_of_any_rank(LogConfig(), tmp_path / "run", rank=1) as sinks:
        for name in public:
            getattr(sinks, name)(*calls.get(name, ()))
    assert (sinks.wandb_id, sinks.lacks_start, sinks.keeps_metrics) == (None, False, False)
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())
    assert vars(SilentSinks).keys() >= set(public)  # nothing is inherited that expects open files


# ---------------------------------------------------------------- the console


def test_console_lines_are_aligned_under_their_header(tmp_path, capsys):
    keys = {"grad_norm": 1.5, "tokens_per_second": 12_345.6, "peak_memory_gib": 71.25, "eta_seconds": 3725.0}
    with open_sinks(tmp_path, "console", total_steps=100_000) as sinks:
        for step in (1, 999, 100_000):
            sinks.log({"step": step, "loss": 9.2 / step, "lr": 3e-4, "mfu": 0.4321, **keys})
        sinks.log({"step": 2, "loss": 1.0, "lr": 1e-4})  # other columns: another header
    lines = capsys.readouterr().out.splitlines()
    assert {len(line) for line in lines[:4]} == {len(lines[0])}
    assert lines[1].split() == ["1/100,000", "9.2000", "3.00e-04", "1.500", "12.3k", "43.2%", "71.25GiB", "1h02m"]
    assert lines[4].split() == ["step", "loss", "lr"] and len(lines) == 6


def test_the_header_comes_again_every_twenty_lines(tmp_path, capsys):
    with open_sinks(tmp_path, "console") as sinks:
        for step in range(1, 42):
            sinks.log(step_record(step))
    lines = capsys.readouterr().out.splitlines()
    assert [index for index, line in enumerate(lines) if "loss" in line] == [0, 21, 42]


def test_validation_has_its_own_line_with_the_reference_lines_also_after_a_resume(tmp_path, capsys):
    with open_sinks(tmp_path, "console", "jsonl") as sinks:
        sinks.log({"step": 0, "reference_lines": {"uniform": math.log(4096), "unigram": 6.25}})
        sinks.log(step_record(5))
    capsys.readouterr()
    with open_sinks(tmp_path, "console", "jsonl", resume_step=5) as sinks:
        sinks.log({"step": 1000, "val_loss": 3.0, "val_perplexity": 20.0855, "val_bits_per_byte": 1.25, "val_loss/code": 2.5})
    line = capsys.readouterr().out.strip()
    assert line == (
        "validation at step 1,000: loss 3.0000  perplexity 20.09  bits per byte 1.2500  by source: code 2.5000"
        "  (uniform 8.3178, unigram 6.2500)"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (12_345, "12.3k"),
        (99_960, "100k"),
        (999_600, "1.00M"),
        (7e9, "7.00B"),
        (1.25e12, "1.25T"),
    ],
)
def test_counts_for_people(value, text):
    assert human_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.6, "1m00s"),
        (725, "12m05s"),
        (3599.7, "1h00m"),
        (3725, "1h02m"),
        (273_700, "3d04h"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_durations_for_people(seconds, text):
    assert human_seconds(seconds) == text


def test_without_the_console_sink_nothing_is_printed_but_console_log_is_kept_over_resumes(tmp_path, capsys):
    for step in (0, 1):
        with open_sinks(tmp_path, "jsonl", resume_step=step) as sinks:
            sinks.info(f"life {step}\nsecond line")
    assert capsys.readouterr().out == ""
    lines = (tmp_path / "console.log").read_text().splitlines()
    assert [line.split("  ", 1)[1] for line in lines] == ["life 0", "second line", "life 1", "second line"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  life 0", lines[0])


def test_a_reader_of_standard_output_that_goes_away_does_not_end_the_run(tmp_path):
    code = """
sinks = open_sinks("jsonl", "console")
for step in range(1, 2001):
    sinks.log({"step": step, "loss": 1.0})
sinks.close()
print("this print would fail too")
"""
    process = python(code, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == ""
    process.stderr.close()
    assert len(records(tmp_path)) == 2000
    assert "Standard output is gone" in (tmp_path / "console.log").read_text()


def test_an_ascii_terminal_shows_a_name_in_any_language(tmp_path):
    code = "open_sinks('console').info('模型 é')"
    process = python(code, tmp_path, stdout=subprocess.PIPE, variables={"PYTHONIOENCODING": "ascii"})
    assert process.communicate(timeout=60)[0] == "?? ?\n" and process.returncode == 0


def test_the_bar_stands_below_whole_lines_on_a_terminal(tmp_path):
    code = """
with open_sinks("console") as sinks:
    for step in range(1, 1001):
        sinks.progress(step)
        if step % 100 == 0:
            sinks.log({"step": step, "loss": 1.0, "lr": 1e-3, "eta_seconds": 3725.0})
            time.sleep(0.15)
print("end")
"""
    output = on_terminal(code, tmp_path)
    assert re.search(r"% \|.*\| step \d+/1000, 1h0[12]m left", output)
    screen = [line.split("\r")[-1] for line in output.replace("\r\n", "\n").splitlines()]  # what stays of each line
    shown = [line for line in screen if "/1,000" in line]
    assert len(shown) == 10 and all(re.fullmatch(r" *[\d,]+/1,000 +1\.0000 +1\.00e-03 +1h02m", line) for line in shown)
    assert screen[-1] == "end"


# ---------------------------------------------------------------- the copies


def wandb_rows(directory: Path) -> dict[int, dict]:
    """What `wandb sync` would send, by step: LevelDB's log format around protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows: dict[int, dict] = {}
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        data, offset, parts = path.read_bytes(), 7, b""
        assert data[:4] == b":W&B"
        while offset < len(data):
            if 32768 - offset % 32768 < 7:
                offset += 32768 - offset % 32768
                continue
            _, length, kind = struct.unpack_from("<IHB", data, offset)
            parts += data[offset + 7 : offset + 7 + length]
            offset += 7 + length
            if kind in (1, 4):  # a whole record, or its last part
                record, parts = Record.FromString(parts), b""
                if record.WhichOneof("record_type") == "history":
                    items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                    assert items["_step"] == items["step"] and items["step"] not in rows, "two rows of one step"
                    rows[items["step"]] = {key: value for key, value in items.items() if not key.startswith("_")}
    return rows


def by_step(made: list[dict]) -> dict[int, dict]:
    """All numbers of records, those of a step together, as the copies name them."""
    rows: dict[int, dict] = {}
    for record in made:
        flat = {}
        for key, value in record.items():
            flat |= {f"{key}/{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
        rows.setdefault(record["step"], {}).update(flat)
    return rows


def finite(rows: dict[int, dict]) -> dict[int, dict]:
    return {
        step: {key: value for key, value in row.items() if isinstance(value, int | float) and math.isfinite(value)}
        for step, row in rows.items()
    }


def test_wandb_offline_holds_the_one_curve_of_metrics_jsonl_before_and_after_a_resume(tmp_path):
    code = """
def record(step):
    return {"step": step, "loss": 10 / 3 / step, "lr": 1e-3 / step, "tokens": step * 123_456_789_012}

with open_sinks("jsonl", "wandb", "console") as sinks:
    for step in range(1, 61):
        sinks.log(record(step) if step != 7 else {"step": 7, "loss": math.nan, "grad_norm": math.inf})
        if step % 25 == 0:
            sinks.log({"step": step, "val_loss": 2.0})
for life in range(2):
    with open_sinks("jsonl", "wandb", "console", resume_step=50, wandb_id=sinks.wandb_id) as again:
        for step in range(51, 71):
            again.log(record(step) | {"loss": 5.5})
    assert again.wandb_id == sinks.wandb_id
"""
    process = python(
        code, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, variables={"WANDB_API_KEY": "canary" * 7}
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in output, output
    rows = wandb_rows(tmp_path)
    assert finite(rows) == finite(by_step(records(tmp_path))) and rows[60]["loss"] == 5.5
    assert rows[25] == {"step": 25, "loss": 10 / 75, "lr": 4e-5, "tokens": 25 * 123_456_789_012, "val_loss": 2.0}
    assert not math.isfinite(float(rows[7]["loss"]))
    assert output.count("its new file holds the curve up to step 50") == 2
    assert len(list((tmp_path / "wandb" / "superseded").iterdir())) == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"canarycanary" in path.read_bytes()]


STUB = """
import types
class Run:
    offline, url = False, "https://wandb.example/run"
    def __init__(self): self.rows, self.axes = [], []
    def define_metric(self, name, **options): self.axes.append(name)
    def log(self, row, step): self.rows.append((step, row))
    def finish(self): print("rows", json.dumps(self.rows), "axes", self.axes)
calls = []
def init(**options):
    calls.append({key: options.get(key) for key in ("mode", "id", "resume", "resume_from")})
    if "resume_from" in options and REFUSES:
        raise RuntimeError("rewinding is not enabled for this entity")
    return Run()
stub = types.ModuleType("wandb")
stub.Settings, stub.setup, stub.login = dict, lambda settings: None, lambda **options: True
stub.init, stub.teardown = init, lambda: None
sys.modules["wandb"] = stub
"""


@pytest.mark.parametrize("refuses", [False, True])
def test_a_wandb_server_is_asked_to_rewind_to_the_checkpoint_and_a_refusal_is_said(tmp_path, refuses):
    """The order of calls alone: no server can be had here."""
    code = (
        f"REFUSES = {refuses}\n{STUB}"
        + """
with open_sinks("jsonl", "wandb", "console", mode="online", resume_step=50, wandb_id="abc") as sinks:
    sinks.log({"step": 51, "loss": 1.5, "tokens": 9})
print("calls", json.dumps(calls))
"""
    )
    process = python(code, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, variables={"WANDB_MODE": "online"})
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    calls = json.loads(re.search(r"calls (.*)", output)[1])
    assert calls[0] == {"mode": "online", "id": None, "resume": None, "resume_from": "abc?_step=50"}
    assert calls[1:] == ([{"mode": "online", "id": "abc", "resume": "allow", "resume_from": None}] if refuses else [])
    assert ("W&B cannot rewind the run (rewinding is not enabled" in output) == refuses
    assert 'rows [[51, {"step": 51, "loss": 1.5, "tokens": 9}]]' in output and "'tokens', 'train_hours'" in output


def test_a_run_that_is_new_to_a_wandb_server_has_nothing_to_rewind_and_brings_its_curve(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 50, "loss": 2.5}\n')
    code = (
        f"REFUSES = True\n{STUB}"
        + """
with open_sinks("jsonl", "wandb", "console", mode="online", resume_step=50) as sinks:
    sinks.log({"step": 51, "loss": 1.5})
print("calls", json.dumps(calls))
"""
    )
    process = python(code, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, variables={"WANDB_MODE": "online"})
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert [call["resume_from"] for call in json.loads(re.search(r"calls (.*)", output)[1])] == [None]
    assert 'rows [[50, {"step": 50, "loss": 2.5}], [51, {"step": 51, "loss": 1.5}]]' in output and "rewind" not in output


@contextlib.contextmanager
def broken_server(kind: str):
    """The address of a W&B server that refuses, never answers, answers with an error or refuses the key, or has no name."""
    if kind.isdecimal():

        class Answer(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(int(kind))
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            do_GET = do_POST

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        server.server_close()
        return
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and never answers
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if kind == "refused":
            server.close()
        yield "http://nowhere.invalid" if kind == "no name" else address


@pytest.mark.parametrize("outage", ["refused", "silent", "no name", "500", "401"])
def test_a_wandb_outage_neither_stops_nor_delays_the_run_and_its_records_go_offline(tmp_path, outage):
    code = """
trackers.WANDB_START_SECONDS = 1.0
start = time.monotonic()
sinks = open_sinks("jsonl", "wandb", "console", mode="online")
for step in range(1, 31):
    sinks.log({"step": step, "loss": 1 / step})
print("logged in", time.monotonic() - start)
sinks.close()
"""
    variables = {"WANDB_MODE": "online", "HOME": str(tmp_path / "home"), "WANDB_API_KEY": "a" * 40}
    began = time.monotonic()
    with broken_server(outage) as address:
        variables["WANDB_BASE_URL"] = address
        process = python(code, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, variables=variables)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and time.monotonic() - began < 30
    assert float(re.search(r"logged in (\S+)", output)[1]) < 0.5
    assert output.count("W&B cannot be reached") == 1 and "Traceback" not in output
    assert [row["loss"] for row in wandb_rows(tmp_path).values()] == [record["loss"] for record in records(tmp_path)]


def test_wandb_whose_service_dies_costs_no_step(tmp_path):
    """The process that W&B starts beside ours is killed in mid-run."""
    code = """
import psutil
sinks = open_sinks("jsonl", "wandb", "console")
sinks.log({"step": 1, "loss": 1.0})
deadline = time.monotonic() + 30
while not list(Path(sys.argv[1]).glob("wandb/offline-run-*/*.wandb")) and time.monotonic() < deadline:
    time.sleep(0.05)
for child in psutil.Process().children(recursive=True):
    child.kill()
longest = 0.0
for step in range(2, 200):
    start = time.monotonic()
    sinks.log({"step": step, "loss": 1 / step})
    longest = max(longest, time.monotonic() - start)
start = time.monotonic()
sinks.close()
print("longest", longest, "closed in", time.monotonic() - start)
"""
    process = python(code, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert float(re.search(r"longest (\S+)", output)[1]) < 0.5 and float(re.search(r"closed in (\S+)", output)[1]) < 30
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 200))


def test_wandb_without_a_key_asks_nothing_on_a_terminal_and_goes_offline(tmp_path):
    code = """
with open_sinks("jsonl", "wandb", "console", mode="online") as sinks:
    sinks.log({"step": 1, "loss": 1.5})
"""
    output = on_terminal(code, tmp_path, WANDB_MODE="online", WANDB_API_KEY="", HOME=str(tmp_path / "home"))
    assert output.count("no API key") == 1 and "Enter your choice" not in output
    assert [row["loss"] for row in wandb_rows(tmp_path).values()] == [1.5]


def test_tensorboard_holds_every_value_exactly_and_shows_one_value_a_step_after_a_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")  # what TensorBoard shows
    with open_sinks(tmp_path, "jsonl", "tensorboard") as sinks:
        for step in range(1, 31):
            sinks.log(step_record(step))
    time.sleep(1.1)  # event files carry their second in the name, and are read in that order
    with open_sinks(tmp_path, "jsonl", "tensorboard", resume_step=20) as sinks:
        for step in range(21, 41):
            sinks.log(step_record(step) | {"loss": 5.5})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for key in ("loss", "lr", "tokens"):
        series = [(event.step, event.tensor_proto.double_val[0]) for event in events.Tensors(key)]
        assert series == [(record["step"], float(record[key])) for record in records(tmp_path)]


def test_a_copy_that_fails_says_so_once_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with open_sinks(tmp_path, "jsonl", "tensorboard", "console") as sinks:
        for step in range(1, 6):
            sinks.log(step_record(step))
            time.sleep(0.01)
    assert len(records(tmp_path)) == 5
    assert capsys.readouterr().out.count("TensorBoard is off for the rest of this run") == 1


def test_a_picture_reaches_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    import matplotlib.image
    import numpy as np

    matplotlib.image.imsave(tmp_path / "x.png", np.random.default_rng(0).random((8, 9, 3)))
    with open_sinks(tmp_path, "tensorboard") as sinks:
        sinks.image("loss_curve", tmp_path / "x.png")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(image.width, image.height) for image in events.Images("loss_curve")] == [(9, 8)]


def test_texts_that_the_model_writes_are_shown_kept_and_copied(tmp_path, capsys):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with open_sinks(tmp_path, "jsonl", "console", "tensorboard", "wandb") as sinks:
        sinks.log({"step": 5, "loss": 1.0})
        sinks.log({"step": 5, "generated": [{"prompt": "def ", "text": "main():"}, {"prompt": "模", "text": "型"}]})
    assert 'step 5 writes: "def " "main():"\nstep 5 writes: "模" "型"' in capsys.readouterr().out
    assert records(tmp_path)[1]["generated"][1] == {"prompt": "模", "text": "型"}
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("generated/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "def  | main():\n\n模 | 型"
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/generated_*.json")
    assert json.loads(table.read_text())["data"] == [["def ", "main():"], ["模", "型"]]


def test_the_levels_of_the_data_are_lines_in_the_copies(tmp_path):
    with open_sinks(tmp_path, "jsonl", "wandb") as sinks:
        sinks.log({"step": 0, "reference_lines": {"uniform": 8.3, "unigram": 6.5}})
        for step in (5, 10):
            sinks.log({"step": step, "val_loss": 7.0})
    rows = wandb_rows(tmp_path)
    assert [rows[step]["reference_lines/unigram"] for step in (0, 5, 10)] == [6.5, 6.5, 6.5]
    assert "reference_lines" not in records(tmp_path)[1]


def test_syncing_what_a_full_disk_refuses_is_said_and_not_raised(tmp_path):
    code = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
with open_sinks("jsonl", "console") as sinks:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    sinks.log({"step": 1, "loss": 1.0})
    sinks.sync()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sinks.sync()
"""
    process = python(code, tmp_path, stdout=subprocess.PIPE)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and output.count("metrics.jsonl is not on the disk yet") == 1
    assert [record["step"] for record in records(tmp_path)] == [1]


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


def test_without_a_standard_output_the_lines_are_in_console_log(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python does where it was closed before the start
    with open_sinks(tmp_path, "console", "jsonl") as sinks:
        sinks.info("a line")
    assert "a line" in (tmp_path / "console.log").read_text()
