"""What a run will consume, before it starts: length, learning rates, and the tokens and epochs of each source in each stage."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain import stages
from pretrain.config import Config, batch_product
from pretrain.data.batches import TrainData
from pretrain.model import flops
from pretrain.run.length import Length
from pretrain.run.parts import Parts
from pretrain.stages import Stage


def run_facts(config: Config, parts: Parts, length: Length, ranks: int | None) -> list[str]:
    """Lines about length, learning rates as the engine will get them, stages, and passes over each source."""
    steps, total = length.total_steps, flops.num_parameters(parts.model).total
    lines = [
        f"model: {total:,} parameters, vocabulary {parts.model.vocab_size:,}",
        f"length: {steps:,} steps = {length.tokens:,} tokens = {length.tokens / total:.3g} tokens per parameter",
        *_rate_lines(length),
        *stage_lines(length, parts.data, ranks),
    ]
    passes = zip(parts.data.sources, parts.data.passes(length.position), strict=True)
    return lines + [f"{source.name}: read {times:.3g} times" for source, times in passes]


def _rate_lines(length: Length) -> Iterator[str]:
    """The learning rate of each curve where it turns."""
    for curve in length.curves:
        first, end, middle = curve.step + 1, curve.end, (curve.step + curve.end) // 2
        places = {"end of warm-up": curve.step + max(1, curve.schedule.warmup_steps), "middle": max(first, middle), "last": end}
        places = {f"step {first:,}" if curve.step else "step 1": first} | places
        if curve.course:  # the run has changed at this step
            places = {"next step": min(curve.step + curve.course.step + 1, end), "last": end}
        rates = ", ".join(f"{name} ({at:,}) {curve.lr(at):.3g}" for name, at in places.items())
        yield f"learning rate ({curve.schedule.name}): {rates}"


def stage_lines(length: Length, data: TrainData, ranks: int | None = None) -> Iterator[str]:
    """The receipt of a run with stages: for each its steps, tokens, batch and rates, then tokens and epochs of each source.

    Nothing for a run without stages. data: as `length.place` returns it.
    """
    if len(length.stages) == 1:
        return
    ends = [(stage.step, stage.position, stage.tokens) for stage in length.stages[1:]]
    ends.append((length.total_steps, length.position, length.tokens))
    for stage, (step, position, tokens) in zip(length.stages, ends, strict=True):
        batch, first = stage.config.batch.global_batch_size, stage.step + 1
        size = batch_product(stage.config, ranks) if ranks else f"{batch} sequences per step"
        line = f"stage {stage.number}: steps {first:,} to {step:,}, {tokens - stage.tokens:,} tokens; "
        line += f"{size}; times {stage.config.data.sequence_length:,} tokens"
        if stage.step >= length.curves[0].step:  # earlier rates are history
            line += f"; learning rate {length.lr(first):.3g} to {length.lr(step):.3g}" if step > stage.step else ""
        yield line
        before, after = data.passes(stage.position), data.passes(position)
        for source, share, start, end in zip(data.sources, data.stages[stage.number].shares, before, after, strict=True):
            if share:
                read = share * (tokens - stage.tokens)
                yield f"  {source.name}: {100 * share:.4g} %, {read:,.0f} tokens, epochs {start:.3g} to {end:.3g}"


def stage_change(length: Length, data: TrainData, before: Stage, after: Stage) -> str:
    """What changes between two stages, in words."""

    def described(stage: Stage) -> dict[str, str]:
        config, shares = stage.config, zip(data.sources, data.stages[stage.number].shares, strict=True)
        return {
            "sources": ", ".join(f"{100 * share:.4g} % {source.name}" for source, share in shares if share),
            "sequence_length": f"{config.data.sequence_length:,}",
            "global_batch_size": f"{config.batch.global_batch_size:,}",
            "micro_batch_size": f"{config.batch.micro_batch_size:,}",
            "tokens per step": f"{stages.tokens_per_step(config):,}",
        }

    old, new = described(before), described(after)
    changes = [f"{key} {old[key]} -> {new[key]}" for key in old if old[key] != new[key]]
    curve, first = length.curve(after.step + 1), after.step + 1
    if curve.step == after.step:
        rates = f"{length.lr(after.step):.3g} -> {curve.lr(first):.3g}"
        changes.append(f"learning rate {rates}, {curve.schedule.name} until step {curve.end:,}")
    return "; ".join(changes)
