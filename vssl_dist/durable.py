"""Files that are either absent, or whole and on disk."""

from __future__ import annotations

import errno
import hashlib
import os
from contextlib import suppress
from pathlib import Path
from uuid import uuid4


def publish(path: Path, data: bytes) -> None:
    """Write ``data`` so that whoever sees ``path`` sees all of it, also after a power cut.

    The folder is made if needed; where ``path`` is a link, what it points to is replaced.

    Raises:
        OSError: Naming ``path``, and nothing is left behind: the disk is full, or it is a
            folder, a device or a pipe, which renaming would replace.
    """
    try:
        target = path.resolve()
    except RuntimeError as error:  # which is what Python says of links in a circle
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error
    partial = target.with_name(f".tmp-{uuid4().hex[:12]}")
    try:
        if target.exists() and not target.is_file():
            raise OSError(errno.EINVAL, "is there already and no regular file")
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
        sync(target.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):  # there is none, or the folder is a file
            partial.unlink()


def sync(path: Path) -> None:
    """Have the content of a file, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file's content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
