"""Checks, for a configuration, that no number depends on how a batch is split: five real steps on processes of this machine,
against one process that takes the entire batch with PyTorch's own loss and no code of the step, the engine or the meter.

The model is shrunk (grouped queries, query norm, tied embeddings, sliding window and experts stay); the engine and its options
are those of the configuration. Steps are plain momentum steps: AdamW divides a gradient by its own size, and near zero its
rounding errors would hide what the check looks for.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import Config, EngineConfig
from pretrain.data.batches import Batch
from pretrain.engines.base import Engine
from pretrain.engines.start import start_engine
from pretrain.model.config import ModelConfig, resolve_model, shrink
from pretrain.model.transformer import Transformer, build
from pretrain.report.metrics import Meter
from pretrain.run.processes import run_processes
from pretrain.train import train_step

STEPS, LENGTH, VOCABULARY, LR = 5, 32, 128, 1e-2
BOUNDS = {"fp32": (1e-6, 1e-6, 1e-6), "bf16": (2e-3, 5e-3, 3e-4), "bf16 with experts": (1e-2, 3e-2, 4e-3)}
"""Largest differences allowed in loss (relative), norm (relative) and weights (absolute); in bf16 ten times those measured. In
bf16 a token whose experts have nearly equal scores may go to another one, so weights differ by more."""


@dataclass(frozen=True)
class Case:
    """One way to split the batch."""

    engine: EngineConfig
    ranks: int
    micro_batch: int
    sequences: int
    """In the global batch."""
    experts: bool = False
    """The model has experts."""

    @property
    def bounds(self) -> tuple[float, float, float]:
        """The differences allowed."""
        return BOUNDS["bf16 with experts" if self.experts and self.engine.precision == "bf16" else self.engine.precision]

    @property
    def accumulation(self) -> int:
        """Micro-batches per step and rank."""
        return self.sequences * self.engine.parallel.sequence * self.engine.parallel.tensor // (self.ranks * self.micro_batch)


@dataclass(frozen=True)
class Outcome:
    """The result of a case, and its distance from the reference."""

    case: Case
    losses: list[float]
    norms: list[float]
    loss_difference: float
    norm_difference: float
    weight_difference: float
    bytes_per_rank: dict[str, int]
    """weights; gradients (summed over micro-batches, until the optimizer has taken them); state (master weights that are not
    the weights, and momentum)."""

    @property
    def passed(self) -> bool:
        """True if every difference is within its bound; NaN never is."""
        found = (self.loss_difference, self.norm_difference, self.weight_difference)
        return all(value <= bound for value, bound in zip(found, self.case.bounds, strict=True))


def small_model(model: ModelConfig) -> ModelConfig:
    """A model of the same kind that a CPU trains in seconds, resolved."""
    return resolve_model(shrink(model, LENGTH), vocab_size=VOCABULARY, sequence_length=LENGTH)


def cases(config: Config, most_ranks: int) -> list[Case]:
    """The engine of a configuration on 1, 2, 4, ... ranks, with small and large micro-batches."""
    found = []
    precisions = ["fp32"] if config.engine.precision == "fp32" else ["fp32", "bf16"]
    for precision in precisions:
        ranks = max(1, config.engine.replicas)
        while ranks <= most_ranks:
            sequences = 4 * max(2, most_ranks)
            for micro_batch in sorted({1, sequences // ranks // 2}):
                engine = dataclasses.replace(config.engine, precision=precision, world_size=None, keep_whole_below=1000)
                found.append(Case(engine, ranks, micro_batch, sequences, experts=config.model.moe is not None))
            ranks *= 2
    return found


def check_invariance(model: ModelConfig, tried: list[Case], grad_clip: float, seed: int) -> Iterator[Outcome]:
    """Runs each case on its own processes, on CPUs: fp32 products are precise enough there, those of GPUs are not.

    model: resolved. Raises RuntimeError with the traceback of a rank that fails.
    """
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    zero = ["deepspeed", "transformers"] if any(case.engine.name.startswith("zero") for case in tried) else []
    multiprocessing.set_forkserver_preload(["torch", "accelerate", "pretrain.train", "torch.distributed.fsdp", *zero])
    references: dict[int, tuple] = {}
    for case in tried:
        if case.sequences not in references:
            references[case.sequences] = _reference(model, case.sequences, grad_clip, seed)
        shown, weights = references[case.sequences]
        ranks = run_processes(case.ranks, _run, case, model, grad_clip, seed)
        found = _assemble([piece for _, pieces, _ in ranks for piece in pieces])
        pairs = [pair for mine, _, _ in ranks for pair in zip(mine, shown, strict=True)]
        loss, norm = (max(_difference(a[i], b[i]) for a, b in pairs) for i in (0, 1))
        weight = max(float((found[name] - true).abs().max()) for name, true in weights.items() if not _rounded(name, case))
        most = {key: max(rank[2][key] for rank in ranks) for key in ranks[0][2]}
        losses, norms = ([step[i] for step in ranks[0][0]] for i in (0, 1))
        yield Outcome(case, losses, norms, loss, norm, weight, most)


def _rounded(name: str, case: Case) -> bool:
    """Routers' biases and shares count choices: in bf16 some tokens go to another expert, and counts differ by whole tokens."""
    return case.engine.precision == "bf16" and name.endswith((".e_score_correction_bias", ".expert_share"))


