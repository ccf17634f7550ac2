"""The shards that are open: those last used, and another try when storage fails."""

from __future__ import annotations

import resource
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import numpy as np

from vssl_dist.data.manifest import DataError, ShardEntry
from vssl_dist.data.shardfile import Bytes, ShardFile
from vssl_dist.data.watch import ReadWatch

# Above the streams that one rank usually owns.
_MOST_OPEN = 256
# Before each new try: long enough for a server that hands over, short beside its own timeout.
_PAUSES_S = (0.5, 1.0, 2.0)


class Handles:
    """Opens shards when they are first read from, and keeps the last ones used.

    Args:
        folder: Where the shards are.
        shards: What the manifest states about each.
        watch: Told of every file operation.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardEntry], watch: ReadWatch) -> None:
        self._folder, self._shards, self._watch = folder, shards, watch
        self._opened: OrderedDict[int, ShardFile] = OrderedDict()
        self._lock = Lock()
        # The process has other files to open too.
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = max(1, min(_MOST_OPEN, limit // 4)) if limit > 0 else _MOST_OPEN

    def get(self, number: int) -> ShardFile:
        """Shard ``number``, opened.

        Raises:
            DataError: It cannot be opened, or is not the one of the manifest.
        """
        with self._lock:
            if number in self._opened:
                self._opened.move_to_end(number)
                return self._opened[number]
        # Not under the lock: storage that hangs on one shard must not hold up the others.
        shard = ShardFile.open(self._folder, self._shards[number], self._watch)
        with self._lock:
            self._opened[number] = shard
            while len(self._opened) > self._most:
                self._opened.popitem(last=False)
        return shard

    def checked(self, number: int, row: int) -> tuple[ShardFile, Bytes, str]:
        """A shard, one of its images and what is wrong with it ("" = nothing).

        Storage that fails is asked again after each of several pauses.

        Raises:
            DataError: The shard cannot be opened.
        """
        for pause in _PAUSES_S:
            try:
                shard = self.get(number)
                return shard, *shard.checked(row)
            except (DataError, OSError):
                self._forget(number)  # a handle of before a failure may stay stale for ever
                time.sleep(pause)
        try:
            shard = self.get(number)
        except DataError as error:
            tries = len(_PAUSES_S) + 1
            raise DataError(f"{error}; {tries} tries in {sum(_PAUSES_S):g} s") from error
        try:
            return shard, *shard.checked(row)
        except OSError as error:
            return shard, np.empty(0, np.uint8), f"cannot be read ({error.strerror})"

    def close(self) -> None:
        """Close all files that nobody is reading from."""
        with self._lock:
            self._opened.clear()

    def _forget(self, number: int) -> None:
        with self._lock:
            self._opened.pop(number, None)
