"""The files of a checkpoint, and checks that they are intact and safe to read. Imports no torch.

    checkpoints/step_00001000/
      manifest.json                    size and xxh3-128 of every other file; without it the folder is not a checkpoint
      state.json                       step, position, tokens, settings, data fingerprint: what the loop needs to resume
      tensors-00000-of-00002-000.safetensors   one rank's shards of weights and moments, fp32, at most 1 GiB per file

Two kinds of problems are distinguished. *Damage* (a missing, short or changed file) is what disks and copying cause: the folder
is put aside and an older checkpoint is used. What disks never cause (links, unlisted files, pickles, names that lead out of the
folder, wrong headers under a correct digest, permissions that let others write) is *unsafe* and refused. No file such as
`latest` names the newest checkpoint, since it could be wrong: the newest folder that passes the checks is the newest one.
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
_FOREIGN = {b"PK": "a zip archive", **dict.fromkeys((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), "a pickle")}


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message says which, why, and what to do."""


class UnsafeCheckpoint(CheckpointError):
    """A checkpoint that someone may have tampered with."""

    status = 77


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint folder."""

    path: Path

    @property
    def step(self) -> int:
        """The step after which it was saved. Raises CheckpointError if the name of the folder does not tell."""
        if match := _FOLDER.fullmatch(self.path.name):
            return int(match[1])
        raise CheckpointError(f"{self.path}: is not the folder of a checkpoint, such as .../checkpoints/step_00001000")

    def state(self) -> dict:
        """The content of state.json. Raises CheckpointError."""
        try:
            return _read_json(self.path / "state.json")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: state.json cannot be read ({error})") from None

    def manifest(self) -> dict:
        """{"format_version", "world_size", "files": {name: {"bytes", "xxh3"}}}. Raises OSError or ValueError if it is damaged,
        CheckpointError if it has another format version, UnsafeCheckpoint if it lists a file that no checkpoint has."""
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
                raise UnsafeCheckpoint(f"{self.path}: manifest.json lists {name!r}, which is not a file of a checkpoint")
        return manifest

    def damage(self, part: int = 0, parts: int = 1) -> str | None:
        """Describes the first damage found in the files of this `part` out of `parts` (ranks share the reading); None: intact.

        Raises UnsafeCheckpoint, and CheckpointError for another format version."""
        try:
            _require_own_file(self.path / "manifest.json")
            expected_files = self.manifest()["files"]
        except (OSError, ValueError) as error:
            return f"{self.path}: manifest.json is missing or damaged ({error})"
        try:
            if part == 0:
                _require_private(self.path, self.path.lstat())
                if unlisted := sorted({*os.listdir(self.path)} - {"manifest.json", *expected_files}):
                    raise UnsafeCheckpoint(
                        f"{self.path}: contains {unlisted[0]}, which is not in its manifest; find out where it comes from, then"
                        " remove it"
                    )
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


def checkpoints(folder: Path) -> list[Checkpoint]:
    """All checkpoints in `folder`, newest first, unchecked. Excludes unfinished ones, which have other names, and links."""
    if not folder.is_dir():
        return []
    found = [
        Checkpoint(path)
        for path in folder.iterdir()
        if _FOLDER.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def digest_json(content: dict) -> str:
    """xxh3-128 of a JSON object, independent of the order of its keys."""
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
    """Returns the size. Raises UnsafeCheckpoint unless it is a regular file, owned by us or root, not writable by others."""
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode):
        kind = "a link" if stat.S_ISLNK(info.st_mode) else "not a regular file"
        raise UnsafeCheckpoint(f"{path}: is {kind}; a checkpoint has only regular files")
    _require_private(path, info)
    with open(path, "rb") as file:
        magic = file.read(2)
    if magic in _FOREIGN:
        raise UnsafeCheckpoint(f"{path}: is {_FOREIGN[magic]}, which this program never writes and never opens")
    return info.st_size


def _require_private(path: Path, info: os.stat_result) -> None:
    """Raises UnsafeCheckpoint if others own the path or may write to it.

    Some mounts (SMB, object stores, Windows disks) show one owner and 0777 for every file, or map root to another user. So an
    owner or a mode that a new file of this process also has there is accepted."""
    for_all, foreign = bool(info.st_mode & stat.S_IWOTH), info.st_uid not in (os.geteuid(), 0)
    new = _new_file(path.parent) if for_all or foreign else None
    if for_all and not (new and new.st_mode & stat.S_IWOTH):
        raise UnsafeCheckpoint(f"{path}: everyone may write to it (run chmod o-w once you are sure that nobody did)")
    if foreign and not (new and new.st_uid == info.st_uid):
        raise UnsafeCheckpoint(f"{path}: belongs to user {info.st_uid}, not to you; copy the checkpoint if you trust its owner")


def _new_file(folder: Path) -> os.stat_result | None:
    """Status of a new private file of this process in `folder`; None: it cannot write there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno())
    except OSError:
        return None


def _read_json(path: Path) -> dict:
    """Reads a JSON object of bounded size. Raises OSError, and ValueError if it is not one."""
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
