"""Look into token files, and into the samples that a step of a run was made of."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from tqdm import tqdm

from pretrain.checkpoint.manifest import CheckpointError
from pretrain.config import Config, ConfigError, load
from pretrain.data import excluded
from pretrain.data.indexed import DataError, TokenFile
from pretrain.data.tokenizer import Tokenizer
from pretrain.model.config import vocabulary
from pretrain.report import environment
from pretrain.report.progress import Progress

if TYPE_CHECKING:
    from pretrain.data.batches import TrainData

_QUANTILES = (0, 1, 10, 50, 90, 99, 100)
_SAMPLED_DOCUMENTS = 10_000
_EPOCHS_SHOWN = 3


def main() -> int:
    """Returns the exit status: 0, or 2 when the data are damaged or the arguments cannot be used."""
    parser = argparse.ArgumentParser(
        description="Show what a token file holds, or which text a step of a run was trained on.",
        epilog="examples: python tools/inspect_data.py --data data/stdlib_train --verify;"
        " python tools/inspect_data.py --run runs/first --step 120 --loss --top 3 --quarantine bad.txt",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="PREFIX", help="token file: prefix of a .bin/.idx pair, or a flat .bin")
    what.add_argument("--run", metavar="R", type=Path, help="folder of a run, with --step or --document")
    parser.add_argument("--step", type=int, metavar="N", help="with --run: show the samples of this step (steps count from 1)")
    parser.add_argument(
        "--document",
        metavar="SOURCE:NUMBER",
        help="with --run: show the steps that read a document, as 0:17 for number 17 of source 0",
    )
    parser.add_argument("--rank", type=int, metavar="R", help="with --step: only the samples of this rank")
    parser.add_argument("--ranks", type=int, metavar="N", help="with --rank: of so many (default: those that made the step)")
    parser.add_argument("--loss", action="store_true", help="with --step: the samples by their loss, highest first")
    parser.add_argument("--checkpoint", metavar="STEP|best", help="with --loss: of which model (default: the newest)")
    parser.add_argument("--top", type=int, metavar="N", help="with --loss: only the N samples of highest loss")
    parser.add_argument(
        "--quarantine",
        metavar="FILE",
        type=Path,
        help="with --run: add the samples shown to FILE, for data.quarantine, which leaves them out",
    )
    parser.add_argument("--tokenizer", metavar="FOLDER", help="decodes the ids (default: that of the sidecar or of the run)")
    parser.add_argument("--documents", type=int, default=3, metavar="N", help="with --data: documents to show (3)")
    parser.add_argument("--characters", type=int, default=200, metavar="N", help="of each text shown (200)")
    parser.add_argument("--verify", action="store_true", help="with --data: read all of it and check every checksum")
    arguments = parser.parse_args()
    try:
        lines = about_file(arguments) if arguments.data else about_run(arguments)
        for line in lines:
            print(line)
    except BrokenPipeError:  # whoever reads, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, ConfigError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


# ---------------------------------------------------------------- a token file


def about_file(arguments: argparse.Namespace):
    """Lines about one token file."""
    file = TokenFile(arguments.data)
    tokenizer = tokenizer_of(file, arguments.tokenizer)
    sampled = file.sample()
    yield f"{file.path}: {file.num_tokens:,} tokens ({file.dtype.name})" + (
        f" in {file.num_documents:,} documents" if file.num_documents else ", a flat file without a document index"
    )
    yield f"ids in a sample of {len(sampled):,} tokens: {sampled.min()} to {sampled.max()}"
    end = file.sidecar.end_of_document_id if file.sidecar else tokenizer.end_of_document_id if tokenizer else None
    if end is not None:
        rate = float(np.mean(sampled == end))
        yield f"end-of-document id {end}: {100 * rate:.3g} % of the sampled tokens" + (
            f", one in {1 / rate:,.0f}" if rate else ""
        )
    if file.sidecar:
        yield from about_seal(file)
    else:
        yield "no metadata sidecar: tokenizer, vocabulary and checksums are unknown"
    if file.num_documents:
        numbers = np.unique(np.linspace(0, file.num_documents - 1, _SAMPLED_DOCUMENTS).astype(np.int64)).tolist()
        lengths = [file.document_start(i + 1) - file.document_start(i) for i in numbers]
        quantiles = ", ".join(
            f"{q} % {value:,.0f}" for q, value in zip(_QUANTILES, np.percentile(lengths, _QUANTILES), strict=True)
        )
        yield f"tokens per document, quantiles: {quantiles}"
        for i in range(min(arguments.documents, file.num_documents)):
            yield f"document {i}: {shown(file.document(i), tokenizer, arguments.characters)}"
    if arguments.verify:
        verify(file)
        yield f"verified: all {file.num_blocks} checksums of {file.bin_path} and that of its index are right"


def about_seal(file: TokenFile):
    """The lines of the sidecar."""
    sidecar = file.sidecar
    yield f"tokenizer {sidecar.tokenizer_path}, fingerprint {sidecar.tokenizer_fingerprint}, {sidecar.vocab_size} ids"
    per_token = sidecar.utf8_bytes / sidecar.num_tokens
    yield f"text: {sidecar.utf8_bytes:,} bytes, {per_token:.3f} per token; shuffled: {sidecar.shuffled}"
    yield f"corpus: {', '.join(map(str, sidecar.corpus.get('inputs', [])))}, sha256 {sidecar.corpus.get('sha256')}"
    yield f"entropies in nats per token: unigram {sidecar.unigram_entropy_nats:.4f}, bigram {sidecar.bigram_entropy_nats:.4f}"


def verify(file: TokenFile) -> None:
    """Checks all checksums with progress; raises DataError."""
    file.check_index()
    with Progress("verifying", file.num_tokens * file.dtype.itemsize) as progress:
        for i in range(file.num_blocks):
            file.check_block(i)
            progress.update(min((i + 1) * file.sidecar.block_bytes, file.num_tokens * file.dtype.itemsize))


def tokenizer_of(file: TokenFile, folder: str | None) -> Tokenizer | None:
    """The tokenizer asked for, else that of the sidecar where it still is in its place, else None. Raises DataError."""
    if folder:
        return Tokenizer.load(folder)
    if file.sidecar and Path(file.sidecar.tokenizer_path).is_dir():
        tokenizer = Tokenizer.load(file.sidecar.tokenizer_path)
        return tokenizer if tokenizer.fingerprint == file.sidecar.tokenizer_fingerprint else None
    return None


def shown(tokens: np.ndarray, tokenizer: Tokenizer | None, characters: int) -> str:
    """The beginning of `tokens` on one line: decoded where there is a tokenizer, else as ids."""
    if tokenizer is None:
        text = " ".join(map(str, tokens[: characters // 5].tolist()))
        return text + (" ..." if len(tokens) > characters // 5 else "")
    text = tokenizer.decode(tokens[: 4 * characters].tolist())
    return json.dumps(text[:characters], ensure_ascii=False) + ("..." if len(text) > characters else "")


# ---------------------------------------------------------------- a run


class Sample(NamedTuple):
    """One sample of a step."""

    position: int
    source: int
    epoch: int
    number: int
    loss: float | None
    """Mean over its labels, nats; None: not asked for."""


def about_run(arguments: argparse.Namespace) -> Iterator[str]:
    """Lines about the samples of one step, or about the steps of one document."""
    from pretrain.data.batches import open_train  # imports torch, which looking into a file does not need

    if (arguments.step is None) == (arguments.document is None):
        raise DataError("--run needs either --step N or --document SOURCE:NUMBER")
    settings = arguments.run / "config.yaml"
    if not settings.is_file():
        raise DataError(f"{settings}: not found; --run takes the folder of a run that was started")
    config = load(["--config", str(settings)], world_size=None)
    folder = arguments.tokenizer or config.tokenizer.path
    tokenizer = Tokenizer.load(folder) if folder else None
    _, vocab_size = vocabulary(config.model, tokenizer and tokenizer.vocab_size)
    fingerprint = tokenizer.fingerprint if tokenizer else None
    data = open_train(config.data, seed=config.run.seed, vocab_size=vocab_size, tokenizer_fingerprint=fingerprint)
    left_out = ranges_left_out(arguments.run)
    if arguments.document is not None:
        return steps_of_document(data, arguments, config, left_out)
    if arguments.step < 1:
        raise DataError(f"--step {arguments.step}: steps count from 1")
    return samples_of_step(data, arguments, config, tokenizer, left_out)


def ranges_left_out(run: Path) -> excluded.PositionRanges:
    """The samples that the run did without, after it had diverged on them."""
    path, ranges = run / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        if '"skipped_positions"' in line:
            ranges = excluded.add_range(ranges, *json.loads(line)["skipped_positions"])
    return ranges


def samples_of_step(
    data: TrainData,
    arguments: argparse.Namespace,
    config: Config,
    tokenizer: Tokenizer | None,
    left_out: excluded.PositionRanges,
) -> Iterator[str]:
    """The samples of the global batch of a step, or of one rank's share, with their documents; by loss if that is asked for."""
    size = config.batch.global_batch_size
    first = excluded.position_of_step(arguments.step, size, left_out)
    of_rank = ""
    if arguments.rank is not None:
        made = environment.start_of_step(environment.read(arguments.run), arguments.step)
        ranks = arguments.ranks or made.get("world_size")
        if ranks is None or size % ranks or not 0 <= arguments.rank < ranks:
            raise DataError(
                f"--rank {arguments.rank} of {ranks or '?'}: give --ranks N that divides {size}, and a rank below it"
            )
        size //= ranks
        first += arguments.rank * size
        of_rank = f", rank {arguments.rank} of {ranks}"
    yield f"step {arguments.step}{of_rank}: positions {first:,} to {first + size - 1:,}"
    samples = [Sample(first + offset, *ids, None) for offset, ids in enumerate(data.sample_ids(first, size))]
    part_loss: Callable[[Sample, int, int], float] | None = None
    if arguments.loss:
        losses, part_loss, trained = losses_of(data, samples, arguments)
        samples = [sample._replace(loss=loss) for sample, loss in zip(samples, losses, strict=True)]
        samples.sort(key=lambda sample: -sample.loss)
        yield f"by loss under {trained}: median {statistics.median(losses):.3f}, lowest {min(losses):.3f} nats per token"
        samples = samples[: arguments.top]
    for sample in samples:
        yield from about_sample(data, sample, tokenizer, arguments.characters, part_loss)
    if arguments.quarantine:
        why = f"step {arguments.step} of {config.run.name}"
        noted = [why if each.loss is None else f"{why}, loss {each.loss:.3f}" for each in samples]
        yield put_into_quarantine(data, arguments.quarantine, samples, noted, config)


