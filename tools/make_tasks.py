"""Writes tasks (docs/tasks.md): questions that show what a model can do while it trains, from Python code or from lm-eval.

    python tools/make_tasks.py --data data/quickstart/stdlib_valid --tokenizer data/quickstart/tokenizer --output tasks
    python tools/make_tasks.py --lm-eval arc_easy,lambada_openai --output tasks

--data reads the documents of token files that tools/tokenize_corpus.py has written: give validation data, which no run trains
on. From those that are Python code it makes six tasks: the next line, its indentation, the closing bracket, a keyword, a name
that was used before, and which function a docstring belongs to. Where right answers could be guessed by their frequency, each
is right equally often. The same text, tokenizer and seed give the same files.

--lm-eval writes the requests of lm-eval's tasks, with their examples (--num-fewshot), to files that give the same figures.

Exit status: 0 done, 2 refused, 130 interrupted.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import io
import json
import keyword
import random
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain import UserError
from pretrain.data.indexed import DataError
from pretrain.data.shards import open_shards
from pretrain.data.tasks import Encoder
from pretrain.data.tokenizer import Tokenizer
from pretrain.files import write_atomically
from pretrain.run import command_line

CONTEXT = 80
"""Most characters of a context. Short ones keep the tasks cheap: about 25 tokens each."""
BRACKETS = ")]"
KEYWORDS = ("in", "is", "and", "or", "as", "if", "else", "import")
_LEAST_ITEMS = 8


def main(argv: list[str]) -> None:
    """Raises UserError, OSError."""
    parser = command_line.make_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", nargs="+", metavar="PREFIX", help="token files whose documents are Python code, not trained on"
    )
    source.add_argument("--lm-eval", metavar="NAMES", help="names of lm-eval's tasks, separated by commas")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for one file per task, NAME.jsonl")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="with --data: the tokenizer of the token files")
    parser.add_argument("--items", type=command_line.at_least(1), metavar="N",
                        help="at most so many items per task (default: with --data 30, else all)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1234, metavar="S", help="with --data: seed of the choice (%(default)s)")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="with --lm-eval: examples before each question; "
                        "default: set by the task")  # fmt: skip
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="with --lm-eval: folder with your own tasks")
    options = parser.parse_args(argv)
    if options.data and not options.tokenizer:
        parser.error("--data: give --tokenizer, which turns the tokens into text")
    made = list(from_code(options) if options.data else from_lm_eval(options))  # all or nothing
    options.output.mkdir(parents=True, exist_ok=True)
    for name, items in made:
        path = options.output / f"{name}.jsonl"
        write_atomically(path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
        print(f"{path}: {len(items):,} items")


# ---------------------------------------------------------------- from code


def from_code(options: argparse.Namespace) -> Iterator[tuple[str, list[dict]]]:
    """(name, items) of each task. Raises DataError if the documents hold too little Python code."""
    tokenizer = Tokenizer.load(options.tokenizer)
    sources = [Source(text) for text in documents(options.data, tokenizer)]
    sources = [source for source in sources if source.tokens]
    encoder = Encoder(tokenizer, CONTEXT * 4, tokenizer.vocab_size)
    for make in (next_line, indentation, bracket, keyword_of, name, docstring):
        task = make.__name__.removesuffix("_of")
        draw = random.Random(f"{options.seed} {task}")
        items = chosen(make(sources, draw), options.items or 30, encoder, draw)
        if len(items) < _LEAST_ITEMS:
            raise DataError(
                f"{', '.join(options.data)}: has {len(items)} questions for the task {task}, which needs {_LEAST_ITEMS}: too "
                "little Python code; give more validation data"
            )
        yield task, items


def documents(prefixes: list[str], tokenizer: Tokenizer) -> Iterator[str]:
    """The texts of token files. Raises DataError."""
    for prefix in prefixes:
        for file in open_shards(prefix, None, tokenizer.vocab_size):
            if not file.num_documents:
                raise DataError(f"{file.path}: a flat file does not say where documents end; give files of tokenize_corpus.py")
            if file.sidecar and file.sidecar.tokenizer_fingerprint != tokenizer.fingerprint:
                raise DataError(f"{file.path}: was made with another tokenizer; give that one")
            for number in range(file.num_documents):
                yield tokenizer.decode(file.document(number).tolist())


class Source:
    """A document with its Python tokens; none if it is not Python code."""

    def __init__(self, text: str):
        self.text, self.lines = text, text.split("\n")
        self.begins = [0]
        for line in self.lines:
            self.begins.append(self.begins[-1] + len(line) + 1)
        try:
            self.functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
            self.tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        except (SyntaxError, ValueError, RecursionError, tokenize.TokenError):
            self.functions, self.tokens = [], []

    def before(self, line: int, column: int = 0) -> str:
        """The last complete lines before a place (line from 0), at most CONTEXT characters."""
        end = self.begins[line] + column
        start = max(0, end - CONTEXT)
        if start and (cut := self.text.find("\n", start - 1, end)) >= 0:
            start = cut + 1
        return self.text[start:end]

    def statements(self) -> Iterator[int]:
        """Lines, from 0, of 8 to 40 characters with which a statement begins, right below another line."""
        layout = (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT)
        begins = True
        for token in self.tokens:
            if token.type not in layout:
                number = token.start[0] - 1
                code = self.lines[number].strip()
                if begins and number and 8 <= len(code) <= 40 and self.context(number)[0].strip() and code[0] not in "\"'":
                    yield number
                begins = token.type == tokenize.NEWLINE

    def context(self, line: int) -> tuple[str, str]:
        """(what is `before` a line, the punctuation and the line feed at its end, which many tokenizers join); empty if it is
        less than a line."""
        found, last = self.before(line).removesuffix("\n"), self.lines[line - 1]
        if not last or not found.endswith(last):
            return "", ""
        end = re.search(r"[^\w\s]*$", found)[0]
        return found.removesuffix(end), f"{end}\n"


def chosen(items: Iterable[tuple[object, dict]], most: int, encoder: Encoder, draw: random.Random) -> list[dict]:
    """At most so many of (group, item) without repetition, as even over the groups as they can be, whose continuations have
    tokens of their own."""
    groups: dict[object, list[dict]] = {}
    for group, item in items:
        groups.setdefault(group, []).append(item)
    for group in groups.values():
        draw.shuffle(group)
    found: list[dict] = []
    while any(groups.values()) and len(found) < most:
        if len(groups) > 1 and not all(groups.values()):
            break  # more items would favor some answers
        for group in groups.values():
            while group:
                item = group.pop()
                if item not in found and all(encoder.divides(*pair) for pair in pairs(item)):
                    found.append(item)
                    break
    return found[:most]


def pairs(item: dict) -> list[tuple[str, str]]:
    """(context, continuation) of each answer."""
    if "contexts" in item:
        return [(context, item["continuation"]) for context in item["contexts"]]
    return [(item["context"], choice) for choice in item.get("choices", [item.get("continuation")])]


def answered(context: str, right: str, wrong: list[str], draw: random.Random) -> dict:
    """An item whose right answer is at a random place."""
    choices = [right, *wrong]
    draw.shuffle(choices)
    return {"context": context, "choices": choices, "answer": choices.index(right)}


def next_line(sources: list[Source], draw: random.Random) -> Iterator[tuple[object, dict]]:
    """After which lines a line comes: those before it, or those before a line of another document with the same indentation.
    The line is the same for both, so that neither its length nor its words decide."""
    places = [(source, number, *source.context(number)) for source in sources for number in source.statements()]
    groups: dict[tuple, list] = {}
    for place in places:
        groups.setdefault((indent(place[0].lines[place[1]]), place[3]), []).append(place)
    for source, number, context, end in places:
        right = source.lines[number]
        others = [each for each in groups[indent(right), end] if each[0] is not source and right not in each[0].text]
        if others:
            contexts = [context, draw.choice(others)[2]]
            draw.shuffle(contexts)
            yield 0, {"contexts": contexts, "continuation": end + right, "answer": contexts.index(context)}


def indent(line: str) -> int:
    """Characters before the first that is no space."""
    return len(line) - len(line.lstrip())


def indentation(sources: list[Source], draw: random.Random) -> Iterator[tuple[object, dict]]:
    """The next line with its indentation, or with 4 spaces more or fewer."""
    for source in sources:
        for number in source.statements():
            right, last = source.lines[number], source.lines[number - 1]
            if indent(right) >= 4 and "\t" not in right:
                context, end = source.context(number)
                wrong = [end + right[4:], f"{end}    {right}"]
                change = (indent(right) > indent(last)) - (indent(right) < indent(last))
                yield change, answered(context, end + right, wrong, draw)


def bracket(sources: list[Source], draw: random.Random) -> Iterator[tuple[object, dict]]:
    """The bracket that closes the last one that is open."""
    for source in sources:
        opened: list[tuple[int, int]] = []
        for token in source.tokens:
            if token.type == tokenize.OP and token.string in "([":
                opened.append(token.start)
            elif token.type == tokenize.OP and token.string in BRACKETS and opened:
                line, column = opened.pop()
                context = source.before(token.start[0] - 1, token.start[1])
                distance = source.begins[token.start[0] - 1] + token.start[1] - source.begins[line - 1] - column
                if 3 <= distance <= len(context) and context[-1:].strip():
                    yield token.string, {"context": context, "choices": list(BRACKETS), "answer": BRACKETS.index(token.string)}


def keyword_of(sources: list[Source], draw: random.Random) -> Iterator[tuple[object, dict]]:
    """The keyword at a place inside a line, among four."""
    for source in sources:
        for token in source.tokens:
            line, column = token.start
            if (
                token.string in KEYWORDS
                and source.lines[line - 1][:column].strip()
                and source.lines[line - 1][column - 1] == " "
            ):
                context = source.before(line - 1, column).rstrip(" ")
                wrong = draw.sample([each for each in KEYWORDS if each != token.string], 3)
                yield token.string, answered(context, f" {token.string}", [f" {each}" for each in wrong], draw)


def name(sources: list[Source], draw: random.Random) -> Iterator[tuple[object, dict]]:
    """A name that the context holds already: every token of it must be the likeliest."""
    for source in sources:
        for token in source.tokens:
            context = source.before(token.start[0] - 1, token.start[1])
            is_name = token.type == tokenize.NAME and len(token.string) >= 4 and not keyword.iskeyword(token.string)
            if is_name and re.search(rf"\b{token.string}\b", context) and context.split("\n")[-1].strip():
                spaces = len(context) - len(context.rstrip(" "))
                yield 0, {"context": context.rstrip(" "), "continuation": " " * spaces + token.string}


def docstring(sources: list[Source], draw: random.Random) -> Iterator[tuple[object, dict]]:
    """The function that a docstring describes, or another one."""
    found = []
    for source in sources:
        for node in source.functions:
            first = (ast.get_docstring(node) or "").split("\n")[0]
            head = source.lines[node.lineno - 1].strip()
            if 15 <= len(first) <= 60 and head.endswith(":") and len(head) <= CONTEXT - 8:
                found.append((f'{head}\n    """', first))
    for context, text in found:
        others = [other for other, its in found if other != context and its != text]
        if others:
            contexts = [context, draw.choice(others)]
            draw.shuffle(contexts)
            yield 0, {"contexts": contexts, "continuation": text, "answer": contexts.index(context)}


