"""Sequence, tensor and expert parallelism compute what one process computes, with every engine and option: loss, gradient norm,
routing figures, the gradient of each parameter and the weights.

Each test starts the ranks once for all its rows: a start costs more than the few tiny steps of a row.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.config import EngineConfig, ParallelConfig
from pretrain.data.batches import Batch
from pretrain.engines.base import Engine
from pretrain.invariance import BOUNDS
from pretrain.model.config import ModelConfig, MoeConfig, resolve_model
from pretrain.model.transformer import Transformer, build
from pretrain.report.metrics import Meter
from pretrain.train import train_step
from tests.distributed.test_engines import engine_of
from tests.ranks import run_ranks
from tests.test_step import Momentum, assemble, pieces_of

pytestmark = pytest.mark.timeout(900)

SEQUENCES, STEPS, LR, CLIP = 4, 3, 1e-2, 0.5
DENSE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, aux_loss_weight=0.05, z_loss_weight=0.01)


@dataclasses.dataclass(frozen=True)
class Row:
    """A model, a batch, and how they are distributed."""

    engine: EngineConfig
    model: ModelConfig
    documents: bool
    micro_batch: int
    backend: str


def row(
    name: str, kinds: dict[str, int], model: dict | None = None, moe: dict | None = None, *, length: int = 24,
    documents: bool = False, micro_batch: int = 2, backend: str = "aot_eager", **engine,
) -> Row:  # fmt: skip
    """A row of engine `name`. moe: changes to MOE; None: a dense model. backend: of torch.compile."""
    experts = {} if moe is None else {"moe": MoeConfig(**MOE | moe)}
    config = ModelConfig(**DENSE | dict(vocab_multiple=16) | (model or {}) | experts)
    settings = EngineConfig(**dict(name=name, precision="fp32", keep_whole_below=100, parallel=ParallelConfig(**kinds)) | engine)
    return Row(settings, resolve_model(config, vocab_size=97, sequence_length=length), documents, micro_batch, backend)


def global_batch(model: ModelConfig, documents: bool, step: int) -> Batch:
    """Sequences with 0 to 90 % valid labels."""
    generator, shape = torch.Generator().manual_seed(1000 + step), (SEQUENCES, model.max_position_embeddings)
    tokens_BT, labels_BT = (torch.randint(0, model.vocab_size, shape, generator=generator) for _ in range(2))
    share_B1 = torch.tensor([0.9, 0.1, 0.0, 0.5]).roll(step)[:, None]
    labels_BT = torch.where(torch.rand(shape, generator=generator) < share_B1, labels_BT, -100)
    documents_BT = (torch.rand(shape, generator=generator) < 0.2).cumsum(1) if documents else None
    return Batch(tokens_BT, labels_BT, documents_BT)


@functools.cache
def alone(model: ModelConfig, documents: bool) -> tuple[list[tuple], dict[str, torch.Tensor]]:
    """The reference, one process without engine, step or meter: (loss, norm) of each step; weights, and the clipped gradients of
    the first step."""
    module, shown, state = build(model, "cpu", seed=0), [], {}
    optimizer = Momentum(module.parameters(), lr=LR, momentum=0.9)
    for step in range(STEPS):
        batch = global_batch(model, documents, step)
        loss = F.cross_entropy(module(batch.tokens_BT, None, batch.documents_BT).flatten(0, 1), batch.labels_BT.flatten())
        loss_sum, routing_LX = module(*batch)
        tokens = (batch.labels_BT != -100).sum()
        (loss_sum / tokens if model.moe else loss).backward()  # PyTorch has no losses of routers
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        if step == 0:
            state |= {f"momentum_buffer/{name}": p.grad.clone() for name, p in module.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        if module.needs_router_updates:
            module.update_routers(routing_LX, torch.tensor(True))
        shown.append((loss.item(), norm.item(), int(tokens), routing_LX))
    return shown, state | {f"model/{name}": p.detach() for name, p in (*module.named_parameters(), *module.named_buffers())}


def together(rows: dict[str, Row]) -> dict[str, tuple]:
    """On a rank: figures of each step, and pieces of the first gradients and the final weights."""
    return {name: steps_of(each) for name, each in rows.items()}


def steps_of(row: Row) -> tuple[list[tuple], list[tuple]]:
    engine = started(row)
    meter, shown = Meter(engine.device, engine.rank, engine.world_size), []
    for step in range(STEPS):
        result = train_step(engine, window_of(engine, row, step), LR)
        meter.add(result.loss_sum, result.tokens, result.grad_norm, result.applied)
        figures = meter.read(engine.all_reduce)
        routing_LX = None if result.routing_LX is None else engine.all_reduce(result.routing_LX.clone()).numpy()
        shown.append((figures["loss"], figures["grad_norm"], int(result.tokens), routing_LX))
        if step == 0:
            gradients = pieces_of(engine, "momentum_buffer/")
    return shown, [*gradients, *pieces_of(engine, "model/")]


def started(row: Row) -> Engine:
    engine = engine_of(row.engine)
    engine.compile_backend = row.backend
    engine.prepare(
        lambda: Transformer(row.model), lambda model: Momentum(model.parameters(), lr=LR, momentum=0.9), CLIP, seed=0
    )
    return engine


def window_of(engine: Engine, row: Row, step: int) -> list[Batch]:
    """This rank's part of the global batch."""
    batch, share = global_batch(row.model, row.documents, step), SEQUENCES // engine.mesh.sample_ranks
    mine = [None if x is None else x[engine.mesh.sample_rank * share :][:share].split(row.micro_batch) for x in batch]
    count = len(mine[0])
    return [engine.part_of(Batch(*(None if x is None else x[i] for x in mine))) for i in range(count)]


