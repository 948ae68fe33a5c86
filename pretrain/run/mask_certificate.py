"""The mask certificate: at every start, the proof that attention sees what the settings say, and nothing else.

A lost mask goes unnoticed: the loss only looks a little better, or a little worse. So a small model, the probe, runs before the
run's own, and each pair of a query and a key must be as the rules say, which are computed here from their definitions alone.
It runs twice:

    first pass    the values of most tokens are 0; those of C tokens in each row have one channel each. A channel of a head's
                  result is not 0 exactly where that query sees that token. The rows together cover all pairs of each head.
    second pass   one token of each row is another one, with another key and value. The queries whose outputs change, bit by
                  bit, must be those that may see it. This also finds keys that are read where their values are not, and
                  outputs that return to other tokens.

The probe has one dense block and the run's head size, grouping, rotary embedding, window and kernel. The code that cuts the
run's model over ranks cuts it, too; it gets its part of the batch from the engine, and computes in the run's precision. DDP,
FSDP2 and DeepSpeed do not wrap it: they exchange weights and gradients, never tokens. Experts take each token on its own, so it
has none. It is not compiled (FlexAttention is, as always), nor recomputed, nor multiplied in fp8, whose scales depend on all
tokens of a batch.

Dimensions: L layouts of documents, R rows, T all tokens of a sequence, t those of this rank, D model, H heads of this rank, C
size of one head, N pairs of a row and a key in it, W ranks.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain import UserError, stages
from pretrain.config import Config, EngineConfig
from pretrain.data.batches import MASKED, Batch
from pretrain.data.sources import documents_of
from pretrain.engines import parallel
from pretrain.engines.base import Engine, default_precision
from pretrain.engines.mesh import Mesh
from pretrain.model.attention import AttentionContext
from pretrain.model.config import ModelConfig
from pretrain.model.transformer import Transformer

RULES = ("causal", "window", "documents")
_LENGTH, _TILE = 512, 128
"""Tokens of a row, at most: four tiles of the kernels."""
_FEWEST_ROWS, _MOST_ROWS = 12, 32
"""Of each layout of documents."""
_VARIANTS, _PART = 4, 32
"""Different keys; size of the part of an embedding that all tokens have, and of the one that tells keys apart."""
_FLEX = "FlexAttention"


class MaskBroken(UserError):
    """Attention contradicts the rule of this name."""

    def __init__(self, rule: str, text: str):
        super().__init__(
            f"mask certificate: the rule '{rule}' is broken: {text}. The fault is in this code, a library or a kernel, not in "
            "the settings; nothing is trained"
        )
        self.rule = rule


class Violation(NamedTuple):
    """A query and a key that contradict a rule."""

    in_output: int
    """0: in the result of one of this rank's heads. 1: only in the output, to which other ranks contribute."""
    rule: int
    """Number in `RULES`."""
    sees: int
    """1: the query sees the key, which the rule hides. 0: it does not, though no rule hides it."""
    query: int
    key: int


def certify(config: Config, model: ModelConfig, engine: Engine) -> str:
    """Checks the masks on all ranks of the engine. Returns a line for the console. A collective.

    model: resolved. Raises MaskBroken on all ranks if one of them finds a violation.
    """
    began = time.perf_counter()
    engine.watchdog.mark("checking the masks")
    wide = engine.precision == "fp32" or engine.autocast_dtype is not None
    probe = Probe(config, model, engine.mesh, engine.device, torch.float32 if wide else torch.bfloat16)
    found = probe.violation(engine.part_of, engine.autocast)
    found_WX = torch.zeros(engine.world_size, 1 + len(Violation._fields), dtype=torch.int64)
    if found:
        found_WX[engine.rank] = torch.tensor([1, *found])
    rows = engine.all_reduce(found_WX.to(engine.device)).tolist()
    if guilty := [(Violation(*violation), rank) for rank, (broken, *violation) in enumerate(rows) if broken]:
        first, rank = min(guilty)
        others = sum(violation.in_output == first.in_output for violation, _ in guilty) - 1
        where = f"on rank {rank}" + f" and {others} more" * (others > 0)
        raise MaskBroken(RULES[first.rule], f"{where}, {probe.describe(first)}")
    return f"{probe} ({time.perf_counter() - began:.1f} s)"


