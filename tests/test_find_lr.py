"""tools/find_lr.py: probes start where they should and touch no run, and the rate that it finds is the best of full runs."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import runpy
from pathlib import Path

import pytest

from pretrain import UserError
from pretrain.config import load
from pretrain.engines.place import Place
from pretrain.evaluate import evaluate
from pretrain.files import read_json_lines
from pretrain.probe import Bench, HeldOut
from pretrain.train import train
from tests.test_indexed import documents, write

ROOT = Path(__file__).parents[1]
main = runpy.run_path(str(ROOT / "tools" / "find_lr.py"))["main"]
FEW = ["--steps", "10", "--repeats", "2", "--points", "3", "--lrs", "1e-3", "1e-1"]


def digests(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.md5(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def bench(tiny: list[str]):
    made = []

    def make(*flags: str, found=None, repeats: int = 2) -> Bench:
        made.append(Bench(load([*tiny, *flags]), Place(), found, 10, repeats))
        return made[-1]

    yield make
    for each in made:
        each.close()


EVERYTHING = ["--optimizer.row_beta", "0.9", "--optimizer.lookahead", "0.5", "--optimizer.average_decay", "0.8"]


@pytest.mark.parametrize("flags", [["adamw"], ["muon"], ["muon", *EVERYTHING]], ids=["adamw", "muon", "muon and averages"])
def test_each_probe_starts_from_the_same_state(bench, flags):
    """Whatever was probed before, moments, their counts and averages of weights included."""
    tried = bench("--optimizer.name", *flags)
    untrained = evaluate(tried.engine, tried.valid, 2, tried.validation_samples)["val_loss"]
    first = tried.probe(1e-2, 0, lambda step: None)
    other = tried.probe(1e-2, 1, lambda step: None)
    tried.probe(1.0, 0, lambda step: None)
    again = tried.probe(1e-2, 0, lambda step: None)
    assert first["before"] == pytest.approx(untrained, rel=1e-6)
    assert first["losses"] == again["losses"] and first["val_loss"] == again["val_loss"]
    assert first["losses"][0] != other["losses"][0] and first["before"] != other["before"]  # other weights and data
    assert first["val_loss"] < first["before"] and not first["diverged"]


def test_the_rate_of_a_probe_rises_to_its_peak_and_falls_towards_zero(bench):
    tried = bench()
    lrs = [tried.lr(step, 1.0) for step in range(1, 11)]
    assert lrs[:7] == [0.5] + 6 * [1.0] and all(0 < after < before for before, after in itertools.pairwise(lrs[6:]))
    assert lrs[-1] == pytest.approx(0.25)


def test_a_probe_from_a_checkpoint_takes_the_steps_of_the_run_and_leaves_its_folder_alone(tiny, tmp_path, capsys):
    run = Path(tiny[-1]) / "tiny"
    assert train(load(tiny)) == 0
    before = digests(run)
    assert main(["--run", str(run), "--step", "16", *FEW, "--output", str(tmp_path / "found")]) in (0, 2)
    assert digests(run) == before
    metrics = {each["step"]: each for each in read_json_lines(run / "metrics.jsonl").records if "loss" in each}
    head, *probes = read_json_lines(tmp_path / "found" / "probes.jsonl").records
    assert len(probes) == 6 and head["settings"]["--run"].endswith("step_00000016")
    of_first = [probe for probe in probes if probe["repeat"] == 0]
    assert [probe["losses"][0] for probe in of_first] == pytest.approx(3 * [metrics[17]["loss"]], rel=1e-6)
    of_second = [probe for probe in probes if probe["repeat"] == 1]
    assert {probe["before"] for probe in probes} == {probes[0]["before"]}  # the same weights
    assert of_second[0]["losses"][0] != of_first[0]["losses"][0]  # other data
    assert "step 16 of" in capsys.readouterr().out


def test_an_interrupted_search_continues_and_another_one_is_refused(tiny, tmp_path, capsys):
    """The file ends within a line, as a kill leaves it. The result is that of an uninterrupted search."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    status = main([*tiny, *FEW, "--output", str(whole)])
    cut.mkdir()
    lines = (whole / "probes.jsonl").read_text().splitlines(keepends=True)
    (cut / "probes.jsonl").write_text("".join(lines[:4]) + lines[4][:20])
    assert main([*tiny, *FEW, "--output", str(cut)]) == status
    results = [json.loads((folder / "find_lr.json").read_text()) for folder in (whole, cut)]
    for result in results:
        for probe in result["probes"]:
            del probe["seconds"]
    assert results[0] == results[1]
    assert read_json_lines(cut / "probes.jsonl").unreadable == 0  # what is appended does not continue the line that was cut
    assert (cut / "find_lr.png").read_bytes()[:4] == b"\x89PNG" and "3 probes of an earlier start" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"optimizer\.weight_decay"):
        main([*tiny, *FEW, "--output", str(cut), "--optimizer.weight_decay", "0"])


