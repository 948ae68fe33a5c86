"""Settings come from files and flags, and every mistake in them is reported in words."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import schema
from pretrain.config import Config, ConfigError, check_resume, load, resume_class, validate
from pretrain.model.config import ModelConfig, MoeConfig, RopeScalingConfig, model_from_dict, resolve_model

ROOT = Path(__file__).parents[1]
GOOD = ["--model.vocab_size", "100", "--data.synthetic.kind", "uniform", "--train.max_steps", "10"]
LLAMA3 = "{kind: llama3, factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_position_embeddings: 8192}"


def problems_of(argv: list[str], **kwargs) -> list[schema.Problem]:
    with pytest.raises(ConfigError) as caught:
        load(argv, **kwargs)
    return caught.value.problems


def keys_of(argv: list[str], **kwargs) -> list[str]:
    return [problem.key for problem in problems_of(argv, **kwargs)]


def write(tmp_path: Path, text: str | bytes) -> list[str]:
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return ["--config", str(path)]


# ---------------------------------------------------------------- layers and types


def test_files_override_defaults_and_flags_override_files_in_order(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("optimizer: {lr: 1e-3, eps: 1e-6}\nrun: {name: a}\n")
    second.write_text("optimizer:\n  lr: 2e-3\n")
    config = load(["--config", str(first), "--config", str(second), "--run.name", "flag", *GOOD])
    assert (config.optimizer.lr, config.optimizer.eps, config.run.name) == (2e-3, 1e-6, "flag")
    assert config.optimizer.weight_decay == Config().optimizer.weight_decay


def test_scalars_are_read_by_the_type_of_their_field(tmp_path):
    text = """
run: {name: 2024-01-01}
optimizer: {lr: 3e-4, betas: [0.9, 1e-1]}
train: {max_steps: 1e3, max_tokens: null}
log: {wandb: {project: on, entity: 'null'}}
"""
    config = load([*write(tmp_path, text), "--model.vocab_size", "6_400", "--data.synthetic.kind", "uniform"])
    assert (config.run.name, config.log.wandb.project, config.log.wandb.entity) == ("2024-01-01", "on", "null")
    assert (config.optimizer.lr, config.optimizer.betas) == (3e-4, (0.9, 0.1))
    assert (config.train.max_steps, config.model.vocab_size) == (1000, 6400)
    assert isinstance(config.train.max_steps, int) and type(config.log.wandb.entity) is str


# ---------------------------------------------------------------- mistakes


def test_every_problem_is_reported_at_once_with_its_key_and_origin(tmp_path):
    text = """optimizer:
  lr: fast
batch:
  global_batch_sise: 3
