"""Shows what a token file contains, which text a step of a run was trained on, or how well a tokenizer fits texts.

python tools/inspect_data.py --data data/stdlib_train --verify
python tools/inspect_data.py --run runs/first --step 120 --loss --top 3 --quarantine bad.txt
python tools/inspect_data.py --run runs/first --document 0:17
python tools/inspect_data.py --text prose.jsonl code/ --tokenizer data/tokenizer --against gpt2 --picture tokenizers.png
python tools/inspect_data.py --text data/web/ 'data/code_train-*' --against gpt2
python tools/inspect_data.py --config my_run.yaml --against gpt2
"""

from __future__ import annotations

import argparse
import bisect
import glob
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from tqdm import tqdm

from pretrain import stages
from pretrain.config import Config, load
from pretrain.data import checks, excluded, shards, tokenizer_report
from pretrain.data.corpus import Corpus
from pretrain.data.encoding import Encoder, chunked
from pretrain.data.flat import DTYPES
from pretrain.data.indexed import DataError, Sidecar, TokenFile
from pretrain.data.reads import OpenFiles
from pretrain.data.store import Store
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.tokenizer_report import Usage
from pretrain.files import iter_json_lines, write_atomically
from pretrain.report import environment
from pretrain.report.plot_tokenizer import TokenizerCurves, plot_tokenizers
from pretrain.report.progress import Progress
from pretrain.run import command_line
from tools import common

if TYPE_CHECKING:
    from pretrain.data.batches import TrainData
    from pretrain.data.sources import FileSource, ShardedSource
    from pretrain.run.parts import Parts

_EPOCHS_SHOWN = 3
_RANGES_SHOWN, _PIECES_SHOWN = 20, 10
_DECODED_TOKENS = 1 << 22  # of each source of tokens

PartLoss = Callable[["Sample", int, int], float]
"""Mean loss in nats of the tokens [start, stop) of a sample, counted from its first token; start is at least 1."""


def main(argv: list[str]) -> None:
    """Raises UserError, OSError."""
    parser = command_line.make_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="PREFIX",
                      help="token file: prefix of a .bin/.idx pair, or a flat .bin; or a folder or pattern")  # fmt: skip
    what.add_argument("--run", metavar="FOLDER", type=Path, help="a run, runs/<name>; with --step or --document")
    what.add_argument("--text", nargs="+", metavar="FILE", help="report how well a tokenizer fits these sources: each is a "
                      "file or folder of text, or of tokens, which are decoded")  # fmt: skip
    what.add_argument("--config", metavar="YAML", type=Path, help="the same report for the tokens of each training source of "
                      "these settings, in all stages")  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=command_line.at_least(1), metavar="N", help="with --run: show the samples of this step")
    which.add_argument("--document", metavar="SOURCE:NUMBER",
                       help="with --run: show the steps that read a document, as 0:17 for number 17 of source 0")  # fmt: skip
    add = parser.add_argument
    add("--rank", type=command_line.at_least(0), metavar="R", help="with --step: only the samples of this rank")
    add("--ranks", type=command_line.at_least(1), metavar="N", help="with --rank: number of ranks (default: as in that step)")
    add("--loss", action="store_true", help="with --step: show the loss of each sample, highest first")
    add("--checkpoint", metavar="STEP|best", help="with --loss: model that computes the losses (default: the newest)")
    add("--top", type=command_line.at_least(1), metavar="N", help="with --loss: only the N samples of highest loss")
    add("--quarantine", metavar="FILE", type=Path,
        help="with --run: add the samples shown to FILE, which --data.quarantine FILE then leaves out")  # fmt: skip
    add("--tokenizer", metavar="FOLDER", help="with --text or --config: the tokenizer (default: of the settings or of the "
        "first token file); else decodes the ids (default: the tokenizer of the data or of the run)")  # fmt: skip
    add("--documents", type=command_line.at_least(0), default=3, metavar="N",
        help="with --data: number of documents to show, evenly spaced (%(default)s)")  # fmt: skip
    add("--characters", type=command_line.at_least(1), default=200, metavar="N", help="length of each text (%(default)s)")
    add("--dtype", choices=DTYPES, help="with --data: type of the tokens of a flat .bin (default: judged by its content)")
    add("--verify", action="store_true", help="with --data: read everything and compare all checksums")
    add("--against", metavar="FOLDER", help="with --text or --config: compare with this tokenizer")
    add("--text-key", metavar="KEY", default="text", help="with --text: key or column that contains the text (%(default)s)")
    add("--picture", metavar="PNG", type=Path, help="with --text or --config: draw the report")
    add("--json", metavar="FILE", type=Path, help="with --text or --config: write the figures")
    add("--workers", type=command_line.at_least(1), default=common.usable_cores(), metavar="N",
        help="with --text or --config: processes that encode (default: one per core, %(default)s)")  # fmt: skip
    options = parser.parse_args(argv)
    if options.text and not options.tokenizer and not any(map(holds_tokens, options.text)):
        parser.error("--text needs --tokenizer")
    about_fit = bool(options.text or options.config)
    if not about_fit and (options.against or options.picture or options.json):
        parser.error("--against, --picture and --json can only be used with --text or --config")
    if options.run and options.step is None and options.document is None:
        parser.error("--run needs --step N or --document SOURCE:NUMBER")
    if (chosen := options.checkpoint) not in (None, "best") and not chosen.isdecimal():
        parser.error(f"--checkpoint: got {chosen!r}, allowed: a step or best")
    about = about_file if options.data else about_tokenizers if about_fit else about_run
    for line in about(options):
        print(line)


