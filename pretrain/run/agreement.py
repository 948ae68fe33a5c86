"""Facts that must be equal on all ranks: settings, code, libraries, and the content of data and tokenizer.

Paths may differ from machine to machine (local copies of the data, another mount point) where the content is the same; for
run.directory, `rendezvous.meet` checks that all machines share it. Everything else must be equal, the settings of logs
included: they decide when the ranks meet in a collective.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import xxhash

from pretrain.checkpoint.manifest import checkpoints
from pretrain.config import Config
from pretrain.data.sources import FileSource, ShardedSource
from pretrain.engines.base import default_precision
from pretrain.run.parts import Parts
from pretrain.schema import flatten, shown, to_dict

ROOT = Path(__file__).resolve().parents[2]
_PATHS = (
    "run.directory",
    "tokenizer.path",
    "data.train",
    "data.valid",
    "train.stages",
    "data.quarantine",
    "evaluate.tasks",
    "model.from_pretrained",
)
_LIBRARIES = ("torch", "accelerate", "deepspeed", "numpy", "safetensors")
_SAMPLE_BYTES, _SAMPLES = 2**16, 16


def facts(config: Config, parts: Parts, folder: Path) -> dict[str, str]:
    """The facts of this rank by key, with values for people. folder: of the run. Raises OSError."""
    known = flatten(to_dict(config) | {"model": asdict(parts.model)})
    known = {key: shown(value) for key, value in known.items() if key not in _PATHS}
    known["train.stages"] = shown([to_dict(dataclasses.replace(each, sources=None)) for each in config.train.stages or []])
    known["engine.precision"] = default_precision(config.engine)
    known["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if not config.data.synthetic:
        for i, source in enumerate(parts.data.sources):
            weights = ", ".join(f"{stage.weights[i]:g}" for stage in parts.data.stages)
            known[source.where] = f"{_content(source)}, weight {weights}"
        known |= {f"data.valid[{i}]": _content(each.source) for i, each in enumerate(parts.valid)}
    known["data.quarantine"] = _digest(json.dumps(parts.data.quarantine).encode())
    known |= {f"task {each.name}": f"{each.of:,} items, fingerprint {each.fingerprint[:12]}" for each in parts.tasks}
    known["tokenizer"] = parts.tokenizer.fingerprint if parts.tokenizer else "none"
    if config.checkpoint.resume not in ("auto", "never"):
        known["checkpoint.resume"] = weights_digest(Path(config.checkpoint.resume))
    if config.model.from_pretrained and not checkpoints(folder / "checkpoints"):  # else a checkpoint is resumed
        known["model.from_pretrained"] = weights_digest(Path(config.model.from_pretrained))
    return known | _code() | _versions(config.engine.name)


def _content(source: FileSource | ShardedSource) -> str:
    return f"{source.num_tokens:,} tokens, fingerprint {source.fingerprint()[:12]}"


def _code() -> dict[str, str]:
    """A digest of each of the project's modules: a commit does not tell of edits, and an image has none."""
    return {f"code {path.relative_to(ROOT)}": _digest(path.read_bytes()) for path in (ROOT / "pretrain").rglob("*.py")}


def _versions(engine: str) -> dict[str, str]:
    installed = {name: metadata.version(name) for name in _LIBRARIES if name != "deepspeed" or engine.startswith("zero")}
    installed["python"] = ".".join(platform.python_version_tuple()[:2])
    if torch.cuda.is_available():
        installed["cuda"], installed["nccl"] = str(torch.version.cuda), ".".join(map(str, torch.cuda.nccl.version()))
    return {f"version of {name}": version for name, version in installed.items()}


def weights_digest(path: Path) -> str:
    """Digest of sizes and samples of the model files in a folder, or in the newest checkpoint of a run's folder: enough to tell
    models apart. `not there` if the folder has none."""
    if found := checkpoints(path / "checkpoints"):
        path = found[0].path
    files = sorted([*path.glob("*.safetensors"), *path.glob("manifest.json"), *path.glob("config.json")])
    digest = xxhash.xxh3_128()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as stream:
            for start in np.linspace(0, max(0, size - _SAMPLE_BYTES), _SAMPLES).astype(int).tolist():
                stream.seek(start)
                digest.update(stream.read(_SAMPLE_BYTES))
    return f"fingerprint {digest.hexdigest()[:12]}" if files else "not there"


def _digest(content: bytes) -> str:
    return xxhash.xxh3_128(content).hexdigest()[:12]
