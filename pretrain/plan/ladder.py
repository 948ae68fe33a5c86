"""The small runs that predict a large one: their models, tokens, batches and learning rates, by rule.

All rungs are of the large model's family: same head_dim, aspect ratio (width over depth), ratios of the feed-forward and of
query to key heads, vocabulary, and number of experts. Their tokens per parameter and their schedule's shape are those of the
large run. N counts what multiplies a token (blocks, with the chosen experts only, and the head): with N a run costs about
6 N D FLOPs at every size, which without the head it does not, where the head is most of a small model (Porian et al. 2024,
"Resolving Discrepancies in Compute-Optimal Scaling of Language Models", arXiv 2406.19146; nanochat counts the same way).

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from pretrain import UserError
from pretrain.model.config import ModelConfig
from pretrain.model.flops import flops_per_token, num_parameters

BATCH_EXPONENT = 0.383
"""Of the best batch in the tokens of a run (Bergsma et al. 2025, "Power Lines", arXiv 2505.13738; used by nanochat)."""
LR_SLOPE = -0.1
"""Of the best learning rate in the FLOPs of a run: between -0.125 (DeepSeek LLM), -0.20 (Step Law) and +0.1 (the square root of
the batch, as nanochat scales). What is true of this family is measured on the rungs."""
LR_FACTORS = (0.5, 1.0, 2.0, 4.0)
"""Times the rule, on the two smallest rungs."""
FEWER_FACTORS = (1.0, 2.0)
"""Times the rule, on larger rungs: the smaller ones show how curved the loss is in the learning rate."""


LEAST_LAYERS = 2
"""Of a rung."""


class Target(NamedTuple):
    """The large run, or a rung."""

    model: ModelConfig
    """Resolved."""
    length: int
    """Tokens per sequence."""
    tokens: int
    """Fed to the model in training."""
    sequences: int
    """Per step."""
    lr: float

    @property
    def parameters(self) -> int:
        """N: what multiplies a token."""
        return num_parameters(self.model).matmul

    @property
    def flops(self) -> float:
        """C: of training, without recomputation; attention included."""
        return float(self.tokens * flops_per_token(self.model, self.length))

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return math.ceil(self.tokens / (self.sequences * self.length))


def shrink(model: ModelConfig, heads: int) -> ModelConfig:
    """The model of this family with so many query heads. model: resolved."""
    share = heads / model.num_attention_heads
    kv_heads = max(1, round(model.num_key_value_heads * share))
    while heads % kv_heads:
        kv_heads -= 1
    width = model.hidden_size * heads // model.num_attention_heads
    moe = model.moe
    if moe:
        moe = dataclasses.replace(moe, moe_intermediate_size=_multiple(moe.moe_intermediate_size * share))
    return dataclasses.replace(
        model,
        from_pretrained=None,
        hidden_size=width,
        num_hidden_layers=max(1, round(model.num_hidden_layers * share)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=_multiple(model.intermediate_size * share),
        moe=moe,
    )


def _multiple(size: float) -> int:
    """The nearest multiple of 8, at least 8: tensor cores want no less."""
    return max(8, 8 * round(size / 8))


def rung(big: Target, heads: int, multiple: int = 1) -> Target:
    """The rung with so many heads; its learning rate is the rule's. multiple: of the sequences per step."""
    model = shrink(big.model, heads)
    tokens = round(big.tokens / big.parameters * num_parameters(model).matmul)
    batch = big.sequences * (tokens / big.tokens) ** BATCH_EXPONENT
    sequences = max(multiple, multiple * round(batch / multiple))
    tokens = math.ceil(tokens / (sequences * big.length)) * sequences * big.length  # full steps
    found = Target(model, big.length, tokens, sequences, big.lr)
    return found._replace(lr=big.lr * (found.flops / big.flops) ** lr_slope(big.model))


def lr_slope(model: ModelConfig) -> float:
    """d ln lr / d ln C by the rule: 0 under model.scaling, which keeps the best learning rate where it is."""
    return 0.0 if model.scaling else LR_SLOPE


def rungs(big: Target, count: int, smallest: float, largest: float, multiple: int = 1) -> list[Target]:
    """`count` rungs whose FLOPs are evenly spaced on a log scale, between these shares of the large run's; smallest first.

    None has a single layer, unless the large run has: what such a model cannot learn makes it none of the family
    (`ladder_fit.TOO_SMALL`). Raises UserError where the family has too few sizes there.
    """
    sizes = [rung(big, heads, multiple) for heads in range(1, big.model.num_attention_heads)]
    family = [each for each in sizes if each.model.num_hidden_layers >= min(LEAST_LAYERS, big.model.num_hidden_layers)]
    sizes = [each for each in family if each.flops / big.flops <= largest * 1.001]
    if len(sizes) < count:
        needed = f"--largest {1.005 * family[count - 1].flops / big.flops:.3g}, " if len(family) >= count else ""
        raise UserError(
            f"only {len(sizes)} smaller models of this family cost at most {largest:g} of the large run: their width is a "
            f"multiple of {big.model.hidden_size // big.model.num_attention_heads} (one head), and they have at least "
            f"{LEAST_LAYERS} layers. Use {needed}fewer --rungs, or a planned model with smaller heads"
        )
    chosen: list[Target] = []
    for place in range(count):
        share = math.log(largest) + (math.log(smallest) - math.log(largest)) * place / max(1, count - 1)
        left = [each for each in sizes if not chosen or each.parameters < chosen[-1].parameters]
        left = left[count - 1 - place :]  # enough smaller ones stay for the other places
        chosen.append(min(left, key=lambda each: abs(math.log(each.flops / big.flops) - share)))
    return chosen[::-1]


class Advice(NamedTuple):
    """What a published rule says about a run."""

    source: str
    lr: float
    batch_tokens: float


def published(parameters: int, tokens: int) -> list[Advice]:
    """Learning rate and batch by published laws, for comparison: they were fitted to AdamW, other data and other models.

    DeepSeek LLM (Bi et al. 2024, arXiv 2401.02954) gives both as powers of the compute; Step Law (Li et al. 2025,
    arXiv 2503.04715) as powers of N and D.
    """
    compute = 6.0 * parameters * tokens
    return [
        Advice("DeepSeek", 0.3118 * compute**-0.125, 0.2920 * compute**0.3271),
        Advice("Step Law", 1.79 * parameters**-0.713 * tokens**0.307, 0.58 * tokens**0.571),
    ]
