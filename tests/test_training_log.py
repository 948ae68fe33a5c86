"""Logs of many programs are read completely and rightly, whatever is around their figures, at any length."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pretrain.doctor import log_table
from pretrain.doctor.log_sources import LogError
from pretrain.doctor.training_log import TrainingLog, read_log

ROOT = Path(__file__).resolve().parents[1]
CODE = '''"""Trains a model; the loss is printed with loss: 1.5 nats."""
import torch
from torch import nn

@torch.compile
def orthogonalise(G, steps=5, loss=0.5):
    val_loss = 0.0
    return G / (G.norm() + 1e-7)

class Hyper:
    val_loss_every : int = 125 # every how many steps to evaluate val loss? 0 for only at the end
train_loss = 0.0
print(f"step:{step}/{3000} val_loss:{val_loss:.4f} train_time:{1:.0f}ms")
====================
Running Python 3.11
'''


def read(tmp_path: Path, text: str, **options) -> TrainingLog:
    (tmp_path / "log").write_text(text)
    return read_log(tmp_path / "log", **options)


# ---------------------------------------------------------------- what stands around the figures

LINES = {  # lines with losses 9.1, 8.8 and so on: (steps, losses)
    "leading number": ("420 | loss 9.1\n430 | loss 8.8\n", [420, 430], [9.1, 8.8]),
    "leading number in brackets": (
        "I0101 12:00:00.0 140 logging_writer.py:48] [100] learning_rate=0.01, loss=9.1\n"
        "I0101 12:00:09.0 140 logging_writer.py:48] [200] learning_rate=0.01, loss=8.8\n",
        [100, 200],
        [9.1, 8.8],
    ),
    "Marian": (
        "[2026-05-08 10:55:04] Ep. 1 : Up. 100 : Sen. 1,000 : Cost 9.1 * 12,345 @ 1,000 after 12,345 : Time 20.35s : 3821.61 "
        "words/s : gNorm 2.3 : L.r. 3.0000e-05\n[2026-05-08 10:56:04] [valid] Ep. 1 : Up. 100 : ce-mean-words : 9 : new best\n"
        "[2026-05-08 10:57:04] Ep. 1 : Up. 200 : Sen. 2,000 : Cost 8.8 : Time 20.35s : 3821.61 words/s\n",
        [100, 200],
        [9.1, 8.8],
    ),
    "OpenNMT": (
        "[2026 INFO] Step 50/ 1000; acc:   3.92; ppl: 8955.29; xent: 9.1; lr: 1.0; 1234/1234 tok/s; 23 sec\n",
        [50],
        [9.1],
    ),
    "llm.c": ("step    1/20000 | loss 9.1 (+nanz)| norm 15.3 (+nanz)| lr 4.29e-06 | 2998.9 ms | 61.8% MFU\n", [1], [9.1]),
    "number before its name": ("step 10: 9.1 loss, 3e-4 lr\nstep 20: 8.8 loss, 3e-4 lr\n", [10, 20], [9.1, 8.8]),
    "all numbers before names": ("10 steps 9.1 loss 3e-4 lr\n20 steps 8.8 loss 3e-4 lr\n", [10, 20], [9.1, 8.8]),
    "two bare columns": ("10 9.1\n20 8.8\n30 8.\n", [10, 20, 30], [9.1, 8.8, 8.0]),
    "bare columns with commas": ("10, 9.1\n20, 8.8\n", [10, 20], [9.1, 8.8]),
    "MLflow": ("1700000000000 9.1 10\n1700000001000 8.8 20\n", [10, 20], [9.1, 8.8]),
    "bare losses": ("9.1\n8.8\n8.7\n", [1, 2, 3], [9.1, 8.8, 8.7]),
    "tensors alone": (
        "tensor(9.1, device='cuda:0')\ntensor(nan, device='cuda:0')\ntensor(8.7)\n",
        [1, 2, 3],
        [9.1, math.nan, 8.7],
    ),
    "bars before bare numbers": (
        "  0%|   | 1/312 [00:25<2:13:19, 25.7s/it]0, 9.1\n  4%|#  | 11/312 [02:27<1:00:48]10, 8.8\n",
        [0, 10],
        [9.1, 8.8],
    ),
    "a bar that shows each step twice": (
        "Epoch 0: 1%| 1/600 [00:01, loss=9.9, v_num=3]Epoch 0: 1%| 1/600 [00:01, loss=9.1, v_num=3]"
        "Epoch 0: 2%| 2/600 [00:01, loss=9.1, v_num=3]Epoch 0: 2%| 2/600 [00:01, loss=8.8, v_num=3]"
        "Epoch 0: 2%| 3/600 [00:01, loss=8.8, v_num=3]Epoch 0: 2%| 3/600 [00:01, loss=8.7, v_num=3]",
        [1, 2, 3],
        [9.1, 8.8, 8.7],
    ),
    "epochs from 0": (
        "Epoch:[0/2](0/500) loss:9.1 lr:1\nEpoch:[0/2](499/500) loss:8.8 lr:1\nEpoch:[1/2](0/500) loss:8.7 lr:1\n",
        [0, 499, 500],
        [9.1, 8.8, 8.7],
    ),
    "epochs whose steps begin at 0": (
        "".join(f"Epoch {e}, Step {s}, Loss: 9.{e}{s}\n" for e in (1, 2) for s in (0, 1, 2)),
        [0, 1, 2, 3, 4, 5],
        [9.10, 9.11, 9.12, 9.20, 9.21, 9.22],
    ),
    "typographic quotes": (
        "{\u2018loss\u2019: 9.1, \u2018epoch\u2019: 0.1}\n{\u2018loss\u2019: 8.8, \u2018epoch\u2019: 0.2}\n",
        [0.1, 0.2],
        [9.1, 8.8],
    ),
    "steps on few lines above": (
        "  2/182 [01:05<1:37]\n{'loss': 9.2, 'epoch': 0.02}\n{'loss': 9.1, 'epoch': 0.03}\n{'loss': 8.8, 'epoch': 0.04}\n",
        [0.02, 0.03, 0.04],
        [9.2, 9.1, 8.8],
    ),
    "a mean over the epoch": (
        "| epoch 001:  50 / 100 loss=9.1, nll_loss=8.2, ppl=294.1, num_updates=50, lr=0.0001\n"
        "| epoch 001:  100 / 100 loss=8.8, nll_loss=8.1, ppl=274.4, num_updates=100, lr=0.0001\n"
        "2026 | INFO | train | epoch 001 | loss 11 | nll_loss 10 | ppl 1024 | num_updates 100 | lr 0.0001\n",
        [50, 100],
        [9.1, 8.8],
    ),
    "a setting above": (
        "gradient_accumulation_steps: 25\neval_steps: 500\nloss 9.1 step 1\nloss 8.8 step 2\n",
        [1, 2],
        [9.1, 8.8],
    ),
    "pages of TensorBoard": ("[[1700000000.5, 10, 9.1], [1700000001.5, 20, 8.8]]", [10, 20], [9.1, 8.8]),
    "a torn document": (
        '{"epoch": 1, "log_history": [\n{"loss": 9.1,\n"step": 10}, {"loss": 8.8, "step": 20}, {"lo',
        [10, 20],
        [9.1, 8.8],
    ),
    "words in parentheses": (
        "step 1: loss train (curr): 9.1, val (prev): None\n"
        "step 2: loss train (curr): 8.8\n",
        [1, 2],
        [9.1, 8.8],
    ),
    "the name of the loss in one word": (
        "Epoch: [0]  [10/150]  closs: 9.1 (9)\n"
        "Epoch: [0]  [20/150]  closs: 8.8 (9)\n",
        [10, 20],
        [9.1, 8.8],
    ),
    "XLM": (
        "INFO - 08/01/26 14:20:20 - 2:02:04 -    3550 -    6.8 sent/s - MLM-en:  9.1 -  - model LR: 1e-04\n",
        [3550],
        [9.1],
    ),
    "the step before a slash": (
        "warmup_step: 5/20\n"
        "1/200 train_loss: 9.1 time: 1m\n"
        "2/200 train_loss: 8.8 time: 2m\n",
        [1, 2],
        [9.1, 8.8],
    ),
    "fairseq of old": (
        "| epoch 001:  50 / 1891 loss=9.1, wps=3\n"
        "| epoch 001:  100 / 1891 loss=8.8, wps=3\n",
        [50, 100],
        [9.1, 8.8],
    ),
    "Keras, a bar per epoch": (
        "Epoch 1/2\n782/782 [=====] - 61s 78ms/step - loss: 9.1 - val_loss: 9.3\nEpoch 2/2\n"
        "782/782 [=====] - 61s 78ms/step - loss: 8.8 - val_loss: 9.2\n",
        [1, 2],
        [9.1, 8.8],
    ),
    "MLPerf": (
        ':::MLLOG {"time_ms": 17, "key": "seed", "value": 1, "metadata": {"lineno": 3}}\n'
        ':::MLLOG {"time_ms": 18, "key": "train_loss", "value": 9.1, "metadata": {"lineno": 3, "step": 10}}\n'
        ':::MLLOG {"time_ms": 19, "key": "train_loss", "value": 8.8, "metadata": {"lineno": 3, "step": 20}}\n',
        [10, 20],
        [9.1, 8.8],
    ),
    "a name for each value": ("tag,step,value\nloss,10,9.1\nlr,10,0.1\nloss,20,8.8\n", [10, 20], [9.1, 8.8]),
    "a split in the table": ("split,step,loss\ntrain,10,9.1\nval,10,9.3\ntrain,20,8.8\n", [10, 20], [9.1, 8.8]),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_the_losses_and_steps_of_every_shape_of_line_are_read(tmp_path, name):
    text, steps, losses = LINES[name]
    log = read(tmp_path, text)
    assert log.steps.tolist() == steps
    assert np.allclose(log.loss, losses, equal_nan=True)
    assert log.lines_per_step == 1


@pytest.mark.parametrize("separator", ["", "====================\n"])
def test_source_code_at_the_head_of_a_log_is_not_read_as_figures(tmp_path, separator):
    lines = "".join(f"step:{s}/3000 train_loss:{9 - s / 500:.4f} train_time:200ms\n" for s in range(1, 300))
    code = CODE + "def evaluate(model):\n" + "    model.eval()\n" * 1000 + "    val_loss = 0\n"
    log = read(tmp_path, code + separator + lines + "step:299/3000 val_loss:8.9000 train_time:200ms\n")
    assert len(log.loss) == 299 and log.loss.max() < 9 and log.steps[0] == 1
    assert log.val_loss.tolist() == [8.9]


def test_lines_that_look_like_assignments_are_read_even_below_a_line_of_code(tmp_path):
    text = "x.py:5: UserWarning: old\n  return forward(*args)\n" + "".join(f"loss = {9 - s / 10}\n" for s in range(50))
    assert len(read(tmp_path, text).loss) >= 48


def test_figures_of_one_step_on_several_lines_are_one_row(tmp_path):
    text = "".join(f"[step={s}/9]\n    optim/total_grad_norm=7e-0{s}\n    train/CrossEntropyLoss=0.0\n" for s in (1, 2, 3))
    log = read(tmp_path, text)
    assert log.columns["grad_norm"].tolist() == [7e-01, 7e-02, 7e-03] and log.nonfinite_norm_steps.tolist() == []


def test_a_perplexity_alone_becomes_nats_and_a_note_says_so(tmp_path):
    log = read(tmp_path, "step 10 ppl 8955.29\nstep 20 ppl 6634.24\nstep 20 valid perplexity: 7332.0\n")
    assert log.judged == "perplexity" and np.allclose(log.loss, [9.1, 8.8], atol=1e-3) and "'ppl'" in log.notes[0]
    assert np.allclose(log.val_loss, [8.9], atol=1e-3) and log.val_perplexity.tolist() == [7332.0]


def test_a_validation_loss_alone_is_judged_and_a_note_says_so(tmp_path):
    log = read(tmp_path, "step,val_loss\n10,9.1\n20,8.8\n")
    assert log.judged == "validation loss" and log.loss.tolist() == [9.1, 8.8] and len(log.val_loss) == 0
    assert "'val_loss'" in log.notes[0]


def test_evaluations_on_lines_of_their_own_have_their_step_and_perplexity(tmp_path):
    text = "validation loss: 11.0\n" + "".join(
        f"iteration {s} | loss {9 - s / 100}\n"
        f"validation loss at iteration {s} | lm loss value: {9.5 - s / 100} | lm loss PPL: {math.exp(9.5 - s / 100)} |\n"
        for s in (10, 20, 30)
    )
    log = read(tmp_path, text)
    assert log.steps.tolist() == [10, 20, 30] and log.val_steps.tolist() == [10, 20, 30]
    assert np.allclose(np.log(log.val_perplexity), log.val_loss)


# ---------------------------------------------------------------- what is missing, and what went back


def test_a_validation_loss_is_that_of_its_perplexity_and_not_of_a_progress_line(tmp_path):
    """As old fairseq writes: base 2."""
    epochs = ((3.24, 3.69), (2.72, 3.13))
    lines = [
        f"| epoch {i}  1000 / 8000 loss={last - 0.5} (3.1), lr=0.001\n| epoch {i} | valid on 'valid' 1000 / 1300 loss={part}\n"
        f"| epoch {i} | valid on 'valid' | valid loss {last} | valid ppl {2**last:.2f}\n"
        for i, (part, last) in enumerate(epochs, 4)
    ]
    log = read(tmp_path, "".join(lines))
    assert log.val_loss.tolist() == [3.69, 3.13] and np.allclose(np.log2(log.val_perplexity), log.val_loss, atol=0.01)


def megatron(step: int, loss: str, norm: str, skipped: int = 0) -> str:
    return (
        f" iteration {step:8d}/    8000 | learning rate: 6.6E-06 | {loss}loss scale: 1.0 | grad norm: {norm} | "
        f"number of skipped iterations:   {skipped} | number of nan iterations:   0 |\n"
    )


def test_lines_whose_loss_is_missing_are_told_from_printed_nan(tmp_path):
    good = "".join(megatron(s, "lm loss: 9.1E+00 | ", "0.7") for s in range(1, 6))
    log = read(
        tmp_path, good + megatron(6, "lm loss: NAN | ", "0.7") + megatron(7, "", "nan") + megatron(8, "", "0.7", skipped=1)
    )
    assert log.steps.tolist() == [1, 2, 3, 4, 5, 6] and np.isnan(log.loss).tolist() == [False] * 5 + [True]
    assert log.missing_steps.tolist() == [7] and log.nonfinite_norm_steps.tolist() == [7]
    assert log.skipped_steps == 1


def test_a_log_whose_losses_are_all_missing_is_read_if_its_gradient_norm_is_not_finite(tmp_path):
    log = read(tmp_path, "".join(megatron(s, "", "nan") for s in (5, 6)))
    assert len(log.loss) == 0 and log.missing_steps.tolist() == log.nonfinite_norm_steps.tolist() == [5, 6]
    with pytest.raises(LogError):
        read(tmp_path, "".join(megatron(s, "", "0.7") for s in (5, 6)))


def test_names_that_are_never_on_the_lines_of_losses_do_not_make_losses_missing(tmp_path):
    text = "".join(f"step {s} lr 0.1 grad norm 1.5\nstep {s} loss {9 - s / 10}\n" for s in range(20))
    assert read(tmp_path, text).missing_steps.tolist() == []


def test_a_restart_keeps_the_older_lines_beside_the_log(tmp_path):
    log = read(tmp_path, "".join(f"step {s} loss {x}\n" for s, x in [(0, 9), (10, 8), (20, 7), (10, 8.5), (20, 8.4), (30, 8)]))
    (restart,) = log.restarts
    assert (restart.last, restart.first, restart.steps.tolist(), restart.loss.tolist()) == (20, 10, [10, 20], [8, 7])
    assert log.loss.tolist() == [9, 8.5, 8.4, 8]


def test_runs_one_after_another_are_not_called_restarts_or_ranks(tmp_path):
    steps = [*range(125, 3000, 125), 2990, 2980]
    log = read(
        tmp_path, "".join(f"=== seed {n}\n" + "".join(f"step:{s}/3000 loss:{9 - s / 999}\n" for s in steps) for n in range(7))
    )
    assert log.lines_per_step == 1 and len(log.loss) == 24
    log = read(tmp_path, "".join(f"step {s} loss {9 - s / 10 + n}\n" for n in range(3) for s in range(10)))
    assert log.loss[0] == 11 and "3 runs" in log.notes[0]


def test_what_follows_the_training_under_another_name_is_not_judged(tmp_path):
    text = "".join(f"{s}/200 train_loss: {9 - s / 100}\n" for s in range(0, 200, 20))
    log = read(tmp_path, text + "".join(f"ttt_progress: batch {s}/782 batch_loss:3.2\n" for s in range(700)))
    assert log.loss_name == "train_loss" and len(log.loss) == 10 and log.restarts == []


# ---------------------------------------------------------------- tables


def test_of_several_runs_in_one_table_any_can_be_judged(tmp_path):
    text = (
        "Step,a - loss,a - loss__MIN,a - lr,b - loss,b - loss__MIN,b - lr\n10,9,9,1,,,\n20,8,8,1,,,\n10,,,,7,7,2\n20,,,,6,6,2\n"
    )
    for content in (text, text.replace(",,,,", ",NaN,NaN,NaN,").replace(",,,\n", ",NaN,NaN,NaN\n")):
        log = read(tmp_path, content)
        assert log.loss.tolist() == [9, 8] and log.other_losses == ("b - loss",) and "--loss" in log.notes[-1]
        other = read(tmp_path, content, loss_name="b - loss")
        assert other.loss.tolist() == [7, 6] and other.columns["lr"].tolist() == [2, 2]
    with pytest.raises(LogError, match="'a - loss', 'b - loss'"):
        read(tmp_path, text, loss_name="c - loss")


def test_rows_of_several_runs_are_told_apart_by_their_column(tmp_path):
    log = read(tmp_path, "run,step,loss\na,10,9\na,20,8\nb,10,7\nb,20,6\n")
    assert log.loss.tolist() == [9, 8] and log.other_losses == ("b - loss",) and log.restarts == []


def test_a_nan_that_stays_is_not_taken_for_an_empty_cell(tmp_path):
    rows = [(1, 9.0, math.nan), (2, math.nan, 9.2), (3, 8.8, math.nan), (4, math.nan, math.nan), (5, math.nan, math.nan)]
    log = read(tmp_path, "step,loss,val_loss\n" + "".join(f"{s},{x},{v}\n" for s, x, v in rows))
    assert log.steps.tolist() == [1, 3, 4, 5] and np.isnan(log.loss).tolist() == [False, False, True, True]


# ---------------------------------------------------------------- compressed, torn and long


@pytest.mark.parametrize("module", [gzip, bz2, lzma])
def test_compressed_logs_are_read_even_if_they_are_cut_off(tmp_path, module):
    text = "".join(f"step {s} loss {9 - s / 1e5:.7f} at {hash(str(s))}\n" for s in range(30_000)).encode()
    packed = module.compress(text)
    (tmp_path / "log").write_bytes(packed)
    assert len(read_log(tmp_path / "log").loss) == 30_000
    (tmp_path / "log").write_bytes(packed[: -len(packed) // 4])
    assert len(read_log(tmp_path / "log").loss) > 1_000


def test_standard_input_is_read_compressed_or_not(tmp_path, monkeypatch):
    for content in (b"step 1 loss 9.1\nstep 2 lo", gzip.compress(b"step 1 loss 9.1\n")):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(content))))
        log = read_log(Path("-"))
        assert log.loss.tolist() == [9.1] and log.name == "standard input"


def test_a_long_log_is_thinned_and_keeps_what_stands_out(tmp_path, monkeypatch):
    monkeypatch.setattr(log_table, "MOST_ROWS", 10_000)
    steps = np.r_[np.arange(40_000), np.arange(38_000, 43_000)]
    loss = 3 + 6 * (1 + steps / 1000) ** -0.5 + 0.05 * np.random.default_rng(0).normal(size=45_000)
    loss[15_001], loss[20_003] = 12.5, math.nan
    lines = [f"step {s} loss {x:.4f}\n" for s, x in zip(steps.tolist(), loss.tolist(), strict=True)]
    log = read(tmp_path, "".join(lines) + "step 0 val loss 9.5\n")
    assert log.lines == 45_000 and 5_000 < len(log.loss) < 15_000
    assert (log.steps[0], log.steps[-1]) == (0, 42_999) and np.all(np.diff(log.steps) > 0)
    assert log.loss[log.steps == 15_001].tolist() == [12.5] and np.isnan(log.loss[log.steps == 20_003]).sum() == 1
    assert (log.restarts[0].last, log.restarts[0].first) == (39_999, 38_000) and log.val_loss.tolist() == [9.5]
    scatter = 1.4826 * np.nanmedian(np.abs(np.diff(log.loss[-3_000:], 2))) / math.sqrt(6)
    assert 0.045 < scatter < 0.06  # the extremes that are kept do not pretend noise


def test_a_log_of_200_000_points_is_complete(tmp_path):
    (tmp_path / "log").write_text("step,loss\n" + "".join(f"{s},{9 - s / 1e6}\n" for s in range(log_table.MOST_ROWS)))
    log = read_log(tmp_path / "log")
    assert log.lines == 0 and len(log.loss) == log_table.MOST_ROWS


def test_lines_of_ranks_stay_together_in_a_long_log(tmp_path, monkeypatch):
    monkeypatch.setattr(log_table, "MOST_ROWS", 2_000)
    text = "".join(f"step {s} loss {9 - s / 1e4 + r / 7:.4f}\n" for s in range(3_000) for r in range(4))
    log = read(tmp_path, text)
    assert log.lines_per_step == 4 and log.lines == 12_000 and 300 < len(log.loss) < 2_000


def test_a_long_document_and_a_long_line_of_bars_are_read_in_pieces(tmp_path, monkeypatch):
    from pretrain.doctor import log_formats, log_sources

    monkeypatch.setattr(log_formats, "_LONGEST_DOCUMENT", 20_000)
    monkeypatch.setattr(log_formats, "_HEAD_CHARACTERS", 10_000)
    monkeypatch.setattr(log_sources, "LONGEST_LINE", 10_000)
    monkeypatch.setattr(log_sources, "_CHUNK_BYTES", 1_000)
    records = [{"loss": 9 - s / 1e4, "step": s} for s in range(5_000)]
    for indent in (None, 1):
        assert len(read(tmp_path, json.dumps({"best": None, "log_history": records}, indent=indent)).loss) == 5_000
    bars = "".join(f"Epoch 0: 1%| {s}/9999 [00:01<00:09, 9it/s, loss={9 - s / 1e4:.4f}]" for s in range(5_000))
    assert len(read(tmp_path, bars).loss) == 5_000


def test_reading_needs_bounded_memory(tmp_path):
    """9 MB of lines in less than 25 MB: neither the text nor a dictionary for each line is kept."""
    path = tmp_path / "log"
    with path.open("w") as file:
        lines = (
            f"{{'loss': {9 - s / 1e6:.4f}, 'grad_norm': 1.25, 'lr': 1e-4, 'step': {s}, 'epoch': 1}}\n" for s in range(120_000)
        )
        file.writelines(lines)
    code = """
import sys
from pathlib import Path
from pretrain.doctor import log_table, training_log
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
log_table.MOST_ROWS, before = 10_000, peak()
training_log.read_log(Path(sys.argv[1]))
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert int(done.stdout) < 25 * 1024, done.stderr
