"""A page about a run, in one HTML file that needs no network: curves, what happened, texts, checkpoints, settings.

page.js draws the curves and page.css styles them; both are put into the page. Texts of a run are data: they are escaped here,
set as text by the script, and a content security policy allows no other script than page.js, and no connection.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from pretrain.files import write_atomically
from pretrain.report import expected, records
from pretrain.report.history import SOURCE_PREFIX, TASK_PREFIX, TIME_PREFIX, VALID_PREFIX, Event, History
from pretrain.report.plot import LEAST_SPAN, REFERENCE_TITLES, smooth, value_range
from pretrain.report.units import human_bytes, human_count, human_dollars, human_seconds
from pretrain.run.view import View

FILE_NAME = "report.html"
_FOLDER = Path(records.__file__).parent  # of page.css and page.js
SPANS = 256  # of a small chart
FEW = 40  # points that are shown as they are; more are smoothed
TABLE = '<div class="table" tabindex="0"><table>'  # whoever has no mouse scrolls what is focused
STAGE, START = "1 4", "4 3"  # dashes of the lines of these events
MOST_ROWS, MOST_SETTINGS = 25, 100_000

# (title, keys, or a prefix that ends in a slash, unit). The others are in the last part of the page.
_CHARTS = (
    ("Training loss by source", (SOURCE_PREFIX,), "nats per token"),
    ("Validation loss by source", (VALID_PREFIX,), "nats per token"),
    ("Validation", ("val_bits_per_byte",), "bits per byte"),
    ("Learning rate", ("lr",), ""),
    ("Gradient norm", ("grad_norm",), "before clipping"),
    ("Speed", ("tokens_per_second",), "tokens per second, all ranks"),
    ("Model FLOPs utilization", ("mfu", "mfu_causal"), "fraction of the peak"),
    ("Memory", ("peak_memory_gib", "peak_reserved_gib"), "GiB, peak of the fullest rank"),
    ("Cost", ("cost_dollars", "cost_total_dollars"), "dollars, so far and to the end"),
    ("Price", ("dollars_per_billion_tokens",), "dollars per billion tokens"),
    ("Goodput", ("goodput",), "fraction of the time since the start spent in steps"),
    ("Shares of the time", (TIME_PREFIX,), "fractions of the time since the first start"),
    ("Load of experts", ("expert_load_max", "expert_load_min"), "multiples of an even load"),
    ("Evenness of experts", ("expert_load_entropy",), "1: even, 0: one expert gets all"),
    ("Losses of routers", ("aux_loss", "z_loss"), "per token, unweighted"),
    ("Size of updates", ("update_fraction",), "norm of the update / norm of the weights"),
    ("Waiting for data", ("data_seconds", "data_seconds_max"), "seconds per logging interval: rank 0, slowest rank"),
    ("Forward pass", ("forward_seconds", "forward_seconds_max"), "seconds: median rank, slowest rank"),
    ("Clock of GPUs", ("gpu_clock_mhz_min",), "MHz, lowest"),
    ("Temperature of GPUs", ("gpu_temperature_max",), "°C, highest"),
    ("Power of GPUs", ("gpu_power_watts",), "watts, mean"),
)
_NOT_DRAWN = {"loss", "val_loss", "tokens", "train_hours", "perplexity", "val_perplexity", "eta_seconds", "epoch",
              "forward_seconds_max_rank", *expected.KEYS}  # fmt: skip


def write_page(view: View, path: Path, verdict: str | None = None) -> None:
    """Writes the page about a run into the file `path`, atomically. verdict: on its curve; None: as its records say.

    Raises OSError.
    """
    write_atomically(path, page(view, verdict))


def page(view: View, verdict: str | None = None) -> str:
    """The HTML of the page."""
    style, script = (_FOLDER.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
    data = _data(view)
    content = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":  # none of which ends a script or begins a comment then
        content = content.replace(character, f"\\u{ord(character):04x}")
    main = "\n".join(
        [
            *_summary(view, verdict),
            *_curves(view.history, data),
            *_account(view),
            *_events(view),
            *_texts(view.history),
            *_table_of_tasks(view.history),
            *_table_of_losses(view.history),
            *_checkpoints(view),
            *_starts(view),
            *_settings(view),
        ]
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(view.name)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>
{main}
</main>
<footer>Written {_day(time.time())}. Losses are in nats per token. Curves of long runs show, of each span of steps, the lowest
and the highest value, and the mean as a bold line; metrics.jsonl has every value.</footer>
<script type="application/json" id="run">{content}</script>
<script>{script}</script>
</body>
</html>
"""


