"""Engines run what the settings request, under every launcher; their options save what they promise and change no number."""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import json
import math
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config import Config, ConfigError, EngineConfig, load, validate
from pretrain.engines import base
from pretrain.engines.base import _prefer_expandable_segments, require
from pretrain.engines.compile import compile_report
from pretrain.engines.start import start_engine
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.model.transformer import Transformer
from pretrain.train import train_step
from tests.distributed.test_engines import ENGINES, engine_of
from tests.ranks import run_ranks
from tests.test_step import MODEL, differences, make_engine, make_optimizer, plain_run, run_steps, window_of

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(900)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("engine", "key"),
    [
        (dict(name="ddp", offload="optimizer"), "engine.offload"),
        (dict(name="zero2", offload="all"), "engine.offload"),
        (dict(name="fsdp2", offload="all"), "engine.offload"),
        (dict(name="zero3", replicas=2), "engine.replicas"),
        (dict(name="fsdp2", replicas=3), "engine.replicas"),
        (dict(name="ddp", reduce_gradients="micro_batch"), "engine.reduce_gradients"),
        (dict(name="fsdp2", bucket_mib=25), "engine.bucket_mib"),
        (dict(name="zero3", compile="model"), "engine.compile"),
    ],
)
def test_an_option_that_an_engine_does_not_have_is_refused(engine, key):
    config = dataclasses.replace(Config(), engine=EngineConfig(**engine))
    assert key in [problem.key for problem in validate(config, 4)]


def test_a_mismatch_names_the_requested_and_the_actual_value():
    with pytest.raises(ConfigError, match="stage: requested 3, got 2"):
        require(stage=(3, 2), ranks=(8, 8))


def test_another_number_of_processes_than_requested_is_refused():
    with pytest.raises(ConfigError, match="processes: requested 2, got 1"):
        start_engine(EngineConfig(world_size=2))


def test_ddp_and_fsdp2_do_not_import_deepspeed():
    script = (
        "import sys; from pretrain.config import EngineConfig; from tests.distributed.test_engines import engine_of\n"
        "for name in ('fsdp2', 'ddp'): engine_of(EngineConfig(name=name)).close()\n"
        "assert 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=170)


# ---------------------------------------------------------------- launchers

SHRINK = [
    *("--tokenizer.path", "null", "--data.train", "[]", "--data.valid", "[]", "--data.synthetic.kind", "markov"),
    *("--data.sequence_length", "32", "--model.vocab_size", "128", "--model.hidden_size", "64"),
    *("--model.num_hidden_layers", "2", "--model.intermediate_size", "96"),
    *("--batch.global_batch_size", "8", "--batch.micro_batch_size", "2", "--train.max_tokens", "2560"),
    *("--schedule.warmup_steps", "2", "--schedule.decay_steps", "4"),
    *("--engine.precision", "fp32", "--engine.compile", "none", "--log.every_steps", "1", "--log.wandb.mode", "offline"),
]
"""Flags that make any configuration run in seconds on a CPU: a small model, generated data, fp32."""

LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "torchrun of one": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu.yaml",
                   "--main_process_port", "0"],
}  # fmt: skip
HOSTILE = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8",
    "ACCELERATE_GRADIENT_CLIPPING": "0.01",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "FSDP_VERSION": "1",
}


def launch(folder: Path, launcher: str, config: str, *flags: str, **variables: str) -> list[dict]:
    """Runs a shrunk configuration to its end. Returns the records of metrics.jsonl."""
    command = [*LAUNCHERS[launcher], "launch/pretrain.py", "--config", f"configs/{config}.yaml", "--run.directory", str(folder)]
    environment = os.environ | {"WANDB_DIR": str(folder)} | variables
    done = subprocess.run(
        [*command, *SHRINK, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [metrics] = folder.glob("*/metrics.jsonl")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def losses(records: list[dict]) -> list[float]:
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "flags"), [("cloud", []), ("cloud_zero3", []), ("cloud_long_context", ["--engine.parallel.sequence", "2"])]
)
def test_the_cloud_configurations_run_to_their_end_with_a_small_model(tmp_path, config, flags):
    records = launch(tmp_path, "accelerate", config, *flags)
    shown = losses(records)
    assert len(shown) == 10 and shown[0] == pytest.approx(4.852, rel=0.02) and shown[-1] < shown[0]
    assert records[-2]["stuck_parameters"] == records[-2]["diverged_ranks"] == 0 and "val_loss" in records[-1]
    assert list((tmp_path / config).glob("wandb/offline-run-*")) or list(tmp_path.glob("**/offline-run-*"))


