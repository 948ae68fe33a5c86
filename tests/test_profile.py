"""A profile names what the steps spent their time on, and changes neither their numbers nor the other steps."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from pretrain import train
from pretrain.config import ConfigError, load
from pretrain.report.profile import SHOWN, StepProfile, kind_of, summary
from tests.models import train_here
from tests.ranks import run_ranks
from tests.test_train import TINY, curve


@pytest.fixture
def settings(tmp_path) -> list[str]:
    (tmp_path / "tiny.yaml").write_text(TINY)
    return ["--config", str(tmp_path / "tiny.yaml"), "--run.directory", str(tmp_path), "--train.max_steps", "8"]


def files(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("profile/*"))


def test_only_the_named_steps_are_profiled_and_no_number_changes(settings, tmp_path, monkeypatch, capfd):
    true_step, watched = train.train_step, []

    def step(*args):
        watched.append(torch.autograd._profiler_enabled())
        return true_step(*args)

    monkeypatch.setattr(train, "train_step", step)
    assert train_here([*settings, "--run.name", "plain"]) == 0 and watched == 8 * [False]
    watched.clear()
    assert train_here([*settings, "--run.name", "seen", "--log.profile_steps", "[3, 5]"]) == 0
    assert watched == [False, False, True, True, True, False, False, False]
    assert curve(tmp_path / "seen") == curve(tmp_path / "plain")
    assert files(tmp_path / "plain") == [] and files(tmp_path / "seen") == ["steps_3_5.json", "steps_3_5.txt"]
    events = json.loads((tmp_path / "seen" / "profile" / "steps_3_5.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::_fused_adamw_" for event in events) >= 3  # one per step and parameter group
    head, _, *rows = (tmp_path / "seen" / "profile" / "steps_3_5.txt").read_text().splitlines()
    shares = [float(part.split()[-1].rstrip("%")) for part in head.split(": ")[1].split(", ")]
    assert len(shares) == 4 and sum(shares) == pytest.approx(100, abs=0.3) and len(rows) == SHOWN
    costs = [float(row.split()[1]) for row in rows]
    assert costs == sorted(costs, reverse=True) and costs[0] > 0
    printed = capfd.readouterr().out
    assert all(row.split()[-1] in printed for row in rows)


def test_a_run_that_ends_or_resumes_within_the_steps_writes_what_it_made(settings, tmp_path):
    flags = [*settings, "--log.profile_steps", "[7, 10]"]
    assert train_here(flags) == 0
    assert files(tmp_path / "tiny") == ["steps_7_8.json", "steps_7_8.txt"]
    more = [*flags, "--train.max_steps", "11", "--checkpoint.allow_changes", "[train.max_steps]"]
    assert train_here(more) == 0
    assert files(tmp_path / "tiny") == ["steps_7_8.json", "steps_7_8.txt", "steps_9_10.json", "steps_9_10.txt"]


def test_rank_0_alone_writes_a_profile_and_names_the_collectives(settings, tmp_path):
    assert run_ranks(2, train_here, [*settings, "--log.profile_steps", "[2, 2]"]) == [0, 0]
    assert files(tmp_path / "tiny") == ["steps_2_2.json", "steps_2_2.txt"]
    head = (tmp_path / "tiny" / "profile" / "steps_2_2.txt").read_text().splitlines()[0]
    assert float(head.split("collectives ")[1].split("%")[0]) > 0


@pytest.mark.parametrize("steps", ["[5, 4]", "[0, 3]", "[1, 21]", "[3]", "7", "[a, b]"])
def test_steps_out_of_bounds_are_refused(settings, steps):
    with pytest.raises(ConfigError) as error:
        load([*settings, "--log.profile_steps", steps])
    assert {problem.key.split("[")[0] for problem in error.value.problems} == {"log.profile_steps"}


def test_a_folder_that_cannot_be_written_is_reported_and_ends_nothing(tmp_path):
    (tmp_path / "profile").write_text("a file")
    said = []
    profile = StepProfile(tmp_path / "profile", (2, 3), torch.device("cpu"), 0, said.append)
    profile.begin(2)
    profile.end(2)
    profile.close()
    profile.close()
    assert len(said) == 1 and "steps 2 to 2" in said[0] and not torch.autograd._profiler_enabled()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", "products"),
        ("aten::addmm", "products"),
        ("aten::_scaled_mm", "products"),
        ("aten::_grouped_mm", "products"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_NTT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", "attention"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "collectives"),
        ("gloo:all_reduce", "collectives"),
        ("c10d::_allgather_base_", "collectives"),
        ("aten::_fused_adamw_", "other"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "other"),
        ("aten::mul", "other"),
        ("aten::max_pool2d", "other"),
    ],
)
def test_the_kind_of_an_operator_follows_from_its_name(name, kind):
    assert kind_of(name) == kind


def test_on_a_gpu_kernels_count_once_by_device_time():
    def event(key: str, cpu: float, device: float, kind: DeviceType, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            key=key,
            self_cpu_time_total=cpu,
            self_device_time_total=device,
            count=4,
            device_type=kind,
            is_user_annotation=annotation,
        )

    events = [
        event("aten::mm", 9e6, 3000.0, DeviceType.CPU),
        event("nvjet_tst_128", 0, 3000.0, DeviceType.CUDA),
        event("triton_poi_fused_0", 0, 1000.0, DeviceType.CUDA),
        event("Optimizer.step#AdamW.step", 0, 4000.0, DeviceType.CUDA, annotation=True),
    ]
    head, _, first, second = summary(events, steps=2)
    assert "2.00 ms per step" in head and "products 75.0%" in head and "other 25.0%" in head
    assert first.split() == ["75.0%", "1.500", "2.0", "nvjet_tst_128"] and second.endswith("triton_poi_fused_0")
