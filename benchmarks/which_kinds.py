"""Which kinds of parallelism does a model need? The project's own arithmetic for four models on 1, 8 and 64 GPUs.

    python benchmarks/which_kinds.py [--device h100] [--gpus 1 8 64] [--output FILE]

For each model and number of GPUs it tries ddp and fsdp2 with every product of kinds, every activation checkpointing and every
micro-batch that divides the run, and prints the fastest that fits for each set of kinds: GiB of a rank, GB that it sends in a
step, and an estimate of the time. If nothing fits, it prints the plan that needs least. Bytes sent are counted
(`pretrain/plan/messages.py`), memory and times are estimates (`memory.py`, `scaling.py`). It measures nothing, needs no GPU and
takes seconds.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain import devices
from pretrain.config import EngineConfig, ParallelConfig
from pretrain.devices import Device
from pretrain.model import flops
from pretrain.model.config import ModelConfig, MoeConfig, resolve_model
from pretrain.plan.choices import Job, Plan, plan
from pretrain.plan.scaling import Cluster
from pretrain.run import command_line


def _job(length: int, sequences: int, vocab: int, **settings) -> Job:
    return Job(resolve_model(ModelConfig(**settings), vocab_size=vocab, sequence_length=length), length, sequences)


JOBS = {
    "1.1B, 4k": _job(4096, 256, 32000, hidden_size=2048, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
         intermediate_size=5632, tie_word_embeddings=False),
    "8B, 32k": _job(32768, 128, 128256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
         intermediate_size=14336, tie_word_embeddings=False),
    "30B-A3B, 4k": _job(4096, 1024, 151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, head_dim=128,
         num_key_value_heads=4, qk_norm=True, tie_word_embeddings=False,
         moe=MoeConfig(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768)),
    "70B, 8k": _job(8192, 512, 128256, hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
         intermediate_size=28672, tie_word_embeddings=False),
}  # fmt: skip
"""TinyLlama; Llama 3 8B at 32k; Qwen3-30B-A3B; Llama 3 70B."""


def plans(job: Job, device: Device, gpus: int) -> Iterator[Plan]:
    """Every plan that divides the job; tensor and sequence parallelism stay within a node of 8."""
    cluster, model, powers = Cluster(device, gpus), job.model, (1, 2, 4, 8)
    experts = [each for each in (1, 2, 4, 8, 16, 32, 64) if each <= gpus] if model.moe else [1]
    for name, tensor, sequence, expert in itertools.product(("ddp", "fsdp2"), powers, powers, experts):
        together = tensor * sequence
        if together > min(8, gpus) or model.num_key_value_heads % tensor or model.num_attention_heads % together:
            continue
        groups, parallel = gpus // together, ParallelConfig(tensor=tensor, sequence=sequence, expert=expert)
        for kept, micro_batch in itertools.product(("none", "selective", "full"), (1, 2, 4, 8, 16)):
            accumulation, rest = divmod(job.sequences, groups * micro_batch)
            if rest or not accumulation:
                continue
            engine = EngineConfig(name=name, precision="bf16", activation_checkpointing=kept, parallel=parallel)
            yield plan(job, engine, micro_batch, cluster)


def best(job: Job, device: Device, gpus: int) -> list[Plan]:
    """For each set of kinds the fastest plan that fits, fastest first; if none fits, the one that needs least."""
    found: dict[tuple[str, ...], Plan] = {}
    tried = list(plans(job, device, gpus))
    for each in tried:
        better = found.get(each.kinds)
        if each.fits and (better is None or each.time.total < better.time.total):
            found[each.kinds] = each
    return sorted(found.values(), key=lambda each: each.time.total) or [min(tried, key=lambda each: each.needed_gib)]


def show(name: str, gpus: int, way: Plan) -> str:
    """A line of the table."""
    parts, time = way.memory, way.time
    gib = " ".join(f"{size / 2**30:6.1f}" for size in (*parts[:4], max(parts.logits, parts.block)))
    sent = " ".join(f"{size / 1e9:8.1f}" for size in way.sent)
    return (
        f"{name:12} {gpus:4}  {way!s:34} {way.engine.activation_checkpointing:9} {way.micro_batch:2} x "
        f"{way.accumulation:<4} {gib} {way.needed_gib:6.1f} {sent}  {time.total:7.2f} {time.exposed / time.total:4.0%} "
        f"{time.tokens_per_second:8,.0f} {time.mfu:5.1%}"
    )


def main(argv: list[str]) -> None:
    """Prints the table."""
    parser = command_line.make_parser(__doc__)
    parser.add_argument("--device", default="h100", choices=devices.names(), help="(default: %(default)s)")
    parser.add_argument("--gpus", type=command_line.at_least(1), nargs="+", default=[1, 8, 64], help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: none)")
    options = parser.parse_args(argv)
    device, rows = devices.find(options.device), []
    print(f"{'GiB of a rank':>85}{'GB sent per step':>43}")
    names = f"{'weights':>9}{'sums':>6}{'moments':>8}{'kept':>6}{'rest':>7}{'need':>7}{'hidden':>9}{'awaited':>9}"
    print(f"{'model':12} GPUs  {'plan':34} {'recompute':9} {'batch':8}{names}{'s/step':>9} wait    tok/s   MFU")
    for (name, job), gpus in itertools.product(JOBS.items(), options.gpus):
        for way in best(job, device, gpus):
            note = "" if way.fits else f"  does not fit in {device.memory_gib} GiB"
            print(show(name, gpus, way) + note, flush=True)
            rows.append({
                "job": name, "gpus": gpus, "parameters": flops.num_parameters(job.model).total,
                "engine": dataclasses.asdict(way.engine), "micro_batch": way.micro_batch, "accumulation": way.accumulation,
                "memory": way.memory._asdict(), "needed_gib": way.needed_gib, "sent": way.sent, **way.time._asdict(),
            })  # fmt: skip
    if options.output:
        options.output.write_text(json.dumps({"device": device.name, "plans": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
