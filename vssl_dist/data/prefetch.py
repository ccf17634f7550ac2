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
QueueEntry: TypeAlias = tuple[list[T], BaseException | None]
"""One item, or no item and the error in its place; neither at the end of a source."""

_POLL_INTERVAL_S = 0.1  # how often a waiting side looks whether the other one is still there
_JOIN_TIMEOUT_S = 30.0  # a read from a stalled file system must not keep a process from ending


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
        self._check_while_waiting = check
        self._stop_event = Event()
        self._workers = [
            _start_worker(item_source, depth, self._stop_event) for item_source in sources
        ]
        self._worker_turns = cycle(self._workers)
        self._next_worker = next(self._worker_turns)
        self._stop_threads = weakref.finalize(
            self, _stop_threads, [worker.thread for worker in self._workers], self._stop_event
        )
        # Functions registered for the exit run in reverse order.  All finalizers run together, in
        # the place of the first one of the process, when libraries that the threads call into may
        # already be unloaded.
        self._stop_threads.atexit = False
        atexit.register(self._stop_threads)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        worker = self._next_worker
        while True:
            try:
                item_list, error = worker.entry_queue.get(timeout=_POLL_INTERVAL_S)
            except Empty:
                if not worker.thread.is_alive() and worker.entry_queue.empty():
                    raise StopIteration from None
                self._run_check()
                continue
            if item_list:
                self._next_worker = next(self._worker_turns)
                return item_list[0]
            self.close()
            if error is not None:
                raise error
            raise StopIteration

    def _run_check(self) -> None:
        if self._check_while_waiting is None or self._stop_event.is_set():
            return
        try:
            self._check_while_waiting()
        except BaseException:
            self.abandon_threads()
            raise

    def abandon_threads(self) -> None:
        """Let the threads end when they can, and wait for none."""
        self._stop_event.set()
        self._stop_threads.detach()
        atexit.unregister(self._stop_threads)

    def close(self) -> None:
        """End the threads and drop the items that lie ready."""
        self._stop_threads()
        atexit.unregister(self._stop_threads)


class _Worker(NamedTuple, Generic[T]):
    thread: Thread
    entry_queue: Queue[QueueEntry[T]]


def _start_worker(item_source: Iterator[T], depth: int, stop_event: Event) -> _Worker[T]:
    entry_queue: Queue[QueueEntry[T]] = Queue(depth)
    # Not a bound method: a thread that held the prefetcher would keep it from being collected.
    thread = Thread(
        target=_fill_queue,
        args=(item_source, entry_queue, stop_event),
        name="prefetch",
        daemon=True,
    )
    thread.start()
    return _Worker(thread, entry_queue)


def _fill_queue(
    item_source: Iterator[T], entry_queue: Queue[QueueEntry[T]], stop_event: Event
) -> None:
    try:
        for item in item_source:
            _put_unless_stopped(entry_queue, ([item], None), stop_event)
            if stop_event.is_set():
                return
        _put_unless_stopped(entry_queue, ([], None), stop_event)
    except BaseException as error:  # of any kind: the consumer's thread raises it again
        _put_unless_stopped(entry_queue, ([], error), stop_event)


def _put_unless_stopped(
    entry_queue: Queue[QueueEntry[T]], entry: QueueEntry[T], stop_event: Event
) -> None:
    while not stop_event.is_set():
        try:
            return entry_queue.put(entry, timeout=_POLL_INTERVAL_S)
        except Full:
            continue


def _stop_threads(threads: Sequence[Thread], stop_event: Event) -> None:
    stop_event.set()
    join_deadline_s = time.monotonic() + _JOIN_TIMEOUT_S
    for thread in threads:
        # A collection may run in a worker, which cannot join itself.
        if thread is not current_thread():
            thread.join(max(0.0, join_deadline_s - time.monotonic()))
