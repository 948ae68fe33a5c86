"""Text that a tokenizer does not represent: how much of a corpus, which text, and where. Prints notes; no torch."""

from __future__ import annotations

import re
import sys
from collections import Counter

from .encoding import Encoded
from .indexed import DataError

_NOTED_FRACTION, _EARLY_CHARACTERS, _PIECES_KEPT = 0.001, 1 << 22, 100_000


class LostText:
    """Counts of the text of all documents so far that has become unknown ids, or nothing.

    `limit`: the fraction of the characters or of the tokens that is an error. `most_characters`: an upper bound of the
    characters of the corpus (None: unknown), with which the error is certain before the end.
    """

    def __init__(self, tokenizer: str, limit: float, most_characters: int | None):
        self._tokenizer, self._limit, self._most_characters = tokenizer, limit, most_characters
        self._warned = False
        self.characters = self._of_characters = self.tokens = self._of_tokens = 0
        self._pieces: Counter[str] = Counter()
        self._files: list[tuple[int, int, str]] = []  # (lost characters, all characters, name) of the worst files
        self._file = (0, 0, "")
        self._compared = self._changed = 0
        self._first_changed: tuple[str, str] | None = None

    def state(self) -> dict:
        """All counts, as a JSON value for `restore`."""
        return {name: value for name, value in vars(self).items() if name not in ("_tokenizer", "_limit", "_most_characters")}

    def restore(self, state: dict) -> None:
        """Continues from what `state` returned, after a passage through JSON."""
        vars(self).update(state)
        self._pieces, self._file = Counter(state["_pieces"]), tuple(state["_file"])
        self._files = [tuple(file) for file in state["_files"]]

    def add(self, names: list[str], chunk: Encoded) -> None:
        """Counts a chunk of the documents `names`. Raises DataError as soon as the end cannot be within the limit."""
        for number, (name, characters) in enumerate(zip(names, chunk.characters.tolist(), strict=True)):
            lost = sum(len(piece) * count for piece, count in chunk.lost[number].items()) if number in chunk.lost else 0
            file = re.sub(r":\d+$", "", name)
            if file != self._file[2]:
                self._files, self._file = self._worst_files(), (0, 0, file)
            self._file = (self._file[0] + lost, self._file[1] + characters, file)
            self.characters += lost
        self._of_characters += int(chunk.characters.sum())
        self.tokens, self._of_tokens = self.tokens + chunk.unknown_tokens, self._of_tokens + len(chunk.tokens)
        for pieces in chunk.lost.values():
            self._pieces.update(pieces)
        if len(self._pieces) > _PIECES_KEPT:
            self._pieces = Counter(dict(self._pieces.most_common(_PIECES_KEPT // 2)))
        self._compared, self._changed = self._compared + chunk.compared, self._changed + len(chunk.changed)
        if chunk.changed and not self._first_changed:
            self._first_changed = chunk.changed[0]
        if self._most_characters and self.characters > self._limit * self._most_characters:
            raise self._error()
        if not self._warned and self._of_characters >= _EARLY_CHARACTERS and self.fraction > self._limit:
            self._warned = True
            print(f"note: {self._text()}; if this continues, it is an error at the end", file=sys.stderr, flush=True)

    def _worst_files(self) -> list[tuple[int, int, str]]:
        return sorted([*self._files, self._file], reverse=True)[:3] if self._file[0] else self._files

    @property
    def fraction(self) -> float:
        """The larger of two fractions: of the characters that were lost, of the tokens that are unknown ids."""
        return max(self.characters / max(1, self._of_characters), self.tokens / max(1, self._of_tokens))

    def end(self) -> None:
        """Prints notes. Raises DataError if more was lost than the limit allows."""
        if self.fraction > self._limit:
            raise self._error()
        if self.fraction > _NOTED_FRACTION:
            print(f"note: {self._text()}", file=sys.stderr)
        if self._first_changed:
            written, decoded = self._first_changed
            print(
                f"note: {self._changed:,} of {self._compared:,} compared documents decode to another text, as {written!r}"
                f" to {decoded!r}: this tokenizer is lossy, bits per byte are not exact",
                file=sys.stderr,
            )

    def description(self) -> dict:
        """For the sidecar; empty if nothing was lost."""
        counts = {"unknown_characters": self.characters, "unknown_tokens": self.tokens, "unknown_fraction": self.fraction}
        return counts if self.characters else {}

    def _error(self) -> DataError:
        return DataError(
            f"{self._text()}. A model would never see this text, and nothing was written. Use a tokenizer with byte fallback, "
            f"as tools/train_tokenizer.py makes, or accept it with --max-unknown-fraction (now {self._limit:g})"
        )

    def _text(self) -> str:
        lost = f"{self.characters:,} of {self._of_characters:,} characters ({self.characters / self._of_characters:.2%})"
        became = (
            f"{self.tokens:,} unknown ids ({self.tokens / self._of_tokens:.2%} of the tokens)" if self.tokens else "nothing"
        )
        often = ", ".join(f"{piece[:20]!r} {count:,} times" for piece, count in self._pieces.most_common(5))
        files = ", ".join(f"{name} ({lost / characters:.2%})" for lost, characters, name in self._worst_files())
        return f"{self._tokenizer}: {lost} have no ids in this tokenizer and became {became}: {often}; most in {files}"
