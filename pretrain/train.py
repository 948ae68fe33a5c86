"""The step, then the job and the loop around it."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.checkpoint.manifest import CheckpointError, UnsafeCheckpoint
from pretrain.checkpoint.saver import VOTES
from pretrain.checkpoint.storage import NotFinite
from pretrain.config import Config, ConfigError, Problem
from pretrain.data import skips
from pretrain.data.batches import Batch, open_train, open_valid
from pretrain.data.indexed import DataError
from pretrain.data.tokenizer import Tokenizer
from pretrain.engines.base import Engine
from pretrain.engines.compile import compile_report
from pretrain.engines.start import start_engine
from pretrain.engines.update_check import UpdateCheck
from pretrain.evaluate import Stopped, evaluate
from pretrain.generate import generate_batch, stream_text
from pretrain.model import config as model_settings
from pretrain.model import flops
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer
from pretrain.optim.schedule import lr_at
from pretrain.report import verdict
from pretrain.report.metrics import Clock, Meter, perplexity
from pretrain.report.plot import PlotError, plot_runs, read_curves
from pretrain.run import divergence, preflight, state
from pretrain.run.directory import Locked, RunDirectory
from pretrain.run.state import Run
from pretrain.run.stop import PEER_LOST, STOPPED_BY_PERSON, StopRequest, exit_status, is_peer_lost, who_asked
from pretrain.schema import to_dict, to_yaml

DONE, FAILED, REFUSED, DIVERGED, LOCKED, STORAGE_FAILED, UNSAFE = 0, 1, 2, 70, 73, 74, 77

# ================================================================ the step


class StepResult(NamedTuple):
    """What one step did; the tensors stay on the device."""

    loss_sum: Tensor
    """(), float64: nats of this rank's valid tokens."""
    tokens: Tensor
    """(), int64: valid tokens of the global batch."""
    grad_norm: Tensor
    """(): norm of the full mean gradient before clipping."""
    applied: Tensor
    """(), bool: False where loss or gradient were not finite; weights and moments are then untouched."""
    requests: Callable[[], list[float]]
    """The ranks' requests, summed, and last of all that of `last_loss`; already on their way to the host."""
    routing_LX: Tensor | None
    """(L, 2 + E), float64: what the routers did with this rank's valid tokens (`LossOutput.routing_LX`); None: no routers."""


def train_step(
    engine: Engine, window: list[Batch], lr: float, requests: list[int], last_loss: Tensor | float = math.nan
) -> StepResult:
    """One optimizer update on this rank's micro-batches of the global batch. The host never waits for the device in here.

    Every valid token (label != -100) of the global batch weighs the same: the gradient is that of

        loss = sum over ranks and micro-batches of loss_sum / tokens

    however the batch is split. Routers' losses, if there are any, are weighed in the same way; the model adds them to the
    gradient and not to the value.

    `requests` (stop, save) are summed over ranks in the collective that counts the tokens, and so is `last_loss`, this rank's
    part of the loss of the step before: the host learns each step's loss one step late, without waiting for it.
    """
    counts = engine.all_reduce(_valid_tokens_and(requests, last_loss, window, engine.device))
    tokens, requested = counts[0].long(), engine.copy_to_host(counts[1:])
    loss_sum, routing = torch.zeros((), dtype=torch.float64, device=engine.device), []
    for i, batch in enumerate(window):
        with engine.micro_batch(last=i == len(window) - 1):
            nats, routing_LX = engine.forward(*batch)
            # Engines average gradients over ranks: times world_size makes that the sum, over tokens makes it the mean.
            # 0 x nats adds nothing to a finite loss; a loss that is not makes the gradient NaN, and so all ranks skip the step.
            scale = engine.world_size / tokens.clamp(min=1) + 0 * nats.detach()
            engine.backward(nats * scale)
        loss_sum += nats.detach()
        routing.append(routing_LX)
    grad_norm, applied = engine.update(lr)
    routing_LX = None if routing[0] is None else torch.stack(routing).sum(0)
    if engine.model.needs_router_updates:
        engine.model.update_routers(engine.all_reduce(routing_LX.clone()), applied)
    return StepResult(loss_sum, tokens, grad_norm, applied, requested, routing_LX)


