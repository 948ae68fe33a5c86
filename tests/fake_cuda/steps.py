"""The real engine, model and step on fake CUDA tensors, for the tests of this folder."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.data.batches import Batch
from pretrain.engines.base import Engine
from pretrain.engines.start import start_engine
from pretrain.model.config import ModelConfig, MoeConfig, resolve_model
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer
from pretrain.report.metrics import Meter
from pretrain.train import train_step

BATCH, LENGTH, VOCABULARY, WIDTH = 32, 1536, 32000, 768
LOGITS = BATCH * LENGTH * VOCABULARY
"""Values of a micro-batch's logits: several chunks of the loss."""
_DENSE = ModelConfig(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, qk_norm=True)
_MOE = MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=512, score="sigmoid", bias_update_rate=1e-3)
MODELS = {
    name: resolve_model(config, vocab_size=VOCABULARY, sequence_length=LENGTH)
    for name, config in {
        "dense": _DENSE,
        "moe": replace(_DENSE, moe=_MOE),
        "window": replace(_DENSE, sliding_window=512),
    }.items()
}


def start(config: EngineConfig, ranks: int = 1) -> Engine:
    """The first of `ranks` processes. Call it outside the fake mode: a mesh of ranks is made of real numbers."""
    if ranks > 1:
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    return start_engine(config)


def prepare(engine: Engine, model: str = "dense", optimizer: str = "adamw") -> None:
    """Builds model and optimizer, on the GPU from the start, because fake tensors cannot leave the meta device."""

    def make():
        with torch.device(engine.device):
            built = Transformer(MODELS[model])
        built._apply = lambda function, recurse=True: built
        return built

    engine._make = lambda _: make()
    engine.prepare(make, lambda built: build_optimizer(built, OptimizerConfig(name=optimizer)), 1.0, 0, lambda shard: None)
    engine._make_moments()


def micro_batch(documents: bool = False) -> Batch:
    """A micro-batch on the GPU."""
    tokens_BT = torch.zeros(BATCH, LENGTH, dtype=torch.int64, device="cuda")
    return Batch(tokens_BT, tokens_BT.clone(), tokens_BT.clone() if documents else None)


def step(engine: Engine, meter: Meter, window: list[Batch], step_function=train_step) -> None:
    """What the loop of a run does in each step, from the messages of ranks to the meter."""
    engine.attach([0, 0, 0], meter.last_loss)
    meter.add(*step_function(engine, window, 1e-3))
    engine.attached_sums()
