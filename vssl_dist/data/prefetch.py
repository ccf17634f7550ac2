"""Keeps an iterator a little ahead of whoever consumes it, in one thread that always ends."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterator
from queue import Empty, Full, Queue
from threading import Event, Thread, current_thread
from typing import Generic, TypeVar

T = TypeVar("T")

_PATIENCE_S = 0.1  # how often a waiting side looks whether the other one is still there
_JOIN_S = 30.0  # a read from a stalled file system must not keep a process from ending


class Prefetcher(Generic[T]):
    """An iterator over ``source``, whose next items are made in the background.

    An exception in the source reaches the consumer in its place in the sequence.  The thread
    ends when the source does, on `close`, when the prefetcher is collected, and at interpreter
    exit: it never outlives the libraries it calls into.

    Args:
        source: Where the items come from; only the thread touches it.
        depth: How many items may be ready.
        check: Called every so often while the consumer waits.  What it raises ends the
            iteration, and the thread is left behind: it is stuck where nothing reaches it.

    >>> list(Prefetcher(iter("abc"), depth=2))
    ['a', 'b', 'c']
    """

    def __init__(
        self, source: Iterator[T], depth: int, check: Callable[[], None] | None = None
    ) -> None:
        self._queue: Queue[tuple[list[T], BaseException | None]] = Queue(depth)
        self._check, self._stop = check, Event()
        # Not a bound method: a thread that held this object would keep it from being collected.
        self._thread = Thread(
            target=_fill, args=(source, self._queue, self._stop), name="prefetch", daemon=True
        )
        self._halt = weakref.finalize(self, _halt, self._thread, self._stop)
        # At exit, last come is first served.  All finalizers together have the place of the first
        # one in the process, which may be behind the libraries that the thread calls into.
        self._halt.atexit = False
        atexit.register(self._halt)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        while True:
            try:
                items, error = self._queue.get(timeout=_PATIENCE_S)
            except Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    raise StopIteration from None
                self._look()
                continue
            if items:
                return items[0]
            self.close()
            if error is not None:
                raise error
            raise StopIteration

    def _look(self) -> None:
        if self._check is None or self._stop.is_set():
            return
        try:
            self._check()
        except BaseException:
            self._stop.set()
            self._halt.detach()
            atexit.unregister(self._halt)
            raise

    def close(self) -> None:
        """End the thread; what it had made ahead is dropped."""
        self._halt()
        atexit.unregister(self._halt)


def _fill(
    source: Iterator[T], queue: Queue[tuple[list[T], BaseException | None]], stop: Event
) -> None:
    try:
        for item in source:
            _put(queue, ([item], None), stop)
            if stop.is_set():
                return
        _put(queue, ([], None), stop)
    except BaseException as error:  # whatever it is, it is the consumer's business
        _put(queue, ([], error), stop)


def _put(
    queue: Queue[tuple[list[T], BaseException | None]],
    entry: tuple[list[T], BaseException | None],
    stop: Event,
) -> None:
    while not stop.is_set():
        try:
            return queue.put(entry, timeout=_PATIENCE_S)
        except Full:
            continue


def _halt(thread: Thread, stop: Event) -> None:
    stop.set()
    if thread is not current_thread():  # which is where a collection may happen to run
        thread.join(_JOIN_S)
