"""One image file in, bytes that every decoder of the project reads alike out.

A plain 8-bit RGB or greyscale JPEG or PNG that decodes to its last row is kept byte for byte.
Everything that decoders treat differently (CMYK, palettes, transparency, 16 bits, EXIF
rotation, other formats) is turned into plain RGB or grey once, here.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vssl_dist.data.manifest import DataError

MAX_PIXELS = 64_000_000
"""Larger images are refused from their header: they are bombs, or need shrinking first."""

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
_LOSSY = ("JPEG", "MPO", "WEBP")
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Encoded:
    """A plain JPEG or PNG and the size of the picture in it."""

    data: bytes
    suffix: str
    """``"jpg"`` or ``"png"``."""
    height: int
    width: int


def encode_png(pixels: NDArray[np.uint8]) -> Encoded:
    """Store pixels losslessly.

    Args:
        pixels: ``(H, W, 3)`` or ``(H, W)`` uint8.

    >>> encode_png(np.zeros((2, 5, 3), np.uint8)).width
    5
    """
    return _encode(Image.fromarray(pixels), lossy=False)


def plain(data: bytes, name: str | Path) -> Encoded:
    """Check an image file by decoding all of it, and make it plain if it is not.

    Args:
        data: The file's bytes.
        name: What to call it in the error.

    Raises:
        DataError: It is not an image, is damaged, or is larger than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            # Pillow only warns of sizes that we refuse a line later.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{name}: {image.width}x{image.height} pixels are more than the limit of "
                    f"{MAX_PIXELS}: shrink or remove it"
                )
            image.load()
            if _is_plain(image, data):
                suffix = "jpg" if image.format == "JPEG" else "png"
                return Encoded(data, suffix, image.height, image.width)
            return _encode(_to_rgb_or_grey(image), lossy=image.format in _LOSSY)
    except DataError:
        raise
    # Pillow's parsers raise nearly anything on a damaged file, and all of it means the same.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name}: not a readable image ({reason}): repair or remove it") from error


def _is_plain(image: Image.Image, data: bytes) -> bool:
    if image.mode not in ("RGB", "L") or image.getexif().get(_ORIENTATION, 1) != 1:
        return False
    if image.format == "JPEG":
        return True
    if image.format == "PNG":
        depth, colour = data[24], data[25]
        animated = getattr(image, "is_animated", False)
        return depth == 8 and colour in (0, 2) and "transparency" not in image.info and not animated
    return False


def _to_rgb_or_grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion clips; the upper byte is what an 8-bit file would hold.
        levels = np.asarray(image).astype(np.int64) >> 8
        if levels.min() < 0 or levels.max() > 255:
            raise ValueError("more than 16 bits per pixel")
        image = Image.fromarray(levels.astype(np.uint8))
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "L":
        return upright
    if upright.mode == "P":
        upright = upright.convert("RGBA")
    return upright.convert("L" if upright.mode in ("1", "LA") else "RGB")


def _encode(image: Image.Image, *, lossy: bool) -> Encoded:
    # A new image: the old one's metadata (EXIF, colour profile) would be saved along.
    clean = Image.frombytes(image.mode, image.size, image.tobytes())
    stream = io.BytesIO()
    if lossy:
        clean.save(stream, "JPEG", quality=95, subsampling=0)
    else:
        clean.save(stream, "PNG")
    return Encoded(stream.getvalue(), "jpg" if lossy else "png", image.height, image.width)
