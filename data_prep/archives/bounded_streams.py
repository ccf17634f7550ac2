"""Streams for `tarfile`, through which no header can make it take much memory or run back.

It reads as many bytes as a header says there are, and goes on with whatever these say: links of
a chain and pieces of a sparse file may be without number.
"""

from __future__ import annotations

import errno
import gzip
import io
import os
import tarfile

_MAX_HEADER_BYTES = 1 << 20
"""Bytes of all headers of one member: far beyond any name, and little memory."""
_PIECE_BYTES = 1 << 20
"""Bytes that are read at a time, also where zeros are looked through."""


class _BoundedHeaders:
    """A stream whose reads are headers, all those of one member together of bounded size."""

    def __init__(self) -> None:
        self._bytes_left = _MAX_HEADER_BYTES

    def begin_member(self) -> None:
        """Allow the headers of another member."""
        self._bytes_left = _MAX_HEADER_BYTES

    def _charge(self, size: int) -> None:
        if not 0 <= size <= self._bytes_left:
            raise tarfile.ReadError("a header of impossible length")
        self._bytes_left -= size


class FileWindow(_BoundedHeaders):
    """A stretch of a file, as a stream of bounded headers."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._start = start
        self._position = 0
        self.size = size

    def read(self, size: int) -> bytes:
        """Read at most ``size`` bytes; refuses more than a header needs."""
        self._charge(size)
        readable = max(0, min(size, self.size - self._position))
        data = os.pread(self._descriptor, readable, self._start + self._position)
        self._position += len(data)
        return data

    def seek(self, offset: int) -> int:
        """Go to ``offset`` within the stretch."""
        self._position = offset
        return offset

    def tell(self) -> int:
        """Return where the next read begins."""
        return self._position

    def find_nonzero(self, start: int) -> int | None:
        """Find the first byte from ``start`` on that is not zero; None if there is none."""
        position = start
        while position < self.size:
            try:
                # Holes of a sparse file need not be read.
                position = max(
                    position,
                    os.lseek(self._descriptor, self._start + position, os.SEEK_DATA) - self._start,
                )
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return None
            piece = os.pread(
                self._descriptor, min(_PIECE_BYTES, self.size - position), self._start + position
            )
            if not piece:
                return None
            if after_zeros := piece.lstrip(b"\0"):
                return position + len(piece) - len(after_zeros)
            position += len(piece)
        return None


class GzipStream(_BoundedHeaders):
    """The unpacked content of a compressed file, of which only a piece is ever in memory."""

    def __init__(self, gzip_file: gzip.GzipFile) -> None:
        super().__init__()
        self._gzip_file = gzip_file

    def read(self, size: int) -> bytes:
        """Read at most ``size`` bytes; refuses more than a header needs."""
        self._charge(size)
        return self._gzip_file.read(size)

    def seek(self, offset: int) -> int:
        """Go to ``offset``, which unpacks all before it."""
        return self._gzip_file.seek(offset)

    def tell(self) -> int:
        """Return where the next read begins."""
        return self._gzip_file.tell()

    def find_nonzero(self, start: int) -> int | None:
        """Find the first byte from ``start`` on that is not zero; None if there is none."""
        self._gzip_file.seek(start)
        while piece := self._gzip_file.read(tarfile.BLOCKSIZE):
            if after_zeros := piece.lstrip(b"\0"):
                return self._gzip_file.tell() - len(after_zeros)
        return None

    def read_data(self, size: int) -> bytes:
        """Read the next ``size`` bytes, which are no header, with memory for those there are."""
        data = io.BytesIO()
        while data.tell() < size:
            piece = self._gzip_file.read(min(_PIECE_BYTES, size - data.tell()))
            if not piece:
                raise tarfile.ReadError("it is cut short")
            data.write(piece)
        return data.getvalue()
