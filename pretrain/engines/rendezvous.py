"""The meeting of all ranks before anything collective: they wait for each other, compare facts, and start or refuse together.

All of it happens in torch's key-value store, so ranks that were given other settings, other engines or another number of ranks
still understand each other. A refusal of one rank ends all of them with its status and its reason.

    facts/0       those of rank 0; every other rank compares its own
    reply/<rank>  what differs there, or why the rank refuses
    arrived       number of replies; objections, objector/<n>: number of ranks that will not start, and which they are
    verdict       rank 0's decision, for all ranks; left: number of ranks that have read it
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import itertools
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from pretrain import UserError
from pretrain.engines.place import ATTEMPT, Place
from pretrain.schema import ConfigError, Problem

LEAST_SECONDS = 60.0
"""Ranks may start this far apart, however short collectives must be."""
_FIRST_WORD_SECONDS, _POLL_SECONDS, _SHARED_SECONDS = 10.0, 0.02, 1.0
_OBJECTION_SECONDS, _FAREWELL_SECONDS, _REFUSAL_SECONDS = 1.0, 10.0, 10.0
_MOST_SHOWN = 12
_meetings = itertools.count()
_servers: dict[tuple[str, int], dist.TCPStore] = {}
"""Stores that this process serves: a process may start several engines, one after the other, at the same address."""


class Refused(UserError):
    """Another rank refuses to start, or never came; has that rank's exit status."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


