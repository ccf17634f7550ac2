"""How an image file is built: what of its picture is missing, and whether all read it alike."""

from __future__ import annotations

from PIL import Image

from . import jpeg, png, tags
from .form import Form


def structure(data: bytes, kind: str | None) -> Form:
    """Walk over the parts of a file; only the coded pixels of a PNG are looked into.

    Args:
        data: The file.
        kind: Pillow's name of its format; other than JPEG and PNG there is nothing to find.
    """
    if kind == "JPEG":
        return jpeg.form(data)
    return png.form(data) if kind == "PNG" else Form()


def orientation(image: Image.Image, data: bytes) -> int:
    """How a picture has to be turned, 1 (not at all) to 8; Pillow turns TIFFs itself.

    Args:
        image: Opened.
        data: Its file.
    """
    if image.format == "JPEG":
        return jpeg.orientation(data)
    if image.format == "PNG":
        return png.orientation(data)
    if image.format == "TIFF":
        return 1
    return tags.orientation(image.info.get("exif", b""), image.info.get("xmp", b""))
