"""Images that a data set stores as bare arrays, one row each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .raw_image import RawImage


@dataclass(frozen=True)
class ArrayImages:
    """Rows of arrays as images; only the selected rows travel to another process.

    >>> rows = np.arange(24, dtype=np.uint8).reshape(2, 12)
    >>> image = next(iter(ArrayImages((rows,), np.array([1]), (3, 2, 2), (1, 2, 0)))).data
    >>> image[0, 0].tolist()
    [12, 16, 20]
    """

    arrays: tuple[NDArray[np.uint8], ...]
    """Arrays of ``(n, values)``, one after the other; may be mapped from files."""
    rows: NDArray[np.int64]
    """Numbers of the selected rows, counted over all arrays."""
    shape: tuple[int, int, int]
    """Shape of a row, as it is stored."""
    axis_order: tuple[int, int, int]
    """The permutation of ``shape`` that gives height, width, channel."""

    def __reduce__(self) -> tuple[type[ArrayImages], tuple[object, ...]]:
        selected_rows = self._select_rows()
        return ArrayImages, (
            (selected_rows,),
            np.arange(len(selected_rows)),
            self.shape,
            self.axis_order,
        )

    def __iter__(self) -> Iterator[RawImage]:
        for row in self._select_rows():
            yield RawImage(np.ascontiguousarray(row.reshape(self.shape).transpose(self.axis_order)))

    def _select_rows(self) -> NDArray[np.uint8]:
        selected_rows = np.empty((len(self.rows), self.arrays[0].shape[1]), np.uint8)
        array_start = 0
        for array in self.arrays:
            is_in_array = (self.rows >= array_start) & (self.rows < array_start + len(array))
            selected_rows[is_in_array] = array[self.rows[is_in_array] - array_start]
            array_start += len(array)
        return selected_rows
