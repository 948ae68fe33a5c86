"""Everything a run reports: before step 1, at logging steps, at validations, and at its end."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

from pretrain import devices, stages
from pretrain.config import EvaluateConfig, batch_product
from pretrain.doctor import untrained, verdict
from pretrain.engines.compile import compile_report, graphs
from pretrain.engines.update_check import UpdateCheck
from pretrain.model import flops
from pretrain.report import expected
from pretrain.report.metrics import Clock, perplexity
from pretrain.report.ranks import RankFigures, named, spread
from pretrain.report.records import RecordsError
from pretrain.report.units import human_dollars, human_seconds
from pretrain.run import page, reality, receipt
from pretrain.run.precision import cpu_multiplies_bf16
from pretrain.run.resume import Start
from pretrain.run.state import Run
from pretrain.run.view import View
from pretrain.stages import Stage

FORWARD_SHARE = 0.33  # of a training step
SAVED_BYTES_PER_SECOND = 5e8
LEGEND = """Columns (details: docs/understanding_the_loss.md)
  loss       nats per token of the training text since the last line, over all ranks and micro-batches; it is minimised
  grad norm  length of the gradient before clipping; sudden jumps are an early sign of trouble
  lr         learning rate of this step
  tok/s      tokens trained on per second by all ranks together; validation and saving do not count
  val loss   the same loss on text that is never trained on: the number to judge a model by"""


def announce(run: Run, start: Start, why_precision: str, certificate: str, warnings: Sequence[object]) -> None:
    """Prints what will be done, in arithmetic that a reader can check, and what the numbers will mean."""
    config, engine = run.config, run.engine
    length, ranks = run.stage.config.data.sequence_length, engine.world_size
    counts = flops.num_parameters(run.model)
    active = f" ({counts.active:,} active per token)" if counts.active < counts.total else ""
    tokens_per_step, tokens = stages.tokens_per_step(run.stage.config), run.length.tokens
    resumed = f", resuming after step {run.progress.step:,}" if start.checkpoint else ""
    lines = [
        f"run        {run.directory.path}{resumed}",
        f"model      {counts.total:,} parameters{active}, vocabulary {run.model.vocab_size:,}, "
        f"weights from {config.model.from_pretrained or f'seed {config.run.seed}'}",
        f"engine     {config.engine.name}, {ranks} process{'es' * (ranks > 1)} on {engine.device_name}",
        *([f"mesh       {engine.mesh}"] if engine.mesh.cut else []),
        f"precision  {engine.precision}: {why_precision}",
        f"compile    {engine.compiled}: {engine.compiled_why}",
        f"masks      {certificate}",
        f"batch      {batch_product(run.stage.config, ranks)}; times {length} tokens = {tokens_per_step:,} tokens per step",
        f"length     {run.total_steps:,} steps = {tokens:,} tokens = {run.data.epochs(run.length.position):.2f} epochs, "
        f"{tokens / counts.total:.1f} tokens per parameter",
        f"lr         {_lr_line(run)}",
        *_cost_lines(run),
        *(f"stages     {line}" for line in receipt.stage_lines(run.length, run.data, engine.world_size)),
        *_task_lines(run),
        *(f"data       {line}" for line in run.data.description(run.progress.position)),
        "reference losses of this data, in nats per token:",
        *verdict.reference_lines(run.data.reference_lines_at(run.progress.position)),
        LEGEND,
        *(f"warning    {warning}" for warning in warnings),
    ]
    if engine.precision == "bf16" and engine.device.type == "cpu" and not cpu_multiplies_bf16():
        lines.append(
            "warning    this CPU emulates products in bf16, which are slower than in fp32: set engine.precision to fp32"
        )
    for line in lines:
        run.sinks.info(line)
    if not start.checkpoint or run.sinks.lacks_start:
        record = {"step": 0, "reference_lines": run.data.reference_lines, "parameters": counts.total, "world_size": ranks}
        record["mesh"] = engine.mesh.sizes
        run.sinks.log(record | {"tokens_per_step": tokens_per_step, "data": run.data.fingerprint})


def _lr_line(run: Run) -> str:
    """The learning rate at the steps where it turns, in words."""
    step, total = run.progress.step, run.total_steps
    curve = run.length.curve(min(step + 1, total))
    schedule, course = curve.schedule, curve.course
    last = f"step {curve.end:,}" if curve.end < total else "last step"
    last += f" {curve.lr(curve.end):.2e}"
    if course is None:
        first = f"step {curve.step + 1} {curve.lr(curve.step + 1):.2e}"
        return (
            f"{schedule.name}: {first}, peak {curve.peak_lr:.2e} at step {curve.step + max(1, schedule.warmup_steps)}, {last}"
        )
    now = f"{schedule.name}: step {min(step + 1, total):,} {curve.lr(min(step + 1, total)):.2e}, {last}"
    done = f", {course.decayed:.0%} of the decay was done by then" if course.decayed else ""
    return f"{now}; since step {curve.step + course.step:,}, when length, batch or schedule changed{done}"


def log_step(run: Run, clock: Clock, stage: Stage, lr: float, update_check: UpdateCheck | None) -> None:
    """Logs the interval since the previous logging line, which lies in `stage`. A collective."""
    timer = run.engine.forward_timer
    of_rank = run.probe.read(timer.read(), clock.data_seconds) if timer else ()
    progress, figures = run.progress, run.meter.read(run.engine.all_reduce, of_rank)
    seconds, of_ranks = clock.train_seconds, [RankFigures(*row) for row in figures["ranks"] if row]
    progress.tokens += figures["interval_tokens"]
    progress.skipped_steps += figures["skipped_steps"]
    progress.train_seconds += seconds
    progress.data_seconds += clock.data_seconds
    progress.loss = figures["loss"] if math.isfinite(figures["loss"]) else None
    rate, eta = figures["interval_tokens"] / seconds, seconds_left(run, clock)
    record = {
        "step": progress.step,
        "loss": figures["loss"],
        **figures["sources"],
        "perplexity": perplexity(figures["loss"]),
        "grad_norm": figures["grad_norm"],
        "lr": lr,
        "tokens": progress.tokens,
        "epoch": run.data.epochs(progress.position),
        "tokens_per_second": rate,
        "data_seconds": clock.data_seconds,
        **(spread(of_ranks) if of_ranks else {}),
        **figures["memory"],
        "skipped_steps": progress.skipped_steps,
        "eta_seconds": eta,
        "goodput": progress.train_seconds / max(progress.train_seconds, time.time() - progress.started),
        "train_hours": progress.train_seconds / 3600,
        **_model_flops_utilization(run, stage.config.data.sequence_length, figures["attended"], rate),
        **figures["routing"],
    }
    clock.restart(seconds)  # which are in `progress` now
    with clock.paused():
        checked, warnings = update_check.figures(lr) if update_check and not figures["skipped_in_a_row"] else ({}, [])
        run.sinks.log(record | run.ledger.figures(progress, eta) | checked | reality.figures(run, rate))
        for warning in warnings:
            run.sinks.info(f"step {progress.step}: {warning}")
        _report_slow_ranks(run, stage, of_ranks, seconds, figures["steps"])
    _report_compiler(run, "steps", f"{seconds:.1f} s up to step {progress.step}")
    if progress.step == 1:
        run.sinks.info(
            untrained.first_step(figures["loss"], run.model.vocab_size, trained=bool(run.config.model.from_pretrained))
        )


def _report_slow_ranks(run: Run, stage: Stage, of_ranks: list[RankFigures], seconds: float, steps: int) -> None:
    """Names ranks that slow all others down, once they have done so for long enough. Rank 0 judges."""
    step = run.progress.step
    if run.engine.rank > 0 or step == 1 or not of_ranks:
        return
    batch = stage.config.batch
    passes = batch.global_batch_size // run.engine.mesh.sample_ranks // batch.micro_batch_size
    if slow := run.slow_ranks.add(of_ranks, seconds, steps, passes):
        hosts = run.engine.watchdog.hosts()
        text = named(slow, hosts)
        record = {"slow_rank": slow.rank, "slow_host": hosts[slow.rank], "slow_ratio": slow.ratio, "slow_cause": slow.cause}
        run.sinks.log({"step": step, **record, "slow_ranks": slow.ranks, "text": text})
        run.sinks.info(f"warning    step {step}: {text}")


def log_stage(run: Run, ended: Stage) -> None:
    """Logs that a stage has begun, if the last step was the last one of `ended`, and what changes."""
    stage, step = run.stage, run.progress.step
    if stage is ended or step == run.total_steps:
        return
    changes = receipt.stage_change(run.length, run.data, ended, stage)
    if _shape(stage) != _shape(ended):  # what compiles for it is reported like that of first steps, not as a surprise
        run.graphs.pop("steps", None)
    run.sinks.info(f"stage      {stage.number} begins after step {step:,}: {changes}")
    shares = run.data.stages[stage.number].shares
    record = {"sequence_length": stage.config.data.sequence_length, "global_batch_size": stage.config.batch.global_batch_size}
    record["shares"] = {source.name: share for source, share in zip(run.data.sources, shares, strict=True) if share}
    run.sinks.log({"step": step, "stage": stage.number, **record})


def _shape(stage: Stage) -> tuple[int, int]:
    """(B, T) of its micro-batches."""
    return stage.config.batch.micro_batch_size, stage.config.data.sequence_length


def _report_compiler(run: Run, what: str, where: str) -> None:
    """Reports what was compiled for the first steps, or the first validation, of this start (`what`), and warns of what is
    compiled later: it delays all ranks and means that a shape or a setting has changed."""
    if run.engine.compiled == "none":
        return
    count, before = graphs(), run.graphs.get("all", 0)
    if what not in run.graphs:
        run.sinks.info(f"compile    {where}, {compile_report()}")
    elif count > before:
        run.sinks.info(f"warning    {where}, {count - before} graphs compiled again; TORCH_LOGS=recompiles tells why")
    run.graphs |= {what: count, "all": count}


def seconds_left(run: Run, clock: Clock) -> float:
    """Until the last checkpoint, from a logging line or the end of a job on: steps, validations and saves, as measured in this
    start.

    Before the first of them, a validation is estimated by its forward passes, and a save by its bytes.
    """
    config, step, total = run.config, run.progress.step, run.total_steps
    per_step = clock.seconds_per_step(step)
    validations = _still_due(step, total, config.evaluate.every_steps) if run.valid else 0
    saves = _still_due(step, total, config.checkpoint.every_steps)
    most = (config.evaluate.max_batches or math.inf) * config.batch.global_batch_size
    guess = FORWARD_SHARE * per_step * sum(min(each.num_samples, most) for each in run.valid) / config.batch.global_batch_size
    validation = statistics.median(clock.pauses["validation"] or [guess])
    last = save_seconds(run)
    save = statistics.median(clock.pauses["save"] or [0.0 if config.checkpoint.asynchronous else last])
    seconds = (total - step) * per_step + validations * validation + (saves - 1) * save + last
    if run.tasks:
        guess = FORWARD_SHARE * per_step * task_share(run)
        each = statistics.median(clock.pauses["tasks"] or [guess])
        seconds += _still_due(step, total, task_steps(config.evaluate)) * each
    if minutes := 60 * config.checkpoint.every_minutes:
        seconds += seconds // minutes * save
    return seconds


def task_steps(settings: EvaluateConfig) -> int:
    """Steps between measurements of the tasks; 0: only at the end."""
    return settings.tasks_every_steps or settings.every_steps


def task_share(run: Run) -> float:
    """Tokens of all tasks, without padding, as a fraction of those of a step."""
    return sum(task.tokens for task in run.tasks) / stages.tokens_per_step(run.config)


def pass_tokens(run: Run) -> int:
    """Tokens of a forward pass in a validation, which is known to fit."""
    return run.config.batch.micro_batch_size * run.config.data.sequence_length


def save_seconds(run: Run) -> float:
    """From the beginning of a save to its checkpoint on the disk: the last one, before there is one estimated by its bytes."""
    return run.saver.write_seconds or flops.state_bytes(run.model) / SAVED_BYTES_PER_SECOND


def _cost_lines(run: Run) -> list[str]:
    """What the plan expects of a run that has a price and begins now, which its account notes; none where it knows no speed."""
    ledger, budget = run.ledger, run.config.run.budget_dollars
    if not run.config.run.dollars_per_hour or run.progress.step or ledger.planned:
        return []
    ledger.planned = plan = reality.planned(run)
    if plan is None:
        return []
    line = f"plan       {human_dollars(plan.dollars)} in {human_seconds(3600 * plan.hours)}, by the settings and the data sheet"
    if budget is not None and plan.dollars > budget:
        line += f"; run.budget_dollars ({human_dollars(budget)}) ends it after about {budget / plan.dollars:.0%} of that"
    return [line]


def _task_lines(run: Run) -> list[str]:
    """What the tasks are, and what they cost."""
    if not run.tasks:
        return []
    every = task_steps(run.config.evaluate)
    items = sum(len(task.items) for task in run.tasks)
    line = f"{items:,} items of {len(run.tasks)} tasks ({', '.join(task.name for task in run.tasks)}), "
    line += f"{sum(task.tokens for task in run.tasks):,} tokens"
    if every:
        line += f" every {every:,} steps: about {FORWARD_SHARE * task_share(run) / every:.2%} of the time"
    return [f"tasks      {line}"]


def seconds_to_stop(run: Run) -> float:
    """From the last step to the end of the job: a save and its upload to the mirror, each as long as the last one."""
    return save_seconds(run) + run.mirror.upload_seconds


def _still_due(step: int, total: int, every: int) -> int:
    """How often something is due from `step` to `total`, both included: every `every` steps (0: never) and at the end."""
    return 1 + ((total - 1) // every - (step - 1) // every if every and step < total else 0)


def _model_flops_utilization(run: Run, length: int, attended: list[float], tokens_per_second: float) -> dict[str, float]:
    """mfu and mfu_causal; empty where the peak of the device is unknown. attended: sums of `flops.Attended`."""
    device = devices.find(run.engine.device_name)
    peak_tflops = run.config.log.peak_tflops or (device and device.bf16_tflops)
    if not peak_tflops:
        return {}
    peak, pairs = run.engine.world_size * peak_tflops * 1e12, flops.Attended(*attended)
    return {
        name: flops.flops_per_token(run.model, length, causal, pairs if pairs.tokens else None) * tokens_per_second / peak
        for name, causal in (("mfu", False), ("mfu_causal", True))
    }


def log_validation(run: Run, figures: dict[str, float], generated: list[dict[str, str]]) -> None:
    """Logs a validation and the texts generated after it, and warns once of an alarming curve."""
    progress = run.progress
    tokens = progress.tokens + run.meter.interval_tokens  # of this step, which need not have a logging line
    if run.expected:
        figures = figures | run.expected.figures(progress.step / run.total_steps)
    run.sinks.log({"step": progress.step, "tokens": tokens, **figures})
    _report_place(run, figures)
    _report_compiler(run, "validation", f"validation at step {progress.step}")
    if generated:
        run.sinks.log({"step": progress.step, "generated": generated})
    if run.sinks.keeps_metrics:
        found = _verdict(run)
        if found.is_alarm and found.kind != run.verdict:
            run.sinks.info(f"step {progress.step}: {found.text}")
        run.verdict = found.kind


def log_tasks(run: Run, figures: dict[str, float | str]) -> None:
    """Logs how the tasks were answered."""
    tokens = run.progress.tokens + run.meter.interval_tokens
    run.sinks.log({"step": run.progress.step, "tokens": tokens, **figures})


def _report_place(run: Run, figures: dict[str, float]) -> None:
    """Raises the alarm when a validation is outside the band that a ladder expects, and the one before was not."""
    place = expected.side(figures)
    if place in ("above", "below") and place != run.side:
        advice = {
            "above": "data, learning rate or settings may differ from those of the small runs",
            "below": "it is better than small runs predict, or its validation set is not what it was for them",
        }[place]
        run.sinks.alarm("off_course", f"validation loss {figures['val_loss']:.4f}: {expected.words(figures)}; {advice}")
    run.side = place or run.side


def close_account(run: Run, status: int) -> None:
    """Writes the invoice, and its summary for people: what this run has cost so far, and its time."""
    try:
        for line in run.ledger.end(status, run.progress):
            run.sinks.info(line)
    except OSError as error:  # the checkpoint is durable, and that matters more
        run.sinks.info(f"invoice    not written: {error}")


def finish(run: Run) -> None:
    """Draws the loss curve, writes the page about the run, and prints the verdict on the curve."""
    if not run.sinks.keeps_metrics:
        return
    from pretrain.report.plot import plot_runs  # rank 0 alone draws, at the end

    picture = run.directory.path / "plots" / "loss.png"
    try:
        plot_runs([run.directory.path], picture)
        run.sinks.image("loss_curve", picture)  # `loss` is the number of this step
        run.sinks.info(f"curve      {picture}")
    except (RecordsError, OSError) as error:  # metrics.jsonl was removed, or the disk is full; the run is done
        run.sinks.info(f"curve      none: {error}")
    write_page(run)
    run.sinks.info(f"result     {_verdict(run).text}")


def write_page(run: Run) -> None:
    """Writes report.html into the run's folder, from its files."""
    if not run.sinks.keeps_metrics:
        return
    path = run.directory.path / page.FILE_NAME
    try:
        page.write_page(View(run.directory.path).read_all(), path, _verdict(run).text)
        run.sinks.info(f"report     {path}")
    except OSError as error:  # the disk is full; the run is done
        run.sinks.info(f"report     none: {error}")


def _verdict(run: Run) -> verdict.Verdict:
    """The verdict on the curve so far."""
    train, valid = run.sinks.losses.train.columns, run.sinks.losses.valid.columns
    passes = [] if run.config.data.synthetic else run.data.passes(run.progress.position)
    return verdict.judge(verdict.Curve(*train, *valid, max(passes, default=math.nan)), run.data.reference_lines)
