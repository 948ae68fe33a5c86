"""The machines of a job, as flags or a scheduler's variables describe them. Imports no torch.

One process per machine asks: `launch/supervise.py`, which then starts the ranks. Each fact comes from the first of these that
states it; where two of them state another number of machines, or of this machine, the job is refused.

    flags        --num_machines, --machine_rank, --main_process_ip, --main_process_port, --num_processes (of all machines)
    torchrun     PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT, PET_NPROC_PER_NODE, as Kubeflow sets them;
                 MASTER_ADDR and MASTER_PORT; without PET_NNODES also Kubeflow's older WORLD_SIZE and RANK, which count pods
    SkyPilot     SKYPILOT_NUM_NODES, SKYPILOT_NODE_RANK, SKYPILOT_NODE_IPS, SKYPILOT_NUM_GPUS_PER_NODE
    SLURM        of srun's tasks: SLURM_STEP_NUM_NODES, SLURM_NODEID, SLURM_STEP_NODELIST, SLURM_GPUS_ON_NODE, SLURM_JOB_ID
    Kubernetes   of an Indexed Job: JOB_COMPLETION_INDEX; machine 0 has this pod's name with index 0. Nothing states the number
                 of pods: set PET_NNODES
    a file       accelerate's configuration file
"""

from __future__ import annotations

import itertools
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from pretrain.schema import ConfigError, Problem

DEFAULT_PORT = 29500
PORTS = 50
"""Ports of a job on machine 0: one at which the supervisors meet, and those after it for the ranks, another one per attempt."""

Facts = dict[str, tuple[str, str]]
"""Fact -> (name of the flag or variable that states it, text)."""


class Machines(NamedTuple):
    """One machine among those of its job."""

    count: int = 1
    number: int = 0
    address: str = ""
    """Host name or IP address of machine 0; empty for a single machine."""
    port: int = DEFAULT_PORT
    processes: int | None = None
    """Ranks on this machine. None: nothing says how many."""
    least: int = 1
    """Number of machines with which the job may run if no more come."""
    stated: bool = False
    """False: nothing states a number of machines."""


def find_machines(
    flags: Mapping[str, str] | None = None,
    file: Mapping[str, object] | None = None,
    environment: Mapping[str, str] = os.environ,
    full_name: Callable[[], str] = socket.getfqdn,
) -> Machines:
    """This machine. Raises ConfigError where facts are missing, cannot be read, or contradict each other.

    flags, file: accelerate's, by name with underscores. full_name: this host's, with its domain.
    """
    given = {name: text.strip() for name, text in environment.items() if text.strip()}
    problems = list(_wrong_start(given))
    sources = [
        {fact: (f"--{name}", flags[name]) for fact, name in _ACCELERATE.items() if name in (flags or {})},
        _of_torchrun(given),
        _take(given, _SKYPILOT),
        _of_slurm(given),
        _take(given, {"number": "JOB_COMPLETION_INDEX"}),
    ]
    if "SKYPILOT_NODE_IPS" in given:
        sources[2]["address"] = "SKYPILOT_NODE_IPS", given["SKYPILOT_NODE_IPS"].split()[0]
    if sources[4]:
        head = re.sub(r"^([^.]*-)\d+(?=\.|$)", r"\g<1>0", full_name())
        sources[4]["address"] = "JOB_COMPLETION_INDEX", head
    for fact in ("count", "number"):
        problems += _contradiction(fact, [source[fact] for source in sources if fact in source])
    words = {name: str(value) for name, value in (file or {}).items() if isinstance(value, int | str)}
    lowest = {fact: (name, words[name]) for fact, name in _ACCELERATE.items() if name in words}
    facts: Facts = {}
    for source in reversed([*sources, lowest]):
        facts |= source
    count = _number(facts, "count", problems) or 1
    least = _number(facts, "least", problems) or count
    if "JOB_COMPLETION_INDEX" in given and "count" not in facts:
        problems.append(
            Problem("PET_NNODES", "not set in a pod of an Indexed Job; set it to the number of pods that train together")
        )
    found = Machines(count=count, least=min(least, count))
    found = found._replace(processes=_processes(facts, count, problems), stated="count" in facts)
    if count > 1 and not problems:
        if facts.get("number", ("",))[0] == "SLURM_NODEID" and "SLURM_STEP_NODELIST" not in given:
            text = f"not set, although SLURM has {count} nodes for this job: start one process per node, with srun"
            problems.append(Problem("SLURM_STEP_NODELIST", text))
        found = _place(found, facts, problems)
    if problems:
        raise ConfigError(problems)
    return found


_SKYPILOT = {"count": "SKYPILOT_NUM_NODES", "number": "SKYPILOT_NODE_RANK", "processes": "SKYPILOT_NUM_GPUS_PER_NODE"}
_ACCELERATE = {
    "count": "num_machines",
    "number": "machine_rank",
    "address": "main_process_ip",
    "port": "main_process_port",
    "total": "num_processes",
}


def _take(given: Mapping[str, str], names: dict[str, str]) -> Facts:
    return {fact: (name, given[name]) for fact, name in names.items() if name in given}


