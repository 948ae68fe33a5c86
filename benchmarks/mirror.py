"""Measures checkpoints in a mirror: the time from a node's notice to the next step on another node, and what uploads cost.

    python benchmarks/mirror.py [--nodes 5] [--megabytes 400] [--parameters-millions 30] [--rounds 3] [--output FILE]

A real S3 server (moto's, in a process of its own) holds the mirror. Three tables:

    lost     a tiny run gets SIGTERM, saves, uploads and exits; its folder is removed; the same command starts in an empty one.
             Seconds from the signal to the exit, and to the first step after it, imports included
    bytes    CPU seconds of this process, and seconds, that the upload of one checkpoint takes
    uploads  a run that saves all the time, alternately without and with a mirror: median seconds of a step, and CPU seconds of
             the process. The server takes a core; compare on an idle machine with several
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import machine
from pretrain.checkpoint.manifest import FORMAT_VERSION, Checkpoint, digest_json
from pretrain.checkpoint.storage import write_file
from pretrain.run import command_line
from pretrain.run.mirror_store import MirrorStore, Pace
from pretrain.run.processes import free_port

SETTINGS = """
run: {{name: run}}
model: {{hidden_size: {width}, num_hidden_layers: {layers}, num_attention_heads: {heads}, vocab_size: {vocabulary}}}
data: {{synthetic: {{kind: markov}}, sequence_length: {length}}}
batch: {{global_batch_size: 8, micro_batch_size: 8}}
engine: {{precision: fp32}}
train: {{max_steps: {steps}}}
evaluate: {{every_steps: 0}}
checkpoint: {{every_steps: {every}, keep_best: 0}}
log: {{every_steps: 1, sinks: [jsonl]}}
"""
TINY = {"width": 32, "layers": 2, "heads": 2, "vocabulary": 64, "length": 16, "steps": 100_000, "every": 50}


@contextlib.contextmanager
def server() -> Iterator[None]:
    """An S3 server with the bucket `mirror`, which the environment's variables name."""
    import fsspec

    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    try:
        system = fsspec.filesystem("s3")
        for _ in range(100):
            with contextlib.suppress(Exception):
                system.makedirs("mirror", exist_ok=True)
                break
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait()


