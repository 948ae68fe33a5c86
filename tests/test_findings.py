"""The loss doctor names planted faults in every format, and finds nothing in clean logs."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pretrain.doctor.diagnosis import Diagnosis
from pretrain.doctor.findings import diagnose, summary
from pretrain.doctor.log_sources import LogError
from pretrain.doctor.names import meaning
from pretrain.doctor.scale import Setup
from pretrain.doctor.training_log import TrainingLog, read_log

STORY = "Epoch:[1/2](100/442) loss:213.776 lr:0.000500000000 epoch_Time:12.0min:\n"
A, W, T = 16, 6, 512


# ---------------------------------------------------------------- logs with a planted fault


def curve(vocab_size: int, steps: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A healthy training loss (nats) from scratch: a power law from ln V down to 1.6 to 3.2 nats."""
    start, end = math.log(vocab_size), rng.uniform(1.6, 3.2)
    return end + (start - end) * (1 + steps / rng.uniform(80, 300)) ** -rng.uniform(0.4, 0.7)


def planted(fault: str, vocab_size: int, steps: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(loss, auxiliary loss) as a script with that fault shows them; single sequences scatter by 0.4 nats."""
    rng = np.random.default_rng(seed)
    loss = curve(vocab_size, steps, rng)
    if fault == "stall":
        loss = np.full(len(steps), math.log(vocab_size))
    if fault == "collapse":
        loss = np.maximum(0.02, math.log(vocab_size) * np.exp(-steps / steps[-1] * 8))
    if fault == "divergence":
        loss[-len(loss) // 4 :] += np.linspace(0.5, 3, len(loss[-len(loss) // 4 :]))
    sequences = 1 if fault == "last micro-batch" else A * W
    noisy = loss + rng.normal(size=len(steps)) * min(0.4, 0.05 * loss[-1]) / math.sqrt(sequences)
    noisy = noisy if fault != "last micro-batch" else loss + rng.normal(size=len(steps)) * 0.4
    aux = rng.uniform(0.9, 1.3, len(steps))
    factor = {"accumulation": A, "divided by accumulation": 1 / A, "world size": W, "divided by world size": 1 / W,
              "both": A * W, "divided by both": 1 / (A * W), "sequence length": T, "bits": 1 / math.log(2)}  # fmt: skip
    shown = noisy * factor.get(fault, 1.0) + (0.3 * aux if fault == "auxiliary" else 0)
    if fault == "perplexity":
        shown = np.exp(noisy)
    if fault == "nan":
        shown[len(shown) // 2 :] = math.nan
    return shown, aux


def write_jsonl(rows, path):
    path.write_text("".join(json.dumps({"step": s, "loss": x, "aux_loss": a, "lr": 1e-3}) + "\n" for s, x, a in rows))


def write_csv(rows, path):
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Step", "run-1 - train/loss", "run-1 - train/loss__MIN", "run-1 - train/aux_loss"])
        table.writerows((s, x, x, a) for s, x, a in rows)


def write_tensorboard(rows, path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(path)) as writer:
        for s, x, a in rows:
            writer.add_scalar("train/loss", x, s, new_style=bool(s % 20))
            writer.add_scalar("train/aux_loss", a, s)


LINES = {
    "minimind": "Epoch:[1/2]({s}/442000) loss:{x:.3f} aux_loss:{a:.4f} lr:0.000500000000 epoch_Time:12.0min:",
    "nanogpt": "iter {s}: loss {x:.4f}, aux loss {a:.4f}, time 301.52ms, mfu 31.10%",
    "litgpt": "Epoch 1 | iter 1{s}0 step {s} | loss train: {x:.3f}, val: n/a | aux loss: {a:.4f} | iter time: 1234.56 ms "
    "(step) remaining time: 1 day, 2:03:04",
    "hugging_face": "{{'loss': {x:.4f}, 'grad_norm': 1.25, 'aux_loss': {a:.4f}, 'learning_rate': 0.0005, 'epoch': {s}e-4}}",
    "megatron": " [2026-05-01 10:00:00.1] iteration {s:8d}/    5000 | consumed samples:  25600 | elapsed time per iteration "
    "(ms): 512.0 | learning rate: 1.500E-04 | global batch size:   256 | lm loss: {x:.6E} | load_balancing_loss: {a:.6E} "
    "| loss scale: 1.0 | grad norm: 1.203 | number of skipped iterations:   0 | number of nan iterations:   0 |",
    "nanochat": "step {s:05d}/01000 (7.50%) | loss: {x:.6f} | aux loss: {a:.4f} | grad norm: 0.7312 | lrm: 1.00 | dt: 512.12ms "
    "| tok/sec: 1,024,000 | mfu: 41.20 | total time: 1.20m",
    "torchtitan": "\x1b[31mstep: {s:2d}  \x1b[32mloss: {x:7.4f}  \x1b[33mgrad_norm:  1.21  aux_loss: {a:.4f}  tps: 300\x1b[0m",
}
AROUND = {  # other lines of such logs
    "nanogpt": "tokens per iteration will be: 491,520\nnumber of parameters: 123.59M\n",
    "hugging_face": "{'train_runtime': 99.5, 'train_samples_per_second': 12.0, 'train_loss': 4.2, 'epoch': 1.0}\n",
    "torchtitan": "[rank0]:2026-05-01 10:00:00,123 - root - INFO - Starting job: 8 GPUs\r\n",
}
FIRST_STEP = {"minimind": 10, "hugging_face": 10, "megatron": 10}  # the others start at step 0
FORMATS = ["jsonl", "csv", "tensorboard", *LINES]
FAULTS = [
    *("clean", "accumulation", "divided by accumulation", "world size", "divided by world size", "both", "divided by both"),
    *("sequence length", "bits", "perplexity", "last micro-batch", "auxiliary", "nan", "stall", "collapse", "divergence"),
]


def write(kind: str, steps: np.ndarray, loss: np.ndarray, aux: np.ndarray, path: Path) -> None:
    rows = list(zip(steps.tolist(), loss.tolist(), aux.tolist(), strict=True))
    if kind in LINES:
        path.write_text(AROUND.get(kind, "") + "\n".join(LINES[kind].format(s=s, x=x, a=a) for s, x, a in rows))
    else:
        {"jsonl": write_jsonl, "csv": write_csv, "tensorboard": write_tensorboard}[kind](rows, path)


def name_of(result: Diagnosis) -> str:
    """The fault that the doctor finds, with its name in FAULTS; several are joined."""
    names = [(f.causes[0] if f.fault in ("scale", "noise") else f.fault) for f in result.findings]
    return " + ".join(names) or "clean"


@pytest.mark.parametrize("kind", FORMATS)
def test_every_planted_fault_is_named_in_every_format_and_the_confusion_matrix_is_diagonal(kind, tmp_path):
    matrix = Counter()
    for number, fault in enumerate(FAULTS):
        for seed, vocab_size in enumerate((6400, 50304, 151936)[: 1 if kind == "tensorboard" else 3]):
            path = tmp_path / f"{number}-{seed}"
            steps = np.arange(FIRST_STEP.get(kind, 0), 1000, 10)
            loss, aux = planted(fault, vocab_size, steps, 100 * number + seed)
            write(kind, steps, loss, aux, path)
            log = read_log(path)
            assert len(log.loss) == len(steps), (kind, log.format, log.loss_name)
            assert np.allclose(log.loss, loss, rtol=1e-2, atol=2e-3, equal_nan=True)
            matrix[fault, name_of(diagnose(log, Setup(vocab_size, A, W, T)))] += 1
    for (fault, name), count in sorted(matrix.items()):
        print(f"{kind:14} planted {fault:26} named {name:26} {count}")
    assert [pair for pair in matrix if pair[0] != pair[1]] == []


# ---------------------------------------------------------------- clean logs


def log_of(steps, loss, **other) -> TrainingLog:
    return TrainingLog("log", "text", "loss", "step", np.asarray(steps, float), np.asarray(loss, float), **other)


def clean_log(seed: int) -> tuple[TrainingLog, Setup]:
    rng = np.random.default_rng(seed)
    vocab_size = int(rng.choice([65, 256, 4096, 6400, 10000, 32000, 50257, 128256, 151936]))
    every, lines = int(rng.choice([1, 10, 100])), int(rng.choice([1, 3, 10, 40, 200, 1000]))
    accumulation, ranks = int(rng.choice([1, 2, 4, 8, 25])), int(rng.choice([1, 2, 8, 16]))
    offset = rng.choice([0, 1, every, 3000, 50_000])
    steps = offset + np.arange(lines) * every
    low = min(0.5 * math.log(vocab_size), rng.uniform(1.3, 3.3))
    fall = (math.log(vocab_size) - low) * (1 + steps / rng.uniform(30, 400)) ** -rng.uniform(0.3, 0.7)
    loss = (
        low
        + fall * rng.normal(1, 0.01)
        + rng.normal(size=lines) * rng.uniform(0.1, 0.5) / math.sqrt(accumulation * ranks * rng.choice([1, 8]))
    )
    known = rng.random()
    setup = (
        Setup(vocab_size, accumulation, ranks, 512)
        if known < 0.6
        else Setup(vocab_size)
        if known < 0.8
        else Setup(None, accumulation, ranks)
    )
    return log_of(steps, loss), setup


def test_clean_logs_of_all_vocabularies_lengths_and_noises_raise_no_alarm():
    alarms = [(seed, result.findings) for seed in range(600) if (result := diagnose(*clean_log(seed))).findings]
    assert alarms == []


def test_a_resumed_log_is_not_judged_by_ln_v():
    steps = np.arange(5000, 6000, 10)
    for level in (3.1, 1.2):
        result = diagnose(log_of(steps, level + 0.02 * np.sin(steps)), Setup(50257, 8, 2, 1024))
        assert result.findings == []
        assert any("begins at step 5000" in note for note in result.notes)


def test_a_resumed_log_above_ln_v_is_still_impossible():
    result = diagnose(log_of(np.arange(5000, 5400, 10), 80 + np.sin(np.arange(40))), Setup(6400, 25))
    assert result.findings[0].causes[0] == "accumulation" and "80 / 25 = 3.2" in result.findings[0].text


def test_a_log_resumed_after_few_steps_is_not_mistaken_for_a_start():
    result = diagnose(log_of(range(40, 90), np.linspace(81, 79, 50)), Setup(6400, 25))
    assert result.findings[0].causes[0] == "accumulation"  # from scratch, 3.2 nats at step 40 would be impossible


def test_a_noisy_first_line_raises_no_alarm():
    steps, noise = np.arange(0, 2000, 10), np.random.default_rng(0).normal(size=200) * 0.5
    noise[0] = -1.3
    assert diagnose(log_of(steps, 3 + 5.76 * (1 + steps / 50) ** -0.6 + noise), Setup(6400)).findings == []


def test_a_run_that_starts_from_trained_weights_raises_no_alarm():
    steps = np.arange(0, 1000, 10)
    result = diagnose(log_of(steps, 2.6 - 0.3 * steps / 1000), Setup(151936, 4, 8, 2048))
    assert result.findings == [] and any("trained weights" in note for note in result.notes)


def test_a_single_low_line_is_called_possibly_divided():
    (finding,) = diagnose(log_of([0], [2.7]), Setup(50257, accumulation=4)).findings
    assert finding.certainty == "possible" and "2.7 x 4 = 10.8" in finding.text


def test_a_fast_recipe_that_halves_its_loss_in_a_hundred_steps_raises_no_alarm():
    assert diagnose(log_of([100, 200, 300, 400, 500], [5.0, 4.4, 4.15, 4.0, 3.9]), Setup(50304, 8, 8, 1024)).findings == []


def test_a_few_flat_lines_of_a_warm_up_are_a_note_and_not_a_stall():
    result = diagnose(log_of(range(60), 9.21 + 0.002 * np.sin(np.arange(60))), Setup(10000))
    assert result.findings == [] and any("warm-up" in note for note in result.notes) and result.undecided


def another_curve(vocab_size: int, steps: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Nats of a healthy run: a power law, two exponentials, a plateau before a drop, a slow warm-up or a fast recipe."""
    start, low = math.log(vocab_size) * rng.uniform(1, 1.02), min(0.55 * math.log(vocab_size), rng.uniform(1.3, 3.4))
    kind, tau = rng.integers(5), rng.uniform(60, 400)
    if kind == 0:
        return low + (start - low) * (1 + steps / tau) ** -rng.uniform(0.35, 0.7)
    if kind == 1:
        return low + (start - low) * (0.6 * np.exp(-steps / tau) + 0.4 * np.exp(-steps / (20 * tau)))
    if kind == 2:
        plateau = rng.uniform(0.65, 0.82) * start
        late = np.maximum(0, steps - 5 * tau)
        return plateau + (start - plateau) * np.exp(-steps / tau) - (plateau - low) * (1 - (1 + late / 400) ** -0.5)
    warm_up = rng.uniform(500, 2000)
    done = np.where(steps < warm_up, steps**2 / (2 * warm_up), steps - warm_up / 2) if kind == 3 else 4 * steps
    return low + (start - low) * (1 + done / 150) ** -rng.uniform(0.4, 0.6)


def test_no_curve_setting_or_noise_leads_to_a_wrong_name_and_few_to_none():
    """A wrong name is the worst answer and must not occur; a missed factor must be rare."""
    answers = Counter()
    for seed in range(400):
        rng = np.random.default_rng(seed)
        vocab_size, sequence_length = (
            int(rng.choice([256, 4096, 10000, 32000, 50304, 128256, 256000])),
            int(rng.choice([256, 1024])),
        )
        accumulation, ranks = (int(rng.choice(sizes)) for sizes in ([3, 5, 7, 13, 16, 25, 31, 64], [2, 4, 6, 8, 16]))
        every, lines = int(rng.choice([1, 5, 10, 50, 100])), int(rng.choice([20, 50, 200, 1000]))
        steps = int(rng.choice([0, 1, every])) + every * np.arange(lines)
        true = another_curve(vocab_size, steps, rng) + rng.normal(size=lines) * 0.4 / math.sqrt(8 * accumulation * ranks)
        cause, factor = list({"clean": 1, "accumulation": accumulation, "divided by accumulation": 1 / accumulation,
                              "world size": ranks, "both": accumulation * ranks, "sequence length": sequence_length,
                              "bits": 1 / math.log(2)}.items())[seed % 7]  # fmt: skip
        result = diagnose(log_of(steps, true * factor), Setup(vocab_size, accumulation, ranks, sequence_length, 8))
        causes = next((each.causes for each in result.findings if each.fault in ("scale", "start")), ())
        right = cause == "clean" if not causes else cause in causes
        kind = "right" if right else "nothing" if not causes else "WRONG"
        answers[cause, kind, len(causes) > 1] += 1
    for (cause, kind, several), count in sorted(answers.items()):
        print(f"planted {cause:25} {kind}{' among several' if several else '':15} {count}")
    assert not any(kind == "WRONG" for _, kind, _ in answers)
    assert sum(count for (_, kind, _), count in answers.items() if kind == "nothing") <= 20
    assert sum(count for (_, kind, several), count in answers.items() if kind == "right" and not several) >= 330


# ---------------------------------------------------------------- the two questions of the guide: 213 and 9.2


def doctor(tmp_path: Path, text: str, name: str = "train.log", **setup) -> Diagnosis:
    (tmp_path / name).write_text(text)
    return diagnose(read_log(tmp_path / name), Setup(**setup))


def test_a_loss_of_213_with_vocabulary_6400_and_accumulation_25_is_multiplied_by_25(tmp_path):
    (finding,) = doctor(tmp_path, STORY, vocab_size=6400, accumulation=25).findings
    words = "213.8 / 25 = 8.55, and ln(6400) = 8.76: the shown loss is multiplied by 25, very likely the accumulation steps"
    assert finding.text == words  # the one test of the wording
    assert finding.causes == ("accumulation",)


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        ({"accumulation": 25}, "213.8 / 25 = 8.55, as with a vocabulary of 6400 (MiniMind, ln = 8.76)"),
        ({"vocab_size": 6400}, "about 32.5 (21.8 to 73.9)"),
        ({}, "300,000 ids start at 12.6"),
        ({"vocab_size": 6400, "accumulation": 25, "world_size": 25}, "both are 25"),
        ({"vocab_size": 6400, "accumulation": 25, "world_size": 2}, "213.8 / 50 = 4.28"),
    ],
)
def test_a_loss_of_213_with_fewer_or_more_known_settings(tmp_path, setup, words):
    (finding,) = doctor(tmp_path, STORY, **setup).findings
    assert finding.fault == "scale" and words in finding.text


