"""The proof that a Hugging Face folder holds the model that it was made from: transformers loads it, and both are compared.

What is compared, in this order; the first difference raises `VerificationError`:

    settings     config.json says what the model is, and transformers reads it as the class that it names
    weights      every tensor, to the bit, after rounding to the folder's dtype; no tensor more or less
    tokenizer    the same fingerprint, the same ids from transformers, all of them in the vocabulary
    structure    tied embeddings, rows of the vocabulary, dtype; nothing missing, nothing left over in transformers' loader
    numbers      logits and loss of a real batch, both models in fp32 from the rounded weights
    generation   the same greedy continuation from both

A model that does not fit into memory is compared layer by layer: each layer in a model of its own between the embedding and the
head. Generation is then left out, and the certificate says so. It knows both models; it writes nothing.
"""

from __future__ import annotations

import gc
import math
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
from pretrain.generate import generate
from pretrain.interop.load import Trained
from pretrain.interop.weights import BLOCK, DTYPES, Weights, load_transformer, read_part
from pretrain.model import hf_mapping
from pretrain.model.config import ModelConfig
from pretrain.model.flops import num_parameters
from pretrain.model.transformer import Transformer
from pretrain.report.progress import Progress

LOGITS_BOUND = 1e-5
"""Largest difference of a logit, relative to the largest logit where that is above 1."""
LOSS_BOUND = 1e-5
"""Largest difference of the mean loss, in nats."""
_TEXTS = [
    "def area(radius: float) -> float:\n    return 3.14159 * radius**2\n",
    "The quick brown fox jumps over the lazy dog; 1,024 of 4,096 tokens were left.",
    "Übergrößenträger aßen Smørrebrød in Kraków \u2014 \u4f60\u597d\uff0c\u4e16\u754c \U0001f30d",
]
_POSITIONS, _NEW_TOKENS, _TRIES = 64, 16, 3


class VerificationError(UserError):
    """The folder does not hold the model; the message says where they differ."""


