"""Files that are uploaded: those of the run folder, and no others."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath

_READ_ONLY_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


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
        descriptor = _open_inside_run(run_dir, relative_path, stack)
        link_folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vssl-")))
        link_path = link_folder / PurePosixPath(relative_path).name
        link_path.symlink_to(f"/proc/self/fd/{descriptor}")
        yield link_path


def _open_inside_run(run_dir: Path, relative_path: str, stack: ExitStack) -> int:
    """Open each folder on the way inside the one before, then the file."""
    path_parts = PurePosixPath(relative_path).parts
    leads_outside = ".." in path_parts or relative_path.startswith("/")
    if not path_parts or "\0" in relative_path or leads_outside:
        raise OSError(errno.EINVAL, "is no place inside of the run folder")
    descriptor = _open_descriptor(run_dir.resolve(), os.O_DIRECTORY, None, stack)
    for folder_name in path_parts[:-1]:
        if not stat.S_ISDIR(_stat_in_folder(folder_name, descriptor).st_mode):
            raise OSError(errno.ENOTDIR, f"{folder_name} is a link or no folder")
        descriptor = _open_descriptor(folder_name, os.O_DIRECTORY, descriptor, stack)
    # Asked before it is opened: opening a device may do something.
    if not stat.S_ISREG(_stat_in_folder(path_parts[-1], descriptor).st_mode):
        raise OSError(errno.EINVAL, "is a link or no regular file")
    descriptor = _open_descriptor(path_parts[-1], 0, descriptor, stack)
    file_stat = os.fstat(descriptor)
    if not stat.S_ISREG(file_stat.st_mode):
        raise OSError(errno.EINVAL, "is no regular file")
    if file_stat.st_nlink > 1 and not _is_public_picture(descriptor, file_stat):
        raise OSError(
            errno.EPERM, "is a second name (a hard link) of another file: put a copy in its place"
        )
    return descriptor


def _is_public_picture(descriptor: int, file_stat: os.stat_result) -> bool:
    others_may_read = bool(file_stat.st_mode & (stat.S_IRGRP | stat.S_IROTH))
    return others_may_read and os.pread(descriptor, len(_PNG_SIGNATURE), 0) == _PNG_SIGNATURE


def _stat_in_folder(name: str, folder_descriptor: int) -> os.stat_result:
    try:
        return os.stat(name, dir_fd=folder_descriptor, follow_symlinks=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "is no file") from error


def _open_descriptor(
    name: str | Path, flags: int, folder_descriptor: int | None, stack: ExitStack
) -> int:
    descriptor = os.open(name, _READ_ONLY_FLAGS | flags, dir_fd=folder_descriptor)
    stack.callback(os.close, descriptor)
    return descriptor
