"""What `tarfile` is given to read, so that no header can make it take much memory or run back.

It reads as many bytes as a header says there are, and goes on with whatever these say: links of
a chain and pieces of a sparse file may be without number.
"""

from __future__ import annotations

import errno
import gzip
import io
import os
import tarfile

_MAX_HEADER = 1 << 20
"""Of all that describes one member: far beyond any name, and little memory."""
_PIECE = 1 << 20
"""So much is read at a time; zeros are looked through in such pieces."""


class _BoundedHeaders:
    """A stream whose reads are headers, all those of one member together of bounded size."""

    def __init__(self) -> None:
        self._left = _MAX_HEADER

    def described(self) -> None:
        """Let what follows be about another member."""
        self._left = _MAX_HEADER

    def _charge(self, size: int) -> None:
        if not 0 <= size <= self._left:
            raise tarfile.ReadError("a header of impossible length")
        self._left -= size


class FileWindow(_BoundedHeaders):
    """A stretch of a file."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._start = start
        self._at = 0
        self.size = size

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; refuses what no header needs."""
        self._charge(size)
        wanted = max(0, min(size, self.size - self._at))
        data = os.pread(self._descriptor, wanted, self._start + self._at)
        self._at += len(data)
        return data

    def seek(self, offset: int) -> int:
        """Go to ``offset`` within the stretch."""
        self._at = offset
        return offset

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def past_zeros(self, start: int) -> int | None:
        """Where the first byte from ``start`` on is that is not zero; None if there is none."""
        at = start
        while at < self.size:
            try:
                # Holes of a sparse file need not be read.
                at = max(
                    at, os.lseek(self._descriptor, self._start + at, os.SEEK_DATA) - self._start
                )
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return None
            piece = os.pread(self._descriptor, min(_PIECE, self.size - at), self._start + at)
            if not piece:
                return None
            if rest := piece.lstrip(b"\0"):
                return at + len(piece) - len(rest)
            at += len(piece)
        return None


class GzipStream(_BoundedHeaders):
    """What a compressed file unpacks to, of which no more than a piece is ever in memory."""

    def __init__(self, whole: gzip.GzipFile) -> None:
        super().__init__()
        self._whole = whole

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; refuses what no header needs."""
        self._charge(size)
        return self._whole.read(size)

    def seek(self, offset: int) -> int:
        """Go to ``offset``, which unpacks all before it."""
        return self._whole.seek(offset)

    def tell(self) -> int:
        """Where the next read begins."""
        return self._whole.tell()

    def past_zeros(self, start: int) -> int | None:
        """Where the first byte from ``start`` on is that is not zero; None if there is none."""
        self._whole.seek(start)
        while piece := self._whole.read(tarfile.BLOCKSIZE):
            if rest := piece.lstrip(b"\0"):
                return self._whole.tell() - len(rest)
        return None

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes, which are no header: memory for those that are there."""
        taken = io.BytesIO()
        while taken.tell() < size:
            piece = self._whole.read(min(_PIECE, size - taken.tell()))
            if not piece:
                raise tarfile.ReadError("it is cut short")
            taken.write(piece)
        return taken.getvalue()
