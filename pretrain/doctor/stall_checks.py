"""Checks of a log for a loss that does not move, and for the learning rate on its lines that explains why."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from pretrain.doctor.diagnosis import Diagnosis, LogFinding
from pretrain.doctor.noise import line_noise
from pretrain.doctor.scale import KNOWN_VOCABULARIES, LARGEST_LN_V
from pretrain.doctor.training_log import TrainingLog

CONTEXT = "Shuffled labels look like this; so do attention that sees nothing, and a learning rate far too low or too high."
_NOTHING_LEARNED = "labels that do not follow from the tokens (random data, another sample), or weights that do not move"
_UNMOVED = (
    "Check that optimizer.step runs, that the optimizer has the model's parameters, that they require gradients, and the "
    "learning rate; the same samples give the same loss only if no weight moves."
)
_TOO_LOW, _TOO_HIGH = 1e-7, 0.03
"""Learning rates with which hardly any language model trains; only a loss that does not move makes them findings."""


# ---------------------------------------------------------------- the same values again and again


def check_frozen(result: Diagnosis) -> Iterator[LogFinding]:
    """A loss that repeats to the last digit, on every line or in every epoch: no weight moves."""
    log, curve = result.log, result.curve
    certainty, cause = "very likely", _because(log)
    if lines := _constant_end(curve.loss):
        begin = f"{log.unit} {curve.steps[-lines]:g}"
        text = f"the loss is {curve.loss[-1]:.6g}, to the last digit, on all {lines} lines from {begin} to {curve.steps[-1]:g}"
        certainty = certainty if lines >= 8 else "likely" if lines >= 5 else "possible"
    elif len(curve.loss) >= 8 and _digits(curve.loss) >= 3 and (period := _period(curve.loss)):
        text = f"the loss repeats to the last digit every {period} lines, as if each epoch saw the same weights"
    else:
        return
    yield LogFinding("frozen", certainty, f"{text}: the weights do not move{cause}", _UNMOVED, _lr_cause(log))


def _digits(loss: np.ndarray) -> int:
    """Significant digits of the losses as written: 6 for 10.8259, 1 for 0.0001."""
    decimals = max((len(f"{value:.6f}".rstrip("0").partition(".")[2]) for value in np.unique(loss)[:200]), default=0)
    return len(str(int(float(np.median(loss)) * 10**decimals)))


def _constant_end(loss: np.ndarray) -> int:
    """The number of equal lines at the end if there are too many for chance; else 0. Few digits agree by chance."""
    other = np.flatnonzero(loss != loss[-1])
    lines, digits = len(loss) - (int(other[-1]) + 1 if len(other) else 0), _digits(loss)
    if lines == len(loss):  # a log that never moves
        return lines if digits >= 3 and lines >= (2 if digits >= 6 else 5 if loss[0] > 4 or digits >= 4 else 30) else 0
    return lines if digits >= 3 and lines >= max(8 if digits >= 4 else 30, 0.1 * len(loss)) else 0


def _period(loss: np.ndarray) -> int:
    """The number of lines after which the losses repeat exactly, up to the last line; 0 if they do not."""
    for anchor in (len(loss) - 1, len(loss) - 2, len(loss) // 2):  # a line may be missing where an epoch ends
        earlier = np.flatnonzero(loss[: anchor - 1] == loss[anchor])[::-1][:200]
        for period in (anchor - earlier).tolist():
            again = loss[period:] == loss[:-period]
            if len(again) >= 6 and np.mean(again[-max(2 * period, 6) :]) > 0.9 and len(np.unique(loss[-period:])) >= 3:
                return period
    return 0


# ---------------------------------------------------------------- the learning rate


def lr_remark(log: TrainingLog) -> str:
    """What is wrong with the learning rates on the lines of a log whose loss does not move, e.g. `the learning rate, 0 on every
    line`; may be empty."""
    lr = _learning_rates(log)
    if not len(lr):
        return ""
    top = float(lr.max())
    if top == 0:
        return "the learning rate, 0 on every line"
    if top < _TOO_LOW and not (lr[-1] == top > 1.5 * lr[0]):
        return f"the learning rate, at most {top:g} on the lines: nearly every model needs 1e-5 to 1e-2"
    if np.median(lr) >= _TOO_HIGH:
        return f"the learning rate, {float(np.median(lr)):g} on the lines: nearly every model needs 1e-5 to 1e-2"
    return ""


def check_learning_rate(result: Diagnosis) -> Iterator[LogFinding]:
    """A learning rate on the lines that is 0 for long, or with which nothing trains, over a loss that does not move."""
    log, curve, true = result.log, result.curve, result.true
    remark, named = lr_remark(log), any("lr" in finding.causes for finding in result.findings)
    if remark and not named and len(true) >= 8:
        rest = true[len(true) // 3 :]
        high = float(np.median(rest)) > (0.6 * result.setup.ln_v if result.setup.ln_v else 4)
        if is_flat(rest) and (high or np.nanmax(log.columns["lr"]) < _TOO_LOW):
            text = f"the loss stays at {float(np.median(rest)):.3f} from {log.unit} {curve.steps[len(true) // 3]:g} on"
            yield LogFinding("lr", "likely", f"{text}; the cause is probably {remark}", "Set another learning rate.", ("lr",))
    elif not remark and (run := _zero_run(log)):
        begin, end = run
        place = f"from {log.unit} {log.steps[begin]:g} to {log.steps[end]:g}"
        text = f"the learning rate is 0 on all {end - begin + 1} lines {place}, and the loss does not fall there"
        advice = "Look at the schedule: does it end too early (its number of steps), or does a restart set it to 0?"
        yield LogFinding("lr", "very likely", text, advice, ("lr",))


def _zero_run(log: TrainingLog) -> tuple[int, int] | None:
    """(first, last line) of the longest run of learning rates of 0 that is no end of a schedule, no rounding, and no chance."""
    lr = log.columns.get("lr", np.zeros(0))
    edges = np.flatnonzero(np.diff(np.r_[0, lr == 0, 0]))
    if not len(edges):
        return None
    begin, end = max(zip(edges[::2], edges[1::2] - 1, strict=True), key=lambda run: run[1] - run[0])
    positive, before = np.unique(lr[np.isfinite(lr) & (lr > 0)]), lr[:begin][lr[:begin] > 0]
    count = end - begin + 1
    if count < (max(8, 0.1 * len(lr)) if len(lr) > 15 else max(4, 0.5 * len(lr))) or not len(positive):
        return None
    # A schedule that decays to 0 passes small values; one that is printed with few decimals has few values, and ends in zeros.
    step = float(np.diff(positive).min()) if len(positive) > 1 else 0.0
    faded = len(before) and (before[-1] < 0.1 * positive[-1] or (step > 0 and before[-1] < 1.5 * step))
    shown = log.loss[begin : end + 1][np.isfinite(log.loss[begin : end + 1])]
    still = is_flat(shown) if count >= 8 else len(shown) > 0 and np.median(shown[count // 2 :]) > 0.9 * np.median(shown)
    return (int(begin), int(end)) if still and not faded else None


def _learning_rates(log: TrainingLog) -> np.ndarray:
    lr = log.columns.get("lr", np.zeros(0))
    return lr[np.isfinite(lr)]


def _lr_cause(log: TrainingLog) -> tuple[str, ...]:
    return ("lr",) if lr_remark(log) else ()


def _because(log: TrainingLog) -> str:
    remark = lr_remark(log)
    return f"; the cause is probably {remark}" if remark else ""


# ---------------------------------------------------------------- a level where nothing is learned


def check_stall(result: Diagnosis) -> Iterator[LogFinding]:
    """A loss that stays at the level where nothing, or only the frequency of tokens, is learned."""
    true = result.true
    if len(true) < 8 or any(finding.fault == "frozen" for finding in result.findings):
        return
    begins_there = is_flat(true) and true[0] < 1.05 * np.median(true)
    begin = 0 if begins_there else len(true) // 3  # a loss that falls to a level and stays there begins higher
    if not is_flat(true[begin:]):
        return
    level = float(np.median(true[(begin + len(true)) // 2 :]))
    if result.explanation and not result.explanation.words:
        yield from _stall_at_unknown_scale(result, begin)
    elif result.setup.ln_v and 0.985 <= level / result.setup.ln_v <= 1.12:
        yield from _stall_at_ln_v(result, begin, level)
    elif not result.setup.ln_v and begins_there:
        yield from _stall_at_ln_of_a_number(result, level)
    elif result.setup.ln_v and result.explanation is None:
        yield from _stall_at_token_frequencies(result, begin, level)


def _stall_at_ln_v(result: Diagnosis, begin: int, level: float) -> Iterator[LogFinding]:
    log, steps = result.log, float(result.curve.steps[-1]) if result.curve.has_steps else None
    is_random = log.reference_lines.get("floor", 0) > 0.99 * result.setup.ln_v
    random = " (the log says that this data is random: then it is right)" if is_random else ""
    text = f"{_span(result, begin, level)}, and {result.expected}: nothing is learned{random}"
    short = steps is not None and steps < 200
    if short and (steps < 90 or _is_warming_up(log)) and not lr_remark(log):
        result.notes.append(f"{text} so far, as in many warm-ups")
        result.undecided.append(f"whether it learns, which {steps:.0f} steps do not show: give a longer log")
    else:
        yield LogFinding("stall", "likely" if short else "very likely", text + _because(log), _advice(log), _lr_cause(log))


def _stall_at_ln_of_a_number(result: Diagnosis, level: float) -> Iterator[LogFinding]:
    """The vocabulary is unknown: a flat loss that is as high as that of an untrained model."""
    steps, number = float(result.curve.steps[-1]) if result.curve.has_steps else None, _round_number(level)
    begins_late = not result.curve.from_start and not (number and level > 7)
    if begins_late or not 4 < level < LARGEST_LN_V or abs(level / result.true[0] - 1) > 0.03:
        return
    text = f"{_span(result, 0, level)}, its first value: flat at {level:.2f} = ln {number or round(math.exp(level))}?"
    text += " If that is the vocabulary, nothing is learned"
    if steps is not None and steps < 60:
        result.undecided.append(f"whether it learns, which {steps:.0f} steps do not show: give a longer log")
        result.notes.append(text)
        return
    enough = number and (steps is None or steps >= 90)
    text += _because(result.log)
    yield LogFinding("stall", "likely" if enough else "possible", text, _advice(result.log), _lr_cause(result.log))


def _stall_at_token_frequencies(result: Diagnosis, begin: int, level: float) -> Iterator[LogFinding]:
    """A loss that no run over text with a large vocabulary keeps for long. Few ids (bytes, proteins) are another matter."""
    log, curve, true, share = result.log, result.curve, result.true, level / result.setup.ln_v
    if result.setup.vocab_size < 1000 or "unigram" in log.reference_lines or not curve.has_steps:
        return
    late = curve.steps[0] >= 5000 and 0.55 <= share < 0.95 and _steps_seen(result) >= 1000
    fell = curve.from_start and _steps_seen(result) >= 400 and 0.62 <= share < 0.95 and true[0] > 1.05 * level
    if late or (fell and is_flat(true[begin:], 0.005)):
        text = f"{_span(result, begin, level)}, {share:.2f} times {result.expected}: about what token frequencies give if the"
        text, certainty = f"{text} context is ignored{_because(log)}", "likely" if late or lr_remark(log) else "possible"
        yield LogFinding("stall", certainty, text, CONTEXT, _lr_cause(log))


def _stall_at_unknown_scale(result: Diagnosis, begin: int) -> Iterator[LogFinding]:
    """A loss that is multiplied by something unknown, and flat from the first line on."""
    steps, shown = _steps_seen(result), result.curve.loss
    if begin or result.explanation.value < 1 or (steps is not None and steps < 200):
        return
    span = f"the loss stays within {np.ptp(np.quantile(shown, [0.05, 0.95])) / np.median(shown):.1%} of {np.median(shown):.5g}"
    text = f"{span} from {result.start} to {result.curve.steps[-1]:g}: nothing is learned, whatever the factor"
    yield LogFinding("stall", "likely", text, _advice(result.log), _lr_cause(result.log))


def _span(result: Diagnosis, begin: int, level: float) -> str:
    steps = result.curve.steps
    return f"the loss stays at {level:.3f} from {result.log.unit} {steps[begin]:g} to {steps[-1]:g}"


def _steps_seen(result: Diagnosis) -> float | None:
    """Steps from the first to the last line; None if the log has none."""
    return float(result.curve.steps[-1] - result.curve.steps[0]) if result.curve.has_steps else None


def _advice(log: TrainingLog) -> str:
    return f"Causes: {lr_remark(log) or _NOTHING_LEARNED}. If you train on one batch over and over, its loss must fall."


def _round_number(level: float) -> int | None:
    """The known size of a vocabulary, or round number, whose logarithm `level` is; None if there is none near."""
    usual = {*KNOWN_VOCABULARIES, 21128, 30522, 50304, 152064, *(2**power for power in range(6, 19))}
    usual |= {digit * 10**power for digit in range(1, 10) for power in range(2, 6)}
    rounded = {digits * 10**power for digits in range(11, 100) for power in range(2, 5)}
    away = {size: abs(level - math.log(size)) + 0.03 * (size not in usual) for size in usual | rounded}
    nearest = min(away, key=away.get)
    return nearest if away[nearest] < 0.034 and nearest <= 300_000 else None


def _is_warming_up(log: TrainingLog) -> bool:
    """True if the learning rate still rises at the last line."""
    lr = _learning_rates(log)
    return len(lr) > 1 and lr[-1] == lr.max() > 1.5 * lr[0]


def is_flat(loss: np.ndarray, share: float = 0.01) -> bool:
    """True if the last fifth differs from the first by at most the fraction `share`, or chance; False if too noisy."""
    if len(loss) < 8:
        return False
    fifth = max(3, len(loss) // 5)
    level, change = float(np.median(loss[-fifth:])), float(np.median(loss[:fifth]) - np.median(loss[-fifth:]))
    blur = 3 * line_noise(loss, 0.0) / math.sqrt(fifth)
    return abs(change) <= max(share * level, blur) and blur <= 0.02 * level
