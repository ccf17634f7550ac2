"""The segments of a JPEG, the chunks of a PNG, and either file without its metadata.

Texts, colour profiles, EXIF and the like are of no use to a training, and often damaged or larger
than a decoder allows.  Pillow refuses sound pictures for them, so it is given the picture alone.
Nothing here is decompressed or parsed, and nothing raises.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice, takewhile
from typing import NamedTuple

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8"
SCAN, END = 0xDA, 0xD9
STANDALONE = frozenset((0x01, *range(0xD0, 0xDA)))
"""Markers that no length and no data follow."""
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of frame headers; the three left out of the range belong to tables."""
APPLICATION, COMMENT = range(0xE0, 0xF0), 0xFE
JFIF, ADOBE = (0xE0, b"JFIF\0", 14), (0xEE, b"Adobe", 12)
"""Marker, first bytes and least length of the two segments that say what the channels are."""

_CHANNEL_SIGNATURES = (JFIF, ADOBE)
_METADATA_MARKERS = frozenset((*APPLICATION, COMMENT))
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
"""The next marker; neither restart markers nor stuffed 255 bytes end the coded data of a scan."""
_MAX_SECTIONS = 100_000
"""Segments or chunks that are looked at; metadata behind them stays in the file."""


class Segment(NamedTuple):
    """A marker of a JPEG and the data that belong to it."""

    marker: int
    start: int
    """Offset of the marker; bytes between it and the segment before belong to neither."""
    body: int
    """Offset of the length field, behind the marker."""
    end: int
    """Offset behind the last byte."""


class Chunk(NamedTuple):
    """One chunk of a PNG."""

    kind: bytes
    """The four letters of its type."""
    start: int
    """Offset of the length field, with which a chunk begins."""
    end: int
    """Offset behind the checksum; may lie beyond the end of the file."""


def segments(data: bytes) -> Iterator[Segment]:
    """Yield a JPEG's segments up to its end, without the coded data of its scans.

    >>> [hex(segment.marker) for segment in segments(b"\\xff\\xd8\\xff\\xfe\\0\\3!\\xff\\xd9")]
    ['0xfe', '0xd9']
    """
    marker = 0
    position = len(JPEG)
    while marker != END and (match := _MARKER.search(data, position)):
        marker = match[1][0]
        body = match.end()
        length = 0 if marker in STANDALONE else int.from_bytes(data[body : body + 2], "big")
        position = body + length
        yield Segment(marker, match.start(), body, position)


def chunks(data: bytes) -> Iterator[Chunk]:
    """Yield a PNG's chunks up to its end; the last one may be cut short."""
    start = len(PNG)
    kind = b""
    while start < len(data) and kind != b"IEND":
        # Twelve bytes beside the content: its length, the type and a checksum.
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        kind = data[start + 4 : start + 8]
        yield Chunk(kind, start, end)
        start = end


def has_signature(data: bytes, segment: Segment, signature: tuple[int, bytes, int]) -> bool:
    """Whether a segment has a marker, begins with some bytes and is long enough.

    Args:
        data: The JPEG.
        segment: One of its segments.
        signature: Marker, first bytes and least length, such as `JFIF` and `ADOBE`.
    """
    marker, prefix, least_size = signature
    size = segment.end - segment.body - 2
    return (
        segment.marker == marker
        and size >= least_size
        and data.startswith(prefix, segment.body + 2)
    )


def strip_metadata(data: bytes) -> bytes:
    """Return the picture alone: a PNG's critical chunks, a JPEG without remarks.

    Args:
        data: A file of any kind; what is neither JPEG nor PNG is returned as it is.
    """
    if data.startswith(PNG):
        return _without(data, _png_metadata(data))
    return _without(data, _jpeg_metadata(data)) if data.startswith(JPEG) else data


def _png_metadata(data: bytes) -> Iterator[Chunk]:
    # By the PNG standard a capital first letter marks a chunk without which nothing is shown.
    first_chunks = islice(chunks(data), _MAX_SECTIONS)
    return (chunk for chunk in first_chunks if not chunk.kind[:1].isupper())


def _jpeg_metadata(data: bytes) -> Iterator[Segment]:
    """Yield the remarks ahead of the first scan, but not those that say what the channels are."""
    first_segments = islice(segments(data), _MAX_SECTIONS)
    for segment in takewhile(lambda segment: segment.marker != SCAN, first_segments):
        # Without these two a decoder guesses the colour space, and may guess another one.
        if segment.marker in _METADATA_MARKERS and not any(
            has_signature(data, segment, signature) for signature in _CHANNEL_SIGNATURES
        ):
            yield segment


def _without(data: bytes, sections: Iterable[Chunk | Segment]) -> bytes:
    """Cut sections out of a file; returns the same object if there are none."""
    view = memoryview(data)  # slices of it copy nothing
    slices = []
    position = 0
    for section in sections:
        slices.append(view[position : section.start])
        position = section.end
    return b"".join((*slices, view[position:])) if slices else data
