"""The figures of tasks are those of lm-eval on the converted model, item by item, with tokenizers of several kinds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from launch import evaluate as program
from pretrain.config import EngineConfig
from pretrain.data.tasks import open_tasks
from pretrain.engines.start import start_engine
from pretrain.evaluate import load
from pretrain.interop.convert import export_model
from pretrain.interop.load import open_hf_folder, open_run
from pretrain.tasks import log_likelihoods
from tests.models import make_hf_folder, make_run, make_tokenizer, model_of
from tools import make_tasks

lm_eval = pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TEXT = "the quick brown fox jumps over a lazy dog def area radius return 3.14159 café 漢字 <s> **"
WORDS = [*TEXT.split(), "\n"]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
num_fewshot: 0
target_delimiter: "{delimiter}"
"""
CHOICE = (
    COMMON
    + """
task: {name}
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: acc_bytes}}]
"""
)
CLOZE = (
    COMMON
    + """
task: {name}
output_type: multiple_choice
doc_to_text: "{{{{gold}}}}"
doc_to_choice: "{{{{contexts}}}}"
doc_to_target: "{{{{end}}}}"
metric_list: [{{metric: acc}}]
"""
)
EXACT = (
    COMMON
    + """
task: {name}
output_type: loglikelihood
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{end}}}}"
metric_list: [{{metric: acc}}, {{metric: perplexity}}]
"""
)


def byte_level(folder: Path, corpus: list[str]) -> None:
    """As GPT-2: byte-level BPE without special tokens around a text."""
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(corpus, vocab_size=310, special_tokens=["<|endoftext|>"])
    trained.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def with_first_token(folder: Path, corpus: list[str]) -> None:
    """As Llama 3: byte-level BPE that puts a token before each text."""
    from tokenizers import Tokenizer, processors

    byte_level(folder, corpus)
    found = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found.add_special_tokens(["<s>"])
    first = found.token_to_id("<s>")
    found.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", first)])
    found.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def with_space_in_front(folder: Path, corpus: list[str]) -> None:
    """As Llama 2: a space becomes a symbol, which also stands before each text; bytes spell what has no piece."""
    from tokenizers import SentencePieceBPETokenizer

    trained = SentencePieceBPETokenizer()
    trained.train_from_iterator(corpus, vocab_size=300, special_tokens=["<unk>", "</s>"])
    trained.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(
    scope="module",
    params=[
        "own",
        "with_first_token",
        *(pytest.param(name, marks=pytest.mark.release) for name in ("byte_level", "with_space_in_front")),
    ],
)
def folder(request, tmp_path_factory) -> Path:
    """A Hugging Face folder with a tokenizer."""
    made = tmp_path_factory.mktemp(request.param)
    run = make_run(made / "run", model_of("qwen3"), make_tokenizer(made / "own"))
    if request.param == "own":
        export_model(open_run(run), made / "model")
        return made / "model"
    (made / "other").mkdir()
    draw = random.Random(0)
    globals()[request.param](made / "other", [" ".join(draw.choices(WORDS, k=30)) for _ in range(100)])
    return make_hf_folder(made / "model", open_run(run).weights, tokenizer_folder=made / "other")


