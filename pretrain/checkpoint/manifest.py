"""What a checkpoint folder holds, and whether it is whole and safe to read. Knows files, not tensors; imports no torch.

    checkpoints/step_00001000/
      manifest.json                    size and xxh3-128 of every other file; without it the folder is no checkpoint
      state.json                       step, position, tokens, settings, data fingerprint: what the loop needs to go on
      tensors-00000-of-00002-000.safetensors   one rank's pieces of weights and moments, fp32, at most 1 GiB a file

Two kinds of trouble are kept apart. *Damage* (a missing, short or changed file) is what disks and copies do: the folder is put
aside and an older checkpoint is used. What no disk does by itself (links, files that nobody listed, pickles, names that lead
out of the folder, headers that lie although their digest is right, permissions that let others write) is *unsafe*: refused.
There is no hint such as a `latest` file that could lie: the newest folder that verifies is the newest checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pretrain import UserError
from pretrain.checkpoint.tensors import MAX_JSON_BYTES, HeaderError, StoredShard, parse_json, read_shards

FORMAT_VERSION = 1
_FOLDER = re.compile(r"step_([0-9]{8,})")
_FILE = re.compile(r"state\.json|tensors-[0-9]{5,}-of-[0-9]{5,}-[0-9]{3,}\.safetensors")
_FOREIGN = {
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"PK": "a zip archive",
}


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message says which, why, and what to do."""


class UnsafeCheckpoint(CheckpointError):
    """A checkpoint that somebody may have tampered with."""

    status = 77


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint folder."""

    path: Path

    @property
    def step(self) -> int:
        """The step after which it was saved. Raises CheckpointError when the folder has another name."""
        if match := _FOLDER.fullmatch(self.path.name):
            return int(match[1])
        raise CheckpointError(f"{self.path}: is not the folder of a checkpoint, such as .../checkpoints/step_00001000")

    def state(self) -> dict:
        """What the loop stored. Raises CheckpointError."""
        try:
            return _read_json(self.path / "state.json")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: state.json cannot be read ({error})") from None

    def manifest(self) -> dict:
        """{"format_version", "world_size", "files": {name: {"bytes", "xxh3"}}}. Raises OSError or ValueError when damaged,
        CheckpointError when another version of the program must read it, UnsafeCheckpoint when it names what it should not."""
        manifest = _read_json(self.path / "manifest.json")
        if manifest.pop("xxh3", None) != digest_json(manifest):
            raise ValueError("it has changed since it was written")
        if (found := manifest.get("format_version")) != FORMAT_VERSION:
            raise CheckpointError(f"{self.path}: has format {found}, this program reads format {FORMAT_VERSION}")
        files = manifest.get("files")
        if not isinstance(files, dict) or not all(isinstance(each, dict) for each in files.values()):
            raise UnsafeCheckpoint(f"{self.path}: manifest.json is not one that this program writes")
        for name in files:
            if not _FILE.fullmatch(name):
                raise UnsafeCheckpoint(f"{self.path}: manifest.json names {name!r}, which is no file of a checkpoint")
        return manifest

    def damage(self, part: int = 0, parts: int = 1) -> str | None:
        """What is wrong with the files of this `part` out of `parts` (so that ranks can share the reading), or None.

        Raises UnsafeCheckpoint, CheckpointError (format)."""
        try:
            _require_own_file(self.path / "manifest.json")
            expected_files = self.manifest()["files"]
        except (OSError, ValueError) as error:
            return f"{self.path}: manifest.json is missing or damaged ({error})"
        try:
            if part == 0:
                self._require_only({"manifest.json", *expected_files})
            for name, expected in sorted(expected_files.items())[part::parts]:
                if problem := _damage_of_file(self.path / name, expected):
                    return problem
        except OSError as error:
            return f"{self.path}: cannot be read ({error})"
        return None

    def shards(self) -> Iterator[StoredShard]:
        """All shards of all files. Raises UnsafeCheckpoint, OSError."""
        for name in self.manifest()["files"]:
            if name.endswith(".safetensors"):
                yield from _shards_of(self.path / name)

    def _require_only(self, names: set[str]) -> None:
        _require_private(self.path, self.path.lstat())
        for entry in sorted(os.listdir(self.path)):
            if entry not in names:
                raise UnsafeCheckpoint(
                    f"{self.path}: holds {entry}, which its manifest does not name; see where it comes from, then remove it"
                )


def checkpoints(folder: Path) -> list[Checkpoint]:
    """All checkpoints in `folder`, newest first, not verified. Unfinished ones have other names; links and files are none."""
    if not folder.is_dir():
        return []
    found = [
        Checkpoint(path)
        for path in folder.iterdir()
        if _FOLDER.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def digest_json(content: dict) -> str:
    """xxh3-128 of a JSON object, whatever the order of its keys."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


# ---------------------------------------------------------------- one file


def _damage_of_file(path: Path, expected: dict) -> str | None:
    try:
        size = _require_own_file(path)
    except FileNotFoundError:
        return f"{path}: is missing"
    if size != expected.get("bytes"):
        return f"{path}: has {size} bytes, the manifest says {expected.get('bytes')}"
    if _digest_file(path) != expected.get("xxh3"):
        return f"{path}: its content has changed since it was written"
    if path.suffix == ".safetensors":
        _shards_of(path)
        return None
    try:
        _read_json(path)
    except ValueError as error:
        raise UnsafeCheckpoint(f"{path}: is not what this program writes ({error})") from None
    return None


def _shards_of(path: Path) -> list[StoredShard]:
    try:
        return read_shards(path)
    except HeaderError as error:
        raise UnsafeCheckpoint(f"{path}: its header is not what this program writes ({error})") from None


def _require_own_file(path: Path) -> int:
    """-> its size. Raises UnsafeCheckpoint unless it is a plain file that only its owner, who is ours, can have made."""
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode):
        kind = "a link" if stat.S_ISLNK(info.st_mode) else "no plain file"
        raise UnsafeCheckpoint(f"{path}: is {kind}; a checkpoint holds plain files only")
    _require_private(path, info)
    with open(path, "rb") as file:
        begin = file.read(2)
    if begin in _FOREIGN:
        raise UnsafeCheckpoint(f"{path}: is {_FOREIGN[begin]}, which this program never writes and never opens")
    return info.st_size


def _require_private(path: Path, info: os.stat_result) -> None:
    """Some mounts (SMB, object stores, Windows disks) show one owner and 0777 for all, or rename root: what a new file of this
    process shows there, too, is no sign of others."""
    for_all, foreign = bool(info.st_mode & stat.S_IWOTH), info.st_uid not in (os.geteuid(), 0)
    new = _new_file(path.parent) if for_all or foreign else None
    if for_all and not (new and new.st_mode & stat.S_IWOTH):
        raise UnsafeCheckpoint(f"{path}: everybody may write to it (chmod o-w, once you know that nobody did)")
    if foreign and not (new and new.st_uid == info.st_uid):
        raise UnsafeCheckpoint(f"{path}: belongs to user {info.st_uid}, not to you; copy the checkpoint if you trust its owner")


def _new_file(folder: Path) -> os.stat_result | None:
    """What a file shows that this process makes here for itself alone. None: it may not write."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno())
    except OSError:
        return None


def _read_json(path: Path) -> dict:
    """A JSON object of bounded size. Raises OSError, or ValueError when it is none."""
    with open(path, "rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"it has more than {MAX_JSON_BYTES} bytes")
    return parse_json(text)


def _digest_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
