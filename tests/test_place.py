"""A launcher's variables are read together: complete ones give a rank its place, others are refused by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import UserError
from pretrain.engines.place import LAUNCHER, Place, read_place
from pretrain.run import command_line
from pretrain.run.processes import free_port
from pretrain.schema import ConfigError

ROOT = Path(__file__).parents[1]
COMPLETE = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def refused(environment: dict[str, str]) -> str:
    """The keys that the refusal names."""
    with pytest.raises(ConfigError) as error:
        read_place(environment)
    return " ".join(problem.key for problem in error.value.problems)


@pytest.mark.parametrize(
    "environment",
    [{}, {"WORLD_SIZE": "1"}, {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}, {"RANK": ""}, {"OMPI_COMM_WORLD_SIZE": "1"},
     {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0"}],
)  # fmt: skip
def test_without_a_launcher_a_process_is_alone(environment):
    assert read_place(environment) == Place()


def test_empty_variables_are_removed_because_accelerate_would_read_them_as_numbers():
    environment = {"RANK": "", "WORLD_SIZE": " ", "LOCAL_RANK": "", "LOCAL_WORLD_SIZE": "", "HOME": ""}
    assert read_place(environment) == Place() and environment == {"HOME": ""}


def test_addresses_of_both_versions_and_host_names_are_accepted():
    for address in ("::1", "fe80::1%eth0", "node-1.cluster.local", "node_1"):
        assert read_place(COMPLETE | {"MASTER_ADDR": address}).address == address


def test_complete_variables_give_a_place_whatever_other_launchers_left():
    left = {"OMPI_COMM_WORLD_SIZE": "64", "PMI_RANK": "9", "SLURM_PROCID": "7", "LOCAL_WORLD_SIZE": "2"}
    assert read_place(COMPLETE | left) == Place(3, 8, 1, 2, "10.0.0.1", 29500, launched=True)
    assert read_place(COMPLETE).several_machines and not read_place(COMPLETE | {"LOCAL_WORLD_SIZE": "8"}).several_machines
    one = read_place({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})  # needs no address
    assert one.launched and (one.world_size, one.several_machines) == (1, False)


@pytest.mark.parametrize("missing", list(COMPLETE))
def test_each_variable_that_is_missing_is_named(missing):
    assert missing in refused({name: value for name, value in COMPLETE.items() if name != missing})


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE LOCAL_RANK"),
        ({"LOCAL_RANK": "0"}, "RANK WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK LOCAL_RANK"),
        (COMPLETE | {"RANK": "8"}, "RANK"),
        (COMPLETE | {"RANK": "-1"}, "RANK"),
        (COMPLETE | {"WORLD_SIZE": "two"}, "WORLD_SIZE"),
        (COMPLETE | {"WORLD_SIZE": "0", "RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE"),
        (COMPLETE | {"LOCAL_RANK": "4"}, "LOCAL_RANK"),
        (COMPLETE | {"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK"),
        (COMPLETE | {"MASTER_ADDR": "http://10.0.0.1"}, "MASTER_ADDR"),
        (COMPLETE | {"MASTER_ADDR": "10.0.0.1:29500"}, "MASTER_ADDR"),
        (COMPLETE | {"LOCAL_WORLD_SIZE": "16"}, "LOCAL_WORLD_SIZE"),
        (COMPLETE | {"MASTER_PORT": "0"}, "MASTER_PORT"),
        (COMPLETE | {"MASTER_PORT": "70000"}, "MASTER_PORT"),
        (COMPLETE | {"MASTER_PORT": "29500/tcp"}, "MASTER_PORT"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE"),
    ],
)
def test_incomplete_and_contradictory_variables_are_named(environment, named):
    assert all(name in refused(environment) for name in named.split())


@pytest.mark.parametrize("left", [{"RANK": "1"}, {"LOCAL_RANK": "x", "RANK": "0", "WORLD_SIZE": "2"}])
def test_a_program_refuses_what_another_launcher_left_before_torch_is_imported(tiny, left):
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    code = "import runpy, sys\nsys.argv[0] = 'launch/pretrain.py'\n"
    code += "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\nfinally:\n    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, *tiny], cwd=ROOT, env=clean | left, capture_output=True, text=True)
    assert done.returncode == 2 and "LOCAL_RANK" in done.stderr and "Traceback" not in done.stderr, done.stderr


WAITS = """
import runpy, sys, time
from pretrain.run import command_line
sleep = time.sleep
time.sleep = lambda seconds: (seconds == command_line._FIRST_RANK_SECONDS and print("waits", flush=True), sleep(seconds))
sys.argv[0] = "launch/pretrain.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--optimizr.lr", "1"], "did you mean optimizer"),  # by the parser
        (["--data.synthetic", "null", "--data.train", "[{path: /nowhere}]"], "/nowhere.idx not found"),  # by `meet`
    ],
)
def test_only_the_first_rank_of_a_machine_reports_what_all_ranks_refuse(tiny, settings, message):
    """The launcher ends all ranks when one has exited: another one that exits first would silence the message."""
    place = COMPLETE | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    first, other = (
        subprocess.Popen(
            [sys.executable, "-c", WAITS, *tiny, *settings],
            env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": "none"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    )
    said = first.communicate(timeout=60)[1]
    assert first.returncode == 2 and message in said
    assert other.stdout.readline() == "waits\n"
    other.terminate()
    assert (other.communicate(timeout=10)[1], other.returncode) == ("", -signal.SIGTERM)


@pytest.mark.parametrize(("launcher", "reports"), [({}, False), ({"TORCHELASTIC_RUN_ID": "none"}, True)])
def test_a_rank_that_no_launcher_ends_reports_its_own_error(monkeypatch, capsys, launcher, reports):
    for name, value in (COMPLETE | launcher).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(command_line, "_FIRST_RANK_SECONDS", 0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # those of the tests stay

    def refuse(_: list[str]) -> None:
        raise UserError("its own")

    assert command_line.run(refuse) == 2
    assert ("its own" in capsys.readouterr().err) == reports
