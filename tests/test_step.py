"""The shown loss is the loss being minimized, and that of a source the mean over its labels, however a batch is split over
ranks and micro-batches."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from pretrain import train
from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.data.batches import Batch
from pretrain.engines.base import Engine
from pretrain.engines.start import start_engine
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.model.transformer import Transformer, build
from pretrain.optim.optimizer import build_optimizer
from pretrain.report import metrics
from tests.ranks import run_ranks

SEQUENCES, LENGTH, VOCAB, STEPS, LR, CLIP = 8, 24, 97, 5, 1e-3, 0.5
MODEL = resolve_model(
    ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, qk_norm=True),
    vocab_size=VOCAB,
    sequence_length=LENGTH,
)
SPLITS = [(1, 8, 1), (1, 2, 4), (1, 1, 8), (2, 2, 2), (2, 1, 4), (4, 1, 2)]

SCALE = "engine.mesh.gradient_ranks / tokens.clamp(min=1)"
OWN_MEAN = "1 / (batch.labels_BT != -100).sum().clamp(min=1)"
SUMS = "torch.cat([self.loss_sum[None], memory, self._attended(), sources, routing])"
SOURCES = ("books", "code")
# name: (function, its code, the code with the bug)
MUTANTS = {
    "divided by accumulation twice": (train.train_step, SCALE, f"{SCALE} / len(window)"),
    "not divided by accumulation": (train.train_step, SCALE, OWN_MEAN),
    "last micro-batch only": (train.train_step, "loss_sum += nats.detach()", "loss_sum = nats.detach().double()"),
    "rank 0 only": (metrics.Meter.read, f"all_reduce({SUMS})", SUMS),
    "mean of means": (train.train_step, SCALE, f"{OWN_MEAN} / len(window)"),
    "sources of rank 0 only": (metrics.Meter.read, SUMS, SUMS.replace("sources", "sources * (self.rank == 0)")),
    "sources of another micro-batch": (train._sample_losses, "zip(window, losses", "zip(window[::-1], losses"),
    "counts of another micro-batch": (train._sample_losses, "count_labels(batch)", "count_labels(window[0])"),
    "a source's masked labels": (train._sample_losses, "engine.count_labels(batch)", "(batch.labels_BT >= -100).sum(1)"),
}


def global_batch(step: int) -> Batch:
    """Sequences with 3 to 90 % valid labels; one has none at all."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens_BT = torch.randint(0, VOCAB, (SEQUENCES, LENGTH), generator=generator)
    labels_BT = torch.randint(0, VOCAB, (SEQUENCES, LENGTH), generator=generator)
    share_B1 = torch.tensor([0.9, 0.1, 0.5, 0.03, 0.7, 0.0, 0.3, 0.2]).roll(step)[:, None]
    valid_BT = torch.rand(SEQUENCES, LENGTH, generator=generator) < share_B1
    sources_B = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1])
    return Batch(tokens_BT, torch.where(valid_BT, labels_BT, -100), None, sources_B)


