"""The form of a PNG file, from its chunks; of these only the coded pixels are looked into."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from itertools import islice, takewhile
from typing import NamedTuple

from vssl_dist.data.bare import Chunk, chunks

from . import tags
from .form import Form

_MOST_CHUNKS = 100_000
_KNOWN = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_TRANSPARENT = {0: 2, 2: 6}
"""Bytes that state a transparent grey or colour, by the kind of colour."""
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
          (0, 1, 1, 2))  # fmt: skip
"""First column and row, and steps to the next ones, of an interlaced PNG's seven passes."""
_PACKED, _MOST_GAIN = (b"zTXt", b"iTXt", b"iCCP"), 1032
"""Texts and profiles that a decoder inflates, and how many times a byte may become."""
_MOST_EACH, _MOST_INFLATED = 8_000_000, 256_000_000
"""Bytes that a decoder inflates of one of them, and at most for nothing: a second or two."""
_XMP = b"XML:com.adobe.xmp\0\0"
_LONGEST = 1 << 16
"""Side of a plain picture: libraries have limits of their own beyond."""
_MOST_FRAMES = 1 << 31
_WIDEST = 15
"""Base two logarithm of how far back a zlib stream may refer."""
_PIECE = 1 << 20


class _Header(NamedTuple):
    width: int
    height: int
    depth: int
    colour: int
    compression: int
    filtering: int
    interlaced: int


def form(data: bytes) -> Form:
    """Walk over a PNG, from chunk to chunk."""
    parts = list(islice(chunks(data), _MOST_CHUNKS + 1))
    if len(parts) > _MOST_CHUNKS:
        return Form(f"more than {_MOST_CHUNKS} parts, which no encoder makes")
    try:
        intact = [_intact(data, part) for part in parts]
        if [part.kind for part in parts[-1:]] != [b"IEND"]:
            raise ValueError("its end is missing")
        header = _header(data, parts)
        exact, unread = _pixels(data, parts, header)
    except (ValueError, zlib.error) as error:
        return Form(broken=str(error))
    kinds = [part.kind for part in parts]
    told = [part for part, right in zip(parts, intact, strict=True) if right]
    plain = (
        exact
        and all(intact)
        and kinds == [b"IHDR", *[b"IDAT"] * (len(kinds) - 2), b"IEND"]
        and all(part.end - part.start > 12 for part in parts[:-1])
        and parts[-1].start + 12 == len(data)
        and header[4:6] == (0, 0)
        and max(header[:2]) < _LONGEST
    )
    odd = _oddity(data, told, header)
    if not odd and _MOST_GAIN * unread > _MOST_INFLATED:
        odd = "PNG with more behind its pixels than decoders should have to read"
    return Form("", "", odd, plain and not odd)


def _oddity(data: bytes, told: Sequence[Chunk], header: _Header) -> str:
    if header.depth != 8 or header.colour not in _TRANSPARENT:
        return f"PNG of {header.depth} bits and colour type {header.colour}"
    texts = (part.end - part.start for part in told if part.kind in _PACKED)
    if sum(min(_MOST_GAIN * size, _MOST_EACH) for size in texts) > _MOST_INFLATED:
        return "PNG with more compressed texts than decoders should have to read"
    if _layered(data, told, header):
        return "PNG with transparency or animation"
    turn = _turn(data, told)
    return f"EXIF orientation {turn}" if turn != 1 else ""


def orientation(data: bytes) -> int:
    """How the picture has to be turned, by EXIF or XMP that is not compressed."""
    walk = islice(chunks(data), _MOST_CHUNKS)
    return _turn(data, [p for p in walk if p.kind in (b"eXIf", b"iTXt") and _right(data, p)])


def _turn(data: bytes, told: Sequence[Chunk]) -> int:
    """By the last EXIF, or XMP, if there are several: that is the one that libraries go by."""
    exif = xmp = b""
    for part in told:
        if part.kind == b"eXIf":
            exif = _body(data, part)
        elif part.kind == b"iTXt" and data.startswith(_XMP, part.start + 8):
            xmp = _body(data, part)
    return tags.orientation(exif, xmp)


