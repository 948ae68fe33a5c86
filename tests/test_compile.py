"""What is compiled by default, and how often: once for training and once for validation, whatever happens in a run."""

from __future__ import annotations

import errno
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.config import ConfigError, DataConfig, EngineConfig, OptimizerConfig, SourceConfig, load, resume_class
from pretrain.data.batches import Batch, open_valid
from pretrain.data.tokenizer import Tokenizer
from pretrain.engines import base, compile
from pretrain.engines.start import start_engine
from pretrain.evaluate import evaluate
from pretrain.generate import continue_prompts
from pretrain.model.config import ModelConfig, MoeConfig, resolve_model
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer
from pretrain.run import output, precision, resume
from pretrain.run.parts import open_parts
from pretrain.run.preflight import resume_findings
from pretrain.train import train_step
from tests.models import make_tokenizer, train_here, write_token_file
from tests.ranks import run_ranks
from tests.test_train import run_of

ROOT = Path(__file__).parents[1]
VOCAB, LENGTH = 320, 16  # ids of the tokenizer of tests/models.py
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def traced(monkeypatch):
    """Compiles without a code generator: graphs and breaks are the same, in a tenth of the time."""
    monkeypatch.setattr(base.Engine, "compile_backend", "aot_eager")
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


# ---------------------------------------------------------------- what is compiled by default


@pytest.mark.parametrize(
    ("config", "device", "ranks", "parameters", "what"),
    [
        (EngineConfig(), "cpu", 1, 10**8, "none"),
        (EngineConfig(name="fsdp2"), "cpu", 2, 10**10, "none"),
        (EngineConfig(), "cuda", 1, 10**9, "model"),
        (EngineConfig(), "cuda", 1, 10**9 + 1, "blocks"),
        (EngineConfig(), "cuda", 8, 10**8, "blocks"),
        *((EngineConfig(name=name), "cuda", 1, 10**8, "blocks") for name in ("fsdp2", "zero1", "zero2", "zero3")),
        (EngineConfig(compile="none"), "cuda", 1, 10**8, "none"),
        (EngineConfig(compile="blocks"), "cpu", 1, 10**8, "blocks"),
        (EngineConfig(compile="model"), "cuda", 8, 10**10, "model"),
    ],
)
def test_the_choice_follows_device_engine_ranks_and_size_unless_it_is_set(config, device, ranks, parameters, what):
    assert compile.choose(config, device, ranks, parameters)[0] == what


def test_a_resumed_run_may_change_compile_and_old_settings_keep_their_meaning():
    assert resume_class("engine.compile") == "free" and EngineConfig().compile is None
    assert load(["--config", "tests/fixtures/old_formats/dense/config.yaml"]).engine.compile == "none"


def model_of(**changes) -> ModelConfig:
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2) | changes
    return resolve_model(ModelConfig(**sizes), vocab_size=VOCAB, sequence_length=LENGTH)


def prepared(config: EngineConfig, model: ModelConfig | None = None, optimizer: str = "adamw"):
    engine, model = start_engine(config), model or model_of()
    engine.prepare(
        lambda: Transformer(model), lambda built: build_optimizer(built, OptimizerConfig(name=optimizer)), 1.0, seed=0
    )
    return engine


