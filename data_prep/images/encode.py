"""Plain JPEG and PNG files of plain pictures."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Encoded:
    """A plain JPEG or PNG and the size of the picture in it."""

    data: bytes
    suffix: str
    """``"jpg"`` or ``"png"``."""
    height: int
    width: int


def encode(image: Image.Image, quality: int | None) -> Encoded:
    """As a JPEG of some quality, or as a PNG.

    Args:
        image: Of mode RGB or L.
        quality: Of the JPEG; None for a PNG.
    """
    if quality is None:
        return Encoded(_png(image), "png", image.height, image.width)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, subsampling=0)
    return Encoded(stream.getvalue(), "jpg", image.height, image.width)


def _png(image: Image.Image) -> bytes:
    """A PNG of an RGB or grey image, by Pillow's encoder.

    Around it Pillow's own writer of files takes as long again as a small image does.
    """
    colour = {"L": 0, "RGB": 2}[image.mode]
    head = struct.pack(">IIBBBBB", image.width, image.height, 8, colour, 0, 0, 0)
    body = image.tobytes("zip", image.mode, False, -1, -1, b"")
    chunks = ((b"IHDR", head), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    crc32 = zlib.crc32(data, zlib.crc32(kind))
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc32)
