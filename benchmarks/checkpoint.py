"""Measures how long a run waits for a checkpoint, saved in the background or the foreground, and the memory that saving takes.

    python benchmarks/checkpoint.py [--hidden-size 640] [--layers 8] [--rounds 3] [--folder DIR] [--output FILE]
    python benchmarks/checkpoint.py --rounds 0 --hidden-size 1280 --layers 12        memory only, for a larger state

Trains a model on random tokens in one process, saving in the foreground and in the background alternately. `stall` is the
time inside calls of the saver, `durable` the time from the start of a save to its acknowledgement, `step` the median of the
steps in between, or of steps without a save. All are medians over the rounds, in wall time: the disk is measured, too, and so
is whatever else the machine does.

Memory is the peak growth of the resident set (Linux), each case in its own process, in bytes and relative to the state's size
(12 bytes per parameter: weights and two moments in fp32). `first save in the background` includes the copy of the state that
the saver keeps until the run ends, so a `second` one adds almost nothing. A save in the foreground and a load stream.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import machine
from pretrain.checkpoint import storage
from pretrain.checkpoint.manifest import Checkpoint
from pretrain.checkpoint.saver import Saver
from pretrain.config import CheckpointConfig, EngineConfig, OptimizerConfig
from pretrain.engines.base import Engine
from pretrain.engines.start import start_engine
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer
from pretrain.run import command_line

VOCAB_SIZE, SEQUENCE_LENGTH, STEPS_PER_SAVE = 32_000, 64, 3


def make_engine(hidden_size: int, layers: int) -> Engine:
    """An engine of one process with a model and its moments."""
    config = ModelConfig(hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=hidden_size // 64)
    model = resolve_model(config, vocab_size=VOCAB_SIZE, sequence_length=SEQUENCE_LENGTH)
    engine = start_engine(EngineConfig(name="ddp"))
    engine.prepare(lambda: Transformer(model), lambda model: build_optimizer(model, OptimizerConfig()), 1.0, seed=0)
    return engine


def state_bytes(engine: Engine) -> int:
    """Bytes of all tensors of a checkpoint."""
    return sum(shard.values.nbytes for shard in engine.shards(saving=True))


def take_step(engine: Engine) -> float:
    """Returns the seconds of one step."""
    tokens_BT = torch.randint(VOCAB_SIZE, (1, SEQUENCE_LENGTH), device=engine.device)
    began = time.perf_counter()
    with engine.micro_batch(last=True):
        engine.backward(engine.forward(tokens_BT, tokens_BT, None).loss_sum / SEQUENCE_LENGTH)
    engine.update(1e-4)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def save_once(engine: Engine, saver: Saver, step: int) -> dict[str, float]:
    """Saves once and takes steps until the checkpoint is durable."""
    steps, began = [], time.perf_counter()
    saver.save(step, {"val_loss": None}, last=False)
    stall = time.perf_counter() - began
    durable = stall if saver.saved and saver.saved.step == step else None
    while durable is None or len(steps) < STEPS_PER_SAVE:
        steps.append(take_step(engine))
        settled = time.perf_counter()
        saver.settle(saver.votes())
        stall += time.perf_counter() - settled
        if durable is None and saver.saved and saver.saved.step == step:
            durable = time.perf_counter() - began
    return {"stall_seconds": stall, "durable_seconds": durable, "step_seconds": statistics.median(steps)}


def stalls(engine: Engine, folder: Path, rounds: int) -> list[dict]:
    """Rows for no save, for the foreground and for the background."""
    savers = {}
    for name in ("foreground", "background"):
        config = CheckpointConfig(keep_last=1, keep_best=0, asynchronous=name == "background")
        savers[name] = Saver(folder / name, engine, config, lambda saved: None)
    found: dict[str, list[dict]] = {"no save": [], **{name: [] for name in savers}}
    for number in range(rounds + 1):
        for name in list(found)[:: 1 if number % 2 else -1]:
            if name == "no save":
                figures = {"stall_seconds": 0.0, "durable_seconds": 0.0}
                figures["step_seconds"] = statistics.median(take_step(engine) for _ in range(2 * STEPS_PER_SAVE))
            else:
                figures = save_once(engine, savers[name], number)
            if number:  # the first round allocates memory
                found[name].append(figures)
    for saver in savers.values():
        saver.wait()
    return [
        {"save": name, **{key: statistics.median(row[key] for row in rows) for key in rows[0]}} for name, rows in found.items()
    ]


# ---------------------------------------------------------------- memory


CASES = ("save in the foreground", "first save in the background", "second save in the background", "load")


def grown(what: str, folder: Path, hidden_size: int, layers: int, results) -> None:
    """Puts bytes of the state and peak growth of the resident set during `what` into `results`. Runs in its own process."""
    engine = make_engine(hidden_size, layers)
    size = state_bytes(engine)
    config = CheckpointConfig(keep_last=1, keep_best=0, asynchronous="background" in what)
    with Saver(folder, engine, config, lambda saved: None) as saver:
        if what.startswith("second"):
            saver.save(1, {"val_loss": None}, last=False)
            saver.wait()
        machine.forget_peak()
        before, began = machine.resident_bytes(peak=False), time.perf_counter()
        if what == "load":
            storage.load(saved_checkpoint(folder), engine)
        else:
            saver.save(2, {"val_loss": None}, last=False)  # the last save of a job never copies the state
            saver.wait()
        seconds = time.perf_counter() - began
    bytes_more = machine.resident_bytes(peak=True) - before
    results.put({"what": what, "state_bytes": size, "grown_bytes": bytes_more, "seconds": seconds})


def saved_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint that the case before left."""
    return Checkpoint(folder / "step_00000002")


