"""Why two runs differ: their settings compared in meaning, then the first step whose losses differ by more than the noise.

It reads the folders of runs (config.yaml, metrics.jsonl, environment.json), and samples of token files where these still are.
No torch. What differs is sorted by what it can do: bend the curve, or only round sums in another order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pretrain import UserError, schema
from pretrain.config import Config, ConfigError, load
from pretrain.data.indexed import DataError, TokenFile
from pretrain.data.tokenizer import Tokenizer
from pretrain.optim.schedule import lr_at
from pretrain.report import environment

# What rounding alone does to a loss, as a share of it, grows as the square of the step until it is lost in the scatter of the
# lines. Measured in fp32, one process against two: 9e-7 at step 100, 7e-6 at 200, 7e-5 at 400; the bounds are ten times that.
ROUNDING = {"fp32": 1e-5, "bf16": 2e-3}
ROUNDING_GROWS_OVER_STEPS = 50.0
SIGMAS = 4.0
_STEPS_TRIED = 16
_SETTINGS_THAT_BEND = ("optimizer", "model", "train.max_skipped_steps", "train.on_divergence", "data.document_mask")
_SEEN_OTHERWISE = ("optimizer.lr",)
"""Compared in meaning: as the learning rate at equal tokens."""


class CompareError(UserError):
    """A folder that holds no run; the message is for the user."""


class Difference(NamedTuple):
    """One thing in which two runs differ."""

    what: str
    """Stable, as learning-rate."""
    text: str
    bends: bool
    """Whether it can bend the curve; else it only rounds sums in another order, or does nothing."""


@dataclass
class Side:
    """What the folder of a run says."""

    name: str
    config: Config
    environment: dict
    steps: np.ndarray  # (N,) logging steps
    loss: np.ndarray  # (N,) nats per token, since the last line
    lr: np.ndarray  # (N,)
    tokens: np.ndarray  # (N,) valid tokens since the start
    total_steps: int
    skipped_positions: list[list[int]] = field(default_factory=list)

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""
        return self.config.batch.global_batch_size * self.config.data.sequence_length

    @property
    def start(self) -> dict:
        """The start that made most recent steps."""
        return (self.environment.get("starts") or [{}])[-1]

    @property
    def precision(self) -> str:
        """Of the engine."""
        return self.start.get("precision") or self.config.engine.precision or "fp32"


def read_side(directory: Path) -> Side:
    """The run in `directory`. Raises CompareError."""
    try:
        config = load(["--config", str(directory / "config.yaml")], world_size=None)
        lines = (directory / "metrics.jsonl").read_bytes().split(b"\n")
    except (ConfigError, OSError) as error:
        raise CompareError(f"{directory}: not the folder of a run ({error})") from None
    records = []
    for line in filter(None, lines):
        try:
            records.append(json.loads(line))
        except ValueError:
            continue  # the last one may be in writing
    logged = [record for record in records if "loss" in record]
    if len(logged) < 2:
        raise CompareError(f"{directory / 'metrics.jsonl'}: fewer than two logging steps, so there is nothing to compare")
    columns = {key: np.array([_number(each.get(key)) for each in logged]) for key in ("step", "loss", "lr", "tokens")}
    made_with = environment.read(directory)
    total = config.train.max_steps or made_with.get("total_steps") or int(columns["step"][-1])
    return Side(
        directory.name, config, made_with, columns["step"].astype(int), columns["loss"], columns["lr"], columns["tokens"],
        total, [each["skipped_positions"] for each in records if "skipped_positions" in each],
    )  # fmt: skip


def _number(value: float | None) -> float:
    return math.nan if value is None else value


# ---------------------------------------------------------------- settings, in meaning


def differences(a: Side, b: Side) -> list[Difference]:
    """All that is recorded and differs, what bends the curve first, the likeliest first."""
    found = [
        *_batch(a, b),
        *_learning_rate(a, b),
        *_data(a, b),
        *_seeds(a, b),
        *_settings(a, b),
        *_made_with(a, b),
    ]
    return sorted(found, key=lambda each: not each.bends)


def _learning_rate(a: Side, b: Side) -> Iterator[Difference]:
    """As logged, at equal tokens; and whether each run follows its own schedule."""
    if deviating := [(side.name, deviation) for side in (a, b) if (deviation := _off_schedule(side))]:
        for name, deviation in deviating:
            yield Difference("learning-rate", f"{name} does not follow its own schedule: {deviation}", True)
        return
    last = min(a.tokens[-1], b.tokens[-1])
    places = np.union1d(a.tokens, b.tokens)
    places = places[(places >= max(a.tokens[0], b.tokens[0])) & (places <= last)]
    # Between two lines the rate is not known: where the batches differ, a step of tolerance to both sides.
    slack = 0 if a.batch_tokens == b.batch_tokens else max(a.batch_tokens, b.batch_tokens)
    if slack:
        rates = [[_scheduled(side, tokens) for tokens in places.tolist()] for side in (a, b)]
    else:
        places = np.intersect1d(a.tokens, b.tokens)
        rates = [side.lr[np.searchsorted(side.tokens, places)].tolist() for side in (a, b)]
    for tokens, mine, theirs in zip(places.tolist(), *rates, strict=True):
        near = [_scheduled(b, max(1, tokens + way * slack)) for way in (-1, 1)] if slack else [theirs]
        if not min(near) * (1 - 1e-6) <= mine <= max(near) * (1 + 1e-6):
            text = f"at {tokens:,.0f} tokens {mine:.3g} in {a.name} and {theirs:.3g} in {b.name}"
            yield Difference("learning-rate", f"{text}, the first of {len(places)} places compared", True)
            return


def _scheduled(side: Side, tokens: float) -> float:
    step = min(max(1, round(tokens / side.batch_tokens)), side.total_steps)
    return lr_at(step, side.config.schedule, side.config.optimizer.lr, side.total_steps)


def _off_schedule(side: Side) -> str | None:
    """How the logged rates differ from the settings'; null: they do not."""
    schedule, peak, total = side.config.schedule, side.config.optimizer.lr, side.total_steps

    def at(steps: np.ndarray) -> np.ndarray:
        return np.array([lr_at(min(max(1, step), total), schedule, peak, total) for step in steps.tolist()])

    if np.allclose(side.lr, at(side.steps), rtol=1e-6, atol=0):
        return None
    first = int(np.argmax(~np.isclose(side.lr, at(side.steps), rtol=1e-6, atol=0)))
    said = (
        f"at step {side.steps[first]} {side.lr[first]:.4g}, where the settings give {at(side.steps[first : first + 1])[0]:.4g}"
    )
    for times in range(2, _STEPS_TRIED + 1):
        if np.allclose(side.lr, at(side.steps * times), rtol=1e-6, atol=0):
            return f"{said}, as if stepped {times} times an update"
    factors = side.lr / at(side.steps)
    return f"{said}: {factors[0]:.4g} times that all along" if np.ptp(factors) < 1e-6 * factors[0] else said