def about_sample(
    data: TrainData,
    sample: Sample,
    tokenizer: Tokenizer | None,
    characters: int,
    part_loss: Callable[[Sample, int, int], float] | None,
) -> Iterator[str]:
    """Where a sample comes from, then each document that it holds a part of."""
    source = data.sources[sample.source]
    tokens = source.read(np.array([sample.number]))[0]
    loss = "" if sample.loss is None else f"loss {sample.loss:.3f}  "
    place = f"{loss}{sample.position}: source {sample.source} ({source.name}), epoch {sample.epoch}, sample {sample.number}"
    file = getattr(source, "file", None)
    if file is None or not file.num_documents:
        yield f"{place}: {shown(tokens, tokenizer, characters)}"
        return
    yield place
    begin = sample.number * source.sequence_length
    end = begin + len(tokens)
    for document in range(file.document_at(begin), file.document_at(end - 1) + 1):
        start, stop = max(begin, file.document_start(document)), min(end, file.document_start(document + 1))
        loss = ""
        if part_loss and stop - max(start, begin + 1) > 0:  # the first token of a sample is no label
            loss = f"loss {part_loss(sample, max(start, begin + 1) - begin, stop - begin):.3f}  "
        text = shown(tokens[start - begin : stop - begin], tokenizer, characters)
        yield f"  {loss}document {document}, its tokens {start - file.document_start(document)} and on: {text}"


