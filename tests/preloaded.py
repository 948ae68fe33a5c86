"""Imported once by the fork server of each test process, so that ranks start with these modules loaded (see tests/ranks.py).

Measured for two ranks of a tiny run: 2.4 s of CPU time when only torch and the trainer are preloaded, 1.4 s with the rest and a
frozen heap. The ranks' garbage collectors skip frozen objects; otherwise they would copy the memory pages that they share.
"""

import gc

import accelerate
import matplotlib.backends.backend_agg
import matplotlib.figure
import pytest
import torch
import torch._dynamo  # every optimizer imports it
import torch.distributed.tensor

import pretrain.train

gc.freeze()
__all__ = ["accelerate", "matplotlib", "pretrain", "pytest", "torch"]