@pytest.mark.slow
def test_the_cloud_mixture_of_experts_runs_to_its_end_with_a_small_model(tmp_path):
    flags = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    flags = [word for key, value in flags.items() for word in (f"--model.moe.{key}", str(value))]
    records = launch(tmp_path, "accelerate", "cloud_moe", *flags, "--engine.parallel.expert", "2")
    shown = losses(records)
    # As of `fill_initial`: ln 128 and half the variance of the initial logits, 0.16.
    assert len(shown) == 10 and shown[0] == pytest.approx(4.852 + 0.08, rel=0.01) and shown[-1] < shown[0]
    assert records[-2]["stuck_parameters"] == records[-2]["diverged_ranks"] == 0 and "val_loss" in records[-1]
    for record in records:
        if "loss" in record:
            assert 0.9 < record["aux_loss"] < 1.5 and record["z_loss"] > 0
            assert (
                0 <= record["expert_load_min"] < 1 < record["expert_load_max"] < 4 and 0.8 < record["expert_load_entropy"] < 1
            )


ENGINES_OF = {
    "python": ("ddp", "fsdp2", "zero3"),
    "torchrun": ("fsdp2", "zero3"),
    "torchrun of one": ("ddp", "zero1"),
    "accelerate": ("ddp", "zero1", "fsdp2", "zero3"),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[float]:
    """The losses of one process, in an environment without settings of others."""
    return losses(launch(tmp_path_factory.mktemp("expected"), "python", "cloud", "--engine.name", "ddp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=pytest.mark.release) if name.endswith("of one") else name for name in LAUNCHERS]
)
def test_every_launcher_and_engine_gives_the_same_losses_in_a_hostile_environment(tmp_path, launcher, expected):
    for engine in ENGINES_OF[launcher]:
        shown = losses(launch(tmp_path / engine, launcher, "cloud", "--engine.name", engine, **HOSTILE))
        assert shown == pytest.approx(expected, rel=2e-6), engine


# ---------------------------------------------------------------- options


def compiled_losses(configs: dict[str, EngineConfig]) -> dict:
    """For each engine: the result of `run_steps`, and the report of the compiler."""
    results = {}
    for name, config in configs.items():
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        engine = engine_of(config)
        results[name] = run_steps(engine, 2, "sgd", [None]), compile_report()
    return results


@pytest.mark.slow
def test_compiled_engines_change_no_number_and_break_no_graph(subtests):
    configs = {name: dataclasses.replace(ENGINES[name], compile="blocks") for name in ("ddp", "zero1", "zero3", "fsdp2")}
    configs["ddp model"] = EngineConfig(compile="model")
    configs["fsdp2 full"] = EngineConfig(name="fsdp2", compile="blocks", activation_checkpointing="full")
    results, expected = run_ranks(2, compiled_losses, configs, timeout=900), plain_run("sgd")
    for name in configs:
        with subtests.test(name):
            loss, norm, weight = differences([rank[name][0] for rank in results], expected)
            print(f"{name}: loss {loss:.1e}, norm {norm:.1e}, weights {weight:.1e}; {results[0][name][1]}")
            assert loss < 1e-6 and norm < 1e-5 and weight < 1e-6
            assert " 0 graph breaks" in results[0][name][1] or name == "ddp model"  # DDP's own hooks


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.name()] += 1
        return function(*args, **(kwargs or {}))


def test_activation_checkpointing_keeps_less_and_recomputes_what_it_says():
    """Counts bytes kept between forward and backward pass, and products and activations computed in the backward pass."""
    kept, again = {}, {}
    for how in ("none", "selective", "full"):
        engine = make_engine(EngineConfig(activation_checkpointing=how), "adamw")
        parameters = {parameter.data_ptr() for parameter in engine.model.parameters()}
        seen: dict[int, int] = {}

        def pack(tensor, parameters=parameters, seen=seen):
            if tensor.data_ptr() not in parameters:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_sum = engine.forward(*window_of(engine, 0, 8)[0].inputs).loss_sum
        with Operations() as operations:
            loss_sum.backward()
        kept[how], again[how] = sum(seen.values()), operations.count
    assert kept["full"] < 0.2 * kept["none"]
    mm, silu = "aten::mm", "aten::silu"
    assert again["none"][mm] == again["selective"][mm] < again["full"][mm]
    assert again["none"][silu] == 0 and again["selective"][silu] == again["full"][silu] == 2  # one in each block


LARGE = resolve_model(
    ModelConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=8), vocab_size=4096, sequence_length=32
)


