"""Every engine computes what one process computes, skips steps that are not finite, and reads what any other engine wrote.

Each test starts the ranks once for all engines: a start costs more than the few tiny steps that each claim needs.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain import train
from pretrain.checkpoint import storage
from pretrain.config import EngineConfig
from pretrain.data.batches import Batch
from pretrain.engines.base import Engine
from pretrain.engines.start import start_engine
from pretrain.invariance import BOUNDS
from pretrain.model.transformer import LossOutput, Transformer, build
from pretrain.report import metrics
from tests.ranks import run_ranks
from tests.saving import save
from tests.test_step import (
    CLIP,
    LR,
    MODEL,
    MUTANTS,
    assemble,
    differences,
    global_batch,
    make_optimizer,
    pieces_of,
    plain_run,
    prepare,
    run_steps,
    window_of,
)

pytestmark = pytest.mark.timeout(900)

ENGINES = {
    "ddp": EngineConfig(name="ddp"),
    "zero1": EngineConfig(name="zero1"),
    "zero2": EngineConfig(name="zero2"),
    "zero3": EngineConfig(name="zero3", keep_whole_below=100),  # matrices are sharded, norms are not
    "fsdp2": EngineConfig(name="fsdp2"),
}
VARIANTS = {
    "zero3 sharded everywhere": EngineConfig(name="zero3", keep_whole_below=0),
    "zero3 offload": EngineConfig(name="zero3", keep_whole_below=0, offload="all"),
    "zero2 offload": EngineConfig(name="zero2", offload="optimizer"),
    "fsdp2 step": EngineConfig(name="fsdp2", reduce_gradients="step"),
    "zero2 step": EngineConfig(name="zero2", reduce_gradients="step"),
    "zero3 step": EngineConfig(name="zero3", reduce_gradients="step", keep_whole_below=0),
    **{
        f"{name} {how}": dataclasses.replace(config, activation_checkpointing=how)
        for name, config in ENGINES.items()
        for how in ("full", "selective")
    },
}


def run_engines(ranks: int, function: Callable, configs: dict[str, EngineConfig], *args) -> list[dict]:
    """`function(configs, *args)` on each rank, with one start for all engines; on one rank, which has no process group that
    they could share, with one start each."""
    if ranks > 1:
        return run_ranks(ranks, function, configs, *args, timeout=600)
    starts = [run_ranks(1, function, {name: config}, *args)[0] for name, config in configs.items()]
    return [{key: value for start in starts for key, value in start.items()}]


def engine_of(config: EngineConfig) -> Engine:
    """Starts another engine on the existing process group."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return start_engine(config)


def train_with(configs: dict[str, EngineConfig], micro_batch: int, optimizer_name: str, mutants: list[str]) -> dict:
    """On each rank, for each engine: initial weights, and the result of `run_steps` for the true code and for each mutant."""
    results = {}
    for name, config in configs.items():
        engine = engine_of(config)
        prepare(engine, optimizer_name)
        initial = pieces_of(engine, "model/")
        results[name] = initial, run_steps(engine, micro_batch, optimizer_name, [None, *mutants])
    return results


def check_equality(subtests, ranks: int, configs: dict, micro_batch: int, optimizer_name: str, mutants: list[str]) -> None:
    results = run_engines(ranks, train_with, configs, micro_batch, optimizer_name, mutants)
    expected = plain_run(optimizer_name)
    true_initial = dict(build(MODEL, "cpu", seed=0).named_parameters())
    for name in configs:
        runs = [rank[name][1] for rank in results]
        with subtests.test(name):
            initial = assemble([piece for rank in results for piece in rank[name][0]])
            assert all(torch.equal(initial[f"model/{key}"], weight) for key, weight in true_initial.items())
            loss, norm, weight = differences(runs, expected)
            print(f"{name} on {ranks}, {optimizer_name}: loss {loss:.1e}, norm {norm:.1e}, weights {weight:.1e}")
            # AdamW divides a gradient by its own size: where that is near zero, rounding errors move a weight by up to LR.
            assert loss < 1e-6 and norm < 1e-6 and weight < (1e-6 if optimizer_name == "sgd" else 0.1 * LR)
            for mutant in mutants:
                assert max(differences(runs, expected, mutant)) > 1e-2, mutant


def test_every_engine_equals_one_process_and_the_comparison_finds_every_planted_bug(subtests):
    check_equality(subtests, 2, ENGINES, 2, "sgd", list(MUTANTS))


