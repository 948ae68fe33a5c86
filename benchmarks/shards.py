"""Measures training data in many files (shards): the time to open them, memory, open files, and the time to read batches.

    python benchmarks/shards.py [--shards 1 1000 5000] [--length 2048] [--batch 64] [--output FILE]

A run of this many shards opens its training data as `launch/pretrain.py` does: finds the files, reads headers and sidecars,
checks them and computes the fingerprint. Then it reads batches in the shuffled order, so that nearly every sample of a batch is
in another file. The shards are links to one file of 65,536 tokens in the page cache, so the figures contain no disk. The
process may open 1,024 files, as on most systems. Opening: wall time, the fastest of `--rounds`; reading: CPU time, the median;
memory: growth by the first opening.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from benchmarks import machine
from pretrain.config import DataConfig, SourceConfig
from pretrain.data.batches import TrainData, open_train
from pretrain.data.indexed import TokenWriter
from pretrain.run import command_line

VOCAB_SIZE, SHARD_TOKENS, DOCUMENT_TOKENS, OPEN_FILES = 8192, 65_536, 1024, 1024


def write_shards(folder: Path, count: int) -> None:
    """Writes `count` shards to the new `folder`, as links to one."""
    lengths = np.full(SHARD_TOKENS // DOCUMENT_TOKENS, DOCUMENT_TOKENS)
    tokens = np.random.default_rng(0).integers(1, VOCAB_SIZE, SHARD_TOKENS)
    tokens[np.cumsum(lengths) - 1] = 0
    about = {"vocab_size": VOCAB_SIZE, "end_of_document_id": 0, "tokenizer_fingerprint": "none", "tokenizer_path": "none"}
    with TokenWriter(folder / "00000", **about, shuffled=True) as writer:
        writer.add(tokens, lengths, 4 * SHARD_TOKENS)
        writer.finish({})
    for number in range(1, count):
        for end in (".bin", ".idx", ".json"):
            os.link(folder / f"00000{end}", folder / f"{number:05}{end}")


def opened(folder: Path, length: int) -> TrainData:
    """The training stream over all shards in `folder`."""
    data = DataConfig(train=[SourceConfig(path=str(folder))], sequence_length=length)
    return open_train(data, seed=0, vocab_size=VOCAB_SIZE, tokenizer_fingerprint=None)


def measure(folder: Path, length: int, batch: int, rounds: int) -> dict[str, float]:
    """Figures of the shards in `folder`."""
    before, seconds = machine.resident_bytes(peak=False), []
    for _ in range(rounds):
        start = time.perf_counter()
        data = opened(folder, length)
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            growth = machine.resident_bytes(peak=False) - before
    reads, position = [], 0
    for _ in range(rounds + 1):
        start, first = time.process_time(), position
        while position < first + 2000:
            data.take(position, batch)
            position += batch
        reads.append((time.process_time() - start) / (position - first) / length)
    return {
        "open_seconds": min(seconds),
        "memory_mib": growth / 2**20,
        "open_files": len(os.listdir("/proc/self/fd")),
        "read_ns_per_token": 1e9 * statistics.median(reads[1:]),
    }


def main(argv: list[str]) -> None:
    """Runs the benchmark."""
    parser = command_line.make_parser(__doc__)
    least = command_line.at_least
    parser.add_argument("--shards", type=least(1), nargs="+", default=[1, 1000, 5000], help="numbers of files (%(default)s)")
    parser.add_argument("--length", type=least(2), default=2048, help="T (%(default)s)")
    parser.add_argument("--batch", type=least(1), default=64, help="samples per read (%(default)s)")
    parser.add_argument("--rounds", type=least(1), default=5, help="repetitions (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: none)")
    options = parser.parse_args(argv)
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    result = {"machine": machine.facts(), "sequence_length": options.length, "batch": options.batch, "rows": []}
    print(machine.describe(result["machine"]))
    torch.set_num_threads(1)  # threads that wait for a busy core would count as CPU time
    print(f"{'shards':>7} {'open, s':>8} {'MiB':>6} {'open files':>11} {'ns/token':>9}")
    with tempfile.TemporaryDirectory() as name:
        for count in sorted(options.shards):
            folder = Path(name) / str(count)
            folder.mkdir()
            write_shards(folder, count)
            row = measure(folder, options.length, options.batch, options.rounds)
            figures = f"{row['open_seconds']:8.3f} {row['memory_mib']:6.1f} {row['open_files']:11}"
            print(f"{count:7} {figures} {row['read_ns_per_token']:9.1f}", flush=True)
            result["rows"].append({"shards": count, **row})
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