def _of_torchrun(given: Mapping[str, str]) -> Facts:
    names = {"count": "PET_NNODES", "number": "PET_NODE_RANK", "processes": "PET_NPROC_PER_NODE"}
    if "PET_NNODES" in given and "PET_NODE_RANK" not in given and "LOCAL_RANK" not in given:
        names["number"] = "RANK"  # Kubeflow's PyTorchJob: of the pod
    if "PET_NNODES" not in given and "MASTER_ADDR" in given and "LOCAL_RANK" not in given:
        names |= {"count": "WORLD_SIZE", "number": "RANK"}
    facts = _take(given, {"address": "MASTER_ADDR", "port": "MASTER_PORT"}) if names.keys() & _take(given, names).keys() else {}
    facts |= _take(given, names | {"address": "PET_MASTER_ADDR", "port": "PET_MASTER_PORT"})
    if facts.get("processes", ("", ""))[1] in ("auto", "gpu", "cpu"):  # as many as there are devices
        del facts["processes"]
    if ":" in facts.get("count", ("", ""))[1]:  # of an elastic job
        least, _, most = facts["count"][1].partition(":")
        facts |= {"count": ("PET_NNODES", most), "least": ("PET_NNODES", least)}
    return facts


def _of_slurm(given: Mapping[str, str]) -> Facts:
    if "SLURM_JOB_ID" not in given:
        return {}
    facts = _take(given, {"count": "SLURM_NNODES", "number": "SLURM_NODEID", "processes": "SLURM_GPUS_ON_NODE"})
    facts |= _take(given, {"count": "SLURM_STEP_NUM_NODES"})
    name = next((name for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if name in given), None)
    if name:
        facts["address"] = name, next(expand(given[name]), "")
    if given["SLURM_JOB_ID"].isdecimal():  # below the ports that Linux lends to connections; jobs on one node do not collide
        facts["port"] = "SLURM_JOB_ID", str(12000 + PORTS * (int(given["SLURM_JOB_ID"]) % 400))
    return facts


def expand(names: str) -> Iterator[str]:
    """The hosts of SLURM's compressed list, in its order: `rack[0-1]node[01-03,7],login` are eight and one."""
    for name in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", names):
        parts = [[part] if part[0] != "[" else list(_numbers(part[1:-1])) for part in re.findall(r"\[[^\]]*\]|[^\[]+", name)]
        yield from map("".join, itertools.product(*parts))


def _numbers(ranges: str) -> Iterator[str]:
    """`001-003,7` -> 001, 002, 003, 7."""
    for each in ranges.split(","):
        first, _, last = each.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield f"{number:0{len(first)}d}"


def _wrong_start(given: Mapping[str, str]) -> Iterator[Problem]:
    """One process per machine is expected, on every machine."""
    if "TORCHELASTIC_RUN_ID" in given:
        yield Problem("TORCHELASTIC_RUN_ID", "is set by torchrun or accelerate; start one supervisor on every machine instead")
    if given.get("SLURM_LOCALID", "0") != "0":
        text = (
            f"is {given['SLURM_LOCALID']}: several tasks per node; start one, which starts the ranks: srun --ntasks-per-node=1"
        )
        yield Problem("SLURM_LOCALID", text)


def _contradiction(fact: str, stated: list[tuple[str, str]]) -> list[Problem]:
    if len({text for _, text in stated}) < 2:
        return []
    (first, value), (other, another) = next((a, b) for a, b in itertools.combinations(stated, 2) if a[1] != b[1])
    what = "number of machines" if fact == "count" else "number of this machine"
    return [Problem(first, f"states {value} as the {what}, but {other} states {another}; remove or unset one of them")]


def _number(facts: Facts, fact: str, problems: list[Problem]) -> int | None:
    if fact not in facts:
        return None
    name, text = facts[fact]
    if not text.isdecimal():
        problems.append(Problem(name, f"got {text!r}, must be a whole number"))
        return None
    return int(text)


def _processes(facts: Facts, count: int, problems: list[Problem]) -> int | None:
    """A flag or file states those of all machines, as accelerate wants it; variables those of this one. 0 GPUs say nothing."""
    here, total = (_number(facts, fact, problems) for fact in ("processes", "total"))
    if total is None or (here and not facts["total"][0].startswith("--")):
        return here or None
    if total % count or total < 1:
        text = f"is {total}, for all machines; must be a multiple of the number of machines, {count}"
        problems.append(Problem(facts["total"][0], text))
    return max(1, total // count)


def _place(found: Machines, facts: Facts, problems: list[Problem]) -> Machines:
    """`found` with what only several machines need."""
    number = _number(facts, "number", problems)
    port = _number(facts, "port", problems)
    address = facts.get("address", ("", ""))[1]
    if number is None:
        text = (
            f"not stated, although there are {found.count} machines ({facts['count'][0]}); give every machine its own, from 0"
        )
        problems.append(Problem("--machine_rank", text))
    elif number is not None and number >= found.count:
        text = f"got {number}, must be less than the number of machines, {found.count}"
        problems.append(Problem(facts["number"][0], text))
    if not address:
        problems.append(Problem("--main_process_ip", "not stated; give the name or IP address of machine 0"))
    elif set(address) & set("/[] \t") or (address.count(":") == 1):
        text = f"got {address!r}, must be a host name or an IP address alone"
        problems.append(Problem(facts["address"][0], text))
    if port is not None and not 1 <= port <= 65535 - PORTS:
        text = f"got {port}, must be 1 to {65535 - PORTS}: the {PORTS - 1} ports after it are for the ranks"
        problems.append(Problem(facts["port"][0], text))
    return found._replace(number=number or 0, address=address, port=port or DEFAULT_PORT)