def _difference(found: float, true: float) -> float:
    return abs(found / true - 1) if math.isfinite(found) else math.inf


def _batch(sequences: int, step: int) -> Batch:
    """Sequences with 3 to 90 % valid labels, one of them without any: a mean of means would be far off."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens_BT = torch.randint(0, VOCABULARY, (sequences, LENGTH), generator=generator)
    labels_BT = torch.randint(0, VOCABULARY, (sequences, LENGTH), generator=generator)
    shares_B1 = torch.tensor([0.9, 0.1, 0.5, 0.03, 0.7, 0.0, 0.3, 0.2]).repeat(sequences // 8 + 1)[:sequences, None]
    valid_BT = torch.rand(sequences, LENGTH, generator=generator) < shares_B1
    return Batch(tokens_BT, torch.where(valid_BT, labels_BT, -100), None)


class _Momentum(torch.optim.SGD):
    """Momentum steps. All gradients are finite here, so found_inf, which only fused optimizers accept, is set aside."""

    def step(self) -> None:
        found_inf = self.__dict__.pop("found_inf", None)
        super().step()
        self.found_inf = found_inf


def _momentum(model: nn.Module) -> torch.optim.Optimizer:
    return _Momentum(model.parameters(), lr=LR, momentum=0.9)


def _reference(config: ModelConfig, sequences: int, grad_clip: float, seed: int) -> tuple[list[tuple], dict[str, Tensor]]:
    """[(loss, norm)] of each step and the final weights, in one process.

    With experts, the gradient is that of the model's own loss on the entire batch: PyTorch has no router losses.
    """
    model = build(config, "cpu", seed)
    optimizer, shown = _momentum(model), []
    for step in range(STEPS):
        batch = _batch(sequences, step)
        loss = F.cross_entropy(model(batch.tokens_BT).flatten(0, 1), batch.labels_BT.flatten())
        loss_sum, routing_LX = model(batch.tokens_BT, batch.labels_BT)
        objective = loss_sum / (batch.labels_BT != -100).sum() if config.moe else loss
        optimizer.zero_grad()
        objective.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        optimizer.step()
        if model.needs_router_updates:
            model.update_routers(routing_LX, torch.tensor(True))
        shown.append((loss.item(), norm.item()))
    return shown, {f"model/{name}": tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _run(case: Case, model: ModelConfig, grad_clip: float, seed: int) -> tuple[list[tuple], list[tuple], dict[str, int]]:
    """On a rank: [(loss, norm)], its shards (name, shape, offset, values) of the weights, and its bytes."""
    engine = start_engine(case.engine)
    engine.prepare(lambda: Transformer(model), _momentum, grad_clip, seed)
    gradients = _GradientBytes(engine)
    meter, shown = Meter(engine.device, engine.rank, engine.world_size), []
    share = case.sequences // engine.mesh.sample_ranks
    for step in range(STEPS):
        mine = [
            tensor[engine.mesh.sample_rank * share :][:share].split(case.micro_batch)
            for tensor in _batch(case.sequences, step)[:2]
        ]
        window = [engine.to_device(engine.part_of(Batch(*tensors, None))) for tensors in zip(*mine, strict=True)]
        meter.add(*train_step(engine, window, LR))
        figures = meter.read(engine.all_reduce)
        shown.append((figures["loss"], figures["grad_norm"]))
    sizes = _sizes(engine) | {"gradients": sum(gradients.of_steps) // STEPS}
    shards = [shard for shard in engine.shards(saving=True) if shard.name.startswith("model/")]
    pieces = [(shard.name, shard.shape, shard.offset, shard.values.numpy(force=True).copy()) for shard in shards]
    engine.close()
    return shown, pieces, sizes


class _GradientBytes:
    """Bytes of the gradients of each step: of all storages that hold them after a micro-batch or when the optimizer takes them.
    A sum that moves from one storage to another counts twice, since both exist at that moment."""

    def __init__(self, engine: Engine):
        self.of_steps: list[int] = []
        self._groups, self._seen, backward = engine.optimizer.param_groups, {}, engine.backward
        engine.backward = lambda loss: (backward(loss), self._look())
        engine.optimizer.register_step_pre_hook(lambda *_: self._end_step())

    def _look(self) -> None:
        self._seen |= _storages(p.grad for group in self._groups for p in group["params"] if p.grad is not None)

    def _end_step(self) -> None:
        self._look()
        self.of_steps.append(sum(self._seen.values()))
        self._seen = {}


def _sizes(engine: Engine) -> dict[str, int]:
    """Bytes of live tensors on this rank; a tensor that is both weight and master weight counts once, as a weight."""
    weights = _storages(tensor for p in engine.model.parameters() for tensor in (p.data, getattr(p, "ds_tensor", p.data)))
    held = _storages(tensor for state in engine.local_states(saving=False) for tensor in state.tensors.values())
    return {"weights": sum(weights.values()), "state": sum(size for at, size in held.items() if at not in weights)}


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of each storage of this rank's tensors."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, local)}


def _assemble(pieces: list[tuple]) -> dict[str, Tensor]:
    """Full tensors from the shards of all ranks; values that no rank wrote are NaN, which never passes."""
    whole: dict[str, Tensor] = {}
    for name, shape, offset, values in pieces:
        flat = whole.setdefault(name, torch.full(shape, math.nan)).view(-1)
        flat[offset : offset + len(values)] = torch.as_tensor(values)
    return whole
