"""Checks a configuration before it costs money, on a machine without a GPU.

    python tools/check_run.py --config X.yaml [--ranks N] [--json FILE] [--section.key value ...]
    python tools/check_run.py --config X.yaml --invariance [--processes N] [--json FILE] [--section.key value ...]

Alone, the preflight: data, tokenizer, batch, learning rate, storage, and what stands in the way, in less than a minute. Each
finding has a stable name, as id-outside-vocabulary, and either stops a run or warns; docs/data.md explains all of them.

--ranks N     number of processes that the run will have (default: engine.world_size, else unknown).
--invariance  trains a shrunk model with the configuration's engine, levers and clipping on 1, 2, ... N processes of this
              machine's CPUs, split into small and large micro-batches, and compares each step with one process that takes the
              whole batch: loss, gradient norm and weights must agree.
--processes   largest number of processes for --invariance (default 2).
--json FILE   also writes the findings, or the table, as JSON.

Exit status: 0 nothing stops a run, or proved; 1 not proved; 2 findings that stop a run, or a wrong command.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.config import Config, ConfigError, load


def main() -> int:
    """-> exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--invariance", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    options, settings = parser.parse_known_args()
    try:
        config = load(settings, world_size=None, program="tools/check_run.py")
    except ConfigError as error:
        return refused(error, options.json)
    if not options.invariance:
        return 2 if check(config, options.ranks, options.json) else 0
    if options.processes < max(1, config.engine.replicas):
        parser.error(f"give at least as many --processes as engine.replicas ({config.engine.replicas})")
    return 0 if check_invariance(config, options.processes, options.json) else 1


def refused(error: ConfigError, output: Path | None) -> int:
    """Settings that cannot be read are findings, too."""
    for problem in error.problems:
        print(f"STOP  settings-refused: {problem}", file=sys.stderr)
    if output:
        found = [
            {"name": "settings-refused", "where": each.key, "text": each.message, "stops": True} for each in error.problems
        ]
        output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return 2


def check(config: Config, ranks: int | None, output: Path | None) -> bool:
    """Prints facts and findings; whether any of them stops a run."""
    from pretrain.run.preflight import preflight

    began = time.monotonic()
    report = preflight(config, ranks)
    for line in report.facts:
        print(line)
    for finding in sorted(report.findings, key=lambda finding: not finding.stops):
        print(f"{'STOP' if finding.stops else 'warn'}  {finding}")
    stopping = sum(finding.stops for finding in report.findings)
    warnings = len(report.findings) - stopping
    print(f"{stopping} findings stop this run, {warnings} warnings ({time.monotonic() - began:.1f} s)")
    if output:
        output.write_text(json.dumps([each._asdict() for each in report.findings], indent=1, ensure_ascii=False) + "\n")
    return report.stops


def check_invariance(config: Config, processes: int, output: Path | None) -> bool:
    """Prints the table and the verdict; whether all cases are proved."""
    from pretrain import invariance

    model = invariance.shrink(config.model)
    print("engine   ranks  micro-batch  accumulation  precision     loss     norm  weights")
    outcomes = []
    for outcome in invariance.prove(model, invariance.cases(config, processes), config.optimizer.grad_clip, config.run.seed):
        outcomes.append(outcome)
        case = outcome.case
        print(
            f"{case.engine.name:8} {case.ranks:5}  {case.micro_batch:11}  {case.accumulation:12}  {case.engine.precision:9}  "
            f"{outcome.loss_difference:7.1e}  {outcome.norm_difference:7.1e}  {outcome.weight_difference:7.1e}  "
            f"{'as one process' if outcome.proved else 'DIFFERENT'}",
            flush=True,
        )
    if output:
        output.write_text(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    bad = sum(not outcome.proved for outcome in outcomes)
    bounds = "; ".join(
        f"{name}: {', '.join(f'{bound:.0e}' for bound in allowed)}" for name, allowed in invariance.BOUNDS.items()
    )
    verdict = (
        f"NOT PROVED: {bad} of {len(outcomes)} splits differ from one process"
        if bad
        else "proved: no number depends on the split"
    )
    print(f"{verdict} (allowed differences of loss, norm, weights: {bounds})")
    return not bad


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # texts of any language, on a terminal that may know one
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
