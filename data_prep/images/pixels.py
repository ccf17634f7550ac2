"""Images that a data set stores as bare arrays, one row each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .raw_image import RawImage


@dataclass(frozen=True)
class PixelRows:
    """Rows of arrays as images; only the selected rows travel to another process.

    >>> rows = np.arange(24, dtype=np.uint8).reshape(2, 12)
    >>> image = next(iter(PixelRows((rows,), np.array([1]), (3, 2, 2), (1, 2, 0)))).data
    >>> image[0, 0].tolist()
    [12, 16, 20]
    """

    arrays: tuple[NDArray[np.uint8], ...]
    """Arrays of ``(n, values)``, one after the other; may be mapped from files."""
    rows: NDArray[np.int64]
    """Numbers of the selected rows, counted over all arrays."""
    shape: tuple[int, int, int]
    """Shape of a row, as it is stored."""
    axes: tuple[int, int, int]
    """The permutation of ``shape`` that gives height, width, channel."""

    def __reduce__(self) -> tuple[type[PixelRows], tuple[object, ...]]:
        selected = self._rows()
        return PixelRows, ((selected,), np.arange(len(selected)), self.shape, self.axes)

    def __iter__(self) -> Iterator[RawImage]:
        for row in self._rows():
            yield RawImage(np.ascontiguousarray(row.reshape(self.shape).transpose(self.axes)))

    def _rows(self) -> NDArray[np.uint8]:
        selected = np.empty((len(self.rows), self.arrays[0].shape[1]), np.uint8)
        start = 0
        for array in self.arrays:
            in_array = (self.rows >= start) & (self.rows < start + len(array))
            selected[in_array] = array[self.rows[in_array] - start]
            start += len(array)
        return selected
