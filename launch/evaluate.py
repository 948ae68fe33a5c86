"""Measures a trained model: its loss on token files, or tasks of lm-eval.

    launch/evaluate.py --run runs/X [--step N|best] [--data PREFIX ...]
    accelerate launch launch/evaluate.py --model HF_FOLDER --data PREFIX PREFIX
    launch/evaluate.py --run runs/X --tasks lambada_openai,arc_easy

Loss is in nats per token over every token of the files, the same number on any number of processes; perplexity and bits per
byte follow from it. Without --data a run is measured on its own validation data. --tasks needs pip install 'pretrain[eval]':
the model of a run is then converted first, and proved to be the same in transformers.

Exit status: 0 done, 2 refused, 130 interrupted.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # else `import pretrain` would find launch/pretrain.py

from pretrain.checkpoint.manifest import CheckpointError
from pretrain.config import ConfigError


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of a run, runs/<name>")
    source.add_argument("--model", type=Path, help="Hugging Face folder")
    parser.add_argument("--step", help="--run: a checkpoint's step, or best (lowest validation loss); default: the newest")
    parser.add_argument(
        "--average", type=int, default=1, metavar="N", help="--run: mean of the N checkpoints that end with --step"
    )
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    data = parser.add_argument_group("loss on token files")
    data.add_argument("--data", nargs="+", metavar="PREFIX", help="token files, as tools/tokenize_corpus.py writes them")
    data.add_argument("--sequence-length", type=int, help="tokens of context; default: that of the run, else 1024 or what fits")
    data.add_argument("--micro-batch-size", type=int, default=8, help="sequences at a time and process (default: %(default)s)")
    data.add_argument("--max-samples", type=int, help="at most so many sequences of each file, spread evenly; default: all")
    data.add_argument(
        "--engine", choices=["ddp", "fsdp2", "zero3"], default="ddp",
        help="ddp: every process holds the model; fsdp2, zero3: they share it (default: %(default)s)",
    )  # fmt: skip
    data.add_argument("--precision", choices=["fp32", "bf16"], help="default: bf16 on GPUs, fp32 on CPUs")
    tasks = parser.add_argument_group("tasks of lm-eval")
    tasks.add_argument("--tasks", help="names of tasks, with commas between them")
    tasks.add_argument("--include-path", type=Path, help="folder with tasks of your own")
    tasks.add_argument("--num-fewshot", type=int, help="examples before each question; default: as the task says")
    tasks.add_argument("--limit", type=int, help="at most so many questions of each task: for trials, not for results")
    options = parser.parse_args(argv)
    if options.step not in (None, "best") and not options.step.isdecimal():
        parser.error(f"--step: got {options.step!r}, allowed: a number or best")
    if options.model and (options.step or options.average != 1):
        parser.error("--step and --average belong to --run: a Hugging Face folder has one model")
    for name in ("average", "sequence_length", "micro_batch_size", "max_samples", "limit"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: got {value}, must be at least 1")
    if options.output and not options.output.parent.is_dir():  # before hours of measuring
        parser.error(f"--output: there is no folder {options.output.parent}; make it first")
    if options.tasks and options.data:
        parser.error("give --data or --tasks, one after the other: they are different measurements")
    if options.model and not (options.data or options.tasks):
        parser.error("--model: give --data or --tasks to measure it on")
    return options


def measure_loss(options: argparse.Namespace) -> list[dict]:
    """Figures of every source and of all; printed by rank 0. Raises ValueError and its like with a sentence for the user."""
    from pretrain.config import DataConfig, EngineConfig, SourceConfig
    from pretrain.engines.start import start_engine
    from pretrain.evaluate import score
    from pretrain.interop.load import open_folder, open_run

    trained = open_run(options.run, options.step, options.average) if options.run else open_folder(options.model)
    data = trained.config.data if trained.config else DataConfig(
        sequence_length=min(1024, trained.model.max_position_embeddings)
    )  # fmt: skip
    data = dataclasses.replace(data, sequence_length=options.sequence_length or data.sequence_length)
    if options.data:
        valid = [SourceConfig(path=path) for path in options.data]
        data = DataConfig(valid=valid, sequence_length=data.sequence_length, document_mask=trained.document_mask)
    elif not (data.valid or data.synthetic):
        raise ValueError(f"{options.run}: was trained without validation data; give --data")
    engine = start_engine(EngineConfig(name=options.engine, precision=options.precision))
    shown = engine.rank == 0 and sys.stderr.isatty()

    def beat(done: int, total: int) -> None:
        if shown:
            print(f"\r{100 * done // total} % of {total} micro-batches", end="", file=sys.stderr, flush=True)

    rows = score(engine, trained, data, options.micro_batch_size, options.max_samples, beat)
    if engine.rank == 0:
        print("\r" * shown + f"{'source':32} {'samples':>9} {'loss':>9} {'perplexity':>11} {'bits/byte':>10}")
        for row in rows if len(rows) > 2 else rows[:1]:
            bits = f"{row['bits_per_byte']:10.4f}" if "bits_per_byte" in row else f"{'':10}"
            print(f"{row['source']:32} {row['samples']:9,} {row['loss']:9.4f} {row['perplexity']:11.3f} {bits}".rstrip())
        write(options, trained.origin, {"sequence_length": data.sequence_length, "precision": engine.precision, "loss": rows})
    engine.close()
    return rows


def measure_tasks(options: argparse.Namespace) -> None:
    """Prints lm-eval's table. Raises ValueError and its like with a sentence for the user."""
    from pretrain.model.hf_mapping import read_config

    if options.model:
        read_config(options.model)  # it is a folder: a name would be looked for on the network
    if not importlib.util.find_spec("lm_eval"):
        raise ValueError("--tasks needs the package lm-eval: pip install 'pretrain[eval]'")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--tasks runs in one process: start it with python")
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from pretrain.interop.convert import export
    from pretrain.interop.load import open_run

    manager = TaskManager(include_path=str(options.include_path) if options.include_path else None)
    for name in options.tasks.split(","):
        if not manager.match_tasks([name]):
            raise ValueError(
                f"--tasks: lm-eval has no task {name!r}; `lm-eval ls tasks` lists them, --include-path adds your own"
            )
    with tempfile.TemporaryDirectory(prefix="evaluate-") as temporary:
        folder, origin = options.model, {"model": options.model and options.model.name}
        if options.run:
            trained = open_run(options.run, options.step, options.average)
            folder, origin = Path(temporary) / "model", trained.origin
            export(trained, folder, options.precision or "fp32")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={
                "pretrained": str(folder),
                "dtype": {"fp32": "float32", "bf16": "bfloat16"}.get(options.precision, "auto"),
            },
            tasks=options.tasks.split(","),
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            batch_size=options.micro_batch_size,
            device=device,
        )
    print(make_table(found))
    write(options, origin, {"tasks": found["results"], "versions": found["versions"]})


def write(options: argparse.Namespace, origin: dict, figures: dict) -> None:
    """The figures and what they are of, as JSON, where --output asks for it."""
    if options.output:
        options.output.write_text(json.dumps({**origin, **figures}, indent=1, default=str) + "\n", encoding="utf-8")


def main() -> int:
    """-> exit status."""
    options = parse(sys.argv[1:])
    try:
        if options.tasks:
            measure_tasks(options)
        else:
            measure_loss(options)
    except (CheckpointError, ConfigError, ValueError, OSError) as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"evaluate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
