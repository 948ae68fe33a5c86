"""Where weights come from and where they go: checkpoints of runs, folders of Hugging Face, the mean of several checkpoints.

Every source answers one question, `read`: which values does a stretch of one flattened parameter have? So nothing here ever
holds a model, nor a whole parameter: an engine's rank reads what it keeps, a converter a few megabytes at a time.

    CheckpointWeights    a checkpoint of a run, of any engine on any number of ranks
    FolderWeights        a Hugging Face folder: safetensors in fp32, bf16 or fp16
    MeanWeights          the mean of several sources

`weight_loader` makes of a source what an engine's `restore` asks for, and extends the vocabulary on the way. `write_folder` and
`write_checkpoint` write the two kinds of folder.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pretrain.checkpoint.manifest import Checkpoint, CheckpointError
from pretrain.checkpoint.storage import CheckpointReader, commit, write_file, write_part
from pretrain.checkpoint.tensors import BLOCK, HeaderError, StoredTensor, make_header, read_header, read_values
from pretrain.engines.base import Shard
from pretrain.model import hf_mapping
from pretrain.model.config import ModelConfig, differences, model_from_dict
from pretrain.model.hf_mapping import Part, UnsupportedModel
from pretrain.model.transformer import Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


class Weights(Protocol):
    """A source of weights."""

    model: ModelConfig
    """Of the model that they make, resolved."""

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Fills the 1-D fp32 tensor `into` with elements [start, start + n) of the flattened parameter `name`.

        Padding rows of the vocabulary are not asked for. Raises OSError, CheckpointError, UnsupportedModel."""


class CheckpointWeights:
    """The weights of a checkpoint that was verified. Raises CheckpointError."""

    def __init__(self, checkpoint: Checkpoint):
        self.model, self._pieces = model_from_dict(checkpoint.state()["model"]), CheckpointReader(checkpoint)

    def read(self, name: str, start: int, into: Tensor) -> None:
        """See `Weights`."""
        pieces = self._pieces.by_name.get(f"model/{name}")
        if not pieces:
            raise CheckpointError(f"{self._pieces.path}: has no weight {name}")
        self._pieces.read_into(Shard(f"model/{name}", pieces[0].shape, start, into))


class MeanWeights:
    """The mean of several sources of one model, summed in fp64. Source: Izmailov et al. 2018 (stochastic weight averaging)."""

    def __init__(self, sources: list[Weights]):
        self.model, self._sources = sources[0].model, sources

    def read(self, name: str, start: int, into: Tensor) -> None:
        """See `Weights`."""
        for begin in range(0, into.numel(), BLOCK):
            block = into[begin : begin + BLOCK]
            total, one = torch.zeros(block.numel(), dtype=torch.float64), torch.empty(block.numel())
            for source in self._sources:
                source.read(name, start + begin, one)
                total += one
            block.copy_(total / len(self._sources))


class FolderWeights:
    """The weights of a Hugging Face folder. Raises UnsupportedModel unless it holds exactly the tensors of a model of ours."""

    def __init__(self, folder: Path, vocab_multiple: int = 1):
        self.folder = Path(folder)
        settings = hf_mapping.from_config(hf_mapping.read_config(self.folder), self.folder / "config.json")
        self.model = model_from_dict(settings | {"vocab_multiple": vocab_multiple})
        self._places = _places(self.folder)
        self._parts: dict[str, list[Part]] = {}
        for part in hf_mapping.parts(self.model):
            self._parts.setdefault(part.ours or part.name, []).append(part)
            found = self._places.get(part.name)
            if found is None or found.shape != part.shape:
                has = f"of shape {found.shape}" if found else "missing"
                raise UnsupportedModel(f"{self.folder}: {part.name} must have shape {part.shape} by config.json, it is {has}")
        for parts in self._parts.values():
            parts.sort(key=lambda part: part.start)
        known = {part.name for parts in self._parts.values() for part in parts}
        if self.model.tie_word_embeddings and "lm_head.weight" in self._places:
            known.add("lm_head.weight")
            self._require_the_embedding("lm_head.weight")
        for part in hf_mapping.parts(self.model):
            if part.ours is None:
                self._require_zeros(part)
        if strange := sorted(name for name in self._places.keys() - known if not name.endswith("rotary_emb.inv_freq")):
            raise UnsupportedModel(
                f"{self.folder}: holds {len(strange)} tensors that a model of its type does not have, such as {strange[0]}; "
                "without them it would be another model"
            )

    def _require_the_embedding(self, name: str) -> None:
        """Some folders repeat the tied matrix. If it is another one, versions of transformers differ in which they take."""
        head, embedding = self._places[name], self._places["model.embed_tokens.weight"]
        count = math.prod(embedding.shape)

        def block(place: StoredTensor, first: int) -> Tensor:
            values = torch.empty(min(BLOCK, count - first))
            read_values(place, first, values)
            return values

        firsts = range(0, count, BLOCK)
        if head.shape != embedding.shape or not all(torch.equal(block(head, at), block(embedding, at)) for at in firsts):
            raise UnsupportedModel(
                f"{self.folder}: config.json ties the embeddings, but {name} is not the embedding; set tie_word_embeddings to "
                f"false there if the head was trained on its own, or take {name} out of the file"
            )

    def _require_zeros(self, part: Part) -> None:
        values = torch.empty(part.count)
        read_values(self._places[part.name], 0, values)
        if values.any():
            raise UnsupportedModel(f"{self.folder}: {part.name} must be 0 everywhere: this program's models have none")

    def read(self, name: str, start: int, into: Tensor) -> None:
        """See `Weights`."""
        stop = start + into.numel()
        for part in self._parts[name]:
            low, high = max(start, part.start), min(stop, part.start + part.count)
            if low < high:
                values = into[low - start : high - start]
                read_values(self._places[part.name], low - part.start, values)
                if part.factor != 1:
                    values /= part.factor


