"""Files that exist only when they are whole."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vssl_dist.data.manifest import DataError

_UNFINISHED = ".*.tmp-*"


def open_regular(path: Path) -> io.BufferedReader:
    """A file that is one, opened: a pipe would be waited for, a device has no end.

    Raises:
        OSError: It is no regular file, or cannot be opened.
    """
    # Opening a pipe that nobody writes to would wait, too.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, limit: int) -> bytes:
    """The bytes of a regular file.

    Args:
        path: The file.
        limit: Most bytes that it may have.

    Raises:
        OSError: It is no regular file, is larger, or cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            told = f"{size} bytes are more than the limit of {limit}"
            raise OSError(errno.EFBIG, told, str(path))
        return file.read()


def first_bytes(path: str | Path, size: int) -> bytes:
    """How a file begins.

    Raises:
        OSError: It is no regular file, or cannot be read.
    """
    with open_regular(Path(path)) as file:
        return os.read(file.fileno(), size)


@contextmanager
def whole_file(path: Path, *, flush: bool = True) -> Iterator[BinaryIO]:
    """Write a file whose name appears with its last byte already on disk.

    The name itself survives a power cut only after `vssl_dist.durable.sync` of its folder.

    Args:
        path: The file.
        flush: Wait for the disk; not needed for what a power cut may take.

    Raises:
        DataError: The disk is full, the folder read-only, or the like.
    """
    # The process id keeps an orphan of a killed run and the run that continues it apart.
    partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            yield file
            if flush:
                file.flush()
                os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, blob: bytes, *, flush: bool = True) -> None:
    """Write ``blob`` as a `whole_file`."""
    with whole_file(path, flush=flush) as file:
        file.write(blob)


def sweep(folder: Path) -> None:
    """Remove what interrupted writers left behind."""
    for leftover in folder.glob(_UNFINISHED):
        leftover.unlink(missing_ok=True)