@pytest.mark.slow
def test_options_change_no_number(subtests):
    check_equality(subtests, 2, VARIANTS, 2, "sgd", [])


@pytest.mark.slow
def test_bf16_stays_close_to_one_process_in_fp32(subtests):
    configs = {name: dataclasses.replace(config, precision="bf16") for name, config in ENGINES.items()}
    results, expected = run_ranks(2, train_with, configs, 2, "sgd", [], timeout=600), plain_run("sgd")
    for name in configs:
        with subtests.test(name):
            found = differences([rank[name][1] for rank in results], expected)
            print(f"{name}: loss {found[0]:.1e}, norm {found[1]:.1e}, weights {found[2]:.1e}")
            assert all(difference < bound for difference, bound in zip(found, BOUNDS["bf16"], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 2), (2, 1), (4, 1)])
def test_every_engine_equals_one_process_on_any_ranks(subtests, ranks, micro_batch):
    hybrid = {"fsdp2 hybrid": EngineConfig(name="fsdp2", replicas=2)} if ranks == 4 else {}
    for optimizer_name in ("sgd", "adamw"):
        check_equality(subtests, ranks, ENGINES | hybrid, micro_batch, optimizer_name, [])


def loads_the_compiler(config: EngineConfig) -> bool:
    prepare(engine_of(config), "adamw")
    return "torch._inductor.compile_fx" in sys.modules


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_an_engine_that_compiles_nothing_does_not_load_the_compiler(name):
    """DeepSpeed imports functions that `torch.compile` wraps."""
    assert run_ranks(1, loads_the_compiler, EngineConfig(name=name)) == [False]


# ---------------------------------------------------------------- steps that are not finite


def scaled(out: LossOutput, factor: float) -> LossOutput:
    return out._replace(loss_sum=out.loss_sum * factor)


def poisoned(configs: dict[str, EngineConfig]) -> dict:
    """Takes three steps; in the second, the last rank's gradient is not finite. Returns state and metrics after each."""
    results = {}
    for name, config in configs.items():
        engine = engine_of(config)
        prepare(engine, "averaged")
        meter, forward, trace = metrics.Meter(engine.device, engine.rank, engine.world_size), engine.forward, []
        for step in range(3):
            factor = math.nan if step == 1 and engine.rank == engine.world_size - 1 else 1.0
            engine.forward = lambda *batch, forward=forward, factor=factor: scaled(forward(*batch), factor)
            result = train.train_step(engine, [global_batch(step)], LR)
            meter.add(result.loss_sum, result.tokens, result.grad_norm, result.applied)
            figures = meter.read(engine.all_reduce)
            used = torch.cat([p.detach().float().flatten() for p in local_parameters(engine)])
            state = torch.cat([shard.values.flatten() for shard in engine.shards(saving=False)])
            trace.append((state.numpy().copy(), used.numpy(), engine.updates, figures))
        results[name] = trace
        require_exchange(engine)
    return results


def require_exchange(engine: Engine) -> None:
    """In the context of `averaged_weights`, weights and averages have changed places, to the bit, and forward passes read the
    averages; afterwards everything is as before."""

    def state() -> dict[str, torch.Tensor]:
        return {f"{shard.name} {shard.offset}": shard.values.clone() for shard in engine.shards(saving=False)}

    def used() -> torch.Tensor:
        return torch.cat([p.detach().float().flatten() for p in local_parameters(engine)])

    before, used_before = state(), used()
    with engine.averaged_weights() as averaged:
        inside, used_inside = state(), used()
    after = state()
    assert averaged and before.keys() == inside.keys() == after.keys()
    places = {"model": "average", "average": "model"}
    for key, values in before.items():
        kind, _, name = key.partition("/")
        is_buffer = f"average/{name}" not in before
        assert torch.equal(values, inside[key if is_buffer else f"{places.get(kind, kind)}/{name}"]), key
        assert torch.equal(values, after[key]), key
    assert (used_before != used_inside).any() and torch.equal(used_before, used())


def local_parameters(engine: Engine) -> list[torch.Tensor]:
    """The weights that this rank's forward pass reads, in their dtype."""
    local = [getattr(p, "ds_tensor", p) for p in engine.model.parameters()]
    return [p.to_local() if hasattr(p, "to_local") else p for p in local]