def start(folder: Path, settings: str, *flags: str) -> subprocess.Popen:
    """Starts the run of `settings` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.yaml").write_text(settings)
    command = [sys.executable, "launch/pretrain.py", "--config", str(folder / "settings.yaml"), "--run.directory", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *flags], cwd=sys.path[0], env=environment, stdout=subprocess.DEVNULL)


def records(folder: Path) -> list[dict]:
    """The logging steps so far."""
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in found if "loss" in record]


def wait_for_step(folder: Path, step: int) -> None:
    """Waits until the run has logged a step after `step`."""
    while not any(record["step"] > step for record in records(folder)):
        time.sleep(0.01)


def lose_nodes(folder: Path, nodes: int) -> list[dict]:
    """The times of each change of the node."""
    flags, rows = ["--checkpoint.mirror", f"s3://mirror/{folder.name}"], []
    node = start(folder / "0", SETTINGS.format(**TINY), *flags)
    wait_for_step(folder / "0", 50)
    for number in range(nodes):
        noticed = time.monotonic()
        node.send_signal(signal.SIGTERM)
        if node.wait() != 75:
            raise SystemExit(f"the run ended with {node.returncode}, not 75")
        stopped = time.monotonic()
        last = json.loads((folder / str(number) / "run" / "run_state.json").read_text())["step"]
        shutil.rmtree(folder / str(number))
        node = start(folder / str(number + 1), SETTINGS.format(**TINY), *flags)
        wait_for_step(folder / str(number + 1), last)
        rows.append({"stop_seconds": stopped - noticed, "next_step_seconds": time.monotonic() - noticed})
        print(f"{number:5} {rows[-1]['stop_seconds']:14.1f} {rows[-1]['next_step_seconds']:18.1f}", flush=True)
    node.send_signal(signal.SIGTERM)
    node.wait()
    return rows


def upload_bytes(folder: Path, megabytes: int) -> dict:
    """The cost of one upload of that size, in two files."""
    path = folder / "bytes" / "checkpoints" / "step_00000001"
    path.mkdir(parents=True)
    files = {"state.json": write_file(path / "state.json", [b"{}"])}
    for number in range(2):
        name = f"tensors-00000-of-00001-{number:03}.safetensors"
        files[name] = write_file(path / name, (os.urandom(10**6) for _ in range(megabytes // 2)))
    manifest = {"format_version": FORMAT_VERSION, "world_size": 1, "files": files}
    manifest["xxh3"] = digest_json(manifest)
    write_file(path / "manifest.json", [json.dumps(manifest).encode()])
    store = MirrorStore(f"s3://mirror/bytes-{os.getpid()}")
    store.claim(path.parents[1], print)
    began, cpu_began = time.monotonic(), time.process_time()
    store.upload(Checkpoint(path), Pace(0), threading.Event())
    row = {"megabytes": megabytes, "seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu_began}
    print(
        f"{megabytes} MB: {row['cpu_seconds']:.1f} CPU seconds ({1000 * row['cpu_seconds'] / megabytes:.1f} per GB)", flush=True
    )
    return row


def upload(folder: Path, parameters: float, rounds: int) -> list[dict]:
    """The cost of steps without and with uploads."""
    width, vocabulary = 512, 256
    layers = max(1, round(parameters / (12 * width**2)))
    shape = {"width": width, "layers": layers, "heads": 8, "vocabulary": vocabulary, "length": 64, "steps": 30, "every": 5}
    rows = []
    for number in range(rounds):
        for kind in ("without", "with"):
            place = folder / f"{kind}-{number}"
            flags = ["--checkpoint.mirror", f"s3://mirror/{place.name}-{os.getpid()}"] if kind == "with" else []
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            if start(place, SETTINGS.format(**shape), *flags).wait() != 0:
                raise SystemExit("the run failed")
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            rates = [record["tokens_per_second"] for record in records(place)[5:]]
            row = {"kind": kind, "step_seconds": 8 * 64 / statistics.median(rates)}
            row["cpu_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            size = sum(file.stat().st_size for file in next((place / "run/checkpoints").glob("step_*")).iterdir())
            row["uploads"] = (place / "run/console.log").read_text().count("saved ") if kind == "with" else 0
            row["checkpoint_gb"] = size / 1e9
            rows.append(row)
            print(f"{kind:8} {row['step_seconds']:14.3f} {row['cpu_seconds']:13.1f} {row['checkpoint_gb']:15.3f}", flush=True)
            shutil.rmtree(place)
    return rows


def main(argv: list[str]) -> None:
    """Runs the benchmark."""
    parser = command_line.make_parser(__doc__)
    least = command_line.at_least
    parser.add_argument("--nodes", type=least(0), default=5, help="changes of the node (%(default)s)")
    parser.add_argument("--megabytes", type=least(0), default=400, help="of the checkpoint that is uploaded (%(default)s)")
    parser.add_argument("--parameters-millions", type=least(1), default=30, help="of the run that uploads (%(default)s)")
    parser.add_argument("--rounds", type=least(0), default=3, help="of runs without and with a mirror (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: none)")
    options = parser.parse_args(argv)
    result = {"machine": machine.facts(), "settings": {**vars(options), "output": None}}
    print(machine.describe(result["machine"]))
    with tempfile.TemporaryDirectory(prefix="mirror-") as name, server():
        print(f"{'node':>5} {'signal to exit':>14} {'to the next step':>18}")
        result["lost"] = lose_nodes(Path(name) / f"lost-{os.getpid()}", options.nodes)
        if options.megabytes:
            result["bytes"] = upload_bytes(Path(name), options.megabytes)
        print(f"{'mirror':8} {'s/step, median':>14} {'CPU seconds':>13} {'GB/checkpoint':>15}")
        result["uploads"] = upload(Path(name), options.parameters_millions * 1e6, options.rounds)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
