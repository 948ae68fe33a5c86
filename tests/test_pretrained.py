"""Trained models from start to end: training from given weights equals a plain loop of transformers, and the results convert,
serve, generate and measure without manual work."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

from pretrain import config as settings
from pretrain.config import ConfigError, DataConfig, EngineConfig, SourceConfig
from pretrain.data import tokenizer_training
from pretrain.data.batches import open_train
from pretrain.data.indexed import TokenFile
from pretrain.data.tokenizer import Tokenizer
from pretrain.engines.start import start_engine
from pretrain.evaluate import score
from pretrain.generate import generate
from pretrain.interop.convert import export_model, import_model
from pretrain.interop.load import open_hf_folder, open_run
from pretrain.interop.weights import load_transformer
from pretrain.optim.schedule import lr_at
from tests.models import V, make_tokenizer, score_here, train_here, write_token_file
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]
SENTENCE = "the quick brown fox jumps over a lazy dog while seven wizards brew dark coffee for nine old men"
WORDS = SENTENCE.split()
LENGTH = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A tokenizer, and token files of 600 short documents for training and 60 for validation."""
    folder = tmp_path_factory.mktemp("text")
    make_tokenizer(folder / "tokenizer")
    return write_tokens(folder)


def write_tokens(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, count in (("train", 600), ("valid", 60)):
        documents = [" ".join(rng.choice(WORDS, rng.integers(5, 30))) for _ in range(count)]
        write_token_file(folder / "tokenizer", documents, folder / name)
    return folder


def token_files(text: Path) -> list[str]:
    return [str(text / name) for name in ("valid", "train")]


def flags(text: Path, runs: Path, name: str, steps: int, *more: str) -> list[str]:
    given = {
        "run.name": name,
        "run.directory": str(runs),
        "tokenizer.path": str(text / "tokenizer"),
        "data.train": f"[{{path: {text / 'train'}}}]",
        "data.valid": f"[{{path: {text / 'valid'}}}]",
        "data.sequence_length": str(LENGTH),
        "batch.global_batch_size": "8",
        "batch.micro_batch_size": "4",
        "train.max_steps": str(steps),
        "optimizer.lr": "3e-3",
        "engine.precision": "fp32",
        "log.every_steps": "1",
        "checkpoint.every_steps": "10",
        "checkpoint.keep_last": "4",
    }
    return [word for key, value in given.items() for word in (f"--{key}", value)] + list(more)


SMALL = ["--model.hidden_size", "48", "--model.num_hidden_layers", "2", "--model.num_attention_heads", "4"]
SMALL += ["--model.num_key_value_heads", "2", "--model.qk_norm", "true"]


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture(scope="module")
def base(text, tmp_path_factory) -> Path:
    """A run of 40 steps, with checkpoints at 10, 20, 30 and 40."""
    runs = tmp_path_factory.mktemp("runs")
    assert train_here(flags(text, runs, "base", 40, *SMALL)) == 0
    return runs / "base"


@pytest.fixture(scope="module")
def folder(base) -> Path:
    export_model(open_run(base), base.parent / "hf")
    return base.parent / "hf"


# ---------------------------------------------------------------- training from given weights


def peer_losses(folder: Path, text: Path, steps: int) -> list[float]:
    """A plain loop with transformers and PyTorch alone, on the same batches and with the same weight decay."""
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    embeddings = model.get_input_embeddings().weight
    decayed = [each for each in model.parameters() if each.ndim > 1 and each is not embeddings]
    plain = [each for each in model.parameters() if each.ndim == 1 or each is embeddings]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    tokenizer = Tokenizer.load(text / "tokenizer")
    data = DataConfig(train=[SourceConfig(path=str(text / "train"))], sequence_length=LENGTH)
    stream = open_train(data, seed=1234, vocab_size=V, tokenizer_fingerprint=tokenizer.fingerprint)
    schedule, found = settings.ScheduleConfig(), []
    for step in range(1, steps + 1):
        batch = stream.take((step - 1) * 8, 8)
        loss = F.cross_entropy(model(batch.tokens_BT).logits.flatten(0, 1), batch.labels_BT.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, schedule, 3e-3, steps)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_training_from_a_folder_equals_a_plain_loop_with_transformers(folder, text, tmp_path):
    argv = flags(text, tmp_path, "on", 50, "--model.from_pretrained", str(folder))
    assert train_here(argv) == 0
    ours = losses(tmp_path / "on")
    assert ours == pytest.approx(peer_losses(folder, text, 50), rel=1e-4)
    assert ours[0] < 0.6 * math.log(V), "training must start from the trained weights"


def test_a_run_a_checkpoint_a_folder_and_its_conversion_start_with_the_same_losses(base, folder, text, tmp_path):
    import_model(folder, tmp_path / "converted")
    firsts = []
    for number, source in enumerate((folder, base, base / "checkpoints" / "step_00000040", tmp_path / "converted")):
        engine = ["--engine.name", "fsdp2"] if number == 0 else []
        argv = flags(text, tmp_path, f"r{number}", 2, "--model.from_pretrained", str(source), *engine)
        assert (run_ranks(2, train_here, argv) if number == 0 else [train_here(argv)])[0] == 0
        firsts.append(losses(tmp_path / f"r{number}"))
    assert np.ptp(firsts, axis=0) == pytest.approx([0, 0], abs=1e-5)


def test_a_run_from_a_folder_resumes_without_that_folder(folder, text, tmp_path):
    shutil.copytree(folder, mine := tmp_path / "hf")
    assert train_here(flags(text, tmp_path / "a", "on", 20, "--model.from_pretrained", str(mine))) == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "on" / "checkpoints" / "step_00000020")
    shutil.rmtree(mine)
    resumed = tmp_path / "b" / "on" / "config.yaml"
    assert train_here(["--config", str(resumed), "--run.directory", str(tmp_path / "b")]) == 0
    assert losses(tmp_path / "b" / "on") == losses(tmp_path / "a" / "on")
    with pytest.raises(ConfigError, match=r"model\.from_pretrained: "):
        settings.load(flags(text, tmp_path, "new", 20, "--model.from_pretrained", str(mine)))


