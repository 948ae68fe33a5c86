"""All settings of a run. `Config` is the table of contents; every key has its bounds, unit, "off" value and resume class
beside it.

Defaults < YAML files in their order < `--section.key value` flags. `load(argv)` returns a checked `Config` or raises
`ConfigError` with *every* problem at once. Nothing here imports torch: a mistake in a file costs no GPU time.
Each part of the project takes its own section (`ModelConfig`), never the whole `Config`.

A default is wrapped in a resume class, which says whether a resumed run may change the setting:

    frozen     no: it would be another run
    guarded    only if checkpoint.allow_changes names it: it changes the training dynamics
    free       yes
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from pretrain import schema, stages
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.data.config import DataConfig, SourceConfig
from pretrain.data.config import SyntheticConfig as SyntheticConfig
from pretrain.engines import config as engine_settings
from pretrain.engines.config import EngineConfig, Work
from pretrain.engines.config import ParallelConfig as ParallelConfig
from pretrain.model import config as model_settings
from pretrain.model.config import ModelConfig, differences, model_from_dict, resolve_model
from pretrain.report import config as log_settings
from pretrain.report.config import LogConfig
from pretrain.report.config import WandbConfig as WandbConfig
from pretrain.schema import (
    ConfigError,
    Decay,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Problem,
    free,
    frozen,
    guarded,
    shown,
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Name, place and seed of the run."""

    name: str = free("run")
    """Name of the run; its files go to <directory>/<name>."""
    directory: str = free("runs")
    """Folder that holds all runs."""
    seed: NonNegativeInt = frozen(1234)
    """Seed of the initial weights, the data order and the synthetic data."""
    dollars_per_hour: NonNegativeFloat = free(0.0)
    """Price of one GPU (on CPUs: of one process) per hour, for the costs in all reports. 0: unknown."""
    budget_dollars: PositiveFloat | None = free(None)
    """Most dollars that all starts of the run together may cost: it stops before, with a checkpoint, and says what it would
    take to finish. null: no limit."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer that produced the data; used for the vocabulary, checks and sample texts."""

    path: str | None = free(None)
    """Folder written by tools/train_tokenizer.py, or of a Hugging Face tokenizer; null: none (then model.vocab_size is
    required)."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The batch in sequences. Accumulation is derived (global / (micro * ranks)) and printed, never configured."""

    global_batch_size: PositiveInt = guarded(32)
    """Sequences per step, over all ranks and micro-batches."""
    micro_batch_size: PositiveInt = free(8)
    """Sequences per forward pass on one rank."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Weight decay applies to matrices only, not to vectors (norms) and embeddings."""

    name: Literal["adamw", "muon"] = frozen("adamw")
    """adamw; or muon for the matrices of the blocks, with adamw for embeddings, head and vectors."""
    lr: PositiveFloat = guarded(3e-4)
    """Peak learning rate. Muon's updates are scaled to the size of AdamW's, so the same value suits both."""
    embedding_lr_scale: PositiveFloat = guarded(1.0)
    """Learning rate of the embedding as a multiple of lr: its rows get gradients only where their tokens occur."""
    betas: tuple[Decay, Decay] = guarded((0.9, 0.95))
    """AdamW's decay of the first and second moment."""
    eps: PositiveFloat = guarded(1e-8)
    """AdamW adds it to the root of the second moment."""
    momentum: Decay = guarded(0.95)
    """Muon's decay of the momentum; adamw ignores it."""
    row_beta: Decay = guarded(0.0)
    """Muon divides each row of an update by the root of its mean square, which decays by this factor per step (NorMuon; its
    paper: 0.95); adamw ignores it. 0: off."""
    weight_decay: NonNegativeFloat = guarded(0.1)
    """Decoupled decay per unit of learning rate. 0: off."""
    cautious_decay: bool = guarded(False)
    """Only weights that the update moves towards zero decay, too."""
    lookahead: NonNegativeFloat = guarded(0.0)
    """At the peak learning rate, each gradient is taken this many mean steps ahead (EMA-Nesterov; its paper: 0.6); less at
    lower rates, and none below a third of the peak. 0: off."""
    lookahead_decay: Decay = guarded(0.99)
    """Decay per step of the mean step of lookahead."""
    average_decay: Decay = guarded(0.0)
    """Decay per step of an average of the weights, which validation, sample texts and exported models then use. 0: off."""
    grad_clip: NonNegativeFloat = guarded(1.0)
    """Largest global norm of the full gradient. 0: off."""

    @property
    def averages(self) -> int:
        """Number of averages of the weights that it keeps, as large as the weights in fp32."""
        return (self.average_decay > 0) + (self.lookahead > 0)

    @property
    def average_bytes(self) -> int:
        """Bytes per weight that the averages read and write in a step: each reads the weight and itself and writes itself;
        lookahead then reads both again and writes the weight, at least where the rate is above a third of its peak."""
        return 12 * (self.average_decay > 0) + 24 * (self.lookahead > 0)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate as a pure function of the step; docs/running.md says what changes midway do."""

    name: Literal["cosine", "wsd", "linear", "constant"] = guarded("cosine")
    """Shape of the decay; wsd: warm-up, stable, decay at the end."""
    warmup_steps: NonNegativeInt = guarded(0)
    """Steps of linear warm-up from 0. 0: off."""
    decay_steps: PositiveInt | None = guarded(None)
    """Length of the decay; null: all steps after warm-up (wsd: 40 % of all steps)."""
    final_lr_fraction: Fraction = guarded(0.1)
    """Learning rate at the last step as a fraction of the peak."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A later stage of a run: weights and moments stay, and so does every setting that is null here."""

    after_steps: PositiveInt | None = free(None)
    """Begins after this many steps over all starts; null: see after_tokens."""
    after_tokens: PositiveInt | None = free(None)
    """Begins with the first step after this many tokens were fed to the model; null: see after_steps."""
    sources: list[SourceConfig] | None = free(None)
    """Training sources from here on: [{path, weight}]. A source that an earlier stage has read continues where it was."""
    sequence_length: PositiveInt | None = free(None)
    """Tokens per sample from here on."""
    global_batch_size: PositiveInt | None = free(None)
    """Sequences per step from here on."""
    micro_batch_size: PositiveInt | None = free(None)
    """Sequences per forward pass from here on."""
    lr: PositiveFloat | None = free(None)
    """Peak learning rate of a new schedule that begins here."""
    schedule: ScheduleConfig | None = free(None)
    """A new schedule that begins here and ends with the next one or with the run; its warm-up rises or falls from the rate that
    was reached. null: the schedule continues, or begins again if lr is given."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length of the run: exactly one of max_steps, max_tokens, epochs. Its stages. And what to do when it diverges."""

    max_steps: PositiveInt | None = guarded(None)
    """Optimizer steps over all starts, of any batch."""
    max_tokens: PositiveInt | None = guarded(None)
    """Tokens fed to the model over all starts, whatever their batch (rounded up to full steps)."""
    epochs: PositiveFloat | None = guarded(None)
    """Passes over all training sources together, over all starts."""
    stages: list[StageConfig] | None = guarded(None)
    """Later stages with other data, lengths, batches or learning rates (docs/data.md); null: none."""
    max_skipped_steps: PositiveInt = free(10)
    """Consecutive non-finite steps after which the run counts as diverged."""
    on_divergence: Literal["stop", "rollback"] = free("stop")
    """stop: exit with status 70; rollback: return to the last checkpoint and leave out the samples of those steps, at most
    twice."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Validation on a fixed set; the result does not depend on the number of ranks."""

    every_steps: NonNegativeInt = free(0)
    """Steps between validations; there is always one at the end. 0: only at the end."""
    max_batches: PositiveInt | None = free(None)
    """At most this many global batches, spread evenly over the set; null: the full set."""
    sample_prompts: list[str] = free(list)
    """Prompts that the model continues after each validation (needs tokenizer.path); empty: off."""
    sample_tokens: PositiveInt = free(40)
    """Largest number of tokens of each continuation, decoded greedily."""
    tasks: list[str] = free(list)
    """JSONL files, or folders of them, of questions that are answered by likelihood (docs/tasks.md; needs tokenizer.path);
    empty: off."""
    tasks_every_steps: PositiveInt | None = free(None)
    """Steps between measurements of the tasks; there is always one at the end. null: with every validation."""
    task_items: PositiveInt | None = free(None)
    """At most this many items of each task, spread evenly over its file; null: all."""
    expected: str | None = free(None)
    """prediction.json of a ladder (tools/plan_ladder.py --fit): every validation says where it is in the band that small runs
    predict, and a run that leaves the band is an alarm. null: off."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A complete run. The resume class of a section is that of keys which only another version of this project knows."""

    run: RunConfig = free(RunConfig)
    model: ModelConfig = frozen(ModelConfig)
    tokenizer: TokenizerConfig = frozen(TokenizerConfig)
    data: DataConfig = frozen(DataConfig)
    batch: BatchConfig = guarded(BatchConfig)
    optimizer: OptimizerConfig = guarded(OptimizerConfig)
    schedule: ScheduleConfig = guarded(ScheduleConfig)
    train: TrainConfig = guarded(TrainConfig)
    engine: EngineConfig = free(EngineConfig)
    evaluate: EvaluateConfig = free(EvaluateConfig)
    checkpoint: CheckpointConfig = free(CheckpointConfig)
    log: LogConfig = free(LogConfig)


