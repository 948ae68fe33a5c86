"""No secret in the environment of a run is written to any of its files, even if it crashes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from tests.test_train import ROOT, TINY

SECRETS = {
    "WANDB_API_KEY": "c0ffee" * 6 + "c0ff",
    "HF_TOKEN": "hf_canaryCanaryCanaryCanary",
    "AWS_SECRET_ACCESS_KEY": "canary/aws/wJalrXUtnFEMIK7MDENG",
    "OPENAI_API_KEY": "sk-canary-0123456789abcdef",
    "GITHUB_TOKEN": "ghp_canary0123456789",
    "PRETRAIN_ALARM_WEBHOOK": "http://localhost:9/services/canaryhook",
    "HTTPS_PROXY": "http://user:canarypassword@localhost:9",
}
CRASH = """
import runpy, sys
sys.argv = sys.argv[1:]
import pretrain.train
def fail(*_): raise RuntimeError("planted")
pretrain.train._advance = fail
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("crash", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_secret_of_the_environment_reaches_a_file_or_the_terminal(tmp_path, crash):
    (tmp_path / "tiny.yaml").write_text(TINY.replace("[console, jsonl]", "[console, jsonl, wandb, tensorboard]"))
    command = [sys.executable, *(["-c", CRASH] if crash else []), "launch/pretrain.py", "--config", str(tmp_path / "tiny.yaml")]
    flags = ["--run.directory", str(tmp_path / "runs"), "--log.wandb.mode", "offline"]
    variables = {name: value for name, value in os.environ.items() if name != "CI"}
    variables |= SECRETS | {"WANDB_DIR": str(tmp_path), "WANDB_DEBUG": "true", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run([*command, *flags], cwd=ROOT, env=variables, capture_output=True, timeout=150, check=False)
    assert done.returncode == int(crash), done.stderr.decode()
    assert (b"planted" in done.stderr) == crash
    written = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    written["the terminal"] = done.stdout + done.stderr
    assert any(path.endswith("environment.json") for path in written) and any(path.endswith(".wandb") for path in written)
    for name, secret in SECRETS.items():
        found = [path for path, content in written.items() if secret.encode() in content]
        assert not found, f"{name} is in {found}"
    assert stat.S_IMODE((tmp_path / "runs" / "tiny").stat().st_mode) == 0o700
