"""MLflow and trackio: trackers that people host themselves.

Neither can rewind a run. Where one holds values of steps after the one from which a start resumes, a new run takes the place of
the old one and gets the curve again from metrics.jsonl, so that there is one value per step and name. While a server is out of
reach, records wait in memory and are sent when it answers. Passwords and tokens come from the environment, never from settings.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pretrain.report.config import MlflowConfig, TrackioConfig
from pretrain.report.records import iter_records
from pretrain.report.trackers import Values, Write, one_line, values_of

RETRY_SECONDS = 5.0
MLFLOW_BATCH = 1000  # metrics per request, https://mlflow.org/docs/latest/rest-api.html#request-limits
MLFLOW_PARAMETERS = 100
MLFLOW_PARAMETER_CHARACTERS = 6000
_T = TypeVar("_T")


@dataclass(frozen=True)
class Continued:
    """The run that a start continues."""

    id: str
    """Its id, made by the first start; the same for all trackers."""
    name: str
    settings: dict[str, Any]
    """Settings by dotted key."""
    directory: Path
    resume_step: int
    total_steps: int
    can_replay: bool
    """metrics.jsonl is kept, so the curve up to `resume_step` can be sent again."""
    info: Callable[[str], None]

    def rows(self, after: int) -> Iterator[tuple[int, Values]]:
        """What trackers show of the records of steps after `after`, up to `resume_step`; later ones are in the queue."""
        lines = None
        for record in iter_records(self.directory):
            lines = record.get("reference_lines", lines)
            if record["step"] > self.resume_step:
                return
            if record["step"] > after:
                yield record["step"], values_of(record, lines)

    def must_replace(self, tracker: str, last_step: int) -> bool:
        """True if the run at a tracker, which ends at `last_step`, has to give way to a new one."""
        if last_step > self.resume_step and not self.can_replay:
            text = f"{tracker} keeps its old values of steps after {self.resume_step:,}"
            self.info(f"{text}: without jsonl in log.sinks, the curve cannot be repeated.")
        return last_step > self.resume_step and self.can_replay


def patiently(call: Callable[[], _T], is_outage: Callable[[Exception], bool], tracker: str, info: Callable[[str], None]) -> _T:
    """`call()`, repeated while the server is out of reach; says so once. Other errors are raised."""
    lost = False
    while True:
        try:
            result = call()
        except Exception as error:
            if not is_outage(error):
                raise
            if not lost:
                info(f"{tracker} cannot be reached ({one_line(error)[:200]}); its records wait in memory.")
            lost = True
            time.sleep(RETRY_SECONDS)
            continue
        if lost:
            info(f"{tracker} answers again; what waited is sent.")
        return result


def once_per_step(write: Write) -> Write:
    """`write` without names that a step has already: a validation repeats the `tokens` of its step."""
    at, seen = None, set()

    def write_new(step: int, values: Values) -> None:
        nonlocal at
        if step != at:
            at = step
            seen.clear()
        if new := {key: value for key, value in values.items() if key not in seen}:
            write(step, new)
        seen.update(values)

    return write_new


# ---------------------------------------------------------------- MLflow


@contextmanager
def open_mlflow(config: MlflowConfig, run: Continued) -> Iterator[Write]:
    """A run of an MLflow server, or of a local database or folder, found again by its tag `pretrain.id`."""
    # The library would retry each request for minutes by itself, report to its makers, and print into the progress bar.
    for name, value in (("MAX_RETRIES", "0"), ("TIMEOUT", "20")):
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
    for name in ("DISABLE_TELEMETRY", "SUPPRESS_PRINTING_URL_TO_STDOUT"):
        os.environ.setdefault(f"MLFLOW_{name}", "true")
    there = _Mlflow(config, run)
    there.start()
    if run.resume_step > there.last_step:
        there.send(run.rows(after=there.last_step))
    try:
        yield once_per_step(lambda step, values: there.send([(step, values)]))
    except BaseException:
        with contextlib.suppress(Exception):
            there.client.set_terminated(there.run_id, "FAILED")
        raise
    status = "FINISHED" if there.last_step >= run.total_steps else "KILLED"  # the next start of the run sets RUNNING again
    there.ask(lambda: there.client.set_terminated(there.run_id, status))


class _Mlflow:
    """A client of MLflow for one run."""

    def __init__(self, config: MlflowConfig, run: Continued) -> None:
        import mlflow  # takes a second, so only where it is used

        self.client = mlflow.MlflowClient(config.tracking_uri)  # None: MLFLOW_TRACKING_URI
        self._address, self._experiment, self._run = config.tracking_uri or mlflow.get_tracking_uri(), config.experiment, run
        self.run_id, self.last_step = "", -1
        """MLflow's id of the run; the last step that it has."""

    def ask(self, call: Callable[[], _T]) -> _T:
        """`call()`, as soon as the server can be reached."""
        return patiently(call, _is_mlflow_outage, "MLflow", self._run.info)

    def start(self) -> None:
        """Finds the run, or makes one, in place of one that holds steps after the one from which this start resumes."""
        experiment = self.ask(lambda: _mlflow_experiment(self.client, self._experiment))
        found, self.last_step = self.ask(lambda: _mlflow_run(self.client, experiment, self._run.id))
        if found is not None and self._run.must_replace("MLflow", self.last_step):
            self.ask(lambda: self.client.delete_run(found))
            again = f"a new run gets the curve up to step {self._run.resume_step:,}"
            self._run.info(f"MLflow: {again}; the old one is in MLflow's trash.")
            found, self.last_step = None, -1
        if found is None:
            self.run_id = self._create(experiment)
        else:
            self.run_id = found
            self.ask(lambda: self.client.update_run(found, status="RUNNING"))
        where = re.sub(r"//[^/@]*@", "//", self._address)  # without a password
        self._run.info(f"MLflow: run {self.run_id} of experiment {self._experiment} at {where}")

    def _create(self, experiment: str) -> str:
        from mlflow.entities import Param

        tags = {"pretrain.id": self._run.id}
        run_id = self.ask(lambda: self.client.create_run(experiment, tags=tags, run_name=self._run.name).info.run_id)
        given = {key: str(value) for key, value in self._run.settings.items() if not key.startswith("environment.")}
        settings = [Param(_mlflow_name(key), text[:MLFLOW_PARAMETER_CHARACTERS]) for key, text in given.items()]
        for first in range(0, len(settings), MLFLOW_PARAMETERS):
            some = settings[first : first + MLFLOW_PARAMETERS]
            self.ask(lambda some=some: self.client.log_batch(run_id, params=some))
        return run_id

    def send(self, rows: Iterable[tuple[int, Values]]) -> None:
        """Sends numbers in requests as large as allowed, and files one by one."""
        from mlflow.entities import Metric, RunTag

        for step, metrics in _batches(rows, Metric, self._send_file):
            tags = [RunTag("last_step", str(step))]
            self.ask(lambda metrics=metrics, tags=tags: self.client.log_batch(self.run_id, metrics, tags=tags))
            self.last_step = max(self.last_step, step)

    def _send_file(self, step: int, key: str, value: Path | list[dict[str, str]]) -> None:
        """A picture or texts. They may have a storage of their own, which may be broken alone, so that no error is raised."""
        import matplotlib.image

        name = _mlflow_name(key)
        try:
            if isinstance(value, Path):
                picture = matplotlib.image.imread(value)[..., :3]
                self.client.log_image(self.run_id, picture, key=name, step=step, synchronous=True)
            else:
                text = "\n\n".join(" | ".join(map(str, row.values())) for row in value)
                self.client.log_text(self.run_id, text, f"{name}/step_{step:08d}.txt")
        except Exception as error:
            self._run.info(f"MLflow has no {key} of step {step:,} ({one_line(error)[:200]}).")


