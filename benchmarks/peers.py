"""Measures training against other frameworks: the same model, tokens and hyperparameters, each in its own training loop.

    python benchmarks/peers.py                                         launch/pretrain.py and Hugging Face Trainer
    python benchmarks/peers.py --litgpt --nanogpt PATH                 and litgpt, and a checkout of karpathy/nanoGPT
    python benchmarks/peers.py --cases eager --rounds 4                one table
    python benchmarks/peers.py --litgpt --nanogpt PATH --output peers.json

`--litgpt` installs litgpt from the package index into an environment of its own below `--environments`, with the same torch.
On a CPU the programs of a table are all loaded and take turns of `--steps` steps (A B C, C B A, ...): only one of them
computes at any time, and the others wait inside a hook after the optimizer's step. On a GPU, whose memory they cannot share,
they are started anew for each turn, and their warm-up steps do not count.

CPU seconds are those of all threads and ranks. `speed` is the peer's CPU seconds (on a GPU: wall seconds) divided by ours,
the median over the rounds, with the least and the most in brackets: above 1, ours is faster. `wall` is the same ratio of wall
time, for an idle machine. On a loaded one, measure with `--threads 1`: threads that wait for a preempted one spin, which also
costs CPU time. `peak` is the largest resident set of a process (on a GPU: allocated memory), `first step` the time from the
start of the process, with empty compiler caches.

Cases: `eager` and `compiled` at the micro-batch of the shape, `small` eager at micro-batch 2, `ranks` eager on two ranks that
share the threads. litgpt (FSDP) and nanoGPT (CUDA) have no CPU ranks.

What is equal, and asserted: the number of parameters, the initial weights, the tokens of each step, the first loss to 1e-4
and the mean of the others to 0.02, the public version of torch. Also AdamW (lr 1e-3, betas 0.9 and 0.95, eps 1e-8, weight
decay 0.1), clipping at 1.0, a constant learning rate, fp32 on CPUs and bf16 autocast on GPUs, micro-batch and accumulation.

What is not: each framework keeps its own choice of which parameters decay, of the implementation of AdamW (litgpt fuses it on
GPUs only) and of how often it logs. nanoGPT's architecture is GPT-2's: as many layers, heads and the same width, but full
multi-head attention, a GELU MLP of four times the width, learned positions and tied embeddings. Its FLOPs per token relative
to ours are in the table; its losses are shown and not compared, because it draws its own crops.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from benchmarks import machine
from benchmarks.shapes import SHAPES, Shape
from pretrain import UserError
from pretrain.config import SyntheticConfig, load
from pretrain.data.passes import Cut
from pretrain.data.synthetic import SyntheticSource
from pretrain.model.flops import flops_per_token, num_parameters
from pretrain.model.transformer import build
from pretrain.run import command_line
from pretrain.run.parts import open_parts

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.cuda.is_available()
SEED, LR, BETAS, EPS, WEIGHT_DECAY, WARM_UP = 0, 1e-3, (0.9, 0.95), 1e-8, 0.1, 2
LITGPT = ("litgpt==0.5.13", "lightning>=2.6.1")
CASES = {  # name: (compiled, micro-batch or that of the shape, ranks)
    "eager": (False, None, 1),
    "compiled": (True, None, 1),
    "small": (False, 2, 1),
    "ranks": (False, None, 2),
}
SHARED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
          "intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings")  # fmt: skip


class PeerError(UserError):
    """A peer cannot be measured, or does not compute what ours computes."""


# ---------------------------------------------------------------- the programs


class Program:
    """A training run of one framework in processes of its own, held after each turn."""

    def __init__(self, name: str, python: str, task: Path, ranks: int, threads: int):
        self.name, self.log = name, task.with_name(f"{name}.log")
        self.peak_bytes, self.parameters = 0, 0
        self.processes, self.pipes = [], []
        places: list[dict[str, str]] = [{}]
        if ranks > 1:
            together = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
            places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **together} for rank in range(ranks)]
        began = time.perf_counter()
        for rank, place in enumerate(places):
            (asked, ask), (answer, answered) = os.pipe(), os.pipe()
            variables = {
                "GATE": f"{asked},{answered}", "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
                "TORCHINDUCTOR_CACHE_DIR": str(task.with_name(f"{name}-compiled-{rank}")), "TRANSFORMERS_VERBOSITY": "error",
                "TORCHDYNAMO_DISABLE": "0" if json.loads(task.read_text())["compile"] else "1", **place,
            }  # fmt: skip
            command = [python, str(ROOT / "benchmarks" / "peer_programs.py"), name, str(task)]
            with self.log.open("a") as log:
                self.processes.append(
                    subprocess.Popen(
                        command, env={**os.environ, **variables}, pass_fds=(asked, answered), stdout=log, stderr=log
                    )
                )
            os.close(asked)
            os.close(answered)
            self.pipes.append((os.fdopen(ask, "w"), os.fdopen(answer)))
        self._answers()
        self.first_step_seconds = time.perf_counter() - began

    def steps(self, count: int) -> dict[str, float]:
        """Lets the program make `count` steps. -> CPU seconds of all ranks and wall seconds of the slowest, per step."""
        self._ask(count)
        answers = self._answers()
        return {
            "cpu": sum(each["cpu"] for each in answers) / count,
            "wall": max(each["wall"] for each in answers) / count,
        }

    def finish(self) -> dict:
        """Lets the program end. -> its report: losses of its steps, version of torch."""
        self._ask(1)
        report = self._answers()[0]
        self.close()
        return report

    def close(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            process.kill()
            process.wait()
        for ask, answer in self.pipes:
            ask.close()
            answer.close()

    def _ask(self, count: int) -> None:
        for ask, _ in self.pipes:
            print(count, file=ask, flush=True)

    def _answers(self) -> list[dict]:
        lines = [answer.readline() for _, answer in self.pipes]
        if not all(lines):
            self.close()
            raise PeerError(f"{self.name} has exited; the end of its output:\n{self.log.read_text()[-3000:]}")
        answers = [json.loads(line) for line in lines]
        self.peak_bytes = max(self.peak_bytes, *(each["peak_bytes"] for each in answers))
        self.parameters = answers[0]["parameters"]
        return answers


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def install_litgpt(folder: Path) -> str:
    """Makes an environment with litgpt and this version of torch, unless it exists. -> its Python."""
    python = folder / "litgpt" / "bin" / "python"
    if not (folder / "litgpt" / "complete").exists():
        wanted = [*LITGPT, f"torch=={torch.__version__.split('+')[0]}"]
        print(f"installing {' '.join(wanted)} into {folder / 'litgpt'}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder / "litgpt"], check=True)
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], capture_output=True, text=True)
        if done.returncode:
            raise PeerError(f"litgpt could not be installed into {folder / 'litgpt'}:\n{done.stderr[-2000:]}")
        (folder / "litgpt" / "complete").touch()
    return str(python)


# ---------------------------------------------------------------- what they train on


def write_task(folder: Path, shape: Shape, compiled: bool, micro_batch_size: int, ranks: int, steps: int, nanogpt: str) -> Path:
    """Writes tokens, weights and settings for programs of `steps` steps. -> the file that describes them."""
    length, model = shape.sequence_length, shape.model
    rows = shape.tokens_per_step // length
    flat = folder / "tokens"
    flat.mkdir()
    cut = Cut(length - 1, length - 1)  # texts of `length` tokens
    source = SyntheticSource(
        SyntheticConfig(kind="markov"), "train", seed=SEED, vocab_size=model.vocab_size, block_length=cut.block_length
    )
    tokens = source.read(np.arange(steps * rows + 1), cut).astype(np.uint16).ravel()
    for split in ("train", "val"):
        tokens.tofile(flat / f"{split}.bin")
    # nanoGPT reads the vocabulary from a pickle: a dict with one entry, as protocol 0 spells it.
    (flat / "meta.pkl").write_text(f"(dVvocab_size\nI{model.vocab_size}\ns.")
    settings = {
        "run": {"name": "run", "directory": str(folder / "ours"), "seed": SEED},
        "model": {key: getattr(model, key) for key in SHARED if key != "max_position_embeddings"},
        "data": {"train": [{"path": str(flat / "train.bin"), "dtype": "uint16"}], "sequence_length": length},
        "batch": {"global_batch_size": rows, "micro_batch_size": micro_batch_size},
        "optimizer": {"lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY, "grad_clip": 1.0},
        "schedule": {"name": "constant"},
        "train": {"max_steps": steps},
        "engine": {"compile": "model" if compiled else "none", "precision": "bf16" if CUDA else "fp32"},
    }
    (folder / "ours.yaml").write_text(json.dumps(settings))  # JSON is YAML
    words = ["--config", str(folder / "ours.yaml")]
    data = open_parts(load(words, world_size=ranks)).data
    batch = data.take(0, steps * rows)
    torch.save(torch.cat([batch.tokens_BT, batch.labels_BT[:, -1:]], dim=1).contiguous(), folder / "samples.pt")
    torch.save({name: each.detach() for name, each in build(model, "cpu", SEED).named_parameters()}, folder / "weights.pt")
    task = {
        "folder": str(folder), "script": str(ROOT / "launch" / "pretrain.py"), "settings": words, "steps": steps,
        "samples": str(folder / "samples.pt"), "weights": str(folder / "weights.pt"),
        "model": {key: getattr(model, key) for key in SHARED}, "sequence_length": length, "compile": compiled,
        "micro_batch_size": micro_batch_size, "accumulation": rows // (ranks * micro_batch_size),
        "nanogpt": nanogpt, "nanogpt_data": str(flat),
        "lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY,
    }  # fmt: skip
    (folder / "task.json").write_text(json.dumps(task))
    return folder / "task.json"


def flops_ratio(shape: Shape) -> float:
    """FLOPs per token of nanoGPT's architecture relative to ours."""
    model, length = shape.model, shape.sequence_length
    layer = 12 * model.hidden_size**2  # 4 for the projections of attention, 8 for the MLP
    matmul = model.num_hidden_layers * layer + model.vocab_size * model.hidden_size
    theirs = 6 * matmul + 12 * model.num_hidden_layers * model.hidden_size * length
    return theirs / flops_per_token(model, length)


