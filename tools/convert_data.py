"""Converts tokens between the formats of Megatron (and this program), nanoGPT, llm.c, parquet and the library datasets.

    python tools/convert_data.py --input train.bin --tokenizer gpt2 --output data/owt
    python tools/convert_data.py --input fineweb/*.bin --tokenizer gpt2 --output data/fineweb
    python tools/convert_data.py --input ids/ --append-end --tokenizer llama --output data/ids
    python tools/convert_data.py --input data/stdlib_train --to llmc --shard-tokens 100000000 --output fineweb_train.bin

The pair PREFIX.bin and PREFIX.idx is the format of Megatron and of this program; only this program needs the metadata sidecar
PREFIX.json, which is computed with the tokenizer. Documents keep their order and their tokens; converted there and back, .bin
and .idx have the same bytes.
"""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from pretrain.data import interchange, remote, shards
from pretrain.data.flat import DTYPES
from pretrain.data.indexed import DataError, TokenFile, TokenWriter
from pretrain.data.interchange import Block, Documents, Split
from pretrain.data.tokenizer import Tokenizer
from pretrain.report.progress import Progress
from pretrain.run import command_line
from tools import common


def main(argv: list[str]) -> None:
    """Raises UserError, OSError."""
    parser = command_line.make_parser(__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="prefixes of .bin/.idx pairs, .bin files, .parquet files, "
        "folders or quoted patterns of them, URLs of all these, a folder of save_to_disk, or with --from datasets a name on "
        "the Hugging Face hub; several are one text, in this order")  # fmt: skip
    add("--from", dest="source", choices=(*interchange.FORMATS, "datasets"), metavar="FORMAT",
        help="format of --input: %(choices)s (default: by names and first bytes)")  # fmt: skip
    add("--to", choices=interchange.FORMATS, default="megatron", metavar="FORMAT",
        help="format of --output: %(choices)s (default: %(default)s)")  # fmt: skip
    add("--output", required=True, metavar="NAME", help="prefix of a pair, or the name of a .bin or .parquet file")
    add("--tokenizer", metavar="FOLDER", help="tokenizer of the ids; --to megatron needs it")
    add("--end-of-document-id", type=command_line.at_least(0), metavar="N",
        help="id that ends documents, or in llm.c's files begins them (default: of the tokenizer, else the input)")  # fmt: skip
    add("--append-end", action="store_true", help="append the end-of-document id to documents that do not end with it")
    add("--packed", action="store_true", help="rows or documents of --input are parts of one stream: divide it at the "
        "end-of-document id")  # fmt: skip
    add("--leading", action=argparse.BooleanOptionalAction, help="in the stream, the end-of-document id precedes "
        "each document instead of following it (default: in llm.c's format only)")  # fmt: skip
    add("--column", default=interchange.COLUMN, metavar="NAME", help="column of the ids in parquet or datasets (%(default)s)")
    add("--split", metavar="NAME", help="split of a data set (default: train on the hub)")
    add("--config", metavar="NAME", help="configuration of a data set of the hub")
    add("--dtype", choices=DTYPES, help="type of the tokens of flat .bin files (default: judged by their content)")
    add("--shard-tokens", type=command_line.at_least(1), metavar="N",
        help="with --to nanogpt or llmc: files of N tokens, NAME_000000.bin and so on")  # fmt: skip
    add("--overwrite", action="store_true", help="replace existing output")
    options = parser.parse_args(argv)
    require_output(parser, options)
    with common.writing(options.output):
        print("\n".join(convert(options)))


