"""A run that is killed three times and resumed by other engines on other numbers of ranks sees every sample once, in order."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from pretrain.run import parts
from tests.faults.test_resume import ENGINES
from tests.ranks import run_ranks
from tests.test_batches import random_lengths
from tests.test_indexed import documents, write
from tests.test_train import TINY, records, train_here

STEPS, SEQUENCES = 24, 12
CHAIN = [("zero2", 4, 7), ("fsdp2", 2, 13), ("zero3", 3, 18), ("ddp", 1, None)]
"""(engine, ranks, step in which all ranks are killed; None: the run completes)."""


class Witness:
    """Training data that logs every sample taken, and kills the process at `last_position`."""

    def __init__(self, data, folder: Path, last_position: float):
        self.data, self.last_position = data, last_position
        self.file = (folder / f"rank_{os.environ.get('RANK', 0)}.jsonl").open("w", buffering=1)

    def __getattr__(self, name):
        return getattr(self.data, name)

    def starting_at(self, begins):
        self.data = self.data.starting_at(begins)
        return self

    def take(self, position: int, count: int):
        if position >= self.last_position:
            os.kill(os.getpid(), signal.SIGKILL)
        batch = self.data.take(position, count)
        for i, sample in enumerate(self.data.sample_ids(position, count)):
            print(json.dumps([position + i, [*map(int, sample)], batch.tokens_BT[i].tolist()]), file=self.file)
        return batch


def train_witnessed(argv: list[str], folder: Path, killed_in: int | None) -> int:
    last_position, opened = SEQUENCES * (killed_in or STEPS + 2), parts.open_train  # one step is read ahead
    parts.open_train = lambda *args, **options: Witness(opened(*args, **options), folder, last_position)
    return train_here(argv)


def seen(folder: Path) -> dict[int, tuple]:
    """The samples that all ranks of an attempt read: position -> (sample, tokens)."""
    lines = [json.loads(line) for file in folder.iterdir() for line in file.read_text().splitlines()]
    assert len(lines) == len({position for position, *_ in lines}), "two ranks took the same sample"
    return {position: tuple(sample) for position, *sample in lines}


def attempt(folder: Path, run: str, number: int, engine: str, ranks: int, killed_in: int | None) -> dict[int, tuple]:
    witnesses = folder / f"{run}_{number}"
    witnesses.mkdir()
    flags = ["--config", str(folder / "chain.yaml"), "--run.name", run, *ENGINES[engine]]
    if killed_in:
        with pytest.raises(RuntimeError, match="died"):
            run_ranks(ranks, train_witnessed, flags, witnesses, killed_in)
    else:
        assert set(run_ranks(ranks, train_witnessed, flags, witnesses, None)) == {0}
    return seen(witnesses)


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_a_run_killed_on_4_2_and_3_ranks_of_other_engines_sees_every_sample_once_and_in_order(tmp_path):
    """With two sources, of which the smaller one has several epochs, and a checkpoint every 4 steps."""
    for name, seed, count in (("small", 1, 3), ("large", 2, 60)):
        write(tmp_path / name, documents(random_lengths(seed, count), seed=seed))
    sources = ", ".join(f"{{path: {tmp_path / name}, weight: {weight}}}" for name, weight in (("small", 1), ("large", 2)))
    text = TINY.replace("data: {synthetic: {kind: markov},", f"data: {{train: [{sources}],")
    text = text.replace("vocab_size: 64", "vocab_size: 100").replace("max_steps: 20", f"max_steps: {STEPS}")
    text = text.replace(
        "{global_batch_size: 8, micro_batch_size: 2}", f"{{global_batch_size: {SEQUENCES}, micro_batch_size: 1}}"
    )
    text = text.replace("run: {name: tiny}", f"run: {{directory: {tmp_path / 'runs'}}}")
    (tmp_path / "chain.yaml").write_text(text)

    expected = attempt(tmp_path, "straight", 0, "ddp", 1, None)
    samples = [sample for _, (sample, _) in sorted(expected.items())]
    assert len(samples) >= SEQUENCES * STEPS and len({tuple(sample) for sample in samples}) == len(samples)
    assert {sample[1] for sample in samples} >= {0, 1}, "no source began a second epoch"

    run, consumed = tmp_path / "runs" / "chain", []
    for number, (engine, ranks, killed_in) in enumerate(CHAIN):
        saved = sorted((run / "checkpoints").glob("step_*")) if number else []
        begin = int(saved[-1].name.removeprefix("step_")) if saved else 0
        assert (begin > 0) == (number > 0)
        read = attempt(tmp_path, "chain", number, engine, ranks, killed_in)
        assert min(read) == SEQUENCES * begin, "it did not resume at the checkpoint"
        del consumed[SEQUENCES * begin :]  # the steps after the checkpoint are repeated
        consumed += [read[position] for position in sorted(read)]
    assert consumed[: SEQUENCES * STEPS] == [expected[position] for position in range(SEQUENCES * STEPS)]

    made, true = (records(tmp_path / "runs" / name)[1:] for name in ("chain", "straight"))
    losses = [[record["loss"] for record in lines if "loss" in record] for lines in (made, true)]
    assert len(losses[1]) == STEPS and losses[0] == pytest.approx(losses[1], rel=1e-5)
