"""The learning rate as a pure function of the step: there is no scheduler state to save or to get out of step."""

from __future__ import annotations

import math

from pretrain.config import ScheduleConfig


def lr_at(step: int, config: ScheduleConfig, peak_lr: float, total_steps: int) -> float:
    """Returns the learning rate of update `step`; the first update is step 1, the last is step total_steps.

    Warm-up rises linearly from 0 and reaches peak_lr exactly at step warmup_steps. The decay ends exactly at
    final_lr_fraction * peak_lr: wsd stays at the peak and decays linearly over the last decay_steps (None: 40 % of all steps,
    or those that follow warm-up if fewer); cosine and linear decay right after warm-up over decay_steps (None: all the rest),
    then stay at the final value. constant does not decay. Sources: Loshchilov and Hutter 2017 (cosine); Hu et al. 2024 (wsd).

    Raises ValueError if warm-up and decay together are longer than total_steps.
    """
    left = total_steps - config.warmup_steps
    if left < (config.decay_steps or 0):
        raise ValueError(
            f"schedule.warmup_steps + schedule.decay_steps = {config.warmup_steps + (config.decay_steps or 0)}, but the run "
            f"has {total_steps} steps: shorten them or train longer"
        )
    if step <= config.warmup_steps:
        return peak_lr * (step / config.warmup_steps)
    if config.name == "constant":
        return peak_lr
    if config.name == "wsd":
        decay_steps = config.decay_steps or min(max(1, round(0.4 * total_steps)), left)
        start = total_steps - decay_steps
    else:
        decay_steps, start = config.decay_steps or left, config.warmup_steps
    progress = min(max((step - start) / decay_steps, 0.0), 1.0)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.name == "cosine" else 1.0 - progress
    return peak_lr * (config.final_lr_fraction + (1.0 - config.final_lr_fraction) * remaining)
