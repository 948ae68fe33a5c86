"""YAML files and `--section.key value` flags -> a tree of frozen dataclasses, with every problem reported at once.

    read_layers    files and flags -> one nested dict of texts, and the origin of each value
    build          that dict -> dataclasses; pydantic checks types and bounds
    walk, ...      dataclasses -> help, YAML, JSON Schema

Knows dataclasses and YAML; what the settings mean is the business of `config.py`. A text is read by the type of its field,
which rules out YAML 1.1's surprises (`3e-4` a string, `on` a boolean, `12:30:45` a number). Imports no torch.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic_core import CoreSchema, SchemaValidator, ValidationError
from pydantic_core import core_schema as core

from pretrain import UserError

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 20

# ---------------------------------------------------------------- declaring a setting

PositiveInt = Annotated[int, ("ge", 1)]  # bounds have pydantic's names: ge, gt, le, lt
NonNegativeInt = Annotated[int, ("ge", 0)]
PositiveFloat = Annotated[float, ("gt", 0)]
NonNegativeFloat = Annotated[float, ("ge", 0)]
Fraction = Annotated[float, ("ge", 0), ("le", 1)]
Decay = Annotated[float, ("ge", 0), ("lt", 1)]


def _setting(resume: str, default: Any = dataclasses.MISSING) -> Any:
    kind = "default_factory" if callable(default) else "default"
    return dataclasses.field(**{kind: default}, metadata={"resume": resume})


frozen = functools.partial(_setting, "frozen")
"""A field with this default (or factory; without one the key is required); a change makes another run."""
guarded = functools.partial(_setting, "guarded")
"""The same; a resumed run may change it if checkpoint.allow_changes names it."""
free = functools.partial(_setting, "free")
"""The same; a resumed run may change it."""


# ---------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the settings."""

    key: str
    """Dotted key, or the file if no key can be named."""
    message: str
    """Names what is wrong, what is allowed, and what to do."""
    origin: str = ""
    """`file:line` or the flag that set the value."""

    def __str__(self) -> str:
        where = f"  ({self.origin})" if self.origin and self.origin != self.key else ""
        return f"{self.key}: {self.message}{where}"


class ConfigError(UserError):
    """All problems of a configuration, one per line. Launchers print it and exit with status 2."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{head} in the settings:", *(f"  {problem}" for problem in problems)]))


# ---------------------------------------------------------------- files and flags -> one tree of texts

Origins = dict[tuple, str]
"""("optimizer", "betas", 0) -> `file:line` or the flag."""
_UNREADABLE = (OSError, ValueError, yaml.YAMLError, RecursionError)


class _Quoted(str):
    """A text in quotes, which never means null."""


class _Loader(yaml.SafeLoader):
    """Refuses aliases: nested ones expand a kilobyte to millions of values."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ValueError(f"line {event.start_mark.line + 1}: *{event.anchor} is an alias; write the value out")
        return super().compose_node(parent, index)


def split_arguments(argv: list[str], problems: list[Problem]) -> tuple[list[str], dict[str, str], set[str]]:
    """-> (--config files, {dotted key: text}, switches)."""
    paths: list[str] = []
    flags: dict[str, str] = {}
    switches: set[str] = set()
    words = iter(argv)
    for word in words:
        name, equals, text = word.lstrip("-").partition("=")
        if word in ("-h", "--help", "--print_config", "--print_schema"):
            switches.add("help" if word == "-h" else name)
        elif not word.startswith("--"):
            problems.append(Problem(word, "is not a flag; settings are given as --section.key value"))
        elif (value := text if equals else next(words, None)) is None:
            problems.append(Problem(word, "needs a value"))
        elif name == "config":
            paths.append(value)
        else:
            flags[name] = value
    return paths, flags, switches


def read_layers(paths: list[str], flags: dict[str, str], problems: list[Problem]) -> tuple[dict[str, Any], Origins]:
    """Nested dicts and lists of texts: the files in their order, each over the one before, then the flags."""
    tree: dict[str, Any] = {}
    origins: Origins = {}
    for path in paths:
        merge(tree, _read_file(path, origins, problems))
    for key, text in flags.items():
        loc, value = tuple(_legible(key).split(".")), text
        origins[loc] = f"--{key}"
        if text[:1] in ("[", "{"):  # anything else is taken as it is
            try:
                value = _unfold(yaml.compose(text, Loader=_Loader), f"--{key}", loc, origins, problems)
            except _UNREADABLE as error:
                problems.append(Problem(key, _reason(error), f"--{key}"))
                continue
        for part in reversed(loc):
            value = {part: value}
        merge(tree, value)
    return tree, origins


