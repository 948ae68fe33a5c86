"""The loss of a model on validation data: the same figure for any number of ranks and any micro-batch size.

Nats and labels are summed over all ranks and divided last; partial windows and batches at the end count like any other token.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from pretrain.config import DataConfig
from pretrain.data.batches import Batch, ValidData, open_valid, read_ahead, reads_ahead
from pretrain.engines.base import Engine
from pretrain.model.transformer import Transformer
from pretrain.report.metrics import bits_per_byte, perplexity

if TYPE_CHECKING:
    from pretrain.interop.load import TrainedModel


class Stopped(Exception):
    """All ranks stopped the validation early; `flags` is the sum of their requests."""

    def __init__(self, flags: list[int]):
        self.flags = flags


class StopCheck:
    """Asks all ranks, once per round of forward passes, whether any of them is to stop. A collective."""

    def __init__(self, engine: Engine, requests: Callable[[], list[int]]):
        """requests: returns this rank's flags; 0: continue."""
        self._engine, self._requests, self._flags_of_last_round = engine, requests, list

    def __call__(self) -> None:
        """Raises Stopped on every rank soon after any rank's flags are not all 0."""
        flags = self._engine.copy_to_host(self._engine.all_reduce(self._engine.upload(self._requests())))
        if any(flags_sum := self._flags_of_last_round()):  # one round late, so that no rank waits for the device
            raise Stopped(flags_sum)
        self._flags_of_last_round = flags


def evaluate(
    engine: Engine,
    sets: list[ValidData],
    micro_batch_size: int,
    max_samples: int | None = None,
    requests: Callable[[], list[int]] = list,
) -> dict[str, float]:
    """val_loss (nats per token), val_perplexity and val_bits_per_byte over all sets; with several sets also val_loss/<name>.

    A collective. `max_samples` per set are spread evenly over it, whatever the number of ranks. `requests` is called between
    micro-batches and returns this rank's flags; soon after any rank's flags are not all 0, every rank raises Stopped.
    """
    engine.model.eval()
    try:
        totals = torch.stack([_loss_sum_and_labels(engine, data, micro_batch_size, max_samples, requests) for data in sets])
    finally:
        engine.model.train()
    sums = engine.all_reduce(totals).tolist()
    loss_sum, labels = (sum(column) for column in zip(*sums, strict=True))
    figures = {"val_loss": loss_sum / labels, "val_perplexity": perplexity(loss_sum / labels)}
    if all(data.bytes_per_token for data in sets):
        text_bytes = sum(count * data.bytes_per_token for data, (_, count) in zip(sets, sums, strict=True))
        figures["val_bits_per_byte"] = bits_per_byte(loss_sum / labels, text_bytes / labels)
    if len(sets) > 1:
        figures |= {f"val_loss/{data.name}": nats / count for data, (nats, count) in zip(sets, sums, strict=True)}
    return figures


def load(engine: Engine, trained: TrainedModel) -> None:
    """Distributes a trained model over the ranks, for measuring it. A collective. Raises what reading the weights raises."""
    from pretrain.interop.weights import weight_loader  # training needs none of this

    engine.prepare(
        lambda: Transformer(trained.model),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.0),  # never steps, and has no state
        0.0,
        seed=0,
        fill=weight_loader(trained.weights, trained.model),
    )


def score(
    engine: Engine,
    trained: TrainedModel,
    data: DataConfig,
    micro_batch_size: int,
    max_samples: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict]:
    """Measures a trained model on each validation set of `data`, then on all of them together (source "all").

    Returns rows of {"source", "samples", "loss", "perplexity", "bits_per_byte"}, the last only if the text's bytes are known.
    A collective; the engine distributes the model over the ranks. on_progress: called with the number of micro-batches done and
    in total. Raises DataError, and what reading the weights raises.
    """
    ids = trained.model.vocab_size
    if tokenizer := trained.load_tokenizer():
        ids = min(ids, tokenizer.vocab_size)  # published models often have more ids than their tokenizer
    sets = open_valid(data, seed=0, vocab_size=ids, tokenizer_fingerprint=trained.tokenizer_fingerprint)
    load(engine, trained)
    samples = [min(each.num_samples, max_samples or each.num_samples) for each in sets]
    rounds = sum(math.ceil(count / (micro_batch_size * engine.mesh.sample_ranks)) for count in samples)
    done = itertools.count()

    def requests() -> list[int]:
        on_progress(next(done), rounds)
        return [0]

    figures = evaluate(engine, sets, micro_batch_size, max_samples, requests)
    rows = []
    for each, count in zip(sets, samples, strict=True):
        loss = figures.get(f"val_loss/{each.name}", figures["val_loss"])
        rows.append({"source": each.name, "samples": count, "loss": loss, "perplexity": perplexity(loss)})
        if each.bytes_per_token:
            rows[-1]["bits_per_byte"] = bits_per_byte(loss, each.bytes_per_token)
    overall = {name: figures[f"val_{name}"] for name in ("loss", "perplexity", "bits_per_byte") if f"val_{name}" in figures}
    return [*rows, {"source": "all", "samples": sum(samples), **overall}]


@torch.no_grad()
def _loss_sum_and_labels(
    engine: Engine, data: ValidData, micro_batch_size: int, max_samples: int | None, requests: Callable[[], list[int]]
) -> torch.Tensor:
    """This rank's [nats, labels], (2,) float64. The host never waits for the pass that it has just started, only for the flags
    of the round before."""
    samples = data.num_samples if max_samples is None else min(max_samples, data.num_samples)
    chosen = [i * data.num_samples // samples for i in range(samples)]
    round_size = micro_batch_size * engine.mesh.sample_ranks
    chosen += [None] * (-samples % round_size)  # masked, so that all ranks run the same number of micro-batches
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)

    def read(first: int) -> tuple[Batch, int]:
        batch = engine.part_of(data.take(chosen[first : first + micro_batch_size]))
        return engine.pin(batch), int((batch.labels_BT != -100).sum()) if engine.mesh.tensor_rank == 0 else 0

    check = StopCheck(engine, requests)
    rounds = range(engine.mesh.sample_rank * micro_batch_size, len(chosen), round_size)
    with contextlib.closing(read_ahead(read, rounds, reads_ahead([data.source]))) as batches:
        for batch, labels in batches:
            check()
            sums[0] += engine.forward(*engine.to_device(batch).inputs).loss_sum
            sums[1] += labels
    return sums