def _batches(rows: Iterable[tuple[int, Values]], metric: Callable, send_file: Callable) -> Iterator[tuple[int, list]]:
    """(last step, its and earlier steps' metrics) as large as one request may be. Files are sent as they come."""
    waiting: list = []
    seen: set[tuple[int, str]] = set()
    now = int(1000 * time.time())
    step = -1
    for step, values in rows:
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        new = [metric(_mlflow_name(key), float(numbers[key]), now, step) for key in numbers if (step, key) not in seen]
        if len(waiting) + len(new) > MLFLOW_BATCH:
            yield waiting[-1].step, waiting
            waiting, seen = [], {each for each in seen if each[0] == step}
        waiting += new
        seen |= {(step, key) for key in numbers}
        for key in values.keys() - numbers.keys():
            send_file(step, key, values[key])
    if waiting:
        yield step, waiting


def _mlflow_name(key: str) -> str:
    """`key` without what MLflow refuses in names (mlflow/utils/validation.py)."""
    return posixpath.normpath(re.sub(r"[^/\w.\- ]", "_", key)).lstrip("./")[:250] or "_"


def _mlflow_experiment(client: Any, name: str) -> str:
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name)


def _mlflow_run(client: Any, experiment: str, our_id: str) -> tuple[str | None, int]:
    """(MLflow's id of our run, its last step); (None, -1): there is none yet."""
    runs = client.search_runs([experiment], f"tags.`pretrain.id` = '{our_id}'", max_results=1)
    return (runs[0].info.run_id, int(runs[0].data.tags.get("last_step", -1))) if runs else (None, -1)


