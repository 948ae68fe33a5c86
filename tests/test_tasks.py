"""Tasks have the same figures for any number of ranks, any engine and any batch; each defect of a file is named with its
line."""

from __future__ import annotations

import json
import math
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from launch import evaluate as program
from pretrain.config import ConfigError, EngineConfig, OptimizerConfig, ParallelConfig, load
from pretrain.data.errors import TaskError
from pretrain.data.tasks import CHOICES, CONTEXTS, EXACT, Item, Sequence, Task, findings, open_tasks
from pretrain.data.tokenizer import Tokenizer
from pretrain.engines.compile import graphs
from pretrain.engines.start import start_engine
from pretrain.evaluate import Stopped
from pretrain.model.config import ModelConfig, MoeConfig, resolve_model
from pretrain.model.transformer import Transformer, build
from pretrain.optim.optimizer import build_optimizer
from pretrain.report.plot import draw, read_curves
from pretrain.run.agreement import facts
from pretrain.run.page import page
from pretrain.run.parts import open_parts
from pretrain.run.preflight import preflight
from pretrain.run.stop import StopRequest
from pretrain.run.view import View
from pretrain.tasks import layout, log_likelihoods, measure, plan_pass
from tests.models import make_tokenizer, train_here, write_token_file
from tests.ranks import run_ranks
from tests.test_train import records, run_of, signal_itself_at

VOCAB, LENGTH = 320, 64
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_multiple=128)
DENSE = resolve_model(ModelConfig(**SIZES), vocab_size=VOCAB - 61, sequence_length=LENGTH)  # one rank's rows: part padding
MIXED = resolve_model(
    ModelConfig(**SIZES, moe=MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)),
    vocab_size=VOCAB,
    sequence_length=LENGTH,
)


# ---------------------------------------------------------------- figures


def plain_scores(model: Transformer, sequence: Sequence) -> tuple[float, bool]:
    """(nats, whether greedy decoding gives the continuation) of one sequence, without batches or an engine."""
    tokens = torch.from_numpy(sequence.tokens)
    with torch.no_grad():
        log_p = model(tokens[None, :-1])[0, -sequence.labels :].log_softmax(1)
    labels = tokens[-sequence.labels :]
    return -log_p.gather(1, labels[:, None]).sum().item(), bool((log_p.argmax(1) == labels).all())


def make_tasks(config: ModelConfig) -> list[Task]:
    """One task of each kind, of random tokens; greedy decoding gives every other exact continuation, or all of it but its first
    or its last token."""
    draw, model = np.random.default_rng(0), build(config, "cpu", seed=0)

    def sequence(tokens: list[int], labels: int) -> Sequence:
        return Sequence(np.array(tokens, dtype=np.int64), labels, 3 * labels, 2 * labels)

    def ids(count: int) -> list[int]:
        return draw.integers(0, config.vocab_size, count).tolist()

    items: dict[str, list[Item]] = {CHOICES: [], CONTEXTS: [], EXACT: []}
    for number in range(9):
        context = ids(1 + 3 * number)
        choices = [sequence(context + ids(size), size) for size in (1, 4, 2, 7)[: 2 + number % 3]]
        items[CHOICES].append(Item(number + 1, choices, number % 2))
        end = ids(3)
        items[CONTEXTS].append(Item(number + 1, [sequence(ids(size) + end, 3) for size in (2, 5)], number % 2))
        tokens, wrong = list(context), {1: 0, 3: 2}.get(number % 4)
        for place in range(3):
            with torch.no_grad():
                likeliest = int(model(torch.tensor([tokens]))[0, -1].argmax())
            tokens.append(likeliest if place != wrong else (likeliest + 1) % config.vocab_size)
        items[EXACT].append(Item(number + 1, [sequence(tokens, 3)], 0))
    return [Task(kind, kind, items[kind], 9, 0, [], "") for kind in items]


