"""Stages: the order at and between their borders, what a run with stages trains on, and how it resumes and branches."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pretrain import stages
from pretrain.config import ConfigError, DataConfig, load
from pretrain.data.batches import MASKED, Mixture, TrainData
from pretrain.data.indexed import DataError
from pretrain.data.order import Blend
from pretrain.data.passes import NEVER, Cut
from pretrain.data.permutation import Permutation
from pretrain.run import receipt
from pretrain.run.length import plan
from pretrain.run.parts import open_parts
from tests.models import train_here
from tests.ranks import run_ranks
from tests.test_indexed import write
from tests.test_tools_data import tool
from tests.test_train import curve, final_bytes, records

# ---------------------------------------------------------------- the order, against a brute-force one


class Blocks:
    """A source whose samples nobody reads."""

    sidecar, reference_lines = None, {}

    def __init__(self, name: str, tokens: int):
        self.name, self.num_tokens = name, tokens

    def num_blocks(self, block_length: int) -> int:
        return self.num_tokens // block_length

    def fingerprint(self) -> str:
        return self.name


class Reader:
    """The passes over one source, block by block, as the head of passes.py describes them."""

    def __init__(self, seed: int, number: int, blocks: int, length: int):
        self.ids, self.blocks, self.length = (seed, number), blocks, length
        self.epoch, self.order, self.group, self.read = -1, [], [], {}

    def samples(self, T: int) -> Iterator[tuple[int, int, int]]:
        """Endless (epoch, sample, seen labels). Each sample counts as read when the next one is asked for."""
        while True:
            for layer in range(self.length // T):
                for block in self.group:
                    if (begin := layer * T) + T > self.read[block]:
                        seen = max(0, self.read[block] - begin)
                        yield self.epoch, block * (self.length // T) + layer, seen
                        self.read[block] = begin + T
            if not self.order:
                self.epoch += 1
                self.order = Permutation(self.blocks, (*self.ids, self.epoch))(np.arange(self.blocks)).tolist()
            size = min(1024, max(16, self.blocks // 64)) if self.length > T else 1
            self.group, self.order = self.order[:size], self.order[size:]
            self.read = dict.fromkeys(self.group, 0)


def brute_force(data: list[Blocks], plan: list[Mixture], ends: list[int], seed: int) -> list[tuple[int, int, int, int]]:
    """(source, epoch, sample, seen) of every position, one after another."""
    length = plan[0].cut.block_length
    readers, found = [Reader(seed, i, source.num_blocks(length), length) for i, source in enumerate(data)], []
    for stage, end in zip(plan, ends, strict=True):
        used = [number for number, weight in enumerate(stage.weights) if weight]
        blend = Blend([stage.weights[number] for number in used])
        streams = {number: readers[number].samples(stage.cut.sequence_length) for number in used}
        chosen = blend.locate(np.arange(end - stage.position))[0].tolist()
        asked = [(used[each], *next(streams[used[each]])) for each in chosen]
        for number, stream in streams.items():  # the last sample of each source counts as read, too
            if number in {each for each, *_ in asked}:
                reader, (_, _, sample, _) = readers[number], next(each for each in reversed(asked) if each[0] == number)
                block, layer = divmod(sample, length // stage.cut.sequence_length)
                reader.read[block] = (layer + 1) * stage.cut.sequence_length
            stream.close()
        found += asked
    return found


def random_plan(trial: int) -> tuple[list[Blocks], list[Mixture], list[int]]:
    """(sources, stages, their ends)."""
    draw = random.Random(trial)
    length = draw.choice([1, 4, 12, 24])
    lengths = [each for each in range(1, length + 1) if length % each == 0]
    data = [
        Blocks(f"s{i}", length * draw.choice([1, 2, 5, 17, 40, 100, 1300]) + draw.randrange(length))
        for i in range(draw.randint(1, 4))
    ]
    begin, plan, ends = 0, [], []
    for _ in range(draw.randint(1, 5)):
        weights = [draw.choice([0, 0.2, 1, 3]) for _ in data]
        weights[draw.randrange(len(data))] = 1.0
        plan.append(Mixture(begin, Cut(draw.choice(lengths), length), weights))
        begin += draw.choice([1, 7, draw.randint(1, 200), draw.randint(1, 1500)])
        ends.append(begin)
    return data, plan, ends


def opened(data: list[Blocks], plan: list[Mixture], seed: int) -> TrainData:
    return TrainData(data, plan, DataConfig(), seed=seed, vocab_size=97)


def places(data: TrainData, first: int, end: int) -> list[tuple[int, int, int, int]]:
    located = data.stage_at(first).locate(first, end - first)
    return list(zip(*(column.tolist() for column in located), strict=True))


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2, 3))])
def test_a_thousand_random_plans_give_the_order_of_brute_force(part):
    """At every position, from any start, in any slices, and back from the sample to its position."""
    for trial in range(250 * part, 250 * (part + 1)):
        sources, mixtures, ends = random_plan(trial)
        expected = brute_force(sources, mixtures, ends, trial)
        data, draw = opened(sources, mixtures, trial), random.Random(trial)
        for stage, end in zip(data.stages, ends, strict=True):
            cuts = sorted({stage.position, end, *(draw.randint(stage.position, end) for _ in range(3))})
            for first, last in pairwise(cuts):
                assert places(data, first, last) == expected[first:last], (trial, first)
            for position in {stage.position, end - 1, *(draw.randrange(stage.position, end) for _ in range(5))}:
                source, epoch, sample, _ = expected[position]
                assert data.position(source, epoch, sample, stage) == position
        for position in (ends[-1], draw.randrange(ends[-1])):
            assert data.passes(position) == pytest.approx(epochs_read(sources, mixtures, expected[:position])), trial


def epochs_read(sources: list[Blocks], plan: list[Mixture], found: list[tuple[int, int, int, int]]) -> list[float]:
    tokens, length = [0] * len(sources), plan[0].cut.block_length
    for position, (source, _, _, seen) in enumerate(found):
        stage = next(each for each in reversed(plan) if each.position <= position)
        tokens[source] += stage.cut.sequence_length - seen
    return [count / (source.num_blocks(length) * length) for source, count in zip(sources, tokens, strict=True)]


@pytest.mark.parametrize("trial", range(40))
def test_every_label_of_an_epoch_is_read_once_whatever_the_stages(trial):
    """Counted label by label, from the places alone."""
    sources, mixtures, ends = random_plan(trial)
    data, length = opened(sources, mixtures, trial), mixtures[0].cut.block_length
    counts: dict[tuple[int, int], np.ndarray] = {}
    for stage, end in zip(data.stages, ends, strict=True):
        T = stage.cut.sequence_length
        for source, epoch, sample, seen in places(data, stage.position, end):
            labels = counts.setdefault((source, epoch), np.zeros(sources[source].num_blocks(length) * length, int))
            labels[sample * T + seen : (sample + 1) * T] += 1
            assert labels[sample * T : sample * T + seen].all()
    for (source, epoch), labels in counts.items():
        assert labels.max() == 1
        assert labels.all() or (source, epoch + 1) not in counts


def test_a_sample_that_a_stage_does_not_read_has_no_position():
    data = opened([Blocks("a", 640)], [Mixture(0, Cut(16, 32), [1.0]), Mixture(7, Cut(32, 32), [1.0])], 3)
    first, second = data.stages
    read = {(epoch, sample) for _, epoch, sample, _ in places(data, 0, 7)}
    for sample in range(20):  # blocks of which both halves are read have no place in the rest of the epoch
        both = {(0, 2 * sample), (0, 2 * sample + 1)} <= read
        found = int(second.order.positions(0, 0, np.array([sample]))[0])
        assert (found == NEVER) == both
        assert second.order.positions(0, 1, np.array([sample]))[0] >= 0
    assert first.order.positions(0, -1, np.array([0]))[0] == NEVER


def test_another_block_length_begins_a_new_epoch():
    data = opened([Blocks("a", 640)], [Mixture(0, Cut(16, 16), [1.0]), Mixture(7, Cut(64, 64), [1.0])], 3)
    assert {epoch for _, epoch, _, _ in places(data, 0, 7)} == {0}
    assert places(data, 7, 17) == [(0, 1, sample, 0) for sample in Permutation(10, (3, 0, 1))(np.arange(10)).tolist()]


def test_the_order_of_a_plan_with_stages_is_frozen():
    """Another order would repeat or lose samples of every run that resumes."""
    sources = [Blocks("a", 24 * 50), Blocks("b", 24 * 7)]
    mixtures = [Mixture(0, Cut(6, 24), [3.0, 1.0]), Mixture(11, Cut(24, 24), [1.0, 1.0]), Mixture(16, Cut(8, 24), [0.0, 1.0])]
    data = opened(sources, mixtures, 7)
    found = places(data, 0, 11) + places(data, 11, 16) + places(data, 16, 22)
    assert found == GOLDEN


PLACES = """
    0 0 32 0, 1 0 16 0, 0 0 0 0, 0 0 12 0, 0 0 144 0, 1 0 8 0, 0 0 188 0, 0 0 88 0,
    0 0 148 0, 1 0 4 0, 0 0 60 0, 0 0 8 6, 1 0 4 6, 0 0 0 6, 1 0 2 6, 0 0 3 6,
    1 0 3 6, 1 0 9 0, 1 0 0 0, 1 0 15 0, 1 0 18 0, 1 0 4 0