@pytest.fixture
def without_a_compiler(monkeypatch, tmp_path):
    """Inductor finds no C++ compiler and nothing in a cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    with importlib.import_module("torch._inductor.config").patch({"cpp.cxx": (str(tmp_path / "no-compiler"),)}):
        yield
    torch.compiler.reset()


def test_without_a_compiler_an_explicit_setting_is_refused_before_training(without_a_compiler):
    with pytest.raises(ConfigError) as refusal:
        prepared(EngineConfig(compile="blocks"))
    assert [problem.key for problem in refusal.value.problems] == ["engine.compile"]


def test_without_a_compiler_the_default_trains_uncompiled_and_says_so(without_a_compiler, monkeypatch):
    monkeypatch.setattr(base, "choose", lambda *facts: ("blocks", "the default"))  # as on a GPU
    engine = prepared(EngineConfig())
    assert engine.compiled == "none" and "no-compiler" in engine.compiled_why
    assert train_step(engine, window_of(model_of()), 1e-3).loss_sum.isfinite()


def broken_on_one_rank(explicit: str | None) -> str:
    base.compiler_problem = lambda device: "broken here" if int(os.environ["RANK"]) == 1 else None
    base.choose = lambda *facts: ("blocks", "the default")
    try:
        return prepared(EngineConfig(compile=explicit)).compiled
    except ConfigError as error:
        return error.problems[0].key


def test_all_ranks_follow_the_one_whose_compiler_fails():
    assert run_ranks(2, broken_on_one_rank, None) == ["none", "none"]
    assert run_ranks(2, broken_on_one_rank, "blocks") == ["engine.compile", "engine.compile"]


# ---------------------------------------------------------------- how often


def window_of(model: ModelConfig, documents: bool = False) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    tokens_BT, labels_BT = torch.randint(model.vocab_size, (2, 2, LENGTH), generator=generator)
    labels_BT[0, :3] = -100
    documents_BT = (torch.arange(LENGTH) // 5).expand(2, LENGTH) if documents else None
    return [Batch(tokens_BT, labels_BT, documents_BT)] * 2


MOE = MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
CASES = {
    "dense": {},
    "model": dict(engine=EngineConfig(compile="model")),
    "experts": dict(model=model_of(moe=MOE)),
    "document mask": dict(documents=True),
    "document mask, model": dict(documents=True, engine=EngineConfig(compile="model")),
    "window": dict(model=model_of(sliding_window=8)),
    "window and document mask": dict(model=model_of(sliding_window=8), documents=True),
    "query norm": dict(model=model_of(qk_norm=True, tie_word_embeddings=True)),
    "muon": dict(optimizer="muon"),
    "bf16": dict(engine=EngineConfig(compile="blocks", precision="bf16")),
    "selective": dict(engine=EngineConfig(compile="blocks", activation_checkpointing="selective")),
    "full": dict(engine=EngineConfig(compile="blocks", activation_checkpointing="full")),
    "fsdp2": dict(engine=EngineConfig(name="fsdp2", compile="blocks")),
    "fsdp2 with experts": dict(engine=EngineConfig(name="fsdp2", compile="blocks"), model=model_of(moe=MOE)),
}
FAST = ("dense", "document mask, model", "fsdp2")


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in FAST)])
def test_a_run_compiles_once_for_training_and_once_for_validation(name, traced, tmp_path):
    """Steps, two validations with partial batches, generation, another learning rate: blocks take two graphs for each of
    training and validation (a block, and the loss of a chunk), model takes one."""
    assert life_of(tmp_path, **CASES[name]) == expected(CASES[name])


def expected(case: dict) -> dict:
    each = 1 if "engine" in case and case["engine"].compile == "model" else 2
    return {"steps": each, "validation": 2 * each, "generation": 2 * each, "all": 2 * each, "breaks": 0}


def life_of(folder: Path, engine: EngineConfig | None = None, model: ModelConfig | None = None, documents: bool = False,
            optimizer: str = "adamw") -> dict:  # fmt: skip
    """The number of graphs after each part of a run, and that of graph breaks."""
    count, counters = {}, torch._dynamo.utils.counters
    engine = prepared(engine or EngineConfig(compile="blocks"), model, optimizer)
    window, path = window_of(engine.model.config, documents), make_tokenizer(folder / "tokenizer")
    tokenizer = Tokenizer.load(path)
    write_token_file(path, ["return radius ** 2", "the quick brown fox " * 9, "def area(radius):"], folder / "valid")
    data = DataConfig(valid=[SourceConfig(path=str(folder / "valid"))], sequence_length=LENGTH, document_mask=documents)
    valid = open_valid(data, seed=0, vocab_size=VOCAB, tokenizer_fingerprint=tokenizer.fingerprint)
    for lr in (1e-3, 1e-3, 2e-3):
        train_step(engine, window, lr)
    count["steps"] = compile.graphs()
    evaluate(engine, valid, 2, max_samples=7)  # the last batch has one
    count["validation"] = compile.graphs()
    continue_prompts(engine, tokenizer, ["def area(", "the"], 5)
    count["generation"] = compile.graphs()
    for lr in (5e-4, 0.0):
        train_step(engine, window, lr)
        evaluate(engine, valid, 2, max_samples=3)
    engine.close()
    return count | {"all": compile.graphs(), "breaks": sum(counters["graph_break"].values())}


def test_a_run_reports_its_graphs_and_resuming_compiles_no_more_than_starting(traced, tiny):
    argv = [
        *tiny,
        "--engine.compile",
        "blocks",
        "--evaluate.every_steps",
        "4",
        "--checkpoint.allow_changes",
        "[train.max_steps]",
    ]
    for steps in ("8", "12"):
        torch.compiler.reset()  # as in a new process
        torch._dynamo.utils.counters.clear()
        assert train_here([*argv, "--schedule.name", "constant", "--train.max_steps", steps]) == 0
    lines = [line.split("  ", 1)[1] for line in (run_of(tiny) / "console.log").read_text().splitlines()]
    reports = [line.split(", ", 1)[1] for line in lines if line.startswith("compile ") and "graph" in line]
    assert reports == ["2 graphs, 0 graph breaks", "4 graphs, 0 graph breaks"] * 2
    assert not [line for line in lines if line.startswith("warning")]


def test_a_stage_with_another_shape_compiles_once_more_and_is_no_warning(traced, tiny):
    """The stages begin after steps 2, 4 and 6: another length, another batch of the same shape, another micro-batch."""
    stages = (
        "[{after_steps: 2, sequence_length: 8}, {after_steps: 4, global_batch_size: 16}, {after_steps: 6, micro_batch_size: 1}]"
    )
    argv = ["--engine.compile", "blocks", "--train.stages", stages, "--train.max_steps", "8", "--schedule.name", "constant"]
    assert train_here([*argv, "--evaluate.every_steps", "0", *tiny]) == 0
    lines = [line.split("  ", 1)[1] for line in (run_of(tiny) / "console.log").read_text().splitlines()]
    reports = [line.split(" up to ")[1] for line in lines if line.startswith("compile ") and "up to" in line]
    assert [each.split(", 0 graph breaks")[0] for each in reports] == [
        "step 1, 2 graphs",
        "step 3, 4 graphs",
        "step 7, 6 graphs",
    ]
    assert not [line for line in lines if line.startswith("warning")]


def test_a_graph_compiled_in_mid_run_is_a_warning():
    said: list[str] = []
    run = SimpleNamespace(
        engine=SimpleNamespace(compiled="blocks"),
        graphs={},
        sinks=SimpleNamespace(info=lambda line: said.append(line.split()[0])),
    )
    stats = torch._dynamo.utils.counters["stats"]
    for what, count in (
        ("steps", 2),
        ("steps", 2),
        ("validation", 4),
        ("steps", 4),
        ("validation", 4),
        ("steps", 5),
        ("steps", 5),
    ):
        stats["unique_graphs"] = count
        output._report_compiler(run, what, "here")
    torch._dynamo.utils.counters.clear()
    assert said == ["compile", "compile", "warning"]


# ---------------------------------------------------------------- the compiler's cache


def test_the_cache_is_beside_the_runs_unless_the_user_has_chosen_another(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    compile.keep_cache(tmp_path / ".cache")
    [chosen] = (tmp_path / ".cache").iterdir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(chosen)
    compile.keep_cache(tmp_path / "other")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(chosen)


def test_machines_of_another_kind_have_a_cache_of_their_own(monkeypatch):
    here = compile._machine()
    monkeypatch.setattr(Path, "read_text", lambda path: "flags : fpu sse2")
    assert compile._machine() != here == here.strip("/")


def test_where_files_cannot_be_locked_or_written_the_compiler_keeps_its_default(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    (tmp_path / "file").touch()
    compile.keep_cache(tmp_path / "file" / ".cache")
    monkeypatch.setattr(compile.fcntl, "flock", no_locks)
    compile.keep_cache(tmp_path / ".cache")
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def no_locks(*_) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


COUNT_CACHE = """
import sys, torch
from pretrain.config import load
from pretrain.train import train
assert train(load(sys.argv[1:])) == 0
found = torch._dynamo.utils.counters["inductor"]
print("cache", found["fxgraph_cache_hit"], found["fxgraph_cache_miss"])
"""


@pytest.mark.release
def test_another_run_in_the_folder_compiles_nothing_again(tiny):
    """Two processes, with the real code generator; the second has no graph to generate code for."""
    counts = []
    for name in ("first", "second"):
        command = [sys.executable, "-c", COUNT_CACHE, *tiny, "--run.name", name, "--engine.compile", "blocks"]
        environment = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        counts.append([int(word) for word in done.stdout.splitlines()[-1].split()[1:]])
    assert counts[0][1] >= 4 and counts[1][0] >= 4 and counts[1][1] == 0
    assert {path.name for path in Path(tiny[-1]).iterdir()} == {"first", "second", ".cache"}


# ---------------------------------------------------------------- the precision of a run that leaves it open


def bf16_cpu(monkeypatch, has: bool) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: has)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bf16 on GPUs")
@pytest.mark.parametrize(("has", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_a_new_run_takes_bf16_where_the_cpu_multiplies_it_and_a_resumed_one_keeps_its_precision(has, chosen, tiny, monkeypatch):
    argv = [*tiny, "--engine.precision", "null", "--schedule.name", "constant", "--schedule.warmup_steps", "0"]
    bf16_cpu(monkeypatch, has)
    assert train_here([*argv, "--train.max_steps", "2"]) == 0
    bf16_cpu(monkeypatch, not has)  # another machine
    more = [*argv, "--checkpoint.allow_changes", "[train.max_steps]"]
    assert resume_findings(load(more), open_parts(load(more)), run_of(tiny) / "checkpoints") == []
    assert train_here([*more, "--train.max_steps", "4"]) == 0
    environment = json.loads((run_of(tiny) / "environment.json").read_text())
    assert [start["precision"] for start in environment["starts"]] == [chosen, chosen]
    other = [*more, "--engine.precision", {"bf16": "fp32", "fp32": "bf16"}[chosen]]
    found = resume_findings(load(other), open_parts(load(other)), run_of(tiny) / "checkpoints")
    assert [finding.where for finding in found] == ["engine.precision"] and train_here(other) == ConfigError.status


@pytest.mark.skipif(torch.cuda.is_available(), reason="bf16 on GPUs")
def test_a_checkpoint_of_a_version_that_wrote_null_keeps_fp32(monkeypatch, tmp_path):
    bf16_cpu(monkeypatch, True)
    for written in ({"precision": None}, {}, "engine", None):
        assert resume.precision_of({"settings": {"engine": written}}) == "fp32"
    assert resume.precision_of({"settings": {"engine": {"precision": "bf16"}}}) == "bf16"


def test_a_torch_without_the_probes_means_no_hardware(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert precision.cpu_multiplies_bf16() is False


# ---------------------------------------------------------------- a start without a compiler


AT_STEP_1 = """
import sys
from pretrain.config import load
from pretrain.run import output
from pretrain.train import train
def first_step(*facts):
    print("loaded", *(name for name in sys.argv[1].split(",") if name in sys.modules))
output.log_step = first_step
train(load(sys.argv[2:]))
"""
HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "torch.distributed.tensor", "deepspeed", "transformers", "datasets",
         "pyarrow", "wandb", "matplotlib", "pandas", "tensorboard")  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled by default on GPUs")
def test_a_run_that_compiles_nothing_reaches_its_first_step_without_heavy_imports(tiny):
    command = [
        sys.executable,
        "-c",
        AT_STEP_1,
        ",".join(HEAVY),
        *tiny,
        "--train.max_steps",
        "1",
        "--schedule.warmup_steps",
        "0",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert [line for line in done.stdout.splitlines() if line.startswith("loaded")][:1] == ["loaded"], done.stdout + done.stderr
    assert not (Path(tiny[-1]) / ".cache").exists()  # of the compiler
