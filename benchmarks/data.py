"""Measures reading of training data: samples per second and CPU time per token, against three other loaders of the same tokens.

    python benchmarks/data.py [--lengths 1024 2048 4096 8192] [--sources 1 64] [--tokens 32000000] [--output FILE]
    python benchmarks/data.py --simulate      # 4,096 ranks, 10^13 tokens, 300 sources (data_at_scale.py); half a minute

    ours       `TrainData.take` on Megatron's token files: the shuffled order, positioned reads, checks of ids
    memmap     what nanoGPT's train.py does: `numpy.memmap` opened for each batch, random crops, one copy per row
    datasets   Hugging Face `datasets`: an Arrow file with a row of T + 1 tokens per sample, shuffled, as torch tensors
    per sample a `torch.utils.data.Dataset` of shuffled windows of the memory map in a `DataLoader` in this process: what most
               training scripts do

Each yields tokens and labels, int64, in batches of `--batch` samples. Ours reads from 1 and from many files of equal weight;
the others know one file. The loaders take turns (A B C, C B A, ...) in one process on files in the page cache; the figures
are medians of the rounds, CPU time for `ns/token` and wall time for samples per second. `share` is our CPU time relative to
that of a training step of the smallest benchmark shape (C1, 44 MFLOP per token) on a core with 60 GFLOP/s: an estimate.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor

from benchmarks import data_at_scale, machine
from pretrain.config import DataConfig, SourceConfig
from pretrain.data.batches import open_train
from pretrain.data.indexed import TokenWriter
from pretrain.run import command_line

VOCAB_SIZE, DOCUMENT_TOKENS, SEED = 8192, 700, 0
STEP_SECONDS_PER_TOKEN = 44e6 / 60e9
Read = Callable[[], tuple[Tensor, Tensor]]


def write_pairs(folder: Path, tokens: np.ndarray, count: int) -> list[str]:
    """Writes `tokens` as `count` token files of equal size. -> their prefixes."""
    prefixes = []
    for number, part in enumerate(np.array_split(tokens, count)):
        lengths = np.diff([*range(0, len(part), DOCUMENT_TOKENS), len(part)])
        prefixes.append(str(folder / f"{count}-{number}"))
        about = {"vocab_size": VOCAB_SIZE, "end_of_document_id": 0, "tokenizer_fingerprint": "none", "tokenizer_path": "none"}
        with TokenWriter(prefixes[-1], **about, shuffled=True) as writer:
            part = part.copy()
            part[np.cumsum(lengths) - 1] = 0
            writer.add(part, lengths, len(part))
            writer.finish({})
    return prefixes


def ours(prefixes: list[str], length: int, batch: int) -> Read:
    """Batches of the training stream, one after the other."""
    sources = [SourceConfig(path=prefix) for prefix in prefixes]
    config = DataConfig(train=sources, sequence_length=length)
    data, position = open_train(config, seed=SEED, vocab_size=VOCAB_SIZE, tokenizer_fingerprint=None), 0

    def read() -> tuple[Tensor, Tensor]:
        nonlocal position
        taken, position = data.take(position, batch), position + batch
        return taken.tokens_BT, taken.labels_BT

    return read


def memmap(path: Path, length: int, batch: int) -> Read:
    """Random crops of a flat file."""

    def read() -> tuple[Tensor, Tensor]:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - length, (batch,)).tolist()
        inputs = torch.stack([torch.from_numpy(data[start : start + length].astype(np.int64)) for start in starts])
        labels = torch.stack([torch.from_numpy(data[start + 1 : start + 1 + length].astype(np.int64)) for start in starts])
        return inputs, labels

    return read


def arrow(folder: Path, tokens: np.ndarray, length: int, batch: int) -> Read:
    """Shuffled rows of an Arrow file."""
    import datasets

    datasets.disable_progress_bars()
    rows = len(tokens) // (length + 1)
    table = datasets.Dataset.from_dict({"tokens": tokens[: rows * (length + 1)].reshape(rows, length + 1).astype(np.int32)})
    table.save_to_disk(str(folder / f"arrow-{length}"))
    data = datasets.load_from_disk(str(folder / f"arrow-{length}")).shuffle(seed=SEED).with_format("torch")
    position = 0

    def read() -> tuple[Tensor, Tensor]:
        nonlocal position
        begin = position % (rows - batch)
        position += batch
        rows_BT = data[begin : begin + batch]["tokens"].long()
        return rows_BT[:, :-1].contiguous(), rows_BT[:, 1:].contiguous()

    return read


class Windows(torch.utils.data.Dataset):
    """Samples of T inputs and labels, one by one."""

    def __init__(self, path: Path, length: int):
        self.data, self.length = np.memmap(path, dtype=np.uint16, mode="r"), length

    def __len__(self) -> int:
        return (len(self.data) - 1) // self.length

    def __getitem__(self, sample: int) -> tuple[Tensor, Tensor]:
        window = torch.from_numpy(self.data[sample * self.length : (sample + 1) * self.length + 1].astype(np.int64))
        return window[:-1], window[1:]


def per_sample(path: Path, length: int, batch: int) -> Read:
    """Batches of a `DataLoader`, epoch by epoch."""
    loader = torch.utils.data.DataLoader(Windows(path, length), batch, shuffle=True, drop_last=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    return lambda: next(batches)


def measure(readers: dict[str, Read], tokens_per_turn: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians over the rounds, after one that does not count."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    for turn in range(rounds + 1):
        for name in list(readers)[:: 1 if turn % 2 else -1]:
            cpu, wall, seen, samples = time.process_time(), time.perf_counter(), 0, 0
            while seen < tokens_per_turn:
                inputs_BT, _ = readers[name]()
                seen, samples = seen + inputs_BT.numel(), samples + len(inputs_BT)
            found[name].append(((time.process_time() - cpu) / seen, (time.perf_counter() - wall) / samples))
    return {
        name: {
            "ns_per_token": 1e9 * statistics.median(cpu for cpu, _ in turns[1:]),
            "samples_per_second": 1 / statistics.median(wall for _, wall in turns[1:]),
        }
        for name, turns in found.items()
    }


def main(argv: list[str]) -> None:
    """Runs the benchmark."""
    parser = command_line.make_parser(__doc__)
    least = command_line.at_least
    parser.add_argument("--lengths", type=least(2), nargs="+", default=[1024, 2048, 4096, 8192], help="T (%(default)s)")
    parser.add_argument("--sources", type=least(1), nargs="+", default=[1, 64], help="numbers of files (%(default)s)")
    parser.add_argument("--tokens", type=least(1_000_000), default=32_000_000, help="of the data (%(default)s)")
    parser.add_argument("--batch", type=least(1), default=8, help="samples per read (%(default)s)")
    parser.add_argument("--rounds", type=least(1), default=7, help="turns of each loader (%(default)s)")
    parser.add_argument("--folder", type=Path, help="for the data (default: that of temporary files)")
    parser.add_argument("--simulate", action="store_true", help="check and measure the order of a very large run instead")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: none)")
    options = parser.parse_args(argv)
    if options.simulate:
        print(machine.describe(machine.facts()))
        for line in data_at_scale.simulate(options.folder):
            print(line, flush=True)
        return
    result = {"machine": machine.facts(), "tokens": options.tokens, "batch": options.batch, "rows": []}
    print(machine.describe(result["machine"]))
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        tokens = np.random.default_rng(SEED).integers(1, VOCAB_SIZE, options.tokens).astype(np.uint16)
        tokens.tofile(folder / "flat.bin")
        prefixes = {count: write_pairs(folder, tokens, count) for count in options.sources}
        print(f"{'T':>6}  {'loader':16} {'ns/token':>9} {'samples/s':>10} {'share':>8}")
        for length in options.lengths:
            readers = {f"ours, {count} files": ours(prefixes[count], length, options.batch) for count in options.sources}
            readers |= {"memmap": memmap(folder / "flat.bin", length, options.batch)}
            readers |= {"datasets": arrow(folder, tokens, length, options.batch)}
            readers |= {"per sample": per_sample(folder / "flat.bin", length, options.batch)}
            for loader, row in measure(readers, options.tokens // 16, options.rounds).items():
                share = row["ns_per_token"] * 1e-9 / STEP_SECONDS_PER_TOKEN
                print(
                    f"{length:6}  {loader:16} {row['ns_per_token']:9.2f} {row['samples_per_second']:10.0f} {share:8.3%}",
                    flush=True,
                )
                result["rows"].append({"sequence_length": length, "loader": loader, **row})
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
