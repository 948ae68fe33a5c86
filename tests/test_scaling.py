"""The estimate of a step's time: what is sent is counted, and what is assumed is close to published runs."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from benchmarks.scaling import PUBLISHED, errors, estimate
from pretrain import devices
from pretrain.config import EngineConfig
from pretrain.model import flops
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.plan.scaling import HOPPER, Cluster, collective_seconds, collectives, step_time

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
    sent = sum(each.sent_bytes for each in collectives(MODEL, EngineConfig(**settings), ranks, accumulation))
    expected = bytes_per_parameter * flops.num_parameters(MODEL).total * (ranks - 1) / ranks
    assert sent == pytest.approx(expected, rel=1e-6)


def test_a_process_alone_sends_nothing():
    assert collectives(MODEL, EngineConfig(name="fsdp2"), 1, 4) == []


def test_replicas_take_the_gathering_off_the_network():
    flat, hybrid = EngineConfig(name="fsdp2"), EngineConfig(name="fsdp2", replicas=8)
    cluster = Cluster(H100, 64, network_gb_per_second=50)  # one network card for the node

    def seconds(engine: EngineConfig) -> float:
        return step_time(MODEL, 4096, 2, 8, engine, cluster).communication

    assert seconds(hybrid) < seconds(flat) / 4
    across = next(each for each in collectives(MODEL, hybrid, 64, 8) if each.kind == "all_reduce")
    assert (across.ranks, across.stride) == (8, 8)


def test_a_ring_over_nodes_runs_on_all_network_cards_and_rings_beside_each_other_share_them():
    one, eight = Cluster(H100, 64, network_gb_per_second=50), Cluster(H100, 64, network_gb_per_second=400)
    rates = replace(HOPPER, hop_seconds=(0.0, 0.0))
    gather = collectives(MODEL, EngineConfig(name="zero3"), 64, 1)[0]
    assert collective_seconds(gather, one, rates) == pytest.approx(8 * collective_seconds(gather, eight, rates), rel=0.15)
    across = next(each for each in collectives(MODEL, EngineConfig(name="fsdp2", replicas=8), 64, 1) if each.stride > 1)
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
