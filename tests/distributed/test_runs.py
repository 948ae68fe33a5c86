"""Complete runs under sequence, tensor and expert parallelism log what one process logs, count each token and each FLOP once,
and resume to the bit."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import train
from pretrain.checkpoint.manifest import checkpoints
from pretrain.config import EngineConfig, ParallelConfig
from pretrain.data.batches import open_train
from pretrain.engines.start import start_engine
from pretrain.evaluate import score
from pretrain.interop.load import open_run
from pretrain.model.flops import flops_per_token
from tests.models import make_tokenizer, train_here, write_token_file
from tests.ranks import run_ranks
from tests.test_divergence import ROLLBACK, train_poisoned
from tests.test_train import curve, final_bytes, records, run_of, signal_itself_at

pytestmark = pytest.mark.timeout(600)

LENGTH, SIZE, LAST_STEP = 16, 8, 8
SETTINGS = f"""
run: {{name: tiny}}
model:
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 4
  num_key_value_heads: 2
  qk_norm: true
  reset_positions: true
  vocab_multiple: 16
  moe: {{num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 32, num_shared_experts: 1}}
data: {{sequence_length: {LENGTH}, document_mask: true}}
batch: {{global_batch_size: {SIZE}, micro_batch_size: 4}}
engine: {{precision: fp32, keep_whole_below: 100}}
optimizer: {{lr: 3e-3}}
train: {{max_steps: {LAST_STEP}}}
evaluate: {{every_steps: 4, max_batches: 2, sample_prompts: ["the three", "return"], sample_tokens: 6}}
checkpoint: {{every_steps: 3}}
log: {{every_steps: 1, sinks: [console, jsonl], peak_tflops: 1.0}}
"""
TIMES = {"tokens_per_second", "data_seconds", "peak_memory_gib", "eta_seconds", "goodput", "train_hours", "mfu", "mfu_causal"}
OF_SEVERAL_RANKS = {"forward_seconds", "forward_seconds_max", "forward_seconds_max_rank", "data_seconds_max"}
SAMPLED = {"update_fraction"}  # over a sample of the weights of each rank


@dataclasses.dataclass(frozen=True)
class Case:
    """An engine on some ranks, with its kinds of parallelism."""

    name: str
    ranks: int
    parallel: ParallelConfig

    def flags(self, settings: list[str], folder: str) -> list[str]:
        """Flags of the run `folder`/tiny below the run directory of `settings`."""
        degrees = dataclasses.asdict(self.parallel).items()
        kinds = [word for kind, degree in degrees for word in (f"--engine.parallel.{kind}", str(degree))]
        return ["--engine.name", self.name, *kinds, *settings[:-1], f"{settings[-1]}/{folder}"]

    def __str__(self) -> str:
        degrees = dataclasses.asdict(self.parallel).items()
        return "-".join([self.name, str(self.ranks), *(f"{kind}{degree}" for kind, degree in degrees if degree > 1)])


ALONE = Case("ddp", 1, ParallelConfig())
FEW = [
    Case("ddp", 2, ParallelConfig(sequence=2)),
    Case("fsdp2", 2, ParallelConfig(tensor=2)),
    Case("ddp", 2, ParallelConfig(expert=2)),
]
MANY = [
    Case("zero3", 2, ParallelConfig(sequence=2)),
    Case("fsdp2", 4, ParallelConfig(tensor=2, sequence=2)),
    Case("ddp", 4, ParallelConfig(tensor=2, expert=4)),
    Case("fsdp2", 4, ParallelConfig(sequence=2, expert=2)),
]


def cases(fast: list[Case], slow: list[Case]) -> list:
    return [pytest.param(case, id=str(case), marks=[pytest.mark.slow] * (case in slow)) for case in fast + slow]


CASES = cases(FEW, MANY)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """Flags of a run on text, without those of its engine; the last one is the folder of its run directory."""
    folder = tmp_path_factory.mktemp("runs")
    words = ["the", "three", "return", "quick", "brown", "area", "radius", "0.5", "=", "+\n"]
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(words, size)) for size in random.integers(3, 40, 150)]
    tokenizer = make_tokenizer(folder / "tokenizer")
    write_token_file(tokenizer, texts[30:], folder / "train")
    write_token_file(tokenizer, texts[:30], folder / "valid")
    (folder / "settings.yaml").write_text(SETTINGS)
    data = {name: f"[{{path: {folder / name}}}]" for name in ("train", "valid")}
    flags = ["--config", str(folder / "settings.yaml"), "--tokenizer.path", str(tokenizer)]
    return [*flags, "--data.train", data["train"], "--data.valid", data["valid"], "--run.directory", str(folder / "runs")]


@pytest.fixture(scope="module")
def run_once(settings) -> Callable[[Case], tuple[Path, list[float]]]:
    """case -> (its uninterrupted run, FLOPs of each step summed over its ranks). Each case is trained once."""
    runs = {}

    def run(case: Case) -> tuple[Path, list[float]]:
        if case not in runs:
            argv = case.flags(settings, f"straight_{case}")
            ranks = run_ranks(case.ranks, train_and_count, argv)
            assert [status for status, _ in ranks] == [0] * case.ranks
            runs[case] = run_of(argv), [sum(step) for step in zip(*(f for _, f in ranks), strict=True)]
        return runs[case]

    return run


# ---------------------------------------------------------------- FLOPs


class Flops(TorchDispatchMode):
    """Counts the FLOPs of matrix products by their shapes, as PyTorch runs them; recomputation in attention does not count."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split(".")[0]
        shapes = [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]
        if name == "aten::mm" and shapes[0][0] > 1:  # one row: sums over tokens, which norms write as a product
            self.count += 2 * math.prod(shapes[0]) * shapes[1][-1]
        elif name in ("aten::addmm", "aten::addmm_"):
            self.count += 2 * math.prod(shapes[1]) * shapes[2][-1]
        elif name == "pretrain::router_logits":  # (N, D), (E, D)
            self.count += 2 * math.prod(shapes[0]) * shapes[1][0]
        elif name == "pretrain::looped_product":  # (P, D), (E, F, D)
            self.count += 2 * math.prod(shapes[0]) * shapes[1][1]
        elif name in ("pretrain::router_logits_backward", "pretrain::looped_product_backward"):
            self.count += 4 * math.prod(shapes[0]) * shapes[1][-1]  # the gradient (P, F) comes first
        elif name.startswith("pretrain::masked_attention"):  # the query is (B, T, H, C); forward 2 products, backward 4
            query = shapes[name.endswith("_backward")]
            self.count += 4 * math.prod(query) * query[1] * (2 if name.endswith("_backward") else 1)
        return function(*args, **(kwargs or {}))