# ---------------------------------------------------------------- reading

USAGE = """usage: {program} --config FILE [--config FILE ...] [--section.key value ...]

  --config FILE        YAML settings; a later file overrides an earlier one, flags override files
  --section.key value  one setting, e.g. --optimizer.lr 3e-4 --data.train '[{{path: data/wiki_train}}]'
  --print_config       print all settings and exit
  --print_schema       print a JSON Schema for editors (head of a file: # yaml-language-server: $schema=PATH) and exit
  --help               print this and exit

settings, with default, bounds, and whether a resumed run may change them (free), may after confirmation by
checkpoint.allow_changes (guarded), or may not (frozen):
{keys}"""


def load(argv: list[str], *, world_size: int | None = 1, program: str = "launch/pretrain.py") -> Config:
    """Settings from the command line `argv` (without the program's name), checked for `world_size` ranks (None: any).

    Raises ConfigError with all problems. The switches `--help`, `--print_config` and `--print_schema` print and raise
    SystemExit(0).
    """
    problems: list[Problem] = []
    paths, flags, switches = schema.split_arguments(argv, problems)
    if "help" in switches:
        _show(USAGE.format(program=program, keys="\n".join(map(str, schema.walk(Config)))) + "\n")
    if "print_schema" in switches:
        _show(json.dumps(schema.json_schema(Config), indent=2, ensure_ascii=False) + "\n")
    tree, origins = schema.read_layers(paths, flags, problems)
    unread = any(problem.key.startswith(tuple(paths)) for problem in problems)
    pretrained = _read_pretrained(tree, origins, problems)
    config = schema.build(Config, tree, origins, problems)
    if not unread:  # else the settings in an unreadable file are unknown
        checks = validate(config, world_size)
        if pretrained and not problems:
            checks += _check_pretrained(config.model, pretrained)
        problems += [dataclasses.replace(each, origin=schema.origin_of(origins, tuple(each.key.split(".")))) for each in checks]
    if problems:
        raise ConfigError(problems)
    if "print_config" in switches:
        _show(schema.to_yaml(config))
    return config


