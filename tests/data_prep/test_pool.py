"""The pool gives every result once, passes errors on, and notices a dead worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator

import pytest

from data_prep import pool
from vssl_dist.data.shards import DataError


def square(task: int) -> Generator[int, None, int]:
    yield task
    yield 1
    return task * task


def fail_at_three(task: int) -> Generator[int, None, int]:
    yield 1
    if task == 3:
        raise DataError("three is bad")
    return task


def die_at_three(task: int) -> Generator[int, None, int]:
    yield 1
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_task_is_done_once_and_all_progress_arrives(workers: int) -> None:
    done: list[int] = []
    results = pool.run(square, range(20), workers=workers, advance=done.append)
    assert sorted(results) == [n * n for n in range(20)]
    assert sum(done) == sum(range(20)) + 20


def test_no_tasks_no_results() -> None:
    assert list(pool.run(square, [], workers=2, advance=print)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_reaches_the_caller(workers: int) -> None:
    with pytest.raises(DataError, match="three is bad"):
        list(pool.run(fail_at_three, range(9), workers=workers, advance=lambda done: None))


def test_a_worker_that_is_killed_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(DataError, match="a worker process died"):
        list(pool.run(die_at_three, range(9), workers=2, advance=lambda done: None))