def test_a_step_that_is_not_finite_leaves_weights_and_moments_of_all_ranks_untouched(subtests):
    configs = ENGINES | {f"{name} bf16": dataclasses.replace(config, precision="bf16") for name, config in ENGINES.items()}
    for results in run_ranks(2, poisoned, configs, timeout=300):
        for name, trace in results.items():
            with subtests.test(name):
                (state, used, updates, _), (state_2, used_2, updates_2, figures), (state_3, used_3, updates_3, after) = trace
                assert (state == state_2).all() and (used == used_2).all() and updates == updates_2 == 1
                assert (figures["skipped_steps"], figures["skipped_in_a_row"]) == (1, 1) and math.isnan(figures["loss"])
                assert not math.isfinite(figures["grad_norm"])
                assert (state != state_3).any() and (used != used_3).any() and updates_3 == 2
                assert after["skipped_in_a_row"] == 0 and math.isfinite(after["loss"]) and math.isfinite(after["grad_norm"])


# ---------------------------------------------------------------- checkpoints


def two_steps(engine: Engine, first: int) -> list[tuple[float, float]]:
    """Takes two steps of AdamW. Returns [(loss, norm)]."""
    meter, shown = metrics.Meter(engine.device, engine.rank, engine.world_size), []
    for step in range(first, first + 2):
        result = train.train_step(engine, window_of(engine, step, 1), 10 * LR)
        meter.add(result.loss_sum, result.tokens, result.grad_norm, result.applied)
        figures = meter.read(engine.all_reduce)
        shown.append((figures["loss"], figures["grad_norm"]))
    return shown


def save_with(configs: dict[str, EngineConfig], folder: Path) -> dict:
    """Each engine takes two steps, saves, and continues. Returns its state when it saved, and the steps after."""
    results = {}
    for name, config in configs.items():
        engine = engine_of(config)
        prepare(engine, "averaged")
        two_steps(engine, 0)
        save(folder / name, 2, engine, {})
        results[name] = pieces_of(engine), two_steps(engine, 2)
    return results


def load_with(configs: dict[str, EngineConfig], folder: Path, saved: dict[str, list[str]]) -> dict:
    """Each engine loads what the engines in `saved[name]` saved, and continues."""
    results = {}
    for name, config in configs.items():
        engine = engine_of(config)
        engine.prepare(make_model, lambda model: make_optimizer(model, "averaged"), CLIP, seed=1)  # other weights
        for other in saved[name]:
            [found] = storage.checkpoints(folder / other)
            storage.load(found, engine)
            results[name, other] = pieces_of(engine), engine.updates, two_steps(engine, 2)
    return results


def make_model() -> Transformer:
    return Transformer(MODEL)


def check_checkpoints(
    subtests,
    folder: Path,
    writers: tuple[int, dict],
    readers: list[tuple[int, dict]],
    tolerance: float,
    pairs: dict[str, list[str]] | None = None,
) -> None:
    """Checks that state is restored to the bit and that the run continues equally.

    writers, readers: (ranks, engines by name). pairs: which writers each reader loads; None: all."""
    (wrote, configs) = writers
    written = run_engines(wrote, save_with, configs, folder)
    for ranks, reading in readers:
        read = run_engines(ranks, load_with, reading, folder, pairs or {name: list(configs) for name in reading})
        for name, other in read[0]:
            with subtests.test(f"{other} on {wrote} -> {name} on {ranks}"):
                truth = assemble([piece for rank in written for piece in rank[other][0]])
                found = assemble([piece for rank in read for piece in rank[name, other][0]])
                assert truth.keys() == found.keys() and len(truth) == 5 * len(list(make_model().parameters()))
                assert all(torch.equal(found[key], truth[key]) for key in truth)
                _, updates, shown = read[0][name, other]
                assert updates == 2
                for after, expected in zip(shown, written[0][other][1], strict=True):
                    assert after == pytest.approx(expected, rel=tolerance)
                if name == other and ranks == wrote:
                    assert shown == written[0][other][1]  # to the bit


def test_every_engine_resumes_what_it_and_another_engine_saved(subtests, tmp_path):
    """In a ring; all pairs are in the slow test below. And ddp resumes the state of a sharded engine on fewer ranks."""
    names = list(ENGINES)
    pairs = {name: [name, names[number - 1]] for number, name in enumerate(names)}
    one = {"ddp": ENGINES["ddp"]}
    check_checkpoints(subtests, tmp_path, (2, ENGINES), [(2, ENGINES), (1, one)], tolerance=2e-6, pairs=pairs)


@pytest.mark.slow
def test_every_engine_resumes_what_any_engine_saved_on_any_ranks(subtests, tmp_path):
    hybrid = ENGINES | {"fsdp2 hybrid": EngineConfig(name="fsdp2", replicas=2)}
    check_checkpoints(subtests, tmp_path, (4, hybrid), [(4, hybrid), (2, ENGINES), (1, ENGINES)], tolerance=2e-6)


