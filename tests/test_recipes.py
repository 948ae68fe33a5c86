"""The recipes for Kubernetes, SkyPilot and Docker are valid by their makers' schemas and linters, and agree with the run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import psutil
import pytest
import yaml

from pretrain.config import load
from pretrain.run import team
from tests.test_train import TINY

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
    (slurm,) = re.findall(r"^  0 \| ([\d |]+)\) exit", (ROOT / "launch" / "slurm.sh").read_text(), re.MULTILINE)
    assert set(map(int, slurm.split(" | "))) == FINAL == {*team.FINAL} - {0}


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
    (shared,) = [each["emptyDir"] for each in POD["volumes"] if each["name"] == "shared-memory"]
    assert shared["medium"] == "Memory" and re.fullmatch(r"\d+Gi", shared["sizeLimit"])  # without it there are 64 MiB
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


# ---------------------------------------------------------------- containers, without an engine for them


class Image:
    """What docker/Dockerfile builds, as far as files of this machine can stand in for it: the project without its ignored files
    at its WORKDIR, read-only, and this environment at /opt/venv."""

    def __init__(self, folder: Path):
        self.folder, self.tree, self.runs = folder, folder / "image", folder / "runs"
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file() and not name.startswith((".", "tests/", "benchmarks/")):
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name)
        for place in (self.tree / "runs", self.tree / "settings", self.runs, folder / "python", folder / "venv"):
            place.mkdir()
        self.runs.chmod(0o777)
        text = re.search(r"^ENV (HOME=.*?[^\\])$", DOCKERFILE, re.MULTILINE | re.DOTALL)[1].replace("\\\n", " ")
        self.variables = {"PATH": f"/opt/venv/bin:{os.environ['PATH']}"} | dict(each.split("=", 1) for each in text.split())

    def start(self, words: list[str], host: str, **variables: str) -> subprocess.Popen:
        """Starts the entrypoint as process 1 of a container under a user without a name; the caller's child is its parent."""
        blocked = next((each for each in reversed(Path(sys.base_prefix).parents) if not each.stat().st_mode & 0o001), None)
        again = f"mount -t tmpfs -o mode=755 none {blocked}\nmkdir -p {sys.base_prefix}" if blocked else ""
        (self.folder / f"{host}.sh").write_text(f"""set -e
            hostname {host}
            cd {self.folder}
            mount --bind {sys.base_prefix} python
            mount --bind {sys.prefix} venv
            mount --bind hosts /etc/hosts
            mount -t tmpfs -o mode=755 none /opt
            mkdir /opt/pretrain /opt/venv
            mount --bind venv /opt/venv
            mount --bind image /opt/pretrain
            mount -o remount,bind,ro /opt/pretrain
            mount --bind runs /opt/pretrain/runs
            {again}
            mount --bind python {sys.base_prefix}
            mount -t tmpfs -o mode=1777 none /tmp
            cd /opt/pretrain
            exec setpriv --reuid 23456 --regid 23456 --clear-groups --no-new-privs env -i "$@" """)
        environment = [f"{name}={value}" for name, value in (self.variables | variables).items()]
        unshare = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
        command = [*unshare, "bash", self.folder / f"{host}.sh", *environment, "docker/entrypoint.sh", *words]
        with (self.folder / f"{host}.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def said(self) -> str:
        return "".join(f"--- {log.name}\n{log.read_text()}" for log in sorted(self.folder.glob("*.log")))


def first_process(container: subprocess.Popen) -> psutil.Process:
    """Process 1 of a container, to which a container engine sends SIGTERM."""
    return psutil.Process(container.pid).children()[0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces with mounts of their own need root")
def test_pods_train_together_and_a_replacement_continues_for_a_pod_that_was_evicted(tmp_path):
    """The containers that launch/kubernetes.yaml describes, with the variables and names that the API gives them. What is not
    here: a network for each, and GPUs."""
    image = Image(tmp_path)
    (image.tree / "configs" / "cloud.yaml").write_text(TINY)
    (image.tree / "settings" / "mine.yaml").write_text(
        "run: {name: pods}\ntrain: {max_steps: 240}\nevaluate: {every_steps: 120}\ncheckpoint: {every_steps: 50}"
    )
    names = [f"{JOB['metadata']['name']}-{index}" for index in range(JOB["spec"]["completions"])]
    domain = f"{POD['subdomain']}.default.svc.cluster.local"
    (tmp_path / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"127.0.0.{index + 2} {name}.{domain} {name}\n" for index, name in enumerate(names))
    )
    variables = {each["name"]: each["value"] for each in CONTAINER["env"]} | {
        "PET_MASTER_PORT": str(20000 + os.getpid() % 200 * 50)
    }

    def start(index: int) -> subprocess.Popen:
        return image.start(CONTAINER["args"], names[index], JOB_COMPLETION_INDEX=str(index), **variables)

    pods = [start(0), start(1)]
    try:
        metrics, deadline = image.runs / "pods" / "metrics.jsonl", time.monotonic() + 300
        while not (metrics.exists() and '"step": 20,' in metrics.read_text()):
            assert time.monotonic() < deadline and [pod.poll() for pod in pods] == [None, None], image.said()
            time.sleep(0.05)
        first_process(pods[1]).send_signal(signal.SIGTERM)
        assert action_of(pods[1].wait(120)) == "Ignore", image.said()
        assert pods[0].poll() is None
        children = first_process(pods[0]).children(recursive=True)
        assert [each for each in children if each.status() == psutil.STATUS_ZOMBIE] == []
        pods[1] = start(1)
        assert [pod.wait(600) for pod in pods] == [0, 0], image.said()
    finally:
        for pod in pods:
            pod.kill()
    state = json.loads((image.runs / "pods" / "run_state.json").read_text())
    assert (state["saved_step"], state["attempt"]) == (240, 2) and "ranks 2 x" in image.said()
    assert metrics.stat().st_uid == 23456
