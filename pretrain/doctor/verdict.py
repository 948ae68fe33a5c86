"""Judges a loss curve in one sentence by the reference losses of its data: ln V, entropies, floor. Knows numbers, not runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from pretrain.doctor.noise import line_noise

_LEAST_LINES, _LEAST_STEPS = 8, 60  # a shorter curve may be a warm-up and is not judged
_ENOUGH_LINES = 24


def reference_lines(lines: dict[str, float]) -> list[str]:
    """One line of text per reference loss: the meaning of a loss that stays there. `lines`: nats by name."""
    meaning = {
        "uniform": "ln(vocabulary): guessing. A loss that stays here: the labels carry no information",
        "unigram": "knowing only how frequent each token is. A loss that stays here: the model ignores context",
        "bigram": "knowing only the previous token. A loss that stays here: one token of context is used, not more",
        "floor": "the least that any model can reach on this generated data: a loss that stays here has learned all there is",
    }
    known = [(name, nats) for name, nats in lines.items() if name in meaning]
    return [f"  {nats:7.3f}  {meaning[name]}" for name, nats in known if not _repeats(name, nats, known)]


def _repeats(name: str, nats: float, known: list[tuple[str, float]]) -> bool:
    """True if an entropy equals another reference loss, so that it adds nothing (for random data, all are ln V)."""
    others = (value for other, value in known if other in ("uniform", "floor"))
    return name in ("unigram", "bigram") and any(abs(nats - value) < 0.001 for value in others)


# ---------------------------------------------------------------- a curve in one sentence


class Verdict(NamedTuple):
    """The judgment of a curve."""

    kind: str
    """random, learned, nothing, worse, unigram, bigram, memorising, other-text, falling, level, short."""
    text: str

    @property
    def is_alarm(self) -> bool:
        """True if the user should act."""
        return self.kind in ("nothing", "worse", "unigram", "memorising")


class Curve(NamedTuple):
    """The losses of a run, in nats per token. `judge` ignores values that are not finite."""

    step: np.ndarray  # (N,) logging steps
    loss: np.ndarray  # (N,)
    val_step: np.ndarray  # (M,)
    val_loss: np.ndarray  # (M,)
    passes: float = math.nan
    """Epochs of the source that was read most often; NaN: unknown."""


class _Trend(NamedTuple):
    """The second half of a curve."""

    level: float
    """Median of its last part."""
    drop: float
    """Median of the part before the last one, minus `level`."""
    blur: float
    """The largest `drop` that may be chance."""
    scatter: float
    """Standard deviation of single lines around their trend."""

    @property
    def falling(self) -> bool:
        """True if it falls beyond chance, and fast enough to matter: by 1 % in a run five times as long."""
        return self.drop > max(self.blur, 0.002 * self.level)

    @property
    def flat(self) -> bool:
        """True if it certainly falls by at most about 1 %. Neither flat nor falling: the lines scatter too much to tell."""
        return not self.falling and self.drop + self.blur < 0.012 * self.level


def judge(curve: Curve, lines: Mapping[str, float]) -> Verdict:
    """The verdict on a curve; `lines`: the reference losses of its data, nats by name, at least `uniform`.

    A curve counts as stalled only if its second half is certainly flat. A flat curve is right if the data is random, or if the
    model has reached the floor of the data.
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
    if found := _memorising(curve, trend):
        return Verdict(found[0], f"{share}. {found[1]}")
    if floor is not None and judged < floor + 0.03 * max(1.0, floor):
        if floor > 0.99 * uniform:
            return Verdict("random", f"{share}. This data is random: no token can be predicted, so ln(vocabulary) is its floor")
        text = f"The floor of this data is {floor:.3f}: the model has learned all there is to learn"
        return Verdict("learned", f"{share}. {text}")
    if trend.level > 1.06 * uniform:
        text = "That is worse than guessing: it has diverged, the learning rate is too high, or the vocabulary is different"
        return Verdict("worse", f"{share}. {text}")
    far, few = _beyond(judged, lines), len(loss) < _LEAST_LINES or curve.step[-1] < _LEAST_STEPS
    val_drop = _val_drop(curve)
    memorised = trend.falling and val_drop < 0.004 * judged  # training falls and validation does not: no progress
    falling = not memorised and (trend.falling or val_drop > 0.01 * judged)
    flat = not falling and (memorised or trend.flat or abs(val_drop) < 0.01 * judged)
    if not few and (stalled := _stall(judged if memorised else trend.level, falling, flat, lines)):
        return Verdict(stalled[0], f"{share}. {stalled[1]}")
    if few:
        return Verdict("short", f"{share}{far}. The run is too short to say more: train longer")
    if falling:
        return Verdict("falling", f"{share}{far}. It is still falling: train longer")
    how = "It has levelled off" if flat else "Its lines scatter too much to say whether it still falls"
    return Verdict("level", f"{share}{far}. {how}")


