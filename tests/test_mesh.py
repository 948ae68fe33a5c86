"""The mesh: which rank has what, what a run reports about it, and groups of ranks that span nodes."""

from __future__ import annotations

import itertools
import os
import re
import runpy
from pathlib import Path

import pytest

from pretrain.config import EngineConfig, ParallelConfig, batch_product, load, work_of
from pretrain.data.batches import TrainData
from pretrain.engines.config import fewest_ranks, sample_ranks, slow_links
from pretrain.engines.mesh import Mesh
from pretrain.report import environment
from tests.models import train_here
from tests.ranks import run_ranks
from tests.test_train import records

ROOT = Path(__file__).parents[1]
TINY = ["--model.vocab_size", "64", "--model.hidden_size", "32", "--model.num_hidden_layers", "1"]
TINY += ["--model.num_attention_heads", "4", "--data.synthetic.kind", "markov", "--data.sequence_length", "32"]
TINY += ["--batch.global_batch_size", "8", "--batch.micro_batch_size", "2", "--train.max_steps", "2"]


def engine_of(**parallel: int) -> EngineConfig:
    return EngineConfig(name="fsdp2", replicas=parallel.pop("replicas", 1), parallel=ParallelConfig(**parallel))


@pytest.mark.parametrize(
    ("parallel", "ranks"),
    [({}, 3), (dict(tensor=2), 4), (dict(sequence=3), 6), (dict(tensor=2, sequence=2, replicas=2), 16), (dict(expert=4), 8)],
)
def test_every_rank_has_its_place_in_the_grid(parallel, ranks):
    """Ranks count through replicas, shards, sequence and tensor as digits do, the last one fastest."""
    engine = engine_of(**parallel)
    tensor, sequence = engine.parallel.tensor, engine.parallel.sequence
    groups = ranks // (tensor * sequence)
    meshes = [Mesh(engine, rank, ranks) for rank in range(ranks)]
    places = [(mesh.sample_rank, mesh.sequence_rank, mesh.tensor_rank) for mesh in meshes]
    assert places == list(itertools.product(range(groups), range(sequence), range(tensor)))
    assert {mesh.sample_ranks for mesh in meshes} == {sample_ranks(engine, ranks)} == {groups}
    assert [mesh.expert_rank for mesh in meshes] == [rank % engine.parallel.expert for rank in range(ranks)]


def test_the_mesh_is_shown_as_a_product_whose_factors_multiply_to_the_number_of_ranks():
    assert str(Mesh(engine_of(tensor=2, sequence=2), 0, 8)) == "8 ranks = 2 shards x 2 sequence x 2 tensor"
    assert str(Mesh(engine_of(replicas=2, expert=4), 0, 8)) == "8 ranks = 2 replicas x 4 shards; experts over 4"
    assert str(Mesh(EngineConfig(), 0, 1)) == "1 rank = 1"
    assert fewest_ranks(engine_of(replicas=2, tensor=2, expert=3)) == 12
    assert fewest_ranks(engine_of(replicas=2, expert=2)) == 4


def test_the_batch_is_shown_as_a_product():
    config = load([*TINY, "--engine.parallel.sequence", "2"], world_size=4)
    assert batch_product(config, 4) == "8 sequences per step = groups 2 (of 2 ranks) x micro-batch 2 x accumulation 2"
    assert batch_product(load(TINY, world_size=4), 4) == "8 sequences per step = ranks 4 x micro-batch 2 x accumulation 1"


# ---------------------------------------------------------------- the slow link


