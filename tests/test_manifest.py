"""What was tampered with is refused, with status 77, before any of it runs or is loaded; the folder stays as it is."""

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

from pretrain.checkpoint import manifest
from pretrain.checkpoint.manifest import Checkpoint, UnsafeCheckpoint, checkpoints, digest_json
from pretrain.train import UNSAFE
from tests.test_train import TINY, train_here

TENSORS = "tensors-00000-of-00001-000.safetensors"


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def reseal(folder: Path, **named: Path) -> None:
    """A manifest that agrees with the files, as an attacker would write it. named: files from elsewhere, by their names."""
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
            reseal(folder)

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
    """The header of the tensors changed, and the manifest made to agree."""

    def spoil(folder: Path, marker: Path) -> None:
        data = (folder / TENSORS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        content = json.loads(data[8 : 8 + length])
        change(content)
        text = json.dumps(content).encode()
        (folder / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        reseal(folder)

    return spoil


def first_of(content: dict) -> dict:
    return next(place for name, place in content.items() if name != "__metadata__")


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
        reseal(folder, **{name(folder, path): path})

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
    "deep JSON": (replaced("state.json", lambda marker: b'{"a":' + b"[" * 1_000_000), "is nested too deeply"),
    "link": (link_outside, "is a link"),
    "name with ..": (named_outside(lambda folder, path: os.path.relpath(path, folder)), "which is no file of a checkpoint"),
    "absolute name": (named_outside(lambda folder, path: str(path)), "which is no file of a checkpoint"),
    "pipe": (pipe, "is no plain file"),
    "script": (script("zero_to_fp32.py"), "holds zero_to_fp32.py, which its manifest does not name"),
    "folder": (script("__pycache__/os.py"), "holds __pycache__, which its manifest does not name"),
    "folder for all": (lambda folder, marker: folder.chmod(0o777), "everybody may write to it"),
    "file for all": (lambda folder, marker: (folder / TENSORS).chmod(0o666), "everybody may write to it"),
    "foreign owner": (foreign_owner, "belongs to user 12345"),
    "huge header": (replaced(TENSORS, lambda marker: (1 << 60).to_bytes(8, "little")), "claims 1152921504606846976 bytes"),
    "beyond the file": (header(beyond_the_file), "does not lie where"),
    "other dtype": (header(as_bytes), "has dtype U8"),
    "overlap": (header(overlapping), "overlap, leave a gap"),
    "negative offset": (header(negative), "is not a shard of fp32 values"),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of four steps, saved at 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TINY)
    assert train_here(flags_of(folder, "--train.max_steps", "4", "--checkpoint.every_steps", "2")) == 0
    return folder


def flags_of(folder: Path, *more: str) -> list[str]:
    return ["--config", str(folder / "tiny.yaml"), "--run.directory", str(folder / "runs"), *more]


def resume_flags(folder: Path) -> list[str]:
    return flags_of(folder, "--train.max_steps", "6", "--checkpoint.allow_changes", "[train.max_steps]")


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_checkpoint_that_was_tampered_with_is_refused_before_anything_of_it_runs(trained, tmp_path, capfd, attack):
    folder, marker = Path(shutil.copytree(trained, tmp_path / "copy")), tmp_path / "marker"
    saved = folder / "runs" / "tiny" / "checkpoints"
    spoil, said = ATTACKS[attack]
    spoil(saved / "step_00000004", marker)
    before = sorted(path.name for path in saved.rglob("*"))
    assert train_here(resume_flags(folder)) == UNSAFE == 77
    assert not marker.exists()
    assert sorted(path.name for path in saved.rglob("*")) == before  # nothing is put aside: somebody should look at it
    error = capfd.readouterr().err
    assert any(part in error for part in said.split("|")) and "Traceback" not in error
    state = json.loads((folder / "runs" / "tiny" / "run_state.json").read_text())
    assert state["exit_status"] == 77 and state["reason"] in error


def test_the_same_checkpoint_left_alone_goes_on(trained, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "copy"))
    reseal(folder / "runs" / "tiny" / "checkpoints" / "step_00000004")  # so the samples above fail for their own reasons
    assert train_here(resume_flags(folder)) == 0


def test_no_hint_decides_which_checkpoint_is_the_newest(trained, tmp_path):
    saved = Path(shutil.copytree(trained / "runs" / "tiny" / "checkpoints", tmp_path / "checkpoints"))
    for text in ("step_00000002", "", "garbage", "step_99999999"):
        (saved / "latest").write_text(text)
        assert [found.step for found in checkpoints(saved)] == [4, 2]
    (saved / "latest").unlink()
    (saved / "latest").symlink_to("nowhere")
    assert [found.step for found in checkpoints(saved)] == [4, 2]


def test_weights_for_generation_are_refused_too(trained, tmp_path):
    saved = Path(shutil.copytree(trained / "runs" / "tiny" / "checkpoints", tmp_path / "checkpoints"))
    replaced(TENSORS, lambda marker: pickle.dumps(Touch(marker)))(saved / "step_00000004", tmp_path / "marker")
    with pytest.raises(UnsafeCheckpoint, match="is a pickle"):
        Checkpoint(saved / "step_00000004").damage()
    assert not (tmp_path / "marker").exists()


def test_a_large_claim_allocates_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_JSON_BYTES", 1000)
    (tmp_path / "state.json").write_text('{"a": "' + "x" * 2000 + '"}')
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        manifest._read_json(tmp_path / "state.json")


def test_a_file_system_that_renames_root_is_no_stranger(trained, tmp_path, monkeypatch):
    """There all files, those of this process too, belong to another user."""
    saved = Path(shutil.copytree(trained / "runs" / "tiny" / "checkpoints", tmp_path / "checkpoints"))
    newest = checkpoints(saved)[0]
    foreign_owner(newest.path, tmp_path)
    with pytest.raises(UnsafeCheckpoint, match="belongs to user 12345"):
        newest.damage()
    monkeypatch.setattr(manifest, "_new_file", lambda folder: (newest.path / TENSORS).stat())
    assert newest.damage() is None


def test_a_mount_that_shows_every_file_as_everybodys_is_no_danger(trained, tmp_path, monkeypatch):
    """There a file that only its owner may read shows 0777, and chmod changes nothing."""
    saved = Path(shutil.copytree(trained / "runs" / "tiny" / "checkpoints", tmp_path / "checkpoints"))
    newest = checkpoints(saved)[0]
    for path in (newest.path, *newest.path.iterdir()):
        path.chmod(0o777)
    with pytest.raises(UnsafeCheckpoint, match="everybody may write"):
        newest.damage()
    monkeypatch.setattr(manifest, "_new_file", lambda folder: newest.path.stat())
    assert newest.damage() is None
