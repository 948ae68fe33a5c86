"""The settings of saving, keeping and resuming. Imports no torch.

`pretrain/config.py` explains `frozen`, `guarded` and `free`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.schema import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, free


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving, keeping and resuming."""

    every_steps: NonNegativeInt = free(0)
    """Steps between checkpoints; there is always one at the end. 0: only at the end."""
    every_minutes: NonNegativeFloat = free(0)
    """Minutes between checkpoints. 0: off."""
    keep_last: PositiveInt = free(2)
    """Number of newest checkpoints to keep."""
    keep_best: NonNegativeInt = free(1)
    """Number of checkpoints to keep for the lowest validation loss. 0: off."""
    asynchronous: bool = free(True)
    """Write in the background, at the cost of host memory for one copy of each rank's share of the state. false: training waits
    for the disk."""
    deadline_seconds: PositiveFloat = free(25.0)
    """Time from SIGTERM to a durable checkpoint; a rank without one by then exits, because a peer has exited. Launchers kill
    after 30."""
    resume: str = free("auto")
    """auto: the newest valid checkpoint of this run, else a fresh start; never: refuse a run directory that has checkpoints; or
    the path of a checkpoint: of this run, to return to it, or of another, to start from it. Once the run has saved a checkpoint
    since then, the same command resumes from that."""
    mirror: str | None = free(None)
    """A place that outlives the machine, as a URL such as s3://bucket/folder: checkpoints and records are uploaded there in the
    background, below run.name, and a start whose own checkpoints are older, or lost, resumes from it. null: off."""
    mirror_mb_per_second: NonNegativeFloat = free(0)
    """Most megabytes per second that are uploaded to the mirror. 0: no limit."""
    allow_changes: list[str] = free(list)
    """Guarded keys that may differ from the checkpoint's, e.g. [train.max_steps, optimizer.lr]; empty: none."""
