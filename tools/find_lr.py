"""Finds a learning rate by short probes, and says how sure that is.

    python tools/find_lr.py --config configs/quickstart.yaml
    python tools/find_lr.py --run runs/quickstart --step 200

A probe is a short run with a warm-up, its own peak learning rate and a decay to 0 at its end, from the initial weights of the
settings or, with --run, from a checkpoint: its weights, moments and data position; nothing is written to that run's folder.
The probes of one repeat have the same weights and data, and each ends with a validation on the same samples. The first repeat
visits --points rates; where the best one lies at the edge it adds more, unless --lrs sets the ends. The others, with other data
(and from the start, other weights), visit the best rate and two neighbours on each side.

Written to --output: probes.jsonl (every probe, as soon as it ends: the same command continues an interrupted search),
find_lr.json and find_lr.png. One process is enough, whatever engine.world_size says; a model that one device cannot hold is
probed under `accelerate launch`, as it is trained. docs/running.md says how far such probes can be trusted.

Exit status: 0 there is a recommendation; 2 there is none (the output says why), or the command is wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain import UserError, files
from pretrain.checkpoint.manifest import Checkpoint, checkpoints
from pretrain.config import CheckpointConfig, Config, ConfigError, load, validate
from pretrain.engines.place import Place, read_place
from pretrain.files import write_atomically
from pretrain.optim.lr_search import Answer, Grid, Losses, answer, grid_around, grid_between, next_probe
from pretrain.report.units import human_count, human_seconds
from pretrain.run import command_line

if TYPE_CHECKING:
    from pretrain.probe import Bench

# Power of the length with which the best rate falls, with a constant batch: published are -0.32 for AdamW (Bjorck et al. 2025,
# arXiv 2409.19913) and -0.56 for Scion, a relative of Muon (Filatov et al. 2025, arXiv 2510.03871).
EXPONENT = -0.3
MEASURED = (-0.6, -0.05)  # between these it was in our measurements (docs/running.md), of runs up to
LONGEST = 16  # times as long as the probes
MESSAGE_SECONDS = 15.0


def main(argv: list[str]) -> int:
    """-> exit status."""
    parser = make_parser()
    options, words = command_line.parse_with_settings(parser, argv)
    check_flags(parser, options)
    place = read_place()
    config = read_settings(options, words, place)
    checkpoint = find_checkpoint(options.run, options.step) if options.run else None
    name = config.run.name + (f"_step_{checkpoint.step}" if checkpoint else "")
    output = options.output or Path(config.run.directory) / "find_lr" / name
    grid = grid_between(*options.lrs, options.points) if options.lrs else grid_around(config.optimizer.lr, options.points)
    try:
        return search(config, options, checkpoint, grid, output, place)
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command continues with the probes in {output}", end="", file=sys.stderr)
        raise


# ---------------------------------------------------------------- flags and settings


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = command_line.make_parser(__doc__)
    command_line.add_settings(parser)
    add = parser.add_argument
    add("--run", type=Path, metavar="FOLDER", help="probe from a checkpoint of this run, with its settings; --config and "
        "settings override them")  # fmt: skip
    add("--step", metavar="N|best", help="with --run: the checkpoint of this step, or best (default: the newest)")
    add("--lrs", nargs=2, type=positive, metavar=("LOW", "HIGH"), help="ends of the grid (default: around optimizer.lr, each "
        "rate twice the one before, and more where the best one is at an edge)")  # fmt: skip
    add("--points", type=command_line.at_least(3), default=7, metavar="N", help="rates of the grid (default: %(default)s)")
    add("--steps", type=command_line.at_least(10), default=40, metavar="N", help="steps of a probe (default: %(default)s)")
    add("--repeats", type=command_line.at_least(2), default=3, metavar="N", help="probes of the rates around the best one; "
        "their spread is the noise (default: %(default)s)")  # fmt: skip
    add("--output", type=Path, metavar="FOLDER", help="(default: <run.directory>/find_lr/<run.name>)")
    return parser


def positive(text: str) -> float:
    """The type of a flag that takes a learning rate."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, must be above 0")
    return value


