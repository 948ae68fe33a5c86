"""What a run costs: the hours of its GPUs, by what they are spent on, and money; and what its checkpoints weigh.

It knows the settings of stages, and numbers of FLOPs, bytes, seconds and dollars. It imports no torch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pretrain.checkpoint.config import CheckpointConfig
from pretrain.model import flops
from pretrain.model.config import ModelConfig
from pretrain.plan.interval import Risk, Saves, best_interval, expected_seconds
from pretrain.plan.scaling import Cluster
from pretrain.stages import Stage, tokens_per_step

TOKENS_PER_PARAMETER = 20
"""About the number with the smallest loss for given FLOPs (Hoffmann et al. 2022, "Training Compute-Optimal Large Language
Models", table 3)."""
HOST_GB_PER_SECOND = 10.0
"""Assumed: from a GPU to the memory of its host, all GPUs of a node at the same time; a third of PCIe 4 x16."""
VALIDATION_FLOPS = 1 / 3
"""Of a training token's: the forward pass alone."""


class Length(NamedTuple):
    """What a run computes."""

    steps: int
    tokens: int
    """Fed to the model in training."""
    flops: float
    """Of training, without recomputation."""
    validation_tokens: int | None
    """In validations; None: unknown before the data is opened."""


def length_of(every: list[Stage], model: ModelConfig, steps: int) -> Length:
    """What a run of these stages and so many steps in all computes. model: resolved."""
    config = every[0].config  # validations are the same in all of them
    ends = [*(stage.step for stage in every[1:]), steps]
    tokens, computed = 0, 0.0
    for stage, end in zip(every, ends, strict=True):
        of_stage = (end - stage.step) * tokens_per_step(stage.config)
        tokens += of_stage
        computed += of_stage * flops.flops_per_token(model, stage.config.data.sequence_length)
    evaluated = None
    if not config.data.valid and not config.data.synthetic:
        evaluated = 0
    elif config.evaluate.max_batches:
        times = 1 + ((steps - 1) // config.evaluate.every_steps if config.evaluate.every_steps else 0)
        samples = config.evaluate.max_batches * config.batch.global_batch_size
        evaluated = times * samples * config.data.sequence_length
    return Length(steps, tokens, computed, evaluated)


def training_seconds(length: Length, cluster: Cluster, mfu: float) -> float:
    """Seconds of a run's training at this MFU."""
    return length.flops / (cluster.gpus * cluster.device.bf16_tflops * 1e12 * mfu)


def checkpoint_bytes(model: ModelConfig, optimizer: str = "adamw", averages: int = 0) -> int:
    """Bytes of the weights and moments in a checkpoint: 12 per parameter; of the matrices in the blocks under Muon, 8. Each of
    the averages adds 4."""
    counts, width = flops.num_parameters(model), model.hidden_size
    norms = counts.undivided - (model.num_hidden_layers * width * model.moe.num_experts if model.moe else 0)
    outside = counts.embedding * (1 if model.tie_word_embeddings else 2) + norms
    one_moment = counts.total - outside if optimizer == "muon" else 0
    return flops.state_bytes(model) + 4 * averages * counts.total - 4 * one_moment


def saves(size: int, gpus: int, store_gb_per_second: float, config: CheckpointConfig) -> Saves:
    """What a save of `size` bytes takes if each GPU copies an equal share to its host, and all of them write to one disk. Then
    rank 0 uploads it, if there is a mirror, no faster."""
    written = size / (store_gb_per_second * 1e9)
    limit = 1e6 * config.mirror_mb_per_second
    uploaded = (max(written, size / limit) if limit else written) if config.mirror else 0.0
    copied = size / gpus / (HOST_GB_PER_SECOND * 1e9)
    return Saves(copied, written + uploaded) if config.asynchronous else Saves(written, uploaded)


class Cost(NamedTuple):
    """Expected seconds of a run, by what they are spent on, and their price."""

    training: float
    validation: float
    saving: float
    """In which training waits for saves."""
    interruptions: float
    """Lost work, and restarts; with the first start."""
    gpus: int
    dollars_per_hour: float | None
    """Of one GPU; None: unknown."""

    @property
    def seconds(self) -> float:
        """From the first start to the end."""
        return sum(self[:4])

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs."""
        return self.seconds / 3600 * self.gpus

    @property
    def dollars(self) -> float | None:
        """The bill; None: unknown."""
        return None if self.dollars_per_hour is None else self.gpu_hours * self.dollars_per_hour


def cost(
    length: Length, cluster: Cluster, mfu: float, saved: Saves, risk: Risk, dollars_per_hour: float | None,
    interval: float | None = None,
) -> Cost:  # fmt: skip
    """The expected cost. interval: seconds of training between saves; None: the best one."""
    training = training_seconds(length, cluster, mfu)
    validation = training * VALIDATION_FLOPS * (length.validation_tokens or 0) / length.tokens
    work = training + validation
    interval = min(best_interval(saved, risk) if interval is None else interval, work)
    total = expected_seconds(work, interval, saved, risk)
    saving = work / interval * saved.blocked_seconds
    lost = total - work - saving + risk.restart_seconds
    return Cost(training, validation, saving, lost, cluster.gpus, dollars_per_hour)


def rounded_minutes(seconds: float) -> float:
    """An interval as people set it: two digits, at least a tenth of a minute."""
    minutes = max(seconds / 60, 0.1)
    return round(minutes, 1 - math.floor(math.log10(minutes)))
