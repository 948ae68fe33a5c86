"""Finds why an untrained model's loss is not ln V: its labels, its head, or some of its tokens. Knows numbers only."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np


def first_step(loss: float, vocab_size: int, trained: bool = False) -> str:
    """One line that compares the loss of step 1 (nats per token) with ln V. `trained`: the run started from trained weights."""
    expected = math.log(vocab_size)
    line = f"first loss {loss:.3f}; expected for an untrained model: ln({vocab_size}) = {expected:.3f}"
    if trained:
        return f"{line}; trained weights should do better" + (", and do" if loss < 0.97 * expected else ", but these do not")
    if _is_untrained(loss, expected):
        return f"{line}; OK"
    ratio = loss / expected
    return f"{line}; it is {ratio:.2f} times that: suspect the initial weights, the vocabulary or the labels"


def _is_untrained(loss: float, expected: float) -> bool:
    """True within 3 % of ln V, or 0.15 nats: an untrained head adds 0.08 nats for any V, and for few ids chance adds more."""
    return abs(loss - expected) <= max(0.03 * expected, 0.15)


def label_problem(tokens_BT: np.ndarray, labels_BT: np.ndarray) -> str | None:
    """The mistake in the shift of labels (B, T); None if each is the token after its input. Labels of -100 are ignored."""
    if (labels_BT == -100).all():
        return None
    length = tokens_BT.shape[1]
    agree = {}
    for offset in (1, 0, 2, -1):
        first, last = max(0, -offset), min(length, length - offset)
        labels, tokens = labels_BT[:, first:last], tokens_BT[:, first + offset : last + offset]
        agree[offset] = float(np.mean(labels[labels != -100] == tokens[labels != -100])) if (labels != -100).any() else 0.0
    best = max(agree, key=agree.__getitem__)  # the first of equals: repeated tokens agree everywhere, and 1 is right
    if best == 1 and agree[1] > 0.999:
        return None
    if agree[best] > 0.99:
        meaning = {0: "the input itself, so not shifted", 2: "the token after next, so shifted twice", -1: "the token before"}
        return f"labels are {meaning.get(best, 'not always the next token')} ({agree[best]:.1%} agree)"
    return f"only {agree[1]:.1%} of the labels are the token after their input"


def id_problem(tokens_BT: np.ndarray, labels_BT: np.ndarray, vocab_size: int) -> str | None:
    """The first input or label (B, T) that no embedding row stands for; None if there is none. Labels of -100 are ignored."""
    for kind, ids_BT in (("input", tokens_BT), ("label", labels_BT)):
        outside_BT = (ids_BT < 0) | (ids_BT >= vocab_size)
        if kind == "label":
            outside_BT &= labels_BT != -100
        if outside_BT.any():
            sample, position = np.argwhere(outside_BT)[0].tolist()
            first = f"the first is {ids_BT[sample, position]:,}, at position {position:,} of sample {sample:,} of the batch"
            allowed = f"the model has ids 0 to {vocab_size - 1:,}"
            return f"{outside_BT.sum():,} of {ids_BT.size:,} {kind} ids are outside the vocabulary: {first}; {allowed}"
    return None


def initial_problem(loss: float, vocab_size: int, embedding_rows: int, logit_std: float) -> str | None:
    """The likely cause of an untrained loss (nats per token) that is not about ln V; None if it is.

    Normally distributed logits of standard deviation s, independent of the labels, add s^2 / 2 to ln V.
    """
    expected = math.log(vocab_size)
    excess = loss - expected
    if _is_untrained(loss, expected):
        return None
    line = f"the untrained model's loss is {loss:.3f}, {loss / expected:.2f} times ln({vocab_size}) = {expected:.3f}"
    if embedding_rows > vocab_size and abs(loss - math.log(embedding_rows)) < 0.2 * abs(excess):
        return f"{line}, but ln({embedding_rows}) = {math.log(embedding_rows):.3f}: padded ids take part in the softmax"
    if excess > 0 and logit_std**2 / 2 > 0.5 * excess:
        return f"{line}: the logits spread by s = {logit_std:.2f}, which adds s^2 / 2; the head's initial weights are too large"
    if excess < 0:
        return f"{line}: the model knows something about its labels: its input contains them, or few ids are used"
    return f"{line}, and its logits do not explain that (s = {logit_std:.2f}): suspect the labels, the mask or the vocabulary"


def uneven_problems(what: str, nats: Mapping[str, float], errors: Mapping[str, float], vocab_size: int) -> list[str]:
    """One sentence per group of tokens whose untrained loss differs from the others' by more than chance and 2 % of ln V.

    what: the kind of group, e.g. `source`; nats: mean loss by group; errors: standard error of each mean.
    """
    middle = float(np.median(list(nats.values())))
    least = 0.02 * math.log(vocab_size)
    return [
        f"{what} {name}: {value:.3f} nats, the others about {middle:.3f}; an untrained model knows equally little about all"
        for name, value in nats.items()
        if abs(value - middle) > max(least, 5 * errors[name])
    ]
