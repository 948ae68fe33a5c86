"""Devices are found by the names of their drivers, and only those in the table have rates."""

from __future__ import annotations

import pytest

from pretrain import devices


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("AMD Instinct MI300X", 1307),
        ("AMD Instinct MI355X", 2516),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA GB300", 2500),
        ("NVIDIA H20", 148),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 438.9),
        # Not in the table: an unknown peak is better than a wrong one.
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA GeForce RTX 2080 Ti", None),
        ("Tesla T4", None),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", None),
        ("Quadro RTX 6000", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_only_a_device_in_the_table_has_a_peak_rate(name, expected):
    device = devices.find(name)
    assert (device and device.bf16_tflops) == expected


@pytest.mark.parametrize(
    ("name", "memory_gib"),
    [
        ("h100", 80),
        ("H200", 141),
        ("a100", 80),
        ("a100-40gb", 40),
        ("NVIDIA A100-SXM4-40GB", 40),
        ("NVIDIA A100-PCIE-40GB", 40),
    ],
)
def test_short_names_and_sizes_of_memory_are_told_apart(name, memory_gib):
    assert devices.find(name).memory_gib == memory_gib


def test_every_listed_name_finds_its_own_row():
    assert len(set(devices.names())) == len(devices.names())
    for name in devices.names():
        assert devices.find(name).name.lower().replace(" ", "-") == name


def test_rates_have_the_right_order_of_magnitude():
    for name in devices.names():
        device = devices.find(name)
        assert 50 <= device.bf16_tflops <= 3000 and 30 <= device.link_gb_per_second <= 1000, name
        assert device.fp8_tflops is None or device.fp8_tflops / device.bf16_tflops == pytest.approx(2, rel=0.03), name
        assert 20 < device.bf16_tflops * 1e3 / device.memory_gb_per_second < 500, name  # FLOPs per byte
