"""Measures training data in an object store: the first batch, the wait for later ones, and what is fetched.

    python benchmarks/stores.py [--delays 0 20 100] [--megabytes 256] [--shards 16] [--length 2048] [--batch 32] [--steps 50]
                                [--step-milliseconds 100] [--output FILE]

A server in another process serves shards of random tokens over HTTP and waits `--delays` milliseconds before each answer, as a
store at that distance; its bandwidth is that of this machine. A loop takes batches in the shuffled order as a run does, and
sleeps for each step. The rows:

    disk     the same files on the local disk
    cold     an empty cache with room for all tokens
    warm     the same again, after a restart
    small    a cache without room for the tokens, empty: samples are fetched one by one

"first batch" is the time from the settings to the first batch, with opening and checking the files; "wait" is the mean time
that a later step waits for its batch; "fetched" counts bytes per byte of the samples that were read, the start included.
"""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from benchmarks import machine
from pretrain.config import DataConfig, SourceConfig
from pretrain.data.batches import open_train, read_ahead, reads_ahead
from pretrain.data.indexed import TokenWriter
from pretrain.run import command_line

VOCAB_SIZE, DOCUMENT_TOKENS = 32_768, 1024


class Server(multiprocessing.Process):
    """A server of the files in a folder that supports ranges, in a process of its own.

    requests, bytes   of all answers so far
    """

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self._folder, self._port = folder, multiprocessing.Value("i")
        self.delay, self.requests, self.bytes = (multiprocessing.Value(kind) for kind in "dqq")

    def run(self) -> None:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(b"")

            def do_GET(self) -> None:
                self._answer(None)

            def _answer(self, content: bytes | None) -> None:
                time.sleep(outer.delay.value)
                path = outer._folder / self.path.lstrip("/")
                if not path.is_file():
                    self.send_error(404)
                    return
                size = os.path.getsize(path)
                ranges = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                begin, end = (int(ranges[1]), min(size, int(ranges[2]) + 1)) if ranges else (0, size)
                self.send_response(206 if ranges else 200)
                self.send_header("Content-Length", str(end - begin))
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("ETag", '"1"')
                if ranges:
                    self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
                self.end_headers()
                if content is None:
                    with open(path, "rb") as file:
                        file.seek(begin)
                        content = file.read(end - begin)
                    self.wfile.write(content)
                with outer.requests.get_lock(), outer.bytes.get_lock():
                    outer.requests.value += 1
                    outer.bytes.value += len(content)

            def log_message(self, *_) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._port.value = server.server_port
        server.serve_forever()

    def url(self) -> str:
        """Of the folder, once the server runs."""
        while not self._port.value:
            time.sleep(0.01)
        return f"http://127.0.0.1:{self._port.value}"


def write_shards(folder: Path, shards: int, size: int) -> list[str]:
    """Writes `size` bytes of tokens as pairs to `folder` and returns their names."""
    count = size // 2 // shards // DOCUMENT_TOKENS
    about = {"vocab_size": VOCAB_SIZE, "end_of_document_id": 0, "tokenizer_fingerprint": "none", "tokenizer_path": "none"}
    names = [f"part-{number:05}" for number in range(shards)]
    for number, name in enumerate(names):
        tokens = np.random.default_rng(number).integers(1, VOCAB_SIZE, (count, DOCUMENT_TOKENS))
        tokens[:, -1] = 0
        with TokenWriter(folder / name, **about, shuffled=True) as writer:
            writer.add(tokens.ravel(), np.full(count, DOCUMENT_TOKENS), 4 * tokens.size)
            writer.finish({})
    return names


def run(paths: list[str], cache: Path, gib: float, options) -> tuple[float, float]:
    """(seconds to the first batch, mean seconds that each later step waits)."""
    start = time.perf_counter()
    settings = DataConfig(
        train=[SourceConfig(path=paths)], sequence_length=options.length, cache_directory=str(cache), cache_gib=gib
    )
    data = open_train(settings, seed=0, vocab_size=VOCAB_SIZE, tokenizer_fingerprint=None)
    waits, places = [], itertools.count(0, options.batch)
    batches = read_ahead(lambda place: data.take(place, options.batch), places, reads_ahead(data.sources))
    with contextlib.closing(batches):
        for _ in range(options.steps + 1):
            before = time.perf_counter()
            next(batches)
            waits.append(time.perf_counter() - before)
            if len(waits) == 1:
                first = time.perf_counter() - start
            time.sleep(options.step_milliseconds / 1000)
    return first, float(np.mean(waits[1:]))


def measure(server: Server, folder: Path, names: list[str], delay: int, options) -> list[dict]:
    """Prints and returns the rows of one delay, in milliseconds."""
    server.delay.value = delay / 1000
    size, used = 1.2 * options.megabytes / 1000, (options.steps + 1) * options.batch * (options.length + 1) * 2
    urls, rows = [f"{server.url()}/{name}" for name in names], []
    with tempfile.TemporaryDirectory() as cache:
        plans = {"disk": ([str(folder / name) for name in names], 1.0), "cold": (urls, size), "warm": (urls, size)}
        plans["small"] = (urls, size / 4)
        for kind, (paths, gib) in plans.items():
            requests, fetched = server.requests.value, server.bytes.value
            first, wait = run(paths, Path(cache, "small" if kind == "small" else "large"), gib, options)
            row = {"delay_milliseconds": delay, "kind": kind, "first_batch_seconds": first, "wait_milliseconds": 1000 * wait}
            row |= {"requests": server.requests.value - requests, "fetched_per_byte": (server.bytes.value - fetched) / used}
            row |= {"resident_mib": machine.resident_bytes(peak=True) / 2**20}
            figures = f"{first:14.2f} {1000 * wait:9.1f} {row['requests']:9,} {row['fetched_per_byte']:8.2f}"
            print(f"{delay:9} {kind:6} {figures}", flush=True)
            rows.append(row)
    return rows


def main(argv: list[str]) -> None:
    """Runs the benchmark."""
    parser = command_line.make_parser(__doc__)
    least = command_line.at_least
    parser.add_argument("--delays", type=least(0), nargs="+", default=[0, 20, 100], help="milliseconds (%(default)s)")
    parser.add_argument("--megabytes", type=least(8), default=256, help="of tokens (%(default)s)")
    parser.add_argument("--shards", type=least(1), default=16, help="number of files (%(default)s)")
    parser.add_argument("--length", type=least(2), default=2048, help="T (%(default)s)")
    parser.add_argument("--batch", type=least(1), default=32, help="samples per step (%(default)s)")
    parser.add_argument("--steps", type=least(1), default=50, help="after the first (%(default)s)")
    parser.add_argument("--step-milliseconds", type=least(0), default=100, help="of a step without its batch (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: none)")
    options = parser.parse_args(argv)
    result = {"machine": machine.facts(), "settings": {**vars(options), "output": None}, "rows": []}
    print(machine.describe(result["machine"]))
    print(f"{'delay, ms':>9} {'':6} {'first batch, s':>14} {'wait, ms':>9} {'requests':>9} {'fetched':>8}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = write_shards(folder, options.shards, options.megabytes * 10**6)
        server = Server(folder)
        server.start()
        for delay in options.delays:
            result["rows"] += measure(server, folder, names, delay, options)
        server.terminate()
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
