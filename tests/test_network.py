"""Two machines of two ranks each, as network namespaces with host names of their own and a cable between them: a machine is
killed, machine 0 is killed, the cable is cut, a notice reaches one machine, and no step differs."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.test_supervise import tail
from tests.test_train import ROOT, curve, records, run_of, train_here

_numbers = itertools.count()


def ip(words: str) -> None:
    done = subprocess.run(["ip", *words.split()], capture_output=True, text=True)
    if "not permitted" in done.stderr:
        raise PermissionError(done.stderr)
    assert done.returncode == 0, f"ip {words}: {done.stderr}"


class Network:
    """Machine n is `host-n` and has the address 10.77.0.1n."""

    def __init__(self, folder: Path):
        self.folder, self.jobs = folder, {}
        name = f"{os.getpid()}-{next(_numbers)}"
        self.spaces, self.cards = [f"pt{name}-{n}" for n in (0, 1)], [f"v{name}{n}"[-15:] for n in "ab"]
        for space in self.spaces:
            ip(f"netns add {space}")
            ip(f"-n {space} link set lo up")
        (here, there), (card, other) = self.spaces, self.cards
        ip(f"link add {card} netns {here} type veth peer name {other} netns {there}")
        for n, (space, each) in enumerate(zip(self.spaces, self.cards, strict=True)):
            ip(f"-n {space} addr add 10.77.0.1{n}/24 dev {each}")
            ip(f"-n {space} link set {each} up")

    def start(self, n: int, settings: list[str], *flags: str) -> None:
        """A supervisor on machine n."""
        there = ["ip", "netns", "exec", self.spaces[n], "unshare", "--uts", "sh", "-c", f'hostname host-{n} && exec "$@"', "sh"]
        command = [*there, sys.executable, "launch/supervise.py", "--num_machines", "2", "--machine_rank", str(n)]
        command += ["--main_process_ip", "10.77.0.10", "--num_processes", "4", *flags, "--", *settings]
        with open(self.folder / f"output_{n}", "a") as output:
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": self.cards[n]}
            self.jobs[n] = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=environment)

    def pids(self, n: int) -> list[int]:
        return [int(word) for word in subprocess.check_output(["ip", "netns", "pids", self.spaces[n]], text=True).split()]

    def lose(self, n: int) -> None:
        """Kills all processes of a machine at once."""
        for pid in self.pids(n):
            os.kill(pid, signal.SIGKILL)
        self.jobs[n].wait()

    def cable(self, state: str) -> None:
        ip(f"-n {self.spaces[1]} link set {self.cards[1]} {state}")

    def said(self, n: int) -> str:
        return (self.folder / f"output_{n}").read_text()

    def wait_until(self, condition, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, [self.said(n)[-5000:] for n in (0, 1)]
            time.sleep(0.02)

    def end(self, seconds: float = 240) -> list[int]:
        """Exit statuses; checks that no process is left on either machine."""
        self.wait_until(lambda: all(job.poll() is not None for job in self.jobs.values()), seconds)
        assert [self.pids(0), self.pids(1)] == [[], []]
        return [self.jobs[n].returncode for n in (0, 1)]

    def remove(self) -> None:
        for n, space in enumerate(self.spaces):
            for pid in self.pids(n):
                os.kill(pid, signal.SIGKILL)
            ip(f"netns delete {space}")


@pytest.fixture
def network(tmp_path) -> Iterator[Network]:
    if os.getuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    try:
        network = Network(tmp_path)
    except PermissionError as error:
        pytest.skip(f"network namespaces are not permitted here: {error}")
    yield network
    network.remove()


def has_step(run: Path, step: int) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and any(f'"step": {each},'.encode() in tail(metrics) for each in range(step, step + 9))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_machines_that_are_killed_or_cut_off_come_back_and_no_step_differs(tiny, network):
    settings = ["--train.max_steps", "400", "--checkpoint.every_steps", "8", "--checkpoint.deadline_seconds", "5"]
    settings += ["--evaluate.every_steps", "0", *tiny]
    run, flags = run_of(tiny), ["--lost-seconds", "8"]
    for n in (0, 1):
        network.start(n, settings, *flags)
    network.wait_until(lambda: has_step(run, 60))
    network.lose(1)
    network.start(1, settings, *flags)
    network.wait_until(lambda: network.said(0).count("restarting in") == 1 and has_step(run, 150))
    network.lose(0)
    network.start(0, settings, *flags)
    network.wait_until(lambda: has_step(run, 260))
    network.cable("down")
    network.wait_until(
        lambda: "machine 1 (host-1) is lost" in network.said(0).rpartition("attempt")[2] and not network.pids(1)[1:]
    )
    network.cable("up")
    assert network.end() == [0, 0], [network.said(n)[-5000:] for n in (0, 1)]
    assert records(run)[-1]["step"] == 400
    assert run_ranks(4, train_here, [*settings, "--run.name", "straight"]) == [0] * 4
    assert curve(run) == curve(run_of(tiny, "straight"))


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_notice_on_one_machine_saves_and_the_other_waits_for_its_replacement(tiny, network):
    settings = ["--train.max_steps", "400", "--checkpoint.every_steps", "200", "--evaluate.every_steps", "0", *tiny]
    for n in (0, 1):
        network.start(n, settings)
    network.wait_until(lambda: has_step(run_of(tiny), 60))
    network.jobs[1].send_signal(signal.SIGTERM)
    network.wait_until(lambda: network.jobs[1].poll() is not None)
    assert network.jobs[1].returncode == 75 and not network.pids(1), network.said(1)
    network.wait_until(lambda: "restarting in" in network.said(0))
    assert network.jobs[0].poll() is None and "is saved" in network.said(0)
    network.start(1, settings)
    assert network.end() == [0, 0], [network.said(n)[-5000:] for n in (0, 1)]
    assert records(run_of(tiny))[-1]["step"] == 400
