"""Reads weights from checkpoints and Hugging Face folders, and writes them to either.

A source has one method, `read`, which returns the values of a range of one flattened parameter. So nothing here holds a model,
or even a full parameter: each rank of an engine reads only what it keeps, a conversion a few megabytes at a time.

    CheckpointWeights    a checkpoint of a run, written by any engine on any number of ranks
    HFWeights            a Hugging Face folder: safetensors in fp32, bf16 or fp16
    MeanWeights          the mean of several sources

`weight_loader` turns a source into the function that an engine's `restore` calls, and extends the vocabulary if necessary.
`write_hf_folder` and `write_checkpoint` write the two kinds of folder.
"""

from __future__ import annotations

import copy
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

from pretrain import UserError, schema
from pretrain.checkpoint.manifest import Checkpoint, CheckpointError, UnsafeCheckpoint
from pretrain.checkpoint.storage import CheckpointReader, commit, write_file, write_part
from pretrain.checkpoint.tensors import BLOCK, HeaderError, StoredTensor, make_header, read_header, read_values
from pretrain.engines.shards import Shard
from pretrain.model import hf_mapping
from pretrain.model.config import CHECKS, ModelConfig, differences
from pretrain.model.hf_mapping import HFTensor, UnsupportedModel
from pretrain.model.transformer import Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_RESOLVED = ("num_key_value_heads", "head_dim", "intermediate_size", "vocab_size")
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


class ConversionError(UserError):
    """The model cannot be converted, or the result failed its verification; no output was left."""


class Weights(Protocol):
    """A source of weights."""

    model: ModelConfig
    """The resolved settings of their model."""

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Fills the 1-D fp32 tensor `into` with elements [start, start + n) of the flattened parameter `name`.

        Callers never ask for the padding rows of the vocabulary. Raises OSError, CheckpointError, UnsupportedModel."""


class CheckpointWeights:
    """The weights of a checkpoint, whose files the caller has checked: their average, if the run kept one
    (optimizer.average_decay) and `last` does not ask for the weights of the last step. Buffers have no average.

    Raises CheckpointError, and UnsafeCheckpoint unless its state.json describes the model whose weights it holds."""

    def __init__(self, checkpoint: Checkpoint, last: bool = False):
        self.model, self._pieces = _saved_model(checkpoint), CheckpointReader(checkpoint)
        found = {name: parts[0].shape for name, parts in self._pieces.by_name.items() if name.startswith("model/")}
        problem = f"{checkpoint.path}: state.json describes another model than that of its weights"
        if self.model.num_hidden_layers > len(found):
            raise UnsafeCheckpoint(problem)
        try:
            with torch.device("meta"):
                expected = Transformer(self.model).state_dict()
        except (TypeError, RuntimeError) as error:  # larger than any tensor
            raise UnsafeCheckpoint(problem) from error
        wrong = [name for name, tensor in expected.items() if found.get(f"model/{name}") != tuple(tensor.shape)]
        if wrong:
            raise UnsafeCheckpoint(f"{problem}: {wrong[0]} would be {tuple(expected[wrong[0]].shape)}")
        averages = {name.removeprefix("average/") for name in self._pieces.by_name if name.startswith("average/")}
        self.averaged = bool(averages) and not last
        self._averages = averages if self.averaged else set()

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Implements `Weights.read`."""
        stored = f"{'average' if name in self._averages else 'model'}/{name}"
        pieces = self._pieces.by_name.get(stored)
        if not pieces:
            raise CheckpointError(f"{self._pieces.path}: has no weight {name}")
        self._pieces.read_into(Shard(stored, pieces[0].shape, start, into))


def _saved_model(checkpoint: Checkpoint) -> ModelConfig:
    """The resolved model in state.json. Raises UnsafeCheckpoint if it cannot be one."""
    model, problems = _checked_model(checkpoint.state().get("model"))
    if problems:
        raise UnsafeCheckpoint(f"{checkpoint.path}: state.json does not describe a model: {problems[0]}")
    return model


def _checked_model(values: object) -> tuple[ModelConfig, list]:
    """(the model with these settings, what is wrong with them)."""
    problems: list = []
    values = copy.deepcopy(values) if isinstance(values, dict) else {"": values}
    model = schema.build(ModelConfig, values, {}, problems)
    problems = problems or [problem for check in CHECKS for problem in check(model)]
    return model, problems or [f"{key} is missing" for key in _RESOLVED if getattr(model, key) is None]