def plain_figures(config: ModelConfig, tasks: list[Task]) -> dict[str, float]:
    """The figures as their definitions say, item by item."""
    model, found = build(config, "cpu", seed=0), {}
    for task in tasks:
        scores = [[plain_scores(model, each) for each in item.sequences] for item in task.items]
        rows = list(zip(task.items, scores, strict=True))
        if task.kind == EXACT:
            found[f"task/{task.name}/accuracy"] = np.mean([hit for ((_, hit),) in scores])
        else:
            sizes = {"accuracy": None, "accuracy_per_byte": "bytes", "accuracy_per_character": "characters"}
            for figure, unit in sizes.items() if task.kind == CHOICES else [("accuracy", None)]:
                chosen = []
                for item, scored in rows:
                    lengths = [getattr(each, unit) if unit else 1 for each in item.sequences]
                    chosen.append(np.argmin([nats / size for (nats, _), size in zip(scored, lengths, strict=True)]))
                found[f"task/{task.name}/{figure}"] = np.mean([c == i.answer for c, i in zip(chosen, task.items, strict=True)])
        nats = sum(scored[item.answer][0] for item, scored in rows)
        text_bytes = sum(item.sequences[item.answer].bytes for item in task.items)
        found[f"task/{task.name}/bits_per_byte"] = nats / math.log(2) / text_bytes
    return found


def prepared(config: EngineConfig, model: ModelConfig):
    engine = start_engine(config)
    engine.prepare(lambda: Transformer(model), lambda built: build_optimizer(built, OptimizerConfig()), 1.0, seed=0)
    return engine


def measure_here(config: EngineConfig, model: ModelConfig, tasks: list[Task], most_tokens: int) -> tuple[dict, int, int]:
    """(figures, collectives of the table, rounds)."""
    engine = prepared(config, model)
    reduced, all_reduce = [], engine.all_reduce
    engine.all_reduce = lambda values: reduced.append(values.dtype) or all_reduce(values)
    figures = measure(engine, tasks, most_tokens, lambda: [0])
    assert engine.model.training and engine.model.lm_head.hits is None
    assert graphs() == 0, "each length of a batch would be compiled"
    rounds = len(plan_pass(engine, tasks, most_tokens).batches) // engine.mesh.sample_ranks
    engine.close()
    return figures, reduced.count(torch.float64), rounds


def engine(name: str, **kinds: int) -> EngineConfig:
    return EngineConfig(name=name, precision="fp32", parallel=ParallelConfig(**kinds), compile="none")


SLOW = [
    (1, EngineConfig(name="ddp", precision="fp32", compile="blocks"), DENSE, 64),
    (2, engine("zero1"), DENSE, 64),
    (2, engine("zero2"), DENSE, 64),
    (2, engine("zero3"), DENSE, 64),
    (4, engine("fsdp2", sequence=2, tensor=2), DENSE, 100),
    (4, engine("fsdp2", sequence=2, expert=4), MIXED, 100),
    (3, engine("fsdp2"), DENSE, 10_000),
]


