"""Settings: files, flags, and every mistake a user can make in them."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import config as config_module
from pretrain import schema
from pretrain.config import Config, ConfigError, load
from pretrain.model.config import ModelConfig, MoeConfig, RopeScalingConfig, model_from_dict, resolve_model
from pretrain.rules import check_resume, resume_class

ROOT = Path(__file__).parents[1]
GOOD = ["--model.vocab_size", "100", "--data.synthetic.kind", "uniform", "--train.max_steps", "10"]


def problems_of(argv: list[str], **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        load(argv, **kwargs)
    return str(caught.value)


def write(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return ["--config", str(path)]


def test_files_override_defaults_and_flags_override_files_in_order(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("optimizer: {lr: 1e-3, eps: 1e-6}\nrun: {name: a}\n")
    second.write_text("optimizer:\n  lr: 2e-3\n")
    config = load(["--config", str(first), "--config", str(second), "--run.name", "flag", *GOOD])
    assert (config.optimizer.lr, config.optimizer.eps, config.run.name) == (2e-3, 1e-6, "flag")
    assert config.optimizer.weight_decay == Config().optimizer.weight_decay


def test_every_problem_is_reported_at_once_with_file_line_key_and_advice(tmp_path):
    text = problems_of(
        write(tmp_path, "optimizer:\n  lr: fast\nbatch:\n  global_batch_sise: 3\nengine: {precision: fp16}\nmodle: {}\n")
    )
    assert "x.yaml:2" in text and "optimizer.lr: got 'fast', must be a number" in text
    assert "x.yaml:4" in text and "did you mean batch.global_batch_size?" in text
    assert "allowed: fp32, bf16" in text and "fp16 needs loss scaling" in text
    assert "did you mean model?" in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--optimizer.lr", "nan"], "must be a finite number"),
        (["--optimizer.lr", "0"], "greater than 0"),
        (["--optimizer.lr"], "needs a value"),
        (["optimizer.lr", "3"], "is not a flag"),
        (
            ["--batch.global_batch_size", "9", "--batch.micro_batch_size", "2"],
            "must be a multiple of micro_batch_size x ranks = 2 x 1 = 2",
        ),
        (["--batch.micro_batch_size", "2.5"], "must be a whole number"),
        (["--data.document_mask", "yes"], "allowed: true, false"),
        (["--data.synthetic.kind", "unifrom"], "did you mean 'uniform'?"),
        (["--data.train", "[{path: a, weigt: 2}]"], "data.train[0].weigt: unknown key; did you mean data.train[0].weight?"),
        (["--data.train", "[{weight: 2}]"], "data.train[0].path: is required"),
        (["--data.train", "[{path: a}]"], "data.synthetic: is set beside data.train"),
        (["--optimizer.betas", "[0.9]"], "must have 2 values"),
        (["--optimizer.betas", "[0.9, 1.0]"], "both must be in [0, 1)"),
        (["--model.num_attention_heads", "7"], "must divide hidden_size"),
        (["--model.num_key_value_heads", "3"], "must divide num_attention_heads"),
        (["--model.head_dim", "7"], "must be even"),
        (["--model.rope_scaling.kind", "linear"], "model.rope_scaling.factor: is required"),
        (["--model.rope_scaling", "{kind: linear, factor: 2, low_freq_factor: 1}"], "has no meaning for kind linear"),
        (["--model.rope_scaling", "{kind: llama3, factor: 2, low_freq_factor: 1}"], "is needed for kind llama3"),
        (["--model.sliding_window", "0"], "must be at least 1"),
        (["--model.moe.num_experts_per_tok", "2"], "model.moe.num_experts: is required"),
        (["--model.moe", "{num_experts: 2, num_experts_per_tok: 3}"], "more than num_experts = 2"),
        (["--model.moe", "{num_experts: 4, num_experts_per_tok: 1}"], "whose weight would always be 1"),
        (["--model.moe", "{num_experts: 4, bias_update_rate: 0.001}"], "only score sigmoid can do"),
        (["--model.moe", "{num_experts: 4, z_loss_weight: -1}"], "must be at least 0"),
        (["--train.epochs", "1"], "set exactly one of"),
        (["--schedule.warmup_steps", "11"], "more than train.max_steps"),
        (["--schedule.warmup_steps", "5", "--schedule.decay_steps", "6"], "warmup_steps + decay_steps = 11"),
        (["--engine.world_size", "2"], "asks for 2 processes, but 1 run"),
        (["--run.name", "../x"], "plain folder name"),
        (["--run.name", "a\0b"], "which has characters that no terminal"),
        (["--run.name", "\udcff"], "which has characters that no terminal"),
        (["--run.directory", "~/runs"], "only a shell knows ~"),
        (["--optimizer.betas", "[0.9, 0.95"], "optimizer.betas: is not YAML: expected ',' or ']', but got '<stream end>'  ("),
        (["--data.train", "[" * 100 + "]" * 100], "nested deeper"),
        (["--data.train", "a"], "must be a list, such as [{path: ...}]"),
        (["--optimizer.betas", "0.9"], "must be a list, such as [0.9, 0.95]"),
        (["--log.sinks", "console"], "must be a list, such as [console, jsonl]"),
        (["--learning_rate", "3"], "unknown key"),
        (["--weight_decay", "3"], "did you mean optimizer.weight_decay?"),
        (["--config", "missing.yaml"], "there is no such file"),
    ],
)
def test_a_mistake_is_named(flags, said):
    assert said in problems_of([*GOOD, *flags])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run: {name: a\n", "is not YAML"),
        ("run:\n  name: a\n  name: b\n", "stands twice"),
        ("- a\n", "must hold sections"),
        ("run: 3\n", "must hold keys: name, directory, seed"),
        ("model: {vocab_size: [1]}\n", "is a list"),
        ("a: " * 1 + "[" * 200 + "]" * 200, "nested deeper"),
        (b"run: {name: \xff}\n", "cannot be read"),
        ("model.hidden_size: 64", "in a file it is written model: {hidden_size: ...}"),
        (
            "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join(9 * [f'*{a}'])}]\n" for a, b in itertools.pairwise("abcdefghi")),
            "line 2: *a is an alias; write the value out",
        ),
        ("x" * (1 << 20) + ": 1\n", "larger than"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, said):
    assert said in problems_of(write(tmp_path, text))


def test_scalars_are_read_by_the_type_of_their_field(tmp_path):
    config = load(
        write(
            tmp_path,
            "run: {name: 2024-01-01}\noptimizer: {lr: 3e-4, betas: [0.9, 1e-1]}\n"
            "train: {max_steps: 1e3, max_tokens: null}\nlog: {wandb: {project: on}}\n",
        )
        + ["--model.vocab_size", "6_400", "--data.synthetic.kind", "uniform"]
    )
    assert (config.run.name, config.log.wandb.project) == ("2024-01-01", "on")
    assert (config.optimizer.lr, config.optimizer.betas) == (3e-4, (0.9, 0.1))
    assert (config.train.max_steps, config.model.vocab_size) == (1000, 6400)


def test_the_printed_configuration_loads_to_an_equal_one(tmp_path, capsys):
    config = load([*GOOD, "--data.valid", "[{path: b}]", "--run.name", "123"])
    again = load(write(tmp_path, schema.to_yaml(config)))
    assert again == config
    with pytest.raises(SystemExit) as stopped:
        load([*GOOD, "--print_config"])
    assert stopped.value.code == 0
    assert load(write(tmp_path, capsys.readouterr().out)) == load(GOOD)


def test_help_lists_every_key_with_its_comment(capsys):
    with pytest.raises(SystemExit) as stopped:
        load(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for key, _, doc in schema.walk(Config):
        assert f"--{key}" in text and doc and doc in text, f"{key} has no docstring"


ANY_YAML = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(ANY_YAML,
       st.sampled_from([key for key, _, _ in schema.walk(Config)]))  # fmt: skip
def test_any_value_of_any_key_is_accepted_or_refused_in_words(tmp_path_factory, value, key):
    import yaml

    for part in reversed(key.split(".")):
        value = {part: value}
    path = tmp_path_factory.mktemp("fuzz") / "x.yaml"
    path.write_bytes(yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass"))
    try:
        load(["--config", str(path), *GOOD])
    except ConfigError as error:
        assert error.problems


def test_every_key_has_a_class_for_resuming():
    assert {resume_class(key) for key, _, _ in schema.walk(Config)} == {"frozen", "guarded", "free"}
    assert resume_class("model.hidden_size") == resume_class("data.sequence_length") == "frozen"
    assert resume_class("model.moe.balance") == "frozen" and resume_class("model.moe.aux_loss_weight") == "guarded"
    assert resume_class("optimizer.lr") == resume_class("train.max_steps") == "guarded"
    assert resume_class("batch.micro_batch_size") == resume_class("log.wandb.project") == "free"


def test_resuming_refuses_frozen_keys_and_lets_guarded_ones_be_confirmed():
    old = schema.to_dict(load(GOOD))
    new = schema.to_dict(load([*GOOD, "--model.hidden_size", "64", "--optimizer.lr", "1", "--log.every_steps", "3"]))
    keys = [problem.key for problem in check_resume(old, new, [], "x")]
    assert keys == ["model.hidden_size", "optimizer.lr"]
    assert [problem.key for problem in check_resume(old, new, ["optimizer.lr", "model.hidden_size"], "x")] == [
        "model.hidden_size"
    ]


def test_a_wrong_setting_exits_2_before_torch_is_imported():
    code = """
