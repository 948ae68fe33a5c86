"""Figures of a logging interval: sums kept on the device, reduced over ranks once, divided last.

docs/understanding_the_loss.md defines all figures.
"""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_COUNTS = ("steps", "interval_tokens", "loss_tokens", "skipped_steps", "skipped_in_a_row")
"""Integers of an interval; only the last one is kept when the interval ends. loss_tokens: tokens of applied steps."""


PAUSES = ("validation", "tasks", "save")
"""What a `Clock` counts apart from training."""


class SampleLosses(NamedTuple):
    """What this rank's samples of a step add to the losses of their sources."""

    sources_B: Tensor
    """int64, numbers of the sources."""
    nats_B: Tensor
    """fp32, summed over the valid tokens of each sample that this rank has."""
    tokens_B: Tensor
    """int64, number of these tokens."""


class Meter:
    """Accumulates the steps since the last logging line. `add` never waits for the device; `read` waits once."""

    def __init__(
        self, device: torch.device, rank: int, world_size: int, state: dict | None = None, sources: Sequence[str] = ()
    ):
        """state: the interval that a checkpoint was saved in, see `state`. sources: names, in the order of their numbers."""
        self.device, self.rank, self.world_size = device, rank, world_size
        self.figures: dict[str, Any] = {}
        """The newest result of `read`."""
        state = state or {"loss_sums": [0.0], "counts": [0] * len(_COUNTS), "last_loss": None}
        sums = state["loss_sums"]
        mine = sums[rank] if len(sums) == world_size else sum(sums) if rank == 0 else 0.0
        last_loss = state["last_loss"] if rank == 0 else 0.0
        self.last_loss = torch.tensor(math.nan if last_loss is None else last_loss, dtype=torch.float64, device=device)
        """This rank's part of the loss of the last step, NaN if it was skipped; the sum over ranks is in nats per token."""
        self.loss_sum = torch.tensor(mine, dtype=torch.float64, device=device)  # nats, this rank, applied steps
        routing = state.get("routing")
        self.routing_LX = None if routing is None else torch.tensor(routing, dtype=torch.float64, device=device) * (rank == 0)
        self.counts = torch.tensor(state["counts"], device=device)  # over all ranks, equal on all
        self.sources = list(sources)
        known = state.get("sources", {}) if rank == 0 else {}
        sums = [known.get(name, (0.0, 0.0)) for name in self.sources]
        self.source_sums_S2 = torch.tensor(sums, dtype=torch.float64, device=device).view(-1, 2)  # nats, tokens; this rank
        pairs = state.get("attended") if rank == 0 else None
        self.attended = pairs or [0.0] * 3  # fields of `flops.Attended`, this rank; on the host, where they are counted

    def add(
        self,
        loss_sum: Tensor,
        tokens: Tensor,
        grad_norm: Tensor,
        applied: Tensor,
        routing_LX: Tensor | None = None,
        samples: SampleLosses | None = None,
    ) -> None:
        """Adds a step: nats of this rank (), valid tokens of all ranks (), gradient norm (), whether the update was applied ().

        routing_LX: this rank's sums of balance loss, z-loss and tokens per expert, for each layer (L, 2 + E); None without MoE.
        samples: losses of this rank's samples; None if there is one source.
        """
        self.loss_sum += torch.where(applied, loss_sum, 0)
        one = torch.ones_like(tokens)
        self.counts += torch.stack([one, tokens, tokens * applied, one * ~applied, one])
        self.counts[-1] *= ~applied
        self.grad_norm = grad_norm
        self.last_loss = torch.where(applied, loss_sum / tokens, math.nan)
        if routing_LX is not None:
            self.routing_LX = torch.where(applied, routing_LX, 0) + (0 if self.routing_LX is None else self.routing_LX)
        if samples is not None:
            # Sums of nats in fp32 are multiples of 2^-20 or so, which float64 adds without rounding: neither the order nor the
            # rank that continues the sums after a resume matters.
            sums_B2 = torch.where(applied, torch.stack([samples.nats_B.double(), samples.tokens_B.double()], 1), 0)
            self.source_sums_S2.index_add_(0, samples.sources_B, sums_B2)

    def add_attended(self, pairs: Sequence[float] | None) -> None:
        """Adds what this rank's tokens of a step attend to (tokens, pairs, causal pairs); None: no document limits that. Ranks
        that share a sample all count it: only ratios of the sums have a meaning."""
        if pairs is not None:
            self.attended = [mine + more for mine, more in zip(self.attended, pairs, strict=True)]

    @property
    def interval_tokens(self) -> int:
        """Valid tokens of the interval so far, over all ranks. Waits for the device."""
        return int(self.counts[_COUNTS.index("interval_tokens")])

    def read(self, all_reduce: Callable[[Tensor], Tensor], of_rank: Sequence[float] = ()) -> dict[str, Any]:
        """Returns the figures of the interval, equal on all ranks, and starts a new interval. A collective.

        loss: nats per valid token over the applied steps, NaN if there were none. grad_norm: of the last step. routing: the
        `routing_figures` of the applied steps, empty without MoE. memory: the figures of `_peaks`, largest over all ranks.
        sources: loss/<name> of each source with a valid token in these steps, empty if there is one source. attended: sums of
        what `add_attended` got, all 0 without documents. ranks: `of_rank` of each rank, in order.
        """
        peaks, routing, sources = _peaks(self.device), self._routing(), self.source_sums_S2.flatten()
        memory = torch.cat([self._slot(value) for value in (*peaks.values(), *of_rank)])
        sums = all_reduce(torch.cat([self.loss_sum[None], memory, self._attended(), sources, routing]))
        equal = torch.cat([self.grad_norm.double()[None], self.counts.double()])  # on all ranks; float64: exact to 2^53
        sizes = [1, len(_COUNTS), 1, memory.numel(), len(self.attended), sources.numel(), routing.numel()]
        grad_norm, counts, loss_sum, memory, attended, sources, routing = torch.cat([equal, sums]).cpu().split(sizes)
        self.figures = {name: int(count) for name, count in zip(_COUNTS, counts.tolist(), strict=True)}
        loss_tokens = self.figures["loss_tokens"]
        self.figures["loss"] = loss_sum.item() / loss_tokens if loss_tokens else math.nan
        self.figures["grad_norm"] = grad_norm.item()
        by_rank = memory.view(-1, self.world_size)
        self.figures["memory"] = dict(zip(peaks, by_rank[: len(peaks)].amax(1).tolist(), strict=True))
        self.figures["ranks"] = by_rank[len(peaks) :].T.tolist()
        by_source = zip(self.sources, sources.view(-1, 2).tolist(), strict=True)
        self.figures["sources"] = {f"loss/{name}": nats / tokens for name, (nats, tokens) in by_source if tokens}
        self.figures["attended"] = attended.tolist()
        self.figures["routing"] = {}
        if loss_tokens and self.routing_LX is not None:
            self.figures["routing"] = routing_figures(routing.view_as(self.routing_LX), loss_tokens)
        self.routing_LX = None
        self.loss_sum.zero_()
        self.source_sums_S2.zero_()
        self.attended = [0.0] * len(self.attended)
        self.counts[:-1] = 0
        return self.figures

    def state(self, all_reduce: Callable[[Tensor], Tensor]) -> dict:
        """The unfinished interval, for a checkpoint. A collective."""
        slots = self._slot(0.0)
        slots[self.rank] = self.loss_sum
        sources = self.source_sums_S2.flatten()
        sizes = [self.world_size, 1, len(self.attended), len(sources), self._routing().numel()]
        sums = all_reduce(torch.cat([slots, self.last_loss[None], self._attended(), sources, self._routing()])).cpu()
        loss_sums, last_loss, attended, sources, routing = sums.split(sizes)
        last_loss = last_loss.item()
        last_loss = last_loss if math.isfinite(last_loss) else None
        state = {"loss_sums": loss_sums.tolist(), "counts": self.counts.tolist(), "last_loss": last_loss}
        if self.sources:
            state["sources"] = dict(zip(self.sources, sources.view(-1, 2).tolist(), strict=True))
        if attended.any():
            state["attended"] = attended.tolist()
        if self.routing_LX is not None:
            state["routing"] = routing.view_as(self.routing_LX).tolist()
        return state

    def _attended(self) -> Tensor:
        return torch.stack([self.loss_sum.new_full((), pairs) for pairs in self.attended])  # a list would be copied, and wait

    def _routing(self) -> Tensor:
        return self.loss_sum.new_empty(0) if self.routing_LX is None else self.routing_LX.flatten()

    def _slot(self, value: float) -> Tensor:
        """(world_size,) `value` in this rank's place: summed over ranks, every rank sees all values."""
        slots = torch.zeros(self.world_size, dtype=torch.float64, device=self.device)
        slots[self.rank].fill_(value)  # an assignment would copy the number from pageable memory
        return slots