def _places(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder, by the headers of its files alone. Raises UnsupportedModel, OSError."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():  # first, as for transformers: an index beside it is a leftover
        files = ["model.safetensors"]
    elif index.is_file():
        try:
            files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UnsupportedModel(f"{index}: cannot be read ({error})") from None
    else:
        raise UnsupportedModel(
            f"{folder}: has no model.safetensors and no model.safetensors.index.json; pickled weights (pytorch_model.bin) are "
            "never opened: let transformers load them where you trust them, and save_pretrained"
        )
    places: dict[str, StoredTensor] = {}
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise UnsupportedModel(f"{index}: names {name!r}, which is not in this folder; is the copy or download complete?")
        try:
            places |= read_header(folder / name).tensors
        except HeaderError as error:
            raise UnsupportedModel(f"{folder / name}: is not a safetensors file that can be used ({error})") from None
    return places


# ---------------------------------------------------------------- into a model


def weight_loader(source: Weights, target: ModelConfig) -> Callable[[Shard], None]:
    """What fills a piece of any parameter of `target` with the weights of `source`: give it to an engine's `restore`.

    New rows of the vocabulary are the mean of all old ones, in the embedding and in the head: a new id then begins with the
    probability of an average one, and no old id's changes much (Hewitt 2021). Padding rows are 0, and what a router remembers
    of the last batch is forgotten. Raises UnsupportedModel where the weights are not those of such a model.
    """
    width, old, new = target.hidden_size, source.model.vocab_size, target.vocab_size
    if found := differences(source.model, target):
        raise UnsupportedModel(
            "the weights are of another model: " + "; ".join(f"{key} is {old}, not {new}" for key, old, new in found)
        )
    means: dict[str, Tensor] = {}

    def fill(shard: Shard) -> None:
        name, start, piece = shard.name.removeprefix("model/"), shard.offset, shard.values
        if name.endswith(".expert_share"):
            piece.fill_(1 / shard.shape[0])
            return
        if name not in _VOCABULARY:
            source.read(name, start, piece)
            return
        stop = start + piece.numel()
        known = min(stop, old * width)
        if start < known:
            source.read(name, start, piece[: known - start])
        fresh = max(start, old * width)
        if fresh < min(stop, new * width):
            if name not in means:
                means[name] = _mean_row(source, name)
            rows = torch.arange(fresh, min(stop, new * width), device=piece.device) % width
            piece[fresh - start : min(stop, new * width) - start] = means[name].to(piece.device)[rows]
        piece[max(0, new * width - start) :] = 0

    return fill


def _mean_row(source: Weights, name: str) -> Tensor:
    """Mean over the rows of the vocabulary, (D,) fp32."""
    rows, width = source.model.vocab_size, source.model.hidden_size
    total, step = torch.zeros(width, dtype=torch.float64), max(1, BLOCK // width)
    for row in range(0, rows, step):
        block = torch.empty(min(step, rows - row) * width)
        source.read(name, row * width, block)
        total += block.view(-1, width).double().sum(0)
    return (total / rows).float()


def load_transformer(source: Weights, dtype: torch.dtype | None = None) -> Transformer:
    """The model, on the CPU in fp32. dtype: values are rounded to it, as in a folder of that dtype. None: as they are."""
    with torch.device("meta"):
        model = Transformer(source.model)
    model.to_empty(device="cpu")
    fill = weight_loader(source, source.model)
    with torch.no_grad():
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            fill(Shard(f"model/{name}", tuple(tensor.shape), 0, tensor.view(-1)))
            if dtype is not None and not name.endswith(hf_mapping.KEPT_FP32):
                tensor.copy_(tensor.to(dtype))
    return model.eval()


# ---------------------------------------------------------------- into folders


def write_folder(
    folder: Path, source: Weights, dtype: str, max_file_bytes: int, beat: Callable[[int], None] = lambda done: None
) -> dict[str, dict]:
    """Writes the weights as Hugging Face's safetensors into an existing folder: {file: {"bytes", "xxh3"}}.

    dtype: fp32, bf16 or fp16. beat: called with the bytes written so far. Raises OSError, and ValueError where a value is not
    finite or does not fit into the dtype.
    """
    plan = _plan(list(hf_mapping.parts(source.model)), DTYPES[dtype], max_file_bytes)
    files, weight_map, done = {}, {}, 0
    for number, parts in enumerate(plan, start=1):
        name = "model.safetensors" if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        files[name] = write_file(folder / name, _tensors(source, parts, DTYPES[dtype], lambda n, d=done: beat(d + n)))
        done += files[name]["bytes"]
        weight_map |= {part.name: name for part in parts}
    if len(plan) > 1:
        size = sum(part.count * _dtype_of(part, DTYPES[dtype]).itemsize for parts in plan for part in parts)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        text = json.dumps(index, indent=1).encode()
        files["model.safetensors.index.json"] = write_file(folder / "model.safetensors.index.json", [text])
    for name in files:
        os.chmod(folder / name, 0o644)
    return files


def _dtype_of(part: Part, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if part.keep_fp32 else dtype


def _plan(parts: list[Part], dtype: torch.dtype, max_file_bytes: int) -> list[list[Part]]:
    """The parts of each file: as many as fit, at least one. fp32 comes first, so that every value is aligned."""
    files: list[list[Part]] = [[]]
    room = max_file_bytes
    for part in parts:
        size = part.count * _dtype_of(part, dtype).itemsize
        if files[-1] and size > room:
            files.append([])
            room = max_file_bytes
        files[-1].append(part)
        room -= size
    return [sorted(file, key=lambda part: not part.keep_fp32) for file in files]


def _tensors(
    source: Weights, parts: list[Part], dtype: torch.dtype, beat: Callable[[int], None]
) -> Iterator[bytes | memoryview]:
    """A safetensors file, block by block."""
    yield make_header([(part.name, _NAMES[_dtype_of(part, dtype)], part.shape) for part in parts], metadata={"format": "pt"})
    done, buffer = 0, torch.empty(BLOCK)
    for part in parts:
        for begin in range(0, part.count, BLOCK):
            block = buffer[: min(BLOCK, part.count - begin)]
            read_part(source, part, begin, block)
            cast = block.to(_dtype_of(part, dtype))
            low, high = torch.aminmax(cast)
            if not (math.isfinite(low) and math.isfinite(high)):
                largest = f"its largest value is {block.abs().max().item():.3g}"
                raise ValueError(f"{part.name} is not finite as {cast.dtype} ({largest}); use bf16 or fp32")
            yield memoryview(cast.view(torch.uint8).numpy())
            done += cast.nbytes
            beat(done)


def read_part(source: Weights, part: Part, first: int, into: Tensor) -> None:
    """Elements [first, first + n) of a tensor of Hugging Face's files, before it is cast. Raises as `Weights.read`."""
    if part.ours is None:
        into.zero_()
        return
    source.read(part.ours, part.start + first, into)
    if part.factor != 1:
        into *= part.factor


def write_checkpoint(folder: Path, source: Weights, state: dict, beat: Callable[[int], None] = lambda done: None) -> Checkpoint:
    """Writes `folder`/step_00000000: a checkpoint without moments, to begin from or to convert again.

    Raises OSError, and ValueError where a value is not finite."""
    temporary = folder / ".tmp-step_00000000"
    temporary.mkdir(mode=0o700, parents=True)
    try:
        write_part(temporary, 0, 1, _files(source, beat))
        text = json.dumps({**state, "step": 0, "optimizer_updates": 0}, indent=1).encode()
        return commit(temporary, text, 1)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _files(source: Weights, beat: Callable[[int], None]) -> Iterator[list[Shard]]:
    """The model's parameters in files of at most 128 MiB, so that no more is held at a time."""
    with torch.device("meta"):
        whole = Transformer(source.model).state_dict()
    fill, most = weight_loader(source, source.model), 1 << 25
    file: list[Shard] = []
    room, done = most, 0
    for name, tensor in whole.items():
        start = 0
        while start < tensor.numel():
            count = min(tensor.numel() - start, room)
            shard = Shard(f"model/{name}", tuple(tensor.shape), start, torch.empty(count))
            fill(shard)
            if not shard.values.isfinite().all():
                raise ValueError(f"{name} is not finite: its model had diverged, or the file is damaged")
            file.append(shard)
            start, room, done = start + count, room - count, done + 4 * count
            if not room:
                yield file
                file, room = [], most
                beat(done)
    if file:
        yield file
