"""Alarms reach a real web server, once for each cause, and no state of that server stops or delays a run."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pretrain.report import alarms
from pretrain.report.config import AlarmConfig, LogConfig
from pretrain.report.records import read_records
from pretrain.report.sinks import Sinks, open_sinks
from tests.models import train_here
from tests.test_sinks import ROOT
from tests.test_supervise import SCRIPTED
from tests.test_trackers import server as wandb_stub  # noqa: F401 a fixture
from tests.test_train import DIVERGING


class Webhook:
    """A web server that keeps what is posted to it, and answers with these statuses, the last one again and again."""

    def __init__(self, *statuses: int, seconds: float = 0.0, location: str = "/moved"):
        self.messages: list[tuple[str, dict]] = []
        hook, left = self, list(statuses or (200,))

        class Answer(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.messages.append((self.path, json.loads(body)))
                assert self.headers["Content-Type"] == "application/json; charset=utf-8"
                time.sleep(seconds)
                self.send_response(left.pop(0) if len(left) > 1 else left[0])
                self.send_header("Location", location)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self):  # what a redirected POST becomes in many clients
                hook.messages.append((self.path, {}))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def kinds(self) -> list[str]:
        return [message["alarm"] for _, message in self.messages]


@pytest.fixture
def webhook(monkeypatch) -> Iterator[Callable[..., Webhook]]:
    """Starts a Webhook, which gets the alarms."""
    started = []

    def start(*statuses: int, **options) -> Webhook:
        hook = Webhook(*statuses, **options)
        started.append(hook)
        monkeypatch.setenv(alarms.VARIABLE, hook.url)
        return hook

    monkeypatch.setattr(alarms, "PAUSES_SECONDS", (0.05, 0.05, 0.05))
    yield start
    for hook in started:
        hook.server.shutdown()
        hook.server.server_close()


def outputs(directory: Path, *names: str, resume_step: int = 0, **options) -> Sinks:
    config = LogConfig(sinks=["jsonl", "console", *names], alarms=AlarmConfig(**options))
    given = {"rank": 0, "name": "模型", "settings": {}, "total_steps": 100, "wandb_id": None}
    return open_sinks(config, directory, resume_step=resume_step, **given)


SLOW = {"slow_rank": 3, "slow_host": "node-7", "text": "rank 3 on node-7 is 1.6 times as slow as the others: data"}


def test_each_cause_is_sent_once_in_the_forms_that_chats_understand_and_is_a_record(tmp_path, webhook):
    hook = webhook()
    with outputs(tmp_path) as sinks:
        sinks.log({"step": 10, "loss": 1.0, "skipped_steps": 0})
        sinks.log({"step": 20, "loss": 1.0, "skipped_steps": 2})
        sinks.log({"step": 30, "loss": 1.0, "skipped_steps": 2})
        for step in (30, 40):
            sinks.log({"step": step, **SLOW})
        sinks.log({"step": 40, **SLOW, "slow_rank": 4})
        sinks.log({"step": 50, "alarm": "budget", "text": "the budget of $10 is spent"})
        sinks.log({"step": 50, "alarm": "mirror", "text": "the mirror is 3 checkpoints behind", "cause": "behind"})
        sinks.log({"step": 60, "alarm": "mirror", "text": "the mirror is 4 checkpoints behind", "cause": "behind"})
    assert hook.kinds() == ["skipped_steps", "slow_rank", "slow_rank", "budget", "mirror"]
    _, first = hook.messages[0]
    text = (
        f"模型: skipped steps (step 20, {socket.gethostname()}): 2 steps were skipped since the last line: loss or gradient was"
    )
    assert first["text"] == first["content"] == f"{text} not finite"  # Slack and Mattermost; Discord
    assert (first["title"], first["step"], first["run"]) == ("模型: skipped steps", 20, "模型") and "not finite" in first[
        "message"
    ]
    own = [record for record in read_records(tmp_path) if record.get("alarm") == "skipped_steps"]
    assert [record["step"] for record in own] == [20]


def test_kinds_that_are_not_wanted_are_not_sent_and_without_a_webhook_nothing_is(tmp_path, webhook, monkeypatch):
    hook = webhook()
    with outputs(tmp_path, kinds=["budget"]) as sinks:
        sinks.log({"step": 30, **SLOW})
        sinks.ended(75, "SIGTERM")
        sinks.log({"step": 50, "alarm": "budget", "text": "spent"})
    assert hook.kinds() == ["budget"]
    monkeypatch.delenv(alarms.VARIABLE)
    with outputs(tmp_path) as sinks:
        sinks.log({"step": 50, "alarm": "budget", "text": "spent"})
    assert len(hook.messages) == 1 and alarms.notify(AlarmConfig(), "t", "crash_loop", "x") is None


@pytest.mark.parametrize(("status", "kind"), [(0, None), (2, "stopped"), (70, "diverged"), (75, "preempted"), (76, "budget")])
def test_every_end_but_success_is_an_alarm_and_no_record(tmp_path, webhook, status, kind):
    hook = webhook()
    with outputs(tmp_path) as sinks:
        sinks.log({"step": 7, "loss": 1.0})
        sinks.ended(status, "a reason")
    assert hook.kinds() == ([kind] if kind else []) and len(read_records(tmp_path)) == 1
    assert all(message["step"] == 7 and "a reason" in message["text"] for _, message in hook.messages)


def test_success_is_sent_if_asked_for(tmp_path, webhook):
    hook = webhook()
    with outputs(tmp_path, kinds=["done"]) as sinks:
        sinks.ended(0, "")
    assert hook.kinds() == ["done"]


def test_an_error_that_ends_the_run_is_an_alarm(tmp_path, webhook):
    hook = webhook()
    with pytest.raises(RuntimeError), outputs(tmp_path) as sinks:
        sinks.log({"step": 7, "loss": 1.0})
        raise RuntimeError("CUDA error: an illegal memory access\nsecond line")
    assert hook.kinds() == ["stopped"]
    assert hook.messages[0][1]["text"].endswith("RuntimeError: CUDA error: an illegal memory access")


def test_a_stall_is_noticed_while_the_run_hangs_and_each_stall_once(tmp_path, webhook):
    hook = webhook()
    with outputs(tmp_path, stall_minutes=0.5 / 60) as sinks:
        time.sleep(0.8)  # before the first step, which may have to compile
        assert not hook.messages
        for step in (1, 2):
            sinks.progress(step)
            wait_for(lambda: len(hook.messages) == step)  # noqa: B023
            time.sleep(0.8)
    assert hook.kinds() == ["stall", "stall"] and "the last one was step 2" in hook.messages[1][1]["text"]
    assert [record["alarm"] for record in read_records(tmp_path)] == ["stall", "stall"]


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---------------------------------------------------------------- webhooks that fail


def test_a_message_is_sent_again_after_errors_that_may_pass(tmp_path, webhook, capsys):
    hook = webhook(500, 429, 503, 200)
    with outputs(tmp_path) as sinks:
        sinks.log({"step": 1, "alarm": "budget", "text": "spent"})
        wait_for(lambda: len(hook.messages) == 4)
    assert hook.kinds() == ["budget"] * 4 and "alarms:" not in capsys.readouterr().out


@pytest.mark.parametrize("status", [307, 308])
def test_a_redirection_that_keeps_the_message_is_followed(tmp_path, webhook, status):
    hook = webhook(status, 200)
    with outputs(tmp_path) as sinks:
        sinks.log({"step": 1, "alarm": "budget", "text": "spent"})
    assert [(path, message["alarm"]) for path, message in hook.messages] == [("/hook", "budget"), ("/moved", "budget")]


@pytest.mark.parametrize("status", [302, 400, 404, 500])
def test_a_webhook_that_refuses_is_reported_once_and_without_its_address(tmp_path, webhook, capsys, status):
    hook = webhook(status)
    with outputs(tmp_path) as sinks:
        for step in (1, 2):
            sinks.log({"step": step, "alarm": "budget", "text": f"spent {step}"})
    said = capsys.readouterr().out + (tmp_path / "console.log").read_text()
    assert said.count(f"did not accept one (status {status}") == 2  # on the console and in its file
    assert "/hook" not in said and all(message for _, message in hook.messages)  # never a GET without a message
    assert len(read_records(tmp_path)) == 2


@pytest.mark.parametrize("kind", ["silent", "refused", "no name", "slow"])
def test_no_outage_delays_a_step_or_the_end_of_a_run(tmp_path, webhook, monkeypatch, kind):
    monkeypatch.setattr(alarms, "CLOSE_SECONDS", 2.0)
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        if kind == "refused":
            silent.close()
        address = webhook(seconds=1.0).url if kind == "slow" else "http://nowhere.invalid/" if kind == "no name" else address
        monkeypatch.setenv(alarms.VARIABLE, address)
        sinks = outputs(tmp_path)
        began = time.monotonic()
        for step in range(1, 21):
            sinks.log({"step": step, "alarm": "budget", "text": f"spent {step}"})
        assert time.monotonic() - began < 1.0
        sinks.close()
        assert time.monotonic() - began < 8.0
    assert len(read_records(tmp_path)) == 20


# ---------------------------------------------------------------- other ways out


def test_wandb_gets_alerts_and_replays_none(tmp_path, wandb_stub, webhook, capsys):  # noqa: F811
    webhook()
    sent = []
    wandb_stub.AlertLevel = type("AlertLevel", (), {"WARN": "WARN"})
    wandb_stub.run.alert = lambda *given: sent.append(given)
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "alarm": "budget", "text": "old"}\n{"step": 50, "loss": 2.5}\n')
    with outputs(tmp_path, "wandb", resume_step=50) as sinks:
        sinks.log({"step": 51, **SLOW})
    assert sent == [("模型: slow_rank", SLOW["text"], "WARN")]
    assert wandb_stub.run.rows[-1] == (51, {"step": 51, "slow_rank": 3})  # an alert is no row
    assert "W&B disabled" not in capsys.readouterr().out


def test_tensorboard_shows_alarms_as_text(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")
    with outputs(tmp_path, "tensorboard") as sinks:
        sinks.log({"step": 51, **SLOW})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("alarm/text_summary")
    assert text.tensor_proto.string_val[0].decode() == f"slow_rank | {SLOW['text']}"


def test_the_supervisor_can_send_without_torch(webhook):
    hook = webhook()
    code = "import sys; from pretrain.report import alarms; from pretrain.report.config import AlarmConfig\n"
    code += "assert alarms.notify(AlarmConfig(), 'r', 'crash_loop', 'three ends') is None; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
    assert hook.kinds() == ["crash_loop"] and hook.messages[0][1]["step"] is None


def test_the_supervisor_sends_the_end_of_a_crash_loop(tiny, webhook):
    hook = webhook()
    code = f"{SCRIPTED}\nscript = [(200, 75), (200, 1), (200, None), (200, None)]\nsys.exit(run.run())"
    done = subprocess.run([sys.executable, "-c", code, *tiny], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 70 and hook.kinds() == ["crash_loop"], done.stderr
    assert "3 attempts in a row ended without a new checkpoint" in hook.messages[0][1]["text"]


def test_an_address_that_is_none_is_refused_before_training_without_showing_it(tiny, monkeypatch, capsys):
    monkeypatch.setenv(alarms.VARIABLE, "hooks.example/secret")
    assert train_here(tiny) == 2
    error = capsys.readouterr().err
    assert alarms.VARIABLE in error and "secret" not in error


def test_a_run_that_diverges_says_so(tiny, webhook):
    hook = webhook()
    assert train_here([*DIVERGING, *tiny]) == 70
    assert hook.kinds()[-1] == "diverged" and "not finite" in hook.messages[-1][1]["text"]


def test_a_start_that_is_refused_is_an_alarm_although_the_run_has_no_outputs_yet(tiny, webhook):
    hook = webhook()
    assert train_here(["--data.synthetic", "null", "--data.train", "[{path: nowhere/data}]", *tiny]) == 2
    assert hook.kinds() == ["stopped"] and "nowhere/data" in hook.messages[0][1]["text"]
