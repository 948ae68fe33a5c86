"""Complete runs whose loss goes wrong on chosen samples: reported, rolled back, and the same if they are killed on the way."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from pretrain.data.batches import TrainData
from pretrain.engines.ddp import DdpEngine
from tests.ranks import run_ranks
from tests.test_train import TINY, curve, records, run_of, signal_itself_at, train_here

SIZE = 8  # global batch: step s takes positions [8 (s - 1), 8 s)
POISON = 63  # a bad sample consists of this token only
ROLLBACK = ["--train.max_skipped_steps", "3", "--train.on_divergence", "rollback"]


@pytest.fixture
def tiny(tmp_path) -> list[str]:
    (tmp_path / "tiny.yaml").write_text(TINY)
    return ["--config", str(tmp_path / "tiny.yaml"), *ROLLBACK, "--run.directory", str(tmp_path / "runs")]


def train_poisoned(argv: list[str], first_step: int, last_step: int, factor: float, how=train_here, *more) -> int:
    """Trains on data in which the samples of some steps, in the original order, multiply the loss by `factor`."""
    take, forward = TrainData.take, DdpEngine.forward

    def poisoned_take(self, position: int, count: int):
        batch = take(self, position, count)
        rows = torch.arange(position, position + count) // SIZE
        batch.tokens_BT[(rows >= first_step - 1) & (rows < last_step)] = POISON
        return batch

    def poisoned_forward(self, *batch):
        out = forward(self, *batch)
        return out._replace(loss_sum=out.loss_sum * (factor if (batch[0] == POISON).all() and self.model.training else 1.0))

    TrainData.take, DdpEngine.forward = poisoned_take, poisoned_forward
    return how(argv, *more)


def train_without(argv: list[str], first_step: int, last_step: int) -> int:
    """Trains on data without the samples of these steps."""
    take = TrainData.take
    skip = (last_step - first_step + 1) * SIZE
    TrainData.take = lambda self, position, count: take(self, position + skip * (position >= (first_step - 1) * SIZE), count)
    return train_here(argv)


def losses(run: Path) -> list[tuple]:
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"], r["tokens"]) for r in records(run) if "grad_norm" in r]


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory) -> Path:
    """A run whose steps 7 to 9 are bad; step 8 is saved within them, so it rolls back to step 4."""
    folder = tmp_path_factory.mktemp("rolled_back")
    (folder / "tiny.yaml").write_text(TINY)
    settings = ["--config", str(folder / "tiny.yaml"), *ROLLBACK, "--run.directory", str(folder)]
    assert run_ranks(2, train_poisoned, settings, 7, 9, math.nan) == [0, 0]
    return run_of(settings)


def test_a_rolled_back_run_equals_a_run_that_never_saw_the_samples(tiny, rolled_back):
    assert run_ranks(2, train_without, [*tiny, "--run.name", "without"], 7, 9) == [0, 0]
    assert losses(rolled_back) == losses(run_of(tiny, "without"))
    (left_out,) = [record for record in records(rolled_back) if "skipped_positions" in record]
    assert left_out == {"step": 7, "rollbacks": 1, "skipped_positions": [48, 72]}
    said = (rolled_back / "console.log").read_text()
    assert "not finite in the last 3 steps up to step 9 (samples 48 to 71). Rolling back to" in said and "step_00000004" in said


def test_a_rollback_moves_the_stages_behind_it_and_counts_their_steps(tiny):
    """Steps 7 to 9 are bad and the first stage has 10 steps: it still makes 10, on samples that had been the second's."""
    stage = ["--train.stages", "[{after_steps: 10, sequence_length: 8, lr: 5e-4}]"]
    assert run_ranks(2, train_poisoned, [*stage, *tiny], 7, 9, math.nan) == [0, 0]
    run = run_of(tiny)
    made = [(each["step"], each["lr"]) for each in records(run) if "grad_norm" in each]
    assert len(made) == 20
    assert (made[9][1], made[12][1]) == pytest.approx((1e-3, 5e-4))  # the end of the decay, and that of the next warm-up
    tokens = [0, *(each["tokens"] for each in records(run) if "grad_norm" in each)]
    assert [after - before for before, after in itertools.pairwise(tokens)] == [8 * 16] * 10 + [8 * 8] * 10
    rows = json.loads((run / "environment.json").read_text())["starts"][-1]["stages"]
    assert [row[:3] for row in rows] == [[0, 0, 0], [10, 13 * SIZE, 10 * SIZE * 16]]
    (begun,) = [record["step"] for record in records(run) if "stage" in record]
    assert begun == 10


