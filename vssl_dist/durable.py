"""Files that are either absent, or whole and on disk, and never somebody else's choice of place.

A link is followed only where this user (or root) made it: in a folder that others may write to,
or that somebody handed over, a link would otherwise say which of this user's files to replace.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pwd
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4


def publish(path: Path, data: bytes) -> None:
    """Write ``data`` so that whoever sees ``path`` sees all of it, also after a power cut.

    The folder is made if needed; where ``path`` is a link, what it points to is replaced.

    Raises:
        OSError: Naming ``path``, and nothing is left behind: the disk is full, it is a folder, a
            device or a pipe, which renaming would replace, or a link of another user.
    """
    target = followed(path)
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


def publish_inside(path: Path, data: bytes) -> None:
    """`publish` to a folder that somebody may have handed over, and to nowhere else.

    Raises:
        OSError: As of `publish`, or ``path`` is a link out of its folder.
    """
    refuse_way_out(path)
    publish(path, data)


def refuse_way_out(path: Path) -> None:
    """Refuse a link out of its folder, whoever made it: an archive's belong to who unpacked it.

    Raises:
        OSError: Naming ``path`` and the remedy.
    """
    if path.is_symlink() and not followed(path).is_relative_to(followed(path.parent)):
        raise OSError(errno.EPERM, "is a link that leads out of its folder: remove it", str(path))


def open_append(path: Path) -> BinaryIO:
    """Open a file to add to, unbuffered; it and its folder are made if needed.

    Raises:
        OSError: Naming ``path``: it is no regular file, or a link of another user.
    """
    target = followed(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Opening a pipe that nobody reads would wait.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(target, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is there already and no regular file", str(path))
    return os.fdopen(descriptor, "a+b", buffering=0)


def followed(path: Path) -> Path:
    """Where a file is written that is named ``path``: the end of its links.

    Raises:
        OSError: Naming ``path``: it, its folder, or what they point to is a link that neither
            this user nor root made; or its links go in a circle.
    """
    try:
        target = path.resolve()
    except RuntimeError as error:  # which is what Python says of links in a circle
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error
    for link in _links(path.parent) + _links(path):
        owner = link.lstat().st_uid
        if owner not in (os.geteuid(), 0):
            reason = f"{link} is a link that {user_name(owner)} made: remove it"
            raise OSError(errno.EPERM, reason, str(path))
    return target


def user_name(uid: int) -> str:
    """What a user is called on this machine.

    >>> user_name(0)
    'root'
    """
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _links(path: Path) -> list[Path]:
    """The links that a name stands for, each pointing to the next; none if it is no link."""
    links = []
    while path.is_symlink():
        links.append(path)
        path = path.parent / path.readlink()
    return links


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
