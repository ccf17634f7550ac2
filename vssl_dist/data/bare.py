"""The parts of a JPEG or PNG file, and the file without what only tells about its picture.

Texts, colour profiles, EXIF and the like are as often damaged, or larger than a decoder allows,
as they are of no use to a training.  Pillow refuses sound pictures for them; so it is given
the picture alone.  Nothing here is inflated or looked into, and nothing raises.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice, takewhile
from typing import NamedTuple

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8"
SCAN, END = 0xDA, 0xD9
ALONE = frozenset((0x01, *range(0xD0, 0xDA)))
"""Markers without a segment."""
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of a frame header; the three that are missing stand for tables among them."""
APPLICATION, COMMENT = range(0xE0, 0xF0), 0xFE
JFIF, ADOBE = (0xE0, b"JFIF\0", 14), (0xEE, b"Adobe", 12)
"""Marker, beginning and least length of the two that tell what the channels are."""

_CHANNELS = (JFIF, ADOBE)
_REMARKS = frozenset((*APPLICATION, COMMENT))
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
"""What ends the coded data of a scan: restarts, and bytes of 255 in it, do not."""
_MOST_PARTS = 100_000
"""Of a file whose parts are gone through one by one: what has more stays as it is."""


class Segment(NamedTuple):
    """A JPEG's marker and what belongs to it."""

    marker: int
    start: int
    """Of the marker; what lies between it and the segment before is not part of either."""
    body: int
    end: int


class Chunk(NamedTuple):
    """A part of a PNG."""

    kind: bytes
    start: int
    """Of the length in front of it."""
    end: int
    """Behind its checksum; may lie beyond the end of the file."""


def segments(data: bytes) -> Iterator[Segment]:
    """A JPEG's segments up to its end, without the coded data of its scans.

    >>> [hex(segment.marker) for segment in segments(b"\\xff\\xd8\\xff\\xfe\\0\\3!\\xff\\xd9")]
    ['0xfe', '0xd9']
    """
    marker, at = 0, len(JPEG)
    while marker != END and (match := _MARKER.search(data, at)):
        marker, body = match[1][0], match.end()
        length = 0 if marker in ALONE else int.from_bytes(data[body : body + 2], "big")
        at = body + length
        yield Segment(marker, match.start(), body, at)


def chunks(data: bytes) -> Iterator[Chunk]:
    """A PNG's chunks up to its end; the last one may be cut short."""
    at, kind = len(PNG), b""
    while at < len(data) and kind != b"IEND":
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        yield Chunk(kind, at, end)
        at = end


def states(data: bytes, segment: Segment, sort: tuple[int, bytes, int]) -> bool:
    """Whether a segment is one of those that decoders take the meaning of channels from."""
    marker, name, least = sort
    size = segment.end - segment.body - 2
    return segment.marker == marker and size >= least and data.startswith(name, segment.body + 2)


def bare(data: bytes) -> bytes:
    """The picture alone: of a PNG its critical chunks, of a JPEG all but remarks.

    Args:
        data: A file of any kind; what is neither JPEG nor PNG is returned as it is.
    """
    if data.startswith(PNG):
        return _without(data, _remarks_of_png(data))
    return _without(data, _remarks_of_jpeg(data)) if data.startswith(JPEG) else data


def _remarks_of_png(data: bytes) -> Iterator[Chunk]:
    walk = islice(chunks(data), _MOST_PARTS)
    return (chunk for chunk in walk if not chunk.kind[:1].isupper())


def _remarks_of_jpeg(data: bytes) -> Iterator[Segment]:
    """All ahead of the picture but what tells the meaning of its channels."""
    walk = takewhile(lambda segment: segment.marker != SCAN, islice(segments(data), _MOST_PARTS))
    for segment in walk:
        if segment.marker in _REMARKS and not any(
            states(data, segment, sort) for sort in _CHANNELS
        ):
            yield segment


def _without(data: bytes, parts: Iterable[Chunk | Segment]) -> bytes:
    """The data but for some parts of it; the same object if there are none."""
    whole, kept, at = memoryview(data), [], 0
    for part in parts:
        kept.append(whole[at : part.start])
        at = part.end
    return b"".join((*kept, whole[at:])) if kept else data
