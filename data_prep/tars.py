"""Reading archives in place: members are found by offset and never extracted by name.

Only regular members count.  Links, devices, sparse files, names that lead out of a folder and
sizes beyond any image are flaws of a member; a header that cannot be parsed, a member that is
cut short and an archive without an end are damage of the whole.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from data_prep.split import Raw
from data_prep.streams import Unzipped, Window
from vssl_dist.data.manifest import DataError

MAX_BYTES = 1 << 28
"""Of one image file: more than any that `data_prep.images.MAX_PIXELS` lets through needs."""

_DAMAGE = (
    tarfile.TarError, zlib.error, OSError, EOFError, ValueError, ArithmeticError, LookupError,
    RecursionError, MemoryError,
)  # fmt: skip
"""As which a damaged archive surfaces: its reader trusts what it reads."""


@dataclass(frozen=True)
class Member:
    """A member of an archive that is not a folder."""

    name: str
    offset: int
    """Of its first byte, from the start of the file."""
    size: int
    flaw: str
    """Why it must not be read ("" = it may)."""


@dataclass(frozen=True)
class Spans:
    """Images that are stretches of files: picklable, and read only when iterated."""

    files: tuple[Path, ...]
    file: NDArray[np.int64]
    """``(N,)``: which of the files."""
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    names: Sequence[str]
    flaws: Mapping[int, str]
    """By row."""

    @classmethod
    def of(cls, files: Sequence[Path], found: Sequence[tuple[int, Member]]) -> Spans:
        """The table of members, each given with the number of its file."""
        columns = [(file, member.offset, member.size) for file, member in found]
        table = np.array(columns, np.int64).reshape(-1, 3)
        flaws = {row: member.flaw for row, (_, member) in enumerate(found) if member.flaw}
        names = [member.name for _, member in found]
        return cls(tuple(files), table[:, 0], table[:, 1], table[:, 2], names, flaws)

    def take(self, which: NDArray[np.int64]) -> Spans:
        """Some rows, in a given order."""
        rows = which.tolist()
        flaws = {at: self.flaws[row] for at, row in enumerate(rows) if row in self.flaws}
        names = [self.names[row] for row in rows]
        columns = (self.file[which], self.offset[which], self.size[which])
        return Spans(self.files, *columns, names, flaws)

    def __iter__(self) -> Iterator[Raw]:
        opened, stream = -1, None
        try:
            places = zip(self.file.tolist(), self.offset.tolist(), self.size.tolist(), strict=True)
            for row, (file, offset, size) in enumerate(places):
                if flaw := self.flaws.get(row, ""):
                    yield Raw(b"", flaw=flaw)
                    continue
                path = self.files[file]
                if file != opened or stream is None:
                    if stream is not None:
                        stream.close()
                    opened, stream = file, _opened(path)
                data = os.pread(stream.fileno(), size, offset)
                if len(data) < size:
                    raise DataError(f"{path}: cut short at {self.names[row]}: fetch it again")
                yield Raw(data, f"{path}/{self.names[row]}")
        finally:
            if stream is not None:
                stream.close()


def members(path: Path, start: int = 0, size: int | None = None) -> Iterator[Member]:
    """What an uncompressed archive holds besides folders, in its order.

    Args:
        path: The file.
        start: Where in it the archive begins, for an archive within an archive.
        size: Bytes of the archive; None for the rest of the file.

    Raises:
        DataError: It cannot be read, is damaged, or ends too early.
    """
    with _opened(path) as file:
        whole = os.fstat(file.fileno()).st_size
        window = Window(file.fileno(), start, whole - start if size is None else size)
        with _named(path), tarfile.open(fileobj=window, mode="r:") as tar:  # type: ignore[call-overload]
            for member in _headers(tar, window):
                end = member.offset_data + (0 if member.issparse() else member.size)
                if end > window.size:
                    raise tarfile.ReadError(f"{member.name} is cut short")
                if not member.isdir():
                    offset = start + member.offset_data
                    yield Member(member.name, offset, member.size, _flaw(member))
            window.seek(tar.offset)
            # The reader takes any nonsense between members for the end.
            if window.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it has no end, or a damaged header")


def gzipped(archive: Path, names: Sequence[str], limit: int) -> dict[str, bytes]:
    """Regular members of a ``.tar.gz`` by their exact names, in memory.

    Args:
        archive: The file.
        names: Which members; those that are not there are left out.
        limit: Larger members are left out.

    Raises:
        DataError: The archive cannot be read or is damaged.
    """
    found: dict[str, bytes] = {}
    with _opened(archive) as file, _named(archive), gzip.open(file) as whole:
        stream = Unzipped(whole)
        with tarfile.open(fileobj=stream, mode="r:") as tar:  # type: ignore[call-overload]
            for member in _headers(tar, stream):
                if member.name in names and _regular(member) and member.size <= limit:
                    found[member.name] = stream.take(member.size)
        whole.seek(0, io.SEEK_END)  # gzip compares its checksum only at the end
    return found


def stamp(path: Path) -> str:
    """What changes when a file is replaced or written to, without reading it.

    Raises:
        DataError: It is not there.
    """
    try:
        facts = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns} {facts.st_ino}"


def _headers(tar: tarfile.TarFile, stream: Window | Unzipped) -> Iterator[tarfile.TarInfo]:
    """All members of an archive, in little memory however many and however described."""
    for member in tar:
        # A negative size would send the reader backwards, for ever.
        if member.size < 0:
            raise tarfile.ReadError(f"{member.name} has no size")
        yield member
        # Or it would remember every member of a large archive.
        tar.members = []  # type: ignore[attr-defined]
        stream.described()


def _regular(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()


def _flaw(member: tarfile.TarInfo) -> str:
    if not _regular(member):
        kinds = {
            tarfile.SYMTYPE: "a symbolic link",
            tarfile.LNKTYPE: "a hard link",
            tarfile.CHRTYPE: "a device",
            tarfile.BLKTYPE: "a device",
            tarfile.FIFOTYPE: "a pipe",
        }
        kind = "a sparse file" if member.issparse() else kinds.get(member.type, "something else")
        return f"{kind} and not a regular member"
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or not member.name.isprintable():
        return "a name that leads out of its folder or cannot be printed"
    if member.size > MAX_BYTES:
        return f"{member.size} bytes are more than the limit of {MAX_BYTES}"
    return ""


def _opened(path: Path) -> io.FileIO:
    try:
        return io.FileIO(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say of which archive something is wrong, whatever reading it raises."""
    try:
        yield
    except DataError:
        raise
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: damaged archive ({reason}): fetch it again") from error
