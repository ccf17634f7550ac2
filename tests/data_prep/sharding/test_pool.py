"""The pool gives every result once, passes errors on, and notices a dead worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from data_prep.sharding import pool
from vssl_dist.errors import DataError


def square(task: int) -> Generator[int, None, int]:
    yield task
    yield 1
    return task * task


def fail_at_three(task: int) -> Generator[int, None, int]:
    yield 1
    if task == 3:
        raise DataError("three is bad")
    return task


def die_at_three(task: int) -> Generator[int, None, int]:
    yield 1
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_task_is_done_once_and_all_progress_arrives(workers: int) -> None:
    done: list[int] = []
    results = pool.run_tasks(square, range(20), workers=workers, advance=done.append)
    assert sorted(results) == [n * n for n in range(20)]
    assert sum(done) == sum(range(20)) + 20


def test_no_tasks_no_results() -> None:
    assert list(pool.run_tasks(square, [], workers=2, advance=print)) == []


def starve_at_three(task: int) -> Generator[int, None, int]:
    yield 1
    if task == 3:
        raise MemoryError("three is large")
    return task


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_reaches_the_caller(workers: int) -> None:
    for work, error in ((fail_at_three, DataError), (starve_at_three, MemoryError)):
        with pytest.raises(error, match="three is"):
            list(pool.run_tasks(work, range(9), workers=workers, advance=lambda done: None))


def test_a_worker_that_is_killed_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(DataError, match="a worker process died"):
        list(pool.run_tasks(die_at_three, range(9), workers=2, advance=lambda done: None))


ROOT = Path(__file__).parents[3]
JOB = """
import os, sys

def told(task):
    yield 1
    return sys.path, "data_prep.checks" in sys.modules, os.getcwd()
"""
PROGRAM = f"""
import os, sys
sys.path.append({str(ROOT)!r})
from pathlib import Path
from data_prep.sharding import pool
from vssl_dist.console.endings import end_in_one_line
import job

if __name__ == "__main__":
    before = dict(os.environ)
    with end_in_one_line(Path("out")) as ending:
        for path, preloaded, folder in pool.run_tasks(
            job.told, range(4), workers=2, advance=lambda done: None,
            preloaded_modules=["data_prep.checks"]
        ):
            assert set(path) == set(sys.path) and os.getcwd() not in path, path
            assert preloaded
            assert folder == os.getcwd()
        print("done")
    assert dict(os.environ) == before
    sys.exit(ending.exit_code)
"""


def started(tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    """A program elsewhere that uses the pool, in a folder full of traps."""
    program, trap_folder = tmp_path / "program", tmp_path / "here"
    for folder in (program, trap_folder):
        folder.mkdir()
    (program / "job.py").write_text(JOB)
    (program / "main.py").write_text(PROGRAM)
    for name in ("selectors", "socket", "struct", "numpy", "data_prep", "job"):
        (trap_folder / f"{name}.py").write_text("open('owned', 'w').close()\n")
    return subprocess.Popen(
        [sys.executable, str(program / "main.py")],
        cwd=trap_folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_no_worker_imports_from_the_current_folder(tmp_path: Path) -> None:
    with started(tmp_path) as process:
        out, errors = process.communicate(timeout=60)
    assert errors == ""
    assert (process.returncode, out) == (0, "done\n")
    assert not (tmp_path / "here" / "owned").exists()


def test_ctrl_c_while_workers_start_is_one_line(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import sys, time, pathlib\n"
        "if 'forkserver' in str(sys.orig_argv):\n"
        f"    pathlib.Path({str(slow / 'starting')!r}).touch()\n"
        "    time.sleep(0.5)\n"
    )
    with started(tmp_path, PYTHONPATH=str(slow)) as process:
        patience = time.monotonic() + 60
        while not (slow / "starting").exists() and time.monotonic() < patience:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (130, "", "interrupted\n")
