"""Worker processes that report progress while they work and die with whoever started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from vssl_dist.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")
Work = Callable[[Task], Generator[int, None, Result]]
"""Function of a task: yields how many samples it has just dealt with, returns the result."""


def run_tasks(
    work: Work[Task, Result],
    tasks: Sequence[Task],
    *,
    workers: int,
    advance: Callable[[int], None],
    imports: Sequence[str] = (),
) -> Iterator[Result]:
    """Do all tasks, in this process or in ``workers`` others; results come in any order.

    Args:
        work: A function of a module (workers import it).
        tasks: Picklable.
        workers: Processes; with 1, or a single task, none is started.
        advance: Called with the progress of each ``yield``.
        imports: Modules that the work needs; those of the first call of a program count, as
            workers are forked from one server.

    Raises:
        DataError, MemoryError: Whatever the work raised, or a worker that died.
    """
    if min(workers, len(tasks)) <= 1:
        for task in tasks:
            yield _run_in_process(work(task), advance)
        return
    context = multiprocessing.get_context("forkserver")
    # Imported once, in the server that workers are forked from, not once in each of them.
    context.set_forkserver_preload(list(imports))
    processes: dict[Connection, BaseProcess] = {}
    try:
        # Only starting is shielded: the parent itself has to see Ctrl-C while it waits.
        with _isolated_start():
            for _ in range(min(workers, len(tasks))):
                parent_end, worker_end = context.Pipe()
                process: BaseProcess = context.Process(
                    target=_worker_loop, args=(worker_end, work), daemon=True
                )
                process.start()
                worker_end.close()
                processes[parent_end] = process
        yield from _distribute(processes, tasks, advance)
    finally:
        for connection, process in processes.items():
            process.terminate()
            process.join()
            connection.close()


@contextmanager
def _isolated_start() -> Iterator[None]:
    """Start processes to which Ctrl-C and the current folder mean nothing.

    The server that workers are forked from is a ``python -c``: it would take a ``selectors.py``
    of the folder it is started in for Python's own, and shows Ctrl-C until it ignores it.
    """
    package_parent = str(Path(__file__).resolve().parents[2])
    environment_before = {
        name: os.environ.get(name, "") for name in ("PYTHONSAFEPATH", "PYTHONPATH")
    }
    os.environ["PYTHONSAFEPATH"] = "1"
    # To find what it imports beforehand also where the package is not installed.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (environment_before["PYTHONPATH"], package_parent))
    )
    try:
        resource_tracker.ensure_running()  # starting it would lift the mask
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    finally:
        for name, value in environment_before.items():
            os.environ[name] = value
            if not value:
                del os.environ[name]


def _run_in_process(steps: Generator[int, None, Result], advance: Callable[[int], None]) -> Result:
    while True:
        try:
            advance(next(steps))
        except StopIteration as end:
            result: Result = end.value
            return result


def _distribute(
    processes: dict[Connection, BaseProcess],
    tasks: Sequence[object],
    advance: Callable[[int], None],
) -> Iterator[Any]:
    pending_tasks = iter(tasks)
    for connection in processes:
        connection.send(next(pending_tasks))
    unfinished = len(tasks)
    while unfinished:
        ready = wait(list(processes))
        for connection in [connection for connection in processes if connection in ready]:
            message_kind, value = _receive(connection)
            if message_kind == "failed":
                raise value
            if message_kind == "progress":
                advance(value)
                continue
            unfinished -= 1
            # One task at a time: a worker that is done early takes the next.
            for task in pending_tasks:
                connection.send(task)
                break
            yield value


def _receive(connection: Connection) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = connection.recv()
    except (EOFError, ConnectionError) as error:
        raise DataError("a worker process died (out of memory?): try fewer --workers") from error
    return message


def _worker_loop(connection: Connection, work: Work[Any, Any]) -> None:
    """Do tasks from a pipe until its other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches workers too; the parent decides
    try:
        while True:
            steps = work(connection.recv())
            try:
                while True:
                    connection.send(("progress", next(steps)))
            except StopIteration as end:
                connection.send(("done", end.value))
            except (DataError, MemoryError) as error:
                connection.send(("failed", error))
    except (EOFError, ConnectionError):
        return
