"""Checkpoints know no kind of parallelism: whatever ranks shared sequences, matrices or experts, what they wrote is read to the
bit by any others, and a run that moves between kinds follows the curve of one process."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from pretrain.checkpoint import storage
from pretrain.checkpoint.manifest import Checkpoint, checkpoints
from pretrain.checkpoint.saver import Saver
from pretrain.config import CheckpointConfig, EngineConfig, OptimizerConfig, ParallelConfig
from pretrain.data.batches import Batch
from pretrain.engines.base import Engine
from pretrain.engines.shards import Shard
from pretrain.engines.start import start_engine
from pretrain.interop import convert
from pretrain.interop.load import open_run
from pretrain.model.config import ModelConfig, MoeConfig, resolve_model
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer
from pretrain.report import metrics
from pretrain.train import train_step
from tests.models import make_run, model_of, train_here
from tests.ranks import run_ranks
from tests.saving import save

pytestmark = pytest.mark.timeout(900)

LENGTH, VOCAB, SEQUENCES = 24, 97, 12
EXPERTS = MoeConfig(
    num_experts=4,
    moe_intermediate_size=20,
    num_shared_experts=1,
    score="sigmoid",
    balance="global_batch",
    bias_update_rate=1e-3,
)
"""Their routers have biases and shares, which are state too."""
# 45 rows are cut unevenly; of the 2 values of a query norm, some of 4 ranks have none.
SHAPE = dict(hidden_size=45, num_hidden_layers=2, num_attention_heads=24, num_key_value_heads=12, head_dim=2, qk_norm=True)
MODELS = {
    name: resolve_model(ModelConfig(**SHAPE, **more), vocab_size=VOCAB, sequence_length=LENGTH)
    for name, more in {"routed": {"moe": EXPERTS}, "tied": {"tie_word_embeddings": True, "intermediate_size": 60}}.items()
}
MODELS["exported"] = model_of("qwen3_moe")


def engine_config(name: str, **settings: int) -> EngineConfig:
    kinds = {kind: settings.pop(kind) for kind in ("tensor", "sequence", "expert") if kind in settings}
    return EngineConfig(name=name, keep_whole_below=100, parallel=ParallelConfig(**kinds), **settings)


ON_2 = {
    "ddp tensor": engine_config("ddp", tensor=2),
    "fsdp2 tensor": engine_config("fsdp2", tensor=2),
    "ddp expert": engine_config("ddp", expert=2),
    "fsdp2 expert": engine_config("fsdp2", expert=2),
    "fsdp2 sequence": engine_config("fsdp2", sequence=2),
}
ON_4 = {
    "ddp tensor": engine_config("ddp", tensor=2),
    "ddp tensor, expert": engine_config("ddp", tensor=2, expert=4),
    "ddp sequence, expert": engine_config("ddp", sequence=2, expert=2),
    "fsdp2 tensor": engine_config("fsdp2", tensor=2),
    "fsdp2 tensor in replicas": engine_config("fsdp2", tensor=2, replicas=2),
    "fsdp2 expert in replicas": engine_config("fsdp2", expert=2, replicas=2),
    "fsdp2 tensor, sequence, expert": engine_config("fsdp2", tensor=2, sequence=2, expert=2),
    "fsdp2": engine_config("fsdp2"),
}
WITH_ZERO = {f"zero{stage} sequence": engine_config(f"zero{stage}", sequence=2) for stage in (1, 2, 3)}


# ---------------------------------------------------------------- on ranks


def prepare(config: EngineConfig, model: str, optimizer: str, seed: int = 0) -> Engine:
    """An engine on the existing process group, if there is one. model: its name in MODELS."""
    AcceleratorState._reset_state(reset_partial_state=True)
    engine = start_engine(config)
    settings = OptimizerConfig(name=optimizer, lr=1e-3, eps=1e-3)
    engine.prepare(lambda: Transformer(MODELS[model]), lambda built: build_optimizer(built, settings), 0.5, seed)
    return engine


def window_of(engine: Engine, step: int) -> list[Batch]:
    """This rank's part of a global batch, in micro-batches of up to 3 sequences."""
    draw = torch.Generator().manual_seed(step)
    tokens_BT, labels_BT = (torch.randint(0, VOCAB, (SEQUENCES, LENGTH), generator=draw) for _ in range(2))
    labels_BT[torch.rand(SEQUENCES, LENGTH, generator=draw) < 0.3] = -100
    mine = [each.chunk(engine.mesh.sample_ranks)[engine.mesh.sample_rank].split(3) for each in (tokens_BT, labels_BT)]
    return [engine.part_of(Batch(*tensors, None)) for tensors in zip(*mine, strict=True)]