# ---------------------------------------------------------------- data of the charts


def _data(view: View) -> dict:
    """What page.js draws."""
    history = view.history
    tokens, hours = (_curve(history, key, SPANS) for key in ("tokens", "train_hours"))
    steps = tokens["step"] if tokens else []
    charts = [_loss_chart(history), *_small_charts(history)]
    first = min((each["step"][0] for chart in charts for each in chart["series"]), default=1)
    marks = [
        {"step": event.step, "text": f"step {event.step:,}: {event.text}", "alarm": event.alarm}
        | ({"line": {"stage": STAGE, "start": START}[event.kind]} if event.kind in ("stage", "start") else {})
        for event in [*history.events, *_later_starts(view)]
    ]
    return {
        "x": {"step": steps, "tokens": tokens["value"] if tokens else [], "hours": _at(hours, steps)},
        "first": max(first, 1),
        "last": max(history.step, 1),
        "charts": charts,
        "marks": marks,
    }


def _at(curve: dict | None, steps: list) -> list:
    return [round(x, 6) for x in np.interp(steps, curve["step"], curve["value"]).tolist()] if curve and steps else []


def _curve(history: History, key: str, spans: int) -> dict | None:
    """{"step", "value"} and, of a thinned curve, "mean" of the same form; None: no value."""
    if key not in history.curves or not history.curves[key].count:
        return None
    points = history.curves[key].points(spans)
    found = _pairs(points.step, points.value)
    return found | ({"mean": _pairs(points.mean_step, points.mean)} if points.count > len(points.mean) else {})


def _pairs(steps: np.ndarray, values: np.ndarray) -> dict:
    return {"step": [_short(x, 9) for x in steps.tolist()], "value": [_short(x, 6) for x in values.tolist()]}


