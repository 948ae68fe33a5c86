"""A run on a terminal, in a given number of lines and columns: what it does, its curve, its figures, what happened.

In order of importance: a low screen has no curve, a narrow one fewer figures. Colours only repeat what the words say.
"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Callable, Iterable

from rich.text import Text

from pretrain.report.chart import draw_loss
from pretrain.report.units import human_bytes, human_count, human_dollars, human_seconds
from pretrain.run.view import Status, View

LEAST_WIDTH, LEAST_CURVE = 30, 6
STYLES = {"running": "bold green", "done": "bold green", "waiting": "bold", "stopped": "bold yellow"}
# Key of a logging step, how it is written. The most important ones come first.
_FIGURES: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("tokens_per_second", lambda x: f"{human_count(x)} tok/s"),
    ("mfu", lambda x: f"MFU {100 * x:.1f} %"),
    ("peak_memory_gib", lambda x: f"memory {x:.2f} GiB"),
    ("grad_norm", lambda x: f"grad norm {x:.3f}"),
    ("lr", lambda x: f"lr {x:.2e}"),
    ("goodput", lambda x: f"goodput {100 * x:.1f} %"),
    ("skipped_steps", lambda x: f"{x:.0f} steps skipped" if x else ""),
)


def frame(view: View, width: int, height: int, *, ascii_only: bool = False, now: float | None = None) -> list[Text]:
    """At most `height` lines of at most `width` columns. now: seconds since 1970."""
    now = time.time() if now is None else now
    width = max(width, LEAST_WIDTH)
    status = view.status(now)
    lines = [_head(view, status, width, ascii_only)]
    if status.text:
        lines += _wrapped(status.text, width, "red" if status.is_alarm else "dim")
    if view.fraction_read < 1:
        lines.append(Text(f"reading metrics.jsonl: {view.fraction_read:.0%}", "dim"))
    if view.unreadable:
        lines.append(Text(f"{view.unreadable:,} lines of metrics.jsonl are not records", "red"))
    if view.history.newest:
        lines.append(_pack([_bar(view, width, ascii_only), *_time_left(view, status, now)], width))
        lines.append(_pack(_losses(view), width))
    figures = [Text(each) for each in _figures(view)]
    lines += filter(None, [_pack(figures, width), _pack(_money(view), width), _pack(_checkpoints(view, now), width)])
    below = list(_below(view, width))
    room = height - len(lines) - min(len(below), max(1, height // 6))
    if room >= LEAST_CURVE and view.history.newest:
        lines += draw_loss(view.history, width, room, ascii_only)
    kept = height - 1 if below and height >= 4 else height
    lines = [*lines[:kept], *below][:height]
    for line in lines:
        line.truncate(width, overflow="crop" if ascii_only else "ellipsis")
    return lines


def _head(view: View, status: Status, width: int, ascii_only: bool) -> Text:
    style = STYLES.get(status.kind, "bold red")
    head = Text.assemble((view.name, "bold"), "  ", (f"{'*' if ascii_only else '●'} {status.kind.upper()}", style))
    attempts = view.state.get("attempt") or 1
    if attempts > 1:
        head.append(f"  start {attempts}", "dim")
    if view.starts:
        start = view.starts[-1]
        ranks = start.get("world_size") or 1
        head.append(_one_line(f"  {ranks} process{'es' * (ranks > 1)} on {start.get('device', '?')}"), "dim")
    return head


def _bar(view: View, width: int, ascii_only: bool) -> Text:
    """The steps made, of all steps if these are known."""
    step, total = view.history.newest.get("step", 0), view.total_steps
    if not total:
        return Text(f"step {step:,}")
    size = max(8, min(40, width - 50))
    done = round(size * min(1.0, step / total))
    full, rest = ("#", ".") if ascii_only else ("━", "─")
    return Text.assemble((full * done, "green"), (rest * (size - done), "bright_black"), f" step {step:,}/{total:,}")


def _time_left(view: View, status: Status, now: float) -> Iterable[Text]:
    newest = view.history.newest
    tokens, left, hours = (newest.get(key) for key in ("tokens", "eta_seconds", "train_hours"))
    if status.kind == "running" and _is_finite(left):
        yield Text(f"{human_seconds(max(0.0, left - (now - view.heard)))} left", "bold")
    if tokens:
        yield Text(f"{human_count(tokens)} tokens")
    if _is_finite(hours):
        yield Text(f"{human_seconds(3600 * hours)} trained", "dim")


def _losses(view: View) -> Iterable[Text]:
    history = view.history
    loss, validation = history.newest["loss"], history.validation
    yield Text.assemble("loss ", (f"{loss:.4f}", "bold cyan") if _is_finite(loss) else ("not finite", "bold red"))
    if validation:
        value = validation.get("val_loss")
        shown = f"{value:.4f}" if _is_finite(value) else "not finite"
        yield Text.assemble("validation ", (shown, "bold yellow"), f" at step {validation['step']:,}")
    if validation and len(points := history.curves["val_loss"].points().value) > 1:
        lowest = points.argmin()
        if points[lowest] < value:
            yield Text(f"lowest {points[lowest]:.4f} at step {history.curves['val_loss'].points.step[lowest]:,.0f}", "dim")
    if _is_finite(validation.get("val_bits_per_byte")):
        yield Text(f"{validation['val_bits_per_byte']:.3f} bits per byte", "dim")


def _figures(view: View) -> Iterable[str]:
    newest = view.history.newest
    return [write(newest[key]) for key, write in _FIGURES if _is_finite(newest.get(key)) and write(newest[key])]


def _money(view: View) -> Iterable[Text]:
    newest = view.history.newest
    spent, total, each = (newest.get(key) for key in ("cost_dollars", "cost_total_dollars", "dollars_per_billion_tokens"))
    if _is_finite(spent):
        yield Text.assemble(
            "cost ", (human_dollars(spent), "bold"), f", in all {human_dollars(total)}" if _is_finite(total) else ""
        )
    if _is_finite(each):
        yield Text(f"{human_dollars(each)} per billion tokens", "dim")


def _checkpoints(view: View, now: float) -> Iterable[Text]:
    if not view.checkpoints:
        if view.history.newest:
            yield Text("no checkpoint yet", "dim")
        return
    last = view.checkpoints[-1]
    yield Text(f"checkpoint step {last.step:,}, {human_seconds(max(0.0, now - last.time))} ago")
    yield Text(f"{len(view.checkpoints)} of {human_bytes(last.bytes)} on the disk", "dim")


def _below(view: View, width: int) -> Iterable[Text]:
    """What happened, the newest first, then the verdict on the curve; alarms before the rest."""
    history = view.history
    events = sorted(history.events, key=lambda event: (not event.alarm, -event.step))
    found = history.verdict()
    if found and found.is_alarm:
        yield from _wrapped(found.text, width, "red")
    for event in events[:20]:
        text = event.text if event.kind in event.text else f"{event.kind}: {event.text}"
        yield Text(_one_line(f"step {event.step:,}  {text}"), "red" if event.alarm else "dim")
    if found and not found.is_alarm:
        yield from _wrapped(found.text, width, "dim")


def _wrapped(text: str, width: int, style: str) -> list[Text]:
    """A sentence on as many lines as it takes, at most three."""
    found = textwrap.wrap(_one_line(text), width, max_lines=3, placeholder=" ...")
    return [Text(line, style) for line in found]


def _pack(parts: Iterable[Text], width: int) -> Text:
    """As many parts as fit on a line, with gaps between; a part that does not fit is left out."""
    line = Text()
    for part in parts:
        gap = "   " if line else ""
        if line.cell_len + len(gap) + part.cell_len <= width or not line:
            line += Text(gap) + part
    return line


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _one_line(text: str) -> str:
    """Without line breaks and without the control characters that a terminal would obey."""
    return "".join(each if each.isprintable() else " " for each in text)
