"""Measures how the memory of a rank falls when ranks share a long sequence (`engine.parallel.sequence`).

    python benchmarks/long_context.py [--lengths 4096 16384 65536] [--ranks 1 2 4] [--longest-real 16384] [--output FILE]

One sequence per step under `ddp`, in fp32, for a small model with grouped queries. Up to --longest-real tokens, real gloo
ranks train a step on CPUs and count their tensors (`pretrain/plan/tracker.py`); longer sequences are a dry run, whose counts
tests hold equal to real ones. `kept` is what the forward pass keeps for the backward pass, `peak` is the most that exists at
any time, both without weights, gradients and moments. `widest` is the largest tensor of the forward pass: no rank has hidden
states or logits of the entire sequence. It measures no time: ranks on one CPU share its cores.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.machine import describe, facts
from pretrain import devices, dry_run
from pretrain.config import BatchConfig, Config, DataConfig, EngineConfig, ParallelConfig, SyntheticConfig, TrainConfig
from pretrain.engines.start import start_engine
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.plan.scaling import Cluster
from pretrain.plan.tracker import Trace, Tracker
from pretrain.run import command_line
from pretrain.run.processes import run_processes

MODEL = ModelConfig(
    hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=704, vocab_size=8192
)
STATE = ("weights", "gradients", "moments", "buffers", "batch")


def settings(length: int, sequence: int) -> Config:
    """One sequence, shared by `sequence` ranks."""
    return Config(
        model=MODEL,
        data=DataConfig(sequence_length=length, synthetic=SyntheticConfig()),
        train=TrainConfig(max_steps=1),
        batch=BatchConfig(global_batch_size=1, micro_batch_size=1),
        engine=EngineConfig(name="ddp", precision="fp32", compile="none", parallel=ParallelConfig(sequence=sequence)),
    )


def figures(trace: Trace) -> dict[str, int]:
    """Bytes of a step besides the state."""

    def besides(event: int) -> int:
        return sum(block.bytes for block in trace.live(event) if block.kind not in STATE and block.phase != "start")

    phases = [phase for phase in trace.phases if phase.name.startswith(("forward", "backward"))]
    blocks = [block for block in trace.allocations if block.phase.startswith("forward") and block.kind not in STATE]
    return {
        "kept": besides(phases[0].end_event),
        "peak": max(besides(phase.peak_event) for phase in phases),
        "widest": max(block.bytes for block in blocks),
    }


def on_rank(config: Config) -> dict[str, int]:
    """A step of real tensors on a real rank."""
    torch.set_num_threads(1)
    engine = start_engine(config.engine)
    engine.device = torch.device("cpu")
    with Tracker(engine.device) as tracker:
        tracker.begin("start")
        dry_run.one_step(engine, config, resolved(config), 1, tracker)
        tracker.end()
    engine.close()
    return figures(tracker.trace)


def resolved(config: Config) -> ModelConfig:
    """The model of these settings."""
    return resolve_model(MODEL, vocab_size=MODEL.vocab_size, sequence_length=config.data.sequence_length)


def measure(length: int, sequence: int, real: bool) -> dict:
    """A row of the table: of the rank that needs most."""
    config = settings(length, sequence)
    if real:
        ranks = run_processes(sequence, on_rank, config)
        found = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    else:
        found = figures(dry_run.dry_run(config, resolved(config), Cluster(devices.find("h100"), sequence), kind="cpu").trace)
    return {"length": length, "sequence": sequence, "ranks": "real" if real else "dry run", **found}


def main(argv: list[str]) -> None:
    """Prints the table."""
    parser = command_line.make_parser(__doc__)
    positive = command_line.at_least(1)
    parser.add_argument("--lengths", type=positive, nargs="+", default=[4096, 16384, 65536], help="(default: %(default)s)")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2, 4], help="(default: %(default)s)")
    parser.add_argument("--longest-real", type=positive, default=16384, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: none)")
    options = parser.parse_args(argv)
    multiprocessing.set_forkserver_preload(["torch", "accelerate", "pretrain.train"])
    machine, rows = facts(), []
    print(describe(machine))
    print("tokens  sequence  ranks     kept, MiB  peak, MiB  widest, MiB   kept   peak  of one rank's")
    for length in options.lengths:
        alone = None
        for sequence in options.ranks:
            row = measure(length, sequence, length <= options.longest_real)
            alone = alone or row
            sizes = "".join(f"{row[name] / 2**20:11.1f}" for name in ("kept", "peak", "widest"))
            shares = "".join(f"{row[name] / alone[name]:7.3f}" for name in ("kept", "peak"))
            print(f"{length:6} {sequence:9}  {row['ranks']:8}{sizes}   {shares}", flush=True)
            rows.append(row)
    if options.output:
        options.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
