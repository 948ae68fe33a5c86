"""Text generation: one token at a time, each drawn from the model's distribution given all tokens before it.

It knows the model and token ids; `stream_text` turns ids into text, `continue_prompts` uses the model of an engine in training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import Tensor

from pretrain import UserError
from pretrain.data.tokenizer import Tokenizer
from pretrain.engines.base import Engine
from pretrain.model.attention import KeyValueCache
from pretrain.model.transformer import Transformer


class GenerationError(UserError):
    """The prompt or the settings are not usable, or the model's logits are not finite."""


def generate(model: Transformer, prompt_ids: list[int], max_new_tokens: int, **options) -> Iterator[int]:
    """Yields the new ids of one prompt. Options and errors are those of `generate_batch`."""
    return (token for (token,) in generate_batch(model, [prompt_ids], max_new_tokens, **options))


def generate_batch(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> Iterator[list[int | None]]:
    """Yields the next id of every prompt, step by step; None after a text has ended (stop_ids are not yielded). Ends after
    max_new_tokens steps, or when all texts have ended.

    The first step runs the prompts through the model in one batch, shorter ones after padding that no token sees; each later
    step runs one position, with the rest in the cache. temperature 0 is greedy; top_k keeps the k most likely ids (0: all),
    then top_p the smallest set with probability p (1: all). Prompt i draws with seed + i, so the same seed gives the same ids.
    Prompt and new ids together may be longer than any training sample.

    Raises GenerationError: on the call, for an empty prompt, ids outside the vocabulary or settings out of range; while
    generating, if the model's logits are not finite.
    """
    vocab_size = model.config.vocab_size
    if not prompts or not all(prompt and all(0 <= token < vocab_size for token in prompt) for prompt in prompts):
        raise GenerationError(f"a prompt must have at least one token id, and all ids must be from 0 to {vocab_size - 1}")
    if max_new_tokens < 0 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise GenerationError(
            f"got max_new_tokens {max_new_tokens}, temperature {temperature}, top_k {top_k}, top_p {top_p}; "
            "the first three must be at least 0, top_p above 0 and at most 1"
        )
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(prompts))]

    def choices(logits_BV: Tensor) -> list[int]:
        if temperature == 0:
            finite_B = logits_BV.isfinite().all(1)
            tokens = torch.where(finite_B, logits_BV.argmax(1), -1).tolist()  # only one id per row leaves the device
            _require_finite(min(tokens) >= 0)
            return tokens
        rows = logits_BV.float().cpu()
        return [choose(row, temperature, top_k, top_p, each) for row, each in zip(rows, generators, strict=True)]

    return _generate(model, prompts, max_new_tokens, choices, stop_ids)


def _generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    choices: Callable[[Tensor], list[int]],
    stop_ids: Collection[int],
) -> Iterator[list[int | None]]:
    device = model.model.embed_tokens.weight.device
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    padding_B = torch.tensor(padding, device=device) if any(padding) else None
    cache = KeyValueCache(model.config.num_hidden_layers, longest + max_new_tokens, padding_B)
    tokens_BT = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)], device=device)
    ended = [False] * len(prompts)
    for _ in range(max_new_tokens):
        # Not around the yield, because the caller must not run without gradients. Not inference_mode, because engines keep the
        # parameters that they gather for training.
        with torch.no_grad():
            tokens = choices(model(tokens_BT, cache=cache)[:, -1])
        ended = [done or token in stop_ids for done, token in zip(ended, tokens, strict=True)]
        if all(ended):
            return
        yield [None if done else token for done, token in zip(ended, tokens, strict=True)]
        tokens_BT = torch.tensor(tokens, device=device)[:, None]


def choose(logits_V: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """Draws one id from fp32 logits on the CPU, where a seed gives the same ids whatever the model's device."""
    _require_finite(bool(logits_V.isfinite().all()))
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k or top_p < 1:
        logits_V, ids_V = logits_V.topk(min(top_k or len(logits_V), len(logits_V)))
    probability_V = torch.softmax(logits_V / temperature, 0)
    if top_p < 1:
        before_V = probability_V.cumsum(0) - probability_V
        probability_V[before_V >= top_p] = 0.0
    drawn = int(torch.multinomial(probability_V, 1, generator=generator))
    return int(ids_V[drawn]) if top_k or top_p < 1 else drawn


def _require_finite(finite: bool) -> None:
    if not finite:
        raise GenerationError("the model's logits are not finite: its weights are damaged or it has diverged")


def ids_of_each(steps: Iterator[list[int | None]], prompts: int) -> list[Iterator[int]]:
    """Splits the steps of `generate_batch` into one iterator per prompt; advancing one runs the step for all prompts."""

    def ids(number: int, copy: Iterator[list[int | None]]) -> Iterator[int]:
        return itertools.takewhile(lambda token: token is not None, (step[number] for step in copy))

    return [ids(number, copy) for number, copy in enumerate(itertools.tee(steps, prompts))]


def stream_text(decode: Callable[[list[int]], str], prompt_ids: list[int], new_ids: Iterable[int]) -> Iterator[str]:
    """Yields the text of new_ids in pieces of complete characters; joined, they are what follows the prompt in decode(all ids).

    decode: ids to text, with U+FFFD for bytes that are not UTF-8. A character may need several ids, so text that ends in U+FFFD
    is held back. Each id is decoded together with the ids of the previous piece and those after it, not with the entire text.
    """
    ids, start, shown = list(prompt_ids), 0, len(prompt_ids)
    for token in new_ids:
        ids.append(token)
        before, text = decode(ids[start:shown]), decode(ids[start:])
        if len(text) > len(before) and not text.endswith("\ufffd"):
            yield text[len(before) :]
            start, shown = shown, len(ids)
    if rest := decode(ids[start:])[len(decode(ids[start:shown])) :]:
        yield rest


def continue_prompts(engine: Engine, tokenizer: Tokenizer, prompts: list[str], most_tokens: int) -> list[dict[str, str]]:
    """Continues each prompt with the likeliest tokens, with the model that the engine trains. -> [{"prompt", "text"}].

    A collective: engines that shard weights gather them for each token, so all ranks generate equally many.
    """
    model, end = engine.model, tokenizer.end_of_document_id
    ids = [[end, *tokenizer.encode(prompt)] for prompt in prompts]
    model.eval()
    try:
        with engine.autocast(), torch.compiler.set_stance("force_eager"):  # each length of a text would be compiled anew
            steps = list(generate_batch(model, ids, most_tokens, temperature=0))
    except GenerationError as error:
        return [{"prompt": "", "text": f"nothing: {error}"}]
    finally:
        model.train()
    texts = []
    for prompt, prompt_ids, generated in zip(prompts, ids, zip(*steps, strict=True), strict=True):
        until_end = itertools.takewhile(lambda token: token != end, generated)
        texts.append({"prompt": prompt, "text": "".join(stream_text(tokenizer.decode, prompt_ids, until_end))})
    return texts
