"""Another user of the machine: his links, his folders, his processes.  Only root can play him."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


def link_of_nobody(link: Path, target: Path) -> None:
    """Make a link that belongs to another user."""
    link.symlink_to(target)
    os.lchown(link, NOBODY, NOBODY)


@contextmanager
def shared_folder(mode: int = 0o755, group: int = -1) -> Iterator[Path]:
    """A new folder that other users reach, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    try:
        os.chown(folder, -1, group)
        folder.chmod(mode)
        yield folder
    finally:
        shutil.rmtree(folder)


def fork_as_nobody(work: Callable[[], object], *groups: int) -> int:
    """Do something in a process of another user, who is in ``groups``, too; returns its id.

    Not a new program: the interpreter may lie where only its user can read.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setgroups(groups)
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


def done_as_nobody(work: Callable[[], object], *groups: int) -> bool:
    """Whether another user can do this, without an error."""
    _, status = os.waitpid(fork_as_nobody(work, *groups), 0)
    return os.waitstatus_to_exitcode(status) == 0


@contextmanager
def locked_by_nobody(path: Path) -> Iterator[int]:
    """Hold the lock on a file as another user, who opens it for reading; yields his process."""
    import fcntl

    ready, go = os.pipe()

    def hold() -> None:
        file = os.open(path, os.O_RDONLY)
        fcntl.flock(file, fcntl.LOCK_EX)
        os.write(go, b"1")
        signal.pause()

    pid = fork_as_nobody(hold)
    os.close(go)
    try:
        assert os.read(ready, 1) == b"1", "he could not lock it"
        yield pid
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
