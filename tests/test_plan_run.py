"""tools/plan_run.py: states, micro-batches, money and intervals are what they say, and table, JSON and picture agree."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from pretrain import UserError, devices, dry_run
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.config import ConfigError, EngineConfig, ParallelConfig, load, validate
from pretrain.engines.config import KINDS_OF
from pretrain.model.config import ModelConfig, MoeConfig, resolve_model
from pretrain.plan import choices, cost, interval
from pretrain.plan.choices import Job
from pretrain.plan.cost import Length
from pretrain.plan.interval import Risk, Saves
from pretrain.plan.memory import OUTSIDE_GIB
from pretrain.plan.scaling import Cluster
from pretrain.report import plan_table
from tools import plan_run

ROOT = Path(__file__).parents[1]
H100 = devices.find("h100")
CLOUD = ["--config", str(ROOT / "configs" / "cloud.yaml"), "--quick"]
SMALL = ["--model.vocab_size", "1000", "--model.hidden_size", "128", "--model.num_hidden_layers", "3",
         "--model.num_attention_heads", "4", "--model.num_key_value_heads", "2", "--data.train", "[{path: data/none}]",
         "--data.sequence_length", "256", "--batch.global_batch_size", "256", "--batch.micro_batch_size", "4",
         "--train.max_steps", "1000"]  # fmt: skip


def planned(flags: list[str], tmp_path: Path, capsys) -> tuple[dict, str]:
    """The JSON and the text of a plan that fits."""
    output = tmp_path / "plan.json"
    assert plan_run.main([*flags, "--json", str(output)]) == 0
    return json.loads(output.read_text()), capsys.readouterr().out


# ---------------------------------------------------------------- intervals


def test_the_intervals_are_those_of_young_and_daly():
    """By hand, in minutes: blocked 5, mean 1440. Young: sqrt(2 x 5 x 1440) = 120. Daly: 120 x (1 + sqrt(5 / 2880) / 3 +
    5 / 2880 / 9) - 5 = 120 x (1 + 0.013889 + 0.000193) - 5 = 116.69."""
    saves, risk = Saves(300, 0), Risk(86400, 600)
    assert interval.first_order(saves, risk) == pytest.approx(120 * 60)
    assert interval.best_interval(saves, risk) / 60 == pytest.approx(116.69, abs=0.005)
    assert interval.best_interval(Saves(3000, 0), Risk(1000, 0)) == 1000  # Daly: more than half the mean time
    assert interval.best_interval(saves, Risk(math.inf, 600)) == math.inf
    assert interval.best_interval(Saves(0.1, 500), Risk(3600, 0)) == 500  # one save at a time


@pytest.mark.parametrize(
    ("saves", "risk"),
    [
        (Saves(1, 30), Risk(3600, 300)),
        (Saves(60, 0), Risk(3600, 300)),
        (Saves(300, 0), Risk(4 * 3600, 600)),
        (Saves(0.2, 15), Risk(20 * 3600, 300)),
        (Saves(600, 0), Risk(1800, 300)),
    ],
    ids=str,
)
def test_the_interval_loses_at_most_five_percent_more_than_the_best_of_a_thousand_simulated_runs(saves, risk):
    """And the formula for the time of a run is the simulated mean."""
    best = interval.best_interval(saves, risk)
    found = interval.simulate(best, saves, risk)
    assert found.runs == 1000
    assert found.loss <= 1.05 * found.best_loss
    work = 50 * risk.mean_seconds
    assert interval.expected_seconds(work, best, saves, risk) / work - 1 == pytest.approx(found.loss, rel=0.03)
    for wrong in (best / 3, best * 3):  # the simulation can tell
        if wrong >= saves.durable_seconds:
            assert interval.simulated_seconds(work, wrong, saves, risk).mean() / work - 1 > 1.05 * found.loss


def test_a_simulated_run_pays_for_saves_restarts_and_lost_work():
    """One run by hand: intervals of 100 s, saves that block 10 s and are durable 20 s later, restarts of 50 s. Interruptions
    after 185, 80 and 10,000 s: the first start takes 50, and at 185 the save of 160 is durable (180): 100 of 250 s are done. At
    80, none. Then 50 s of restart, 150 s of work, two saves, and 20 s until the last one is durable."""

    class Draws:
        times = iter((185.0, 80.0, 10_000.0))

        def exponential(self, mean, runs):
            return np.full(runs, next(self.times))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interval.np.random, "default_rng", lambda seed: Draws())
        total = interval.simulated_seconds(250, 100, Saves(10, 20), Risk(1.0, 50), runs=1)
    assert total.tolist() == [185 + 80 + 50 + 150 + 2 * 10 + 20]


# ---------------------------------------------------------------- money


def test_money_is_hours_times_gpus_times_the_price():
    """By hand: 8 GPUs of 989 TFLOP/s at MFU 0.5 take an hour for 8 x 989e12 x 0.5 x 3600 FLOPs. Validation with half as many
    tokens adds a sixth. A save blocks for 6 s and there is one per 10 minutes of 70: 42 s. The start takes 60 s."""
    length = Length(1000, 10**9, 8 * 989e12 * 0.5 * 3600, 5 * 10**8)
    spent = cost.cost(length, Cluster(H100, 8), 0.5, Saves(6, 0), Risk(math.inf, 60), 2.5, interval=600)
    assert spent[:4] == pytest.approx((3600, 600, 42, 60))
    assert spent.gpu_hours == pytest.approx(4302 / 3600 * 8)
    assert spent.dollars == pytest.approx(4302 / 3600 * 8 * 2.5)


def test_checkpoints_have_twelve_bytes_per_parameter_and_eight_of_matrices_under_muon():
    model = resolve_model(ModelConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=160,
                                      tie_word_embeddings=False), vocab_size=512, sequence_length=64)  # fmt: skip
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 160)
    others = 2 * 512 * 64 + 5 * 64
    assert cost.checkpoint_bytes(model) == 12 * (matrices + others)
    assert cost.checkpoint_bytes(model, "muon") == 8 * matrices + 12 * others
    assert cost.checkpoint_bytes(model, "muon", averages=2) == 16 * matrices + 20 * others


def test_a_save_is_durable_once_it_is_in_the_mirror():
    """By hand: 80 GB, 8 GPUs that each copy 10 GB at 10 GB/s; 2 GB/s to the disk, then 2 GB/s or 500 MB/s to the mirror."""
    for settings, wanted in (
        ({}, (1, 40)),
        ({"asynchronous": False}, (40, 0)),
        ({"mirror": "s3://b/f"}, (1, 80)),
        ({"mirror": "s3://b/f", "mirror_mb_per_second": 500}, (1, 200)),
        ({"mirror": "s3://b/f", "mirror_mb_per_second": 5000, "asynchronous": False}, (40, 40)),
    ):
        assert cost.saves(80 * 10**9, 8, 2.0, CheckpointConfig(**settings)) == pytest.approx(wanted), settings


def test_a_stated_mfu_scales_time_and_money_and_a_spot_market_its_price(tmp_path, capsys):
    flags = [*CLOUD, "--dollars-per-hour", "2", "--mfu", "0.25", "--preemptions-per-hour", "0", "--restart-minutes", "0.001"]
    plan, _ = planned([*flags, "--evaluate.max_batches", "1", "--evaluate.every_steps", "0"], tmp_path, capsys)
    here, run = plan["configuration"], plan["run"]
    hours = run["flops"] / (8 * 989e12 * 0.25) / 3600
    assert here["hours"]["training"] == pytest.approx(hours)
    assert here["tokens_per_second_per_gpu"] == pytest.approx(989e12 * 0.25 / plan["model"]["flops_per_token"])
    assert here["dollars"] == pytest.approx(2 * 8 * hours, rel=1e-3)
    spot, _ = planned([*CLOUD, "--dollars-per-hour", "2", "--spot-discount", "0.75", "--preemptions-per-hour", "0.01"],
                      tmp_path, capsys)  # fmt: skip
    rows = {row["market"]: row for row in spot["choices"] if row["gpus"] == 8 and not row["configured"]}
    assert rows["spot"]["dollars_per_hour"] == 0.5
    assert 0.25 < rows["spot"]["dollars"] / rows["on demand"]["dollars"] < 0.27
    assert spot["choices"] == sorted(spot["choices"], key=lambda row: row["dollars"])


def test_the_bill_of_tinyllama_is_the_published_one(tmp_path, capsys):
    """README of jzhang38/TinyLlama: 300B tokens take 3,456 A100-40G hours on 16 GPUs under FSDP with micro-batches of 16k
    tokens, which fit; 22B tokens 32 hours on 8 GPUs. Our plans say 7 % less."""
    flags = ["--config", str(ROOT / "configs" / "models" / "tinyllama_1b.yaml"), "--gpu", "a100-40gb", "--quick"]
    flags += ["--data.sequence_length", "2048", "--batch.micro_batch_size", "8", "--batch.global_batch_size", "1024"]
    flags += ["--engine.name", "fsdp2", "--data.train", "[{path: data/none}]", "--checkpoint.every_minutes", "60"]
    plan, _ = planned([*flags, "--gpus", "16", "--train.max_tokens", "300000000000"], tmp_path, capsys)
    assert plan["run"]["steps"] == pytest.approx(143_000, rel=1e-3)
    assert plan["configuration"]["gpu_hours"] == pytest.approx(3456, rel=0.1)
    plan, _ = planned([*flags, "--gpus", "8", "--train.max_tokens", "22000000000"], tmp_path, capsys)
    assert plan["configuration"]["hours"]["total"] == pytest.approx(32, rel=0.1)


def test_any_of_several_machines_interrupts_a_run_and_a_budget_ends_it(tmp_path, capsys):
    flags = [*CLOUD, "--run.dollars_per_hour", "2", "--run.budget_dollars", "100", "--batch.micro_batch_size", "8"]
    hours = []
    for nodes in ("1", "4"):
        plan, text = planned([*flags, "--nodes", nodes, "--preemptions-per-hour", "0.05"], tmp_path, capsys)
        hours.append(plan["intervals"][0]["hours_between_interruptions"])
        share = 100 / plan["configuration"]["dollars"]
        assert f"ends the run after about {share:.0%} of its tokens" in text
    assert hours == pytest.approx([20, 5])
    plan, _ = planned([*flags, "--nodes", "4"], tmp_path, capsys)
    assert plan["intervals"][0]["hours_between_interruptions"] == pytest.approx(54 * 24 * 16384 / 419 / 32)


# ---------------------------------------------------------------- memory


def test_every_engine_kind_and_checkpointing_that_can_run_is_in_the_plan(tmp_path, capsys):
    """And no other: each is valid settings, with the batch unchanged."""
    plan, _ = planned(CLOUD, tmp_path, capsys)
    config = load(CLOUD[:2], world_size=None)
    seen = set()
    for row in plan["engines"]:
        engine = dataclasses.replace(
            config.engine, name=row["engine"], replicas=row["replicas"], parallel=ParallelConfig(**row["parallel"]),
            activation_checkpointing=row["activation_checkpointing"],
        )  # fmt: skip
        batch = dataclasses.replace(config.batch, micro_batch_size=row["micro_batch"])
        assert not validate(dataclasses.replace(config, engine=engine, batch=batch), 8)
        groups = 8 // (engine.parallel.tensor * engine.parallel.sequence)
        assert row["micro_batch"] * row["accumulation"] * groups == config.batch.global_batch_size
        kept = engine.activation_checkpointing
        seen |= {(engine.name, kind, getattr(engine.parallel, kind), kept) for kind in KINDS_OF[engine.name]}
    wanted = {
        (name, kind, degree, kept)
        for name, kinds in KINDS_OF.items() for kind in kinds if kind != "expert" for degree in (1, 2, 4, 8)
        for kept in ("none", "selective", "full") if (kind, degree) != ("tensor", 8)  # there are 4 key heads
    }  # fmt: skip
    assert wanted <= seen


def small_job(**model) -> Job:
    shape = resolve_model(ModelConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=704,
                                      tie_word_embeddings=False, **model), vocab_size=2048, sequence_length=512)  # fmt: skip
    return Job(shape, 512, 64)


def test_experts_are_shared_in_every_way_that_divides_them():
    job = small_job(moe=MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128))
    found = {
        (each.name, each.parallel.expert) for each in choices.engines(job, EngineConfig(precision="bf16"), Cluster(H100, 8))
    }
    assert {("ddp", degree) for degree in (1, 2, 4, 8)} | {("fsdp2", degree) for degree in (1, 2, 4, 8)} <= found
    assert all(degree == 1 for name, degree in found if name.startswith("zero"))


def test_no_engine_is_proposed_that_the_settings_refuse_with_the_optimizer():
    for optimizer in ("adamw", "muon"):
        job, allowed = small_job()._replace(optimizer=optimizer), set()
        for name in KINDS_OF:
            config = load([*SMALL, "--optimizer.name", optimizer, "--engine.name", "ddp"], world_size=None)
            config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, name=name))
            if not any(problem.key == "optimizer.name" for problem in validate(config)):
                allowed.add(name)
        proposed = {each.name for each in choices.engines(job, EngineConfig(precision="bf16"), Cluster(H100, 8))}
        assert proposed == allowed
        assert ("zero3" in proposed) == (optimizer == "adamw")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_the_largest_micro_batch_fits_and_twice_as_many_sequences_do_not(name):
    """By dry runs, on a device with little more memory than a rank needs beside its tensors."""
    job, engine = small_job(), EngineConfig(name=name, precision="bf16", compile="blocks")
    cluster = Cluster(dataclasses.replace(H100, memory_gib=3.6), 2)
    plan = choices.largest(job, engine, cluster)
    assert 1 < plan.micro_batch < 32
    flags = [*SMALL, "--engine.name", name, "--engine.compile", "blocks", "--engine.precision", "bf16"]
    config = dataclasses.replace(load(flags, world_size=None), model=job.model)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=job.length))
    for size, fits in ((plan.micro_batch, True), (2 * plan.micro_batch, False)):
        batch = dataclasses.replace(config.batch, global_batch_size=job.sequences, micro_batch_size=size)
        assert dry_run.dry_run(dataclasses.replace(config, batch=batch), job.model, cluster).fits is fits


@pytest.mark.slow
def test_states_of_the_formulas_are_those_of_the_dry_runs_to_the_byte(tmp_path, capsys):
    """Of the configuration and of the best way on these GPUs, with sizes that ranks do not divide, before any data exists."""
    flags = [*SMALL, "--gpus", "6", "--batch.global_batch_size", "48", "--engine.compile", "none"]
    for engine in ("ddp", "zero1", "zero2", "zero3", "fsdp2"):
        output = tmp_path / f"{engine}.json"
        wanted = [*flags, "--engine.name", engine, "--engine.activation_checkpointing", "full", "--json", str(output)]
        assert plan_run.main(wanted) == 0
        plan = json.loads(output.read_text())
        assert [row["name"] for row in plan["exact"]] == ["as configured", "best on these GPUs"]
        keys = ("plan", "micro_batch", "activation_checkpointing")
        formulas = {tuple(row[key] for key in keys): row for row in [*plan["engines"], plan["configuration"]]}
        for row in plan["exact"]:
            formula = formulas[tuple(row[key] for key in keys)]["memory"]
            for kind, size in row["state_bytes"].items():
                assert formula[kind] == size, (engine, row["name"], kind)
    assert "best on these GPUs" in capsys.readouterr().out


# ---------------------------------------------------------------- table, JSON, picture


def test_the_table_has_the_figures_of_the_json_and_fits_a_terminal(tmp_path, capsys):
    flags = [
        *CLOUD,
        "--dollars-per-hour",
        "2.5",
        "--compare",
        "a100=1.29",
        "--spot-discount",
        "0.6",
        "--preemptions-per-hour",
        "0.05",
    ]
    plan, text = planned([*flags, "--preemptions-per-hour", "0.05"], tmp_path, capsys)
    assert text.splitlines() == list(plan_table.lines(plan))  # nothing in the table is not in the JSON
    assert max(map(len, text.splitlines())) <= 120
    here, gib = plan["configuration"], 2**30
    assert plan["model"]["parameters"] == 1_100_048_384
    assert plan["run"]["tokens"] == 41_962 * 524_288
    (row,) = [line for line in text.splitlines() if line.startswith("fsdp2 +full")]
    (same,) = [each for each in plan["engines"] if (each["plan"], each["activation_checkpointing"]) == ("fsdp2", "full")]
    held = [
        same["memory"][key] / gib for key in ("weights", "gradients", "moments", "activations", "logits", "block", "buffers")
    ]
    shown = [f"{same['micro_batch']}", "x", f"{same['accumulation']}", *(f"{each:.1f}" for each in held)]
    assert row.split()[2:12] == shown
    assert row.split()[-1] == f"{same['dollars']:,.0f}"
    assert f"${here['dollars']:,.2f} = {here['gpu_hours']:,.1f} GPU-hours x $2.5" in text
    assert f"MFU {here['mfu']:.1%} (estimated)" in text
    for found in plan["intervals"]:
        assert f"{found['recommended_minutes']:g} min ({found['market']}" in text
    assert sum(line.endswith("(as configured)") for line in text.splitlines()) == 1


def test_every_kind_of_gpu_that_is_asked_for_is_in_the_table_and_on_both_markets(tmp_path, capsys):
    spot = ["--spot-discount", "0.6", "--preemptions-per-hour", "0.05"]
    flags = [*CLOUD, "--gpu", "a100", "--dollars-per-hour", "1.29", "--compare", "h200=9", "h100=2.5", *spot]
    plan, text = planned(flags, tmp_path, capsys)
    shown = text.partition("cheapest first")[2]
    for kind in ("A100", "H100", "H200"):
        for market in ("spot", "on demand"):
            assert re.search(rf" x {kind}, {market} ", shown), shown
    prices = {(row["gpu"], row["market"]): row["dollars_per_hour"] for row in plan["choices"]}
    assert prices["H100", "spot"] == pytest.approx(0.4 * prices["H100", "on demand"]) == pytest.approx(1.0)


def test_the_flags_of_an_alternative_give_the_alternative(tmp_path, capsys):
    """Adding them to the command makes its plan the configuration."""
    flags = ["--config", str(ROOT / "configs" / "cloud_zero3.yaml"), "--quick", "--dollars-per-hour", "2"]
    flags += ["--batch.micro_batch_size", "1"]
    plan, _ = planned(flags, tmp_path, capsys)
    best = next(row for row in plan["choices"] if row["gpus"] == 8 and not row["configured"])
    assert best["dollars"] < plan["configuration"]["dollars"]
    words = [word for flag in best["flags"] for word in flag.split(" ", 1)]
    assert "--batch.micro_batch_size" in words
    then, _ = planned([*flags, *words], tmp_path, capsys)
    assert then["configuration"]["plan"] == best["plan"]
    assert then["configuration"]["dollars"] == pytest.approx(best["dollars"], rel=1e-3)
    assert then["configuration"]["memory"]["needed_gib"] == best["needed_gib"]


def test_what_does_not_fit_ends_with_status_2_and_the_flags_that_fit(tmp_path, capsys):
    output = tmp_path / "plan.json"
    flags = ["--config", str(ROOT / "configs" / "cloud_zero3.yaml"), "--quick", "--json", str(output)]
    assert plan_run.main([*flags, "--engine.name", "ddp", "--batch.micro_batch_size", "8"]) == 2
    plan = json.loads(output.read_text())
    assert not plan["configuration"]["memory"]["fits"]
    assert any(row["fits"] and row["gpus"] == 8 and "--engine.name" in " ".join(row["flags"]) for row in plan["choices"])


def test_a_model_that_fits_on_no_such_number_of_gpus_gets_a_number_on_which_it_fits(tmp_path):
    flags = [*CLOUD, "--config", str(ROOT / "configs" / "models" / "llama3_1_70b.yaml"), "--gpus", "1"]
    assert plan_run.main([*flags, "--json", str(tmp_path / "plan.json")]) == 2
    plan = json.loads((tmp_path / "plan.json").read_text())
    (found,) = [row for row in plan["choices"] if row["fits"]]
    weights_and_moments = 16 * plan["model"]["parameters"] / 2**30  # with their gradients
    assert weights_and_moments / 80 < found["gpus"] <= 32


def test_the_price_of_the_command_line_is_that_of_the_budget(tmp_path, capsys):
    _, text = planned([*CLOUD, "--dollars-per-hour", "2.5", "--run.budget_dollars", "100"], tmp_path, capsys)
    assert re.search(r"^budget +~ \$100.00: ends the run after about \d\d% of its tokens", text, re.MULTILINE)


def test_a_run_that_interruptions_never_let_end_is_told_so(tmp_path, capsys):
    plan, text = planned([*CLOUD, "--dollars-per-hour", "2", "--preemptions-per-hour", "5", "--checkpoint.every_minutes", "0"],
                         tmp_path, capsys)  # fmt: skip
    assert plan["configuration"]["dollars"] is None
    assert "save more often" in text
    assert plan["intervals"][0]["recommended_minutes"] < 2


def test_the_picture_shows_the_limit_and_every_engine(tmp_path):
    from matplotlib.image import imread

    picture = tmp_path / "plan.png"
    assert plan_run.main([*CLOUD, "--plot", str(picture)]) == 0
    pixels = (imread(picture)[..., :3] * 255).round().astype(int)
    limit = (np.abs(pixels - (0xC0, 0, 0)).sum(-1) < 30).sum(0)
    assert limit.max() > 0.7 * pixels.shape[0]  # a line from top to bottom
    for color in ("0072B2", "D55E00", "009E73", "CC79A7", "E69F00"):
        wanted = [int(color[i : i + 2], 16) for i in (0, 2, 4)]
        assert (np.abs(pixels - wanted).sum(-1) < 12).sum() > 200, color


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--gpu", "h1000"], "--gpu"),
        (["--gpus", "0"], "--gpus"),
        (["--gpus", "8", "--nodes", "1"], "--nodes"),
        (["--dollars-per-hour", "-1"], "--dollars-per-hour"),
        (["--dollars-per-hour", "cheap"], "--dollars-per-hour"),
        (["--mfu", "40"], "--mfu"),
        (["--mfu", "nan"], "--mfu"),
        (["--mfu", "0.4", "--run", "runs/none"], "--run"),
        (["--spot-discount", "0.6", "--dollars-per-hour", "2"], "--preemptions-per-hour"),
        (["--compare", "a100"], "--compare"),
        (["--compare", "b100=1.29", "--dollars-per-hour", "2"], "--compare"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_flag_is_one_error_that_names_it(flags, named, capsys):
    with pytest.raises(SystemExit) as end:
        plan_run.main([*CLOUD, *flags])
    assert end.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_settings_that_cannot_run_on_these_gpus_and_runs_without_records_are_refused(tmp_path):
    with pytest.raises(ConfigError) as refused:
        plan_run.main([*CLOUD, "--gpus", "7"])
    assert [problem.key for problem in refused.value.problems] == ["batch.global_batch_size"]
    with pytest.raises(UserError, match="--mfu"):
        plan_run.main([*CLOUD, "--run", str(tmp_path)])
    with pytest.raises(UserError, match="--dollars-per-hour"):
        plan_run.main([*CLOUD, "--compare", "a100=1.29"])
    with pytest.raises(UserError):
        plan_run.main([*CLOUD, "--train.max_tokens", "null", "--train.epochs", "1"])  # of data that does not exist


def test_a_run_on_such_a_gpu_corrects_speed_and_memory(tmp_path, capsys):
    """plan.json as a run writes it; one of another GPU is refused."""
    record = {
        "plan_ratio_tokens_per_second": 0.8,
        "plan_ratio_peak_memory": 1.1,
        "settings": {"device": "NVIDIA H100 80GB HBM3"},
    }
    run = tmp_path / "run"
    run.mkdir()
    (run / "plan.json").write_text(json.dumps(record))
    before, _ = planned([*CLOUD], tmp_path, capsys)
    plan, text = planned([*CLOUD, "--run", str(run)], tmp_path, capsys)
    assert plan["configuration"]["mfu"] == pytest.approx(0.8 * before["configuration"]["mfu"])
    assert plan["configuration"]["hours"]["training"] == pytest.approx(before["configuration"]["hours"]["training"] / 0.8)
    needed = [each["configuration"]["memory"]["needed_gib"] - OUTSIDE_GIB for each in (before, plan)]
    assert needed[1] == pytest.approx(1.1 * needed[0])
    assert plan["choices"][0]["mfu"] < before["choices"][0]["mfu"]
    assert "measured in" in text and "memory x 1.10" in text
    with pytest.raises(UserError, match="H100"):
        plan_run.main([*CLOUD, "--gpu", "a100", "--run", str(run)])


def test_stages_count_with_their_own_lengths(tmp_path, capsys):
    """By hand: 10 steps of 256 x 2,048 tokens, then 20 of 64 x 8,192."""
    stage = "[{after_steps: 10, sequence_length: 8192, global_batch_size: 64, micro_batch_size: 4}]"
    flags = [
        *CLOUD,
        "--train.max_tokens",
        "null",
        "--train.max_steps",
        "30",
        "--train.stages",
        stage,
        "--schedule.warmup_steps",
        "1",
    ]
    plan, _ = planned(flags, tmp_path, capsys)
    assert plan["run"]["tokens"] == 30 * 524_288
    config = load(CLOUD[:2], world_size=None)
    model = resolve_model(config.model, vocab_size=32000, sequence_length=8192)
    from pretrain.model.flops import flops_per_token

    wanted = 524_288 * (10 * flops_per_token(model, 2048) + 20 * flops_per_token(model, 8192))
    assert plan["run"]["flops"] == pytest.approx(wanted)


def test_the_readme_shows_what_the_tool_prints(capsys):
    """An excerpt: `...` stands for lines that it leaves out."""
    blocks = re.findall(r"```(?:bash|console)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    place = next(i for i, block in enumerate(blocks) if block.startswith("Plan for"))
    command = shlex.split(blocks[place - 1])
    assert command[1] == "tools/plan_run.py"
    flags = [str(ROOT / word) if word.startswith("configs/") else word for word in command[2:]]
    assert plan_run.main([*flags, "--quick"]) == 0
    printed = iter(capsys.readouterr().out.splitlines())
    for line in blocks[place].splitlines():
        assert line == "..." or line in printed, line  # in this order