"""
"""Source, epoch, sample and seen labels of each position."""
GOLDEN = [tuple(map(int, place.split())) for place in PLACES.split(",")]


# ---------------------------------------------------------------- runs

SETTINGS = """
run: {name: staged, directory: FOLDER/runs}
model: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, vocab_size: 100}
data:
  train: [{path: FOLDER/web, weight: 2}, {path: FOLDER/code}]
  valid: [{path: FOLDER/held}]
  sequence_length: 16
batch: {global_batch_size: 8, micro_batch_size: 2}
engine: {precision: fp32}
optimizer: {lr: 1e-2}
schedule: {name: constant, warmup_steps: 2}
train: {max_steps: 20}
checkpoint: {every_steps: 1, keep_last: 99}
log: {every_steps: 1, sinks: [console, jsonl]}
"""
STAGES = """
train:
  stages:
    - {after_steps: 5, sources: [{path: FOLDER/code}, {path: FOLDER/math, weight: 3}], global_batch_size: 12}
    - {after_steps: 9, sequence_length: 48, global_batch_size: 4}
    - {after_tokens: 2600, sources: [{path: FOLDER/web}, {path: FOLDER/math}], sequence_length: 24, micro_batch_size: 1,
       lr: 5e-3, schedule: {name: linear, warmup_steps: 2, final_lr_fraction: 0.2}}
