"""The measurement of a loader's memory sees a leak of known size, and none where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import numpy as np
import pytest

from bench.loader_memory import resident, slope


def leaking(each: int) -> Iterator[None]:
    kept = []
    while True:
        kept.append(np.ones(each, np.uint8))
        yield


def test_the_slope_is_that_of_least_squares() -> None:
    random = np.random.default_rng(0)
    at = np.arange(100, 1100, 100)
    mib = 500 + 0.02 * at + random.normal(size=10)
    want = np.polyfit(at, mib, 1)[0] * 2**20
    assert slope(list(zip(at.tolist(), mib.tolist(), strict=True))) == pytest.approx(want)


def test_a_leak_is_seen_with_its_size_and_nothing_else_is() -> None:
    each = 2**20
    # What else this process holds may be freed meanwhile.
    assert slope(resident(leaking(each), 100)) == pytest.approx(each, rel=0.4)
    assert abs(slope(resident(repeat(None), 100))) < each / 20
