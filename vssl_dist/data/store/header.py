"""Format, size and depth of an image, read from its header before anything is decoded.

Shards hold 8-bit JPEG and PNG files whose sizes the index states.  A crop is drawn for the
stated size, so an image of another size must be noticed whichever library decodes it; so must
one of 16 bits, which libraries turn into 8 in different ways, and one whose header asks for
more memory than there is.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vssl_dist.data.bare import FRAMES, JPEG, PNG, SCAN, STANDALONE

_MAX_STEPS = 100_000
"""Steps of one byte or one segment: photographs take a thousand at most, noise would take long."""


def header_problem(data: NDArray[np.uint8], height: int, width: int) -> str:
    """Return why an image must not be decoded ("" = it may).

    Args:
        data: ``(n,)`` the bytes of the file.
        height: Height in pixels by the index.
        width: Width in pixels by the index.

    >>> head = (
    ...     b"\\x89PNG\\r\\n\\x1a\\n\\0\\0\\0\\rIHDR\\0\\0\\0\\x05\\0\\0\\0\\x02\\x08\\x02\\0\\0\\0"
    ... )
    >>> header_problem(np.frombuffer(head, np.uint8), 2, 5)
    ''
    >>> header_problem(np.frombuffer(head, np.uint8), 32, 32)
    'is 5x2 pixels where the index says 32x32'
    """
    try:
        header = _read_header(data)
    except (IndexError, struct.error):
        return "ends within its header"
    if header is None:
        return "neither a JPEG nor a PNG"
    if (header.height, header.width) != (height, width):
        return f"is {header.width}x{header.height} pixels where the index says {width}x{height}"
    return "" if header.bits <= 8 else f"has {header.bits} bits per channel where shards have 8"


def pixel_count(data: NDArray[np.uint8]) -> int:
    """Return the number of pixels by the header, 0 if it does not say."""
    try:
        header = _read_header(data)
    except (IndexError, struct.error):
        return 0
    return header.height * header.width if header else 0


class _Header(NamedTuple):
    bits: int
    """Bits per channel."""
    height: int
    width: int


def _read_header(data: NDArray[np.uint8]) -> _Header | None:
    """Read the header of a JPEG or a PNG; None for other formats and for a JPEG without a frame.

    Raises:
        IndexError, struct.error: The file ends within its header.
    """
    start = data[:26].tobytes()
    if start.startswith(PNG):
        # The size stands behind the signature and the length and the type of the first chunk.
        width, height, bits = struct.unpack_from(">IIB", start, 16)
        return _Header(bits, height, width)
    return _read_jpeg_frame(data.data) if start.startswith(JPEG) else None


def _read_jpeg_frame(data: memoryview) -> _Header | None:
    """Skip to the segment of a JPEG that describes its frame, and read that.

    This is as lenient as Pillow, which admitted the image to its shard.
    """
    position = len(JPEG)
    for _ in range(_MAX_STEPS):
        marker = data[position + 1] if data[position] == 0xFF else None
        if marker in FRAMES:
            return _Header(*struct.unpack_from(">BHH", data, position + 4))
        if marker == SCAN:
            break
        if marker is None or marker == 0xFF:  # junk, or one of the bytes that may fill up a marker
            position += 1
        elif marker in STANDALONE or marker == 0:
            position += 2
        else:
            position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    return None
