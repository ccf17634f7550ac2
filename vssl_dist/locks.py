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
MAX_LOCK_WAIT_S = 86_400.0
"""Seconds that `hold_lock` waits: what this user's own processes compute may take hours."""
_LOCK_POLL_S = 5.0
_PRIVATE_FILE_MODE = 0o600
_PROC_LOCK_PATTERN = re.compile(
    r"^\d+: (?:FLOCK|POSIX|OFDLCK) +\w+ +WRITE +(-?\d+) +(\w+):(\w+):(\d+) ", re.M
)


def make_private_lock(path: Path) -> FileLock:
    """Return a lock, not yet held, in a file that other users cannot open.

    Whoever may read a file can lock it: an older one that others may read is closed to them.
    """
    try:
        status = path.lstat()
        if status.st_uid == os.geteuid() and not path.is_symlink() and status.st_mode & 0o077:
            path.chmod(_PRIVATE_FILE_MODE)
    except FileNotFoundError:
        pass
    return FileLock(path, mode=_PRIVATE_FILE_MODE)


def describe_lock_holder(path: Path) -> str:
    """Say who holds a lock, for the line that tells why one waits."""
    try:
        pid = _find_holder_pid(path)
    except OSError:
        return "another process"
    return "a process on another machine" if pid is None else _describe_process(pid)


def is_held_by_other_user(path: Path) -> bool:
    """Whether a process of another user holds a lock that is not in that user's own folder."""
    try:
        pid = _find_holder_pid(path)
        return pid is not None and psutil.Process(pid).uids().real not in {
            0,
            os.geteuid(),
            path.parent.stat().st_uid,
        }
    except (OSError, psutil.Error):
        return False


@contextmanager
def hold_lock(path: Path, max_wait_s: float = MAX_LOCK_WAIT_S) -> Iterator[None]:
    """Hold a lock, waiting for whoever has it; a line says who that is and how long it waits.

    Raises:
        OSError: Naming ``path``: it is a stranger's, still somebody's after ``max_wait_s``, or
            cannot be opened.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "is a link and no lock: remove it", str(path))
    lock = make_private_lock(path)
    deadline = time.monotonic() + max_wait_s
    announced_description = ""
    while True:
        try:
            remaining_wait_s = max(0.0, deadline - time.monotonic())
            lock.acquire(
                timeout=min(_LOCK_POLL_S, remaining_wait_s) if announced_description else 0
            )
            break
        except Timeout:
            holder_description = describe_lock_holder(path)
        except PermissionError as error:
            reason = f"is a lock of {user_name(path.lstat().st_uid)}: remove it"
            raise OSError(errno.EACCES, reason, str(path)) from error
        if is_held_by_other_user(path):
            raise OSError(
                errno.EAGAIN, f"is held by {holder_description}: have it stopped", str(path)
            )
        if time.monotonic() > deadline:
            reason = f"is still held by {holder_description}: stop it, or wait for it"
            raise OSError(errno.EAGAIN, reason, str(path))
        if holder_description != announced_description:
            announced_description = holder_description
            shown_path = printable(str(path))
            max_wait_hours = max_wait_s / 3600
            _log.info(
                "waiting, %g h at most, for %s, which has %s",
                max_wait_hours,
                holder_description,
                shown_path,
            )
    try:
        yield
    finally:
        lock.release()


def _find_holder_pid(path: Path) -> int | None:
    """Return the process that holds a lock, or None if it is not one of this machine."""
    lock_status, proc_locks = path.stat(), Path("/proc/locks").read_text()
    device_numbers = (os.major(lock_status.st_dev), os.minor(lock_status.st_dev))
    for pid, major, minor, inode in _PROC_LOCK_PATTERN.findall(proc_locks):
        if int(inode) == lock_status.st_ino and (int(major, 16), int(minor, 16)) == device_numbers:
            return int(pid)
    return None


def _describe_process(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        return f"process {pid} of {process.username()} ({printable(process.name())})"
    except (psutil.Error, KeyError):
        return f"process {pid}"
