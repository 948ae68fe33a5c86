"""The ladder: laws are recovered, intervals hold what they promise, small runs are of the planned run's family, runs that
cannot predict it are refused, and a run says when it leaves its band."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from pretrain import UserError, schema
from pretrain.config import load
from pretrain.model.flops import num_parameters
from pretrain.plan import ladder, ladder_fit
from pretrain.report import expected
from pretrain.report.plot import draw, read_curves
from pretrain.report.records import read_records
from pretrain.run import command_line, rungs
from tests.models import train_here
from tools import plan_ladder

BIG = """
run: {name: big, seed: 7}
model: {hidden_size: 128, num_hidden_layers: 8, num_attention_heads: 16, num_key_value_heads: 4, vocab_size: 64, head_dim: 8}
data: {synthetic: {kind: markov}, sequence_length: 16}
batch: {global_batch_size: 64, micro_batch_size: 8}
engine: {precision: fp32}
optimizer: {lr: 4e-3}
schedule: {name: wsd, warmup_steps: 400, decay_steps: 8000}
train: {max_tokens: 20480000}
evaluate: {every_steps: 1000, max_batches: 2, sample_prompts: []}
checkpoint: {mirror: "file:///mnt/mirror"}
log: {sinks: [console, jsonl]}
"""


@pytest.fixture
def big(tmp_path) -> Path:
    (tmp_path / "big.yaml").write_text(BIG)
    return tmp_path / "big.yaml"


def law(flops: float, e: float = 1.7, above: float = 1.2, exponent: float = 0.16, origin: float = 1e9) -> float:
    return e + above * (flops / origin) ** -exponent


# ---------------------------------------------------------------- laws


def test_a_law_without_noise_is_recovered_far_beyond_its_rungs():
    flops_R = np.geomspace(1e15, 1e18, 5)
    loss_R = 1.9 + 1.1 * (flops_R / 1e16) ** -0.21
    fitted = ladder_fit.bootstrap(flops_R, loss_R, 1e-4 * loss_R, draws=200)
    assert fitted.best.exponent_S[0] == pytest.approx(0.21, rel=0.05)
    assert fitted.best.e_S[0] == pytest.approx(1.9, abs=0.05)
    said = fitted.predict(1e20, 0.0)
    assert said.loss == pytest.approx(1.9 + 1.1 * 1e4**-0.21, abs=0.02)
    assert said.low <= said.loss <= said.high < said.low + 0.05


def test_three_runs_leave_the_exponent_open_and_the_interval_says_so():
    """The same three losses, with 0.5 % of noise: the interval of a run 64 times as large is wider than that of 8 times."""
    flops_R = np.array([1e17, 8e17, 6.4e18])
    loss_R = 1.7 + 1.2 * (flops_R / 1e17) ** -0.15
    fitted = ladder_fit.bootstrap(flops_R, loss_R, 0.005 * loss_R)
    near, far = (fitted.predict(factor * flops_R[-1], 0.005) for factor in (8, 64))
    assert 1.3 * (near.high - near.low) < far.high - far.low
    low, high = np.quantile(fitted.draws.exponent_S, (0.1, 0.9))
    assert high > 1.5 * low


def coverage(shares: tuple[float, ...], count: int, seed: int) -> float:
    """Share of synthetic ladders whose planned run lies in its 80 % interval. Exponents as widely spread as published ones."""
    generator, inside = np.random.default_rng(seed), 0
    noise = math.hypot(ladder_fit.MISFIT, ladder_fit.SEED_NOISE)
    flops_R = 1e20 * np.array(shares)
    for number in range(count):
        exponent = ladder_fit.EXPONENT * math.exp(ladder_fit.EXPONENT_SPREAD * generator.standard_normal())
        e, above = generator.uniform(1.0, 2.5), generator.uniform(0.5, 2.0)
        loss_R, truth = (e + above * (x / flops_R[0]) ** -exponent for x in (flops_R, 1e20))
        loss_R = loss_R * (1 + noise * generator.standard_normal(len(flops_R)))
        said = ladder_fit.bootstrap(flops_R, loss_R, noise * loss_R, seed=number, draws=300).predict(1e20, noise)
        inside += said.low <= truth * (1 + noise * generator.standard_normal()) <= said.high
    return inside / count


def test_intervals_of_80_percent_hold_about_as_many_planned_runs():
    """Of 200 ladders between 72 and 88 %, which is 80 % and three standard deviations of the count."""
    assert 0.72 <= coverage((1 / 1024, 1 / 128, 1 / 16), 200, seed=0) <= 0.88


def test_rungs_that_are_on_no_power_law_widen_the_interval():
    """Of ladders on a law less than 3 in 100 are widened; one whose losses fall ever faster, as those of models that are too
    small do, is."""
    generator, flops_R, widened = np.random.default_rng(0), np.array([1e17, 1e18, 1e19]), 0
    for _ in range(200):
        loss_R = law(flops_R, origin=1e18) * (1 + 0.005 * generator.standard_normal(3))
        fitted = ladder_fit.bootstrap(flops_R, loss_R, 0.005 * loss_R, draws=2)
        widened += ladder_fit.lack_of_fit(fitted.best, flops_R, loss_R, 0.005 * loss_R) > 1
    assert widened < 6
    loss_R = np.array([3.9, 3.3, 2.5])
    fitted = ladder_fit.bootstrap(flops_R, loss_R, 0.005 * loss_R, draws=2)
    assert ladder_fit.lack_of_fit(fitted.best, flops_R, loss_R, 0.005 * loss_R) > 3


@pytest.mark.slow
@pytest.mark.parametrize("shares", [(1 / 1024, 1 / 128, 1 / 16), (0.002, 0.03, 0.2), (1 / 4096, 1 / 512, 1 / 128, 1 / 64)])
def test_intervals_of_80_percent_hold_75_to_85_percent_of_planned_runs(shares):
    assert 0.75 <= coverage(shares, 2000, seed=1) <= 0.85


def test_the_law_in_parameters_and_tokens_is_recovered_and_its_optimum_is_the_smallest_loss():
    """With the constants of Hoffmann et al. 2022; an outlier does not move them (Huber)."""
    truth = ladder_fit.Surface(1.69, 406.4, 410.7, 0.34, 0.28)
    parameters_R = np.array([1, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8]) * 1e7
    tokens_R = parameters_R * np.repeat([5.0, 20.0, 80.0], 4)
    loss_R = truth.loss(parameters_R, tokens_R)
    moved_R = loss_R.copy()
    moved_R[5] *= 1.05
    for losses, tolerance in ((loss_R, 0.002), (moved_R, 0.03)):
        found = ladder_fit.fit_surface(parameters_R, tokens_R, losses)
        assert found.e == pytest.approx(truth.e, abs=10 * tolerance)
        assert (found.alpha, found.beta) == pytest.approx((truth.alpha, truth.beta), abs=tolerance)
    n, d = truth.best(5.76e23)
    assert 6 * n * d == pytest.approx(5.76e23)
    grid = np.geomspace(n / 10, n * 10, 2001)
    assert n == pytest.approx(grid[np.argmin(truth.loss(grid, 5.76e23 / 6 / grid))], rel=0.01)


def test_runs_with_equal_tokens_per_parameter_do_not_tell_the_best_ones():
    parameters_R = np.array([1, 2, 4, 8, 16, 32]) * 1e7
    with pytest.raises(UserError, match="--tokens-factors"):
        ladder_fit.fit_surface(parameters_R, 20 * parameters_R, 3.0 - 0.1 * np.arange(6))


def test_seed_noise_is_measured_and_shrunk_towards_what_is_usual():
    generator = np.random.default_rng(0)
    many = [3.0 * (1 + 0.02 * generator.standard_normal(4)) for _ in range(100)]
    assert ladder_fit.seed_noise(many) == pytest.approx(0.02, rel=0.15)
    assert ladder_fit.seed_noise([]) == pytest.approx(ladder_fit.SEED_NOISE)
    assert ladder_fit.seed_noise([np.array([3.0, 3.0])]) > 0.5 * ladder_fit.SEED_NOISE  # two equal runs prove little


def test_the_best_learning_rate_is_the_minimum_of_a_parabola_and_two_rates_borrow_its_bend():
    rates = np.array([1e-3, 2e-3, 4e-3, 8e-3])

    def loss(lr, best, least):
        return least * (1 + 0.02 * np.log(lr / best) ** 2)

    found = ladder_fit.tune([(rates, loss(rates, 2.6e-3, 3.0)), (rates[1:3], loss(rates[1:3], 2.2e-3, 2.5))])
    assert [each.lr for each in found] == pytest.approx([2.6e-3, 2.2e-3], rel=0.02)
    assert [each.loss for each in found] == pytest.approx([3.0, 2.5], rel=1e-3)
    (edge,) = ladder_fit.tune([(rates, loss(rates, 3e-2, 3.0))])
    assert edge.at_edge and edge.lr == 8e-3
    (single,) = ladder_fit.tune([(rates[:1], np.array([3.0]))])
    assert single.lr is None and single.loss == 3.0


def test_the_learning_rate_of_the_planned_run_follows_the_rungs_and_its_interval_grows_with_the_distance():
    flops_R = np.array([1e16, 1e17, 1e18])
    near, far = (ladder_fit.predict_lr(flops_R, 1e-2 * (flops_R / 1e16) ** -0.1, flops) for flops in (1e19, 1e22))
    assert near.loss == pytest.approx(1e-2 * 1e3**-0.1, rel=0.01) and far.loss == pytest.approx(1e-2 * 1e6**-0.1, rel=0.01)
    assert near.low < near.loss < near.high and far.high / far.low > near.high / near.low


GAINS = {
    "collapse": lambda flops, x_V: 0.6 * (law(flops) - 1.7) * (x_V**-0.4 - 1),  # (L(x) - E) / (L(1) - E) is that of all rungs
    "constant": lambda flops, x_V: 0.3 * (x_V**-0.4 - 1),
    "growing": lambda flops, x_V: 0.3 * (flops / 1e13) ** 0.05 * (x_V**-0.4 - 1),
}


@pytest.mark.parametrize("gain", GAINS.values(), ids=list(GAINS))
def test_the_band_follows_the_rungs_whether_or_not_their_curves_collapse(gain):
    def curve(flops: float) -> tuple[np.ndarray, np.ndarray]:
        x_V = np.linspace(0.02, 1, 50)
        return x_V, law(flops) + gain(flops, x_V)

    flops_R = np.array([1e9, 1e10, 1e11, 1e12])
    fitted = ladder_fit.bootstrap(flops_R, law(flops_R), 1e-3 * law(flops_R))
    found = ladder_fit.band(flops_R, [curve(each) for each in flops_R], np.ones(4), fitted, 1e13, 1e-3)
    assert found.fraction[0] == ladder_fit.FIRST and found.fraction[-1] == 1
    expected_V = np.interp(found.fraction, *curve(1e13))
    assert found.loss == pytest.approx(expected_V, abs=0.02) and found.loss == pytest.approx(expected_V, rel=0.01)
    assert np.all(np.array(found.low) <= expected_V) and np.all(np.array(found.high) >= expected_V)
    gain_V = expected_V - expected_V[-1]
    assert np.all(np.subtract(found.high, found.low) < 0.03 + 0.4 * gain_V)
    said = fitted.predict(1e13, 1e-3)
    assert (found.loss[-1], found.low[-1], found.high[-1]) == pytest.approx((said.loss, said.low, said.high))


def test_rungs_whose_curves_disagree_widen_the_band_and_those_that_are_too_small_hardly_count():
    flops_R, x_V = np.array([1e10, 1e11, 1e12]), np.linspace(0.02, 1, 50)
    fitted = ladder_fit.bootstrap(flops_R, law(flops_R), 1e-3 * law(flops_R))

    def found(factor: float, places: tuple[int, int, int], misfit: float) -> ladder_fit.Band:
        curves = [
            (x_V, law(flops) + factor**place * GAINS["collapse"](flops, x_V))
            for flops, place in zip(flops_R, places, strict=True)
        ]
        return ladder_fit.band(flops_R, curves, np.array([misfit, 1.0, 1.0]), fitted, 1e13, 1e-3)

    half = ladder_fit.PLACES // 2
    agree, bent, first = found(1.0, (0, 0, 0), 1.0), found(2.0, (0, 1, 0), 1.0), found(2.0, (1, 0, 0), 1.0)
    assert bent.high[half] - bent.low[half] > 1.5 * (agree.high[half] - agree.low[half])
    small = found(2.0, (1, 0, 0), ladder_fit.TOO_SMALL)
    assert abs(small.loss[half] - agree.loss[half]) < 0.3 * abs(first.loss[half] - agree.loss[half])


# ---------------------------------------------------------------- small runs


def write(big: Path, folder: Path, *flags: str) -> list[Path]:
    assert plan_ladder.main(["--config", str(big), "--output", str(folder), *flags]) == 0
    return sorted(path for path in folder.glob("w*.yaml"))


def test_small_runs_are_of_the_planned_family_and_every_file_is_a_run(big, tmp_path, capsys):
    files = write(big, tmp_path / "ladder")
    planned = plan_ladder.open_target(load(["--config", str(big)]))
    configs = {path.name: load(["--config", str(path)]) for path in files}
    lengths = set()
    for config in configs.values():
        small, model = plan_ladder.open_target(config), config.model
        assert model.head_dim == 8 and model.hidden_size == 8 * model.num_attention_heads
        assert model.hidden_size / model.num_hidden_layers == pytest.approx(16, rel=0.5)
        assert model.num_attention_heads % model.num_key_value_heads == 0
        assert small.tokens / small.parameters == pytest.approx(planned.tokens / planned.parameters, rel=0.05)
        batch = 64 * (small.tokens / planned.tokens) ** 0.383
        assert abs(config.batch.global_batch_size - batch) <= 0.51
        assert config.batch.global_batch_size % config.batch.micro_batch_size == 0
        assert config.schedule.warmup_steps / small.steps == pytest.approx(400 / planned.steps, rel=0.1)
        assert config.schedule.decay_steps / small.steps == pytest.approx(8000 / planned.steps, rel=0.1)
        assert config.checkpoint.mirror is None  # else small runs would overwrite the planned run's mirror
        samples = config.evaluate.max_batches * config.batch.global_batch_size
        assert 2 * 64 <= samples < 2 * 64 + config.batch.global_batch_size
        lengths.add(small.flops / planned.flops)
    assert len(lengths) == 3 and max(lengths) <= 1 / 16 * 1.001
    script = (tmp_path / "ladder" / "run.sh").read_text()
    trained = [line.split()[1] for line in script.splitlines() if line.startswith("train ")]
    assert sorted(f"{name}.yaml" for name in trained) == list(configs)
    names = [config.run.name for config in configs.values()]
    assert len(set(names)) == len(names) and {config.run.seed for config in configs.values()} == {7, 8}
    shown = capsys.readouterr().out
    total = sum(plan_ladder.open_target(config).flops for config in configs.values())
    assert f"{total:.2e} FLOP = {total / planned.flops:.1%} of the planned run" in shown


def test_the_script_skips_what_has_ended_and_ends_with_the_status_of_a_run_that_failed(big, tmp_path):
    """A program named `python` is called in place of the runs: it writes their state; a file has its exit status."""
    folder = tmp_path / "a ladder"
    write(big, folder, "--seeds", "1")
    stand_in = tmp_path / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text("""#!/bin/sh