def test_a_loss_that_stays_at_9_2_with_vocabulary_10000_has_stalled(tmp_path):
    rng = np.random.default_rng(0)
    text = "".join(f"iter {i}: loss {9.2103 + 0.01 * rng.normal():.4f}, time 12.1ms, mfu 3.0%\n" for i in range(0, 500, 10))
    (finding,) = doctor(tmp_path, text, vocab_size=10000).findings
    assert finding.fault == "stall" and "ln(10000) = 9.21" in finding.text and "random data" in finding.advice
    (finding,) = doctor(tmp_path, text).findings
    assert finding.fault == "stall" and "ln 10000?" in finding.text
    lines = [{"step": 0, "reference_lines": {"uniform": math.log(10000), "floor": math.log(10000)}}]
    lines += [{"step": step, "loss": 9.21 + 0.01 * rng.normal()} for step in range(10, 300, 10)]
    (finding,) = doctor(tmp_path, "\n".join(map(json.dumps, lines)), "metrics.jsonl").findings
    assert finding.fault == "stall" and "this data is random" in finding.text


def test_a_stall_with_a_wrong_scale_has_both_findings(tmp_path):
    text = "".join(f"iter {i}: loss {8 * (9.2103 + i**2 % 397 / 1e5):.4f}, time 12.1ms\n" for i in range(0, 500, 10))
    assert [f.fault for f in doctor(tmp_path, text, vocab_size=10000, accumulation=8).findings] == ["scale", "stall"]


