"""Tasks: files of questions that a language model answers by likelihood, read, checked and tokenized once. No torch.

A task is a JSONL file, named by its stem, with one item per line, of one of three kinds:

    {"context": TEXT, "choices": [TEXT, ...], "answer": NUMBER}       which choice continues the context
    {"contexts": [TEXT, ...], "continuation": TEXT, "answer": NUMBER}  after which context the continuation is likeliest
    {"context": TEXT, "continuation": TEXT}                           is each token of the continuation the likeliest one

Text is encoded as lm-eval does for causal models of transformers, so that figures equal its own (`_encode_pair` and
`loglikelihood` in lm_eval/api/model.py, version 0.4.13): a context and its continuation are encoded together, and what follows
the tokens of the context alone is the continuation; spaces at the end of a context move to the continuation; a prefix token
stands for an empty context; of a sequence that is too long, the first tokens are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from .checks import Finding
from .errors import TaskError
from .tokenizer import Tokenizer

CHOICES, CONTEXTS, EXACT = "choices", "contexts", "exact"
"""The kinds of tasks."""
_KEYS = {CHOICES: ("context", "choices", "answer"), CONTEXTS: ("contexts", "continuation", "answer")}
_KEYS |= {EXACT: ("context", "continuation")}
_PROBLEMS_SHOWN = 5


class Sequence(NamedTuple):
    """A context and a continuation, in tokens."""

    tokens: np.ndarray
    """(N,) int64 ids: the context, then the continuation."""
    labels: int
    """Number of tokens of the continuation, at most N - 1."""
    bytes: int
    """UTF-8 bytes of the continuation as the file has it; 0: it is only the space at the end of the context."""
    characters: int


class Item(NamedTuple):
    """A question."""

    line: int
    """In the file, from 1."""
    sequences: list[Sequence]
    """The possible answers; one if the kind is exact."""
    answer: int
    """Number of the right one."""


class Task(NamedTuple):
    """The items of a file that are measured."""

    name: str
    kind: str
    items: list[Item]
    of: int
    """Number of items in the file."""
    truncated: int
    """Sequences of these items whose first tokens were left out."""
    repeated: list[tuple[int, int]]
    """Lines with the same item as an earlier one: (line, earlier line)."""
    fingerprint: str
    """Of the file's content."""

    @property
    def tokens(self) -> int:
        """Tokens that a model sees to answer all items, without padding."""
        return sum(len(sequence.tokens) - 1 for item in self.items for sequence in item.sequences)

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        if self.kind == EXACT:
            return 0.0
        return sum(1 / len(item.sequences) for item in self.items) / len(self.items)


def task_files(paths: list[str]) -> list[Path]:
    """The files that `evaluate.tasks` names: files, and those in folders that end in .jsonl. Raises TaskError."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(path.glob("*.jsonl"))
            if not inside:
                raise TaskError(f"{path}: this folder has no .jsonl files; tools/make_tasks.py writes some")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise TaskError(f"{path}: no such file or folder; give JSONL files, or folders of them (docs/tasks.md)")
    names = [path.stem for path in found]
    for path in found:
        if names.count(path.stem) > 1:
            same = ", ".join(str(each) for each in found if each.stem == path.stem)
            raise TaskError(f"{same}: are tasks of the same name, {path.stem}; rename all but one")
    return found


def open_tasks(
    paths: list[str], tokenizer: Tokenizer | None, max_length: int, vocab_size: int, most_items: int | None = None
) -> list[Task]:
    """Reads and tokenizes the tasks in these files and folders.

    max_length: tokens that the model takes. vocab_size: number of its ids. most_items: at most so many items of each task,
    spread evenly; None: all. Raises TaskError, for a file with the first problems by line; OSError.
    """
    if not paths:
        return []
    files = task_files(paths)
    if tokenizer is None:
        raise TaskError(f"{files[0]}: a task is text, and the model has no tokenizer; give the folder of its tokenizer")
    encoder = Encoder(tokenizer, max_length, vocab_size)
    return [_open_task(path, encoder, most_items) for path in files]


class Problem(Exception):
    """What is wrong with an item, in words."""


def _open_task(path: Path, encoder: Encoder, most_items: int | None) -> Task:
    content = path.read_bytes()
    problems: list[str] = []
    kind, questions, repeated, seen = "", [], [], {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            item = _read_item(line)
            if kind and item["kind"] != kind:
                raise Problem(f"is an item of kind {item['kind']}, and those before are of kind {kind}; a file is one task")
        except Problem as problem:
            problems.append(f"{path}:{number}: {problem}")
            continue
        kind, key = item["kind"], (*item["pairs"], item["answer"])
        if (earlier := seen.setdefault(key, number)) != number:
            repeated.append((number, earlier))
        questions.append((number, item))
    if not questions and not problems:
        problems.append(f"{path}: has no items; each line is a JSON object (docs/tasks.md)")
    count = min(most_items or len(questions), len(questions))
    items, truncated = [], 0
    for number, item in (questions[i * len(questions) // count] for i in range(count)):
        try:
            sequences = [encoder.encode(*pair) for pair in item["pairs"]]
        except Problem as problem:
            problems.append(f"{path}:{number}: {problem}")
            continue
        truncated += sum(cut for _, cut in sequences)
        items.append(Item(number, [each for each, _ in sequences], item["answer"]))
    if problems:
        more = len(problems) - _PROBLEMS_SHOWN
        shown = "; ".join(problems[:_PROBLEMS_SHOWN]) + (f"; and {more} more of its lines" if more > 0 else "")
        raise TaskError(f"{shown}. Correct the file, or leave it out (evaluate.tasks)")
    return Task(path.stem, kind, items, len(questions), truncated, repeated, xxhash.xxh3_128(content).hexdigest())


def _read_item(line: bytes) -> dict:
    """{"kind", "pairs": [(context, continuation), ...], "answer"} of a line. Raises Problem."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Problem(f"is not JSON in UTF-8 ({error})") from None
    if not isinstance(item, dict):
        raise Problem("is not a JSON object in braces")
    kind = CHOICES if "choices" in item else CONTEXTS if "contexts" in item else EXACT
    wanted, known = _KEYS[kind], {key for keys in _KEYS.values() for key in keys}
    if missing := [key for key in wanted if key not in item]:
        ways = " or ".join(f"{{{', '.join(keys)}}}" for keys in _KEYS.values())
        raise Problem(f"has no {' and no '.join(missing)}; an item has the keys {ways}")
    if extra := [key for key in item if key in known and key not in wanted]:
        raise Problem(f"has both {wanted[1]} and {extra[0]}; an item of this kind has the keys {', '.join(wanted)}")
    if kind == CONTEXTS:
        contexts = _texts(item, "contexts", empty=True)
        pairs = [(context, _text(item, "continuation")) for context in contexts]
    elif kind == CHOICES:
        context = _text(item, "context", empty=True)
        pairs = [(context, choice) for choice in _texts(item, "choices")]
    else:
        pairs = [(_text(item, "context", empty=True), _text(item, "continuation"))]
    answer = item["answer"] if kind != EXACT else 0
    if type(answer) is not int or not 0 <= answer < len(pairs):
        raise Problem(f"has the answer {answer!r}, which must be a whole number from 0 to {len(pairs) - 1}")
    return {"kind": kind, "pairs": pairs, "answer": answer}


