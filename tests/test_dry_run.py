"""tools/check_run.py --device: what a dry run counts is what real tensors and ranks do, and faults of a step are found."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from pretrain import devices, dry_run
from pretrain.config import (
    BatchConfig,
    Config,
    DataConfig,
    EngineConfig,
    OptimizerConfig,
    ParallelConfig,
    SyntheticConfig,
    TrainConfig,
    accumulation,
    load,
)
from pretrain.engines.config import sample_ranks
from pretrain.engines.start import start_engine
from pretrain.model import transformer
from pretrain.model.config import ModelConfig, MoeConfig, resolve_model
from pretrain.model.flops import flops_per_token, num_parameters, vocabulary_rows
from pretrain.model.moe import Router
from pretrain.plan.memory import memory
from pretrain.plan.messages import collectives
from pretrain.plan.scaling import Cluster
from pretrain.plan.tracker import Tracker
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]
H100 = devices.find("h100")
SIZES = ModelConfig(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=160, head_dim=16
)
MOE = dataclasses.replace(SIZES, moe=MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32))
LENGTH, IDS = 48, 300


ADAMW, MUON = OptimizerConfig(), OptimizerConfig(name="muon")


def settings(
    ranks: int,
    model: ModelConfig = SIZES,
    micro_batch: int = 2,
    optimizer: OptimizerConfig = ADAMW,
    kinds: dict | None = None,
    **engine,
) -> Config:
    """Two micro-batches per step, in fp32 unless told otherwise. kinds: values of `engine.parallel`."""
    engine = {"precision": "fp32", "compile": "none", "parallel": ParallelConfig(**(kinds or {})), **engine}
    sample_ranks = ranks // (engine["parallel"].sequence * engine["parallel"].tensor)
    return Config(
        model=model,
        data=DataConfig(sequence_length=LENGTH, synthetic=SyntheticConfig()),
        train=TrainConfig(max_steps=10),
        batch=BatchConfig(global_batch_size=2 * micro_batch * sample_ranks, micro_batch_size=micro_batch),
        optimizer=optimizer,
        engine=EngineConfig(**engine),
    )


def resolved(config: Config) -> ModelConfig:
    return resolve_model(config.model, vocab_size=IDS, sequence_length=config.data.sequence_length)


def fake(config: Config, ranks: int = 1, kind: str = "cpu") -> dry_run.DryRun:
    return dry_run.dry_run(config, resolved(config), Cluster(H100, ranks), kind=kind)


def real(config: Config) -> tuple[dict, list, dict]:
    """On a rank: (bytes of the state, peaks of the phases, bytes of each message of the step), of real tensors."""
    engine = start_engine(config.engine)
    engine.device = torch.device("cpu")
    micro_batches = accumulation(config.batch, sample_ranks(config.engine, engine.world_size))
    with Tracker(engine.device) as tracker:
        state = dry_run.one_step(engine, config, resolved(config), micro_batches, tracker)
        tracker.end()
    phases = [(phase.name, phase.peak_bytes, phase.end_bytes) for phase in tracker.trace.phases]
    engine.close()
    return state, phases, sent_in_step(tracker.trace.messages)


def real_and_even(config: Config) -> tuple[dict, list, dict]:
    """`real`, with routers that send as many tokens to each expert."""
    genuine = Router.forward

    def forward(self, hidden_BTD, valid_BT):
        chosen_Nk, *rest = genuine(self, hidden_BTD, valid_BT)
        return torch.arange(chosen_Nk.numel()).view_as(chosen_Nk) % self.config.num_experts, *rest

    with mock.patch.object(Router, "forward", forward):
        return real(config)


def phases_of(run: dry_run.DryRun) -> list[tuple]:
    return [(phase.name, phase.peak_bytes, phase.end_bytes) for phase in run.trace.phases if phase.name != "start"]


# ---------------------------------------------------------------- against real tensors and ranks


@pytest.mark.parametrize(
    "config",
    [
        settings(1),
        settings(1, activation_checkpointing="full"),
        settings(1, activation_checkpointing="selective", precision="bf16"),
        settings(1, MOE, optimizer=MUON),
    ],
    ids=["fp32", "full", "selective bf16", "experts muon"],
)
def test_every_peak_of_a_real_step_is_that_of_the_fake_one_to_the_byte(config):
    state, phases, _ = real(config)
    run = fake(config)
    assert phases_of(run) == phases
    assert run.state == state


ENGINES = {
    "ddp": {"name": "ddp"},
    "fsdp2": {"name": "fsdp2"},
    "zero1": {"name": "zero1"},
    "zero2": {"name": "zero2"},
    "zero3": {"name": "zero3", "keep_whole_below": 100},
}


def sent_in_step(messages: dict) -> dict[tuple, float]:
    """(collective, ranks of the group, awaited) -> bytes that a rank sends in a step, over all phases: DeepSpeed sends some of
    them one phase earlier or later."""
    sums: dict[tuple, float] = {}
    for (phase, collective, ranks, awaited), each in messages.items():
        if phase != "start" and collective != "broadcast":  # by which ZeRO-3, in its first step, checks that ranks agree
            key = collective, len(ranks), awaited
            sums[key] = sums.get(key, 0) + each.wire_bytes
    return sums


def check_peaks(run: dry_run.DryRun, of_ranks: list[tuple], within: float = 0.03) -> None:
    """The peak of a step is that of rank 0, and no rank has a higher one. They differ by when messages end, in which real ranks
    are free, and by what frees a tensor first."""
    peaks = [max(peak for _, peak, _ in phases) for _, phases, _ in of_ranks]
    assert run.peak.peak_bytes == pytest.approx(peaks[0], rel=within)
    assert max(peaks) <= (1 + within) * run.peak.peak_bytes


def check_ranks(ranks: int, model: ModelConfig = SIZES, micro_batches: int = 2, **engine) -> None:
    config = settings(ranks, model, **engine)
    config = dataclasses.replace(config, batch=BatchConfig(global_batch_size=micro_batches * 2 * ranks, micro_batch_size=2))
    of_ranks = run_ranks(ranks, real, config)
    state, _, expected = of_ranks[0]
    run = fake(config, ranks)
    assert run.state == state
    check_peaks(run, of_ranks)
    if micro_batches > 2:  # a dry run has at most two, the others are like the second
        return
    assert sent_in_step(run.trace.messages) == {kind: pytest.approx(size, rel=0.01) for kind, size in expected.items()}
    assert sum(expected.values()) > 2 * num_parameters(resolved(config)).active  # at least half a gradient, as 2 ranks send


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_the_peak_the_state_and_bytes_on_the_wire_are_those_of_two_real_ranks(name):
    check_ranks(2, **ENGINES[name])


SHARED = dataclasses.replace(MOE, moe=dataclasses.replace(MOE.moe, num_shared_experts=1))
KINDS = [("fsdp2", 2, SHARED, {"tensor": 2}, {})]
MORE_KINDS = [
    ("fsdp2", 2, SIZES, {"sequence": 2}, {"activation_checkpointing": "full"}),
    ("ddp", 2, MOE, {"expert": 2}, {}),
    ("ddp", 4, SIZES, {"sequence": 4}, {}),
    ("ddp", 4, SHARED, {"sequence": 2, "tensor": 2}, {"activation_checkpointing": "full"}),
    ("ddp", 4, SHARED, {"tensor": 2, "expert": 4}, {"precision": "bf16"}),
    ("fsdp2", 4, SIZES, {"tensor": 2}, {"activation_checkpointing": "full"}),
    ("fsdp2", 4, MOE, {"expert": 2}, {"activation_checkpointing": "full"}),
    ("fsdp2", 4, SHARED, {"tensor": 2, "expert": 2}, {}),
    ("fsdp2", 4, SHARED, {"sequence": 2, "expert": 4}, {"precision": "bf16"}),
    ("fsdp2", 4, SHARED, {"sequence": 2, "expert": 2}, {"replicas": 2}),
    ("zero1", 2, SIZES, {"sequence": 2}, {}),
    ("zero2", 4, SIZES, {"sequence": 2}, {}),
    ("zero3", 2, SIZES, {"sequence": 2}, {}),
]


def check_kinds(name, ranks, model, kinds, options) -> None:
    """What real ranks send is what the formula says, and what the dry run counts."""
    config = settings(ranks, model, kinds=kinds, **ENGINES[name], **options)
    of_ranks = run_ranks(ranks, real_and_even, config)
    state, _, sent = of_ranks[0]
    run = fake(config, ranks)
    assert run.state == state
    check_peaks(run, of_ranks, 0.03 if ranks < 4 else 0.1)  # of 4 that share so small a model, a tensor is several percent
    counted = sent_in_step(run.trace.messages)
    assert counted == {key: pytest.approx(size, rel=0.01) for key, size in sent.items()}
    bf16 = config.engine.precision == "bf16"
    expected: dict[tuple, float] = {}
    for each in collectives(resolved(config), LENGTH, 2, 2, config.engine, ranks, bf16=bf16):
        key = each.kind.replace("_", "-"), each.ranks, each.awaited
        expected[key] = expected.get(key, 0) + each.sent_bytes
    if name == "zero3":  # it keeps gathered what it uses again soon
        expected, sent = ({key: size for key, size in each.items() if key[0] == "all-to-all"} for each in (expected, sent))
    for key, size in sent.items():
        if size > 200:  # not the sums of a few numbers
            awaited = key[-1]
            assert expected.pop(key) == pytest.approx(size, rel=1e-6 if awaited else 0.01), key
    assert not expected


@pytest.mark.parametrize("row", KINDS, ids=lambda row: f"{row[0]} {row[1]} {row[3]}")
def test_the_formula_gives_the_bytes_that_ranks_send_under_each_kind_of_parallelism(row):
    check_kinds(*row)


@pytest.mark.slow
@pytest.mark.parametrize("row", MORE_KINDS, ids=lambda row: f"{row[0]} {row[1]} {row[3]} {row[4]}")
def test_the_formula_gives_the_bytes_that_ranks_send_under_every_engine_with_kinds(row):
    check_kinds(*row)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "options"),
    [
        ("ddp", 4, {}),
        ("fsdp2", 4, {"precision": "bf16"}),
        ("fsdp2", 4, {"replicas": 2}),
        ("fsdp2", 2, {"reduce_gradients": "step"}),
        ("zero1", 2, {}),
        ("zero1", 4, {"precision": "bf16"}),
        ("zero2", 2, {}),
        ("zero3", 2, {}),
        ("zero3", 4, {"precision": "bf16"}),
        *((name, 2, {"activation_checkpointing": "full", "micro_batches": 1}) for name in ENGINES),
        ("ddp", 2, {"model": MOE, "activation_checkpointing": "selective"}),
        ("fsdp2", 3, {"precision": "bf16", "micro_batches": 3, "activation_checkpointing": "selective"}),
    ],
)
def test_the_peak_the_state_and_bytes_on_the_wire_are_those_of_real_ranks_of_every_engine(name, ranks, options):
    check_ranks(ranks, **ENGINES[name], **options)


@pytest.mark.slow
def test_runs_of_every_engine_follow_each_other_in_one_process():
    for name in ("zero3", "zero1", "fsdp2", "zero3", "ddp", "zero2"):
        assert fake(settings(2, **ENGINES[name]), ranks=2).state["gradients"] > 0


def test_the_state_is_that_of_the_table_in_the_documentation():
    parameters = num_parameters(resolved(settings(1))).total
    assert fake(settings(4)).state == {"weights": 4 * parameters, "gradients": 4 * parameters, "moments": 8 * parameters}
    sharded = fake(settings(4, name="fsdp2"), ranks=4).state
    assert sharded["gradients"] == sharded["weights"] and sharded["moments"] == 2 * sharded["weights"]
    assert sharded["weights"] == pytest.approx(
        parameters, rel=0.02
    )  # 4 bytes / 4 ranks; rows that do not divide are rounded up


def test_flops_are_those_of_the_flop_counter_and_of_the_formula():
    config = settings(1, precision="bf16")
    engine = start_engine(config.engine)
    with FlopCounterMode(display=False) as counter, Tracker(torch.device("cpu")) as tracker:
        dry_run.one_step(engine, config, resolved(config), 2, tracker)
    run = fake(config)
    work = run.work()
    products = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "scaled_dot" not in str(name))
    assert work["products"]["flops"] == products
    model = resolved(config)
    attention_flops = flops_per_token(model, LENGTH) - 6 * num_parameters(model).matmul
    padding = 6 * (vocabulary_rows(model) - IDS) * model.hidden_size
    # The formula does not count padding rows, nor the product that the backward kernel of attention repeats (7, not 6),
    # nor that a norm on a CPU sums the gradient of its weight by a product.
    norms = 2 * model.hidden_size * (2 * model.num_hidden_layers + 1)
    expected = (flops_per_token(model, LENGTH) + padding + norms + attention_flops // 6) * run.tokens
    assert work["products"]["flops"] + work["attention"]["flops"] == expected


@pytest.mark.parametrize(
    "engine",
    [
        {"name": "ddp"},
        {"name": "fsdp2"},
        {"name": "fsdp2", "replicas": 2},
        {"name": "fsdp2", "reduce_gradients": "step"},
        # zero3 keeps gathered what it uses again soon, so only a large model sends all that the formula says.
        pytest.param({"name": "zero1"}, marks=pytest.mark.slow),
        {"name": "zero2"},
    ],
    ids=lambda engine: "-".join(str(value) for value in engine.values()),
)
def test_the_formula_for_messages_gives_what_every_engine_sends(engine):
    config, counted, expected = settings(4, precision="bf16", **engine), {}, {}
    for message in fake(config, 4).messages():
        counted[message["collective"]] = counted.get(message["collective"], 0) + message["wire_bytes"]
    for each in collectives(resolved(config), LENGTH, 2, 2, config.engine, 4):
        expected[each.kind.replace("_", "-")] = expected.get(each.kind.replace("_", "-"), 0) + each.sent_bytes
    assert {kind: size for kind, size in counted.items() if size > 1000} == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "kinds", [{"tensor": 2}, *(pytest.param({kind: 2}, marks=pytest.mark.slow) for kind in ("sequence", "expert"))], ids=str
)
def test_a_token_costs_the_same_flops_under_every_kind_of_parallelism(kinds):
    config = settings(2, SHARED if "expert" in kinds else SIZES, kinds=kinds)
    alone, shared = fake(settings(1, config.model)), fake(config, ranks=2)
    assert shared.tokens * 2 == config.batch.global_batch_size * LENGTH
    for kind in ("products", "attention"):
        assert shared.work()[kind]["flops"] / shared.tokens == alone.work()[kind]["flops"] / alone.tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "engine"),
    [
        (SIZES, {"name": "fsdp2", "kinds": {"sequence": 2}}),
        (SIZES, {"name": "fsdp2", "kinds": {"sequence": 2}, "activation_checkpointing": "full"}),
        (SIZES, {"name": "fsdp2", "kinds": {"tensor": 2}, "activation_checkpointing": "selective"}),
        (MOE, {"name": "ddp"}),
        (MOE, {"name": "fsdp2", "kinds": {"expert": 2}, "activation_checkpointing": "full"}),
    ],
    ids=["sequence", "sequence, full", "tensor, selective", "experts", "experts of several ranks, full"],
)
def test_the_formula_for_memory_is_close_to_a_dry_run(model, engine):
    def compared(layers: int) -> tuple[float, float, float, float]:
        """Peak and what blocks keep: of the formula, of a dry run."""
        wide = dataclasses.replace(
            model, hidden_size=512, num_hidden_layers=layers, intermediate_size=1408, num_attention_heads=4,
            num_key_value_heads=2, head_dim=128, moe=model.moe and dataclasses.replace(model.moe, moe_intermediate_size=512),
        )  # fmt: skip
        config = settings(2, wide, micro_batch=1, **{**engine, "precision": "bf16", "compile": "blocks"})
        config = dataclasses.replace(config, data=DataConfig(sequence_length=4096, synthetic=SyntheticConfig()))
        shape = resolve_model(wide, vocab_size=8000, sequence_length=4096)
        run = dry_run.dry_run(config, shape, Cluster(H100, 2))
        event = next(phase.end_event for phase in run.trace.phases if phase.name == "forward 1")
        kept = sum(block.bytes for block in run.trace.live(event) if not block.kind and block.phase.startswith("forward"))
        formula = memory(shape, 4096, 1, config.engine, 2)
        return formula.peak, run.peak.peak_bytes, formula.activations, kept

    few, more = compared(2), compared(3)
    assert more[0] == pytest.approx(more[1], rel=0.1)
    assert more[2] - few[2] == pytest.approx(more[3] - few[3], rel=0.05)


@pytest.mark.parametrize(
    "checkpointing", ["none", *(pytest.param(name, marks=pytest.mark.slow) for name in ("selective", "full"))]
)
def test_a_compiled_block_keeps_what_aot_autograd_saves(checkpointing, monkeypatch):
    config = settings(1, compile="blocks", activation_checkpointing=checkpointing, precision="bf16")
    torch._dynamo.reset()
    engine = start_engine(config.engine)
    engine.compile_backend = "aot_eager_decomp_partition"
    with Tracker(torch.device("cpu")) as tracker:
        dry_run.one_step(engine, config, resolved(config), 2, tracker)
        tracker.end()
    run = fake(config)
    after = {phase.name: phase.end_bytes for phase in tracker.trace.phases}
    assert run.graphs > 0
    tolerance = 0.01 if checkpointing == "full" else 0
    for phase in run.trace.phases[1:]:
        assert phase.end_bytes == pytest.approx(after[phase.name], rel=tolerance, abs=0), phase.name


# ---------------------------------------------------------------- faults


def found(config: Config, kind: str = "cuda") -> set[tuple[str, bool]]:
    """(name, stops) of the findings about the code of a step."""
    return {(finding.name, finding.stops) for finding in dry_run.fault_findings(fake(config, kind=kind))}


@pytest.mark.parametrize(
    "engine",
    [{"name": "ddp"}, {"name": "fsdp2"}, {"compile": "blocks"}, pytest.param({"compile": "model"}, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("model", [SIZES, MOE], ids=["dense", "experts"])
def test_the_step_has_no_faults(model, engine):
    assert found(settings(1, model, **engine)) == set()


def plant(monkeypatch, fault) -> None:
    """Runs `fault(hidden)` in the feed-forward of every block."""
    genuine = transformer.FeedForward.forward

    def forward(self, hidden_BTD):
        return genuine(self, fault(hidden_BTD))

    monkeypatch.setattr(transformer.FeedForward, "forward", forward)


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (lambda x: x * (1.0 if x.sum().item() else 2.0), "waits-for-device"),
        (lambda x: x if x.isfinite().all() else x + 1, "waits-for-device"),
        (lambda x: x * len(x.flatten().tolist()[:1]), "waits-for-device"),
        (lambda x: x + x.detach().to("cpu").to(x.device), "waits-for-device"),
        (lambda x: x * torch.tensor([2.0], device=x.device), "copies-from-host"),
        (lambda x: x + torch.ones(x.shape[-1]).to(x.device), "copies-from-host"),
        (lambda x: x + torch.ones(x.shape[-1]).to(x.device, non_blocking=True), "copies-from-host"),
    ],
    ids=["item", "branch", "tolist", "to the host", "from values", "pageable", "pageable, not blocking"],
)
def test_what_makes_a_gpu_wait_is_found(fault, name, monkeypatch):
    plant(monkeypatch, fault)
    assert (name, True) in found(settings(1))


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (lambda x: x + torch.ones(x.shape[-1]), "wrong-device"),
        (lambda x: x[x.sum(-1) > 0].mean() + x, "waits-for-device"),
    ],
    ids=["a tensor of the host", "a shape by values"],
)
def test_a_step_that_cannot_run_or_be_followed_is_refused_with_the_line(fault, name, monkeypatch):
    plant(monkeypatch, fault)
    with pytest.raises(dry_run.CannotRun) as refused:
        fake(settings(1), kind="cuda")
    assert refused.value.name == name and refused.value.where.startswith("pretrain/model/transformer.py:")


def full_logits(hidden_BTD, weight_VD, labels_BT, vocab_size, step=None):
    logits_NV = (hidden_BTD @ weight_VD.T).flatten(0, 1).float()
    loss_N = F.cross_entropy(logits_NV, labels_BT.flatten(), reduction="none")
    return loss_N.sum(), loss_N.detach().view_as(labels_BT).sum(1)


def test_logits_of_all_positions_are_found(monkeypatch):
    monkeypatch.setattr(transformer, "cross_entropy_sums", full_logits)
    assert ("full-logits", True) in found(settings(1))


def test_a_mask_with_an_entry_for_every_pair_is_found(monkeypatch):
    plant(monkeypatch, lambda x: x * (torch.ones(LENGTH, LENGTH, device=x.device, dtype=torch.bool).tril().sum() > 0))
    assert ("quadratic-mask", True) in found(settings(1))


def test_no_rank_has_hidden_states_or_logits_of_an_entire_sequence_that_ranks_share():
    def of_all_positions(config: Config, ranks: int) -> set[str]:
        positions, rows = 2 * LENGTH, vocabulary_rows(resolved(config))
        found = set()
        for block in fake(config, ranks).trace.allocations:
            *leading, last = block.shape or (0,)
            if block.dtype.is_floating_point and math.prod(leading) == positions and block.phase != "start":
                found |= {"hidden"} if last == SIZES.hidden_size else {"logits"} if last in (IDS, rows) else set()
        return found

    assert of_all_positions(settings(1), 1) == {"hidden", "logits"}
    assert of_all_positions(settings(2, name="fsdp2", kinds={"sequence": 2}), 2) == set()


@pytest.mark.parametrize(
    "engine", ["fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero1", "zero3"))]
)
def test_positions_stay_in_fp32_where_products_are_in_bf16(engine, monkeypatch):
    genuine, seen = transformer.rotate, set()

    def rotate(x_BTHC, context):
        seen.add((x_BTHC.dtype, context.cos_TC.dtype, context.sin_TC.dtype))
        return genuine(x_BTHC, context)

    monkeypatch.setattr(transformer, "rotate", rotate)
    fake(settings(2, name=engine, precision="bf16"), ranks=2)
    assert seen == {(torch.bfloat16, torch.float32, torch.float32)}


# ---------------------------------------------------------------- findings about the plan


def wide(**engine) -> Config:
    """Four layers as wide as a model of 1B, whose activations do not fit on a small card."""
    model = ModelConfig(hidden_size=2048, num_hidden_layers=4, num_attention_heads=16, vocab_size=4096)
    config = settings(1, model, micro_batch=32, **engine)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=2048))


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_changes_that_fit():
    config = wide(precision="bf16")
    run = dry_run.dry_run(
        config, resolve_model(config.model, vocab_size=4096, sequence_length=2048), Cluster(devices.find("l4"), 1)
    )
    (finding,) = dry_run.plan_findings(run)
    assert finding.name == "does-not-fit" and finding.stops and run.needed_gib > 24
    assert "--batch.micro_batch_size " in finding.text
    assert "--engine.activation_checkpointing full (" in finding.text


@pytest.mark.slow
def test_kinds_of_parallelism_with_which_a_run_fits_are_proposed():
    config = wide(precision="bf16", name="fsdp2", compile="blocks", activation_checkpointing="full")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=2**18))
    config = dataclasses.replace(config, batch=BatchConfig(global_batch_size=8, micro_batch_size=1))
    shape = resolve_model(config.model, vocab_size=4096, sequence_length=2**18)
    (finding,) = dry_run.plan_findings(dry_run.dry_run(config, shape, Cluster(devices.find("l4"), 8)))
    assert finding.name == "does-not-fit" and "--engine.parallel.sequence " in finding.text


@pytest.mark.slow
def test_slow_links_make_a_plan_communication_bound_and_a_larger_micro_batch_mends_it():
    model = ModelConfig(hidden_size=1024, num_hidden_layers=2, num_attention_heads=8, vocab_size=1024)
    config = dataclasses.replace(
        settings(64, model, micro_batch=1, name="fsdp2", precision="bf16"),
        data=DataConfig(sequence_length=512, synthetic=SyntheticConfig()),
    )
    config = dataclasses.replace(config, batch=BatchConfig(global_batch_size=64 * 64, micro_batch_size=1))
    shape = resolve_model(model, vocab_size=1024, sequence_length=512)
    run = dry_run.dry_run(config, shape, Cluster(H100, 64))
    (finding,) = dry_run.plan_findings(run)
    assert finding.name == "communication-bound" and not finding.stops
    assert "--engine.replicas 8" in finding.text or "micro_batch_size" in finding.text


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("cloud", 8),
        ("cloud_zero3", 8),
        pytest.param("cloud_zero3", 64, marks=pytest.mark.release),
        pytest.param("cloud_moe", 32, marks=pytest.mark.release),
        ("cloud_long_context", 8),
    ],
)
def test_the_cloud_configurations_fit_and_computation_hides_their_messages(name, ranks, tmp_path):
    report = tmp_path / "report.json"
    command = ["tools/check_run.py", "--device", "h100", "--config", f"configs/{name}.yaml", "--ranks", str(ranks)]
    done = subprocess.run([sys.executable, *command, "--json", report], cwd=ROOT, capture_output=True, text=True, timeout=600)
    content = json.loads(report.read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert content["needed_gib"] < content["memory_gib"] and content["estimate"]["exposed"] < 0.2 * content["estimate"]["total"]
    assert not [finding for finding in content["findings"] if finding["stops"] or finding["name"] == "communication-bound"]
    config = load(["--config", str(ROOT / f"configs/{name}.yaml")], world_size=ranks)
    model = resolve_model(config.model, vocab_size=32000, sequence_length=config.data.sequence_length)
    micro_batches = accumulation(config.batch, sample_ranks(config.engine, ranks))
    batch = config.data.sequence_length, config.batch.micro_batch_size, micro_batches
    sent = collectives(model, *batch, config.engine, ranks)
    wire_bytes = sum(message["wire_bytes"] for message in content["messages"])
    assert wire_bytes == pytest.approx(sum(each.sent_bytes for each in sent), rel=0.01)


# ---------------------------------------------------------------- the command


def check(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/check_run.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)


def test_the_command_prints_and_writes_what_a_step_needs(tmp_path):
    report = tmp_path / "report.json"
    done = check("--device", "h100", "--config", "configs/dummy.yaml", "--ranks", "1", "--engine.compile", "none",
                 "--json", str(report))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(report.read_text())
    assert content["device"] == "H100" and content["ranks"] == 1
    assert content["state_bytes"]["weights"] == 4 * content["parameters"] and content["findings"] == []
    assert {phase["name"] for phase in content["phases"]} >= {"forward 1", "backward 1", "update"}
    assert content["peak_bytes"] == sum(content["held_at_peak_bytes"].values())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--device", "h101"), "h100"),
        (("--device", "h100", "--invariance"), "--invariance"),
        (("--device", "h100", "--ranks", "7"), "global_batch_size"),
    ],
)
def test_an_unknown_device_and_ranks_that_do_not_divide_the_batch_are_refused(flags, said):
    done = check("--config", "configs/dummy.yaml", *flags)
    assert done.returncode == 2 and said in done.stderr
