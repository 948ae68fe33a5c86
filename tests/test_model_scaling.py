"""`model.scaling`: at the base size nothing changes; at others, each kind of weight has the initial scale and the update that
muP and CompleteP give it, and a multiplier that is folded into a weight has the effect of the multiplier."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState

from pretrain import config as settings
from pretrain.config import EngineConfig, OptimizerConfig, ParallelConfig
from pretrain.data.batches import Batch
from pretrain.engines.start import start_engine
from pretrain.model import hf_mapping, scaling, transformer
from pretrain.model.config import ModelConfig, ScalingConfig, differences, model_from_dict, resolve_model
from pretrain.model.transformer import Transformer, build
from pretrain.optim.optimizer import build_optimizer
from pretrain.train import train_step
from tests.models import moe
from tests.ranks import run_ranks
from tools import check_scaling

V, LR = 96, 1e-2
BASE = ScalingConfig(base_hidden_size=32, base_num_hidden_layers=2)
KINDS = {
    "dense": {},
    "tied": dict(tie_word_embeddings=True, qk_norm=True),
    "experts": dict(moe=moe(num_shared_experts=1), qk_norm=True),
}


def sized(wide: int = 1, deep: int = 1, relative_to: ScalingConfig | None = BASE, **changes) -> ModelConfig:
    size = dict(hidden_size=32 * wide, num_hidden_layers=2 * deep, num_attention_heads=4 * wide, num_key_value_heads=2 * wide)
    if experts := changes.get("moe"):
        changes["moe"] = dataclasses.replace(experts, moe_intermediate_size=32 * wide)
    settings = ModelConfig(intermediate_size=64 * wide, scaling=relative_to, **size | changes)
    return resolve_model(settings, vocab_size=V, sequence_length=16)


def trained(model: Transformer, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    """Losses of steps on one batch, with the learning rates that an engine gives to the groups."""
    tokens_BT = torch.randint(0, V, (2, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        loss = model(tokens_BT[:, :-1], tokens_BT[:, 1:]).loss_sum / 32
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = LR * group.get("lr_scale", 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_at_the_base_size_scaling_changes_no_bit(kind, name):
    models = [build(sized(relative_to=base, **KINDS[kind]), "cpu", seed=3) for base in (None, BASE)]
    losses = [trained(model, build_optimizer(model, OptimizerConfig(name=name, lr=LR))) for model in models]
    assert losses[0] == losses[1]
    for (key, plain), scaled in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(plain, scaled), key


W, D = 4, 3  # ratios of width and depth to the base's
# Ends of names -> std of initial weights, learning rate of AdamW and of Muon, eps, and learning rate x decay, relative to the
# base: Table 1 of CompleteP (arXiv 2505.01618, alpha = 1) and the eps of its reference implementation, each multiplier m of
# an output being folded into the weight: std and learning rate times m, eps divided by m.
PUBLISHED = {
    "q_proj.weight": (W**-0.5, 1 / W, W**-0.5, 1 / (W * D), 1 / W),
    "k_proj.weight": (W**-0.5, 1 / W, W**-0.5, 1 / (W * D), 1 / W),
    "v_proj.weight": (W**-0.5, 1 / W, W**-0.5, 1 / (W * D), 1 / W),
    "gate_proj.weight": (W**-0.5, 1 / W, W**-0.5, 1 / (W * D), 1 / W),
    "up_proj.weight": (W**-0.5, 1 / W, W**-0.5, 1 / (W * D), 1 / W),
    "o_proj.weight": (W**-0.5 / D, 1 / (W * D), W**-0.5 / D, 1 / W, 1 / W),
    "down_proj.weight": (W**-0.5 / D, 1 / (W * D), W**-0.5 / D, 1 / W, 1 / W),
    "experts.gate_up_proj": (W**-0.5, 1 / W, W**-0.5, 1 / (W * D), 1 / W),
    "experts.down_proj": (W**-0.5 / D, 1 / (W * D), W**-0.5 / D, 1 / W, 1 / W),
    "mlp.gate.weight": (1 / W, 1 / W, 1 / W, 1 / D, 1 / W),
    "lm_head.weight": (1 / W, 1 / W, None, 1, 1 / W),
    "embed_tokens.weight": (1, 1, None, 1 / W, 0),
    "input_layernorm.weight": (1, 1, None, 1 / (W * D), 0),
    "post_attention_layernorm.weight": (1, 1, None, 1 / (W * D), 0),
    "q_norm.weight": (1, 1, None, 1 / D, 0),
    "k_norm.weight": (1, 1, None, 1 / D, 0),
    "model.norm.weight": (1, 1, None, 1 / W, 0),
}
TIED = {"model.norm.weight": (1 / W, 1 / W, None, 1, 0)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_each_weight_has_the_published_scale_and_update(kind, rule):
    config = OptimizerConfig(name=rule, lr=1.0, weight_decay=0.5, eps=1e-6)
    small, large = (build(sized(*size, **KINDS[kind]), "cpu", seed=0) for size in ((1, 1), (W, D)))
    optimizer = build_optimizer(large, config)
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    assert len(group_of) == sum(len(group["params"]) for group in optimizer.param_groups) == len(list(large.parameters()))
    before, published = dict(small.named_parameters()), PUBLISHED | (TIED if kind == "tied" else {})
    for name, parameter in large.named_parameters():
        matching = [end for end in published if name.endswith(end)]
        std, adamw, muon, eps, decay = published[max(matching, key=len)]
        group = group_of[id(parameter)]
        rms, rms_before = (float(each.detach().square().mean().sqrt()) for each in (parameter, before.get(name, parameter)))
        if name in before:
            assert rms / rms_before == pytest.approx(std, rel=0.15), name
        by_muon = rule == "muon" and muon is not None
        assert ("momentum" in group) == by_muon, name
        assert group["lr_scale"] == pytest.approx(muon if by_muon else adamw), name
        assert group["lr_scale"] * group["weight_decay"] == pytest.approx(0.5 * decay), name
        if not by_muon:
            assert group["eps"] == pytest.approx(1e-6 * eps), name


def test_the_tied_embedding_keeps_its_scale_and_its_logits_shrink():
    small, large = (build(sized(*size, **KINDS["tied"]), "cpu", seed=0) for size in ((1, 1), (W, 1)))
    std = [float(model.model.embed_tokens.weight.detach().std()) for model in (small, large)]
    assert std[1] / std[0] == pytest.approx(1, rel=0.05)
    tokens_BT = torch.arange(32).view(2, 16)
    logits = [float(model(tokens_BT).detach().std()) for model in (small, large)]
    assert logits[1] / logits[0] == pytest.approx(W**-0.5, rel=0.25)


def test_a_multiplier_of_the_branches_equals_its_folding():
    """The depth rule, against a model that multiplies the output of each branch by 1 / d as CompleteP states it: same losses,
    also with an eps and a decay that matter."""
    config, deep = OptimizerConfig(lr=LR, weight_decay=0.5, eps=1e-3), 4
    folded, multiplied = build(sized(1, deep), "cpu", seed=0), build(sized(1, deep, None), "cpu", seed=0)
    for (name, weight), other in zip(multiplied.named_parameters(), folded.parameters(), strict=True):
        last = name.endswith(("o_proj.weight", "down_proj.weight"))
        weight.data.copy_(other.data * (deep if last else 1))
        if last:
            multiplied.get_submodule(name.removesuffix(".weight")).register_forward_hook(lambda _, __, out: out / deep)
    rule = dict(lr=LR, betas=config.betas)
    optimizer = torch.optim.AdamW([
        dict(params=[weight], eps=1e-3 / deep if ".layers." in name else 1e-3, weight_decay=decay_of(name, 0.5), **rule)
        for name, weight in multiplied.named_parameters()
    ])  # fmt: skip
    losses = trained(folded, build_optimizer(folded, config), 5)
    assert losses == pytest.approx(trained(multiplied, optimizer, 5), rel=1e-5)
    assert losses[-1] < losses[0] - 0.5


def decay_of(name: str, decay: float) -> float:
    return 0.0 if "norm" in name or "embed" in name else decay


def test_scaling_is_a_setting_of_training_alone(tmp_path):
    """It is read from YAML-like flags, kept in checkpoints, absent from exports, and no reason to refuse weights."""
    flags = [
        "--model.scaling.base_hidden_size",
        "32",
        "--model.scaling.base_num_hidden_layers",
        "2",
        "--model.vocab_size",
        "96",
    ]
    assert settings.load([*flags, "--train.max_steps", "1", "--data.synthetic.kind", "uniform"]).model.scaling == BASE
    assert settings.resume_class("model.scaling.base_hidden_size") == settings.resume_class("model.scaling") == "frozen"
    scaled, plain = sized(2, 2), sized(2, 2, None)
    assert model_from_dict(dataclasses.asdict(scaled)) == scaled
    assert not differences(plain, scaled) and not differences(scaled, plain)
    assert hf_mapping.to_config(scaled, "float32", {}) == hf_mapping.to_config(plain, "float32", {})
    tokens_BT = torch.arange(16).view(1, 16)
    model, other = build(scaled, "cpu", seed=0), Transformer(plain)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens_BT), other(tokens_BT)), "the forward pass must not depend on scaling"
    assert math.isfinite(float(model(tokens_BT).detach().sum()))


ENGINES = {
    "ddp": EngineConfig(name="ddp"),
    "zero1": EngineConfig(name="zero1"),
    "zero3": EngineConfig(name="zero3", keep_whole_below=100),
    "fsdp2": EngineConfig(name="fsdp2"),
    "ddp tensor": EngineConfig(name="ddp", parallel=ParallelConfig(tensor=2)),
    "fsdp2 tensor": EngineConfig(name="fsdp2", parallel=ParallelConfig(tensor=2)),
}


OF_RULE = {"adamw": list(ENGINES), "muon": ["ddp", "fsdp2", "fsdp2 tensor"]}


def optimizer_of(rule: str) -> OptimizerConfig:
    return OptimizerConfig(name=rule, lr=LR, eps=1e-3, weight_decay=0.5)


def losses_on_a_rank() -> dict[tuple[str, str], list[float]]:
    found = {}
    for rule, name in ((rule, name) for rule, names in OF_RULE.items() for name in names):
        AcceleratorState._reset_state(reset_partial_state=True)
        engine = start_engine(ENGINES[name])
        make_optimizer = partial(build_optimizer, config=optimizer_of(rule))
        engine.prepare(lambda: Transformer(sized(2, 2)), make_optimizer, 0.0, seed=0)
        tokens_BT = torch.randint(0, V, (2, 17), generator=torch.Generator().manual_seed(0))
        rows = tokens_BT.chunk(engine.mesh.sample_ranks)[engine.mesh.sample_rank]
        batch = Batch(rows[:, :-1], rows[:, 1:], None, None)
        results = [train_step(engine, [engine.part_of(batch)], LR) for _ in range(4)]
        sums = engine.all_reduce(torch.stack([result.loss_sum for result in results]))
        found[rule, name] = (sums / sums[0]).tolist()  # of some kinds of parallelism, several ranks hold the same sum
    return found


@pytest.mark.slow
def test_every_engine_gives_each_weight_its_own_learning_rate():
    """Also where ranks have cut a matrix: the factors are those of the entire model."""
    found = run_ranks(2, losses_on_a_rank, timeout=600)[0]
    assert len(found) == sum(map(len, OF_RULE.values()))
    for rule, names in OF_RULE.items():
        model = build(sized(2, 2), "cpu", seed=0)
        expected = trained(model, build_optimizer(model, optimizer_of(rule)), 4)
        for name in names:
            assert found[rule, name] == pytest.approx([loss / expected[0] for loss in expected], rel=2e-4), (rule, name)


CHECK = ["--data.synthetic.kind", "unigram", "--model.vocab_size", "256", "--model.qk_norm", "true", "--tokenizer.path", "null"]
CHECK += ["--data.sequence_length", "16", "--train.max_steps", "1", "--steps", "4"]
RATES = {"adamw": "0.002", "muon": "0.005"}
WIDTHS, DEPTHS = ["64", "128", "256"], ["2", "4", "8"]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", RATES)
def test_activations_and_their_changes_are_flat_over_width_and_depth(optimizer, tmp_path, capsys, monkeypatch):
    """The coordinate check. It refuses factors of Muon that are wrong by half a power of the width, of AdamW by a power of it,
    of both by a power of the depth, and initial scales that are wrong by half a power."""

    def check(widths: list[str], depths: list[str], rule=scaling.scale) -> tuple[int, list[str]]:
        monkeypatch.setattr(transformer, "scale", rule)
        flags = ["--widths", *widths, "--depths", *depths, "--optimizer", optimizer, "--optimizer.lr", RATES[optimizer]]
        status = check_scaling.main([*CHECK, *flags, "--output", str(tmp_path / "scaling.png")])
        return status, [line for line in capsys.readouterr().out.splitlines() if line.endswith("  no")]

    def planted(ends: tuple[str, ...], factor: str, wide: float, deep: float):
        """The rule with a power of the ratio of widths or depths too many in a factor of the weights that end so."""

        def rule(model: ModelConfig, name: str, *, muon: bool = False) -> scaling.Scale:
            found = scaling.scale(model, name, muon=muon)
            if model.scaling is None or not name.endswith(ends):
                return found
            excess = (model.hidden_size / 64) ** wide * (model.num_hidden_layers / 2) ** deep
            return found._replace(**{factor: getattr(found, factor) * excess})

        return rule

    status, bad = check(WIDTHS, DEPTHS)
    assert (status, bad) == (0, [])
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    for ends, factor, wide, deep, quantity, when in MUTANTS[optimizer]:
        sizes = (WIDTHS[:2], ["2"]) if wide else (["64"], DEPTHS)
        status, bad = check(*sizes, planted(ends, factor, wide, deep))
        assert status == 1 and any(quantity in line and when in line for line in bad), (ends, factor, wide, deep, bad)


FIRST = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "gate", "up"))
MUTANTS = {
    "adamw": [
        (FIRST, "lr", 1, 0, "feed-forward", "change"),
        (scaling.LAST_OF_BRANCH, "lr", 1, 0, "attention", "change"),
        (scaling.LAST_OF_BRANCH, "lr", 0, 1, "sum of branches", "change"),
        (("lm_head.weight",), "std", 0.5, 0, "logits", "start"),
        (scaling.LAST_OF_BRANCH, "std", 0, 0.5, "sum of branches", "start"),
    ],
    "muon": [
        (scaling.LAST_OF_BRANCH, "lr", 0.5, 0, "attention", "change"),
        (scaling.LAST_OF_BRANCH, "lr", -0.5, 0, "attention", "change"),
        (scaling.LAST_OF_BRANCH, "lr", 0, 1, "sum of branches", "change"),
        (("_proj.weight",), "lr", 0.5, 0, "residual stream", "change"),
    ],
}
"""Ends of names, factor, powers of the ratio of widths and of depths too many, and the quantity that shows it."""
