"""Writes docs/settings.md, the page of all settings, and configs/schema.json, by which editors complete and check YAML.

Both come from the dataclasses in pretrain/config.py and config.py of its rooms; run this after changing one of them.

example: python tools/write_settings.py
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import typing
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain import files, schema
from pretrain.config import Config
from pretrain.run import command_line

ROOT = Path(__file__).resolve().parents[1]
PAGE, SCHEMA = ROOT / "docs" / "settings.md", ROOT / "configs" / "schema.json"
HEAD = """# Settings

All settings of a run, in YAML files (`--config FILE`; of several, later ones override) or as flags (`--section.key
value`). This page is written by `python tools/write_settings.py` from the code. So is
[configs/schema.json](../configs/schema.json), by which editors with a YAML language server complete and check a file
that begins with this line (the path is relative to the file):

```yaml
# yaml-language-server: $schema=schema.json
```

**Off** is the value that switches something off. **Resume** says whether a resumed run may change a key: `free`, yes;
`guarded`, if `checkpoint.allow_changes` names it; `frozen`, no, because that would be another run. Combinations that
cannot work are refused at the start. `python launch/pretrain.py --config FILE --print_config` prints the result of all
files and flags.
"""
UNITS = {"seconds": "s", "minutes": "min", "hours": "h", "gib": "GiB", "mib": "MiB", "tflops": "TFLOP/s", "mbits": "Mbit/s"}
UNITS |= {word: word for word in ("steps", "tokens", "epochs", "batches", "fraction", "dollars")}  # by the last word of a key
OF_KEY = {"global_batch_size": "sequences", "micro_batch_size": "sequences", "dollars_per_hour": "dollars/h"}
OF_KEY |= dict.fromkeys(
    ("sequence_length", "block_length", "sliding_window", "max_position_embeddings", "original_max_position_embeddings"),
    "tokens",
)
_OFF = re.compile(r"(?:^|[\s(])([\w.\[\]]+): (?:off|none|never|unlimited|no limit|unknown)\b")


class Key(NamedTuple):
    """One row of the page."""

    setting: schema.Setting
    unit: str
    off: str


def keys(section: type, prefix: str) -> list[Key]:
    """The keys of a section, and of those in it."""
    return [Key(each, _unit(each.key), _off(each.doc)) for each in schema.walk(section, prefix)]


def _unit(key: str) -> str:
    name = key.rsplit(".", 1)[-1]
    return OF_KEY.get(name) or UNITS.get(name.rsplit("_", 1)[-1], "")


def _off(doc: str) -> str:
    return next((match[1] for match in _OFF.finditer(doc)), "")


def items(section: type, prefix: str) -> list[tuple[str, type]]:
    """(key, section of its items) of every list of sections below a section."""
    found = []
    for name, hint in typing.get_type_hints(section).items():
        kinds = [hint, *typing.get_args(hint)]
        for kind in kinds:
            if dataclasses.is_dataclass(kind):
                found += items(kind, f"{prefix}{name}.")
            elif typing.get_origin(kind) is list and dataclasses.is_dataclass(typing.get_args(kind)[0]):
                found.append((f"{prefix}{name}", typing.get_args(kind)[0]))
    return found


def page() -> str:
    """The content of docs/settings.md."""
    parts = [HEAD]
    for field in dataclasses.fields(Config):
        section = typing.get_type_hints(Config)[field.name]
        parts.append(f"## {field.name}\n\n{_prose(section.__doc__)}\n\n{_table(keys(section, f'{field.name}.'))}")
        lists: dict[type, list[str]] = {}
        for key, item in items(section, f"{field.name}."):
            lists.setdefault(item, []).append(key)
        for item, names in lists.items():
            parts.append(f"### Items of {' and '.join(names)}\n\n{_prose(item.__doc__)}\n\n{_table(keys(item, ''))}")
    return "\n".join(parts)


def _table(rows: list[Key]) -> str:
    lines = ["| key | default | allowed | unit | off | resume | meaning |", "|---|---|---|---|---|---|---|"]
    for setting, unit, off in rows:
        default = "required" if setting.default == "required" else f"`{setting.default.removeprefix('default ')}`"
        cells = [f"`{setting.key}`", default, setting.allowed, unit, f"`{off}`" if off else "", setting.resume, setting.doc]
        lines.append(f"| {' | '.join([cells[0], cells[1], *map(_prose, cells[2:4]), cells[4], cells[5], _prose(cells[6])])} |")
    return "\n".join(lines) + "\n"


def _prose(text: str) -> str:
    """A docstring as Markdown that shows it as it is."""
    text = " ".join(text.split())
    return "".join(part if i % 2 else re.sub(r"([|<*])", r"\\\1", part) for i, part in enumerate(re.split(r"(`[^`]*`)", text)))


def json_schema() -> str:
    """The content of configs/schema.json."""
    root = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Settings of a run"}
    return json.dumps(root | schema.json_schema(Config), indent=1, ensure_ascii=False) + "\n"


def main(argv: list[str]) -> None:
    """Raises OSError."""
    command_line.make_parser(__doc__).parse_args(argv)
    for path, text in ((PAGE, page()), (SCHEMA, json_schema())):
        files.write_atomically(path, text)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