def _valid_tokens_and(requests: list[int], last_loss: Tensor | float, window: list[Batch], device: torch.device) -> Tensor:
    """float64, in which counts are exact to 2^53."""
    valid = sum((batch.labels_BT != -100).sum() for batch in window)
    requested = torch.tensor(requests, dtype=torch.float64, device=device)
    return torch.cat([valid.double()[None], requested, torch.as_tensor(last_loss, dtype=torch.float64, device=device)[None]])


# ================================================================ the job


def train(config: Config, stop: StopRequest | None = None) -> int:
    """Trains, or goes on training, as `config` says. Returns the exit status; on rank 0 the same stands in run_state.json.

    `stop`: where signals have been heard since the process began; null: from now.
    """
    stop = stop or StopRequest()
    stop.deadline_seconds = config.checkpoint.deadline_seconds
    engine, directory, agreed = None, None, False
    try:
        directory, refusal = _take_directory(config)
        if directory:
            stop.last_words = lambda status, reason: directory.write_state("stopped", exit_status=status, reason=reason)
        engine = start_engine(config.engine)
        if engine.broadcast(int(refusal is not None)):
            raise refusal or Locked("rank 0 cannot use the run's folder")
        engine.watchdog.start(Path(config.run.directory) / config.run.name / "stacks")
        status, reason = _train(config, engine, directory, stop)
        agreed = True
    except UnsafeCheckpoint as error:
        status, reason = UNSAFE, str(error)
    except NotFinite as error:
        status, reason = DIVERGED, str(error)
    except (ConfigError, DataError, CheckpointError) as error:
        status, reason = REFUSED, str(error)
    except Locked as error:
        status, reason = LOCKED, str(error)
    except OSError as error:
        status, reason = STORAGE_FAILED, str(error)
    except BaseException as error:
        cause = f"{type(error).__name__}: {error}"
        if is_peer_lost(error):
            stop.leave(PEER_LOST, f"peer_lost: another rank is gone ({cause.splitlines()[0]})")
        if directory:
            directory.write_state("failed", exit_status=FAILED, reason=cause)
        raise
    if not agreed:
        _tell(directory, status, None, reason)
    if reason and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"pretrain: {reason}", file=sys.stderr, flush=True)
    if engine and (agreed or engine.world_size == 1):  # after an error of one rank alone, the others may never come to meet it
        engine.close()
    stop.close()
    return status


def _tell(directory: RunDirectory | None, status: int, step: int | None, reason: str) -> None:
    """How the run ended, into run_state.json."""
    if directory:
        directory.write_state("done" if status == DONE else "stopped", exit_status=status, step=step, reason=reason or None)


def _take_directory(config: Config) -> tuple[RunDirectory | None, Exception | None]:
    """Rank 0 locks the run's folder. -> (the folder, None), or (None, why not), which rank 0 has yet to tell the others."""
    path = Path(config.run.directory) / config.run.name
    if int(os.environ.get("RANK", 0)) > 0:
        return None, None
    try:
        directory = RunDirectory(path)
        directory.write_state("running")
        return directory, None
    except Locked as error:
        return None, error
    except OSError as error:
        return None, ConfigError([Problem("run.directory", f"{path} cannot be written: {error}; choose another")])


def _train(config: Config, engine: Engine, directory: RunDirectory | None, stop: StopRequest) -> tuple[int, str]:
    """-> (exit status, reason), which run_state.json has by then."""
    folder = Path(config.run.directory) / config.run.name
    if engine.broadcast(int((folder / "STOP").exists())):
        reason = f"{folder / 'STOP'} is there, so nothing is trained; remove it to go on"
        _tell(directory, STOPPED_BY_PERSON, None, reason)
        return STOPPED_BY_PERSON, reason
    tokenizer = Tokenizer.load(config.tokenizer.path) if config.tokenizer.path else None
    vocab_size, data_ids = model_settings.vocabulary(config.model, tokenizer and tokenizer.vocab_size)
    opened = dict(seed=config.run.seed, vocab_size=data_ids, tokenizer_fingerprint=tokenizer and tokenizer.fingerprint)
    data, valid = open_train(config.data, **opened), open_valid(config.data, **opened)
    model_config = model_settings.resolve_model(
        config.model, vocab_size=vocab_size, sequence_length=config.data.sequence_length
    )
    warnings = preflight.at_start(config, engine, model_config, data, valid)
    found = state.checkpoint_to_resume(config, engine, folder)
    if found:
        state.refuse_another_run(config, model_config, data, found.state(), found)
    engine.prepare(
        lambda: Transformer(model_config),
        lambda model: build_optimizer(model, config.optimizer),
        config.optimizer.grad_clip,
        config.run.seed,
        state.first_weights(found, config, engine, model_config),
    )
    if directory:
        directory.write_text("config.yaml", to_yaml(config))
    left_out: tuple[int, skips.Ranges] | None = None
    while True:
        run, meter = state.begin_at(
            found, config, engine, model_config, data, valid, directory, tokenizer and tokenizer.fingerprint
        )
        if left_out:
            run.progress.rollbacks, run.progress.skipped_positions = left_out
        with run.sinks or contextlib.nullcontext():
            state.announce(run, found, warnings)
            stop.training()
            with run.saver:
                status, reason = _loop(run, meter, stop)
            found = divergence.checkpoint_to_go_back_to(run, meter) if status == DIVERGED else None
            if found is None:
                _tell(directory, status, run.progress.step, reason)  # before what may hang: W&B, the other ranks
                stop.saved(status)
                if status == DONE:
                    _finish(run)
                return status, reason
            run.info(f"{reason}. Going back to {found.path}, to go on without these samples")
        bad = divergence.bad_positions(run, meter)
        left_out = run.progress.rollbacks + 1, skips.with_range(run.progress.skipped_positions, *bad)


