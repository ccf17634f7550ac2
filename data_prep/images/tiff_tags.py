"""Single entries of TIFF directories, which EXIF and the index of several pictures are kept in.

Only the entry asked for is looked up: a library reads all of a directory first, and a hostile
one names the same bytes a thousand times over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

ORIENTATION_TAG = 0x0112
_BYTE_ORDERS: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
_BYTES_BY_INTEGER_TYPE = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4}
"""Bytes of a value, by the code of its type: whole numbers of 8, 16 and 32 bits."""
_XMP_ORIENTATION_PATTERN = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_UNDEFINED_TIFF_TYPE = 7
"""The TIFF type UNDEFINED: bytes that mean nothing to a reader of tags."""


def is_tiff_directory(directory: bytes) -> bool:
    """Tell whether the bytes begin as a TIFF directory must."""
    return directory[:4] in _BYTE_ORDERS


def read_tag_number(directory: bytes, tag: int) -> int | None:
    """Read the whole number under a tag, the first of several; None if there is none."""
    order = _byte_order(directory)
    for type_code, count, offset in _iter_directory_entries(directory, tag):
        value_bytes = _BYTES_BY_INTEGER_TYPE.get(type_code, 0)
        if value_bytes * count > 4:  # the entry tells where they are
            offset = int.from_bytes(directory[offset : offset + 4], order)
        if value_bytes and count and offset + value_bytes <= len(directory):
            return int.from_bytes(directory[offset : offset + value_bytes], order)
    return None


def tag_byte_count(directory: bytes, tag: int) -> int:
    """Count the bytes under a tag; 0 if it has none, or they lie outside."""
    for type_code, count, offset in _iter_directory_entries(directory, tag):
        start = int.from_bytes(directory[offset : offset + 4], _byte_order(directory))
        if type_code == _UNDEFINED_TIFF_TYPE and 4 < count <= len(directory) - start:
            return count
    return 0


def parse_orientation(exif: bytes, xmp: bytes = b"") -> int:
    """Parse how the picture has to be turned, 1 (not at all, or nothing sensible) to 8.

    Args:
        exif: A directory, with or without its name in front.
        xmp: Text that is asked where the directory has no such entry.

    >>> parse_orientation(b"MM\\0*\\0\\0\\0\\x08\\0\\1\\1\\x12\\0\\3\\0\\0\\0\\1\\0\\6\\0\\0")
    6
    >>> parse_orientation(b"garbage", b'<x tiff:Orientation="8"/>')
    8
    """
    orientation = read_tag_number(exif.removeprefix(b"Exif\0\0"), ORIENTATION_TAG)
    if orientation is None and (match := _XMP_ORIENTATION_PATTERN.search(xmp)):
        orientation = int(match[1])
    return orientation if orientation is not None and 1 <= orientation <= 8 else 1


def _byte_order(directory: bytes) -> Literal["little", "big"]:
    return _BYTE_ORDERS.get(directory[:4], "big")


def _iter_directory_entries(directory: bytes, tag: int) -> Iterator[tuple[int, int, int]]:
    """Yield type code, count and value offset of each entry of the first table with a tag."""
    if not is_tiff_directory(directory):
        return
    order = _byte_order(directory)

    def read(offset: int, length: int) -> int:
        return int.from_bytes(directory[offset : offset + length], order)

    table = read(4, 4)
    for row in range(table + 2, table + 2 + 12 * read(table, 2), 12):
        if row + 12 > len(directory):
            return
        if read(row, 2) == tag:
            yield read(row + 2, 2), read(row + 4, 4), row + 8