# ---------------------------------------------------------------- a token file


def about_file(options: argparse.Namespace) -> Iterator[str]:
    """Lines about one token file."""
    files = shards.open_shards(options.data, options.dtype)
    if len(files) > 1:
        yield from about_shards(files)
    file = files[0]
    tokenizer = tokenizer_report.tokenizer_of(file, options.tokenizer)
    sampled, sidecar = file.sample(), file.sidecar
    documents = f" in {file.num_documents:,} documents" if file.num_documents else ", a flat file without a document index"
    yield f"{file.path}: {file.num_tokens:,} tokens ({file.dtype.name}){documents}"
    yield f"ids in a sample of {len(sampled):,} tokens: {sampled.min()} to {sampled.max()}"
    described = sidecar or tokenizer
    if described:
        rate = float(np.mean(sampled == described.end_of_document_id))
        often = f", one in {1 / rate:,.0f}" if rate else ""
        yield f"end-of-document id {described.end_of_document_id}: {100 * rate:.3g} % of the sampled tokens{often}"
    unknown_ids = tokenizer.unknown_ids if tokenizer else frozenset()
    if unknown := checks.unknown_fraction(file, unknown_ids):
        yield f"text without ids: {unknown:.3%} of the text or of the tokens {sorted(unknown_ids) or ''}".rstrip()
    if sidecar:
        yield from about_sidecar(sidecar)
    else:
        yield "no metadata sidecar: tokenizer, vocabulary and checksums are unknown"
    if file.num_documents:
        yield f"tokens per document, quantiles: {checks.length_quantiles([file])}"
        count = min(options.documents, file.num_documents)
        for i in np.linspace(0, file.num_documents - 1, count).astype(int).tolist():
            yield f"document {i}: {shown(file.document(i), tokenizer, options.characters)}"
    if options.verify:
        yield verify(files)


def about_shards(files: list[TokenFile]) -> Iterator[str]:
    """Lines about many token files that are one source."""
    sidecar, counts = shards.common_sidecar(files), [file.num_documents for file in files]
    sizes = sorted(file.num_tokens for file in files)
    documents = f" in {sum(counts):,} documents" if all(counts) else ""
    yield f"{len(files):,} files: {sum(sizes):,} tokens ({shards.common_dtype(files).name}){documents}"
    yield f"tokens per file: {sizes[0]:,} to {sizes[-1]:,}, median {statistics.median(sizes):,.0f}"
    if sidecar:
        yield f"text: {sidecar.utf8_bytes:,} bytes, {sidecar.utf8_bytes / sidecar.num_tokens:.3f} per token"
    yield f"the first of them, {files[0].path}, in detail:"


