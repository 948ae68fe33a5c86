"""Muon follows the published rule on one rank, on replicas, on shards, on cut matrices, and on several of them at once."""

from __future__ import annotations

import functools
import gc
import io
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from pretrain.checkpoint import storage
from pretrain.config import Config, ConfigError, EngineConfig, OptimizerConfig, ParallelConfig, load, validate
from pretrain.data.batches import Batch
from pretrain.engines.shards import Holders
from pretrain.engines.start import start_engine
from pretrain.model.config import ModelConfig, MoeConfig, resolve_model
from pretrain.model.transformer import Transformer
from pretrain.optim import partition
from pretrain.optim.averages import Averages
from pretrain.optim.muon import Muon, newton_schulz
from pretrain.optim.optimizer import build_optimizer
from pretrain.optim.partition import Partition
from pretrain.train import train_step
from tests.ranks import run_ranks
from tests.saving import save
from tests.test_step import global_batch

# Wide, tall, square, several of one shape, rows that no number of ranks divides, fewer rows than ranks, stacks of matrices.
MATRICES = [(16, 48), (48, 16), (24, 24), (16, 48), (7, 20), (10, 4), (2, 8), (1, 6), (5, 12, 20), (2, 20, 12), (16, 48)]
OTHERS = [(37, 8), (19,), (1,)]
SHAPES = [*MATRICES, *OTHERS]
RATES, DECAY, MOMENTUM, BETAS, EPS = (0.02, 0.03, 0.01, 0.02, 0.005), 0.3, 0.9, (0.8, 0.95), 1e-8
COEFFICIENTS = 3.4445, -4.7750, 2.0315
RULES = {
    "plain": {},
    "all": {"row_beta": 0.7, "cautious_decay": True, "averages": Averages(0.2, 0.6, 0.8, peak_lr=0.02)},
}
# Number of ranks: {name: replicas, shards and parts: `Placement`}.
MESHES = {
    2: {"2 replicas": (2, 1, 1), "2 shards": (1, 2, 1), "2 parts": (1, 1, 2)},
    4: {
        "4 replicas": (4, 1, 1),
        "4 shards": (1, 4, 1),
        "2 replicas of 2 shards": (2, 2, 1),
        "2 replicas of 2 parts": (2, 1, 2),
        "2 shards of 2 parts": (1, 2, 2),
    },
}
BOTH_KINDS = ["2 replicas of 2 shards", "2 shards of 2 parts"]
LAYERS = 6 * [(64, 64), (32, 64), (32, 64), (64, 64), (176, 64), (176, 64), (64, 176), (8, 32, 64)]


def initial(shape: tuple, number: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)) / 4


def gradient(shape: tuple, number: int, step: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + number)) * 10.0 ** -(number % 4)


# ---------------------------------------------------------------- the published rule, one matrix at a time, in fp64


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    a, b, c = COEFFICIENTS
    x = matrix / (matrix.square().sum().sqrt() + 1e-7)
    for _ in range(5):
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


