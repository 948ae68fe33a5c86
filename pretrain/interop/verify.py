"""Verifies that a Hugging Face folder holds a given model: loads the folder with transformers and compares the two.

The comparisons, in this order; the first difference raises `VerificationError`:

    settings     config.json describes the model, and transformers builds the class that it names
    weights      every tensor, bit for bit after rounding to the folder's dtype; no tensor missing or extra
    tokenizer    the same fingerprint, the same ids in transformers, all of them in the vocabulary
    structure    tied embeddings, rows of the vocabulary, dtype; no missing or unexpected keys when transformers loads it
    numbers      logits and loss of a batch, both models in fp32 from the rounded weights
    generation   the same greedy continuation, both with a cache of keys and values

A model that does not fit into memory is compared layer by layer: each layer in a model of its own, between the embedding and
the head. Generation is then left out, and the report says so. This module writes no files.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from pretrain import UserError
from pretrain.data.tokenizer import Tokenizer
from pretrain.interop.load import TrainedModel
from pretrain.interop.weights import BLOCK, DTYPES, Weights, load_transformer, read_tensor
from pretrain.model import hf_mapping
from pretrain.model.attention import KeyValueCache
from pretrain.model.config import ModelConfig
from pretrain.model.flops import num_parameters
from pretrain.model.transformer import Transformer
from pretrain.report.progress import Progress

LOGITS_BOUND = 1e-5
"""Largest allowed difference of a logit, relative to the largest logit if that is above 1."""
LOSS_BOUND = 1e-5
"""Largest allowed difference of the mean loss, in nats."""
_TEXTS = [
    "def area(radius: float) -> float:\n    return 3.14159 * radius**2\n",
    "The quick brown fox jumps over the lazy dog; 1,024 of 4,096 tokens were left.",
    "Übergrößenträger aßen Smørrebrød in Kraków \u2014 \u4f60\u597d\uff0c\u4e16\u754c \U0001f30d",
]
_POSITIONS, _NEW_TOKENS, _TRIES = 64, 16, 3


class VerificationError(UserError):
    """The folder does not hold the model; the message says where they differ."""


def compare_with_transformers(folder: Path, trained: TrainedModel, dtype: str | None, scope: str = "auto") -> dict[str, Any]:
    """Compares the two, and returns what was found equal, ready for JSON. Progress goes to standard error.

    dtype: fp32, bf16 or fp16 if the folder was written from the model in that dtype. None if it was read from the folder: then
    another program may have written settings and weights in a different form, so these two are not compared.
    scope: whole, layers, or auto (whole if the model fits into half of the free memory). Raises VerificationError, OSError.
    """
    if scope == "auto":
        needed = 4 * num_parameters(trained.model).total
        scope = "whole" if needed < psutil.virtual_memory().available / 2 else "layers"
    transformers.logging.disable_progress_bar()  # a line per layer says more
    rounded = DTYPES[dtype] if dtype else None
    found: dict[str, Any] = {"scope": scope}
    if rounded is not None:
        found["settings"] = _compare_settings(folder, trained.model)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        with Progress("comparing weights", size) as progress:
            found["weights"] = _compare_weights(folder, trained.weights, rounded, progress.update)
    found["tokenizer"] = _compare_tokenizers(folder, trained)
    if (trained.model.sliding_window or 0) >= _batch(trained, 0).shape[1]:
        found["sliding_window"] = "compared as a setting only: it is longer than the batch"
    _info(f"comparing logits with transformers, {'the whole model' if scope == 'whole' else 'layer by layer'}")
    if scope == "whole":
        return found | _compare_whole(folder, trained, rounded)
    layers = []
    for number in range(trained.model.num_hidden_layers):
        source, batches = OneLayer(trained.weights, number), _batches(trained)
        their_numbers = _their_numbers(_load_one_layer(folder, source), batches, source.model)
        layers.append(_compare_numbers(load_transformer(source, rounded), batches, their_numbers, f"layer {number}: "))
        _info(f"layer {number + 1} of {trained.model.num_hidden_layers} is equal")
    worst = max(layers, key=lambda each: each["logits"]["difference"])
    return found | worst | {"generation": "not compared: the model was compared layer by layer"}


def _info(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- files


def _compare_settings(folder: Path, model: ModelConfig) -> dict[str, Any]:
    config = hf_mapping.read_config(folder)
    wanted = hf_mapping.from_config(hf_mapping.to_config(model, "float32", {}), "the model")
    got = hf_mapping.from_config(config, folder / "config.json")
    for key, value in wanted.items():
        if got[key] != value:
            raise VerificationError(f"{key} is {got[key]} in config.json, {value} in the model")
    return {"class": config["architectures"][0], "keys": len(wanted)}


def _compare_weights(folder: Path, source: Weights, dtype: torch.dtype, on_progress: Callable[[int], None]) -> dict[str, Any]:
    """Compares all tensors bit for bit, read by the safetensors library. on_progress: called with the bytes compared so far."""
    done, files = 0, sorted(folder.glob("*.safetensors"))
    tensors = {tensor.name: tensor for tensor in hf_mapping.tensors(source.model)}
    unseen = set(tensors)
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.offset_keys():
                if name not in unseen:
                    raise VerificationError(f"{path.name}: {name} is not a tensor of the model, or is in two files")
                unseen.remove(name)
                tensor, stored = tensors[name], file.get_slice(name)  # indexing reads the bytes
                if tuple(stored.get_shape()) != tensor.shape:
                    raise VerificationError(f"{name} has shape {tuple(stored.get_shape())}, {tensor.shape} in the model")
                for first, values in _rows(stored, tensor.shape):
                    wanted = torch.empty(values.numel())
                    read_tensor(source, tensor, first, wanted)
                    wanted = wanted.to(torch.float32 if tensor.keep_fp32 else dtype)
                    if values.dtype != wanted.dtype or not torch.equal(_bits(values), _bits(wanted)):
                        raise VerificationError(f"{name} differs from the model's: {_first_difference(values, wanted)}")
                    done += values.nbytes
                    on_progress(done)
    if unseen:
        raise VerificationError(f"the folder lacks {min(unseen)} ({len(unseen)} tensors are missing)")
    return {"tensors": len(tensors), "dtype": str(dtype).removeprefix("torch."), "files": len(files), "difference": 0.0}


def _rows(tensor: Any, shape: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """(first element, values) of blocks of complete rows."""
    width = math.prod(shape[1:])
    step = max(1, BLOCK // max(1, width))
    for row in range(0, shape[0] if width else 0, step):
        yield row * width, tensor[row : row + step].flatten()


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def _first_difference(values: Tensor, wanted: Tensor) -> str:
    if values.dtype != wanted.dtype:
        return f"it is {values.dtype}, not {wanted.dtype}"
    place = int((_bits(values) != _bits(wanted)).nonzero()[0])
    return f"{values[place].item():.6g}, {wanted[place].item():.6g} in the model"


def _compare_tokenizers(folder: Path, trained: TrainedModel) -> dict[str, Any] | None:
    if trained.tokenizer is None:
        return None
    ours, copy = Tokenizer.load(trained.tokenizer), Tokenizer.load(folder)
    if copy.fingerprint != ours.fingerprint:
        raise VerificationError(f"the tokenizer has the fingerprint {copy.fingerprint}, the model's has {ours.fingerprint}")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    count = 0
    for text in _TEXTS:
        ids = ours.encode(text)
        got = theirs(text, add_special_tokens=False)["input_ids"]
        if got != ids:
            raise VerificationError(f"the tokenizer gives {got[:8]}... in transformers and {ids[:8]}... here for {text[:20]!r}")
        if max(ids) >= trained.model.vocab_size:
            raise VerificationError(f"the tokenizer gives id {max(ids)}, the model has ids 0 to {trained.model.vocab_size - 1}")
        count += len(ids)
    if theirs.eos_token_id != ours.end_of_document_id:
        raise VerificationError(
            f"the tokenizer ends texts with id {theirs.eos_token_id} in transformers, with {ours.end_of_document_id} here"
        )
    return {"fingerprint": ours.fingerprint, "ids": count, "class": type(theirs).__name__}


# ---------------------------------------------------------------- numbers


def _batch(trained: TrainedModel, number: int) -> Tensor:
    """Batch `number`, (2, T): a row of text, if there is a tokenizer, and a row of random ids. T exceeds the sliding window, if
    that is below 1024."""
    model = trained.model
    window = model.sliding_window or 0
    length = min(max(_POSITIONS, window + 16 if window < 1024 else 0), max(2, model.max_position_embeddings))
    generator = torch.Generator().manual_seed(number)
    tokens_BT = torch.randint(0, model.vocab_size, (2, length), generator=generator)
    if trained.tokenizer is not None:
        tokenizer = Tokenizer.load(trained.tokenizer)
        ids = [token for text in _TEXTS for token in tokenizer.encode(text)]
        tokens_BT[0] = torch.tensor([ids[(number + at) % len(ids)] for at in range(length)])
    return tokens_BT


class OneLayer:
    """The weights of a one-layer model: layer `number` of a model, between its embedding and its head."""

    def __init__(self, source: Weights, number: int):
        self.model, self.number, self._source = replace(source.model, num_hidden_layers=1), number, source

    def full_name(self, name: str) -> str:
        """The name of a tensor in the full model."""
        return name.replace("model.layers.0.", f"model.layers.{self.number}.")

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Implements `Weights.read`."""
        self._source.read(self.full_name(name), start, into)


