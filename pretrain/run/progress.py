"""The progress of a run, and the content of state.json, which a checkpoint keeps it in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import SchemaValidator, ValidationError
from pydantic_core import core_schema as core

from pretrain.checkpoint.manifest import Checkpoint, CheckpointError, UnsafeCheckpoint
from pretrain.data import excluded


@dataclass
class Progress:
    """Counters and flags of a run; a checkpoint holds all of them."""

    step: int = 0
    position: int = 0
    """Samples consumed since the start."""
    tokens: int = 0
    """Valid tokens consumed since the start, up to the newest logging line."""
    skipped_steps: int = 0
    """Steps whose update was not applied, up to the newest logging line."""
    train_seconds: float = 0.0
    """Seconds spent in steps that count, over all starts, up to the newest logging line."""
    data_seconds: float = 0.0
    """Of these, seconds of waiting for data."""
    interval_seconds: float = 0.0
    """Seconds spent in steps since the newest logging line."""
    started: float = 0.0
    """Time of the first start, seconds since 1970."""
    loss: float | None = None
    """Loss of the newest logging line."""
    val_loss: float | None = None
    """Loss of the newest validation."""
    evaluation_due: bool = False
    """This step's validation was cut short to save in time; after a resume it comes first."""
    tasks_due: bool = False
    """The same of this step's measurement of the tasks."""
    rollbacks: int = 0
    """Rollbacks to a checkpoint after a divergence."""
    skipped_positions: excluded.PositionRanges = field(default_factory=list)
    """Samples that these rollbacks skip."""


# ---------------------------------------------------------------- what state.json may hold

_COUNT = core.int_schema(ge=0, lt=2**62, strict=True)
_NUMBER = core.float_schema(allow_inf_nan=False, strict=True)
_SECONDS = core.float_schema(allow_inf_nan=False, ge=0, strict=True)
_LOSS = core.nullable_schema(core.float_schema(strict=True))
_TEXT = core.nullable_schema(core.str_schema(strict=True))
_KINDS = {
    "int": _COUNT,
    "float": _SECONDS,
    "float | None": _LOSS,
    "bool": core.bool_schema(strict=True),
    "excluded.PositionRanges": core.list_schema(core.list_schema(_COUNT, min_length=2, max_length=2)),
}


def _object(required: dict, optional: dict | None = None, extra: str = "ignore") -> core.CoreSchema:
    fields = {name: core.typed_dict_field(schema, required=False) for name, schema in (optional or {}).items()}
    fields |= {name: core.typed_dict_field(schema) for name, schema in required.items()}
    return core.typed_dict_schema(fields, extra_behavior=extra)


_PROGRESS = {each.name: _KINDS[each.type] for each in dataclasses.fields(Progress)}
_METER = _object(
    {
        "loss_sums": core.list_schema(_NUMBER, min_length=1),
        "counts": core.list_schema(_COUNT, min_length=5, max_length=5),
        "last_loss": core.nullable_schema(_NUMBER),
    },
    {
        "routing": core.list_schema(core.list_schema(_NUMBER)),
        "attended": core.list_schema(_NUMBER, min_length=3, max_length=3),
        "sources": core.dict_schema(core.str_schema(), core.list_schema(_NUMBER, min_length=2, max_length=2)),
    },
)
_SPIKES = _object({"accepted": core.list_schema(_NUMBER), "high": core.list_schema(_NUMBER)})
_COURSE = core.tuple_schema([*[_COUNT] * 6, core.float_schema(ge=0, le=1, strict=True)])
_SECTION = core.dict_schema(core.str_schema())
_CURVE = _object(
    {"step": _COUNT, "end": _COUNT, "schedule": _SECTION, "course": core.nullable_schema(_COURSE)},
    dict.fromkeys(("peak_lr", "start_lr"), _SECONDS),
)
_STAGE = core.list_schema(_COUNT, min_length=4, max_length=4)
_LENGTH = _object(
    {"total_steps": _COUNT, "course": core.nullable_schema(_COURSE)},
    {"curve": _CURVE, "stages": core.list_schema(_STAGE, min_length=1)},
)
_STATE = SchemaValidator(
    _object(
        {
            "step": _COUNT,
            "optimizer_updates": _COUNT,
            "progress": _object(dict.fromkeys(("step", "position"), _COUNT), _PROGRESS, extra="forbid"),
            "model": _SECTION,
            "settings": _object({"run": _object({"name": core.str_schema()})}, extra="allow"),
            "data": core.str_schema(),
        },
        {
            "meter": _METER,
            "spikes": _SPIKES,
            "length": _LENGTH,
            "quarantine": core.list_schema(core.list_schema(_COUNT, min_length=3, max_length=3)),
            "tokenizer": _TEXT,
            "val_loss": _LOSS,
            "wandb_id": _TEXT,
        },
    )
)
"""Versions may add keys; those inside `progress` change what a run does, so unknown ones are refused."""


def read_saved(found: Checkpoint) -> dict[str, Any]:
    """The content of state.json of a checkpoint that a run may resume from.

    Raises CheckpointError if another version wrote it or it holds no run, UnsafeCheckpoint if no version writes such values.
    """
    state = found.state()
    try:
        _STATE.validate_python(state)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key, kind = ".".join(map(str, first["loc"])), first["type"]
        if kind == "extra_forbidden":
            problem = f"state.json has {key}, which this version does not know; resume with the version that wrote it"
            raise CheckpointError(f"{found.path}: {problem}") from None
        if kind == "missing":
            problem = f"state.json has no {key}, so no run can resume here; model.from_pretrained takes its weights"
            raise CheckpointError(f"{found.path}: {problem}") from None
        problem = f"state.json is not what this program writes: {key} is {str(first['input'])[:40]!r} ({first['msg']})"
        raise UnsafeCheckpoint(f"{found.path}: {problem}") from None
    if problem := _contradiction(state):
        raise UnsafeCheckpoint(f"{found.path}: state.json contradicts itself: {problem}")
    return state


def _contradiction(state: dict[str, Any]) -> str | None:
    progress, model = state["progress"], state["model"]
    if progress["step"] != state["step"]:
        return f"progress.step is {progress['step']}, step is {state['step']}"
    if any(end <= first for first, end in progress.get("skipped_positions", [])):
        return "progress.skipped_positions has an empty range"
    routing, moe = state.get("meter", {}).get("routing"), model.get("moe")
    if routing is not None:
        width = 2 + moe["num_experts"] if isinstance(moe, dict) and type(moe.get("num_experts")) is int else 0
        if len(routing) != model.get("num_hidden_layers") or set(map(len, routing)) != {width}:
            return "meter.routing does not have a row for each layer and a column for each expert of its model"
    return None