def train_and_count(argv: list[str]) -> tuple[int, list[int]]:
    """Trains. -> (exit status, FLOPs of this rank in each step)."""
    counted, step = [], train.train_step

    def counting_step(*args):
        with Flops() as flops:
            result = step(*args)
        counted.append(flops.count)
        return result

    train.train_step = counting_step
    return train_here(argv), counted


# ---------------------------------------------------------------- claims


def assert_equal_records(found: list[dict], expected: list[dict]) -> None:
    """All that runs log after step 0, but times and what is sampled; floats to 1e-5, everything else exactly."""
    for record, other in zip(found[1:], expected[1:], strict=True):
        assert record.keys() - OF_SEVERAL_RANKS == other.keys() - OF_SEVERAL_RANKS
        for key in other.keys() - TIMES - SAMPLED - OF_SEVERAL_RANKS:
            if key.startswith(("time/", "planned_", "measured_")):  # shares of the time; memory of this number of ranks
                continue
            assert record[key] == (pytest.approx(other[key], rel=1e-5) if isinstance(other[key], float) else other[key]), key


def losses_for_spikes(run: Path) -> tuple[list[float], float]:
    """What the newest checkpoint holds: the losses of all steps but the last, and that of the last, which is not judged yet."""
    state = checkpoints(run / "checkpoints")[0].state()
    return state["spikes"]["accepted"], state["meter"]["last_loss"]