def losses_of(
    data: TrainData, samples: list[Sample], arguments: argparse.Namespace
) -> tuple[list[float], Callable[[Sample, int, int], float], str]:
    """(mean loss of each sample, the same of tokens [from, to) of a sample, the checkpoint in words); on the CPU in fp32."""
    import torch

    from pretrain.data.batches import MASKED
    from pretrain.interop.load import open_run
    from pretrain.interop.weights import load_transformer

    if (chosen := arguments.checkpoint) not in (None, "best") and not chosen.isdecimal():
        raise DataError(f"--checkpoint {chosen}: give the step of a checkpoint, or best")
    model = load_transformer(open_run(arguments.run, chosen).weights)

    @torch.inference_mode()
    def part_loss(sample: Sample, start: int, stop: int) -> float:
        """Of the labels that are tokens [start, stop) of the sample, T + 1 long."""
        batch = data.take(sample.position, 1)
        labels_BT = torch.full_like(batch.labels_BT, MASKED)
        labels_BT[:, start - 1 : stop - 1] = batch.labels_BT[:, start - 1 : stop - 1]
        return float(model(batch.tokens_BT, labels_BT, batch.documents_BT).loss_sum) / (stop - start)

    length = data.take(0, 1).labels_BT.shape[1]
    losses = [part_loss(sample, 1, length + 1) for sample in tqdm(samples, "losses", disable=None)]
    return losses, part_loss, "the newest checkpoint" if chosen is None else f"checkpoint {chosen}"


