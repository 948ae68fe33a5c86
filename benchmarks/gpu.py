"""Measures everything on one GPU in less than ten minutes: rates of the card, speed and memory of training, generation,
checkpoints, and the tests that need a card.

    make gpu                                                  every part, most important first
    python benchmarks/gpu.py --parts rates G1-blocks G2-fp8   some of them
    python benchmarks/gpu.py --rehearse                       the same on the CPU with tiny models: its figures mean nothing

It needs no network. Every part is a process of its own with a time limit: one that fails, runs out of memory or is late is
recorded with its last lines, and the rest continue. Writes JSON, a table in Markdown for docs/performance.md and a trace of
three steps. Exit status: 0 if every part is done, 1 if one is not.

Training: the shapes of shapes.py, 4 micro-batches per step, AdamW, bf16 with fp32 master weights, tokens of a chain that can be
learned (its best loss is ln 8), and the same tokens for every case, so that losses can be compared. Times are medians over
steps, on the device's clock. `predicted` is the peak that the dry run (tools/check_run.py --device) expects.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import yaml
from torch import Tensor

from benchmarks import machine
from benchmarks.shapes import SHAPES, Shape
from pretrain import UserError, devices
from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.data.batches import Batch
from pretrain.engines.base import Engine
from pretrain.engines.compile import compile_report
from pretrain.engines.start import start_engine
from pretrain.generate import generate
from pretrain.model.config import ModelConfig, MoeConfig, resolve_model
from pretrain.model.flops import flops_per_token
from pretrain.model.transformer import Transformer, build
from pretrain.optim.optimizer import build_optimizer
from pretrain.report.metrics import Meter
from pretrain.run import command_line
from pretrain.train import train_step

ROOT = Path(__file__).resolve().parents[1]
ACCUMULATION, STEPS, WARM_UP, MINUTES = 4, 20, 3, 10
ORDER = (
    "card", "rates", "G1-blocks", "G2-blocks", "G2-fp8", "tests", "predictions", "G1-none", "G1-model", "G2-none",
    "G1-documents", "generation", "G3-blocks", "G1-muon", "profile", "seam", "checkpoint", "G2-model",
)  # fmt: skip
"""The parts, the most important first."""
_TINY = ModelConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
_TINY_MOE = dataclasses.replace(_TINY, moe=MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32))


class NoGpu(UserError):
    """There is no GPU."""


class Bench:
    """The device and the sizes of this run: those of a GPU, or tiny ones that rehearse on the CPU."""

    def __init__(self, rehearse: bool, folder: Path):
        self.rehearse, self.folder = rehearse, folder
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.steps, self.warm_up = (2, 1) if rehearse else (STEPS, WARM_UP)

    def shape(self, name: str) -> Shape:
        """The shape of that name, or a tiny one in its place."""
        if not self.rehearse:
            return SHAPES[name]
        model = _TINY if SHAPES[name].model.moe is None else _TINY_MOE
        return Shape(resolve_model(model, vocab_size=256, sequence_length=32), 32, 2, 256)

    def seconds(self, function: Callable[[], object], rounds: int = 5, calls: int = 10) -> float:
        """Median time of a call, after a warm-up: of the device, or of the process on a CPU."""
        function()
        times = []
        for _ in range(2 if self.rehearse else rounds):
            clock = Clock(self.device)
            for _ in range(calls):
                function()
            clock.mark()
            times.append(clock.seconds()[0] / calls)
        return statistics.median(times)


class Clock:
    """Times between marks, without waiting for the device at any of them."""

    def __init__(self, device: torch.device):
        self.cuda, self.marks = device.type == "cuda", []
        self.mark()

    def mark(self) -> None:
        """Ends an interval, and begins the next."""
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.process_time())

    def seconds(self) -> list[float]:
        """Length of each interval."""
        if not self.cuda:
            return [end - begin for begin, end in zip(self.marks, self.marks[1:], strict=False)]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in zip(self.marks, self.marks[1:], strict=False)]


# ---------------------------------------------------------------- parts: the card


def card(bench: Bench) -> dict:
    """Versions, clocks, power."""
    found = machine.facts() | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    if bench.device.type == "cuda":
        found |= {"nccl": ".".join(map(str, torch.cuda.nccl.version())), "memory_gib": _gib(torch.cuda.mem_get_info()[1])}
        found |= smi(
            "driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory", "temperature.gpu", "ecc.mode.current"
        )
    return found


def smi(*fields: str) -> dict[str, str]:
    """Fields of nvidia-smi for the first visible GPU; empty where there is no nvidia-smi."""
    gpu = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={gpu}"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        return {}
    values = answer.stdout.strip().split(", ")
    return (
        dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {"nvidia-smi": answer.stdout + answer.stderr}
    )


def rates(bench: Bench) -> list[dict]:
    """Products, copies and attention kernels at the sizes of the shapes."""
    large, dtype = (256, torch.float32) if bench.rehearse else (8192, torch.bfloat16)
    rows = [_product(bench, "square", large, large, large, dtype)]
    source = torch.ones((1 << 18) if bench.rehearse else (1 << 30), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    rows.append({"what": "copy", "GB/s": 2 * source.nbytes / bench.seconds(lambda: target.copy_(source)) / 1e9})
    if bench.device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        rows.append(_fp8_product(bench, large))
    for name in ("G1", "G2"):
        shape = bench.shape(name)
        model, tokens = shape.model, shape.micro_batch_size * shape.sequence_length
        width, heads = model.hidden_size, model.num_attention_heads * model.head_dim
        sizes = {"q": (width, heads), "k": (width, model.num_key_value_heads * model.head_dim), "o": (heads, width),
                 "up": (width, model.intermediate_size), "down": (model.intermediate_size, width)}  # fmt: skip
        for what, (fan_in, fan_out) in sizes.items():
            rows.append(_product(bench, f"{name} {what}", tokens, fan_in, fan_out, dtype))
            rows.append(_product(bench, f"{name} {what}, gradient of the weight", fan_in, tokens, fan_out, dtype))
        rows += _attention(bench, name, shape)
    return rows


def _product(bench: Bench, what: str, rows: int, inner: int, columns: int, dtype: torch.dtype) -> dict:
    left, right = (torch.randn(*size, device=bench.device, dtype=dtype) for size in ((rows, inner), (inner, columns)))
    seconds = bench.seconds(lambda: left @ right)
    return {"what": what, "size": f"{rows} x {inner} x {columns}", "TFLOP/s": 2 * rows * inner * columns / seconds / 1e12}


def _fp8_product(bench: Bench, size: int) -> dict:
    left, right = (torch.randn(size, size, device=bench.device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=bench.device)
    seconds = bench.seconds(
        lambda: torch._scaled_mm(left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
    )
    return {"what": "square, fp8", "size": f"{size} x {size} x {size}", "TFLOP/s": 2 * size**3 / seconds / 1e12}


def _attention(bench: Bench, name: str, shape: Shape) -> list[dict]:
    """Forward and backward pass of each kernel of causal attention that accepts the shape."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model, dtype = shape.model, torch.float32 if bench.rehearse else torch.bfloat16
    kernels = [SDPBackend.FLASH_ATTENTION] if bench.rehearse else [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    heads, keys = model.num_attention_heads, model.num_key_value_heads
    query, key, value = (
        torch.randn(shape.micro_batch_size, count, shape.sequence_length, model.head_dim, device=bench.device, dtype=dtype)
        for count in (heads, keys, keys)
    )
    inputs = [x.requires_grad_() for x in (query, key, value)]
    upstream = torch.randn_like(query)
    flops = 7 * shape.micro_batch_size * heads * shape.sequence_length**2 * model.head_dim  # causal: half of 4 + 10

    def pass_both_ways() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=heads != keys)
        torch.autograd.grad(out, inputs, upstream)

    rows = []
    for kernel in kernels:
        with sdpa_kernel(kernel):
            try:
                rate = flops / bench.seconds(pass_both_ways) / 1e12
            except RuntimeError as error:
                rows.append({"what": f"{name} attention, {kernel.name}", "error": str(error).splitlines()[0]})
                continue
        rows.append({"what": f"{name} attention, {kernel.name}", "size": str(tuple(query.shape)), "TFLOP/s": rate})
    return rows


