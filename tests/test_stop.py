"""Signals become flags, and flags an exit status; the process can be ended whatever its main thread does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.run.stop import StopRequest, exit_status, is_peer_lost, who_asked

ROOT = Path(__file__).parents[1]
HEAD = """
import os, time
from pretrain.run.stop import StopRequest
stop = StopRequest()
stop.last_words = lambda status, reason: print(status, reason, flush=True)
"""


def child(code: str, **variables: str) -> subprocess.Popen:
    """A process that has made a StopRequest and runs `code`, which prints `ready`."""
    environment = {**os.environ, **variables}
    return subprocess.Popen([sys.executable, "-c", HEAD + code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def end_of(process: subprocess.Popen) -> tuple[int, str, float]:
    began = time.monotonic()
    said, _ = process.communicate(timeout=30)
    return process.returncode, said, time.monotonic() - began


@pytest.fixture
def stop():
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup, and then no request to stop
    request = StopRequest()
    request.training()
    yield request
    request.close()
    signal.signal(signal.SIGHUP, hangup)


def soon(condition) -> bool:
    """True if it holds within ten seconds: another thread receives the signal."""
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


NOTICES = (signal.SIGTERM, signal.SIGUSR2, signal.SIGXCPU, signal.SIGPWR, signal.SIGHUP)


@pytest.mark.parametrize(
    ("number", "flags", "status"), [*((each, [1, 0, 0, 0, 0], 75) for each in NOTICES), (signal.SIGINT, [0, 1, 0, 0, 0], 130)]
)
def test_a_signal_becomes_a_flag(stop, number, flags, status):
    assert stop.flags() == [0, 0, 0, 0, 0] and exit_status(stop.flags()) == 0
    os.kill(os.getpid(), number)
    assert soon(lambda: stop.flags() == flags) and exit_status(flags) == status
    os.kill(os.getpid(), signal.SIGTERM)  # a second SIGTERM changes nothing
    time.sleep(0.05)
    assert stop.flags() == flags


def test_closing_restores_the_handlers_and_may_be_repeated():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stop = StopRequest()
    stop.close()
    stop.close()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_notice_that_was_ignored_when_the_process_started_stays_ignored():
    """As nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    stop = StopRequest()
    stop.training()
    os.kill(os.getpid(), signal.SIGUSR2)
    time.sleep(0.05)
    assert stop.flags() == [0, 0, 0, 0, 0] and signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
    stop.close()
    signal.signal(signal.SIGUSR2, before)


def test_the_file_stop_counts_as_a_request_of_a_person(stop, tmp_path):
    stop.stop_file = tmp_path / "STOP"
    assert stop.flags() == [0, 0, 0, 0, 0]
    stop.stop_file.touch()
    assert stop.flags() == [0, 0, 1, 0, 0] and exit_status([0, 0, 1, 0, 0]) == 130
    assert who_asked([0, 0, 1, 0, 0]) == "the file STOP"


def test_a_lost_folder_is_a_request_of_its_own_that_any_other_wins_over(stop):
    stop.folder_lost = lambda: "it was renamed"
    assert stop.flags() == [0, 0, 0, 1, 0] and exit_status(stop.flags()) == 74
    assert [exit_status([*others, 1, 0]) for others in ([1, 0, 0], [0, 1, 0], [0, 0, 1])] == [75, 130, 130]


def test_the_end_of_the_budget_stops_a_run_and_no_signal_of_a_machine_restarts_it(stop):
    stop.budget_is_reached = lambda: True
    assert stop.flags() == [0, 0, 0, 0, 1] and exit_status(stop.flags()) == 76
    assert [exit_status([*others, 1]) for others in ([1, 0, 0, 0], [0, 1, 0, 0])] == [76, 130]
    assert who_asked([0, 0, 0, 0, 1]) == "its budget"


def test_a_person_on_any_of_many_ranks_wins_over_sigterm():
    assert exit_status([5000, 1, 0, 0, 0]) == 130 and who_asked([5000, 1, 0, 0, 0]) == "SIGTERM and SIGINT"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR2, 75), (signal.SIGINT, 130)])
def test_before_the_first_step_a_signal_ends_the_process_at_once(number, status):
    process = child("print('ready', flush=True); time.sleep(60)")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    code, said, seconds = end_of(process)
    assert code == status and "before the first step: nothing to save" in said and seconds < 20


