"""Files that are uploaded: those of the run folder, and no others."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_PNG = b"\x89PNG\r\n\x1a\n"


@contextmanager
def open_artifact(run_dir: Path, relative_path: str) -> Iterator[Path]:
    """Open an artifact and yield a path to it that holds whatever happens to the folder.

    The spool may be anybody's: of what it asks for only regular files inside of the folder are
    taken, reached through no link.  A file with a second name (a hard link) may be any file of this
    user's that somebody has put there.  Copies of folders have such, so pictures that others may
    read are taken all the same: no text is.

    Raises:
        OSError: It is no such file; the reason says why.
    """
    with ExitStack() as stack:
        number = _descend(run_dir, relative_path, stack)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vssl-")))
        path = folder / PurePosixPath(relative_path).name
        path.symlink_to(f"/proc/self/fd/{number}")
        yield path


def _descend(run_dir: Path, relative_path: str, stack: ExitStack) -> int:
    """Open each folder on the way inside the one before, then the file."""
    components = PurePosixPath(relative_path).parts
    leads_outside = ".." in components or relative_path.startswith("/")
    if not components or "\0" in relative_path or leads_outside:
        raise OSError(errno.EINVAL, "is no place inside of the run folder")
    number = _opened(run_dir.resolve(), os.O_DIRECTORY, None, stack)
    for folder_name in components[:-1]:
        if not stat.S_ISDIR(_lstat(folder_name, number).st_mode):
            raise OSError(errno.ENOTDIR, f"{folder_name} is a link or no folder")
        number = _opened(folder_name, os.O_DIRECTORY, number, stack)
    # Asked before it is opened: opening a device may do something.
    if not stat.S_ISREG(_lstat(components[-1], number).st_mode):
        raise OSError(errno.EINVAL, "is a link or no regular file")
    number = _opened(components[-1], 0, number, stack)
    status = os.fstat(number)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is no regular file")
    if status.st_nlink > 1 and not _is_public_picture(number, status):
        raise OSError(
            errno.EPERM, "is a second name (a hard link) of another file: put a copy in its place"
        )
    return number


def _is_public_picture(number: int, status: os.stat_result) -> bool:
    others_may_read = bool(status.st_mode & (stat.S_IRGRP | stat.S_IROTH))
    return others_may_read and os.pread(number, len(_PNG), 0) == _PNG


def _lstat(name: str, folder: int) -> os.stat_result:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "is no file") from error


def _opened(name: str | Path, flags: int, folder: int | None, stack: ExitStack) -> int:
    number = os.open(name, _FLAGS | flags, dir_fd=folder)
    stack.callback(os.close, number)
    return number