"""
LAYOUT = [(0, 0, 0, 0), (1, 5, 40, 640), (2, 9, 88, 1408), (3, 16, 116, 2752)]
"""(number, steps, samples and tokens before it): the last one begins with the first step after 2,600 tokens."""
RATES = [0.005, *[0.01] * 15, 0.0075, 0.005, 0.003, 0.001]
"""Of each step: a constant rate with warm-up, then a linear one that falls from it to its peak in two steps."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder, draw = tmp_path_factory.mktemp("staged"), np.random.default_rng(0)
    for name, count in (("web", 40), ("code", 25), ("math", 20), ("held", 4)):
        write(folder / name, [np.append(draw.integers(3, 100, draw.integers(10, 90)), 2) for _ in range(count)])
    for name, text in (("base", SETTINGS), ("stages", STAGES)):
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return folder


def flags(folder: Path, *more: str) -> list[str]:
    """Of a run with stages."""
    return ["--config", str(folder / "base.yaml"), "--config", str(folder / "stages.yaml"), *more]


@pytest.fixture(scope="module")
def base(folder) -> Path:
    """A run without stages."""
    assert train_here(["--config", str(folder / "base.yaml"), "--run.name", "main"]) == 0
    return folder / "runs" / "main"


@pytest.fixture(scope="module")
def straight(folder) -> Path:
    assert train_here(flags(folder)) == 0
    return folder / "runs" / "staged"