@pytest.mark.parametrize("case", cases(FEW[:1], FEW[1:] + MANY))
def test_a_run_logs_what_one_process_logs(run_once, case):
    """Losses, norms, routing, tokens, validations, and texts; and the same losses enter the search for spikes."""
    (run, _), (alone, _) = run_once(case), run_once(ALONE)
    found, expected = records(run), records(alone)
    assert len(found) == 1 + LAST_STEP + 2 * (LAST_STEP // 4) and sum("generated" in record for record in found) == 2
    assert_equal_records(found, expected)
    (losses, last), (others, other_last) = map(losses_for_spikes, (run, alone))
    assert [*losses, last] == pytest.approx([*others, other_last], rel=1e-5) and len(losses) == LAST_STEP - 1


@pytest.mark.parametrize("case", CASES)
def test_throughput_and_mfu_count_each_token_and_flop_once(run_once, case):
    """FLOPs: those that PyTorch ran on all ranks, for the arithmetic of `flops_per_token`; and for `mfu`, less those of pairs
    of tokens that no document has in common, which the operator's shapes do not tell."""
    run, counted = run_once(case)
    lines, hours, total_hidden = [record for record in records(run) if "mfu" in record], 0.0, 0
    trained = open_run(run)
    model, data = trained.model, trained.config.data
    stream = open_train(data, seed=trained.config.run.seed, vocab_size=model.vocab_size, tokenizer_fingerprint=None)
    per_pair = 12 * model.num_hidden_layers * model.num_attention_heads * model.head_dim
    for step, (line, flops) in enumerate(zip(lines, counted, strict=True)):
        documents_BT = stream.take(step * SIZE, SIZE).documents_BT
        same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
        hidden, shown = (~same_BTT).sum().item(), same_BTT.sum().item()
        total_hidden += hidden
        seconds, hours = 3600 * (line["train_hours"] - hours), line["train_hours"]
        assert line["tokens_per_second"] * seconds == pytest.approx(SIZE * LENGTH, rel=1e-6)
        assert flops == flops_per_token(model, LENGTH) * SIZE * LENGTH
        unit = case.ranks * 1e12 * seconds
        assert line["mfu"] * unit == pytest.approx(flops - per_pair * hidden, rel=1e-5)
        assert (line["mfu"] - line["mfu_causal"]) * unit == pytest.approx(per_pair * shown / 2, rel=1e-3)
    assert lines[-1]["tokens"] == LAST_STEP * SIZE * LENGTH and total_hidden > 0


@pytest.mark.parametrize("case", cases(FEW[1:2], FEW[:1] + FEW[2:] + MANY))
def test_a_stopped_run_resumes_to_the_bit(run_once, settings, case):
    argv = case.flags(settings, f"stopped_{case}")
    assert run_ranks(case.ranks, signal_itself_at, argv, case.ranks - 1, 4, signal.SIGTERM) == [75] * case.ranks
    assert run_ranks(case.ranks, train_here, argv) == [0] * case.ranks
    stopped, (straight, _) = run_of(argv), run_once(case)
    assert curve(stopped) == curve(straight)
    assert final_bytes(stopped) == final_bytes(straight)


def measure(run: Path, config: EngineConfig) -> float:
    """The loss of a run on its own validation data, as launch/evaluate.py measures it."""
    trained, engine = open_run(run), start_engine(config)
    rows = score(engine, trained, trained.config.data, 3, max_samples=2 * SIZE)
    engine.close()
    return rows[-1]["loss"]


@pytest.mark.parametrize("case", CASES)
def test_a_model_trained_under_a_kind_has_its_last_validation_loss_in_one_process_and_under_that_kind(run_once, case):
    run, _ = run_once(case)
    [expected] = [r["val_loss"] for r in records(run) if "val_loss" in r and r["step"] == LAST_STEP]
    config = EngineConfig(name=case.name, parallel=case.parallel, keep_whole_below=100)
    for loss in (measure(run, EngineConfig()), *run_ranks(case.ranks, measure, run, config)):
        assert loss == pytest.approx(expected, rel=1e-6)


def train_with_a_bad_rank(argv: list[str]) -> int:
    """Trains; the loss of the last rank is NaN on the samples of steps 5 to 7."""
    last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
    return train_poisoned(argv, 5, 7, math.nan if last else 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case("ddp", 2, ParallelConfig(tensor=2)), FEW[0]], ids=str)
def test_a_run_that_diverges_on_one_rank_rolls_back_and_skips_samples_as_one_process_does(settings, case):
    found = []
    for each in (case, ALONE):
        argv = each.flags([*ROLLBACK, *settings], f"rolled_back_{case}_{each}")
        assert run_ranks(each.ranks, train_with_a_bad_rank, argv) == [0] * each.ranks
        found.append(records(run_of(argv)))
    assert_equal_records(*found)
    assert [record["skipped_positions"] for record in found[0] if "skipped_positions" in record] == [[4 * SIZE, 7 * SIZE]]
