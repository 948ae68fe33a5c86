"""Three small runs that predict a large one: its loss with an interval, its learning rate, and how to spend a budget.

    python tools/plan_ladder.py --config configs/cloud.yaml --output ladders/cloud  # writes small runs, and their cost
    sh ladders/cloud/run.sh                                                         # trains them
    python tools/plan_ladder.py --fit ladders/cloud                                 # predicts the large run

The small runs are of the same family as the planned one: width over depth, head_dim, tokenizer, data, sequence length, shape of
the schedule, and tokens per parameter are its own; batches and learning rates follow rules that are named. Several learning
rates run on each, some of them with two seeds: the best rate and the noise are measured.

--fit writes prediction.json and prediction.png into the folder. A large run with `--evaluate.expected prediction.json` says at
every validation where it is in the band, and warns when it leaves it. Runs of other ladders, or runs by hand, may be given as
well: --fit RUN RUN RUN --config LARGE.yaml --output FOLDER. docs/planning.md explains every figure.

Exit status: 0 done; 2 wrong settings, or runs that cannot predict this one (of other data, unfinished, too few).
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from pretrain import UserError, devices
from pretrain.config import Config, ConfigError, load, validate
from pretrain.engines.config import EngineConfig
from pretrain.files import write_atomically
from pretrain.plan import choices, ladder, ladder_fit
from pretrain.plan.ladder import Target
from pretrain.plan.scaling import Cluster
from pretrain.report import expected
from pretrain.report.units import human_count, human_dollars, human_seconds
from pretrain.run import command_line, rungs
from pretrain.run.rungs import Finished, Step
from pretrain.schema import to_yaml
from tools.plan_run import number, open_model, steps_of

PLANNED, SCRIPT, PREDICTION, PICTURE = "planned.yaml", "run.sh", "prediction.json", "prediction.png"
RUN_ALL = """#!/bin/sh
# Trains the small runs, smallest first. Interrupted, it continues with the run that was not finished.
# A run that diverges (status 70) is left as it is; any other failure ends this script with the run's status.
folder={folder}
began=$(date +%s) number=0 spent=0 left={all}
train() {{ # NAME WORK: its FLOPs, of {all} of all runs
    number=$((number + 1)) left=$((left - $2))
    if grep -Eqs '"status": "(done|diverged)"' "$folder/runs/$1/run_state.json"; then
        echo "ladder     run $number of {count}, $1: has ended before"
        return
    fi
    time=""
    if [ $spent -gt 0 ]; then # smaller runs take longer per FLOP
        time=", at most $(((($(date +%s) - began) * (left + $2) / spent + 59) / 60)) min left"
    fi
    echo "ladder     run $number of {count}, $1$time"
    status=0
    {start} launch/pretrain.py --config "$folder/$1.yaml" || status=$?
    case $status in
        0) spent=$((spent + $2)) ;;
        70) ;;
        *) echo "ladder     $1 ended with status $status; the same command continues from there" >&2; exit $status ;;
    esac
}}
{runs}
echo "ladder     all runs have ended: python tools/plan_ladder.py --fit $folder"
"""
"""Of `SCRIPT`."""
WORK = 10_000
"""Of all small runs, in the script, which counts in whole numbers."""
LEAST_RUNGS = 3


def main(argv: list[str]) -> int:
    """-> exit status."""
    parser = make_parser()
    options, settings = command_line.parse_with_settings(parser, argv)
    if options.budget_dollars and not options.dollars_per_hour:
        parser.error("--budget-dollars needs --dollars-per-hour, the price of one GPU")
    if devices.find(options.gpu) is None:
        parser.error(f"--gpu: {options.gpu!r} is not known; allowed: {', '.join(devices.names())}")
    if options.smallest >= options.largest:
        parser.error(f"--smallest {options.smallest:g} must be less than --largest {options.largest:g}")
    if options.fit:
        predict(options, settings)
    elif not options.output:
        parser.error("give --output FOLDER, which gets the small runs, or --fit FOLDER")
    else:
        write(options, load(settings, world_size=None, program="tools/plan_ladder.py"))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = command_line.make_parser(__doc__)
    command_line.add_settings(parser)
    add, whole, positive, fraction = parser.add_argument, command_line.at_least(1), number(0), number(0, 1)
    add("--output", type=Path, metavar="FOLDER", help="folder for the small runs; with --fit: for the prediction (default: the "
        "folder of the ladder)")  # fmt: skip
    add(
        "--fit",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="predict from the finished runs of this ladder, or from these runs",
    )
    add("--rungs", type=int, choices=(3, 4, 5), default=3, help="sizes of small runs (default: %(default)s)")
    add("--largest", type=fraction, default=1 / 16, metavar="X", help="FLOPs of a run of the largest rung, as a share of the "
        "planned run's (default: %(default)g)")  # fmt: skip
    add("--smallest", type=fraction, default=1 / 1024, metavar="X", help="the same, of the smallest (default: %(default)g)")
    add("--seeds", type=whole, default=2, metavar="N", help="of some runs on the two smallest rungs (default: %(default)s)")
    add("--tokens-factors", type=positive, nargs="+", default=[], metavar="X", help="also train all rungs but the largest on "
        "so many times the tokens, such as 0.5 2: then --fit finds the best tokens per parameter")  # fmt: skip
    add("--gpus", type=whole, default=1, metavar="N", help="processes that train a small run (default: %(default)s)")
    add("--gpu", default="h100", metavar="NAME", help="kind of GPU, for times and budgets (default: %(default)s)")
    add("--dollars-per-hour", type=positive, metavar="USD", help="price of one GPU")
    add("--mfu", type=fraction, default=0.4, metavar="X", help="fraction of the GPU's peak that a budget buys "
        "(default: %(default)g)")  # fmt: skip
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--budget-flops", type=positive, metavar="X", help="with --fit: the best run for so many FLOPs")
    budget.add_argument("--budget-dollars", type=positive, metavar="USD", help="with --fit: the best run for this much money")
    return parser


def open_target(config: Config) -> Target:
    """What the planned run trains. Raises UserError."""
    if problems := validate(config, None):
        raise ConfigError(problems)
    return rungs.target(config, open_model(config), steps_of(config))


# ---------------------------------------------------------------- writing the small runs


class Small(NamedTuple):
    """A run to write."""

    what: Target
    lr: float
    seed: int
    name: str


def write(options: argparse.Namespace, config: Config) -> None:
    """Writes the settings of the small runs and the script that trains them, and says what they cost."""
    big = open_target(config)
    sizes = ladder.rungs(big, options.rungs, options.smallest, options.largest, options.gpus)
    small = runs_of(sizes, options, config.run.seed)
    folder = options.output
    if list(folder.glob("runs/*")):
        raise UserError(f"--output: {folder} has runs already, which other settings would spoil; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / PLANNED, to_yaml(config))
    for each in small:
        made = rungs.rung_config(config, big.steps, each.what, each.lr, each.seed, each.name, folder, options.gpus)
        if problems := validate(made, options.gpus):
            raise ConfigError(problems)
        write_atomically(folder / f"{each.name}.yaml", to_yaml(made))
    write_atomically(folder / SCRIPT, script(folder, small, options.gpus))
    for line in table(big, sizes, small, options, config):
        print(line)
    print(f"train them:  sh {shlex.quote(str(folder / SCRIPT))}")
    print(f"predict:     python tools/plan_ladder.py --fit {shlex.quote(str(folder))}")


def script(folder: Path, small: list[Small], gpus: int) -> str:
    """The script that trains the small runs."""
    flops = sum(each.what.flops for each in small)
    work = [max(1, round(WORK * each.what.flops / flops)) for each in small]
    start = "python" if gpus == 1 else f"accelerate launch --num_processes {gpus}"
    lines = [f"train {shlex.quote(each.name)} {share}" for each, share in zip(small, work, strict=True)]
    return RUN_ALL.format(folder=shlex.quote(str(folder)), all=sum(work), count=len(small), start=start, runs="\n".join(lines))


def runs_of(sizes: list[Target], options: argparse.Namespace, seed: int) -> list[Small]:
    """The small runs: smallest first, so that a mistake shows early."""
    found = []
    for place, size in enumerate(sizes):
        several = place < 2
        for factor in (1.0, *(options.tokens_factors if place < len(sizes) - 1 else ())):
            what = size if factor == 1.0 else longer(size, factor)
            for repeat in range(options.seeds if several and factor == 1.0 else 1):
                for lr_factor in ladder.LR_FACTORS if several and repeat == 0 else ladder.FEWER_FACTORS:
                    lr = float(f"{what.lr * lr_factor:.3g}")
                    tokens = "" if factor == 1.0 else f"_x{factor:g}"
                    name = f"w{what.model.hidden_size}{tokens}_lr{lr:g}_seed{seed + repeat}"
                    found.append(Small(what, lr, seed + repeat, name))
    return found


def longer(rung: Target, factor: float) -> Target:
    """The rung on so many times the tokens, in full steps."""
    per_step = rung.sequences * rung.length
    return rung._replace(tokens=per_step * math.ceil(factor * rung.tokens / per_step))


def table(big: Target, sizes: list[Target], small: list[Small], options: argparse.Namespace, config: Config) -> list[str]:
    """What the small runs are and cost."""
    cluster = Cluster(devices.find(options.gpu), options.gpus, max(8, options.gpus), 400.0)
    lines = [
        f"{'':10}{'N':>8} {'tokens':>8} {'layers':>6} {'width':>6} {'batch':>6} {'steps':>8} {'lr':>9} {'runs':>5} "
        f"{'FLOPs each':>10} {'share':>8} {'all':>8}"
    ]
    for place, size in enumerate([*sizes, big]):
        count = sum(each.what.model == size.model for each in small)
        spent = sum(each.what.flops for each in small if each.what.model == size.model)
        name = f"rung {place + 1}" if place < len(sizes) else "planned"
        time = human_seconds(seconds(spent, size, cluster, config.engine)) if count else ""
        lines.append(
            f"{name:10}{human_count(size.parameters):>8} {human_count(size.tokens):>8} {size.model.num_hidden_layers:>6} "
            f"{size.model.hidden_size:>6} {size.sequences:>6} {size.steps:>8,} {size.lr:>9.2e} {count or '':>5} "
            f"{size.flops:>10.2e} {size.flops / big.flops:>8.2%} {time:>8}"
        )
    flops = sum(each.what.flops for each in small)
    spent = sum(seconds(each.what.flops, each.what, cluster, config.engine) for each in small)
    cost = ""
    if options.dollars_per_hour:
        cost = f", {human_dollars(spent / 3600 * options.gpus * options.dollars_per_hour)}"
    lines += [
        f"all {len(small)} small runs: {flops:.2e} FLOP = {flops / big.flops:.1%} of the planned run; about "
        f"{human_seconds(spent)} on {options.gpus} x {options.gpu.upper()} by the plan's formulas, and the start of each{cost}",
        f"N multiplies each token: blocks and head, without the input embedding; {big.tokens / big.parameters:.1f} tokens each",
        f"batch ~ D^{ladder.BATCH_EXPONENT} (Power Lines) and lr ~ C^{ladder.lr_slope(big.model):g}, from those of "
        "the planned run; at each rung several lr are tried",
    ]
    for each in ladder.published(big.parameters, big.tokens):
        sequences = each.batch_tokens / big.length
        lines.append(f"for the planned run, {each.source} says (AdamW): lr {each.lr:.2e}, {sequences:,.0f} sequences per step")
    return lines


def seconds(flops: float, what: Target, cluster: Cluster, engine: EngineConfig) -> float:
    """What so many FLOPs of this model take, by the fastest way that fits; NaN where the batch does not divide."""
    job = choices.Job(what.model, what.length, what.sequences)
    plan = choices.largest(job, EngineConfig(precision=engine.precision or "bf16"), cluster)
    mfu = plan.time.mfu if plan else math.nan
    return flops / (cluster.gpus * cluster.device.bf16_tflops * 1e12 * mfu)


# ---------------------------------------------------------------- predicting


class Read(NamedTuple):
    """What the runs of a ladder say."""

    rungs: list[Step]
    tuned: list[ladder_fit.Tuned]
    noise: float
    """Relative standard deviation between seeds."""
    notes: list[str]

    @property
    def flops_R(self) -> np.ndarray:
        """FLOPs of a run of each rung."""
        return np.array([step.what.flops for step in self.rungs])

    @property
    def loss_R(self) -> np.ndarray:
        """Loss at the best learning rate."""
        return np.array([each.loss for each in self.tuned])

    def chosen(self, step: int) -> list[Finished]:
        """The runs of a rung with the best learning rate that ran."""
        return min(self.rungs[step].by_lr.values(), key=mean_loss)


def mean_loss(runs: list[Finished]) -> float:
    """Over seeds."""
    return float(np.mean([run.loss for run in runs]))


def read(paths: list[Path], big: Config, target: Target) -> Read:
    """Reads and tunes the rungs. Raises UserError for runs that cannot predict the planned one, or too few."""
    runs, notes, unfinished = [], [], []
    for path in rungs.find_runs(paths):
        config = rungs.read_config(path / "config.yaml")
        found = rungs.read_run(path, open_target(config), config)
        if isinstance(found, Finished):
            rungs.require_comparable(big, found)
            if found.what.model.vocab_size != target.model.vocab_size:
                raise UserError(
                    f"{path} has a vocabulary of {found.what.model.vocab_size:,}, the planned run {target.model.vocab_size:,}"
                )
            runs.append(found)
        elif found == "diverged":
            notes.append(f"{path.name} diverged, and counts as worse than every other learning rate")
        else:
            unfinished.append(f"{path} {found}")
    if unfinished:
        raise UserError("runs are not finished:\n  " + "\n  ".join(unfinished))
    steps = [step for step in rungs.steps_of(runs) if step.what.flops < target.flops]
    rates = [(np.array(list(step.by_lr)), np.array([mean_loss(each) for each in step.by_lr.values()])) for step in steps]
    tuned = ladder_fit.tune(rates)
    for step, each in zip(steps, tuned, strict=True):
        if each.at_edge and len(step.by_lr) > 2:
            notes.append(
                f"width {step.what.model.hidden_size}: the best learning rate is at the edge of those tried, {each.lr:.2e}; "
                f"train one beyond it and fit again: {beyond(step)}"
            )
    groups = [np.array([run.loss for run in same]) for step in steps for same in step.by_lr.values() if len(same) > 1]
    if not groups:
        notes.append(
            f"no two runs differ in their seed alone: {ladder_fit.SEED_NOISE:.1%} of the loss is assumed for that noise"
        )
    return Read(steps, tuned, ladder_fit.seed_noise(groups), notes)


def beyond(step: Step) -> str:
    """The command that trains a rung with a learning rate beyond the edge where its best one lies."""
    rates = sorted(step.by_lr)
    best = min(rates, key=lambda lr: mean_loss(step.by_lr[lr]))
    lr = float(f"{best * (2 if best == rates[-1] else 0.5):.3g}")
    run = step.by_lr[best][0]
    name = f"w{run.what.model.hidden_size}_lr{lr:g}_seed{run.config.run.seed}"
    return f"python launch/pretrain.py --config {run.path / 'config.yaml'} --optimizer.lr {lr:g} --run.name {name}"


def predict(options: argparse.Namespace, settings: list[str]) -> None:
    """Fits the laws and writes the prediction."""
    folder = options.output or (options.fit[0] if len(options.fit) == 1 else None)
    if folder is None:
        raise UserError("give --output FOLDER for the prediction from these runs")
    said = answer(options, settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / PREDICTION, json.dumps(said, indent=1, allow_nan=False) + "\n")
    from pretrain.report.plot_ladder import plot_ladder

    plot_ladder(said, folder / PICTURE)
    for line in lines_of(said, folder):
        print(line)


def answer(options: argparse.Namespace, settings: list[str]) -> dict[str, Any]:
    """The prediction, and the best run for a budget. Raises UserError for runs that cannot predict the planned one."""
    if not settings:
        if not (options.fit[0] / PLANNED).exists():
            raise UserError(f"{options.fit[0]} has no {PLANNED}: give the planned run with --config")
        settings = ["--config", str(options.fit[0] / PLANNED)]
    config = load(settings, world_size=None, program="tools/plan_ladder.py")
    target = open_target(config)
    found = read(options.fit, config, target)
    ratio = target.tokens / target.parameters
    same = [k for k, step in enumerate(found.rungs) if max(step.ratio / ratio, ratio / step.ratio) < rungs.SAME_RATIO]
    sizes = {found.rungs[k].what.parameters for k in same}
    if len(sizes) < LEAST_RUNGS:
        raise UserError(
            f"a prediction needs finished runs of at least {LEAST_RUNGS} sizes smaller than the planned run, with its "
            f"{ratio:.1f} tokens per parameter; found {len(sizes)}"
        )
    said = prediction(found, same, target, config)
    return said | {"budget": budget(options, found, same, said)}


def prediction(found: Read, same: list[int], target: Target, config: Config) -> dict[str, Any]:
    """What the rungs `same`, which have the tokens per parameter of the planned run, say about it. For JSON."""
    flops_R, loss_R = found.flops_R[same], found.loss_R[same]
    counts_R = np.array([len(found.chosen(k)) for k in same])
    small = [k for k in same if is_above_bigram(found.rungs[k], found.tuned[k]) or has_too_few_layers(found.rungs[k], target)]
    misfit_R = np.array([ladder_fit.TOO_SMALL if k in small else 1.0 for k in same])
    untuned_R = np.array([0.0 if found.tuned[k].lr else ladder_fit.UNTUNED for k in same])
    noise_R = loss_R * np.sqrt((ladder_fit.MISFIT * misfit_R) ** 2 + untuned_R**2 + found.noise**2 / counts_R)
    fitted = ladder_fit.bootstrap(flops_R, loss_R, noise_R)
    widened = ladder_fit.lack_of_fit(fitted.best, flops_R, loss_R, noise_R)
    noise = math.hypot(ladder_fit.MISFIT, found.noise) * widened
    if widened > 1:
        fitted = ladder_fit.bootstrap(flops_R, loss_R, widened * noise_R)
    known = [k for k in same if found.tuned[k].lr is not None]
    lr = None
    if known:
        rates_R = np.array([found.tuned[k].lr for k in known])
        lr = ladder_fit.predict_lr(found.flops_R[known], rates_R, target.flops, ladder.lr_slope(target.model))._asdict()
    curves = [found.chosen(k)[0].curve for k in same]
    places = np.geomspace(flops_R.min(), target.flops, 40)
    exponent = np.quantile(fitted.draws.exponent_S, (0.1, 0.9)).tolist()
    return {
        "format_version": expected.FORMAT_VERSION,
        "planned": {"parameters": target.parameters, "tokens": target.tokens, "flops": target.flops, "steps": target.steps,
                    "sequences": target.sequences, "lr": target.lr},
        "settings": rungs.compared(config),
        "loss": fitted.predict(target.flops, noise)._asdict(),
        "lr": lr,
        "law": {"e": float(fitted.best.e_S[0]), "a": float(fitted.best.a_S[0]), "exponent": float(fitted.best.exponent_S[0]),
                "origin": fitted.best.origin, "exponent_low": exponent[0], "exponent_high": exponent[1],
                "e_low": float(np.quantile(fitted.draws.e_S, 0.1)), "e_high": float(np.quantile(fitted.draws.e_S, 0.9))},
        "seed_noise": found.noise,
        "misfit": ladder_fit.MISFIT,
        "widened": widened,
        "rungs": [rung_values(found, k, k in same) for k in range(len(found.rungs))],
        "curve": [{"flops": float(each), **fitted.predict(each, noise)._asdict()} for each in places],
        "band": ladder_fit.band(flops_R, curves, misfit_R, fitted, target.flops, noise)._asdict(),
        "notes": found.notes + remarks(found, same, target, widened),
    }  # fmt: skip


def is_above_bigram(step: Step, tuned: ladder_fit.Tuned) -> bool:
    """Whether a rung has learned less than the statistics of pairs of tokens."""
    return any(tuned.loss > run.bigram for run in step.runs)


def has_too_few_layers(step: Step, big: Target) -> bool:
    """Whether a rung cannot do what models with more layers can."""
    return step.what.model.num_hidden_layers < min(ladder.LEAST_LAYERS, big.model.num_hidden_layers)


def remarks(found: Read, same: list[int], big: Target, widened: float) -> list[str]:
    """What makes the prediction less certain, in words."""
    early = [f"{found.rungs[k].what.model.hidden_size}" for k in same if is_above_bigram(found.rungs[k], found.tuned[k])]
    flat = [f"{found.rungs[k].what.model.hidden_size}" for k in same if has_too_few_layers(found.rungs[k], big)]
    single = [f"{found.rungs[k].what.model.hidden_size}" for k in same if found.tuned[k].lr is None]
    said = []
    if single:
        said.append(
            f"width {', '.join(single)}: a single learning rate was tried, which may not be the best; {ladder_fit.UNTUNED:.0%} "
            "of the loss is added to its noise. Train with half and twice of it, too"
        )
    if early:
        said.append(
            f"width {', '.join(early)}: the loss is above the bigram entropy of the data, so that the rung is too small, or "
            f"too short, to be on the law; its misfit counts {ladder_fit.TOO_SMALL:g} times. Larger ones predict better"
        )
    if flat:
        said.append(
            f"width {', '.join(flat)}: a single layer cannot repeat what followed a token before, as models with more can, and "
            f"is not on their law; its misfit counts {ladder_fit.TOO_SMALL:g} times"
        )
    if widened > 1:
        said.append(
            f"the rungs are not on one power law: all noise is taken {widened:.1f} times as large, and the interval is wide. "
            "Are the learning rates tuned, and the smallest rungs large enough?"
        )
    return said


def rung_values(found: Read, place: int, used: bool) -> dict[str, Any]:
    """A rung, for JSON. used: its loss is part of the prediction."""
    step, tuned = found.rungs[place], found.tuned[place]
    return {
        "parameters": step.what.parameters,
        "tokens": step.what.tokens,
        "flops": step.what.flops,
        "sequences": step.what.sequences,
        "width": step.what.model.hidden_size,
        "used": used,
        "loss": tuned.loss,
        "best_lr": tuned.lr,
        "runs": [
            {"lr": lr, "losses": [run.loss for run in runs], "names": [run.path.name for run in runs]}
            for lr, runs in step.by_lr.items()
        ],
    }


def budget(options: argparse.Namespace, found: Read, same: list[int], said: dict[str, Any]) -> dict[str, Any] | None:
    """The best run for a budget; None: none was given."""
    flops = options.budget_flops
    if options.budget_dollars:
        hours = options.budget_dollars / options.dollars_per_hour
        flops = hours * 3600 * devices.find(options.gpu).bf16_tflops * 1e12 * options.mfu
    if not flops:
        return None
    law, planned = said["law"], said["planned"]
    per_token = planned["flops"] / planned["tokens"] / planned["parameters"]  # FLOPs per token and parameter: 6 and attention
    ratio = planned["tokens"] / planned["parameters"]
    parameters = math.sqrt(flops / per_token / ratio)
    loss = law["e"] + law["a"] * (flops / law["origin"]) ** -law["exponent"]
    answer = {"flops": flops, "parameters": parameters, "tokens": ratio * parameters, "loss": loss, "measured_ratio": False}
    steps = [step.what for step in found.rungs]
    if len(steps) > len(same):
        columns = ([each.parameters for each in steps], [each.tokens for each in steps], found.loss_R)
        surface = ladder_fit.fit_surface(*(np.array(column, dtype=float) for column in columns))
        parameters, tokens = surface.best(flops)
        answer |= {"parameters": parameters, "tokens": tokens, "loss": surface.loss(parameters, tokens), "measured_ratio": True}
        answer["surface"] = {key: float(value) for key, value in surface._asdict().items()}
    return answer


def lines_of(said: dict[str, Any], folder: Path) -> list[str]:
    """The prediction in words."""
    planned, loss, law = said["planned"], said["loss"], said["law"]
    lines = [f"{'':8}{'N':>8} {'tokens':>8} {'FLOPs':>9} {'batch':>6} {'runs':>5} {'best lr':>9} {'loss at it':>11} {'law':>8}"]
    for place, rung in enumerate(said["rungs"]):
        fitted = law["e"] + law["a"] * (rung["flops"] / law["origin"]) ** -law["exponent"]
        count = sum(len(each["losses"]) for each in rung["runs"])
        lr = f"{rung['best_lr']:.2e}" if rung["best_lr"] else "-"
        lines.append(
            f"rung {place + 1:<3}{human_count(rung['parameters']):>8} {human_count(rung['tokens']):>8} {rung['flops']:>9.2e} "
            f"{rung['sequences']:>6} {count:>5} {lr:>9} {rung['loss']:>11.4f} {f'{fitted:.4f}' if rung['used'] else 'other':>8}"
        )
    lines += [
        f"planned {human_count(planned['parameters']):>8} {human_count(planned['tokens']):>8} {planned['flops']:>9.2e} "
        f"{planned['sequences']:>6}",
        f"loss    {loss['loss']:.4f} nats per token; 80 % interval {loss['low']:.4f} to {loss['high']:.4f}, at the best lr",
        f"law     L = {law['e']:.3f} + {law['a']:.3f} (C / {law['origin']:.2e})^-{law['exponent']:.3f}; 80 %: exponent "
        f"{law['exponent_low']:.3f} to {law['exponent_high']:.3f}, irreducible loss {law['e_low']:.2f} to {law['e_high']:.2f}",
        f"noise   {said['seed_noise']:.2%} between seeds, {said['misfit']:.1%} assumed around the law",
    ]
    if said["lr"]:
        lr = said["lr"]
        lines.append(
            f"lr      {lr['loss']:.2e}; 80 % interval {lr['low']:.1e} to {lr['high']:.1e}; configured {planned['lr']:.2e}"
        )
    lines.append(
        f"batch   {planned['sequences']:,} sequences as configured; the rungs followed it by D^{ladder.BATCH_EXPONENT}"
    )
    if spent := said["budget"]:
        how = (
            "the best by L(N, D)" if spent["measured_ratio"] else "with the planned tokens per parameter, which were not varied"
        )
        lines.append(
            f"budget  {spent['flops']:.2e} FLOP: {human_count(spent['parameters'])} parameters, {human_count(spent['tokens'])} "
            f"tokens, loss {spent['loss']:.4f}; {how}"
        )
    lines += [f"note    {each}" for each in said["notes"]]
    rate = f"--optimizer.lr {said['lr']['loss']:.2e} " if said["lr"] else ""
    lines.append(f"wrote   {folder / PREDICTION} and {PICTURE}; train with {rate}--evaluate.expected {folder / PREDICTION}")
    return lines


if __name__ == "__main__":
    sys.exit(command_line.run(main))
