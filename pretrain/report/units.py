"""Counts, durations, sizes and amounts of money, short enough for a column."""

from __future__ import annotations

import math

SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def human_count(value: float) -> str:
    """A count in at most five characters: 950, 12.3k, 4.56M, 7.00B, 1.25T."""
    for size, letter in SCALES:
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f}{letter}"
    return f"{value:.0f}"


def human_seconds(seconds: float) -> str:
    """A duration in its two largest units: 42s, 12m05s, 1h02m, 3d04h; "?" if it is not finite."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller:02d}{smaller_unit}"
    return f"{whole}s"


def human_dollars(value: float) -> str:
    """An amount in cents, and a small one with enough digits to be told from nothing: $1,234.50, $0.0312, $0.000012."""
    return f"${value:,.{dollar_digits(value)}f}"


def dollar_digits(value: float) -> int:
    """Digits after the point with which an amount is written."""
    return 2 if value >= 1 or value == 0 else 4 if value >= 0.01 else 6


def human_bytes(count: float) -> str:
    """A size in the largest unit that leaves at least 1."""
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