# ================================================================ the loop


def _loop(run: Run, meter: Meter, stop: StopRequest) -> tuple[int, str]:
    """Steps until the end, a request to stop, or too many skipped steps. -> (exit status, reason)."""
    config, progress = run.config, run.progress
    flags, total = [], run.total_steps
    stop_file = run.folder / "STOP" if run.engine.rank == 0 else None

    def asked() -> list[int]:
        return stop.flags(stop_file)

    gc.collect()
    gc.freeze()  # what exists now lives as long as the run: later collections need not look at it
    progress.evaluation_due &= bool(run.valid)  # the data may have been taken out of the settings
    if progress.evaluation_due:  # the checkpoint from which the run goes on lacks its validation
        val_loss, flags = _evaluate(run, asked)
        if not any(flags):
            _save(run, meter, val_loss, last=progress.step == total)
    clock = Clock(progress.interval_seconds)
    with contextlib.closing(_windows(run)) as windows:
        while not any(flags) and progress.step < total:
            save_due, flags = _take_step(run, meter, clock, windows, asked)
            if meter.figures.get("skipped_in_a_row", 0) >= config.train.max_skipped_steps:
                return DIVERGED, divergence.in_words(run, meter)
            last, val_loss = progress.step == total, None
            progress.evaluation_due = bool(run.valid) and (last or _due(progress.step, config.evaluate.every_steps))
            progress.interval_seconds = clock.train_seconds
            with clock.paused():
                if progress.evaluation_due and not any(flags):  # whoever is asked to stop leaves it to the run that goes on
                    val_loss, flags = _evaluate(run, asked)
                if any(flags):
                    stop.agreed(exit_status(flags))
                if save_due or last or any(flags) or _due(progress.step, config.checkpoint.every_steps):
                    _save(run, meter, val_loss, last=last or any(flags))
    if progress.step == total and not progress.evaluation_due:
        divergence.report_spike(run, run.engine.all_reduce(meter.last_loss.clone()).item())
        return DONE, ""
    return exit_status(flags), f"stopped by {who_asked(flags)} after step {progress.step}, which is saved"


