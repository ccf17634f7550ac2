"""Whether a loader that runs for long keeps its memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import psutil


def resident(batches: Iterator[Any], count: int, marks: int = 10) -> list[tuple[int, float]]:
    """MiB of this process after each of ``marks`` equal stretches of ``count`` batches.

    The stretch before the first mark, in which buffers grow to their size, is run but not told.
    """
    process, each = psutil.Process(), count // marks
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
