"""The shards that are open: those last used, and another try when storage fails."""

from __future__ import annotations

import resource
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from vssl_dist.data.store.manifest import ShardEntry
from vssl_dist.data.store.shardfile import Bytes, ShardFile
from vssl_dist.data.store.stall import StallWatch
from vssl_dist.errors import DataError

# Above the streams that one rank usually owns.
_MOST_OPEN = 256
# Before each new try: long enough for a server that hands over, short beside its own timeout.
_PAUSES_S = (0.5, 1.0, 2.0)


class _Probed(NamedTuple):
    wrong: str
    """Why a shard is not the one that was written, or "" if it is."""
    unread: bool = False
    """It could not be read, which may pass."""


class Handles:
    """Opens shards when they are first read from, and keeps the last ones used.

    Args:
        folder: Where the shards are.
        shards: What the manifest states about each.
        classes: How many labels there are.
        watch: Told of every file operation.
    """

    def __init__(
        self, folder: Path, shards: Sequence[ShardEntry], classes: int, watch: StallWatch
    ) -> None:
        self._folder, self._shards, self._classes, self._watch = folder, shards, classes, watch
        self._opened: OrderedDict[int, ShardFile] = OrderedDict()
        self._failing: set[int] = set()
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
        shard = self._open(self._shards[number])
        with self._lock:
            self._opened[number] = shard
            while len(self._opened) > self._most:
                self._opened.popitem(last=False)
        return shard

    def checked(self, number: int, row: int) -> tuple[ShardFile, Bytes, str]:
        """A shard, one of its images and what is wrong with it ("" = nothing).

        Storage that fails is asked again after each of several pauses.  A shard that failed all
        of them is asked once until it answers again: a broken one costs a few seconds, and not
        as many for each of its images.

        Raises:
            DataError: The shard cannot be opened.
        """
        failing = number in self._failing
        pauses = () if failing else _PAUSES_S
        if failing:
            self._forget(number)
        for pause in pauses:
            try:
                return self._answer(number, row)
            except (DataError, OSError):
                self._forget(number)  # a handle of before a failure may stay stale for ever
                time.sleep(pause)
        try:
            shard = self.get(number)
        except DataError as error:
            tries = len(pauses) + 1
            raise DataError(f"{error}; {tries} tries in {sum(pauses):g} s") from error
        try:
            image, wrong = shard.checked(row)
        except OSError as error:
            self._failing.add(number)
            return shard, np.empty(0, np.uint8), f"cannot be read ({error.strerror})"
        self._failing.discard(number)
        return shard, image, wrong

    def foreign_shards(self, share: slice) -> list[str]:
        """What is wrong with each shard that is not the one that was written.

        Storage that fails is asked again after each of several pauses, for all shards together.

        Args:
            share: Which shards to look at.
        """
        probed = {entry: self._probe(entry) for entry in self._shards[share]}
        for pause in _PAUSES_S:
            failing = [entry for entry, found in probed.items() if found.unread]
            if not failing:
                break
            time.sleep(pause)
            probed |= {entry: self._probe(entry) for entry in failing}
        return [found.wrong for found in probed.values() if found.wrong]

    def _probe(self, entry: ShardEntry) -> _Probed:
        """What the first, the middle and the last image say of a shard."""
        try:
            shard = self._open(entry)
        except DataError as error:
            told = str(error).removeprefix(f"{self._folder}/")
            return _Probed(told, isinstance(error.__cause__, OSError))
        rows = sorted({0, entry.samples // 2, entry.samples - 1})
        found = _Probed("")
        for row in rows:
            try:
                reason = shard.checked(row)[1]
            except OSError as error:
                unread = _Probed(f"{entry.name} (cannot be read: {error.strerror})", unread=True)
                found = found if found.wrong else unread
                continue
            if not reason:
                return _Probed("")
            found = _Probed(f"{entry.name} (no image is in its place: {reason})")
        return found if len(rows) > 1 else _Probed("")  # one bad image makes no other shard

    def close(self) -> None:
        """Close all files that nobody is reading from."""
        with self._lock:
            self._opened.clear()

    def _answer(self, number: int, row: int) -> tuple[ShardFile, Bytes, str]:
        shard = self.get(number)
        image, wrong = shard.checked(row)
        self._failing.discard(number)
        return shard, image, wrong

    def _open(self, entry: ShardEntry) -> ShardFile:
        return ShardFile.open(self._folder, entry, self._classes, self._watch)

    def _forget(self, number: int) -> None:
        with self._lock:
            self._opened.pop(number, None)
