"""YAML files and `--section.key value` flags -> a tree of frozen dataclasses, with every problem reported at once.

Knows dataclasses and YAML nodes; knows nothing about what the settings mean (that is `config.py`). Scalars are read from their
text by the type of their field, so YAML 1.1's surprises (`3e-4` a string, `on` a boolean, `12:30:45` a number) do not
exist here. Imports no torch.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import textwrap
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pretrain import UserError

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 20


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the settings."""

    key: str
    """Dotted key, or the file where no key can be named."""
    message: str
    """What is wrong, what is allowed, what to do."""
    origin: str = ""
    """`file:line` or the flag that set the value."""

    def __str__(self) -> str:
        where = f"  ({self.origin})" if self.origin and self.origin != self.key else ""
        return f"{self.key}: {self.message}{where}"


class ConfigError(UserError):
    """All problems of a configuration, one a line. Launchers print it and exit with status 2."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{head} in the settings:", *(f"  {problem}" for problem in problems)]))


# ---------------------------------------------------------------- files and flags -> one tree of nodes


def read_layers(paths: list[str], flags: dict[str, str], problems: list[Problem]) -> dict[str, Any]:
    """Nested dict of YAML nodes: the files in their order, each over the one before, then the flags."""
    tree: dict[str, Any] = {}
    for path in paths:
        _merge(tree, _read_file(path, problems))
    for key, text in flags.items():
        layer: Any = _flag_node(key, text, problems)
        for part in reversed(key.split(".")):
            layer = {part: layer}
        _merge(tree, layer)
    return tree


def _read_file(path: str, problems: list[Problem]) -> dict[str, Any]:
    try:
        if Path(path).stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"is larger than {MAX_FILE_BYTES} bytes; no file of settings is")
        text = Path(path).read_bytes().decode("utf-8-sig")
        node = yaml.compose(text, Loader=_Loader)
        if node is not None and not isinstance(node, yaml.MappingNode):
            raise ValueError("must hold sections such as `model:` with keys below them")
        return _unfold(node, path, problems, 0) if node is not None else {}
    except FileNotFoundError:
        problems.append(Problem(path, "there is no such file"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problems.append(Problem(f"{path}:{mark.line + 1}" if mark else path, _reason(error)))
    return {}


class _Loader(yaml.SafeLoader):
    """Refuses aliases: nested ones unfold a kilobyte to millions of values."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ValueError(f"line {event.start_mark.line + 1}: *{event.anchor} is an alias; write the value out")
        return super().compose_node(parent, index)


def _reason(error: Exception) -> str:
    """Why settings cannot be read, on one line."""
    if isinstance(error, RecursionError):
        return f"is nested deeper than {MAX_DEPTH} levels"
    if isinstance(error, yaml.YAMLError):
        return f"is not YAML: {getattr(error, 'problem', None) or str(error).splitlines()[0]}"
    return f"cannot be read: {error}"


def _flag_node(key: str, text: str, problems: list[Problem]) -> Any:
    """`[...]` and `{...}` are YAML, anything else is taken as it stands."""
    if text[:1] in ("[", "{"):
        try:
            return _unfold(yaml.compose(text, Loader=_Loader), f"--{key}", problems, 0)
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            problems.append(Problem(key, _reason(error), f"--{key}"))
            return {}
    return Scalar(text, f"--{key}")


@dataclass(frozen=True)
class Scalar:
    """The text of a value and where it stands."""

    text: str
    origin: str
    quoted: bool = False


@dataclass(frozen=True)
class Sequence:
    """A list of scalars, lists and dicts, and where it stands."""

    items: list[Any]
    origin: str


def _unfold(node: yaml.Node, file: str, problems: list[Problem], depth: int) -> Any:
    """Nodes as dict, `Sequence` or `Scalar`; refuses duplicate keys, aliases and absurd depth."""
    origin = file if file.startswith("--") else f"{file}:{node.start_mark.line + 1}"
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(node, yaml.ScalarNode):
        return Scalar(node.value, origin, quoted=node.style in ("'", '"'))
    if isinstance(node, yaml.SequenceNode):
        return Sequence([_unfold(item, file, problems, depth + 1) for item in node.value], origin)
    result: dict[str, Any] = {}
    for key_node, value in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
        if key in result:
            problems.append(Problem(key, "stands twice; keep one", f"{file}:{key_node.start_mark.line + 1}"))
        result[key] = _unfold(value, file, problems, depth + 1)
    return result


