"""MLflow and trackio, asked through their own interfaces, have the records of metrics.jsonl, whatever happens to the run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from pretrain.report import self_hosted
from pretrain.report import sinks as sinks_module
from pretrain.report.config import LogConfig, MlflowConfig, TrackioConfig
from pretrain.report.records import read_records
from pretrain.report.sinks import Sinks, open_sinks
from tests.models import train_here

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # a loaded machine starts an MLflow server in two minutes


def outputs(directory: Path, sink: str, address: str | None, **options) -> Sinks:
    """The sinks of a run in `directory` that also feeds the project or experiment of its folder's name."""
    name = directory.name
    config = LogConfig(
        sinks=["console", "jsonl", sink],
        mlflow=MlflowConfig(tracking_uri=address, experiment=name),
        trackio=TrackioConfig(project=name, server_url=address if sink == "trackio" else None),
    )
    given = {"rank": 0, "name": "t", "settings": {"optimizer": {"lr": 3e-4}}, "total_steps": 70, "resume_step": 0}
    return open_sinks(config, directory, **given | {"wandb_id": None} | options)


def log_steps(sinks: Sinks, first: int, last: int, loss: float | None = None) -> None:
    for step in range(first, last + 1):
        sinks.log({"step": step, "loss": 10 / 3 / step if loss is None else loss, "tokens": step * 123_456_789_012})
        if step % 25 == 0:
            sinks.log({"step": step, "val_loss": 2.0, "tokens": step * 123_456_789_012, "val_loss/网页 (a+b)": 1.5})


def expected(directory: Path, named: Callable[[str], str] = str) -> dict[str, list[tuple[int, float]]]:
    """Each number of metrics.jsonl, by name and step: one value per step."""
    series: dict[str, dict[int, float]] = {}
    for record in read_records(directory):
        for key in record.keys() & {"loss", "tokens", "val_loss", "val_loss/网页 (a+b)"}:
            series.setdefault(named(key), {})[record["step"]] = float(record[key])
    return {key: sorted(values.items()) for key, values in series.items()}


# ---------------------------------------------------------------- servers


