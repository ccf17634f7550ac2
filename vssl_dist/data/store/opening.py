"""Opens and reads datasets with a timeout: storage that does not answer becomes an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

from vssl_dist.data.prefetch import Prefetcher
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.data.store.manifest import MANIFEST, Manifest, read_manifest
from vssl_dist.data.store.stall import StallWatch

T = TypeVar("T")


def run_with_timeout(
    watch: StallWatch, read_storage: Callable[[], T], *, timeout_s: float, who: str
) -> T:
    """Call ``read_storage`` in a thread, where it may hang, and return its result.

    Args:
        watch: The watch of the dataset that ``read_storage`` reads.
        read_storage: A function that reads from storage.
        timeout_s: Seconds that a single open, stat or read may take.
        who: The consumer that waits, for the message.

    Raises:
        DataError: Storage does not answer: one line with the file.
    """

    def yield_single_result() -> Iterator[T]:
        yield read_storage()

    check_storage = partial(watch.check, timeout_s, who)
    result_prefetcher = Prefetcher([yield_single_result()], 1, check_storage)
    try:
        return next(result_prefetcher)
    except KeyboardInterrupt:  # after which nobody waits for storage
        result_prefetcher.abandon_threads()
        raise
    finally:
        result_prefetcher.close()


def read_manifest_watched(folder: Path, *, timeout_s: float, who: str) -> Manifest:
    """Read the manifest of a dataset and look at no other file, as for the number of its samples.

    Args:
        folder: The folder of one split.
        timeout_s: Seconds that the read may take.
        who: The consumer that waits, for the message.

    Raises:
        DataError: One line: no dataset, a damaged manifest, or storage does not answer.
    """
    watch = StallWatch()

    def read() -> Manifest:
        with watch(folder / MANIFEST):
            return read_manifest(folder)

    return run_with_timeout(watch, read, timeout_s=timeout_s, who=who)


def open_watched(
    folder: Path,
    *,
    timeout_s: float,
    who: str,
    share: slice | None = None,
    check: Callable[[Dataset], None] | None = None,
    manifest: Manifest | None = None,
) -> Dataset:
    """Open a dataset as `Dataset.open` does, on storage that may not answer.

    Args:
        folder: The folder of one split.
        timeout_s: Seconds that a single open, stat or read may take.
        who: The consumer that waits, for the message.
        share: Which shards to `Dataset.probe`; none by default.
        check: A further check of the dataset, which may read from it.
        manifest: What somebody else has read and checked against all files: neither is done again.

    Raises:
        DataError: One line: no dataset, what is wrong with it, or storage does not answer.
    """
    watch = StallWatch()

    def open_and_check() -> Dataset:
        dataset = (
            Dataset.open(folder, watch) if manifest is None else Dataset(folder, manifest, watch)
        )
        if share is not None:
            dataset.probe(share)
        if check is not None:
            check(dataset)
        return dataset

    return run_with_timeout(watch, open_and_check, timeout_s=timeout_s, who=who)