@pytest.mark.parametrize(
    ("ranks", "config", "model", "most_tokens"),
    [
        (1, engine("ddp"), DENSE, 1),
        (1, engine("ddp"), DENSE, 10_000),
        (2, engine("fsdp2"), DENSE, 64),
        (2, engine("ddp", sequence=2), DENSE, 64),
        (2, engine("fsdp2", tensor=2), DENSE, 64),
        (2, engine("ddp", expert=2), MIXED, 64),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
    ids=lambda value: f"{value.name}-{value.parallel}" if isinstance(value, EngineConfig) else None,
)
def test_the_figures_are_those_of_the_items_one_by_one_at_every_world_size_and_engine(ranks, config, model, most_tokens):
    tasks = make_tasks(model)
    expected = plain_figures(model, tasks)
    assert expected["task/exact/accuracy"] == pytest.approx(5 / 9)
    for figures, tables, rounds in run_ranks(ranks, measure_here, config, model, tasks, most_tokens):
        for name, value in expected.items():
            assert figures[name] == pytest.approx(value, rel=1e-5), name
        assert figures["task/choices/chance"] == pytest.approx(np.mean([1 / len(i.sequences) for i in tasks[0].items]))
        assert figures["task_accuracy"] == pytest.approx(np.mean([figures[f"task/{t.name}/accuracy"] for t in tasks]))
        assert figures["task_chance"] == pytest.approx((figures["task/choices/chance"] + 0.5 + 0) / 3)
        assert tables == 1 and rounds >= 1


def test_a_model_that_is_not_finite_has_no_accuracy_and_the_others_keep_theirs():
    held = prepared(engine("ddp"), DENSE)
    tasks = make_tasks(DENSE)
    with torch.no_grad():
        held.model.model.embed_tokens.weight[tasks[0].items[0].sequences[0].tokens[0]] = math.nan
    nats, _ = log_likelihoods(held, tasks, 64)
    figures = measure(held, tasks, 64)
    held.close()
    assert np.isnan(nats).any() and np.isfinite(nats).any()
    assert math.isnan(figures["task/choices/accuracy"]) and math.isnan(figures["task_accuracy"])


def stopped_here(at: int) -> list[int] | None:
    held, asked = prepared(engine("fsdp2"), DENSE), []

    def requests() -> list[int]:
        asked.append(1)
        return [int(held.rank == 1 and len(asked) == at), 0]

    try:
        measure(held, make_tasks(DENSE), 64, requests)
    except Stopped as stopped:
        return [*stopped.flags, int(held.model.training and held.model.lm_head.hits is None)]
    finally:
        held.close()


def test_a_request_to_stop_on_one_rank_ends_the_pass_on_all():
    assert run_ranks(2, stopped_here, 3) == [[1, 0, 1]] * 2


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_batches_hold_each_sequence_once_within_the_limit_and_as_many_for_each_rank(ranks):
    lengths = [random.Random(ranks).randint(4, 40) for _ in range(200)]
    plan = layout(lengths, 256, ranks, multiple=4)
    assert sorted(number for batch in plan.batches for number in batch) == list(range(200))
    assert len(plan.batches) == len(plan.widths) and len(plan.batches) % ranks == 0
    for batch, width in zip(plan.batches, plan.widths, strict=True):
        assert max(1, len(batch)) * width <= 256 and width % 4 == 0 and all(lengths[each] <= width for each in batch)
    assert plan.tokens < 1.2 * sum(lengths)
    each = [sum(len(b) * w for b, w in list(zip(plan.batches, plan.widths, strict=True))[rank::ranks]) for rank in range(ranks)]
    assert max(each) < 1.25 * plan.tokens / ranks


def test_a_sequence_longer_than_the_limit_is_a_batch_of_its_own():
    assert layout([50, 3, 3], 8, 1).batches == [[0], [1, 2]]
    assert layout([5], 8, 4) == ([[0], [], [], []], [5, 5, 5, 5])


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer"))


GOOD = {"context": "the quick brown", "choices": [" fox", " lazy dog"], "answer": 0}


def write(path: Path, *items: object) -> Path:
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items))
    return path


def opened(path: Path, tokenizer: Tokenizer, **changes) -> list[Task]:
    options = dict(max_length=LENGTH, vocab_size=tokenizer.vocab_size) | changes
    return open_tasks([str(path)], tokenizer, **options)


def without(key: str) -> dict:
    return {name: value for name, value in GOOD.items() if name != key}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["JSON"]),
        ("[1]", ["object"]),
        (without("context"), ["context"]),
        (without("answer"), ["answer"]),
        (without("choices"), ["continuation"]),
        ({"contexts": ["a", "b"], "answer": 0}, ["continuation"]),
        (GOOD | {"answer": 2}, ["2", "0 to 1"]),
        (GOOD | {"answer": -1}, ["-1", "0 to 1"]),
        (GOOD | {"answer": True}, ["True"]),
        (GOOD | {"answer": "0"}, ["'0'"]),
        (GOOD | {"choices": [" fox", ""]}, ["choices[1]", "empty"]),
        (GOOD | {"choices": [" fox"]}, ["two"]),
        (GOOD | {"choices": " fox"}, ["list"]),
        (GOOD | {"choices": [" fox", 3]}, ["choices[1]", "text"]),
        (GOOD | {"continuation": "x"}, ["choices", "continuation"]),
        ({"context": "the", "continuation": ""}, ["empty"]),
        ({"context": "the", "continuation": " fox"}, ["kind"]),
        (json.dumps(GOOD | {"context": "\ud800"}), ["Unicode"]),
        (GOOD | {"choices": [" fox", " dog" * 200]}, ["64", "tokens"]),
    ],
)
def test_each_defect_is_one_error_with_file_and_line(tmp_path, tokenizer, line, words):
    path = write(tmp_path / "t.jsonl", GOOD, "", line, GOOD | {"context": "the lazy"})
    with pytest.raises(TaskError) as caught:
        opened(path, tokenizer)
    assert f"{path}:3:" in str(caught.value) and str(caught.value).count(f"{path}:") == 1
    for word in words:
        assert word in str(caught.value)