import runpy, sys
sys.argv[1:] = ["--optimizer.lr", "fast"]
try:
    runpy.run_path("launch/pretrain.py", run_name="__main__")
except SystemExit as left:
    print(left.code, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "2 False" and "optimizer.lr: got 'fast'" in done.stderr


def test_resolve_model_fills_every_null():
    model = config_module.resolve_model(Config().model, vocab_size=100, sequence_length=64)
    assert {key for key, value in vars(model).items() if value is None} == {
        "from_pretrained",
        "rope_scaling",
        "sliding_window",
        "moe",
    }
    assert (model.head_dim, model.intermediate_size, model.num_key_value_heads) == (64, 1408, 8)


def test_fsdp2_is_refused_where_a_rank_would_hold_no_expert():
    flags = [*GOOD, "--engine.name", "fsdp2", "--model.moe.num_experts", "4", "--batch.micro_batch_size", "1"]
    load(flags, world_size=4)
    load([*flags, "--engine.replicas", "2"], world_size=8)
    with pytest.raises(ConfigError, match="over 8 ranks"):
        load(flags, world_size=8)


def test_a_model_comes_back_from_the_plain_values_that_a_checkpoint_keeps():
    moe, scaling = MoeConfig(num_experts=4), RopeScalingConfig(kind="linear", factor=2.0)
    for model in (ModelConfig(), ModelConfig(moe=moe, rope_scaling=scaling, intermediate_size=96)):
        model = resolve_model(model, vocab_size=10, sequence_length=8)
        assert model_from_dict(dataclasses.asdict(model)) == model
    assert model.moe.moe_intermediate_size == 96
    assert model_from_dict({"hidden_size": 64}) == ModelConfig(hidden_size=64)


def test_continuing_prompts_needs_whole_weights_a_tokenizer_and_validations():
    flags = ["--model.vocab_size", "64", "--data.synthetic.kind", "markov", "--train.max_steps", "3"]
    prompts = ["--evaluate.sample_prompts", "[hello]", "--tokenizer.path", "data/t"]
    assert load([*flags, *prompts]).evaluate.sample_prompts == ["hello"]
    assert "evaluate.sample_prompts: needs tokenizer.path" in problems_of([*flags, *prompts[:2]])


def test_a_file_that_cannot_be_read_is_the_only_problem(tmp_path):
    assert problems_of(["--config", "missing.yaml"]).startswith("1 problem")


@pytest.mark.parametrize("switch", ["--help", "--print_config"])
def test_a_reader_that_has_seen_enough_is_no_failure_and_any_locale_will_do(switch):
    command = [sys.executable, ROOT / "launch" / "pretrain.py", *GOOD, "--run.name", "模型", switch]
    process = subprocess.Popen(command, env={"PYTHONIOENCODING": "ascii"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == (b"", 0)