def test_a_larger_tokenizer_makes_the_model_larger(base, tmp_path):
    words = "this text adds twenty more pieces: numbers, letters, sentences, and other things " * 20
    tokenizer_training.train([words, SENTENCE * 30], tmp_path / "t", vocab_size=V + 40, describe=dict)
    argv = ["--model.from_pretrained", str(base), "--tokenizer.path", str(tmp_path / "t"), "--run.directory", str(tmp_path)]
    argv += ["--data.synthetic.kind", "uniform", "--data.sequence_length", "16", "--train.max_steps", "1"]
    argv += ["--batch.global_batch_size", "2", "--batch.micro_batch_size", "2", "--optimizer.lr", "1e-12"]
    argv += ["--engine.precision", "fp32"]
    assert train_here(argv) == 0
    before, after = (load_transformer(open_run(run).weights) for run in (base, tmp_path / "run"))
    assert (before.config.vocab_size, after.config.vocab_size) == (V, V + 40)
    old, new = before.model.embed_tokens.weight[:V], after.model.embed_tokens.weight
    torch.testing.assert_close(new[:V], old, atol=1e-9, rtol=0)
    torch.testing.assert_close(new[V : V + 40], old.mean(0).expand(40, -1), atol=1e-6, rtol=0)


def test_a_published_model_with_more_ids_than_its_tokenizer_trains_and_converts(text, tmp_path):
    """Like published models it is written by transformers alone: its tokenizer has none of our files."""
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(text / "tokenizer" / name, tmp_path / "tokenizer")
    sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    published = LlamaForCausalLM(LlamaConfig(vocab_size=V + 30, tie_word_embeddings=True, **sizes))
    published.save_pretrained(tmp_path / "published", dtype=torch.bfloat16)
    AutoTokenizer.from_pretrained(tmp_path / "tokenizer").save_pretrained(tmp_path / "published")
    shutil.copytree(tmp_path / "published", tmp_path / "tokenizer", dirs_exist_ok=True)
    write_tokens(tmp_path)
    argv = flags(tmp_path, tmp_path / "runs", "on", 2, "--model.from_pretrained", str(tmp_path / "published"))
    assert train_here(argv) == 0
    assert losses(tmp_path / "runs" / "on") == pytest.approx([math.log(V + 30)] * 2, rel=0.1)
    found = export_model(open_run(tmp_path / "runs" / "on"), tmp_path / "out", dtype="bf16")["compared"]
    assert found["tokenizer"]["ids"] > 50
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert back.get_input_embeddings().weight.shape[0] == V + 30
    assert not list((tmp_path / "out").glob("model-*")) and (tmp_path / "out" / "tokenizer.json").exists()
    rows = score_here(tmp_path / "out", token_files(tmp_path), LENGTH, "ddp")
    assert rows[-1]["loss"] == pytest.approx(math.log(V + 30), rel=0.1)


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        (["--model.hidden_size", "64"], r"model\.hidden_size: .*64.* 48"),
        (["--model.rope_theta", "5e5"], r"model\.rope_theta: .*500000.* 10000"),
        (["--model.head_dim", "null"], None),
        (["--model.vocab_size", "100"], rf"model\.vocab_size: .*100.* {V}"),
        (["--model.vocab_size", "1000"], None),
        (["--model.moe", "{num_experts: 4}"], r"model\.moe\.num_experts: .*4"),
        (["--model.qk_norm", "false"], r"model\.qk_norm: "),
        (["--model.max_position_embeddings", "4096"], None),
    ],
)
def test_only_settings_that_contradict_the_folder_are_refused(given, refused, folder, text, tmp_path):
    argv = flags(text, tmp_path, "x", 5, "--model.from_pretrained", str(folder), *given)
    if refused is None:
        model = settings.load(argv).model
        assert (model.hidden_size, model.num_hidden_layers, model.qk_norm) == (48, 2, True)
        return
    with pytest.raises(ConfigError, match=refused):
        settings.load(argv)


