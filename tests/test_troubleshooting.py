"""The texts of docs/troubleshooting.md: ours are in the code, and those that can be produced here are what a run says."""

from __future__ import annotations

import ast
import json
import re
import shutil
import socket
from functools import cache
from pathlib import Path

import pytest

from tests.models import train_here
from tests.test_docs import ROOT, prose
from tests.test_train import DIVERGING

PAGE = ROOT / "docs" / "troubleshooting.md"


def rows() -> dict[str, str]:
    """Text -> the rest of its row."""
    return dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", prose(PAGE), re.MULTILINE))


def pattern(text: str) -> re.Pattern[str]:
    """What a text of the page matches; `...` is anything."""
    return re.compile(".*".join(map(re.escape, re.split(r"\.\.\.(?!\.)", text))), re.DOTALL)


@cache
def texts_of_the_code() -> list[str]:
    """Every text in the package and the scripts, with `...` for what is filled in."""
    found = []
    for path in [*ROOT.glob("pretrain/**/*.py"), *ROOT.glob("launch/*.py"), *ROOT.glob("tools/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def is_foreign(row: str) -> bool:
    return "[thread](https://github.com/" in row


@pytest.mark.parametrize("text", [text for text, row in rows().items() if not is_foreign(row)])
def test_a_text_of_this_project_is_in_its_code(text):
    """In one text, or, where the code puts it together, in several; short words between placeholders prove nothing."""
    if any(pattern(text).search(each) for each in texts_of_the_code()):
        return
    parts = [part for part in re.split(r"\.\.\.(?!\.)|; ", text) if len(part) > 12]
    assert parts and all(any(part in each for each in texts_of_the_code()) for part in parts), text


def test_every_text_of_another_program_has_a_thread_and_is_not_ours():
    foreign = {text for text, row in rows().items() if is_foreign(row)}
    assert len(foreign) > 20 and len(rows()) - len(foreign) > 35
    for text in foreign:
        assert not any(len(each) < 2000 and pattern(text).search(each) for each in texts_of_the_code()), text


# ---------------------------------------------------------------- produced


def said(text: str, capsys) -> bool:
    """Whether the page's text was printed."""
    assert text in rows(), text
    captured = capsys.readouterr()
    return bool(pattern(text).search(captured.err + captured.out))


REFUSED = {
    "unknown key; did you mean ...": ["--optimizer.lrr", "1"],
    "set exactly one of ...; now set: ...": ["--train.max_tokens", "64"],
    "requires ... processes, but ... run; start ...": ["--engine.world_size", "4"],
    "is empty; give [{path: PREFIX}] written by tools/tokenize_corpus.py, or set data.synthetic.kind": [
        "--data.synthetic",
        "null",
    ],
}


@pytest.mark.parametrize("text", REFUSED)
def test_settings_are_refused_in_these_words(tiny, capsys, text):
    from pretrain.config import ConfigError, load

    assert text in rows()
    with pytest.raises(ConfigError) as refused:
        load([*tiny, *REFUSED[text]])
    assert pattern(text).search(str(refused.value))


def test_a_run_that_meets_its_past_says_these_words(tiny, capsys):
    run = Path(tiny[-1]) / "tiny"
    assert train_here([*tiny, "--log.sinks", "[console, jsonl]"]) == 0
    capsys.readouterr()
    for flags, text in (
        (["--run.seed", "7"], "makes another run; use another run.name, or the old value"),
        (
            ["--optimizer.lr", "0.5"],
            "changes the training dynamics; confirm with --checkpoint.allow_changes [...], or use the old value",
        ),
    ):
        assert train_here([*tiny, *flags]) == 2 and said(text, capsys)
    (run / "STOP").touch()
    assert train_here(tiny) == 130 and said("exists, so nothing is trained; remove it to continue", capsys)
    (run / "STOP").unlink()
    for path in (run / "checkpoints").iterdir():
        shutil.rmtree(path)
    text = "auto finds nothing in ..., but run_state.json says that step ... was saved there"
    assert train_here(tiny) == 2 and said(text, capsys)
    assert json.loads((run / "run_state.json").read_text())["exit_status"] == 2


def test_a_run_that_diverges_says_these_words(tiny, capsys):
    assert train_here([*tiny, *DIVERGING, "--log.sinks", "[console]"]) == 70
    captured = capsys.readouterr()
    for text in ("LOSS IS NOT FINITE", "the loss or gradient was not finite in the last ... steps up to step ..."):
        assert text in rows() and pattern(text).search(captured.err + captured.out), text


def test_a_webhook_that_is_away_is_reported_in_these_words(tiny, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("PRETRAIN_ALARM_WEBHOOK", f"http://127.0.0.1:{port}/")
    assert train_here([*tiny, "--log.sinks", "[console]", "--log.alarms.kinds", "[done]"]) == 0
    assert said("did not accept one (...)", capsys)
