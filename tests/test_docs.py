"""Links, commands, flags and outputs in the documents are real, and both languages have the same content."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from pretrain.config import Config, SyntheticConfig
from pretrain.doctor.diagnosis import FAULTS
from pretrain.doctor.untrained import first_step
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LOSS = ROOT / "docs" / "understanding_the_loss.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
ENGINES = ROOT / "docs" / "engines.md"
BENCHMARKS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if ".add_argument(" in path.read_text())
TRANSLATED = [
    (ROOT / "README.md", ROOT / "README.zh-CN.md"),
    *((ROOT / "docs" / path.name, path) for path in sorted((ROOT / "docs" / "zh-CN").glob("*.md"))),
]
FOLDERS = "launch|tools|configs|docker|docs|tests|benchmarks|pretrain"
HELP_OF_ITS_COMMANDS = {"tools/diagnose_loss.py": ("log", "initial", "chain")}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fences(document: Path, *languages: str) -> list[str]:
    """The fenced blocks in these languages, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def prose(document: Path) -> str:
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def spans(document: Path) -> list[str]:
    """The texts between backticks."""
    return re.findall(r"`([^`\n]+)`", prose(document))


def commands(document: Path) -> list[str]:
    """The lines of the shell blocks; continued lines joined, comments dropped."""
    text = "\n".join(fences(document, "bash")).replace("\\\n", " ")
    return [line for line in (re.sub(r"\s+#.*", "", line).strip() for line in text.splitlines()) if line]


# ---------------------------------------------------------------- names


def anchors(document: Path) -> set[str]:
    """The headings, as links spell them."""
    titles = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        there = document.parent / path if path else document
        assert there.exists(), f"{target}: no such file"
        assert not heading or heading in anchors(there), f"{target}: no such heading; there are {sorted(anchors(there))}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_make_target_and_every_file_of_the_project_exists(document):
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
    named = "\n".join([*spans(document), *commands(document)])
    for target in re.findall(r"^make (?:PYTHON=\S+ )?([a-z][a-z-]*)", named, re.MULTILINE):
        assert target in targets, f"make {target}"
    for path in re.findall(rf"(?<![\w./-])((?:{FOLDERS})/[\w./-]+\.(?:py|yaml|sh|md|png))\b", named):
        assert (ROOT / path).exists(), path


def show_help(script: str, command: list[str]) -> str:
    """What a script prints; in a process of its own, which has imported torch."""
    sys.argv = [script, *command, "--help"]
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")) as shown, pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not ended.value.code, sys.argv
    shown.flush()
    return shown.buffer.getvalue().decode()


@cache
def helps(script: str) -> str:
    """The --help of a script and of its subcommands."""
    commands = [], *([each] for each in HELP_OF_ITS_COMMANDS.get(script, ()))
    return "".join(run_ranks(1, show_help, script, command)[0] for command in commands)


def is_setting(key: str) -> bool:
    """True if a dotted key is in `Config`, even in a section that is None by default."""
    sections = [Config]
    for part in key.split("."):
        kinds = [get_type_hints(section).get(part) for section in sections if dataclasses.is_dataclass(section)]
        sections = [each for kind in kinds if kind for each in (get_args(kind) or (kind,))]
    return key == "config" or bool(sections)


def test_every_flag_in_a_command_exists_in_its_script_or_in_the_settings():
    seen = set()
    for document in DOCUMENTS:
        whole = [span for span in spans(document) if re.match(r"(python )?(launch|tools|benchmarks)/\w+\.py ", span)]
        for line in [*commands(document), *whole]:
            words = line.split()
            script = next((word for word in words if re.fullmatch(r"(launch|tools|benchmarks)/\w+\.py", word)), None)
            for word in words[words.index(script) + 1 :] if script else ():
                if word.startswith("--") and word != "--":
                    known = re.search(rf"{re.escape(word)}(?![\w-])", helps(script)) or is_setting(word.removeprefix("--"))
                    assert known, f"{name(document)}: {script} has no {word}"
                    seen.add(script)
    assert {"launch/pretrain.py", "launch/supervise.py", "tools/diagnose_loss.py", "tools/inspect_data.py"} <= seen


@pytest.mark.parametrize("script", BENCHMARKS, ids=name)
def test_every_benchmark_is_on_the_page_about_performance(script):
    assert name(script) in PERFORMANCE.read_text()


# ---------------------------------------------------------------- outputs


def test_the_loss_doctor_answers_the_story_of_213_as_the_documents_say(tmp_path):
    (tmp_path / "train.log").write_text(fences(LOSS, "text")[0])
    command = next(line for line in commands(LOSS) if " log train.log " in line)
    _, script, *arguments = shlex.split(command)
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / script, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "213.8 / 25 = 8.55" in done.stdout
    assert done.stdout in fences(LOSS, "console"), f"{command} says now:\n{done.stdout}"