# ---------------------------------------------------------------- using a trained model


def test_the_pipeline_of_transformers_serves_a_trained_model(folder, text):
    served = pipeline("text-generation", model=str(folder))
    prompt = "the quick brown"
    found = served(prompt, max_new_tokens=12, do_sample=False)[0]["generated_text"]
    trained = open_hf_folder(folder)
    tokenizer = Tokenizer.load(text / "tokenizer")
    ids = tokenizer.encode(prompt)
    mine = generate(load_transformer(trained.weights), ids, 12, temperature=0, stop_ids={tokenizer.end_of_document_id})
    assert found == tokenizer.decode([*ids, *mine])
    assert any(word in found[len(prompt) :].split() for word in WORDS)
    copied = AutoTokenizer.from_pretrained(folder)
    assert copied.bos_token_id == copied.eos_token_id == tokenizer.end_of_document_id


def test_run_and_folder_have_the_loss_that_transformers_computes_on_any_number_of_ranks(base, folder, text):
    files = token_files(text)
    one = score_here(base, files, LENGTH, "ddp")
    for rows in (*run_ranks(2, score_here, folder, files, LENGTH, "fsdp2"), score_here(folder, files, LENGTH, "ddp")):
        for row, expected in zip(rows, one, strict=True):
            assert row.pop("source") == expected["source"]
            assert row == pytest.approx({key: value for key, value in expected.items() if key != "source"}, rel=1e-6)
    model, nats, labels = AutoModelForCausalLM.from_pretrained(folder), 0.0, 0
    file = TokenFile(text / "valid")
    tokens = torch.from_numpy(file.read([0], [file.num_tokens]).astype(np.int64))
    with torch.inference_mode():
        for start in range(0, len(tokens) - 1, LENGTH):
            window = tokens[start : start + LENGTH + 1]
            nats += F.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="sum").item()
            labels += len(window) - 1
    valid = one[0]
    assert [row["source"] for row in one] == ["valid", "train", "all"]
    assert valid["loss"] == pytest.approx(nats / labels, rel=1e-5)
    assert valid["perplexity"] == pytest.approx(math.exp(nats / labels), rel=1e-4)
    sidecar = TokenFile(text / "valid").sidecar
    assert valid["bits_per_byte"] == pytest.approx(valid["loss"] / math.log(2) * sidecar.num_tokens / sidecar.utf8_bytes)


def test_the_mean_of_checkpoints_can_be_measured(base, text):
    data = DataConfig(valid=[SourceConfig(path=str(text / "valid"))], sequence_length=LENGTH)
    found = []
    for average in (1, 2):
        engine = start_engine(EngineConfig(name="ddp"))
        found.append(score(engine, open_run(base, average=average), data, 8)[0]["loss"])
        engine.close()
    assert found[0] != found[1] and abs(found[1] - found[0]) < 0.5


# ---------------------------------------------------------------- commands


def run_script(monkeypatch, *words: object) -> int:
    """Runs a script in this process, which has imported torch already, and returns its exit status."""
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(words[0]), run_name="__main__")
    return end.value.code