# ---------------------------------------------------------------- parts: training


def windows(bench: Bench, shape: Shape, documents: bool) -> list[list[Batch]]:
    """The batches of a few steps on the device: tokens of a chain, each of 8 equally likely successors of the one before."""
    rows, length, vocabulary = shape.micro_batch_size, shape.sequence_length, shape.model.vocab_size
    generator = torch.Generator(bench.device).manual_seed(0)

    def draw(limit: int, *size: int) -> Tensor:
        return torch.randint(limit, size, device=bench.device, generator=generator)

    def micro_batch() -> Batch:
        tokens, noise = [draw(vocabulary, rows)], draw(8, length, rows)
        for step in noise:
            tokens.append((31 * tokens[-1] + step) % vocabulary)
        text_BT = torch.stack(tokens, 1)
        documents_BT = (draw(length // 4, rows, length) == 0).cumsum(1) if documents else None  # 4 on average
        return Batch(text_BT[:, :-1].contiguous(), text_BT[:, 1:].contiguous(), documents_BT)

    return [[micro_batch() for _ in range(ACCUMULATION)] for _ in range(2 if bench.rehearse else 4)]


def start(bench: Bench, shape: Shape, optimizer: str = "adamw", **settings) -> Engine:
    """An engine of one process with the shape's model."""
    precision = settings.pop("precision", "fp32" if bench.rehearse else "bf16")
    engine = start_engine(EngineConfig(precision=precision, **settings))
    engine.prepare(
        lambda: Transformer(shape.model), lambda model: build_optimizer(model, OptimizerConfig(name=optimizer)), 1.0, seed=0
    )
    return engine


def training(bench: Bench, shape: str, documents: bool = False, **settings) -> dict:
    """Steps of one case: speed, memory, losses, and what was compiled."""
    sizes = bench.shape(shape)
    engine = start(bench, sizes, **settings)
    meter, window = Meter(engine.device, 0, 1), windows(bench, sizes, documents)
    losses, began = [], time.perf_counter()

    def step(number: int) -> None:
        result = train_step(engine, window[number % len(window)], 3e-4)
        meter.add(*result)
        losses.append(result.loss_sum / result.tokens)

    step(0)
    losses[0].item()
    first = time.perf_counter() - began
    for number in range(1, bench.warm_up):
        step(number)
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(engine.device)
    for number in range(bench.warm_up, bench.warm_up + bench.steps):
        step(number)
        clock.mark()
    load = smi("power.draw", "clocks.sm", "temperature.gpu") if engine.device.type == "cuda" else {}  # while it works
    seconds = clock.seconds()
    tokens = ACCUMULATION * sizes.micro_batch_size * sizes.sequence_length
    row = {
        "shape": shape, "documents": documents, **settings, "tokens_per_step": tokens, "steps": bench.steps,
        "seconds_per_step": statistics.median(seconds), "slowest_step": max(seconds), "first_step_seconds": first,
        "tokens_per_second": tokens / statistics.median(seconds), "compiled": compile_report(), "load": load,
        "first_loss": losses[0].item(), "last_loss": losses[-1].item(),
    }  # fmt: skip
    if sheet := devices.find(engine.device_name):
        for key, causal in (("mfu", False), ("mfu_causal", True)):
            flops = flops_per_token(sizes.model, sizes.sequence_length, causal=causal)
            row[key] = flops * row["tokens_per_second"] / (sheet.bf16_tflops * 1e12)
    if engine.device.type == "cuda":
        row |= {"peak_gib": _gib(torch.cuda.max_memory_allocated()), "reserved_gib": _gib(torch.cuda.max_memory_reserved())}
    return row


def profile(bench: Bench) -> dict:
    """A trace of three steps of G1, and its ten costliest operators by the time of their own kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    shape = bench.shape("G1")
    engine, window = start(bench, shape, compile="none" if bench.rehearse else "blocks"), windows(bench, shape, False)
    cuda = engine.device.type == "cuda"
    train_step(engine, window[0], 3e-4)
    with record(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as trace:
        for number in range(3):
            train_step(engine, window[number % len(window)], 3e-4)
        if cuda:
            torch.cuda.synchronize()
    path = bench.folder / "gpu_trace.json.gz"
    trace.export_chrome_trace(str(path))
    time_of = (lambda event: event.self_device_time_total) if cuda else (lambda event: event.self_cpu_time_total)
    events = sorted(trace.key_averages(), key=time_of, reverse=True)
    total = sum(map(time_of, events)) or 1
    rows = [{"operator": event.key[:80], "calls": event.count, "share": time_of(event) / total} for event in events[:10]]
    return {"trace": str(path), "operators": rows}


# ---------------------------------------------------------------- parts: the rest


def generation(bench: Bench) -> dict:
    """Milliseconds of each of 64 new tokens: a kernel that makes a plan for each length would show here."""
    model = build(bench.shape("G1").model, bench.device, seed=0).eval()
    times = []
    for _ in range(2):  # the second one is measured
        times, began = [], time.perf_counter()
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=not bench.rehearse):
            for _ in generate(model, [1, 2, 3], 8 if bench.rehearse else 64, temperature=0):
                times.append(1000 * (time.perf_counter() - began))
                began = time.perf_counter()
    return {"first_ms": times[0], "median_ms": statistics.median(times), "slowest_ms": max(times[1:]), "ms": times}


def tests(bench: Bench) -> dict:
    """The tests that need a card."""
    report = bench.folder / "gpu_tests.xml"
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run([sys.executable, "-m", "pytest", "tests/test_gpu.py", *options], cwd=ROOT)
    suite = next(ElementTree.parse(report).iter("testsuite"))
    bad = [case.get("name") for case in suite.iter("testcase") if {"failure", "error"} & {child.tag for child in case}]
    counts = {key: int(suite.get(key)) for key in ("tests", "skipped", "failures", "errors")}
    if bad:
        raise RuntimeError(f"{counts}; failed: {', '.join(bad)}")
    return counts


def script(bench: Bench, name: str, *arguments: str) -> dict:
    """Another benchmark of this folder, on the same device. Its exit status 1, a missed target, is part of the result."""
    output = bench.folder / f"gpu_{name}.json"
    output.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments, "--output", str(output)]
    status = subprocess.run(command, cwd=ROOT).returncode
    if not output.exists():
        raise RuntimeError(f"{name}.py ended with status {status} and wrote nothing")
    return {"status": status, **json.loads(output.read_text())}


def predictions(bench: Bench) -> dict[str, float | str]:
    """GiB at the peak of each training case, by the dry run, which runs on the CPU; or why there is none."""
    device = "H100" if bench.rehearse else torch.cuda.get_device_name()

    def predict(name: str, case: dict) -> float | str:
        settings, output = (bench.folder / f"gpu_prediction_{name}.{end}" for end in ("yaml", "json"))
        output.unlink(missing_ok=True)
        settings.write_text(yaml.safe_dump(_settings(bench, **case)))
        flags = ["--config", str(settings), "--device", device, "--ranks", "1", "--json", str(output)]
        done = subprocess.run([sys.executable, "tools/check_run.py", *flags], cwd=ROOT, capture_output=True, text=True)
        found = json.loads(output.read_text()) if output.exists() else {}
        if "peak_bytes" not in found:
            return (done.stderr or done.stdout).strip().splitlines()[-1]
        return _gib(found["peak_bytes"])

    chosen = {
        name: case for name, case in cases(bench.rehearse).items() if not bench.rehearse or name in ("G1-none", "G3-blocks")
    }
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4)) as pool:
        return dict(zip(chosen, pool.map(predict, chosen, chosen.values()), strict=True))


def _settings(bench: Bench, shape: str, documents: bool = False, optimizer: str = "adamw", **engine: str) -> dict:
    """A training case as the settings of a run."""
    sizes = bench.shape(shape)
    sequences = {"global_batch_size": ACCUMULATION * sizes.micro_batch_size, "micro_batch_size": sizes.micro_batch_size}
    return {
        "model": {key: value for key, value in dataclasses.asdict(sizes.model).items() if value is not None},
        "data": {"sequence_length": sizes.sequence_length, "synthetic": {"kind": "uniform"}, "document_mask": documents},
        "batch": sequences,
        "optimizer": {"name": optimizer},
        "engine": {"precision": "bf16"} | engine,
        "train": {"max_steps": STEPS},
        "run": {"name": "gpu"},
    }


def _gib(size: int) -> float:
    return size / 2**30


def cases(rehearse: bool) -> dict[str, dict]:
    """Name -> arguments of `training`. A rehearsal compiles one case, and has no fp8."""
    blocks, model = ("none", "none") if rehearse else ("blocks", "model")
    return {
        "G1-blocks": {"shape": "G1", "compile": "blocks"},
        "G2-blocks": {"shape": "G2", "compile": blocks},
        "G2-fp8": {"shape": "G2", "compile": blocks, "precision": "bf16" if rehearse else "fp8"},
        "G1-none": {"shape": "G1", "compile": "none"},
        "G1-model": {"shape": "G1", "compile": model},
        "G2-none": {"shape": "G2", "compile": "none"},
        "G1-documents": {"shape": "G1", "compile": blocks, "documents": True},
        "G3-blocks": {"shape": "G3", "compile": blocks},
        "G1-muon": {"shape": "G1", "compile": blocks, "optimizer": "muon"},
        "G2-model": {"shape": "G2", "compile": model},
    }


def parts(rehearse: bool) -> dict[str, tuple[int, Callable[[Bench], object]]]:
    """Name -> (limit in seconds, function), the most important first."""
    where = ["--device", "cpu" if rehearse else "cuda"]
    found = {
        "card": (30, card),
        "rates": (60, rates),
        "tests": (100, tests),
        "predictions": (90, predictions),
        "generation": (30, generation),
        "profile": (60, profile),
        "seam": (60, lambda bench: script(bench, "seam_cost", *where, "--steps", "3" if rehearse else "30")),
        "checkpoint": (90, lambda bench: script(bench, "checkpoint", "--rounds", "1")),
    }
    for name, case in cases(rehearse).items():
        limit = {"G2-fp8": 120, "G1-model": 120, "G2-model": 150}.get(name, 90)
        found[name] = limit, lambda bench, case=case: training(bench, **case)
    return {name: found[name] for name in ORDER}


# ---------------------------------------------------------------- the run


def run_part(name: str, limit: float, options, folder: Path) -> dict:
    """Runs a part in a process of its own. -> {"part", "status": done, failed or late, "seconds", "result" or "error"}."""
    result, log = folder / f"gpu_{name}.part.json", folder / f"gpu_{name}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--output", str(options.output)]
    command += ["--rehearse"] if options.rehearse else []
    surroundings = os.environ | ({"OMP_NUM_THREADS": "1"} if options.rehearse else {})
    began = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=surroundings, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(limit)
            status = "failed"
        except subprocess.TimeoutExpired:
            status = "late"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    row = {"part": name, "seconds": time.perf_counter() - began}
    if status == "failed" and process.returncode == 0:
        found = json.loads(result.read_text())
        result.unlink()
        log.unlink()
        return row | {"status": "done", "result": found}
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return row | {"status": status, "limit_seconds": limit, "error": " / ".join(lines[-2:]), "log": str(log)}


def table(rows: list[dict], columns: dict[str, str]) -> list[str]:
    """Lines of a Markdown table. columns: key -> title; rows without a key have an empty cell."""

    def cell(value) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
        return "" if value is None else str(value).replace("|", "/")

    lines = [f"| {' | '.join(columns.values())} |", f"|{'---|' * len(columns)}"]
    return [*lines, *(f"| {' | '.join(cell(row.get(key)) for key in columns)} |" for row in rows), ""]


def markdown(report: dict) -> str:
    """The report as Markdown."""
    done = {part["part"]: part["result"] for part in report["parts"] if part["status"] == "done"}
    lines = [f"`python benchmarks/gpu.py`: {machine.describe(report['machine'])}", ""]
    if report["rehearsal"]:
        lines = ["A rehearsal on a CPU with tiny models: these figures mean nothing.", "", *lines]
    known = {
        key: done["card"][key] for key in ("driver_version", "cuda", "cudnn", "power.limit") if key in done.get("card", {})
    }
    lines += [", ".join(f"{key} {value}" for key, value in known.items()), ""]
    predicted = done.get("predictions", {})
    rows = [{"case": name, "predicted_gib": predicted.get(name), **done[name]} for name in cases(False) if name in done]
    if rows:
        columns = {"case": "case", "tokens_per_second": "tokens/s", "mfu": "MFU", "mfu_causal": "MFU, causal",
                   "seconds_per_step": "s per step", "first_step_seconds": "first step, s", "peak_gib": "peak, GiB",
                   "predicted_gib": "predicted, GiB", "reserved_gib": "reserved, GiB", "first_loss": "first loss",
                   "last_loss": "last loss", "compiled": "compiled"}  # fmt: skip
        lines += table(rows, columns)
    if "rates" in done:
        lines += table(done["rates"], {"what": "rate", "size": "size", "TFLOP/s": "TFLOP/s", "GB/s": "GB/s", "error": "error"})
    if "profile" in done:
        lines += table(done["profile"]["operators"], {"operator": "operator", "calls": "calls", "share": "share of time"})
    others = [
        {"part": name, "figures": _figures(done[name])}
        for name in ("tests", "generation", "seam", "checkpoint")
        if name in done
    ]
    lines += table(others, {"part": "part", "figures": "figures"}) if others else []
    lines += table(report["parts"], {"part": "part", "status": "status", "seconds": "seconds", "error": "last lines"})
    return "\n".join(lines)


def _figures(result: dict) -> str:
    """The numbers of a result on one line."""
    numbers = {key: value for key, value in result.items() if isinstance(value, int | float)}
    return ", ".join(f"{key} {value:.3g}" for key, value in numbers.items())


def main(argv: list[str]) -> int:
    """Runs the parts and writes the report; returns the exit status."""
    parser = command_line.make_parser(__doc__)
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU with tiny models, to check this program")
    parser.add_argument("--parts", nargs="+", metavar="PART", choices=parts(False), help="only these (default: all)")
    parser.add_argument("--minutes", type=command_line.at_least(1), default=MINUTES, help="for all parts (%(default)s)")
    parser.add_argument("--part", choices=parts(False), help="run one part in this process; for this program itself")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmarks/gpu.json"), help="JSON file to write (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    if not options.rehearse and not torch.cuda.is_available():
        raise NoGpu("torch finds no CUDA device here; --rehearse runs the same program on the CPU, with tiny models")
    folder = options.output.resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    chosen = parts(options.rehearse)
    if options.part:
        result = chosen[options.part][1](Bench(options.rehearse, folder))
        (folder / f"gpu_{options.part}.part.json").write_text(json.dumps(result))
        return 0
    report = {"machine": machine.facts(), "rehearsal": options.rehearse, "command": argv, "parts": []}
    deadline = time.perf_counter() + 60 * options.minutes
    for name in options.parts or chosen:
        left = deadline - time.perf_counter()
        limit = min(chosen[name][0], left)
        row = {"part": name, "status": "no time left", "seconds": 0.0} if left < 10 else run_part(name, limit, options, folder)
        report["parts"].append(row)
        print(f"{name:14} {row['status']:6} {row['seconds']:6.1f} s  {row.get('error', '')[:120]}", flush=True)
        options.output.write_text(json.dumps(report, indent=1))
        options.output.with_suffix(".md").write_text(markdown(report))
    print(f"\n{markdown(report)}\nwritten to {options.output} and {options.output.with_suffix('.md')}")
    return 0 if all(part["status"] == "done" for part in report["parts"]) else 1


if __name__ == "__main__":
    sys.exit(command_line.run(main))