def write_lm_eval_tasks(folder: Path) -> dict[str, str]:
    """Writes tasks of each kind, with and without a delimiter. -> the kind of each."""
    draw, kinds = random.Random(1), {}

    def text(least: int, most: int) -> str:
        words = draw.choices(WORDS, k=draw.randint(least, most) - 1)
        return " ".join([draw.choice(WORDS[:-1]), *words])  # lm-eval refuses a text of spaces only

    for number, delimiter in enumerate((" ", "")):
        for kind, template in (("choice", CHOICE), ("cloze", CLOZE), ("exact", EXACT)):
            name, space = f"local_{kind}_{number}", "" if delimiter else " "
            rows = []
            for row in range(16):
                count = 2 + row % 3
                question = ["", "ends in spaces  ", "the lazy\n"][row] if row < 3 else text(1, 14)
                if row == 4:
                    question = text(60, 80)  # longer than the model's context of 64 tokens
                rows.append({"q": question, "end": space + text(1, 4), "gold": draw.randrange(2)})
                rows[-1] |= {"choices": [space + text(1, 5) for _ in range(count)], "contexts": [text(2, 8), text(2, 8)]}
            if kind == "cloze":
                rows = rows[3:]
            (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
            text_of = template.format(name=name, path=folder / f"{name}.json", delimiter=delimiter)
            (folder / f"{name}.yaml").write_text(text_of)
            kinds[name] = kind
    return kinds


def test_every_likelihood_and_every_figure_is_that_of_lm_eval(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "lm_eval").mkdir()
    kinds = write_lm_eval_tasks(tmp_path / "lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    from lm_eval.tasks import TaskManager

    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=list(kinds),
        task_manager=TaskManager(include_path=str(tmp_path / "lm_eval")),
        batch_size=4,
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
    )
    common = ["--include-path", str(tmp_path / "lm_eval"), "--output", str(tmp_path / "tasks")]
    make_tasks.main(["--lm-eval", ",".join(kinds), *common])
    program.main(["--model", str(folder), "--tasks", str(tmp_path / "tasks"), "--output", str(tmp_path / "figures.json")])
    ours = json.loads((tmp_path / "figures.json").read_text())["tasks"]

    trained = open_hf_folder(folder)
    tasks = open_tasks([str(tmp_path / "tasks")], trained.load_tokenizer(), 64, trained.model.vocab_size)
    engine = start_engine(EngineConfig(name="ddp", precision="fp32", compile="none"))
    load(engine, trained)
    nats, hits = log_likelihoods(engine, tasks, 256)
    engine.close()
    first = 0
    for task in tasks:
        samples = sorted(theirs["samples"][task.name], key=lambda sample: sample["doc_id"])
        found = [result for sample in samples for result in sample["resps"]]
        likelihoods, greedy = zip(*((float(one[0][0]), one[0][1]) for one in found), strict=True)
        end = first + len(found)
        np.testing.assert_allclose(-nats[first:end], likelihoods, rtol=2e-5, atol=2e-5)
        assert hits[first:end].tolist() == [str(each) == "True" for each in greedy]
        first = end
        result = theirs["results"][task.name]
        assert ours[task.name]["accuracy"] == pytest.approx(result["acc,none"])
        if kinds[task.name] == "choice":
            assert ours[task.name]["accuracy_per_character"] == pytest.approx(result["acc_norm,none"])
            assert ours[task.name]["accuracy_per_byte"] == pytest.approx(result["acc_bytes,none"])
    assert first == len(nats) and torch.isfinite(torch.from_numpy(nats)).all()
    assert sum(task.truncated for task in tasks) > 0


def test_examples_before_a_question_are_those_of_lm_eval(tmp_path, monkeypatch):
    kinds = write_lm_eval_tasks(tmp_path)
    for name in kinds:  # a definition that asks for none gets none
        definition = tmp_path / f"{name}.yaml"
        definition.write_text(
            definition.read_text().replace("num_fewshot: 0\n", "" if name.endswith("0") else "num_fewshot: 0\n")
        )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tmp_path))
    theirs = lm_eval.simple_evaluate(
        model="dummy", tasks=list(kinds), num_fewshot=2, task_manager=manager, log_samples=True, bootstrap_iters=0
    )["samples"]
    common = ["--include-path", str(tmp_path), "--num-fewshot", "2", "--output", str(tmp_path / "tasks")]
    make_tasks.main(["--lm-eval", ",".join(kinds), *common])
    for name in kinds:
        items = [json.loads(line) for line in (tmp_path / "tasks" / f"{name}.jsonl").read_text().splitlines()]
        samples = sorted(theirs[name], key=lambda sample: sample["doc_id"])
        for item, sample in zip(items, samples, strict=True):
            asked = sample["arguments"].values() if isinstance(sample["arguments"], dict) else sample["arguments"]
            expected = ["".join(one.values() if isinstance(one, dict) else one) for one in asked]
            assert [context + continuation for context, continuation in make_tasks.pairs(item)] == expected
