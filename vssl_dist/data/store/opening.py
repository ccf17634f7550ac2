"""Datasets on storage that may not answer: whoever waits for it says so, and not for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

from vssl_dist.data.prefetch import Prefetcher
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.data.store.stall import StallWatch

T = TypeVar("T")


def run_with_timeout(watch: StallWatch, work: Callable[[], T], *, timeout_s: float, who: str) -> T:
    """What ``work`` returns; it is done in a thread, where it may hang.

    Args:
        watch: That of the dataset which ``work`` reads.
        work: What reads.
        timeout_s: Seconds that a single open, stat or read may take.
        who: Waits for it; named in the message.

    Raises:
        DataError: Storage does not answer: one line with the file.
    """

    def done() -> Iterator[T]:
        yield work()

    check = partial(watch.check, timeout_s, who)
    results = Prefetcher([done()], 1, check)
    try:
        return next(results)
    except KeyboardInterrupt:  # after which nobody waits for storage
        results.abandon()
        raise
    finally:
        results.close()


def open_watched(
    folder: Path,
    *,
    timeout_s: float,
    who: str,
    share: slice | None = None,
    check: Callable[[Dataset], None] | None = None,
) -> Dataset:
    """`Dataset.open` for storage that may hang already here.

    Args:
        folder: The folder of one split.
        timeout_s: Seconds that a single open, stat or read may take.
        who: Waits for it; named in the message.
        share: Which shards to `Dataset.probe`; none by default.
        check: What else is to be seen of it; may read.

    Raises:
        DataError: One line: no dataset, what is wrong with it, or storage does not answer.
    """
    watch = StallWatch()

    def opened() -> Dataset:
        dataset = Dataset.open(folder, watch)
        if share is not None:
            dataset.probe(share)
        if check is not None:
            check(dataset)
        return dataset

    return run_with_timeout(watch, opened, timeout_s=timeout_s, who=who)
