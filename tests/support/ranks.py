"""Run a function on several gloo processes, and show the traceback that came first."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock


class RankFailed(AssertionError):
    """A rank raised, died or did not finish in time; the message holds its traceback."""


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300.0
) -> list[Any]:
    """Call ``fn(*args)`` on ``world_size`` processes that share a gloo process group.

    The processes are spawned, so ``fn``, ``args`` and the results must pickle: ``fn`` is a
    function at the top of a module.  Each process has one thread, ``DS_ACCELERATOR=cpu`` and the
    usual ``RANK``, ``WORLD_SIZE`` ... variables.

    Returns:
        What each rank returned, in rank order.

    Raises:
        RankFailed: With the traceback of the rank that failed first; the others are killed.
    """
    context = multiprocessing.get_context("spawn")
    door = socket.create_server(("127.0.0.1", 0), backlog=world_size)
    shared = {
        "MASTER_PORT": str(door.getsockname()[1]),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            inherited = None if rank else door
            process = context.Process(
                target=_one_rank, args=(theirs, inherited, fn, args), daemon=True
            )
            with mock.patch.dict(os.environ, shared, RANK=str(rank), LOCAL_RANK=str(rank)):
                process.start()
            theirs.close()  # only the child holds it now: its death reads as end of file
            processes.append(process)
            pipes.append(ours)
        return _collect(processes, pipes, time.monotonic() + timeout_s)
    finally:
        door.close()
        for leftover in processes:
            leftover.kill()
            leftover.join()


def _one_rank(
    pipe: Connection, door: socket.socket | None, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch

    from vssl_dist import dist

    try:
        if door is not None:
            os.environ["VSSL_LISTENER"] = str(door.detach())
        torch.set_num_threads(1)
        dist.init("cpu", timeout_s=120)
        result = fn(*args)
        dist.barrier()
        torch.distributed.destroy_process_group()
        pipe.send((True, result))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        raise SystemExit(1) from None


def _collect(processes: list[BaseProcess], pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in results]
            raise RankFailed(f"ranks {missing} did not finish in time")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            results[rank] = _receive(rank, processes[rank], pipes[rank])
    for rank, process in enumerate(processes):
        process.join(timeout=30)
        if process.exitcode:
            raise RankFailed(f"rank {rank} ended with exit code {process.exitcode} after its work")
    return [results[rank] for rank in range(len(pipes))]


def _receive(rank: int, process: BaseProcess, pipe: Connection) -> Any:
    try:
        good, result = pipe.recv()
    except EOFError:
        process.join(timeout=30)
        raise RankFailed(f"rank {rank} died with exit code {process.exitcode}") from None
    if not good:
        raise RankFailed(f"rank {rank}:\n{result}")
    return result
