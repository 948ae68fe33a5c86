"""Checks, for a configuration, that no number depends on how a batch is split: five real steps on processes of this machine,
against one process that takes the entire batch with PyTorch's own loss and no code of the step, the engine or the meter.

The engine and its options are those of the configuration: without any kind of parallelism that shares a model or a sequence,
then with each kind that configuration and engine allow, alone and in pairs. The model is shrunk (grouped queries, query norm,
tied embeddings, sliding window, experts and documents stay). Steps are plain momentum steps: AdamW divides a gradient by its
own size, and near zero its rounding errors would hide what the check looks for. With Muon, which joins the parts of a matrix,
some steps are its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain import stages
from pretrain.config import BatchConfig, Config, EngineConfig, OptimizerConfig, ParallelConfig, Problem, validate
from pretrain.data.batches import Batch
from pretrain.engines.base import Engine
from pretrain.engines.config import KINDS
from pretrain.engines.start import start_engine
from pretrain.model.config import ModelConfig, resolve_model, shrink
from pretrain.model.moe import Router
from pretrain.model.transformer import Transformer, build
from pretrain.optim.optimizer import build_optimizer
from pretrain.report.metrics import Meter, routing_figures
from pretrain.run.processes import run_processes
from pretrain.train import train_step

STEPS, LENGTH, VOCABULARY, LR, SOURCES = 5, 32, 100, 1e-2, 3
"""The vocabulary is no multiple of 64, so that a rank may have rows of padding. SOURCES: of the samples, which take turns."""
BOUNDS = {
    "fp32": (1e-6, 1e-6, 1e-6),
    "fp32 Muon": (1e-5, 1e-5, 1e-5),
    "bf16": (2e-3, 1e-2, 1e-3),
    "bf16 with experts": (1e-2, 3e-2, 4e-3),
}
"""Largest differences allowed in loss (relative), norm (relative) and weights (absolute); in bf16 ten times those measured. In
bf16 a token whose experts have nearly equal scores may go to another one, so weights differ by more. Muon enlarges small
directions of a gradient, with their rounding. Routing and the losses of sources, which are means of fewer tokens, have the
bound of the norm, and tokens are counted exactly."""
PATIENCE_SECONDS = 600
"""What a case may take; processes that wait for each other never end."""


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
    documents: bool = False
    """Tokens see only their own document."""
    muon: OptimizerConfig | None = None
    """Steps are those of Muon with these settings; None: momentum steps."""

    @property
    def numerics(self) -> str:
        """How precise the results are: fp32, fp32 Muon or bf16."""
        return f"{self.engine.precision}{' Muon' if self.muon else ''}"

    @property
    def bounds(self) -> tuple[float, float, float]:
        """The differences allowed."""
        return BOUNDS["bf16 with experts" if self.experts and self.numerics == "bf16" else self.numerics]

    @property
    def accumulation(self) -> int:
        """Micro-batches per step and rank."""
        return self.sequences * self.engine.parallel.sequence * self.engine.parallel.tensor // (self.ranks * self.micro_batch)

    @property
    def kinds(self) -> dict[str, int]:
        """The kinds of parallelism in use, with their degrees."""
        return {kind: degree for kind in KINDS if (degree := getattr(self.engine.parallel, kind)) > 1}


class Steps(NamedTuple):
    """What five steps showed and left: of one rank, or of the process that takes the entire batch."""

    figures: list[dict[str, float]]
    """Of each step: loss, norm, tokens, loss/<number> of each source, and, with experts, aux_loss and z_loss."""
    first: dict[str, Tensor]
    """Weights after the first step, by name."""
    last: dict[str, Tensor]
    """Weights, and routers' buffers, after the last one."""


class Reference(NamedTuple):
    """One process on the entire batch."""

    steps: Steps
    initial: dict[str, Tensor]
    batch_seed: int


