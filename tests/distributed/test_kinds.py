"""The table of docs/engines.md that says which engine has which kind of parallelism: what it promises equals one process, and
everything else is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from pretrain.config import ConfigError, Problem, load
from tests.distributed.test_parallel import Row, check, row

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).resolve().parents[2]
KINDS = ("tensor", "sequence", "expert")


def table() -> dict[tuple[str, tuple[str, ...]], bool]:
    """(engine, kinds) -> whether the document promises this combination."""
    text = (ROOT / "docs" / "engines.md").read_text().split("<!-- kinds of parallelism -->")[1].split("<!-- end -->")[0]
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]
    columns = [KINDS if name == "all three" else tuple(name.split(" + ")) for name in head[1:]]
    return {
        (line[0], kinds): {"yes": True, "no": False}[cell]
        for line in lines
        for kinds, cell in zip(columns, line[1:], strict=True)
    }


TABLE = table()
CUT = [pair for pair, able in TABLE.items() if able]


def rows(pairs: list[tuple[str, tuple[str, ...]]]) -> dict[str, Row]:
    """A row for each (engine, kinds)."""
    shared = dict(num_shared_experts=1)
    return {f"{name} {' + '.join(kinds)}": row(name, dict.fromkeys(kinds, 2), moe=shared) for name, kinds in pairs}


def test_each_kind_that_the_table_promises_equals_one_process(subtests):
    check(subtests, 2, rows([(name, kinds) for name, kinds in CUT if len(kinds) == 1 and not name.startswith("zero")]))


@pytest.mark.slow
def test_each_combination_that_the_table_promises_equals_one_process(subtests):
    check(subtests, 2, rows([(name, kinds) for name, kinds in CUT if len(kinds) == 1 and name.startswith("zero")]))
    check(subtests, 4, rows(CUT))


def problems_of(argv: list[str], world_size: int) -> list[Problem]:
    try:
        load(argv, world_size=world_size)
    except ConfigError as error:
        return error.problems
    return []


def test_every_combination_is_in_the_table_and_those_without_promise_are_refused_with_one_that_works():
    names = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
    combinations = [kinds for number in (1, 2, 3) for kinds in itertools.combinations(KINDS, number)]
    assert sorted(TABLE) == sorted(itertools.product(names, combinations))
    base = ["--model.vocab_size", "128", "--data.synthetic.kind", "uniform", "--train.max_steps", "1"]
    base += ["--model.moe.num_experts", "4"]
    for (name, kinds), able in TABLE.items():
        flags = ["--engine.name", name, *(word for kind in kinds for word in (f"--engine.parallel.{kind}", "2"))]
        problems = problems_of([*base, *flags], world_size=4)
        refused = {problem.key.rpartition(".")[2] for problem in problems}
        assert refused == (set() if able else {kind for kind in kinds if not TABLE[name, (kind,)]}), (name, kinds)
        for problem in problems:
            advice = problem.message.partition("; the nearest that works: ")[2].split()
            assert advice and load([*base, *flags, *advice], world_size=4)