def _is_mlflow_outage(error: Exception) -> bool:
    """The server cannot be reached, is overloaded or failed; else it refused the request."""
    status = getattr(error, "get_http_status_code", lambda: 0)()
    return status >= 500 or status == 429 or isinstance(error, ConnectionError | TimeoutError)


# ---------------------------------------------------------------- trackio


@contextmanager
def open_trackio(config: TrackioConfig, run: Continued) -> Iterator[Write]:
    """A run in trackio's local database, or on a trackio server, under the name `<run.name>-<id>`."""
    import trackio
    import trackio.run
    import trackio.utils

    for module in (trackio, trackio.run, trackio.utils):  # it prints, which would tear the progress bar
        module.print = lambda *_, **__: None
    name = f"{run.name}-{run.id}"
    url = config.server_url or os.environ.get("TRACKIO_SERVER_URL")
    last_step, delete = _trackio_run(url, config.project, name, run.info)
    if run.must_replace("trackio", last_step):
        delete()
        last_step = -1
    given = {"server_url": url} if url else {}
    opened = trackio.init(
        config.project, name, config=run.settings, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False, **given
    )

    where = (
        f"at {url.split('?')[0]}"
        if url
        else f"in {trackio.utils.TRACKIO_DIR}; to see it: trackio show --project {config.project}"
    )
    run.info(f"trackio: run {name} {where}")

    def send(step: int, values: Values) -> None:
        for each in values.get("alarm", []):
            opened.alert(each["alarm"], each["text"], trackio.AlertLevel.WARN)
        if row := {key: _for_trackio(trackio, value) for key, value in values.items() if key != "alarm"}:
            opened.log(row, step=step)

    write = once_per_step(send)
    if run.resume_step > last_step:
        for row in run.rows(after=last_step):
            write(*row)
    try:
        yield write
    finally:
        opened.finish()


def _trackio_run(url: str | None, project: str, name: str, info: Callable[[str], None]) -> tuple[int, Callable[[], object]]:
    """(last step of the run, -1 if there is none; deletes it)."""
    if url is None:
        from trackio import Api
        from trackio.sqlite_storage import SQLiteStorage

        def delete() -> None:
            for each in Api().runs(project):
                if each.name == name:
                    each.delete()

        last = SQLiteStorage.get_max_step_for_run(project, name)
        return (-1 if last is None else last), delete
    from trackio import utils
    from trackio.remote_client import RemoteClient

    base, token = utils.parse_trackio_server_url(url)
    token = token or os.environ.get("TRACKIO_WRITE_TOKEN")

    def ask(endpoint: str, **given: str) -> Any:
        client = RemoteClient(base, hf_token=None, write_token=token, verbose=False)
        return client.predict(project=project, api_name=endpoint, **given)

    runs = patiently(lambda: ask("/get_runs_for_project"), _is_trackio_outage, "trackio", info)
    if not any(isinstance(each, dict) and each.get("name") == name for each in runs):
        return -1, lambda: None
    last = ask("/get_run_summary", run=name).get("last_step")
    return (-1 if last is None else last), lambda: ask("/delete_run", run=name)


def _is_trackio_outage(error: Exception) -> bool:
    from trackio.remote_client import httpx

    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500 or error.response.status_code == 429
    return isinstance(error, httpx.TransportError | ConnectionError | TimeoutError)


def _for_trackio(trackio: Any, value: object) -> object:
    """`value` as trackio wants it."""
    if isinstance(value, Path):
        return trackio.Image(str(value))
    if isinstance(value, list):
        return trackio.Table(columns=list(value[0]), data=[list(row.values()) for row in value])
    return value