name=$(basename "$3" .yaml); mkdir -p "$RUNS/$name"; echo "$name" >> "$RUNS/../started"
status=$(cat "$RUNS/$name/fails" 2>/dev/null || echo 0)
case $status in 0) word=done;; 70) word=diverged;; *) word=failed;; esac
echo "{\\"step\\": 1, \\"status\\": \\"$word\\"}" > "$RUNS/$name/run_state.json"
exit $status
""")
    stand_in.chmod(0o755)
    names = [line.split()[1] for line in (folder / "run.sh").read_text().splitlines() if line.startswith("train ")]

    def run(**failing: int) -> tuple[int, list[str], str]:
        for name in names:
            (folder / "runs" / name).mkdir(parents=True, exist_ok=True)
            (folder / "runs" / name / "fails").write_text(str(failing.get(name, 0)))
        (folder / "started").unlink(missing_ok=True)
        environment = {"PATH": f"{stand_in.parent}:{os.environ['PATH']}", "RUNS": str(folder / "runs")}
        ended = subprocess.run(["sh", folder / "run.sh"], env=environment, capture_output=True, text=True, timeout=60)
        return ended.returncode, (folder / "started").read_text().split(), ended.stdout + ended.stderr

    status, started, said = run(**{names[0]: 70, names[2]: 75})
    assert (status, started) == (75, names[:3]) and f"{names[2]} ended with status 75" in said
    assert f"run 2 of {len(names)}, {names[1]}, at most " not in said  # nothing has been trained yet that tells the speed
    assert re.search(f"run 3 of {len(names)}, {names[2]}, at most [0-9]+ min left", said)
    status, started, said = run()
    assert (status, started) == (0, names[2:]) and f"{names[0]}: has ended before" in said
    assert f"--fit {folder}" in said


def test_parameters_are_what_multiplies_a_token(big):
    """With these, a run costs 6 N D FLOPs and those of attention at every size; without the head it would not."""
    planned = plan_ladder.open_target(load(["--config", str(big)]))
    for small in ladder.rungs(planned, 3, 1 / 1024, 1 / 16):
        model = small.model
        attention = 12 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * 16
        assert small.flops == small.tokens * (6 * small.parameters + attention)
        assert small.parameters < num_parameters(model).total


@pytest.mark.parametrize("count", [3, 4, 5])
def test_few_sizes_are_enough_and_where_they_are_not_the_refusal_says_what_would_be(big, count):
    """The places on the log scale may all be nearest to the smallest sizes, which the first ones must not use up."""
    planned = plan_ladder.open_target(load(["--config", str(big)]))
    with pytest.raises(UserError) as error:
        ladder.rungs(planned, count, 1e-6, 2e-4)
    least = float(re.search(r"--largest ([0-9.e-]+)", str(error.value))[1])
    found = ladder.rungs(planned, count, 1e-6, least)
    sizes = [each.parameters for each in found]
    assert len(sizes) == count and sorted(set(sizes)) == sizes
    with pytest.raises(UserError, match=f"only {count - 1} smaller models"):
        ladder.rungs(planned, count, 1e-6, 0.99 * found[-1].flops / planned.flops)


def test_what_no_ladder_can_predict_is_refused(big, tmp_path):
    def refused(*flags: str) -> str:
        with pytest.raises(UserError) as error:
            write(big, tmp_path / "ladder", *flags)
        return str(error.value)

    assert "train.stages" in refused("--train.stages", "[{after_tokens: 1000000, lr: 1e-3}]")
    files = ["--data.synthetic", "null", "--data.train", "[{path: data/x}]"]
    assert "data.valid is empty" in refused(*files)
    assert "one head" in refused("--model.num_attention_heads", "2", "--model.num_key_value_heads", "2")
    for flags, text in ((["--smallest", "0.5"], "--smallest"), (["--gpu", "abacus"], "--gpu"), (["--rungs", "2"], "--rungs")):
        with pytest.raises(SystemExit) as end:
            write(big, tmp_path / "ladder", *flags)
        assert end.value.code == 2, text


# ---------------------------------------------------------------- predictions


def answer(*flags: str) -> dict:
    """What --fit with these flags says, without its picture."""
    options, settings = command_line.parse_with_settings(plan_ladder.make_parser(), ["--fit", *flags])
    return plan_ladder.answer(options, settings)


def finish(file: Path, loss: float, bigram: float = 5.0) -> Path:
    """Writes what a run of these settings leaves behind, with this final loss."""
    config = load(["--config", str(file)])
    folder = Path(config.run.directory) / config.run.name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(schema.to_yaml(config))
    steps = plan_ladder.open_target(config).steps
    records = [{"step": 0, "reference_lines": {"bigram": bigram}}]
    records += [{"step": max(1, round(x * steps)), "val_loss": 1.7 + (loss - 1.7) * x**-0.3} for x in np.linspace(0.05, 1, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    (folder / "run_state.json").write_text(json.dumps({"step": steps, "status": "done", "exit_status": 0}))
    return folder


def train_all(files: list[Path]) -> list[Path]:
    """Finishes all runs by a law, with a best learning rate of 6e-3 and 0.2 % of noise of seeds."""
    generator, folders = np.random.default_rng(3), []
    for file in files:
        small = plan_ladder.open_target(load(["--config", str(file)]))
        tuned = law(small.flops) * (1 + 0.01 * math.log(small.lr / 6e-3) ** 2)
        folders.append(finish(file, tuned * (1 + 0.002 * generator.standard_normal())))
    return folders


def test_a_ladder_predicts_the_planned_run_and_writes_what_it_says(big, tmp_path, capsys):
    folder = tmp_path / "ladder"
    train_all(write(big, folder))
    capsys.readouterr()
    assert plan_ladder.main(["--fit", str(folder), "--budget-flops", "1e15"]) == 0
    said, shown = json.loads((folder / "prediction.json").read_text()), capsys.readouterr().out
    planned = plan_ladder.open_target(load(["--config", str(big)]))
    assert said["loss"]["low"] < law(planned.flops) < said["loss"]["high"]
    assert said["loss"]["high"] - said["loss"]["low"] < 0.15
    assert said["lr"]["low"] < 6e-3 < said["lr"]["high"]
    assert 0.001 < said["seed_noise"] < 0.006
    assert f"{said['loss']['loss']:.4f} nats per token" in shown and "--evaluate.expected" in shown
    spent = said["budget"]
    assert spent["tokens"] / spent["parameters"] == pytest.approx(planned.tokens / planned.parameters)
    assert (folder / "prediction.png").stat().st_size > 10_000
    read = expected.read_expected(folder / "prediction.json")
    assert read.figures(1.0)["expected_val_loss"] == pytest.approx(said["loss"]["loss"], abs=0.02)
    with pytest.raises(UserError, match="has runs already"):
        write(big, folder)
    several = answer(str(folder))["loss"]
    by_width = {each.name.split("_")[0]: each for each in sorted((folder / "runs").iterdir())}
    alone = answer(*map(str, by_width.values()), "--config", str(big))
    assert sum("a single learning rate was tried" in note for note in alone["notes"]) == 1
    assert alone["loss"]["high"] - alone["loss"]["low"] > 1.3 * (several["high"] - several["low"])


def test_rungs_above_the_bigram_entropy_count_less_and_are_named(big, tmp_path):
    """The smallest rung is 10 % above the law, as a model that only knows pairs of tokens may be: the prediction is near the
    law all the same."""
    folder = tmp_path / "ladder"
    for file in write(big, folder, "--seeds", "1"):
        small = plan_ladder.open_target(load(["--config", str(file)]))
        factor = 1.1 if small.model.hidden_size < 24 else 1.0
        finish(file, law(small.flops) * factor * (1 + 0.01 * math.log(small.lr / 6e-3) ** 2), bigram=law(5e11))
    said, planned = answer(str(folder)), plan_ladder.open_target(load(["--config", str(big)]))
    assert sum("above the bigram entropy" in note for note in said["notes"]) == 1
    assert said["loss"]["low"] < law(planned.flops) < said["loss"]["high"]


def test_no_rung_has_a_single_layer_and_one_by_hand_counts_less_and_is_named(big, tmp_path, monkeypatch):
    """Such a rung is 5 % above the law: the prediction is near the law all the same. A family of single layers keeps them."""
    flat = ladder.shrink(plan_ladder.open_target(load(["--config", str(big)])).model, 2)
    assert flat.num_hidden_layers == 1
    least = write(big, tmp_path / "least", "--seeds", "1", "--smallest", "1e-6")
    assert min(load(["--config", str(file)]).model.num_hidden_layers for file in least) == ladder.LEAST_LAYERS
    files = write(big, tmp_path / "ladder", "--seeds", "1")
    planned = plan_ladder.open_target(load(["--config", str(big)]))
    by_hand = ladder.rung(planned, 2)
    for lr in (3e-3, 6e-3, 1.2e-2):
        name, known = f"flat_lr{lr:g}", load(["--config", str(big)])
        config = rungs.rung_config(known, planned.steps, by_hand, lr, 7, name, tmp_path / "ladder", 1)
        files.append(tmp_path / "ladder" / f"{name}.yaml")
        files[-1].write_text(schema.to_yaml(config))
    for file in files:
        small = plan_ladder.open_target(load(["--config", str(file)]))
        factor = 1.05 if small.model.num_hidden_layers == 1 else 1.0
        finish(file, law(small.flops) * factor * (1 + 0.01 * math.log(small.lr / 6e-3) ** 2), bigram=9.0)
    said = answer(str(tmp_path / "ladder"))
    assert sum(note.startswith("width 16: a single layer cannot") for note in said["notes"]) == 1
    assert said["loss"]["low"] < law(planned.flops) < said["loss"]["high"]
    monkeypatch.setattr(plan_ladder, "has_too_few_layers", lambda step, big: False)
    misled = answer(str(tmp_path / "ladder"))["loss"]["loss"]
    assert law(planned.flops) < said["loss"]["loss"] < misled - 0.1 * (misled - law(planned.flops))
    single = ["--model.num_hidden_layers", "1", "--batch.global_batch_size", "256"]
    write(big, tmp_path / "single", *single)


def test_a_best_learning_rate_at_the_edge_comes_with_the_command_that_trains_one_beyond_it(big, tmp_path):
    folder = tmp_path / "ladder"
    for file in write(big, folder, "--seeds", "1"):
        small = plan_ladder.open_target(load(["--config", str(file)]))
        finish(file, law(small.flops) * (1 + 0.01 * math.log(small.lr / 1.0) ** 2))
    note, *_ = (note for note in answer(str(folder))["notes"] if "at the edge" in note)
    words = note.partition("launch/pretrain.py ")[2].split()
    config = load(words)
    tried = [load(["--config", str(file)]).optimizer.lr for file in folder.glob("w40_*.yaml")]
    assert config.optimizer.lr == pytest.approx(2 * max(tried), rel=0.01) and config.model.hidden_size == 40
    assert not (Path(config.run.directory) / config.run.name).exists()


def test_runs_on_other_numbers_of_tokens_tell_the_best_number_for_a_budget(big, tmp_path):
    truth = ladder_fit.Surface(1.5, 30.0, 60.0, 0.35, 0.3)
    folder = tmp_path / "ladder"
    for file in write(big, folder, "--seeds", "1", "--tokens-factors", "0.25", "4"):
        small = plan_ladder.open_target(load(["--config", str(file)]))
        finish(file, truth.loss(small.parameters, small.tokens) * (1 + 0.01 * math.log(small.lr / 6e-3) ** 2))
    spent = answer(str(folder), "--budget-flops", "1e15")["budget"]
    assert spent["measured_ratio"]
    assert spent["parameters"] == pytest.approx(truth.best(1e15)[0], rel=0.25)
    assert spent["loss"] == pytest.approx(truth.loss(*truth.best(1e15)), rel=0.01)


def test_runs_that_cannot_predict_the_planned_one_are_named(big, tmp_path):
    folder = tmp_path / "ladder"
    folders = train_all(write(big, folder, "--seeds", "1"))

    def refused(*flags: str) -> str:
        with pytest.raises(UserError) as error:
            answer(*flags)
        return str(error.value)

    state = folders[0] / "run_state.json"
    kept = state.read_text()
    state.write_text(json.dumps({"step": 3, "status": "preempted", "exit_status": 75}))
    assert f"{folders[0]} is not finished (status preempted, step 3 of" in refused(str(folder))
    state.write_text(json.dumps({"step": 3, "status": "diverged", "exit_status": 70}))
    assert any(f"{folders[0].name} diverged" in note for note in answer(str(folder))["notes"])
    state.write_text(kept)

    settings = folders[-1] / "config.yaml"
    changed = yaml.safe_load(settings.read_text())
    for section, key, value in (("data", "sequence_length", 32), ("optimizer", "name", "muon"), ("model", "vocab_size", 128)):
        other = json.loads(json.dumps(changed))
        other[section][key] = value
        settings.write_text(yaml.safe_dump(other))
        text = refused(str(folder))
        assert str(folders[-1]) in text and ("vocabulary" if key == "vocab_size" else f"{section}.{key}") in text
    settings.write_text(yaml.safe_dump(changed))
    two_widths = sorted({each.name.split("_")[0] for each in folders})[:2]
    few = [str(each) for each in folders if each.name.split("_")[0] in two_widths]
    assert "at least 3 sizes" in refused(*few, "--config", str(big))
    assert "no run is here" in refused(str(tmp_path / "nothing"), "--config", str(big))


# ---------------------------------------------------------------- the band of a run


def prediction(tiny: list[str], path: Path, loss: float) -> Path:
    """A prediction for the tiny run, of this loss at all its steps."""
    config = load(tiny)
    target = plan_ladder.open_target(config)
    band = {"fraction": [0.1, 1.0], "loss": [loss, loss], "low": [loss - 0.01] * 2, "high": [loss + 0.01] * 2}
    planned = {"parameters": target.parameters, "tokens": target.tokens}
    said = {"format_version": 1, "planned": planned, "settings": rungs.compared(config), "band": band}
    path.write_text(json.dumps(said))
    return path


def test_a_run_says_where_it_is_in_its_band_and_that_it_left_it_once(tiny, tmp_path, capfd):
    """Losses of the tiny run are between 2 and 4.2 nats: a band at 1 nat is left at the first validation, and stays left."""
    path = prediction(tiny, tmp_path / "prediction.json", 1.0)
    assert train_here([*tiny, "--evaluate.expected", str(path)]) == 0
    folder = tmp_path / "runs" / "tiny"
    records = read_records(folder)
    validations = [each for each in records if "val_loss" in each]
    assert [each["step"] for each in validations] == [10, 20]
    for each in validations:
        assert [each[key] for key in expected.KEYS] == pytest.approx([1.0, 0.99, 1.01])
        assert expected.side(each) == "above"
    (alarm,) = (each for each in records if each.get("alarm") == "off_course")
    assert alarm["step"] == 10 and "expected 1.0000 (0.9900 to 1.0100): above the band" in alarm["text"]
    assert capfd.readouterr().out.count("above the band") >= 3  # two validations and one alarm
    axes = draw([read_curves(folder)], "step").axes[0]
    assert [each.get_label() for each in axes.collections].count("expected") == 1


def test_a_prediction_of_another_run_is_refused_before_the_run(tiny, tmp_path, capfd):
    path = prediction(tiny, tmp_path / "prediction.json", 3.0)

    def refused(*flags: str) -> str:
        name = f"refused{len(list((tmp_path / 'runs').glob('*')))}"  # a folder serves one run of a process
        assert train_here([*tiny, "--evaluate.expected", str(path), "--run.name", name, *flags]) == 2
        assert not list((tmp_path / "runs").glob("*/metrics.jsonl"))
        return capfd.readouterr().err

    assert "parameters there and" in refused("--model.hidden_size", "64")
    assert "tokens there and" in refused("--train.max_steps", "40")
    assert "optimizer.name is adamw there and muon here" in refused("--optimizer.name", "muon")
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    assert "has format 99" in refused()
    path.write_text("{}")
    assert "is no prediction" in refused()
    path.unlink()
    assert "cannot be read" in refused()


def test_a_loss_that_is_not_finite_is_above_its_band():
    record = dict(zip(expected.KEYS, (3.0, 2.9, 3.1), strict=True))
    assert [expected.side(record | {"val_loss": loss}) for loss in (2.8, 3.1, 3.2, math.nan)] == [
        "below",
        "in",
        "above",
        "above",
    ]
    assert expected.side({"val_loss": 3.0}) == ""
