"""Checks a configuration before it costs money.

    python tools/check_run.py --config X.yaml --invariance [--processes N] [--json FILE] [--section.key value ...]

--invariance  trains a shrunk model with the configuration's engine, levers and clipping on 1, 2, ... N processes of this
              machine's CPUs, split into small and large micro-batches, and compares each step with one process that takes the
              whole batch: loss, gradient norm and weights must agree.
--processes   largest number of processes (default 2).
--json FILE   also writes the table as JSON.

Exit status: 0 proved, 1 not, 2 the configuration or the command is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.config import Config, ConfigError, load


def main() -> int:
    """-> exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--invariance", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options, settings = parser.parse_known_args()
    try:
        config = load(settings, world_size=None, program="tools/check_run.py")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if not options.invariance or options.processes < max(1, config.engine.replicas):
        parser.error(f"give --invariance, and at least as many --processes as engine.replicas ({config.engine.replicas})")
    return 0 if check_invariance(config, options.processes, options.json) else 1


def check_invariance(config: Config, processes: int, output: Path | None) -> bool:
    """Prints the table and the verdict; whether all cases are proved."""
    from pretrain import prove

    model = prove.shrink(config.model)
    print("engine   ranks  micro-batch  accumulation  precision     loss     norm  weights")
    outcomes = []
    for outcome in prove.prove(model, prove.cases(config, processes), config.optimizer.grad_clip, config.run.seed):
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
    bounds = "; ".join(f"{name}: {', '.join(f'{bound:.0e}' for bound in allowed)}" for name, allowed in prove.BOUNDS.items())
    verdict = (
        f"NOT PROVED: {bad} of {len(outcomes)} splits differ from one process"
        if bad
        else "proved: no number depends on the split"
    )
    print(f"{verdict} (allowed differences of loss, norm, weights: {bounds})")
    return not bad


if __name__ == "__main__":
    sys.exit(main())
