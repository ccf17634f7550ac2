"""One open shard: its index in memory, and its tar as a file that is read at any offset."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vssl_dist.data.store.manifest import INDEX_DTYPE, MAX_INDEX_HEADER_BYTES, ShardEntry
from vssl_dist.data.store.stall import StallWatch
from vssl_dist.errors import DataError

# The most that an image may claim before memory is allocated for it: no photograph is larger, and
# beyond that number of pixels Pillow refuses to decode.
_MAX_IMAGE_BYTES = 2**28
_MAX_IMAGE_PIXELS = 178_956_970

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class ShardFile:
    """An open shard that any number of threads may read."""

    # An unbuffered file object, not a bare descriptor: it stays open while any thread that
    # reads from it holds a reference, and is closed when the last one lets go.
    file: io.FileIO
    rows: NDArray[np.void]
    """``(samples,)`` of ``INDEX_DTYPE``, read-only."""
    path: Path
    watch: StallWatch

    @classmethod
    def open(cls, folder: Path, entry: ShardEntry, classes: int, watch: StallWatch) -> ShardFile:
        """Open the tar and load the index.

        Args:
            folder: The folder that holds both files.
            entry: What the manifest states about them.
            classes: Number of classes: labels lie below it.
            watch: Entered during every file operation.

        Raises:
            DataError: A file cannot be opened, the index is not the one of the manifest, or a
                row states what cannot be.
        """
        # The index is small and read whole rather than mapped: its digest is checked on the
        # way, and a file truncated under a running job is an error and not a SIGBUS.
        path = folder / entry.index_name
        index_row_bytes = entry.samples * INDEX_DTYPE.itemsize
        try:
            with watch(path), _open_regular_file(path) as index:
                size = os.fstat(index.fileno()).st_size
                if not index_row_bytes <= size <= index_row_bytes + MAX_INDEX_HEADER_BYTES:
                    raise DataError(f"{path}: has {size} bytes for {entry.samples} samples")
                index_bytes = index.readall()
            with watch(folder / entry.name):
                file = _open_regular_file(folder / entry.name)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be opened ({error.strerror})") from error
        if hashlib.sha256(index_bytes).hexdigest() != entry.index_sha256:
            raise DataError(f"{path}: not the index of this manifest (run data_prep/verify.py)")
        rows = _parse_index(index_bytes, path, entry)
        _check_index_rows(rows, path, entry, classes)
        return cls(file, rows, folder / entry.name, watch)

    def read(self, row: int) -> Bytes:
        """Read the encoded image of a row; it is short only if the file was cut.

        Returns:
            ``(size,)`` uint8, writable.

        Raises:
            OSError: Storage fails.
        """
        offset, size = self.rows[row].item()[:2]
        data = np.empty(size, np.uint8)
        num_bytes_read = 0
        with self.watch(self.path):
            while num_bytes_read < size:  # the kernel may return less than is asked for
                num_new_bytes = os.preadv(
                    self.file.fileno(), [data.data[num_bytes_read:]], offset + num_bytes_read
                )
                if num_new_bytes == 0:
                    break
                num_bytes_read += num_new_bytes
        return data[:num_bytes_read]

    def read_checked(self, row: int) -> tuple[Bytes, str]:
        """Read the encoded image of a row, and say what is wrong with it ("" = nothing).

        Raises:
            OSError: Storage fails.
        """
        _, size, height, width, _, crc32 = self.rows[row].item()
        if size > _MAX_IMAGE_BYTES or not 0 < height * width <= _MAX_IMAGE_PIXELS:
            return np.empty(0, np.uint8), f"claims {height} x {width} pixels in {size} bytes"
        image = self.read(row)
        if len(image) < size:
            return image, "cut short"
        if zlib.crc32(image.data) != crc32:
            return image, "crc32 differs"
        return image, ""


def _open_regular_file(path: Path) -> io.FileIO:
    """Open a regular file; a device, a pipe or a folder is refused."""
    file = io.FileIO(path)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DataError(f"{path}: not a regular file")
    return file


def _parse_index(index_bytes: bytes, path: Path, entry: ShardEntry) -> NDArray[np.void]:
    """Return the rows of an index, whose numpy header must be the one that sharding writes.

    The header is compared, not parsed.  numpy would parse it as Python source, which CPython 3.11
    cannot do in two threads at once, and would believe whatever sizes it states.
    """
    expected_header = io.BytesIO()
    header_fields = {"descr": INDEX_DTYPE.descr, "fortran_order": False, "shape": (entry.samples,)}
    np.lib.format.write_array_header_1_0(expected_header, header_fields)
    header_bytes = len(index_bytes) - entry.samples * INDEX_DTYPE.itemsize
    # How many blanks pad the header depends on the version of numpy.
    if _strip_header_padding(index_bytes[:header_bytes]) != _strip_header_padding(
        expected_header.getvalue()
    ):
        raise DataError(
            f"{path}: not an index of {entry.samples} samples, sized as the manifest says: shard "
            "the data anew"
        )
    return np.frombuffer(index_bytes, INDEX_DTYPE, entry.samples, header_bytes)


def _strip_header_padding(header: bytes) -> tuple[bytes, bytes]:
    """Return the magic string and the dictionary of a numpy header, without length and blanks."""
    return header[:8], header[10:].replace(b" ", b"")


def _check_index_rows(rows: NDArray[np.void], path: Path, entry: ShardEntry, classes: int) -> None:
    """Refuse rows that point outside their tar, or have a label that is no class (-1: none)."""
    tar_bytes = np.uint64(entry.bytes)
    # Subtracted and not added: the sum of a hostile offset and size would wrap around.
    is_outside_tar = (rows["size"] > tar_bytes) | (rows["offset"] > tar_bytes - rows["size"])
    if is_outside_tar.any():
        raise DataError(
            f"{path}: row {is_outside_tar.argmax()} points outside the {entry.bytes} bytes of "
            f"{entry.name}: shard the data anew"
        )
    has_unknown_label = (rows["label"] < -1) | (rows["label"] >= classes)
    if has_unknown_label.any():
        row = int(has_unknown_label.argmax())
        raise DataError(
            f"{path}: row {row} has label {rows['label'][row]}, and there are {classes} classes: "
            "shard the data anew"
        )