def expected_weights(options: dict) -> list[tuple[torch.Tensor, ...]]:
    """(weights, their average, where rounding may decide on which side of zero an update is) of each parameter. Rows, cautious
    decay, average and lookahead as their papers have them; the last one with its mean step, and weights before the step."""
    beta, cautious, averages = options.get("row_beta"), options.get("cautious_decay"), options.get("averages", Averages())
    found = []
    for number, shape in enumerate(SHAPES):
        w, m, v = initial(shape, number).double(), torch.zeros(shape).double(), torch.zeros(shape).double()
        mean_step, before, average = torch.zeros_like(w), w, w
        rows, doubtful = torch.zeros(shape[:-1]).double(), torch.zeros(shape, dtype=torch.bool)
        for step, lr in enumerate(RATES, start=1):
            g = gradient(shape, number, step).double()
            if number < len(MATRICES):
                m = MOMENTUM * m + (1 - MOMENTUM) * g
                ahead = MOMENTUM * m + (1 - MOMENTUM) * g
                matrices = [ahead] if ahead.ndim == 2 else list(ahead)
                update = torch.stack([orthogonalized(x) for x in matrices]).view(shape)
                if beta:
                    norm = update.norm(dim=(-2, -1), keepdim=True)
                    rows = beta * rows + (1 - beta) * update.square().mean(-1)
                    update = update / rows.sqrt()[..., None]
                    update = update * norm / update.norm(dim=(-2, -1), keepdim=True)
                update = 0.2 * math.sqrt(max(shape[-2:])) * update
            else:
                m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
                update = m / (1 - BETAS[0] ** step) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS)
            doubtful |= update.abs() < 1e-4
            w = w - lr * DECAY * w * (update * w >= 0 if cautious else 1) - lr * update
            average = average + (1 - min(averages.average_decay, (step - 1) / (step + 9))) * (w - average)
            mean_step = averages.lookahead_decay * mean_step + (1 - averages.lookahead_decay) * (w - before)
            before = w
            w = w + (averages.lookahead * lr / averages.peak_lr if lr > averages.peak_lr / 3 else 0) * mean_step
        found.append((w, average, doubtful if cautious else torch.zeros_like(doubtful)))
    return found


# ---------------------------------------------------------------- the same with Muon, on ranks


class Placement:
    """Distributes tensors over replicas x shards x parts ranks. Tensors that all ranks hold stay plain; matrices are cut into
    parts along their longer dimension if it divides, then sharded along dimension 0."""

    def __init__(self, replicas: int = 1, shards: int = 1, parts: int = 1):
        self.parts, self.plain = parts, shards * parts == 1
        if not self.plain:
            self.mesh = init_device_mesh("cpu", (replicas, shards, parts), mesh_dim_names=("replica", "shard", "part"))
            self.copies = init_device_mesh("cpu", (replicas, shards * parts))

    def cut(self, shape: tuple) -> int | None:
        """The dimension that is cut, if one is."""
        dim = int(len(shape) == 2 and shape[1] > shape[0])
        return dim if self.parts > 1 and len(shape) == 2 and shape[dim] % self.parts == 0 else None

    def parameter(self, tensor: torch.Tensor) -> nn.Parameter:
        parameter, dim = nn.Parameter(self.distribute(tensor)), self.cut(tuple(tensor.shape))
        if dim is not None:
            parameter.holders = Holders(*(self.copies.get_group(each) for each in (0, 1)), dim, self.parts)
        elif self.parts > 1:
            parameter.holders = Holders(self.mesh.get_group("part"), self.mesh.get_group("shard"))
        return parameter

    def distribute(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.plain:
            return tensor.clone()
        if (dim := self.cut(tuple(tensor.shape))) is not None:
            tensor = tensor.chunk(self.parts, dim)[self.mesh.get_local_rank("part")].contiguous()
        mesh = self.mesh["replica", "shard"] if self.mesh.size(0) > 1 else self.mesh["shard"]
        return distribute_tensor(tensor, mesh, [Replicate(), Shard(0)][-mesh.ndim :])

    def full(self, tensor: torch.Tensor, shape: tuple) -> torch.Tensor:
        """The way back. shape: of the full tensor."""
        tensor = full(tensor)
        if (dim := self.cut(shape)) is None or tensor.shape == shape:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.parts)]
        dist.all_gather(parts, tensor, group=self.mesh.get_group("part"))
        return torch.cat(parts, dim)


def make(placement: Placement | None = None, **options) -> tuple[list[nn.Parameter], Muon]:
    placement = placement or Placement()
    parameters = [placement.parameter(initial(shape, number)) for number, shape in enumerate(SHAPES)]
    muon, other = parameters[: len(MATRICES)], parameters[len(MATRICES) :]
    groups = [
        {"params": muon, "weight_decay": DECAY, "momentum": MOMENTUM},
        {"params": other, "weight_decay": DECAY, "betas": BETAS, "eps": EPS},
    ]
    return parameters, Muon(groups, lr=1.0, **options)


