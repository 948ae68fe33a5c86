"""What is wrong with the loss that a training log shows: the finding engine of the loss doctor.

Each check looks at one way in which a loss goes wrong and yields findings only where the figures support one; what they leave
open becomes a note. Clean logs get no finding: a false alarm costs as much as a miss. Knows logs (log_formats.py) and the
factor between shown and true loss (shown_factor.py). Knows no model and no data, and imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from pretrain.doctor.log_formats import TEXT_FORMATS, TrainingLog
from pretrain.doctor.scale import (
    GUESS,
    LARGEST_LN_V,
    LEAST_EVER,
    MOST,
    Curve,
    Evidence,
    Factor,
    Setup,
    contenders,
    factors,
    falls_as_untrained,
    from_perplexity,
    from_some_vocabulary,
    from_start,
    from_validation,
    line_noise,
    over_validation,
    running,
    share_of_ln_v,
    vocabularies_of,
)
from pretrain.report import verdict

_ONE_STEP = "Print the first step twice, with accumulation 1 and 2 and the same global batch: a true loss does not change."
_NOTHING_LEARNED = (
    "labels that do not follow from the tokens (random data, labels of another sample) or weights that do not move"
)
_BEFORE_THE_RISE = "Go on from a checkpoint before the rise, with a lower learning rate."
_CONTEXT = "Shuffled labels look like this; so do attention that sees nothing, and a learning rate far too low or too high."


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    fault: str
    """One word: scale, running, start, nan, negative, stall, memorising, noise, auxiliary, ranks, collapse, divergence."""
    certainty: str
    """certain, very likely, likely or possible."""
    text: str
    advice: str
    """What to do, or what it takes to be sure."""
    causes: tuple[str, ...] = ()
    """Of a scale, a start or a noise: the likeliest first, as accumulation, both, bits, perplexity, initialisation."""


@dataclass
class Diagnosis:
    """Everything said about one log."""

    log: TrainingLog
    setup: Setup
    curve: Curve | None
    """None: no loss is finite and above 0."""
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    explanation: Factor | None = None
    """Between the shown and the true loss; None: they are the same, as far as the log tells."""

    @property
    def true(self) -> np.ndarray:
        """(N,) the losses of `curve` in nats per token."""
        return self.explanation.true(self.curve.loss) if self.explanation else self.curve.loss

    @property
    def place(self) -> str:
        """Where the curve begins, as `step 100`."""
        return f"{self.log.unit} {self.curve.steps[0]:g}"


def diagnose(log: TrainingLog, setup: Setup) -> Diagnosis:
    """All that `log` shows to be wrong, given what is known about the run."""
    if setup.vocab_size is None and (uniform := log.reference_lines.get("uniform")):
        setup = replace(setup, vocab_size=round(math.exp(uniform)))  # the log says it
    result = Diagnosis(log, setup, Curve.of(log), notes=list(log.notes))
    result.findings += _not_finite(log)
    if log.skipped_steps:
        result.notes.append(f"{log.skipped_steps} steps were skipped, as their loss or gradient was not finite")
    if log.format in TEXT_FORMATS:
        result.notes.append(f"scripts that write {log.format} show, as published, {TEXT_FORMATS[log.format][1]}")
    if result.curve is not None:
        accumulated = [*_running(result), *_change(result)]
        judged = (_ranks,) if accumulated else (_scale, _ranks, _auxiliary, _stall, _level, _collapse, _divergence, _noise)
        result.findings += accumulated
        for check in judged:
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
    jumps = f"; lines jump by {curve.noise:.2g} around their neighbours" if len(curve.loss) >= 5 else ""
    return [
        f"{log.name}: {log.format}, {count}, {log.unit} {log.steps[0]:g} to {log.steps[-1]:g}",
        f"first {loss[0]:.5g}   last {loss[-1]:.5g}   min {loss.min():.5g}   max {loss.max():.5g}   mean {loss.mean():.5g}",
        f"trend: {verb} {abs(change):.1%} from the first line to the last tenth{jumps}",
    ][: 3 if len(loss) > 1 else 2]


# ---------------------------------------------------------------- the scale


def _running(result: Diagnosis) -> Iterator[Finding]:
    """A curve that rises from 0 is no loss but something that gathers losses."""
    if found := running(result.log, result.curve):
        (b, level), begins = found, f"the curve begins at {result.curve.first:.4g} and rises as"
        if b == 1:
            text = f"{begins} a sum that is never set back does, by {level:.3g} for each line or step at first"
        else:
            text = f"{begins} a running mean that began at 0 does, by {1 - b:.2g} of each new loss, about {level:.3g} at first"
        cure = "Set the sum back after each line" if b == 1 else f"Divide by 1 - {b:.4g}^n after n losses, or show the losses"
        yield Finding("running", "very likely", text, f"{cure}. Nothing else in this log can be judged.")


def _scale(result: Diagnosis) -> Iterator[Finding]:
    """A factor between the shown and the true loss: from companions in the log first, then from the first line."""
    log, curve, ln_v = result.log, result.curve, result.setup.ln_v
    if evidence := from_perplexity(log):
        yield _factor(result, evidence, f"The perplexity on the same lines is exp(loss / {evidence.best:.4g}). ")
    elif evidence := from_validation(log, curve, ln_v):
        named = [each for each in contenders(evidence, result.setup, curve, ln_v) if each.cause != "perplexity"]  # no constant
        why = f"The same log's evaluation shows {1 / evidence.best:.3g} times this loss, all along. "
        yield _factor(result, evidence, why, named)
    elif ln_v is None:
        yield from _scale_without_vocabulary(result)
    else:
        evidence = from_start(curve, ln_v)
        if evidence.least > 1:
            yield _too_high(result, evidence)
        elif evidence.most < 1:
            yield from _too_low(result, evidence)
        else:
            result.notes += _what_the_start_leaves_open(result, evidence)


def _change(result: Diagnosis) -> Iterator[Finding]:
    """What is shown changes from one line to the next, as after a restart with another accumulation: one side is above ln V."""
    curve, setup, width = result.curve, result.setup, 4
    if setup.ln_v is None or len(curve.loss) < 3 * width:
        return
    windows = np.lib.stride_tricks.sliding_window_view(curve.loss, width)
    level, steady = np.median(windows, axis=1), np.ptp(windows, axis=1) < 0.15 * windows.min(axis=1)
    jump = np.where(steady[:-width] & steady[width:], level[:-width] / level[width:], 1.0)
    at = int(np.abs(np.log(jump)).argmax())
    before, after = level[at], level[at + width]
    times = max(before, after) / min(before, after)
    names = [f.words for f in factors(setup, curve, times) if abs(math.log(f.value / times)) < 0.1 and not f.is_unit]
    impossible = max(before, after) > MOST * setup.ln_v >= min(before, after)
    if not impossible or times < 1.7 or (before < after and not names):
        return
    place = f"between {result.log.unit} {curve.steps[at + width - 1]:g} and {curve.steps[at + width]:g}"
    text = f"{place} the loss goes from {before:.4g} to {after:.4g}, {times:.3g} times {'less' if after < before else 'more'}"
    why = f" at once: what is shown has changed{', likely by ' + ' or '.join(names) if names else ''}"
    yield Finding("scale", "likely", text + why, "Judge the parts before and after it as logs of their own.", ("change",))


def _too_high(result: Diagnosis, evidence: Evidence) -> Finding:
    """The first line exceeds what any healthy run shows."""
    curve, setup = result.curve, result.setup
    named = contenders(evidence, setup, curve, setup.ln_v)
    ratio = curve.first / setup.ln_v
    start = f"the first loss, {curve.first:.4g}, is {ratio:.3g} times {_expected(setup)}"
    if not named and ratio < 1.5:
        text = f"{start}: the head's initial weights are too large, an auxiliary loss is mixed in, or the vocabulary is larger"
        advice = "Print the cross-entropy alone, and the standard deviation s of the logits: they add about s^2 / 2."
        return Finding("start", "likely", text, advice, ("initialisation", "auxiliary", "vocabulary"))
    if not named and curve.low < LEAST_EVER * curve.first:
        text = f"{start}, but the curve falls to {curve.low:.4g}: no factor (it would stay), but initial weights too large"
        advice = "Smaller initial weights of embedding and head start near ln V."
        return Finding("start", "likely", text, advice, ("initialisation",))
    return _factor(result, evidence, "", named)


def _too_low(result: Diagnosis, evidence: Evidence) -> Iterator[Finding]:
    """The first line is less than any healthy run from scratch shows; a run from trained weights may show it."""
    curve, setup = result.curve, result.setup
    named = contenders(evidence, setup, curve, setup.ln_v)
    ratio, _ = over_validation(result.log, curve)  # a factor holds there, too; what learns by heart drifts away
    named = [each for each in named if all(abs(math.log(one / each.value)) < 0.4 for one in ratio)]
    start = f"the first loss, {curve.first:.4g} at {result.place}, is {curve.first / setup.ln_v:.2g} times {_expected(setup)}"
    exact = bool(named) and curve.age <= 1 and evidence.deviations(named[0]) < 1.3 and not named[0].doubt
    too_good = curve.last < LEAST_EVER * setup.ln_v
    falls = falls_as_untrained(curve)
    untrained = bool(falls) and (bool(named) or (curve.last < 0.65 * curve.first and not len(ratio)))
    if named and ((exact and falls is None) or untrained or (too_good and not named[0].is_unit)):
        yield _factor(result, evidence, "", named)
    elif untrained and curve.first > 0.6 * setup.ln_v:
        text = f"{start}, as with {math.exp(curve.first):,.0f} ids: another vocabulary, or padding that counts with loss 0"
        yield Finding("start", "likely", text, "Compare the model's vocabulary with the tokenizer's.", ("vocabulary", "mask"))
    elif untrained:
        text = f"{start}, and it falls as an untrained model's does: the shown loss is divided by about {1 / evidence.best:.2g}"
        result.explanation = Factor(evidence.best, "divided", "")
        advice = f"If the run began with trained weights, this is right. {_ONE_STEP}"
        yield Finding("scale", "possible", text, advice, ("divided",))
    elif curve.from_start:
        would = "".join(f"; there {each.arithmetic(curve.first)} ({each.words}) would explain it" for each in named[:2])
        result.notes.append(f"{start}: right for a run from trained weights, too low for one that began untrained{would}")
    else:
        result.notes += _what_the_start_leaves_open(result, evidence)


def _scale_without_vocabulary(result: Diagnosis) -> Iterator[Finding]:
    """Only a loss that no vocabulary explains is a finding; hypotheses become notes."""
    curve, setup = result.curve, result.setup
    evidence, ids = from_some_vocabulary(curve), math.exp(min(curve.first, 700))
    if curve.first > MOST * LARGEST_LN_V:
        yield _factor(
            result, evidence, f"No vocabulary starts at {curve.first:.4g} nats: 300,000 ids start at {LARGEST_LN_V:.1f}. "
        )
    elif curve.from_start:
        fits = vocabularies_of(curve.first, curve.age)
        hypotheses = [f"as it stands it fits {fits}"] if fits else []
        for factor in factors(setup, curve, evidence.best):
            if curve.age <= 1 and not factor.is_unit and (fits := vocabularies_of(curve.first / factor.value, curve.age)):
                hypotheses.append(f"if it {factor.claim()} ({factor.words}), {fits}")
        of = f"ln of {ids:,.0f}, or log2 of {2**curve.first:,.0f}"
        note = f"the vocabulary is unknown, so the first loss is not judged: {curve.first:.4g} is {of}"
        if curve.first < math.log(16):
            note += ", right for a run from trained weights; one that began untrained shows its loss divided by something"
        result.notes.append("; ".join([note, *hypotheses]) + ". Give --vocab-size")
    else:
        result.notes.append(f"the vocabulary is unknown and the log begins at {result.place}: the scale cannot be judged")


def _what_the_start_leaves_open(result: Diagnosis, evidence: Evidence) -> Iterator[str]:
    """Notes on a first line that is in order."""
    curve, setup = result.curve, result.setup
    ratio = curve.first / setup.ln_v
    if not curve.from_start:
        yield (
            f"the log begins at {result.place}, not at a run's start: its first loss is not compared with {_expected(setup)}, "
            "and a loss divided by something cannot be told from a good one"
        )
    elif curve.age <= 1:
        high = ": a little high; the head's initial weights are large, or an auxiliary loss is mixed in"
        yield f"the first loss is {ratio:.3f} times {_expected(setup)}{high if ratio > 1.04 else ': as it should be'}"
    else:
        hidden = [f for f in factors(setup, curve, 1.0) if evidence.least <= f.value <= evidence.most and not f.is_unit]
        open_factors = " or ".join(f"{factor.value:.3g}" for factor in hidden)
        yield f"the first line, {result.place}, is {ratio:.2f} times {_expected(setup)}: right for a run from scratch" + (
            f". A factor of {open_factors} could hide in that; a log from the first step on would tell" if hidden else ""
        )


def _factor(result: Diagnosis, evidence: Evidence, why: str, named: list[Factor] | None = None) -> Finding:
    """The finding for a factor with one name, with several, or with none; sets the explanation."""
    curve, setup = result.curve, result.setup
    if named is None:
        named = contenders(evidence, setup, curve, setup.ln_v)
    if all(factor.doubt >= GUESS for factor in named):
        return _factor_without_name(result, evidence, why, named)
    first = result.explanation = named[0]
    same = [factor for factor in named if factor.value == first.value]
    others = [factor for factor in named if factor.value != first.value]
    by_heart = first.value < 1 and not curve.from_start and not why
    trained = first.value < 1 and curve.from_start and not why and not (curve.has_steps and falls_as_untrained(curve))
    exact = curve.age <= 1 and evidence.deviations(first) < 0.5
    another = first.cause in ("bits", "log10") and not exact and not why and curve.first < LARGEST_LN_V
    loose = evidence.deviations(first) > 1.3 or not (curve.from_start or why)
    rare = first.cause == "log10" and bool(why)
    certainty = "possible" if len(named) > 1 or by_heart or trained or another or rare else "likely" if loose else "very likely"
    if setup.ln_v:
        fits = f", and {_expected(setup)}"
    else:
        vocabularies = "" if first.is_unit else vocabularies_of(curve.first / first.value, curve.age)
        fits = f", as with a vocabulary of {vocabularies}" if vocabularies else ""
    text = f"{why}{first.arithmetic(curve.first)}{fits}: the shown loss {first.claim()}"
    if len(same) > 1:
        count = f"{max(first.value, 1 / first.value):g}"
        text += f", {' or '.join(factor.words for factor in same)}; both are {count}, and no log can tell them apart"
    elif not first.is_unit:
        text += f", {'possibly' if certainty == 'possible' else certainty} {first.words}"
    if others:
        text += ". Also possible: " + "; ".join(f"{f.arithmetic(curve.first)} ({f.words})" for f in others)
    if by_heart:
        text += ". Or the model knows its data by heart: no unseen text gets so low"
    if trained:
        text += ". Or the run began with trained weights"
    if another:
        text += f". Or the vocabulary is another one, of about {_ids(curve)} ids"
    return Finding("scale", certainty, text, _ONE_STEP, tuple(factor.cause for factor in named))


def _factor_without_name(result: Diagnosis, evidence: Evidence, why: str, guesses: list[Factor]) -> Finding:
    curve, setup = result.curve, result.setup
    target = f", and {_expected(setup)}" if setup.ln_v else ""
    values = (evidence.least, evidence.best, evidence.most)
    up = evidence.best > 1
    least, by, most = values if up else (1 / value for value in reversed(values))
    causes = ("multiplied" if up else "divided",)
    text = f"{why}{curve.first:.4g} at {result.place}{target}: the shown loss is {causes[0]} by about {by:.3g}"
    text += f" ({least:.3g} to {most:.3g})" + (", as a sum over so many tokens is" if by > 100 else "")
    if up and setup.ln_v and curve.low < setup.ln_v and not why:
        text, causes = f"{text}, or the initial weights are far too large", (*causes, "initialisation")
    if up and setup.ln_v and curve.from_start and curve.first < LARGEST_LN_V and not why:
        text, causes = f"{text}, or the vocabulary is another one, of about {_ids(curve)} ids", (*causes, "vocabulary")
    text += "".join(f". It may be {each.words}: {each.arithmetic(curve.first)}" for each in guesses[:2])
    result.explanation = Factor(evidence.best, causes[0], "")
    advice = f"Give --accumulation, --world-size and --sequence-length to have their products tried. {_ONE_STEP}"
    return Finding("scale", "likely", text, advice, causes)


def _ids(curve: Curve) -> str:
    """The vocabulary that such a first line would be right for, in words."""
    return f"{float(f'{math.exp(curve.first / share_of_ln_v(curve.age)[1]):.2g}'):,.0f}"


def _expected(setup: Setup) -> str:
    return f"ln({setup.vocab_size}) = {setup.ln_v:.2f}"


# ---------------------------------------------------------------- what is no scale


def _not_finite(log: TrainingLog) -> Iterator[Finding]:
    """NaN, infinities, zeros that stand for them, and what is below 0."""
    bad, zeros = np.flatnonzero(~np.isfinite(log.loss)), np.flatnonzero(log.loss == 0)
    if len(bad):
        forever = len(bad) == len(log.loss) - bad[0] and len(bad) > 1
        text = f"{len(bad)} of {len(log.loss)} losses are not finite, the first at {log.unit} {log.steps[bad[0]]:g}"
        text += ", and none is finite after it" if forever else ""
        advice = "Go on from a checkpoint before it, with a lower learning rate; weights that are NaN stay NaN."
        yield Finding("nan", "certain", text, advice)
    if len(zeros):
        norm = log.columns.get("grad_norm")
        text = f"{len(zeros)} of {len(log.loss)} losses are exactly 0, the first at {log.unit} {log.steps[zeros[0]]:g}"
        text += ", with a gradient norm of NaN" if norm is not None and np.isnan(norm[zeros]).any() else ""
        text += ": no language model gets there; loggers that filter NaN write 0"
        yield Finding("nan", "likely", text, "Switch that filter off, and look for the first NaN.")
    if len(below := np.flatnonzero(log.loss < 0)):
        text = f"{len(below)} of {len(log.loss)} losses are below 0, the first at {log.unit} {log.steps[below[0]]:g}"
        text += ": no cross-entropy is; this is another objective, or something is subtracted"
        yield Finding("negative", "certain", text, "Show the cross-entropy alone.")


def _ranks(result: Diagnosis) -> Iterator[Finding]:
    """Every rank prints a line of its own."""
    if (lines := result.log.lines_per_step) > 1:
        text = f"each {result.log.unit} stands {lines} times: every rank shows its own loss. Judged here is their mean"
        yield Finding("ranks", "very likely", text, "Sum nats and tokens over the ranks, divide last, and print once.")


def _auxiliary(result: Diagnosis) -> Iterator[Finding]:
    """A total that holds more than the cross-entropy beside it, or that moves with the auxiliary loss."""
    columns, loss = result.log.columns, result.log.loss
    aux, pure = columns.get("aux_loss"), columns.get("lm_loss")
    if pure is not None:
        known = np.flatnonzero(np.isfinite(loss) & np.isfinite(pure))
        extra = loss[known] - pure[known]
        # A rank's own cross-entropy beside the mean of all scatters to both sides; an auxiliary loss adds every time.
        if (
            len(known)
            and np.median(extra) > 2e-4 * np.median(pure[known])
            and np.mean(extra > 0) > 0.95
            and not result.explanation
        ):
            text = (
                f"shown is {loss[known[0]]:.4g}, and its cross-entropy is {pure[known[0]]:.4g}: an auxiliary loss is mixed in"
            )
            yield Finding("auxiliary", "very likely", text, "Judge the run by the cross-entropy alone.")
    elif aux is not None:
        known = np.isfinite(aux) & np.isfinite(loss)
        weight = _moves_with(loss[known], aux[known])
        if weight:
            part = f"{weight * aux[known][0]:.2g} of the first line is not cross-entropy"
            text = f"the loss moves with the auxiliary loss, {weight:.2g} for each unit: {part}"
            yield Finding("auxiliary", "likely", text, "Show the cross-entropy alone.")
        else:
            result.notes.append("an auxiliary loss is shown too; whether the loss holds it cannot be told from their movements")


def _moves_with(loss: np.ndarray, aux: np.ndarray) -> float:
    """Slope of the line-to-line changes of loss on those of aux; 0 where it is not beyond chance, or explains little."""
    if len(loss) < 20 or np.ptp(aux) == 0:
        return 0.0
    x, y = np.diff(aux, 2), np.diff(loss, 2)
    slope = float(x @ y / (x @ x))
    error = float(np.std(y - slope * x) / math.sqrt(x @ x / 3))  # neighbouring second differences share lines: a third counts
    return slope if slope > 8 * error and slope * np.std(x) > 0.3 * np.std(y) else 0.0


def _stall(result: Diagnosis) -> Iterator[Finding]:
    """The loss stays where it says nothing: at ln V, or at the frequency of the tokens."""
    log, curve, setup, true = result.log, result.curve, result.setup, result.true
    lines, ln_v = log.reference_lines, setup.ln_v
    if len(true) < 8:
        return
    begins_there = _is_flat(true) and true[0] < 1.05 * np.median(true)
    begin = 0 if begins_there else len(true) // 3  # what falls to a level and stays there begins higher
    if not _is_flat(true[begin:]):
        return
    span_steps = curve.steps[-1] - curve.steps[0]
    level = float(np.median(true[(begin + len(true)) // 2 :]))
    frozen = "lr" in log.columns and np.nanmax(log.columns["lr"]) == 0
    advice = (
        f"Causes: {'the learning rate, 0 on every line' if frozen else _NOTHING_LEARNED}. One batch over and over must fall."
    )
    settled = curve.from_start and log.unit == "step" and span_steps >= 200
    span = f"the loss stays at {level:.3f} from {log.unit} {curve.steps[begin]:g} to {curve.steps[-1]:g}"
    if ln_v and 0.985 <= level / ln_v <= 1.06:
        random = " (this data is random, the log says: there it is right)" if lines.get("floor", 0) > 0.99 * ln_v else ""
        text, short = f"{span}, and {_expected(setup)}: nothing is learned{random}", log.unit == "step" and span_steps < 200
        if short and (span_steps < 90 or _is_warming_up(log)):
            result.notes.append(f"{text} so far, as in many a warm-up")
        else:
            yield Finding("stall", "likely" if short else "very likely", text, advice)
    elif not ln_v and settled and 4 < level < LARGEST_LN_V and abs(level / true[0] - 1) < 0.03:
        text = f"{span}, its first value, which is ln of {math.exp(level):,.0f}: if the vocabulary is that, nothing is learned"
        yield Finding("stall", "likely", text, advice)
    elif ln_v and settled and begin and span_steps >= 400 and "unigram" not in lines and 0.62 <= level / ln_v < 0.95:
        text = f"{span}, {level / ln_v:.2f} times {_expected(setup)}: about what the frequencies of tokens alone give"
        if _is_flat(true[begin:], 0.005) and true[0] > 1.05 * level:
            yield Finding("stall", "possible", f"{text}, as where the context is ignored", _CONTEXT)


def _is_warming_up(log: TrainingLog) -> bool:
    """Whether the learning rate still rises at the last line."""
    lr = log.columns.get("lr", np.zeros(0))
    lr = lr[np.isfinite(lr)]
    return len(lr) > 1 and lr[-1] == lr.max() > 1.5 * lr[0]


def _is_flat(loss: np.ndarray, share: float = 0.01) -> bool:
    """Whether the last fifth lies no further from the first than `share` of it or chance; False where lines jump too much."""
    if len(loss) < 8:
        return False
    fifth = max(3, len(loss) // 5)
    level, change = float(np.median(loss[-fifth:])), float(np.median(loss[:fifth]) - np.median(loss[-fifth:]))
    blur = 3 * line_noise(loss) / math.sqrt(fifth)
    return abs(change) <= max(share * level, blur) and blur <= 0.02 * level


def _level(result: Diagnosis) -> Iterator[Finding]:
    """The second half of the curve stays at the unigram entropy, or validation turns up while training falls."""
    log, curve, lines = result.log, result.curve, dict(result.log.reference_lines)
    if result.setup.ln_v:
        lines.setdefault("uniform", result.setup.ln_v)
    steps, val_loss = (log.val_steps, log.val_loss) if result.explanation is None else (np.zeros(0), np.zeros(0))
    seen = verdict.Curve(curve.steps, result.true, steps, val_loss)
    if "uniform" in lines and (judged := verdict.judge(seen, lines)).kind == "unigram":
        yield Finding("stall", "likely", judged.text, _CONTEXT)
    # Without knowing how often the data was read, only a validation that rises is a sign.
    if len(val_loss) and val_loss[-1] > 1.02 * val_loss.min() and (by_heart := verdict.memorising(seen)):
        best = f"{log.unit} {log.val_steps[log.val_loss.argmin()]:g}"
        yield Finding("memorising", "likely", by_heart, f"Use the checkpoint from around {best}.")


def _collapse(result: Diagnosis) -> Iterator[Finding]:
    """A loss near 0: the answer stands in the input."""
    curve, true, floor = result.curve, result.true, result.log.reference_lines.get("floor", math.inf)
    last = float(np.median(true[-max(min(3, len(true)), len(true) // 10) :]))
    if last < min(0.1, floor - 0.1) and true[0] > 2:
        text = f"the loss falls to {last:.3g} nats at {result.log.unit} {curve.steps[-1]:g}; no text can be predicted so well"
        advice = "Causes: labels not shifted (label = input), attention that sees what follows, or a few samples over and over."
        yield Finding("collapse", "likely", text, advice)


def _divergence(result: Diagnosis) -> Iterator[Finding]:
    """The curve ends well above its lowest part."""
    curve, true, tenth = result.curve, result.true, max(3, len(result.true) // 10)
    if len(true) < 4 * tenth:
        ln_v = result.setup.ln_v
        if len(true) >= 3 and ln_v and min(true[-2:]) > max(1.15 * true[0], 1.05 * ln_v):
            text = f"the loss rises from {true.min():.3g} to {true[-1]:.3g}, above {_expected(result.setup)}"
            yield Finding("divergence", "likely", text, _BEFORE_THE_RISE)
        return
    begins = np.r_[np.arange(0, len(true) - tenth, max(1, tenth // 20)), len(true) - tenth]
    medians = np.array([np.median(true[i : i + tenth]) for i in begins])
    best = int(begins[medians.argmin()])
    lowest = float(medians.min())
    rise = float(medians[-1] - lowest)
    if rise > max(0.05 * lowest, 0.2, 8 * line_noise(true) / math.sqrt(tenth)):
        where = f"{result.log.unit} {curve.steps[best + tenth // 2]:g}"
        text = f"the loss rises from {lowest:.3g} around {where} to {medians[-1]:.3g} at the end"
        yield Finding("divergence", "likely", text, _BEFORE_THE_RISE)


def _noise(result: Diagnosis) -> Iterator[Finding]:
    """The mean over many sequences cannot jump as one micro-batch does."""
    setup, half = result.setup, len(result.true) // 2
    if setup.micro_batches < 2 or half < 20 or (result.explanation and result.explanation.cause == "perplexity"):
        return
    noise = line_noise(result.true[half:])
    sequences = setup.micro_batches * (setup.micro_batch_size or 1)
    # Sequence means of mixed web text and code spread by 0.3 to 0.8 nats; half as much again is beyond what data explains.
    bound = 1.2 / math.sqrt(sequences)
    figures = (
        f"lines jump by {noise:.2g} nats; the mean over {sequences} sequences{'' if setup.micro_batch_size else ' or more'}"
    )
    if noise <= bound:
        result.notes.append(
            f"{figures} may jump by up to {bound:.2g}: no sign that only a part of the step is shown, and no proof"
        )
        return
    causes = ["last micro-batch"] if (setup.accumulation or 1) > 1 else []
    causes += ["one rank"] if (setup.world_size or 1) > 1 else []
    text = f"{figures} would by less than {bound:.2g}: shown is {' or '.join(f'{cause} alone' for cause in causes)}"
    advice = "Print the mean over all micro-batches and ranks beside it: it must jump far less. Unstable training jumps, too."
    yield Finding("noise", "possible", text.replace("last", "the last"), advice, tuple(causes))
