"""A checkpoint that was tampered with is refused before anything in it runs or is loaded; the folder is left unchanged."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash

from pretrain.checkpoint import manifest, storage
from pretrain.checkpoint.manifest import UnsafeCheckpoint, checkpoints, digest_json
from tests.test_checkpoint import make_engine, save_some
from tests.test_train import TINY, train_here

TENSORS = "tensors-00000-of-00001-000.safetensors"


class Touch:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def rewrite_manifest(folder: Path, **named: Path) -> None:
    """Writes a manifest that matches the files, as an attacker would. named: files in other places, by their names in it."""
    files = {}
    for name, path in {**{each: folder / each for each in ("state.json", TENSORS)}, **named}.items():
        data = path.read_bytes()
        files[name] = {"bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}
    content = {"format_version": 1, "world_size": 1, "files": files}
    (folder / "manifest.json").write_text(json.dumps(content | {"xxh3": digest_json(content)}))


def replaced(name: str, data: Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
    def spoil(folder: Path, marker: Path) -> None:
        (folder / name).write_bytes(data(marker))
        if name != "manifest.json":
            rewrite_manifest(folder)

    return spoil


def torch_archive(marker: Path) -> bytes:
    path = marker.with_name("archive")
    torch.save({"weights": Touch(marker)}, path)
    return path.read_bytes()


def zip_bomb(marker: Path) -> bytes:
    path = marker.with_name("bomb")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights", bytes(1 << 24))
    return path.read_bytes()


def header(change: Callable[[dict], None]) -> Callable[[Path, Path], None]:
    """Changes the header of the tensors and makes the manifest match."""

    def spoil(folder: Path, marker: Path) -> None:
        data = (folder / TENSORS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        content = json.loads(data[8 : 8 + length])
        change(content)
        text = json.dumps(content).encode()
        (folder / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        rewrite_manifest(folder)

    return spoil


def first_of(content: dict) -> dict:
    return next(entry for name, entry in content.items() if name != "__metadata__")


def beyond_the_file(content: dict) -> None:
    first_of(content).update(shape=[1 << 50], data_offsets=[0, 1 << 52])


def as_bytes(content: dict) -> None:
    first_of(content).update(dtype="U8")


def overlapping(content: dict) -> None:
    pieces = json.loads(content["__metadata__"]["pieces"])
    next(iter(pieces.values()))["offset"] = 1
    content["__metadata__"]["pieces"] = json.dumps(pieces)


def negative(content: dict) -> None:
    pieces = json.loads(content["__metadata__"]["pieces"])
    next(iter(pieces.values()))["offset"] = -1
    content["__metadata__"]["pieces"] = json.dumps(pieces)


def outside(folder: Path, marker: Path) -> Path:
    return Path(shutil.move(folder / TENSORS, marker.with_name("outside.safetensors")))


def link_outside(folder: Path, marker: Path) -> None:
    (folder / TENSORS).symlink_to(outside(folder, marker))


def named_outside(name: Callable[[Path, Path], str]) -> Callable[[Path, Path], None]:
    def spoil(folder: Path, marker: Path) -> None:
        path = marker.with_name("outside.safetensors")
        shutil.copy(folder / TENSORS, path)
        rewrite_manifest(folder, **{name(folder, path): path})

    return spoil


def pipe(folder: Path, marker: Path) -> None:
    (folder / TENSORS).unlink()
    os.mkfifo(folder / TENSORS)


def script(name: str) -> Callable[[Path, Path], None]:
    def spoil(folder: Path, marker: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"import os; os.system('touch {marker}')")

    return spoil


def foreign_owner(folder: Path, marker: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(folder / TENSORS, 12345, 12345)


ATTACKS = {
    "pickle as tensors": (replaced(TENSORS, lambda marker: pickle.dumps(Touch(marker))), "is a pickle"),
    "pickle as state": (replaced("state.json", lambda marker: pickle.dumps(Touch(marker))), "is a pickle"),
    "pickle as manifest": (replaced("manifest.json", lambda marker: pickle.dumps(Touch(marker))), "is a pickle"),
    "pickle in ASCII": (replaced("state.json", lambda marker: pickle.dumps(Touch(marker), protocol=0)), "is not what this"),
    "torch archive": (replaced(TENSORS, torch_archive), "is a zip archive"),
    "zip bomb": (replaced(TENSORS, zip_bomb), "is a zip archive"),
    "deep JSON": (replaced("state.json", lambda marker: b'{"a":' + b"[" * 1_000_000), "nested too deeply"),
    "link": (link_outside, "is a link"),
    "name with ..": (named_outside(lambda folder, path: os.path.relpath(path, folder)), "is not a file of a checkpoint"),
    "absolute name": (named_outside(lambda folder, path: str(path)), "is not a file of a checkpoint"),
    "pipe": (pipe, "is not a regular file"),
    "script": (script("zero_to_fp32.py"), "contains zero_to_fp32.py"),
    "folder": (script("__pycache__/os.py"), "contains __pycache__"),
    "folder for all": (lambda folder, marker: folder.chmod(0o777), "everyone may write"),
    "file for all": (lambda folder, marker: (folder / TENSORS).chmod(0o666), "everyone may write"),
    "foreign owner": (foreign_owner, "belongs to user 12345"),
    "huge header": (replaced(TENSORS, lambda marker: (1 << 60).to_bytes(8, "little")), "claims 1152921504606846976 bytes"),
    "beyond the file": (header(beyond_the_file), "end outside the file"),
    "other dtype": (header(as_bytes), "has dtype U8"),
    "overlap": (header(overlapping), "overlap, leave a gap"),
    "negative offset": (header(negative), "is not a shard of fp32 values"),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_some(folder, [2, 4])
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def load_newest(folder: Path) -> int:
    """Loads the newest checkpoint as a run does. Returns its step."""
    engine = make_engine(seed=1)
    found = storage.newest_valid(folder, engine)
    return storage.load(found, engine)["step"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_tampered_checkpoint_is_refused_before_anything_in_it_runs(folder, tmp_path, attack):
    spoil, reason = ATTACKS[attack]
    spoil(folder / "step_00000004", tmp_path / "marker")
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(UnsafeCheckpoint, match=reason):  # the reason: each attack must fail for its own
        load_newest(folder)
    assert not (tmp_path / "marker").exists()
    assert sorted(path.name for path in folder.rglob("*")) == before  # nothing is put aside: someone should look at it


def test_a_checkpoint_with_a_manifest_written_anew_is_loaded(folder):
    rewrite_manifest(folder / "step_00000004")  # so the attacks above do not fail because of the new manifest
    assert load_newest(folder) == 4


@pytest.mark.parametrize("attack", ["pickle as tensors", "overlap"])  # found by the check of the files; found while loading
def test_a_run_refuses_a_tampered_checkpoint_with_status_77(tmp_path, capfd, attack):
    (tmp_path / "tiny.yaml").write_text(TINY)
    flags = ["--config", str(tmp_path / "tiny.yaml"), "--run.directory", str(tmp_path / "runs"), "--train.max_steps", "4"]
    assert train_here(flags) == 0
    spoil, _ = ATTACKS[attack]
    spoil(tmp_path / "runs" / "tiny" / "checkpoints" / "step_00000004", tmp_path / "marker")
    assert train_here(flags) == 77
    error = capfd.readouterr().err
    state = json.loads((tmp_path / "runs" / "tiny" / "run_state.json").read_text())
    assert state["exit_status"] == 77 and state["reason"] in error and "Traceback" not in error
    assert not (tmp_path / "marker").exists()


def test_no_file_decides_which_checkpoint_is_the_newest(folder):
    for text in ("step_00000002", "", "garbage", "step_99999999"):
        (folder / "latest").write_text(text)
        assert [found.step for found in checkpoints(folder)] == [4, 2]
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("nowhere")
    assert [found.step for found in checkpoints(folder)] == [4, 2]


def test_json_of_excessive_size_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_JSON_BYTES", 1000)
    (tmp_path / "state.json").write_text('{"a": "' + "x" * 2000 + '"}')
    with pytest.raises(ValueError, match="1000 bytes"):
        manifest._read_json(tmp_path / "state.json")


def test_files_of_another_owner_are_accepted_on_a_file_system_that_maps_all_owners(folder, tmp_path, monkeypatch):
    """There, new files of this process belong to another user, too."""
    newest = checkpoints(folder)[0]
    foreign_owner(newest.path, tmp_path)
    with pytest.raises(UnsafeCheckpoint):
        newest.damage()
    monkeypatch.setattr(manifest, "_new_file", lambda folder: (newest.path / TENSORS).stat())
    assert newest.damage() is None


def test_files_that_everyone_may_write_are_accepted_on_a_mount_that_shows_all_files_so(folder, monkeypatch):
    """There, a new private file has mode 0777, and chmod changes nothing."""
    newest = checkpoints(folder)[0]
    for path in (newest.path, *newest.path.iterdir()):
        path.chmod(0o777)
    with pytest.raises(UnsafeCheckpoint):
        newest.damage()
    monkeypatch.setattr(manifest, "_new_file", lambda folder: newest.path.stat())
    assert newest.damage() is None
