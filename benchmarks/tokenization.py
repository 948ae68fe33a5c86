"""Measures `tools/tokenize_corpus.py` from text to finished token files, against the encoder's own batch speed.

    python benchmarks/tokenization.py [--megabytes 64] [--vocab-size 8192] [--workers 1 2] [--rounds 3] [--output FILE]

The text is the source code of Python's standard library, repeated to the wanted size, in a .jsonl file with one document per
module; the tokenizer is trained on it by tools/train_tokenizer.py. It is used in two forms: as that tool writes it, for
SentencePiece, and as a Hugging Face folder with tokenizer.json alone. For each form and number of workers:

    encoder          `encode` of SentencePiece, or `encode_batch_fast` of Hugging Face tokenizers, on documents in memory, to
                     lists of ids, with this number of threads: it reads, checks, shuffles, counts and writes nothing
    tokenize_corpus  the tool, from the start of the program to its end, with this number of workers

They run one after the other, in alternating order; the figures are medians of the rounds. MB are 10^6 bytes of UTF-8. "CPU" is
text per CPU second of all processes, for a loaded machine; "wall" needs an idle one. The ratio is the tool's speed divided by
that of the encoder in the same round.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from benchmarks import machine
from pretrain.run import command_line

ROOT = Path(__file__).resolve().parents[1]
ENCODE = """
import json, sys, time
texts = [json.loads(line)["text"] for line in open(sys.argv[2], encoding="utf-8")]
if sys.argv[1].endswith(".model"):
    from sentencepiece import SentencePieceProcessor
    model, threads = SentencePieceProcessor(model_file=sys.argv[1]), int(sys.argv[3])
    encode = lambda batch: model.encode(batch, num_threads=threads)
else:
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(sys.argv[1])
    encode = lambda batch: [each.ids for each in tokenizer.encode_batch_fast(batch, add_special_tokens=False)]
wall, cpu = time.perf_counter(), time.process_time()
for begin in range(0, len(texts), 256):
    encode(texts[begin : begin + 256])
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


def encode(model: Path, text: Path, threads: int) -> tuple[float, float]:
    """CPU and wall seconds of the encoder alone, in a process of its own."""
    variables = {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-c", ENCODE, model, text, str(threads)]
    return tuple(json.loads(subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout))


def tokenize(tokenizer: Path, text: Path, output: Path, workers: int) -> tuple[float, float]:
    """CPU and wall seconds of the tool, its workers included."""
    command = tool("tokenize_corpus.py", "--input", text, "--tokenizer", tokenizer, "--output", output, "--overwrite")
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*command, "--workers", str(workers)], capture_output=True, check=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def measure(folder: Path, size: int, options: argparse.Namespace) -> list[dict]:
    """Trains the tokenizer, runs all pairs and prints their rows. `size`: bytes of text in `folder`/text.jsonl."""
    text, sample, own, other = (folder / name for name in ("text.jsonl", "sample.jsonl", "own", "hugging_face"))
    write_text(sample, min(size, 8 * 10**6))
    words = ("--input", sample, "--output", own, "--vocab-size", options.vocab_size)
    subprocess.run(tool("train_tokenizer.py", *words), capture_output=True, check=True)
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(own / name, other / name)
    forms = {"SentencePiece": own / "tokenizer.model", "Hugging Face": other / "tokenizer.json"}
    seconds: dict[tuple[str, int], list] = {(form, workers): [] for form in forms for workers in options.workers}
    for number in range(options.rounds):
        for (form, workers), rounds in seconds.items():
            runs = [
                lambda form=form, workers=workers: encode(forms[form], text, workers),
                lambda form=form, workers=workers: tokenize(forms[form].parent, text, folder / "tokens", workers),
            ]
            order = (0, 1) if number % 2 else (1, 0)
            done = {which: runs[which]() for which in order}
            rounds.append((done[0], done[1]))
    print(f"{size / 1e6:.0f} MB of text, vocabulary {options.vocab_size}")
    print(f"{'form':14} {'workers':>7} {'encoder MB/s: CPU, wall':>24} {'tool MB/s: CPU, wall':>21} {'ratio: CPU, wall':>17}")
    rows = []
    for (form, workers), rounds in seconds.items():
        alone, whole = np.array(rounds).transpose(1, 0, 2)  # each (rounds, CPU and wall)
        figures = [np.median(each, axis=0).tolist() for each in (size / 1e6 / alone, size / 1e6 / whole, alone / whole)]
        shown = " ".join(f"{cpu:{width}.2f} {wall:8.2f}" for (cpu, wall), width in zip(figures, (15, 12, 8), strict=True))
        print(f"{form:14} {workers:7} {shown}")
        names = ("encoder_megabytes_per_second", "tool_megabytes_per_second", "ratio")
        named = {name: {"cpu": cpu, "wall": wall} for name, (cpu, wall) in zip(names, figures, strict=True)}
        rows.append({"form": form, "workers": workers, **named, "seconds": rounds})
    return rows


def main(argv: list[str]) -> None:
    """Runs the benchmark."""
    parser = command_line.make_parser(__doc__)
    least = command_line.at_least
    parser.add_argument("--megabytes", type=least(1), default=64, help="of text (%(default)s)")
    parser.add_argument("--vocab-size", type=least(300), default=8192, help="of the tokenizer (%(default)s)")
    parser.add_argument("--workers", type=least(1), nargs="+", default=[1, 2], help="numbers of processes (%(default)s)")
    parser.add_argument("--rounds", type=least(1), default=3, help="of each row (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: none)")
    options = parser.parse_args(argv)
    result = {"machine": machine.facts(), "vocab_size": options.vocab_size, "rows": []}
    print(machine.describe(result["machine"]))
    with tempfile.TemporaryDirectory() as name:
        size = write_text(Path(name, "text.jsonl"), options.megabytes * 10**6)
        result["rows"] = measure(Path(name), size, options)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