def two_steps(engine: Engine, first: int) -> list[float]:
    """Losses of two steps."""
    meter, losses = metrics.Meter(engine.device, engine.rank, engine.world_size), []
    for step in (first, first + 1):
        meter.add(*train_step(engine, window_of(engine, step), 1e-3))
        losses.append(meter.read(engine.all_reduce)["loss"])
    return losses


def full_state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, flat. Reading it also checks that the files hold each value exactly once."""
    full, reader = {}, storage.CheckpointReader(checkpoint)
    for name, parts in reader.by_name.items():
        full[name] = torch.empty(sum(part.count for part in parts))
        reader.read_into(Shard(name, parts[0].shape, 0, full[name]))
    return full


def require_state(engine: Engine, checkpoint: Checkpoint) -> None:
    """Every value of this rank, also one that another rank saves, is that of the checkpoint, to the bit."""
    full, seen = full_state(checkpoint), set()
    for name, _, offset, values in engine.shards(saving=False):
        assert torch.equal(values.cpu(), full[name][offset : offset + len(values)]), name
        seen.add(name)
    assert seen == full.keys()


def write_and_read(
    configs: dict[str, EngineConfig], model: str, optimizer: str, pairs: dict[str, list[str]], folder: Path
) -> dict:
    """Each engine takes two steps and saves; then `read`. -> losses of two further steps."""
    losses = {}
    for name, config in configs.items():
        engine = prepare(config, model, optimizer)
        two_steps(engine, 0)
        require_state(engine, save(folder / name, 2, engine, {}))
        losses[name, None] = two_steps(engine, 2)
    return losses | read(configs, model, optimizer, pairs, folder)


def read(configs: dict[str, EngineConfig], model: str, optimizer: str, pairs: dict[str, list[str]], folder: Path) -> dict:
    """Each engine loads what those in `pairs` saved, and takes two steps after the last one. -> losses."""
    losses = {}
    for name, config in configs.items():
        engine = prepare(config, model, optimizer, seed=1)  # other weights
        for other in pairs[name]:
            [found] = checkpoints(folder / other)
            storage.load(found, engine)
            require_state(engine, found)
            assert engine.updates == 2
        losses[name, other] = two_steps(engine, 2)
    return losses


def check_losses(found: dict) -> None:
    truth = next(losses for (_, other), losses in found.items() if other is None)
    for pair, losses in found.items():
        assert losses == pytest.approx(truth, rel=2e-6), pair


# ---------------------------------------------------------------- any kind resumes any other


def test_two_kinds_resume_the_states_of_each_other_to_the_bit(tmp_path):
    """One process then reads both. All pairs are in the slow test below."""
    pairs = {"fsdp2 tensor": ["ddp expert"], "ddp expert": ["fsdp2 tensor"]}
    configs = {name: ON_2[name] for name in pairs}
    written = run_ranks(2, write_and_read, configs, "routed", "adamw", pairs, tmp_path)[0]
    alone = read({"alone": EngineConfig()}, "routed", "adamw", {"alone": list(pairs)}, tmp_path)
    check_losses(written | alone)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "optimizer"), [("routed", "adamw"), ("tied", "adamw"), ("routed", "muon")])
def test_all_kinds_resume_the_states_of_all_others_to_the_bit(tmp_path, model, optimizer):
    """On 4 ranks, and what they wrote on 2, 3 and 1."""
    on_4, on_2, on_3 = (ON_4 | WITH_ZERO, ON_2 | WITH_ZERO, {"zero2 sequence": engine_config("zero2", sequence=3)})
    if optimizer == "muon":
        on_4, on_2, on_3 = ON_4, ON_2, {"fsdp2 sequence": engine_config("fsdp2", sequence=3)}
    if MODELS[model].moe is None:
        on_4, on_2 = ({name: each for name, each in on.items() if each.parallel.expert == 1} for on in (on_4, on_2))
    written = run_ranks(4, write_and_read, on_4, model, optimizer, {name: list(on_4) for name in on_4}, tmp_path, timeout=600)[
        0
    ]
    for number, configs in ((3, on_3), (2, on_2)):
        more = run_ranks(
            number, read, configs, model, optimizer, {name: list(on_4) for name in configs}, tmp_path, timeout=600
        )[0]
        check_losses(written | {(f"{name} on {number}", other): losses for (name, other), losses in more.items()})
    alone = read({"alone": EngineConfig()}, model, optimizer, {"alone": list(on_4)}, tmp_path)
    check_losses(written | alone)


# ---------------------------------------------------------------- a run that moves


def train_watched(argv: list[str], folder: Path) -> int:
    """Trains; at each save and each load, every value of this rank must be that of the checkpoint."""
    load, begin, held = storage.load, storage.begin, {}

    def load_and_compare(found: Checkpoint, engine: Engine) -> dict:
        state = load(found, engine)
        require_state(engine, found)
        return state

    def remember_and_begin(place: Path, step: int, engine: Engine) -> Path:
        held[step] = [shard._replace(values=shard.values.clone()) for shard in engine.shards(saving=False)]
        return begin(place, step, engine)

    storage.load, storage.begin = load_and_compare, remember_and_begin
    status = train_here(argv)
    for step, shards in held.items():
        full = full_state(Checkpoint(folder / "checkpoints" / f"step_{step:08d}"))
        assert all(torch.equal(values, full[name][at : at + len(values)]) for name, _, at, values in shards)
        assert {shard.name for shard in shards} == full.keys()
    return status


MOVED = """
run: {name: moved}
model: {hidden_size: 48, num_hidden_layers: 2, num_attention_heads: 12, num_key_value_heads: 6, head_dim: 4, vocab_size: 64,
        moe: {num_experts: 4, num_experts_per_tok: 4, moe_intermediate_size: 24, num_shared_experts: 1}}
