"""The meaning of the names that training programs give to losses, steps and other figures."""

from __future__ import annotations

import re
from functools import lru_cache

_VALIDATION = {"val", "valid", "validation", "eval", "evaluation", "test", "dev", "heldout"}
_AUXILIARY = {"aux", "auxiliary", "balance", "balancing", "router", "routing", "z", "moe", "load", "lb"}
_CROSS_ENTROPY = {"lm", "ce", "nll", "xent", "cross", "entropy", "logits", "language", "model"}
_PLAIN = {"loss", "losses", "train", "training", "trn", "avg", "average", "mean", "total", "step", "steps", "batch", "epoch"}
_PLAIN |= {"running", "reduced", "inner", "iter", "current", "smooth", "smoothed", "ema", "value", "per", "token", "main"}
_PLAIN |= {"global", "stats", "metrics", "cost"}
"""Words that a name may hold beside "loss" and still mean the training loss."""
_NOT_A_LOSS = {"scale", "scaling", "scaler", "std", "var", "min", "max", "best", "delta", "time", "weight", "coef", "ppl"}
_NOT_A_LOSS |= {"timestamp", "every", "chunk", "chunks", "type", "fn", "threshold", "tolerance"}
_SHORT = {"cost", "ce"}
_BESIDE_SHORT = {"cost", "ce", "mean", "words", "train", "training", "avg", "average"} | _VALIDATION
"""Words that alone mean a loss, and those that they may stand beside: `Cost`, `avg_cost`, but not `batch_cost`, a time."""
_NOT_A_STEP = {"time", "per", "max", "total", "warmup", "every", "elapsed", "remaining", "skipped", "loss", "nan", "number"}
_NOT_A_STEP |= {"size", "accumulation", "accum", "save", "saving", "eval", "logging", "log", "decay", "interval", "warm"}
_SETTINGS_OF_THE_LR = {"max", "min", "peak", "base", "initial", "init", "final", "end", "decay", "warmup", "scheduler", "style"}
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
    grad_norm, perplexity, val_perplexity or skipped; None for anything else."""
    name = run_and_name(name)[1].partition("/max_")[0]
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())
    if not words:
        return None
    if words[-1].endswith("loss") and words[-1] != "loss":  # trainloss, closs
        words = [*words[:-1], words[-1].removesuffix("loss"), "loss"]
    unique = set(words)
    if unique & {"ppl", "perplexity"}:
        return "val_perplexity" if unique & _VALIDATION else "perplexity"
    of_a_loss = unique & {"loss", "losses", "nll", "xent"} or {"cross", "entropy"} <= unique
    if of_a_loss or (unique & _SHORT and unique <= _BESIDE_SHORT):
        return None if unique & _NOT_A_LOSS else _kind_of_loss(unique)
    if words[0] in ("mlm", "clm") and all(len(word) == 2 for word in words[1:]):
        return "lm_loss"  # XLM: "MLM-en: 7.5"
    if words == ["val"]:
        return "val_loss"  # "loss train: 3.1, val: 3.2"
    if "lr" in unique or {"learning", "rate"} <= unique or words == ["l", "r"]:  # Marian writes "L.r."
        return None if unique & _SETTINGS_OF_THE_LR else "lr"
    gradient = unique & {"gnorm", "gradnorm"} or ("norm" in unique and unique & {"grad", "gradient", "g"})
    if gradient or words == ["norm"]:
        return "grad_norm"
    if "skipped" in unique or {"nan", "iterations"} <= unique:
        return "skipped"
    if words[-1] == "epoch" or words == ["ep"]:
        return "epoch"
    if words == ["up"]:  # Marian: "Ep. 1 : Up. 100"
        return "step"
    if unique & _NOT_A_STEP:
        return None
    return next((counter for counter, spellings in _STEP_WORDS.items() if words[-1] in spellings), None)


def run_and_name(name: str) -> tuple[str, str]:
    """(run, name) of a column: exports of W&B write "run - train/loss". The run is empty for other names."""
    run, _, plain = name.rpartition(" - ")
    return run, plain


def _kind_of_loss(words: set[str]) -> str:
    if words & _VALIDATION:
        return "val_loss"
    if words & _AUXILIARY:
        return "aux_loss"
    if words - _PLAIN - _CROSS_ENTROPY - {"words"}:
        return "other_loss"
    return "lm_loss" if words & _CROSS_ENTROPY else "loss"


def is_loss(name: str) -> bool:
    """True if `name` means a loss of any kind."""
    return (meaning(name) or "").endswith("loss")


def is_judged(name: str) -> bool:
    """True if `name` means a loss or a perplexity: the figures that a log must hold to be judged."""
    return is_loss(name) or (meaning(name) or "").endswith("perplexity")
