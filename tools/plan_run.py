"""Plans a run before anything is rented: does it fit, how long does it take, what does it cost, and what would be cheaper?

    python tools/plan_run.py --config configs/cloud.yaml --gpus 8 --gpu h100 --dollars-per-hour 2.50

It needs no GPU and no data. Within seconds it prints the run (parameters, FLOPs, tokens), the memory of a rank under every
engine, kind of parallelism and activation checkpointing, the largest micro-batch that fits, messages, time, money, how often
to save, and what would be cheaper, with the flags. These are formulas. Then it trains one step of the configuration, and of
the best one on these GPUs, on a GPU that is not there (a dry run, as tools/check_run.py --device), which counts their memory
exactly; --quick leaves that out. docs/planning.md explains every figure.

--dollars-per-hour is the price of one GPU. --mfu states the fraction of the GPU's peak that the run will reach; --run takes
the ratio of reality to plan, of speed and of memory, from a run on the same kind of GPU; else both are estimated. Spot
machines: --spot-discount 0.6 (the share of the price that they save) with --preemptions-per-hour (of one machine).

Exit status: 0 the configuration fits; 2 it does not, or the command is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain import UserError, devices, stages
from pretrain.config import Config, ConfigError, load, validate
from pretrain.files import write_atomically
from pretrain.model.config import ModelConfig, resolve_model, vocabulary
from pretrain.plan import choices
from pretrain.plan.choices import Job, Plan
from pretrain.plan.cost import length_of
from pretrain.plan.scaling import Cluster
from pretrain.plan.summary import RESTART_SECONDS, STORE_GB_PER_SECOND, Market, Terms, flags, summary
from pretrain.report import plan_table
from pretrain.run import command_line

MOST_TRIED = 4  # dry runs in search of the best way that fits
MOST_GPUS = 4096  # among which a number is sought that fits


def main(argv: list[str]) -> int:
    """-> exit status."""
    parser = make_parser()
    options, settings = command_line.parse_with_settings(parser, argv)
    check_flags(parser, options)
    if options.dollars_per_hour:
        settings = [*settings, "--run.dollars_per_hour", str(options.dollars_per_hour)]
    config = load(settings, world_size=None, program="tools/plan_run.py")
    gpus = options.gpus or (options.nodes or 0) * options.gpus_per_node or config.engine.world_size or 8
    cluster = Cluster(devices.find(options.gpu), gpus, options.gpus_per_node, options.network_gb_per_second)
    if problems := validate(config, gpus):
        raise ConfigError(problems)
    model = open_model(config)
    length, largest = length_of(stages.layout(config), model, steps_of(config)), stages.largest(config)
    largest = dataclasses.replace(
        largest, engine=dataclasses.replace(largest.engine, precision=config.engine.precision or "bf16")
    )
    measured = measured_ratios(options.run, cluster.device) if options.run else Ratios(None, None)
    batch = largest.batch
    job = Job(
        model,
        largest.data.sequence_length,
        batch.global_batch_size,
        config.optimizer.name,
        measured.memory or 1.0,
        config.optimizer.averages,
        config.optimizer.average_bytes,
    )
    configured = choices.plan(job, largest.engine, batch.micro_batch_size, cluster, largest.engine.compile != "none")
    asked = terms(options, config, configured.time.mfu, measured)
    others = alternatives(cluster, options, lambda each: bool(choices.recommended(job, largest.engine, each)))
    found = summary(job, length, configured, others, asked)
    if config.train.stages:
        print(
            f"of {len(config.train.stages) + 1} stages, memory and speed are those of the one with the largest forward passes"
        )
    for line in plan_table.lines(found):
        print(line)
    if not options.quick:
        found["exact"] = dry_runs(largest, job, configured, asked)
        print()
        for line in plan_table.exact_lines(found["exact"], cluster.device.memory_gib):
            print(line)
    if options.json:
        write_atomically(options.json, json.dumps(found, indent=1, allow_nan=False) + "\n")
    if options.plot:
        from pretrain.report.plot_plan import plot_plan

        plot_plan(found, plan_table.shown_rows(found), options.plot)
    fits = configured.fits if options.quick else found["exact"][0]["fits"]
    return 0 if fits else 2


# ---------------------------------------------------------------- flags


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = command_line.make_parser(__doc__)
    command_line.add_settings(parser)
    add, whole, positive, fraction = parser.add_argument, command_line.at_least(1), number(0), number(0, 1)
    add("--gpu", default="h100", metavar="NAME", help="kind of GPU (default: %(default)s)")
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--gpus", type=whole, metavar="N", help="number of GPUs (default: engine.world_size, else 8)")
    count.add_argument("--nodes", type=whole, metavar="N", help="the same, in full nodes")
    add("--gpus-per-node", type=whole, default=8, metavar="N", help="(default: %(default)s)")
    add("--network-gb-per-second", type=positive, default=400.0, metavar="GB", help="of a node, in one direction, to other "
        "nodes (default: %(default)g, eight cards of 400 Gbit/s)")  # fmt: skip
    add("--dollars-per-hour", type=positive, metavar="USD", help="price of one GPU (default: run.dollars_per_hour)")
    add("--compare", nargs="+", default=[], metavar="GPU=USD", help="other kinds of GPU with their price, such as a100=1.29")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--mfu", type=fraction, metavar="X", help="fraction of the GPU's peak that the configuration reaches, "
                      "such as 0.4 (default: estimated)")  # fmt: skip
    rate.add_argument("--run", type=Path, metavar="FOLDER", help="a run on this kind of GPU, whose plan.json says how fast it "
                      "was, and how much memory it took")  # fmt: skip
    add("--preemptions-per-hour", type=number(0, least_too=True), metavar="X", help="of one machine; 0: none (default: "
        "failures alone, one per 50,700 GPU-hours, as published)")  # fmt: skip
    add("--spot-discount", type=fraction, metavar="X", help="share of the price that spot machines save; then "
        "--preemptions-per-hour is theirs")  # fmt: skip
    add("--restart-minutes", type=positive, default=RESTART_SECONDS / 60, metavar="MIN",
        help="from an interruption to the next step (default: %(default)g)")  # fmt: skip
    add("--store-gb-per-second", type=positive, default=STORE_GB_PER_SECOND, metavar="GB",
        help="rate at which all machines together write to their disks, and rank 0 uploads to checkpoint.mirror (default: "
        "%(default)g)")  # fmt: skip
    add("--quick", action="store_true", help="formulas alone, without dry runs")
    add("--json", type=Path, metavar="FILE", help="also write the plan as JSON")
    add("--plot", type=Path, metavar="FILE", help="also draw the memory of each way as a PNG")
    return parser


def number(least: float, below: float = math.inf, *, least_too: bool = False) -> Callable[[str], float]:
    """The type of a flag that takes a number between these two."""

    def convert(text: str) -> float:
        value = float(text)
        if not (least < value < below or (least_too and value == least)):
            above = "at least" if least_too else "above"
            raise argparse.ArgumentTypeError(
                f"got {text}, must be {above} {least:g}{f' and below {below:g}' * (below < math.inf)}"
            )
        return value

    convert.__name__ = "number"  # argparse names the type when float() fails
    return convert


def check_flags(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program with status 2 for flags that say nothing, or contradict each other."""
    compared = []
    for flag, name in [("--gpu", options.gpu), *(("--compare", each.partition("=")[0]) for each in options.compare)]:
        if devices.find(name) is None:
            parser.error(f"{flag}: {name!r} is not known; allowed: {', '.join(devices.names())}")
    for each in options.compare:
        try:
            compared.append((devices.find(each.partition("=")[0]), number(0)(each.partition("=")[2])))
        except (ValueError, argparse.ArgumentTypeError):
            parser.error(f"--compare: got {each!r}, must be a GPU and its price per hour, such as a100=1.29")
    options.compare = compared
    if options.spot_discount and options.preemptions_per_hour is None:
        parser.error("--spot-discount needs --preemptions-per-hour: how often a spot machine is taken away")


