"""The mask certificate refuses every planted fault of a mask with status 2 and the name of the rule, and no correct run."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain.config import load
from pretrain.engines import parallel
from pretrain.engines.base import Engine
from pretrain.engines.start import start_engine
from pretrain.model import attention, masked, transformer
from pretrain.model.config import resolve_model
from pretrain.run import mask_certificate
from pretrain.run.mask_certificate import MaskBroken, certify, certify_here
from pretrain.run.preflight import preflight
from tests.models import train_here
from tests.ranks import run_ranks

BASE = ["--model.hidden_size", "32", "--model.num_hidden_layers", "1", "--model.num_attention_heads", "4",
        "--model.num_key_value_heads", "2", "--model.head_dim", "16", "--model.vocab_size", "64", "--data.synthetic.kind",
        "uniform", "--data.sequence_length", "384", "--batch.global_batch_size", "2", "--batch.micro_batch_size", "1",
        "--train.max_steps", "1", "--log.sinks", "[console]", "--engine.precision", "fp32"]  # fmt: skip
WINDOW = ["--model.sliding_window", "100"]
DOCUMENTS = ["--data.document_mask", "true"]
PATCH = Callable[[pytest.MonkeyPatch], None]


def parts(flags: list[str], ranks: int = 1):
    """-> (settings, resolved model)."""
    config = load([*BASE, *flags], world_size=ranks)
    return config, resolve_model(config.model, vocab_size=64, sequence_length=config.data.sequence_length)


# ---------------------------------------------------------------- nothing wrong


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rules", [[], WINDOW, DOCUMENTS, WINDOW + DOCUMENTS], ids=["causal", "window", "documents", "both"])
def test_masks_hold_for_every_rule_length_and_grouping(rules, precision):
    for length, heads, key_heads, head_dim in ((16, 4, 4, 2), (101, 4, 2, 8), (384, 6, 2, 32), (4096, 8, 1, 64)):
        shape = [f"--data.sequence_length={length}", f"--model.num_attention_heads={heads}", f"--model.head_dim={head_dim}"]
        shape += [f"--model.num_key_value_heads={key_heads}", f"--model.qk_norm={length == 384}"]
        line = certify_here(*parts([*rules, *shape, "--engine.precision", precision]))
        found = "window" in line, "documents" in line
        assert found == (WINDOW[0] in rules and length > 100, DOCUMENTS[0] in rules), line


def test_the_certificate_takes_no_random_number_of_the_run():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    certify_here(*parts(DOCUMENTS))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


# ---------------------------------------------------------------- planted faults on one process


def first_visible(change: Callable) -> PATCH:
    """`change` gets the first key that each query sees, the documents and the window, and returns another first key."""
    real = masked.first_visible

    def wrong(length, device, documents_BT, window):
        at_T = torch.arange(length)
        return change(at_T, documents_BT, window, lambda d, w: real(length, device, d, w)).clamp(min=0).minimum(at_T)

    return lambda monkeypatch: monkeypatch.setattr(attention, "first_visible", wrong)


def attends(change: Callable) -> PATCH:
    """`change` gets a T x T mask of a causal kernel, and alters it in place."""
    real = F.scaled_dot_product_attention

    def wrong(query, key, value, *, attn_mask=None, is_causal=False, **options):
        length = query.shape[2]
        visible = torch.ones(length, length, dtype=torch.bool).tril()
        visible = visible.repeat(1, query.shape[1], 1, 1)
        change(visible[0])
        return real(query, key, value, attn_mask=visible, **options)

    return lambda monkeypatch: monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)


def not_causal(visible_HTS):
    visible_HTS.fill_(True)


def last_block_sees_the_future(visible_HTS):
    visible_HTS[:, -128:] = True


def one_token_of_the_future(visible_HTS):
    visible_HTS |= visible_HTS.roll(-1, 1)


def first_key_never_visible(visible_HTS):
    visible_HTS[:, 1:, 0] = False


def one_head_misses_one_key(visible_HTS):
    visible_HTS[-1, 200:, 128] = False


def nobody_sees_itself(visible_HTS):
    visible_HTS[:, range(1, 384), range(1, 384)] = False


def only_one_tile(visible_HTS):
    tile_T = torch.arange(384) // 128
    visible_HTS &= tile_T[:, None] == tile_T


def documents_of_the_first_row(at_T, documents, window, real):
    return real(documents[:1].expand_as(documents), window)


def batch_of_one_mask(monkeypatch):
    real = masked._calls
    monkeypatch.setattr(masked, "_calls", lambda first_RT, dtype: real(first_RT[:1].expand_as(first_RT), dtype))


def end_belongs_to_the_next_document(monkeypatch):
    def wrong(tokens, end):
        return np.cumsum(tokens[:, :-1] == end, axis=1)

    monkeypatch.setattr(mask_certificate, "documents_of", wrong)


def later_blocks_forget_their_first_key(monkeypatch):
    real = masked._blocks

    def wrong(first_T):
        return [(start, end, key + (start > 128 and not causal), causal) for start, end, key, causal in real(first_T)]

    monkeypatch.setattr(masked, "_blocks", wrong)


MUTANTS: dict[str, tuple[str, list[str], PATCH]] = {
    "causal off": ("causal", [], attends(not_causal)),
    "future at the last block": ("causal", [], attends(last_block_sees_the_future)),
    "one token of the future": ("causal", [], attends(one_token_of_the_future)),
    "first key never visible": ("causal", [], attends(first_key_never_visible)),
    "one head misses one key": ("causal", [], attends(one_head_misses_one_key)),
    "no token sees itself": ("causal", [], attends(nobody_sees_itself)),
    "only inside a tile": ("causal", [], attends(only_one_tile)),
    "window dropped": ("window", WINDOW, first_visible(lambda at, documents, window, real: real(documents, None))),
    "window + 1": ("window", WINDOW, first_visible(lambda at, documents, window, real: real(documents, window + 1))),
    "window - 1": ("window", WINDOW, first_visible(lambda at, documents, window, real: real(documents, window - 1))),
    "window of the last block": ("window", WINDOW, later_blocks_forget_their_first_key),
    "window - 1 and documents": (
        "window", WINDOW + DOCUMENTS, first_visible(lambda at, documents, window, real: real(documents, window - 1)),
    ),
    "window dropped in documents": (
        "window", WINDOW + DOCUMENTS, first_visible(lambda at, documents, window, real: real(documents, None)),
    ),
    "documents dropped": ("documents", DOCUMENTS, first_visible(lambda at, documents, window, real: 0 * real(documents, None))),
    "documents begin late": (
        "documents", DOCUMENTS, first_visible(lambda at, documents, window, real: real(documents.roll(1, 1), window)),
    ),
    "documents begin early": (
        "documents", DOCUMENTS, first_visible(lambda at, documents, window, real: real(documents.roll(-1, 1), window)),
    ),
    "end of document in the next one": ("documents", DOCUMENTS, end_belongs_to_the_next_document),
    "documents of the first row": ("documents", DOCUMENTS, first_visible(documents_of_the_first_row)),
    "one mask for all rows": ("documents", DOCUMENTS, batch_of_one_mask),
    "first key of documents": (
        "documents", DOCUMENTS, first_visible(lambda at, documents, window, real: real(documents, window) + 1),
    ),
}  # fmt: skip
"""Name -> (rule, settings, fault)."""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_ends_the_start_with_status_2_and_the_name_of_the_rule(name, tmp_path, monkeypatch, capfd):
    rule, flags, plant = MUTANTS[name]
    plant(monkeypatch)
    assert train_here([*BASE, *flags, "--run.directory", str(tmp_path)]) == 2
    assert f"the rule '{rule}' is broken" in capfd.readouterr().err
    assert not list(tmp_path.glob("*/checkpoints/*"))
    (finding,) = preflight(parts(flags)[0]).findings
    assert finding.name == "mask-broken" and finding.stops and f"'{rule}'" in finding.text


# ---------------------------------------------------------------- planted faults of parallelism, on two ranks

SEQUENCE, TENSOR = ["--engine.parallel.sequence", "2"], ["--engine.parallel.tensor", "2"]


def no_window_over_ranks(monkeypatch):
    real = attention.attention_context

    def wrong(config, length, device, documents_BT, cache, valid_BT, exchange):
        config = dataclasses.replace(config, sliding_window=None) if exchange else config
        return real(config, length, device, documents_BT, cache, valid_BT, exchange)

    monkeypatch.setattr(transformer, "attention_context", wrong)


def documents_of_this_part(monkeypatch):
    real = Engine.part_of

    def wrong(engine, batch):
        part = real(engine, batch)
        if batch.documents_BT is None:
            return part
        mine = batch.documents_BT.chunk(engine.mesh.sequence, 1)[engine.mesh.sequence_rank]
        return part._replace(documents_BT=mine.repeat(1, engine.mesh.sequence))

    monkeypatch.setattr(Engine, "part_of", wrong)


def parts_of_the_wrong_rank(monkeypatch):
    monkeypatch.setattr(Engine, "part_of", lambda engine, batch: type(batch)(
        *(tensor.chunk(2, 1)[1 - engine.mesh.sequence_rank] for tensor in batch[:2]), *batch[2:]
    ))  # fmt: skip


def swapped(tensor, dim: int = 1):
    """With the two halves of a dimension in the wrong order, as parts of two ranks would be."""
    return torch.cat(tensor.chunk(2, dim)[::-1], dim)


def tokens_of_ranks_in_the_wrong_order(monkeypatch):
    real = parallel.HeadExchange.to_heads
    monkeypatch.setattr(parallel.HeadExchange, "to_heads", lambda *args: [swapped(each) for each in real(*args)])


def keys_alone_in_the_wrong_order(monkeypatch):
    real = parallel.HeadExchange.to_heads

    def wrong(exchange, *tensors):
        query, key, value = real(exchange, *tensors)
        return query, swapped(key), value

    monkeypatch.setattr(parallel.HeadExchange, "to_heads", wrong)


def results_to_the_wrong_rank(monkeypatch):
    real = parallel.HeadExchange.to_tokens
    monkeypatch.setattr(parallel.HeadExchange, "to_tokens", lambda exchange, out: real(exchange, swapped(out)))


def heads_of_ranks_in_the_wrong_order(monkeypatch):
    real = parallel.HeadExchange.to_tokens
    monkeypatch.setattr(parallel.HeadExchange, "to_tokens", lambda exchange, out: swapped(real(exchange, out), 2))


def no_exchange(monkeypatch):
    real = attention._attend

    def wrong(query, key, value, context):
        return real(query, key, value, dataclasses.replace(context, exchange=None))

    monkeypatch.setattr(transformer, "attend", wrong)


def one_rank_is_not_causal(monkeypatch):
    if torch.distributed.get_rank() == 1:
        attends(not_causal)(monkeypatch)


def gathered_in_the_wrong_order(monkeypatch):
    real = parallel._all_gather
    monkeypatch.setattr(parallel, "_all_gather", lambda *args: swapped(real(*args), args[1]))


def scattered_in_the_wrong_order(monkeypatch):
    real = parallel._reduce_scatter
    monkeypatch.setattr(parallel, "_reduce_scatter", lambda x, how, dim, group: real(swapped(x, dim), how, dim, group))


def attention_returns_to_the_wrong_tokens(monkeypatch):
    real = parallel._TokenParts.scatter

    def wrong(tokens, module, args, out):
        return real(tokens, module, args, swapped(out) if isinstance(module, transformer.Attention) else out)

    monkeypatch.setattr(parallel._TokenParts, "scatter", wrong)


ON_RANKS: dict[str, tuple[str, list[str], PATCH]] = {
    "window dropped under sequence": ("window", SEQUENCE + WINDOW, no_window_over_ranks),
    "documents of a part": ("documents", SEQUENCE + DOCUMENTS, documents_of_this_part),
    "the wrong part of a sequence": ("causal", SEQUENCE, parts_of_the_wrong_rank),
    "tokens for heads in the wrong order": ("causal", SEQUENCE, tokens_of_ranks_in_the_wrong_order),
    "results to the wrong rank": ("causal", SEQUENCE, results_to_the_wrong_rank),
    "keys alone in the wrong order": ("causal", SEQUENCE, keys_alone_in_the_wrong_order),
    "heads in the wrong order": ("causal", SEQUENCE, heads_of_ranks_in_the_wrong_order),
    "no exchange": ("causal", SEQUENCE, no_exchange),
    "one rank is not causal": ("causal", TENSOR, one_rank_is_not_causal),
    "gathered in the wrong order": ("causal", TENSOR, gathered_in_the_wrong_order),
    "scattered in the wrong order": ("causal", TENSOR, scattered_in_the_wrong_order),
    "attention's outputs at the wrong tokens": ("causal", TENSOR, attention_returns_to_the_wrong_tokens),
}


def certified_on_ranks() -> dict[str, str]:
    """Name -> what the certificate says: without a fault, in fp32 and bf16; then of each planted fault."""
    found = {}
    for kind, flags in {"sequence": SEQUENCE, "tensor": TENSOR}.items():
        for name, precision in (("ddp", "fp32"), ("fsdp2", "bf16")):
            rules = [*flags, *WINDOW, *DOCUMENTS]
            config, model = parts([*rules, "--engine.name", name, "--engine.precision", precision], 2)
            engine = start_engine(config.engine)
            found[f"{name} {kind}"] = certify(config, model, engine)
            for fault, (_, fault_flags, plant) in ON_RANKS.items() if name == "ddp" else []:
                if fault_flags[: len(flags)] == flags:
                    config, model = parts(fault_flags, 2)
                    with pytest.MonkeyPatch.context() as monkeypatch:
                        plant(monkeypatch)
                        try:
                            found[fault] = certify(config, model, engine)
                        except MaskBroken as error:
                            found[fault] = str(error)
            engine.model = engine.optimizer = engine._wrapped = None
    return found


def test_masks_hold_on_two_ranks_and_each_planted_fault_of_an_exchange_is_refused_on_both():
    on_ranks = run_ranks(2, certified_on_ranks)
    for found in on_ranks:
        for kind in ("sequence", "tensor"):
            for engine in ("ddp", "fsdp2"):
                text = found[f"{engine} {kind}"]
                assert text.startswith("causal, window 100 (here 76), documents;") and f"{kind} 2" in text
                assert {"ddp": "float32", "fsdp2": "bfloat16"}[engine] in text
        for fault, (rule, _, _) in ON_RANKS.items():
            assert f"the rule '{rule}' is broken" in found[fault], fault
        assert "on rank 1" in found["one rank is not causal"]


def plant_and_train(argv: list[str], fault: str) -> int:
    with pytest.MonkeyPatch.context() as monkeypatch:
        ON_RANKS[fault][2](monkeypatch)
        return train_here(argv)


def test_a_fault_on_two_ranks_ends_the_start_of_both_with_status_2(tmp_path):
    fault = "window dropped under sequence"
    argv = [*BASE, *ON_RANKS[fault][1], "--run.directory", str(tmp_path)]
    assert run_ranks(2, plant_and_train, argv, fault) == [2, 2]
    assert "the rule 'window' is broken" in (tmp_path / "run" / "run_state.json").read_text()
