"""Measures the loss doctor's reading of long logs: seconds of CPU and peak memory for each format.

    python benchmarks/read_logs.py [--megabytes 100] [--format FORMAT ...]

Every log is read by a process of its own; its peak memory is that process's own high-water mark.
"""

from __future__ import annotations

import argparse
import gzip
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORMATS = {
    "megatron": " [2026-05-01 10:00] iteration {s:8d}/ 9000000 | consumed samples: {s:12d} | elapsed time per iteration (ms): "
    "{t:.1f} | learning rate: 1.500E-04 | global batch size:   256 | lm loss: {x:.6E} | loss scale: 1.0 | grad norm: {g:.3f} | "
    "number of skipped iterations:   0 | number of nan iterations:   0 |",
    "hugging_face": "{{'loss': {x:.4f}, 'grad_norm': {g:.15f}, 'learning_rate': 0.0005, 'epoch': {e:.6f}}}",
    "minimind": "Epoch:[1/2]({s}/90000000) loss:{x:.3f} lr:0.000500000000 epoch_Time:{t:.1f}min:",
    "bars": "Epoch 0:  10%|#   | {s}/90000000 [10:00<8:00, 1.77it/s, loss={x:.3f}, v_num=3]\r",
    "other_text": "{s} the quick brown fox jumps over {t:.3f} lazy dogs and then it sleeps at the river\nstep {s} loss {x:.4f}",
    "json": '{{"step": {s}, "loss": {x:.6f}, "grad_norm": {g:.6f}, "lr": 0.0005, "tokens_per_second": {t:.1f}}}',
    "csv": "{s},{x:.6f},{g:.6f},0.0005,{t:.1f}",
}
HEADERS = {"csv": "step,train/loss,grad_norm,lr,tokens_per_second\n"}
READ = """import sys, time; from pathlib import Path; from pretrain.doctor.training_log import read_log
log = read_log(Path(sys.argv[1]))
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(f"{time.process_time():.1f} s of CPU, peak {peak / 1024:.0f} MB, {len(log.loss):,} points, {log.loss_name!r}")
"""


def lines(form: str, megabytes: float) -> Iterator[str]:
    """Lines of about so many megabytes in all; the loss falls from 10 to 2."""
    yield HEADERS.get(form, "")
    size, step = 0, 0
    while size < megabytes * 1e6:
        step += 1
        noise = (step * 2654435761 % 2**32) / 2**32
        loss = 2 + 8 * (1 + step / 1000) ** -0.5 + 0.1 * noise
        line = FORMATS[form].format(s=step, x=loss, g=1 + noise, t=500 + 9 * noise, e=step / 1e6) + "\n"
        size += len(line)
        yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--format", nargs="+", choices=[*FORMATS, "gzip"], default=[*FORMATS, "gzip"])
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to measure")
    options = parser.parse_args()
    for form in options.format:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "log.gz" if form == "gzip" else "log")
            opened = gzip.open(path, "wt", compresslevel=1) if form == "gzip" else path.open("w")
            with opened as file:
                file.writelines(lines("megatron" if form == "gzip" else form, options.megabytes))
            command = [sys.executable, "-c", READ, str(path)]
            done = subprocess.run(
                command, cwd=options.root, capture_output=True, text=True, env={"PYTHONPATH": str(options.root)}
            )
            print(f"{form:14} {options.megabytes:g} MB: {done.stdout.strip() or done.stderr[-300:]}", flush=True)


if __name__ == "__main__":
    main()
