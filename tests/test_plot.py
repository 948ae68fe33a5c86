"""The picture shows the values of metrics.jsonl, and a run that cannot be drawn is refused."""

from __future__ import annotations

import itertools
import json
import math
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes

from pretrain.report.plot import Curves, draw, draw_panels, plot_runs, read_curves, smooth
from pretrain.report.records import RecordsError

ROOT = Path(__file__).resolve().parents[1]


def write_run(directory: Path, losses: list[float | None], tokens_per_step: int = 1000, torn: bytes = b"") -> Path:
    """A run with a logging step every 10 steps and a validation at its end."""
    directory.mkdir(parents=True)
    records: list[dict] = [{"step": 0, "reference_lines": {"uniform": math.log(4096), "unigram": 6.25}}]
    for index, loss in enumerate(losses, start=1):
        records.append({"step": 10 * index, "loss": loss, "tokens": 10 * index * tokens_per_step, "train_hours": index / 4})
    records.append({"step": 10 * len(losses), "val_loss": 2.5})
    (directory / "metrics.jsonl").write_bytes("".join(json.dumps(record) + "\n" for record in records).encode() + torn)
    return directory


def drawn(*runs: Path) -> Axes:
    """The axes of the picture of some runs."""
    return draw([read_curves(run) for run in runs], "tokens").axes[0]


def test_curves_hold_the_values_of_the_file_and_ignore_a_torn_last_line(tmp_path):
    run = read_curves(write_run(tmp_path / "r", [8.0, None, 6.0], torn=b'{"step": 40, "lo'))
    assert run.step.tolist() == [10, 20, 30] and run.tokens.tolist() == [10_000, 20_000, 30_000]
    assert run.loss[0] == 8.0 and math.isnan(run.loss[1]) and run.loss[2] == 6.0
    assert run.hours.tolist() == [0.25, 0.5, 0.75]
    assert run.val_x("tokens").tolist() == [30_000] and run.val_loss.tolist() == [2.5]
    assert run.reference_lines == {"uniform": math.log(4096), "unigram": 6.25}


def test_a_validation_between_two_logging_steps_is_drawn_between_them(tmp_path):
    directory = write_run(tmp_path / "r", [8.0, 7.0])
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "val_loss": 9.0}\n{"step": 15, "val_loss": 7.5}\n')
    assert read_curves(directory).val_x("tokens").tolist() == [20_000, 5_000, 15_000]


def test_smoothing_neither_lags_nor_follows_one_spike():
    falling = np.linspace(9.0, 2.0, 200)
    assert smooth(falling, 5)[10:-10] == pytest.approx(falling[10:-10])
    assert smooth(falling, 5)[0] == 9.0
    spiked = np.full(100, 3.0)
    spiked[50], spiked[70] = 1000.0, math.nan
    assert smooth(spiked, 3).tolist() == [3.0] * 100