# ---------------------------------------------------------------- measuring


def measure(case: str, shape: Shape, pythons: dict[str, str], options) -> list[dict]:
    """One row per program: figures of all rounds, and the reports of the programs, checked."""
    compiled, micro_batch_size, ranks = CASES[case]
    names = [name for name in pythons if ranks == 1 or name in ("ours", "transformers")]
    threads = max(1, options.threads // ranks)
    steps = 1 + WARM_UP + options.steps * (1 if CUDA else options.rounds)
    turns: dict[str, list[dict]] = {name: [] for name in names}
    reports, programs = {}, {}
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        micro_batch_size = micro_batch_size or shape.micro_batch_size
        task = write_task(Path(folder), shape, compiled, micro_batch_size, ranks, steps, str(options.nanogpt))

        def start(name: str) -> Program:
            shutil.rmtree(Path(folder) / name, ignore_errors=True)
            program = Program(name, pythons[name], task, ranks, threads)
            programs[name] = program
            program.steps(WARM_UP)
            return program

        try:
            if not CUDA:
                for name in names:
                    start(name)
            for number in range(options.rounds):
                for name in names if number % 2 else names[::-1]:
                    program = start(name) if CUDA else programs[name]
                    turns[name].append(program.steps(options.steps))
                    if CUDA:
                        reports[name] = program.finish()
            if not CUDA:
                reports = {name: programs[name].finish() for name in names}
        finally:
            for program in programs.values():
                program.close()
    check(shape, programs, reports)
    clock = "wall" if CUDA else "cpu"
    rows = []
    for name in names:
        ratios = [theirs[clock] / ours[clock] for theirs, ours in zip(turns[name], turns["ours"], strict=True)]
        wall = [theirs["wall"] / ours["wall"] for theirs, ours in zip(turns[name], turns["ours"], strict=True)]
        rows.append({
            "case": case, "micro_batch_size": micro_batch_size, "ranks": ranks, "threads": threads, "program": name,
            "cpu_seconds": statistics.median(turn["cpu"] for turn in turns[name]),
            "wall_seconds": statistics.median(turn["wall"] for turn in turns[name]),
            "speed": statistics.median(ratios), "speed_least": min(ratios), "speed_most": max(ratios),
            "wall_speed": statistics.median(wall), "peak_bytes": programs[name].peak_bytes,
            "first_step_seconds": programs[name].first_step_seconds, "parameters": programs[name].parameters,
            "flops_ratio": flops_ratio(shape) if name == "nanogpt" else 1.0,
            "first_loss": reports[name]["losses"][0], "mean_loss": statistics.fmean(reports[name]["losses"][1:]),
            "torch": reports[name]["torch"], "turns": turns[name],
        })  # fmt: skip
    return rows


def check(shape: Shape, programs: dict[str, Program], reports: dict[str, dict]) -> None:
    """Raises PeerError unless all programs trained the same model on the same tokens."""
    expected, ours = num_parameters(shape.model).total, reports["ours"]
    for name, report in reports.items():
        if report["torch"].split("+")[0] != torch.__version__.split("+")[0]:
            raise PeerError(f"{name} runs torch {report['torch']}, ours {torch.__version__}: remove its environment and repeat")
        if not all(map(math.isfinite, report["losses"])):
            raise PeerError(f"{name}: losses are not finite: {report['losses']}")
        if name == "nanogpt":
            continue
        if programs[name].parameters != expected:
            raise PeerError(f"{name} trains {programs[name].parameters:,} parameters, the shape has {expected:,}")
        first = report["losses"][0] - ours["losses"][0]
        later = statistics.fmean(report["losses"][1:]) - statistics.fmean(ours["losses"][1:])
        if abs(first) > (1e-2 if CUDA else 1e-4) or abs(later) > 0.02:
            raise PeerError(f"{name}: the first loss differs by {first:.6f} from ours, the mean of the others by {later:.6f}")


def show(rows: list[dict]) -> None:
    """Prints the table of a case."""
    head = rows[0]
    print(f"\n{head['case']}: micro-batch {head['micro_batch_size']}, {head['ranks']} rank(s) x {head['threads']} thread(s)")
    print(
        "program      CPU s/step  wall s/step  speed                wall    peak MiB  first step   FLOPs  first loss  mean loss"
    )
    for row in rows:
        print(
            f"{row['program']:12} {row['cpu_seconds']:10.3f} {row['wall_seconds']:12.3f}  {row['speed']:5.3f} "
            f"[{row['speed_least']:.3f}, {row['speed_most']:.3f}] {row['wall_speed']:6.3f} {row['peak_bytes'] / 2**20:10.0f} "
            f"{row['first_step_seconds']:9.1f} s {row['flops_ratio']:7.3f} {row['first_loss']:11.5f} {row['mean_loss']:11.5f}",
            flush=True,
        )


def main(argv: list[str]) -> None:
    """Runs the benchmark."""
    parser = command_line.make_parser(__doc__)
    at_least = command_line.at_least
    shapes = [name for name in SHAPES if name[0] == ("G" if CUDA else "C") and SHAPES[name].model.moe is None]
    parser.add_argument("--shape", choices=shapes, default=shapes[0], help="of benchmarks/shapes.py (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all; on a GPU, the first two")
    parser.add_argument("--litgpt", action="store_true", help="measure litgpt, installed from the package index if necessary")
    parser.add_argument("--nanogpt", type=Path, metavar="PATH", help="measure this checkout of nanoGPT")
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "peers", help="of peers (default: build/peers)")
    parser.add_argument("--rounds", type=at_least(1), default=8, help="turns of each program (%(default)s)")
    parser.add_argument(
        "--steps", type=at_least(1), default=30 if CUDA else 2, help="steps per turn (default here: %(default)s)"
    )
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads(), help="of a program (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: none)")
    options = parser.parse_args(argv)
    pythons = {"ours": sys.executable, "transformers": sys.executable}
    if options.litgpt:
        pythons["litgpt"] = install_litgpt(options.environments.resolve())
    if options.nanogpt:
        options.nanogpt = options.nanogpt.resolve()
        if not (options.nanogpt / "train.py").exists():
            raise PeerError(f"{options.nanogpt}: is not a checkout of nanoGPT, train.py is missing")
        pythons["nanogpt"] = sys.executable
    shape, found = SHAPES[options.shape], machine.facts()
    print(machine.describe(found))
    print(f"{options.shape}: {num_parameters(shape.model).total:,} parameters, {shape.tokens_per_step:,} tokens per step")
    result = {"machine": found, "shape": options.shape, "model": asdict(shape.model), "rows": []}
    for case in options.cases if not CUDA else [case for case in options.cases if case in ("eager", "compiled")]:
        rows = measure(case, shape, pythons, options)
        show(rows)
        result["rows"] += rows
        if options.output:
            options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
