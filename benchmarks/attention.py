"""Measures what documents and sliding windows cost: attention, forward and backward, against plain causal attention.

    python benchmarks/attention.py [--device cpu|cuda] [--lengths 1024 4096 16384] [--rounds 5] [--threads N] [--output FILE]

A batch has 16,384 tokens. `one document` hides nothing: what the mask itself costs. `documents` have 512 tokens on average
(geometric lengths), a `window` has 256, `both` has the two. Each measurement makes its mask anew, as a training step does,
where all blocks share it. Heads are those of the shapes C2 (CPU, fp32) and G2 (GPU, bf16). The masks take turns; a figure is
the median of CPU seconds (on a GPU: of seconds) over the rounds, and the median ratio to no mask. Peak memory is what is added
to that of queries, keys and values: resident memory (on a GPU: allocated).

Exit status: 0 if no mask takes more than 1.1 times as long as none; 1 otherwise.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import machine
from benchmarks.shapes import SHAPES
from pretrain.model.attention import attend, attention_context
from pretrain.model.config import ModelConfig
from pretrain.run import command_line

TOKENS, MEAN_DOCUMENT, WINDOW = 16_384, 512, 256
MASKS = ["none", "one document", "documents", "window", "both"]


def main(argv: list[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = command_line.make_parser(__doc__)
    default, positive = "cuda" if torch.cuda.is_available() else "cpu", command_line.at_least(1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default, help="default here: %(default)s")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[1024, 4096, 16384], help="T (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=5, help="measurements per mask (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="of the CPU (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: none)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    found = machine.facts()
    print(machine.describe(found))
    print(f"{'T':>6}  {'mask':13}{'ms':>9}{'of none':>9}{'MiB':>9}")
    rows = [row for length in options.lengths for row in measure(length, options.device, options.rounds)]
    if options.output:
        options.output.write_text(json.dumps({**found, "device": options.device, "rows": rows}, indent=1) + "\n")
    return 0 if all(row["ratio"] <= 1.1 for row in rows) else 1


def measure(length: int, device: str, rounds: int) -> list[dict]:
    """Measures all masks at one length and prints a line for each."""
    model, dtype = (SHAPES["C2"].model, torch.float32) if device == "cpu" else (SHAPES["G2"].model, torch.bfloat16)
    batch, generator = max(1, TOKENS // length), torch.Generator().manual_seed(0)
    counts = (model.num_attention_heads, model.num_key_value_heads, model.num_key_value_heads)
    tensors = [torch.randn(batch, length, count, model.head_dim, dtype=dtype, device=device) for count in counts]
    for tensor in tensors:
        tensor.requires_grad_()
    drawn_BT = (torch.rand(batch, length, generator=generator) < 1 / MEAN_DOCUMENT).cumsum(1).to(device)
    documents = {"one document": torch.zeros_like(drawn_BT), "documents": drawn_BT, "both": drawn_BT}
    attention = torch.compile(attend, dynamic=False) if device == "cuda" else attend

    def run(mask: str) -> None:
        config = ModelConfig(
            head_dim=model.head_dim, rope_theta=1e4, sliding_window=WINDOW if mask in ("window", "both") else None
        )
        context = attention_context(config, length, tensors[0].device, documents.get(mask))
        attention(*tensors, context).backward(tensors[0].detach())
        for tensor in tensors:
            tensor.grad = None

    peaks = {mask: _peak(run, mask, device) for mask in MASKS}  # also the warm-up
    seconds: dict[str, list[float]] = {mask: [] for mask in MASKS}
    for number in range(rounds):
        for mask in MASKS if number % 2 else MASKS[::-1]:
            seconds[mask].append(_seconds(run, mask, device))
    rows = []
    for mask in MASKS:
        median = statistics.median(seconds[mask])
        ratio = statistics.median(mine / none for mine, none in zip(seconds[mask], seconds["none"], strict=True))
        print(f"{length:6}  {mask:13}{1e3 * median:9.1f}{ratio:9.2f}{peaks[mask] / 2**20:9.1f}", flush=True)
        rows.append({"length": length, "mask": mask, "seconds": median, "ratio": ratio, "peak_bytes": peaks[mask]})
    return rows


def _seconds(run, mask: str, device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        run(mask)
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(mask)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak(run, mask: str, device: str) -> int:
    run(mask)  # compiles and loads
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(mask)
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier measurements freed
    before = machine.resident_bytes(peak=False)
    machine.forget_peak()
    run(mask)
    return max(0, machine.resident_bytes(peak=True) - before)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
