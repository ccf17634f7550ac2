"""A lack of memory is told from damage, whatever words a library has for it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.damage import memory_left
from vssl_dist.data.backends.memory import is_out_of_memory

SAID = (
    "std::bad_alloc",
    "Can't allocate 9 bytes on host.",
    "out of memory when reading image file",
)


def test_damage_is_no_lack_of_memory() -> None:
    for error in (ValueError("broken data stream"), RuntimeError("Failed to decode sample #0 :")):
        assert not is_out_of_memory(error)
        assert not is_out_of_memory(error, 1000 * 1000)
    report = "File 'out of memory/dali.py'\nencountered:\n\nFailed\nCurrent pipeline object is no"
    assert not is_out_of_memory(RuntimeError(report))


@pytest.mark.parametrize("error", [MemoryError(), *map(RuntimeError, SAID)])
def test_what_a_library_says_of_memory_is_believed(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_what_comes_where_no_memory_is_left_is_no_damage() -> None:
    error = OSError("broken data stream when reading image file")
    with memory_left(100 << 20):
        assert not is_out_of_memory(error)
        assert is_out_of_memory(error, 4000 * 6000)
    with memory_left(10 << 20):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(error, 4000 * 6000)


def test_a_header_that_claims_any_number_of_pixels_is_no_error() -> None:
    before = np.iinfo(np.uint64).max
    with memory_left(1 << 30):
        assert is_out_of_memory(ValueError("damaged"), int(before) * 2)