def _compare_whole(folder: Path, trained: TrainedModel, dtype: torch.dtype | None) -> dict[str, Any]:
    """Compares structure, logits, loss and generation of the full model, with one model in memory at a time."""
    batches, theirs = _batches(trained), _load_whole(folder)
    _compare_structure(theirs, trained.model, dtype)
    their_numbers = _their_numbers(theirs, batches, trained.model)
    prompt = batches[0][0, :8]
    options = dict(max_new_tokens=_NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    generated = theirs.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **options)
    continuation = generated[0, len(prompt) :].tolist()
    del theirs
    gc.collect()
    ours = load_transformer(trained.weights, dtype)
    found = _compare_numbers(ours, batches, their_numbers, "")
    found["generation"] = _compare_generation(ours, prompt.tolist(), continuation)
    if dtype not in (None, torch.float32):
        del ours
        found["loss"]["before_rounding"] = _our_numbers(load_transformer(trained.weights), batches[found["batch"]])[1]
    return found


def _load_whole(folder: Path) -> Any:
    try:
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise VerificationError(f"transformers cannot load the folder: {error}") from error
    return _require_complete(theirs, report)


def _require_complete(theirs: Any, report: dict[str, Any]) -> Any:
    for kind, names in report.items():
        if names:
            raise VerificationError(f"transformers reports {kind.replace('_', ' ')}: {sorted(map(str, names))[:3]}")
    return theirs.eval()