def test_the_first_losses_in_the_documents_are_what_a_run_prints():
    lines = [line for path in DOCUMENTS for each in fences(path, "console") for line in each.splitlines()]
    shown = [line for line in lines if line.startswith("first loss")]
    assert len(shown) >= 4
    for line in shown:
        loss, ids = re.match(r"first loss ([\d.]+); .* ln\((\d+)\)", line).groups()
        assert line == first_step(float(loss), int(ids))


@pytest.mark.parametrize("document", [LOSS, ROOT / "docs" / "zh-CN" / LOSS.name], ids=name)
def test_the_findings_of_the_loss_doctor_and_the_generated_data_are_all_explained(document):
    rows = set(re.findall(r"^\| `([\w-]+)` \|", document.read_text(), re.MULTILINE))
    assert set(FAULTS) <= rows
    assert set(get_args(get_type_hints(SyntheticConfig)["kind"])) <= rows


# ---------------------------------------------------------------- translations


@pytest.mark.parametrize(("english", "chinese"), TRANSLATED, ids=lambda path: name(path))
def test_the_chinese_page_shows_the_commands_and_outputs_of_the_english_one(english, chinese):
    assert commands(chinese) == commands(english)
    assert fences(chinese, "console", "json") == fences(english, "console", "json")
    to_chinese, to_english = (os.path.relpath(b, a.parent) for a, b in ((english, chinese), (chinese, english)))
    assert f"({to_chinese})" in english.read_text()[:200] and f"({to_english})" in chinese.read_text()[:200]


@pytest.mark.parametrize(("english", "chinese"), TRANSLATED, ids=lambda path: name(path))
def test_the_chinese_page_has_the_sections_and_tables_of_the_english_one(english, chinese):
    def outline(document: Path) -> list[str]:
        return [match[0] for line in prose(document).splitlines() if (match := re.match(r"#+ |\|( (`[^`]*`|\d+) \|)?", line))]

    assert outline(chinese) == outline(english)


@pytest.mark.parametrize(("english", "chinese"), TRANSLATED, ids=lambda path: name(path))
def test_the_tables_of_the_chinese_page_have_the_figures_of_the_english_one(english, chinese):
    def figures(document: Path) -> list[list[str]]:
        return [sorted(re.findall(r"\d(?:[\d,.]*\d)?", row)) for row in prose(document).splitlines() if row.startswith("|")]

    for there, here in zip(figures(english), figures(chinese), strict=True):
        assert here == there


@pytest.mark.parametrize(("english", "chinese"), TRANSLATED, ids=lambda path: name(path))
def test_the_chinese_page_names_the_settings_files_and_texts_that_the_english_one_names(english, chinese):
    assert Counter(spans(chinese)) == Counter(spans(english))


def test_both_readmes_list_the_same_files_and_the_same_lines_of_python():
    english, chinese = TRANSLATED[0]

    def tree(document: Path) -> list[str]:
        (text,) = fences(document, "text")
        return [re.match(r" *\S+", line)[0] for line in text.splitlines()]

    assert tree(chinese) == tree(english)
    code, translated = (re.sub(r"  #.*", "", "".join(fences(each, "python"))) for each in (english, chinese))
    assert translated == code


# ---------------------------------------------------------------- arithmetic


def test_the_table_of_kinds_is_what_the_arithmetic_says(tmp_path):
    """The script lists plans with the fastest first; the table has the first one without and the first one with kinds."""
    command = [sys.executable, "benchmarks/which_kinds.py", "--output", tmp_path / "plans.json"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=120)
    rows: dict[tuple, str] = {}
    for plan in json.loads((tmp_path / "plans.json").read_text())["plans"]:
        if plan["needed_gib"] > 80:
            continue
        kinds = [f"{name} {size}" for name, size in plan["engine"]["parallel"].items() if size > 1]
        hidden, awaited = (size / 1e9 for size in plan["sent"])
        cells = [plan["job"], plan["gpus"], ", ".join([plan["engine"]["name"], *kinds])]
        cells += [plan["engine"]["activation_checkpointing"], f"{plan['micro_batch']} x {plan['accumulation']}"]
        cells += [f"{plan['needed_gib']:.1f}", f"{hidden:,.1f} + {awaited:,.1f}"]
        cells += [f"{plan['total']:,.2f}", f"{plan['tokens_per_second']:,.0f}"]
        rows.setdefault((plan["job"], plan["gpus"], bool(kinds)), f"| {' | '.join(map(str, cells))} |")
    shown = ENGINES.read_text().split("<!-- which kinds -->\n")[1].split("<!-- end -->")[0].splitlines()[2:]
    assert shown == list(rows.values())