def test_a_long_curve_is_smoothed_fast_and_well_and_ends_where_it_diverges(monkeypatch):
    steps = np.arange(100_000)
    curve = 3 + 5 / (1 + steps / 500) + np.random.default_rng(0).normal(0, 0.05, len(steps))
    curve[90_000:] = math.nan
    calls = []
    monkeypatch.setattr(np, "median", lambda window, median=np.median: (calls.append(1), median(window))[1])
    smoothed = smooth(curve, len(curve) // 120)
    assert len(calls) < 5000  # one window per point would be 100,000, and 15 s
    assert np.abs(smoothed - 3 - 5 / (1 + steps / 500))[5_000:89_000].max() < 0.03
    assert np.isnan(smoothed[92_000:]).all()  # a run that diverged has no loss to draw


def test_the_picture_shows_curve_points_and_reference_lines(tmp_path):
    losses = [8.0 - 5 * index / 100 for index in range(100)]
    axes = drawn(write_run(tmp_path / "r", losses))
    raw = axes.lines[0]
    assert raw.get_ydata().tolist() == losses and raw.get_xdata()[-1] == 1_000_000
    flat = {float(line.get_ydata()[0]) for line in axes.lines if len(set(line.get_ydata())) == 1 and len(line.get_xdata()) == 2}
    assert {math.log(4096), 6.25} <= flat
    assert [2.5] in [list(line.get_ydata()) for line in axes.lines]
    labels = " ".join(text.get_text() for text in axes.texts)
    assert "uniform: ln V 8.318" in labels and "unigram entropy 6.250" in labels and "2.500" in labels


def test_the_picture_file_is_written_atomically_into_a_new_folder(tmp_path):
    output = tmp_path / "new" / "loss.png"
    plot_runs([write_run(tmp_path / "r", [8.0, 7.0])], output)
    assert matplotlib.image.imread(output).shape[:2] == (930, 1650)
    assert [path.name for path in output.parent.iterdir()] == ["loss.png"]  # no temporary file is left


def test_a_loss_that_was_not_finite_is_marked_and_the_curve_continues(tmp_path):
    axes = drawn(write_run(tmp_path / "r", [8.0, 7.0, None, 5.0]))
    assert "not finite" in [text.get_text() for text in axes.texts]
    marks = [line for line in axes.lines if list(line.get_xdata()) == [30_000, 30_000]]
    assert len(marks) == 1


def test_a_run_without_any_finite_loss_is_drawn_and_labelled_so(tmp_path):
    axes = drawn(write_run(tmp_path / "r", [None, None]))
    assert any("never finite" in text.get_text() for text in axes.texts)


@pytest.mark.parametrize(("second_tokens", "has_steps"), [(1000, True), (2000, False)])
def test_an_axis_of_steps_is_drawn_only_if_it_holds_for_all_runs(tmp_path, second_tokens, has_steps):
    runs = [write_run(tmp_path / "a", [8.0, 7.0]), write_run(tmp_path / "b", [8.0, 7.0], tokens_per_step=second_tokens)]
    axes = drawn(*runs)
    assert bool(axes.child_axes) == has_steps
    labels = " ".join(text.get_text() for text in axes.texts)
    assert "a 7.000" in labels and "b 7.000" in labels and labels.count("unigram") == 1


def test_noise_does_not_look_like_a_trend_and_equal_reference_lines_share_a_label(tmp_path):
    directory = write_run(tmp_path / "r", [9.211, 9.2115])
    start = {"step": 0, "reference_lines": {"uniform": 9.21034, "unigram": 9.210341}}
    lines = (directory / "metrics.jsonl").read_text().splitlines()[1:-1]
    (directory / "metrics.jsonl").write_text("\n".join([json.dumps(start), *lines]) + "\n")
    axes = drawn(directory)
    low, high = axes.get_ylim()
    assert high - low >= 0.5 and low < 9.21 < high
    assert sum("uniform = unigram 9.210" in text.get_text() for text in axes.texts) == 1


def test_labels_never_overlap(tmp_path):
    runs = [write_run(tmp_path / f"run{index}", [3.0, 2.0 + index / 1000]) for index in range(6)]
    axes = drawn(*runs)
    heights = sorted(text.xyann[1] for text in axes.texts)
    assert all(high - low > 0.04 for low, high in itertools.pairwise(heights)) and heights[-1] <= 1.01


@pytest.mark.parametrize("content", [None, "", '{"step": 0}\n', '{"st\n{"step": 1, "loss": 2.0}\n{"step": 2,'])
def test_a_run_without_logging_steps_or_with_damaged_records_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(RecordsError, match=str(tmp_path)):
        read_curves(tmp_path)


def test_an_axis_that_the_records_lack_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "tokens": 5}\n')
    with pytest.raises(RecordsError, match="train_hours"):
        plot_runs([tmp_path], tmp_path / "x.png", "hours")
    plot_runs([tmp_path], tmp_path / "x.png", "tokens")