def logged(run: Path, key: str) -> list:
    return [record[key] for record in records(run) if "loss" in record]


def test_stages_begin_where_the_settings_say(folder):
    assert [stage[:4] for stage in stages.layout(load(flags(folder)))] == LAYOUT


def test_each_step_has_the_rate_and_the_tokens_of_its_stage(straight):
    assert logged(straight, "lr") == pytest.approx(RATES)
    sizes = [128] * 5 + [192] * 11 + [96] * 4
    tokens = np.diff([0, *logged(straight, "tokens")])
    assert all(tokens <= sizes) and all(tokens[:9] == sizes[:9])  # labels that were read before a border do not count again
    counted = [int((folder_data(straight).take(*each).labels_BT != MASKED).sum()) for each in steps_of(straight)]
    assert tokens.tolist() == counted and sum(counted) < sum(sizes)


def folder_data(run: Path) -> TrainData:
    return open_parts(load(flags(run.parents[1]))).data


def steps_of(run: Path) -> list[tuple[int, int]]:
    """(position, samples) of each step."""
    layout, position, found = stages.layout(load(flags(run.parents[1]))), 0, []
    for step in range(20):
        size = next(stage for stage in reversed(layout) if stage.step <= step).config.batch.global_batch_size
        found.append((position, size))
        position += size
    return found


def test_each_step_trains_on_the_samples_of_its_position(folder):
    """With a rate that moves no weight, the loss of a step is that of the first model on these samples."""
    (folder / "still.yaml").write_text((folder / "stages.yaml").read_text().replace("lr: 5e-3", "lr: 1e-30"))
    still = ["--run.name", "still", "--optimizer.lr", "1e-30", "--checkpoint.every_steps", "0"]
    config = load(flags(folder, "--config", str(folder / "still.yaml"), *still))
    from pretrain.train import train
    from tools.diagnose_loss import build_model

    assert train(config) == 0
    parts = open_parts(config)
    model = build_model(parts.model, config.run.seed)
    run = folder / "runs" / "still"
    for loss, each in zip(logged(run, "loss"), steps_of(run), strict=True):
        batch = parts.data.take(*each)
        assert loss == pytest.approx(float(model(*batch.inputs).loss_sum) / int((batch.labels_BT != MASKED).sum()), rel=1e-5)


def test_a_missing_file_of_a_passed_stage_is_refused_with_the_reason(folder):
    """A branch that does not read it itself needs it: its fingerprint is part of the history."""
    with pytest.raises(DataError, match=r"data.train\[1\].path: (?s:.*)train.stages: .*a resumed run has passed"):
        open_parts(load(flags(folder, "--data.train", f"[{{path: {folder}/web}}, {{path: {folder}/lost}}]")))
    with pytest.raises(DataError) as found:
        open_parts(load(["--config", str(folder / "base.yaml"), "--data.train", f"[{{path: {folder}/lost}}]"]))
    assert "train.stages" not in str(found.value)


