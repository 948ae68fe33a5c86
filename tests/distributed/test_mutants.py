"""The invariance check finds the faults that other programs had under sequence, tensor and expert parallelism, and names the
kind. Each mutant is a fault from a public report, planted into the ranks; without it, the same steps pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from pretrain import invariance
from pretrain.config import EngineConfig, OptimizerConfig, ParallelConfig
from pretrain.data.batches import Batch
from pretrain.engines import base, fsdp2, mesh, parallel
from pretrain.engines.start import start_engine
from pretrain.invariance import Case, Outcome
from pretrain.model import transformer
from pretrain.model.config import ModelConfig, MoeConfig
from pretrain.report import metrics
from tests.ranks import run_ranks

CLIP, SEED = 0.5, 3
DENSE = ModelConfig(hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, qk_norm=True, sliding_window=4096)
ROUTED = MoeConfig(num_experts=64, num_shared_experts=1, score="sigmoid", bias_update_rate=0.01, aux_loss_weight=0.1)
MODELS = {
    "dense": invariance.small_model(DENSE),
    "muon": invariance.small_model(DENSE),
    "experts": invariance.small_model(dataclasses.replace(DENSE, tie_word_embeddings=True, moe=ROUTED)),
}


class Mutant(NamedTuple):
    """A fault, and what it makes wrong."""

    plant: Callable[[pytest.MonkeyPatch], None]
    kind: str
    engine: str
    model: str
    shows: set[str]


MUTANTS: dict[str, Mutant] = {}


def mutant(kind: str, engine: str, model: str, *shows: str) -> Callable:
    """Registers a function that plants a fault. Its docstring names the public report."""

    def register(plant: Callable) -> Callable:
        MUTANTS[plant.__name__] = Mutant(plant, kind, engine, model, set(shows))
        return plant

    return register


def wrap(patch: pytest.MonkeyPatch, owner: object, name: str, changed: Callable) -> None:
    """Replaces a function by one that gets the true one as its first argument."""
    true = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: changed(true, *args, **kwargs))


def redefine(patch: pytest.MonkeyPatch, name: str, changed: Callable) -> None:
    """Replaces a property of the mesh by a function of the mesh and the true value."""
    true = getattr(mesh.Mesh, name).fget
    patch.setattr(mesh.Mesh, name, property(lambda self: changed(self, true(self))))


def scale_loss(patch: pytest.MonkeyPatch, kind: str) -> None:
    """Multiplies a rank's loss, and so its gradients, by the degree of a kind."""

    def scaled(forward, engine, *batch):
        out = forward(engine, *batch)
        return out._replace(loss_sum=out.loss_sum * getattr(engine.mesh, kind))

    wrap(patch, base.Engine, "forward", scaled)


# ---------------------------------------------------------------- sequence


@mutant("sequence", "fsdp2", "dense", "loss", "gradient norm")
def loss_and_gradients_times_the_sequence_degree(patch):
    """deepspeedai/DeepSpeed#5248, NVIDIA/Megatron-LM#673."""
    scale_loss(patch, "sequence")