def plain_run(optimizer_name: str):
    """The reference: one process, the full batch, PyTorch's own loss, no code of the step, the engine or the meter."""
    model = build(MODEL, "cpu", seed=0)
    optimizer = make_optimizer(model, optimizer_name)
    shown = []
    for step in range(STEPS):
        batch = global_batch(step)
        logits_BTV = model(batch.tokens_BT)
        of_sources = [loss_of(logits_BTV, batch.labels_BT, batch.sources_B == number).item() for number in range(len(SOURCES))]
        loss = loss_of(logits_BTV, batch.labels_BT)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        shown.append(([loss.item(), *of_sources], norm.item()))
    return shown, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def loss_of(logits_BTV: torch.Tensor, labels_BT: torch.Tensor, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
    """PyTorch's mean over the labels of these rows that are not -100."""
    return F.cross_entropy(logits_BTV[rows].flatten(0, 1), labels_BT[rows].flatten())


def make_optimizer(model, name: str):
    """SGD with momentum, or AdamW with an `eps` of the size of the gradients; `averaged`: and with both averages.

    AdamW divides a gradient by its own size. With the usual eps of 1e-8, a gradient that should be zero but is 1e-7 of rounding
    moves its weight by a full learning rate, so two correct programs differ by 1e-6 to 1e-5 depending on the CPU (8e-7 without
    vector instructions, 5e-6 with AVX2, 1.3e-5 with AVX-512). With eps = 1e-3 a step passes on at most lr / eps = 1 times the
    error of its gradient: 1.2e-7 on each of these, with any number of threads.
    """
    if name == "sgd":
        return Momentum(model.parameters(), lr=optimizer_lr(name), momentum=0.9)
    averages = {"lookahead": 0.6, "lookahead_decay": 0.8, "average_decay": 0.3} if name == "averaged" else {}
    return build_optimizer(model, OptimizerConfig(lr=optimizer_lr(name), eps=1e-3, **averages))


class Momentum(torch.optim.SGD):
    """Gradients must be finite: unlike the fused optimizers, this one ignores `found_inf`."""

    def step(self):
        found_inf = self.__dict__.pop("found_inf", None)
        super().step()
        self.found_inf = found_inf


def optimizer_lr(name: str) -> float:
    return 10 * LR if name == "sgd" else LR


def mutate(mutant: str | None):
    """(train_step, Meter.read) with this bug planted into their source; None: unchanged."""
    if mutant is None:
        return train.train_step, metrics.Meter.read
    changed, old, new = MUTANTS[mutant]
    space = vars(train) | vars(metrics)
    for function in (train._sample_losses, train.train_step, metrics.Meter.read):
        source = inspect.cleandoc("\n" + inspect.getsource(function))
        if function is changed:
            assert old in source, f"the mutant '{mutant}' no longer fits the code"
            source = source.replace(old, new)
        exec(source, space)
    return space["train_step"], space["read"]


def make_engine(config: EngineConfig, optimizer_name: str, grad_clip: float = CLIP) -> Engine:
    engine = start_engine(config)
    prepare(engine, optimizer_name, grad_clip)
    return engine


def prepare(engine: Engine, optimizer_name: str, grad_clip: float = CLIP) -> None:
    engine.prepare(lambda: Transformer(MODEL), lambda model: make_optimizer(model, optimizer_name), grad_clip, seed=0)


def window_of(engine: Engine, step: int, micro_batch: int) -> list[Batch]:
    """This rank's micro-batches of the global batch."""
    per_rank = SEQUENCES // engine.world_size
    tokens_BT, labels_BT, _, sources_B = global_batch(step)
    mine = [tensor[engine.rank * per_rank :][:per_rank].split(micro_batch) for tensor in (tokens_BT, labels_BT, sources_B)]
    return [Batch(tokens, labels, None, sources) for tokens, labels, sources in zip(*mine, strict=True)]


def run_split(config: EngineConfig, micro_batch: int, optimizer_name: str, mutants: list[str | None]):
    """On each rank: `run_steps` under an engine of its own."""
    engine = start_engine(config)
    results = run_steps(engine, micro_batch, optimizer_name, mutants)
    engine.close()
    return results


def run_steps(engine: Engine, micro_batch: int, optimizer_name: str, mutants: list[str | None]):
    """For every mutant (None: the true code): the figures shown in each step, and this rank's pieces of the final weights."""
    results = {}
    for mutant in mutants:
        step_function, read = mutate(mutant)
        prepare(engine, optimizer_name)
        meter, shown = metrics.Meter(engine.device, engine.rank, engine.world_size, sources=SOURCES), []
        for step in range(STEPS):
            meter.add(*step_function(engine, window_of(engine, step, micro_batch), optimizer_lr(optimizer_name)))
            figures = read(meter, engine.all_reduce)
            losses = [figures["loss"], *(figures["sources"].get(f"loss/{name}", math.inf) for name in SOURCES)]
            shown.append((losses, figures["grad_norm"]))
        results[mutant] = shown, pieces_of(engine, "model/")
    return results


def pieces_of(engine: Engine, prefix: str = "") -> list[tuple]:
    """(name, shape, offset, values) of each shard that this rank would save."""
    shards = [shard for shard in engine.shards(saving=True) if shard.name.startswith(prefix)]
    return [(shard.name, shard.shape, shard.offset, shard.values.numpy(force=True).copy()) for shard in shards]


def assemble(pieces: list[tuple]) -> dict[str, torch.Tensor]:
    """Full tensors from the pieces of all ranks, which must cover each tensor exactly once."""
    full, seen = {}, {}
    for name, shape, offset, values in pieces:
        flat = full.setdefault(name, torch.full((math.prod(shape),), math.nan))
        flat[offset : offset + len(values)] = torch.as_tensor(values)
        seen[name] = seen.get(name, 0) + len(values)
    assert all(seen[name] == flat.numel() and not flat.isnan().any() for name, flat in full.items())
    shapes = {name: shape for name, shape, *_ in pieces}
    return {name: flat.view(shapes[name]) for name, flat in full.items()}


def differences(results: list[dict], expected, mutant: str | None = None) -> tuple[float, float, float]:
    """Largest relative difference in losses and norm on any rank, largest absolute one in weights."""
    true_shown, true_weights = expected
    weights = assemble([piece for rank in results for piece in rank[mutant][1]])
    steps = [pair for rank in results for pair in zip(rank[mutant][0], true_shown, strict=True)]
    loss = max(abs(a / b - 1) for (mine, _), (true, _) in steps for a, b in zip(mine, true, strict=True))
    norm = max(abs(mine / true - 1) for (_, mine), (_, true) in steps)
    return loss, norm, max((weights[f"model/{name}"] - true).abs().max().item() for name, true in true_weights.items())


@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw"])
@pytest.mark.parametrize(("ranks", "micro_batch", "accumulation"), SPLITS)
def test_loss_norm_and_weights_equal_one_process_on_the_full_batch(ranks, micro_batch, accumulation, optimizer_name):
    assert ranks * micro_batch * accumulation == SEQUENCES
    expected = plain_run(optimizer_name)
    results = run_ranks(ranks, run_split, EngineConfig(), micro_batch, optimizer_name, [None])
    loss, norm, weight = differences(results, expected)
    print(f"{ranks} x {micro_batch} x {accumulation} {optimizer_name}: loss {loss:.1e}, norm {norm:.1e}, weights {weight:.1e}")
    assert loss < 1e-6 and norm < 1e-6 and weight < 1e-6


@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw"])
def test_each_planted_bug_is_found(optimizer_name):
    expected = plain_run(optimizer_name)
    results = run_ranks(2, run_split, EngineConfig(), 2, optimizer_name, [None, *MUTANTS])
    assert max(differences(results, expected)) < 1e-6
    for mutant in MUTANTS:
        loss, norm, weight = differences(results, expected, mutant)
        print(f"{mutant}, {optimizer_name}: loss {loss:.1e}, norm {norm:.1e}, weights {weight:.1e}")
        assert max(loss, norm, weight) > 1e-2, mutant


def test_the_step_draws_no_random_numbers():
    """So a checkpoint needs no random state, and resuming on other ranks cannot lose any."""
    engine = make_engine(EngineConfig(), "adamw")
    before = torch.get_rng_state()
    train.train_step(engine, [global_batch(0)], LR)
    assert torch.equal(before, torch.get_rng_state())


def poisoned_step(config: EngineConfig, poison: str):
    """Takes three steps; in the second, the last rank's loss or gradient is not finite. Returns state and figures of each."""
    engine = make_engine(config, "adamw")
    forward, trace = engine.forward, []
    meter = metrics.Meter(engine.device, engine.rank, engine.world_size)
    for step in range(3):
        bad = step == 1 and engine.rank == engine.world_size - 1
        factor = {"nan": math.nan, "inf": math.inf}.get(poison, 1.0) if bad else 1.0
        added = math.inf if poison == "loss only" and bad else 0.0
        engine.forward = lambda *batch, a=added, f=factor: (out := forward(*batch))._replace(loss_sum=out.loss_sum * f + a)
        result = train.train_step(engine, [global_batch(step)], LR)
        meter.add(result.loss_sum, result.tokens, result.grad_norm, result.applied)
        figures = meter.read(engine.all_reduce)
        state = torch.cat([shard.values.flatten() for shard in engine.shards(saving=False)])
        trace.append(
            (state.clone().numpy(), engine.updates, figures["skipped_steps"], figures["skipped_in_a_row"], figures["loss"])
        )
    engine.close()
    return trace


@pytest.mark.parametrize("poison", ["nan", "inf", "loss only"])
def test_a_non_finite_loss_on_one_rank_leaves_all_ranks_untouched_and_is_counted(poison):
    for trace in run_ranks(2, poisoned_step, EngineConfig(), poison):
        (first, *_), (second, updates, skipped, in_a_row, loss), (third, later, _, ended, _) = trace
        assert (first == second).all() and (updates, skipped, in_a_row) == (1, 1, 1) and math.isnan(loss)
        assert not (second == third).all() and (later, ended) == (2, 0) and bool(abs(third).max() < 1e3)