# ---------------------------------------------------------------- evidence beside the first line


def test_equal_accumulation_and_ranks_are_called_ambiguous():
    (finding,) = diagnose(log_of([0, 10, 20], [83, 80, 77]), Setup(32000, 8, 8, 1024)).findings
    assert set(finding.causes) == {"accumulation", "world size"} and "no log can tell" in finding.text


def test_a_perplexity_beside_the_loss_gives_the_factor_on_any_log():
    true = np.linspace(4.0, 3.0, 30)
    log = log_of(np.arange(9000, 9300, 10), true / 8, columns={"perplexity": np.exp(true)})
    assert diagnose(log, Setup(32000, 8)).findings[0].causes[0] == "divided by accumulation"
    agreeing = log_of(np.arange(9000, 9300, 10), true, columns={"perplexity": np.exp(true)})
    assert diagnose(agreeing, Setup(32000, 8)).findings == []


def test_a_validation_loss_in_the_log_gives_the_factor_and_memorising_is_not_one():
    steps = np.arange(5000, 6000, 10)
    val = {"val_steps": np.array([5200.0, 5500.0, 5900.0])}
    scaled = log_of(steps, 8 * np.linspace(3.3, 3.0, 100), val_loss=np.array([3.3, 3.2, 3.1]), **val)
    assert diagnose(scaled, Setup(None, 8)).findings[0].causes[0] == "accumulation"
    memorising = log_of(steps, np.linspace(2.0, 0.6, 100), val_loss=np.array([3.0, 3.3, 3.9]), **val)
    (finding,) = diagnose(memorising, Setup(50257, 4)).findings
    assert finding.fault == "memorising" and "step 5200" in finding.advice
    other_text = log_of(steps, np.linspace(2.0, 1.6, 100), val_loss=np.array([3.0, 2.99, 3.0]), **val)
    assert diagnose(other_text, Setup(50257, 4)).findings == []


