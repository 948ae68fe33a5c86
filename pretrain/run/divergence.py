"""Loss spikes, steps without a finite loss, and rollback to a checkpoint.

A run has diverged when `train.max_skipped_steps` steps in a row had no finite loss or gradient; their updates were not applied.
With `train.on_divergence: rollback` it returns to the newest checkpoint from before them and skips their samples, at most
twice. The checkpoints that follow record what is skipped, so a resumed run skips the same. A kill before the first of them
repeats the divergence, and with it the rollback.
"""

from __future__ import annotations

from pretrain import UserError, stages
from pretrain.checkpoint import storage
from pretrain.checkpoint.manifest import Checkpoint, CheckpointError
from pretrain.data import excluded
from pretrain.report import spikes
from pretrain.run.resume import Start
from pretrain.run.state import Run

MOST_ROLLBACKS = 2
_SAMPLES_SHOWN = 8
_TEXTS, _TEXT_CHARACTERS = 4, 400  # of a spike, in its record


def report_spike(run: Run, loss: float) -> None:
    """Judges the loss of step `run.progress.step`; a spike is reported with the samples that caused it.

    The record belongs to the next step, when the loss is known: a run that resumes from this step's checkpoint repeats it.
    """
    spike = run.spikes.judge(loss)
    if spike is None:
        return
    progress, stage = run.progress, stages.stage_at(run.length.stages, run.progress.position - 1)
    count = stage.config.batch.global_batch_size
    ids = run.data.sample_ids(progress.position - count, count)
    record = {"step": progress.step + 1, "spike": {"step": progress.step, **spike._asdict()}, "samples": ids}
    run.sinks.log(record | {"texts": _texts(run, progress.position - count, min(count, _TEXTS))})
    shown = ", ".join(f"{run.data.sources[source].name}:{epoch}:{sample}" for source, epoch, sample in ids[:_SAMPLES_SHOWN])
    more = f" and {count - _SAMPLES_SHOWN} more in metrics.jsonl" if count > _SAMPLES_SHOWN else ""
    run.sinks.info(f"{spikes.describe(progress.step, spike)}. Its samples, as source:epoch:sample: {shown}{more}")


def _texts(run: Run, position: int, count: int) -> list[str]:
    """How the samples from `position` on begin, where there is a tokenizer and this rank reports."""
    if run.tokenizer is None or not run.sinks.keeps_metrics:
        return []
    try:
        rows = run.data.take(position, count).tokens_BT.tolist()
    except (UserError, OSError):  # a store that fails just now: the step has its samples, and a report must not end the run
        return []
    return [run.tokenizer.decode(row[:_TEXT_CHARACTERS])[:_TEXT_CHARACTERS] for row in rows]


def describe(run: Run) -> str:
    """Names the steps and samples at which the run diverged."""
    first, end = _bad_positions(run)
    steps, rollbacks = run.meter.figures["skipped_in_a_row"], run.progress.rollbacks
    return (
        f"diverged{f' after {rollbacks} rollbacks' if rollbacks else ''}: the loss or gradient was not finite in the last "
        f"{steps} steps up to step {run.progress.step} (samples {first} to {end - 1})"
    )


def rollback(run: Run) -> Start | None:
    """A start before the bad steps that skips their samples; checkpoints from within them are removed. A collective.

    None: there is no valid checkpoint, or the settings or earlier rollbacks forbid another.
    """
    engine, progress = run.engine, run.progress
    if run.config.train.on_divergence == "stop" or progress.rollbacks == MOST_ROLLBACKS:
        return None
    last_good = progress.step - int(run.meter.figures["skipped_in_a_row"])
    saved = storage.checkpoints(run.directory.checkpoints) if engine.rank == 0 else []
    step = engine.broadcast(max((each.step for each in saved if each.step <= last_good), default=-1))
    if step < 0:
        return None
    chosen = Checkpoint(run.directory.checkpoints / f"step_{step:08d}")
    try:
        storage.check_files(chosen, engine)
    except CheckpointError as error:
        run.sinks.info(str(error))
        return None
    for later in saved:
        if later.step > last_good:
            storage.remove(later)
    skipped = excluded.add_range(progress.skipped_positions, *_bad_positions(run))
    return Start(chosen, {"rollbacks": progress.rollbacks + 1, "skipped_positions": skipped})


def _bad_positions(run: Run) -> tuple[int, int]:
    """[first, end) of the samples of the steps that were skipped in a row, up to now."""
    progress, steps = run.progress, int(run.meter.figures["skipped_in_a_row"])
    first = progress.position
    for _ in range(steps):
        size = stages.stage_at(run.length.stages, first - 1).config.batch.global_batch_size
        first = excluded.start_of_last_step(first, size, progress.skipped_positions)
    return first, progress.position
