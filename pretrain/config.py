"""All settings of a run. `Config` is the table of contents; every key has its unit and its "off" value beside it.

Defaults < YAML files in their order < `--section.key value` flags. `load(argv)` returns a checked `Config` or raises
`ConfigError` with *every* problem at once. Nothing here imports torch: a wrong file costs no GPU time.
Each part of the project takes its own section (`ModelConfig`), never the whole `Config`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from pretrain import schema
from pretrain.schema import ConfigError, Problem


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives."""

    name: str = "run"
    """Name of the run; its files go to <directory>/<name>."""
    directory: str = "runs"
    """Folder that holds all runs."""
    seed: int = 1234
    """Keys the initial weights, the data order and the synthetic data."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A dense decoder of the Llama family (with qk_norm: Qwen3). Names are those of Hugging Face configurations."""

    hidden_size: int = 512
    """Width D of the residual stream."""
    num_hidden_layers: int = 8
    """Number of decoder blocks."""
    num_attention_heads: int = 8
    """Query heads H."""
    num_key_value_heads: int | None = None
    """Key and value heads K; null: as many as num_attention_heads (no grouping)."""
    head_dim: int | None = None
    """Size of one head; null: hidden_size / num_attention_heads. Must be even (rotary pairs)."""
    intermediate_size: int | None = None
    """Width of the SwiGLU feed-forward; null: 8/3 of hidden_size, rounded up to a multiple of 64."""
    vocab_size: int | None = None
    """Number of token ids V; null: taken from the tokenizer."""
    vocab_multiple: int = 64
    """Embedding rows are padded up to a multiple of this; padded ids never enter the loss. 1: no padding."""
    max_position_embeddings: int | None = None
    """Longest context, recorded for converters; null: data.sequence_length."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    rms_norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, per head (Qwen3)."""
    tie_word_embeddings: bool = False
    """One matrix for the input embedding and the head."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer that made the data; used for vocabulary, checks and samples."""

    path: str | None = None
    """Folder written by tools/train_tokenizer.py, or of a Hugging Face tokenizer; null: none (then model.vocab_size is needed)."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One tokenized dataset."""

    path: str
    """Prefix of a .bin/.idx pair, or a nanoGPT-style flat .bin file."""
    weight: float = 1.0
    """Share of the blend relative to the other sources; > 0. Ignored for validation."""


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Generated tokens instead of files: for tests, dry runs and lessons."""

    kind: Literal["uniform", "unigram", "markov", "repeat", "copy"] = "uniform"
    """uniform: labels carry no information; unigram: Zipf, no context; markov: one token of context; repeat: a few fixed texts; copy: second half repeats the first."""
    num_samples: int = 1_000_000
    """Samples in one epoch; validation draws others."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, in which windows."""

    train: list[SourceConfig] = field(default_factory=list)
    """Training sources: [{path, weight}]."""
    valid: list[SourceConfig] = field(default_factory=list)
    """Validation sources: [{path}]; empty: no validation."""
    synthetic: SyntheticConfig | None = None
    """Generated data instead of train and valid; null: off."""
    sequence_length: int = 1024
    """Tokens T that a sample feeds to the model; a sample is T + 1 tokens."""
    document_mask: bool = False
    """Tokens attend only inside their document."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The batch in sequences. Accumulation is derived (global / (micro * ranks)), printed, and never written."""

    global_batch_size: int = 32
    """Sequences per step, over all ranks and micro-batches."""
    micro_batch_size: int = 8
    """Sequences in one forward on one rank."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Decay on matrices only; vectors (norms) and embeddings are not decayed."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon for the matrices of the blocks, with adamw for embeddings, head and vectors."""
    lr: float = 3e-4
    """Peak learning rate. Muon's updates are as large as AdamW's, so both take the same."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the first and second moment."""
    eps: float = 1e-8
    """AdamW adds it to the root of the second moment."""
    momentum: float = 0.95
    """Muon's decay of the momentum; adamw ignores it."""
    weight_decay: float = 0.1
    """Decoupled decay per unit of learning rate. 0: off."""
    grad_clip: float = 1.0
    """Largest global norm of the full gradient. 0: off."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate as a pure function of the step."""

    name: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """cosine; wsd (warm up, stay, decay at the end); linear; constant."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0. 0: off."""
    decay_steps: int | None = None
    """Length of the decay; null: all steps after warm-up (wsd: 40 % of all steps)."""
    final_lr_fraction: float = 0.1
    """Learning rate at the last step as a fraction of the peak."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long. Exactly one of max_steps, max_tokens, epochs."""

    max_steps: int | None = None
    """Optimizer steps."""
    max_tokens: int | None = None
    """Tokens fed (rounded up to whole steps)."""
    epochs: float | None = None
    """Passes over all training sources together."""
    max_skipped_steps: int = 10
    """Non-finite steps in a row after which the run stops."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the model is spread over processes, and what is traded for memory. docs/engines.md compares the engines."""

    name: Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"] = "ddp"
    """ddp: every rank holds all; zero1, zero2, zero3 (DeepSpeed): ranks share optimizer state, and gradients, and weights;
    fsdp2 (PyTorch): as zero3."""
    precision: Literal["fp32", "bf16"] | None = None
    """bf16: bf16 compute; master weights, summed gradients and moments fp32. null: bf16 on GPUs, fp32 on CPUs. (fp16 needs
    loss scaling and skips steps: refused.)"""
    compile: Literal["none", "blocks", "model"] = "none"
    """torch.compile: blocks compiles one block and uses it for all; model the whole. The first step takes longer. none: off."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """full: keep only the inputs of blocks, run each block twice (a third more FLOPs); selective: keep the matrix products too.
    none: off."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """optimizer (zero1, zero2, zero3): optimizer state lives and is updated on the host; all (zero3): weights too. none: off."""
    replicas: int = 1
    """fsdp2: copies of the sharded model; one per node keeps the gathering of weights inside nodes. 1: off."""
    reduce_gradients: Literal["step", "micro_batch"] | None = None
    """step: once, so each rank holds whole fp32 gradients between micro-batches; micro_batch: each time, holding only its share.
    null: micro_batch for zero2, zero3, fsdp2; step for ddp, zero1."""
    bucket_mib: int | None = None
    """ddp, zero1, zero2, zero3: MiB of gradients sent at once. null: 25 for ddp, 200 for the others."""
    keep_whole_below: int = 100_000
    """zero3: parameters with fewer elements stay whole on every rank."""
    world_size: int | None = None
    """Number of processes that must be running, or the run stops; null: any."""
    timeout_seconds: float = 600.0
    """How long a collective may take."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Validation over a fixed set, the same number on any number of ranks."""

    every_steps: int = 0
    """Steps between validations; there is one at the end anyway. 0: only at the end."""
    max_batches: int | None = None
    """At most this many global batches, spread evenly over the set; null: the whole set."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, what to keep, where to go on."""

    every_steps: int = 0
    """Steps between checkpoints; there is one at the end anyway. 0: only at the end."""
    every_minutes: float = 0
    """Minutes between checkpoints. 0: off."""
    keep_last: int = 2
    """Newest checkpoints kept; at least 1."""
    keep_best: int = 1
    """Checkpoints kept with the lowest validation loss. 0: off."""
    asynchronous: bool = True
    """Write in the background; costs the host one copy of each rank's share of the state. false: the run waits for the disk."""
    deadline_seconds: float = 25.0
    """From SIGTERM to a durable checkpoint; a rank that has none by then leaves, because a peer is gone. Launchers kill after 30."""
    resume: str = "auto"
    """auto: the newest valid checkpoint of this run, else a fresh start; never: refuse a directory that has some; or the path of a checkpoint."""
    allow_changes: list[str] = field(default_factory=list)
    """Guarded keys that may differ from the checkpoint's, e.g. [train.max_steps, optimizer.lr]; empty: none."""


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases; the key comes from WANDB_API_KEY or `wandb login`, never from here."""

    project: str = "pretrain"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null: your default."""
    mode: Literal["online", "offline"] = "online"
    """offline: files only, for `wandb sync` later."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is reported, and where to. metrics.jsonl is the truth, the others are copies."""

    every_steps: int = 10
    """Steps between logging lines."""
    sinks: list[Literal["console", "jsonl", "wandb", "tensorboard"]] = field(default_factory=lambda: ["console", "jsonl"])
    """Any of console, jsonl, wandb, tensorboard."""
    peak_tflops: float | None = None
    """Peak of the device for MFU, in TFLOP/s; null: from a table of GPUs (unknown device: no MFU)."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases settings."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


# ---------------------------------------------------------------- reading and checking

USAGE = """usage: {program} --config FILE [--config FILE ...] [--section.key value ...]

  --config FILE        YAML settings; a later file overrides an earlier one, flags override files
  --section.key value  one setting, e.g. --optimizer.lr 3e-4 --data.train '[{{path: data/wiki_train}}]'
  --print_config       print the settings in full and exit
  --help               print this and exit

