"""The prefetcher: the sources' items in turn, whoever is slow, and threads that always end."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from itertools import count, islice

import pytest

from vssl_dist.data.prefetch import Prefetcher
from vssl_dist.errors import DataError


def prefetching() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_the_threads_end_with_their_consumer() -> None:
    before = prefetching()
    for end in ("close", "collect"):
        source = Prefetcher([count(0, 2), count(1, 2)], depth=2)
        assert [next(source) for _ in range(5)] == list(range(5))
        assert prefetching() == before + 2
        if end == "close":
            source.close()
        del source
        gc.collect()
        assert prefetching() == before


def test_an_exception_comes_after_what_was_made_before_it() -> None:
    def failing() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("disk gone")

    source = Prefetcher([failing()], depth=2)
    assert [next(source), next(source)] == [1, 2]
    with pytest.raises(OSError, match="disk gone"):
        next(source)
    with pytest.raises(StopIteration):
        next(source)


@pytest.mark.parametrize("error", [OSError("disk gone"), DataError("shard"), MemoryError()])
def test_an_exception_of_the_thread_surfaces_once_with_its_type(error: Exception) -> None:
    def failing() -> Iterator[int]:
        raise error
        yield 0

    before = prefetching()
    source = Prefetcher([failing()], depth=2)
    with pytest.raises(type(error)) as caught:
        next(source)
    assert caught.value is error
    assert list(source) == []
    source.close()
    assert prefetching() == before


def test_items_come_in_turn_however_slow_a_source_is() -> None:
    def slow() -> Iterator[int]:
        for number in count(0, 3):
            time.sleep(0.02)
            yield number

    source = Prefetcher([slow(), count(1, 3), count(2, 3)], depth=1)
    assert list(islice(source, 20)) == list(range(20))
    source.close()


def test_all_sources_work_at_once() -> None:
    meeting = threading.Barrier(2, timeout=30)

    def waiting(name: str) -> Iterator[str]:
        for _ in range(3):
            meeting.wait()
            yield name

    assert "".join(Prefetcher([waiting("a"), waiting("b")], depth=1)) == "ababab"


def test_an_error_comes_in_its_turn_and_ends_all_threads() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise OSError("disk gone")

    before = prefetching()
    source = Prefetcher([count(0, 2), failing()], depth=2)
    assert list(islice(source, 3)) == [0, 1, 2]
    with pytest.raises(OSError, match="disk gone"):
        next(source)
    assert prefetching() == before


def test_the_first_source_that_ends_is_the_end() -> None:
    assert list(Prefetcher([iter([0, 2, 4]), iter([1])], depth=2)) == [0, 1, 2]


def test_threads_that_are_stuck_are_left_at_once() -> None:
    freed = threading.Event()

    def stuck() -> Iterator[int]:
        freed.wait(60)
        yield 0

    def complain() -> None:
        raise DataError("storage has not answered")

    before = prefetching()
    start = time.monotonic()
    with pytest.raises(DataError, match="not answered"):
        next(Prefetcher([stuck(), stuck()], 1, complain))
    assert time.monotonic() - start < 10
    assert prefetching() == before + 2
    freed.set()
