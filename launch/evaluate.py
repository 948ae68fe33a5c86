"""Measures a trained model: its loss on token files, or its results on tasks, in files of your own or of lm-eval.

    launch/evaluate.py --run runs/X [--step N|best] [--data PREFIX ...]
    accelerate launch launch/evaluate.py --model HF_FOLDER --data PREFIX PREFIX
    launch/evaluate.py --run runs/X --tasks data/tasks,questions.jsonl
    launch/evaluate.py --run runs/X --tasks lambada_openai,arc_easy

The loss is in nats per token over all tokens of the files, the same figure for any number of processes; perplexity and bits per
byte follow from it. Without --data a run is measured on its own validation data. How a run was distributed over processes does
not matter: --engine says how those of this command share the model, and engine.parallel is off.

--tasks takes JSONL files and folders of them (docs/tasks.md), on any number of processes. Other names are tasks of lm-eval, in
one process; they need pip install 'pretrain[eval]', and the model of a run is first converted for transformers and verified.

Exit status: 0 done, 2 refused, 130 interrupted.
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

sys.path[0] = str(Path(__file__).resolve().parents[1])  # else `import pretrain` would find launch/pretrain.py

from pretrain import UserError
from pretrain.data.flat import DTYPES
from pretrain.engines.place import read_place
from pretrain.run import command_line
from pretrain.run.command_line import at_least

if TYPE_CHECKING:
    from pretrain.engines.base import Engine
    from pretrain.interop.load import TrainedModel


def parse(argv: list[str]) -> argparse.Namespace:
    parser = command_line.make_parser(__doc__)
    command_line.add_trained_model(parser, average=True)
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the figures to this file, as JSON")
    data = parser.add_argument_group("loss on token files")
    data.add_argument("--data", nargs="+", metavar="PREFIX", help="token files written by tools/tokenize_corpus.py; a folder, "
                      "or a pattern in quotes, is one source of many files")  # fmt: skip
    data.add_argument("--sequence-length", type=at_least(1), metavar="TOKENS",
                      help="tokens of context; default: the run's, else 1024 or the model's limit")  # fmt: skip
    data.add_argument("--micro-batch-size", type=at_least(1), default=8, metavar="N",
                      help="sequences per forward pass and process (default: %(default)s)")  # fmt: skip
    data.add_argument("--max-samples", type=at_least(1), metavar="N",
                      help="at most this many sequences per file, evenly spaced; default: all")  # fmt: skip
    data.add_argument("--dtype", choices=DTYPES, help="type of the tokens of flat .bin files; default: judged by their content")
    data.add_argument("--engine", choices=["ddp", "fsdp2", "zero3"], default="ddp", help="ddp: each process holds the "
                      "full model; fsdp2, zero3: the processes share it (default: %(default)s)")  # fmt: skip
    data.add_argument("--precision", choices=["fp32", "bf16"], help="default: bf16 on GPUs, fp32 on CPUs")
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", metavar="NAMES", help="JSONL files, folders of them, and names of lm-eval's tasks, separated "
                       "by commas")  # fmt: skip
    tasks.add_argument("--include-path", type=Path, metavar="FOLDER", help="lm-eval: folder with your own tasks")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="lm-eval: examples before each question; default: set by "
                       "the task")  # fmt: skip
    tasks.add_argument("--limit", type=at_least(1), metavar="N", help="at most this many questions per task, for a quick "
                       "trial: the first ones of lm-eval, spread evenly over a file")  # fmt: skip
    options = parser.parse_args(argv)
    command_line.check_trained_model(parser, options)
    if options.output and not options.output.parent.is_dir():  # not after hours of measuring
        parser.error(f"--output: the folder {options.output.parent} does not exist; create it first")
    if options.tasks and options.data:
        parser.error("give either --data or --tasks: they are different measurements")
    if options.model and not (options.data or options.tasks):
        parser.error("--model: give --data or --tasks to measure it on")
    return options


def facts_of(options: argparse.Namespace) -> dict[str, str]:
    """What must be equal on all ranks; paths may differ where the content is the same. Raises DataError."""
    from pretrain.data.shards import common_fingerprint, open_shards
    from pretrain.data.tasks import task_files
    from pretrain.run.agreement import weights_digest

    paths = ("run", "model", "data", "output", "include_path", "tasks")
    flags = {f"--{name.replace('_', '-')}": str(value) for name, value in vars(options).items() if name not in paths}
    opened = [open_shards(path, options.dtype) for path in options.data or []]
    data = {f"--data {i}": common_fingerprint([file.fingerprint() for file in files]) for i, files in enumerate(opened)}
    files = {
        f"--tasks {path.stem}": xxhash.xxh3_128(path.read_bytes()).hexdigest()[:12] for path in task_files(local_tasks(options))
    }
    return flags | data | files | {"--run, --model": weights_digest(options.run or options.model)}


def local_tasks(options: argparse.Namespace) -> list[str]:
    """The files and folders among --tasks."""
    names = options.tasks.split(",") if options.tasks else []
    return [name for name in names if name.endswith(".jsonl") or Path(name).exists()]


def open_trained(options: argparse.Namespace) -> "TrainedModel":
    """Raises UserError, OSError."""
    from pretrain.interop.load import open_hf_folder, open_run

    if options.run:
        return open_run(options.run, options.step, options.average, options.last_weights)
    return open_hf_folder(options.model)


def start(options: argparse.Namespace) -> "Engine":
    """The engine of this command, after all ranks have agreed on what they measure. Raises UserError, OSError."""
    from pretrain.config import EngineConfig
    from pretrain.engines.rendezvous import meet
    from pretrain.engines.start import start_engine

    config = EngineConfig(name=options.engine, precision=options.precision, compile="none")
    place, facts, refusal = read_place(), {}, None
    try:
        facts = facts_of(options) if place.world_size > 1 else {}
    except (UserError, OSError) as error:
        refusal = error
    return start_engine(config, meet(place, config.timeout_seconds, facts, refusal=refusal))


def measure_local_tasks(options: argparse.Namespace) -> tuple[dict, dict]:
    """Prints a table of tasks on rank 0. Returns the origin of the model and the figures by task. Raises UserError, OSError."""
    from pretrain.data.tasks import findings, open_tasks
    from pretrain.tasks import score

    trained = open_trained(options)
    model = trained.model
    tasks = open_tasks(
        local_tasks(options), trained.require_tokenizer(), model.max_position_embeddings, model.vocab_size, options.limit
    )
    engine = start(options)
    if engine.rank == 0:
        for finding in findings(tasks):
            print(f"warn  {finding}", file=sys.stderr)
    show = progress(engine, "batches")
    found = score(engine, trained, tasks, options.micro_batch_size * min(1024, model.max_position_embeddings), show)
    if engine.rank == 0:
        print(f"{'task':32} {'items':>7} {'accuracy':>9} {'guessing':>9} {'per char':>9} {'per byte':>9} {'bits/byte':>10}")
        for task in tasks:
            row = found[task.name]
            keys = ("accuracy", "chance", "accuracy_per_character", "accuracy_per_byte")
            cells = " ".join(f"{row[key]:9.4f}" if key in row else f"{'':9}" for key in keys)
            print(f"{task.name:32} {len(task.items):7,} {cells} {row['bits_per_byte']:10.4f}")
    engine.close()
    return trained.origin, found


def progress(engine: "Engine", what: str) -> Callable[[int, int], None]:
    """Shows a percentage on a terminal, on rank 0."""
    shown = engine.rank == 0 and sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        if shown:
            end = "\r" if done == total else ""
            print(f"\r{100 * done // total} % of {total} {what}", end=end, file=sys.stderr, flush=True)

    return show


def measure_loss(options: argparse.Namespace) -> None:
    """Prints a table of losses on rank 0. Raises UserError, OSError."""
    from pretrain.config import DataConfig, SourceConfig
    from pretrain.evaluate import score

    trained = open_trained(options)
    data = trained.config.data if trained.config else DataConfig(
        sequence_length=min(1024, trained.model.max_position_embeddings)
    )  # fmt: skip
    data = dataclasses.replace(data, sequence_length=options.sequence_length or data.sequence_length)
    if options.data:
        valid = [SourceConfig(path=path, dtype=options.dtype) for path in options.data]
        data = DataConfig(valid=valid, sequence_length=data.sequence_length, document_mask=trained.document_mask)
    elif not (data.valid or data.synthetic):
        raise UserError(f"{options.run}: this run has no validation data of its own; give --data")
    engine = start(options)
    show = progress(engine, "micro-batches")
    rows = score(engine, trained, data, options.micro_batch_size, options.max_samples, show)
    if engine.rank == 0:
        print("\r" * sys.stderr.isatty() + f"{'source':32} {'samples':>9} {'loss':>9} {'perplexity':>11} {'bits/byte':>10}")
        for row in rows if len(rows) > 2 else rows[:1]:
            bits = f"{row['bits_per_byte']:10.4f}" if "bits_per_byte" in row else f"{'':10}"
            print(f"{row['source']:32} {row['samples']:9,} {row['loss']:9.4f} {row['perplexity']:11.3f} {bits}".rstrip())
        figures = {"sequence_length": data.sequence_length, "precision": engine.precision, "loss": rows}
        write_figures(options.output, trained.origin, figures)
    engine.close()


def measure_lm_eval(options: argparse.Namespace, names: list[str]) -> tuple[dict, dict]:
    """Prints lm-eval's table. Returns the origin of the model, and lm-eval's figures. Raises UserError, OSError."""
    from pretrain.model.hf_mapping import read_config

    if options.model:
        read_config(options.model)  # fails unless it is a folder: transformers would look a name up on the network
    if not importlib.util.find_spec("lm_eval"):
        raise UserError(
            f"--tasks: there is no file {names[0]}, and tasks of lm-eval need that package: pip install 'pretrain[eval]'"
        )
    if read_place().world_size > 1:
        raise UserError("--tasks: lm-eval runs in one process: start it with python, without a launcher")
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from pretrain.interop.convert import export_model
    from pretrain.interop.load import open_run

    manager = TaskManager(include_path=str(options.include_path) if options.include_path else None)
    for name in names:
        if not manager.match_tasks([name]):
            raise UserError(
                f"--tasks: there is no file {name!r} and no such task of lm-eval; `lm-eval ls tasks` lists them, and "
                "--include-path adds your own"
            )
    with tempfile.TemporaryDirectory(prefix="evaluate-") as temporary:
        folder, origin = options.model, {"model": options.model and options.model.name}
        if options.run:
            trained = open_run(options.run, options.step, options.average, options.last_weights)
            folder, origin = Path(temporary) / "model", trained.origin
            export_model(trained, folder, options.precision or "fp32")
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={
                "pretrained": str(folder),
                "dtype": {"fp32": "float32", "bf16": "bfloat16"}.get(options.precision, "auto"),
            },
            tasks=names,
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            batch_size=options.micro_batch_size,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
    print(make_table(results))
    return origin, {"tasks": results["results"], "versions": results["versions"]}


def measure_tasks(options: argparse.Namespace) -> None:
    """Raises UserError, OSError."""
    local, figures = local_tasks(options), {}
    names = [name for name in options.tasks.split(",") if name not in local]
    if names:
        origin, figures = measure_lm_eval(options, names)
    if local:
        origin, found = measure_local_tasks(options)
        figures = {**figures, "tasks": figures.get("tasks", {}) | found}
    if read_place().rank == 0:
        write_figures(options.output, origin, figures)


def write_figures(path: Path | None, origin: dict, figures: dict) -> None:
    """Writes the figures and the origin of their model as JSON, if --output is given. Raises OSError."""
    if path:
        path.write_text(json.dumps({**origin, **figures}, indent=1, default=str) + "\n", encoding="utf-8")


def main(argv: list[str]) -> None:
    """Raises UserError, OSError."""
    options = parse(argv)
    if options.tasks:
        measure_tasks(options)
    else:
        measure_loss(options)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
