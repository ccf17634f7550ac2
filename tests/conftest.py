"""What every test needs: one thread per rank, no window, and a reason where a GPU is missing."""

from __future__ import annotations

import os
import signal

import pytest

from vssl_dist.environment import outside_jobs

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
for theirs in os.environ.keys() - outside_jobs(os.environ).keys():
    del os.environ[theirs]  # the tests may be started inside salloc, torchrun or a notebook
os.environ["MPLBACKEND"] = "Agg"


def pytest_configure() -> None:
    # A shell starts its background jobs deaf to Ctrl-C, and their children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