@pytest.mark.slow
def test_bf16_checkpoints_hold_the_fp32_master_weights(subtests, tmp_path):
    configs = {name: dataclasses.replace(config, precision="bf16") for name, config in ENGINES.items()}
    check_checkpoints(subtests, tmp_path, (2, configs), [(2, configs), (4, configs)], tolerance=2e-2)


# ---------------------------------------------------------------- precision


class Wire(TorchDispatchMode):
    """Records the dtypes that collectives send."""

    def __init__(self):
        super().__init__()
        self.seen: dict[str, set[str]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name.startswith("c10d::"):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.seen.setdefault(name, set()).update(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
        return function(*args, **(kwargs or {}))

    def floats(self, *names: str) -> str:
        dtypes = {"float32", "bfloat16", "float16"}
        if "allgather_" in names:
            dtypes.add("uint8")  # the bytes of fp8; in sums, DeepSpeed's flag of an overflow
        found = set().union(*(self.seen.get(f"c10d::{name}", set()) for name in names)) & dtypes
        return ", ".join(sorted(found)) or "none"


def gradient(engine: Engine, batches: list[Batch]) -> list[torch.Tensor]:
    """This rank's shards of the summed gradient: the first moment of AdamW, when 0, becomes a tenth of it; the rate is 0."""
    engine.restore(lambda shard: shard.values.zero_() if shard.name.startswith("exp_avg/") else None)
    for i, batch in enumerate(batches):
        with engine.micro_batch(last=i == len(batches) - 1):
            engine.backward(engine.forward(*batch.inputs).loss_sum / 100)
    engine.update(0.0)
    return [10 * shard.values.double() for shard in engine.shards(saving=False) if shard.name.startswith("exp_avg/")]


def look_at_dtypes(configs: dict[str, EngineConfig]) -> dict:
    """For each engine: its row of the table, and the relative error of a sum of gradients over micro-batches."""
    results = {}
    for name, config in configs.items():
        engine = engine_of(config)
        engine.prepare(make_model, lambda model: make_optimizer(model, "adamw"), 0.0, seed=0)
        used, wire = {}, Wire()
        projection = engine.model.model.layers[0].self_attn.q_proj
        hooks = [
            projection.register_forward_pre_hook(lambda module, _, used=used: used.update(weights=module.weight.dtype)),
            projection.register_forward_hook(lambda module, _, out, used=used: used.update(products=out.dtype)),
        ]
        with wire:
            train.train_step(engine, window_of(engine, 0, 1), LR)
        for hook in hooks:
            hook.remove()
        kept = {kind: tensor.dtype for state in engine.local_states(saving=False) for kind, tensor in state.tensors.items()}
        assert kept["exp_avg"] == kept["exp_avg_sq"]
        row = [str(dtype).removeprefix("torch.") for dtype in (kept["model"], used["weights"], used["products"])]
        row += [wire.floats("_allgather_base_", "allgather_"), wire.floats("allreduce_", "reduce_", "_reduce_scatter_base_")]
        window = window_of(engine, 1, 1)
        total_gradient, parts = gradient(engine, window), [gradient(engine, [batch]) for batch in window]
        error = sum((total - sum(pieces)).square().sum() for total, *pieces in zip(total_gradient, *parts, strict=True))
        relative = (error / sum(total.square().sum() for total in total_gradient)).sqrt().item()
        results[name] = [*row, str(kept["exp_avg"]).removeprefix("torch.")], relative
    return results


def check_dtypes(subtests, found: dict, precision: str) -> None:
    """Compares results of `look_at_dtypes` with the table of that precision in docs/engines.md."""
    text = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()
    lines = text.split(f"<!-- dtypes under {precision} -->\n")[1].split("<!-- end -->")[0].splitlines()[2:]
    table = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}
    assert table.keys() == found.keys()
    for name, (row, error) in found.items():
        with subtests.test(name):
            print(f"{name}: {row}, error of the sum {error:.1e}")
            assert row == table[name]
            assert error < 1e-6  # a sum in bf16: 5e-3


def test_the_documented_dtypes_are_used_and_gradients_are_summed_in_fp32(subtests):
    configs = {name: dataclasses.replace(config, precision="bf16") for name, config in ENGINES.items()}
    found = run_ranks(2, look_at_dtypes, configs, timeout=300)[0]
    check_dtypes(subtests, found, "bf16")