@dataclass(frozen=True)
class Outcome:
    """The result of a case, and its distance from the reference. Differences that are not a number are infinite."""

    case: Case
    losses: list[float]
    norms: list[float]
    tokens: list[int]
    """Valid tokens of each step, as counted by the ranks."""
    loss_difference: float
    source_difference: float
    """Relative, of the losses of the sources."""
    norm_difference: float
    token_difference: int
    routing_difference: float
    """Relative, of the routers' losses; 0 without experts."""
    weight_difference: float
    wrong_gradients: list[str]
    """Parameters whose gradient in the first step, before clipping, was wrong, in the order of the model; with Muon, whose
    update was."""
    wrong_weights: list[str]
    """Parameters, and routers' buffers, that were wrong after the last step."""
    parameters: int
    bytes_per_rank: dict[str, int]
    """weights; gradients (summed over micro-batches, until the optimizer has taken them); state (master weights that are not
    the weights, and momentum)."""
    error: str = ""
    """Why the ranks did not end, with a traceback."""

    @property
    def differences(self) -> dict[str, tuple[float, float]]:
        """(found, allowed), by name."""
        loss, norm, weights = self.case.bounds
        return {
            "loss": (self.loss_difference, loss),
            "losses of sources": (self.source_difference, norm),
            "gradient norm": (self.norm_difference, norm),
            "tokens": (self.token_difference, 0),
            "routing": (self.routing_difference, norm),
            "weights": (self.weight_difference, weights),
        }

    @property
    def passed(self) -> bool:
        """True if every difference is within its bound; NaN never is."""
        return not self.error and all(found <= allowed for found, allowed in self.differences.values())


# ---------------------------------------------------------------- what is checked