def test_files_that_are_missing_empty_or_of_one_name_and_models_without_a_tokenizer_are_refused(tmp_path, tokenizer):
    (tmp_path / "none").mkdir()
    write(tmp_path / "empty.jsonl")
    (tmp_path / "more").mkdir()
    first, second = write(tmp_path / "t.jsonl", GOOD), write(tmp_path / "more" / "t.jsonl", GOOD)
    for paths in (["absent.jsonl"], [tmp_path / "none"], [tmp_path / "empty.jsonl"], [first, second], [first, first]):
        with pytest.raises(TaskError, match=Path(paths[0]).name):
            open_tasks([str(path) for path in paths], tokenizer, LENGTH, tokenizer.vocab_size)
    with pytest.raises(TaskError, match="tokenizer"):
        open_tasks([str(first)], None, LENGTH, 320)
    with pytest.raises(TaskError, match="tokenizer is not the model's"):
        opened(first, tokenizer, vocab_size=100)
    write(tmp_path / "many.jsonl", *["{"] * 9)
    with pytest.raises(TaskError, match="and 4 more"):
        opened(tmp_path / "many.jsonl", tokenizer)


def test_what_is_measured_all_the_same_is_reported_with_its_count(tmp_path, tokenizer):
    long = GOOD | {"context": "the quick brown fox " * 20}
    (task,) = opened(write(tmp_path / "t.jsonl", GOOD, long, GOOD), tokenizer)
    assert (task.truncated, task.repeated) == (2, [(3, 1)])
    assert all(len(each.tokens) == LENGTH + 1 for each in task.items[1].sequences)
    assert [each.name for each in findings([task])] == ["task-truncated", "task-repeated"]
    full = tokenizer.encode(long["context"].rstrip() + " " + GOOD["choices"][0])  # the space moves to the choice
    assert task.items[1].sequences[0].tokens.tolist() == full[-LENGTH - 1 :]


def test_text_is_divided_into_tokens_as_lm_eval_divides_it(tmp_path, tokenizer):
    end, ids = tokenizer.end_of_document_id, tokenizer.encode
    cases = [
        ("the quick", " fox", ids("the quick fox"), len(ids("the quick fox")) - len(ids("the quick"))),
        ("the quick  ", "fox", ids("the quick  fox"), len(ids("the quick  fox")) - len(ids("the quick"))),
        ("def area:\n    ", "return", ids("def area:\n    return"), len(ids("def area:\n    return")) - len(ids("def area:"))),
        ("", "the", [end, *ids("the")], len(ids("the"))),
        (" \n", "the", [end, *ids(" \nthe")], len(ids(" \nthe"))),
    ]
    for number, (context, continuation, tokens, labels) in enumerate(cases):
        path = write(tmp_path / f"{number}.jsonl", {"context": context, "continuation": continuation})
        sequence = opened(path, tokenizer)[0].items[0].sequences[0]
        assert (sequence.tokens.tolist(), sequence.labels) == (tokens, labels), (context, continuation)
        assert (sequence.bytes, sequence.characters) == (len(continuation.encode()), len(continuation))
    # A token across the border belongs to the context's own encoding and to nothing else.
    item = {"context": "the q", "continuation": "uick brown fox jumps"}
    sequence = opened(write(tmp_path / "t.jsonl", item), tokenizer)[0].items[0].sequences[0]
    before, whole = ids("the q"), ids("the quick brown fox jumps")
    assert sequence.tokens.tolist() == before + whole[len(before) :] != whole


def test_the_items_of_a_limit_are_spread_evenly_over_the_file(tmp_path, tokenizer):
    path = write(tmp_path / "t.jsonl", *(GOOD | {"context": f"the {number}"} for number in range(10)))
    assert [item.line for item in opened(path, tokenizer, most_items=4)[0].items] == [1, 3, 6, 8]
    assert [len(task.items) for task in opened(path, tokenizer, most_items=40)] == [10]


