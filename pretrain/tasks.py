"""How well a model answers the items of tasks (data/tasks.py), by likelihood: the same figures for any number of ranks, any
engine, and lm-eval on the converted model.

    accuracy                share of the items whose right answer has the largest log-likelihood; of exact continuations, share
                            of those whose tokens are each the likeliest one. lm-eval: acc
    accuracy_per_byte       the same with log-likelihoods divided by the UTF-8 bytes of each choice. lm-eval: acc_bytes
    accuracy_per_character  divided by their characters. lm-eval: acc_norm
    bits_per_byte           bits of the right answers / their UTF-8 bytes, each summed over the items. It falls smoothly while
                            accuracy is still that of guessing, and tells models apart better: Heineman et al. 2025 (Signal and
                            Noise, arXiv 2508.13144)
    chance                  accuracy of guessing

Ranks take different batches of sequences, each of at most so many tokens, and one all_reduce of a table of all sequences ends
the pass. Models under torch.compile run uncompiled: each batch has a length of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from pretrain.data.batches import MASKED, Batch
from pretrain.data.tasks import CHOICES, EXACT, Sequence, Task
from pretrain.engines import fp8
from pretrain.engines.base import Engine
from pretrain.evaluate import StopCheck, load

if TYPE_CHECKING:
    from pretrain.interop.load import TrainedModel

MEANS = ("accuracy", "bits_per_byte", "chance")
"""Figures of which the mean over tasks is reported, too."""


class Layout(NamedTuple):
    """The batches of a pass: the same number for each group of ranks that takes samples of its own."""

    batches: list[list[int]]
    """Numbers of the sequences of each batch, the longest first; empty: a pass over nothing, because other ranks have one.
    Batch i is for sample rank i % sample_ranks."""
    widths: list[int]
    """Tokens per sequence of each batch, padding included."""

    @property
    def tokens(self) -> int:
        """Tokens that the model sees in all batches together, padding included."""
        return sum(max(1, len(batch)) * width for batch, width in zip(self.batches, self.widths, strict=True))


def layout(lengths: list[int], most_tokens: int, ranks: int, multiple: int = 1) -> Layout:
    """Divides sequences of these lengths into batches of at most `most_tokens` with padding (a longer one is alone), as even
    as they can be for `ranks` groups of ranks. multiple: of the width of a batch."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    widths = [math.ceil(lengths[number] / multiple) * multiple for number in order]

    def cut(limit: int) -> list[int]:
        """The first sequence of each batch."""
        begins = []
        for place in range(len(widths)):
            if not begins or (place - begins[-1] + 1) * widths[begins[-1]] > limit:
                begins.append(place)
        return begins

    low, high = 0, max(most_tokens, widths[0])
    rounds = math.ceil(len(cut(high)) / ranks)
    while high - low > 1:  # the smallest limit that needs no more rounds
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= rounds * ranks else (middle, high)
    begins = cut(high)
    batches = [order[begin:end] for begin, end in zip(begins, [*begins[1:], len(order)], strict=True)]
    spare = rounds * ranks - len(batches)
    return Layout(batches + [[]] * spare, [widths[begin] for begin in begins] + [widths[-1]] * spare)


def plan_pass(engine: Engine, tasks: list[Task], most_tokens: int) -> Layout:
    """The batches of `measure` with this engine."""
    multiple = engine.mesh.sequence * engine.mesh.tensor * (fp8.MULTIPLE if engine.precision == "fp8" else 1)
    lengths = [len(sequence.tokens) - 1 for sequence in _sequences(tasks)]
    return layout(lengths, most_tokens, engine.mesh.sample_ranks, multiple)


def _sequences(tasks: list[Task]) -> Iterator[Sequence]:
    return (sequence for task in tasks for item in task.items for sequence in item.sequences)


def measure(engine: Engine, tasks: list[Task], most_tokens: int, requests: Callable[[], list[int]] = list) -> dict[str, float]:
    """task/<name>/<figure> for each task and figure of the head of this file, and task_<figure>, the means of MEANS.

    A collective; the model is the one that the engine trains. most_tokens: of a forward pass. requests: as in
    `evaluate.evaluate`; raises Stopped like it.
    """
    nats, hits = log_likelihoods(engine, tasks, most_tokens, requests)
    found, first = {}, 0
    for task in tasks:
        for figure, value in _figures(task, nats[first:], hits[first:]).items():
            found[f"task/{task.name}/{figure}"] = value
        first += sum(len(item.sequences) for item in task.items)
    means = {f"task_{figure}": _mean([found[f"task/{task.name}/{figure}"] for task in tasks]) for figure in MEANS}
    return means | found


