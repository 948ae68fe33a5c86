"""The meaning of the names that training programs give to losses, steps and other figures."""

from __future__ import annotations

import re
from functools import lru_cache

_VALIDATION = {"val", "valid", "validation", "eval", "evaluation", "test", "dev", "heldout"}
_AUXILIARY = {"aux", "auxiliary", "balance", "balancing", "router", "routing", "z", "moe", "load", "lb"}
_CROSS_ENTROPY = {"lm", "ce", "nll", "xent", "cross", "entropy", "logits", "language", "model"}
_PLAIN = {"loss", "losses", "train", "training", "trn", "avg", "average", "mean", "total", "step", "steps", "batch", "epoch"}
_PLAIN |= {"running", "reduced", "inner", "iter", "current", "smooth", "smoothed", "ema", "value", "per", "token", "main"}
_PLAIN |= {"global", "stats", "metrics"}
"""Words that a name may hold beside "loss" and still mean the training loss."""
_NOT_A_LOSS = {"scale", "scaling", "scaler", "std", "var", "min", "max", "best", "delta", "time", "weight", "coef", "ppl"}
_NOT_A_LOSS |= {"timestamp"}
_NOT_A_STEP = {"time", "per", "max", "total", "warmup", "every", "elapsed", "remaining", "skipped", "loss", "nan", "number"}
_NOT_A_STEP |= {"size"}
_STEP_WORDS = {
    "step": {"step", "steps", "updates"},
    "iteration": {"iter", "iters", "iteration", "itr"},
    "batch": {"batch", "batches", "update"},
}
STEP_COUNTERS = tuple(_STEP_WORDS)
"""Meanings that count steps, the most reliable first."""


@lru_cache(maxsize=10_000)
def meaning(name: str) -> str | None:
    """The meaning of a column, key or label: step, iteration, batch, epoch, loss, lm_loss, other_loss, aux_loss, val_loss, lr,
    grad_norm, perplexity or skipped; None for anything else."""
    name = name.rpartition(" - ")[2].partition("/max_")[0]  # W&B exports put the name of the run before it
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())
    unique = set(words)
    if not words:
        return None
    if unique & {"loss", "losses", "nll", "xent"} or {"cross", "entropy"} <= unique:
        return None if unique & _NOT_A_LOSS else _kind_of_loss(unique)
    if words == ["val"]:
        return "val_loss"  # "loss train: 3.1, val: 3.2"
    if unique & {"ppl", "perplexity"}:
        return None if unique & _VALIDATION else "perplexity"
    if "lr" in unique or {"learning", "rate"} <= unique:
        return "lr"
    if unique & {"gnorm", "gradnorm"} or {"grad", "norm"} <= unique or {"gradient", "norm"} <= unique:
        return "grad_norm"
    if "skipped" in unique or {"nan", "iterations"} <= unique:
        return "skipped"
    if words[-1] == "epoch":
        return "epoch"
    if unique & _NOT_A_STEP:
        return None
    return next((counter for counter, spellings in _STEP_WORDS.items() if words[-1] in spellings), None)


def _kind_of_loss(words: set[str]) -> str:
    if words & _VALIDATION:
        return "val_loss"
    if words & _AUXILIARY:
        return "aux_loss"
    if words - _PLAIN - _CROSS_ENTROPY:
        return "other_loss"
    return "lm_loss" if words & _CROSS_ENTROPY else "loss"


def is_loss(name: str) -> bool:
    """True if `name` means a loss of any kind."""
    return (meaning(name) or "").endswith("loss")