def verify(files: list[TokenFile]) -> str:
    """Compares all checksums. Raises DataError."""
    sizes, before = [file.num_tokens * file.dtype.itemsize for file in files], 0
    with Progress("verifying", sum(sizes)) as progress:
        for file, size in zip(files, sizes, strict=True):
            file.check_checksums(lambda done, before=before: progress.update(before + done))
            before += size
    checksums = sum(file.num_blocks + 1 for file in files)
    if len(files) == 1:
        return f"verified: {files[0].bin_path} and its index match all {checksums} checksums"
    return f"verified: {len(files):,} files and their indexes match all {checksums:,} checksums"


def about_sidecar(sidecar: Sidecar) -> Iterator[str]:
    """Lines about the metadata of a token file."""
    per_token = sidecar.utf8_bytes / sidecar.num_tokens
    yield f"tokenizer {sidecar.tokenizer_path}, fingerprint {sidecar.tokenizer_fingerprint}, {sidecar.vocab_size} ids"
    yield f"text: {sidecar.utf8_bytes:,} bytes, {per_token:.3f} per token; shuffled: {sidecar.shuffled}"
    sha256 = sidecar.corpus.get("sha256")  # of text: unknown for tokens of another program
    yield f"corpus: {', '.join(map(str, sidecar.corpus.get('inputs', [])))}{f', sha256 {sha256}' if sha256 else ''}"
    yield f"entropies in nats per token: unigram {sidecar.unigram_entropy_nats:.4f}, bigram {sidecar.bigram_entropy_nats:.4f}"