def test_curves_of_any_origin_are_drawn_in_panels_over_the_same_steps():
    step, loss = np.array([5000.0, 6000.0]), np.array([8.0, 7.0])
    curves = [
        Curves(name, step, step * math.nan, step * math.nan, loss * factor) for name, factor in (("shown", 1), ("true", 2))
    ]
    panels = draw_panels([replace(each, reference_lines={"ln 4096": 8.318}) for each in curves], "iteration").axes
    assert [list(axes.lines[0].get_ydata()) for axes in panels] == [[8.0, 7.0], [16.0, 14.0]]
    assert [axes.get_title(loc="left") for axes in panels] == ["shown", "true"] and panels[1].get_xlabel() == "iteration"
    assert all(axes.get_xlim() == (4990, 6010) for axes in panels)
    assert all("ln 4096 8.318" in [text.get_text() for text in axes.texts] for axes in panels)


def test_the_tool_draws_and_refuses_with_status_2(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "a run with spaces", [8.0, 7.0])
    monkeypatch.setattr(sys, "path", ["", *sys.path[1:]])  # the script replaces its first entry
    tool = runpy.run_path(str(ROOT / "tools/plot_runs.py"))["main"]
    for x in ("tokens", "hours"):
        assert not tool([str(run), "--x", x])
        assert capsys.readouterr().out.strip() == str(run / "plots" / "loss.png")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/plot_runs.py"), "nowhere"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("plot_runs: nowhere: ") and len(done.stderr.splitlines()) == 1


def test_importing_the_module_loads_no_matplotlib():
    code = "import sys, pretrain.report.plot, pretrain.report.sinks; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def write_sources(directory: Path) -> Path:
    """60 logging lines of a run that reads `web` always, and `code` up to step 200 and from step 500 on."""
    lines = [{"step": 0, "reference_lines": {"uniform": 8.3}}]
    for step in range(10, 610, 10):
        losses = {"loss/web": 5 - step / 300} | ({"loss/code": 3 - step / 400} if not 200 < step < 500 else {})
        lines.append({"step": step, "loss": 4 - step / 300, **losses, "tokens": 100 * step, "train_hours": step / 100})
        if step in (200, 490):
            lines.append({"step": step, "stage": 1 + (step == 490), "sequence_length": 64})
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_the_losses_of_sources_have_a_panel_of_their_own_with_a_gap_where_they_are_not_read(tmp_path):
    run = read_curves(write_sources(tmp_path / "r"))
    assert run.stages == [200, 490] and list(run.sources) == ["web", "code"]
    assert run.sources["web"].tolist() == pytest.approx([5 - step / 300 for step in range(10, 610, 10)])
    assert np.flatnonzero(np.isnan(run.sources["code"])).tolist() == list(range(20, 49))
    figure = draw([run], "tokens")
    main, below = figure.axes[:2]
    drawn = {line.get_color(): line.get_xydata() for line in below.lines if len(line.get_xydata()) > 2}
    web, code = (np.array(each) for each in drawn.values())
    assert len(web) == 60 and len(code) == 31 + 1
    assert np.flatnonzero(np.isnan(code[:, 1])).tolist() == [20] and code[19, 0] == 20_000 and code[21, 0] == 50_000
    marks = [[line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1] for axes in (main, below)]
    assert marks == [[20_000, 49_000]] * 2
    texts = [text.get_text() for text in below.texts]
    assert [text.split()[0] for text in texts] == ["code", "web"] and float(texts[1].split()[1]) == pytest.approx(3, abs=0.1)
    assert "each source" in below.get_title("left")


def test_only_a_single_run_with_several_sources_has_the_panel(tmp_path):
    run = read_curves(write_sources(tmp_path / "r"))
    other = read_curves(write_run(tmp_path / "other", [8.0, 7.0]))
    assert not any("source" in axes.get_title("left") for axes in draw([run, other], "tokens").axes)
    assert len(draw([replace(run, sources={"web": run.sources["web"]})], "step").axes) == 1
    many = {f"s{i}": run.sources["web"] for i in range(20)}
    assert "8 of 20 sources" in draw([replace(run, sources=many)], "step").axes[1].get_title("left")
