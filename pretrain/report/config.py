"""The settings of the outputs of a run. Imports no torch.

`pretrain/config.py` explains `frozen`, `guarded` and `free`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import urlsplit

from pretrain.schema import PositiveFloat, PositiveInt, Problem, free

Alarm = Literal[
    "done",
    "stopped",
    "preempted",
    "diverged",
    "budget",
    "crash_loop",
    "stall",
    "slow_rank",
    "skipped_steps",
    "mirror",
    "off_course",
]


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases; the key comes from WANDB_API_KEY or `wandb login`, never from here."""

    project: str = free("pretrain")
    """W&B project."""
    entity: str | None = free(None)
    """W&B user or team; null: your default."""
    mode: Literal["online", "offline"] = free("online")
    """offline: files only, for `wandb sync` later."""


@dataclass(frozen=True, kw_only=True)
class MlflowConfig:
    """MLflow; user, password and token come from MLFLOW_TRACKING_USERNAME, _PASSWORD and _TOKEN, never from here."""

    tracking_uri: str | None = free(None)
    """The server, such as http://host:5000, or a local store, such as sqlite:////data/mlflow.db; null: MLFLOW_TRACKING_URI."""
    experiment: str = free("pretrain")
    """MLflow experiment; created if it does not exist."""


@dataclass(frozen=True, kw_only=True)
class TrackioConfig:
    """trackio; the write token of a server comes from TRACKIO_WRITE_TOKEN, never from here."""

    project: str = free("pretrain")
    """trackio project."""
    server_url: str | None = free(None)
    """A trackio server; null: TRACKIO_SERVER_URL, else the database that `trackio show` reads (in TRACKIO_DIR)."""


@dataclass(frozen=True, kw_only=True)
class AlarmConfig:
    """Messages to people, by the webhook in PRETRAIN_ALARM_WEBHOOK (its address is a secret) and by W&B."""

    kinds: list[Alarm] = free(lambda: [kind for kind in get_args(Alarm) if kind != "done"])
    """Which alarms are sent. At the end of a run: done, stopped, preempted (status 75), diverged, budget; of the supervisor:
    crash_loop; in between: stall, slow_rank, skipped_steps, mirror, off_course (the loss leaves the band of
    evaluate.expected). []: none."""
    stall_minutes: PositiveFloat | None = free(15.0)
    """Minutes without a step, log line or validation that are a stall; null: never."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Reports and their destinations. metrics.jsonl is the source of truth; the other sinks receive copies."""

    every_steps: PositiveInt = free(10)
    """Steps between log lines."""
    sinks: list[Literal["console", "jsonl", "wandb", "tensorboard", "mlflow", "trackio"]] = free(lambda: ["console", "jsonl"])
    """Any of console, jsonl, wandb, tensorboard, mlflow, trackio."""
    peak_tflops: PositiveFloat | None = free(None)
    """Peak of the device for MFU, in TFLOP/s; null: from a table of GPUs (unknown device: no MFU)."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = free(None)
    """First and last of up to 20 steps whose trace and costliest operators go to the run's folder profile/; null: off."""
    wandb: WandbConfig = free(WandbConfig)
    """Weights & Biases settings."""
    mlflow: MlflowConfig = free(MlflowConfig)
    """MLflow settings."""
    trackio: TrackioConfig = free(TrackioConfig)
    """trackio settings."""
    alarms: AlarmConfig = free(AlarmConfig)
    """Messages to people."""


def check(log: LogConfig) -> Iterator[Problem]:
    """Refuses passwords and tokens in addresses: the settings are copied to many places."""
    addresses = (("mlflow.tracking_uri", log.mlflow.tracking_uri, "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
                 ("trackio.server_url", log.trackio.server_url, "TRACKIO_WRITE_TOKEN"))  # fmt: skip
    for key, address, variables in addresses:
        if address and address.startswith(("http://", "https://")):
            parts = urlsplit(address)
            if parts.password or parts.query:
                yield Problem(f"log.{key}", f"has a password or token, which config.yaml would show; put it into {variables}")