def score(
    engine: Engine,
    trained: TrainedModel,
    tasks: list[Task],
    most_tokens: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, float]]:
    """The figures of a trained model, by task. A collective; the engine distributes the model over the ranks.

    on_progress: called with the number of batches done and in total, of one rank. Raises what reading the weights raises.
    """
    load(engine, trained)
    rounds = len(plan_pass(engine, tasks, most_tokens).batches) // engine.mesh.sample_ranks
    done = itertools.count()

    def requests() -> list[int]:
        on_progress(next(done), rounds)
        return [0]

    found = measure(engine, tasks, most_tokens, requests)
    prefixes = {task.name: f"task/{task.name}/" for task in tasks}
    return {
        name: {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
        for name, prefix in prefixes.items()
    }


def log_likelihoods(
    engine: Engine, tasks: list[Task], most_tokens: int, requests: Callable[[], list[int]] = list
) -> tuple[np.ndarray, np.ndarray]:
    """(nats (S,), whether each token of the continuation is the likeliest (S,)) of all sequences in order; nats are -log p of
    the continuation. A collective."""
    sequences, plan = list(_sequences(tasks)), plan_pass(engine, tasks, most_tokens)
    table_S2 = torch.zeros(len(sequences), 2, dtype=torch.float64, device=engine.device)  # nats, labels that are the likeliest
    check, head, ranks = StopCheck(engine, requests), engine.model.lm_head, engine.mesh.sample_ranks
    engine.model.eval()
    try:
        for number in range(engine.mesh.sample_rank, len(plan.batches), ranks):
            check()
            chosen = plan.batches[number]
            batch = engine.pin(engine.part_of(_batch([sequences[each] for each in chosen], plan.widths[number])))
            head.hits = []
            # Not engine.forward: it would go through what torch.compile and DDP put around the model.
            with torch.no_grad(), engine.autocast(), torch.compiler.set_stance("force_eager"):
                nats_B = engine.model(*engine.to_device(batch).inputs).loss_B
            hits_B = torch.cat(head.hits).view(len(nats_B), -1).sum(1)
            rows_B = engine.upload(chosen, torch.int64)
            table_S2.index_add_(0, rows_B, torch.stack([nats_B, hits_B], 1).double()[: len(chosen)])
    finally:
        head.hits = None
        engine.model.train()
    table_S2 = engine.all_reduce(table_S2).cpu().numpy()
    return table_S2[:, 0], table_S2[:, 1] == [sequence.labels for sequence in sequences]


def _batch(sequences: list[Sequence], width: int) -> Batch:
    """Sequences padded at the end, where no other token sees the padding."""
    shape = max(1, len(sequences)), width
    tokens_BT, labels_BT = np.zeros(shape, np.int64), np.full(shape, MASKED, np.int64)
    for row, (tokens, labels, *_) in enumerate(sequences):
        end = len(tokens) - 1
        tokens_BT[row, :end] = tokens[:-1]
        labels_BT[row, end - labels : end] = tokens[-labels:]
    return Batch(torch.from_numpy(tokens_BT), torch.from_numpy(labels_BT))


def _figures(task: Task, nats: np.ndarray, hits: np.ndarray) -> dict[str, float]:
    """The figures of a task, whose sequences are the first ones of nats and hits."""
    right: dict[str, list[float]] = {"accuracy": []}
    if task.kind == CHOICES:
        right |= {"accuracy_per_byte": [], "accuracy_per_character": []}
    right_nats, right_bytes, first = [], 0, 0
    for item in task.items:
        mine = -nats[first : first + len(item.sequences)]
        answer = item.sequences[item.answer]
        right_nats.append(-mine[item.answer])
        right_bytes += answer.bytes
        if task.kind == EXACT:
            right["accuracy"].append(float(hits[first]))
        else:
            right["accuracy"].append(_is_right(mine, item.answer))
        if task.kind == CHOICES:
            for figure, unit in (("accuracy_per_byte", "bytes"), ("accuracy_per_character", "characters")):
                sizes = np.array([getattr(each, unit) for each in item.sequences])
                right[figure].append(_is_right(mine / sizes, item.answer))
        first += len(item.sequences)
    found = {figure: _mean(values) for figure, values in right.items()}
    found["bits_per_byte"] = math.fsum(right_nats) / math.log(2) / right_bytes
    return found | {"chance": task.chance}


def _is_right(values: np.ndarray, answer: int) -> float:
    """1 if the answer has the largest value, the first one of equal values; NaN if the model's logits are not finite."""
    return float(values.argmax() == answer) if np.isfinite(values).all() else math.nan


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
