"""The table of docs/engines.md that says which engine has which kind of parallelism: what it promises equals one process, and
everything else is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain import train
from pretrain.config import ConfigError, EngineConfig, ParallelConfig, Problem, load
from pretrain.data.batches import Batch
from pretrain.model.config import ModelConfig, MoeConfig, resolve_model
from pretrain.model.transformer import Transformer, build
from pretrain.report.metrics import Meter
from tests.distributed.test_engines import engine_of
from tests.ranks import run_ranks

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).resolve().parents[2]
KINDS = ("tensor", "sequence", "expert")
LENGTH, SEQUENCES, STEPS, LR, CLIP, BOUND = 32, 4, 3, 0.1, 0.5, 1e-5
MODEL = resolve_model(
    ModelConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        moe=MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, num_shared_experts=1),
    ),
    vocab_size=100,
    sequence_length=LENGTH,
)  # fmt: skip


def table() -> dict[tuple[str, tuple[str, ...]], bool]:
    """(engine, kinds) -> whether the document promises this combination."""
    text = (ROOT / "docs" / "engines.md").read_text().split("<!-- kinds of parallelism -->")[1].split("<!-- end -->")[0]
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]
    columns = [KINDS if name == "all three" else tuple(name.split(" + ")) for name in head[1:]]
    return {
        (line[0], kinds): {"yes": True, "no": False}[cell]
        for line in lines
        for kinds, cell in zip(columns, line[1:], strict=True)
    }


TABLE = table()
CUT = [pair for pair, able in TABLE.items() if able]


def engine_config(name: str, kinds: tuple[str, ...]) -> EngineConfig:
    parallel = ParallelConfig(**dict.fromkeys(kinds, 2))
    return EngineConfig(name=name, precision="fp32", parallel=parallel, keep_whole_below=100, timeout_seconds=60)


def batch_of(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens_BT, labels_BT = torch.randint(0, 100, (2, SEQUENCES, LENGTH), generator=generator)
    valid_BT = torch.rand(SEQUENCES, LENGTH, generator=generator) < torch.tensor([[0.9], [0.1], [0.5], [0.0]])
    return Batch(tokens_BT, torch.where(valid_BT, labels_BT, -100), None)


class Sgd(torch.optim.SGD):
    """All gradients are finite here, so found_inf, which only fused optimizers accept, is set aside."""

    def step(self) -> None:
        found_inf = self.__dict__.pop("found_inf", None)
        super().step()
        self.found_inf = found_inf


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return Sgd(model.parameters(), lr=LR, momentum=0.9)


def one_process() -> list[tuple[float, float]]:
    """[(loss, gradient norm)] of the steps, by the model alone on entire batches."""
    model, shown = build(MODEL, "cpu", seed=1), []
    optimizer = sgd(model)
    for step in range(STEPS):
        tokens_BT, labels_BT, _ = batch_of(step)
        loss = model(tokens_BT, labels_BT).loss_sum / (labels_BT != -100).sum()
        loss.backward()
        shown.append((loss.item(), nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()))
        optimizer.step()
        optimizer.zero_grad()
    return shown


def on_ranks(pairs: list[tuple[str, tuple[str, ...]]]) -> list[list[tuple[float, float]]]:
    """On each rank, for each (engine, kinds): [(loss, gradient norm)] of the steps."""
    results = []
    for pair in pairs:
        engine = engine_of(engine_config(*pair))
        engine.prepare(lambda: Transformer(MODEL), sgd, CLIP, seed=1)
        meter, shown = Meter(engine.device, engine.rank, engine.world_size), []
        share = SEQUENCES // engine.mesh.sample_ranks
        for step in range(STEPS):
            mine = [tensor[engine.mesh.sample_rank * share :][:share] for tensor in batch_of(step)[:2]]
            meter.add(*train.train_step(engine, [engine.part_of(Batch(*mine, None))], LR))
            figures = meter.read(engine.all_reduce)
            shown.append((figures["loss"], figures["grad_norm"]))
        results.append(shown)
    return results


def check(subtests, ranks: int, pairs: list[tuple[str, tuple[str, ...]]]) -> None:
    expected = one_process()
    for rank, results in enumerate(run_ranks(ranks, on_ranks, pairs, timeout=300)):
        for (name, kinds), shown in zip(pairs, results, strict=True):
            with subtests.test(f"{name} {' + '.join(kinds)}, rank {rank} of {ranks}"):
                difference = float((torch.tensor(shown) / torch.tensor(expected) - 1).abs().max())
                print(f"{name} {' + '.join(kinds)} on {ranks}: {difference:.1e}")
                assert difference < BOUND


def test_each_kind_that_the_table_promises_equals_one_process(subtests):
    check(subtests, 2, [(name, kinds) for name, kinds in CUT if len(kinds) == 1 and not name.startswith("zero")])


@pytest.mark.slow
def test_each_combination_that_the_table_promises_equals_one_process(subtests):
    check(subtests, 2, [(name, kinds) for name, kinds in CUT if len(kinds) == 1 and name.startswith("zero")])
    check(subtests, 4, [(name, kinds) for name, kinds in CUT])


def problems_of(argv: list[str], world_size: int) -> list[Problem]:
    try:
        load(argv, world_size=world_size)
    except ConfigError as error:
        return error.problems
    return []


def test_every_combination_is_in_the_table_and_those_without_promise_are_refused_with_one_that_works():
    names = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
    combinations = [kinds for number in (1, 2, 3) for kinds in itertools.combinations(KINDS, number)]
    assert sorted(TABLE) == sorted(itertools.product(names, combinations))
    base = ["--model.vocab_size", "128", "--data.synthetic.kind", "uniform", "--train.max_steps", "1"]
    base += ["--model.moe.num_experts", "4"]
    for (name, kinds), able in TABLE.items():
        flags = ["--engine.name", name, *(word for kind in kinds for word in (f"--engine.parallel.{kind}", "2"))]
        problems = problems_of([*base, *flags], world_size=4)
        refused = {problem.key.rpartition(".")[2] for problem in problems}
        assert refused == (set() if able else {kind for kind in kinds if not TABLE[name, (kind,)]}), (name, kinds)
        for problem in problems:
            advice = problem.message.partition("; the nearest that works: ")[2].split()
            assert advice and load([*base, *flags, *advice], world_size=4)