@mutant("sequence", "ddp", "dense", "gradient norm", "weights")
def gradients_divided_by_the_sequence_degree(patch):
    """ByteDance-Seed/VeOmni#1120."""
    redefine(patch, "gradient_ranks", lambda self, true: true // self.sequence)


@mutant("sequence", "ddp", "dense", "loss", "gradient norm", "weights")
def sliding_windows_dropped(patch):
    """huggingface/accelerate#4177."""

    def dropped(context, config, *args):
        return context(dataclasses.replace(config, sliding_window=None), *args)

    wrap(patch, transformer, "attention_context", dropped)


@mutant("sequence", "fsdp2", "dense", "loss", "gradient norm", "weights")
def document_masks_dropped(patch):
    """huggingface/trl#6843."""

    def dropped(context, config, length, device, documents_BT, *args):
        return context(config, length, device, None, *args)

    wrap(patch, transformer, "attention_context", dropped)


@mutant("sequence", "ddp", "dense", "loss", "gradient norm", "weights")
def positions_restart_on_each_rank(patch):
    """vllm-project/speculators#871, NVIDIA/Megatron-LM#1612."""

    def restarted(context, config, length, device, *args):
        first = context(config, length, device)
        return dataclasses.replace(context(config, length, device, *args), cos_TC=first.cos_TC, sin_TC=first.sin_TC)

    wrap(patch, transformer, "attention_context", restarted)


@mutant("sequence", "fsdp2", "dense", "loss", "gradient norm", "tokens", "weights")
def the_last_label_of_a_part_ignored(patch):
    """huggingface/transformers#36607: labels shifted after the sequence was cut."""

    def shifted(part_of, engine, batch):
        tokens_Bt, labels_Bt, documents_BT = part_of(engine, batch).inputs
        labels_Bt = labels_Bt.clone()
        labels_Bt[:, -1] = -100
        return Batch(tokens_Bt, labels_Bt, documents_BT)

    wrap(patch, base.Engine, "part_of", shifted)


@mutant("sequence", "ddp", "dense", "loss", "gradient norm", "weights")
def the_last_label_of_a_part_is_its_own_first_token(patch):
    """As a roll of each part gives: alibaba/ChatLearn#343."""

    def rolled(part_of, engine, batch):
        tokens_Bt, labels_Bt, documents_BT = part_of(engine, batch).inputs
        labels_Bt = labels_Bt.clone()
        labels_Bt[:, -1] = torch.where(labels_Bt[:, -1] == -100, -100, tokens_Bt[:, 0])
        return Batch(tokens_Bt, labels_Bt, documents_BT)

    wrap(patch, base.Engine, "part_of", rolled)


@mutant("sequence", "fsdp2", "experts", "gradient norm", "routing", "weights")
def experts_balanced_within_a_part(patch):
    """NVIDIA/Megatron-LM#5996."""

    def local(cut_model, model, grid):
        cuts = cut_model(model, grid)
        for block in model.model.layers:
            block.mlp.gate.total = lambda counts: counts
        return cuts

    wrap(patch, parallel, "cut_model", local)


# ---------------------------------------------------------------- tensor


@mutant("tensor", "ddp", "dense", "tokens")
def tokens_counted_on_every_tensor_rank(patch):
    """huggingface/trl#7100: so tokens per second, too."""

    def counted(read, meter, all_reduce):
        figures = read(meter, all_reduce)
        figures["interval_tokens"] *= meter.world_size
        return figures

    wrap(patch, metrics.Meter, "read", counted)


@mutant("tensor", "fsdp2", "dense", "loss")
def loss_counted_on_every_tensor_rank(patch):
    """huggingface/transformers#45994, its value alone."""

    def counted(forward, engine, *batch):
        out = forward(engine, *batch)
        return out._replace(loss_sum=out.loss_sum + (engine.mesh.tensor - 1) * out.loss_sum.detach())

    wrap(patch, base.Engine, "forward", counted)


@mutant("tensor", "fsdp2", "dense", "gradient norm", "weights")
def gradients_of_norms_not_summed(patch):
    """NVIDIA/Megatron-LM#1446, EleutherAI/gpt-neox#1257."""

    def matrices_only(all_reduce, gradients, group):
        all_reduce([gradient for gradient in gradients if gradient.dim() > 1], group)

    wrap(patch, parallel, "all_reduce_gradients", matrices_only)


@mutant("tensor", "fsdp2", "dense", "gradient norm", "weights")
def norm_counts_equal_gradients_on_every_tensor_rank(patch):
    """NVIDIA-NeMo/RL#3788."""
    wrap(patch, parallel, "clip_gradients", lambda clip, gradients, most: clip([(each, 1) for each, _ in gradients], most))


@mutant("tensor", "ddp", "dense", "gradient norm", "weights")
def norm_over_one_mesh_only(patch):
    """pytorch/torchtitan#596: without the ranks that have the other parts."""

    def of_this_rank(clip, gradients, most):
        norm = nn.utils.get_total_norm([each for each, _ in gradients])
        for each, _ in gradients:
            each.mul_(torch.clamp(most / norm, max=1.0))
        return norm

    wrap(patch, parallel, "clip_gradients", of_this_rank)


@mutant("tensor", "ddp", "dense", "loss", "gradient norm", "weights")
def padding_rows_of_the_vocabulary_get_probability(patch):
    """unslothai/unsloth#10616."""

    def padded(cut_model, model, grid):
        config = model.config
        model.config = dataclasses.replace(config, vocab_size=len(model.lm_head.weight))
        cuts = cut_model(model, grid)
        model.config = config
        return cuts

    wrap(patch, parallel, "cut_model", padded)


@mutant("tensor", "fsdp2", "muon", "loss", "weights")
def muon_orthogonalizes_each_part_of_a_matrix(patch):
    """deepspeedai/DeepSpeed#8437."""
    patch.setattr(fsdp2.Fsdp2Engine, "_holders", lambda engine, name: None)


# ---------------------------------------------------------------- expert


@mutant("expert", "fsdp2", "experts", "loss", "gradient norm")
def loss_times_the_expert_degree(patch):
    """huggingface/transformers#45994: 47.88 = 4 x 11.97 at random weights under FSDP2 with experts over 4."""
    scale_loss(patch, "expert")


@mutant("expert", "fsdp2", "experts", "loss", "gradient norm", "routing", "weights")
def tokens_sent_to_the_wrong_experts(patch):
    """huggingface/transformers#45473: ranks hold other experts than those whose tokens they receive."""
    redefine(patch, "expert_rank", lambda self, true: (true + 1) % self.expert)


@mutant("expert", "fsdp2", "experts", "gradient norm", "weights")
def expert_gradients_averaged_over_too_few_ranks(patch):
    """NVIDIA/Megatron-LM#5956, deepspeedai/DeepSpeed#6546, pytorch/pytorch#160285."""

    def averaged(sum_gradients, engine):
        sum_gradients(engine)
        for name, parameter in engine.model.named_parameters():
            if ".experts." in name:
                parameter.grad.mul_(engine.mesh.expert)

    wrap(patch, fsdp2.Fsdp2Engine, "_sum_gradients", averaged)


# ---------------------------------------------------------------- the tests


def case_of(kind: str, engine: str, model: str) -> Case:
    config = EngineConfig(name=engine, precision="fp32", parallel=ParallelConfig(**{kind: 2}))
    micro_batch = 2 if kind == "expert" else 4
    muon = OptimizerConfig(name="muon") if model == "muon" else None
    return Case(config, 2, micro_batch, 8, experts=model == "experts", documents=model == "dense", muon=muon)


def train_each(plan: list[tuple[str | None, tuple[str, str, str]]], batch_seeds: dict[str, int]) -> list[tuple]:
    """On each rank: what the steps showed and left, with each mutant; None is the true code."""
    results = []
    for name, (kind, engine, model) in plan:
        with pytest.MonkeyPatch.context() as patch:
            if name:
                MUTANTS[name].plant(patch)
            case = case_of(kind, engine, model)
            AcceleratorState._reset_state(reset_partial_state=True)
            results.append(invariance.train(start_engine(case.engine), case, MODELS[model], CLIP, SEED, batch_seeds[model]))
    return results


def outcomes_of(plan: list[tuple[str | None, tuple[str, str, str]]]) -> list[Outcome]:
    references = {}
    for model in MODELS:
        references[model] = invariance.make_reference(MODELS[model], case_of("sequence", "ddp", model), CLIP, SEED)
    batch_seeds = {model: reference.batch_seed for model, reference in references.items()}
    ranks = zip(*run_ranks(2, train_each, plan, batch_seeds, timeout=300), strict=True)
    return [
        invariance.compare(case_of(*where), list(results), references[where[2]], CLIP)
        for (_, where), results in zip(plan, ranks, strict=True)
    ]


QUICK = (
    "loss_and_gradients_times_the_sequence_degree",
    "sliding_windows_dropped",
    "document_masks_dropped",
    "tokens_counted_on_every_tensor_rank",
    "gradients_of_norms_not_summed",
    "expert_gradients_averaged_over_too_few_ranks",
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("names", [QUICK, pytest.param(sorted(MUTANTS), marks=pytest.mark.slow)], ids=["quick", "all"])
def test_each_reported_fault_is_found_and_its_kind_named(subtests, names):
    where = {name: MUTANTS[name][1:4] for name in names}
    plan = [(None, each) for each in sorted(set(where.values()))] + list(where.items())
    outcomes = outcomes_of(plan)
    true = {place: outcome for (name, place), outcome in zip(plan, outcomes, strict=True) if name is None}
    assert all(outcome.passed for outcome in true.values()), true
    for (name, place), outcome in zip(plan, outcomes, strict=True):
        if name is None:
            continue
        with subtests.test(name):
            found = {figure for figure, (difference, allowed) in outcome.differences.items() if not difference <= allowed}
            print(name, {figure: f"{difference:.1e}" for figure, (difference, _) in outcome.differences.items()})
            assert found >= MUTANTS[name].shows
            if not outcome.wrong_weights:  # else later steps are wrong in everything
                assert found == MUTANTS[name].shows
            [sentence] = invariance.causes([*(each for at, each in true.items() if at != place), outcome])
            assert sentence.startswith(f"{place[0]} 2 is wrong under {place[1]}")
            check_parameters(name, outcome)


def check_parameters(name: str, outcome: Outcome) -> None:
    """Checks that the parameters with wrong gradients are those that the fault concerns."""
    wrong, first = outcome.wrong_gradients, outcome.losses[0]
    if name == "gradients_of_norms_not_summed":
        assert wrong and all("norm" in each for each in wrong)
    elif name == "expert_gradients_averaged_over_too_few_ranks":
        assert len(wrong) == 4 and all(".experts." in each for each in wrong)
    elif name == "loss_times_the_expert_degree":
        assert math.isclose(first, 2 * math.log(invariance.VOCABULARY), rel_tol=0.05)
    elif name in ("tokens_counted_on_every_tensor_rank", "loss_counted_on_every_tensor_rank"):
        assert not wrong and not outcome.wrong_weights
    elif name == "muon_orthogonalizes_each_part_of_a_matrix":
        assert wrong and all("proj" in each for each in wrong)
    elif name == "norm_counts_equal_gradients_on_every_tensor_rank":
        assert not wrong and outcome.wrong_weights
    else:
        assert wrong
