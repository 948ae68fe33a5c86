"""Measures how long a rank takes to draw its initial weights, against one draw of every full parameter.

    python benchmarks/initial_weights.py [--shape G2] [--ranks 8] [--threads 1 2] [--output FILE]

Prints seconds of wall time and of CPU time for: one draw of each parameter, in one thread; all values by `fill_initial`, with
each number of threads; and the shards of the first and the last of `--ranks` ranks, in one thread. Checks for the first two
parameters that the values are equal. Runs on CPUs, whatever the device. Wall times need an idle machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import machine
from benchmarks.shapes import SHAPES
from pretrain.model.transformer import Transformer
from pretrain.run import command_line

SEED = 0
Part = tuple[torch.Tensor, int, str, tuple[int, ...]]
"""Memory for the values, their offset in the flattened parameter, its name, its shape."""


def main(argv: list[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = command_line.make_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="G2", help="shape of the model (%(default)s)")
    parser.add_argument("--ranks", type=command_line.at_least(1), default=8, help="ranks that share the model (%(default)s)")
    parser.add_argument("--threads", type=command_line.at_least(1), nargs="+", default=[1, 2], help="numbers (default: 1 2)")
    parser.add_argument("--output", type=Path, default=Path("initial_weights.json"), help="JSON file to write (%(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = Transformer(SHAPES[options.shape].model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, shape in list(shapes.items())[:2]:  # the embedding and a norm or projection
        part = torch.empty(math.prod(shape))
        model.fill_initial(part, 0, name, shape, SEED)
        assert torch.equal(part, _one_draw(model, name, shape).view(-1))
    cases: dict[str, Callable[[], object]] = {
        "one draw per parameter": lambda: [_one_draw(model, *each) for each in shapes.items()]
    }
    for threads in options.threads:
        cases[f"all values, {threads} thread{'s' * (threads > 1)}"] = _drawing(model, _parts(shapes, 1, 0), threads)
    for rank in (0, options.ranks - 1):
        cases[f"rank {rank} of {options.ranks}, 1 thread"] = _drawing(model, _parts(shapes, options.ranks, rank), 1)
    values, result = sum(map(math.prod, shapes.values())), {}
    found = machine.facts()
    print(f"{values:,} parameters ({options.shape}); {machine.describe(found)}")
    for name, draw in cases.items():
        cpu, wall = time.process_time(), time.perf_counter()
        draw()
        result[name] = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
        print(f"{name:24} {result[name]['wall_seconds']:8.2f} s wall {result[name]['cpu_seconds']:8.2f} s CPU", flush=True)
    result = {"machine": found, "shape": options.shape, "parameters": values, "cases": result}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _one_draw(model: Transformer, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    key = hashlib.blake2b(f"{SEED}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
    return torch.empty(shape).normal_(0.0, model._initial_std(name, shape[-1]), generator=generator)


def _parts(shapes: dict[str, tuple[int, ...]], ranks: int, rank: int) -> list[Part]:
    """A rank's equal share of each parameter."""
    parts = []
    for name, shape in shapes.items():
        count = math.prod(shape)
        begin, end = (min(-(-count // ranks) * r, count) for r in (rank, rank + 1))
        parts.append((torch.empty(end - begin), begin, name, shape))
    return sorted(parts, key=lambda part: part[1] + len(part[0]), reverse=True)


def _drawing(model: Transformer, parts: list[Part], threads: int) -> Callable[[], None]:
    def draw() -> None:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(model.fill_initial, *part, SEED) for part in parts]:
                done.result()

    return draw


if __name__ == "__main__":
    sys.exit(command_line.run(main))
