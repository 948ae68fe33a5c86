"""A training step on a GPU that is not there: the real model, engine, optimizer and `train_step` on fake tensors, as one rank of
many, and what they need: memory by phase, messages, FLOPs, and a time at assumed rates.

Counted: every tensor of the step, rounded as CUDA's allocator rounds; every collective; every FLOP. Assumed: rates, and what a
process needs besides its tensors. docs/planning.md says what each figure means and cannot know.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, unset_fake_temporarily

from pretrain import UserError
from pretrain.config import Config, accumulation
from pretrain.data.batches import Batch
from pretrain.data.checks import Finding
from pretrain.engines.base import Engine
from pretrain.engines.start import start_engine
from pretrain.model import flops
from pretrain.model.config import ModelConfig
from pretrain.model.loss import chunk_positions
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer
from pretrain.plan import compiled
from pretrain.plan.fake_rank import DEVICE, fake_rank
from pretrain.plan.roofline import Roofline, roofline
from pretrain.plan.scaling import Cluster, assumptions
from pretrain.plan.tracker import Allocation, Trace, Tracker
from pretrain.train import train_step

OUTSIDE_GIB = 3.0
"""Driver and error correction, CUDA context, NCCL and kernels' code: what a card's memory loses before the first tensor."""
FRAGMENTATION = 0.04
"""Share of the peak that the allocator cannot use, and the workspaces of products and attention. With expandable segments."""


class CannotRun(UserError):
    """The step would fail on the device."""


@dataclass(frozen=True)
class DryRun:
    """What one rank needs for one step. Bytes are those of the rank, times those of the step."""

    model: ModelConfig
    config: Config
    cluster: Cluster
    trace: Trace
    state: dict[str, int]
    """Bytes of weights, gradients (summed, when the optimizer takes them) and moments (with master weights), without rounding."""
    repeats: dict[str, int]
    """Phase -> how often a step runs it."""
    graphs: int
    """Compiled graphs."""

    @property
    def tokens(self) -> int:
        """Tokens of a rank in a step."""
        batch = self.config.batch
        return batch.global_batch_size // self.cluster.gpus * self.config.data.sequence_length

    @property
    def peak(self):
        """The phase with the highest peak."""
        return max(self.trace.phases, key=lambda phase: phase.peak_bytes)

    @property
    def needed_gib(self) -> float:
        """Memory of a device that the run needs, with the margins."""
        return self.peak.peak_bytes * (1 + FRAGMENTATION) / 2**30 + OUTSIDE_GIB

    @property
    def fits(self) -> bool:
        """Whether the device has that much."""
        return self.needed_gib <= self.cluster.device.memory_gib

    def held_at_peak(self) -> dict[str, int]:
        """Bytes at the peak, by what they are for, largest first."""
        held = collections.Counter()
        for block in self.trace.live(self.peak.peak_event):
            held[purpose(block)] += block.bytes
        return dict(held.most_common())

    def largest_at_peak(self, count: int) -> list[dict[str, Any]]:
        """The lines of code that hold most memory at the peak."""
        groups = collections.Counter()
        for block in self.trace.live(self.peak.peak_event):
            groups[purpose(block), block.where, block.shape, str(block.dtype).removeprefix("torch.")] += block.bytes
        keys = ("purpose", "where", "shape", "dtype")
        return [{"bytes": size, **dict(zip(keys, key, strict=True))} for key, size in groups.most_common(count)]

    def messages(self) -> list[dict[str, Any]]:
        """Collectives of a step, by kind and group."""
        total: dict[tuple, list[float]] = {}
        for (phase, *key), message in self.trace.messages.items():
            if repeats := self.repeats.get(phase, 0):
                sums = total.setdefault(tuple(key), [0, 0, 0])
                for i, value in enumerate((message.calls, message.payload_bytes, message.wire_bytes)):
                    sums[i] += repeats * value
        return [
            {
                "collective": collective, "ranks": len(ranks), "across_nodes": len({r // self.cluster.gpus_per_node for r in ranks}) > 1,
                "calls": calls, "payload_bytes": payload, "wire_bytes": wire,
            }
            for (collective, ranks), (calls, payload, wire) in total.items()
        ]  # fmt: skip

    def work(self) -> dict[str, dict[str, float]]:
        """FLOPs and bytes of a step by kind of operator."""
        sums: dict[str, dict[str, float]] = {}
        for (phase, kind), work in self.trace.work.items():
            row = sums.setdefault(kind, {"calls": 0, "flops": 0.0, "bytes": 0.0})
            for name in row:
                row[name] += self.repeats.get(phase, 0) * getattr(work, name)
        return sums

    @property
    def time(self) -> Roofline:
        """The estimate."""
        rates = assumptions(self.cluster.device)
        return roofline(self.trace, self.repeats, self.model.hidden_size, self.cluster, rates)

    @property
    def mfu(self) -> float:
        """Model FLOPs of the step, without recomputation, over what the device could do in that time."""
        model_flops = flops.flops_per_token(self.model, self.config.data.sequence_length) * self.tokens
        return model_flops / self.time.total / (self.cluster.device.bf16_tflops * 1e12)


def purpose(block: Allocation) -> str:
    """What a block of memory is for."""
    if block.kind:
        return block.kind
    if block.where.startswith("pretrain/model/loss.py"):
        return "logits and loss"
    part = block.phase.partition(" ")[0]
    return {"forward": "activations", "backward": "backward pass"}.get(part, part)


# ---------------------------------------------------------------- one step


def dry_run(config: Config, model: ModelConfig, cluster: Cluster, rank: int = 0) -> DryRun:
    """Runs one step of rank `rank` on fake tensors. Rank 0 holds the largest shards.

    config: valid for `cluster.gpus` ranks. model: resolved. Raises CannotRun for a step that would fail on the device.
    """
    config = dataclasses.replace(config, engine=on_gpu(config))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    micro_batches = accumulation(config.batch, cluster.gpus)
    tracker = Tracker(DEVICE)
    with warnings.catch_warnings(), fake_rank(rank, cluster.gpus, cluster.gpus_per_node, config.engine.name), tracker:
        warnings.simplefilter("ignore")
        engine = start_engine(config.engine)
        engine.device, engine.compile_backend = DEVICE, compiled.backend(tracker)
        tracker.begin("start")
        try:
            state = _one_step(engine, config, model, min(2, micro_batches), tracker)
        except DynamicOutputShapeException as error:
            raise CannotRun(f"{_line_of(error)}: the shape of a result depends on values, which the device would wait for") from error
        except RuntimeError as error:
            if "same device" not in str(error):
                raise
            raise CannotRun(f"{_line_of(error)}: a tensor of the host meets one of the device ({error})") from error
        tracker.end()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if config.engine.compile != "none" and not graphs:
        raise RuntimeError("this version of torch compiles nothing on fake tensors; set engine.compile to none, or use torch 2.13")
    names = [phase.name for phase in tracker.trace.phases if phase.name != "start"]
    repeats = {name: micro_batches - 1 if micro_batches > 1 and name.endswith(" 1") else 1 for name in names}
    return DryRun(model, config, cluster, tracker.trace, state, repeats, graphs)


def on_gpu(config: Config):
    """The settings of the engine, with their defaults on GPUs."""
    return dataclasses.replace(config.engine, precision=config.engine.precision or "bf16")


def _one_step(engine: Engine, config: Config, model: ModelConfig, micro_batches: int, tracker: Tracker) -> dict[str, int]:
    """Builds, and trains one step of `micro_batches`. -> bytes of the training state."""

    def make() -> Transformer:
        if config.engine.name == "zero3":
            return Transformer(model)
        with unset_fake_temporarily(), torch.device("meta"):
            return Transformer(model)

    optimizer, state = config.optimizer, {}
    engine.prepare(make, lambda module: build_optimizer(module, optimizer), optimizer.grad_clip, 0, lambda shard: None)
    engine._make_moments()
    parameters = list(engine.model.parameters())
    held = [tensor for each in engine.local_states(saving=False) for tensor in each.tensors.values()]
    state["moments"] = tracker.label(held, "moments")
    weights = [tensor for each in parameters for tensor in (each.data, getattr(each, "ds_tensor", each.data))]
    shared = tracker.label([*held, *weights], "moments")
    state["weights"] = tracker.label(weights, "weights")
    state["moments"] = shared - state["weights"]
    tracker.label(engine.model.buffers(), "buffers")
    if (flat := getattr(getattr(engine, "_zero", None), "grad_partitions_flat_buffer", None)) is not None:
        tracker.label([flat], "gradients")
    window = [_batch(config, model) for _ in range(micro_batches)]
    for tensor in window[0]:
        if tensor is not None:
            tracker.label([tensor], "batch")

    def label_gradients(updated: torch.optim.Optimizer, *_) -> None:
        gradients = (each.grad for group in updated.param_groups for each in group["params"] if each.grad is not None)
        state["gradients"] = state.get("gradients", 0) + tracker.label(gradients, "gradients")  # zero3 updates part by part

    engine.optimizer.register_step_pre_hook(label_gradients)
    _announce_phases(engine, tracker)
    tracker.in_step = True
    train_step(engine, window, config.optimizer.lr)
    tracker.in_step = False
    return state


def _batch(config: Config, model: ModelConfig) -> Batch:
    shape = (config.batch.micro_batch_size, config.data.sequence_length)
    tokens_BT, labels_BT, documents_BT = (torch.empty(shape, dtype=torch.int64, device=DEVICE) for _ in range(3))
    return Batch(tokens_BT, labels_BT, documents_BT if config.data.document_mask else None)


def _announce_phases(engine: Engine, tracker: Tracker) -> None:
    """Makes the calls of a step begin a phase each."""
    number = 0

    def before(name: str, call: Callable, numbered: bool) -> Callable:
        def announced(*args):
            nonlocal number
            number += name == "forward"
            tracker.begin(f"{name} {number}" if numbered else name)
            return call(*args)

        return announced

    engine.count_tokens = before("count", engine.count_tokens, False)
    engine.forward = before("forward", engine.forward, True)
    engine.backward = before("backward", engine.backward, True)
    engine.update = before("update", engine.update, False)


def _line_of(error: BaseException) -> str:
    """`file:line` of the innermost line of this project in a traceback, outside of what observes it."""
    line, trace = "library", error.__traceback__
    while trace:
        path = trace.tb_frame.f_code.co_filename
        if f"{os.sep}pretrain{os.sep}" in path and f"{os.sep}plan{os.sep}" not in path:
            line = f"pretrain{path.rpartition(f'{os.sep}pretrain')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return line


# ---------------------------------------------------------------- findings


_FAULTS = {
    "host-read": ("waits-for-device", "reads a value of the device on the host, which waits until all queued work is done"),
    "copy-to-host": ("waits-for-device", "copies a tensor to the host, which waits until all queued work is done"),
    "host-tensor": ("copies-from-host", "makes a tensor on the host and copies it from pageable memory, which blocks"),
    "shape-by-value": ("waits-for-device", "gives a result whose shape depends on values, which the host must wait for"),
}


def fault_findings(run: DryRun) -> list[Finding]:
    """What would make a GPU wait, or hold memory that no step needs, with the line of code. DeepSpeed reads values of the device
    in every step, which only warns."""
    zero = run.config.engine.name.startswith("zero")
    found = []
    for fault, times in run.trace.faults.items():
        name, text = _FAULTS[fault.name]
        stops = not (zero and (fault.where.startswith("pretrain/engines/zero.py") or fault.where == "library"))
        found.append(Finding(name, fault.where, f"{fault.operator} {text}; {times} times in a step of two micro-batches", stops))
    return found + list(_oversized(run))


def _oversized(run: DryRun) -> Iterator[Finding]:
    length, size = run.config.data.sequence_length, run.config.batch.micro_batch_size
    model, positions = run.model, run.config.batch.micro_batch_size * length
    rows = flops.vocabulary_rows(model)
    widths = {model.hidden_size, model.head_dim, model.intermediate_size, rows, model.vocab_size}
    chunk = max(chunk_positions("cuda", rows), 2048)
    seen = set()
    for block in run.trace.allocations:
        if block.phase == "start" or block.where in seen or block.kind in ("weights", "gradients", "moments"):
            continue
        if block.shape[-2:] == (length, length) and (length not in widths or block.dtype == torch.bool or len(block.shape) == 4):
            seen.add(block.where)
            text = f"{block.operator} makes a tensor {_shown(block)} with an entry for every pair of positions, {block.bytes / 2**20:.0f} MiB"
            yield Finding("quadratic-mask", block.where, f"{text}; attention needs none", stops=True)
        elif block.shape and block.shape[-1] in (rows, model.vocab_size) and positions > chunk and size:
            if math.prod(block.shape[:-1]) == positions:
                seen.add(block.where)
                text = f"{block.operator} makes logits of all positions at once, {_shown(block)}, {block.bytes / 2**30:.1f} GiB"
                yield Finding("full-logits", block.where, f"{text}; compute the loss in chunks of positions", stops=True)


def _shown(block: Allocation) -> str:
    return f"{tuple(block.shape)} in {str(block.dtype).removeprefix('torch.')}"