def certify(
    folder: Path, trained: Trained, dtype: str | None, scope: str = "auto", say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """What was compared and found equal, ready for JSON.

    dtype: that in which the folder was written from the model (fp32, bf16, fp16). None: the model was read from the folder,
    whose settings and tensors may be written in other ways than ours; all but these two is compared. scope: whole, layers, or
    auto: whole where the model fits into half of the free memory. Raises VerificationError, OSError.
    """
    if scope == "auto":
        needed = 4 * num_parameters(trained.model).total
        scope = "whole" if needed < psutil.virtual_memory().available / 2 else "layers"
    transformers.logging.disable_progress_bar()  # one line for each layer says more
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
    say(f"comparing logits with transformers, {'the whole model' if scope == 'whole' else 'layer by layer'}")
    if scope == "whole":
        return found | _compare_whole(folder, trained, rounded)
    layers = []
    for number in range(trained.model.num_hidden_layers):
        source, batches = OneLayer(trained.weights, number), _batches(trained)
        their_numbers = _their_numbers(_load_one_layer(folder, source), batches, source.model)
        layers.append(_compare_numbers(load_transformer(source, rounded), batches, their_numbers, f"layer {number}: "))
        say(f"layer {number + 1} of {trained.model.num_hidden_layers} is equal")
    worst = max(layers, key=lambda each: each["logits"]["difference"])
    return found | worst | {"generation": "not compared: the model was compared layer by layer"}


# ---------------------------------------------------------------- files


def _compare_settings(folder: Path, model: ModelConfig) -> dict[str, Any]:
    config = hf_mapping.read_config(folder)
    wanted = hf_mapping.from_config(hf_mapping.to_config(model, "float32", {}), "the model")
    got = hf_mapping.from_config(config, folder / "config.json")
    for key, value in wanted.items():
        if got[key] != value:
            raise VerificationError(f"config.json says {key} {got[key]}, the model has {value}")
    return {"class": config["architectures"][0], "keys": len(wanted)}


def _compare_weights(folder: Path, source: Weights, dtype: torch.dtype, beat: Callable[[int], None]) -> dict[str, Any]:
    """By a reader that is not ours, to the bit. beat: called with the bytes compared so far."""
    done, files = 0, sorted(folder.glob("*.safetensors"))
    parts = {part.name: part for part in hf_mapping.parts(source.model)}
    unseen = set(parts)
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.offset_keys():
                if name not in unseen:
                    raise VerificationError(f"{path.name}: holds {name}, which the model does not have, or has in another file")
                unseen.remove(name)
                part, tensor = parts[name], file.get_slice(name)  # bytes are read when it is indexed
                if tuple(tensor.get_shape()) != part.shape:
                    raise VerificationError(f"{name} has shape {tuple(tensor.get_shape())}, the model {part.shape}")
                wanted_dtype = torch.float32 if part.keep_fp32 else dtype
                for first, values in _rows(tensor, part.shape):
                    wanted = torch.empty(values.numel())
                    read_part(source, part, first, wanted)
                    wanted = wanted.to(wanted_dtype)
                    if values.dtype != wanted.dtype or not torch.equal(_bits(values), _bits(wanted)):
                        raise VerificationError(f"{name} is not the model's: {_first_difference(values, wanted)}")
                    done += values.nbytes
                    beat(done)
    if unseen:
        raise VerificationError(f"the folder lacks {sorted(unseen)[0]} ({len(unseen)} tensors)")
    return {"tensors": len(parts), "dtype": str(dtype).removeprefix("torch."), "files": len(files), "difference": 0.0}


def _rows(tensor: Any, shape: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """(first element, values) of blocks of whole rows."""
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
    return f"{values[place].item():.6g} where the model has {wanted[place].item():.6g}"


def _compare_tokenizers(folder: Path, trained: Trained) -> dict[str, Any] | None:
    if trained.tokenizer is None:
        return None
    ours, copy = Tokenizer.load(trained.tokenizer), Tokenizer.load(folder)
    if copy.fingerprint != ours.fingerprint:
        raise VerificationError(f"the tokenizer's fingerprint is {copy.fingerprint}, that of the model's is {ours.fingerprint}")
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


def _batch(trained: Trained, number: int) -> Tensor:
    """A batch (2, T), the same for the same number: a row of text, where there is a tokenizer, and a row of ids from the whole
    vocabulary. Longer than a sliding window, where that is below 1024."""
    model = trained.model
    window = model.sliding_window or 0
    length = min(max(_POSITIONS, window + 16 if window < 1024 else 0), max(2, model.max_position_embeddings))
    generator = torch.Generator().manual_seed(number)
    tokens_BT = torch.randint(0, model.vocab_size, (2, length), generator=generator)
    if trained.tokenizer is not None:
        tokenizer = Tokenizer.load(trained.tokenizer)
        ids = [token for text in _TEXTS for token in tokenizer.encode(text)]
        shifted = torch.tensor([ids[(number + at) % len(ids)] for at in range(length)])
        tokens_BT[0] = shifted
    return tokens_BT


class OneLayer:
    """The weights of a model of one layer: that of number `number`, between the embedding and the head of the whole model."""

    def __init__(self, source: Weights, number: int):
        self.model, self.number, self._source = replace(source.model, num_hidden_layers=1), number, source

    def whole_name(self, name: str) -> str:
        """The name in the whole model."""
        return name.replace("model.layers.0.", f"model.layers.{self.number}.")

    def read(self, name: str, start: int, into: Tensor) -> None:
        """See `Weights`."""
        self._source.read(self.whole_name(name), start, into)


def _compare_whole(folder: Path, trained: Trained, dtype: torch.dtype | None) -> dict[str, Any]:
    """Logits, loss, generation and structure of the whole model. One model is in memory at a time."""
    batches, theirs = _batches(trained), _load_whole(folder)
    _compare_structure(theirs, trained.model, dtype)
    their_numbers = _their_numbers(theirs, batches, trained.model)
    prompt = batches[0][0, :8]
    options = dict(max_new_tokens=_NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    continuation = theirs.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **options)
    continuation = continuation[0, len(prompt) :].tolist()
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
        raise VerificationError(f"transformers cannot load it: {error}") from error
    return _whole_report(theirs, report)


def _whole_report(theirs: Any, report: dict[str, Any]) -> Any:
    for kind, names in report.items():
        if names:
            raise VerificationError(f"transformers loaded it with {kind.replace('_', ' ')}: {sorted(map(str, names))[:3]}")
    return theirs.eval()


def _load_one_layer(folder: Path, source: OneLayer) -> Any:
    """transformers' model of that layer alone, from the folder's files."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[source.number : source.number + 1]
        config.max_window_layers = 0 if config.sliding_window else 1
    wanted = {}
    for part in hf_mapping.parts(source.model):
        wanted[source.whole_name(part.name)] = part.name
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {wanted[name]: file.get_tensor(name) for name in file.offset_keys() if name in wanted}
    kind = getattr(transformers, config.architectures[0])
    return _whole_report(*kind.from_pretrained(None, config=config, state_dict=tensors, dtype="auto", output_loading_info=True))


def _compare_structure(theirs: Any, model: ModelConfig, dtype: torch.dtype | None) -> None:
    head, embedding = theirs.get_output_embeddings().weight, theirs.get_input_embeddings().weight
    if (head is embedding) != model.tie_word_embeddings:
        raise VerificationError(f"embedding and head are {'one matrix' if head is embedding else 'two'} in transformers")
    for name, matrix in (("embedding", embedding), ("head", head)):
        if matrix.shape[0] != model.vocab_size:
            raise VerificationError(f"the {name} has {matrix.shape[0]} rows, the vocabulary {model.vocab_size} ids")
    wrong = [name for name, parameter in theirs.named_parameters() if dtype not in (None, parameter.dtype)]
    if wrong:
        raise VerificationError(f"{wrong[0]} is {theirs.get_parameter(wrong[0]).dtype} in transformers, not {dtype}")


Numbers = tuple[Tensor, float]
"""(logits_BTV, mean loss in nats of every token but the first of each row)."""


def _batches(trained: Trained) -> list[Tensor]:
    """One, or with experts a few: where two experts are as good as equal, rounding may choose another one."""
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
    """Of the first batch that is equal. Raises VerificationError when none is."""
    for number, tokens_BT in enumerate(batches):
        try:
            return {"batch": number, **_compare_batch(_our_numbers(ours, tokens_BT), theirs[number], where)}
        except VerificationError as error:
            refusal = error
    raise refusal


def _compare_batch(ours: Numbers, theirs: Numbers, where: str) -> dict[str, Any]:
    (our_logits_BTV, our_loss), (their_logits_BTV, their_loss) = ours, theirs
    if our_logits_BTV.shape != their_logits_BTV.shape:
        raise VerificationError(
            f"{where}logits have shape {tuple(their_logits_BTV.shape)}, the model's {tuple(our_logits_BTV.shape)}"
        )
    largest = max(1.0, our_logits_BTV.abs().max().item())
    difference, bound = (our_logits_BTV - their_logits_BTV).abs().max().item(), LOGITS_BOUND * largest
    if not difference <= bound:  # what is not a number is refused, too
        raise VerificationError(f"{where}logits differ by {difference:.3g}, {bound:.1g} is allowed")
    if not abs(our_loss - their_loss) <= LOSS_BOUND * max(1.0, our_loss):
        raise VerificationError(f"{where}the loss is {their_loss:.6f} in transformers, {our_loss:.6f} here")
    positions = our_logits_BTV.shape[0] * our_logits_BTV.shape[1]
    return {
        "logits": {"positions": positions, "largest": largest, "difference": difference, "bound": bound},
        "loss": {"ours": our_loss, "transformers": their_loss},
    }


def _compare_generation(ours: Transformer, prompt_ids: list[int], continuation: list[int]) -> dict[str, Any]:
    """Greedy tokens, up to the first position where two are equally likely but for rounding."""
    mine = list(generate(ours, prompt_ids, len(continuation), temperature=0))
    equal = next((at for at, pair in enumerate(zip(mine, continuation, strict=True)) if pair[0] != pair[1]), len(mine))
    if equal < len(mine):
        with torch.inference_mode():
            logits_V = ours(torch.tensor([prompt_ids + mine[:equal]]))[0, -1]
        gap = (logits_V[mine[equal]] - logits_V[continuation[equal]]).abs().item()
        if gap > 2 * LOGITS_BOUND * max(1.0, logits_V.abs().max().item()):
            raise VerificationError(
                f"generation differs at new token {equal}: {continuation[equal]} in transformers, {mine[equal]} here"
            )
    return {"tokens": equal, "asked": len(mine)}
