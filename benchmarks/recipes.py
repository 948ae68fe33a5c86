"""Compares training recipes at equal tokens, data and tokenizer: ours, plain AdamW, nanoGPT's, MiniMind's, changes of ours.

    python benchmarks/recipes.py --nanogpt CHECKOUT --minimind CHECKOUT --jobs 2
    python benchmarks/recipes.py --name manual --input /usr/share/man/man[2-8] --format txt --nanogpt ... --minimind ...
    python benchmarks/recipes.py --recipes ours --set 'clip=--optimizer.grad_clip 0'      ours, and ours with one change
    python benchmarks/recipes.py --seeds 7 8 9 --scale mini --nanogpt ... --minimind ...  other seeds, and a smaller model

`ours` and `adamw` are runs of launch/pretrain.py; recipe_peers.py says what the peers' recipes are. All train on the same
windows of the same text, in the same order for the same seed, and are validated on the same text, in full, after 25, 50, 75 and
100 % of the tokens. The figures are bits per byte of that text.

Every recipe gets the same search for its learning rate: three rates a factor of two apart around its published one (ours: that
of configs/quickstart.yaml), more where the best one is at an edge, with the first seed; then the best rate and its neighbours
with all seeds. A recipe is judged at the rate with the lowest mean. Seeds change initial weights and data order. `ours` also
trains on 2/3 and 1/2 of the tokens, each with its complete schedule, so that "as good with fewer tokens" is measured and not
read off a curve that has not decayed.

Each run is one process with one thread, and its result a file below --output: the same command continues where it was
interrupted, and repeats nothing. Losses do not depend on the load of the machine; `CPU` is the median CPU time of a run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml

from benchmarks import machine
from pretrain import UserError
from pretrain.files import write_atomically
from pretrain.report.units import human_seconds
from pretrain.run import command_line

ROOT = Path(__file__).resolve().parents[1]
QUARTERS = (0.25, 0.5, 0.75, 1.0)


class Scale(NamedTuple):
    """A size of model and run."""

    hidden_size: int
    layers: int
    heads: int
    vocab_size: int
    length: int
    """Tokens per sample."""
    rows: int
    """Samples per step."""
    steps: int
    valid_fraction: float = 0.05
    """Of the text."""


SCALES = {
    "tiny": Scale(64, 2, 2, 1024, 64, 8, 40),
    "mini": Scale(64, 4, 4, 1024, 128, 16, 160, 0.02),  # 0.3M tokens
    "small": Scale(128, 4, 4, 4096, 256, 16, 480),  # 2.0M tokens, one epoch of the standard library
    "medium": Scale(256, 6, 4, 8192, 256, 16, 1200),  # 4.9M tokens
}


class Recipe(NamedTuple):
    """What is compared."""

    name: str
    lr: float
    """The middle of the first three rates."""
    flags: tuple[str, ...]
    """Settings of launch/pretrain.py."""
    peer: str | None = None
    """Of `recipe_peers.PEERS`; None: ours."""
    share: float = 1.0
    """Of the tokens."""


_SHAPE = ("--model.qk_norm", "true")
_START = ("--model.zero_init_outputs", "true", "--optimizer.embedding_lr_scale", "16")
_MUON = ("--optimizer.name", "muon", "--schedule.name", "wsd", "--schedule.final_lr_fraction", "0.02", *_SHAPE, *_START)
_ADAMW = ("--optimizer.name", "adamw", "--schedule.name", "cosine", "--schedule.final_lr_fraction", "0.1", *_SHAPE)
RECIPES = [
    Recipe("ours", 8e-3, _MUON),
    Recipe("ours 2/3", 8e-3, _MUON, share=2 / 3),
    Recipe("ours 1/2", 8e-3, _MUON, share=1 / 2),
    Recipe("adamw", 2e-3, _ADAMW),
    Recipe("nanogpt", 1e-3, (), "nanogpt"),
    Recipe("minimind", 5e-4, (), "minimind"),
]
WARM_UP = 0.05  # of the steps, for ours and adamw


class Run(NamedTuple):
    """One training run."""

    recipe: Recipe
    lr: float
    seed: int

    @property
    def path(self) -> str:
        """Its folder below that of the corpus."""
        return f"{self.recipe.name.replace(' ', '_').replace('/', '_of_')}/lr_{self.lr:.3g}_seed_{self.seed}"


class Result(NamedTuple):
    """What a run gave."""

    bits_per_byte: list[float]
    """After each of QUARTERS; infinite after the run has diverged."""
    parameters: int
    cpu_seconds: float


Results = dict[Run, Result]


# ---------------------------------------------------------------- which runs are needed


def next_runs(recipe: Recipe, results: Results, seeds: list[int]) -> list[Run]:
    """Runs of `recipe` that can start now, given the results so far; empty if there are enough."""
    mine = {run: result.bits_per_byte[-1] for run, result in results.items() if run.recipe == recipe}
    first = {run.lr: bits for run, bits in mine.items() if run.seed == seeds[0]}
    if missing := [rate for rate in around(recipe.lr) if rate not in first]:
        return [Run(recipe, rate, seeds[0]) for rate in missing]
    best = min(first, key=first.__getitem__)
    if best in (min(first), max(first)):  # at an edge
        low, _, high = around(best)
        return [Run(recipe, low if best == min(first) else high, seeds[0])]
    if missing := [run for run in wanted(recipe, best, seeds) if run not in mine]:
        return missing
    best = best_rate(recipe, results, seeds)
    return [run for run in wanted(recipe, best, seeds) if run not in mine]


def around(rate: float) -> tuple[float, float, float]:
    """`rate` and its neighbours; halves and doubles are exact, so the same rate is always the same number."""
    return 0.5 * rate, rate, 2 * rate


def wanted(recipe: Recipe, best: float, seeds: list[int]) -> list[Run]:
    """The best rate and its neighbours with every seed."""
    return [Run(recipe, rate, seed) for rate in around(best) for seed in seeds]


def best_rate(recipe: Recipe, results: Results, seeds: list[int]) -> float:
    """The rate with the lowest mean of those that all seeds have."""
    means = {
        rate: statistics.fmean(results[Run(recipe, rate, seed)].bits_per_byte[-1] for seed in seeds)
        for rate in {run.lr for run in results if run.recipe == recipe}
        if all(Run(recipe, rate, seed) in results for seed in seeds)
    }
    return min(means, key=means.__getitem__)


def tokens_to_reach(target: float, curve: list[tuple[float, float]]) -> float:
    """Share of the tokens at which complete runs reach `target` bits per byte. curve: (share, bits per byte) of runs that
    differ in length alone, shortest first. Between two of them, bits are linear in the logarithm of the tokens; beyond them,
    that of the nearest two continues."""
    spans = list(itertools.pairwise(curve))
    (x0, y0), (x1, y1) = next((span for span in spans if span[1][1] <= target), spans[-1])
    return math.exp(math.log(x0) + (math.log(x1) - math.log(x0)) * (target - y0) / (y1 - y0))


# ---------------------------------------------------------------- running


@dataclass
class Bench:
    """The corpus and the place of the results."""

    folder: Path
    """Of the corpus: tokenizer, token files, runs."""
    scale: Scale
    checkouts: dict[str, str]
    """Of peers."""

    def prepare(self, text: list[str]) -> None:
        """Trains the tokenizer and tokenizes the corpus. text: flags of the tools that name it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / "text.json"
        if note.exists() and json.loads(note.read_text()) != text:
            raise UserError(
                f"{self.folder}: holds another text ({shlex.join(json.loads(note.read_text()))}); use another --name"
            )
        note.write_text(json.dumps(text))
        tokenizer, size = self.folder / "tokenizer", str(self.scale.vocab_size)
        if not (tokenizer / "tokenizer.json").exists():
            _call("tools/train_tokenizer.py", *text, "--output", str(tokenizer), "--vocab-size", size)
        if not (self.folder / "text_valid.json").exists():
            _call("tools/tokenize_corpus.py", *text, "--tokenizer", str(tokenizer), "--output", str(self.folder / "text"),
                  "--valid-fraction", str(self.scale.valid_fraction), "--workers", "2")  # fmt: skip

    def settings(self, run: Run) -> list[str]:
        """Flags of launch/pretrain.py; peers read what concerns them, too."""
        scale, folder = self.scale, self.folder
        steps = 4 * round(run.recipe.share * scale.steps / 4)
        base = {
            "run": {"name": "run", "directory": str(folder / run.path), "seed": run.seed},
            "tokenizer": {"path": str(folder / "tokenizer")},
            "data": {"train": [{"path": str(folder / "text_train")}], "valid": [{"path": str(folder / "text_valid")}],
                     "sequence_length": scale.length},
            "model": {"hidden_size": scale.hidden_size, "num_hidden_layers": scale.layers, "num_attention_heads": scale.heads,
                      "num_key_value_heads": scale.heads // 2, "intermediate_size": 3 * scale.hidden_size},
            "batch": {"global_batch_size": scale.rows, "micro_batch_size": scale.rows},
            "schedule": {"warmup_steps": round(WARM_UP * steps)},
            "train": {"max_steps": steps},
            "engine": {"precision": "fp32", "compile": "none"},
            "evaluate": {"every_steps": steps // 4},
            "checkpoint": {"every_minutes": 0},
            "log": {"every_steps": 10, "sinks": ["console", "jsonl"]},
        }  # fmt: skip
        path = folder / run.path / "base.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(base))
        return ["--config", str(path), *run.recipe.flags, "--optimizer.lr", f"{run.lr:.6g}"]

    def read(self, run: Run) -> Result | None:
        """The result of a run that is done. Raises UserError if its recipe had other settings."""
        path = self.folder / run.path / "result.json"
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        if found["flags"] != list(run.recipe.flags):
            flags = shlex.join(found["flags"])
            raise UserError(
                f"{path.parent}: is a run with {flags}; give the recipe another name, or remove {path.parent.parent}"
            )
        return Result(**found["result"])

    def train(self, run: Run) -> Result:
        """Trains, unless it is done. Raises UserError if the program fails."""
        if found := self.read(run):
            return found
        folder, flags = self.folder / run.path, self.settings(run)
        shutil.rmtree(folder / "run", ignore_errors=True)
        peer, task = run.recipe.peer, folder / "task.json"
        if peer:
            task.write_text(json.dumps({"peer": peer, "folder": self.checkouts[peer], "settings": flags}))
        program = ["benchmarks/recipe_peers.py", str(task)] if peer else ["launch/pretrain.py", *flags]
        seconds = _run([sys.executable, *program], folder / "output.log", diverges=not peer)
        if peer:
            found = json.loads((folder / "peer.json").read_text())
            records, parameters = found["records"], found["parameters"]
        else:
            records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
            parameters = records[0]["parameters"]
            shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
        bits = [record["val_bits_per_byte"] for record in records if "val_bits_per_byte" in record]
        bits = [value if math.isfinite(value) else math.inf for value in bits]
        result = Result(bits + [math.inf] * (len(QUARTERS) - len(bits)), parameters, seconds)
        write_atomically(folder / "result.json", json.dumps({"result": result._asdict(), "flags": run.recipe.flags}, indent=1))
        return result


def _call(script: str, *flags: str) -> None:
    """Raises UserError if the tool fails."""
    if status := subprocess.run([sys.executable, script, *flags], cwd=ROOT).returncode:
        raise UserError(f"{script} has exited with status {status}: see its message above")


def _run(command: list[str], log: Path, diverges: bool) -> float:
    """CPU seconds of a program with one thread. Raises UserError if it fails."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code and not (diverges and code == 70):
        raise UserError(f"{shlex.join(command)} has exited with status {code}; the end of {log}:\n{log.read_text()[-2000:]}")
    return usage.ru_utime + usage.ru_stime


def search(bench: Bench, recipes: list[Recipe], seeds: list[int], jobs: int) -> Results:
    """Trains all runs that the comparison needs, `jobs` at once."""
    results: Results = {}
    began, done, running = time.monotonic(), 0, {}
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            due = [run for recipe in recipes for run in next_runs(recipe, results, seeds)]
            for run in due:
                if found := bench.read(run):
                    results[run] = found
            if any(run in results for run in due):
                continue
            for run in due:
                if run not in running.values() and len(running) < jobs:
                    running[pool.submit(bench.train, run)] = run
            if not running:
                return results
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                results[run] = future.result()
                done += 1
                left = _expected(recipes, results, seeds) * (time.monotonic() - began) / done
                bits, _, seconds = results[run].bits_per_byte[-1], *results[run][1:]
                progress = f"{len(results)} runs, about {human_seconds(left)} left"
                print(f"{run.path:36} {bits:7.4f} bits per byte, CPU {seconds:4.0f} s; {progress}", flush=True)


def _expected(recipes: list[Recipe], results: Results, seeds: list[int]) -> int:
    """Runs that are still needed if no grid grows."""
    left = 0
    for recipe in recipes:
        mine = sum(run.recipe == recipe for run in results)
        left += len(next_runs(recipe, results, seeds)) if mine >= 3 * len(seeds) else 3 * len(seeds) - mine
    return left


# ---------------------------------------------------------------- what is shown


def rows_of(recipes: list[Recipe], results: Results, seeds: list[int]) -> list[dict]:
    """One row per recipe, at its best rate: mean and spread over the seeds."""
    rows = []
    for recipe in recipes:
        rate = best_rate(recipe, results, seeds)
        runs = [results[Run(recipe, rate, seed)] for seed in seeds]
        columns = list(zip(*(run.bits_per_byte for run in runs), strict=True))
        rows.append({
            "recipe": recipe.name, "lr": rate, "share": recipe.share, "parameters": runs[0].parameters,
            "mean": [statistics.fmean(column) for column in columns], "low": [min(column) for column in columns],
            "high": [max(column) for column in columns], "cpu_seconds": statistics.median(run.cpu_seconds for run in runs),
            "rates": {run.lr: result.bits_per_byte[-1] for run, result in results.items()
                      if run.recipe == recipe and run.seed == seeds[0]},
        })  # fmt: skip
    return rows


def table(rows: list[dict], seeds: list[int]) -> Iterator[str]:
    """The rows in text, and how many tokens ours needs for what the others reach."""
    heads = " ".join(f"{f'{quarter:.0%}':>8}" for quarter in QUARTERS)
    yield f"{'bits per byte after':20} {heads}  {'of seeds':15} {'lr':>8} {'parameters':>11} {'CPU':>6}"
    for row in rows:
        means = " ".join(f"{value:8.4f}" for value in row["mean"])
        spread = f"{row['low'][-1]:.4f}-{row['high'][-1]:.4f}"
        size = f"{row['parameters']:11,} {row['cpu_seconds']:4.0f} s"
        yield f"{row['recipe']:20} {means}  {spread:15} {row['lr']:8.3g} {size}"
    yield f"means of {len(seeds)} seeds at the best rate; `ours 2/3` and `ours 1/2` after quarters of their own tokens"
    curve = sorted((row["share"], row["mean"][-1]) for row in rows if row["recipe"] in ("ours", "ours 2/3", "ours 1/2"))
    if len(curve) > 1:
        for row in rows:
            if not row["recipe"].startswith("ours"):
                share = tokens_to_reach(row["mean"][-1], curve)
                beyond = "" if curve[0][0] <= share <= 1 else ", extrapolated"
                tokens = f"{share:.2f} of its tokens, 1/{1 / share:.2f}{beyond}"
                yield f"ours reaches the last figure of {row['recipe']} with {tokens}"


def draw(rows: list[dict], scale: Scale, title: str, path: Path) -> None:
    """Bits per byte against tokens: mean and range of the seeds."""
    from matplotlib.figure import Figure

    from pretrain.report.plot import COLORS, save

    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    tokens = scale.steps * scale.rows * scale.length
    for row, color in zip(rows, COLORS, strict=False):
        x = [row["share"] * tokens * quarter / 1e6 for quarter in QUARTERS]
        dashes = "-" if row["share"] == 1 else "--"
        axes.plot(x, row["mean"], "o", linestyle=dashes, color=color, label=f"{row['recipe']} (lr {row['lr']:g})")
        axes.fill_between(x, row["low"], row["high"], color=color, alpha=0.2)
    axes.set(title=title, xlabel="training tokens, millions", ylabel="bits per byte of validation text")
    axes.set_ylim(top=min(max(axes.get_ylim()[0], 1.4 * min(row["mean"][-1] for row in rows)), axes.get_ylim()[1]))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, path)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[Recipe]]:
    """The flags, and the recipes that they name."""
    parser = command_line.make_parser(__doc__)
    add = parser.add_argument
    add("--recipes", nargs="+", metavar="NAME", help=f"of {', '.join(repr(each.name) for each in RECIPES)} (default: all)")
    add("--set", action="append", default=[], metavar="NAME=FLAGS", help="one more recipe: ours with these settings")
    add("--base", choices=["ours", "adamw"], default="ours", help="what --set changes (default: %(default)s)")
    add("--name", default="stdlib", help="of the corpus, a folder below --output (default: %(default)s)")
    add("--input", nargs="+", default=["stdlib"], metavar="FILE", help="the text, as for tools/tokenize_corpus.py")
    add("--format", help="the same")
    add("--scale", choices=SCALES, default="small", help="size of model and runs (default: %(default)s)")
    add("--seeds", type=command_line.at_least(0), nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    add(
        "--jobs",
        type=command_line.at_least(1),
        default=1,
        metavar="N",
        help="runs at once, of one thread (default: %(default)s)",
    )
    for peer in ("nanogpt", "minimind"):
        add(f"--{peer}", metavar="FOLDER", help="a checkout")
    add("--output", type=Path, default=Path("runs/benchmarks/recipes"), metavar="FOLDER", help="(default: %(default)s)")
    options = parser.parse_args(argv)
    known = {each.name: each for each in RECIPES}
    if unknown := [name for name in options.recipes or [] if name not in known]:
        parser.error(f"--recipes: no recipe {unknown[0]!r}; allowed: {', '.join(map(repr, known))}")
    recipes = [known[name] for name in options.recipes or known]
    base = known[options.base]
    for text in options.set:
        name, equals, flags = text.partition("=")
        if not equals or not name or " " in name or name in {*known, *(each.name for each in recipes)}:
            parser.error(f"--set: got {text!r}, must be NAME=FLAGS with a new name, such as 'clip=--optimizer.grad_clip 0'")
        recipes.append(Recipe(name, base.lr, (*base.flags, *shlex.split(flags))))
    if missing := [each.peer for each in recipes if each.peer and not getattr(options, each.peer)]:
        parser.error(f"--{missing[0]}: give the folder of a checkout, or leave the recipe out with --recipes")
    return options, recipes


def main(argv: list[str]) -> None:
    """Trains, prints and writes the table and the picture."""
    options, recipes = parse(argv)
    checkouts = {
        peer: str(Path(getattr(options, peer)).resolve()) for peer in ("nanogpt", "minimind") if getattr(options, peer)
    }
    folder = (options.output / f"{options.name}_{options.scale}").resolve()
    bench = Bench(folder, SCALES[options.scale], checkouts)
    bench.prepare(["--input", *options.input, *(["--format", options.format] if options.format else [])])
    results = search(bench, recipes, options.seeds, options.jobs)
    rows, facts = rows_of(recipes, results, options.seeds), machine.facts()
    print(f"\n{machine.describe(facts)}\n{options.name}, {options.scale}")
    for line in table(rows, options.seeds):
        print(line)
    title = f"{options.name}, {options.scale}: {len(options.seeds)} seeds at each recipe's best learning rate"
    draw(rows, bench.scale, title, folder / "recipes.png")
    commits = {peer: _commit(path) for peer, path in checkouts.items()}
    report = {"machine": facts, "scale": bench.scale._asdict(), "commits": commits, "seeds": options.seeds, "rows": rows}
    write_atomically(folder / "recipes.json", json.dumps(report, indent=1) + "\n")
    print(f"{folder / 'recipes.json'}, {folder / 'recipes.png'}")


def _commit(folder: str) -> str:
    return subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(command_line.run(main))
