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

from vssl_dist.data.bare import (
    FRAME_MARKERS,
    JPEG_SIGNATURE,
    PNG_SIGNATURE,
    SCAN_MARKER,
    STANDALONE_MARKERS,
)

_MAX_HEADER_STEPS = 100_000
"""Steps of one byte or one segment: photographs take a thousand at most, noise would take long."""


def find_header_problem(data: NDArray[np.uint8], height: int, width: int) -> str:
    """Return why an image must not be decoded ("" = it may).

    Args:
        data: ``(n,)`` the bytes of the file.
        height: Height in pixels by the index.
        width: Width in pixels by the index.

    >>> head = (
    ...     b"\\x89PNG\\r\\n\\x1a\\n\\0\\0\\0\\rIHDR\\0\\0\\0\\x05\\0\\0\\0\\x02\\x08\\x02\\0\\0\\0"
    ... )
    >>> find_header_problem(np.frombuffer(head, np.uint8), 2, 5)
    ''
    >>> find_header_problem(np.frombuffer(head, np.uint8), 32, 32)
    'is 5x2 pixels where the index says 32x32'
    """
    try:
        image_header = _read_header(data)
    except (IndexError, struct.error):
        return "ends within its header"
    if image_header is None:
        return "neither a JPEG nor a PNG"
    if (image_header.height, image_header.width) != (height, width):
        size = f"{image_header.width}x{image_header.height}"
        return f"is {size} pixels where the index says {width}x{height}"
    if image_header.bits_per_channel > 8:
        return f"has {image_header.bits_per_channel} bits per channel where shards have 8"
    return ""


def header_pixel_count(data: NDArray[np.uint8]) -> int:
    """Return the number of pixels by the header, 0 if it does not say."""
    try:
        image_header = _read_header(data)
    except (IndexError, struct.error):
        return 0
    return image_header.height * image_header.width if image_header else 0


class _ImageHeader(NamedTuple):
    bits_per_channel: int
    height: int
    width: int


def _read_header(data: NDArray[np.uint8]) -> _ImageHeader | None:
    """Read the header of a JPEG or a PNG; None for other formats and for a JPEG without a frame.

    Raises:
        IndexError, struct.error: The file ends within its header.
    """
    first_bytes = data[:26].tobytes()
    if first_bytes.startswith(PNG_SIGNATURE):
        # The size stands behind the signature and the length and the type of the first chunk.
        width, height, bits_per_channel = struct.unpack_from(">IIB", first_bytes, 16)
        return _ImageHeader(bits_per_channel, height, width)
    return _read_jpeg_frame(data.data) if first_bytes.startswith(JPEG_SIGNATURE) else None


def _read_jpeg_frame(data: memoryview) -> _ImageHeader | None:
    """Skip to the segment of a JPEG that describes its frame, and read that.

    This is as lenient as Pillow, which admitted the image to its shard.
    """
    offset = len(JPEG_SIGNATURE)
    for _ in range(_MAX_HEADER_STEPS):
        marker = data[offset + 1] if data[offset] == 0xFF else None
        if marker in FRAME_MARKERS:
            return _ImageHeader(*struct.unpack_from(">BHH", data, offset + 4))
        if marker == SCAN_MARKER:
            break
        if marker is None or marker == 0xFF:  # junk, or one of the bytes that may fill up a marker
            offset += 1
        elif marker in STANDALONE_MARKERS or marker == 0:
            offset += 2
        else:
            offset += 2 + struct.unpack_from(">H", data, offset + 2)[0]
    return None
