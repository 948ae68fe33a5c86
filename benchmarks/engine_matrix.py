"""Checks that all engines compute the same for every split of a batch and precision, and hold the expected number of bytes.

    python benchmarks/engine_matrix.py [--engines ddp zero1 ...] [--processes 1 2] [--precision fp32 bf16] [--output FILE]

Prints one row per combination: loss and gradient norm of the last of five steps, the largest differences from one process that
takes the full batch (relative for loss and norm, absolute for weights), and the bytes that a rank holds of weights, gradients
and optimizer state, marked `=` if `expected_bytes` gives exactly the same. Writes the same as JSON. Runs on CPUs. Exit status 1
if a difference is too large or a byte is not accounted for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
import torch

from benchmarks import machine
from pretrain.config import EngineConfig
from pretrain.invariance import Case, Outcome, check_invariance, small_model
from pretrain.model.config import ModelConfig
from pretrain.model.transformer import Transformer
from pretrain.run import command_line

SEQUENCES, GRAD_CLIP, SEED = 16, 0.5, 0
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


def expected_bytes(case: Case, shapes: list[tuple[int, ...]]) -> dict[str, int]:
    """Bytes on the rank that holds most, with momentum as the only moment.

    ddp: everything; the gradients are the buckets, with and without accumulation. zero1, zero2: a rank owns one part of all
    weights, flattened and padded to a multiple of 2 elements per rank; zero1 in bf16 sums all gradients on every rank. zero3: a
    part of each parameter, rounded up. fsdp2: rows of each parameter, rounded up, which are also the master weights.
    """
    ranks, name = case.ranks, case.engine.name
    total = sum(map(math.prod, shapes))
    compute = 2 if case.engine.precision == "bf16" else 4
    if name == "ddp":
        return {"weights": 4 * total, "gradients": 4 * total, "state": 4 * total}
    if name == "fsdp2":
        share = sum(math.ceil(rows / ranks) * math.prod(rest) for rows, *rest in shapes)
        return {"weights": 4 * share, "gradients": 4 * share, "state": 4 * share}
    if name == "zero3":
        share = sum(math.ceil(math.prod(shape) / ranks) for shape in shapes)
        return {"weights": compute * share, "gradients": 4 * share, "state": 8 * share}
    share = math.ceil(total / (2 * ranks)) * 2
    summed = share * ranks if (name, case.engine.precision) == ("zero1", "bf16") else share
    return {"weights": compute * share * ranks, "gradients": 4 * summed, "state": 8 * share}


def main(argv: list[str]) -> int:
    """Runs the checks; returns the exit status."""
    parser = command_line.make_parser(__doc__)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES, help="default: all")
    parser.add_argument("--processes", nargs="+", type=command_line.at_least(1), default=[1, 2], metavar="N",
                        help="numbers of processes (default: 1 2)")  # fmt: skip
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="default: both")
    parser.add_argument("--output", type=Path, default=Path("engine_matrix.json"), help="JSON file to write (%(default)s)")
    options = parser.parse_args(argv)
    model = small_model(ModelConfig(qk_norm=True))
    with torch.device("meta"):
        shapes = [tuple(parameter.shape) for parameter in Transformer(model).parameters()]
    print("engine  precision  ranks x micro x accumulation     loss     norm | differences: loss     norm  weights | bytes: "
          "  weights gradients     state")  # fmt: skip
    rows = []
    for outcome in check_invariance(model, list(_cases(options)), GRAD_CLIP, SEED):
        if outcome.error:
            raise RuntimeError(outcome.error)
        expected = expected_bytes(outcome.case, shapes)
        rows.append(dataclasses.asdict(outcome) | {"passed": outcome.passed, "expected_bytes": expected})
        print(_row(outcome, expected), flush=True)
    options.output.write_text(json.dumps({"machine": machine.facts(), "rows": rows}, indent=1) + "\n")
    good = all(row["passed"] and row["bytes_per_rank"] == row["expected_bytes"] for row in rows)
    print(f"{'all equal' if good else 'NOT ALL EQUAL'}; written to {options.output}")
    return 0 if good else 1


def _cases(options: argparse.Namespace):
    for name in options.engines:
        for precision in options.precision:
            engine = EngineConfig(name=name, precision=precision, keep_whole_below=0, bucket_mib=None if name == "fsdp2" else 1)
            for ranks in options.processes:
                share = SEQUENCES // ranks
                for micro_batch in (1, share // 2, share):
                    yield Case(engine, ranks, micro_batch, SEQUENCES)


def _row(outcome: Outcome, expected: dict[str, int]) -> str:
    case, held = outcome.case, outcome.bytes_per_rank
    split = f"{case.ranks} x {case.micro_batch} x {case.accumulation}"
    sizes = " ".join(f"{held[key]:>9,}{'=' if held[key] == expected[key] else '!'}" for key in expected)
    return (
        f"{case.engine.name:7} {case.engine.precision:9}  {split:28} {outcome.losses[-1]:8.5f} {outcome.norms[-1]:8.5f} | "
        f"           {outcome.loss_difference:8.1e} {outcome.norm_difference:8.1e} {outcome.weight_difference:8.1e} | "
        f"      {sizes}{'' if outcome.passed else '  DIFFERENT'}"
    )


if __name__ == "__main__":
    sys.exit(command_line.run(main))
