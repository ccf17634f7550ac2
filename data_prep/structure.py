"""How an image file is built: what of its picture is missing, and whether all read it alike."""

from __future__ import annotations

from data_prep import jpeg, png
from data_prep.form import Form


def structure(data: bytes, kind: str | None) -> Form:
    """Walk over the parts of a file; only the coded pixels of a PNG are looked into.

    Args:
        data: The file.
        kind: Pillow's name of its format; other than JPEG and PNG there is nothing to find.
    """
    if kind == "JPEG":
        return jpeg.form(data)
    return png.form(data) if kind == "PNG" else Form()


def exif(data: bytes, kind: str | None) -> bytes:
    """What a JPEG or PNG says of how it was taken, b"" if it says nothing."""
    if kind == "JPEG":
        return jpeg.exif(data)
    return png.exif(data) if kind == "PNG" else b""
