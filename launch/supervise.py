"""Keeps a job running without people:

    python launch/supervise.py [--force] [accelerate flags] -- --config X.yaml [--section.key value ...]
    python launch/supervise.py --config_file launch/accelerate/cpu.yaml -- --config configs/quickstart.yaml

Starts `accelerate launch [accelerate flags] launch/pretrain.py ...`, passes SIGTERM and SIGINT on, and reads from
run_state.json how the job really ended, since accelerate returns 1 for every end but success.

    75 (preempted, peer lost), killed, failed    starts it again, after 1 s, or longer where there was no new checkpoint
    three such ends in a row without one         70: a crash loop. Refused from then on, until --force
    0, 2, 70, 73, 74, 77, 130                    ends with this status: starting again would not help, or nobody wants it
    SIGTERM or SIGINT to the supervisor          ends with the job, 75 or 130

However it ends, even by kill -9, no process of the job stays behind. It looks after one machine; on several, the scheduler
starts the job again (launch/slurm.sh). docs/running.md explains the statuses.
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

from pretrain.config import Config, ConfigError, load
from pretrain.run.directory import Locked, RunDirectory, read_state

DONE, REFUSED, CRASH_LOOP, LOCKED, SAVED = 0, 2, 70, 73, 75
FINAL = (DONE, REFUSED, CRASH_LOOP, LOCKED, 74, 77, 130)
MOST_FAILURES = 3
_SIGNALS = {signal.SIGTERM: SAVED, signal.SIGINT: 130}
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def main() -> int:
    """-> exit status: that of the run, as docs/running.md lists them."""
    flags, separator, settings = _split(sys.argv[1:])
    force = "--force" in flags
    flags = [flag for flag in flags if flag != "--force"]
    if not separator or not settings:
        print(__doc__)
        return DONE if {"--help", "-h"} & set(flags) else REFUSED
    if _machines(flags) > 1:
        _say("several machines are asked for, and a supervisor looks after one; use the scheduler, as launch/slurm.sh does")
        return REFUSED
    try:
        config = load(settings, world_size=None, program="launch/supervise.py [--force] [accelerate flags] --")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return REFUSED
    supervisor = Supervisor(config, flags, settings)
    if not force and (refusal := supervisor.crash_loop()):
        _say(f"{refusal}. Find the cause, then start with --force")
        return CRASH_LOOP
    return supervisor.run()


def _split(argv: list[str]) -> tuple[list[str], bool, list[str]]:
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], "--" in argv, argv[at + 1 :]


def _machines(flags: list[str]) -> int:
    """How many the launcher would use: its flag, else its configuration file. What is wrong in them, the launcher will say."""
    words = [word for flag in flags for word in flag.split("=", 1)]
    after = {name: words[words.index(name) + 1] for name in ("--num_machines", "--config_file") if name in words[:-1]}
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        if "--num_machines" in after:
            return int(after["--num_machines"])
        return int(yaml.safe_load(Path(after.get("--config_file", "")).read_text()).get("num_machines") or 1)
    return 1


def _say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


class Supervisor:
    """One run, over all its attempts."""

    def __init__(self, config: Config, flags: list[str], settings: list[str]):
        self.folder = Path(config.run.directory) / config.run.name
        self.grace_seconds = math.ceil(config.checkpoint.deadline_seconds) + 5
        script = str(Path(__file__).with_name("pretrain.py"))
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        self.command = [*launcher, *flags, script, *settings]
        self.job: subprocess.Popen | None = None
        self.asked: list[int] = []  # signals that this process received
        self._woken = threading.Event()

    def crash_loop(self) -> str | None:
        """Why the run must not be started again, if an earlier supervisor said so."""
        reason = read_state(self.folder).get("reason") or ""
        return reason if reason.startswith("crash_loop") else None

    def run(self) -> int:
        """Attempt after attempt. -> exit status."""
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # workers whose launcher dies become our children, so they can be found
        for number in _SIGNALS:
            signal.signal(number, self._pass_on)
        failures, best = 0, _saved_step(self.folder)
        while not self.asked:
            try:
                RunDirectory(self.folder)  # and let go at once
            except Locked as error:
                _say(str(error))
                return LOCKED
            except OSError as error:
                _say(f"{self.folder} cannot be written: {error}; choose another run.directory")
                return REFUSED
            status, how = self._attempt()
            if status in FINAL or self.asked:
                break
            saved = _saved_step(self.folder)
            failures, best = (0 if saved > best else failures + 1), saved
            if failures == MOST_FAILURES:
                return self._give_up(how)
            self._wait(failures, how)
        if self.asked and status not in FINAL:
            status = _SIGNALS[self.asked[0]]
        _say(f"the run ended with status {status}")
        return status

    def _attempt(self) -> tuple[int | None, str]:
        """-> (exit status, None where there is none, how it ended in words)."""
        before = read_state(self.folder)
        environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(self.grace_seconds)} | os.environ  # how long a launcher waits
        # A session of its own: Ctrl-C on the terminal reaches the job once, through us. Dies with us, and its workers with it.
        self.job = subprocess.Popen(
            self.command, env=environment, start_new_session=True, preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        )
        for number in self.asked[-1:]:  # it came while the job was being started
            self._send(number)
        launcher_status = self.job.wait()
        self._leave_no_orphan()
        after = read_state(self.folder)
        if after.get("attempt") == before.get("attempt"):
            return self._status_of_no_start(launcher_status)
        status = after.get("exit_status")
        return status, after.get("reason") or ("was killed" if status is None else f"status {status}")

    def _status_of_no_start(self, launcher_status: int) -> tuple[int | None, str]:
        """The job did not get as far as its folder: did it refuse its settings? Launchers do not say, so we ask it."""
        how = "ended before it took its folder"
        if launcher_status == 0 or self.asked:
            return launcher_status if launcher_status == 0 else None, how
        probe = subprocess.run([*self.command, "--print_config"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return (REFUSED if probe.returncode else None), how

    def _wait(self, failures: int, how: str) -> None:
        seconds = 4**failures
        since = f" ({failures} of {MOST_FAILURES} without a new checkpoint)" if failures else ""
        _say(f"the job ended: {how}; starting again in {seconds} s{since}")
        self._woken.wait(seconds)

    def _give_up(self, how: str) -> int:
        reason = f"crash_loop: {MOST_FAILURES} attempts in a row ended without a new checkpoint, the last one: {how}"
        RunDirectory(self.folder).write_state("failed", exit_status=CRASH_LOOP, reason=reason)
        _say(f"{reason}. Not starting again")
        return CRASH_LOOP

    # ---------------------------------------------------------------- processes

    def _pass_on(self, number: int, _) -> None:
        self.asked.append(number)
        self._woken.set()
        if self.job is not None and self.job.poll() is None:
            self._send(number)

    def _send(self, number: int) -> None:
        """To the launcher's group: torch's launcher tells its workers; accelerate's, for one process, has its worker there."""
        try:
            if self.asked.count(signal.SIGINT) > 1:  # the launcher would only hurry away from its workers
                for process in psutil.Process(self.job.pid).children(recursive=True):
                    process.send_signal(number)
            else:
                os.killpg(self.job.pid, number)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass  # it ended by itself

    def _leave_no_orphan(self) -> None:
        """What the launcher left: time to save, then the end."""
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
    """Linux alone has it. Elsewhere a worker still notices the death of its launcher, and a launcher lives on without us."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
