"""The step, then the job and the loop around it."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain import UserError, stages
from pretrain.checkpoint.saver import VOTES
from pretrain.config import BatchConfig, Config
from pretrain.data import excluded
from pretrain.data.batches import Batch, read_ahead, reads_ahead
from pretrain.engines import fp8
from pretrain.engines.base import Engine, require_device
from pretrain.engines.compile import keep_cache
from pretrain.engines.place import read_place
from pretrain.engines.rendezvous import meet
from pretrain.engines.start import start_engine
from pretrain.engines.update_check import UpdateCheck
from pretrain.evaluate import Stopped, evaluate
from pretrain.generate import continue_prompts
from pretrain.model import flops
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer
from pretrain.report.metrics import Clock, SampleLosses
from pretrain.report.profile import StepProfile
from pretrain.run import agreement, divergence, mask_certificate, memory, output, precision, preflight, resume
from pretrain.run.directory import take_directory
from pretrain.run.ledger import open_ledger
from pretrain.run.mirror import Mirror
from pretrain.run.outcome import DIVERGED, DONE, STORAGE_FAILED, Outcome
from pretrain.run.parts import open_parts
from pretrain.run.resume import Start
from pretrain.run.state import Run, open_run
from pretrain.run.stop import BUDGET_SPENT, STOPPED_BY_PERSON, StopRequest, exit_status, who_asked
from pretrain.schema import to_yaml
from pretrain.stages import Stage
from pretrain.tasks import measure

# ================================================================ the step


class StepResult(NamedTuple):
    """The result of one step; the tensors stay on the device."""

    loss_sum: Tensor
    """(), float64: nats of this rank's valid tokens; those that ranks share count on one of them."""
    tokens: Tensor
    """(), int64: valid tokens of the global batch."""
    grad_norm: Tensor
    """(): norm of the full mean gradient before clipping."""
    applied: Tensor
    """(), bool: False where loss or gradient were not finite; weights and moments are then untouched."""
    routing_LX: Tensor | None
    """(L, 2 + E), float64: what the routers did with this rank's valid tokens (`LossOutput.routing_LX`); None: no routers."""
    samples: SampleLosses | None
    """Losses of this rank's samples; None: the batches do not say where their samples come from."""


def train_step(engine: Engine, window: list[Batch], lr: float) -> StepResult:
    """One optimizer update on this rank's micro-batches of the global batch. The host never waits for the device in here.

    Every valid token (label != -100) of the global batch has the same weight: the gradient is that of

        loss = sum over ranks and micro-batches of loss_sum / tokens

    however the batch is split. The routers' losses, if any, have the same weights; the model adds them to the gradient and not
    to the value.
    """
    tokens = engine.count_tokens(window)
    loss_sum, losses, routing = torch.zeros((), dtype=torch.float64, device=engine.device), [], []
    for i, batch in enumerate(window):
        with engine.micro_batch(last=i == len(window) - 1):
            nats, nats_B, routing_LX = engine.forward(*batch.inputs)
            # Engines average gradients over ranks: times their number makes that the sum, over tokens makes it the mean.
            # 0 x nats adds nothing to a finite loss; a loss that is not makes the gradient NaN, and so all ranks skip the step.
            scale = engine.mesh.gradient_ranks / tokens.clamp(min=1) + 0 * nats.detach()
            engine.backward(nats * scale)
        loss_sum += nats.detach()
        losses.append(nats_B)
        routing.append(routing_LX)
    grad_norm, applied = engine.update(lr)
    routing_LX = None if routing[0] is None else torch.stack(routing).sum(0)
    if engine.model.needs_router_updates:
        engine.model.update_routers(engine.all_reduce(routing_LX.clone()), applied)
    return StepResult(loss_sum, tokens, grad_norm, applied, routing_LX, _sample_losses(engine, window, losses))


def _sample_losses(engine: Engine, window: list[Batch], losses: list[Tensor]) -> SampleLosses | None:
    """The losses (B,) of the samples of each micro-batch, with their sources and numbers of tokens."""
    if window[0].sources_B is None:
        return None
    rows = [(batch.sources_B, nats_B, engine.count_labels(batch)) for batch, nats_B in zip(window, losses, strict=True)]
    return SampleLosses(*(torch.cat(column) for column in zip(*rows, strict=True)))


