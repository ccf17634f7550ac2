"""What memory a loader takes, and whether one that runs for long keeps to it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil

from bench.loader_ours import our_batches, run_config
from bench.shard import write_cifar
from data_prep.sharding.dataset import BuildOptions, build_dataset
from data_prep.sources import SOURCES
from data_prep.sources.base import SourceRequest

NUM_MARKS = 10
"""Stretches of a long run."""


def mib_at_marks(batches: Iterator[Any], count: int) -> list[tuple[int, float]]:
    """MiB of this process after each of `NUM_MARKS` equal stretches of ``count`` batches.

    The stretch before the first mark, in which buffers grow to their size, is run but not told.
    """
    process, batches_per_mark = psutil.Process(), count // NUM_MARKS
    marks: list[tuple[int, float]] = []
    for num_done in range(batches_per_mark, count + 1, batches_per_mark):
        for _ in range(batches_per_mark):
            next(batches)
        gc.collect()
        marks.append((num_done, process.memory_info().rss / 2**20))
    return marks


def bytes_per_batch(marks: list[tuple[int, float]]) -> float:
    """Bytes per batch by which the memory grows: the straight line of least squares.

    >>> bytes_per_batch([(0, 100.0), (1024, 101.0), (2048, 102.0)])
    1024.0
    """
    mean_batch = sum(batch_number for batch_number, _ in marks) / len(marks)
    product_sum = sum((batch_number - mean_batch) * mib for batch_number, mib in marks)
    return product_sum * 2**20 / sum((batch_number - mean_batch) ** 2 for batch_number, _ in marks)


def process_tree_mib() -> float:
    """MiB of this process and all its children, what they share counted once."""
    this_process = psutil.Process()
    all_processes = [this_process, *this_process.children(recursive=True)]
    return float(sum(process.memory_full_info().pss for process in all_processes) / 2**20)


def print_long_run(scratch: Path, batches: int) -> None:
    """Print what so many small batches of this project's loader do to the memory of a process."""
    write_cifar(scratch / "small", 2000)
    splits = SOURCES["cifar10"].read(
        SourceRequest(scratch / "small", ("train",), has_named_splits=True)
    )
    options = BuildOptions(shard_size=250)
    build_dataset(splits, scratch / "shards32", options, lambda *_: nullcontext(lambda done: None))
    cfg = run_config(scratch / "shards32" / "train", batch=8, cores=1, side=32)
    marks = mib_at_marks(our_batches(cfg), batches)
    print("\n| batches of 8 CIFAR-sized images | MiB resident |\n|---|---|")
    for done, mib in marks:
        print(f"| {done:,} | {mib:,.1f} |")
    second_half = marks[len(marks) // 2 :]
    print(f"\nThe second half grows by {bytes_per_batch(second_half):,.0f} bytes per batch.")
