"""Draws how tokenizers fit texts: bytes per token of each source, frequency by rank, and lengths of pieces."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from .plot import COLORS, save

_LONGEST = 24


class TokenizerCurves(NamedTuple):
    """What is drawn of one tokenizer."""

    name: str
    bytes_per_token: dict[str, float]
    """By source."""
    counts_V: np.ndarray
    """How often each id occurs in all sources."""
    piece_lengths_V: np.ndarray
    """Characters of each id."""


def plot_tokenizers(tokenizers: list[TokenizerCurves], output: Path) -> None:
    """Draws one or two tokenizers into the PNG file `output`, atomically. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    bars, ranks, lengths = figure.subplots(1, 3)
    height, sources = 0.8 / len(tokenizers), list(tokenizers[0].bytes_per_token)
    for number, (tokenizer, color) in enumerate(zip(tokenizers, COLORS, strict=False)):
        values = [tokenizer.bytes_per_token[source] for source in sources]
        bars.barh(np.arange(len(sources)) + number * height, values, height * 0.9, color=color, label=tokenizer.name)
        counts = np.sort(tokenizer.counts_V[tokenizer.counts_V > 0])[::-1]
        ranks.loglog(np.arange(1, len(counts) + 1), counts / counts.sum(), color=color)
        weights = tokenizer.counts_V / tokenizer.counts_V.sum()
        edges = np.arange(_LONGEST + 2) - 0.5
        lengths.hist(np.minimum(tokenizer.piece_lengths_V, _LONGEST), edges, weights=weights, histtype="step", color=color)
    bars.set_yticks(np.arange(len(sources)) + 0.4 - height / 2, [source[-40:] for source in sources])
    bars.invert_yaxis()
    bars.set(xlabel="bytes of text per token", title="compression by source")
    ranks.set(xlabel="rank of the id", ylabel="fraction of the tokens", title="frequency of the ids")
    lengths.set(
        xlabel=f"characters per token ({_LONGEST}: or more)",
        ylabel="fraction of the tokens",
        title="lengths of the tokens in the text",
    )
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    for axes in (bars, ranks, lengths):
        axes.grid(alpha=0.3)
    save(figure, output)