def check(subtests, ranks: int, rows: dict[str, Row]) -> None:
    results = run_ranks(ranks, together, rows, timeout=600)
    for name, each in rows.items():
        with subtests.test(name):
            found = assemble([piece for rank in results for piece in rank[name][1]])
            shown = [figures for rank in results for figures in rank[name][0]]
            compare(name, each, shown, found)


def compare(name: str, row: Row, shown: list[tuple], found: dict[str, torch.Tensor]) -> None:
    """Compares what all ranks showed, and their assembled state, with one process."""
    true_shown, true = alone(row.model, row.documents)
    bf16 = row.engine.precision == "bf16"
    pairs = list(zip(shown, true_shown * (len(shown) // STEPS), strict=True))
    loss, norm = (max(abs(mine[i] / alone[i] - 1) for mine, alone in pairs) for i in range(2))
    weight = max(float((found[key] - value).abs().max()) for key, value in true.items() if key.startswith("model/"))
    gradients = {key: float((found[key] - value).norm() / value.norm()) for key, value in true.items() if "model/" not in key}
    worst = max(gradients, key=gradients.get)
    print(f"{name}: loss {loss:.1e}, norm {norm:.1e}, weights {weight:.1e}, {worst} {gradients[worst]:.1e}")
    bounds = BOUNDS["fp32" if not bf16 else "bf16 with experts" if row.model.moe else "bf16"]
    assert all(difference <= bound for difference, bound in zip((loss, norm, weight), bounds, strict=True))
    assert gradients[worst] <= (0.1 if bf16 else 1e-5)
    for mine, alone_ in pairs:
        assert mine[2] == alone_[2]
        if row.model.moe and not bf16:
            torch.testing.assert_close(torch.as_tensor(mine[3]), alone_[3], rtol=1e-5, atol=0)


WINDOW = dict(qk_norm=True, tie_word_embeddings=True, sliding_window=7)
SIGMOID = dict(score="sigmoid", num_shared_experts=1, bias_update_rate=0.01)
ROWS = {
    "ddp": {
        "sequence": row("ddp", dict(sequence=2), WINDOW | dict(num_key_value_heads=1), documents=True, length=26),
        "sequence, experts": row("ddp", dict(sequence=2), moe={}, micro_batch=1, activation_checkpointing="selective"),
        "tensor": row("ddp", dict(tensor=2), WINDOW | dict(vocab_multiple=256), documents=True, micro_batch=1),
        "tensor, experts": row("ddp", dict(tensor=2), dict(qk_norm=True), moe=SIGMOID, activation_checkpointing="full"),
        "experts": row("ddp", dict(expert=2), moe=SIGMOID, micro_batch=1),
        "experts, global balance": row("ddp", dict(expert=2), moe=dict(balance="global_batch"), activation_checkpointing="full"),
    },
    "fsdp2": {
        "sequence": row("fsdp2", dict(sequence=2), WINDOW | dict(num_key_value_heads=1), documents=True, length=26),
        "sequence, experts": row("fsdp2", dict(sequence=2), moe=dict(balance="global_batch"), reduce_gradients="step", micro_batch=1),
        "tensor": row("fsdp2", dict(tensor=2), WINDOW | dict(vocab_multiple=256), documents=True, micro_batch=1),
        "tensor, experts": row("fsdp2", dict(tensor=2), dict(qk_norm=True), moe=SIGMOID, activation_checkpointing="selective"),
        "experts": row("fsdp2", dict(expert=2), moe=SIGMOID, micro_batch=1, reduce_gradients="step"),
        "experts, recomputed": row("fsdp2", dict(expert=2), moe={}, activation_checkpointing="selective"),
        "tensor and experts": row("fsdp2", dict(tensor=2, expert=2), moe=SIGMOID, micro_batch=1),
    },
    "zero": {
        f"{name} sequence": row(name, dict(sequence=2), WINDOW, documents=True, micro_batch=1)
        for name in ("zero1", "zero2", "zero3")
    },
}  # fmt: skip


@pytest.mark.parametrize("engine", ROWS)
def test_each_kind_equals_one_process(subtests, engine):
    check(subtests, 2, ROWS[engine])
