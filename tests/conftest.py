"""What every test needs: one thread per rank, no window, and a reason where a GPU is missing."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

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


@pytest.fixture(autouse=True)
def logging_of_one_test() -> Iterator[None]:
    """Undo what a command that a test calls in this process has decided about logging."""
    loggers = [logging.getLogger(name) for name in ("vssl_dist", "py.warnings")]
    before = [(logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers
    logging.captureWarnings(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
