"""Finds why two runs differ: compares their settings by effect, then finds the first step whose losses differ beyond the noise.

Reads the folders of runs as plain data: config.yaml, metrics.jsonl, environment.json. `Run` has fields for facts that only the
program that trained knows; tools/compare_runs.py fills them. Each difference is classified by its effect: it can change the
curve, or only the rounding of sums.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from pretrain import UserError
from pretrain.doctor.noise import line_noise
from pretrain.files import iter_json_lines, read_json_object

# Rounding alone changes a loss by a fraction that grows with the square of the step, until the scatter of the lines hides it.
# Measured in fp32, one process against two: 9e-7 at step 100, 7e-6 at 200, 7e-5 at 400; the bounds are ten times that.
ROUNDING = {"fp32": 1e-5, "bf16": 2e-3, "fp8": 1e-2}
ROUNDING_GROWS_OVER_STEPS = 50.0
SIGMAS = 4.0
_MOST_STEPS_PER_UPDATE = 16
_CHANGES_THE_CURVE = ("optimizer", "model", "train.max_skipped_steps", "train.on_divergence", "data.document_mask")
_ROUNDS = ("engine.", "batch.micro")
_COMPARED_BY_EFFECT = ("optimizer.lr",)  # as the learning rate at equal tokens
OTHER_SAMPLES = {"batch", "sequence-length", "seed", "quarantine", "data", "sources", "weights", "order", "end-of-document",
                 "tokenizer", "corpus", "shuffled", "tokens", "rollbacks"}  # fmt: skip
"""Names of the differences that make two runs read different samples."""


class CompareError(UserError):
    """A folder that does not hold a run, or two runs without a common step."""


class Difference(NamedTuple):
    """One thing in which two runs differ."""

    what: str
    """A stable name, e.g. learning-rate."""
    text: str
    bends: bool
    """True if it can change the curve, False if it changes only the rounding of sums, or nothing."""


@dataclass
class Run:
    """The content of a run's folder."""

    name: str
    settings: dict[str, Any]
    """config.yaml; the program that trained may add keys that its older versions did not have."""
    environment: dict
    steps: np.ndarray  # (N,) logging steps
    loss: np.ndarray  # (N,) nats per token, since the last line
    lr: np.ndarray  # (N,)
    tokens: np.ndarray  # (N,) valid tokens since the start
    total_steps: int
    skipped_positions: list[list[int]]
    sources: list[dict]
    """Facts about each entry of data.train: its metadata sidecar, as environment.json keeps it. The program that trained may
    add num_tokens, num_documents, dtype and `ends`, the fraction of tokens that end a document."""
    scheduled_lr: Callable[[int], float] | None = None
    """Learning rate of a step according to the settings; None: unknown, and only logged rates are compared."""

    def setting(self, key: str) -> Any:
        """The value of a dotted key; None if the run does not have it."""
        value: Any = self.settings
        for word in key.split("."):
            value = value.get(word) if isinstance(value, dict) else None
        return value

    @property
    def sequence_length(self) -> int:
        """Tokens per sample."""
        return self.setting("data.sequence_length")

    @property
    def batch_tokens(self) -> int:
        """Tokens per step."""
        return self.setting("batch.global_batch_size") * self.sequence_length

    @property
    def start(self) -> dict:
        """Environment of the start that made the newest steps."""
        return (self.environment.get("starts") or [{}])[-1]

    @property
    def precision(self) -> str:
        """Precision of the engine, a key of ROUNDING."""
        return self.start.get("precision") or self.setting("engine.precision") or "fp32"