def check_flags(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program with status 2 for flags that contradict each other."""
    if options.lrs and options.lrs[0] >= options.lrs[1]:
        parser.error(f"--lrs: got {options.lrs[0]:g} {options.lrs[1]:g}, the first must be below the second")
    if options.step is not None and not options.run:
        parser.error("--step needs --run, which names the run of that step")
    if options.step not in (None, "best") and not options.step.isdecimal():
        parser.error(f"--step: got {options.step!r}, allowed: a number or best")


def read_settings(options: argparse.Namespace, words: list[str], place: Place) -> Config:
    """The settings of the probes; one process without a launcher takes the place of all ranks. Raises ConfigError."""
    if options.run:
        if not (options.run / "config.yaml").exists():
            raise UserError(f"--run: {options.run} has no config.yaml; give the folder of a run, such as runs/quickstart")
        words = ["--config", str(options.run / "config.yaml"), *words]
    config = load(words, world_size=None, program="tools/find_lr.py")
    if not place.launched:
        config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, world_size=None))
    if problems := validate(config, place.world_size):
        raise ConfigError(problems)
    # Nothing is saved or mirrored, and another run's checkpoints do not matter.
    alone = CheckpointConfig(allow_changes=config.checkpoint.allow_changes)
    return dataclasses.replace(config, checkpoint=alone)


def find_checkpoint(run: Path, step: str | None) -> Checkpoint:
    """The checkpoint of a step, the best or the newest one, unverified. Raises UserError."""
    from pretrain.checkpoint.storage import best_key  # imports torch

    found = checkpoints(run / "checkpoints")
    if not found:
        raise UserError(f"--run: {run / 'checkpoints'} holds no checkpoint; without --run, probes start from initial weights")
    if step == "best":
        return min(found, key=lambda each: best_key(each.state()))
    chosen = next((each for each in found if step is None or each.step == int(step)), None)
    if chosen is None:
        raise UserError(
            f"--step: {run} has no checkpoint of step {step}; it has: {', '.join(str(each.step) for each in found)}"
        )
    return chosen


# ---------------------------------------------------------------- the search


class Found(NamedTuple):
    """The probes of a search so far."""

    records: list[dict]

    @property
    def losses(self) -> Losses:
        """What `next_probe` takes."""
        return {(each["lr"], each["repeat"]): math.inf if each["diverged"] else each["val_loss"] for each in self.records}


def search(
    config: Config, options: argparse.Namespace, checkpoint: Checkpoint | None, grid: Grid, output: Path, place: Place
) -> int:
    """Probes until there is enough, and reports. -> exit status."""
    from pretrain.probe import Bench  # torch is imported here, after the settings are known to be right

    bench = Bench(config, place, checkpoint, options.steps, options.repeats)
    first, path = place.rank == 0, output / "probes.jsonl"
    found = Found(read_probes(path, bench.settings()))  # by every rank
    if bench.engine.broadcast(len(found.records)) != len(found.records):
        raise UserError(f"{path}: rank {place.rank} does not see the probes of rank 0; use a folder that all machines share")
    if first:
        output.mkdir(parents=True, exist_ok=True)
        lines = [{"settings": bench.settings()}, *found.records]  # without what a killed process left of a line
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
        for line in announce(bench, options, grid, found, output):
            print(line, flush=True)
    bench.engine.barrier()
    began, steps, clock = time.monotonic(), 0, Clock()
    while chosen := next_probe(found.losses, grid, options.repeats):
        expected = max(len(found.records) + 1, expected_probes(grid, options.repeats))
        record = bench.probe(*chosen, clock.message(first, *chosen, bench.steps))
        found.records.append(record)
        steps += 1
        if first:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
            left = (time.monotonic() - began) / steps * max(0, expected - len(found.records))
            print(f"{describe(record)}  {len(found.records)} of about {expected}, {human_seconds(left)} left", flush=True)
    result = answer(found.losses, grid, options.repeats)
    if first:
        report(bench, options, found, result, output)
    bench.close()
    return 0 if result.lr else 2


def expected_probes(grid: Grid, repeats: int) -> int:
    """Probes of a search whose grid need not grow."""
    return len(grid.lrs) + (repeats - 1) * min(5, len(grid.lrs))


def read_probes(path: Path, settings: dict[str, Any]) -> list[dict]:
    """Those of an earlier start of this search. Raises UserError if the folder holds another search."""
    if not path.exists():
        return []
    head, *records = files.read_json_lines(path).records or [{}]
    before, now = head.get("settings") or {}, json.loads(json.dumps(settings))
    if differing := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
        raise UserError(
            f"{path}: holds probes with another {', '.join(differing)}; choose another --output, or remove the folder"
        )
    return records


class Clock:
    """Messages of long probes, on standard error."""

    def message(self, shown: bool, lr: float, repeat: int, steps: int):
        """A function to call after each step of a probe."""
        began = told = time.monotonic()

        def on_step(step: int) -> None:
            nonlocal told
            if shown and (now := time.monotonic()) - told > MESSAGE_SECONDS:
                told, left = now, (now - began) / step * (steps - step)
                print(f"lr {lr:g}, repeat {repeat + 1}: step {step} of {steps}, {human_seconds(left)} left", file=sys.stderr)

        return on_step


# ---------------------------------------------------------------- what is printed and written


def announce(bench: Bench, options: argparse.Namespace, grid: Grid, found: Found, output: Path) -> list[str]:
    """What the search is about to do."""
    expected = expected_probes(grid, options.repeats)
    tokens = bench.batch.global_batch_size * bench.stage.config.data.sequence_length
    start = f"step {bench.start_step} of {bench.found.path.parent.parent}" if bench.found else "the initial weights"
    valid = "training samples that no probe trains on" if bench.held_out else "the validation data"
    lines = [
        f"about {expected} probes from {start}: {expected * bench.steps:,} steps of {tokens:,} tokens, "
        f"{human_count(expected * bench.steps * tokens)} tokens in all; {bench.engine.world_size} process(es), "
        f"{bench.engine.device_name}, {bench.engine.precision}",
        f"each {bench.steps} steps: warm-up {bench.warmup_steps}, decay to 0 over the last {bench.decay_steps}; "
        f"then {bench.validation_samples:,} samples of {valid}",
        f"rates {grid.lrs[0]:g} to {grid.lrs[-1]:g}; {options.repeats} repeats; files in {output}",
    ]
    if found.records:
        lines.append(f"{len(found.records)} probes of an earlier start are done")
    if bench.held_out and bench.position_of(options.repeats) - bench.position > bench.data.samples_per_epoch:
        lines.append("note: the data is too small for that: what is held out was trained on, which favours high rates")
    return lines


def describe(record: dict) -> str:
    """One probe in a line."""
    loss = "diverged" if record["diverged"] else f"{record['val_loss']:8.4f}"
    unstable = " (unstable: the training loss rose)" if record["unstable"] and not record["diverged"] else ""
    return f"lr {record['lr']:<9g} repeat {record['repeat'] + 1}  loss {loss:>8}{unstable}  {record['seconds']:.1f} s "


def report(bench: Bench, options: argparse.Namespace, found: Found, result: Answer, output: Path) -> None:
    """Prints the table and the verdict, and writes find_lr.json and find_lr.png."""
    from pretrain.report.plot_lr import plot_lr

    unstable = {each["lr"] for each in found.records if each["unstable"]}
    print(f"\n{'lr':>10}  {'loss':>8}  {'worse by':>8}  {'noise':>7}  repeats")
    for row in result.rows:
        remark = "diverged" if row.diverged else "unstable" if row.lr in unstable else ""
        if row.diverged and row.diverged < row.repeats:
            remark = f"diverged in {row.diverged} of {row.repeats}"
        if row.as_good:
            remark = " ".join(["as good as the best", *([f"({remark})"] if remark else [])])
        noise = "" if row.noise is None else f"{row.noise:.4f}"
        loss, worse = (f"{value:.4f}" if math.isfinite(value) else "-" for value in (row.loss, row.worse))
        print(f"{row.lr:>10g}  {loss:>8}  {worse:>8}  {noise:>7}  {row.repeats:>7}  {remark}".rstrip())
    content = {"settings": bench.settings(), "probes": found.records, **as_json(result)}
    content["lr_of_the_run"] = for_the_run(result.lr, bench) if result.lr else None
    print()
    for line in verdict(result, bench):
        print(line)
    write_atomically(output / "find_lr.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    plot_lr(content, f"{bench.steps} steps, {options.repeats} repeats", output / "find_lr.png")
    print(f"{output / 'find_lr.png'}, {output / 'find_lr.json'}")


def as_json(result: Answer) -> dict[str, Any]:
    """For find_lr.json: null where a number is not finite."""
    rows = [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row._asdict().items()}
        for row in result.rows
    ]
    return {**result._asdict(), "rows": rows}


def for_the_run(lr: float, bench: Bench) -> tuple[float, float, float] | None:
    """(rate, lowest, highest) for the entire run, which is longer than the probes; None: it is not, or it is under way."""
    ratio = bench.total_steps / bench.steps
    if ratio <= 1 or bench.found:
        return None
    return tuple(float(f"{lr * ratio**exponent:.2g}") for exponent in (EXPONENT, *MEASURED))


def verdict(result: Answer, bench: Bench) -> list[str]:
    """What the search found, in sentences, and the flag to copy."""
    lines = []
    if result.diverges_from:
        lines.append(f"training diverges from a rate of {result.diverges_from:g} on")
    if result.lr is None:
        return [*lines, f"no recommendation: {result.why}"]
    low, high = result.interval
    best = f"best for {bench.steps} steps: {result.lr:g} (80 % interval {low:.2g} to {high:.2g})"
    good = [row.lr for row in result.rows if row.as_good]
    if len(good) > 1:
        best += f"; between {good[0]:g} and {good[-1]:g} no difference is larger than the noise"
    lines.append(best)
    if bench.found:
        lines.append(f"that is for {bench.steps} steps from here, with a decay at their end; more steps need a lower rate")
    recommended = result.lr
    if longer := for_the_run(result.lr, bench):
        ratio, (recommended, low, high) = bench.total_steps / bench.steps, longer
        lines.append(
            f"the run is {ratio:.3g} times as long, and longer runs need lower rates: {recommended:g} ({low:g} to {high:g})"
        )
        if ratio > LONGEST:
            enough = math.ceil(bench.total_steps / LONGEST)
            lines.append(
                f"note: this was measured up to {LONGEST} times the length of the probes; --steps {enough} stays within that"
            )
    return [*lines, f"--optimizer.lr {recommended:g}"]


if __name__ == "__main__":
    sys.exit(command_line.run(main))
