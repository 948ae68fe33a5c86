"""How long a traced step takes at assumed rates: an estimate for comparing plans, not a measurement."""

from __future__ import annotations

from typing import NamedTuple

from pretrain.plan.messages import Collective
from pretrain.plan.scaling import Assumptions, Cluster, collective_seconds
from pretrain.plan.tracker import Message, Trace


class Roofline(NamedTuple):
    """Seconds of one step of a rank, by what limits them."""

    products: float
    attention: float
    other: float
    """Limited by memory bandwidth; with the gaps between kernels."""
    communication: float
    """All collectives, hidden or not."""
    exposed: float
    """The part of them that computation does not hide: all that it waits for, and some of the others."""

    @property
    def computing(self) -> float:
        """Without communication."""
        return self.products + self.attention + self.other

    @property
    def total(self) -> float:
        """Of the step."""
        return self.computing + self.exposed


def roofline(trace: Trace, repeats: dict[str, int], width: int, cluster: Cluster, rates: Assumptions) -> Roofline:
    """Returns the estimate. Each kind of operator takes what its FLOPs need or what its bytes need, whichever is longer.

    repeats: phase -> how often a step runs it. width: hidden_size. Attention computes half of its FLOPs, which is what the
    causal mask leaves.
    """
    peak, bandwidth = cluster.device.bf16_tflops * 1e12, cluster.device.memory_gb_per_second * 1e9 * rates.memory
    speeds = {
        "products": peak * rates.products * width / (width + rates.narrow),
        "attention": 2 * peak * rates.attention,
        "other": peak,
    }
    seconds = dict.fromkeys(speeds, 0.0)
    for (phase, kind), work in trace.work.items():
        seconds[kind] += repeats.get(phase, 0) * max(work.flops / speeds[kind], work.bytes / bandwidth)
    seconds["other"] += rates.gaps * sum(seconds.values())
    sent = {True: 0.0, False: 0.0}
    for (phase, *_), message in trace.messages.items():
        sent[message.awaited] += repeats.get(phase, 0) * message_seconds(message, cluster, rates)
    exposed = sent[True] + max((1 - rates.overlapped) * sent[False], sent[False] - sum(seconds.values()))
    return Roofline(**seconds, communication=sum(sent.values()), exposed=exposed)


def message_seconds(message: Message, cluster: Cluster, rates: Assumptions) -> float:
    """Returns the seconds of these collectives, one after the other."""
    if len(message.ranks) < 2:
        return 0.0
    kind, stride = message.collective.replace("-", "_"), message.ranks[1] - message.ranks[0]
    collective = Collective(kind, message.payload_bytes, len(message.ranks), stride, message.calls)
    return collective_seconds(collective, cluster, rates)
