"""Runs a job unattended, on one machine or several: restarts it, and reports how it really ended.

    python launch/supervise.py [flags] [accelerate flags] -- --config X.yaml [--section.key value ...]
    python launch/supervise.py --config_file launch/accelerate/cpu.yaml -- --config configs/quickstart.yaml

    --wait-seconds N    how long to wait for machines that are missing (900), before the job ends with 75
    --lost-seconds N    silence after which a machine counts as lost (30)
    --min-machines N    run with N machines or more if the others do not come in --wait-seconds
    --force             start although the run ended in a crash loop
    --num_machines N --machine_rank I --main_process_ip HOST --num_processes ALL [--main_process_port P]
                        several machines without a scheduler: on each, from 0; HOST is machine 0; ALL counts the ranks of all

Starts `accelerate launch [accelerate flags] launch/pretrain.py ...`, forwards SIGTERM, SIGINT and the notices of schedulers
(SIGUSR2, SIGXCPU, SIGPWR: as SIGTERM, which launchers understand), and reads from run_state.json how the job ended, since
accelerate returns 1 for every failure.

    75 (preempted, peer lost), killed, failed       restarts it after 1 s, or later if there was no new checkpoint
    three such ends in a row, no new checkpoint     70: a crash loop. Refused from then on, unless --force is given
    0, 2, 70, 73, 74, 76, 77, 130                   exits with this status: a restart would not help, or is not wanted
    SIGTERM, a notice or SIGINT to the supervisor   exits with the job, 75 or 130

On several machines, start the same command on each: SLURM, SkyPilot, Kubernetes, Kubeflow and torchrun's variables, or
accelerate's flags, tell a supervisor which machine it is. All start, restart and end together; a machine that is lost is
waited for. However it ends, even by kill -9, it leaves no process of the job behind. docs/running.md explains the statuses.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # else `import pretrain` would find launch/pretrain.py

import psutil
import yaml

from pretrain.config import Config, ConfigError, load
from pretrain.engines.machines import Machines, find_machines
from pretrain.engines.place import ATTEMPT, LAUNCHER
from pretrain.report import alarms
from pretrain.run import command_line, team
from pretrain.run.directory import Locked, RunDirectory, read_state
from pretrain.run.stop import NOTICES
from pretrain.run.team import DONE, FAILED, FINAL, LOCKED, REFUSED, SAVED, Client, Lead, Service

_SIGNALS = {signal.SIGTERM: SAVED, signal.SIGINT: 130} | {each: SAVED for each in NOTICES if each != signal.SIGHUP}
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_FAREWELL_SECONDS, _ANSWER_SECONDS = 15.0, 5.0


def main(argv: list[str]) -> int:
    """-> exit status: that of the run, as docs/running.md lists them."""
    at = argv.index("--") if "--" in argv else len(argv)
    settings = argv[at + 1 :]
    if not settings:
        print(__doc__)
        return DONE if {"--help", "-h"} & set(argv[:at]) else REFUSED
    options, flags = _parser().parse_known_args(argv[:at])
    machines = _machines(flags)
    try:
        config, refusal = load(settings, world_size=None, program="launch/supervise.py [flags] --"), None
    except ConfigError as error:
        if machines.count == 1:
            raise
        config, refusal = None, (REFUSED, str(error))
    supervisor = Supervisor(config, flags, settings, machines, options, refusal)
    if machines.number == 0 and not options.force and not refusal and (reason := supervisor.crash_loop()):
        supervisor.refusal = team.CRASH_LOOP, f"{reason}. Find the cause, then start with --force"
    return supervisor.run()


def _parser() -> argparse.ArgumentParser:
    """The supervisor's own flags; all others are accelerate's."""
    parser = argparse.ArgumentParser(prog="supervise", add_help=False, allow_abbrev=False)
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--wait-seconds", type=command_line.at_least(1), default=900)
    parser.add_argument("--lost-seconds", type=command_line.at_least(1), default=30)
    parser.add_argument("--min-machines", type=command_line.at_least(1))
    return parser


def _machines(flags: list[str]) -> Machines:
    """This machine, by accelerate's flags, a scheduler's variables, or accelerate's own file, whose mistakes it reports
    itself. Raises ConfigError."""
    words = [word for flag in flags for word in flag.split("=", 1)]
    given = {name[2:].replace("-", "_"): text for name, text in itertools.pairwise(words) if name.startswith("--")}
    file = None
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        file = yaml.safe_load(Path(given.get("config_file", "")).read_text())
    machines = find_machines(given, file if isinstance(file, dict) else None)
    if machines.count > 1 and machines.processes is None:
        count = "import torch; print(torch.cuda.device_count())"
        gpus = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True).stdout
        machines = machines._replace(processes=max(1, int(gpus)))
    return machines


def _info(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


class Supervisor:
    """A run over all its attempts, on one of its machines.

    options: the supervisor's own flags. refusal: (status, reason) with which the run will not start.
    """

    def __init__(
        self,
        config: Config | None,
        flags: list[str],
        settings: list[str],
        machines: Machines = Machines(),  # noqa: B008 (immutable)
        options: argparse.Namespace | None = None,
        refusal: tuple[int, str] | None = None,
    ):
        self.machines, self.settings, self.refusal = machines, settings, refusal
        self.options = options or _parser().parse_args([])
        self.config, self.run_name = config, config and config.run.name
        self.folder = config and Path(config.run.directory) / config.run.name
        self.grace_seconds = math.ceil(config.checkpoint.deadline_seconds if config else 0) + 5
        script = str(Path(__file__).with_name("pretrain.py"))
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        if machines.stated and not any(flag.startswith(("--config_file", "--config-file")) for flag in flags):
            flags = ["--config_file", str(Path(__file__).with_name("accelerate") / "machines.yaml"), *flags]
        self._launch, self._run = [*launcher, *flags], [script, *settings]
        self.job: subprocess.Popen | None = None
        self.received: list[int] = []  # signals, in order
        self._token, self._host = secrets.token_hex(8), socket.gethostname()
        self._running: int | None = None
        self._ended: dict | None = None
        self._record = {"attempt": 0, "failures": 0, "best": 0}
        self._order, self._silence, self._heard = {"do": "wait"}, "", time.monotonic()
        self._stopped_since: float | None = None
        self._closed, self._wake = False, threading.Event()

    def crash_loop(self) -> str | None:
        """The reason not to restart the run, if an earlier supervisor recorded one."""
        reason = read_state(self.folder).get("reason") or ""
        return reason if reason.startswith("crash_loop") else None

    def run(self) -> int:
        """Starts attempts until the run has ended, everywhere. -> exit status."""
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # workers of a dead launcher become our children, so that they can be found
        for number in _SIGNALS:
            signal.signal(number, self._forward)
        lead, service = None, None
        if self.machines.number == 0:
            lead = self._lead()
            service = Service(lead) if self.machines.count > 1 else None
            self._exchange = lambda report: lead.hear(report, time.monotonic())
        else:
            self._exchange = Client(self.machines, _ANSWER_SECONDS).exchange
        link = threading.Thread(target=self._keep_in_touch, args=[lead], name="link", daemon=True)
        link.start()
        try:
            status, reason = self._attempts()
            if lead and reason.startswith("crash_loop") and self.folder and not self.refusal:
                RunDirectory(self.folder).write_state("failed", exit_status=status, reason=reason)
            if service:
                self._take_leave(lead)
        finally:
            self._closed = True
            self._wake.set()
            link.join(_ANSWER_SECONDS)
            if service:
                service.close()
        if lead:
            self._alarm(status, reason)
        if reason and status != DONE:  # again: launchers print a traceback after the job's own words
            _info(reason)
        _info(f"the run ended with status {status}")
        return status

    def _alarm(self, status: int, reason: str) -> None:
        """Tells people of an end that no run could report: a crash loop, or machines that did not come."""
        is_crash_loop = reason.startswith("crash_loop")
        if self.config and not self.refusal and (is_crash_loop or (status == SAVED and reason)):
            kind = "crash_loop" if is_crash_loop else "preempted"
            if failure := alarms.notify(self.config.log.alarms, self.run_name, kind, reason):
                _info(f"the alarm was not delivered: {failure}")

    def _lead(self) -> Lead:
        least = self.options.min_machines or self.machines.least
        best = read_state(self.folder).get("saved_step") or 0 if self.folder else 0
        seconds = self.options.wait_seconds, self.options.lost_seconds
        return Lead(self.run_name, self.machines, least, *seconds, say=_info, best=best, free=_is_free)

    def _attempts(self) -> tuple[int, str]:
        """-> (exit status, reason)."""
        while True:
            order = self._next_order()
            if order["do"] == "end":
                return order["status"], order["reason"]
            self._stopped_since, self._running = None, order["attempt"]
            status, how = self._attempt(order)
            saved = _saved_step(self.folder) if self.machines.number == 0 else 0
            self._ended = {"attempt": order["attempt"], "status": status, "how": how, "saved": saved}
            self._running = None
            self._wake.set()
            if self.received:
                return self._end_by_signal(order["attempt"])

    def _next_order(self) -> dict:
        """Waits until there is an attempt to start, or the run has ended."""
        next_word, began = 10.0, time.monotonic()
        while not self.received:
            order, silent = self._order, time.monotonic() - self._heard
            done = self._ended["attempt"] if self._ended else 0
            if order["do"] == "end" or (order["do"] == "run" and order["attempt"] > done):
                return order
            if self._silence and (end := self._end_without_lead(silent)):
                return end
            if order["do"] == "taken" and time.monotonic() - began > self.options.lost_seconds + 10:
                reason = (
                    f"another supervisor, on {order['by']}, is machine {self.machines.number}, too; give each its own number"
                )
                return {"do": "end", "status": REFUSED, "reason": reason}
            if silent >= next_word:
                next_word += min(60.0, next_word)
                self._say_silence(silent)
            time.sleep(0.1)  # not an event: a signal's handler could not set it safely
        return {"do": "end", "status": _SIGNALS[self.received[0]], "reason": ""}

    def _say_silence(self, silent: float) -> None:
        at = f"{self.machines.address}:{self.machines.port}"
        text = f"machine {self.machines.number} has waited {silent:.0f} s for machine 0 at {at} ({self._silence})"
        _info(f"{text}; gives up after {self.options.wait_seconds} s (--wait-seconds)")

    def _end_without_lead(self, silent: float) -> dict | None:
        """The end that machine 0 has recorded where all machines see the run's folder, or that of waiting too long."""
        state = read_state(self.folder) if self.folder and self._ended else {}
        if silent > self.options.lost_seconds and state.get("exit_status") in FINAL and state.get("time", 0) > self._started:
            return {"do": "end", "status": state["exit_status"], "reason": state.get("reason") or ""}
        if silent > self.options.wait_seconds:
            at, why = f"{self.machines.address}:{self.machines.port}", self._silence
            reason = f"machine 0 at {at} did not answer for {silent:.0f} s ({why}); start the same command there"
            return {"do": "end", "status": SAVED, "reason": reason}
        return None

    def _end_by_signal(self, attempt: int) -> tuple[int, str]:
        """The end of a supervisor that was told to: that of the run if it has ended, else that of the signal."""
        deadline, status = time.monotonic() + _FAREWELL_SECONDS, _SIGNALS[self.received[0]]
        while time.monotonic() < deadline and not self._silence:
            order = self._order
            if order["do"] == "end":
                return (order["status"] if order["status"] in FINAL else status), order["reason"]
            if order["do"] == "wait" and order["record"]["attempt"] == attempt:
                break
            time.sleep(0.1)  # not an event: a signal's handler could not set it safely
        return status, ""

    def _take_leave(self, lead: Lead) -> None:
        """Waits until the other machines know how the run ended."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while lead.end and time.monotonic() < deadline:
            with lead.lock:
                if lead.all_know(time.monotonic()) and (not self.refusal or len(lead.members) == self.machines.count):
                    return
            time.sleep(0.1)

    # ---------------------------------------------------------------- the other machines

    def _keep_in_touch(self, lead: Lead | None) -> None:
        """Reports to machine 0 and does as it says, in a thread: the main thread waits for the job."""
        try:
            self._report_and_obey(lead)
        except Exception:  # a bug, which must not leave a job that nobody stops
            traceback.print_exc()
            self._order = {"do": "end", "status": FAILED, "reason": "", "record": self._record}
            while not self._closed:
                self._stop_job()
                time.sleep(team.POLL_SECONDS)

    def _report_and_obey(self, lead: Lead | None) -> None:
        while not self._closed:
            now = time.monotonic()
            try:
                if lead:
                    with lead.lock:
                        self._order = self._exchange(self._report())
                else:
                    self._order = self._exchange(self._report())
                self._silence, self._heard = "", now
                record = self._order.get("record", self._record)  # a new machine 0 may know less than the one before
                self._record = record if record["attempt"] >= self._record["attempt"] else self._record
            except OSError as error:
                self._silence = str(error)
            is_lost = bool(self._silence) and now - self._heard > self.options.lost_seconds
            runs_on = self._order["do"] == "run" and self._order["attempt"] == self._running
            if self._running is not None and (is_lost or not runs_on):
                self._stop_job()
            self._wake.wait(team.POLL_SECONDS * max(1, self.machines.count / team.MANY))
            self._wake.clear()

    def _report(self) -> dict:
        machines = self.machines
        return {
            "run": self.run_name,
            "machine": machines.number,
            "of": machines.count,
            "token": self._token,
            "host": self._host,
            "processes": machines.processes or 1,
            "running": self._running,
            "ended": self._ended,
            "leaving": _SIGNALS[self.received[0]] if self.received else 0,
            "refusal": self.refusal,
            "record": self._record,
        }

    def _stop_job(self) -> None:
        """Lets the job save and end; kills it if it does not."""
        if self.job is None or self.job.poll() is not None:
            return
        if self._stopped_since is None:
            self._stopped_since = time.monotonic()
            self._send(signal.SIGTERM)
        elif time.monotonic() - self._stopped_since > self.grace_seconds + 10:
            for process in psutil.Process().children(recursive=True):
                _signal(process, signal.SIGKILL)

    # ---------------------------------------------------------------- one attempt

    def _attempt(self, order: dict) -> tuple[int | None, str]:
        """-> (exit status or None, description of how it ended)."""
        self._started = time.time()
        if self.machines.number == 0 and (refusal := self._cannot_start()):
            return refusal
        if self.machines.count > 1:
            try:
                load(self.settings, world_size=order["world_size"])
            except ConfigError as error:
                return REFUSED, str(error)
        before = read_state(self.folder)
        # In its own session, so that Ctrl-C reaches the job once, through us. It dies with us, and its workers with it.
        self.job = subprocess.Popen(
            [*self._launcher(order), *self._run],
            env=self._environment(order),
            start_new_session=True,
            preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
        )
        for number in self.received[-1:]:  # received while the job was starting
            self._send(number)
        launcher_status = self.job.wait()
        self._leave_no_orphan()
        if self.machines.number > 0:
            return (DONE if launcher_status == 0 else None), f"the launcher ended with {launcher_status}"
        after = read_state(self.folder)
        if after.get("attempt") == before.get("attempt"):
            return self._status_of_no_start(launcher_status)
        status = after.get("exit_status")
        return status, after.get("reason") or ("was killed" if status is None else f"status {status}")

    def _cannot_start(self) -> tuple[int, str] | None:
        """(status, reason) if the run's folder is in use or cannot be written. On several machines, a job of which this one was
        cut off may still be ending."""
        deadline = time.monotonic() + (self.options.lost_seconds + self.grace_seconds) * (self.machines.count > 1)
        while True:
            try:
                RunDirectory(self.folder)  # released at once
                return None
            except Locked as error:
                if time.monotonic() > deadline or self.received:
                    _info(str(error))
                    return LOCKED, str(error)
            except OSError as error:
                _info(text := f"{self.folder} cannot be written: {error}; choose another run.directory")
                return REFUSED, text
            time.sleep(1)

    def _launcher(self, order: dict) -> list[str]:
        """accelerate's command. It wants the number of machines times the processes of this one."""
        machines = self.machines
        if not machines.stated and machines.count == 1:
            return self._launch
        flags = {"num_machines": order["machines"], "machine_rank": order["rank"]}
        if machines.processes:
            flags["num_processes"] = order["machines"] * machines.processes
        if machines.count > 1:
            flags |= {"main_process_ip": machines.address, "main_process_port": order["port"]}
        return [*self._launch, *(f"--{name}={value}" for name, value in flags.items())]

    def _environment(self, order: dict) -> dict[str, str]:
        grace = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(self.grace_seconds)}  # of the launcher's workers
        if not self.machines.stated:
            return grace | os.environ
        kept = {name: text for name, text in os.environ.items() if name not in LAUNCHER and not name.startswith("PET_")}
        return grace | kept | {ATTEMPT: order["name"]}

    def _status_of_no_start(self, launcher_status: int) -> tuple[int | None, str]:
        """Tells refused settings from other failures of a job that never opened its directory, by asking it once more."""
        how = "the job exited before it opened its directory; its first message says why"
        if launcher_status == 0 or self.received:
            return launcher_status if launcher_status == 0 else None, how
        if self.machines.count > 1:
            return None, how
        command = [*self._launch, *self._run, "--print_config"]
        probe = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return (REFUSED if probe.returncode else None), how

    # ---------------------------------------------------------------- processes

    def _forward(self, number: int, _) -> None:
        number = number if number == signal.SIGINT else signal.SIGTERM
        self.received.append(number)
        if self.job is not None and self.job.poll() is None:
            self._send(number)

    def _send(self, number: int) -> None:
        """Signals the launcher's group: torch's launcher forwards it; accelerate's has its single worker in the group."""
        if self.received.count(signal.SIGINT) > 1:  # the launcher would only abandon its workers
            for process in psutil.Process(self.job.pid).children(recursive=True):
                _signal(process, number)
            return
        with contextlib.suppress(ProcessLookupError):  # it has exited
            os.killpg(self.job.pid, number)

    def _leave_no_orphan(self) -> None:
        """Gives processes that the launcher left behind time to save, then kills them."""
        left = psutil.Process().children(recursive=True)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in left:
                _signal(process, number)
            _, left = psutil.wait_procs(left, timeout=self.grace_seconds)


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # it has exited
        process.send_signal(number)


def _is_free(port: int) -> bool:
    """Whether ranks may meet at a port of this machine."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
            return True
        except OSError:
            return False


def _saved_step(folder: Path) -> int:
    return read_state(folder).get("saved_step") or 0


def _prctl(option: int, value: int) -> None:
    """Exists on Linux only. Elsewhere a worker still notices its launcher's death, but a launcher outlives us."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