@contextlib.contextmanager
def process(command: list[str], ready: str, **variables: str) -> Iterator[subprocess.Popen]:
    """A server that answers at `ready`."""
    output = tempfile.TemporaryFile()  # a pipe that nobody reads would fill up and stop the server
    child = subprocess.Popen(
        command, env=os.environ | variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 400
        while True:
            if child.poll() is not None or time.monotonic() > deadline:
                output.seek(0)
                raise AssertionError(output.read().decode(errors="replace"))
            with contextlib.suppress(OSError), urllib.request.urlopen(ready, timeout=5) as answer:
                if answer.status == 200:
                    break
            time.sleep(0.2)
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        output.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def mlflow_server(folder: Path, port: int):
    pytest.importorskip("mlflow", reason="pip install -e '.[trackers,servers]'")
    pytest.importorskip("sqlalchemy")
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")]
    command = [sys.executable, "-m", "mlflow", "server", *store, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return process(command, f"http://127.0.0.1:{port}/health", MLFLOW_DISABLE_TELEMETRY="true")


@pytest.fixture(scope="module")
def mlflow_address(tmp_path_factory) -> Iterator[str]:
    port = free_port()
    with mlflow_server(tmp_path_factory.mktemp("mlflow"), port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def trackio(tmp_path_factory):
    """The library with a database of its own, whose folder it reads from the environment when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        for name in ("TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID"):
            patch.delenv(name, raising=False)
        yield pytest.importorskip("trackio", reason="pip install -e '.[trackers]'")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(self_hosted, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(sinks_module, "TRACKER_CLOSE_SECONDS", 300.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")


# ---------------------------------------------------------------- MLflow


def mlflow_runs(address: str, experiment: str) -> list:
    import mlflow

    client = mlflow.MlflowClient(address)
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def mlflow_series(address: str, run) -> dict[str, list[tuple[int, float]]]:
    import mlflow

    client = mlflow.MlflowClient(address)
    names = run.data.metrics
    return {name: [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, name)] for name in names}


def test_mlflow_has_one_value_per_step_and_name_in_one_run_after_stops_kills_and_resumes(tmp_path, mlflow_address, capsys):
    def start(**options) -> Sinks:
        return outputs(tmp_path, "mlflow", mlflow_address, **options)

    with start() as sinks:
        sinks.log({"step": 0, "reference_lines": {"uniform": 8.3}})
        log_steps(sinks, 1, 30)
    (first,) = mlflow_runs(mlflow_address, tmp_path.name)
    assert first.info.status == "KILLED" and first.data.params["optimizer.lr"] == "0.0003" and first.info.run_name == "t"
    with start(resume_step=30, wandb_id=sinks.wandb_id) as sinks:  # stopped with a checkpoint: the same run continues
        log_steps(sinks, 31, 60)
    (run,) = mlflow_runs(mlflow_address, tmp_path.name)
    assert run.info.run_id == first.info.run_id
    with start(resume_step=50, wandb_id=sinks.wandb_id) as sinks:  # killed after its last checkpoint
        log_steps(sinks, 51, 70, loss=5.5)
    (run,) = mlflow_runs(mlflow_address, tmp_path.name)
    assert run.info.run_id != first.info.run_id and run.info.status == "FINISHED"
    printed = capsys.readouterr().out
    assert "the old one is in MLflow's trash" in printed and "View run" not in printed and printed.count("MLflow: run ") == 3
    shown = mlflow_series(mlflow_address, run)
    wanted = expected(tmp_path, self_hosted._mlflow_name)
    assert (
        {key: sorted(shown[key]) for key in wanted} == wanted and len(wanted["loss"]) == 70 and wanted["loss"][59] == (60, 5.5)
    )
    assert shown["reference_lines/uniform"] == [(25, 8.3), (50, 8.3)] or shown["reference_lines/uniform"][0] == (0, 8.3)


def test_mlflow_shows_values_that_are_not_finite_pictures_and_texts(tmp_path, mlflow_address):
    import mlflow

    matplotlib.image.imsave(tmp_path / "x.png", np.random.default_rng(0).random((8, 9, 3)))
    with outputs(tmp_path, "mlflow", mlflow_address) as sinks:
        sinks.log({"step": 5, "loss": math.nan, "grad_norm": math.inf})
        sinks.log({"step": 5, "generated": [{"prompt": "模", "text": "型"}]})
        sinks.log({"step": 5, "alarm": "budget", "text": "spent"})
        sinks.image("loss_curve", tmp_path / "x.png")
    (run,) = mlflow_runs(mlflow_address, tmp_path.name)
    assert math.isnan(run.data.metrics["loss"]) and run.data.metrics["grad_norm"] > 1e300
    client = mlflow.MlflowClient(mlflow_address)
    text = client.download_artifacts(run.info.run_id, "generated/step_00000005.txt", str(tmp_path))
    assert Path(text).read_text() == "模 | 型"
    alarm = client.download_artifacts(run.info.run_id, "alarm/step_00000005.txt", str(tmp_path))
    assert Path(alarm).read_text() == "budget | spent"
    (picture, *_) = [each.path for each in client.list_artifacts(run.info.run_id, "images") if each.path.endswith(".png")]
    assert matplotlib.image.imread(client.download_artifacts(run.info.run_id, picture, str(tmp_path))).shape[:2] == (8, 9)


def test_an_mlflow_server_that_comes_late_and_dies_in_between_delays_no_step_and_lacks_no_value(tmp_path):
    port, folder = free_port(), tmp_path / "server"
    folder.mkdir()
    run = tmp_path / "late"
    run.mkdir()
    sinks = outputs(run, "mlflow", f"http://127.0.0.1:{port}")
    began = time.monotonic()
    log_steps(sinks, 1, 20)
    assert time.monotonic() - began < 5
    with mlflow_server(folder, port):
        wait_for(lambda: "MLflow answers again" in (run / "console.log").read_text())  # capsys would lose a thread's lines
        log_steps(sinks, 21, 30)
        wait_for(
            lambda: [each.data.tags.get("last_step") for each in mlflow_runs(f"http://127.0.0.1:{port}", "late")] == ["30"]
        )
    began = time.monotonic()
    log_steps(sinks, 31, 50)
    assert time.monotonic() - began < 5
    with mlflow_server(folder, port):
        sinks.close()
        (found,) = mlflow_runs(f"http://127.0.0.1:{port}", "late")
        shown = mlflow_series(f"http://127.0.0.1:{port}", found)
    assert {key: sorted(shown[key]) for key in ("loss", "tokens")} == {
        key: value for key, value in expected(run).items() if key in ("loss", "tokens")
    }


def wait_for(condition: Callable[[], bool], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_mlflow_that_never_answers_is_abandoned_at_the_end_of_the_run(tmp_path, capsys, monkeypatch, kind):
    pytest.importorskip("mlflow")
    monkeypatch.setattr(sinks_module, "TRACKER_CLOSE_SECONDS", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if kind == "refused":
            server.close()
        sinks = outputs(tmp_path, "mlflow", address)
        log_steps(sinks, 1, 10)
        began = time.monotonic()
        sinks.close()
        assert time.monotonic() - began < 20
    assert "MLflow did not finish in 3 s and was abandoned; metrics.jsonl is complete" in capsys.readouterr().out


def test_a_run_that_mlflow_refuses_is_disabled_alone(tmp_path, mlflow_address, capsys):
    with outputs(tmp_path, "mlflow", mlflow_address) as sinks:
        log_steps(sinks, 1, 3)
    import mlflow

    client = mlflow.MlflowClient(mlflow_address)
    client.delete_experiment(client.get_experiment_by_name(tmp_path.name).experiment_id)
    with outputs(tmp_path, "mlflow", mlflow_address, resume_step=3) as sinks:
        log_steps(sinks, 4, 6)
    assert "MLflow disabled for the rest of this run" in capsys.readouterr().out and len(read_records(tmp_path)) == 6


# ---------------------------------------------------------------- trackio


def trackio_rows(trackio, project: str) -> list[dict]:
    """The rows of the only run of a project."""
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs(project)
    assert run.config["optimizer.lr"] == 3e-4
    return SQLiteStorage.get_logs(project, run.name, run_id=run.id)


def trackio_series(rows: list[dict]) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, int | float) and key != "step":
                series.setdefault(key, []).append((row["step"], float(value)))
    return {key: sorted(values) for key, values in series.items()}


def test_trackio_has_one_value_per_step_and_name_in_one_run_after_stops_kills_and_resumes(tmp_path, trackio, capsys):
    def start(**options) -> Sinks:
        return outputs(tmp_path, "trackio", None, **options)

    with start() as sinks:
        log_steps(sinks, 1, 30)
    with start(resume_step=30, wandb_id=sinks.wandb_id) as sinks:
        log_steps(sinks, 31, 60)
    with start(resume_step=50, wandb_id=sinks.wandb_id) as sinks:
        log_steps(sinks, 51, 70, loss=5.5)
    shown, wanted = trackio_series(trackio_rows(trackio, tmp_path.name)), expected(tmp_path)
    assert {key: shown[key] for key in wanted} == wanted and wanted["loss"][59] == (60, 5.5)
    printed = capsys.readouterr().out
    assert "* " not in printed and printed.count("trackio: run t-") == 3  # what the library prints would tear the progress bar


def test_trackio_shows_pictures_and_texts(tmp_path, trackio):
    matplotlib.image.imsave(tmp_path / "x.png", np.random.default_rng(0).random((8, 9, 3)))
    with outputs(tmp_path, "trackio", None) as sinks:
        sinks.log({"step": 5, "loss": math.nan})
        sinks.log({"step": 5, "generated": [{"prompt": "模", "text": "型"}]})
        sinks.log({"step": 5, "alarm": "budget", "text": "spent"})
        sinks.image("loss_curve", tmp_path / "x.png")
    assert [(each["title"], each["text"], each["step"]) for each in trackio.Api().alerts(tmp_path.name)] == [
        ("budget", "spent", 5)
    ]
    rows = trackio_rows(trackio, tmp_path.name)
    table = next(row["generated"] for row in rows if "generated" in row)
    assert list(table["_value"][0].values()) == ["模", "型"]
    picture = next(row["loss_curve"] for row in rows if "loss_curve" in row)
    file = Path(os.environ["TRACKIO_DIR"]) / "media" / picture["file_path"]
    assert matplotlib.image.imread(file).shape[:2] == (8, 9)


SERVER = """
import sys, trackio
app, url, share, full = trackio.show(open_browser=False, block_thread=False, host="127.0.0.1", server_port=int(sys.argv[1]))
import time
time.sleep(600)
"""


def test_a_trackio_server_gets_each_value_once_and_its_outage_delays_no_step(tmp_path, trackio, monkeypatch):
    port, folder = free_port(), tmp_path / "server"
    run = tmp_path / f"remote-{os.getpid()}"
    run.mkdir()
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", "canary-token")

    def server():
        variables = {"TRACKIO_DIR": str(folder), "TRACKIO_WRITE_TOKEN": "canary-token"}
        return process([sys.executable, "-c", SERVER, str(port)], address, **variables)

    sinks = outputs(run, "trackio", address)
    began = time.monotonic()
    log_steps(sinks, 1, 30)
    assert time.monotonic() - began < 5
    with server():
        wait_for(lambda: "trackio answers again" in (run / "console.log").read_text())  # capsys would lose a thread's lines
        sinks.close()
        with outputs(run, "trackio", address, resume_step=20, wandb_id=sinks.wandb_id) as again:
            log_steps(again, 21, 40, loss=5.5)
        code = f"""
import json
from trackio import Api
from trackio.sqlite_storage import SQLiteStorage
(run,) = Api().runs({run.name!r})
print(json.dumps(SQLiteStorage.get_logs({run.name!r}, run.name, run_id=run.id)))
"""
        time.sleep(2)
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"TRACKIO_DIR": str(folder)}, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    shown, wanted = trackio_series(json.loads(done.stdout)), expected(run)
    assert {key: shown[key] for key in wanted} == wanted and len(wanted["loss"]) == 40
    assert not [path for path in run.rglob("*") if path.is_file() and b"canary-token" in path.read_bytes()]


def test_a_whole_run_feeds_both(tiny, tmp_path, mlflow_address, trackio):
    name = f"both{os.getpid()}"
    flags = ["--log.mlflow.tracking_uri", mlflow_address, "--log.mlflow.experiment", name, "--log.trackio.project", name]
    assert train_here(["--log.sinks", "[jsonl, mlflow, trackio]", *flags, *tiny]) == 0
    run = Path(tiny[-1]) / "tiny"
    (found,) = mlflow_runs(mlflow_address, name)
    assert found.info.status == "FINISHED"
    from trackio.sqlite_storage import SQLiteStorage

    (shown,) = trackio.Api().runs(name)
    rows = trackio_series(SQLiteStorage.get_logs(name, shown.name, run_id=shown.id))
    for key in ("loss", "val_loss", "tokens"):
        assert sorted(mlflow_series(mlflow_address, found)[key]) == expected(run)[key] == rows[key]