def require_output(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program with status 2 if --output does not fit --to, or if the output exists already."""
    output = Path(options.output)
    ending = {"megatron": "", "parquet": ".parquet"}.get(options.to, ".bin")
    if not output.name or (output.suffix in (".bin", ".idx", ".json", ".parquet") if not ending else output.suffix != ending):
        wanted = f"the name of a {ending} file" if ending else "a prefix to which .bin, .idx and .json are added"
        parser.error(f"--output: got {options.output!r}, with --to {options.to} it must be {wanted}")
    if options.to == "megatron" and not options.tokenizer:
        parser.error("--to megatron needs --tokenizer: the metadata sidecar records vocabulary and bytes of text")
    if options.shard_tokens and options.to not in interchange.FLAT:
        parser.error(f"--shard-tokens cannot be used with --to {options.to}")
    if options.to == "llmc" and (options.shard_tokens or 0) > interchange.LLMC_MOST_TOKENS:
        parser.error(f"--shard-tokens: llm.c's files hold at most {interchange.LLMC_MOST_TOKENS:,} tokens")
    existing = glob.glob(f"{glob.escape(str(output.with_suffix('')))}_{'[0-9]' * 6}.bin") if options.shard_tokens else []
    if existing:
        raise DataError(f"{min(existing)}: exists already; remove the old shards, or choose another output")
    if ending and output.exists() and not options.overwrite:
        raise DataError(f"{output}: exists already; choose another output, or overwrite it (--overwrite)")
    output.parent.mkdir(parents=True, exist_ok=True)


def convert(options: argparse.Namespace) -> Iterator[str]:
    """Converts, and returns lines that describe the result. Raises DataError."""
    tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    inputs = Inputs(options, tokenizer)
    end = options.end_of_document_id
    end = next((each for each in (end, *inputs.ends(tokenizer)) if each is not None), None)
    if end is None:
        raise DataError(f"{options.input[0]}: does not say which id ends documents; give --tokenizer or --end-of-document-id")
    num_ids = min(inputs.num_ids(tokenizer), interchange.largest_id(options.to) + 1)
    if end >= num_ids:
        raise DataError(f"end-of-document id {end}: 0 to {num_ids - 1:,} are allowed by the tokenizer and the output format")
    where = ", ".join(options.input[:3]) + (f" and {len(options.input) - 3} more" if len(options.input) > 3 else "")
    with Progress("converting", inputs.total_bytes) as progress:
        blocks, split = inputs.blocks(progress), None
        if inputs.are_streams:
            leads = inputs.format == "llmc" if options.leading is None else options.leading
            blocks = split = Split(blocks, where, end, leads)
        documents = Documents(blocks, where, end, num_ids, options.append_end)
        if options.to == "megatron":
            paths = write_pair(documents, end, tokenizer, inputs, options)
        else:
            paths = write_other(documents, end, num_ids, options)
    yield f"{', '.join(map(str, paths[:3]))}{', ...' if len(paths) > 3 else ''}: {documents.num_tokens:,} tokens in " \
          f"{documents.num_documents:,} documents"  # fmt: skip
    if documents.appended:
        yield f"{documents.appended:,} documents got the end-of-document id {end}"
    if split and split.incomplete:
        side = "begins" if leads else "ends"
        other = "--no-leading" if leads else "--leading"
        yield f"note: the stream {side} inside a document; this part was kept as a document. See {other} if it should not have"


class Inputs:
    """The inputs of a conversion, opened one after the other, as one sequence of blocks."""

    def __init__(self, options: argparse.Namespace, tokenizer: Tokenizer | None):
        self._options = options
        formats = {options.source or interchange.format_of(path) for path in options.input}
        if len(formats) > 1:
            raise DataError(f"--input has several formats ({', '.join(sorted(formats))}); convert one after the other")
        (self.format,) = formats
        self.are_streams = self.format in interchange.FLAT or options.packed
        self._files: list[TokenFile] = []
        self._parquet: list[str] = []
        if self.format == "parquet":
            self._parquet = [file for path in options.input for file in self._parquet_files(path)]
            self.total_bytes = sum(map(remote.size, self._parquet))
        elif self.format == "datasets":
            self.total_bytes = None
        else:
            vocab_size = tokenizer.vocab_size if tokenizer else None
            self._files = shards.open_shards(options.input, options.dtype, vocab_size)
            self.total_bytes = sum(file.num_tokens * file.dtype.itemsize for file in self._files)
            self._require_kind(tokenizer)

    def _parquet_files(self, path: str) -> list[str]:
        files = interchange.parquet_files(path)
        if not files:
            raise DataError(f"{path}: {'contains no .parquet files' if Path(path).is_dir() else 'not found'}")
        return files

    def _require_kind(self, tokenizer: Tokenizer | None) -> None:
        for file in self._files:
            if (file.num_documents is None) != (self.format in interchange.FLAT):
                kind = "a flat file" if file.num_documents is None else "a pair"
                raise DataError(f"{file.path}: is {kind}, which is not the format {self.format}; leave --from out")
            recorded = file.sidecar.tokenizer_fingerprint if file.sidecar else None
            if tokenizer and recorded not in (None, tokenizer.fingerprint):
                raise DataError(f"{file.path}: was made with another tokenizer ({file.sidecar.tokenizer_path}); give that one")

    def ends(self, tokenizer: Tokenizer | None) -> Iterator[int]:
        """End-of-document ids, those with priority first."""
        yield from [tokenizer.end_of_document_id] if tokenizer else []
        yield from (file.sidecar.end_of_document_id for file in self._files if file.sidecar)

    def num_ids(self, tokenizer: Tokenizer | None) -> int:
        """Ids that can occur: of the tokenizer, else of the sidecars, else of the type of the tokens."""
        if tokenizer:
            return tokenizer.vocab_size
        recorded = [file.sidecar.vocab_size if file.sidecar else 1 << 8 * file.dtype.itemsize for file in self._files]
        return max(recorded, default=2**32)

    @property
    def shuffled(self) -> bool:
        """Whether the sidecars say that documents are in random order."""
        return bool(self._files) and all(file.sidecar and file.sidecar.shuffled for file in self._files)

    @property
    def corpus(self) -> dict:
        """Description of the text for a sidecar: that of the only input if it has one."""
        if len(self._files) == 1 and self._files[0].sidecar:
            return self._files[0].sidecar.corpus
        return {"inputs": self._options.input, "format": self.format}

    def blocks(self, progress: Progress) -> Iterator[Block]:
        """All blocks in order; shows the bytes read."""
        done = 0

        def advance(read_bytes: int) -> None:
            nonlocal done
            done += read_bytes
            progress.update(done)

        for file in self._files:
            yield from interchange.read_token_file(file, advance)
        for path in self._parquet:
            yield from interchange.read_parquet(path, self._options.column, advance)
        if self.format == "datasets":
            for name in self._options.input:
                yield from interchange.read_dataset(
                    name, self._options.config, self._options.split, self._options.column, advance
                )


def write_other(documents: Documents, end: int, num_ids: int, options: argparse.Namespace) -> list[Path]:
    """Writes all documents in another format than a pair, and returns the files. Raises DataError, OSError."""
    output = Path(options.output)
    if options.to == "parquet":
        interchange.write_parquet(documents, output, options.column)
        return [output]
    stream = interchange.leading(documents, end) if options.to == "llmc" else (tokens for tokens, _ in documents)
    return interchange.write_flat(stream, output, options.to, num_ids, options.shard_tokens)


def write_pair(documents: Documents, end: int, tokenizer: Tokenizer, inputs: Inputs, options: argparse.Namespace) -> list[Path]:
    """Writes all documents as a pair with its metadata sidecar, and returns the .bin. Raises DataError, OSError."""
    about = dict(
        vocab_size=tokenizer.vocab_size,
        end_of_document_id=end,
        tokenizer_fingerprint=tokenizer.fingerprint,
        tokenizer_path=options.tokenizer,
        shuffled=inputs.shuffled,
        overwrite=options.overwrite,
    )
    with TokenWriter(options.output, **about) as writer:
        for tokens, lengths in documents:
            writer.add(tokens, lengths, utf8_bytes(tokens, lengths, tokenizer))
        writer.finish(inputs.corpus)
    return [Path(f"{options.output}.bin")]


def utf8_bytes(tokens: np.ndarray, lengths: np.ndarray, tokenizer: Tokenizer) -> int:
    """Bytes of the text that the documents decode to."""
    ids, ends = tokens.tolist(), np.cumsum(lengths).tolist()
    starts = [0, *ends[:-1]]
    return sum(len(tokenizer.decode(ids[start : end - 1]).encode()) for start, end in zip(starts, ends, strict=True))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