def _text(item: dict, key: str, empty: bool = False) -> str:
    return _checked(item[key], key, empty)


def _texts(item: dict, key: str, empty: bool = False) -> list[str]:
    if not isinstance(item[key], list) or len(item[key]) < 2:
        raise Problem(f"has {key} {str(item[key])[:40]!r}, which must be a list of at least two texts")
    return [_checked(text, f"{key}[{number}]", empty) for number, text in enumerate(item[key])]


def _checked(text: object, key: str, empty: bool) -> str:
    if not isinstance(text, str):
        raise Problem(f"has {key} {str(text)[:40]!r}, which must be a text")
    if not text and not empty:
        raise Problem(f"has an empty {key}: nothing would be measured")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Problem(f"has {key} that is not valid Unicode ({error})") from None
    return text


class Encoder:
    """Pairs of texts to sequences, in lm-eval's way."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, vocab_size: int):
        self._encode: Callable[[str, bool], list[int]] = tokenizer.encode_as_transformers
        self._prefix, self._max_length, self._vocab_size = tokenizer.prefix_id, max_length, vocab_size
        self._known: tuple[str, list[int]] = ("", [])  # the choices of an item share their context

    def divides(self, context: str, continuation: str) -> bool:
        """Whether the tokens of the context stay the same before this continuation, and the continuation has some."""
        try:
            sequence, _ = self.encode(context, continuation)
        except Problem:
            return False
        begin = [] if context.strip() else [self._prefix]
        return sequence.tokens.tolist() == begin + self._encode(context + continuation, bool(context.strip()))

    def encode(self, context: str, continuation: str) -> tuple[Sequence, bool]:
        """(the sequence, whether its first tokens were left out). Raises Problem."""
        size = len(continuation.encode()), len(continuation)
        bare = context.rstrip()
        text = context[len(bare) :] + continuation
        if bare:
            if self._known[0] != bare:
                self._known = (bare, self._encode(bare, True))
            before = self._known[1]
            after = self._encode(bare + text, True)[len(before) :]
        else:
            before, after = [self._prefix], self._encode(text, False)
            if after and after[0] == self._prefix:
                before, after = after[:1], after[1:]
        if not after:
            raise Problem(
                f"has the continuation {continuation[:40]!r}, which adds no token to its context: the tokenizer joins them; "
                "divide the text elsewhere"
            )
        if len(after) > self._max_length:
            raise Problem(f"has a continuation of {len(after):,} tokens, and the model takes {self._max_length:,}; shorten it")
        tokens = np.array([*before, *after], dtype=np.int64)
        if tokens.max() >= self._vocab_size:
            raise Problem(
                f"has the id {tokens.max():,}, and the model has {self._vocab_size:,}: the tokenizer is not the model's"
            )
        kept = tokens[-(self._max_length + 1) :]
        return Sequence(kept, len(after), *size), len(kept) < len(tokens)


def findings(tasks: list[Task]) -> Iterator[Finding]:
    """What a user should know about tasks that are measured all the same."""
    for task in tasks:
        if task.truncated:
            total = sum(len(item.sequences) for item in task.items)
            text = (
                f"{task.name}: {task.truncated:,} of {total:,} sequences are longer than the model's context and are measured "
            )
            text += "without their first tokens, as lm-eval does; shorten them, or train with longer sequences"
            yield Finding("task-truncated", "evaluate.tasks", text)
        if task.repeated:
            line, earlier = task.repeated[0]
            text = f"{task.name}: {len(task.repeated):,} of {task.of:,} items are repeated and count each time, such as line "
            text += f"{line} (the same as line {earlier}); remove them"
            yield Finding("task-repeated", "evaluate.tasks", text)