class MeanWeights:
    """The mean of several sources of one model, summed in fp64 (stochastic weight averaging, Izmailov et al. 2018)."""

    def __init__(self, sources: list[Weights]):
        self.model, self._sources = sources[0].model, sources

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Implements `Weights.read`."""
        for begin in range(0, into.numel(), BLOCK):
            block = into[begin : begin + BLOCK]
            total, values = torch.zeros(block.numel(), dtype=torch.float64), torch.empty(block.numel())
            for source in self._sources:
                source.read(name, start + begin, values)
                total += values
            block.copy_(total / len(self._sources))


class HFWeights:
    """The weights of a Hugging Face folder. Raises UnsupportedModel unless it holds exactly the tensors that its config.json
    implies, as `hf_mapping` maps them."""

    def __init__(self, folder: Path, vocab_multiple: int = 1):
        self.folder = Path(folder)
        settings = hf_mapping.from_config(hf_mapping.read_config(self.folder), self.folder / "config.json")
        self.model, problems = _checked_model(settings | {"vocab_multiple": vocab_multiple})
        if problems:
            raise UnsupportedModel(f"{self.folder / 'config.json'}: {problems[0]}")
        self._stored = _stored_tensors(self.folder)
        self._tensors: dict[str, list[HFTensor]] = {}
        layers = self.model.num_hidden_layers * (self.model.moe.num_experts if self.model.moe else 1)
        if layers > len(self._stored):
            raise UnsupportedModel(
                f"{self.folder}: config.json implies {layers:,} layers or experts, but has only {len(self._stored):,} tensors"
            )
        expected = list(hf_mapping.tensors(self.model))
        for tensor in sorted(expected, key=lambda tensor: tensor.offset):
            found = self._stored.get(tensor.name)
            if found is None or found.shape != tensor.shape:
                what = f"has shape {found.shape}" if found else "is missing"
                raise UnsupportedModel(f"{self.folder}: {tensor.name} {what}; config.json implies shape {tensor.shape}")
            if tensor.parameter is None:
                self._require_zeros(tensor)
            else:
                self._tensors.setdefault(tensor.parameter, []).append(tensor)
        known = {tensor.name for tensor in expected}
        if self.model.tie_word_embeddings and "lm_head.weight" in self._stored:
            known.add("lm_head.weight")
            self._require_the_embedding("lm_head.weight")
        if extra := sorted(name for name in self._stored.keys() - known if not name.endswith("rotary_emb.inv_freq")):
            raise UnsupportedModel(
                f"{self.folder}: holds {len(extra)} tensors that a model of its type does not have, such as {extra[0]}; "
                "ignoring them would change the model"
            )

    def _require_the_embedding(self, name: str) -> None:
        """Some folders repeat the tied matrix. If the two differ, versions of transformers differ in which one they use."""
        head, embedding = self._stored[name], self._stored["model.embed_tokens.weight"]
        count = math.prod(embedding.shape)

        def block(stored: StoredTensor, first: int) -> Tensor:
            values = torch.empty(min(BLOCK, count - first))
            read_values(stored, first, values)
            return values

        firsts = range(0, count, BLOCK)
        if head.shape != embedding.shape or not all(torch.equal(block(head, at), block(embedding, at)) for at in firsts):
            raise UnsupportedModel(
                f"{self.folder}: config.json ties the embeddings, but {name} differs from the embedding; set "
                f"tie_word_embeddings to false there if the head was trained separately, or remove {name} from the file"
            )

    def _require_zeros(self, tensor: HFTensor) -> None:
        values = torch.empty(tensor.count)
        read_values(self._stored[tensor.name], 0, values)
        if values.any():
            raise UnsupportedModel(f"{self.folder}: {tensor.name} must be all zeros, as this program's models do not have it")

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Implements `Weights.read`."""
        stop = start + into.numel()
        for tensor in self._tensors[name]:
            low, high = max(start, tensor.offset), min(stop, tensor.offset + tensor.count)
            if low < high:
                values = into[low - start : high - start]
                read_values(self._stored[tensor.name], low - tensor.offset, values)
                if tensor.factor != 1:
                    values /= tensor.factor


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder, from the headers of its files. Raises UnsupportedModel, OSError."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():  # takes precedence, as in transformers: an index beside it is a leftover
        files = ["model.safetensors"]
    elif index.is_file():
        try:
            files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UnsupportedModel(f"{index}: cannot be read ({error})") from None
    else:
        raise UnsupportedModel(
            f"{folder}: has no model.safetensors and no model.safetensors.index.json; this program never opens pickled weights "
            "(pytorch_model.bin): if you trust them, load them with transformers and call save_pretrained"
        )
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise UnsupportedModel(f"{index}: names {name!r}, which is not in this folder; is the copy or download complete?")
        try:
            tensors |= read_header(folder / name).tensors
        except HeaderError as error:
            raise UnsupportedModel(f"{folder / name}: is not a usable safetensors file ({error})") from None
    return tensors


