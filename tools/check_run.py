"""Checks a configuration before it costs money, on a machine without a GPU.

Without --invariance, the preflight: data, tokenizer, batch, learning rate, storage and surroundings, in under a minute. Each
finding has a stable name, such as id-outside-vocabulary, and either stops a run or warns; docs/data.md explains them all.

With --invariance, it trains a shrunk model with the configuration's engine, options and clipping on 1, 2, ... N processes of
this machine's CPUs, with small and large micro-batches, and with each kind of parallelism (engine.parallel) that the
configuration allows. It compares every step with one process that takes the entire batch: loss, gradient norm, tokens counted,
the routers' losses and weights must agree; if not, it names the kinds that are wrong. --run.seed chooses weights and batches.

With --device, a dry run: one step of the real model, engine and optimizer as one of --ranks on a GPU that is not there. It
shows memory by phase, messages, FLOPs, an estimate of the time, and findings: whether it fits, what makes the device wait.
docs/planning.md explains them.

Exit status: 0 no finding stops a run, or passed; 1 failed; 2 findings that stop a run, or a wrong command.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain import devices, stages
from pretrain.config import Config, ConfigError, load, validate, work_of
from pretrain.files import write_atomically
from pretrain.run import command_line


def main(argv: list[str]) -> int:
    """-> exit status."""
    parser = command_line.make_parser(__doc__)
    command_line.add_settings(parser)
    parser.add_argument("--ranks", type=command_line.at_least(1), metavar="N", help="processes of the run (default: "
                        "engine.world_size, else unknown)")  # fmt: skip
    parser.add_argument("--invariance", action="store_true", help="check that no number depends on the split of the batch")
    parser.add_argument("--processes", type=command_line.at_least(1), default=2, metavar="N", help="most processes for "
                        "--invariance (default: %(default)s)")  # fmt: skip
    parser.add_argument("--device", metavar="NAME", help="a dry run on this GPU, such as h100; --ranks is then 8 by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings, or the table, as JSON")
    options, settings = command_line.parse_with_settings(parser, argv)
    if options.device and options.invariance:
        parser.error("give either --device or --invariance")
    device = devices.find(options.device) if options.device else None
    if options.device and device is None:
        parser.error(f"--device: {options.device!r} is not known; allowed: {', '.join(devices.names())}")
    try:
        config = load(settings, world_size=None, program="tools/check_run.py")
    except ConfigError as error:
        return refuse(error, options.json)
    if device:
        ranks = options.ranks or config.engine.world_size or 8
        if problems := validate(config, ranks):
            return refuse(ConfigError(problems), options.json)
        return 2 if check_device(config, device, ranks, options.json) else 0
    if not options.invariance:
        return 2 if check(config, options.ranks, options.json) else 0
    if options.processes < config.engine.replicas:
        parser.error(f"give at least as many --processes as engine.replicas ({config.engine.replicas})")
    return 0 if check_invariance(config, options.processes, options.json) else 1


def refuse(error: ConfigError, output: Path | None) -> int:
    """Reports settings that cannot be read as findings. -> exit status."""
    for problem in error.problems:
        print(f"STOP  settings-refused: {problem}", file=sys.stderr)
    write_json(output, [
        {"name": "settings-refused", "where": each.key, "text": each.message, "stops": True} for each in error.problems
    ])  # fmt: skip
    return 2


def check(config: Config, ranks: int | None, output: Path | None) -> bool:
    """Prints facts and findings. -> whether any of them stops a run."""
    from pretrain.run.preflight import preflight

    began = time.monotonic()
    report = preflight(config, ranks)
    for line in report.facts:
        print(line)
    stops = show_findings(report.findings, began)
    write_json(output, [each._asdict() for each in report.findings])
    return stops


def check_device(config: Config, device: devices.Device, ranks: int, output: Path | None) -> bool:
    """Prints what a step needs on that GPU, and findings. -> whether any of them stops a run."""
    from pretrain import dry_run
    from pretrain.data.checks import Finding
    from pretrain.engines.config import slow_links
    from pretrain.model.config import resolve_model, vocabulary
    from pretrain.plan.scaling import Cluster
    from pretrain.run.parts import open_tokenizer

    began, number = time.monotonic(), len(config.train.stages or [])
    config = stages.largest(config)
    if number:
        length, size = config.data.sequence_length, config.batch.micro_batch_size
        print(f"of {number + 1} stages, the one with the largest forward passes: {size} x {length:,} tokens")
    tokenizer = None if config.model.vocab_size else open_tokenizer(config)
    ids, _ = vocabulary(config.model, tokenizer and tokenizer.vocab_size)
    model = resolve_model(config.model, vocab_size=ids, sequence_length=config.data.sequence_length)
    try:
        run = dry_run.dry_run(config, model, Cluster(device, ranks))
    except dry_run.CannotRun as error:
        findings = [Finding(error.name, error.where, str(error), stops=True)]
        content = {"findings": [each._asdict() for each in findings]}
    else:
        for line in dry_run.describe(run):
            print(line, flush=True)
        links = slow_links(config.engine, work_of(config, model), ranks, run.cluster.gpus_per_node)
        findings = [Finding("slow-link", each.key, each.message) for each in links] + dry_run.fault_findings(run)
        findings += dry_run.plan_findings(run, lambda keys: print(f"trying {keys}", file=sys.stderr, flush=True))
        content = dry_run.to_json(run, findings)
    stops = show_findings(findings, began)
    write_json(output, content)
    return stops


def show_findings(findings: list, began: float) -> bool:
    """Prints findings, those that stop a run first, and their number. -> whether any of them stops it."""
    for finding in sorted(findings, key=lambda finding: not finding.stops):
        print(f"{'STOP' if finding.stops else 'warn'}  {finding}")
    stopping = sum(finding.stops for finding in findings)
    print(f"{stopping} findings stop this run, {len(findings) - stopping} warnings ({time.monotonic() - began:.1f} s)")
    return stopping > 0


def check_invariance(config: Config, processes: int, output: Path | None) -> bool:
    """Prints the table, what is wrong and the verdict. -> whether all cases passed."""
    from pretrain import invariance

    model = invariance.small_model(config.model, processes)
    tried, not_checked = invariance.cases(config, processes)
    for kinds, problem in not_checked.items():
        print(f"not checked: {kinds} ({problem})")
    width = max(5, *(len(invariance.describe(case.kinds)) for case in tried))
    columns = "ranks  micro-batch  accumulation  precision     loss  sources     norm  tokens  routing  weights"
    print(f"engine  {'kinds':{width}}  {columns}")
    outcomes, began, ranks = [], time.monotonic(), sum(case.ranks for case in tried)
    for outcome in invariance.check_invariance(model, tried, config.optimizer.grad_clip, config.run.seed):
        outcomes.append(outcome)
        case, done = outcome.case, sum(each.case.ranks for each in outcomes)
        seconds_left = (time.monotonic() - began) * (ranks - done) / done
        kinds, verdict = invariance.describe(case.kinds) or "-", "same as one process" if outcome.passed else "DIFFERENT"
        print(
            f"{case.engine.name:6}  {kinds:{width}}  {case.ranks:5}  {case.micro_batch:11}  {case.accumulation:12}  "
            f"{case.numerics:9}  {outcome.loss_difference:7.1e}  {outcome.source_difference:7.1e}  "
            f"{outcome.norm_difference:7.1e}  {outcome.token_difference:6}  {outcome.routing_difference:7.1e}  "
            f"{outcome.weight_difference:7.1e}  {verdict}, {seconds_left:.0f} s left",
            flush=True,
        )
    wrong = invariance.causes(outcomes)
    write_json(output, {
        "seed": config.run.seed,
        "bounds": invariance.BOUNDS,
        "not_checked": {kinds: str(problem) for kinds, problem in not_checked.items()},
        "cases": [dataclasses.asdict(outcome) | {"passed": outcome.passed} for outcome in outcomes],
        "wrong": wrong,
    })  # fmt: skip
    for error in dict.fromkeys(outcome.error for outcome in outcomes if outcome.error):
        print(error)
    for sentence in wrong:
        print(f"WRONG  {sentence}")
    failed = sum(not outcome.passed for outcome in outcomes)
    bounds = "; ".join(
        f"{name}: {', '.join(f'{bound:.0e}' for bound in allowed)}" for name, allowed in invariance.BOUNDS.items()
    )
    verdict = (
        f"FAILED: {failed} of {len(outcomes)} splits differ from one process"
        if failed
        else f"passed: no number depends on the split ({len(outcomes)} splits, {time.monotonic() - began:.0f} s)"
    )
    print(f"{verdict} (allowed differences of loss, norm, weights: {bounds})")
    return not failed


def write_json(output: Path | None, content: list[dict] | dict) -> None:
    """Writes what was found, if --json asks for it."""
    if output:
        write_atomically(output, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
