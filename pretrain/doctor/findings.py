"""Finds faults in the loss that a training log shows.

Each check looks for one fault and yields a finding only if the figures support it; doubts become notes, or findings that are
merely possible. Clean logs get no finding: a false alarm costs as much as a miss. To add a check, add a function to CHECKS and
its fault to FAULTS (diagnosis.py). Knows logs (training_log.py) and the checks for a factor, for a loss that does not move, and
for jumps. Knows no model and no data, and imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from pretrain.doctor import verdict
from pretrain.doctor.curve import ShownCurve
from pretrain.doctor.diagnosis import Diagnosis, LogFinding
from pretrain.doctor.jump_checks import check_restarts, check_spikes
from pretrain.doctor.log_formats import TEXT_FORMATS
from pretrain.doctor.noise import LEAST_VALUES, line_noise
from pretrain.doctor.scale import Setup, from_perplexity
from pretrain.doctor.scale_checks import check_change, check_running, check_scale
from pretrain.doctor.stall_checks import CONTEXT, check_frozen, check_learning_rate, check_stall, lr_remark
from pretrain.doctor.training_log import TrainingLog

_BEFORE_THE_RISE = "Resume from a checkpoint before the rise, with a lower learning rate."


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
        _add_what_is_open(result)
    result.findings.sort(key=lambda finding: finding.order)
    return result


def _add_what_is_open(result: Diagnosis) -> None:
    """Notes whether the curve falls in spite of a factor, and what is missing for a judgment."""
    curve, change = result.curve, result.curve.last / result.curve.first - 1
    if result.explanation and change < -0.03 and not {"stall", "divergence"} & {each.fault for each in result.findings}:
        result.notes.insert(
            0, f"apart from the factor training works: the loss falls by {-change:.0%}, which no factor changes"
        )
    if result.setup.ln_v is None and result.explanation is None and not result.findings:
        result.undecided.append("the scale, because the vocabulary is unknown: give --vocab-size")
    if len(curve.loss) < 5 and not result.findings:
        result.undecided.append(
            f"the course of the loss, of which {len(curve.loss)} line{'s' * (len(curve.loss) > 1)} say little"
        )


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
    """NaN, infinities, missing losses, zeros in place of them, and losses below 0."""
    log = result.log
    bad, zeros = np.flatnonzero(~np.isfinite(log.loss)), np.flatnonzero(log.loss == 0)
    if len(bad):
        forever = len(bad) == len(log.loss) - bad[0] and len(bad) > 1
        text = f"{len(bad)} of {len(log.loss)} losses are not finite, the first at {log.unit} {log.steps[bad[0]]:g}"
        text += ", and none is finite after it" if forever else ""
        advice = "Resume from a checkpoint before it, with a lower learning rate; weights that are NaN stay NaN."
        yield LogFinding("nan", "certain", text, advice)
    elif len(log.missing_steps) or len(log.nonfinite_norm_steps):
        yield from _missing_losses(result)
    if len(zeros) == 1 and zeros[0] == 0 and len(log.loss) > 2:
        result.notes.append(f"the first loss, 0 at {log.unit} {log.steps[0]:g}, is taken for a mean of nothing")
    elif len(zeros):
        yield _zeros(log, zeros)
    if len(below := np.flatnonzero(log.loss < 0)):
        text = f"{len(below)} of {len(log.loss)} losses are below 0, the first at {log.unit} {log.steps[below[0]]:g}"
        text += ": a cross-entropy never is; this is a different objective, or something is subtracted"
        yield LogFinding("negative", "certain", text, "Show the cross-entropy alone.")


def _missing_losses(result: Diagnosis) -> Iterator[LogFinding]:
    """Lines without a loss, or with a gradient norm of NaN. Scaled fp16 training skips a few such steps and continues."""
    log = result.log
    missing, norms, last = log.missing_steps, log.nonfinite_norm_steps, log.steps[-1] if len(log.steps) else -math.inf
    both = np.intersect1d(missing, norms)
    advice = "Resume from a checkpoint before it, with a lower learning rate; weights that are NaN stay NaN."
    if len(both):
        text = f"the loss is missing on {len(missing)} lines and the gradient norm on them is NaN, the first at"
        text = f"{text} {log.unit} {both[0]:g}: training has diverged there"
        yield LogFinding("nan", "certain" if both[-1] > last else "likely", text, advice)
    elif len(missing) and np.sum(missing > last) >= 3:
        text = f"no line after {log.unit} {last:g} has a loss, and {np.sum(missing > last)} follow"
        yield LogFinding("nan", "likely", f"{text}: some loggers leave out what is NaN", advice)
    elif len(norms) > 1 and (len(norms) > 0.3 * len(log.loss) or norms[-2] >= log.steps[-min(2, len(log.steps))]):
        text = f"the gradient norm is NaN or infinite on {len(norms)} lines, the first at {log.unit} {norms[0]:g}"
        yield LogFinding("nan", "likely", text, advice)
    elif len(norms):
        where = ", ".join(f"{step:g}" for step in norms[:5])
        result.notes.append(
            f"the gradient norm is NaN or infinite at {log.unit} {where}: scaled fp16 training skips such steps"
        )


def _zeros(log: TrainingLog, zeros: np.ndarray) -> LogFinding:
    """Losses of exactly 0: in place of NaN, or because the answers are known."""
    norm = log.columns.get("grad_norm", np.full(len(log.loss), np.nan))[zeros]
    text = f"{len(zeros)} of {len(log.loss)} losses are exactly 0, the first at {log.unit} {log.steps[zeros[0]]:g}"
    before = log.loss[: zeros[0]]
    if np.isfinite(norm).any() and float(np.nanmedian(norm)) < 1e-3:
        text += f", with a gradient norm of {float(np.nanmedian(norm)):.2g}: the model predicts every label with certainty"
        advice = "The input contains the labels (not shifted, or attention sees later tokens), or all labels are the same."
        return LogFinding("collapse", "very likely", text, advice)
    if not len(log.nonfinite_norm_steps) and len(before) and before[-1] < 0.05:
        advice = "The input contains the labels, all labels are the same, or a few samples are read over and over."
        return LogFinding("collapse", "likely", f"{text}, after {before[-1]:.2g}: the model predicts every label", advice)
    text += ", with a gradient norm of NaN" if np.isin(log.steps[zeros], log.nonfinite_norm_steps).any() else ""
    text += ": no language model gets there; some loggers write 0 for NaN"
    return LogFinding("nan", "likely", text, "Switch that filter off, and find the first NaN.")


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
        smoothed = (proof := from_perplexity(result.log)) is not None and proof[1] == "lm_loss"
        always_added = len(known) and np.median(extra) > 2e-4 * np.median(pure[known]) and np.mean(extra > 0) > 0.95
        if always_added and smoothed and not result.explanation:
            result.notes.append("the loss is above the cross-entropy beside it by label smoothing or another term")
        elif always_added and not result.explanation:
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


def check_level(result: Diagnosis) -> Iterator[LogFinding]:
    """A second half that stays at the unigram entropy, or a validation that rises while training falls."""
    log, curve, lines = result.log, result.curve, dict(result.log.reference_lines)
    if result.setup.ln_v:
        lines.setdefault("uniform", result.setup.ln_v)
    steps, val_loss = (log.val_steps, log.val_loss) if result.explanation is None else (np.zeros(0), np.zeros(0))
    seen = verdict.Curve(curve.steps, result.true, steps, val_loss)
    if "uniform" in lines and (judged := verdict.judge(seen, lines)).kind == "unigram":
        yield LogFinding("stall", "likely", judged.text, CONTEXT)
    # The log does not say how often the data was read, so only a validation that rises is evidence.
    if len(val_loss) and val_loss[-1] > 1.02 * val_loss.min() and (memorised := verdict.memorising(seen)):
        best = f"{log.unit} {log.val_steps[log.val_loss.argmin()]:g}"
        yield LogFinding("memorising", "likely", memorised, f"Use the checkpoint from around {best}.")


def check_collapse(result: Diagnosis) -> Iterator[LogFinding]:
    """A loss near 0: the input contains the answer. Trained models that read a small text often get there, too."""
    curve, true, floor = result.curve, result.true, result.log.reference_lines.get("floor", math.inf)
    last = float(np.median(true[-max(min(3, len(true)), len(true) // 10) :]))
    if last < min(0.1, floor - 0.1) and not any(finding.fault == "collapse" for finding in result.findings):
        untrained = true[0] > 0.7 * (result.setup.ln_v or 8)
        text = f"the loss falls to {last:.3g} nats at {result.log.unit} {curve.steps[-1]:g}; no unseen text is so easy"
        advice = "Causes: labels not shifted (label = input), attention that sees later tokens, or a few samples over and over."
        yield LogFinding("collapse", "likely" if untrained else "possible", text, advice)


def check_divergence(result: Diagnosis) -> Iterator[LogFinding]:
    """A curve that ends far above its lowest part."""
    curve, true, tenth = result.curve, result.true, max(3, len(result.true) // 10)
    if len(true) < 4 * tenth:
        yield from _few_lines_rise(result)
        return
    begins = np.r_[np.arange(0, len(true) - tenth, max(1, tenth // 20)), len(true) - tenth]
    medians = np.array([np.median(true[i : i + tenth]) for i in begins])
    best = int(begins[medians.argmin()])
    lowest = float(medians.min())
    rise, noise = float(medians[-1] - lowest), 8 * line_noise(true, 0.0) / math.sqrt(tenth)
    if rise > max(0.03 * lowest, 0.05, noise):
        where = f"{result.log.unit} {curve.steps[best + tenth // 2]:g}"
        text = f"the loss rises from {lowest:.3g} around {where} to {medians[-1]:.3g} at the end"
        remark = lr_remark(result.log)
        text += f"; the cause is probably {remark}" if remark else ""
        certainty = "likely" if rise > max(0.05 * lowest, 0.2) else "possible"
        yield LogFinding("divergence", certainty, text, _BEFORE_THE_RISE, ("lr",) if remark else ())


def _few_lines_rise(result: Diagnosis) -> Iterator[LogFinding]:
    """Fewer than twelve lines whose last ones are all far above the first."""
    true, ln_v = result.true, result.setup.ln_v
    text = f"the loss rises from {true.min():.3g} to {true[-1]:.3g}"
    first_updates = result.curve.has_steps and result.curve.steps[-1] < 10  # some recipes jump there, and recover
    certainty = "possible" if first_updates else "likely"
    if len(true) >= 3 and ln_v and min(true[-2:]) > max(1.15 * true[0], 1.05 * ln_v):
        yield LogFinding("divergence", certainty, f"{text}, above {result.expected}", _BEFORE_THE_RISE)
    elif len(true) >= 5 and min(true[-2:]) > true.min() + max(0.3 * true[0], 0.5, 3 * np.median(np.abs(np.diff(true)))):
        yield LogFinding("divergence", certainty, text, _BEFORE_THE_RISE)


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
    check_frozen,
    check_stall,
    check_learning_rate,  # knows what the stall has named
    check_level,
    check_collapse,
    check_divergence,
    check_restarts,
    check_spikes,
    check_noise,
)
"""The checks of a curve. If the curve is distorted, only `check_ranks` applies."""
