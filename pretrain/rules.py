"""Which settings can work together, and which may change when a run goes on. Knows no file, no flag and no tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain import schema
from pretrain.schema import Problem, shown

if TYPE_CHECKING:
    from pretrain.config import Config, EngineConfig
    from pretrain.model.config import ModelConfig, MoeConfig, RopeScalingConfig


def validate(config: Config, world_size: int | None = 1) -> list[Problem]:
    """Combinations that cannot work, for `world_size` ranks (None: any). Every check that needs no file and no tensor is
    here."""
    problems = [*_check_ranges(config), *_check_model(config.model), *_check_length_of_run(config)]
    problems += _check_engine(config.engine, world_size) + _check_optimizer(config) + _check_experts(config, world_size)
    problems += _check_sample_prompts(config)
    return problems if world_size is None else problems + _check_batch(config, world_size)


_AT_LEAST = {
    0: """
        schedule.warmup_steps evaluate.every_steps checkpoint.every_steps checkpoint.every_minutes
        checkpoint.keep_best optimizer.weight_decay optimizer.grad_clip run.seed engine.keep_whole_below
        model.moe.num_shared_experts model.moe.aux_loss_weight model.moe.z_loss_weight model.moe.bias_update_rate""",
    1: """
        model.hidden_size model.num_hidden_layers model.num_attention_heads model.num_key_value_heads model.head_dim
        model.intermediate_size model.vocab_multiple model.max_position_embeddings data.sequence_length
        data.synthetic.num_samples batch.global_batch_size batch.micro_batch_size schedule.decay_steps train.max_steps
        train.max_tokens train.max_skipped_steps engine.world_size engine.replicas engine.bucket_mib
        evaluate.max_batches evaluate.sample_tokens checkpoint.keep_last log.every_steps
        model.sliding_window model.rope_scaling.factor
        model.rope_scaling.original_max_position_embeddings model.moe.num_experts_per_tok model.moe.moe_intermediate_size""",
    2: "model.vocab_size model.moe.num_experts",
}
_POSITIVE = """
    optimizer.lr optimizer.eps model.rope_theta model.rms_norm_eps train.epochs engine.timeout_seconds
    log.peak_tflops checkpoint.deadline_seconds model.rope_scaling.low_freq_factor model.moe.routed_scaling_factor"""


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
        if values.get(key) is not None and values[key] <= 0
    ]
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        problems.append(Problem("optimizer.betas", f"got {list(config.optimizer.betas)}, both must be in [0, 1)"))
    if not 0 <= config.optimizer.momentum < 1:
        problems.append(Problem("optimizer.momentum", f"got {config.optimizer.momentum}, must be in [0, 1)"))
    if not 0 <= config.schedule.final_lr_fraction <= 1:
        problems.append(Problem("schedule.final_lr_fraction", f"got {config.schedule.final_lr_fraction}, must be in [0, 1]"))
    if any(part in ("", ".", "..") for part in config.run.name.split("/")) or len(config.run.name) > 200:
        problems.append(Problem("run.name", f"got {config.run.name!r}, must be a plain folder name below run.directory"))
    for key, path in (("run.name", config.run.name), ("run.directory", config.run.directory)):
        if not path.isprintable():
            problems.append(
                Problem(key, f"got {path!r}, which has characters that no terminal or file of this locale can show")
            )
    if config.run.directory.startswith("~"):
        problems.append(Problem("run.directory", f"got {config.run.directory}; only a shell knows ~, write the path in full"))
    return problems


def _check_model(model: ModelConfig) -> list[Problem]:
    problems = []
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads or model.num_attention_heads
    if min(heads, kv_heads, model.hidden_size) < 1:
        return problems  # already reported
    if heads % kv_heads:
        problems.append(Problem("model.num_key_value_heads", f"got {kv_heads}, must divide num_attention_heads = {heads}"))
    if model.head_dim is None and model.hidden_size % heads:
        problems.append(
            Problem(
                "model.num_attention_heads",
                f"got {heads}, must divide hidden_size = {model.hidden_size}, or set model.head_dim",
            )
        )
    elif (model.head_dim or model.hidden_size // heads) % 2:
        problems.append(
            Problem(
                "model.head_dim",
                f"is {model.head_dim or model.hidden_size // heads}, must be even: rotary embedding turns pairs",
            )
        )
    problems += _check_rope_scaling(model.rope_scaling) if model.rope_scaling else []
    return problems + (_check_moe(model.moe) if model.moe else [])


def _check_rope_scaling(scaling: RopeScalingConfig) -> list[Problem]:
    names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    given = [name for name in names if getattr(scaling, name) is not None]
    if scaling.kind == "linear":
        return [Problem(f"model.rope_scaling.{name}", "has no meaning for kind linear; leave it out") for name in given]
    if missing := [name for name in names if name not in given]:
        return [Problem(f"model.rope_scaling.{name}", "is needed for kind llama3") for name in missing]
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return [] if low < high else [
        Problem("model.rope_scaling.high_freq_factor", f"got {high}, must be more than low_freq_factor = {low}")
    ]  # fmt: skip


def _check_moe(moe: MoeConfig) -> list[Problem]:
    problems = []
    chosen = moe.num_experts_per_tok
    if chosen > moe.num_experts:
        problems.append(Problem("model.moe.num_experts_per_tok", f"got {chosen}, more than num_experts = {moe.num_experts}"))
    if chosen == 1 and moe.norm_topk_prob:
        problems.append(
            Problem("model.moe.norm_topk_prob", "is true with one expert per token, whose weight would always be 1: the router "
                    "would learn nothing from the loss; set it to false, or num_experts_per_tok to 2 or more")
        )  # fmt: skip
    if moe.bias_update_rate > 0 and moe.score != "sigmoid":
        problems.append(
            Problem("model.moe.bias_update_rate", f"got {moe.bias_update_rate}, which only score sigmoid can do; set it to 0, "
                    "or model.moe.score to sigmoid")
        )  # fmt: skip
    return problems


def _check_length_of_run(config: Config) -> list[Problem]:
    problems = []
    limits = {f"train.{k}": getattr(config.train, k) for k in ("max_steps", "max_tokens", "epochs")}
    given = [key for key, value in limits.items() if value is not None]
    if len(given) != 1:
        problems.append(Problem("train", f"set exactly one of {', '.join(limits)}; set are: {', '.join(given) or 'none'}"))
    if not config.data.train and config.data.synthetic is None:
        problems.append(
            Problem(
                "data.train", "is empty; give [{path: PREFIX}] made by tools/tokenize_corpus.py, or set data.synthetic.kind"
            )
        )
    if config.data.train and config.data.synthetic is not None:
        problems.append(Problem("data.synthetic", "is set beside data.train; keep one (data.synthetic: null turns it off)"))
    if config.model.vocab_size is None and config.tokenizer.path is None:
        problems.append(Problem("model.vocab_size", "is null and so is tokenizer.path; set one of them"))
    steps = config.train.max_steps
    if steps is not None and config.schedule.warmup_steps > steps:
        problems.append(
            Problem("schedule.warmup_steps", f"got {config.schedule.warmup_steps}, more than train.max_steps = {steps}")
        )
    elif steps is not None and (total := config.schedule.warmup_steps + (config.schedule.decay_steps or 0)) > steps:
        problems.append(
            Problem("schedule.decay_steps", f"warmup_steps + decay_steps = {total}, more than train.max_steps = {steps}")
        )
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
            problems.append(
                Problem(f"engine.{key}", f"got {value}, which only {', '.join(names)} can do; engine.name is {engine.name}")
            )
    if engine.name == "zero3" and engine.compile == "model":
        problems.append(Problem("engine.compile", "got model, which zero3's hooks would cut into many graphs; use blocks"))
    if engine.bucket_mib is not None and engine.name == "fsdp2":
        problems.append(
            Problem("engine.bucket_mib", "has no meaning for fsdp2, which sends the gradients of a block at once; use null")
        )
    if engine.replicas != 1 and engine.name != "fsdp2":
        problems.append(
            Problem("engine.replicas", f"got {engine.replicas}, which only fsdp2 can do; engine.name is {engine.name}")
        )
    elif world_size is not None and engine.replicas >= 1 and world_size % engine.replicas:
        problems.append(Problem("engine.replicas", f"got {engine.replicas}, must divide the number of processes, {world_size}"))
    return problems


def _check_optimizer(config: Config) -> list[Problem]:
    if config.optimizer.name == "muon" and config.engine.name.startswith("zero"):
        return [
            Problem("optimizer.name", f"is muon, which engine.name {config.engine.name} cannot run: DeepSpeed would clip the "
                    "orthogonalised update, not the gradient, and report its norm; use engine.name ddp or fsdp2, or adamw")
        ]  # fmt: skip
    return []


def _check_experts(config: Config, world_size: int | None) -> list[Problem]:
    moe, engine = config.model.moe, config.engine
    if not moe or engine.name != "fsdp2" or world_size is None:
        return []
    shards = world_size // max(1, engine.replicas)
    if shards > moe.num_experts:
        return [
            Problem("engine.name", f"is fsdp2, which would cut {moe.num_experts} experts, whole ones, over {shards} ranks: "
                    "some would hold none; use zero3, which cuts evenly, or engine.replicas so that at most "
                    f"{moe.num_experts} ranks share one copy of the weights")
        ]  # fmt: skip
    return []


def _check_sample_prompts(config: Config) -> list[Problem]:
    if not config.evaluate.sample_prompts:
        return []
    key, problems = "evaluate.sample_prompts", []
    if config.tokenizer.path is None:
        problems.append(Problem(key, "needs tokenizer.path, which is null"))
    if not (config.data.valid or config.data.synthetic):
        problems.append(Problem(key, "are continued after validations, and data.valid is empty"))
    return problems


def _check_batch(config: Config, world_size: int) -> list[Problem]:
    """Every rank runs the same number of whole micro-batches in every step: no remainder can exist."""
    batch, asked = config.batch, config.engine.world_size
    problems = []
    if asked is not None and asked != world_size:
        problems.append(
            Problem("engine.world_size", f"asks for {asked} processes, but {world_size} run; start {asked} (on CPUs: "
                    f"accelerate launch --config_file launch/accelerate/cpu.yaml --num_processes {asked}), or set it to null")
        )  # fmt: skip
    if min(batch.micro_batch_size, batch.global_batch_size) >= 1 and batch.global_batch_size % (
        batch.micro_batch_size * world_size
    ):
        product = batch.micro_batch_size * world_size
        near = max(product, round(batch.global_batch_size / product) * product)
        problems.append(
            Problem("batch.global_batch_size", f"got {batch.global_batch_size}, must be a multiple of micro_batch_size x "
                    f"ranks = {batch.micro_batch_size} x {world_size} = {product}; the nearest is {near}")
        )  # fmt: skip
    return problems


# ---------------------------------------------------------------- what may change when a run goes on

FROZEN = ("model", "tokenizer", "data", "run.seed", "optimizer.name")
"""Changing these makes another run: refused."""
GUARDED = (
    "optimizer",
    "schedule",
    "train",
    "batch.global_batch_size",
    "engine.precision",
    "model.moe.aux_loss_weight",
    "model.moe.z_loss_weight",
    "model.moe.bias_update_rate",
)
"""Changing these bends the curve: only with checkpoint.allow_changes."""
FREE = (
    "run",
    "model.from_pretrained",
    "tokenizer.path",
    "data.train",
    "data.valid",
    "data.quarantine",
    "batch.micro_batch_size",
    "engine",
    "evaluate",
    "checkpoint",
    "log",
    "train.max_skipped_steps",
    "train.on_divergence",
)
"""May change. Data files may move: their content is held by the fingerprint of the data, and by the list in quarantine."""


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
        change = f"{shown(before.get(key))} -> {shown(after.get(key))}"
        if before.get(key) == after.get(key) or resume_class(key) == "free":
            continue
        if resume_class(key) == "frozen":
            problems.append(Problem(key, f"{change} makes another run; use another run.name, or the old value", origin))
        elif key not in allow_changes:
            problems.append(
                Problem(
                    key,
                    f"{change} bends the curve; confirm with --checkpoint.allow_changes [{key}], or use the old value",
                    origin,
                )
            )
    return problems
