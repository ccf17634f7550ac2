"""Structure of a PNG file, from its chunks; only the coded pixels are decompressed."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from itertools import islice, takewhile
from typing import NamedTuple

from vssl_dist.data.bare import PngChunk, iter_png_chunks

from . import tiff_tags
from .structure_report import StructureReport

_MAX_CHUNKS = 100_000
_CRITICAL_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_TRANSPARENCY_BYTES = {0: 2, 2: 6}
"""Bytes that state a transparent grey or colour, by colour type."""
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
          (0, 1, 1, 2))  # fmt: skip
"""First column and row, and steps to the next ones, of an interlaced PNG's seven passes."""
_COMPRESSED_CHUNKS = (b"zTXt", b"iTXt", b"iCCP")
"""Texts and profiles that a decoder inflates."""
_MAX_INFLATION = 1032
"""Bytes that a single byte of deflate can become."""
_MAX_INFLATED_EACH = 8_000_000
"""Bytes that a decoder inflates of one text or profile."""
_MAX_INFLATED = 256_000_000
"""Bytes that a decoder may have to inflate for nothing: a second or two."""
_XMP = b"XML:com.adobe.xmp\0\0"
_MAX_PLAIN_SIDE = 1 << 16
"""Side below which a picture is plain: libraries have limits of their own beyond."""
_MAX_FRAMES = 1 << 31
_MAX_WINDOW_BITS = 15
"""Base two logarithm of how far back a zlib stream may refer."""
_PIECE_BYTES = 1 << 20


class _Header(NamedTuple):
    width: int
    height: int
    depth: int
    colour: int
    compression: int
    filtering: int
    interlaced: int


def inspect_png(data: bytes) -> StructureReport:
    """Inspect the structure of a PNG, from chunk to chunk."""
    png_chunks = list(islice(iter_png_chunks(data), _MAX_CHUNKS + 1))
    if len(png_chunks) > _MAX_CHUNKS:
        return StructureReport(f"more than {_MAX_CHUNKS} parts, which no encoder makes")
    try:
        intact = [_check_chunk(data, chunk) for chunk in png_chunks]
        if [chunk.chunk_type for chunk in png_chunks[-1:]] != [b"IEND"]:
            raise ValueError("its end is missing")
        header = _header(data, png_chunks)
        is_exact, unread_bytes = _check_pixels(data, png_chunks, header)
    except (ValueError, zlib.error) as error:
        return StructureReport(damage=str(error))
    kinds = [chunk.chunk_type for chunk in png_chunks]
    intact_chunks = [chunk for chunk, is_right in zip(png_chunks, intact, strict=True) if is_right]
    is_plain = (
        is_exact
        and all(intact)
        and kinds == [b"IHDR", *[b"IDAT"] * (len(kinds) - 2), b"IEND"]
        and all(chunk.end - chunk.start > 12 for chunk in png_chunks[:-1])
        and png_chunks[-1].start + 12 == len(data)
        and header[4:6] == (0, 0)
        and max(header[:2]) < _MAX_PLAIN_SIDE
    )
    oddity = _find_oddity(data, intact_chunks, header)
    if not oddity and _MAX_INFLATION * unread_bytes > _MAX_INFLATED:
        oddity = "PNG with more behind its pixels than decoders should have to read"
    return StructureReport("", "", oddity, is_plain and not oddity)


def _find_oddity(data: bytes, intact_chunks: Sequence[PngChunk], header: _Header) -> str:
    if header.depth != 8 or header.colour not in _TRANSPARENCY_BYTES:
        return f"PNG of {header.depth} bits and colour type {header.colour}"
    texts = (
        chunk.end - chunk.start for chunk in intact_chunks if chunk.chunk_type in _COMPRESSED_CHUNKS
    )
    if sum(min(_MAX_INFLATION * size, _MAX_INFLATED_EACH) for size in texts) > _MAX_INFLATED:
        return "PNG with more compressed texts than decoders should have to read"
    if _is_layered(data, intact_chunks, header):
        return "PNG with transparency or animation"
    orientation = _stated_orientation(data, intact_chunks)
    return f"EXIF orientation {orientation}" if orientation != 1 else ""


def read_orientation(data: bytes) -> int:
    """Read how the picture has to be turned, from EXIF or XMP that is not compressed."""
    walk = islice(iter_png_chunks(data), _MAX_CHUNKS)
    return _stated_orientation(
        data,
        [p for p in walk if p.chunk_type in (b"eXIf", b"iTXt") and _is_checksum_right(data, p)],
    )


def _stated_orientation(data: bytes, intact_chunks: Sequence[PngChunk]) -> int:
    """Return the orientation by the last EXIF or XMP, which is the one that libraries go by."""
    exif = xmp = b""
    for chunk in intact_chunks:
        if chunk.chunk_type == b"eXIf":
            exif = _content(data, chunk)
        elif chunk.chunk_type == b"iTXt" and data.startswith(_XMP, chunk.start + 8):
            xmp = _content(data, chunk)
    return tiff_tags.parse_orientation(exif, xmp)


def _content(data: bytes, chunk: PngChunk) -> bytes:
    return data[chunk.start + 8 : chunk.end - 4]


