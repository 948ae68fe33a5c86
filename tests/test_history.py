"""Curves keep their extremes and means in bounded memory; reading a growing file loses no record and repeats none."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.report.history import MOST_EVENTS, MOST_TEXTS, SPANS, Curve, History
from pretrain.report.records import LineFile, Tail, cut_records, read_records, to_json


def curve_of(values: np.ndarray, every: int = 10) -> Curve:
    curve = Curve()
    for number, value in enumerate(values.tolist(), start=1):
        curve.add(every * number, value)
    return curve


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 12 * SPANS), st.sampled_from([1, 7, 10]), st.integers(0, 2**31))
def test_a_curve_keeps_every_extreme_and_the_mean_of_everything(count, every, seed):
    values = np.random.default_rng(seed).standard_cauchy(count)
    points = curve_of(values, every).points()
    assert points.count == count and len(points.step) <= 2 * SPANS and (np.diff(points.step) > 0).all()
    assert set(zip(points.step, points.value, strict=True)) <= {(every * (i + 1), value) for i, value in enumerate(values)}
    if count <= 2 * SPANS:
        assert len(points.step) == count and (points.mean == points.value).all()
    if count:
        assert (points.step[0], points.step[-1]) == (every, every * count)
        assert (points.value.min(), points.value.max()) == (values.min(), values.max())


def test_spans_are_of_one_width_whenever_the_curve_is_read():
    """Spans whose borders move would merge again and again, and the oldest part of a long run would become a point."""
    values, curve, often = np.random.default_rng(0).normal(size=50_000), Curve(), Curve()
    for step, value in enumerate(values.tolist(), start=1):
        curve.add(step, value)
        often.add(step, value)
        if step % 1000 == 0:
            often.points()
    points = curve.points()
    assert all(np.allclose(a, b, atol=1e-12) for a, b in zip(points[:4], often.points()[:4], strict=True))
    spans = np.arange(1, 50_001) // 64  # the narrowest power of two with at most SPANS of them
    means = np.bincount(spans, values) / np.bincount(spans)
    assert np.allclose(points.mean, means) and len(points.mean) > SPANS / 2


def test_a_coarser_view_of_a_curve_has_the_same_extremes_and_changes_nothing():
    values = np.random.default_rng(0).normal(size=5000)
    curve = curve_of(values)
    fine, coarse, again = curve.points(), curve.points(64), curve.points()
    assert len(coarse.step) <= 128 < len(fine.step) and coarse.value.max() == values.max()
    assert all((a == b).all() for a, b in zip(fine[:4], again[:4], strict=True))


def test_events_and_texts_are_bounded_and_the_newest_are_there():
    history = History()
    spike = {"loss": 9.0, "median": 3.0, "sigmas": math.inf, "stays": False}
    for step in range(2, 2000):
        history.add([
            {"step": step, "spike": {"step": step - 1, **spike}, "samples": [[0, 0, step]], "texts": ["x"]},
            {"step": step, "generated": [{"prompt": "p", "text": f"{step}"}]},
        ])  # fmt: skip
    assert len(history.events) == MOST_EVENTS and history.num_events == 1998
    assert history.events[-1][:2] == (1998, "spike") and history.events[-1].texts == ["x"]
    steps = [step for step, _ in history.generated]
    assert len(steps) <= MOST_TEXTS + 1 and steps == sorted(steps) and (steps[0], steps[-1]) == (2, 1999)


def test_each_kind_of_record_becomes_what_it_says():
    history = History()
    history.add([
        {"step": 0, "reference_lines": {"uniform": 4.0}, "tokens_per_step": 100},
        {"step": 1, "loss": 4.1, "tokens": 100, "loss/a": 4.2, "stuck_parameters": 3, "name": "x", "flag": True},
        {"step": 2, "loss": math.nan, "tokens": 200},
        {"step": 2, "val_loss": 4.0, "val_loss/a": 4.0},
        {"step": 3, "skipped_positions": [8, 16]},
        {"step": 3, "stage": 1, "shares": {"b": 0.25}, "sequence_length": 16, "global_batch_size": 8},
        {"step": 4, "alarm": "stall", "text": "no step for ten minutes"},
        {"step": 5, "slow_rank": 3, "slow_host": "node7"},
        {"step": 6, "spike": {"step": "five"}}, {"step": 7, "generated": "none"}, {"step": 8, "shares": None},
    ])  # fmt: skip
    assert set(history.curves) == {"loss", "tokens", "loss/a", "stuck_parameters", "val_loss", "val_loss/a"}
    assert history.curves["loss"].points().value.tolist() == [4.1] and history.not_finite == 1
    kinds = ["stuck parameters", "not finite", "rollback", "stage", "stall", "slow rank"]
    assert [event.kind for event in history.events] == kinds
    assert [event.kind for event in history.events if not event.alarm] == ["stage"]
    assert "no step for ten minutes" in history.events[4].text and "node7" in history.events[5].text


# ---------------------------------------------------------------- reading a file that grows


class Reader:
    """What a watcher knows after its newest look."""

    def __init__(self, folder, most_bytes: int):
        self.tail, self.most_bytes, self.records = Tail(folder), most_bytes, []

    def look(self) -> list[dict]:
        while True:
            void, records = self.tail.read(self.most_bytes)
            self.records = records if void else self.records + records
            if not records and not void:
                return self.records


@pytest.mark.parametrize("seed", range(20))
def test_a_growing_cut_replaced_or_removed_file_is_read_as_it_is(tmp_path, seed):
    generator, path = random.Random(seed), tmp_path / "metrics.jsonl"
    reader, step = Reader(tmp_path, generator.choice([1, 100, 1 << 24])), 0
    for _ in range(60):
        action = generator.choice(["append", "append", "append", "torn", "cut", "replace", "remove"])
        if action == "append":
            with open(path, "a") as file:
                for _ in range(generator.randrange(5)):
                    step += 1
                    file.write(to_json({"step": step, "loss": generator.random(), "x": math.nan}) + "\n")
        elif action == "torn":
            with open(path, "a") as file:  # written by two calls, with a look between them
                file.write('{"step": 7, "lo')
                file.flush()
                reader.look()
                file.write('ss": 1.5}\n')
        elif action == "cut":
            step = generator.randrange(step + 1)
            cut_records(path, step)
        elif action == "replace" and path.exists():
            path.write_text("".join(to_json({"step": step, "loss": generator.random()}) + "\n" for step in range(1, 4)))
        elif action == "remove":
            path.unlink(missing_ok=True)
        if generator.random() < 0.7:
            assert repr(reader.look()) == repr(read_records(tmp_path))  # repr: NaN does not equal itself


def test_a_file_of_the_same_length_and_number_with_other_records_is_read_again(tmp_path):
    path, reader = tmp_path / "metrics.jsonl", Reader(tmp_path, 1 << 24)
    path.write_text('{"step": 1}\n{"step": 2}\n')
    assert len(reader.look()) == 2
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 4}\n')  # the same inode, and longer
    assert [record["step"] for record in reader.look()] == [1, 3, 4]


def test_what_was_read_is_not_read_again(tmp_path):
    path, reader = tmp_path / "metrics.jsonl", Reader(tmp_path, 1 << 24)
    file = LineFile(path)
    for step in range(1, 100):
        file.append(to_json({"step": step, "loss": 1.0}))
    reader.look()
    with open(path, "r+b") as other:  # who reads the first line again finds no record there
        other.write(b"#")
    file.append(to_json({"step": 100, "loss": 2.0}))
    assert [record["step"] for record in reader.look()] == [*range(1, 101)] and reader.tail.unreadable == 0


def test_lines_that_are_no_records_are_counted_and_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[1]\n\n{"step": "x"}\nnot json\n{"step": 2}\n')
    reader = Reader(tmp_path, 1 << 24)
    assert reader.look() == [{"step": 1}, {"step": 2}] and reader.tail.unreadable == 3


def test_numbers_are_read_as_other_readers_read_them(tmp_path):
    generator = random.Random(1)
    values = [generator.uniform(-1, 1) * 10.0 ** generator.randrange(-300, 300) for _ in range(1000)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": 1, "loss": value}) + "\n" for value in values))
    assert [record["loss"] for record in Reader(tmp_path, 1 << 24).look()] == values
