"""Trains a peer's model by the peer's recipe, on the windows of ours. benchmarks/recipes.py starts it; nobody else does.

    python benchmarks/recipe_peers.py TASK.json

Model class, initialisation and parameter groups are those of a checkout, imported from there; the loop around them is the same
for all peers: samples, their order and the validation set are those that launch/pretrain.py takes with the same settings. The
learning rate follows the peer's own schedule, and the loss of a step is the mean over its tokens.

    nanogpt     karpathy/nanoGPT, model.py: its AdamW groups, betas 0.9 and 0.99, weight decay 0.1, clipping at 1, warm-up
                over 2 % of the steps, cosine to a tenth (config/train_shakespeare_char.py, its recipe for small models, without
                the dropout that it has against seeing few characters many times)
    minimind    jingyaogong/minimind, model/model_minimind.py: AdamW with torch's defaults (betas 0.9 and 0.999, weight decay
                0.01 on everything), clipping at 1, no warm-up, cosine to a tenth (trainer/train_pretrain.py). Its own loader
                pads each text to a fixed length; here it gets packed windows, so that no token of its budget is padding
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import Config, load
from pretrain.files import write_atomically
from pretrain.model.config import ModelConfig
from pretrain.report.metrics import bits_per_byte
from pretrain.run.parts import Parts, open_parts

Nats = Callable[[Tensor, Tensor], Tensor]
"""(tokens_BT, labels_BT) to the cross-entropy, summed over the labels that are not -100."""
Peer = tuple[nn.Module, Nats, torch.optim.Optimizer]


def nanogpt(folder: str, model: ModelConfig, length: int, lr: float) -> Peer:
    """As many layers and heads and the same width as `model`, in GPT-2's architecture."""
    sys.path.insert(0, folder)
    theirs = importlib.import_module("model")
    gpt = theirs.GPT(theirs.GPTConfig(
        block_size=length, vocab_size=model.vocab_size, n_layer=model.num_hidden_layers, n_head=model.num_attention_heads,
        n_embd=model.hidden_size, dropout=0.0, bias=False,
    ))  # fmt: skip
    optimizer = gpt.configure_optimizers(weight_decay=0.1, learning_rate=lr, betas=(0.9, 0.99), device_type="cpu")

    def nats(tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        valid_BT = labels_BT != -100
        return gpt(tokens_BT, labels_BT.where(valid_BT, -1))[1] * valid_BT.sum()  # its loss is the mean, and ignores -1

    return gpt, nats, optimizer


def nanogpt_lr(step: int, steps: int, peak: float) -> float:
    """Learning rate of step 1 to `steps`."""
    warmup, done = round(0.02 * steps), step - 1
    if done < warmup:
        return peak * (done + 1) / (warmup + 1)
    return 0.1 * peak + 0.45 * peak * (1 + math.cos(math.pi * (done - warmup) / (steps - warmup)))


def minimind(folder: str, model: ModelConfig, length: int, lr: float) -> Peer:
    """The shape of `model`; the rest are its own defaults."""
    sys.path.insert(0, folder)
    theirs = importlib.import_module("model.model_minimind")
    mind = theirs.MiniMindForCausalLM(theirs.MiniMindConfig(
        hidden_size=model.hidden_size, num_hidden_layers=model.num_hidden_layers, vocab_size=model.vocab_size,
        num_attention_heads=model.num_attention_heads, num_key_value_heads=model.num_key_value_heads, head_dim=model.head_dim,
        intermediate_size=model.intermediate_size, max_position_embeddings=length,
    ))  # fmt: skip

    def nats(tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:  # its own loss shifts the labels
        logits = mind(tokens_BT).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=-100, reduction="sum")

    return mind, nats, torch.optim.AdamW(mind.parameters(), lr=lr)


def minimind_lr(step: int, steps: int, peak: float) -> float:
    """Learning rate of step 1 to `steps`."""
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


PEERS = {"nanogpt": (nanogpt, nanogpt_lr), "minimind": (minimind, minimind_lr)}


@torch.no_grad()
def validate(model: nn.Module, nats: Nats, parts: Parts, rows: int) -> dict[str, float]:
    """The figures of `pretrain.evaluate.evaluate` over the full set, and the number of its labels."""
    model.eval()
    (data,), total, labels = parts.valid, 0.0, 0
    for first in range(0, data.num_samples, rows):
        batch = data.take(list(range(first, min(first + rows, data.num_samples))))
        total += float(nats(batch.tokens_BT, batch.labels_BT))
        labels += int((batch.labels_BT != -100).sum())
    model.train()
    assert labels == data.num_labels
    return {"val_loss": total / labels, "val_bits_per_byte": bits_per_byte(total / labels, data.bytes_per_token)}


def train(name: str, folder: str, config: Config) -> tuple[int, list[dict]]:
    """Trains as `config` says: its data, order, batch, steps, seed, learning rate. -> (parameters, metrics records)."""
    parts, rows, steps = open_parts(config), config.batch.global_batch_size, config.train.max_steps
    make, lr_at = PEERS[name]
    torch.manual_seed(config.run.seed)
    model, nats, optimizer = make(folder, parts.model, config.data.sequence_length, config.optimizer.lr)
    records: list[dict] = []
    for step in range(1, steps + 1):
        batch = parts.data.take((step - 1) * rows, rows)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps, config.optimizer.lr)
        loss = nats(batch.tokens_BT, batch.labels_BT) / (batch.labels_BT != -100).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 1 or step % config.log.every_steps == 0:
            records.append({"step": step, "loss": loss.item()})
        if step == steps or step % config.evaluate.every_steps == 0:
            records.append({"step": step, **validate(model, nats, parts, rows)})
    return sum(parameter.numel() for parameter in model.parameters()), records


def main(path: Path) -> None:
    """Trains what the file says, and writes what it gave beside it."""
    task, began = json.loads(path.read_text()), time.process_time()
    parameters, records = train(task["peer"], task["folder"], load(task["settings"]))
    result = {"parameters": parameters, "cpu_seconds": time.process_time() - began, "records": records}
    write_atomically(path.with_name("peer.json"), json.dumps(result, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
