"""Pillow images that every decoder reads alike: RGB or grey, eight bits, upright."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageFile, ImageOps

_ORIENTATION = 0x0112


def oddity(image: Image.Image, data: bytes) -> str:
    """What decoders could disagree on in an image whose header was read ("" = nothing).

    Args:
        image: Opened, not yet decoded.
        data: The file it was opened from.
    """
    if image.format not in ("JPEG", "PNG"):
        return f"{image.format} file"
    if image.mode not in ("RGB", "L"):
        return f"{image.format} of mode {image.mode}"
    if image.format == "PNG":
        depth, colour = data[24], data[25]
        if depth != 8 or colour not in (0, 2):
            return f"PNG of {depth} bits and colour type {colour}"
        if "transparency" in image.info or getattr(image, "is_animated", False):
            return "PNG with transparency or animation"
    rotation = image.getexif().get(_ORIENTATION, 1)
    return "" if rotation == 1 else f"EXIF orientation {rotation}"


def to_rgb_or_grey(image: Image.Image) -> Image.Image:
    """The picture upright and of mode RGB or L.

    Raises:
        ValueError: Its pixels have more than 16 bits, or are no whole numbers.
    """
    image.load()
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("pixels of 32 bits, whose white nothing tells")
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


def shrunk(image: Image.Image, short: int | None) -> Image.Image:
    """The picture with a shorter side of at most ``short`` pixels; never an enlarged one."""
    if short is None or min(image.size) <= short:
        return image
    scale = short / min(image.size)
    width, height = (max(short, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


@contextmanager
def quietly() -> Iterator[None]:
    """Without Pillow's warnings of sizes and metadata that are dealt with here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def lenient(wanted: bool) -> Iterator[None]:
    """Let Pillow fill in what is missing of an image instead of refusing it."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = wanted
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