class Ratios(NamedTuple):
    """What a run took, over what the formulas said; None: it does not tell."""

    speed: float | None
    memory: float | None


def measured_ratios(run: Path, device: devices.Device) -> Ratios:
    """What a run's own comparison with its plan says. Raises UserError for a run without one, or on another kind of GPU."""
    path = run / "plan.json"
    if not path.exists():
        raise UserError(
            f"--run: {run} has no plan.json: a run writes it at its second logging line. Use --mfu, or a run that came so far"
        )
    found = json.loads(path.read_text())
    name = found["settings"]["device"]
    if devices.find(name) != device or "plan_ratio_tokens_per_second" not in found:
        raise UserError(
            f"--run: {run} ran on {name}, which says nothing about {device.name}; use a run on such a GPU, or --mfu"
        )
    return Ratios(found["plan_ratio_tokens_per_second"], found.get("plan_ratio_peak_memory"))


def terms(options: argparse.Namespace, config: Config, estimated_mfu: float, measured: Ratios) -> Terms:
    """What the flags state."""
    price, rate = config.run.dollars_per_hour or None, options.preemptions_per_hour
    if price is None and (options.spot_discount or options.compare):
        raise UserError("--spot-discount and --compare need the price of a GPU: --dollars-per-hour, or run.dollars_per_hour")
    if options.spot_discount:
        markets = [Market("on demand", price, None), Market("spot", price * (1 - options.spot_discount), rate)]
    else:
        markets = [Market("on demand" if rate is None else f"{rate:g} preemptions/h", price, rate)]
    ratio, source = 1.0, "estimated"
    if options.mfu:
        ratio, source = options.mfu / estimated_mfu, "stated"
    elif measured.speed:
        ratio, source = measured.speed, f"measured in {options.run}"
    return Terms(
        markets=markets,
        speed_ratio=ratio,
        mfu_source=source,
        store_gb_per_second=options.store_gb_per_second,
        restart_seconds=60 * options.restart_minutes,
        budget_dollars=config.run.budget_dollars,
        checkpoint=config.checkpoint,
    )


