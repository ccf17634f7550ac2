"""Single entries of the directories that EXIF, and files of several pictures, are kept in.

Only the entry asked for is looked up: a library reads all of a directory first, and a hostile
one names the same bytes a thousand times over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

ORIENTATION = 0x0112
_ORDERS: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
_NUMBERS = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4}
"""Bytes of a value, by the code of its type: whole numbers of 8, 16 and 32 bits."""
_TEXT = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_BYTES = 7
"""The type of bytes that mean nothing to a reader of tags."""


def well_formed(directory: bytes) -> bool:
    """Whether it begins as such a directory must."""
    return directory[:4] in _ORDERS


def number(directory: bytes, tag: int) -> int | None:
    """The whole number under a tag, the first of several, None if there is none."""
    order = _order(directory)
    for kind, count, at in _entries(directory, tag):
        size = _NUMBERS.get(kind, 0)
        if size * count > 4:  # the entry tells where they are
            at = int.from_bytes(directory[at : at + 4], order)
        if size and count and at + size <= len(directory):
            return int.from_bytes(directory[at : at + size], order)
    return None


def size(directory: bytes, tag: int) -> int:
    """How many bytes there are under a tag: 0 if it has none, or they lie outside."""
    for kind, count, at in _entries(directory, tag):
        start = int.from_bytes(directory[at : at + 4], _order(directory))
        if kind == _BYTES and 4 < count <= len(directory) - start:
            return count
    return 0


def orientation(exif: bytes, xmp: bytes = b"") -> int:
    """How the picture has to be turned, 1 (not at all) to 8; what says nothing sensible is 1.

    Args:
        exif: A directory, with or without its name in front.
        xmp: Text that is asked where the directory has no such entry.

    >>> orientation(b"MM\\0*\\0\\0\\0\\x08\\0\\1\\1\\x12\\0\\3\\0\\0\\0\\1\\0\\6\\0\\0")
    6
    >>> orientation(b"garbage", b'<x tiff:Orientation="8"/>')
    8
    """
    stated = number(exif.removeprefix(b"Exif\0\0"), ORIENTATION)
    if stated is None and (match := _TEXT.search(xmp)):
        stated = int(match[1])
    return stated if stated is not None and 1 <= stated <= 8 else 1


def _order(directory: bytes) -> Literal["little", "big"]:
    return _ORDERS.get(directory[:4], "big")


def _entries(directory: bytes, tag: int) -> Iterator[tuple[int, int, int]]:
    """Type, count and place of the value, of each entry of the first table with a tag."""
    if not well_formed(directory):
        return
    order = _order(directory)

    def read(at: int, length: int) -> int:
        return int.from_bytes(directory[at : at + length], order)

    table = read(4, 4)
    for row in range(table + 2, table + 2 + 12 * read(table, 2), 12):
        if row + 12 > len(directory):
            return
        if read(row, 2) == tag:
            yield read(row + 2, 2), read(row + 4, 4), row + 8
