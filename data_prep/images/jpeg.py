"""The form of a JPEG file, from its markers; what libraries make of the segments is not asked."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import islice, pairwise, takewhile

from vssl_dist.data.bare import (
    ADOBE,
    APPLICATION,
    COMMENT,
    END,
    FRAMES,
    SCAN,
    Segment,
    has_signature,
    segments,
)

from . import tags
from .form import Form

_MOST_SCANS = 100
"""Each is a pass over the whole picture, and encoders make some ten."""
_MOST_SEGMENTS = 100_000
_PLAIN = frozenset((0xC0, 0xC2, 0xC4, SCAN, 0xDB, 0xDD, *APPLICATION, COMMENT))
"""Baseline and progressive frames, tables, scans, and what decoders pass over."""
_SAMPLED = frozenset(bytes((luma, 0x11, 0x11)) for luma in (0x11, 0x12, 0x21, 0x22))
_EXIF, _SEVERAL = (0xE1, b"Exif\0\0", 6), (0xE2, b"MPF\0", 4)
_XMP = (0xE1, b"http://ns.adobe.com/xap/1.0/\0", 29)
_IMAGES, _ENTRIES, _ENTRY_BYTES = 0xB001, 0xB002, 16
"""Tags of the index of several pictures in one file, and what an entry of it takes."""
_GAIN_MAP = b' hdrgm:Version="'
"""In the XMP of a file whose second picture only brightens the first."""


def form(data: bytes) -> Form:
    """Walk over a JPEG, from marker to marker."""
    parts = list(islice(segments(data), _MOST_SEGMENTS + 1))
    if sum(part.marker == SCAN for part in parts) > _MOST_SCANS:
        return Form(f"more than {_MOST_SCANS} scans, which no encoder makes")
    if len(parts) > _MOST_SEGMENTS:
        return Form(f"more than {_MOST_SEGMENTS} segments, which no encoder makes")
    frames = [data[part.body + 2 : part.end] for part in parts if part.marker in FRAMES]
    gaps = _gaps(data, parts)
    ahead = list(takewhile(lambda part: part.marker != SCAN, parts))
    taken = _first(data, ahead, _EXIF)
    turn = tags.orientation(taken, _first(data, ahead, _XMP))
    odd = f"EXIF orientation {turn}" if turn != 1 else ""
    if any(gap.strip(b"\xff") for gap in gaps):  # any number of these may come before a marker
        odd = odd or "JPEG with bytes between its segments"
    plain = (
        not any(gaps)
        and [part.marker for part in parts[-2:]] == [SCAN, END]
        and parts[-1].end == len(data)
        and _PLAIN.issuperset(part.marker for part in parts[:-1])
        and [_ordinary(frame) for frame in frames] == [True]
        and {data[part.body + 13] for part in parts if has_signature(data, part, ADOBE)} <= {1}
        and (not taken or tags.well_formed(taken))
    )
    broken = next((wrong for frame in frames if (wrong := _sampling(frame))), "")
    return Form("", broken, "MPO file" if _several(data, parts) else odd, plain)


def orientation(data: bytes) -> int:
    """How the picture has to be turned, by EXIF or XMP ahead of it."""
    walk = takewhile(lambda part: part.marker != SCAN, segments(data))
    parts = list(islice(walk, _MOST_SEGMENTS))
    return tags.orientation(_first(data, parts, _EXIF), _first(data, parts, _XMP))


def _gaps(data: bytes, parts: Sequence[Segment]) -> list[bytes]:
    """What lies between the segments and belongs to none, as a scan's coded data does."""
    walk = [Segment(0xD8, 0, 2, 2), *parts]
    return [data[a.end : b.start] for a, b in pairwise(walk) if a.marker != SCAN]


def _first(data: bytes, parts: Iterable[Segment], sort: tuple[int, bytes, int]) -> bytes:
    """What follows the name in the first segment of a sort, b"" if there is none."""
    for part in parts:
        if has_signature(data, part, sort):
            return data[part.body + 2 + len(sort[1]) : part.end]
    return b""


def _several(data: bytes, parts: Sequence[Segment]) -> bool:
    """Whether there are more pictures behind the first one, and not only its gain map."""
    index = _first(data, parts, _SEVERAL)
    images = tags.number(index, _IMAGES) or 0
    if images < 2 or tags.size(index, _ENTRIES) < images * _ENTRY_BYTES:
        return False
    remarks = (part for part in parts if part.marker == 0xE1)
    return all(data.find(_GAIN_MAP, part.body, part.end) < 0 for part in remarks)


def _ordinary(frame: bytes) -> bool:
    """Whether it is of 8 bits, grey, or sampled as cameras do and numbered as JFIF says."""
    depth, height, width, channels = struct.unpack_from(">BHHB", frame.ljust(6, b"\0"))
    if depth != 8 or not height or not width or len(frame) != 6 + 3 * channels:
        return False
    if channels == 1:
        return frame[7] == 0x11
    return channels == 3 and frame[6::3] == b"\1\2\3" and frame[7::3] in _SAMPLED


def _sampling(frame: bytes) -> str:
    """Whether each channel has a whole fraction of the pixels of the finest one."""
    factors = [(byte >> 4, byte & 15) for byte in frame[7::3]]
    for own in zip(*factors, strict=True):
        finest = max(own)
        if any(factor == 0 or finest % factor for factor in own):
            return "channels sampled in steps that decoders refuse"
    return ""