def _load_one_layer(folder: Path, source: OneLayer) -> Any:
    """The same one-layer model in transformers, read from the folder's files."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[source.number : source.number + 1]
        config.max_window_layers = 0 if config.sliding_window else 1
    wanted = {}
    for tensor in hf_mapping.tensors(source.model):
        wanted[source.full_name(tensor.name)] = tensor.name
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {wanted[name]: file.get_tensor(name) for name in file.offset_keys() if name in wanted}
    load = getattr(transformers, config.architectures[0]).from_pretrained
    return _require_complete(*load(None, config=config, state_dict=tensors, dtype="auto", output_loading_info=True))


def _compare_structure(theirs: Any, model: ModelConfig, dtype: torch.dtype | None) -> None:
    head, embedding = theirs.get_output_embeddings().weight, theirs.get_input_embeddings().weight
    if (head is embedding) != model.tie_word_embeddings:
        raise VerificationError(f"embedding and head are {'tied' if head is embedding else 'not tied'} in transformers")
    for name, matrix in (("embedding", embedding), ("head", head)):
        if matrix.shape[0] != model.vocab_size:
            raise VerificationError(f"the {name} has {matrix.shape[0]} rows in transformers, not {model.vocab_size}")
    wrong = [name for name, parameter in theirs.named_parameters() if dtype not in (None, parameter.dtype)]
    if wrong:
        raise VerificationError(f"{wrong[0]} is {theirs.get_parameter(wrong[0]).dtype} in transformers, not {dtype}")


Numbers = tuple[Tensor, float]
"""(logits_BTV, mean loss in nats over all tokens but the first of each row)."""


def _batches(trained: TrainedModel) -> list[Tensor]:
    """One batch, or a few for a model with experts: where two experts score almost the same, rounding may change the choice."""
    return [_batch(trained, number) for number in range(_TRIES if trained.model.moe else 1)]


def _their_numbers(theirs: Any, batches: list[Tensor], model: ModelConfig) -> list[Numbers]:
    _compare_structure(theirs, model, None)
    theirs.float()
    with torch.inference_mode():
        found = [theirs(tokens_BT, labels=tokens_BT) for tokens_BT in batches]
    return [(out.logits, float(out.loss)) for out in found]


def _our_numbers(ours: Transformer, tokens_BT: Tensor) -> Numbers:
    with torch.inference_mode():
        loss_sum = ours(tokens_BT[:, :-1], tokens_BT[:, 1:].contiguous()).loss_sum
        return ours(tokens_BT), float(loss_sum) / tokens_BT[:, 1:].numel()


def _compare_numbers(ours: Transformer, batches: list[Tensor], theirs: list[Numbers], where: str) -> dict[str, Any]:
    """The figures of the first batch that agrees. Raises VerificationError if none does."""
    for number, tokens_BT in enumerate(batches):
        try:
            return {"batch": number, **_compare_batch(_our_numbers(ours, tokens_BT), theirs[number], where)}
        except VerificationError as error:
            last_error = error
    raise last_error


def _compare_batch(ours: Numbers, theirs: Numbers, where: str) -> dict[str, Any]:
    (our_logits_BTV, our_loss), (their_logits_BTV, their_loss) = ours, theirs
    if our_logits_BTV.shape != their_logits_BTV.shape:
        raise VerificationError(
            f"{where}logits have shape {tuple(their_logits_BTV.shape)} in transformers, {tuple(our_logits_BTV.shape)} here"
        )
    largest = max(1.0, our_logits_BTV.abs().max().item())
    difference, bound = (our_logits_BTV - their_logits_BTV).abs().max().item(), LOGITS_BOUND * largest
    if not difference <= bound:  # written so that NaN fails
        raise VerificationError(f"{where}logits differ by {difference:.3g}, more than the allowed {bound:.1g}")
    if not abs(our_loss - their_loss) <= LOSS_BOUND * max(1.0, our_loss):
        raise VerificationError(f"{where}the loss is {their_loss:.6f} in transformers, {our_loss:.6f} here")
    positions = our_logits_BTV.shape[0] * our_logits_BTV.shape[1]
    return {
        "logits": {"positions": positions, "largest": largest, "difference": difference, "bound": bound},
        "loss": {"ours": our_loss, "transformers": their_loss},
    }


def _compare_generation(ours: Transformer, prompt_ids: list[int], continuation: list[int]) -> dict[str, Any]:
    """Compares greedy tokens up to the first position where two of them are equally likely within rounding."""
    tokens_BT, cache = torch.tensor([prompt_ids]), KeyValueCache(len(ours.model.layers), len(prompt_ids) + len(continuation))
    with torch.inference_mode():
        for at, expected in enumerate(continuation):
            logits_V = ours(tokens_BT, cache=cache)[0, -1]
            token = int(logits_V.argmax())
            if token != expected:
                gap = (logits_V[token] - logits_V[expected]).item()
                if not gap <= 2 * LOGITS_BOUND * max(1.0, logits_V.abs().max().item()):
                    raise VerificationError(f"generation differs at new token {at}: {expected} in transformers, {token} here")
                return {"tokens": at, "asked": len(continuation)}
            tokens_BT = torch.tensor([[token]])
    return {"tokens": len(continuation), "asked": len(continuation)}
