"""The comparison of recipes: every recipe gets a fair search, and a peer's loop trains and validates exactly as ours."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import yaml

from benchmarks import recipe_peers, recipes
from benchmarks.recipes import Recipe, Result, Run, around, best_rate, next_runs, table, tokens_to_reach
from pretrain import UserError
from pretrain import config as settings
from pretrain.model.transformer import build
from pretrain.optim.optimizer import build_optimizer
from pretrain.optim.schedule import lr_at
from tests.models import make_tokenizer, train_here, write_token_file
from tests.ranks import run_ranks
from tests.test_train import records

OURS = Recipe("ours", 4e-3, ())
SEEDS = [5, 0, 7]


def searched(loss, seeds: list[int], recipe: Recipe = OURS) -> recipes.Results:
    """The results of a complete search, when a run ends at loss(lr, seed)."""
    results: recipes.Results = {}
    while due := next_runs(recipe, results, seeds):
        assert not results.keys() & set(due), "a run is repeated"
        results |= {run: Result([loss(run.lr, run.seed)] * 4, 100, 1.0) for run in due}
        assert len(results) < 60, "the search does not end"
    return results


@pytest.mark.parametrize("best", [4e-3, 1e-3, 6.4e-2])
def test_the_search_ends_with_a_rate_between_two_worse_ones_that_every_seed_has(best):
    results = searched(lambda lr, seed: abs(math.log2(lr / best)) + 0.01 * seed, SEEDS)
    rate = best_rate(OURS, results, SEEDS)
    assert rate == pytest.approx(best)
    for lr in around(rate):
        assert all(Run(OURS, lr, seed) in results for seed in SEEDS)


def test_a_rate_that_only_the_first_seed_likes_is_not_the_best():
    """The other seeds want twice the rate, at the edge of the first three; so its upper neighbour is trained, too."""
    results = searched(lambda lr, seed: abs(math.log2(lr / (4e-3 if seed == SEEDS[0] else 8e-3))), SEEDS)
    rate = best_rate(OURS, results, SEEDS)
    assert rate == pytest.approx(8e-3)
    assert all(Run(OURS, lr, seed) in results for lr in around(rate) for seed in SEEDS)


def test_a_rate_that_diverges_is_an_edge_like_any_other():
    results = searched(lambda lr, seed: math.inf if lr > 3e-3 else 2 - lr, [0, 1])
    assert best_rate(OURS, results, [0, 1]) == pytest.approx(2e-3)


def test_ours_is_the_recipe_of_the_quick_start():
    """Its optimizer, its schedule and what it says of the model beside sizes; the warm-up is a share of the steps."""
    quick = settings.load(["--config", "configs/quickstart.yaml"], world_size=None)
    least = ["--data.synthetic.kind", "uniform", "--model.vocab_size", "64", "--schedule.warmup_steps", "20",
             "--train.max_steps", "300"]  # fmt: skip
    shape = {
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
    }
    for recipe in recipes.RECIPES[:3]:
        ours = settings.load([*least, *recipe.flags, "--optimizer.lr", str(recipe.lr)], world_size=None)
        assert recipe.name.startswith("ours")
        assert (ours.optimizer, ours.schedule) == (quick.optimizer, quick.schedule)
        differ = {key for key, value in vars(ours.model).items() if value != getattr(quick.model, key)}
        assert differ <= shape, differ


def test_the_tokens_that_reach_a_loss_are_right_for_a_line_in_the_logarithm():
    """The curve of a law b = 3 - log(share) is exact between its points and beyond them."""
    curve = [(share, 3 - math.log(share)) for share in (0.5, 2 / 3, 1.0)]
    for share in (0.3, 0.5, 0.6, 0.8, 1.0, 1.5):
        assert tokens_to_reach(3 - math.log(share), curve) == pytest.approx(share)


def test_the_table_says_how_many_tokens_ours_needs_for_the_last_figure_of_another_recipe():
    def row(name: str, share: float, bits: float) -> dict:
        mean = [9.0, 8.0, 7.0, bits]
        return {"recipe": name, "lr": 1e-3, "share": share, "parameters": 10, "mean": mean, "low": mean, "high": mean,
                "cpu_seconds": 3.0}  # fmt: skip

    rows = [row("ours", 1, 2.0), row("ours 1/2", 0.5, 2.1), row("slow", 1, 2.1), row("slower", 1, 2.2)]
    lines = [line for line in table(rows, SEEDS) if "reaches" in line]
    assert ["0.50" in line and "1/2.00" in line and "extrapolated" not in line for line in lines] == [True, False]
    assert "0.25" in lines[1] and "extrapolated" in lines[1]


def test_a_result_of_other_settings_or_of_another_text_is_not_used(tmp_path: Path):
    bench = recipes.Bench(tmp_path, recipes.SCALES["tiny"], {})
    old, new = (Run(Recipe("clip", 4e-3, ("--optimizer.grad_clip", value)), 4e-3, 0) for value in ("0", "2"))
    path = tmp_path / old.path / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"result": Result([2.0] * 4, 10, 1.0)._asdict(), "flags": old.recipe.flags}))
    assert bench.read(old) == Result([2.0] * 4, 10, 1.0)
    with pytest.raises(UserError, match="grad_clip 0"):
        bench.read(new)
    (tmp_path / "text.json").write_text('["--input", "stdlib"]')
    with pytest.raises(UserError, match="stdlib"):
        bench.prepare(["--input", "other.txt"])


PAIR = """
run: {name: pair}
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
batch: {global_batch_size: 6, micro_batch_size: 6}
engine: {precision: fp32, compile: none}
optimizer: {lr: 1e-2}
schedule: {name: cosine}
train: {max_steps: 12}
evaluate: {every_steps: 4}
log: {every_steps: 1, sinks: [console, jsonl]}
"""


def train_as_a_peer(argv: list[str]) -> tuple[int, list[dict]]:
    """Trains our own model with our own optimizer and schedule in the loop that peers get."""
    config = settings.load(argv)

    def make(folder, model, length, lr):
        ours = build(model, "cpu", config.run.seed)
        return ours, lambda tokens_BT, labels_BT: ours(tokens_BT, labels_BT).loss_sum, build_optimizer(ours, config.optimizer)

    def rate(step, steps, peak):
        return lr_at(step, config.schedule, peak, steps)

    recipe_peers.PEERS["ours"] = (make, rate)
    return recipe_peers.train("ours", "", config)


def test_the_loop_of_the_peers_trains_and_validates_as_launch_pretrain_does(tmp_path: Path):
    """Same model, optimizer and schedule in both: so samples, order, clipping, rates, losses and validation must agree."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    texts = [" ".join(str(number * factor) for number in range(60)) for factor in range(1, 20)]
    write_token_file(tokenizer, texts[:15], tmp_path / "train")
    write_token_file(tokenizer, texts[15:], tmp_path / "valid")
    data = {"train": [{"path": str(tmp_path / "train")}], "valid": [{"path": str(tmp_path / "valid")}], "sequence_length": 16}
    named = {"tokenizer": {"path": str(tokenizer)}, "data": data}
    (tmp_path / "pair.yaml").write_text(PAIR + yaml.safe_dump(named))
    argv = ["--config", str(tmp_path / "pair.yaml"), "--run.directory", str(tmp_path)]
    assert run_ranks(1, train_here, argv) == [0]
    ours = records(tmp_path / "pair")
    ((parameters, theirs),) = run_ranks(1, train_as_a_peer, argv)
    assert parameters == ours[0]["parameters"]
    compared = 0
    for key in ("loss", "val_loss", "val_bits_per_byte"):
        expected = {record["step"]: record[key] for record in ours if key in record}
        found = {record["step"]: record[key] for record in theirs if key in record}
        assert found and found.keys() <= expected.keys()
        for step, value in found.items():
            assert value == pytest.approx(expected[step], rel=2e-5), f"{key} at step {step}"
            compared += 1
    assert compared >= 12 + 2 * 3


