"""Keeps iterators a little ahead of whoever consumes them, in threads that always end."""

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
Made: TypeAlias = tuple[list[T], BaseException | None]
"""An item, or what came instead of one: the end, or an error."""

_PATIENCE_S = 0.1  # how often a waiting side looks whether the other one is still there
_JOIN_S = 30.0  # a read from a stalled file system must not keep a process from ending


class Prefetcher(Generic[T]):
    """An iterator over the next item of each source in turn, made in the background.

    Each source has a thread of its own, and all work at once.  An exception in a source reaches
    the consumer in its place in the sequence.  The threads end when a source does, on `close`,
    when the prefetcher is collected, and at interpreter exit: they never outlive the libraries
    they call into.

    Args:
        sources: Where the items come from; only the source's own thread touches it.
        depth: How many items of each source may be ready.
        check: Called every so often while the consumer waits.  What it raises ends the
            iteration, and the threads are left behind: one is stuck where nothing reaches it.

    >>> list(Prefetcher([iter("ace"), iter("bdf")], depth=2))
    ['a', 'b', 'c', 'd', 'e', 'f']
    """

    def __init__(
        self, sources: Sequence[Iterator[T]], depth: int, check: Callable[[], None] | None = None
    ) -> None:
        self._check, self._stop = check, Event()
        self._running = [_start(source, depth, self._stop) for source in sources]
        self._turns = cycle(self._running)
        self._next = next(self._turns)
        self._halt = weakref.finalize(self, _halt, [r.thread for r in self._running], self._stop)
        # At exit, last come is first served.  All finalizers together have the place of the first
        # one in the process, which may be behind the libraries that the threads call into.
        self._halt.atexit = False
        atexit.register(self._halt)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        now = self._next
        while True:
            try:
                items, error = now.made.get(timeout=_PATIENCE_S)
            except Empty:
                if not now.thread.is_alive() and now.made.empty():
                    raise StopIteration from None
                self._look()
                continue
            if items:
                self._next = next(self._turns)
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
            self.abandon()
            raise

    def abandon(self) -> None:
        """Let the threads end when they can, and wait for none."""
        self._stop.set()
        self._halt.detach()
        atexit.unregister(self._halt)

    def close(self) -> None:
        """End the threads; what they had made ahead is dropped."""
        self._halt()
        atexit.unregister(self._halt)


class _Running(NamedTuple, Generic[T]):
    thread: Thread
    made: Queue[Made[T]]


def _start(source: Iterator[T], depth: int, stop: Event) -> _Running[T]:
    made: Queue[Made[T]] = Queue(depth)
    # Not a bound method: a thread that held the prefetcher would keep it from being collected.
    thread = Thread(target=_fill, args=(source, made, stop), name="prefetch", daemon=True)
    thread.start()
    return _Running(thread, made)


def _fill(source: Iterator[T], made: Queue[Made[T]], stop: Event) -> None:
    try:
        for item in source:
            _put(made, ([item], None), stop)
            if stop.is_set():
                return
        _put(made, ([], None), stop)
    except BaseException as error:  # whatever it is, it is the consumer's business
        _put(made, ([], error), stop)


def _put(made: Queue[Made[T]], entry: Made[T], stop: Event) -> None:
    while not stop.is_set():
        try:
            return made.put(entry, timeout=_PATIENCE_S)
        except Full:
            continue


def _halt(threads: Sequence[Thread], stop: Event) -> None:
    stop.set()
    until = time.monotonic() + _JOIN_S
    for thread in threads:
        if thread is not current_thread():  # which is where a collection may happen to run
            thread.join(max(0.0, until - time.monotonic()))
