"""A loss curve drawn with characters: braille dots, two by four to a character, or ASCII where a terminal lacks them."""

from __future__ import annotations

import math

import numpy as np
from rich.text import Text

from pretrain.report.history import History
from pretrain.report.plot import value_range
from pretrain.report.units import human_count

LABEL_WIDTH, WIDE = 7, 60
_BITS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # of the dots of a braille character
TRAIN, VALID, LINE, ALARM = "cyan", "bold yellow", "bright_black", "bold red"


class Canvas:
    """Characters with styles, `width` by `height`, over which a curve of dots is drawn. (0, 0) is the upper left."""

    def __init__(self, width: int, height: int, ascii_only: bool) -> None:
        self.width, self.height = width, height
        self._ascii = ascii_only
        self.across, self._down = (1, 1) if ascii_only else (2, 4)
        self.dots = np.zeros((height * self._down, width * self.across), dtype=bool)
        self._cells: dict[tuple[int, int], tuple[str, str]] = {}

    def put(self, row: int, column: int, text: str, style: str) -> None:
        """Writes characters from (row, column) on; what lies outside is left out."""
        for place, character in enumerate(text, start=column):
            if 0 <= row < self.height and 0 <= place < self.width:
                self._cells[row, place] = (character, style)

    def draw(self, heights: np.ndarray) -> None:
        """A curve with one height per column of dots, 0 at the bottom to 1 at the top; NaN: none there."""
        rows = np.round((1 - np.clip(heights, 0, 1)) * (len(self.dots) - 1))
        before = math.nan
        for column, row in enumerate(rows):
            if math.isfinite(row):
                between = sorted((row, row if math.isnan(before) else before + np.sign(row - before)))
                self.dots[int(between[0]) : int(between[1]) + 1, column] = True
            before = row

    def rows(self) -> list[Text]:
        """The lines of the picture. Written characters lie above the curve."""
        found = []
        for row in range(self.height):
            line = Text()
            for column in range(self.width):
                block = self.dots[row * self._down :, column * self.across :][: self._down, : self.across]
                character, style = self._cells.get((row, column), (" ", ""))
                if block.any() and style in ("", LINE):
                    character, style = ("*" if self._ascii else chr(0x2800 + int(_BITS[block].sum()))), TRAIN
                line.append(character, style)
            found.append(line)
        return found


def draw_loss(history: History, width: int, height: int, ascii_only: bool) -> list[Text]:
    """The loss curve with validations, reference losses and spikes, in `height` lines; at least 24 by 4 characters."""
    names = {f" {name} {nats:.3f}": nats for name, nats in history.lines.items()}
    beside = max(map(len, names), default=0) if width >= WIDE else 0  # characters right of the curve
    across, down = width - LABEL_WIDTH - 1 - beside, height - 1
    canvas = Canvas(across + beside, down, ascii_only)
    train = history.curves["loss"].points() if "loss" in history.curves else None
    valid = history.curves["val_loss"].points() if "val_loss" in history.curves else None
    last, dots = max(history.step, 1), across * canvas.across
    curve = np.full(dots, np.nan) if train is None else columns(train.mean_step, train.mean, last, dots)
    low, high = value_range(curve, [] if valid is None else valid.value, [*history.reference_lines.values()])

    def row_of(value: float) -> int:
        return round((high - value) / (high - low) * (down - 1))

    def column_of(step: float) -> int:
        return min(int(step / last * across), across - 1)

    free = set(range(down))
    for name, nats in names.items():
        at = row_of(nats)
        canvas.put(at, 0, ("-" if ascii_only else "╌") * across, LINE)
        row = min(free, key=lambda row, at=at: abs(row - at), default=0)
        free.discard(row)
        canvas.put(row, across if beside else across - len(name), name, "dim")
    canvas.draw((curve - low) / (high - low))
    for step, value in [] if valid is None else zip(valid.step, valid.value, strict=True):
        canvas.put(row_of(value), column_of(step), "o" if ascii_only else "●", VALID)
    for event in history.events:
        if event.kind in ("spike", "not finite"):
            canvas.put(0, column_of(event.step), "!" if ascii_only else "▲", ALARM)
    labels = {row: f"{high - (high - low) * row / (down - 1):.3f}" for row in (0, (down - 1) // 2, down - 1)}
    bar, corner, floor = ("|", "+", "-") if ascii_only else ("│", "└", "─")
    lines = [Text(f"{labels.get(row, ''):>{LABEL_WIDTH}}{bar}", LINE) + line for row, line in enumerate(canvas.rows())]
    axis, end = floor * across, f" step {human_count(last)}"
    return [*lines, Text(f"{'':{LABEL_WIDTH}}{corner}{axis[: across - len(end)]}{end}", LINE)]


def columns(steps: np.ndarray, values: np.ndarray, last: float, count: int) -> np.ndarray:
    """(count,) the mean of the values in each of `count` equal parts of 0 to `last`, straight lines between; NaN outside."""
    places = np.minimum((steps / last * count).astype(int), count - 1)
    sums, counts = (np.bincount(places, weights, minlength=count) for weights in (values, np.ones_like(values)))
    known = np.flatnonzero(counts)
    if not len(known):
        return np.full(count, np.nan)
    return np.interp(np.arange(count), known, sums[known] / counts[known], left=math.nan, right=math.nan)