# ---------------------------------------------------------------- in a run

RUN = """
run: {name: tiny}
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
data: {sequence_length: 32}
batch: {global_batch_size: 8, micro_batch_size: 2}
engine: {precision: fp32}
optimizer: {lr: 1e-2}
train: {max_steps: 12}
evaluate: {every_steps: 6, tasks_every_steps: 4}
checkpoint: {every_steps: 3}
log: {every_steps: 1, sinks: [console, jsonl]}
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """Flags of a run with two tasks; the last one is the folder of its run directory."""
    folder = tmp_path_factory.mktemp("run")
    words = ["the", "three", "return", "quick", "brown", "area", "radius", "0.5", "=", "+\n"]
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(words, size)) for size in draw.integers(3, 40, 150)]
    tokenizer = make_tokenizer(folder / "tokenizer")
    write_token_file(tokenizer, texts[30:], folder / "train")
    write_token_file(tokenizer, texts[:30], folder / "valid")
    (folder / "tasks").mkdir()
    choices = [[f" {word}", " zqx" * (1 + number)] for number, word in enumerate(words[:8])]
    items = [{"context": "the three", "choices": each, "answer": 0} for each in choices]
    write(folder / "tasks" / "words.jsonl", *items)
    write(folder / "tasks" / "next.jsonl", *({"context": f"{word} quick", "continuation": " brown"} for word in words[:5]))
    (folder / "settings.yaml").write_text(RUN)
    data = {name: f"[{{path: {folder / name}}}]" for name in ("train", "valid")}
    found = ["--config", str(folder / "settings.yaml"), "--tokenizer.path", str(tokenizer), "--data.train", data["train"]]
    found += ["--data.valid", data["valid"], "--evaluate.tasks", f"[{folder / 'tasks'}]"]
    return [*found, "--run.directory", str(folder / "runs")]


def of_tasks(run: Path) -> list[dict]:
    return [record for record in records(run) if "task_accuracy" in record]


@pytest.fixture(scope="module")
def straight(flags) -> Path:
    assert run_ranks(2, train_here, flags) == [0, 0]
    return run_of(flags)


def test_a_run_measures_its_tasks_on_its_schedule_and_learns_them(straight):
    found = of_tasks(straight)
    assert [record["step"] for record in found] == [4, 8, 12] and not any("task_weights" in record for record in found)
    assert [record["step"] for record in records(straight) if "val_loss" in record] == [6, 12]
    assert found[-1]["task_bits_per_byte"] < found[0]["task_bits_per_byte"]
    assert found[-1]["task/words/accuracy"] > found[-1]["task/words/chance"] == 0.5
    assert all(record["tokens"] == record["step"] * 8 * 32 and record["task_seconds"] > 0 for record in found)
    console = (straight / "console.log").read_text()
    assert f"{found[-1]['task/words/accuracy']:.1%} right (guessing: 50.0%)" in console
    assert "13 items of 2 tasks (next, words)" in console


def test_other_ranks_measure_the_same_and_a_run_stopped_before_its_tasks_catches_up(flags, straight):
    alone = [*flags[:-1], flags[-1] + "-alone"]
    assert run_ranks(1, signal_itself_at, alone, 0, 7, signal.SIGTERM) in ([75], [0])
    if max(record["step"] for record in records(run_of(alone))) < 12:
        assert run_ranks(1, train_here, alone) == [0]
    for one, two in zip(of_tasks(straight), of_tasks(run_of(alone)), strict=True):
        assert {key: one[key] for key in one if key != "task_seconds"} == pytest.approx(
            {key: two[key] for key in two if key != "task_seconds"}, rel=1e-4
        )


def test_tasks_that_a_stop_left_over_come_first_in_the_next_start(flags, monkeypatch):
    """The request arrives with the step after which they are due."""
    averaged = ["--train.max_steps", "8", "--optimizer.average_decay", "0.9"]
    late, asked = [*averaged, *flags[:-1], flags[-1] + "-late"], []
    flags_of = StopRequest.flags

    def stop_at_the_fourth_step(self):
        asked.append(1)
        return [len(asked) >= 4, *flags_of(self)[1:]]

    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "flags", stop_at_the_fourth_step)
        assert train_here(late) != 0
    run = run_of(late)
    state = json.loads((run / "checkpoints" / "step_00000004" / "state.json").read_text())
    assert (state["progress"]["tasks_due"], state["progress"]["evaluation_due"], of_tasks(run)) == (True, False, [])
    assert train_here(late) == 0
    assert [(record["step"], record["task_weights"]) for record in of_tasks(run)] == [(4, "average"), (8, "average")]
    assert "tasks at step 8 of the average of the weights: " in (run / "console.log").read_text()
    assert [record["step"] for record in records(run) if "val_loss" in record] == [6, 8]
    assert page(View(run).read_all()).count("step 8, average of the weights") == 2, "validation and tasks"


def test_the_page_and_the_picture_of_a_run_show_tasks_beside_guessing(straight):
    view = View(straight).read_all()
    content = page(view)
    assert "Tasks: right answers" in content and '"name":"guessing, words","value":0.5' in content
    accuracy = view.history.tasks["task/words/accuracy"]
    assert f"<td>{accuracy:.1%}</td><td>50.0%</td>" in content
    axes = draw([read_curves(straight)], "tokens").axes
    assert axes[1].get_ylabel() == "right answers"
    drawn = {line.get_label(): line for line in axes[1].get_lines()}
    values = [list(line.get_ydata()) for line in drawn.values()]
    assert [record["task/words/accuracy"] for record in of_tasks(straight)] in values
    assert any(set(map(float, each)) == {0.5} for each in values)


def test_the_preflight_refuses_a_damaged_task_and_warns_of_long_ones(flags, tmp_path):
    def names(*items: object) -> list[str]:
        path = write(tmp_path / "t.jsonl", *items)
        return [each.name for each in preflight(load([*flags, "--evaluate.tasks", f"[{path}]"], world_size=None)).findings]

    assert "task-refused" in names(GOOD | {"answer": 5})
    assert "task-truncated" in names(GOOD | {"context": "the quick brown fox " * 20})
    assert not {"task-refused", "task-truncated", "task-repeated"} & set(names(GOOD))


def test_settings_of_tasks_that_cannot_work_are_refused(flags):
    for words, key in (
        (["--tokenizer.path", "null", "--model.vocab_size", "320"], "evaluate.tasks"),
        (["--evaluate.tasks", "[]"], "evaluate.tasks_every_steps"),
        (
            ["--evaluate.tasks", "[]", "--evaluate.tasks_every_steps", "null", "--evaluate.task_items", "3"],
            "evaluate.task_items",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            load([*flags, *words])
        assert [problem.key for problem in caught.value.problems] == [key]


def test_ranks_with_other_tasks_are_told_apart(flags, tmp_path):
    path = write(tmp_path / "words.jsonl", GOOD)
    found = []
    for line in (GOOD, GOOD | {"answer": 1}):
        write(path, line)
        config = load([*flags, "--evaluate.tasks", f"[{path}]"], world_size=None)
        found.append(facts(config, open_parts(config), run_of(flags)))
    assert {key for key in found[0] if found[0][key] != found[1][key]} == {"task words"}


# ---------------------------------------------------------------- a trained model


def evaluate_here(words: list[str]) -> None:
    program.main(words)


def test_files_are_measured_alone_and_on_two_ranks_as_the_run_measured_them(flags, straight, tmp_path):
    last = of_tasks(straight)[-1]
    names = f"{Path(flags[-1]).parent / 'tasks'}"
    words = ["--run", str(straight), "--tasks", names, "--precision", "fp32", "--output"]
    for ranks, config in ((1, "ddp"), (2, "fsdp2")):
        path = tmp_path / f"{ranks}.json"
        run_ranks(ranks, evaluate_here, [*words, str(path), "--engine", config])
        found = json.loads(path.read_text())
        assert (found["step"], found["tasks"].keys()) == (12, {"words", "next"})
        for task, figures in found["tasks"].items():
            for figure, value in figures.items():
                assert last[f"task/{task}/{figure}"] == pytest.approx(value, rel=1e-5), (ranks, task, figure)
