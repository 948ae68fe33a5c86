"""How long a run stands still for a checkpoint, written in the background and in the foreground, and what memory that takes.

    python benchmarks/checkpoint_stall.py [--hidden-size 640] [--layers 8] [--rounds 3] [--folder DIR] [--output FILE]
    python benchmarks/checkpoint_stall.py --rounds 0 --hidden-size 1280 --layers 12        the memory of a larger state alone

Trains a model on random tokens on one process and saves in the foreground and in the background in turn. `stall` is the time
inside the calls of the saver, `durable` that from the start of a save to its acknowledgement, `step` the median of the steps
between the two, beside the same without a save. Figures are medians over the rounds.

Memory is what the resident set grows by at its highest over a save or a load, in a process of its own for each, beside the size
of the state (12 bytes per parameter: weights and two moments in fp32). Prints two tables and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from pretrain.checkpoint import storage
from pretrain.checkpoint.manifest import Checkpoint
from pretrain.checkpoint.saver import Saver
from pretrain.config import CheckpointConfig, EngineConfig, OptimizerConfig
from pretrain.engines.base import Engine
from pretrain.engines.start import start_engine
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer

VOCAB_SIZE, SEQUENCE_LENGTH, STEPS_BESIDE = 32_000, 64, 3


def make_engine(hidden_size: int, layers: int) -> Engine:
    """One process with a model and its moments."""
    config = ModelConfig(hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=hidden_size // 64)
    model = resolve_model(config, vocab_size=VOCAB_SIZE, sequence_length=SEQUENCE_LENGTH)
    engine = start_engine(EngineConfig(name="ddp"))
    engine.prepare(lambda: Transformer(model), lambda model: build_optimizer(model, OptimizerConfig()), 1.0, seed=0)
    return engine


def state_bytes(engine: Engine) -> int:
    """Of all that a checkpoint holds."""
    return sum(shard.values.nbytes for shard in engine.shards(saving=True))


def take_step(engine: Engine) -> float:
    """-> its seconds."""
    tokens_BT = torch.randint(VOCAB_SIZE, (1, SEQUENCE_LENGTH), device=engine.device)
    began = time.perf_counter()
    with engine.micro_batch(last=True):
        engine.backward(engine.forward(tokens_BT, tokens_BT, None).loss_sum / SEQUENCE_LENGTH)
    engine.update(1e-4)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def save_once(engine: Engine, saver: Saver, step: int) -> dict[str, float]:
    """One save, and steps beside it until it is durable."""
    stall, steps, began = 0.0, [], time.perf_counter()
    saver.save(step, {"val_loss": None}, last=False)
    stall = time.perf_counter() - began
    durable = stall if saver.saved and saver.saved.step == step else None
    while durable is None or len(steps) < STEPS_BESIDE:
        steps.append(take_step(engine))
        settled = time.perf_counter()
        saver.settle(saver.votes())
        stall += time.perf_counter() - settled
        if durable is None and saver.saved and saver.saved.step == step:
            durable = time.perf_counter() - began
    return {"stall_seconds": stall, "durable_seconds": durable, "step_seconds": statistics.median(steps)}


def stalls(engine: Engine, folder: Path, rounds: int) -> list[dict]:
    """A row for no save, for the foreground and for the background."""
    savers = {}
    for name in ("foreground", "background"):
        config = CheckpointConfig(keep_last=1, keep_best=0, asynchronous=name == "background")
        savers[name] = Saver(folder / name, engine, config, lambda saved: None)
    found: dict[str, list[dict]] = {"no save": [], **{name: [] for name in savers}}
    for number in range(rounds + 1):
        for name in list(found)[:: 1 if number % 2 else -1]:
            if name == "no save":
                figures = {"stall_seconds": 0.0, "durable_seconds": 0.0}
                figures["step_seconds"] = statistics.median(take_step(engine) for _ in range(2 * STEPS_BESIDE))
            else:
                figures = save_once(engine, savers[name], number)
            if number:  # the first round touches new memory
                found[name].append(figures)
    for saver in savers.values():
        saver.wait()
    return [
        {"save": name, **{key: statistics.median(row[key] for row in rows) for key in rows[0]}} for name, rows in found.items()
    ]


# ---------------------------------------------------------------- memory


def resident(peak: bool) -> int:
    """Bytes of this process in memory now, or at the highest since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0])


def forget_peak() -> None:
    """From here on, the peak is counted anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def grown(what: str, folder: Path, hidden_size: int, layers: int, results) -> None:
    """In a process of its own: state, and growth of the resident set over `what`."""
    engine = make_engine(hidden_size, layers)
    size = state_bytes(engine)
    forget_peak()
    before, began = resident(peak=False), time.perf_counter()
    if what == "load":
        storage.load(Checkpoint(folder / "step_00000001"), engine)
    else:
        config = CheckpointConfig(asynchronous=what == "save in the background")
        with Saver(folder, engine, config, lambda saved: None) as saver:
            saver.save(1, {"val_loss": None}, last=True)
    seconds = time.perf_counter() - began
    results.put({"what": what, "state_bytes": size, "grown_bytes": resident(peak=True) - before, "seconds": seconds})


def memory(folder: Path, hidden_size: int, layers: int) -> list[dict]:
    """A row for each of the two saves and for a load."""
    context, rows = multiprocessing.get_context("spawn"), []
    for what in ("save in the foreground", "save in the background", "load"):
        results = context.SimpleQueue()
        process = context.Process(target=grown, args=(what, folder, hidden_size, layers, results))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{what}: ended with {process.exitcode}")
        rows.append(results.get())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=640)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="0: memory only")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: that of temporary files")
    parser.add_argument("--output", type=Path, help="JSON file; default: none")
    arguments = parser.parse_args()
    report: dict = {"hidden_size": arguments.hidden_size, "layers": arguments.layers}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        report["memory"] = memory(folder / "memory", arguments.hidden_size, arguments.layers)
        if arguments.rounds:
            engine = make_engine(arguments.hidden_size, arguments.layers)
            report |= {"device": engine.device_name, "threads": torch.get_num_threads()}
            report["stalls"] = stalls(engine, folder, arguments.rounds)
    size = report["memory"][0]["state_bytes"]
    print(f"{size / 12e6:.0f} M parameters, state {size / 2**30:.2f} GiB")
    for row in report.get("stalls", []):
        stall, durable, step = row["stall_seconds"], row["durable_seconds"], row["step_seconds"]
        print(f"{row['save']:12} stall {stall:7.3f} s   durable {durable:7.3f} s   step {step:6.3f} s")
    for row in report["memory"]:
        mib = row["grown_bytes"] / 2**20
        print(
            f"{row['what']:24} memory +{mib:7.0f} MiB = {row['grown_bytes'] / size:6.1%} of the state   {row['seconds']:6.2f} s"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
