"""Complete runs: killed and resumed, refused with a reason, finished with a verdict."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from pretrain import schema
from pretrain.config import load
from pretrain.data.batches import open_train
from pretrain.run import command_line
from pretrain.run.directory import RunDirectory
from tests.models import train_here
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]
DIVERGING = ["--optimizer.lr=1e30", "--optimizer.grad_clip=0", "--train.max_skipped_steps=3", "--train.max_steps=40"]
"""Flags with which the tiny run diverges."""
TINY = """
run: {name: tiny}
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, vocab_size: 64}
data: {synthetic: {kind: markov}, sequence_length: 16}
batch: {global_batch_size: 8, micro_batch_size: 2}
engine: {precision: fp32}
optimizer: {lr: 1e-2}
schedule: {name: wsd, warmup_steps: 3}
train: {max_steps: 20}
evaluate: {every_steps: 10, max_batches: 2}
checkpoint: {every_steps: 4}
log: {every_steps: 1, sinks: [console, jsonl]}
"""
EXACT = ("step", "loss", "grad_norm", "lr", "tokens", "epoch", "skipped_steps", "val_loss")


def run_of(tiny: list[str], name: str = "tiny") -> Path:
    return Path(tiny[-1]) / name


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The run of TINY on two ranks, uninterrupted."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "tiny.yaml").write_text(TINY)
    settings = ["--config", str(folder / "tiny.yaml"), "--run.directory", str(folder)]
    assert run_ranks(2, train_here, settings) == [0, 0]
    return run_of(settings)


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """The same run, stopped by SIGTERM after step 9."""
    folder = tmp_path_factory.mktemp("half")
    (folder / "tiny.yaml").write_text(TINY)
    settings = ["--config", str(folder / "tiny.yaml"), "--run.directory", str(folder)]
    assert run_ranks(2, signal_itself_at, settings, 0, 9, signal.SIGTERM) == [75, 75]
    return run_of(settings)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[dict]:
    """The values that are equal to the last bit in two runs with the same settings."""
    exact = [{key: value.hex() if isinstance(value, float) else value for key, value in record.items() if key in EXACT}
             for record in records(run)[1:] if not {"alarm", "slow_rank"} & record.keys()]  # fmt: skip
    assert [record["step"] for record in exact] == sorted(record["step"] for record in exact)
    return exact


def final_bytes(run: Path) -> dict[str, bytes]:
    newest = max((run / "checkpoints").glob("step_*"))
    return {file.name: file.read_bytes() for file in newest.glob("*.safetensors")}


def signal_itself_at(argv: list[str], rank: int, step: int, number: int) -> int:
    """Trains; a thread of `rank` sends this process `number` as soon as metrics.jsonl holds `step`."""
    metrics = run_of(argv) / "metrics.jsonl"

    def wait_and_signal() -> None:
        while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    if int(os.environ.get("RANK", 0)) == rank:
        threading.Thread(target=wait_and_signal, daemon=True).start()
    return train_here(argv)


@pytest.mark.faults
def test_a_run_killed_by_kill_9_resumes_bit_for_bit(tiny, tmp_path):
    """The real launcher, two ranks, SIGKILL to every process of the job; then the same command again."""
    tiny = ["--train.max_steps", "60", "--checkpoint.every_steps", "7", *tiny]
    assert run_ranks(2, train_here, [*tiny, "--run.name", "straight"]) == [0, 0]
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", "launch/accelerate/cpu.yaml"]
    command = [*launch, "--main_process_port", "0", "launch/pretrain.py", *tiny]
    quiet = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    job = subprocess.Popen(command, **quiet)
    metrics = run_of(tiny) / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and '"step": 10,' in metrics.read_text()):
        assert time.monotonic() < deadline and job.poll() is None, job.communicate()[0]
        time.sleep(0.005)
    launcher = psutil.Process(job.pid)  # its workers are in their own sessions
    for process in [*launcher.children(recursive=True), launcher]:
        process.kill()
    job.communicate()
    killed_at = records(run_of(tiny))[-1]["step"]
    assert 10 <= killed_at < 60
    again = subprocess.run(command, **quiet, timeout=90)
    assert again.returncode == 0 and "resuming after step" in again.stdout, again.stdout
    assert curve(run_of(tiny)) == curve(run_of(tiny, "straight"))
    assert final_bytes(run_of(tiny)) == final_bytes(run_of(tiny, "straight"))


def train_with_errors_in_a_file(argv: list[str]) -> int:
    """Trains; standard error of rank N goes to the file errors_N beside the runs."""
    with open(run_of(argv).parents[1] / f"errors_{os.environ['RANK']}", "w") as file, contextlib.redirect_stderr(file):
        return train_here(argv)


def test_a_rank_that_cannot_read_its_samples_reports_it(tiny, tmp_path):
    """An id outside the vocabulary, between the parts that are checked when the file is opened, in a sample of rank 1."""
    tokens = np.random.default_rng(0).integers(0, 64, 4_000_000, dtype=np.uint16)
    tokens.tofile(tmp_path / "flat.bin")
    tiny = ["--data.synthetic", "null", "--data.train", f"[{{path: {tmp_path / 'flat.bin'}}}]", *tiny]
    data = open_train(load(tiny).data, seed=1234, vocab_size=64, tokenizer_fingerprint=None)
    checked = [(len(tokens) - 8192) * i // 63 for i in range(64)]
    samples = {position: data.sample_ids(position, 1)[0][2] for position in range(16, 160) if position % 8 >= 4}
    hidden = [n for n in samples.values() if not any(start - 16 <= 16 * n <= start + 8192 for start in checked)]
    tokens[16 * hidden[0] + 5] = 99
    tokens.tofile(tmp_path / "flat.bin")
    with pytest.raises(RuntimeError):
        run_ranks(2, train_with_errors_in_a_file, tiny)
    errors = (tmp_path / "errors_1").read_text()
    assert "rank 1: " in errors and str(tmp_path / "flat.bin") in errors
    assert f"token {16 * hidden[0] + 5:,} " in errors and "99" in errors and "63" in errors


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_one_rank_saves_on_all_and_loses_no_step(tiny, straight, number, status):
    assert run_ranks(2, signal_itself_at, tiny, 1, 6, number) == [status, status]
    state = json.loads((run_of(tiny) / "run_state.json").read_text())
    stopped_at = records(run_of(tiny))[-1]["step"]
    assert (state["status"], state["exit_status"], state["step"]) == ("stopped", status, stopped_at) and stopped_at < 20
    assert (run_of(tiny) / "checkpoints" / f"step_{stopped_at:08d}").is_dir()
    assert run_ranks(2, train_here, tiny) == [0, 0]
    assert curve(run_of(tiny)) == curve(straight)
    assert final_bytes(run_of(tiny)) == final_bytes(straight)


@pytest.mark.parametrize(("ranks", "micro_batch"), [(2, 1), (1, 4), (4, 2)])
def test_the_second_half_may_run_on_other_ranks_with_another_accumulation(tiny, straight, half, ranks, micro_batch):
    shutil.copytree(half, run_of(tiny))
    assert set(run_ranks(ranks, train_here, [*tiny, "--batch.micro_batch_size", str(micro_batch)])) == {0}
    for record, expected in zip(records(run_of(tiny))[1:], records(straight)[1:], strict=True):
        assert [record.get(key) for key in ("step", "tokens", "lr")] == [expected.get(key) for key in ("step", "tokens", "lr")]
        for key in {"loss", "val_loss"} & expected.keys():
            assert record[key] == pytest.approx(expected[key], rel=1e-6)


def test_resuming_between_two_logging_steps_changes_no_line(tiny):
    """The checkpoint holds the sums of the unfinished interval."""
    tiny = ["--log.every_steps", "7", "--checkpoint.every_steps", "5", *tiny]
    assert run_ranks(2, train_here, [*tiny, "--run.name", "straight"]) == [0, 0]
    shutil.copytree(run_of(tiny, "straight"), run_of(tiny))
    shutil.rmtree(run_of(tiny) / "checkpoints" / "step_00000020")  # as if it had been killed after step 15
    assert run_ranks(2, train_here, tiny) == [0, 0]
    assert (run_of(tiny) / "checkpoints" / "step_00000020").is_dir()
    assert curve(run_of(tiny)) == curve(run_of(tiny, "straight"))


def test_a_finished_run_trains_no_further_step_and_keeps_the_best_checkpoint(tiny, capsys):
    tiny = ["--evaluate.every_steps", "4", "--checkpoint.keep_last", "1", *tiny]
    assert train_here(tiny, picture=True) == 0
    before = (run_of(tiny) / "metrics.jsonl").read_bytes()
    saved = {path.name for path in (run_of(tiny) / "checkpoints").iterdir()}
    losses = {record["step"]: record["val_loss"] for record in records(run_of(tiny)) if "val_loss" in record}
    assert saved == {"step_00000020", f"step_{min(losses, key=losses.get):08d}"}
    assert train_here(tiny) == 0
    assert (run_of(tiny) / "metrics.jsonl").read_bytes() == before
    text = capsys.readouterr().out
    assert (run_of(tiny) / "plots" / "loss.png").stat().st_size > 10_000
    assert "first loss 4." in text and "expected for an untrained model: ln(64) = 4.159; OK" in text
    assert "ranks 1 x micro-batch 2 x accumulation 4" in text and "validation loss" in text


def test_the_settings_in_the_run_folder_start_the_same_run(tiny, tmp_path):
    assert train_here(tiny) == 0
    written = load(["--config", str(run_of(tiny) / "config.yaml")])
    assert schema.to_dict(written) == schema.to_dict(load(tiny))


def test_diverging_stops_with_70_and_names_the_samples(tiny, capsys):
    assert train_here([*tiny, *DIVERGING]) == 70
    said = capsys.readouterr().err
    assert "not finite in the last 3 steps up to step" in said and "samples" in said
    assert json.loads((run_of(tiny) / "run_state.json").read_text())["exit_status"] == 70


def test_a_second_job_on_the_same_folder_is_refused(tiny, capsys):
    held = RunDirectory(run_of(tiny))
    assert train_here(tiny) == 73
    assert f"is in use by process {os.getpid()}" in capsys.readouterr().err
    assert not (run_of(tiny) / "metrics.jsonl").exists()
    del held


# ---------------------------------------------------------------- refused


@pytest.fixture(scope="module")
def text_data(tmp_path_factory) -> Path:
    """A tokenizer, its data, and a second tokenizer, made by the tools."""
    folder = tmp_path_factory.mktemp("text")
    words = [f"the {a} of {b} is {c}\n" for a in ("cat", "dog", "sum") for b in ("Rome", "bread", "two") for c in range(40)]
    (folder / "text.txt").write_text("".join(words))
    (folder / "other.txt").write_text("".join(reversed(words)) + "zzz quite other words " * 50)
    for name in ("text", "other"):
        flags = ["--input", folder / f"{name}.txt", "--output", folder / f"{name}_tokenizer", "--vocab-size", 300]
        run_tool("train_tokenizer.py", *flags)
    flags = ["--input", folder / "text.txt", "--tokenizer", folder / "text_tokenizer", "--output", folder / "text"]
    run_tool("tokenize_corpus.py", *flags)
    return folder


def run_tool(name: str, *arguments) -> None:
    subprocess.run([sys.executable, ROOT / "tools" / name, *map(str, arguments)], check=True, capture_output=True)


def main_of_launch_script(argv: list[str], monkeypatch) -> int:
    spec = importlib.util.spec_from_file_location("launch_pretrain", ROOT / "launch" / "pretrain.py")
    monkeypatch.setattr(sys, "argv", ["launch/pretrain.py", *argv])
    monkeypatch.setattr(sys, "path", [str(ROOT / "launch"), *sys.path])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return command_line.run(module.main)


TEXT = ["--data.synthetic", "null", "--model.vocab_size", "null"]
OURS = [*TEXT, "--tokenizer.path", "{d}/text_tokenizer", "--data.train", "[{path: {d}/text}]"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--optimizr.lr", "3"], ["optimizr", "optimizer"]),
        (["--optimizer.lr", "fast"], ["optimizer.lr", "'fast'"]),
        (["--batch.micro_batch_size", "3"], ["global_batch_size", "micro_batch_size", "3 x 1 = 3"]),
        ([*OURS, "--data.train", "[{path: {d}/missing}]"], ["{d}/missing"]),
        ([*OURS, "--tokenizer.path", "{d}/other_tokenizer"], ["{d}/text_tokenizer", "tokenizer.path"]),
        ([*OURS, "--tokenizer.path", "{d}/nowhere"], ["{d}/nowhere"]),
        (["--data.synthetic", "null", "--data.train", "[{path: {d}/text}]"], ["{d}/text", "vocab_size", "63"]),
        ([*OURS, "--data.sequence_length", "1000000"], ["{d}/text", "1,000,001"]),
        (["--train.max_steps", "null", "--train.epochs", "1e-6", "--schedule.warmup_steps", "9"], ["warmup_steps", "1 steps"]),
        (["--run.directory", "/proc/nowhere"], ["/proc/nowhere"]),
        (["--checkpoint.resume", "{d}/step_00000001"], ["{d}/step_00000001"]),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_with_status_2_and_names_key_file_and_number(tiny, text_data, monkeypatch, capsys, flags, named):
    flags = [flag.replace("{d}", str(text_data)) for flag in flags]
    assert main_of_launch_script([*tiny, *flags], monkeypatch) == 2
    error = capsys.readouterr().err
    missing = [word for word in named if word.replace("{d}", str(text_data)) not in error]
    assert not missing and "Traceback" not in error, error
    assert not (run_of(tiny) / "checkpoints").exists()


def test_resuming_with_another_architecture_or_other_data_is_refused(tiny, capsys):
    assert train_here([*tiny, "--train.max_steps", "4"]) == 0
    assert train_here([*tiny, "--model.hidden_size", "64", "--train.max_steps", "4"]) == 2
    assert "model.hidden_size: 32 -> 64" in capsys.readouterr().err
    assert train_here([*tiny, "--run.seed", "5", "--train.max_steps", "4"]) == 2
    assert "run.seed: 1234 -> 5" in capsys.readouterr().err
    assert train_here(tiny) == 2
    error = capsys.readouterr().err
    assert "train.max_steps: 4 -> 20" in error and "--checkpoint.allow_changes" in error
    assert train_here([*tiny, "--checkpoint.allow_changes", "[train.max_steps]"]) == 0
    assert records(run_of(tiny))[-1]["step"] == 20
    assert train_here([*tiny, "--checkpoint.resume", "never"]) == 2
    assert "checkpoint.resume" in capsys.readouterr().err


def test_training_on_real_text_learns(text_data, tiny, capsys):
    flags = [*TEXT, "--tokenizer.path", f"{text_data}/text_tokenizer", "--data.train", f"[{{path: {text_data}/text}}]"]
    flags += ["--data.valid", f"[{{path: {text_data}/text}}]", "--evaluate.max_batches", "null", "--train.max_steps", "60"]
    assert train_here([*tiny, *flags]) == 0
    last = [record for record in records(run_of(tiny)) if "val_loss" in record][-1]
    assert last["val_loss"] < 0.5 * records(run_of(tiny))[1]["loss"] and last["val_bits_per_byte"] > 0
    assert "val_loss" in json.loads((run_of(tiny) / "checkpoints" / "step_00000060" / "state.json").read_text())
