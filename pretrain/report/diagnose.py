"""The numbers in words: what a loss means beside ln V and the entropies of the data. Knows numbers, not the run."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

LEGEND = """What the columns mean (more: docs/understanding_the_loss.md)
  loss       nats per token of the training text since the last line, over all ranks and micro-batches; what is minimised
  grad norm  length of the gradient before clipping; sudden jumps announce trouble
  lr         learning rate of this step
  tok/s      tokens learned from per second, all ranks together; validation and saving not counted
  val loss   the same loss on text that is never trained on: the number to judge a model by"""


def first_step(loss: float, vocab_size: int, trained: bool = False) -> str:
    """The first loss beside that of a model that knows nothing. `trained`: the run began with weights that know something."""
    expected = math.log(vocab_size)
    line = f"first loss {loss:.3f}; a model that knows nothing gives ln({vocab_size}) = {expected:.3f}"
    if trained:
        return f"{line}, these weights should do better" + (": they do" if loss < 0.97 * expected else ", but do not")
    if abs(loss / expected - 1) <= 0.03:
        return f"{line}: as it should be"
    ratio = loss / expected
    return f"{line}: {ratio:.2f} times that. Suspect the initialisation, the vocabulary or the labels"


def reference_lines(lines: dict[str, float]) -> list[str]:
    """What a loss that stays at one of the data's own levels would mean. `lines`: nats by name, from the training data."""
    meaning = {
        "uniform": "ln(vocabulary): guessing. A loss that stays here: the labels carry no information",
        "unigram": "knowing only how frequent each token is. A loss that stays here: the model ignores context",
        "bigram": "knowing only the previous token. A loss that stays here: one token of context is used, not more",
        "floor": "the least that any model can reach on this generated data: a loss that stays here has learned all there is",
    }
    known = [(name, nats) for name, nats in lines.items() if name in meaning]
    return [f"  {nats:7.3f}  {meaning[name]}" for name, nats in known if not _repeats(name, nats, known)]


def _repeats(name: str, nats: float, known: list[tuple[str, float]]) -> bool:
    """Whether an entropy says no more than another line does (random data: all are ln V)."""
    others = (value for other, value in known if other in ("uniform", "floor"))
    return name in ("unigram", "bigram") and any(abs(nats - value) < 0.001 for value in others)


def last_word(loss: float, val_loss: float | None, lines: dict[str, float]) -> str:
    """One sentence on where a finished run stands."""
    uniform = lines["uniform"]
    judged, name = (loss, "training") if val_loss is None else (val_loss, "validation")
    share = f"{name} loss {judged:.3f} nats per token = {judged / uniform:.0%} of ln(vocabulary) = {uniform:.3f}"
    floor = lines.get("floor")
    if floor is not None and judged < floor + 0.02 * max(1.0, floor):
        if floor > 0.99 * uniform:
            return f"{share}. This data is random: no token can be predicted, so ln(vocabulary) is its floor"
        return f"{share}. The floor of this data is {floor:.3f}: the model has learned all there is to learn"
    if judged > 0.97 * uniform:
        return f"{share}. Nothing was learned: check the labels, the learning rate, and whether the data is random"
    if "unigram" in lines and judged > 0.97 * lines["unigram"]:
        return f"{share}. Little more than token frequencies ({lines['unigram']:.3f}) was learned: train longer, or raise lr"
    if val_loss is not None and val_loss > 1.15 * loss:
        return f"{share}, but the training loss is {loss:.3f}: it is memorising; use more data or a smaller model"
    return f"{share}. The model predicts far better than token frequencies alone would"


# ---------------------------------------------------------------- an untrained model on real batches


def label_problem(tokens_BT: np.ndarray, labels_BT: np.ndarray) -> str | None:
    """What is wrong with the shift of the labels; None where each is the token after its input. Labels of -100 do not count."""
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
        meaning = {0: "the input itself, so not shifted", 2: "two tokens on, so shifted twice", -1: "the token before"}
        return f"labels are {meaning.get(best, 'not always the next token')} ({agree[best]:.1%} agree)"
    return f"only {agree[1]:.1%} of the labels are the token after their input"


def initial_problem(loss: float, vocab_size: int, embedding_rows: int, logit_std: float) -> str | None:
    """Why the untrained model's loss (nats per token) is not ln V, as far as figures tell; None where it is, within 3 %.

    Normal logits of standard deviation s that know nothing of the labels add s^2 / 2 to ln V.
    """
    expected = math.log(vocab_size)
    excess = loss - expected
    if abs(excess) <= 0.03 * expected:
        return None
    line = f"the untrained model's loss is {loss:.3f}, {loss / expected:.2f} times ln({vocab_size}) = {expected:.3f}"
    if embedding_rows > vocab_size and abs(loss - math.log(embedding_rows)) < 0.2 * abs(excess):
        return f"{line}, but ln({embedding_rows}) = {math.log(embedding_rows):.3f}: padded ids take part in the softmax"
    if excess > 0 and logit_std**2 / 2 > 0.5 * excess:
        return f"{line}: the logits spread by s = {logit_std:.2f}, which adds s^2 / 2; the head's initial weights are too large"
    if excess < 0:
        return f"{line}: the model knows something of its labels; they stand in its input, or few ids are used"
    return f"{line}, and its logits do not explain that (s = {logit_std:.2f}): suspect the labels, the mask or the vocabulary"


def uneven_problems(what: str, nats: Mapping[str, float], errors: Mapping[str, float], vocab_size: int) -> list[str]:
    """Groups of tokens (position blocks, sources) whose untrained loss differs from the others', beyond chance and 2 % of ln V.

    errors: standard error of each mean.
    """
    middle = float(np.median(list(nats.values())))
    least = 0.02 * math.log(vocab_size)
    return [
        f"{what} {name}: {value:.3f} nats, the others about {middle:.3f}; an untrained model is equally ignorant everywhere"
        for name, value in nats.items()
        if abs(value - middle) > max(least, 5 * errors[name])
    ]
