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

_PARTIAL_NAME_PREFIX, _PARTIAL_NAME_DIGITS = ".tmp-", 12
_READ_PIECE_BYTES = 1 << 20
_MAX_LINK_CHAIN = 40  # as Linux does


def write_durably(path: Path, data: bytes) -> None:
    """Write ``data`` so that whoever sees ``path`` sees all of it, also after a power cut.

    The folder is made if needed; where ``path`` is a link, what it points to is replaced.

    Raises:
        OSError: Naming ``path``, and nothing is left behind: the disk is full, it is a folder, a
            device or a pipe, which renaming would replace, or a link of another user.
    """
    target_path = resolve_trusted_links(path)
    try:
        if target_path.exists() and not target_path.is_file():
            raise OSError(errno.EINVAL, "is there already and no regular file")
        target_path.parent.mkdir(parents=True, exist_ok=True)
        with open_whole_file(target_path) as file:
            file.write(data)
        sync_to_disk(target_path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextmanager
def open_whole_file(path: Path, *, flush: bool = True) -> Iterator[BinaryIO]:
    """Write a file piece by piece whose name appears with its last byte, already on disk.

    What bore the name is replaced, a link too, and not what it points to.  The new name itself
    survives a power cut only after `sync_to_disk` of its folder.

    Args:
        path: The file, in a folder that is there.
        flush: Wait for the disk; not needed for what a power cut may take.

    Raises:
        OSError: The disk is full, the folder is a link of another user, or the like; nothing is
            left behind.
    """
    _refuse_links_of_others(path, _link_chain(path.parent))
    # Nobody can have put anything there: no other process writes it, and no link awaits it.
    partial_path = path.with_name(f"{_PARTIAL_NAME_PREFIX}{uuid4().hex[:_PARTIAL_NAME_DIGITS]}")
    try:
        with partial_path.open("xb") as file:
            yield file
            if flush:
                file.flush()
                os.fsync(file.fileno())
        partial_path.replace(path)
    finally:
        with suppress(OSError):  # there is none, or the folder is a file
            partial_path.unlink()


def is_partial_file_name(name: str) -> bool:
    """Whether a file was to become another one by `open_whole_file`, or by `write_durably`.

    >>> is_partial_file_name(".tmp-0123456789ab"), is_partial_file_name(".tmp-notes")
    (True, False)
    """
    digits = name.removeprefix(_PARTIAL_NAME_PREFIX)
    return (
        digits != name
        and len(digits) == _PARTIAL_NAME_DIGITS
        and set(digits) <= set(hexdigits.lower())
    )


def append_to_file(path: Path, data: bytes) -> None:
    """Add ``data`` to the end of a file; it and its folder are made if needed.

    Raises:
        OSError: The disk is full, or as `open_append` says.
    """
    with open_append(path) as file:
        unwritten_data = memoryview(data)
        while unwritten_data:  # a disk that is nearly full takes a part
            unwritten_data = unwritten_data[file.write(unwritten_data) :]


def write_inside_folder(path: Path, data: bytes) -> None:
    """`write_durably` to a folder that somebody may have handed over, and to nowhere else.

    Raises:
        OSError: As of `write_durably`, or ``path`` is a link out of its folder.
    """
    refuse_link_out_of_folder(path)
    write_durably(path, data)


def refuse_link_out_of_folder(path: Path) -> None:
    """Refuse a link out of its folder, whoever made it: an archive's belong to who unpacked it.

    Raises:
        OSError: Naming ``path`` and the remedy.
    """
    if path.is_symlink() and not resolve_trusted_links(path).is_relative_to(
        resolve_trusted_links(path.parent)
    ):
        raise OSError(errno.EPERM, "is a link that leads out of its folder: remove it", str(path))


def open_append(path: Path) -> BinaryIO:
    """Open a file to add to, unbuffered; it and its folder are made if needed.

    Raises:
        OSError: Naming ``path``: it is no regular file, or a link of another user or out of its
            folder.
    """
    refuse_link_out_of_folder(path)
    target_path = resolve_trusted_links(path)
    target_path.parent.mkdir(parents=True, exist_ok=True)
    # Opening a pipe that nobody reads would wait.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(target_path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is there already and no regular file", str(path))
    return os.fdopen(descriptor, "a+b", buffering=0)


def open_regular_file(path: Path) -> io.BufferedReader:
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


def read_regular_file(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file.

    Args:
        path: The file.
        max_bytes: Most bytes that it may have.

    Raises:
        OSError: It is no regular file, is larger, or cannot be read.
    """
    data = bytearray()
    with open_regular_file(path) as file:
        # In pieces: a read of so many bytes takes the memory for them, whatever there is.
        while read_piece := file.read(_READ_PIECE_BYTES):
            data += read_piece
            if len(data) > max_bytes:
                raise OSError(errno.EFBIG, f"is larger than {max_bytes} bytes", str(path))
    return bytes(data)


def resolve_trusted_links(path: Path) -> Path:
    """Where a file is written that is named ``path``: the end of its links.

    Raises:
        OSError: Naming ``path``: it, its folder, or what they point to is a link that neither
            this user nor root made; or its links go in a circle.
    """
    try:
        target_path = path.resolve()
    except RuntimeError as error:  # which is what Python says of links in a circle
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error
    _refuse_links_of_others(path, _link_chain(path.parent) + _link_chain(path))
    return target_path


def forbid_writing_by_others() -> None:
    """Have all that this process and its children make be writable by no other user; who may read
    it stays as the user's umask says."""
    os.umask(os.umask(0o077) | stat.S_IWGRP | stat.S_IWOTH)


def share_with_folder_group(path: Path) -> None:
    """Have a group write what it could replace: its file or folder in a folder of the group.

    For what several users add to, such as a database; `forbid_writing_by_others` is about runs.
    What the group may not read, or lies where only owners may rename, stays as it is.
    """
    with suppress(OSError):
        path_status, folder_status = path.stat(), path.parent.stat()
        group_may_replace = (
            folder_status.st_mode & stat.S_IWGRP and not folder_status.st_mode & stat.S_ISVTX
        )
        if (
            group_may_replace
            and path_status.st_gid == folder_status.st_gid
            and path_status.st_mode & stat.S_IRGRP
        ):
            path.chmod(stat.S_IMODE(path_status.st_mode) | stat.S_IWGRP)


def user_name(uid: int) -> str:
    """What a user is called on this machine.

    >>> user_name(0)
    'root'
    """
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _refuse_links_of_others(path: Path, links: Sequence[Path]) -> None:
    for link in links:
        owner_uid = link.lstat().st_uid
        if owner_uid not in (os.geteuid(), 0):
            reason = f"{link} is a link that {user_name(owner_uid)} made: remove it"
            raise OSError(errno.EPERM, reason, str(path))


def _link_chain(path: Path) -> list[Path]:
    """The links that a name stands for, each pointing to the next; none if it is no link."""
    links: list[Path] = []
    while path.is_symlink():
        if len(links) == _MAX_LINK_CHAIN:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        links.append(path)
        path = path.parent / path.readlink()
    return links


def sync_to_disk(path: Path) -> None:
    """Have the content of a file, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
