"""W&B and TensorBoard show exactly the records of metrics.jsonl, and no outage of W&B reaches the run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from pretrain.config import load
from pretrain.report import trackers
from pretrain.report.records import read_records
from tests.models import train_here
from tests.test_config import GOOD, keys_of
from tests.test_progress import Terminal
from tests.test_sinks import ROOT, outputs, step_record
from tests.test_stages import LAYOUT, flags
from tests.test_stages import folder as staged  # noqa: F401 a fixture

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")


@pytest.fixture(autouse=True)
def own_wandb(monkeypatch, tmp_path):
    """Limits W&B's state in this process, which is global, to the test, and hides any key of the user."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_LAUNCH"):
        monkeypatch.delenv(name, raising=False)
    yield
    if sys.modules.get("wandb"):
        sys.modules["wandb"].teardown()


def python(code: str, directory: Path, **options) -> subprocess.Popen:
    """Runs `code` in a separate process with sys.argv[1] = directory."""
    code = "import sys, time\nfrom pathlib import Path\nfrom tests.test_sinks import outputs\n" + code
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("variables", {})
    return subprocess.Popen([sys.executable, "-c", code, str(directory)], env=environment, text=True, **options)


def wandb_rows(directory: Path) -> dict[int, dict]:
    """What `wandb sync` would send, by step: LevelDB's log format around protobuf records."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # ends the process that writes these files
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
            if kind in (1, 4):  # a complete record, or its last part
                record, parts = Record.FromString(parts), b""
                if record.WhichOneof("record_type") == "history":
                    items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                    assert items["_step"] == items["step"] and items["step"] not in rows, "two rows of one step"
                    rows[items["step"]] = {key: value for key, value in items.items() if not key.startswith("_")}
    return rows


def test_wandb_offline_holds_the_curve_of_metrics_jsonl_once_before_and_after_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary" * 7)

    def record(step: int) -> dict:
        return {"step": step, "loss": 10 / 3 / step, "lr": 1e-3 / step, "tokens": step * 123_456_789_012}

    with outputs(tmp_path, "jsonl", "wandb", "console") as sinks:
        sinks.log({"step": 0, "reference_lines": {"uniform": 8.3, "unigram": 6.5}})
        for step in range(1, 61):
            sinks.log(record(step) if step != 7 else {"step": 7, "loss": math.nan, "grad_norm": math.inf})
            if step % 25 == 0:
                sinks.log({"step": step, "val_loss": 2.0})
    for _ in range(2):
        with outputs(tmp_path, "jsonl", "wandb", "console", resume_step=50, wandb_id=sinks.wandb_id) as again:
            for step in range(51, 71):
                again.log(record(step) | {"loss": 5.5})
        assert again.wandb_id == sinks.wandb_id
    rows, expected, lines = wandb_rows(tmp_path), {}, {"reference_lines/uniform": 8.3, "reference_lines/unigram": 6.5}
    for each in read_records(tmp_path):
        row = expected.setdefault(each["step"], {})
        row |= {key: value for key, value in each.items() if key != "reference_lines"}
        row |= lines if "val_loss" in each or each["step"] == 0 else {}  # so that W&B can draw them
    assert {step: row for step, row in rows.items() if step != 7} == {step: row for step, row in expected.items() if step != 7}
    assert sorted(rows) == list(range(71)) and rows[60]["loss"] == 5.5
    assert (str(float(rows[7]["loss"])), str(float(rows[7]["grad_norm"]))) == ("nan", "inf")
    assert len(list((tmp_path / "wandb" / "superseded").iterdir())) == 2
    assert capsys.readouterr().out.count("its new file holds the curve up to step 50") == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"canarycanary" in path.read_bytes()]


class StubRun:
    offline, url = False, "https://wandb.example/run"

    def __init__(self) -> None:
        self.rows, self.axes = [], []

    def define_metric(self, name, **_) -> None:
        self.axes.append(name)

    def log(self, row, step) -> None:
        self.rows.append((step, row))

    def finish(self) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    """A stub of the library, since no W&B server is available: records calls of init, and refuses to rewind on request."""
    stub = types.ModuleType("wandb")
    stub.calls, stub.refuses, stub.run = [], False, StubRun()

    def init(**options) -> StubRun:
        stub.calls.append({key: options[key] for key in ("mode", "id", "resume", "resume_from") if key in options})
        if "resume_from" in options and stub.refuses:
            raise RuntimeError("rewinding is not enabled for this entity")
        return stub.run

    stub.Settings, stub.setup, stub.login = dict, lambda settings: None, lambda **options: True
    stub.init, stub.teardown = init, lambda: None
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setenv("WANDB_MODE", "online")
    return stub


def offline_runs(directory: Path) -> list[str]:
    """Ids of the W&B runs that `wandb sync` would send."""
    return [path.name.rpartition("-")[2] for path in directory.glob("wandb/offline-run-*")]


def test_a_run_killed_before_its_first_checkpoint_is_one_run_at_wandb(tmp_path):
    for loss in (1.0, 2.0):  # no checkpoint knows the id of the first start
        with outputs(tmp_path, "jsonl", "wandb") as sinks:
            sinks.log({"step": 1, "loss": loss})
    assert offline_runs(tmp_path) == [sinks.wandb_id]
    assert {step: row["loss"] for step, row in wandb_rows(tmp_path).items()} == {1: 2.0}


def test_under_a_sweep_agent_the_id_is_the_one_in_use_and_the_curve_so_far_goes_there(tmp_path, monkeypatch):
    with outputs(tmp_path, "jsonl", "wandb") as sinks:
        sinks.log({"step": 50, "loss": 1.0})
    sys.modules["wandb"].teardown()
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "trial7")
    with outputs(tmp_path, "jsonl", "wandb", resume_step=50, wandb_id=sinks.wandb_id) as trial:
        trial.log({"step": 51, "loss": 2.0})
    assert trial.wandb_id == "trial7" and set(offline_runs(tmp_path)) == {"trial7", sinks.wandb_id}
    shutil.rmtree(next(tmp_path.glob(f"wandb/offline-run-*-{sinks.wandb_id}")))
    assert {step: row["loss"] for step, row in wandb_rows(tmp_path).items()} == {50: 1.0, 51: 2.0}
    monkeypatch.delenv("WANDB_SWEEP_ID")
    monkeypatch.delenv("WANDB_RUN_ID")
    assert trackers.choose_wandb_id(tmp_path, "t", "trial7") == ("trial7", True)


def test_a_wandb_id_in_the_environment_names_a_new_run_and_does_not_take_over_another(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert trackers.choose_wandb_id(tmp_path, "t", None) == ("mine", False)
    monkeypatch.setenv("WANDB_RUN_ID", "left_over")
    assert trackers.choose_wandb_id(tmp_path, "t", None) == ("mine", True)  # killed before its first checkpoint
    assert trackers.choose_wandb_id(tmp_path, "copy", None) == ("left_over", False)  # the folder of t, copied
    monkeypatch.delenv("WANDB_RUN_ID")
    assert trackers.choose_wandb_id(tmp_path, "other", "in_checkpoint") == ("in_checkpoint", True)


def test_the_last_step_has_its_loss_and_the_picture_of_the_curve_at_wandb(tiny):
    assert train_here(["--log.sinks", "[jsonl, wandb]", "--evaluate.every_steps", "5", *tiny]) == 0
    run = Path(tiny[-1]) / "tiny"
    rows = wandb_rows(run)
    for record in read_records(run):
        for key in record.keys() & {"loss", "val_loss", "lr", "tokens"}:
            assert rows[record["step"]][key] == record[key]
    assert len(list(run.glob("wandb/offline-run-*/files/media/images/loss_curve_*.png"))) == 1


@pytest.mark.parametrize("sink", ["wandb", "tensorboard", "mlflow", "trackio"])
def test_a_tracker_whose_package_is_missing_is_refused_before_training(tiny, monkeypatch, capsys, sink):
    for module in [each for each in sys.modules if each.split(".")[0] == sink or each.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, sink, None)  # as if it were not installed
    assert train_here(["--log.sinks", f"[console, {sink}]", *tiny]) == 2
    error = capsys.readouterr().err
    assert "log.sinks" in error and f"pip install {sink}" in error and "Traceback" not in error
    assert ("is null and so is MLFLOW_TRACKING_URI" in error) == (sink == "mlflow")


def test_passwords_and_tokens_do_not_belong_into_the_settings():
    addresses = ["--log.mlflow.tracking_uri", "https://me:secret@host/", "--log.trackio.server_url", "http://h/?write_token=x"]
    assert keys_of([*GOOD, *addresses]) == ["log.mlflow.tracking_uri", "log.trackio.server_url"]
    load([*GOOD, "--log.mlflow.tracking_uri", "postgresql://me@host/db", "--log.trackio.server_url", "http://host:7860"])


def test_a_tracker_that_fails_says_whether_the_records_are_kept(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    for sinks, kept in ((["jsonl"], True), ([], False)):
        with outputs(tmp_path, "console", "tensorboard", *sinks):
            pass
        assert ("metrics.jsonl is complete" in capsys.readouterr().out) == kept


REWIND = {"mode": "online", "resume_from": "abc?_step=50"}
CONTINUE = {"mode": "online", "id": "abc", "resume": "allow"}


@pytest.mark.parametrize("refuses", [False, True])
def test_a_wandb_server_rewinds_to_the_checkpoint_and_a_refusal_is_reported(tmp_path, capsys, server, refuses):
    server.refuses = refuses
    with outputs(tmp_path, "jsonl", "wandb", "console", mode="online", resume_step=50, wandb_id="abc") as sinks:
        sinks.log({"step": 51, "loss": 1.5, "tokens": 9})
    assert server.calls == [REWIND, *([CONTINUE] if refuses else [])]
    assert ("W&B cannot rewind the run (rewinding is not enabled" in capsys.readouterr().out) == refuses
    assert server.run.rows == [(51, {"step": 51, "loss": 1.5, "tokens": 9})]
    assert server.run.axes == ["step", "tokens", "train_hours", "*", "val_loss"]


def test_a_run_that_is_new_to_a_wandb_server_is_not_rewound_and_uploads_its_curve(tmp_path, server):
    (tmp_path / "metrics.jsonl").write_text('{"step": 50, "loss": 2.5}\n')
    with outputs(tmp_path, "jsonl", "wandb", mode="online", resume_step=50) as sinks:
        sinks.log({"step": 51, "loss": 1.5})
    assert server.calls == [CONTINUE | {"id": sinks.wandb_id}]
    assert server.run.rows == [(50, {"step": 50, "loss": 2.5}), (51, {"step": 51, "loss": 1.5})]


def test_a_run_killed_before_its_first_checkpoint_rewinds_its_run_on_a_server(tmp_path, server):
    for _ in range(2):
        with outputs(tmp_path, "jsonl", "wandb", mode="online") as sinks:
            sinks.log({"step": 1, "loss": 1.5})
    assert server.calls == [CONTINUE | {"id": sinks.wandb_id}, REWIND | {"resume_from": f"{sinks.wandb_id}?_step=0"}]


@contextlib.contextmanager
def broken_server(kind: str) -> Iterator[str]:
    """The address of a W&B server that answers with an HTTP status, refuses connections, never answers, or has no name."""
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
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        server.server_close()
        return
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections and never answers
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if kind == "refused":
            server.close()
        yield "http://nowhere.invalid" if kind == "no name" else address


@pytest.mark.parametrize("outage", ["refused", "silent", "401", *(pytest.param(each, marks=pytest.mark.slow)
                                    for each in ("no name", "500"))])  # fmt: skip
def test_a_wandb_outage_neither_stops_nor_delays_the_run_and_its_records_go_offline(tmp_path, capsys, monkeypatch, outage):
    monkeypatch.setattr(trackers, "WANDB_START_SECONDS", 2.0)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    with broken_server(outage) as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        began = time.monotonic()
        with outputs(tmp_path, "jsonl", "wandb", "console", mode="online") as sinks:
            for step in range(1, 11):
                sinks.log({"step": step, "loss": 1 / step})
            seconds = time.monotonic() - began
            early = capsys.readouterr().out
    assert seconds < 2.0 and (outage != "silent" or "W&B" not in early)  # nothing waited for the two seconds
    assert time.monotonic() - began < 30  # the time that a preempted job has
    assert (early + capsys.readouterr().out).count("W&B cannot be reached") == 1
    assert {step: row["loss"] for step, row in wandb_rows(tmp_path).items()} == {step: 1 / step for step in range(1, 11)}


def test_wandb_whose_service_dies_costs_no_step(tmp_path):
    """The process that W&B starts beside ours is killed in the middle of the run."""
    code = """