def peaks_of_start(config: EngineConfig) -> tuple[float, float, float]:
    """Peak growth of this process in MiB while the model is made, and until the engine is ready; MiB of the model."""

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    engine = make_engine(config, "adamw")  # a tiny one takes the memory of any first start
    # Give every tensor its own mapping, which is returned when freed; otherwise glibc keeps a varying share of the model.
    m_mmap_threshold = -3
    assert ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**16)
    before = peak()
    engine._make(lambda: Transformer(LARGE))
    made = peak() - before
    engine.prepare(lambda: Transformer(LARGE), lambda model: make_optimizer(model, "adamw"), 1.0, seed=0)
    with torch.device("meta"):
        full = sum(parameter.nbytes for parameter in Transformer(LARGE).parameters()) / 2**20
    return made, peak() - before, full


@pytest.mark.slow
@pytest.mark.parametrize("engine", [dict(name="fsdp2"), dict(name="zero3", bucket_mib=1)])
def test_no_rank_holds_the_full_model_while_it_is_built(engine):
    """On 4 ranks: a quarter of the weights, and one parameter being drawn. DeepSpeed holds several quarters while it starts:
    weights, the buffer in which they are gathered, master weights, gradients."""
    for made, started, full in run_ranks(4, peaks_of_start, EngineConfig(**engine)):
        print(f"{engine['name']}: {made:.0f}, then {started:.0f} MiB at most; the model has {full:.0f} MiB")
        assert made < 0.35 * full and started < (0.9 if engine["name"] == "zero3" else 0.35) * full


KEPT_MEMORY = """
import torch
from pathlib import Path
from pretrain.config import EngineConfig
from pretrain.engines.start import start_engine
def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) // 1024
start_engine(EngineConfig(name="ddp", precision="fp32"))
before = resident()
[torch.ones(6 * 2**20) for _ in range(10)]  # of 24 MiB; by its defaults, glibc then returns the end of the heap
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or torch.cuda.is_available(), reason="of glibc, for CPUs")
@pytest.mark.parametrize(("variables", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "65536"}, False)])
def test_on_cpus_the_memory_of_freed_tensors_is_kept_unless_the_environment_decides(variables, kept):
    clean = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES" and not key.startswith("MALLOC_")}
    command = [sys.executable, "-c", KEPT_MEMORY]
    done = subprocess.run(command, cwd=ROOT, env=clean | variables, capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 120) == kept  # MiB of 240


def test_every_engine_setting_is_documented():
    text = (ROOT / "docs" / "engines.md").read_text()
    for field in dataclasses.fields(EngineConfig):
        if field.name not in ("name", "world_size", "bucket_mib", "keep_whole_below"):
            assert f"engine.{field.name}" in text, field.name


def test_the_cloud_configurations_fit_their_ranks():
    shipped = (("cloud", 8), ("cloud_zero3", 8), ("cloud_zero3", 64), ("cloud_moe", 32), ("cloud_long_context", 8))
    for config, ranks in shipped:
        load(["--config", str(ROOT / "configs" / f"{config}.yaml")], world_size=ranks)


# ---------------------------------------------------------------- memory and copies


def storages_of_gradients(micro_batches: list[int]) -> tuple[list[dict[int, int]], int]:
    """Under ddp, for steps of so many micro-batches (the third step is not finite): {address: bytes} of the storages that held
    gradients in each step; and the bytes of the weights."""
    engine, steps = make_engine(EngineConfig(), "adamw"), []
    backward = engine.backward

    def noting(loss):
        backward(loss * (math.nan if len(steps) == 3 else 1.0))
        gradients = [parameter.grad.untyped_storage() for parameter in engine.model.parameters()]
        steps[-1] |= {storage.data_ptr(): storage.nbytes() for storage in gradients}

    engine.backward = noting
    for step, count in enumerate(micro_batches):
        steps.append({})
        train_step(engine, window_of(engine, step, 4 // count), 1e-3)
    weights = sum(parameter.nbytes for parameter in engine.model.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in engine.model.parameters())
    engine.close()
    return steps, weights


def test_ddp_holds_one_copy_of_the_gradient_whatever_the_accumulation():
    """It was two: sums over micro-batches outside of the buckets, and the buckets."""
    for steps, weights in run_ranks(2, storages_of_gradients, [1, 4, 2, 4, 1, 2]):
        for step in steps:
            assert sum(step.values()) == weights
            assert step == steps[0]  # the memory of the buckets


def bf16_copies_kept(compute: EngineConfig) -> float:
    """Bytes of the bf16 copies of weights that ddp keeps from the forward to the backward pass, per parameter of a block's
    matrices."""
    engine = make_engine(compute, "adamw")
    shapes = {parameter.shape for parameter in engine.model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    kept: dict[int, int] = {}

    def pack(tensor):
        if tensor.dtype == torch.bfloat16 and tensor.shape in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.forward(*window_of(engine, 0, 8)[0].inputs)
    return sum(kept.values()) / sum(
        parameter.numel() for parameter in engine.model.model.layers.parameters() if parameter.ndim == 2
    )


def test_what_ddp_keeps_of_its_weights_in_bf16_is_documented():
    """In docs/engines.md: 2 bytes per parameter of a block's matrices; embedding and head keep none."""
    assert bf16_copies_kept(EngineConfig(precision="fp32")) == 0
    assert bf16_copies_kept(EngineConfig(precision="bf16")) == 2
    assert bf16_copies_kept(EngineConfig(precision="bf16", activation_checkpointing="full")) == 0