def _batch(a: Side, b: Side) -> Iterator[Difference]:
    if a.batch_tokens != b.batch_tokens:
        sizes = " and ".join(
            f"{each.config.batch.global_batch_size} x {each.config.data.sequence_length} = {each.batch_tokens:,}"
            for each in (a, b)
        )
        yield Difference("batch", f"the tokens of a step are {sizes}", True)
    elif a.config.data.sequence_length != b.config.data.sequence_length:
        lengths = f"{a.config.data.sequence_length} and {b.config.data.sequence_length}"
        yield Difference("sequence-length", f"samples have {lengths} tokens, with equally many tokens a step", True)
    per_step = [each.tokens[-1] / each.steps[-1] / each.batch_tokens for each in (a, b)]
    if abs(per_step[0] - per_step[1]) > 1e-9:
        shares = " and ".join(f"{share:.2%}" for share in per_step)
        yield Difference("valid-tokens", f"{shares} of the tokens count as labels", True)
    if a.skipped_positions != b.skipped_positions:
        text = f"samples left out after rollbacks: {a.skipped_positions or 'none'} and {b.skipped_positions or 'none'}"
        yield Difference("rollbacks", text, True)


def _data(a: Side, b: Side) -> Iterator[Difference]:
    """Order hash first; if it differs, why: seals, then the files."""
    mine, theirs = (each.environment.get("data", {}) for each in (a, b))
    if mine.get("quarantine") != theirs.get("quarantine"):
        counts = " and ".join(
            str(sum(end - first for _, first, end in each.get("quarantine") or [])) for each in (mine, theirs)
        )
        yield Difference("quarantine", f"{counts} samples are in quarantine", True)
    # The seed stands in the order, too: it is named by itself.
    orders = [str(each.get("order")).replace(f"seed {side.config.run.seed},", "") for each, side in ((mine, a), (theirs, b))]
    if orders[0] == orders[1]:
        return
    if (kinds := [_kind(side) for side in (a, b)]) != ["", ""] or not a.config.data.train:
        yield Difference("data", f"generated data: {kinds[0] or 'none'} and {kinds[1] or 'none'}", True)
        return
    if len(a.config.data.train) != len(b.config.data.train):
        yield Difference("sources", f"{len(a.config.data.train)} and {len(b.config.data.train)} sources", True)
        return
    weights = [[each.weight for each in side.config.data.train] for side in (a, b)]
    if weights[0] != weights[1]:
        yield Difference("weights", f"sources are blended {weights[0]} and {weights[1]}", True)
    files = [_about_files(side) for side in (a, b)]
    changed = [list(_why_other_tokens(*each)) for each in zip(*files, strict=True) if each[0] != each[1]]
    if sorted(map(str, files[0])) == sorted(map(str, files[1])) and files[0] != files[1]:
        yield Difference("order", "the same sources stand in another order, so samples come in another", True)
    else:
        yield from (difference for each in changed for difference in each)
    if weights[0] == weights[1] and not changed and a.config.data.sequence_length == b.config.data.sequence_length:
        yield Difference("order", f"the samples or their order differ: {orders[0]} and {orders[1]}", True)


