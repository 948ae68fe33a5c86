"""How long a step takes on 8 or 1,024 GPUs: an estimate from counts and stated assumptions, for comparing plans, not a promise.

Counted exactly: parameters, FLOPs, and the bytes that each engine sends (a test compares them with real ranks). Assumed: the
rates in `Assumptions`, fitted to published runs. `benchmarks/scaling.py` shows the error for each of those runs.

It knows shapes and data sheets. It imports no torch and runs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from pretrain.config import EngineConfig
from pretrain.devices import Device
from pretrain.model import flops
from pretrain.model.config import ModelConfig
from pretrain.plan.messages import Collective, collectives, held


@dataclass(frozen=True)
class Cluster:
    """GPUs in equal nodes."""

    device: Device
    gpus: int
    gpus_per_node: int = 8
    network_gb_per_second: float = 400.0
    """Of a node, in one direction, all its network cards together. 400: eight cards of 400 Gbit/s, as in most H100 nodes."""


@dataclass(frozen=True)
class Assumptions:
    """What the counts are divided by. Rates are fractions of the data sheet's."""

    products: float
    """Matrix products of a very wide model. A narrower one reaches D / (D + `narrow`) of that."""
    attention: float
    """Fused attention, forward and backward."""
    narrow: float = 100.0
    memory: float = 0.8
    link: float = 0.8
    network: float = 0.8
    compiled_bytes: float = 128.0
    """Bytes that operators other than products move, per token, layer and unit of hidden_size, forward and backward."""
    eager_bytes: float = 300.0
    logit_bytes: float = 8.0
    """Bytes moved per token and vocabulary row by the loss, beside its products."""
    gaps: float = 0.04
    """Share of compute time lost between kernels."""
    overlapped: float = 0.85
    """Share of a collective's time that computation hides; collectives occupy some of the device's units."""
    straggling: float = 0.005
    """Share of the time lost to the slowest rank, for each doubling of the number of nodes."""
    hop_seconds: tuple[float, float] = (2e-6, 10e-6)
    """Latency of a ring's hop within a node, and between nodes."""


AMPERE, HOPPER = Assumptions(products=0.76, attention=0.5), Assumptions(products=0.62, attention=0.3)


def assumptions(device: Device) -> Assumptions:
    """Returns the rates fitted to published runs on A100 (used for all GPUs before Hopper) or H100 (used for all others)."""
    return AMPERE if device.fp8_tflops is None else HOPPER


def collective_seconds(collective: Collective, cluster: Cluster, rates: Assumptions) -> float:
    """Returns the time of these collectives, one after the other: a ring over all ranks, which crosses the network on all cards
    of a node at once; an all_to_all sends each part directly, those for other nodes on the card of its GPU."""
    per_node = max(1, cluster.gpus_per_node // collective.stride)  # ranks of one ring in a node
    nodes = math.ceil(collective.ranks / per_node)
    link = cluster.device.link_gb_per_second * rates.link * 1e9
    network = cluster.network_gb_per_second * rates.network * 1e9
    near, far = rates.hop_seconds
    if collective.kind == "all_to_all":
        inside = min(per_node, collective.ranks)
        parts = collective.size / collective.ranks  # all ranks of a node send at the same time
        across = parts * (collective.ranks - inside) * cluster.gpus_per_node / network
        return max(parts * (inside - 1) / link, across) + collective.calls * (far if nodes > 1 else near)
    rings_per_node = min(collective.stride, cluster.gpus_per_node)
    speed = link if per_node > 1 else math.inf
    if nodes > 1:
        speed = min(speed, network / rings_per_node)
    hops = (collective.ranks - nodes) * near + (nodes if nodes > 1 else 0) * far
    return collective.sent_bytes / speed + collective.calls * hops * (2 if collective.kind == "all_reduce" else 1)


class StepTime(NamedTuple):
    """Seconds of a step on each GPU, and what follows from them."""

    products: float
    attention: float
    other: float
    """Operators that memory bandwidth limits, and gaps between kernels."""
    communication: float
    """All collectives, hidden or not."""
    exposed: float
    """The part of them that computation does not hide: all that it waits for, and some of the others."""
    optimizer: float
    total: float
    tokens_per_second: float
    """Of one GPU."""
    mfu: float


def step_time(
    model: ModelConfig, sequence_length: int, micro_batch_size: int, accumulation: int, engine: EngineConfig, cluster: Cluster,
    *, compiled: bool = True, rates: Assumptions | None = None, average_bytes: int = 0,
) -> StepTime:  # fmt: skip
    """Estimates a bf16 step. Recomputation (`engine.activation_checkpointing`) takes time, but adds nothing to MFU.

    accumulation: micro-batches per step and rank. Ranks that share sequences or matrices also share their work evenly; under
    tensor parallelism products are narrower. average_bytes: `optimizer.average_bytes`.
    """
    rates = rates or assumptions(cluster.device)
    counts, width, parallel = flops.num_parameters(model), model.hidden_size, engine.parallel
    tokens = accumulation * micro_batch_size * sequence_length / (parallel.sequence * parallel.tensor)  # of one GPU
    narrowest, peak = width / parallel.tensor, cluster.device.bf16_tflops * 1e12
    bandwidth = cluster.device.memory_gb_per_second * 1e9 * rates.memory
    again = {"none": (0, 0), "selective": (0, 1 / 3), "full": (1 / 3, 1 / 3)}[engine.activation_checkpointing]
    products = 6 * counts.matmul * tokens / (peak * rates.products * narrowest / (narrowest + rates.narrow)) * (1 + again[0])
    causal = flops.flops_per_token(model, sequence_length, causal=True) - 6 * counts.matmul
    attention = causal * tokens * (3.5 / 3 + again[0]) / (peak * rates.attention)  # the backward kernel repeats a product
    moved = (rates.compiled_bytes if compiled else rates.eager_bytes) * model.num_hidden_layers * width * (1 + again[1])
    other = tokens * (moved + rates.logit_bytes * model.vocab_size) / bandwidth
    other += rates.gaps * (products + attention + other)
    computing = products + attention + other

    sent = collectives(model, sequence_length, micro_batch_size, accumulation, engine, cluster.gpus)
    awaited, hidden = (
        sum(collective_seconds(each, cluster, rates) for each in sent if each.awaited == waits) for waits in (True, False)
    )
    first_and_last = hidden / (accumulation * (model.num_hidden_layers + 1))  # nothing can hide these
    exposed = awaited + max((1 - rates.overlapped) * hidden + first_and_last, hidden - computing)
    updated = sum(each.parameters / (1 if engine.name == "ddp" else each.ranks) for each in held(model, engine, cluster.gpus))
    optimizer = (28 + average_bytes) * updated / bandwidth  # weight, gradient and two moments read; three of them written
    nodes = max(1, cluster.gpus // cluster.gpus_per_node)
    total = (computing + exposed + optimizer) * (1 + rates.straggling * math.log2(nodes))
    per_second = tokens / total
    mfu = per_second * flops.flops_per_token(model, sequence_length) / peak
    return StepTime(products, attention, other, awaited + hidden, exposed, optimizer, total, per_second, mfu)
