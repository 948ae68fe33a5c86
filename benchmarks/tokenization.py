"""Measures `tools/tokenize_corpus.py` from text to finished token files, against the encoder's own batch speed.

    python benchmarks/tokenization.py [--megabytes 32] [--vocab-size 8192] [--workers 1 2] [--rounds 3] [--output FILE]

The text is the source code of Python's standard library, repeated to the wanted size, in a .jsonl file with one document per
module; the tokenizer is trained on it by tools/train_tokenizer.py. The rows:

    encoder          `encode_batch_fast` of Hugging Face tokenizers on documents in memory, with this number of threads: neither
                     reads, checks, shuffles, counts nor writes anything
    tokenize_corpus  the tool, from the start of the program to its end, with this number of workers

Both use the same tokenizer.json. They alternate; the figures are medians of the rounds. MB are 10^6 bytes of UTF-8. `CPU MB/s`
is text per CPU second of all processes, for a loaded machine; `wall MB/s` needs an idle one.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import machine
from pretrain.run import command_line

ROOT = Path(__file__).resolve().parents[1]
ENCODE = """
import json, sys, time
from tokenizers import Tokenizer
texts = [json.loads(line)["text"] for line in open(sys.argv[2], encoding="utf-8")]
tokenizer = Tokenizer.from_file(sys.argv[1])
wall, cpu = time.perf_counter(), time.process_time()
for begin in range(0, len(texts), 256):
    tokenizer.encode_batch_fast(texts[begin : begin + 256], add_special_tokens=False)
print(json.dumps([time.process_time() - cpu, time.perf_counter() - wall]))
"""


def write_text(path: Path, size: int) -> int:
    """Writes documents until their text has `size` bytes. -> bytes of text."""
    modules = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in file.parts:
            try:
                modules.append(file.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                continue
    written = number = 0
    with path.open("w", encoding="utf-8") as output:
        while written < size:
            text = f"# copy {number // len(modules)}\n{modules[number % len(modules)]}"
            output.write(json.dumps({"text": text}) + "\n")
            written, number = written + len(text.encode()), number + 1
    return written


def tool(name: str, *words: object) -> list[str]:
    """The command that starts a tool."""
    return [sys.executable, str(ROOT / "tools" / name), *map(str, words)]


def encode(tokenizer: Path, text: Path, threads: int) -> tuple[float, float]:
    """CPU and wall seconds of the encoder alone, in a process of its own."""
    variables = {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(
        [sys.executable, "-c", ENCODE, tokenizer, text], env=variables, capture_output=True, text=True, check=True
    )
    return tuple(json.loads(done.stdout))


def tokenize(tokenizer: Path, text: Path, output: Path, workers: int) -> tuple[float, float]:
    """CPU and wall seconds of the tool, its workers included."""
    command = tool("tokenize_corpus.py", "--input", text, "--tokenizer", tokenizer.parent, "--output", output, "--overwrite")
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*command, "--workers", str(workers)], capture_output=True, check=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main(argv: list[str]) -> None:
    """Runs the benchmark."""
    parser = command_line.make_parser(__doc__)
    least = command_line.at_least
    parser.add_argument("--megabytes", type=least(1), default=32, help="of text (%(default)s)")
    parser.add_argument("--vocab-size", type=least(300), default=8192, help="of the tokenizer (%(default)s)")
    parser.add_argument("--workers", type=least(1), nargs="+", default=[1, 2], help="numbers of processes (%(default)s)")
    parser.add_argument("--rounds", type=least(1), default=3, help="of each row (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: none)")
    options = parser.parse_args(argv)
    result = {"machine": machine.facts(), "vocab_size": options.vocab_size, "rows": []}
    print(machine.describe(result["machine"]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, tokenizer = folder / "text.jsonl", folder / "tokenizer" / "tokenizer.json"
        size = write_text(text, options.megabytes * 10**6)
        sample = folder / "sample.jsonl"
        write_text(sample, min(size, 8 * 10**6))
        words = ("--input", sample, "--output", tokenizer.parent, "--vocab-size", options.vocab_size)
        subprocess.run(tool("train_tokenizer.py", *words), capture_output=True, check=True)
        rows: dict[tuple[str, int], Callable[[], tuple[float, float]]] = {}
        for workers in options.workers:
            rows["encoder", workers] = lambda workers=workers: encode(tokenizer, text, workers)
            rows["tokenize_corpus", workers] = lambda workers=workers: tokenize(tokenizer, text, folder / "tokens", workers)
        seconds: dict[tuple[str, int], list] = {row: [] for row in rows}
        for number in range(options.rounds):
            for row in list(rows)[:: 1 if number % 2 else -1]:
                seconds[row].append(rows[row]())
    print(f"{size / 1e6:.0f} MB of text, vocabulary {options.vocab_size}")
    print(f"{'program':16} {'workers':>7} {'CPU MB/s':>9} {'wall MB/s':>10}")
    for (program, workers), times in seconds.items():
        cpu, wall = (size / 1e6 / statistics.median(each) for each in zip(*times, strict=True))
        print(f"{program:16} {workers:7} {cpu:9.2f} {wall:10.2f}")
        figures = {"cpu_megabytes_per_second": cpu, "wall_megabytes_per_second": wall, "seconds": times}
        result["rows"].append({"program": program, "workers": workers, **figures})
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