def shown(tokens: np.ndarray, tokenizer: Tokenizer | None, characters: int) -> str:
    """The start of `tokens` on one line: decoded if there is a tokenizer, else as ids."""
    if tokenizer is None:
        text = " ".join(map(str, tokens[: characters // 5].tolist()))
        return text + (" ..." if len(tokens) > characters // 5 else "")
    text = tokenizer.decode(tokens[: 4 * characters].tolist())
    return json.dumps(text[:characters], ensure_ascii=False) + ("..." if len(text) > characters else "")


# ---------------------------------------------------------------- a tokenizer


class Fit(NamedTuple):
    """A tokenizer and what it makes of each source."""

    folder: str
    tokenizer: Tokenizer
    usages: dict[str, Usage]
    all: Usage
    byte_ids: list[int]


def about_tokenizers(options: argparse.Namespace) -> Iterator[str]:
    """Lines about the fit of a tokenizer, and of another, to texts; writes the picture and the figures."""
    if options.config:
        sources = sources_of(options)
    else:
        sources = {name: shards.open_shards(name) if holds_tokens(name) else None for name in options.text}
    folder = options.tokenizer or tokenizer_report.folder_of_tokenizer(next(filter(None, sources.values()))[0])
    folders = dict.fromkeys([folder, options.against] if options.against else [folder])
    fits = [measure(folder, sources, options) for folder in folders]
    yield f"{'bytes/token':>11} {'chars/token':>11} {'tokens/word':>11} {'byte pieces':>11} {'unknown':>9} {'changed':>9}"
    for source in [*fits[0].usages, *([None] if len(fits[0].usages) > 1 else [])]:
        for fit in fits:
            usage = fit.usages[source] if source else fit.all
            first, second, third, *fractions = usage.rates(fit.byte_ids).values()
            shares = f"{fractions[0]:>11.3%} {fractions[1]:>9.3%} {fractions[2]:>9.3%}"
            yield f"{first:>11.3f} {second:>11.3f} {third:>11.3f} {shares}  {source or 'all sources'}, {fit.folder}"
    if len(fits) > 1:
        fewer = fits[0].all.tokens / max(1, fits[1].all.tokens)
        yield f"{fits[0].folder} makes {fewer:.3f} times as many tokens of these texts as {fits[1].folder}"
    for fit in fits:
        yield from about_vocabulary(fit)
    if options.json:
        write_atomically(options.json, json.dumps([figures(fit) for fit in fits], indent=1, ensure_ascii=False) + "\n")
    if options.picture:
        curves = [
            TokenizerCurves(
                fit.folder,
                {source: usage.rates(fit.byte_ids)["bytes_per_token"] for source, usage in fit.usages.items()},
                fit.all.counts_V,
                tokenizer_report.piece_lengths(fit.tokenizer),
            )
            for fit in fits
        ]
        plot_tokenizers(curves, options.picture)
        yield f"{options.picture}"


def sources_of(options: argparse.Namespace) -> dict[str, list[TokenFile]]:
    """The training sources of the settings --config, of all stages; their tokenizer becomes --tokenizer if there is none."""
    config = load(["--config", str(options.config)], world_size=None)
    options.tokenizer = options.tokenizer or config.tokenizer.path
    open_files = OpenFiles(store=Store(config.data.cache_directory, config.data.cache_gib))
    found = {}
    for stage in stages.settings(config):
        for source in stage.data.train:
            name = source.path if isinstance(source.path, str) else ", ".join(source.path)
            if name not in found:
                found[name] = shards.open_shards(source.path, source.dtype, config.model.vocab_size, open_files=open_files)
    if not found:
        raise DataError(f"{options.config}: has no training sources (data.train)")
    return found


def holds_tokens(source: str) -> bool:
    """True for token files with a document index, a folder or a pattern of them; false for texts."""
    prefix = source[:-4] if source.endswith((".bin", ".idx")) else source
    names = [f"{glob.escape(prefix)}.idx", f"{prefix}.idx", f"{glob.escape(source)}/*.idx"]
    return any(map(glob.glob, names))


def measure(folder: str, sources: dict[str, list[TokenFile] | None], options: argparse.Namespace) -> Fit:
    """Encodes all sources, of token files or of texts (None), with a tokenizer. Raises DataError."""
    usages = {}
    with Encoder(folder, options.workers) as encoder:
        tokenizer = encoder.tokenizer
        for source, files in sources.items():
            if files:
                corpus = tokenizer_report.DecodedTexts(
                    files, tokenizer_report.own_tokenizer(files[0], options.tokenizer), _DECODED_TOKENS
                )
            else:
                corpus = Corpus([source], text_key=options.text_key)
            usage = Usage.empty(tokenizer)
            with Progress(f"encoding {source}", corpus.total_bytes) as progress:
                for chunk, encoded in encoder.encode(chunked(corpus)):
                    usage.add(chunk, encoded, tokenizer.end_of_document_id)
                    progress.update(corpus.read_bytes if corpus.total_bytes else corpus.utf8_bytes, usage.tokens)
            if not usage.documents:
                raise DataError(f"{source}: no documents with text{''.join(f'; {each}' for each in corpus.problems())}")
            usages[source] = usage
    return Fit(folder, tokenizer, usages, sum(usages.values(), Usage.empty(tokenizer)), tokenizer.byte_ids())


def about_vocabulary(fit: Fit) -> Iterator[str]:
    """Lines about the use of the ids in all sources together."""
    counts_V, size = fit.all.counts_V, fit.tokenizer.vocab_size
    unused = np.flatnonzero(counts_V == 0)
    spelled = len(set(unused.tolist()) & set(fit.byte_ids))
    yield f"{fit.folder}: {len(unused):,} of {size:,} ids are unused ({len(unused) / size:.1%}), {spelled} of them byte pieces"
    places = [f"{a}-{b}" if b > a else f"{a}" for a, b in tokenizer_report.ranges(unused.tolist())]
    if places:
        yield f"  unused: {', '.join(places[:_RANGES_SHOWN])}{', ...' if len(places) > _RANGES_SHOWN else ''}"
    lengths = tokenizer_report.piece_lengths(fit.tokenizer)
    for title, order in (("most frequent", counts_V), ("longest", lengths)):
        ids = np.argsort(-order, kind="stable")[:_PIECES_SHOWN].tolist()
        shown = [f"{piece_name(fit, id)} {counts_V[id]:,}" for id in ids]
        yield f"  {title}, with counts: {', '.join(shown)}"
    if fit.all.changed:
        written, decoded = fit.all.changed[0]
        count = f"{len(fit.all.changed):,} of {fit.all.compared:,} compared documents"
        yield f"  {count} decode to another text, as {written!r} to {decoded!r}"


def piece_name(fit: Fit, id: int) -> str:
    """The text of an id, at most 40 characters; its number if it has no text of its own."""
    text = fit.tokenizer.decode([id])
    return json.dumps(text[:40], ensure_ascii=False) if text and id not in fit.byte_ids else f"id {id}"


def figures(fit: Fit) -> dict:
    """The figures of --json."""
    unused = np.flatnonzero(fit.all.counts_V == 0).tolist()
    return {
        "tokenizer": fit.folder,
        "fingerprint": fit.tokenizer.fingerprint,
        "vocab_size": fit.tokenizer.vocab_size,
        "sources": {source: usage.figures(fit.byte_ids) for source, usage in fit.usages.items()},
        "all": fit.all.figures(fit.byte_ids),
        "unused_ids": tokenizer_report.ranges(unused),
    }


# ---------------------------------------------------------------- a run


class Sample(NamedTuple):
    """One sample of a step."""

    position: int
    source: int
    epoch: int
    number: int
    loss: float | None
    """Mean over its labels, nats. None: not computed."""


def about_run(options: argparse.Namespace) -> Iterator[str]:
    """Lines about the samples of one step, or about the steps of one document."""
    from pretrain.run.parts import open_parts  # imports torch, which --data does not need

    settings = options.run / "config.yaml"
    if not settings.is_file():
        raise DataError(f"{settings}: not found; --run takes the folder of a run that was started")
    config = load(["--config", str(settings)], world_size=None)
    parts = open_parts(config, Tokenizer.load(options.tokenizer) if options.tokenizer else None)
    parts = parts._replace(data=as_in_run(parts.data, options.run))
    skipped = skipped_positions(options.run)
    if options.document is not None:
        return steps_of_document(parts.data, options, config, skipped)
    return samples_of_step(parts, options, config, skipped)


def as_in_run(data: TrainData, run: Path) -> TrainData:
    """`data` with its stages where they began in the run, by its environment.json; older versions had no stages."""
    starts = environment.read(run).get("starts", [])
    rows = starts[-1].get("stages", []) if starts else []
    return data.starting_at([(row[1], row[3]) for row in rows]) if len(rows) == len(data.stages) else data


def skipped_positions(run: Path) -> excluded.PositionRanges:
    """Positions that the run skipped after rollbacks, from its metrics.jsonl."""
    path, ranges = run / "metrics.jsonl", []
    for _, record in iter_json_lines(path) if path.exists() else []:
        if record and "skipped_positions" in record:
            ranges = excluded.add_range(ranges, *record["skipped_positions"])
    return ranges


def samples_of_step(
    parts: Parts, options: argparse.Namespace, config: Config, skipped: excluded.PositionRanges
) -> Iterator[str]:
    """The samples of a step, or of one rank's slice of it, with their documents; sorted by loss with --loss."""
    data, start = parts.data, environment.start_of_step(environment.read(options.run), options.step)
    size, since = batch_since(start, config, options.step)
    first, of_rank = excluded.position_of_step(options.step, size, skipped, since), ""
    if options.rank is not None:
        ranks, mesh = options.ranks or start.get("world_size"), start.get("mesh", {})
        share = mesh.get("sequence", 1) * mesh.get("tensor", 1)  # neighbouring ranks that share their sequences
        if ranks is None or ranks % share or size % (ranks // share) or options.rank >= ranks:
            problem = f"--rank {options.rank} of {ranks or '?'} ranks"
            groups = f"N / {share}" if share > 1 else "N"
            raise DataError(f"{problem}: not allowed; give --ranks N so that {groups} divides {size}, and a rank below N")
        size //= ranks // share
        first += options.rank // share * size
        of_rank = f", rank {options.rank} of {ranks}" + (f", {share} of which share sequences" if share > 1 else "")
    yield f"step {options.step}{of_rank}: positions {first:,} to {first + size - 1:,}"
    samples = [Sample(first + offset, *ids, None) for offset, ids in enumerate(data.sample_ids(first, size))]
    part_loss = None
    if options.loss:
        part_loss = open_part_loss(data, options.run, options.checkpoint)
        length = data.stage_at(first).cut.sequence_length
        losses = [part_loss(sample, 1, length + 1) for sample in tqdm(samples, "losses", disable=None)]
        samples = [sample._replace(loss=loss) for sample, loss in zip(samples, losses, strict=True)]
        samples.sort(key=lambda sample: -sample.loss)
        checkpoint = f"checkpoint {options.checkpoint}" if options.checkpoint else "the newest checkpoint"
        yield f"by loss under {checkpoint}: median {statistics.median(losses):.3f}, lowest {min(losses):.3f} nats per token"
        samples = samples[: options.top]
    for sample in samples:
        yield from about_sample(data, sample, parts.tokenizer, options.characters, part_loss)
    if options.quarantine:
        reason = f"step {options.step} of {config.run.name}"
        comments = [reason if each.loss is None else f"{reason}, loss {each.loss:.3f}" for each in samples]
        yield put_into_quarantine(data, options.quarantine, samples, comments, config)


def batch_since(start: dict, config: Config, step: int) -> tuple[int, tuple[int, int]]:
    """(global batch size of `step`, (an earlier step with it, position after that)) by its start in environment.json."""
    size, since = config.batch.global_batch_size, (0, 0)  # older versions wrote neither
    if "position" in start:
        size, since = start["global_batch_size"], (start["step"], start["position"])
    for stage, (begin, position, *_) in zip(stages.settings(config), start.get("stages", []), strict=False):
        if since[0] <= begin < step and begin:
            size, since = stage.batch.global_batch_size, (begin, position)
    return size, since


def about_sample(
    data: TrainData, sample: Sample, tokenizer: Tokenizer | None, characters: int, part_loss: PartLoss | None
) -> Iterator[str]:
    """The place of a sample, then each document of which it contains a part."""
    source, cut = data.sources[sample.source], data.stage_at(sample.position).cut
    tokens = source.read(np.array([sample.number]), cut)[0]
    loss = "" if sample.loss is None else f"loss {sample.loss:.3f}  "
    place = f"{loss}{sample.position}: source {sample.source} ({source.name}), epoch {sample.epoch}, sample {sample.number}"
    file, first, first_document = None, 0, 0
    if source.files:
        first_samples = source.first_samples(cut)
        number = bisect.bisect_right(first_samples, sample.number) - 1
        file, first_document = source.files[number], int(source.first_documents[number])
        first = (sample.number - int(first_samples[number])) * cut.sequence_length
    if len(source.files) > 1:
        place += f", in {file.path}"
    if file is None or not file.num_documents:
        yield f"{place}: {shown(tokens, tokenizer, characters)}"
        return
    yield place
    end = first + len(tokens)
    for document in range(file.document_at(first), file.document_at(end - 1) + 1):
        begin, after = file.document_range(document)
        start, stop = max(first, begin), min(end, after)
        loss = ""
        if part_loss and stop - max(start, first + 1) > 0:  # the first token of a sample is not a label
            loss = f"loss {part_loss(sample, max(start, first + 1) - first, stop - first):.3f}  "
        text = shown(tokens[start - first : stop - first], tokenizer, characters)
        yield f"  {loss}document {first_document + document}, from its token {start - begin}: {text}"


def open_part_loss(data: TrainData, run: Path, checkpoint: str | None) -> PartLoss:
    """The loss of parts of samples under a checkpoint of the run; on the CPU, in fp32."""
    import torch

    from pretrain.data.batches import MASKED
    from pretrain.interop.load import open_run
    from pretrain.interop.weights import load_transformer

    model = load_transformer(open_run(run, checkpoint).weights)

    @torch.inference_mode()
    def part_loss(sample: Sample, start: int, stop: int) -> float:
        batch = data.take(sample.position, 1)
        labels_BT = torch.full_like(batch.labels_BT, MASKED)
        labels_BT[:, start - 1 : stop - 1] = batch.labels_BT[:, start - 1 : stop - 1]
        return float(model(batch.tokens_BT, labels_BT, batch.documents_BT).loss_sum) / (stop - start)

    return part_loss


def put_into_quarantine(data: TrainData, path: Path, samples: list[Sample], comments: list[str], config: Config) -> str:
    """Adds the samples to the file and returns a line that reports it."""
    length, rows = config.data.sequence_length, []  # the file counts in samples of the first stage
    for sample, comment in zip(samples, comments, strict=True):
        own = data.stage_at(sample.position).cut.sequence_length
        (_, first, end), *_ = excluded.recut([[sample.source, sample.number, sample.number + 1]], own, length)
        rows += [(data.sources[sample.source].name, number, comment) for number in range(first, end)]
    excluded.append_to_quarantine(path, length, rows)
    return f"{path}: samples added: {len(rows)}; train without them with --data.quarantine {path}"


def steps_of_document(
    data: TrainData, options: argparse.Namespace, config: Config, skipped: excluded.PositionRanges
) -> Iterator[str]:
    """The steps, in the first epochs, that read each sample that contains a part of the document."""
    number, document, source = find_document(data, options.document)
    shard = bisect.bisect_right(source.first_documents, document) - 1
    first, end = source.files[shard].document_range(document - int(source.first_documents[shard]))
    of_file = f" of {source.files[shard].path}" if len(source.files) > 1 else ""
    yield f"document {document} of source {number} ({source.name}): tokens {first:,} to {end - 1:,}{of_file}"
    starts, found = environment.read(options.run).get("starts", []), []

    def step_of(position: int) -> int | None:
        start = next((each for each in reversed(starts) if each.get("position", 0) <= position), {})
        begun = [row[0] for row in start.get("stages", []) if row[1] <= position]
        size, since = batch_since(start, config, max([start.get("step", 0), *begun]) + 1)
        return excluded.step_of_position(position, size, skipped, since)

    ends = [stage.position for stage in data.stages[1:]] + [math.inf]
    for stage, after in zip(data.stages, ends, strict=True):
        if number not in stage.order.passes:
            continue
        length, first_sample = stage.cut.sequence_length, int(source.first_samples(stage.cut)[shard])
        count = source.shards[shard].num_blocks(stage.cut.block_length) * stage.cut.samples_per_block
        epoch = stage.order.passes[number].cursor.epoch
        epochs = range(epoch, epoch + _EPOCHS_SHOWN)
        of_stage = f"stage {data.stages.index(stage)}, " if len(data.stages) > 1 else ""
        for sample in range(first_sample + first // length, first_sample + min((end - 1) // length, count - 1) + 1):
            positions = [data.position(number, each, sample, stage) for each in epochs]
            read = [None if each is None or each >= after else each for each in positions]
            steps = [None if each is None else step_of(each) for each in read]
            shown = ", ".join(f"{step or 'none'} (epoch {epoch})" for epoch, step in zip(epochs, steps, strict=True))
            yield f"{of_stage}sample {sample}: steps {shown}"
            found.append(Sample(stage.position, number, epoch, sample, None))
    if options.quarantine:
        yield put_into_quarantine(data, options.quarantine, found, [f"document {document}"] * len(found), config)


def find_document(data: TrainData, text: str) -> tuple[int, int, FileSource | ShardedSource]:
    """(source number, document number, source) of SOURCE:NUMBER. Raises DataError."""
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        number, document = int(match[1]), int(match[2])
        source = data.sources[number] if number < len(data.sources) else None
        if source and document < sum(file.num_documents or 0 for file in source.files):
            return number, document, source
    raise DataError(f"--document {text}: not found; give SOURCE:NUMBER, as 0:17, of a source with a document index")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
