"""One thread in every test process: two test processes share two cores, and sums are then made in one order."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
