"""The plan of a run as plain values: what it trains, needs, sends, saves and costs, and what would be cheaper.
`report/plan_table.py` shows it to people; programs read it as JSON. In bytes, seconds, FLOPs and dollars; null: unknown, or
without end.

It knows settings, the formulas of this room, and what the user states. It imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from pretrain import schema
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.model import flops
from pretrain.plan import choices, interval
from pretrain.plan.choices import Job, Plan
from pretrain.plan.cost import (
    HOST_GB_PER_SECOND,
    TOKENS_PER_PARAMETER,
    Cost,
    Length,
    checkpoint_bytes,
    cost,
    rounded_minutes,
    saves,
)
from pretrain.plan.interval import GPU_HOURS_BETWEEN_FAILURES, Risk, Saves
from pretrain.plan.memory import FRAGMENTATION, OUTSIDE_GIB
from pretrain.plan.scaling import Cluster, assumptions

RESTART_SECONDS, STORE_GB_PER_SECOND = 300.0, 1.0
"""Assumed, unless the user states others: from an interruption to the next step; all machines together, to their disk."""


class Market(NamedTuple):
    """A way to rent GPUs."""

    name: str
    dollars_per_hour: float | None
    """Of one GPU; None: unknown."""
    interruptions_per_hour: float | None
    """Of one node; None: those of GPUs that nobody takes away (`GPU_HOURS_BETWEEN_FAILURES`)."""

    def risk(self, cluster: Cluster, restart_seconds: float) -> Risk:
        """What interrupts a run on all GPUs of a cluster: the loss of any node."""
        per_hour = cluster.gpus / GPU_HOURS_BETWEEN_FAILURES
        if self.interruptions_per_hour is not None:
            per_hour = self.interruptions_per_hour * math.ceil(cluster.gpus / cluster.gpus_per_node)
        return Risk(3600 / per_hour if per_hour else math.inf, restart_seconds)


class Terms(NamedTuple):
    """What the user states."""

    markets: list[Market]
    """The first one is the plan's; others are alternatives."""
    speed_ratio: float
    """Speed as stated or measured, over the estimate."""
    mfu_source: str
    """estimated, stated or measured."""
    store_gb_per_second: float
    restart_seconds: float
    budget_dollars: float | None
    """None: no limit."""
    checkpoint: CheckpointConfig


class Planned(NamedTuple):
    """A plan with its price."""

    plan: Plan
    mfu: float
    market: Market
    saves: Saves
    risk: Risk
    cost: Cost


def price(plan: Plan, job: Job, length: Length, terms: Terms, market: Market, seconds: float | None = None) -> Planned:
    """Adds hours and dollars. seconds: of training between saves; None: the best interval."""
    cluster = plan.cluster
    size = checkpoint_bytes(job.model, job.optimizer, job.averages)
    saved = saves(size, cluster.gpus, terms.store_gb_per_second, terms.checkpoint)
    risk, mfu = market.risk(cluster, terms.restart_seconds), plan.time.mfu * terms.speed_ratio
    return Planned(plan, mfu, market, saved, risk, cost(length, cluster, mfu, saved, risk, market.dollars_per_hour, seconds))


def configured_interval(plan: Plan, terms: Terms) -> float:
    """Seconds of training between the saves that the settings ask for; inf: only at the end."""
    every = terms.checkpoint.every_steps * plan.time.total / terms.speed_ratio, 60 * terms.checkpoint.every_minutes
    return min((each for each in every if each), default=math.inf)