def _check_chunk(data: bytes, chunk: PngChunk) -> bool:
    """Tell whether a chunk's checksum is right, which only the picture's own chunks must have.

    Raises:
        ValueError: The chunk is cut short, or is of the picture and damaged or unknown.
    """
    name = chunk.chunk_type.decode("ascii", "replace")
    if chunk.end > len(data) or len(chunk.chunk_type) < 4:
        raise ValueError(f"it is cut short in {name or 'a chunk'}")
    is_critical = chunk.chunk_type[:1].isupper()
    if is_critical and chunk.chunk_type not in _CRITICAL_CHUNKS:
        raise ValueError(f"it has a part {name!r} that no decoder knows")
    is_right = _is_checksum_right(data, chunk)
    if is_critical and not is_right and chunk.chunk_type != b"IEND":
        raise ValueError(f"the checksum of its {name} differs")
    return is_right


def _is_checksum_right(data: bytes, chunk: PngChunk) -> bool:
    stated = int.from_bytes(data[chunk.end - 4 : chunk.end], "big")
    return zlib.crc32(memoryview(data)[chunk.start + 4 : chunk.end - 4]) == stated


def _header(data: bytes, png_chunks: Iterable[PngChunk]) -> _Header:
    """Parse the first chunk that describes the picture.

    Raises:
        ValueError: It is missing or of a wrong length.
    """
    body = next((_content(data, chunk) for chunk in png_chunks if chunk.chunk_type == b"IHDR"), b"")
    if len(body) != 13:
        raise ValueError(f"its IHDR has {len(body)} bytes instead of 13")
    return _Header(*struct.unpack(">IIBBBBB", body))


def _is_layered(data: bytes, intact_chunks: Iterable[PngChunk], header: _Header) -> bool:
    """Tell whether pixels are transparent, or pictures follow the first one."""
    frames = 0
    chunks_before_pixels = list(takewhile(lambda chunk: chunk.chunk_type != b"IDAT", intact_chunks))
    for chunk in chunks_before_pixels:
        body = _content(data, chunk)
        if chunk.chunk_type == b"tRNS" and len(body) >= _TRANSPARENCY_BYTES.get(
            header.colour, len(body) + 1
        ):
            return True
        if chunk.chunk_type == b"acTL" and len(body) >= 8:
            frames = int.from_bytes(body[:4], "big")
    # A picture without a frame of its own is one more, to be shown where nothing moves.
    has_separate_still = all(chunk.chunk_type != b"fcTL" for chunk in chunks_before_pixels)
    return 0 < frames <= _MAX_FRAMES and frames + has_separate_still > 1


def _check_pixels(data: bytes, png_chunks: Iterable[PngChunk], header: _Header) -> tuple[bool, int]:
    """Decompress the coded pixels to see whether they are whole.

    Returns:
        Whether they are all there and nothing else is, and how many bytes of the file a decoder
        may go on to inflate when it has them all.

    Raises:
        ValueError, zlib.error: Some are missing, or they are damaged.
    """
    # Inflated piece by piece and counted, never held: a bomb would take all memory.
    expected = remaining = _expected_bytes(header)
    decompressor = zlib.decompressobj()
    first_byte = b""
    has_data_behind = False
    unread_bytes = 0
    for chunk in png_chunks:
        if chunk.chunk_type != b"IDAT":
            continue
        compressed = _content(data, chunk)
        first_byte = first_byte or compressed[:1]
        has_data_behind = has_data_behind or (decompressor.eof and compressed != b"")
        if remaining < 0:
            unread_bytes += len(compressed)
            continue
        remaining -= _inflate(decompressor, compressed, remaining)
        unread_bytes = len(decompressor.unconsumed_tail)
    if remaining > 0:
        raise ValueError(f"{expected - remaining} of {expected} bytes of pixels are there")
    if remaining == 0 and not decompressor.eof:
        raise ValueError("the end of its coded pixels is missing")
    window_bytes = 1 << (8 + (first_byte[0] >> 4)) if first_byte else 0
    is_exact = remaining == 0 and not has_data_behind and not decompressor.unused_data
    return is_exact and window_bytes >= min(expected, 1 << _MAX_WINDOW_BITS), unread_bytes


def _expected_bytes(header: _Header) -> int:
    """Compute how many bytes of pixels there must be, each row with its filter byte."""
    bits = header.depth * _CHANNELS.get(header.colour, 0)
    total = 0
    for first_column, first_row, column_step, row_step in (
        _ADAM7 if header.interlaced else ((0, 0, 1, 1),)
    ):
        columns = -(-(header.width - first_column) // column_step)
        rows = -(-(header.height - first_row) // row_step)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def _inflate(decompressor: zlib._Decompress, compressed: bytes, limit: int) -> int:
    """Count the bytes that compressed pixels give, to a little beyond ``limit``."""
    inflated = 0
    pending = compressed
    while pending and inflated <= limit and not decompressor.eof:
        inflated += len(decompressor.decompress(pending, _PIECE_BYTES))
        pending = decompressor.unconsumed_tail
    return inflated