def test_a_border_is_logged_with_what_changes(straight, folder):
    found = [record for record in records(straight) if "stage" in record]
    assert [(each["step"], each["stage"]) for each in found] == [(5, 1), (9, 2), (16, 3)]
    assert [(each["sequence_length"], each["global_batch_size"]) for each in found] == [(16, 12), (48, 4), (24, 4)]
    assert [each["shares"] for each in found[:2]] == [{"code": 0.25, "math": 0.75}] * 2
    assert found[2]["shares"] == {"web": 0.5, "math": 0.5}
    console = (straight / "console.log").read_text()
    assert (
        "begins after step 5: sources 66.67 % web, 33.33 % code -> 25 % code, 75 % math; global_batch_size 8 -> 12" in console
    )
    assert "3 begins after step 16: " in console and "learning rate 0.01 -> 0.0075, linear until step 20" in console


def test_the_receipt_says_what_each_stage_consumes(folder):
    config = load(flags(folder))
    parts = open_parts(config)
    length = plan(config, parts.data, None)
    lines = list(receipt.stage_lines(length, length.place(parts.data), 2))
    assert lines[0].startswith(
        "stage 0: steps 1 to 5, 640 tokens; 8 sequences per step = ranks 2 x micro-batch 2 x accumulation 2"
    )
    assert lines[0].endswith("times 16 tokens; learning rate 0.005 to 0.01")
    assert next(line for line in lines if line.startswith("stage 3")).endswith("24 tokens; learning rate 0.0075 to 0.001")
    shown = [line.split(",")[1:3] for line in lines if line.startswith("  code")]
    assert len(shown) == 3 and len(lines) == 4 + 8
    last = {source.name: passes for source, passes in zip(parts.data.sources, parts.data.passes(length.position), strict=True)}
    assert f"epochs 0 to {last['math']:.3g}" not in lines and any(line.endswith(f"to {last['math']:.3g}") for line in lines)
    assert length.tokens == 2752 + 4 * 96 and length.samples == length.position == 116 + 16


@pytest.mark.parametrize("step", [2, 5, 6, 9, 12, 16, 17])
def test_a_run_resumes_anywhere_to_the_bit(folder, straight, step):
    start = straight / "checkpoints" / f"step_{step:08d}"
    name = f"from_{step}"
    assert (
        train_here(flags(folder, "--run.name", name, "--checkpoint.resume", str(start), "--checkpoint.every_steps", "0")) == 0
    )
    run = folder / "runs" / name
    assert curve(run) == [each for each in curve(straight) if each["step"] > step]
    assert final_bytes(run) == final_bytes(straight)
    assert [record["step"] for record in records(run) if "stage" in record] == [each for each in (5, 9, 16) if each > step]


def test_other_ranks_and_engines_read_the_same(folder, straight):
    more = flags(folder, "--run.name", "two", "--engine.name", "zero2", "--checkpoint.every_steps", "7")
    assert run_ranks(2, train_here, more) == [0, 0]
    start = folder / "runs" / "two" / "checkpoints" / "step_00000007"
    again = flags(folder, "--run.name", "fsdp", "--engine.name", "fsdp2", "--checkpoint.resume", str(start))
    assert run_ranks(2, train_here, again) == [0, 0]
    for name, first in (("two", 0), ("fsdp", 7)):
        run = folder / "runs" / name
        assert logged(run, "loss") == pytest.approx(logged(straight, "loss")[first:], rel=1e-5)
        assert (
            logged(run, "tokens") == logged(straight, "tokens")[first:] and logged(run, "lr") == logged(straight, "lr")[first:]
        )


def test_a_branch_from_another_run_equals_a_run_that_always_had_the_stage(folder, base, capsys):
    """A cooldown: other data and a falling rate from step 8 of a finished run on; the moments stay."""
    argv = ["--config", str(folder / "base.yaml")]
    stage = f"[{{after_steps: 8, sources: [{{path: {folder}/math}}], schedule: {{name: linear, final_lr_fraction: 0}}}}]"
    cooldown = ["--train.stages", stage, "--train.max_steps", "14"]
    start = ["--checkpoint.resume", str(base / "checkpoints" / "step_00000008")]
    branch = [*argv, *cooldown, *start, "--run.name", "branch"]
    assert train_here(branch) == 2
    assert "train.stages: null -> [{after_steps: 8" in capsys.readouterr().err.replace("\n", " ")
    assert train_here([*branch, "--checkpoint.allow_changes", "[train.stages, train.max_steps]"]) == 0
    assert train_here([*argv, *cooldown, "--run.name", "always"]) == 0
    runs = folder / "runs"
    assert curve(runs / "branch") == [each for each in curve(runs / "always") if each["step"] > 8]
    assert final_bytes(runs / "branch") == final_bytes(runs / "always")
    assert logged(runs / "branch", "lr") == pytest.approx([0.01 * part / 6 for part in range(5, -1, -1)])


