"""A plan (`pretrain/plan/summary.py`) as lines of text, at most 120 characters wide. Every figure is in the plan; here they get
units. Exact figures have a `=`, estimates a `~`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from pretrain.report.units import human_count, human_dollars, human_seconds

GIB, WIDTH = 2**30, 120
MOST_KINDS, _MOST_CHOICES = 8, 12
_HELD = ("weights", "gradients", "moments", "activations", "logits", "block", "buffers")


def lines(plan: dict[str, Any]) -> Iterator[str]:
    """The plan for people."""
    yield from _what(plan)
    yield ""
    yield from _engines(plan)
    yield ""
    yield from _time(plan)
    yield from _saving(plan)
    yield ""
    yield from _choices(plan)


def _row(name: str, sign: str, text: str) -> Iterator[str]:
    """A line `name = text`, continued below itself."""
    first = f"{name:14} {sign} "
    yield from _wrapped(text, first)


def _wrapped(text: str, start: str) -> list[str]:
    """The text after `start`, continued below itself."""
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False)


def _what(plan: dict[str, Any]) -> Iterator[str]:
    cluster, model, run = plan["cluster"], plan["model"], plan["run"]
    nodes = -(-cluster["gpus"] // cluster["gpus_per_node"])
    yield (
        f"Plan for {cluster['gpus']} x {cluster['gpu']} ({cluster['memory_gib']:g} GiB), {nodes} node{'s' * (nodes > 1)}. "
        "Nothing was run on a GPU: = exact, ~ estimated."
    )
    yield ""
    share = (
        "all active"
        if model["active_parameters"] == model["parameters"]
        else f"{human_count(model['active_parameters'])} active"
    )
    text = f"{human_count(model['parameters'])} parameters ({model['parameters']:,}), {share} per token; "
    yield from _row(
        "model", "=", text + f"{model['flops_per_token'] / 1e9:.3g} GFLOP per token of {model['sequence_length']:,}"
    )
    steps = f"{run['steps']:,} steps of {run['tokens_per_step']:,}"
    yield from _row("run", "=", f"{human_count(run['tokens'])} tokens, {steps}; {_power(run['flops'])} FLOP")
    text = f"{_number(run['tokens_per_parameter'])} tokens per active parameter: {_data(run['times_optimal'])}"
    yield from _row("", " ", text)


def _data(times: float) -> str:
    """What a number of tokens, over 20 per parameter, means."""
    of = "(Hoffmann et al. 2022: about 20 give the smallest loss for these FLOPs)"
    if times < 0.5:
        return f"few; a smaller model would reach a smaller loss with these FLOPs {of}"
    if times <= 2:
        return f"near the best use of these FLOPs {of}"
    return f"{_number(times)} times as many as the best use of these FLOPs: the model is smaller, and cheaper to serve {of}"


# ---------------------------------------------------------------- memory


def _engines(plan: dict[str, Any]) -> Iterator[str]:
    """The configuration; every engine without kinds of parallelism; and the fastest with kinds."""
    limit = plan["cluster"]["memory_gib"]
    names = " ".join(f"{name:>6}" for name in ("weight", "grads", "moment", "kept", "logits", "block", "buffer"))
    dollars = "" if plan["cluster"]["dollars_per_hour"] is None else "       $"
    start = f"{'GiB of a rank ~':21} {'batch':>8} {names}  {f'of {limit:g}':>6}"
    yield f"{start}  {'GB sent':>7} {'tok/s':>8}  {'days':>5}{dollars}"
    for name, row in shown_rows(plan):
        yield _engine(name, row)
    if (more := len(_fastest_kinds(plan)) - MOST_KINDS) > 0:
        yield f"  and {more} slower combinations of kinds of parallelism that fit (--json lists all)"
    assumed = plan["assumptions"]
    text = (
        "+sel, +full: activation checkpointing; r, t, s, e: replicas, tensor, sequence, expert. batch: largest micro-batch "
        "that fits x accumulation. kept: activations. block: weights and gradients of a block while it runs, and what its "
        "recomputation keeps; a peak has logits or block, whichever is larger. buffer: what the engine holds throughout. "
        "weight, grads and moment are exact. "
        f"of {limit:g}: with {assumed['fragmentation']:.0%} for fragmentation and {assumed['outside_gib']:g} GiB for driver, "
        "CUDA context and NCCL. GB sent: per rank and step; tok/s: of a GPU."
    )
    yield from _wrapped(text, "  ")


def shown_rows(plan: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, row) of the configuration, of every engine without kinds of parallelism, and of the fastest ways with some."""
    plain = [row for row in plan["engines"] if row["plan"] == row["engine"]]
    rows = [*plain, *_fastest_kinds(plan)[:MOST_KINDS]]
    return [("as configured", plan["configuration"]), *((_named(row), row) for row in rows)]