def _kind(side: Side) -> str:
    synthetic = side.config.data.synthetic
    return f"{synthetic.kind}, {synthetic.num_samples} samples" if synthetic else ""


def _about_files(side: Side) -> list[dict]:
    """What seals and heads of files say about each source."""
    seals = list(side.environment.get("data", {}).get("seals", {}).values())
    about = []
    for i, source in enumerate(side.config.data.train):
        facts = dict(seals[i]) if i < len(seals) else {}
        try:
            file = TokenFile(source.path)
            if file.fingerprint() == facts.get("fingerprint"):  # not if it has been made anew since
                end = facts.get("end_of_document_id", _end_of_document(side))
                facts |= {"num_tokens": file.num_tokens, "num_documents": file.num_documents, "dtype": file.dtype.name}
                if end is not None:
                    facts["ends"] = float(np.mean(file.sample() == end))
        except (DataError, OSError):
            pass  # the files are gone: the seals have to do
        about.append(facts)
    return about


def _end_of_document(side: Side) -> int | None:
    try:
        return Tokenizer.load(side.config.tokenizer.path).end_of_document_id if side.config.tokenizer.path else None
    except DataError:
        return None


def _why_other_tokens(mine: dict, theirs: dict) -> Iterator[Difference]:
    """Two sources that are not the same tokens: the most telling reason."""
    ends = [each.get("ends") for each in (mine, theirs)]
    pair = {key: (mine.get(key), theirs.get(key)) for key in ("tokenizer_fingerprint", "vocab_size", "corpus", "shuffled")}
    tokenizers, corpora = pair["tokenizer_fingerprint"], [(each or {}).get("sha256") for each in pair["corpus"]]
    if None not in ends and (0 in ends) and ends[0] != ends[1]:
        rates = " and ".join("never" if not rate else f"once in {1 / rate:,.0f} tokens" for rate in ends)
        yield Difference("end-of-document", f"the end-of-document id stands {rates}", True)
    elif tokenizers[0] != tokenizers[1] and None not in tokenizers:
        text = " and ".join(f"{each['tokenizer_path']} ({each['vocab_size']} ids)" for each in (mine, theirs))
        text = f"the tokens were made by {text}: losses of a token do not compare, bits per byte do"
        yield Difference("tokenizer", text, True)
    elif corpora[0] != corpora[1]:
        sizes = f"{mine.get('num_tokens', 0):,} and {theirs.get('num_tokens', 0):,} tokens"
        yield Difference("corpus", f"the text is another one ({sizes})", True)
    elif pair["shuffled"][0] != pair["shuffled"][1]:
        yield Difference("shuffled", "the same text, with documents shuffled in one run and not in the other", True)
    else:
        sizes = f"{mine.get('num_tokens', 0):,} and {theirs.get('num_tokens', 0):,} tokens"
        yield Difference("tokens", f"the same text as other tokens, or in another order ({sizes})", True)