engine: {precision: fp16}
modle: {}
"""
    found = {problem.key: problem for problem in problems_of([*write(tmp_path, text), "--run.name", "../x"])}
    lines = {"optimizer.lr": 2, "batch.global_batch_sise": 4, "engine.precision": 5, "modle": 6}
    assert {key: found[key].origin for key in lines} == {key: f"{tmp_path}/x.yaml:{line}" for key, line in lines.items()}
    assert found["run.name"].origin == "--run.name"
    assert found.keys() == {*lines, "run.name", "train", "data.train"}  # the misspelled section may hold the vocabulary


def test_a_message_names_the_value_what_is_allowed_and_the_closest_key():
    flags = ["--optimizer.lr", "fast", "--data.synthetic.kind", "unifrom", "--weight_decay", "3"]
    flags += ["--batch.micro_batch_size", "0"]
    text = str(ConfigError(problems_of([*GOOD, *flags])))
    for line in (
        "4 problems in the settings:",
        "optimizer.lr: got 'fast', must be a finite number, greater than 0 -- Peak learning rate.",
        "data.synthetic.kind: got 'unifrom', must be one of uniform, unigram, markov, repeat, copy; did you mean uniform?",
        "weight_decay: unknown key; did you mean optimizer.weight_decay?  (--weight_decay)",
        "batch.micro_batch_size: got 0, must be a whole number, at least 1",
    ):
        assert line in text


ONE_VALUE = [
    ("optimizer.lr", ("nan", "inf", "1e400", "0", "", "null", "{a: 1}", "[1]")),
    ("optimizer.betas", ("[0.9]", "[0.9, 0.9, 0.9]", "0.9", "[0.9, 0.95")),
    ("optimizer.betas[1]", ("[0.9, 1.0]", "[0.9, x]")),
    ("optimizer.momentum", ("1", "-0.1")),
    ("optimizer.weight_decay", ("-1",)),
    ("schedule.final_lr_fraction", ("1.1", "-0.1")),
    ("batch.micro_batch_size", ("2.5", "0", "9" * 5000)),
    ("data.document_mask", ("yes", "1", "on")),
    ("data.synthetic.kind", ("unifrom", "[uniform]")),
    ("data.train", ("a", "{path: a}", "[" * 100 + "]" * 100)),
    ("data.train[0]", ("[3]", "[null]")),
    ("data.train[0].path", ("[{weight: 2}]", "[{path: ''}]", "[{path: [[a]]}]")),
    ("log.sinks", ("console",)),
    ("log.sinks[1]", ("[jsonl, file]",)),
    ("run.name", ("", "../x", "a/../b", "a\0b", "\udcff", "x" * 201)),
    ("run.directory", ("~/runs",)),
    ("checkpoint.mirror", ("s3:/bucket/runs", "s3://", "bucket/runs", "/mnt/disk", "file://", "s3:///runs", "https://host/runs")),
    ("model.vocab_size", ("1",)),
    ("model.sliding_window", ("0",)),
    ("model.reset_positions", ("true",)),  # without data.document_mask
    ("model.num_attention_heads", ("7",)),
    ("model.num_key_value_heads", ("3",)),
    ("model.head_dim", ("7",)),
    ("model.rope_scaling.factor", ("{kind: linear}", "{kind: linear, factor: 0.5}")),
    ("model.rope_scaling.low_freq_factor", ("{kind: linear, factor: 2, low_freq_factor: 1}",)),
    ("model.rope_scaling.high_freq_factor", (LLAMA3.replace(" 4,", " 1,"), LLAMA3.replace("high_freq_factor: 4, ", ""))),
    ("model.moe.num_experts", ("{num_experts_per_tok: 2}", "{num_experts: 1}", "{num_experts: x}")),
    ("model.moe.num_experts_per_tok", ("{num_experts: 2, num_experts_per_tok: 3}",)),
    ("model.moe.norm_topk_prob", ("{num_experts: 4, num_experts_per_tok: 1}",)),
    ("model.moe.bias_update_rate", ("{num_experts: 4, bias_update_rate: 0.001}",)),
    ("model.moe.z_loss_weight", ("{num_experts: 4, z_loss_weight: -1}",)),
    ("schedule.warmup_steps", ("11",)),
    ("schedule.decay_steps", ("11",)),
    ("engine.world_size", ("2",)),
    ("evaluate.sample_prompts", ("[hello]",)),
    ("learning_rate", ("3",)),
]  # fmt: skip
SECTIONS = ("model.moe", "model.rope_scaling")


@pytest.mark.parametrize(("key", "text"), [(key, text) for key, texts in ONE_VALUE for text in texts])
def test_one_wrong_value_is_one_problem_with_its_key(key, text, tmp_path):
    flag = key.split("[")[0]
    if text.startswith("{"):  # a section
        flag = next((section for section in SECTIONS if key.startswith(section)), flag)
    assert keys_of([*GOOD, f"--{flag}", text]) == [key]


@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        (["--optimizer.lr"], ["--optimizer.lr"]),
        (["optimizer.lr", "3"], ["optimizer.lr", "3"]),
        (["--data.train", "[{path: a, weigt: 2}]"], ["data.train[0].weigt"]),
        (["--data.train", "[{path: a}]"], ["data.synthetic"]),
        (["--batch.global_batch_size", "9", "--batch.micro_batch_size", "2"], ["batch.global_batch_size"]),
        (["--train.epochs", "1"], ["train"]),
        (["--schedule.warmup_steps", "5", "--schedule.decay_steps", "6"], ["schedule.decay_steps"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
        (["--model.hidden_size", "x", "--model.num_attention_heads", "7"], ["model.hidden_size"]),
        (["--model.hidden_size", "x", "--model.rope_scaling", "{kind: llama3, factor: 2}"],
         ["model.hidden_size", *(f"model.rope_scaling.{key}" for key in (
             "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))]),
        (["--batch.global_batch_sise", "9"], ["batch.global_batch_sise"]),
        (["--train.max_steps", "["], ["train.max_steps"]),
    ],
)  # fmt: skip
def test_other_mistakes_are_named_and_cause_no_problems_elsewhere(flags, keys):
    assert keys_of([*GOOD, *flags]) == keys


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("run: {name: a\n", "x.yaml:2"),
        ("run:\n  name: a\n  name: b\n", "run.name"),
        ("- a\n", "x.yaml"),
        ("run: 3\n", "run"),
        ("run:\n", "run"),
        ("model: {vocab_size: [1]}\n", "model.vocab_size"),
        ("a: " + "[" * 200 + "]" * 200, "x.yaml"),
        (b"run: {name: \xff}\n", "x.yaml"),
        ("model.hidden_size: 64", "model.hidden_size"),
        (
            "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join(9 * [f'*{a}'])}]\n" for a, b in itertools.pairwise("abcdefghi")),
            "x.yaml",
        ),
        ("x" * (1 << 20) + ": 1\n", "x.yaml"),
    ],
)
def test_a_broken_file_is_one_problem(tmp_path, text, key):
    flags = ["--model.vocab_size", "9", *GOOD[2:]]
    (found,) = keys_of([*write(tmp_path, text), *(flags if "vocab" not in str(text) else GOOD[2:])])
    assert found.removeprefix(f"{tmp_path}/") == key


ANY_YAML = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(ANY_YAML, st.sampled_from([setting.key for setting in schema.walk(Config)]))
def test_any_value_of_any_key_is_accepted_or_refused_in_words(tmp_path_factory, value, key):
    for part in reversed(key.split(".")):
        value = {part: value}
    path = tmp_path_factory.mktemp("fuzz") / "x.yaml"
    path.write_bytes(yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass"))
    try:
        load(["--config", str(path), *GOOD])
    except ConfigError as error:
        assert error.problems and str(error)


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
    assert done.stdout.strip() == "2 False" and "optimizer.lr" in done.stderr


# ---------------------------------------------------------------- ways to cut a model over ranks

REFUSED = [
    ("engine.name zero1, parallel.tensor 2", 2, "tensor", "fsdp2"),
    ("engine.name zero3, engine.offload all, parallel.tensor 2", 2, "tensor", "zero3"),
    ("engine.name zero2, parallel.expert 2, model.moe.num_experts 4", 2, "expert", "fsdp2"),
    ("engine.precision fp8, parallel.tensor 2", 2, "tensor", "ddp"),
    ("parallel.expert 2", 2, "expert", "ddp"),
    ("parallel.expert 3, model.moe.num_experts 8", 3, "expert", "ddp"),
    ("parallel.expert 4, model.moe.num_experts 8", 2, "expert", "ddp"),
    ("parallel.tensor 5", 5, "tensor", "ddp"),
    ("parallel.tensor 2", 3, "tensor", "ddp"),
    ("parallel.tensor 4, model.num_key_value_heads 2", 4, "tensor", "ddp"),
    ("parallel.tensor 4, model.intermediate_size 66", 4, "tensor", "ddp"),
    ("parallel.tensor 2, model.moe.num_experts 4, model.moe.num_shared_experts 1, model.intermediate_size 33", 2, "tensor",
     "ddp"),
    ("parallel.tensor 2, model.vocab_size 101, model.vocab_multiple 1", 2, "tensor", "ddp"),
    ("parallel.tensor 2, data.sequence_length 33", 2, "tensor", "ddp"),
    ("engine.name fsdp2, parallel.tensor 2, engine.replicas 3", 8, "replicas", "fsdp2"),
    ("parallel.sequence 16", 16, "sequence", "ddp"),
    ("parallel.sequence 2, data.sequence_length 33", 2, "sequence", "ddp"),
    ("parallel.sequence 4, parallel.tensor 4", 16, "sequence", "ddp"),
    ("parallel.sequence 2, parallel.tensor 2, data.sequence_length 34", 4, "sequence", "ddp"),
    ("parallel.sequence 2, model.hidden_size 96, model.num_attention_heads 6, model.num_key_value_heads 3", 2, "sequence",
     "ddp"),
    ("parallel.sequence 2, parallel.tensor 2", 6, "sequence", "ddp"),
    ("engine.name fsdp2, model.moe.num_experts 4", 8, "name", "fsdp2"),
    ("engine.name fsdp2, model.moe.num_experts 4, parallel.expert 4", 8, "name", "fsdp2"),
]  # fmt: skip


def flags_of(text: str) -> list[str]:
    pairs = (pair.replace("parallel.", "engine.parallel.").split(" ") for pair in text.split(", "))
    return [word for key, value in pairs for word in (f"--{key}", value)]


def advice_of(problem: schema.Problem) -> list[str]:
    """The flags that the message of a refusal ends with."""
    return problem.message.partition("; the nearest that works: ")[2].split()


@pytest.mark.parametrize(("text", "ranks", "key", "engine"), REFUSED, ids=[text for text, *_ in REFUSED])
def test_a_way_to_cut_that_cannot_work_is_one_problem_and_the_nearest_way_in_its_message_works(text, ranks, key, engine):
    [problem] = problems_of([*GOOD, *flags_of(text)], world_size=ranks)
    assert problem.key.removeprefix("engine.").removeprefix("parallel.") == key
    config = load([*GOOD, *flags_of(text), *advice_of(problem)], world_size=ranks)
    assert advice_of(problem) and config.engine.name == engine


def test_the_reasons_of_all_kinds_are_reported_at_once_without_what_merely_follows():
    flags = flags_of("engine.name zero2, parallel.tensor 2, parallel.expert 2, parallel.sequence 3, batch.global_batch_size 3")
    problems = problems_of([*GOOD, *flags], world_size=1)
    kinds = [problem.key.removeprefix("engine.parallel.") for problem in problems]
    assert kinds == ["tensor", "expert", "sequence", "sequence"]
    assert len({tuple(advice_of(problem)) for problem in problems}) == 1


def test_fsdp2_spreads_experts_over_as_many_ranks_as_share_a_stack_of_them():
    flags = [*GOOD, "--engine.name", "fsdp2", "--batch.micro_batch_size", "1", "--model.moe.num_experts", "8"]
    for ways in ("engine.replicas 2", "parallel.tensor 2", "engine.replicas 4, parallel.expert 2"):
        load([*flags, *flags_of(ways)], world_size=16)
    for ways in ("engine.replicas 1", "parallel.sequence 2", "parallel.expert 2"):
        load([*flags, *flags_of(ways)], world_size=8)
        assert keys_of([*flags, *flags_of(ways)], world_size=16) == ["engine.name"]


def test_rows_of_the_vocabulary_can_be_padded_for_tensor_parallelism():
    flags = [*GOOD, *flags_of("parallel.tensor 2, model.vocab_size 101, model.vocab_multiple 1")]
    [problem] = problems_of(flags, world_size=2)
    load([*flags, *re.search(r"--model.vocab_multiple \d+", problem.message)[0].split()], world_size=2)


def test_the_nearest_way_keeps_as_much_of_the_request_as_it_can():
    def advice(text: str, ranks: int) -> list[str]:
        return advice_of(problems_of([*GOOD, *flags_of(text)], world_size=ranks)[0])

    assert advice("parallel.tensor 3", 12) == ["--engine.parallel.tensor", "4", "--batch.global_batch_size", "24"]
    assert advice("parallel.sequence 16", 16) == ["--engine.parallel.sequence", "8"]
    assert advice("engine.name zero3, parallel.tensor 2", 4) == ["--engine.name", "fsdp2"]
    assert advice("engine.name fsdp2, model.moe.num_experts 4", 8)[:2] == ["--engine.replicas", "2"]


def test_ranks_that_share_sequences_share_their_part_of_the_batch():
    flags = [*GOOD, *flags_of("batch.global_batch_size 4, batch.micro_batch_size 2, model.num_key_value_heads 2")]
    assert keys_of(flags, world_size=8) == ["batch.global_batch_size"]
    for cut in ("parallel.sequence 4", "parallel.tensor 2, parallel.sequence 2", "parallel.tensor 2, parallel.sequence 4"):
        load([*flags, *flags_of(cut)], world_size=8)
    assert keys_of([*flags, *flags_of("parallel.sequence 2")], world_size=8) == ["batch.global_batch_size"]
    experts = flags_of("parallel.expert 4, model.moe.num_experts 8")  # do not share sequences
    assert keys_of([*flags, *experts], world_size=8) == ["batch.global_batch_size"]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_refused_way_to_cut_becomes_valid_by_the_advice_of_each_of_its_messages(data):
    def draw(*values: Any) -> str:
        return str(data.draw(st.sampled_from(values)))

    heads = int(draw(4, 6, 8, 12))
    name, kinds = draw("ddp", "zero1", "zero3", "fsdp2"), ("tensor", "sequence", "expert")
    flags = [*GOOD, "--engine.name", name, "--model.hidden_size", "192", "--model.num_attention_heads", str(heads)]
    flags += ["--model.num_key_value_heads", draw(*(n for n in (1, 2, 3, 4, 6, 8, 12) if heads % n == 0))]
    flags += ["--model.vocab_multiple", draw(1, 4, 6), "--data.sequence_length", draw(32, 36, 48, 49)]
    flags += [word for kind in kinds for word in (f"--engine.parallel.{kind}", draw(1, 1, 2, 3, 4, 8))]
    flags += ["--model.intermediate_size", draw(64, 66, 96), *(["--engine.replicas", draw(1, 2, 3)] if name == "fsdp2" else [])]
    if draw(True, False) == "True":
        flags += ["--model.moe.num_experts", draw(4, 6, 8), "--model.moe.num_shared_experts", draw(0, 1)]
    ranks = data.draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, None]))
    try:
        load(flags, world_size=ranks)
    except ConfigError as error:
        for problem in error.problems:
            if problem.key != "batch.global_batch_size":
                assert advice_of(problem), problem
                load([*flags, *advice_of(problem)], world_size=ranks)


# ---------------------------------------------------------------- other combinations


def test_sample_prompts_need_a_tokenizer_and_validations():
    flags = ["--model.vocab_size", "64", "--data.train", "[{path: a}]", "--train.max_steps", "3"]
    flags += ["--evaluate.sample_prompts", "[hello]"]
    needs = ["--tokenizer.path", "data/t", "--data.valid", "[{path: b}]"]
    assert load([*flags, *needs]).evaluate.sample_prompts == ["hello"]
    for missing in (needs[:2], needs[2:]):
        assert keys_of([*flags, *missing]) == ["evaluate.sample_prompts"]


# ---------------------------------------------------------------- help, YAML, JSON Schema


def printed(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        load(argv)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_the_printed_configuration_loads_to_an_equal_one(tmp_path, capsys):
    flags = [*GOOD, "--data.valid", "[{path: b}]", "--run.name", "123", "--tokenizer.path", "模型"]
    flags += ["--model.rope_scaling", LLAMA3, "--model.moe.num_experts", "4"]
    text = printed([*flags, "--print_config"], capsys)
    assert load(write(tmp_path, text)) == load(flags)
    assert load(write(tmp_path, schema.to_yaml(load(GOOD)))) == load(GOOD)


def test_help_lists_every_key_with_default_bounds_resume_class_and_docstring(capsys):
    text = printed(["--help"], capsys)
    found = list(schema.walk(Config))
    assert len(found) > 90 and {"model.moe.num_experts", "model.rope_scaling", "log.wandb.mode"} <= {each.key for each in found}
    for each in found:
        assert each.doc, f"{each.key} has no docstring"
        assert f"--{each.key} ({each.default}; {each.allowed}; {each.resume})\n        {each.doc}\n" in text
    assert "--optimizer.weight_decay (default 0.1; a finite number, at least 0; guarded)" in text


@pytest.mark.parametrize("switch", ["--help", "--print_config", "--print_schema"])
def test_help_survives_a_closed_pipe_and_works_in_any_locale(switch):
    command = [sys.executable, ROOT / "launch" / "pretrain.py", *GOOD, "--run.name", "模型", switch]
    process = subprocess.Popen(command, env={"PYTHONIOENCODING": "ascii"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == (b"", 0)


def test_the_json_schema_has_description_bounds_and_default_of_every_key():
    root = schema.json_schema(Config)
    for each in schema.walk(Config):
        node = root
        for part in each.key.split("."):
            node = next(option for option in node.get("anyOf", [node]) if "properties" in option)["properties"][part]
        assert node["description"] == each.doc and ("default" in node or each.default == "required"), each.key
    assert root["properties"]["optimizer"]["properties"]["lr"].items() >= {"exclusiveMinimum": 0, "default": 3e-4}.items()


# ---------------------------------------------------------------- resuming


def test_every_key_has_a_resume_class_and_unknown_keys_have_that_of_their_section():
    assert {each.resume for each in schema.walk(Config)} == {"frozen", "guarded", "free"}
    assert resume_class("model.hidden_size") == resume_class("data.sequence_length") == resume_class("run.seed") == "frozen"
    assert resume_class("model.moe.balance") == "frozen" and resume_class("model.moe.aux_loss_weight") == "guarded"
    assert resume_class("engine.parallel.tensor") == resume_class("engine.parallel.of_another_version") == "free"
    assert resume_class("optimizer.lr") == resume_class("train.max_steps") == "guarded"
    assert resume_class("batch.micro_batch_size") == resume_class("log.wandb.project") == resume_class("data.train") == "free"
    assert resume_class("model.moe.of_another_version") == resume_class("data.of_another_version") == "frozen"
    assert resume_class("log.wandb.of_another_version") == resume_class("engine.of_another_version") == "free"


def test_resuming_refuses_frozen_keys_and_lets_guarded_ones_be_confirmed():
    old = schema.to_dict(load(GOOD))
    new = schema.to_dict(load([*GOOD, "--model.hidden_size", "64", "--optimizer.lr", "1", "--log.every_steps", "3"]))
    found = [(problem.key, problem.origin) for problem in check_resume(old, new, [], "x")]
    assert found == [("model.hidden_size", "x"), ("optimizer.lr", "x")]
    confirmed = check_resume(old, new, ["optimizer.lr", "model.hidden_size"], "x")
    assert [problem.key for problem in confirmed] == ["model.hidden_size"]


# ---------------------------------------------------------------- the model's settings


def test_resolve_model_fills_every_null():
    model = resolve_model(Config().model, vocab_size=100, sequence_length=64)
    null = {key for key, value in vars(model).items() if value is None}
    assert null == {"from_pretrained", "rope_scaling", "sliding_window", "moe", "scaling"}
    assert (model.head_dim, model.intermediate_size, model.num_key_value_heads) == (64, 1408, 8)


def test_a_model_is_restored_from_the_plain_values_in_a_checkpoint():
    moe, scaling = MoeConfig(num_experts=4), RopeScalingConfig(kind="linear", factor=2.0)
    for model in (ModelConfig(), ModelConfig(moe=moe, rope_scaling=scaling, intermediate_size=96)):
        model = resolve_model(model, vocab_size=10, sequence_length=8)
        assert model_from_dict(dataclasses.asdict(model)) == model
    assert model.moe.moe_intermediate_size == 96
    assert model_from_dict({"hidden_size": 64}) == ModelConfig(hidden_size=64)


def test_a_configuration_made_in_python_is_checked_too():
    assert [problem.key for problem in validate(Config())] == ["train", "data.train", "model.vocab_size"]
