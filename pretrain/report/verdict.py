"""The numbers in words: what a loss means beside ln V and the entropies of the data. Knows numbers, not the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

_LEAST_LINES, _LEAST_STEPS = 8, 60  # of a curve that is judged: less may be a warm-up
_ENOUGH_LINES = 24

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
    if _is_untrained(loss, expected):
        return f"{line}: as it should be"
    ratio = loss / expected
    return f"{line}: {ratio:.2f} times that. Suspect the initialisation, the vocabulary or the labels"


def _is_untrained(loss: float, expected: float) -> bool:
    """Within 3 % of ln V, or 0.15 nats: an untrained head adds 0.08 nats for any V, and where ids are few, chance adds more."""
    return abs(loss - expected) <= max(0.03 * expected, 0.15)


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


# ---------------------------------------------------------------- a curve in one sentence


class Verdict(NamedTuple):
    """What a curve says."""

    kind: str
    """random, learned, nothing, worse, unigram, bigram, memorising, other-text, falling, level, short."""
    text: str

    @property
    def is_alarm(self) -> bool:
        """Whether something should be done."""
        return self.kind in ("nothing", "worse", "unigram", "memorising")


class Curve(NamedTuple):
    """The losses of a run, in nats per token. Values that are not finite are left out by `judge`."""

    step: np.ndarray  # (N,) logging steps
    loss: np.ndarray  # (N,)
    val_step: np.ndarray  # (M,)
    val_loss: np.ndarray  # (M,)
    passes: float = math.nan
    """How often the training data has been read, the source most often read; NaN: unknown."""


class _Trend(NamedTuple):
    """The second half of a curve."""

    level: float
    """Median of its last part."""
    drop: float
    """By how much its last part lies below the part before."""
    blur: float
    """What `drop` may be by chance."""
    scatter: float
    """Of single lines around their trend."""

    @property
    def falling(self) -> bool:
        """Beyond chance, and fast enough to matter: it would fall by a hundredth in five times this run."""
        return self.drop > max(self.blur, 0.002 * self.level)

    @property
    def flat(self) -> bool:
        """Known to fall by no more than a hundredth; where lines jump too much, neither holds."""
        return not self.falling and self.drop + self.blur < 0.012 * self.level


def judge(curve: Curve, lines: Mapping[str, float]) -> Verdict:
    """One sentence on where a run stands, from its curve and the levels of its data (`lines`: nats by name).

    A stall is only called one where the second half of the curve is known to be flat: a run that still falls is told so. Where
    the data itself is random, or learned to its floor, a flat curve is right.
    """
    uniform, floor = lines["uniform"], lines.get("floor")
    loss = curve.loss[np.isfinite(curve.loss)]
    known = np.isfinite(curve.val_loss)
    curve = curve._replace(val_step=curve.val_step[known], val_loss=curve.val_loss[known])
    if not len(loss):
        return Verdict("short", "no line has a finite loss")
    trend = _trend(loss)
    judged, name = (float(curve.val_loss[-1]), "validation") if known.any() else (trend.level, "training")
    share = f"{name} loss {judged:.3f} nats per token = {judged / uniform:.0%} of ln(vocabulary) = {uniform:.3f}"
    if memorised := _memorising(curve, trend):
        return Verdict(memorised[0], f"{share}. {memorised[1]}")
    if floor is not None and judged < floor + 0.03 * max(1.0, floor):
        if floor > 0.99 * uniform:
            return Verdict("random", f"{share}. This data is random: no token can be predicted, so ln(vocabulary) is its floor")
        return Verdict(
            "learned", f"{share}. The floor of this data is {floor:.3f}: the model has learned all there is to learn"
        )
    if trend.level > 1.06 * uniform:
        text = "That is worse than guessing: it has diverged, the learning rate is too high, or the vocabulary is another one"
        return Verdict("worse", f"{share}. {text}")
    far, few = _beyond(judged, lines), len(loss) < _LEAST_LINES or curve.step[-1] < _LEAST_STEPS
    val_drop = _val_drop(curve)
    by_heart = trend.falling and val_drop < 0.004 * judged  # training falls and validation does not: that is no progress
    falling = not by_heart and (trend.falling or val_drop > 0.01 * judged)
    flat = not falling and (by_heart or trend.flat or abs(val_drop) < 0.01 * judged)
    if not few and (stalled := _stall(judged if by_heart else trend.level, falling, flat, lines)):
        return Verdict(stalled[0], f"{share}. {stalled[1]}")
    if few:
        return Verdict("short", f"{share}{far}. The run is too short to say more: train longer")
    if falling:
        return Verdict("falling", f"{share}{far}. It is still falling: train longer")
    how = "It has levelled off" if flat else "Its lines jump too much to say whether it still falls"
    return Verdict("level", f"{share}{far}. {how}")


def _trend(loss: np.ndarray) -> _Trend:
    """Of finite losses (N,), N > 0."""
    half = loss[len(loss) // 2 :]
    before, late = half[: len(half) // 2], half[len(half) // 2 :]
    if len(before) < 2 or len(loss) < 4:
        return _Trend(float(np.median(late)), 0.0, math.inf, math.inf)
    second = loss[:-2] - 2 * loss[1:-1] + loss[2:]  # blind to any smooth trend
    scatter = 1.4826 * float(np.median(np.abs(second))) / math.sqrt(6)
    error = 1.2533 * scatter * math.sqrt(1 / len(before) + 1 / len(late))  # of a difference of two medians
    sigmas = 3 if len(loss) >= _ENOUGH_LINES else 6  # the scatter of a few lines is not well known
    return _Trend(float(np.median(late)), float(np.median(before) - np.median(late)), sigmas * error, scatter)


def _val_drop(curve: Curve) -> float:
    """By how much validation, which reads one set each time and so scatters little, fell in the second half. NaN: unknown."""
    middle = curve.step[-1] / 2
    if len(curve.val_loss) < 3 or curve.val_step[0] > middle:
        return math.nan
    return float(np.interp(middle, curve.val_step, curve.val_loss) - curve.val_loss[-1])


def memorising(curve: Curve) -> str | None:
    """A sentence where training falls and validation does not; for curves of unknown vocabulary. All values finite."""
    found = _memorising(curve, _trend(curve.loss)) if len(curve.loss) else None
    return found[1] if found and found[0] == "memorising" else None


def _memorising(curve: Curve, trend: _Trend) -> tuple[str, str] | None:
    """(kind, sentence) where training falls and validation does not."""
    if not len(curve.val_loss):
        return None
    last, best = float(curve.val_loss[-1]), int(curve.val_loss.argmin())
    gap = last - trend.level
    train = np.interp(curve.val_step, curve.step[np.isfinite(curve.loss)], _smooth(curve.loss[np.isfinite(curve.loss)]))
    fell = float(train[best] - train[-1])  # since validation was at its best
    middle = len(curve.val_loss) // 2
    # The validation of some programs draws other text each time, and scatters as lines do: it must rise twice, or by a tenth.
    rise = last - float(curve.val_loss[best])
    rose = rise > max(0.02 * last, 4 * trend.scatter) and (best < len(curve.val_loss) - 2 or rise > 0.1 * last)
    rose = rose and fell > max(0.02 * train[best], trend.scatter)
    stays = (
        len(curve.val_loss) > 3
        and curve.val_loss[middle] - last < 0.003 * last
        and train[middle] - train[-1] > 0.05 * train[middle]
        and gap > 0.1 * last
    )
    apart = len(curve.val_loss) < 3 and gap > 0.4 * last
    if not (rose or stays or apart):
        return None
    figures = f"Training fell to {trend.level:.3f}"
    if rose:
        figures += f", and validation was lowest at step {int(curve.val_step[best]):,}, {curve.val_loss[best]:.3f}"
    if curve.passes <= 1.05:
        why = "No sample was read twice: unless the data holds copies, the validation text is of another kind"
        return "other-text", f"{figures}, while validation does not fall. {why}"
    passes = "" if math.isnan(curve.passes) else f" ({curve.passes:.3g} passes over the data)"
    advice = "use more data, fewer passes or a smaller model"
    return "memorising", f"{figures}, while validation does not fall: it is memorising{passes}; {advice}"


def _smooth(loss: np.ndarray) -> np.ndarray:
    """(N,) running medians of up to five values."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(loss, 2, constant_values=np.nan), 5)
    return np.nanmedian(windows, axis=1)