def certify_here(config: Config, model: ModelConfig) -> str:
    """`certify` in this process alone, without an engine: for the preflight."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if default_precision(config.engine) == "fp32" else torch.bfloat16
    probe = Probe(config, model, Mesh(EngineConfig(), 0, 1), device, dtype)
    if found := probe.violation(lambda batch: batch, contextlib.nullcontext):
        raise MaskBroken(RULES[found.rule], probe.describe(found))
    return f"{probe}, on one {device.type}"


class Probe:
    """The small model, its two batches, and the rules."""

    def __init__(self, config: Config, model: ModelConfig, mesh: Mesh, device: torch.device, dtype: torch.dtype):
        self.mesh, self.dtype, self.kernel = mesh, dtype, ""
        self.documents, self.window = config.data.document_mask, model.sliding_window
        ranks, sequence_length = mesh.sequence * mesh.tensor, stages.longest(config)
        self.length = min(_LENGTH, sequence_length, max(_MOST_ROWS * model.head_dim, ranks)) // ranks * ranks
        if self.window is not None and self.window >= sequence_length:  # it hides nothing
            self.window = None
        self._small = _small(model, ranks, self.window and min(self.window, max(1, self.length // 5)))
        generator = torch.Generator().manual_seed(0)  # of its own: the run's random numbers are not touched
        self._model = _build(self._small, mesh, device, dtype, generator)
        lengths = _document_lengths(self.length) if self.documents else [self.length]
        layouts = [lengths, lengths[::-1]] if self.documents else [lengths]  # rows of a batch have different documents
        lengths_of = [torch.tensor(each) for each in layouts]
        self._start_LT = torch.stack([(each.cumsum(0) - each).repeat_interleave(each) for each in lengths_of])
        self._last_LT = torch.stack([(each.cumsum(0) - 1).repeat_interleave(each) for each in lengths_of])
        self._rows = max(_FEWEST_ROWS, math.ceil(self.length / model.head_dim))
        self._layout_R = torch.arange(len(layouts)).repeat_interleave(self._rows)
        self._key_R = torch.tensor([key for each in layouts for key in _keys(each, ranks, self._rows, generator)])
        self._batches = self._make_batches(model.head_dim, device, generator)

    def _make_batches(self, channels: int, device: torch.device, generator: torch.Generator) -> list[Batch]:
        """The batches of both passes. Id: variant of the key * (channels + 1) + channel of the value, or `channels` for 0."""
        at_T, rows = torch.arange(self.length), len(self._key_R)
        chunk_R1 = torch.arange(rows)[:, None] % self._rows
        channel_RT = torch.where(at_T // channels == chunk_R1, at_T % channels, channels)
        variant_RT = torch.randint(0, _VARIANTS, (rows, self.length), generator=generator)
        changed_RT = F.one_hot(self._key_R, self.length)
        documents_RT = None
        if self.documents:
            ends_RT = (self._last_LT == at_T)[self._layout_R]  # as an end-of-document token: it belongs to what it ends
            documents_RT = torch.from_numpy(documents_of(F.pad(ends_RT, (0, 1)).numpy(), True)).to(device)
        batches = []
        for change_RT in (torch.zeros_like(changed_RT), changed_RT):
            variant, channel = (variant_RT + change_RT) % _VARIANTS, (channel_RT + change_RT) % (channels + 1)
            tokens_RT = variant * (channels + 1) + channel
            batches.append(Batch(tokens_RT.to(device), torch.full_like(tokens_RT, MASKED), documents_RT))
        return batches

    def violation(self, part_of: Callable[[Batch], Batch], autocast: Callable[[], AbstractContextManager]) -> Violation | None:
        """Runs the probe on this rank's part of the batches. Returns the first violation; None: there is none."""
        (heads_RtHC, out_RtD), (_, new_out_RtD) = (self._run(part_of(batch), autocast) for batch in self._batches)
        if self.kernel == _FLEX:  # the compiler would take the run's length for a second one, and compile for any length
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
        layouts, channels_HC = len(self._start_LT), self._channels(heads_RtHC.shape[2])
        layout_N, key_N = torch.arange(layouts).repeat_interleave(self.length), torch.arange(self.length).repeat(layouts)
        seen_RtHC = (heads_RtHC != 0).gather(3, channels_HC.to(heads_RtHC.device).expand_as(heads_RtHC))
        seen_NtH = seen_RtHC.permute(0, 3, 1, 2).unflatten(0, (layouts, -1)).flatten(1, 2)[:, : self.length].flatten(0, 1)
        moved_Rt1 = (out_RtD != new_out_RtD).any(2, keepdim=True)
        part = self.mesh.sequence_rank
        part_of_out = part * self.mesh.tensor + self.mesh.tensor_rank  # outputs are cut over tensor ranks, too
        found = self._compare(0, seen_NtH, layout_N, key_N, part)
        return found or self._compare(1, moved_Rt1, self._layout_R, self._key_R, part_of_out)

    def _channels(self, heads: int) -> Tensor:
        """Where this rank's heads have the channels of the values, (H, C): see `_weight`."""
        head_H = self.mesh.tensor_rank * heads + torch.arange(heads)
        key_head_H = head_H // (self._small.num_attention_heads // self._small.num_key_value_heads)
        return (torch.arange(self._small.head_dim) + key_head_H[:, None]) % self._small.head_dim

    def _run(self, batch: Batch, autocast: Callable[[], AbstractContextManager]) -> tuple[Tensor, Tensor]:
        """-> (heads' results, (R, t, H, C); outputs, (R, t, D)), without gradient."""
        kept = []

        def keep(module: nn.Module, args: tuple) -> None:
            kept.append(args)

        attention = self._model.model.layers[0].self_attn
        hooks = [module.register_forward_pre_hook(keep) for module in (attention, attention.o_proj)]
        with autocast():  # not without gradients: the choice of a kernel may depend on them
            out_RtD, _ = self._model.model(batch.tokens_BT, batch.documents_BT)
        for hook in hooks:
            hook.remove()
        (_, context, *_), (heads_RtF,) = kept
        self.kernel = _kernel(context)
        return heads_RtF.detach().unflatten(-1, (-1, self._small.head_dim)), out_RtD.detach()

    def _compare(self, in_output: int, sees_NtH: Tensor, layout_N: Tensor, key_N: Tensor, part: int) -> Violation | None:
        """Compares what queries see with the rules. part: number of the queries' part of the sequence."""
        some_Nt, all_Nt = sees_NtH.any(2).cpu(), sees_NtH.all(2).cpu()
        query_t = part * some_Nt.shape[1] + torch.arange(some_Nt.shape[1])
        margins = self._margins(layout_N, key_N[:, None], query_t)

        def violation(rule: str, sees: int, wrong_Nt: Tensor) -> Violation:
            pair, query = wrong_Nt.nonzero()[0].tolist()
            return Violation(in_output, RULES.index(rule), sees, int(query_t[query]), int(key_N[pair]))

        for rule, margin_Nt in margins.items():
            if (wrong_Nt := some_Nt & (margin_Nt < 0)).any():
                return violation(rule, 1, wrong_Nt)
        missing_Nt = ~all_Nt
        for margin_Nt in margins.values():
            missing_Nt &= margin_Nt >= 0
        if not missing_Nt.any():
            return None
        nearest = min(margins, key=lambda rule: int(margins[rule][missing_Nt].max()))  # the rule with its border beside all
        return violation(nearest, 0, missing_Nt)

    def _margins(self, layout_N: Tensor, key_N1: Tensor, query_t: Tensor) -> dict[str, Tensor]:
        """Rule -> by how many tokens a pair is inside it, (N, t); below 0 the rule hides the key."""
        behind_Nt = query_t - key_N1
        margins = {"causal": behind_Nt}
        if self._small.sliding_window is not None:
            margins["window"] = self._small.sliding_window - 1 - behind_Nt
        if self.documents:
            start_Nt, last_N1 = self._start_LT[layout_N][:, query_t], self._last_LT[layout_N].gather(1, key_N1)
            margins["documents"] = torch.minimum(key_N1 - start_Nt, last_N1 - query_t)
        return margins

    def describe(self, violation: Violation) -> str:
        """A violation in words."""
        behind = violation.query - violation.key
        where = f"{abs(behind)} tokens {'before' if behind > 0 else 'after'} it" if behind else "itself"
        sees = "sees" if violation.sees else "does not see"
        return f"token {violation.query} {sees} token {violation.key}, {where} ({self})"

    def __str__(self) -> str:
        window = self.window and f"window {self.window:,}"
        if window and self.window != self._small.sliding_window:
            window += f" (here {self._small.sliding_window})"
        rules = ", ".join(filter(None, ("causal", window, self.documents and "documents")))
        kinds = [f"{kind} {getattr(self.mesh, kind)}" for kind in ("sequence", "tensor") if getattr(self.mesh, kind) > 1]
        run = [f"{self.length} tokens", self.kernel, str(self.dtype).removeprefix("torch."), *kinds]
        return f"{rules}; {', '.join(run)}"


