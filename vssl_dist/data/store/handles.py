"""Keeps the shards last used open, and tries again when storage fails."""

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

_DEFAULT_OPEN_SHARDS = 256
# Before each new try: long enough for a server that hands over, short beside its own timeout.
_RETRY_PAUSES_S = (0.5, 1.0, 2.0)


class _ShardProbeResult(NamedTuple):
    problem: str
    """Why a shard is not the one that was written, or "" if it is."""
    is_unreadable: bool = False
    """Whether storage failed, which may pass."""


class ShardHandles:
    """Opens shards when they are first read from, and keeps the last ones used.

    Args:
        folder: The folder of the shards.
        shards: What the manifest states about each shard.
        classes: Number of classes: labels lie below it.
        watch: Entered during every file operation.
    """

    def __init__(
        self, folder: Path, shards: Sequence[ShardEntry], classes: int, watch: StallWatch
    ) -> None:
        self._folder = folder
        self._shard_entries = shards
        self._num_classes = classes
        self._watch = watch
        self._open_shards: OrderedDict[int, ShardFile] = OrderedDict()
        self._failing_shard_numbers: set[int] = set()
        """Shards whose last read failed."""
        self._open_shards_lock = Lock()
        self._max_open_shards = 0
        self.keep_open(_DEFAULT_OPEN_SHARDS)

    def keep_open(self, num_shards: int) -> int:
        """Keep ``num_shards`` open at once: fewer than are read in turn would all be reopened.

        It raises the process's own limit of open files where that is too low and may be raised.

        Returns:
            How many will be kept open: a quarter of that limit at most.
        """
        self._max_open_shards = max(1, min(num_shards, _limit_of_open_files(4 * num_shards) // 4))
        return self._max_open_shards

    def get(self, shard_number: int) -> ShardFile:
        """Return an open shard.

        Raises:
            DataError: It cannot be opened, or is not the one of the manifest.
        """
        with self._open_shards_lock:
            if shard_number in self._open_shards:
                self._open_shards.move_to_end(shard_number)
                return self._open_shards[shard_number]
        # Not under the lock: storage that hangs on one shard must not hold up the others.
        shard = self._open_shard(self._shard_entries[shard_number])
        with self._open_shards_lock:
            self._open_shards[shard_number] = shard
            while len(self._open_shards) > self._max_open_shards:
                self._open_shards.popitem(last=False)
        return shard

    def read_checked(self, shard_number: int, row: int) -> tuple[ShardFile, Bytes, str]:
        """Read an image, and say what is wrong with it ("" = nothing).

        Storage that fails is asked again after each of several pauses.  A shard that failed all
        of them is asked once until it answers again: a broken one costs a few seconds, and not
        as many for each of its images.

        Returns:
            The shard, the encoded image and its problem.

        Raises:
            DataError: The shard cannot be opened.
        """
        has_failed = shard_number in self._failing_shard_numbers
        retry_pauses_s = () if has_failed else _RETRY_PAUSES_S
        if has_failed:
            self._forget_open_shard(shard_number)
        for pause_s in retry_pauses_s:
            try:
                return self._read_and_note_success(shard_number, row)
            except (DataError, OSError):
                # A handle of before a failure may stay stale for ever.
                self._forget_open_shard(shard_number)
                time.sleep(pause_s)
        try:
            shard = self.get(shard_number)
        except DataError as error:
            num_tries = len(retry_pauses_s) + 1
            raise DataError(f"{error}; {num_tries} tries in {sum(retry_pauses_s):g} s") from error
        try:
            image, problem = shard.read_checked(row)
        except OSError as error:
            self._failing_shard_numbers.add(shard_number)
            return shard, np.empty(0, np.uint8), f"cannot be read ({error.strerror})"
        self._failing_shard_numbers.discard(shard_number)
        return shard, image, problem

    def find_foreign_shards(self, probed_shards: slice) -> list[str]:
        """Say what is wrong with each shard that is not the one that was written.

        Storage that fails is asked again after each of several pauses, for all shards together.

        Args:
            probed_shards: Which shards to look at.
        """
        results = {entry: self._probe_shard(entry) for entry in self._shard_entries[probed_shards]}
        for pause_s in _RETRY_PAUSES_S:
            unreadable_entries = [
                entry for entry, result in results.items() if result.is_unreadable
            ]
            if not unreadable_entries:
                break
            time.sleep(pause_s)
            results |= {entry: self._probe_shard(entry) for entry in unreadable_entries}
        return [result.problem for result in results.values() if result.problem]

    def _probe_shard(self, entry: ShardEntry) -> _ShardProbeResult:
        """Read the first, the middle and the last image of a shard, until one is intact."""
        try:
            shard = self._open_shard(entry)
        except DataError as error:
            problem = str(error).removeprefix(f"{self._folder}/")
            return _ShardProbeResult(problem, isinstance(error.__cause__, OSError))
        rows = sorted({0, entry.samples // 2, entry.samples - 1})
        result = _ShardProbeResult("")
        for row in rows:
            try:
                reason = shard.read_checked(row)[1]
            except OSError as error:
                # What an image that could be read says of the shard counts more.
                if not result.problem:
                    problem = f"{entry.name} (cannot be read: {error.strerror})"
                    result = _ShardProbeResult(problem, is_unreadable=True)
                continue
            if not reason:
                return _ShardProbeResult("")
            result = _ShardProbeResult(f"{entry.name} (no image is in its place: {reason})")
        # One bad image makes no other shard: it is replaced like any other.
        return result if len(rows) > 1 else _ShardProbeResult("")

    def close(self) -> None:
        """Close all files that nobody is reading from."""
        with self._open_shards_lock:
            self._open_shards.clear()

    def _read_and_note_success(self, shard_number: int, row: int) -> tuple[ShardFile, Bytes, str]:
        shard = self.get(shard_number)
        image, problem = shard.read_checked(row)
        self._failing_shard_numbers.discard(shard_number)
        return shard, image, problem

    def _open_shard(self, entry: ShardEntry) -> ShardFile:
        return ShardFile.open(self._folder, entry, self._num_classes, self._watch)

    def _forget_open_shard(self, shard_number: int) -> None:
        with self._open_shards_lock:
            self._open_shards.pop(shard_number, None)


def _limit_of_open_files(wanted: int) -> int:
    """Raise this process's limit of open files to ``wanted`` if it can; return what it is."""
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return wanted
    raised = wanted if highest == resource.RLIM_INFINITY else min(wanted, highest)
    if raised > limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, highest))
    return max(limit, raised)
