"""Who is waiting for the file system, for which file, and since when.

A read from storage that does not answer cannot be interrupted from within: the thread sleeps in
the kernel.  Another one can notice, name the file and end the process.
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
        self._busy: dict[int, tuple[Path, float]] = {}

    @contextmanager
    def __call__(self, path: Path) -> Iterator[None]:
        """Within, this thread waits for ``path``."""
        thread = get_ident()
        self._busy[thread] = (path, time.monotonic())
        try:
            yield
        finally:
            del self._busy[thread]

    def check(self, timeout_s: float, who: str) -> None:
        """Raise if one operation has lasted longer than ``timeout_s``.

        Slow storage that keeps answering is never too slow: each operation has its own time.

        Args:
            timeout_s: Seconds that a single open, stat or read may take.
            who: Named in the message.

        Raises:
            DataError: One line with the file that has been waited for longest.
        """
        waited = [(time.monotonic() - since, path) for path, since in self._busy.copy().values()]
        if waited and (longest := max(waited))[0] > timeout_s:
            raise DataError(
                f"{who} waits for data: {longest[1]}: storage has not answered for "
                f"{longest[0]:.0f} s (data.timeout_s={timeout_s:g}; is the file system up?)"
            )
