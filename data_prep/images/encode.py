"""Plain JPEG and PNG files of plain pictures."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class EncodedImage:
    """A plain JPEG or PNG and the size of the picture in it."""

    data: bytes
    suffix: str
    """``"jpg"`` or ``"png"``."""
    height: int
    width: int


def encode_image(image: Image.Image, quality: int | None) -> EncodedImage:
    """Encode a picture as a JPEG of some quality, or as a PNG.

    Args:
        image: A picture of mode RGB or L.
        quality: JPEG quality; None makes a PNG.
    """
    if quality is None:
        return EncodedImage(_encode_as_png(image), "png", image.height, image.width)
    jpeg_buffer = io.BytesIO()
    image.save(jpeg_buffer, "JPEG", quality=quality, subsampling=0)
    return EncodedImage(jpeg_buffer.getvalue(), "jpg", image.height, image.width)


def _encode_as_png(image: Image.Image) -> bytes:
    """Encode an RGB or grey picture as a PNG with Pillow's compressor.

    Pillow's own writer of files would double the time that a small image takes.
    """
    colour_type = {"L": 0, "RGB": 2}[image.mode]
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, colour_type, 0, 0, 0)
    pixels = image.tobytes("zip", image.mode, False, -1, -1, b"")
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _make_png_chunk(chunk_type, data) for chunk_type, data in chunks
    )


def _make_png_chunk(chunk_type: bytes, data: bytes) -> bytes:
    crc32 = zlib.crc32(data, zlib.crc32(chunk_type))
    return struct.pack(">I", len(data)) + chunk_type + data + struct.pack(">I", crc32)