def read_run(folder: Path) -> Run:
    """The run in `folder`. Raises CompareError."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        columns, skipped = _read_metrics(folder / "metrics.jsonl")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CompareError(f"{folder}: not the folder of a run ({error})") from None
    environment = read_json_object(folder / "environment.json")
    if len(columns["step"]) < 2:
        raise CompareError(f"{folder / 'metrics.jsonl'}: fewer than two logging steps, so there is nothing to compare")
    run = Run(
        folder.name, settings, environment, columns["step"].astype(int), columns["loss"], columns["lr"], columns["tokens"],
        0, skipped, [],
    )  # fmt: skip
    if not all(isinstance(run.setting(key), int) for key in ("batch.global_batch_size", "data.sequence_length")):
        raise CompareError(f"{folder / 'config.yaml'}: lacks batch.global_batch_size or data.sequence_length")
    run.total_steps = run.setting("train.max_steps") or environment.get("total_steps") or int(columns["step"][-1])
    seals = list(environment.get("data", {}).get("seals", {}).values())
    run.sources = [dict(seals[i]) if i < len(seals) else {} for i in range(len(run.setting("data.train") or []))]
    return run


def _read_metrics(path: Path) -> tuple[dict[str, np.ndarray], list[list[int]]]:
    """(columns of the logging steps, each (N,); skipped positions); one line in memory at a time. Raises OSError."""
    columns, skipped = {key: array("d") for key in ("step", "loss", "lr", "tokens")}, []
    for _, record in iter_json_lines(path):
        if record and "loss" in record:
            for key, column in columns.items():
                value = record.get(key)
                column.append(math.nan if value is None else value)
        if record and "skipped_positions" in record:
            skipped.append(record["skipped_positions"])
    return {key: np.array(column) for key, column in columns.items()}, skipped


# ---------------------------------------------------------------- settings, by effect


def differences(a: Run, b: Run) -> list[Difference]:
    """All recorded differences, first those that can change the curve, the most likely causes first."""
    checks = (_batch, _learning_rate, _data, _seeds, _settings, _program)
    found = [difference for check in checks for difference in check(a, b)]
    return sorted(found, key=lambda each: not each.bends)


def _learning_rate(a: Run, b: Run) -> Iterator[Difference]:
    """Compares the logged rates at equal tokens, if each run follows its own schedule; otherwise reports that it does not."""
    if deviating := [(run.name, deviation) for run in (a, b) if (deviation := _off_schedule(run))]:
        for name, deviation in deviating:
            yield Difference("learning-rate", f"{name} does not follow its own schedule: {deviation}", True)
        return
    same_batch = a.batch_tokens == b.batch_tokens
    if same_batch or not (a.scheduled_lr and b.scheduled_lr):
        places = np.intersect1d(a.tokens, b.tokens)
        rates_a, lowest = (run.lr[np.searchsorted(run.tokens, places)] for run in (a, b))
        highest = lowest
    else:
        places = np.union1d(a.tokens, b.tokens)
        first, last = max(a.tokens[0], b.tokens[0]), min(a.tokens[-1], b.tokens[-1])
        places = places[(places >= first) & (places <= last)]
        rates_a = np.array([_scheduled(a, tokens) for tokens in places.tolist()])
        # Between two steps the rate is not defined: allow one step to both sides.
        slack = max(a.batch_tokens, b.batch_tokens)
        near = [[_scheduled(b, max(1, tokens + shift)) for shift in (-slack, slack)] for tokens in places.tolist()]
        lowest, highest = np.array(near).reshape(-1, 2).min(1), np.array(near).reshape(-1, 2).max(1)
    outside = np.flatnonzero((rates_a < lowest * (1 - 1e-6)) | (rates_a > highest * (1 + 1e-6)))
    if len(outside):
        at = outside[0]
        rate_b = lowest[at] if same_batch or b.scheduled_lr is None else _scheduled(b, places[at])
        text = f"at {places[at]:,.0f} tokens {rates_a[at]:.3g} in {a.name} and {rate_b:.3g} in {b.name}"
        yield Difference("learning-rate", f"{text}, the first such of {len(places)} places compared", True)


def _scheduled(run: Run, tokens: float) -> float:
    return run.scheduled_lr(min(max(1, round(tokens / run.batch_tokens)), run.total_steps))


def _off_schedule(run: Run) -> str | None:
    """Describes how the logged rates differ from the schedule; None if they do not, or if the schedule is unknown."""
    if run.scheduled_lr is None:
        return None

    def scheduled(steps: np.ndarray) -> np.ndarray:
        return np.array([run.scheduled_lr(min(max(1, step), run.total_steps)) for step in steps.tolist()])

    right = scheduled(run.steps)
    wrong = np.flatnonzero(~np.isclose(run.lr, right, rtol=1e-6, atol=0))
    if not len(wrong):
        return None
    first = wrong[0]
    text = f"at step {run.steps[first]} it is {run.lr[first]:.4g}, but the settings give {right[first]:.4g}"
    for times in range(2, _MOST_STEPS_PER_UPDATE + 1):
        if np.allclose(run.lr, scheduled(run.steps * times), rtol=1e-6, atol=0):
            return f"{text}, as if the scheduler is stepped {times} times per update"
    factors = run.lr / right
    return f"{text}: {factors[0]:.4g} times that in all steps" if np.ptp(factors) < 1e-6 * factors[0] else text


def _batch(a: Run, b: Run) -> Iterator[Difference]:
    if a.batch_tokens != b.batch_tokens:
        sizes = " and ".join(
            f"{run.setting('batch.global_batch_size')} x {run.sequence_length} = {run.batch_tokens:,}" for run in (a, b)
        )
        yield Difference("batch", f"the tokens per step are {sizes}", True)
    elif a.sequence_length != b.sequence_length:
        text = f"samples have {a.sequence_length} and {b.sequence_length} tokens, with equal tokens per step"
        yield Difference("sequence-length", text, True)
    shares = [run.tokens[-1] / run.steps[-1] / run.batch_tokens for run in (a, b)]
    if abs(shares[0] - shares[1]) > 1e-9:
        yield Difference("valid-tokens", f"{shares[0]:.2%} and {shares[1]:.2%} of the tokens count as labels", True)
    if a.skipped_positions != b.skipped_positions:
        text = f"positions skipped after rollbacks: {a.skipped_positions or 'none'} and {b.skipped_positions or 'none'}"
        yield Difference("rollbacks", text, True)


def _data(a: Run, b: Run) -> Iterator[Difference]:
    """Compares the fingerprints of the order; if they differ, finds out why."""
    data = [run.environment.get("data", {}) for run in (a, b)]
    if data[0].get("quarantine") != data[1].get("quarantine"):
        counts = [sum(end - first for _, first, end in each.get("quarantine") or []) for each in data]
        yield Difference("quarantine", f"{counts[0]} and {counts[1]} samples are in quarantine", True)
    # The order contains the seed, which is a difference of its own.
    orders = [
        str(each.get("order")).replace(f"seed {run.setting('run.seed')},", "") for each, run in zip(data, (a, b), strict=True)
    ]
    if orders[0] != orders[1]:
        yield from _other_samples(a, b, orders)


def _other_samples(a: Run, b: Run, orders: list[str]) -> Iterator[Difference]:
    """Finds why two runs with different fingerprints of their order read different samples."""
    sources = [run.setting("data.train") or [] for run in (a, b)]
    kinds = [_generated(run) for run in (a, b)]
    if any(kinds) or not sources[0]:
        yield Difference("data", f"generated data: {kinds[0] or 'none'} and {kinds[1] or 'none'}", True)
        return
    if len(sources[0]) != len(sources[1]):
        yield Difference("sources", f"{len(sources[0])} and {len(sources[1])} sources", True)
        return
    weights = [[each.get("weight") for each in entries] for entries in sources]
    if weights[0] != weights[1]:
        yield Difference("weights", f"the weights of the sources are {weights[0]} and {weights[1]}", True)
    changed = [pair for pair in zip(a.sources, b.sources, strict=True) if pair[0] != pair[1]]
    if changed and sorted(map(str, a.sources)) == sorted(map(str, b.sources)):
        yield Difference("order", "the same sources are listed, and so read, in a different order", True)
    else:
        for mine, theirs in changed:
            yield _why_other_tokens(mine, theirs)
    if weights[0] == weights[1] and not changed and a.sequence_length == b.sequence_length:
        yield Difference("order", f"the samples or their order differ: {orders[0]} and {orders[1]}", True)


def _generated(run: Run) -> str:
    synthetic = run.setting("data.synthetic")
    return f"{synthetic.get('kind')}, {synthetic.get('num_samples')} samples" if synthetic else ""


def _why_other_tokens(mine: dict, theirs: dict) -> Difference:
    """The most specific reason why two sources do not hold the same tokens."""
    ends = [each.get("ends") for each in (mine, theirs)]
    pair = {key: (mine.get(key), theirs.get(key)) for key in ("tokenizer_fingerprint", "corpus", "shuffled")}
    tokenizers, corpora = pair["tokenizer_fingerprint"], [(each or {}).get("sha256") for each in pair["corpus"]]
    sizes = f"{mine.get('num_tokens', 0):,} and {theirs.get('num_tokens', 0):,} tokens"
    if None not in ends and (0 in ends) and ends[0] != ends[1]:
        rates = " and ".join("never" if not rate else f"once in {1 / rate:,.0f} tokens" for rate in ends)
        return Difference("end-of-document", f"the end-of-document id occurs {rates}", True)
    if tokenizers[0] != tokenizers[1] and None not in tokenizers:
        names = " and ".join(f"{each['tokenizer_path']} ({each['vocab_size']} ids)" for each in (mine, theirs))
        text = f"the tokenizers are {names}: compare bits per byte, as losses per token are not comparable"
        return Difference("tokenizer", text, True)
    if corpora[0] != corpora[1]:
        return Difference("corpus", f"the texts are different ({sizes})", True)
    if pair["shuffled"][0] != pair["shuffled"][1]:
        return Difference("shuffled", "the same text, with documents shuffled in one run and not in the other", True)
    return Difference("tokens", f"the same text as different tokens, or in a different order ({sizes})", True)


def _seeds(a: Run, b: Run) -> Iterator[Difference]:
    seeds = [run.setting("run.seed") for run in (a, b)]
    if seeds[0] != seeds[1]:
        text = f"run.seed is {seeds[0]} and {seeds[1]}: different initial weights, different order of samples"
        yield Difference("seed", text, True)


def _settings(a: Run, b: Run) -> Iterator[Difference]:
    """Keys that differ and that the other checks do not compare."""
    flat = []
    for run in (a, b):
        resolved = run.environment.get("model", {}).get("settings", {})
        flat.append(_flatten(run.settings) | _flatten(resolved, "model."))
    for key in sorted(flat[0].keys() | flat[1].keys()):
        values = [each.get(key) for each in flat]
        if values[0] == values[1] or key in _COMPARED_BY_EFFECT:
            continue
        text = f"{key} is {_as_yaml(values[0])} and {_as_yaml(values[1])}"
        if any(key == each or key.startswith(f"{each}.") for each in _CHANGES_THE_CURVE):
            yield Difference(key, text, True)
        elif key.startswith(_ROUNDS):
            yield Difference(key, text, False)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _as_yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _program(a: Run, b: Run) -> Iterator[Difference]:
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
        yield Difference("code", f"both run {_code(mine)}; these changes are unknown", False)


def _code(start: dict) -> str:
    git = start.get("git")
    return f"commit {git['commit'][:12]}{' with uncommitted changes' * git['dirty']}" if git else "an unknown commit"


# ---------------------------------------------------------------- the curves


class Parting(NamedTuple):
    """The step at which two curves part."""

    common: int
    """Places compared: steps, or token counts if the batches differ."""
    equal_to: int | None
    """Last step up to which all losses are equal to the last bit; None: not even the first."""
    step: int | None
    """The first step from which most differences exceed the noise; None: there is none."""
    losses: tuple[float, float]
    """Losses at `step`, or at the last common step."""
    allowed: float
    """The noise there, nats."""
    noise: str
    """The source of the noise, in words."""


def parting(a: Run, b: Run, found: list[Difference], twin: Run | None = None) -> Parting:
    """The first step whose difference exceeds the noise. Raises CompareError if the runs have no step in common.

    The noise is three times the largest difference so far between `a` and its repetition `twin`, if there is one. Otherwise it
    is rounding, for runs that read the same samples from the same weights; for others it is the scatter of their lines.
    """
    steps, loss_a, loss_b = _common_lines(a, b)
    if not len(steps):
        raise CompareError(f"{a.name} and {b.name} have no logging step in common")
    gap = np.abs(loss_a - loss_b)
    gap[~np.isfinite(loss_a) & ~np.isfinite(loss_b)] = 0
    gap[~np.isfinite(gap)] = np.inf
    if twin is not None:
        allowed, noise = _twin_noise(a, twin, steps), f"three times the difference of {a.name} and its twin {twin.name}"
    elif OTHER_SAMPLES & {each.what for each in found}:
        scatter = math.hypot(*(line_noise(loss, math.inf) for loss in (loss_a, loss_b)))
        allowed, noise = np.full(len(steps), SIGMAS * scatter), f"{SIGMAS:.0f} sigma of the scatter of lines around their trend"
    else:
        share = max(ROUNDING[run.precision] for run in (a, b))
        rounding = share * np.abs(loss_a) * (1 + (steps / ROUNDING_GROWS_OVER_STEPS) ** 2)
        allowed = np.minimum(rounding, SIGMAS * max(line_noise(loss_a, math.inf), share))
        noise = "rounding: same samples, same weights"
    beyond = gap > allowed
    different = np.flatnonzero(gap > 0)
    first = next((int(i) for i in np.flatnonzero(beyond) if np.mean(beyond[i:]) > 0.5), None)
    unequal = int(different[0]) if len(different) else len(steps)
    equal_to = int(steps[unequal - 1]) if unequal else None
    at = len(steps) - 1 if first is None else first
    losses = float(loss_a[at]), float(loss_b[at])
    return Parting(len(steps), equal_to, None if first is None else int(steps[first]), losses, float(allowed[at]), noise)


def _common_lines(a: Run, b: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """((N,) steps of a, (N,) losses of a, (N,) losses of b at equal steps, or at equal tokens if the batches differ)."""
    if a.batch_tokens == b.batch_tokens:
        steps = np.intersect1d(a.steps, b.steps)
        return steps, *(run.loss[np.searchsorted(run.steps, steps)] for run in (a, b))
    inside = (a.tokens >= b.tokens[0]) & (a.tokens <= b.tokens[-1])
    return a.steps[inside], a.loss[inside], np.interp(a.tokens[inside], b.tokens, b.loss)


def _twin_noise(a: Run, twin: Run, steps: np.ndarray) -> np.ndarray:
    """(N,) three times the largest difference between a run and its repetition up to each of `steps`."""
    shared = np.intersect1d(a.steps, twin.steps)
    apart = np.abs(a.loss[np.searchsorted(a.steps, shared)] - twin.loss[np.searchsorted(twin.steps, shared)])
    return 3 * np.maximum.accumulate(apart)[np.clip(np.searchsorted(shared, steps, side="right") - 1, 0, None)]


def verdict(a: Run, b: Run, found: list[Difference], where: Parting) -> str:
    """The result in one or two sentences."""
    bending, other = [each for each in found if each.bends], [each for each in found if not each.bends]
    if where.step is None:
        same = f"{a.name} and {b.name} agree over {where.common} common lines, to {where.allowed:.2g} nats"
        if bending:
            return f"{same}, although they differ in {_listed(bending)}"
        return f"{same}" + (f"; they differ in {_listed(other)}, which changes only rounding" if other else "")
    parted = f"{a.name} and {b.name} part at step {where.step}"
    if bending:
        return f"{parted}. Possible causes: {_listed(bending)}"
    if other:
        return f"{parted}, and no setting explains it. Suspect {_listed(other)}"
    return f"{parted}, and no recorded difference explains it: repeat {a.name} to see its noise (--twin), or suspect hardware"


def _listed(found: list[Difference]) -> str:
    return "; ".join(f"{each.what} ({each.text})" for each in found)
