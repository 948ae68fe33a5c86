"""tools/check_run.py --invariance accepts equal results, fails on any difference, names the cause, and refuses bad settings."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain import invariance, train
from pretrain.config import Config, EngineConfig, ParallelConfig, load
from pretrain.engines.start import start_engine
from pretrain.model.config import ModelConfig, MoeConfig, resolve_model, shrink
from pretrain.model.flops import num_parameters
from pretrain.model.transformer import build
from pretrain.train import _sample_losses

ROOT = Path(__file__).parents[1]
FIGURES = ("loss_difference", "source_difference", "norm_difference", "routing_difference", "weight_difference")


def configuration(**sections: str) -> Config:
    """configs/dummy.yaml with settings of some sections, in YAML."""
    flags = [each for section, values in sections.items() for each in (f"--{section}", values)]
    return load(["--config", str(ROOT / "configs" / "dummy.yaml"), *flags], world_size=None)


def outcome(precision: str = "fp32", **parallel: int) -> invariance.Outcome:
    """One that passed, of this kind of parallelism."""
    engine = EngineConfig(name="fsdp2", precision=precision, parallel=ParallelConfig(**parallel))
    case = invariance.Case(engine, 4, 1, 16)
    return invariance.Outcome(case, [4.0], [1.0], [9], 1e-7, 1e-7, 1e-7, 0, 1e-7, 1e-8, [], [], 25, {})


def wrong(right: invariance.Outcome) -> invariance.Outcome:
    return dataclasses.replace(right, loss_difference=0.5, token_difference=3, wrong_gradients=["lm_head.weight"])


def check(*flags: str, root: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/check_run.py", *flags]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.slow
def test_a_correct_configuration_passes_and_the_table_is_written(tmp_path):
    done = check(
        "--config", "configs/dummy.yaml", "--invariance", "--engine.precision", "fp32", "--json", str(tmp_path / "t.json")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed: no number depends on the split" in done.stdout
    report = json.loads((tmp_path / "t.json").read_text())
    assert {row["case"]["ranks"] for row in report["cases"]} == {1, 2} and report["wrong"] == [] and report["seed"] == 1234
    assert all(row["passed"] and row["loss_difference"] < 1e-6 and row["token_difference"] == 0 for row in report["cases"])
    assert list(report["not_checked"]) == ["expert 2"] and "not checked: expert 2" in done.stdout
    kinds = [row["case"]["engine"]["parallel"] for row in report["cases"]]
    assert {"tensor": 1, "sequence": 2, "expert": 1} in kinds and {"tensor": 2, "sequence": 1, "expert": 1} in kinds


def test_a_wrong_configuration_and_a_wrong_command_end_with_2():
    done = check("--config", "configs/dummy.yaml", "--invariance", "--engine.nme", "ddp")
    assert done.returncode == 2 and "engine.name" in done.stderr
    assert check("--config", "configs/dummy.yaml", "--invariance", "--processes", "0").returncode == 2


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("value", [2e-6, math.nan, math.inf])
def test_any_difference_and_nan_fail(figure, value):
    assert outcome().passed and not dataclasses.replace(outcome(), **{figure: value}).passed


def test_a_token_too_many_and_a_rank_that_fails_fail():
    assert not dataclasses.replace(outcome(), token_difference=1).passed
    assert not dataclasses.replace(outcome(), error="RuntimeError: rank 0 failed").passed


def test_weights_that_no_rank_has_are_never_equal():
    case = invariance.Case(EngineConfig(precision="fp32"), 1, 1, 8)
    weights = {f"model/{name}": torch.ones(3) for name in "abc"}
    figures = [{"loss": 4.0, "norm": 1.0, "tokens": 9, "loss/0": 4.0}]
    reference = invariance.Reference(invariance.Steps(figures, weights, weights), weights, 0)
    whole = [(name, (3,), 0, weight.numpy()) for name, weight in weights.items()]
    part = [*whole[:1], ("model/b", (3,), 0, weights["model/b"][:2].numpy()), whole[2]]
    for pieces, passed in ((whole, True), (part, False)):
        found = invariance.compare(case, [(figures, pieces, pieces, {})], reference, 0.5)
        assert found.passed == passed and found.wrong_weights == found.wrong_gradients == ([] if passed else ["b"])


def sources_of_the_first_micro_batch(engine, window, losses):
    return _sample_losses(engine, [batch._replace(sources_B=window[0].sources_B) for batch in window], losses)


def tokens_of_all_labels(engine, window, losses):
    samples = _sample_losses(engine, window, losses)
    return samples._replace(tokens_B=torch.full_like(samples.tokens_B, invariance.LENGTH))


def last_micro_batch_only(engine, window, losses):
    return _sample_losses(engine, window[-1:], losses[-1:])


@pytest.mark.parametrize("plant", [None, sources_of_the_first_micro_batch, tokens_of_all_labels, last_micro_batch_only])
def test_a_wrong_loss_of_a_source_is_found(plant, monkeypatch):
    """Where all else is right."""
    model = invariance.small_model(ModelConfig(hidden_size=64, num_hidden_layers=1))
    case = invariance.Case(EngineConfig(name="ddp", precision="fp32", compile="none"), 1, 2, 8)
    reference = invariance.make_reference(model, case, 0.5, 3)
    if plant:
        monkeypatch.setattr(train, "_sample_losses", plant)
    ranks = [invariance.train(start_engine(case.engine), case, model, 0.5, 3, reference.batch_seed)]
    found = invariance.compare(case, ranks, reference, 0.5)
    wrong = {name for name, (difference, allowed) in found.differences.items() if not difference <= allowed}
    assert wrong == ({"losses of sources"} if plant else set())


def test_clipping_does_not_hide_or_invent_wrong_gradients():
    """The norm is wrong: so are the clipped gradients, but not those before clipping. Then a gradient of twice the size."""
    case = invariance.Case(EngineConfig(precision="fp32"), 1, 1, 8)
    start, gradient = torch.ones(3), torch.tensor([0.3, 0.4, 0.0])
    true = [{"loss": 4.0, "norm": 1.0, "tokens": 9, "loss/0": 4.0}]
    first = {"model/a": start - 0.5 * gradient}
    reference = invariance.Reference(invariance.Steps(true, first, first), {"model/a": start}, 0)
    for size, wrong_gradients in ((1.0, []), (2.0, ["a"])):
        weight = start - 0.25 * size * gradient  # clipped to 0.5 from a norm of 2
        pieces = [("model/a", (3,), 0, weight.numpy())]
        found = invariance.compare(case, [([true[0] | {"norm": 2.0}], pieces, pieces, {})], reference, 0.5)
        assert not found.passed and found.wrong_gradients == wrong_gradients


def test_the_simplest_cause_is_named_and_explains_the_others():
    kinds = [{}, {"sequence": 2}, {"tensor": 2}, {"sequence": 2, "tensor": 2}, {"sequence": 4}]
    right = [outcome(precision, **each) for precision in ("fp32", "bf16") for each in kinds]

    def named(*guilty: tuple[str, dict]) -> list[str]:
        outcomes = [wrong(each) if (each.case.engine.precision, each.case.kinds) in guilty else each for each in right]
        return invariance.causes(outcomes)

    assert named() == []
    [sentence] = named(("fp32", {"sequence": 2}), ("fp32", {"tensor": 2, "sequence": 2}), ("bf16", {"sequence": 2}))
    assert sentence == (
        "sequence 2 is wrong under fsdp2 (1 of 1 splits): loss by 5.0e-01, tokens by 3; 1 of 25 gradients of step 1 are "
        "wrong, first lm_head.weight"
    )
    [sentence] = named(("fp32", {"tensor": 2, "sequence": 2}))
    assert sentence.startswith("tensor 2 x sequence 2 is wrong under fsdp2 (1 of 1 splits)")
    assert [each.split(" is")[0] for each in named(("fp32", {"sequence": 4}), ("fp32", {"tensor": 2}))] == [
        "tensor 2",
        "sequence 4",
    ]
    [sentence] = named(("bf16", {"tensor": 2}))
    assert sentence.startswith("tensor 2 is wrong under fsdp2 in bf16")
    [sentence] = named(("fp32", {}), ("fp32", {"sequence": 2}), ("bf16", {"tensor": 2}))
    assert sentence.startswith("fsdp2 is wrong by itself (1 of 1 splits)")


def test_a_rank_that_fails_is_a_cause():
    failed = dataclasses.replace(outcome(expert=2), error="rank 0 failed:\nTraceback\nKeyError: 'experts'\n")
    assert invariance.causes([failed]) == ["expert 2 is wrong under fsdp2 (1 of 1 splits): KeyError: 'experts'"]


def test_cases_keep_the_engine_and_cover_ranks_splits_and_precisions():
    flags = {"engine": "{name: fsdp2, precision: null, replicas: 2, activation_checkpointing: full}"}
    found, _ = invariance.cases(configuration(**flags), most_ranks=4)
    assert {case.ranks for case in found} == {2, 4} and {case.engine.precision for case in found} == {"fp32", "bf16"}
    assert all(case.engine.replicas == 2 and case.engine.activation_checkpointing == "full" for case in found)
    assert {case.accumulation for case in found if case.ranks == 2} == {8, 2}
    assert {invariance.describe(case.kinds) for case in found} == {"", "tensor 2", "sequence 2"}


@pytest.mark.parametrize(
    ("engine", "model", "ranks", "kinds", "not_checked"),
    [
        ("ddp", "", 2, ["tensor 2", "sequence 2"], ["expert 2"]),
        ("zero2", "", 2, ["sequence 2"], ["expert 2", "tensor 2"]),
        ("fsdp2", "moe: {num_experts: 64}", 2,
         ["tensor 2", "sequence 2", "expert 2", "tensor 2 x expert 2", "sequence 2 x expert 2"], []),
        ("ddp", "num_key_value_heads: 1", 2, ["sequence 2"], ["expert 2", "tensor 2"]),
        ("ddp", "num_key_value_heads: 2", 4,
         ["tensor 2", "sequence 2", "sequence 4", "tensor 2 x sequence 2"], ["expert 2", "expert 4", "tensor 4"]),
    ],
    ids=["dense", "zero", "experts", "one key head", "four ranks"],
)  # fmt: skip
def test_cases_cover_the_kinds_that_the_configuration_allows(engine, model, ranks, kinds, not_checked):
    model = f"{{vocab_size: 10000, num_attention_heads: 4, {model}}}"
    found, without = invariance.cases(configuration(engine=f"{{name: {engine}}}", model=model), ranks)
    assert {invariance.describe(case.kinds) for case in found} == {"", *kinds} and sorted(without) == not_checked
    assert {case.micro_batch > 1 for case in found if case.kinds == {"sequence": 2}} == {True, False}


def test_muon_has_cases_of_its_own_with_wider_bounds():
    found, _ = invariance.cases(configuration(optimizer="{name: muon}", engine="{name: fsdp2}"), 2)
    muon = [case for case in found if case.muon]
    assert [case.kinds for case in muon] == [{}, {}, {"sequence": 2}, {"tensor": 2}] and {case.numerics for case in muon} == {
        "fp32 Muon"
    }
    failed = dataclasses.replace(wrong(outcome(tensor=2)), case=muon[-1])
    [sentence] = invariance.causes([failed])
    assert sentence.startswith("tensor 2 is wrong under fsdp2 with Muon (1 of 1 splits)") and "updates of step 1" in sentence


def test_another_seed_gives_other_batches_and_documents_appear_where_the_configuration_has_them():
    config = configuration(data="{document_mask: true}")
    model, case = invariance.small_model(config.model), invariance.cases(config, 2)[0][0]
    first, other = (invariance._batch(model, case, seed, step=0) for seed in (1, 2))
    assert not torch.equal(first.tokens_BT, other.tokens_BT) and not torch.equal(first.labels_BT, other.labels_BT)
    assert first.documents_BT.max() > 2 and (first.documents_BT[0] == 0).all() and (first.documents_BT.diff() >= 0).all()
    valid_B = (first.labels_BT != -100).float().mean(1)
    assert valid_B.min() == 0 and valid_B.max() > 0.7
    assert invariance.cases(configuration(), 2)[0][0].documents is False


def test_batches_on_which_a_router_hesitates_are_not_used(monkeypatch):
    model = invariance.small_model(ModelConfig(hidden_size=64, moe=MoeConfig(num_experts=8, num_experts_per_tok=2)))
    router = build(model, "cpu", 0).model.layers[0].mlp.gate
    choices = invariance._Choices(router)
    hidden_BTD = torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(0))
    router(hidden_BTD, None)
    assert choices.clear
    with torch.no_grad():
        router.weight[1:] = router.weight[0]  # equal scores
    router(hidden_BTD, None)
    assert not choices.clear
    steps = invariance.Steps([], {}, {})
    monkeypatch.setattr(invariance, "_reference", lambda *args: (steps, args[-1] == 100_007))
    assert invariance.make_reference(model, outcome().case, 0.5, 7).batch_seed == 100_007


@pytest.mark.release
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("flags", "file", "true", "planted", "sentence"),
    [
        ([], "pretrain/engines/mesh.py", "return self.ranks // self.tensor", "return self.ranks",
         "WRONG  tensor 2 is wrong under ddp (2 of 2 splits): gradient norm by"),
        (["--model.sliding_window", "64"], "pretrain/model/attention.py",
         "entire = exchange.part * length, exchange.parts * length", "entire = exchange.part * length, length",
         "WRONG  sequence 2 is wrong under ddp (2 of 2 splits): "),
    ],
    ids=["gradients times the tensor degree", "a window in a part of the sequence"],
)  # fmt: skip
def test_the_command_names_the_kind_that_a_planted_fault_breaks(tmp_path, flags, file, true, planted, sentence):
    for folder in ("pretrain", "tools", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    source = (tmp_path / file).read_text()
    assert true in source, "the mutant no longer fits the code"
    (tmp_path / file).write_text(source.replace(true, planted))
    done = check("--config", "configs/dummy.yaml", "--invariance", *flags, root=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert [line.startswith(sentence) for line in done.stdout.splitlines() if line.startswith("WRONG")] == [True], done.stdout


def test_the_shrunken_model_is_of_the_same_kind_and_small():
    given = ModelConfig(num_attention_heads=32, num_key_value_heads=4, qk_norm=True, tie_word_embeddings=True)
    small = shrink(given, 32)
    assert small.num_key_value_heads < small.num_attention_heads and small.qk_norm and small.tie_word_embeddings
    assert shrink(ModelConfig(num_attention_heads=16), 32).num_key_value_heads == 4
    experts = MoeConfig(num_experts=64, moe_intermediate_size=1024)
    moe = shrink(ModelConfig(hidden_size=2048, sliding_window=4096, moe=experts), 32)
    counts = num_parameters(resolve_model(moe, vocab_size=64, sequence_length=32))
    assert moe.sliding_window == 16 and counts.total < 200_000