@pytest.mark.parametrize(
    ("parallel", "ranks", "per_node", "slow"),
    [
        (dict(tensor=4), 16, 8, []),
        (dict(tensor=2, sequence=4, expert=8), 16, 8, []),
        (dict(tensor=4), 8, 2, ["tensor"]),
        (dict(sequence=4), 8, 2, ["sequence"]),
        (dict(tensor=2, sequence=4), 16, 4, ["sequence"]),  # a group of 4 takes every second of 8 ranks
        (dict(expert=8), 8, 4, ["expert"]),
        (dict(tensor=4, sequence=2), 24, 3, ["tensor", "sequence"]),  # no group would fit evenly
        (dict(tensor=2), 12, 6, []),
    ],
)
def test_groups_that_span_nodes_are_named_with_degrees_that_do_not(parallel, ranks, per_node, slow):
    flags = ["--model.moe.num_experts", "8", "--model.num_attention_heads", "8", "--model.num_key_value_heads", "8"]
    flags += [word for kind, degree in parallel.items() for word in (f"--engine.parallel.{kind}", str(degree))]
    flags = [*TINY, *flags, "--batch.global_batch_size", "48", "--batch.micro_batch_size", "1"]
    config = load(flags, world_size=ranks)
    problems = list(slow_links(config.engine, work_of(config, config.model), ranks, per_node))
    assert [problem.key.rpartition(".")[2] for problem in problems] == slow
    for problem in problems:
        advice = problem.message.partition("; the nearest within a node: ")[2].split()
        config = load([*flags, *advice], world_size=ranks)
        assert advice and not list(slow_links(config.engine, work_of(config, config.model), ranks, per_node))


def test_a_dry_run_warns_of_groups_that_span_nodes_of_8_gpus(capsys):
    flags = [*TINY, "--model.moe.num_experts", "16", "--engine.parallel.expert", "16", "--batch.global_batch_size", "32"]
    tool = runpy.run_path(str(ROOT / "tools" / "check_run.py"))
    tool["main"](["--device", "h100", "--ranks", "16", *flags, "--engine.precision", "bf16", "--engine.compile", "none"])
    assert "warn  slow-link: engine.parallel.expert: got 16" in capsys.readouterr().out


# ---------------------------------------------------------------- a run


def train_on_small_nodes(argv: list[str], per_node: int, reads: Path) -> int:
    """A run whose launcher says that so many ranks share a machine. Notes the positions that this rank reads."""
    rank, take = int(os.environ["RANK"]), TrainData.take
    os.environ |= {"LOCAL_WORLD_SIZE": str(per_node), "LOCAL_RANK": str(rank % per_node)}

    def noted(data: TrainData, position: int, count: int):
        with open(reads / str(rank), "a") as file:
            file.write(f"positions {position} to {position + count - 1}\n")
        return take(data, position, count)

    TrainData.take = noted
    return train_here(argv)


@pytest.mark.parametrize(
    ("kind", "ranks", "product", "batch"),
    [
        ("tensor", 2, "2 ranks = 2 tensor", "groups 1 (of 2 ranks) x micro-batch 2 x accumulation 4"),
        pytest.param(
            "sequence", 4, "4 ranks = 2 shards x 2 sequence", "groups 2 (of 2 ranks) x micro-batch 2 x accumulation 2",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_a_run_reports_its_mesh_and_the_slow_link_and_inspect_data_knows_what_each_rank_read(
    tmp_path, capsys, kind, ranks, product, batch
):
    flags = [*TINY, "--run.name", "run", "--run.directory", str(tmp_path), f"--engine.parallel.{kind}", "2"]
    flags += ["--engine.precision", "fp32", "--log.sinks", "[jsonl]"]
    (tmp_path / "reads").mkdir()
    assert run_ranks(ranks, train_on_small_nodes, flags, 1, tmp_path / "reads") == [0] * ranks
    console = (tmp_path / "run" / "console.log").read_text()
    assert f"mesh       {product}\n" in console and f"8 sequences per step = {batch}" in console
    [warning] = re.findall(rf"warning    slow-link: engine.parallel.{kind}: .*", console)
    assert warning.endswith(f"--engine.parallel.{kind} 1")
    sizes = {"replicas": 1, "shards": 1, "sequence": 1, "tensor": 1, "expert": 1} | {"shards": ranks // 2, kind: 2}
    assert records(tmp_path / "run")[0]["mesh"] == environment.read(tmp_path / "run")["starts"][0]["mesh"] == sizes
    tool = runpy.run_path(str(ROOT / "tools" / "inspect_data.py"))
    for rank in range(ranks):
        tool["main"](["--run", str(tmp_path / "run"), "--step", "2", "--rank", str(rank)])
        first = capsys.readouterr().out.splitlines()[0]
        assert first.partition(": ")[2] in (tmp_path / "reads" / str(rank)).read_text().splitlines()
