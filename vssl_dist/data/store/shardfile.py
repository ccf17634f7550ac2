"""One shard, opened: its index in memory and its tar as a file to read from at any place."""

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

from vssl_dist.data.store.manifest import INDEX_DTYPE, INDEX_HEADER, ShardEntry
from vssl_dist.data.store.stall import StallWatch
from vssl_dist.errors import DataError

# What an image may claim before memory is given to it: no photograph is larger, and the second
# is where Pillow refuses to decode.
_MAX_BYTES = 2**28
_MAX_PIXELS = 178_956_970

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class ShardFile:
    """A shard ready to be read, by any number of threads."""

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
            folder: Where both are.
            entry: What the manifest states about them.
            classes: How many labels there are.
            watch: Told of every file operation.

        Raises:
            DataError: A file cannot be opened, or the index is not the one of the manifest, or
                states what cannot be.
        """
        # The index is small and read whole rather than mapped: its digest is checked on the
        # way, and a file truncated under a running job is an error and not a SIGBUS.
        path = folder / entry.index_name
        least = entry.samples * INDEX_DTYPE.itemsize
        try:
            with watch(path), _regular(path) as index:
                size = os.fstat(index.fileno()).st_size
                if not least <= size <= least + INDEX_HEADER:
                    raise DataError(f"{path}: has {size} bytes for {entry.samples} samples")
                blob = index.readall()
            with watch(folder / entry.name):
                file = _regular(folder / entry.name)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be opened ({error.strerror})") from error
        if hashlib.sha256(blob).hexdigest() != entry.index_sha256:
            raise DataError(f"{path}: not the index of this manifest (run data_prep/verify.py)")
        rows = _parse(blob, path, entry)
        _check_rows(rows, path, entry, classes)
        return cls(file, rows, folder / entry.name, watch)

    def read(self, row: int) -> Bytes:
        """The encoded image of a row; short only if the file was cut.

        Returns:
            ``(size,)`` uint8, writable.

        Raises:
            OSError: Storage fails.
        """
        offset, size = self.rows[row].item()[:2]
        data = np.empty(size, np.uint8)
        done = 0
        with self.watch(self.path):
            while done < size:
                got = os.preadv(self.file.fileno(), [data.data[done:]], offset + done)
                if got == 0:
                    break
                done += got
        return data[:done]

    def checked(self, row: int) -> tuple[Bytes, str]:
        """The encoded image of a row, and what is wrong with it ("" = nothing).

        Raises:
            OSError: Storage fails.
        """
        _, size, height, width, _, crc32 = self.rows[row].item()
        if size > _MAX_BYTES or not 0 < height * width <= _MAX_PIXELS:
            return np.empty(0, np.uint8), f"claims {height} x {width} pixels in {size} bytes"
        image = self.read(row)
        if len(image) < size:
            return image, "cut short"
        if zlib.crc32(image.data) != crc32:
            return image, "crc32 differs"
        return image, ""


def _regular(path: Path) -> io.FileIO:
    """``path``, opened: a file and nothing that only looks like one."""
    file = io.FileIO(path)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DataError(f"{path}: not a regular file")
    return file


def _parse(blob: bytes, path: Path, entry: ShardEntry) -> NDArray[np.void]:
    """The rows of an index: a numpy file whose header must be the one that sharding writes.

    The header is compared, not parsed.  numpy would parse it as Python source, which CPython 3.11
    cannot do in two threads at once, and would believe whatever sizes it states.
    """
    expected = io.BytesIO()
    header = {"descr": INDEX_DTYPE.descr, "fortran_order": False, "shape": (entry.samples,)}
    np.lib.format.write_array_header_1_0(expected, header)
    start = len(blob) - entry.samples * INDEX_DTYPE.itemsize
    # How many blanks fill the header up is a matter of numpy's version.
    if _words(blob[:start]) != _words(expected.getvalue()):
        raise DataError(
            f"{path}: not an index of {entry.samples} samples, sized as the manifest says: shard "
            "the data anew"
        )
    return np.frombuffer(blob, INDEX_DTYPE, entry.samples, start)


def _words(header: bytes) -> tuple[bytes, bytes]:
    """The magic string and the dictionary of a numpy header, without its length and filling."""
    return header[:8], header[10:].replace(b" ", b"")


def _check_rows(rows: NDArray[np.void], path: Path, entry: ShardEntry, classes: int) -> None:
    """Refuse rows that point outside their tar, or have a label that is no class (-1: none)."""
    whole = np.uint64(entry.bytes)
    outside = (rows["size"] > whole) | (rows["offset"] > whole - rows["size"])
    if outside.any():
        raise DataError(
            f"{path}: row {outside.argmax()} points outside the {entry.bytes} bytes of "
            f"{entry.name}: shard the data anew"
        )
    strange = (rows["label"] < -1) | (rows["label"] >= classes)
    if strange.any():
        row = int(strange.argmax())
        raise DataError(
            f"{path}: row {row} has label {rows['label'][row]}, and there are {classes} classes: "
            "shard the data anew"
        )
