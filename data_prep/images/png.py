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
_CHANNELS_BY_COLOUR_TYPE = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_TRANSPARENCY_BYTES = {0: 2, 2: 6}
"""Bytes that state a transparent grey or colour, by colour type."""
_ADAM7_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
          (0, 1, 1, 2))  # fmt: skip
"""First column and row, and steps to the next ones, of an interlaced PNG's seven passes."""
_COMPRESSED_CHUNKS = (b"zTXt", b"iTXt", b"iCCP")
"""Texts and profiles that a decoder inflates."""
_MAX_INFLATION_FACTOR = 1032
"""Bytes that a single byte of deflate can become."""
_MAX_INFLATED_CHUNK_BYTES = 8_000_000
"""Bytes that a decoder inflates of one text or profile."""
_MAX_INFLATED_BYTES = 256_000_000
"""Bytes that a decoder may have to inflate for nothing: a second or two."""
_XMP_KEYWORD = b"XML:com.adobe.xmp\0\0"
_MAX_PLAIN_SIDE = 1 << 16
"""Side below which a picture is plain: libraries have limits of their own beyond."""
_MAX_ANIMATION_FRAMES = 1 << 31
_MAX_WINDOW_BITS = 15
"""Base two logarithm of how far back a zlib stream may refer."""
_INFLATED_PIECE_BYTES = 1 << 20


class _PngHeader(NamedTuple):
    width: int
    height: int
    bits_per_channel: int
    colour_type: int
    compression_method: int
    filter_method: int
    interlaced: int


def inspect_png_structure(data: bytes) -> StructureReport:
    """Inspect the structure of a PNG, from chunk to chunk."""
    png_chunks = list(islice(iter_png_chunks(data), _MAX_CHUNKS + 1))
    if len(png_chunks) > _MAX_CHUNKS:
        return StructureReport(f"more than {_MAX_CHUNKS} parts, which no encoder makes")
    try:
        checksums_right = [_check_chunk(data, chunk) for chunk in png_chunks]
        if [chunk.chunk_type for chunk in png_chunks[-1:]] != [b"IEND"]:
            raise ValueError("its end is missing")
        header = _parse_header(data, png_chunks)
        has_exact_size, unread_bytes = _check_coded_pixels(data, png_chunks, header)
    except (ValueError, zlib.error) as error:
        return StructureReport(damage=str(error))
    chunk_types = [chunk.chunk_type for chunk in png_chunks]
    intact_chunks = [
        chunk
        for chunk, is_checksum_right in zip(png_chunks, checksums_right, strict=True)
        if is_checksum_right
    ]
    is_plain = (
        has_exact_size
        and all(checksums_right)
        and chunk_types == [b"IHDR", *[b"IDAT"] * (len(chunk_types) - 2), b"IEND"]
        and all(chunk.end - chunk.start > 12 for chunk in png_chunks[:-1])
        and png_chunks[-1].start + 12 == len(data)
        and header[4:6] == (0, 0)
        and max(header[:2]) < _MAX_PLAIN_SIDE
    )
    remake_reason = _find_remake_reason(data, intact_chunks, header)
    if not remake_reason and _MAX_INFLATION_FACTOR * unread_bytes > _MAX_INFLATED_BYTES:
        remake_reason = "PNG with more behind its pixels than decoders should have to read"
    return StructureReport("", "", remake_reason, is_plain and not remake_reason)


def _find_remake_reason(data: bytes, intact_chunks: Sequence[PngChunk], header: _PngHeader) -> str:
    if header.bits_per_channel != 8 or header.colour_type not in _TRANSPARENCY_BYTES:
        return f"PNG of {header.bits_per_channel} bits and colour type {header.colour_type}"
    compressed_chunk_sizes = (
        chunk.end - chunk.start for chunk in intact_chunks if chunk.chunk_type in _COMPRESSED_CHUNKS
    )
    if (
        sum(
            min(_MAX_INFLATION_FACTOR * size, _MAX_INFLATED_CHUNK_BYTES)
            for size in compressed_chunk_sizes
        )
        > _MAX_INFLATED_BYTES
    ):
        return "PNG with more compressed texts than decoders should have to read"
    if _is_transparent_or_animated(data, intact_chunks, header):
        return "PNG with transparency or animation"
    orientation = _stated_orientation(data, intact_chunks)
    return f"EXIF orientation {orientation}" if orientation != 1 else ""


def read_orientation(data: bytes) -> int:
    """Read how the picture has to be turned, from EXIF or XMP that is not compressed."""
    first_chunks = islice(iter_png_chunks(data), _MAX_CHUNKS)
    return _stated_orientation(
        data,
        [
            chunk
            for chunk in first_chunks
            if chunk.chunk_type in (b"eXIf", b"iTXt") and _is_checksum_right(data, chunk)
        ],
    )


def _stated_orientation(data: bytes, intact_chunks: Sequence[PngChunk]) -> int:
    """Return the orientation by the last EXIF or XMP, which is the one that libraries go by."""
    exif = xmp = b""
    for chunk in intact_chunks:
        if chunk.chunk_type == b"eXIf":
            exif = _chunk_content(data, chunk)
        elif chunk.chunk_type == b"iTXt" and data.startswith(_XMP_KEYWORD, chunk.start + 8):
            xmp = _chunk_content(data, chunk)
    return tiff_tags.parse_orientation(exif, xmp)