def _seeds(a: Side, b: Side) -> Iterator[Difference]:
    if a.config.run.seed != b.config.run.seed:
        seeds = f"{a.config.run.seed} and {b.config.run.seed}"
        yield Difference("seed", f"run.seed is {seeds}: other initial weights, other order of samples", True)


def _settings(a: Side, b: Side) -> Iterator[Difference]:
    """Keys that differ and have not been compared in meaning."""
    mine, theirs = (schema.flatten(schema.to_dict(side.config)) for side in (a, b))
    for side, flat in ((a, mine), (b, theirs)):
        resolved = side.environment.get("model", {}).get("settings", {})
        flat |= {f"model.{key}": value for key, value in schema.flatten(resolved).items()}
    for key in sorted(mine.keys() | theirs.keys()):
        values = mine.get(key), theirs.get(key)
        if values[0] == values[1] or key in _SEEN_OTHERWISE:
            continue
        text = f"{key} is {schema.shown(values[0])} and {schema.shown(values[1])}"
        if any(key == each or key.startswith(f"{each}.") for each in _SETTINGS_THAT_BEND):
            yield Difference(key, text, True)
        elif key.startswith(("engine.", "batch.micro")):
            yield Difference(key, text, False)


def _made_with(a: Side, b: Side) -> Iterator[Difference]:
    """Processes, devices, versions and code."""
    mine, theirs = a.start, b.start
    for what, key, bends in (("world-size", "world_size", False), ("device", "device", False), ("precision", "precision", True),
                             ("python", "python", False)):  # fmt: skip
        if mine.get(key) != theirs.get(key):
            yield Difference(what, f"{key} is {mine.get(key)} and {theirs.get(key)}", bends)
    versions = [each.get("versions", {}) for each in (mine, theirs)]
    for name in sorted(versions[0].keys() | versions[1].keys()):
        if (pair := [each.get(name) for each in versions])[0] != pair[1]:
            yield Difference("version", f"{name} is {pair[0]} and {pair[1]}", False)
    if mine.get("git") != theirs.get("git"):
        yield Difference("code", f"the program is {_code(mine)} and {_code(theirs)}", False)
    elif (mine.get("git") or {}).get("dirty"):
        yield Difference("code", f"both run {_code(mine)}: what was changed is not known", False)


def _code(start: dict) -> str:
    git = start.get("git")
    return (
        f"commit {git['commit'][:12]}{' with changes that are not committed' * git['dirty']}" if git else "of no known commit"
    )


# ---------------------------------------------------------------- the curves


class Parting(NamedTuple):
    """Where two curves part."""

    common: int
    """Places compared: steps, or token counts where the batches differ."""
    equal_to: int | None
    """Last step up to which all losses are equal to the last bit; null: not even the first."""
    step: int | None
    """The first step from which the difference exceeds the noise and goes on to do so; null: there is none."""
    losses: tuple[float, float]
    """There."""
    allowed: float
    """The noise there, nats."""
    noise: str
    """What was taken for the noise."""


