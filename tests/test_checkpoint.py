"""A checkpoint is complete or absent, can be read on any number of ranks, and is never loaded if damaged."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint import storage
from pretrain.checkpoint.manifest import CheckpointError, checkpoints, digest_json
from pretrain.checkpoint.storage import newest_valid
from pretrain.checkpoint.tensors import read_header, read_shards
from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.engines.base import Engine
from pretrain.engines.start import start_engine
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer
from tests.ranks import run_ranks
from tests.saving import save

MODEL = resolve_model(ModelConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2), vocab_size=50, sequence_length=8)


def make_engine(seed: int = 0) -> Engine:
    engine = start_engine(EngineConfig(name="ddp"))
    engine.prepare(
        lambda: Transformer(MODEL), lambda model: build_optimizer(model, OptimizerConfig(lr=1e-2)), grad_clip=1.0, seed=seed
    )
    return engine


def take_steps(engine: Engine, count: int) -> None:
    tokens_BT = torch.arange(16).view(2, 8) % 50
    for _ in range(count):
        with engine.micro_batch(last=True):
            engine.backward(engine.forward(tokens_BT, tokens_BT, None).loss_sum)
        engine.update(1e-2)


def state_of(engine: Engine) -> dict[str, bytes]:
    return {shard.name: shard.values.numpy().tobytes() for shard in engine.shards(saving=False)} | {
        "updates": bytes([engine.updates])
    }


def save_some(folder: Path, steps: list[int]) -> dict:
    """On each rank: trains and saves at `steps`. Returns the state at the last one."""
    engine = make_engine()
    for step in steps:
        take_steps(engine, 1)
        save(folder, step, engine, {"val_loss": None})
    state = state_of(engine)
    engine.close()
    return state


def load_newest(folder: Path) -> dict:
    engine = make_engine(seed=1)
    loaded = storage.load(newest_valid(folder, engine), engine)
    state = state_of(engine)
    take_steps(engine, 1)  # the optimizer works
    engine.close()
    return state | {"step": loaded["step"]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_some(folder, [1, 2, 3])
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to damage; it has steps 1, 2 and 3."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 1), (2, 4)])
def test_any_number_of_ranks_reads_what_any_other_number_wrote(tmp_path, writers, readers):
    written = run_ranks(writers, save_some, tmp_path, [3])[0]
    for read in run_ranks(readers, load_newest, tmp_path):
        assert read.pop("step") == 3 and read == written


def test_large_states_are_split_into_files_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MAX_FILE_BYTES", 2048)
    written = save_some(tmp_path, [1])
    files = sorted((tmp_path / "step_00000001").glob("*.safetensors"))
    assert len(files) > 3
    largest_piece = max(len(data) for data in written.values())
    headers = [read_header(file).begin for file in files]
    assert [file.stat().st_size - head for file, head in zip(files, headers, strict=True)][:-1] == [2048] * (len(files) - 1)
    assert largest_piece > 2048  # a tensor that is too large for one file is split
    read = load_newest(tmp_path)
    assert read.pop("step") == 1 and read == written


def spoil(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: random.Random(0).randrange(len(data))])
    elif how == "flipped":
        data[random.Random(1).randrange(len(data))] ^= 1
        path.write_bytes(data)
    elif how == "missing":
        path.unlink()
    elif how == "swapped":
        path.write_bytes((path.parents[1] / "step_00000002" / path.name).read_bytes())


FILES = ["manifest.json", "state.json", "tensors-00000-of-00001-000.safetensors"]
DAMAGES = ["truncated", "flipped", "missing"]


@pytest.mark.parametrize("how", [*DAMAGES, "swapped"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_is_used(folder, file, how):
    spoil(folder / "step_00000003" / file, how)
    messages: list[str] = []
    engine = make_engine()
    assert newest_valid(folder, engine, messages.append).step == 2
    assert len(messages) == 1 and "step_00000003" in messages[0] and "put aside" in messages[0]
    assert (folder / "damaged-step_00000003").is_dir()


def test_each_of_a_thousand_flipped_bits_is_detected(folder):
    randomly, target = random.Random(2), checkpoints(folder)[0]
    files = sorted(target.path.iterdir())
    seen = 0
    for _ in range(1000):
        file = randomly.choice(files)
        data = bytearray(file.read_bytes())
        place, bit = randomly.randrange(len(data)), 1 << randomly.randrange(8)
        data[place] ^= bit
        file.write_bytes(data)
        seen += target.damage() is not None
        data[place] ^= bit
        file.write_bytes(data)
    assert seen == 1000 and target.damage() is None


def test_no_valid_checkpoint_is_an_error_and_never_a_fresh_start(folder):
    for found in checkpoints(folder):
        spoil(found.path / "state.json", "flipped")
    for _ in range(2):  # even the second time, when all of them have been put aside
        with pytest.raises(CheckpointError):
            newest_valid(folder, make_engine(), lambda text: None)


def test_an_empty_folder_is_a_fresh_start(tmp_path):
    assert newest_valid(tmp_path / "none", make_engine()) is None


def test_a_checkpoint_of_another_format_version_is_refused_and_stays(folder):
    path = folder / "step_00000003" / "manifest.json"
    manifest = {"format_version": 99}
    path.write_text(json.dumps(manifest | {"xxh3": digest_json(manifest)}))
    with pytest.raises(CheckpointError, match="99"):
        newest_valid(folder, make_engine())


def test_a_checkpoint_of_another_architecture_is_refused_with_both_shapes(folder):
    engine = start_engine(EngineConfig(name="ddp"))
    other = resolve_model(
        ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2), vocab_size=50, sequence_length=8
    )
    engine.prepare(lambda: Transformer(other), lambda model: build_optimizer(model, OptimizerConfig()), 1.0, seed=0)
    with pytest.raises(CheckpointError, match=r"model/model.embed_tokens.weight .*\(64, 32\).*\(64, 16\)"):
        storage.load(checkpoints(folder)[0], engine)


def fail_on_one_rank(folder: Path) -> tuple[bool, list[int], list[str]]:
    engine, failed = make_engine(), False
    save(folder, 1, engine, {})
    if engine.rank == 1:
        storage._blocks = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    try:
        save(folder, 2, engine, {})
    except OSError:
        failed = True
    engine.barrier()
    return failed, [found.step for found in checkpoints(folder)], [path.name for path in folder.iterdir()]


def test_if_one_rank_cannot_write_all_ranks_raise_and_earlier_checkpoints_stay(tmp_path):
    for result in run_ranks(2, fail_on_one_rank, tmp_path):
        assert result == (True, [1], ["step_00000001"])


def test_pruning_and_cleaning_leave_other_names_alone(folder):
    (folder / "my-notes-step-5").mkdir()
    (folder / "step_00000009").symlink_to(folder / "step_00000001")
    (folder / ".tmp-step_00000007").mkdir()
    (folder / ".del-step_00000006").mkdir()
    (folder / ".tmp-my-experiment").mkdir()
    (folder / ".tmp-step_00000008").symlink_to(folder / "my-notes-step-5")
    (folder / "step_00000004").mkdir()  # a user may be copying a checkpoint
    storage.clean(folder)
    storage.prune(folder, keep_last=1, keep_best=0, trusted=set())
    assert sorted(path.name for path in folder.iterdir()) == [
        ".tmp-my-experiment",
        ".tmp-step_00000008",
        "my-notes-step-5",
        "step_00000003",
        "step_00000004",
        "step_00000009",
    ]


@pytest.fixture
def immutable(monkeypatch) -> set[str]:
    """Names of folders that cannot be removed: a file in them is immutable, or open on another machine (NFS)."""
    names: set[str] = set()

    def rmtree(path, ignore_errors: bool = False) -> None:
        if Path(path).name not in names:
            remove_tree(path, ignore_errors)
        elif not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    remove_tree = shutil.rmtree
    monkeypatch.setattr(storage.shutil, "rmtree", rmtree)
    return names


def test_what_cannot_be_removed_neither_stops_a_start_nor_a_save(folder, immutable, capsys):
    stuck = [".del-step_00000001", ".tmp-step_00000004", ".old-step_00000003"]
    immutable.update(stuck)
    for name in stuck:
        (folder / name).mkdir()
    storage.clean(folder)
    assert all(name in capsys.readouterr().err or (folder / name).exists() for name in stuck)
    engine = make_engine()
    save(folder, 4, engine, {})
    save(folder, 3, engine, {})  # again, after a rollback
    assert [found.step for found in checkpoints(folder)] == [4, 3, 2, 1]
    assert all(found.damage() is None for found in checkpoints(folder))
    immutable.clear()
    storage.clean(folder)
    assert sorted(path.name for path in folder.iterdir()) == [f"step_0000000{step}" for step in (1, 2, 3, 4)]


def test_pruning_goes_past_a_checkpoint_that_cannot_be_removed(folder, immutable):
    immutable.add(".del-step_00000002")
    with pytest.raises(OSError, match="busy"):
        storage.prune(folder, keep_last=1, keep_best=0, trusted=set())
    assert sorted(path.name for path in folder.iterdir()) == [".del-step_00000002", "step_00000003"]


def test_pruning_keeps_exactly_the_newest_and_best_intact_checkpoints(tmp_path):
    """For any choice of damaged checkpoints and any order of losses."""
    losses = {1: 2.5, 2: 2.0, 3: 3.0, 4: None, 5: 2.4, 6: 2.6}
    engine = make_engine()
    for step, loss in losses.items():
        save(tmp_path / "saved", step, engine, {"val_loss": loss})
    randomly = random.Random(0)
    for trial in range(60):
        folder = Path(shutil.copytree(tmp_path / "saved", tmp_path / f"trial{trial}"))
        bad = randomly.sample(sorted(losses), randomly.randrange(4))
        for step in bad:
            spoil(folder / f"step_{step:08d}" / randomly.choice(FILES), randomly.choice(DAMAGES))
        keep_last, keep_best = randomly.randrange(1, 4), randomly.randrange(3)
        storage.prune(folder, keep_last, keep_best, trusted=set())
        intact = {found.step for found in checkpoints(folder) if storage._is_intact(found)}
        good = [step for step in sorted(losses, reverse=True) if step not in bad]
        best = sorted((step for step in good if losses[step]), key=lambda step: losses[step])
        assert intact == {*good[:keep_last], *best[:keep_best]}, (bad, keep_last, keep_best)
        shutil.rmtree(folder)


def test_a_kill_while_a_step_is_saved_again_loses_no_checkpoint(folder):
    """Between the two renames, no folder has the name of the step."""
    (folder / "step_00000003").rename(folder / ".old-step_00000003")
    (folder / ".tmp-step_00000003").mkdir()
    storage.clean(folder)
    assert newest_valid(folder, make_engine()).step == 3
    shutil.copytree(folder / "step_00000002", folder / ".old-step_00000003")  # killed after both renames
    storage.clean(folder)
    assert [found.step for found in checkpoints(folder)] == [3, 2, 1] and checkpoints(folder)[0].damage() is None
    assert sorted(path.name for path in folder.iterdir()) == [f"step_0000000{step}" for step in (1, 2, 3)]


def test_nobody_else_can_read_or_change_a_checkpoint(saved):
    for path in (saved, *saved.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_the_files_of_tensors_are_safetensors_files(saved):
    file = checkpoints(saved)[0].path / "tensors-00000-of-00001-000.safetensors"
    tensors = load_file(file)
    for shard in read_shards(file):
        assert tensors[shard.name].shape == (shard.count,) and tensors[shard.name].dtype == torch.float32
        raw = file.read_bytes()[shard.values.position : shard.values.position + 4 * shard.count]
        assert raw == tensors[shard.name].numpy().tobytes()
    assert len(tensors) == 3 * len(list(make_engine().model.parameters()))


def test_the_manifest_is_written_after_the_files_and_synced_before_the_rename(tmp_path, monkeypatch):
    events: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_fsync(descriptor)

    def rename(source, target) -> None:
        events.append(f"rename {Path(source).name}")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save_some(tmp_path / "c", [1])
    files = [event for event in events if not event.startswith("sync files-")]
    assert files == [
        "sync tensors-00000-of-00001-000.safetensors",
        "sync .tmp-step_00000001",
        "sync state.json",
        "sync manifest.json",
        "sync .tmp-step_00000001",
        "rename .tmp-step_00000001",
        "sync c",
    ]
