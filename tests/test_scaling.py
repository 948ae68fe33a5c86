"""The estimate of a step's time: what is sent is counted, and what is assumed is close to published runs."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.scaling import PUBLISHED, errors, estimate
from pretrain import devices
from pretrain.config import EngineConfig, OptimizerConfig, ParallelConfig
from pretrain.model import flops
from pretrain.model.config import ModelConfig, MoeConfig, resolve_model
from pretrain.optim.averages import Averages
from pretrain.plan.messages import Collective, collectives, held
from pretrain.plan.scaling import HOPPER, Cluster, collective_seconds, step_time

H100 = devices.find("h100")
MODEL = resolve_model(
    ModelConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008),
    vocab_size=32000,
    sequence_length=4096,
)


def test_estimates_of_published_runs_are_off_by_a_tenth_in_the_middle_and_never_by_half():
    sizes = [abs(error) for error in errors().values()]
    assert statistics.median(sizes) < 0.12 and max(sizes) < 0.4


@pytest.mark.parametrize("compiled", [False, True])
def test_going_from_one_node_to_sixteen_costs_what_torchtitan_has_published(compiled):
    few, many = (
        next(run for run in PUBLISHED if run.name == "torchtitan 8B" and run.gpus == gpus and run.compiled == compiled)
        for gpus in (8, 128)
    )
    published = many.tokens_per_second / few.tokens_per_second
    assert estimate(many).tokens_per_second / estimate(few).tokens_per_second == pytest.approx(published, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "accumulation", "bytes_per_parameter"),
    [
        ({"name": "ddp"}, 4, 2 * 4),
        ({"name": "zero1"}, 4, 2 * 4 + 2),
        ({"name": "zero2"}, 4, 4 * 2 * 4 + 2),
        ({"name": "zero3"}, 4, 4 * (4 + 2 + 2)),
        ({"name": "zero3", "reduce_gradients": "step"}, 4, 4 + 4 * (2 + 2)),
    ],
)
def test_a_rank_sends_gradients_in_fp32_and_weights_in_bf16_as_often_as_its_engine_says(
    settings, accumulation, bytes_per_parameter
):
    ranks = 8
    sent = sum(each.sent_bytes for each in collectives(MODEL, 4096, 2, accumulation, EngineConfig(**settings), ranks))
    expected = bytes_per_parameter * flops.num_parameters(MODEL).total * (ranks - 1) / ranks
    assert sent == pytest.approx(expected, rel=1e-6)


def test_a_process_alone_sends_nothing():
    assert collectives(MODEL, 4096, 2, 4, EngineConfig(name="fsdp2"), 1) == []


def test_replicas_take_the_gathering_off_the_network():
    flat, hybrid = EngineConfig(name="fsdp2"), EngineConfig(name="fsdp2", replicas=8)
    cluster = Cluster(H100, 64, network_gb_per_second=50)  # one network card for the node

    def seconds(engine: EngineConfig) -> float:
        return step_time(MODEL, 4096, 2, 8, engine, cluster).communication

    assert seconds(hybrid) < seconds(flat) / 4
    across = next(each for each in collectives(MODEL, 4096, 2, 8, hybrid, 64) if each.kind == "all_reduce")
    assert (across.ranks, across.stride) == (8, 8)


def test_a_ring_over_nodes_runs_on_all_network_cards_and_rings_beside_each_other_share_them():
    one, eight = Cluster(H100, 64, network_gb_per_second=50), Cluster(H100, 64, network_gb_per_second=400)
    rates = replace(HOPPER, hop_seconds=(0.0, 0.0))
    gather = collectives(MODEL, 4096, 2, 1, EngineConfig(name="zero3"), 64)[0]
    assert collective_seconds(gather, one, rates) == pytest.approx(8 * collective_seconds(gather, eight, rates), rel=0.15)
    hybrid = collectives(MODEL, 4096, 2, 1, EngineConfig(name="fsdp2", replicas=8), 64)
    across = next(each for each in hybrid if each.stride > 1)
    assert collective_seconds(across, eight, rates) == pytest.approx(across.sent_bytes / (400e9 * rates.network / 8))


def test_recomputation_takes_time_and_lowers_mfu():
    rates = [
        step_time(MODEL, 4096, 2, 8, EngineConfig(name="fsdp2", activation_checkpointing=kept), Cluster(H100, 8)).mfu
        for kept in ("none", "selective", "full")
    ]
    assert rates[0] > rates[1] > rates[2]


def test_more_gpus_never_raise_the_rate_of_one():
    rates = [
        step_time(MODEL, 4096, 2, 8, EngineConfig(name="fsdp2"), Cluster(H100, gpus)).tokens_per_second
        for gpus in (8, 16, 64, 256, 1024)
    ]
    assert rates == sorted(rates, reverse=True)


# ---------------------------------------------------------------- kinds of parallelism

KINDS = [{"sequence": 4}, {"tensor": 4}, {"sequence": 2, "tensor": 4}]


def with_kinds(name: str = "fsdp2", **kinds: int) -> EngineConfig:
    return EngineConfig(name=name, parallel=ParallelConfig(**kinds))


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_under_each_kind_every_token_and_every_flop_counts_once(kinds):
    """The ranks that share a sequence do the work of one rank, so each of them has its part of the tokens, and MFU is that of
    its own tokens."""
    engine, ranks, accumulation = with_kinds(**kinds), 8, 4
    time = step_time(MODEL, 4096, 2, accumulation, engine, Cluster(H100, ranks))
    samples = 2 * accumulation * ranks // (engine.parallel.sequence * engine.parallel.tensor)
    assert time.tokens_per_second * ranks * time.total == pytest.approx(samples * 4096)
    assert time.mfu == pytest.approx(time.tokens_per_second * flops.flops_per_token(MODEL, 4096) / (H100.bf16_tflops * 1e12))
    alone = step_time(MODEL, 4096, 2, accumulation, with_kinds(), Cluster(H100, ranks))
    assert time.products >= alone.products * samples / (2 * accumulation * ranks)
    assert 0.7 * alone.mfu < time.mfu <= alone.mfu * 1.001


@pytest.mark.parametrize(
    ("optimizer", "passes"),
    [({"average_decay": 0.99}, 3), ({"lookahead": 0.6}, 6), ({"average_decay": 0.99, "lookahead": 0.6}, 9)],
)
def test_averages_of_the_weights_cost_the_memory_traffic_of_their_updates(optimizer, passes):
    """`passes`: reads and writes of a number in fp32, beside the 7 of AdamW; counted here in the operators of a real update."""
    averages = Averages(**optimizer)
    weight, states = torch.zeros(1000), {kind: [torch.zeros(1000)] for kind in averages.kinds}
    with Traffic() as traffic:
        averages.update([weight], states, torch.tensor(5.0), 1.0, torch.tensor(1.0))
    assert traffic.numbers == 1000 * passes
    moved = OptimizerConfig(**optimizer).average_bytes
    assert moved == 4 * passes
    engine, cluster = EngineConfig(name="fsdp2"), Cluster(H100, 8)
    plain, averaged = (step_time(MODEL, 4096, 2, 1, engine, cluster, average_bytes=each) for each in (0, moved))
    assert averaged.optimizer == pytest.approx(plain.optimizer * (7 + passes) / 7)
    assert averaged.total - plain.total == pytest.approx(averaged.optimizer - plain.optimizer)


class Traffic(TorchDispatchMode):
    """Counts the numbers that operators on whole weights read and write."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        tensors = [each for each in args if isinstance(each, torch.Tensor) and each.numel() == 1000]
        self.numbers += sum(each.numel() for each in tensors) + (1000 if tensors else 0)
        return found