def _show(text: str) -> NoReturn:
    """Prints `text` and ends the program. A reader that closes the pipe early (`--help | head`) is not an error."""
    sys.stdout.reconfigure(encoding="utf-8")  # YAML's encoding, whatever the locale can write
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def _read_pretrained(tree: dict[str, Any], origins: schema.Origins, problems: list[Problem]) -> ModelConfig | None:
    """The model in the folder that `model.from_pretrained` names, whose settings become a layer below those in `tree`."""
    given = tree.get("model")
    path = given.get("from_pretrained") if isinstance(given, dict) else None
    if not isinstance(path, str) or path in ("", "null", "~"):
        return None
    from pretrain.model import hf_mapping  # most runs start from new weights

    try:
        found = hf_mapping.architecture(Path(path))
        pretrained = model_from_dict(found)
    except (hf_mapping.UnsupportedModel, TypeError, AttributeError) as error:
        if "hidden_size" not in given:  # a run's own config.yaml has every key, and is readable without that folder
            problems.append(Problem("model.from_pretrained", str(error), origins.get(("model", "from_pretrained"), "")))
        return None
    schema.merge(found, given)
    tree["model"] = found
    return pretrained


# ---------------------------------------------------------------- combinations that cannot work


def validate(config: Config, world_size: int | None = 1) -> list[Problem]:
    """Combinations that cannot work, for `world_size` ranks (None: any). All checks that need no file and no tensor.

    A check that reads a key with a problem (`schema.Partial`) ends there.
    """
    checks = [check(config) for check in _CHECKS] + [check(config, world_size) for check in _CHECKS_OF_RANKS]
    with contextlib.suppress(schema.Unread):
        model = config.model
        checks += [check(model) for check in model_settings.CHECKS]
    problems: list[Problem] = []
    for check in checks:
        with contextlib.suppress(schema.Unread):
            for problem in check:
                problems.append(problem)
    return problems


