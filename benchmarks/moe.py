"""Measures the cost of experts: training steps of mixtures of experts against a dense model with equal FLOPs per token.

    python benchmarks/moe.py [--device cpu|cuda] [--rounds 5] [--steps 1] [--compile] [--output FILE]

Each mixture has the dense model's attention, head and data; the experts of a token together are as wide as the dense
feed-forward network. The models take turns in one process after a warm-up. The figure is FLOPs per second (including the
router) relative to the dense model, the median over the rounds: for full steps, and without the optimizer's update, because a
mixture has more parameters to update, however many tokens a step has.

Exit status: 0 if 8 experts, 2 chosen, reach 0.9 without the update; 1 otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.data.batches import Batch
from pretrain.engines.base import Engine
from pretrain.engines.start import start_engine
from pretrain.model.config import ModelConfig, MoeConfig, resolve_model
from pretrain.model.flops import flops_per_token, num_parameters
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer
from pretrain.run import command_line
from pretrain.train import train_step

VOCABULARY, LR = 8192, 3e-4
SIZES = {  # device: (model, tokens in a sequence, sequences in a micro-batch, micro-batches in a step)
    "cpu": (ModelConfig(hidden_size=384, num_hidden_layers=4, num_attention_heads=6, intermediate_size=1024), 256, 8, 4),
    "cuda": (ModelConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=6, intermediate_size=2048), 1024, 32, 4),
}
KINDS = {  # name: (experts, chosen, shared)
    "8 experts, 2 chosen": (8, 2, 0),
    "8 experts, 1 chosen, 1 shared": (8, 1, 1),
    "32 experts, 4 chosen": (32, 4, 0),
}


def main(argv: list[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = command_line.make_parser(__doc__)
    default, positive = "cuda" if torch.cuda.is_available() else "cpu", command_line.at_least(1)
    parser.add_argument("--device", choices=SIZES, default=default, help="default here: %(default)s")
    parser.add_argument("--rounds", type=positive, default=5, help="measurements per model (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=1, help="steps per measurement (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, as engine.compile: blocks does")
    parser.add_argument("--output", type=Path, default=Path("moe.json"), help="JSON file (default: %(default)s)")
    options = parser.parse_args(argv)
    size, length, sequences, accumulation = SIZES[options.device]
    models = {
        name: resolve_model(model, vocab_size=VOCABULARY, sequence_length=length) for name, model in _models(size).items()
    }
    settings = EngineConfig(
        precision="fp32" if options.device == "cpu" else "bf16", compile="blocks" if options.compile else "none"
    )
    engines = {name: _engine(settings, model) for name, model in models.items()}
    device = engines["dense"].device
    tokens = torch.randint(0, VOCABULARY, (accumulation, sequences, length + 1)).to(device)  # random, never zeros
    window = [Batch(micro[:, :-1].contiguous(), micro[:, 1:].contiguous(), None) for micro in tokens]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for engine in engines.values():
        _seconds(engine, window, 1)
    for number in range(options.rounds):
        for name in sorted(models, reverse=number % 2 == 1):
            seconds[name].append(_seconds(engines[name], window, options.steps))
        print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)
    print(f"{engines['dense'].device_name}, {tokens[..., 1:].numel()} tokens per step, {options.rounds} rounds")
    result = {}
    for name, model in models.items():
        work = flops_per_token(model, length) / flops_per_token(models["dense"], length)
        ratios = [
            [work * dense[i] / mine[i] for dense, mine in zip(seconds["dense"], seconds[name], strict=True)] for i in (0, 1)
        ]
        step, gradient = (statistics.median(ratio) for ratio in ratios)
        counts = num_parameters(model)
        print(f"{name:30} {counts.total / 1e6:6.1f} M parameters, {counts.active / 1e6:5.1f} M active: "
              f"step {step:.3f}, without the update {gradient:.3f}")  # fmt: skip
        result[name] = {"seconds": seconds[name], "step": step, "gradient": gradient, "parameters": counts.total}
    options.output.write_text(json.dumps({"torch": torch.__version__, "device": str(device), **result}, indent=1) + "\n")
    return 0 if result["8 experts, 2 chosen"]["gradient"] >= 0.9 else 1


def _models(dense: ModelConfig) -> dict[str, ModelConfig]:
    models = {"dense": dense}
    for name, (experts, chosen, shared) in KINDS.items():
        width = dense.intermediate_size // (chosen + shared)
        moe = MoeConfig(
            num_experts=experts,
            num_experts_per_tok=chosen,
            num_shared_experts=shared,
            moe_intermediate_size=width,
            norm_topk_prob=chosen > 1,
        )
        models[name] = dataclasses.replace(dense, moe=moe)
    return models


def _engine(settings: EngineConfig, model: ModelConfig) -> Engine:
    engine = start_engine(settings)
    engine.prepare(lambda: Transformer(model), lambda module: build_optimizer(module, OptimizerConfig(lr=LR)), 1.0, seed=0)
    return engine


def _seconds(engine: Engine, window: list[Batch], steps: int) -> tuple[float, float]:
    """Returns the seconds of one step with and without the update: processor time on a CPU, which other programs share."""
    clock, update, updating = time.process_time if engine.device.type == "cpu" else time.perf_counter, engine.update, []

    def timed(lr: float):
        _wait(engine)
        began = clock()
        result = update(lr)
        _wait(engine)
        updating.append(clock() - began)
        return result

    engine.update = timed
    began = clock()
    for _ in range(steps):
        train_step(engine, window, LR)
    _wait(engine)
    total = clock() - began
    engine.update = update
    return total / steps, (total - sum(updating)) / steps


def _wait(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