def parting(a: Side, b: Side, found: list[Difference], twin: Side | None = None) -> Parting:
    """The first step whose difference is more than noise.

    The noise is that of `twin`, a repetition of `a`, where there is one: three times the largest difference so far. Runs that
    read the same samples from the same weights differ by rounding; others by the scatter of their lines around their own trend.
    """
    if a.batch_tokens == b.batch_tokens:
        steps = np.intersect1d(a.steps, b.steps)
        mine, theirs = (side.loss[np.searchsorted(side.steps, steps)] for side in (a, b))
    else:
        places = a.tokens[(a.tokens >= b.tokens[0]) & (a.tokens <= b.tokens[-1])]
        steps = a.steps[np.isin(a.tokens, places)]
        mine, theirs = a.loss[np.isin(a.tokens, places)], np.interp(places, b.tokens, b.loss)
    if not len(steps):
        raise CompareError(f"{a.name} and {b.name} have no logging step in common")
    gap = np.abs(mine - theirs)
    gap[~np.isfinite(mine) & ~np.isfinite(theirs)] = 0
    gap[~np.isfinite(gap)] = np.inf
    order_differs = {"batch", "sequence-length", "seed", "quarantine", "data", "sources", "weights", "order", "end-of-document",
                     "tokenizer", "corpus", "shuffled", "tokens", "rollbacks"} & {each.what for each in found}  # fmt: skip
    if twin is not None:
        shared = np.intersect1d(a.steps, twin.steps)
        twins = np.abs(a.loss[np.searchsorted(a.steps, shared)] - twin.loss[np.searchsorted(twin.steps, shared)])
        largest = np.maximum.accumulate(twins)[np.clip(np.searchsorted(shared, steps, side="right") - 1, 0, None)]
        allowed, noise = 3 * largest, f"three times what {a.name} and its twin {twin.name} differ by"
    elif order_differs:
        scatter = math.hypot(line_scatter(mine), line_scatter(theirs))
        allowed, noise = np.full(len(steps), SIGMAS * scatter), f"{SIGMAS:.0f} sigma of how lines scatter around their trend"
    else:
        share = max(ROUNDING[side.precision] for side in (a, b))
        rounding = share * np.abs(mine) * (1 + (steps / ROUNDING_GROWS_OVER_STEPS) ** 2)
        allowed = np.minimum(rounding, SIGMAS * max(line_scatter(mine), share))
        noise = "what rounding alone does: same samples, same weights"
    beyond = gap > allowed
    different = np.flatnonzero(gap > 0)
    first = next((int(i) for i in np.flatnonzero(beyond) if np.mean(beyond[i:]) > 0.5), None)
    unequal = int(different[0]) if len(different) else len(steps)
    equal_to = int(steps[unequal - 1]) if unequal else None
    at = len(steps) - 1 if first is None else first
    losses = float(mine[at]), float(theirs[at])
    return Parting(len(steps), equal_to, None if first is None else int(steps[first]), losses, float(allowed[at]), noise)


def line_scatter(loss: np.ndarray) -> float:
    """Standard deviation of lines around their neighbours, nats; robust, blind to any smooth trend."""
    finite = loss[np.isfinite(loss)]
    if len(finite) < 4:
        return math.inf
    second = finite[:-2] - 2 * finite[1:-1] + finite[2:]
    return float(1.4826 * np.median(np.abs(second)) / math.sqrt(6))


def verdict(a: Side, b: Side, found: list[Difference], where: Parting) -> str:
    """One sentence or two."""
    bending, other = [each for each in found if each.bends], [each for each in found if not each.bends]
    if where.step is None:
        same = f"{a.name} and {b.name} agree over {where.common} common lines, to {where.allowed:.2g} nats"
        if bending:
            return f"{same}, although they differ in {_listed(bending)}"
        return f"{same}" + (f"; they differ in {_listed(other)}, which changes no more than rounding" if other else "")
    parted = f"{a.name} and {b.name} part at step {where.step}"
    if bending:
        return f"{parted}. What can explain it: {_listed(bending)}"
    if other:
        return f"{parted}, and no setting explains it. Suspect {_listed(other)}"
    return f"{parted}, and nothing that is recorded differs: repeat {a.name} to see its noise (--twin), or suspect the hardware"


def _listed(found: list[Difference]) -> str:
    return "; ".join(f"{each.what} ({each.text})" for each in found)