@pytest.mark.parametrize("setup", [Setup(50257, 4, 2, 1024, 4), Setup()])
@pytest.mark.parametrize("evaluations", [2, 5])
def test_a_run_that_memorises_a_small_text_is_not_called_divided(setup, evaluations):
    """2.7 x 4 = 10.8 = ln 50257, and it falls far: but the evaluations begin where the training loss does."""
    steps = np.arange(10, 1000, 10)
    at = np.linspace(9, 98, evaluations).astype(int)
    loss = np.linspace(2.7, 0.6, 99)
    log = log_of(steps, loss, val_steps=steps[at].astype(float), val_loss=2.6 + np.linspace(0, 0.9, evaluations))
    assert [f.fault for f in diagnose(log, setup).findings] == ["memorising"]


def test_a_fall_from_a_low_start_says_nothing_where_the_vocabulary_is_unknown():
    result = diagnose(log_of(np.arange(1, 500, 10), 2.2 * (1 + np.arange(50) / 10) ** -0.7), Setup(None, 8))
    assert result.findings == [] and any("--vocab-size" in note for note in result.notes)


@pytest.mark.parametrize("noise", [0.003, 0.03])
def test_a_curve_that_falls_to_the_unigram_entropy_and_stays_ignores_its_context(noise):
    steps, lines = np.arange(0, 2000, 10), {"uniform": 8.3, "unigram": 6.5, "bigram": 4.2}
    blur = np.random.default_rng(0).normal(0, noise, len(steps))
    (finding,) = diagnose(log_of(steps, 6.5 + 1.8 * np.exp(-steps / 60) + blur, reference_lines=lines), Setup()).findings
    assert finding.fault == "stall" and "unigram entropy, 6.500" in finding.text
    falling = log_of(steps, 5.0 + 3.3 * np.exp(-steps / 1000) + blur, reference_lines=lines)
    assert diagnose(falling, Setup()).findings == []


def test_an_evaluated_training_loss_in_the_log_gives_the_factor(tmp_path):
    text = "step 0: train loss 10.9897, val loss 10.9867\n" + "".join(
        f"iter {i}: loss {40 * (10.98 - i / 50):.3f}, time 9ms\n" for i in range(0, 30, 10)
    )
    finding = doctor(tmp_path, text, accumulation=40).findings[0]
    assert finding.causes == ("accumulation",) and "0.025 times" in finding.text


def test_a_total_loss_above_its_cross_entropy_contains_an_auxiliary_loss(tmp_path):
    text = "".join(
        f"Epoch:[1/1]({i}/900), loss: {8.8 - i / 500 + 0.06:.4f}, logits_loss: {8.8 - i / 500:.4f}, lr: 0.0005\n"
        for i in range(0, 300, 10)
    )
    (finding,) = doctor(tmp_path, text, vocab_size=6400).findings
    assert finding.fault == "auxiliary" and "8.86" in finding.text and "8.8" in finding.text
    clean = text.replace("logits_loss", "unused")
    assert doctor(tmp_path, clean, vocab_size=6400).findings == []


def test_one_rank_of_six_cannot_be_told_from_all_and_a_note_says_so():
    steps = np.arange(0, 2000, 10)
    rng = np.random.default_rng(1)
    result = diagnose(
        log_of(steps, curve(50304, steps, rng) + 0.4 / math.sqrt(A) * rng.normal(size=200)), Setup(50304, A, W, T)
    )
    assert result.findings == [] and any("no proof" in note for note in result.notes)


def test_far_too_large_initial_weights_are_not_called_a_factor():
    steps = np.arange(0, 2000, 10)
    for setup in (Setup(6400), Setup(6400, accumulation=25)):
        result = diagnose(log_of(steps, 3.0 + 210 * np.exp(-steps / 40) + 0.01 * np.sin(steps)), setup)
        assert result.findings[0].causes == ("initialisation",)


