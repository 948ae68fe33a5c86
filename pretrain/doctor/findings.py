"""Finds faults in the loss that a training log shows.

Each check looks for one fault and yields a finding only if the figures support it; doubts become notes. Clean logs get no
finding: a false alarm costs as much as a miss. To add a check, add a function to CHECKS and its fault to FAULTS (diagnosis.py).
Knows logs (training_log.py) and the factor between shown and true loss (scale_checks.py). Knows no model and no data, and
imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from pretrain.doctor import verdict
from pretrain.doctor.curve import ShownCurve
from pretrain.doctor.diagnosis import Diagnosis, LogFinding
from pretrain.doctor.log_formats import TEXT_FORMATS
from pretrain.doctor.noise import LEAST_VALUES, line_noise
from pretrain.doctor.scale import LARGEST_LN_V, Setup
from pretrain.doctor.scale_checks import check_change, check_running, check_scale
from pretrain.doctor.training_log import TrainingLog

_NOTHING_LEARNED = "labels that do not follow from the tokens (random data, another sample), or weights that do not move"
_BEFORE_THE_RISE = "Resume from a checkpoint before the rise, with a lower learning rate."
_CONTEXT = "Shuffled labels look like this; so do attention that sees nothing, and a learning rate far too low or too high."


def diagnose(log: TrainingLog, setup: Setup) -> Diagnosis:
    """All faults of `log`, given the known facts about its run."""
    if setup.vocab_size is None and (uniform := log.reference_lines.get("uniform")):
        setup = replace(setup, vocab_size=round(math.exp(uniform)))  # the log states it
    result = Diagnosis(log, setup, ShownCurve.of(log), notes=list(log.notes))
    result.findings += check_finite(result)
    if log.skipped_steps:
        result.notes.append(f"{log.skipped_steps} steps were skipped because their loss or gradient was not finite")
    if log.format in TEXT_FORMATS:
        result.notes.append(f"scripts that write {log.format} show, as published, {TEXT_FORMATS[log.format][1]}")
    if result.curve is not None:
        result.findings += (distorted := [*check_running(result), *check_change(result)])
        for check in (check_ranks,) if distorted else CHECKS:
            result.findings += check(result)
    return result


def summary(result: Diagnosis) -> list[str]:
    """The figures of the log, one line each."""
    log, curve = result.log, result.curve
    count = f"{len(log.loss)} loss{'es' if len(log.loss) > 1 else ''} ({log.loss_name!r})"
    if curve is None:
        return [f"{log.name}: {log.format}, {count}, none of them finite and above 0"]
    loss, change = log.loss[np.isfinite(log.loss)], curve.last / curve.first - 1
    verb = "stays within" if abs(change) < 0.005 else "falls by" if change < 0 else "rises by"
    scatter = f"; lines scatter by {curve.noise:.2g} around their trend" if len(curve.loss) >= LEAST_VALUES else ""
    return [
        f"{log.name}: {log.format}, {count}, {log.unit} {log.steps[0]:g} to {log.steps[-1]:g}",
        f"first {loss[0]:.5g}   last {loss[-1]:.5g}   min {loss.min():.5g}   max {loss.max():.5g}   mean {loss.mean():.5g}",
        f"trend: {verb} {abs(change):.1%} from the first line to the last tenth{scatter}",
    ][: 3 if len(loss) > 1 else 2]


# ---------------------------------------------------------------- checks


def check_finite(result: Diagnosis) -> Iterator[LogFinding]:
    """NaN, infinities, zeros in place of them, and losses below 0."""
    log = result.log
    bad, zeros = np.flatnonzero(~np.isfinite(log.loss)), np.flatnonzero(log.loss == 0)
    if len(bad):
        forever = len(bad) == len(log.loss) - bad[0] and len(bad) > 1
        text = f"{len(bad)} of {len(log.loss)} losses are not finite, the first at {log.unit} {log.steps[bad[0]]:g}"
        text += ", and none is finite after it" if forever else ""
        advice = "Resume from a checkpoint before it, with a lower learning rate; weights that are NaN stay NaN."
        yield LogFinding("nan", "certain", text, advice)
    if len(zeros):
        norm = log.columns.get("grad_norm")
        text = f"{len(zeros)} of {len(log.loss)} losses are exactly 0, the first at {log.unit} {log.steps[zeros[0]]:g}"
        text += ", with a gradient norm of NaN" if norm is not None and np.isnan(norm[zeros]).any() else ""
        text += ": no language model gets there; some loggers write 0 for NaN"
        yield LogFinding("nan", "likely", text, "Switch that filter off, and find the first NaN.")
    if len(below := np.flatnonzero(log.loss < 0)):
        text = f"{len(below)} of {len(log.loss)} losses are below 0, the first at {log.unit} {log.steps[below[0]]:g}"
        text += ": a cross-entropy never is; this is a different objective, or something is subtracted"
        yield LogFinding("negative", "certain", text, "Show the cross-entropy alone.")


def check_ranks(result: Diagnosis) -> Iterator[LogFinding]:
    """Every rank prints its own line."""
    if (lines := result.log.lines_per_step) > 1:
        text = f"each {result.log.unit} has {lines} lines: every rank shows its own loss. This judges their mean"
        yield LogFinding("ranks", "very likely", text, "Sum nats and tokens over the ranks, divide last, and print once.")


def check_auxiliary(result: Diagnosis) -> Iterator[LogFinding]:
    """A loss above the cross-entropy on the same line, or one that moves with the auxiliary loss."""
    columns, loss = result.log.columns, result.log.loss
    aux, pure = columns.get("aux_loss"), columns.get("lm_loss")
    if pure is not None:
        known = np.flatnonzero(np.isfinite(loss) & np.isfinite(pure))
        extra = loss[known] - pure[known]
        # A rank's own cross-entropy scatters to both sides of the mean over all ranks; an auxiliary loss adds on every line.
        always_added = len(known) and np.median(extra) > 2e-4 * np.median(pure[known]) and np.mean(extra > 0) > 0.95
        if always_added and not result.explanation:
            text = f"the loss shows {loss[known[0]]:.4g}, its cross-entropy {pure[known[0]]:.4g}: an auxiliary loss is added"
            yield LogFinding("auxiliary", "very likely", text, "Judge the run by the cross-entropy alone.")
    elif aux is not None:
        known = np.isfinite(aux) & np.isfinite(loss)
        weight = _moves_with(loss[known], aux[known])
        if weight:
            part = f"{weight * aux[known][0]:.2g} of the first line is not cross-entropy"
            text = f"the loss moves with the auxiliary loss, by {weight:.2g} per unit: {part}"
            yield LogFinding("auxiliary", "likely", text, "Show the cross-entropy alone.")
        else:
            result.notes.append("the log has an auxiliary loss too; the curves do not show whether the loss contains it")


def _moves_with(loss: np.ndarray, aux: np.ndarray) -> float:
    """Regression slope of the changes of loss from line to line on those of aux; 0 if it may be chance, or explains little."""
    if len(loss) < 20 or np.ptp(aux) == 0:
        return 0.0
    x, y = np.diff(aux, 2), np.diff(loss, 2)
    slope = float(x @ y / (x @ x))
    error = float(np.std(y - slope * x) / math.sqrt(x @ x / 3))  # neighbouring second differences share lines: count a third
    return slope if slope > 8 * error and slope * np.std(x) > 0.3 * np.std(y) else 0.0


def check_stall(result: Diagnosis) -> Iterator[LogFinding]:
    """A loss that stays at the level where nothing, or only the frequency of tokens, is learned."""
    log, curve, setup, true = result.log, result.curve, result.setup, result.true
    lines, ln_v = log.reference_lines, setup.ln_v
    if len(true) < 8:
        return
    begins_there = _is_flat(true) and true[0] < 1.05 * np.median(true)
    begin = 0 if begins_there else len(true) // 3  # a loss that falls to a level and stays there begins higher
    if not _is_flat(true[begin:]):
        return
    span_steps = curve.steps[-1] - curve.steps[0]
    level = float(np.median(true[(begin + len(true)) // 2 :]))
    frozen = "lr" in log.columns and np.nanmax(log.columns["lr"]) == 0
    cause = "the learning rate, 0 on every line" if frozen else _NOTHING_LEARNED
    advice = f"Causes: {cause}. If you train on one batch over and over, its loss must fall."
    settled = curve.from_start and log.unit == "step" and span_steps >= 200
    span = f"the loss stays at {level:.3f} from {log.unit} {curve.steps[begin]:g} to {curve.steps[-1]:g}"
    if ln_v and 0.985 <= level / ln_v <= 1.06:
        random = " (the log says that this data is random: then it is right)" if lines.get("floor", 0) > 0.99 * ln_v else ""
        text, short = f"{span}, and {result.expected}: nothing is learned{random}", log.unit == "step" and span_steps < 200
        if short and (span_steps < 90 or _is_warming_up(log)):
            result.notes.append(f"{text} so far, as in many warm-ups")
        else:
            yield LogFinding("stall", "likely" if short else "very likely", text, advice)
    elif not ln_v and settled and 4 < level < LARGEST_LN_V and abs(level / true[0] - 1) < 0.03:
        text = f"{span}, its first value, which is ln of {math.exp(level):,.0f}: if that is the vocabulary, nothing is learned"
        yield LogFinding("stall", "likely", text, advice)
    elif ln_v and settled and begin and span_steps >= 400 and "unigram" not in lines and 0.62 <= level / ln_v < 0.95:
        text = f"{span}, {level / ln_v:.2f} times {result.expected}: about what token frequencies alone give"
        if _is_flat(true[begin:], 0.005) and true[0] > 1.05 * level:
            yield LogFinding("stall", "possible", f"{text}, as if the context is ignored", _CONTEXT)


def _is_warming_up(log: TrainingLog) -> bool:
    """True if the learning rate still rises at the last line."""
    lr = log.columns.get("lr", np.zeros(0))
    lr = lr[np.isfinite(lr)]
    return len(lr) > 1 and lr[-1] == lr.max() > 1.5 * lr[0]


def _is_flat(loss: np.ndarray, share: float = 0.01) -> bool:
    """True if the last fifth differs from the first by at most the fraction `share`, or chance; False if too noisy."""
    if len(loss) < 8:
        return False
    fifth = max(3, len(loss) // 5)
    level, change = float(np.median(loss[-fifth:])), float(np.median(loss[:fifth]) - np.median(loss[-fifth:]))
    blur = 3 * line_noise(loss, 0.0) / math.sqrt(fifth)
    return abs(change) <= max(share * level, blur) and blur <= 0.02 * level


def check_level(result: Diagnosis) -> Iterator[LogFinding]:
    """A second half that stays at the unigram entropy, or a validation that rises while training falls."""
    log, curve, lines = result.log, result.curve, dict(result.log.reference_lines)
    if result.setup.ln_v:
        lines.setdefault("uniform", result.setup.ln_v)
    steps, val_loss = (log.val_steps, log.val_loss) if result.explanation is None else (np.zeros(0), np.zeros(0))
    seen = verdict.Curve(curve.steps, result.true, steps, val_loss)
    if "uniform" in lines and (judged := verdict.judge(seen, lines)).kind == "unigram":
        yield LogFinding("stall", "likely", judged.text, _CONTEXT)
    # The log does not say how often the data was read, so only a validation that rises is evidence.
    if len(val_loss) and val_loss[-1] > 1.02 * val_loss.min() and (memorised := verdict.memorising(seen)):
        best = f"{log.unit} {log.val_steps[log.val_loss.argmin()]:g}"
        yield LogFinding("memorising", "likely", memorised, f"Use the checkpoint from around {best}.")


def check_collapse(result: Diagnosis) -> Iterator[LogFinding]:
    """A loss near 0: the input contains the answer."""
    curve, true, floor = result.curve, result.true, result.log.reference_lines.get("floor", math.inf)
    last = float(np.median(true[-max(min(3, len(true)), len(true) // 10) :]))
    if last < min(0.1, floor - 0.1) and true[0] > 2:
        text = f"the loss falls to {last:.3g} nats at {result.log.unit} {curve.steps[-1]:g}; no text can be predicted so well"
        advice = "Causes: labels not shifted (label = input), attention that sees later tokens, or a few samples over and over."
        yield LogFinding("collapse", "likely", text, advice)


def check_divergence(result: Diagnosis) -> Iterator[LogFinding]:
    """A curve that ends far above its lowest part."""
    curve, true, tenth = result.curve, result.true, max(3, len(result.true) // 10)
    if len(true) < 4 * tenth:
        ln_v = result.setup.ln_v
        if len(true) >= 3 and ln_v and min(true[-2:]) > max(1.15 * true[0], 1.05 * ln_v):
            text = f"the loss rises from {true.min():.3g} to {true[-1]:.3g}, above {result.expected}"
            yield LogFinding("divergence", "likely", text, _BEFORE_THE_RISE)
        return
    begins = np.r_[np.arange(0, len(true) - tenth, max(1, tenth // 20)), len(true) - tenth]
    medians = np.array([np.median(true[i : i + tenth]) for i in begins])
    best = int(begins[medians.argmin()])
    lowest = float(medians.min())
    rise = float(medians[-1] - lowest)
    if rise > max(0.05 * lowest, 0.2, 8 * line_noise(true, 0.0) / math.sqrt(tenth)):
        where = f"{result.log.unit} {curve.steps[best + tenth // 2]:g}"
        text = f"the loss rises from {lowest:.3g} around {where} to {medians[-1]:.3g} at the end"
        yield LogFinding("divergence", "likely", text, _BEFORE_THE_RISE)


def check_noise(result: Diagnosis) -> Iterator[LogFinding]:
    """Lines that scatter more than the mean over so many sequences can: only a part of the step is shown."""
    setup, half = result.setup, len(result.true) // 2
    if setup.micro_batches < 2 or half < 20 or (result.explanation and result.explanation.cause == "perplexity"):
        return
    noise = line_noise(result.true[half:], 0.0)
    sequences = setup.micro_batches * (setup.micro_batch_size or 1)
    # Losses of single sequences of mixed web text and code scatter by 0.3 to 0.8 nats; 50 % more is not due to the data.
    bound = 1.2 / math.sqrt(sequences)
    count = f"{sequences} sequences{'' if setup.micro_batch_size else ' or more'}"
    figures = f"lines scatter by {noise:.2g} nats; the mean over {count}"
    if noise <= bound:
        doubt = "no sign that only a part of the step is shown, and no proof"
        result.notes.append(f"{figures} may scatter by up to {bound:.2g}: {doubt}")
        return
    causes = ["last micro-batch"] if (setup.accumulation or 1) > 1 else []
    causes += ["one rank"] if (setup.world_size or 1) > 1 else []
    shown = " or ".join(f"{'the ' * (cause == 'last micro-batch')}{cause} alone" for cause in causes)
    text = f"{figures} would by less than {bound:.2g}: the loss is that of {shown}"
    advice = "Print the mean over all micro-batches and ranks too: it must scatter far less. Unstable training also scatters."
    yield LogFinding("noise", "possible", text, advice, tuple(causes))


CHECKS = (
    check_scale,  # first: it sets the explanation, by which the others convert shown losses into nats
    check_ranks,
    check_auxiliary,
    check_stall,
    check_level,
    check_collapse,
    check_divergence,
    check_noise,
)
"""The checks of a curve, in the order of their findings. If the curve is distorted, only `check_ranks` applies."""