def summary(
    job: Job, length: Length, configured: Plan, clusters: list[tuple[Cluster, float | None]], terms: Terms
) -> dict[str, Any]:
    """The plan of a run. configured: as its settings are. clusters: alternatives, each with the price of a GPU per hour (None:
    as `terms` says)."""
    market, cluster = terms.markets[0], configured.cluster
    seconds = configured_interval(configured, terms)
    chosen = price(configured, job, length, terms, market, seconds)
    every = choices.every(job, configured.engine, cluster)
    ways = [chosen]
    for other, dollars in clusters:
        best = choices.recommended(job, configured.engine, other)
        for each in terms.markets:
            if dollars is not None:  # the same discount for every kind
                each = each._replace(dollars_per_hour=dollars * each.dollars_per_hour / market.dollars_per_hour)
            ways += [price(best[0], job, length, terms, each)] if best else []
    return {
        "cluster": {
            "gpu": cluster.device.name,
            "gpus": cluster.gpus,
            "gpus_per_node": cluster.gpus_per_node,
            "memory_gib": cluster.device.memory_gib,
            "network_gb_per_second": cluster.network_gb_per_second,
            "dollars_per_hour": market.dollars_per_hour,
        },
        "model": model_values(job),
        "run": {**run_values(job, length), "budget_dollars": terms.budget_dollars},
        "configuration": plan_values(chosen, terms),
        "engines": [engine_values(price(each, job, length, terms, market)) for each in every],
        "checkpoint": {
            "bytes": checkpoint_bytes(job.model, job.optimizer, job.averages),
            "blocked_seconds": chosen.saves.blocked_seconds,
            "durable_seconds": sum(chosen.saves),
            "asynchronous": terms.checkpoint.asynchronous,
            "mirror": terms.checkpoint.mirror,
        },
        "intervals": [interval_values(configured, job, length, terms, each, seconds) for each in terms.markets],
        "choices": [choice_values(each, chosen, terms) for each in sorted(ways, key=_order)],
        "assumptions": {
            **dataclasses.asdict(assumptions(cluster.device)),
            "fragmentation": FRAGMENTATION,
            "outside_gib": OUTSIDE_GIB,
            "store_gb_per_second": terms.store_gb_per_second,
            "host_gb_per_second": HOST_GB_PER_SECOND,
            "restart_seconds": terms.restart_seconds,
            "gpu_hours_between_failures": GPU_HOURS_BETWEEN_FAILURES,
        },
    }


def _order(way: Planned) -> float:
    return way.cost.gpu_hours if way.cost.dollars is None else way.cost.dollars


def model_values(job: Job) -> dict[str, Any]:
    """Parameters and FLOPs."""
    counts = flops.num_parameters(job.model)
    return {
        "parameters": counts.total,
        "active_parameters": counts.active,
        "flops_per_token": flops.flops_per_token(job.model, job.length),
        "sequence_length": job.length,
    }


def run_values(job: Job, length: Length) -> dict[str, Any]:
    """What a run computes."""
    per_parameter = length.tokens / flops.num_parameters(job.model).active
    return {
        "steps": length.steps,
        "tokens": length.tokens,
        "tokens_per_step": job.sequences * job.length,
        "tokens_per_parameter": per_parameter,
        "times_optimal": per_parameter / TOKENS_PER_PARAMETER,
        "flops": length.flops,
        "validation_tokens": length.validation_tokens,
    }


def memory_values(plan: Plan) -> dict[str, float]:
    """Bytes of a rank, by what they are for, and GiB with the margins."""
    parts = plan.memory
    return {**parts._asdict(), "peak": parts.peak, "ratio": plan.memory_ratio, "needed_gib": plan.needed_gib, "fits": plan.fits}


def engine_values(way: Planned) -> dict[str, Any]:
    """A way to run the job on these GPUs, with the best interval between saves."""
    plan, spent = way.plan, way.cost
    return {
        "plan": str(plan),
        "engine": plan.engine.name,
        "replicas": plan.engine.replicas,
        "parallel": dataclasses.asdict(plan.engine.parallel),
        "activation_checkpointing": plan.engine.activation_checkpointing,
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "memory": memory_values(plan),
        "sent_bytes": {"hidden": plan.sent[0], "awaited": plan.sent[1]},
        "mfu": way.mfu,
        "tokens_per_second_per_gpu": plan.time.tokens_per_second * way.mfu / plan.time.mfu,
        "days": _finite(spent.seconds / 86400),
        "dollars": _finite(spent.dollars),
    }