def _trend(loss: np.ndarray) -> _Trend:
    """The trend of finite losses (N,), N > 0."""
    half = loss[len(loss) // 2 :]
    before, late = half[: len(half) // 2], half[len(half) // 2 :]
    if len(before) < 2 or len(loss) < 4:
        return _Trend(float(np.median(late)), 0.0, math.inf, math.inf)
    scatter = line_noise(loss, math.inf)
    error = 1.2533 * scatter * math.sqrt(1 / len(before) + 1 / len(late))  # of a difference of two medians
    sigmas = 3 if len(loss) >= _ENOUGH_LINES else 6  # few lines give only a rough estimate of the scatter
    return _Trend(float(np.median(late)), float(np.median(before) - np.median(late)), sigmas * error, scatter)


def _val_drop(curve: Curve) -> float:
    """The fall of the validation loss in the second half of the run; NaN: unknown. It scatters little, as its text is fixed."""
    middle = curve.step[-1] / 2
    if len(curve.val_loss) < 3 or curve.val_step[0] > middle:
        return math.nan
    return float(np.interp(middle, curve.val_step, curve.val_loss) - curve.val_loss[-1])


def memorising(curve: Curve) -> str | None:
    """A sentence if training falls and validation does not, for a curve of unknown vocabulary with finite values; else None."""
    found = _memorising(curve, _trend(curve.loss)) if len(curve.loss) else None
    return found[1] if found and found[0] == "memorising" else None


def _memorising(curve: Curve, trend: _Trend) -> tuple[str, str] | None:
    """(kind, sentence) if training falls and validation does not; else None."""
    if not len(curve.val_loss):
        return None
    last, best = float(curve.val_loss[-1]), int(curve.val_loss.argmin())
    gap = last - trend.level
    train = np.interp(curve.val_step, curve.step[np.isfinite(curve.loss)], _smooth(curve.loss[np.isfinite(curve.loss)]))
    fell = float(train[best] - train[-1])  # since validation was at its best
    middle = len(curve.val_loss) // 2
    # Some programs validate on new text each time, so their validation scatters like lines: demand two rises, or one by 10 %.
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
        why = "No sample was read twice: unless the data holds duplicates, the validation text is of a different kind"
        return "other-text", f"{figures}, while validation does not fall. {why}"
    passes = "" if math.isnan(curve.passes) else f" ({curve.passes:.3g} passes over the data)"
    advice = "use more data, fewer passes or a smaller model"
    return "memorising", f"{figures}, while validation does not fall: it is memorising{passes}; {advice}"


def _smooth(loss: np.ndarray) -> np.ndarray:
    """(N,) running medians of up to five values."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(loss, 2, constant_values=np.nan), 5)
    return np.nanmedian(windows, axis=1)


def _stall(level: float, falling: bool, flat: bool, lines: Mapping[str, float]) -> tuple[str, str] | None:
    """(kind, sentence) if the curve stays at a reference loss; else None. `falling` and `flat` may both be False: uncertain."""
    uniform = lines["uniform"]
    unigram, bigram, floor = lines.get("unigram", uniform), lines.get("bigram", 0.0), lines.get("floor", uniform)
    if level > 0.985 * uniform:
        if falling and level < 0.998 * uniform:
            return None
        if min(unigram, bigram, floor) > 0.985 * uniform:
            text = "The data is random: all ids are equally frequent, and none says anything about the next one"
            return "random", f"{text}: unless earlier tokens say more, nothing can be learned"
        if floor < 0.9 * uniform:
            text = f"It stays at ln(vocabulary), although this data can be learned down to {floor:.3f}: nothing is learned yet"
            return "nothing", f"{text}. Train longer, raise the learning rate, or use more layers"
        text = "It stays at ln(vocabulary): the labels carry no information that the model sees. Check that labels belong"
        return "nothing", f"{text} to their inputs, that the data is not random, and that the learning rate is not too low"
    if not flat or unigram > 0.985 * uniform:
        return None
    if abs(level / unigram - 1) < 0.02:
        if bigram > 0.985 * unigram:
            text = f"It stays at the unigram entropy, {unigram:.3f}, as any model would: in this data no token says anything"
            return "random", f"{text} about the next, as if its tokens had been shuffled"
        text = f"It stays at the unigram entropy, {unigram:.3f}: token frequencies are learned, and the context is ignored"
        return "unigram", f"{text}. Check that labels belong to their inputs, the attention mask, and the learning rate"
    if level > unigram:
        text = f"It stays above the unigram entropy, {unigram:.3f}: not even token frequencies are learned"
        return "nothing", f"{text}. Raise the learning rate, and check the labels"
    if 0 < bigram < 0.97 * unigram and abs(level / bigram - 1) < 0.02:
        text = f"It stays at the bigram level, {bigram:.3f}: about one token of context is used"
        return "bigram", f"{text}. Train longer, or use a larger model"
    return None


def _beyond(level: float, lines: Mapping[str, float]) -> str:
    """A clause about the lowest reference loss that a loss has passed, or about the floor of the data; may be empty."""
    if "floor" in lines:
        return f"; the floor of this data is {lines['floor']:.3f}"
    uniform = lines["uniform"]
    if level < 0.98 * lines.get("bigram", -math.inf) < 0.98 * 0.985 * uniform:
        return f", below the bigram level {lines['bigram']:.3f}: more than one token of context is used"
    if level < 0.98 * lines.get("unigram", -math.inf) < 0.98 * 0.985 * uniform:
        return f", below the unigram entropy {lines['unigram']:.3f}: context is used"
    return ""
