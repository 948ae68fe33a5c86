"""docs/settings.md and configs/schema.json say what the code says, and editors can use the schema."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue

import jsonschema
import pytest
import yaml

from pretrain import schema
from pretrain.config import Config
from tools import write_settings

ROOT = Path(__file__).parents[1]
SETTINGS = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/models/*.yaml")])
LANGUAGE_SERVER = "yaml-language-server@1.25.0"


class Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does, and editors; PyYAML reads 1.1, where 3e-4 is a text."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?([eE][-+]?\d+)?$"), list("-+0123456789")
)


@pytest.mark.parametrize(
    ("path", "made"), [("docs/settings.md", write_settings.page), ("configs/schema.json", write_settings.json_schema)]
)
def test_the_page_and_the_schema_are_those_of_the_code(path, made):
    assert (ROOT / path).read_text() == made(), f"{path} is out of date: make settings"


def test_the_page_has_each_key_with_its_default_its_bounds_its_resume_class_and_its_meaning():
    page = (ROOT / "docs" / "settings.md").read_text()
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", page, re.MULTILINE))
    for each in schema.walk(Config):
        cells = [cell.strip() for cell in rows[each.key].split(" | ")]
        assert len(cells) == 6 and cells[0].strip("`") == each.default.removeprefix("default "), each.key
        assert (cells[1], cells[4]) == (each.allowed, each.resume), each.key
        assert cells[5].replace("\\", "") == each.doc, each.key
    units = {
        key: rows[key].split(" | ")[2] for key in ("checkpoint.deadline_seconds", "data.cache_gib", "data.sequence_length")
    }
    assert units == {"checkpoint.deadline_seconds": "s", "data.cache_gib": "GiB", "data.sequence_length": "tokens"}
    off = {key: rows[key].split(" | ")[3] for key in ("optimizer.grad_clip", "schedule.name", "log.profile_steps")}
    assert off == {"optimizer.grad_clip": "`0`", "schedule.name": "", "log.profile_steps": "`null`"}
    assert {"max_epochs", "after_tokens"} <= rows.keys()  # of items of lists


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    root = json.loads((ROOT / "configs" / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(root)
    return jsonschema.Draft202012Validator(root)


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_every_file_of_settings_names_the_schema_and_matches_it(path, validator):
    text = path.read_text()
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert named and (path.parent / named[1]).resolve() == ROOT / "configs" / "schema.json"
    assert [error.message for error in validator.iter_errors(yaml.load(text, Loader))] == []


def test_what_a_run_refuses_the_schema_refuses_too(validator):
    wrong = {
        "run": {"nmae": "x"},
        "optimizer": {"lr": 0, "name": "sgd"},
        "data": {"document_mask": 1, "train": [{"dtype": "int8"}]},
    }
    found = {".".join(map(str, error.absolute_path)) for error in validator.iter_errors(wrong)}
    assert found == {"run", "optimizer.lr", "optimizer.name", "data.document_mask", "data.train.0", "data.train.0.dtype"}


# ---------------------------------------------------------------- in an editor


class LanguageServer:
    """A client of a language server on a pipe, as an editor is one (Language Server Protocol 3.17)."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.answers: Queue[dict] = Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.count = 0

    def _read(self) -> None:
        while line := self.process.stdout.readline():
            if match := re.match(rb"Content-Length: (\d+)", line):
                while self.process.stdout.readline().strip():
                    pass
                self.answers.put(json.loads(self.process.stdout.read(int(match[1]))))

    def send(self, method: str, params: dict | None, **more) -> None:
        body = json.dumps({"jsonrpc": "2.0", "method": method, "params": params, **more}).encode()
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.process.stdin.flush()

    def ask(self, method: str, params: dict | None) -> dict:
        self.count += 1
        self.send(method, params, id=self.count)
        return self.wait(lambda answer: answer.get("id") == self.count and "method" not in answer)["result"]

    def wait(self, wanted) -> dict:
        while not wanted(answer := self.answers.get(timeout=60)):
            if "id" in answer and "method" in answer:  # the server asks for the editor's settings: there are none
                items = answer["params"].get("items", []) if answer.get("params") else []
                body = json.dumps({"jsonrpc": "2.0", "id": answer["id"], "result": [{} for _ in items]}).encode()
                self.process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
                self.process.stdin.flush()
        return answer

    def open(self, path: Path, text: str) -> list[dict]:
        """Opens `path` with this text. -> what is underlined."""
        document = {"uri": path.as_uri(), "languageId": "yaml", "version": 1, "text": text}
        self.send("textDocument/didOpen", {"textDocument": document})

        def is_of_it(answer: dict) -> bool:
            return answer.get("method") == "textDocument/publishDiagnostics" and answer["params"]["uri"] == path.as_uri()

        return self.wait(is_of_it)["params"]["diagnostics"]


@contextlib.contextmanager
def language_server(folder: Path) -> Iterator[LanguageServer]:
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), LANGUAGE_SERVER]
    subprocess.run(command, check=True, capture_output=True, timeout=170)
    server = LanguageServer([str(folder / "node_modules" / ".bin" / "yaml-language-server"), "--stdio"])
    try:
        capabilities = {"textDocument": {"completion": {"completionItem": {"documentationFormat": ["markdown"]}}}}
        server.ask("initialize", {"processId": None, "rootUri": ROOT.as_uri(), "capabilities": capabilities})
        server.send("initialized", {})
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.mark.release
def test_an_editor_underlines_what_is_wrong_and_completes_keys_values_and_their_meaning(tmp_path):
    with language_server(tmp_path) as server:
        for path in SETTINGS:
            assert server.open(path, path.read_text()) == [], path
        head = "# yaml-language-server: $schema=schema.json\n"
        wrong = server.open(ROOT / "configs" / "wrong.yaml", f"{head}run: {{nmae: x}}\noptimizer:\n  lr: -1\n  name: sgd\n")
        assert sorted(each["range"]["start"]["line"] for each in wrong) == [1, 3, 4]
        assert "nmae" in wrong[0]["message"]
        path = ROOT / "configs" / "typed.yaml"
        server.open(path, f"{head}optimizer:\n  \n  name: \n")
        document = {"textDocument": {"uri": path.as_uri()}}
        keys = server.ask("textDocument/completion", document | {"position": {"line": 2, "character": 2}})["items"]
        found = {each["label"]: each for each in keys}
        assert {"lr", "weight_decay", "grad_clip"} <= found.keys() and "Peak learning rate" in str(found["lr"]["documentation"])
        values = server.ask("textDocument/completion", document | {"position": {"line": 3, "character": 8}})["items"]
        assert {"adamw", "muon"} <= {each["label"] for each in values}
        hover = server.ask("textDocument/hover", document | {"position": {"line": 3, "character": 4}})
        assert "muon for the matrices" in str(hover["contents"])
