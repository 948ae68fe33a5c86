"""Limits every test process to one thread: processes share the cores, and sums are then added in a fixed order."""

import gc
import os
import tracemalloc
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Flags of a run of 20 steps that takes a second; the last one is the folder of its run directory."""
    from tests.test_train import TINY

    (tmp_path / "tiny.yaml").write_text(TINY)
    return ["--config", str(tmp_path / "tiny.yaml"), "--run.directory", str(tmp_path / "runs")]


@pytest.fixture(autouse=True)
def no_tracing():
    """A test that leaves memory tracing on would slow all later tests of its process, up to 25 times."""
    yield
    if tracemalloc.is_tracing():
        tracemalloc.stop()
        pytest.fail("tracemalloc still traces after this test")


def pytest_collection_finish() -> None:
    """What the tests import lives as long as the process: no garbage collection need look at it again."""
    gc.collect()
    gc.freeze()
