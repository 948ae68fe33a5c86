"""The supervisors of a job's machines, which start attempts together and end with the same status.

Machine 0 decides (`Lead`), since rank 0 and run_state.json are there. Every supervisor sends it a report once in half a second
and gets an order in reply (`Client`, `Service`):

    report   run, machine, token, host, processes; running: attempt or null; ended: how the last attempt ended here, or null;
             leaving: status with which this supervisor will exit, 0 if it stays; refusal: (status, reason) if it will never
             start, or null; record: below
    order    do: wait, run, stop (an attempt), end (with status and reason); record
    record   attempt, failures, best: number of the newest attempt, attempts in a row without a new checkpoint, newest one

A new machine 0 learns the record from the reports of the others, so attempts are numbered through and a crash loop is still
noticed. An attempt has its own port and name, so that its ranks meet none of an earlier attempt. Where nothing is heard of a
machine for `lost_seconds`, both sides stop their ranks, which could only wait for each other.
Plain sockets, one line of JSON in each direction: torch's store would cost every supervisor an import of torch, and ends with
the process that serves it. Knows nothing of launchers and folders.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import secrets
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pretrain.engines.machines import PORTS, Machines
from pretrain.schema import ConfigError, Problem

DONE, FAILED, REFUSED, CRASH_LOOP, LOCKED, SAVED, STOPPED = 0, 1, 2, 70, 73, 75, 130
FINAL = (DONE, REFUSED, CRASH_LOOP, LOCKED, 74, 76, 77, STOPPED)
"""Exit statuses of a run after which a restart would not help, or is not wanted."""
MOST_FAILURES = 3
POLL_SECONDS = 0.5
"""Between two reports of a machine; more where there are more than MANY."""
MANY = 128
_MERCY_SECONDS, _RECONNECT_SECONDS, _MOST_BYTES = 2.0, 5.0, 2**16
_SOON_SECONDS, _OFTEN_SECONDS = 10.0, 60.0


def back_off_seconds(failures: int) -> float:
    """Pause before the next attempt."""
    return 4**failures


_TEXT, _NUMBER = (str, type(None)), (int, type(None))
_REPORT = {"run": _TEXT, "machine": int, "of": int, "token": str, "host": str, "processes": int, "running": _NUMBER,
           "ended": (dict, type(None)), "leaving": int, "refusal": (list, tuple, type(None)), "record": dict}  # fmt: skip


@dataclass
class _Member:
    """The newest report of a machine."""

    report: dict
    heard: float
    """`time.monotonic()` of the report."""
    connected: bool = True
    knows_end: bool = False


@dataclass
class _Attempt:
    number: int
    port: int
    crew: dict[int, str]
    """Machine -> token of its supervisor."""
    ranks: dict[int, int]
    """Machine -> its place among those of the attempt."""
    world_size: int
    over_since: float | None = None
    """When the first machine was found to have ended or to be lost."""
    planned: bool = False
    """It is stopped to start again with machines that have come back."""


@dataclass
class Lead:
    """Machine 0's decisions. `hear` and `advance` are called under `lock`; times are `time.monotonic()`.

    say(text): tells people what was decided. free(port): whether ranks may meet at a port.
    """

    run: str
    machines: Machines
    least: int
    wait_seconds: float
    lost_seconds: float
    say: Callable[[str], None]
    best: int = 0
    free: Callable[[int], bool] = lambda port: True
    members: dict[int, _Member] = field(default_factory=dict)
    attempt: _Attempt | None = None
    end: tuple[int, str] | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.record = {"attempt": 0, "failures": 0, "best": self.best}
        self.name = secrets.token_hex(4)
        self._waiting_since: float | None = None
        self._not_before = self._next_word = 0.0
        self._advanced = time.monotonic()

    # ---------------------------------------------------------------- reports

    def hear(self, report: dict, now: float) -> dict:
        """Notes a report. -> order. Raises ValueError for what is none."""
        if wrong := [key for key, kinds in _REPORT.items() if not isinstance(report.get(key, ...), kinds)]:
            raise ValueError(f"not a report of a supervisor: {', '.join(wrong)}")
        number, before = report["machine"], self.members.get(report["machine"])
        if refusal := self._stranger(report):
            return {"do": "end", "status": REFUSED, "reason": refusal}
        if before and before.report["token"] != report["token"] and self._is_here(number, before.report["token"], now):
            return {"do": "taken", "by": before.report["host"]}
        self.members[number] = _Member(report, now)
        if report["record"]["attempt"] > self.record["attempt"] and self.attempt is None:
            self.record = report["record"]
        if number == 0:  # looks at all machines; once per report of each would be too much for a thousand
            self.advance(now)
        return self._order(number, report["token"], now)

    def _stranger(self, report: dict) -> str:
        number, of = report["machine"], report["of"]
        if None not in (self.run, report["run"]) and report["run"] != self.run:
            return f"machine 0 supervises run {self.run}, but machine {number} ({report['host']}) {report['run']}"
        if of != self.machines.count or not 0 <= number < of:
            return f"machine 0 expects {self.machines.count} machines, but {report['host']} is machine {number} of {of}"
        return ""

    def disconnected(self, number: int, token: str) -> None:
        """Notes the end of a connection: most likely that of its supervisor."""
        member = self.members.get(number)
        if member and member.report["token"] == token:
            member.connected = False

    def _is_here(self, number: int, token: str, now: float) -> bool:
        member = self.members.get(number)
        if member is None or member.report["token"] != token:
            return False
        return now - member.heard <= (self.lost_seconds if member.connected else min(_RECONNECT_SECONDS, self.lost_seconds))

    def _order(self, number: int, token: str, now: float) -> dict:
        attempt, order = self.attempt, {"do": "wait"}
        if self.end:
            self.members[number].knows_end = True
            order = {"do": "end", "status": self.end[0], "reason": self.end[1]}
        elif attempt and attempt.crew.get(number) == token:
            order = {"do": "run", "attempt": attempt.number, "port": attempt.port, "name": f"{attempt.number}-{self.name}"}
            order |= {"rank": attempt.ranks[number], "machines": len(attempt.crew), "world_size": attempt.world_size}
            if attempt.over_since is not None and now - attempt.over_since >= _MERCY_SECONDS:
                order["do"] = "stop"
        return order | {"record": self.record}

    # ---------------------------------------------------------------- decisions

    def advance(self, now: float) -> None:
        """Starts an attempt, ends one, or gives up waiting, where it is time to."""
        pause, self._advanced = now - self._advanced, now
        if pause > self.lost_seconds / 2:  # this process itself was stopped, and could hear nobody
            for member in self.members.values():
                member.heard += pause
        if self.attempt and not self.end:
            self._watch(self.attempt, now)
        elif now >= self._not_before and not self.end:
            self._gather(now)

    def _gather(self, now: float) -> None:
        for member in self.members.values():
            if member.report["refusal"]:
                status, reason = member.report["refusal"]
                self.end = status, self._named(member, reason)
                return
        here = [number for number, member in sorted(self.members.items()) if self._is_ready(number, member, now)]
        self._waiting_since = now if self._waiting_since is None else self._waiting_since
        waited = now - self._waiting_since
        if len(here) == self.machines.count:
            self._start(here)
        elif waited > self.wait_seconds and len(here) >= self.least and 0 in here:
            self.say(f"starts with {len(here)} of {self.machines.count} machines, without {self._absent(here)}")
            self._start(here)
        elif waited > self.wait_seconds and 0 in here:
            text = f"waited {self.wait_seconds:.0f} s for {self._absent(here)}"
            self.end = SAVED, f"{text}; start the same command on every machine"
        elif waited >= max(_SOON_SECONDS, self._next_word):
            self._next_word = waited + min(_OFTEN_SECONDS, waited)
            hosts = ", ".join(f"{number} ({self.members[number].report['host']})" for number in here[:8])
            text = f"has waited {waited:.0f} s for {self._absent(here)} (here: {hosts})"
            self.say(f"{text}; gives up after {self.wait_seconds:.0f} s (--wait-seconds)")

    def _is_ready(self, number: int, member: _Member, now: float) -> bool:
        report = member.report
        return report["running"] is None and not report["leaving"] and self._is_here(number, report["token"], now)

    def _absent(self, here: list[int]) -> str:
        absent = [number for number in range(self.machines.count) if number not in here]
        shown = ", ".join(map(str, absent[:8])) + f" and {len(absent) - 8} more" * (len(absent) > 8)
        return f"machine{'s' * (len(absent) > 1)} {shown}"

    def _start(self, here: list[int]) -> None:
        number = max(self.members[each].report["record"]["attempt"] for each in here)
        number = max(number, self.record["attempt"]) + 1
        ports = [self.machines.port + 1 + (number + each) % (PORTS - 1) for each in range(PORTS - 1)]
        self.record = {**self.record, "attempt": number}
        crew = {each: self.members[each].report["token"] for each in here}
        ranks = {machine: rank for rank, machine in enumerate(here)}
        world_size = sum(self.members[each].report["processes"] for each in here)
        self.attempt = _Attempt(number, next(filter(self.free, ports), ports[0]), crew, ranks, world_size)
        self._waiting_since, self._next_word = None, 0.0

    def _watch(self, attempt: _Attempt, now: float) -> None:
        ended = {number: ended for number in attempt.crew if (ended := self._ended(number))}
        out = [number for number in attempt.crew if number not in ended]
        lost = [number for number in out if not self._is_here(number, attempt.crew[number], now)]
        returned = attempt.over_since is None and self._all_could_start(attempt, now)
        if attempt.over_since is None and (ended or lost or returned):
            attempt.over_since, attempt.planned = now - _MERCY_SECONDS * bool(lost or returned), returned
            if lost:
                hosts = ", ".join(f"{number} ({self.members[number].report['host']})" for number in lost)
                self.say(f"machine {hosts} is lost")
            if returned:
                self.say(f"all {self.machines.count} machines are here again: saves, and starts anew with all of them")
        if len(ended) + len(lost) == len(attempt.crew) and 0 in ended:
            self._settle(attempt, ended, now)

    def _all_could_start(self, attempt: _Attempt, now: float) -> bool:
        """Whether the machines without which an attempt began have come."""
        others = [number for number in range(self.machines.count) if number not in attempt.crew]
        return bool(others) and all(
            number in self.members and self._is_ready(number, self.members[number], now) for number in others
        )

    def _ended(self, number: int) -> dict | None:
        """How the attempt ended on a machine."""
        attempt, member = self.attempt, self.members.get(number)
        if member is None or member.report["token"] != attempt.crew[number]:
            return None
        ended = member.report["ended"]
        return ended if ended and ended["attempt"] == attempt.number else None

    def _settle(self, attempt: _Attempt, ended: dict[int, dict], now: float) -> None:
        """The decision after all machines have ended: run_state.json of machine 0 counts, unless another one refuses."""
        status, how, saved = (ended[0][key] for key in ("status", "how", "saved"))
        for number, each in ended.items():
            if each["status"] == REFUSED and status not in FINAL:
                status, how = REFUSED, self._named(self.members[number], each["how"])
        leaving = {self.members[number].report["leaving"] for number in ended} - {0}
        progress, self.attempt = saved > self.record["best"], None
        failures = self.record["failures"] + (0 if attempt.planned or SAVED in leaving else 1)
        self.record = {**self.record, "failures": 0 if progress else failures, "best": saved}
        failures = self.record["failures"]
        if status in FINAL or STOPPED in leaving:
            self.end = (status, how) if status in FINAL else (STOPPED, "stopped by a person")
        elif failures >= MOST_FAILURES:
            text = f"{MOST_FAILURES} attempts in a row ended without a new checkpoint, the last one: {how}"
            self.end = CRASH_LOOP, f"crash_loop: {text}"
        elif not self.members[0].report["leaving"]:
            seconds = back_off_seconds(failures)
            self._not_before = now + seconds
            since = f" ({failures} of {MOST_FAILURES} without a new checkpoint)" if failures else ""
            self.say(f"the job ended: {how}; restarting in {seconds} s{since}")

    def _named(self, member: _Member, reason: str) -> str:
        single = self.machines.count == 1
        return reason if single else f"machine {member.report['machine']} ({member.report['host']}): {reason}"

    def all_know(self, now: float) -> bool:
        """Whether every machine that can be reached has learned of the end."""
        return all(
            member.knows_end or not member.connected or not self._is_here(number, member.report["token"], now)
            for number, member in self.members.items()
        )


# ---------------------------------------------------------------- connections


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = allow_reuse_address = True
    request_queue_size = 1024


class Service:
    """Serves a Lead to the other machines. Raises ConfigError if it cannot listen."""

    def __init__(self, lead: Lead):
        self._lead, machines = lead, lead.machines
        try:
            self._server = self._listen(machines)
        except OSError as error:
            text = f"machine 0 cannot listen on port {machines.port} ({error.strerror}); choose another one on all machines"
            raise ConfigError([Problem("--main_process_port", text)]) from None
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="team", daemon=True).start()

    def _listen(self, machines: Machines) -> _Server:
        """On the stated address alone if it is one of this machine, else on all: names may resolve to others elsewhere."""
        lead = self._lead

        class Handler(socketserver.StreamRequestHandler):
            timeout = lead.lost_seconds

            def handle(self) -> None:
                who = None
                with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
                    while line := self.rfile.readline(_MOST_BYTES):
                        report = json.loads(line)
                        with lead.lock:
                            order = lead.hear(report, time.monotonic())
                        if order["do"] != "taken":
                            who = report["machine"], report["token"]
                        self.wfile.write(json.dumps(order).encode() + b"\n")
                if who:
                    with lead.lock:
                        lead.disconnected(*who)

        class Server(_Server):
            address_family = socket.AF_INET6 if ":" in machines.address or _both_families(machines) else socket.AF_INET

            def server_bind(self) -> None:
                if self.address_family == socket.AF_INET6:
                    self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                super().server_bind()

        with contextlib.suppress(ValueError):
            ipaddress.ip_address(machines.address)
            with contextlib.suppress(OSError):
                return Server((machines.address, machines.port), Handler)
        return Server(("", machines.port), Handler)

    def close(self) -> None:
        """Stops to answer."""
        self._server.shutdown()
        self._server.server_close()


def _both_families(machines: Machines) -> bool:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(machines.address)
        return False
    return socket.has_dualstack_ipv6()


class Client:
    """Asks machine 0, over one connection while it lasts."""

    def __init__(self, machines: Machines, seconds: float):
        self._at, self._seconds, self._file = (machines.address, machines.port), seconds, None

    def exchange(self, report: dict) -> dict:
        """Report -> order. Raises OSError where machine 0 does not answer."""
        try:
            if self._file is None:
                with socket.create_connection(self._at, timeout=self._seconds) as connection:
                    connection.settimeout(self._seconds)
                    self._file = connection.makefile("rwb")  # keeps the connection open
            self._file.write(json.dumps(report).encode() + b"\n")
            self._file.flush()
            if not (line := self._file.readline(_MOST_BYTES)):
                raise ConnectionResetError("machine 0 closed the connection")
            return json.loads(line)
        except (OSError, ValueError) as error:
            self.close()
            raise OSError(getattr(error, "strerror", None) or str(error)) from None

    def close(self) -> None:
        """Ends the connection; the next question opens another."""
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._file = None
