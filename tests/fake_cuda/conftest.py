"""These tests run alone, under `make test-fake-cuda`: they need the CUDA build of torch and a stand-in for the driver."""

import os

if os.environ.get("FAKE_CUDA"):
    from tests.fake_cuda import fake_gpu

    fake_gpu.install()
else:
    collect_ignore_glob = ["test_*.py"]
