"""The supervisors of a job's machines take the same decision: by reports and orders alone, then over real sockets."""

from __future__ import annotations

import json
import socket
import time

import pytest

from pretrain.engines.machines import Machines
from pretrain.run.processes import free_port
from pretrain.run.team import CRASH_LOOP, REFUSED, SAVED, STOPPED, Client, Lead, Service

NONE = {"attempt": 0, "failures": 0, "best": 0}


class Team:
    """A Lead, and the reports of machines that obey it; time passes only by `wait`."""

    def __init__(self, count: int = 3, least: int | None = None, record: dict | None = None):
        self.said, self.now, self.record = [], time.monotonic(), record or NONE
        machines = Machines(count=count, address="127.0.0.1", port=23000, stated=True)
        self.lead = Lead("run", machines, least or count, 900, 30, self.said.append)
        self.reports = {number: self.report(number) for number in range(count)}
        self.orders: dict[int, dict] = {}

    def report(self, number: int, token: str = "a") -> dict:
        """The first report of a new supervisor."""
        return {"run": "run", "machine": number, "of": self.lead.machines.count, "token": f"{token}{number}", "processes": 2,
                "host": f"host-{number}", "running": None, "ended": None, "leaving": 0, "refusal": None,
                "record": self.record}  # fmt: skip

    def wait(self, seconds: float = 0.5, silent: set[int] = frozenset()) -> dict[int, dict]:
        """-> the orders after these seconds, in which all machines but the silent ones report twice a second."""
        until = self.now + seconds
        while self.now < until:
            self.now += 0.5
            for number, report in self.reports.items():
                if number not in silent:
                    order = self.orders[number] = self.lead.hear(report, self.now)
                    if order["do"] == "run":
                        done = report["ended"]["attempt"] if report["ended"] else 0
                        report["running"] = order["attempt"] if order["attempt"] > done else None
        return self.orders

    def end(self, *numbers: int, status: int | None = SAVED, saved: int = 0, how: str = "it ended") -> None:
        """The launchers of these machines end."""
        for number in numbers:
            report = self.reports[number]
            report["ended"] = {"attempt": report["running"], "status": status, "how": how, "saved": saved}
            report["running"] = None

    def do(self) -> set[str]:
        return {order["do"] for order in self.orders.values()}


def test_all_machines_start_one_attempt_after_the_last_one_has_come():
    team = Team()
    assert team.wait(20, silent={1})[0]["do"] == "wait" and "machine 1 " in team.said[-1] and "host-2" in team.said[-1]
    orders = team.wait(1)
    assert team.do() == {"run"} and [orders[n]["rank"] for n in range(3)] == [0, 1, 2]
    assert {(order["attempt"], order["port"], order["name"], order["world_size"]) for order in orders.values()} == {
        (1, orders[0]["port"], orders[0]["name"], 6)
    }


def test_where_one_machine_ends_the_others_are_stopped_and_start_again_elsewhere():
    """A supervisor that restarted alone would meet nobody."""
    team = Team()
    first = team.wait(1)[0]
    team.end(1, status=None)
    assert team.wait()[1]["do"] == "run" and team.reports[1]["running"] is None  # it has run this attempt
    team.wait(5)
    assert team.do() == {"stop"}
    team.end(0, status=SAVED, saved=8)
    team.wait(30)
    assert team.do() == {"stop"}  # machine 2 still runs: a new attempt now would lack it
    team.end(2)
    second = team.wait(3)[0]
    assert team.do() == {"run"} and (second["attempt"], second["port"] != first["port"]) == (2, True)
    assert second["name"] != first["name"] and "restarting in 1 s" in team.said[-1]


@pytest.mark.parametrize("status", [0, 2, 70, 73, 74, 76, 77, 130])
def test_a_final_status_of_machine_0_ends_all(status):
    team = Team()
    team.wait(1)
    team.end(0, 1, 2, status=status, how="that is why")
    assert {(order["do"], order["status"], order["reason"]) for order in team.wait().values()} == {
        ("end", status, "that is why")
    }
    assert team.lead.all_know(team.now)


def test_three_attempts_without_a_new_checkpoint_are_a_crash_loop_on_all_even_if_machine_0_is_replaced():
    team = Team()
    for _ in range(2):
        team.wait(20)
        team.end(0, 1, 2)
    team.wait()
    record = team.orders[1]["record"]
    assert (record["attempt"], record["failures"]) == (2, 2)
    again = Team(record=record)  # a new machine 0 without the run's folder, which hears of the past from the others
    again.reports[0]["record"] = NONE
    again.wait(1)
    assert {order["attempt"] for order in again.orders.values()} == {3}
    again.end(0, 1, 2)
    assert {(order["do"], order["status"]) for order in again.wait().values()} == {("end", CRASH_LOOP)}


def test_a_checkpoint_ends_a_series_of_failures():
    team = Team()
    for saved in (0, 0, 8, 8, 8):
        team.wait(20)
        team.end(0, 1, 2, saved=saved)
    team.wait(20)
    assert team.do() == {"run"} and team.lead.record["failures"] == 2