settings, with their defaults:
{keys}"""


def load(argv: list[str], *, world_size: int | None = 1, program: str = "launch/pretrain.py") -> Config:
    """Settings from the command line `argv` (without the program's name), checked for `world_size` ranks (None: any).

    Raises ConfigError with all problems. `--help` and `--print_config` print and raise SystemExit(0).
    """
    problems: list[Problem] = []
    paths, flags, switches = _split_arguments(argv, problems)
    if "help" in switches:
        keys = "\n".join(f"  --{key} ({_shown(default)})\n        {doc}" for key, default, doc in schema.walk(Config))
        print(USAGE.format(program=program, keys=keys))
        raise SystemExit(0)
    config = schema.build(Config, schema.read_layers(paths, flags, problems), problems)
    sections = {problem.key.split(".")[0] for problem in problems}  # a wrong value was replaced by its default there
    problems += [problem for problem in validate(config, world_size) if problem.key.split(".")[0] not in sections]
    if problems:
        raise ConfigError(problems)
    if "print_config" in switches:
        print(schema.to_yaml(config), end="")
        raise SystemExit(0)
    return config


def _shown(default: object) -> str:
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def _split_arguments(argv: list[str], problems: list[Problem]) -> tuple[list[str], dict[str, str], set[str]]:
    """-> (--config files, {dotted key: text}, switches)."""
    paths: list[str] = []
    flags: dict[str, str] = {}
    switches: set[str] = set()
    words = iter(argv)
    for word in words:
        name, equals, text = word.lstrip("-").partition("=")
        if word in ("-h", "--help", "--print_config"):
            switches.add("help" if word != "--print_config" else "print_config")
        elif not word.startswith("--"):
            problems.append(Problem(word, "is not a flag; settings are given as --section.key value"))
        elif (value := text if equals else next(words, None)) is None:
            problems.append(Problem(word, "needs a value"))
        elif name == "config":
            paths.append(value)
        else:
            flags[name] = value
    return paths, flags, switches


def validate(config: Config, world_size: int | None = 1) -> list[Problem]:
    """Combinations that cannot work, for `world_size` ranks (None: any). Every check that needs no file and no tensor is here."""
    problems = [*_check_ranges(config), *_check_model(config.model), *_check_length_of_run(config)]
    problems += _check_engine(config.engine, world_size) + _check_optimizer(config)
    return problems if world_size is None else problems + _check_batch(config, world_size)


_AT_LEAST = {
    0: "schedule.warmup_steps evaluate.every_steps checkpoint.every_steps checkpoint.every_minutes checkpoint.keep_best "
    "optimizer.weight_decay optimizer.grad_clip run.seed engine.keep_whole_below",
    1: "model.hidden_size model.num_hidden_layers model.num_attention_heads model.num_key_value_heads model.head_dim model.intermediate_size "
    "model.vocab_multiple model.max_position_embeddings data.sequence_length data.synthetic.num_samples batch.global_batch_size "
    "batch.micro_batch_size schedule.decay_steps train.max_steps train.max_tokens train.max_skipped_steps engine.world_size engine.replicas engine.bucket_mib "
    "evaluate.max_batches checkpoint.keep_last log.every_steps",
    2: "model.vocab_size",
}
_POSITIVE = "optimizer.lr optimizer.eps model.rope_theta model.rms_norm_eps train.epochs engine.timeout_seconds log.peak_tflops checkpoint.deadline_seconds"


def _check_ranges(config: Config) -> list[Problem]:
    values = schema.flatten(schema.to_dict(config))
    problems = [
        Problem(key, f"got {values[key]}, must be at least {least}")
        for least, keys in _AT_LEAST.items()
        for key in keys.split()
        if values.get(key) is not None and values[key] < least
    ]
    problems += [
        Problem(key, f"got {values[key]}, must be greater than 0")
        for key in _POSITIVE.split()
        if values[key] is not None and values[key] <= 0
    ]
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        problems.append(Problem("optimizer.betas", f"got {list(config.optimizer.betas)}, both must be in [0, 1)"))
    if not 0 <= config.optimizer.momentum < 1:
        problems.append(Problem("optimizer.momentum", f"got {config.optimizer.momentum}, must be in [0, 1)"))
    if not 0 <= config.schedule.final_lr_fraction <= 1:
        problems.append(Problem("schedule.final_lr_fraction", f"got {config.schedule.final_lr_fraction}, must be in [0, 1]"))
    if any(part in ("", ".", "..") for part in config.run.name.split("/")) or "\n" in config.run.name or len(config.run.name) > 200:
        problems.append(Problem("run.name", f"got {config.run.name!r}, must be a plain folder name below run.directory"))
    return problems


def _check_model(model: ModelConfig) -> list[Problem]:
    problems = []
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads or model.num_attention_heads
    if min(heads, kv_heads, model.hidden_size) < 1:
        return problems  # already reported
    if heads % kv_heads:
        problems.append(Problem("model.num_key_value_heads", f"got {kv_heads}, must divide num_attention_heads = {heads}"))
    if model.head_dim is None and model.hidden_size % heads:
        problems.append(Problem("model.num_attention_heads", f"got {heads}, must divide hidden_size = {model.hidden_size}, or set model.head_dim"))
    elif (model.head_dim or model.hidden_size // heads) % 2:
        problems.append(Problem("model.head_dim", f"is {model.head_dim or model.hidden_size // heads}, must be even: rotary embedding turns pairs"))
    return problems


def _check_length_of_run(config: Config) -> list[Problem]:
    problems = []
    limits = {f"train.{k}": getattr(config.train, k) for k in ("max_steps", "max_tokens", "epochs")}
    given = [key for key, value in limits.items() if value is not None]
    if len(given) != 1:
        problems.append(Problem("train", f"set exactly one of {', '.join(limits)}; set are: {', '.join(given) or 'none'}"))
    if not config.data.train and config.data.synthetic is None:
        problems.append(Problem("data.train", "is empty; give [{path: PREFIX}] made by tools/tokenize_corpus.py, or set data.synthetic.kind"))
    if config.data.train and config.data.synthetic is not None:
        problems.append(Problem("data.synthetic", "is set beside data.train; keep one (data.synthetic: null turns it off)"))
    if config.model.vocab_size is None and config.tokenizer.path is None:
        problems.append(Problem("model.vocab_size", "is null and so is tokenizer.path; set one of them"))
    steps = config.train.max_steps
    if steps is not None and config.schedule.warmup_steps > steps:
        problems.append(Problem("schedule.warmup_steps", f"got {config.schedule.warmup_steps}, more than train.max_steps = {steps}"))
    elif steps is not None and (total := config.schedule.warmup_steps + (config.schedule.decay_steps or 0)) > steps:
        problems.append(Problem("schedule.decay_steps", f"warmup_steps + decay_steps = {total}, more than train.max_steps = {steps}"))
    return problems


def _check_engine(engine: EngineConfig, world_size: int | None) -> list[Problem]:
    """A lever that the chosen engine does not have is refused, never ignored."""
    problems = []
    allowed = {
        "offload": {"optimizer": ("zero1", "zero2", "zero3"), "all": ("zero3",)},
        "reduce_gradients": {"micro_batch": ("zero2", "zero3", "fsdp2")},
    }
    for key, values in allowed.items():
        value = getattr(engine, key)
        if engine.name not in (names := values.get(value, (engine.name,))):
            problems.append(Problem(f"engine.{key}", f"got {value}, which only {', '.join(names)} can do; engine.name is {engine.name}"))
    if engine.bucket_mib is not None and engine.name == "fsdp2":
        problems.append(Problem("engine.bucket_mib", "has no meaning for fsdp2, which sends the gradients of a block at once; use null"))
    if engine.replicas != 1 and engine.name != "fsdp2":
        problems.append(Problem("engine.replicas", f"got {engine.replicas}, which only fsdp2 can do; engine.name is {engine.name}"))
    elif world_size is not None and engine.replicas >= 1 and world_size % engine.replicas:
        problems.append(Problem("engine.replicas", f"got {engine.replicas}, must divide the number of processes, {world_size}"))
    return problems


def _check_optimizer(config: Config) -> list[Problem]:
    if config.optimizer.name == "muon" and config.engine.name.startswith("zero"):
        return [
            Problem("optimizer.name", f"is muon, which engine.name {config.engine.name} cannot run: DeepSpeed clips, and reports the norm of, the "
                    "orthogonalised update in place of the gradient; use engine.name ddp or fsdp2, or optimizer.name adamw")
        ]  # fmt: skip
    return []


def _check_batch(config: Config, world_size: int) -> list[Problem]:
    """Every rank runs the same number of whole micro-batches in every step: no remainder can exist."""
    batch, asked = config.batch, config.engine.world_size
    problems = []
    if asked is not None and asked != world_size:
        problems.append(
            Problem("engine.world_size", f"asks for {asked} processes, but {world_size} run; start {asked} (on CPUs: accelerate launch "
                    f"--config_file launch/accelerate/cpu.yaml --num_processes {asked}), or set engine.world_size to null")
        )  # fmt: skip
    if min(batch.micro_batch_size, batch.global_batch_size) >= 1 and batch.global_batch_size % (batch.micro_batch_size * world_size):
        product = batch.micro_batch_size * world_size
        near = max(product, round(batch.global_batch_size / product) * product)
        problems.append(
            Problem("batch.global_batch_size", f"got {batch.global_batch_size}, must be a multiple of micro_batch_size x ranks = "
                    f"{batch.micro_batch_size} x {world_size} = {product}; the nearest is {near}")
        )  # fmt: skip
    return problems


def accumulation(batch: BatchConfig, world_size: int) -> int:
    """Micro-batches per step and rank."""
    return batch.global_batch_size // (batch.micro_batch_size * world_size)


def resolve_model(model: ModelConfig, *, vocab_size: int, sequence_length: int) -> ModelConfig:
    """`model` with every null replaced by its value."""
    heads = model.num_attention_heads
    return dataclasses.replace(
        model,
        num_key_value_heads=model.num_key_value_heads or heads,
        head_dim=model.head_dim or model.hidden_size // heads,
        intermediate_size=model.intermediate_size or 64 * math.ceil(model.hidden_size * 8 / 3 / 64),
        vocab_size=vocab_size,
        max_position_embeddings=model.max_position_embeddings or sequence_length,
    )


# ---------------------------------------------------------------- what may change when a run goes on

FROZEN = ("model", "tokenizer", "data", "run.seed", "optimizer.name")
"""Changing these makes another run: refused."""
GUARDED = ("optimizer", "schedule", "train", "batch.global_batch_size", "engine.precision")
"""Changing these bends the curve: only with checkpoint.allow_changes."""
FREE = ("run", "tokenizer.path", "data.train", "data.valid", "batch.micro_batch_size", "engine", "evaluate", "checkpoint", "log", "train.max_skipped_steps")
"""May change. Data files may move: their content is held by the fingerprint of the data."""


def resume_class(key: str) -> str:
    """frozen, guarded or free: by the longest of the prefixes above that `key` lies under."""
    classes = {**dict.fromkeys(FROZEN, "frozen"), **dict.fromkeys(GUARDED, "guarded"), **dict.fromkeys(FREE, "free")}
    prefix = max((p for p in classes if key == p or key.startswith(p + ".")), key=len)
    return classes[prefix]


def check_resume(old: dict, new: dict, allow_changes: list[str], origin: str) -> list[Problem]:
    """Problems of going on with settings `new` from a checkpoint made with `old` (both from `schema.to_dict`)."""
    before, after = schema.flatten(old), schema.flatten(new)
    problems = []
    for key in sorted(before.keys() | after.keys()):
        change = f"{_shown(before.get(key))} -> {_shown(after.get(key))}"
        if before.get(key) == after.get(key) or resume_class(key) == "free":
            continue
        if resume_class(key) == "frozen":
            problems.append(Problem(key, f"{change} makes another run; use another run.name, or the old value", origin))
        elif key not in allow_changes:
            problems.append(Problem(key, f"{change} bends the curve; confirm with --checkpoint.allow_changes [{key}], or use the old value", origin))
    return problems