def put_into_quarantine(data: TrainData, path: Path, samples: list[Sample], noted: list[str], config: Config) -> str:
    """Adds the samples to the file; a line that says so."""
    entries = [(data.sources[sample.source].name, sample.number, note) for sample, note in zip(samples, noted, strict=True)]
    excluded.append_to_quarantine(path, config.data.sequence_length, entries)
    return f"{path}: {len(entries)} samples added; --data.quarantine {path} leaves them out"


def steps_of_document(
    data: TrainData, arguments: argparse.Namespace, config: Config, left_out: excluded.PositionRanges
) -> Iterator[str]:
    """Where each sample that holds a part of the document stands in the first epochs."""
    chosen = arguments.document
    try:
        number, document = map(int, chosen.split(":"))
        if min(number, document) < 0:
            raise IndexError
        source = data.sources[number]
        tokens = [source.file.document_start(document), source.file.document_start(document + 1) - 1]
    except (ValueError, IndexError, AttributeError, TypeError):
        raise DataError(f"--document {chosen}: give SOURCE:NUMBER of a source with a document index, as 0:17") from None
    yield f"document {document} of source {number} ({source.name}): tokens {tokens[0]:,} to {tokens[1]:,}"
    last = min(tokens[1] // source.sequence_length, source.num_samples - 1)
    samples = range(tokens[0] // source.sequence_length, last + 1)
    size = config.batch.global_batch_size
    for sample in samples:
        positions = [data.position(number, epoch, sample) for epoch in range(_EPOCHS_SHOWN)]
        steps = [None if each is None else excluded.step_of_position(each, size, left_out) for each in positions]
        steps = ", ".join(f"{step or 'left out'} (epoch {epoch})" for epoch, step in enumerate(steps))
        yield f"sample {sample}: steps {steps}"
    if arguments.quarantine:
        holding = [Sample(0, number, 0, sample, None) for sample in samples]
        noted = [f"document {document}"] * len(holding)
        yield put_into_quarantine(data, arguments.quarantine, holding, noted, config)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # texts of any language, on a terminal that may know one
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