@pytest.mark.parametrize("trained", [False, True])
def test_a_loss_that_falls_as_little_as_a_trained_models_is_not_called_divided(trained):
    """1.47 x 8 = 11.8 = ln 128256: the first line of a fine-tuning equals that of a divided loss."""
    steps = np.arange(1, 2000, 10)
    loss = 1.47 - 0.25 * (1 - np.exp(-steps / 300)) if trained else 1.47 * (0.3 + 0.7 * (1 + steps / 100) ** -0.5)
    result = diagnose(log_of(steps, loss), Setup(128256, accumulation=8))
    if trained:
        assert result.findings == []
        assert any("x 8 = 11.8" in note for note in result.notes)
    else:
        assert [f.causes for f in result.findings] == [("divided by accumulation",)]


def test_a_fine_tuning_without_steps_is_not_called_divided(tmp_path):
    """2.9 x 4 = 11.6 = ln 151936, epochs of two digits and a fall by 30 %."""
    lines = [(2.9 - 0.9 * (1 - math.exp(-s / 30)), s / 300) for s in range(1, 300)]
    text = "".join(f"{{'loss': {x:.4f}, 'grad_norm': 1.0, 'learning_rate': 2e-05, 'epoch': {e:.2f}}}\n" for x, e in lines)
    assert doctor(tmp_path, text, vocab_size=151936, accumulation=4).findings == []


def test_trained_models_raise_no_alarm_whatever_factors_the_run_has():
    alarms = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        steps = 1 + np.arange(rng.integers(100, 400)) * int(rng.choice([5, 10, 50]))
        loss = rng.uniform(1.2, 3.2) * (1 - rng.uniform(0.02, 0.2) * (1 - np.exp(-steps / rng.uniform(50, 1000))))
        loss = loss + rng.normal(size=len(steps)) * 0.02
        setup = Setup(int(rng.choice([32000, 50257, 128256, 151936])), int(rng.choice([2, 4, 8, 16])), 8, 2048, 4)
        alarms += [(seed, f.text) for f in diagnose(log_of(steps, loss), setup).findings if f.fault == "scale"]
    assert alarms == []


def test_a_flat_curve_was_not_steeper_before_its_first_line():
    """22.1 = 2 x ln 50304 at step 10, and 9 % less 300 steps later: three ranks would need a fall by a third in 10 steps."""
    log = log_of(np.arange(10, 310, 10), np.linspace(22.08, 20.03, 30))
    (finding,) = diagnose(log, Setup(50304, 7, 3)).findings
    assert "multiplied" in finding.causes and "world size" not in finding.causes
    (finding,) = diagnose(log, Setup(50304, 7, 3, 512, micro_batch_size=2)).findings
    assert finding.causes == ("batch size",) and "22.08 / 2 = 11" in finding.text


def test_a_factor_that_fits_badly_is_not_called_very_likely():
    steps = np.arange(5, 505, 5)
    loss = 3 + 9.2 * (1 + steps / 60) ** -0.5  # starts at 12 nats, not 10.4: an auxiliary loss of 1.6 nats
    (finding,) = diagnose(log_of(steps, loss), Setup(32000, 16, 4, 256, 4)).findings
    assert finding.certainty != "very likely" and {"vocabulary", "auxiliary", "bits"} & set(finding.causes)


def test_a_vocabulary_other_than_the_given_one_is_considered():
    log = log_of(np.arange(1, 1000, 20), 3 + 9.4 * (1 + np.arange(0, 999, 20) / 60) ** -0.5)  # ln 256000 = 12.45
    for setup in (Setup(512), Setup(10000)):
        (finding,) = diagnose(log, setup).findings
        assert re.search(r"vocabulary is a different one, of about 2\d0,000 ids", finding.text)


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("weight", [0.1, 0.02])
def test_a_running_mean_that_starts_at_0_is_not_called_divergence(every, weight):
    steps = np.arange(0, 200 * every, every)
    true = 3 + 5.8 * (1 + steps / 400) ** -0.5
    shown = [weight * (1 - weight) ** np.arange(i, -1, -1) @ true[: i + 1] for i in range(len(true))]
    (finding,) = diagnose(log_of(steps, shown), Setup(6400, 4)).findings
    assert finding.fault == "running" and "a running mean" in finding.text


def test_a_sum_that_is_never_reset_is_not_called_divergence():
    steps = np.arange(0, 2000, 10)
    (finding,) = diagnose(log_of(steps, np.cumsum(3 + 5.8 * (1 + steps / 40) ** -0.5)), Setup(6400, 4)).findings
    assert finding.fault == "running" and "a sum" in finding.text


def test_a_loss_that_falls_to_ln_v_and_stays_there_has_stalled():
    steps = np.arange(0, 1000, 10)
    (finding,) = diagnose(log_of(steps, 9.21 + 0.7 * np.exp(-steps / 100)), Setup(10000)).findings
    assert finding.fault == "stall" and "from step 330 to 990" in finding.text


def test_a_loss_that_stays_near_the_usual_unigram_entropy_has_possibly_stalled():
    steps, blur = np.arange(0, 2000, 10), np.random.default_rng(0).normal(0, 0.02, 200)
    (finding,) = diagnose(log_of(steps, 7.6 + 2.8 * np.exp(-steps / 60) + blur), Setup(32000)).findings
    assert (finding.fault, finding.certainty) == ("stall", "possible")


@pytest.mark.parametrize("parts", [(8, 1), (1, 8)])
def test_a_scale_that_changes_in_the_middle_is_found_with_its_place_and_cause(parts):
    steps = np.arange(0, 400, 10)
    loss = (3 + 7.8 * (1 + steps / 100) ** -0.5) * np.repeat(parts, 20)
    (finding,) = diagnose(log_of(steps, loss), Setup(50304, 8)).findings
    assert finding.causes == ("change",) and "between step 190 and 200" in finding.text
    assert "the accumulation steps" in finding.text


def test_five_lines_that_end_far_above_ln_v_have_diverged():
    log = log_of([2, 10, 14, 16, 20], [12.03, 11.74, 10.86, 15.03, 20.1])
    assert [f.fault for f in diagnose(log, Setup(128256)).findings] == ["divergence"]


