"""What a run does about losses that jump or are no numbers: it reports spikes, and goes back behind steps that teach nothing.

A run has diverged when `train.max_skipped_steps` steps in a row had no finite loss or gradient; their updates were not applied.
With `train.on_divergence: rollback` it goes back to the newest checkpoint from before them and leaves their samples out, at
most twice. What it leaves out stands in the checkpoints that follow, so going on again is the same run. A kill before the
first of them repeats the divergence, and with it the rollback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.checkpoint import storage
from pretrain.checkpoint.manifest import Checkpoint, CheckpointError
from pretrain.data import skips
from pretrain.report import spikes
from pretrain.report.metrics import Meter

if TYPE_CHECKING:
    from pretrain.run.state import Run

MOST_ROLLBACKS = 2
_SAMPLES_SHOWN = 8


def report_spike(run: Run, loss: float) -> None:
    """Judges the loss of the step that `run.progress` stands at; a spike is reported with the samples that made it.

    The record belongs to the next step, when the loss is known: a run that goes on from this one's checkpoint makes it anew.
    """
    spike = run.spikes.judge(loss)
    if spike is None:
        return
    progress, count = run.progress, run.config.batch.global_batch_size
    ids = run.data.sample_ids(progress.position - count, count)
    run.log({"step": progress.step + 1, "spike": {"step": progress.step, **spike._asdict()}, "samples": ids})
    shown = ", ".join(f"{run.data.sources[source].name}:{epoch}:{sample}" for source, epoch, sample in ids[:_SAMPLES_SHOWN])
    more = f" and {count - _SAMPLES_SHOWN} more in metrics.jsonl" if count > _SAMPLES_SHOWN else ""
    run.info(f"{spikes.in_words(progress.step, spike)}. Its samples, as source:epoch:sample: {shown}{more}")


def bad_positions(run: Run, meter: Meter) -> tuple[int, int]:
    """[first, end) of the samples of the steps that were skipped in a row, up to now."""
    progress, steps = run.progress, int(meter.figures["skipped_in_a_row"])
    first = skips.begin_of_last(progress.position, steps, run.config.batch.global_batch_size, progress.skipped_positions)
    return first, progress.position


def in_words(run: Run, meter: Meter) -> str:
    """Which steps and samples made the run diverge."""
    first, end = bad_positions(run, meter)
    steps, rollbacks = meter.figures["skipped_in_a_row"], run.progress.rollbacks
    return (
        f"diverged{f' after {rollbacks} rollbacks' if rollbacks else ''}: the loss or gradient was not finite in the last "
        f"{steps} steps up to step {run.progress.step} (samples {first} to {end - 1})"
    )


def checkpoint_to_go_back_to(run: Run, meter: Meter) -> Checkpoint | None:
    """The newest checkpoint from before the bad steps; those from within them are removed. A collective.

    None: there is no valid one, or the settings or earlier rollbacks say that the run stops.
    """
    folder, engine, progress = run.folder / "checkpoints", run.engine, run.progress
    if run.config.train.on_divergence == "stop" or progress.rollbacks == MOST_ROLLBACKS:
        return None
    last_good = progress.step - int(meter.figures["skipped_in_a_row"])
    saved = storage.checkpoints(folder) if engine.rank == 0 else []
    step = engine.broadcast(max((each.step for each in saved if each.step <= last_good), default=-1))
    if step < 0:
        return None
    chosen = Checkpoint(folder / f"step_{step:08d}")
    try:
        storage.verify(chosen, engine)
    except CheckpointError as error:
        run.info(str(error))
        return None
    for later in saved:
        if later.step > last_good:
            storage.remove(later)
    return chosen
