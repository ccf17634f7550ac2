"""Pillow images that every decoder reads alike: RGB or grey, eight bits, upright."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageFile

_TRANSPOSITION_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition for each EXIF orientation; Pillow turns TIFFs itself."""


def find_remake_reason(image: Image.Image) -> str:
    """Say what decoders could disagree on in an image, by its header; "" for nothing."""
    if image.format not in ("JPEG", "PNG"):
        return f"{image.format} file"
    return "" if image.mode in ("RGB", "L") else f"{image.format} of mode {image.mode}"


def to_rgb_or_grey(image: Image.Image, orientation: int) -> Image.Image:
    """Turn a picture upright and convert it to mode RGB or L.

    Args:
        image: The opened picture.
        orientation: EXIF's orientation, 1 to 8.

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
    upright_image = (
        image.transpose(_TRANSPOSITION_BY_ORIENTATION[orientation])
        if orientation in _TRANSPOSITION_BY_ORIENTATION
        else image
    )
    if upright_image.mode == "L":
        return upright_image
    if upright_image.mode == "P":
        upright_image = upright_image.convert("RGBA")
    return upright_image.convert("L" if upright_image.mode in ("1", "LA") else "RGB")


def shrink(image: Image.Image, shorter_side: int | None) -> Image.Image:
    """Shrink a picture to a shorter side of ``shorter_side`` pixels; never enlarge it."""
    if shorter_side is None or min(image.size) <= shorter_side:
        return image
    scale = shorter_side / min(image.size)
    width, height = (max(shorter_side, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


@contextmanager
def without_pillow_warnings() -> Iterator[None]:
    """Ignore Pillow's warnings of sizes and metadata that are dealt with here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def allow_truncated_images(allowed: bool) -> Iterator[None]:
    """Let Pillow fill in what is missing of an image instead of refusing it."""
    load_truncated_before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = allowed
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = load_truncated_before