def test_a_branch_with_a_longer_context_cuts_the_sources_anew_and_keeps_the_moments(folder, base, capsys):
    """The first run had blocks of 16 tokens. Its second epoch begins with the stage; quarantined samples would be others."""
    start = base / "checkpoints" / "step_00000008"
    stage = "[{after_steps: 8, sequence_length: 48, global_batch_size: 4}]"
    argv = [
        "--config",
        str(folder / "base.yaml"),
        "--run.name",
        "long",
        "--train.stages",
        stage,
        "--checkpoint.resume",
        str(start),
    ]
    confirmed = ["--checkpoint.allow_changes", "[train.stages, model.rope_theta]", "--model.rope_theta", "50000"]
    assert train_here([*argv, *confirmed]) == 0
    run = folder / "runs" / "long"
    assert np.diff(logged(run, "tokens")).tolist() == [4 * 48] * 11  # no label was read before
    first = tool("inspect_data", "--run", run, "--step", 9).stdout.splitlines()
    assert first[0] == "step 9: positions 64 to 67" and all("epoch 1, sample" in line for line in first if ", sample " in line)
    (folder / "held.txt").write_text("sequence_length 16\nweb 3\n")
    quarantined = ["--run.name", "held", "--data.quarantine", str(folder / "held.txt")]
    allowed = ["--checkpoint.allow_changes", "[train.stages, data.quarantine]"]
    assert train_here([*argv, *quarantined, *allowed]) == 2
    assert "sample numbers hold for one length of blocks" in capsys.readouterr().err


MATH = "[{after_steps: 5, sources: [{path: FOLDER/web}, {path: FOLDER/math}]}]"


@pytest.mark.parametrize(("name", "stages"), [("none", "null"), ("math", MATH)])
def test_passes_continue_where_a_longer_stage_ahead_is_removed(folder, straight, name, stages):
    """Its length is still a factor of the blocks, so nothing is read twice: as in a run that always had such blocks."""
    changed = ["--config", str(folder / "base.yaml"), "--train.stages", stages.replace("FOLDER", str(folder))]
    changed += ["--train.max_steps", "8", "--checkpoint.every_steps", "4", "--run.name"]
    start = ["--checkpoint.resume", str(straight / "checkpoints" / "step_00000003")]
    assert train_here([*changed, name, *start, "--checkpoint.allow_changes", "[train.stages, train.max_steps]"]) == 0
    assert train_here([*changed, f"{name}_in_blocks", "--data.block_length", "48"]) == 0
    runs = folder / "runs"
    assert curve(runs / name) == [each for each in curve(runs / f"{name}_in_blocks") if each["step"] > 3]


def test_a_checkpoint_of_a_version_without_stages_has_blocks_of_its_length(folder, base):
    state = json.loads((base / "checkpoints" / "step_00000008" / "state.json").read_text())
    stage = "[{after_steps: 8, sequence_length: 48, global_batch_size: 4}]"
    config = load(["--config", str(folder / "base.yaml"), "--train.stages", stage])
    data = open_parts(config).data
    now = plan(config, data, state)
    del state["length"]["stages"], state["length"]["curve"]
    assert plan(config, data, state) == now and now.block_lengths == [16, 48]
    assert now.place(data).fingerprint_at(64) == state["data"]


