"""Reading archives in place: members are found by offset and never extracted by name.

Only regular members count.  Links, devices, sparse files, names that lead out of a folder and
sizes beyond any image are flaws of a member; a header that cannot be parsed, a member that is
cut short and an archive without an end are damage of the whole.  What follows an end is another
archive, which is read as well (as by ``tar --ignore-zeros``), or damage.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vssl_dist.durable import open_regular_file
from vssl_dist.errors import DataError

from ..images.signatures import (
    FILE_HEAD_BYTES,
    has_picture_signature,
    has_picture_suffix,
)
from .bounded_streams import FileWindow, GzipStream

MAX_BYTES = 1 << 28
"""Size of an image file: more than any needs that `images.examine.MAX_PIXELS` lets through."""

_DAMAGE_ERRORS = (
    tarfile.TarError, zlib.error, OSError, EOFError, ValueError, ArithmeticError, LookupError,
    RecursionError,
)  # fmt: skip
"""Errors that a damaged archive raises: its reader trusts what it reads."""


class ArchiveError(DataError):
    """Error of an archive that cannot be read to its end."""

    flaw = ""
    """Why the archive cannot be read, without its path."""

    @classmethod
    def of(cls, path: Path, flaw: str, remedy: str = "") -> ArchiveError:
        """Make the error of an archive."""
        error = cls(f"{path}: {flaw}" + (f": {remedy}" if remedy else ""))
        error.flaw = flaw
        return error


@dataclass(frozen=True)
class ArchiveMember:
    """A member of an archive that is not a folder."""

    name: str
    offset: int
    """Position of its first byte, from the start of the file."""
    size: int
    flaw: str
    """Why the member must not be read; "" if it may."""


def iter_members(path: Path, start: int = 0, size: int | None = None) -> Iterator[ArchiveMember]:
    """Yield the members of an uncompressed archive, except folders, in its order.

    Args:
        path: The file.
        start: Where in it the archive begins, for an archive within an archive.
        size: Bytes of the archive; None for the rest of the file.

    Raises:
        DataError: It cannot be read, is damaged, or ends too early.
    """
    with _open_archive(path) as file, damage_as_archive_error(path):
        file_bytes = os.fstat(file.fileno()).st_size
        window = FileWindow(file.fileno(), start, file_bytes - start if size is None else size)
        for member in _iter_member_headers(window):
            member_end = member.offset_data + (0 if member.issparse() else member.size)
            if member_end > window.size:
                raise tarfile.ReadError(f"{member.name} is cut short")
            if not member.isdir():
                offset = start + member.offset_data
                yield ArchiveMember(member.name, offset, member.size, _member_flaw(member))


def holds_picture(path: Path, member: ArchiveMember) -> bool:
    """Tell whether a member is a picture, or is called one, or must not be looked at.

    Raises:
        DataError: The archive cannot be read.
    """
    if PurePosixPath(member.name).name.startswith("."):
        return False
    return (
        bool(member.flaw)
        or has_picture_suffix(member.name)
        or has_picture_signature(read_member_head(path, member))
    )


def read_member_head(path: Path, member: ArchiveMember) -> bytes:
    """Read the first bytes of a sound member: as many as tell what it is.

    Raises:
        DataError: The archive cannot be read.
    """
    with _open_archive(path) as file, damage_as_archive_error(path):
        return os.pread(file.fileno(), min(member.size, FILE_HEAD_BYTES), member.offset)


def read_gzipped_members(
    archive: Path, names: Sequence[str], max_member_bytes: int
) -> dict[str, bytes]:
    """Read regular members of a ``.tar.gz`` by their exact names, into memory.

    Args:
        archive: The file.
        names: Which members; those that are not there are left out.
        max_member_bytes: Larger members are left out.

    Raises:
        DataError: The archive cannot be read or is damaged.
    """
    content_by_name: dict[str, bytes] = {}
    with (
        _open_archive(archive) as file,
        damage_as_archive_error(archive),
        gzip.open(file) as gzip_file,
    ):
        stream = GzipStream(gzip_file)
        # All of it is read: gzip compares its checksum only at the end.
        for member in _iter_member_headers(stream):
            if member.name in names and _is_regular(member) and member.size <= max_member_bytes:
                content_by_name[member.name] = stream.read_data(member.size)
    return content_by_name


def file_stamp(path: Path) -> str:
    """Make a text that changes when a file is replaced or written to, without reading it.

    Raises:
        DataError: The file is not there.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def _iter_member_headers(stream: FileWindow | GzipStream) -> Iterator[tarfile.TarInfo]:
    """Yield all members of an archive, in little memory however many and however described."""
    start: int | None = 0
    while start is not None:
        stream.seek(start)
        stream.allow_next_member()
        with tarfile.open(fileobj=stream, mode="r:") as tar:  # type: ignore[call-overload]
            yield from _iter_members_within_bounds(tar, stream)
            archive_end = tar.offset
        stream.seek(archive_end)
        # The reader takes any nonsense between members for the end.
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            if archive_end == start > 0:
                raise tarfile.ReadError(
                    f"what follows its end, from byte {archive_end} on, is no archive"
                )
            raise tarfile.ReadError("it has no end, or a damaged header")
        next_data_offset = stream.find_nonzero(archive_end)
        start = (
            None
            if next_data_offset is None
            else next_data_offset - (next_data_offset - archive_end) % tarfile.BLOCKSIZE
        )


def _iter_members_within_bounds(
    tar: tarfile.TarFile, stream: FileWindow | GzipStream
) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        # A negative size would send the reader backwards, for ever.
        if member.size < 0:
            raise tarfile.ReadError(f"{member.name} has no size")
        yield member
        # Or it would remember every member of a large archive.
        tar.members = []  # type: ignore[attr-defined]
        stream.allow_next_member()


def _is_regular(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()


def _member_flaw(member: tarfile.TarInfo) -> str:
    if not _is_regular(member):
        type_names = {
            tarfile.SYMTYPE: "a symbolic link",
            tarfile.LNKTYPE: "a hard link",
            tarfile.CHRTYPE: "a device",
            tarfile.BLKTYPE: "a device",
            tarfile.FIFOTYPE: "a pipe",
        }
        type_name = (
            "a sparse file" if member.issparse() else type_names.get(member.type, "something else")
        )
        return f"{type_name} and not a regular member"
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or not member.name.isprintable():
        return "a name that leads out of its folder or cannot be printed"
    if member.size > MAX_BYTES:
        return f"{member.size} bytes are more than the limit of {MAX_BYTES}"
    return ""


def _open_archive(path: Path) -> io.BufferedReader:
    try:
        return open_regular_file(path)
    except OSError as error:
        raise ArchiveError.of(path, f"cannot be read ({error.strerror})") from error


@contextmanager
def damage_as_archive_error(path: Path) -> Iterator[None]:
    """Raise whatever reading a damaged archive raises as an error that names the archive.

    Raises:
        ArchiveError: The archive is damaged or cannot be read.
    """
    try:
        yield
    except DataError:
        raise
    except _DAMAGE_ERRORS as error:
        if isinstance(error, OSError) and error.errno:  # storage's; gzip's own has no number
            raise ArchiveError.of(path, f"cannot be read ({error.strerror})") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ArchiveError.of(path, f"damaged archive ({reason})", "fetch it again") from error
