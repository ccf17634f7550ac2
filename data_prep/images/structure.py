"""Structure of image files: what is missing, and whether all decoders read them alike."""

from __future__ import annotations

from PIL import Image

from . import jpeg, png, tiff_tags
from .structure_report import StructureReport


def inspect_structure(data: bytes, format_name: str | None) -> StructureReport:
    """Inspect the structure of a file; only the coded pixels of a PNG are decompressed.

    Args:
        data: The file.
        format_name: Pillow's name of its format; only JPEG and PNG are inspected.
    """
    if format_name == "JPEG":
        return jpeg.inspect_jpeg_structure(data)
    return png.inspect_png_structure(data) if format_name == "PNG" else StructureReport()


def read_orientation(image: Image.Image, data: bytes) -> int:
    """Read how a picture has to be turned, 1 (not at all) to 8.

    A TIFF is never turned here, as Pillow does that itself.

    Args:
        image: Opened.
        data: Its file.
    """
    if image.format == "JPEG":
        return jpeg.read_orientation(data)
    if image.format == "PNG":
        return png.read_orientation(data)
    if image.format == "TIFF":
        return 1
    return tiff_tags.parse_orientation(image.info.get("exif", b""), image.info.get("xmp", b""))