def memory(folder: Path, hidden_size: int, layers: int) -> list[dict]:
    """Rows for a save in the foreground, a first and a second one in the background, and a load."""
    context, rows = multiprocessing.get_context("spawn"), []
    for what in CASES:
        if what != "load":
            shutil.rmtree(folder, ignore_errors=True)
        results = context.SimpleQueue()
        process = context.Process(target=grown, args=(what, folder, hidden_size, layers, results))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{what}: the process ended with {process.exitcode}")
        rows.append(results.get())
    return rows


def main(argv: list[str]) -> None:
    """Runs the benchmark."""
    parser = command_line.make_parser(__doc__)
    least = command_line.at_least
    parser.add_argument("--hidden-size", type=least(64), default=640, help="of the model, a multiple of 64 (%(default)s)")
    parser.add_argument("--layers", type=least(1), default=8, help="of the model (%(default)s)")
    parser.add_argument("--rounds", type=least(0), default=3, help="timed saves of each kind; 0: memory only (%(default)s)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: that of temporary files)")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: none)")
    arguments = parser.parse_args(argv)
    report: dict = {"machine": machine.facts(), "hidden_size": arguments.hidden_size, "layers": arguments.layers}
    print(machine.describe(report["machine"]))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        report["memory"] = memory(folder / "memory", arguments.hidden_size, arguments.layers)
        if arguments.rounds:
            engine = make_engine(arguments.hidden_size, arguments.layers)
            report["stalls"] = stalls(engine, folder, arguments.rounds)
    size = report["memory"][0]["state_bytes"]
    print(f"{size / 12e6:.0f} M parameters, state {size / 2**30:.2f} GiB")
    for row in report.get("stalls", []):
        stall, durable, step = row["stall_seconds"], row["durable_seconds"], row["step_seconds"]
        print(f"{row['save']:12} stall {stall:7.3f} s   durable {durable:7.3f} s   step {step:6.3f} s")
    for row in report["memory"]:
        mib = row["grown_bytes"] / 2**20
        print(
            f"{row['what']:30} memory +{mib:7.0f} MiB = {row['grown_bytes'] / size:6.1%} of the state   {row['seconds']:6.2f} s"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
