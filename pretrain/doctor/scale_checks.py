"""Checks of a log that look for a factor between the shown and the true loss. scale.py holds the evidence for one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from pretrain.doctor.curve import ShownCurve, falls_as_untrained, share_of_ln_v
from pretrain.doctor.diagnosis import Diagnosis, LogFinding
from pretrain.doctor.scale import (
    GUESS,
    LARGEST_LN_V,
    LEAST_EVER,
    MOST,
    Evidence,
    Factor,
    factors,
    from_perplexity,
    from_some_vocabulary,
    from_start,
    from_validation,
    over_validation,
    running,
    vocabularies_of,
)
from pretrain.doctor.trials import Trial, bounds, contenders, try_factors, whole_factors

_ONE_STEP = "Print the first step twice, with accumulation 1 and 2 and the same global batch: a true loss does not change."


def check_running(result: Diagnosis) -> Iterator[LogFinding]:
    """A curve that rises from 0: it accumulates losses instead of showing them."""
    if found := running(result.log, result.curve):
        b, level = found
        if b == 1:
            shape = f"a sum that is never reset, at first by {level:.3g} per line or step"
            cure = "Reset the sum for each line"
        else:
            shape = f"a running mean that starts at 0, by {1 - b:.2g} of each new loss, about {level:.3g} at first"
            cure = f"Divide by 1 - {b:.4g}^n after n losses, or show the losses"
        text = f"the curve begins at {result.curve.first:.4g} and rises like {shape}"
        yield LogFinding("running", "very likely", text, f"{cure}. Nothing else in this log can be judged.")


def check_change(result: Diagnosis) -> Iterator[LogFinding]:
    """A factor that changes from one line to the next, as after a restart with another accumulation; one side is above ln V."""
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
    if jump[at] == 1 or not impossible or times < 1.7 or (before < after and not names):
        return
    place = f"between {result.log.unit} {curve.steps[at + width - 1]:g} and {curve.steps[at + width]:g}"
    text = f"{place} the loss goes from {before:.4g} to {after:.4g}, {times:.3g} times {'less' if after < before else 'more'}"
    why = f" at once: the meaning of the number has changed{', probably by ' + ' or '.join(names) if names else ''}"
    yield LogFinding("scale", "likely", text + why, "Judge the parts before and after as separate logs.", ("change",))


def check_scale(result: Diagnosis) -> Iterator[LogFinding]:
    """A factor between the shown and the true loss, from other figures in the log if possible, else from the entire curve."""
    log, curve, setup = result.log, result.curve, result.setup
    exact, possible = from_perplexity(log), setup.ln_v or LARGEST_LN_V
    if len(curve.loss) > 2 and curve.first > max(5 * curve.loss[1], 2 * possible) and curve.loss[1:].max() < MOST * possible:
        text = f"the first loss, {curve.first:.4g}, is far above all others, which are at most {curve.loss[1:].max():.4g}"
        yield LogFinding("start", "likely", text, "Look at the first updates and their gradient norm.", ("initialisation",))
        return
    in_nats = exact is not None and abs(math.log(exact[0].best)) < 0.05
    if exact and not in_nats:
        yield _factor_of_perplexity(result, *exact)
    elif evidence := from_validation(log, curve, setup.ln_v):
        # The ratio is constant, and that of a perplexity to a loss is not.
        trials = [each for each in try_factors(evidence, setup, curve, setup.ln_v) if each.factor.cause != "perplexity"]
        why = f"The evaluation in this log shows {1 / evidence.best:.3g} times this loss throughout. "
        if evidence.best > 1 or len(log.evaluated_loss) or contenders(trials):
            yield _factor(result, evidence, trials, why)
        else:
            result.notes.append(f"{why}Training text that is read often, or easier, looks like this")
    elif setup.ln_v is None:
        yield from _without_vocabulary(result)
    else:
        evidence = from_start(curve, setup.ln_v)
        if evidence.least > 1:
            yield _too_high(result, bounds(evidence, curve, setup.ln_v))
        elif evidence.most < 1 and not in_nats:
            yield from _too_low(result, evidence)
        else:
            result.notes += _notes_on_a_plausible_start(result, evidence)


def _factor_of_perplexity(result: Diagnosis, evidence: Evidence, name: str) -> LogFinding:
    """The loss, or the cross-entropy beside it, differs from the logarithm of the perplexity by a constant factor."""
    curve, setup = result.curve, result.setup
    trials = try_factors(evidence, setup, curve, setup.ln_v)
    bits = next((each.factor for each in trials if each.factor.cause == "bits"), None)
    if bits is None or abs(math.log(evidence.best / bits.value)) > 0.02:
        return _factor(result, evidence, trials, f"The perplexity on the same lines is exp(loss / {evidence.best:.4g}). ")
    result.explanation, causes = bits, ("bits",)
    what = {"lm_loss": "cross-entropy", "loss": "loss", "val_loss": "validation loss"}[name]
    known = {**result.log.columns, "loss": curve.loss, "val_loss": result.log.val_loss}[name]
    shown = float(known[np.isfinite(known)][0])
    text = f"the perplexity beside it is 2 to the power of the {what}: it is in bits (base 2), {bits.arithmetic(shown)} nats"
    if name == "lm_loss" and curve.first > 1.005 * shown:
        causes = (*causes, "label smoothing")
        text += f". The loss beside it, {curve.first:.4g}, is above it by label smoothing or another term"
    return LogFinding("scale", "very likely", text, "Multiply by ln 2 = 0.693 to compare it with ln V.", causes)


def _too_high(result: Diagnosis, evidence: Evidence) -> LogFinding:
    """The first line exceeds that of any healthy run."""
    curve, setup = result.curve, result.setup
    trials = try_factors(evidence, setup, curve, setup.ln_v)
    named = [*contenders(trials), *contenders(trials, trained=True)]
    ratio = curve.first / setup.ln_v
    start = f"the first loss, {curve.first:.4g}, is {ratio:.3g} times {result.expected}"
    if not named and ratio < 1.5:
        text = f"{start}: the head's initial weights are too large, an auxiliary loss is added, or the vocabulary is larger"
        advice = "Print the cross-entropy alone, and the standard deviation s of the logits: they add about s^2 / 2."
        return LogFinding("start", "likely", text, advice, ("initialisation", "auxiliary", "vocabulary"))
    if not named and curve.low < min(0.35 * curve.first, 0.7 * setup.ln_v) and ratio < 5:
        text = f"{start}, but the curve falls to {curve.low:.4g}: initial weights too large, or a factor of {_range(evidence)}"
        advice = f"Weights that were trained for another objective start so, too. {_ONE_STEP}"
        return LogFinding("start", "possible", text, advice, ("initialisation", "multiplied"))
    if not named and curve.low < LEAST_EVER * curve.first:
        text = f"{start}, but the curve falls to {curve.low:.4g}: not a factor, which would stay, but initial weights too large"
        advice = "With smaller initial weights of embedding and head the loss starts near ln V."
        return LogFinding("start", "likely", text, advice, ("initialisation",))
    return _factor(result, evidence, trials)


def _too_low(result: Diagnosis, evidence: Evidence) -> Iterator[LogFinding]:
    """The first line is below that of any healthy run from scratch; a run from trained weights may begin there."""
    curve, setup = result.curve, result.setup
    ratios, _ = over_validation(result.log, curve)  # a factor applies there too; memorising makes the ratio drift
    trials = [
        each
        for each in try_factors(evidence, setup, curve, setup.ln_v)
        if all(abs(math.log(ratio / each.factor.value)) < 0.4 for ratio in ratios)
    ]
    named = [each for each in contenders(trials) if _ends_as_from_scratch(each, curve, setup.ln_v)]
    start = f"the first loss, {curve.first:.4g} at {result.start}, is {curve.first / setup.ln_v:.2g} times {result.expected}"
    falls = falls_as_untrained(curve)
    exact = bool(named) and curve.age <= 1 and evidence.deviations(named[0]) < 1.3 and not named[0].doubt
    too_good = bool(named) and curve.last < LEAST_EVER * setup.ln_v and not named[0].is_unit
    untrained = bool(falls) and (bool(named) or (curve.last < 0.65 * curve.first and not len(ratios)))
    if named and ((exact and falls is None) or untrained or too_good):
        yield _factor(result, evidence, [each for each in trials if each.factor in named])
    elif untrained and curve.first > 0.6 * setup.ln_v:
        text = f"{start}, as for {math.exp(curve.first):,.0f} ids: a different vocabulary, or padding that counts with loss 0"
        advice = "Compare the model's vocabulary with the tokenizer's."
        yield LogFinding("start", "likely", text, advice, ("vocabulary", "mask"))
    elif curve.from_start:
        would = "".join(f"; there {each.arithmetic(curve.first)} ({each.words}) would explain it" for each in named[:2])
        would = would or (f"; there it would be divided by about {1 / evidence.best:.2g}" if untrained else "")
        result.notes.append(f"{start}: right for a run from trained weights, too low for one from scratch{would}")
    else:
        result.notes += _notes_on_a_plausible_start(result, evidence)


def _ends_as_from_scratch(factor: Factor, curve: ShownCurve, ln_v: float) -> bool:
    """True if the factor leaves an end that a run from scratch reaches in so many steps."""
    if not curve.has_steps or factor.is_unit:
        return True
    least, _, _ = share_of_ln_v(curve.age + curve.steps[-1] - curve.steps[0])
    return factor.true(curve.last) > 0.6 * least * ln_v


def _without_vocabulary(result: Diagnosis) -> Iterator[LogFinding]:
    """Only a loss that no vocabulary explains is a finding; hypotheses become notes."""
    curve, setup = result.curve, result.setup
    evidence, ids = from_some_vocabulary(curve), math.exp(min(curve.first, 700))
    if curve.first > MOST * LARGEST_LN_V and curve.low < 0.35 * curve.first and curve.low < 6 and curve.first < 60:
        text = f"the first loss, {curve.first:.4g}, is that of no vocabulary, but the curve falls to {curve.low:.3g}"
        text += ": initial weights too large, other labels than in pretraining, or a factor"
        trials = try_factors(evidence, setup, curve, None)
        text += "".join(f". It may be {each.words}: {each.arithmetic(curve.first)}" for each in contenders(trials)[:3])
        yield LogFinding("start", "possible", text, _ONE_STEP, ("initialisation", "multiplied"))
    elif curve.first > MOST * LARGEST_LN_V:
        why = f"No vocabulary starts at {curve.first:.4g} nats: 300,000 ids start at {LARGEST_LN_V:.1f}. "
        yield _factor(result, evidence, try_factors(evidence, setup, curve, None), why)
    elif curve.from_start:
        fits = vocabularies_of(curve.first, curve.age)
        hypotheses = [f"unscaled it fits {fits}"] if fits else []
        for factor in factors(setup, curve, evidence.best):
            if curve.age <= 1 and not factor.is_unit and (fits := vocabularies_of(curve.first / factor.value, curve.age)):
                hypotheses.append(f"if it {factor.claim()} ({factor.words}), {fits}")
        of = f"ln of {ids:,.0f}, or log2 of {2**curve.first:,.0f}"
        note = f"the vocabulary is unknown, so the first loss is not judged: {curve.first:.4g} is {of}"
        if curve.first < math.log(16):
            note += ", right for a run from trained weights; in one from scratch the shown loss is divided by something"
        result.notes.append("; ".join([note, *hypotheses]) + ". Give --vocab-size")
    else:
        result.notes.append(f"the vocabulary is unknown and the log begins at {result.start}: the scale cannot be judged")


def _notes_on_a_plausible_start(result: Diagnosis, evidence: Evidence) -> Iterator[str]:
    """Notes on a first line in the right range: what it shows, and what it leaves open."""
    curve, setup = result.curve, result.setup
    ratio = curve.first / setup.ln_v
    if not curve.from_start:
        yield (
            f"the log begins at {result.start}, not at the start of a run: its first loss is not compared with "
            f"{result.expected}, and a loss divided by something cannot be told from a good one"
        )
    elif curve.age <= 1:
        high = ": a little high; the head's initial weights are large, or an auxiliary loss is added"
        yield f"the first loss is {ratio:.3f} times {result.expected}{high if ratio > 1.04 else ', as expected'}"
    else:
        hidden = [f for f in factors(setup, curve, 1.0) if evidence.least <= f.value <= evidence.most and not f.is_unit]
        values = " or ".join(f"{factor.value:.3g}" for factor in hidden)
        doubt = f". A factor of {values} could hide in that; a log from the first step on would tell" if hidden else ""
        yield f"the first line, {result.start}, is {ratio:.2f} times {result.expected}: right for a run from scratch{doubt}"


# ---------------------------------------------------------------- the finding about a factor


def _factor(result: Diagnosis, evidence: Evidence, trials: list[Trial], why: str = "") -> LogFinding:
    """The finding for a factor with one name, several or none; sets the explanation. `why`: evidence beside the curve."""
    named, trained = contenders(trials), contenders(trials, trained=True)
    has_name = not all(factor.doubt >= GUESS for factor in named)
    by_trained = bool(trained and result.setup.ln_v and not why and not has_name)
    if has_name:
        finding = _named_factor(result, evidence, named, why)
    elif by_trained:
        finding = _factor_of_trained(result, evidence, trained)
    else:
        finding = _factor_without_name(result, evidence, named, why)
    return replace(finding, text=finding.text + _ruled_out(trials, evidence, by_trained))


def _named_factor(result: Diagnosis, evidence: Evidence, named: list[Factor], why: str) -> LogFinding:
    curve, first = result.curve, named[0]
    result.explanation = first
    alternatives = _other_explanations(curve, evidence, first, why)
    trained = first.value < 1 and not why and not _is_exactly_divided(curve, evidence, first)  # as good an explanation
    if len(named) > 1 or alternatives or trained:
        certainty = "possible" if first.value < 1 else "likely"
    else:
        certainty = "likely" if evidence.deviations(first) > 1.3 or not (curve.from_start or why) else "very likely"
    text = f"{why}{_leaves(curve, first)}{_target(result, first)}: the shown loss {first.claim()}"
    same = [factor for factor in named if factor.value == first.value]
    others = [factor for factor in named if factor.value != first.value]
    if len(same) > 1:
        count = f"{max(first.value, 1 / first.value):g}"
        text += f", {' or '.join(factor.words for factor in same)}; both are {count}, and no log can tell them apart"
    elif not first.is_unit:
        text += f", {'possibly' if others or alternatives else certainty} {first.words}"
    if others:
        text += ". Also possible: " + "; ".join(f"{each.arithmetic(curve.first)} ({each.words})" for each in others)
    text += "".join(f". Or {each}" for each in alternatives)
    return LogFinding("scale", certainty, text, _ONE_STEP, tuple(factor.cause for factor in named))


def _is_exactly_divided(curve: ShownCurve, evidence: Evidence, factor: Factor) -> bool:
    """True if step 1 is ln V divided by a plain count and the curve then falls as in a run from scratch."""
    exact = curve.age <= 1 and evidence.deviations(factor) < 1.3 and not factor.doubt
    return exact and bool(falls_as_untrained(curve))


def _factor_of_trained(result: Diagnosis, evidence: Evidence, trained: list[Factor]) -> LogFinding:
    """No run from scratch explains the curve by a given factor, but a run from trained weights does."""
    curve, first = result.curve, trained[0]
    result.explanation = first
    bound = curve.first / result.setup.ln_v
    text = f"{_leaves(curve, first)}: the shown loss {first.claim()}, likely {first.words}"
    text += f", if training started from trained weights. Without that flag it is only known to be at least {bound:.3g}"
    text += f" (about {evidence.best:.3g} in a run from scratch)"
    if others := "; ".join(f"{each.arithmetic(curve.first)} ({each.words})" for each in trained[1:]):
        text += f". Also possible: {others}"
    return LogFinding("scale", "likely", text, _ONE_STEP, (*(each.cause for each in trained), "multiplied"))


def _leaves(curve: ShownCurve, factor: Factor) -> str:
    """What a factor leaves of the first loss and, if there are enough lines, of the others."""
    text = factor.arithmetic(curve.first)
    if len(curve.loss) < 8 or factor.is_unit:
        return text
    return (
        f"{text} at first, {factor.true(float(np.mean(curve.loss))):.3g} on average, {factor.true(curve.last):.3g} at the end"
    )


def _ruled_out(trials: list[Trial], evidence: Evidence, trained: bool) -> str:
    """Sentences about each given setting that is not named as an explanation."""
    if evidence.best < 1:
        return ""
    tried = [each for each in trials if each.factor.value > 1 and not each.factor.is_unit and each.factor.doubt < GUESS]
    said = [f"{each.factor.value:g} ({each.factor.words}) {each.objection}" for each in tried if not each.fits]
    text = f". Ruled out: {'; '.join(said)}" if said else ""
    if not trained and (low := [f"{each.factor.value:g} ({each.factor.words})" for each in tried if each.trained]):
        text += f". Only if training started from trained weights: {', '.join(low)}"
    return text


def _other_explanations(curve: ShownCurve, evidence: Evidence, factor: Factor, why: str) -> list[str]:
    """Reasons for such a first line that are not a factor, if nothing else in the log speaks for the factor."""
    if why:
        return []
    found = []
    if factor.value < 1 and not curve.from_start:
        found.append("the model has memorised its data: no unseen text gets so low")
    elif factor.value < 1 and not (curve.has_steps and falls_as_untrained(curve)):
        found.append("the run started from trained weights")
    exact = curve.age <= 1 and evidence.deviations(factor) < 0.5
    if factor.cause == "bits" and not exact and curve.first < LARGEST_LN_V:
        found.append(f"the vocabulary is a different one, of about {_ids(curve)} ids")
    return found


def _target(result: Diagnosis, factor: Factor) -> str:
    """The loss that an untrained model has, as a part of a sentence; may be empty."""
    if result.setup.ln_v:
        return f", and {result.expected}"
    fits = "" if factor.is_unit else vocabularies_of(result.curve.first / factor.value, result.curve.age)
    return f", as with a vocabulary of {fits}" if fits else ""


def _factor_without_name(result: Diagnosis, evidence: Evidence, guesses: list[Factor], why: str) -> LogFinding:
    curve, setup = result.curve, result.setup
    up, values = evidence.best > 1, (evidence.least, evidence.best, evidence.most)
    least, by, most = values if up else (1 / value for value in reversed(values))
    by = min(by, math.sqrt(least * most)) if up else by
    causes, alone = ("multiplied" if up else "divided",), up and not why
    text = f"{why}{curve.first:.4g} at {result.start}" + (f", and {result.expected}" if setup.ln_v else "")
    text += f": the shown loss is {causes[0]} by about {by:.3g} ({least:.3g} to {most:.3g})"
    text += ", as a sum over so many tokens would be" if by > 100 else ""
    if alone and setup.ln_v and curve.low < setup.ln_v:
        text, causes = f"{text}, or the initial weights are far too large", (*causes, "initialisation")
    if alone and setup.ln_v and curve.from_start and curve.first < LARGEST_LN_V:
        text, causes = f"{text}, or the vocabulary is a different one, of about {_ids(curve)} ids", (*causes, "vocabulary")
    if up and (whole := whole_factors(least, by, most)):
        text += f". Usual whole factors in that range: {', '.join(map(str, whole))}"
    if alone:
        bound = curve.first / (setup.ln_v or LARGEST_LN_V)
        text += f". If training started from trained weights, it is only known to be at least {bound:.3g}"
    text += "".join(f". It may be {each.words}: {each.arithmetic(curve.first)}" for each in guesses[:2])
    result.explanation = Factor(evidence.best, causes[0], "")
    flags = {"--accumulation": setup.accumulation, "--world-size": setup.world_size, "--sequence-length": setup.sequence_length}
    missing = [flag for flag, value in flags.items() if value is None]
    advice = f"Give {', '.join(missing)} to have them and their products tried. {_ONE_STEP}" if missing else _ONE_STEP
    return LogFinding("scale", "likely", text, advice, causes)


def _range(evidence: Evidence) -> str:
    return f"about {evidence.best:.3g} ({evidence.least:.3g} to {evidence.most:.3g})"


def _ids(curve: ShownCurve) -> str:
    """The size of a vocabulary for which such a first line would be right."""
    return f"{float(f'{math.exp(curve.first / share_of_ln_v(curve.age)[1]):.2g}'):,.0f}"