# ---------------------------------------------------------------- from lm-eval


FEWSHOT_SEED = 1234  # the default of lm_eval.simple_evaluate and of its command, `fewshot_random_seed`


def from_lm_eval(options: argparse.Namespace) -> Iterator[tuple[str, list[dict]]]:
    """(name, items) of each task. Raises UserError for a task that is not answered by likelihood."""
    if not importlib.util.find_spec("lm_eval"):
        raise UserError("--lm-eval needs the package lm-eval: pip install 'pretrain[eval]'")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(options.include_path) if options.include_path else None)
    for wanted in options.lm_eval.split(","):
        if not manager.match_tasks([wanted]):
            raise UserError(
                f"--lm-eval: there is no task {wanted!r}; `lm-eval ls tasks` lists them, --include-path adds your own"
            )
        # Earlier versions of lm-eval have no `load`, and their groups are dicts in dicts.
        found = manager.load([wanted])["tasks"] if hasattr(manager, "load") else manager.load_task_or_group([wanted])
        for task in leaves(found):
            if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
                raise UserError(f"{task.config.task}: is of the kind {task.OUTPUT_TYPE}, which likelihood does not answer")
            if options.num_fewshot is not None and task.get_config("num_fewshot") == 0:
                print(f"{task.config.task}: without examples, as its definition says; lm-eval ignores another number, too")
            elif options.num_fewshot is not None:
                task.set_config(key="num_fewshot", value=options.num_fewshot)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)  # without it, the examples differ from call to call
            task.build_all_requests(limit=options.items, rank=0, world_size=1)
            requests: dict[int, list] = {}
            for request in task.instances:
                requests.setdefault(request.doc_id, []).append(request)
            yield task.config.task, [item_of(task, same) for _, same in sorted(requests.items())]


