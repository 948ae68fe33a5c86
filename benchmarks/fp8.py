"""Compares the loss of training in fp8 with that in bf16: the same model, initial weights, text and order.

    python benchmarks/fp8.py [--steps 300] [--width 128] [--layers 4] [--output FILE]

The text is the source code of Python's standard library as bytes, read once. Prints the mean training loss of each tenth of the
run, and the difference, beside that between two bf16 runs with other initial weights: what chance alone makes. On CPUs,
torchao rounds to fp8 and multiplies in a wider type (`emulate`), and narrower matrices than on GPUs are taken, so that a CPU
can train the model: this shows losses, not speed. `benchmarks/gpu.py` measures the speed on a GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import machine
from pretrain import UserError
from pretrain.config import EngineConfig, OptimizerConfig, ScheduleConfig
from pretrain.data.batches import Batch
from pretrain.data.corpus import STDLIB, Corpus
from pretrain.engines import fp8
from pretrain.engines.start import start_engine
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer
from pretrain.optim.schedule import lr_at
from pretrain.run import command_line
from pretrain.train import train_step

LENGTH, SEQUENCES, LR, PARTS = 128, 8, 2e-3, 10


def main(argv: list[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = command_line.make_parser(__doc__)
    parser.add_argument("--steps", type=command_line.at_least(PARTS), default=300, help="steps of each run (%(default)s)")
    parser.add_argument("--width", type=command_line.at_least(64), default=128, help="hidden_size (%(default)s)")
    parser.add_argument("--layers", type=command_line.at_least(1), default=4, help="blocks (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("fp8.json"), help="JSON file to write (%(default)s)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        fp8.require_hardware, fp8.NARROWEST = lambda: None, min(fp8.NARROWEST, options.width)
    shape = ModelConfig(hidden_size=options.width, num_hidden_layers=options.layers, num_attention_heads=options.width // 64)
    model = resolve_model(shape, vocab_size=256, sequence_length=LENGTH)
    text = torch.frombuffer(bytearray(_text(options.steps * SEQUENCES * (LENGTH + 1))), dtype=torch.uint8)
    order = torch.randperm(options.steps * SEQUENCES, generator=torch.Generator().manual_seed(0))
    windows_SBT = text.view(-1, LENGTH + 1)[order].view(options.steps, SEQUENCES, LENGTH + 1)
    runs = {name: _train(model, windows_SBT, precision, seed) for name, (precision, seed) in RUNS.items()}
    rows = {name: torch.tensor(losses).tensor_split(PARTS) for name, losses in runs.items()}
    found = machine.facts()
    print(machine.describe(found))
    print(f"steps      {'  '.join(f'{name:>12}' for name in runs)}    fp8 - bf16  other - bf16")
    last = 0
    for parts in zip(*rows.values(), strict=True):
        means = [part.mean().item() for part in parts]
        first, last = last + 1, last + len(parts[0])
        shown = "  ".join(f"{mean:12.4f}" for mean in means)
        print(f"{first:4}-{last:<4}  {shown}  {means[1] - means[0]:+12.4f}  {means[2] - means[0]:+12.4f}", flush=True)
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    options.output.write_text(json.dumps({"machine": found, "settings": settings, "losses": runs}, indent=1) + "\n")
    return 0


RUNS = {"bf16": ("bf16", 0), "fp8": ("fp8", 0), "bf16 other": ("bf16", 1)}
"""Name -> (precision, seed of the initial weights)."""


def _text(size: int) -> bytes:
    """The first `size` bytes of the standard library's source code."""
    text = bytearray()
    for _, document in Corpus([STDLIB]).documents():
        text += document.encode() + b"\n"
        if len(text) >= size:
            return bytes(text[:size])
    raise UserError(f"the standard library has {len(text):,} bytes, and {size:,} are needed; take fewer --steps")


def _train(model: ModelConfig, windows_SBT: torch.Tensor, precision: str, seed: int) -> list[float]:
    """The loss of each step, in nats per byte."""
    engine = start_engine(EngineConfig(precision=precision, compile="blocks" if torch.cuda.is_available() else "none"))
    optimizer = OptimizerConfig(lr=LR)
    engine.prepare(lambda: Transformer(model), lambda model: build_optimizer(model, optimizer), 1.0, seed)
    losses, steps = [], len(windows_SBT)
    schedule = ScheduleConfig(warmup_steps=steps // 10)
    for step, window_BT in enumerate(windows_SBT, start=1):
        tokens_BT = window_BT.long()
        batch = engine.to_device(Batch(tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous(), None))
        result = train_step(engine, [batch], lr_at(step, schedule, LR, steps))
        losses.append(result.loss_sum / result.tokens)
    found = torch.stack(losses).tolist()
    engine.close()
    return found


if __name__ == "__main__":
    sys.exit(command_line.run(main))
