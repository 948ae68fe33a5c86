"""A run consumes the tokens or epochs that it was asked for, and its learning rate does not jump, however its batch changes."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import Config, ConfigError, load
from pretrain.data.passes import Cut
from pretrain.optim.schedule import lr_at
from pretrain.run.length import Length, plan
from pretrain.run.preflight import preflight, schedule_findings
from pretrain.schema import to_dict
from tests.ranks import run_ranks
from tests.test_tools_data import tool
from tests.test_train import curve, records, run_of, train_here
from tools import compare_runs

PEAK, LENGTH = 1e-3, 16
DATA = SimpleNamespace(samples_per_epoch=700, stages=[SimpleNamespace(cut=Cut(LENGTH, LENGTH))])


def config_of(batch: int, train: dict, **schedule) -> Config:
    config = load(["--model.vocab_size", "64", "--data.synthetic.kind", "markov", "--train.max_steps", "1"])
    parts = {"data": {"sequence_length": LENGTH}, "batch": {"global_batch_size": batch}, "schedule": schedule}
    parts["train"] = {"max_steps": None} | train
    return dataclasses.replace(
        config, **{key: dataclasses.replace(getattr(config, key), **each) for key, each in parts.items()}
    )


BASE = config_of(8, {"max_tokens": 1})


def changed(config: Config, batch: int, **train) -> Config:
    return dataclasses.replace(
        config,
        batch=dataclasses.replace(config.batch, global_batch_size=batch),
        train=dataclasses.replace(config.train, **{"max_tokens": None, "epochs": None, "max_steps": None} | train),
    )


def saved(config: Config, length: Length, step: int, consumed: int, **progress) -> dict:
    """The state of a checkpoint, as it is read back."""
    progress = {"step": step, "position": consumed, "skipped_positions": []} | progress
    return json.loads(json.dumps({"progress": progress, "settings": to_dict(config), "length": length.state(step)}))


def rate(config: Config, length: Length, step: int) -> float:
    return lr_at(step, config.schedule, PEAK, length.total_steps, length.curves[0].course)


batches = st.integers(1, 40)
parts = st.floats(0.01, 1.0)


@settings(deadline=None)
@given(
    st.sampled_from(["cosine", "wsd", "linear", "constant"]),
    st.sampled_from([None, 0.2]),
    st.sampled_from([0.0, 0.1]),
    batches,
    st.lists(st.tuples(batches, parts, st.sampled_from(["same", "max_tokens", "epochs"]), st.floats(0.7, 3.0)), max_size=5),
    st.data(),
)
def test_whatever_changes_the_tokens_are_consumed_and_the_learning_rate_does_not_jump(
    name, decay, warmup, batch, changes, draw
):
    config = changed(BASE, batch, max_tokens=draw.draw(st.integers(2_000, 40_000)))
    steps = plan(config, DATA, None).total_steps
    given_steps = {"warmup_steps": int(warmup * steps), "decay_steps": decay and max(1, int(decay * steps))}
    config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, name=name, **given_steps))
    length, step, consumed = plan(config, DATA, None), 0, 0
    for new_batch, part, kind, factor in changes:
        made = max(1, int(part * (length.total_steps - step)))
        if step + made > length.total_steps:
            break
        step, consumed = step + made, consumed + made * config.batch.global_batch_size
        state, samples = saved(config, length, step, consumed), max(consumed + 1, factor * length.samples)
        train = {"max_tokens": config.train.max_tokens, "epochs": config.train.epochs}
        if kind == "max_tokens":
            train = {kind: int(samples * LENGTH)}
        elif kind == "epochs":
            train = {kind: samples / DATA.samples_per_epoch}
        before, old, config = config, length, changed(config, new_batch, **train)
        try:
            length = plan(config, DATA, state)
        except ConfigError:  # the new length has no room for warm-up and decay
            assert decay or (warmup and factor < 1)
            return
        assert rate(config, length, step) == pytest.approx(rate(before, old, step), rel=1e-3, abs=1e-9)
        assert plan(config, DATA, saved(config, length, step, consumed)) == length
        rates = [rate(config, length, each) for each in range(step, length.total_steps + 1)]
        assert all(a >= b for a, b in pairwise(rates[rates.index(max(rates)) :]))
    wanted = config.train.max_tokens / LENGTH if config.train.max_tokens else config.train.epochs * DATA.samples_per_epoch
    end = consumed + (length.total_steps - step) * config.batch.global_batch_size
    assert end == length.samples >= wanted - 1e-6
    assert step == length.total_steps or end < wanted + config.batch.global_batch_size
    if name != "constant" and not decay and step < length.total_steps:
        assert rate(config, length, length.total_steps) == pytest.approx(0.1 * PEAK)


@settings(deadline=None)
@given(batches, st.integers(1, 100), st.integers(0, 30), st.sampled_from(["max_steps", "max_tokens", "epochs"]))
def test_a_run_that_never_changes_keeps_its_steps_and_rates_to_the_bit(batch, steps, step, kind):
    train = {"max_steps": steps, "max_tokens": steps * batch * LENGTH, "epochs": steps * batch / DATA.samples_per_epoch}
    config = changed(BASE, batch, **{kind: train[kind]})
    length = plan(config, DATA, None)
    assert length.curves[0].course is None and length.total_steps in (steps, steps + (kind == "epochs"))  # epochs may round
    if 0 < step <= length.total_steps:
        state = saved(config, length, step, step * batch)
        assert plan(config, DATA, state) == length
        del state["length"]  # older versions did not write it
        assert plan(config, DATA, state) == length


def test_with_a_length_in_steps_a_change_of_the_batch_changes_neither_steps_nor_rates():
    config = changed(BASE, 8, max_steps=100)
    length = plan(changed(config, 32, max_steps=100), DATA, saved(config, plan(config, DATA, None), 40, 320))
    assert (length.total_steps, length.curves[0].course, length.samples) == (100, None, 320 + 60 * 32)


def test_with_a_length_in_tokens_the_rate_is_that_of_the_same_tokens_under_another_batch():
    config = config_of(8, {"max_tokens": 800 * LENGTH}, name="cosine", warmup_steps=10)
    whole = plan(config, DATA, None)
    for step in (5, 50):  # in the warm-up, and after it
        length = plan(changed(config, 16, max_tokens=800 * LENGTH), DATA, saved(config, whole, step, 8 * step))
        assert length.total_steps == step + -(-(100 - step) // 2)
        for later in range(1, (100 - step) // 2):
            assert rate(config, length, step + later) == pytest.approx(rate(config, whole, step + 2 * later), abs=0.02 * PEAK)


def test_a_changed_schedule_holds_as_if_the_run_had_begun_with_it():
    config = config_of(8, {"max_tokens": 800 * LENGTH}, name="cosine")
    state = saved(config, plan(config, DATA, None), 50, 400)
    linear = config_of(8, {"max_tokens": 800 * LENGTH}, name="linear", warmup_steps=10)
    assert plan(linear, DATA, state) == plan(linear, DATA, None)
    both = config_of(16, {"max_tokens": 800 * LENGTH}, name="linear", warmup_steps=10)
    length = plan(both, DATA, state)
    assert [rate(both, length, 50 + each) for each in range(26)] == [
        lr_at(25 + each, both.schedule, PEAK, 50) for each in range(26)
    ]


def test_a_run_that_is_extended_after_its_decay_is_warned_that_its_rate_stays_low():
    before = config_of(8, {"max_steps": 40}, name="cosine", warmup_steps=4)
    after = changed(before, 8, max_steps=60)
    for step, warned in ((40, True), (20, False)):
        length = plan(after, DATA, saved(before, plan(before, DATA, None), step, 8 * step))
        names = [finding.name for finding in schedule_findings(length)]
        assert names == ["lr-ends-early"] * warned and (rate(after, length, 50) == rate(before, length, 60)) == warned


def test_samples_that_a_rollback_skipped_are_not_counted_as_trained_on():
    config = changed(BASE, 8, max_tokens=800 * LENGTH)
    state = saved(config, plan(config, DATA, None), 10, 80 + 24, skipped_positions=[[40, 64], [200, 208]])
    assert plan(config, DATA, state).total_steps == 100
    assert plan(changed(config, 16, max_tokens=800 * LENGTH), DATA, state).total_steps == 10 + 45


def test_fewer_tokens_than_were_consumed_are_refused_in_tokens_and_a_finished_run_is_done():
    config = changed(BASE, 8, max_tokens=800 * LENGTH - 5)
    state = saved(config, plan(config, DATA, None), 100, 800)
    assert plan(changed(config, 32, max_tokens=800 * LENGTH - 5), DATA, state).total_steps == 100
    for length in ({"max_tokens": 400 * LENGTH}, {"epochs": 0.5}):
        with pytest.raises(ConfigError, match=r"asks for .*, but the checkpoint at step 100 has consumed 12,800 tokens"):
            plan(changed(config, 32, **length), DATA, state)


def test_a_run_whose_batch_changes_consumes_its_tokens_and_is_described_by_them(tiny, capsys):
    """The curve up to the change keeps every bit; 1,024 tokens in 8 steps, then 1,536 in 4."""
    tiny = [*tiny[:2], "--train.max_steps", "null", "--schedule.name", "cosine", *tiny[2:]]
    changes = ["--checkpoint.allow_changes", "[train.max_tokens, batch.global_batch_size]"]
    assert run_ranks(2, train_here, ["--train.max_tokens", "1024", *tiny]) == [0, 0]
    before = curve(run_of(tiny))
    longer = ["--train.max_tokens", "2560", "--batch.global_batch_size", "24", *changes, *tiny]
    assert [each.name for each in preflight(load(longer)).findings] == ["lr-ends-early"]
    assert train_here(longer) == 0
    assert "length     12 steps = 2,560 tokens" in capsys.readouterr().out
    steps = [record for record in records(run_of(tiny)) if "loss" in record]
    assert curve(run_of(tiny))[: len(before)] == before
    assert [(each["step"], each["tokens"]) for each in steps[7:]] == [(8, 1024), (9, 1408), (10, 1792), (11, 2176), (12, 2560)]
    rates = [each["lr"] for each in steps]
    assert rates[7] == pytest.approx(1e-3) and all(rate == pytest.approx(1e-3) for rate in rates[8:])  # its decay was over
    known = compare_runs.read(run_of(tiny))
    assert [known.scheduled_lr(each["step"]) for each in steps] == rates
    for step, positions in ((8, "56 to 63"), (10, "88 to 111")):
        shown = tool("inspect_data", "--run", run_of(tiny), "--step", step).stdout
        assert shown.startswith(f"step {step}: positions {positions}\n")
    assert train_here(["--train.max_tokens", "2560", *changes, "--batch.global_batch_size", "16", *tiny]) == 0  # done
    assert train_here(["--train.max_tokens", "1280", *changes, *tiny]) == 2
    assert (
        "train.max_tokens: asks for 1,280 tokens, but the checkpoint at step 12 has consumed 2,560" in capsys.readouterr().err
    )
