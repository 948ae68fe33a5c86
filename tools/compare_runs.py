"""Finds why two runs differ: compares their settings by effect, and finds the first step whose losses differ beyond the noise.

    python tools/compare_runs.py runs/a runs/b [--twin runs/a_again] [--json FILE]

Exit status: 0 compared, 2 a folder does not hold a run, or FILE cannot be written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from pretrain import schema, stages
from pretrain.config import Config, SourceConfig, load
from pretrain.data import shards
from pretrain.data.indexed import DataError
from pretrain.data.tokenizer import Tokenizer
from pretrain.doctor.compare_runs import Run, differences, parting, read_run, verdict
from pretrain.files import write_atomically
from pretrain.optim.schedule import Course, Curve, lr_at
from pretrain.report import environment
from pretrain.run import command_line


def main(argv: list[str]) -> None:
    """Compares two runs and prints what differs."""
    parser = command_line.make_parser(__doc__)
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="folder of a run, e.g. runs/NAME")
    parser.add_argument(
        "--twin",
        type=Path,
        metavar="RUN",
        help="a repetition of the first run, whose difference from it is the noise (default: rounding, for runs that read the "
        "same samples from the same weights; for others the scatter of their lines)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file, as JSON")
    options = parser.parse_args(argv)
    a, b = (read(folder) for folder in options.runs)
    found = differences(a, b)
    where = parting(a, b, found, read(options.twin) if options.twin else None)
    for each in found:
        print(f"{'changes the curve' if each.bends else 'rounding only':18} {each.what}: {each.text}")
    equal = "not even the first line" if where.equal_to is None else f"up to step {where.equal_to}"
    print(f"{where.common} common lines; equal to the last bit: {equal}; noise: {where.noise}")
    if where.step is not None:
        print("first beyond the noise: step {}, {:.6f} and {:.6f}".format(where.step, *where.losses), end=" ")
        print(f"(allowed {where.allowed:.2g})")
    print(verdict(a, b, found, where))
    if options.json:
        content = {"differences": [each._asdict() for each in found], "parting": where._asdict()}
        write_atomically(options.json, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read(folder: Path) -> Run:
    """The run in `folder` with the facts that only this program knows. Raises CompareError, ConfigError."""
    run = read_run(folder)
    config = load(["--config", str(folder / "config.yaml")], world_size=None)
    run.settings = schema.to_dict(config)

    def scheduled_lr(step: int) -> float:
        length = environment.start_of_step(run.environment, step).get("length") or {}  # older versions did not write it
        curves = [Curve.read(curve) for curve in length.get("curves", [])]
        if curve := next((curve for curve in reversed(curves) if curve.step < step), None):
            return curve.lr(step)
        course = Course(*length["course"]) if length.get("course") else None
        return lr_at(step, config.schedule, config.optimizer.lr, length.get("total_steps", run.total_steps), course)

    run.scheduled_lr = scheduled_lr
    for facts, (_, source) in zip(run.sources, stages.sources(config), strict=True):
        facts |= facts_of_file(source, facts, config)
    return run


def facts_of_file(source: SourceConfig, sidecar: dict, config: Config) -> dict:
    """Sizes of the token files of a source and the share of its tokens that end a document; {} if one is missing or was
    rewritten since."""
    try:
        files = shards.open_shards(source.path, source.dtype, config.model.vocab_size)
        if shards.common_fingerprint([file.fingerprint() for file in files]) != sidecar.get("fingerprint"):
            return {}
        facts = {"num_tokens": sum(file.num_tokens for file in files), "dtype": shards.common_dtype(files).name}
        facts["num_documents"] = sum(file.num_documents or 0 for file in files) or None
        end = sidecar.get("end_of_document_id", end_of_document(config))
        return facts if end is None else facts | {"ends": float(np.mean(shards.common_sample(files) == end))}
    except (DataError, OSError):
        return {}  # the facts in the sidecar must suffice


def end_of_document(config: Config) -> int | None:
    """The end-of-document id of the run's tokenizer; None if it has no tokenizer, or it cannot be read."""
    try:
        return Tokenizer.load(config.tokenizer.path).end_of_document_id if config.tokenizer.path else None
    except DataError:
        return None


if __name__ == "__main__":
    sys.exit(command_line.run(main))
