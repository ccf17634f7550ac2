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
"""Does one task; yields how many samples it has just dealt with, returns the result."""


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
            yield _here(work(task), advance)
        return
    context = multiprocessing.get_context("forkserver")
    # Imported once, in the server that workers are forked from, not once in each of them.
    context.set_forkserver_preload(list(imports))
    team: dict[Connection, BaseProcess] = {}
    try:
        with _sheltered():
            for _ in range(min(workers, len(tasks))):
                ours, theirs = context.Pipe()
                process: BaseProcess = context.Process(
                    target=_serve, args=(theirs, work), daemon=True
                )
                process.start()
                theirs.close()
                team[ours] = process
        yield from _deal(team, tasks, advance)
    finally:
        for link, process in team.items():
            process.terminate()
            process.join()
            link.close()


@contextmanager
def _sheltered() -> Iterator[None]:
    """Start processes to which Ctrl-C and the current folder mean nothing.

    The server that workers are forked from is a ``python -c``: it would take a ``selectors.py``
    of the folder it is started in for Python's own, and shows Ctrl-C until it ignores it.
    """
    ours = str(Path(__file__).resolve().parents[1])
    before = {name: os.environ.get(name, "") for name in ("PYTHONSAFEPATH", "PYTHONPATH")}
    os.environ["PYTHONSAFEPATH"] = "1"
    # To find what it imports beforehand also where the package is not installed.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (before["PYTHONPATH"], ours)))
    try:
        resource_tracker.ensure_running()  # starting it would lift the mask
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    finally:
        for name, value in before.items():
            os.environ[name] = value
            if not value:
                del os.environ[name]


def _here(steps: Generator[int, None, Result], advance: Callable[[int], None]) -> Result:
    while True:
        try:
            advance(next(steps))
        except StopIteration as end:
            result: Result = end.value
            return result


def _deal(
    team: dict[Connection, BaseProcess], tasks: Sequence[Any], advance: Callable[[int], None]
) -> Iterator[Any]:
    waiting = iter(tasks)
    for link in team:
        link.send(next(waiting))
    left = len(tasks)
    while left:
        ready = wait(list(team))
        for link in [one for one in team if one in ready]:
            kind, value = _receive(link)
            if kind == "failed":
                raise value
            if kind == "progress":
                advance(value)
                continue
            left -= 1
            for task in waiting:
                link.send(task)
                break
            yield value


def _receive(link: Connection) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = link.recv()
    except (EOFError, ConnectionError) as error:
        raise DataError("a worker process died (out of memory?): try fewer --workers") from error
    return message


def _serve(link: Connection, work: Work[Any, Any]) -> None:
    """A worker's life: its pipe is all it has, and when the other end closes it stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us too; the parent decides
    try:
        while True:
            steps = work(link.recv())
            try:
                while True:
                    link.send(("progress", next(steps)))
            except StopIteration as end:
                link.send(("done", end.value))
            except (DataError, MemoryError) as error:
                link.send(("failed", error))
    except (EOFError, ConnectionError):
        return
