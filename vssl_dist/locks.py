"""Locks that only their owner can hold, and that say who has them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil
from filelock import FileLock

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
        file = path.stat()
        held = Path("/proc/locks").read_text()
    except OSError:
        return "another process"
    device = (os.major(file.st_dev), os.minor(file.st_dev))
    for pid, major, minor, inode in _HELD.findall(held):
        if int(inode) == file.st_ino and (int(major, 16), int(minor, 16)) == device:
            return _process(int(pid))
    return "a process on another machine"


def _process(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        return f"process {pid} of {process.username()} ({process.name()})"
    except (psutil.Error, KeyError):
        return f"process {pid}"