def alternatives(
    cluster: Cluster, options: argparse.Namespace, fits: Callable[[Cluster], bool]
) -> list[tuple[Cluster, float | None]]:
    """(cluster, price of its GPUs; None: that of --dollars-per-hour) of other numbers and kinds of GPUs: so many that the job
    fits."""
    counts = sorted({round(cluster.gpus * factor) for factor in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4) if cluster.gpus * factor >= 1})
    found = []
    for device, price in [(cluster.device, None), *options.compare]:
        every = [dataclasses.replace(cluster, device=device, gpus=gpus) for gpus in counts]
        while not any(map(fits, reversed(every))) and every[-1].gpus < MOST_GPUS:
            every.append(dataclasses.replace(every[-1], gpus=2 * every[-1].gpus))
        found += [(each, price) for each in every]
    return found


# ---------------------------------------------------------------- the run


def open_model(config: Config) -> ModelConfig:
    """The resolved model. The tokenizer is read only if the settings do not give the vocabulary. Raises UserError."""
    tokenizer = None
    if not config.model.vocab_size:
        from pretrain.data.errors import DataError
        from pretrain.data.tokenizer import Tokenizer

        try:
            tokenizer = Tokenizer.load(config.tokenizer.path)
        except DataError as error:
            raise UserError(f"{error}. To plan without a tokenizer, give --model.vocab_size N") from error
    ids, _ = vocabulary(config.model, tokenizer and tokenizer.vocab_size)
    return resolve_model(config.model, vocab_size=ids, sequence_length=stages.longest(config))


def steps_of(config: Config) -> int:
    """Steps of the run; from the settings alone, unless they count passes over data."""
    if config.train.epochs:
        from pretrain.run import length
        from pretrain.run.parts import open_parts

        return length.plan(config, open_parts(config).data, None).total_steps
    last = stages.layout(config)[-1]
    return config.train.max_steps or last.step + math.ceil(
        (config.train.max_tokens - last.tokens) / stages.tokens_per_step(last.config)
    )


def dry_runs(config: Config, job: Job, configured: Plan, asked: Terms) -> list[dict[str, Any]]:
    """Counts the memory of the configuration, and of the best way on these GPUs, if it is another. If that does not fit after
    all, the next best one is tried."""
    found = [dry_run("as configured", config, job, configured)]
    for plan in choices.recommended(job, configured.engine, configured.cluster)[:MOST_TRIED]:
        if (plan.engine, plan.micro_batch) == (configured.engine, configured.micro_batch):
            if found[0]["fits"]:
                break
            continue
        engine, batch = plan.engine, dataclasses.replace(config.batch, micro_batch_size=plan.micro_batch)
        tried = dry_run("best on these GPUs", dataclasses.replace(config, engine=engine, batch=batch), job, plan)
        if tried["fits"]:
            found.append(tried | {"flags": flags(configured, plan, None, asked.checkpoint)})
            break
    return found


def dry_run(name: str, config: Config, job: Job, plan: Plan) -> dict[str, Any]:
    """One step of a plan on fake tensors, and the memory that it takes."""
    from pretrain import dry_run

    print(f"dry run of {plan}, micro-batch {plan.micro_batch}: {name} ...", file=sys.stderr, flush=True)
    logging.disable(logging.WARNING)  # DeepSpeed and torch warn about what this project does on purpose
    run = dry_run.dry_run(config, job.model, plan.cluster)
    logging.disable(logging.NOTSET)
    return {
        "name": name,
        "plan": str(plan),
        "activation_checkpointing": plan.engine.activation_checkpointing,
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "state_bytes": run.state,
        "peak_bytes": run.peak.peak_bytes,
        "phase": run.peak.name,
        "needed_gib": run.needed_gib,
        "fits": run.fits,
        "flags": [],
    }


if __name__ == "__main__":
    sys.exit(command_line.run(main))
