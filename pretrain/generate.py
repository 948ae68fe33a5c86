"""Text from a trained model: one token at a time, each chosen from the model's distribution given all before it.

It knows the model and ids; `stream_text` knows how ids become text. It knows no files and no process groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import Tensor

from pretrain.model.attention import KeyValueCache
from pretrain.model.transformer import Transformer

_NOT_FINITE = "the model's logits are not finite: its weights are damaged or it has diverged"


def generate(
    model: Transformer,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """New ids, each as soon as it is chosen; ends after max_new_tokens, or before one of stop_ids, which is not given out.

    As `generate_batch` of one prompt. Raises as that does.
    """
    steps = generate_batch(
        model, [prompt_ids], max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop_ids=stop_ids
    )
    return (token for (token,) in steps)


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
    """The next id of every prompt, step by step; None once a prompt's text has ended (stop_ids are not given out). Ends after
    max_new_tokens steps, or when all texts have ended.

    The prompts run through the model once, all together, shorter ones with padding before them that nothing sees; after that
    each step costs one position, the rest comes from the cache. temperature 0 is greedy; top_k keeps the k likeliest ids (0:
    all), then top_p the fewest that reach probability p (1: all). Prompt i draws with seed + i, so the same seed gives the same
    ids. Prompt and new ids together may be longer than any training sample.

    Raises ValueError, on the call, for an empty prompt, ids outside the vocabulary or settings out of range; and while
    generating, when the model's logits are not finite.
    """
    vocab_size = model.config.vocab_size
    if not prompts or not all(prompt and all(0 <= token < vocab_size for token in prompt) for prompt in prompts):
        raise ValueError(f"a prompt must hold at least one id, all from 0 to {vocab_size - 1}")
    if max_new_tokens < 0 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"got max_new_tokens {max_new_tokens}, temperature {temperature}, top_k {top_k}, top_p {top_p}; "
            "allowed: at least 0, at least 0, at least 0, above 0 and up to 1"
        )
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(prompts))]

    def choices(logits_BV: Tensor) -> list[int]:
        if temperature == 0:
            tokens = torch.where(
                logits_BV.isfinite().all(1), logits_BV.argmax(1), -1
            ).tolist()  # one id a row leaves the device
            if min(tokens) < 0:
                raise ValueError(_NOT_FINITE)
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
        # Not around the yield: the caller must not run in it. Not inference_mode: engines keep what they gather for training.
        with torch.no_grad():
            tokens = choices(model(tokens_BT, cache=cache)[:, -1])
        ended = [over or token in stop_ids for over, token in zip(ended, tokens, strict=True)]
        if all(ended):
            return
        yield [None if over else token for over, token in zip(ended, tokens, strict=True)]
        tokens_BT = torch.tensor(tokens, device=device)[:, None]


def choose(logits_V: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """One id from fp32 logits on the CPU; drawn there so that a seed means the same on every device."""
    if not logits_V.isfinite().all():
        raise ValueError(_NOT_FINITE)
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


def ids_of_each(steps: Iterator[list[int | None]], prompts: int) -> list[Iterator[int]]:
    """What `generate_batch` gives, as one iterator for each prompt; reading one on makes the next step of all."""

    def ids(number: int, copy: Iterator[list[int | None]]) -> Iterator[int]:
        return itertools.takewhile(lambda token: token is not None, (step[number] for step in copy))

    return [ids(number, copy) for number, copy in enumerate(itertools.tee(steps, prompts))]


def stream_text(decode: Callable[[list[int]], str], prompt_ids: list[int], new_ids: Iterable[int]) -> Iterator[str]:
    """The text of new_ids in pieces that are whole characters; joined, they are what follows the prompt in decode(all ids).

    decode: ids to text, U+FFFD for bytes that are not UTF-8. A character may need several ids: while the text ends in U+FFFD it
    is held back. Each id is decoded together with those since the last piece before, not with the whole text.
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
