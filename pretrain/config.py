"""All settings of a run. `Config` is the table of contents; every key has its unit and its "off" value beside it.

Defaults < YAML files in their order < `--section.key value` flags. `load(argv)` returns a checked `Config` or raises
`ConfigError` with *every* problem at once. Nothing here imports torch: a wrong file costs no GPU time.
Each part of the project takes its own section (`ModelConfig`), never the whole `Config`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from pretrain import schema
from pretrain.model import hf_mapping
from pretrain.model.config import ModelConfig, differences, model_from_dict, resolve_model
from pretrain.rules import validate
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
class TokenizerConfig:
    """The tokenizer that made the data; used for vocabulary, checks and samples."""

    path: str | None = None
    """Folder written by tools/train_tokenizer.py, or of a Hugging Face tokenizer; null: none (then model.vocab_size is
    needed)."""


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
    """uniform: labels carry no information; unigram: Zipf, no context; markov: one token of context; repeat: a few fixed
    texts; copy: second half repeats the first."""
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
    quarantine: str | None = None
    """File of training samples that are left out (pretrain/data/excluded.py has its format); null: none."""


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
    """Non-finite steps in a row after which the run has diverged."""
    on_divergence: Literal["stop", "rollback"] = "stop"
    """stop: end with status 70; rollback: go back to the last checkpoint and leave out those steps' samples, at most twice."""


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
    """torch.compile: blocks compiles one block and uses it for all; model (not zero3) the whole. The first step takes longer.
    none: off."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """full: keep only the inputs of blocks, run each block twice (a third more FLOPs); selective: keep the matrix
    products too. none: off."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """optimizer (zero1, zero2, zero3): optimizer state lives and is updated on the host; all (zero3): weights too. none:
    off."""
    replicas: int = 1
    """fsdp2: copies of the sharded model; one per node keeps the gathering of weights inside nodes. 1: off."""
    reduce_gradients: Literal["step", "micro_batch"] | None = None
    """step: once, each rank holding whole fp32 gradients between micro-batches; micro_batch: each time, holding only its share.
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
    sample_prompts: list[str] = field(default_factory=list)
    """Beginnings that the model continues after each validation (with tokenizer.path); empty: off."""
    sample_tokens: int = 40
    """Most tokens of each continuation; the likeliest one each time."""


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
    """From SIGTERM to a durable checkpoint; a rank that has none by then leaves, because a peer is gone. Launchers kill
    after 30."""
    resume: str = "auto"
    """auto: the newest valid checkpoint of this run, else a fresh start; never: refuse a directory that has some; or the
    path of a checkpoint, of this run (it goes back there) or of another (it begins there); once it has saved since then, the
    same command goes on."""
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
        keys = "\n".join(f"  --{key} ({schema.shown(default)})\n        {doc}" for key, default, doc in schema.walk(Config))
        _show(USAGE.format(program=program, keys=keys) + "\n")
    tree = schema.read_layers(paths, flags, problems)
    unread = any(problem.key.startswith(tuple(paths)) for problem in problems)
    pretrained = _read_pretrained(tree, problems)
    config = schema.build(Config, tree, problems)
    if pretrained and not problems:
        problems += _check_pretrained(config.model, pretrained)
    sections = {problem.key.split(".")[0] for problem in problems}  # a wrong value was replaced by its default there
    found = [] if unread else validate(config, world_size)  # who knows what stands in a file that cannot be read
    problems += [problem for problem in found if problem.key.split(".")[0] not in sections]
    if problems:
        raise ConfigError(problems)
    if "print_config" in switches:
        _show(schema.to_yaml(config))
    return config


def _show(text: str) -> NoReturn:
    """To standard output, and the end. A reader that has seen enough (`--help | head`) is no failure."""
    sys.stdout.reconfigure(encoding="utf-8")  # YAML's, whatever the locale can write
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def _read_pretrained(tree: dict[str, Any], problems: list[Problem]) -> ModelConfig | None:
    """The model in the folder that `model.from_pretrained` names, whose settings go below those in `tree`."""
    given = tree.get("model")
    path = given.get("from_pretrained") if isinstance(given, dict) else None
    if not isinstance(path, schema.Scalar) or path.text in ("", "null", "~"):
        return None
    try:
        found = hf_mapping.architecture(Path(path.text))
    except hf_mapping.UnsupportedModel as error:
        if "hidden_size" not in given:  # a run's own config.yaml says it all: it can be read when that folder is gone
            problems.append(Problem("model.from_pretrained", str(error), path.origin))
        return None
    tree["model"] = schema.over(schema.nodes(found, path.text), given)
    return model_from_dict(found)


def _check_pretrained(model: ModelConfig, pretrained: ModelConfig) -> list[Problem]:
    vocab_size = model.vocab_size or pretrained.vocab_size
    resolved = resolve_model(model, vocab_size=vocab_size, sequence_length=pretrained.max_position_embeddings)
    return [
        Problem(f"model.{key}", f"is {new}, but {model.from_pretrained} has {old}; leave it out, or use another folder")
        for key, old, new in differences(pretrained, resolved)
    ]


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


def accumulation(batch: BatchConfig, world_size: int) -> int:
    """Micro-batches per step and rank."""
    return batch.global_batch_size // (batch.micro_batch_size * world_size)