def test_exchanges_of_tokens_are_awaited_and_cost_more_when_they_leave_the_node():
    def sent(**kinds: int) -> list[Collective]:
        return [each for each in collectives(MODEL, 4096, 2, 1, with_kinds(**kinds), 64) if each.awaited]

    cluster = Cluster(H100, 64)
    (within,), (beyond,) = sent(sequence=8), sent(sequence=16)
    assert (within.kind, within.stride, beyond.ranks) == ("all_to_all", 1, 16)
    seconds = [collective_seconds(each, cluster, HOPPER) for each in (within, beyond)]
    assert seconds[1] > 1.5 * seconds[0]  # for about half as many bytes
    assert sent(sequence=2, tensor=4)[0].stride == 4  # ranks that share matrices are neighbours


def test_an_all_to_all_takes_the_time_of_its_slowest_links():
    rates, cluster = replace(HOPPER, hop_seconds=(0.0, 0.0)), Cluster(H100, 64, network_gb_per_second=400)
    size = 8e9
    within = Collective("all_to_all", size, 8, 1, 1, True)
    assert collective_seconds(within, cluster, rates) == pytest.approx(7e9 / (H100.link_gb_per_second * rates.link * 1e9))
    across = Collective("all_to_all", size, 16, 1, 1, True)  # half of it to the other node, by eight ranks at once
    assert collective_seconds(across, cluster, rates) == pytest.approx(8 * 4e9 / (400e9 * rates.network))


def test_groups_of_the_kinds_hold_all_parameters_of_a_model_with_experts():
    model = resolve_model(
        ModelConfig(hidden_size=512, num_hidden_layers=3, num_attention_heads=8, moe=MoeConfig(num_experts=16)),
        vocab_size=4096,
        sequence_length=128,
    )
    total = flops.num_parameters(model).total
    for kinds in ({}, {"sequence": 2}, {"expert": 4}, {"tensor": 2, "expert": 8}):
        dense, experts = held(model, with_kinds(**kinds), 16)
        tensor, expert = kinds.get("tensor", 1), kinds.get("expert", 1)
        counts = flops.num_parameters(model)
        kept = counts.undivided + (counts.experts if expert == 1 else 0)
        assert (dense.parameters - kept) * tensor + kept + experts.parameters * expert == total
        assert (dense.ranks * tensor, experts.ranks * expert) == (16, 16)