def set_gradients(parameters: list[nn.Parameter], step: int, optimizer: Muon, placement: Placement | None = None) -> None:
    for group in optimizer.param_groups:
        group["lr"] = RATES[step - 1]
    for number, (parameter, shape) in enumerate(zip(parameters, SHAPES, strict=True)):
        parameter.grad = (placement or Placement()).distribute(gradient(shape, number, step))


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def state_of(optimizer: Muon, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    states = [tensor for parameter in parameters for _, tensor in sorted(optimizer.state[parameter].items())]
    return [full(tensor) for tensor in [*parameters, *states]]


def five_steps(placement: Placement, options: dict) -> tuple[list, bool, set[float]]:
    """Returns the final weights and averages, whether a poisoned step in the middle left everything untouched, and the step
    counts."""
    parameters, optimizer = make(placement, **options)
    untouched = True
    for step in range(1, len(RATES) + 1):
        if step == 3:
            before = state_of(optimizer, parameters)
            for number, (parameter, shape) in enumerate(zip(parameters, SHAPES, strict=True)):
                parameter.grad = placement.distribute(torch.full(shape, math.nan if number % 2 else math.inf))
            optimizer.found_inf = torch.ones(())
            optimizer.step()
            untouched = all(map(torch.equal, before, state_of(optimizer, parameters)))
        set_gradients(parameters, step, optimizer, placement)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
    counts = {optimizer.state[parameter]["step"].item() for parameter in parameters}
    tensors = [(w, optimizer.state[w].get("average", w)) for w in parameters]
    weights = [tuple(placement.full(each, shape).numpy() for each in pair) for pair, shape in zip(tensors, SHAPES, strict=True)]
    return weights, untouched, counts


def shapes_worked_on() -> list[tuple]:
    """The shapes of the matrices of LAYERS that this rank worked on."""
    seen = []
    for plan in Partition.of([torch.zeros(shape) for shape in LAYERS]):
        values = torch.zeros(sum(rows.length for rows in plan.rows))
        for _ in plan.map(lambda batch: seen.extend([tuple(batch.shape[1:])] * len(batch)) or batch, values):
            pass
    return seen


def on_ranks(ranks: int, names: list[str]) -> tuple[dict[tuple[str, str], tuple], list[tuple]]:
    dist.init_process_group("gloo")
    results = (
        {
            (name, rule): five_steps(Placement(*MESHES[ranks][name]), options)
            for name in names
            for rule, options in RULES.items()
        },
        shapes_worked_on(),
    )
    gc.collect()
    dist.destroy_process_group()
    return results


@functools.cache
def expected_of(rule: str) -> list[tuple[torch.Tensor, ...]]:
    return expected_weights(RULES[rule])


def check(name: str, rule: str, found: list, untouched: bool, counts: set[float]) -> None:
    largest, left_out, count = 0.0, 0, 0
    for (weight, average), (expected, expected_average, doubtful) in zip(found, expected_of(rule), strict=True):
        differences = [(torch.as_tensor(weight) - expected).abs()]
        if "averages" in RULES[rule]:
            differences.append((torch.as_tensor(average) - expected_average).abs())
        largest = max(largest, *(each[~doubtful].max().item() for each in differences))
        left_out, count = left_out + int(doubtful.sum()), count + doubtful.numel()
    print(f"{name}, {rule}: {largest:.1e} without {left_out} of {count}")
    assert largest < 1e-6 and left_out < count / 50, (name, rule)
    assert untouched and counts == {len(RATES)}, name


@pytest.mark.parametrize("rule", RULES)
def test_five_steps_equal_the_published_rule_and_a_poisoned_step_changes_nothing(rule):
    check("one rank", rule, *five_steps(Placement(), RULES[rule]))


def test_many_small_passes_give_the_same_result_as_one(monkeypatch):
    monkeypatch.setattr(partition, "MAX_ELEMENTS_PER_RANK", 1000)
    sizes = [sum(rows.length for rows in plan.rows) for plan in Partition.of([torch.empty(shape) for shape in MATRICES])]
    assert len(sizes) > 3 and max(sizes) < 1000 + max(map(math.prod, MATRICES))
    check("many passes", "all", *five_steps(Placement(), RULES["all"]))


@pytest.mark.parametrize(
    ("ranks", "names"), [(2, [*MESHES[2]]), (4, BOTH_KINDS), pytest.param(4, [*MESHES[4]], marks=pytest.mark.slow)], ids=str
)
def test_ranks_follow_the_published_rule_and_divide_the_matrices_evenly(ranks, names):
    results, seen = zip(*run_ranks(ranks, on_ranks, ranks, names), strict=True)
    for name in names:
        for each, rule in itertools.product(results, RULES):
            check(name, rule, *each[name, rule])
    every_matrix = [shape[-2:] for shape in LAYERS for _ in range(shape[0] if len(shape) == 3 else 1)]
    assert sorted(shape for shapes in seen for shape in shapes) == sorted(every_matrix)
    cost = [sum(min(s) ** 2 * (2 * max(s) + min(s)) for s in shapes) for shapes in seen]
    assert max(cost) < 1.1 * sum(cost) / ranks


# ---------------------------------------------------------------- the iteration


@pytest.mark.parametrize("spread", [0, 5], ids=["random", "ill-conditioned"])
@pytest.mark.parametrize("shape", [(3, 16, 32), (2, 90, 32), (64, 64)])
def test_newton_schulz_in_fp32_equals_the_steps_in_fp64(shape, spread):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -spread, shape[-1])
    batch = matrices.view(-1, *shape[-2:])
    for found, matrix in zip(newton_schulz(batch), batch.double(), strict=True):
        expected = orthogonalized(matrix)
        assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("shape", [(3, 12, 40), (3, 40, 12), (2, 24, 24), (1, 1, 9), (4, 9, 1)], ids=str)
