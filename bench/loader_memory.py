"""What memory a loader takes, and whether one that runs for long keeps to it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil

from bench.loader_ours import ours, run_config
from bench.shard import write_cifar
from data_prep.sharding.dataset import BuildOptions, build_dataset
from data_prep.sources import SOURCES
from data_prep.sources.base import SourceRequest

MARKS = 10
"""Stretches of a long run."""


def resident(batches: Iterator[Any], count: int) -> list[tuple[int, float]]:
    """MiB of this process after each of `MARKS` equal stretches of ``count`` batches.

    The stretch before the first mark, in which buffers grow to their size, is run but not told.
    """
    process, each = psutil.Process(), count // MARKS
    found: list[tuple[int, float]] = []
    for done in range(each, count + 1, each):
        for _ in range(each):
            next(batches)
        gc.collect()
        found.append((done, process.memory_info().rss / 2**20))
    return found


def slope(found: list[tuple[int, float]]) -> float:
    """Bytes per batch by which the memory grows: the straight line of least squares.

    >>> slope([(0, 100.0), (1024, 101.0), (2048, 102.0)])
    1024.0
    """
    middle = sum(at for at, _ in found) / len(found)
    rise = sum((at - middle) * mib for at, mib in found)
    return rise * 2**20 / sum((at - middle) ** 2 for at, _ in found)


def family() -> float:
    """MiB of this process and all its children, what they share counted once."""
    here = psutil.Process()
    everybody = [here, *here.children(recursive=True)]
    return float(sum(process.memory_full_info().pss for process in everybody) / 2**20)


def long_run(scratch: Path, batches: int) -> None:
    """Print what so many small batches of this project's loader do to the memory of a process."""
    write_cifar(scratch / "small", 2000)
    splits = SOURCES["cifar10"].read(
        SourceRequest(scratch / "small", ("train",), has_named_splits=True)
    )
    options = BuildOptions(shard_size=250)
    build_dataset(splits, scratch / "shards32", options, lambda *_: nullcontext(lambda done: None))
    cfg = run_config(scratch / "shards32" / "train", batch=8, cores=1, side=32)
    found = resident(ours(cfg), batches)
    print("\n| batches of 8 CIFAR-sized images | MiB resident |\n|---|---|")
    for done, mib in found:
        print(f"| {done:,} | {mib:,.1f} |")
    kept = found[len(found) // 2 :]
    print(f"\nThe second half grows by {slope(kept):,.0f} bytes per batch.")