def test_the_commands_convert_measure_and_generate(base, text, tmp_path, monkeypatch, capsys):
    convert = ("tools/convert_checkpoint.py", "--run", base, "--average", 2, "--dtype", "bf16", "--output", tmp_path / "hf")
    assert run_script(monkeypatch, *convert) == 0
    made_from = json.loads((tmp_path / "hf" / "certificate.json").read_text())["made_from"]
    assert made_from == {"run": "base", "step": 40, "mean_of_steps": [30, 40]}
    assert run_script(monkeypatch, *convert) == 2
    assert "exists already" in capsys.readouterr().err
    assert run_script(monkeypatch, "tools/convert_checkpoint.py", "--model", tmp_path / "hf", "--output", tmp_path / "r") == 0

    output = tmp_path / "figures.json"
    measured = ("launch/evaluate.py", "--data", text / "valid", "--output", output)
    assert run_script(monkeypatch, *measured, "--model", tmp_path / "hf") == 0
    first = json.loads(output.read_text())["loss"]
    assert "bits/byte" in capsys.readouterr().out and first[0]["source"] == "valid"
    assert run_script(monkeypatch, *measured, "--run", tmp_path / "r") == 0
    assert json.loads(output.read_text())["loss"] == first
    own = ("launch/evaluate.py", "--run", base, "--sequence-length", LENGTH // 2, "--output", output)
    assert run_script(monkeypatch, *own) == 0  # without --data: on the validation data of the run
    found = json.loads(output.read_text())
    assert found["sequence_length"] == LENGTH // 2 and found["loss"][0]["samples"] > 1.9 * first[0]["samples"]

    capsys.readouterr()
    words = ("--prompt", "the quick", "--prompt", "seven", "--max-new-tokens", 8, "--temperature", 0)
    assert run_script(monkeypatch, "launch/generate.py", "--model", tmp_path / "hf", *words) == 0
    shown = capsys.readouterr()
    texts = shown.out.rstrip("\n").split("\n\n")
    assert texts[0].startswith("the quick") and texts[1].startswith("seven") and "tokens/s" in shown.err
    (tmp_path / "p.jsonl").write_text('{"prompt": "the quick"}\n{"prompt": "seven"}\n')
    words = ("--prompts-file", tmp_path / "p.jsonl", "--output", tmp_path / "o.jsonl", *words[4:])
    assert run_script(monkeypatch, "launch/generate.py", "--model", tmp_path / "hf", "--batch-size", 1, *words) == 0
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [line["prompt"] + line["text"] for line in lines] == texts

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the quick\nseven\n")))
    words = ("--prompts-file", "-", *words[4:])
    assert run_script(monkeypatch, "launch/generate.py", "--run", tmp_path / "r", *words) == 0
    assert capsys.readouterr().out.startswith("the quick")


def test_a_folder_configures_prompts_and_stop_ids_as_for_transformers(folder, tmp_path, monkeypatch, capsys):
    """Like chat models it has several stop ids; truncation in tokenizer.json does not apply to prompts."""
    shutil.copytree(folder, copy := tmp_path / "hf")
    prompt = "the quick\u2028brown fox jumps over"
    tokenizer = AutoTokenizer.from_pretrained(copy)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    end = AutoModelForCausalLM.from_pretrained(copy).generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] + 3]
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, int(end)]}))
    settings = json.loads((copy / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (copy / "tokenizer.json").write_text(json.dumps(settings | {"truncation": cut}))
    served = pipeline("text-generation", model=str(copy))(prompt, max_new_tokens=9, do_sample=False)[0]["generated_text"]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    words = ["--model", copy, "--max-new-tokens", 9, "--temperature", 0, "--prompts-file", tmp_path / "p.jsonl"]
    assert run_script(monkeypatch, "launch/generate.py", *words, "--output", tmp_path / "o.jsonl") == 0
    [line] = (tmp_path / "o.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert prompt + json.loads(line)["text"] + tokenizer.decode(end) == served, "transformers also returns the stop id"
    assert run_script(monkeypatch, "launch/generate.py", *words, "--output", tmp_path / "o.jsonl") == 2
    assert "already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["tools/convert_checkpoint.py", "--run", "RUN", "--output", "OUT", "--step", "7"], "40, 30, 20, 10"),
        (["tools/convert_checkpoint.py", "--run", "OUT", "--output", "OUT2"], "OUT"),
        (["tools/convert_checkpoint.py", "--model", "OUT", "--output", "OUT2"], "config.json"),
        (["tools/convert_checkpoint.py", "--model", "HF", "--output", "OUT2", "--dtype", "bf16"], "--dtype"),
        (["launch/evaluate.py", "--model", "HF"], "give --data or --tasks"),
        (["launch/evaluate.py", "--run", "RUN", "--data", "OUT"], "OUT"),
        (["launch/evaluate.py", "--run", "RUN", "--output", "OUT/o"], "--output"),
        (["launch/evaluate.py", "--model", "OUT", "--tasks", "any"], "config.json"),
        (["launch/evaluate.py", "--run", "RUN", "--micro-batch-size", "0"], "--micro-batch-size"),
        (["launch/generate.py", "--run", "RUN"], "--prompts-file"),
        (["launch/generate.py", "--run", "RUN", "--prompt", "a", "--temperature", "-1"], "--temperature"),
        (["launch/generate.py", "--run", "RUN", "--prompt", "a", "--top-p", "2"], "--top-p"),
        (["launch/generate.py", "--run", "RUN", "--prompt", "a", "--device", "abacus"], "--device"),
        (["launch/generate.py", "--model", "HF", "--prompts-file", "OUT"], "OUT"),
        (["launch/generate.py", "--model", "HF", "--prompts-file", os.devnull], os.devnull),
        (["launch/generate.py", "--model", "HF", "--prompt", "a", "--output", "OUT/o"], "--output"),
    ],
)
def test_a_refused_command_names_the_cause_and_writes_nothing(words, named, base, folder, tmp_path, monkeypatch, capsys):
    names = {"RUN": base, "HF": folder, "OUT": tmp_path / "out", "OUT2": tmp_path / "out2", "OUT/o": tmp_path / "out" / "o"}
    assert run_script(monkeypatch, *(names.get(word, word) for word in words)) == 2
    shown = capsys.readouterr().err
    assert str(names.get(named, named)) in shown and "Traceback" not in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_leaves_no_output(how, base, tmp_path):
    words = [sys.executable, "tools/convert_checkpoint.py", "--run", base, "--output", tmp_path / "hf"]
    default = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # shells let background jobs ignore it
    converting = subprocess.Popen(list(map(str, words)), cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=default)
    while not list(tmp_path.iterdir()):
        assert converting.poll() is None
        time.sleep(0.02)
    converting.send_signal(how)
    assert "interrupted" in converting.communicate(timeout=60)[1]
    assert converting.returncode == 130 and not list(tmp_path.iterdir())


def test_a_bug_in_a_command_keeps_its_traceback(folder, monkeypatch):
    """Only UserError and OSError are for the user: a ValueError in our own code must not end as status 2."""
    monkeypatch.setattr("pretrain.generate.generate_batch", lambda *_, **__: int("a bug"))
    monkeypatch.setattr("pretrain.evaluate.score", lambda *_, **__: int("a bug"))
    monkeypatch.setattr("pretrain.interop.convert.open_hf_folder", lambda *_: int("a bug"))
    for words in (
        ["launch/generate.py", "--prompt", "a"],
        ["launch/evaluate.py", "--data", "x"],
        ["tools/convert_checkpoint.py", "--output", folder.parent / "never"],
    ):
        with pytest.raises(ValueError, match="a bug"):
            run_script(monkeypatch, *words, "--model", folder)


@pytest.mark.slow
def test_several_processes_measure_the_same_as_one(base, text, tmp_path):
    measured = ["launch/evaluate.py", "--run", base, "--data", text / "valid", text / "train", "--output"]
    launchers = {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu.yaml"],
    }
    found = {}
    for name, launcher in launchers.items():
        words = list(map(str, [*launcher, *measured, tmp_path / name]))
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=170)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("bits/byte") == 1
        found[name] = [row["loss"] for row in json.loads((tmp_path / name).read_text())["loss"]]
    assert found["one"] == pytest.approx(found["two"], rel=1e-6)


@pytest.mark.slow
def test_lm_eval_tasks_run_without_a_network(base, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    questions = [{"q": "the quick brown", "choices": [" fox", " qzj"], "gold": 0} for _ in range(8)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "local.yaml").write_text(
        f"""
task: local_fox
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "q.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    output = tmp_path / "figures.json"
    words = ["--run", base, "--tasks", "local_fox", "--include-path", tmp_path, "--output", output]
    assert run_script(monkeypatch, "launch/evaluate.py", *words) == 0
    assert json.loads(output.read_text())["tasks"]["local_fox"]["acc,none"] == 1.0


def test_a_missing_lm_eval_is_reported_with_the_extra_to_install(base, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest))
    assert run_script(monkeypatch, "launch/evaluate.py", "--run", base, "--tasks", "x") == 2
    assert "pip install 'pretrain[eval]'" in capsys.readouterr().err
