"""How long a step takes on 8 or 1,024 GPUs: an estimate from counts and stated assumptions, for comparing plans, not a promise.

Counted exactly: parameters, FLOPs, and the bytes that each engine sends (a test compares them with real ranks). Assumed: the
rates in `Assumptions`, fitted to published runs. `benchmarks/scaling.py` shows the error for each of those runs.

It knows shapes and data sheets. It imports no torch and runs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pretrain.config import EngineConfig
from pretrain.devices import Device
from pretrain.model import flops
from pretrain.model.config import ModelConfig


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


class Collective(NamedTuple):
    """Collectives of one kind in a step."""

    kind: Literal["all_gather", "reduce_scatter", "all_reduce"]
    size: int
    """Bytes of the full tensors, of all calls of a step together."""
    ranks: int
    """Ranks that take part in each call."""
    stride: int
    """Distance between neighbouring ranks: 1 if the ranks of a node are neighbours."""
    calls: int

    @property
    def sent_bytes(self) -> int:
        """Bytes that each rank sends, if the library runs a ring."""
        return round(self.size * (self.ranks - 1) / self.ranks * (2 if self.kind == "all_reduce" else 1))


def collectives(model: ModelConfig, engine: EngineConfig, ranks: int, accumulation: int, bf16: bool = True) -> list[Collective]:
    """Returns what an engine sends in a step: weights (2 bytes per parameter under bf16) and fp32 gradients. Omitted: the few
    numbers of the token count and the gradient norm, the optimizer's own messages (Muon), and the parameters that
    `engine.keep_whole_below` keeps on every rank.
    """
    if ranks == 1:
        return []
    parameters, layers = flops.num_parameters(model).total, model.num_hidden_layers
    weights, gradients = parameters * (2 if bf16 else 4), parameters * 4
    if engine.name == "ddp":
        buckets = max(1, math.ceil(gradients / ((engine.bucket_mib or 25) * 2**20)))
        return [Collective("all_reduce", gradients, ranks, 1, buckets)]
    if engine.name in ("zero1", "zero2"):
        reductions = accumulation if engine.name == "zero2" and engine.reduce_gradients != "step" else 1
        buckets = max(1, math.ceil(gradients / ((engine.bucket_mib or 200) * 2**20)))
        return [
            Collective("all_reduce", gradients * reductions, ranks, 1, buckets * reductions),  # a rank then keeps its share
            Collective("all_gather", weights, ranks, 1, buckets),
        ]
    shards = ranks // engine.replicas
    passes = accumulation * 2 * weights
    if engine.name == "fsdp2":  # the head and the last norm stay gathered; tied, the embedding with them
        kept = flops.vocabulary_rows(model) * model.hidden_size + model.hidden_size
        passes -= accumulation * kept * (2 if bf16 else 4)
    reductions = 1 if engine.reduce_gradients == "step" else accumulation
    found = [
        Collective("all_gather", passes, shards, 1, 2 * (layers + 1) * accumulation),
        Collective("reduce_scatter", gradients * reductions, shards, 1, (layers + 1) * reductions),
    ]
    if engine.replicas > 1:
        found.append(Collective("all_reduce", math.ceil(gradients / shards), engine.replicas, shards, layers + 1))
    return [each for each in found if each.ranks > 1]


def collective_seconds(collective: Collective, cluster: Cluster, rates: Assumptions) -> float:
    """Returns the time of these collectives, one after the other: a ring over all ranks, which crosses the network on all cards
    of a node at once."""
    per_node = max(1, cluster.gpus_per_node // collective.stride)  # ranks of one ring in a node
    nodes = math.ceil(collective.ranks / per_node)
    rings_per_node = min(collective.stride, cluster.gpus_per_node)
    speed = cluster.device.link_gb_per_second * rates.link if per_node > 1 else math.inf
    if nodes > 1:
        speed = min(speed, cluster.network_gb_per_second * rates.network / rings_per_node)
    near, far = rates.hop_seconds
    hops = (collective.ranks - nodes) * near + (nodes if nodes > 1 else 0) * far
    return collective.sent_bytes / (speed * 1e9) + collective.calls * hops * (2 if collective.kind == "all_reduce" else 1)


class StepTime(NamedTuple):
    """Seconds of a step on each GPU, and what follows from them."""

    products: float
    attention: float
    other: float
    """Operators that memory bandwidth limits, and gaps between kernels."""
    communication: float
    """All collectives, hidden or not."""
    exposed: float
    """The part of them that computation does not hide."""
    optimizer: float
    total: float
    tokens_per_second: float
    """Of one GPU."""
    mfu: float


def step_time(
    model: ModelConfig, sequence_length: int, micro_batch_size: int, accumulation: int, engine: EngineConfig, cluster: Cluster,
    *, compiled: bool = True, rates: Assumptions | None = None,
) -> StepTime:  # fmt: skip
    """Estimates a bf16 step. Recomputation (`engine.activation_checkpointing`) takes time, but adds nothing to MFU."""
    rates = rates or assumptions(cluster.device)
    counts, width = flops.num_parameters(model), model.hidden_size
    tokens, peak = accumulation * micro_batch_size * sequence_length, cluster.device.bf16_tflops * 1e12
    bandwidth = cluster.device.memory_gb_per_second * 1e9 * rates.memory
    again = {"none": (0, 0), "selective": (0, 1 / 3), "full": (1 / 3, 1 / 3)}[engine.activation_checkpointing]
    products = 6 * counts.matmul * tokens / (peak * rates.products * width / (width + rates.narrow)) * (1 + again[0])
    causal = flops.flops_per_token(model, sequence_length, causal=True) - 6 * counts.matmul
    attention = causal * tokens * (3.5 / 3 + again[0]) / (peak * rates.attention)  # the backward kernel repeats a product
    moved = (rates.compiled_bytes if compiled else rates.eager_bytes) * model.num_hidden_layers * width * (1 + again[1])
    other = tokens * (moved + rates.logit_bytes * model.vocab_size) / bandwidth
    other += rates.gaps * (products + attention + other)
    computing = products + attention + other

    sent = collectives(model, engine, cluster.gpus, accumulation)
    communication = sum(collective_seconds(each, cluster, rates) for each in sent)
    first_and_last = communication / (accumulation * (model.num_hidden_layers + 1))  # nothing can hide these
    exposed = max((1 - rates.overlapped) * communication + first_and_last, communication - computing)
    shards = 1 if engine.name == "ddp" else cluster.gpus // engine.replicas
    optimizer = 28 * counts.total / shards / bandwidth  # weight, gradient and two moments read; three of them written
    nodes = max(1, cluster.gpus // cluster.gpus_per_node)
    total = (computing + exposed + optimizer) * (1 + rates.straggling * math.log2(nodes))
    per_second = tokens / total
    mfu = per_second * flops.flops_per_token(model, sequence_length) / peak
    return StepTime(products, attention, other, communication, exposed, optimizer, total, per_second, mfu)
