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

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8"
SCAN_MARKER, END_MARKER = 0xDA, 0xD9
STANDALONE_MARKERS = frozenset((0x01, *range(0xD0, 0xDA)))
"""Markers that no length and no data follow."""
FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of frame headers; the three left out of the range belong to tables."""
APPLICATION_MARKERS, COMMENT_MARKER = range(0xE0, 0xF0), 0xFE
JFIF_SIGNATURE, ADOBE_SIGNATURE = (0xE0, b"JFIF\0", 14), (0xEE, b"Adobe", 12)
"""Marker, first bytes and least length of the two segments that say what the channels are."""

_CHANNEL_SIGNATURES = (JFIF_SIGNATURE, ADOBE_SIGNATURE)
_METADATA_MARKERS = frozenset((*APPLICATION_MARKERS, COMMENT_MARKER))
_MARKER_PATTERN = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
"""The next marker; neither restart markers nor stuffed 255 bytes end the coded data of a scan."""
_MAX_SECTIONS = 100_000
"""Segments or chunks that are looked at; metadata behind them stays in the file."""


class JpegSegment(NamedTuple):
    """A marker of a JPEG and the data that belong to it."""

    marker: int
    start: int
    """Offset of the marker; bytes between it and the segment before belong to neither."""
    length_offset: int
    """Offset of the length field, behind the marker."""
    end: int
    """Offset behind the last byte."""


class PngChunk(NamedTuple):
    """One chunk of a PNG."""

    chunk_type: bytes
    """The four letters of its type."""
    start: int
    """Offset of the length field, with which a chunk begins."""
    end: int
    """Offset behind the checksum; may lie beyond the end of the file."""


def iter_jpeg_segments(data: bytes) -> Iterator[JpegSegment]:
    """Yield a JPEG's segments up to its end, without the coded data of its scans.

    >>> [
    ...     hex(segment.marker)
    ...     for segment in iter_jpeg_segments(b"\\xff\\xd8\\xff\\xfe\\0\\3!\\xff\\xd9")
    ... ]
    ['0xfe', '0xd9']
    """
    marker = 0
    next_offset = len(JPEG_SIGNATURE)
    while marker != END_MARKER and (marker_match := _MARKER_PATTERN.search(data, next_offset)):
        marker = marker_match[1][0]
        length_offset = marker_match.end()
        length = (
            0
            if marker in STANDALONE_MARKERS
            else int.from_bytes(data[length_offset : length_offset + 2], "big")
        )
        next_offset = length_offset + length
        yield JpegSegment(marker, marker_match.start(), length_offset, next_offset)


def iter_png_chunks(data: bytes) -> Iterator[PngChunk]:
    """Yield a PNG's chunks up to its end; the last one may be cut short."""
    start = len(PNG_SIGNATURE)
    chunk_type = b""
    while start < len(data) and chunk_type != b"IEND":
        # Twelve bytes beside the content: its length, the type and a checksum.
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        chunk_type = data[start + 4 : start + 8]
        yield PngChunk(chunk_type, start, end)
        start = end


def has_segment_signature(
    data: bytes, segment: JpegSegment, signature: tuple[int, bytes, int]
) -> bool:
    """Whether a segment has a marker, begins with some bytes and is long enough.

    Args:
        data: The JPEG.
        segment: One of its segments.
        signature: Marker, first bytes and least length, such as `JFIF_SIGNATURE`.
    """
    marker, content_prefix, min_content_size = signature
    content_size = segment.end - segment.length_offset - 2
    return (
        segment.marker == marker
        and content_size >= min_content_size
        and data.startswith(content_prefix, segment.length_offset + 2)
    )


def strip_metadata(data: bytes) -> bytes:
    """Return the picture alone: a PNG's critical chunks, a JPEG without remarks.

    Args:
        data: A file of any kind; what is neither JPEG nor PNG is returned as it is.
    """
    if data.startswith(PNG_SIGNATURE):
        return _cut_sections(data, _png_metadata(data))
    return _cut_sections(data, _jpeg_metadata(data)) if data.startswith(JPEG_SIGNATURE) else data


def _png_metadata(data: bytes) -> Iterator[PngChunk]:
    # By the PNG standard a capital first letter marks a chunk without which nothing is shown.
    first_chunks = islice(iter_png_chunks(data), _MAX_SECTIONS)
    return (chunk for chunk in first_chunks if not chunk.chunk_type[:1].isupper())


def _jpeg_metadata(data: bytes) -> Iterator[JpegSegment]:
    """Yield the remarks ahead of the first scan, but not those that say what the channels are."""
    first_segments = islice(iter_jpeg_segments(data), _MAX_SECTIONS)
    for segment in takewhile(lambda segment: segment.marker != SCAN_MARKER, first_segments):
        # Without these two a decoder guesses the colour space, and may guess another one.
        if segment.marker in _METADATA_MARKERS and not any(
            has_segment_signature(data, segment, signature) for signature in _CHANNEL_SIGNATURES
        ):
            yield segment


def _cut_sections(data: bytes, sections: Iterable[PngChunk | JpegSegment]) -> bytes:
    """Cut sections out of a file; returns the same object if there are none."""
    view = memoryview(data)  # slices of it copy nothing
    kept_slices = []
    next_offset = 0
    for section in sections:
        kept_slices.append(view[next_offset : section.start])
        next_offset = section.end
    return b"".join((*kept_slices, view[next_offset:])) if kept_slices else data