def test_reference_losses_are_those_of_the_sources_of_the_stage(folder):
    tokens = np.random.default_rng(1).integers(3, 100, 4000).astype("<u2")
    tokens.tofile(folder / "foreign.bin")  # without a sidecar its bigram entropy is unknown
    stage = f"[{{after_steps: 3, sources: [{{path: {folder}/foreign.bin, dtype: uint16}}]}}]"
    data = open_parts(load(["--config", str(folder / "base.yaml"), "--train.stages", stage])).data
    assert {"uniform", "unigram", "bigram"} == data.reference_lines_at(0).keys() == data.reference_lines.keys()
    assert {"uniform", "unigram"} == data.reference_lines_at(24).keys()


def test_inspect_data_shows_the_samples_of_a_step_and_the_steps_of_a_document(straight):
    data = folder_data(straight)
    for step, (first, size) in zip((5, 6, 16, 17), [steps_of(straight)[each - 1] for each in (5, 6, 16, 17)], strict=True):
        lines = tool("inspect_data", "--run", straight, "--step", step).stdout.splitlines()
        assert lines[0] == f"step {step}: positions {first:,} to {first + size - 1:,}"
        shown = [line for line in lines if ", sample " in line]
        assert [int(line.rsplit(" ", 1)[1]) for line in shown] == [sample for _, _, sample in data.sample_ids(first, size)]
    document, found = tool("inspect_data", "--run", straight, "--document", "0:3").stdout, 0
    for line in document.splitlines()[1:]:
        number, sample = int(line.split(",")[0].split()[1]), int(line.split("sample ")[1].split(":")[0])
        for word in line.split("steps ")[1].split(", "):
            if not word.startswith("none") and int(word.split()[0]) <= 20:
                step, epoch = int(word.split()[0]), int(word.split()[-1].rstrip(")"))
                found += 1
                assert (0, epoch, sample) in data.sample_ids(*steps_of(straight)[step - 1])
                assert LAYOUT[number][1] < step
    assert found > 0


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ("[{sequence_length: 32}]", ["train.stages[0]", "exactly one of after_steps and after_tokens"]),
        ("[{after_steps: 3, after_tokens: 9, sequence_length: 32}]", ["train.stages[0]", "exactly one"]),
        ("[{after_steps: 3}]", ["train.stages[0]", "changes nothing"]),
        ("[{after_steps: 3, sources: []}]", ["train.stages[0].sources", "is empty"]),
        ("[{after_steps: 5, lr: 1e-3}, {after_steps: 5, lr: 1e-4}]", ["train.stages[1]", "after step 5", "later"]),
        ("[{after_steps: 20, lr: 1e-3}]", ["train.stages[0]", "below train.max_steps = 20"]),
        ("[{after_steps: 3, global_batch_size: 9}]", ["train.stages[0]", "batch.global_batch_size", "multiple of"]),
        ("[{after_steps: 3, length: 9}]", ["train.stages[0].length"]),
        ("[{after_steps: 3, schedule: {name: wsd, warmup_steps: 30}}]", ["train.stages[0].schedule", "warmup_steps"]),
        (
            "[{after_steps: 1, lr: 1e-3}]",
            ["schedule: warmup_steps", "only 1 steps", "train.stages[0] begins another after step 1"],
        ),
    ],
)
def test_a_stage_that_cannot_work_is_refused_before_anything_is_read(folder, changes, parts):
    with pytest.raises(ConfigError) as refused:
        config = load(["--config", str(folder / "base.yaml"), "--train.stages", changes])
        plan(config, open_parts(config).data, None)
    assert all(part in str(refused.value) for part in parts), refused.value


