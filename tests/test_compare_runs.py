"""The one hidden difference of two runs is named, and runs that are the same are left in peace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain import train as training
from pretrain.config import load
from pretrain.doctor import compare_runs
from pretrain.doctor.compare_runs import CompareError, differences, parting, read_side, verdict
from pretrain.optim.schedule import lr_at
from tests.ranks import run_ranks
from tests.test_indexed import write, write_megatron

ROOT = Path(__file__).resolve().parents[1]
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
    """Runs of one tiny configuration, each trained once, under the name of what is different in it."""

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


def compared(pairs: Pairs, name: str, *more: str, **options) -> tuple[list[compare_runs.Difference], compare_runs.Parting, str]:
    a, b = read_side(pairs.run("base")), read_side(pairs.run(name, *more, **options))
    found = differences(a, b)
    where = parting(a, b, found)
    return found, where, verdict(a, b, found, where)


def bending(found: list[compare_runs.Difference]) -> list[str]:
    return [each.what for each in found if each.bends]


# ---------------------------------------------------------------- pairs with one hidden difference


def scheduler_stepped_twice(pairs: Pairs) -> Path:
    """What a scheduler does that is stepped once for each of two processes."""
    if not (pairs.folder / "runs" / "stepped").exists():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "lr_at", lambda step, *rest: lr_at(min(40, 2 * step), *rest))
            assert train_here(pairs.argv("stepped")) == 0
    return pairs.folder / "runs" / "stepped"


def test_a_learning_rate_that_is_stepped_twice(pairs):
    a, b = read_side(pairs.run("base")), read_side(scheduler_stepped_twice(pairs))
    found = differences(a, b)
    where = parting(a, b, found)
    assert bending(found) == ["learning-rate"] and "stepped does not follow its own schedule" in found[0].text
    assert "as if stepped 2 times an update" in found[0].text
    assert where.step == 2 and where.equal_to == 1  # the first update still begins from the same weights
    assert "learning-rate" in verdict(a, b, found, where)


def no_end_of_document(pairs: Pairs) -> tuple[str, ...]:
    write_megatron(pairs.folder / "endless", [document[:-1] for document in pairs.documents])
    write_megatron(pairs.folder / "ended", pairs.documents)
    return "--data.train", f"[{{path: {pairs.folder / 'endless'}}}]"


def test_data_without_the_end_of_documents(pairs, monkeypatch):
    flags = no_end_of_document(pairs)
    monkeypatch.setattr(compare_runs, "_end_of_document", lambda side: 2)  # of a tokenizer that these runs do not name
    a = read_side(pairs.run("ended", "--data.train", f"[{{path: {pairs.folder / 'ended'}}}]"))
    b = read_side(pairs.run("endless", *flags))
    found = differences(a, b)
    assert bending(found) == ["end-of-document"]
    assert found[0].text.startswith("the end-of-document id stands once in") and found[0].text.endswith(" and never")
    words = verdict(a, b, found, parting(a, b, found))
    assert "although they differ in end-of-document" in words  # in 40 steps it does no harm that can be seen


def other_order(pairs: Pairs) -> tuple[str, ...]:
    write(pairs.folder / "unshuffled", pairs.documents[::-1], vocab_size=64, shuffled=False)
    return "--data.train", f"[{{path: {pairs.folder / 'unshuffled'}}}]"


def other_tokenizer(pairs: Pairs) -> tuple[str, ...]:
    about = dict(vocab_size=64, fingerprint="another", tokenizer_path="tokenizers/other")
    write(pairs.folder / "other", pairs.documents[::-1], **about)
    return "--data.train", f"[{{path: {pairs.folder / 'other'}}}]"


HIDDEN: list[tuple[str, Callable[[Pairs], tuple[str, ...]], list[str], str]] = [
    ("unshuffled", other_order, ["shuffled"], "documents shuffled in one run and not in the other"),
    ("other", other_tokenizer, ["tokenizer"], "tokenizers/test (64 ids) and tokenizers/other (64 ids)"),
    (
        "batch",
        lambda pairs: ("--batch.global_batch_size", "32"),
        ["batch", "learning-rate"],
        "16 x 32 = 512 and 32 x 32 = 1,024",
    ),
    ("seed", lambda pairs: ("--run.seed", "7"), ["seed"], "run.seed is 1234 and 7"),
    ("decay", lambda pairs: ("--optimizer.weight_decay", "0"), ["optimizer.weight_decay"], "is 0.1 and 0.0"),
    ("warmup", lambda pairs: ("--schedule.warmup_steps", "20"), ["learning-rate"], "at 512 tokens 0.002 in base and 0.0005"),
]


@pytest.mark.parametrize(("name", "plant", "named", "said"), HIDDEN, ids=[each[0] for each in HIDDEN])
def test_the_hidden_difference_is_named(pairs, name, plant, named, said):
    found, where, words = compared(pairs, name, *plant(pairs))
    assert bending(found) == named, found
    assert said in words, words
    same_kind = name in ("unshuffled", "other", "seed")  # other samples of the same text: curves agree but for their scatter
    assert (where.step is None) == same_kind and ("although they differ in" in words) == same_kind, words


# ---------------------------------------------------------------- nothing that matters


def test_a_repetition_is_equal_to_the_last_bit(pairs):
    found, where, words = compared(pairs, "again")
    assert bending(found) == [] and where.step is None and where.equal_to == 40
    assert words.startswith("base and again agree over 40 common lines")


@pytest.mark.parametrize(
    ("name", "flags", "ranks"),
    [
        ("two ranks", (), 2),
        ("micro-batch", ("--batch.micro_batch_size", "1"), 1),
        pytest.param("zero2", ("--engine.name", "zero2"), 2, marks=pytest.mark.slow),
    ],
)
def test_what_only_rounds_is_no_difference(pairs, name, flags, ranks):
    found, where, words = compared(pairs, name.replace(" ", "_"), *flags, ranks=ranks)
    assert bending(found) == [] and found and where.step is None, where
    assert "which changes no more than rounding" in words


def test_the_noise_of_a_twin_is_the_bound_where_there_is_one(pairs):
    a, b, twin = (read_side(pairs.run(name)) for name in ("base", "again", "again"))
    b.loss = b.loss.copy()
    b.loss[20:] += 1e-9
    assert parting(a, b, []).step is None
    where = parting(a, b, [], twin)
    assert where.step == 21 and "twin again" in where.noise


def test_a_curve_that_leaves_without_a_recorded_reason_says_so(pairs):
    a, b = (read_side(pairs.run(name)) for name in ("base", "again"))
    b.loss = b.loss + np.where(b.steps > 30, 0.01, 0)
    b.environment = json.loads(json.dumps(b.environment))
    b.start["git"] = {"commit": "f" * 40, "dirty": False}
    found = differences(a, b)
    where = parting(a, b, found)
    assert where.step == 31 and "no setting explains it. Suspect code (" in verdict(a, b, found, where)


def test_a_single_line_that_stands_out_is_not_where_curves_part(pairs):
    a, b = (read_side(pairs.run(name)) for name in ("base", "again"))
    b.loss = b.loss + np.where(b.steps == 10, 0.5, 0)
    assert parting(a, b, []).step is None


def test_curves_of_other_samples_part_only_beyond_their_scatter(pairs):
    a = read_side(pairs.run("base"))
    b = read_side(pairs.run("seed", "--run.seed", "7"))
    generator = np.random.default_rng(0)
    a.loss = 3 + generator.normal(0, 0.05, len(a.steps))
    b.loss = 3 + generator.normal(0, 0.05, len(a.steps))
    assert parting(a, b, differences(a, b)).step is None
    b.loss += np.where(b.steps > 20, 0.5, 0)
    assert parting(a, b, differences(a, b)).step == 21


# ---------------------------------------------------------------- the command


def test_the_command_says_it_and_refuses_what_is_no_run(pairs, tmp_path):
    pairs.run("base"), pairs.run("seed", "--run.seed", "7")
    folder = pairs.folder / "runs"
    command = [sys.executable, "tools/compare_runs.py", str(folder / "base"), str(folder / "seed")]
    done = subprocess.run([*command, "--json", str(tmp_path / "d.json")], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "bends the curve    seed: run.seed is 1234 and 7" in done.stdout, done.stderr
    assert json.loads((tmp_path / "d.json").read_text())["differences"][0]["what"] == "seed"
    done = subprocess.run([*command[:-1], str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "not the folder of a run" in done.stderr
    shutil.copytree(folder / "base", tmp_path / "empty")
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(CompareError, match="fewer than two logging steps"):
        read_side(tmp_path / "empty")