def _check_names(config: Config) -> Iterator[Problem]:
    for key in ("name", "directory"):
        if not (path := getattr(config.run, key)).isprintable():
            yield Problem(f"run.{key}", f"got {path!r}, which has characters that cannot be displayed")
    if any(part in ("", ".", "..") for part in config.run.name.split("/")) or len(config.run.name) > 200:
        yield Problem("run.name", f"got {config.run.name!r}, must be a plain folder name below run.directory")
    if config.run.directory.startswith("~"):
        yield Problem("run.directory", f"got {config.run.directory}; only a shell expands ~, write the full path")


def _check_budget(config: Config) -> Iterator[Problem]:
    if config.run.budget_dollars is not None and not config.run.dollars_per_hour:
        yield Problem("run.budget_dollars", "needs run.dollars_per_hour, the price of one GPU; set both, or neither")


def _check_mirror(config: Config) -> Iterator[Problem]:
    mirror = config.checkpoint.mirror  # a slip such as s3:/bucket would be a folder on the disk that is lost with the machine
    if mirror is not None and not re.match(r"(?!https?:)[\w.+:-]+://[^/]|(file|local):///.", mirror):
        text = f"got {mirror!r}, must be a URL such as s3://bucket/folder, or file:///mnt/disk for a disk that is mounted"
        yield Problem("checkpoint.mirror", text)


def _check_positions(config: Config) -> Iterator[Problem]:
    if config.model.reset_positions and not config.data.document_mask:
        yield Problem("model.reset_positions", "is true, which needs data.document_mask: set both, or neither")


def _check_length(config: Config) -> Iterator[Problem]:
    limits = {f"train.{key}": getattr(config.train, key) for key in ("max_steps", "max_tokens", "epochs")}
    given = [key for key, value in limits.items() if value is not None]
    if len(given) != 1:
        yield Problem("train", f"set exactly one of {', '.join(limits)}; now set: {', '.join(given) or 'none'}")
    if (steps := config.log.profile_steps) and not 0 <= steps[1] - steps[0] < 20:
        yield Problem("log.profile_steps", f"got {[*steps]}, must be [first, last] of 1 to 20 consecutive steps")


def _check_schedule(config: Config) -> Iterator[Problem]:
    steps, warmup = config.train.max_steps, config.schedule.warmup_steps
    if steps is not None and warmup > steps:
        yield Problem("schedule.warmup_steps", f"got {warmup}, must be at most train.max_steps = {steps}")
    elif steps is not None and (total := warmup + (config.schedule.decay_steps or 0)) > steps:
        yield Problem(
            "schedule.decay_steps", f"warmup_steps + decay_steps = {total}, must be at most train.max_steps = {steps}"
        )


def _check_sources(config: Config) -> Iterator[Problem]:
    data = config.data
    if not data.train and data.synthetic is None:
        message = "is empty; give [{path: PREFIX}] written by tools/tokenize_corpus.py, or set data.synthetic.kind"
        yield Problem("data.train", message)
    if data.train and data.synthetic is not None:
        yield Problem("data.synthetic", "excludes data.train; keep one of them (data.synthetic: null turns it off)")


def _check_vocabulary(config: Config) -> Iterator[Problem]:
    if config.model.vocab_size is None and config.tokenizer.path is None:
        yield Problem("model.vocab_size", "is null and so is tokenizer.path; set one of them")


def _check_engine(config: Config) -> Iterator[Problem]:
    yield from engine_settings.check_options(config.engine)


def _check_log(config: Config) -> Iterator[Problem]:
    yield from log_settings.check(config.log)


def _check_optimizer(config: Config) -> Iterator[Problem]:
    if config.optimizer.name not in engine_settings.OPTIMIZERS_OF[config.engine.name]:
        message = (
            f"is {config.optimizer.name}, which engine.name {config.engine.name} cannot run: DeepSpeed would clip the "
            "orthogonalized update, not the gradient, and report its norm; use engine.name ddp or fsdp2, or adamw"
        )
        yield Problem("optimizer.name", message)


def _check_prompts(config: Config) -> Iterator[Problem]:
    if config.evaluate.sample_prompts:
        if config.tokenizer.path is None:
            yield Problem("evaluate.sample_prompts", "needs tokenizer.path, which is null")
        if not (config.data.valid or config.data.synthetic):
            yield Problem("evaluate.sample_prompts", "needs validations, and data.valid is empty")


def _check_tasks(config: Config) -> Iterator[Problem]:
    evaluate = config.evaluate
    if evaluate.tasks and config.tokenizer.path is None:
        yield Problem("evaluate.tasks", "needs tokenizer.path, which is null: tasks are text")
    for key in ("tasks_every_steps", "task_items"):
        if getattr(evaluate, key) is not None and not evaluate.tasks:
            yield Problem(
                f"evaluate.{key}", "is set, but evaluate.tasks is empty; name the files of the tasks, or set it to null"
            )


