"""The measurement of a loader's memory sees a leak of known size, and none where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.loader_memory import bytes_per_batch

ROOT = Path(__file__).parents[2]
LEAKING = """
from itertools import repeat
import numpy as np
from bench.loader_memory import bytes_per_batch, mib_at_marks

def leaking(each):
    kept = []
    while True:
        kept.append(np.ones(each, np.uint8))
        yield

leak, none = (
    bytes_per_batch(mib_at_marks(batches, 100)) for batches in (leaking(2**20), repeat(None))
)
print(leak, none)
"""


def test_the_slope_is_that_of_least_squares() -> None:
    random = np.random.default_rng(0)
    at = np.arange(100, 1100, 100)
    mib = 500 + 0.02 * at + random.normal(size=10)
    want = np.polyfit(at, mib, 1)[0] * 2**20
    assert bytes_per_batch(list(zip(at.tolist(), mib.tolist(), strict=True))) == pytest.approx(want)


def test_a_leak_is_seen_with_its_size_and_nothing_else_is() -> None:
    # In a process of its own: what hundreds of tests left behind may be freed at any moment.
    done = subprocess.run(
        [sys.executable, "-c", LEAKING], cwd=ROOT, capture_output=True, text=True, check=True
    )
    leak, none = (float(word) for word in done.stdout.split())
    assert leak == pytest.approx(2**20, rel=0.1)
    assert abs(none) < 2**20 / 20