data: {synthetic: {kind: markov}, sequence_length: 24}
batch: {global_batch_size: 12, micro_batch_size: 1}
engine: {precision: fp32}
optimizer: {lr: 3e-3}
schedule: {name: constant, warmup_steps: 3}
train: {max_steps: 50}
evaluate: {every_steps: 25, max_batches: 2}
checkpoint: {keep_last: 100, allow_changes: [train.max_steps]}
log: {every_steps: 1, sinks: [jsonl]}
"""
"""All experts take part in every token: a rounding error could otherwise send one to another expert."""
CHAINS = {
    "adamw": [
        (4, 13, {"engine.name": "fsdp2", "engine.parallel.tensor": 2}),
        (2, 25, {"engine.name": "ddp", "engine.parallel.expert": 2}),
        (3, 38, {"engine.name": "zero1", "engine.parallel.sequence": 3}),
        (1, 50, {"engine.name": "ddp"}),
    ],
    "muon": [
        (4, 13, {"engine.name": "ddp", "engine.parallel.tensor": 2, "engine.parallel.expert": 4}),
        (2, 25, {"engine.name": "fsdp2", "engine.parallel.tensor": 2}),
        (3, 38, {"engine.name": "fsdp2", "engine.parallel.sequence": 3}),
        (1, 50, {"engine.name": "ddp"}),
    ],
}
"""(ranks, last step, settings) of each start."""


def curve(run: Path) -> dict[int, tuple[int, float]]:
    """Step -> tokens so far and loss; the validation of the last step is at 0."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {each["step"]: (each["tokens"], each["loss"]) for each in records if "loss" in each}
    return losses | {0: (records[-1]["tokens"], records[-1]["val_loss"])}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", CHAINS)
def test_a_run_that_moves_over_kinds_and_ranks_follows_the_curve_of_one_process(tmp_path, optimizer):
    (tmp_path / "moved.yaml").write_text(MOVED)
    argv = ["--config", str(tmp_path / "moved.yaml"), "--run.directory", str(tmp_path), "--optimizer.name", optimizer]
    assert run_ranks(1, train_here, [*argv, "--run.name", "straight"], timeout=300) == [0]
    for ranks, last, settings in CHAINS[optimizer]:
        flags = [text for key, value in ({"train.max_steps": last} | settings).items() for text in (f"--{key}", str(value))]
        assert run_ranks(ranks, train_watched, [*argv, *flags], tmp_path / "moved", timeout=300) == [0] * ranks
    moved, straight = (curve(tmp_path / name) for name in ("moved", "straight"))
    assert len(moved) == 51 and moved.keys() == straight.keys()
    print(f"{optimizer}: {max(abs(moved[step][1] / straight[step][1] - 1) for step in moved):.1e}")
    for step, (tokens, loss) in moved.items():
        assert tokens == straight[step][0] and loss == pytest.approx(straight[step][1], rel=1e-5), step