def micro_batches(engine: Engine, taken: Batch, size: int) -> list[Batch]:
    """This rank's part of the samples that it has taken, in micro-batches of `size`, where `to_device` copies from."""
    samples = engine.pin(engine.part_of(taken))
    parts = (None if tensor is None else tensor.split(size) for tensor in samples)
    columns = [part or [None] * (len(taken.tokens_BT) // size) for part in parts]
    return [Batch(*tensors) for tensors in zip(*columns, strict=True)]


# ================================================================ the job


def train(config: Config, stop: StopRequest | None = None) -> int:
    """Trains a model, or resumes its training. Returns the exit status, which rank 0 also writes to run_state.json.

    stop: receives signals since the process started; None: from now on.
    """
    stop = stop or StopRequest()
    stop.deadline_seconds = config.checkpoint.deadline_seconds
    place = read_place()
    directory, refusal = take_directory(Path(config.run.directory) / config.run.name, place.rank)
    mirror = Mirror(config, directory, place.rank)
    stop.folder_lost = lambda: mirror.check() or directory.check()
    with mirror, Outcome(directory, stop, config) as outcome:
        parts, facts, why_precision = None, {}, ""
        try:
            if refusal is None:
                if place.rank == 0:
                    memory.forget(directory.path)
                    mirror.open()
                require_device(place)
                config, why_precision = precision.resolve(config, directory.checkpoints)
                if config.engine.precision == "fp8":
                    fp8.require_hardware()
                parts = open_parts(config)
                facts = agreement.facts(config, parts, directory.path) if place.world_size > 1 else {}
        except Exception as error:  # the others must learn of it; `meet` raises it again
            refusal = error
        store = meet(place, config.engine.timeout_seconds, facts, directory.path, refusal)  # raises on all ranks if one refuses
        if torch.cuda.is_available() or config.engine.compile not in (None, "none"):  # what may compile: masks on GPUs, too
            keep_cache(Path(config.run.directory) / ".cache")
        engine = outcome.engine = start_engine(config.engine, store)
        engine.watchdog.start(directory.path / "stacks")
        if engine.broadcast(int(directory.stop_file.exists())):
            reason = f"{directory.stop_file} exists, so nothing is trained; remove it to continue"
            directory.write_end(STOPPED_BY_PERSON, reason)
            return outcome.end(STOPPED_BY_PERSON, reason)
        stop.stop_file = directory.stop_file if engine.rank == 0 else None
        start = resume.decide(config, engine, parts, directory)
        ledger = outcome.ledger = open_ledger(config.run, directory, engine)
        if engine.broadcast(int(ledger.is_spent)) and not resume.is_complete(start, config, parts):
            reason = f"its budget is spent: {ledger.advice()}"
            outcome.write_end(BUDGET_SPENT, reason)
            return outcome.end(BUDGET_SPENT, reason)
        warnings = preflight.at_start(config, engine, parts, start.checkpoint)
        certificate = mask_certificate.certify(config, parts.model, engine)
        engine.prepare(
            lambda: Transformer(parts.model),
            lambda model: build_optimizer(model, config.optimizer),
            config.optimizer.grad_clip,
            config.run.seed,
            resume.initial_weights(start, config, engine, parts.model),
        )
        directory.write_text("config.yaml", to_yaml(config))
        while start:
            run = open_run(config, engine, parts, directory, start, ledger, mirror)
            outcome.has_outputs = True
            status, reason, start = _train_from(start, run, stop, why_precision, certificate, warnings)
            del run  # with its copy of the state on the host: after a rollback, the next run allocates another
        outcome.end(status, reason)
    return outcome.status


def _train_from(
    start: Start, run: Run, stop: StopRequest, why_precision: str, certificate: str, warnings: list
) -> tuple[int, str, Start | None]:
    """-> (exit status, reason, where to roll back to after a divergence)."""
    with run.sinks:
        output.announce(run, start, why_precision, certificate, warnings)
        stop.training()
        with run.saver:
            status, reason = _loop(run, stop)
        if status == DIVERGED and (rollback := divergence.rollback(run)):
            run.sinks.alarm("diverged", f"{reason}. Rolling back to {rollback.checkpoint.path} and skipping these samples")
            return status, reason, rollback
        if status == DONE and run.directory.check():
            status, reason = STORAGE_FAILED, run.directory.lost
        output.close_account(run, status)
        run.directory.write_end(status, reason, run.progress.step)  # before what may hang: W&B, the other ranks
        stop.saved(status)
        run.sinks.ended(status, reason)
        run.mirror.finish(run.engine, stop.seconds_left)
        if status == DONE:
            output.finish(run)
        elif status in (DIVERGED, BUDGET_SPENT):
            output.write_page(run)
    return status, reason, None


# ================================================================ the loop


def _loop(run: Run, stop: StopRequest) -> tuple[int, str]:
    """Steps until the end, a request to stop, or too many skipped steps. -> (exit status, reason)."""
    config, progress, total = run.config, run.progress, run.total_steps
    gc.collect()
    gc.freeze()  # what exists now lives as long as the run: later collections need not look at it
    flags, clock = [], Clock(progress.interval_seconds, progress.step)
    run.ledger.begin(clock, progress.step)
    stop.budget_is_reached = lambda: run.ledger.budget_is_reached(output.seconds_to_stop(run))
    progress.evaluation_due &= bool(run.valid)  # the data may have been removed from the settings
    progress.tasks_due &= bool(run.tasks)
    if progress.evaluation_due or progress.tasks_due:  # the checkpoint from which the run resumes lacks them
        val_loss, flags = _evaluate(run, stop, clock)
        if not any(flags):
            with clock.paused("save"):
                run.save(val_loss, last=progress.step == total)
    steps, folder = config.log.profile_steps, run.directory.path / "profile"
    profile = StepProfile(folder, steps, run.engine.device, run.engine.rank, run.sinks.info)
    with contextlib.closing(_windows(run)) as windows, contextlib.closing(profile):
        while not any(flags) and progress.step < total:
            profile.begin(progress.step + 1)
            save_due, flags = _take_step(run, clock, windows, stop)
            with clock.paused():
                profile.end(progress.step)
            if run.meter.figures.get("skipped_in_a_row", 0) >= config.train.max_skipped_steps:
                return DIVERGED, divergence.describe(run)
            last, val_loss = progress.step == total, None
            progress.evaluation_due = bool(run.valid) and (last or _due(progress.step, config.evaluate.every_steps))
            progress.tasks_due = bool(run.tasks) and (last or _due(progress.step, output.task_steps(config.evaluate)))
            progress.interval_seconds = clock.train_seconds
            if not any(flags):  # a run that is asked to stop leaves them to the next start
                val_loss, flags = _evaluate(run, stop, clock)
            if any(flags):
                stop.agreed(exit_status(flags))
            if save_due or last or any(flags) or _due(progress.step, config.checkpoint.every_steps):
                with clock.paused("save"):
                    run.save(val_loss, last=last or any(flags))
    if progress.step == total and not (progress.evaluation_due or progress.tasks_due):
        divergence.report_spike(run, run.engine.all_reduce(run.meter.last_loss.clone()).item())
        return DONE, ""
    why, status = run.directory.lost, exit_status(flags)
    if status == BUDGET_SPENT:
        run.ledger.expect(output.seconds_left(run, clock))
        why = run.ledger.advice()
    return status, f"stopped by {who_asked(flags)} after step {progress.step}, which is saved{why and f': {why}'}"


def _take_step(run: Run, clock: Clock, windows: Iterator[tuple], stop: StopRequest) -> tuple[bool, list[int]]:
    """The next step, and its line in the log. -> (whether it is time to save by the clock, requests to stop)."""
    config, engine, step = run.config, run.engine, run.progress.step + 1
    engine.watchdog.begin_step(step)
    with clock.waiting():
        window, pairs = next(windows)
    lr = run.length.lr(step)
    update_check = UpdateCheck(engine) if _due(step, 10 * config.log.every_steps) else None
    save_wanted = engine.rank == 0 and 0 < 60 * config.checkpoint.every_minutes < run.saver.seconds_since_save
    engine.attach([*run.saver.votes(), int(save_wanted), *stop.flags()], run.meter.last_loss)

    result = train_step(engine, window, lr)

    run.meter.add(*result)
    run.meter.add_attended(pairs)
    *requests, last_loss = engine.attached_sums()  # the loss of the step before, which the host learns without waiting
    votes, save_due, flags = requests[: len(VOTES)], requests[len(VOTES)], requests[len(VOTES) + 1 :]
    with clock.paused():
        run.saver.settle(votes)
    divergence.report_spike(run, last_loss)
    ended = _advance(run)
    if step in (1, run.total_steps) or ended is not run.stage or _due(step, config.log.every_steps):
        output.log_step(run, clock, ended, lr, update_check)
        output.log_stage(run, ended)
    run.sinks.progress(step)
    return bool(save_due), flags


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _advance(run: Run) -> Stage:
    """Advances by one step. Skipped positions are logged with the step that skips them. -> the stage of the step."""
    progress, skipped = run.progress, run.progress.skipped_positions
    begin = excluded.next_position(progress.position, skipped)
    progress.step += 1
    if begin > progress.position:
        record = {"step": progress.step, "rollbacks": progress.rollbacks, "skipped_positions": [progress.position, begin]}
        run.sinks.log(record)
    stage = stages.stage_at(run.length.stages, begin)
    progress.position = begin + stage.config.batch.global_batch_size
    run.directory.reached(progress.step)
    run.ledger.note_step(progress.step)
    return stage


def _evaluate(run: Run, stop: StopRequest, clock: Clock) -> tuple[float | None, list[int]]:
    """Validation and tasks, as far as they are due, logged; cut short when a rank is asked to stop. A collective.
    -> (val_loss, requests to stop)."""
    progress, val_loss = run.progress, None
    try:
        if progress.evaluation_due:
            with clock.paused("validation"), run.engine.averaged_weights() as averaged:
                val_loss = _validate(run, stop, averaged)
        if progress.tasks_due:
            with clock.paused("tasks"), run.engine.averaged_weights() as averaged:
                _measure_tasks(run, stop, averaged)
    except Stopped as stopped:
        return val_loss, stopped.flags
    return val_loss, []


def _measure_tasks(run: Run, stop: StopRequest, averaged: bool) -> None:
    """averaged: the weights are an average. Raises Stopped."""
    began = time.monotonic()
    figures = measure(run.engine, run.tasks, output.pass_tokens(run), stop.flags)
    figures |= {"task_weights": "average"} if averaged else {}
    run.progress.tasks_due = False
    output.log_tasks(run, figures | {"task_seconds": time.monotonic() - began})


def _validate(run: Run, stop: StopRequest, averaged: bool) -> float:
    """averaged: the weights are an average. Raises Stopped."""
    batch, max_batches = run.config.batch, run.config.evaluate.max_batches  # the same set in every stage
    samples = None if max_batches is None else max_batches * batch.global_batch_size
    prompts, most_tokens = run.config.evaluate.sample_prompts, run.config.evaluate.sample_tokens
    figures = evaluate(run.engine, run.valid, batch.micro_batch_size, samples, stop.flags)
    figures |= {"val_weights": "average"} if averaged else {}
    generated = continue_prompts(run.engine, run.tokenizer, prompts, most_tokens) if prompts else []
    run.progress.val_loss, run.progress.evaluation_due = figures["val_loss"], False
    output.log_validation(run, figures, generated)
    return figures["val_loss"]


def _windows(run: Run) -> Iterator[tuple[list[Batch], flops.Attended | None]]:
    """This rank's micro-batches of each step, on the device, and what their tokens attend to, where documents limit that; those
    of the next steps are read while these are used."""
    engine = run.engine

    def batch_at(position: int) -> BatchConfig:
        return stages.stage_at(run.length.stages, position).config.batch

    def read(position: int) -> tuple[list[Batch], flops.Attended | None]:
        batch = batch_at(position)
        per_rank = batch.global_batch_size // engine.mesh.sample_ranks
        taken, pairs = run.data.take(position + engine.mesh.sample_rank * per_rank, per_rank), None
        if taken.documents_BT is not None:
            pairs = flops.attended(taken.document_lengths, run.model.sliding_window)
        return micro_batches(engine, taken, batch.micro_batch_size), pairs

    def positions() -> Iterator[int]:
        position, skipped = run.progress.position, run.progress.skipped_positions
        while True:
            yield (position := excluded.next_position(position, skipped))
            position += batch_at(position).global_batch_size

    with contextlib.closing(read_ahead(read, positions(), reads_ahead(run.data.sources))) as windows:
        try:
            for window, pairs in windows:
                yield [engine.to_device(micro_batch) for micro_batch in window], pairs
        except (UserError, OSError) as error:  # of this rank alone: rank 0 sees a lost peer and cannot say why
            if int(os.environ.get("LOCAL_RANK", 0)) > 0:
                print(f"pretrain: rank {engine.rank}: {error}", file=sys.stderr, flush=True)
            raise