def test_where_every_probe_diverges_the_files_are_readable_and_nothing_is_recommended(tiny, tmp_path, capsys):
    """Losses that are far too high, and losses and gradients that are not finite."""
    flags = ["--steps", "10", "--repeats", "2", "--points", "3", "--lrs", "1e6", "1e30"]
    assert main([*tiny, *flags, "--output", str(tmp_path / "found")]) == 2
    text = (tmp_path / "found" / "find_lr.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found["lr"] is None and all(probe["diverged"] and probe["val_loss"] is None for probe in found["probes"])
    assert found["diverges_from"] == 1e6 and (tmp_path / "found" / "find_lr.png").exists()
    assert any(None in probe["losses"] for probe in found["probes"])
    assert "--optimizer.lr" not in capsys.readouterr().out


def test_without_validation_data_a_probe_is_judged_by_the_samples_after_those_of_all_probes(tiny, tmp_path):
    write(tmp_path / "text", documents(400 * [40], vocab_size=64), vocab_size=64)
    source = json.dumps([{"path": str(tmp_path / "text")}])
    config = load([*tiny, "--data.synthetic", "null", "--data.train", source])
    with contextlib.closing(Bench(config, Place(), None, 10, 3)) as tried:
        (held,) = tried.valid
        assert (held.position, held.num_samples) == (3 * 10 * 8, tried.validation_samples)
        batch = held.take([0, 5, None])
        assert batch.tokens_BT[1].equal(tried.data.take(held.position + 5, 1).tokens_BT[0])
        assert (batch.labels_BT[2] == -100).all() and (batch.labels_BT[:2] != -100).all()
        read = []
        held.take = lambda indices: read.extend(indices) or HeldOut.take(held, indices)
        assert tried.probe(1e-2, 0, lambda step: None)["before"] == pytest.approx(math.log(64), rel=0.05)
        assert set(read) == set(range(held.num_samples))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--lrs", "2e-3", "1e-3"], "--lrs"),
        (["--lrs", "0", "1e-3"], "--lrs"),
        (["--step", "8"], "--step"),
        (["--repeats", "1"], "--repeats"),
        (["--run", "nowhere"], "nowhere"),
        (["--optimizer.rate", "1"], "optimizer.rate"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_probed(flags, named, tiny, tmp_path, capsys):
    with pytest.raises((SystemExit, UserError)) as refused:
        main([*tiny, "--output", str(tmp_path / "out"), *flags])
    assert getattr(refused.value, "code", getattr(refused.value, "status", None)) == 2
    assert named in f"{refused.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_rate_found_is_within_a_factor_of_two_of_the_best_of_full_runs(tiny, tmp_path):
    """Full runs of 200 steps with the trainer, each with its own peak rate; probes of 20 steps."""
    flags = [*tiny, "--train.max_steps", "200", "--schedule.warmup_steps", "10"]
    flags += ["--schedule.final_lr_fraction", "0", "--evaluate.every_steps", "0", "--checkpoint.every_steps", "0"]
    flags += ["--evaluate.max_batches", "40"]
    losses = {}
    for exponent in range(-3, 3):
        lr = 1e-2 * 2.0**exponent
        run = ["--run.name", f"lr{exponent}", "--optimizer.lr", str(lr), "--log.sinks", "[jsonl]"]
        assert train(load([*flags, *run])) == 0
        losses[lr] = read_json_lines(Path(tiny[-1]) / f"lr{exponent}" / "metrics.jsonl").records[-1]["val_loss"]
    best = min(losses, key=losses.get)
    assert main([*flags, "--steps", "20", "--output", str(tmp_path / "found")]) == 0
    found = json.loads((tmp_path / "found" / "find_lr.json").read_text())
    assert 0.5 <= found["lr_of_the_run"][0] / best <= 2
