"""Tasks made from code have right answers that stand in the validation text, cost little, and are the same each time."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from pathlib import Path

import pytest

from pretrain.config import load
from pretrain.data import tokenizer_training
from pretrain.data.indexed import DataError
from pretrain.data.tasks import open_tasks
from pretrain.data.tokenizer import Tokenizer
from pretrain.tasks import layout
from tests.models import write_token_file
from tools import make_tasks, tokenize_corpus, train_tokenizer

ROOT = Path(__file__).parents[1]
NAMES = {"next_line", "indentation", "bracket", "keyword", "name", "docstring"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Token files of some modules, one of them not Python, with their tokenizer."""
    import argparse
    import cmd
    import csv
    import heapq
    import textwrap

    made = tmp_path_factory.mktemp("code")
    texts = [inspect.getsource(module) for module in (argparse, cmd, csv, heapq, textwrap)]
    tokenizer_training.train(texts[:2], made / "tokenizer", vocab_size=600, describe=dict)
    write_token_file(made / "tokenizer", [*texts, "for ever and ever: (this is no code]"], made / "valid")
    write_token_file(made / "tokenizer", ["def f(x):\n    return x\n"] * 3, made / "few")
    (made / "text").write_text("\n\n".join(texts))
    return made


def make(folder: Path, output: Path, *words: str) -> dict[str, list[dict]]:
    common = ["--tokenizer", str(folder / "tokenizer"), "--output", str(output), *words]
    make_tasks.main(["--data", str(folder / "valid"), *common])
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in output.glob("*.jsonl")}


def test_right_answers_stand_in_the_text_and_cannot_be_guessed_by_their_frequency(folder, tmp_path):
    made, text = make(folder, tmp_path / "tasks", "--items", "24"), (folder / "text").read_text()
    assert made.keys() == NAMES and all(len(items) == 24 for items in made.values())
    for name, items in made.items():
        assert len({json.dumps(item) for item in items}) == len(items), "items are repeated"
        for item in items:
            right = make_tasks.pairs(item)[item.get("answer", 0)]
            pieces = right[0].split("\n") + [right[1]] if name == "docstring" else ["".join(right)]
            assert all(piece.strip('" ') in text for piece in pieces), item
            assert len(right[0]) <= make_tasks.CONTEXT + 8
            if name in ("next_line", "indentation"):
                assert not any("".join(pair) in text for i, pair in enumerate(make_tasks.pairs(item)) if i != item["answer"])
    brackets = Counter(item["choices"][item["answer"]] for item in made["bracket"])
    assert brackets == {")": 12, "]": 12}
    assert max(Counter(item["choices"][item["answer"]] for item in made["keyword"]).values()) <= 24 // 3
    for name in NAMES - {"bracket", "name"}:
        assert max(Counter(item["answer"] for item in made[name]).values()) <= 18, name
    tokenizer = Tokenizer.load(folder / "tokenizer")
    assert [len(task.items) for task in open_tasks([str(tmp_path / "tasks")], tokenizer, 256, 600)] == [24] * 6


def test_the_same_seed_gives_the_same_files_and_another_one_others(folder, tmp_path):
    one, two, other = (make(folder, tmp_path / each, "--seed", each[0], "--items", "24") for each in ("1a", "1b", "2"))
    assert one == two
    assert all(one[name] != other[name] for name in NAMES)


def test_too_little_code_and_another_tokenizer_are_refused(folder, tmp_path):
    common = ["--output", str(tmp_path / "tasks")]
    with pytest.raises(DataError, match="few"):
        make_tasks.main(["--data", str(folder / "few"), "--tokenizer", str(folder / "tokenizer"), *common])
    tokenizer_training.train(["the quick brown fox"], tmp_path / "other", vocab_size=300, describe=dict)
    with pytest.raises(DataError, match="tokenizer"):
        make_tasks.main(["--data", str(folder / "valid"), "--tokenizer", str(tmp_path / "other"), *common])
    assert not (tmp_path / "tasks").exists()


@pytest.mark.slow
def test_the_tasks_of_the_quick_start_cost_less_than_one_percent_of_its_steps(tmp_path):
    """Tokens of forward passes, padding included, each a third of what a token costs in training."""
    config = load(["--config", str(ROOT / "configs" / "quickstart.yaml")], world_size=None)
    folder, tokenizer = tmp_path, str(tmp_path / "tokenizer")
    train_tokenizer.main(["--input", "stdlib", "--output", tokenizer, "--vocab-size", "4096"])
    tokenize_corpus.main(["--input", "stdlib", "--tokenizer", tokenizer, "--output", str(folder / "stdlib"),
                          "--valid-fraction", "0.02"])  # fmt: skip
    (folder / "stdlib_valid.idx").rename(folder / "valid.idx")
    for end in ("bin", "json"):
        (folder / f"stdlib_valid.{end}").rename(folder / f"valid.{end}")
    assert make(folder, folder / "tasks").keys() == NAMES
    tasks = open_tasks([str(folder / "tasks")], Tokenizer.load(tokenizer), config.data.sequence_length, 4096)
    lengths = [len(sequence.tokens) - 1 for task in tasks for item in task.items for sequence in item.sequences]
    batch, length = config.batch, config.data.sequence_length
    for ranks in (1, 2):
        plan = layout(lengths, batch.micro_batch_size * length, ranks)
        per_step = plan.tokens / 3 / config.evaluate.every_steps
        assert per_step < 0.01 * batch.global_batch_size * length
