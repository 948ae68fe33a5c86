"""The recipes for Kubernetes, SkyPilot and Docker are valid by their makers' schemas and linters, and agree with the run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from pretrain.config import load

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*/*.sh"), *ROOT.glob("*/*/*.sh"), ROOT / ".ci" / "run"])
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
SERVICE, CLAIM, JOB = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
SKYPILOT = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
FINAL = {2, 70, 73, 74, 76, 77, 130}
"""Statuses after which a restart would not help, or is not wanted. docs/running.md lists them all."""


def test_the_shell_scripts_pass_shellcheck():
    assert {"launch/slurm.sh", "docker/entrypoint.sh", "tools/tokenize_slurm.sh"} <= set(SCRIPTS)
    done = subprocess.run([Path(sys.executable).with_name("shellcheck"), *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_documented_statuses_are_those_that_the_recipes_know():
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "running.md").read_text(), re.MULTILINE)
    assert set(map(int, rows)) == {0, 1, 75, *FINAL}


# ---------------------------------------------------------------- Docker


def test_the_dockerfile_passes_hadolint():
    command = [Path(sys.executable).with_name("hadolint"), "--strict-labels", "docker/Dockerfile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_is_fixed_by_a_digest_and_runs_as_a_user_who_is_not_root():
    (base,) = re.findall(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"nvidia/cuda:[\w.]+-devel-ubuntu[\d.]+@sha256:[0-9a-f]{64}", base)
    assert re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)[-1:] == [str(POD["securityContext"]["runAsUser"])] != ["0"]
    (entrypoint,) = re.findall(r'^ENTRYPOINT \["(.*)"\]$', DOCKERFILE, re.MULTILINE)
    assert os.access(ROOT / entrypoint, os.X_OK)


@pytest.mark.parametrize(
    ("words", "runs"),
    [
        ([], "python launch/supervise.py --help"),
        (["--help"], "python launch/supervise.py --help"),
        (["--config", "two words.yaml"], "python launch/supervise.py -- --config two words.yaml"),
        (["--force", "--", "--config", "x.yaml"], "python launch/supervise.py --force -- --config x.yaml"),
        (["nvidia-smi", "--list-gpus"], "nvidia-smi --list-gpus"),
    ],
)
def test_the_entrypoint_starts_the_supervisor_or_a_command(tmp_path, words, runs):
    for program in ("python", "nvidia-smi"):
        (tmp_path / program).write_text('#!/bin/sh\nprintf "%s|" "${0##*/}" "$@"\necho "$$"\nexit 75\n')
        (tmp_path / program).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    entry = subprocess.Popen([ROOT / "docker" / "entrypoint.sh", *words], env=environment, stdout=subprocess.PIPE, text=True)
    output, _ = entry.communicate(timeout=60)
    *said, process = output.strip().split("|")
    assert " ".join(said) == runs and entry.returncode == 75
    assert int(process) == entry.pid  # it took the shell's place: signals of the container reach it


# ---------------------------------------------------------------- Kubernetes


@pytest.mark.parametrize("version", ["1.32", kubernetes_validate.latest_version()])
def test_the_kubernetes_objects_are_valid_and_have_no_unknown_field(version):
    """By the OpenAPI schemas of the API, with unknown fields refused."""
    for each in (SERVICE, CLAIM, JOB):
        kubernetes_validate.validate(each, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(JOB | {"spec": JOB["spec"] | {"backoffLimits": 3}}, version, strict=True)


def test_the_pods_find_each_other():
    """By the rules for pods of an Indexed Job: $(job)-$(index).$(subdomain), where a headless service has that name."""
    spec = JOB["spec"]
    assert SERVICE["spec"]["clusterIP"] == "None" and SERVICE["spec"]["publishNotReadyAddresses"]
    assert SERVICE["spec"]["selector"] == {"job-name": JOB["metadata"]["name"]}
    assert POD["subdomain"] == SERVICE["metadata"]["name"] and spec["completionMode"] == "Indexed"
    variables = {each["name"]: each["value"] for each in CONTAINER["env"]}
    assert spec["completions"] == spec["parallelism"] == int(variables["PET_NNODES"])


def action_of(status: int, disrupted: bool = False) -> str:
    """What the job controller does with a pod whose container ended with `status`: the first rule that matches, else Count."""
    for rule in JOB["spec"]["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes and codes["containerName"] == CONTAINER["name"]:
            if (status in codes["values"]) == (codes["operator"] == "In") and status != 0:
                return rule["action"]
        elif disrupted and {"type": "DisruptionTarget", "status": "True"} in rule.get("onPodConditions", []):
            return rule["action"]
    return "Count"


def test_a_pod_is_replaced_after_75_or_an_eviction_and_the_job_fails_where_a_restart_would_not_help():
    assert POD["restartPolicy"] == "Never" and JOB["spec"]["podReplacementPolicy"] == "Failed"
    assert action_of(75) == action_of(137, disrupted=True) == "Ignore"
    assert action_of(1) == action_of(137) == "Count"
    assert {action_of(status) for status in FINAL} == {"FailJob"}


def test_the_grace_period_is_long_enough_to_save_and_the_volumes_are_where_the_run_writes(tmp_path):
    (tmp_path / "mine.yaml").write_text("run: {name: mine}")
    config = load([word.replace("settings/mine", f"{tmp_path}/mine") for word in CONTAINER["args"]], world_size=None)
    assert POD["terminationGracePeriodSeconds"] >= config.checkpoint.deadline_seconds + 10
    mounts = {each["mountPath"] for each in CONTAINER["volumeMounts"]}
    (folder,) = re.findall(r"^WORKDIR (\S+)$", DOCKERFILE, re.MULTILINE)
    assert {"/dev/shm", "/tmp", *(f"{folder}/{each}" for each in (config.run.directory, "data", "settings"))} == mounts
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"] and POD["securityContext"]["runAsNonRoot"]


# ---------------------------------------------------------------- SkyPilot


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_skypilot_accepts_its_file(tmp_path):
    """Its own parser, of the release that pip installs; what follows needs a cloud."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-compile", "skypilot==0.14.1"], check=True)
    code = """if True:
        import sys, sky, yaml
        task = sky.Task.from_yaml_config(yaml.safe_load(open("launch/skypilot.yaml")), env_overrides=[("MIRROR", "s3://b/runs")])
        (resources,) = task.resources
        print(resources.use_spot, resources.accelerators, resources.job_recovery["recover_on_exit_codes"], task.num_nodes)
        broken = yaml.safe_load(open("launch/skypilot.yaml"))
        broken["resources"]["use_spots"] = True
        try:
            sky.Task.from_yaml_config(broken, env_overrides=[("MIRROR", "")])
        except ValueError as error:
            print("use_spots" in str(error))"""
    environment = os.environ | {"HOME": str(tmp_path), "WANDB_API_KEY": "none"}
    done = subprocess.run([python, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split("\n")[:2] == ["True {'H100': 8} [75] 1", "True"], done.stdout + done.stderr


def test_a_lost_machine_is_replaced_and_what_a_restart_would_not_help_is_not_tried_again():
    """Managed jobs recover from a lost machine by themselves; of the statuses of a run, only these start it again."""
    recovery = SKYPILOT["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
