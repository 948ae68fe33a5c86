"""The page about a run: complete, harmless whatever the run's texts are, and right in a real browser."""

from __future__ import annotations

import base64
import hashlib
import html
import html.parser
import json
import math
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import load
from pretrain.report import expected
from pretrain.report.records import read_records, to_json
from pretrain.run.page import page, write_page
from pretrain.run.parts import open_parts
from pretrain.run.view import View
from tests.browser import Browser
from tests.models import make_tokenizer, write_token_file
from tests.ranks import run_ranks
from tests.test_train import signal_itself_at, train_here
from tests.test_watch_run import LINES, line, write_run

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!-- \u2028 ' \" & ]]>"


class Parser(html.parser.HTMLParser):
    """What a browser would make of the page: scripts, attributes, and the text that is shown."""

    def __init__(self, text: str):
        super().__init__()
        self.scripts, self.attributes, self.tags, self.text, self._inside = [], [], [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def hostile_run(folder: Path) -> Path:
    """A run in which every text that comes from outside is hostile."""
    write_run(folder, steps=100, status="stopped", exit_status=2, reason=HOSTILE)
    spike = {"step": 95, "loss": 9.9, "median": 4.0, "sigmas": 20.0, "stays": False}
    records = [
        line(110, **{f"loss/{HOSTILE}": 3.0, HOSTILE: 1.0}),
        line(120, **{f"loss/{HOSTILE}": 3.5, HOSTILE: 2.0}),
        {"step": 120, "spike": spike, "samples": [[0, 0, 1]], "texts": [HOSTILE]},
        {"step": 120, "generated": [{"prompt": HOSTILE, "text": HOSTILE}]},
        {"step": 120, "stage": 1, "shares": {HOSTILE: 1.0}},
        {"step": 120, "alarm": HOSTILE, "text": HOSTILE},
    ]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("".join(to_json(record) + "\n" for record in records))
    (folder / "invoice.txt").write_text(HOSTILE)
    start = {"step": 0, "device": HOSTILE, "precision": HOSTILE, "world_size": HOSTILE, "git": {"commit": HOSTILE}}
    (folder / "environment.json").write_text(json.dumps({"total_steps": 400, "starts": [start, start | {"step": 100}]}))
    (folder / "config.yaml").write_text(f"run: {{name: {json.dumps(HOSTILE)}}}\n")
    return folder


def test_hostile_texts_are_shown_and_never_become_markup(tmp_path):
    name = "<img src=x onerror=owned>"  # of a folder, so without a slash
    text = page(View(hostile_run(tmp_path / name)).read_all(), HOSTILE)
    parsed = Parser(text)
    assert parsed.scripts[0].startswith('{"x":') and parsed.scripts[1].startswith('"use strict"') and len(parsed.scripts) == 2
    assert not {"img", "iframe", "object", "embed"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name in ("src", "action", "formaction")]
    assert [value for name, value in parsed.attributes if name == "href"] == ["data:,"]
    assert parsed.text.count(name) >= 2  # title and heading
    assert parsed.text.count("<script>document.title='owned'</script>") >= 8
    assert not set("<>&\u2028") & set(parsed.scripts[0]), "what could end the script, or begin a comment in it"
    assert HOSTILE in json.loads(parsed.scripts[0])["charts"][1]["series"][0]["name"]
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    digest = base64.b64encode(hashlib.sha256(parsed.scripts[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_a_run_of_a_million_steps_makes_a_small_page_with_every_extreme(tmp_path):
    """25,000 lines with five figures each; one line has a spike, which is in the page."""
    folder, generator = tmp_path / "long", np.random.default_rng(0)
    write_run(folder, steps=10)
    noise = generator.normal(size=(25_000, 4))
    with open(folder / "metrics.jsonl", "w") as file:
        for number, (a, b, c, d) in enumerate(noise.tolist()):
            loss = 99.5 if number == 13_579 else 3 + 0.1 * a
            file.write(
                f'{{"step": {40 * (number + 1)}, "loss": {loss}, "grad_norm": {abs(b)}, "lr": {c}, "x": {d}, "y": {a}}}\n'
            )
    write_page(View(folder).read_all(), tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 400_000
    data = json.loads(Parser((tmp_path / "page.html").read_text()).scripts[0])
    train = data["charts"][0]["series"][0]
    assert train["step"][int(np.argmax(train["value"]))] == 543_200 and max(train["value"]) == 99.5
    assert max(train["bold"]["value"]) < 4, "the bold line follows the trend, not the spike"
    assert (data["first"], data["last"]) == (40, 1_000_000)


def test_the_curve_has_every_reference_level_in_its_range(tmp_path):
    chart = json.loads(Parser(page(View(write_run(tmp_path / "x")).read_all())).scripts[0])["charts"][0]
    assert {each["name"].split()[0].strip(":"): each["value"] for each in chart["lines"]} == LINES
    assert chart["low"] < min(LINES.values()) and max(LINES.values()) < chart["high"]


def write_expected(folder: Path) -> Path:
    """Adds what a ladder expects to the validations of a run."""
    found = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in found:
        if "val_loss" in record:
            figures = (record["val_loss"] - 0.1, record["val_loss"] - 0.3, record["val_loss"] - 0.02)
            record |= dict(zip(expected.KEYS, figures, strict=True))
    (folder / "metrics.jsonl").write_text("".join(to_json(record) + "\n" for record in found))
    return folder


def test_the_band_in_which_a_ladder_expects_the_loss_is_beside_the_curve_and_is_explained(tmp_path):
    folder = write_expected(write_run(tmp_path / "run"))
    text = page(View(folder).read_all())
    chart, *others = json.loads(Parser(text).scripts[0])["charts"]
    (valid,) = (each for each in chart["series"] if each["name"] == "validation")
    band = chart["band"]
    assert band["step"] == valid["step"] == [50, 100, 150, 200]
    for key, distance in (("value", 0.1), ("low", 0.3), ("high", 0.02)):
        assert np.subtract(valid["value"], band[key]) == pytest.approx([distance] * 4, abs=1e-4), key
    assert not any("expected" in each["title"] for each in others)
    assert "At step 200 it is 4.4500, expected 4.3500 (4.1500 to 4.4300): above the band." in Parser(text).text
    without = page(View(write_run(tmp_path / "other")).read_all())
    assert json.loads(Parser(without).scripts[0])["charts"][0]["band"] is None and "Shaded" not in Parser(without).text


def test_a_run_without_records_or_with_nothing_but_nan_has_a_page(tmp_path):
    empty = write_run(tmp_path / "empty")
    (empty / "metrics.jsonl").unlink()
    broken = write_run(tmp_path / "broken", steps=10)
    (broken / "metrics.jsonl").write_text(to_json({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.0}) + "\n")
    for folder in (empty, broken, tmp_path / "none"):
        text = page(View(folder).read_all())
        assert json.loads(Parser(text).scripts[0])["charts"] is not None and "NaN" not in text


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def real_run(tmp_path_factory) -> Path:
    """A real run with two sources and a stage of hostile text, which is a spike; stopped by a signal, and resumed."""
    folder = tmp_path_factory.mktemp("real")
    tokenizer = make_tokenizer(folder / "tokenizer")
    for name, texts in (("fox", ["the quick brown fox jumps over the lazy dog " * 20]), ("bad", [HOSTILE, "zq#" * 400])):
        write_token_file(tokenizer, texts * 4, folder / name)
    write_token_file(tokenizer, ["def area(radius):\n    return 3.14159 * radius ** 2\n" * 20] * 4, folder / "code")
    sources = f"[{{path: {folder / 'fox'}}}, {{path: {folder / 'code'}}}]"
    (folder / "run.yaml").write_text(f"""
run: {{name: tiny, directory: {folder}}}
tokenizer: {{path: {tokenizer}}}
data: {{train: {sources}, valid: [{{path: {folder / "fox"}}}, {{path: {folder / "code"}}}], sequence_length: 16}}
model: {{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, qk_norm: true}}
batch: {{global_batch_size: 8, micro_batch_size: 8}}
engine: {{precision: fp32}}
optimizer: {{lr: 1e-2}}
train:
  max_steps: 100
  stages: [{{after_steps: 80, sources: [{{path: {folder / "bad"}}}]}}, {{after_steps: 81, sources: {sources}}}]
evaluate: {{every_steps: 20, max_batches: 2, sample_prompts: ["the quick"], sample_tokens: 8}}
checkpoint: {{every_steps: 40}}
log: {{every_steps: 2, sinks: [console, jsonl]}}
""")
    settings = ["--config", str(folder / "run.yaml"), "--run.directory", str(folder)]
    assert run_ranks(1, signal_itself_at, settings, 0, 40, signal.SIGTERM) == [75]
    assert run_ranks(1, train_here, settings) == [0]
    return folder / "tiny"


@pytest.mark.slow
def test_the_page_of_a_real_run_shows_what_it_logged(browser, real_run, tmp_path):
    """Written by the run itself. Every point is drawn where its value is, hovering reads it, and the spike's text is there."""
    browser.resize(1280, 900)
    browser.open(real_run / "report.html")
    assert browser.problems() == [] and browser.requests() == [(real_run / "report.html").as_uri()]
    logged = {record["step"]: record for record in read_records(real_run) if "lr" in record}
    validations = [record for record in read_records(real_run) if "val_loss" in record]
    plot = "document.querySelector('.plot')"
    drawn = browser.evaluate(f"{plot}.querySelector('path.raw').getAttribute('d')")
    points = [tuple(map(float, each)) for each in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", drawn)]
    assert len(points) == len(logged)
    assert browser.evaluate(f"{plot}.querySelectorAll('svg > g circle').length") == len(validations) == 5
    pixels = np.array(points)
    steps, losses = np.array([(step, record["loss"]) for step, record in logged.items()]).T
    assert np.corrcoef(pixels[:, 0], steps)[0, 1] > 0.99999 and np.corrcoef(pixels[:, 1], losses)[0, 1] < -0.99999
    box = browser.evaluate(f"(({{x, y, width}}) => ({{x, y, width}}))({plot}.getBoundingClientRect())")
    for step in (2, 40, 80, 100):
        place = points[list(logged).index(step)]
        browser.point(box["x"] + place[0], box["y"] + 150)
        tip = browser.evaluate(f"{plot}.querySelector('.tip').innerText")
        assert f"step {step}," in tip and f"train {logged[step]['loss']:.5g}" in tip, tip
    (spike, *_) = [record for record in read_records(real_run) if "spike" in record]
    shown = browser.evaluate("document.body.innerText")
    parts = open_parts(load(["--config", str(real_run / "config.yaml")], world_size=None))
    texts = [parts.tokenizer.decode(tokens) for tokens in parts.data.take(80 * 8, 4).tokens_BT.tolist()]  # of step 81
    assert (spike["spike"]["step"], spike["texts"]) == (81, texts) and any("zq#" in text for text in texts)
    for text in (*spike["texts"], "loss spike at step 81", "the quick", "stage 2 begins", "start 2 of the run"):
        assert re.sub(r"\s", "", text) in re.sub(r"\s", "", shown), text
    assert browser.evaluate("document.querySelectorAll('path.spike').length") >= 1
    titles = browser.evaluate("[...document.querySelectorAll('h3')].map((each) => each.textContent)")
    assert {"Loss", "Training loss by source", "Validation loss by source", "Learning rate", "Gradient norm", "Speed"} <= {
        *titles
    }
    labels = browser.evaluate(f"[...{plot}.querySelectorAll('text.label')].map((each) => each.textContent)")
    assert any(label.startswith("uniform") for label in labels) and any(label.startswith("bigram") for label in labels)


@pytest.mark.slow
def test_the_page_works_at_every_width_by_keyboard_in_the_dark_and_on_paper(browser, tmp_path):
    metrics = write_expected(hostile_run(tmp_path / "run")) / "metrics.jsonl"
    coincide = '"unigram": 8.318, "bigram": 8.318, "floor": 8.318'  # as for random data: one line with all the names
    metrics.write_text(metrics.read_text().replace('"unigram": 6.556, "bigram": 4.166', coincide))
    write_page(View(tmp_path / "run").read_all(), tmp_path / "page.html")
    browser.resize(1280, 900)
    browser.open(tmp_path / "page.html")
    for width, dark in ((320, False), (390, True), (800, False), (1900, True)):
        browser.resize(width, 800, dark)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
        colors = browser.evaluate("getComputedStyle(document.body).backgroundColor + getComputedStyle(document.body).color")
        back, front = (sum(map(int, each)) for each in re.findall(r"rgb\((\d+), (\d+), (\d+)\)", colors))
        assert (back < front) == dark
        edges = browser.evaluate(
            "[...document.querySelectorAll('text.label')].map((each) => [each.textContent, each.getBoundingClientRect(), "
            "each.ownerSVGElement.getBoundingClientRect()]).map(([text, own, all]) => "
            "[text, own.left - all.left, all.right - own.right])"
        )
        assert any("floor 8.318" in text for text, *_ in edges) and min(min(gaps) for _, *gaps in edges) >= 0, edges
        viewed = browser.evaluate("document.querySelector('.plot svg').getAttribute('viewBox').split(' ')[2] | 0")
        inside, around = (
            browser.evaluate(f"(({{left, top, right, bottom}}) => [left, top, right, bottom])({each}.getBoundingClientRect())")
            for each in ("document.querySelector('path.band')", "document.querySelector('path.band').ownerSVGElement")
        )
        assert inside[2] - inside[0] > 60 and inside[3] - inside[1] > 5, "the band is no area"
        assert around[0] <= inside[0] and around[1] <= inside[1] and inside[2] <= around[2] and inside[3] <= around[3]
        assert abs(viewed - browser.evaluate("document.querySelector('.plot').clientWidth")) <= 1, "drawn for another width"
    browser.evaluate("document.querySelector('.plot').focus()")
    for key, step in (("End", 120), ("ArrowLeft", 110), ("Home", 10), ("ArrowRight", 20)):
        browser.press(key)
        tip = browser.evaluate("document.querySelector('.plot .tip').innerText")
        assert f"step {step}," in tip and f"train {line(step)['loss']:.5g}" in tip, (key, tip)
        assert re.search(r"expected [\d.]+ to [\d.]+ at step (50|100)$", tip), tip
    for choice in ("input[value=tokens]", "input[value=hours]", "input[type=checkbox]"):
        browser.evaluate(f"document.querySelector('{choice}').click()")
        assert "NaN" not in browser.evaluate("document.querySelector('.charts').innerHTML")
    assert len(base64.b64decode(browser.send("Page.printToPDF")["data"])) > 10_000
    assert browser.problems() == []


@pytest.mark.slow
def test_hostile_texts_do_nothing_in_a_browser(browser, tmp_path):
    folder = hostile_run(tmp_path / "hostile")
    write_page(View(folder).read_all(), tmp_path / "page.html", HOSTILE)
    browser.resize(1000, 800)
    browser.open(tmp_path / "page.html")
    browser.evaluate("document.querySelectorAll('.plot')[1].focus()")
    browser.press("End")
    time.sleep(0.2)  # for what an image would do
    assert browser.evaluate("document.title") == "hostile" and browser.problems() == []
    assert browser.evaluate("document.querySelectorAll('img, body script').length") == 2  # the data and page.js
    assert browser.requests() == [(tmp_path / "page.html").as_uri()]
    assert HOSTILE[:30] in browser.evaluate("document.querySelectorAll('.plot')[1].querySelector('.tip').textContent")


@pytest.mark.slow
def test_an_injected_script_is_stopped_by_the_policy_of_the_page(browser, tmp_path):
    """Even if escaping failed somewhere: the policy allows page.js alone, and no connection."""
    text = page(View(write_run(tmp_path / "run")).read_all())
    evil = "<script>document.title='owned'</script><img src='http://127.0.0.1:9/x.png' onerror=\"document.title='owned'\">"
    (tmp_path / "page.html").write_text(text.replace("<footer>", f"{evil}<footer>"))
    browser.open(tmp_path / "page.html")
    browser.until("document.querySelectorAll('.plot svg').length > 0")
    time.sleep(0.2)
    assert browser.evaluate("document.title") == "run" and browser.problems()
