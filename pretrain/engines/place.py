"""The place of this process among the ranks, as its launcher set it in environment variables. Imports no torch.

The variables are read together: a few of them, left over from another launcher or exported by a shell, would make a process
wait for ranks that never come.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import MutableMapping
from typing import NamedTuple

from pretrain.schema import ConfigError, Problem

_COUNTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
FOREIGN = ("OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_")
"""Prefixes of variables of MPI launchers, which accelerate would read although another launcher started this process."""
LAUNCHER = (*_COUNTS, *_MEETING, "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE")
"""Variables that say which rank a process is, and where the ranks meet."""
ATTEMPT = "PRETRAIN_ATTEMPT"
"""Variable with the name of this attempt among those of a supervised job: ranks meet only others of the same."""
_ALONE = "to train with one process, unset them; for several, start with `accelerate launch` or `torchrun`, which set them all"


class Place(NamedTuple):
    """One rank among the others."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int | None = 1
    """Ranks on this machine. None: the launcher did not say."""
    address: str = ""
    """Host at which the ranks meet; empty for a world of one."""
    port: int = 0
    launched: bool = False
    """A launcher set the variables; False: plain python, or accelerate launch with one process."""

    @property
    def several_machines(self) -> bool:
        """True unless all ranks are known to be on this machine."""
        return self.world_size > (self.local_world_size or 1)


def read_place(environment: MutableMapping[str, str] = os.environ) -> Place:
    """The place that the launcher's variables describe. Raises ConfigError if they are incomplete or contradict each other.

    Removes empty ones, which container files set and which accelerate would read as numbers.
    """
    for name in LAUNCHER:
        if not environment.get(name, "set").strip():
            del environment[name]
    values = {name: environment[name] for name in (*_COUNTS, *_MEETING, "LOCAL_WORLD_SIZE") if name in environment}
    given = [name for name in _COUNTS if name in values]
    if not given or (given == ["WORLD_SIZE"] and values["WORLD_SIZE"].strip() == "1"):
        _refuse_mpi(environment)
        return Place()
    missing = [name for name in _COUNTS if name not in values]
    if not missing and values["WORLD_SIZE"].strip() != "1":
        missing = [name for name in _MEETING if name not in values]
    if missing:
        shown = ", ".join(f"{name}={values[name]}" for name in given)
        text = f"not set, although the environment has {shown} from a launcher; {_ALONE}"
        raise ConfigError([Problem(", ".join(missing), text)])
    problems: list[Problem] = []
    numbers = {name: _read_number(name, text, problems) for name, text in values.items() if name != "MASTER_ADDR"}
    if not problems:
        problems = list(_contradictions(numbers))
    problems += _address_problems(values.get("MASTER_ADDR", "").strip(), numbers["WORLD_SIZE"])
    if problems:
        raise ConfigError(problems)
    local_world_size = numbers.get("LOCAL_WORLD_SIZE", 1 if numbers["WORLD_SIZE"] == 1 else None)
    meeting = values.get("MASTER_ADDR", "").strip(), numbers.get("MASTER_PORT", 0)
    return Place(*(numbers[name] for name in _COUNTS), local_world_size, *meeting, launched=True)


def _read_number(name: str, text: str, problems: list[Problem]) -> int:
    if not text.strip().isdecimal():
        problems.append(Problem(name, f"got {text!r}, must be a whole number of at least 0; {_ALONE}"))
        return 0
    return int(text)


def _address_problems(address: str, world_size: int) -> list[Problem]:
    """Anything but a host name or an IP address, such as a URL, or an address with a port."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(address)
        return []
    if world_size == 1 or not set(address) & set("/: \t[]"):
        return []
    text = f"got {address!r}, must be a host name or an IP address alone; the port is in MASTER_PORT"
    return [Problem("MASTER_ADDR", text)]


def _contradictions(numbers: dict[str, int]) -> list[Problem]:
    rank, size, local_rank = (numbers[name] for name in _COUNTS)
    local_size = numbers.get("LOCAL_WORLD_SIZE")
    rules = [
        (size >= 1, "WORLD_SIZE", f"got {size}, must be at least 1"),
        (rank < max(1, size), "RANK", f"got {rank}, must be less than WORLD_SIZE, {size}"),
        (local_rank <= rank, "LOCAL_RANK", f"got {local_rank}, must be at most RANK, {rank}"),
        (local_size is None or 1 <= local_size <= size, "LOCAL_WORLD_SIZE", f"got {local_size}, must be 1 to WORLD_SIZE, "
         f"{size}"),
        (local_size is None or local_rank < max(1, local_size), "LOCAL_RANK", f"got {local_rank}, must be less than "
         f"LOCAL_WORLD_SIZE, {local_size}"),
        (size == 1 or 1 <= numbers.get("MASTER_PORT", 0) < 2**16, "MASTER_PORT", f"got {numbers.get('MASTER_PORT')}, must be 1 "
         "to 65535"),
    ]  # fmt: skip
    return [Problem(name, f"{text}: variables of two launchers? {_ALONE}") for holds, name, text in rules if not holds]


def _refuse_mpi(environment: MutableMapping[str, str]) -> None:
    """Raises ConfigError under mpirun, or in a shell with its variables: every process would train by itself."""
    for name in _MPI:
        if environment.get(name, "").strip().isdecimal() and int(environment[name]) > 1:
            text = f"is {environment[name]}, but {', '.join(_COUNTS)} are not set: each process of mpirun would train by itself"
            raise ConfigError([Problem(name, f"{text}; {_ALONE}")])