# ---------------------------------------------------------------- saves whose columns ranks exchange


def open_saver(folder: Path, messages: list[str], asynchronous: bool) -> tuple[Engine, Saver]:
    engine = prepare(engine_config("ddp", tensor=2), "tied", "adamw")
    config = CheckpointConfig(asynchronous=asynchronous, every_steps=1)
    return engine, Saver(folder, engine, config, lambda saved: messages.append(f"saved {saved.step}"), messages.append)


def copied_in_order(folder: Path) -> list[bool]:
    """For each file of a snapshot: whether it was copied before the next one was made."""
    storage.MAX_FILE_BYTES = 16384
    copied, real = [], storage.files_of
    _, opened = open_saver(folder, [], asynchronous=True)

    def watched(shards: Iterator[Shard]) -> Iterator[list[Shard]]:
        for file, buffer in zip(real(shards), opened._snapshot.buffers, strict=True):
            yield file
            copied.append(torch.equal(torch.cat([shard.values for shard in file]), buffer))

    storage.files_of = watched
    with opened:
        opened.save(1, {}, last=False)
    return copied


def test_a_snapshot_exchanges_columns_for_the_rows_of_one_file_at_a_time_into_memory_of_the_right_size(tmp_path):
    for copied in run_ranks(2, copied_in_order, tmp_path):
        assert len(copied) > 10 and all(copied)


def fill_a_disk(folder: Path, asynchronous: bool) -> tuple[list[str], list[int]]:
    """Saves steps 1 to 3; in step 2, files of rank 1 cannot grow beyond 10,000 bytes."""
    storage.MAX_FILE_BYTES = 16384
    messages, write = [], storage.write_part

    def write_little(*args) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            write(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    engine, opened = open_saver(folder, messages, asynchronous)
    with opened:
        for step in (1, 2, 3):
            storage.write_part = write_little if step == 2 and engine.rank == 1 else write
            opened.save(step, {}, last=False)
            opened.wait()
    engine.barrier()
    return messages, [each.step for each in checkpoints(folder)]


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_no_rank_hangs_when_the_disk_of_another_is_full_and_the_next_save_succeeds(tmp_path, asynchronous):
    (messages, found), (messages_1, found_1) = run_ranks(2, fill_a_disk, tmp_path, asynchronous)
    assert found == found_1 == [3, 1] and not messages_1
    assert [message.split(" (")[0] for message in messages] == ["saved 1", "checkpoint of step 2 failed", "saved 3"]
    assert all(each.damage() is None for each in checkpoints(tmp_path))


# ---------------------------------------------------------------- export


def save_again(configs: dict[str, EngineConfig], run: Path) -> None:
    """Each engine saves the checkpoint of `run` as a run of its own."""
    for name, config in configs.items():
        engine, [found] = prepare(config, "exported", "adamw", seed=1), checkpoints(run / "checkpoints")
        storage.load(found, engine)
        save(run.parent / name / "checkpoints", found.step, engine, found.state())


def test_the_export_of_a_checkpoint_is_the_same_whoever_shared_its_model(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "_verify", lambda *given: {"verdict": "not verified"})  # other tests compare with transformers
    run = make_run(tmp_path / "alone", MODELS["exported"], None)
    configs = {name: ON_2[name] for name in ("fsdp2 tensor", "ddp expert")}
    run_ranks(2, save_again, configs, run)
    exported = {}
    for name in ("alone", *configs):
        (tmp_path / name / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
        convert.export_model(open_run(tmp_path / name), tmp_path / f"{name} out", "fp32")
        files = sorted((tmp_path / f"{name} out").iterdir())
        exported[name] = {path.name: path.read_bytes() for path in files if path.name != convert.REPORT}
    assert "model.safetensors" in exported["alone"] and all(each == exported["alone"] for each in exported.values())
