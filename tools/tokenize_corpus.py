"""Turns raw text into token files for training: PREFIX.bin and .idx (Megatron's format) and the metadata sidecar PREFIX.json.

    python tools/tokenize_corpus.py --input stdlib --tokenizer data/tokenizer --output data/stdlib --valid-fraction 0.02
    sbatch --array=0-63 tools/tokenize_slurm.sh 64 --input web/ --tokenizer data/tokenizer --output data/web/text

Two passes. The first reads documents in order and encodes them on all cores into staging files. The second copies them,
shuffled by a keyed permutation, into the training and the validation file. The result depends on the text, the tokenizer and
the seed only, not on the number of workers, and memory does not grow with the corpus. Text that the tokenizer cannot represent
is counted over everything: it is reported, and above --max-unknown-fraction an error.

A job that was killed leaves PREFIX.*.tmp, and the same command resumes there: it reads again what is encoded already, which
verifies that the text is the same, and writes the same bytes as a job that nobody disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import xxhash

from pretrain.data.corpus import Corpus
from pretrain.data.division import Shard
from pretrain.data.encoding import Chunk, Encoder, chunked
from pretrain.data.indexed import DataError, Sidecar, TokenWriter, token_dtype
from pretrain.data.lost_text import LostText
from pretrain.data.permutation import Permutation
from pretrain.data.staging import Staging
from pretrain.data.tokenizer import Tokenizer
from pretrain.files import read_json_object
from pretrain.report.progress import Progress
from pretrain.run import command_line
from tools import common

_BLOCK_DOCUMENTS = 256
_NOT_ENCODING = ("output", "workers", "max_unknown_fraction", "valid_fraction", "seed", "no_shuffle", "overwrite")


def main(argv: list[str]) -> None:
    """Raises UserError, OSError."""
    parser = command_line.make_parser(__doc__)
    common.add_corpus(parser)
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER",
                        help="tokenizer of tools/train_tokenizer.py or of Hugging Face")  # fmt: skip
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx and PREFIX.json")
    parser.add_argument("--valid-fraction", type=fraction, default=0.0, metavar="F",
                        help="fraction of the documents that go to PREFIX_valid, the others go to PREFIX_train; 0: all go to "
                        "PREFIX (%(default)s). Duplicates go to the same side")  # fmt: skip
    parser.add_argument("--workers", type=command_line.at_least(1), default=common.usable_cores(), metavar="N",
                        help="processes that encode (default: one per core, %(default)s)")  # fmt: skip
    parser.add_argument("--max-unknown-fraction", type=unknown_fraction, default=0.01, metavar="F",
                        help="stop if the tokenizer has no ids for more than this fraction of the text, by characters or by "
                        "tokens; 1: never (%(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1234, metavar="S", help="seed of the shuffle and the split (%(default)s)")
    parser.add_argument("--no-shuffle", action="store_true", help="keep the documents in the order of the input")
    parser.add_argument("--shard", type=Shard.parse, metavar="I/N", help="tokenize only part I of N, counted from 0, into "
                        "PREFIX-0000I-of-0000N: N independent jobs write all of the text")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace existing output, and unfinished work of a job with "
                        "other settings")  # fmt: skip
    options = parser.parse_args(argv)
    if not os.path.basename(options.output) or options.output.endswith((".bin", ".idx", ".json")):
        parser.error(
            f"--output: got {options.output!r}, must be a prefix to which .bin, .idx and .json are added, as data/text"
        )
    with common.writing(options.output):
        if (result := tokenize(options)) is None:
            print(f"{options.output}, shard {options.shard}: is complete already")
            return
    sidecars, corpus = result
    for problem in corpus.problems():
        print(f"note: {problem}", file=sys.stderr)
    print("\n".join(summary(sidecars, corpus)))


def fraction(text: str) -> float:
    """The type of --valid-fraction."""
    if not 0 <= (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, must be at least 0 and less than 1")
    return number


def unknown_fraction(text: str) -> float:
    """The type of --max-unknown-fraction."""
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"got {text}, must be from 0 to 1")
    return number


def tokenize(options: argparse.Namespace) -> tuple[dict[str, Sidecar], Corpus] | None:
    """Both passes. Returns the sidecars of the files written, by prefix; None for a shard that is complete."""
    with contextlib.ExitStack() as stack:
        encoder = stack.enter_context(Encoder(options.tokenizer, options.workers))
        tokenizer, corpus = encoder.tokenizer, common.open_corpus(options)
        settings = encoding_settings(options, tokenizer, corpus)
        about_shard = shard_description(options, settings)
        parts = {"_valid": True, "_train": False} if options.valid_fraction else {"": False}  # training data are complete last
        ending = options.shard.ending if options.shard else ""
        prefixes = {f"{options.output}{part}{ending}": is_valid for part, is_valid in parts.items()}
        if options.shard and not options.overwrite and is_complete([*prefixes][-1], about_shard):
            return None
        if options.shard:
            check_other_shards(options, [*parts][-1], about_shard)
        staging = stack.enter_context(opened_staging(options, ending, token_dtype(tokenizer.vocab_size), settings))
        writers = {
            prefix: TokenWriter(
                prefix,
                vocab_size=tokenizer.vocab_size,
                end_of_document_id=tokenizer.end_of_document_id,
                tokenizer_fingerprint=tokenizer.fingerprint,
                tokenizer_path=options.tokenizer,
                shuffled=not options.no_shuffle,
                overwrite=options.overwrite or staging.progress.get("renaming", False),
            )
            for prefix in prefixes
        }
        for writer in writers.values():
            stack.enter_context(writer)
        lost = encode_all(corpus, options, encoder, staging)
        distribute(staging, dict(zip(prefixes.values(), writers.values(), strict=True)), options)
        filled = {prefix: writer for prefix, writer in writers.items() if is_filled(prefix, writer, prefixes[prefix], options)}
        # From here on, files under the final names are of this job, which replaces them if it is killed and resumes.
        staging.commit(progress_of(corpus, corpus.sha256, lost) | {"renaming": True})
        description = corpus.description() | lost.description() | about_shard
        return {prefix: writer.finish(description) for prefix, writer in filled.items()}, corpus


def is_filled(prefix: str, writer: TokenWriter, is_valid: bool, options: argparse.Namespace) -> bool:
    """Whether a part has documents. Raises DataError if it has none, except for the validation part of a shard."""
    if writer.num_documents:
        return True
    if options.shard and is_valid:
        print(f"note: {prefix}: gets no documents, and is not written", file=sys.stderr)
        for end in (".idx", ".json", ".bin"):
            Path(prefix + end).unlink(missing_ok=True)
        return False
    advice = "use another --valid-fraction or --seed; duplicates stay together"
    advice += ". A document is never split: if there are few, say where documents end (--text-split)"
    raise DataError(f"{prefix}: gets none of the documents; {advice}")


def encoding_settings(options: argparse.Namespace, tokenizer: Tokenizer, corpus: Corpus) -> dict:
    """What the encoded documents of a job depend on, besides the text itself, as a JSON object."""
    settings = {name: value for name, value in vars(options).items() if name not in _NOT_ENCODING}
    settings |= {"tokenizer": tokenizer.fingerprint}
    if options.shard:
        settings |= {"shard": str(options.shard), "files": corpus.files_fingerprint()}
    return json.loads(json.dumps(settings))


def shard_description(options: argparse.Namespace, settings: dict) -> dict:
    """What the sidecar of a shard says about it: its number, and settings that all shards share. Empty without --shard."""
    if not options.shard:
        return {}
    common_settings = {name: value for name, value in settings.items() if name not in ("input", "shard")}
    common_settings |= {"valid_fraction": options.valid_fraction, "seed": options.seed, "no_shuffle": options.no_shuffle}
    return {"shard": {"index": options.shard.index, "count": options.shard.count, "settings": common_settings}}


def is_complete(prefix: str, about_shard: dict) -> bool:
    """Whether a job with the same settings has written this shard."""
    found = read_json_object(Path(f"{prefix}.json")).get("corpus", {})
    return found.get("shard") == about_shard["shard"] and Path(f"{prefix}.idx").is_file()


def check_other_shards(options: argparse.Namespace, part: str, about_shard: dict) -> None:
    """Raises DataError if finished shards of the same output were made from other files or with other settings.

    Together they would lack documents, or have them twice, or in the training and in the validation data.
    """
    own = about_shard["shard"]
    for path in sorted(map(Path, glob.glob(f"{glob.escape(options.output + part)}-*-of-*.json"))):
        if not (match := re.search(r"-\d+-of-(\d+)\.json$", path.name)):
            continue
        if int(match[1]) != own["count"]:
            counts = f"one of {int(match[1]):,} shards, not of {own['count']:,}"
            raise DataError(f"{path}: is {counts}; remove all of the other division, or choose another output")
        other = read_json_object(path).get("corpus", {}).get("shard", {}).get("settings", {})
        differ = [f"{name} {other.get(name)!r}, not {own['settings'][name]!r}" for name in own["settings"]
                  if other.get(name) != own["settings"][name]]  # fmt: skip
        if differ and not options.overwrite:
            raise DataError(
                f"{path}: this shard was made with {'; '.join(differ)}. Shards with different settings do not belong together: "
                "repeat the settings, choose another output, or replace all shards (--overwrite)"
            )


@contextlib.contextmanager
def opened_staging(options: argparse.Namespace, ending: str, dtype: np.dtype, settings: dict) -> Iterator[Staging]:
    """The staging files beside the output; a note tells if they remain. Raises DataError."""
    staging = Staging(options.output + ending, dtype, settings, discard=options.overwrite)
    try:
        with staging:
            yield staging
    finally:
        if staging.is_kept:
            what = f"{staging.committed_documents:,} documents are encoded and kept in {staging.prefix}.*.tmp"
            print(f"note: {what}; the same command resumes there", file=sys.stderr)


def encode_all(corpus: Corpus, options: argparse.Namespace, encoder: Encoder, staging: Staging) -> LostText:
    """First pass: encodes what `staging` does not hold yet into it. Raises DataError if too much of the text has no ids."""
    lost = LostText(options.tokenizer, options.max_unknown_fraction, corpus.most_characters)
    chunks = chunked(corpus)
    if staging.num_documents:
        lost.restore(staging.progress["lost"])
        skip_encoded(chunks, corpus, staging)
    with Progress("encoding", corpus.total_bytes, done=read_so_far(corpus), tokens=staging.num_tokens) as progress:
        for chunk, encoded in encoder.encode(chunks):
            staging.add(encoded.tokens, encoded.lengths, encoded.utf8_bytes)
            lost.add(chunk.names, encoded)
            progress.update(read_so_far(corpus), staging.num_tokens)
            if staging.is_commit_due:
                staging.commit(progress_of(corpus, chunk.sha256, lost))
    staging.flush()
    if staging.num_documents == 0:
        raise DataError(
            f"{', '.join(corpus.inputs)}: no documents with text{''.join(f'; {each}' for each in corpus.problems())}"
        )
    lost.end()
    return lost


def progress_of(corpus: Corpus, sha256: str, lost: LostText) -> dict:
    """What a later job needs to resume: `sha256` of the encoded text, and counts."""
    return {"sha256": sha256, "bytes": read_so_far(corpus), "lost": lost.state()}


def skip_encoded(chunks: Iterator[Chunk], corpus: Corpus, staging: Staging) -> None:
    """Reads the documents that an earlier job has encoded. Raises DataError if they are not the same.

    Reading is many times faster than encoding, verifies the text, and brings readers of all formats to the right place.
    """
    print(f"note: resumes after {staging.num_documents:,} documents, which it reads again to compare them", file=sys.stderr)
    end, sha256 = 0, ""
    with Progress("reading again", staging.progress["bytes"]) as progress:
        for chunk in chunks:
            progress.update(read_so_far(corpus))
            if (end := chunk.end) >= staging.num_documents:
                sha256 = chunk.sha256
                break
    if (end, sha256) != (staging.num_documents, staging.progress["sha256"]):
        raise DataError(
            f"{', '.join(corpus.inputs)}: the text is no longer that of the unfinished job, which has encoded "
            f"{staging.num_documents:,} documents. Restore the text, or remove {staging.prefix}.*.tmp to start again"
        )


def read_so_far(corpus: Corpus) -> int:
    """Bytes in the unit of `corpus.total_bytes`, or bytes of text if that is unknown."""
    return corpus.utf8_bytes if corpus.total_bytes is None else corpus.read_bytes


def distribute(staging: Staging, writers: dict[bool, TokenWriter], options: argparse.Namespace) -> None:
    """Second pass: copies the documents, shuffled, to the writers for training (False) and validation (True)."""
    key = (options.seed, *([options.shard.index] if options.shard else []))
    order, threshold = Permutation(staging.num_documents, key), int(options.valid_fraction * 2**64)
    with Progress("writing", staging.num_tokens * staging.dtype.itemsize) as progress:
        written = 0
        for start in range(0, staging.num_documents, _BLOCK_DOCUMENTS):
            numbers = np.arange(start, min(start + _BLOCK_DOCUMENTS, staging.num_documents))
            for tokens, lengths, utf8_bytes in staging.read(numbers if options.no_shuffle else order(numbers)):
                documents = np.split(tokens, np.cumsum(lengths)[:-1])
                # By content: duplicates go to the same side, and validation text never moves to the training data.
                valid = np.array([xxhash.xxh3_64_intdigest(document, options.seed) < threshold for document in documents])
                for part, writer in writers.items():
                    chosen = np.flatnonzero(valid == part)
                    if chosen.size:
                        writer.add(
                            np.concatenate([documents[i] for i in chosen]), lengths[chosen], int(utf8_bytes[chosen].sum())
                        )
                written += tokens.nbytes
                progress.update(written, written // staging.dtype.itemsize)


def summary(sidecars: dict[str, Sidecar], corpus: Corpus) -> list[str]:
    """Lines that describe the result."""
    lines = [f"read {corpus.num_documents:,} documents, {corpus.utf8_bytes / 1e6:.2f} MB of text, sha256 {corpus.sha256}"]
    for prefix, sidecar in sorted(sidecars.items()):
        lines.append(
            f"{prefix}: {sidecar.num_tokens:,} tokens in {sidecar.num_documents:,} documents,"
            f" {sidecar.utf8_bytes / sidecar.num_tokens:.2f} bytes of text per token"
        )
    sidecar = max(sidecars.values(), key=lambda sidecar: sidecar.num_tokens)
    lines += [
        "losses to compare with, in nats per token:",
        f"  {math.log(sidecar.vocab_size):6.3f}  guessing: ln {sidecar.vocab_size}, where an untrained model starts",
        f"  {sidecar.unigram_entropy_nats:6.3f}  unigram: knows only how frequent each token is",
        f"  {sidecar.bigram_entropy_nats:6.3f}  bigram: also knows the previous token; a model that has learned is below",
    ]
    return lines


if __name__ == "__main__":
    sys.exit(command_line.run(main))