# As in a collective: C code that waits, and keeps waiting after a signal, so no handler in Python runs.
BLOCKED_IN_C = (
    "import ctypes; c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64); print('ready', flush=True); "
    "c.pthread_mutex_lock(mutex); c.pthread_mutex_lock(mutex)"
)


def test_a_second_sigint_exits_at_once_even_if_the_main_thread_hangs_in_c():
    process = child("stop.training(); " + BLOCKED_IN_C)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, said, seconds = end_of(process)
    assert code == 130 and "second SIGINT" in said and seconds < 20


@pytest.mark.parametrize("notified_by", ["signal", "peers"])
def test_a_rank_whose_peers_never_answer_exits_with_75_at_the_deadline(notified_by):
    agreed = "stop.agreed(75); " if notified_by == "peers" else ""
    process = child("stop.deadline_seconds = 0.5; stop.training(); " + agreed + BLOCKED_IN_C)
    assert process.stdout.readline() == "ready\n"
    if notified_by == "signal":
        process.send_signal(signal.SIGTERM)
    code, said, seconds = end_of(process)
    assert code == 75 and "75 peer_lost: no durable checkpoint 0.5 s" in said and seconds < 20


def test_a_saved_checkpoint_is_not_reported_as_lost_if_shutdown_takes_too_long():
    process = child("stop.deadline_seconds = 0.5; stop.training(); stop.saved(75); print('ready', flush=True); time.sleep(60)")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    code, said, _ = end_of(process)
    assert code == 75 and said == ""  # no last words: run_state.json is already right


@pytest.mark.parametrize("notified_by", ["signal", "peers"])
def test_a_second_sigterm_while_the_process_exits_does_not_change_its_status(notified_by):
    """As schedulers send it: to the launcher, which passes it on, and to every process."""
    agreed = "stop.agreed(75)\n" if notified_by == "peers" else "while stop.seconds_left() is None: time.sleep(0.01)\n"
    process = child(
        "stop.close(); stop = StopRequest(exits=True); stop.deadline_seconds = 60; stop.training(); "
        "print('ready', flush=True)\n" + agreed + "stop.close(); print('closed', flush=True); time.sleep(0.5); os._exit(75)"
    )
    assert process.stdout.readline() == "ready\n"
    if notified_by == "signal":
        process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "closed\n"
    process.send_signal(signal.SIGTERM)
    assert end_of(process)[0] == 75


def test_last_words_that_hang_do_not_keep_the_process_alive():
    process = child(
        "import pretrain.run.stop; pretrain.run.stop._LAST_WORDS_SECONDS = 0.5; "
        "stop.last_words = lambda *_: time.sleep(60); print('ready', flush=True); time.sleep(60)"
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert end_of(process)[0] == 75


@pytest.mark.parametrize(
    ("variable", "words", "flags"),
    [
        ("TORCHELASTIC_RUN_ID", [], [1, 0, 0, 0, 0]),
        ("NONE", ["accelerate", "launch"], [1, 0, 0, 0, 0]),  # with one process
        ("ACCELERATE_MIXED_PRECISION", [], [0, 0, 0, 0, 0]),  # a shell that exports this variable, and exits
    ],
)
def test_a_worker_whose_launcher_is_killed_gets_a_request(variable, words, flags):
    """The launcher here is a process between the test and the worker."""
    worker = HEAD + "import pretrain.run.stop; pretrain.run.stop._PARENT_POLL_SECONDS = 0.1\n"
    worker += f"stop.training(); print(os.getpid(), flush=True); end = time.monotonic() + {20 if any(flags) else 1}\n"
    worker += "while not any(stop.flags()) and time.monotonic() < end: time.sleep(0.01)\nprint(stop.flags(), flush=True)"
    launcher = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {worker!r}]); time.sleep(60)"
    command, environment = [sys.executable, "-c", launcher, *words], {**os.environ, variable: "bf16"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert int(process.stdout.readline()) > 0
    process.kill()
    process.wait()
    began = time.monotonic()
    assert process.stdout.readline() == f"{flags}\n" and time.monotonic() - began < 20


def test_errors_of_a_dead_peer_are_distinguished_from_other_errors():
    from torch.distributed import DistBackendError, DistNetworkError

    assert is_peer_lost(DistBackendError("NCCL")) and is_peer_lost(DistNetworkError("store"))
    assert is_peer_lost(RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    assert not is_peer_lost(RuntimeError("shapes do not match")) and not is_peer_lost(ValueError("gloo/transport"))