def origin_of(origins: Origins, loc: tuple) -> str:
    """Origin of the value at `loc`, or of the first one below it; empty if it was not set."""
    return next((origin for each, origin in origins.items() if each[: len(loc)] == loc), "")


def _legible(key: str) -> str:
    """`key` with what UTF-8 cannot encode, such as bytes of another locale, as escapes."""
    return key.encode("utf-8", "backslashreplace").decode()


def merge(below: dict[str, Any], above: dict[str, Any]) -> None:
    """Puts the layer `above` over `below`, in place. Sections merge; anything else replaces."""
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            merge(below[key], value)
        else:
            below[key] = value


def _read_file(path: str, origins: Origins, problems: list[Problem]) -> dict[str, Any]:
    try:
        if Path(path).stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"the file is larger than {MAX_FILE_BYTES} bytes")
        node = yaml.compose(Path(path).read_bytes().decode("utf-8-sig"), Loader=_Loader)
        if node is not None and not isinstance(node, yaml.MappingNode):
            raise ValueError("the file must hold sections such as `model:` with keys below them")
        return _unfold(node, path, (), origins, problems) if node is not None else {}
    except FileNotFoundError:
        problems.append(Problem(path, "there is no such file"))
    except _UNREADABLE as error:
        mark = getattr(error, "problem_mark", None)
        problems.append(Problem(f"{path}:{mark.line + 1}" if mark else path, _reason(error)))
    return {}


def _reason(error: Exception) -> str:
    """Why settings cannot be read, on one line."""
    if isinstance(error, RecursionError):
        return f"is nested deeper than {MAX_DEPTH} levels"
    if isinstance(error, yaml.YAMLError):
        return f"is not YAML: {getattr(error, 'problem', None) or str(error).splitlines()[0]}"
    return f"cannot be read: {error}"


