"""Locks that only their owner can hold, and that say who has them."""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from vssl_dist.durable import user_name
from vssl_dist.text import printable

_log = logging.getLogger(__name__)
PATIENCE_S = 86_400.0
"""How long `held` waits: what this user's own processes compute may take hours."""
_LOOK_EVERY_S = 5.0
_PRIVATE = 0o600
_HELD = re.compile(r"^\d+: (?:FLOCK|POSIX|OFDLCK) +\w+ +WRITE +(-?\d+) +(\w+):(\w+):(\d+) ", re.M)


def private_lock(path: Path) -> FileLock:
    """A lock, not yet held, in a file that other users cannot open.

    Whoever may read a file can lock it: an older one that others may read is closed to them.
    """
    try:
        before = path.lstat()
        if before.st_uid == os.geteuid() and not path.is_symlink() and before.st_mode & 0o077:
            path.chmod(_PRIVATE)
    except FileNotFoundError:
        pass
    return FileLock(path, mode=_PRIVATE)


def holder(path: Path) -> str:
    """Who holds a lock, in words: for the line that says why one waits, or does not."""
    try:
        pid = _holding(path)
    except OSError:
        return "another process"
    return "a process on another machine" if pid is None else _process(pid)


def held_by_stranger(path: Path) -> bool:
    """Whether a process of another user holds a lock that is not in that user's own folder."""
    try:
        pid = _holding(path)
        return pid is not None and psutil.Process(pid).uids().real not in {
            0,
            os.geteuid(),
            path.parent.stat().st_uid,
        }
    except (OSError, psutil.Error):
        return False


@contextmanager
def held(path: Path, within_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold a lock, after whoever has it; a line says who that is, and for how long one waits.

    Raises:
        OSError: Naming ``path``: it is a stranger's, still somebody's after ``within_s``, or
            cannot be opened.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "is a link and no lock: remove it", str(path))
    lock = private_lock(path)
    deadline, said = time.monotonic() + within_s, ""
    while True:
        try:
            left_s = max(0.0, deadline - time.monotonic())
            lock.acquire(timeout=min(_LOOK_EVERY_S, left_s) if said else 0)
            break
        except Timeout:
            who = holder(path)
        except PermissionError as error:
            reason = f"is a lock of {user_name(path.lstat().st_uid)}: remove it"
            raise OSError(errno.EACCES, reason, str(path)) from error
        if held_by_stranger(path):
            raise OSError(errno.EAGAIN, f"is held by {who}: have it stopped", str(path))
        if time.monotonic() > deadline:
            reason = f"is still held by {who}: stop it, or wait for it"
            raise OSError(errno.EAGAIN, reason, str(path))
        if who != said:
            said = who
            place = printable(str(path))
            _log.info("waiting, %g h at most, for %s, which has %s", within_s / 3600, who, place)
    try:
        yield
    finally:
        lock.release()


def _holding(path: Path) -> int | None:
    """The process that holds a lock; None: it is not one of this machine."""
    file, held = path.stat(), Path("/proc/locks").read_text()
    device = (os.major(file.st_dev), os.minor(file.st_dev))
    for pid, major, minor, inode in _HELD.findall(held):
        if int(inode) == file.st_ino and (int(major, 16), int(minor, 16)) == device:
            return int(pid)
    return None


def _process(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        return f"process {pid} of {process.username()} ({printable(process.name())})"
    except (psutil.Error, KeyError):
        return f"process {pid}"