def test_a_signal_changes_nothing_in_a_rolled_back_run(tiny, rolled_back):
    assert run_ranks(2, train_poisoned, tiny, 7, 9, math.nan, signal_itself_at, 1, 13, signal.SIGTERM) == [75, 75]
    assert run_ranks(2, train_poisoned, tiny, 7, 9, math.nan) == [0, 0]
    assert curve(run_of(tiny)) == curve(rolled_back)
    mine, other = ([r for r in records(run) if "rollbacks" in r] for run in (run_of(tiny), rolled_back))
    assert mine == other and len(mine) == 1


def die_after_rollback(argv: list[str]) -> int:
    """Trains, and kills itself at the first step that skips the samples, before the rollback is saved."""
    take = TrainData.take

    def dying_take(self, position: int, count: int):
        if position >= 72:
            os.kill(os.getpid(), signal.SIGKILL)
        return take(self, position, count)

    TrainData.take = dying_take
    return train_here(argv)


def test_a_kill_before_the_rollback_is_saved_repeats_it(tiny):
    one_rank = ["--log.every_steps", "3", *tiny]  # the divergence is seen at step 9, when position 72 is only read ahead
    assert train_in_child([*one_rank, "--run.name", "straight"]) == 0
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(1, train_poisoned, one_rank, 7, 9, math.nan, die_after_rollback)
    assert train_in_child(one_rank) == 0
    assert curve(run_of(tiny)) == curve(run_of(tiny, "straight"))


def train_in_child(argv: list[str]) -> int:
    return run_ranks(1, train_poisoned, argv, 7, 9, math.nan)[0]


def test_a_run_that_keeps_diverging_ends_with_70_after_two_rollbacks(tiny):
    assert run_ranks(2, train_poisoned, tiny, 7, 10**9, math.inf) == [70, 70]
    state = json.loads((run_of(tiny) / "run_state.json").read_text())
    assert state["exit_status"] == 70 and state["reason"].startswith("diverged after 2 rollbacks: ")
    assert max(record["step"] for record in records(run_of(tiny))) == 9
    assert (run_of(tiny) / "checkpoints" / f"step_{state['saved_step']:08d}").is_dir()


def test_a_run_that_diverges_before_its_first_checkpoint_ends_with_70(tiny):
    assert run_ranks(1, train_poisoned, tiny, 2, 4, math.nan) == [70]


@pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_spike_is_reported_once_with_its_step_and_samples(tiny, stopped):
    """Even when the run is stopped between the step and its verdict, which comes one step later."""
    tiny = ["--train.max_steps", "30", "--optimizer.lr", "1e-4", "--log.every_steps", "5", *tiny]
    if stopped:  # every checkpoint is followed by its own start
        for steps in (20, 25):
            limit = ["--train.max_steps", str(steps), "--checkpoint.allow_changes", "[train.max_steps]"]
            assert run_ranks(2, train_poisoned, [*tiny[2:-2], *limit, *tiny[-2:]], 25, 25, 10.0) == [0, 0]
        tiny = ["--checkpoint.allow_changes", "[train.max_steps]", *tiny]
    assert run_ranks(2, train_poisoned, tiny, 25, 25, 10.0) == [0, 0]
    (record,) = [record for record in records(run_of(tiny)) if "spike" in record]
    spike = record["spike"]
    assert (record["step"], spike["step"]) == (26, 25) and spike["loss"] > 8 * spike["median"] and not spike["stays"]
    assert len(record["samples"]) == SIZE and all(source == 0 for source, _, _ in record["samples"])
    said = [line for line in (run_of(tiny) / "console.log").read_text().splitlines() if "loss spike" in line]
    first = ":".join(map(str, record["samples"][0][1:]))
    assert len(said) == 1 + stopped  # by the run that ended with this step, and by the one that resumed
    assert "at step 25: " in said[0] and f"synthetic-markov:{first}" in said[0]