def test_runs_that_are_done_are_not_repeated_and_give_table_picture_and_json(tmp_path: Path, monkeypatch, capsys):
    folder = tmp_path / "stdlib_tiny"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").touch()
    (folder / "text_valid.json").touch()
    for recipe, best in zip([each for each in recipes.RECIPES if each.name in ("ours", "adamw")], (8e-3, 2e-3), strict=True):
        for seed, factor in itertools.product((3, 5), (0.25, 0.5, 1, 2, 4)):
            run, bits = Run(recipe, best * factor, seed), 2 + abs(math.log2(factor))
            (folder / run.path).mkdir(parents=True, exist_ok=True)
            result = Result([bits + 3, bits + 2, bits + 1, bits], 100, 9.0)
            (folder / run.path / "result.json").write_text(json.dumps({"result": result._asdict(), "flags": recipe.flags}))
    monkeypatch.setattr(recipes, "_run", lambda command, *_: pytest.fail(f"trains {command}"))
    recipes.main(["--recipes", "ours", "adamw", "--scale", "tiny", "--seeds", "3", "5", "--output", str(tmp_path)])
    rows = json.loads((folder / "recipes.json").read_text())["rows"]
    assert [(row["recipe"], row["lr"], row["mean"]) for row in rows] == [
        ("ours", 8e-3, [5.0, 4.0, 3.0, 2.0]), ("adamw", 2e-3, [5.0, 4.0, 3.0, 2.0]),
    ]  # fmt: skip
    assert (folder / "recipes.png").stat().st_size > 10_000
    assert "2.0000" in capsys.readouterr().out
