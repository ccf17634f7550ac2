"""Runs iterators a little ahead of their consumer, in threads that always end."""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from queue import Empty, Full, Queue
from threading import Event, Thread, current_thread
from typing import Generic, NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")
Entry: TypeAlias = tuple[list[T], BaseException | None]
"""One item, or no item and the error in its place; neither at the end of a source."""

_POLL_S = 0.1  # how often a waiting side looks whether the other one is still there
_JOIN_S = 30.0  # a read from a stalled file system must not keep a process from ending


class Prefetcher(Generic[T]):
    """An iterator that takes the next item of each source in turn, made in the background.

    Each source has a thread of its own, and all work at once.  An exception in a source reaches
    the consumer in its place in the sequence.  The threads end when a source does, on `close`,
    when the prefetcher is collected, and at interpreter exit: they never outlive the libraries
    they call into.

    Args:
        sources: Iterators of items; each is run by a thread of its own only.
        depth: How many items of each source may lie ready.
        check: Called every so often while the consumer waits.  An error that it raises ends the
            iteration, and the threads are left behind: one hangs where nothing reaches it.

    >>> list(Prefetcher([iter("ace"), iter("bdf")], depth=2))
    ['a', 'b', 'c', 'd', 'e', 'f']
    """

    def __init__(
        self, sources: Sequence[Iterator[T]], depth: int, check: Callable[[], None] | None = None
    ) -> None:
        self._check = check
        self._stop = Event()
        self._workers = [_start(source, depth, self._stop) for source in sources]
        self._turns = cycle(self._workers)
        self._next = next(self._turns)
        self._halt = weakref.finalize(
            self, _halt, [worker.thread for worker in self._workers], self._stop
        )
        # Functions registered for the exit run in reverse order.  All finalizers run together, in
        # the place of the first one of the process, when libraries that the threads call into may
        # already be unloaded.
        self._halt.atexit = False
        atexit.register(self._halt)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        worker = self._next
        while True:
            try:
                items, error = worker.entries.get(timeout=_POLL_S)
            except Empty:
                if not worker.thread.is_alive() and worker.entries.empty():
                    raise StopIteration from None
                self._run_check()
                continue
            if items:
                self._next = next(self._turns)
                return items[0]
            self.close()
            if error is not None:
                raise error
            raise StopIteration

    def _run_check(self) -> None:
        if self._check is None or self._stop.is_set():
            return
        try:
            self._check()
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Let the threads end when they can, and wait for none."""
        self._stop.set()
        self._halt.detach()
        atexit.unregister(self._halt)

    def close(self) -> None:
        """End the threads and drop the items that lie ready."""
        self._halt()
        atexit.unregister(self._halt)


class _Worker(NamedTuple, Generic[T]):
    thread: Thread
    entries: Queue[Entry[T]]


def _start(source: Iterator[T], depth: int, stop: Event) -> _Worker[T]:
    entries: Queue[Entry[T]] = Queue(depth)
    # Not a bound method: a thread that held the prefetcher would keep it from being collected.
    thread = Thread(target=_fill, args=(source, entries, stop), name="prefetch", daemon=True)
    thread.start()
    return _Worker(thread, entries)


def _fill(source: Iterator[T], entries: Queue[Entry[T]], stop: Event) -> None:
    try:
        for item in source:
            _put(entries, ([item], None), stop)
            if stop.is_set():
                return
        _put(entries, ([], None), stop)
    except BaseException as error:  # of any kind: the consumer's thread raises it again
        _put(entries, ([], error), stop)


def _put(entries: Queue[Entry[T]], entry: Entry[T], stop: Event) -> None:
    while not stop.is_set():
        try:
            return entries.put(entry, timeout=_POLL_S)
        except Full:
            continue


def _halt(threads: Sequence[Thread], stop: Event) -> None:
    stop.set()
    deadline = time.monotonic() + _JOIN_S
    for thread in threads:
        if (
            thread is not current_thread()
        ):  # a collection may run in a worker, which cannot join itself
            thread.join(max(0.0, deadline - time.monotonic()))
