"""Limits every test process to one thread: processes share the cores, and sums are then added in a fixed order."""

import gc
import os
import tracemalloc
from pathlib import Path

import psutil
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and psutil.virtual_memory().available > 8 * 2**30:
    _disk = os.statvfs(MEMORY)
    if _disk.f_bavail * _disk.f_frsize > 8 * 2**30 and not _disk.f_flag & os.ST_NOEXEC:
        # A tiny run waits 67 times for its disk, 0.3 s in all. Folders of tests that passed are removed (pyproject.toml).
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


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