def routing_figures(routing_LX: Tensor, tokens: float) -> dict[str, float]:
    """Figures of MoE routing, from each layer's sums over `tokens` tokens (L, 2 + E), as `Meter.add` gets them.

    aux_loss, z_loss: per token, mean over layers, unweighted. expert_load_max, expert_load_min: over all experts of all layers,
    in multiples of an even load. expert_load_entropy: of the least even layer; 1 is an even load, 0 is all on one expert.
    """
    tokens_LE = routing_LX[:, 2:]
    load_LE = tokens_LE / tokens_LE.mean(1, keepdim=True)
    entropy_L = torch.special.entr(load_LE / tokens_LE.shape[1]).sum(1) / math.log(tokens_LE.shape[1])
    return {
        "aux_loss": routing_LX[:, 0].mean().item() / tokens,
        "z_loss": routing_LX[:, 1].mean().item() / tokens,
        "expert_load_max": load_LE.max().item(),
        "expert_load_min": load_LE.min().item(),
        "expert_load_entropy": entropy_L.min().item(),
    }


class Clock:
    """Wall-clock seconds of a logging interval, without evaluation and saving; and what these and a step take, for a forecast.

    `seconds` were spent in its steps before the run was stopped in the middle of the interval, after `step`.
    """

    def __init__(self, seconds: float = 0.0, step: int = 0) -> None:
        self._ended = -seconds  # those of intervals that have ended
        self._begin(seconds)
        self.totals = dict.fromkeys(PAUSES, 0.0)
        """Seconds of all pauses of these kinds."""
        self.pauses: dict[str, deque[float]] = {kind: deque(maxlen=5) for kind in PAUSES}
        """Seconds of the newest ones."""
        self._noted, self._apart = (step, self.began + seconds), 0.0
        self._intervals: deque[tuple[int, float]] = deque(maxlen=400)

    def restart(self, seconds: float) -> None:
        """Starts a new interval after one in which `seconds` were counted as training."""
        self._ended += seconds
        self._begin(0.0)

    def _begin(self, seconds: float) -> None:
        self.began, self.data_seconds, self.paused_seconds = time.monotonic() - seconds, 0.0, 0.0

    @property
    def train_seconds(self) -> float:
        """Seconds of training in this interval so far."""
        return time.monotonic() - self.began - self.paused_seconds

    @property
    def total_seconds(self) -> float:
        """Seconds of training since this clock began, in all intervals, without those that it was begun with."""
        return self._ended + self.train_seconds

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as waiting for data."""
        began = time.monotonic()
        yield
        self.data_seconds += time.monotonic() - began

    @contextlib.contextmanager
    def paused(self, kind: str | None = None) -> Iterator[None]:
        """Excludes the time of the block from training. kind: a key of `pauses`; None: part of what a step takes."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self.paused_seconds += seconds
        if kind:
            self.pauses[kind].append(seconds)
            self.totals[kind] += seconds
            self._apart += seconds

    def seconds_per_step(self, step: int) -> float:
        """What a step takes, with everything but `pauses`; NaN before the first. To be called at each logging step of a start:
        the newer half of the intervals between these calls counts, and the first one, which includes the warm-up, only until
        there is a second."""
        now = time.monotonic()
        if step > self._noted[0]:
            self._intervals.append((step - self._noted[0], now - self._noted[1] - self._apart))
            self._noted, self._apart = (step, now), 0.0
        known = list(self._intervals)[1:] or list(self._intervals)
        if not known:
            return math.nan
        steps, seconds = map(sum, zip(*known[len(known) // 2 :], strict=True))
        return seconds / steps


def _peaks(device: torch.device) -> dict[str, float]:
    """peak_memory_gib and, on GPUs, peak_reserved_gib: that, and what PyTorch's allocator holds for later tensors."""
    peaks = {"peak_memory_gib": peak_memory_gib(device)}
    if device.type == "cuda":
        peaks["peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return peaks


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory since the start: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with contextlib.suppress(OSError, IndexError):  # Linux has its own peak for each program; ru_maxrss includes the launcher's
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def perplexity(loss: float) -> float:
    """exp(loss); infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Bits per byte of UTF-8 text, which is comparable between tokenizers."""
    return loss / math.log(2) / bytes_per_token
