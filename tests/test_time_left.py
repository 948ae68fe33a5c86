"""The time left that a run shows agrees with the time that it takes, with validations, texts and saves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pretrain import train
from pretrain.checkpoint.saver import Saver
from pretrain.report import metrics
from pretrain.report.sinks import Sinks
from pretrain.run.directory import RunDirectory
from tests.test_train import train_here

FIRST, STEP, VALIDATION, SAVE = 2.5, 0.1, 1.2, 0.7  # seconds


class Simulated:
    """A clock that the parts of a run move; and the time at each logging line, with the time left that it shows."""

    def __init__(self, monkeypatch, step_seconds=lambda step: STEP):
        self.now, self.lines, self.end, self.steps = 100.0, [], None, 0
        monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: self.now))

        def after(target, name: str, seconds) -> None:
            original = getattr(target, name)

            def and_then(*given, **named):
                result = original(*given, **named)
                self.now += seconds(*given, **named)
                return result

            monkeypatch.setattr(target, name, and_then)

        def of_step(*_) -> float:
            self.steps += 1
            return FIRST if self.steps == 1 else step_seconds(self.steps)

        after(train, "train_step", of_step)
        after(train, "evaluate", lambda *_: VALIDATION)
        after(Saver, "save", lambda self, step, state, last: SAVE if last else 0.05)
        after(Sinks, "log", lambda sinks, record: self.note(record))
        after(RunDirectory, "write_end", lambda *_, **__: self.finish())
        write_seconds = property(lambda saver: SAVE * (saver.saved is not None), lambda *_: None)
        monkeypatch.setattr(Saver, "write_seconds", write_seconds, raising=False)

    def note(self, record: dict) -> float:
        if "eta_seconds" in record:
            self.lines.append((record["step"], self.now, record["eta_seconds"]))
        return 0.0

    def finish(self) -> float:
        self.end = self.now
        return 0.0

    def errors(self, first: int) -> list[float]:
        """Relative errors at the logging lines from step `first` on."""
        return [left / (self.end - at) - 1 for step, at, left in self.lines if step >= first]


FLAGS = ["--train.max_steps", "100", "--evaluate.every_steps", "4", "--checkpoint.every_steps", "10"]


def test_the_time_left_is_right_within_ten_percent_after_five_percent_of_a_run(tiny, monkeypatch):
    clock = Simulated(monkeypatch)
    assert train_here([*FLAGS, *tiny]) == 0
    errors = clock.errors(5)
    assert len(errors) == 96 and max(map(abs, errors)) < 0.1
    step, at, left = clock.lines[-1]
    assert step == 100 and left == pytest.approx(VALIDATION + SAVE) == clock.end - at  # of the last step itself


def test_the_time_left_after_a_resume_and_when_steps_become_slower_is_right(tiny, monkeypatch):
    half = ["--train.max_steps", "50", "--checkpoint.every_steps", "0"]
    assert train_here([*half, *tiny]) == 0
    clock = Simulated(monkeypatch, lambda step: STEP if step < 8 else 3 * STEP)
    assert train_here([*FLAGS, "--checkpoint.allow_changes", "[train.max_steps]", *tiny]) == 0
    assert clock.lines[0][0] == 51
    assert max(map(abs, clock.errors(75))) < 0.1


def test_a_validation_that_was_not_measured_yet_counts_as_its_forward_passes(tiny, monkeypatch):
    """A validation of 16 batches has the forward passes of 16 steps."""
    clock = Simulated(monkeypatch)
    at_the_end = ["--evaluate.every_steps", "0", "--evaluate.max_batches", "16", "--checkpoint.every_steps", "0"]
    assert train_here([*at_the_end, *tiny]) == 0
    left = next(line[2] for line in clock.lines if line[0] == 10)
    assert left == pytest.approx(10 * STEP + 16 * STEP / 3, rel=0.03)
