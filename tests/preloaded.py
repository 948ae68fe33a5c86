"""Imported once by the fork server of each test process, so that ranks start with these modules loaded (see tests/ranks.py).

Measured for two ranks of a tiny run: 2.4 s of CPU time when only torch and the trainer are preloaded, 1.4 s with the rest and a
frozen heap; with an engine of DeepSpeed, 2.6 s instead of 5.3 s with DeepSpeed and transformers. The ranks' garbage collectors
skip frozen objects; otherwise they would copy the memory pages that they share.
"""

import gc
import os

import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # as `pretrain.engines.zero` does

import accelerate
import deepspeed
import matplotlib.backends.backend_agg
import matplotlib.figure
import pytest
import torch._dynamo  # every optimizer imports it
import torch.distributed.tensor
import transformers

import pretrain.train

gc.freeze()
__all__ = ["accelerate", "deepspeed", "matplotlib", "pretrain", "pytest", "torch", "transformers"]