def leaves(tasks: dict) -> Iterator:
    """The tasks in a tree of groups."""
    for task in tasks.values():
        yield from leaves(task) if isinstance(task, dict) else [task]


def item_of(task, requests: list) -> dict:
    """The item of the requests of one question. A space that lm-eval puts before each choice goes to the end of the context,
    where it is encoded in the same way, and choices keep their lengths."""
    requests = sorted(requests, key=lambda request: request.idx)
    contexts, continuations = zip(*(request.args[:2] for request in requests), strict=True)
    if task.OUTPUT_TYPE == "loglikelihood":
        return {"context": contexts[0], "continuation": continuations[0]}
    space, document = task.config.target_delimiter, requests[0].doc
    if space and space.isspace():
        contexts = [context + space for context in contexts]
        continuations = [continuation.removeprefix(space) for continuation in continuations]
    choices = task.doc_to_choice(document)
    contexts, continuations = (
        contexts[: len(choices)],
        continuations[: len(choices)],
    )  # the rest has no context (acc_mutual_info)
    answer = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    answer = choices.index(answer) if isinstance(answer, str) and answer in choices else answer
    if type(answer) is not int:
        raise UserError(f"{task.config.task}: has the answer {answer!r}, and an item has one right answer")
    if task.multiple_input:
        return {"contexts": list(contexts), "continuation": continuations[0], "answer": answer}
    return {"context": contexts[0], "choices": list(continuations), "answer": answer}


if __name__ == "__main__":
    sys.exit(command_line.run(main))