def _unfold(node: yaml.Node, file: str, loc: tuple, origins: Origins, problems: list[Problem]) -> Any:
    """YAML nodes as dicts, lists and texts; refuses duplicate keys and excessive depth."""
    if len(loc) > MAX_DEPTH:
        raise RecursionError
    origins[loc] = file if file.startswith("--") else f"{file}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.ScalarNode):
        return _Quoted(node.value) if node.style in ("'", '"') else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_unfold(item, file, (*loc, i), origins, problems) for i, item in enumerate(node.value)]
    result: dict[str, Any] = {}
    for key_node, value in node.value:
        key = _legible(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
        if key in result:
            line = f"{file}:{key_node.start_mark.line + 1}"
            problems.append(Problem(_dotted((*loc, key)), "is given twice in one section; keep one", line))
        result[key] = _unfold(value, file, (*loc, key), origins, problems)
    return result


# ---------------------------------------------------------------- the tree -> dataclasses


class Unread(Exception):
    """A check asked for a key that has a problem."""


class Partial:
    """Settings of which some have a problem. Reading one of those raises `Unread`: no check reports what merely follows."""

    def __init__(self, settings: Any, wrong: set[str], prefix: str = ""):
        self._settings, self._wrong, self._prefix = settings, wrong, prefix

    def __getattr__(self, name: str) -> Any:
        key = f"{self._prefix}{name}"
        if key in self._wrong:
            raise Unread(key)
        value = getattr(self._settings, name)
        return Partial(value, self._wrong, f"{key}.") if any(each.startswith(f"{key}.") for each in self._wrong) else value


def build(cls: type, tree: dict[str, Any], origins: Origins, problems: list[Problem]) -> Any:
    """An instance of `cls`; with `problems` (new ones are added), a `Partial` of one. Removes wrong values from `tree`."""
    wrong, found = {problem.key for problem in problems}, []
    while True:
        try:
            settings = _validator(cls).validate_python(tree)
            break
        except ValidationError as error:
            errors = error.errors(include_url=False)
            found = found or [_problem(cls, each, origins, wrong) for each in errors]  # later ones follow from the pruning
            wrong |= {_prune(tree, each) for each in errors}
    problems += found
    return Partial(settings, wrong) if problems else settings


@functools.cache
def _validator(cls: type) -> SchemaValidator:
    return SchemaValidator(_core(cls))


def _prune(tree: dict[str, Any], error: Any) -> str:
    """Removes the value that `error` is about, or the list or section it belongs to. -> its dotted key."""
    loc = error["loc"][:-1] if error["type"] == "missing" else error["loc"]
    loc = tuple(itertools.takewhile(lambda part: isinstance(part, str), loc))
    functools.reduce(lambda section, part: section.get(part, {}), loc[:-1], tree).pop(loc[-1], None)
    return _dotted(loc)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _core(hint: Any, docs: bool = False) -> CoreSchema:
    """pydantic's schema of a type, with the docstrings of fields if `docs`.

    pydantic's TypeAdapter derives the same, but importing and running it takes longer than everything else in `load`.
    """
    kind, args = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in args:
        return core.no_info_before_validator_function(_read_null, core.nullable_schema(_core(args[0], docs)))
    if kind is types.UnionType:  # one error for all of it: the value fits none
        return core.union_schema([_core(each, docs) for each in args], custom_error_type="union", custom_error_message="")
    if kind is list:
        return core.list_schema(_core(args[0], docs))
    if kind is tuple:
        return core.tuple_schema([_core(each, docs) for each in args])
    if kind is typing.Literal:
        return core.literal_schema(list(args))
    if dataclasses.is_dataclass(hint):
        return _section(hint, docs)
    scalar, *bounds = args if kind is Annotated else (hint,)
    makers = {int: core.int_schema, float: core.float_schema, bool: core.bool_schema, str: core.str_schema}
    return core.no_info_before_validator_function(functools.partial(_read, scalar), makers[scalar](strict=True, **dict(bounds)))


def _section(cls: type, docs: bool) -> CoreSchema:
    fields = []
    for field in dataclasses.fields(cls):
        hint, default = _hints(cls)[field.name], _default(field)
        schema = _core(hint, docs)
        if dataclasses.is_dataclass(hint):
            schema = core.with_default_schema(schema, default_factory=hint)
        elif default is not dataclasses.MISSING:
            schema = core.with_default_schema(schema, default=default)
        updates = {"description": field_docs(cls).get(field.name, hint.__doc__)} if docs else {}
        fields.append(core.dataclass_field(field.name, schema, kw_only=True, metadata={"pydantic_js_updates": updates}))
    config = core.CoreConfig(extra_fields_behavior="forbid", str_min_length=1, allow_inf_nan=False)
    return core.dataclass_schema(cls, core.dataclass_args_schema(cls.__name__, fields), list(_hints(cls)), config=config)


def _read_null(value: Any) -> Any:
    return None if value in ("null", "~", "None", "") and not isinstance(value, _Quoted) else value


def _read(kind: type, value: Any) -> Any:
    """A text as `kind` if possible, else unchanged, for pydantic to refuse."""
    if not isinstance(value, str):  # from a model's folder
        return int(value) if kind is int and isinstance(value, float) and value.is_integer() else value
    if kind is str:
        return str(value)
    if kind is bool:
        return {"true": True, "false": False}.get(value.lower(), value)
    digits = value.replace("_", "")
    try:
        number = float(digits)
        if kind is int and digits.lstrip("+-").isdigit():
            return int(digits)
    except ValueError:
        return value
    return kind(number) if math.isfinite(number) and (kind is float or number.is_integer()) else value


# ---------------------------------------------------------------- pydantic's errors in our words

_WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "non-empty text"}
_LIMITS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}


def words(hint: Any) -> str:
    """Describes the values of a field of type `hint`, to be put behind "must be"."""
    kind, args = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        return ", ".join([words(args[0]), *(f"{_LIMITS[name]} {limit}" for name, limit in args[1:])])
    if type(None) in args:
        return f"{words(args[0])}, or null"
    if kind is typing.Literal:
        return f"one of {', '.join(args)}"
    if kind is types.UnionType:
        return ", or ".join(map(words, args))
    if dataclasses.is_dataclass(hint):
        return f"a section with keys {', '.join(_hints(hint))}"
    if kind is tuple:
        return f"a list of {len(args)} in brackets, each {words(args[0])}"
    return f"a list in brackets, each item {words(args[0])}" if kind is list else _WORDS[hint]


