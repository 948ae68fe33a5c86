"""The picture of a run on a terminal: of any size, in pipes, while the run does not exist, is written, cut, killed, done."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from pretrain.checkpoint.manifest import FORMAT_VERSION, digest_json
from pretrain.report.records import LineFile, cut_records, to_json
from pretrain.run.directory import RunDirectory
from pretrain.run.screen import frame
from pretrain.run.view import View

ROOT = Path(__file__).resolve().parents[1]
TOOL = [sys.executable, "tools/watch_run.py"]
LINES = {"uniform": 8.318, "unigram": 6.556, "bigram": 4.166}


def line(step: int, **more) -> dict:
    """A logging step as a run writes it."""
    loss = 4 + 4.3 * math.exp(-step / 60)
    figures = {"step": step, "loss": loss, "grad_norm": 0.5, "lr": 1e-3, "tokens": 4096 * step, "epoch": 0.1, "mfu": 0.412}
    figures |= {"tokens_per_second": 12345.0, "peak_memory_gib": 12.5, "skipped_steps": 0, "eta_seconds": 3700.0}
    return figures | {"goodput": 0.98, "train_hours": step / 100} | more


def write_run(folder: Path, steps: int = 200, status: str | None = "running", **state) -> Path:
    """A folder such as a run of this process leaves."""
    folder.mkdir(parents=True)
    start = {"step": 0, "reference_lines": LINES, "parameters": 1000, "world_size": 2, "tokens_per_step": 4096}
    records = [start, *(line(step) for step in range(10, steps + 1, 10))]
    records += [{"step": step, "val_loss": 4.2 + 50 / step, "val_bits_per_byte": 1.7} for step in range(50, steps + 1, 50)]
    records.sort(key=lambda record: record["step"])
    (folder / "metrics.jsonl").write_text("".join(to_json(record) + "\n" for record in records))
    (folder / "environment.json").write_text(json.dumps({"total_steps": 400, "starts": [{"step": 0, "device": "cpu"}]}))
    (folder / "run.lock").write_text(f"process {os.getpid()} on {socket.gethostname()} since 2026-01-01 00:00:00")
    if status:
        known = {"step": steps, "saved_step": 100, "attempt": 1, "status": status, "exit_status": None, "time": time.time()}
        (folder / "run_state.json").write_text(json.dumps(known | state))
    return folder


def picture(folder: Path, width: int = 80, height: int = 24, **more) -> str:
    return "\n".join(each.plain for each in frame(View(folder).read_all(), width, height, **more))


def tool(*words, **environment) -> subprocess.CompletedProcess:
    known = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    command = [*TOOL, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=known | environment, capture_output=True, text=True, timeout=120)


# ---------------------------------------------------------------- the picture


@pytest.mark.parametrize("ascii_only", [False, True])
def test_it_fits_every_terminal_and_the_most_important_figures_are_always_there(tmp_path, ascii_only):
    folder = write_run(tmp_path / "run")
    for width in (30, 40, 60, 80, 200):
        for height in (1, 2, 4, 8, 12, 24, 60):
            lines = frame(View(folder).read_all(), width, height, ascii_only=ascii_only)
            assert len(lines) <= height and max(each.cell_len for each in lines) <= width, (width, height)
            assert "RUNNING" in lines[0].plain
            if height >= 4:
                assert "step 200" in lines[1].plain and "loss 4.1534" in lines[2].plain
            if ascii_only:
                assert "".join(each.plain for each in lines).isascii()


def test_at_80_by_24_it_says_what_a_person_wants_to_know(tmp_path):
    folder = write_run(tmp_path / "run", attempt=3)
    with open(folder / "metrics.jsonl", "a") as file:
        money = {"cost_dollars": 12.5, "cost_total_dollars": 40, "dollars_per_billion_tokens": 1234.5}
        file.write(to_json(line(210, **money)) + "\n")
        spike = {"step": 205, "loss": 9.9, "median": 4.0, "sigmas": 20.0, "stays": False}
        file.write(to_json({"step": 206, "spike": spike, "samples": []}) + "\n")
    shown = picture(folder)
    for text in ("start 3", "step 210/400", "1h01m left", "860k tokens", "validation 4.4500 at step 200", "1.700 bits per byte",
                 "12.3k tok/s", "MFU 41.2 %", "memory 12.50 GiB", "grad norm 0.500", "cost $12.50, in all $40.00",
                 "no checkpoint yet", "uniform 8.318", "unigram 6.556", "bigram 4.166", "▲", "●",
                 "spike at step 205"):  # fmt: skip
        assert text in shown, text


def test_the_curve_stands_where_its_values_are(tmp_path):
    folder = write_run(tmp_path / "run", steps=400)
    rows = [each.split("|", 1)[1] for each in picture(folder, 80, 40, ascii_only=True).splitlines() if "|" in each]
    across = len(rows[0]) - len(" unigram 6.556")
    uniform, bigram = (next(i for i, row in enumerate(rows) if f" {name} " in row) for name in ("uniform", "bigram"))

    def row_of(loss: float) -> float:
        return uniform + (8.318 - loss) / (8.318 - 4.166) * (bigram - uniform)

    for step in (60, 100, 200, 330):
        column = int(step / 400 * across)
        (found, *_) = [number for number, row in enumerate(rows) if row[column] == "*"]
        assert abs(found - row_of(line(step)["loss"])) <= 1.5, step
    column = int(200 / 400 * across)
    assert abs(next(number for number, row in enumerate(rows) if row[column] == "o") - row_of(4.45)) <= 1


def test_a_dead_a_silent_and_an_ended_run_say_so(tmp_path):
    now = time.time()
    alive = write_run(tmp_path / "alive")
    assert View(alive).read_all().status(now).kind == "running"
    assert View(alive).read_all().status(now + 3600).kind == "quiet"
    finished = subprocess.Popen(["true"])
    finished.wait()
    for host, kind in ((socket.gethostname(), "killed"), ("another-host", "running")):
        (alive / "run.lock").write_text(f"process {finished.pid} on {host} since 2026-01-01 00:00:00")
        status = View(alive).read_all().status(now)
        assert status.kind == kind and status.is_alarm == (kind == "killed")
    assert "resumes from step 100" in picture(write_killed(tmp_path / "killed", finished.pid)).replace("\n", " ")
    ends = [("done", 0, "done"), ("stopped", 75, "stopped"), ("stopped", 130, "stopped"), ("stopped", 70, "failed")]
    for number, (status, code, kind) in enumerate([*ends, ("failed", 1, "failed"), ("stopped", 2, "failed")]):
        folder = write_run(tmp_path / f"{number}", status=status, exit_status=code, reason="because\x1b[31m of it")
        assert View(folder).read_all().status(now).kind == kind
        assert f"{code}: because" in picture(folder) or code == 0
        assert "\x1b" not in picture(folder), "a text of the run gives orders to the terminal"
    assert "WAITING" in picture(tmp_path / "none") and "no such folder yet" in picture(tmp_path / "none")


def write_killed(folder: Path, pid: int) -> Path:
    write_run(folder)
    (folder / "run.lock").write_text(f"process {pid} on {socket.gethostname()} since 2026-01-01 00:00:00")
    return folder


def test_a_real_lock_is_understood(tmp_path):
    """The words in run.lock are those that the status looks for."""
    directory = RunDirectory(tmp_path / "run")
    directory.write_state("running")
    assert View(tmp_path / "run").read_all().status().kind == "running"
    lock = (tmp_path / "run" / "run.lock").read_text()
    (tmp_path / "run" / "run.lock").write_text(lock.replace(str(os.getpid()), "4194305"))  # above the largest number
    assert View(tmp_path / "run").read_all().status().kind == "killed"


def test_a_resumed_run_is_drawn_from_its_cut_records(tmp_path):
    folder = write_run(tmp_path / "run")
    view = View(folder).read_all()
    assert view.history.step == 200
    cut_records(folder / "metrics.jsonl", 100)
    LineFile(folder / "metrics.jsonl").append(to_json(line(110)))
    view.read_all()
    assert view.history.step == 110 and view.history.curves["loss"].points().step.tolist() == [*range(10, 120, 10)]


def test_a_checkpoint_counts_once_it_is_complete(tmp_path):
    view, folder = View(write_run(tmp_path / "run")), tmp_path / "run" / "checkpoints" / "step_00000050"
    folder.mkdir(parents=True)
    view.refresh()
    assert view.checkpoints == []
    manifest = {"format_version": FORMAT_VERSION, "world_size": 1, "files": {"state.json": {"bytes": 7, "xxh3": "0"}}}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"xxh3": digest_json(manifest)}))
    view.refresh()
    assert [(each.step, each.bytes) for each in view.checkpoints] == [(50, 7)]


def test_a_folder_full_of_nonsense_is_shown_all_the_same(tmp_path):
    folder = write_run(tmp_path / "run", status=None)
    for name in ("run_state.json", "environment.json"):
        (folder / name).write_text('{"status": "running", "attempt": "x", "starts": 7, "total_steps": null')
    (folder / "checkpoints" / "step_00000010").mkdir(parents=True)
    (folder / "checkpoints" / "step_x").mkdir()
    (folder / "config.yaml").write_bytes(b"\xff")
    assert "loss 4.1534" in picture(folder)


def test_a_line_that_a_kill_left_unfinished_is_not_waited_for(tmp_path):
    folder = write_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 210, "lo')
    view = View(folder)
    assert not view.refresh() and view.fraction_read == 1 and view.history.step == 200


# ---------------------------------------------------------------- the program


def test_in_a_pipe_it_prints_one_picture_without_colours_and_ends(tmp_path):
    folder = write_run(tmp_path / "run", status="done", exit_status=0)
    for words in (["--once"], []):  # a run that is done is not waited for
        done = tool(folder, *words)
        assert done.returncode == 0 and "\x1b" not in done.stdout and done.stdout.count("DONE") == 1, done.stderr
        assert len(done.stdout.splitlines()) <= 25 and max(map(len, done.stdout.splitlines())) <= 80
    two = tool(folder, folder, "--once", LINES="20", COLUMNS="50", LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert two.stdout.count("DONE") == 2 and two.stdout.isascii() and max(map(len, two.stdout.splitlines())) <= 50


@pytest.mark.parametrize("words", [["--once"], ["--html", "page.html"]])
def test_a_run_that_does_not_exist_is_refused_where_nothing_waits_for_it(tmp_path, words):
    done = tool(tmp_path / "none", *words)
    assert done.returncode == 2 and "none" in done.stderr and "Traceback" not in done.stderr


class Terminal:
    """The tool on a terminal of 80 by 24."""

    def __init__(self, *words, **environment):
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        known = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        environment = known | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"} | environment
        command = [*TOOL, *map(str, words)]
        # A shell starts what it runs in the background, such as CI, with Ctrl-C ignored; at a terminal it is not.
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=slave, stdout=slave, stderr=slave)
        finally:
            signal.signal(signal.SIGINT, before)
        os.close(slave)
        self.master, self.seen, self.last = master, "", 0

    def read(self) -> bool:
        """Reads what there is within a tenth of a second. -> whether the program may write more."""
        if not select.select([self.master], [], [], 0.1)[0]:
            return True
        try:
            block = os.read(self.master, 1 << 16)
        except OSError:  # all other ends are closed
            return False
        self.seen += block.decode(errors="replace")
        return bool(block)

    def wait_for(self, text: str) -> None:
        """Reads on until `text` comes, after what was waited for before."""
        end = time.monotonic() + 60
        while (place := plain(self.seen).find(text, self.last)) < 0:
            assert self.read() and time.monotonic() < end, f"no {text!r} in {plain(self.seen)[self.last :]}"
        self.last = place + len(text)

    def end(self) -> int:
        while self.read() and self.process.poll() is None:
            pass
        self.process.wait(60)
        while self.read() and select.select([self.master], [], [], 0.1)[0]:
            pass
        os.close(self.master)
        return self.process.returncode


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_on_a_terminal_it_follows_a_run_from_before_its_start_to_its_end(tmp_path):
    terminal = Terminal(tmp_path / "run")
    terminal.wait_for("no such folder yet")
    folder = write_run(tmp_path / "run", steps=100)
    terminal.wait_for("step 100/400")
    LineFile(folder / "metrics.jsonl").append(to_json(line(110)))
    terminal.wait_for("step 110/400")
    cut_records(folder / "metrics.jsonl", 50)
    terminal.wait_for("step 50/400")
    state = json.loads((folder / "run_state.json").read_text())
    (folder / "run_state.json").write_text(json.dumps(state | {"status": "stopped", "exit_status": 75, "reason": "SIGTERM"}))
    terminal.wait_for("STOPPED")
    (folder / "run_state.json").write_text(json.dumps(state | {"status": "done", "exit_status": 0}))
    assert terminal.end() == 0
    assert "\x1b[?1049h" in terminal.seen, "it must draw on the other screen, else it scrolls the terminal away"
    after = terminal.seen.rsplit("\x1b[?1049l", 1)[1]
    assert "DONE" in plain(after) and "\x1b[3" in after  # the last picture stays, in colours


def test_ctrl_c_ends_it_with_130_and_gives_the_terminal_back(tmp_path):
    terminal = Terminal(write_run(tmp_path / "run"), NO_COLOR="1")
    terminal.wait_for("step 200/400")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert "\x1b[?1049l" in terminal.seen and "\x1b[?25h" in terminal.seen and "Traceback" not in terminal.seen
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", terminal.seen), "colours in spite of NO_COLOR"