def test_newton_schulz_applies_the_polynomial_to_the_singular_values_and_keeps_directions(shape):
    draw = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=draw, dtype=torch.float64), full_matrices=False)
    s = torch.logspace(0, -2, min(shape[1:]), dtype=torch.float64).repeat(shape[0], 1)
    p = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        p = COEFFICIENTS[0] * p + COEFFICIENTS[1] * p**3 + COEFFICIENTS[2] * p**5
    found = newton_schulz(((u * s[:, None]) @ v).float())
    torch.testing.assert_close(found, ((u * p[:, None]) @ v).float(), atol=1e-5, rtol=1e-5)
    assert found.shape == shape


@pytest.mark.parametrize(("dtype", "band"), [(torch.float32, (0.68, 1.21)), (torch.bfloat16, (0.6, 1.3))], ids=str)
@pytest.mark.parametrize("shape", [(64, 192), (192, 64), (64, 64)], ids=str)
def test_singular_values_of_the_update_are_near_one(shape, dtype, band):
    draw = torch.Generator().manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(8, *shape, generator=draw), full_matrices=False)
    matrices = (u * torch.logspace(0, -1.5, 64)[None, None] * 1e-4) @ v
    s = torch.linalg.svdvals(newton_schulz(matrices.to(dtype)).float())
    assert band[0] < s.min() and s.max() < band[1]


def test_a_zero_matrix_stays_zero():
    assert newton_schulz(torch.zeros(2, 3, 5)).count_nonzero() == 0


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (64, 64), (3, 64, 32)], ids=str)
def test_updates_of_every_shape_are_as_large_as_those_of_adamw(shape):
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = Muon([{"params": [weight], "momentum": 0.95}], lr=0.01)
    weight.grad = 1e-3 * gradient(shape, 0, 1)
    optimizer.step()
    assert 0.2 * 0.68 < weight.detach().square().mean().sqrt().item() / 0.01 < 0.2 * 1.21


