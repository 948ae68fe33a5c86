"""Measures expert parallelism with a learned and with a forced-even router: how uneven the work is, its cost, what is sent.

    python benchmarks/expert_parallel.py [--ranks 2 4] [--steps 10] [--output FILE]

A small mixture of experts trains on a Markov chain under `ddp`, on CPU ranks of one thread; each rank has all experts, or a
part of them. The forced-even router sends token n to the experts n and n + 1 modulo E. `seconds` is CPU time per step of the
slowest rank. `most` and `least` are the rows (a token at one of its experts) of a layer on the rank with most and on that with
least, relative to an even share. `sent` is what a rank sends to other ranks for the experts of a step: counts, rows, weights
and their gradients. All are means over the second half of the steps.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from pretrain.config import EngineConfig, OptimizerConfig, ParallelConfig
from pretrain.data.batches import Batch
from pretrain.engines import parallel
from pretrain.engines.base import Engine
from pretrain.engines.start import start_engine
from pretrain.model.config import ModelConfig, MoeConfig, resolve_model
from pretrain.model.moe import Router
from pretrain.model.transformer import Transformer
from pretrain.optim.optimizer import build_optimizer
from pretrain.run import command_line
from pretrain.run.processes import run_processes
from pretrain.train import train_step

VOCABULARY, LENGTH, SEQUENCES, LR = 512, 256, 8, 3e-3
MODEL = ModelConfig(
    hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
    moe=MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=512),
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = command_line.make_parser(__doc__)
    positive = command_line.at_least(1)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[2, 4], help="default: 2 4")
    parser.add_argument("--steps", type=command_line.at_least(2), default=10, help="of each run (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("expert_parallel.json"), help="JSON file (default: %(default)s)")
    options = parser.parse_args(argv)
    found = []
    for ranks in options.ranks:
        for router in ("learned", "even"):
            for expert in (1, ranks):
                results = run_processes(ranks, _measure, expert, router, options.steps)
                half = slice(options.steps // 2, None)
                seconds = max(statistics.mean(seconds[half]) for seconds, _, _ in results)
                shares = [share for step in results[0][1][half] for share in step]
                most, least = (statistics.mean(pick(layer) for layer in shares) for pick in (max, min))
                sent = statistics.mean(sum(rank[2][half]) / len(rank[2][half]) for rank in results) / 2**20
                found.append(
                    dict(
                        ranks=ranks, experts_over=expert, router=router, seconds=seconds, most=most, least=least, sent_mib=sent
                    )
                )
                print(f"{ranks} ranks, experts over {expert}, {router:7} router: {seconds:.3f} s, most {most:.2f}, "
                      f"least {least:.2f}, sent {sent:.2f} MiB", flush=True)  # fmt: skip
    options.output.write_text(json.dumps({"torch": torch.__version__, "rows": found}, indent=1) + "\n")
    return 0


def _measure(expert: int, router: str, steps: int) -> tuple[list[float], list[list[list[float]]], list[int]]:
    """On a rank, for each step: CPU seconds; of each layer, the rows of each rank relative to an even share; bytes sent."""
    engine, sent, chosen_of_layers = start_engine(_engine(expert)), [], []
    all_to_all = parallel._all_to_all

    def counted(rows: Tensor, counts: list[int] | None, *rest) -> Tensor:
        counts = counts or [len(rows) // expert] * expert
        others = len(rows) - counts[engine.mesh.expert_rank]
        sent.append(others * rows[:1].nbytes)
        return all_to_all(rows, counts if rest[0] else None, *rest)

    parallel._all_to_all = counted
    if router == "even":
        forward = Router.forward
        Router.forward = lambda self, *args: (_even(self, args[0]), *forward(self, *args)[1:])
    model = resolve_model(MODEL, vocab_size=VOCABULARY, sequence_length=LENGTH)
    engine.prepare(lambda: Transformer(model), lambda module: build_optimizer(module, OptimizerConfig(lr=LR)), 1.0, seed=0)
    for block in engine.model.model.layers:
        block.mlp.experts.register_forward_pre_hook(lambda module, args: chosen_of_layers.append(args[1]))
    seconds, shares, bytes_sent = [], [], []
    for step in range(steps):
        sent.clear()
        chosen_of_layers.clear()
        began = time.process_time()
        train_step(engine, [_batch(engine, step)], LR)
        seconds.append(time.process_time() - began)
        bytes_sent.append(sum(sent))
        shares.append([_shares(engine, chosen_Nk, expert) for chosen_Nk in chosen_of_layers])
    engine.close()
    return seconds, shares, bytes_sent


def _engine(expert: int) -> EngineConfig:
    return EngineConfig(precision="fp32", parallel=ParallelConfig(expert=expert))


def _even(router: Router, hidden_BTD: Tensor) -> Tensor:
    """chosen_Nk of the forced-even router."""
    first_N1 = torch.arange(hidden_BTD[..., 0].numel())[:, None]
    return (first_N1 + torch.arange(router.config.num_experts_per_tok)) % router.config.num_experts


def _shares(engine: Engine, chosen_Nk: Tensor, expert: int) -> list[float]:
    """The rows of each rank, relative to an even share."""
    counts_E = engine.all_reduce(torch.bincount(chosen_Nk.flatten(), minlength=MODEL.moe.num_experts))
    by_part = counts_E.view(expert, -1).sum(1)
    return (by_part * expert / counts_E.sum()).tolist()


def _batch(engine: Engine, step: int) -> Batch:
    """This rank's sequences of a Markov chain: 8 equally likely tokens follow each token."""
    generator, share = torch.Generator().manual_seed(step * engine.world_size + engine.rank), SEQUENCES // engine.world_size
    tokens_BT = torch.zeros(share, LENGTH + 1, dtype=torch.int64)
    for t in range(LENGTH):
        tokens_BT[:, t + 1] = (5 * tokens_BT[:, t] + torch.randint(1, 9, (share,), generator=generator)) % VOCABULARY
    return Batch(tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous(), None)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
