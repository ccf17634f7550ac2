"""Whoever waits for storage gets its answer, its error, or leaves."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.support.photos import tiny_dataset
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.data.store.opening import open_watched, run_with_timeout
from vssl_dist.data.store.stall import StallWatch
from vssl_dist.errors import DataError


def test_what_the_work_returns_or_raises_is_what_one_gets() -> None:
    watch = StallWatch()
    assert run_with_timeout(watch, lambda: 7, timeout_s=1, who="a test") == 7
    with pytest.raises(DataError, match="shard 5"):
        run_with_timeout(watch, lambda: refuse("shard 5"), timeout_s=1, who="a test")


def refuse(reason: str) -> None:
    raise DataError(reason)


def test_a_dataset_is_looked_through_while_it_is_opened(tmp_path: Path) -> None:
    folder = tiny_dataset(tmp_path, samples=20, shard_size=8)
    samples_seen: list[int] = []

    def look(dataset: Dataset) -> None:
        samples_seen.append(dataset.samples)

    opened = open_watched(folder, timeout_s=5, who="a test", share=slice(None), check=look)
    assert (opened.samples, samples_seen) == (20, [20])
    shards = sorted(folder.glob("*.tar"))
    shards[0].write_bytes(bytes(shards[0].stat().st_size))
    assert open_watched(folder, timeout_s=5, who="a test").samples == 20
    with pytest.raises(DataError, match=r"shard-000000\.tar"):
        open_watched(folder, timeout_s=5, who="a test", share=slice(None))


def test_after_ctrl_c_nobody_waits_for_storage() -> None:
    freed = threading.Event()
    interrupt = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_with_timeout(StallWatch(), lambda: freed.wait(60), timeout_s=100, who="a test")
    assert time.monotonic() - begun < 10
    freed.set()
