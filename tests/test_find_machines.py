"""A supervisor finds its place among the machines of a job in what schedulers set; the examples are theirs."""

from __future__ import annotations

import pytest

from pretrain.engines.machines import Machines, expand, find_machines
from pretrain.schema import ConfigError

# As srun sets them for a task, on the third of four nodes; the node list is that of a published example of these variables.
SLURM = {"SLURM_JOB_ID": "200505", "SLURM_NNODES": "4", "SLURM_JOB_NUM_NODES": "4", "SLURM_NODEID": "2", "SLURM_PROCID": "2",
         "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "gnode[10,20,25,37]", "SLURM_STEP_ID": "0",
         "SLURM_STEP_NODELIST": "gnode[10,20,25,37]", "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
         "SLURM_TASKS_PER_NODE": "1(x4)", "SLURM_GPUS_ON_NODE": "8"}  # fmt: skip
SKYPILOT = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.128.0.7\n10.128.0.9\n", "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NUM_GPUS_PER_NODE": "8"}  # fmt: skip
TRAINJOB = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "job-node-0-0.job",
            "PET_MASTER_PORT": "29400", "JOB_COMPLETION_INDEX": "1"}  # fmt: skip
PYTORCHJOB = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "PET_MASTER_ADDR": "job-master-0",
              "PET_MASTER_PORT": "23456", "PET_NNODES": "3", "PET_NODE_RANK": "2", "PET_NPROC_PER_NODE": "4", "RANK": "2",
              "WORLD_SIZE": "12", "PYTHONUNBUFFERED": "1"}  # fmt: skip
OLD_PYTORCHJOB = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "3", "RANK": "1"}
INDEXED = {"JOB_COMPLETION_INDEX": "11", "PET_NNODES": "16"}
FLAGS = {"num_machines": "2", "machine_rank": "1", "main_process_ip": "10.0.0.1", "num_processes": "16"}


def found(environment: dict[str, str], flags: dict[str, str] | None = None, file: dict | None = None) -> Machines:
    return find_machines(flags, file, environment, lambda: "train-11.pods.team.svc.cluster.local")


def test_each_scheduler_says_which_machine_this_is():
    assert found({}) == Machines() and not found({}).stated
    assert found(SLURM) == Machines(4, 2, "gnode10", 12000 + 50 * 105, 8, 4, True)
    assert found(SKYPILOT) == Machines(2, 1, "10.128.0.7", 29500, 8, 2, True)
    assert found(TRAINJOB) == Machines(2, 1, "job-node-0-0.job", 29400, None, 2, True)
    assert found(PYTORCHJOB) == Machines(3, 2, "job-master-0", 23456, 4, 3, True)
    assert found(OLD_PYTORCHJOB) == Machines(3, 1, "job-master-0", 23456, None, 3, True)
    assert found(INDEXED) == Machines(16, 11, "train-0.pods.team.svc.cluster.local", 29500, None, 16, True)
    assert found({}, FLAGS) == Machines(2, 1, "10.0.0.1", 29500, 8, 2, True)
    assert found({}, {"machine_rank": "1"}, {**FLAGS, "main_process_port": 1234}).port == 1234
    assert found(PYTORCHJOB | {"PET_NNODES": "1:3"}) == found(PYTORCHJOB)._replace(least=1)
    assert found({**SLURM, "SLURM_GPUS_ON_NODE": ""}).processes is None
    assert found({**SKYPILOT, "SKYPILOT_NUM_GPUS_PER_NODE": "0"}).processes is None


def test_a_step_on_some_of_the_nodes_of_a_job_counts_its_own():
    step = SLURM | {"SLURM_STEP_NODELIST": "gnode[20,37]", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1"}
    assert found(step)[:3] == (2, 1, "gnode20")
    interactive = {"SLURM_JOB_ID": "1", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "sh04-14n01", "SLURM_STEP_NUM_NODES": "1"}
    assert found(interactive)[:2] == (1, 0)


def test_flags_come_before_variables_and_variables_before_a_file():
    assert found(SLURM, {"main_process_ip": "10.1.1.1", "main_process_port": "3000"})[2:4] == ("10.1.1.1", 3000)
    assert found(SLURM, {"num_processes": "16"}).processes == 4
    assert found(SLURM, None, {"num_machines": 2, "machine_rank": 0, "num_processes": 2}) == found(SLURM)


def test_compressed_lists_of_nodes_are_expanded_in_order():
    assert list(expand("node[001-003,200],login1")) == ["node001", "node002", "node003", "node200", "login1"]
    assert list(expand("rack[0-1]n[9-10]-ib")) == ["rack0n9-ib", "rack0n10-ib", "rack1n9-ib", "rack1n10-ib"]
    assert list(expand("n[0-1],m[2-3,07]")) == ["n0", "n1", "m2", "m3", "m07"]
    assert len(list(expand("node[0001-1024]"))) == 1024
    assert list(expand("sh04-14n01")) == ["sh04-14n01"]


@pytest.mark.parametrize(
    ("environment", "flags", "keys"),
    [
        (SLURM, {"num_machines": "2"}, {"--num_machines"}),
        (SLURM, {"machine_rank": "0"}, {"--machine_rank"}),
        (SLURM | SKYPILOT, {}, {"SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"}),
        ({name: text for name, text in SLURM.items() if "STEP" not in name}, {}, {"SLURM_STEP_NODELIST"}),  # no srun
        (SLURM | {"SLURM_LOCALID": "3"}, {}, {"SLURM_LOCALID"}),
        ({"TORCHELASTIC_RUN_ID": "none"}, {}, {"TORCHELASTIC_RUN_ID"}),
        ({"JOB_COMPLETION_INDEX": "0"}, {}, {"PET_NNODES"}),
        ({"PET_NNODES": "two"}, {}, {"PET_NNODES"}),
        ({"PET_NNODES": "2"}, {}, {"--machine_rank", "--main_process_ip"}),
        (TRAINJOB | {"PET_NODE_RANK": "2", "JOB_COMPLETION_INDEX": "2"}, {}, {"PET_NODE_RANK"}),
        (TRAINJOB | {"PET_MASTER_ADDR": "10.0.0.1:29500"}, {}, {"PET_MASTER_ADDR"}),
        (TRAINJOB, {"main_process_port": "65530"}, {"--main_process_port"}),
        ({}, FLAGS | {"num_processes": "15"}, {"--num_processes"}),
    ],
)
def test_what_is_missing_wrong_or_contradictory_is_refused_by_name(environment, flags, keys):
    with pytest.raises(ConfigError) as refusal:
        found(environment, flags)
    assert {problem.key for problem in refusal.value.problems} == keys