def _take_step(
    run: Run, meter: Meter, clock: Clock, windows: Iterator[list[Batch]], asked: Callable[[], list[int]]
) -> tuple[bool, list[int]]:
    """The next step, and its line in the log. -> (whether the clock says it is time to save, requests to stop)."""
    config, engine, step = run.config, run.engine, run.progress.step + 1
    engine.watchdog.begin_step(step)
    with clock.waiting():
        window = next(windows)
    lr = lr_at(step, config.schedule, config.optimizer.lr, run.total_steps)
    update_check = UpdateCheck(engine) if _due(step, 10 * config.log.every_steps) else None
    save_wanted = engine.rank == 0 and 0 < 60 * config.checkpoint.every_minutes < run.saver.seconds_since_save
    requests = [*run.saver.votes(), int(save_wanted), *asked()]

    result = train_step(engine, window, lr, requests, meter.last_loss)

    meter.add(result.loss_sum, result.tokens, result.grad_norm, result.applied, result.routing_LX)
    *requests, last_loss = result.requests()
    votes, save_due, flags = requests[: len(VOTES)], requests[len(VOTES)], requests[len(VOTES) + 1 :]
    with clock.paused():
        run.saver.settle(votes)
    divergence.report_spike(run, last_loss)
    _advance(run)
    if step in (1, run.total_steps) or _due(step, config.log.every_steps):
        _log_step(run, meter, clock, lr, update_check)
    if run.sinks:
        run.sinks.progress(step)
    return bool(save_due), flags


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _windows(run: Run) -> Iterator[list[Batch]]:
    """This rank's micro-batches of step after step, on the device; the next step's are read while this one's are used."""
    engine, batch = run.engine, run.config.batch
    per_rank = batch.global_batch_size // engine.world_size

    def read(position: int) -> list[Batch]:
        samples = run.data.take(position + engine.rank * per_rank, per_rank)
        if engine.device.type == "cuda":
            samples = Batch(*(tensor if tensor is None else tensor.pin_memory() for tensor in samples))
        parts = (None if tensor is None else tensor.split(batch.micro_batch_size) for tensor in samples)
        columns = [part or [None] * (per_rank // batch.micro_batch_size) for part in parts]
        return [Batch(*tensors) for tensors in zip(*columns, strict=True)]

    skipped = run.progress.skipped_positions
    position = skips.next_position(run.progress.position, skipped)
    with ThreadPoolExecutor(1, "data") as pool:
        ahead = pool.submit(read, position)
        while True:
            try:
                window = ahead.result()
            except (DataError, OSError) as error:  # of this rank alone: rank 0 sees a lost peer and cannot say why
                if int(os.environ.get("LOCAL_RANK", 0)) > 0:
                    print(f"pretrain: rank {engine.rank}: {error}", file=sys.stderr, flush=True)
                raise
            position = skips.next_position(position + batch.global_batch_size, skipped)
            ahead = pool.submit(read, position)
            yield [engine.to_device(micro_batch) for micro_batch in window]


# ================================================================ now and then


def _log_step(run: Run, meter: Meter, clock: Clock, lr: float, update_check: UpdateCheck | None) -> None:
    """One line; a collective."""
    progress, engine, figures = run.progress, run.engine, meter.read(run.engine.all_reduce)
    seconds, steps = clock.train_seconds, max(1, figures["steps"])
    progress.tokens += figures["interval_tokens"]
    progress.skipped_steps += figures["skipped_steps"]
    progress.train_seconds += seconds
    progress.loss = figures["loss"] if math.isfinite(figures["loss"]) else None
    rate = figures["interval_tokens"] / seconds
    record = {
        "step": progress.step,
        "loss": figures["loss"],
        "perplexity": perplexity(figures["loss"]),
        "grad_norm": figures["grad_norm"],
        "lr": lr,
        "tokens": progress.tokens,
        "epoch": progress.position / run.data.samples_per_epoch,
        "tokens_per_second": rate,
        "data_seconds": clock.data_seconds,
        "peak_memory_gib": figures["peak_memory_gib"],
        "skipped_steps": progress.skipped_steps,
        "eta_seconds": (run.total_steps - progress.step) * seconds / steps,
        "goodput": progress.train_seconds / max(progress.train_seconds, time.time() - progress.started),
        "train_hours": progress.train_seconds / 3600,
    }
    peak = run.config.log.peak_tflops or flops.peak_tflops(engine.device_name)
    if peak:
        for name, causal in (("mfu", False), ("mfu_causal", True)):
            per_token = flops.flops_per_token(run.model, run.config.data.sequence_length, causal=causal)
            record[name] = per_token * rate / (engine.world_size * peak * 1e12)
    found, warnings = update_check.figures(lr) if update_check and not figures["skipped_in_a_row"] else ({}, [])
    run.log(record | figures["routing"] | found)
    for warning in warnings:
        run.info(f"step {progress.step}: {warning}")
    if progress.step == 1 and run.config.engine.compile != "none":
        run.info(f"compile    step 1 took {seconds:.1f} s, {compile_report()}")
    if progress.step == 1:
        run.info(verdict.first_step(figures["loss"], run.model.vocab_size, trained=bool(run.config.model.from_pretrained)))
    clock.restart()


def _advance(run: Run) -> None:
    """One step further. Samples that are left out here, are so in the record of the step that does without them."""
    progress, skipped = run.progress, run.progress.skipped_positions
    begin = skips.next_position(progress.position, skipped)
    progress.step += 1
    if begin > progress.position:
        run.log({"step": progress.step, "rollbacks": progress.rollbacks, "skipped_positions": [progress.position, begin]})
    progress.position = begin + run.config.batch.global_batch_size


def _evaluate(run: Run, requests: Callable[[], list[int]]) -> tuple[float | None, list[int]]:
    """Validation, logged; given up when a rank is asked to stop. A collective. -> (val_loss, flags)."""
    config = run.config
    limit = config.evaluate.max_batches
    samples = None if limit is None else limit * config.batch.global_batch_size
    try:
        figures = evaluate(run.engine, run.valid, config.batch.micro_batch_size, samples, requests)
    except Stopped as stopped:
        return None, stopped.flags
    run.log({"step": run.progress.step, "tokens": run.progress.tokens, **figures})
    run.progress.val_loss, run.progress.evaluation_due = figures["val_loss"], False
    if config.evaluate.sample_prompts:
        run.log({"step": run.progress.step, "generated": _continuations(run)})
    if run.sinks and "jsonl" in config.log.sinks:
        verdict = _verdict(run)
        if verdict.is_alarm and verdict.kind != run.verdict:
            run.info(f"step {run.progress.step}: {verdict.text}")
        run.verdict = verdict.kind
    return figures["val_loss"], []


@torch.compiler.set_stance("force_eager")  # each length of a text would be compiled anew
def _continuations(run: Run) -> list[dict[str, str]]:
    """What the model writes after each of evaluate.sample_prompts. A collective: engines that cut weights gather them for each
    token, so all ranks write equally many, whatever each of them chooses."""
    config, model = run.config.evaluate, run.engine.model
    tokenizer = Tokenizer.load(run.config.tokenizer.path)
    prompts = [[tokenizer.end_of_document_id, *tokenizer.encode(prompt)] for prompt in config.sample_prompts]
    model.eval()
    try:
        with run.engine.autocast():
            steps = list(generate_batch(model, prompts, config.sample_tokens, temperature=0))
    except ValueError as error:  # its logits are not finite
        return [{"prompt": "", "text": f"nothing: {error}"}]
    finally:
        model.train()
    made = []
    for prompt, ids, new in zip(config.sample_prompts, prompts, zip(*steps, strict=True), strict=True):
        until_end = itertools.takewhile(lambda token: token != tokenizer.end_of_document_id, new)
        made.append({"prompt": prompt, "text": "".join(stream_text(tokenizer.decode, ids, until_end))})
    return made


def _save(run: Run, meter: Meter, val_loss: float | None, last: bool) -> None:
    """Starts to save; the last checkpoint of a job is durable when this returns. A collective."""
    if run.sinks:
        run.sinks.sync()
    state = {
        "progress": asdict(run.progress),
        "meter": meter.state(run.engine.all_reduce),
        "spikes": run.spikes.state(),
        "model": asdict(run.model),
        "settings": to_dict(run.config),
        "data": run.data.fingerprint,
        "quarantine": run.data.quarantine.ranges,
        "tokenizer": run.tokenizer_fingerprint,
        "val_loss": val_loss,
        "wandb_id": run.sinks.wandb_id if run.sinks else None,
    }
    run.saver.save(run.progress.step, state, last)


def _finish(run: Run) -> None:
    """The picture and the verdict."""
    if not run.sinks or "jsonl" not in run.config.log.sinks:
        return
    try:
        plot_runs([run.folder], run.folder / "plots" / "loss.png")
        run.sinks.image("loss", run.folder / "plots" / "loss.png")
        run.info(f"curve      {run.folder / 'plots' / 'loss.png'}")
    except (PlotError, OSError) as error:  # metrics.jsonl was removed, or the disk is full: the run is done all the same
        run.info(f"curve      none: {error}")
    run.info(f"result     {_verdict(run).text}")


def _verdict(run: Run) -> verdict.Verdict:
    """What metrics.jsonl says about the run, in one sentence."""
    try:
        curves = read_curves(run.folder)
    except (PlotError, OSError) as error:
        return verdict.Verdict("short", str(error))
    known = [] if run.config.data.synthetic else run.data.passes(run.progress.position)
    curve = verdict.Curve(curves.step, curves.loss, curves.val_step, curves.val_loss, max(known, default=math.nan))
    return verdict.judge(curve, run.data.reference_lines)