def _short(value: float, digits: int) -> float:
    """With so many digits, without a fraction if it has none: a page of many numbers stays small."""
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _loss_chart(history: History) -> dict:
    """Training and validation loss with the reference losses and the band in which a ladder expects the validation loss."""
    series, smoothed = [], np.empty(0)
    if train := _curve(history, "loss", 1024):
        points = history.curves["loss"].points()
        smoothed = points.mean if len(points.mean) < FEW else smooth(points.mean, max(2, len(points.mean) // 120))
        series.append({"name": "train", "color": 0, **train})
        if len(points.mean) >= FEW:
            series[0]["bold"] = _pairs(points.mean_step, smoothed)
    if valid := _curve(history, "val_loss", 1024):
        series.append({"name": "validation", "color": 1, "dots": True, **valid})
    values = [] if valid is None else valid["value"]
    band = _band(history)
    shown = [band["low"], band["high"]] if band else []
    low, high = value_range(smoothed, values, *shown, [*history.reference_lines.values()])
    lines = [{"name": REFERENCE_TITLES.get(name, name), "value": nats} for name, nats in history.lines.items()]
    return {
        "title": "Loss",
        "unit": "nats per token",
        "series": series,
        "lines": lines,
        "band": band,
        "low": low,
        "high": high,
        "large": True,
    }


def _band(history: History) -> dict | None:
    """What a ladder expects at the validations: {"step", "value", "low", "high"}; None: nothing."""
    if any(key not in history.curves or not history.curves[key].count for key in expected.KEYS):
        return None
    points = [history.curves[key].points() for key in expected.KEYS]
    columns = zip(("value", "low", "high"), points, strict=True)  # means of spans, which are the same for all three
    return {"step": _pairs(points[0].mean_step, points[0].mean)["step"]} | {
        name: _pairs(each.mean_step, each.mean)["value"] for name, each in columns
    }


def _small_charts(history: History) -> Iterable[dict]:
    """A chart of each group of figures that the run has."""
    left = {key for key, curve in history.curves.items() if curve.count} - _NOT_DRAWN
    yield from _task_charts(history)
    left = {key for key in left if not key.startswith((TASK_PREFIX, "task_"))}
    for title, wanted, unit in _CHARTS:
        keys = [key for key in history.curves if key in left and _belongs(key, wanted)]
        left -= set(keys)
        if keys:
            yield _chart(history, title, keys, unit)
    for key in history.curves:
        if key in left and np.ptp(history.curves[key].points().value) > 0:  # a figure that never changes needs no picture
            yield _chart(history, key, [key], "")


def _task_charts(history: History) -> Iterable[dict]:
    """How the tasks are answered: the mean over them, then each."""
    chances: dict[float, list[str]] = {}
    for name in history.task_names:
        chances.setdefault(_short(history.tasks[f"{TASK_PREFIX}{name}/chance"], 6), []).append(name)
    lines = [{"name": f"guessing, {', '.join(names)}", "value": chance} for chance, names in chances.items() if chance]
    for figure, title, unit in (
        ("accuracy", "Tasks: right answers", "fraction; dashed: guessing"),
        ("bits_per_byte", "Tasks: right answers in bits", "bits per byte; lower is better"),
    ):
        named = {f"task_{figure}": "mean"} | {f"{TASK_PREFIX}{name}/{figure}": name for name in history.task_names}
        keys = [key for key in named if key in history.curves and history.curves[key].count][:8]
        if keys:
            chart = _chart(history, title, keys, unit)
            series = [each | {"name": named[key], "dots": len(each["step"]) <= 60}
                      for key, each in zip(keys, chart["series"], strict=True)]  # fmt: skip
            yield chart | {"series": series, "lines": lines if figure == "accuracy" else []}


def _belongs(key: str, wanted: Sequence[str]) -> bool:
    return any(key == each or (each.endswith("/") and key.startswith(each)) for each in wanted)


def _chart(history: History, title: str, keys: list[str], unit: str) -> dict:
    keys = sorted(keys, key=lambda key: -history.curves[key].count)[:8]
    names = [key.split("/", 1)[1] if "/" in key and len(keys) > 1 else key for key in keys]
    curves = [_curve(history, key, SPANS) for key in keys]
    series = [{"name": name, "color": i, **curve} for i, (name, curve) in enumerate(zip(names, curves, strict=True))]
    if "validation" in title.lower():
        series = [each | {"dots": len(each["step"]) <= 60} for each in series]
    values = np.concatenate([each["value"] for each in series])
    low, high = float(values.min()), float(values.max())
    usual = np.quantile(values, 0.99)
    if len(values) > 100 and low >= 0 and high > 5 * usual > 0:  # one jump must not flatten the rest
        high = 1.5 * float(usual)
    if "loss" in title.lower() and title != "Losses of routers":
        margin = max(0.05 * (high - low), (LEAST_SPAN - (high - low)) / 2)
        low, high = low - margin, high + margin
    else:
        low = 0.0 if low >= 0 else low - 0.05 * (high - low)
        high = high + 0.06 * (high - low) if high > low else low + 1.0
    return {"title": title, "unit": unit, "series": series, "lines": [], "low": low, "high": high, "large": False}


def _later_starts(view: View) -> Iterable[Event]:
    for number, start in enumerate(view.starts[1:], start=2):
        if isinstance(start.get("step"), int):
            text = f"start {number} of the run, on {start.get('world_size')} processes"
            yield Event(start["step"], "start", text, False, [], [])


# ---------------------------------------------------------------- parts of the page


def _summary(view: View, verdict: str | None) -> Iterable[str]:
    status, found = view.status(), view.history.verdict()
    kind = "alarm" if status.is_alarm else "good" if status.kind in ("done", "running") else "wait"
    yield f'<header><h1>{escape(view.name)}</h1><span class="status {kind}">{escape(status.kind)}</span>'
    yield f'<span class="soft">{escape(status.text)}</span></header>'
    if view.unreadable:
        yield f'<p class="warning">{view.unreadable:,} lines of metrics.jsonl are not records.</p>'
    if found or verdict:
        alarm = " alarm" if found and found.is_alarm else ""
        yield f'<p class="verdict{alarm}">{escape(_sentence(verdict or found.text))}</p>'
    yield '<dl class="tiles">'
    for title, value, more in _tiles(view):
        yield f'<div><dt>{escape(title)}</dt><dd class="value">{escape(value)}</dd><dd class="more">{escape(more)}</dd></div>'
    yield "</dl>"


def _of(record: dict, key: str) -> str:
    """The step of a measurement, and whether it is of the average of the weights."""
    return f"step {record['step']:,}" + (", average of the weights" if record.get(key) == "average" else "")


def _tiles(view: View) -> Iterable[tuple[str, str, str]]:
    """(title, value, note)."""
    history, newest, validation = view.history, view.history.newest, view.history.validation
    total, parameters = view.total_steps, history.start.get("parameters")
    if newest:
        share = f"of {total:,}, {newest['step'] / total:.0%}" if total else ""
        yield "Steps", f"{newest['step']:,}", share
        yield "Training loss", _loss(newest["loss"]), "mean of the last logging interval"
    if validation:
        bits = validation.get("val_bits_per_byte")
        more = _of(validation, "val_weights") + (f", {bits:.3f} bits per byte" if bits else "")
        yield "Validation loss", _loss(validation.get("val_loss")), more
    if _is_number(history.tasks.get("task_accuracy")):
        accuracy, chance = history.tasks["task_accuracy"], history.tasks["task_chance"]
        yield "Tasks", f"{accuracy:.1%} right", f"{_of(history.tasks, 'task_weights')}, guessing: {chance:.1%}"
    if tokens := newest.get("tokens"):
        yield "Tokens", human_count(tokens), f"{tokens / parameters:.3g} per parameter" if parameters else ""
    if parameters:
        ranks = history.start.get("world_size") or 1
        yield "Parameters", human_count(parameters), f"on {ranks} process{'es' * (ranks > 1)}"
    if "tokens_per_second" in newest:
        rate = history.curves["tokens_per_second"].points().mean
        yield "Tokens per second", human_count(float(np.median(rate))), "median"
    if _is_number(newest.get("mfu")):
        yield "MFU", f"{100 * float(np.median(history.curves['mfu'].points().mean)):.1f} %", "median"
    if _is_number(newest.get("peak_memory_gib")):
        yield "Peak memory", f"{newest['peak_memory_gib']:.2f} GiB", "of the fullest rank"
    if _is_number(newest.get("train_hours")):
        left = newest.get("eta_seconds")
        running = view.state.get("status") == "running" and _is_number(left)
        yield "Time in steps", human_seconds(3600 * newest["train_hours"]), f"{human_seconds(left)} left" if running else ""
    if _is_number(newest.get("goodput")):
        yield "Goodput", f"{100 * newest['goodput']:.1f} %", "of the time since the start"
    if _is_number(newest.get("cost_dollars")):
        each, last = newest.get("dollars_per_billion_tokens"), newest.get("cost_total_dollars")
        more = [f"in all {human_dollars(last)}"] if _is_number(last) else []
        more += [f"{human_dollars(each)} per billion tokens"] if _is_number(each) else []
        yield "Cost", human_dollars(newest["cost_dollars"]), ", ".join(more)
    if view.checkpoints:
        last = view.checkpoints[-1]
        yield "Last checkpoint", f"step {last.step:,}", f"{human_bytes(last.bytes)}, {_day(last.time)}"


def _curves(history: History, data: dict) -> Iterable[str]:
    if not history.newest:
        return
    charts, kinds = data["charts"], {mark.get("line", mark["alarm"]) for mark in data["marks"]}
    meanings = {
        STAGE: "dotted lines: a stage begins",
        START: "dashed lines: the run was started again",
        True: "triangles: alarms",
    }
    marks = "; ".join(meaning for kind, meaning in meanings.items() if kind in kinds).capitalize()
    yield "<h2>Curves</h2>"
    yield '<fieldset class="axes"><legend>Horizontal axis:</legend>'
    for kind, title in (("step", "steps"), ("tokens", "tokens"), ("hours", "hours of training")):
        checked = " checked" if kind == "step" else ""
        if kind == "step" or (kind if kind == "tokens" else "train_hours") in history.curves:
            yield f'<label><input type="radio" name="axis" value="{kind}"{checked}> {title}</label>'
    yield '<label><input type="checkbox"> logarithmic</label></fieldset>'
    yield "<noscript><p>The curves are drawn by a script inside this file, which this browser does not run. "
    yield "The table of losses below has some of their values.</p></noscript>"
    yield '<div class="charts">'
    for chart in charts:
        large = ' class="large"' if chart["large"] else ""
        yield f"<figure{large}><figcaption><h3>{escape(chart['title'])}</h3><span>{escape(chart['unit'])}</span></figcaption>"
        if len(chart["series"]) > 1:
            yield '<ul class="legend">'
            for each in chart["series"]:
                dot = ' class="dot"' if each.get("dots") else ""
                yield f'<li><i{dot} style="background:var(--c{each["color"]})"></i>{escape(each["name"])}</li>'
            if chart.get("band"):
                yield '<li><i class="band"></i>expected validation loss</li>'
            yield "</ul>"
        yield f'<div class="plot" tabindex="0" role="img" aria-label="{escape(_described(chart))}"></div></figure>'
        notes = [_about_band(history), marks] if chart["large"] else []
        if found := [_sentence(each) for each in notes if each]:
            yield f'<p class="note large">{escape(" ".join(found))}</p>'
    yield "</div>"


def _about_band(history: History) -> str:
    """What the shaded band is, and where the newest validation lies; empty without one."""
    if not (place := expected.side(history.validation)):
        return ""
    figures = expected.words(history.validation).partition(":")[0]
    return (
        "Shaded: where the small runs of a ladder expect the validation loss (evaluate.expected); of runs with the best "
        f"learning rate 80 % end inside. At step {history.validation['step']:,} it is {_loss(history.validation['val_loss'])}, "
        f"{figures}: {place} the band"
    )


def _described(chart: dict) -> str:
    """A chart in words, for those who do not see it."""
    parts = []
    for each in chart["series"]:
        steps, values = each["step"], each["value"]
        low, high = int(np.argmin(values)), int(np.argmax(values))
        parts.append(
            f"{each['name']}: {values[0]:.5g} at step {steps[0]:,.0f}, {values[-1]:.5g} at step {steps[-1]:,.0f}, lowest "
            f"{values[low]:.5g} at step {steps[low]:,.0f}, highest {values[high]:.5g} at step {steps[high]:,.0f}"
        )
    parts += [f"{line['name']}: {line['value']:.3f}" for line in chart["lines"]]
    if band := chart.get("band"):
        step, low, high = (band[key][-1] for key in ("step", "low", "high"))
        parts.append(f"expected validation loss at step {step:,.0f}: {low:.5g} to {high:.5g}")
    return f"{chart['title']}. {'; '.join(parts)}. Arrow keys move along the curve."


def _account(view: View) -> Iterable[str]:
    """What the time went into, as a bar, and the invoice."""
    prefix, newest, invoice = TIME_PREFIX, view.history.newest, view.invoice
    shares = {key.removeprefix(prefix): x for key, x in newest.items() if key.startswith(prefix) and _is_number(x)}
    if not shares and not invoice:
        return
    yield "<h2>Time and cost</h2>"
    if shares:
        named = [f"{name} {100 * share:.1f} %" for name, share in shares.items()]
        yield f'<div class="bar" role="img" aria-label="{escape("; ".join(named))}">'
        for number, share in enumerate(shares.values()):
            yield f'<i style="flex-grow:{max(0.0, share):.5f};background:var(--c{number % 8})"></i>'
        yield '</div><ul class="legend">'
        for number, text in enumerate(named):
            yield f'<li><i style="background:var(--c{number % 8})"></i>{escape(text)}</li>'
        yield "</ul>"
    if invoice:
        yield f'<pre tabindex="0">{escape(invoice)}</pre>'


def _events(view: View) -> Iterable[str]:
    history = view.history
    events = sorted([*history.events, *_later_starts(view)], key=lambda event: event.step)
    if not events:
        return
    yield '<h2>What happened</h2><ol class="events">'
    if history.num_events > len(history.events):
        yield f"<li><div></div><div>The newest {len(history.events)} of {history.num_events:,}.</div></li>"
    for event in events:
        kind = f'<div class="{"alarm" if event.alarm else "kind"}">{escape(event.kind)}</div>'
        yield f"<li><div>step {event.step:,}{kind}</div><div>{escape(event.text)}"
        if event.kind == "spike":
            yield from _spike(view, event)
        yield "</div></li>"
    yield "</ol>"


def _spike(view: View, event: Event) -> Iterable[str]:
    count = len(event.samples)
    command = f"python tools/inspect_data.py --run {view.path} --step {event.step} --loss"
    if event.texts:
        first = "its only sample" if count == 1 else f"the first {len(event.texts)} of its {count:,} samples"
        yield f"<details open><summary>How {first} begin{'s' * (count == 1)}</summary>"
        yield from (f'<pre class="text">{escape(str(text))}</pre>' for text in event.texts)
        yield "</details>"
    yield f'<div class="note">All its samples, those with the highest loss first: <code>{escape(command)}</code></div>'


def _texts(history: History) -> Iterable[str]:
    """What the model wrote, the newest first."""
    if not history.generated:
        return
    yield "<h2>What the model writes</h2>"
    newest, *earlier = reversed(history.generated)
    yield from _texts_of(*newest)
    if earlier:
        yield "<details><summary>at earlier validations</summary>"
        for each in earlier:
            yield from _texts_of(*each)
        yield "</details>"


def _texts_of(step: int, texts: list[dict]) -> Iterable[str]:
    yield f'<p class="note">step {step:,}</p>'
    for each in texts:
        yield f'<pre class="text"><mark>{escape(str(each["prompt"]))}</mark>{escape(str(each["text"]))}</pre>'


def _table_of_tasks(history: History) -> Iterable[str]:
    """The newest answers, task by task."""
    if not history.tasks:
        return
    yield f"<h2>Tasks</h2><details open><summary>at step {history.tasks['step']:,}</summary>{TABLE}"
    yield '<tr><th class="words">task</th><th>right answers</th><th>guessing</th><th>bits per byte</th></tr>'
    for name in history.task_names:
        accuracy, chance, bits = (
            history.tasks[f"{TASK_PREFIX}{name}/{each}"] for each in ("accuracy", "chance", "bits_per_byte")
        )
        right = f"{accuracy:.1%}" if _is_number(accuracy) else "not finite"
        yield f'<tr><td class="words">{escape(name)}</td><td>{right}</td><td>{chance:.1%}</td><td>{_loss(bits)}</td></tr>'
    yield "</table></div></details>"


def _table_of_losses(history: History) -> Iterable[str]:
    """The curve as numbers, at validations or else at some logging steps."""
    if "loss" not in history.curves or not history.curves["loss"].count:
        return
    train = history.curves["loss"].points()
    valid = history.curves["val_loss"].points() if "val_loss" in history.curves else None
    steps = train.mean_step if valid is None or not len(valid.step) else valid.step
    chosen = steps[np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_ROWS)).astype(int))]
    losses = smooth(train.mean, 1) if len(train.mean) >= FEW else train.mean
    yield "<h2>Losses</h2><details open><summary>nats per token</summary>" + TABLE
    yield "<tr><th>step</th><th>training, smoothed</th><th>validation</th></tr>"
    for step in chosen:
        value = "" if valid is None or not len(valid.step) else f"{np.interp(step, valid.step, valid.value):.4f}"
        yield f"<tr><td>{step:,.0f}</td><td>{np.interp(step, train.mean_step, losses):.4f}</td><td>{value}</td></tr>"
    yield "</table></div></details>"