def _problem(cls: type, error: Any, origins: Origins, wrong: set[str]) -> Problem:
    loc, kind, text = error["loc"], error["type"], repr(error["input"])
    if kind == "missing" and isinstance(loc[-1], int):  # too few items
        loc, kind = loc[:-1], "too_short"
    origin = origin_of(origins, loc[:-1] if kind == "missing" else loc)
    section, hint = _plain(_hint_at(cls, loc[:-1])), _hint_at(cls, loc)
    if kind == "unexpected_keyword_argument":
        advice, meant = _nearest(cls, loc, section)
        wrong.add(meant)
        return Problem(_dotted(loc), f"unknown key; {advice}", origin)
    message = f"got {text if len(text) <= 80 else text[:77] + '...'}, must be {words(hint)}"
    if near := kind == "literal_error" and difflib.get_close_matches(str(error["input"]), typing.get_args(_plain(hint)), 1):
        message += f"; did you mean {near[0]}?"
    doc = field_docs(section).get(loc[-1]) if dataclasses.is_dataclass(section) else None
    return Problem(_dotted(loc), ("is required" if kind == "missing" else message) + (f" -- {doc}" if doc else ""), origin)


def _plain(hint: Any) -> Any:
    """`hint` without None."""
    args = typing.get_args(hint)
    return args[0] if type(None) in args else hint


def _hint_at(cls: type, loc: tuple) -> Any:
    hint: Any = cls
    for part in loc:
        kind = _plain(hint)
        hint = _hints(kind).get(part) if isinstance(part, str) else typing.get_args(kind)[0]
    return hint


def _nearest(cls: type, loc: tuple, section: type) -> tuple[str, str]:
    """(advice, key that was probably meant): the nearest key of this section, else the nearest anywhere."""
    key, prefix, keys = loc[-1], _dotted((*loc[:-1], "")), list(_hints(section))
    if "." in key:  # in a file: those of flags are split
        head, _, rest = key.partition(".")
        return f"in a file it is written {prefix}{head}: {{{rest}: ...}}", f"{prefix}{key}"
    near = {each: f"{prefix}{each}" for each in difflib.get_close_matches(key, keys, 1)}
    elsewhere = near or {setting.key.rsplit(".", 1)[-1]: setting.key for setting in walk(cls)}
    if found := difflib.get_close_matches(key, elsewhere, 1, cutoff=0.6 if near else 0.75):
        return f"did you mean {elsewhere[found[0]]}?", elsewhere[found[0]]
    return f"allowed here: {', '.join(keys)}", ""


def _dotted(loc: tuple) -> str:
    """("data", "train", 0, "path") -> data.train[0].path"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


# ---------------------------------------------------------------- the dataclasses as text


class Setting(NamedTuple):
    """One key of the settings; `str()` is its entry in `--help`."""

    key: str
    default: str
    allowed: str
    resume: str
    """Resume class: frozen, guarded or free."""
    doc: str

    def __str__(self) -> str:
        return f"  --{self.key} ({self.default}; {self.allowed}; {self.resume})\n        {self.doc}"


def walk(cls: type, prefix: str = "") -> Iterator[Setting]:
    """Every key below `cls`; sections that are null by default come with their keys."""
    for field in dataclasses.fields(cls):
        hint, key, default = _hints(cls)[field.name], f"{prefix}{field.name}", _default(field)
        if not dataclasses.is_dataclass(hint):
            text = "required" if default is dataclasses.MISSING else f"default {shown(default)}"
            yield Setting(key, text, words(hint), field.metadata["resume"], field_docs(cls).get(field.name, ""))
        if dataclasses.is_dataclass(_plain(hint)):
            yield from walk(_plain(hint), f"{key}.")


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the docstring below the field."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def json_schema(cls: type) -> dict[str, Any]:
    """JSON Schema of the files that `read_layers` reads, for editors."""
    from pydantic.json_schema import GenerateJsonSchema  # slow to import

    return GenerateJsonSchema().generate(_core(cls, docs=True))


def shown(value: Any) -> str:
    """A value as YAML writes it, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return "[" + ", ".join(map(shown, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def to_yaml(instance: Any) -> str:
    """The settings as a YAML file that `load` reads back to an equal instance."""
    return yaml.safe_dump(to_dict(instance), sort_keys=False, allow_unicode=True, width=120)


def to_dict(instance: Any) -> dict[str, Any]:
    """Nested plain dicts and lists, ready for YAML and JSON."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(instance)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay lists."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
