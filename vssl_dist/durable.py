"""Files that are either absent, or whole and on disk, and never somebody else's choice of place.

A link is followed only where this user (or root) made it: in a folder that others may write to,
or that somebody handed over, a link would otherwise say which of this user's files to replace.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pwd
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from string import hexdigits
from typing import BinaryIO
from uuid import uuid4

_PARTIAL, _DIGITS = ".tmp-", 12
_PIECE = 1 << 20
_MOST_LINKS = 40  # as Linux does


def publish(path: Path, data: bytes) -> None:
    """Write ``data`` so that whoever sees ``path`` sees all of it, also after a power cut.

    The folder is made if needed; where ``path`` is a link, what it points to is replaced.

    Raises:
        OSError: Naming ``path``, and nothing is left behind: the disk is full, it is a folder, a
            device or a pipe, which renaming would replace, or a link of another user.
    """
    target = followed(path)
    try:
        if target.exists() and not target.is_file():
            raise OSError(errno.EINVAL, "is there already and no regular file")
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as file:
            file.write(data)
        sync(target.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextmanager
def whole_file(path: Path, *, flush: bool = True) -> Iterator[BinaryIO]:
    """Write a file piece by piece whose name appears with its last byte, already on disk.

    What bore the name is replaced, a link too, and not what it points to.  The new name itself
    survives a power cut only after `sync` of its folder.

    Args:
        path: The file, in a folder that is there.
        flush: Wait for the disk; not needed for what a power cut may take.

    Raises:
        OSError: The disk is full, the folder is a link of another user, or the like; nothing is
            left behind.
    """
    _refuse_others(path, _links(path.parent))
    # Nobody can have put anything there: no other process writes it, and no link awaits it.
    partial = path.with_name(f"{_PARTIAL}{uuid4().hex[:_DIGITS]}")
    try:
        with partial.open("xb") as file:
            yield file
            if flush:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):  # there is none, or the folder is a file
            partial.unlink()


def is_partial(name: str) -> bool:
    """Whether a file was to become another one by `whole_file`, or by `publish`.

    >>> is_partial(".tmp-0123456789ab"), is_partial(".tmp-notes")
    (True, False)
    """
    digits = name.removeprefix(_PARTIAL)
    return digits != name and len(digits) == _DIGITS and set(digits) <= set(hexdigits.lower())


def append(path: Path, data: bytes) -> None:
    """Add ``data`` to the end of a file; it and its folder are made if needed.

    Raises:
        OSError: The disk is full, or as `open_append` says.
    """
    with open_append(path) as file:
        rest = memoryview(data)
        while rest:  # a disk that is nearly full takes a part
            rest = rest[file.write(rest) :]


def publish_inside(path: Path, data: bytes) -> None:
    """`publish` to a folder that somebody may have handed over, and to nowhere else.

    Raises:
        OSError: As of `publish`, or ``path`` is a link out of its folder.
    """
    refuse_link_out_of_folder(path)
    publish(path, data)


def refuse_link_out_of_folder(path: Path) -> None:
    """Refuse a link out of its folder, whoever made it: an archive's belong to who unpacked it.

    Raises:
        OSError: Naming ``path`` and the remedy.
    """
    if path.is_symlink() and not followed(path).is_relative_to(followed(path.parent)):
        raise OSError(errno.EPERM, "is a link that leads out of its folder: remove it", str(path))


def open_append(path: Path) -> BinaryIO:
    """Open a file to add to, unbuffered; it and its folder are made if needed.

    Raises:
        OSError: Naming ``path``: it is no regular file, or a link of another user or out of its
            folder.
    """
    refuse_link_out_of_folder(path)
    target = followed(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Opening a pipe that nobody reads would wait.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(target, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is there already and no regular file", str(path))
    return os.fdopen(descriptor, "a+b", buffering=0)


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file for reading that is one: a pipe would be waited for, a device has no end.

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
    data = bytearray()
    with open_regular(path) as file:
        # In pieces: a read of so many bytes takes the memory for them, whatever there is.
        while piece := file.read(_PIECE):
            data += piece
            if len(data) > limit:
                raise OSError(errno.EFBIG, f"is larger than {limit} bytes", str(path))
    return bytes(data)


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
    _refuse_others(path, _links(path.parent) + _links(path))
    return target


def keep_others_from_writing() -> None:
    """Have all that this process and its children make be writable by no other user; who may read
    it stays as the user's umask says."""
    os.umask(os.umask(0o077) | stat.S_IWGRP | stat.S_IWOTH)


def share_as_its_folder(path: Path) -> None:
    """Have a group write what it could replace: its file or folder in a folder of the group.

    For what several users add to, such as a database; `keep_others_from_writing` is about runs.
    What the group may not read, or lies where only owners may rename, stays as it is.
    """
    with suppress(OSError):
        state, above = path.stat(), path.parent.stat()
        may_replace = above.st_mode & stat.S_IWGRP and not above.st_mode & stat.S_ISVTX
        if may_replace and state.st_gid == above.st_gid and state.st_mode & stat.S_IRGRP:
            path.chmod(stat.S_IMODE(state.st_mode) | stat.S_IWGRP)


def name_of_user(uid: int) -> str:
    """What a user is called on this machine.

    >>> name_of_user(0)
    'root'
    """
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _refuse_others(path: Path, links: Sequence[Path]) -> None:
    for link in links:
        owner = link.lstat().st_uid
        if owner not in (os.geteuid(), 0):
            reason = f"{link} is a link that {name_of_user(owner)} made: remove it"
            raise OSError(errno.EPERM, reason, str(path))


def _links(path: Path) -> list[Path]:
    """The links that a name stands for, each pointing to the next; none if it is no link."""
    links: list[Path] = []
    while path.is_symlink():
        if len(links) == _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
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
