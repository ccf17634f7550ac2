"""Notices that storage does not answer: which thread waits for which file, and since when.

A read that hangs cannot be interrupted from within, because its thread sleeps in the kernel.
Another thread can notice, name the file and end the process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident

from vssl_dist.errors import DataError


class StallWatch:
    """The file operations now under way, one per thread.

    >>> watch = StallWatch()
    >>> with watch(Path("shard-000001.tar")):
    ...     watch.check(0.0, "rank 3")
    Traceback (most recent call last):
    vssl_dist.errors.DataError: rank 3 waits for data: shard-000001.tar: storage has not ...
    >>> watch.check(0.0, "rank 3")
    """

    def __init__(self) -> None:
        self._operation_by_thread: dict[int, tuple[Path, float]] = {}

    @contextmanager
    def __call__(self, path: Path) -> Iterator[None]:
        """Enter while this thread waits for ``path``."""
        thread_id = get_ident()
        self._operation_by_thread[thread_id] = (path, time.monotonic())
        try:
            yield
        finally:
            del self._operation_by_thread[thread_id]

    def check(self, timeout_s: float, who: str) -> None:
        """Raise if one operation has lasted longer than ``timeout_s``.

        Slow storage that keeps answering is never too slow: each operation has its own time.

        Args:
            timeout_s: Seconds that a single open, stat or read may take.
            who: The consumer that waits, for the message.

        Raises:
            DataError: One line with the file that has been waited for longest.
        """
        # Copied, because other threads begin and end operations meanwhile.
        waits_in_progress = [
            (time.monotonic() - since_s, path)
            for path, since_s in self._operation_by_thread.copy().values()
        ]
        longest_wait_s, path = max(waits_in_progress, default=(0.0, None))
        if path is not None and longest_wait_s > timeout_s:
            raise DataError(
                f"{who} waits for data: {path}: storage has not answered for "
                f"{longest_wait_s:.0f} s (data.timeout_s={timeout_s:g}; is the file system up?)"
            )