# ---------------------------------------------------------------- a model under an engine

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, qk_norm=True)
EXPERTS = MoeConfig(num_experts=4, moe_intermediate_size=24, num_shared_experts=1)
DENSE, ROUTED = (resolve_model(ModelConfig(**SHAPE, moe=moe), vocab_size=97, sequence_length=24) for moe in (None, EXPERTS))
# With a smaller eps, AdamW enlarges the rounding of gradients near zero.
SETTINGS = OptimizerConfig(name="muon", lr=0.01, eps=1e-5, row_beta=0.9, lookahead=0.6, lookahead_decay=0.8, average_decay=0.3)


def train_model(model: ModelConfig, settings: EngineConfig, steps: range, start: Path | None, end: Path | None) -> list[tuple]:
    """Takes steps of 8 sequences, split over the ranks, from the checkpoint in the folder `start`, if any, and saves one in the
    folder `end`. Returns this rank's shards (name, offset, values)."""
    AcceleratorState._reset_state(reset_partial_state=True)
    engine = start_engine(settings)
    engine.prepare(lambda: Transformer(model), lambda model: build_optimizer(model, SETTINGS), 0.5, 0)
    if start:
        storage.load(storage.checkpoints(start)[0], engine)
    for step in steps:
        mine = [tensor.chunk(engine.mesh.sample_ranks)[engine.mesh.sample_rank] for tensor in global_batch(step)[:2]]
        train_step(engine, [engine.part_of(Batch(*mine, None))], SETTINGS.lr)
    if end:
        save(end, steps[-1], engine, {})
    assert engine.updates == steps[-1]
    return [(shard.name, shard.offset, shard.values.numpy().copy()) for shard in engine.shards(saving=False)]


def alone(model: ModelConfig, steps: range, start: Path | None = None, end: Path | None = None) -> dict:
    """The full state of one process."""
    return {name: values for name, _, values in train_model(model, EngineConfig(), steps, start, end)}


def difference(found: list[tuple], expected: dict) -> float:
    """Of row_square, a rank has what it works on."""
    assert {name for name, *_ in found} | {name for name in expected if name.startswith("row_square/")} == expected.keys()
    parts = [values - expected[name][offset : offset + len(values)] for name, offset, values in found]
    return max(abs(part).max() for part in parts if len(part))


PLACES = {
    2: {
        "ddp": (DENSE, {}),
        "fsdp2": (DENSE, {"name": "fsdp2"}),
        "fsdp2 sequence 2": (DENSE, {"name": "fsdp2", "sequence": 2}),
        "ddp tensor 2": (ROUTED, {"tensor": 2}),
        "fsdp2 tensor 2": (ROUTED, {"name": "fsdp2", "tensor": 2}),
        "ddp expert 2": (ROUTED, {"expert": 2}),
        "fsdp2 expert 2": (ROUTED, {"name": "fsdp2", "expert": 2}),
    },
    4: {
        "ddp": (DENSE, {}),
        "fsdp2 in 2 replicas": (DENSE, {"name": "fsdp2", "replicas": 2}),
        "ddp tensor 2": (ROUTED, {"tensor": 2}),
        "fsdp2 tensor 2": (DENSE, {"name": "fsdp2", "tensor": 2}),
        "fsdp2 tensor 2 in 2 replicas": (ROUTED, {"name": "fsdp2", "tensor": 2, "replicas": 2}),
        "ddp tensor 2, expert 2": (ROUTED, {"tensor": 2, "expert": 2}),
        "fsdp2 tensor 2, expert 2": (ROUTED, {"name": "fsdp2", "tensor": 2, "expert": 2}),
        "fsdp2 tensor 2, expert 4": (ROUTED, {"name": "fsdp2", "tensor": 2, "expert": 4}),
        "fsdp2 tensor 2, sequence 2": (DENSE, {"name": "fsdp2", "tensor": 2, "sequence": 2}),
    },
}
"""Ranks -> name -> (model, settings of the engine)."""