# ---------------------------------------------------------------- the small model


def _small(model: ModelConfig, ranks: int, window: int | None) -> ModelConfig:
    """One narrow dense block that can be cut as the model can. ranks: that share a sequence."""
    key_heads = min(model.num_key_value_heads, ranks)  # fewer than ranks: they are repeated, here as in the model
    group = min(model.num_attention_heads // model.num_key_value_heads, 2)
    return dataclasses.replace(
        model,
        hidden_size=2 * _PART + 2 * model.head_dim,
        num_hidden_layers=1,
        num_attention_heads=math.lcm(key_heads * group, ranks),
        num_key_value_heads=key_heads,
        intermediate_size=16 * ranks,
        vocab_size=_VARIANTS * (model.head_dim + 1),
        vocab_multiple=ranks,
        tie_word_embeddings=False,
        sliding_window=window,
        moe=None,
    )


def _build(
    config: ModelConfig, mesh: Mesh, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Transformer:
    """This rank's part of the model."""
    with torch.device("meta"):
        model = Transformer(config)
    mesh = copy.copy(mesh)
    mesh.expert = 1
    cuts = parallel.cut_model(model, mesh) if mesh.cut else {}
    weights = {}
    for name, parameter in model.named_parameters():
        cut, shape = cuts.get(name), list(parameter.shape)
        if cut:
            shape[cut.dim] *= cut.parts
        full = _weight(name, shape, config.head_dim, generator)
        part = full.chunk(cut.parts, cut.dim)[cut.part] if cut else full
        weights[name] = nn.Parameter(part.to(device, dtype))
    model.load_state_dict(weights, assign=True)
    return model


def _weight(name: str, shape: list[int], channels: int, generator: torch.Generator) -> Tensor:
    """A parameter's full value. An embedding has three parts. Queries come from the first, the same for all ids, so that a
    token which changes keeps its query; what tells keys apart is the second; a value has the channel that is 1 in the third,
    moved on by the number of its key head, so that heads which return from an exchange in a wrong order are found."""
    scale = 0.3 if "q_proj" in name or "q_norm" in name else 1.0  # small logits: no visible token has a share near 0
    if len(shape) == 1:
        return scale * torch.ones(shape)
    if name.endswith("embed_tokens.weight"):
        id_V, keys = torch.arange(shape[0]), torch.randn(_VARIANTS, _PART, generator=generator).sign()
        channel_VC = F.one_hot(id_V % (channels + 1), 2 * channels)
        full_VD = torch.cat([torch.ones(shape[0], _PART), keys[id_V // (channels + 1) % _VARIANTS], channel_VC], 1)
        return full_VD / 16  # all of one length, and short: what attention adds is not rounded away
    if name.endswith("v_proj.weight"):
        moved = [torch.eye(channels).roll(head, 0) for head in range(shape[0] // channels)]
        return F.pad(torch.cat(moved), (2 * _PART, channels))
    value = scale * torch.randn(shape, generator=generator) * shape[-1] ** -0.5
    if name.endswith("q_proj.weight"):
        value[:, _PART:] = 0
    return value


def _kernel(context: AttentionContext) -> str:
    if context.block_mask is not None:
        return _FLEX
    return "scaled_dot_product_attention" if context.first_RT is None else "flash attention by document and block"


# ---------------------------------------------------------------- documents and changed tokens


def _document_lengths(length: int) -> list[int]:
    """1, 1, 2, 3, 5, 8, ... tokens and a rest: short and long documents, which end anywhere in tiles and parts."""
    lengths, one, two = [], 1, 1
    while sum(lengths) + one < length:
        lengths.append(one)
        one, two = two, one + two
    return [*lengths, length - sum(lengths)]


def _keys(lengths: list[int], ranks: int, count: int, generator: torch.Generator) -> list[int]:
    """`count` tokens to change: the first, the last, and those on both sides of the borders of a document, of ranks and of a
    tile; the others at random."""
    length = sum(lengths)
    borders = [sum(lengths[: len(lengths) // 2]), length // ranks, length - length // ranks, _TILE]
    chosen = [0, length - 1, *(key for border in borders for key in (border, border - 1) if 0 < border < length)]
    return [*dict.fromkeys(chosen), *torch.randint(0, length, (count,), generator=generator).tolist()][:count]
