"""A training step on a GPU that is not there: the real model, engine, optimizer and `train_step` on fake tensors, as one rank
of many, and what they need: memory by phase, messages, FLOPs, and a time at assumed rates.

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
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, unset_fake_temporarily

from pretrain import UserError
from pretrain.config import Config, accumulation, validate
from pretrain.data.batches import Batch
from pretrain.data.checks import Finding
from pretrain.engines import parallel
from pretrain.engines.base import Engine
from pretrain.engines.config import sample_ranks
from pretrain.engines.mesh import Mesh
from pretrain.engines.start import start_engine
from pretrain.model import flops
from pretrain.model.config import ModelConfig
from pretrain.model.loss import chunk_positions
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer
from pretrain.plan import compiled
from pretrain.plan.fake_rank import DEVICE, fake_rank
from pretrain.plan.memory import FRAGMENTATION, OUTSIDE_GIB, memory, needed_gib
from pretrain.plan.roofline import Roofline, roofline
from pretrain.plan.scaling import Cluster, assumptions
from pretrain.plan.tracker import Allocation, Trace, Tracker
from pretrain.run.memory import changed, fitting, flags_of
from pretrain.train import train_step


class CannotRun(UserError):
    """The step would fail on the device, or could not be captured. `name` and `where` are those of a finding."""

    def __init__(self, name: str, where: str, text: str):
        super().__init__(text)
        self.name, self.where = name, where


@dataclass(frozen=True)
class DryRun:
    """What one rank needs for one step. Bytes are those of the rank, times those of the step."""

    model: ModelConfig
    config: Config
    cluster: Cluster
    trace: Trace
    state: dict[str, int]
    """Bytes of weights, gradients (summed, when the optimizer takes them) and moments (with master weights), not rounded."""
    repeats: dict[str, int]
    """Phase -> how often a step runs it."""
    compiled: str
    """What is compiled: none, blocks or model."""
    graphs: int
    """Compiled graphs."""

    @property
    def tokens(self) -> int:
        """Tokens of a rank in a step; ranks that share sequences have an equal part each."""
        return self.config.batch.global_batch_size * self.config.data.sequence_length // self.cluster.gpus

    @property
    def peak(self):
        """The phase with the highest peak."""
        return max(self.trace.phases, key=lambda phase: phase.peak_bytes)

    @property
    def needed_gib(self) -> float:
        """Memory of a device that the run needs, with the margins."""
        return needed_gib(self.peak.peak_bytes)

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
                "collective": collective,
                "awaited": awaited,
                "ranks": len(ranks),
                "across_nodes": len({rank // self.cluster.gpus_per_node for rank in ranks}) > 1,
                "calls": calls,
                "payload_bytes": payload,
                "wire_bytes": wire,
            }
            for (collective, ranks, awaited), (calls, payload, wire) in total.items()
        ]

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


_LOSS_LINES = {f"pretrain/engines/parallel.py:{line}" for *_, line in parallel._chunk_step.__code__.co_lines()}
"""Tensor parallelism computes the loss of a part of the vocabulary there."""


def purpose(block: Allocation) -> str:
    """What a block of memory is for."""
    if block.kind:
        return block.kind
    if block.where.startswith("pretrain/model/loss.py") or block.where in _LOSS_LINES:
        return "logits and loss"
    part = block.phase.partition(" ")[0]
    return {"forward": "activations", "backward": "backward pass"}.get(part, part)


# ---------------------------------------------------------------- one step


def dry_run(config: Config, model: ModelConfig, cluster: Cluster, rank: int = 0, kind: str = "cuda") -> DryRun:
    """Runs one step of rank `rank` on fake tensors. Rank 0 holds the largest shards.

    config: valid for `cluster.gpus` ranks. model: resolved. kind: of device to choose kernels for. Raises CannotRun for a step
    that would fail on the device.
    """
    config = dataclasses.replace(config, engine=on_gpu(config))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    micro_batches = accumulation(config.batch, sample_ranks(config.engine, cluster.gpus))
    tracker = Tracker(DEVICE)
    with warnings.catch_warnings(), fake_rank(rank, cluster.gpus, cluster.gpus_per_node, config.engine.name, kind), tracker:
        warnings.simplefilter("ignore")
        engine = start_engine(config.engine)
        engine.device, engine.compile_backend = DEVICE, compiled.backend(tracker)
        tracker.begin("start")
        try:
            state = one_step(engine, config, model, min(2, micro_batches), tracker, fill=lambda shard: None)
        except DynamicOutputShapeException as error:
            text = "the shape of a result depends on values, which the host must wait for; the step ends here"
            raise CannotRun("waits-for-device", _line_of(error), text) from error
        except RuntimeError as error:
            if "same device" not in str(error):
                raise
            text = f"a tensor of the host meets one of the device; make it on the device of the others ({error})"
            raise CannotRun("wrong-device", _line_of(error), text) from error
        tracker.end()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if engine.compiled != "none" and not graphs:
        raise UserError("this version of torch compiles nothing on fake tensors; set engine.compile to none")
    names = [phase.name for phase in tracker.trace.phases if phase.name != "start"]
    repeats = {name: micro_batches - 1 if micro_batches > 1 and name.endswith(" 1") else 1 for name in names}
    return DryRun(model, config, cluster, tracker.trace, state, repeats, engine.compiled, graphs)


def on_gpu(config: Config):
    """The settings of the engine, with their defaults on GPUs."""
    return dataclasses.replace(config.engine, precision=config.engine.precision or "bf16")


def one_step(
    engine: Engine, config: Config, model: ModelConfig, micro_batches: int, tracker: Tracker, fill: Callable | None = None
) -> dict[str, int]:
    """Builds the model of an engine that has started and trains one step of `micro_batches` on real or fake tensors, under a
    `tracker` that is entered. fill: as for `Engine.prepare`. Returns the bytes of the training state."""

    def make() -> Transformer:
        if config.engine.name == "zero3":
            return Transformer(model)
        with unset_fake_temporarily(), torch.device("meta"):
            return Transformer(model)

    optimizer, state = config.optimizer, {}
    engine.prepare(make, lambda module: build_optimizer(module, optimizer), optimizer.grad_clip, 0, fill)
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
    window = [engine.part_of(_batch(config, tracker.device)) for _ in range(micro_batches)]
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


def _batch(config: Config, device: torch.device) -> Batch:
    shape = (config.batch.micro_batch_size, config.data.sequence_length)
    tokens_BT, labels_BT, documents_BT = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(3))
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
    """What would make a GPU wait, or hold memory that no step needs, with the line of code. DeepSpeed reads values of the
    device in every step, which only warns."""
    zero = run.config.engine.name.startswith("zero")
    found = []
    for fault, times in run.trace.faults.items():
        name, text = _FAULTS[fault.name]
        stops = not (zero and (fault.where.startswith("pretrain/engines/zero.py") or fault.where == "library"))
        text = f"{fault.operator} {text}; {times} times in a step of at most two micro-batches"
        found.append(Finding(name, fault.where, text, stops))
    return found + list(_oversized(run))


def _oversized(run: DryRun) -> Iterator[Finding]:
    length, model = run.config.data.sequence_length, run.model
    kinds = run.config.engine.parallel
    positions = run.config.batch.micro_batch_size * length // kinds.sequence
    rows = flops.vocabulary_rows(model) // kinds.tensor
    widths = {model.hidden_size, model.head_dim, model.intermediate_size, rows, model.vocab_size}
    kept = {
        id(block) for phase in run.trace.phases if phase.name.startswith("forward") for block in run.trace.live(phase.end_event)
    }
    seen = set()
    for block in run.trace.allocations:
        if block.phase == "start" or block.where in seen or block.kind in ("weights", "gradients", "moments"):
            continue
        size = f"{tuple(block.shape)} in {str(block.dtype).removeprefix('torch.')}, {block.bytes / 2**20:,.0f} MiB"
        surely_pairs = length not in widths or block.dtype == torch.bool or len(block.shape) == 4
        if block.shape[-2:] == (length, length) and surely_pairs:
            seen.add(block.where)
            text = f"{block.operator} makes a tensor with an entry for every pair of positions, {size}; attention needs none"
            yield Finding("quadratic-mask", block.where, text, stops=True)
        elif block.shape[-1:] in ((rows,), (model.vocab_size,)) and math.prod(block.shape[:-1]) == positions:
            if positions <= chunk_positions("cuda", rows) and id(block) not in kept:
                continue  # one chunk of the loss has all positions
            seen.add(block.where)
            text = f"{block.operator} makes the logits of all positions at once, {size}; compute the loss in chunks"
            yield Finding("full-logits", block.where, text, stops=True)


# ---------------------------------------------------------------- what would fit


def plan_findings(run: DryRun, progress: Callable[[str], None] = lambda text: None) -> list[Finding]:
    """does-not-fit and communication-bound, with the changes of settings that mend them; each change is run as well.

    progress: called with what is being tried.
    """
    device, found = run.cluster.device, []
    if not run.fits:
        text = (
            f"needs {run.needed_gib:.1f} GiB of {device.memory_gib:g} GiB: {run.peak.peak_bytes / 2**30:.1f} GiB of tensors in "
            f"{run.peak.name}, {FRAGMENTATION:.0%} for fragmentation, {OUTSIDE_GIB:g} GiB outside of torch"
        )
        mended = [f"{keys} ({tried.needed_gib:.1f} GiB)" for keys, tried in _fitting(run, progress)]
        advice = f"; these fit: {'; '.join(mended)}" if mended else "; no known change fits: use more ranks or a smaller model"
        found.append(Finding("does-not-fit", device.name, text + advice, stops=True))
    elif (time := run.time).communication > time.computing:
        text = (
            f"messages take {time.communication:.3g} s of a step and computation {time.computing:.3g} s (estimates), so "
            "they cannot be hidden"
        )
        tried = [(keys, other.time) for keys, other in _calmer(run, progress)]
        mended = [f"{keys} ({other.communication:.3g} and {other.computing:.3g} s)" for keys, other in tried]
        otherwise = "; a larger batch.global_batch_size gives a step more to compute"
        advice = f"; better: {'; '.join(mended)}" if mended else otherwise
        found.append(Finding("communication-bound", "engine", text + advice))
    return found


def _fitting(run: DryRun, progress: Callable[[str], None]) -> Iterator[tuple[str, DryRun]]:
    """Changes with which the run fits: those that `memory.fitting` finds by the formula, corrected by what this run needs more
    or less than that."""
    config, ranks = run.config, run.cluster.gpus

    def needed(changed: Config) -> float:
        return needed_gib(_formula(changed, run.model, ranks) * correction)

    correction = run.peak.peak_bytes / _formula(config, run.model, ranks)
    for fit in fitting(config, ranks, "cuda", needed, run.cluster.device.memory_gib):
        if (tried := _try(run, progress, fit.changes)) and tried[1].fits:
            yield tried


def _formula(config: Config, model: ModelConfig, ranks: int) -> float:
    length, size = config.data.sequence_length, config.batch.micro_batch_size
    return memory(model, length, size, config.engine, ranks, config.optimizer.name, config.optimizer.averages).peak


def _calmer(run: DryRun, progress: Callable[[str], None]) -> Iterator[tuple[str, DryRun]]:
    """Single changes with which computation hides the messages, and the run fits."""
    engine, nodes = run.config.engine, run.cluster.gpus // run.cluster.gpus_per_node
    tried = []
    if engine.name == "fsdp2" and 1 < nodes != engine.replicas:
        tried.append(_try(run, progress, {"engine.replicas": nodes}))
    if engine.name == "zero3" and nodes > 1:
        tried.append(_try(run, progress, {"engine.name": "fsdp2", "engine.replicas": nodes}))
    size, most = run.config.batch.micro_batch_size, run.config.batch.global_batch_size // run.cluster.gpus
    wanted = size * run.time.communication / run.time.computing  # messages per micro-batch do not depend on its size
    for larger in [each for each in range(size + 1, most + 1) if most % each == 0 and each >= wanted][:1]:
        tried.append(_try(run, progress, {"batch.micro_batch_size": larger}))
    for each in tried:
        if each and each[1].fits and each[1].time.communication <= each[1].time.computing:
            yield each


def _try(run: DryRun, progress: Callable[[str], None], changes: dict[str, Any]) -> tuple[str, DryRun] | None:
    """Runs with other values of some keys. -> (the keys and values as flags, the run), or None if such settings are refused."""
    config = changed(run.config, changes)
    if validate(config, run.cluster.gpus):
        return None
    keys = flags_of(changes)
    progress(keys)
    return keys, dry_run(config, run.model, run.cluster)


# ---------------------------------------------------------------- for people and for programs


def describe(run: DryRun) -> list[str]:
    """The run as lines of text."""
    gib, config, cluster = 2**30, run.config, run.cluster
    engine, batch = config.engine, config.batch
    steps = accumulation(batch, sample_ranks(engine, cluster.gpus))
    lines = [
        f"{cluster.device.name}, {cluster.gpus} ranks ({cluster.gpus_per_node} per node); {engine.name}, {engine.precision}, "
        f"compile {run.compiled}, activation checkpointing {engine.activation_checkpointing}; micro-batch "
        f"{batch.micro_batch_size} x {config.data.sequence_length} tokens, accumulation {steps}; nothing was run on a GPU",
        str(Mesh(engine, 0, cluster.gpus)),
        "state, GiB per rank: " + ", ".join(f"{kind} {size / gib:.2f}" for kind, size in run.state.items()),
        "phase            start   peak    end   GiB per rank",
    ]
    for phase in run.trace.phases:
        if phase.name not in ("start", "count"):
            values = (phase.start_bytes, phase.peak_bytes, phase.end_bytes)
            lines.append(f"{phase.name:14} " + " ".join(f"{value / gib:6.2f}" for value in values))
    held = ", ".join(f"{name} {size / gib:.2f}" for name, size in run.held_at_peak().items() if size >= gib / 100)
    lines.append(f"at the peak, in {run.peak.name}: {held}")
    for row in run.largest_at_peak(6):
        lines.append(f"  {row['bytes'] / gib:6.2f} GiB  {row['purpose']:16} {row['dtype']:8} {row['shape']}  {row['where']}")
    for row in run.messages():
        if row["wire_bytes"] >= 1e6:
            where = "across nodes" if row["across_nodes"] else "inside a node"
            lines.append(
                f"{row['collective']:14} {row['wire_bytes'] / 1e9:8.2f} GB sent per rank and step, {row['calls']:.0f} calls "
                f"among {row['ranks']} ranks, {where}"
            )
    for kind, row in run.work().items():
        lines.append(f"{kind:14} {row['flops'] / 1e12:8.1f} TFLOP, {row['bytes'] / 1e9:8.1f} GB per rank and step")
    if engine.parallel.expert > 1:
        waits = run.model.num_hidden_layers * steps * (1 if engine.activation_checkpointing == "none" else 2)
        lines.append(f"the host reads how many rows go to each rank, and waits for the device, {waits} times per step")
    time, rates = run.time, assumptions(cluster.device)
    lines += [
        f"estimate: {time.total:.3f} s per step ({time.products:.3f} products, {time.attention:.3f} attention, "
        f"{time.other:.3f} other, {time.exposed:.3f} of {time.communication:.3f} messages not hidden), "
        f"{run.tokens / time.total:,.0f} tokens/s per GPU, MFU {run.mfu:.0%}",
        f"  assumed, of the data sheet: products {rates.products:.0%} at great width, attention {rates.attention:.0%}, "
        f"memory {rates.memory:.0%}, links {rates.link:.0%}; network {cluster.network_gb_per_second * rates.network:g} GB/s "
        "per node",
        f"needs {run.needed_gib:.1f} of {cluster.device.memory_gib:g} GiB: peak {run.peak.peak_bytes / gib:.1f}, fragmentation "
        f"{FRAGMENTATION:.0%}, outside of torch {OUTSIDE_GIB:g}",
    ]
    return lines


def to_json(run: DryRun, findings: list[Finding]) -> dict[str, Any]:
    """The run as plain values: bytes, seconds, FLOPs."""
    cluster, time = run.cluster, run.time
    return {
        "device": cluster.device.name,
        "ranks": cluster.gpus,
        "ranks_per_node": cluster.gpus_per_node,
        "engine": dataclasses.asdict(run.config.engine),
        "batch": dataclasses.asdict(run.config.batch),
        "parameters": flops.num_parameters(run.model).total,
        "state_bytes": run.state,
        "phases": [dataclasses.asdict(phase) for phase in run.trace.phases if phase.name != "start"],
        "peak_bytes": run.peak.peak_bytes,
        "held_at_peak_bytes": run.held_at_peak(),
        "largest_at_peak": run.largest_at_peak(20),
        "messages": run.messages(),
        "work": run.work(),
        "compiled": run.compiled,
        "compiled_graphs": run.graphs,
        "estimate": {**time._asdict(), "total": time.total, "mfu": run.mfu},
        "tokens_per_second_per_gpu": run.tokens / time.total,
        "assumptions": dataclasses.asdict(assumptions(cluster.device)),
        "needed_gib": run.needed_gib,
        "memory_gib": cluster.device.memory_gib,
        "findings": [finding._asdict() for finding in findings],
    }