def test_a_rise_of_half_a_nat_at_the_end_is_a_divergence():
    steps = np.arange(0, 5000, 10)
    loss = 9.5 + 2.4 * np.exp(-steps / 500) + np.linspace(-0.5, 0.6, 500).clip(0)
    assert [f.fault for f in diagnose(log_of(steps, loss), Setup(151936)).findings] == ["divergence"]


@pytest.mark.filterwarnings("error")
def test_no_figures_crash_the_doctor():
    rng = np.random.default_rng(5)
    for _ in range(600):
        lines = int(rng.choice([1, 2, 3, 5, 8, 9, 24, 60]))
        loss = rng.choice([np.exp(rng.normal(size=lines) * 9), np.full(lines, 8.76), np.cumsum(rng.random(lines))])
        loss[rng.integers(0, lines)] = rng.choice([math.nan, math.inf, -math.inf, 0, -1, loss[0]])
        known = [
            None if rng.random() < 0.4 else int(rng.choice(sizes))
            for sizes in ((1, 2, 6400), (1, 25), (1, 8), (1, 512), (1, 4))
        ]
        steps = np.cumsum(rng.choice([1, 10, 20_000], lines)) * rng.choice([1, 0.001])
        other = rng.choice([0, 1, math.nan, math.inf, 9.0], lines)
        columns = dict.fromkeys(rng.choice(["lr", "grad_norm", "aux_loss", "lm_loss", "perplexity"], 2), other)
        log = log_of(steps, loss, columns=columns, val_steps=steps[-2:].astype(float), val_loss=np.array([8.0, 9.0])[:lines])
        if rng.random() < 0.3:
            log.reference_lines = {"uniform": float(rng.uniform(0, 9)), "unigram": 3.0}
        summary(diagnose(log, Setup(*known)))


# ---------------------------------------------------------------- forms of logs


def test_null_losses_in_metrics_jsonl_are_read_as_nan(tmp_path):
    lines = [{"step": 0, "reference_lines": {"uniform": math.log(6400), "unigram": 6.0}, "world_size": 2}]
    lines += [
        {"step": 1, "loss": 8.8, "skipped_steps": 0},
        {"step": 10, "loss": None, "nonfinite": {"loss": "nan"}, "skipped_steps": 9},
    ]
    lines += [{"step": 10, "val_loss": 8.5}]
    result = doctor(tmp_path, "\n".join(map(json.dumps, lines)) + '\n{"step": 20, "lo', "metrics.jsonl")
    assert [f.fault for f in result.findings] == ["nan"] and "the first at step 10" in result.findings[0].text
    assert result.log.steps.tolist() == [1, 10] and result.log.val_loss.tolist() == [8.5] and result.setup.vocab_size == 6400
    assert any("9 steps" in note for note in result.notes)


def test_an_integer_too_long_for_a_float_is_read_as_infinity(tmp_path):
    text = '{"step": 1, "loss": %s}\n{"step": 2, "loss": 8}\n' % ("9" * 400)
    assert doctor(tmp_path, text, vocab_size=6400).log.loss.tolist() == [math.inf, 8.0]


def test_zeros_written_in_place_of_nan_are_found(tmp_path):
    text = "".join(
        str({"loss": x, "grad_norm": g, "epoch": e / 10}) + "\n"
        for e, (x, g) in enumerate([(8.7, 1.0), (8.1, 1.1), (0.0, math.nan)], 1)
    )
    (finding,) = doctor(tmp_path, text, vocab_size=6400).findings
    assert finding.fault == "nan"


def test_lines_printed_by_every_rank_are_found_and_averaged(tmp_path):
    rng = np.random.default_rng(0)
    text = "".join(
        f"rank {r} step {s} loss {8.7 - s / 500 + 0.1 * rng.normal():.4f}\n" for s in range(0, 200, 10) for r in range(4)
    )
    result = doctor(tmp_path, text, vocab_size=6400)
    assert [f.fault for f in result.findings] == ["ranks"] and len(result.log.loss) == 20 and result.log.lines_per_step == 4


def test_lines_of_micro_batches_are_not_mistaken_for_ranks(tmp_path):
    text = "".join(
        f"iter {4 * s + m} step {s} loss train: {8.7 - s / 50 + m / 100:.4f}, val: n/a\n" for s in range(20) for m in range(4)
    )
    result = doctor(tmp_path, text, vocab_size=6400)
    assert result.findings == [] and any("4 lines" in note for note in result.notes)


def test_a_restart_in_the_log_keeps_the_newer_lines(tmp_path):
    text = "".join(f"step {s} loss {x}\n" for s, x in [(0, 8.8), (10, 8.0), (20, 7.5), (10, 8.1), (20, 7.6), (30, 7.0)])
    log = doctor(tmp_path, text).log
    assert log.loss.tolist() == [8.8, 8.1, 7.6, 7.0] and "from step 20 to 10" in log.notes[0]


def test_steps_that_restart_with_each_epoch_are_continued(tmp_path):
    text = "".join(f"Epoch {e} | step {s} | loss {8.8 - e - s / 100:.3f}\n" for e in range(2) for s in (10, 20, 30))
    assert doctor(tmp_path, text).log.steps.tolist() == [10, 20, 30, 40, 50, 60]


def test_other_shapes_of_text_and_documents_are_read(tmp_path):
    table = "10:00:00  step    loss    lr\n10:00:00  1/500   8.81  1e-3\n10:00:09  10/500  8.70  1e-3\n"
    bar = " 2%|#    | 10/500 [00:10<08:00, 1.0it/s]\n{'loss': '8.7', 'learning_rate': '1e-4', 'epoch': '0.1'}\n"
    fairseq = (
        '2026 | INFO | train_inner | {"epoch": 1, "update": 0.1, "loss": "12.71", "ppl": "6700.1", "num_updates": "100"}\n'
    )
    state = {"log_history": [{"loss": 8.7, "step": 10, "epoch": 0.1}, {"eval_loss": 8.6, "step": 10}], "epoch": 1}
    cases = {
        table: [1, 10],
        bar: [10],
        fairseq: [100],
        json.dumps(state, indent=1): [10],
        "step\tloss\n0\t8.8\n10\t8.7\n": [0, 10],
        "Step 3/10, Loss: tensor(8.71, device='cuda:0')\n": [3],
        "validation loss at iteration 10 | lm loss value: 9.1 |\n iteration 20/ 99 | lm loss: 8.8E+00 |\n": [20],
    }
    for text, steps in cases.items():
        log = doctor(tmp_path, text).log
        assert log.steps.tolist() == steps, text
        assert log.unit == "step" and 8 < log.loss[-1] < 13, text