def _fastest_kinds(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """For each combination of kinds of parallelism that fits, the fastest row of `engines`, fastest first."""
    kinds = [row for row in plan["engines"] if row["plan"] != row["engine"] and row["memory"]["fits"]]
    best: dict[str, dict] = {}
    for row in sorted(kinds, key=lambda row: -row["mfu"]):
        best.setdefault(row["plan"], row)
    return list(best.values())


def _named(row: dict[str, Any]) -> str:
    sizes = {"replicas": row["replicas"], **row["parallel"]}
    kinds = "".join(f" {name[0]}{size}" for name, size in sizes.items() if size > 1)
    return row["engine"] + kinds + {"none": "", "selective": " +sel", "full": " +full"}[row["activation_checkpointing"]]


def _engine(name: str, row: dict[str, Any]) -> str:
    memory = row["memory"]
    held = " ".join(f"{memory[key] / GIB:6.1f}" for key in _HELD)
    batch = f"{row['micro_batch']} x {row['accumulation']}"
    start = f"{name:21} {batch:>8} {held}  {memory['needed_gib']:6.1f}"
    if not memory["fits"]:
        return f"{start}  does not fit"
    sent = (row["sent_bytes"]["hidden"] + row["sent_bytes"]["awaited"]) / 1e9
    money = "" if row["dollars"] is None else f" {row['dollars']:7,.0f}"
    return f"{start}  {sent:7,.1f} {row['tokens_per_second_per_gpu']:8,.0f}  {_number(row['days'], 5)}{money}"


def exact_lines(rows: list[dict[str, Any]], limit_gib: float) -> Iterator[str]:
    """What dry runs counted."""
    yield "GiB of rank 0 = (counted: one step of the real model, optimizer and engine on a GPU that is not there)"
    names = "  ".join(f"{name:>9}" for name in ("weights", "gradients", "moments"))
    yield f"{'':24} {'batch':>8} {names}  {'peak':>6}  needed of {limit_gib:g}"
    for row in rows:
        held = "  ".join(f"{row['state_bytes'][key] / GIB:9.2f}" for key in ("weights", "gradients", "moments"))
        verdict = "" if row["fits"] else ": does not fit"
        batch = f"{row['micro_batch']} x {row['accumulation']}"
        yield f"{row['name']:24} {batch:>8} {held}  {row['peak_bytes'] / GIB:6.1f}  {row['needed_gib']:.1f}{verdict}"
        if row["flags"]:
            yield from _wrapped(" ".join(row["flags"]), "  ")
    if len(rows) == 1:
        yield f"no other way on these GPUs {'is faster by more than 3 %' if rows[0]['fits'] else 'is known to fit'}"


# ---------------------------------------------------------------- time and money


def _time(plan: dict[str, Any]) -> Iterator[str]:
    here, run = plan["configuration"], plan["run"]
    talk, step = here["communication"], here["seconds_per_step"]
    gpus = plan["cluster"]["gpus"]
    text = f"MFU {here['mfu']:.1%} ({here['mfu_source']}"
    text += "" if here["mfu_source"] == "estimated" else f"; estimated {here['estimated_mfu']:.1%}"
    text += f"; memory x {here['memory']['ratio']:.2f}" if here["memory"]["ratio"] != 1 else ""
    text += f"): {step:.3g} s per step, {here['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU, "
    yield from _row("speed", "~", text + f"{here['tokens_per_second_per_gpu'] * gpus:,.0f} in all")
    sent = here["sent_bytes"]
    tokens = f" and {sent['awaited'] / 1e9:,.1f} GB of tokens" if sent["awaited"] else ""
    text = f"{sent['hidden'] / 1e9:,.1f} GB of weights and gradients{tokens} per rank and step; ~{talk['seconds']:.2g} s, "
    yield from _row("communication", "=", text + f"of which {talk['exposed_seconds']:.2g} s are not hidden")
    hours = here["hours"]
    if hours["total"] is None:
        yield from _row("time", "~", "interruptions keep the run from ending: save more often")
        return
    spent = {name: human_seconds(3600 * value) for name, value in hours.items()}
    text = f"{spent['total']}: training {spent['training']}, validation {spent['validation']}, saving {spent['saving']}, start "
    unknown = "" if run["validation_tokens"] is not None else "; without validations, which are unknown before there is data"
    yield from _row("time", "~", f"{text}and interruptions {spent['interruptions']}{unknown}")
    rate = plan["cluster"]["dollars_per_hour"]
    if rate is None:
        yield from _row("cost", "~", f"{here['gpu_hours']:,.0f} GPU-hours; --dollars-per-hour gives the price")
        return
    text = f"{human_dollars(here['dollars'])} = {here['gpu_hours']:,.1f} GPU-hours x ${rate:g}; "
    yield from _row("cost", "~", text + f"{human_dollars(here['dollars'] / run['tokens'] * 1e9)} per billion tokens")
    if (budget := plan["run"]["budget_dollars"]) is not None:
        share = budget / here["dollars"]
        verdict = "enough" if share >= 1 else f"ends the run after about {share:.0%} of its tokens"
        yield from _row("budget", "~", f"{human_dollars(budget)}: {verdict}")


def _saving(plan: dict[str, Any]) -> Iterator[str]:
    size, assumed = plan["checkpoint"], plan["assumptions"]
    waits = "in the background" if size["asynchronous"] else "in the foreground"
    text = f"{size['bytes'] / 1e9:,.1f} GB ({size['bytes']:,} bytes of weights and moments); {waits}: training waits "
    text += f"~{_seconds(size['blocked_seconds'])}, durable after ~{_seconds(size['durable_seconds'])}"
    place = (
        "on its disk and in the mirror" if size["mirror"] else "on a disk that must outlive the machine, or checkpoint.mirror"
    )
    yield from _row("checkpoint", "=", f"{text} at {assumed['store_gb_per_second']:g} GB/s, {place}")
    for row in plan["intervals"]:
        yield from _row("save every", "~", _interval(row))


def _interval(row: dict[str, Any]) -> str:
    if row["recommended_minutes"] is None:
        return f"{row['market']}: never interrupted; save as often as you like to look back"
    between = human_seconds(3600 * row["hours_between_interruptions"])
    text = f"{row['recommended_minutes']:g} min ({row['market']}, an interruption per {between}): loses"
    text += f" {_share(row['loss'])} of the time"
    every = "only at the end" if row["configured_seconds"] is None else f"every {_number(row['configured_seconds'] / 60)} min"
    text += f"; as configured, {every}: {_share(row['configured_loss'])}"
    if found := row["simulated"]:
        text += f"; {found['runs']:,} simulated runs: {_share(found['loss'])}, at best {_share(found['best_loss'])} with "
        text += f"{_number(found['best_seconds'] / 60)} min"
    return text


def _choices(plan: dict[str, Any]) -> Iterator[str]:
    """What would be cheaper, cheapest first, and the configuration among it."""
    rows, best = plan["choices"], {}
    for number, row in enumerate(rows):
        best.setdefault((row["gpu"], row["market"]), number)  # the cheapest of each kind that was asked for
    asked = {*best.values(), next(number for number, row in enumerate(rows) if row["configured"])}
    others = [number for number in range(len(rows)) if number not in asked][: max(0, _MOST_CHOICES - len(asked))]
    shown = [rows[number] for number in sorted([*asked, *others])]
    yield "cheapest first ~ (same model, batches and curve; each with the simplest of its fastest ways that fit)"
    unit = "GPU-h" if plan["cluster"]["dollars_per_hour"] is None else "$"
    several = len({row["market"] for row in rows}) > 1
    rented = [f"{row['gpus']} x {row['gpu']}{', ' + row['market'] if several else ''}" for row in shown]
    width = max(map(len, rented))
    yield f"{unit:>9}  {'days':>6}  {'GPUs':{width}} {'MFU':>4}  needs  change"
    for row, gpus in zip(shown, rented, strict=True):
        yield from _choice(row, f"{gpus:{width}}")


def _choice(row: dict[str, Any], rented: str) -> Iterator[str]:
    amount = row["gpu_hours"] if row["dollars"] is None else row["dollars"]
    change = "(as configured)" if row["configured"] else " ".join(row["flags"]) or "(nothing else)"
    change = change if row["fits"] else f"{change} does not fit"
    start = f"{_number(amount, 9)}  {_number(row['days'], 6)}  {rented} {row['mfu']:4.0%}  {row['needed_gib']:5.1f}  "
    yield from _wrapped(change, start)


# ---------------------------------------------------------------- figures


def _seconds(value: float) -> str:
    return f"{value:.2g}s" if value < 9.5 else human_seconds(value)


def _power(number: float) -> str:
    return f"{number:.3g}".replace("e+", "e")


def _number(value: float | None, width: int = 0) -> str:
    if value is None:
        return f"{'no end':>{width}}"
    return f"{value:{width},.0f}" if value >= 100 else f"{value:{width}.3g}"


def _share(value: float | None) -> str:
    if value is None:
        return "without end"
    return f"{value:.2%}" if value < 0.1 else f"{value:.0%}"
