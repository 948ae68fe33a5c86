"""The prediction that a run is compared with: it must be of this run."""

from __future__ import annotations

import math
from pathlib import Path

from pretrain import UserError, schema
from pretrain.config import Config
from pretrain.model.config import ModelConfig
from pretrain.model.flops import num_parameters
from pretrain.report.expected import Expected, read_expected

TOLERANCE = 0.02
"""Relative, of parameters and tokens: rounded steps are no other run."""


def of(config: Config, model: ModelConfig) -> Expected | None:
    """The prediction that `config` names. Raises UserError for one of another run."""
    if config.evaluate.expected is None:
        return None
    expected = read_expected(Path(config.evaluate.expected))
    _require(expected, "parameters", num_parameters(model).matmul)
    found = schema.flatten(schema.to_dict(config))
    for key, value in expected.settings.items():
        if None not in (value, found.get(key)) and value != found[key]:
            raise UserError(f"{_is_of_another(expected)}: {key} is {value} there and {found[key]} here")
    return expected


def require_length(expected: Expected | None, tokens: int) -> None:
    """Raises UserError for a prediction of a run of other length."""
    if expected:
        _require(expected, "tokens", tokens)


def _require(expected: Expected, key: str, value: int) -> None:
    planned = expected.planned[key]
    if abs(math.log(value / planned)) > TOLERANCE:
        raise UserError(f"{_is_of_another(expected)}: {planned:,.0f} {key} there and {value:,} here")


def _is_of_another(expected: Expected) -> str:
    return f"evaluate.expected: {expected.path} predicts another run (plan a ladder for this one, or set it to null)"
