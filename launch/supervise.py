"""Runs a job unattended: restarts it, and reports how it really ended.

    python launch/supervise.py [--force] [accelerate flags] -- --config X.yaml [--section.key value ...]
    python launch/supervise.py --config_file launch/accelerate/cpu.yaml -- --config configs/quickstart.yaml

Starts `accelerate launch [accelerate flags] launch/pretrain.py ...`, forwards SIGTERM, SIGINT and the notices of schedulers
(SIGUSR2, SIGXCPU, SIGPWR: as SIGTERM, which launchers understand), and reads from run_state.json how the job ended, since
accelerate returns 1 for every failure.

    75 (preempted, peer lost), killed, failed       restarts it after 1 s, or later if there was no new checkpoint
    three such ends in a row without a checkpoint   70: a crash loop. Refused from then on, until --force
    0, 2, 70, 73, 74, 76, 77, 130                   exits with this status: a restart would not help, or is not wanted
    SIGTERM, a notice or SIGINT to the supervisor   exits with the job, 75 or 130

However it ends, even by kill -9, it leaves no process of the job behind. It supervises one machine; on several, the scheduler
restarts the job (launch/slurm.sh). docs/running.md explains the statuses.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # else `import pretrain` would find launch/pretrain.py

import psutil
import yaml

from pretrain import UserError
from pretrain.config import Config, load
from pretrain.run import command_line
from pretrain.run.directory import Locked, RunDirectory, read_state
from pretrain.run.stop import NOTICES

DONE, REFUSED, CRASH_LOOP, LOCKED, SAVED = 0, 2, 70, 73, 75
FINAL = (DONE, REFUSED, CRASH_LOOP, LOCKED, 74, 76, 77, 130)
MOST_FAILURES = 3
_SIGNALS = {signal.SIGTERM: SAVED, signal.SIGINT: 130} | {each: SAVED for each in NOTICES if each != signal.SIGHUP}
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def main(argv: list[str]) -> int:
    """-> exit status: that of the run, as docs/running.md lists them."""
    at = argv.index("--") if "--" in argv else len(argv)
    flags, settings = [flag for flag in argv[:at] if flag != "--force"], argv[at + 1 :]
    if not settings:
        print(__doc__)
        return DONE if {"--help", "-h"} & set(flags) else REFUSED
    if _machines(flags) > 1:
        raise UserError("several machines are requested, but a supervisor manages one; use a scheduler (launch/slurm.sh)")
    config = load(settings, world_size=None, program="launch/supervise.py [--force] [accelerate flags] --")
    supervisor = Supervisor(config, flags, settings)
    if "--force" not in argv[:at] and (refusal := supervisor.crash_loop()):
        _info(f"{refusal}. Find the cause, then start with --force")
        return CRASH_LOOP
    return supervisor.run()


def _machines(flags: list[str]) -> int:
    """Machines that the launcher would use, by its flag or its configuration file, whose mistakes it will report itself."""
    words = [word for flag in flags for word in flag.split("=", 1)]
    after = {name: words[words.index(name) + 1] for name in ("--num_machines", "--config_file") if name in words[:-1]}
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        if "--num_machines" in after:
            return int(after["--num_machines"])
        return int(yaml.safe_load(Path(after.get("--config_file", "")).read_text()).get("num_machines") or 1)
    return 1


def _info(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


class Supervisor:
    """A run over all its attempts."""

    def __init__(self, config: Config, flags: list[str], settings: list[str]):
        self.folder = Path(config.run.directory) / config.run.name
        self.grace_seconds = math.ceil(config.checkpoint.deadline_seconds) + 5
        script = str(Path(__file__).with_name("pretrain.py"))
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        self.command = [*launcher, *flags, script, *settings]
        self.job: subprocess.Popen | None = None
        self.received: list[int] = []  # signals, in order
        self._woken = threading.Event()

    def crash_loop(self) -> str | None:
        """The reason not to restart the run, if an earlier supervisor recorded one."""
        reason = read_state(self.folder).get("reason") or ""
        return reason if reason.startswith("crash_loop") else None

    def run(self) -> int:
        """Starts attempts until the run has ended. -> exit status."""
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # workers of a dead launcher become our children, so that they can be found
        for number in _SIGNALS:
            signal.signal(number, self._forward)
        failures, best = 0, _saved_step(self.folder)
        while not self.received:
            try:
                RunDirectory(self.folder)  # released at once
            except Locked as error:
                _info(str(error))
                return LOCKED
            except OSError as error:
                _info(f"{self.folder} cannot be written: {error}; choose another run.directory")
                return REFUSED
            status, how = self._attempt()
            if status in FINAL or self.received:
                break
            saved = _saved_step(self.folder)
            failures, best = (0 if saved > best else failures + 1), saved
            if failures == MOST_FAILURES:
                return self._give_up(how)
            self._wait(failures, how)
        if self.received and status not in FINAL:
            status = _SIGNALS[self.received[0]]
        _info(f"the run ended with status {status}")
        return status

    def _attempt(self) -> tuple[int | None, str]:
        """-> (exit status or None, description of how it ended)."""
        before = read_state(self.folder)
        environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(self.grace_seconds)} | os.environ  # of the launcher's workers
        # In its own session, so that Ctrl-C reaches the job once, through us. It dies with us, and its workers with it.
        self.job = subprocess.Popen(
            self.command, env=environment, start_new_session=True, preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        )
        for number in self.received[-1:]:  # received while the job was starting
            self._send(number)
        launcher_status = self.job.wait()
        self._leave_no_orphan()
        after = read_state(self.folder)
        if after.get("attempt") == before.get("attempt"):
            return self._status_of_no_start(launcher_status)
        status = after.get("exit_status")
        return status, after.get("reason") or ("was killed" if status is None else f"status {status}")

    def _status_of_no_start(self, launcher_status: int) -> tuple[int | None, str]:
        """Tells refused settings from other failures of a job that never opened its directory, by asking it once more."""
        how = "exited before it opened its directory"
        if launcher_status == 0 or self.received:
            return launcher_status if launcher_status == 0 else None, how
        probe = subprocess.run([*self.command, "--print_config"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return (REFUSED if probe.returncode else None), how

    def _wait(self, failures: int, how: str) -> None:
        seconds = 4**failures
        since = f" ({failures} of {MOST_FAILURES} without a new checkpoint)" if failures else ""
        _info(f"the job ended: {how}; restarting in {seconds} s{since}")
        self._woken.wait(seconds)

    def _give_up(self, how: str) -> int:
        reason = f"crash_loop: {MOST_FAILURES} attempts in a row ended without a new checkpoint, the last one: {how}"
        RunDirectory(self.folder).write_state("failed", exit_status=CRASH_LOOP, reason=reason)
        _info(f"{reason}. Not restarting")
        return CRASH_LOOP

    # ---------------------------------------------------------------- processes

    def _forward(self, number: int, _) -> None:
        number = number if number == signal.SIGINT else signal.SIGTERM
        self.received.append(number)
        self._woken.set()
        if self.job is not None and self.job.poll() is None:
            self._send(number)

    def _send(self, number: int) -> None:
        """Signals the launcher's group: torch's launcher forwards it; accelerate's has its single worker in the group."""
        try:
            if self.received.count(signal.SIGINT) > 1:  # the launcher would only abandon its workers
                for process in psutil.Process(self.job.pid).children(recursive=True):
                    process.send_signal(number)
            else:
                os.killpg(self.job.pid, number)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass  # it has exited

    def _leave_no_orphan(self) -> None:
        """Gives processes that the launcher left behind time to save, then kills them."""
        left = psutil.Process().children(recursive=True)
        for kill in (psutil.Process.terminate, psutil.Process.kill):
            for process in left:
                try:
                    kill(process)
                except psutil.NoSuchProcess:
                    continue
            _, left = psutil.wait_procs(left, timeout=self.grace_seconds)


def _saved_step(folder: Path) -> int:
    return read_state(folder).get("saved_step") or 0


def _prctl(option: int, value: int) -> None:
    """Exists on Linux only. Elsewhere a worker still notices its launcher's death, but a launcher outlives us."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