# ---------------------------------------------------------------- into a model


def weight_loader(source: Weights, target: ModelConfig) -> Callable[[Shard], None]:
    """A function for an engine's `restore` that fills a shard of any parameter of `target` with the weights of `source`.

    New rows of the vocabulary are the mean of all old ones, in the embedding and in the head: a new id then starts with the
    probability of an average one, and the probabilities of old ids hardly change (Hewitt 2021). Padding rows are 0, and the
    routers' record of the last batch is reset. Raises UnsupportedModel if the two models differ in more than the vocabulary.
    """
    width, old, new = target.hidden_size, source.model.vocab_size, target.vocab_size
    if found := differences(source.model, target):
        raise UnsupportedModel(
            "the weights belong to a different model: " + "; ".join(f"{key} is {old}, not {new}" for key, old, new in found)
        )
    means: dict[str, Tensor] = {}

    def fill(shard: Shard) -> None:
        name, start, values = shard.name.removeprefix("model/"), shard.offset, shard.values
        if name.endswith(".expert_share"):
            values.fill_(1 / shard.shape[0])
            return
        if name not in _VOCABULARY:
            source.read(name, start, values)
            return
        stop = start + values.numel()
        known = min(stop, old * width)
        if start < known:
            source.read(name, start, values[: known - start])
        fresh = max(start, old * width)
        if fresh < min(stop, new * width):
            if name not in means:
                means[name] = _mean_row(source, name)
            rows = torch.arange(fresh, min(stop, new * width), device=values.device) % width
            values[fresh - start : min(stop, new * width) - start] = means[name].to(values.device)[rows]
        values[max(0, new * width - start) :] = 0

    return fill