def meet(
    place: Place,
    seconds: float,
    facts: Mapping[str, str] | None = None,
    folder: Path | None = None,
    refusal: Exception | None = None,
) -> dist.Store:
    """Waits until all ranks are here, and agrees to start. -> a store for the process group.

    facts: must be equal on all ranks. folder: must be the same one on all ranks, which rank 0 can write. refusal: why this rank
    will not start; it is raised again once the others can learn of it. Raises ConfigError for facts that differ, and Refused.
    """
    if place.world_size == 1:
        if refusal:
            raise refusal
        return dist.HashStore()
    attempt = os.environ.get(ATTEMPT, ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"pretrain/{'/'.join(attempt)}/{next(_meetings)}"
    seconds = max(LEAST_SECONDS, seconds) if refusal is None else _REFUSAL_SECONDS
    facts = {**(facts or {}), "WORLD_SIZE": str(place.world_size)}
    try:
        store = dist.PrefixStore(prefix, _connect(place, seconds))
        is_only = store.add(f"claims/{place.rank}", 1) == 1
        if place.rank == 0 and is_only:
            problems = _Lead(place, store, seconds).agree(facts, folder, refusal)
        else:
            problems = _Follow(place, store, seconds).agree(facts, folder, refusal, is_only)
    except (UserError, RuntimeError):
        if refusal:
            raise refusal from None
        raise
    if refusal:
        raise refusal
    if problems:
        raise ConfigError([Problem(*problem) for problem in problems])
    return dist.PrefixStore("group", store)


# ---------------------------------------------------------------- the store


def _connect(place: Place, seconds: float) -> dist.TCPStore:
    """The store at the launcher's address; rank 0 serves it unless its launcher does. Raises ConfigError, Refused."""
    at, timeout = (place.address, place.port), timedelta(seconds=seconds)
    if place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        if at not in _servers:
            listener = _listen(place)
            host = listener.getsockname()[0]  # its own client: the address may lead here only from other machines
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
            options = {"wait_for_workers": False, "master_listen_fd": listener.detach()}
            _servers[at] = dist.TCPStore(host, place.port, None, True, timeout, **options)
        return _servers[at]
    why: list[str] = []

    def serves() -> bool:
        try:
            socket.create_connection(at, timeout=5).close()
            return True
        except OSError as error:
            why[:] = [error.strerror or str(error)]
            return False

    def missing() -> str:
        server = "rank 0, whose store" if place.rank else "its launcher (TORCHELASTIC_USE_AGENT_STORE is set), whose store"
        return f"for {server} should be at {place.address}:{place.port} ({why[0]})"

    _wait(serves, seconds, missing, place, speaks=place.local_rank == 0, poll_seconds=0.2)
    try:
        return dist.TCPStore(*at, is_master=False, timeout=timedelta(seconds=30), wait_for_workers=False)
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        text = f"what answers at {place.address}:{place.port} is not torch's store ({why}); use another port"
        raise ConfigError([Problem("MASTER_PORT", text)]) from None


def _listen(place: Place) -> socket.socket:
    """A socket on the rendezvous address alone, where all ranks must mean the same address by it; else on all addresses."""
    name = place.address
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return _bound(name, place.port)
    if not place.several_machines or name == "localhost":
        return _bound(name, place.port)
    try:
        socket.getaddrinfo(name, place.port)
    except OSError as error:  # names of new containers are known late, so this may be no mistake
        text = f"MASTER_ADDR={name} cannot be resolved on this machine ({error.strerror}); other ranks must be able to"
        print(f"pretrain: {text}", file=sys.stderr, flush=True)
    return _bound("", place.port)  # other machines may resolve a name to another of this machine's addresses


def _bound(host: str, port: int) -> socket.socket:
    try:
        kind, *_, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(kind, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(4096)
        return listener
    except socket.gaierror as error:
        raise ConfigError([Problem("MASTER_ADDR", f"{host}: {error.strerror}")]) from None
    except OSError as error:
        if host and error.errno == errno.EADDRNOTAVAIL:  # a proxy's address, or one that is translated on the way
            text = f"{host} is not an address of this machine, so torch's store listens on all of them"
            print(f"pretrain: {text}", file=sys.stderr, flush=True)
            return _bound("", port)
        text = f"rank 0 cannot listen on port {port} ({error.strerror}); set MASTER_PORT to a free one"
        raise ConfigError([Problem("MASTER_PORT", text)]) from None


def _wait(
    condition: Callable[[], bool],
    seconds: float,
    missing: Callable[[], str],
    place: Place,
    *,
    speaks: bool,
    poll_seconds: float = _POLL_SECONDS,
) -> None:
    """Waits for `condition`, and reports which ranks are missing after 10 s, then more and more rarely.

    Raises Refused, 75, after `seconds`.
    """
    began = time.monotonic()
    next_word = _FIRST_WORD_SECONDS
    while not condition():
        waited = time.monotonic() - began
        if waited > seconds:
            end = f"peer_lost: rank {place.rank} waited {seconds:.0f} s {missing()}"
            raise Refused(75, f"{end}; are all machines started, with the same number of ranks? For one process, unset RANK")
        if waited >= next_word:
            next_word = waited + min(60.0, next_word)
            if speaks:
                text = f"rank {place.rank} of {place.world_size} has waited {waited:.0f} s {missing()}"
                print(f"pretrain: {text}; gives up after {seconds:.0f} s", file=sys.stderr, flush=True)
        time.sleep(poll_seconds)


# ---------------------------------------------------------------- the two sides

Problems = list[tuple[str, str]]
"""(key, text), the same on all ranks; empty: all start."""


class _Lead:
    """Rank 0: collects the replies and decides."""

    def __init__(self, place: Place, store: dist.Store, seconds: float):
        self.place, self.store, self.seconds, self.host = place, store, seconds, socket.gethostname()

    def agree(self, facts: dict[str, str], folder: Path | None, refusal: Exception | None) -> Problems:
        """Raises Refused, and OSError if the folder cannot be written."""
        store, others, token = self.store, self.place.world_size - 1, None
        try:
            token = _put_token(folder) if folder and not refusal else None
        except OSError as error:
            refusal = error
        try:
            offer = {"facts": facts, "token": token and token.name, "refusal": _as_json(refusal)}
            store.set("facts/0", json.dumps(offer))
            if refusal is None:
                self._await_replies(others)
            verdict = {"refusal": _as_json(refusal), "problems": []} if refusal else self._decide(facts, folder)
        finally:
            if token:
                token.unlink(missing_ok=True)
        store.set("verdict", json.dumps(verdict))
        if any(verdict.values()):  # the store may end with this process, or with its launcher: the others must have read it
            with contextlib.suppress(Refused):
                _wait(lambda: store.add("left", 0) >= others, _FAREWELL_SECONDS, lambda: "", self.place, speaks=False)
        if refusal:
            raise refusal
        if verdict["refusal"]:
            raise Refused(*verdict["refusal"])
        return verdict["problems"]

    def _await_replies(self, others: int) -> None:
        store, objected = self.store, []

        def decided() -> bool:
            if store.add("objections", 0):
                objected.append(time.monotonic())
                if objected[-1] - objected[0] > _OBJECTION_SECONDS:  # time for others to object, too; not for all to come
                    return True
            return store.add("arrived", 0) >= others

        def missing() -> str:
            here = self._replies()
            absent = [rank for rank in range(1, others + 1) if rank not in here]
            hosts = sorted({self.host, *(reply["host"] for reply in here.values())})
            return f"for {_ranks(absent)} (here: {len(here) + 1} ranks on {', '.join(hosts[:8])})"

        _wait(decided, self.seconds, missing, self.place, speaks=True)

    def _replies(self) -> dict[int, dict]:
        store = self.store
        objectors = {int(store.get(f"objector/{n}")) for n in range(1, store.add("objections", 0) + 1)}
        ranks = sorted({*range(1, self.place.world_size), *objectors})  # one may expect more ranks than there are
        return {rank: json.loads(store.get(f"reply/{rank}")) for rank in ranks if store.check([f"reply/{rank}"])}

    def _decide(self, facts: dict[str, str], folder: Path | None) -> dict:
        """{"refusal": (status, reason) or None, "problems"}."""
        replies, store = self._replies(), self.store
        hosts = {0: self.host} | {rank: reply["host"] for rank, reply in replies.items()}
        if store.check(["twice"]):
            rank, host = json.loads(store.get("twice"))
            return {"refusal": None, "problems": [_twice(rank, host)]}
        refusals = _grouped((tuple(reply["refusal"]), rank) for rank, reply in replies.items() if reply["refusal"])
        for (status, reason), ranks in refusals.items():
            return {"refusal": (status, f"{_ranks(ranks, hosts)}: {reason}"), "problems": []}
        problems = []
        for path, ranks in _grouped((reply["unshared"], rank) for rank, reply in replies.items() if reply["unshared"]).items():
            text = f"{path} on {_ranks(ranks, hosts)} is not the folder that rank 0 uses, {folder} on {self.host}: "
            problems.append(
                ("run.directory", text + "rank 0 wrote a file that is not there. All machines must share run.directory")
            )
        for key in sorted({key for reply in replies.values() for key in reply["differences"]}):
            mine = facts.get(key, "none")
            values = _grouped([(mine, 0), *((reply["differences"].get(key, mine), rank) for rank, reply in replies.items())])
            text = " and ".join(f"{value} on {_ranks(ranks, hosts)}" for value, ranks in values.items())
            problems.append((key, f"must be the same on all ranks, but is {text}"))
        if len(problems) > _MOST_SHOWN:
            rest = ", ".join(key for key, _ in problems[_MOST_SHOWN : 2 * _MOST_SHOWN])
            problems = [*problems[:_MOST_SHOWN], (f"and {len(problems) - _MOST_SHOWN} more", rest)]
        return {"refusal": None, "problems": problems}


class _Follow(_Lead):
    """Any other rank: compares, replies, and learns the decision."""

    def agree(self, facts: dict[str, str], folder: Path | None, refusal: Exception | None, is_only: bool) -> Problems:
        """is_only: no other process claims this rank. Raises Refused."""
        store, rank, own = self.store, self.place.rank, []
        if not is_only:
            own = [_twice(rank, self.host)]
            store.set("twice", json.dumps([rank, self.host]))
        else:
            reply = {"host": self.host, "differences": {}, "unshared": None, "refusal": _as_json(refusal)}
            if refusal is None and not (offer := self._await("facts/0"))["refusal"]:
                theirs = offer["facts"]
                keys = sorted(key for key in facts.keys() | theirs.keys() if facts.get(key) != theirs.get(key))
                reply["differences"] = {key: facts.get(key, "none") for key in keys}
                own = [(key, f"is {facts.get(key, 'none')} here, but {theirs.get(key, 'none')} on rank 0") for key in keys]
                if folder and not _shares(folder / offer["token"]):
                    reply["unshared"] = str(folder)
                    own.append(("run.directory", f"{folder} on {self.host} is not the folder that rank 0 uses"))
            store.set(f"reply/{rank}", json.dumps(reply))
        if own or refusal:
            store.set(f"objector/{store.add('objections', 1)}", str(rank))
        store.add("arrived", 1)
        if refusal:
            store.add("left", 1)
            return []
        verdict = self._await("verdict")
        store.add("left", 1)
        if verdict["refusal"]:
            raise Refused(*verdict["refusal"])
        return [tuple(problem) for problem in verdict["problems"]] or own  # own: it came too late to be heard

    def _await(self, key: str) -> dict:
        """Waits in the store, not in a loop: there may be thousands of ranks."""

        def there() -> bool:
            try:
                self.store.wait([key], timedelta(seconds=_FIRST_WORD_SECONDS / 2))
                return True
            except dist.DistStoreError:
                return False

        _wait(there, self.seconds + _FAREWELL_SECONDS, lambda: "for rank 0", self.place, speaks=False, poll_seconds=0)
        return json.loads(self.store.get(key))


# ---------------------------------------------------------------- a file that all must see


def _put_token(folder: Path) -> Path:
    """An empty file whose name no rank has looked for before, so that no cache of a network file system denies it. The next
    start removes it if this process is killed."""
    token = folder / f".shared-{secrets.token_hex(8)}.tmp"
    token.touch()
    return token


def _shares(token: Path) -> bool:
    """Looks for rank 0's file for a second: network file systems cache which folders exist."""
    deadline = time.monotonic() + _SHARED_SECONDS
    while not token.exists():
        if time.monotonic() > deadline:
            return False
        for folder in (token.parents[1], token.parent):  # opening a folder makes the client ask its server again
            with contextlib.suppress(OSError):
                os.close(os.open(folder, os.O_RDONLY))
        time.sleep(0.05)
    return True


# ---------------------------------------------------------------- words


def _as_json(refusal: Exception | None) -> list | None:
    """[exit status, reason]."""
    if refusal is None or isinstance(refusal, UserError):
        return refusal and [refusal.status, str(refusal)]
    return [74 if isinstance(refusal, OSError) else 1, f"{type(refusal).__name__}: {refusal}"]


def _twice(rank: int, host: str) -> tuple[str, str]:
    return "RANK", f"two processes are rank {rank}, the second one on {host}; give each machine its own number (--machine_rank)"


def _grouped(pairs: Iterable[tuple]) -> dict:
    """[(value, rank), ...] -> {value: [rank, ...]}."""
    groups: dict = {}
    for value, rank in pairs:
        groups.setdefault(value, []).append(rank)
    return groups


def _ranks(ranks: Iterable[int], hosts: Mapping[int, str] | None = None) -> str:
    """`ranks 0-3, 8 (host-a)`."""
    ranks, runs = sorted(ranks), []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs[:8]) + ", ..." * (len(runs) > 8)
    names = list(dict.fromkeys(hosts[rank] for rank in ranks)) if hosts else []
    where = f" ({', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''})" if names else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {text}{where}"
