"""The text of a record: the value under a key, nested if need be, or a template filled with several values.

A record is a JSON object, a row of a table, or a row of a column file, as a dict. Nothing is stripped or converted.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .indexed import DataError

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
_TEMPLATE_PARTS = re.compile(
    r"(?P<brace>\{\{|\}\})|\{(?P<key>[^{}]*)\}|\\(?P<escape>.?)|(?P<text>[^{}\\]+)|(?P<wrong>.)", re.DOTALL
)


class Bad(NamedTuple):
    """Takes the place of a record or a text that cannot be used: the reason, by which such places are counted, and more."""

    reason: str
    detail: str = ""


class Missing(Bad):
    """A record has no such key, or null where the object with this key would be."""


class Key:
    """The text under one key. "a.b" is the key "b" of the object under "a", unless a record has the key "a.b" itself."""

    def __init__(self, key: str):
        self.keys = self.needed = [key]

    def text(self, record: object, place: str) -> str | Bad:
        """The text of `record`, which was read at `place`."""
        key = self.keys[0]
        value = record.get(key) if isinstance(record, dict) else None
        if isinstance(value, str):  # nearly always, and fast
            return value
        value = lookup(record, key, place)
        if isinstance(value, (str, Bad)):
            return value
        file = place.rpartition(":")[0]
        way = f" with the keys {', '.join(value)} (--text-key {key}.KEY)" if isinstance(value, dict) else ""
        way = f" (`jq -c '.{key} |= join(\"\\n\")' {file} > NEW.jsonl` joins its parts)" if isinstance(value, list) else way
        return Bad(f"{key!r} is {_type_name(value)}, not text", way)


class Template:
    """Text with values of the record in braces, as in "{title}\\n\\n{body.text}".

    "{key?}" is nothing if the key is missing or null; any other key must be there. Values are texts or integers. "{{" and
    "}}" are braces, and \\n, \\t, \\r and \\\\ stand for a line end, a tab, a carriage return and a backslash. If all values
    are empty, so is the text.
    """

    def __init__(self, template: str):
        """Raises DataError."""
        self._parts: list[tuple[str, str | None, bool]] = []  # (text, key behind it, optional)
        text = ""
        for part in _TEMPLATE_PARTS.finditer(template):
            key, escape = part["key"], part["escape"]
            if part["wrong"] or key in ("", "?"):
                way = "{{ and }} are literal braces" if part["wrong"] else "put a key between the braces"
                raise DataError(f"--template: {part[0]!r} at character {part.start() + 1} of {template!r}; {way}")
            if escape is not None and escape not in _ESCAPES:
                allowed = ", ".join(f"\\{each}" for each in _ESCAPES)
                raise DataError(f"--template: \\{escape} at character {part.start() + 1} of {template!r}; allowed: {allowed}")
            if key is not None:
                self._parts.append((text, key.removesuffix("?"), key.endswith("?")))
                text = ""
            else:
                text += part["brace"][0] if part["brace"] else _ESCAPES[escape] if escape else part["text"]
        self._end = text
        self.keys = list(dict.fromkeys(key for _, key, _ in self._parts))
        self.needed = list(dict.fromkeys(key for _, key, optional in self._parts if not optional))
        if not self.keys:
            raise DataError(f"--template: {template!r} has no key; write keys in braces, as in '{{title}}\\n\\n{{text}}'")

    def text(self, record: object, place: str) -> str | Bad:
        """The text of `record`, which was read at `place`."""
        texts, filled = [], False
        for before, key, optional in self._parts:
            value = lookup(record, key, place)
            if optional and (value is None or isinstance(value, Missing)):
                value = ""
            if isinstance(value, int) and not isinstance(value, bool):
                value = str(value)
            if isinstance(value, Bad):
                return value
            if not isinstance(value, str):
                way = f" (write {{{key}?}} where it may be null)" if value is None else ""
                return Bad(f"{key!r} is {_type_name(value)}, not text or an integer", way)
            filled = filled or bool(value and not value.isspace())
            texts += [before, value]
        return "".join([*texts, self._end]) if filled else ""


def lookup(record: object, key: str, place: str) -> object:
    """The value under `key`, bytes decoded; Bad if there is none."""
    keys = [key] if isinstance(record, dict) and key in record else key.split(".")
    to = f"{place.rpartition(':')[0]} > NEW.jsonl"
    for number, part in enumerate(keys):
        parent = f"{'.'.join(keys[:number])!r} is " if number else ""
        if not isinstance(record, dict):
            way = f" (`jq -c '.[] | {{{part}: .}}' {to}` makes objects of strings)" if isinstance(record, str) else ""
            return (Missing if record is None and number else Bad)(f"{parent}not an object with the key {part!r}", way)
        if part not in record:
            lists = [each for each, value in record.items() if isinstance(value, list) and isinstance([*value, 0][0], dict)]
            way = f" or `jq -c '.{lists[0]}[]' {to}` to take the objects out of {lists[0]!r}" if lists else ""
            return Missing(f"no key {key!r}", f" among {', '.join(map(repr, record))} (--text-key or --template{way})")
        record = record[part]
    if isinstance(record, bytes):  # a column of a parquet file that was not declared as text
        try:
            return record.decode()
        except UnicodeDecodeError as error:
            return Bad(f"{key!r} is not UTF-8", f" ({error})")
    return record


def _type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__