def test_numbers_go_to_a_gpu_from_pinned_memory_and_the_host_does_not_wait(monkeypatch):
    engine = make_engine(EngineConfig(), "adamw")
    asked, make, cuda, batch = [], torch.tensor, torch.device("cuda", 0), window_of(engine, 0, 8)[0]
    monkeypatch.setattr(
        torch, "tensor", lambda *args, pin_memory, **options: (asked.append(pin_memory), make(*args, **options))[1]
    )
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **options: (asked.append((args, options)), tensor)[1])
    engine.device = cuda
    assert engine.upload([1, 2]).tolist() == [1, 2]
    assert asked == [True, ((cuda,), {"non_blocking": True})]
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (pinned.append(tensor), tensor)[1])
    assert engine.pin(batch) == batch and len(pinned) == 3
    engine.device = torch.device("cpu")
    engine.pin(batch)
    assert len(pinned) == 3


def test_the_allocator_grows_its_segments_unless_the_environment_configures_it(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setattr(os, "environ", {name: "max_split_size_mb:512"})
        _prefer_expandable_segments()
        assert os.environ == {name: "max_split_size_mb:512"}
    monkeypatch.setattr(os, "environ", {})
    _prefer_expandable_segments()
    assert os.environ == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.skipif(not hasattr(torch._C, "_accelerator_getAllocatorSettings"), reason="this torch cannot be asked")
def test_torch_reads_the_settings_of_the_allocator_after_its_import():
    code = "import torch; from pretrain.engines.base import _prefer_expandable_segments as prefer; prefer()\n"
    code += "print(torch._C._accelerator_getAllocatorSettings())"
    clean = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "expandable_segments:True"


def test_initial_weights_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    drawn = []
    for cores in (1, 7):
        monkeypatch.setattr(base, "_cores", lambda place, cores=cores: cores)
        drawn.append(make_engine(EngineConfig(), "adamw").model.state_dict())
    assert drawn[0].keys() == drawn[1].keys() and all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


class Gathers(TorchDispatchMode):
    """Notes in `order` when weights are gathered."""

    def __init__(self, order: list[str]):
        super().__init__()
        self.order = order

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "allgather" in function.name():
            self.order.append("gather")
        return function(*args, **(kwargs or {}))


def gathers_of_a_pass() -> tuple[list[str], int]:
    """Under fsdp2 with four blocks: "gather" and "block" in the order in which a forward pass queues them, and the largest
    number of blocks that are gathered when one begins."""
    engine, order, gathered = start_engine(EngineConfig(name="fsdp2")), [], []
    deep = dataclasses.replace(MODEL, num_hidden_layers=4)
    engine.prepare(lambda: Transformer(deep), lambda model: make_optimizer(model, "adamw"), 1.0, seed=0)
    blocks = list(engine.model.model.layers)

    def begin(*_) -> None:
        order.append("block")
        gathered.append(sum(not isinstance(block.self_attn.q_proj.weight, DTensor) for block in blocks))

    for block in blocks:
        block.input_layernorm.register_forward_pre_hook(begin)
    with Gathers(order):
        engine.forward(*window_of(engine, 0, 4)[0].inputs)
    engine.close()
    return order, max(gathered)


def test_fsdp2_gathers_the_next_block_before_it_computes_this_one_and_holds_two_at_most():
    for order, gathered in run_ranks(2, gathers_of_a_pass):
        first = order.index("block")
        assert order[first - 2 :] == ["gather", "gather", "block", "gather", "block", "gather", "block", "block", "gather"]
        assert gathered <= 2