def _stall(level: float, falling: bool, flat: bool, lines: Mapping[str, float]) -> tuple[str, str] | None:
    """(kind, sentence) where the curve stays at a level of the data. It may be known to fall, or to be flat, or neither."""
    uniform = lines["uniform"]
    unigram, bigram, floor = lines.get("unigram", uniform), lines.get("bigram", 0.0), lines.get("floor", uniform)
    if level > 0.985 * uniform:
        if falling and level < 0.998 * uniform:
            return None
        if min(unigram, bigram, floor) > 0.985 * uniform:
            text = "The data is random: all ids are equally frequent, and none says anything about the next"
            return "random", f"{text}: unless tokens further back tell more, nothing can be learned"
        if floor < 0.9 * uniform:
            text = f"It stays at ln(vocabulary), although this data can be learned down to {floor:.3f}: nothing is learned yet"
            return "nothing", f"{text}. Train longer, raise the learning rate, or use more layers"
        text = (
            "It stays at ln(vocabulary): the labels carry no information that the model sees. Check that they belong to their"
        )
        return "nothing", f"{text} inputs, that the data is not random, and that the learning rate is not too low"
    if not flat or unigram > 0.985 * uniform:
        return None
    if abs(level / unigram - 1) < 0.02:
        if bigram > 0.985 * unigram:
            text = (
                f"It stays at the unigram entropy, {unigram:.3f}, and so would any model: in this data no token says anything"
            )
            return "random", f"{text} about the next, as if its tokens had been shuffled"
        text = f"It stays at the unigram entropy, {unigram:.3f}: token frequencies are learned, and the context is ignored"
        return "unigram", f"{text}. Check that labels belong to their inputs, the attention mask, and the learning rate"
    if level > unigram:
        text = f"It stays above the unigram entropy, {unigram:.3f}: not even the frequencies of tokens are learned"
        return "nothing", f"{text}. Raise the learning rate, and check the labels"
    if 0 < bigram < 0.97 * unigram and abs(level / bigram - 1) < 0.02:
        text = f"It stays at the bigram level, {bigram:.3f}: about one token of context is used"
        return "bigram", f"{text}. Train longer, or use a larger model"
    return None


def _beyond(level: float, lines: Mapping[str, float]) -> str:
    """Which level of the data a loss has left behind, or where its floor is."""
    if "floor" in lines:
        return f"; the floor of this data is {lines['floor']:.3f}"
    uniform = lines["uniform"]
    if level < 0.98 * lines.get("bigram", -math.inf) < 0.98 * 0.985 * uniform:
        return f", below the bigram level {lines['bigram']:.3f}: more than one token of context is used"
    if level < 0.98 * lines.get("unigram", -math.inf) < 0.98 * 0.985 * uniform:
        return f", below the unigram entropy {lines['unigram']:.3f}: context is used"
    return ""


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
    """Why the untrained model's loss (nats per token) is not ln V, as far as figures tell; None where it is, nearly.

    Normal logits of standard deviation s that know nothing of the labels add s^2 / 2 to ln V.
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
