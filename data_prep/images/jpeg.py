"""Structure of a JPEG file, from its markers and without any library that reads JPEGs."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import islice, pairwise, takewhile

from vssl_dist.data.bare import (
    ADOBE_SIGNATURE,
    APPLICATION_MARKERS,
    COMMENT_MARKER,
    END_MARKER,
    FRAME_MARKERS,
    SCAN_MARKER,
    JpegSegment,
    has_segment_signature,
    iter_jpeg_segments,
)

from . import tiff_tags
from .structure_report import StructureReport

_MAX_SCANS = 100
"""Scans that a file may have: each is a pass over the whole picture, encoders make ten or so."""
_MAX_SEGMENTS = 100_000
_PLAIN_MARKERS = frozenset(
    (0xC0, 0xC2, 0xC4, SCAN_MARKER, 0xDB, 0xDD, *APPLICATION_MARKERS, COMMENT_MARKER)
)
"""Baseline and progressive frames, tables, scans, and what decoders pass over."""
_PLAIN_SAMPLINGS = frozenset(
    bytes((luma_factors, 0x11, 0x11)) for luma_factors in (0x11, 0x12, 0x21, 0x22)
)
_EXIF_SIGNATURE = (0xE1, b"Exif\0\0", 6)
_MULTI_PICTURE_SIGNATURE = (0xE2, b"MPF\0", 4)
_XMP_SIGNATURE = (0xE1, b"http://ns.adobe.com/xap/1.0/\0", 29)
_PICTURE_COUNT_TAG = 0xB001
_PICTURE_INDEX_TAG = 0xB002
"""Tags of the index of several pictures in one file (MPF)."""
_PICTURE_INDEX_ENTRY_BYTES = 16
_GAIN_MAP_XMP_TEXT = b' hdrgm:Version="'
"""Text in the XMP of a file whose second picture only brightens the first."""


def inspect_jpeg_structure(data: bytes) -> StructureReport:
    """Inspect the structure of a JPEG, from marker to marker."""
    jpeg_segments = list(islice(iter_jpeg_segments(data), _MAX_SEGMENTS + 1))
    if sum(segment.marker == SCAN_MARKER for segment in jpeg_segments) > _MAX_SCANS:
        return StructureReport(f"more than {_MAX_SCANS} scans, which no encoder makes")
    if len(jpeg_segments) > _MAX_SEGMENTS:
        return StructureReport(f"more than {_MAX_SEGMENTS} segments, which no encoder makes")
    frame_contents = [
        data[segment.length_offset + 2 : segment.end]
        for segment in jpeg_segments
        if segment.marker in FRAME_MARKERS
    ]
    segment_gaps = _list_bytes_between(data, jpeg_segments)
    header_segments = list(takewhile(lambda segment: segment.marker != SCAN_MARKER, jpeg_segments))
    exif_block = _segment_content(data, header_segments, _EXIF_SIGNATURE)
    orientation = tiff_tags.parse_orientation(
        exif_block, _segment_content(data, header_segments, _XMP_SIGNATURE)
    )
    remake_reason = f"EXIF orientation {orientation}" if orientation != 1 else ""
    # Any number of 255 bytes may come before a marker.
    if any(gap.strip(b"\xff") for gap in segment_gaps):
        remake_reason = remake_reason or "JPEG with bytes between its segments"
    is_plain = (
        not any(segment_gaps)
        and [segment.marker for segment in jpeg_segments[-2:]] == [SCAN_MARKER, END_MARKER]
        and jpeg_segments[-1].end == len(data)
        and _PLAIN_MARKERS.issuperset(segment.marker for segment in jpeg_segments[:-1])
        and [_is_plain_frame(frame) for frame in frame_contents] == [True]
        and {
            data[segment.length_offset + 13]
            for segment in jpeg_segments
            if has_segment_signature(data, segment, ADOBE_SIGNATURE)
        }
        <= {1}
        and (not exif_block or tiff_tags.is_tiff_directory(exif_block))
    )
    damage = next((flaw for frame in frame_contents if (flaw := _find_sampling_flaw(frame))), "")
    return StructureReport(
        "",
        damage,
        "MPO file" if _has_more_pictures(data, jpeg_segments) else remake_reason,
        is_plain,
    )


def read_orientation(data: bytes) -> int:
    """Read how the picture has to be turned, from EXIF or XMP ahead of it."""
    header_segments = takewhile(
        lambda segment: segment.marker != SCAN_MARKER, iter_jpeg_segments(data)
    )
    jpeg_segments = list(islice(header_segments, _MAX_SEGMENTS))
    return tiff_tags.parse_orientation(
        _segment_content(data, jpeg_segments, _EXIF_SIGNATURE),
        _segment_content(data, jpeg_segments, _XMP_SIGNATURE),
    )


def _list_bytes_between(data: bytes, jpeg_segments: Sequence[JpegSegment]) -> list[bytes]:
    """List the bytes between segments that belong to none; coded data belongs to its scan."""
    segments_in_order = [JpegSegment(0xD8, 0, 2, 2), *jpeg_segments]
    return [
        data[before.end : after.start]
        for before, after in pairwise(segments_in_order)
        if before.marker != SCAN_MARKER
    ]


def _segment_content(
    data: bytes, jpeg_segments: Iterable[JpegSegment], segment_signature: tuple[int, bytes, int]
) -> bytes:
    """Return what follows the identifier in the first such segment; b"" if there is none."""
    for segment in jpeg_segments:
        if has_segment_signature(data, segment, segment_signature):
            return data[segment.length_offset + 2 + len(segment_signature[1]) : segment.end]
    return b""


def _has_more_pictures(data: bytes, jpeg_segments: Sequence[JpegSegment]) -> bool:
    """Tell whether more pictures follow the first one, other than its gain map."""
    picture_index = _segment_content(data, jpeg_segments, _MULTI_PICTURE_SIGNATURE)
    picture_count = tiff_tags.read_tag_number(picture_index, _PICTURE_COUNT_TAG) or 0
    if (
        picture_count < 2
        or tiff_tags.tag_byte_count(picture_index, _PICTURE_INDEX_TAG)
        < picture_count * _PICTURE_INDEX_ENTRY_BYTES
    ):
        return False
    app1_segments = (segment for segment in jpeg_segments if segment.marker == 0xE1)
    return all(
        data.find(_GAIN_MAP_XMP_TEXT, segment.length_offset, segment.end) < 0
        for segment in app1_segments
    )


def _is_plain_frame(frame: bytes) -> bool:
    """Tell whether a frame has 8 bits and is grey, or is sampled as cameras do and as JFIF says."""
    bits_per_channel, height, width, num_channels = struct.unpack_from(
        ">BHHB", frame.ljust(6, b"\0")
    )
    if bits_per_channel != 8 or not height or not width or len(frame) != 6 + 3 * num_channels:
        return False
    if num_channels == 1:
        return frame[7] == 0x11
    return num_channels == 3 and frame[6::3] == b"\1\2\3" and frame[7::3] in _PLAIN_SAMPLINGS


def _find_sampling_flaw(frame: bytes) -> str:
    """Say what is wrong with the sampling: each channel must divide the finest one."""
    sampling_factors = [(byte >> 4, byte & 15) for byte in frame[7::3]]
    for axis_factors in zip(*sampling_factors, strict=True):
        finest_factor = max(axis_factors)
        if any(factor == 0 or finest_factor % factor for factor in axis_factors):
            return "channels sampled in steps that decoders refuse"
    return ""
