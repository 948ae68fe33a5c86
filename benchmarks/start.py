"""Measures the time from a command to its first step: of a tiny run, and, with --compile, of shape C1 whose compiler finds its
cache empty (cold) and filled (warm).

    python benchmarks/start.py [--rounds 5] [--baseline FOLDER] [--engine zero1] [--compile blocks model] [--output FILE]

Each start is a process of its own, `python launch/pretrain.py` on generated data, on CPUs in fp32; it ends when the run prints
its first step. CPU seconds are those of the process and of the children that it has waited for, such as compilers; wall seconds
depend on what else the machine does. --baseline: another checkout of this project, whose starts alternate with those of this
one (A B, B A, ...); the ratio is the median of those of adjacent starts. The first start of each is not counted: it fills the
caches of the file system and of Python.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.shapes import SHAPES
from pretrain.report import environment
from pretrain.run import command_line

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--model.hidden_size", "32", "--model.num_hidden_layers", "2", "--model.num_attention_heads", "2",
        "--model.vocab_size", "64", "--data.sequence_length", "16", "--batch.global_batch_size", "8",
        "--batch.micro_batch_size", "2"]  # fmt: skip
COMMON = ["--data.synthetic.kind", "uniform", "--train.max_steps", "2", "--engine.precision", "fp32", "--log.sinks",
          "[console]"]  # fmt: skip


def main(argv: list[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = command_line.make_parser(__doc__)
    parser.add_argument("--rounds", type=command_line.at_least(1), default=5, help="counted starts of each (%(default)s)")
    parser.add_argument("--baseline", type=Path, metavar="FOLDER", help="a checkout to compare with")
    parser.add_argument("--engine", default="ddp", metavar="NAME", help="engine of the tiny run (%(default)s)")
    parser.add_argument("--compile", nargs="+", choices=("blocks", "model"), default=[], help="also measure compiled starts")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write")
    options = parser.parse_args(argv)
    checkouts = {"this": ROOT} | ({"baseline": options.baseline.resolve()} if options.baseline else {})
    figures: dict = {f"tiny {options.engine}": tiny(checkouts, options.engine, options.rounds)}
    for what in options.compile:
        figures[f"C1 {what}"] = compiled(what)
    print(f"{'start':28} {'CPU s':>7} {'wall s':>7}")
    for name, starts in figures.items():
        for which, (cpu, wall) in starts.items():
            print(f"{name + ', ' + which:28} {cpu:7.2f} {wall:7.2f}")
    if options.output:
        options.output.write_text(json.dumps({"figures": figures, "environment": environment.here()}, indent=1) + "\n")
    return 0


def tiny(checkouts: dict[str, Path], engine: str, rounds: int) -> dict[str, tuple[float, float]]:
    """-> (CPU seconds, wall seconds) of each checkout, and their ratios if there are two."""
    found: dict[str, list] = {name: [] for name in checkouts}
    for number in range(rounds + 1):
        for name in list(checkouts)[:: -1 if number % 2 else 1]:
            with tempfile.TemporaryDirectory() as folder:
                seconds = start(checkouts[name], [*TINY, "--engine.name", engine], Path(folder))
            if number:
                found[name].append(seconds)
    medians = {name: tuple(statistics.median(column) for column in zip(*starts, strict=True)) for name, starts in found.items()}
    if len(checkouts) == 1:
        return medians
    pairs = list(zip(found["this"], found["baseline"], strict=True))
    return medians | {"this / baseline": tuple(statistics.median(a[i] / b[i] for a, b in pairs) for i in (0, 1))}


def compiled(what: str) -> dict[str, tuple[float, float]]:
    """-> (CPU seconds, wall seconds) of three starts of C1: not compiled, then compiled without and with a filled cache."""
    shape = SHAPES["C1"]
    flags = [f"--model.{key}={getattr(shape.model, key)}" for key in ("hidden_size", "num_hidden_layers", "vocab_size",
             "num_attention_heads", "num_key_value_heads", "intermediate_size")]  # fmt: skip
    flags += [f"--data.sequence_length={shape.sequence_length}", f"--batch.micro_batch_size={shape.micro_batch_size}"]
    flags += [f"--batch.global_batch_size={shape.tokens_per_step // shape.sequence_length}"]
    with tempfile.TemporaryDirectory() as folder:
        ways = {"not compiled": "none", "cold": what, "warm": what}
        return {name: start(ROOT, [*flags, f"--engine.compile={way}", f"--run.name={name.replace(' ', '_')}"], Path(folder))
                for name, way in ways.items()}  # fmt: skip


def start(checkout: Path, flags: list[str], folder: Path) -> tuple[float, float]:
    """-> (CPU seconds, wall seconds) up to the line of step 1."""
    command = [sys.executable, "launch/pretrain.py", "--run.directory", str(folder), *COMMON, *flags]
    unset = ("PYTHONDONTWRITEBYTECODE", "TORCHINDUCTOR_CACHE_DIR")
    environ = {key: value for key, value in os.environ.items() if key not in unset} | {"PYTHONUNBUFFERED": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=checkout, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.split()[:1] == ["1/2"]:
            wall, cpu = time.perf_counter() - began, cpu_seconds(process.pid)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return cpu, wall
    raise SystemExit(f"{' '.join(command)} ended before its first step:\n{''.join(lines)}")


def cpu_seconds(process: int) -> float:
    """User and system time of a process, all its threads and the children that it has waited for."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
