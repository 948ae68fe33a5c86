"""Comparing two runs names the one hidden difference, and reports equal runs as equal."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain import train as training
from pretrain.config import load
from pretrain.doctor.compare_runs import CompareError, Difference, Parting, differences, parting, read_run, verdict
from pretrain.run.length import Length
from tests.ranks import run_ranks
from tests.test_indexed import write, write_megatron
from tools import compare_runs as tool

TINY = """
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, vocab_size: 64}
data: {sequence_length: 32}
batch: {global_batch_size: 16, micro_batch_size: 4}
optimizer: {lr: 1e-2}
schedule: {name: cosine, warmup_steps: 5}
train: {max_steps: 40}
log: {every_steps: 1, sinks: [jsonl]}
"""


class Pairs:
    """Runs of one tiny configuration, each trained once, named after the difference."""

    def __init__(self, folder: Path):
        self.folder = folder
        generator = np.random.default_rng(0)
        self.documents = [
            np.append((generator.integers(60) + np.arange(n)) % 60 + 3, 2) for n in generator.integers(20, 90, 500)
        ]
        write(folder / "text", self.documents, vocab_size=64)
        (folder / "tiny.yaml").write_text(TINY)

    def argv(self, name: str, *more: str) -> list[str]:
        about = ["--config", str(self.folder / "tiny.yaml"), "--run.directory", str(self.folder / "runs"), "--run.name", name]
        return [*about, "--data.train", f"[{{path: {self.folder / 'text'}}}]", *more]

    def run(self, name: str, *more: str, ranks: int = 1) -> Path:
        if not (self.folder / "runs" / name).exists():
            flags = self.argv(name, *more)
            assert set(run_ranks(ranks, train_here, flags) if ranks > 1 else [train_here(flags)]) == {0}
        return self.folder / "runs" / name


def train_here(flags: list[str]) -> int:
    return training.train(load(flags, world_size=int(os.environ.get("WORLD_SIZE", 1))))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Pairs:
    return Pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def base(pairs):
    return tool.read(pairs.run("base"))


@pytest.fixture
def again(base):
    """A repetition of `base`, which a test may change."""
    run = copy.copy(base)
    run.name, run.environment = "again", json.loads(json.dumps(base.environment))
    return run


def compared(a, b) -> tuple[list[Difference], Parting, str]:
    found = differences(a, b)
    where = parting(a, b, found)
    return found, where, verdict(a, b, found, where)


def bending(found: list[Difference]) -> list[str]:
    return [each.what for each in found if each.bends]


# ---------------------------------------------------------------- pairs with one hidden difference


def test_a_learning_rate_that_is_stepped_twice_per_update_is_named(pairs, base):
    """A scheduler does this if each of two processes steps it."""
    with pytest.MonkeyPatch.context() as patch:
        rate = Length.lr
        patch.setattr(Length, "lr", lambda length, step: rate(length, min(40, 2 * step)))
        assert train_here(pairs.argv("stepped")) == 0
    found, where, words = compared(base, tool.read(pairs.folder / "runs" / "stepped"))
    assert bending(found) == ["learning-rate"]
    assert "stepped does not follow its own schedule" in found[0].text and "2 times per update" in found[0].text
    assert where.step == 2 and where.equal_to == 1  # the first update starts from the same weights
    assert "learning-rate" in words


def test_data_without_ends_of_documents_is_named(pairs, monkeypatch):
    write_megatron(pairs.folder / "endless", [document[:-1] for document in pairs.documents])
    write_megatron(pairs.folder / "ended", pairs.documents)
    monkeypatch.setattr(tool, "end_of_document", lambda config: 2)  # these runs have no tokenizer
    a, b = (tool.read(pairs.run(name, "--data.train", f"[{{path: {pairs.folder / name}}}]")) for name in ("ended", "endless"))
    found, where, _ = compared(a, b)
    assert bending(found) == ["end-of-document"]
    assert "once in" in found[0].text and found[0].text.endswith(" and never")
    assert where.step is None  # 40 steps are too few for visible harm


def other_order(pairs: Pairs) -> tuple[str, ...]:
    write(pairs.folder / "unshuffled", pairs.documents[::-1], vocab_size=64, shuffled=False)
    return "--data.train", f"[{{path: {pairs.folder / 'unshuffled'}}}]"


def other_tokenizer(pairs: Pairs) -> tuple[str, ...]:
    about = dict(vocab_size=64, fingerprint="another", tokenizer_path="tokenizers/other")
    write(pairs.folder / "other", pairs.documents[::-1], **about)
    return "--data.train", f"[{{path: {pairs.folder / 'other'}}}]"


HIDDEN: list[tuple[str, Callable[[Pairs], tuple[str, ...]], list[str], str]] = [
    ("unshuffled", other_order, ["shuffled"], "shuffled"),
    ("other", other_tokenizer, ["tokenizer"], "tokenizers/test (64 ids) and tokenizers/other (64 ids)"),
    ("batch", lambda _: ("--batch.global_batch_size", "32"), ["batch", "learning-rate"], "16 x 32 = 512 and 32 x 32 = 1,024"),
    ("seed", lambda _: ("--run.seed", "7"), ["seed"], "run.seed is 1234 and 7"),
    ("decay", lambda _: ("--optimizer.weight_decay", "0"), ["optimizer.weight_decay"], "is 0.1 and 0.0"),
    ("warmup", lambda _: ("--schedule.warmup_steps", "20"), ["learning-rate"], "at 512 tokens 0.002 in base and 0.0005"),
]


@pytest.mark.parametrize(("name", "plant", "named", "figures"), HIDDEN, ids=[each[0] for each in HIDDEN])
def test_the_hidden_difference_is_named(pairs, base, name, plant, named, figures):
    found, where, words = compared(base, tool.read(pairs.run(name, *plant(pairs))))
    assert bending(found) == named, found
    assert figures in words, words
    # Other samples of the same text: the curves agree except for their scatter.
    assert (where.step is None) == (name in ("unshuffled", "other", "seed")), words


# ---------------------------------------------------------------- harmless differences


def test_a_repetition_is_equal_to_the_last_bit(pairs, base):
    found, where, words = compared(base, tool.read(pairs.run("again")))
    assert bending(found) == [] and where.step is None and where.equal_to == 40
    assert words.startswith("base and again agree over 40 common lines")


@pytest.mark.parametrize(
    ("name", "flags", "ranks"),
    [
        ("two_ranks", (), 2),
        ("micro_batch", ("--batch.micro_batch_size", "1"), 1),
        pytest.param("zero2", ("--engine.name", "zero2"), 2, marks=pytest.mark.slow),
    ],
)
def test_settings_that_only_change_rounding_do_not_bend_the_curve(pairs, base, name, flags, ranks):
    found, where, _ = compared(base, tool.read(pairs.run(name, *flags, ranks=ranks)))
    assert bending(found) == [] and found and where.step is None, where


def test_the_noise_of_a_twin_is_the_bound(base, again):
    twin = copy.copy(again)
    again.loss = base.loss.copy()
    again.loss[20:] += 1e-9
    assert parting(base, again, []).step is None
    assert parting(base, again, [], twin).step == 21


def test_curves_that_part_without_a_recorded_reason_make_the_code_suspect(base, again):
    again.loss = base.loss + np.where(base.steps > 30, 0.01, 0)
    again.start["git"] = {"commit": "f" * 40, "dirty": False}
    found, where, words = compared(base, again)
    assert where.step == 31 and bending(found) == [] and "Suspect code (" in words


def test_curves_do_not_part_at_a_single_line_that_stands_out(base, again):
    again.loss = base.loss + np.where(base.steps == 10, 0.5, 0)
    assert parting(base, again, []).step is None


def test_curves_of_other_samples_part_only_beyond_their_scatter(base, again):
    found, generator = [Difference("seed", "", True)], np.random.default_rng(0)
    base.loss = 3 + generator.normal(0, 0.05, 40)
    again.loss = 3 + generator.normal(0, 0.05, 40)
    assert parting(base, again, found).step is None
    again.loss += np.where(again.steps > 20, 0.5, 0)
    assert parting(base, again, found).step == 21


# ---------------------------------------------------------------- folders and the command


def test_folders_are_read_as_plain_data_without_the_program_that_trained(pairs, base):
    """As a program without these settings would: no learning rates from a schedule, and no look into token files."""
    folder = pairs.run("warmup", *HIDDEN[-1][1](pairs))
    a, b = read_run(pairs.run("base")), read_run(folder)
    assert bending(differences(a, b)) == ["learning-rate"] and parting(a, b, []).step is not None
    assert a.settings == base.settings and a.sources[0]["vocab_size"] == 64


def test_folders_without_a_comparable_run_are_refused(pairs, tmp_path):
    with pytest.raises(CompareError, match="not the folder of a run"):
        read_run(tmp_path)
    shutil.copytree(pairs.run("base"), tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(CompareError):
        read_run(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("[unclosed")
    with pytest.raises(CompareError):
        read_run(tmp_path / "run")


def test_the_command_prints_and_writes_the_differences(pairs, tmp_path, capsys):
    a, b = pairs.run("base"), pairs.run("seed", "--run.seed", "7")
    tool.main([str(a), str(b), "--twin", str(a), "--json", str(tmp_path / "d.json")])
    assert "seed: run.seed is 1234 and 7" in capsys.readouterr().out
    assert json.loads((tmp_path / "d.json").read_text())["differences"][0]["what"] == "seed"
