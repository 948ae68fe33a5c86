"""The validation loss that a ladder expects along a run (`tools/plan_ladder.py --fit`), and whether a run is in that band."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain import UserError

FORMAT_VERSION = 1
KEYS = ("expected_val_loss", "expected_val_loss_low", "expected_val_loss_high")
"""Of a validation's record."""


class Expected(NamedTuple):
    """A prediction for one run."""

    path: Path
    planned: dict[str, float]
    """parameters (those that multiply a token), tokens, and more of the planned run."""
    settings: dict[str, Any]
    """Settings that it holds for, by dotted key."""
    band_4V: np.ndarray
    """Fraction of the steps, loss, low, high (80 %); nats per token."""

    def figures(self, fraction: float) -> dict[str, float]:
        """What is expected after this fraction of the steps, under KEYS; empty before the band begins."""
        place_V, *columns = self.band_4V
        if fraction < place_V[0]:
            return {}
        return {key: float(np.interp(fraction, place_V, column)) for key, column in zip(KEYS, columns, strict=True)}


def read_expected(path: Path) -> Expected:
    """Raises UserError for a file that is none."""
    problem = f"evaluate.expected: {path} is no prediction; name the prediction.json that tools/plan_ladder.py --fit wrote"
    try:
        found = json.loads(path.read_text())
        version, band = found["format_version"], found["band"]
        columns = np.array([band[key] for key in ("fraction", "loss", "low", "high")], dtype=float)
        expected = Expected(path, found["planned"], found["settings"], columns)
    except OSError as error:
        raise UserError(f"evaluate.expected: {path} cannot be read ({error.strerror}); train a ladder, and fit it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(problem) from error
    if version != FORMAT_VERSION:
        raise UserError(f"evaluate.expected: {path} has format {version}, this version reads {FORMAT_VERSION}; fit again")
    if columns.ndim != 2 or not columns.shape[1] or not np.isfinite(columns).all() or (np.diff(columns[0]) <= 0).any():
        raise UserError(problem)
    return expected


def side(record: dict[str, Any]) -> str:
    """Where a validation lies: below, in or above its band; empty without one."""
    if KEYS[1] not in record:
        return ""
    low, high, loss = record[KEYS[1]], record[KEYS[2]], record["val_loss"]
    return "below" if loss < low else "in" if loss <= high else "above"  # NaN is above


def words(record: dict[str, Any]) -> str:
    """A validation's place, for people."""
    expected, low, high = (record[key] for key in KEYS)
    return f"expected {expected:.4f} ({low:.4f} to {high:.4f}): {side(record)} the band"
