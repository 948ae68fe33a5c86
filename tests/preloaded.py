"""Imported once by the fork server of each test process, so that ranks begin with all of it (see tests/ranks.py).

Measured for two ranks of a tiny run: 2.4 s of CPU time when only torch and the trainer are preloaded, 1.4 s with the rest and a
frozen heap. Frozen objects are skipped by the ranks' garbage collectors, which would otherwise copy the pages that they share.
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
