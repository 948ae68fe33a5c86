"""The environment of a run: environment.json in its folder, also part of the configuration that W&B gets.

    model, data   parameter and FLOP counts of the model, metadata sidecars of the data
    starts        one entry per start that made steps of this run: the step that it resumed from (0: none), number of processes,
                  device, versions, git commit, environment variables; on GPUs also driver, CUDA libraries and power limit

Knows nothing of runs: it receives facts. Secrets cannot enter, since only variables in a list of allowed names are read.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from pretrain.files import read_json_object

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = (
    "torch",
    "triton",
    "accelerate",
    "deepspeed",
    "torchao",
    "transformers",
    "numpy",
    "sentencepiece",
    "tokenizers",
    "wandb",
)
_SMI_SECONDS = 10.0
VARIABLES = (
    "ACCELERATE_MIXED_PRECISION",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING",
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
    "SLURM_CPUS_PER_TASK",
    "SLURM_JOB_ID",
    "SLURM_NNODES",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCH_EXTENSIONS_DIR",
    "TORCH_LOGS",
    "TRITON_CACHE_DIR",
    "WANDB_MODE",
    "WORLD_SIZE",
)


def here() -> dict:
    """Versions, git commit and allowed environment variables of this process."""
    versions = {}
    for name in LIBRARIES:  # asked one by one: a list of all packages would read the metadata of each
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "git": git_state(ROOT),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "command": Path(sys.argv[0]).name,
    }


def of_gpu(index: int) -> dict:
    """What figures of this process's GPU depend on: versions of CUDA, cuDNN and NCCL, driver, and power limit in watts. A value
    that is not known is missing: nvidia-smi may be absent, or hang on a machine with a broken driver."""
    import torch  # the other functions need none of it

    facts = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    if torch.distributed.is_nccl_available():
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {key: value for key, value in facts.items() if value is not None} | _smi(
        str(torch.cuda.get_device_properties(index).uuid)
    )


def _smi(uuid: str) -> dict:
    """{"driver", "power_limit_watts"}, as far as nvidia-smi knows them. By uuid: CUDA_VISIBLE_DEVICES renumbers devices."""
    query = [
        "nvidia-smi",
        f"--id=GPU-{uuid.removeprefix('GPU-')}",
        "--query-gpu=driver_version,power.limit",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
        driver, watts = (word.strip() for word in done.stdout.strip().split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}
    known = {"driver": driver}
    with contextlib.suppress(ValueError):  # "[N/A]" in some virtual machines
        known["power_limit_watts"] = float(watts)
    return known


def git_state(root: Path) -> dict | None:
    """{"commit", "dirty"} of the project's own repository; None where there is no repository, as in a container image."""
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
    """The new content of environment.json when a run starts after step start["step"]; drops starts of an abandoned branch."""
    starts = [each for each in before.get("starts", []) if each["step"] < start["step"]]
    return {**facts, "starts": [*starts, start]}


def read(directory: Path) -> dict:
    """environment.json of a run, without starts that cannot be read; empty if it is missing or unreadable."""
    content = read_json_object(directory / "environment.json")
    starts = content.get("starts")
    known = (
        [each for each in starts if isinstance(each, dict) and type(each.get("step")) is int]
        if isinstance(starts, list)
        else []
    )
    return content | {"starts": known} if content else {}


def start_of_step(environment: dict, step: int) -> dict:
    """The start that made `step`; empty if unknown."""
    return next((each for each in reversed(environment.get("starts", [])) if each["step"] < step), {})
