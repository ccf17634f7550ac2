"""What the first bytes of an image say of it, read before anything is decoded.

Shards hold 8-bit JPEG and PNG files whose sizes the index states.  A crop is drawn for the
stated size, so an image of another size must be noticed whichever library decodes it; so must
one of 16 bits, which libraries turn into 8 in different ways, and one whose header asks for
more memory than there is.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from vssl_dist.data.bare import ALONE, FRAMES, JPEG, PNG, SCAN

_MOST_STEPS = 100_000
"""Of one byte or one segment: no photograph takes a hundredth, and noise must not take long."""


def header_problem(data: NDArray[np.uint8], height: int, width: int) -> str:
    """Why an image must not be decoded ("" = it may).

    Args:
        data: ``(n,)`` the bytes of the file.
        height: As the index states it.
        width: Likewise.

    >>> head = (
    ...     b"\\x89PNG\\r\\n\\x1a\\n\\0\\0\\0\\rIHDR\\0\\0\\0\\x05\\0\\0\\0\\x02\\x08\\x02\\0\\0\\0"
    ... )
    >>> header_problem(np.frombuffer(head, np.uint8), 2, 5)
    ''
    >>> header_problem(np.frombuffer(head, np.uint8), 32, 32)
    'is 5x2 pixels where the index says 32x32'
    """
    try:
        found = _stated(data)
    except (IndexError, struct.error):
        return "ends within its header"
    if found is None:
        return "neither a JPEG nor a PNG"
    if found[1:] != (height, width):
        return f"is {found[2]}x{found[1]} pixels where the index says {width}x{height}"
    return "" if found[0] <= 8 else f"has {found[0]} bits per channel where shards have 8"


def pixels(data: NDArray[np.uint8]) -> int:
    """How many there are by the header, 0 if it does not say."""
    try:
        stated = _stated(data)
    except (IndexError, struct.error):
        return 0
    return stated[1] * stated[2] if stated else 0


def _stated(data: NDArray[np.uint8]) -> tuple[int, int, int] | None:
    """Bits per channel, height and width; None for a file of another kind.

    Raises:
        IndexError, struct.error: The file ends before it says so.
    """
    start = data[:26].tobytes()
    if start.startswith(PNG):
        width, height, depth = struct.unpack_from(">IIB", start, 16)
        return depth, height, width
    return _frame(data.data) if start.startswith(JPEG) else None


def _frame(data: memoryview) -> tuple[int, int, int] | None:
    """The same of a JPEG: what stands before the segment that describes the frame is skipped.

    As leniently as Pillow reads, by whom an image was let into its shard.
    """
    at = 2
    for _ in range(_MOST_STEPS):
        kind = data[at + 1] if data[at] == 0xFF else None
        if kind in FRAMES:
            depth, height, width = struct.unpack_from(">BHH", data, at + 4)
            return depth, height, width
        if kind == SCAN:
            break
        if kind is None or kind == 0xFF:
            at += 1
        elif kind in ALONE or kind == 0:
            at += 2
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return None
