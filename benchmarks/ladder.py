"""Measures what each technique adds: training steps of the same model, of which each row adds one technique to the row above.

    python benchmarks/ladder.py [--shape C1] [--micro-batch N] [--rounds 5] [--no-compile] [--output FILE]

All rows train in one process with equal weights, data and loss (asserted), and take turns, in the opposite order every other
round, after two steps that do not count. Times are CPU seconds on CPUs, which other programs share, and wall seconds on GPUs.
`tokens/s` is the ratio to the first row, the median over the rounds. `peak` is the most memory that tensors of a step took at
any time beyond weights and optimizer state: allocations counted by torch's profiler, or by its allocator on a GPU.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import describe, facts
from benchmarks.shapes import SHAPES, Shape
from benchmarks.step import LR, WARM_UP, make_window, now
from pretrain.data.batches import Batch
from pretrain.model.loss import IGNORED, cross_entropy_sums
from pretrain.model.transformer import build
from pretrain.run import command_line


def plain_loss(hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, vocab_size: int, **_) -> tuple[Tensor, Tensor]:
    """All logits at once, in fp32."""
    logits_NV = F.linear(hidden_BTD.flatten(0, 1), weight_VD).float()[:, :vocab_size]
    loss_N = F.cross_entropy(logits_NV, labels_BT.flatten(), reduction="none", ignore_index=IGNORED)
    return loss_N.sum(), loss_N.detach().view_as(labels_BT).sum(1)


def chunked_loss(hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, vocab_size: int, **_) -> tuple[Tensor, Tensor]:
    """Chunks of the logits, each with a softmax in memory of its own."""

    def step(hidden_nD, weight_VD, labels_n, vocab_size, with_gradient, _):
        logits_nV = (hidden_nD @ weight_VD.T).float()
        loss_n = F.cross_entropy(logits_nV[:, :vocab_size], labels_n, reduction="none", ignore_index=IGNORED)
        target_n1 = torch.where(labels_n == IGNORED, 0, labels_n)[:, None]
        softmax_nV = torch.softmax(logits_nV, 1)
        minus_n1 = torch.full_like(target_n1, -1, dtype=softmax_nV.dtype)
        return loss_n, softmax_nV.scatter_add(1, target_n1, minus_n1).to(hidden_nD.dtype)

    return cross_entropy_sums(hidden_BTD, weight_VD, labels_BT, vocab_size, step=step)


def plain_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm with autograd's derivative."""
    return F.rms_norm(x.float(), weight_D.shape, weight_D.float(), eps).to(x.dtype)


def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding with autograd's derivative."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Rung(NamedTuple):
    """A row: which techniques it has."""

    name: str
    fused: bool
    loss: Callable | None
    """None: that of the model."""
    functions: bool
    """RMSNorm and rotary embedding of the model."""
    compiled: bool = False


RUNGS = (
    Rung("plain PyTorch, eager", False, plain_loss, False),
    Rung("+ fused AdamW", True, plain_loss, False),
    Rung("+ loss in chunks", True, chunked_loss, False),
    Rung("+ in the logits' memory", True, None, False),
    Rung("+ RoPE, RMSNorm by hand", True, None, True),
    Rung("+ compiled (model)", True, None, True, True),
)


class Trainer:
    """A model and its optimizer, with the techniques of a rung."""

    def __init__(self, rung: Rung, shape: Shape, device: torch.device):
        self.rung, self.device, self.model = rung, device, build(shape.model, device, seed=0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, fused=rung.fused)
        if rung.compiled:
            self.model.compile(dynamic=False)

    def step(self, window: list[Batch]) -> float:
        """Takes one step; returns its loss."""
        replaced = {}
        if self.rung.loss:
            replaced["transformer.cross_entropy_sums"] = self.rung.loss
        if not self.rung.functions:
            replaced |= {"transformer.rms_norm": plain_norm, "attention.rotate_pairs": plain_rotation}
        with contextlib.ExitStack() as stack:
            for name, function in replaced.items():
                stack.enter_context(mock.patch(f"pretrain.model.{name}", function))
            return self._step(window)

    def _step(self, window: list[Batch]) -> float:
        tokens, total = sum(batch.labels_BT.numel() for batch in window), 0.0
        for batch in window:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                loss = self.model(batch.tokens_BT, batch.labels_BT).loss_sum / tokens
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total)

    def peak_bytes(self, window: list[Batch]) -> int:
        """Most bytes that tensors of a step held at once, beyond those that existed before."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.step(window)
            return torch.cuda.max_memory_allocated(self.device) - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            self.step(window)
        held = most = 0
        events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        return most


def measure(shape: Shape, rungs: list[Rung], micro_batch: int, rounds: int) -> list[dict]:
    """One row per rung."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainers, window = [Trainer(rung, shape, device) for rung in rungs], make_window(shape, micro_batch, device)
    seconds: list[list[float]] = [[] for _ in rungs]
    for turn in range(WARM_UP + rounds):
        losses = {}
        for i in list(range(len(rungs)))[:: 1 if turn % 2 else -1]:
            began = now(device)
            losses[i] = trainers[i].step(window)
            if turn >= WARM_UP:
                seconds[i].append(now(device) - began)
        bound = 1e-3 if device.type == "cpu" else 2e-2
        assert max(losses.values()) - min(losses.values()) < bound, f"the rows do not train the same model: {losses}"
        print(f"round {turn + 1} of {WARM_UP + rounds}", file=sys.stderr)
    rows = []
    for rung, trainer, mine in zip(rungs, trainers, seconds, strict=True):
        gain = statistics.median(first / own for first, own in zip(seconds[0], mine, strict=True))
        rows.append({"rung": rung.name, "seconds": statistics.median(mine), "tokens_per_second_ratio": gain,
                     "peak_bytes": trainer.peak_bytes(window)})  # fmt: skip
    return rows


def main(argv: list[str]) -> None:
    """Measures, prints and writes the table."""
    parser = command_line.make_parser(__doc__)
    default = "G1" if torch.cuda.is_available() else "C1"
    parser.add_argument("--shape", choices=SHAPES, default=default, help="default here: %(default)s")
    parser.add_argument("--micro-batch", type=command_line.at_least(1), help="sequences (default: that of the shape)")
    parser.add_argument("--rounds", type=command_line.at_least(1), default=5, help="steps that count (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="without the last row")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: none)")
    options = parser.parse_args(argv)
    shape = SHAPES[options.shape]
    micro_batch = options.micro_batch or shape.micro_batch_size
    rungs = [rung for rung in RUNGS if not (rung.compiled and options.no_compile)]
    rows = measure(shape, rungs, micro_batch, options.rounds)
    machine = facts()
    print(f"{describe(machine)}\n{options.shape}, micro-batches of {micro_batch} sequences")
    print(f"{'':26} {'s/step':>8} {'tokens/s':>9} {'peak MiB':>9}")
    for row in rows:
        print(f"{row['rung']:26} {row['seconds']:8.4f} {row['tokens_per_second_ratio']:8.3f}x {row['peak_bytes'] / 2**20:9.0f}")
    if options.output:
        report = {"shape": options.shape, "micro_batch_size": micro_batch, "machine": machine, "rows": rows}
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