def small_model(model: ModelConfig, most_ranks: int = 2) -> ModelConfig:
    """A model of the same kind that a CPU trains in seconds, resolved. `most_ranks` can share its heads, and its window ends at
    no cut of a sequence."""
    small = shrink(model, LENGTH)
    heads, kv_heads = max(4, 2 * most_ranks), model.num_key_value_heads or model.num_attention_heads
    grouped = kv_heads < model.num_attention_heads
    small = dataclasses.replace(
        small,
        num_attention_heads=heads,
        num_key_value_heads=min(kv_heads, heads // 2) if grouped else heads,
        head_dim=small.hidden_size // 4,
        sliding_window=small.sliding_window and LENGTH // 3,
    )
    return resolve_model(small, vocab_size=VOCABULARY, sequence_length=LENGTH)


def cases(config: Config, most_ranks: int) -> tuple[list[Case], dict[str, Problem]]:
    """The engine of a configuration on 1, 2, 4, ... ranks, then with each kind of parallelism and each pair of them. Also the
    kinds that the configuration rules out on all of these numbers of ranks, such as `tensor 4`, and why."""
    found, refused = [], {}
    small, documents = small_model(config.model, most_ranks), config.data.document_mask
    ranks = max(1, config.engine.replicas)
    while ranks <= most_ranks:
        for parallel in [ParallelConfig(), *_kinds(ranks)]:
            engine = dataclasses.replace(config.engine, parallel=parallel, world_size=None, keep_whole_below=1000)
            case = Case(engine, ranks, 1, 4 * max(2, most_ranks), config.model.moe is not None, documents)
            if not case.kinds or not (problem := _problem(config, small, case)):
                found += _splits(case, config)
            elif len(case.kinds) == 1:
                refused.setdefault(describe(case.kinds), problem)
        ranks *= 2
    covered = {describe(case.kinds) for case in found}
    return found, {kinds: problem for kinds, problem in refused.items() if kinds not in covered}


def _splits(case: Case, config: Config) -> Iterator[Case]:
    """Small and large micro-batches in each precision, and with Muon; of pairs of kinds, one in fp32. Compiling takes most of
    the time, so one split is compiled, if the configuration says so, and only with the kinds that the configuration uses."""
    largest, alone = max(1, case.accumulation // 2), len(case.kinds) < 2
    splits = [("fp32", 1), ("fp32", largest)] if alone else [("fp32", largest)]
    if config.engine.precision != "fp32" and alone:
        splits += [("bf16", largest)] if case.kinds else [("bf16", 1), ("bf16", largest)]
    used = all(getattr(config.engine.parallel, kind) > 1 for kind in case.kinds)
    for precision, size in dict.fromkeys(splits):
        compiled = config.engine.compile if used and (precision, size) == splits[-1] else "none"
        engine = dataclasses.replace(case.engine, precision=precision, compile=compiled)
        yield dataclasses.replace(case, engine=engine, micro_batch=size)
    if config.optimizer.name == "muon" and alone:
        engine = dataclasses.replace(case.engine, precision="fp32", compile="none")
        yield dataclasses.replace(case, engine=engine, micro_batch=largest, muon=config.optimizer)


def _kinds(ranks: int) -> Iterator[ParallelConfig]:
    """Each kind, and each pair of kinds, that divides these ranks. Ranks that share experts may also share other things."""
    degrees = [degree for degree in range(1, ranks + 1) if ranks % degree == 0]
    every = (dict(zip(KINDS, each, strict=True)) for each in itertools.product(degrees, repeat=len(KINDS)))
    used = sorted((each for each in every if each["tensor"] * each["sequence"] <= ranks), key=lambda each: _count(each))
    yield from (ParallelConfig(**each) for each in used if _count(each) in (1, 2))


def _count(degrees: dict[str, int]) -> int:
    return sum(degree > 1 for degree in degrees.values())


def _problem(config: Config, small: ModelConfig, case: Case) -> Problem | None:
    """Why a run of this configuration, or of its shrunk model, cannot use the case's kinds on these ranks."""
    batch = BatchConfig(global_batch_size=case.sequences, micro_batch_size=1)
    mine = dataclasses.replace(stages.largest(config), engine=case.engine, batch=batch)
    data = dataclasses.replace(config.data, sequence_length=LENGTH, block_length=None)
    shrunk = dataclasses.replace(mine, model=small, data=data)
    return next(iter(validate(mine, case.ranks) + validate(shrunk, case.ranks)), None)


def describe(kinds: dict[str, int]) -> str:
    """Such as `tensor 2 x sequence 2`."""
    return " x ".join(f"{kind} {degree}" for kind, degree in kinds.items())


# ---------------------------------------------------------------- running and comparing


def check_invariance(model: ModelConfig, tried: list[Case], grad_clip: float, seed: int) -> Iterator[Outcome]:
    """Runs each case on its own processes, on CPUs: fp32 products are precise enough there, those of GPUs are not.

    model: resolved. seed: of weights and batches.
    """
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    zero = ["deepspeed", "transformers"] if any(case.engine.name.startswith("zero") for case in tried) else []
    multiprocessing.set_forkserver_preload(["torch", "accelerate", "pretrain.train", "torch.distributed.fsdp", *zero])
    references: dict[tuple, Reference] = {}
    for case in tried:
        key = case.sequences, case.documents, case.muon
        if key not in references:
            references[key] = make_reference(model, case, grad_clip, seed)
        reference = references[key]
        try:
            ranks = run_processes(
                case.ranks, _run, case, model, grad_clip, seed, reference.batch_seed, timeout_seconds=PATIENCE_SECONDS
            )
        except (RuntimeError, TimeoutError) as error:  # of a rank: the other cases may tell more
            nothing = math.inf, math.inf, math.inf, 0, math.inf, math.inf, [], [], len(reference.initial), {}
            yield Outcome(case, [], [], [], *nothing, error=str(error))
        else:
            yield compare(case, ranks, reference, grad_clip)


def compare(case: Case, ranks: list[tuple], reference: Reference, grad_clip: float) -> Outcome:
    """ranks: what `train` returned on each of them."""
    figures = [pair for shown, *_ in ranks for pair in zip(shown, reference.steps.figures, strict=True)]
    first, last = (_assemble([piece for rank in ranks for piece in rank[i]]) for i in (1, 2))
    kept = {name: true for name, true in reference.steps.last.items() if not _rounded(name, case)}
    errors = {name: _largest(last[name] - true) for name, true in kept.items()}
    shown = ranks[0][0]
    scale = (
        1.0 if case.muon else _clipped(reference.steps.figures[0]["norm"], grad_clip) / _clipped(shown[0]["norm"], grad_clip)
    )
    moved = {
        name: _largest((first[name] - start) * scale - (reference.steps.first[name] - start))
        for name, start in reference.initial.items()
    }
    routing = [key for key in ("aux_loss", "z_loss") if key in shown[0]]
    sources = [key for key in reference.steps.figures[0] if key.startswith("loss/")]
    return Outcome(
        case,
        *([step[key] for step in shown] for key in ("loss", "norm", "tokens")),
        loss_difference=max(_difference(a["loss"], b["loss"]) for a, b in figures),
        source_difference=max(_difference(a.get(key, math.nan), b[key]) for a, b in figures for key in sources),
        norm_difference=max(_difference(a["norm"], b["norm"]) for a, b in figures),
        token_difference=max(abs(a["tokens"] - b["tokens"]) for a, b in figures),
        routing_difference=max((_difference(a[key], b[key]) for a, b in figures for key in routing), default=0.0),
        weight_difference=max(errors.values()),
        wrong_gradients=_beyond(moved, case.bounds[2]),
        wrong_weights=_beyond(errors, case.bounds[2]),
        parameters=len(reference.initial),
        bytes_per_rank={key: max(rank[3][key] for rank in ranks) for key in ranks[0][3]},
    )


def _rounded(name: str, case: Case) -> bool:
    """Routers' biases and shares count choices: in bf16 some tokens go to another expert, and counts differ by whole tokens."""
    return case.engine.precision == "bf16" and name.endswith((".e_score_correction_bias", ".expert_share"))


def _difference(found: float, true: float) -> float:
    return abs(found / true - 1) if math.isfinite(found) else math.inf


def _largest(difference: Tensor) -> float:
    """The largest absolute value; infinity where one is not a number, which `max` would lose."""
    return float(difference.abs().nan_to_num(nan=math.inf).max())


def _beyond(errors: dict[str, float], bound: float) -> list[str]:
    return [name.removeprefix("model/") for name, error in errors.items() if error > bound]


def _clipped(norm: float, grad_clip: float) -> float:
    """What clipping multiplies a gradient of this norm by."""
    return min(1.0, grad_clip / (norm + 1e-6)) if grad_clip else 1.0


# ---------------------------------------------------------------- naming the cause


def causes(outcomes: list[Outcome]) -> list[str]:
    """A sentence for each cause of the outcomes that did not pass, simple ones first: the engine, a kind, two kinds together. A
    kind that is wrong alone explains each pair with it; a cause that shows in fp32 explains bf16 and Muon."""
    named: dict[tuple[frozenset, str], list[Outcome]] = {}
    wrong = [outcome for outcome in outcomes if not outcome.passed]
    for outcome in sorted(wrong, key=lambda each: (len(each.case.kinds), each.case.numerics != "fp32")):
        cause = frozenset(outcome.case.kinds), outcome.case.numerics
        if not any(kinds <= cause[0] and numerics in ("fp32", cause[1]) for kinds, numerics in named.keys() - {cause}):
            named.setdefault(cause, []).append(outcome)
    return [_sentence(failed, outcomes) for failed in named.values()]


def _sentence(failed: list[Outcome], outcomes: list[Outcome]) -> str:
    """Such as `sequence 2 is wrong under fsdp2 (2 of 2 splits): loss differs by 1.0e+00; ...`."""
    case = failed[0].case
    alike = [each for each in outcomes if (each.case.kinds, each.case.numerics) == (case.kinds, case.numerics)]
    what = (
        f"{describe(case.kinds)} is wrong under {case.engine.name}" if case.kinds else f"{case.engine.name} is wrong by itself"
    )
    what += {"fp32": "", "fp32 Muon": " with Muon", "bf16": " in bf16"}[case.numerics]
    what += f" ({sum(not each.passed for each in alike)} of {len(alike)} splits)"
    if ended := [each for each in failed if each.error]:
        return f"{what}: {ended[0].error.strip().splitlines()[-1]}"
    worst = {name: max(each.differences[name][0] for each in failed) for name in failed[0].differences}
    beyond = [name for name, (_, allowed) in failed[0].differences.items() if not worst[name] <= allowed]
    shown = ", ".join(f"{name} by {worst[name]:{'d' if name == 'tokens' else '.1e'}}" for name in beyond)
    of_step = f"{'updates' if case.muon else 'gradients'} of step 1 are"
    if wrong := next((each.wrong_gradients for each in failed if each.wrong_gradients), None):
        return f"{what}: {shown}; {len(wrong)} of {failed[0].parameters} {of_step} wrong, first {wrong[0]}"
    wrong = next((each.wrong_weights for each in failed if each.wrong_weights), None)
    return f"{what}: {shown}; all {of_step} right" + (f", later weights are not, first {wrong[0]}" if wrong else "")


# ---------------------------------------------------------------- one process


def make_reference(model: ModelConfig, case: Case, grad_clip: float, seed: int) -> Reference:
    """Takes the first batches on which every choice of the routers is clear: rounding may send a token to another expert where
    two have nearly equal scores, which is no error of a split."""
    initial = {f"model/{name}": tensor.detach() for name, tensor in build(model, "cpu", seed).named_parameters()}
    for batch_seed in range(seed, seed + 1_000_000, 50_000):
        steps, clear = _reference(model, case, grad_clip, seed, batch_seed)
        if clear:
            break
    return Reference(steps, initial, batch_seed)


def _reference(config: ModelConfig, case: Case, grad_clip: float, seed: int, batch_seed: int) -> tuple[Steps, bool]:
    """-> what the steps showed and left; whether all choices of the routers were clear.

    With experts, the gradient is that of the model's own loss on the entire batch: PyTorch has no router losses.
    """
    model = build(config, "cpu", seed)
    choices = [_Choices(module) for module in model.modules() if isinstance(module, Router)]
    optimizer, figures, first = _optimizer(model, case), [], {}
    for step in range(STEPS):
        batch = _batch(config, case, batch_seed, step)
        tokens_BT, labels_BT, documents_BT = batch.inputs
        logits_BVT = model(tokens_BT, documents_BT=documents_BT).transpose(1, 2)
        loss = F.cross_entropy(logits_BVT, labels_BT)
        by_source = {
            f"loss/{source}": F.cross_entropy(logits_BVT[chosen], labels_BT[chosen]).item()
            for source in range(SOURCES)
            if (chosen := batch.sources_B == source).any()
        }
        loss_sum, _, routing_LX = model(tokens_BT, labels_BT, documents_BT)
        valid = int((labels_BT != -100).sum())
        objective = loss_sum / valid if config.moe else loss
        optimizer.zero_grad()
        objective.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        optimizer.step()
        if model.needs_router_updates:
            model.update_routers(routing_LX, torch.tensor(True))
        routing = routing_figures(routing_LX, valid) if config.moe else {}
        figures.append({"loss": loss.item(), "norm": norm.item(), "tokens": valid, **by_source, **_router_losses(routing)})
        first = first or {f"model/{name}": tensor.detach().clone() for name, tensor in model.named_parameters()}
    last = {f"model/{name}": tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return Steps(figures, first, last), all(each.clear for each in choices)


class _Choices:
    """Watches a router: whether the last expert that each token chose was clearly better than the next one."""

    MARGIN = 3e-6
    """Of scores, which rounding changes by up to 1e-7 in these steps."""

    def __init__(self, router: Router):
        self.clear = True
        router.register_forward_hook(self._look)

    @torch.no_grad()
    def _look(self, router: Router, args: tuple, result: tuple) -> None:
        logits_NE = F.linear(args[0].flatten(0, 1), router.weight)
        sigmoid = router.config.score == "sigmoid"
        score_NE = logits_NE.sigmoid() + router.e_score_correction_bias if sigmoid else logits_NE.softmax(1)
        sorted_NE = score_NE.sort(1, descending=True).values
        chosen = result[0].shape[1]
        between_N = sorted_NE[:, chosen - 1 : chosen + 1].diff().abs()  # empty if every expert is chosen
        self.clear &= bool((between_N > self.MARGIN).all())


def _router_losses(routing: dict[str, float]) -> dict[str, float]:
    return {key: routing[key] for key in ("aux_loss", "z_loss") if key in routing}


def _batch(model: ModelConfig, case: Case, seed: int, step: int) -> Batch:
    """Sequences with 3 to 90 % valid labels, one of them without any: a mean of means would be far off. Documents are longer
    and shorter than a sliding window."""
    generator = torch.Generator().manual_seed((1000 * seed + step) % 2**63)
    shape = case.sequences, LENGTH
    tokens_BT = torch.randint(0, model.vocab_size, shape, generator=generator)
    labels_BT = torch.randint(0, model.vocab_size, shape, generator=generator)
    shares_B1 = torch.tensor([0.9, 0.1, 0.5, 0.03, 0.7, 0.0, 0.3, 0.2]).repeat(shape[0] // 8 + 1)[: shape[0], None]
    valid_BT = torch.rand(shape, generator=generator) < shares_B1
    borders_B1 = torch.tensor([0.0, 0.3, 0.05, 0.15]).repeat(shape[0] // 4 + 1)[: shape[0], None]
    documents_BT = (torch.rand(shape, generator=generator) < borders_B1).cumsum(1) if case.documents else None
    return Batch(tokens_BT, torch.where(valid_BT, labels_BT, -100), documents_BT, torch.arange(shape[0]) % SOURCES)


class _Momentum(torch.optim.SGD):
    """Momentum steps. All gradients are finite here, so found_inf, which only fused optimizers accept, is set aside."""

    def step(self) -> None:
        found_inf = self.__dict__.pop("found_inf", None)
        super().step()
        self.found_inf = found_inf


def _optimizer(model: nn.Module, case: Case) -> torch.optim.Optimizer:
    """With Muon, AdamW updates the rest. Its eps is about as large as the gradients, so that it does not enlarge rounding."""
    if case.muon:
        return build_optimizer(model, dataclasses.replace(case.muon, lr=LR, eps=1e-3))
    return _Momentum(model.parameters(), lr=LR, momentum=0.9)


# ---------------------------------------------------------------- on a rank


def _run(case: Case, *args) -> tuple:
    engine = start_engine(case.engine)
    engine.compile_backend = "aot_eager"  # the compiler's graphs without its kernels, which are other ones on GPUs: seconds
    results = train(engine, case, *args)
    engine.close()
    return results


def train(engine: Engine, case: Case, model: ModelConfig, grad_clip: float, seed: int, batch_seed: int) -> tuple:
    """On each rank: the figures of each step (`Steps.figures`); this rank's pieces (name, shape, offset, values) of the weights
    after the first step and after the last one; its bytes."""
    engine.prepare(lambda: Transformer(model), lambda module: _optimizer(module, case), grad_clip, seed)
    gradients = _GradientBytes(engine)
    meter, shown, pieces = Meter(engine.device, engine.rank, engine.world_size, sources=list(map(str, range(SOURCES)))), [], []
    share = case.sequences // engine.mesh.sample_ranks
    for step in range(STEPS):
        mine = [
            None if tensor is None else tensor[engine.mesh.sample_rank * share :][:share]
            for tensor in _batch(model, case, batch_seed, step)
        ]
        parts = [[None] * share if tensor is None else tensor.split(case.micro_batch) for tensor in mine]
        window = [engine.to_device(engine.part_of(Batch(*tensors))) for tensors in zip(*parts, strict=False)]
        meter.add(*train_step(engine, window, LR))
        figures = meter.read(engine.all_reduce)
        named = {"loss": "loss", "norm": "grad_norm", "tokens": "interval_tokens"}
        named = {name: figures[key] for name, key in named.items()}
        shown.append(named | figures["sources"] | _router_losses(figures["routing"]))
        if step in (0, STEPS - 1):
            pieces.append(_pieces(engine))
    sizes = _sizes(engine) | {"gradients": sum(gradients.of_steps) // STEPS}
    return shown, *pieces, sizes


def _pieces(engine: Engine) -> list[tuple]:
    shards = [shard for shard in engine.shards(saving=True) if shard.name.startswith("model/")]
    return [(shard.name, shard.shape, shard.offset, shard.values.numpy(force=True).copy()) for shard in shards]


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