def test_stages_exclude_epochs_and_generated_data_excludes_sources(folder):
    base = ["--config", str(folder / "base.yaml"), "--train.stages", "[{after_steps: 3, sources: [{path: x}]}]"]
    with pytest.raises(ConfigError, match=r"train\.epochs: cannot be combined with train.stages"):
        load([*base, "--train.max_steps", "null", "--train.epochs", "2"])
    with pytest.raises(ConfigError, match=r"train\.stages\[0\]\.sources: cannot be combined with data.synthetic"):
        load([*base, "--data.train", "[]", "--data.valid", "[]", "--data.synthetic.kind", "markov"])
    with pytest.raises(ConfigError, match=r"data\.sequence_length: got 16, must divide data.block_length = 24"):
        load([*base[:2], "--data.block_length", "24"])


def test_lengths_whose_blocks_are_longer_than_a_file_are_refused_with_the_reason(folder):
    config = load(["--config", str(folder / "base.yaml"), "--train.stages", "[{after_steps: 3, sequence_length: 999}]"])
    with pytest.raises(DataError, match=r"web: contains .* tokens, 15,985 are needed \(a block, which every sequence length"):
        open_parts(config)


def test_a_checkpoint_beyond_a_stage_that_it_has_not_begun_is_refused(folder, base, straight, capsys):
    late = str(straight / "checkpoints" / "step_00000012")
    stage = "[{after_steps: 5, lr: 1e-3}]"
    flags_ = ["--config", str(folder / "base.yaml"), "--run.name", "late", "--checkpoint.resume", late]
    assert train_here([*flags_, "--train.stages", stage, "--checkpoint.allow_changes", "[train.stages]"]) == 2
    assert "train.stages: has 1, but the checkpoint is in stage 2" in capsys.readouterr().err
    early = str(base / "checkpoints" / "step_00000008")
    flags_ = ["--config", str(folder / "base.yaml"), "--run.name", "late", "--checkpoint.resume", early]
    assert train_here([*flags_, "--train.stages", stage, "--checkpoint.allow_changes", "[train.stages]"]) == 2
    assert "train.stages[0]: should have begun, but the checkpoint at step 8" in capsys.readouterr().err


def test_a_changed_past_is_refused_and_a_changed_future_is_not(folder, straight, capsys):
    settings = (folder / "stages.yaml").read_text()
    start = ["--checkpoint.resume", str(straight / "checkpoints" / "step_00000012"), "--checkpoint.every_steps", "0"]
    for name, old, new, status in (("past", "weight: 3", "weight: 2", 2), ("future", "lr: 5e-3", "lr: 4e-3", 0)):
        (folder / f"{name}.yaml").write_text(settings.replace(old, new))
        argv = ["--config", str(folder / "base.yaml"), "--config", str(folder / f"{name}.yaml"), "--run.name", name, *start]
        assert train_here([*argv, "--checkpoint.allow_changes", "[train.stages]"]) == status
    assert "the training data, its order or its weights differ from the checkpoint's" in capsys.readouterr().err
    assert logged(folder / "runs" / "future", "loss")[:4] == logged(straight, "loss")[12:16]


def test_the_quarantine_holds_in_every_stage(folder):
    (folder / "q.txt").write_text("sequence_length 16\nweb 3-5\nmath 0\nmath 9\n")
    config = load(flags(folder, "--data.quarantine", str(folder / "q.txt")))
    data, full = open_parts(config).data, open_parts(load(flags(folder))).data
    left_out = {0: range(3 * 16, 6 * 16), 2: [*range(16), *range(9 * 16, 10 * 16)]}  # labels
    for stage, end in zip(data.stages, [40, 88, 116, 400], strict=True):
        T = stage.cut.sequence_length
        ids = data.sample_ids(stage.position, end - stage.position)
        assert not any(set(range(sample * T, sample * T + T)) & set(left_out.get(source, [])) for source, _, sample in ids)
        for offset, (source, epoch, sample) in enumerate(ids):
            assert data.position(source, epoch, sample, stage) == stage.position + offset
    assert data.history_changed([], 0) is None and data.history_changed([], 400) is not None
    assert full.history_changed(data.quarantine, 400) is not None and data.history_changed(data.quarantine, 400) is None