def train_places(ranks: int, folder: Path) -> dict:
    """In each place, steps 3 to 5."""
    weights = {}
    for name, (model, settings) in PLACES[ranks].items():
        kinds = {key: value for key, value in settings.items() if key in ("tensor", "sequence", "expert")}
        others = {key: value for key, value in settings.items() if key not in kinds}
        engine = EngineConfig(**others, parallel=ParallelConfig(**kinds))
        start = folder / ("dense" if model is DENSE else "routed")
        weights[name] = train_model(model, engine, range(3, 6), start, folder / name)
    return weights


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_moves_from_one_process_to_any_engine_and_back(subtests, tmp_path, ranks):
    models, expected = {"dense": DENSE, "routed": ROUTED}, {}
    for name, model in models.items():
        alone(model, range(1, 3), end=tmp_path / name)
        expected[id(model)] = [alone(model, range(1, last)) for last in (6, 7)]
    found = run_ranks(ranks, train_places, ranks, tmp_path, timeout=600)
    for name, (model, _) in PLACES[ranks].items():
        with subtests.test(name):
            after_5, after_6 = expected[id(model)]
            largest = max(difference(rank[name], after_5) for rank in found)
            resumed = train_model(model, EngineConfig(), range(6, 7), tmp_path / name, None)
            print(f"{name} on {ranks}: {largest:.1e}, back on one {difference(resumed, after_6):.1e}")
            assert largest < 2e-6 and difference(resumed, after_6) < 2e-6


def test_one_process_resumes_from_a_checkpoint_bit_for_bit(tmp_path):
    alone(DENSE, range(1, 3), end=tmp_path)
    straight = alone(DENSE, range(1, 6))
    assert difference(train_model(DENSE, EngineConfig(), range(3, 6), tmp_path, None), straight) == 0


# ---------------------------------------------------------------- state, and what is refused


def test_resuming_from_a_state_dict_is_exact():
    def two_steps(first: int, parameters, optimizer) -> None:
        for step in range(first, first + 2):
            set_gradients(parameters, step, optimizer)
            optimizer.step()

    straight, optimizer = make()
    two_steps(1, straight, optimizer)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "weights": [w.detach() for w in straight]}, file)
    two_steps(3, straight, optimizer)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, optimizer = make()
    for parameter, weight in zip(resumed, saved["weights"], strict=True):
        parameter.data.copy_(weight)
    optimizer.load_state_dict(saved["optimizer"])
    two_steps(3, resumed, optimizer)
    assert all(map(torch.equal, straight, resumed))


def test_the_constructor_creates_the_documented_state():
    parameters, optimizer = make()
    for number, parameter in enumerate(parameters):
        names = {"momentum_buffer"} if number < len(MATRICES) else {"exp_avg", "exp_avg_sq"}
        assert optimizer.state[parameter].keys() == names | {"step"}
        assert all(optimizer.state[parameter][name].shape == parameter.shape for name in names)


def test_a_vector_and_a_missing_gradient_are_refused():
    with pytest.raises(ValueError, match=r"\(5,\)"):
        Muon([{"params": [nn.Parameter(torch.zeros(5))], "momentum": 0.9}], lr=0.1)
    parameters, optimizer = make()
    set_gradients(parameters, 1, optimizer)
    parameters[2].grad = None
    with pytest.raises(ValueError, match=r"\(24, 24\)"):
        optimizer.step()


def test_shards_of_columns_are_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        columns = distribute_tensor(torch.zeros(4, 4), init_device_mesh("cpu", (1,)), [Shard(1)])
        with pytest.raises(ValueError, match=r"Shard\(dim=1\)"):
            Muon([{"params": [nn.Parameter(columns)], "momentum": 0.9}], lr=0.1)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "ddp", "fsdp2"])
def test_zero_refuses_muon(engine):
    config = Config(optimizer=OptimizerConfig(name="muon"), engine=EngineConfig(name=engine))
    problems = [str(problem) for problem in validate(config, None) if problem.key == "optimizer.name"]
    assert bool(problems) == engine.startswith("zero")
    assert all("fsdp2" in problem for problem in problems)  # the alternative


def test_a_momentum_of_one_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer\.momentum"):
        load(["--optimizer.name", "muon", "--optimizer.momentum", "1.0", "--train.max_steps", "1"])
