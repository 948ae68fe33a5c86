"""Excluded samples are left out in every epoch at every world size, and nothing else moves."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import DataConfig, SourceConfig, load
from pretrain.data import excluded
from pretrain.data.batches import open_train
from pretrain.data.excluded import Quarantine, merge
from pretrain.data.indexed import DataError
from pretrain.data.order import Order
from pretrain.train import train
from tests.ranks import run_ranks
from tests.test_indexed import write
from tests.test_tools_data import tool

# ---------------------------------------------------------------- the stream without the quarantine


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 300), st.floats(0.05, 3)), min_size=1, max_size=4),
    st.sets(st.integers(0, 2**30)),
    st.integers(0, 99),
)
def test_the_stream_is_the_full_one_minus_the_quarantine(sources, chosen, seed):
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    left_out = {(number % len(sizes), 1 + number % max(1, sizes[number % len(sizes)] - 1)) for number in chosen}
    left_out = {(source, sample) for source, sample in left_out if sample < sizes[source]}
    order = Order(sizes, weights, seed)
    ids = list(zip(*(column.tolist() for column in order.locate(0, 600)), strict=True))
    kept = [full for full, (source, _, sample, _) in enumerate(ids) if (source, sample) not in left_out]
    without = Quarantine(order, merge((source, sample, sample + 1) for source, sample in left_out))
    found = np.concatenate([without.locate(position, 7) for position in range(0, len(kept) - 7, 7)] or [np.empty(0, int)])
    assert found.tolist() == kept[: len(found)]
    for position in range(0, max(0, len(kept) - 1), 13):
        assert without.position(kept[position]) == position
    for full in set(range(0, 600, 5)) - set(kept):
        assert without.position(full) is None


def test_a_change_of_the_quarantine_matters_only_if_its_samples_were_read():
    order = Order([100, 50], [2, 1], 7)
    sources, _, samples, _ = order.locate(0, 150)
    early, late = ((int(sources[i]), int(samples[i]), int(samples[i]) + 1) for i in (10, 120))
    none, first, second, both = (Quarantine(order, merge(each)) for each in ([], [early], [late], [early, late]))
    assert second.changed_before(none, 60) is None and none.changed_before(second, 60) is None
    assert first.changed_before(none, 60) == early[:2] and none.changed_before(first, 60) == early[:2]
    assert both.changed_before(first, 60) is None and both.changed_before(first, 120) == late[:2]
    assert first.changed_before(first, 10**6) is None


# ---------------------------------------------------------------- the file

NAMES, SIZES = ["web train", "code"], [100, 10]


def read(tmp_path, text: str) -> excluded.SampleRanges:
    (tmp_path / "q.txt").write_text(text)
    return excluded.read_quarantine(tmp_path / "q.txt", NAMES, SIZES, 16)


def test_a_file_written_by_hand_is_read(tmp_path):
    text = "# bad ones\nsequence_length 16\n\nweb train 17  # spam\ncode 3-5\nweb train 18-20\ncode 5\n"
    assert read(tmp_path, text) == [[0, 17, 21], [1, 3, 6]]
    assert read(tmp_path, "sequence_length 16\n") == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("code 3\n", ["sequence_length", "16"]),
        ("sequence_length 32\ncode 3\n", ["sequence_length 32", "16"]),
        ("sequence_length 16\ncode three\n", ["q.txt:2", "'three'"]),
        ("sequence_length 16\nbooks 3\n", ["q.txt:2", "'books'", "web train, code"]),
        ("sequence_length 16\ncode 10\n", ["q.txt:2", "code has samples 0 to 9"]),
        ("sequence_length 16\ncode 5-3\n", ["q.txt:2", "5-3"]),
        ("sequence_length 16\ncode 0-9\n", ["all of code"]),
        ("code 99\nbooks 1\n", ["sequence_length", "q.txt:1", "q.txt:2"]),
    ],
)
def test_a_wrong_file_is_refused_with_every_problem_and_its_line(tmp_path, text, parts):
    with pytest.raises(DataError) as refused:
        read(tmp_path, text)
    assert all(part in str(refused.value) for part in ["data.quarantine", *parts]), refused.value


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.txt"):
        excluded.read_quarantine(tmp_path / "none.txt", NAMES, SIZES, 16)


def test_appending_keeps_earlier_lines_and_refuses_another_sequence_length(tmp_path):
    path = tmp_path / "q.txt"
    excluded.append_to_quarantine(path, 16, [("code", 3, "loss 9.1\nof step 7")])
    excluded.append_to_quarantine(path, 16, [("web train", 4, "again")])
    assert path.read_text() == "sequence_length 16\ncode 3  # loss 9.1 of step 7\nweb train 4  # again\n"
    assert excluded.read_quarantine(path, NAMES, SIZES, 16) == [[0, 4, 5], [1, 3, 4]]
    with pytest.raises(DataError, match="sequence_length 32"):
        excluded.append_to_quarantine(path, 32, [])


# ---------------------------------------------------------------- positions that a rollback skips


@given(st.sets(st.integers(1, 60)), st.integers(1, 7), st.integers(0, 30))
def test_steps_counted_forwards_backwards_and_by_number_agree(left_out, size, known):
    """`left_out`: numbers of complete global batches."""
    ranges: excluded.PositionRanges = []
    for number in left_out:
        ranges = excluded.add_range(ranges, number * size, (number + 1) * size)
    starts, position = [], 0
    for _ in range(40):
        start = excluded.next_position(position, ranges)
        starts.append(start)
        position = start + size
    assert starts == [number * size for number in range(200) if number not in left_out][:40]
    for step, start in enumerate(starts, start=1):
        assert excluded.position_of_step(step, size, ranges) == start
        assert excluded.step_of_position(start + size - 1, size, ranges) == step
        if step > known > 0:  # counted from a start in between
            since = (known, starts[known - 1] + size)
            assert excluded.position_of_step(step, size, ranges, since) == start
            assert excluded.step_of_position(start, size, ranges, since) == step
    assert all(excluded.step_of_position(number * size, size, ranges) is None for number in left_out)
    for start in reversed(starts):
        position = excluded.start_of_last_step(position, size, ranges)
        assert position == start


def test_ranges_that_touch_or_overlap_are_merged():
    assert excluded.add_range([[8, 16], [32, 40]], 16, 24) == [[8, 24], [32, 40]]
    assert excluded.add_range([[8, 16], [32, 40]], 0, 40) == [[0, 40]]
    assert excluded.add_range([], 8, 16) == [[8, 16]]


# ---------------------------------------------------------------- runs

T, BATCH, POISONED = 32, 16, 3
TINY = """
run: {name: tiny}
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, vocab_size: 64}
data: {train: [{path: DATA}], sequence_length: 32}
batch: {global_batch_size: 16, micro_batch_size: 4}
optimizer: {lr: 1e-2}
schedule: {name: constant, warmup_steps: 3}
train: {max_steps: 40}
checkpoint: {every_steps: 10, keep_last: 9}
log: {every_steps: 1, sinks: [console, jsonl]}
"""


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory) -> tuple[Path, list[int]]:
    """(settings, sorted numbers of three noise samples of step 30); the other documents count up. One sample per document."""
    folder = tmp_path_factory.mktemp("poisoned")
    samples, generator = 800, np.random.default_rng(0)
    documents = [np.append((generator.integers(60) + np.arange(T - 1)) % 60 + 3, 2) for _ in range(samples + 1)]
    order = Order([samples], [1.0], 1234)
    bad = order.locate(29 * BATCH, BATCH)[2][[2, 7, 11]].tolist()
    for number in bad:
        documents[number] = np.append(generator.integers(3, 63, T - 1), 2)
    write(folder / "text", documents, vocab_size=64)
    (folder / "tiny.yaml").write_text(TINY.replace("DATA", str(folder / "text")))
    return folder / "tiny.yaml", sorted(bad)


def argv(poisoned, runs: Path, *more: str) -> list[str]:
    return ["--config", str(poisoned[0]), "--run.directory", str(runs), *more]


def train_here(flags: list[str]) -> int:
    return train(load(flags, world_size=int(os.environ.get("WORLD_SIZE", 1))))


def inspect(*words: object, status: int = 0) -> str:
    """The output of tools/inspect_data.py."""
    return "".join(tool("inspect_data", *words, status=status))


def losses(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in lines if "loss" in record}


@pytest.fixture(scope="module")
def explained(poisoned, tmp_path_factory) -> tuple[Path, str, Path]:
    """(runs, output of inspect_data for step 30 of a run over the poisoned data, quarantine file that it wrote)."""
    runs = tmp_path_factory.mktemp("runs")
    assert train_here(argv(poisoned, runs)) == 0
    output = inspect("--run", runs / "tiny", "--step", 30, "--loss", "--top", 3, "--quarantine", runs / "bad.txt")
    return runs, output, runs / "bad.txt"


def test_the_three_poisoned_samples_have_the_highest_losses(poisoned, explained):
    _, output, _ = explained
    samples = [line for line in output.splitlines() if ", sample " in line]
    assert sorted(int(line.split(", sample ")[1]) for line in samples) == poisoned[1]
    shown = [float(line.split()[1]) for line in samples]
    median = float(re.search(r"median (\S+),", output)[1])
    assert shown == sorted(shown, reverse=True) and shown[-1] > 2 * median
    documents = [line.strip() for line in output.splitlines() if "  loss" in line and "document" in line]
    assert {int(re.search(r"document (\d+)", line)[1]) for line in documents} >= set(poisoned[1])


def test_losses_come_from_any_checkpoint_and_samples_from_any_rank(explained):
    runs, _, _ = explained
    early = inspect("--run", runs / "tiny", "--step", 30, "--loss", "--checkpoint", 10)
    assert "under checkpoint 10" in early and early.count(", sample ") == BATCH
    everything = inspect("--run", runs / "tiny", "--step", 30)
    shares = [inspect("--run", runs / "tiny", "--step", 30, "--rank", rank, "--ranks", 2) for rank in (0, 1)]
    assert "rank 1 of 2: positions 472 to 479" in shares[1]
    assert "".join(share.split("\n", 1)[1] for share in shares) == everything.split("\n", 1)[1]
    assert inspect("--run", runs / "tiny", "--step", 30, "--rank", 0).split("\n", 1)[1] == everything.split("\n", 1)[1]
    assert "step 11" in inspect("--run", runs / "tiny", "--step", 30, "--loss", "--checkpoint", 11, status=2)
    assert "--rank 2 of 2" in inspect("--run", runs / "tiny", "--step", 30, "--rank", 2, "--ranks", 2, status=2)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_batches_are_the_old_ones_minus_the_quarantine(poisoned, explained, world_size):
    """Compares tokens, not messages: rank by rank, over three epochs."""
    settings = load(argv(poisoned, explained[0])).data
    opened = dict(seed=1234, vocab_size=64, tokenizer_fingerprint=None)
    old = open_train(settings, **opened)
    new = open_train(DataConfig(**(vars(settings) | {"quarantine": str(explained[2])})), **opened)
    full = old.take(0, 3 * old.samples_per_epoch).tokens_BT
    keep = [sample not in poisoned[1] for _, _, sample in old.sample_ids(0, 3 * old.samples_per_epoch)]
    share = BATCH // world_size
    read = [new.take(step * BATCH + rank * share, share).tokens_BT for step in range(100) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(read), full[keep][: 100 * BATCH])
    assert new.samples_per_epoch == old.samples_per_epoch - POISONED
    assert new.fingerprint == old.fingerprint and sum(end - first for _, first, end in new.quarantine) == POISONED


def test_a_resume_with_a_quarantine_equals_a_run_that_always_had_it(poisoned, explained, tmp_path, capsys):
    """The run resumes at step 20, before the spike of step 30, on other ranks and without the three samples."""
    runs, _, bad = explained
    always = argv(poisoned, tmp_path, "--run.name", "always", "--data.quarantine", str(bad))
    assert train_here(always) == 0
    again = argv(poisoned, tmp_path, "--data.quarantine", str(bad))
    assert train_here(argv(poisoned, tmp_path, "--train.max_steps", "20")) == 0
    assert train_here([*again, "--checkpoint.allow_changes", "[train.max_steps]"]) == 2
    assert "--checkpoint.allow_changes [data.quarantine]" in capsys.readouterr().err
    assert run_ranks(2, train_here, [*again, "--checkpoint.allow_changes", "[train.max_steps, data.quarantine]"]) == [0, 0]
    old, new, clean = losses(runs / "tiny"), losses(tmp_path / "tiny"), losses(tmp_path / "always")
    assert new == pytest.approx(clean, rel=1e-5)
    assert {step for step in new if new[step] != pytest.approx(old[step], rel=1e-5)} >= {30}
    assert new[30] < old[30] - 0.3 and new[29] == pytest.approx(old[29], rel=1e-5)
    starts = json.loads((tmp_path / "tiny" / "environment.json").read_text())["starts"]
    assert [(start["step"], start["world_size"]) for start in starts] == [(0, 1), (20, 2)]
    assert "rank 1 of 2" in inspect("--run", tmp_path / "tiny", "--step", 25, "--rank", 1)


def test_samples_that_were_read_cannot_be_put_into_quarantine(poisoned, explained, tmp_path, capsys):
    runs, _, bad = explained
    confirmed = ["--checkpoint.allow_changes", "[data.quarantine, train.max_steps]", "--train.max_steps", "45"]
    assert train_here(argv(poisoned, runs, "--data.quarantine", str(bad), *confirmed)) == 2
    assert f"sample {poisoned[1][0]} of text" in capsys.readouterr().err


def test_a_document_is_put_into_quarantine_with_all_its_samples(poisoned, explained, tmp_path):
    output = inspect("--run", explained[0] / "tiny", "--document", f"0:{poisoned[1][1]}", "--quarantine", tmp_path / "q.txt")
    assert "samples added" in output
    assert excluded.read_quarantine(tmp_path / "q.txt", ["text"], [800], T) == [[0, poisoned[1][1], poisoned[1][1] + 1]]
    settings = load(argv(poisoned, explained[0], "--data.quarantine", str(tmp_path / "q.txt"))).data
    assert SourceConfig(path=settings.train[0].path) == settings.train[0]