def _body(data: bytes, part: Chunk) -> bytes:
    return data[part.start + 8 : part.end - 4]


def _intact(data: bytes, part: Chunk) -> bool:
    """Whether a chunk's checksum is right, which that of the end or a remark need not be.

    Raises:
        ValueError: It is cut short, or it is of the picture and damaged or unknown.
    """
    name = part.kind.decode("ascii", "replace")
    if part.end > len(data) or len(part.kind) < 4:
        raise ValueError(f"it is cut short in {name or 'a chunk'}")
    picture = part.kind[:1].isupper()
    if picture and part.kind not in _KNOWN:
        raise ValueError(f"it has a part {name!r} that no decoder knows")
    right = _right(data, part)
    if picture and not right and part.kind != b"IEND":
        raise ValueError(f"the checksum of its {name} differs")
    return right


def _right(data: bytes, part: Chunk) -> bool:
    stated = int.from_bytes(data[part.end - 4 : part.end], "big")
    return zlib.crc32(memoryview(data)[part.start + 4 : part.end - 4]) == stated


def _header(data: bytes, parts: Iterable[Chunk]) -> _Header:
    """What the first chunk that describes the picture says.

    Raises:
        ValueError: There is none.
    """
    body = next((_body(data, part) for part in parts if part.kind == b"IHDR"), b"")
    if len(body) != 13:
        raise ValueError(f"its IHDR has {len(body)} bytes instead of 13")
    return _Header(*struct.unpack(">IIBBBBB", body))


def _layered(data: bytes, told: Iterable[Chunk], header: _Header) -> bool:
    """Whether pixels are transparent, or pictures follow the first one."""
    frames = 0
    ahead = list(takewhile(lambda part: part.kind != b"IDAT", told))
    for part in ahead:
        body = _body(data, part)
        if part.kind == b"tRNS" and len(body) >= _TRANSPARENT.get(header.colour, len(body) + 1):
            return True
        if part.kind == b"acTL" and len(body) >= 8:
            frames = int.from_bytes(body[:4], "big")
    # A picture without a frame of its own is one more, to be shown where nothing moves.
    more = all(part.kind != b"fcTL" for part in ahead)
    return 0 < frames <= _MOST_FRAMES and frames + more > 1


def _pixels(data: bytes, parts: Iterable[Chunk], header: _Header) -> tuple[bool, int]:
    """Look through the coded pixels.

    Returns:
        Whether they are all there and nothing else is, and how many bytes of the file a decoder
        may go on to inflate when it has them all.

    Raises:
        ValueError, zlib.error: Some are missing, or they are damaged.
    """
    due = left = _due(header)
    coded = zlib.decompressobj()
    first, behind, unread = b"", False, 0
    for part in parts:
        if part.kind != b"IDAT":
            continue
        body = _body(data, part)
        first = first or body[:1]
        behind = behind or (coded.eof and body != b"")
        if left < 0:
            unread += len(body)
            continue
        left -= _inflated(coded, body, left)
        unread = len(coded.unconsumed_tail)
    if left > 0:
        raise ValueError(f"{due - left} of {due} bytes of pixels are there")
    if left == 0 and not coded.eof:
        raise ValueError("the end of its coded pixels is missing")
    reach = 1 << (8 + (first[0] >> 4)) if first else 0
    exact = left == 0 and not behind and not coded.unused_data
    return exact and reach >= min(due, 1 << _WIDEST), unread


def _due(header: _Header) -> int:
    """How many bytes of pixels there must be, each row with its filter."""
    bits = header.depth * _CHANNELS.get(header.colour, 0)
    total = 0
    for left, top, across, down in _ADAM7 if header.interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(header.width - left) // across), -(-(header.height - top) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def _inflated(coded: zlib._Decompress, body: bytes, most: int) -> int:
    """How many bytes a part of the coded pixels gives, counted to a little beyond ``most``."""
    given, rest = 0, body
    while rest and given <= most and not coded.eof:
        given += len(coded.decompress(rest, _PIECE))
        rest = coded.unconsumed_tail
    return given
