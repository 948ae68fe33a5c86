"""Shards: the token files that the path of a source names, and what they have in common.

    data/web_train     one file: a .bin/.idx pair by its prefix, or a flat .bin
    data/web           a folder: all token files in it, but not those in folders below it
    data/web/part-*    a pattern with *, ? or [abc]: all token files that match; ** stands for any number of folders
    [data/a, data/b]   a list of these
    data/ids           a folder of `save_to_disk`: its Arrow files; they can be named alone, too
    s3://bucket/web/   URLs name the same in a store, where the name of a folder ends with a slash

The files of an entry are in the order of their names, so the order does not depend on where the data are. A thousand files open
in a fraction of a second: each costs a few small reads, side by side in threads, because on network file systems most of that
time is waiting. It knows token files and their sidecars; not samples. No torch.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash

from . import remote
from .arrow import ArrowFile, files_of_dataset, splits_of
from .indexed import DataError, DataMissing, Sidecar, TokenFile, conversion, is_table
from .reads import SAMPLE_RUNS, OpenFiles
from .remote import is_url

_ON_DISK, IN_STORE = 16, 64  # shards that are opened at a time
_PROBLEMS_SHOWN = 5
T, U = TypeVar("T"), TypeVar("U")


# ---------------------------------------------------------------- the files that a path names


def is_one_file(path: str | list[str]) -> bool:
    """True for the prefix of a pair or the name of a flat file, whether it exists or not."""
    if not isinstance(path, str):
        return False
    if is_url(path):
        return not path.endswith("/") and not any(each in path for each in "*?[")
    if os.path.isfile(path) or (not path.endswith(os.sep) and os.path.isfile(f"{path}.idx")):
        return True  # also where a folder of the same name is beside the pair, or the name has a bracket
    return not os.path.isdir(path) and not any(each in path for each in "*?[")


def find_files(path: str | list[str]) -> list[str]:
    """Prefixes of pairs and names of flat files. Raises DataMissing for an entry that names none, DataError for a file that is
    named twice."""
    entries = [path] if isinstance(path, str) else path
    if not entries:
        raise DataMissing("an empty list; name at least one token file, folder or pattern")
    found: dict[str, str] = {}
    for entry in entries:
        for name in [entry] if is_one_file(entry) else _matching(entry):
            if (real := identity(name)) in found:
                raise DataError(f"{name}: named twice in {path}, also as {found[real]}; name each file once")
            found[real] = name
    return list(found.values())


def identity(name: str) -> str:
    """The file behind a name; equal for two names of one file."""
    file = name if name.endswith((".bin", ".arrow")) else f"{name}.bin"
    return file if is_url(file) else os.path.realpath(file)


def _matching(entry: str) -> list[str]:
    if os.path.isdir(entry) and (listed := files_of_dataset(entry)):
        return listed
    if is_url(entry):
        pattern = entry + "*" if entry.endswith("/") else entry
        found, exists = remote.matching, remote.exists
    else:
        pattern = os.path.join(glob.escape(entry), "*") if os.path.isdir(entry) else entry
        found, exists = partial(glob.iglob, recursive=True), os.path.exists
    matches = {each for end in ("", ".bin", ".idx") for each in found(pattern + end)}
    names = set()
    for match in matches:
        prefix, end = os.path.splitext(match)
        if end == ".bin":
            pair = any(prefix + each in matches or exists(prefix + each) for each in (".idx", ".json"))
            names.add(prefix if pair else match)
        elif end == ".idx":
            names.add(prefix)
    names = names or _arrow_files(matches)
    if not names:
        raise DataMissing(f"{entry}: no token file here; {_advice(entry, matches)}")
    return sorted(names)


def _arrow_files(matches: set[str]) -> set[str]:
    """The Arrow files among the matches of an entry, without those that a data set beside them does not list."""
    found = {each for each in matches if each.endswith(".arrow") and not is_url(each)}
    folders = {os.path.dirname(each): files_of_dataset(os.path.dirname(each)) for each in found}
    listed = {folder: files and {os.path.basename(each) for each in files} for folder, files in folders.items()}
    return {each for each in found if (own := listed[os.path.dirname(each)]) is None or os.path.basename(each) in own}


def _advice(entry: str, matches: set[str]) -> str:
    """What to do where none of the `matches` of an entry is a token file."""
    if os.path.isdir(entry) and (splits := splits_of(entry)):
        return f"it is a data set with the splits {', '.join(splits)}; name one: {os.path.join(entry, splits[0])}"
    if is_url(entry) and any(map(is_table, matches)) and not any(each.endswith(".parquet") for each in matches):
        return "Arrow files are read on a disk only: copy them there, or convert the copy and upload the pair"
    if any(map(is_table, matches)):
        return f"if it holds ids, {conversion(entry)}"
    if folders := sorted(each for each in matches if os.path.isdir(each))[:3]:
        return f"it matches folders ({', '.join(folders)}), whose files ** finds: {entry.rstrip('*/')}/**"
    return "create them with tools/tokenize_corpus.py"


def place_of(path: str | list[str], files: list[TokenFile]) -> Path:
    """What a source is named after: its file, its folder, or what a pattern says before its first wildcard, without digits at
    the end. A list is named after its first entry; if that is a file, after its folder."""
    entry = path if isinstance(path, str) else path[0]
    if is_one_file(entry):
        place = Path(os.path.abspath(files[0].path))
        return place if entry == path else place.parent
    if os.path.isdir(entry):
        return Path(os.path.abspath(entry))
    folder, prefix = os.path.split(re.split(r"[*?[]", entry)[0])
    return Path(os.path.abspath(os.path.join(folder, prefix.rstrip("-_.0123456789"))))


# ---------------------------------------------------------------- opening them


def open_shards(
    path: str | list[str], dtype: str | None = None, vocab_size: int | None = None, *, open_files: OpenFiles | None = None
) -> list[TokenFile]:
    """All token files that `path` names, at least one. dtype, vocab_size, open_files: as of `TokenFile`.

    Raises DataMissing if there are none, DataError with the problems of all files, OSError.
    """
    if is_one_file(path):
        return [_open(path, dtype, vocab_size, open_files)]
    names, open_files = find_files(path), open_files or OpenFiles()
    runs = max(2, SAMPLE_RUNS // len(names))

    def attempt(name: str) -> TokenFile | Exception:
        try:
            return _open(name, dtype, vocab_size, open_files, runs)
        except (DataError, OSError) as error:
            return error

    threads = IN_STORE if is_url(names[0]) else _ON_DISK
    opened = side_by_side(attempt, names, min(threads, (open_files.limit or 4 * threads) // 4))  # each holds up to three files
    if problems := [each for each in opened if isinstance(each, Exception)]:
        raise problems[0] if len(problems) == 1 else DataError("\n".join(shortened(map(str, problems))))
    return opened


def _open(
    name: str, dtype: str | None, vocab_size: int | None, open_files: OpenFiles | None, sample_runs: int = SAMPLE_RUNS
) -> TokenFile:
    if name.endswith(".arrow"):
        return ArrowFile(name, dtype, open_files=open_files, sample_runs=sample_runs)
    return TokenFile(name, dtype, vocab_size, open_files=open_files, sample_runs=sample_runs)


def side_by_side(action: Callable[[T], U], shards: list[T], threads: int) -> list[U]:
    """What `action` returns for each shard."""
    if threads == 1:
        return [action(each) for each in shards]
    with ThreadPoolExecutor(threads, "open") as pool:
        return list(pool.map(action, shards))


def shortened(problems: Iterable) -> list:
    """The first few, and a text that says how many more there are: a thousand shards often have the same problem."""
    problems = list(problems)
    more = len(problems) - _PROBLEMS_SHOWN
    return problems if more <= 1 else [*problems[:_PROBLEMS_SHOWN], f"... and {more:,} more like these"]


# ---------------------------------------------------------------- what they have in common


def common_sidecar(files: list[TokenFile]) -> Sidecar | None:
    """The metadata of all files together, without checksums; None if none has a sidecar. Entropies are means, weighted by
    tokens.

    Raises DataError if only some have one, or if tokenizers or end-of-document ids differ.
    """
    first, sidecars = files[0], [file.sidecar for file in files if file.sidecar]
    if not sidecars or len(files) == 1:
        return first.sidecar
    if len(sidecars) < len(files):
        with_one, without = (next(file for file in files if bool(file.sidecar) == has) for has in (True, False))
        advice = "restore it, or make two sources of them"
        raise DataError(f"{without.path}: has no metadata sidecar ({without.path}.json), but {with_one.path} has one; {advice}")
    for name in ("tokenizer_fingerprint", "vocab_size", "end_of_document_id"):
        values = [getattr(sidecar, name) for sidecar in sidecars]
        if other := next((i for i, value in enumerate(values) if value != values[0]), None):
            text = f"{first.path} and {files[other].path} differ in {name} ({values[0]} and {values[other]})"
            raise DataError(f"{text}; the files of a source must be made with one tokenizer")
    weights = np.array([each.num_tokens for each in sidecars]) / sum(each.num_tokens for each in sidecars)
    sums = {name: sum(getattr(each, name) for each in sidecars) for name in ("num_tokens", "num_documents", "utf8_bytes")}
    means = {
        name: math.fsum(weights * [getattr(each, name) for each in sidecars])
        for name in ("unigram_entropy_nats", "bigram_entropy_nats")
    }
    return dataclasses.replace(
        first.sidecar,
        **sums,
        **means,
        dtype=common_dtype(files).name,
        max_id=max(each.max_id for each in sidecars),
        shuffled=all(each.shuffled for each in sidecars),
        corpus={"sha256": _hash(str(each.corpus.get("sha256")) for each in sidecars), "shards": len(files)},
        block_checksums=[],
        index_checksum="",
    )


def common_dtype(files: list[TokenFile]) -> np.dtype:
    """The type that holds the tokens of all files."""
    return np.result_type(*{file.dtype for file in files})


def common_fingerprint(fingerprints: list[str]) -> str:
    """Hash of the content of files with these fingerprints, in this order. That of a single file is its own."""
    return fingerprints[0] if len(fingerprints) == 1 else _hash(fingerprints)


def common_sample(files: list[TokenFile]) -> np.ndarray:
    """Samples of at most 64 files, evenly spaced, back to back: at most as many tokens as two samples of one file."""
    chosen = [files[i * len(files) // min(len(files), SAMPLE_RUNS)] for i in range(min(len(files), SAMPLE_RUNS))]
    return np.concatenate([file.sample() for file in chosen])


def _hash(texts: Iterable[str]) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(texts).encode())
