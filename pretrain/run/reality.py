"""Plan and reality: what a run is expected to cost; and once a start has settled, what it takes against what was planned.

<run>/plan.json    the newest comparison: planned and measured values, measured over planned, and the settings they depend on

The plan is that of the formulas in `pretrain/plan/`, which take a millisecond. On CPUs only bytes of the state are compared:
the peak there is that of the process, with its libraries, and no data sheet says how fast it is.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pretrain import devices, stages
from pretrain.config import accumulation
from pretrain.engines.base import Engine
from pretrain.engines.config import sample_ranks
from pretrain.plan import choices, summary
from pretrain.plan.choices import Job
from pretrain.plan.cost import length_of
from pretrain.plan.memory import memory
from pretrain.plan.scaling import Cluster, step_time
from pretrain.plan.summary import RESTART_SECONDS, STORE_GB_PER_SECOND, Market, Terms
from pretrain.run.ledger import Forecast
from pretrain.run.state import Run

FILE = "plan.json"
SETTLED = 2
"""Number of the logging line that compares: the interval before the first one has the warm-up, and what is compiled."""


class Compared(NamedTuple):
    """A value that was planned, and measured."""

    name: str
    planned: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over planned."""
        return self.measured / self.planned

    def __str__(self) -> str:
        what, _, unit = self.name.rpartition("_")
        what = what.replace("_", " ") if unit == "gib" else self.name.replace("_", " ")
        planned, measured = (f"{each:,.3f} GiB" if unit == "gib" else f"{each:,.0f}" for each in (self.planned, self.measured))
        return f"{what} {measured}, planned {planned} (x {self.ratio:.2f})"


def figures(run: Run, tokens_per_second: float) -> dict[str, float]:
    """What a logging line adds to its record: on rank 0, at the second one of a start, the comparison, also printed and
    stored; else nothing. To be called at each."""
    run.intervals += 1
    if run.intervals != SETTLED or run.engine.rank != 0:
        return {}
    found, engine, config = compare(run, tokens_per_second), run.engine, run.stage.config
    run.sinks.info(f"plan       {'; '.join(map(str, found))}{_why(run, found)}")
    record = {}
    for each in found:
        record |= {f"planned_{each.name}": each.planned, f"measured_{each.name}": each.measured}
        record[f"plan_ratio_{each.name.removesuffix('_gib')}"] = each.ratio
    of = {"device": engine.device_name, "ranks": engine.world_size, "compiled": engine.compiled, "precision": engine.precision}
    of |= {"engine": dataclasses.asdict(config.engine), "batch": dataclasses.asdict(config.batch)}
    of |= {"sequence_length": config.data.sequence_length, "model": dataclasses.asdict(run.model)}
    content = {"step": run.progress.step, **record, "settings": of}
    run.directory.write_text(FILE, json.dumps(content, indent=1) + "\n")
    return record


def planned(run: Run) -> Forecast | None:
    """What the plan expects all of a run to cost and take, on GPUs that nobody takes away; None on a device without a data
    sheet. `tools/plan_run.py` says the same for this GPU, number of GPUs and price, and explains it."""
    engine, config, price = run.engine, stages.largest(run.config), run.config.run.dollars_per_hour or None
    device = devices.find(engine.device_name)
    if device is None:
        return None
    cluster = Cluster(device, engine.world_size, engine.place.local_world_size or engine.world_size)
    settings = dataclasses.replace(config.engine, precision=engine.precision)
    optimizer = config.optimizer
    job = Job(
        run.model,
        config.data.sequence_length,
        config.batch.global_batch_size,
        optimizer.name,
        averages=optimizer.averages,
        average_bytes=optimizer.average_bytes,
    )
    way = choices.plan(job, settings, config.batch.micro_batch_size, cluster, engine.compiled != "none")
    market, length = Market("on demand", price, None), length_of(run.length.stages, run.model, run.total_steps)
    terms = Terms([market], 1.0, "estimated", STORE_GB_PER_SECOND, RESTART_SECONDS, None, run.config.checkpoint)
    cost = summary.price(way, job, length, terms, market, summary.configured_interval(way, terms)).cost
    return Forecast(0, cost.dollars or 0.0, cost.seconds / 3600)


def compare(run: Run, tokens_per_second: float) -> list[Compared]:
    """What can be compared on this device."""
    engine, config = run.engine, run.stage.config
    length, size, ranks = config.data.sequence_length, config.batch.micro_batch_size, engine.world_size
    settings = dataclasses.replace(config.engine, precision=engine.precision)
    plan = memory(run.model, length, size, settings, ranks, config.optimizer.name, config.optimizer.averages)
    found = [Compared("state_gib", (plan.weights + plan.moments) / 2**30, state_bytes(engine) / 2**30)]
    if engine.device.type == "cuda":
        found.append(Compared("peak_memory_gib", plan.peak / 2**30, run.meter.figures["memory"]["peak_memory_gib"]))
    if device := devices.find(engine.device_name):
        cluster = Cluster(device, ranks, engine.place.local_world_size or ranks)
        steps, compiled = accumulation(config.batch, sample_ranks(settings, ranks)), engine.compiled != "none"
        moved = config.optimizer.average_bytes
        time = step_time(run.model, length, size, steps, settings, cluster, compiled=compiled, average_bytes=moved)
        found.append(Compared("tokens_per_second", ranks * time.tokens_per_second, tokens_per_second))
    return found


def state_bytes(engine: Engine) -> int:
    """Bytes of this rank's weights and moments, with master weights, on its device; each storage once."""
    tensors = [tensor for each in engine.local_states(saving=False) for tensor in each.tensors.values()]
    for parameter in engine.model.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        tensors += [local.data, getattr(parameter, "ds_tensor", local.data)]  # of zero3: while gathered, its share
    plain = [inner for each in tensors if each.device.type == engine.device.type for inner in _inner(each)]
    storages = [each.untyped_storage() for each in plain]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def _inner(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors with storage behind one that wraps others, as weights do that are multiplied in fp8."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _inner(getattr(tensor, name))


def _why(run: Run, found: list[Compared]) -> str:
    """What the plan assumes and this run does not do, if memory or speed differ by a tenth."""
    if all(abs(each.ratio - 1) <= 0.1 for each in found):
        return ""
    reasons = {
        "blocks are not compiled and keep more": run.engine.compiled == "none",
        "routers are not even": run.model.moe is not None,
        "products in fp8 are faster": run.engine.precision == "fp8",
        "tokens see only their document, which saves products of attention": run.config.data.document_mask,
    }
    said = [reason for reason, holds in reasons.items() if holds]
    return f"; unlike in the plan, {', '.join(said)}" if said else "; the plan's rates are those of published runs"