def _checkpoints(view: View) -> Iterable[str]:
    if not view.checkpoints:
        return
    yield f"<h2>Checkpoints on the disk</h2>{TABLE}<tr><th>step</th><th>size</th><th>complete at</th></tr>"
    for each in view.checkpoints[-MOST_ROWS:]:
        yield f"<tr><td>{each.step:,}</td><td>{human_bytes(each.bytes)}</td><td>{_day(each.time)}</td></tr>"
    yield "</table></div>"


def _starts(view: View) -> Iterable[str]:
    if not view.starts:
        return
    yield f"<h2>Starts</h2>{TABLE}<tr><th>start</th><th>from step</th><th>at</th><th>processes</th>"
    yield '<th class="words">device</th><th class="words">precision</th><th class="words">commit</th>'
    yield '<th class="words">versions</th></tr>'
    for number, start in enumerate(view.starts, start=1):
        versions, git = start.get("versions") or {}, start.get("git") or {}
        named = ", ".join(f"{name} {version}" for name, version in versions.items() if name in ("torch", "deepspeed"))
        commit = str(git.get("commit") or "")[:12] + (", changed" if git.get("dirty") else "")
        cells = [number, start.get("step"), _day(start.get("time")), start.get("world_size")]
        words = [start.get("device"), start.get("precision"), commit, named]
        yield "<tr>" + "".join(f"<td>{escape(str(each))}</td>" for each in cells)
        yield "".join(f'<td class="words">{escape(str(each or ""))}</td>' for each in words) + "</tr>"
    yield "</table></div>"


def _settings(view: View) -> Iterable[str]:
    if text := view.settings:
        yield "<h2>Settings</h2><details><summary>config.yaml, every setting of the last start</summary>"
        yield f'<pre tabindex="0">{escape(text[:MOST_SETTINGS])}</pre></details>'


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _loss(value: object) -> str:
    return f"{value:.4f}" if _is_number(value) else "not finite"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _day(seconds: object) -> str:
    """A time in the zone of this machine; empty if it is none."""
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(seconds)) if _is_number(seconds) else ""