def plan_values(way: Planned, terms: Terms) -> dict[str, Any]:
    """The configuration as it is."""
    plan, spent = way.plan, way.cost
    hours = {key: _finite(getattr(spent, key) / 3600) for key in ("training", "validation", "saving", "interruptions")}
    return {
        **engine_values(way),
        "compile": plan.engine.compile,
        "precision": plan.engine.precision,
        "mfu_source": terms.mfu_source,
        "estimated_mfu": plan.time.mfu,
        "seconds_per_step": plan.time.total / terms.speed_ratio,
        "communication": {"seconds": plan.time.communication, "exposed_seconds": plan.time.exposed},
        "hours": {**hours, "total": _finite(spent.seconds / 3600)},
        "gpu_hours": _finite(spent.gpu_hours),
    }


def interval_values(plan: Plan, job: Job, length: Length, terms: Terms, market: Market, seconds: float) -> dict[str, Any]:
    """How often to save under the interruptions of a market, and what that loses, as shares of the time in training."""
    way = price(plan, job, length, terms, market)
    saved, risk = way.saves, way.risk
    best = interval.best_interval(saved, risk)
    found = {
        "market": market.name,
        "hours_between_interruptions": _finite(risk.mean_seconds / 3600),
        "young_seconds": _finite(interval.first_order(saved, risk)),
        "best_seconds": _finite(best),
        "recommended_minutes": None,
        "loss": None,
        "configured_seconds": _finite(seconds),
        "configured_loss": None,
        "simulated": None,
    }
    if math.isfinite(best):
        work = way.cost.training + way.cost.validation
        minutes = rounded_minutes(best)
        found["recommended_minutes"] = minutes
        found["loss"] = _finite(interval.expected_seconds(work, 60 * minutes, saved, risk) / work - 1)
        found["configured_loss"] = _finite(interval.expected_seconds(work, seconds, saved, risk) / work - 1)
        if risk.mean_seconds > 2 * (saved.blocked_seconds + saved.durable_seconds + risk.restart_seconds):
            found["simulated"] = interval.simulate(best, saved, risk)._asdict()
    return found


def choice_values(way: Planned, chosen: Planned, terms: Terms) -> dict[str, Any]:
    """An alternative, with the flags that choose it."""
    plan, spent, cluster = way.plan, way.cost, way.plan.cluster
    best = interval.best_interval(way.saves, way.risk)
    minutes = rounded_minutes(best) if math.isfinite(best) else None
    return {
        "configured": way is chosen,
        "gpu": cluster.device.name,
        "gpus": cluster.gpus,
        "market": way.market.name,
        "dollars_per_hour": way.market.dollars_per_hour,
        "plan": str(plan),
        "needed_gib": plan.needed_gib,
        "fits": plan.fits,
        "mfu": way.mfu,
        "days": _finite(spent.seconds / 86400),
        "gpu_hours": _finite(spent.gpu_hours),
        "dollars": _finite(spent.dollars),
        "flags": [] if way is chosen else flags(chosen.plan, plan, minutes, terms.checkpoint),
    }


def flags(before: Plan, after: Plan, minutes: float | None, checkpoint: CheckpointConfig) -> list[str]:
    """The command-line flags that turn one plan into another. minutes: between saves; None: as they are."""
    old, new = (schema.flatten(schema.to_dict(each.engine)) for each in (before, after))
    changes = {f"engine.{key}": value for key, value in new.items() if value != old[key]}
    if after.micro_batch != before.micro_batch:
        changes["batch.micro_batch_size"] = after.micro_batch
    if minutes is not None and (minutes != checkpoint.every_minutes or checkpoint.every_steps):
        changes["checkpoint.every_minutes"] = f"{minutes:g}"
        if checkpoint.every_steps:
            changes["checkpoint.every_steps"] = 0
    return [f"--{key} {'null' if value is None else value}" for key, value in changes.items()]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
