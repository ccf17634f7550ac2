"""Images that a data set stores as bare arrays, one row each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..sources.base import Raw


@dataclass(frozen=True)
class Pixels:
    """Rows of arrays as images; only the wanted rows travel to another process.

    >>> rows = np.arange(24, dtype=np.uint8).reshape(2, 12)
    >>> image = next(iter(Pixels((rows,), np.array([1]), (3, 2, 2), (1, 2, 0)))).data
    >>> image[0, 0].tolist()
    [12, 16, 20]
    """

    parts: tuple[NDArray[np.uint8], ...]
    """``(n, values)`` each, one after the other; may be mapped from files."""
    which: NDArray[np.int64]
    """Rows of the whole, counted over all parts."""
    shape: tuple[int, int, int]
    """Of a row, as it is stored."""
    axes: tuple[int, int, int]
    """The permutation of ``shape`` that gives height, width, channel."""

    def __reduce__(self) -> tuple[type[Pixels], tuple[object, ...]]:
        rows = self._rows()
        return Pixels, ((rows,), np.arange(len(rows)), self.shape, self.axes)

    def __iter__(self) -> Iterator[Raw]:
        for row in self._rows():
            yield Raw(np.ascontiguousarray(row.reshape(self.shape).transpose(self.axes)))

    def _rows(self) -> NDArray[np.uint8]:
        rows = np.empty((len(self.which), self.parts[0].shape[1]), np.uint8)
        start = 0
        for part in self.parts:
            here = (self.which >= start) & (self.which < start + len(part))
            rows[here] = part[self.which[here] - start]
            start += len(part)
        return rows