FIRST_LINES = {  # lines of other programs with losses 9.1, 8.8: their steps
    "Progress on:train 10.0it/18.0kit rate:1.5s/it remaining:4:01 elapsed:17:46 postfix:loss=9.1\r"
    "Progress on:train 1.02kit/18.0kit rate:1.5s/it remaining:4:01 elapsed:17:46 postfix:loss=8.8\r": [10, 1020],
    "Epoch 1/3\n\r 10/1000 [>....] - ETA: 12s - loss: 9.1\r 1000/1000 [====] - 12s - loss: 9 - val_loss: 9\n"
    "Epoch 2/3\n\r 10/1000 [>....] - ETA: 12s - loss: 8.8": [10, 1000, 1010],
    "\x1b[1m 10/1000\x1b[0m \x1b[32m\u2501\u2501\x1b[0m \x1b[1m12:34\x1b[0m 754ms/step - loss: 9.1\r": [10],
    "[batch=10/100]:\n\t Train time/batch: 9\n\t Train loss/train/total: 9.1\n"
    "[batch=11/100]:\n\t Train loss/train/total: 8.8\n": [10, 11],
    "Train Epoch: 1 [640/60000 (1%)]\tLoss: 9.1\nTrain Epoch: 1 [1280/60000 (2%)]\tLoss: 8.8\n": [640, 1280],
    "Epoch 1 Batch 10/1000 Loss 9.1\nEpoch 1 Batch 20/1000 Loss 8.8\nEpoch 2 Batch 10/1000 Loss 8\n": [10, 20, 30],
    "iteration: 1.5K / 15K | consumed_tokens: 2.56M | global_batch_size: 2.05K | lm_loss: 9.1 | lr: 0.00015\n": [1500],
    "s:0 tel:11.0098\ns:1 trl:9.1 lr:0.000001 norm:15.3\ns:2 trl:8.8 lr:0.000001 norm:15.3\n": [1, 2],
    "0 val 10.9\n0 train 9.100000\n1 train 8.800000\n": [0, 1],
    "第 10 步，训练损失：9.1，学习率：0.0003\n第 20 步，训练损失：8.8，学习率：0.0003\n": [10, 20],
    "[训练] 步数: 10/1000 | 损失: 9.1 | 困惑度: 8955\n": [10],
    "训练中 当前step=20, 当前loss=9.1\n": [20],
    "{'loss': 9.1, 'learning_rate': 1e-05, 'epoch': 0.1, 'global_step/max_steps': '10/3000', 'elapsed_time': '12s'}\n": [10],
    "\r 1%|#| 1.00k/10.0k [00:10<10:00,  5.00it/s, loss=9.1]": [1000],
    "\u2503 step \u2503 loss \u2503\n\u2521\u2501\u2501\u2501\u2529\n\u2502 10 \u2502 9.1 \u2502\n": [10],
    "step,a-train/loss,a-train/loss_timestamp\n10,9.1,17e11\n20,8.8,17e11\n": [10, 20],
    "[train] step 10 loss 9.1\n[val] step 10 loss 10\n[train] step 20 loss 8.8\n[val] step 20 loss 9.9\n": [10, 20],
    "step 10 loss 9.1, eval loss 9.3\nstep 20 loss 8.8, eval loss 9.2\n": [10, 20],
    "# a comment\nstep;loss\n10;9,1\n20;8,80001\n": [10, 20],
    'step,loss\n"1,000",9.1\n"2,000",8.8\n': [1000, 2000],
    "step loss lr\n10 9.1 0.1\n20 8.8 0.1\n": [10, 20],
    "| step | loss |\n|------|------|\n| 10 | 9.1 |\n| 20 | 8.8 |\n": [10, 20],
    "Wall time,Step,Value\n1700000000.1,10,9.1\n1700000001.1,20,8.8\n": [10, 20],
    "Step\tTraining Loss\tValidation Loss\n500\tNo log\t9.0\n1000\t9.1\t8.6\n": [1000],
    '{"step": [10, 20], "loss": [9.1, 8.8]}': [10, 20],
    '{"history": {"step": [10, 20], "loss": [9.1, 8.8]}}': [10, 20],
    '{"10": {"loss": 9.1}, "20": {"loss": 8.8}}': [10, 20],
    '{"args": ["--lr", "1"], "callbacks": [{"every": 1}], "log": [{"step": 10, "loss": 9.1}]}': [10],
    '[rank0]: begins\n{"model": {"dim": 256}}\nstep: 10  loss: 9.1  grad_norm: 1\n': [10],
}  # fmt: skip


@pytest.mark.parametrize("text", FIRST_LINES, ids=range(len(FIRST_LINES)))
def test_lines_of_other_programs_are_read_completely(text, tmp_path):
    log = doctor(tmp_path, text).log
    assert log.unit == "step" and log.steps.tolist() == FIRST_LINES[text]
    assert log.loss[0] == 9.1 and np.all(np.abs(log.loss[1:] - 8.5) < 0.6)


def test_an_epoch_that_is_rounded_keeps_all_lines(tmp_path):
    """Many lines of a long epoch have the epoch 0.01; they are neither ranks nor restarts."""
    text = "".join(f"{{'loss': {8.7 - s / 500:.3f}, 'learning_rate': 1e-4, 'epoch': {s / 9000:.2f}}}\n" for s in range(500))
    result = doctor(tmp_path, text + "{'eval_loss': 8.0, 'epoch': 0.06}\n", vocab_size=6400)
    assert result.findings == [] and len(result.log.loss) == 500 and result.log.unit == "line"
    assert result.log.val_steps.tolist() == [500]


