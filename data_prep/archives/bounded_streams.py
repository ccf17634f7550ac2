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

_MAX_MEMBER_HEADER_BYTES = 1 << 20
"""Bytes of all headers of one member: far beyond any name, and little memory."""
_READ_PIECE_BYTES = 1 << 20
"""Bytes that are read at a time, also where zeros are looked through."""


class _BoundedHeaderStream:
    """A stream whose reads are headers, all those of one member together of bounded size."""

    def __init__(self) -> None:
        self._header_bytes_left = _MAX_MEMBER_HEADER_BYTES

    def allow_next_member(self) -> None:
        """Allow the headers of another member."""
        self._header_bytes_left = _MAX_MEMBER_HEADER_BYTES

    def _charge_header_bytes(self, size: int) -> None:
        if not 0 <= size <= self._header_bytes_left:
            raise tarfile.ReadError("a header of impossible length")
        self._header_bytes_left -= size


class FileWindow(_BoundedHeaderStream):
    """A stretch of a file, as a stream of bounded headers."""

    def __init__(self, file_descriptor: int, start: int, size: int) -> None:
        super().__init__()
        self._file_descriptor = file_descriptor
        self._start = start
        self._position_in_window = 0
        self.size = size

    def read(self, size: int) -> bytes:
        """Read at most ``size`` bytes; refuses more than a header needs."""
        self._charge_header_bytes(size)
        readable_bytes = max(0, min(size, self.size - self._position_in_window))
        data = os.pread(
            self._file_descriptor, readable_bytes, self._start + self._position_in_window
        )
        self._position_in_window += len(data)
        return data

    def seek(self, offset: int) -> int:
        """Go to ``offset`` within the stretch."""
        self._position_in_window = offset
        return offset

    def tell(self) -> int:
        """Return where the next read begins."""
        return self._position_in_window

    def find_nonzero(self, start: int) -> int | None:
        """Find the first byte from ``start`` on that is not zero; None if there is none."""
        position = start
        while position < self.size:
            try:
                # Holes of a sparse file need not be read.
                position = max(
                    position,
                    os.lseek(self._file_descriptor, self._start + position, os.SEEK_DATA)
                    - self._start,
                )
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return None
            piece = os.pread(
                self._file_descriptor,
                min(_READ_PIECE_BYTES, self.size - position),
                self._start + position,
            )
            if not piece:
                return None
            if piece_after_zeros := piece.lstrip(b"\0"):
                return position + len(piece) - len(piece_after_zeros)
            position += len(piece)
        return None


class GzipStream(_BoundedHeaderStream):
    """The unpacked content of a compressed file, of which only a piece is ever in memory."""

    def __init__(self, gzip_file: gzip.GzipFile) -> None:
        super().__init__()
        self._gzip_file = gzip_file

    def read(self, size: int) -> bytes:
        """Read at most ``size`` bytes; refuses more than a header needs."""
        self._charge_header_bytes(size)
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
            if piece_after_zeros := piece.lstrip(b"\0"):
                return self._gzip_file.tell() - len(piece_after_zeros)
        return None

    def read_data(self, size: int) -> bytes:
        """Read the next ``size`` bytes, which are no header, with memory for those there are."""
        data = io.BytesIO()
        while data.tell() < size:
            piece = self._gzip_file.read(min(_READ_PIECE_BYTES, size - data.tell()))
            if not piece:
                raise tarfile.ReadError("it is cut short")
            data.write(piece)
        return data.getvalue()
