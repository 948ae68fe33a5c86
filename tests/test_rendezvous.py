"""Ranks that were told different things refuse together and name what differs; a rank that refuses tells the others."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest

from pretrain import UserError
from pretrain.engines import rendezvous
from pretrain.engines.place import Place, read_place
from pretrain.engines.rendezvous import Refused, meet
from pretrain.run.processes import free_port
from pretrain.schema import ConfigError
from tests.ranks import run_ranks


class Stubborn(UserError):
    status = 73


def meet_in_each_case(folder: Path) -> dict:
    """{case: (kind of error, its status, its text, seconds)}, of three ranks that meet once per case."""
    rank, outcomes = int(os.environ["RANK"]), {}
    for case in ("equal", *DIFFERENCES, *REFUSALS):
        facts, here, refusal = {"optimizer.lr": "0.01", "run.seed": "1"}, folder, None
        if case == "another value" and rank == 2:
            facts["optimizer.lr"] = "0.02"
        elif case == "a missing key" and rank == 1:
            del facts["run.seed"]
        elif case == "other values":
            facts["run.seed"] = str(rank)
        elif case == "another folder" and rank > 0:
            here = folder / "not shared"
        elif case == "a refusal" and rank == 1:
            refusal = Stubborn("the data is damaged")
        elif case == "a refusal of rank 0" and rank == 0:
            refusal = Stubborn("the folder is in use")
        elif case == "a folder that cannot be written":
            here = folder / "nowhere"
        elif case == "a bug" and rank == 2:
            refusal = ZeroDivisionError("division by zero")
        began, error = time.monotonic(), None
        try:
            meet(read_place(), 60, facts, here, refusal)
        except Exception as raised:
            error = raised
        kind = type(error).__name__ if error else None
        outcomes[case] = kind, getattr(error, "status", None), str(error), time.monotonic() - began
    return outcomes


DIFFERENCES = {
    "another value": ("optimizer.lr", "0.01 on ranks 0-1", "0.02 on rank 2", socket.gethostname()),
    "a missing key": ("run.seed", "1 on ranks 0, 2", "none on rank 1"),
    "other values": ("run.seed", "0 on rank 0", "1 on rank 1", "2 on rank 2"),
    "another folder": ("run.directory", "not shared", "ranks 1-2", socket.gethostname()),
}
REFUSALS = {
    "a refusal": (1, 73, "the data is damaged"),
    "a refusal of rank 0": (0, 73, "the folder is in use"),
    "a folder that cannot be written": (0, 74, "FileNotFoundError"),
    "a bug": (2, 1, "ZeroDivisionError: division by zero"),
}


def test_ranks_start_or_refuse_together_and_name_key_values_ranks_and_hosts(tmp_path, subtests):
    outcomes = run_ranks(3, meet_in_each_case, tmp_path)
    assert [each["equal"][0] for each in outcomes] == [None] * 3
    assert not list(tmp_path.iterdir())  # rank 0 removed its files
    for case, words in DIFFERENCES.items():
        with subtests.test(case):
            for kind, status, text, seconds in (each[case] for each in outcomes):
                assert (kind, status) == ("ConfigError", 2) and all(word in text for word in words), text
                assert seconds < 20
    for case, (refuses, status, reason) in REFUSALS.items():
        with subtests.test(case):
            for rank, (kind, found, text, seconds) in enumerate(each[case] for each in outcomes):
                if rank == refuses:
                    assert kind in ("Stubborn", "ZeroDivisionError", "FileNotFoundError")
                else:
                    assert (kind, found) == ("Refused", status) and reason in text
                assert seconds < 20


def test_a_rank_alone_needs_no_store():
    assert meet(Place(), 1).add("x", 1) == 1
    with pytest.raises(Stubborn):
        meet(Place(), 1, refusal=Stubborn("no"))


@pytest.fixture
def brief(monkeypatch):
    """Waiting that takes seconds in place of minutes."""
    monkeypatch.setattr(rendezvous, "LEAST_SECONDS", 2.0)
    monkeypatch.setattr(rendezvous, "_FIRST_WORD_SECONDS", 0.5)
    monkeypatch.setattr(rendezvous, "_FAREWELL_SECONDS", 0.5)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_says_for_whom_and_gives_up_with_75(brief, monkeypatch, capfd, rank):
    monkeypatch.setattr(rendezvous, "LEAST_SECONDS", 1.0)
    place = Place(rank, 4, 0, 1, "127.0.0.1", free_port(), launched=True)
    with pytest.raises(Refused) as error:
        meet(place, 1)
    missing = "ranks 1-3" if rank == 0 else f"rank 0, whose store should be at 127.0.0.1:{place.port}"
    assert error.value.status == 75 and missing in str(error.value) and str(error.value).startswith("peer_lost")
    assert missing in capfd.readouterr().err


def test_a_port_that_another_program_uses_is_refused_by_name(brief):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match="MASTER_PORT"):
            meet(Place(0, 2, 0, 2, *other.getsockname(), launched=True), 1)


def test_two_processes_with_the_same_rank_are_refused(brief):
    """Two machines that were both started with --machine_rank 1. Threads stand for the processes."""
    port, errors = free_port(), {}

    def join(name: str, rank: int) -> None:
        try:
            meet(Place(rank, 3, 0, 1, "127.0.0.1", port, launched=True), 1)
        except Exception as error:
            errors[name] = error

    original, rendezvous._meetings = rendezvous._meetings, iter([7, 7, 7])  # as in three processes
    threads = [threading.Thread(target=join, args=each) for each in (("lead", 0), ("first", 1), ("second", 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rendezvous._meetings = original
    assert len(errors) == 3
    for error in errors.values():
        assert isinstance(error, ConfigError) and "two processes are rank 1" in str(error)


@pytest.mark.parametrize(("address", "local_world_size"), [("127.0.0.1", 1), ("localhost", 2)])
def test_the_store_listens_on_the_rendezvous_address_alone(address, local_world_size):
    place = Place(0, 2, 0, local_world_size, address, free_port(), launched=True)
    rendezvous._connect(place, 1)
    listening = [each.laddr for each in psutil.Process().net_connections("inet") if each.status == psutil.CONN_LISTEN]
    assert [each.ip for each in listening if each.port == place.port] in (["127.0.0.1"], ["::1"])


def test_a_name_that_other_machines_may_resolve_otherwise_is_not_bound():
    with rendezvous._listen(Place(0, 2, 0, 1, socket.gethostname(), free_port(), launched=True)) as listener:
        assert listener.getsockname()[0] in ("0.0.0.0", "::")