def _chunk_content(data: bytes, chunk: PngChunk) -> bytes:
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
    is_checksum_right = _is_checksum_right(data, chunk)
    if is_critical and not is_checksum_right and chunk.chunk_type != b"IEND":
        raise ValueError(f"the checksum of its {name} differs")
    return is_checksum_right


def _is_checksum_right(data: bytes, chunk: PngChunk) -> bool:
    stated_checksum = int.from_bytes(data[chunk.end - 4 : chunk.end], "big")
    return zlib.crc32(memoryview(data)[chunk.start + 4 : chunk.end - 4]) == stated_checksum


def _parse_header(data: bytes, png_chunks: Iterable[PngChunk]) -> _PngHeader:
    """Parse the first chunk that describes the picture.

    Raises:
        ValueError: It is missing or of a wrong length.
    """
    chunk_body = next(
        (_chunk_content(data, chunk) for chunk in png_chunks if chunk.chunk_type == b"IHDR"), b""
    )
    if len(chunk_body) != 13:
        raise ValueError(f"its IHDR has {len(chunk_body)} bytes instead of 13")
    return _PngHeader(*struct.unpack(">IIBBBBB", chunk_body))


def _is_transparent_or_animated(
    data: bytes, intact_chunks: Iterable[PngChunk], header: _PngHeader
) -> bool:
    """Tell whether pixels are transparent, or pictures follow the first one."""
    num_frames = 0
    chunks_before_pixels = list(takewhile(lambda chunk: chunk.chunk_type != b"IDAT", intact_chunks))
    for chunk in chunks_before_pixels:
        chunk_body = _chunk_content(data, chunk)
        if chunk.chunk_type == b"tRNS" and len(chunk_body) >= _TRANSPARENCY_BYTES.get(
            header.colour_type, len(chunk_body) + 1
        ):
            return True
        if chunk.chunk_type == b"acTL" and len(chunk_body) >= 8:
            num_frames = int.from_bytes(chunk_body[:4], "big")
    # A picture without a frame of its own is one more, to be shown where nothing moves.
    has_separate_still = all(chunk.chunk_type != b"fcTL" for chunk in chunks_before_pixels)
    return 0 < num_frames <= _MAX_ANIMATION_FRAMES and num_frames + has_separate_still > 1


def _check_coded_pixels(
    data: bytes, png_chunks: Iterable[PngChunk], header: _PngHeader
) -> tuple[bool, int]:
    """Decompress the coded pixels to see whether they are whole.

    Returns:
        Whether they are all there and nothing else is, and how many bytes of the file a decoder
        may go on to inflate when it has them all.

    Raises:
        ValueError, zlib.error: Some are missing, or they are damaged.
    """
    # Inflated piece by piece and counted, never held: a bomb would take all memory.
    expected_bytes = remaining_bytes = _count_pixel_bytes(header)
    decompressor = zlib.decompressobj()
    first_byte = b""
    has_data_behind = False
    unread_bytes = 0
    for chunk in png_chunks:
        if chunk.chunk_type != b"IDAT":
            continue
        compressed = _chunk_content(data, chunk)
        first_byte = first_byte or compressed[:1]
        has_data_behind = has_data_behind or (decompressor.eof and compressed != b"")
        if remaining_bytes < 0:
            unread_bytes += len(compressed)
            continue
        remaining_bytes -= _count_inflated_bytes(decompressor, compressed, remaining_bytes)
        unread_bytes = len(decompressor.unconsumed_tail)
    if remaining_bytes > 0:
        raise ValueError(
            f"{expected_bytes - remaining_bytes} of {expected_bytes} bytes of pixels are there"
        )
    if remaining_bytes == 0 and not decompressor.eof:
        raise ValueError("the end of its coded pixels is missing")
    window_bytes = 1 << (8 + (first_byte[0] >> 4)) if first_byte else 0
    has_exact_size = remaining_bytes == 0 and not has_data_behind and not decompressor.unused_data
    return has_exact_size and window_bytes >= min(
        expected_bytes, 1 << _MAX_WINDOW_BITS
    ), unread_bytes


def _count_pixel_bytes(header: _PngHeader) -> int:
    """Compute how many bytes of pixels there must be, each row with its filter byte."""
    bits = header.bits_per_channel * _CHANNELS_BY_COLOUR_TYPE.get(header.colour_type, 0)
    total_bytes = 0
    for first_column, first_row, column_step, row_step in (
        _ADAM7_PASSES if header.interlaced else ((0, 0, 1, 1),)
    ):
        columns = -(-(header.width - first_column) // column_step)
        rows = -(-(header.height - first_row) // row_step)
        if columns > 0 and rows > 0:
            total_bytes += rows * (1 + (columns * bits + 7) // 8)
    return total_bytes


def _count_inflated_bytes(decompressor: zlib._Decompress, compressed: bytes, limit: int) -> int:
    """Count the bytes that compressed pixels give, to a little beyond ``limit``."""
    inflated_bytes = 0
    pending_bytes = compressed
    while pending_bytes and inflated_bytes <= limit and not decompressor.eof:
        inflated_bytes += len(decompressor.decompress(pending_bytes, _INFLATED_PIECE_BYTES))
        pending_bytes = decompressor.unconsumed_tail
    return inflated_bytes
