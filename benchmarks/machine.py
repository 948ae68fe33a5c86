"""What a benchmark ran on, for its JSON: device, CPU, cores, load, versions, commit. Peak memory of a process."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from pretrain.report import environment


def facts() -> dict:
    """Device, CPU, cores, threads of torch, load of the last minute, Python, versions, git commit, environment variables."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        **environment.here(),
    }


def describe(found: dict) -> str:
    """One line for the head of a table."""
    commit = (found["git"] or {}).get("commit", "none")[:10]
    device = "" if found["device"] == "cpu" else f"{found['device']}, "
    torch_version = found["versions"]["torch"]
    return f"{device}{found['cpu']}, {found['cores']} cores, {found['cpu_capability']}, torch {torch_version}, commit {commit}"


def cpu_name() -> str:
    """The model name of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def resident_bytes(peak: bool) -> int:
    """Resident bytes of this process now, or their peak since its start or since `forget_peak` (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0])


def forget_peak() -> None:
    """Makes the peak of the resident set count from now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