def test_ranks_that_write_out_of_order_are_not_mistaken_for_restarts(tmp_path):
    rng = np.random.default_rng(0)
    times = sorted((s + rng.uniform(0, 14), s) for s in range(0, 900, 10) for _ in range(4))
    text = "".join(f"step {s} loss {8.7 - s / 500 + 0.1 * rng.normal():.4f}\n" for _, s in times)
    result = doctor(tmp_path, text, vocab_size=6400)
    assert [f.fault for f in result.findings] == ["ranks"] and len(result.log.loss) == 90 and result.notes[:1] == result.notes


def test_several_runs_in_one_file_are_noted(tmp_path):
    text = "step,a - loss,a - loss__MIN,b - loss,b - loss__MIN\n10,8.7,8.7,9,9\n20,8.6,8.6,8,8\n"
    assert any("'a - loss', 'b - loss'" in note for note in doctor(tmp_path, text).notes)


def test_the_time_to_read_and_judge_a_log_is_linear_in_its_length(tmp_path):
    line = " iteration {s:8d}/ 500000 | consumed samples: 25600 | lm loss: {x:.6E} | loss scale: 1.0 | grad norm: 1.203 |\n"

    def seconds(lines: int) -> float:
        text = "".join(line.format(s=s, x=3 + 5.7 * math.exp(-s / 9000)) for s in range(lines))
        begin = time.process_time()
        result = doctor(tmp_path, text, vocab_size=6400)
        assert result.findings == [] and len(result.log.loss) == lines
        return time.process_time() - begin

    assert seconds(20_000) < 10 * min(seconds(5_000) for _ in range(2))  # 4 times as long; quadratic: 16 times


def test_losses_of_0_and_below_are_found(tmp_path):
    for text, fault in (("step {s} loss 0.0\n", "nan"), ("step {s} loss -{s}\n", "negative")):
        result = doctor(tmp_path, "".join(text.format(s=s) for s in range(1, 50)), vocab_size=6400)
        assert [f.fault for f in result.findings] == [fault] and result.curve is None and len(summary(result)) == 1


def test_utf_16_of_windows_shells_and_gb_18030_are_read(tmp_path):
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        (tmp_path / "log").write_bytes("step 1 loss 8.5\nstep 2 loss 8.4\n".encode(encoding))
        assert read_log(tmp_path / "log").loss.tolist() == [8.5, 8.4]
    (tmp_path / "log").write_bytes("第 1 步 损失：8.5\r\n第 2 步 损失：8.4\r\n".encode("gb18030"))
    assert read_log(tmp_path / "log").loss.tolist() == [8.5, 8.4]


NAMES = {
    "loss": "loss",
    "train/loss": "loss",
    "run - train/loss": "loss",
    "trainLoss": "loss",
    "run - loss__MIN": None,
    "loss scale": None,
    "lm loss": "lm_loss",
    "validation/loss": "val_loss",
    "eval_loss": "val_loss",
    "load_balancing_loss": "aux_loss",
    "mtp_1 loss": "other_loss",
    "number of skipped iterations": "skipped",
    "elapsed time per iteration": None,
    "train/global_step": "step",
    "max_steps": None,
    "learning rate": "lr",
    "total grad norm": "grad_norm",
    "closs": "other_loss",
    "trainloss": "loss",
    "Cost": "loss",
    "avg_batch_cost": None,
    "MLM-en": "lm_loss",
    "gradient_accumulation_steps": None,
    "gNorm": "grad_norm",
    "L.r.": "lr",
    "lm loss PPL": "perplexity",
    "Validation perplexity": "val_perplexity",
}


def test_names_get_their_usual_meaning():
    assert {name: meaning(name) for name in NAMES} == NAMES


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\x7fELF\0\0\0", "binary"),
        (b"\x1f\x8b\x08\0\0", "decompressed"),
        (b"train:\n  loss_chunk: 1024\n", "'loss_chunk'"),
        (b"hello 3 world\n", "'hello'"),
        (b"{" + b"1, " * 100_000, "no numbers"),
        (b"[" * 100_000, "no numbers"),
        (b'{"step": 1, "accuracy": 0.5}\n', "'step', 'accuracy'"),
        (b"PK\x03\x04", "ZIP"),
    ],
)
def test_files_that_are_not_logs_are_refused_with_the_reason(tmp_path, content, words):
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(LogError, match=words):
        read_log(tmp_path / "log")


def test_the_summary_shows_the_figures(tmp_path):
    lines = summary(doctor(tmp_path, "".join(f"step {i} loss {9 - i / 10}\n" for i in range(11))))
    assert (
        "11 losses" in lines[0] and "first 9   last 8   min 8   max 9   mean 8.5" in lines[1] and "falls by 10.0%" in lines[2]
    )


def test_clean_logs_with_validations_and_reference_losses_raise_no_alarm():
    alarms = []
    for seed in range(300):
        log, setup = clean_log(seed)
        if log.steps[0] > 3000 or len(log.loss) < 8:
            continue
        generator, ln_v = np.random.default_rng(seed), math.log(setup.vocab_size or 50257)
        at = np.linspace(0, len(log.loss) - 1, 6).astype(int)[1:]
        smooth = np.convolve(np.pad(log.loss, 2, "edge"), np.ones(5) / 5, mode="valid")[at]
        lines = {"uniform": ln_v, "unigram": generator.uniform(0.7, 0.9) * ln_v, "bigram": generator.uniform(0.45, 0.65) * ln_v}
        seen = dataclasses.replace(
            log, val_steps=log.steps[at], val_loss=smooth + generator.uniform(0, 0.5), reference_lines=lines
        )
        if found := [each for each in diagnose(seen, setup).findings if each.fault in ("stall", "memorising")]:
            alarms.append((seed, found))
    assert alarms == []
