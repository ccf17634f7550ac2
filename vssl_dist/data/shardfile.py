"""One shard, opened: its index in memory and its tar as a file to read from at any place."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vssl_dist.data.manifest import INDEX_DTYPE, DataError, ShardEntry

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class ShardFile:
    """A shard ready to be read, by any number of threads."""

    # An unbuffered file object, not a bare descriptor: it stays open while any thread that
    # reads from it holds a reference, and is closed when the last one lets go.
    file: io.FileIO
    rows: NDArray[np.void]
    """``(samples,)`` of ``INDEX_DTYPE``."""

    @classmethod
    def open(cls, folder: Path, entry: ShardEntry) -> ShardFile:
        """Open the tar and load the index.

        Raises:
            DataError: A file is missing, or the index is not the one of the manifest.
        """
        # The index is small and read whole rather than mapped: its digest is checked on the
        # way, and a file truncated under a running job is an error and not a SIGBUS.
        path = folder / entry.index_name
        try:
            blob = path.read_bytes()
            file = io.FileIO(folder / entry.name)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be opened ({error.strerror})") from error
        if hashlib.sha256(blob).hexdigest() != entry.index_sha256:
            raise DataError(f"{path}: not the index of this manifest (run data_prep/verify.py)")
        rows: NDArray[np.void] = np.load(io.BytesIO(blob), allow_pickle=False)
        if rows.dtype != INDEX_DTYPE or rows.shape != (entry.samples,):
            raise DataError(f"{path}: has shape {rows.shape} for {entry.samples} samples")
        return cls(file, rows)

    def read(self, row: int) -> Bytes:
        """The encoded image of a row; short only if the file was cut.

        Returns:
            ``(size,)`` uint8, writable.
        """
        offset, size = int(self.rows[row]["offset"]), int(self.rows[row]["size"])
        data = np.empty(size, np.uint8)
        done = 0
        while done < size:
            got = os.preadv(self.file.fileno(), [data.data[done:]], offset + done)
            if got == 0:
                break
            done += got
        return data[:done]

    def checked(self, row: int) -> tuple[Bytes, str]:
        """The encoded image of a row, and what is wrong with it ("" = nothing)."""
        try:
            image = self.read(row)
        except OSError as error:
            return np.empty(0, np.uint8), f"cannot be read ({error.strerror})"
        if len(image) < self.rows[row]["size"]:
            return image, "cut short"
        if zlib.crc32(image.data) != self.rows[row]["crc32"]:
            return image, "crc32 differs"
        return image, ""