def _mean_row(source: Weights, name: str) -> Tensor:
    """The mean of the rows of the vocabulary, (D,) fp32."""
    rows, width = source.model.vocab_size, source.model.hidden_size
    total, step = torch.zeros(width, dtype=torch.float64), max(1, BLOCK // width)
    for row in range(0, rows, step):
        block = torch.empty(min(step, rows - row) * width)
        source.read(name, row * width, block)
        total += block.view(-1, width).double().sum(0)
    return (total / rows).float()


def load_transformer(source: Weights, dtype: torch.dtype | None = None) -> Transformer:
    """The model on the CPU in fp32. dtype: round values as a folder of that dtype does; None: keep them as they are."""
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


def write_hf_folder(
    folder: Path, source: Weights, dtype: str, max_file_bytes: int, on_progress: Callable[[int], None] = lambda done: None
) -> dict[str, dict]:
    """Writes the weights as Hugging Face's safetensors into an existing folder. Returns {file: {"bytes", "xxh3"}}.

    dtype: fp32, bf16 or fp16. on_progress: called with the bytes written so far. Raises OSError, and ConversionError for a
    value that is not finite in that dtype.
    """
    plan = _plan(list(hf_mapping.tensors(source.model)), DTYPES[dtype], max_file_bytes)
    files, weight_map, done = {}, {}, 0
    for number, tensors in enumerate(plan, start=1):
        name = "model.safetensors" if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        blocks = _hf_file(source, tensors, DTYPES[dtype], lambda n, before=done: on_progress(before + n))
        files[name] = write_file(folder / name, blocks)
        done += files[name]["bytes"]
        weight_map |= {tensor.name: name for tensor in tensors}
    if len(plan) > 1:
        size = sum(tensor.count * _dtype_of(tensor, DTYPES[dtype]).itemsize for tensors in plan for tensor in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        text = json.dumps(index, indent=1).encode()
        files["model.safetensors.index.json"] = write_file(folder / "model.safetensors.index.json", [text])
    for name in files:
        os.chmod(folder / name, 0o644)
    return files


def _dtype_of(tensor: HFTensor, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if tensor.keep_fp32 else dtype


def _plan(tensors: list[HFTensor], dtype: torch.dtype, max_file_bytes: int) -> list[list[HFTensor]]:
    """The tensors of each file: as many as fit, at least one. fp32 tensors come first, so that every value is aligned."""
    files: list[list[HFTensor]] = [[]]
    room = max_file_bytes
    for tensor in tensors:
        size = tensor.count * _dtype_of(tensor, dtype).itemsize
        if files[-1] and size > room:
            files.append([])
            room = max_file_bytes
        files[-1].append(tensor)
        room -= size
    return [sorted(file, key=lambda tensor: not tensor.keep_fp32) for file in files]


def _hf_file(
    source: Weights, tensors: list[HFTensor], dtype: torch.dtype, on_progress: Callable[[int], None]
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, block by block."""
    header = [(tensor.name, _NAMES[_dtype_of(tensor, dtype)], tensor.shape) for tensor in tensors]
    yield make_header(header, metadata={"format": "pt"})
    done, buffer = 0, torch.empty(BLOCK)
    for tensor in tensors:
        for first in range(0, tensor.count, BLOCK):
            block = buffer[: min(BLOCK, tensor.count - first)]
            read_tensor(source, tensor, first, block)
            cast = block.to(_dtype_of(tensor, dtype))
            low, high = torch.aminmax(cast)
            if not (math.isfinite(low) and math.isfinite(high)):
                largest = f"its largest value is {block.abs().max().item():.3g}"
                raise ConversionError(f"{tensor.name} is not finite as {cast.dtype} ({largest}); use bf16 or fp32")
            yield memoryview(cast.view(torch.uint8).numpy())
            done += cast.nbytes
            on_progress(done)


def read_tensor(source: Weights, tensor: HFTensor, first: int, into: Tensor) -> None:
    """Elements [first, first + n) of one of Hugging Face's tensors in fp32, before any cast. Raises as `Weights.read` does."""
    if tensor.parameter is None:
        into.zero_()
        return
    source.read(tensor.parameter, tensor.offset + first, into)
    if tensor.factor != 1:
        into *= tensor.factor


def write_checkpoint(
    folder: Path, source: Weights, state: dict, on_progress: Callable[[int], None] = lambda done: None
) -> Checkpoint:
    """Writes `folder`/step_00000000: a checkpoint without moments, to start a run from or to convert again.

    on_progress: called with the bytes written so far. Raises OSError, and ConversionError for a value that is not finite."""
    temporary = folder / ".tmp-step_00000000"
    temporary.mkdir(mode=0o700, parents=True)
    try:
        write_part(temporary, 0, 1, _checkpoint_files(source, on_progress))
        text = json.dumps({**state, "step": 0, "optimizer_updates": 0}, indent=1).encode()
        return commit(temporary, text, 1)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _checkpoint_files(source: Weights, on_progress: Callable[[int], None]) -> Iterator[list[Shard]]:
    """The parameters, file by file; files are at most 128 MiB, which bounds the memory in use."""
    with torch.device("meta"):
        parameters = Transformer(source.model).state_dict()
    fill, most = weight_loader(source, source.model), 1 << 25
    file: list[Shard] = []
    room, done = most, 0
    for name, tensor in parameters.items():
        start = 0
        while start < tensor.numel():
            count = min(tensor.numel() - start, room)
            shard = Shard(f"model/{name}", tuple(tensor.shape), start, torch.empty(count))
            fill(shard)
            if not shard.values.isfinite().all():
                raise ConversionError(f"{name} is not finite: the model had diverged, or its file is damaged")
            file.append(shard)
            start, room, done = start + count, room - count, done + 4 * count
            if not room:
                yield file
                file, room = [], most
                on_progress(done)
    if file:
        yield file