def _check_ranks(config: Config, world_size: int | None) -> Iterator[Problem]:
    wanted = config.engine.world_size
    if None not in (wanted, world_size) and wanted != world_size:
        message = (
            f"requires {wanted} processes, but {world_size} run; start {wanted} (on CPUs: accelerate launch --config_file "
            f"launch/accelerate/cpu.yaml --num_processes {wanted}), or set it to null"
        )
        yield Problem("engine.world_size", message)


def _check_stages(config: Config, world_size: int | None) -> Iterator[Problem]:
    if not isinstance(config, schema.Partial):
        yield from stages.check(config, lambda each: validate(each, world_size))


def _check_mesh(config: Config, world_size: int | None) -> Iterator[Problem]:
    if not isinstance(config.engine, schema.Partial) and not isinstance(config.model, schema.Partial):
        yield from engine_settings.check_mesh(config.engine, work_of(config, config.model), world_size)


_CHECKS = (_check_names, _check_budget, _check_mirror, _check_positions, _check_length, _check_schedule, _check_sources,
           _check_vocabulary, _check_engine, _check_log, _check_optimizer, _check_prompts,
           _check_tasks)  # fmt: skip
_CHECKS_OF_RANKS = (_check_ranks, _check_mesh, _check_stages)


def _check_pretrained(model: ModelConfig, pretrained: ModelConfig) -> list[Problem]:
    vocab_size = model.vocab_size or pretrained.vocab_size
    resolved = resolve_model(model, vocab_size=vocab_size, sequence_length=pretrained.max_position_embeddings)
    return [
        Problem(f"model.{key}", f"is {new}, but {model.from_pretrained} has {old}; leave it out, or use another folder")
        for key, old, new in differences(pretrained, resolved)
    ]


# ---------------------------------------------------------------- what a resumed run may change


@functools.cache
def resume_class(key: str) -> str:
    """frozen, guarded or free; for a key that this version does not know, the class of its section."""
    classes = {field.name: field.metadata["resume"] for field in dataclasses.fields(Config)}
    classes |= {setting.key: setting.resume for setting in schema.walk(Config)}
    parts = key.split(".")
    known = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((classes[each] for each in known if each in classes), "frozen")


def check_resume(old: dict, new: dict, allow_changes: list[str], origin: str) -> list[Problem]:
    """Problems of resuming with settings `new` from a checkpoint written with `old` (both from `schema.to_dict`). A key that
    the version of the checkpoint did not know had its default."""
    before, after = schema.flatten(schema.to_dict(Config())) | schema.flatten(old), schema.flatten(new)
    problems = []
    for key in sorted(before.keys() | after.keys()):
        change = " -> ".join(shown(_given(each.get(key))) for each in (before, after))
        if before.get(key) == after.get(key) or resume_class(key) == "free":
            continue
        if resume_class(key) == "frozen":
            problems.append(Problem(key, f"{change} makes another run; use another run.name, or the old value", origin))
        elif key not in allow_changes:
            advice = f"confirm with --checkpoint.allow_changes [{key}], or use the old value"
            problems.append(Problem(key, f"{change} changes the training dynamics; {advice}", origin))
    return problems


def _given(value: Any) -> Any:
    """A value whose lists of sections have no null keys, as people write them."""
    if isinstance(value, list):
        return [_given(each) for each in value]
    return {key: _given(each) for key, each in value.items() if each is not None} if isinstance(value, dict) else value


def work_of(config: Config, model: ModelConfig) -> Work:
    """What the engine distributes. model: that of `config`, resolved or not."""
    batch = config.batch
    return Work(model, config.data.sequence_length, batch.global_batch_size, batch.micro_batch_size)


def accumulation(batch: BatchConfig, sample_ranks: int) -> int:
    """Micro-batches per step and rank. sample_ranks: `engines.config.sample_ranks`."""
    return batch.global_batch_size // (batch.micro_batch_size * sample_ranks)


def batch_product(config: Config, ranks: int) -> str:
    """The global batch in words, such as `16 sequences per step = ranks 2 x micro-batch 4 x accumulation 2`."""
    batch, groups = config.batch, engine_settings.sample_ranks(config.engine, ranks)
    who = f"ranks {ranks}" if groups == ranks else f"groups {groups} (of {ranks // groups} ranks)"
    product = f"{who} x micro-batch {batch.micro_batch_size} x accumulation {accumulation(batch, groups)}"
    return f"{batch.global_batch_size} sequences per step = {product}"
