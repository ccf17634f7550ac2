"""What is wrong with the build of a JPEG or PNG that Pillow forgives and other decoders may not."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

_MOST_SCANS = 100
"""Of a JPEG: each is a pass over the whole picture, and encoders make some ten."""
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
"""What ends the coded data of a scan: restarts, and bytes of 255 in it, do not."""
_SIZES = frozenset((*range(0xC0, 0xD0),)) - {0xC4, 0xC8, 0xCC}
_SCAN, _END, _ALONE = 0xDA, 0xD9, frozenset((0x01, *range(0xD0, 0xD9)))

_PNG_HEAD = 8
_KNOWN = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
          (0, 1, 1, 2))  # fmt: skip
"""First column and row, and steps to the next ones, of an interlaced PNG's seven passes."""
_PIECE = 1 << 20


class Structure(NamedTuple):
    """What a walk over a file's parts found; "" is nothing."""

    endless: str = ""
    """Why it must not be decoded at all."""
    broken: str = ""
    """Why not every decoder takes it, or what of the picture is not there."""
    untidy: str = ""
    """What Pillow reads past without loss, and others do not."""


def structure(data: bytes, kind: str | None) -> Structure:
    """Walk over the parts of a file; only the coded pixels of a PNG are looked into.

    Args:
        data: The file.
        kind: Pillow's name of its format; other than JPEG and PNG there is nothing to find.
    """
    if kind in ("JPEG", "MPO"):
        return _jpeg(data)
    return Structure(broken=_png(data)) if kind == "PNG" else Structure()


def _jpeg(data: bytes) -> Structure:
    at, scans, broken, untidy = 2, 0, "", ""
    while found := _MARKER.search(data, at):
        if data[at : found.start()].strip(b"\xff"):  # any number of these may come before one
            untidy = "JPEG with bytes between its segments"
        marker, start = found[1][0], found.end()
        if marker == _END:
            break
        if marker in _ALONE:
            at = start
            continue
        at = start + int.from_bytes(data[start : start + 2], "big")
        if marker in _SIZES:
            broken = broken or _sampling(data[start:at])
        if marker == _SCAN:
            scans += 1
            if scans > _MOST_SCANS:
                return Structure(f"more than {_MOST_SCANS} scans, which no encoder makes")
            following = _MARKER.search(data, at)
            at = following.start() if following else len(data)
    return Structure("", broken, untidy)


def _sampling(header: bytes) -> str:
    """Whether each channel has a whole fraction of the pixels of the finest one."""
    factors = [(byte >> 4, byte & 15) for byte in header[9::3]]
    for own in zip(*factors, strict=True):
        if any(factor == 0 or max(own) % factor for factor in own):
            return "channels sampled in steps that decoders refuse"
    return ""


def _png(data: bytes) -> str:
    coded = zlib.decompressobj()
    due = left = -1
    ended = False
    try:
        for kind, body in _chunks(data):
            if kind == b"IHDR":
                due = left = _pixel_bytes(body)
            elif kind == b"IDAT":
                left -= _inflated(coded, body, left)
            ended = ended or kind == b"IEND"
    except (ValueError, zlib.error, struct.error) as error:
        return str(error)
    if not ended:
        return "its end is missing"
    return f"{due - left} of {due} bytes of pixels are there" if left > 0 else ""


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """The critical chunks of a PNG, up to its end; the others may be anything.

    Raises:
        ValueError: One is cut short, damaged or unknown.
    """
    at, whole = _PNG_HEAD, memoryview(data)
    while at < len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        name = kind.decode("ascii", "replace")
        if end > len(data) or len(kind) < 4:
            raise ValueError(f"it is cut short in {name or 'a chunk'}")
        if kind[:1].isupper():
            if kind not in _KNOWN:
                raise ValueError(f"it has a part {name!r} that no decoder knows")
            if zlib.crc32(whole[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
                raise ValueError(f"the checksum of its {name} differs")
            yield kind, whole[at + 8 : end - 4]
        if kind == b"IEND":
            return
        at = end


def _pixel_bytes(header: memoryview) -> int:
    """How many bytes of pixels there must be, each row with its filter."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * _CHANNELS.get(colour, 0)
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    total = 0
    for left, top, across, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def _inflated(coded: zlib._Decompress, body: memoryview, most: int) -> int:
    """How many bytes a part of the coded pixels gives, counted to a little beyond ``most``."""
    given, rest = 0, bytes(body)
    while rest and given <= most and not coded.eof:
        given += len(coded.decompress(rest, _PIECE))
        rest = coded.unconsumed_tail
    return given
