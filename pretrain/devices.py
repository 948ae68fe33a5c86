"""GPUs by their data sheets: peak rates, memory and links. It imports nothing of the project and no torch.

A data sheet's rate is never reached: `benchmarks/gpu.py` measures what a card does. MFU divides by `bf16_tflops`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One GPU. Rates are dense (half of what a data sheet gives "with sparsity"), with fp32 accumulation."""

    name: str
    bf16_tflops: float
    fp8_tflops: float | None
    """None: no fp8 products in hardware."""
    memory_gib: float
    """Nominal; driver and error correction keep one or two GiB of it."""
    memory_gb_per_second: float
    link_gb_per_second: float
    """To the other GPUs of a node, in one direction: half of the total that a data sheet gives for NVLink, or PCIe."""


# Sources: the vendors' data sheets and architecture white papers. NVIDIA: H100, H200 (and NVL), GH200, A100 (80, 40 GB), A40,
# A30, A10, L40S, L40, L4, RTX 6000 Ada, RTX A6000; HGX B200 and B300, GB200 and GB300 NVL72 (divided by their GPUs); "Ada",
# "RTX Blackwell" and "RTX PRO Blackwell" white papers for the RTX cards. H800, A800, H20: NVIDIA's product briefs for China.
# AWS for the A10G. AMD: data sheets of Instinct MI300X, MI325X, MI350X and MI355X.
_SHEETS = (
    #        words of the name  bf16    fp8    GiB   GB/s   link
    Device("B300", 2250.0, 4500.0, 288, 8000, 900),
    Device("GB300", 2500.0, 5000.0, 288, 8000, 900),
    Device("B200", 2250.0, 4500.0, 180, 8000, 900),
    Device("GB200", 2500.0, 5000.0, 186, 8000, 900),
    Device("H200", 989.0, 1979.0, 141, 4800, 450),
    Device("H200 NVL", 835.0, 1671.0, 141, 4800, 450),
    Device("GH200", 989.0, 1979.0, 96, 4000, 450),
    Device("H100", 989.0, 1979.0, 80, 3350, 450),
    Device("H100 PCIE", 756.0, 1513.0, 80, 2000, 64),
    Device("H100 NVL", 835.0, 1671.0, 94, 3900, 300),
    Device("H800", 989.0, 1979.0, 80, 3350, 200),
    Device("H800 PCIE", 756.0, 1513.0, 80, 2000, 64),
    Device("H20", 148.0, 296.0, 96, 4000, 450),
    Device("A100", 312.0, None, 80, 2039, 300),
    Device("A100 40GB", 312.0, None, 40, 1555, 300),
    Device("A800", 312.0, None, 80, 2039, 200),
    Device("A40", 149.7, None, 48, 696, 32),
    Device("A30", 165.0, None, 24, 933, 32),
    Device("A10", 125.0, None, 24, 600, 32),
    Device("A10G", 70.0, None, 24, 600, 32),
    Device("L40S", 362.0, 733.0, 48, 864, 32),
    Device("L40", 181.0, 362.0, 48, 864, 32),
    Device("L4", 121.0, 242.0, 24, 300, 32),
    Device("RTX PRO 6000", 503.8, 1007.6, 96, 1792, 64),  # Workstation Edition; no sheet gives this for the Server Edition
    Device("RTX PRO 6000 MAX", 438.9, 877.8, 96, 1792, 64),  # Max-Q: 3511 sparse fp4 TOPS / 8
    Device("RTX A6000", 154.8, None, 48, 768, 32),
    Device("RTX 6000 ADA", 364.2, 728.5, 48, 960, 32),
    Device("RTX 5090", 209.5, 419.0, 32, 1792, 64),
    Device("RTX 4090", 165.2, 330.3, 24, 1008, 32),
    Device("RTX 4080", 97.5, 194.9, 16, 717, 32),
    Device("RTX 3090", 71.0, None, 24, 936, 32),
    Device("RTX 3090 TI", 80.0, None, 24, 1008, 32),
    Device("RTX 3080", 59.5, None, 10, 760, 32),
    Device("MI300X", 1307.0, 2615.0, 192, 5300, 448),
    Device("MI325X", 1307.0, 2615.0, 256, 6000, 448),
    Device("MI350X", 2307.0, 4614.0, 288, 8000, 538),
    Device("MI355X", 2516.0, 5033.0, 288, 8000, 538),
)
# Words that name another device: a device name with one of them matches only rows that have it too.
_VARIANTS = frozenset({"TI", "SUPER", "D", "LAPTOP", "MAX", "MOBILE", "MIG", "PCIE", "NVL", "SERVER"})
_SAME_OVER_PCIE = frozenset({"A100", "A800", "A40", "A30", "A10", "L4", "L40", "L40S"})


def find(name: str) -> Device | None:
    """Returns the device of that name: as its driver reports it (`NVIDIA H100 80GB HBM3`), or short (`h100`, `a100-40gb`).

    All words of a row must be in the name, and the row with the most words wins. None: not in the table, and so without MFU;
    an unknown rate is better than a wrong one.
    """
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    variants = words & _VARIANTS
    if words & _SAME_OVER_PCIE:
        variants -= {"PCIE"}
    matches = [row for row in _SHEETS if words.issuperset(row.name.split()) and variants <= set(row.name.split())]
    return max(matches, key=lambda row: len(row.name), default=None)


def names() -> list[str]:
    """The names that `find` knows, in lower case and as one word each."""
    return [row.name.lower().replace(" ", "-") for row in _SHEETS]
