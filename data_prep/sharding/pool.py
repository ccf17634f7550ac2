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
TaskFunction = Callable[[Task], Generator[int, None, Result]]
"""Function of a task: yields how many samples it has just dealt with, returns the result."""


def run_tasks(
    task_function: TaskFunction[Task, Result],
    tasks: Sequence[Task],
    *,
    workers: int,
    advance: Callable[[int], None],
    preloaded_modules: Sequence[str] = (),
) -> Iterator[Result]:
    """Do all tasks, in this process or in ``workers`` others; results come in any order.

    Args:
        task_function: A function of a module (workers import it).
        tasks: Picklable.
        workers: Processes; with 1, or a single task, none is started.
        advance: Called with the progress of each ``yield``.
        preloaded_modules: Modules that the work needs; those of the first call of a program count,
            as workers are forked from one server.

    Raises:
        DataError, MemoryError: Whatever the work raised, or a worker that died.
    """
    if min(workers, len(tasks)) <= 1:
        for task in tasks:
            yield _run_in_process(task_function(task), advance)
        return
    process_context = multiprocessing.get_context("forkserver")
    # Imported once, in the server that workers are forked from, not once in each of them.
    process_context.set_forkserver_preload(list(preloaded_modules))
    processes: dict[Connection, BaseProcess] = {}
    try:
        # Only starting is shielded: the parent itself has to see Ctrl-C while it waits.
        with _isolate_process_start():
            for _ in range(min(workers, len(tasks))):
                parent_end, worker_end = process_context.Pipe()
                process: BaseProcess = process_context.Process(
                    target=_worker_loop, args=(worker_end, task_function), daemon=True
                )
                process.start()
                worker_end.close()
                processes[parent_end] = process
        yield from _distribute_tasks(processes, tasks, advance)
    finally:
        for connection, process in processes.items():
            process.terminate()
            process.join()
            connection.close()


@contextmanager
def _isolate_process_start() -> Iterator[None]:
    """Start processes to which Ctrl-C and the current folder mean nothing.

    The server that workers are forked from is a ``python -c``: it would take a ``selectors.py``
    of the folder it is started in for Python's own, and shows Ctrl-C until it ignores it.
    """
    package_parent = str(Path(__file__).resolve().parents[2])
    environment_before = {
        variable_name: os.environ.get(variable_name, "")
        for variable_name in ("PYTHONSAFEPATH", "PYTHONPATH")
    }
    os.environ["PYTHONSAFEPATH"] = "1"
    # To find what it imports beforehand also where the package is not installed.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (environment_before["PYTHONPATH"], package_parent))
    )
    try:
        resource_tracker.ensure_running()  # starting it would lift the mask
        signal_mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, signal_mask_before)
    finally:
        for variable_name, variable_value in environment_before.items():
            os.environ[variable_name] = variable_value
            if not variable_value:
                del os.environ[variable_name]


def _run_in_process(
    task_steps: Generator[int, None, Result], advance: Callable[[int], None]
) -> Result:
    while True:
        try:
            advance(next(task_steps))
        except StopIteration as end:
            result: Result = end.value
            return result


def _distribute_tasks(
    processes: dict[Connection, BaseProcess],
    tasks: Sequence[object],
    advance: Callable[[int], None],
) -> Iterator[Any]:
    pending_tasks = iter(tasks)
    for connection in processes:
        connection.send(next(pending_tasks))
    num_unfinished_tasks = len(tasks)
    while num_unfinished_tasks:
        ready_connections = wait(list(processes))
        for connection in [
            connection for connection in processes if connection in ready_connections
        ]:
            message_kind, message_value = _receive_message(connection)
            if message_kind == "failed":
                raise message_value
            if message_kind == "progress":
                advance(message_value)
                continue
            num_unfinished_tasks -= 1
            # One task at a time: a worker that is done early takes the next.
            for task in pending_tasks:
                connection.send(task)
                break
            yield message_value


def _receive_message(connection: Connection) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = connection.recv()
    except (EOFError, ConnectionError) as error:
        raise DataError("a worker process died (out of memory?): try fewer --workers") from error
    return message


def _worker_loop(connection: Connection, task_function: TaskFunction[Any, Any]) -> None:
    """Do tasks from a pipe until its other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches workers too; the parent decides
    try:
        while True:
            task_steps = task_function(connection.recv())
            try:
                while True:
                    connection.send(("progress", next(task_steps)))
            except StopIteration as end:
                connection.send(("done", end.value))
            except (DataError, MemoryError) as error:
                connection.send(("failed", error))
    except (EOFError, ConnectionError):
        return
