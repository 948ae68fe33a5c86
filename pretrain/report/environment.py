"""What a run was made with, apart from its settings: environment.json in its folder, and W&B's configuration.

    model, data   the arithmetic of the model, and what the seals say about the data
    starts        one entry for each start that steps of this run come from: the step that it went on after, processes, device,
                  versions, git commit, and variables of the environment, by a list of allowed names: never a secret

Knows no run: it is handed facts. Secrets cannot enter: a variable that is not in the list is not looked at.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "accelerate", "deepspeed", "transformers", "numpy", "sentencepiece", "tokenizers", "wandb")
VARIABLES = (
    "ACCELERATE_MIXED_PRECISION",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "LOCAL_WORLD_SIZE",
    "MKL_NUM_THREADS",
    "NCCL_ALGO",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_P2P_DISABLE",
    "NCCL_PROTO",
    "NCCL_SOCKET_IFNAME",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "PYTHONHASHSEED",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "SLURM_JOB_ID",
    "SLURM_NNODES",
    "TORCH_EXTENSIONS_DIR",
    "TORCH_LOGS",
    "WANDB_MODE",
    "WORLD_SIZE",
)


def here() -> dict:
    """Versions, git commit and allowed variables of this process."""
    installed = {distribution.name.lower() for distribution in metadata.distributions()}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: metadata.version(name) for name in LIBRARIES if name in installed},
        "git": git_state(ROOT),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "command": Path(sys.argv[0]).name,
    }


def git_state(root: Path) -> dict | None:
    """{"commit", "dirty"} of the project's own repository; None where there is none, as in an image."""
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def with_start(before: dict, facts: dict, start: dict) -> dict:
    """environment.json after a start that goes on after step start["step"]; starts of an abandoned branch go."""
    starts = [each for each in before.get("starts", []) if each["step"] < start["step"]]
    return {**facts, "starts": [*starts, start]}


def read(directory: Path) -> dict:
    """environment.json of a run; empty where there is none that can be read."""
    try:
        content = json.loads((directory / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def start_of_step(environment: dict, step: int) -> dict:
    """The start that made `step`; empty: unknown."""
    return next((each for each in reversed(environment.get("starts", [])) if each["step"] < step), {})