def test_a_silent_machine_is_lost_and_waited_for():
    team = Team()
    team.wait(1)
    team.wait(29, silent={2})
    assert team.lead.attempt.over_since is None
    team.wait(3, silent={2})
    assert {team.orders[n]["do"] for n in (0, 1)} == {"stop"} and "machine 2 (host-2) is lost" in team.said
    team.end(0, 1)
    team.wait(600, silent={2})
    assert {team.orders[n]["do"] for n in (0, 1)} == {"wait"}
    team.wait(1)
    assert team.orders[2]["do"] == "wait", "it still runs the attempt that it was cut off from"
    team.end(2)
    team.wait(1)
    assert team.do() == {"run"} and team.orders[2]["attempt"] == 2


def test_a_replacement_is_another_supervisor_with_the_same_number():
    team = Team()
    team.wait(1)
    team.lead.disconnected(1, "a1")
    team.reports[1] = team.report(1, "b")
    assert team.wait(4)[1]["do"] == "taken"  # by one that may only have lost its connection
    team.wait(5)
    assert {team.orders[n]["do"] for n in (0, 2)} == {"stop"}  # their ranks wait for those of the lost machine
    team.end(0, 2, saved=4)
    team.wait(3)
    assert team.do() == {"run"} and {order["attempt"] for order in team.orders.values()} == {2}


def test_machines_that_do_not_come_end_the_job_with_75():
    team = Team()
    team.wait(902, silent={1, 2})
    assert (team.orders[0]["do"], team.orders[0]["status"]) == ("end", SAVED) and "machines 1, 2" in team.orders[0]["reason"]


def test_fewer_machines_start_if_they_may_and_all_of_them_once_the_others_return():
    team = Team(least=2)
    team.wait(902, silent={1})
    assert (team.orders[2]["machines"], team.orders[2]["rank"], team.orders[2]["world_size"]) == (2, 1, 4)
    team.wait(2)
    assert {team.orders[n]["do"] for n in (0, 2)} == {"stop"} and team.orders[1]["do"] == "wait"
    team.end(0, 2, saved=4)
    team.wait(3)
    assert {order["machines"] for order in team.orders.values()} == {3} and team.lead.record["failures"] == 0


def test_attempts_are_numbered_past_those_that_a_late_machine_knows():
    """Else it would take a new attempt for one that it has run."""
    team = Team(least=2)
    team.reports[1] |= {"record": {**NONE, "attempt": 7}, "ended": {"attempt": 7, "status": None, "how": "", "saved": 0}}
    team.wait(902, silent={1})
    assert team.orders[0]["attempt"] == 1
    team.wait(1)
    team.end(0, 2, saved=4)
    assert {order["attempt"] for order in team.wait(3).values()} == {8}


def test_a_notice_on_one_machine_makes_the_others_wait_for_its_replacement():
    team = Team()
    team.wait(1)
    team.reports[2]["leaving"] = SAVED
    team.end(0, 1, 2)
    team.wait(60)
    assert team.do() == {"wait"} and team.lead.record["failures"] == 0
    del team.reports[2]
    team.lead.disconnected(2, "a2")
    team.wait(60)
    team.reports[2] = team.report(2, "b")
    team.wait(1)
    assert {order["do"] for order in team.orders.values()} == {"run"}


def test_a_person_on_one_machine_stops_all():
    team = Team()
    team.wait(1)
    team.reports[2]["leaving"] = STOPPED
    team.end(0, 1, 2, status=None)
    assert {(order["do"], order["status"]) for order in team.wait().values()} == {("end", STOPPED)}


def test_a_refusal_of_one_machine_ends_all_and_names_it():
    team = Team()
    team.reports[1]["refusal"] = [REFUSED, "its data are missing"]
    orders = team.wait(1)
    assert {order["status"] for order in orders.values()} == {REFUSED}
    assert orders[0]["reason"] == "machine 1 (host-1): its data are missing"


def test_supervisors_of_another_run_or_count_are_refused_without_harm():
    team = Team()
    for stranger in ({"run": "another"}, {"of": 4}, {"machine": 3}):
        order = team.lead.hear(team.reports[1] | stranger, team.now)
        assert (order["do"], order["status"]) == ("end", REFUSED)
    with pytest.raises(ValueError, match="record"):
        team.lead.hear(team.reports[1] | {"record": 3}, team.now)
    team.wait(1)
    assert team.do() == {"run"}


def test_a_pause_of_machine_0_loses_no_other():
    team = Team()
    team.wait(1)
    team.now += 3600  # its virtual machine was suspended
    team.wait(5)
    assert team.do() == {"run"}


# ---------------------------------------------------------------- over sockets


def test_reports_and_orders_travel_and_a_closed_connection_is_noticed():
    port, said = free_port(), []
    machines = Machines(count=2, address="127.0.0.1", port=port, stated=True)
    lead = Lead("run", machines, 2, 900, 30, said.append)
    service = Service(lead)
    with socket.create_connection(("127.0.0.1", port)) as other:  # of another program
        other.sendall(b"GET / HTTP/1.1\r\n\r\n" + json.dumps([1]).encode() + b"\n")
    client, reports = Client(machines, 5), Team(2).reports
    try:
        assert client.exchange(reports[1])["do"] == "wait"
        with lead.lock:
            assert lead.hear(reports[0], time.monotonic())["do"] == "run"
        assert client.exchange(reports[1])["rank"] == 1
        client.close()
        deadline = time.monotonic() + 30
        while lead.members[1].connected and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not lead.members[1].connected
        assert client.exchange(reports[1])["do"] == "run" and lead.members[1].connected
    finally:
        service.close()
    with pytest.raises(OSError):
        Client(machines, 5).exchange(reports[1])
