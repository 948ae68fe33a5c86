"""The settings of the data. Imports no torch.

`pretrain/config.py` explains `frozen`, `guarded` and `free`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pretrain.schema import NonNegativeFloat, PositiveFloat, PositiveInt, free, frozen


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One tokenized dataset, in one file or in many (shards)."""

    path: str | list[str] = free()
    """Prefix of a .bin/.idx pair, or a nanoGPT-style flat .bin file; or a folder of them, a pattern such as data/web/part-*,
    a list of these, or URLs of an object store, such as s3://bucket/web/ (docs/data.md)."""
    dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"] | None = free(None)
    """Type of the tokens of a flat .bin; null: judged by its content and named at the start."""
    weight: float | None = free(1.0)
    """Share of the blend relative to the other sources; > 0; token counts are fine. null: its tokens, so that each source
    whose weight is null is read as often as the others. Ignored for validation."""
    max_epochs: PositiveFloat | None = free(None)
    """Most epochs of this source that a run may read; a longer run does not start. null: no limit. Ignored for validation."""


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Generated tokens instead of files: for tests, dry runs and lessons."""

    kind: Literal["uniform", "unigram", "markov", "repeat", "copy"] = frozen("uniform")
    """uniform: labels carry no information; unigram: Zipf, no context; markov: one token of context; repeat: a few fixed
    texts; copy: second half repeats the first."""
    num_samples: PositiveInt = frozen(1_000_000)
    """Samples per epoch; validation draws others."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data, and its division into samples."""

    train: list[SourceConfig] = free(list)
    """Training sources: [{path, weight}]."""
    valid: list[SourceConfig] = free(list)
    """Validation sources: [{path}]; empty: no validation."""
    synthetic: SyntheticConfig | None = frozen(None)
    """Generated data instead of train and valid; null: off."""
    sequence_length: PositiveInt = frozen(1024)
    """Tokens T that a sample feeds to the model; a sample is T + 1 tokens."""
    block_length: PositiveInt | None = frozen(None)
    """Tokens of the blocks whose order is drawn; every sequence length of the run divides it. null: the smallest such."""
    document_mask: bool = frozen(False)
    """Tokens attend only within their document."""
    quarantine: str | None = free(None)
    """File that lists training samples to leave out (format: pretrain/data/excluded.py); null: none."""
    cache_directory: str | None = free(None)
    """Where blocks of data in object stores are kept, on a local disk; null: ~/.cache/pretrain."""
    cache_gib: NonNegativeFloat = free(32.0)
    """Most disk space of these blocks on each machine. If the tokens do not fit, samples are fetched one by one, not kept."""