def nodes(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """Plain settings, sections as dicts, as `read_layers` gives those of a file."""
    return {
        key: nodes(value, origin) if isinstance(value, dict) else Scalar(shown(value), origin) for key, value in values.items()
    }


def over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two layers as one."""
    _merge(below, above)
    return below


def _merge(tree: dict[str, Any], layer: dict[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


# ---------------------------------------------------------------- the tree -> dataclasses


def build(cls: type, tree: Any, problems: list[Problem], prefix: str = "", root: type | None = None) -> Any:
    """An instance of the dataclass `cls`; a value that does not fit is reported and left at its default.

    Returns None where a required key is missing.
    """
    root = root or cls
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    values: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if key not in hints:
            problems.append(Problem(dotted, _unknown_key(key, prefix, hints, root), _origin(value)))
            continue
        try:
            values[key] = _convert(value, hints[key], dotted, problems, root)
        except ValueError as error:
            help_text = f" -- {docs[key]}" if key in docs else ""
            problems.append(Problem(dotted, f"{error}{help_text}", _origin(value)))
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in tree]
    problems.extend(Problem(f"{prefix}{name}", f"is required -- {docs.get(name, '')}") for name in missing)
    return cls(**values) if values.keys() >= set(required) else None


def _convert(value: Any, hint: Any, dotted: str, problems: list[Problem], root: type) -> Any:
    """`value` as the type `hint`. Raises ValueError that says what is allowed."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (option for option in typing.get_args(hint) if option is not type(None))
        if isinstance(value, Scalar) and not value.quoted and value.text in ("null", "~", "None", ""):
            return None
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"must hold keys: {', '.join(f.name for f in dataclasses.fields(hint))}")
        return build(hint, value, problems, f"{dotted}.", root)
    origin = typing.get_origin(hint)
    if origin in (list, tuple):
        return _convert_sequence(value, hint, origin, dotted, problems, root)
    if not isinstance(value, Scalar):
        raise ValueError(f"is {'a list' if isinstance(value, Sequence) else 'a section'}, but must be {_name(hint)}")
    return _convert_scalar(value.text, hint)


def _convert_sequence(value: Any, hint: Any, origin: type, dotted: str, problems: list[Problem], root: type) -> Any:
    kinds = typing.get_args(hint)
    if not isinstance(value, Sequence):
        raise ValueError(f"must be a list, such as {_example(kinds[0])}")
    if origin is tuple and len(value.items) != len(kinds):
        raise ValueError(f"must have {len(kinds)} values, got {len(value.items)}")
    pairs = zip(value.items, kinds if origin is tuple else (kinds[0],) * len(value.items), strict=True)
    return origin(_convert(item, kind, f"{dotted}[{i}]", problems, root) for i, (item, kind) in enumerate(pairs))


def _convert_scalar(text: str, hint: Any) -> Any:
    if typing.get_origin(hint) is typing.Literal:
        allowed = typing.get_args(hint)
        if text not in allowed:
            near = difflib.get_close_matches(text, allowed, 1)
            raise ValueError(f"got '{text}', allowed: {', '.join(allowed)}" + (f"; did you mean '{near[0]}'?" if near else ""))
        return text
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"got '{text}', allowed: true, false")
        return text.lower() == "true"
    if hint is str:
        if not text:
            raise ValueError("is empty")
        return text
    try:
        number = float(text.replace("_", ""))
        whole = int(text.replace("_", "")) if text.replace("_", "").lstrip("+-").isdigit() else None
    except ValueError:
        raise ValueError(f"got '{text}', must be {_name(hint)}") from None
    if not math.isfinite(number):
        raise ValueError(f"got '{text}', must be a finite number")
    if hint is float:
        return number
    if whole is None and number != int(number):
        raise ValueError(f"got '{text}', must be {_name(hint)}")
    return whole if whole is not None else int(number)


def _name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number such as 3e-4", bool: "true or false", str: "text"}
    return names.get(hint, "a section" if dataclasses.is_dataclass(hint) else "one of a fixed list")


def _example(hint: Any) -> str:
    """A list of such values."""
    if dataclasses.is_dataclass(hint):
        return "[{" + f"{dataclasses.fields(hint)[0].name}: ..." + "}]"
    return "[" + ", ".join(typing.get_args(hint)[:2] or {float: ("0.9", "0.95")}.get(hint, ("a", "b"))) + "]"


def _origin(value: Any) -> str:
    if isinstance(value, dict):
        return next((found for found in map(_origin, value.values()) if found), "")
    return value.origin


def _unknown_key(key: str, prefix: str, hints: dict[str, Any], root: type) -> str:
    """Names the nearest key of this section, else the nearest anywhere, else all of this section."""
    if "." in key:  # in a file: those of flags are split
        section, _, rest = key.partition(".")
        return f"unknown key; in a file it is written {prefix}{section}: {{{rest}: ...}}"
    near = difflib.get_close_matches(key, hints, 1)
    elsewhere = {dotted.rsplit(".", 1)[-1]: dotted for dotted, _, _ in walk(root)}
    far = difflib.get_close_matches(key, elsewhere, 1, cutoff=0.75)
    if near:
        return f"unknown key; did you mean {prefix}{near[0]}?"
    return f"unknown key; did you mean {elsewhere[far[0]]}?" if far else f"unknown key; allowed here: {', '.join(hints)}"


# ---------------------------------------------------------------- the dataclasses as text


def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the docstring that stands below the field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    pairs = itertools.pairwise(body)
    return {
        field.target.id: " ".join(inspect.cleandoc(text.value.value).split())
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def walk(cls: type, prefix: str = "") -> typing.Iterator[tuple[str, Any, str]]:
    """(dotted key, default, docstring) of every key below `cls`, sections unfolded."""
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from walk(hints[field.name], f"{prefix}{field.name}.")
        else:
            default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
            yield f"{prefix}{field.name}", default, docs.get(field.name, "")


def shown(value: Any) -> str:
    """A value as YAML writes it."""
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
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