import contextlib, psutil
sinks = outputs(Path(sys.argv[1]), "jsonl", "wandb", "console")
sinks.log({"step": 1, "loss": 1.0})
deadline = time.monotonic() + 60
while not list(Path(sys.argv[1]).glob("wandb/offline-run-*/*.wandb")) and time.monotonic() < deadline:
    time.sleep(0.05)
for child in psutil.Process().children(recursive=True):
    with contextlib.suppress(psutil.NoSuchProcess):  # the end of one may end another
        child.kill()
start = time.monotonic()
for step in range(2, 200):
    sinks.log({"step": step, "loss": 1 / step})
logged = time.monotonic()
sinks.close()
print("logged in", logged - start, "closed in", time.monotonic() - logged)
"""
    process = python(code, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert float(re.search(r"logged in (\S+)", output)[1]) < 10 and float(re.search(r"closed in (\S+)", output)[1]) < 30
    assert [record["step"] for record in read_records(tmp_path)] == list(range(1, 200))


def test_wandb_without_a_key_goes_offline_and_asks_nothing_on_a_terminal(tmp_path):
    code = """
with outputs(Path(sys.argv[1]), "jsonl", "wandb", "console", mode="online") as sinks:
    sinks.log({"step": 1, "loss": 1.5})
"""
    terminal = Terminal()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal.file)
    process = python(code, tmp_path, variables={"WANDB_MODE": "online"}, **streams)
    try:
        assert process.wait(90) == 0
    finally:
        process.kill()
        output = terminal.close()
    assert output.count("no API key") == 1 and "Enter your choice" not in output
    assert [row["loss"] for row in wandb_rows(tmp_path).values()] == [1.5]


# ---------------------------------------------------------------- TensorBoard


def events_in(directory: Path):
    """What TensorBoard shows of a run."""
    events = event_accumulator.EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_holds_every_value_exactly_and_one_value_per_step_after_a_resume(tmp_path):
    with outputs(tmp_path, "jsonl", "tensorboard") as sinks:
        for step in range(1, 31):
            sinks.log(step_record(step))
    time.sleep(1.1)  # names of event files hold the second, and TensorBoard reads them in the order of their names
    with outputs(tmp_path, "jsonl", "tensorboard", resume_step=20) as sinks:
        for step in range(21, 41):
            sinks.log(step_record(step) | {"loss": 5.5})
    for key in ("loss", "lr", "tokens"):
        series = [(event.step, event.tensor_proto.double_val[0]) for event in events_in(tmp_path).Tensors(key)]
        assert series == [(record["step"], float(record[key])) for record in read_records(tmp_path)]


def flat(record: dict) -> dict[str, float]:
    """The numbers of a record, as trackers name them."""
    nested = [(key, inner) for key, inner in record.items() if isinstance(inner, dict)]
    pairs = [*record.items(), *((f"{key}/{name}", each) for key, inner in nested for name, each in inner.items())]
    return {key: value for key, value in pairs if isinstance(value, int | float) and key != "step"}


def test_trackers_show_the_stages_of_a_run_and_the_losses_of_sources_that_come_later(staged, monkeypatch):  # noqa: F811
    """Each step once and in order, also after a resume before a border that the first start had passed."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    command = flags(staged, "--run.name", "tracked", "--log.sinks", "[jsonl, wandb, tensorboard]")
    run = staged / "runs" / "tracked"
    assert train_here(command) == 0
    for path in (run / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > 8:
            shutil.rmtree(path)
    assert train_here(command) == 0
    expected: dict[int, dict] = {}
    for record in read_records(run):
        expected.setdefault(record["step"], {}).update(flat(record))
    rows = wandb_rows(run)
    assert list(rows) == sorted(rows) == sorted(expected) and set(range(1, 21)) <= set(rows)
    for step, row in expected.items():
        shown = {key: value for key, value in rows[step].items() if key in row}
        assert shown == row, step
    borders = {step: row["stage"] for step, row in rows.items() if "stage" in row}
    assert borders == {step: number for number, step, *_ in LAYOUT[1:]}
    assert rows[5]["shares/math"] == 0.75 and rows[9]["sequence_length"] == 48 and rows[16]["global_batch_size"] == 4
    assert next(step for step, row in rows.items() if "loss/math" in row) == 6  # the first stage does not read it
    events = events_in(run)
    for key in ("loss", "loss/math", "loss/web", "stage", "shares/math", "sequence_length", "tokens"):
        series = [(event.step, event.tensor_proto.double_val[0]) for event in events.Tensors(key)]
        assert [step for step, _ in series] == sorted(step for step, _ in series), key  # a validation repeats tokens
        assert dict(series) == {step: row[key] for step, row in expected.items() if key in row}, key


def test_pictures_and_texts_that_the_model_writes_are_shown_and_reach_the_trackers(tmp_path, capsys):
    matplotlib.image.imsave(tmp_path / "x.png", np.random.default_rng(0).random((8, 9, 3)))
    texts = [{"prompt": "def ", "text": "main():"}, {"prompt": "模", "text": "型"}]
    with outputs(tmp_path, "jsonl", "console", "tensorboard", "wandb") as sinks:
        sinks.log({"step": 5, "loss": 1.0})
        sinks.log({"step": 5, "generated": texts})
        sinks.image("curve", tmp_path / "x.png")
    assert 'step 5 writes: "def " "main():"\nstep 5 writes: "模" "型"' in capsys.readouterr().out
    assert read_records(tmp_path)[1]["generated"] == texts
    (text,) = events_in(tmp_path).Tensors("generated/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "def  | main():\n\n模 | 型"
    (picture,) = events_in(tmp_path).Tensors("curve")
    assert [int(size) for size in picture.tensor_proto.string_val[:2]] == [9, 8]
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/generated_*.json")
    assert json.loads(table.read_text())["data"] == [["def ", "main():"], ["模", "型"]]
    assert matplotlib.image.imread(*tmp_path.glob("wandb/offline-run-*/files/media/images/curve_*.png")).shape[:2] == (8, 9)
